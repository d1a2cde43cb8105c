"""Linear algebra, with batch axes in front and NumPy's names; np.linalg.* of traced arrays too.

Rules follow Giles (2008), "Collected matrix derivative results for forward and reverse mode
algorithmic differentiation", each written with these functions, hence differentiable again.
"""

from functools import partial

import numpy as np

from minigrad.core import plain, primitive, register

__all__ = ["cholesky", "det", "inv", "norm", "slogdet", "solve", "solve_triangular"]


def _solve_triangular(a, b, lower=False, trans=False):
    from scipy.linalg import solve_triangular  # SciPy's linalg is slow to import

    solve = partial(solve_triangular, lower=lower, trans=int(trans), check_finite=False)
    if a.ndim == b.ndim == 2:
        return solve(a, b)
    kind = np.result_type(a, b, np.float32)  # integers must not truncate
    return np.vectorize(solve, [kind], signature="(n,n),(n,k)->(n,k)")(a, b)


def _solve_triangular_rule_a(ans, a, b, lower=False, trans=False):
    def pull(g):
        w = _triangular(a, g, lower=lower, trans=not trans)
        full = -(np.matmul(ans, w.mT) if trans else np.matmul(w, ans.mT))
        return np.tril(full) if lower else np.triu(full)

    return pull


_triangular = primitive(
    _solve_triangular,
    _solve_triangular_rule_a,
    lambda ans, a, b, lower=False, trans=False: (
        lambda g: _triangular(a, g, lower=lower, trans=not trans)
    ),
    name="solve_triangular",
)


def solve_triangular(a, b, lower=False, trans=False):
    """Return x with a x = b, or aᵀ x = b if `trans`, for triangular `a` (..., N, N).

    `b` is (..., N, K), or (N,) for one vector. Only the triangle that `lower` names is read.
    """
    _require_square("solve_triangular", a)
    if np.ndim(b) == 1:
        return _triangular(a, b[:, None], lower=lower, trans=trans)[..., 0]
    return _triangular(a, b, lower=lower, trans=trans)


def _require_square(name, a):
    if np.ndim(a) < 2 or np.shape(a)[-1] != np.shape(a)[-2]:
        raise ValueError(f"{name} needs square matrices (..., N, N), got shape {np.shape(a)}")


def _cholesky_rule(ans, a):
    def pull(g):
        # Phi takes the lower triangle and halves the diagonal.
        n = ans.shape[-1]
        phi = np.tril(np.matmul(ans.mT, g)) * (1 - 0.5 * np.eye(n, dtype=ans.dtype))
        left = _triangular(ans, phi, lower=True, trans=True)
        full = _triangular(ans, left.mT, lower=True, trans=True)
        return 0.5 * (full + full.mT)

    return pull


_cholesky = primitive(np.linalg.cholesky, _cholesky_rule, name="cholesky")


@register(np.linalg.cholesky)
def cholesky(a):
    """Return the lower-triangular L with L Lᵀ = a, for symmetric positive definite `a`.

    `a` is taken as symmetric: its gradient is a symmetric matrix. Raises LinAlgError otherwise.
    """
    _require_square("cholesky", a)
    return _cholesky(a)


_solve = primitive(
    np.linalg.solve,
    lambda ans, a, b: lambda g: -np.matmul(_solve(a.mT, g), ans.mT),
    lambda ans, a, b: lambda g: _solve(a.mT, g),
    name="solve",
)


@register(np.linalg.solve)
def solve(a, b):
    """Return x with a x = b, for `a` (..., N, N) and `b` (..., N, K), or (N,) for one vector."""
    _require_square("solve", a)
    if np.ndim(b) == 1:
        return _solve(a, b[:, None])[..., 0]
    return _solve(a, b)


inv = primitive(np.linalg.inv, lambda ans, a: lambda g: -(ans.mT @ g @ ans.mT), name="inv")
register(np.linalg.inv)(inv)

_logabsdet = primitive(
    lambda a: np.linalg.slogdet(a)[1],
    lambda ans, a: lambda g: np.expand_dims(g, (-1, -2)) * inv(a).mT,
    name="slogdet",
)


@register(np.linalg.slogdet)
def slogdet(a):
    """Return the sign of det(a), a plain array, and log|det(a)|."""
    _require_square("slogdet", a)
    return np.linalg.slogdet(plain(a))[0], _logabsdet(a)


@register(np.linalg.det)
def det(a):
    """Return the determinant of invertible `a`, as sign times exp(log|det|)."""
    sign, logabsdet = slogdet(a)
    return sign * np.exp(logabsdet)


@register(np.linalg.norm)
def norm(x, ord=None, axis=None, keepdims=False):
    """Return the Euclidean (Frobenius) norm of `x` over `axis`; no other `ord` has a rule."""
    if ord is not None:
        raise NotImplementedError(
            f"norm of a traced array with ord={ord!r}: the Euclidean norm only; write others with "
            "np.sum and np.abs, or pass the axis by name"
        )
    return np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims))
