"""Discrete distributions: Bernoulli, categorical and negative binomial."""

from typing import NamedTuple

import numpy as np

from minigrad import random
from minigrad.distributions.base import finite, floats, no_closed_form
from minigrad.special import (
    bernoulli_log_prob,
    betaln,
    expit,
    log_sigmoid,
    log_softmax,
    softmax,
    xlogy,
)


class Bernoulli(NamedTuple):
    r"""$P(X = 1) = \sigma(a)$; `logits` $a$."""

    logits: np.ndarray

    def sample(self, rng, shape=()):
        """Draws of 0 and 1 in the dtype of the logits: a plain array."""
        return random.bernoulli(rng, *floats(*self), shape)

    def log_prob(self, x):
        r"""$x a - \log(1 + e^a)$, for x 0 or 1; see `special.bernoulli_log_prob` for others."""
        x, logits = floats(x, *self)
        return np.where((x == 0) | (x == 1), bernoulli_log_prob(logits, x), -np.inf)

    def entropy(self):
        r"""$-p \log p - (1 - p) \log(1 - p)$, $p = \sigma(a)$."""
        (a,) = floats(*self)
        return -expit(a) * log_sigmoid(a) - expit(-a) * log_sigmoid(-a)

    def mean(self):
        r"""$\sigma(a)$."""
        return expit(*floats(*self))

    def variance(self):
        r"""$\sigma(a) \sigma(-a)$."""
        (a,) = floats(*self)
        return expit(a) * expit(-a)


class Categorical(NamedTuple):
    r"""$P(X = k) \propto e^{a_k}$ over the last axis of `logits` $a$; a logit may be -inf."""

    logits: np.ndarray

    def sample(self, rng, shape=()):
        """Draws of indices: a plain integer array."""
        return random.categorical(rng, *floats(*self), shape)

    def log_prob(self, x):
        r"""$a_x - \log \sum_k e^{a_k}$, for an array of indices x (TypeError for floats)."""
        (logits,) = floats(*self)
        if not hasattr(x, "dtype"):
            x = np.asarray(x)
        if x.dtype.kind not in "iu":
            raise TypeError(
                f"Categorical.log_prob takes indices (integers), not {x.dtype}; for one-hot or "
                "relaxed x write np.sum(x * log_softmax(logits), axis=-1)"
            )
        n = logits.shape[-1]
        batch = np.broadcast_shapes(x.shape, logits.shape[:-1])
        outside = (x < 0) | (x >= n)
        index = np.broadcast_to(np.where(outside, 0, x), batch)[..., None]
        log_p = np.broadcast_to(log_softmax(logits), (*batch, n))
        return np.where(outside, -np.inf, np.take_along_axis(log_p, index, axis=-1)[..., 0])

    def entropy(self):
        r"""$-\sum_k p_k \log p_k$."""
        (logits,) = floats(*self)
        return -np.sum(softmax(logits) * finite(log_softmax(logits)), axis=-1)

    def mean(self):
        """Raise NotImplementedError: categories have no mean."""
        raise NotImplementedError(
            "categories are names, not numbers, and have no mean or variance; their probabilities "
            "are minigrad.special.softmax(logits)"
        )

    variance = mean


class NegativeBinomial(NamedTuple):
    r"""$p(x) = \frac{\Gamma(r + x)}{x!\, \Gamma(r)} p^x (1 - p)^r$, $x = 0, 1, 2, \dots$

    `total` $r > 0$ (real), `probs` $p$ in (0, 1). The number of successes, each of probability p,
    before the r-th failure. SciPy and NumPy count the other way round: theirs takes $1 - p$.
    """

    total: np.ndarray
    probs: np.ndarray

    def sample(self, rng, shape=()):
        """Draws of counts: a plain integer array."""
        return random.negative_binomial(rng, *floats(*self), shape)

    def log_prob(self, x):
        r"""$-\log(r + x) - \log B(r, x + 1) + x \log p + r \log(1 - p)$, x = 0, 1, 2, ..."""
        x, r, p = floats(x, *self)
        outside = (x < 0) | (x == np.inf) | (x != np.floor(x))
        x = np.where(outside, 0, x)
        # The beta function: log-gammas of r + x and of r would cancel when r is large.
        log_p = xlogy(x, p) + r * np.log1p(-p) - np.log(r + x) - betaln(r, x + 1)
        return np.where(outside, -np.inf, log_p)

    entropy = no_closed_form("entropy")

    def mean(self):
        r"""$r p / (1 - p)$."""
        r, p = floats(*self)
        return r * p / (1 - p)

    def variance(self):
        r"""$r p / (1 - p)^2$."""
        r, p = floats(*self)
        return r * p / (1 - p) ** 2
