"""The runs of chapter 5: autoencoder and VAEs, and the VAE at several weights of the KL term.

Images are flat rows. Likelihoods are in nats per image. The grey images of `digits` and `mnist` are
binarised by a fresh draw for every training batch, and once, with a fixed seed, for evaluation;
`binarized_mnist` is Larochelle's fixed binarisation. Batches are drawn with replacement.
"""

from functools import partial

import numpy as np
from scipy.special import expit, ndtri

from chapters.ch05_vae import (
    accuracy,
    aevb_step,
    autoencoder_objective,
    decode,
    describe_plane,
    elbo,
    elbo_terms,
    encode,
    kl_to_prior,
    sample_latent,
    share_recognised,
    train_classifier,
    vae_init,
)
from experiments.runner import Parts, Run
from minigrad import random
from minigrad.data import binarize
from minigrad.optim import adam

SHOWN = 2000  # codes in a record
SIDE = 16  # images along a side of the manifold


def flat(images):
    """Images (N, 1, H, W) as rows (N, H W)."""
    return images.reshape(len(images), -1)


def evaluation_images(data):
    """The test images and as many of the training images, binarised once: a dict."""
    rng = np.random.default_rng(20140416)
    test = binarize(flat(data.x_test), rng)
    return {"train": binarize(flat(data.x_train)[: len(test)], rng), "test": test}


def start(config, data, rng):
    """Parameters and optimiser for the model of a config."""
    n_pixels = flat(data.x_train).shape[1]
    params = vae_init(rng, n_pixels, config["hidden"], config["latents"])
    optimizer = adam(config["learning_rate"])
    return {"params": params, "optimizer": optimizer.init(params)}, optimizer


def bytes_of(means):
    """Pixel means in [0, 1] as bytes."""
    return np.rint(255 * np.asarray(means)).astype(np.uint8)


def evaluate_vae(images, params, rng):
    """ELBO and its two terms, averaged over images: a dict of scalars."""
    scalars = {}
    for part, x in images.items():
        noise = random.normal(rng, (len(x), len(params["encoder"]["loc"]["b"])), x.dtype)
        reconstruction, kl = (np.mean(t, dtype=np.float64) for t in elbo_terms(params, x, noise))
        scalars |= {f"{part}_elbo": reconstruction - kl, f"{part}_kl": kl}
    return scalars


def evaluate_autoencoder(images, params):
    """Log-likelihood of images given their own codes, averaged: a dict of scalars."""
    return {
        f"{part}_reconstruction": np.mean(autoencoder_objective(params, x, None), dtype=np.float64)
        for part, x in images.items()
    }


def pictures(params, x, rng):
    """Prior samples (64), and some images with their reconstructions (10), as bytes: a dict."""
    loc, _ = encode(params["encoder"], x)
    z = random.normal(rng, (64, loc.shape[1]), x.dtype)
    rows = np.linspace(0, len(x) - 1, 10).astype(int)
    return {
        "samples": bytes_of(expit(decode(params["decoder"], z))),
        "originals": bytes_of(x[rows]),
        "reconstructions": bytes_of(expit(decode(params["decoder"], loc[rows]))),
    }


def fit_classifier(config, data, rng):
    """The judge of decoded images, and what it makes of real ones: classifier, scalars."""
    classifier = train_classifier(
        flat(data.x_train),
        data.y_train,
        rng,
        config["classifier_hidden"],
        config["classifier_steps"],
    )
    return classifier, {
        "classifier_accuracy": accuracy(classifier, flat(data.x_test), data.y_test),
        "recognised_test_images": share_recognised(classifier, flat(data.x_test)),
    }


