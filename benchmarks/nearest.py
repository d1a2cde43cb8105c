"""The nearest of 512 codes to 3136 vectors of 64 numbers: a matrix product and an argmin."""

import numpy as np

from benchmarks import peers

ROWS, CODES, WIDTH = 3136, 512, 64


def _case(n, step):
    """The step, and as the result the distance of each vector to the code that was found."""
    x, codebook = _arrays(n)

    def result():
        indices = np.asarray(step())
        return {"distance": np.sum((x - codebook[indices]) ** 2, axis=1)}

    return step, result


def _arrays(n):
    rng = np.random.default_rng(0)
    draw = lambda rows: rng.standard_normal((rows, WIDTH), dtype=np.float32)
    return draw(n), draw(CODES)


def minigrad(n=ROWS):
    """The kernel, block by block."""
    from minigrad.kernels.vq import nearest

    x, codebook = _arrays(n)
    return _case(n, lambda: nearest(x, codebook))


def numpy(n=ROWS):
    """One matrix product; |x|^2, which is the same for all codes, is left out."""
    x, codebook = _arrays(n)

    def step():
        scores = x @ codebook.T
        scores -= 0.5 * np.einsum("kd,kd->k", codebook, codebook)
        return np.argmax(scores, axis=1)

    return _case(n, step)


def torch(n=ROWS):
    """The same."""
    import torch

    x, codebook = map(torch.from_numpy, _arrays(n))

    def step():
        norms = codebook.square().sum(1)
        return torch.addmm(norms, x, codebook.T, beta=-0.5).argmax(1)

    return peers.torch_fastest("nearest", step), _case(n, step)[1]


def jax(n=ROWS):
    """The same, compiled."""
    import jax
    import jax.numpy as jnp

    x, codebook = map(jnp.asarray, _arrays(n))
    best = lambda x, e: jnp.argmax(x @ e.T - 0.5 * jnp.sum(e * e, 1), axis=1)
    compiled = jax.jit(best).lower(x, codebook).compile()
    return _case(n, lambda: compiled(x, codebook).block_until_ready())
