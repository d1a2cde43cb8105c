"""Noise has the right law, tails included; gamma and beta draws move as their quantiles do."""

import numpy as np
import pytest
from scipy import special, stats

from minigrad import grad, jvp, random, vjp
from minigrad.check import check_grads

FAILURE_RATE = 1e-6  # of each goodness-of-fit test on a correct sampler; the seeds are fixed

NOISE = {
    "normal": (random.normal, stats.norm()),
    "uniform": (random.uniform, stats.uniform()),
    "exponential": (random.exponential, stats.expon()),
    "gumbel": (random.gumbel, stats.gumbel_r()),
    "logistic": (random.logistic, stats.logistic()),
    "gamma(0.3)": (lambda rng, n, dtype: random.gamma(rng, dtype(0.3), n), stats.gamma(0.3)),
    "gamma(4)": (lambda rng, n, dtype: random.gamma(rng, dtype(4), n), stats.gamma(4)),
    "beta": (lambda rng, n, dtype: random.beta(rng, dtype(0.7), dtype(2), n), stats.beta(0.7, 2)),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", NOISE)
def test_noise_has_its_law(name, dtype):
    draw, law = NOISE[name]
    x = draw(np.random.default_rng(1), 50_000, dtype)
    assert x.dtype == dtype and x.shape == (50_000,)
    assert stats.kstest(x, law.cdf).pvalue > FAILURE_RATE
    assert stats.kstest(1.1 * x, law.cdf).pvalue < FAILURE_RATE


def _tail_grid_pvalue(gumbel):
    """Test that the right tail is continuous: $e^{-G}$ does not sit on multiples of 2^-24."""
    position = np.exp(-gumbel[gumbel > 9].astype(np.float64)) * 2**24
    return stats.kstest(position % 1, "uniform").pvalue


def test_float32_gumbel_tail_is_not_that_of_float32_uniforms():
    rng = np.random.default_rng(2)
    n = 1_000_000
    assert _tail_grid_pvalue(random.gumbel(rng, n, np.float32)) > FAILURE_RATE
    u = rng.random(n, np.float32)
    naive = -np.log1p(-u)
    with np.errstate(divide="ignore"):  # u = 0
        assert _tail_grid_pvalue(-np.log(naive)) < FAILURE_RATE


@pytest.mark.parametrize("name", ["uniform", "exponential", "gumbel", "logistic"])
def test_float32_noise_is_float64_noise_to_six_digits(name):
    draw = NOISE[name][0]
    single, double = (draw(np.random.default_rng(3), 10_000, d) for d in (np.float32, np.float64))
    np.testing.assert_allclose(single, double, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("draw", [random.uniform, random.exponential, random.gumbel])
def test_float16_noise_is_float16_and_inside_the_support(draw):
    x = draw(_Constant(0.0), 5, np.float16)
    assert x.dtype == np.float16 and np.all(np.isfinite(x))
    assert draw is random.gumbel or np.all(x > 0)


def test_logistic_tails_are_symmetric_and_long():
    x = random.logistic(np.random.default_rng(4), 2_000_000, np.float32)
    for tail in x, -x:
        count, expected = np.sum(tail > 10), len(x) * special.expit(-10.0)
        assert abs(count - expected) < 5 * np.sqrt(expected)


class _Constant(np.random.Generator):
    """A generator all of whose draws are one number."""

    def __init__(self, value):
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, shape=()):
        return np.full(shape, self.value)

    standard_exponential = random

    def integers(self, low, high, size, dtype):  # noqa: ARG002
        assert low == 0 and high == 2**64
        return np.full(size, int(self.value * 2.0**64), dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_noise_is_finite_at_the_ends_of_the_generator(dtype):
    for u in 0.0, 1 - 2.0**-53:
        x = random.uniform(_Constant(u), 3, dtype)
        assert x.dtype == dtype and np.all((x > 0) & (x < 1))
    for draw in random.exponential, random.gumbel, random.logistic:
        assert np.all(np.isfinite(draw(_Constant(0.0), 3, dtype)))


def test_shapes_and_seeds():
    concentration = np.ones((4, 1))
    assert random.gamma(np.random.default_rng(0), concentration).shape == (4, 1)
    assert random.gamma(np.random.default_rng(0), concentration, 2).shape == (2, 4, 1)
    assert random.beta(np.random.default_rng(0), concentration, np.ones(3), (2,)).shape == (2, 4, 3)
    assert random.categorical(np.random.default_rng(0), np.zeros((4, 3)), (2, 5)).shape == (2, 5, 4)
    assert random.bernoulli(np.random.default_rng(0), np.zeros(3), shape=2).shape == (2, 3)
    a, b = (random.gumbel(np.random.default_rng(5), 9) for _ in range(2))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("rng", [0, None, np.random])
def test_only_a_generator_is_an_rng(rng):
    draws = [
        lambda: random.normal(rng),
        lambda: random.logistic(rng, 3),
        lambda: random.gamma(rng, 1.0),
        lambda: random.beta(rng, 1.0, 1.0),
        lambda: random.bernoulli(rng, 0.0),
        lambda: random.categorical(rng, np.zeros(2)),
        lambda: random.negative_binomial(rng, 1.0, 0.5),
    ]
    for draw in draws:
        with pytest.raises(TypeError, match="default_rng"):
            draw()


# ------------------------------------------------------------------------------------- discrete


def test_bernoulli_draws_have_their_probability():
    logits = np.array([-3.0, 0.0, 2.0], np.float32)
    n = 100_000
    for kwargs in {"logits": logits}, {"probs": special.expit(logits)}:
        x = random.bernoulli(np.random.default_rng(6), shape=n, **kwargs)
        assert x.dtype == np.float32 and set(np.unique(x)) == {0, 1}
        p = special.expit(logits)
        z = (x.mean(0, np.float64) - p) / np.sqrt(p * (1 - p) / n)
        assert np.max(np.abs(z)) < 5
    for arguments in {}, {"logits": logits, "probs": logits}:
        with pytest.raises(TypeError, match="either logits or probs"):
            random.bernoulli(np.random.default_rng(0), **arguments)


class _Ones(np.random.Generator):
    """A generator all of whose bits are 1: its uniforms are as near to 1 as can be."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def integers(self, low, high, size, dtype):  # noqa: ARG002
        return np.full(size, high - 1, dtype)


def test_bernoulli_of_a_large_float32_logit_can_fail():
    # expit(18) rounds to 1 in float32; a uniform above it must still give 0.
    for shape in 3, 10_000:
        assert np.all(random.bernoulli(_Ones(), np.float32(18), shape) == 0)
        assert np.all(random.bernoulli(_Ones(), np.float32(100), shape) == 1)


def test_categorical_draws_have_their_probabilities():
    logits = np.array([[0.5, -1.0, 2.0, -np.inf], [0.0, 0.0, 0.0, 0.0]], np.float32)
    x = random.categorical(np.random.default_rng(7), logits, 40_000)
    assert x.dtype.kind == "i" and x.shape == (40_000, 2)
    probs = special.softmax(logits.astype(np.float64), axis=-1)
    counts = np.stack([np.bincount(column, minlength=4) for column in x.T])
    assert counts[0, 3] == 0
    assert stats.chisquare(counts[0, :3], 40_000 * probs[0, :3]).pvalue > FAILURE_RATE
    assert stats.chisquare(counts[1], 40_000 * probs[1]).pvalue > FAILURE_RATE
    wrong = special.softmax(1.1 * logits[0, :3])
    assert stats.chisquare(counts[0, :3], 40_000 * wrong).pvalue < FAILURE_RATE


# ------------------------------------------------------------------- implicit reparameterisation


def test_gamma_sample_moves_as_the_quantile():
    rng = np.random.default_rng(8)
    a, u = rng.uniform(0.2, 20, 50), rng.uniform(0.01, 0.99, 50)
    z = special.gammaincinv(a, u)
    (slope,) = vjp(lambda a: random.gamma_sample(a, z), a)[1](np.ones(50))
    h = 1e-4 * a
    numeric = (special.gammaincinv(a + h, u) - special.gammaincinv(a - h, u)) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)


def test_beta_sample_moves_as_the_quantile():
    rng = np.random.default_rng(9)
    a, b, u = rng.uniform(0.3, 9, 50), rng.uniform(0.3, 9, 50), rng.uniform(0.01, 0.99, 50)
    z = special.betaincinv(a, b, u)
    slopes = vjp(lambda a, b: random.beta_sample(a, b, z), a, b)[1](np.ones(50))
    h = 1e-4
    q = special.betaincinv
    numeric_a = (q(a + h, b, u) - q(a - h, b, u)) / (2 * h)
    numeric_b = (q(a, b + h, u) - q(a, b - h, u)) / (2 * h)
    np.testing.assert_allclose(slopes[0], numeric_a, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(slopes[1], numeric_b, rtol=1e-6, atol=1e-8)


def test_gamma_and_beta_draws_are_differentiable_once_only():
    a = np.array([0.5, 3.0])
    for total in (
        lambda a: np.sum(random.gamma(np.random.default_rng(0), a, 5)),
        lambda a: np.sum(random.beta(np.random.default_rng(0), a, 2.0, 5)),
    ):
        assert np.all(np.isfinite(grad(total)(a)))
        assert grad(total)(a.astype(np.float32)).dtype == np.float32
        with pytest.raises(NotImplementedError, match="once"):
            grad(lambda a, total=total: np.sum(grad(total)(a)))(a)
        with pytest.raises(NotImplementedError, match="once"):
            jvp(total, (a,), (a,))


def test_gradient_sums_over_draws_and_broadcasting():
    def total(a, b):
        return np.sum(random.beta(np.random.default_rng(0), a, b, 7))

    a, b = np.full((3, 1), 0.8), np.array([1.5, 2.5])
    da, db = grad(total, (0, 1))(a, b)
    wide = grad(total, (0, 1))(*(np.array(v) for v in np.broadcast_arrays(a, b)))
    np.testing.assert_allclose(da, wide[0].sum(1, keepdims=True))
    np.testing.assert_allclose(db, wide[1].sum(0))
    z = 0.3 * np.ones((7, 3, 2))
    with pytest.raises(AssertionError):  # the value is constant: only the quantile moves
        check_grads(lambda a: random.beta_sample(a, b, z), (a,), order=1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_draws_of_tiny_concentration_stay_inside_the_support(dtype):
    rng = np.random.default_rng(10)
    a = np.full(1000, 1e-3, dtype)
    z = random.gamma(rng, a)
    tiny = np.finfo(dtype).tiny
    assert z.min() == tiny
    # P(z < tiny) = P(a, tiny) is what the docstring says: about tiny^a.
    share, exact = np.mean(z == tiny), special.gammainc(1e-3, float(tiny))
    assert abs(share - exact) < 5 * np.sqrt(exact * (1 - exact) / 1000)
    x = random.beta(rng, a, a)
    assert np.all((x > 0) & (x < 1)) and np.all(np.isfinite(np.log(x) + np.log1p(-x)))
    slope = grad(lambda a: np.sum(random.gamma(np.random.default_rng(0), a)))(a)
    assert np.all(np.isfinite(slope))


def test_a_shape_may_be_a_numpy_integer():
    for n in np.int64(3), np.int32(3), 3, (3,):
        assert random.gamma(np.random.default_rng(0), np.ones(2), n).shape == (3, 2)
