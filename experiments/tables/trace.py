"""The first 8,336 steps of REBAR, against the trace that its authors print.

Two linear layers of 200 Bernoulli latents on MNIST in Larochelle's binarisation, batches of 24,
learning rate 3e-4, REBAR with a learned temperature. Shown: the mean one-sample ELBO of the
training batches of the 2,084 steps before, an epoch. In the first two columns the initial weights
are of He's kind, as in the authors' code (normal, variance 2.6 over the number of inputs, cut off
at two deviations); in the third they are the book's, Glorot's. In the first the control variate
relaxes bits towards their means, as that code does; in the others towards 1/2, as the book does.

With He's weights and bits relaxed towards means no epoch differs from the published one by more
than 1.1 nats. Four seeds of the second column lie within 0.6, 0.7, 0.3 and 0.4 nats of each other
in the four epochs: what is left in the second and third is more than chance would make. What still
differs from the authors: a temperature and a scale of the control variate for each layer (theirs:
one temperature, a scale for each array of parameters), moved to lower the squares of the estimates
in the logits (theirs: of the batch's gradient in the parameters); batches drawn with replacement
(theirs: shuffled epochs); and no baseline inside REBAR.
"""

import numpy as np

from experiments.runner import Run
from experiments.tables import Cell, Table
from experiments.tables.plots import draw_table
from experiments.tables.relax import EPOCH, SETTINGS, discrete_vae
from minigrad import tree

PUBLISHED = {1: "-231.03", 2: "-156.87", 3: "-143.46", 4: "-137.65"}  # by epoch


def rebar_trace(config, data, rng):
    """REBAR's first epochs, from the initial weights of its authors' code."""

    def he(p):
        if p.ndim < 2:
            return p
        w = rng.standard_normal(p.shape)
        while np.any(far := np.abs(w) > 2):
            w[far] = rng.standard_normal(np.sum(far))
        return (w * np.sqrt(2.6 / len(p))).astype(p.dtype)

    parts = discrete_vae(config, data, rng)
    return parts._replace(state=parts.state | {"params": tree.map(he, parts.state["params"])})


TRACE = {"model": "linear_2", "learning_rate": 3e-4, "steps": 4 * EPOCH}
RUNS = {"rebar_trace": Run(rebar_trace, SETTINGS | TRACE, {"binarized_mnist": {}})}


def after(epoch):
    """What is shown: the mean over an epoch, None as long as it has not been reached."""

    def value(record):
        means = record["curves"].get("elbo", {"values": []})["values"]
        return (means[epoch - 1] if len(means) >= epoch else None), None

    return value


def cell(epoch, column, run, settings, published=None):
    """One epoch of a training."""
    value = {"training ELBO": after(epoch)}
    known = {"training ELBO": published} if published else {}
    return Cell(f"step {epoch * EPOCH}", column, run, "binarized_mnist", settings, value, known)


TABLE = Table(
    "The first epochs of REBAR on two layers of bits",
    "Published: README of the authors' code of REBAR (Tucker et al., 2017), read there.",
    [
        cell(epoch, *place)
        for epoch, text in PUBLISHED.items()
        for place in (
            ("nearest to theirs", "rebar_trace", {"method": "rebar_towards_mean"}, text),
            ("He's weights", "rebar_trace", {}),
            ("Glorot's weights", "discrete_vae", TRACE),
        )
    ],
    {},
)


def figure_table_trace():
    """REBAR's training ELBO after one to four epochs, ours and that printed by its authors."""
    return draw_table("trace")
