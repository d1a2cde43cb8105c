"""Array primitives: reductions, shapes and indexing, with NumPy's names and conventions."""

import builtins
import math

import numpy as np
from numpy.lib.array_utils import normalize_axis_index

from minigrad.core import REDUCTIONS, TABLE, Tracer, plain, primitive, register
from minigrad.elementwise import multiply, sqrt, where
from minigrad.kernels.vq import add_rows

SMALL = 1 << 15  # elements: below, a copy costs less than NumPy's making of a view and its use

# ---------------------------------------------------------------------------------- reductions


def restore_axes(g, axis, keepdims):
    """Put back, with length 1, the axes that a reduction removed; a scalar broadcasts anyway."""
    return g if keepdims or axis is None else expand_dims(g, axis)


def _sum_rule(ans, x, axis=None, keepdims=False):
    shape = x.shape
    return lambda g: _broadcast_to(restore_axes(g, axis, keepdims), shape=shape)


_sum = primitive(np.add.reduce, _sum_rule, name="sum")


@register(np.sum)
def sum(x, axis=None, keepdims=False):
    """Return the sum of `x` over `axis` (an int, a tuple, or None for all)."""
    return _sum(x, axis=axis, keepdims=keepdims)


def _axes(axis, ndim):
    """Return `axis` (an int, a tuple, or None for all) as a tuple."""
    if axis is None:
        return tuple(range(ndim))
    return (axis,) if type(axis) is int else tuple(np.atleast_1d(axis).tolist())


def _count(x, axis):
    return x.size if axis is None else math.prod([x.shape[a] for a in _axes(axis, x.ndim)])


@register(np.mean)
def mean(x, axis=None, keepdims=False):
    """Return the mean of `x` over `axis`."""
    return sum(x, axis, keepdims) / _count(x, axis)


@register(np.var)
def var(x, axis=None, ddof=0, keepdims=False):
    """Return the variance of `x` over `axis`: the sum of squared deviations over n - ddof."""
    deviation = x - mean(x, axis, keepdims=True)
    return sum(deviation * deviation, axis, keepdims) / (_count(x, axis) - ddof)


@register(np.std)
def std(x, axis=None, ddof=0, keepdims=False):
    """Return the standard deviation of `x` over `axis`: the square root of `var`."""
    return sqrt(var(x, axis, ddof, keepdims))


def _extremum_rule(ans, x, axis=None, keepdims=False):
    """Ties share the cotangent equally."""
    at = x == restore_axes(ans, axis, keepdims)
    share = at / np.sum(at, axis=axis, keepdims=True, dtype=ans.dtype)
    return lambda g: share * restore_axes(g, axis, keepdims)


_max = primitive(np.max, _extremum_rule, name="max")
_min = primitive(np.min, _extremum_rule, name="min")


@register(np.max)
def max(x, axis=None, keepdims=False):
    """Return the maximum of `x` over `axis`; tied elements share the gradient equally."""
    return _max(x, axis=axis, keepdims=keepdims)


@register(np.min)
def min(x, axis=None, keepdims=False):
    """Return the minimum of `x` over `axis`; tied elements share the gradient equally."""
    return _min(x, axis=axis, keepdims=keepdims)


@register(np.prod)
def prod(x, axis=None, keepdims=False):
    """Return the product of `x` over `axis`.

    Multiplied in pairs, halves at a time: no division, so zeros need no special case, at any order.
    """
    axes = _axes(axis, x.ndim)
    kept = [1 if i in {a % x.ndim for a in axes} else n for i, n in enumerate(x.shape)]
    x = moveaxis(x, axes, range(len(axes)))
    x = reshape(x, (math.prod(x.shape[: len(axes)]), *x.shape[len(axes) :]))
    while len(x) > 1:
        half = len(x) // 2
        pairs = multiply(x[:half], x[half : 2 * half])
        x = pairs if len(x) % 2 == 0 else concatenate([pairs, x[2 * half :]])
    x = x[0] if len(x) else np.ones(x.shape[1:], x.dtype)
    return reshape(x, kept) if keepdims else x


