r"""Random draws, each from an explicit `numpy.random.Generator`.

Float32 noise is float64 noise to within 1e-6, but for the normal. A float32 uniform has $2^{24}$
values, so that $-\log(-\log u)$ never exceeds 16.6, and NumPy's float32 exponentials are exactly 0
once in $2^{23}$ draws. From float64 the tails are right down to probabilities of $10^{-16}$.
"""

import numpy as np

from minigrad.core import plain, primitive
from minigrad.kernels import sampling
from minigrad.kernels.shape_derivatives import beta_dz_da, beta_dz_db, gamma_dz_da

__all__ = [
    "bernoulli",
    "beta",
    "categorical",
    "exponential",
    "gamma",
    "gumbel",
    "logistic",
    "negative_binomial",
    "normal",
    "uniform",
]

# ------------------------------------------------------------------------------- standard noise


def normal(rng, shape=(), dtype=np.float64):
    """Return standard normal draws of `shape`."""
    # NumPy's float32 ziggurat has a tail of its own, which reaches beyond 8 standard deviations.
    return _generator(rng).standard_normal(shape, dtype)


def uniform(rng, shape=(), dtype=np.float64):
    """Return draws from the open interval (0, 1): neither 0 nor 1 in any dtype.

    Near 1 the numbers of a dtype are much sparser than near 0: noise with two tails is better
    drawn as such (`logistic`, `gumbel`) than made from these.
    """
    u = np.asarray(_generator(rng).random(shape), dtype)
    limits = np.finfo(dtype)
    return np.clip(u, max(2.0**-54, limits.smallest_subnormal), 1 - limits.epsneg)


def exponential(rng, shape=(), dtype=np.float64):
    """Return draws of density $e^{-x}$ on x > 0."""
    draws = np.asarray(_generator(rng).standard_exponential(shape), dtype)
    # An exact 0, once in 2^53 draws, would become an infinite Gumbel.
    return np.maximum(draws, np.finfo(dtype).tiny)


def gumbel(rng, shape=(), dtype=np.float64):
    r"""Return standard Gumbel draws, $-\log E$ with $E$ exponential."""
    return -np.log(exponential(rng, shape, dtype))


def logistic(rng, shape=(), dtype=np.float64):
    r"""Return standard logistic draws, $\log u - \log(1 - u)$, exact in both tails."""
    return sampling.logistic(_generator(rng), draw_shape(shape), dtype)


# --------------------------------------------------------------------------- with shape parameters


# Implicit reparameterisation (Figurnov, Mohamed and Mnih, 2018): the value is the sample z, drawn
# beforehand; the derivative is that of the quantile function at the level of z,
# dz/da = -(dF(z; a)/da) / p(z; a), so that z may come from any sampler.
gamma_sample = primitive(
    lambda a, z: z,
    lambda ans, a, z: lambda g: g * gamma_dz_da(a, z),
    name="gamma_sample",
    once=True,
)
beta_sample = primitive(
    lambda a, b, z: z,
    lambda ans, a, b, z: lambda g: g * beta_dz_da(a, b, z),
    lambda ans, a, b, z: lambda g: g * beta_dz_db(a, b, z),
    name="beta_sample",
    once=True,
)


def gamma(rng, concentration, shape=()):
    r"""Return draws of density $z^{a-1} e^{-z} / \Gamma(a)$, differentiable once in $a$.

    The result has shape `shape` + that of `concentration` and its dtype. Draws below the smallest
    normal number of the dtype are set to it, so that their logarithm is finite. That happens with
    probability $e^{-708 a}$ in float64 and $e^{-87 a}$ in float32 (42 % at $a = 0.01$): below
    $a = 0.1$ use float64.
    """
    a, dtype = _parameter(concentration)
    z = _generator(rng).standard_gamma(plain(a), draw_shape(shape, a))
    return gamma_sample(a, np.maximum(np.asarray(z, dtype), np.finfo(dtype).tiny))


def beta(rng, a, b, shape=()):
    r"""Return draws of density $z^{a-1} (1-z)^{b-1} / B(a, b)$, differentiable once in a and b.

    The result has shape `shape` + that of `a` and `b`, and their dtype. It lies strictly between
    0 and 1; draws that would round to 1, frequent in float32 when b < 0.5, are set to the largest
    number below it, and those that would round to 0 to the smallest normal number.
    """
    (a, dtype_a), (b, dtype_b) = _parameter(a), _parameter(b)
    limits = np.finfo(np.result_type(dtype_a, dtype_b))
    z = _generator(rng).beta(plain(a), plain(b), draw_shape(shape, a, b))
    return beta_sample(a, b, np.clip(np.asarray(z, limits.dtype), limits.tiny, 1 - limits.epsneg))


# ------------------------------------------------------------------------------------- discrete


def bernoulli(rng, logits=None, shape=(), *, probs=None):
    """Return draws of 0 and 1, a plain array: discrete draws carry no gradient.

    Give either `logits` or `probs`; the result has shape `shape` + theirs and their dtype.
    """
    if (logits is None) == (probs is None):
        raise TypeError("bernoulli takes either logits or probs: bernoulli(rng, logits)")
    parameter, _ = _parameter(probs if logits is None else logits)
    kind = "probs" if logits is None else "logits"
    # Decided in float64, or a probability within 2^-25 of 1 would round to 1.
    full = draw_shape(shape, parameter)
    return sampling.bernoulli(_generator(rng), shape=full, **{kind: plain(parameter)})


def categorical(rng, logits, shape=()):
    r"""Return draws of $k$ with probability $\propto e^{a_k}$ over the last axis of `logits`.

    A plain integer array of shape `shape` + that of `logits` without its last axis. By the Gumbel
    trick, the index of the largest $a_k + G_k$ has this law; a logit of -inf is never drawn.
    """
    logits, _ = _parameter(logits)
    return sampling.categorical(_generator(rng), plain(logits), draw_shape(shape, logits)[:-1])


def negative_binomial(rng, total, probs, shape=()):
    r"""Return draws of probability $\Gamma(r + x) / (x!\, \Gamma(r))\, p^x (1 - p)^r$.

    A plain integer array of shape `shape` + that of `total` $r$ and `probs` $p$. NumPy's own
    sampler counts the other way round: it takes $1 - p$.
    """
    r, p = (np.asarray(plain(v), np.float64) for v in (total, probs))
    return np.asarray(_generator(rng).negative_binomial(r, 1 - p, draw_shape(shape, r, p)))


def draw_shape(shape, *parameters):
    """Return `shape`, an int or a tuple, followed by the joint shape of the parameters."""
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    return shape + np.broadcast_shapes(*map(np.shape, parameters))


def _parameter(x):
    """Return a parameter as an array, or traced, and the dtype of draws with it."""
    if getattr(getattr(x, "dtype", None), "kind", None) != "f":
        x = np.asarray(x, np.float64)
    return x, x.dtype


def _generator(rng):
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"rng must be a numpy.random.Generator, not {type(rng).__name__}; make one once with "
            "np.random.default_rng(seed) and pass it on"
        )
    return rng
