# %% [markdown]
# # 11. Autoregressive models
#
# By the chain rule of probability every law of images is a product of conditional laws, one per
# pixel. Let one network compute all of them at once, and the likelihood of an image is exact: no
# latents, no bound. What it takes is a network whose output at a pixel does not see that pixel or
# a later one, and a patient sampler. Then put such a network into the decoder of a variational
# autoencoder. The likelihood gets better, and the latents fall silent: the posterior collapses to
# the prior. This chapter shows when that is the optimum and when an accident of the training,
# measures it, and compares the cures.
#
# **Reads after:** 2, 5, 6, 10 · **Runs in:** 15 s · **Papers:**
# {cite}`oord2016pixel,oord2016conditional,kingma2016improved,gulrajani2017pixelvae`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $B$ | number of data in a batch | () |
# | $D$ | dimension of an event: here the number of pixels | () |
# | $d$ | number of latents of one datum | () |
# | $M$ | number of importance samples in an evaluation | () |
# | $x$ | observation, images of zeros and ones, each in reading order | (B, D) |
# | $x_{<i}$ | the pixels before the $i$-th in reading order: by rows, from left to right | |
# | $z$ | latent variable | (B, d) |
# | $\theta$ | parameters of the generative model: those of the decoder | any |
# | $\phi$ | parameters of the approximate posterior: those of the encoder | any |
# | $p(z)$ | prior, $N(0, I)$ for each image | () |
# | $p_\theta(x)$ | evidence, the marginal likelihood of the data | () |
# | $p_\theta(x \mid z)$ | likelihood, of one image | () |
# | $q_\phi(z \mid x)$ | approximate posterior | () |
# | $q(z)$ | approximate posterior, averaged over the images | () |
# | $\mathcal{L}$ | evidence lower bound (ELBO), in nats | () |
# | $a$ | logits of the pixels | (B, D) |
# | $\sigma(\cdot)$ | logistic function, $\sigma(s) = 1 / (1 + e^{-s})$ | any |
# | $w_l$, $h_l$ | weights and output of layer $l$ of a network | $(F, C, K, L)$, $(B, F, H, W)$ |
# | $R$ | rate, the KL term of the ELBO, averaged over data | (), nats |
# | $V$ | distortion: minus the reconstruction term, averaged over data | (), nats |
# | $I(x; z)$ | mutual information of an image and its latents under $q_\phi(z \mid x)$ | () |
# | $\beta$ | weight of the KL term | () |
# | $\kappa$ | free bits: the rate of one latent that costs nothing | (), nats |
#
# All likelihoods are in nats per image, summed over pixels, averaged over images. An image has $H$
# rows and $W$ columns, $D = HW$; a filter has $K$ rows and $L$ columns of weights, both odd, for
# each of $C$ inputs.

# %% [markdown]
# ## Derivation
#
# ### The likelihood as a product
#
# Number the pixels of an image in reading order. Without any assumption
#
# $$ p(x) = \prod_{i=1}^{D} p(x_i \mid x_{<i}) , \qquad
#    p(x_i = 1 \mid x_{<i}) = \sigma(a_i(x_{<i})) , $$ (eq-ar-chain)
#
# where the second equation says no more than that a law of one bit is one number. The model is the
# function $a$, from images to logits, with one property:
#
# $$ \frac{\partial a_i}{\partial x_j} = 0 \quad \text{for } j \ge i . $$ (eq-ar-causal)
#
# The matrix of derivatives is strictly lower triangular. If it is, $\log p(x)$ is one pass,
#
# $$ \log p(x) = \sum_{i=1}^{D} \big( x_i a_i - \log(1 + e^{a_i}) \big) , $$ (eq-ar-likelihood)
#
# and {eq}`eq-ar-chain` is a probability, whatever the network computes: summed over $x_D$ the last
# factor gives 1, because nothing else contains $x_D$; then the last but one; and so on. Sampling is
# not one pass. Pixel $i$ can be drawn when all before it are there, so it takes $D$ of them.
#
# ### Masked convolutions
#
# A convolution computes each output from a window of inputs. Set those weights to zero that belong
# to pixels at or behind the centre, in reading order. This is mask *A*
# {cite}`oord2016pixel`: the output at $i$ depends on some $x_j$ with $j < i$. In a second layer the
# centre may be used, since it holds a quantity that has not seen $x_i$: mask *B*. One layer of type
# A and any number of type B have the property {eq}`eq-ar-causal`, by induction; so have sums of
# their outputs, and functions applied to each pixel alone. For a window of $K \times L$, of the
# $KL$ weights type A keeps $(KL - 1)/2$ and type B one more: the other half need not be multiplied.
#
# A layer of residual type computes $h + \max(0, w * h + b)$, so that a deep stack is a small change
# of the identity and can be trained. With $*_A$ and $*_B$ for convolutions under the two masks,
# biases $b_l$, one per filter, and $n$ such layers, the model is
#
# $$ \begin{aligned}
#    h_0 &= \max(0, w_0 *_A x + b_0), \qquad
#    h_l = h_{l-1} + \max(0, w_l *_B h_{l-1} + b_l), \\
#    a &= w_{n+2} \max(0, w_{n+1} h_n + b_{n+1}) + b_{n+2} ,
#    \end{aligned} $$ (eq-ar-pixelcnn)
#
# with $l = 1, \dots, n$, and two layers at the end whose windows are single pixels. It is a
# *PixelCNN*.

# %% [markdown]
# ### The blind spot
#
# Which pixels does $a_i$ see? One layer of mask A with a $3 \times 3$ window sees four: three
# above, one to the left. Each further layer adds the window of each pixel that is seen. To the left
# and above, the field grows by one pixel per layer in each direction. To the right it does not: a
# tap that goes right goes up as well, so a pixel $r$ rows above is reached only if it lies at most
# $r$ columns to the right. In general, with windows of half-width $p$, no number of layers reaches
#
# $$ \{ r \text{ rows above, more than } p\, r \text{ columns to the right} \} ,
# $$ (eq-ar-blind-spot)
#
# though all these pixels come before $i$. {numref}`fig-receptive-fields` shows it as zeros of the
# Jacobian. The cure {cite}`oord2016conditional` is to keep two stacks. The *vertical* one sees
# whole windows of the rows above; no mask has to leave anything out on the right, because the
# current row is not in it. The *horizontal* one sees the current row to the left, and receives the
# vertical one. Here masks are not needed at all. A window of the current row and those above is a
# convolution with padding on top and at the sides, not below; moving its result down by one row
# makes it "the rows above". In the same paper the rectifier gives way to a *gate*,
# $\tanh(s) \odot \sigma(t)$, with two convolutions $s$ and $t$. With $v_l$ and $h_l$ for the output
# of the vertical and the horizontal stack, $v_0 = x$:
#
# $$ \begin{aligned}
#    v_l &= \mathrm{gate}(\mathrm{window}(v_{l-1})), \\
#    h_1 &= u * \mathrm{gate}\big( \mathrm{left}(\mathrm{right}(x))
#    + \mathrm{down}(\mathrm{window}(x)) \big), \\
#    h_l &= h_{l-1} + u * \mathrm{gate}\big( \mathrm{left}(h_{l-1})
#    + \mathrm{down}(\mathrm{window}(v_{l-1})) \big), \quad l \ge 2 ,
#    \end{aligned} $$ (eq-ar-gated)
#
# where $u$ is a layer of $1 \times 1$ windows, and so is a part of $\mathrm{down}$, behind the move
# by a row. The window of $\mathrm{left}$ ends at the pixel itself, so the first block differs: it
# takes the image moved by one pixel, $\mathrm{right}(x)$, and does not add $x$. Two layers of
# single pixels make logits of the last $h_l$, as in {eq}`eq-ar-pixelcnn`. (The window of $v$ is
# computed once and used twice.)

# %% [markdown]
# ### Sampling without waste
#
# The first pixel of an image is drawn from biases alone. For the next one a whole pass computes
# every layer at every pixel, and almost all of that is known from the pass before or will never be
# used: when $x_i$ is drawn, what is new are the values of each layer *at* pixel $i$, and they
# depend on values before it, which are stored. So the sampler evaluates each layer at a single
# pixel, $D$ times: together as much work as *one* pass. The images are those of the $D$ whole
# passes, pixel for pixel, for the same uniforms (`minigrad/kernels/pixelcnn.py`).
#
# Given pixels can be kept. A pixel is 1 where $u_i < \sigma(a_i)$ for a uniform $u_i$; with $u_i$
# replaced by 0 or by 1 it is 1 or 0 whatever the network says. Thus a half image is completed.

# %% [markdown]
# ### An autoencoder whose decoder sees pixels
#
# Add latents {cite}`gulrajani2017pixelvae`: let the logits be a sum of what the pixels before
# suggest and what the latents suggest,
#
# $$ p_\theta(x \mid z) = \prod_{i=1}^{D} p_\theta(x_i \mid x_{<i}, z), \qquad
#    a = \mathrm{pixels}(x) + \mathrm{decoder}(z) . $$ (eq-ar-pixelvae)
#
# Nothing changes in the ELBO of Chapter 5. Averaged over the images, it is $-(R + V)$, with the
# rate $R = \mathbb{E}[\mathrm{KL}(q_\phi(z \mid x) \| p(z))]$ and the distortion
# $V = -\mathbb{E}[\log p_\theta(x \mid z)]$. The rate pays for information,
#
# $$ R = I(x; z) + \mathrm{KL}(q(z) \| p(z)) \ge I(x; z) , $$ (eq-ar-rate)
#
# where $q(z)$ is $q_\phi(z \mid x)$ averaged over the images (exercise 3). The latents *collapse*
# if
# $q_\phi(z \mid x) = p(z)$ for all $x$: rate zero, and no latent says anything about its image.
#
# ### Why collapse is an optimum
#
# By Chapter 2 the ELBO is $\log p_\theta(x) - \mathrm{KL}(q_\phi(z \mid x) \| p_\theta(z \mid x))$.
# Suppose that the pixels alone can model the data as well as pixels and latents together: some
# $\theta$ that ignores $z$ has the largest $\mathbb{E}[\log p_\theta(x)]$ of all. For this $\theta$
# the posterior *is* the prior, so $q_\phi(z \mid x) = p(z)$ makes the second term zero, and no
# other pair of model and posterior has a larger ELBO. For another model that is as good and does
# use its latents, the second term is zero only if $q_\phi$ is its exact posterior, which a normal
# law as a rule is not. Every nat by which it is not is lost. So a model that can do without latents
# will {cite}`chen2017variational`. In the words of coding: to send $x$ through $z$ costs
# $\mathrm{KL}(q_\phi(z \mid x) \| p_\theta(z \mid x))$ nats more than to send $x$ itself.
#
# With an imperfect network it depends on what $z$ is good for. And there is a second reason, of
# optimisation: at the start the decoder has not learned to use $z$, the encoder has nothing to say,
# and the rate is the term whose gradient is plain to see. It falls at once, and then the decoder
# has no $z$ to learn from.
#
# ### Cures
#
# - **Warm-up** {cite}`bowman2016generating`: weigh the rate by $\beta$, which rises from 0 to 1
#   over the first part of the training. It helps against the second reason only. The objective at
#   the end is the ELBO, and its optimum is where it was.
# - **Free bits** {cite}`kingma2016improved`: maximise
#   $-V - \sum_j \max(\kappa, R_j)$, where $R_j$ is the rate of latent $j$ averaged over the batch.
#   Below $\kappa$ a latent costs nothing, and no gradient lowers its rate further. What is reported
#   is the true ELBO, which this does not maximise.
# - **A small receptive field**: take from the pixels what the latents shall say. A decoder that
#   sees four neighbours can model strokes, and has to leave the digit to $z$.
# - **A flow in the encoder** (Chapter 10): $q_\phi$ comes closer to the posterior, and using $z$
#   costs less.

