"""All compiled loops that need an exponential or a logarithm: the polynomials, then the loops.

They stand in one file because a compiled function may call those of its own file only. Numba
calls the C library's `exp` for each element; what stands here is only arithmetic, selections and
shifts of bits, of which the compiler makes vector instructions. So no branch may appear in it:
`y if c else z` with both sides plain values becomes a selection.

An operation on int32 gives int64 in Numba, hence the many casts. Polynomials: least largest
relative error on their interval, found by iteratively reweighted least squares; the largest error
is given in units of 2^-24.
"""

import numpy as np

from minigrad.kernels.compiled import njit

f4, f8, i4 = np.float32, np.float64, np.int32
ZERO, HALF, ONE, TWO = f4(0), f4(0.5), f4(1), f4(2)
NEG_INF, INF, NAN = f4(-np.inf), f4(np.inf), f4(np.nan)

# ln 2 in two parts: a product of the first with an exponent is exact.
LN2_HIGH, LN2_LOW, LOG2_E = f4(0.693359375), f4(-2.1219444e-4), f4(1.442695)
# Added and subtracted again, it rounds a float32 to an integer.
ROUND = f4(1.5 * 2**23)
# exp is 0 below the one and inf above the other.
EXP_MIN, EXP_MAX = f4(-104), f4(89)
SQRT_HALF_BITS, MANTISSA, SUBNORMAL = i4(0x3F3504F3), i4(0x7FFFFF), f4(2.0**-126)

# (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2 : 0.06
E0, E1, E2, E3, E4 = (
    f4(c) for c in (0.49999994, 0.16666515, 0.041668456, 0.008369419, 0.0013813143)
)
# (log(1 + f) - f + f^2 / 2) / f^3 for sqrt(1/2) <= 1 + f <= sqrt(2) : 0.02
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (
    f4(c)
    for c in (
        *(0.33333313, -0.25000009, 0.20002119, -0.16667996, 0.14219552),
        *(-0.12405589, 0.11888162, -0.11675652, 0.06746641),
    )
)
# (tanh(x) - x) / x^3 as a polynomial in x^2, for |x| <= 0.625 : 0.08
T0, T1, T2, T3, T4 = (
    f4(c) for c in (-0.3333328, 0.13331442, -0.053739715, 0.020639088, -0.0057049873)
)
TANH_SMALL = f4(0.625)
SQRT2_MINUS_1, TWO_23, TWENTY_THREE = f4(0.41421356), f4(2**23), f4(23)


@njit
def _exp_parts(c):
    """(p, q, a, b) with exp(c) = (p + q) a b: q is what the rounding of p lost, a b = 2^n."""
    n = (c * LOG2_E + ROUND) - ROUND
    high = c - n * LN2_HIGH
    low = n * LN2_LOW
    r = high - low  # |r| <= ln(2) / 2
    low = (high - r) - low
    s = (((E4 * r + E3) * r + E2) * r + E1) * r + E0
    s = r + (s * (r * r) + low)
    p = ONE + s
    k = i4(n)
    half = i4(k >> i4(1))  # two factors, since 2^n itself may be subnormal or infinite
    a = i4(i4(half + i4(127)) << i4(23)).view(f4)
    b = i4(i4(i4(k - half) + i4(127)) << i4(23)).view(f4)
    return p, s - (p - ONE), a, b


@njit
def _exp(c):
    """For EXP_MIN <= c <= EXP_MAX."""
    p, _, a, b = _exp_parts(c)
    return p * a * b


@njit
def _exp_neg_abs(x):
    """exp(-|x|); something finite for NaN, which the caller puts back."""
    c = -abs(x)
    return _exp(c if c > EXP_MIN else EXP_MIN)


@njit
def _log_1p(f, k):
    """k ln 2 + log(1 + f) for sqrt(1/2) <= 1 + f <= sqrt(2), k an integer as a float32."""
    p = (((L8 * f + L7) * f + L6) * f + L5) * f + L4
    p = (((p * f + L3) * f + L2) * f + L1) * f + L0
    return k * LN2_HIGH + (f + ((p * f - HALF) * (f * f) + k * LN2_LOW))


@njit
def _split(x):
    """(f, k) with x = 2^k (1 + f) and sqrt(1/2) <= 1 + f < sqrt(2), for normal x > 0."""
    bits = i4(f4(x).view(i4) - SQRT_HALF_BITS)
    mantissa = i4(i4(bits & MANTISSA) + SQRT_HALF_BITS).view(f4)
    return mantissa - ONE, f4(i4(bits >> i4(23)))


