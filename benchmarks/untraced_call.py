"""A primitive called on plain arrays: what it costs beyond NumPy's own call."""

import numpy as np

CALLS = 100


def _repeat(f, n):
    x = np.linspace(-1, 1, n)

    def step():
        for _ in range(CALLS):
            f(x)

    return step, lambda: {"y": f(x)}


def minigrad(n=8):
    """The primitive `exp`."""
    from minigrad.elementwise import exp

    return _repeat(exp, n)


def numpy(n=8):
    """NumPy's ufunc."""
    return _repeat(np.exp, n)
