"""The list of cases, with what each is measured against."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import pixelcnn, small_op, untraced_call
from benchmarks.conv2d import SHAPES
from benchmarks.harness import PEERS, TOLERANCE

EAGER = tuple(name for name in PEERS if name != "jax")


def fastest(*names):
    """Return a function that picks from the times of all the list of the fastest of `names`."""

    def choose(times):
        present = [times[name] for name in names if name in times]
        return min(present, key=statistics.median, default=None)

    return choose


def _sum(times):
    return [sum(values) for values in zip(times["convolution"], times["product"])]


class Case(NamedTuple):
    """One comparison.

    `setups` maps a framework to its setup, "module:function" or "module:function:argument". The
    ratio is minigrad's time, round by round, divided by what `against` makes of the times of all.
    `target` and `jax_target` are the ratios to stay below; the former may be a function of the
    medians in seconds. A step does its work `per_step` times over, that of a peer `peers_per_step`
    times, and times are given per piece of work, in `unit`. With the unit MiB it is the peak of
    memory during steps, above that before, which is compared. Results may differ by `tolerance` of
    the largest element.
    """

    title: str
    setups: dict[str, str]
    unit: str
    target: float | Callable | None = None
    jax_target: float | None = None
    against: Callable = fastest(*EAGER)
    per_step: float = 1
    peers_per_step: float | None = None
    tolerance: float = TOLERANCE


class Group(NamedTuple):
    """Several cases that are judged by the geometric mean of their ratios."""

    title: str
    members: tuple[str, ...]
    target: float
    jax_target: float


def _setups(module, *names, suffix=""):
    return {name: f"benchmarks.{module}:{name}{suffix}" for name in ("minigrad", *names)}


def _conv2d(shape, images, channels, filters, side, kernel, stride):
    # MyGrad demands that the stride divides what the others leave over.
    names = ["numpy", "torch", "jax"] + ["mygrad"] * (stride == 1)
    strided = f", stride {stride}" if stride > 1 else ""
    return Case(
        f"convolution, forward and backward: {images} images of {side}x{side}, "
        f"{channels} to {filters} channels, {kernel}x{kernel}{strided}",
        _setups("conv2d", *names, suffix=f":{shape}"),
        unit="ms",
        target=1.3,
    )


CASES = {
    "untraced_call": Case(
        "a primitive called without tracing, 8 floats: at most 0.5 µs more than NumPy's own call",
        _setups("untraced_call", "numpy"),
        unit="µs",
        target=lambda times: 1 + 0.5e-6 / times["numpy"],
        per_step=untraced_call.CALLS,
    ),
    "small_op": Case(
        "forward and backward of sin, 8 floats (NumPy: the three bare calls, below which nobody "
        "gets; the ratio is to the frameworks)",
        _setups("small_op", *PEERS),
        unit="µs",
        target=0.4,
        against=fastest("torch", "autograd", "mygrad"),
    ),
    "small_op_chain": Case(
        "forward and backward of a chain of 100 sin of 8 floats, per op",
        _setups("small_op", *PEERS, suffix="_chain"),
        unit="µs",
        against=fastest("torch", "autograd", "mygrad"),
        per_step=small_op.LENGTH,
    ),
    "vae_step": Case(
        "step of the VAE 784-400-20-400-784, batch 100, Adam",
        _setups("vae_step", *PEERS),
        unit="ms",
        target=0.95,
        jax_target=1.1,
    ),
    **{f"conv2d_{shape}": _conv2d(shape, *sizes) for shape, sizes in SHAPES.items()},
    "conv2d": Group(
        "convolution, forward and backward: geometric mean of the four shapes",
        tuple(f"conv2d_{shape}" for shape in SHAPES),
        target=1.0,
        jax_target=1.0,
    ),
    "pixelcnn_step": Case(
        "step of the PixelCNN of 6 masked 7x7 layers of 32 channels and a 1x1, batch 32, Adam",
        _setups("pixelcnn", "numpy", "torch", "jax"),
        unit="ms",
        target=0.65,
        jax_target=0.65,
        tolerance=1e-3,  # a ReLU whose input is 0 but for rounding opens in one and not in another
    ),
    "reinforce_step": Case(
        "REINFORCE step of the Bernoulli VAE 784-200-784, batch 24, Adam",
        _setups("bernoulli_vae", *PEERS, suffix="_reinforce"),
        unit="ms",
        target=0.6,
        jax_target=1.1,
    ),
    "relax_step": Case(
        "RELAX step of the Bernoulli VAE 784-200-784, control network 984-200-200-1, batch 24, "
        "Adam",
        _setups("bernoulli_vae", "torch", "autograd", "jax", suffix="_relax"),
        unit="ms",
        target=0.45,
        jax_target=1.3,
        tolerance=1e-3,  # ReLUs
    ),
    "bernoulli": Case(
        "784,000 Bernoulli draws",
        _setups("sampling", "numpy", "torch", "jax", suffix="_bernoulli"),
        unit="ms",
        target=0.5,
        jax_target=0.6,
    ),
    "gumbel_max": Case(
        "100,000 draws from 10 categories by Gumbel-max",
        _setups("sampling", "numpy", "torch", "jax", suffix="_gumbel_max"),
        unit="ms",
        target=0.5,
        jax_target=0.6,
    ),
    "nearest_code": Case(
        "the nearest of 512 codes to each of 3136 vectors of 64 numbers",
        _setups("nearest", "numpy", "torch", "jax"),
        unit="ms",
        target=0.8,
    ),
    "alternating": Case(
        "a convolution and a matrix product in turn, against the sum of either alone",
        _setups("alternating", "convolution", "product"),
        unit="ms",
        target=1.1,
        against=_sum,
    ),
    "conv2d_memory": Case(
        "peak memory above that before, during convolutions forward and backward at the four "
        "shapes in turn",
        {
            name: f"benchmarks.conv2d:every_shape:{name}"
            for name in ("minigrad", "numpy", "torch", "jax")
        },
        unit="MiB",
        target=1.0,
    ),
    "vae_memory": Case(
        "peak memory above that before, during steps of the VAE",
        _setups("vae_step", "numpy", "torch", "jax"),
        unit="MiB",
        target=1.0,
    ),
    "pixelcnn_sample": Case(
        f"16 images of 28x28 from the PixelCNN; peers: {pixelcnn.PASSES} of the 784 passes, "
        f"times {pixelcnn.SIDE**2 // pixelcnn.PASSES}",
        _setups("pixelcnn", "numpy", "torch", "jax", suffix="_sample"),
        unit="s",
        target=0.005,
        against=fastest("numpy", "torch", "jax"),
        peers_per_step=pixelcnn.PASSES / pixelcnn.SIDE**2,
    ),
}
