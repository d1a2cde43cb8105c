"""The transforms: orders, levels, containers, long chains, threads, and what errors say."""

import threading
from typing import NamedTuple

import numpy as np
import pytest

import minigrad
from minigrad import (
    grad,
    hessian,
    hvp,
    jacobian,
    jvp,
    nn,
    primitive,
    random,
    stop_gradient,
    tree,
    value_and_grad,
    vjp,
)
from minigrad.check import check_grads, nan_check
from minigrad.core import Tracer

# ---------------------------------------------------------------------------------- transforms


def test_gradients_of_any_order():
    f = np.exp
    for _ in range(5):
        f = grad(f)
        np.testing.assert_allclose(f(0.3), np.exp(0.3), rtol=1e-12)
    sine = grad(grad(grad(grad(np.sin))))
    np.testing.assert_allclose(sine(0.7), np.sin(0.7), rtol=1e-12)


def quadratic(x):
    return 0.5 * x @ MATRIX @ x + np.sum(x)


MATRIX = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 4.0]])


def test_jacobian_hessian_hvp_and_jvp_of_a_quadratic():
    x, v = np.array([0.3, -1.0, 2.0]), np.array([1.0, 2.0, -0.5])
    np.testing.assert_allclose(jacobian(grad(quadratic))(x), MATRIX)
    np.testing.assert_allclose(hessian(quadratic)(x), MATRIX)
    np.testing.assert_allclose(hvp(quadratic, (x,), (v,))[0], MATRIX @ v)
    value, tangent = jvp(quadratic, (x,), (v,))
    np.testing.assert_allclose(value, quadratic(x))
    np.testing.assert_allclose(tangent, (MATRIX @ x + 1) @ v)
    np.testing.assert_allclose(jvp(grad(quadratic), (x,), (v,))[1], MATRIX @ v)


def test_jacobian_has_the_shape_of_result_then_argument():
    x, y = np.arange(6.0).reshape(2, 3), np.arange(3.0)
    j = jacobian(lambda a, b: a * b, argnums=(0, 1))(x, y)
    assert j[0].shape == (2, 3, 2, 3) and j[1].shape == (2, 3, 3)
    np.testing.assert_array_equal(j[0].reshape(6, 6), np.diag(np.tile(y, 2)))
    nested = jacobian(lambda p: {"s": np.sum(p["a"]), "v": p["b"] * 2})({"a": y, "b": y})
    np.testing.assert_array_equal(nested["s"]["a"], np.ones(3))
    np.testing.assert_array_equal(nested["v"]["b"], 2 * np.eye(3))
    np.testing.assert_array_equal(nested["v"]["a"], np.zeros((3, 3)))
    assert jacobian(lambda a: a[:0])(y).shape == (0, 3)


def test_jvp_and_vjp_are_adjoint():
    rng = np.random.default_rng(0)
    x, v, u = rng.normal(size=5), rng.normal(size=5), rng.normal(size=(5, 5))
    f = lambda x: np.outer(np.sin(x), np.exp(x)) / (1 + x @ x)  # noqa: E731
    tangent = jvp(f, (x,), (v,))[1]
    cotangent = vjp(f, x)[1](u)[0]
    np.testing.assert_allclose(np.vdot(u, tangent), np.vdot(cotangent, v), rtol=1e-12)


def test_gradient_through_a_jvp_and_a_jacobian():
    check_grads(lambda x, v: jvp(np.tanh, (x,), (v,))[1], (np.ones(3), np.arange(3.0)))
    check_grads(lambda x: jacobian(lambda y: np.cumsum(y) ** 2)(x), (np.arange(3.0),))
    check_grads(lambda x: hvp(lambda y: np.sum(y**4), (x,), (x,))[0], (np.arange(3.0),))


def test_containers_keep_their_structure_and_dtypes():
    class Point(NamedTuple):
        x: np.ndarray
        y: np.ndarray

    def f(params, scale):
        return scale * np.sum(params["w"] * params["points"][0].x) + params["points"][1][0]

    params = {
        "w": np.ones(2, np.float32),
        "points": [Point(np.arange(2.0), np.zeros(3)), (np.float64(1.5), None)],
    }
    g = grad(f)(params, 2.0)
    assert isinstance(g["points"][0], Point) and isinstance(g["points"], list)
    assert g["w"].dtype == np.float32 and g["points"][1][1] is None
    np.testing.assert_array_equal(g["w"], [0.0, 2.0])
    np.testing.assert_array_equal(g["points"][0].y, np.zeros(3))
    assert g["points"][1][0] == 1.0
    both = grad(f, argnums=(1, 0))(params, 2.0)
    assert both[0] == 1.0 and both[1]["w"][1] == 2.0
    assert grad(f, argnums=-1)(params, 2.0) == 1.0


