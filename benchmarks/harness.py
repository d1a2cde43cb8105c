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
PEERS = "numpy", "torch", "autograd", "mygrad", "jax"
UNITS = {"s": 1, "ms": 1e3, "µs": 1e6, "MiB": 2**-20}
# Threads of a BLAS keep spinning for about 20 ms after their last product.
SETTLE = 0.03
TOLERANCE = 1e-4  # of the largest element of an array
ERROR, SIGMAS = " error", 5
LEAST_ROUNDS = 5


class WorkerFailed(RuntimeError):
    """The process of a framework ended before its time."""


def _start(setup, threads, *mode, **pipes):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", setup, *mode],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **dict.fromkeys(THREADS, str(threads)), "PYTHONPATH": path},
        **pipes,
    )


class Worker:
    """The process of one framework, see `benchmarks.worker`; closed as a context manager."""

    def __init__(self, setup, threads):
        self.setup = setup
        self.process = _start(setup, threads, stdin=subprocess.PIPE)

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


def installed(case):
    """Return the names of those setups of a case that can be run here."""
    return [n for n in case.setups if n not in PEERS or importlib.util.find_spec(n)]


def measure(case, rounds, budget, limit, threads):
    """Measure one case.

    `budget` is the time in seconds of one framework in one round, `limit` that after which there
    are no more than LEAST_ROUNDS rounds. Return a dict from each framework to its list of seconds
    per piece of work, one per round, and the list of what is wrong. Where anything is, nothing was
    timed. With the unit MiB, lists of bytes.
    """
    names = installed(case)
    if case.unit == "MiB":
        found = {name: [_peak_memory(case.setups[name], threads)] for name in names}
        return ({} if [None] in found.values() else found), []
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(case.setups[name], threads)) for name in names}
        results = {name: worker.result() for name, worker in workers.items()}
        if wrong := disagreements(results, case.tolerance):
            return {}, wrong
        steps = {name: _enough_steps(worker, budget) for name, worker in workers.items()}
        times = {name: [] for name in names}
        start = time.perf_counter()
        for i in range(rounds):
            if i >= LEAST_ROUNDS and time.perf_counter() - start > limit:
                break
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                own = name == "minigrad" or case.peers_per_step is None
                pieces = steps[name] * (case.per_step if own else case.peers_per_step)
                times[name].append(workers[name].seconds(steps[name]) / pieces)
        return times, []


def _peak_memory(setup, threads):
    process = _start(setup, threads, "memory")
    answer, _ = process.communicate()
    if process.returncode:
        raise WorkerFailed(f"{setup} ended with status {process.returncode}")
    return json.loads(answer)["bytes"]


def _enough_steps(worker, budget):
    """Warm up, and return how many steps take about `budget` seconds."""
    steps = 1
    while (seconds := worker.seconds(steps)) < budget / 2:
        steps *= 2 if seconds * 10 > budget else 10
    return max(1, math.ceil(steps * budget / seconds))


def disagreements(results, tolerance=TOLERANCE):
    """Return a sentence for each array in which a framework differs from minigrad.

    Of the largest element of an array the others may differ by `tolerance`. An array "x" beside
    which there is an "x error" is an average over draws with that standard error: two of them may
    differ by SIGMAS standard errors of the difference.
    """
    wrong = []
    reference = results["minigrad"]
    for name, result in results.items():
        if result.keys() != reference.keys():
            wrong.append(f"{name} returns {sorted(result)}, minigrad {sorted(reference)}")
            continue
        for key, array in result.items():
            error = np.max(np.abs(array - reference[key]), initial=0)
            scale = np.max(np.abs(reference[key]), initial=0)
            if key.endswith(ERROR):
                continue
            if key + ERROR in result:
                sigma = np.hypot(result[key + ERROR], reference[key + ERROR])
                if not np.all(np.abs(array - reference[key]) <= SIGMAS * sigma):
                    wrong.append(f"{key} of {name} and minigrad differ by more than chance")
            elif not error <= tolerance * scale:
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
        "ratio": _ratio(times, case.against(times)),
        "target": case.target(medians) if callable(case.target) else case.target,
        "jax_ratio": _ratio(times, times.get("jax")),
        "jax_target": case.jax_target,
    }


def _ratio(times, others):
    """Return the median over rounds of minigrad's time over the other."""
    if others is None:
        return None
    return statistics.median(ours / t for ours, t in zip(times["minigrad"], others))


def group_entry(name, group, entries):
    """Return the object for a group of cases: geometric means of what its members have in common.

    None where a member was not measured.
    """
    members = [entry for entry in entries if entry["case"] in group.members]
    if len(members) < len(group.members):
        return None
    mean = lambda key: geometric_mean(member[key] for member in members)
    shared = [peer for peer in members[0]["peers"] if all(peer in m["peers"] for m in members)]
    return {
        "case": name,
        "minigrad": mean("minigrad"),
        "peers": {peer: geometric_mean(m["peers"][peer] for m in members) for peer in shared},
        "unit": members[0]["unit"],
        "ratio": mean("ratio"),
        "target": group.target,
        "jax_ratio": mean("jax_ratio"),
        "jax_target": group.jax_target,
    }


def geometric_mean(values):
    """Return the geometric mean, or None where a value is missing."""
    values = list(values)
    return None if None in values else statistics.geometric_mean(values)


def header(threads):
    """Return the lines that say where and with what was measured."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = []
    for package in ("numpy", "scipy", "numba", *PEERS[1:]):
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
