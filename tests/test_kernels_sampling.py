"""Samplers have their laws, tails included; kernels and twins draw the same from the same bits."""

import numpy as np
import pytest
from scipy import special, stats
from threadpoolctl import threadpool_limits

from minigrad.kernels import compiled, sampling

FAILURE_RATE = 1e-6  # of each goodness-of-fit test on a correct sampler; the seeds are fixed
N = 20_000


def _rng(seed=0):
    return np.random.default_rng(seed)


def _twin(monkeypatch, f, *args, **kwargs):
    with monkeypatch.context() as m:
        m.setattr(compiled, "load", lambda name: None)
        return f(*args, **kwargs)


def _logits(dtype=np.float32, shape=N):
    return (2 * _rng(9).standard_normal(shape)).astype(dtype)


def _noise(draw, shape=N):
    return draw(_rng(8), shape).astype(np.float32)


def _logistic(rng, shape):
    return rng.logistic(size=shape)


def _gumbel(rng, shape):
    return rng.gumbel(size=shape)


class _Words(np.random.Generator):
    """A generator of given 64-bit words, the last of them for ever."""

    def __init__(self, *words):
        super().__init__(np.random.PCG64(0))
        self.words = list(words)

    def integers(self, low, high, size, dtype):
        assert (low, high) == (0, 2**64)
        word = self.words.pop(0) if len(self.words) > 1 else self.words[0]
        return np.full(size, word, dtype)


# ------------------------------------------------------------------------------------- discrete


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bernoulli_kernel_and_twin_draw_the_same(monkeypatch, dtype):
    logits = _logits(dtype)
    logits[:7] = np.nan, np.inf, -np.inf, 1e30, -1e30, 0, 20
    for kwargs in {"logits": logits}, {"probs": special.expit(logits)}:
        a, b = _rng(), _rng()
        x = sampling.bernoulli(a, **kwargs)
        y = _twin(monkeypatch, sampling.bernoulli, b, **kwargs)
        assert x.dtype == dtype and np.array_equal(x, y) and set(np.unique(x)) == {0, 1}
        assert x[:3].tolist() == [0, 1, 0]
        assert a.bit_generator.state == b.bit_generator.state


def test_bernoulli_has_its_law():
    p = np.array([0.0, 1e-4, 0.1, 1 / 3, 0.5, 0.999, 1.0])
    x = sampling.bernoulli(_rng(1), shape=(300_000, 7), probs=p.astype(np.float32)).mean(0)
    assert x[0] == 0 and x[-1] == 1
    z = (x - p)[1:-1] / np.sqrt(p * (1 - p) / 300_000)[1:-1]
    assert np.max(np.abs(z)) < 5
    # A probability wrong by 1 % would be seen.
    assert np.max(np.abs(z - 0.01 * np.sqrt(300_000 * p[1:-1] / (1 - p[1:-1])))) > 5


