r"""Probability distributions: named tuples of parameters, hence trees that `grad` understands.

    sample(rng, shape=())   draws of shape `shape` + that of the parameters, in their dtype
    log_prob(x)             log-density, or log-probability, in nats, all constants included
    entropy() mean() variance()

Parameters and values broadcast, and everything is elementwise: sum `log_prob` over the axes of
an event yourself. Only `Categorical`, `Concrete` and `ExpConcrete` use up the last axis. Outside
the support `log_prob` is -inf with derivative 0. Samples of continuous distributions are
differentiable in the parameters (pathwise); those of discrete ones are plain arrays.

Where a quantity has no closed form the method raises NotImplementedError and names the estimate.

    >>> q, p = Normal(1.0, 2.0), Normal(0.0, 2.0)
    >>> float(kl(q, p))
    0.125
    >>> from minigrad import grad
    >>> float(grad(lambda q: kl(q, p))(q).loc)
    0.25
"""

from minigrad.distributions.continuous import (
    Beta,
    Gamma,
    Gumbel,
    Logistic,
    LogitNormal,
    LogNormal,
    Normal,
)
from minigrad.distributions.discrete import Bernoulli, Categorical, NegativeBinomial
from minigrad.distributions.divergence import kl
from minigrad.distributions.mixture import Mixture
from minigrad.distributions.relaxed import BinaryConcrete, Concrete, ExpConcrete

__all__ = [
    "Bernoulli",
    "Beta",
    "BinaryConcrete",
    "Categorical",
    "Concrete",
    "ExpConcrete",
    "Gamma",
    "Gumbel",
    "LogNormal",
    "Logistic",
    "LogitNormal",
    "Mixture",
    "NegativeBinomial",
    "Normal",
    "kl",
]
