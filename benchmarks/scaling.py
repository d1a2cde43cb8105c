"""How the cost of a step grows: `python -m benchmarks.scaling [--json FILE]`.

Time, and the peak of the memory taken from Python and NumPy above that before the step, against one
size at a time: of a training step of a network of dense layers, and of the gradient of a chain of
operations. The slope of log cost against log size, fitted to the larger half of the sizes, is 1
where the cost is proportional; where a fixed cost still counts, it is less.
"""

import argparse
import gc
import json
import time
import tracemalloc

import numpy as np

from minigrad import grad, value_and_grad
from minigrad.nn import dense, dense_init
from minigrad.optim import adam
from minigrad.train import write_atomic

REPEATS = 9
STEPS_TIME = 0.02  # seconds, at least, of what is timed at once


def training_step(batch, widths):
    """A step of Adam for the mean square of a network with tanh between its layers."""
    rng = np.random.default_rng(0)
    params = [dense_init(rng, n, m) for n, m in zip(widths, widths[1:])]
    x = rng.standard_normal((batch, widths[0]), dtype=np.float32)
    optimizer = adam(1e-3)
    state = optimizer.init(params)

    def loss(params):
        h = x
        for layer in params[:-1]:
            h = np.tanh(dense(layer, h))
        y = dense(params[-1], h)
        return np.mean(y * y)

    def step():
        nonlocal params, state
        _, grads = value_and_grad(loss)(params)
        params, state = optimizer.update(grads, state, params)

    return step


def chain(length):
    """The gradient of a chain of sines of 1000 numbers."""
    x = np.linspace(-1, 1, 1000)

    def total(x):
        for _ in range(length):
            x = np.sin(x)
        return np.sum(x)

    return lambda: grad(total)(x)


SWEEPS = {  # what is varied -> (the rest, sizes, setup of a size)
    "batch": (
        "a network 256-256-256",
        [2**i for i in range(6, 14)],
        lambda n: training_step(n, [256, 256, 256]),
    ),
    "width": (
        "a network 256-width-256, batch 256",
        [2**i for i in range(6, 14)],
        lambda n: training_step(256, [256, n, 256]),
    ),
    "depth": (
        "layers of 256 units, batch 128",
        [2**i for i in range(7)],
        lambda n: training_step(128, [256] * (n + 1)),
    ),
    "operations": (
        "a chain of sines of 1000 numbers",
        [10 * 2**i for i in range(11)],
        chain,
    ),
}


def slope(sizes, costs):
    """Return the slope of log cost against log size, fitted to the larger half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(costs[half:]), 1)[0])


def seconds(step, repeats=REPEATS):
    """Return the median time of a step."""
    step()
    start = time.perf_counter()
    step()
    steps = 1 + int(STEPS_TIME / (time.perf_counter() - start))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        taken.append((time.perf_counter() - start) / steps)
    return float(np.median(taken))


def peak_bytes(step):
    """Return the peak, during a step, of what Python and NumPy have taken since before it."""
    step()
    gc.collect()
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(sweeps=SWEEPS, repeats=REPEATS):
    """Measure and print; return one JSON object per sweep."""
    entries = []
    for name, (rest, sizes, setup) in sweeps.items():
        print(f"\n{name}: {rest}", flush=True)
        times, peaks = [], []
        for size in sizes:
            step = setup(size)
            times.append(1e3 * seconds(step, repeats))
            peaks.append(peak_bytes(step) / 2**20)
            print(f"    {size:6} {times[-1]:10.3f} ms {peaks[-1]:10.3f} MiB", flush=True)
        slopes = {"time_slope": slope(sizes, times), "memory_slope": slope(sizes, peaks)}
        print(f"    slope: time {slopes['time_slope']:.2f}, memory {slopes['memory_slope']:.2f}")
        entries.append({"against": name, "of": rest, "sizes": sizes, "ms": times, "MiB": peaks})
        entries[-1] |= slopes
    return entries


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args(argv)
    entries = run()
    if arguments.json:
        write_atomic(arguments.json, (json.dumps(entries, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