# %% [markdown]
# ## By hand
#
# The smallest PixelCNN is a single layer of mask A: each pixel a logistic regression on the window
# before it. With $\delta$ running over the taps of the mask and $x_{i + \delta}$ the pixel at that
# place of the window (0 outside the image),
#
# $$ \begin{aligned}
#    a_i &= c + \sum_\delta w_\delta\, x_{i + \delta}, \\
#    \frac{\partial \log p(x)}{\partial w_\delta} &= \sum_i (x_i - \sigma(a_i))\, x_{i + \delta},
#    \qquad
#    \frac{\partial \log p(x)}{\partial c} = \sum_i (x_i - \sigma(a_i)) .
#    \end{aligned} $$ (eq-ar-by-hand)

# %%
import numpy as np
import pytest
import scipy.special as sc

from chapters import records
from chapters.ledger import claim


def masked_window(x, size):
    """The T pixels before the centre of a window around each pixel: (B, H, W) -> (B, H, W, T)."""
    p, (H, W) = size // 2, x.shape[1:]
    padded = np.pad(x, ((0, 0), (p, p), (p, p)))
    taps = [divmod(t, size) for t in range(size * size // 2)]  # mask A: before the centre
    return np.stack([padded[:, r : r + H, c : c + W] for r, c in taps], axis=-1)


def logistic_log_likelihood(w, c, x):
    """Values (B,) of log p(x) for one layer, and their mean's gradient in w (T,) and c."""
    pixels = masked_window(x, int(np.sqrt(2 * len(w) + 1)))
    a = pixels @ w + c
    value = np.sum(x * a - np.logaddexp(0, a), axis=(1, 2))  # Eq. (eq-ar-likelihood)
    residual = (x - sc.expit(a)) / len(x)
    in_w = np.tensordot(residual, pixels, 3)  # Eq. (eq-ar-by-hand)
    return value, (in_w, np.sum(residual))


# %% [markdown]
# ## With minigrad
#
# `masked_conv2d` is a convolution that skips the taps of its mask, forward and backward. The model
# {eq}`eq-ar-pixelcnn` has all its conventions in one function. (The weights of the blocks start at
# a quarter of He's size, so that the sum over many of them begins moderate.)

# %%
from minigrad import grad, jacobian, nn, random, tree, value_and_grad
from minigrad.kernels import pixelcnn as sampler
from minigrad.optim import adam
from minigrad.special import bernoulli_log_prob, expit


def quarter_he(rng, shape, dtype=np.float32):
    """A quarter of He's initialisation."""
    return np.asarray(0.25 * nn.he_normal(rng, shape, dtype), dtype)


def pixelcnn_init(rng, channels, depth, first=7, kernel=3, dtype=np.float32):
    """Parameters: a layer of type A, `depth` residual blocks of type B, and two 1 x 1 layers."""
    he = nn.he_normal
    block = lambda: nn.conv2d_init(rng, channels, channels, kernel, dtype, quarter_he)
    return {
        "first": nn.conv2d_init(rng, 1, channels, first, dtype, he),
        "blocks": [block() for _ in range(depth)],
        "head": nn.conv2d_init(rng, channels, channels, 1, dtype, he),
        "last": nn.conv2d_init(rng, channels, 1, 1, dtype),
    }


def pixelcnn(params, x):
    """Logits (B, 1, H, W) of the pixels of `x`, each from those before it: Eq. (eq-ar-pixelcnn)."""
    h = np.maximum(nn.masked_conv2d(params["first"], x, "A"), 0)
    for block in params["blocks"]:
        h = h + np.maximum(nn.masked_conv2d(block, h, "B"), 0)
    h = np.maximum(nn.masked_conv2d(params["head"], h, "B"), 0)
    return nn.masked_conv2d(params["last"], h, "B")


def pixel_log_prob(logits, x):
    """log p(x) of binary images given logits of one shape (..., 1, H, W), in nats: (...)."""
    return np.sum(bernoulli_log_prob(logits, x), axis=(-3, -2, -1))  # Eq. (eq-ar-likelihood)


def log_likelihood(params, x, model=pixelcnn):
    """Exact log p(x) of binary images (B, 1, H, W): (B,), in nats."""
    return pixel_log_prob(model(params, x), x)


# %% [markdown]
# The two stacks of {eq}`eq-ar-gated`. `window` pads above and at both sides, `left` on the left
# only, and both cut off what the padding on the other side has added; `shifted` moves by one
# pixel. In the first block the horizontal stack must not see its own pixel, so its input is moved;
# and the block has no input of its width to add to.


# %%
def shifted(x, axis):
    """`x` (B, C, H, W) moved by one pixel along `axis`, zeros coming in."""
    zeros = np.zeros_like(x[:, :, :1] if axis == 2 else x[..., :1])
    kept = x[:, :, :-1] if axis == 2 else x[..., :-1]
    return np.concatenate([zeros, kept], axis=axis)


def window(params, x):
    """Convolution over the current row and those above: (B, F, H, W)."""
    _, _, rows, columns = params["w"].shape
    return nn.conv2d(params, x, padding=(rows - 1, columns // 2))[:, :, : x.shape[2]]


def left(params, x):
    """Convolution over the current pixel and those left of it: (B, F, H, W)."""
    return nn.conv2d(params, x, padding=(0, params["w"].shape[3] - 1))[..., : x.shape[3]]


def gate(x):
    """tanh of the first half of the channels times the logistic function of the second."""
    n = x.shape[1] // 2
    return np.tanh(x[:, :n]) * expit(x[:, n:])


def gated_init(rng, channels, depth, kernel=3, dtype=np.float32):
    """Parameters of `gated_pixelcnn`: `depth` blocks, of which the first sees the image."""
    rows, two = kernel // 2 + 1, 2 * channels
    conv = lambda n_in, n_out, size: nn.conv2d_init(rng, n_in, n_out, size, dtype)
    block = lambda n: {
        "window": conv(n, two, (rows, kernel)),
        "left": conv(n, two, (1, rows)),
        "down": conv(two, two, 1),
        "out": conv(channels, channels, 1),
    }
    return {
        "blocks": [block(1 if l == 0 else channels) for l in range(depth)],
        "head": conv(channels, channels, 1),
        "last": conv(channels, 1, 1),
    }


def gated_pixelcnn(params, x):
    """Logits (B, 1, H, W), each from all pixels before it: Eq. (eq-ar-gated)."""
    v = h = x
    for l, block in enumerate(params["blocks"]):
        tall = window(block["window"], v)
        seen = left(block["left"], h if l else shifted(h, 3))
        step = gate(seen + nn.conv2d(block["down"], shifted(tall, 2)))
        step = nn.conv2d(block["out"], step)
        v, h = gate(tall), h + step if l else step
    return nn.conv2d(params["last"], np.maximum(nn.conv2d(params["head"], h), 0))


# %% [markdown]
# The sampler takes the layers with their masks. A constant added to all logits of a pixel, as
# {eq}`eq-ar-pixelvae` has it, need not be known to it: $u < \sigma(a + o)$ if and only if
# $\sigma(\mathrm{logit}\, u - o) < \sigma(a)$.


# %%
def sampler_layers(params):
    """The layers of a PixelCNN, as `minigrad.kernels.pixelcnn` takes them."""

    def layer(p, kind, **how):
        return sampler.Layer(p["w"], p["b"], nn.causal_mask(kind, p["w"].shape[2:]), **how)

    return [
        layer(params["first"], "A"),
        *(layer(block, "B", residual=True) for block in params["blocks"]),
        layer(params["head"], "B"),
        layer(params["last"], "B", relu=False),
    ]


def sample(params, uniforms, offset=None):
    """Images for `uniforms` (N, 1, H, W); `offset`, of the same shape, is added to the logits."""
    if offset is not None:
        uniforms = sc.expit(sc.logit(uniforms) - offset)
    return sampler.sample(sampler_layers(params), uniforms)[0]


def complete(params, images, known, uniforms):
    """`images` (N, 1, H, W) where `known` (H, W) is True, drawn from the model elsewhere."""
    return sample(params, np.where(known, 1.0 - images, uniforms))


def training_step(objective, optimizer, images, batch):
    """A step of ascent on the mean of `objective(params, x, rng, t)`, for `minigrad.train.fit`.

    The objective returns the value and a dict of what the log shall show. `images` (N, 1, H, W)
    hold probabilities of a one, from which each batch draws fresh bits; `t` counts the steps.
    """

    def negative(params, x, rng, t):
        value, shown = objective(params, x, rng, t)
        return -value, shown

    def step(state, rng):
        x = binarize(images[rng.integers(len(images), size=batch)], rng)
        (_, shown), grads = value_and_grad(negative, has_aux=True)(
            state["params"], x, rng, state["t"]
        )
        params, inner = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": params, "optimizer": inner, "t": state["t"] + 1}, shown

    return step


def likelihood_objective(params, x, _rng, _t, model=pixelcnn):
    """The mean of log p(x), to be maximised: exact, without noise but for the batch."""
    value = np.mean(log_likelihood(params, x, model))
    return value, {"log_likelihood": value}


# %% [markdown]
# ### The autoencoder
#
# The networks $\mathrm{encoder}$ and $\mathrm{decoder}$ are the convolutional ones of Chapter 5. A
# *posterior* is a function from the encoder's parameters, images and noise to three things:
# latents, $\log q_\phi(z \mid x) - \log p(z)$ for each of them, and the rate of each latent. The
# normal law has rates in closed form; the flow of Chapter 10, which can take its place, has the
# terms of its one sample for them.

# %%
from chapters.ch05_vae import conv_decode, conv_encode, conv_vae_init, sample_latent
from minigrad.data import binarize, digits
from minigrad.special import normal_log_prob


def normal_posterior(encoder, x, noise):
    """Latents (..., B, d), log q(z | x) - log p(z) (..., B), and the rate of each latent (B, d)."""
    loc, log_var = conv_encode(encoder, x)
    z = sample_latent(loc, log_var, noise)
    log_ratio = 0.5 * np.sum(z * z - noise * noise - log_var, axis=-1)
    return z, log_ratio, 0.5 * (np.exp(log_var) + loc * loc - 1 - log_var)


def pixelvae_init(rng, size, latents, pixels, capacity=16, depth=1, dtype=np.float32):
    """Parameters of encoder and decoder (Chapter 5), and of the PixelCNN if `pixels`, a dict."""
    params = conv_vae_init(rng, size, capacity, depth, latents, dtype)
    return params | ({"pixels": pixelcnn_init(rng, **pixels, dtype=dtype)} if pixels else {})


def pixelvae_terms(params, x, noise, posterior=normal_posterior):
    """Distortion (B,) with one latent vector per image, and rates (B, d), in nats."""
    z, _, rates = posterior(params["encoder"], x, noise)
    return -pixel_log_prob(from_pixels(params, x) + conv_decode(params["decoder"], z), x), rates


def from_pixels(params, x):
    """What the pixels before contribute to the logits (Eq. (eq-ar-pixelvae)); 0 without them."""
    return pixelcnn(params["pixels"], x) if "pixels" in params else 0.0


def pixelvae_objective(params, x, rng, t, posterior=normal_posterior, warm_up=0, free_bits=0.0):
    r"""$-V - \beta \sum_j \max(\kappa, R_j)$ of a batch; $\beta$ rises over `warm_up` steps."""
    latents = params["encoder"]["loc"]["b"].size
    noise = random.normal(rng, (len(x), latents), x.dtype)
    distortion, rates = pixelvae_terms(params, x, noise, posterior)
    distortion, rate = np.mean(distortion), np.mean(rates, axis=0)
    beta = min(1.0, (t + 1) / warm_up) if warm_up else 1.0
    value = -distortion - beta * np.sum(np.maximum(rate, free_bits))
    return value, {"rate": np.sum(rate), "distortion": distortion}


def log_weights(params, x, noise, posterior=normal_posterior):
    """log p(x, z) - log q(z | x) for `noise` (k, B, d): (k, B). The pixels take a single pass."""
    z, log_ratio, _ = posterior(params["encoder"], x, noise)
    a = from_pixels(params, x) + conv_decode(params["decoder"], z)
    return pixel_log_prob(a, x) - log_ratio


# %% [markdown]
# How much do the latents say? For each latent, its rate; and whether its mean changes with the
# image at all. A latent is called *active* if the variance over images of its posterior mean
# exceeds 0.01 {cite}`burda2016importance`.


# %%
def active_units(params, x, rng, posterior=normal_posterior, samples=20):
    """The number of latents whose posterior mean varies over the images `x`."""
    latents = params["encoder"]["loc"]["b"].size
    z, _, _ = posterior(params["encoder"], x, random.normal(rng, (samples, len(x), latents)))
    means = np.mean(z, axis=0, dtype=np.float64)
    noise = np.mean(np.var(z, axis=0, ddof=1), axis=0) / samples  # what the sampling adds
    return int(np.sum(np.var(means, axis=0, ddof=1) - noise > 0.01))


# %% [markdown]
# ## Checks
#
# ### The gradient by hand, and finite differences


# %%
from minigrad.check import check_grads


def small_images(n, size, seed=0):
    """Random binary images (n, 1, size, size)."""
    return np.random.default_rng(seed).integers(0, 2, (n, 1, size, size)).astype(float)


def small_pixelcnn(seed=0, channels=3, depth=2, first=3, kernel=3):
    """A PixelCNN in float64 with biases that are not zero."""
    rng = np.random.default_rng(seed)
    params = pixelcnn_init(rng, channels, depth, first, kernel, np.float64)
    return tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape), params)


def small_gated(seed=0, channels=3, depth=2):
    """A gated PixelCNN in float64 with biases that are not zero."""
    rng = np.random.default_rng(seed)
    params = gated_init(rng, channels, depth, dtype=np.float64)
    return tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape), params)


