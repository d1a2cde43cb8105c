r"""Training steps of the Bernoulli VAE 784-200-784 (linear, one layer), batch 24, float32.

One step chooses images, draws their binarisation and the bits b, estimates the gradient of the ELBO
and takes a step of Adam. REINFORCE is the score function without a baseline: Chapter 3's own step.

RELAX (Grathwohl et al., 2018) is Chapter 8's step, and the peers take the same short cuts: with the
coupled noise the second sample is z itself, and the estimate in the encoder's logits a is
$(f(b) - c(z)) (b - \sigma(a)) + (1 - \kappa)\, c'(z)$ with $z = a + \mathrm{logit}\, u$,
$b = 1[z > 0]$ and $\kappa = (1 - e^{-|z|})\, \sigma((2b - 1) a)$. The control variate c(z) is a
scale times the sum of f(sigmoid(z / temperature)) and a network of x - mean and z, 984-200-200-1.
Its parameters follow the gradient of the mean square of the estimate: a gradient through a
gradient. It is not written by hand in NumPy: that is what autodiff is for.

The results are the gradients for given draws, and the mean of f over draws of a framework's own.
"""

from unittest import mock

import numpy as np

from benchmarks import peers

BATCH, PIXELS, LATENTS, HIDDEN, IMAGES = 24, 784, 200, 200, 1000
DRAWS = 60  # batches over which f is averaged in the result
CONTROL_RATE = 10 * peers.RATE
INSIDE = 1e-6  # uniforms are kept that far from 0 and 1


