r"""One training step of the VAE 784-400-20-400-784: gradient of the ELBO, and Adam.

Tanh layers, Bernoulli pixels, float32, a batch of 100, one sample of z per image: minus the mean
over the batch of log p(x|z) - KL(q(z|x) || N(0, I)), constants included (Kingma and Welling, 2014).
Each framework starts from the same parameters, and sees the same images and noise in every step.
"""

import numpy as np

from benchmarks import peers

BATCH, PIXELS, HIDDEN, LATENTS = 100, 784, 400, 20
# Name -> shape of the weights; the bias of layer "x" is "x_b".
LAYERS = {
    "hidden": (PIXELS, HIDDEN),
    "loc": (HIDDEN, LATENTS),
    "log_var": (HIDDEN, LATENTS),
    "decoder": (LATENTS, HIDDEN),
    "logits": (HIDDEN, PIXELS),
}


def problem(n):
    """Return (params, images, noise): a flat dict of arrays, and n rows of either."""
    rng = np.random.default_rng(0)
    params = {}
    for name, (n_in, n_out) in LAYERS.items():
        params[name] = (rng.normal(size=(n_in, n_out)) / np.sqrt(n_in)).astype(np.float32)
        params[name + "_b"] = np.zeros(n_out, np.float32)
    images = (rng.random((n, PIXELS)) < 0.2).astype(np.float32)
    noise = rng.standard_normal((n, LATENTS)).astype(np.float32)
    return params, images, noise


def _case(n, gradient, step, current):
    """Return the step, and the result: a gradient, and where five steps lead to."""

    def result():
        value, grads = gradient(problem(n)[0])
        for _ in range(5):
            step()
        params = {name: np.array(p) for name, p in current().items()}
        later, _ = gradient_by_hand(params, *problem(n)[1:])
        return {"value": value, **grads, "value after 5 steps": later}

    return step, result


def minigrad(n=BATCH):
    """The step with minigrad: autodiff, and Adam as a pure function."""
    from minigrad import value_and_grad
    from minigrad.nn import affine
    from minigrad.optim import adam
    from minigrad.special import bernoulli_log_prob

    params, x, noise = problem(n)

    def negative_elbo(p):
        h = np.tanh(affine(x, p["hidden"], p["hidden_b"]))
        loc = affine(h, p["loc"], p["loc_b"])
        log_var = affine(h, p["log_var"], p["log_var_b"])
        z = loc + np.exp(0.5 * log_var) * noise
        h = np.tanh(affine(z, p["decoder"], p["decoder_b"]))
        logits = affine(h, p["logits"], p["logits_b"])
        kl = 0.5 * np.sum(np.exp(log_var) + loc * loc - 1 - log_var)
        return (kl - np.sum(bernoulli_log_prob(logits, x))) / n

    gradient = value_and_grad(negative_elbo)
    optimizer = adam(peers.RATE, peers.B1, peers.B2, peers.EPS)
    state = optimizer.init(params)

    def step():
        nonlocal params, state
        _, grads = gradient(params)
        params, state = optimizer.update(grads, state, params)

    return _case(n, gradient, step, lambda: params)


def _affine(x, w, b):
    y = x @ w
    y += b
    return y


def gradient_by_hand(p, x, noise):
    """Minus the ELBO and its gradient; buffers are reused where that is plain."""
    h1 = _affine(x, p["hidden"], p["hidden_b"])
    np.tanh(h1, out=h1)
    loc = _affine(h1, p["loc"], p["loc_b"])
    log_var = _affine(h1, p["log_var"], p["log_var_b"])
    scale = np.exp(0.5 * log_var)
    z = loc + scale * noise
    h2 = _affine(z, p["decoder"], p["decoder_b"])
    np.tanh(h2, out=h2)
    logits = _affine(h2, p["logits"], p["logits_b"])
    # log(1 + exp(a)) = max(a, 0) + log(1 + exp(-|a|)), without overflow.
    e = np.abs(logits)
    np.negative(e, out=e)
    np.exp(e, out=e)
    e += 1
    softplus = np.log(e)
    softplus += np.maximum(logits, 0)
    log_prob = np.vdot(x, logits) - np.sum(softplus)
    var = scale * scale
    kl = 0.5 * np.sum(var + loc * loc - 1 - log_var)
    value = (kl - log_prob) / len(x)

    g = {}
    np.negative(logits, out=e)
    np.exp(e, out=e)
    e += 1
    d = np.divide(1, e, out=e)
    d -= x
    d /= len(x)
    g["logits"], g["logits_b"] = h2.T @ d, d.sum(0)
    d = d @ p["logits"].T
    h2 *= h2
    np.subtract(1, h2, out=h2)
    d *= h2
    g["decoder"], g["decoder_b"] = z.T @ d, d.sum(0)
    d = d @ p["decoder"].T
    d_loc = d + loc / len(x)
    d_log_var = 0.5 * (d * noise * scale + (var - 1) / len(x))
    g["loc"], g["loc_b"] = h1.T @ d_loc, d_loc.sum(0)
    g["log_var"], g["log_var_b"] = h1.T @ d_log_var, d_log_var.sum(0)
    d = d_loc @ p["loc"].T
    d += d_log_var @ p["log_var"].T
    h1 *= h1
    np.subtract(1, h1, out=h1)
    d *= h1
    g["hidden"], g["hidden_b"] = x.T @ d, d.sum(0)
    return value, g


