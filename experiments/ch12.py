"""The runs of chapter 12: semi-implicit posteriors of the red mites, of toys and of regressions.

Divergences and log-likelihoods are in nats. What a law is like is computed on a grid where there is
one, and else from 20,000 draws of it.
"""

import math

import numpy as np
from scipy.special import expit, logsumexp
from scipy.stats import ks_2samp

from chapters.ch12_sivi import (
    AXES,
    CELL,
    COUNTS,
    TARGETS,
    counts_log_joint,
    counts_posterior,
    describe,
    divergence_on_grid,
    draw_noise,
    entropy,
    fit_normal,
    hmc,
    ks_distances,
    log_mixture,
    mixture_table,
    moved,
    own_left_out,
    regression_log_joint,
    safe_log,
    sample,
    sivi_init,
    sivi_step,
    surrogate,
)
from experiments.runner import Parts, Run, chosen
from minigrad import tree
from minigrad.optim import adam, exponential_decay

KERNELS = 10_000  # draws of ψ in a tabulated density


def side_by_side(models):
    """States, and the step that trains all `models`: a dict of name to (state, step)."""
    steps = [step for _, step in models.values()]

    def step(states, rng):
        taken = [f(state, rng) for f, state in zip(steps, states)]
        metrics = {f"loss_{name}": m["loss"] for name, (_, m) in zip(models, taken)}
        return [state for state, _ in taken], metrics

    return [state for state, _ in models.values()], step


def spreads(fixed, states, names, rng):
    """Standard deviation of ψ in each model, averaged over its coordinates: a dict of scalars."""
    return {
        f"spread_{name}": np.mean(np.std(sample(fixed | state["params"], rng, 2000)[0], axis=0))
        for name, state in zip(names, states)
    }


def optimizer_of(config):
    """Adam with the decay that the authors' program uses."""
    return adam(exponential_decay(config["learning_rate"], config["decay"], 100))


# ---------------------------------------------------------------------------------- the red mites


def measured_law(params, posterior, rng):
    """What is reported of a fitted law: a dict of numbers, and 1,000 of its ψ."""
    psi, _ = sample(params, rng, KERNELS)
    log_scale = np.asarray(params["log_scale"], np.float64)
    table = mixture_table(psi, log_scale, AXES)
    # the integral of q(z | ψ)² is that of a kernel of scale σ/√2, up to a factor
    squares = mixture_table(psi, log_scale - 0.5 * math.log(2), AXES)
    squares = squares / (4 * math.pi * np.exp(np.sum(log_scale)))
    kernel_entropy = np.sum(log_scale) + 1 + math.log(2 * math.pi)
    ks_r, ks_p = ks_distances(table, posterior)
    numbers = {
        "divergence": CELL * np.sum(table * (safe_log(table) - safe_log(posterior))),
        "information": entropy(table.ravel(), CELL) - kernel_entropy,
        "chi_squared": CELL * np.sum(squares / np.maximum(table, 1e-300)) - 1,
        "ks_r": ks_r,
        "ks_p": ks_p,
        "scale_r": np.exp(log_scale[0]),
        "scale_p": np.exp(log_scale[1]),
        **describe(table),
    }
    return numbers, psi[:1000].astype(np.float32)


