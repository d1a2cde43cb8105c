"""Every primitive, in every array argument: first and second derivatives against differences.

`CASES` has an entry per function that dispatches; a test fails for a function without one. Inputs
stay away from kinks and ties, whose conventions `POINTS` states one by one.
"""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.special as sc

from minigrad import grad, linalg, special, tree, vjp
from minigrad.check import check_grads
from minigrad.core import PRIMITIVES
from minigrad.distributions import Normal, kl

REAL, POSITIVE, UNIT = (-2.0, 2.0), (0.3, 3.0), (0.1, 0.9)
UNARY_SHAPES = [(), (0,), (2, 3)]
BINARY_SHAPES = [((), ()), ((3,), ()), ((2, 1), (1, 3)), ((0, 3), (1, 3)), ((2, 3), (3,))]


def draw(shape, domain, seed):
    return np.random.default_rng(seed).uniform(*domain, shape)


def elementwise(f, *domains):
    """Return (function, arguments) for all combinations of shapes that broadcast."""
    if len(domains) == 1:
        shapes = [(s,) for s in UNARY_SHAPES]
    elif len(domains) == 2:
        shapes = BINARY_SHAPES
    else:
        shapes = [((),) * 3, ((2, 1), (3,), ()), ((1,), (0, 1), (4,))]
    return [
        (f, tuple(draw(s, d, 10 * i + j) for j, (s, d) in enumerate(zip(case, domains))))
        for i, case in enumerate(shapes)
    ]


def array(f, *shapes, domain=REAL):
    return [(f, tuple(draw(s, domain, j) for j, s in enumerate(shapes)))]


def axes(f, shape=(2, 3, 4), domain=REAL):
    """Return cases of a reduction: each axis, tuples, None, negative, with and without keepdims."""
    return [
        (lambda x, a=a, k=k: f(x, axis=a, keepdims=k), (draw(shape, domain, 7),))
        for a, k in itertools.product([None, 0, -1, (0, 2), (-1, 1)], [False, True])
    ] + [(lambda x: f(x, axis=0), (draw((2, 0), domain, 7),)), (f, (draw((), domain, 7),))]


def eye(x):
    """The unit matrix of the size and dtype of the last axis of x."""
    return np.eye(x.shape[-1], dtype=x.dtype)


def spd(a):
    return np.matmul(a, np.swapaxes(a, -1, -2)) + eye(a)


def indexed(*indices):
    return [(lambda x, i=i: x[i], (draw((3, 4), REAL, 5),)) for i in indices]


