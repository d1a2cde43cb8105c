r"""Layers of neural networks: functions of (params, x), and functions that initialise the params.

    params = dense_init(rng, 784, 400)       # {"w": (784, 400), "b": (400,)}
    h = np.tanh(dense(params, x))            # x (..., 784), h (..., 400)

Parameters are dicts of arrays, so a network is a nested container of them and a plain function.
Images are (N, C, H, W), the weights of a convolution (F, C, K, L). All is differentiable to any
order. An initialiser is a function (rng, shape, dtype) -> array; it draws in float64 and rounds,
so that float32 and float64 parameters of the same seed differ by rounding alone.
"""

import math

import numpy as np

from minigrad.core import plain, primitive
from minigrad.kernels import conv
from minigrad.products import rows_by_rows, rows_times_matrix

__all__ = [
    "affine",
    "causal_mask",
    "conv2d",
    "conv2d_init",
    "conv2d_transpose",
    "conv2d_transpose_init",
    "dense",
    "dense_init",
    "embedding",
    "embedding_init",
    "glorot_uniform",
    "he_normal",
    "masked_conv2d",
    "normal",
    "zeros",
]

# -------------------------------------------------------------------------------- initialisers


def _fans(shape):
    """Return the numbers of inputs and outputs of one unit, for weights (I, O) or (F, C, K, L)."""
    if len(shape) == 2:
        return shape
    if len(shape) == 4:
        taps = shape[2] * shape[3]
        return shape[1] * taps, shape[0] * taps
    raise ValueError(
        f"weights of shape {tuple(shape)} have no fan-in: this initialiser takes (n_in, n_out) or "
        "(F, C, K, L); use normal or zeros"
    )


def glorot_uniform(rng, shape, dtype=np.float32):
    r"""Draw weights from $U(-a, a)$ with $a^2 = 6 / (n_\text{in} + n_\text{out})$.

    Keeps the variance of signals about the same in both directions (Glorot and Bengio, 2010).
    """
    limit = math.sqrt(6 / max(1, sum(_fans(shape))))
    return rng.uniform(-limit, limit, shape).astype(dtype)


def he_normal(rng, shape, dtype=np.float32):
    r"""Draw weights from $N(0, 2 / n_\text{in})$, for rectified units (He et al., 2015)."""
    return normal(rng, shape, dtype, scale=math.sqrt(2 / max(1, _fans(shape)[0])))


def normal(rng, shape, dtype=np.float32, scale=0.01):
    r"""Draw from $N(0, \text{scale}^2)$."""
    return (scale * rng.standard_normal(shape)).astype(dtype)


def zeros(_rng, shape, dtype=np.float32):
    """Return zeros; the generator is there because every initialiser takes one."""
    return np.zeros(shape, dtype)


# --------------------------------------------------------------------------------------- dense


def _affine(x, w, b):
    y = rows_times_matrix(x, w)
    return np.add(y, b, out=y) if y.dtype is b.dtype else y + b


# The rule of b is the cotangent itself: the engine sums it over the rows.
_affine = primitive(
    _affine,
    lambda ans, x, w, b: lambda g: rows_times_matrix(g, w.T),
    lambda ans, x, w, b: lambda g: rows_by_rows(x, g),
    lambda ans, x, w, b: lambda g: g,
    name="affine",
)


def affine(x, w, b):
    r"""Return $x W + b$ for `x` (..., I), `w` (I, O) and `b` (O,): (..., O).

    Raises ValueError, naming the three shapes, where they do not fit together.
    """
    if len(w.shape) != 2 or x.shape[-1:] != w.shape[:1] or b.shape != w.shape[1:]:
        raise ValueError(
            f"dense layer: x {x.shape}, w {w.shape} and b {b.shape} do not fit together; they "
            "must be (..., n_in), (n_in, n_out) and (n_out,)"
        )
    return _affine(x, w, b)


def dense_init(rng, n_in, n_out, dtype=np.float32, w_init=glorot_uniform):
    """Return the parameters {"w": (n_in, n_out), "b": (n_out,)} of `dense`; the bias is 0."""
    return {"w": w_init(rng, (n_in, n_out), dtype), "b": np.zeros(n_out, dtype)}