def sivi_counts(config, data, rng):
    """Negative binomial model of the red mites: semi-implicit posteriors for a range of K."""
    assert np.array_equal(data, COUNTS)
    models, starts = {}, []
    for kind, Ks in {"fixed": config["extra"], "learned": config["extra_learned"]}.items():
        for K in Ks:
            for seed in range(config["models"]):
                params = sivi_init(rng, config["widths"], math.log(config["scale"]))
                starts.append(params)
                models[f"{kind}_{K}_{seed}"] = sivi_step(
                    counts_log_joint,
                    params,
                    optimizer_of(config),
                    config["samples"],
                    K,
                    learn_scale=kind == "learned",
                )
    states, step = side_by_side(models)
    fixed = {"log_scale": starts[0]["log_scale"]}

    def evaluate(states, rng):
        return spreads(fixed, states, models, rng)

    def finish(states, rng):
        posterior, _ = counts_posterior()
        found, arrays = {}, {}
        for name, state in zip(models, states):
            numbers, psi = measured_law(fixed | state["params"], posterior, rng)
            found[name] = numbers
            if name.endswith("_0"):
                arrays[f"psi_{name[:-2]}"] = psi
        for kind, Ks in {"fixed": config["extra"], "learned": config["extra_learned"]}.items():
            for key in numbers:  # (models, K)
                arrays[f"{kind}_{key}"] = np.array(
                    [[found[f"{kind}_{K}_{s}"][key] for K in Ks] for s in range(config["models"])]
                )
        return {}, arrays

    return Parts(states, step, evaluate, finish)


# ----------------------------------------------------------------------------- targets with a shape


def sivi_targets(config, _data, rng):
    """Laplace, mixture, banana and X: semi-implicit laws fitted to known densities."""
    models, starts = {}, []
    for name, (log_p, axes) in TARGETS.items():
        for seed in range(config["models"]):
            widths = [*config["widths"], len(axes)]
            params = sivi_init(rng, widths, math.log(config["scale"]))
            starts.append({"log_scale": params["log_scale"]})
            S, K = config["samples"], config["extra"]
            models[f"{name}_{seed}"] = sivi_step(log_p, params, optimizer_of(config), S, K)
    states, step = side_by_side(models)

    def finish(states, rng):
        scalars, arrays = {}, {}
        for full, fixed, state in zip(models, starts, states):
            name, seed = full.rsplit("_", 1)
            log_p, axes = TARGETS[name]
            params = fixed | state["params"]
            psi, _ = sample(params, rng, 2 * KERNELS)
            table = mixture_table(psi, np.asarray(params["log_scale"], np.float64), axes)
            scalars[f"divergence_{full}"] = divergence_on_grid(table, log_p, axes)
            if seed == "0":
                arrays[name] = table.astype(np.float32)
        return scalars, arrays

    return Parts(states, step, finish=finish)


# ------------------------------------------------------------------------------ logistic regression


def sandwich(log_joint, params, rng, batches, S=50, K=5000):
    """Estimates of the surrogate and of the upper bound with K extra samples, and their errors."""
    params = tree.map(lambda a: np.asarray(a, np.float64), params)
    found = []
    for _ in range(batches):
        noise = draw_noise(rng, params, S, K)
        found.append(
            [surrogate(log_joint, params, noise, how) for how in (log_mixture, own_left_out)]
        )
    error = np.std(found, axis=0, ddof=1) / math.sqrt(batches)
    return np.mean(found, axis=0), error


def log_evidence_by_importance(log_joint, draws, rng, S=200_000, widen=1.15):
    """Log-evidence with its standard error, by a normal proposal wider than the posterior."""
    D = draws.shape[1]
    loc, L = draws.mean(0), widen * np.linalg.cholesky(np.cov(draws.T))
    u = rng.standard_normal((S, D))
    log_q = -0.5 * np.sum(u**2, axis=1) - 0.5 * D * math.log(2 * math.pi)
    log_q -= np.sum(np.log(np.diagonal(L)))
    at = loc + u @ L.T
    log_w = np.concatenate([log_joint(part) for part in np.split(at, 20)]) - log_q
    log_mean = logsumexp(log_w) - math.log(S)
    return log_mean, np.std(np.exp(log_w - log_mean)) / math.sqrt(S)


