"""The engine: traced arrays, primitives and the backward pass.

A function is differentiated by running it on `Tracer`s. Each traced call of a primitive makes
one node, which remembers where the call's arguments came from and how to pull a cotangent
back to them. `backward` then visits the nodes, newest first.

Levels. Every transform opens a level: a number larger than that of any level opened before it.
A primitive looks for the highest level among its arguments, takes the values out of the tracers
of that level only, and calls *itself* on them. So an inner transform sees the arrays of an outer
one as constants of its own level, yet each operation on them is recorded for the outer one. That
is all there is to gradients of gradients. Levels come from one ever-growing counter, so nothing
needs restoring when a trace fails, and a tracer that outlived its transform is only a constant.
"""

import inspect
import itertools
from contextlib import contextmanager
from contextvars import ContextVar
from heapq import heappop, heappush

import numpy as np

# `next` on a counter is atomic in CPython, so threads share both without a lock. Nodes are numbered
# downwards: the heap of the backward pass gives out the smallest first, which is then the newest.
new_level = itertools.count(1).__next__
new_serial = itertools.count(-1, -1).__next__

_nan_check = ContextVar("nan_check", default=False)


class Tracer:
    """An array under differentiation: a value (an array, or a tracer of a lower level) and a node.

    Works like a NumPy array, except that it can be neither assigned into nor turned into a plain
    array: both would cut the gradient without a word.

    The node is the record of the call that made it: (serial number, edges, shape, dtype, name). An
    edge (parent node, pull-back) leads to each traced argument. Shape and dtype are those that the
    cotangent must come out in. The node does not keep the value: an array lives on only if some
    pull-back mentions it. (A tuple, since there is one per operation and a class would cost twice.)
    """

    __slots__ = ("level", "node", "value")

    def __init__(self, value, level, edges, name):
        try:
            self.node = (new_serial(), edges, value.shape, value.dtype, name)
        except AttributeError:
            raise TypeError(
                f"primitive {name} returned a {type(value).__name__}; it must return one array"
            ) from None
        self.value = value
        self.level = level

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    __hash__ = None

    def __len__(self):
        return len(self.value)

    # Without it Python iterates by index, and takes the IndexError of 0 dimensions for the end.
    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def __bool__(self):
        return bool(plain(self))

    def __repr__(self):
        return f"Tracer(level={self.level}, {self.value!r})"

    def __setitem__(self, index, value):
        raise TypeError(
            f"assignment into a traced array of shape {self.shape}: traced arrays are immutable. "
            "Build the new array instead: np.where(mask, new, x), np.concatenate or np.stack"
        )

    def __array__(self, *_args, **_kwargs):
        raise TypeError(
            f"a traced array of shape {self.shape} was about to become a plain NumPy array, which "
            "would cut the gradient. Use np.stack or np.concatenate to build arrays, a function "
            "that minigrad differentiates, or minigrad.stop_gradient(x) for its plain value"
        )

    def _no_scalar(self):
        raise TypeError(
            f"float(x), int(x) or x.item() of a traced array of shape {self.shape} would cut the "
            "gradient. Return the value as aux (has_aux=True) or use minigrad.stop_gradient(x)"
        )

    __float__ = __int__ = __index__ = __complex__ = item = tolist = _no_scalar

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method == "__call__" and not kwargs and ufunc in TABLE:
            return TABLE[ufunc](*inputs)
        if method == "reduce" and ufunc in REDUCTIONS:
            # ufunc.reduce works on axis 0 by default, unlike np.sum.
            return REDUCTIONS[ufunc](*inputs, **{"axis": 0, **kwargs})
        if method == "__call__" and ufunc in TABLE:
            raise TypeError(
                f"np.{ufunc.__name__} of a traced array takes no {', '.join(kwargs)}= argument; "
                "use np.where for `where` and the returned array instead of `out`"
            )
        raise no_rule(f"np.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}"))

    def __array_function__(self, func, _types, args, kwargs):
        if func not in TABLE:
            raise no_rule(f"{func.__module__}.{func.__name__}")
        return TABLE[func](*args, **kwargs)


TABLE = {}  # NumPy or SciPy function -> its differentiable counterpart
REDUCTIONS = {}  # NumPy ufunc -> counterpart of its .reduce
PRIMITIVES = {}  # name -> primitive: the tests check every entry


