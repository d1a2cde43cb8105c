r"""The PixelCNN of six masked 7x7 layers of 32 channels and a 1x1: a training step, and sampling.

The training step: minus the mean log-likelihood of 32 binary images of 28x28, its gradient, and
Adam. Sampling: 16 images; the peers draw a pixel per pass through all layers, the only way that is
open to them without writing kernels. Of their 784 passes, which are all alike, `PASSES` are timed.
"""

import numpy as np

from benchmarks import peers
from benchmarks.conv2d import backward_by_hand, forward_by_hand

BATCH, SAMPLES, SIDE, CHANNELS, DEPTH, KERNEL = 32, 16, 28, 32, 6, 7
PASSES = 4
CENTRE = KERNEL**2 // 2
# Taps that are used, in reading order: those before the centre, and it but in the first layer.
TAPS = [CENTRE] + [CENTRE + 1] * (DEPTH - 1)

TO_JAX, FROM_JAX = (2, 3, 1, 0), (3, 2, 0, 1)  # (F, C, K, L) to (K, L, C, F), and back


def _mask(layer):
    return (np.arange(KERNEL**2) < TAPS[layer]).reshape(KERNEL, KERNEL)


def problem(n):
    """Return (params, images): a flat dict with w (F, C, K, L) and b (F,) of each layer."""
    rng = np.random.default_rng(0)
    params = {}
    for layer in range(DEPTH + 1):
        c, f = 1 if layer == 0 else CHANNELS, CHANNELS if layer < DEPTH else 1
        k = KERNEL if layer < DEPTH else 1
        scale = np.sqrt(2 / (c * k * k / 2))
        params[f"w{layer}"] = (scale * rng.standard_normal((f, c, k, k))).astype(np.float32)
        params[f"b{layer}"] = (0.1 * rng.standard_normal(f)).astype(np.float32)
        if layer < DEPTH:
            params[f"w{layer}"] *= _mask(layer)
    return params, (rng.random((n, 1, SIDE, SIDE)) < 0.3).astype(np.float32)


def _network(p, x, masked_conv, conv, relu):
    for layer in range(DEPTH):
        x = relu(masked_conv(p[f"w{layer}"], p[f"b{layer}"], x, layer))
    return conv(p[f"w{DEPTH}"], p[f"b{DEPTH}"], x)


# ------------------------------------------------------------------------------------ training


def _case(n, gradient, step, current, timed=None):
    """Return the step, and the result: a gradient, and where three steps lead to."""

    def result():
        params = problem(n)[0]
        value, grads = gradient(params)
        for _ in range(3):
            step()
        now = {name: np.array(p) for name, p in current().items()}
        later, _ = gradient(now)
        return {"value": value, **grads, "value after 3 steps": later}

    return timed or step, result


def minigrad(n=BATCH):
    """The step with nn.masked_conv2d."""
    from minigrad import value_and_grad
    from minigrad.nn import conv2d, masked_conv2d
    from minigrad.optim import adam
    from minigrad.special import bernoulli_log_prob

    params, images = problem(n)
    masked = lambda w, b, x, layer: masked_conv2d({"w": w, "b": b}, x, "B" if layer else "A")
    plain = lambda w, b, x: conv2d({"w": w, "b": b}, x)
    relu = lambda x: np.maximum(x, 0)

    def loss(p):
        return -np.sum(bernoulli_log_prob(_network(p, images, masked, plain, relu), images)) / n

    gradient = value_and_grad(loss)
    optimizer = adam(peers.RATE, peers.B1, peers.B2, peers.EPS)
    state = optimizer.init(params)

    def step():
        nonlocal params, state
        _, grads = gradient(params)
        params, state = optimizer.update(grads, state, params)

    return _case(n, gradient, step, lambda: params)


