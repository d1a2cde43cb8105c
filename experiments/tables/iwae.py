"""VAE against IWAE, one stochastic layer: table 1 of Burda et al. (2016), a part of its schedule.

784-200-200-50-200-200-784 units, tanh, 50 normal latents, Bernoulli pixels; the output bias starts
at the logits of the mean image. MNIST's grey values are probabilities, drawn anew for every batch
of 20, of 59,600 of the 60,000 training images: an epoch is 2,980 steps. Stage i = 0, 1, ... of the
schedule takes 3^i epochs at the learning rate 1e-3 * 10^(-i/7); the paper has eight stages, 9.8
million steps. Adam with epsilon = 1e-4. `VAE` averages the k bounds of one sample, without the
closed form of the KL term; `IWAE` takes the bound of k samples.

Ours: four stages for k = 1 and 5, one for k = 50; VAE and IWAE are the same run for k = 1.

Test: minus the bound by 5,000 samples of each of 1,000 random test images, binarised once, with the
standard error over images. All see the same images, so that differences within the table have less
error than that. Active units: latents whose location has a variance above 0.01 over 1,000 training
images.

Ours: beta_1 = 0.9 and moments that start at zero (as in the paper's text; its code has 0.99 and
ones, and sums over the batch instead of averaging), batches drawn with replacement.
"""

import numpy as np

from chapters.ch03_score_function import output_bias
from chapters.ch05_vae import vae_init
from chapters.ch06_importance import bound_step, iwae_bound
from experiments.ch06 import active_units, estimate, flat, mean_bound
from experiments.runner import Parts, Run, chosen, one_of, with_error
from experiments.tables import Cell, Table
from experiments.tables.plots import draw_curves, draw_table
from minigrad.data import binarize
from minigrad.optim import adam, piecewise_constant

FIXED = 20151105
EPOCH = 2980
ENDS = [EPOCH * (3**i - 1) // 2 for i in range(1, 8)]  # of the stages: 1 epoch, 4, 13, 40, ...


def schedule():
    """The learning rate at a step."""
    return piecewise_constant(ENDS, [1e-3 * 10 ** (-i / 7) for i in range(8)])


def iwae_schedule(config, data, rng):
    """A VAE trained on the mean of k bounds, or on the bound of k samples, by stages."""
    fixed = np.random.default_rng(FIXED)
    images = flat(data.x_train)[:59_600]
    test = flat(data.x_test)
    test = binarize(test[chosen(len(test), config["tested"])], fixed)
    train = binarize(images[fixed.permutation(len(images))[:1000]], fixed)
    bounds = {"vae": mean_bound, "iwae": iwae_bound}
    bound = bounds[one_of(config, "method", bounds)]
    optimizer = adam(schedule(), eps=1e-4)
    params = vae_init(rng, images.shape[1], [200, 200], 50)
    params["decoder"]["logits"]["b"] = output_bias(images.mean(0)).astype(images.dtype)
    state = {"params": params, "optimizer": optimizer.init(params)}
    step = bound_step(bound, optimizer, images, config["batch"], config["k"], 50)

    def evaluate(state, rng):
        return {"test_nll_50": -np.mean(estimate(state["params"], test, rng, 50))}

    def finish(state, rng):
        values = -estimate(state["params"], test, rng, config["test_samples"])
        active = active_units(state["params"], train)
        return with_error("test_nll", values) | {"active_units": active}, {}

    return Parts(state, step, evaluate, finish)


RUNS = {
    "iwae_schedule": Run(
        iwae_schedule,
        {"steps": ENDS[3], "log_every": EPOCH // 10, "eval_every": EPOCH, "batch": 20}
        | {"method": "iwae", "k": 1, "tested": 1000, "test_samples": 5000},
        {"mnist": {}},
    )
}


def cell(method, k, stages, nll, active):
    """One training of the table; VAE and IWAE are the same for one sample."""
    return Cell(
        f"k = {k}",
        method.upper(),
        "iwae_schedule",
        "mnist",
        {"method": "iwae" if k == 1 else method, "k": k, "steps": ENDS[stages - 1]},
        {"test NLL": "test_nll", "active units": "active_units"},
        {"test NLL": nll, "active units": active},
        "a" if stages == 1 else "",
    )


TABLE = Table(
    "VAE against IWAE, one stochastic layer, MNIST",
    "Published: Burda et al. (2016), table 1, minus the bound by 5,000 samples of all 10,000 test "
    "images after eight stages (9.8 million steps), read in the paper.",
    [
        cell("vae", 1, 4, "86.76", "19"),
        cell("iwae", 1, 4, "86.76", "19"),
        cell("vae", 5, 4, "86.47", "20"),
        cell("iwae", 5, 4, "85.54", "22"),
        cell("vae", 50, 1, "86.35", "20"),
        cell("iwae", 50, 1, "84.78", "25"),
    ],
    {"a": "After one stage, a single epoch: compare within the row only."},
    {"test NLL, 50 samples": "test_nll_50"},
)


def figure_table_iwae():
    """VAE against IWAE: test likelihood and active units, ours and published."""
    return draw_table("iwae")


def figure_curves_iwae():
    """Test likelihood of VAE and IWAE, estimated by 50 samples, along the schedule."""
    return draw_curves("iwae")
