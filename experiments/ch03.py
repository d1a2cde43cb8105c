"""The run of chapter 3: Bernoulli VAEs trained with the score function and four baselines.

Images are flat rows. Likelihoods are in nats per image. The grey images of `digits` are binarised
by a fresh draw for every training batch, and once, with a fixed seed, for evaluation;
`binarized_mnist` is Larochelle's fixed binarisation. Batches are drawn with replacement. Every
method draws two samples for each image.
"""

import numpy as np
from scipy.special import expit

from chapters.ch03_score_function import (
    bernoulli_draws,
    bernoulli_vae_init,
    decode,
    encode,
    generate,
    leave_one_out_signal,
    mean_elbo,
    no_baseline,
    nvil,
    nvil_init,
    running_mean,
    running_mean_init,
    score_estimates,
    training_step,
    vae_gradient,
)
from experiments.runner import Parts, Run
from minigrad.data import binarize
from minigrad.optim import adam

METHODS = {
    "score_function": no_baseline,
    "baseline": running_mean,
    "nvil": nvil,
    "leave_one_out": leave_one_out_signal,
}
REPLICAS = 32


def flat(images):
    """Images (N, 1, H, W) as rows (N, H W)."""
    return images.reshape(len(images), -1)


def bytes_of(means):
    """Pixel means in [0, 1] as bytes."""
    return np.rint(255 * np.asarray(means)).astype(np.uint8)


def start(config, method, n_pixels, rng):
    """The state of one model, and its optimiser."""
    widths = [n_pixels, *config["latents"]]
    params = bernoulli_vae_init(rng, widths, config["hidden"], config["hidden"])
    optimizer = adam(config["learning_rate"])
    baseline = {"baseline": running_mean_init, "nvil": lambda: nvil_init(rng, n_pixels)}
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "baseline": baseline.get(method, dict)(),
    }
    return state, optimizer


def gradient_variances(state, x, mean, rng):
    """Variance of one logit's gradient, two samples an image, by method: all at the same model.

    `state` is that of the model trained with `nvil`. Averaged over images `x` (B, D) and latents.
    """
    states = {"baseline": state["baseline"]["level"], "nvil": state["baseline"]}
    estimates = {name: [] for name in METHODS}

    def estimate(f, logits, bits):
        for name, baseline in METHODS.items():
            signal, _ = baseline(states.get(name, {}), x - mean, f)
            estimates[name].append(np.mean(score_estimates(signal, logits, bits)[0], axis=0))
        return [np.zeros_like(a) for a in logits], None

    for _ in range(REPLICAS):
        vae_gradient(state["params"], x, mean, bernoulli_draws(rng), estimate, k=2)
    return {
        f"variance_{name}": np.mean(np.var(found, axis=0, ddof=1), dtype=np.float64)
        for name, found in estimates.items()
    }


def pictures(params, x, mean, rng):
    """Prior samples (64), and some images with their reconstructions (10), as bytes: a dict."""
    rows = np.linspace(0, len(x) - 1, 10).astype(int)
    _, codes = encode(params["encoder"], x[rows] - mean, bernoulli_draws(rng))
    return {
        "samples": bytes_of(generate(params["decoder"], mean, rng, 64)),
        "originals": bytes_of(x[rows]),
        "reconstructions": bytes_of(expit(decode(params["decoder"], codes, mean)[0][0])),
    }


def score_function_vae(config, data, rng):
    """Bernoulli VAEs trained with the score function: no baseline, running mean, NVIL, others."""
    images = flat(data.x_train)
    mean = images.mean(0)
    fixed = np.random.default_rng(20140621)
    test = binarize(flat(data.x_test), fixed)
    train = binarize(images[: len(test)], fixed)
    names = [(method, seed) for method in METHODS for seed in range(config["models"])]
    states, steps = [], []
    for method, _ in names:
        state, optimizer = start(config, method, images.shape[1], rng)
        states.append(state)
        steps.append(training_step(images, mean, optimizer, config["batch"], METHODS[method], k=2))

    def step(states, rng):
        return [f(state, rng)[0] for f, state in zip(steps, states)], {}

    def evaluate(states, rng):
        scalars = {}
        for (method, seed), state in zip(names, states):
            for part, x in {"train": train, "test": test}.items():
                value = mean_elbo(state["params"], x, mean, rng, config["evaluation_samples"])
                scalars[f"{part}_elbo_{method}_{seed}"] = value
        x = test[:: max(1, len(test) // 100)]
        return scalars | gradient_variances(states[names.index(("nvil", 0))], x, mean, rng)

    def finish(states, rng):
        params = states[names.index(("leave_one_out", 0))]["params"]
        return {}, pictures(params, test, mean, rng)

    return Parts(states, step, evaluate, finish)


RUNS = {
    "score_function_vae": Run(
        score_function_vae,
        {"steps": 2000, "batch": 24, "eval_every": 200, "log_every": 1000}
        | {"latents": [32], "hidden": [], "learning_rate": 3e-3}
        | {"models": 5, "evaluation_samples": 20},
        {
            "digits": {},
            "binarized_mnist": {"steps": 20_000, "eval_every": 1000, "latents": [200]}
            | {"learning_rate": 1e-3, "models": 1, "evaluation_samples": 1},
        },
    ),
}