@pytest.mark.parametrize("n", [3, 5000])
def test_bernoulli_draws_more_bits_where_sixteen_are_too_few(n):
    # All 16-bit numbers are 0x8000 = 2^15: u is from 1/2 to 1/2 + 2^-16, and then the next bits.
    first = 0x8000800080008000
    p = np.full(n, 0.5 + 0.25 * 2.0**-16)
    for more, drawn in (0, 1), (2**64 // 4 - 2**11, 1), (2**64 // 4, 0), (2**64 - 1, 0):
        assert np.all(sampling.bernoulli(_Words(first, more), probs=p) == drawn)
    # A probability of 1e-12 needs the first 16 bits to be 0, then the next 24 nearly so.
    for more, drawn in (0, 1), (2**40, 1), (2**41, 0):
        x = sampling.bernoulli(_Words(0, more), probs=np.full(n, 1e-12))
        assert np.all(x == drawn), more


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 10, 1000])
def test_categorical_kernel_and_twin_draw_the_same(monkeypatch, k, dtype):
    logits = _logits(dtype, (40_000 // k, k))
    a, b = _rng(), _rng()
    x = sampling.categorical(a, logits)
    y = _twin(monkeypatch, sampling.categorical, b, logits)
    # float32 decides differently only where two values are nearly equal.
    assert x.dtype == y.dtype and np.sum(x != y) <= 1
    assert a.bit_generator.state == b.bit_generator.state


@pytest.mark.parametrize("n", [300, 60_000])
def test_categorical_has_its_law(n):
    logits = np.array([0.5, -1.0, 2.0, -np.inf, -4.0], np.float32)
    x = sampling.categorical(_rng(3), logits, (n,))
    counts = np.bincount(x, minlength=5)
    assert counts[3] == 0
    keep = [0, 1, 2, 4]
    p = special.softmax(logits[keep].astype(float))
    assert stats.chisquare(counts[keep], n * p).pvalue > FAILURE_RATE
    if n == 60_000:
        wrong = special.softmax(1.1 * logits[keep].astype(float))
        assert stats.chisquare(counts[keep], n * wrong).pvalue < FAILURE_RATE


def test_categorical_draws_what_is_rare():
    logits = np.array([0.0, -8.0], np.float32)
    count = np.sum(sampling.categorical(_rng(4), logits, (100_000,)))
    expected = 100_000 * special.expit(-8.0)
    assert abs(count - expected) < 5 * np.sqrt(expected)
    # float32 uniforms would never draw a class of e^-20; here the bits are chosen so that it is.
    for n in 1, 5000:
        # Per row the bits (0x40000000, 0): E = -log(1 - 1/4) and one below 2^-32.
        for k, gap in enumerate([-20.0, -24.0, -60.0]):
            rng = _Words(0x0000000040000000, 0)
            rows = np.full((n, 2), [0.0, gap], np.float32)
            drawn = sampling.categorical(rng, rows)
            assert np.all(drawn == (gap > -59)), (k, gap)


def test_a_nan_logit_counts_as_the_largest():
    logits = np.zeros((2000, 5), np.float32)
    logits[7, 3] = logits[7, 4] = np.nan
    noise = _noise(_gumbel, (2000, 5))
    for n in 2000, 20:
        assert sampling.categorical(_rng(), logits[:n])[7] == 3
        assert sampling.gumbel_max(logits[:n], noise[:n])[7] == 3


def test_gumbel_max_is_the_argmax(monkeypatch):
    for k in 1, 3, 10, 700:
        logits, noise = _logits(shape=(21_000 // k, k)), _noise(_gumbel, (21_000 // k, k))
        logits[0] = -np.inf
        x = sampling.gumbel_max(logits, noise)
        assert np.array_equal(x, np.argmax(logits + noise, axis=-1))
        assert np.array_equal(x, _twin(monkeypatch, sampling.gumbel_max, logits, noise))
    ties = np.zeros((6, 20, 50), np.float32)
    assert np.all(sampling.gumbel_max(ties, ties) == 0)


# ------------------------------------------------------------------------------------- logistic


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1000, 200_000])
def test_logistic_has_its_law(n, dtype):
    x = sampling.logistic(_rng(5), (n,), dtype)
    assert x.dtype == dtype
    assert stats.kstest(x, stats.logistic.cdf).pvalue > FAILURE_RATE
    if n > 1000:
        assert stats.kstest(1.05 * x, stats.logistic.cdf).pvalue < FAILURE_RATE
        for tail in x, -x:
            count, expected = np.sum(tail > 7), n * special.expit(-7.0)
            assert abs(count - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("n", [1, 5000])
def test_logistic_tails_are_exact_to_their_ends(n):
    # Bits of one halfword for all: h = (2^32 + 1) w / 2^64, the uniform h or 1 - h.
    for word in 0, 1, 2**13, 2**24 + 1, 2**29, 2**31 - 1:
        h = ((word << 32) + word + 0.5) * 2.0**-64
        exact = np.log(h) - np.log1p(-h)
        for dtype, rtol in (np.float32, 4e-7), (np.float64, 1e-14):
            low = sampling.logistic(_Words((word << 32) | word), (n,), dtype)
            flipped = (word << 32 | word) ^ (2**64 - 1)
            high = sampling.logistic(_Words(flipped), (n,), dtype)
            np.testing.assert_allclose(low, exact, rtol=rtol, atol=1e-7 if rtol > 1e-9 else 1e-15)
            assert np.array_equal(high, -low)


# ---------------------------------------------------------------------------------- relaxations


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_relaxations_agree_with_their_formulas(monkeypatch, dtype):
    a, noise = _logits(dtype), _noise(_logistic).astype(dtype)
    b = (_rng(7).random(N) < 0.5).astype(dtype)
    rows, gumbels = a.reshape(-1, 20), _noise(_gumbel, (N // 20, 20)).astype(dtype)
    wide = [v.astype(float) for v in (a, noise, b, rows, gumbels)]
    v = special.expit(wide[1])
    s = special.expit(wide[0])
    u = np.where(b == 1, v * s + (1 - s), v * (1 - s))
    exact = {
        "binary_concrete": ((a, noise, 0.3), special.expit((wide[0] + wide[1]) / 0.3)),
        "concrete": ((rows, gumbels, 0.3), special.softmax((wide[3] + wide[4]) / 0.3, axis=-1)),
        "conditional_logistic": ((a, b, noise), wide[0] + special.logit(u)),
    }
    tolerance = {"rtol": 3e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 1e-9}
    for name, (args, value) in exact.items():
        got, twin = (
            getattr(sampling, name)(*args),
            _twin(monkeypatch, getattr(sampling, name), *args),
        )
        assert got.dtype == twin.dtype == dtype
        np.testing.assert_allclose(got, value, **tolerance, err_msg=name)
        np.testing.assert_allclose(twin, value, **tolerance, err_msg=name)


@pytest.mark.parametrize("n", [2000, 40_000])
def test_conditional_logistic_is_the_law_of_z_given_b(n):
    a = np.full(n, 1.3, np.float32)
    noise = _logistic(_rng(10), n).astype(np.float32)
    z = a + noise
    again = sampling.conditional_logistic(
        a, (z > 0).astype(np.float32), _logistic(_rng(11), n).astype(np.float32)
    )
    assert np.array_equal(again > 0, z > 0)
    assert np.abs(np.corrcoef(again[z > 0], z[z > 0])[0, 1]) < 5 / np.sqrt(n / 2)
    # b and z | b together have the law of z; with b from another law they do not.
    assert stats.kstest(again, stats.logistic(1.3).cdf).pvalue > FAILURE_RATE
    other = sampling.conditional_logistic(a, (noise > 0).astype(np.float32), noise[::-1].copy())
    assert stats.kstest(other, stats.logistic(1.3).cdf).pvalue < FAILURE_RATE


@pytest.mark.parametrize("n", [1000, 10_000])
def test_conditional_logistic_is_stable_at_the_ends(n):
    for a, b, noise, exact in [
        (90, 1, 0, 90),
        (-90, 1, 0, np.log1p(1 + np.exp(-90))),  # v = 1/2: a hardly matters
        (90, 0, 0, -np.log(2)),
        (-90, 0, 0, -90),
        (90, 1, -100, np.log1p(np.exp(-10))),
        (0, 0, -80, -80 - np.log(2)),
    ]:
        z = sampling.conditional_logistic(*(np.full(n, v, np.float32) for v in (a, b, noise)))
        np.testing.assert_allclose(z, exact, rtol=2e-5)


def test_conditional_gumbel_is_the_law_of_z_given_its_argmax():
    n, logits = 40_000, np.array([0.3, -1.0, 1.5])
    g, h = (_gumbel(_rng(seed), (n, 3)) for seed in (12, 13))
    index = np.argmax(logits + g, axis=-1)
    z = sampling.conditional_gumbel(np.broadcast_to(logits, (n, 3)), index, h)
    assert np.array_equal(np.argmax(z, axis=-1), index)
    for k in range(3):
        law = stats.gumbel_r(logits[k])
        assert stats.kstest(z[:, k], law.cdf).pvalue > FAILURE_RATE
        shuffled = sampling.conditional_gumbel(np.broadcast_to(logits, (n, 3)), index[::-1] * 0, h)
        assert stats.kstest(shuffled[:, k], law.cdf).pvalue < FAILURE_RATE


# -------------------------------------------------------------------------------------- threads


def test_no_draw_is_shared_between_the_blocks_of_the_threads():
    n, k = 8 * sampling.BLOCK, 8
    rng = np.random.default_rng(3)
    logits = np.zeros((n // k, k), np.float32)
    draws = {
        "bernoulli": sampling.bernoulli(rng, np.zeros(n, np.float32)) - 0.5,
        "logistic": sampling.logistic(rng, (n,), np.float32),
        "categorical": sampling.categorical(rng, logits) - (k - 1) / 2,
    }
    for name, values in draws.items():
        blocks = values.reshape(8, -1)
        correlation = np.corrcoef(blocks)[np.triu_indices(8, 1)]
        assert np.max(np.abs(correlation)) < 5 / np.sqrt(blocks.shape[1]), name


def test_draws_are_the_same_at_any_number_of_threads():
    loops = compiled.load("transcendental_numba")
    if loops is None or not hasattr(loops.exp, "py_func"):
        pytest.skip("arrays large enough for two threads take too long without compiled loops")
    a = _logits(shape=(30_000, 10))
    draws = {
        "bernoulli": lambda: sampling.bernoulli(_rng(), a),
        "categorical": lambda: sampling.categorical(_rng(), a),
        "logistic": lambda: sampling.logistic(_rng(), a.shape, np.float32),
        "concrete": lambda: sampling.concrete(a, a[::-1].copy(), 0.5),
    }
    for name, draw in draws.items():
        with threadpool_limits(1):
            one = draw()
        with threadpool_limits(2):
            assert np.array_equal(one, draw()), name
