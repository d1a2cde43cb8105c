"""The runs of chapter 8: the toy problem, and Bernoulli VAEs by the five methods of the table.

Images are flat rows. Likelihoods are in nats per image. The grey images of `digits` are binarised
by a fresh draw for every training batch, and once, with a fixed seed, for evaluation;
`binarized_mnist` is Larochelle's fixed binarisation. Batches are drawn with replacement.
"""

import numpy as np

from chapters.ch03_score_function import MODELS, bernoulli_vae_init, mean_elbo
from chapters.ch08_control_variates import (
    METHODS,
    TOY,
    make_method,
    toy_control,
    toy_control_init,
    toy_step,
    toy_variance,
    training_step,
)
from experiments.runner import Parts, Run, one_of
from minigrad import tree
from minigrad.data import binarize
from minigrad.optim import adam, piecewise_constant

# ------------------------------------------------------------------------------- the toy problem

MARKS = (0, 300, 1000, 3000, 10_000)  # steps at which RELAX's control variate is kept
GRID = np.linspace(-6, 6, 61)


def toy_control_variates(config, _data, rng):
    """The toy problem E[(b - t)^2]: many trainings by the score function, REBAR and RELAX."""
    R, t = config["replicas"], config["target"]
    f = lambda b: (b[..., 0] - t) ** 2
    optimizer = adam(config["learning_rate"])
    step_of_one = toy_step(f, optimizer)
    states = {}
    for name in TOY:
        logits, control = np.zeros((R, 1, 1)), toy_control_init(name, rng, R)
        states[name] = {"logits": logits, "optimizer": optimizer.init(logits)}
        states[name] |= {"control": control, "control_optimizer": optimizer.init(control)}

    def learned(state):
        control = tree.map(lambda p: p[:1], state["control"])
        return toy_control(control, f, GRID[:, None, None, None])[:, 0, 0]

    def step(state, rng):
        trainings = {name: step_of_one(state["trainings"][name], rng)[0] for name in TOY}
        taken, history = int(trainings["relax"]["optimizer"]["step"]), state["history"]
        if taken in MARKS:
            history = history.copy()
            history[MARKS.index(taken)] = learned(trainings["relax"])
        return {"trainings": trainings, "history": history}, {}

    def evaluate(state, _rng):
        scalars = {}
        for name, training in state["trainings"].items():
            probs = 1 / (1 + np.exp(-training["logits"][:, 0, 0]))
            loss = probs * (1 - t) ** 2 + (1 - probs) * t**2
            variance = toy_variance(f, training["logits"], training["control"])
            scalars[f"loss_{name}"] = np.mean(loss)
            scalars[f"variance_{name}"] = np.median(variance)
            for q in (10, 90):
                scalars[f"loss_{name}_{q}"] = np.percentile(loss, q)
                scalars[f"variance_{name}_{q}"] = np.percentile(variance, q)
        return scalars

    def finish(state, _rng):
        return {}, {"marks": np.array(MARKS), "grid": GRID, "control": state["history"]}

    history = np.zeros((len(MARKS), len(GRID)))
    history[0] = learned(states["relax"])
    return Parts({"trainings": states, "history": history}, step, evaluate, finish)


# ------------------------------------------------------------------------------- autoencoders


def flat(images):
    """Images (N, 1, H, W) as rows (N, H W)."""
    return images.reshape(len(images), -1)


