"""Two-dimensional convolution and its two adjoints on plain NumPy arrays.

The three functions are the partials of one trilinear form

    <g, conv2d(x, w)> = sum over n, f, i, j, c, k, l of
        g[n, f, i, j] w[f, c, k, l] x[n, c, i s - p + k d, j s - p + l d]

(stride s, padding p, dilation d; x is 0 outside), so each one's derivatives are the other two.
All work is done by BLAS on the patches of a few images at a time, never of the whole batch.
"""

import operator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Bytes of patches held at once: they are written and read again while still in the cache. Blocks of
# 16 times this were 10 to 25 % slower, and smaller ones slower where an image is small.
BLOCK_BYTES = 1 << 20


def conv2d(x, w, stride=1, padding=0, dilation=1):
    """Cross-correlate images x (N, C, H, W) with weights w (F, C, K, L): (N, F, H', W').

    H' = (H + 2 padding - dilation (K - 1) - 1) // stride + 1, and W' likewise; `stride`,
    `padding` (zeros on both sides) and `dilation` are an int or a pair (vertical, horizontal).
    The kernel is not flipped. Raises ValueError if the shapes do not fit together.
    """
    x, w = np.asarray(x), np.asarray(w)
    stride, padding, dilation, out_shape = _geometry(
        "conv2d", x.shape, w.shape, stride, padding, dilation
    )
    filters, channels, rows, columns = w.shape
    dtype = np.result_type(x, w)
    out = np.empty((*out_shape[:2], out_shape[2] * out_shape[3]), dtype)
    matrix = w.reshape(filters, channels * rows * columns)
    for block in _blocks(x.shape[0], matrix.shape[1] * out.shape[2] * dtype.itemsize):
        patches = _patches(x[block], w.shape, stride, padding, dilation)
        patches = np.ascontiguousarray(patches, dtype)
        patches = patches.reshape(len(patches), matrix.shape[1], out.shape[2])
        np.matmul(matrix, patches, out=out[block])
    return out.reshape(out_shape)


def conv2d_dx(g, w, x_shape, stride=1, padding=0, dilation=1):
    """Adjoint of `conv2d` in x: the (N, C, H, W) array with <dx, x> = <g, conv2d(x, w)>.

    g (N, F, H', W'), w (F, C, K, L); `x_shape` is needed because a stride leaves H and W open.
    Raises ValueError if the shapes do not fit together.
    """
    g, w = np.asarray(g), np.asarray(w)
    stride, padding, dilation, out_shape = _geometry(
        "conv2d_dx", x_shape, w.shape, stride, padding, dilation, g.shape
    )
    (batch, channels, height, width), (filters, _, rows, columns) = x_shape, w.shape
    (top, left), (down, right) = padding, dilation
    inner = (down * (rows - 1) - top, right * (columns - 1) - left)
    # With stride 1 the adjoint is a convolution with the flipped kernel: no scattered additions,
    # 1.3 to 1.5 times as fast. With few channels its patches of g are much larger than x.
    if stride == (1, 1) and min(inner) >= 0 and filters <= 2 * channels:
        return conv2d(g, w[:, :, ::-1, ::-1].swapaxes(0, 1), 1, inner, dilation)

    dtype = np.result_type(g, w)
    g = g.reshape(batch, filters, out_shape[2] * out_shape[3])
    taps = np.ascontiguousarray(w.transpose(2, 3, 1, 0), dtype)
    dx = np.zeros((batch, channels, height + 2 * top, width + 2 * left), dtype)
    for block in _blocks(batch, (channels + filters) * g.shape[2] * dtype.itemsize):
        for tap in np.ndindex(rows, columns):
            target = _tap(dx[block], tap, stride, dilation, out_shape[2:])
            target += np.matmul(taps[tap], g[block]).reshape(target.shape)
    return np.ascontiguousarray(dx[:, :, top : top + height, left : left + width])


