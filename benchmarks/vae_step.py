r"""One training step of the VAE 784-400-20-400-784: gradient of the ELBO, and Adam.

Tanh layers, Bernoulli pixels, float32, a batch of 100, one sample of z per image: minus the mean
over the batch of log p(x|z) - KL(q(z|x) || N(0, I)), constants included (Kingma and Welling, 2014).
Each framework starts from the same parameters, and sees the same images and noise in every step.
"""

import numpy as np

BATCH, PIXELS, HIDDEN, LATENTS = 100, 784, 400, 20
RATE, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8
# Name -> shape of the weights; the bias of layer "x" is "x_b".
LAYERS = {
    "hidden": (PIXELS, HIDDEN),
    "loc": (HIDDEN, LATENTS),
    "log_var": (HIDDEN, LATENTS),
    "decoder": (LATENTS, HIDDEN),
    "logits": (HIDDEN, PIXELS),
}


def problem():
    """Return (params, images, noise): params is a flat dict of arrays."""
    rng = np.random.default_rng(0)
    params = {}
    for name, (n_in, n_out) in LAYERS.items():
        params[name] = (rng.normal(size=(n_in, n_out)) / np.sqrt(n_in)).astype(np.float32)
        params[name + "_b"] = np.zeros(n_out, np.float32)
    images = (rng.random((BATCH, PIXELS)) < 0.2).astype(np.float32)
    noise = rng.standard_normal((BATCH, LATENTS)).astype(np.float32)
    return params, images, noise


def minigrad():
    """The step with minigrad: autodiff, and Adam as a pure function."""
    from minigrad import value_and_grad
    from minigrad.nn import affine
    from minigrad.optim import adam
    from minigrad.special import bernoulli_log_prob

    params, x, noise = problem()

    def negative_elbo(p):
        h = np.tanh(affine(x, p["hidden"], p["hidden_b"]))
        loc = affine(h, p["loc"], p["loc_b"])
        log_var = affine(h, p["log_var"], p["log_var_b"])
        z = loc + np.exp(0.5 * log_var) * noise
        h = np.tanh(affine(z, p["decoder"], p["decoder_b"]))
        logits = affine(h, p["logits"], p["logits_b"])
        kl = 0.5 * np.sum(np.exp(log_var) + loc * loc - 1 - log_var)
        return (kl - np.sum(bernoulli_log_prob(logits, x))) / BATCH

    gradient = value_and_grad(negative_elbo)
    optimizer = adam(RATE, B1, B2, EPS)
    now = {"params": params, "state": optimizer.init(params)}

    def step():
        _, grads = gradient(now["params"])
        now["params"], now["state"] = optimizer.update(grads, now["state"], now["params"])

    def result():
        value, grads = gradient(params)
        return {"value": value, **grads}

    return step, result


def numpy():
    """The step by hand: every derivative written out, buffers reused where that is plain."""
    params, x, noise = problem()
    start = {name: p.copy() for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    taken = 0

    def affine(x, w, b):
        y = x @ w
        y += b
        return y

    def gradient(p):
        h1 = affine(x, p["hidden"], p["hidden_b"])
        np.tanh(h1, out=h1)
        loc = affine(h1, p["loc"], p["loc_b"])
        log_var = affine(h1, p["log_var"], p["log_var_b"])
        scale = np.exp(0.5 * log_var)
        z = loc + scale * noise
        h2 = affine(z, p["decoder"], p["decoder_b"])
        np.tanh(h2, out=h2)
        logits = affine(h2, p["logits"], p["logits_b"])
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
        value = (kl - log_prob) / BATCH

        g = {}
        np.negative(logits, out=e)
        np.exp(e, out=e)
        e += 1
        d = np.divide(1, e, out=e)
        d -= x
        d /= BATCH
        g["logits"], g["logits_b"] = h2.T @ d, d.sum(0)
        d = d @ p["logits"].T
        h2 *= h2
        np.subtract(1, h2, out=h2)
        d *= h2
        g["decoder"], g["decoder_b"] = z.T @ d, d.sum(0)
        d = d @ p["decoder"].T
        d_loc = d + loc / BATCH
        d_log_var = 0.5 * (d * noise * scale + (var - 1) / BATCH)
        g["loc"], g["loc_b"] = h1.T @ d_loc, d_loc.sum(0)
        g["log_var"], g["log_var_b"] = h1.T @ d_log_var, d_log_var.sum(0)
        d = d_loc @ p["loc"].T
        d += d_log_var @ p["log_var"].T
        h1 *= h1
        np.subtract(1, h1, out=h1)
        d *= h1
        g["hidden"], g["hidden_b"] = x.T @ d, d.sum(0)
        return value, g

    def step():
        nonlocal taken
        _, grads = gradient(params)
        taken += 1
        c = float(np.sqrt(1 - B2**taken))
        for name, g in grads.items():
            m[name] += (1 - B1) * (g - m[name])
            g *= g
            g -= v[name]
            g *= 1 - B2
            v[name] += g
            np.sqrt(v[name], out=g)
            g += c * EPS
            np.divide(m[name], g, out=g)
            g *= RATE * c / (1 - B1**taken)
            params[name] -= g

    def result():
        value, grads = gradient(start)
        return {"value": value, **grads}

    return step, result


def torch():
    """The step with PyTorch in eager mode, with its fused Adam."""
    import torch
    from torch.nn import functional as F

    start, x, noise = problem()
    x, noise = torch.from_numpy(x), torch.from_numpy(noise)

    def parameters():
        # torch.nn.Linear keeps its weights as (n_out, n_in).
        return {name: torch.from_numpy(p.T.copy()).requires_grad_() for name, p in start.items()}

    def negative_elbo(p):
        h = torch.tanh(F.linear(x, p["hidden"], p["hidden_b"]))
        loc = F.linear(h, p["loc"], p["loc_b"])
        log_var = F.linear(h, p["log_var"], p["log_var_b"])
        z = torch.addcmul(loc, torch.exp(0.5 * log_var), noise)
        h = torch.tanh(F.linear(z, p["decoder"], p["decoder_b"]))
        logits = F.linear(h, p["logits"], p["logits_b"])
        kl = 0.5 * torch.sum(torch.exp(log_var) + loc * loc - 1 - log_var)
        return (kl + F.binary_cross_entropy_with_logits(logits, x, reduction="sum")) / BATCH

    params = parameters()
    optimizer = torch.optim.Adam(params.values(), lr=RATE, betas=(B1, B2), eps=EPS, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        negative_elbo(params).backward()
        optimizer.step()

    def result():
        fresh = parameters()
        value = negative_elbo(fresh)
        value.backward()
        grads = {name: p.grad.numpy().T for name, p in fresh.items()}
        return {"value": value.item(), **grads}

    return step, result