MODELS = {"masked": (pixelcnn, small_pixelcnn), "gated": (gated_pixelcnn, small_gated)}


@pytest.mark.parametrize("size", [3, 5])
def test_ar_gradient_by_hand_is_that_of_minigrad(size):
    rng, x = np.random.default_rng(1), small_images(4, 6)
    w, c = rng.standard_normal(size * size // 2), 0.3
    full = np.concatenate([w, np.zeros(size * size - len(w))]).reshape(1, 1, size, size)
    layer = {"w": full, "b": np.array([c])}

    def mean(layer):
        return np.mean(pixel_log_prob(nn.masked_conv2d(layer, x, "A"), x))

    by_hand, (in_w, in_c) = logistic_log_likelihood(w, c, x[:, 0])
    value, gradient = value_and_grad(mean)(layer)
    assert np.mean(by_hand) == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(gradient["w"].ravel()[: len(w)], in_w, rtol=1e-12)
    np.testing.assert_allclose(gradient["b"], in_c, rtol=1e-12)
    assert np.all(gradient["w"].ravel()[len(w) :] == 0)  # what the mask hides has no gradient


@pytest.mark.parametrize("name", MODELS)
def test_ar_derivatives_pass_finite_differences(name):
    model, small = MODELS[name]
    x = np.random.default_rng(2).standard_normal((2, 1, 4, 4))  # any numbers, not only bits
    # Biases so large that no rectifier changes its side within a step: half of them are shut.
    far = lambda p: p + 9.0 * (-1) ** np.arange(len(p)) if p.ndim == 1 and name == "masked" else p
    check_grads(lambda p, x: np.mean(model(p, x) ** 2), (tree.map(far, small()), x), order=2)


# %% [markdown]
# The gated model once more, one pixel at a time: sums over taps as {eq}`eq-ar-gated` has them, with
# neither padding nor shifts.


# %%
def test_ar_gated_model_is_its_equation_pixel_by_pixel():
    params, (H, W) = small_gated(channels=2, depth=3), (4, 5)
    images = np.random.default_rng(6).standard_normal((2, 1, H, W))

    def over_taps(layer, values, row, column):
        """The sum at each pixel; the first tap lies `row`, `column` away from it."""
        w, total = layer["w"], np.zeros((len(layer["b"]), H, W)) + layer["b"][:, None, None]
        for r, c, k, l in np.ndindex(H, W, *w.shape[2:]):
            i, j = r + row + k, c + column + l
            if 0 <= i < H and 0 <= j < W:
                total[:, r, c] += w[:, :, k, l] @ values[:, i, j]
        return total

    def gated(s):
        return np.tanh(s[:2]) / (1 + np.exp(-s[2:]))

    for image, found in zip(images, gated_pixelcnn(params, images)):
        v = h = image
        for l, p in enumerate(params["blocks"]):
            tall = over_taps(p["window"], v, -1, -1)  # the row above, and the pixel's own
            s = over_taps(p["left"], h, 0, -1 if l else -2) + over_taps(p["down"], tall, -1, 0)
            step = over_taps(p["out"], gated(s), 0, 0)
            v, h = gated(tall), h + step if l else step
        h = np.maximum(over_taps(params["head"], h, 0, 0), 0)
        np.testing.assert_allclose(found, over_taps(params["last"], h, 0, 0), rtol=1e-10)


# %% [markdown]
# ### Causality
#
# That the derivatives at and after each pixel vanish is one half of the claim, and a network that
# is constant has it too. The other half is that nothing is lost which the windows could reach.
# Which pixels these are is found without any network: seen pixels are marked, and each layer adds
# the taps of its mask to every marked one.


# %%
def dependence(model, params, x):
    """The Jacobian (D, D) of the logits in the pixels, for one image (1, 1, H, W)."""
    D = x.size
    return jacobian(lambda x: model(params, x).ravel())(x).reshape(D, D)


def reachable(masks, H, W):
    """Boolean (D, D): can logit i see pixel j through layers with these masks?"""
    seen = np.eye(H * W, dtype=bool)
    for mask in masks:
        p, q = mask.shape[0] // 2, mask.shape[1] // 2
        layer = np.zeros_like(seen)
        for i, (r, c) in enumerate(np.ndindex(H, W)):
            for k, l in np.argwhere(mask) - (p, q):
                if 0 <= r + k < H and 0 <= c + l < W:
                    layer[i, (r + k) * W + c + l] = True
        seen = seen @ layer
    return seen


@claim("P1")
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("first, kernel", [(3, 3), (5, 3), (3, 5)])
def test_ar_masked_jacobian_is_triangular_and_full_where_it_may_be(first, kernel, depth, record):
    H, W = 5, 6
    found = np.zeros((H * W, H * W))
    for seed in range(12):  # a rectifier may be shut at one image, not at all of them
        params = small_pixelcnn(seed, channels=8, depth=depth, first=first, kernel=kernel)
        x = np.random.default_rng(seed).standard_normal((1, 1, H, W))
        found = np.maximum(found, np.abs(dependence(pixelcnn, params, x)))
    masks = [nn.causal_mask("A", (first, first))] + depth * [nn.causal_mask("B", (kernel, kernel))]
    allowed = reachable(masks, H, W)
    record(
        f"{first}, {depth} x {kernel}: entries at or after the pixel", np.sum(np.triu(found) > 0)
    )
    record(f"{first}, {depth} x {kernel}: reachable entries that are zero",
           np.sum(found[allowed] == 0))  # fmt: skip
    assert np.all(np.triu(found) == 0)  # exactly
    assert np.all((found > 0) == allowed)


def test_ar_blind_spot_is_where_the_text_says():
    H = W = 7
    for p, kernel in [(1, 3), (2, 5)]:
        masks = [nn.causal_mask("A", (kernel, kernel))] + 9 * [
            nn.causal_mask("B", (kernel, kernel))
        ]
        seen = reachable(masks, H, W)
        for i, (r, c) in enumerate(np.ndindex(H, W)):
            for j, (k, l) in enumerate(np.ndindex(H, W)):
                assert seen[i, j] == (j < i and l - c <= p * (r - k))  # Eq. (eq-ar-blind-spot)


@claim("P1")
def test_ar_gated_jacobian_is_triangular_without_a_blind_spot(record):
    H, W = 5, 5
    params = small_gated(depth=6)
    found = np.abs(dependence(gated_pixelcnn, params, small_images(1, 5)))
    record("gated, 6 blocks: entries at or after the pixel", np.sum(np.triu(found) > 0))
    record("gated: pixels before that are not seen", np.sum(found[np.tril_indices(H * W, -1)] == 0))
    assert np.all(np.triu(found) == 0) and np.all(found[np.tril_indices(H * W, -1)] > 0)


# %% [markdown]
# ### The probabilities add up
#
# There are 512 images of $3 \times 3$ pixels. A model of all of them must have
# total probability 1, for any parameters. In this sum a leak shows at once: see below.


# %%
def every_image(size=3):
    """All binary images of that size: (2^D, 1, size, size)."""
    bits = np.arange(2 ** (size * size))[:, None] >> np.arange(size * size) & 1
    return bits.reshape(-1, 1, size, size).astype(float)


@claim("P3")
@pytest.mark.parametrize("name", MODELS)
def test_ar_probabilities_of_all_images_add_up_to_one(name, record):
    model, small = MODELS[name]
    worst = 0.0
    for seed in range(10):
        log_p = log_likelihood(small(seed), every_image(), model)
        worst = max(worst, abs(np.sum(np.exp(log_p)) - 1))
    record(f"{name}: largest error of the sum over 512 images, 10 models", worst, limit=1e-13)
    assert worst < 1e-13 and np.ptp(log_p) > 1


# %% [markdown]
# ### The sampler
#
# It draws the pixels that $D$ whole passes draw, keeps those that are given, and adds offsets. And
# its images have the probabilities that the model says, by a chi-squared test over all 512.


# %%
def sample_by_whole_passes(model, params, uniforms, offset=0.0):
    """Images for `uniforms` by one pass per pixel."""
    x = np.zeros_like(uniforms)
    for i, j in np.ndindex(uniforms.shape[2:]):
        a = model(params, x) + offset
        x[:, :, i, j] = uniforms[:, :, i, j] < sc.expit(a[:, :, i, j])
    return x


def test_ar_sampler_draws_what_whole_passes_draw():
    rng, params = np.random.default_rng(3), small_pixelcnn(first=5, depth=3)
    u, offset = random.uniform(rng, (10, 1, 6, 5)), rng.standard_normal((10, 1, 6, 5))
    np.testing.assert_array_equal(sample(params, u), sample_by_whole_passes(pixelcnn, params, u))
    drawn = sample_by_whole_passes(pixelcnn, params, u, offset)
    np.testing.assert_array_equal(sample(params, u, offset), drawn)
    known = np.arange(6)[:, None] < np.array([3, 3, 4, 3, 2])
    images = small_images(10, 6)[..., :5]
    done = complete(params, images, known, u)
    np.testing.assert_array_equal(done[..., known], images[..., known])
    again = sample_by_whole_passes(pixelcnn, params, np.where(known, 1 - images, u))
    np.testing.assert_array_equal(done, again)


@pytest.mark.parametrize("name", MODELS)
def test_ar_samples_have_the_probabilities_of_the_model(name):
    from minigrad.check import check_density

    model, small = MODELS[name]
    params, u = small(4), random.uniform(np.random.default_rng(4), (10_000, 1, 3, 3))
    x = sample(params, u) if name == "masked" else sample_by_whole_passes(model, params, u)
    numbers = x.reshape(len(x), 9) @ 2 ** np.arange(9)
    table = log_likelihood(params, every_image(), model)
    check_density(lambda n: table[n], np.arange(512), numbers.astype(int))


# %% [markdown]
# ### The autoencoder's bound
#
# With a single latent the evidence of an image is an integral over one variable, and the ELBO
# another. The bound holds, the gap closes as the posterior is approached, and the average of the
# importance weights is the evidence. Then collapse: for a decoder that ignores its latents the ELBO
# is the log-likelihood minus the rate, for every encoder, so the best encoder says nothing.


# %%
def small_pixelvae(seed=0, latents=1):
    """A PixelVAE in float64 for images of 8 x 8 pixels, and five images."""
    rng = np.random.default_rng(seed)
    pixels = {"channels": 3, "depth": 1, "first": 3}
    params = pixelvae_init(rng, 8, latents, pixels, capacity=4, dtype=np.float64)
    params = tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    return params, rng.integers(0, 2, (5, 1, 8, 8)).astype(float)


def by_quadrature(params, x, n=1501):
    """log p(x) and ELBO of each image, (B,) each, for a single latent."""
    z = np.linspace(-30, 30, n)
    a = from_pixels(params, x) + conv_decode(params["decoder"], z[:, None, None])
    log_joint = pixel_log_prob(a, x) + normal_log_prob(z[:, None], 0.0, 1.0)  # (n, B)
    loc, log_var = conv_encode(params["encoder"], x)
    log_q = normal_log_prob(z[:, None], loc[:, 0], np.exp(0.5 * log_var[:, 0]))
    cell = z[1] - z[0]
    evidence = sc.logsumexp(log_joint, axis=0) + np.log(cell)
    return evidence, cell * np.sum(np.exp(log_q) * (log_joint - log_q), axis=0)


def test_ar_vae_bound_and_weights_agree_with_quadrature():
    from minigrad.check import check_unbiased

    params, x = small_pixelvae()
    x = x[1:3]
    evidence, bound = by_quadrature(params, x)
    assert np.all(bound < evidence - 1e-4)
    nodes, cell = np.linspace(-8, 8, 401, retstep=True)
    terms = [pixelvae_terms(params, x, np.full((2, 1), node)) for node in nodes]
    weights = cell * np.exp(normal_log_prob(nodes, 0.0, 1.0))
    distortion = np.tensordot(weights, [term[0] for term in terms], 1)
    np.testing.assert_allclose(-distortion - terms[0][1][:, 0], bound, rtol=1e-5)
    noise = np.random.default_rng(5).standard_normal((50_000, 2, 1))
    check_unbiased(np.exp(log_weights(params, x, noise) - evidence), np.ones(2))


@claim("P7")
def test_ar_a_decoder_that_ignores_its_latents_makes_collapse_the_optimum(record):
    params, x = small_pixelvae(1)
    deaf = {**params, "decoder": tree.map(np.zeros_like, params["decoder"])}
    evidence, bound = by_quadrature(deaf, x)
    rates = normal_posterior(deaf["encoder"], x, np.zeros((5, 1)))[2][:, 0]
    error = max(
        np.max(np.abs(evidence - log_likelihood(params["pixels"], x))),
        np.max(np.abs(bound - (evidence - rates))),
    )
    record("ELBO = log p(x) - rate if the decoder ignores z: largest error, nats", error, 1e-9)
    assert error < 1e-9 and np.min(rates) > 1e-4
    silent = {**deaf, "encoder": tree.map(np.zeros_like, params["encoder"])}  # q = p(z)
    _, best = by_quadrature(silent, x)
    record("its largest gap where q(z|x) = p(z), nats", np.max(np.abs(best - evidence)), 1e-9)
    assert np.max(np.abs(best - evidence)) < 1e-9
    rng = np.random.default_rng(6)
    assert active_units(silent, np.repeat(x, 20, axis=0), rng) == 0


def test_ar_active_units_are_counted():
    params, x = small_pixelvae(2, latents=3)
    encoder = tree.map(np.zeros_like, params["encoder"])
    encoder["loc"]["b"] = np.array([5.0, 0.0, 0.0])  # not from zero, yet the same for all images
    rng, x = np.random.default_rng(7), np.repeat(x, 40, axis=0)
    assert active_units({**params, "encoder": encoder}, x, rng) == 0
    moved = lambda e, x, noise: (noise + np.mean(x, axis=(1, 2, 3))[:, None] * [3, 0, 3], 0, 0)
    assert active_units(params, x, rng, moved) == 2


def test_ar_free_bits_silence_the_gradient_of_the_rate():
    params, x = small_pixelvae(3)
    gradient = lambda **how: grad(
        lambda p: pixelvae_objective(p, x, np.random.default_rng(8), 0, **how)[0]
    )(params)["encoder"]
    noise = random.normal(np.random.default_rng(8), (5, 1), x.dtype)
    distortion = lambda encoder: (
        -np.mean(pixelvae_terms({**params, "encoder": encoder}, x, noise)[0])
    )
    largest = lambda a, b: max(
        np.max(np.abs(s - t)) for s, t in zip(tree.leaves(a), tree.leaves(b))
    )
    only = grad(distortion)(params["encoder"])
    assert largest(gradient(free_bits=1e3), only) < 1e-12
    assert largest(gradient(free_bits=0.0), only) > 1e-3
    assert largest(gradient(warm_up=10**9), only) < 1e-6  # beta nearly 0


# %% [markdown]
# ### What is trained
#
# The objective is what its formula says, at every stage of the warm-up, with some latents above
# their free bits and some below; all of its derivative reaches the parameters; and a step is one of
# ascent, on fresh bits of images from the whole set.


# %%
def test_ar_objective_is_its_formula_at_every_stage_of_the_warm_up():
    params, x = small_pixelvae(4, latents=3)
    params["encoder"]["log_var"]["b"] = np.array([-1.0, -0.5, 0.0])  # three unlike rates
    noise = random.normal(np.random.default_rng(8), (5, 3), x.dtype)
    distortion, rates = pixelvae_terms(params, x, noise)
    V, R = np.mean(distortion), np.mean(rates, axis=0)
    for kappa in (0.0, np.median(R)):
        charged = sum(max(kappa, r) for r in R)
        for t, warm_up, beta in [(0, 0, 1), (0, 10, 0.1), (4, 10, 0.5), (9, 10, 1), (50, 10, 1)]:
            value, shown = pixelvae_objective(
                params, x, np.random.default_rng(8), t, warm_up=warm_up, free_bits=kappa
            )
            assert value == pytest.approx(-V - beta * charged, rel=1e-12)
            assert shown == {"rate": pytest.approx(sum(R)), "distortion": pytest.approx(V)}
    by_image = np.mean(np.sum(np.maximum(rates, kappa), axis=1))
    on_the_sum = max(3 * kappa, sum(R))
    assert on_the_sum + 1e-3 < charged < by_image - 1e-3  # other readings have other values
    value, shown = likelihood_objective(params["pixels"], x, None, 0)
    assert value == shown["log_likelihood"]
    assert value == pytest.approx(np.mean(log_likelihood(params["pixels"], x)), rel=1e-12)


def test_ar_blocks_start_at_a_quarter_of_he():
    params = pixelcnn_init(np.random.default_rng(0), 32, 2, 7)
    for layer, scale in [(params["first"], 1.0), *((block, 0.25) for block in params["blocks"])]:
        w = layer["w"]
        assert np.std(w) == pytest.approx(scale * np.sqrt(2 / w[0].size), rel=0.1)


def test_ar_all_of_the_objective_reaches_the_parameters():
    params, x = small_pixelvae(5, latents=2)
    objective = lambda params: pixelvae_objective(params, x, np.random.default_rng(8), 0)[0]
    gradient, rng, h = grad(objective)(params), np.random.default_rng(9), 1e-6
    for part in params:  # h is small, lest a rectifier change its side
        way = tree.map(lambda p: h * rng.standard_normal(p.shape), params[part])
        ahead = objective({**params, part: tree.map(np.add, params[part], way)})
        behind = objective({**params, part: tree.map(np.subtract, params[part], way)})
        slope = sum(np.sum(g * v) for g, v in zip(tree.leaves(gradient[part]), tree.leaves(way)))
        assert 2 * slope == pytest.approx(ahead - behind, rel=1e-5)


def test_ar_training_step_ascends_on_fresh_bits_of_all_images():
    images = np.full((40, 1, 3, 3), 0.3)  # six pixels hold the number of the image, three are drawn
    images.reshape(40, 9)[:, :6] = np.arange(40)[:, None] >> np.arange(6) & 1
    seen, steps = [], []

    def objective(params, x, _rng, t):
        seen.append(x.reshape(-1, 9))
        steps.append(t)
        value = np.sum(params["w"] * np.mean(x, axis=0))
        return value, {"value": value}

    optimizer, rng = adam(0.1), np.random.default_rng(10)
    step = training_step(objective, optimizer, images, 20)
    w = {"w": np.zeros((1, 3, 3))}
    inner = optimizer.init(w)
    state = {"params": w, "optimizer": optimizer.init(w), "t": 0}
    for _ in range(40):
        before = state["params"]["w"]
        state, shown = step(state, rng)
        mean = np.mean(seen[-1], axis=0).reshape(1, 3, 3)
        w, inner = optimizer.update({"w": -mean}, inner, w)  # down the slope of the negative
        assert shown["value"] == pytest.approx(np.sum(before * mean), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(state["params"]["w"], w["w"], rtol=1e-12)
    assert steps == list(range(40)) and state["t"] == 40
    bits = np.concatenate(seen)
    assert len(bits) == 800 and set(np.unique(bits)) == {0.0, 1.0}
    assert set(bits[:, :6] @ 2 ** np.arange(6)) == set(range(40))
    assert np.max(np.abs(np.mean(bits[:, 6:], axis=0) - 0.3)) < 4.5 * np.sqrt(0.3 * 0.7 / 800)


# %% [markdown]
# ### Trained
#
# On the digits, in seconds: more than independent pixels can know.


# %%
from chapters.ch05_vae import log_likelihood_without_latents, rows_of
from minigrad.optim import cosine_decay
from minigrad.train import fit


def trained(params, objective, steps, learning_rate=1e-2, batch=32):
    """Parameters after some steps on digits."""
    optimizer = adam(cosine_decay(learning_rate, steps))
    step = training_step(objective, optimizer, digits().x_train, batch)
    state = {"params": params, "optimizer": optimizer.init(params), "t": 0}
    return fit(step, state, steps, np.random.default_rng(0), progress=False)[0]["params"]


@pytest.fixture(scope="module")
def held_out():
    """The test digits, binarised once: (297, 1, 8, 8)."""
    return binarize(digits().x_test, np.random.default_rng(1)).astype(np.float32)


@pytest.mark.parametrize("name, steps", [("masked", 220), ("gated", 100)])
def test_ar_model_beats_independent_pixels_on_digits_in_seconds(name, steps, held_out, record):
    model, init = {"masked": (pixelcnn, pixelcnn_init), "gated": (gated_pixelcnn, gated_init)}[name]
    rng, field = np.random.default_rng(0), {"first": 7} if name == "masked" else {"kernel": 5}
    objective = lambda *batch: likelihood_objective(*batch, model=model)
    params = trained(init(rng, channels=12, depth=2, **field), objective, steps, 2e-2)
    value = np.mean(log_likelihood(params, held_out, model), dtype=np.float64)
    floor = log_likelihood_without_latents(rows_of(digits().x_train), rows_of(held_out))
    record(f"{name}, {steps} steps: test log-likelihood on digits, nats", value, limit=floor)
    assert value > floor + 1.5


def test_ar_autoencoder_beats_independent_pixels_on_digits_in_seconds(held_out, record):
    rng = np.random.default_rng(0)
    params = pixelvae_init(rng, 8, 8, {"channels": 8, "depth": 0, "first": 3}, capacity=8)
    params = trained(params, pixelvae_objective, 100, 2e-2)
    noise = random.normal(rng, (50, len(held_out), 8), np.float32)
    log_w = log_weights(params, held_out, noise)
    floor = log_likelihood_without_latents(rows_of(digits().x_train), rows_of(held_out))
    record("test ELBO on digits, 100 steps, nats", np.mean(log_w), limit=floor)
    assert np.mean(log_w) > floor + 1.5


# %% [markdown]
# ## What goes wrong
#
# ### A pixel that sees itself
#
# The first layer with mask B instead of A: one tap too many. Nothing in the training looks wrong;
# on the contrary, the likelihood becomes better than it can be. The pixel is copied. Two checks
# know: the diagonal of the Jacobian, and the sum over all images, which is not 1 any more. (A mask
# that is one tap too *small* passes both; that nothing is missing is the second half of the check
# of causality.)


# %%
def leaky_pixelcnn(params, x):
    """WRONG on purpose: mask B in the first layer."""
    h = np.maximum(nn.masked_conv2d(params["first"], x, "B"), 0)
    for block in params["blocks"]:
        h = h + np.maximum(nn.masked_conv2d(block, h, "B"), 0)
    h = np.maximum(nn.masked_conv2d(params["head"], h, "B"), 0)
    return nn.masked_conv2d(params["last"], h, "B")


def test_ar_leak_is_rejected_by_jacobian_and_normalisation(record):
    params, x = small_pixelcnn(), small_images(1, 4)
    assert np.any(np.diag(dependence(leaky_pixelcnn, params, x)) != 0)
    totals = [
        np.sum(np.exp(log_likelihood(small_pixelcnn(seed), every_image(), leaky_pixelcnn)))
        for seed in range(10)
    ]
    record(
        "leaky model: sum of p(x) over all images, nearest to 1",
        min(totals, key=lambda t: abs(t - 1)),
    )
    assert min(abs(total - 1) for total in totals) > 1e-3


def test_ar_leak_trains_to_an_impossible_likelihood(held_out, record):
    rng = np.random.default_rng(0)
    objective = lambda *batch: likelihood_objective(*batch, model=leaky_pixelcnn)
    params = trained(pixelcnn_init(rng, 8, 0, 3), objective, 100, 3e-2)
    value = np.mean(log_likelihood(params, held_out, leaky_pixelcnn), dtype=np.float64)
    record("leaky model: 'test log-likelihood' on digits after 100 steps, nats", value)
    assert value > -8  # fresh bits have an entropy of more than that


# %% [markdown]
# ### Two more
#
# - **The gated model without its shift.** If the horizontal stack of the first block takes $x$
#   where it should be moved by a pixel, or the vertical stack comes in without being moved by a
#   row, a pixel sees itself, or what comes after it in its row.
# - **Free bits on the sum.** $\max(\kappa d, \sum_j R_j)$ instead of $\sum_j \max(\kappa, R_j)$:
#   one latent may then take the allowance of all, at no cost, and the others stay silent. Both are
#   in use. They differ in the gradient of a latent that alone has a large rate.


# %%
def test_ar_gated_without_shifts_is_rejected(monkeypatch):
    import sys

    module, params, x = sys.modules[__name__], small_gated(), small_images(1, 4)
    move = shifted
    for axis in (2, 3):  # the row, then the pixel
        wrong = lambda x, a, axis=axis: x if a == axis else move(x, a)
        monkeypatch.setattr(module, "shifted", wrong)
        assert np.any(np.triu(dependence(gated_pixelcnn, params, x)) != 0)
        total = np.sum(np.exp(log_likelihood(params, every_image(), gated_pixelcnn)))
        assert abs(total - 1) > 1e-3


def test_ar_free_bits_on_the_sum_let_one_latent_spend_the_allowance_of_all():
    rates = np.array([1.9, 0.0, 0.0, 0.0])
    each = grad(lambda r: np.sum(np.maximum(r, 0.5)))(rates)
    total = grad(lambda r: np.maximum(np.sum(r), 4 * 0.5))(rates)
    assert each.tolist() == [1, 0, 0, 0] and total.tolist() == [0, 0, 0, 0]


# %% [markdown]
# ## Results
#
# ### A PixelCNN of binarised MNIST
#
# The network has 32 channels and eight blocks, 76,673 parameters in all (half of the weights of a
# window are behind its mask), and was trained for 10,000 steps of 50 images: ten passes over the
# 50,000 training images of the fixed binarisation {cite}`larochelle2011neural`. Its exact test
# log-likelihood, over all 10,000 test images, is $-90.37$ nats (standard error over images: 0.20).
# That is 9 nats below the published PixelCNN, $-81.30$ {cite}`oord2016pixel`, and 7 nats above the
# ELBO of Chapter 5's convolutional autoencoder. (Most of the 7 are the bound's: on 100 test images
# that ELBO misses the log-evidence by 6.6 nats. As models of images the two are about equal.)
#
# Where are the 9 nats? Not in overfitting: in {numref}`fig-pixelcnn-training` held-out images and
# batches of training images agree. Some are in the number of steps, as the curve still rises. The
# samples ({numref}`fig-pixelcnn-samples`) show another cause. The strokes are those of digits, but
# many digits are cut off at the lower edge, or a new one begins there, while in MNIST every digit
# is centred. Our convolutions treat all positions alike. A logit sees nothing but a window, and
# learns where in the image it is only if an edge lies within it. One number more for each
# position, added to its logit, tells it: exercise 5 measures the gain on digits. A bigger run would
# have that, and more time: a reproduction with a network of about this size reports $-81.45$, on
# bits drawn afresh, after 457 passes over the data, not ten
# ([pytorch-generative](https://github.com/EugenHotaj/pytorch-generative)).


# %%
@claim("P2")
def test_ar_pixelcnn_on_binarised_mnist(record):
    run = records.load("pixelcnn_binarized_mnist")
    found, error = (run["scalars"][f"test_log_likelihood{s}"] for s in ("", "_se"))
    record(f"MNIST, {run['config']['steps']:,} steps, 10,000 images: test log-likelihood", found)
    record("MNIST: its standard error", error)
    record("MNIST: published (van den Oord et al., 2016)", -81.30)
    record("MNIST: seconds of training", run["seconds"])
    gaps = records.load("conv_discrete_binarized_mnist")["scalars"]
    vae = gaps["test_elbo"]
    record("MNIST: lead over the ELBO of Chapter 5's convolutional VAE", found - vae)
    gap = gaps["test_gaps_log_evidence"] - gaps["test_gaps_encoder_elbo"]
    record("MNIST: what that ELBO misses of the log-evidence, 100 images", gap)
    assert found > vae + 3 and error < 0.5
    assert found < -78  # none of the published models is that good: it would be a leak
    curve = run["curves"]["held_out_log_likelihood"]["values"]
    assert curve[-1] > curve[0] + 3 and curve[-1] > max(curve) - 0.5


@claim("P2")
def test_ar_pixelcnn_of_the_record_beats_independent_pixels_on_digits(record):
    found = records.load("pixelcnn_digits")["scalars"]
    value, error = found["test_log_likelihood"], found["test_log_likelihood_se"]
    bits = binarize(digits().x_test, np.random.default_rng(20140621))  # those of the run
    floor = log_likelihood_without_latents(rows_of(digits().x_train), rows_of(bits))
    record("digits: test log-likelihood, nats", value)
    record("digits: its standard error", error)
    record("digits: lead over independent pixels, nats", value - floor, limit=3)
    assert value > floor + 3


# %% [markdown]
# ### Collapse
#
# Digits of $8 \times 8$ pixels, a small autoencoder (four channels, eight latents), and a strong
# PixelCNN of 32 channels whose first window, $15 \times 15$, covers all that comes before. Without
# pixels the rate grows to 4.0 nats. With them it falls to 0.0004 nats within a few hundred steps,
# no latent of eight is active, and ELBO and log-evidence agree to 0.01 nats
# ({numref}`fig-collapse`). The collapsed model is the better one: its log-evidence is $-23.00$,
# against $-23.94$ without pixels. A decoder that hears nothing from its latents is not useless,
# though. It still adds a constant to the logit of each pixel, which the PixelCNN alone does not
# have, and with which it gains a nat.
#
# Was it the optimum that collapsed, or the optimiser? Let the pixels see less, all else the same
# ({numref}`fig-fields`). As soon as they see a quarter of the pixels before them, the rate is below
# 0.1 nats. But a decoder that sees so little ends at a log-evidence of $-24.57$, *below* the model
# that sees nothing at all; that one could be had by setting the weights of the pixels to zero. So
# here collapse is not an optimum. It is the second reason: in the first steps the pixels are
# quicker. The latents that could have said something were silent before the decoder listened.
#
# The cures ({numref}`fig-cures`) confirm it. Warm-up, over the first 1,000 of the 2,000 steps,
# needs no other objective at the end, and keeps a rate of 1.5 nats with eight active units, though
# it is still falling when the training ends. Free bits with $\kappa = 0.25$, two nats for eight
# latents, keep 2.4. Behind a window of three by three pixels the rate almost collapses, and then
# comes back: 0.8 at the end, and rising. But the small window loses 1.7 nats of likelihood: as a
# cure it is worse than the disease. (Seven units count as active there, though two latents hold
# 0.71 of the 0.78 nats: a variance of 0.01 costs a latent about 0.005 nats, so the threshold is
# low, and the rates say more.) A flow alone cures nothing. Its posterior could fit better, and has
# nothing to fit: the rate is 0.0005. With free bits it keeps 2.7 nats.
#
# Does the likelihood gain? One run of each cannot say. The flow's model is collapsed like the one
# without, and yet they differ by 0.15 nats, more than twice the standard error over images: the
# start and the batches matter that much. So the pair with and without warm-up was run from three
# starts. All three collapse without it, and with it keep between 1.5 and 2.6 nats. The log-evidence
# rises by 0.24 nats (standard error over starts: 0.02), the ELBO by 0.06 (0.03). The latents are
# worth a quarter of a nat, and most of that the bound loses again, to the distance of the encoder
# from the posterior. That is the price named above, and the reason why it is so easy to do without
# them.

# %%
CURES = {
    "no-pixels": "no pixels",
    "none": "no cure",
    "warm-up": "warm-up",
    "free-bits": "free bits",
    "small-field": "small field",
    "flow": "flow",
    "flow-free-bits": "flow, free bits",
}


def recorded(**setting):
    """The record of an autoencoder of digits with one setting that is not the default."""
    return records.load("_".join(["pixelvae_digits", *(f"{k}={v}" for k, v in setting.items())]))


def cured(cure):
    """The record with that cure."""
    return recorded() if cure == "none" else recorded(cure=cure)


FIELDS = {
    ("no-pixels", 0, 0): {"cure": "no-pixels"},
    ("small-field", 3, 0): {"cure": "small-field"},
}
FIELDS |= {("", first, 1): {"first": first} for first in (3, 5, 7, 9)} | {("", 15, 1): {}}


def share_seen(first, depth, size=8):
    """The share of the earlier pixels that logits see, over the images of that size."""
    if not first:
        return 0.0
    masks = [nn.causal_mask("A", (first, first))] + depth * [nn.causal_mask("B", (3, 3))]
    return np.sum(reachable(masks, size, size)) / np.sum(np.tri(size * size, k=-1))


def paired_gain(run, base, name="log_evidence"):
    """Mean over the same test images of what `run` gains on `base`, and its standard error."""
    gains = run["arrays"][name].astype(np.float64) - base["arrays"][name]
    return np.mean(gains), np.std(gains, ddof=1) / np.sqrt(len(gains))


def test_ar_shares_and_paired_gains_by_hand():
    # Neighbours that lie in an image of 8 x 8: 7 * 7 upper left, 8 * 7 above, ..., of 64 * 63 / 2.
    assert share_seen(0, 0) == 0 and share_seen(15, 1) == 1
    assert share_seen(3, 0) == pytest.approx(2 * (7 * 7 + 8 * 7) / (64 * 63 / 2))
    record_of = lambda *values: {"arrays": {"log_evidence": np.array(values)}}
    gain, error = paired_gain(record_of(1.0, 2.0, 3.0, 6.0), record_of(1.0, 1.0, 1.0, 1.0))
    assert gain == 2 and error == pytest.approx(np.sqrt((4 + 1 + 0 + 9) / 3 / 4))


@claim("P5")
def test_ar_latents_collapse_behind_an_autoregressive_decoder(record):
    run, plain = cured("none"), cured("no-pixels")
    found, curves = run["scalars"], run["curves"]
    after = 20 * len(digits().x_train) // run["config"]["batch"]
    rate, distortion = (
        curve["values"][curve["steps"].index(round(after, -2))]
        for curve in (curves["test_rate"], curves["test_distortion"])
    )
    record("digits: ELBO after 20 epochs, nats", -rate - distortion)
    record("digits: rate after 20 epochs, nats", rate)
    record("digits: ELBO after training, nats", found["elbo"])
    record("digits: log-evidence after training, 1000 importance samples", found["log_evidence"])
    record("digits: rate after training, nats", found["rate"], limit=0.05)
    record("digits: rate without pixels, nats", plain["scalars"]["rate"], limit=2)
    assert found["rate"] < 0.05 < 2 < plain["scalars"]["rate"]
    assert 0 <= found["log_evidence"] - found["elbo"] < 0.05
    gain, error = paired_gain(run, plain)
    record("digits: log-evidence minus that without pixels, nats", gain)
    record("digits: standard error of the difference, nats", error)
    assert gain > 4 * error  # the collapsed model is the better one all the same
    alone = records.load("pixelcnn_digits")["scalars"]["test_log_likelihood"]
    record(
        "digits: log-evidence minus that of the pixels alone, nats", found["log_evidence"] - alone
    )
    assert found["log_evidence"] > alone + 0.5  # the constant that a silent decoder adds


@claim("P7")
def test_ar_active_units_and_rates_agree(record):
    for cure in CURES:
        run = cured(cure)
        rates, active = run["arrays"]["rates"], run["scalars"]["active_units"]
        record(f"{cure}: active units of {len(rates)}", active)
        record(f"{cure}: largest rate of a latent, nats", np.max(rates))
        parts = run["scalars"]["rate"] + run["scalars"]["test_distortion"]
        assert run["scalars"]["rate"] == pytest.approx(np.sum(rates), abs=1e-5)
        assert abs(run["scalars"]["elbo"] + parts) < 0.5  # the distortion is from one sample each
    assert cured("none")["scalars"]["active_units"] == 0
    assert np.max(cured("none")["arrays"]["rates"]) < 0.01
    assert cured("no-pixels")["scalars"]["active_units"] == 8
    assert np.min(cured("no-pixels")["arrays"]["rates"]) > 0.05


@claim("P5")
def test_ar_collapse_of_a_small_field_is_no_optimum(record):
    shares = [share_seen(first, depth) for _, first, depth in FIELDS]
    runs = [recorded(**setting) for setting in FIELDS.values()]
    for share, run in zip(shares, runs):
        record(f"{share:.0%} of the earlier pixels seen: rate, nats", run["scalars"]["rate"])
    rates = [run["scalars"]["rate"] for run in runs]
    assert shares == sorted(shares) and rates[0] > 3 > 1 > rates[1] > 0.5 and max(rates[2:]) < 0.1
    gain, error = paired_gain(runs[0], runs[2])  # nothing seen, against a quarter
    record("nothing seen instead of a quarter: gain in log-evidence, nats", gain)
    record("nothing seen instead of a quarter: its standard error, nats", error)
    assert gain > 4 * error


@claim("P6")
def test_ar_cures_keep_a_rate_and_the_flow_alone_is_none(record):
    base = cured("none")
    for cure in ("warm-up", "free-bits", "small-field", "flow", "flow-free-bits"):
        run = cured(cure)
        record(f"{cure}: rate, nats", run["scalars"]["rate"])
        record(f"{cure}: distortion, nats", run["scalars"]["test_distortion"])
        record(f"{cure}: ELBO, nats", run["scalars"]["elbo"])
        gain, error = paired_gain(run, base)
        record(f"{cure}: log-evidence minus that without a cure, nats", gain)
        record(f"{cure}: standard error of the difference over images, nats", error)
    rate = {cure: cured(cure)["scalars"]["rate"] for cure in CURES}
    assert min(rate["warm-up"], rate["free-bits"], rate["flow-free-bits"]) > 1
    assert rate["small-field"] > 0.5 and rate["flow"] < 0.05
    assert paired_gain(cured("small-field"), base)[0] < -1


@claim("P6")
def test_ar_warm_up_gains_likelihood_over_three_starts(record):
    gains = {"elbo": [], "log_evidence": []}
    for more in ({}, {"seed": 1}, {"seed": 2}):
        warm, cold = recorded(cure="warm-up", **more), recorded(**more)
        assert cold["scalars"]["rate"] < 0.05 < 1 < warm["scalars"]["rate"]
        for name, values in gains.items():
            values.append(paired_gain(warm, cold, name)[0])
    for name, values in gains.items():
        mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(3)
        record(f"warm-up, three starts: gain in {name}, nats", mean)
        record(f"warm-up: standard error of the gain in {name} over starts, nats", error)
    assert min(gains["log_evidence"]) > 0


# %% [markdown]
# ### A flow in the encoder, and the likelihood
#
# Where the latents are in use, a better posterior pays. The pairs of Chapter 10 (plain decoder,
# digits, the same start, images and noise, with and without eight inverse autoregressive steps)
# show whether the likelihood itself rises. It takes two readings of the estimate $\hat L_M$ of
# Chapter 6, since that rises with a better $q$ even when the model stays as it is. At
# $M = 1{,}000$ the flow gains 0.24 nats over all test images (standard error over five pairs:
# 0.03). On 50 of them it gains 0.25 at $M = 1{,}000$ and 0.24 at $M = 10{,}000$ (both 0.04). A gain
# that was the bound's alone would shrink. The model got better.


# %%
@claim("N3")
def test_ar_flow_in_the_encoder_raises_the_marginal_likelihood(record):
    run = records.load("flow_vae_digits")
    few, models = run["config"]["test_images_10000"], range(run["config"]["models"])
    record("steps of the flow", run["config"]["flow_steps"])
    record("pairs of models on digits", len(models))
    for M, images in ((1000, run["config"]["test_images"]), (1000, few), (10_000, few)):
        flow, plain = (
            np.array([np.mean(run["arrays"][f"{kind}_{i}_{M}"][:images]) for i in models])
            for kind in ("flow", "plain")
        )
        gain, error = np.mean(flow - plain), np.std(flow - plain, ddof=1) / np.sqrt(len(models))
        record(f"M = {M:,}, {images} images: paired gain in log-likelihood, nats", gain)
        record(f"M = {M:,}, {images} images: its standard error over pairs", error)
        assert gain > 4 * error and gain > 0.1


# %% [markdown]
# ### A PixelVAE of binarised MNIST
#
# Three autoencoders with 20 latents, 7,000 steps of 50 images, seed 0: a decoder that sees the
# latents alone (87 s), one whose PixelCNN of 16 channels and four blocks sees a part of the
# earlier pixels too (1,124 s), and the same with the flow and 0.5 free bits (913 s; the machine was
# less busy). On 200 random test images, with 1,000 importance samples, the log-evidence is
# $-98.9$, $-89.1$ and $-88.3$ nats (1.3 to 1.6 over images; by pairs, the pixels gain 9.8 nats, the
# flow and the free bits 0.84 more, with a standard error of 0.15). The rates are 27.2, 6.0 and 12.1
# nats. Nothing has collapsed here: windows that reach seven pixels leave something for the latents
# to say. But the latents of the second model say a fifth of what they said alone.
#
# **To go on from here.** A gated PixelCNN that sees the latents in every layer: the published
# PixelVAE, without a flow, has $-79.0$ nats {cite}`gulrajani2017pixelvae`. All its parts are in
# this chapter and the last. The questions that remain are those of this section. How much rate does
# the best model use? And who decides it, the objective or the first thousand steps?


# %%
@claim("P6")
def test_ar_pixelvae_on_binarised_mnist(record):
    names = {"no-pixels": "_cure=no-pixels", "none": "", "flow-free-bits": "_cure=flow-free-bits"}
    runs = {cure: records.load(f"pixelvae_binarized_mnist{end}") for cure, end in names.items()}
    for cure, run in runs.items():
        for name in ("rate", "active_units", "elbo", "log_evidence", "log_evidence_se"):
            record(f"binarised MNIST, {cure}: {name}", run["scalars"][name])
    rate = {cure: run["scalars"]["rate"] for cure, run in runs.items()}
    assert 5 < rate["none"] < 0.25 * rate["no-pixels"] and rate["flow-free-bits"] > 10
    for better, worse in (("none", "no-pixels"), ("flow-free-bits", "none")):
        gain, error = paired_gain(runs[better], runs[worse])
        record(f"binarised MNIST, {better} over {worse}: gain in log-evidence, nats", gain)
        record(f"binarised MNIST, {better} over {worse}: its standard error, nats", error)
        assert gain > 4 * error


# %% [markdown]
# ## Figures
#
# First what a logit sees. Then the model trained on binarised MNIST: its likelihood over the
# training ({numref}`fig-pixelcnn-training`), and what it draws ({numref}`fig-pixelcnn-samples`).

# %%
from chapters.style import COLOUR


def figure_receptive_fields():
    """Which pixels the logit at the cross depends on: a stack of masks, and two stacks.

    Absolute derivative of the logit in each pixel, averaged over 40 random networks and images of
    11 x 11 pixels, in units of its largest value, on a logarithmic scale; white is exactly zero.
    All pixels above the line come before the cross in reading order. With masks (3 x 3 windows) the
    upper right is never seen.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    size, place = 11, (7, 5)
    fig, axes = plt.subplots(1, 4, figsize=(6.4, 2.1), layout="constrained")
    cases = [("masked", 1), ("masked", 3), ("masked", 6), ("gated", 6)]
    for ax, (name, depth) in zip(axes, cases):
        model, small = MODELS[name]
        total = np.zeros((size, size))
        for seed in range(40):
            x = np.random.default_rng(seed).standard_normal((1, 1, size, size))
            params = small(seed, channels=6, depth=depth)
            logit = lambda x, model=model, params=params: model(params, x)[0, 0][place]
            total += np.abs(grad(logit)(x)[0, 0])
        image = ax.imshow(
            np.where(total > 0, total / total.max(), np.nan), cmap="viridis_r",
            norm=LogNorm(1e-4, 1),
        )  # fmt: skip
        ax.plot(place[1], place[0], "x", color="C3", markersize=5)
        edge = [(-0.5, 7.5), (4.5, 7.5), (4.5, 6.5), (10.5, 6.5)]
        ax.plot(*zip(*edge), color="0.3", linewidth=0.8)
        ax.set(title=f"{name}, {depth} block{'s' if depth > 1 else ''}", xticks=[], yticks=[])
    fig.colorbar(image, ax=axes, shrink=0.7)
    return fig


# %%
def figure_pixelcnn_training():
    """Log-likelihood of held-out images of binarised MNIST while the PixelCNN trains.

    Larochelle's fixed binarisation; the held-out images are 1,000 random test images. Horizontal
    lines: published results on the same binarisation (van den Oord et al., 2016).
    """
    import matplotlib.pyplot as plt

    run = records.load("pixelcnn_binarized_mnist")
    fig, ax = plt.subplots(figsize=(5.0, 2.8))
    curve, train = run["curves"]["held_out_log_likelihood"], run["curves"]["log_likelihood"]
    ax.plot(train["steps"], train["values"], color=COLOUR["numeric"], lw=0.6, alpha=0.7,
            label="batches of training images")  # fmt: skip
    ax.plot(curve["steps"], curve["values"], "o-", ms=3, color="C0", label="held-out images")
    ax.axhline(-81.30, color=COLOUR["exact"], lw=0.8)
    ax.annotate("PixelCNN, published: −81.30", (1, -81.2), (curve["steps"][-1], -81.0), ha="right")
    ax.axhline(-79.20, color=COLOUR["exact"], lw=0.8, ls="--")
    ax.annotate("PixelRNN, published: −79.20", (1, -79), (curve["steps"][-1], -78.9), ha="right")
    ax.set(xlabel="steps", ylabel="log-likelihood, nats", ylim=(-100, -77))
    ax.legend(loc="lower right", fontsize=7)
    return fig


# %%
def unpacked(run, name):
    """Images (n, H, W) from the bits of a record."""
    bits = run["arrays"][name]
    return np.unpackbits(bits, axis=-1)[:, 0, :, : bits.shape[2]].astype(float)


def tile(images, columns):
    """Images (n, H, W) side by side, a line of pixels between them."""
    n, H, W = images.shape
    padded = np.pad(images, ((0, 0), (0, 1), (0, 1)), constant_values=0.5)
    rows = padded.reshape(n // columns, columns, H + 1, W + 1).swapaxes(1, 2)
    return rows.reshape(n // columns * (H + 1), -1)[:-1, :-1]


def test_ar_images_are_unpacked_and_laid_side_by_side():
    images = small_images(6, 5)
    run = {"arrays": {"drawn": np.packbits(images.astype(bool), axis=-1)}}
    np.testing.assert_array_equal(unpacked(run, "drawn"), images[:, 0])
    laid = tile(images[:, 0], 3)
    assert laid.shape == (11, 17)
    for n in range(6):
        r, c = divmod(n, 3)
        np.testing.assert_array_equal(laid[6 * r :, 6 * c :][:5, :5], images[n, 0])


def figure_pixelcnn_samples():
    """Samples of the PixelCNN (left), and lower halves drawn for given upper halves (right).

    Trained on binarised MNIST. On the right, the first image of each row is from the test set; in
    the others the upper half is given, the lower one drawn.
    """
    import matplotlib.pyplot as plt

    run = records.load("pixelcnn_binarized_mnist")
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.2), layout="constrained")
    originals, drawn = unpacked(run, "originals")[:, None], unpacked(run, "completions")
    drawn = drawn.reshape(8, 8, *drawn.shape[1:])[:, :7]
    rows = np.concatenate([originals, drawn], axis=1)
    for ax, images in zip(axes, (unpacked(run, "samples"), rows.reshape(64, *rows.shape[2:]))):
        ax.imshow(1 - tile(images, 8), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
    axes[0].set(title="samples")
    axes[1].set(title="completions")
    return fig


# %% [markdown]
# Then the autoencoders: rate and distortion while they train ({numref}`fig-collapse`), the rate
# against how much the pixels see ({numref}`fig-fields`), and where the cures end
# ({numref}`fig-cures`).


# %%
LOOKS = {  # colour, marker
    "no-pixels": (COLOUR["exact"], "x"),
    "none": ("C2", "o"),
    "warm-up": ("C0", "^"),
    "free-bits": ("C1", "s"),
    "small-field": ("C3", "v"),
    "flow": (COLOUR["numeric"], "D"),
    "flow-free-bits": ("C5", "P"),
}


def figure_collapse():
    """Rate and distortion over the training of autoencoders on digits, by cure.

    Eight latents, test digits. The sum of the two is minus the ELBO. Without a cure the rate falls
    to zero within a few hundred steps and stays there. The dashed model sees no pixels.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.0))
    for cure, label in CURES.items():
        curves = cured(cure)["curves"]
        for ax, part in zip(axes, ("test_rate", "test_distortion")):
            ax.plot(curves[part]["steps"], curves[part]["values"], color=LOOKS[cure][0],
                    linestyle="--" if cure == "no-pixels" else "-", label=label)  # fmt: skip
    axes[0].set(xlabel="steps", ylabel="rate, nats")
    axes[1].set(xlabel="steps", ylabel="distortion, nats", ylim=(18, 30))
    axes[1].legend(fontsize=7, ncols=2)
    return fig


