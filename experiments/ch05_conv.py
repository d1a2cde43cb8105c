"""The convolutional runs of chapter 5: zeros and ones with both gaps, grey images by two KL terms.

Images are (N, 1, H, W); the rest is as in `experiments.ch05`.
"""

from functools import partial

import numpy as np
from scipy.special import expit

from chapters.ch05_vae import (
    aevb_step,
    bernoulli_log_lik,
    best_in_family,
    conv_decode,
    conv_encode,
    conv_vae_init,
    elbo,
    elbo_sampled,
    elbo_terms,
    gaussian_log_lik,
    local_elbo,
    sample_latent,
)
from chapters.ch06_importance import iwae_bound
from experiments.ch05 import MNIST, SETTINGS, bytes_of, evaluation_images, flat
from experiments.runner import Parts, Run, chosen, with_error
from minigrad import grad, random, stop_gradient, tree
from minigrad.optim import adam
from minigrad.special import logsumexp, normal_log_prob


def conv_start(config, data, rng):
    """Parameters and optimiser for the convolutional model of a config."""
    size = data.x_train.shape[-1]
    params = conv_vae_init(rng, size, config["capacity"], config["depth"], config["latents"])
    optimizer = adam(config["learning_rate"])
    return {"params": params, "optimizer": optimizer.init(params)}, optimizer


def conv_evaluation_images(data):
    """`evaluation_images` as (N, 1, H, W)."""
    images = evaluation_images(data)
    return {part: x.reshape(-1, *data.x_test.shape[1:]) for part, x in images.items()}


def in_parts(f, x, size=1000):
    """`f` of a thousand images at a time, joined along the first axis."""
    return np.concatenate([f(x[i : i + size]) for i in range(0, len(x), size)])


def conv_elbos(params, x, log_lik, rng, draws=1):
    """ELBO and KL term of each image, averaged over draws: (n, 2)."""

    def both(x):
        d = params["encoder"]["loc"]["b"].size
        found = [
            elbo_terms(params, x, random.normal(rng, (len(x), d), x.dtype), conv_encode, log_lik)
            for _ in range(draws)
        ]
        reconstruction, kl = np.mean(found, axis=0, dtype=np.float64)
        return np.stack([reconstruction - kl, kl], axis=1)

    return in_parts(both, x)


def conv_elbo(params, x, log_lik, rng, draws=1):
    """ELBO and KL term, averaged over images and draws: two numbers."""
    return conv_elbos(params, x, log_lik, rng, draws).mean(0)


def log_weights(decoder, q, x, noise, log_lik):
    """log p(x, z) / q(z) of each image at samples of its normal q made of the noise: (n, N)."""
    z = sample_latent(*q, noise)
    log_joint = log_lik(decoder, z, x) + np.sum(normal_log_prob(z, 0.0, 1.0), axis=-1)
    return log_joint - np.sum(normal_log_prob(z, q[0], np.exp(0.5 * q[1])), axis=-1)