def numpy(n=BATCH):
    """The step by hand: every derivative written out."""
    params, x, noise = problem(n)
    update = peers.numpy_adam(params)
    gradient = lambda p: gradient_by_hand(p, x, noise)
    return _case(n, gradient, lambda: update(gradient(params)[1]), lambda: params)


def torch(n=BATCH):
    """The step with PyTorch in eager mode, with its fused Adam."""
    import torch
    from torch.nn import functional as F

    params, x, noise = problem(n)
    x, noise = torch.from_numpy(x), torch.from_numpy(noise)

    def tensors(params):
        # torch.nn.Linear keeps its weights as (n_out, n_in).
        return {k: torch.from_numpy(p.T.copy()).requires_grad_() for k, p in params.items()}

    def negative_elbo(p):
        h = torch.tanh(F.linear(x, p["hidden"], p["hidden_b"]))
        loc = F.linear(h, p["loc"], p["loc_b"])
        log_var = F.linear(h, p["log_var"], p["log_var_b"])
        z = torch.addcmul(loc, torch.exp(0.5 * log_var), noise)
        h = torch.tanh(F.linear(z, p["decoder"], p["decoder_b"]))
        logits = F.linear(h, p["logits"], p["logits_b"])
        kl = 0.5 * torch.sum(torch.exp(log_var) + loc * loc - 1 - log_var)
        return (kl + F.binary_cross_entropy_with_logits(logits, x, reduction="sum")) / n

    def gradient(params):
        fresh = tensors(params)
        value = negative_elbo(fresh)
        value.backward()
        return value.item(), {k: p.grad.numpy().T for k, p in fresh.items()}

    params = tensors(params)
    step = peers.torch_step(negative_elbo, params)
    current = lambda: {k: p.detach().numpy().T for k, p in params.items()}
    _, result = _case(n, gradient, step, current)
    return peers.torch_fastest("vae_step", step), result


def _negative_elbo(np, softplus, p, x, noise):
    """Minus the ELBO in the operations of NumPy's interface."""
    h = np.tanh(np.matmul(x, p["hidden"]) + p["hidden_b"])
    loc = np.matmul(h, p["loc"]) + p["loc_b"]
    log_var = np.matmul(h, p["log_var"]) + p["log_var_b"]
    z = loc + np.exp(0.5 * log_var) * noise
    h = np.tanh(np.matmul(z, p["decoder"]) + p["decoder_b"])
    logits = np.matmul(h, p["logits"]) + p["logits_b"]
    kl = 0.5 * np.sum(np.exp(log_var) + loc * loc - 1 - log_var)
    return (kl + np.sum(softplus(logits) - x * logits)) / x.shape[0]


def jax(n=BATCH):
    """The step with JAX, compiled as a whole."""
    import jax
    import jax.numpy as jnp

    params, x, noise = problem(n)
    x, noise = jnp.asarray(x), jnp.asarray(noise)
    loss = lambda p: _negative_elbo(jnp, jax.nn.softplus, p, x, noise)
    step, state = peers.jax_training_step(loss, params)
    return _case(n, jax.jit(jax.value_and_grad(loss)), step, lambda: state()[0])


def autograd(n=BATCH):
    """The step with HIPS autograd, and Adam by hand."""
    import autograd.numpy as anp
    from autograd import value_and_grad

    params, x, noise = problem(n)
    update = peers.numpy_adam(params)
    softplus = lambda a: anp.logaddexp(a, np.float32(0))
    gradient = value_and_grad(lambda p: _negative_elbo(anp, softplus, p, x, noise))
    return _case(n, gradient, lambda: update(gradient(params)[1]), lambda: params)


def mygrad(n=BATCH):
    """The step with MyGrad, without its guards against writing into arrays, and Adam by hand."""
    import mygrad

    mygrad.turn_memory_guarding_off()
    params, x, noise = problem(n)
    update = peers.numpy_adam(params)
    softplus = lambda a: mygrad.logaddexp(a, np.float32(0))

    def gradient(params):
        tensors = {k: mygrad.tensor(p, copy=False) for k, p in params.items()}
        value = _negative_elbo(mygrad, softplus, tensors, x, noise)
        value.backward()
        return value.item(), {k: t.grad for k, t in tensors.items()}

    return _case(n, gradient, lambda: update(gradient(params)[1]), lambda: params)