# %%
def figure_fields():
    """Rate (left) and likelihood (right) of autoencoders against what their pixels see.

    Digits, after 2,000 steps each. Abscissa: the share of the pixels before it that the logit of a
    pixel sees, averaged over pixels; 0 is an ordinary VAE. The gap between the two curves on the
    right is the divergence of encoder and posterior.
    """
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.8))
    shares = [share_seen(first, depth) for _, first, depth in FIELDS]
    found = [recorded(**setting)["scalars"] for setting in FIELDS.values()]
    left.plot(shares, [f["rate"] for f in found], "o-", color=COLOUR["vae"])
    left.set(xlabel="share of earlier pixels seen", ylabel="rate, nats")
    for name, key, marker in (("log-evidence", "log_evidence", "o-"), ("ELBO", "elbo", "s--")):
        right.plot(shares, [f[key] for f in found], marker, label=name,
                   color=COLOUR["exact" if key == "log_evidence" else "vae"])  # fmt: skip
    right.set(xlabel="share of earlier pixels seen", ylabel="nats")
    right.legend()
    return fig


# %%
def figure_cures():
    """Where the cures end: gain in log-evidence against rate (left), and rates by latent (right).

    Digits, eight latents; the gain is over the collapsed model, on the same test images, with two
    standard errors; 1,000 importance samples per image. Latents are sorted by rate.
    """
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0))
    base = cured("none")
    for cure, label in CURES.items():
        run, (colour, marker) = cured(cure), LOOKS[cure]
        gain, error = paired_gain(run, base)
        left.errorbar(run["scalars"]["rate"], gain, 2 * error, fmt=marker, color=colour)
        rates = np.sort(run["arrays"]["rates"])[::-1]
        right.plot(np.arange(1, 9), rates, "-", marker=marker, color=colour, lw=0.8, label=label)
    left.axhline(0, color=COLOUR["numeric"], lw=0.6)
    left.set(xlabel="rate, nats", ylabel="gain in log-evidence, nats")
    right.set(xlabel="latent", ylabel="rate, nats", ylim=(-0.03, 1.0))
    right.legend(fontsize=7, ncols=2)
    return fig