def problem(n):
    """Return (params, images, x, u): flat dict; (IMAGES, PIXELS); n images and uniforms."""
    rng = np.random.default_rng(0)
    weights = lambda *shape: (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
    params = {
        "enc": weights(PIXELS, LATENTS),
        "enc_b": 0.1 * weights(LATENTS),
        "dec": weights(LATENTS, PIXELS),
        "dec_b": 0.1 * weights(PIXELS),
        "prior": weights(LATENTS),
    }
    images = rng.random((IMAGES, PIXELS), dtype=np.float32) ** 4
    x = (rng.random((n, PIXELS)) < images[:n]).astype(np.float32)
    u = rng.uniform(INSIDE, 1 - INSIDE, (n, LATENTS)).astype(np.float32)
    return params, images, x, u


def control_problem():
    """Return the parameters of the control variate: a flat dict."""
    rng = np.random.default_rng(1)
    weights = lambda n, m: (rng.normal(size=(n, m)) * np.sqrt(2 / n)).astype(np.float32)
    first = weights(PIXELS + LATENTS, HIDDEN)
    return {
        "log_temperature": np.full(1, np.log(0.5), np.float32),
        "scale": np.ones(1, np.float32),
        "w_x": first[:PIXELS].copy(),
        "w_z": first[PIXELS:].copy(),
        "b0": np.zeros(HIDDEN, np.float32),
        "w1": weights(HIDDEN, HIDDEN),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": weights(HIDDEN, 1),
        "b2": np.zeros(1, np.float32),
    }


def _mean(images):
    mean = images.mean(0)
    clipped = np.clip(mean, 0.001, 0.999)
    return mean, np.log(clipped / (1 - clipped))


def _result(f, grads, draw):
    """The result of a case: `draw()` returns f (n,) for fresh images and bits."""
    values = np.concatenate([np.asarray(draw()).ravel() for _ in range(DRAWS)])
    # the images of one batch are as good as independent
    spread = np.std(values) / np.sqrt(values.size)
    return {"f": np.ravel(f), **grads, "mean f": np.mean(values), "mean f error": spread}


# ----------------------------------------------------------------------------- in minigrad


def _nested(p):
    layer = lambda name: [[{"w": p[name], "b": p[name + "_b"]}]]
    return {"encoder": layer("enc"), "decoder": {"maps": layer("dec"), "prior": p["prior"]}}


def _flat(p):
    (enc,), (dec,) = p["encoder"][0], p["decoder"]["maps"][0]
    named = {"enc": enc["w"], "enc_b": enc["b"], "dec": dec["w"], "dec_b": dec["b"]}
    return {**named, "prior": p["decoder"]["prior"]}


def _nested_control(c):
    layers = [{"w": c[f"w{layer}"], "b": c[f"b{layer}"]} for layer in (1, 2)]
    network = {"inputs": [c["w_x"], c["w_z"]], "b": c["b0"], "layers": layers}
    return {k: c[k] for k in ("log_temperature", "scale")} | {"networks": [network]}


def _flat_control(c):
    (network,) = c["networks"]
    named = {k: c[k] for k in ("log_temperature", "scale")}
    named |= dict(zip(("w_x", "w_z"), network["inputs"])) | {"b0": network["b"]}
    for i, layer in enumerate(network["layers"], 1):
        named |= {f"w{i}": layer["w"], f"b{i}": layer["b"]}
    return named


def _logit(u):
    return np.log(u) - np.log1p(-u)


def minigrad_reinforce(n=BATCH):
    """The step of Chapter 3."""
    from chapters import ch03_score_function as ch03
    from minigrad.optim import adam

    params, images, x, u = problem(n)
    mean, rng = images.mean(0), np.random.default_rng(2)
    optimizer = adam(peers.RATE, peers.B1, peers.B2, peers.EPS)
    train = ch03.training_step(images, mean, optimizer, n, ch03.no_baseline, k=1)
    params = _nested(params)
    state = {"params": params, "optimizer": optimizer.init(params), "baseline": {}}

    def step():
        nonlocal state
        state, _ = train(state, rng)

    def estimate(f, logits, bits):
        return ch03.score_estimates(f, logits, bits), None

    def draw():
        x = ch03.binarize(images[rng.integers(IMAGES, size=n)], rng)
        return ch03.vae_gradient(params, x, mean, ch03.bernoulli_draws(rng), estimate)[0]

    def result():
        fixed = lambda _l, logits: (logits + _logit(u) > 0).astype(np.float32)
        f, ascent, _ = ch03.vae_gradient(params, x, mean, fixed, estimate)
        return _result(f, {k: -g for k, g in _flat(ascent).items()}, draw)

    return step, result


def minigrad_relax(n=BATCH):
    """The step of Chapter 8."""
    from chapters import ch08_control_variates as ch08
    from minigrad.optim import adam

    params, images, x, u = problem(n)
    params, control = _nested(params), _nested_control(control_problem())
    mean, rng = images.mean(0), np.random.default_rng(2)
    optimizer, control_optimizer = (
        adam(rate, peers.B1, peers.B2, peers.EPS) for rate in (peers.RATE, CONTROL_RATE)
    )
    method = ch08.with_optimizer(ch08.control_variate_gradient, control_optimizer)
    train = ch08.training_step(images, mean, optimizer, n, method)
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "control": {"params": control, "optimizer": control_optimizer.init(control)},
    }

    def step():
        nonlocal state
        state, _ = train(state, rng)

    def draw():
        x = ch08.binarize(images[rng.integers(IMAGES, size=n)], rng)
        return ch08.control_variate_gradient(params, control, x, mean, rng)[0]

    def result():
        with mock.patch.object(ch08, "layer_noise", lambda *_: [_logit(u)[None]]):
            f, ascent, grads = ch08.control_variate_gradient(params, control, x, mean, rng)
        named = {k: -g for k, g in _flat(ascent).items()} | _flat_control(grads)
        return _result(f, named, draw)

    return step, result


# ------------------------------------------------------ in the operations of NumPy's interface


def _log_prob(np, nn, logits, bits):
    return np.sum(bits * logits - nn.softplus(logits), axis=-1)


def _log_joint(np, nn, p, bias, x, b):
    pixels = np.matmul(2 * b - 1, p["dec"]) + p["dec_b"] + bias
    return _log_prob(np, nn, pixels, x) + _log_prob(np, nn, p["prior"], b)


def _logits(np, p, mean, x):
    return np.matmul(x - mean, p["enc"]) + p["enc_b"]