@njit
def _softplus(x, e):
    """log(1 + exp(x)) = max(x, 0) + log(1 + e), given e = exp(-|x|)."""
    large = e > SQRT2_MINUS_1
    # 1 + e = 2 (1 + f) with f = (e - 1) / 2: nothing is rounded away.
    f = (e - ONE) * HALF if large else e
    return (x if x > ZERO else ZERO) + _log_1p(f, ONE if large else ZERO)


@njit
def _expit(x):
    """1 / (1 + e) or e / (1 + e) with e = exp(-|x|); something finite for NaN."""
    c = -abs(x)
    p, q, a, b = _exp_parts(c if c > EXP_MIN else EXP_MIN)
    e, rest = p * a * b, q * a * b
    total = ONE + e
    y = (ONE if x >= ZERO else e) / total
    # To first order, what the rounding of e and of the sum lost.
    lost = rest + (e - (total - ONE))
    return y + ((ZERO if x >= ZERO else rest) - y * lost) * (y if x >= ZERO else ONE - y)


# --------------------------------------------------------------------- elementwise, arrays (N,)


@njit
def exp(x, out):
    for i in range(x.size):
        v = x[i]
        c = v if v > EXP_MIN else EXP_MIN
        y = _exp(c if c < EXP_MAX else EXP_MAX)
        out[i] = y if v == v else v


@njit
def log(x, out):
    for i in range(x.size):
        v = x[i]
        small = v < SUBNORMAL
        f, k = _split(v * (TWO_23 if small else ONE))
        y = _log_1p(f, k - (TWENTY_THREE if small else ZERO))
        y = y if v > ZERO else (NEG_INF if v == ZERO else NAN)
        out[i] = y if v < INF else v


@njit
def tanh(x, out):
    for i in range(x.size):
        v = x[i]
        s = v * v
        small = v + v * (s * ((((T4 * s + T3) * s + T2) * s + T1) * s + T0))
        e = _exp_neg_abs(TWO * v)
        large = (ONE - e) / (ONE + e)
        y = small if abs(v) < TANH_SMALL else (large if v > ZERO else -large)
        out[i] = y if abs(v) > ZERO else v  # -0 and NaN


@njit
def expit(x, out):
    for i in range(x.size):
        v = x[i]
        y = _expit(v)
        out[i] = y if v == v else v


@njit
def softplus(x, out):
    for i in range(x.size):
        v = x[i]
        y = _softplus(v, _exp_neg_abs(v))
        out[i] = y if v == v else v


@njit
def expit_dx(x, g, out):
    for i in range(x.size):
        v = x[i]
        e = _exp_neg_abs(v)
        y = g[i] * (e / ((ONE + e) * (ONE + e)))
        out[i] = y if v == v else v


@njit
def tanh_dx(y, g, out):
    for i in range(y.size):
        out[i] = g[i] * (ONE - y[i] * y[i])


@njit
def gate(x, g, limit, out):
    """g, half of it, or 0 times it, where x is above, at, or below the limit, a float32."""
    for i in range(x.size):
        v = x[i]
        above = ONE if v > limit else ZERO
        out[i] = g[i] * (HALF if v == limit else above)


@njit
def normal_kl(loc, scale, loc_p, scale_p, out):
    """loc, scale (N,) those of q; loc_p, scale_p float32: (r^2 - 1 + z^2) / 2 - log r."""
    for i in range(loc.size):
        z = (loc[i] - loc_p) / scale_p
        r = scale[i] / scale_p
        small = r < SUBNORMAL
        f, k = _split(r * (TWO_23 if small else ONE))
        log_r = _log_1p(f, k - (TWENTY_THREE if small else ZERO))
        log_r = log_r if r > ZERO else (NEG_INF if r == ZERO else NAN)
        log_r = log_r if r < INF else r
        out[i] = HALF * (z * z + (r - ONE) * (r + ONE)) - log_r


@njit
def bernoulli_log_prob(logits, x, out):
    """out (N,); logits and x (N,), or one of them a part of it that is to be repeated."""
    n = min(logits.size, x.size)
    for start in range(0, out.size, n):
        a = logits[start : start + n] if logits.size > n else logits
        b = x[start : start + n] if x.size > n else x
        y = out[start : start + n]
        for i in range(n):
            v = a[i]
            w = b[i] * v - _softplus(v, _exp_neg_abs(v))
            y[i] = w if v == v else v


