r"""Special functions, with SciPy's names; and the log-densities that training spends its time in.

Those that SciPy has as ufuncs (`scipy.special.expit`, ...) work on traced arrays under SciPy's
name too. `logsumexp`, `softmax` and `log_softmax` do not: SciPy's are plain Python functions.
"""

import math

import numpy as np
import scipy.special as sc

from minigrad.arrays import restore_axes
from minigrad.core import primitive, register
from minigrad.kernels import fused, transcendental

__all__ = [
    "bernoulli_log_prob",
    "betainc",
    "betaln",
    "digamma",
    "erf",
    "expit",
    "gammainc",
    "gammaln",
    "log_ndtr",
    "log_sigmoid",
    "log_softmax",
    "logit",
    "logsumexp",
    "ndtr",
    "ndtri",
    "normal_log_prob",
    "polygamma",
    "softmax",
    "softplus",
    "xlogy",
]

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)

# ----------------------------------------------------------------------------- sigmoid and logs

expit = primitive(transcendental.expit, lambda ans, x: lambda g: _expit_dx(x, g))
register(sc.expit)(expit)
# s (1 - s) has the derivative s (1 - s) (1 - 2 s), and 2 s - 1 = tanh(x / 2).
_expit_dx = primitive(
    fused.expit_dx,
    lambda ans, x, g: lambda h: -h * ans * np.tanh(0.5 * x),
    lambda ans, x, g: lambda h: _expit_dx(x, h),
)
logit = primitive(sc.logit, lambda ans, x: lambda g: g / (x * (1 - x)))


softplus = primitive(transcendental.softplus, lambda ans, x: lambda g: g * expit(x))
log_sigmoid = primitive(
    lambda x: -transcendental.softplus(-x),
    lambda ans, x: lambda g: g * expit(-x),
    name="log_sigmoid",
)


def _xlogy_rule(ans, x, y):
    return lambda g: g * np.log(np.where((x == 0) & (y == 0), 1, y))


# x log y with 0 log 0 = 0; both derivatives keep to that limit.
xlogy = primitive(
    sc.xlogy,
    _xlogy_rule,
    lambda ans, x, y: lambda g: g * x / np.where((x == 0) & (y == 0), 1, y),
)


def _logsumexp_rule(ans, x, axis=None, keepdims=False):
    # The softmax is exp(x - ans); where all x are -inf it is left at 0, not NaN.
    def pull(g):
        shift = restore_axes(np.where(ans == -np.inf, 0, ans), axis, keepdims)
        return restore_axes(g, axis, keepdims) * np.exp(x - shift)

    return pull


_lse = primitive(fused.logsumexp, _logsumexp_rule)


def logsumexp(x, axis=None, keepdims=False):
    r"""Return $\log \sum_i e^{x_i}$ over `axis` (an int, a tuple, None for all), stably."""
    return _lse(_array(x), axis=axis, keepdims=keepdims)


_softmax = primitive(
    fused.softmax,
    lambda ans, x, axis: lambda g: ans * (g - np.sum(g * ans, axis=axis, keepdims=True)),
)


def softmax(x, axis=-1):
    r"""Return $e^{x_i} / \sum_j e^{x_j}$ along `axis`."""
    return _softmax(_array(x), axis=axis)


def _log_softmax_rule(ans, x, axis):
    return lambda g: fused.log_softmax_dx(ans, g, axis)


_log_softmax = primitive(fused.log_softmax, _log_softmax_rule)


def log_softmax(x, axis=-1):
    r"""Return $x_i - \log \sum_j e^{x_j}$ along `axis`."""
    return _log_softmax(_array(x), axis=axis)


def _array(x):
    floating = getattr(getattr(x, "dtype", None), "kind", None) == "f"
    return x if floating else np.asarray(x, float)


# ------------------------------------------------------------------------------ gamma and beta

gammaln = primitive(sc.gammaln, lambda ans, x: lambda g: g * digamma(x))
digamma = primitive(sc.digamma, lambda ans, x: lambda g: g * polygamma(1, x))