def _surrogate(np, nn, p, mean, bias, x, draw):
    """Minus the mean of log p + f log q at fixed f, whose gradient is the estimate; and f."""
    a = _logits(np, p, mean, x)
    b = draw(nn.stop(a))
    log_p, log_q = _log_joint(np, nn, p, bias, x, b), _log_prob(np, nn, a, b)
    f = nn.stop(log_p - log_q)
    return -np.mean(log_p + f * log_q), f


def _control(np, nn, control, p, mean, bias, x, a, z):
    bits = nn.expit(z * np.exp(-control["log_temperature"]))
    f = _log_joint(np, nn, p, bias, x, bits) - _log_prob(np, nn, a, bits)
    h = np.matmul(x - mean, control["w_x"]) + np.matmul(z, control["w_z"]) + control["b0"]
    h = np.matmul(nn.relu(h), control["w1"]) + control["b1"]
    r = np.matmul(nn.relu(h), control["w2"]) + control["b2"]
    return control["scale"] * (f + r[:, 0])


def _relax(np, nn, p, control, mean, bias, x, u):
    """Return f, the gradients of minus the ELBO and of the estimate's mean square."""
    a, encoder = nn.vjp(lambda q: _logits(np, q, mean, x), {k: p[k] for k in ("enc", "enc_b")})
    z = a + np.log(u) - np.log1p(-u)
    b = nn.floats(z > 0)
    score, kappa = b - nn.expit(a), -np.expm1(-np.abs(z)) * nn.expit((2 * b - 1) * a)

    def minus_log_joint(decoder):
        log_p = _log_joint(np, nn, decoder, bias, x, b)
        return -np.mean(log_p), log_p

    decoder = {k: p[k] for k in ("dec", "dec_b", "prior")}
    log_p, decoder_grads = nn.grad_and_aux(minus_log_joint, decoder)
    f = log_p - _log_prob(np, nn, a, b)

    def mean_square(control):
        c, pullback = nn.vjp(lambda z: _control(np, nn, control, p, mean, bias, x, a, z), z)
        g = (f - c)[:, None] * score + (1 - kappa) * pullback(np.ones_like(f))
        return np.mean(g * g), g

    g, control_grads = nn.grad_and_aux(mean_square, control)
    return f, {**encoder(-g / x.shape[0]), **decoder_grads}, control_grads


class _Jax:
    """What JAX calls otherwise than NumPy."""

    def __init__(self):
        import jax

        self.jax, self.softplus, self.expit, self.relu, self.stop = (
            jax,
            jax.nn.softplus,
            jax.nn.sigmoid,
            jax.nn.relu,
            jax.lax.stop_gradient,
        )

    def floats(self, b):
        return b.astype(np.float32)

    def vjp(self, f, a):
        value, pullback = self.jax.vjp(f, a)
        return value, lambda g: pullback(g)[0]

    def grad_and_aux(self, f, p):
        grads, aux = self.jax.grad(f, has_aux=True)(p)
        return aux, grads


def _jax_draws(images, n):
    import jax
    import jax.numpy as jnp

    images = jnp.asarray(images)

    def draw(key):
        rows, pixels, bits = jax.random.split(key, 3)
        chosen = images[jax.random.randint(rows, (n,), 0, IMAGES)]
        x = (jax.random.uniform(pixels, chosen.shape, jnp.float32) < chosen).astype(jnp.float32)
        return x, jax.random.uniform(bits, (n, LATENTS), jnp.float32, INSIDE, 1 - INSIDE)

    return draw


