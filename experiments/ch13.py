"""The runs of chapter 13: VQ-VAEs, priors over their codes, and what a codebook needs to be used.

Images are binary, likelihoods in nats per image. The grey images of `digits` are binarised by a
fresh draw for every training batch, and once, with a fixed seed, for evaluation; `binarized_mnist`
is Larochelle's fixed binarisation. Batches are drawn with replacement.
"""

import numpy as np
from scipy.special import expit

from chapters.ch11_autoregressive import pixelcnn_init
from chapters.ch13_vq import (
    code_log_prob,
    code_prior_init,
    codebook_from,
    codes_of,
    cost_of_permuting,
    gaussian_terms,
    grid_decode,
    grid_encode,
    grid_vae_init,
    perplexity,
    sample_codes,
    uniform_codebook,
    vq_start,
    vq_step,
    vq_terms,
)
from experiments.runner import Parts, Run, with_error
from minigrad import random, tree, value_and_grad
from minigrad.data import binarize
from minigrad.optim import adam, cosine_decay
from minigrad.train import descent


def evaluation_images(data):
    """The test images, binarised once."""
    return binarize(data.x_test, np.random.default_rng(20140621))


def batch_of(images, n, rng):
    """n random images, binarised by a fresh draw."""
    return binarize(images[rng.integers(len(images), size=n)], rng)


def networks(config, data, rng, codes=True):
    """Parameters of encoder and decoder, for codes or for normal latents."""
    D, size = config["D"], data.x_train.shape[-1]
    shape = config["stride"], config["capacity"], config["depth"]
    return grid_vae_init(rng, size, *shape, D if codes else 2 * D, D)


def vq_networks(config, data, rng):
    """Parameters of a VQ-VAE whose codebook begins with outputs of its encoder."""
    params = networks(config, data, rng)
    x = batch_of(data.x_train, 500, rng)
    return params | {"codebook": codebook_from(params["encoder"], x, config["K"], rng)}


def in_pieces(f, x, size=500):
    """`f` of some hundred images at a time: its results joined along the first axis."""
    found = [f(x[n : n + size]) for n in range(0, len(x), size)]
    return [np.concatenate(part) for part in zip(*found)]


def described(params, x):
    """log p(x | z_q), squared quantisation error, numbers of the codes, of each image."""

    def piece(x):
        (reconstruction, _, error), (_, k) = vq_terms(params, x)
        return reconstruction, error, k

    return in_pieces(piece, x)


def bytes_of(a):
    """Grey images (n, H, W) as bytes, from logits (n, 1, H, W)."""
    return np.round(255 * expit(a[:, 0])).astype(np.uint8)


def vq_vae(config, data, rng):
    """VQ-VAE, then a PixelCNN as prior over its codes: distortion, perplexity, nats per image."""
    K, test = config["K"], evaluation_images(data)
    params = vq_networks(config, data, rng)
    prior = code_prior_init(rng, K, config["prior_channels"], config["prior_depth"])
    vq_optimizer = adam(cosine_decay(config["learning_rate"], config["vq_steps"]))
    rest = max(1, config["steps"] - config["vq_steps"])
    prior_optimizer = adam(cosine_decay(config["prior_learning_rate"], rest))
    state = {
        "vq": vq_start(params, vq_optimizer),
        "prior": {"params": prior, "optimizer": prior_optimizer.init(prior)},
        "t": 0,
    }
    learn = vq_step(
        vq_optimizer, data.x_train, config["batch"], config["beta"], averages=True, revived=True
    )

    def step(state, rng):
        t = {"t": state["t"] + 1}
        if state["t"] < config["vq_steps"]:
            vq, shown = learn(state["vq"], rng)
            return state | {"vq": vq} | t, shown
        k = codes_of(state["vq"]["params"], batch_of(data.x_train, config["batch"], rng))
        follow = descent(lambda p, _rng: -np.mean(code_log_prob(p, k)), prior_optimizer)
        prior, shown = follow(state["prior"], rng)
        return state | {"prior": prior} | t, {"prior_nats": shown["loss"]}

    def prior_nats(state, k):
        (found,) = in_pieces(lambda k: (code_log_prob(state["prior"]["params"], k),), k)
        return -np.mean(found, dtype=np.float64)

    def evaluate(state, _rng):
        reconstruction, error, k = described(state["vq"]["params"], test)
        return {
            "test_distortion": -np.mean(reconstruction, dtype=np.float64),
            "test_quantisation_error": np.mean(error, dtype=np.float64),
            "test_perplexity": perplexity(k, K),
            "test_prior_nats": prior_nats(state, k),
        }

    def finish(state, rng):
        params = state["vq"]["params"]
        decode = lambda k: grid_decode(params["decoder"], params["codebook"][k])
        reconstruction, _, k = described(params, test)
        seen = batch_of(data.x_train, 5000, rng)
        usage = np.bincount(described(params, seen)[2].ravel(), minlength=K)
        log_p = np.log((usage + 1) / np.sum(usage + 1))
        probs = in_pieces(lambda k: (expit(decode(k)),), k)[0]
        shape, N = k.shape[1:], k[0].size
        bound = reconstruction.astype(np.float64) + np.concatenate(
            [code_log_prob(state["prior"]["params"], k[n : n + 500]) for n in range(0, len(k), 500)]
        )
        scalars = {
            "uniform_nats": N * np.log(K),
            "frequency_nats": -np.mean(np.sum(log_p[k], axis=(1, 2))),
            **with_error("test_bound", bound),
            "test_squared_error": np.mean((probs - test) ** 2, dtype=np.float64),
            "test_pixel_variance": np.mean((test - data.x_train.mean(0)) ** 2, dtype=np.float64),
            "parameters": sum(p.size for p in tree.leaves(params)),
            "prior_parameters": sum(p.size for p in tree.leaves(state["prior"]["params"])),
        }
        rows = np.random.default_rng(1).permutation(len(test))[:16]
        drawn = sample_codes(state["prior"]["params"], rng, 32, shape)
        arrays = {
            "originals": np.uint8(255 * test[rows, 0]),
            "reconstructions": bytes_of(decode(k[rows])),
            "samples": bytes_of(decode(drawn)),
            "uniform_samples": bytes_of(decode(rng.integers(K, size=drawn.shape))),
            "usage": usage,
        }
        return scalars, arrays

    return Parts(state, step, evaluate, finish)


