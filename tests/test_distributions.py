"""One table of distributions, each held against SciPy, quadrature, its own sampler and kl.

The reference of an entry is a frozen `scipy.stats` distribution made from the same parameters; the
laws that SciPy lacks (logit-normal, binary Concrete, mixtures) are put together here from it.
"""

import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from scipy import integrate, special, stats

from minigrad import distributions as D
from minigrad import grad, stop_gradient, tree, value_and_grad, vjp
from minigrad.check import check_density, check_grads, check_unbiased
from minigrad.special import log_softmax, normal_log_prob, softmax

FAILURE_RATE = 1e-6  # of a goodness-of-fit test on a correct sampler; the seeds are fixed


class LogitLaw:
    """The law of expit(y), where y has the frozen distribution `base`."""

    def __init__(self, base):
        self.base = base

    def logpdf(self, x):
        return self.base.logpdf(special.logit(x)) - np.log(x) - np.log1p(-x)

    def cdf(self, x):
        return self.base.cdf(special.logit(x))

    def _moment(self, k):
        return self.base.expect(lambda y: special.expit(y) ** k)

    def mean(self):
        return self._moment(1)

    def var(self):
        return self._moment(2) - self._moment(1) ** 2

    def std(self):
        return np.sqrt(self.var())


class MixtureLaw:
    def __init__(self, weights, laws):
        self.weights, self.laws = weights, laws

    def _sum(self, f):
        return sum(w * f(law) for w, law in zip(self.weights, self.laws))

    def logpdf(self, x):
        return np.log(self._sum(lambda law: law.pdf(x)))

    def logpmf(self, x):
        return np.log(self._sum(lambda law: law.pmf(x)))

    def cdf(self, x):
        return self._sum(lambda law: law.cdf(x))

    def mean(self):
        return self._sum(lambda law: law.mean())

    def std(self):
        return np.sqrt(self.var())

    def var(self):
        return self._sum(lambda law: law.var() + law.mean() ** 2) - self.mean() ** 2


def _normal_mixture(logits, components):
    loc, scale = components
    return MixtureLaw(special.softmax(logits), [stats.norm(m, s) for m, s in zip(loc, scale)])


def _count_mixture(logits, components):
    r, p = components
    return MixtureLaw(special.softmax(logits), [stats.nbinom(a, 1 - b) for a, b in zip(r, p)])


class Case(NamedTuple):
    dist: NamedTuple
    law: object  # parameters -> reference
    support: object  # (low, high), or the array of values


REAL, POSITIVE, UNIT = (-np.inf, np.inf), (0.0, np.inf), (0.0, 1.0)
GAMMA = lambda a, b: stats.gamma(a, scale=1 / b)  # noqa: E731
CASES = {
    "Normal": Case(D.Normal(0.7, 1.3), stats.norm, REAL),
    "Gumbel": Case(D.Gumbel(-0.4, 0.8), stats.gumbel_r, REAL),
    "Logistic": Case(D.Logistic(0.5, 0.6), stats.logistic, REAL),
    "LogNormal": Case(
        D.LogNormal(0.3, 0.3), lambda m, s: stats.lognorm(s, scale=np.exp(m)), POSITIVE
    ),
    "LogitNormal": Case(D.LogitNormal(0.4, 0.9), lambda *p: LogitLaw(stats.norm(*p)), UNIT),
    "BinaryConcrete": Case(
        D.BinaryConcrete(0.7, 0.5), lambda t, a: LogitLaw(stats.logistic(a / t, 1 / t)), UNIT
    ),
    "Gamma": Case(D.Gamma(2.5, 1.7), GAMMA, POSITIVE),
    "Gamma, small": Case(D.Gamma(0.6, 0.5), GAMMA, POSITIVE),
    "Beta": Case(D.Beta(2.3, 1.4), stats.beta, UNIT),
    "Beta, small": Case(D.Beta(0.6, 0.8), stats.beta, UNIT),
    "Mixture": Case(
        D.Mixture(
            np.array([0.2, -0.4, 1.0]),
            D.Normal(np.array([-2.0, 0.5, 2.5]), np.array([0.6, 1.1, 0.8])),
        ),
        _normal_mixture,
        REAL,
    ),
    "Bernoulli": Case(D.Bernoulli(-0.6), lambda a: stats.bernoulli(special.expit(a)), np.arange(2)),
    "Categorical": Case(
        D.Categorical(np.array([0.5, -1.0, 1.5, 0.0])),
        lambda a: stats.rv_discrete(values=(np.arange(4), special.softmax(a))),
        np.arange(4),
    ),
    "NegativeBinomial": Case(
        D.NegativeBinomial(1.8, 0.4), lambda r, p: stats.nbinom(r, 1 - p), np.arange(80)
    ),
    "Mixture of counts": Case(
        D.Mixture(
            np.array([0.3, -0.2]), D.NegativeBinomial(np.array([0.7, 6.0]), np.array([0.3, 0.5]))
        ),
        _count_mixture,
        np.arange(120),
    ),
}
CONTINUOUS = [name for name, case in CASES.items() if isinstance(case.support, tuple)]
DISCRETE = [name for name in CASES if name not in CONTINUOUS]
PATHWISE = [name for name in CONTINUOUS if name != "Mixture"]