def jax_reinforce(n=BATCH):
    """JAX, compiled as a whole."""
    import jax
    import jax.numpy as jnp

    params, images, x, u = problem(n)
    mean, bias = _mean(images)
    draws, nn = _jax_draws(images, n), _Jax()
    init, update = peers.jax_adam()

    def gradient(p, x, u):
        bits = lambda a: (u < jax.nn.sigmoid(a)).astype(jnp.float32)
        loss = lambda p: _surrogate(jnp, nn, p, mean, bias, x, bits)
        grads, f = jax.grad(loss, has_aux=True)(p)
        return f, grads

    def train(state):
        params, inner, key = state
        key, now = jax.random.split(key)
        _, grads = gradient(params, *draws(now))
        return *update(grads, inner, params), key

    step, _ = peers.jax_step(train, (params, init(params), jax.random.key(2)))

    def result():
        # b = 1 where u < sigma(a) here, where u > sigma(-a) elsewhere
        f, grads = jax.jit(gradient)(params, x, 1 - u)
        keys = iter(jax.random.split(jax.random.key(3), DRAWS))
        fresh = jax.jit(lambda key: gradient(params, *draws(key))[0])
        return _result(f, grads, lambda: fresh(next(keys)))

    return step, result


def jax_relax(n=BATCH):
    """JAX, compiled as a whole."""
    import jax
    import jax.numpy as jnp

    params, images, x, u = problem(n)
    control = control_problem()
    mean, bias = _mean(images)
    draws, nn = _jax_draws(images, n), _Jax()
    (init, update), (_, update_control) = peers.jax_adam(), peers.jax_adam(CONTROL_RATE)

    def gradient(params, control, x, u):
        return _relax(jnp, nn, params, control, mean, bias, x, u)

    def train(state):
        params, inner, control, control_inner, key = state
        key, now = jax.random.split(key)
        _, grads, control_grads = gradient(params, control, *draws(now))
        moved = update(grads, inner, params)
        return *moved, *update_control(control_grads, control_inner, control), key

    start = params, init(params), control, init(control), jax.random.key(2)
    step, _ = peers.jax_step(train, start)

    def result():
        f, grads, control_grads = jax.jit(gradient)(params, control, x, u)
        keys = iter(jax.random.split(jax.random.key(3), DRAWS))
        fresh = jax.jit(lambda key: gradient(params, control, *draws(key))[0])
        return _result(f, {**grads, **control_grads}, lambda: fresh(next(keys)))

    return step, result


class _Autograd:
    """What autograd calls otherwise than NumPy."""

    def __init__(self):
        import autograd
        import autograd.numpy as anp
        from autograd.core import make_vjp
        from autograd.scipy.special import expit
        from autograd.tracer import getval

        self.expit, self.stop = expit, getval
        self.softplus = lambda a: anp.logaddexp(a, np.float32(0))
        self.relu = lambda a: anp.maximum(a, np.float32(0))
        self.make_vjp, self.value_and_grad = make_vjp, autograd.value_and_grad

    def floats(self, b):
        return b.astype(np.float32)

    def vjp(self, f, a):
        pullback, value = self.make_vjp(f, a)
        return value, pullback

    def grad_and_aux(self, f, p):
        kept = []

        def scalar(p):
            value, aux = f(p)
            kept.append(self.stop(aux))
            return value

        _, grads = self.value_and_grad(scalar)(p)
        return kept[0], grads


def _numpy_draws(images, n):
    rng = np.random.default_rng(2)

    def draw():
        chosen = images[rng.integers(IMAGES, size=n)]
        x = (rng.random(chosen.shape, dtype=np.float32) < chosen).astype(np.float32)
        u = rng.random((n, LATENTS), dtype=np.float32)
        return x, np.clip(u, INSIDE, 1 - INSIDE)

    return draw


def _eager_reinforce(n, gradient):
    """The case of a gradient `(params, x, u) -> (f, grads)` on NumPy arrays, with Adam by hand."""
    params, images, x, u = problem(n)
    draws, update = _numpy_draws(images, n), peers.numpy_adam(params)

    def step():
        update(gradient(params, *draws())[1])

    def result():
        start = problem(n)[0]
        f, grads = gradient(start, x, 1 - u)
        return _result(f, dict(grads), lambda: gradient(start, *draws())[0])

    return step, result


def autograd_reinforce(n=BATCH):
    """HIPS autograd, and Adam by hand."""
    import autograd.numpy as anp

    nn = _Autograd()
    mean, bias = _mean(problem(n)[1])

    def gradient(params, x, u):
        bits = lambda a: (u * (1 + np.exp(-a)) < 1).astype(np.float32)
        return nn.grad_and_aux(lambda p: _surrogate(anp, nn, p, mean, bias, x, bits), params)

    return _eager_reinforce(n, gradient)


