"""Relaxations of discrete distributions: binary Concrete, and Concrete on the simplex."""

import math
from typing import NamedTuple

import numpy as np

from minigrad import random
from minigrad.core import plain
from minigrad.distributions.base import floats, no_closed_form, noise
from minigrad.distributions.continuous import Logistic, logit_log_prob
from minigrad.special import expit, log_softmax, logsumexp


class BinaryConcrete(NamedTuple):
    r"""The relaxed Bernoulli $\sigma((a + L) / \lambda)$, $L$ logistic (Maddison et al., 2017).

    `temperature` $\lambda > 0$, `logits` $a$. Rounding it gives 1 with probability $\sigma(a)$ at
    every temperature. Low temperatures saturate it: 0 or 1 in floating point, with density -inf
    here. Its logit (`logit_space`) does not saturate; take densities and ratios of them there.
    """

    temperature: np.ndarray
    logits: np.ndarray

    def logit_space(self):
        r"""Return the law of the logit: `Logistic`, location $a/\lambda$, scale $1/\lambda$."""
        temperature, logits = floats(*self)
        return Logistic(logits / temperature, 1 / temperature)

    def sample(self, rng, shape=()):
        r"""$\sigma((a + L) / \lambda)$, $L$ logistic."""
        return expit(self.logit_space().sample(rng, shape))

    def log_prob(self, x):
        r"""$\log p_L(\mathrm{logit}\, x) - \log x - \log(1 - x)$, for 0 < x < 1."""
        x, temperature, logits = floats(x, *self)
        return logit_log_prob(BinaryConcrete(temperature, logits).logit_space(), x)

    entropy = no_closed_form("entropy")
    mean = no_closed_form("mean")
    variance = no_closed_form("variance")


class ExpConcrete(NamedTuple):
    r"""The law of $\log x$ for x with a `Concrete` law; the last axis is the event.

    `temperature` $\lambda > 0$ (of the shape of `logits` without its last axis, or a scalar),
    `logits` $a$. Values y satisfy $\sum_k e^{y_k} = 1$, and none underflows. The log-density is
    that of the log-ratios $y_k - y_n$, $k < n$; it exceeds the one on the simplex by
    $\sum_k y_k$, which cancels from every difference of two (Maddison et al., 2017, appendix C).
    """

    temperature: np.ndarray
    logits: np.ndarray

    def sample(self, rng, shape=()):
        r"""$\log \mathrm{softmax}((a + G) / \lambda)$, $G$ Gumbel."""
        temperature, logits = floats(*self)
        temperature = np.expand_dims(temperature, -1)
        g = noise(random.gumbel, rng, shape, temperature, logits)
        return log_softmax((logits + g) / temperature)

    def log_prob(self, y):
        r"""$\log (n-1)! + (n-1) \log\lambda + \sum_k s_k - n \log \sum_k e^{s_k}$.

        Here $s = a - \lambda y$. Shifting all of y, which keeps the log-ratios, keeps the value.
        """
        y, temperature, logits = floats(y, *self)
        outside = np.any(y == -np.inf, axis=-1)
        s = logits - np.expand_dims(temperature, -1) * np.where(outside[..., None], 0, y)
        n = logits.shape[-1]
        constant = math.lgamma(n) + (n - 1) * np.log(temperature)
        log_p = constant + np.sum(s, axis=-1) - n * logsumexp(s, axis=-1)
        return np.where(outside, -np.inf, log_p)

    entropy = no_closed_form("entropy")
    mean = no_closed_form("mean")
    variance = no_closed_form("variance")


class Concrete(NamedTuple):
    r"""The relaxed one-hot $\mathrm{softmax}((a + G) / \lambda)$; the last axis is the event.

    `temperature` $\lambda > 0$ (of the shape of `logits` without its last axis, or a scalar),
    `logits` $a$. The largest coordinate is k with probability $\mathrm{softmax}(a)_k$ at every
    temperature. At low temperatures coordinates underflow to 0, with density -inf here: take
    densities in `log_space` then. Maddison, Mnih and Teh (2017); Jang, Gu and Poole (2017).
    """

    temperature: np.ndarray
    logits: np.ndarray

    def log_space(self):
        r"""Return the law of $\log x$, `ExpConcrete`."""
        return ExpConcrete(*self)

    def sample(self, rng, shape=()):
        r"""$\mathrm{softmax}((a + G) / \lambda)$, $G$ Gumbel."""
        return np.exp(self.log_space().sample(rng, shape))

    def log_prob(self, x):
        r"""The log-density of $x_1, \dots, x_{n-1}$, for x inside the simplex.

        $\log\left[(n-1)!\, \lambda^{n-1} \prod_k e^{a_k} x_k^{-\lambda-1} \big/
        \left(\sum_k e^{a_k} x_k^{-\lambda}\right)^n\right]$. Values off the simplex by more than
        0.001 have density 0.
        """
        x, temperature, logits = floats(x, *self)
        off = np.abs(np.sum(plain(x), axis=-1) - 1) > 1e-3
        outside = off | np.any(x <= 0, axis=-1)
        y = np.log(np.where(outside[..., None], 1, x))
        log_p = ExpConcrete(temperature, logits).log_prob(y) - np.sum(y, axis=-1)
        return np.where(outside, -np.inf, log_p)

    entropy = no_closed_form("entropy")
    mean = no_closed_form("mean")
    variance = no_closed_form("variance")
