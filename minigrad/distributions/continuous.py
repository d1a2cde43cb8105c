"""Continuous distributions: on the real line, the positive axis and the unit interval."""

import math
from typing import NamedTuple

import numpy as np

from minigrad import random
from minigrad.distributions.base import floats, no_closed_form, noise, spread
from minigrad.special import (
    betaln,
    digamma,
    expit,
    gammaln,
    logit,
    normal_log_prob,
    softplus,
    xlogy,
)

_HALF_LOG_2PIE = 0.5 * math.log(2 * math.pi * math.e)

# --------------------------------------------------------------------------------- on the real line


class Normal(NamedTuple):
    r"""$N(x; \mu, \sigma^2)$; `loc` $\mu$, `scale` $\sigma > 0$, the standard deviation."""

    loc: np.ndarray
    scale: np.ndarray

    def sample(self, rng, shape=()):
        r"""$\mu + \sigma \varepsilon$, $\varepsilon \sim N(0, 1)$."""
        loc, scale = floats(*self)
        return loc + scale * noise(random.normal, rng, shape, loc, scale)

    def log_prob(self, x):
        r"""$-\frac{1}{2} (x - \mu)^2 / \sigma^2 - \log \sigma - \frac{1}{2} \log 2\pi$."""
        return normal_log_prob(*floats(x, *self))

    def entropy(self):
        r"""$\log \sigma + \frac{1}{2} \log 2\pi e$."""
        loc, scale = floats(*self)
        return spread(np.log(scale) + _HALF_LOG_2PIE, loc)

    def mean(self):
        r"""$\mu$."""
        return spread(*floats(*self))

    def variance(self):
        r"""$\sigma^2$."""
        loc, scale = floats(*self)
        return spread(scale * scale, loc)


class Gumbel(NamedTuple):
    r"""$P(X \le x) = \exp(-e^{-z})$, $z = (x - \mu) / \beta$; `loc` $\mu$, `scale` $\beta > 0$."""

    loc: np.ndarray
    scale: np.ndarray

    def sample(self, rng, shape=()):
        r"""$\mu - \beta \log E$, $E$ exponential."""
        loc, scale = floats(*self)
        return loc + scale * noise(random.gumbel, rng, shape, loc, scale)

    def log_prob(self, x):
        r"""$-z - e^{-z} - \log \beta$."""
        x, loc, scale = floats(x, *self)
        z = (x - loc) / scale
        with np.errstate(over="ignore"):  # far to the left the density is 0
            return -z - np.exp(-z) - np.log(scale)

    def entropy(self):
        r"""$\log \beta + \gamma + 1$."""
        loc, scale = floats(*self)
        return spread(np.log(scale) + (np.euler_gamma + 1), loc)

    def mean(self):
        r"""$\mu + \gamma \beta$."""
        loc, scale = floats(*self)
        return loc + np.euler_gamma * scale

    def variance(self):
        r"""$\pi^2 \beta^2 / 6$."""
        loc, scale = floats(*self)
        return spread(math.pi**2 / 6 * scale * scale, loc)


class Logistic(NamedTuple):
    r"""$P(X \le x) = \sigma(z)$, $z = (x - \mu) / s$; `loc` $\mu$, `scale` $s > 0$."""

    loc: np.ndarray
    scale: np.ndarray

    def sample(self, rng, shape=()):
        r"""$\mu + s L$, $L$ standard logistic."""
        loc, scale = floats(*self)
        return loc + scale * noise(random.logistic, rng, shape, loc, scale)

    def log_prob(self, x):
        r"""$\log \sigma(z) + \log \sigma(-z) - \log s$."""
        x, loc, scale = floats(x, *self)
        z = (x - loc) / scale
        return -softplus(z) - softplus(-z) - np.log(scale)

    def entropy(self):
        r"""$\log s + 2$."""
        loc, scale = floats(*self)
        return spread(np.log(scale) + 2, loc)

    def mean(self):
        r"""$\mu$."""
        return spread(*floats(*self))

    def variance(self):
        r"""$\pi^2 s^2 / 3$."""
        loc, scale = floats(*self)
        return spread(math.pi**2 / 3 * scale * scale, loc)


# ----------------------------------------------------------------------------- on the positive axis


class LogNormal(NamedTuple):
    r"""The law of $e^y$, $y \sim N(\mu, \sigma^2)$; `loc` $\mu$, `scale` $\sigma > 0$."""

    loc: np.ndarray
    scale: np.ndarray

    def sample(self, rng, shape=()):
        r"""$e^{\mu + \sigma \varepsilon}$, $\varepsilon \sim N(0, 1)$."""
        return np.exp(Normal(*self).sample(rng, shape))

    def log_prob(self, x):
        r"""$\log N(\log x; \mu, \sigma^2) - \log x$, for x > 0."""
        x, loc, scale = floats(x, *self)
        outside = (x <= 0) | (x == np.inf)
        log_x = np.log(np.where(outside, 1, x))
        return np.where(outside, -np.inf, normal_log_prob(log_x, loc, scale) - log_x)

    def entropy(self):
        r"""$\mu + \log \sigma + \frac{1}{2} \log 2\pi e$."""
        loc, scale = floats(*self)
        return loc + np.log(scale) + _HALF_LOG_2PIE

    def mean(self):
        r"""$e^{\mu + \sigma^2/2}$."""
        loc, scale = floats(*self)
        return np.exp(loc + 0.5 * scale * scale)

    def variance(self):
        r"""$(e^{\sigma^2} - 1) e^{2\mu + \sigma^2}$."""
        loc, scale = floats(*self)
        return np.expm1(scale * scale) * np.exp(2 * loc + scale * scale)


