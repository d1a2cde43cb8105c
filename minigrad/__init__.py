"""minigrad: reverse-mode automatic differentiation of plain NumPy code, to any order."""

import numpy as _np

from minigrad import arrays, elementwise, linalg, products, special, tree  # noqa: F401
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

# Every step frees the last parameters, moments and gradients, and makes new ones. The C library of
# Linux hands such arrays back to the system and gets them again page by page, at a third of the
# cost of a step of a small network. It learns to keep them once it has seen a block of up to 32 MB
# freed; the one below is never written to and costs microseconds.
_np.empty((32 << 20) - 65536, _np.uint8)