def model_arguments(config, n_pixels):
    """Arguments of `bernoulli_vae_init` for the model: as published, or scaled to `latents`."""
    model, d = MODELS[config["model"]], config["latents"]
    arguments = {"widths": [n_pixels, *[d] * (len(model["widths"]) - 1)]}
    for name in ("encoder_hidden", "decoder_hidden"):
        # Hidden layers have 200 units, or 784: as many as latents, or in that proportion.
        arguments[name] = [d * width // 200 for width in model.get(name, ())]
    return arguments


def start(config, name, n_pixels, rng):
    """The initial state of a training by the method `name`, the method and the optimiser."""
    arguments = model_arguments(config, n_pixels)
    rate, pretraining = config["learning_rate"], config["pretraining"]
    if pretraining and name == "relax":  # at first the control variates alone
        rate = piecewise_constant([pretraining], [0.0, rate])
    optimizer = adam(rate, b2=0.99999)
    control_optimizer = adam(config["control_rate"] * config["learning_rate"], b2=0.99999)
    hidden = [config["control_width"]] * config["control_depth"]
    method, control = make_method(
        name, rng, arguments["widths"], control_optimizer, hidden, config["temperature"]
    )
    params = bernoulli_vae_init(rng, **arguments)
    return {"params": params, "optimizer": optimizer.init(params), "control": control}, (
        method,
        optimizer,
    )


def bernoulli_vae(config, data, rng):
    """Bernoulli VAEs trained by one method of the table, or by all five, some models of each."""
    images = flat(data.x_train)
    mean = images.mean(0)
    fixed = np.random.default_rng(20180430)
    test = binarize(flat(data.x_test), fixed)
    train = binarize(images[: len(test)], fixed)
    one_of(config, "model", MODELS)
    method = one_of(config, "method", ["all", *METHODS])
    methods = METHODS if method == "all" else [method]
    names = [(name, seed) for name in methods for seed in range(config["models"])]
    states, steps = [], []
    for name, _ in names:
        state, (method, optimizer) = start(config, name, images.shape[1], rng)
        states.append(state)
        steps.append(training_step(images, mean, optimizer, config["batch"], method))

    def step(states, rng):
        results = [f(state, rng) for f, state in zip(steps, states)]
        metrics = {f"elbo_{n}_{seed}": m["elbo"] for (n, seed), (_, m) in zip(names, results)}
        return [state for state, _ in results], metrics

    def evaluate(states, rng):
        scalars = {}
        for (name, seed), state in zip(names, states):
            for part, x in {"train": train, "test": test}.items():
                value = mean_elbo(state["params"], x, mean, rng, config["evaluation_samples"])
                scalars[f"{part}_elbo_{name}_{seed}"] = value
        return scalars

    return Parts(states, step, evaluate)


def gradient_variance(config, data, rng):
    """Variance of the encoder's gradient by method, all at one model on its way."""
    one_of(config, "model", MODELS)
    one_of(config, "follow", METHODS)
    images = flat(data.x_train)
    mean = images.mean(0)
    started = {name: start(config, name, images.shape[1], rng) for name in METHODS}
    methods = {name: method for name, (_, (method, _)) in started.items()}
    state, (_, optimizer) = started["nvil"]
    controls = {name: one["control"] for name, (one, _) in started.items()}
    state = {key: state[key] for key in ("params", "optimizer")} | {"controls": controls}
    fixed = binarize(images[:: len(images) // 100][:100], np.random.default_rng(20180430))

    def step(state, rng):
        x = binarize(images[rng.integers(len(images), size=config["batch"])], rng)
        controls = {}
        for name, method in methods.items():
            f, ascent, controls[name] = method(
                state["params"], state["controls"][name], x, mean, rng
            )
            if name == config["follow"]:
                descent, elbo = tree.map(np.negative, ascent), np.mean(f)
        params, inner = optimizer.update(descent, state["optimizer"], state["params"])
        return {"params": params, "optimizer": inner, "controls": controls}, {"elbo": elbo}

    def evaluate(state, rng):
        scalars = {}
        for name, method in methods.items():
            found = []
            for _ in range(config["replicas"]):
                control = state["controls"][name]
                ascent = method(state["params"], control, fixed, mean, rng)[1]
                found.append([layers[-1]["w"] for layers in ascent["encoder"]])
            for l in range(len(found[0])):
                over = np.var([gradients[l] for gradients in found], axis=0, ddof=1)
                scalars[f"variance_{name}_{l + 1}"] = np.mean(over, dtype=np.float64)
        return scalars

    return Parts(state, step, evaluate)


VAE = {"batch": 24, "model": "linear_1", "latents": 32, "learning_rate": 3e-3}
VAE |= {"control_rate": 1.0, "control_width": 32, "control_depth": 2, "temperature": 0.5}
VAE |= {"pretraining": 0}
DIGITS = VAE | {"steps": 1000, "eval_every": 100, "log_every": 100}
MNIST = {"steps": 20_000, "eval_every": 1000, "log_every": 500, "latents": 200}
MNIST |= {"learning_rate": 1e-3, "control_rate": 10.0, "control_width": 200}

RUNS = {
    "toy_control_variates": Run(
        toy_control_variates,
        {"steps": 10_000, "eval_every": 100, "log_every": 10_000, "replicas": 100}
        | {"target": 0.499, "learning_rate": 0.01},
    ),
    "gradient_variance": Run(
        gradient_variance,
        DIGITS | {"replicas": 32, "follow": "nvil"},
        {"digits": {}, "binarized_mnist": MNIST | {"eval_every": 2000}},
    ),
} | {
    f"bernoulli_vae_{model}": Run(
        bernoulli_vae,
        DIGITS | {"model": model, "method": "all", "models": 5, "evaluation_samples": 20},
        {"digits": {}, "binarized_mnist": MNIST | {"models": 1, "evaluation_samples": 1}},
    )
    for model in MODELS
}