def vq_variants(config, data, rng):
    """VQ-VAEs by weight of commitment and care for the codebook: length of z_e, perplexity."""
    made = vq_networks(config, data, rng)  # one start for all
    published = made | {"codebook": uniform_codebook(rng, config["K"], config["D"])}
    loss = {"beta": config["beta"]}
    ways = {
        **{f"beta={beta:g}": (made, {"beta": beta}) for beta in config["betas"]},
        "small": (published, loss),
        "small_revived": (published, loss | {"averages": True, "revived": True}),
        "data_averages": (made, loss | {"averages": True}),
        "data_revived": (made, loss | {"averages": True, "revived": True}),
    }
    optimizer = adam(config["learning_rate"])
    steps = {
        way: vq_step(optimizer, data.x_train, config["batch"], **settings)
        for way, (_, settings) in ways.items()
    }
    state = {way: vq_start(params, optimizer) for way, (params, _) in ways.items()}
    test = evaluation_images(data)

    def step(state, rng):
        seed, new, shown = rng.integers(2**63), {}, {}  # one batch for all
        for way, learn in steps.items():
            new[way], found = learn(state[way], np.random.default_rng(seed))
            shown |= {f"{way}/{name}": value for name, value in found.items()}
        return new, shown

    def evaluate(state, _rng):
        scalars = {}
        for way in ways:
            reconstruction, error, k = described(state[way]["params"], test)
            scalars[f"{way}/test_distortion"] = -np.mean(reconstruction, dtype=np.float64)
            scalars[f"{way}/test_quantisation_error"] = np.mean(error, dtype=np.float64)
            scalars[f"{way}/test_perplexity"] = perplexity(k, config["K"])
        return scalars

    return Parts(state, step, evaluate)


def vq_plane(config, data, rng):
    """A VQ-VAE with codes in the plane: codebook and outputs of the encoder while they learn."""
    params = networks(config, data, rng)
    params |= {"codebook": uniform_codebook(rng, config["K"], 2)}
    optimizer, times = adam(config["learning_rate"]), np.array(config["snapshots"])
    test = evaluation_images(data)[:50]
    learn = vq_step(optimizer, data.x_train, config["batch"], config["beta"])

    def snapshot(params):
        return params["codebook"], grid_encode(params["encoder"], test).reshape(-1, 2)

    kept = [np.repeat(a[None], len(times), axis=0) for a in snapshot(params)]
    state = {"vq": vq_start(params, optimizer), "kept": kept, "t": 0}

    def step(state, rng):
        vq, shown = learn(state["vq"], rng)
        t = state["t"] + 1
        later = (times >= t)[:, None, None]
        kept = state["kept"]
        if t in times:
            kept = [np.where(later, new, old) for new, old in zip(snapshot(vq["params"]), kept)]
        return {"vq": vq, "kept": kept, "t": t}, shown

    def finish(state, _rng):
        return {}, {"codebooks": state["kept"][0], "outputs": state["kept"][1]}

    return Parts(state, step, finish=finish)


