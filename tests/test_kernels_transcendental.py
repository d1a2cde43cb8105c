"""Polynomials of float32 against float64, over all of float32, and the choice of kernel or twin.

`python tests/test_kernels_transcendental.py` looks at all 2^32 numbers, in ten minutes or more.
"""

import numpy as np
import pytest
import scipy.special as sc

from minigrad.kernels import compiled, transcendental

# Largest errors in units in the last place, rounded up: those of the docstring.
FUNCTIONS = {
    "exp": (np.exp, 0.88),
    "log": (np.log, 0.86),
    "tanh": (np.tanh, 1.51),
    "expit": (sc.expit, 1.37),
    "softplus": (lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), 1.69),
}
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, -3e38, 1, -1], "f4")


def _errors(name, x):
    """Return the errors at `x` in units in the last place, inf for a wrong NaN or infinity."""
    reference, _ = FUNCTIONS[name]
    got = getattr(transcendental, name)(x)
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
        rounded = exact.astype(np.float32)
        error = np.abs(got - exact) / np.spacing(np.abs(rounded)).astype(np.float64)
    fits = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return np.where(np.isfinite(rounded), error, np.where(fits, 0, np.inf))


def _floats(start, stop, step):
    return np.arange(start, stop, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


needs_loops = pytest.mark.skipif(
    compiled.load("transcendental_numba") is None, reason="the loops are off"
)


@needs_loops
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_over_all_of_float32_are_as_documented(name, record):
    # Under NUMBA_DISABLE_JIT=1 each number takes microseconds.
    sparse = hasattr(compiled.load("transcendental_numba").exp, "py_func")
    x = _floats(0, 2**32, 4099 if sparse else 2**32 // 20_000)
    worst = np.max(_errors(name, x))
    # Without fused multiply-add a little more is lost.
    assert worst < FUNCTIONS[name][1] + (0 if sparse else 0.7)
    record(f"largest error of {name}, ulp", worst, limit=2)
    with np.errstate(all="ignore"):
        shifted = getattr(transcendental, name)(x) * np.float32(1 + 2**-20)
        exact = FUNCTIONS[name][0](x.astype(np.float64)).astype(np.float32)
        assert np.nanmax(np.abs(shifted - exact) / np.spacing(np.abs(exact))) > 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values_are_those_of_numpy(name, dtype):
    f, (reference, _) = getattr(transcendental, name), FUNCTIONS[name]
    with np.errstate(all="ignore"):
        few = f(SPECIAL.astype(dtype))
        many = f(np.resize(SPECIAL, 6006).astype(dtype).reshape(2, 3, -1))
        exact = reference(SPECIAL.astype(np.float64)).astype(dtype)
    assert few.dtype == many.dtype == dtype and many.shape == (2, 3, 1001)
    np.testing.assert_allclose(few, exact, rtol=4e-7, atol=2e-45)
    np.testing.assert_allclose(many.ravel(), np.resize(exact, 6006), rtol=4e-7, atol=2e-45)
    assert np.array_equal(np.signbit(f(np.resize(SPECIAL[:2], 5000))[:2]), np.signbit(few[:2]))


@needs_loops
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_agree_with_plain_python(name):
    kernel = getattr(compiled.load("transcendental_numba"), name)
    x = np.concatenate([SPECIAL, 10 * np.random.default_rng(0).standard_normal(200)]).astype("f4")
    a, b = np.empty_like(x), np.empty_like(x)
    kernel(x, a)
    with np.errstate(all="ignore"):
        getattr(kernel, "py_func", kernel)(x, b)
    np.testing.assert_allclose(a, b, rtol=3e-7)


def test_layouts_and_small_arrays():
    x = np.random.default_rng(1).standard_normal((100, 60)).astype(np.float32)
    for y in x, x.T, x[::2], x[:, ::-1], np.asfortranarray(x), x[0], x[:0]:
        for name in FUNCTIONS:
            with np.errstate(all="ignore"):
                got = getattr(transcendental, name)(y)
                exact = FUNCTIONS[name][0](y.astype(np.float64))
            assert got.shape == y.shape
            np.testing.assert_allclose(got, exact, rtol=5e-7, atol=1e-7)


@needs_loops
def test_bits_of_elementwise_loops_do_not_depend_on_threads():
    from threadpoolctl import threadpool_limits

    if not hasattr(compiled.load("transcendental_numba").exp, "py_func"):
        pytest.skip("uncompiled loops are too slow for arrays this large")
    x = np.random.default_rng(2).standard_normal(300_001).astype(np.float32)
    for name in FUNCTIONS:
        with np.errstate(invalid="ignore"), threadpool_limits(1):
            one = getattr(transcendental, name)(x)
        with threadpool_limits(2):
            assert np.array_equal(one, getattr(transcendental, name)(x), equal_nan=True)


@needs_loops
def test_tanh_is_odd_to_the_bit():
    # So what the recorded sweep says of one half of the numbers holds of the other.
    sparse = hasattr(compiled.load("transcendental_numba").exp, "py_func")
    x = _floats(0, 2**31, 1021 if sparse else 2**31 // 20_000)
    with np.errstate(invalid="ignore"):
        y, z = transcendental.tanh(x), transcendental.tanh(-x)
    assert np.array_equal(np.isnan(y), np.isnan(x))
    kept = ~np.isnan(x)
    np.testing.assert_array_equal((-y[kept]).view(np.uint32), z[kept].view(np.uint32))


if __name__ == "__main__":
    for name in FUNCTIONS:
        step = 2**24
        worst = max(np.max(_errors(name, _floats(s, s + step, 1))) for s in range(0, 2**32, step))
        print(f"{name}: {worst:.3f} ulp", flush=True)