_cumsum = primitive(
    np.cumsum,
    lambda ans, x, axis: lambda g: np.flip(np.cumsum(np.flip(g, axis), axis), axis),
    name="cumsum",
)


@register(np.cumsum)
def cumsum(x, axis=None):
    """Return the cumulative sum of `x` along `axis`, of the flattened array if it is None."""
    return _cumsum(reshape(x, -1), axis=0) if axis is None else _cumsum(x, axis=axis)


# -------------------------------------------------------------------------------------- shapes


def _reshape_rule(ans, x, shape):
    old = x.shape
    return lambda g: g.reshape(old)


_reshape = primitive(np.reshape, _reshape_rule, name="reshape")


@register(np.reshape)
def reshape(x, shape):
    """Return `x` in another shape, of the same size."""
    return _reshape(x, shape=shape)


def _transpose_rule(ans, x, axes=None):
    inverse = None if axes is None else sorted(range(len(axes)), key=axes.__getitem__)
    return lambda g: np.transpose(g, inverse)


_transpose = primitive(np.transpose, _transpose_rule, name="transpose")


@register(np.transpose, np.permute_dims)
def transpose(x, axes=None):
    """Return `x` with its axes permuted, reversed if `axes` is None."""
    return _transpose(
        x, axes=None if axes is None else tuple(normalize_axis_index(a, np.ndim(x)) for a in axes)
    )


@register(np.swapaxes)
def swapaxes(x, axis1, axis2):
    """Return `x` with two axes exchanged."""
    axes = list(range(np.ndim(x)))
    axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
    return transpose(x, axes)


@register(np.moveaxis)
def moveaxis(x, source, destination):
    """Return `x` with the axes `source` moved to the positions `destination`."""
    ndim = np.ndim(x)
    source = [source] if isinstance(source, int) else list(source)
    destination = [destination] if isinstance(destination, int) else list(destination)
    source = [normalize_axis_index(a, ndim) for a in source]
    destination = [normalize_axis_index(a, ndim) for a in destination]
    order = [a for a in range(ndim) if a not in source]
    for d, s in sorted(zip(destination, source)):
        order.insert(d, s)
    return transpose(x, order)


@register(np.expand_dims)
def expand_dims(x, axis):
    """Return `x` with axes of length 1 inserted at the positions `axis` of the result."""
    shape, axes = list(x.shape), _axes(axis, 0)
    axes = [normalize_axis_index(a, len(shape) + len(axes)) for a in axes]
    if len(set(axes)) < len(axes):
        raise ValueError(f"expand_dims: repeated axis in {axis}")
    for a in sorted(axes):
        shape.insert(a, 1)
    return reshape(x, shape)


@register(np.squeeze)
def squeeze(x, axis=None):
    """Return `x` without the axes of length 1 that `axis` names, or all of them."""
    return reshape(x, np.squeeze(np.broadcast_to(0, np.shape(x)), axis).shape)


@register(np.ravel)
def ravel(x):
    """Return `x` flattened."""
    return reshape(x, -1)


def _stretched(x, shape):
    if math.prod(shape) > SMALL:
        return np.broadcast_to(x, shape)  # a view
    out = np.empty(shape, x.dtype)  # a copy, in a third of the time
    out[...] = x
    return out


_broadcast_to = primitive(_stretched, lambda ans, x, shape: lambda g: g, name="broadcast_to")


@register(np.broadcast_to)
def broadcast_to(x, shape):
    """Return `x` broadcast to `shape`; the engine's summing over stretched axes is its rule."""
    return _broadcast_to(x, shape=shape)


def _concatenate_rule(i, ans, *arrays, axis):
    axis %= ans.ndim
    start = builtins.sum(np.shape(a)[axis] for a in arrays[:i])
    here = (slice(None),) * axis + (slice(start, start + np.shape(arrays[i])[axis]),)
    return lambda g: g[here]


_concatenate = primitive(
    lambda *arrays, axis: np.concatenate(arrays, axis),
    variadic=_concatenate_rule,
    name="concatenate",
)


@register(np.concatenate)
def concatenate(arrays, axis=0):
    """Return the arrays joined along `axis`; with axis None, all flattened."""
    if axis is None:
        return _concatenate(*(reshape(a, -1) for a in arrays), axis=0)
    return _concatenate(*arrays, axis=axis)