def plane(config, data, x, params, rng, stochastic):
    """What the chapter measures and draws of a model with two latents: scalars and arrays."""
    rows = slice(None, None, max(1, len(x) // SHOWN))
    x, labels = x[rows], data.y_test[rows]
    classifier, scalars = fit_classifier(config, data, rng)
    scalars |= describe_plane(params, x, labels, classifier, rng, stochastic)
    loc, log_var = encode(params["encoder"], x)
    line = ndtri((np.arange(SIDE) + 0.5) / SIDE)
    grid = np.stack(np.meshgrid(line, line[::-1]), axis=-1).reshape(-1, 2).astype(x.dtype)
    arrays = {
        "codes": loc.astype(np.float16),
        "labels": labels.astype(np.uint8),
        "manifold": bytes_of(expit(decode(params["decoder"], grid))),
        **pictures(params, x, rng),
    }
    if stochastic:
        noise = random.normal(rng, loc.shape, loc.dtype)
        arrays["draws"] = sample_latent(loc, log_var, noise).astype(np.float16)
    return scalars, arrays


def vae2(config, data, rng):
    """VAE with two latents: the latent plane, measured and drawn."""
    state, optimizer = start(config, data, rng)
    images = evaluation_images(data)

    def finish(state, rng):
        return plane(config, data, images["test"], state["params"], rng, stochastic=True)

    return Parts(
        state,
        aevb_step(elbo, optimizer, flat(data.x_train), config["batch"], config["latents"]),
        lambda state, rng: evaluate_vae(images, state["params"], rng),
        finish,
    )


def autoencoder2(config, data, rng):
    """Autoencoder with two latents and the decoder of vae2: the latent plane."""
    state, optimizer = start(config, data, rng)
    images = evaluation_images(data)
    train = flat(data.x_train)

    def finish(state, rng):
        return plane(config, data, images["test"], state["params"], rng, stochastic=False)

    return Parts(
        state,
        aevb_step(autoencoder_objective, optimizer, train, config["batch"], config["latents"]),
        lambda state, _rng: evaluate_autoencoder(images, state["params"]),
        finish,
    )


def vae20(config, data, rng):
    """VAE with 20 latents: train and test ELBO, samples, reconstructions."""
    state, optimizer = start(config, data, rng)
    images = evaluation_images(data)

    def finish(state, rng):
        loc, log_var = encode(state["params"]["encoder"], images["test"])
        unit = np.mean(kl_to_prior(loc[..., None], log_var[..., None]), axis=0, dtype=np.float64)
        return {}, {"kl_of_unit": unit, **pictures(state["params"], images["test"], rng)}

    return Parts(
        state,
        aevb_step(elbo, optimizer, flat(data.x_train), config["batch"], config["latents"]),
        lambda state, rng: evaluate_vae(images, state["params"], rng),
        finish,
    )


def side_by_side(config, data, rng, objectives):
    """The states of one model per objective, and the step that trains all of them."""
    states, steps = [], []
    for objective in objectives:
        state, optimizer = start(config, data, rng)
        states.append(state)
        images = flat(data.x_train)
        steps.append(aevb_step(objective, optimizer, images, config["batch"], config["latents"]))
    return states, lambda states, rng: ([f(s, rng)[0] for f, s in zip(steps, states)], {})


def rate_distortion(config, data, rng):
    """One VAE for each weight of the KL term: rate and distortion on the test images."""
    betas = config["betas"]
    states, step = side_by_side(config, data, rng, [partial(elbo, beta=beta) for beta in betas])
    test = evaluation_images(data)["test"]

    def evaluate(states, rng):
        scalars = {}
        for beta, state in zip(betas, states):
            found = evaluate_vae({"test": test}, state["params"], rng)
            scalars[f"rate_{beta}"] = found["test_kl"]
            scalars[f"distortion_{beta}"] = -found["test_elbo"] - found["test_kl"]
        return scalars

    return Parts(states, step, evaluate)


def planes(config, data, rng):
    """Five VAEs and five autoencoders with two latents, for the differences of their planes."""
    n = config["models"]
    states, step = side_by_side(config, data, rng, [elbo] * n + [autoencoder_objective] * n)
    test = evaluation_images(data)["test"]

    def finish(states, rng):
        classifier, scalars = fit_classifier(config, data, rng)
        found = [
            describe_plane(state["params"], test, data.y_test, classifier, rng, stochastic=i < n)
            for i, state in enumerate(states)
        ]
        arrays = {}
        for key in found[0]:
            values = np.array([numbers[key] for numbers in found])
            arrays |= {f"vae_{key}": values[:n], f"autoencoder_{key}": values[n:]}
        return scalars, arrays

    return Parts(states, step, finish=finish)


SETTINGS = {"steps": 4000, "batch": 100, "learning_rate": 1e-3, "eval_every": 250}
SMALL = {"hidden": [128, 64], "latents": 2, "classifier_hidden": 128, "classifier_steps": 1500}
LARGE = {"hidden": [400, 200], "classifier_hidden": 400, "classifier_steps": 5000}
MNIST = {"steps": 10_000, "eval_every": 500}
RUNS = {
    "vae2": Run(vae2, SETTINGS | SMALL, {"digits": {}, "mnist": MNIST | LARGE}),
    "autoencoder2": Run(autoencoder2, SETTINGS | SMALL, {"digits": {}, "mnist": MNIST | LARGE}),
    "vae20": Run(
        vae20,
        SETTINGS | {"hidden": [128], "latents": 20},
        {"digits": {}, "binarized_mnist": MNIST | {"steps": 20_000, "hidden": [400]}},
    ),
    "planes": Run(planes, SETTINGS | SMALL | {"models": 5}, {"digits": {}}),
    "rate_distortion": Run(
        rate_distortion,
        SETTINGS
        | {"hidden": [128], "latents": 8, "betas": [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0]}
        | {"eval_every": 1000},
        {"digits": {}},
    ),
}
