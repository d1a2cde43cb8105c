"""The compiled loop of `vq.py`."""

from minigrad.kernels.compiled import njit


@njit
def add_rows(out, indices, rows):
    """out[indices[n]] += rows[n], in the order of n."""
    for n in range(indices.size):
        i = indices[n]
        for d in range(rows.shape[1]):
            out[i, d] += rows[n, d]
