"""The runs of chapter 5: autoencoder and VAEs, weights of the KL term, gaps.

Those of convolutional models are in `experiments.ch05_conv`. Images are flat rows. Likelihoods are
in nats per image. The grey images of `digits` and `mnist` are binarised by a fresh draw for every
training batch, and once, with a fixed seed, for evaluation; `binarized_mnist` is Larochelle's fixed
binarisation. Batches are drawn with replacement.
"""

from functools import partial

import numpy as np
from scipy.special import expit, ndtri

from chapters.ch05_vae import (
    accuracy,
    aevb_step,
    autoencoder_objective,
    best_in_family,
    decode,
    describe_plane,
    elbo,
    elbo_terms,
    encode,
    kl_to_prior,
    local_elbo,
    log_likelihood,
    normal_grid,
    sample_latent,
    share_recognised,
    train_classifier,
    vae_init,
)
from experiments.runner import Parts, Run, chosen
from minigrad import random, tree
from minigrad.data import binarize
from minigrad.optim import adam
from minigrad.special import logsumexp, normal_log_prob

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


def log_evidence_by_quadrature(decoder, x, grid, size=2000):
    """log p(x) of each image as by `log_evidence`, for many images and nodes: (n,)."""
    parts = []
    for i in range(0, len(grid[0]), size):
        z, weights = (a[i : i + size] for a in grid)
        a = decode(decoder, z[:, 0])
        log_p = x @ a.T - np.sum(np.logaddexp(0, a), axis=1)  # Eq. (eq-vae-likelihood)
        parts.append(logsumexp(log_p + np.log(weights), axis=1))
    return logsumexp(np.array(parts), axis=0)


def gaps_by_quadrature(params, x, config, rng):
    """log p(x), best and encoder's ELBO of each image: (n,) each; and the two normal laws.

    All in float64. Fresh draws guide the ascent, and quadrature gives the values.
    """
    decoder = params["decoder"]
    z, weights = normal_grid(2, config["grid"])
    near = np.max(np.abs(z[:, 0]), axis=1) < 6  # beyond, no code lies
    log_p = log_evidence_by_quadrature(decoder, x, (z[near], weights[near]))
    q = encode(params["encoder"], x)
    n = config["ascent_draws"]
    draw = lambda: (random.normal(rng, (n, len(x), 2)), np.full(n, 1 / n))
    best = best_in_family(decoder, q, x, draw, config["ascent_steps"])
    bounds = [local_elbo(decoder, law, x, *hermite(config["nodes"])) for law in (best, q)]
    return (log_p, *bounds), {"best": best, "encoder": q}


def gaps(config, data, rng):
    """VAEs with two latents: the gap below log p(x), of training and test images, in two."""
    n = config["models"]
    states, step = side_by_side(config, data, rng, [elbo] * n)
    images = evaluation_images(data)
    images = {part: x[chosen(len(x), config["gap_images"])] for part, x in images.items()}

    def evaluate(states, rng):
        found = [evaluate_vae(images, state["params"], rng) for state in states]
        return {key: np.mean([scalars[key] for scalars in found]) for key in found[0]}

    def finish(states, rng):
        arrays = {}
        for part, x in images.items():
            x = x.astype(np.float64)
            found = []
            for i, state in enumerate(states):
                params = tree.map(lambda p: p.astype(np.float64), state["params"])
                values, laws = gaps_by_quadrature(params, x, config, rng)
                found.append(values)
                if part == "test" and i == 0:
                    arrays |= posteriors(params, x, values, laws)
            arrays |= {
                f"{part}_{name}": np.array(values).astype(np.float32)
                for name, values in zip(("log_evidence", "best_elbo", "encoder_elbo"), zip(*found))
            }
        return {}, arrays

    return Parts(states, step, evaluate, finish)


def hermite(n):
    """Gauss-Hermite nodes (n^2, 1, 2) and weights (n^2,) for two standard normal variables."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    weights = weights / np.sum(weights)
    plane = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 1, 2)
    return plane, np.outer(weights, weights).ravel()


def posteriors(params, x, values, laws, n=121):
    """The log-joint on a plane around q, for the images of median and largest gap: a dict."""
    log_p, _, encoder_elbo = values
    order = np.argsort(log_p - encoder_elbo)
    rows = order[[len(order) // 2, -1]]
    arrays = {"shown": flat(bytes_of(x[rows]))}
    planes, extents = [], []
    for row in rows:
        (loc, log_var), (loc_q, log_var_q) = (
            [a[row] for a in laws[k]] for k in ("best", "encoder")
        )
        reach = 3 * np.exp(0.5 * np.maximum(log_var, log_var_q)).max()
        reach += 0.5 * np.abs(loc - loc_q).max()
        middle = 0.5 * (loc + loc_q)
        line = np.linspace(-reach, reach, n)
        z = middle + np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 1, 2)
        decoded = log_likelihood(params["decoder"], z, x[row : row + 1])[:, 0]
        log_prior = np.sum(normal_log_prob(z[:, 0], 0.0, 1.0), axis=-1)
        planes.append((decoded + log_prior - log_p[row]).reshape(n, n))
        extents.append([middle[0] - reach, middle[0] + reach, middle[1] - reach, middle[1] + reach])
    arrays |= {"log_posterior": np.float16(planes), "extent": np.array(extents)}
    for name in ("best", "encoder"):
        arrays[f"{name}_law"] = np.stack(
            [a[rows] for a in laws[name]], axis=1
        )  # (2, loc/log_var, 2)
    return arrays


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
    "gaps": Run(
        gaps,
        SETTINGS
        | {"hidden": [128, 64], "latents": 2, "models": 3, "eval_every": 1000}
        | {"gap_images": 297, "ascent_steps": 300, "ascent_draws": 16, "nodes": 16, "grid": 401},
        {
            "digits": {},
            "mnist": MNIST | {"hidden": [400, 200], "models": 1, "gap_images": 100, "nodes": 12},
        },
    ),
}