def vq_collapse(config, data, rng):
    """Codes and normal latents behind the same decoders: what is lost when images exchange them."""
    D, K, test = config["D"], config["K"], evaluation_images(data)
    optimizer = adam(cosine_decay(config["learning_rate"], config["steps"]))
    pixels = {"channels": config["channels"], "depth": config["pixel_depth"]}
    pixels |= {"first": config["first"]}
    state, steps = {}, {}

    def elbo_loss(params, x, weight, rng):
        shape = grid_encode(params["encoder"], x[:1]).shape[1:3]
        noise = random.normal(rng, (len(x), *shape, D), x.dtype)
        reconstruction, kl, _ = gaussian_terms(params, x, noise)
        return np.mean(weight * kl - reconstruction), {"kl": np.mean(kl)}

    def gaussian_step(warm_up):
        gradient = value_and_grad(elbo_loss, has_aux=True)

        def step(state, rng):
            x = batch_of(data.x_train, config["batch"], rng)
            weight = min(1.0, (int(state["optimizer"]["step"]) + 1) / warm_up)
            (_, shown), grads = gradient(state["params"], x, weight, rng)
            params, inner = optimizer.update(grads, state["optimizer"], state["params"])
            return {"params": params, "optimizer": inner}, shown

        return step

    for decoder in ("pixels", "plain"):
        more = {"pixels": pixelcnn_init(rng, **pixels)} if decoder == "pixels" else {}
        params = vq_networks(config, data, rng) | more
        state[f"codes_{decoder}"] = vq_start(params, optimizer)
        steps[f"codes_{decoder}"] = vq_step(
            optimizer, data.x_train, config["batch"], averages=True, revived=True
        )
        params = networks(config, data, rng, codes=False) | more
        state[f"normal_{decoder}"] = {"params": params, "optimizer": optimizer.init(params)}
        steps[f"normal_{decoder}"] = gaussian_step(1)
    state["warm-up_pixels"] = state["normal_pixels"]
    steps["warm-up_pixels"] = gaussian_step(config["warm_up"])

    def step(state, rng):
        new, shown = {}, {}
        for name, learn in steps.items():
            new[name], found = learn(state[name], rng)
            shown |= {f"{name}/{key}": value for key, value in found.items()}
        return new, shown

    def evaluate(state, rng):
        scalars = {}
        for name in steps:
            params = state[name]["params"]
            if name.startswith("codes"):
                reconstruction, _, k = described(params, test)
                z = params["codebook"][k]
                rate = k[0].size * np.log(K)
                scalars[f"{name}/test_perplexity"] = perplexity(k, K)
            else:
                grid = grid_encode(params["encoder"], test[:1]).shape[1:3]
                noise = random.normal(rng, (len(test), *grid, D), np.float32)
                reconstruction, kl, z = gaussian_terms(params, test, noise)
                rate = np.mean(kl, dtype=np.float64)
            costs = [cost_of_permuting(params, z, test, rng) for _ in range(5)]
            scalars |= {
                f"{name}/test_distortion": -np.mean(reconstruction, dtype=np.float64),
                f"{name}/test_rate": rate,
                f"{name}/test_cost_of_permuting": np.mean(costs, dtype=np.float64),
            }
        return scalars

    return Parts(state, step, evaluate)


SETTINGS = {"batch": 50, "learning_rate": 2e-3, "log_every": 50, "eval_every": 100, "beta": 0.25}
SMALL = {"stride": 2, "capacity": 16, "depth": 2, "K": 16, "D": 8}
PRIOR = {"prior_channels": 32, "prior_depth": 2, "prior_learning_rate": 4e-3}
RUNS = {
    "vq_vae": Run(
        vq_vae,
        SETTINGS | SMALL | PRIOR | {"vq_steps": 1500, "steps": 3000, "eval_every": 250},
        {
            "digits": {},
            "binarized_mnist": {"stride": 4, "capacity": 64, "depth": 3, "K": 128, "D": 32}
            | {"batch": 100, "learning_rate": 1e-3, "vq_steps": 4000, "steps": 7500}
            | {"prior_channels": 64, "prior_depth": 5, "prior_learning_rate": 1e-3}
            | {"eval_every": 1000},
        },
        continues=False,
    ),
    "vq_variants": Run(
        vq_variants,
        SETTINGS
        | SMALL
        | {"K": 32, "capacity": 8, "depth": 1, "betas": [0.0, 0.25, 2.0], "steps": 800},
        {"digits": {}},
    ),
    "vq_plane": Run(
        vq_plane,
        SETTINGS | SMALL | {"D": 2, "steps": 800, "snapshots": [1, 50, 200, 800]},
        {"digits": {}},
    ),
    "vq_collapse": Run(
        vq_collapse,
        SETTINGS
        | SMALL
        | {"stride": 4, "depth": 1, "D": 2, "learning_rate": 4e-3, "steps": 1000, "warm_up": 500}
        | {"channels": 16, "pixel_depth": 1, "first": 15},
        {"digits": {}},
        continues=False,
    ),
}
