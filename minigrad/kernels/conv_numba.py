"""The loops of `conv.py`: direct convolution, blocked for registers. No checks, no choices here.

All of convolution is one product of matrices,

    out[m, f] = sum over t of a[starts[m] + offset(t)] b[t, f],

where the left one is never formed: its rows are overlapping pieces of one image. A row m is an
output pixel and t a tap and an input channel, or, for the gradient of the weights, m is a tap and
an input channel and t an output pixel. `multiply` is that product; the other kernels lay out
an image so that t runs over contiguous memory, call it, and put the result in place.

It holds 3 rows by 32 columns of `out` in 12 of the 16 vector registers of AVX2 and makes 12 fused
multiply-adds for 7 loads. The compiler does that for rows written out, which are arguments known
not to overlap; it does not for a loop over the rows, nor for arrays made in the kernel.
Integers that index are unsigned: negative ones would count from the end, at the cost of a test.
"""

import numpy as np

from minigrad.kernels.compiled import njit

ROWS = 3
LANES = 32
BLOCK = 256  # output pixels that are computed, then put in place


@njit(noalias=True)
def multiply(a, starts, runs, b, s0, s1, s2, out):
    """out[q, m, v] += sum of a[starts[m] + o + t] b[q, r + t, v] over runs (o, r, n) and t < n.

    a (A,), starts (M,) with M a multiple of ROWS, runs (R, 3), b (Q, T, LANES),
    out (Q, at least M, LANES); s0, s1, s2 (LANES,) are space.
    """
    for q in range(b.shape[0]):
        for m in range(0, len(starts), ROWS):
            for v in range(LANES):
                s0[v] = out[q, m, v]
                s1[v] = out[q, m + 1, v]
                s2[v] = out[q, m + 2, v]
            for run in range(len(runs)):
                row = runs[run, 1]
                i0 = starts[m] + runs[run, 0]
                i1 = starts[m + 1] + runs[run, 0]
                i2 = starts[m + 2] + runs[run, 0]
                for t in range(runs[run, 2]):
                    x0, x1, x2 = a[i0 + t], a[i1 + t], a[i2 + t]
                    for v in range(LANES):
                        s0[v] += x0 * b[q, row + t, v]
                        s1[v] += x1 * b[q, row + t, v]
                        s2[v] += x2 * b[q, row + t, v]
            for v in range(LANES):
                out[q, m, v] = s0[v]
                out[q, m + 1, v] = s1[v]
                out[q, m + 2, v] = s2[v]


