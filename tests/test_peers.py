"""Random programs, differentiated once and twice, against PyTorch where it is installed."""

import numpy as np
import pytest
import scipy.special as sc

from minigrad import grad, linalg, special

torch = pytest.importorskip("torch", reason="the independent framework, PyTorch, is not installed")

# One entry per operation: on NumPy arrays, traced or not, and on tensors. All take 3 x 3 matrices
# of moderate size to 3 x 3 matrices of moderate size, so that they compose in any order.
I3 = np.eye(3)
OPS = [
    (lambda x, y: x + y, lambda x, y: x + y),
    (lambda x, y: x * y, lambda x, y: x * y),
    (lambda x, y: x - 0.5 * y, lambda x, y: x - 0.5 * y),
    (lambda x, y: x / (1 + y * y), lambda x, y: x / (1 + y * y)),
    (lambda x, y: x @ y / 3, lambda x, y: x @ y / 3),
    (lambda x, y: np.tanh(x), lambda x, y: torch.tanh(x)),
    (lambda x, y: np.sin(x) * np.cos(y), lambda x, y: torch.sin(x) * torch.cos(y)),
    (lambda x, y: np.exp(-x * x), lambda x, y: torch.exp(-x * x)),
    (lambda x, y: np.log1p(x * x), lambda x, y: torch.log1p(x * x)),
    (lambda x, y: np.sqrt(1 + x * x), lambda x, y: torch.sqrt(1 + x * x)),
    (lambda x, y: np.arctan(x), lambda x, y: torch.arctan(x)),
    (lambda x, y: sc.expit(x), lambda x, y: torch.sigmoid(x)),
    (lambda x, y: special.softplus(x), lambda x, y: torch.nn.functional.softplus(x)),
    (lambda x, y: special.log_softmax(x, axis=0), lambda x, y: torch.log_softmax(x, 0)),
    (lambda x, y: special.softmax(x, axis=1), lambda x, y: torch.softmax(x, 1)),
    (lambda x, y: sc.erf(x), lambda x, y: torch.erf(x)),
    (lambda x, y: sc.gammaln(2 + x * x), lambda x, y: torch.lgamma(2 + x * x)),
    (lambda x, y: sc.log_ndtr(x), lambda x, y: torch.special.log_ndtr(x)),
    (lambda x, y: np.logaddexp(x, y), lambda x, y: torch.logaddexp(x, y)),
    (lambda x, y: np.maximum(x, y), lambda x, y: torch.maximum(x, y)),
    (lambda x, y: np.where(I3 > 0, x, y), lambda x, y: torch.where(torch.eye(3) > 0, x, y)),
    (lambda x, y: x.T, lambda x, y: x.T),
    (lambda x, y: x[[2, 0, 0]], lambda x, y: x[[2, 0, 0]]),
    (lambda x, y: np.roll(x, 1, axis=0), lambda x, y: torch.roll(x, 1, 0)),
    (lambda x, y: np.cumsum(x, axis=1) / 3, lambda x, y: torch.cumsum(x, 1) / 3),
    (lambda x, y: x - np.mean(x, axis=0), lambda x, y: x - torch.mean(x, 0)),
    (
        lambda x, y: x * np.sum(y, axis=1, keepdims=True) / 3,
        lambda x, y: x * torch.sum(y, 1, keepdim=True) / 3,
    ),
    (
        lambda x, y: np.einsum("ij,ik->jk", x, y) / 3,
        lambda x, y: torch.einsum("ij,ik->jk", x, y) / 3,
    ),
    (
        lambda x, y: np.concatenate([x[:1], y[1:]]),
        lambda x, y: torch.cat([x[:1], y[1:]]),
    ),
    (
        lambda x, y: np.linalg.solve(x @ x.T + I3, y),
        lambda x, y: torch.linalg.solve(x @ x.T + torch.eye(3, dtype=torch.float64), y),
    ),
    (
        lambda x, y: linalg.cholesky(x @ x.T + I3),
        lambda x, y: torch.linalg.cholesky(x @ x.T + torch.eye(3, dtype=torch.float64)),
    ),
]


def random_program(seed, length=12):
    """Return one program in both languages: each step takes two of the results so far."""
    rng = np.random.default_rng(seed)
    steps = [(rng.integers(len(OPS)), *rng.integers(2 + i, size=2)) for i in range(length)]

    def run(which, x, y):
        values = [x, y]
        for op, i, j in steps:
            values.append(OPS[op][which](values[i], values[j]))
        return sum((v * v).sum() for v in values[-4:]) / 10

    return run, rng.normal(size=(3, 3, 3))


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_agree_with_torch_to_second_order(seed):
    run, (x, y, v) = random_program(seed)
    first = grad(lambda x, y: run(0, x, y), argnums=(0, 1))
    second = grad(lambda x: np.sum(first(x, y)[0] * v))(x)

    tx, ty = (torch.tensor(a, requires_grad=True) for a in (x, y))
    gx, gy = torch.autograd.grad(
        run(1, tx, ty), (tx, ty), create_graph=True, materialize_grads=True
    )
    for ours, theirs in zip(first(x, y), (gx, gy)):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-9, atol=1e-10)
    if gx.requires_grad:
        (theirs,) = torch.autograd.grad((gx * torch.tensor(v)).sum(), tx, materialize_grads=True)
        np.testing.assert_allclose(second, theirs.numpy(), rtol=1e-8, atol=1e-9)