def dense(params, x):
    r"""Return $x W + b$: `x` (..., n_in), result (..., n_out). Raises as `affine` does."""
    return affine(x, params["w"], params["b"])


# --------------------------------------------------------------------------------- convolution
# <g, conv(x, w)> is linear in each of g, x and w. Its partial derivatives in them are the three
# functions below, so each one's rules are the other two, and derivatives of any order exist.


def _conv2d_rule_x(ans, x, w, **settings):
    shape = x.shape
    return lambda g: _conv2d_dx(g, w, x_shape=shape, **settings)


def _conv2d_rule_w(ans, x, w, **settings):
    shape = w.shape
    return lambda g: _conv2d_dw(g, x, w_shape=shape, **settings)


def _conv2d_dx_rule_w(ans, g, w, x_shape, **settings):
    shape = w.shape
    return lambda h: _conv2d_dw(g, h, w_shape=shape, **settings)


def _conv2d_dw_rule_x(ans, g, x, w_shape, **settings):
    shape = x.shape
    return lambda h: _conv2d_dx(g, h, x_shape=shape, **settings)


_conv2d = primitive(conv.conv2d, _conv2d_rule_x, _conv2d_rule_w)
_conv2d_dx = primitive(
    conv.conv2d_dx,
    lambda ans, g, w, x_shape, **settings: lambda h: _conv2d(h, w, **settings),
    _conv2d_dx_rule_w,
)
_conv2d_dw = primitive(
    conv.conv2d_dw,
    lambda ans, g, x, w_shape, **settings: lambda h: _conv2d(x, h, **settings),
    _conv2d_dw_rule_x,
)


def _biased(y, b):
    # In place: y is the result of a convolution, which nobody else has seen and no rule mentions.
    b = b[:, None, None]
    return np.add(y, b, out=y) if y.dtype == b.dtype else y + b


_bias = primitive(
    _biased,
    lambda ans, y, b: lambda g: g,
    lambda ans, y, b: lambda g: np.sum(np.sum(g, axis=(2, 3)), axis=0),
    name="add_bias",
)


def _add_bias(name, y, b):
    if b.shape != y.shape[1:2]:
        raise ValueError(
            f"{name}: the result has shape {y.shape} and b {b.shape}; b must be ({y.shape[1]},)"
        )
    return _bias(y, b)


def _taps(name, kernel_size):
    return conv.pair(name, "kernel_size", kernel_size, 1)


def conv2d_init(rng, n_in, n_out, kernel_size, dtype=np.float32, w_init=glorot_uniform):
    """Return {"w": (n_out, n_in, K, L), "b": (n_out,)} for `conv2d` and `masked_conv2d`.

    `kernel_size` is K = L, or the pair (K, L); the bias is 0.
    """
    w = w_init(rng, (n_out, n_in, *_taps("conv2d_init", kernel_size)), dtype)
    return {"w": w, "b": np.zeros(n_out, dtype)}


def conv2d(params, x, stride=1, padding=0, dilation=1):
    r"""Cross-correlate images `x` (N, C, H, W) with `w` (F, C, K, L) and add `b`: (N, F, H', W').

    $H' = \lfloor (H + 2 p - d (K - 1) - 1) / s \rfloor + 1$ for stride s, padding p (zeros on both
    sides) and dilation d, each an int or a pair (vertical, horizontal); W' likewise. Raises
    ValueError, naming the shapes, where they do not fit together.
    """
    y = _conv2d(x, params["w"], stride=stride, padding=padding, dilation=dilation)
    return _add_bias("conv2d", y, params["b"])


def conv2d_transpose_init(rng, n_in, n_out, kernel_size, dtype=np.float32, w_init=glorot_uniform):
    """Return {"w": (n_in, n_out, K, L), "b": (n_out,)} for `conv2d_transpose`; the bias is 0."""
    w = w_init(rng, (n_out, n_in, *_taps("conv2d_transpose_init", kernel_size)), dtype)
    return {"w": np.ascontiguousarray(np.swapaxes(w, 0, 1)), "b": np.zeros(n_out, dtype)}