def mygrad_reinforce(n=BATCH):
    """MyGrad, without its guards against writing into arrays, and Adam by hand."""
    import mygrad

    mygrad.turn_memory_guarding_off()
    mean, bias = _mean(problem(n)[1])

    class nn:
        softplus = staticmethod(lambda a: mygrad.logaddexp(a, np.float32(0)))
        stop = staticmethod(lambda t: t.data)

    def gradient(params, x, u):
        tensors = {k: mygrad.tensor(p, copy=False) for k, p in params.items()}
        bits = lambda a: (u * (1 + np.exp(-a)) < 1).astype(np.float32)
        loss, f = _surrogate(mygrad, nn, tensors, mean, bias, x, bits)
        loss.backward()
        return f, {k: t.grad for k, t in tensors.items()}

    return _eager_reinforce(n, gradient)


def numpy_reinforce(n=BATCH):
    """By hand, as Chapter 3 derives it."""
    mean, bias = _mean(problem(n)[1])

    def log_prob(logits, bits):
        """log p(bits) summed over the last axis, and bits - p."""
        e = np.exp(-np.abs(logits))
        log_p = np.einsum("...i,...i->...", logits, bits) - np.sum(
            np.log1p(e) + np.maximum(logits, 0), axis=-1
        )
        p = np.where(logits > 0, 1, e) / (1 + e)
        return log_p, bits - p

    def gradient(p, x, u):
        centred = x - mean
        a = centred @ p["enc"]
        a += p["enc_b"]
        b = (u * (1 + np.exp(-a)) < 1).astype(np.float32)
        t = 2 * b - 1
        pixels = t @ p["dec"]
        pixels += p["dec_b"] + bias
        (log_x, dx), (log_b, db) = log_prob(pixels, x), log_prob(p["prior"], b)
        log_q, da = log_prob(a, b)
        f = log_x + log_b - log_q
        da *= (f / -n)[:, None]
        dx /= -n
        return f, {
            "enc": centred.T @ da,
            "enc_b": da.sum(0),
            "dec": t.T @ dx,
            "dec_b": dx.sum(0),
            "prior": db.sum(0) / -n,
        }

    return _eager_reinforce(n, gradient)


def autograd_relax(n=BATCH):
    """HIPS autograd, and Adam by hand."""
    import autograd.numpy as anp

    nn = _Autograd()
    params, images, x, u = problem(n)
    control = control_problem()
    mean, bias = _mean(images)
    draws = _numpy_draws(images, n)
    update, update_control = peers.numpy_adam(params), peers.numpy_adam(control, CONTROL_RATE)

    def step():
        _, grads, control_grads = _relax(anp, nn, params, control, mean, bias, *draws())
        update(grads)
        update_control(control_grads)

    def result():
        start = problem(n)[0], control_problem(), mean, bias
        f, grads, control_grads = _relax(anp, nn, *start, x, u)
        fresh = lambda: _relax(anp, nn, *start, *draws())[0]
        return _result(f, {**grads, **control_grads}, fresh)

    return step, result


# ------------------------------------------------------------------------------- in PyTorch


def _torch_tensors(params):
    import torch

    return {k: torch.from_numpy(p.copy()).requires_grad_() for k, p in params.items()}


def _torch_model(images, n):
    """Return log_joint(p, x, b), log_prob(logits, b), centre(x) and draw()."""
    import torch
    from torch.nn import functional as F

    mean, bias = map(torch.from_numpy, _mean(images))
    images = torch.from_numpy(images)

    def log_prob(logits, bits):
        loss = F.binary_cross_entropy_with_logits
        return -loss(*torch.broadcast_tensors(logits, bits), reduction="none").sum(-1)

    def log_joint(p, x, b):
        pixels = (2 * b - 1) @ p["dec"] + (p["dec_b"] + bias)
        return log_prob(pixels, x) + log_prob(p["prior"], b)

    def draw():
        x = torch.bernoulli(images[torch.randint(IMAGES, (n,))])
        return x, torch.rand(n, LATENTS).clamp_(INSIDE, 1 - INSIDE)

    return log_joint, log_prob, lambda x: x - mean, draw


