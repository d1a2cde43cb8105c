"""Forward and backward of convolutions: the gradients of images, weights and bias.

Padding keeps the size. Images and cotangents lie in memory as each framework likes them best.
"""

import numpy as np

from benchmarks import peers

# Name -> images N, channels C -> F, side of the images, side of the kernel, stride.
SHAPES = {
    "1_to_32_28_3x3": (64, 1, 32, 28, 3, 1),
    "32_to_64_14_3x3_stride2": (64, 32, 64, 14, 3, 2),
    "64_to_64_28_3x3": (32, 64, 64, 28, 3, 1),
    "32_to_32_28_7x7": (32, 32, 32, 28, 7, 1),
}


def _problem(shape, n):
    """Return (x, w, b, g) in NCHW, the padding and the stride."""
    images, c, f, side, k, stride = SHAPES[shape]
    n = n or images
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    out = (side - 1) // stride + 1
    arrays = draw(n, c, side, side), draw(f, c, k, k) / k, draw(f), draw(n, f, out, out)
    return arrays, k // 2, stride


def _last(a):
    """NCHW to NHWC, in memory."""
    return np.ascontiguousarray(np.moveaxis(a, 1, -1))


def _first(a):
    return np.moveaxis(a, -1, 1)


def _case(step, run, order=lambda a: a):
    """The step, and its four arrays as the result."""

    def result():
        y, dx, dw, db = map(np.asarray, run())
        return {"y": order(y), "dx": order(dx), "dw": dw, "db": db}

    return step, result


def minigrad(shape, n=None):
    """The pull-back of nn.conv2d."""
    from minigrad import vjp
    from minigrad.nn import conv2d

    (x, w, b, g), padding, stride = _problem(shape, n)
    params = {"w": w, "b": b}

    def run():
        y, pullback = vjp(lambda p, x: conv2d(p, x, stride, padding), params, x)
        grads, dx = pullback(g)
        return y, dx, grads["w"], grads["b"]

    return _case(run, run)


def torch(shape, n=None):
    """PyTorch, channels first or last."""
    import torch
    from torch.nn import functional as F

    arrays, padding, stride = _problem(shape, n)

    def form(memory_format):
        x, w, b, g = map(torch.from_numpy, arrays)
        x, w, g = (a.contiguous(memory_format=memory_format) for a in (x, w, g))
        leaves = [a.requires_grad_() for a in (x, w, b)]

        def run():
            y = F.conv2d(*leaves, stride=stride, padding=padding)
            return y.detach(), *torch.autograd.grad(y, leaves, g)

        return run

    forms = form(torch.contiguous_format), form(torch.channels_last)
    return _case(peers.torch_fastest(f"conv2d {shape}", *forms), forms[0])


def jax(shape, n=None):
    """JAX, channels first or last, forward and backward compiled as one."""
    import jax
    import jax.numpy as jnp

    (x, w, b, g), padding, stride = _problem(shape, n)

    def form(layout, x, w, g):
        def f(x, w, b):
            y = jax.lax.conv_general_dilated(
                x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=layout
            )
            return y + (b if layout[0] == "NHWC" else b[:, None, None])

        def forward_and_backward(x, w, b, g):
            y, pullback = jax.vjp(f, x, w, b)
            return y, *pullback(g)

        arrays = tuple(map(jnp.asarray, (x, w, b, g)))
        compiled = jax.jit(forward_and_backward).lower(*arrays).compile()
        return lambda: jax.block_until_ready(compiled(*arrays))

    first = form(("NCHW", "OIHW", "NCHW"), x, w, g)
    last = form(("NHWC", "HWIO", "NHWC"), _last(x), w.transpose(2, 3, 1, 0).copy(), _last(g))
    return _case(peers.fastest(f"conv2d {shape}", (None, first), (None, last)), first)


def mygrad(shape, n=None):
    """MyGrad, without its guards against writing into arrays."""
    import mygrad
    from mygrad.nnet.layers import conv_nd

    mygrad.turn_memory_guarding_off()
    arrays, padding, stride = _problem(shape, n)

    def run():
        *leaves, g = (mygrad.tensor(a, copy=False) for a in arrays)
        x, w, b = leaves
        y = conv_nd(x, w, stride=stride, padding=padding) + mygrad.reshape(b, (-1, 1, 1))
        y.backward(g.data)
        return y.data, *(a.grad for a in leaves)

    return _case(run, run)


def columns(image, side, stride, taps):
    """Return the (P, T C) inputs of the P output pixels of one padded image (H, W, C), by tap."""
    c = image.shape[-1]
    out = np.empty((side, side, len(taps), c), image.dtype)
    for t, (k, l) in enumerate(taps):
        out[:, :, t] = image[k : k + side * stride : stride, l : l + side * stride : stride]
    return out.reshape(side * side, -1)


def add_columns(into, columns, side, stride, taps):
    """Add to a padded image (H, W, C) what `columns` took from it: the adjoint."""
    columns = columns.reshape(side, side, len(taps), -1)
    for t, (k, l) in enumerate(taps):
        into[k : k + side * stride : stride, l : l + side * stride : stride] += columns[:, :, t]


def forward_by_hand(x, w, b, k, stride, taps):
    """Convolve x (N, H, W, C) with w (T C, F): a matrix product for each image, in the cache."""
    n, height, _, _ = x.shape
    p, side = k // 2, (height - 1) // stride + 1
    padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    y = np.empty((n, side, side, w.shape[1]), x.dtype)
    for image, out in zip(padded, y.reshape(n, side * side, -1)):
        np.matmul(columns(image, side, stride, taps), w, out=out)
    y += b
    return y, padded


def backward_by_hand(padded, w, g, k, stride, taps):
    """Return the gradients of x, w and b."""
    n, side, _, f = g.shape
    p = k // 2
    dw, dx = np.zeros_like(w), np.zeros_like(padded)
    for image, d, into in zip(padded, g.reshape(n, side * side, f), dx):
        dw += columns(image, side, stride, taps).T @ d
        add_columns(into, d @ w.T, side, stride, taps)
    return dx[:, p : dx.shape[1] - p, p : dx.shape[2] - p], dw, g.sum((0, 1, 2))


def numpy(shape, n=None):
    """By hand: im2col of one image at a time, channels last, and its adjoint."""
    (x, w, b, g), _, stride = _problem(shape, n)
    k = w.shape[-1]
    taps = list(np.ndindex(k, k))
    matrix = np.ascontiguousarray(w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]))
    x, g = _last(x), _last(g)

    def step():
        y, padded = forward_by_hand(x, matrix, b, k, stride, taps)
        return y, *backward_by_hand(padded, matrix, g, k, stride, taps)

    def run():
        y, dx, dw, db = step()
        return _first(y), _first(dx), dw.reshape(k, k, *w.shape[1::-1]).transpose(3, 2, 0, 1), db

    return _case(step, run)


def every_shape(framework, n=None):
    """Return the setup of a step that takes those of a framework at the four shapes in turn."""
    cases = {shape: globals()[framework](shape, n) for shape in SHAPES}

    def step():
        for one, _ in cases.values():
            one()

    def result():
        return {f"{s} {k}": a for s, (_, r) in cases.items() for k, a in r().items()}

    return step, result
