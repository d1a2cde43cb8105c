"""The compiled loop of `vq.py`."""

from minigrad.kernels.compiled import njit


@njit
def add_rows(indices, x, counts, sums):
    """counts[i] += 1 and sums[i] += x[n] for i = indices[n], in the order of n."""
    for n in range(indices.size):
        i = indices[n]
        counts[i] += 1
        for d in range(x.shape[1]):
            sums[i, d] += x[n, d]
