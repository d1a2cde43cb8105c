"""Forward and backward of one small operation, sin of 8 floats, alone and in a chain of 100."""

import numpy as np

LENGTH = 100
X, G = np.linspace(-1, 1, 8), np.linspace(1, 2, 8)


def _pair(run):
    """A step, and its last gradient as the result."""
    return run, lambda: {"gradient": np.asarray(run())}


def minigrad():
    """The pull-back of np.sin."""
    from minigrad import vjp

    return _pair(lambda: vjp(np.sin, X)[1](G)[0])


def minigrad_chain():
    """The pull-back of the chain."""
    from minigrad import vjp

    def chain(x):
        for _ in range(LENGTH):
            x = np.sin(x)
        return x

    return _pair(lambda: vjp(chain, X)[1](G)[0])


def torch():
    """PyTorch, eager, with its shortest call that returns a gradient."""
    import torch

    x, g = torch.tensor(X, requires_grad=True), torch.tensor(G)
    return _pair(lambda: torch.autograd.grad(torch.sin(x), x, g)[0])


def torch_chain():
    """PyTorch, the chain."""
    import torch

    x, g = torch.tensor(X, requires_grad=True), torch.tensor(G)

    def run():
        y = x
        for _ in range(LENGTH):
            y = torch.sin(y)
        return torch.autograd.grad(y, x, g)[0]

    return _pair(run)


def autograd():
    """HIPS autograd."""
    import autograd.numpy as anp
    from autograd.core import make_vjp

    return _pair(lambda: make_vjp(anp.sin, X)[0](G))


def autograd_chain():
    """HIPS autograd, the chain."""
    import autograd.numpy as anp
    from autograd.core import make_vjp

    def chain(x):
        for _ in range(LENGTH):
            x = anp.sin(x)
        return x

    return _pair(lambda: make_vjp(chain, X)[0](G))


def numpy():
    """The three calls that any implementation makes."""

    def run():
        np.sin(X)
        return np.cos(X) * G

    return _pair(run)


def numpy_chain():
    """The chain by hand."""

    def run():
        xs = [X]
        for _ in range(LENGTH):
            xs.append(np.sin(xs[-1]))
        g = G
        for x in reversed(xs[:-1]):
            g = np.cos(x) * g
        return g

    return _pair(run)