_polygamma = primitive(
    lambda x, n: sc.polygamma(n, x).astype(x.dtype),
    lambda ans, x, n: lambda g: g * _polygamma(x, n=n + 1),
    name="polygamma",
)


def polygamma(n, x):
    """Return the n-th derivative of `digamma` at `x`; `n` is an int."""
    return _polygamma(_array(x), n=n)


betaln = primitive(
    sc.betaln,
    lambda ans, a, b: lambda g: -g * _digamma_rise(a, b),
    lambda ans, a, b: lambda g: -g * _digamma_rise(b, a),
)


def _gamma_pdf(a, x):
    return np.exp(xlogy(a - 1, x) - x - gammaln(a))


def _beta_pdf(a, b, x):
    return np.exp(xlogy(a - 1, x) + xlogy(b - 1, 1 - x) - betaln(a, b))


def _kernel(name):
    """Return the kernel of that name, imported when first called."""

    def call(*args):
        from minigrad.kernels import shape_derivatives

        return getattr(shape_derivatives, name)(*args)

    return call


# The derivatives in the shape parameters have no closed form. Each is a primitive of its own,
# with a rule in x (mixed derivatives commute) and none in the shapes: asking for one raises.
_gammainc_da = primitive(
    _kernel("gammainc_da"),
    None,
    lambda ans, a, x: lambda g: g * _gamma_pdf(a, x) * (np.log(x) - digamma(a)),
    name="gammainc_da",
)
gammainc = primitive(
    sc.gammainc,
    lambda ans, a, x: lambda g: g * _gammainc_da(a, x),
    lambda ans, a, x: lambda g: g * _gamma_pdf(a, x),
)
# digamma(a + b) - digamma(a) without cancellation for b much smaller than a.
_digamma_rise = primitive(
    _kernel("digamma_rise"),
    lambda ans, a, b: lambda g: g * (polygamma(1, a + b) - polygamma(1, a)),
    lambda ans, a, b: lambda g: g * polygamma(1, a + b),
    name="digamma_rise",
)
_betainc_da = primitive(
    _kernel("betainc_da"),
    None,
    None,
    lambda ans, a, b, x: lambda g: g * _beta_pdf(a, b, x) * (np.log(x) + _digamma_rise(a, b)),
    name="betainc_da",
)
_betainc_db = primitive(
    _kernel("betainc_db"),
    None,
    None,
    lambda ans, a, b, x: lambda g: g * _beta_pdf(a, b, x) * (np.log1p(-x) + _digamma_rise(b, a)),
    name="betainc_db",
)
betainc = primitive(
    sc.betainc,
    lambda ans, a, b, x: lambda g: g * _betainc_da(a, b, x),
    lambda ans, a, b, x: lambda g: g * _betainc_db(a, b, x),
    lambda ans, a, b, x: lambda g: g * _beta_pdf(a, b, x),
)

# ---------------------------------------------------------------------------------- the normal


def _normal_pdf(x):
    return np.exp(-0.5 * x * x - _LOG_SQRT_2PI)


erf = primitive(sc.erf, lambda ans, x: lambda g: g * (2 / math.sqrt(math.pi)) * np.exp(-x * x))
ndtr = primitive(sc.ndtr, lambda ans, x: lambda g: g * _normal_pdf(x))
ndtri = primitive(sc.ndtri, lambda ans, p: lambda g: g / _normal_pdf(ans))
_normal_ratio = primitive(
    lambda x: math.sqrt(2 / math.pi) / sc.erfcx(-math.sqrt(0.5) * x),
    lambda ans, x: lambda g: -g * ans * (x + ans),
    name="normal_ratio",
)
log_ndtr = primitive(sc.log_ndtr, lambda ans, x: lambda g: g * _normal_ratio(x))


# ------------------------------------------------------------------------- fused log-densities


