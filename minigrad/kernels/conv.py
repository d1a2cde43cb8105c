"""Two-dimensional convolution and its two adjoints on plain arrays.

The three functions are the partials of one trilinear form

    <g, conv2d(x, w)> = sum over n, f, i, j, c, k, l of
        g[n, f, i, j] w[f, c, k, l] x[n, c, i s - p + k d, j s - p + l d]

(stride s, padding p, dilation d; x is 0 outside), so each one's derivatives are the other two.
With `taps`, a (K, L) array of booleans, the sum is over its True taps only: the weights elsewhere
count as 0, whatever they are, are not multiplied with anything, and have the gradient 0.

Each exists twice. The NumPy twin has BLAS multiply the weights with the patches of a few images
at a time, never of the whole batch. The compiled kernels of `conv_numba.py` do without patches;
they win where there are enough channels to fill their registers and long enough inner loops.
The work is cut by the shapes alone, so the results do not depend on the number of threads.
"""

import functools
import operator

import numpy as np

from minigrad.kernels import compiled

# Bytes of patches held at once: they are written and read again while still in the cache. Blocks of
# 16 times this were 10 to 25 % slower, and smaller ones slower where an image is small.
BLOCK_BYTES = 1 << 20
# The least numbers of outputs side by side and of terms in the inner loop for the compiled kernels.
MIN_LANES, MIN_RUN = 9, 20
PIECES = 8  # a batch is cut into this many, for the threads to share


def conv2d(x, w, stride=1, padding=0, dilation=1, taps=None):
    """Cross-correlate images x (N, C, H, W) with weights w (F, C, K, L): (N, F, H', W').

    H' = (H + 2 padding - dilation (K - 1) - 1) // stride + 1, and W' likewise; `stride`,
    `padding` (zeros on both sides) and `dilation` are an int or a pair (vertical, horizontal).
    The kernel is not flipped. Raises ValueError if the shapes do not fit together.
    """
    x, w = np.asarray(x), np.asarray(w)
    stride, padding, dilation, out_shape = _geometry(
        "conv2d", x.shape, w.shape, stride, padding, dilation
    )
    taps = _live("conv2d", taps, w.shape)
    dtype = np.result_type(x, w)
    if _direct_pays(w.shape[0], w.shape[1] * _run(taps, dilation[1] == 1), dtype, out_shape):
        weights = w[:, :, taps[:, 0], taps[:, 1]].swapaxes(1, 2)
        offsets = [(0, tuple(tap)) for tap in (taps * dilation - padding).tolist()]
        return _direct(x, weights, tuple(offsets), stride, (1, 1), out_shape)
    return _conv2d(x, w, stride, padding, dilation, taps, out_shape)


def _conv2d(x, w, stride, padding, dilation, taps, out_shape):
    dtype = np.result_type(x, w)
    out = np.empty((*out_shape[:2], out_shape[2] * out_shape[3]), dtype)
    matrix = w[:, :, taps[:, 0], taps[:, 1]].reshape(len(w), w.shape[1] * len(taps))

    def work(block):
        patches = _patches(x[block], out_shape[2:], stride, padding, dilation, taps, dtype)
        patches = patches.reshape(len(patches), matrix.shape[1], out.shape[2])
        np.matmul(matrix, patches, out=out[block])

    compiled.parallel(work, _blocks(len(x), matrix.shape[1] * out.shape[2] * dtype.itemsize))
    return out.reshape(out_shape)


def conv2d_dx(g, w, x_shape, stride=1, padding=0, dilation=1, taps=None):
    """Adjoint of `conv2d` in x: the (N, C, H, W) array with <dx, x> = <g, conv2d(x, w)>.

    g (N, F, H', W'), w (F, C, K, L); `x_shape` is needed because a stride leaves H and W open.
    Raises ValueError if the shapes do not fit together.
    """
    g, w = np.asarray(g), np.asarray(w)
    stride, padding, dilation, out_shape = _geometry(
        "conv2d_dx", x_shape, w.shape, stride, padding, dilation, g.shape
    )
    taps = _live("conv2d_dx", taps, w.shape)
    dtype = np.result_type(g, w)
    run = w.shape[0] * _run(taps, dilation[1] == stride[1] == 1)
    if not _direct_pays(w.shape[1], run, dtype, x_shape):
        return _conv2d_dx(g, w, x_shape, stride, padding, dilation, taps, out_shape)
    order, offsets = _adjoint_offsets(tuple(map(tuple, taps.tolist())), stride, padding, dilation)
    weights = w[:, :, taps[order, 0], taps[order, 1]].transpose(1, 2, 0)
    return _direct(g, weights, offsets, (1, 1), stride, x_shape)