# %% [markdown]
# ## Exercises
#
# **1. Any order.** Does {eq}`eq-ar-chain` need the reading order? Train the same network on images
# turned by 90 degrees: is it the same family of laws? For which model would the order not matter?
#
# ```{admonition} Solution
# :class: dropdown
#
# The chain rule holds in any order, and with conditionals that can be anything every order gives
# every law. A network is restricted, and so are the laws: those of the turned model are the turned
# laws of the first, which as a rule are not in its family. The order does not matter for laws that
# each order can express, such as independent pixels.
# ```


# %% tags=["hide-cell"]
def test_ar_exercise_1_turned_models_are_normalised_and_different():
    params, images = small_pixelcnn(5), every_image()
    turned = np.rot90(images, axes=(2, 3))
    p, q = (np.exp(log_likelihood(params, x)) for x in (images, turned))
    assert np.sum(p) == pytest.approx(1) == np.sum(q)  # both are laws on the 512 images
    assert np.sum(np.abs(p - q)) > 0.05


# %% [markdown]
# **2. How many multiplications?** A network of $n$ layers of $C$ channels and $K \times K$ windows
# with masks, on an image of $D$ pixels. How many multiplications take $D$ whole passes, how many
# the sampler of this chapter? What would remain to be gained by drawing many images at once?
#
# ```{admonition} Solution
# :class: dropdown
#
# A whole pass takes about $D \cdot n\, C^2 K^2 / 2$, as the masks leave half of the taps; $D$
# passes take $D$ times that. The sampler evaluates each layer once per pixel, which is one pass in
# all: the factor is $D$, 784 for MNIST. Within an image nothing can be computed at the same time,
# layer after layer and pixel after pixel; many images turn the products of a vector with a matrix
# into products of matrices.
# ```


