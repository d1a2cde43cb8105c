"""The runs of chapter 6: tighter bounds, the evidence of a trained VAE, and classification.

Likelihoods are in nats per image. The grey images of `digits` and `mnist` are binarised by a fresh
draw for every training batch, and once, with a fixed seed, for evaluation; `binarized_mnist` is
Larochelle's fixed binarisation.
"""

import numpy as np

from chapters.ch03_score_function import total_log_prob
from chapters.ch05_vae import (
    bernoulli_log_lik,
    conv_encode,
    encode,
    recorded_conv_params,
    vae_init,
)
from chapters.ch06_importance import (
    ais,
    bound_step,
    class_conditional_init,
    class_conditional_log_weights,
    class_log_probs,
    iwae_bound,
    logistic_regression,
    naive_bayes,
    pareto_shape,
    standard_normal_log_prob,
    vae_log_weights,
)
from experiments.runner import Parts, Run, a_step_each, chosen
from minigrad import grad, random
from minigrad.data import binarize
from minigrad.nn import dense
from minigrad.optim import adam, exponential_decay

FIXED = 20160502  # seed of the binarisations for evaluation


def flat(images):
    """Images (N, 1, H, W) as rows (N, H W)."""
    return images.reshape(len(images), -1)


# Tighter bounds


def mean_bound(log_w):
    """The average of k one-sample ELBOs: (k, B) to (B,)."""
    return np.mean(log_w, axis=0)


