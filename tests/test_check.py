"""The oracles, tried on code that is wrong on purpose: they must reject it."""

import numpy as np
import pytest
from scipy.special import chdtri, ndtri

from minigrad import primitive, stop_gradient
from minigrad.check import check_density, check_grads, check_logdet, check_unbiased

X = np.linspace(0.2, 1.4, 12).reshape(3, 4)


def test_check_grads_accepts_a_right_rule():
    assert check_grads(lambda x, y: np.sin(x) * y["a"], (X, {"a": X[0]}), order=3) < 1e-9


@pytest.mark.parametrize("wrong_by", [1e-3, -1e-3])
def test_check_grads_rejects_a_rule_wrong_by_a_thousandth(wrong_by):
    f = primitive(
        np.exp.__call__, lambda ans, x: lambda g: g * ans * (1 + wrong_by), name="test_wrong_exp"
    )
    with pytest.raises(AssertionError, match=r"order 1.*shapes \(3, 4\).*finite differences give"):
        check_grads(f, (X,))


def test_check_grads_rejects_one_wrong_element():
    mask = np.ones((3, 4))
    mask[2, 1] = 1.001
    f = primitive(np.exp.__call__, lambda ans, x: lambda g: g * ans * mask, name="test_wrong_one")
    with pytest.raises(AssertionError, match="order 1"):
        check_grads(f, (X,))


def test_check_grads_rejects_a_rule_wrong_at_order_two_only():
    # The first derivative is right; its own derivative is that of a function 0.1 % off.
    cos = primitive(
        np.cos.__call__, lambda ans, x: lambda g: -1.001 * g * np.sin(x), name="test_wrong_cos"
    )
    sin = primitive(np.sin.__call__, lambda ans, x: lambda g: g * cos(x), name="test_wrong_sin")
    check_grads(sin, (X,), order=1)
    with pytest.raises(AssertionError, match="the vjp of.*order 2"):
        check_grads(sin, (X,), order=2)


def test_check_grads_rejects_a_rule_for_the_wrong_argument():
    f = primitive(
        np.multiply.__call__,
        lambda ans, x, y: lambda g: g * x,
        lambda ans, x, y: lambda g: g * y,
        name="test_swapped",
    )
    with pytest.raises(AssertionError):
        check_grads(f, (X, X + 1))


def test_check_grads_rejects_nan():
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check_grads(lambda x: np.log(x), (-X,))


RNG = np.random.default_rng(3)
SAMPLES = RNG.normal([1.0, -2.0, 0.5], 1.0, (200_000, 3))
EXACT = np.array([1.0, -2.0, 0.5])


def test_check_unbiased_accepts_and_measures():
    assert check_unbiased(SAMPLES, EXACT) < 4


def test_check_unbiased_rejects_a_bias_of_a_fiftieth():
    with pytest.raises(AssertionError, match=r"biased: coordinate \(1,\).*exact -1.96"):
        check_unbiased(SAMPLES, EXACT * [1, 0.98, 1])


def test_check_unbiased_refuses_to_pass_without_power():
    with pytest.raises(AssertionError, match="no power.*take about"):
        check_unbiased(SAMPLES[:2000], SAMPLES[:2000].mean(0))


def test_check_unbiased_refuses_heavy_tails():
    samples = np.append(np.full(9_999, 1.0) + 1e-3 * RNG.normal(size=9_999), 1.5)
    with pytest.raises(AssertionError, match="one of 10000 samples carries"):
        check_unbiased(samples, samples.mean())


def test_check_unbiased_takes_samples_without_variance_at_their_word():
    assert check_unbiased(np.full((100, 2), [1.0, 2.0]), np.array([1.0, 2.0])) < 1e-3
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(np.full((100, 2), [1.0, 2.0001]), np.array([1.0, 2.0]))


def test_check_unbiased_needs_a_scale_where_the_truth_is_zero():
    with pytest.raises(ValueError, match="scale"):
        check_unbiased(SAMPLES - EXACT, np.zeros(3))
    check_unbiased(SAMPLES - EXACT, np.zeros(3), scale=1.0)
    with pytest.raises(ValueError, match=r"shape \(200000, 3\)"):
        check_unbiased(SAMPLES, np.ones(2))


def normal(x):
    return -0.5 * x**2 - 0.5 * np.log(2 * np.pi)


REALS = (-np.inf, np.inf)


def test_check_density_accepts_the_normal_and_its_samples():
    assert check_density(normal, REALS, samples=RNG.normal(size=20_000)) < 1e-8


def test_check_density_rejects_a_wrong_constant_and_wrong_samples():
    with pytest.raises(AssertionError, match="integrates to 1.0"):
        check_density(lambda x: normal(x) + 1e-4, REALS)
    with pytest.raises(AssertionError, match="do not follow"):
        check_density(normal, REALS, samples=RNG.normal(0, 1.1, 20_000))
    with pytest.raises(AssertionError, match="50 samples lie outside"):
        check_density(
            lambda x: np.log(np.full(x.shape, 0.5)), np.arange(2.0), np.tile([0.0, 1.0, 2.0], 50)
        )


def test_check_density_in_two_dimensions_and_on_discrete_values():
    assert check_density(lambda z: normal(z[..., 0]) + normal(z[..., 1]), [(-8, 8), (-8, 8)]) < 1e-6
    log_p = np.log([0.2, 0.5, 0.3])
    draws = RNG.choice(3, 5_000, p=[0.2, 0.5, 0.3])
    check_density(lambda k: log_p[k], np.arange(3), samples=draws)
    with pytest.raises(AssertionError, match="do not follow"):
        check_density(lambda k: log_p[::-1][k], np.arange(3), samples=draws)


