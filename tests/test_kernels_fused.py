"""Fused loops give what their NumPy twins give, and derivatives that can be differentiated."""

import numpy as np
import pytest

from minigrad import grad, hvp, special
from minigrad.check import check_grads
from minigrad.distributions import Normal, kl
from minigrad.kernels import compiled, fused, transcendental

SHAPES = [(5000,), (70, 71), (3, 40, 50), (9, 1000), (4100, 1), (2, 3), (300, 500)]
LAYOUTS = {"contiguous": np.ascontiguousarray, "fortran": np.asfortranarray}


def _twin(monkeypatch, f, *args):
    with monkeypatch.context() as m:
        m.setattr(compiled, "load", lambda name: None)
        return f(*args)


def _cases(rng, shape, dtype):
    logits = (5 * rng.standard_normal(shape)).astype(dtype)
    x = rng.integers(0, 2, shape).astype(dtype)
    g = rng.standard_normal(shape).astype(dtype)
    one = np.broadcast_to(dtype(-0.7), shape)
    scale, prior = np.exp(logits / 5), (np.array(0.3, dtype), np.array(1.7, dtype))
    return {
        "tanh_dx": [(np.tanh(logits), g), (np.tanh(logits), one)],
        "normal_kl": [(logits, scale, *prior), (logits, scale, logits[0], scale[0])],
        "expit_dx": [(logits, g), (logits, one)],
        "bernoulli_log_prob": [(logits, x), (logits[0], x), (logits, x[-1])],
        "bernoulli_log_prob_dlogits": [
            *((logits, x, g), (logits, x, one)),
            *((logits[0], x, g), (logits, x[-1], g), (logits, x[-1], one)),
        ],
        "log_softmax": [(logits,)],
        "log_softmax_dx": [(fused.log_softmax(logits), g), (fused.log_softmax(logits), one)],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_loops_agree_with_their_twins(monkeypatch, shape, dtype, layout):
    for name, calls in _cases(np.random.default_rng(0), shape, dtype).items():
        for args in calls:
            args = [a if 0 in a.strides else LAYOUTS[layout](a) for a in args]
            got = getattr(fused, name)(*args)
            # The twin in float64 is the oracle; rounding goes with the size of a row's sum.
            exact = _twin(monkeypatch, getattr(fused, name), *(a.astype(float) for a in args))
            eps = np.finfo(dtype).eps
            size = max(1, np.max(np.abs(np.sum(args[-1], axis=-1)))) if "softmax" in name else 1
            assert got.dtype == dtype and got.shape == shape
            np.testing.assert_allclose(got, exact, rtol=8 * eps, atol=60 * eps * size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gate_is_exact_also_at_ties(monkeypatch, dtype):
    x = np.random.default_rng(5).integers(-2, 3, (70, 80)).astype(dtype)
    g = np.random.default_rng(6).standard_normal(x.shape).astype(dtype)
    for limit in (0, 1.0, x[0], x):
        share = np.where(x == limit, 0.5, x > limit)
        got = fused.gate(g, x, limit)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, g * share)
        np.testing.assert_array_equal(_twin(monkeypatch, fused.gate, g, x, limit), got)
    relu = lambda x: np.sum(g * np.maximum(x, 0))
    np.testing.assert_array_equal(grad(relu)(x), g * np.where(x == 0, 0.5, x > 0))
    assert not np.any(hvp(relu, (x,), (g,))[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_loops_pass_nan_and_infinities_on(monkeypatch, dtype):
    x = np.random.default_rng(1).standard_normal((100, 60)).astype(dtype)
    x[3, 5], x[4, 6], x[5], x[6, 7] = np.nan, np.inf, -np.inf, -np.inf
    x[7, :2], x[8, 9] = (np.inf, -np.inf), 200
    ones = np.ones_like(x)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for name, args in {
            "expit_dx": (x, ones),
            "tanh_dx": (x, x),
            "gate": (x, x, 0.5),
            "normal_kl": (x, x, np.array(0, dtype), np.array(1, dtype)),
            "bernoulli_log_prob": (x, ones),
            "bernoulli_log_prob_dlogits": (x, ones, x),
            "log_softmax": (x,),
            "log_softmax_dx": (x, ones),
        }.items():
            got = getattr(fused, name)(*args)
            expected = _twin(monkeypatch, getattr(fused, name), *args)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_log_softmax_along_other_axes_and_broadcast_arguments():
    x = np.random.default_rng(2).standard_normal((80, 70)).astype(np.float32)
    np.testing.assert_allclose(
        special.log_softmax(x, axis=0), special.log_softmax(x.T.copy()).T, atol=2e-6
    )
    np.testing.assert_allclose(
        special.log_softmax(x, axis=1), special.log_softmax(x.astype(float)), atol=2e-6
    )
    wide = special.bernoulli_log_prob(x[0], np.ones((80, 70), np.float32))
    np.testing.assert_allclose(wide[5], -special.softplus(-x[0]), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_primitives_on_large_arrays_are_differentiable_twice(dtype):
    # Large enough that the first pull-back is a loop; the second goes through NumPy formulas.
    rng = np.random.default_rng(3)
    a = rng.standard_normal((90, 60)).astype(dtype)
    x = rng.integers(0, 2, a.shape).astype(dtype)
    w, v = (rng.standard_normal(a.shape).astype(dtype) for _ in range(2))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-10}
    s = special.expit(a.astype(float))

    def bernoulli(a):
        return np.sum(w * special.bernoulli_log_prob(a, x))

    np.testing.assert_allclose(grad(bernoulli)(a), w * (x - s), **tolerance)
    np.testing.assert_allclose(hvp(bernoulli, (a,), (v,))[0], -w * s * (1 - s) * v, **tolerance)
    total = grad(lambda a: np.sum(special.bernoulli_log_prob(a, x)))
    np.testing.assert_allclose(total(a), x - s, **tolerance)

    def hyperbolic(a):
        return np.sum(w * np.tanh(a))

    t = np.tanh(a.astype(float))
    np.testing.assert_allclose(grad(hyperbolic)(a), w * (1 - t * t), **tolerance)
    twice = -2 * w * t * (1 - t * t) * v
    np.testing.assert_allclose(hvp(hyperbolic, (a,), (v,))[0], twice, **tolerance)

    def divergence(q):
        loc, scale = q
        return np.sum(kl(Normal(loc, scale), Normal(0.0, 1.0)))

    for got, exact in zip(grad(divergence)((a, np.exp(a))), (a, np.exp(a) - np.exp(-a))):
        np.testing.assert_allclose(got, exact, **tolerance)

    def categorical(a):
        return np.sum(w * special.log_softmax(a))

    p = np.exp(special.log_softmax(a.astype(float)))
    rows = w.sum(1, keepdims=True, dtype=float)
    np.testing.assert_allclose(grad(categorical)(a), w - p * rows, **tolerance)
    curvature = -rows * p * (v - np.sum(p * v, axis=1, keepdims=True))
    np.testing.assert_allclose(hvp(categorical, (a,), (v,))[0], curvature, **tolerance)
    if dtype == np.float64:
        check_grads(bernoulli, (a,), order=2)
        check_grads(categorical, (a,), order=2)


def test_loops_agree_with_plain_python():
    loops = compiled.load("transcendental_numba")
    if loops is None:
        pytest.skip("the loops are off")
    rng = np.random.default_rng(4)
    x = (3 * rng.standard_normal((12, 7))).astype(np.float32)
    n = rng.gumbel(size=x.shape).astype(np.float32)
    b = (x > 0).astype(np.float32)
    flat, noise, bits = x.ravel(), n.ravel(), rng.integers(0, 2**16, 84).astype(np.uint16)
    words = rng.integers(-(2**31), 2**31, (2, 12, 7)).astype(np.int32)
    work, totals = np.empty_like(x), np.empty(12, np.float32)
    one, rate = np.ones(1, np.float32), np.float32(2)
    rows, columns = np.empty(12, np.int64), np.empty_like(flat)
    cases = {
        "expit_dx": [flat, noise, columns],
        "tanh_dx": [flat, noise, columns],
        "gate": [flat, noise, flat[3], columns],
        "normal_kl": [flat, np.exp(noise), flat[0], np.exp(flat[1]), columns],
        "bernoulli_log_prob": [flat, b.ravel()[:21], columns],
        "bernoulli_log_prob_dlogits": [flat[:12], b.ravel(), one, columns],
        "log_softmax_dx": [np.ascontiguousarray(transcendental.tanh(x)), n, work],
        "concrete": [x, n, rate, np.empty_like(x), work],
        "logistic": [words[0].ravel(), words[1].ravel(), columns],
        "bernoulli_probs": [np.abs(flat) / 20, bits, columns, np.zeros(84, int)],
        "bernoulli_logits": [flat, bits, columns, np.zeros(84, int)],
        "gumbel_max": [x, n, rows, np.empty((5, 7), np.float32)],
        "categorical": [x, words[0], rows, np.empty((5, 7), np.float32)],
        "conditional_logistic": [flat, b.ravel(), noise, columns],
        "binary_concrete": [flat, noise, rate, columns],
    }
    for name, args in {**cases, "log_softmax": [x, np.empty_like(x), work, totals]}.items():
        kernel = getattr(loops, name)
        again = [np.array(a) if isinstance(a, np.ndarray) else a for a in args]
        kernel(*args)
        getattr(kernel, "py_func", kernel)(*again)
        for a, c in zip(args, again):
            np.testing.assert_allclose(a, c, rtol=1e-5, atol=2e-6, err_msg=name)