def _stack_rule(i, ans, *arrays, axis):
    here = (slice(None),) * (axis % ans.ndim) + (i,)
    return lambda g: g[here]


_stack = primitive(lambda *arrays, axis: np.stack(arrays, axis), variadic=_stack_rule, name="stack")


@register(np.stack)
def stack(arrays, axis=0):
    """Return the arrays, all of one shape, joined along a new axis."""
    return _stack(*arrays, axis=axis)


@register(np.split)
def split(x, indices_or_sections, axis=0):
    """Return the list of the pieces of `x` along `axis`: equal ones, or cut at given indices."""
    pieces = np.split(np.arange(np.shape(x)[axis]), indices_or_sections)
    before = (slice(None),) * (axis % np.ndim(x))
    cuts = [slice(piece[0], piece[-1] + 1) if len(piece) else slice(0) for piece in pieces]
    return [x[(*before, cut)] for cut in cuts]


def _pad_rule(ans, x, pad_width, **_):
    widths = np.broadcast_to(pad_width, (np.ndim(x), 2))
    inner = tuple(slice(a, n - b) for (a, b), n in zip(widths, ans.shape))
    return lambda g: g[inner]


_pad = primitive(np.pad, _pad_rule, name="pad")


@register(np.pad)
def pad(x, pad_width, mode="constant", constant_values=0):
    """Return `x` with `pad_width` constants before and after each axis."""
    if mode != "constant":
        raise NotImplementedError(f"pad of a traced array: mode 'constant' only, not {mode!r}")
    return _pad(x, pad_width=pad_width, constant_values=constant_values)


_flip = primitive(np.flip, lambda ans, x, axis: lambda g: np.flip(g, axis), name="flip")


@register(np.flip)
def flip(x, axis=None):
    """Return `x` in reverse order along `axis` (all axes if None)."""
    return _flip(x, axis=axis)


_roll = primitive(
    np.roll,
    lambda ans, x, shift, axis: lambda g: np.roll(g, np.negative(shift), axis),
    name="roll",
)


@register(np.roll)
def roll(x, shift, axis=None):
    """Return `x` with its elements shifted cyclically along `axis`."""
    return _roll(x, shift=shift, axis=axis)


@register(np.tile)
def tile(x, reps):
    """Return `x` repeated `reps` times along each axis, as a whole."""
    reps = (reps,) if isinstance(reps, int) else tuple(reps)
    ndim = builtins.max(np.ndim(x), len(reps))
    shape = (1,) * (ndim - np.ndim(x)) + np.shape(x)
    reps = (1,) * (ndim - len(reps)) + reps
    x = reshape(x, [k for n in shape for k in (1, n)])
    x = broadcast_to(x, [k for r, n in zip(reps, shape) for k in (r, n)])
    return reshape(x, [r * n for r, n in zip(reps, shape)])


@register(np.repeat)
def repeat(x, repeats, axis=None):
    """Return `x` with each element repeated along `axis`, of the flattened array if None."""
    if axis is None:
        x, axis = reshape(x, -1), 0
    return take(x, np.repeat(np.arange(np.shape(x)[axis]), repeats), axis)


# ------------------------------------------------------------------------------------ indexing


def _is_basic(index):
    basic = int, np.integer, slice, type(None), type(...)
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, basic) and not isinstance(p, bool) for p in parts)


def _getitem_rule(ans, x, index):
    shape = np.shape(x)
    return lambda g: scatter(g, index=index, shape=shape)


def _scatter(g, index, shape):
    """Return zeros of `shape` with `g` added at `index`: the adjoint of indexing."""
    out = np.zeros(shape, g.dtype)
    rows = index[0] if type(index) is tuple and len(index) == 1 else index
    if _is_basic(index):
        out[index] = g
    elif type(rows) is np.ndarray and rows.dtype.kind in "iu":
        n, d = len(out), math.prod(shape[1:])
        add_rows(out.reshape(n, d), rows.reshape(rows.size), g.reshape(rows.size, d))
    else:
        np.add.at(out, index, g)
    return out


