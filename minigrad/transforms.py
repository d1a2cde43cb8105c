"""Functional transforms: `vjp`, and what follows from it: grad, jvp, hvp, jacobian, hessian.

All take and return nested containers of arrays (see `minigrad.tree`), and nest to any order.
"""

import numpy as np

from minigrad import tree
from minigrad.core import (
    Tracer,
    _nan_check,
    backward,
    has_nan,
    lower,
    new_level,
    plain,
)

__all__ = [
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "stop_gradient",
    "value_and_grad",
    "vjp",
]


def vjp(f, *primals, has_aux=False):
    r"""Return `f(*primals)` and its pull-back, the map $\bar y \mapsto J^\top \bar y$.

    `primals` and the result of `f` are trees of arrays. The pull-back takes a cotangent of the
    structure and shapes of the result, and returns a tuple: one cotangent per primal, with its
    structure, shapes and dtypes. It may be called any number of times.

    With `has_aux`, `f` returns `(out, aux)`, and `(out, pull-back, aux)` is returned.

    Raises TypeError for integer or complex primals and for a cotangent that does not match.

    >>> y, pullback = vjp(lambda x: np.sin(x["a"]) * 2, {"a": np.zeros(3)})
    >>> pullback(np.ones(3))
    ({'a': array([2., 2., 2.])},)
    """
    level = new_level()
    one = len(primals) == 1 and type(primals[0]) in (np.ndarray, Tracer)
    if one:  # no tree, which would cost as much again as a small operation
        treedef, tracers = None, [_argument(primals[0], 0, level, primals)]
        out = f(*tracers)
        if type(out) is Tracer and out.level == level and not has_aux:
            return out.value, _pullback_of_array(tracers[0].node, out.node, out.value)
    else:
        values, treedef = tree.flatten(primals)
        tracers = [_argument(value, i, level, primals) for i, value in enumerate(values)]
        out = f(*tree.unflatten(treedef, tracers))
    aux = None
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"with has_aux=True, f returns (value, aux); it returned {_kind(out)}")
        out, aux = out
        aux = tree.map(lambda a: lower(a, level), aux)
    out_leaves, out_def = tree.flatten(out)
    roots = [_root(leaf, level) for leaf in out_leaves]
    out_values = [lower(leaf, level) for leaf in out_leaves]
    inputs = [t.node for t in tracers]

    def pullback(cotangent):
        total = {}
        given = _like(cotangent, out_def, out_values)
        for root, ct in zip(roots, given):
            if root is not None:
                for serial, g in backward(root, ct).items():
                    total[serial] = total[serial] + g if serial in total else g
        cotangents = _own([_cotangent(total, *node) for node in inputs], given)
        return tuple(cotangents) if one else tree.unflatten(treedef, cotangents)

    value = tree.unflatten(out_def, out_values)
    return (value, pullback, aux) if has_aux else (value, pullback)


def _pullback_of_array(source, root, value):
    """Return the pull-back from one array to one array."""

    def pullback(ct):
        if getattr(ct, "shape", None) != value.shape or ct.dtype is not value.dtype:
            (ct,) = _like(ct, tree.LEAF, [value])
        g = _cotangent(backward(root, ct), *source)
        return (g.copy() if g is ct or getattr(g, "base", None) is not None else g,)

    return pullback


def _like(cotangent, treedef, values):
    """Return the leaves of a cotangent of a result with that structure and these leaves."""
    cotangents, ct_def = tree.flatten(cotangent)
    if ct_def != treedef:
        raise TypeError(
            f"the cotangent has the structure {ct_def}, the result of f has {treedef}; "
            "they must be the same"
        )
    for i, (ct, value) in enumerate(zip(cotangents, values)):
        if np.shape(ct) != np.shape(value):
            raise TypeError(
                f"a cotangent of shape {np.shape(ct)} for a result of shape {np.shape(value)}; "
                "they must be the same"
            )
        dtype = getattr(value, "dtype", float)
        if type(ct) is not Tracer and getattr(ct, "dtype", None) != dtype:
            cotangents[i] = np.asarray(ct, dtype)
    return cotangents


