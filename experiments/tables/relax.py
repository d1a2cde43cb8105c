"""Discrete autoencoders by five estimators: the table of RELAX (Grathwohl et al., 2018).

200 Bernoulli latents a layer; the encoder sees images minus their mean, layers of latents are read
as plus and minus one, and the logits of the mean image are added to the output. `linear 1` and
`linear 2` have one and two layers of latents and linear maps; in `nonlinear` each map has two
hidden layers of 200 tanh units, as the paper says, and in `nonlinear, wide` those of the decoder
have 784, as its code has. Batches of 24, Adam with beta_2 = 0.99999, and for the control variates
of MuProp, REBAR and RELAX ten times the learning rate. MNIST is Larochelle's fixed binarisation
(50,000 to train, 10,000 to validate). Omniglot's images of 105 x 105 pixels are averaged over areas
to 28 x 28 and binarised once, 23,000 to train and 1,345 to validate: it is not the file of the
publications.

Ours, where the papers do not say or vary: learning rate 1e-3 where the row names no other (REBAR's
and RELAX's were searched, and are not published); batches drawn with replacement; NVIL subtracts a
running mean beside its network, which Adam moves at 1e-3 with beta_2 = 0.999 (theirs: no such mean,
and ten times the rate); RELAX's network has two hidden layers of 200 units (theirs two or four,
with weight decay) and learns alone in the first 1,000 of the steps (theirs before them), so that
its curve begins low; REBAR's temperature is learned from 0.5, that of Concrete is 0.5.

50,016 steps are a fortieth of the papers': compare the columns of ours with each other, and see the
table of REBAR's first epochs for ours beside theirs after as many steps.

Training ELBO: the mean over the last 2,084 steps, an epoch of MNIST, of the one-sample ELBO of the
batch, with the parameters as they change, and hard bits for all; the papers print the highest of
such means. Validation: the bound by 100 samples, higher than an ELBO by that alone, of 2,000 random
images (MNIST) or all 1,345 (Omniglot). One seed: differences below a nat say nothing.
"""

import numpy as np

from chapters.ch03_score_function import (
    MODELS,
    bernoulli_draws,
    encode,
    log_joint,
    log_posterior,
)
from chapters.ch06_importance import iwae_bound
from chapters.ch08_control_variates import METHODS, training_step
from chapters.ch09_atlas import METHODS as ONE_LAYER_METHODS
from experiments import ch08
from experiments.runner import Parts, Run, chosen, one_of
from experiments.tables import Cell, Table
from experiments.tables.plots import draw_curves, draw_table
from minigrad.data import binarize
from minigrad.optim import adam

FIXED = 20171031  # seed of what is drawn once: binarised images, and the split of Omniglot
EPOCH = 2084


def images_of(data, fresh):
    """Training and validation images as rows; bits drawn once, unless they are to be `fresh`."""
    fixed = np.random.default_rng(FIXED)
    images = ch08.flat(data.x_train)
    if hasattr(data, "x_valid"):
        train, valid = images, ch08.flat(data.x_valid)
    else:
        images = images[fixed.permutation(len(images))]
        n_valid = 1345 if len(images) < 30_000 else 10_000
        train, valid = images[:-n_valid], images[-n_valid:]
    return train if fresh else binarize(train, fixed), binarize(valid, fixed)