def estimate(params, x, rng, samples, rows=20_000):
    """The estimate of log p(x) from `samples` weights of each image: (B,), float64."""
    size = max(1, rows // samples)
    latents = len(params["encoder"]["loc"]["b"])
    found = []
    for first in range(0, len(x), size):
        part = x[first : first + size]
        noise = random.normal(rng, (samples, len(part), latents), x.dtype)
        found.append(iwae_bound(vae_log_weights(params, part, noise).astype(np.float64)))
    return np.concatenate(found)


def active_units(params, x):
    """Number of latents whose location varies over images `x` by more than 0.01."""
    loc, _ = encode(params["encoder"], x)
    return np.sum(np.var(loc.astype(np.float64), axis=0) > 0.01)


def tighter(config, data, rng):
    """VAEs trained on the mean of k ELBOs, and on the bound of k samples: k = 1, 5, 50."""
    images = flat(data.x_train)
    fixed = np.random.default_rng(FIXED)
    test = binarize(flat(data.x_test), fixed)
    train = binarize(images[: len(test)], fixed)
    bounds = {"vae": mean_bound, "iwae": iwae_bound}
    optimizer = adam(exponential_decay(config["learning_rate"], 0.1, config["decay_steps"]))
    names, states, steps = [], [], []
    for seed in range(config["models"]):
        params = vae_init(rng, images.shape[1], config["hidden"], config["latents"])
        for k in config["samples"]:
            for method in ("vae", "iwae") if k > 1 else ("vae",):
                names.append(f"{method}_{k}_{seed}")
                states.append({"params": params, "optimizer": optimizer.init(params)})
                steps.append(
                    bound_step(
                        bounds[method], optimizer, images, config["batch"], k, config["latents"]
                    )
                )

    def step(states, rng):
        return [f(state, rng)[0] for f, state in zip(steps, states)], {}

    def evaluate(states, rng):
        scalars = {}
        for name, state in zip(names, states):
            value = estimate(state["params"], test, rng, config["evaluation_samples"])
            scalars[f"test_{name}"] = np.mean(value)
        return scalars

    def finish(states, rng):
        scalars = {}
        for name, state in zip(names, states):
            params = state["params"]
            for part, x in {"train": train, "test": test}.items():
                value = estimate(params, x, rng, config["final_samples"])
                scalars[f"{part}_final_{name}"] = np.mean(value)
            scalars[f"test_elbo_{name}"] = np.mean(
                [np.mean(estimate(params, test, rng, 1)) for _ in range(20)]
            )
            scalars[f"active_{name}"] = active_units(params, train)
        return scalars, {}

    return Parts(states, step, evaluate, finish)


# The evidence of a trained VAE


def proposals(loc, log_var):
    """Proposals by name, each (loc, log_var): the encoder's, narrower ones, and the prior."""
    return {
        "encoder": (loc, log_var),
        "half": (loc, log_var + 2 * np.log(loc.dtype.type(0.5))),
        "prior": (np.zeros_like(loc), np.zeros_like(log_var)),
    }


def evidence(config, data, _rng):
    """Log-evidence of test images under the convolutional VAE of chapter 5, image by image."""
    model = recorded_conv_params(f"conv_discrete_{config['data']}")
    images = binarize(data.x_test, np.random.default_rng(FIXED))
    images = images[chosen(len(images), config["steps"] * config["batch"])]
    M, batch = config["samples"], config["batch"]
    sizes = [m for m in (1, 10, 100, 1000, 10_000) if m <= M]
    state = {"done": np.zeros((), np.int64), "model": model}  # the record may be made anew
    for name in ("encoder", "half", "prior"):
        state[f"bounds_{name}"] = np.zeros((0, len(sizes)))
        state[f"shape_{name}"] = np.zeros(0)
    state |= {"ais": np.zeros(0), "ais_spread": np.zeros(0)}

    def log_weights(params, x, q, rng):
        loc, log_var = q
        noise = random.normal(rng, (M, *loc.shape), loc.dtype)
        parts = [
            vae_log_weights(
                params, x, part, encode=lambda _, x: q, log_lik=bernoulli_log_lik
            ).astype(np.float64)
            for part in np.array_split(noise, max(1, noise[..., 0].size // 5000))
        ]
        return np.concatenate(parts)

    def step(state, rng):
        first, params = int(state["done"]), state["model"]
        x = images[first : first + batch]
        loc, log_var = conv_encode(params["encoder"], x)
        new = {"done": np.asarray(first + len(x))}
        for name, q in proposals(loc, log_var).items():
            log_w = log_weights(params, x, q, rng)
            found = [
                np.mean([iwae_bound(part) for part in np.split(log_w, M // m)], axis=0)
                for m in sizes
            ]
            new[f"bounds_{name}"] = np.stack(found, axis=1)
            new[f"shape_{name}"] = np.array([pareto_shape(column) for column in log_w.T])
        new |= {"ais": np.zeros(0), "ais_spread": np.zeros(0)}
        if first < config["ais_images"]:
            z = random.normal(rng, (config["chains"], *loc.shape), loc.dtype)
            target = lambda z: (
                bernoulli_log_lik(params["decoder"], z, x) + standard_normal_log_prob(z)
            )
            temperatures = np.linspace(0, 1, config["temperatures"] + 1) ** 2
            log_w, accepted = ais(
                standard_normal_log_prob,
                target,
                z,
                temperatures.astype(x.dtype),
                rng,
                config["leapfrog_step"],
                config["leaps"],
            )
            log_w = log_w.astype(np.float64)
            new["ais"] = iwae_bound(log_w)
            new["ais_spread"] = np.std(log_w, axis=0)
        metrics = {"bound": np.mean(new["bounds_encoder"][:, -1])}
        if first < config["ais_images"]:
            metrics["accepted"] = accepted
        joined = {
            key: np.concatenate([state[key], value]) for key, value in new.items() if key != "done"
        }
        return joined | {"done": new["done"], "model": params}, metrics

    def finish(state, _rng):
        arrays = {key: a for key, a in state.items() if key not in ("done", "model")}
        n = len(arrays["ais"])
        scalars = {"images": len(arrays["shape_encoder"]), "ais_images": n}
        for name in ("encoder", "half", "prior"):
            for m, value in zip(sizes, np.mean(arrays[f"bounds_{name}"], axis=0)):
                scalars[f"bound_{name}_{m}"] = value
        return scalars, arrays

    return Parts(state, step, None, finish)


# Generative and discriminative classification


def fit_class_conditional(config, images, labels, rng):
    """A class-conditional VAE fitted to rows of zeros and ones with labels.

    The weights of its decoder have a standard normal prior, as those of logistic regression.
    """
    params = class_conditional_init(rng, images.shape[1], 10, config["hidden"], config["latents"])
    optimizer = adam(config["learning_rate"])
    inner = optimizer.init(params)

    def negative(params, x, y, noise):
        layers = [*params["decoder"]["hidden"], params["decoder"]["logits"]]
        log_prior = -0.5 * sum(np.sum(layer["w"] ** 2) for layer in layers)
        return -np.mean(class_conditional_log_weights(params, x, y, noise)) - log_prior / n

    n = len(images)
    for _ in range(config["vae_steps"]):
        rows = rng.integers(n, size=config["batch"])
        noise = random.normal(rng, (1, len(rows), config["latents"]), images.dtype)
        classes = np.eye(10, dtype=images.dtype)[labels[rows]]
        grads = grad(negative)(params, images[rows], classes, noise)
        params, inner = optimizer.update(grads, inner, params)
    return params


def class_evidences(params, x, rng, samples, latents):
    """Estimates of log p(x | y) for all ten classes: (B, 10)."""
    columns = []
    for label in range(10):
        y = np.broadcast_to(np.eye(10, dtype=x.dtype)[label], (len(x), 10))
        noise = random.normal(rng, (samples, len(x), latents), x.dtype)
        columns.append(iwae_bound(class_conditional_log_weights(params, x, y, noise)))
    return np.stack(columns, axis=1)


def labels(config, data, _rng):
    """Two generative classifiers and logistic regression, over the number of labels."""
    x_train, x_test = (
        (flat(images) > 0.5).astype(np.float32) for images in (data.x_train, data.x_test)
    )
    cells = [(n, seed) for seed in range(config["models"]) for n in config["labels"]]
    cells = a_step_each(config["steps"], cells)
    state = {"done": np.zeros((), np.int64)}
    state |= {f"{part}_{name}": np.zeros(0) for part in ("error", "nll") for name in CLASSIFIERS}

    def step(state, rng):
        n, seed = cells[int(state["done"])]
        order = np.random.default_rng(seed).permutation(len(x_train))
        firsts = [order[data.y_train[order] == label][: max(1, n // 10)] for label in range(10)]
        rows = np.concatenate(firsts)
        x, y = x_train[rows], data.y_train[rows]
        log_prior = np.full(10, -np.log(10))
        regression = logistic_regression(x, y, 10)
        params = fit_class_conditional(config, x, y, rng)
        found = {
            "naive_bayes": total_log_prob(naive_bayes(x, y, 10), x_test[:, None]),
            "vae": class_evidences(params, x_test, rng, config["samples"], config["latents"]),
            "logistic": dense(regression, x_test.astype(np.float64)),
        }
        new = {"done": state["done"] + 1}
        for name, scores in found.items():
            log_p = class_log_probs(scores, log_prior)
            error = np.mean(np.argmax(log_p, axis=1) != data.y_test)
            nll = -np.mean(log_p[np.arange(len(log_p)), data.y_test], dtype=np.float64)
            new[f"error_{name}"] = np.append(state[f"error_{name}"], error)
            new[f"nll_{name}"] = np.append(state[f"nll_{name}"], nll)
        return new, {}

    def finish(state, _rng):
        shape = config["models"], len(config["labels"])
        return {}, {key: v.reshape(shape) for key, v in state.items() if key != "done"}

    return Parts(state, step, None, finish)


CLASSIFIERS = ["naive_bayes", "vae", "logistic"]
RUNS = {
    "tighter": Run(
        tighter,
        {"steps": 5000, "batch": 20, "eval_every": 500, "log_every": 500}
        | {"hidden": [100], "latents": 20, "samples": [1, 5, 50], "models": 5}
        | {"learning_rate": 1e-3, "decay_steps": 5000}
        | {"evaluation_samples": 50, "final_samples": 1000},
        {
            "digits": {},
            "mnist": {"steps": 50_000, "eval_every": 10_000, "decay_steps": 50_000, "models": 1}
            | {"hidden": [200, 200], "latents": 50, "evaluation_samples": 50},
        },
    ),
    "evidence": Run(
        evidence,
        {"steps": 30, "log_every": 1, "batch": 10, "samples": 1000, "ais_images": 50}
        | {"chains": 10, "temperatures": 200, "leapfrog_step": 0.3, "leaps": 4},
        {
            "digits": {},
            "binarized_mnist": {"steps": 100, "leapfrog_step": 0.1},
        },
        continues=False,  # `steps` chooses the images
    ),
    "labels": Run(
        labels,
        {"steps": 30, "log_every": 1, "labels": [10, 20, 50, 100, 300, 1000], "models": 5}
        | {"hidden": [100], "latents": 8, "samples": 100, "vae_steps": 1500, "batch": 50}
        | {"learning_rate": 2e-3},
        {"digits": {}},
        continues=False,
    ),
}