def no_rule(name):
    """Return the error for a function that minigrad cannot differentiate."""
    return NotImplementedError(
        f"{name} has no derivative rule in minigrad. If its result is a constant of the "
        "gradient, call it on minigrad.stop_gradient(x); otherwise write it with functions that "
        "have a rule, or give it one with minigrad.primitive"
    )


def plain(x):
    """Return the NumPy array inside `x`, through all levels."""
    while type(x) is Tracer:
        x = x.value
    return x


def lower(x, level):
    """Return `x` as it is seen from outside `level`."""
    while type(x) is Tracer and x.level >= level:
        x = x.value
    return x


def primitive(f, *rules, name=None, variadic=None, once=False):
    """Make the array function `f` differentiable.

    `rules[i](ans, *args, **kwargs)` is called when the i-th positional argument is traced, and
    returns the pull-back `g -> cotangent of that argument`. The pull-back is written with NumPy
    functions and other primitives, so that it can be differentiated again. It need not undo
    broadcasting nor care for the dtype: the engine sums and casts its result to the argument's
    shape and dtype. It keeps alive only the arrays that it mentions. A rule that is None, or
    missing, says that `f` is not differentiable in that argument; `variadic(i, ans, *args)` is the
    rule of all positions after `rules`. Keyword arguments are constants.

    With `once=True` the pull-backs may call functions that minigrad cannot differentiate; a
    second derivative then raises NotImplementedError instead of being silently zero.
    """
    name = name or f.__name__

    def op(*args, **kwargs):
        # The highest level among the arguments, and their values as seen from below it.
        level = 0
        for a in args:
            if type(a) is Tracer and a.level > level:
                level = a.level
        if not level:
            return f(*args, **kwargs)

        values, nested = [], False
        for a in args:
            if type(a) is Tracer:
                if a.level == level:
                    a = a.value
                nested = nested or type(a) is Tracer
            values.append(a)
        ans = op(*values, **kwargs) if nested else f(*values, **kwargs)
        if type(ans) is Tracer and ans.level >= level:
            raise TypeError(
                f"{name} was given a traced keyword argument, which it takes for a constant; pass "
                "it by position, or minigrad.stop_gradient(x) if it is meant as a constant"
            )
        edges = []
        for i, a in enumerate(args):
            if type(a) is Tracer and a.level == level:
                if i < len(rules) and rules[i]:
                    pull = rules[i](ans, *values, **kwargs)
                elif i >= len(rules) and variadic:
                    pull = variadic(i, ans, *values, **kwargs)
                else:
                    raise TypeError(
                        f"{name} is not differentiable in its argument {i} (shape {a.shape}); "
                        "pass minigrad.stop_gradient(x) there if it is meant as a constant"
                    )
                edges.append((a.node, _only_once(name, pull, values) if once else pull))
        if _nan_check.get():
            _refuse_nan(ans, f"the forward pass of {name}", values)
        return Tracer(ans, level, edges, name)

    if _arity(f) == len(rules) <= 2 and all(rules) and not once:
        op = (_unary if len(rules) == 1 else _binary)(f, *rules, name)
    op.__name__ = op.__qualname__ = name
    op.__doc__ = f"Differentiable; for what it computes see {name} in NumPy or SciPy."
    if isinstance(f, np.ufunc):
        TABLE[f] = op
    PRIMITIVES[name] = op
    return op


def _arity(f):
    """Return how many arguments `f` takes, all by position, or None where that is not so."""
    if isinstance(f, np.ufunc):
        return f.nin
    code = getattr(f, "__code__", None)
    other = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    optional = code and (code.co_kwonlyargcount or code.co_flags & other or f.__defaults__)
    return code.co_argcount if code and not optional else None


def _unary(f, rule, name):
    """Return what `primitive` makes of a function of one array, without loops: half the time."""

    def op(x):
        if type(x) is not Tracer:
            return f(x)
        value = x.value
        ans = op(value) if type(value) is Tracer else f(value)
        edges = ((x.node, rule(ans, value)),)
        if _nan_check.get():
            _refuse_nan(ans, f"the forward pass of {name}", [value])
        return Tracer(ans, x.level, edges, name)

    return op