# %% tags=["hide-cell"]
def test_ar_exercise_2_taps_of_masks():
    for K in (3, 5, 7):
        assert nn.causal_mask("A", (K, K)).sum() == (K * K - 1) // 2
        assert nn.causal_mask("B", (K, K)).sum() == (K * K + 1) // 2


# %% [markdown]
# **3. What the rate pays for.** Show {eq}`eq-ar-rate`. When is the rate equal to the information?
#
# ```{admonition} Solution
# :class: dropdown
#
# $R = \mathbb{E}_x \mathbb{E}_{q_\phi(z \mid x)}\big[ \log \frac{q_\phi(z \mid x)}{q(z)} + \log
# \frac{q(z)}{p(z)} \big]$. The first part is the mutual information of $x$ and $z$ under
# $p_{\mathrm{data}}(x)\, q_\phi(z \mid x)$. In the second only the law of $z$ counts, which is
# $q(z)$: it is $\mathrm{KL}(q(z) \| p(z))$. Equality where the averaged posterior is the prior.
# ```


# %% tags=["hide-cell"]
def test_ar_exercise_3_rate_is_information_plus_divergence():
    rng = np.random.default_rng(9)
    data = rng.dirichlet(np.ones(6))
    given, prior = rng.dirichlet(np.ones(4), size=6), rng.dirichlet(np.ones(4))
    averaged = data @ given
    rate = data @ np.sum(given * np.log(given / prior), axis=1)
    joint = data[:, None] * given
    information = np.sum(joint * np.log(joint / (data[:, None] * averaged)))
    divergence = np.sum(averaged * np.log(averaged / prior))
    assert rate == pytest.approx(information + divergence, rel=1e-12)
    assert information > 0.1 < divergence


