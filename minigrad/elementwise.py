"""Elementwise primitives: arithmetic, exponentials, trigonometry, selection, and the operators.

Each entry is a NumPy function and, per argument, its rule: from the answer and the arguments to
the pull-back of the cotangent `g`. Rules are written in NumPy, which dispatches to these same
primitives when an outer gradient traces them. Where a function has a kink, its derivative is the
mean of the two one-sided ones: 0 for |x| at 0, one half each for ties of `maximum`.
"""

import numpy as np

from minigrad.core import TABLE, Tracer, constant, plain, primitive, register
from minigrad.kernels import fused, transcendental

add = primitive(np.add, lambda ans, x, y: lambda g: g, lambda ans, x, y: lambda g: g)
subtract = primitive(np.subtract, lambda ans, x, y: lambda g: g, lambda ans, x, y: lambda g: -g)
multiply = primitive(
    np.multiply,
    lambda ans, x, y: lambda g: g * y,
    lambda ans, x, y: lambda g: g * x,
)
divide = primitive(
    np.divide,
    lambda ans, x, y: lambda g: g / y,
    lambda ans, x, y: lambda g: -g * ans / y,
)


# At x = 0 the rules keep to the limits of polynomials: x**1 has slope 1 there, x**0 has 0.
def _power_rule_x(ans, x, y):
    if type(y) in (int, float):
        less = y - 1 if y else 1
    else:
        # A traced y is differentiated in turn: away from x = 0 its y - 1 must not be replaced.
        zero = (x == 0) & (y == 0) if type(y) is Tracer else y == 0
        less = np.where(zero, 1, y - 1)
    return lambda g: g * (y * x**less)


power = primitive(
    np.power,
    _power_rule_x,
    lambda ans, x, y: lambda g: g * ans * np.log(np.where(x == 0, 1, x)),
)
negative = primitive(np.negative, lambda ans, x: lambda g: -g)
positive = primitive(np.positive, lambda ans, x: lambda g: g)
expm1 = primitive(np.expm1, lambda ans, x: lambda g: g * (ans + 1))
log1p = primitive(np.log1p, lambda ans, x: lambda g: g / (1 + x))
sqrt = primitive(np.sqrt, lambda ans, x: lambda g: g / (2 * ans))
square = primitive(np.square, lambda ans, x: lambda g: g * (2 * x))
absolute = primitive(np.absolute, lambda ans, x: lambda g: g * np.sign(x))
sin = primitive(np.sin, lambda ans, x: lambda g: g * np.cos(x))
cos = primitive(np.cos, lambda ans, x: lambda g: -g * np.sin(x))
arctan = primitive(np.arctan, lambda ans, x: lambda g: g / (1 + x * x))

# Of large float32 arrays these three come from kernels, twice as fast, which may differ from
# NumPy's in the last digit.
exp = register(np.exp)(primitive(transcendental.exp, lambda ans, x: lambda g: g * ans))
log = register(np.log)(primitive(transcendental.log, lambda ans, x: lambda g: g / x))
tanh = register(np.tanh)(primitive(transcendental.tanh, lambda ans, x: lambda g: _tanh_dx(ans, g)))
_tanh_dx = primitive(
    fused.tanh_dx,
    lambda ans, y, g: lambda h: -2 * h * g * y,
    lambda ans, y, g: lambda h: _tanh_dx(y, h),
)

# Which of the two is larger is a constant of the derivative.
_gate = primitive(
    fused.gate, lambda ans, g, x, limit: lambda h: _gate(h, x=x, limit=limit), name="gate"
)
maximum = primitive(
    np.maximum,
    lambda ans, x, y: lambda g: _gate(g, x=plain(x), limit=plain(y)),
    lambda ans, x, y: lambda g: _gate(g, x=plain(y), limit=plain(x)),
)
minimum = primitive(
    np.minimum,
    lambda ans, x, y: lambda g: _gate(g, x=plain(y), limit=plain(x)),
    lambda ans, x, y: lambda g: _gate(g, x=plain(x), limit=plain(y)),
)
# exp(x - ans) is the share of x; the where is for x = y = -inf, whose share would be NaN.
logaddexp = primitive(
    np.logaddexp,
    lambda ans, x, y: lambda g: g * np.exp(x - np.where(ans == -np.inf, 0, ans)),
    lambda ans, x, y: lambda g: g * np.exp(y - np.where(ans == -np.inf, 0, ans)),
)
_where = primitive(
    np.where,
    None,
    lambda ans, condition, x, y: lambda g: np.where(condition, g, 0),
    lambda ans, condition, x, y: lambda g: np.where(condition, 0, g),
)


@register(np.where)
def where(condition, x, y):
    """Return `x` where `condition` holds and `y` elsewhere; the condition is a constant."""
    return _where(plain(condition), x, y)


@register(np.clip)
def clip(x, min=None, max=None, *, a_min=None, a_max=None):
    """Return `x` limited to [min, max]; on a limit its derivative is one half, as for maximum."""
    low, high = (a_min if min is None else min), (a_max if max is None else max)
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


_COMPARISONS = np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal
for _f in (
    *_COMPARISONS,
    *(np.logical_and, np.logical_or, np.logical_not, np.isnan, np.isinf, np.isfinite),
    *(np.sign, np.floor, np.ceil, np.rint, np.trunc, np.argmax, np.argmin, np.argsort),
    *(np.any, np.all, np.allclose, np.array_equal, np.isclose, np.count_nonzero, np.nonzero),
    *(np.zeros_like, np.ones_like, np.shape, np.ndim, np.size, np.searchsorted),
):
    constant(_f)


# The operators call the primitives directly, which spares NumPy's dispatch.
def _swapped(op):
    return lambda self, other: op(other, self)


_ARITHMETIC = {"add": add, "sub": subtract, "mul": multiply, "truediv": divide, "pow": power}
for _symbol, _op in _ARITHMETIC.items():
    # An instance attribute of a class must be a function to become a method: primitives are.
    setattr(Tracer, f"__{_symbol}__", _op)
    setattr(Tracer, f"__r{_symbol}__", _swapped(_op))
Tracer.__neg__ = negative
Tracer.__pos__ = positive
Tracer.__abs__ = absolute
Tracer.clip = clip
for _symbol, _f in zip(("lt", "le", "gt", "ge", "eq", "ne"), _COMPARISONS):
    setattr(Tracer, f"__{_symbol}__", TABLE[_f])
