"""A primitive called on plain arrays: what it costs beyond NumPy's own call."""

import numpy as np

CALLS = 100
X = np.linspace(-1, 1, 8)


def _repeat(f):
    def step():
        for _ in range(CALLS):
            f(X)

    return step, lambda: {"y": f(X)}


def minigrad():
    """The primitive `exp`."""
    from minigrad.elementwise import exp

    return _repeat(exp)


def numpy():
    """NumPy's ufunc."""
    return _repeat(np.exp)
