"""The process of one framework: `python -m benchmarks.worker MODULE:FUNCTION[:ARGUMENT]`.

It reads commands from its standard input, one JSON object per line, and answers each with one on
its standard output. {"run": n} takes n steps and answers {"seconds": ...}; {"result": file} saves
the result as npz. It ends with its input, so none outlives the benchmark.

With the word `memory` behind the setup it answers {"bytes": ...}, or null on systems other than
Linux, and ends: the peak of its resident memory during a few steps, above that before them.
"""

import ctypes
import functools
import gc
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

FEW = 4  # rows of data for tests, instead of the number that is measured
WARM_UP, MEMORY_STEPS = 32, 3  # enough rows for the kernels that are used with all of them


def load(setup):
    """Return the setup function; called with a number it takes that many rows of data."""
    module, function, *arguments = setup.split(":")
    return functools.partial(getattr(importlib.import_module(module), function), *arguments)


def main(setup, mode="time"):
    """Obey the commands until the input ends."""
    limit_threads()
    if mode == "memory":
        print(json.dumps({"bytes": peak_memory(load(setup))}))
        return
    # Whether the C library keeps freed arrays or gets each anew from the system, page by page,
    # hangs on what was freed before: chance, worth half of a small step. Here it keeps them.
    np.empty((32 << 20) - 65536, np.uint8)
    step, result = load(setup)()
    for line in sys.stdin:
        command = json.loads(line)
        if "result" in command:
            np.savez(command["result"], **result())
            answer = {}
        else:
            steps = range(command["run"])
            step()  # another framework had its turn: warm the caches up again
            start = time.perf_counter()
            for _ in steps:
                step()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


def limit_threads():
    """Leave as many processors as threads are asked for: not all frameworks read the variables."""
    if hasattr(os, "sched_setaffinity"):
        there = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, there[: int(os.environ.get("OMP_NUM_THREADS", len(there)))])


def peak_memory(setup):
    """Return the bytes by which steps raise the resident memory, at most; None if not on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    setup(WARM_UP)[0]()  # loads the code and compiles the kernels
    step, _ = setup()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free belongs to the system again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = _resident("VmRSS")
    for _ in range(MEMORY_STEPS):
        step()
    return _resident("VmHWM") - before


def _resident(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
