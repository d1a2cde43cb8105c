"""Forward and backward of one small operation, sin of 8 floats, alone and in a chain of 100."""

import numpy as np

LENGTH = 100


def _arrays(n):
    return np.linspace(-1, 1, n, dtype=np.float32), np.linspace(1, 2, n, dtype=np.float32)


def _chain(sin):
    def chain(x):
        for _ in range(LENGTH):
            x = sin(x)
        return x

    return chain


def _pair(run):
    """A step, and its last gradient as the result."""
    return run, lambda: {"gradient": np.asarray(run())}


def minigrad(n=8, f=np.sin):
    """The pull-back of np.sin."""
    from minigrad import vjp

    x, g = _arrays(n)
    return _pair(lambda: vjp(f, x)[1](g)[0])


def minigrad_chain(n=8):
    """The pull-back of the chain."""
    return minigrad(n, _chain(np.sin))


def torch(n=8, chained=False):
    """PyTorch, eager, with its shortest call that returns a gradient."""
    import torch

    x, g = map(torch.from_numpy, _arrays(n))
    x.requires_grad_()
    f = _chain(torch.sin) if chained else torch.sin
    return _pair(lambda: torch.autograd.grad(f(x), x, g)[0])


def torch_chain(n=8):
    """PyTorch, the chain."""
    return torch(n, chained=True)


def autograd(n=8, chained=False):
    """HIPS autograd."""
    import autograd.numpy as anp
    from autograd.core import make_vjp

    x, g = _arrays(n)
    f = _chain(anp.sin) if chained else anp.sin
    return _pair(lambda: make_vjp(f, x)[0](g))


def autograd_chain(n=8):
    """HIPS autograd, the chain."""
    return autograd(n, chained=True)


def mygrad(n=8, chained=False):
    """MyGrad, without its guards against writing into arrays."""
    import mygrad

    mygrad.turn_memory_guarding_off()
    start, g = _arrays(n)
    f = _chain(mygrad.sin) if chained else mygrad.sin

    def run():
        x = mygrad.tensor(start, copy=False)
        f(x).backward(g)
        return x.grad

    return _pair(run)


def mygrad_chain(n=8):
    """MyGrad, the chain."""
    return mygrad(n, chained=True)


def jax(n=8, chained=False):
    """JAX, forward and backward compiled as one."""
    import jax
    import jax.numpy as jnp

    x, g = map(jnp.asarray, _arrays(n))
    f = _chain(jnp.sin) if chained else jnp.sin
    compiled = jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0]).lower(x, g).compile()
    return _pair(lambda: compiled(x, g).block_until_ready())


def jax_chain(n=8):
    """JAX, the chain."""
    return jax(n, chained=True)


def numpy(n=8):
    """The three calls that any implementation makes."""
    x, g = _arrays(n)

    def run():
        np.sin(x)
        return np.cos(x) * g

    return _pair(run)


def numpy_chain(n=8):
    """The chain by hand."""
    x, last = _arrays(n)

    def run():
        xs = [x]
        for _ in range(LENGTH):
            xs.append(np.sin(xs[-1]))
        g = last
        for y in reversed(xs[:-1]):
            g = np.cos(y) * g
        return g

    return _pair(run)