WHERE = np.array([[True, False, True], [False, True, False]])
CASES = {
    "add": elementwise(np.add, REAL, REAL) + elementwise(lambda x, y: x + y, REAL, REAL),
    "subtract": elementwise(np.subtract, REAL, REAL) + elementwise(lambda x: 1 - x, REAL),
    "multiply": elementwise(np.multiply, REAL, REAL) + elementwise(lambda x: x * x, REAL),
    "divide": elementwise(np.divide, REAL, POSITIVE) + elementwise(lambda x: 1 / x, POSITIVE),
    "power": elementwise(np.power, POSITIVE, REAL)
    + elementwise(lambda x: x**3, REAL)
    + elementwise(lambda x: 2.0**x, REAL),
    "negative": elementwise(np.negative, REAL),
    "positive": elementwise(np.positive, REAL),
    "exp": elementwise(np.exp, REAL),
    "expm1": elementwise(np.expm1, REAL),
    "log": elementwise(np.log, POSITIVE),
    "log1p": elementwise(np.log1p, UNIT),
    "sqrt": elementwise(np.sqrt, POSITIVE),
    "square": elementwise(np.square, REAL),
    "absolute": elementwise(np.absolute, POSITIVE) + elementwise(abs, (-3.0, -0.3)),
    "sin": elementwise(np.sin, REAL),
    "cos": elementwise(np.cos, REAL),
    "tanh": elementwise(np.tanh, REAL),
    "arctan": elementwise(np.arctan, REAL),
    "tanh_dx": elementwise(PRIMITIVES["tanh_dx"], REAL, REAL),
    "maximum": elementwise(np.maximum, REAL, REAL) + elementwise(lambda x: np.maximum(0, x), REAL),
    "minimum": elementwise(np.minimum, REAL, REAL),
    "gate": array(lambda g: PRIMITIVES["gate"](g, x=np.array([-1.0, 0.0, 2.0]), limit=0), (2, 3)),
    "logaddexp": elementwise(np.logaddexp, REAL, REAL),
    "where": array(lambda x, y: np.where(WHERE, x * y, y * y), (2, 3), (3,)),
    "clip": elementwise(lambda x: np.clip(x, -0.5, 0.7), REAL)
    + array(lambda x, a, b: np.clip(x, a, b), (9,), (1,), ())
    + elementwise(lambda x: x.clip(min=0.2), REAL)
    + elementwise(lambda x: np.clip(x, a_min=None, a_max=0.3), REAL),
    "expit": elementwise(special.expit, REAL) + elementwise(sc.expit, REAL),
    "logit": elementwise(special.logit, UNIT),
    "softplus": elementwise(special.softplus, REAL),
    "log_sigmoid": elementwise(special.log_sigmoid, REAL),
    "logsumexp": axes(special.logsumexp)[:-2] + array(special.logsumexp, (4,)),
    "softmax": array(special.softmax, (2, 3)) + array(lambda x: special.softmax(x, 0), (3, 2)),
    "log_softmax": array(special.log_softmax, (2, 3)),
    "gammaln": elementwise(special.gammaln, POSITIVE),
    "digamma": elementwise(special.digamma, POSITIVE),
    "psi": elementwise(sc.psi, POSITIVE),
    "polygamma": elementwise(lambda x: special.polygamma(2, x), POSITIVE),
    "betaln": elementwise(special.betaln, POSITIVE, POSITIVE),
    "xlogy": elementwise(special.xlogy, REAL, POSITIVE),
    "erf": elementwise(special.erf, REAL),
    "ndtr": elementwise(special.ndtr, REAL),
    "ndtri": elementwise(special.ndtri, UNIT),
    "log_ndtr": elementwise(special.log_ndtr, REAL) + elementwise(sc.log_ndtr, (-30.0, -20.0)),
    "normal_ratio": elementwise(PRIMITIVES["normal_ratio"], REAL),
    "normal_log_prob": elementwise(special.normal_log_prob, REAL, REAL, POSITIVE),
    "bernoulli_log_prob": elementwise(special.bernoulli_log_prob, REAL, UNIT),
    "digamma_rise": elementwise(PRIMITIVES["digamma_rise"], POSITIVE, POSITIVE),
    "bernoulli_log_prob_dlogits": elementwise(
        PRIMITIVES["bernoulli_log_prob_dlogits"], REAL, UNIT, REAL
    ),
    "expit_dx": elementwise(PRIMITIVES["expit_dx"], REAL, REAL),
    "normal_kl": elementwise(
        lambda m, s, t: kl(Normal(m, s), Normal(0.4, t)), REAL, POSITIVE, POSITIVE
    )
    + elementwise(lambda m, n, t: kl(Normal(m, 1.3), Normal(n, t)), REAL, REAL, POSITIVE),
    "sum": axes(np.sum) + axes(lambda x, **k: x.sum(**k)) + [(np.add.reduce, (np.ones((2, 3)),))],
    "mean": axes(np.mean)[:-2] + axes(lambda x, **k: x.mean(**k))[:-2],
    "var": axes(np.var)[:-2] + array(lambda x: np.var(x, axis=1, ddof=1), (2, 3)),
    "std": axes(np.std)[:-2],
    "max": axes(np.max)[:-2] + array(lambda x: x.max(axis=1), (3, 4)),
    "min": axes(np.min)[:-2] + array(lambda x: x.min(), (3, 4)),
    "prod": axes(np.prod) + array(lambda x: np.prod(x), (5,)),
    "cumsum": array(np.cumsum, (2, 3)) + array(lambda x: np.cumsum(x, axis=1), (2, 3)),
    "matmul": array(np.matmul, (2, 3), (3, 4))
    + array(np.matmul, (3,), (3,))
    + array(np.matmul, (3,), (3, 4))
    + array(np.matmul, (2, 3), (3,))
    + array(np.matmul, (5, 2, 3), (3,))
    + array(np.matmul, (5, 2, 3), (3, 4))
    + array(np.matmul, (3,), (5, 3, 2))
    + array(np.matmul, (5, 1, 2, 3), (4, 3, 2))
    + array(np.matmul, (0, 3), (3, 2))
    + array(lambda x: x.T @ x, (2, 3)),
    "dot": array(np.dot, (2, 3), (3,)) + array(np.dot, (2, 3), (4, 3, 5)) + array(np.dot, (), (3,)),
    "vdot": array(np.vdot, (2, 3), (2, 3)),
    "outer": array(np.outer, (2, 3), (4,)),
    "tensordot": array(np.tensordot, (2, 3, 4), (3, 4, 5))
    + array(lambda x, y: np.tensordot(x, y, axes=([0, -1], [1, 0])), (2, 3, 4), (4, 2, 5))
    + array(lambda x, y: np.tensordot(x, y, axes=0), (2,), (3,)),
    "einsum": array(lambda x, y: np.einsum("bi,ij->bj", x, y), (5, 2), (2, 3))
    + array(lambda x, y: np.einsum("...ij,...j", x, y), (4, 2, 3), (1, 3))
    + array(lambda x: np.einsum("ii->i", x), (3, 3))
    + array(lambda x: np.einsum("iij->j", x), (3, 3, 2))
    + array(lambda x, y: np.einsum("ij,k->k", x, y), (2, 3), (2,))
    + array(lambda x, y, z: np.einsum("ij,jk,kl->il", x, y, z, optimize=True), *[(2, 2)] * 3)
    + array(lambda x: np.einsum("ji", x), (2, 3)),
    "trace": array(np.trace, (3, 4)) + array(lambda x: x.trace(offset=1), (3, 4)),
    "diagonal": array(lambda x: np.diagonal(x, -1, 1, 2), (2, 3, 4)) + array(np.diagonal, (3, 2)),
    "diag": array(np.diag, (3,)) + array(np.diag, (3, 3)) + array(lambda x: np.diag(x, -1), (2,)),
    "tril": array(np.tril, (2, 3, 3)) + array(lambda x: np.tril(x, -1), (3, 4)),
    "triu": array(np.triu, (2, 3, 3)) + array(lambda x: np.triu(x, 1), (3, 4)),
    "cholesky": array(lambda a: np.linalg.cholesky(spd(a)), (2, 3, 3)),
    "solve": array(lambda a, b: np.linalg.solve(spd(a), b), (2, 3, 3), (3, 2))
    + array(lambda a, b: linalg.solve(spd(a), b), (3, 3), (3,)),
    "solve_triangular": [
        case
        for lower, trans in itertools.product([False, True], repeat=2)
        for f in [
            lambda a, b, lo=lower, tr=trans: linalg.solve_triangular(
                a + 3 * eye(a), b, lower=lo, trans=tr
            )
        ]
        for case in array(f, (3, 3), (3, 2)) + array(f, (2, 3, 3), (3, 2)) + array(f, (3, 3), (3,))
    ],
    "slogdet": array(lambda a: np.linalg.slogdet(a + 3 * eye(a))[1], (2, 3, 3)),
    "det": array(np.linalg.det, (2, 3, 3)),
    "inv": array(lambda a: np.linalg.inv(a + 3 * eye(a)), (2, 3, 3)),
    "norm": array(np.linalg.norm, (3,)) + array(lambda x: np.linalg.norm(x, axis=1), (2, 3)),
    "reshape": array(lambda x: np.reshape(x, (3, 2)), (2, 3))
    + array(lambda x: x.reshape(-1), (2, 3))
    + array(lambda x: x.reshape(3, -1), (2, 3)),
    "ravel": array(np.ravel, (2, 3)) + array(lambda x: x.flatten(), (2, 3)),
    "transpose": array(np.transpose, (2, 3, 4))
    + array(lambda x: np.transpose(x, (2, 0, 1)), (2, 3, 4))
    + array(lambda x: x.transpose(1, -1, 0), (2, 3, 4))
    + array(lambda x: x.mT, (2, 3, 4)),
    "swapaxes": array(lambda x: np.swapaxes(x, 0, -1), (2, 3, 4)),
    "moveaxis": array(lambda x: np.moveaxis(x, (0, 1), (-1, 0)), (2, 3, 4)),
    "expand_dims": array(lambda x: np.expand_dims(x, (0, -1)), (2, 3)),
    "squeeze": array(np.squeeze, (1, 3, 1)) + array(lambda x: np.squeeze(x, 0), (1, 3, 1)),
    "broadcast_to": array(lambda x: np.broadcast_to(x, (4, 2, 3)), (2, 1)),
    "concatenate": array(lambda x, y: np.concatenate([x, y, x], axis=-1), (2, 3), (2, 1))
    + array(lambda x, y: np.concatenate([x, y], axis=None), (2, 3), (2,)),
    "stack": array(lambda x, y: np.stack([x, y, np.ones((2, 3), x.dtype)], axis=1), (2, 3), (2, 3)),
    "split": array(lambda x: [p * p for p in np.split(x, 3, axis=1)], (2, 3))
    + array(lambda x: np.split(x, [1, 3]), (4, 2)),
    "pad": array(lambda x: np.pad(x, ((1, 0), (2, 3))), (2, 3))
    + array(lambda x: np.pad(x, 1, constant_values=2.0), (2,)),
    "flip": array(np.flip, (2, 3)) + array(lambda x: np.flip(x, axis=1), (2, 3)),
    "roll": array(lambda x: np.roll(x, 2), (2, 3))
    + array(lambda x: np.roll(x, (1, 2), axis=(0, 1)), (2, 3)),
    "tile": array(lambda x: np.tile(x, (2, 1, 3)), (2, 3)) + array(lambda x: np.tile(x, 2), (2,)),
    "repeat": array(lambda x: np.repeat(x, 2), (2, 3))
    + array(lambda x: np.repeat(x, [2, 0, 1], axis=1), (2, 3)),
    "take": array(lambda x: np.take(x, [2, 0, 2], axis=1), (2, 3)),
    "take_along_axis": array(
        lambda x: np.take_along_axis(x, np.array([[2, 2], [0, 1]]), axis=1), (2, 3)
    )
    + array(lambda x: np.take_along_axis(x, np.array([[1, 0, 0]]), axis=0), (2, 3)),
    "getitem": indexed(
        1,
        (1, 2),
        slice(1, None, 2),
        (slice(None), None, -1),
        Ellipsis,
        (Ellipsis, 0),
        [0, 2, 0],
        ([0, 0, 1], [1, 1, 3]),
        (slice(1), [3, 3]),
        np.arange(12).reshape(3, 4) % 3 == 0,
        slice(0, 0),
        np.int64(2),
    ),
    "scatter": array(lambda x: grad(lambda y: np.sum(y[[0, 0, 1]] ** 3))(x), (3,)),
    "astype": array(lambda x: np.astype(x, x.dtype), (3,)) + array(lambda x: x.astype(x.dtype), ()),
    "copy": array(lambda x: np.copy(x) + x.copy(), (3,)),
}
# Differentiable twice in x, once in the shape parameters (their second derivative must raise).
ONCE = {
    "gammainc": elementwise(special.gammainc, POSITIVE, POSITIVE),
    "betainc": elementwise(special.betainc, POSITIVE, POSITIVE, UNIT),
}
IN_X = {
    "gammainc": elementwise(lambda x: sc.gammainc(1.7, x), POSITIVE),
    "betainc": elementwise(lambda x: sc.betainc(1.7, 0.6, x), UNIT),
    "gammainc_da": elementwise(
        lambda x: grad(lambda a: np.sum(special.gammainc(a, x)))(1.7), POSITIVE
    ),
    "betainc_da": elementwise(
        lambda x: grad(lambda a: np.sum(special.betainc(a, 0.6, x)))(1.7), UNIT
    ),
    "betainc_db": elementwise(
        lambda x: grad(lambda b: np.sum(special.betainc(1.7, b, x)))(0.6), UNIT
    ),
}