def _points(case, n=41):
    """Return points of the support, tails included."""
    if not isinstance(case.support, tuple):
        return case.support
    tail = np.linspace(-8, 8, n)
    return {REAL: tail, POSITIVE: np.exp(tail - 2), UNIT: special.expit(tail)}[case.support]


def _draws(name, n, seed=0):
    return CASES[name].dist.sample(np.random.default_rng(seed), n)


# ---------------------------------------------------------------------------- SciPy and quadrature


@pytest.mark.parametrize("name", CASES)
def test_log_prob_agrees_with_scipy(name):
    case = CASES[name]
    x = _points(case)
    law = case.law(*case.dist)
    exact = law.logpdf(x) if name in CONTINUOUS else law.logpmf(x)
    np.testing.assert_allclose(case.dist.log_prob(x), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_density_integrates_to_one_and_is_that_of_the_sampler(name):
    case = CASES[name]
    check_density(case.dist.log_prob, case.support, _draws(name, 50_000), FAILURE_RATE)


@pytest.mark.parametrize("name", CASES)
def test_sampler_of_wrong_parameters_is_rejected(name):
    case = CASES[name]
    wrong = tree.map(lambda p: 1.1 * p, case.dist)
    with pytest.raises(AssertionError, match="do not follow"):
        samples = wrong.sample(np.random.default_rng(0), 50_000)
        check_density(case.dist.log_prob, case.support, samples, FAILURE_RATE)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_samples_have_the_cdf_of_scipy(name):
    case = CASES[name]
    assert stats.kstest(_draws(name, 50_000), case.law(*case.dist).cdf).pvalue > FAILURE_RATE


@pytest.mark.parametrize("name", CASES)
def test_moments_and_entropy_are_exact_or_refused(name):
    case = CASES[name]
    law = case.law(*case.dist)
    refused = {
        "LogitNormal": {"mean", "variance", "entropy"},
        "BinaryConcrete": {"mean", "variance", "entropy"},
        "Categorical": {"mean", "variance"},
        "Mixture": {"entropy"},
        "Mixture of counts": {"entropy"},
        "NegativeBinomial": {"entropy"},
    }.get(name, set())
    for quantity in "mean", "variance", "entropy":
        method = getattr(case.dist, quantity)
        if quantity in refused:
            with pytest.raises(NotImplementedError, match=r"np\.mean|np\.var|softmax\(logits\)"):
                method()
        else:
            exact = getattr(law, {"variance": "var"}.get(quantity, quantity))()
            np.testing.assert_allclose(method(), exact, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "Categorical"])
def test_moments_are_those_of_the_samples(name):
    case = CASES[name]
    law = case.law(*case.dist)
    x = (_draws(name, 400_000) - law.mean()) / law.std()
    check_unbiased(np.stack([x, x * x], axis=1), np.array([0.0, 1.0]))


@pytest.mark.parametrize("name", ["Normal", "Gumbel", "Logistic", "Gamma", "Beta", "Bernoulli"])
def test_entropy_is_the_mean_of_minus_log_prob(name):
    case = CASES[name]
    check_unbiased(-case.dist.log_prob(_draws(name, 50_000)), case.dist.entropy(), scale=1.0)