def torch(n=BATCH):
    """The step with PyTorch, channels first or last, and its fused Adam."""
    import torch
    from torch.nn import functional as F

    def form(memory_format):
        start, images = problem(n)
        images = torch.from_numpy(images).contiguous(memory_format=memory_format)
        masks = [torch.from_numpy(_mask(l).astype(np.float32)) for l in range(DEPTH)]
        masked = lambda w, b, x, layer: F.conv2d(x, w * masks[layer], b, padding=KERNEL // 2)
        plain = lambda w, b, x: F.conv2d(x, w, b)

        def tensors(params):
            leaves = {k: torch.from_numpy(p.copy()) for k, p in params.items()}
            return {
                k: (p.contiguous(memory_format=memory_format) if p.ndim == 4 else p)
                .detach()
                .requires_grad_()
                for k, p in leaves.items()
            }

        def loss(p):
            logits = _network(p, images, masked, plain, torch.relu)
            return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / n

        def gradient(params):
            fresh = tensors(params)
            value = loss(fresh)
            value.backward()
            return value.item(), {k: p.grad.numpy() for k, p in fresh.items()}

        params = tensors(start)
        step = peers.torch_step(loss, params)
        return step, gradient, lambda: {k: p.detach().numpy() for k, p in params.items()}

    first, last = form(torch.contiguous_format), form(torch.channels_last)
    timed = peers.torch_fastest("pixelcnn_step", first[0], last[0])
    return _case(n, first[1], first[0], first[2], timed)


def jax(n=BATCH):
    """The step with JAX, channels last, compiled as a whole."""
    import jax
    import jax.numpy as jnp

    params, images = problem(n)
    images = jnp.asarray(np.moveaxis(images, 1, -1))
    masked, plain = _jax_layers()

    def loss(p):
        logits = _network(p, images, masked, plain, jax.nn.relu)
        return jnp.sum(jax.nn.softplus(logits) - images * logits) / n

    def gradient(params):
        value, grads = jax.jit(jax.value_and_grad(loss))(_transposed(params, TO_JAX))
        return value, _transposed(grads, FROM_JAX)

    step, state = peers.jax_training_step(loss, _transposed(params, TO_JAX))
    return _case(n, gradient, step, lambda: _transposed(state()[0], FROM_JAX))


def _transposed(params, axes):
    return {k: np.transpose(p, axes) if p.ndim == 4 else p for k, p in params.items()}


def _jax_layers():
    import jax

    def conv(w, b, x):
        p = w.shape[0] // 2
        layout = ("NHWC", "HWIO", "NHWC")
        return b + jax.lax.conv_general_dilated(
            x, w, (1, 1), [(p, p)] * 2, dimension_numbers=layout
        )

    masks = [_mask(layer)[:, :, None, None].astype(np.float32) for layer in range(DEPTH)]
    return lambda w, b, x, layer: conv(w * masks[layer], b, x), conv


def numpy(n=BATCH):
    """The step by hand, channels last: only the taps that are used enter the matrix products."""
    params, images = problem(n)
    x = np.moveaxis(images, 1, -1)
    taps = [list(np.ndindex(KERNEL, KERNEL))[:used] for used in TAPS]

    def matrix(w, layer):
        return (
            w.transpose(2, 3, 1, 0).reshape(-1, *w.shape[1::-1])[: TAPS[layer]].reshape(-1, len(w))
        )

    def gradient(p):
        kept, matrices, h = [], [], x
        for layer in range(DEPTH):
            matrices.append(matrix(p[f"w{layer}"], layer))
            h, padded = forward_by_hand(h, matrices[-1], p[f"b{layer}"], KERNEL, 1, taps[layer])
            np.maximum(h, 0, out=h)
            kept.append((padded, h))
        last = p[f"w{DEPTH}"].reshape(CHANNELS)
        logits = h @ last + p[f"b{DEPTH}"]
        value = np.sum(np.logaddexp(0, logits) - x[..., 0] * logits) / n
        d = (1 / (1 + np.exp(-logits)) - x[..., 0]) / n
        grads = {
            f"w{DEPTH}": np.einsum("nij,nijc->c", d, h).reshape(1, CHANNELS, 1, 1),
            f"b{DEPTH}": d.sum().reshape(1),
        }
        d = d[..., None] * last
        for layer in reversed(range(DEPTH)):
            padded, h = kept[layer]
            d *= h > 0
            w = p[f"w{layer}"]
            d, dw, grads[f"b{layer}"] = backward_by_hand(
                padded, matrices[layer], d, KERNEL, 1, taps[layer]
            )
            whole = np.zeros((KERNEL**2, *w.shape[1::-1]), np.float32)
            whole[: TAPS[layer]] = dw.reshape(-1, *w.shape[1::-1])
            grads[f"w{layer}"] = whole.reshape(KERNEL, KERNEL, *w.shape[1::-1]).transpose(
                3, 2, 0, 1
            )
        return value, grads

    update = peers.numpy_adam(params)
    return _case(n, gradient, lambda: update(gradient(params)[1]), lambda: params)


# ------------------------------------------------------------------------------------ sampling


def minigrad_sample(n=SAMPLES):
    """The sampler, which computes what the newest pixel changes.

    The result are the logits of given images: the uniforms 0 and 1 leave it no choice.
    """
    from minigrad.kernels.pixelcnn import Layer, sample

    params, images = problem(n)
    layers = [Layer(params[f"w{l}"], params[f"b{l}"], _mask(l)) for l in range(DEPTH)]
    last = params[f"w{DEPTH}"], params[f"b{DEPTH}"]
    layers.append(Layer(*last, np.ones((1, 1), bool), relu=False))
    uniforms = np.random.default_rng(1).random(images.shape)

    def result():
        drawn, logits = sample(layers, 1 - images)
        return {"images": drawn, "logits": logits}

    return lambda: sample(layers, uniforms), result


def _passes(logits, images):
    """A step of PASSES passes, each of which draws one pixel of every image; a pass as result."""
    uniforms = np.random.default_rng(1).random(images.shape)
    drawn = np.zeros_like(images)

    def step():
        for j in range(PASSES):
            seen = np.asarray(logits(drawn))[:, 0, 0, j]
            drawn[:, 0, 0, j] = uniforms[:, 0, 0, j] < 1 / (1 + np.exp(-seen))

    return step, lambda: {"images": images, "logits": np.asarray(logits(images))}


def torch_sample(n=SAMPLES):
    """PyTorch in inference mode, channels first or last, the masks applied beforehand."""
    import torch
    from torch.nn import functional as F

    params, images = problem(n)

    def form(memory_format):
        p = {k: torch.from_numpy(a) for k, a in params.items()}
        p = {
            k: a.contiguous(memory_format=memory_format) if a.ndim == 4 else a for k, a in p.items()
        }
        masked = lambda w, b, x, layer: F.conv2d(x, w, b, padding=KERNEL // 2)
        plain = lambda w, b, x: F.conv2d(x, w, b)

        @torch.inference_mode()
        def logits(x):
            x = torch.from_numpy(x).contiguous(memory_format=memory_format)
            return _network(p, x, masked, plain, torch.relu)

        return _passes(logits, images)

    first, last = form(torch.contiguous_format), form(torch.channels_last)
    return peers.torch_fastest("pixelcnn_sample", first[0], last[0]), first[1]


def jax_sample(n=SAMPLES):
    """JAX, channels last, a pass compiled as a whole."""
    import jax
    import jax.numpy as jnp

    params, images = problem(n)
    _, conv = _jax_layers()
    p = {k: jnp.asarray(a) for k, a in _transposed(params, TO_JAX).items()}
    masked = lambda w, b, x, layer: conv(w, b, x)
    logits = jax.jit(
        lambda x: jnp.moveaxis(
            _network(p, jnp.moveaxis(x, 1, -1), masked, conv, jax.nn.relu), -1, 1
        )
    )
    return _passes(logits, images)


def numpy_sample(n=SAMPLES):
    """By hand, channels last, without the taps that the masks zero."""
    params, images = problem(n)
    taps = [list(np.ndindex(KERNEL, KERNEL))[:used] for used in TAPS]
    matrices = []
    for layer, used in enumerate(TAPS):
        w = params[f"w{layer}"].transpose(2, 3, 1, 0).reshape(KERNEL**2, -1, CHANNELS)
        matrices.append(np.ascontiguousarray(w[:used].reshape(-1, CHANNELS)))

    def logits(x):
        h = np.moveaxis(x, 1, -1)
        for layer in range(DEPTH):
            b = params[f"b{layer}"]
            h, _ = forward_by_hand(h, matrices[layer], b, KERNEL, 1, taps[layer])
            np.maximum(h, 0, out=h)
        h = h @ params[f"w{DEPTH}"].reshape(CHANNELS, 1) + params[f"b{DEPTH}"]
        return np.moveaxis(h, -1, 1)

    return _passes(logits, images)