def flat(table):
    return [
        pytest.param(*case, id=f"{name}-{i}")
        for name, cases in table.items()
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize("f, args", flat(CASES) + flat(IN_X))
def test_primitive_is_right_to_second_order(f, args):
    check_grads(f, args, order=2)
    # Tracing must not change the value.
    traced, plain = vjp(f, *args)[0], f(*args)
    for a, b in zip(tree.leaves(traced), tree.leaves(plain)):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("f, args", flat(ONCE))
def test_shape_parameters_are_right_to_first_order(f, args):
    check_grads(f, args, order=1)
    if args[0].size:
        with pytest.raises(TypeError, match="not differentiable in its argument 0"):
            grad(lambda a: np.sum(grad(lambda b: np.sum(f(b, *args[1:])))(a)))(args[0])


def test_every_primitive_and_every_dispatching_function_has_a_case():
    code = (
        "import minigrad, numpy as np\n"
        "from minigrad import distributions, nn, optim, random\n"
        "from minigrad.core import PRIMITIVES, TABLE\n"
        "constants = {f for f, op in TABLE.items() if op.__qualname__.startswith('constant.')}\n"
        "print(*sorted(set(PRIMITIVES) | {f.__name__ for f in TABLE if f not in constants}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    elsewhere = {"affine", "conv2d", "conv2d_dx", "conv2d_dw", "add_bias"}  # tests/test_nn.py
    elsewhere |= {"rows_times_matrix", "rows_by_rows"}  # those of matmul and affine
    elsewhere |= {"gamma_sample", "beta_sample"}  # tests/test_random.py
    missing = set(out.stdout.split()) - set(CASES) - set(IN_X) - elsewhere
    assert not missing, f"no derivative check for {sorted(missing)}"


# ------------------------------------------------------------------------------- special points

inf = np.inf
POINTS = [  # f, x, f'(x), f''(x)
    (np.absolute, 0.0, 0.0, 0.0),
    (lambda x: np.maximum(x, 0.0), 0.0, 0.5, 0.0),
    (lambda x: np.minimum(x, 0.0), 0.0, 0.5, 0.0),
    (lambda x: np.maximum(x, x), 1.0, 1.0, 0.0),
    (lambda x: np.clip(x, 0.0, 1.0), 1.0, 0.5, 0.0),
    (lambda x: np.max(np.stack([x, 1.0 * x, 0.5 * x])), 1.0, 1.0, 0.0),
    (lambda x: np.max(np.stack([2 * x, x, np.array(0.0)])), 0.0, 1.0, 0.0),
    (lambda x: x**2, 0.0, 0.0, 2.0),
    (lambda x: x**1, 0.0, 1.0, 0.0),
    (lambda x: x**0, 0.0, 0.0, 0.0),
    (lambda x: x**3.0, -2.0, 12.0, -12.0),
    (lambda x: np.power(0.0, x), 2.0, 0.0, 0.0),
    (np.square, 0.0, 0.0, 2.0),
    (lambda x: np.prod(np.stack([x, x, np.array(3.0)])), 0.0, 0.0, 6.0),
    (special.expit, 800.0, 0.0, 0.0),
    (special.expit, -800.0, 0.0, 0.0),
    (special.softplus, 0.0, 0.5, 0.25),
    (special.softplus, 800.0, 1.0, 0.0),
    (special.softplus, -800.0, 0.0, 0.0),
    (special.log_sigmoid, -800.0, 1.0, 0.0),
    (lambda x: np.logaddexp(x, -inf), 0.5, 1.0, 0.0),
    (lambda x: np.logaddexp(x, x), 700.0, 1.0, 0.0),
    (lambda x: special.logsumexp(np.stack([x, np.array(-inf)])), 0.5, 1.0, 0.0),
    (lambda x: special.logsumexp(np.stack([x, x + 2000.0])), 0.5, 1.0, 0.0),
    (lambda x: special.xlogy(0.0, x), 0.0, 0.0, 0.0),
    (lambda x: special.xlogy(x, 0.5), 0.0, np.log(0.5), 0.0),
    (special.erf, 0.0, 2 / np.sqrt(np.pi), 0.0),
    (special.ndtri, 0.5, np.sqrt(2 * np.pi), 0.0),
    (special.log_ndtr, 40.0, 0.0, 0.0),
    (lambda x: special.bernoulli_log_prob(x, 1.0), -800.0, 1.0, 0.0),
    (lambda x: special.bernoulli_log_prob(x, 0.0), 800.0, -1.0, 0.0),
    (np.tanh, 400.0, 0.0, 0.0),
    (np.arctan, 0.0, 1.0, 0.0),
    (np.expm1, -800.0, 0.0, 0.0),
]


@pytest.mark.parametrize("i", range(len(POINTS)))
def test_derivatives_at_special_points(i):
    f, x, first, second = POINTS[i]
    np.testing.assert_allclose(grad(f)(x), first, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad(grad(f))(x), second, rtol=1e-12, atol=1e-12)


def test_all_minus_infinity_has_a_gradient_of_zero_not_nan():
    x = np.full(3, -inf)
    np.testing.assert_array_equal(grad(special.logsumexp)(x), np.zeros(3))


def test_log_ndtr_follows_the_tail():
    # phi(x)/Phi(x) = -x - 1/x + 2/x^3 - ... as x -> -inf: at -38 the density has underflowed.
    np.testing.assert_allclose(grad(special.log_ndtr)(-38.0), 38 + 1 / 38 - 2 / 38**3, rtol=1e-6)
    for x in (np.float32(-1e4), -1e9):  # where -x^2/2 - log Phi(x) has lost all its digits
        np.testing.assert_allclose(grad(special.log_ndtr)(x), -x, rtol=1e-6)


def test_ties_in_a_reduction_share_the_gradient():
    np.testing.assert_array_equal(grad(np.max)(np.array([1.0, 3.0, 3.0])), [0, 0.5, 0.5])
    g = grad(lambda x: np.sum(np.min(x, axis=0)))(np.array([[1.0, 2.0], [1.0, 5.0]]))
    np.testing.assert_array_equal(g, [[0.5, 1.0], [0.5, 0.0]])


# ------------------------------------------------------------------------------ dtypes, dispatch


@pytest.mark.parametrize("f, args", flat(CASES))
def test_float32_stays_float32(f, args):
    args = [a.astype(np.float32) for a in args]
    out, pullback = vjp(f, *args)
    assert all(y.dtype == np.float32 for y in tree.leaves(out))
    for g in pullback(tree.map(lambda y: np.ones(y.shape, np.float32), out)):
        assert g.dtype == np.float32


def test_comparisons_and_steps_give_plain_arrays():
    def f(x):
        for plain in (x > 0, x == x, np.sign(x), np.floor(x), np.argmax(x), x.argmax(), x != 1):
            assert isinstance(plain, (np.ndarray, np.generic))
        assert np.shape(x) == (3,) and np.ndim(x) == 1 and len(x) == 3
        return np.sum(x * (x > 0))

    np.testing.assert_array_equal(grad(f)(np.array([-1.0, 2.0, 3.0])), [0, 1, 1])


def test_arrays_and_tracers_mix_in_operators():
    a = np.arange(3.0)
    g = grad(lambda x: np.sum(a * x + x * a - a / x + a @ x + np.float64(2) * x))(np.ones(3))
    np.testing.assert_array_equal(g, 6 * a + 2)


def test_numpy_functions_of_traced_arrays_keep_the_gradient():
    x = np.array([[2.0, 0.5], [0.5, 1.0]])
    for name in ("exp", "sum", "cumsum", "transpose", "ravel", "tril", "linalg.inv"):
        f = np
        for part in name.split("."):
            f = getattr(f, part)
        assert np.any(grad(lambda y, f=f: np.sum(f(y)))(x) != 0), name


# ------------------------------------------------------------------- what single cases would miss


def test_ties_are_shared_in_either_argument():
    for f in np.maximum, np.minimum:
        assert grad(f, (0, 1))(1.0, 1.0) == (0.5, 0.5)
        assert grad(lambda x, f=f: f(0.0, x))(0.0) == 0.5


def test_logaddexp_of_two_impossible_terms_has_no_gradient():
    assert grad(np.logaddexp, (0, 1))(-np.inf, -np.inf) == (0, 0)


def test_einsum_picks_a_diagonal_of_three_axes():
    x = np.random.default_rng(0).normal(size=(2, 2, 2))
    check_grads(lambda x: np.einsum("iii->i", x), (x,))


def test_an_ellipsis_of_unequal_widths_aligns_on_the_right():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(4, 2, 3)), rng.normal(size=(2, 3))
    f = lambda x, y: np.einsum("...i,...i->...", x, y)
    np.testing.assert_allclose(vjp(f, x, y)[0], f(x, y))
    check_grads(f, (x, y))


@pytest.mark.parametrize(
    "x_shape, index_shape", [((1, 3), (2, 2)), ((4, 3), (4, 2)), ((4, 3), (1, 2))]
)
def test_take_along_axis_broadcasts_as_numpy_does(x_shape, index_shape):
    rng = np.random.default_rng(2)
    x, index = rng.normal(size=x_shape), rng.integers(3, size=index_shape)
    f = lambda x: np.take_along_axis(x, index, axis=1)
    np.testing.assert_array_equal(vjp(f, x)[0], f(x))
    check_grads(f, (x,))


@pytest.mark.parametrize("k", [-2, -1, 0, 1, 2])
def test_diag_writes_and_reads_every_diagonal(k):
    x = np.array([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(vjp(lambda x: np.diag(x, k), x)[0], np.diag(x, k))
    check_grads(lambda x: np.diag(x, k), (x,))
    check_grads(lambda x: np.diag(np.outer(x, x), k), (x,))


def test_norm_refuses_another_order_instead_of_taking_it_for_the_axis():
    with pytest.raises(NotImplementedError, match="ord=1"):
        vjp(lambda x: np.linalg.norm(x, 1), np.arange(6.0).reshape(2, 3))


def test_solve_triangular_of_integers_does_not_truncate():
    a, b = 2 * np.eye(2), np.array([1, 1])
    np.testing.assert_array_equal(linalg.solve_triangular(a, b), [0.5, 0.5])
    np.testing.assert_array_equal(
        linalg.solve_triangular(np.stack([a.astype(int)] * 2), b[:, None]), 0.5
    )
    assert linalg.solve_triangular(a, b.astype(np.float32)).dtype == np.float64


def test_an_axis_may_be_a_numpy_integer():
    x = np.arange(1.0, 7).reshape(2, 3)
    for f in np.mean, np.var, np.prod, np.sum:
        traced = vjp(lambda x, f=f: f(x, axis=np.int64(0)), x)[0]
        np.testing.assert_allclose(traced, f(x, axis=np.int64(0)))


def test_float32_survives_polygamma():
    for n in 0, 1, 3:
        assert special.polygamma(n, np.ones(2, np.float32)).dtype == np.float32
    assert grad(special.digamma)(np.float32(2)).dtype == np.float32


def test_float32_softplus_keeps_its_digits_in_the_lower_tail():
    # 1 + e^x rounds to 1 below -17; e^x itself does not.
    x = np.linspace(-80, 20, 201, dtype=np.float32)
    exact = np.logaddexp(0, x.astype(np.float64))
    for f, sign in (special.softplus, 1), (lambda x: special.log_sigmoid(-x), -1):
        np.testing.assert_allclose(f(x), sign * exact, rtol=4e-7)
    np.testing.assert_allclose(special.bernoulli_log_prob(x, 0), -exact, rtol=4e-7)


def test_integer_images_do_not_widen_a_float32_log_likelihood():
    logits, x = np.array([-1.0, 2.0], np.float32), np.array([0, 1])
    out, pullback = vjp(lambda a: special.bernoulli_log_prob(a, x), logits)
    assert out.dtype == np.float32 and pullback(out)[0].dtype == np.float32
    np.testing.assert_allclose(out, special.log_sigmoid(np.array([1.0, 2.0])), rtol=1e-6)


def test_xlogy_at_zero_zero_has_finite_derivatives():
    assert grad(special.xlogy, (0, 1))(0.0, 0.0) == (0.0, 0.0)
    assert grad(special.xlogy)(1.0, 2.0) == np.log(2.0)


def test_the_gradient_of_cholesky_is_symmetric():
    rng = np.random.default_rng(3)
    a, u = spd(rng.normal(size=(3, 3))), rng.normal(size=(3, 3))
    (g,) = vjp(np.linalg.cholesky, a)[1](u)
    np.testing.assert_allclose(g, g.T, rtol=1e-12)
    v, h = rng.normal(size=(3, 3)), 1e-6
    v += v.T
    slope = (np.linalg.cholesky(a + h * v) - np.linalg.cholesky(a - h * v)) / (2 * h)
    np.testing.assert_allclose(np.vdot(g, v), np.vdot(u, slope), rtol=1e-8)


def test_products_with_lists_are_differentiable():
    check_grads(lambda x: np.matmul([[1.0, 2.0]], np.matmul(x, [[1.0], [2.0]])), (np.ones((2, 2)),))
    check_grads(lambda x: np.matmul([1.0, 2.0], np.matmul(x, [1.0, 2.0])), (np.ones((2, 2)),))


@pytest.mark.parametrize("index", [[3, -1, 3], ([3, -1, 3],), ([[0, 1], [1, 1]],)], ids=str)
def test_rows_that_are_taken_often_add_up_their_cotangents(index):
    # Few rows go to np.add.at, many to a kernel.
    index = tuple(map(np.array, index)) if isinstance(index, tuple) else np.array(index)
    for columns in (3, 5000):
        x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
        g = np.random.default_rng(1).standard_normal(x[index].shape).astype(np.float32)
        expected = np.zeros_like(x)
        np.add.at(expected, index, g)
        np.testing.assert_array_equal(vjp(lambda x: x[index], x)[1](g)[0], expected)


def test_mixed_derivative_of_betainc_keeps_its_digits_where_b_is_small():
    # 50 digits of pdf(x) (log x + digamma(a + b) - digamma(a)); both terms are about 1e-9.
    mixed = grad(grad(special.betainc), argnums=2)
    a, b, x = 50.0, 1e-8, 1 - 2.0**-30
    assert mixed(a, b, x) == pytest.approx(-7.8308967312802629527e-9, rel=1e-13)


def test_mixed_derivative_of_a_power_is_right_at_exponent_zero():
    # d/dx d/dy x^y at y = 0 is 1/x, in either order.
    power = lambda x, y: np.power(x, y)
    assert grad(grad(power, 0), 1)(2.0, 0.0) == grad(grad(power, 1), 0)(2.0, 0.0) == 0.5


def test_complex_intermediates_are_refused():
    for f in (lambda x: np.abs(x * 1j), lambda x: np.abs(x.astype(complex))):
        with pytest.raises(TypeError, match="complex"):
            grad(f)(np.float64(2.0))


def test_polygamma_of_integers_is_not_truncated():
    found = special.polygamma(1, np.array([1, 2, 3]))
    np.testing.assert_allclose(found, sc.polygamma(1, [1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: np.moveaxis(x, 3, 0),
        lambda x: np.transpose(x, (2, 1)),
        lambda x: np.prod(x, axis=2),
        lambda x: np.take(x, [0], axis=2),
        lambda x: np.diagonal(x, axis1=2, axis2=1),
        lambda x: np.trace(x, axis1=2, axis2=1),
        lambda x: np.tensordot(x, x, axes=([3], [1])),
    ],
)
def test_an_axis_that_is_not_there_is_refused_as_by_numpy(f):
    x = np.ones((2, 3))
    for call in (f, lambda x: vjp(f, x)):
        with pytest.raises((np.exceptions.AxisError, ValueError, IndexError)):
            call(x)


@pytest.mark.parametrize("cuts", [[3, 1], [2, 2], [1, 9], 2])
def test_split_cuts_where_numpy_does(cuts):
    x = np.arange(4.0)
    for ours, theirs in zip(vjp(lambda x: np.split(x, cuts), x)[0], np.split(x, cuts), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_copy_is_one():
    x = np.zeros(3)
    y, pullback = vjp(np.copy, x)
    assert y is not x and pullback(x)[0] is not x


def test_step_functions_take_traced_keywords():
    assert grad(lambda x: x * np.searchsorted(np.arange(4.0), v=x))(2.0) == 2.0
    assert grad(lambda x: x * (1 + np.argmax(a=x)))(2.0) == 1.0


def test_solve_triangular_reads_one_triangle_only():
    a = np.array([[1, np.nan], [2, 3]])
    for batch in ((), (2,)):
        found = linalg.solve_triangular(np.broadcast_to(a, (*batch, 2, 2)), np.ones(2), lower=True)
        np.testing.assert_allclose(found, np.broadcast_to([1, -1 / 3], (*batch, 2)))


def test_betaln_keeps_its_digits_where_an_argument_is_small():
    # digamma(a) - digamma(a + b), by its series in b
    slope = -1e-8 * sc.polygamma(1, 50.0) - 0.5e-16 * sc.polygamma(2, 50.0)
    assert grad(special.betaln)(50.0, 1e-8) == pytest.approx(slope, rel=1e-12)
    assert grad(special.betaln, 1)(1e-8, 50.0) == pytest.approx(slope, rel=1e-12)