@njit
def bernoulli_log_prob_dlogits(logits, x, g, out):
    """The same for g (x - expit(logits)); g (N,), or (1,) for one cotangent of all elements."""
    n = min(logits.size, x.size)
    for start in range(0, out.size, n):
        a = logits[start : start + n] if logits.size > n else logits
        b = x[start : start + n] if x.size > n else x
        c = g[start : start + n] if g.size > 1 else g
        y = out[start : start + n]
        scale = c[0]
        if g.size == 1:
            for i in range(n):
                v = a[i]
                w = scale * (b[i] - _expit(v))
                y[i] = w if v == v else v
        else:
            for i in range(n):
                v = a[i]
                w = c[i] * (b[i] - _expit(v))
                y[i] = w if v == v else v


# ------------------------------------------------------------------ along rows, arrays (N, K)


@njit
def _row_max(x, i):
    # Four chains at a time: one comparison need not wait for the one before.
    a = b = c = d = NEG_INF
    k = x.shape[1]
    whole = k // 4 * 4
    for j in range(0, whole, 4):
        a = x[i, j] if x[i, j] > a else a
        b = x[i, j + 1] if x[i, j + 1] > b else b
        c = x[i, j + 2] if x[i, j + 2] > c else c
        d = x[i, j + 3] if x[i, j + 3] > d else d
    for j in range(whole, k):
        a = x[i, j] if x[i, j] > a else a
    a = b if b > a else a
    c = d if d > c else c
    return c if c > a else a


@njit
def _row_sum(x, i):
    # Sums of at most 128 terms, then the sum of those: less is lost than in one long sum.
    total = ZERO
    for start in range(0, x.shape[1], 128):
        stop = min(start + 128, x.shape[1])
        a = b = c = d = ZERO
        whole = start + (stop - start) // 4 * 4
        for j in range(start, whole, 4):
            a += x[i, j]
            b += x[i, j + 1]
            c += x[i, j + 2]
            d += x[i, j + 3]
        for j in range(whole, stop):
            a += x[i, j]
        total += (a + b) + (c + d)
    return total


@njit
def log_softmax(x, out, work, totals):
    """x, out, work (N, K), totals (N,): one simple loop after another, all of them in cache."""
    n, k = x.shape
    for i in range(n):
        top = _row_max(x, i)
        top = top if abs(top) < INF else ZERO
        for j in range(k):
            out[i, j] = x[i, j] - top
    exp(out.reshape(n * k), work.reshape(n * k))
    for i in range(n):
        totals[i] = _row_sum(work, i)
    log(totals, totals)
    for i in range(n):
        for j in range(k):
            out[i, j] -= totals[i]


@njit
def log_softmax_dx(ans, g, out):
    """g - softmax * sum of g over the row, given the log-softmax; all (N, K)."""
    n, k = ans.shape
    exp(ans.reshape(n * k), out.reshape(n * k))
    for i in range(n):
        total = _row_sum(g, i)
        for j in range(k):
            out[i, j] = g[i, j] - out[i, j] * total


@njit
def concrete(logits, noise, rate, out, work):
    """softmax of (logits + noise) * rate over rows; all (N, K), rate a float32."""
    n, k = logits.shape
    for i in range(n):
        for j in range(k):
            work[i, j] = (logits[i, j] + noise[i, j]) * rate
        top = _row_max(work, i)
        for j in range(k):
            work[i, j] -= top
    exp(work.reshape(n * k), out.reshape(n * k))
    for i in range(n):
        total = _row_sum(out, i)
        for j in range(k):
            out[i, j] /= total


# ------------------------------------------------------------------------------------- sampling
# Random bits u, a signed integer, give h uniform on (0, 1/2), with the same relative precision
# however small it is, and a sign that tells whether the uniform is h or 1 - h.

TWO_32, TWO_63, HALF_BIT = f4(2.0**-32), f4(2.0**-63), f4(2.0**-65)
SQRT_HALF, LOG_SPLIT = f4(0.70710678), f4(0.29289322)
TWO_16, MARGIN, FEW_BITS = f4(2.0**16), f4(0.05), i4(2**16)


@njit
def _exponential(h, upper):
    """-log(1 - h), or -log(h) where `upper`."""
    near = not upper and h < LOG_SPLIT
    f, k = _split(h if upper else ONE - h)
    # Near 1, the rounding of 1 - h has lost what matters.
    return -_log_1p(-h if near else f, ZERO if near else k)


@njit
def logistic(high, low, out):
    """log(h / (1 - h)), or minus that; high and low (N,) int32 are the halves of 64 bits."""
    for i in range(out.size):
        sign = i4(high[i] >> i4(31))
        lower = i4(i4(i4(low[i] ^ sign) >> i4(1)) & i4(0x7FFFFFFF))
        h = f4(i4(high[i] ^ sign)) * TWO_32 + (f4(lower) * TWO_63 + HALF_BIT)
        ratio = h / (ONE - h)
        f, k = _split(ratio)
        near = ratio > SQRT_HALF
        y = _log_1p((TWO * h - ONE) / (ONE - h) if near else f, ZERO if near else k)
        out[i] = -y if high[i] < i4(0) else y