def conv2d_transpose(params, x, stride=1, padding=0, dilation=1, output_padding=0):
    r"""Apply the adjoint of `conv2d` in its images, and add `b`: the layer that enlarges images.

    `x` (N, F, H', W'), `w` (F, C, K, L), `b` (C,), result (N, C, H, W) with
    $H = (H' - 1) s - 2 p + d (K - 1) + 1 + o$, W likewise. A convolution of stride s makes the same
    H' of s different H: the output padding o, from 0 to s - 1, says which of them is meant. Raises
    ValueError, naming the shapes, where they do not fit together.
    """
    w = params["w"]
    if len(x.shape) != 4 or len(w.shape) != 4 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"conv2d_transpose: x {x.shape} and w {w.shape} do not fit together; they must be "
            "(N, F, H, W) and (F, C, K, L)"
        )
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    pairs = [
        conv.pair("conv2d_transpose", name, value, int(name != "padding"))
        for name, value in settings.items()
    ]
    pairs.append(conv.pair("conv2d_transpose", "output_padding", output_padding, 0))
    for s, o in zip(pairs[0], pairs[3]):
        if not 0 <= o < s:
            raise ValueError(
                f"conv2d_transpose: output_padding {output_padding} must be at least 0 and less "
                f"than the stride {stride}"
            )
    size = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + o
        for n, k, s, p, d, o in zip(x.shape[2:], w.shape[2:], *pairs)
    ]
    if min(size) < 1:
        raise ValueError(
            f"conv2d_transpose: x {x.shape} and w {w.shape} with stride {stride}, padding "
            f"{padding} and dilation {dilation} would give images of {size[0]} x {size[1]} pixels"
        )
    shape = (x.shape[0], w.shape[1], *size)
    y = _conv2d_dx(x, w, x_shape=shape, stride=stride, padding=padding, dilation=dilation)
    return _add_bias("conv2d_transpose", y, params["b"])


def causal_mask(kind, kernel_size):
    """Return the (K, L) mask, True for the taps before the centre in reading order.

    The centre itself is True for `kind` "B" and False for "A", which the first layer of an
    autoregressive model needs (van den Oord et al., 2016). K and L must be odd.
    """
    rows, columns = _taps("causal_mask", kernel_size)
    if kind not in ("A", "B") or rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(
            f"a causal mask has kind 'A' or 'B' and an odd kernel size, not {kind!r} and "
            f"{rows} x {columns}"
        )
    before = np.arange(rows * columns) < rows * columns // 2 + (kind == "B")
    return before.reshape(rows, columns)


def masked_conv2d(params, x, kind):
    """Convolve `x` (N, C, H, W) with the weights under `causal_mask(kind, ...)`: (N, F, H, W).

    Zeros are padded so that the size stays. Output pixel i depends on the input pixels before i in
    reading order, and on pixel i itself for `kind` "B"; channels are not ordered. The gradient of
    the masked taps is 0. Parameters as for `conv2d`, with odd K and L.
    """
    w = params["w"]
    mask = causal_mask(kind, w.shape[2:])
    padding = w.shape[2] // 2, w.shape[3] // 2
    y = _conv2d(x, w, stride=1, padding=padding, dilation=1, taps=mask)
    return _add_bias("masked_conv2d", y, params["b"])


# ----------------------------------------------------------------------------------- embedding


def embedding_init(rng, n_symbols, n_features, dtype=np.float32, w_init=normal):
    """Return the parameters {"w": (n_symbols, n_features)} of `embedding`."""
    return {"w": w_init(rng, (n_symbols, n_features), dtype)}


def embedding(params, indices):
    """Return the rows of `w` (K, D) at `indices` (...), integers from 0 to K - 1: (..., D).

    The gradient adds up the cotangents of equal indices. Raises TypeError for indices that are not
    integers and IndexError, rather than counting from the end, for those out of range.
    """
    w, indices = params["w"], np.asarray(plain(indices))
    if indices.dtype.kind not in "iu":
        raise TypeError(f"embedding: the indices must be integers, not {indices.dtype}")
    if indices.size and not (0 <= indices.min() and indices.max() < w.shape[0]):
        raise IndexError(
            f"embedding: indices from {indices.min()} to {indices.max()}, but w {w.shape} has the "
            f"rows 0 to {w.shape[0] - 1}"
        )
    return w[indices]