def _argument(value, i, level, primals):
    """Return the leaf `value` as a new tracer, or say why it cannot be differentiated."""
    if type(value) is Tracer:
        return Tracer(value, level, (), "argument")
    if isinstance(value, (np.ndarray, np.floating)) and value.dtype.kind == "f":
        array = value
    elif type(value) is float:
        array = np.float64(value)
    else:
        path = tree.paths(primals)[i]
        found = str(value.dtype) if isinstance(value, (np.ndarray, np.generic)) else _kind(value)
        raise TypeError(
            f"only real floating-point arrays can be differentiated, but argument {path} is "
            f"{found}; pass it as a float array (x.astype(float)) or leave it out of the "
            "differentiated arguments (argnums, or a closure)"
        )
    if _nan_check.get() and has_nan(array):
        raise FloatingPointError(f"argument {tree.paths(primals)[i]} already holds NaN")
    return Tracer(array, level, (), "argument")


def _root(leaf, level):
    """Return the node of an output leaf at `level`, or None where it does not depend on it."""
    while type(leaf) is Tracer and leaf.level > level:
        leaf = leaf.value
    if type(leaf) is Tracer and leaf.level == level:
        return leaf.node
    if type(leaf) is Tracer or isinstance(leaf, (np.ndarray, np.generic, float, int)):
        return None
    raise TypeError(f"f must return arrays (nested in containers if need be), not {_kind(leaf)}")


def _cotangent(total, serial, _edges, shape, dtype, _name):
    return total[serial] if serial in total else np.zeros(shape, dtype)


def _own(cotangents, given):
    """Copy results that are views, shared or `given`, so that the caller may write into each."""
    seen = set(map(id, given))
    for i, g in enumerate(cotangents):
        if type(g) is np.ndarray and (g.base is not None or id(g) in seen):
            cotangents[i] = g.copy()
        seen.add(id(g))
    return cotangents


def _kind(x):
    return f"a {type(x).__name__}"


def _choose(f, argnums, args, kwargs):
    """Return `f` as a function of the arguments that `argnums` names alone, and these arguments."""
    if argnums == 0 and len(args) == 1 and not kwargs:
        return f, args
    nums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not all(-len(args) <= n < len(args) for n in nums):
        raise TypeError(f"argnums={argnums}, but there are {len(args)} positional arguments")

    def of_chosen(*chosen):
        full = list(args)
        for n, arg in zip(nums, chosen):
            full[n] = arg
        return f(*full, **kwargs)

    return of_chosen, tuple(args[n] for n in nums)


def value_and_grad(f, argnums=0, has_aux=False):
    """Return the function `(*args) -> (f(*args), gradient)` for a scalar-valued `f`.

    The gradient has the structure, shapes and dtypes of the argument that `argnums` names; a tuple
    of numbers gives a tuple of gradients. With `has_aux`, `f` returns `(value, aux)`, and the
    result is `((value, aux), gradient)`. Raises TypeError where `f` does not return one scalar.
    """

    def gradient(*args, **kwargs):
        of_chosen, chosen = _choose(f, argnums, args, kwargs)
        value, pullback, *aux = vjp(of_chosen, *chosen, has_aux=has_aux)
        container = isinstance(value, (dict, list, tuple, type(None)))
        if container or getattr(value, "shape", ()) != ():
            found = _kind(value) if container else f"an array of shape {value.shape}"
            raise TypeError(
                f"grad needs a function that returns one scalar; this one returned {found}. "
                "Reduce it (np.sum, np.mean), return the rest as aux (has_aux=True), or use "
                "jacobian or vjp"
            )
        grads = pullback(np.array(1, getattr(value, "dtype", float)))
        grads = grads[0] if isinstance(argnums, int) else grads
        return ((value, *aux) if has_aux else value), grads

    return gradient