class Gamma(NamedTuple):
    r"""$p(x) = b^a x^{a-1} e^{-bx} / \Gamma(a)$; `concentration` $a > 0$, `rate` $b > 0$."""

    concentration: np.ndarray
    rate: np.ndarray

    def sample(self, rng, shape=()):
        """Draws by `random.gamma`: differentiable once, by implicit reparameterisation."""
        a, b = floats(*self)
        return random.gamma(rng, spread(a, b), shape) / b

    def log_prob(self, x):
        r"""$a \log b + (a - 1) \log x - bx - \log \Gamma(a)$, for x >= 0."""
        x, a, b = floats(x, *self)
        outside = (x < 0) | (x == np.inf)
        x = np.where(outside, 1, x)
        log_p = a * np.log(b) + xlogy(a - 1, x) - b * x - gammaln(a)
        return np.where(outside, -np.inf, log_p)

    def entropy(self):
        r"""$a - \log b + \log \Gamma(a) + (1 - a) \psi(a)$."""
        a, b = floats(*self)
        return a - np.log(b) + gammaln(a) + (1 - a) * digamma(a)

    def mean(self):
        r"""$a / b$."""
        a, b = floats(*self)
        return a / b

    def variance(self):
        r"""$a / b^2$."""
        a, b = floats(*self)
        return a / (b * b)


# ----------------------------------------------------------------------------- on the unit interval


class LogitNormal(NamedTuple):
    r"""The law of expit(y), $y \sim N(\mu, \sigma^2)$; `loc` $\mu$, `scale` $\sigma > 0$.

    In float32 expit(y) rounds to 1 for $y > 16.6$; work with $y$ itself, a `Normal`, then.
    """

    loc: np.ndarray
    scale: np.ndarray

    def sample(self, rng, shape=()):
        r"""expit of $\mu + \sigma \varepsilon$, $\varepsilon \sim N(0, 1)$."""
        return expit(Normal(*self).sample(rng, shape))

    def log_prob(self, x):
        r"""$\log N(\mathrm{logit}\, x; \mu, \sigma^2) - \log x - \log(1 - x)$, for 0 < x < 1."""
        x, loc, scale = floats(x, *self)
        return logit_log_prob(Normal(loc, scale), x)

    entropy = no_closed_form("entropy")
    mean = no_closed_form("mean")
    variance = no_closed_form("variance")


def logit_log_prob(base, x):
    """Return the log-density of x in (0, 1) whose logit has the distribution `base`."""
    outside = (x <= 0) | (x >= 1)
    x = np.where(outside, 0.5, x)
    log_p = base.log_prob(logit(x)) - np.log(x) - np.log1p(-x)
    return np.where(outside, -np.inf, log_p)


class Beta(NamedTuple):
    r"""$p(x) = x^{a-1} (1-x)^{b-1} / B(a, b)$; `a` > 0, `b` > 0, the two concentrations."""

    a: np.ndarray
    b: np.ndarray

    def sample(self, rng, shape=()):
        """Draws by `random.beta`: differentiable once, by implicit reparameterisation."""
        return random.beta(rng, *floats(*self), shape)

    def log_prob(self, x):
        r"""$(a - 1) \log x + (b - 1) \log(1 - x) - \log B(a, b)$, for 0 <= x <= 1."""
        x, a, b = floats(x, *self)
        outside = (x < 0) | (x > 1)
        x = np.where(outside, 0.5, x)
        log_p = xlogy(a - 1, x) + _xlog1m(b - 1, x) - betaln(a, b)
        return np.where(outside, -np.inf, log_p)

    def entropy(self):
        r"""$\log B(a, b) - (a-1) \psi(a) - (b-1) \psi(b) + (a+b-2) \psi(a+b)$."""
        a, b = floats(*self)
        total = (a + b - 2) * digamma(a + b)
        return betaln(a, b) - (a - 1) * digamma(a) - (b - 1) * digamma(b) + total

    def mean(self):
        r"""$a / (a + b)$."""
        a, b = floats(*self)
        return a / (a + b)

    def variance(self):
        r"""$ab / ((a + b)^2 (a + b + 1))$."""
        a, b = floats(*self)
        return a * b / ((a + b) ** 2 * (a + b + 1))


def _xlog1m(c, x):
    """Return c log(1 - x) with 0 log 0 = 0: 1 - x is exact above 1/2, and log1p is below."""
    upper = x > 0.5
    high = xlogy(c, np.where(upper, 1 - x, 1))
    return np.where(upper, high, c * np.log1p(-np.where(upper, 0, x)))
