"""How a case is measured: one live process per framework, in alternating rounds.

Frameworks in one process fight over threads, and so do processes that run at the same time. So each
has its own process, with the same fixed number of threads, and only one of them works at a time. In
each round every framework takes its steps for the same while, in an order that turns from round to
round. What other users of the machine and its clock do then hits all alike: the figure to trust is
the ratio, the median of those of the single rounds.
"""

import contextlib
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
THREADS = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"
UNITS = {"ms": 1e3, "µs": 1e6}
# Threads of a BLAS keep spinning for about 20 ms after their last product.
SETTLE = 0.03
TOLERANCE = 1e-4  # of the largest element of an array


class WorkerFailed(RuntimeError):
    """The process of a framework ended before its time."""


class Worker:
    """The process of one framework, see `benchmarks.worker`; closed as a context manager."""

    def __init__(self, setup, threads):
        self.setup = setup
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **dict.fromkeys(THREADS, str(threads)), "PYTHONPATH": path},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # it ended by itself
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ask(self, **command):
        """Send a command and return the answer."""
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(f"{self.setup} ended with status {self.process.wait()}")
        return json.loads(line)

    def seconds(self, steps):
        """Return the time of that many steps."""
        time.sleep(SETTLE)
        return self.ask(run=steps)["seconds"]

    def result(self):
        """Return the arrays by which frameworks are compared."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.npz"
            self.ask(result=str(path))
            with np.load(path, allow_pickle=False) as file:
                return dict(file)


def measure(case, rounds, budget, threads):
    """Measure one case; `budget` is the time in seconds of one framework in one round.

    Return a dict from each framework to its list of seconds per piece of work, one per round, and
    the list of what is wrong. Where anything is, nothing was timed.
    """
    installed = [name for name in case.setups if importlib.util.find_spec(name)]
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(case.setups[name], threads)) for name in installed
        }
        wrong = disagreements({name: worker.result() for name, worker in workers.items()})
        if wrong:
            return {}, wrong
        steps = {name: _enough_steps(worker, budget) for name, worker in workers.items()}
        times = {name: [] for name in installed}
        for i in range(rounds):
            turn = i % len(installed)
            for name in installed[turn:] + installed[:turn]:
                seconds = workers[name].seconds(steps[name])
                times[name].append(seconds / steps[name] / case.per_step)
        return times, []


def _enough_steps(worker, budget):
    """Warm up, and return how many steps take about `budget` seconds."""
    steps = 1
    while (seconds := worker.seconds(steps)) < budget / 2:
        steps *= 2 if seconds * 10 > budget else 10
    return max(1, math.ceil(steps * budget / seconds))


def disagreements(results):
    """Return a sentence for each array in which a framework differs from minigrad."""
    wrong = []
    reference = results["minigrad"]
    for name, result in results.items():
        if result.keys() != reference.keys():
            wrong.append(f"{name} returns {sorted(result)}, minigrad {sorted(reference)}")
            continue
        for key, array in result.items():
            error = np.max(np.abs(array - reference[key]), initial=0)
            scale = np.max(np.abs(reference[key]), initial=0)
            if not error <= TOLERANCE * scale:
                wrong.append(f"{key} of {name} and minigrad differ by {error:.2g} of {scale:.2g}")
    return wrong


def entry(name, case, times):
    """Return the object for one case that goes into the JSON file."""
    medians = {framework: statistics.median(values) for framework, values in times.items()}
    shown = {framework: median * UNITS[case.unit] for framework, median in medians.items()}
    return {
        "case": name,
        "minigrad": shown["minigrad"],
        "peers": {framework: shown[framework] for framework in shown if framework != "minigrad"},
        "unit": case.unit,
        "ratio": _ratio(times, case.rivals),
        "target": case.target(medians),
        "jax_ratio": _ratio(times, ("jax",)),
        "jax_target": None,
    }


def _ratio(times, rivals):
    """Return the median over rounds of minigrad's time over that of the fastest rival."""
    present = [name for name in rivals if name in times]
    if not present:
        return None
    fastest = min(present, key=lambda name: statistics.median(times[name]))
    return statistics.median(ours / t for ours, t in zip(times["minigrad"], times[fastest]))


def header(threads):
    """Return the lines that say where and with what was measured."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = []
    for package in ("numpy", "scipy", "numba", "torch", "jax", "autograd", "mygrad"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return [
        f"{_processor()}, {os.cpu_count()} cores{load}, {platform.system()}",
        f"Python {platform.python_version()}, {', '.join(versions)}",
        f"{threads} thread{'s' if threads > 1 else ''} per framework, one framework at a time",
    ]


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
