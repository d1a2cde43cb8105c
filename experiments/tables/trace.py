"""The first 8,336 steps of REBAR, against the trace that its authors print.

Two linear layers of 200 Bernoulli latents on MNIST in Larochelle's binarisation, batches of 24,
learning rate 3e-4, REBAR with a learned temperature: `discrete_vae` of the table `relax` with these
settings. Theirs differs in the initial weights (of He's kind, ours Glorot's), in a scale of the
control variate for each array of parameters (ours one for each layer), and in a baseline inside
REBAR. Shown: the mean one-sample ELBO of the training batches of the 2,084 steps before, an epoch.
"""

from experiments.tables import Cell, Table
from experiments.tables.plots import draw_table
from experiments.tables.relax import EPOCH

PUBLISHED = {1: "-231.03", 2: "-156.87", 3: "-143.46", 4: "-137.65"}  # by epoch


def after(epoch):
    """What is shown: the mean over an epoch."""
    return lambda record: (record["curves"]["elbo"]["values"][epoch - 1], None)


TABLE = Table(
    "The first epochs of REBAR on two layers of bits",
    "Published: README of the authors' code of REBAR (Tucker et al., 2017), read there.",
    [
        Cell(
            f"step {epoch * EPOCH}",
            "REBAR",
            "discrete_vae",
            "binarized_mnist",
            {"model": "linear_2", "learning_rate": 3e-4, "steps": 4 * EPOCH},
            {"training ELBO": after(epoch)},
            {"training ELBO": published},
        )
        for epoch, published in PUBLISHED.items()
    ],
    {},
)


def figure_table_trace():
    """REBAR's training ELBO after one to four epochs, ours and that printed by its authors."""
    return draw_table("trace")
