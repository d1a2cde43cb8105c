r"""Optimisers as pairs of pure functions, learning-rate schedules and clipping of gradients.

    optimizer = adam(exponential_decay(1e-3, 0.5, 1000))
    state = optimizer.init(params)
    params, state = optimizer.update(grads, state, params)     # one step downhill

Nothing is modified: `update` returns new parameters and a new state, both containers of arrays, so
that saving them is saving the run. Parameters keep their dtypes, and the moments have the same. A
learning rate is a number or a schedule, a function from the number of steps taken to a number.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minigrad import tree
from minigrad.kernels.adam import adam as adam_step

__all__ = [
    "Optimizer",
    "adam",
    "clip",
    "clip_by_global_norm",
    "cosine_decay",
    "exponential_decay",
    "global_norm",
    "linear_warmup",
    "piecewise_constant",
    "rmsprop",
    "sgd",
]


class Optimizer(NamedTuple):
    """`init(params)` returns a state; `update(grads, state, params)` the new params and state."""

    init: Callable
    update: Callable


def _optimizer(moments, rule, learning_rate):
    """Make an optimiser of a rule for one array.

    The state is {"step": 0-d int64 array, and one tree like the params for each name in `moments`}.
    `rule(t, rate, size)` is called once per step, t = 1, 2, ..., for that many parameters, and
    returns the function `(p, g, *moments) -> (new p, *new moments)`.
    """

    def init(params):
        _float_leaves(params)
        zeros = {name: tree.map(np.zeros_like, params) for name in moments}
        return {"step": np.array(0, np.int64), **zeros}

    def update(grads, state, params):
        leaves, treedef = _float_leaves(params)
        columns = [leaves, _leaves_like("grads", grads, params, leaves, treedef)]
        for name in moments:
            if name not in state:
                raise ValueError(
                    f"the state has no {name!r}, only {', '.join(state)}: is it that of another "
                    "optimiser?"
                )
            columns.append(_leaves_like(f"state[{name!r}]", state[name], params, leaves, treedef))
        taken = int(state["step"])
        rate = learning_rate(taken) if callable(learning_rate) else learning_rate
        # A Python float takes part in the arithmetic of float32 without making it float64.
        step = rule(taken + 1, float(rate), sum([p.size for p in leaves]))
        rows = [step(*row) for row in zip(*columns)]
        new, *new_moments = (
            tree.unflatten(treedef, [row[i] for row in rows]) for i in range(len(columns) - 1)
        )
        return new, {"step": np.array(taken + 1, np.int64), **dict(zip(moments, new_moments))}

    return Optimizer(init, update)


def _float_leaves(params):
    """Return the leaves of the parameters as arrays, and the structure."""
    leaves, treedef = tree.flatten(params)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, (np.ndarray, np.floating)) or leaf.dtype.kind != "f":
            found = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"an optimiser updates floating-point arrays, but parameter "
                f"{tree.paths(params)[i]!r} is {found}; keep what is not trained out of the params"
            )
    return [np.asarray(leaf) for leaf in leaves], treedef


def _leaves_like(name, other, params, leaves, treedef):
    """Return the leaves of `other`, of the structure and shapes of the parameters, as arrays."""
    others, other_def = tree.flatten(other)
    if other_def != treedef:
        raise TypeError(f"{name} has the structure {other_def}, the params have {treedef}")
    others = [np.asarray(a, p.dtype) for a, p in zip(others, leaves)]
    for i, (a, p) in enumerate(zip(others, leaves)):
        if a.shape != p.shape:
            raise ValueError(
                f"{name} has shape {a.shape} at {tree.paths(params)[i]!r}, where the params "
                f"have {p.shape}"
            )
    return others


# The rules below write into arrays that they have just made, never into their arguments. The `out`
# is what keeps a parameter of 0 dimensions an array, where NumPy would return a scalar.


def sgd(learning_rate, momentum=0.0):
    r"""Return stochastic gradient descent, with classical momentum (Polyak, 1964) if not 0.

    $v \leftarrow \mu v + g$, $\theta \leftarrow \theta - \alpha v$; the learning rate is outside
    the velocity, so that a schedule acts at once. State: "step" and, with momentum, "velocity".
    """
    _refuse_unless(0 <= momentum < 1, "sgd", "momentum in [0, 1)", momentum)

    def plain_rule(_t, rate, _size):
        def step(p, g):
            work = np.multiply(g, rate, out=np.empty_like(p))
            return (np.subtract(p, work, out=work),)

        return step

    def momentum_rule(_t, rate, _size):
        def step(p, g, v):
            v = np.multiply(v, momentum, out=np.empty_like(v))
            v += g
            work = np.multiply(v, rate, out=np.empty_like(p))
            return np.subtract(p, work, out=work), v

        return step

    if momentum:
        return _optimizer(("velocity",), momentum_rule, learning_rate)
    return _optimizer((), plain_rule, learning_rate)


def rmsprop(learning_rate, decay=0.9, eps=1e-8):
    r"""Return RMSProp (Tieleman and Hinton, 2012).

    $v \leftarrow \rho v + (1 - \rho) g^2$, $\theta \leftarrow \theta - \alpha g / (\sqrt v +
    \epsilon)$. State: "step" and "square".
    """
    _refuse_unless(0 <= decay < 1, "rmsprop", "decay in [0, 1)", decay)
    _refuse_unless(eps > 0, "rmsprop", "eps > 0", eps)

    def rule(_t, rate, _size):
        def step(p, g, v):
            work = np.multiply(g, g, out=np.empty_like(p))
            work *= 1 - decay
            v = np.multiply(v, decay, out=np.empty_like(v))
            v += work
            np.sqrt(v, out=work)
            work += eps
            np.divide(g, work, out=work)
            work *= rate
            return np.subtract(p, work, out=work), v

        return step

    return _optimizer(("square",), rule, learning_rate)


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    r"""Return Adam (Kingma and Ba, 2015, Algorithm 1).

    $m \leftarrow \beta_1 m + (1 - \beta_1) g$, $v \leftarrow \beta_2 v + (1 - \beta_2) g^2$,
    $\hat m = m / (1 - \beta_1^t)$, $\hat v = v / (1 - \beta_2^t)$, $\theta \leftarrow \theta -
    \alpha \hat m / (\sqrt{\hat v} + \epsilon)$ at step t = 1, 2, ... State: "step", "m" and "v".
    """
    _refuse_unless(0 <= b1 < 1 and 0 <= b2 < 1, "adam", "b1 and b2 in [0, 1)", (b1, b2))
    _refuse_unless(eps > 0, "adam", "eps > 0", eps)

    def rule(t, rate, size):
        # The bias corrections are taken out of the loop over elements: with c = sqrt(1 - b2^t),
        # m_hat / (sqrt(v_hat) + eps) = c / (1 - b1^t) * m / (sqrt(v) + c eps).
        c = math.sqrt(1 - b2**t)
        corrected = rate * c / (1 - b1**t)
        return lambda p, g, m, v: adam_step(p, g, m, v, b1, b2, corrected, c * eps, size)

    return _optimizer(("m", "v"), rule, learning_rate)


def _refuse_unless(holds, name, wanted, value):
    if not holds:
        raise ValueError(f"{name} needs {wanted}, got {value}")


# ----------------------------------------------------------------------------------- schedules


def exponential_decay(initial, factor, steps):
    r"""Return the schedule initial $\cdot$ factor$^{t / \text{steps}}$."""
    _refuse_unless(steps > 0, "exponential_decay", "steps > 0", steps)
    return lambda t: initial * factor ** (t / steps)


def piecewise_constant(boundaries, values):
    """Return the schedule of stages: `values[i]` before step `boundaries[i]`, then `values[-1]`."""
    boundaries, values = list(boundaries), list(values)
    if len(values) != len(boundaries) + 1 or sorted(set(boundaries)) != boundaries:
        raise ValueError(
            "piecewise_constant needs increasing boundaries and one value more than there are of "
            f"them, got boundaries {boundaries} and values {values}"
        )
    return lambda t: values[sum(t >= b for b in boundaries)]


def cosine_decay(initial, steps):
    r"""Return the schedule initial $(1 + \cos(\pi t / \text{steps})) / 2$, 0 from `steps` on."""
    _refuse_unless(steps > 0, "cosine_decay", "steps > 0", steps)
    return lambda t: 0.5 * initial * (1 + math.cos(math.pi * min(t / steps, 1)))


def linear_warmup(learning_rate, steps):
    """Return `learning_rate` (a number or a schedule) times (t + 1) / steps for the first steps."""
    _refuse_unless(steps > 0, "linear_warmup", "steps > 0", steps)

    def schedule(t):
        rate = learning_rate(t) if callable(learning_rate) else learning_rate
        return rate * min((t + 1) / steps, 1)

    return schedule


# ------------------------------------------------------------------------------------ clipping


def clip(grads, limit):
    """Return `grads` with each element limited to [-limit, limit]."""
    _refuse_unless(limit > 0, "clip", "limit > 0", limit)
    return tree.map(lambda g: np.clip(g, -limit, limit), grads)


def global_norm(grads):
    """Return the Euclidean norm of all elements of all leaves, as a float."""
    # In float64, where the square of no float32 overflows.
    return math.hypot(
        *(float(np.linalg.norm(np.ravel(g).astype(float))) for g in tree.leaves(grads))
    )


def clip_by_global_norm(grads, max_norm):
    """Return `grads`, scaled down together to the global norm `max_norm` where it is larger."""
    _refuse_unless(max_norm > 0, "clip_by_global_norm", "max_norm > 0", max_norm)
    norm = global_norm(grads)
    if norm <= max_norm:
        return grads
    # A NaN or an infinity is kept for all to see, not scaled away to 0.
    scale = max_norm / norm if math.isfinite(norm) else math.nan
    return tree.map(lambda g: g * np.asarray(g).dtype.type(scale), grads)
