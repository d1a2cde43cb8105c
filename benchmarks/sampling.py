"""Draws: 784,000 Bernoulli variables with probabilities of their own, 100,000 from 10 categories.

Both from parameters in float32; the bits come as float32, the categories as integers. Each
framework draws with its own generator, so the results are frequencies with their standard errors.
"""

import numpy as np

from benchmarks import peers

IMAGES, PIXELS, ROWS, CATEGORIES = 1000, 784, 100_000, 10
REPEATS = 20


def _probs(n):
    return np.random.default_rng(0).random((n, PIXELS), dtype=np.float32)


def _logits(n):
    return 2 * np.random.default_rng(0).standard_normal((n, CATEGORIES), dtype=np.float32)


def _frequencies(draws):
    """Means over the rows of several draws, with standard errors; `draws()` returns (N, D)."""
    means = [np.mean(np.asarray(draws(), np.float32), axis=0) for _ in range(REPEATS)]
    error = np.std(means, axis=0, ddof=1) / np.sqrt(REPEATS)
    # the frequencies of single columns are too rare for their error to be known
    error = np.maximum(error, np.sqrt(np.mean(np.square(error))))
    return {"mean": np.mean(means, axis=0), "mean error": error}


def _bernoulli(draw):
    return draw, lambda: _frequencies(draw)


def _categorical(draw):
    return draw, lambda: _frequencies(lambda: np.eye(CATEGORIES)[np.asarray(draw())])


def minigrad_bernoulli(n=IMAGES):
    """The kernel, which draws 16 bits for each and more where they do not decide."""
    from minigrad.kernels.sampling import bernoulli

    probs, rng = _probs(n), np.random.default_rng(1)
    return _bernoulli(lambda: bernoulli(rng, probs=probs))


def numpy_bernoulli(n=IMAGES):
    """Uniforms, compared."""
    probs, rng = _probs(n), np.random.default_rng(1)
    uniforms = np.empty_like(probs)

    def draw():
        rng.random(dtype=np.float32, out=uniforms)
        return np.less(uniforms, probs).astype(np.float32)

    return _bernoulli(draw)


def torch_bernoulli(n=IMAGES):
    """torch.bernoulli, or uniforms, compared."""
    import torch

    torch.manual_seed(1)
    probs = torch.from_numpy(_probs(n))
    forms = [
        lambda: torch.bernoulli(probs),
        lambda: (torch.rand_like(probs) < probs).float(),
    ]
    _, result = _bernoulli(forms[0])
    return peers.torch_fastest("bernoulli", *forms), result


def jax_bernoulli(n=IMAGES):
    """jax.random, with the fastest of its generators."""
    import jax
    import jax.numpy as jnp

    probs = jnp.asarray(_probs(n))
    draw = lambda key: jax.random.bernoulli(key, probs).astype(jnp.float32)
    return _jax("bernoulli", draw, _bernoulli)


def minigrad_gumbel_max(n=ROWS):
    """The kernel."""
    from minigrad.kernels.sampling import categorical

    logits, rng = _logits(n), np.random.default_rng(1)
    return _categorical(lambda: categorical(rng, logits))


def numpy_gumbel_max(n=ROWS):
    """Gumbels are minus the logarithms of exponentials, for which NumPy has a fast sampler."""
    logits, rng = _logits(n), np.random.default_rng(1)
    noise = np.empty_like(logits)

    def draw():
        rng.standard_exponential(dtype=np.float32, out=noise)
        with np.errstate(divide="ignore"):  # an exponential may round to 0
            np.log(noise, out=noise)
        np.subtract(logits, noise, out=noise)
        return np.argmax(noise, axis=1)

    return _categorical(draw)


def torch_gumbel_max(n=ROWS):
    """Exponentials as in NumPy, or torch.multinomial."""
    import torch

    torch.manual_seed(1)
    logits = torch.from_numpy(_logits(n))
    forms = [
        lambda: (logits - torch.empty_like(logits).exponential_().log_()).argmax(1),
        lambda: torch.multinomial(torch.softmax(logits, 1), 1)[:, 0],
    ]
    _, result = _categorical(forms[0])
    return peers.torch_fastest("gumbel_max", *forms), result


def jax_gumbel_max(n=ROWS):
    """jax.random.categorical, with the fastest of its generators."""
    import jax
    import jax.numpy as jnp

    logits = jnp.asarray(_logits(n))
    return _jax("gumbel_max", lambda key: jax.random.categorical(key, logits), _categorical)


def _jax(name, draw, case):
    """The case of JAX: a step splits the key and draws, compiled as one."""
    import jax

    def form(generator):
        key = jax.random.key(1, impl=generator)

        def split_and_draw(key):
            key, now = jax.random.split(key)
            return key, draw(now)

        compiled = jax.jit(split_and_draw).lower(key).compile()

        def step():
            nonlocal key
            key, drawn = compiled(key)
            return drawn.block_until_ready()

        return step

    forms = [form(generator) for generator in ("threefry2x32", "rbg")]
    _, result = case(forms[0])
    return peers.fastest(name, *((None, form) for form in forms)), result