@njit
def correlate(x, tile, corner, phases, starts, runs, b, space, work, y):
    """Correlate the images of x (N, C, H, W), writing y (N, F, H', W') one phase after the other.

    `tile` (rows, columns, C) is a copy of one image, channels last, from `corner` on within zeros.
    A phase p is the pixels y[n, f, i0 + i di, j0 + j dj] that meet the same taps:
    phases[p] = (i0, di, rows, j0, dj, columns), starts[p] (M,), runs[p] (R, 3) of `multiply`.
    b (Q, T, LANES) with f = q LANES + v; space (ROWS, LANES); work (Q, M, LANES), zero before and
    after, holds the product for some rows.
    """
    images, channels, height, width = x.shape
    flat = tile.reshape(tile.size)
    inside = tile[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    for n in range(images):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    inside[i, j, c] = x[n, c, i, j]
        for p in range(len(phases)):
            i0, di, rows, j0, dj, columns = phases[p]
            targets = y[n, :, i0::di, j0::dj]
            step = max(1, BLOCK // max(1, columns))
            for above in range(0, rows, step):
                count = min(step, rows - above)
                size = (count * columns + ROWS - 1) // ROWS * ROWS
                some = starts[p, above * columns : above * columns + size]
                multiply(flat, some, runs[p], b, space[0], space[1], space[2], work)
                for q in range(len(work)):
                    for i in range(count):
                        for j in range(columns):
                            for v in range(min(LANES, len(targets) - q * LANES)):
                                targets[q * LANES + v, above + i, j] = work[q, i * columns + j, v]
                    for m in range(size):
                        for v in range(LANES):
                            work[q, m, v] = 0


@njit
def correlate_weights(x, g, tile, corner, stride, shifts, starts, runs, b, space, out):
    """out[k, q, m, v] += the product of pixels of x and of g, summed over the images.

    x (N, C, H, W), g (N, F, H', W'). b (Q, H' W', LANES) is a copy of one image of g with its
    channels last, f = q LANES + v. `tile` (B, L, S, R, W') is one of B channels of x, for each
    horizontal shift (L,) of the kernel the columns that it meets; row i within zeros lies at
    [i % S, i // S], S the vertical stride. So each row m, a channel of the block k and a tap, is
    H' W' contiguous numbers. out (K, Q, M, LANES), space (ROWS, LANES).
    """
    images, channels, height, width = x.shape
    filters, rows, columns = g.shape[1:]
    down, right = stride
    flat = tile.reshape(tile.size)
    block = len(tile)
    taps = len(starts) // block
    for n in range(images):
        for q in range(len(b)):
            for i in range(rows):
                for j in range(columns):
                    for v in range(min(LANES, filters - q * LANES)):
                        b[q, i * columns + j, v] = g[n, q * LANES + v, i, j]
        for k in range(len(out)):
            used = min(block, channels - k * block)
            for l in range(len(shifts)):
                first = shifts[l] - corner[1]  # the column of x that the tile begins with
                begin = max(0, (right - 1 - first) // right)
                end = max(0, min(columns, (width - 1 - first) // right + 1))
                for c in range(used):
                    source = x[n, k * block + c, :, first + begin * right :]
                    target = tile[c, l, :, :, begin:end]
                    for part in range(target.shape[0]):
                        for row in range(target.shape[1]):
                            i = row * down + part - corner[0]
                            if i < 0 or i >= height:
                                continue
                            if right == 1:  # the same loop, but the compiler sees its unit stride
                                for j in range(target.shape[2]):
                                    target[part, row, j] = source[i, j]
                            else:
                                for j in range(target.shape[2]):
                                    target[part, row, j] = source[i, j * right]
            some = starts[: (used * taps + ROWS - 1) // ROWS * ROWS]
            multiply(flat, some, runs, b, space[0], space[1], space[2], out[k])


@njit
def sample_pixels(filters, relu, residual, runs, b, bias, thresholds, tiles, space, work):
    """Draw the pixels of binary images in reading order, each layer at the newest pixel only.

    tiles (L, N, rows, columns, C) are the inputs of the L layers within zeros, channels last;
    tiles[0] becomes the images. Layer l has filters[l] outputs, runs[l] (R, 3) and b[l]
    (Q, T, LANES) of `multiply`, and bias[l] (F,). thresholds (N, F, H, W): a pixel is 1 where its
    logit is larger; the logit is left in its place. work (Q, M, LANES) is zero, M >= N.
    """
    images, _, height, width = thresholds.shape
    layers = len(filters)
    rows, columns, depth = tiles.shape[2:]
    top, left = rows - height, (columns - width) // 2
    flat = tiles.reshape(tiles.size)
    starts = np.zeros(work.shape[1], np.uint64)
    zero = bias.dtype.type(0)
    for i in range(height):
        for j in range(width):
            for l in range(layers):
                for n in range(images):
                    line = (l * images + n) * rows + i
                    starts[n] = (line * columns + j) * depth
                multiply(flat, starts, runs[l], b[l], space[0], space[1], space[2], work)
                for n in range(images):
                    for f in range(filters[l]):
                        q, v = f // LANES, f % LANES
                        value = work[q, n, v] + bias[l, f]
                        if relu[l] and value < 0:
                            value = zero
                        if residual[l]:
                            value += tiles[l, n, top + i, left + j, f]
                        if l + 1 < layers:
                            tiles[l + 1, n, top + i, left + j, f] = value
                        else:
                            tiles[0, n, top + i, left + j, f] = value > thresholds[n, f, i, j]
                            thresholds[n, f, i, j] = value
                for q in range(len(work)):
                    for n in range(images):
                        for v in range(LANES):
                            work[q, n, v] = 0