def sivi_regression(config, data, rng):
    """Bayesian logistic regression: semi-implicit and normal posteriors against a long chain."""
    X, y = data.x_train.astype(np.float64), data.y_train.astype(np.float64)
    loc, L, full_elbo = fit_normal(X, y, full=True)
    diagonal_loc, diagonal_L, diagonal_elbo = fit_normal(X, y, full=False)
    D = len(loc)
    target = moved(regression_log_joint(X, y), loc, L)
    single = [a.astype(np.float32) for a in (X, y, loc, L)]
    params = sivi_init(rng, [*config["widths"], D], math.log(config["scale"]))
    state, step = sivi_step(
        moved(regression_log_joint(*single[:2]), *single[2:]),
        params,
        optimizer_of(config),
        config["samples"],
        config["extra"],
        learn_scale=True,
    )

    def finish(state, rng):
        chains, keep = config["chains"], config["keep"]
        draws, accepted = hmc(target, rng.standard_normal((chains, D)), rng, 200 + keep)
        within = draws[200:]
        chain = within.reshape(-1, D)
        psi, v = sample(state["params"], rng, 20_000)
        (lower, upper), errors = sandwich(target, state["params"], rng, config["batches"])
        log_evidence, error = log_evidence_by_importance(target, chain, rng)
        laws = {
            "chain": loc + chain @ L.T,
            "semi_implicit": loc + v @ L.T,
            "normal": loc + rng.standard_normal((20_000, D)) @ L.T,
            "mean_field": diagonal_loc + rng.standard_normal((20_000, D)) @ diagonal_L.T,
        }
        arrays = {
            "effective_draws": chains * chain.var(0) / within.mean(0).var(0),
            "scale": np.exp(state["params"]["log_scale"]),
            "spread": psi.std(0),
            "edges": np.histogram_bin_edges(laws["chain"][:, 0], 50),
        }
        rows = data.x_test[chosen(len(data.x_test), config["tested"])].astype(np.float64)
        for name, beta in laws.items():
            probs = expit(beta @ rows.T)
            standard = (beta - beta.mean(0)) / beta.std(0)
            arrays |= {
                f"mean_{name}": beta.mean(0),
                f"sd_{name}": beta.std(0),
                f"skewness_{name}": np.mean(standard**3, axis=0),
                f"correlation_{name}": np.corrcoef(beta.T),
                f"predictive_mean_{name}": probs.mean(0).astype(np.float32),
                f"predictive_sd_{name}": probs.std(0).astype(np.float32),
                f"intercept_{name}": np.histogram(beta[:, 0], arrays["edges"])[0] / len(beta),
                f"ks_{name}": [ks_2samp(b, c).statistic for b, c in zip(beta.T, laws["chain"].T)],
            }
        scalars = {
            "elbo_normal": full_elbo,
            "elbo_mean_field": diagonal_elbo,
            "lower_semi_implicit": lower,
            "upper_semi_implicit": upper,
            "error_lower": errors[0],
            "error_upper": errors[1],
            "log_evidence": log_evidence,
            "error_log_evidence": error,
            "accepted": accepted,
        }
        return scalars, arrays

    return Parts(state, step, finish=finish)


SETTINGS = {"samples": 50, "learning_rate": 0.01, "log_every": 50}
RUNS = {
    "sivi_counts": Run(
        sivi_counts,
        SETTINGS
        | {"steps": 2000, "decay": 0.75, "widths": [10, 40, 60, 40, 2], "scale": 0.1, "models": 3}
        | {"extra": [0, 1, 2, 5, 10, 20, 50, 100, 200, 1000], "extra_learned": [20, 100]}
        | {"eval_every": 100},
        {"red_mites": {}},
    ),
    "sivi_targets": Run(
        sivi_targets,
        SETTINGS
        | {"steps": 2000, "decay": 0.75, "widths": [10, 40, 60, 40], "scale": math.sqrt(0.1)}
        | {"models": 2, "extra": 100},
    ),
    "sivi_regression": Run(
        sivi_regression,
        SETTINGS
        | {"steps": 2000, "decay": 0.9, "widths": [20, 40, 60, 40], "scale": 0.7, "extra": 100}
        | {"chains": 32, "keep": 600, "batches": 40, "tested": 200},
        {"nodal": {}, "waveform": {}},
    ),
}
