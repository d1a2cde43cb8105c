"""Kullback-Leibler divergences in closed form."""

import numpy as np

from minigrad.core import primitive
from minigrad.distributions.base import finite, floats
from minigrad.distributions.continuous import Beta, Gamma, Gumbel, LogitNormal, LogNormal, Normal
from minigrad.distributions.discrete import Bernoulli, Categorical
from minigrad.kernels import fused
from minigrad.special import betaln, digamma, expit, gammaln, log_sigmoid, log_softmax, softmax

_KL = {}


def kl(q, p):
    r"""Return $\mathrm{KL}(q \| p) = E_q[\log q(x) - \log p(x)]$ in nats, elementwise.

    For a pair of distributions with a closed form, shaped like their `log_prob`; for others it
    raises NotImplementedError, which names the Monte-Carlo estimate.
    """
    rule = _KL.get((type(q), type(p)))
    if rule is None:
        raise NotImplementedError(
            f"kl({type(q).__name__}, {type(p).__name__}) has no closed form here; estimate it: "
            "x = q.sample(rng, 1000); np.mean(q.log_prob(x) - p.log_prob(x), axis=0)"
        )
    values = floats(*q, *p)
    return rule(*values)


def _closed_form(*kinds):
    def decorator(rule):
        for kind in kinds:
            _KL[kind, kind] = rule
        return rule

    return decorator


_normal = primitive(
    fused.normal_kl,
    lambda ans, m, s, loc_p, scale_p: lambda g: g * ((m - loc_p) / (scale_p * scale_p)),
    lambda ans, m, s, loc_p, scale_p: lambda g: g * ((s / scale_p - scale_p / s) / scale_p),
    lambda ans, m, s, loc_p, scale_p: lambda g: g * ((loc_p - m) / (scale_p * scale_p)),
    lambda ans, m, s, loc_p, scale_p: (
        lambda g: g * ((1 - ((m - loc_p) ** 2 + s * s) / (scale_p * scale_p)) / scale_p)
    ),
)
# A bijection changes no divergence: that of two log-normals is that of the two normals.
_closed_form(Normal, LogNormal, LogitNormal)(_normal)


@_closed_form(Gumbel)
def _kl_gumbel(loc_q, scale_q, loc_p, scale_p):
    ratio = scale_q / scale_p
    shift = (loc_q - loc_p) / scale_p
    linear = np.euler_gamma * (ratio - 1) - 1 - np.log(ratio) + shift
    return linear + np.exp(gammaln(1 + ratio) - shift)


@_closed_form(Gamma)
def _kl_gamma(a_q, b_q, a_p, b_p):
    shapes = (a_q - a_p) * digamma(a_q) - gammaln(a_q) + gammaln(a_p)
    return shapes + a_p * np.log(b_q / b_p) + a_q * (b_p / b_q - 1)


@_closed_form(Beta)
def _kl_beta(a_q, b_q, a_p, b_p):
    da, db = a_q - a_p, b_q - b_p
    shapes = da * digamma(a_q) + db * digamma(b_q) - (da + db) * digamma(a_q + b_q)
    return betaln(a_p, b_p) - betaln(a_q, b_q) + shapes


@_closed_form(Bernoulli)
def _kl_bernoulli(a, b):
    # Each log-ratio by itself: the shorter form in softplus loses all digits of a small divergence.
    ones = expit(a) * (log_sigmoid(a) - log_sigmoid(b))
    return ones + expit(-a) * (log_sigmoid(-a) - log_sigmoid(-b))


@_closed_form(Categorical)
def _kl_categorical(a, b):
    q, log_q, log_p = softmax(a), log_softmax(a), log_softmax(b)
    return np.sum(q * finite(log_q - np.where(log_q == -np.inf, 0, log_p)), axis=-1)
