r"""Draws from discrete distributions and their relaxations, on plain arrays.

Random bits are drawn by NumPy's generator, all in one call and in one thread; what follows is a
function of each element's own bits. So the draws of a seed are the same with any number of threads,
and no two share a bit. Kernels and twins use the same bits in the same way.

Few bits decide nearly every draw, and more are drawn where they do not: a Bernoulli draw takes 16
and, where its uniform is still on both sides of p (once in 65,536), 53 more; a Gumbel-max takes 32
for each Gumbel and, where that leaves one of them with less than 16 significant bits, 53 more.
"""

import math

import numpy as np
from scipy.special import expit as _expit64

from minigrad.kernels import compiled
from minigrad.kernels.transcendental import SMALL, expit, loops, softplus, spread

# Elements that one call of a loop treats, on a thread of its own where there are many.
BLOCK = 1 << 16


def bernoulli(rng, logits=None, shape=None, *, probs=None):
    r"""Return draws of 0 and 1 of `shape`, to which `logits` or `probs` are broadcast.

    Their dtype is that of the parameter. $P(1) = p$ within $2^{-69}$ and the rounding of the
    float64 sigmoid; a parameter that is NaN gives 0.
    """
    given = np.asarray(probs if logits is None else logits)
    shape = given.shape if shape is None else shape
    size = math.prod(shape)
    bits = _words(rng, -(-size // 4)).view(np.uint16)[:size]
    fast = compiled.load("transcendental_numba") if size >= SMALL else None
    if fast is None:
        p = given.astype(np.float64) if logits is None else _expit64(given.astype(np.float64))
        excess = np.broadcast_to(p, shape).reshape(-1) * 65536 - bits
        out = (excess >= 1).astype(given.dtype)
        (open_,) = np.nonzero((excess > 0) & (excess < 1))
        excess = excess[open_]
    else:
        flat = given.astype(np.float32, copy=False)
        if given.shape != shape:
            flat = np.broadcast_to(flat, shape)
        flat = np.ascontiguousarray(flat).reshape(-1)
        if logits is None:  # too little work for threads
            out, found = np.empty(size, np.float32), np.empty(size, np.int64)
            open_ = found[: fast.bernoulli_probs(flat, bits, out, found)]
        else:
            out, open_ = _bernoulli_loop(fast.bernoulli_logits, flat, bits)
        if open_.size:
            p = np.broadcast_to(given, shape)[np.unravel_index(open_, shape)].astype(np.float64)
            excess = (p if logits is None else _expit64(p)) * 65536 - bits[open_]
            out[open_] = excess >= 1
            undecided = (excess > 0) & (excess < 1)
            open_, excess = open_[undecided], excess[undecided]
        out = out.astype(given.dtype, copy=False)
    if open_.size:
        out[open_] = _fraction(rng, open_.size) < excess
    return out.reshape(shape)


def categorical(rng, logits, shape=None):
    r"""Return argmax over k of $a_k + G_k$, $G_k$ standard Gumbel, for logits $a$ (..., K).

    An int64 array of `shape`, to which the logits' leading axes are broadcast. Its law is
    $P(k) \propto e^{a_k}$ (Gumbel, 1954), the Gumbels being right to 16 bits at least; a NaN counts
    as the largest, as in NumPy.
    """
    logits = np.asarray(logits)
    k = logits.shape[-1]
    shape = logits.shape[:-1] if shape is None else shape
    n = math.prod(shape)
    bits = _words(rng, -(-n * k // 2)).view(np.int32)[: n * k].reshape(n, k)
    rows = np.ascontiguousarray(np.broadcast_to(logits, (*shape, k)).reshape(n, k))
    fast = loops(rows)
    if fast is None:
        out = np.argmax(rows + _gumbel(bits, 0.5), axis=1) if n else np.empty(0, np.int64)
        (open_,) = np.nonzero(_few(bits).any(axis=1))
    else:
        out = _argmax_loop(fast.categorical, rows, bits)
        (open_,) = np.nonzero(out < 0)
    if open_.size:
        bits, rows = bits[open_], rows[open_]
        more = np.full(bits.shape, 0.5)
        few = _few(bits).any(axis=1)  # not where a NaN is all that was wrong
        more[few] = _fraction(rng, int(few.sum()) * k).reshape(-1, k)
        out[open_] = np.argmax(rows + _gumbel(bits, more), axis=1)
    return out.reshape(shape)[()]


def gumbel_max(logits, noise):
    """Return argmax over the last axis of logits + noise, two arrays of one shape: int64."""
    fast = loops(logits, noise)
    if fast is None or not logits.shape[-1]:
        return np.argmax(logits + noise, axis=-1)
    k = logits.shape[-1]
    rows, noise_rows = (np.ascontiguousarray(a).reshape(-1, k) for a in (logits, noise))
    out = _argmax_loop(fast.gumbel_max, rows, noise_rows)
    (nan,) = np.nonzero(out < 0)
    if nan.size:
        out[nan] = np.argmax(rows[nan] + noise_rows[nan], axis=1)
    return out.reshape(logits.shape[:-1])


def logistic(rng, shape, dtype=np.float64):
    r"""Return standard logistic draws $\log \frac{u}{1 - u}$, from 64 bits each.

    Both tails have the full relative precision of the dtype in $u$ and $1 - u$, down to $2^{-65}$:
    the draws reach to $\pm 45$. Float32 draws come from the same bits and are those of float64 to
    within 1e-6, relative or absolute.
    """
    size = math.prod(shape)
    high, low = _words(rng, size).view(np.int32).reshape(2, size)
    out = np.empty(shape, dtype)
    fast = loops(out)
    if fast is not None:
        return spread(fast.logistic, out, high.reshape(shape), low.reshape(shape))
    sign = high >> 31
    h = ((high ^ sign) + ((low ^ sign).view(np.uint32) + 0.5) * 2.0**-32) * 2.0**-32
    y = np.log(h) - np.log1p(-h)
    out[...] = np.where(sign, -y, y).reshape(shape)
    return out[()]


def binary_concrete(logits, noise, temperature):
    r"""Return $\sigma((a + L) / \lambda)$ for logits $a$ and logistic noise $L$ of one shape.

    The binary Concrete distribution (Maddison et al., 2017) of temperature $\lambda$, a float.
    """
    fast = loops(logits, noise)
    if fast is None:
        return expit((logits + noise) / temperature)
    rate = np.float32(1 / temperature)

    def kernel(a, b, out):
        fast.binary_concrete(a, b, rate, out)

    return spread(kernel, np.empty(logits.shape, np.float32), logits, noise)


def concrete(logits, noise, temperature):
    r"""Return the softmax of $(a + G) / \lambda$ over the last axis, for Gumbel noise $G$.

    The Concrete distribution (Maddison et al., 2017) of temperature $\lambda$, a float; `logits`
    and `noise` have one shape.
    """
    fast = loops(logits, noise)
    if fast is None or not logits.shape[-1]:
        y = (logits + noise) / temperature
        y = np.exp(y - np.max(y, axis=-1, keepdims=True))
        return y / np.sum(y, axis=-1, keepdims=True)
    k = logits.shape[-1]
    a, b = (np.ascontiguousarray(v).reshape(-1, k) for v in (logits, noise))
    out, work, rate = np.empty_like(a), np.empty_like(a), np.float32(1 / temperature)

    def rows(part):
        fast.concrete(a[part], b[part], rate, out[part], work[part])

    _in_blocks(rows, a)
    return out.reshape(logits.shape)


def conditional_logistic(logits, b, noise):
    r"""Return a draw of $z = a + L$ given $b = 1[z > 0]$, for logits $a$ and logistic noise.

    With $v = \sigma$(noise), REBAR (Tucker et al., 2017) draws it as $a + \log(v' / (1 - v'))$ with
    $v' = v (1 - \sigma(a))$ if b = 0 and $v \sigma(a) + 1 - \sigma(a)$ if b = 1. That is
    $s\,\mathrm{softplus}(s\,\mathrm{noise} + \mathrm{softplus}(s a))$ with $s = 2 b - 1$, which
    neither overflows nor cancels. All three of one shape; b holds 0 and 1.
    """
    b = np.asarray(b, logits.dtype)
    fast = loops(logits, b, noise)
    if fast is None:
        s = 2 * b - 1
        return s * softplus(s * noise + softplus(s * logits))
    out = np.empty(logits.shape, np.float32)
    return spread(fast.conditional_logistic, out, logits, b, noise)


def conditional_gumbel(logits, index, noise):
    r"""Return a draw of $z_k = a_k + G_k$ given that `index` (...) is its argmax; Gumbel `noise`.

    The largest is $\log \sum_k e^{a_k}$ + noise, whichever it is; each other one is a Gumbel cut
    off above it, $-\log(e^{-z_{max}} + e^{-a_k - g_k})$ (Maddison et al., 2014). `logits` and
    `noise` (..., K).
    """
    top = np.max(logits, axis=-1, keepdims=True)
    total = top + np.log(np.sum(np.exp(logits - top), axis=-1, keepdims=True))
    index = np.expand_dims(index, -1)
    largest = total + np.take_along_axis(noise, index, -1)
    z = -np.logaddexp(-largest, -(logits + noise))
    np.put_along_axis(z, index, largest, -1)
    return z


def _words(rng, n):
    """Draw n times 64 random bits, from whatever bit generator it is."""
    if type(rng) is np.random.Generator and type(rng.bit_generator) is np.random.PCG64:
        return rng.bit_generator.random_raw(n)  # the same without the checks, which cost 20 us
    return rng.integers(0, 2**64, n, dtype=np.uint64)


def _fraction(rng, n):
    """Draw n numbers from [0, 1), multiples of 2^-53."""
    return (_words(rng, n) >> np.uint64(11)) * 2.0**-53


def _few(bits):
    return (bits ^ (bits >> 31)) < 65536


def _gumbel(bits, more):
    """Return the Gumbels of 32 bits and of the fractions `more` of the last of them.

    h is uniform on (0, 1/2), and the first bit says whether the uniform is h or 1 - h.
    """
    h = ((bits ^ (bits >> 31)) + more) * 2.0**-32
    h = np.maximum(h, 2.0**-86)  # an exact 0 would be an infinite Gumbel
    return -np.log(np.where(bits < 0, -np.log(h), -np.log1p(-h)))


def _bernoulli_loop(kernel, parameter, bits):
    """Return the draws, and the places of those that the bits leave open."""
    out, found = np.empty(bits.size, np.float32), np.empty(bits.size, np.int64)
    if bits.size <= BLOCK:
        return out, found[: kernel(parameter, bits, out, found)]
    starts = range(0, bits.size, BLOCK)
    counts = [0] * len(starts)

    def work(i):
        part = slice(starts[i], starts[i] + BLOCK)
        counts[i] = kernel(parameter[part], bits[part], out[part], found[part])

    _run(work, range(len(starts)))
    places = [start + found[start : start + n] for start, n in zip(starts, counts)]
    return out, np.concatenate(places)


def _argmax_loop(kernel, rows, others):
    n, k = rows.shape
    out = np.empty(n, np.int64)

    def work(part):
        kernel(rows[part], others[part], out[part], np.empty((max(1, 4096 // k), k), np.float32))

    _in_blocks(work, rows)
    return out


def _in_blocks(work, rows):
    size = max(1, BLOCK // rows.shape[1])
    _run(work, [slice(start, start + size) for start in range(0, len(rows), size)])


def _run(work, pieces):
    if len(pieces) < 4:
        for piece in pieces:
            work(piece)
    else:
        compiled.parallel(work, pieces)