# %% [markdown]
# **4. Two bits.** Data: two bits that are always equal, each value with probability 1/2. The
# decoder is autoregressive and can be any law. Write down two models with the largest possible
# log-likelihood, one that ignores its single latent bit and one that does not. What are their rates
# and their ELBOs, with the exact posterior and with the best encoder that flips the latent with
# probability 0.1?
#
# ```{admonition} Solution
# :class: dropdown
#
# The largest log-likelihood is $-\log 2$. Ignoring: $x_1$ is a fair coin, $x_2 = x_1$; posterior =
# prior, rate 0, ELBO $-\log 2$. Using: $z$ is a fair coin, $x_1 = x_2 = z$ with probability
# $1 - \epsilon$; for $\epsilon \to 0$ the posterior is a point, the rate $\log 2$, the distortion
# 0, the ELBO $-\log 2$ again. The two are equally good, as long as the encoder is exact. If it
# flips, the decoder of the second has to allow for it: with $\epsilon = 0.1$ the distortion is the
# entropy of the flip, 0.325, the rate $\log 2 - 0.325$, and the ELBO is again $-\log 2$. The
# channel is used less, and nothing is lost, because the posterior of *this* model is the flipping
# encoder. What loses is an encoder that is not the posterior of its decoder: with $\epsilon = 0.01$
# the divergence
# $0.9 \log \frac{0.9}{0.99} + 0.1 \log \frac{0.1}{0.01} = 0.144$.
# ```


