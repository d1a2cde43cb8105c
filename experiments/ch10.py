"""The runs of chapter 10: flows in the plane, and a VAE with and without a flow in its encoder.

Distances are divergences in nats. Images are (N, 1, H, W); likelihoods are in nats per image. The
grey images of `digits` are binarised by a fresh draw for every training batch, and once, with a
fixed seed, for evaluation; `binarized_mnist` is Larochelle's fixed binarisation.
"""

import numpy as np

from chapters.ch05_vae import conv_vae_init
from chapters.ch06_importance import iwae_bound
from chapters.ch10_flows import (
    CURVES,
    ENERGIES,
    FLOWS,
    chain_init,
    distance_from_truth,
    draw_near,
    flow_encoder_init,
    flow_log_weights,
    flow_posterior,
    likelihood_step,
    log_normaliser,
    planar,
    reverse_kl,
    true_log_prob,
)
from experiments.runner import Parts, Run, with_error
from minigrad import random, tree, value_and_grad
from minigrad.data import binarize
from minigrad.optim import adam, cosine_decay

FIXED = 20150521  # seed of everything that is drawn for evaluation


def side_by_side(models, config, rng):
    """States and step of several flows in the plane; `models`: (flows, make a step) by name."""
    optimizer = adam(cosine_decay(config["learning_rate"], config["steps"]))
    states, steps = {}, {}
    for name, (flows, make) in models.items():
        params = chain_init(flows, rng, 2)
        states[name] = {"params": params, "optimizer": optimizer.init(params)}
        steps[name] = make(flows, optimizer)

    def step(states, rng):
        return {name: steps[name](states[name], rng)[0] for name in steps}, {}

    return states, step


def reverse_kl_step(flows, energy, optimizer, batch, steps):
    """A step down the divergence from flow to target, for `minigrad.train.fit`.

    The energy is warmed up over the first half of the `steps`, so that a flow sees all of the
    target before it settles on a part. The state is {"params", "optimizer"}.
    """
    gradient = value_and_grad(lambda params, z, t: reverse_kl(flows, params, z, energy, t))

    def step(state, rng):
        warmth = min(1.0, 0.05 + 2 * int(state["optimizer"]["step"]) / steps)
        z = random.normal(rng, (batch, 2), np.float32)
        value, grads = gradient(state["params"], z, warmth)
        params, inner = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": params, "optimizer": inner}, {"objective": value}

    return step


def parameters(states):
    """The parameters of all models as arrays for the record, named <model>/<path>."""
    arrays = {}
    for name, state in states.items():
        leaves = zip(tree.paths(state["params"]), tree.leaves(state["params"]))
        arrays |= {f"{name}/{path}": leaf for path, leaf in leaves}
    return arrays


def distance_of_the_best_normal(curve, x):
    """E_p[log p - log q] for the normal law q with the mean and covariance of points `x`."""
    covariance = np.cov(x.astype(np.float64).T)
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    return np.mean(true_log_prob(curve, x)) + entropy


def flow_energies(config, _data, rng):
    """Planar flows of several lengths bent towards four energies in the plane."""
    models = {}
    for name, energy in ENERGIES.items():
        for length in config["lengths"]:
            make = lambda flows, optimizer, energy=energy: reverse_kl_step(
                flows, energy, optimizer, config["batch"], config["steps"]
            )
            models[f"{name}_{length}"] = [planar] * length, make
    states, step = side_by_side(models, config, rng)
    noise = np.random.default_rng(FIXED).standard_normal((config["evaluation_samples"], 2))
    constants = {name: log_normaliser(energy) for name, energy in ENERGIES.items()}

    def evaluate(states, _rng):
        scalars = {}
        for name, state in states.items():
            target = name.partition("_")[0]
            found = reverse_kl(models[name][0], state["params"], noise, ENERGIES[target])
            scalars[f"kl_{name}"] = found + constants[target]
        return scalars

    return Parts(states, step, evaluate, lambda states, _rng: ({}, parameters(states)))


def flow_curves(config, _data, rng):
    """Three families of flows fitted to points near three curves in the plane."""
    models = {}
    for name, curve in CURVES.items():
        for family, flows in FLOWS.items():
            make = lambda flows, optimizer, curve=curve: likelihood_step(
                flows, curve, optimizer, config["batch"]
            )
            models[f"{name}_{family}"] = flows, make
    states, step = side_by_side(models, config, rng)
    fixed = np.random.default_rng(FIXED)
    points = {n: draw_near(c, fixed, config["evaluation_samples"]) for n, c in CURVES.items()}

    def evaluate(states, _rng):
        scalars = {}
        for name, state in states.items():
            data = name.partition("_")[0]
            flows, curve, x = models[name][0], CURVES[data], points[data]
            distance, error = distance_from_truth(flows, state["params"], curve, x)
            scalars |= {f"distance_{name}": distance, f"error_{name}": error}
        return scalars

    def finish(states, _rng):
        normal = {
            f"distance_{name}_normal": distance_of_the_best_normal(curve, points[name])
            for name, curve in CURVES.items()
        }
        return normal, parameters(states)

    return Parts(states, step, evaluate, finish)


