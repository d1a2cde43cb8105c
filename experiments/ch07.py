"""The runs of chapter 7: categorical VAEs, and structured prediction of one half of an image.

Images are flat rows. Likelihoods are in nats per image. The grey images of `digits` are binarised
by a fresh draw for every training batch, and once, with a fixed seed, for evaluation;
`binarized_mnist` is Larochelle's fixed binarisation. Batches are drawn with replacement.
"""

import numpy as np
from scipy.special import expit

from chapters.ch03_score_function import network, nvil, nvil_init, output_bias
from chapters.ch06_importance import vimco_free_signal
from chapters.ch07_concrete import (
    categorical_loss,
    categorical_vae_init,
    completions,
    exact_categorical_elbo,
    exact_categorical_evidence,
    hard_codes,
    log_categories,
    relaxed_codes,
    sampled_elbo,
    structured_bound,
    structured_init,
    structured_step,
)
from experiments.runner import Parts, Run, chosen
from minigrad import random
from minigrad.data import binarize
from minigrad.optim import adam
from minigrad.train import descent

PICTURED = 8  # images of which the record keeps completions, and completions of each


def flat(images):
    """Images (N, 1, H, W) as rows (N, H W)."""
    return images.reshape(len(images), -1)


def bytes_of(means):
    """Pixel means in [0, 1] as bytes."""
    return np.rint(255 * np.asarray(means)).astype(np.uint8)


def evaluation_images(data, size):
    """Fixed binarised images: as many of the training set as of the test set, at most `size`."""
    fixed = np.random.default_rng(20161102)
    test = binarize(flat(data.x_test)[chosen(len(data.x_test), size)], fixed)
    return {"train": binarize(flat(data.x_train)[: len(test)], fixed), "test": test}


def side_by_side(names, steps):
    """A step for `fit` that takes one step of each model; the state is the list of theirs."""

    def step(states, rng):
        pairs = [f(state, rng) for f, state in zip(steps, states)]
        metrics = {
            f"{key}_{name}": value for name, (_, m) in zip(names, pairs) for key, value in m.items()
        }
        return [state for state, _ in pairs], metrics

    return step


def categorical_elbos(params, x, mean, config, rng):
    """Mean ELBO, a sum if there is one latent, and mean relaxed objective of images."""
    totals = np.zeros(2)
    for i in range(0, len(x), 500):
        part = x[i : i + 500]
        shape = (config["samples"], len(part), config["latents"], config["categories"])
        noise = random.gumbel(rng, shape, x.dtype)
        draws = [
            lambda log_q, noise=noise: hard_codes(log_q, noise),
            lambda log_q, noise=noise: relaxed_codes(log_q, noise, config["temperature"]),
        ]
        values = [sampled_elbo(params, part, mean, config["categories"], d) for d in draws]
        if config["latents"] == 1:
            values[0] = exact_categorical_elbo(params, part, mean, config["categories"])
        totals += [np.mean(v, dtype=np.float64) * len(part) for v in values]
    return totals / len(x)


def categorical_vae(config, data, rng):
    """VAEs with categorical latents: the exact sum (one latent), relaxed, straight-through."""
    images = flat(data.x_train)
    mean, parts = images.mean(0), evaluation_images(data, config["evaluation_images"])
    pairs = [(method, seed) for method in config["methods"] for seed in range(config["models"])]
    names = [f"{method}_{seed}" for method, seed in pairs]
    optimizer = adam(config["learning_rate"])
    sizes = config["latents"], config["categories"]
    states, steps = [], []
    for method, _ in pairs:
        params = categorical_vae_init(rng, images.shape[1], *sizes, config["hidden"])
        states.append({"params": params, "optimizer": optimizer.init(params)})
        loss = categorical_loss(
            images, mean, config["batch"], *sizes, method, config["temperature"]
        )
        steps.append(descent(loss, optimizer))

    def evaluate(states, rng):
        scalars = {}
        for name, state in zip(names, states):
            for part, x in parts.items():
                elbo, relaxed = categorical_elbos(state["params"], x, mean, config, rng)
                scalars |= {f"{part}_elbo_{name}": elbo, f"{part}_relaxed_{name}": relaxed}
                if config["latents"] == 1:
                    evidence = exact_categorical_evidence(state["params"], x, mean, sizes[1])
                    scalars[f"{part}_evidence_{name}"] = np.mean(evidence, dtype=np.float64)
        return scalars

    def finish(states, rng):
        scalars, arrays = {}, {}
        for (method, seed), name, state in zip(pairs, names, states):
            params = state["params"]
            q = np.exp(log_categories(params["encoder"], parts["test"] - mean, sizes[1]))
            usage = np.mean(q, axis=0, dtype=np.float64)  # (N, K)
            perplexity = np.exp(-np.sum(usage * np.log(usage + 1e-30), axis=-1))
            scalars[f"categories_used_{name}"] = np.mean(perplexity)
            if seed == 0:
                codes = np.eye(sizes[1], dtype=images.dtype)[
                    rng.integers(sizes[1], size=(64, sizes[0]))
                ]
                if sizes[0] == 1:
                    codes = np.eye(sizes[1], dtype=images.dtype)[:, None]
                    arrays[f"usage_{method}"] = usage[0]
                pixels = network(params["decoder"], codes.reshape(len(codes), -1))
                arrays[f"decoded_{method}"] = bytes_of(expit(pixels + output_bias(mean)))
        return scalars, arrays

    return Parts(states, side_by_side(names, steps), evaluate, finish)


