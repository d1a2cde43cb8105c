"""Log-densities and their derivatives in one pass over memory, for float32 arrays.

NumPy reads and writes an array for each operation of a formula; the loops do it once for all, and
their exponentials are vectorised. Other dtypes and small arrays go to NumPy, and so do shapes that
broadcast, unless all that one array lacks is leading axes.

An affine map and its activation are not one pass: adding the bias takes a fifth of a layer's 54 µs
at 100 x 400, four thousandths of a training step, and a loop over both was slower than NumPy's two.
What pays is on the way back: `tanh_dx`, and `gate` for rectifiers.
"""

import numpy as np

from minigrad.kernels.transcendental import expit, loops, softplus, spread

# Elements of the rows that one call of a loop along rows treats, within the cache.
ROWS = 1 << 14


def expit_dx(x, g):
    r"""Return $g\, \sigma(x) (1 - \sigma(x))$, the pull-back of $g$ through $\sigma(x)$."""
    fast = loops(x, g)
    if fast is None:
        e = np.exp(-np.abs(x))
        return g * (e / ((1 + e) * (1 + e)))
    return spread(fast.expit_dx, np.empty(x.shape, x.dtype), x, g)


def tanh_dx(y, g):
    r"""Return $g (1 - y^2)$, the pull-back of the cotangent $g$ of $y = \tanh x$."""
    fast = loops(y, g)
    if fast is None:
        return g * (1 - y * y)
    return spread(fast.tanh_dx, np.empty(y.shape, y.dtype), y, g)


def gate(g, x, limit):
    """Return g where x > limit, half of it where they are equal, 0 times it elsewhere.

    The pull-back of a maximum; the loop is for a `limit` that is one number.
    """
    fast = loops(x, g) if type(limit) in (int, float) else None
    if fast is None:
        ties = x == limit
        return g * (np.where(ties, np.float16(0.5), x > limit) if ties.any() else x > limit)
    kernel = lambda x, g, out: fast.gate(x, g, np.float32(limit), out)
    return spread(kernel, np.empty(x.shape, x.dtype), x, g)


def normal_kl(loc_q, scale_q, loc_p, scale_p):
    r"""Return $\frac{1}{2}(z^2 + r^2 - 1) - \log r$, the divergence of two normals.

    $z = (\mu_q - \mu_p) / \sigma_p$ and $r = \sigma_q / \sigma_p$. The loop is for one
    prior p for all, and takes a third of the time.
    """
    shared = loc_p.shape == scale_p.shape == () and loc_p.dtype == scale_p.dtype == np.float32
    fast = loops(loc_q, scale_q) if shared else None
    if fast is None:
        ratio = scale_q / scale_p
        half = 0.5 * (((loc_q - loc_p) / scale_p) ** 2 + (ratio - 1) * (ratio + 1))
        return half - np.log(ratio)
    kernel = lambda loc, scale, out: fast.normal_kl(loc, scale, loc_p[()], scale_p[()], out)
    return spread(kernel, np.empty(loc_q.shape, loc_q.dtype), loc_q, scale_q)


def bernoulli_log_prob(logits, x):
    r"""Return $x a - \log(1 + e^a)$ elementwise, for logits $a$."""
    larger = _larger(logits, x)
    fast = None if larger is None else loops(larger)
    if fast is None:
        return x * logits - softplus(logits)
    return spread(fast.bernoulli_log_prob, np.empty(larger.shape, larger.dtype), logits, x)


def bernoulli_log_prob_dlogits(logits, x, g):
    r"""Return $g (x - \sigma(a))$, the pull-back of the cotangent $g$ to the logits $a$."""
    larger = _larger(logits, x)
    fast = None if larger is None else loops(larger, g)
    if fast is None:
        return g * (x - expit(logits))
    if not any(g.strides):  # the cotangent of a sum: one number, broadcast
        g = g[(slice(1),) * g.ndim].reshape(1)
    out = np.empty(larger.shape, larger.dtype)
    return spread(fast.bernoulli_log_prob_dlogits, out, logits, x, g)


def _larger(a, b):
    """Return the larger of two arrays of one dtype where the other has its last axes, else None."""
    if not type(a) is type(b) is np.ndarray or a.dtype != b.dtype or not (a.ndim and b.ndim):
        return None
    larger, other = (a, b) if a.ndim >= b.ndim else (b, a)
    return larger if larger.shape[larger.ndim - other.ndim :] == other.shape else None


def logsumexp(x, axis=None, keepdims=False):
    r"""Return $\log \sum_i e^{x_i}$ over `axis`, in NumPy."""
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0).astype(x.dtype)
    with np.errstate(divide="ignore"):
        out = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True)) + top
    return out if keepdims else np.squeeze(out, axis)[()]


def softmax(x, axis):
    r"""Return $e^{x_i} / \sum_j e^{x_j}$ along `axis`, in NumPy."""
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


def log_softmax(x, axis=-1):
    r"""Return $x_i - \log \sum_j e^{x_j}$ along `axis`; loops only along the last one."""
    fast = _row_loops(axis, x)
    if fast is None:
        return x - logsumexp(x, axis, keepdims=True)
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    rows, to, size = _rows(x), _rows(out), _rows_at_once(x)
    work, totals = np.empty((size, x.shape[-1]), x.dtype), np.empty(size, x.dtype)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        n = len(part)
        fast.log_softmax(part, to[start : start + size], work[:n], totals[:n])
    return out


def log_softmax_dx(ans, g, axis=-1):
    r"""Return $g - e^y \sum_j g_j$, the pull-back of the cotangent $g$ of $y$ = log_softmax(x)."""
    fast = _row_loops(axis, ans, g)
    if fast is None:
        return g - np.exp(ans) * np.sum(g, axis=axis, keepdims=True)
    ans, g = np.ascontiguousarray(ans), np.ascontiguousarray(g)
    out = np.empty_like(ans)
    a, b, to, size = _rows(ans), _rows(g), _rows(out), _rows_at_once(ans)
    for start in range(0, len(a), size):
        part = slice(start, start + size)
        fast.log_softmax_dx(a[part], b[part], to[part])
    return out


def _row_loops(axis, *arrays):
    return loops(*arrays) if axis in (-1, arrays[0].ndim - 1) else None


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _rows_at_once(x):
    return max(1, ROWS // x.shape[-1])
