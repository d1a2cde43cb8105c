r"""Four oracles: derivatives, expectations, densities and Jacobian determinants, held to the truth.

Each raises AssertionError with both numbers when the code under test is wrong, and returns the
figure it measured, for the record. They have been tried on rules that are wrong on purpose.
"""

import numpy as np

from minigrad import tree
from minigrad.core import nan_check
from minigrad.transforms import vjp

__all__ = ["check_density", "check_grads", "check_logdet", "check_unbiased", "nan_check"]


def check_grads(f, args, order=2, rng=None, rtol=1e-6):
    r"""Check the derivatives of `f` at `args` up to `order` against finite differences.

    `args` is a tuple of trees of arrays, taken as float64. Along one random direction $v$ and
    for one random cotangent $u$, $\langle J^\top u, v\rangle$ must equal
    $\langle u, \frac{d}{dt} f(x + t v)\rangle$, found by central differences extrapolated to step
    zero (Ridders 1982). So one check costs a dozen calls, whatever the shapes. The pull-back
    is then checked in the same way as a function of the arguments and of $u$: order 2 and above.

    Returns the largest relative error. Raises AssertionError with order, shapes and both numbers.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    name = getattr(f, "__name__", "f")
    return _check_grads(f, tuple(args), order, rng, rtol, name, name)


def _check_grads(f, args, order, rng, rtol, name, path):
    leaves, treedef = tree.flatten(args)
    leaves = [np.asarray(x, np.float64) for x in leaves]
    args = tree.unflatten(treedef, leaves)
    direction = [rng.standard_normal(x.shape) for x in leaves]
    out, pullback = vjp(f, *args)
    cotangent = tree.map(lambda y: rng.standard_normal(np.shape(y)), out)
    pulled = [g * v for g, v in zip(tree.leaves(pullback(cotangent)), direction)]

    def along(t):
        moved = tree.unflatten(treedef, [x + t * v for x, v in zip(leaves, direction)])
        terms = [u * y for u, y in zip(tree.leaves(cotangent), tree.leaves(f(*moved)))]
        return np.concatenate([np.ravel(term) for term in terms]) if terms else np.zeros(0)

    moved = _ridders(along)
    analytic, numeric = float(sum(np.sum(p) for p in pulled)), float(np.sum(moved))
    scale = float(np.sum(np.abs(moved)) + sum(np.sum(np.abs(p)) for p in pulled))
    error = abs(analytic - numeric) / scale if scale else 0.0
    if not error <= rtol:
        shapes = ", ".join(str(x.shape) for x in leaves)
        raise AssertionError(
            f"wrong derivative of {path} (order {1 + path.count('vjp of')} of {name}) at arguments "
            f"of shapes {shapes}: <vjp(u), v> = {analytic:.12g}, finite differences give "
            f"{numeric:.12g} (relative error {error:.1e}, allowed {rtol:.0e})"
        )
    if order == 1:
        return error

    def pull(args, cotangent):
        return vjp(f, *args)[1](cotangent)

    return max(
        error,
        _check_grads(pull, (args, cotangent), order - 1, rng, rtol, name, f"the vjp of {path}"),
    )


def _ridders(f, step=0.04, levels=8):
    """Return f'(0): central differences at halved steps, extrapolated; the steadiest entry wins."""
    best, smallest, previous = None, np.inf, []
    with np.errstate(all="ignore"):
        for _ in range(levels):
            row = [(f(step) - f(-step)) / (2 * step)]
            for k, earlier in enumerate(previous):
                row.append(row[k] + (row[k] - earlier) / (4.0 ** (k + 1) - 1))
                change = max(
                    np.sum(np.abs(row[k + 1] - row[k])), np.sum(np.abs(row[k + 1] - earlier))
                )
                if change < smallest or best is None:
                    best, smallest = row[k + 1], change
            previous, step = row, step / 2
    return best


def check_unbiased(samples, exact, failure_rate=1e-6, scale=None):
    r"""Check that the mean of `samples` is `exact`, by a z-score per coordinate.

    `samples` has shape (S, ...), S independent replicas; `exact` has shape (...). The largest
    |z| must stay below the two-sided quantile of `failure_rate`, divided by the number of
    coordinates (Bonferroni). Returns it.

    Raises AssertionError where the mean is off, and also where passing would mean little: where
    an error of 5 % of `scale`, by default the largest |exact|, would go unnoticed in some
    coordinate, or where one sample carries more than 1 % of its second central moment, so that the
    standard error is not to be trusted.
    """
    from scipy.special import ndtri

    samples, exact = np.asarray(samples, np.float64), np.asarray(exact, np.float64)
    if samples.shape[1:] != exact.shape:
        raise ValueError(f"samples of shape {samples.shape}, so exact has {samples.shape[1:]}, "
                         f"not {exact.shape}")  # fmt: skip
    n, coordinates = len(samples), max(exact.size, 1)
    limit = -ndtri(failure_rate / (2 * coordinates))
    scale = float(np.max(np.abs(exact), initial=0)) if scale is None else scale
    if not scale > 0:
        raise ValueError("exact is zero: give the scale of which 5 % must be noticed")
    mean = samples.mean(0)
    square = (samples - mean) ** 2
    total = square.sum(0)
    error = np.sqrt(total / (n - 1) / n)
    floor = 1e-12 * scale  # what rounding may do to coordinates that do not vary
    z = np.abs(mean - exact) / np.maximum(error, floor)
    worst = np.unravel_index(np.argmax(z), z.shape)
    if not z[worst] <= limit:
        raise AssertionError(
            f"biased: coordinate {tuple(map(int, worst))} has mean {mean[worst]:.6g} +- "
            f"{error[worst]:.2g}, exact {exact[worst]:.6g}, z = {z[worst]:.1f} (limit {limit:.1f})"
        )
    # With 3 standard errors to spare, an error of that size is noticed 99.9 % of the time.
    needed = n * ((limit + 3) * error.max(initial=0) / (0.05 * scale)) ** 2
    if needed > n:
        raise AssertionError(
            f"no power: an error of 5 % of {scale:.3g} would go unnoticed with {n} samples; take "
            f"about {needed:.0f}"
        )
    share = float(np.max(square.max(0) / np.maximum(total, n * floor**2)))
    if share > 0.01 and error.max() > floor:
        raise AssertionError(
            f"one of {n} samples carries {100 * share:.1f} % of the second moment (at most 1 %): "
            "heavy tails or too few samples; the standard error means nothing"
        )
    return float(z[worst])


