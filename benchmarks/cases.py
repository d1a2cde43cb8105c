"""The list of cases, with what each is measured against."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import small_op, untraced_call


class Case(NamedTuple):
    """One comparison.

    `setups` maps a framework to its setup function, as "module:function". The ratio is the time of
    minigrad divided by that of the fastest framework of `rivals`; the others are for information.
    `target(times in seconds)` is the ratio to stay below, or None. A step may do its work
    `per_step` times over; times are printed per piece of work, in `unit`.
    """

    title: str
    setups: dict[str, str]
    rivals: tuple[str, ...]
    unit: str
    target: Callable = lambda times: None
    per_step: int = 1


def _setups(module, *names, suffix=""):
    return {name: f"benchmarks.{module}:{name}{suffix}" for name in ("minigrad", *names)}


CASES = {
    "untraced_call": Case(
        "a primitive called without tracing, 8 floats: at most 0.5 µs more than NumPy's own call",
        _setups("untraced_call", "numpy"),
        rivals=("numpy",),
        unit="µs",
        target=lambda times: 1 + 0.5e-6 / times["numpy"],
        per_step=untraced_call.CALLS,
    ),
    "small_op": Case(
        "forward and backward of sin, 8 floats (NumPy: the three bare calls)",
        _setups("small_op", "numpy", "torch", "autograd"),
        rivals=("torch",),
        unit="µs",
        target=lambda times: 0.45,
    ),
    "small_op_chain": Case(
        "forward and backward of a chain of 100 sin of 8 floats, per op",
        _setups("small_op", "numpy", "torch", "autograd", suffix="_chain"),
        rivals=("torch",),
        unit="µs",
        per_step=small_op.LENGTH,
    ),
    "vae_step": Case(
        "step of the VAE 784-400-20-400-784, batch 100, float32, Adam (NumPy: written by hand)",
        _setups("vae_step", "numpy", "torch"),
        rivals=("numpy",),
        unit="ms",
        target=lambda times: 1.0,
    ),
}
