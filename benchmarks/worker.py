"""The process of one framework: `python -m benchmarks.worker MODULE:FUNCTION`.

It reads commands from its standard input, one JSON object per line, and answers each with one on
its standard output. {"run": n} takes n steps and answers {"seconds": ...}; {"result": file} saves
the result as npz. It ends with its input, so none outlives the benchmark.
"""

import importlib
import json
import sys
import time

import numpy as np


def main(setup):
    """Obey the commands until the input ends."""
    # Whether the C library keeps freed arrays or gets each anew from the system, page by page,
    # hangs on what was freed before: chance, worth half of a small step. Here it keeps them.
    np.empty((32 << 20) - 65536, np.uint8)
    module, function = setup.split(":")
    step, result = getattr(importlib.import_module(module), function)()
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


if __name__ == "__main__":
    main(sys.argv[1])