def affine(z):
    a = np.array([[2.0, 1.0], [0.0, -0.5]])
    return z @ a.T + 1, np.zeros(len(z)) + np.log(1.0)


def test_check_logdet_accepts_and_rejects():
    z = RNG.normal(size=(4, 2))
    inverse = lambda x: np.linalg.solve(np.array([[2.0, 1.0], [0.0, -0.5]]), (x - 1).T).T  # noqa: E731
    assert check_logdet(affine, z, inverse) < 1e-8
    with pytest.raises(AssertionError, match=r"wrong log\|det\|"):
        check_logdet(lambda z: (affine(z)[0], affine(z)[1] + 1e-3), z)
    with pytest.raises(AssertionError, match="inverse"):
        check_logdet(affine, z, lambda x: inverse(x) + 1e-3)


# ------------------------------------------------------- the limits lie where the docstrings say


def offset(n, z, coordinates=1):
    """Samples 1 +- 1, whose mean is z standard errors off 1."""
    samples = np.tile([[1.0], [-1.0]], (n // 2, coordinates))
    samples /= samples.std(ddof=1, axis=0)
    return samples + 1 + z / np.sqrt(n)


def test_check_unbiased_draws_its_line_at_the_failure_rate():
    for coordinates in 1, 10:
        limit, exact = -ndtri(1e-6 / (2 * coordinates)), np.ones(coordinates)
        check_unbiased(offset(100_000, 0.99 * limit, coordinates), exact)
        with pytest.raises(AssertionError, match="biased"):
            check_unbiased(offset(100_000, 1.01 * limit, coordinates), exact)


def test_check_unbiased_asks_for_limit_plus_three_errors_in_five_percent():
    # (4.89 + 3) / sqrt(n) = 0.05 at n = 24,907
    check_unbiased(offset(25_200, 0), np.ones(1))
    with pytest.raises(AssertionError, match="take about 249"):
        check_unbiased(offset(24_600, 0), np.ones(1))


def test_check_unbiased_limits_the_share_of_one_sample_to_a_hundredth():
    for outlier, refused in (8.5, False), (9.6, True):  # their deviations are 9.5 and 10.6
        samples = offset(10_000, 0)
        samples[:2] += [[outlier], [-outlier]]
        if refused:
            with pytest.raises(AssertionError, match="carries"):
                check_unbiased(samples, np.ones(1), scale=2.0)
        else:
            check_unbiased(samples, np.ones(1), scale=2.0)


def test_the_oracles_reject_nan():
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(np.where(np.arange(200_000)[:, None] == 7, np.nan, SAMPLES), EXACT)
    with pytest.raises(AssertionError, match="integrates to nan"):
        check_density(lambda x: np.where(x == 1, np.nan, np.log(0.5)), np.arange(2.0))
    z = np.linspace(0.1, 0.8, 8).reshape(4, 2)
    with pytest.raises(AssertionError, match=r"wrong log\|det\|"):
        check_logdet(lambda z: (2 * z, np.full(len(z), np.nan)), z)
    with pytest.raises(AssertionError, match="inverse"):
        check_logdet(lambda z: (2 * z, np.full(len(z), np.log(4))), z, lambda x: x * np.nan)


def test_check_density_allows_the_integral_a_millionth():
    check_density(lambda x: normal(x) + np.log1p(0.9e-6), REALS)
    for error in 1.1e-6, -1.1e-6:
        with pytest.raises(AssertionError, match="integrates to"):
            check_density(lambda x, e=error: normal(x) + np.log1p(e), REALS)


def test_check_density_has_a_cell_less_than_degrees_of_freedom():
    n, critical = 1000, chdtri(3, 1e-6)  # four equally likely values: three degrees of freedom
    log_p = lambda x: np.full(x.shape, np.log(0.25))
    for factor, wrong in (0.97, False), (1.03, True):
        d = np.sqrt(factor * critical / n)  # counts n/4 (1 +- d): chi-squared = n d^2
        up = round(n / 4 * (1 + d))
        samples = np.repeat(np.arange(4.0), [up, n // 2 - up, up, n // 2 - up])
        if wrong:
            with pytest.raises(AssertionError, match="on 3 degrees of freedom"):
                check_density(log_p, np.arange(4.0), samples)
        else:
            check_density(log_p, np.arange(4.0), samples)


def test_check_density_notices_a_few_samples_outside():
    samples = np.random.default_rng(0).exponential(size=50_000)
    samples[:30] = -1
    with pytest.raises(AssertionError, match="30 samples lie outside"):
        check_density(lambda x: -x, (0.0, np.inf), samples)


def test_check_logdet_rejects_errors_that_cancel_and_one_bad_point():
    z = np.linspace(0.1, 0.8, 8).reshape(4, 2)
    for wrong in [1e-3, -1e-3, 1e-3, -1e-3], [0, 0, 0, 2e-6]:
        with pytest.raises(AssertionError, match=r"wrong log\|det\|"):
            check_logdet(lambda z, wrong=wrong: (2 * z, np.log(4) + np.array(wrong)), z)
    with pytest.raises(AssertionError, match="inverse"):
        check_logdet(lambda z: (2 * z, np.full(4, np.log(4))), z, lambda x: x / 2 + 2e-6)


def test_check_grads_rejects_a_rule_that_detaches_its_cotangent():
    sin = primitive(
        np.sin.__call__, lambda ans, x: lambda g: stop_gradient(g) * np.cos(x), name="test_detached"
    )
    check_grads(sin, (X,), order=1)
    with pytest.raises(AssertionError, match="the vjp of.*order 2"):
        check_grads(sin, (X,), order=2)
