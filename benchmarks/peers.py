"""What the setups of several cases share: Adam where a framework has none, and a peer's best form.

Adam is that of Kingma and Ba (2015), Algorithm 1, with the same settings everywhere.
"""

import time

import numpy as np

RATE, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8
_chosen = {}


def fastest(name, *forms):
    """Return the fastest of several forms of a step; which one it is, is found out at first use.

    A form is a pair (threads of PyTorch or None, function). The choice is kept under `name`.
    """

    def use(i):
        threads, form = forms[i]
        if threads:
            import torch

            torch.set_num_threads(threads)
        return form

    def seconds(i):
        form, taken = use(i), []
        form()
        while len(taken) < 3 or sum(taken) < 0.05:
            start = time.perf_counter()
            form()
            taken.append(time.perf_counter() - start)
        return min(taken)

    step = None

    def run():
        nonlocal step
        if step is None:
            if name not in _chosen:
                _chosen[name] = min(range(len(forms)), key=seconds)
            step = use(_chosen[name])
        return step()

    return run


def torch_fastest(name, *forms):
    """As `fastest`, each form of PyTorch with one thread and with all."""
    import torch

    threads = sorted({1, torch.get_num_threads()})
    return fastest(name, *((n, form) for form in forms for n in threads))


def torch_step(loss, params):
    """Return a training step of PyTorch: gradient of `loss(params)`, and its fused Adam."""
    import torch

    optimizer = torch.optim.Adam(params.values(), lr=RATE, betas=(B1, B2), eps=EPS, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss(params).backward()
        optimizer.step()

    return step


def numpy_adam(params, rate=RATE):
    """Return `update(grads)`, which takes a step in place and overwrites the gradients."""
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    taken = 0

    def update(grads):
        nonlocal taken
        taken += 1
        c = float(np.sqrt(1 - B2**taken))
        for name, g in grads.items():
            m[name] += (1 - B1) * (g - m[name])
            g *= g
            g -= v[name]
            g *= 1 - B2
            v[name] += g
            np.sqrt(v[name], out=g)
            g += c * EPS
            np.divide(m[name], g, out=g)
            g *= rate * c / (1 - B1**taken)
            params[name] -= g

    return update


def jax_adam(rate=RATE):
    """Return init(params) and update(grads, state, params) for JAX."""
    import jax
    import jax.numpy as jnp

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), jnp.int32), zeros(), zeros()

    def update(grads, state, params):
        t, m, v = state
        t = t + 1
        m = jax.tree.map(lambda m, g: m + (1 - B1) * (g - m), m, grads)
        v = jax.tree.map(lambda v, g: v + (1 - B2) * (g * g - v), v, grads)
        c = jnp.sqrt(1 - jnp.float32(B2) ** t)
        scale = rate * c / (1 - jnp.float32(B1) ** t)
        move = lambda p, m, v: p - scale * m / (jnp.sqrt(v) + c * EPS)
        return jax.tree.map(move, params, m, v), (t, m, v)

    return init, update


def jax_step(update, state):
    """Return a step of JAX, `update` of the state, compiled ahead and its buffers donated.

    And a function that returns the state.
    """
    import jax

    state = jax.tree.map(jax.numpy.array, state)  # copies: what is donated is gone
    compiled = jax.jit(update, donate_argnums=0).lower(state).compile()

    def step():
        nonlocal state
        state = jax.block_until_ready(compiled(state))

    return step, lambda: state


def jax_training_step(loss, params):
    """Return, as `jax_step` does, a step of JAX: gradient of `loss(params)` and Adam in one."""
    import jax

    init, update = jax_adam()

    def step(state):
        params, inner = state
        return update(jax.grad(loss)(params), inner, params)

    params = jax.tree.map(jax.numpy.asarray, params)
    return jax_step(step, (params, init(params)))