def test_aux_comes_back_plain():
    def f(x):
        return np.sum(x**2), {"half": x / 2, "count": 3, "note": "text"}

    (value, aux), g = value_and_grad(f, has_aux=True)(np.ones(2))
    assert value == 2.0 and type(aux["half"]) is np.ndarray and aux["note"] == "text"
    np.testing.assert_array_equal(g, [2, 2])
    g, aux = grad(f, has_aux=True)(np.ones(2))
    assert aux["count"] == 3
    out, pullback, aux = vjp(f, np.ones(2), has_aux=True)
    assert type(aux["half"]) is np.ndarray
    # Inside an outer gradient the aux of the inner one is still traced.
    outer = grad(lambda x: np.sum(grad(f, has_aux=True)(x)[1]["half"]))
    np.testing.assert_array_equal(outer(np.ones(2)), [0.5, 0.5])


def test_pullback_may_be_called_again_and_returns_arrays_of_ones_own():
    x = np.ones(3)
    y, pullback = vjp(lambda a, b: a + b, x, x)
    first = pullback(np.ones(3))
    first[0][:] = 7  # a reader may write into a gradient
    np.testing.assert_array_equal(first[1], np.ones(3))
    np.testing.assert_array_equal(pullback(np.full(3, 2.0))[0], [2, 2, 2])
    g = grad(np.sum)(x)
    g += 1
    np.testing.assert_array_equal(g, [2, 2, 2])


def test_a_node_used_twice_gets_both_contributions():
    # The smallest program for which the order of the backward pass matters.
    def f(a):
        b = a + a
        return b * b + b

    assert grad(f)(3.0) == 2 * (2 * 6.0) + 2


def test_an_argument_without_influence_gets_zeros():
    g = grad(lambda x, y: x * 2.0, argnums=(0, 1))(1.0, np.ones(2, np.float32))
    assert g[0] == 2.0 and g[1].dtype == np.float32
    np.testing.assert_array_equal(g[1], [0, 0])
    assert grad(lambda x: 3.0)(1.0) == 0.0


def test_stop_gradient_is_a_constant_at_every_level():
    assert grad(lambda x: x * stop_gradient(x))(3.0) == 3.0
    assert grad(grad(lambda x: x * stop_gradient(x) ** 2))(3.0) == 0.0
    stopped = stop_gradient({"a": 1.0})
    assert stopped == {"a": 1.0}


# -------------------------------------------------------------------------------------- levels


def test_perturbations_are_not_confused():
    # d/dx (x · d/dy (x + y)) = 1; confusing the levels gives 2 (Siskind and Pearlmutter 2005).
    assert grad(lambda x: x * grad(lambda y: x + y)(1.0))(1.0) == 1.0
    assert grad(lambda x: x * grad(lambda y: x * y)(2.0))(3.0) == 6.0
    assert grad(lambda x: grad(lambda y: x * y * y)(x))(3.0) == 4 * 3.0
    # The "amazing bug" (Manzyuk et al. 2019): a derivative of a curried function.
    shift = lambda u: lambda f: lambda x: f(x + u)  # noqa: E731
    derivative_of = grad(lambda u: shift(u)(shift(u)(np.exp))(1.0))
    np.testing.assert_allclose(derivative_of(0.0), 2 * np.exp(1.0))


def test_a_tracer_that_outlived_its_transform_is_a_constant():
    kept = []
    grad(lambda x: kept.append(x) or x * x)(2.0)
    assert grad(lambda y: y * kept[0])(5.0) == 2.0


def test_a_closure_evaluated_in_a_later_transform():
    functions = []
    grad(lambda x: functions.append(lambda y: x * y) or x)(2.0)
    assert grad(lambda y: functions[0](y))(5.0) == 2.0


def test_a_pullback_called_inside_another_gradient():
    y, pullback = vjp(lambda x: x**3, 2.0)
    assert grad(lambda g: pullback(g)[0] ** 2)(1.0) == 2 * 12.0**2
    # A pull-back closed over an outer tracer differentiates through it.
    assert grad(lambda x: vjp(lambda z: z**3, x)[1](1.0)[0])(2.0) == 12.0