# ------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("name", CONTINUOUS)
def test_log_prob_is_differentiable_twice_in_value_and_parameters(name):
    case = CASES[name]
    x = {
        REAL: np.array([-1.1, 0.2, 2.3]),
        POSITIVE: np.array([0.5, 1.1, 3.0]),
        UNIT: np.array([0.3, 0.5, 0.72]),
    }[case.support]
    check_grads(lambda d, x: d.log_prob(x), (case.dist, x))


@pytest.mark.parametrize("name", DISCRETE)
def test_log_prob_is_differentiable_twice_in_parameters(name):
    case = CASES[name]
    check_grads(lambda d: d.log_prob(case.support[:6]), (case.dist,))


@pytest.mark.parametrize("quantity", ["mean", "variance", "entropy"])
def test_moments_and_entropy_are_differentiable_twice(quantity):
    for case in CASES.values():
        try:
            getattr(case.dist, quantity)()
        except NotImplementedError:
            continue
        check_grads(lambda d: getattr(d, quantity)(), (case.dist,))


@pytest.mark.parametrize("name", PATHWISE)
def test_samples_move_along_quantiles(name):
    r"""A pathwise derivative is $-\partial_\theta F(z; \theta) / p(z; \theta)$, draw by draw."""
    case = CASES[name]
    n = 40
    params = type(case.dist)(*(np.full(n, float(p)) for p in case.dist))
    z, pullback = vjp(lambda d: d.sample(np.random.default_rng(3)), params)
    (slopes,) = pullback(np.ones(n))
    density = np.exp(case.dist.log_prob(z))
    for i, slope in enumerate(slopes):
        h = 1e-5
        up, down = (
            case.law(*(p + t * (i == j) for j, p in enumerate(case.dist))).cdf(z) for t in (h, -h)
        )
        # An error of 1e-11 in the cdf of SciPy becomes 1e-6 by the step.
        np.testing.assert_allclose(slope * density, -(up - down) / (2 * h), rtol=1e-6, atol=2e-9)


@pytest.mark.parametrize("name", PATHWISE)
def test_pathwise_gradients_of_the_mean_and_mean_deviation_are_unbiased(name):
    case = CASES[name]
    n, h = 100_000, 1e-4
    centre = case.law(*case.dist).mean()
    low, high = case.support

    def moments(*parameters):
        law = case.law(*parameters)  # E|x - c| is the area between the cdf and the step at c
        with np.errstate(over="ignore"):  # in SciPy's Gumbel
            below = integrate.quad(law.cdf, low, centre)[0]
        above = integrate.quad(lambda x: 1 - law.cdf(x), centre, high)[0]
        return np.array([centre + above - below, above + below])

    exact = []
    for i in range(2):
        up, down = (moments(*(p + t * (i == j) for j, p in enumerate(case.dist))) for t in (h, -h))
        exact.append((up - down) / (2 * h))
    wide = type(case.dist)(*(np.full(n, p) for p in case.dist))
    z, pullback = vjp(lambda d: d.sample(np.random.default_rng(4)), wide)
    for f, derivative in zip((np.ones(n), np.sign(z - centre)), np.transpose(exact)):
        samples = np.stack(pullback(f)[0], axis=1)  # (n, parameters)
        scale = np.max(np.abs(exact))
        check_unbiased(samples, derivative, scale=scale)
        with pytest.raises(AssertionError, match="biased"):
            check_unbiased(samples + 0.05 * scale, derivative, scale=scale)


def test_discrete_samples_are_plain_arrays():
    for name in DISCRETE[:3]:
        kinds = []

        def f(d, kinds=kinds):
            x = d.sample(np.random.default_rng(0), 4)
            kinds.append(type(x))
            return np.sum(d.log_prob(x))

        gradient = grad(f)(CASES[name].dist)
        assert kinds == [np.ndarray]
        assert all(np.any(leaf != 0) for leaf in tree.leaves(gradient))


# ---------------------------------------------------------------------------------------- Mixture


