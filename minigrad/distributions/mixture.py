"""Mixtures of the elementwise distributions."""

from typing import NamedTuple

import numpy as np

from minigrad import random
from minigrad.core import Tracer
from minigrad.distributions.base import floats, no_closed_form, spread
from minigrad.distributions.discrete import Categorical
from minigrad.distributions.relaxed import Concrete, ExpConcrete
from minigrad.special import log_softmax, logsumexp, softmax


class Mixture(NamedTuple):
    r"""$p(x) = \sum_k w_k p_k(x)$, $w = \mathrm{softmax}$(`logits`), each x with its own component.

    `components` is an elementwise distribution; the last axis of its parameters and of `logits`
    runs over the components, the axes before it broadcast with x. Where all coordinates of an
    event share their component, sum over the event first:
    `logsumexp(log_softmax(logits) + np.sum(log p_k(x), axis=-1), axis=-1)`.
    """

    logits: np.ndarray
    components: NamedTuple

    def sample(self, rng, shape=()):
        """Draws of the components, differentiable in their parameters if these are.

        Raises TypeError for traced `logits`: the choice of a component has no pathwise gradient.
        """
        logits, components = self._parts()
        if type(logits) is Tracer:
            raise TypeError(
                "a sample of Mixture is not differentiable in its logits, and treating them as "
                "constants would bias the gradient. Sum over the components instead, "
                "softmax(logits) * f(components.sample(rng)), or use the score function with "
                "samples of minigrad.stop_gradient(mixture)"
            )
        k = random.categorical(rng, spread(logits, *components), shape)[..., None]
        full = (*k.shape[:-1], logits.shape[-1])
        chosen = [np.take_along_axis(np.broadcast_to(p, full), k, -1)[..., 0] for p in components]
        return type(components)(*chosen).sample(rng)

    def log_prob(self, x):
        r"""$\log \sum_k w_k p_k(x)$."""
        logits, components = self._parts()
        x, *_ = floats(x, *components)
        log_p = components.log_prob(np.expand_dims(x, -1))
        return logsumexp(log_softmax(logits) + log_p, axis=-1)

    entropy = no_closed_form("entropy")

    def mean(self):
        r"""$\sum_k w_k m_k$, with $m_k$ the means of the components."""
        logits, components = self._parts()
        return np.sum(softmax(logits) * components.mean(), axis=-1)

    def variance(self):
        r"""$\sum_k w_k (v_k + (m_k - m)^2)$, with $v_k$ the variances of the components."""
        logits, components = self._parts()
        weights, means = softmax(logits), components.mean()
        deviations = means - np.sum(weights * means, axis=-1, keepdims=True)
        return np.sum(weights * (components.variance() + deviations**2), axis=-1)

    def _parts(self):
        kind = type(self.components)
        if kind in (Categorical, Concrete, ExpConcrete, Mixture):
            raise TypeError(
                f"the components of a Mixture must be elementwise, and {kind.__name__} uses up its "
                "last axis; write logsumexp(log_softmax(logits) + log_probs, axis=-1) yourself"
            )
        logits, *parameters = floats(self.logits, *self.components)
        return logits, kind(*parameters)
