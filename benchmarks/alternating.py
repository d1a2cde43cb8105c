"""A convolution of minigrad and a matrix product of NumPy, in turn, and each of them alone.

Their threads are two pools, which could get into each other's way.
"""

import numpy as np

IMAGES, CHANNELS, SIDE, SIZE = 32, 64, 28, 1000


def _pieces(n):
    from minigrad.kernels.conv import conv2d

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    x, w, a = draw(n, CHANNELS, SIDE, SIDE), draw(CHANNELS, CHANNELS, 3, 3), draw(SIZE, SIZE)
    return lambda: conv2d(x, w, padding=1), lambda: a @ a


def _case(n, step):
    convolution, product = _pieces(n)
    return step, lambda: {"convolution": convolution(), "product": product()}


def minigrad(n=IMAGES):
    """Both in turn."""
    convolution, product = _pieces(n)

    def step():
        convolution()
        product()

    return _case(n, step)


def convolution(n=IMAGES):
    """The convolution alone."""
    return _case(n, _pieces(n)[0])


def product(n=IMAGES):
    """The matrix product alone."""
    return _case(n, _pieces(n)[1])
