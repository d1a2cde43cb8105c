"""The runs of chapter 9: every estimator on every problem, its bias, noise, cost and time.

The VAEs are trained on `digits`, bits drawn anew for every batch, by leave-one-out. They stop half
way, where there is a gradient left to estimate. Seconds are the one thing here that differs when a
run is repeated.
"""

import time

import numpy as np

from chapters.ch03_score_function import bernoulli_vae_init, network, replicate
from chapters.ch07_concrete import concrete, gumbel_rao, gumbel_straight_through
from chapters.ch08_control_variates import control_variate_init, lax, training_step
from chapters.ch09_atlas import (
    CLOSED,
    LABEL,
    METHODS,
    Problem,
    atlas,
    closed_problem,
    costs,
    double_control_variate,
    elbo_of_bits,
    gradient_of_all_bits,
    quality,
    rebar_control,
    relax_control,
    relax_in_one_pass,
)
from experiments.ch08 import flat
from experiments.runner import Parts, Run, a_step_each
from minigrad import grad, random, tree
from minigrad.data import binarize
from minigrad.optim import adam

TEMPERATURES = np.array([0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0])


def many(problem, estimator, options, rng, S):
    """Estimates (S, B, D), made in portions that fit into a cache."""
    portion = max(1, 4000 // len(problem.logits))
    sizes = [min(portion, S - start) for start in range(0, S, portion)]
    return np.concatenate(
        [estimator(problem.f, replicate(problem.logits, n), rng, **options) for n in sizes]
    )


# ------------------------------------------------------------------------------------- tuning


def best_scale(problem, estimator, options, rng, S):
    """The scale, in which estimates are linear, of least total variance, and that variance."""
    seed = int(rng.integers(2**32))
    off, on = (
        many(problem, estimator, options(scale), np.random.default_rng(seed), S)
        for scale in (0.0, 1.0)
    )
    off, change = off - off.mean(0), on - off - (on - off).mean(0)
    scale = -np.sum(off * change) / np.sum(change * change)
    return scale, np.sum((off + scale * change) ** 2) / S


def train_control(problem, temperature, scale, rng, steps, width):
    """RELAX's control variate, from REBAR's, by gradients through gradients."""
    sizes = [problem.inputs[0].shape[-1], problem.logits.shape[-1]]
    params = control_variate_init(rng, sizes, (width, width), temperature)
    params = tree.map(lambda p: np.asarray(p, np.float64), params)
    params["scale"] = np.array([scale])
    params["networks"][0]["layers"][-1]["w"] *= 0  # the network's answer is 0 at first
    optimizer = adam(3e-3)
    state, logits = optimizer.init(params), replicate(problem.logits, 16)

    def second_moment(params):
        control = relax_control(problem.f, params, problem.inputs)
        G = relax_in_one_pass(problem.f, logits, rng, control=control)
        return np.mean(np.sum(G * G, axis=(1, 2)))

    for _ in range(steps):
        gradient = grad(second_moment)(params)
        params, state = optimizer.update(gradient, state, params)
    return params


def tune(problem, rng, config):
    """What `atlas` must be told, from samples of its own."""
    S, f = config["pilot"], problem.f
    b = random.bernoulli(rng, problem.logits, 4 * S)
    tuned = {"level": np.mean(f(b), axis=0)}
    found = []
    for t in TEMPERATURES:
        options = lambda scale, t=t: {"control": rebar_control(f, t, scale)}
        scale, variance = best_scale(problem, relax_in_one_pass, options, rng, S)
        found.append((variance, t, scale))
    _, tuned["temperature"], tuned["rebar"] = min(found)
    options = lambda scale: {"control": rebar_control(f, tuned["temperature"], scale)}
    tuned["lax"], _ = best_scale(problem, lax, options, rng, S)
    options = lambda scale: {"k": 2, "scale": scale}
    tuned["double"], _ = best_scale(problem, double_control_variate, options, rng, S)
    tuned["relax"] = train_control(
        problem, tuned["temperature"], tuned["rebar"], rng, config["control_steps"], 50
    )
    return tuned


# ---------------------------------------------------------------------------------- measuring


def measure(problem, tuned, rng, S):
    """Of each estimator: bias, its error, variance, cost, and the largest |z| of its mean."""
    scalars = {}
    for name, (values, derivatives) in costs(problem, tuned).items():
        estimator, options = atlas(problem.f, problem.inputs, tuned)[name]
        G = many(problem, estimator, options, rng, S)
        bias, error, variance = quality(G, problem.exact)
        truth = np.sqrt(np.sum(problem.error**2) / np.sum(problem.exact**2))
        bias = np.sqrt(max(bias**2 - truth**2, 0))
        deviation = np.sqrt(np.var(G, axis=0, ddof=1) / S + problem.error**2)
        off = np.abs(np.mean(G, axis=0) - problem.exact)
        floor = 1e-9 * np.max(np.abs(problem.exact))  # where nothing varies
        scalars |= {
            f"bias_{name}": bias,
            f"bias_error_{name}": np.hypot(error, truth),
            f"noise_{name}": (values + derivatives) * variance,
            f"cost_{name}": values + derivatives,
            f"z_{name}": np.max(off / (deviation + floor)),
        }
    return scalars


def long_average(problem, tuned, rng, S):
    """The problem with a gradient known by an average of RELAX, and its standard error."""
    estimator, options = atlas(problem.f, problem.inputs, tuned)["relax"]
    sums = 0.0
    for _ in range(S // 1000):
        G = many(problem, estimator, options, rng, 1000)
        sums = sums + np.stack([np.sum(G, axis=0), np.sum(G * G, axis=0)])
    mean, square = sums / S
    return problem._replace(exact=mean, error=np.sqrt((square - mean**2) / (S - 1)))


def seconds(problem, tuned, rng, rounds=40):
    """Shortest processor time of one estimate for all data, by name, in alternating rounds."""
    estimators = atlas(problem.f, problem.inputs, tuned)
    found = {f"seconds_{name}": np.inf for name in estimators}
    for _ in range(rounds):
        for name, (estimator, options) in estimators.items():
            start = time.process_time()
            estimator(problem.f, problem.logits[None], rng, **options)
            taken = time.process_time() - start
            found[f"seconds_{name}"] = min(found[f"seconds_{name}"], taken)
    return found


def over_temperatures(problem, rng, S):
    """Bias and noise of the relaxed estimators, and noise of REBAR at its best scale."""
    rows = []
    for t in TEMPERATURES:
        row = []
        for estimator in (concrete, gumbel_straight_through, gumbel_rao):
            G = many(problem, estimator, {"temperature": t}, rng, S)
            bias, _, variance = quality(G, problem.exact)
            row += [bias, 2 * variance]
        options = lambda scale, t=t: {"control": rebar_control(problem.f, t, scale)}
        _, variance = best_scale(problem, relax_in_one_pass, options, rng, S)
        rows.append([*row, 3 * variance / np.sum(problem.exact**2)])
    return np.array(rows)


# --------------------------------------------------------------------------------------- runs


def vae_problem(params, x, mean):
    """The ELBO of bits at the encoder's logits for images x (B, D), in float64; not yet a truth."""
    params = tree.map(lambda p: np.asarray(p, np.float64), params)
    x, mean = np.asarray(x, np.float64), np.asarray(mean, np.float64)
    logits = network(params["encoder"][0], x - mean)
    f = elbo_of_bits(params["decoder"], logits, x, mean)
    return Problem(f, logits, None, None, (x - mean,))


def estimator_atlas(config, data, rng):
    """All estimators on VAEs with 10 and 200 bits, and on functions with known gradients."""
    images = flat(data.x_train)
    mean, d = images.mean(0), config["latents"]
    models = {
        "vae_few": {"widths": [64, config["few"]]},
        "vae_linear": {"widths": [64, d]},
        "vae_nonlinear": {"widths": [64, d], "encoder_hidden": [d, d], "decoder_hidden": [d, d]},
    }
    optimizer = adam(config["learning_rate"])
    one = training_step(images, mean, optimizer, config["batch"], METHODS["leave_one_out"])
    states = {}
    for name, arguments in models.items():
        params = bernoulli_vae_init(rng, **arguments)
        states[name] = {"params": params, "optimizer": optimizer.init(params), "control": {}}

    def step(states, rng):
        taken = {name: one(state, rng) for name, state in states.items()}
        metrics = {f"elbo_{name}": metric["elbo"] for name, (_, metric) in taken.items()}
        return {name: state for name, (state, _) in taken.items()}, metrics

    def finish(states, rng):
        S, scalars, arrays = config["replicas"], {}, {}
        fixed = np.random.default_rng(20180430)
        x = binarize(images[fixed.permutation(len(images))[: config["images"]]], fixed)
        problems = {f"{name}_few": closed_problem(name, config["few"]) for name in CLOSED}
        problems |= {f"{name}_many": closed_problem(name, d) for name in CLOSED}
        problems |= {name: vae_problem(state["params"], x, mean) for name, state in states.items()}
        for name, problem in problems.items():
            tuned = tune(problem, rng, config)
            if name == "vae_few":
                exact = gradient_of_all_bits(problem.f, problem.logits)
                problem = problem._replace(exact=exact, error=0 * exact)
                arrays["temperatures"] = TEMPERATURES
                arrays["over_temperatures"] = over_temperatures(problem, rng, S)
            elif problem.exact is None:
                problem = long_average(problem, tuned, rng, config["long"])
            found = measure(problem, tuned, rng, S)
            if name == "vae_nonlinear":
                batch = vae_problem(states[name]["params"], np.tile(x, (10, 1)), mean)
                found |= seconds(batch, tuned | {"level": np.tile(tuned["level"], 10)}, rng)
            scalars |= {f"{key}_{name}": value for key, value in found.items()}
            for key in ("temperature", "rebar", "lax", "double"):
                scalars[f"tuned_{key}_{name}"] = tuned[key]
        return scalars, arrays

    return Parts(states, step, None, finish)


def estimator_bits(config, _data, _rng):
    """Noise of all estimators on functions with known gradients, from 1 bit to 200."""
    cells = a_step_each(config["steps"], [(name, D) for name in CLOSED for D in config["bits"]])

    def step(state, rng):
        name, D = cells[state["done"]]
        problem = closed_problem(name, D)
        tuned = tune(problem, rng, config)
        found = measure(problem, tuned, rng, config["replicas"])
        noise = state["noise"].copy()
        noise[state["done"]] = [found[f"noise_{key}"] for key in LABEL]
        return {"done": state["done"] + 1, "noise": noise}, {}

    def finish(state, _rng):
        shape = (len(CLOSED), len(config["bits"]), -1)
        return {}, {"bits": np.array(config["bits"]), "noise": state["noise"].reshape(shape)}

    return Parts({"done": 0, "noise": np.zeros((len(cells), len(LABEL)))}, step, None, finish)


MEASURED = {"replicas": 2000, "pilot": 500, "control_steps": 300}

RUNS = {
    "estimator_atlas": Run(
        estimator_atlas,
        MEASURED
        | {"steps": 300, "batch": 50, "learning_rate": 3e-3, "latents": 200, "few": 10}
        | {"images": 5, "long": 100_000, "eval_every": 300},
        {"digits": {}},
    ),
    "estimator_bits": Run(
        estimator_bits,
        MEASURED | {"steps": 16, "bits": [1, 2, 5, 10, 20, 50, 100, 200], "eval_every": 16},
        continues=False,
    ),
}