@njit
def _decide(d):
    """1 where a uniform is surely below p, 0 where surely above, 2 where it may be either.

    d = 2^16 p - bits; the uniform has those bits and others after them. `MARGIN` is more than the
    rounding of 2^16 p, which may come from float64 or from a sigmoid.
    """
    y = ONE if d > ONE + MARGIN else (ZERO if d < -MARGIN else TWO)
    return y if d == d else TWO


@njit
def _undecided(out, found):
    """Write the i with out[i] = 2 to `found`; return their number."""
    n = 0
    for start in range(0, out.size, 4096):
        block = out[start : start + 4096]
        count = 0
        for i in range(block.size):
            count += block[i] == TWO
        if count:
            for i in range(block.size):
                if block[i] == TWO:
                    found[n] = start + i
                    n += 1
    return n


@njit
def bernoulli_probs(probs, bits, out, found):
    """bits (N,) uint16; returns the number of those undecided, whose places are in `found`."""
    for i in range(out.size):
        out[i] = _decide(TWO_16 * probs[i] - f4(bits[i]))
    return _undecided(out, found)


@njit
def bernoulli_logits(logits, bits, out, found):
    for i in range(out.size):
        v = logits[i]
        d = TWO_16 * _expit(v) - f4(bits[i])
        out[i] = _decide(d if v == v else v)
    return _undecided(out, found)


@njit
def _argmax_rows(v, sound, out):
    """argmax of each row of v (N, K) if all is `sound`; else -1 for a row that holds a NaN."""
    for i in range(v.shape[0]):
        best, arg = v[i, 0], 0
        for j in range(1, v.shape[1]):
            # `max`, since Numba makes a jump, often mispredicted, of a choice between two floats.
            arg = j if v[i, j] > best else arg
            best = max(v[i, j], best)
        out[i] = arg
    if not sound:
        for i in range(v.shape[0]):
            for j in range(v.shape[1]):
                if v[i, j] != v[i, j]:
                    out[i] = -1


@njit
def gumbel_max(logits, noise, out, work):
    """argmax of logits + noise (N, K), or -1 for a row that holds a NaN; work (B, K)."""
    n, k = logits.shape
    for start in range(0, n, work.shape[0]):
        a, b = logits[start : start + work.shape[0]], noise[start : start + work.shape[0]]
        size = a.size
        a, b, v = a.reshape(size), b.reshape(size), work.reshape(work.size)
        unsound = 0
        for i in range(size):
            y = a[i] + b[i]
            v[i] = y
            unsound += y != y
        rows = size // k
        _argmax_rows(work[:rows], unsound == 0, out[start : start + rows])


@njit
def categorical(logits, bits, out, work):
    """The same with Gumbel noise of 32 bits (N, K) int32; -1 also where they are too few."""
    n, k = logits.shape
    for start in range(0, n, work.shape[0]):
        a, b = logits[start : start + work.shape[0]], bits[start : start + work.shape[0]]
        size = a.size
        a, b, v = a.reshape(size), b.reshape(size), work.reshape(work.size)
        unsound = 0
        for i in range(size):
            q = i4(b[i] ^ i4(b[i] >> i4(31)))
            f, e = _split(_exponential((f4(q) + HALF) * TWO_32, b[i] < i4(0)))
            v[i] = a[i] - _log_1p(f, e)
        for i in range(size):
            y = v[i] if i4(b[i] ^ i4(b[i] >> i4(31))) >= FEW_BITS else NAN
            v[i] = y
            unsound += y != y
        rows = size // k
        _argmax_rows(work[:rows], unsound == 0, out[start : start + rows])


@njit
def conditional_logistic(logits, b, noise, out):
    """s softplus(s noise + softplus(s logits)) with s = 2 b - 1; all (N,)."""
    for i in range(out.size):
        s = TWO * b[i] - ONE
        v = s * logits[i]
        v = s * noise[i] + _softplus(v, _exp_neg_abs(v))
        y = s * _softplus(v, _exp_neg_abs(v))
        out[i] = y if v == v else v


@njit
def binary_concrete(logits, noise, rate, out):
    """expit((logits + noise) * rate), all (N,), rate a float32."""
    for i in range(out.size):
        v = (logits[i] + noise[i]) * rate
        y = _expit(v)
        out[i] = y if v == v else v
