"""The runs of chapter 11: the PixelCNN, and autoencoders whose decoder sees pixels, with cures.

Images are binary; likelihoods are in nats per image. The grey images of `digits` are binarised by a
fresh draw for every training batch, and once, with a fixed seed, for evaluation; `binarized_mnist`
is Larochelle's fixed binarisation, whose test set is sorted by digit: subsets are random, with a
fixed seed. Batches are drawn with replacement.
"""

from functools import partial

import numpy as np
from scipy.special import logsumexp

from chapters.ch10_flows import flow_encoder_init, flow_posterior
from chapters.ch11_autoregressive import (
    CURES,
    active_units,
    complete,
    likelihood_objective,
    log_likelihood,
    log_weights,
    normal_posterior,
    pixelcnn_init,
    pixelvae_init,
    pixelvae_objective,
    pixelvae_terms,
    sample,
    training_step,
)
from experiments.runner import Parts, Run, one_of, with_error
from minigrad import random, tree
from minigrad.data import binarize
from minigrad.optim import adam, exponential_decay


def evaluation_images(data, n):
    """The test images, binarised once, and a random choice of n of them."""
    fixed = np.random.default_rng(20140621)
    test = binarize(data.x_test, fixed)
    return test, test[fixed.permutation(len(test))[:n]]


def start(config, params, objective, images):
    """The state of a model, and its step."""
    schedule = exponential_decay(config["learning_rate"], config["decay"], 1000)
    optimizer = adam(schedule)
    state = {"params": params, "optimizer": optimizer.init(params), "t": 0}
    return state, training_step(objective, optimizer, images, config["batch"])


def pixelcnn(config, data, rng):
    """PixelCNN with masks of type A and B and residual blocks: exact test log-likelihood."""
    params = pixelcnn_init(rng, config["channels"], config["depth"], config["first"])
    state, step = start(config, params, likelihood_objective, data.x_train)
    test, held_out = evaluation_images(data, config["held_out"])

    def likelihoods(params, images):
        pieces = [images[n : n + 100] for n in range(0, len(images), 100)]
        return np.concatenate([log_likelihood(params, piece) for piece in pieces])

    def evaluate(state, _rng):
        found = likelihoods(state["params"], held_out)
        return {"held_out_log_likelihood": np.mean(found, dtype=np.float64)}

    def finish(state, rng):
        params, size = state["params"], test.shape[1:]
        halves = np.repeat(held_out[:8], 8, axis=0)
        known = np.broadcast_to(np.arange(size[1])[:, None] < size[1] // 2, size)
        drawn = {
            "samples": sample(params, random.uniform(rng, (64, *size))),
            "completions": complete(params, halves, known, random.uniform(rng, halves.shape)),
            "originals": held_out[:8],
        }
        scalars = {
            **with_error("test_log_likelihood", likelihoods(params, test)),
            "parameters": sum(p.size for p in tree.leaves(params)),
        }
        return scalars, {k: np.packbits(v.astype(bool), axis=-1) for k, v in drawn.items()}

    return Parts(state, step, evaluate, finish)


SMALL_FIELD = {"depth": 0, "first": 3}


def pixelvae(config, data, rng):
    """An autoencoder whose decoder sees the pixels before: rate and distortion, by cure."""
    cure, size = one_of(config, "cure", CURES), data.x_train.shape[-1]
    pixels = {"channels": config["channels"], "depth": config["depth"], "first": config["first"]}
    pixels |= SMALL_FIELD if cure == "small-field" else {}
    params = pixelvae_init(
        rng, size, config["latents"], None if cure == "no-pixels" else pixels, config["capacity"]
    )
    posterior = normal_posterior
    if cure.startswith("flow"):
        posterior, shape = flow_posterior, (config["flow_steps"], config["flow_hidden"], 32)
        params["encoder"] = flow_encoder_init(rng, params["encoder"], *shape)
    objective = partial(
        pixelvae_objective,
        posterior=posterior,
        warm_up=config["warm_up"] if cure == "warm-up" else 0,
        free_bits=config["free_bits"] if cure.endswith("free-bits") else 0.0,
    )
    state, step = start(config, params, objective, data.x_train)
    _, held_out = evaluation_images(data, config["held_out"])

    def terms(params, rng):
        noise = random.normal(rng, (len(held_out), config["latents"]), np.float32)
        return pixelvae_terms(params, held_out, noise, posterior)

    def evaluate(state, rng):
        distortion, rates = terms(state["params"], rng)
        rate = np.mean(np.sum(rates, axis=1), dtype=np.float64)
        distortion = np.mean(distortion, dtype=np.float64)
        active = active_units(state["params"], held_out, rng, posterior)
        return {"test_rate": rate, "test_distortion": distortion, "test_active_units": active}

    def finish(state, rng):
        params, x = state["params"], held_out[: config["weighed"]]
        log_w = []
        for _ in range(config["importance_samples"] // 50):
            noise = random.normal(rng, (50, len(x), config["latents"]), np.float32)
            log_w.append(log_weights(params, x, noise, posterior).astype(np.float64))
        log_w = np.concatenate(log_w)
        bounds = {
            "elbo": np.mean(log_w, axis=0),
            "log_evidence": logsumexp(log_w, axis=0) - np.log(len(log_w)),
        }
        rates = np.mean([terms(params, rng)[1].mean(0) for _ in range(10)], axis=0)
        scalars = {"rate": np.sum(rates)}
        scalars["active_units"] = active_units(params, held_out, rng, posterior)
        for name, values in bounds.items():
            scalars |= with_error(name, values)
        arrays = {name: values.astype(np.float32) for name, values in bounds.items()}
        return scalars, arrays | {"rates": rates}

    return Parts(state, step, evaluate, finish)


TRAINING = {"batch": 50, "learning_rate": 2e-3, "decay": 0.7, "log_every": 50, "eval_every": 100}
WHOLE_FIELD = {"channels": 32, "depth": 1, "first": 15, "learning_rate": 4e-3}  # of 8 x 8 pixels
RUNS = {
    "pixelcnn": Run(
        pixelcnn,
        TRAINING | WHOLE_FIELD | {"steps": 2000, "eval_every": 250, "held_out": 297},
        {
            "digits": {},
            "binarized_mnist": {"steps": 10_000, "eval_every": 1000, "channels": 32, "depth": 8}
            | {"first": 7, "held_out": 1000, "learning_rate": 1e-3, "decay": 0.9},
        },
    ),
    "pixelvae": Run(
        pixelvae,
        TRAINING
        | WHOLE_FIELD
        | {"steps": 2000, "eval_every": 50, "latents": 8, "capacity": 4}
        | {"cure": "none", "warm_up": 1000, "free_bits": 0.25, "held_out": 297}
        | {"flow_steps": 8, "flow_hidden": 64}
        | {"weighed": 297, "importance_samples": 1000},
        {
            "digits": {},
            "binarized_mnist": {"steps": 7000, "eval_every": 250, "channels": 16, "depth": 4}
            | {"first": 7, "latents": 20, "capacity": 16, "held_out": 1000, "weighed": 200}
            | {"learning_rate": 2e-3, "decay": 0.8, "warm_up": 3500, "free_bits": 0.5},
        },
    ),
}
