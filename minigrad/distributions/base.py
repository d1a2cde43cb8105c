"""What the distributions share: dtypes, shapes, noise, and the lack of a closed form."""

import numpy as np

from minigrad.random import draw_shape


def floats(*args):
    """Return the arguments as floating-point arrays; numbers and integers take the others' dtype.

    Without this, NumPy would turn float32 into float64: np.log(2.0) is a float64 scalar.
    """
    floating = [a.dtype for a in args if hasattr(a, "dtype") and a.dtype.kind == "f"]
    dtype = np.result_type(*floating) if floating else np.float64
    return [
        a if hasattr(a, "dtype") and a.dtype.kind == "f" else np.asarray(a, dtype) for a in args
    ]


def spread(value, *parameters):
    """Return `value`, which does not depend on all parameters, in the shape of all of them."""
    return np.broadcast_to(value, np.broadcast_shapes(*map(np.shape, (value, *parameters))))


def noise(draw, rng, shape, *parameters):
    """Return standard noise for parameters from `floats`."""
    dtype = np.result_type(*(p.dtype for p in parameters))
    return draw(rng, draw_shape(shape, *parameters), dtype)


def finite(log_p):
    """Replace -inf by 0: such a term is multiplied by a probability of 0."""
    return np.where(log_p == -np.inf, 0, log_p)


def no_closed_form(quantity):
    """Return a method that raises NotImplementedError and names the Monte-Carlo estimate."""
    estimate = {
        "entropy": "-np.mean(d.log_prob(d.sample(rng, 1000)), axis=0)",
        "mean": "np.mean(d.sample(rng, 1000), axis=0)",
        "variance": "np.var(d.sample(rng, 1000), axis=0)",
    }[quantity]

    def method(self):
        raise NotImplementedError(
            f"the {quantity} of {type(self).__name__} has no closed form; estimate it by {estimate}"
        )

    method.__name__ = quantity
    method.__doc__ = f"Raise NotImplementedError: the {quantity} has no closed form."
    return method
