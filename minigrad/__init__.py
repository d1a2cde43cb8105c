"""minigrad: reverse-mode automatic differentiation of plain NumPy code, to any order."""

from minigrad import arrays, elementwise, linalg, special, tree  # noqa: F401
from minigrad.core import primitive
from minigrad.transforms import (
    grad,
    hessian,
    hvp,
    jacobian,
    jvp,
    stop_gradient,
    value_and_grad,
    vjp,
)

__version__ = "0.1.0"
__all__ = [
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "linalg",
    "primitive",
    "special",
    "stop_gradient",
    "tree",
    "value_and_grad",
    "vjp",
]