def conv_bounds(params, x, log_lik, rng, samples=1000):
    """The bound on log p(x) by many samples of the encoder's q, for each image: (N,)."""
    q = conv_encode(params["encoder"], x)
    shape = (50, *q[0].shape)
    log_w = [
        log_weights(params["decoder"], q, x, random.normal(rng, shape, x.dtype), log_lik)
        for _ in range(samples // 50)
    ]
    return iwae_bound(np.concatenate(log_w).astype(np.float64))


def conv_pictures(params, x, rng):
    """As `pictures`, and the parameters: a dict of arrays."""
    rows = np.linspace(0, len(x) - 1, 10).astype(int)
    loc, _ = conv_encode(params["encoder"], x[rows])
    z = random.normal(rng, (64, loc.shape[1]), x.dtype)
    leaves = zip(tree.paths(params), tree.leaves(params))
    return {
        "samples": flat(bytes_of(expit(conv_decode(params["decoder"], z)))),
        "originals": flat(bytes_of(x[rows])),
        "reconstructions": flat(bytes_of(expit(conv_decode(params["decoder"], loc)))),
        **{f"params/{path}": leaf for path, leaf in leaves},
    }


def gaps_by_sampling(params, x, config, rng):
    """Estimates of log p(x), best and encoder's ELBO of each image, and the sample size: (n,) each.

    The proposal is the best normal law; the sample size is the effective one, of
    `importance_samples`.
    """
    decoder, shape = params["decoder"], (len(x), config["latents"])

    def draw(n=8):
        return random.normal(rng, (n, *shape), x.dtype), np.full(n, 1 / n, x.dtype)

    q = conv_encode(params["encoder"], x)
    best = best_in_family(decoder, q, x, draw, config["ascent_steps"], bernoulli_log_lik)
    chunks = []
    for _ in range(config["importance_samples"] // 50):
        noise, weights = draw(50)
        log_w = log_weights(decoder, best, x, noise, bernoulli_log_lik)
        encoder_elbo = local_elbo(decoder, q, x, noise, weights, bernoulli_log_lik)
        best_elbo = local_elbo(decoder, best, x, noise, weights, bernoulli_log_lik)
        chunks.append((log_w, best_elbo, encoder_elbo))
    log_w, best_elbo, encoder_elbo = zip(*chunks)
    log_w = np.concatenate(log_w).astype(np.float64)
    log_p = logsumexp(log_w, axis=0) - np.log(len(log_w))
    size = np.exp(2 * logsumexp(log_w, axis=0) - logsumexp(2 * log_w, axis=0))
    return log_p, np.mean(best_elbo, axis=0), np.mean(encoder_elbo, axis=0), size


def conv_discrete(config, data, rng):
    """Convolutional VAE of zeros and ones: ELBO, samples, parameters, its two gaps."""
    state, optimizer = conv_start(config, data, rng)
    images = conv_evaluation_images(data)
    objective = partial(elbo, encode=conv_encode, log_lik=bernoulli_log_lik)

    def evaluate(state, rng):
        scalars = {}
        for part, x in images.items():
            bound, kl = conv_elbo(state["params"], x, bernoulli_log_lik, rng)
            scalars |= {f"{part}_elbo": bound, f"{part}_kl": kl}
        return scalars

    def finish(state, rng):
        scalars, arrays = {}, conv_pictures(state["params"], images["test"], rng)
        names = "log_evidence", "best_elbo", "encoder_elbo", "sample_size"
        for part, x in images.items():
            x = x[chosen(len(x), config["gap_images"])]
            found = gaps_by_sampling(state["params"], x, config, rng)
            for name, values in zip(names, found):
                arrays[f"{part}_{name}"] = values.astype(np.float32)
                scalars[f"{part}_gaps_{name}"] = np.mean(values, dtype=np.float64)
        return scalars, arrays

    step = aevb_step(objective, optimizer, data.x_train, config["batch"], config["latents"])
    return Parts(state, step, evaluate, finish)


def encoder_variance(objective, params, x, noises):
    """Sum over the encoder's parameters of the variance over noise of the gradient of a batch."""
    gradient = grad(
        lambda encoder, noise: np.mean(objective(params | {"encoder": encoder}, x, noise))
    )
    draws = [
        np.concatenate([leaf.ravel() for leaf in tree.leaves(gradient(params["encoder"], noise))])
        for noise in noises
    ]
    return np.sum(np.var(draws, axis=0, ddof=1, dtype=np.float64))


def conv_gaussian(config, data, rng):
    """Convolutional VAEs of grey images, pairwise alike but for the KL term's form: test ELBOs."""
    model = {
        "encode": conv_encode,
        "log_lik": partial(gaussian_log_lik, scale=config["pixel_scale"]),
    }
    objectives = {
        "closed": partial(elbo, **model),
        "sampled": partial(elbo_sampled, **model),
        "sampled_no_score": partial(elbo_sampled, hold=stop_gradient, **model),
    }
    trained = {name: objectives[name] for name in ("closed", "sampled")}
    states, steps = {name: [] for name in trained}, {}
    for _ in range(config["models"]):
        state, optimizer = conv_start(config, data, rng)  # one start for both of a pair
        for name in trained:
            states[name].append(state)
    for name, objective in trained.items():
        steps[name] = aevb_step(
            objective,
            optimizer,
            data.x_train,
            config["batch"],
            config["latents"],
            draw=lambda images, _rng: images,
        )

    def step(states, rng):
        seeds = rng.integers(2**63, size=config["models"])  # and one batch and noise at each step
        return {
            name: [
                steps[name](state, np.random.default_rng(seed))[0]
                for state, seed in zip(states[name], seeds)
            ]
            for name in states
        }, {}

    test = data.x_test

    def bounds(states, rng, draws):
        return {
            name: np.array(
                [conv_elbo(s["params"], test, model["log_lik"], rng, draws) for s in states[name]]
            )
            for name in trained
        }

    def evaluate(states, rng):
        scalars = {}
        for name, found in bounds(states, rng, draws=1).items():
            scalars |= {
                f"{name}_test_elbo": found[:, 0].mean(),
                f"{name}_test_kl": found[:, 1].mean(),
            }
        params, x = states["closed"][0]["params"], data.x_train[: config["batch"]]
        noises = random.normal(rng, (config["variance_draws"], len(x), config["latents"]), x.dtype)
        for name, objective in objectives.items():
            scalars[f"{name}_variance"] = encoder_variance(objective, params, x, noises)
        return scalars

    def finish(states, rng):
        found = bounds(states, rng, config["test_draws"])
        arrays = {f"{name}_test_elbo": bound[:, 0] for name, bound in found.items()}
        arrays |= conv_pictures(states["closed"][0]["params"], test, rng)
        scalars, few = {}, test[chosen(len(test), 200)]
        for name, (state, *_) in states.items():  # of the first of the models
            elbos = conv_elbos(state["params"], test, model["log_lik"], rng)[:, 0]
            scalars |= with_error(f"{name}_elbo", elbos)
            likelihoods = conv_bounds(state["params"], few, model["log_lik"], rng)
            scalars |= with_error(f"{name}_bound_1000", likelihoods)
        return scalars, arrays

    return Parts(states, step, evaluate, finish)


CONV = {"capacity": 16, "depth": 3, "latents": 20}
RUNS = {
    "conv_discrete": Run(
        conv_discrete,
        SETTINGS | CONV | {"ascent_steps": 300, "importance_samples": 2000, "gap_images": 100},
        {"digits": {}, "binarized_mnist": MNIST | {"steps": 12_000, "eval_every": 1000}},
    ),
    "conv_gaussian": Run(
        conv_gaussian,
        SETTINGS
        | {"capacity": 8, "depth": 2, "latents": 10, "batch": 50, "models": 5, "steps": 1000}
        | {"eval_every": 100, "pixel_scale": 0.1, "variance_draws": 30, "test_draws": 20},
        {
            "digits": {},
            "mnist": MNIST
            | CONV
            | {"batch": 100, "models": 1, "test_draws": 5, "steps": 8_000, "eval_every": 1000},
        },
    ),
}
