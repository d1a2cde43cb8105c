r"""Ancestral sampling of binary images from a stack of masked convolutions (a PixelCNN).

A causal model computes the logit of a pixel from the pixels before it in reading order. To draw an
image takes one pass for each pixel, and a whole pass computes every layer at every pixel although
only the newest pixel has changed what may still be used: everything before it was computed
already, everything after it will be when its turn comes. So here each layer is evaluated at one
pixel at a time, for all images together, and its result kept.

The draws are the same as those of the whole passes (`logits`) for the same uniforms; the logits
differ by rounding alone.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import logit

from minigrad.kernels import compiled
from minigrad.kernels.conv import _panels, conv2d

__all__ = ["Layer", "logits", "sample"]

IMAGES = 9  # that are drawn together: three times the rows of the kernel


class Layer(NamedTuple):
    """h -> conv2d(h, w, taps) + b, then max(0, .) if `relu`, then + h if `residual`.

    w (F, C, K, L) with K and L odd, b (F,), taps (K, L): True for the taps that are used.
    """

    w: np.ndarray
    b: np.ndarray
    taps: np.ndarray
    relu: bool = True
    residual: bool = False


def logits(layers, images):
    """Return the logits (N, C, H, W) of all pixels of `images`, by whole convolutions."""
    h = images
    for layer in layers:
        padding = (layer.w.shape[2] // 2, layer.w.shape[3] // 2)
        y = conv2d(h, layer.w, padding=padding, taps=layer.taps) + layer.b[:, None, None]
        y = np.maximum(y, 0) if layer.relu else y
        h = y + h if layer.residual else y
    return h


def sample(layers, uniforms):
    r"""Draw images from the model `layers`; return (images, logits), both (N, C, H, W).

    A pixel is 1 where $u < \sigma(\text{logit})$ for its number u of `uniforms` (N, C, H, W). The
    last layer must have as many outputs as the first has inputs. Raises ValueError if the shapes do
    not fit together or a pixel would depend on itself or on a later one.
    """
    uniforms = np.asarray(uniforms)
    _check(layers, uniforms.shape)
    dtype = np.result_type(*(array for layer in layers for array in (layer.w, layer.b)))
    with np.errstate(divide="ignore"):
        results = logit(uniforms.astype(np.float64))  # u < sigma(z) where logit u < z
    top, left = (max(layer.w.shape[axis] // 2 for layer in layers) for axis in (2, 3))
    depth = max(layer.w.shape[1] for layer in layers)
    batch, channels, height, width = uniforms.shape
    rows, columns = height + top, width + 2 * left  # no tap below the newest pixel is used
    images = np.empty(uniforms.shape, dtype)
    fast = compiled.load("conv_numba")
    prepare = _numpy if fast is None else _compiled
    draw = prepare(layers, dtype, top, left, columns, depth)

    def work(piece):
        tiles = np.zeros((len(layers), len(results[piece]), rows, columns, depth), dtype)
        draw(results[piece], tiles)
        images[piece] = tiles[0, :, top:, left : left + width, :channels].transpose(0, 3, 1, 2)

    compiled.parallel(work, [slice(n, n + IMAGES) for n in range(0, batch, IMAGES)])
    return images, results.astype(dtype)


def _numpy(layers, dtype, top, left, _columns, _depth):
    """Return draw(thresholds, tiles): the twin of `sample_pixels`."""
    matrices = []
    for layer in layers:
        matrix = layer.w[:, :, layer.taps].transpose(2, 1, 0)  # (T, C, F)
        matrices.append(matrix.reshape(-1, len(layer.w)).astype(dtype))

    def draw(thresholds, tiles):
        batch, channels, height, width = thresholds.shape
        for i, j in np.ndindex(height, width):
            for l, (layer, matrix) in enumerate(zip(layers, matrices)):
                filters, inputs, high, wide = layer.w.shape
                above, before = top + i - high // 2, left + j - wide // 2
                window = tiles[l, :, above : above + high // 2 + 1, before : before + wide, :inputs]
                seen = window[:, layer.taps[: high // 2 + 1]].reshape(batch, len(matrix))
                value = seen @ matrix + layer.b
                if layer.relu:
                    value = np.maximum(value, 0)
                if layer.residual:
                    value = value + tiles[l, :, top + i, left + j, :filters]
                if l + 1 < len(layers):
                    tiles[l + 1, :, top + i, left + j, :filters] = value
            tiles[0, :, top + i, left + j, :channels] = value > thresholds[:, :, i, j]
            thresholds[:, :, i, j] = value

    return draw


def _compiled(layers, dtype, top, left, columns, depth):
    """Return draw(thresholds, tiles), which calls `sample_pixels`."""
    fast = compiled.load("conv_numba")
    filters = np.array([len(layer.w) for layer in layers])
    runs, panels = [], []
    for layer in layers:
        _, channels, high, wide = layer.w.shape
        found = []
        for t, (k, l) in enumerate(np.argwhere(layer.taps).tolist()):
            start = ((top - high // 2 + k) * columns + left - wide // 2 + l) * depth
            if found and found[-1][0] + found[-1][2] == start:
                found[-1][2] += channels
            else:
                found.append([start, t * channels, channels])
        matrix = layer.w[:, :, layer.taps].swapaxes(1, 2)  # (F, T, C)
        runs.append(found)
        panels.append(_panels(matrix.reshape(len(layer.w), -1), dtype, fast.LANES))
    lengths = [[len(found) for found in runs], *zip(*(panel.shape for panel in panels))]
    most, q, terms, _ = map(max, lengths)
    padded_runs = np.zeros((len(layers), most, 3), np.uint64)
    b = np.zeros((len(layers), q, terms, fast.LANES), dtype)
    bias = np.zeros((len(layers), filters.max()), dtype)
    for l, (layer, found, panel) in enumerate(zip(layers, runs, panels)):
        padded_runs[l, : len(found)] = np.reshape(found, (len(found), 3))
        b[l, : panel.shape[0], : panel.shape[1]] = panel
        bias[l, : len(layer.b)] = layer.b
    relu, residual = (np.array([layer[i] for layer in layers], bool) for i in (3, 4))

    def draw(thresholds, tiles):
        space = np.empty((fast.ROWS, fast.LANES), dtype)
        rows = -(-len(thresholds) // fast.ROWS) * fast.ROWS
        work = np.zeros((q, rows, fast.LANES), dtype)
        fast.sample_pixels(
            filters, relu, residual, padded_runs, b, bias, thresholds, tiles, space, work
        )

    return draw


def _check(layers, shape):
    if len(shape) != 4 or not layers:
        raise ValueError(f"sample: uniforms must be (N, C, H, W), not {shape}, and layers not none")
    channels = shape[1]
    for number, (w, b, taps, _, residual) in enumerate(layers):
        name = f"sample: layer {number} with w {w.shape}, b {b.shape} and taps {taps.shape}"
        if w.ndim != 4 or w.shape[1] != channels or b.shape != w.shape[:1]:
            raise ValueError(f"{name} must be (F, {channels}, K, L), (F,) and (K, L)")
        if taps.shape != w.shape[2:] or taps.dtype != bool or 0 in np.mod(taps.shape, 2):
            raise ValueError(f"{name}: K and L must be odd, and taps booleans of that shape")
        if residual and len(w) != channels:
            raise ValueError(f"{name}: a residual layer has as many outputs as inputs")
        centre = taps.size // 2
        if np.any(taps.ravel()[centre + (number > 0) :]):
            used = "after its own" if number else "its own or later"
            raise ValueError(f"{name} uses pixels {used}, which are not drawn yet")
        channels = len(w)
    if channels != shape[1]:
        raise ValueError(
            f"sample: the last layer has {channels} outputs, but the images {shape[1]} channels"
        )