def many_sample_bound(params, x, mean, rng, k):
    """The bound by k samples of each image of x (B, D), averaged, in nats."""
    total = 0.0
    for piece in np.array_split(x, max(1, len(x) // 50)):
        logits, bits = encode(params["encoder"], piece - mean, bernoulli_draws(rng), k)
        log_w = log_joint(params["decoder"], piece, bits, mean) - log_posterior(logits, bits)
        total += np.sum(iwae_bound(log_w.astype(np.float64)))
    return total / len(x)


def discrete_vae(config, data, rng):
    """A VAE with Bernoulli latents, trained by one estimator; 100-sample bound on validation."""
    one_of(config, "model", MODELS)
    one_of(config, "method", [*METHODS, "rebar_towards_mean", *ONE_LAYER_METHODS])
    train, valid = images_of(data, config["fresh_bits"])
    mean = train.mean(0)
    if config["method"] in ONE_LAYER_METHODS:
        state, _ = ch08.start(config, "nvil", train.shape[1], rng)
        state["control"], method = {}, ONE_LAYER_METHODS[config["method"]]
        optimizer = adam(config["learning_rate"], b2=0.99999)
    else:
        state, (method, optimizer) = ch08.start(config, config["method"], train.shape[1], rng)

    def bound(state, rng, n):
        x = valid[chosen(len(valid), n)]
        return {"valid_bound": many_sample_bound(state["params"], x, mean, rng, 100)}

    return Parts(
        state,
        training_step(train, mean, optimizer, config["batch"], method),
        lambda state, rng: bound(state, rng, config["watched"]),
        lambda state, rng: (bound(state, rng, config["validated"]), {}),
    )


SETTINGS = {"steps": 24 * EPOCH, "log_every": EPOCH, "eval_every": 4 * EPOCH, "batch": 24}
SETTINGS |= {"model": "linear_1", "method": "rebar", "latents": 200, "learning_rate": 1e-3}
SETTINGS |= {"control_rate": 10.0, "control_width": 200, "control_depth": 2, "temperature": 0.5}
SETTINGS |= {"pretraining": 1000, "fresh_bits": False, "watched": 200, "validated": 2000}
RUNS = {
    "discrete_vae": Run(
        discrete_vae,
        SETTINGS,
        {"binarized_mnist": {}, "omniglot": {}},
    )
}

PUBLISHED = {  # as printed, but for the three cells of each nonlinear row that note a moves
    ("binarized_mnist", "linear_1"): ["-111.3", "-112.5", "-111.7", "-111.6", "-111.20"],
    ("binarized_mnist", "linear_2"): ["-99.62", "-99.6", "-99.07", "-98.22", "-98.00"],
    ("binarized_mnist", "nonlinear"): [None, "-102.2", "-101.5", "-101.1", None],
    ("binarized_mnist", "nonlinear_wide"): [None, None, None, "-81.01", "-78.13"],
    ("omniglot", "linear_1"): ["-117.23", "-117.44", "-117.09", "-116.63", "-116.57"],
    ("omniglot", "linear_2"): ["-109.95", "-109.98", "-109.55", "-108.71", "-108.54"],
    ("omniglot", "nonlinear"): [None, "-110.4", "-109.58", "-108.72", None],
    ("omniglot", "nonlinear_wide"): [None, None, None, "-56.76", "-56.12"],
}
ROW = {"linear_1": "linear 1", "linear_2": "linear 2", "nonlinear": "nonlinear"}
ROW |= {"nonlinear_wide": "nonlinear, wide"}
DATA = {"binarized_mnist": "MNIST", "omniglot": "Omniglot"}
COLUMN = {"concrete": "Concrete", "nvil": "NVIL", "muprop": "MuProp", "rebar": "REBAR"}
COLUMN |= {"relax": "RELAX"}
NOTES = {"nonlinear": "a", "nonlinear_wide": "b"}


def cell(data, model, method, published=None, rate=None):
    """One training of the table, with another learning rate than 1e-3 perhaps."""
    known = {} if published is None else {"training ELBO": published}
    return Cell(
        f"{DATA[data]}, {ROW[model]}" + (f", rate {rate:.0e}" if rate else ""),
        COLUMN[method],
        "discrete_vae",
        data,
        {"model": model, "method": method} | ({"learning_rate": rate} if rate else {}),
        {"training ELBO": "elbo", "validation bound": "valid_bound"},
        known,
        "d" if rate else NOTES.get(model, "") + ("c" if data == "omniglot" else ""),
    )


TABLE = Table(
    "Discrete autoencoders by five estimators",
    "Published: Grathwohl et al. (2018), table 1, highest training ELBO in 2,000,000 steps, of the "
    "models with the highest ELBO on the validation data, read in the paper's source; its "
    "Concrete, NVIL and MuProp columns are those of Tucker et al. (2017).",
    [
        cell(data, model, method, value)
        for (data, model), values in PUBLISHED.items()
        for method, value in zip(METHODS, values, strict=True)
    ]
    + [cell("binarized_mnist", "nonlinear", m, rate=3e-4) for m in ("concrete", "rebar", "relax")],
    {
        "a": "The paper prints -102.2, -101.5 and -101.1 (Omniglot: -110.4, -109.58, -108.72) "
        "under Concrete, NVIL and MuProp. Its history shows that a column was put in front of "
        "these without moving them: they belong to NVIL, MuProp and the REBAR of Tucker et al., "
        "and stand there here. The true Concrete cells are not verified, so not printed.",
        "b": "The paper prints these beside note a's, as REBAR and RELAX of the same model. The "
        "code gave the decoder hidden layers of 784 units, a decoder of six times the size that "
        "the text says, so that they are another model's. After 50,016 steps the larger decoder "
        "is the worse one for every estimator on both data sets; what 2,000,000 would bring is "
        "open.",
        "c": "Omniglot averaged down from its images of 105 x 105 pixels: not the file of the "
        "publications, so that only the differences between columns can be compared.",
        "d": "RELAX's authors searched the rates of REBAR and RELAX, ours has one for all. On the "
        "nonlinear model a smaller one is better for each of these columns, and by more for REBAR "
        "than for Concrete: differences between columns of this table include the choice of the "
        "rate.",
    },
    {"training ELBO": "elbo"},
)


def figure_table_relax():
    """Discrete VAEs by five estimators: training ELBO, ours and published, and validation."""
    return draw_table("relax")


def figure_curves_relax():
    """Training ELBO of the discrete autoencoders, by model and estimator."""
    return draw_curves("relax")