def conv2d_dw(g, x, w_shape, stride=1, padding=0, dilation=1):
    """Adjoint of `conv2d` in w: the (F, C, K, L) array with <dw, w> = <g, conv2d(x, w)>.

    g (N, F, H', W'), x (N, C, H, W); `w_shape` is needed because a stride leaves K and L open.
    Raises ValueError if the shapes do not fit together.
    """
    g, x = np.asarray(g), np.asarray(x)
    stride, padding, dilation, _ = _geometry(
        "conv2d_dw", x.shape, w_shape, stride, padding, dilation, g.shape
    )
    filters, channels, rows, columns = w_shape
    dtype = np.result_type(g, x)
    size = channels * rows * columns
    dw = np.zeros((filters, size), dtype)
    g = g.astype(dtype, copy=False).swapaxes(0, 1)
    pixels = g.shape[2] * g.shape[3]
    for block in _blocks(x.shape[0], size * pixels * dtype.itemsize):
        patches = _patches(x[block], w_shape, stride, padding, dilation)
        columns_of = patches.transpose(1, 2, 3, 0, 4, 5).reshape(size, len(patches) * pixels)
        dw += g[:, block].reshape(filters, columns_of.shape[1]) @ columns_of.T
    return dw.reshape(w_shape)


def _geometry(name, x_shape, w_shape, stride, padding, dilation, g_shape=None):
    """Check one convolution; return its three settings as pairs and the shape of its output."""
    if len(x_shape) != 4 or len(w_shape) != 4:
        raise ValueError(
            f"{name}: x must be (N, C, H, W) and w (F, C, K, L), "
            f"but their shapes are {tuple(x_shape)} and {tuple(w_shape)}"
        )
    if x_shape[1] != w_shape[1]:
        raise ValueError(
            f"{name}: x {tuple(x_shape)} has {x_shape[1]} channels, but w {tuple(w_shape)} takes "
            f"{w_shape[1]}; x is (N, C, H, W), w is (F, C, K, L)"
        )
    stride = _pair(name, "stride", stride, 1)
    padding = _pair(name, "padding", padding, 0)
    dilation = _pair(name, "dilation", dilation, 1)
    spans = [d * (size - 1) + 1 for d, size in zip(dilation, w_shape[2:])]
    padded = [size + 2 * p for p, size in zip(padding, x_shape[2:])]
    if min(w_shape[2:]) < 1 or padded[0] < spans[0] or padded[1] < spans[1]:
        raise ValueError(
            f"{name}: a kernel of {w_shape[2]} x {w_shape[3]} with dilation {dilation} spans "
            f"{spans[0]} x {spans[1]} pixels and finds no place in x of {x_shape[2]} x "
            f"{x_shape[3]} with padding {padding}, which is {padded[0]} x {padded[1]}"
        )
    size = [(p - span) // s + 1 for p, span, s in zip(padded, spans, stride)]
    out_shape = (x_shape[0], w_shape[0], *size)
    if g_shape is not None and tuple(g_shape) != out_shape:
        raise ValueError(
            f"{name}: g has shape {tuple(g_shape)}, but x {tuple(x_shape)} with w "
            f"{tuple(w_shape)}, stride {stride}, padding {padding} and dilation {dilation} "
            f"gives {out_shape}"
        )
    return stride, padding, dilation, out_shape


def _pair(name, setting, value, least):
    """Return an int or a pair of ints as a pair, each at least `least`."""
    try:
        pair = tuple(map(operator.index, value if np.iterable(value) else (value, value)))
    except TypeError:
        pair = ()
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(
            f"{name}: {setting} must be an int or a pair of ints, each at least {least}, "
            f"not {value!r}"
        )
    return pair


def _blocks(batch, bytes_per_image):
    """Slices of a batch whose patches take about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // max(1, bytes_per_image))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _patches(x, w_shape, stride, padding, dilation):
    """View the zero-padded x as patches (N, C, K, L, H', W')."""
    if any(padding):
        batch, channels, height, width = x.shape
        top, left = padding
        padded = np.zeros((batch, channels, height + 2 * top, width + 2 * left), x.dtype)
        padded[:, :, top : top + height, left : left + width] = x
        x = padded
    spans = [d * (size - 1) + 1 for d, size in zip(dilation, w_shape[2:])]
    windows = sliding_window_view(x, spans, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return windows.transpose(0, 1, 4, 5, 2, 3)


def _tap(x, tap, stride, dilation, size):
    """View of the pixels of the padded x that one tap of the kernel meets, (N, C, H', W')."""
    (row, column), (down, right), (s, t), (height, width) = tap, dilation, stride, size
    top, left = row * down, column * right
    return x[:, :, top : top + s * height : s, left : left + t * width : t]