def image_halves(config, data, rng):
    """The lower half of an image from the upper one: Concrete against NVIL and VIMCO."""
    images = flat(data.x_train)
    mean, half = images.mean(0), images.shape[1] // 2
    parts = evaluation_images(data, config["evaluation_images"])
    optimizer = adam(config["learning_rate"])
    triples = [
        (method, k, seed)
        for k in config["samples"]
        for method in ("concrete", "nvil" if k == 1 else "vimco")
        for seed in range(config["models"])
    ]
    names = [f"{method}_{k}_{seed}" for method, k, seed in triples]
    signals = {"concrete": None, "nvil": nvil, "vimco": vimco_free_signal}
    states, steps = [], []
    for method, k, _ in triples:
        layers, centres = structured_init(rng, [half, *config["hidden"], half], mean[half:])
        states.append(
            {
                "params": layers,
                "optimizer": optimizer.init(layers),
                "baseline": nvil_init(rng, half) if method == "nvil" else {},
                "centres": centres,
            }
        )
        steps.append(
            structured_step(
                images,
                mean,
                optimizer,
                config["batch"],
                signals[method],
                k,
                config["temperature"],
                config["decay"],
            )  # fmt: skip
        )

    def evaluate(states, rng):
        return {
            f"{part}_{name}": structured_bound(
                state["params"], state["centres"], x, mean, rng, config["evaluation_samples"]
            )
            for name, state in zip(names, states)
            for part, x in parts.items()
        }

    def finish(states, rng):
        rows = np.linspace(0, len(parts["test"]) - 1, PICTURED).astype(int)
        x = parts["test"][rows]
        arrays = {"originals": bytes_of(x)}
        for method, k, seed in triples:
            if seed == 0:
                state = states[names.index(f"{method}_{k}_0")]
                found = completions(state["params"], state["centres"], x, mean, rng, PICTURED)
                arrays[f"completions_{method}_{k}"] = bytes_of(found)
        return {}, arrays

    return Parts(states, side_by_side(names, steps), evaluate, finish)


CATEGORICAL = {
    "steps": 2000,
    "batch": 50,
    "eval_every": 250,
    "log_every": 500,
    "learning_rate": 3e-3,
}
CATEGORICAL |= {"temperature": 0.5, "models": 5, "samples": 5, "evaluation_images": 2000}
LARGE = {"learning_rate": 1e-3, "batch": 100, "models": 1, "hidden": [200], "samples": 1}
LARGE |= {"steps": 20_000, "eval_every": 1000}
RUNS = {
    "one_categorical": Run(
        categorical_vae,
        CATEGORICAL
        | {"latents": 1, "categories": 20, "hidden": [64]}
        | {"methods": ["exact", "concrete", "straight_through"]},
        {"digits": {}, "binarized_mnist": LARGE},
    ),
    "categorical_vae": Run(
        categorical_vae,
        CATEGORICAL
        | {"latents": 8, "categories": 8, "hidden": [64]}
        | {"methods": ["concrete", "straight_through"]},
        {"digits": {}, "binarized_mnist": LARGE | {"latents": 20, "categories": 10}},
    ),
    "image_halves": Run(
        image_halves,
        {"steps": 3000, "batch": 64, "eval_every": 500, "log_every": 500}
        | {"learning_rate": 2e-3, "decay": 1e-3}
        | {"hidden": [32, 32], "samples": [1, 5], "models": 5, "temperature": 2 / 3}
        | {"evaluation_samples": 100, "evaluation_images": 297},
        {
            "digits": {},
            "binarized_mnist": {"steps": 20_000, "eval_every": 2000, "learning_rate": 3e-4}
            | {"hidden": [240, 240], "models": 1, "evaluation_images": 2000},
        },
    ),
}
