"""Products of arrays: matrices, stacks of them, tensors and einsum, with NumPy's names."""

import math
import string

import numpy as np
from numpy.lib.array_utils import normalize_axis_index

from minigrad.arrays import reshape, sum, transpose
from minigrad.core import Tracer, primitive, register
from minigrad.elementwise import multiply


def _array(x):
    return x if type(x) is Tracer else np.asarray(x)


def _matmul_rule_x(ans, x, y):
    y = _array(y)
    if y.ndim == 1:
        return lambda g: g * y if g.ndim == 0 else np.expand_dims(g, -1) * y
    if x.ndim == 1:
        return lambda g: np.matmul(y, np.expand_dims(g, -1))[..., 0]
    if y.ndim == 2:
        return lambda g: rows_times_matrix(g, y.T)
    return lambda g: np.matmul(g, np.swapaxes(y, -1, -2))


def _matmul_rule_y(ans, x, y):
    x = _array(x)
    if x.ndim == 1:
        return lambda g: g * x if g.ndim == 0 else np.expand_dims(g, -2) * x[:, None]
    if y.ndim == 1:
        return lambda g: np.sum(np.expand_dims(g, -1) * x, axis=tuple(range(x.ndim - 1)))
    if y.ndim == 2:
        return lambda g: rows_by_rows(x, g)
    return lambda g: np.matmul(np.swapaxes(x, -1, -2), g)


matmul = primitive(np.matmul, _matmul_rule_x, _matmul_rule_y)


# NumPy calls BLAS once for each matrix of a stack. Where a stack meets a matrix, all its rows make
# one product; it and the product of transposed rows by rows are each other's derivatives.


def _rows(x):
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _rows_times_matrix(x, w):
    y = np.matmul(_rows(x), w)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], w.shape[1])


rows_times_matrix = primitive(
    _rows_times_matrix,
    lambda ans, x, w: lambda g: rows_times_matrix(g, w.T),
    lambda ans, x, w: lambda g: rows_by_rows(x, g),
    name="rows_times_matrix",
)
rows_by_rows = primitive(
    lambda x, y: np.matmul(_rows(x).T, _rows(y)),
    lambda ans, x, y: lambda g: rows_times_matrix(y, g.T),
    lambda ans, x, y: lambda g: rows_times_matrix(x, g),
    name="rows_by_rows",
)


@register(np.tensordot)
def tensordot(x, y, axes=2):
    """Return the sum of products of `x` and `y` over `axes`, as one matrix product."""
    nx, ny = np.ndim(x), np.ndim(y)
    if isinstance(axes, int):
        axes = (range(nx - axes, nx), range(axes))
    ax, ay = ([axes_i] if isinstance(axes_i, int) else list(axes_i) for axes_i in axes)
    ax = [normalize_axis_index(a, nx) for a in ax]
    ay = [normalize_axis_index(a, ny) for a in ay]
    kept_x = [a for a in range(nx) if a not in ax]
    kept_y = [a for a in range(ny) if a not in ay]
    if [np.shape(x)[a] for a in ax] != [np.shape(y)[a] for a in ay]:
        raise ValueError(
            f"tensordot: axes {ax} of shape {np.shape(x)} do not match axes {ay} of {np.shape(y)}"
        )
    shape = [np.shape(x)[a] for a in kept_x] + [np.shape(y)[a] for a in kept_y]
    n = math.prod(np.shape(x)[a] for a in ax)
    left = reshape(transpose(x, kept_x + ax), (math.prod(shape[: len(kept_x)]), n))
    right = reshape(transpose(y, ay + kept_y), (n, math.prod(shape[len(kept_x) :])))
    return reshape(left @ right, shape)


@register(np.dot)
def dot(x, y):
    """Return NumPy's `dot`: over the last axis of `x` and the last but one of `y`."""
    if np.ndim(x) == 0 or np.ndim(y) == 0:
        return multiply(x, y)
    return tensordot(x, y, (np.ndim(x) - 1, max(np.ndim(y) - 2, 0)))


@register(np.vdot)
def vdot(x, y):
    """Return the sum of the products of all elements of `x` and `y`."""
    return sum(multiply(reshape(x, -1), reshape(y, -1)))


@register(np.outer)
def outer(x, y):
    """Return the matrix of the products of all elements of `x` with all of `y`."""
    return multiply(reshape(x, (-1, 1)), reshape(y, (1, -1)))


def _einsum_rule(i, ans, subscripts, *operands, optimize=False):
    """Contract the cotangent with the other operands, onto the indices of operand i.

    An index that only operand i has was summed: a vector of ones spreads the cotangent over it.
    An index that it has twice picked a diagonal: a unit matrix puts the cotangent back there.
    """
    inputs, output = subscripts.split("->")
    inputs = inputs.split(",")
    i -= 1
    others = [s for j, s in enumerate(inputs) if j != i]
    arrays = [x for j, x in enumerate(operands) if j != i]
    target = ""
    dtype = ans.dtype
    for n, letter in zip(np.shape(operands[i]), inputs[i]):
        if letter in target:
            fresh = next(c for c in string.ascii_letters if c not in subscripts + target)
            others.append(letter + fresh)
            arrays.append(np.eye(n, dtype=dtype))
            letter = fresh
        elif letter not in output and not any(letter in s for s in others):
            others.append(letter)
            arrays.append(np.ones(n, dtype))
        target += letter
    formula = ",".join([output, *others]) + "->" + target
    return lambda g: np.einsum(formula, g, *arrays, optimize=optimize)


_einsum = primitive(np.einsum, None, variadic=_einsum_rule, name="einsum")


@register(np.einsum)
def einsum(subscripts, *operands, optimize=False):
    """Return the sum of products that `subscripts` describe, such as "bi,ij->bj"."""
    if not isinstance(subscripts, str):
        raise TypeError("einsum of traced arrays takes its subscripts as a string: 'ij,jk->ik'")
    return _einsum(_explicit(subscripts, operands), *operands, optimize=optimize)


def _explicit(subscripts, operands):
    """Write out an ellipsis and the output indices, so that the rule need not know of them."""
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        raise ValueError(f"einsum: {subscripts!r} names {len(terms)} operands, got {len(operands)}")
    free = [c for c in string.ascii_letters if c not in subscripts]
    widths = [np.ndim(x) - len(t) + 3 for t, x in zip(terms, operands) if "..." in t]
    widest = max(widths, default=0)
    letters = "".join(free[:widest])
    for j, (term, x) in enumerate(zip(terms, operands)):
        if "..." in term:
            terms[j] = term.replace("...", letters[widest - (np.ndim(x) - len(term) + 3) :])
    if arrow and letters and "..." not in output:
        raise ValueError(f"einsum: {subscripts!r} has an ellipsis; the output needs one too")
    if arrow:
        output = output.replace("...", letters)
    else:
        joined = "".join(terms)
        output = letters + "".join(
            sorted(c for c in set(joined) if joined.count(c) == 1 and c not in letters)
        )
    return ",".join(terms) + "->" + output


Tracer.__matmul__ = matmul
Tracer.__rmatmul__ = lambda self, other: matmul(other, self)
Tracer.dot = dot