def grad(f, argnums=0, has_aux=False):
    """Return the gradient function of a scalar-valued `f`; with `has_aux`, (gradient, aux).

    >>> float(grad(lambda x: x**3)(2.0)), float(grad(grad(lambda x: x**3))(2.0))
    (12.0, 12.0)
    """
    both = value_and_grad(f, argnums, has_aux)

    def gradient(*args, **kwargs):
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def jvp(f, primals, tangents):
    r"""Return `f(*primals)` and $J v$, the derivative of `f` along `tangents`.

    `primals` and `tangents` are tuples of the same structure and shapes. The pull-back
    $\bar y \mapsto J^\top \bar y$ is linear, so its own pull-back is $v \mapsto J v$, at any
    $\bar y$: two reverse passes, and no second table of rules.
    """
    if not (isinstance(primals, tuple) and isinstance(tangents, tuple)):
        raise TypeError("jvp takes the primals and the tangents as tuples: jvp(f, (x,), (v,))")
    out, pullback = vjp(f, *primals)
    # Integers have a cotangent too, of some floating-point dtype.
    like = lambda y: np.zeros(np.shape(y), np.result_type(getattr(y, "dtype", float), np.float16))
    anywhere = tree.map(like, out)
    return out, vjp(pullback, anywhere)[1](tangents)[0]


def hvp(f, primals, tangents):
    """Return the product of the Hessian of a scalar-valued `f` with `tangents`: a tuple.

    The Hessian is symmetric, so the pull-back of the gradient does it, one pass less than `jvp`.
    """
    if not (isinstance(primals, tuple) and isinstance(tangents, tuple)):
        raise TypeError("hvp takes the primals and the tangents as tuples: hvp(f, (x,), (v,))")
    gradient = grad(f, argnums=tuple(range(len(primals))))
    return vjp(gradient, *primals)[1](tangents)


def jacobian(f, argnums=0):
    """Return the function `(*args) -> Jacobian` of `f` in the argument that `argnums` names.

    For a result of shape S and an argument of shape X, an array of shape S + X; for containers,
    the structure of the result with, in place of each leaf, the structure of the argument. One
    backward pass per element of the result.
    """

    def matrix(*args, **kwargs):
        of_chosen, primals = _choose(f, argnums, args, kwargs)
        out, pullback = vjp(of_chosen, *primals)
        leaves, treedef = tree.flatten(out)
        blocks = []
        for i, leaf in enumerate(leaves):
            shape = np.shape(leaf)
            rows = []
            for j in range(int(np.prod(shape))):
                unit = [np.zeros(np.shape(y), getattr(y, "dtype", np.float64)) for y in leaves]
                unit[i].flat[j] = 1
                rows.append(pullback(tree.unflatten(treedef, unit)))
            if not rows:  # an empty result: no pass gives the structure of the argument
                block = tree.map(
                    lambda x, s=shape: np.zeros(s + np.shape(x), getattr(x, "dtype", float)),
                    primals,
                )
            else:
                block = tree.map(
                    lambda *r, s=shape: np.reshape(np.stack(r), s + np.shape(r[0])), *rows
                )
            blocks.append(block[0] if isinstance(argnums, int) else block)
        return tree.unflatten(treedef, blocks)

    return matrix


def hessian(f, argnums=0):
    """Return the function `(*args) -> Hessian` of a scalar-valued `f`: the Jacobian of `grad(f)`.

    >>> hessian(lambda x: np.prod(x))(np.array([2.0, 3.0]))
    array([[0., 1.],
           [1., 0.]])
    """
    return jacobian(grad(f, argnums), argnums)


def stop_gradient(x):
    """Return `x`, a tree of arrays, as constants: plain arrays, at every level."""
    return tree.map(plain, x)