def test_a_failed_trace_leaves_the_engine_usable():
    with pytest.raises(ZeroDivisionError):
        grad(lambda x: x * (1 // 0))(1.0)
    with pytest.raises(ZeroDivisionError):
        grad(lambda x: grad(lambda y: y * (1 // 0))(x))(1.0)
    assert grad(lambda x: x * grad(lambda y: x + y)(1.0))(1.0) == 1.0


def test_a_chain_of_100_000_operations():
    def chain(x):
        for _ in range(50_000):
            x = 1.00001 * x + 0.0
        return x

    np.testing.assert_allclose(grad(chain)(1.0), 1.00001**50_000, rtol=1e-9)
    assert grad(grad(chain))(1.0) == 0.0


def test_a_ladder_with_exponentially_many_paths():
    def ladder(x):
        for _ in range(200):
            x = 0.5 * (x + x)
        return x

    assert grad(ladder)(1.0) == 1.0


def test_threads_do_not_disturb_each_other():
    results, barrier = {}, threading.Barrier(4)

    def work(k):
        barrier.wait()
        for _ in range(50):
            h = hessian(lambda x: np.sum(x**3) * k)(np.arange(3.0))
            results.setdefault(k, []).append(np.array_equal(h, np.diag(6 * k * np.arange(3.0))))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(all(results[k]) and len(results[k]) == 50 for k in range(4))


# ---------------------------------------------------------------------------------- primitives


def test_a_primitive_of_ones_own():
    cube = primitive(lambda x: x * x * x, lambda ans, x: lambda g: 3 * g * x * x, name="test_cube")
    check_grads(cube, (np.arange(3.0),))


def test_a_once_primitive_raises_at_second_order():
    kernel = np.cosh  # stands for a compiled kernel, which knows nothing of tracers
    f = primitive(
        lambda x: np.array(np.sinh(x)),
        lambda ans, x: lambda g: g * kernel(np.asarray(x)),
        name="test_sinh",
        once=True,
    )
    np.testing.assert_allclose(grad(f)(0.5), np.cosh(0.5))
    with pytest.raises(NotImplementedError, match="test_sinh is differentiable once only"):
        grad(grad(f))(0.5)
    with pytest.raises(NotImplementedError, match="test_sinh is differentiable once only"):
        jvp(f, (0.5,), (1.0,))


# -------------------------------------------------------------------------------------- errors

ERRORS = {
    "integer": (lambda: grad(lambda x: x * 2)(3), TypeError, "argument 0 is a int"),
    "integer_array": (
        lambda: grad(lambda p: np.sum(p["n"]))({"n": np.arange(3)}),
        TypeError,
        "argument 0/n is int64; pass it as a float array",
    ),
    "complex": (lambda: grad(np.real)(1j), TypeError, "is a complex"),
    "string": (lambda: grad(len)("abc"), TypeError, "is a str"),
    "not_scalar": (
        lambda: grad(lambda x: x * 2)(np.ones(3)),
        TypeError,
        r"one scalar; this one returned an array of shape \(3,\).*np.sum",
    ),
    "tuple_result": (
        lambda: grad(lambda x: (x, x))(1.0),
        TypeError,
        "this one returned a tuple.*has_aux",
    ),
    "none_result": (lambda: grad(lambda x: None)(1.0), TypeError, "returned a NoneType"),
    "string_result": (lambda: grad(lambda x: "y")(1.0), TypeError, "not a str"),
    "argnums": (lambda: grad(np.sin, argnums=1)(1.0), TypeError, "argnums=1, but there are 1"),
    "argnums_of_jacobian": (lambda: jacobian(np.sin, 1)(1.0), TypeError, "there are 1 positional"),
    "aux": (lambda: grad(np.sin, has_aux=True)(1.0), TypeError, r"returns \(value, aux\)"),
    "cotangent_structure": (
        lambda: vjp(lambda x: {"y": x}, 1.0)[1](1.0),
        TypeError,
        r"structure \*, the result of f has {'y': \*}",
    ),
    "cotangent_shape": (
        lambda: vjp(np.sin, np.ones(3))[1](np.ones(2)),
        TypeError,
        r"cotangent of shape \(2,\) for a result of shape \(3,\)",
    ),
    "jvp_tuples": (lambda: jvp(np.sin, 1.0, 1.0), TypeError, r"jvp\(f, \(x,\), \(v,\)\)"),
    "jvp_structure": (lambda: jvp(np.sin, (1.0,), (1.0, 2.0)), TypeError, "structure"),
    "shapes": (
        lambda: grad(lambda x: np.sum(x + np.ones(2)))(np.ones(3)),
        ValueError,
        r"shapes \(3,\) \(2,\)",
    ),
    "matmul_shapes": (lambda: grad(lambda x: x @ x)(np.ones((2, 3))), ValueError, "size 2"),
    "no_rule_ufunc": (
        lambda: grad(lambda x: np.cbrt(x))(1.0),
        NotImplementedError,
        "np.cbrt has no derivative rule.*stop_gradient.*minigrad.primitive",
    ),
    "no_rule_function": (
        lambda: grad(lambda x: np.median(x))(np.ones(3)),
        NotImplementedError,
        "numpy.median has no derivative rule",
    ),
    "no_rule_method": (
        lambda: grad(lambda x: np.add.accumulate(x)[0])(np.ones(3)),
        NotImplementedError,
        "np.add.accumulate",
    ),
    "ufunc_out": (
        lambda: grad(lambda x: np.exp(x, out=np.zeros(3)))(np.ones(3)),
        TypeError,
        "takes no out= argument",
    ),
    "assignment": (
        lambda: grad(lambda x: x.__setitem__(0, 1.0))(np.ones(3)),
        TypeError,
        "traced arrays are immutable.*np.where",
    ),
    "assignment_into_plain": (
        lambda: grad(lambda x: np.zeros((2, 3)).__setitem__(0, x))(np.ones(3)),
        TypeError,
        "would cut the gradient",
    ),
    "float": (lambda: grad(lambda x: float(x))(1.0), TypeError, "has_aux=True"),
    "item": (lambda: grad(lambda x: x.item())(1.0), TypeError, "stop_gradient"),
    "asarray": (lambda: grad(lambda x: np.asarray(x))(1.0), TypeError, "cut the gradient"),
    "array_of": (lambda: grad(lambda x: np.array([x, x]))(1.0), TypeError, "np.stack"),
    "traced_index": (
        lambda: grad(lambda x: np.sum(np.ones(3)[x]))(1.0),
        TypeError,
        "cut the gradient",
    ),
    "traced_index_of_traced": (
        lambda: grad(lambda x: x[x])(np.ones(3)),
        TypeError,
        "traced array cannot be an index",
    ),
    "einsum_operands": (
        lambda: grad(lambda x: np.einsum("ij,jk", x))(np.ones((2, 2))),
        ValueError,
        "names 2 operands, got 1",
    ),
    "pad_mode": (
        lambda: grad(lambda x: np.sum(np.pad(x, 1, mode="edge")))(np.ones(2)),
        NotImplementedError,
        "'constant' only",
    ),
    "cholesky": (lambda: minigrad.linalg.cholesky(np.ones((2, 3))), ValueError, r"\(2, 3\)"),
    "mismatched_trees": (
        lambda: tree.map(np.add, {"a": 1.0}, {"b": 1.0}),
        TypeError,
        r"tree 1 does not match the first: {'b': \*} against {'a': \*}",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_was_wrong_and_what_to_do(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_nan_is_traced_to_the_operation_that_made_it():
    with nan_check(), np.errstate(all="ignore"):
        with pytest.raises(FloatingPointError, match="forward pass of log;.*no input held NaN"):
            grad(lambda x: np.sum(np.exp(np.log(x))))(np.array([1.0, -1.0]))
        with pytest.raises(FloatingPointError, match="backward pass of sqrt"):
            grad(lambda x: np.sum(0.0 * np.sqrt(x)))(np.zeros(2))
        with pytest.raises(FloatingPointError, match="argument 0/w already holds NaN"):
            grad(lambda p: np.sum(p["w"]))({"w": np.array([np.nan])})
        with pytest.raises(FloatingPointError, match="multiply.*an input already held NaN"):
            grad(lambda x: x * np.nan)(1.0)
        grad(lambda x: np.sum(np.log(x)))(np.ones(2))
    assert np.isnan(grad(lambda x: x * np.nan)(1.0))  # outside the context NaN is just a value


def test_a_tracer_reads_like_an_array():
    def f(x):
        assert isinstance(x, Tracer) and "Tracer" in repr(x) and "1." in repr(x)
        assert x.shape == (2, 3) and x.ndim == 2 and x.size == 6 and x.dtype == np.float64
        assert len(x) == 2 and [row.shape for row in x] == [(3,), (3,)]
        assert bool(x[0, 0]) is True
        with pytest.raises(TypeError):
            hash(x)
        return x.T.mT.sum()

    np.testing.assert_array_equal(grad(f)(np.ones((2, 3))), np.ones((2, 3)))


def test_a_primitive_must_return_one_array():
    pair = primitive(lambda x: (x, x), lambda ans, x: lambda g: g, name="test_pair")
    with pytest.raises(TypeError, match="primitive test_pair returned a tuple"):
        grad(lambda x: pair(x)[0])(1.0)


def test_nan_checks_nest_and_end_with_an_error():
    def nan_is_refused():
        try:
            grad(lambda x: x * np.nan)(1.0)
        except FloatingPointError:
            return True
        return False

    with nan_check():
        with nan_check():
            pass
        assert nan_is_refused()
    with pytest.raises(ZeroDivisionError), nan_check():
        raise ZeroDivisionError
    assert not nan_is_refused()


def test_keyword_arguments_reach_the_function():
    def f(x, power=1):
        return x**power

    assert grad(f)(3.0, power=2) == 6.0
    assert value_and_grad(f)(3.0, power=2) == (9.0, 6.0)
    np.testing.assert_array_equal(jacobian(f)(np.ones(2), power=3), 3 * np.eye(2))


def test_a_primitive_may_take_keyword_constants():
    def scaled(x, *, by):
        return by * x

    def moved(x, **by):
        return x + by["by"]

    double = primitive(scaled, lambda ans, x, by: lambda g: by * g)
    up = primitive(moved, lambda ans, x, by: lambda g: g)
    assert double(3.0, by=2) == grad(lambda x: double(x, by=6.0))(1.0) == 6.0
    assert up(3.0, by=2) == 5.0 and grad(lambda x: up(x * x, by=2))(3.0) == 6.0


def test_a_cotangent_takes_the_dtype_of_the_result():
    # The identity has no edge that would cast on the way.
    _, pullback = vjp(lambda x: x, np.ones(2, np.float32))
    (g,) = pullback(np.ones(2))
    assert g.dtype == np.float32


def test_an_outer_gradient_reaches_one_of_two_arguments_of_an_inner_transform():
    # Below the inner level x and a are traced still, w and b are plain.
    x, w = np.arange(9.0).reshape(1, 1, 3, 3), np.full((1, 1, 2, 2), 2.0)

    def layer(x, w):
        return np.sum(nn.conv2d({"w": w, "b": np.zeros(1)}, x) ** 2)

    def draw(a, b):
        return np.sum(random.beta_sample(a, b, z))

    a, b, z = np.array([0.5, 3.0]), np.array([1.5, 0.7]), np.array([0.4, 0.2])
    for f, first, second in (layer, x, w), (draw, a, b):
        through = grad(lambda p, f=f, q=second: vjp(f, p, q)[0])(first)
        np.testing.assert_array_equal(through, grad(f)(first, second))
        assert np.all(through != 0)


def test_jacobian_of_an_empty_result_keeps_float32():
    assert jacobian(lambda a: a[:0])(np.ones(3, np.float32)).dtype == np.float32


def test_iterating_a_traced_scalar_is_an_error_as_in_numpy():
    with pytest.raises(TypeError):
        grad(lambda x: sum(a for a in x))(np.array(2.0))
    assert grad(lambda x: sum(a * a for a in x))(np.array([1.0, 2.0])).tolist() == [2.0, 4.0]


def test_gradients_do_not_share_memory_with_what_was_given():
    ct = np.ones(3)
    assert vjp(lambda x: x + 1, np.zeros(3))[1](ct)[0] is not ct
    pullback = vjp(lambda x: (x[0] + 1, x[1]), [np.zeros(3), np.zeros(3)])[1]
    assert not any(g is ct for g in pullback((ct, ct))[0])
    v = np.ones(3)
    assert jvp(lambda x: x + 1, (np.zeros(3),), (v,))[1] is not v


def test_holes_of_a_primitive_of_ones_own_are_named():
    by_name = minigrad.primitive(
        lambda x, *, by: x * by, lambda ans, x, by: lambda g: g * by, name="by_name"
    )
    with pytest.raises(TypeError, match="by_name was given a traced keyword .* by position"):
        grad(lambda b: by_name(b * 1.0, by=b))(3.0)
    empty = minigrad.primitive(lambda x: 2 * x, lambda ans, x: lambda g: None, name="empty")
    with pytest.raises(TypeError, match="returned None"):
        grad(empty)(3.0)
    times = minigrad.primitive(
        lambda x, y=2.0: x * y,
        lambda ans, x, y=2.0: lambda g: g * y,
        lambda ans, x, y=2.0: lambda g: g * x,
        name="times",
    )
    assert times(3.0) == 6.0 and grad(times)(3.0) == 2.0 and grad(times, 1)(3.0, 5.0) == 3.0


def test_jvp_passes_over_integer_results():
    (_, where), (slope, none) = jvp(lambda x: (2 * x, np.argmax(x)), (np.ones(3),), (np.ones(3),))
    assert where == none == 0 and slope.tolist() == [2.0, 2.0, 2.0]