@functools.lru_cache(256)
def _adjoint_offsets(taps, stride, padding, dilation):
    """Return the taps' numbers and the offsets of `_direct`, phase by phase.

    Pixel i of x meets row (i + p - k d) / s of g at the taps k for which that is an integer: the
    same taps for all i that are equal modulo s, and for those dx is a convolution of g.
    """
    order, offsets = [], []
    for phase, first in enumerate(np.ndindex(stride)):
        pixels = np.add(first, padding) - np.multiply(taps, dilation)
        for t in np.flatnonzero(np.all(pixels % stride == 0, axis=1))[::-1]:
            order.append(t)
            offsets.append((phase, tuple((pixels[t] // stride).tolist())))
    return order, tuple(offsets)


def _conv2d_dx(g, w, x_shape, stride, padding, dilation, taps, out_shape):
    (batch, channels, height, width), (filters, _, rows, columns) = x_shape, w.shape
    (top, left), (down, right) = padding, dilation
    inner = (down * (rows - 1) - top, right * (columns - 1) - left)
    # With stride 1 the adjoint is a convolution with the flipped kernel: no scattered additions,
    # 1.3 to 1.5 times as fast. With few channels its patches of g are much larger than x.
    if stride == (1, 1) and min(inner) >= 0 and filters <= 2 * channels:
        flipped = w[:, :, ::-1, ::-1].swapaxes(0, 1)
        taps = ((rows - 1, columns - 1) - taps)[::-1]
        return _conv2d(g, flipped, stride, inner, dilation, taps, x_shape)

    dtype = np.result_type(g, w)
    g = g.reshape(batch, filters, out_shape[2] * out_shape[3])
    matrix = w[:, :, taps[:, 0], taps[:, 1]].transpose(2, 1, 0)
    matrix = np.ascontiguousarray(matrix, dtype).reshape(len(taps) * channels, filters)
    dx = np.zeros((batch, channels, height + 2 * top, width + 2 * left), dtype)

    def work(block):
        images = len(g[block])
        parts = np.matmul(matrix, g[block])
        parts = parts.reshape(images, len(taps), channels, *out_shape[2:])
        for t, tap in enumerate(taps.tolist()):
            target = _tap(dx[block], tap, stride, dilation, out_shape[2:])
            target += parts[:, t]

    compiled.parallel(work, _blocks(batch, (len(matrix) + filters) * g.shape[2] * dtype.itemsize))
    return np.ascontiguousarray(dx[:, :, top : top + height, left : left + width])


def conv2d_dw(g, x, w_shape, stride=1, padding=0, dilation=1, taps=None):
    """Adjoint of `conv2d` in w: the (F, C, K, L) array with <dw, w> = <g, conv2d(x, w)>.

    g (N, F, H', W'), x (N, C, H, W); `w_shape` is needed because a stride leaves K and L open.
    Raises ValueError if the shapes do not fit together.
    """
    g, x = np.asarray(g), np.asarray(x)
    stride, padding, dilation, _ = _geometry(
        "conv2d_dw", x.shape, w_shape, stride, padding, dilation, g.shape
    )
    taps = _live("conv2d_dw", taps, w_shape)
    dtype = np.result_type(g, x)
    direct = _direct_pays(w_shape[0], g.shape[2] * g.shape[3], dtype, x.shape)
    total = (_direct_dw if direct else _numpy_dw)(
        g, x, w_shape, stride, padding, dilation, taps, dtype
    )
    dw = np.zeros(w_shape, dtype)
    dw[:, :, taps[:, 0], taps[:, 1]] = total
    return dw


def _numpy_dw(g, x, w_shape, stride, padding, dilation, taps, dtype):
    """Return dw at the taps, (F, C, T)."""
    filters, channels = w_shape[:2]
    size, terms = g.shape[2:], channels * len(taps)
    pieces = _pieces(len(x))
    parts = np.zeros((len(pieces), filters, terms), dtype)

    def work(p):
        g_, x_ = g[pieces[p]].astype(dtype, copy=False).swapaxes(0, 1), x[pieces[p]]
        for block in _blocks(len(x_), terms * size[0] * size[1] * dtype.itemsize):
            patches = _patches(x_[block], size, stride, padding, dilation, taps, dtype, True)
            patches = patches.reshape(terms, patches.shape[2] * size[0] * size[1])
            parts[p] += g_[:, block].reshape(filters, patches.shape[1]) @ patches.T

    compiled.parallel(work, range(len(pieces)))
    return parts.sum(axis=0).reshape(filters, channels, len(taps))


# ----------------------------------------------------------------------------- compiled kernels


KERNEL_ARRAY = ["C", "A", "W"]  # anything else, a read-only array too, would be compiled for anew


def _direct_pays(lanes, run, dtype, shape):
    """Whether the compiled kernel is there, and the faster of the two, as measured.

    It computes `lanes` outputs side by side, in whole registers, and its inner loop has length
    `run`; a short one is spent on entering and leaving it.
    """
    if dtype not in (np.float32, np.float64) or 0 in shape:
        return False
    return lanes >= MIN_LANES and run >= MIN_RUN and compiled.load("conv_numba") is not None


def _direct(x, weights, offsets, step, stride, out_shape):
    """Return y with, for the phase p that a pixel is in and i, j counting its pixels from 0,

    y[n, f, i0 + i stride, j0 + j stride] = sum over c and the t with offsets[t][0] = p of
    weights[f, t, c] x[n, c, i step + row, j step + column], (row, column) = offsets[t][1],

    where x is 0 outside. Pixels in the same place modulo `stride` are a phase, (i0, j0) its first.
    """
    fast = compiled.load("conv_numba")
    dtype = np.result_type(x, weights)
    batch, channels, *image = x.shape
    tile, corner, phases, starts, runs = _plan(
        channels, tuple(image), offsets, step, stride, tuple(out_shape[2:]), fast.ROWS
    )
    x = np.require(x, dtype, KERNEL_ARRAY)
    b = _panels(weights.reshape(len(weights), len(offsets) * channels), dtype, fast.LANES)
    y = np.empty(out_shape, dtype)
    rows = min(max(fast.BLOCK, out_shape[3]), starts.shape[1])

    def make_space():
        space = np.empty((fast.ROWS, fast.LANES), dtype)
        return np.zeros(tile, dtype), space, np.zeros((len(b), rows + fast.ROWS, fast.LANES), dtype)

    def work(piece, zeros, space, out):
        fast.correlate(x[piece], zeros, corner, phases, starts, runs, b, space, out, y[piece])

    compiled.parallel(work, _pieces(batch), make_space)
    return y


@functools.lru_cache(256)
def _plan(channels, image, offsets, step, stride, out_image, multiple):
    """Return shape and corner of the tile of `correlate`, and its `phases`, `starts`, `runs`."""
    phases = [
        (i0, stride[0], len(range(i0, out_image[0], stride[0])))
        + (j0, stride[1], len(range(j0, out_image[1], stride[1])))
        for i0, j0 in np.ndindex(stride)
    ]
    pixels = np.reshape([offset for _, offset in offsets], (len(offsets), 2))
    corner = np.maximum(0, -pixels.min(axis=0, initial=0))
    reach = (np.array(phases[0])[[2, 5]] - 1) * step + pixels.max(axis=0, initial=0) + 1
    rows, columns = (corner + np.maximum(image, reach)).tolist()
    pixels = (pixels + corner) @ (columns, 1)
    starts = np.zeros((len(phases), phases[0][2] * phases[0][5] + multiple), np.uint64)
    runs = np.zeros((len(phases), max(1, len(offsets)), 3), np.uint64)
    for p, (_, _, high, _, _, wide) in enumerate(phases):
        first = np.arange(high)[:, None] * step[0] * columns + np.arange(wide) * step[1]
        starts[p, : first.size] = first.ravel() * channels
        found = []
        for t in (t for t, (phase, _) in enumerate(offsets) if phase == p):
            if found and pixels[t] == pixels[t - 1] + 1:  # next to the channels of the last tap
                found[-1][2] += channels
            else:
                found.append([pixels[t] * channels, t * channels, channels])
        runs[p, : len(found)] = np.reshape(found, (len(found), 3))
    longest = max(1, max(np.count_nonzero(runs[..., 2], axis=1)))
    tile, corner = (rows, columns, channels), tuple(corner.tolist())
    return tile, corner, np.array(phases), starts, runs[:, :longest].copy()


def _direct_dw(g, x, w_shape, stride, padding, dilation, taps, dtype):
    """Return dw at the taps, (F, C, T)."""
    fast = compiled.load("conv_numba")
    (filters, channels), (rows, columns) = w_shape[:2], g.shape[2:]
    g, x = np.require(g, dtype, KERNEL_ARRAY), np.require(x, dtype, KERNEL_ARRAY)
    blocks, panels = -(-channels // CHANNELS), -(-filters // fast.LANES)
    depth = -(-(x.shape[2] + 2 * padding[0]) // stride[0])
    shifts, column = np.unique(taps[:, 1] * dilation[1], return_inverse=True)
    row = taps[:, 0] * dilation[0]
    lines = (np.arange(CHANNELS)[:, None] * len(shifts) + column) * stride[0] + row % stride[0]
    starts = ((lines * depth + row // stride[0]) * columns).ravel().astype(np.uint64)
    runs = np.array([[0, 0, rows * columns]], np.uint64)

    pieces = _pieces(len(x))
    parts = np.zeros((len(pieces), blocks, panels, len(starts), fast.LANES), dtype)

    def make_space():
        tile = np.zeros((CHANNELS, len(shifts), stride[0], depth, columns), dtype)
        b = np.zeros((panels, rows * columns, fast.LANES), dtype)
        return tile, b, np.empty((fast.ROWS, fast.LANES), dtype)

    def work(p, tile, b, space):
        images = x[pieces[p]], g[pieces[p]]
        layout = padding, stride, shifts, starts, runs
        fast.correlate_weights(*images, tile, *layout, b, space, parts[p])

    compiled.parallel(work, range(len(pieces)), make_space)
    total = parts.sum(axis=0)[:, :, : CHANNELS * len(taps)].transpose(1, 3, 0, 2)
    shape = panels * fast.LANES, blocks * CHANNELS, len(taps)
    return total.reshape(shape)[:filters, :channels]


CHANNELS = 6  # of x at a time: so many times the number of taps is whole rows of the kernel


def _panels(matrix, dtype, lanes):
    """Return (F, T) as (Q, T, lanes), rows of zeros at the end."""
    filters, terms = matrix.shape
    panels = -(-filters // lanes)
    whole = np.zeros((panels * lanes, terms), dtype)
    whole[:filters] = matrix
    return np.ascontiguousarray(whole.reshape(panels, lanes, terms).swapaxes(1, 2))


# ------------------------------------------------------------------------------------- geometry


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
    stride = pair(name, "stride", stride, 1)
    padding = pair(name, "padding", padding, 0)
    dilation = pair(name, "dilation", dilation, 1)
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


def pair(name, setting, value, least):
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


def _live(name, taps, w_shape):
    """Return the (row, column) of each tap that counts, in reading order: (T, 2)."""
    if taps is None:
        taps = np.ones(w_shape[2:], bool)
    taps = np.asarray(taps)
    if taps.shape != tuple(w_shape[2:]) or taps.dtype != bool:
        raise ValueError(
            f"{name}: taps must be booleans of the shape {tuple(w_shape[2:])} of the kernel, not "
            f"{taps.dtype} of shape {taps.shape}"
        )
    return np.argwhere(taps)


def _run(taps, adjacent):
    """Return how many taps are read in one go, on average: those next to each other in a row."""
    return len(taps) / max(1, len(np.unique(taps[:, 0])) if adjacent else len(taps))


def _pieces(batch):
    """Slices of a batch, PIECES or one more."""
    step = max(1, -(-batch // PIECES))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _blocks(batch, bytes_per_image):
    """Slices of a batch whose patches take about BLOCK_BYTES, and at least PIECES of them."""
    step = max(1, min(BLOCK_BYTES // max(1, bytes_per_image), -(-batch // PIECES)))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _patches(x, size, stride, padding, dilation, taps, dtype, batch_last=False):
    """Copy the pixels of the zero-padded x that each tap meets: (N, C, T, *size).

    With `batch_last` it is (C, T, N, *size).
    """
    batch, channels, height, width = x.shape
    if any(padding):
        top, left = padding
        padded = np.zeros((batch, channels, height + 2 * top, width + 2 * left), x.dtype)
        padded[:, :, top : top + height, left : left + width] = x
        x = padded
    first = (channels, len(taps), batch) if batch_last else (batch, channels, len(taps))
    patches = np.empty((*first, *size), dtype)
    by_image = patches.transpose(2, 0, 1, 3, 4) if batch_last else patches
    for t, tap in enumerate(taps.tolist()):
        by_image[:, :, t] = _tap(x, tap, stride, dilation, size)
    return patches


def _tap(x, tap, stride, dilation, size):
    """View of the pixels of the padded x that one tap of the kernel meets, (N, C, H', W')."""
    (row, column), (down, right), (s, t), (height, width) = tap, dilation, stride, size
    top, left = row * down, column * right
    return x[:, :, top : top + s * height : s, left : left + t * width : t]