def test_mixture_samples_are_pathwise_in_the_components_and_refused_in_the_logits():
    mixture = CASES["Mixture"].dist

    def total(components, logits=mixture.logits):
        return np.mean(D.Mixture(logits, components).sample(np.random.default_rng(1), 100_000))

    gradient = grad(total)(mixture.components)
    weights = special.softmax(mixture.logits)
    np.testing.assert_allclose(gradient.loc, weights, atol=5 * 0.5 / np.sqrt(100_000))
    with pytest.raises(TypeError, match="not differentiable in its logits"):
        grad(lambda d: d.sample(np.random.default_rng(0)))(mixture)
    with pytest.raises(TypeError, match="not differentiable in its logits"):
        grad(lambda logits: total(mixture.components, logits))(mixture.logits)
    # The score function works on samples of the plain mixture.
    grad(lambda d: d.log_prob(stop_gradient(d).sample(np.random.default_rng(0))))(mixture)


def test_mixture_draws_a_component_for_each_place():
    # Two places share the components, or the logits; their draws must be independent all the same.
    for logits, loc in (
        (np.zeros((2, 3)), np.arange(3.0)),
        (np.zeros(3), np.arange(3.0) * [[1], [1]]),
    ):
        mixture = D.Mixture(logits, D.Normal(loc, np.full(3, 0.1)))
        x = mixture.sample(np.random.default_rng(0), 1000)
        assert x.shape == (1000, 2) and mixture.log_prob(x).shape == (1000, 2)
        assert abs(np.corrcoef(x.T)[0, 1]) < 0.2
        np.testing.assert_allclose(mixture.mean(), [1, 1])


def test_mixture_refuses_components_with_an_event_axis():
    for component in D.Categorical(np.zeros((2, 3))), D.Concrete(0.5, np.zeros((2, 3))):
        with pytest.raises(TypeError, match="elementwise"):
            D.Mixture(np.zeros(2), component).log_prob(1.0)


# --------------------------------------------------------------------------------------- Concrete

CONCRETE = D.Concrete(0.7, np.array([0.5, -0.3, 0.2]))
STEP = 0.25
GRID = np.arange(-45, 45, STEP)  # of log-ratios; where they end the density is e^-30


def _log_ratio_density():
    """Return the density of (log x_1/x_3, log x_2/x_3) on GRID x GRID."""
    t = np.stack([*np.meshgrid(GRID, GRID, indexing="ij"), np.zeros((len(GRID),) * 2)], axis=-1)
    y = special.log_softmax(t, axis=-1)
    log_p = CONCRETE.log_space().log_prob(y)
    # dx_1 dx_2 = x_1 x_2 x_3 dt_1 dt_2
    np.testing.assert_allclose(
        (CONCRETE.log_prob(np.exp(y)) + y.sum(-1))[80:280, 80:280], log_p[80:280, 80:280]
    )
    return np.exp(log_p)


def test_concrete_density_integrates_to_one_and_is_that_of_the_sampler():
    density = _log_ratio_density()
    assert abs(density.sum() * STEP**2 - 1) < 1e-8
    x = CONCRETE.sample(np.random.default_rng(2), 50_000)
    np.testing.assert_allclose(x.sum(-1), 1)
    wrong = D.Concrete(0.75, CONCRETE.logits).sample(np.random.default_rng(2), 50_000)
    fine = np.linspace(-2, 1.5, 281)
    t = np.stack([*np.meshgrid(fine, fine, indexing="ij"), np.zeros((281, 281))], axis=-1)
    p = np.exp(CONCRETE.log_space().log_prob(log_softmax(t)))
    edges = [(a * 40, (a + 1) * 40 + 1) for a in range(7)]
    cell = lambda a, b: integrate.simpson(  # noqa: E731
        integrate.simpson(p[slice(*a), slice(*b)], x=fine[slice(*b)]), x=fine[slice(*a)]
    )
    probs = np.array([[cell(a, b) for b in edges] for a in edges]).ravel()
    probs = np.append(probs, 1 - probs.sum())
    pvalues = []
    for samples in x, wrong:
        ratios = np.log(samples[:, :2] / samples[:, 2:])
        counts = np.histogram2d(*ratios.T, bins=[fine[::40], fine[::40]])[0].ravel()
        counts = np.append(counts, len(samples) - counts.sum())
        pvalues.append(stats.chisquare(counts, len(samples) * probs).pvalue)
    assert pvalues[1] < FAILURE_RATE < pvalues[0]