getitem = primitive(lambda x, index: x[index], _getitem_rule, name="getitem")
scatter = primitive(_scatter, lambda ans, g, index, shape: lambda h: h[index], name="scatter")


def _index(x, index):
    parts = index if isinstance(index, tuple) else (index,)
    if any(type(p) is Tracer for p in parts):
        raise TypeError("a traced array cannot be an index; use argmax, floor or stop_gradient")
    return getitem(x, index=index)


@register(np.take)
def take(x, indices, axis=None):
    """Return the elements of `x` at `indices` along `axis`, of the flattened array if None."""
    if axis is None:
        x, axis = reshape(x, -1), 0
    before = (slice(None),) * normalize_axis_index(axis, np.ndim(x))
    return x[(*before, plain(indices))]


@register(np.take_along_axis)
def take_along_axis(x, indices, axis=-1):
    """Return the elements of `x` that `indices`, an array of as many axes, picks along `axis`."""
    indices = np.asarray(plain(indices))
    # The other axes run over all of x, and broadcast against the indices.
    where_to = list(np.ogrid[tuple(slice(n) for n in np.shape(x))])
    where_to[axis] = indices
    return x[tuple(where_to)]


@register(np.diagonal)
def diagonal(x, offset=0, axis1=0, axis2=1):
    """Return the diagonals over two axes, as the last axis of the result."""
    x = moveaxis(x, (axis1, axis2), (-2, -1))
    rows, columns = np.nonzero(np.eye(*np.shape(x)[-2:], k=offset))
    return x[..., rows, columns]


@register(np.trace)
def trace(x, offset=0, axis1=0, axis2=1):
    """Return the sums along the diagonals over two axes."""
    return sum(diagonal(x, offset, axis1, axis2), axis=-1)


@register(np.diag)
def diag(x, k=0):
    """Return the diagonal of a matrix, or the matrix with the vector `x` on its diagonal."""
    if np.ndim(x) == 2:
        return diagonal(x, k)
    n = len(x) + abs(k)
    rows = np.arange(len(x)) + builtins.max(-k, 0)
    return scatter(x, index=(rows, rows + k), shape=(n, n))


@register(np.tril)
def tril(x, k=0):
    """Return the lower triangle of the last two axes: 0 above the k-th diagonal."""
    return where(np.tri(*np.shape(x)[-2:], k=k, dtype=bool), x, 0)


@register(np.triu)
def triu(x, k=0):
    """Return the upper triangle of the last two axes: 0 below the k-th diagonal."""
    return where(np.tri(*np.shape(x)[-2:], k=k - 1, dtype=bool), 0, x)


# --------------------------------------------------------------------------- dtypes and methods

_astype = primitive(
    lambda x, dtype: x.astype(dtype), lambda ans, x, dtype: lambda g: g, name="astype"
)


@register(np.astype)
def astype(x, dtype):
    """Return `x` in another dtype; a traced array cast to integers or bool becomes plain."""
    kind = np.dtype(dtype).kind
    if kind in "biu":
        return plain(x).astype(dtype)
    if kind != "f":
        raise TypeError(f"a traced array cannot be cast to {np.dtype(dtype)}: real dtypes only")
    return _astype(x, dtype=dtype)


copy = register(np.copy)(primitive(np.copy, lambda ans, x: lambda g: g))

REDUCTIONS.update({np.add: sum, np.multiply: prod, np.maximum: max, np.minimum: min})

Tracer.__getitem__ = _index
Tracer.T = property(transpose)
Tracer.mT = property(lambda self: swapaxes(self, -1, -2))
Tracer.argmax, Tracer.argmin = TABLE[np.argmax], TABLE[np.argmin]
Tracer.flatten = ravel
for _method in (
    *(sum, mean, var, std, max, min, prod, cumsum, squeeze, ravel, repeat, swapaxes),
    *(diagonal, trace, astype, copy, take),
):
    setattr(Tracer, _method.__name__, _method)


def _varargs(op):
    """Allow x.reshape(2, 3) beside x.reshape((2, 3))."""
    return lambda self, *args: op(self, args[0] if len(args) == 1 else args or None)


Tracer.reshape = _varargs(reshape)
Tracer.transpose = _varargs(transpose)