# %% tags=["hide-cell"]
def test_ar_exercise_4_two_bits():
    def elbo(flip, epsilon):
        """Encoder that flips with probability `flip`, decoder with `epsilon`: x_1 = x_2 given z."""
        rate = np.log(2) + sc.xlogy(flip, flip) + sc.xlogy(1 - flip, 1 - flip)
        distortion = -(sc.xlogy(1 - flip, 1 - epsilon) + sc.xlogy(flip, epsilon))
        return -rate - distortion, rate, distortion

    for epsilon in (0.5, 0.1):  # 0.5 ignores the latent
        bound, rate, _ = elbo(epsilon, epsilon)
        assert bound == pytest.approx(-np.log(2))
        assert rate == pytest.approx(np.log(2) - 0.325, abs=1e-3) or rate == pytest.approx(0)
    assert elbo(0.0, 0.0)[0] == pytest.approx(-np.log(2))
    assert -np.log(2) - elbo(0.1, 0.01)[0] == pytest.approx(0.144, abs=1e-3)


# %% [markdown]
# **5. Where am I?** Add to {eq}`eq-ar-pixelcnn` one number for each position: $a_i + e_i$ with
# parameters $e \in \mathbb{R}^{D}$. Is it still autoregressive, and what becomes of the sampler?
# Why could the model not learn this before? Train both on digits.
#
# ```{admonition} Solution
# :class: dropdown
#
# $e_i$ depends on no pixel, so {eq}`eq-ar-causal` holds as before. The sampler of this chapter
# takes $e$ as its offset. Before, two pixels with the same window had the same logit, wherever they
# are, unless the window reaches beyond the image (there the later layers see zeros in the place of
# hidden units, which blank pixels need not have); yet in the middle of an image of a digit ones are
# far more frequent than at its sides. After 100 steps on digits the numbers are worth more than
# half a nat.
# ```


# %% tags=["hide-cell"]
def placed_pixelcnn(params, x):
    """A PixelCNN with a number for each position."""
    return pixelcnn(params["network"], x) + params["places"]


def test_ar_exercise_5_numbers_for_positions_help(held_out, record):
    network = pixelcnn_init(np.random.default_rng(0), 12, 1, 7)
    plain = trained(network, likelihood_objective, 100, 2e-2)
    placed = {"network": network, "places": np.zeros((1, 8, 8), np.float32)}
    objective = lambda *batch: likelihood_objective(*batch, model=placed_pixelcnn)
    placed = trained(placed, objective, 100, 2e-2)
    values = log_likelihood(placed, held_out, placed_pixelcnn)
    gains = (values - log_likelihood(plain, held_out)).astype(np.float64)
    record("a number for each position, 100 steps on digits: gain, nats", np.mean(gains))
    assert np.mean(gains) > 0.5 and np.mean(gains) > 5 * np.std(gains) / np.sqrt(len(gains))
    x = held_out[:1].astype(float)
    double = tree.map(lambda p: p.astype(float), placed)
    assert np.all(np.triu(dependence(placed_pixelcnn, double, x)) == 0)
    u = random.uniform(np.random.default_rng(1), (5, 1, 8, 8))
    offset = np.broadcast_to(placed["places"], u.shape)
    np.testing.assert_array_equal(
        sample(placed["network"], u, offset), sample_by_whole_passes(placed_pixelcnn, placed, u)
    )
