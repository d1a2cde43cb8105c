"""One step of Adam for one array: a loop in a single pass, beside its NumPy twin.

Operations on whole arrays read and write memory a dozen times for about as many floating-point
operations per element. The loop does it once and takes half the time.
"""

import numpy as np

from minigrad.kernels import compiled

# Below this size a few microseconds are at stake, and a program with small arrays only never
# imports Numba.
SMALL = 1 << 12


def adam(p, g, m, v, b1, b2, rate, eps, size=None):
    r"""Return the new p, m and v, from four arrays of one shape and dtype, as new arrays.

    `size` is that of all the arrays of the same step, where there are more.

    $m \leftarrow \beta_1 m + (1 - \beta_1) g$, $v \leftarrow \beta_2 v + (1 - \beta_2) g^2$,
    $p \leftarrow p - \alpha m / (\sqrt v + \epsilon)$, with the bias corrections of Kingma and Ba
    (2015) in `rate` and `eps`.
    """
    fast = None
    if (size or p.size) >= SMALL and p.dtype.itemsize in (4, 8):
        fast = compiled.load("adam_numba")
    if fast is None:
        return _twin(p, g, m, v, b1, b2, rate, eps)
    new = [np.empty(p.shape, p.dtype) for _ in range(3)]
    flat = [a.reshape(-1) for a in (p, g, m, v, *new)]
    fast.adam(*flat, *map(p.dtype.type, (b1, 1 - b1, b2, 1 - b2, rate, eps)))
    return new


def _twin(p, g, m, v, b1, b2, rate, eps):
    # It writes into arrays that it has just made, never into its arguments.
    work = np.multiply(g, 1 - b1, out=np.empty_like(p))
    m = np.multiply(m, b1, out=np.empty_like(p))
    m += work
    np.multiply(g, g, out=work)
    work *= 1 - b2
    v = np.multiply(v, b2, out=np.empty_like(p))
    v += work
    np.sqrt(v, out=work)
    work += eps
    np.divide(m, work, out=work)
    work *= rate
    return [np.subtract(p, work, out=work), m, v]