# The encoder


def vae_init(config, size, rng, with_flow):
    """Parameters of a convolutional VAE, with a flow in its encoder or the same without."""
    params = conv_vae_init(rng, size, config["capacity"], config["depth"], config["latents"])
    steps = config["flow_steps"] if with_flow else 0
    encoder = flow_encoder_init(
        rng, params["encoder"], steps, config["flow_hidden"], config["context"]
    )
    return {**params, "encoder": encoder}


def in_parts(params, x, rng, samples, d, rows=4000):
    """Yield log-weights (samples, b) of some of the images at a time."""
    size = max(1, rows // samples)
    for first in range(0, len(x), size):
        part = x[first : first + size]
        noise = random.normal(rng, (samples, len(part), d), x.dtype)
        yield flow_log_weights(params, part, noise).astype(np.float64)


def flow_vae(config, data, rng):
    """VAEs of zeros and ones with and without eight autoregressive steps in the encoder."""
    fixed = np.random.default_rng(FIXED)
    test = binarize(data.x_test, fixed)
    train = binarize(data.x_train[: len(test)], fixed)
    chosen = fixed.permutation(len(test))
    many, few = (test[chosen[: config[key]]] for key in ("test_images", "test_images_10000"))
    images, d = data.x_train, config["latents"]
    optimizer = adam(cosine_decay(config["learning_rate"], config["steps"]))
    descend = value_and_grad(lambda params, x, noise: -np.mean(flow_log_weights(params, x, noise)))
    kinds = {"plain": False, "flow": True}
    states = {}
    for model in range(config["models"]):
        start = rng.integers(2**63)  # the same convolutions for both
        for kind, with_flow in kinds.items():
            generator = np.random.default_rng(start)
            params = vae_init(config, images.shape[-1], generator, with_flow)
            states[f"{kind}_{model}"] = {"params": params, "optimizer": optimizer.init(params)}

    def step(states, rng):
        x = binarize(images[rng.integers(len(images), size=config["batch"])], rng)
        noise = random.normal(rng, (config["batch"], d), x.dtype)
        new = {}
        for name, state in states.items():  # all see the same images and noise
            _, grads = descend(state["params"], x, noise)
            params, inner = optimizer.update(grads, state["optimizer"], state["params"])
            new[name] = {"params": params, "optimizer": inner}
        return new, {}

    def evaluate(states, rng):
        scalars = {}
        seed = rng.integers(2**63)
        for name, state in states.items():
            for part, x in {"train": train[chosen], "test": test[chosen]}.items():
                x = x[: config["test_images"]]
                found = in_parts(state["params"], x, np.random.default_rng(seed), 10, d)
                scalars[f"{part}_elbo_{name}"] = np.mean(np.concatenate(list(found), axis=1))
        return scalars

    def finish(states, rng):
        scalars, arrays = {}, {}
        for name, state in states.items():
            params = state["params"]
            for M, x in {1000: many, 10_000: few}.items():
                generator = np.random.default_rng(FIXED)
                parts = in_parts(params, x, generator, M, d)
                both = [(np.mean(log_w, axis=0), iwae_bound(log_w)) for log_w in parts]
                elbos, found = np.concatenate(both, axis=1)
                arrays[f"{name}_{M}"] = found.astype(np.float32)
                scalars |= with_error(f"elbo_{M}_{name}", elbos)
                scalars |= with_error(f"bound_{M}_{name}", found)
            noise = random.normal(rng, (len(many), d), many.dtype)
            terms = flow_posterior(params["encoder"], many, noise)[2]
            arrays[f"{name}_rates"] = np.mean(terms, axis=0, dtype=np.float64)
        return scalars, arrays

    return Parts(states, step, evaluate, finish)


PLANE = {"learning_rate": 5e-3, "batch": 128, "log_every": 1000, "eval_every": 250}
VAE = {"batch": 100, "learning_rate": 2e-3, "log_every": 1000, "eval_every": 250}
VAE |= {"capacity": 16, "latents": 20, "flow_steps": 8, "context": 32}
RUNS = {
    "flow_energies": Run(
        flow_energies,
        PLANE | {"steps": 2000, "lengths": [2, 8, 32], "evaluation_samples": 20_000},
        continues=False,
    ),
    "flow_curves": Run(
        flow_curves, PLANE | {"steps": 1500, "evaluation_samples": 4000}, continues=False
    ),
    "flow_vae": Run(
        flow_vae,
        VAE
        | {"steps": 1500, "models": 5, "depth": 1, "flow_hidden": 64}
        | {"test_images": 297, "test_images_10000": 50},
        {
            "digits": {},
            "binarized_mnist": {"steps": 12_000, "models": 1, "depth": 3, "flow_hidden": 128}
            | {"learning_rate": 1e-3, "eval_every": 1000}
            | {"test_images": 1000, "test_images_10000": 100},
        },
        continues=False,
    ),
}