def test_concrete_of_two_is_binary_concrete():
    x = np.linspace(0.01, 0.99, 9)
    two = D.Concrete(0.6, np.array([0.8, -0.4])).log_prob(np.stack([x, 1 - x], -1))
    np.testing.assert_allclose(two, D.BinaryConcrete(0.6, 1.2).log_prob(x), rtol=1e-12)


def test_concrete_rounds_to_the_categorical():
    logits, n = CONCRETE.logits, 50_000
    for temperature in 0.1, 1.0, 3.0:
        x = D.Concrete(temperature, logits).sample(np.random.default_rng(3), n)
        counts = np.bincount(x.argmax(-1), minlength=3)
        assert stats.chisquare(counts, n * special.softmax(logits)).pvalue > FAILURE_RATE


def test_concrete_is_differentiable_twice():
    t = np.array([[0.3, -0.2, 0.9], [0.0, 0.4, -0.6]])
    check_grads(lambda d, t: d.log_prob(softmax(t)), (CONCRETE, t))
    check_grads(lambda d, y: d.log_prob(y), (CONCRETE.log_space(), t))
    check_grads(lambda d: d.sample(np.random.default_rng(0), 4), (CONCRETE,))
    check_grads(lambda d: d.log_space().sample(np.random.default_rng(0), 4), (CONCRETE,))


def test_log_space_survives_low_temperatures():
    for dtype in np.float64, np.float32:
        concrete = D.Concrete(dtype(1e-3), CONCRETE.logits.astype(dtype))
        y = concrete.log_space().sample(np.random.default_rng(0), 100)
        assert y.min() < -500 and y.dtype == dtype
        log_p, gradient = value_and_grad(lambda d, y=y: np.sum(d.log_prob(y)))(concrete.log_space())
        assert np.isfinite(log_p) and np.all(np.isfinite(gradient.logits))
        binary = D.BinaryConcrete(dtype(1e-3), dtype(0.3)).logit_space()
        assert np.all(np.isfinite(binary.log_prob(binary.sample(np.random.default_rng(0), 100))))


def test_concrete_temperature_per_batch_row():
    temperature, logits = np.array([0.5, 2.0]), np.zeros((2, 3))
    x = D.Concrete(temperature, logits).sample(np.random.default_rng(0), 5)
    assert x.shape == (5, 2, 3)
    rows = [D.Concrete(t, logits[0]).log_prob(x[:, i]) for i, t in enumerate(temperature)]
    np.testing.assert_allclose(D.Concrete(temperature, logits).log_prob(x), np.stack(rows, 1))


# --------------------------------------------------------------------------------------------- kl