def _binary(f, left, right, name):
    """Return what `primitive` makes of a function of two arrays, without loops."""

    def op(x, y):
        level_x = x.level if type(x) is Tracer else 0
        level_y = y.level if type(y) is Tracer else 0
        level = level_x if level_x > level_y else level_y
        if not level:
            return f(x, y)
        u = x.value if level_x == level else x
        v = y.value if level_y == level else y
        nested = type(u) is Tracer or type(v) is Tracer
        ans = op(u, v) if nested else f(u, v)
        edges = ((x.node, left(ans, u, v)),) if level_x == level else ()
        if level_y == level:
            edges += ((y.node, right(ans, u, v)),)
        if _nan_check.get():
            _refuse_nan(ans, f"the forward pass of {name}", [u, v])
        return Tracer(ans, level, edges, name)

    return op


def _only_once(name, pull, values):
    def guarded(g):
        if type(g) is Tracer or any(type(v) is Tracer for v in values):
            raise NotImplementedError(
                f"{name} is differentiable once only: its derivative is computed by a kernel that "
                "has no rule of its own. Write it with other primitives for higher orders"
            )
        return pull(g)

    return guarded


def constant(f):
    """Register `f` as a function whose result is a plain array: its derivative is 0 or none."""

    def op(*args, **kwargs):
        return f(*map(plain, args), **{key: plain(a) for key, a in kwargs.items()})

    TABLE[f] = op
    return op


def register(*functions):
    """Decorate a composition of primitives: traced calls of the NumPy `functions` go to it."""

    def decorator(op):
        for f in functions:
            TABLE[f] = op
        return op

    return decorator


def backward(node, cotangent):
    """Pull `cotangent` back from `node`: a dict from the serial numbers of leaves to cotangents.

    A node may be visited only when all that depends on it has been visited. Serial numbers tell
    the order in which the function ran, so taking the newest first, from a heap, is such an order.
    """
    cotangents = {node[0]: cotangent}
    heap = [node] if node[1] else []
    check = _nan_check.get()
    while heap:
        serial, edges, _, _, name = heappop(heap)
        g = cotangents.pop(serial)
        for parent, pull in edges:
            c = pull(g)
            key, grandparents, shape, dtype, _ = parent
            # a rule may return a Python number, which has no shape
            if getattr(c, "shape", None) != shape or c.dtype is not dtype:
                c = _fit(c, shape, dtype)
            if check:
                _refuse_nan(c, f"the backward pass of {name}", (g,))
            if key in cotangents:
                # `pop` leaves the old sum to NumPy alone, which then may write the new one into it.
                cotangents[key] = cotangents.pop(key) + c
            else:
                cotangents[key] = c
                if grandparents:
                    heappush(heap, parent)
    return cotangents  # what was not popped: those of the leaves


def _fit(c, shape, dtype):
    """Undo broadcasting: sum `c` down to `shape`, and cast it to `dtype`."""
    if c is None:
        raise TypeError("a pull-back returned None instead of a cotangent; does it lack a return?")
    if not hasattr(c, "shape"):
        c = np.asarray(c, dtype)
    if c.dtype.kind == "c" and dtype.kind != "c":
        raise TypeError(
            "a real array has a complex cotangent: minigrad differentiates real arithmetic only; "
            "write complex numbers as pairs of real arrays"
        )
    if c.ndim > len(shape):
        c = np.add.reduce(c, axis=tuple(range(c.ndim - len(shape))))  # np.sum without its wrapper
    if c.ndim == len(shape):
        stretched = tuple(i for i, n in enumerate(shape) if n == 1 and c.shape[i] != 1)
        if stretched:
            c = np.add.reduce(c, axis=stretched, keepdims=True)
    if c.shape != shape:
        c = np.broadcast_to(c, shape)
    return c if c.dtype == dtype else c.astype(dtype)


@contextmanager
def nan_check():
    """Within this context, the first traced operation to produce a NaN raises FloatingPointError.

    The message names the operation, the pass (forward or backward) and the shapes of its inputs.
    Operations on untraced arrays are NumPy's own and are not looked at.
    """
    token = _nan_check.set(True)
    try:
        yield
    finally:
        _nan_check.reset(token)


def _refuse_nan(x, where, inputs):
    if has_nan(x):
        shapes = ", ".join(str(np.shape(plain(v))) for v in inputs)
        origin = "an input already held NaN" if any(map(has_nan, inputs)) else "no input held NaN"
        raise FloatingPointError(f"first NaN in {where}; inputs of shapes {shapes}; {origin}")


def has_nan(x):
    """Return whether the array inside `x` holds a NaN."""
    x = plain(x)
    inexact = isinstance(x, (np.ndarray, np.generic)) and np.issubdtype(x.dtype, np.inexact)
    return bool((inexact or type(x) is float) and np.isnan(x).any())