def _torch_grads(p):
    return {k: a.grad.numpy() for k, a in p.items()}


def torch_reinforce(n=BATCH):
    """PyTorch in eager mode, with its fused Adam."""
    import torch

    params, images, x, u = problem(n)
    log_joint, log_prob, centre, draw = _torch_model(images, n)

    def surrogate(p, x, u):
        a = torch.addmm(p["enc_b"], centre(x), p["enc"])
        b = (u < torch.sigmoid(a.detach())).float()
        log_p, log_q = log_joint(p, x, b), log_prob(a, b)
        f = (log_p - log_q).detach()
        return -torch.mean(log_p + f * log_q), f

    live = _torch_tensors(params)
    step = peers.torch_step(lambda p: surrogate(p, *draw())[0], live)

    def result():
        torch.manual_seed(2)
        fresh = _torch_tensors(params)
        loss, f = surrogate(fresh, *map(torch.from_numpy, (x, 1 - u)))
        loss.backward()
        return _result(f, _torch_grads(fresh), lambda: surrogate(fresh, *draw())[1])

    return peers.torch_fastest("reinforce_step", step), result


def torch_relax(n=BATCH):
    """PyTorch in eager mode, both groups of parameters in one fused Adam."""
    import torch

    params, images, x, u = problem(n)
    control = control_problem()
    log_joint, log_prob, centre, draw = _torch_model(images, n)

    def control_variate(control, p, x, centred, a, z):
        bits = torch.sigmoid(z * torch.exp(-control["log_temperature"]))
        f = log_joint(p, x, bits) - log_prob(a, bits)
        h = torch.addmm(control["b0"], centred, control["w_x"])
        h = torch.addmm(h, z, control["w_z"])
        h = torch.addmm(control["b1"], torch.relu(h), control["w1"])
        r = torch.addmm(control["b2"], torch.relu(h), control["w2"])
        return control["scale"] * (f + r[:, 0])

    def backward(p, control, x, u):
        """Leave all gradients where PyTorch keeps them, and return f."""
        held = {k: p[k].detach() for k in ("dec", "dec_b", "prior")}
        centred = centre(x)
        logits = torch.addmm(p["enc_b"], centred, p["enc"])
        with torch.no_grad():
            a = logits.detach()
            z = a + torch.logit(u)
            b = (z > 0).float()
            score = b - torch.sigmoid(a)
            kappa = -torch.expm1(-z.abs()) * torch.sigmoid((2 * b - 1) * a)
        z.requires_grad_()
        log_p = log_joint(p, x, b)
        (-log_p.mean()).backward()
        f = log_p.detach() - log_prob(a, b)
        c = control_variate(control, held, x, centred, a, z)
        (slope,) = torch.autograd.grad(c.sum(), z, create_graph=True)
        g = (f - c)[:, None] * score + (1 - kappa) * slope
        torch.mean(g * g).backward(inputs=list(control.values()))
        logits.backward(g.detach() / -n)
        return f

    live, live_control = _torch_tensors(params), _torch_tensors(control)
    groups = [
        {"params": list(live.values()), "lr": peers.RATE},
        {"params": list(live_control.values()), "lr": CONTROL_RATE},
    ]
    betas = peers.B1, peers.B2
    optimizer = torch.optim.Adam(groups, betas=betas, eps=peers.EPS, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        backward(live, live_control, *draw())
        optimizer.step()

    def result():
        torch.manual_seed(2)
        fresh = _torch_tensors(params), _torch_tensors(control)
        f = backward(*fresh, *map(torch.from_numpy, (x, u)))
        grads = {k: g.copy() for p in fresh for k, g in _torch_grads(p).items()}
        return _result(f, grads, lambda: backward(*fresh, *draw()))

    return peers.torch_fastest("relax_step", step), result
