"""Nearest codes against all distances in float64; code sums against sums one by one."""

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from minigrad.kernels import compiled
from minigrad.kernels.vq import code_sums, nearest


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (7, 3, 2), (900, 33, 5), (393, 512, 64), (0, 4, 2)])
def test_nearest_is_the_least_distance(n, k, d, dtype):
    rng = np.random.default_rng(n + k)
    x, codes = (rng.standard_normal((m, d)).astype(dtype) for m in (n, k))
    got = nearest(x, codes)
    distances = ((x[:, None].astype(float) - codes) ** 2).sum(-1)
    assert got.shape == (n,) and got.dtype.kind == "i"
    # Not the index itself is compared: two codes may be equally near up to rounding.
    best = distances[np.arange(n), got]
    np.testing.assert_allclose(best, distances.min(1), rtol=0, atol=50 * np.finfo(dtype).eps)
    if n == 393:
        assert np.mean(got == distances.argmin(1)) > 0.99
        wrong = nearest(x, 1.2 * codes)  # shorter codes only would not be missed
        assert np.mean(wrong == distances.argmin(1)) < 0.99


@pytest.mark.parametrize("k", [2, 10, 31, 67, 512])
def test_of_equal_codes_the_first_is_nearest(k):
    rng = np.random.default_rng(k)
    x, codes = (rng.standard_normal((m, 19)).astype(np.float32) for m in (800, k))
    order = rng.permutation(np.tile(np.arange(k), 3))  # each code three times, anywhere
    first = np.array([np.flatnonzero(order == j)[0] for j in range(k)])
    assert np.array_equal(nearest(x, codes[order]), first[order[nearest(x, codes[order])]])
    assert np.all(nearest(x, np.repeat(codes[:1], k, axis=0)) == 0)


def test_nearest_refuses_shapes_and_does_not_depend_on_threads():
    rng = np.random.default_rng(1)
    x, codes = (rng.standard_normal((m, 64)).astype(np.float32) for m in (1600, 200))
    with threadpool_limits(1):
        one = nearest(x, codes)
    with threadpool_limits(2):
        assert np.array_equal(one, nearest(x, codes))
    for bad in codes[:, :5], codes[0], codes[:0]:
        with pytest.raises(ValueError, match="do not fit together"):
            nearest(x, bad)


@pytest.mark.parametrize("n", [1, 3999, 4001, 400_000])
def test_code_sums_refuse_lengths_that_differ(n):
    for x in np.ones((4000, 3), np.float32), np.ones(n, np.float32):
        with pytest.raises(ValueError, match="do not fit together"):
            code_sums(np.zeros(n, int), x, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_code_sums_add_in_the_order_of_the_rows(monkeypatch, dtype):
    rng = np.random.default_rng(2)
    x, indices = rng.standard_normal((800, 7)).astype(dtype), rng.integers(0, 40, 800)
    counts, sums = code_sums(indices, x, 50)
    expected = np.zeros((50, 7), dtype)
    for i, row in zip(indices, x):
        expected[i] += row
    assert np.array_equal(sums, expected) and sums.dtype == dtype
    assert np.array_equal(counts, np.bincount(indices, minlength=50)) and counts[40:].sum() == 0
    monkeypatch.setattr(compiled, "load", lambda name: None)
    twin = code_sums(indices, x, 50)
    assert np.array_equal(twin[0], counts) and np.array_equal(twin[1], sums)
    for bad in np.array([50]), np.array([-1]):
        with pytest.raises(IndexError, match="50 codes"):
            code_sums(bad, x[:1], 50)