def _normal_log_prob(x, loc, scale):
    z = (x - loc) / scale
    # np.log of a Python number is a float64, which would widen a float32 x.
    log_scale = math.log(scale) if type(scale) in (int, float) else np.log(scale)
    return -0.5 * (z * z) - log_scale - _LOG_SQRT_2PI


_normal_log_prob = primitive(
    _normal_log_prob,
    lambda ans, x, loc, scale: lambda g: g * (loc - x) / (scale * scale),
    lambda ans, x, loc, scale: lambda g: g * (x - loc) / (scale * scale),
    lambda ans, x, loc, scale: lambda g: g * (((x - loc) / scale) ** 2 - 1) / scale,
    name="normal_log_prob",
)


def normal_log_prob(x, loc, scale):
    r"""Return $\log N(x; \mu, \sigma^2)$ elementwise, constants included, in nats.

    $-\frac{1}{2}(x - \mu)^2/\sigma^2 - \log\sigma - \frac{1}{2}\log 2\pi$; the arguments broadcast.
    """
    return _normal_log_prob(x, loc, scale)


_bernoulli_log_prob = primitive(
    fused.bernoulli_log_prob,
    lambda ans, logits, x: lambda g: _bernoulli_dlogits(logits, x, g),
    lambda ans, logits, x: lambda g: g * logits,
)
_bernoulli_dlogits = primitive(
    fused.bernoulli_log_prob_dlogits,
    lambda ans, logits, x, g: lambda h: _expit_dx(logits, -h * g),
    lambda ans, logits, x, g: lambda h: h * g,
    lambda ans, logits, x, g: lambda h: _bernoulli_dlogits(logits, x, h),
)


def bernoulli_log_prob(logits, x):
    r"""Return $x a - \log(1 + e^a)$, the Bernoulli log-probability of `x` at the logits $a$.

    Elementwise, in nats, without overflow. For `x` strictly between 0 and 1 it is the
    cross-entropy, which is no log-density: it lacks a normaliser.
    """
    if getattr(x, "dtype", np.dtype(float)).kind in "biu" and hasattr(logits, "dtype"):
        x = x.astype(logits.dtype)  # an integer 0 or 1 must not widen float32
    return _bernoulli_log_prob(logits, x)


# SciPy's own docstrings speak of `out` and of complex numbers; these are elementwise and broadcast.
for _op, _doc in {
    expit: r"Return $\sigma(x) = 1 / (1 + e^{-x})$.",
    logit: r"Return $\log\frac{p}{1 - p}$, the inverse of `expit`.",
    softplus: r"Return $\log(1 + e^x)$, without overflow.",
    log_sigmoid: r"Return $\log \sigma(x) = -\log(1 + e^{-x})$, without overflow.",
    xlogy: r"Return $x \log y$, with $0 \log 0 = 0$.",
    gammaln: r"Return $\log |\Gamma(x)|$.",
    digamma: r"Return $\psi(x) = \frac{d}{dx} \log \Gamma(x)$.",
    betaln: r"Return $\log B(a, b) = \log \Gamma(a) + \log \Gamma(b) - \log \Gamma(a + b)$.",
    gammainc: r"""Return $P(a, x) = \int_0^x t^{a-1} e^{-t} dt / \Gamma(a)$, the Gamma(a, 1) CDF.

    Differentiable to any order in `x`, once in `a`; a second derivative there raises TypeError.
    """,
    betainc: r"""Return $I_x(a, b) = \int_0^x t^{a-1} (1-t)^{b-1} dt / B(a, b)$, the Beta(a, b) CDF.

    Differentiable to any order in `x`, once in `a` and `b`; more there raises TypeError.
    """,
    erf: r"Return $\frac{2}{\sqrt\pi} \int_0^x e^{-t^2} dt$.",
    ndtr: r"Return $\Phi(x)$, the CDF of the standard normal.",
    ndtri: r"Return $\Phi^{-1}(p)$, the quantile of the standard normal.",
    log_ndtr: r"Return $\log \Phi(x)$, accurate far into the lower tail.",
}.items():
    _op.__doc__ = _doc