PAIRS = {
    "Normal": (D.Normal(0.3, 0.8), D.Normal(-0.5, 1.4), REAL),
    "LogNormal": (D.LogNormal(0.3, 0.8), D.LogNormal(-0.5, 1.4), POSITIVE),
    "LogitNormal": (D.LogitNormal(0.3, 0.8), D.LogitNormal(-0.5, 1.4), UNIT),
    "Gumbel": (D.Gumbel(0.3, 0.8), D.Gumbel(-0.5, 1.1), REAL),
    "Gamma": (D.Gamma(1.4, 2.2), D.Gamma(2.1, 0.9), POSITIVE),
    "Beta": (D.Beta(1.4, 2.2), D.Beta(2.1, 0.9), UNIT),
    "Bernoulli": (D.Bernoulli(0.9), D.Bernoulli(-0.7), np.arange(2)),
    "Categorical": (
        D.Categorical(np.array([0.1, 1.2, -0.5])),
        D.Categorical(np.array([0.6, -0.3, 0.2])),
        np.arange(3),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_kl_is_its_integral(name):
    q, p, support = PAIRS[name]

    def integrand(x):
        return np.exp(q.log_prob(x)) * (q.log_prob(x) - p.log_prob(x))

    if isinstance(support, tuple):
        low, high = {REAL: (-15, 40), POSITIVE: (1e-12, 2000), UNIT: (1e-12, 1 - 1e-12)}[support]
        exact = integrate.quad(
            integrand,
            low,
            high,
            points=[0.1, 0.5, 2, 10, 40] if high > 1 else [0.5],
            limit=400,
            epsabs=1e-11,
        )[0]
    else:
        exact = integrand(support).sum()
    np.testing.assert_allclose(D.kl(q, p), exact, rtol=1e-7)
    np.testing.assert_allclose(D.kl(q, q), 0, atol=1e-14)
    check_grads(D.kl, (q, p))


def test_kl_without_a_closed_form_names_the_estimate():
    with pytest.raises(NotImplementedError, match=r"kl\(Logistic, Normal\).*np\.mean"):
        D.kl(D.Logistic(0.0, 1.0), D.Normal(0.0, 1.0))


def test_kl_keeps_the_digits_of_near_certain_bernoullis():
    # To first order in e^-a both sides lose 1: KL = e^-a (e^d - 1 - d), d = a - b.
    a, b = 30.0, 28.5
    exact = np.exp(-a) * (np.expm1(a - b) - (a - b))
    np.testing.assert_allclose(D.kl(D.Bernoulli(a), D.Bernoulli(b)), exact, rtol=1e-10)


def test_impossible_categories_count_for_nothing():
    logits = np.array([0.2, -np.inf, 1.0])
    other = np.array([0.5, 0.1, 0.3])
    finite = [0, 2]
    d, small = D.Categorical(logits), D.Categorical(logits[finite])
    np.testing.assert_allclose(d.entropy(), small.entropy())
    assert d.log_prob(1) == -np.inf
    q = special.softmax(logits[finite])
    exact = np.sum(q * (np.log(q) - special.log_softmax(other)[finite]))
    np.testing.assert_allclose(D.kl(d, D.Categorical(other)), exact)
    assert D.kl(D.Categorical(other), d) == np.inf
    for f in (lambda d: d.entropy(), lambda d: D.kl(d, D.Categorical(other))):
        assert np.all(np.isfinite(grad(f)(d).logits))


# -------------------------------------------------------------------------- dtypes, shapes, edges

SHAPED = {name: CASES[name] for name in CASES if "," not in name and "Mixture" not in name}


def _single(dist):
    return tree.map(lambda p: np.asarray(p, np.float32), dist)


@pytest.mark.parametrize("name", CASES)
def test_densities_keep_float32(name):
    case = CASES[name]
    d = _single(case.dist)
    x = d.sample(np.random.default_rng(0), 3)
    assert x.dtype == np.float32 or (x.dtype.kind == "i" and name in DISCRETE)
    assert d.log_prob(x).dtype == np.float32
    value, gradient = value_and_grad(lambda d: np.sum(d.log_prob(x)))(d)
    assert value.dtype == np.float32
    assert {leaf.dtype for leaf in tree.leaves(gradient)} == {np.dtype(np.float32)}
    for quantity in "mean", "variance", "entropy":
        try:
            assert getattr(d, quantity)().dtype == np.float32
        except NotImplementedError:
            pass


@pytest.mark.parametrize("name", [name for name in SHAPED if len(SHAPED[name].dist) == 2])
def test_python_numbers_do_not_widen_float32(name):
    first, second = SHAPED[name].dist
    kind = type(SHAPED[name].dist)
    for d in kind(np.float32(first), second), kind(first, np.full(3, second, np.float32)):
        x = d.sample(np.random.default_rng(0))
        assert x.dtype != np.float64 and d.log_prob(x).dtype == np.float32
    assert kind(first, second).log_prob(np.float32(0.5)).dtype == np.float32
    assert normal_log_prob(np.zeros(3, np.float32), 0.0, 2.0).dtype == np.float32


def test_kl_and_concrete_keep_float32():
    for q, p, _ in PAIRS.values():
        assert D.kl(_single(q), _single(p)).dtype == np.float32
    concrete = D.Concrete(0.5, np.zeros(3, np.float32))
    x = concrete.sample(np.random.default_rng(0))
    assert x.dtype == concrete.log_prob(x).dtype == np.float32


@pytest.mark.parametrize("name", [name for name in SHAPED if len(SHAPED[name].dist) == 2])
def test_everything_has_the_shape_of_all_parameters(name):
    d = SHAPED[name].dist
    batch = type(d)(np.full((4, 1), d[0]), np.full(3, d[1]))
    x = batch.sample(np.random.default_rng(0), 2)
    assert x.shape == batch.log_prob(x).shape == (2, 4, 3)
    assert batch.sample(np.random.default_rng(0), (5, 2)).shape == (5, 2, 4, 3)
    if name in CONTINUOUS:  # each place has a draw of its own
        assert len(np.unique(x)) == x.size
    for quantity in "mean", "variance", "entropy":
        try:
            assert getattr(batch, quantity)().shape == (4, 3)
        except NotImplementedError:
            pass
    if (type(d), type(d)) in {(type(q), type(p)) for q, p, _ in PAIRS.values()}:
        assert D.kl(batch, d).shape == (4, 3)


def test_categorical_broadcasts_indices_against_logits():
    d = D.Categorical(np.log([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]))
    np.testing.assert_allclose(np.exp(d.log_prob(1)), [0.8, 0.5, 0.1])
    x = d.sample(np.random.default_rng(0), 5)
    assert x.shape == d.log_prob(x).shape == (5, 3)
    with pytest.raises(TypeError, match="integers"):
        d.log_prob(np.array([0.0, 1.0, 0.0]))


OUTSIDE = {
    "LogNormal": [-1.0, 0.0, np.inf],
    "Gamma": [-1.0, np.inf],
    "LogitNormal": [-0.2, 0.0, 1.0, 1.5],
    "BinaryConcrete": [-0.2, 0.0, 1.0, 1.5],
    "Beta": [-0.2, 1.5],
    "Bernoulli": [-1.0, 0.5, 2.0],
    "NegativeBinomial": [-1.0, 0.5, np.inf],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_the_support_the_density_and_its_gradient_are_nothing(name):
    dist = CASES[name].dist
    x = np.array(OUTSIDE[name])
    with np.errstate(all="raise"):
        assert np.all(dist.log_prob(x) == -np.inf)
        gradient = grad(lambda d, x: np.sum(d.log_prob(x)), (0, 1))(dist, x)
        assert all(np.all(leaf == 0) for leaf in tree.leaves(gradient))
        # One point outside leaves the gradient of the others alone.
        inside = np.float64(1.0 if name in ("Bernoulli", "NegativeBinomial") else 0.5)
        both = grad(lambda d: np.sum(d.log_prob(np.append(x, inside))))(dist)
        alone = grad(lambda d: d.log_prob(inside))(dist)
        for a, b in zip(both, alone):
            np.testing.assert_allclose(a, b)


def test_categorical_and_concrete_outside_their_support():
    d = CASES["Categorical"].dist
    assert np.array_equal(d.log_prob(np.array([-1, 4])), [-np.inf, -np.inf])
    assert np.all(grad(lambda d: np.sum(d.log_prob(np.array([-1, 4]))))(d).logits == 0)
    x = np.array([[0.5, 0.5, 0.0], [0.7, 0.6, -0.3], [0.3, 0.3, 0.3]])
    with np.errstate(all="raise"):
        assert np.all(CONCRETE.log_prob(x) == -np.inf)
        gradient = grad(lambda d, x: np.sum(d.log_prob(x)), (0, 1))(CONCRETE, x)
    assert all(np.all(leaf == 0) for leaf in tree.leaves(gradient))
    log_space, y = CONCRETE.log_space(), np.array([0.0, -np.inf, -np.inf])
    assert log_space.log_prob(y) == -np.inf
    gradient = grad(lambda d, y: d.log_prob(y), (0, 1))(log_space, y)
    assert all(np.all(leaf == 0) for leaf in tree.leaves(gradient))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_nan_is_not_hidden(name):
    assert np.isnan(CASES[name].dist.log_prob(np.nan))


def test_edges_of_closed_supports_agree_with_scipy():
    for a in 0.5, 1.0, 2.0:
        assert D.Gamma(a, 2.0).log_prob(0.0) == GAMMA(a, 2.0).logpdf(0.0)
        for x in 0.0, 1.0:
            for b in 0.5, 1.0, 2.0:
                if {a, b} != {0.5, 2.0}:  # SciPy gives NaN for some of these
                    np.testing.assert_allclose(
                        D.Beta(a, b).log_prob(x), stats.beta(a, b).logpdf(x), atol=1e-15
                    )


def test_tails_of_log_prob():
    assert D.Logistic(0.0, 1.0).log_prob(800.0) == D.Logistic(0.0, 1.0).log_prob(-800.0) == -800
    assert D.Gumbel(0.0, 1.0).log_prob(700.0) == -700
    np.testing.assert_allclose(D.Normal(0.0, 1.0).log_prob(1e3), -5e5 - 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(
        D.Beta(0.5, 3e6).log_prob(1e-9), stats.beta(0.5, 3e6).logpdf(1e-9), rtol=1e-12
    )
    np.testing.assert_allclose(D.Gamma(1e-3, 1.0).log_prob(1e-300), 0.999 * 300 * np.log(10)
                               - special.gammaln(1e-3), rtol=1e-12)  # fmt: skip
    assert D.Bernoulli(500.0).log_prob(0) == -500


def test_negative_binomial_of_large_total():
    # Gamma(r + x) / Gamma(r) as a product: the difference of log-gammas has 5 digits here.
    r, p, x = 1e9, 3e-9, np.arange(12)
    rising = np.array([np.sum(np.log(r + np.arange(k))) for k in x])
    exact = rising - special.gammaln(x + 1) + x * np.log(p) + r * np.log1p(-p)
    np.testing.assert_allclose(D.NegativeBinomial(r, p).log_prob(x), exact, rtol=1e-11, atol=1e-11)


def test_negative_binomial_counts_successes():
    # r = 1 failure: x successes in a row, then one failure.
    x = np.arange(5)
    np.testing.assert_allclose(np.exp(D.NegativeBinomial(1.0, 0.3).log_prob(x)), 0.3**x * 0.7)


def test_parameters_are_trees():
    d = D.Mixture(np.zeros(2), D.Gamma(np.ones(2), np.ones(2)))
    assert tree.paths(d) == ["logits", "components/concentration", "components/rate"]
    gradient = grad(lambda d: d.log_prob(0.5))(d)
    assert type(gradient) is D.Mixture and type(gradient.components) is D.Gamma


def test_import_does_not_load_scipy_stats():
    code = "import sys, minigrad.distributions; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_moments_of_a_batch_of_mixtures_are_those_of_each():
    logits = np.array([[0.2, -0.4, 1.0], [0.0, 2.0, -1.0]])
    loc, scale = np.arange(6.0).reshape(2, 3), np.array([0.5, 1.0, 2.0])
    batch = D.Mixture(logits, D.Normal(loc, scale))
    for quantity in "mean", "variance":
        rows = [getattr(D.Mixture(a, D.Normal(m, scale)), quantity)() for a, m in zip(logits, loc)]
        np.testing.assert_allclose(getattr(batch, quantity)(), rows, rtol=1e-14)


def test_a_batch_of_mixtures_has_the_density_of_each():
    logits, loc = np.array([[0.2, -0.4], [1.0, 2.0]]), np.arange(4.0).reshape(2, 2)
    batch, x = D.Mixture(logits, D.Normal(loc, 1.0)), np.array([0.3, 1.2])
    rows = [D.Mixture(a, D.Normal(m, 1.0)).log_prob(v) for a, m, v in zip(logits, loc, x)]
    np.testing.assert_allclose(batch.log_prob(x), rows, rtol=1e-14)


def test_kl_of_categories_impossible_under_both_is_that_of_the_others():
    q, p = np.array([0.3, -np.inf, 1.0]), np.array([0.8, -np.inf, -0.2])
    kept = [0, 2]
    exact = D.kl(D.Categorical(q[kept]), D.Categorical(p[kept]))
    np.testing.assert_allclose(D.kl(D.Categorical(q), D.Categorical(p)), exact)
    gradient = grad(lambda q, p: D.kl(q, p), (0, 1))(D.Categorical(q), D.Categorical(p))
    assert all(np.all(np.isfinite(g.logits)) for g in gradient)


def test_a_mixture_takes_numbers_in_the_dtype_of_its_parameters():
    single = np.float32
    mixture = D.Mixture(single([0, 0]), D.Normal(single([0, 1]), single([1, 1])))
    assert mixture.log_prob(0.5).dtype == np.float32