def check_density(log_prob, support, samples=None, failure_rate=1e-6):
    r"""Check that `exp(log_prob)` integrates to 1, and that `samples` follow it.

    `support` is a pair (low, high), infinite if need be, for a density of one real variable; a
    list of two such pairs for `log_prob` of an array (..., 2); or the array of all values of a
    discrete one. `log_prob` maps arrays to arrays. `samples` (S,) are compared with the density by
    a chi-squared test in 20 bins of equal sample counts, or on the discrete values.

    Returns the error of the integral. Raises AssertionError where it exceeds 1e-6, or where the
    p-value is below `failure_rate`.
    """
    if isinstance(support, np.ndarray):
        probs = np.exp(log_prob(support))
        total = float(probs.sum())
    elif isinstance(support, tuple):
        total = _mass(log_prob, *support)
    else:
        from scipy.integrate import nquad

        density = lambda *x: float(np.exp(log_prob(np.array(x))))  # noqa: E731
        total = nquad(density, support, opts={"epsabs": 1e-9, "epsrel": 1e-9})[0]
    if not abs(total - 1) <= 1e-6:
        raise AssertionError(f"the density integrates to {total:.9g} over {support}, not to 1")
    if samples is not None:
        samples = np.asarray(samples, np.float64)
        if isinstance(support, list):
            raise TypeError("samples are compared with a density of one variable only")
        if isinstance(support, np.ndarray):
            counts = np.array([np.sum(samples == v) for v in support])
        else:
            inside = (samples >= support[0]) & (samples <= support[1])
            inner = np.quantile(samples, np.linspace(0, 1, 21)[1:-1])
            edges = np.concatenate([[support[0]], inner, [support[1]]])
            probs = np.array([_mass(log_prob, a, b) for a, b in zip(edges, edges[1:])])
            counts = np.histogram(samples[inside], edges)[0]
        if counts.sum() != len(samples):
            raise AssertionError(f"{len(samples) - counts.sum()} samples lie outside {support}")
        _chi_squared(counts, probs, failure_rate)
    return abs(total - 1)


def _mass(log_prob, low, high):
    from scipy.integrate import quad

    density = lambda x: float(np.exp(log_prob(np.float64(x))))  # noqa: E731
    if np.isinf(low) and np.isinf(high):
        return _mass(log_prob, low, 0.0) + _mass(log_prob, 0.0, high)
    return quad(density, low, high, epsabs=1e-10, epsrel=1e-10, limit=500)[0]


def _chi_squared(counts, probs, failure_rate):
    from scipy.special import chdtrc

    expected = probs * counts.sum()
    rare = expected < 5  # pooled: the chi-squared law needs a few counts per cell
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = float(np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-300)))
    p_value = chdtrc(len(counts) - 1, statistic)
    if not p_value >= failure_rate:
        raise AssertionError(
            f"samples do not follow the density: chi-squared {statistic:.1f} on {len(counts) - 1} "
            f"degrees of freedom, p = {p_value:.1e}"
        )


def check_logdet(transform, z, inverse=None, tolerance=1e-6):
    r"""Check $\log|\det \partial x/\partial z|$ of a transform from base to data, and its inverse.

    `transform(z)` returns `(x, log_abs_det)` for `z` of shape (B, D), `log_abs_det` of shape (B,).
    The Jacobian is found by finite differences, each coordinate in turn. `inverse(x)` must
    return `z`. Returns the largest error; raises AssertionError above `tolerance`.
    """
    z = np.asarray(z, np.float64)
    x, log_abs_det = transform(z)
    columns = [_ridders(lambda t, e=unit: transform(z + t * e)[0]) for unit in np.eye(z.shape[-1])]
    numeric = np.linalg.slogdet(np.stack(columns, axis=-1))[1]
    errors = [float(np.max(np.abs(numeric - log_abs_det)))]
    if not errors[0] <= tolerance:
        b = int(np.argmax(np.abs(numeric - log_abs_det)))
        raise AssertionError(
            f"wrong log|det|: {log_abs_det[b]:.9g} at point {b}, finite differences give "
            f"{numeric[b]:.9g}"
        )
    if inverse is not None:
        errors.append(float(np.max(np.abs(inverse(x) - z))))
        if not errors[1] <= tolerance:
            raise AssertionError(f"inverse(transform(z)) differs from z by {errors[1]:.3g}")
    return max(errors)
