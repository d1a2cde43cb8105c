# %% [markdown]
# # 13. Vector quantisation
#
# The latents of an image need not be numbers with a density. Let the encoder point at a place in
# space, replace the place by the nearest of $K$ stored vectors, and let the decoder see the stored
# vector: the latents are then a handful of symbols from an alphabet. That is the VQ-VAE. Chapters 3
# and 7 to 9 went to great lengths to differentiate through discrete variables; here the encoder is
# deterministic, nothing is estimated, and the gradient that one would like to have is zero. What is
# put in its place is a convention. This chapter says what the convention is and what it is not,
# which term of the loss moves which parameter, why the encoder runs away without a leash, why codes
# die, what the symbols cost once a prior over them has been learned, and why these latents do not
# collapse behind a decoder that could do without them.
#
# **Reads after:** 2, 5, 7, 11 · **Runs in:** 10 s · **Papers:**
# {cite}`oord2017neural,bengio2013estimating,dhariwal2020jukebox,lloyd1982least`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $B$ | number of data in a batch | () |
# | $K$ | number of components, categories or codes: here codes | () |
# | $D$ | dimension of an event: here of a code | () |
# | $N$ | number of latents of one image, the places of a grid $h \times w$ | () |
# | $x$ | observation, images of zeros and ones | (B, 1, H, W) |
# | $z$ | latent variable: for each place the number of a code | (B, h, w) |
# | $k$ | number of a code, from 1 to $K$ (in Python from 0) | () |
# | $e_k$ | code, a row of the codebook | (D,) |
# | $z_e$ | output of the encoder, one vector for each place | (B, h, w, D) |
# | $z_q$ | for each place the code nearest to $z_e$ | (B, h, w, D) |
# | $\theta$ | parameters of the generative model: of the decoder | any |
# | $\phi$ | parameters of the approximate posterior: of the encoder | any |
# | $p(z)$ | prior, of the numbers of all places together | () |
# | $p_\theta(x \mid z)$ | likelihood, of one image | () |
# | $p_\theta(x)$ | evidence, the marginal likelihood of the data | () |
# | $q_\phi(z \mid x)$ | approximate posterior | () |
# | $\mathcal{L}$ | evidence lower bound (ELBO), in nats | () |
# | $a$ | logits of the pixels | (B, 1, H, W) |
# | $\ell(z_q)$ | $-\log p_\theta(x \mid z)$ as a function of what the decoder receives | () |
# | $g$ | gradient of $\ell$ in $z_q$, at $z_q$ | as $z_q$ |
# | $\mathrm{sg}$ | stop-gradient: the value of its argument, as a constant | |
# | $\beta$ | weight of the commitment term | () |
# | $\gamma$ | decay of the moving averages | () |
# | $n_k$, $s_k$ | rows of $z_e$ in a batch whose code is $k$: their number, their sum | (); (D,) |
# | $\bar n_k$, $\bar s_k$ | moving averages of $n_k$ and $s_k$ | (); (D,) |
# | $\bar p_k$ | frequency of code $k$ over places and images | () |
#
# All likelihoods are in nats per image, summed over pixels, averaged over images.

# %% [markdown]
# ## Derivation
#
# ### Codes
#
# The encoder maps an image to a grid of $N$ vectors $z_e$. Each is replaced by the nearest code,
#
# $$ z = \operatorname*{argmin}_{k} \| z_e - e_k \| , \qquad z_q = e_z ,
# $$ (eq-vq-nearest)
#
# at every place by itself, with one codebook for all {cite}`oord2017neural`. The decoder turns the
# grid $z_q$ into the logits of the pixels. As a model this is familiar: the latent $z$ is a grid of
# $N$ categorical variables, $p_\theta(x \mid z)$ a decoder with an embedding in front. What is
# special is the posterior, which puts all its mass on one grid of numbers:
#
# $$ q_\phi(z \mid x) = \prod_{n=1}^{N} \mathbf{1}\Big[ z_n
#    = \operatorname*{argmin}_{k} \| z_{e,n} - e_k \| \Big] . $$ (eq-vq-posterior)
#
# Its entropy is 0, so against the uniform prior the rate is a constant, whatever the parameters,
#
# $$ \mathrm{KL}(q_\phi(z \mid x) \,\|\, p) = -\log p(z) = N \log K , $$ (eq-vq-rate)
#
# and the ELBO, which needs no sampling, is
#
# $$ \log p_\theta(x) \ge \mathcal{L} = \log p_\theta(x \mid z) + \log p(z)
#    = \log p_\theta(x \mid z) - N \log K , $$ (eq-vq-bound)
#
# where only the last step asks for the uniform prior. The first part holds for every prior over
# grids, and is no more than leaving out, in $p_\theta(x) = \sum_z p(z)\, p_\theta(x \mid z)$, all
# summands but one. So the gap is $-\log p_\theta(z \mid x)$. The codes need not even be a good
# choice: the nearest code need not be the one with the largest summand (exercise 1).
#
# ### The gradient is zero
#
# The set of all $z_e$ with one and the same nearest code is its *Voronoi cell*, a polyhedron
# ({numref}`fig-voronoi`). Inside a cell $z_q$ does not move. So
#
# $$ \nabla_{z_e}\, \ell(z_q(z_e)) = 0 \quad \text{almost everywhere,} $$ (eq-vq-zero)
#
# and on the borders, where $\ell$ jumps, there is no derivative. The exact gradient of the
# reconstruction in $\phi$ is zero too. Nor can the score function help: nothing is random.
#
# ### Straight-through
#
# Chapter 7 met the way out for bits: use the hard value forward, and pretend backward that it was
# the soft one {cite}`bengio2013estimating`. Here the decoder's gradient $g$ at $z_q$ is handed to
# $z_e$ as if $z_q$ were $z_e$,
#
# $$ \frac{\partial z_q}{\partial z_e} := I , \qquad \text{in code} \quad
#    \mathrm{sg}(z_q) + \big( z_e - \mathrm{sg}(z_e) \big) . $$ (eq-vq-straight-through)
#
# The value of the expression on the right is exactly $z_q$; its derivative in $z_e$ is the
# identity; and in the codebook it is zero, which is part of the convention: truly
# $\partial z_q / \partial e_z = I$.
#
# What sense does it make? Only the crossing of a border changes anything, and the convention sends
# $z_e$ across borders with a purpose:
#
# ```{prf:theorem} Where straight-through leads
# :label: thm-vq-crossing
#
# Let $g$ be the gradient of $\ell$ at the code of the cell in which $z_e$ starts, and let $z_e$
# move along $-g$. Whenever it passes from the cell of $e_i$ into the cell of $e_j$,
# $g^\top (e_j - e_i) < 0$. So with each crossing the linearised loss, $\ell$ replaced by its
# tangent at the first code, becomes smaller.
# ```
#
# *Proof.* Let $z_e(s) = z_e - s g$. The difference $\|z_e(s) - e_i\|^2 - \|z_e(s) - e_j\|^2$ is
# linear in $s$ with slope $-2 g^\top (e_j - e_i)$, and at the crossing it goes from negative to
# positive. $\square$
#
# This is all that holds in general. The tangent is a good guide to the next code only if codes lie
# close together, so that $\ell$ is nearly linear between neighbours. And in general the convention
# is not the gradient of anything: it is a field that is constant on each cell, and around a closed
# path its integral need not vanish (exercise 2). It is no smoothing of the staircase
# $\ell(z_q(z_e))$ either ({numref}`fig-slope-of-a-staircase`).

# %% [markdown]
# ### The loss
#
# Straight-through trains decoder and encoder. The codebook has no gradient yet. It gets a term of
# its own, which pulls the codes to the outputs of the encoder; and the encoder gets one that keeps
# its outputs near the codes, the *commitment*:
#
# $$ - \log p_\theta(x \mid z) + \sum_{n} \| \mathrm{sg}(z_{e}) - z_{q} \|^2
#    + \beta \sum_{n} \| z_{e} - \mathrm{sg}(z_{q}) \|^2 . $$ (eq-vq-loss)
#
# The sums run over the $N$ places. The two squares have the same value and differ in what is held
# fixed. Term by term,
#
# | gradient of | in decoder | in encoder | in codebook |
# |---|---|---|---|
# | $-\log p_\theta(x \mid z)$ | its own | $g$, straight-through | 0 |
# | codebook term | 0 | 0 | $2 \sum (e_k - z_e)$ |
# | commitment term | 0 | $2 \beta (z_e - z_q)$ | 0 |
#
# where the sum for code $k$ runs over the rows that chose it, and each zero is a test below. The
# loss is not minus a bound: the two squares are tools.
#
# ### The codebook is k-means
#
# With the assignments held fixed, the codebook term is a sum of squared distances, and its minimum
# puts every code at the mean of its rows. Assign, average, repeat: that is Lloyd's algorithm
# {cite}`lloyd1982least`, run on a cloud that moves. Instead of following the gradient, one can keep
# moving averages of number and sum of each code's rows, and take their quotient:
#
# $$ \bar n_k \leftarrow \gamma \bar n_k + (1 - \gamma)\, n_k , \quad
#    \bar s_k \leftarrow \gamma \bar s_k + (1 - \gamma)\, s_k , \quad
#    e_k = \bar s_k / \bar n_k . $$ (eq-vq-average)
#
# With the new $\bar n_k$ this is
#
# $$ e_k \leftarrow e_k - \frac{1 - \gamma}{\bar n_k} (n_k e_k - s_k) ,
# $$ (eq-vq-average-step)
#
# half the gradient of the codebook term, summed over the batch, with a step size for each code that
# shrinks with its use (exercise 3). A code that nobody uses stays where it is, without a division
# of zero by zero.
#
# ### Commitment
#
# Why is the commitment term there? Let a batch consist of two data with $\ell = \frac12 (z_q \mp
# 1)^2$, and let there be one code. The code goes to the middle, 0, and stays. Each of the two $z_e$
# receives $g = \mp 1$, at every step, as far as it may have gone: straight-through does not see
# that $z_e$ has moved. So both run away at constant speed, and nothing is gained. With more codes
# the same happens in every unbounded cell, to each $z_e$ whose path along $-g$ stays in it. The
# commitment term gives each $z_e$ a place to rest,
#
# $$ g + 2 \beta (z_e - z_q) = 0 \quad \Longrightarrow \quad z_e = z_q - \frac{g}{2 \beta} ,
# $$ (eq-vq-rest)
#
# on the side of its code to which the decoder would like to go. {numref}`fig-commitment` shows both
# in training.

# %% [markdown]
# ### Dead codes
#
# The codebook term moves the codes that are used. A code whose cell contains no $z_e$ has gradient
# zero and stays away for good, unless the cloud comes to it: it is *dead*. How much of the alphabet
# is in use is measured by the *perplexity*,
#
# $$ \exp\Big( - \sum_{k=1}^{K} \bar p_k \log \bar p_k \Big) , $$ (eq-vq-perplexity)
#
# 1 if a single code does everything, $K$ if all are equally frequent. Two cures are in use: start
# the codebook at outputs of the encoder, instead of a small cube around 0 as in published code; and
# *revive* each code that, on average, fewer than one row of a batch chooses, by putting it on a
# random row of the batch {cite}`dhariwal2020jukebox`. {numref}`fig-dead-codes` compares. On the
# digits revival is what counts; in the end neither the start nor averages in the place of the
# gradient make a large difference. And a code that lives need not be of use: half of the alphabet
# reconstructs these small images as well as most of it. Perplexity measures how much of the channel
# is open, not what passes through it.
#
# ### A prior over the codes
#
# The uniform prior was good for training: it made the rate a constant. As a model of grids it is
# poor, and nothing ties us to it. After the training the numbers $z$ of the training images are
# data like any other. A PixelCNN (Chapter 11) whose pixels take $K$ values instead of two,
#
# $$ p(z) = \prod_{n=1}^{N} p(z_n \mid z_{<n}) , \qquad
#    p(z_n = k \mid z_{<n}) = \operatorname{softmax}(a_n)_k , $$ (eq-vq-prior)
#
# with $K$ logits $a_n$ at place $n$ instead of the one logit of a pixel, is fitted to them by
# maximum likelihood, which maximises the bound {eq}`eq-vq-bound` in the prior. To sample an image,
# sample a grid, and decode it. The gain over the uniform prior has two parts. A prior of
# independent places, all with the frequencies $\bar p_k$, costs $N$ times the logarithm of the
# perplexity (exercise 4); what the PixelCNN gains beyond that is dependence, and position.
#
# ### Why these latents do not collapse
#
# Chapter 11 put a PixelCNN into the decoder of a VAE, and the rate went to zero: each nat of it had
# to be paid for, and the pixels could do without. Here the rate is $N \log K$ whether the codes say
# something or not. Within the training nothing is saved by saying nothing, and whatever the codes
# do say lowers the loss. That is the whole mechanism, and it has a price. It is not that the bound
# got better: that a model which can do without latents has the larger ELBO is as true as it was.
# Codes are informative because the objective does not charge for them.
#
# So the rate cannot show whether codes are used; it is constant. What can: let the images of a test
# set exchange their latents at random, and measure how much $-\log p_\theta(x \mid z)$ rises
# ({numref}`fig-vq-collapse`).

# %% [markdown]
# ## By hand
#
# The smallest VQ-VAE has a linear encoder and a linear decoder on flat images $x$ (B, HW):
# $z_e = x W + b$ with $W$ (HW, ND), cut into $N$ vectors, and $a = z_q U + c$ with $U$ (ND, HW) and
# $z_q$ flat again. Then $g = (\sigma(a) - x)\, U^\top$ with the logistic function $\sigma$, and the
# table above is the whole gradient.

# %%
import sys

import numpy as np
import pytest
import scipy.special as sc

from chapters import records
from chapters.ledger import claim
from minigrad.kernels.vq import code_sums, nearest


def loss_gradient_by_hand(params, x, D, beta):
    """Gradient of Eq. (eq-vq-loss), averaged over flat images `x` (B, pixels), like `params`."""
    B, codebook = len(x), params["codebook"]
    encoder, decoder = params["encoder"], params["decoder"]
    z_e = (x @ encoder["w"] + encoder["b"]).reshape(B, -1, D)
    k = nearest(z_e.reshape(-1, D), codebook)  # Eq. (eq-vq-nearest)
    z_q = codebook[k].reshape(z_e.shape)
    flat = z_q.reshape(B, -1)
    in_a = (sc.expit(flat @ decoder["w"] + decoder["b"]) - x) / B
    g = (in_a @ decoder["w"].T).reshape(z_e.shape)
    in_z_e = (g + 2 * beta * (z_e - z_q) / B).reshape(B, -1)  # straight-through, commitment
    n, sums = code_sums(k, z_e.reshape(-1, D), len(codebook))
    return {
        "encoder": {"w": x.T @ in_z_e, "b": np.sum(in_z_e, axis=0)},
        "decoder": {"w": flat.T @ in_a, "b": np.sum(in_a, axis=0)},
        "codebook": 2 * (n[:, None] * codebook - sums) / B,
    }


# %% [markdown]
# `nearest` never forms the table of all distances: $\|z_e - e_k\|^2 = \|z_e\|^2 - 2 (z_e^\top e_k -
# \frac12 \|e_k\|^2)$, and the nearest code has the largest bracket. `code_sums` counts and adds the
# rows of each code (`minigrad/kernels/vq.py`).
#
# ## With minigrad
#
# Two functions are the whole of vector quantisation. The first chooses, and what it returns as
# $z_q$ has a derivative in the codebook and none in $z_e$. The second is
# {eq}`eq-vq-straight-through`.

# %%
from minigrad import grad, nn, random, stop_gradient, tree, value_and_grad


def quantise(codebook, z_e):
    """Numbers (...) of the codes nearest to `z_e` (..., D), and these codes (..., D)."""
    rows = np.reshape(stop_gradient(z_e), (-1, z_e.shape[-1]))
    k = nearest(rows, stop_gradient(codebook)).reshape(z_e.shape[:-1])  # Eq. (eq-vq-nearest)
    return k, nn.embedding({"w": codebook}, k)


def straight_through(z_e, z_q):
    """The value of `z_q`, whose cotangent goes to `z_e` instead: Eq. (eq-vq-straight-through)."""
    return stop_gradient(z_q) + (z_e - stop_gradient(z_e))


# %% [markdown]
# The networks are those of Chapter 5 without their dense layers, so that the latents keep their
# places: a strided convolution, residual blocks, a $1 \times 1$ convolution to $D$ channels; and
# back. Where `params` hold a PixelCNN under `"pixels"`, its logits are added (Chapter 11).

# %%
from chapters.ch05_vae import residual_blocks
from chapters.ch11_autoregressive import from_pixels, pixel_log_prob, pixelcnn, quarter_he
from minigrad.nn import conv2d, conv2d_init, conv2d_transpose, conv2d_transpose_init


def grid_vae_init(rng, size, stride, capacity, depth, n_out, D, dtype=np.float32):
    """Encoder to `n_out` numbers and decoder from D numbers at each place of a grid."""
    blocks = lambda: [conv2d_init(rng, capacity, capacity, 3, dtype) for _ in range(depth)]
    encoder = {
        "input": conv2d_init(rng, 1, capacity, 2 * stride - 1, dtype),
        "blocks": blocks(),
        "output": conv2d_init(rng, capacity, n_out, 1, dtype),
    }
    decoder = {
        "input": conv2d_init(rng, D, capacity, 1, dtype),
        "blocks": blocks(),
        "output": conv2d_transpose_init(rng, capacity, 1, stride, dtype),
        "pixels": np.zeros((1, size, size), dtype),
    }
    return {"encoder": encoder, "decoder": decoder}


# %%
def grid_encode(encoder, x):
    """What the encoder says at each place, (B, h, w, n_out), of images (B, 1, H, W)."""
    kernel = encoder["input"]["w"].shape[-1]
    h = conv2d(encoder["input"], x, stride=(kernel + 1) // 2, padding=kernel // 2)
    h = residual_blocks(encoder["blocks"], h)
    return np.transpose(conv2d(encoder["output"], h), (0, 2, 3, 1))


def grid_decode(decoder, z):
    """Logits (B, 1, H, W) of the pixels for latents `z` (B, h, w, D)."""
    h = conv2d(decoder["input"], np.transpose(z, (0, 3, 1, 2)))
    h = residual_blocks(decoder["blocks"], h)
    a = conv2d_transpose(decoder["output"], h, stride=decoder["output"]["w"].shape[2])
    return a + decoder["pixels"]


def log_lik(params, z, x):
    """log p(x | z) of images of zeros and ones, in nats: (B,)."""
    return pixel_log_prob(grid_decode(params["decoder"], z) + from_pixels(params, x), x)


# %% [markdown]
# The loss, with its terms apart. What it needs of a model is `encode(params["encoder"], x)` and
# `log_lik(params, z_q, x)`. In code the numbers $z$ of the codes are called `k`, to keep them apart
# from the vectors.


# %%
def vq_terms(params, x, encode=grid_encode, log_lik=log_lik):
    """log p(x | z) and the two squares of Eq. (eq-vq-loss), (B,) each; and `z_e` and k."""
    z_e = encode(params["encoder"], x)
    k, e = quantise(params["codebook"], z_e)
    places = tuple(range(1, len(z_e.shape)))
    reconstruction = log_lik(params, straight_through(z_e, e), x)
    codebook = np.sum((stop_gradient(z_e) - e) ** 2, axis=places)
    commitment = np.sum((z_e - stop_gradient(e)) ** 2, axis=places)
    return (reconstruction, codebook, commitment), stop_gradient((z_e, k))


def vq_loss(params, x, beta=0.25, **model):
    """The loss of Eq. (eq-vq-loss), averaged over images; and `z_e` and the numbers k."""
    (reconstruction, codebook, commitment), found = vq_terms(params, x, **model)
    return np.mean(codebook + beta * commitment - reconstruction), found


def codes_of(params, x):
    """Numbers (B, h, w) of the codes of images."""
    return quantise(params["codebook"], grid_encode(params["encoder"], x))[0]


# %% [markdown]
# What else moves the codebook: averages, and revival.


# %%
def moving_average(codebook, counts, k, z_e, decay=0.99):
    """Codebook and counts after one batch: Eq. (eq-vq-average-step)."""
    n, sums = code_sums(k.ravel(), z_e.reshape(k.size, -1), len(codebook))
    counts = decay * counts + (1 - decay) * n
    step = (1 - decay) / np.maximum(counts, 1e-12)  # where n = 0 the bracket is 0
    moved = codebook + step[:, None] * (sums - n[:, None] * codebook)
    return moved.astype(codebook.dtype), counts


def revive(codebook, counts, z_e, rng, least=1.0):
    """Codes that fewer than `least` rows of a batch choose become random rows of `z_e`."""
    dead = counts < least
    rows = z_e.reshape(-1, z_e.shape[-1])
    rows = rows[rng.integers(len(rows), size=len(codebook))]
    return np.where(dead[:, None], rows, codebook), np.where(dead, least, counts)


def perplexity(k, K):
    """Exponential of the entropy of the frequencies of K codes: Eq. (eq-vq-perplexity)."""
    p = np.bincount(k.ravel(), minlength=K) / k.size
    return np.exp(-np.sum(sc.xlogy(p, p)))


def codebook_from(encoder, x, K, rng):
    """K random outputs of the encoder for images `x`, as codes (K, D)."""
    z_e = grid_encode(encoder, x)
    rows = z_e.reshape(-1, z_e.shape[-1])
    return rows[rng.choice(len(rows), K, replace=False)]


def uniform_codebook(rng, K, D, dtype=np.float32):
    """K codes (K, D) from a small cube, U(-1/K, 1/K) in each coordinate."""
    return rng.uniform(-1 / K, 1 / K, (K, D)).astype(dtype)


# %% [markdown]
# A step of training. The gradient is taken of everything; if averages move the codebook, they
# replace what its gradient did.

# %%
from minigrad.data import binarize


def vq_start(params, optimizer):
    """State of a training."""
    counts = np.ones(len(params["codebook"]))
    return {"params": params, "optimizer": optimizer.init(params), "counts": counts}


def vq_step(optimizer, images, batch, beta=0.25, averages=False, revived=False):
    """A step of training, for `fit`; the codebook follows its gradient, or moving averages.

    Only where averages move the codebook can codes be revived.
    """
    gradient = value_and_grad(lambda p, x: vq_loss(p, x, beta), has_aux=True)

    def step(state, rng):
        x = binarize(images[rng.integers(len(images), size=batch)], rng)
        (loss, (z_e, k)), grads = gradient(state["params"], x)
        params, inner = optimizer.update(grads, state["optimizer"], state["params"])
        codebook = state["params"]["codebook"]
        moved, counts = moving_average(codebook, state["counts"], k, z_e)
        if averages:
            if revived:
                moved, counts = revive(moved, counts, z_e, rng)
            params = params | {"codebook": moved}
        size = np.sqrt(np.mean(z_e**2) * z_e.shape[-1])
        shown = {"loss": loss, "size": size, "perplexity": perplexity(k, len(codebook))}
        return {"params": params, "optimizer": inner, "counts": counts}, shown

    return step


# %% [markdown]
# The prior {eq}`eq-vq-prior` is `pixelcnn` of Chapter 11 as it stands: it does not mind how many
# channels come in and go out. In come $K$ channels, of which one is 1 at each place; out come $K$
# logits. The first layer has mask A, which hides all channels of the place itself. A grid is drawn
# by $N$ whole passes, which at these sizes is quick enough.

# %%
from minigrad.special import log_softmax


def code_prior_init(rng, K, channels, depth, first=3, dtype=np.float32):
    """Parameters of a PixelCNN over grids of codes: K channels in, K logits out."""
    conv = lambda n_in, n_out, size: nn.conv2d_init(rng, n_in, n_out, size, dtype, nn.he_normal)
    block = lambda: nn.conv2d_init(rng, channels, channels, 3, dtype, quarter_he)
    return {
        "first": conv(K, channels, first),
        "blocks": [block() for _ in range(depth)],
        "head": conv(channels, channels, 1),
        "last": nn.conv2d_init(rng, channels, K, 1, dtype),
    }


def one_hot(k, params):
    """(B, K, h, w) of zeros and ones for grids of codes (B, h, w)."""
    K, dtype = len(params["last"]["b"]), params["last"]["b"].dtype
    return np.moveaxis(np.eye(K, dtype=dtype)[k], -1, 1)


def code_log_prob(params, k):
    """log p of grids of codes (B, h, w), in nats: (B,). Eq. (eq-vq-prior)."""
    x = one_hot(k, params)
    return np.sum(x * log_softmax(pixelcnn(params, x), axis=1), axis=(1, 2, 3))


def sample_codes(params, rng, n, shape):
    """n grids of codes (n, h, w), place by place in reading order."""
    k = np.zeros((n, *shape), int)
    for i, j in np.ndindex(*shape):
        logits = pixelcnn(params, one_hot(k, params))[:, :, i, j]
        k[:, i, j] = np.argmax(logits + random.gumbel(rng, logits.shape), axis=1)
    return k


# %% [markdown]
# For the comparison of collapse: normal latents in the place of codes, same networks, same
# decoder; and what it costs to exchange latents between images.

# %%
from chapters.ch05_vae import kl_to_prior, sample_latent


def gaussian_terms(params, x, noise):
    """log p(x | z) and KL of each image for normal latents in place of codes, and the latents."""
    said = grid_encode(params["encoder"], x)
    loc, log_var = said[..., : noise.shape[-1]], said[..., noise.shape[-1] :]
    z = sample_latent(loc, log_var, noise)
    kl = np.sum(kl_to_prior(loc, log_var), axis=(1, 2))
    return log_lik(params, z, x), kl, stop_gradient(z)


def cost_of_permuting(params, z, x, rng):
    """Mean fall of log p(x | z), in nats, when images exchange their latents at random."""
    return np.mean(log_lik(params, z, x) - log_lik(params, rng.permutation(z), x))


# %% [markdown]
# ## Checks
#
# ### By hand, and by differences
#
# The gradient by hand is that of `vq_loss`, for a linear model. Finite differences agree with it
# where they should: in the decoder for the reconstruction, in the codebook for the codebook term,
# in the encoder for the commitment term. They disagree for the reconstruction in the codebook, on
# which it truly depends while the convention says no; and in the encoder, where they measure the
# true gradient, which is the next check.


# %%
from chapters.ch05_vae import log_likelihood_without_latents, rows_of
from chapters.ch11_autoregressive import pixelcnn_init
from minigrad import jacobian, vjp
from minigrad.check import check_density, check_grads
from minigrad.data import digits
from minigrad.optim import adam, cosine_decay, sgd
from minigrad.special import bernoulli_log_prob
from minigrad.train import fit


def small_images(seed=0, n=6, size=8):
    """Random binary images (n, 1, size, size)."""
    return np.random.default_rng(seed).integers(0, 2, (n, 1, size, size)).astype(float)


def linear_model(seed=0, pixels=12, N=3, D=2, K=4):
    """A linear VQ-VAE on flat images, in float64: parameters, images, functions."""
    rng = np.random.default_rng(seed)
    layer = lambda n_in, n_out: {
        "w": 0.5 * rng.standard_normal((n_in, n_out)),
        "b": 0.2 * rng.standard_normal(n_out),
    }
    params = {"encoder": layer(pixels, N * D), "decoder": layer(N * D, pixels)}
    params["codebook"] = rng.standard_normal((K, D))
    x = rng.integers(0, 2, (7, pixels)).astype(float)

    def log_lik(params, z, x):
        a = nn.dense(params["decoder"], np.reshape(z, (len(x), -1)))
        return np.sum(bernoulli_log_prob(a, x), axis=-1)

    encode = lambda encoder, x: np.reshape(nn.dense(encoder, x), (len(x), N, D))
    return params, x, {"encode": encode, "log_lik": log_lik}


def largest_gap(a, b):
    """Largest absolute difference of two containers of arrays."""
    return max(np.max(np.abs(s - t)) for s, t in zip(tree.leaves(a), tree.leaves(b)))


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_vq_gradient_by_hand_is_that_of_minigrad(beta):
    params, x, model = linear_model()
    engine = grad(lambda p: vq_loss(p, x, beta, **model)[0])(params)
    by_hand = loss_gradient_by_hand(params, x, 2, beta)
    assert tree.paths(engine) == tree.paths({key: by_hand[key] for key in engine})
    assert largest_gap(engine, {key: by_hand[key] for key in engine}) < 1e-13
    assert all(np.max(np.abs(leaf)) > 1e-3 for leaf in tree.leaves(by_hand))


def test_vq_finite_differences_agree_where_the_convention_is_the_truth():
    params, x, model = linear_model(1)
    term = lambda p, i: np.mean(vq_terms(p, x, **model)[0][i])
    check_grads(lambda d: term(params | {"decoder": d}, 0), (params["decoder"],), order=2)
    check_grads(lambda e: term(params | {"codebook": e}, 1), (params["codebook"],), order=2)
    check_grads(lambda e: term(params | {"encoder": e}, 2), (params["encoder"],), order=2)
    with pytest.raises(AssertionError):  # the reconstruction in the codebook, by convention 0
        check_grads(lambda e: term(params | {"codebook": e}, 0), (params["codebook"],), order=1)


# %% [markdown]
# ### What straight-through is not
#
# The true gradient of the reconstruction in $z_e$: exactly zero by finite differences, but for the
# few places that lie within a step of a border. And the theorem: along $-g$ the tangent falls at
# every crossing. Whether the loss itself falls depends on how far apart the codes are, here by the
# share of random starts for which the first crossing lowers a random function.


# %%
def random_landscape(rng):
    """A smooth random function of the plane, for points (..., 2)."""
    w, shift = rng.standard_normal((6, 2)), rng.uniform(0, 2 * np.pi, 6)
    height = rng.standard_normal(6)
    return lambda z: np.sin(z @ w.T + shift) @ height


@claim("V2")
def test_vq_true_gradient_is_zero_and_straight_through_is_not(record):
    rng = np.random.default_rng(2)
    f, codebook, z_e = (
        random_landscape(rng),
        rng.standard_normal((16, 2)),
        rng.normal(size=(500, 2)),
    )
    z_q = codebook[quantise(codebook, z_e)[0]]
    changed, largest = 0, 0.0
    for axis in (0, 1):
        step = 1e-4 * np.eye(2)[axis]
        up, down = (codebook[quantise(codebook, z_e + s)[0]] for s in (step, -step))
        inside = np.all(up == down, axis=1)
        changed += np.sum(~inside)
        largest = max(largest, np.max(np.abs(f(up) - f(down))[inside]) / 2e-4)
    record("starts of 500 x 2 within 1e-4 of a border", changed)
    record("true gradient, where no border is near: largest entry", largest)
    assert changed <= 3 and largest == 0
    loss = lambda z_e: np.sum(f(straight_through(z_e, quantise(codebook, z_e)[1])))
    conventional = grad(loss)(z_e)
    truth = grad(lambda z: np.sum(f(z)))(z_q)
    record("straight-through: mean length", np.mean(np.linalg.norm(conventional, axis=1)))
    np.testing.assert_array_equal(conventional, truth)  # g, taken at the code
    assert loss(z_e) == np.sum(f(z_q))  # and the value is that of the code, to the last bit
    assert np.mean(np.linalg.norm(conventional, axis=1)) > 0.5


def crossings(codebook, z_e, g, lengths):
    """Numbers (len(lengths), n) of the nearest codes along z_e - s g."""
    path = z_e - lengths[:, None, None] * g
    return quantise(codebook, path)[0]


def test_vq_tangent_falls_at_every_crossing_but_the_loss_need_not(record):
    shares = []
    for K in (8, 64, 512):
        rng, lowered, total = np.random.default_rng(K), 0, 0
        for _ in range(10):
            f, codebook = random_landscape(rng), rng.standard_normal((K, 2))
            z_e = rng.normal(size=(100, 2))
            start = quantise(codebook, z_e)[0]
            g = grad(lambda z, f=f: np.sum(f(z)))(codebook[start])
            k = crossings(codebook, z_e, g, np.linspace(0, 3, 400))
            tangent = np.sum(codebook[k] * g, axis=-1)
            moved = k[1:] != k[:-1]
            assert np.all(np.diff(tangent, axis=0)[moved] < 0)  # the theorem
            any_move = np.any(moved, axis=0)
            first = k[1:][np.argmax(moved, axis=0), np.arange(100)]
            better = f(codebook[first]) < f(codebook[start])
            lowered, total = lowered + np.sum(better & any_move), total + np.sum(any_move)
        shares.append(lowered / total)
        record(f"{K} codes: share of first crossings that lower the loss", shares[-1])
    assert shares[0] < 0.9 < shares[-1] and np.all(np.diff(shares) > 0)


# %% [markdown]
# ### Which parameter moves by which term
#
# The table, with the convolutional model, one entry a test. The encoder's gradient from the
# reconstruction is its pull-back of $g$, to the last digit.


# %%
def small_vq(seed=0, K=5, D=3, stride=4):
    """A VQ-VAE in float64 for images of 8 x 8 pixels, with codes near what the encoder says."""
    rng = np.random.default_rng(seed)
    params = grid_vae_init(rng, 8, stride, 4, 1, D, D, np.float64)
    params = tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    return params | {"codebook": codebook_from(params["encoder"], small_images(9), K, rng) + 0.01}


TABLE = [{"encoder", "decoder"}, {"codebook"}, {"encoder"}]  # by term


def moved_by(terms, params, x):
    """For each term the set of the parts of `params` in which its gradient is not exactly 0."""
    found = []
    for i in range(3):
        g = grad(lambda p, i=i: np.mean(terms(p, x)[0][i]))(params)
        found.append(
            {part for part in g if any(np.any(leaf != 0) for leaf in tree.leaves(g[part]))}
        )
    return found


@claim("V3")
def test_vq_each_term_moves_what_it_should_and_nothing_else(record):
    params, x = small_vq(), small_images()
    found = moved_by(vq_terms, params, x)
    for name, parts in zip(("reconstruction", "codebook term", "commitment"), found):
        record(f"{name}: parts of three with a gradient", len(parts))
    assert found == TABLE
    # what the terms say, as formulas
    z_e = grid_encode(params["encoder"], x)
    k, z_q = quantise(params["codebook"], z_e)
    codebook = grad(lambda p: np.sum(vq_terms(p, x)[0][1]))(params)["codebook"]
    n, sums = code_sums(k.ravel(), z_e.reshape(-1, 3), 5)
    error = np.max(np.abs(codebook - 2 * (n[:, None] * params["codebook"] - sums)))
    record("codebook term against 2 Σ (e - z_e): largest error", error, limit=1e-12)
    assert error < 1e-12
    encoder = grad(lambda p: np.sum(vq_terms(p, x)[0][2]))(params)["encoder"]
    _, pullback = vjp(lambda e: grid_encode(e, x), params["encoder"])
    assert largest_gap(encoder, pullback(2 * (z_e - z_q))[0]) < 1e-12


@claim("V2")
def test_vq_encoder_receives_the_gradient_of_the_code_and_the_codebook_none(record):
    params, x = small_vq(1), small_images(1)
    reconstruction = lambda p: np.sum(vq_terms(p, x)[0][0])
    found = grad(reconstruction)(params)
    z_e, pullback = vjp(lambda e: grid_encode(e, x), params["encoder"])
    z_q = quantise(params["codebook"], z_e)[1]
    g = grad(lambda z: np.sum(log_lik(params, z, x)))(z_q)
    error = largest_gap(found["encoder"], pullback(g)[0])
    record("encoder's gradient against the pull-back of g: largest error", error, limit=1e-12)
    record("largest entry of the codebook's", np.max(np.abs(found["codebook"])), limit=0)
    assert error < 1e-12 and np.all(found["codebook"] == 0) and np.max(np.abs(g)) > 0.01


# %% [markdown]
# ### The bound
#
# On a grid of $2 \times 2$ with 5 codes, the sum over all $5^4 = 625$ latents is the evidence, for
# a uniform prior and for a learned one.


# %%
def every_grid(K, shape=(2, 2)):
    """All grids of codes: (K^N, h, w)."""
    return np.stack(np.meshgrid(*[np.arange(K)] * np.prod(shape), indexing="ij"), -1).reshape(
        -1, *shape
    )


def log_liks_of_all(params, x, grids):
    """log p(x | z) (images, grids)."""
    z = params["codebook"][grids]
    return np.array([log_lik(params, z, np.repeat(one[None], len(z), axis=0)) for one in x])


@claim("V1")
def test_vq_posterior_is_one_hot_and_its_rate_is_constant(record):
    grids, worst = every_grid(5), 0.0
    for seed in range(3):
        params, x = small_vq(seed), small_images(seed)
        z_e = grid_encode(params["encoder"], x)
        distance = np.sum((z_e[..., None, :] - params["codebook"]) ** 2, axis=-1)
        one_hots = distance == np.min(distance, axis=-1, keepdims=True)  # (B, 2, 2, K)
        assert np.all(one_hots.sum(-1) == 1)
        np.testing.assert_array_equal(one_hots.argmax(-1), codes_of(params, x))
        places = np.arange(4)
        q = np.prod(one_hots.reshape(len(x), 4, 5)[:, places, grids.reshape(-1, 4)], axis=-1)
        assert np.all(q.sum(1) == 1)  # Eq. (eq-vq-posterior), over all 625 grids
        kl = np.sum(sc.xlogy(q, q) + q * np.log(5.0**4), axis=1)
        worst = max(worst, np.max(np.abs(kl - 4 * np.log(5))))
    record("KL to the uniform prior - N log K: largest error, nats, 3 models", worst, limit=1e-12)
    assert worst < 1e-12


def test_vq_bound_misses_the_evidence_by_the_posterior_of_its_codes(record):
    params, x, grids = small_vq(), small_images(), every_grid(5)
    prior = code_prior_init(np.random.default_rng(3), 5, 4, 1, dtype=np.float64)
    prior = tree.map(lambda p: 3 * p, prior)
    table = log_liks_of_all(params, x, grids)
    k = codes_of(params, x)
    place = np.array([np.flatnonzero(np.all(grids == one, axis=(1, 2)))[0] for one in k])
    reconstruction = vq_terms(params, x)[0][0]
    np.testing.assert_allclose(table[np.arange(len(x)), place], reconstruction, rtol=1e-12)
    for name, log_p in (
        ("uniform", np.full(625, -4 * np.log(5))),
        ("learned", code_log_prob(prior, grids)),
    ):
        assert np.sum(np.exp(log_p)) == pytest.approx(1, abs=1e-12)
        joint = table + log_p
        evidence = sc.logsumexp(joint, axis=1)
        bound = reconstruction + log_p[place]  # Eq. (eq-vq-bound)
        posterior = sc.log_softmax(joint, axis=1)[np.arange(len(x)), place]
        record(
            f"{name} prior: least distance of bound from evidence, nats", np.min(evidence - bound)
        )
        np.testing.assert_allclose(evidence - bound, -posterior, rtol=1e-10)
        assert np.all(bound < evidence)


# %% [markdown]
# ### Averages, commitment, and the prior


# %%
def test_vq_moving_average_is_the_quotient_of_averages_and_half_a_gradient_step():
    rng = np.random.default_rng(4)
    codebook, counts = rng.standard_normal((6, 2)), np.ones(6)
    e, c, m = codebook.copy(), counts.copy(), codebook.copy()
    for _ in range(200):
        z_e = rng.normal(size=(30, 2)) + [1.0, 0.0]
        k, _ = quantise(e, z_e)
        n, sums = code_sums(k, z_e, 6)
        gradient = 2 * (n[:, None] * e - sums)
        old, (e, c) = e, moving_average(e, c, k, z_e, 0.9)
        counts, m = 0.9 * counts + 0.1 * n, 0.9 * m + 0.1 * sums  # Eq. (eq-vq-average)
        np.testing.assert_allclose(e, m / counts[:, None], rtol=1e-10)
        np.testing.assert_allclose(c, counts, rtol=1e-12)
        np.testing.assert_allclose(e, old - 0.05 / c[:, None] * gradient, rtol=1e-9, atol=1e-12)
    # a code without rows stays, for any number of steps
    far = np.array([[0.0, 0.0], [100.0, 0.0]])
    c = np.ones(2)
    for _ in range(5000):
        far, c = moving_average(far, c, np.zeros(4, int), np.ones((4, 2)), 0.9)
    np.testing.assert_array_equal(far[1], [100, 0])
    np.testing.assert_allclose(far[0], [1, 1])


def test_vq_dead_codes_are_revived_and_living_ones_left():
    rng = np.random.default_rng(5)
    codebook, z_e = np.full((4, 2), 9.0), rng.normal(size=(20, 3, 2))
    new, counts = revive(codebook, np.array([0.2, 5.0, 0.99, 1.0]), z_e, rng)
    rows = {tuple(row) for row in z_e.reshape(-1, 2)}
    assert [tuple(row) in rows for row in new] == [True, False, True, False]
    np.testing.assert_array_equal(counts, [1, 5, 1, 1])
    many, _ = revive(np.full((1000, 2), 9.0), np.full(1000, 0.999), z_e, rng)
    assert {tuple(row) for row in many} == rows  # each by a row of its own, and any row


def test_vq_first_step_by_averages_in_numbers():
    params, images = small_vq(3), np.ones((4, 1, 8, 8))  # binarised, they stay what they are
    z_e = grid_encode(params["encoder"], images[:1])
    distance = np.sum((z_e[..., None, :] - params["codebook"]) ** 2, axis=-1)
    n = 3 * np.bincount(np.argmin(distance, axis=-1).ravel(), minlength=5)[:, None]
    sums = 3 * np.eye(5)[np.argmin(distance, axis=-1).ravel()].T @ z_e.reshape(-1, 3)
    new, shown = vq_step(sgd(0.1), images, 3, averages=True)(
        vq_start(params, sgd(0.1)), np.random.default_rng(0)
    )
    moved = (0.99 * params["codebook"] + 0.01 * sums) / (0.99 + 0.01 * n)  # counts start at 1
    np.testing.assert_allclose(new["params"]["codebook"], moved, rtol=1e-10)
    distortion = -log_lik(params, quantise(params["codebook"], z_e)[1], images[:1])[0]
    squares = np.sum(np.min(distance, axis=-1))
    assert shown["loss"] == pytest.approx(distortion + 1.25 * squares)  # β = 0.25
    assert vq_loss(params, images)[0] == pytest.approx(distortion + 1.25 * squares)


def test_vq_steps_hand_on_the_state_of_the_optimizer():
    params, optimizer = small_vq(), sgd(0.1, momentum=0.9)
    images = np.random.default_rng(12).random((6, 1, 8, 8))  # grey: binarised at every step
    step, state = vq_step(optimizer, images, 6), vq_start(params, optimizer)
    inner = optimizer.init(params)
    for seed in (1, 2, 3):
        state, _ = step(state, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        x = binarize(images[rng.integers(6, size=6)], rng)
        grads = grad(lambda p, x=x: vq_loss(p, x)[0])(params)
        params, inner = optimizer.update(grads, inner, params)
    assert largest_gap(state["params"], params) < 1e-10


def test_vq_training_keeps_the_precision_it_is_given():
    for dtype in (np.float32, np.float64):
        params = tree.map(lambda p, dtype=dtype: p.astype(dtype), small_vq())
        start = vq_start(params, sgd(0.1))
        step = vq_step(sgd(0.1), small_images().astype(dtype), 4, averages=True, revived=True)
        new, _ = step(start, np.random.default_rng(0))
        prior = code_prior_init(np.random.default_rng(0), 5, 4, 2, dtype=dtype)
        assert len(prior["blocks"]) == 2
        assert {leaf.dtype for leaf in tree.leaves([new["params"], prior])} == {np.dtype(dtype)}
        assert code_log_prob(prior, every_grid(5)[:3]).dtype == dtype


def test_vq_networks_keep_places_and_use_every_parameter():
    rng = np.random.default_rng(10)
    params = grid_vae_init(rng, 16, 2, 4, 2, 3, 3, np.float64)
    params = tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    assert [len(params[part]["blocks"]) for part in ("encoder", "decoder")] == [2, 2]
    x = rng.integers(0, 2, (2, 1, 16, 16)).astype(float)
    z_e = grid_encode(params["encoder"], x)
    other = x.copy()
    other[:, :, 0, 15] = 1 - x[:, :, 0, 15]  # a corner, and what hears of it
    heard = np.any(grid_encode(params["encoder"], other) != z_e, axis=(0, 3))
    assert z_e.shape == (2, 8, 8, 3)
    assert heard[0, 7] and not np.any(heard[4:]) and not np.any(heard[:, :4])
    a = grid_decode(params["decoder"], z_e)
    moved = z_e.copy()
    moved[:, 0, 7, :] += 1
    heard = np.any(grid_decode(params["decoder"], moved) != a, axis=(0, 1))
    assert heard[0, 15] and not np.any(heard[8:]) and not np.any(heard[:, :8])
    lifted = params["decoder"] | {"pixels": params["decoder"]["pixels"] + 1}
    np.testing.assert_allclose(grid_decode(lifted, z_e), a + 1)
    g = grad(lambda p: np.sum(log_lik(p, grid_encode(p["encoder"], x), x)))(params)
    assert all(np.any(leaf != 0) for leaf in tree.leaves(g))


def test_vq_likelihood_adds_the_logits_of_the_pixels_before():
    params, x = small_vq(), small_images()
    pixels = pixelcnn_init(np.random.default_rng(11), 4, 1, dtype=np.float64)
    z = quantise(params["codebook"], grid_encode(params["encoder"], x))[1]
    a = grid_decode(params["decoder"], z)
    b = a + pixelcnn(pixels, x)
    exact = lambda a: np.sum(np.log(np.where(x == 1, sc.expit(a), sc.expit(-a))), axis=(1, 2, 3))
    np.testing.assert_allclose(log_lik(params, z, x), exact(a))
    np.testing.assert_allclose(log_lik(params | {"pixels": pixels}, z, x), exact(b))
    assert np.max(np.abs(exact(a) - exact(b))) > 0.1


def test_vq_step_moves_the_codebook_by_its_gradient_or_by_averages():
    params, images = small_vq(), small_images().astype(np.float64)
    start = vq_start(params, sgd(0.1))
    for settings in ({}, {"averages": True}, {"averages": True, "revived": True}):
        step = vq_step(sgd(0.1), images, 20, 0.5, **settings)
        new, shown = step(start, np.random.default_rng(7))
        rng = np.random.default_rng(7)
        x = binarize(images[rng.integers(6, size=20)], rng)
        (loss, (z_e, k)), grads = value_and_grad(vq_loss, has_aux=True)(params, x, 0.5)
        expected = tree.map(lambda p, g: p - 0.1 * g, params, grads)
        counts = moving_average(params["codebook"], start["counts"], k, z_e)[1]
        if settings:
            expected["codebook"], counts = moving_average(
                params["codebook"], start["counts"], k, z_e
            )
        if "revived" in settings:
            expected["codebook"], counts = revive(expected["codebook"], counts, z_e, rng)
        assert largest_gap(new["params"], expected) < 1e-12
        np.testing.assert_allclose(new["counts"], counts)
        assert shown["loss"] == pytest.approx(loss)
        lengths = np.sum(z_e**2, axis=-1)
        assert shown["size"] == pytest.approx(np.sqrt(np.mean(lengths)))
        assert shown["perplexity"] == pytest.approx(perplexity(k, 5))


def test_vq_codebooks_start_where_they_should():
    params, x, rng = small_vq(), small_images(), np.random.default_rng(8)
    rows = {tuple(row) for row in grid_encode(params["encoder"], x).reshape(-1, 3)}
    codebook = codebook_from(params["encoder"], x, 20, rng)
    assert len({tuple(row) for row in codebook}) == 20  # different ones
    assert all(tuple(row) in rows for row in codebook)
    cube = uniform_codebook(rng, 50, 40)
    assert cube.shape == (50, 40) and cube.dtype == np.float32
    assert 0.95 / 50 < np.max(cube) <= 1 / 50 and 0.95 / 50 < np.max(-cube) <= 1 / 50


def test_vq_normal_latents_and_the_cost_of_exchanging_them():
    rng = np.random.default_rng(9)
    params = grid_vae_init(rng, 8, 4, 4, 1, 6, 3, np.float64)
    params = tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    x, noise = small_images(n=40), rng.standard_normal((40, 2, 2, 3))
    reconstruction, kl, z = gaussian_terms(params, x, noise)
    loc, log_var = np.split(grid_encode(params["encoder"], x), 2, axis=-1)
    np.testing.assert_allclose(z, loc + np.exp(0.5 * log_var) * noise)
    exact = 0.5 * np.sum(np.exp(log_var) + loc**2 - 1 - log_var, axis=(1, 2, 3))
    np.testing.assert_allclose(kl, exact)
    np.testing.assert_allclose(reconstruction, log_lik(params, z, x))
    # both terms move the encoder, by the path through the sample too

    def elbo(encoder):
        reconstruction, kl, _ = gaussian_terms(params | {"encoder": encoder}, x, noise)
        return np.sum(reconstruction - kl)

    def written_out(encoder):
        said = grid_encode(encoder, x)
        loc, log_var = said[..., :3], said[..., 3:]
        kl = 0.5 * np.sum(np.exp(log_var) + loc**2 - 1 - log_var)
        return np.sum(log_lik(params, loc + np.exp(0.5 * log_var) * noise, x)) - kl

    assert largest_gap(grad(elbo)(params["encoder"]), grad(written_out)(params["encoder"])) < 1e-10
    deaf = params | {"decoder": tree.map(np.zeros_like, params["decoder"])}
    assert cost_of_permuting(deaf, z, x, rng) == 0
    # latents that are the image, and a decoder that listens
    best = np.mean(log_lik(params, z, x))
    order = np.random.default_rng(3).permutation(40)
    cost = cost_of_permuting(params, z, x, np.random.default_rng(3))
    assert cost == pytest.approx(best - np.mean(log_lik(params, z[order], x))) and cost != 0


@claim("V4")
def test_vq_two_data_and_one_code_run_away_unless_committed(record):
    t = np.array([1.0, -1.0])
    model = {
        "encode": lambda z, x: z,  # each datum's output is a parameter
        "log_lik": lambda params, z, x: -0.5 * np.sum((z - x) ** 2, axis=(1, 2)),
    }
    x = t[:, None, None]
    ends = {}
    for beta in (0.0, 0.25, 2.0):
        params = {"encoder": 0.3 * x, "codebook": np.array([[0.2]])}
        total = lambda p, beta=beta: 2 * vq_loss(p, x, beta, **model)[0]  # the sum of two
        for _ in range(500):
            params = tree.map(lambda p, g: p - 0.05 * g, params, grad(total)(params))
        ends[beta] = params["encoder"].ravel()
        record(f"β = {beta:g}: z_e of the first datum after 500 steps", ends[beta][0])
    np.testing.assert_allclose(ends[0.0], t * (0.3 + 500 * 0.05), rtol=0.02)
    for beta in (0.25, 2.0):
        np.testing.assert_allclose(ends[beta], t / (2 * beta), rtol=1e-5)  # Eq. (eq-vq-rest)


def test_vq_prior_sees_earlier_places_only_and_its_samples_have_its_probabilities():
    K, rng = 3, np.random.default_rng(6)
    prior = code_prior_init(rng, K, 6, 1, dtype=np.float64)
    prior = tree.map(lambda p: 2 * p + 0.3 * rng.standard_normal(p.shape), prior)
    x = np.random.default_rng(7).standard_normal((1, K, 3, 3))
    J = jacobian(lambda x: np.moveaxis(pixelcnn(prior, x)[0], 0, -1).ravel())(x)
    J = np.moveaxis(J.reshape(9, K, K, 9), 2, 3)  # place out, channel, place in, channel
    seen = np.any(J != 0, axis=(1, 3))
    assert not np.any(np.triu(seen)) and np.any(seen)
    grids = every_grid(K)
    log_p = code_log_prob(prior, grids)
    assert np.sum(np.exp(log_p)) == pytest.approx(1, abs=1e-12)
    assert -np.sum(np.exp(log_p) * log_p) > 2  # many likely grids, so that samples can tell
    drawn = sample_codes(prior, rng, 20_000, (2, 2)).reshape(-1, 4) @ K ** np.arange(3, -1, -1)
    check_density(lambda n: log_p[n], np.arange(K**4), drawn)


def test_vq_perplexity_counts_codes():
    assert perplexity(np.zeros(7, int), 5) == pytest.approx(1)
    assert perplexity(np.arange(20) % 5, 8) == pytest.approx(5)
    assert perplexity(np.array([0, 0, 0, 1]), 2) == pytest.approx(np.exp(0.5623351446))


# %% [markdown]
# ### Trained
#
# On digits, in seconds: more than independent pixels know, at codes that are used.


# %%
@pytest.fixture(scope="module")
def quick_vq():
    """Parameters of a small VQ-VAE after 150 steps on digits, and binarised test images."""
    rng = np.random.default_rng(0)
    params = grid_vae_init(rng, 8, 2, 8, 1, 4, 4)
    x = digits().x_train[:100]
    params["codebook"] = codebook_from(params["encoder"], x, 16, rng)
    optimizer = adam(cosine_decay(1e-2, 150))
    step = vq_step(optimizer, digits().x_train, 32, averages=True, revived=True)
    state, _ = fit(step, vq_start(params, optimizer), 150, rng, progress=False)
    test = binarize(digits().x_test, np.random.default_rng(1)).astype(np.float32)
    return state["params"], test


def test_vq_reconstructs_digits_in_seconds(quick_vq, record):
    params, test = quick_vq
    (reconstruction, _, _), (_, k) = vq_terms(params, test)
    floor = log_likelihood_without_latents(rows_of(digits().x_train), rows_of(test))
    record("digits, 150 steps: log p(x | z), nats", np.mean(reconstruction), limit=floor)
    record("digits, 150 steps: perplexity of 16 codes", perplexity(k, 16))
    assert np.mean(reconstruction) > floor + 8 and perplexity(k, 16) > 6


@claim("V4")
def test_vq_outputs_grow_without_commitment_on_digits(record):
    curves = records.load("vq_variants_digits")["curves"]
    size = {beta: curves[f"beta={beta}/size"]["values"] for beta in ("0", "0.25", "2")}
    for beta, values in size.items():
        record(f"digits, β = {beta}: length of z_e after training", values[-1])
    free = np.array(size["0"])
    record("β = 0: growth over the second half of training", free[-1] / free[len(free) // 2])
    assert free[-1] > 5 * size["0.25"][-1] and free[-1] > 1.2 * free[len(free) // 2]
    assert size["2"][-1] < size["0.25"][-1] < 5


def variants(part):
    """Final value of a curve for each way of `vq_variants_digits`."""
    curves = records.load("vq_variants_digits")["curves"]
    end = "/" + part
    return {
        key.removesuffix(end): c["values"][-1] for key, c in curves.items() if key.endswith(end)
    }


def test_vq_revival_brings_codes_to_life(record):
    used, lost = variants("test_perplexity"), variants("test_distortion")
    for way, value in used.items():
        record(f"digits, {way}: perplexity of 32 codes", value)
        record(f"digits, {way}: distortion, nats", lost[way])
    left_alone = max(used[way] for way in ("small", "beta=0.25", "data_averages"))
    assert left_alone < 0.8 * min(used["small_revived"], used["data_revived"])
    assert max(lost[way] for way in WAYS) < 3  # alive or dead, all five reconstruct


DATA = {"digits": "digits", "binarized_mnist": "binarised MNIST"}


@claim("V5")
@pytest.mark.parametrize("name", DATA)
def test_vq_autoregressive_prior_beats_the_uniform_one(name, record):
    run = records.load(f"vq_vae_{name}")
    found, K = run["scalars"], run["config"]["K"]
    uniform, frequency, learned = (
        found[key] for key in ("uniform_nats", "frequency_nats", "test_prior_nats")
    )
    record(f"{name}: uniform prior, N log K, nats", uniform)
    record(f"{name}: independent places with their frequencies, nats", frequency)
    record(f"{name}: PixelCNN, nats", learned)
    record(f"{name}: distortion, nats", found["test_distortion"])
    record(f"{name}: lower bound of log p(x) with the PixelCNN, nats", found["test_bound"])
    record(f"{name}: perplexity of {K} codes", found["test_perplexity"])
    ratio = found["test_squared_error"] / found["test_pixel_variance"]
    record(f"{name}: squared error of the pixels / their variance", ratio)
    places = (run["arrays"]["originals"].shape[-1] // run["config"]["stride"]) ** 2
    assert uniform == pytest.approx(places * np.log(K))
    least = places * np.log(found["test_perplexity"])  # exercise 4
    assert least <= frequency < 1.05 * least
    assert learned < frequency - 1 and frequency < uniform
    assert ratio < 0.5 and found["test_perplexity"] > K / 3
    assert found["test_bound"] == pytest.approx(-found["test_distortion"] - learned, abs=1e-3)


# %% [markdown]
# ### Collapse, or not
#
# Models of the digits with codes or normal latents, behind a decoder that sees the latents alone or
# one that sees the pixels before as well. All have a grid of $2 \times 2$ places, $D = 2$, and the
# same networks; there are $K = 16$ codes, so that their rate is $4 \log 16 = 11.1$ nats. One of the
# normal ones has the warm-up of Chapter 11, which takes away the second
# reason for collapse, the bad start.
#
# Behind the strong decoder normal latents collapse, and codes do not. Two things belong beside this
# sentence. With warm-up the normal latents keep as much rate on these images as behind the decoder
# that sees nothing else, and their ELBO is none the worse for it. And what the codes say is not
# worth its price: with the uniform prior their bound is several nats below that of the model whose
# latents say nothing.

# %%
MODELS = {
    "codes_plain": "codes, latents alone",
    "normal_plain": "normal, latents alone",
    "codes_pixels": "codes, pixels seen",
    "normal_pixels": "normal, pixels seen",
    "warm-up_pixels": "normal, pixels seen, warm-up",
}


@claim("V6")
def test_vq_codes_stay_informative_where_normal_latents_collapse(record):
    run = records.load("vq_collapse_digits")
    found = {
        name: {key: run["scalars"][f"{name}/test_{key}"] for key in
               ("cost_of_permuting", "rate", "distortion")}
        for name in MODELS
    }  # fmt: skip
    for name, label in MODELS.items():
        record(f"{label}: rise of -log p(x | z) when exchanged, nats",
               found[name]["cost_of_permuting"])  # fmt: skip
        record(f"{label}: rate, nats", found[name]["rate"])
        record(f"{label}: ELBO, nats", -found[name]["rate"] - found[name]["distortion"])
    record("codes, pixels seen: perplexity", run["scalars"]["codes_pixels/test_perplexity"])
    silent, telling = found["normal_pixels"], found["codes_pixels"]
    assert silent["cost_of_permuting"] < 0.5 and silent["rate"] < 0.5
    assert telling["cost_of_permuting"] > 5 + found["warm-up_pixels"]["cost_of_permuting"]
    assert found["warm-up_pixels"]["rate"] > 0.9 * found["normal_plain"]["rate"] > 1
    elbo = {name: -numbers["rate"] - numbers["distortion"] for name, numbers in found.items()}
    assert elbo["warm-up_pixels"] > elbo["normal_pixels"] - 0.2 > 1 + elbo["codes_pixels"]
    for name in ("normal_plain", "codes_plain"):  # they have nothing else to go by
        assert found[name]["cost_of_permuting"] > 3
    assert np.ptp(run["curves"]["codes_pixels/test_rate"]["values"]) == 0  # it knows nothing of it
    price = elbo["normal_pixels"] - elbo["codes_pixels"]
    record("ELBO of silent normal latents minus that of the codes, nats", price)


# %% [markdown]
# ## What goes wrong
#
# ### A gradient that leaks into the codebook
#
# One `stop_gradient` forgotten in {eq}`eq-vq-straight-through`. The value is the same; the
# encoder's gradient is the same; the codebook now receives $g$ as well, which is even its true
# gradient. But then a code is no longer at the mean of its rows when it rests, and what the
# codebook term promises, a quantiser of the encoder's outputs, is not what one gets. The table
# rejects it.


# %%
def leaky_straight_through(z_e, z_q):
    """WRONG on purpose: `z_q` is not held."""
    return z_q + (z_e - stop_gradient(z_e))


def terms_with(monkeypatch, name, wrong):
    """`vq_terms` with one function of this chapter replaced."""
    monkeypatch.setattr(sys.modules[__name__], name, wrong)
    return vq_terms


def test_vq_leak_into_the_codebook_is_rejected_by_the_table(monkeypatch, record):
    params, x = small_vq(), small_images()
    right = grad(lambda p: vq_loss(p, x)[0])(params)
    terms = terms_with(monkeypatch, "straight_through", leaky_straight_through)
    assert moved_by(terms, params, x) != TABLE
    leaky = grad(lambda p: vq_loss(p, x)[0])(params)
    assert largest_gap(leaky["encoder"], right["encoder"]) == 0
    # where Lloyd's algorithm rests, the right gradient is zero and the leaky one is not
    z_e = grid_encode(params["encoder"], x)
    for _ in range(100):
        k, _ = quantise(params["codebook"], z_e)
        n, sums = code_sums(k.ravel(), z_e.reshape(-1, 3), 5)
        means = np.where(n[:, None] > 0, sums / np.maximum(n, 1)[:, None], params["codebook"])
        params = params | {"codebook": means}
    at_means = grad(lambda p: vq_loss(p, x)[0])(params)["codebook"]
    monkeypatch.undo()
    rest = grad(lambda p: vq_loss(p, x)[0])(params)["codebook"]
    record(
        "at the means: gradient of the codebook, largest entry", np.max(np.abs(rest)), limit=1e-12
    )
    record("with the leak", np.max(np.abs(at_means)))
    assert np.max(np.abs(rest)) < 1e-12 and np.max(np.abs(at_means)) > 1e-3


# %% [markdown]
# ### The two squares exchanged
#
# With $\beta$ on the codebook term and 1 on the commitment, or with both `stop_gradient`s swapped,
# the *value* of the loss can be the same as before, as the squares are equal. Only gradients can
# tell.


# %%
def exchanged_terms(params, x):
    """WRONG on purpose: each square holds what the other should."""
    (reconstruction, codebook, commitment), found = vq_terms(params, x)
    return (reconstruction, commitment, codebook), found


def test_vq_exchanged_squares_have_the_same_value_and_fail_the_table():
    params, x = small_vq(2), small_images(2)
    for right, wrong in zip(vq_terms(params, x)[0], exchanged_terms(params, x)[0]):
        np.testing.assert_allclose(right, wrong, rtol=1e-14)
    assert moved_by(exchanged_terms, params, x) == [TABLE[0], TABLE[2], TABLE[1]]


# %% [markdown]
# ### A printed loss
#
# The slides of a lecture (source S4) print the loss as the paper does, with $+ \log p_\theta(x \mid
# z)$ in front of the two squares. Minimised as it stands, it makes the images as unlikely as
# possible; what is meant is {eq}`eq-vq-loss`. And they write "$\propto$" where two sides differ by
# a constant *summand*. The ELBO is the reconstruction plus a constant, {eq}`eq-vq-bound`; it is not
# a multiple of it.


# %%
@claim("E12")
def test_vq_printed_loss_has_the_wrong_sign_and_the_constant_is_a_summand(record):
    params, x = small_vq(3), small_images(3)

    def printed(params):
        reconstruction, codebook, commitment = vq_terms(params, x)[0]
        return np.mean(reconstruction + codebook + 0.25 * commitment)

    likelihood = lambda p: np.mean(vq_terms(p, x)[0][0])
    means = {"printed": printed, "with the minus": lambda p: vq_loss(p, x)[0]}
    change = {}
    for name, loss in means.items():
        found = params
        for _ in range(20):
            found = tree.map(lambda p, g: p - 0.01 * g, found, grad(loss)(found))
        change[name] = likelihood(found) - likelihood(params)
        record(f"{name}: change of log p(x | z) in 20 steps of descent, nats", change[name])
    assert change["printed"] < -20 and change["with the minus"] > 0.5
    ratios, differences = [], []
    for seed in range(4):
        p = small_vq(seed)
        reconstruction = vq_terms(p, x)[0][0]
        bound = reconstruction - 4 * np.log(5)  # as the enumeration above confirms
        ratios.append(bound / reconstruction)
        differences.append(bound - reconstruction)
    record(
        "ELBO - log p(x | z): range over models and images, nats", np.ptp(differences), limit=1e-12
    )
    record("ELBO / log p(x | z): range", np.ptp(ratios))
    assert np.ptp(differences) < 1e-12 and np.ptp(ratios) > 1e-3


# %% [markdown]
# ## Figures
#
# First codes in the plane. Then the staircase.

# %%
from chapters.ch11_autoregressive import tile
from chapters.style import COLOUR


def figure_voronoi():
    """Codes (crosses), their Voronoi cells, and outputs of the encoder (dots) while both learn.

    VQ-VAE on digits with 16 codes in the plane; dots are the outputs for 50 test images, 16 places
    each, coloured by their code. The codes start in a small cube and follow the gradient of the
    codebook term; scales differ.
    """
    import matplotlib.pyplot as plt

    run = records.load("vq_plane_digits")
    fig, axes = plt.subplots(1, 4, figsize=(6.4, 1.9), layout="constrained")
    kept = run["config"]["snapshots"], run["arrays"]["codebooks"], run["arrays"]["outputs"]
    for ax, step, codebook, z_e in zip(axes, *kept):
        both = np.concatenate([codebook, z_e])
        middle = (both.max(0) + both.min(0)) / 2
        reach = 0.55 * np.max(np.ptp(both, axis=0))
        line = np.linspace(-reach, reach, 121)
        plane = middle + np.stack(np.meshgrid(line, line), axis=-1)
        cells, _ = quantise(codebook.astype(float), plane)
        extent = [middle[0] - reach, middle[0] + reach, middle[1] - reach, middle[1] + reach]
        look = {"cmap": "tab20", "vmin": 0, "vmax": 19}
        ax.imshow(cells, extent=extent, origin="lower", alpha=0.35, interpolation="nearest", **look)
        ax.scatter(*z_e.T, c=quantise(codebook, z_e)[0], s=2, linewidths=0, **look)
        ax.plot(*codebook.T, "x", color=COLOUR["exact"], markersize=4)
        ax.set(title=f"{step} step" + "s" * (step > 1), xlim=extent[:2], ylim=extent[2:])
        ax.tick_params(labelsize=6)
    return fig


# %%
def figure_slope_of_a_staircase():
    """A loss seen through five codes (left), and three notions of its derivative (right).

    One dimension; vertical lines are the borders of the cells, crosses the codes. The derivative of
    the staircase is zero. Straight-through takes the slope of the loss at the code. Smoothed: the
    derivative of the mean of the staircase under normal noise with a standard deviation of 0.3.
    """
    import matplotlib.pyplot as plt

    loss = lambda z: 0.5 * (z - 0.6) ** 2 + 0.4 * np.cos(3 * z)
    codes, z = np.array([-2.0, -1.0, -0.3, 0.9, 1.8]), np.linspace(-2.6, 2.6, 521)
    slope = grad(lambda z: np.sum(loss(z)))
    _, z_q = quantise(codes[:, None], z[:, None])
    borders = (codes[1:] + codes[:-1]) / 2
    jumps = np.diff(loss(codes))
    density = np.exp(-0.5 * ((z[:, None] - borders) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
    axes[0].plot(z, loss(z), color=COLOUR["numeric"], label=r"$\ell(z_e)$")
    axes[0].plot(z, loss(z_q[:, 0]), color=COLOUR["exact"], label=r"$\ell(z_q)$")
    axes[0].plot(codes, loss(codes), "x", color=COLOUR["exact"])
    axes[1].plot(z, 0 * z, color=COLOUR["exact"], label="true")
    axes[1].plot(z, slope(z_q)[:, 0], color=COLOUR["straight_through"], label="straight-through")
    axes[1].plot(z, density @ jumps, color=COLOUR["concrete"], ls="--", label="smoothed")
    for ax in axes:
        for border in borders:
            ax.axvline(border, color="0.85", lw=0.6, zorder=0)
        ax.set(xlabel=r"$z_e$")
        ax.legend(fontsize=7)
    axes[0].set(ylabel="loss")
    axes[1].set(ylabel="derivative")
    return fig


# %% [markdown]
# What the commitment term does, and what brings codes to life.


# %%
def figure_commitment():
    """Length of the encoder's outputs (left) and distortion (right), by weight of the commitment.

    VQ-VAE on digits, 32 codes that start at outputs of the encoder and follow their gradient. The
    length is the root of the mean square, over training batches; the distortion is that of test
    digits.
    """
    import matplotlib.pyplot as plt

    curves = records.load("vq_variants_digits")["curves"]
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.5), layout="constrained")
    looks = {"0": "-", "0.25": "--", "2": ":"}
    for beta, ls in looks.items():
        for ax, part in zip(axes, ("size", "test_distortion")):
            curve = curves[f"beta={beta}/{part}"]
            ax.plot(curve["steps"], curve["values"], ls=ls, label=rf"$\beta = {beta}$")
    axes[0].set(xlabel="steps", ylabel=r"length of $z_e$", yscale="log")
    axes[1].set(xlabel="steps", ylabel="distortion, nats")
    axes[0].legend(fontsize=7)
    return fig


WAYS = {
    "small": "small cube, gradient",
    "beta=0.25": "data, gradient",
    "data_averages": "data, averages",
    "small_revived": "small cube, averages, revived",
    "data_revived": "data, averages, revived",
}


def figure_dead_codes():
    """Perplexity of 32 codes (left) and distortion (right) on test digits, by care for the codes.

    "Small cube" and "data" are where the codebook starts; then it follows its gradient, or moving
    averages, without or with revival of dead codes.
    """
    import matplotlib.pyplot as plt

    curves = records.load("vq_variants_digits")["curves"]
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.5), layout="constrained")
    for (way, label), ls in zip(WAYS.items(), (":", "--", "--", "-", "-")):
        for ax, part in zip(axes, ("test_perplexity", "test_distortion")):
            curve = curves[f"{way}/{part}"]
            ax.plot(curve["steps"], curve["values"], ls=ls, label=label)
    axes[0].axhline(32, color=COLOUR["exact"], lw=0.8)
    axes[0].set(xlabel="steps", ylabel="perplexity", ylim=(0, 34))
    axes[1].set(xlabel="steps", ylabel="distortion, nats")
    axes[1].legend(fontsize=7)
    return fig


# %% [markdown]
# What the codes keep of an image, and what the prior knows of codes, on binarised MNIST
# ({numref}`fig-vq-images`); what they cost ({numref}`fig-code-nats`). That model has a grid of
# $7 \times 7$ places and 128 codes, of which the test images use 111 in the sense of the
# perplexity; 4,000 steps of 100 images for it and 3,500 for the prior, seed 0, took 1,670 s. The
# squared error of its reconstructions is a tenth of the pixels' variance. The PixelCNN needs 190
# nats for the codes of an image where the uniform prior needs 238. Even so the bound is $-212$
# nats, where the PixelCNN of Chapter 11, which sees pixels instead of codes, has $-90$: 49 codes
# that reconstruct this well say more than there is to know, and a likelihood is not what such a
# model is good at.


# %%
def figure_vq_images():
    """VQ-VAE of binarised MNIST: what a grid of 7 x 7 codes keeps, and what its priors draw.

    Probabilities of the pixels as grey. Above, sixteen test images and their reconstructions.
    Below, images decoded from codes that the PixelCNN draws, and from codes drawn uniformly: each
    patch is a piece of a digit, and only the learned prior puts pieces together.
    """
    import matplotlib.pyplot as plt

    arrays = records.load("vq_vae_binarized_mnist")["arrays"]
    fig, axes = plt.subplots(4, 1, figsize=(6.4, 2.8), height_ratios=[1, 1, 2, 1])
    rows = {
        "originals": arrays["originals"][:16],
        "reconstructed": arrays["reconstructions"][:16],
        "PixelCNN": arrays["samples"][:32],
        "uniform": arrays["uniform_samples"][:16],
    }
    for ax, (name, images) in zip(axes, rows.items()):
        ax.imshow(1 - tile(images / 255.0, 16), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    return fig


def figure_code_nats():
    """Cost of the codes of a test image under three priors, and the distortion, in nats.

    Their sum is minus the lower bound of log p(x). "Frequency": all places independent, with the
    frequencies of the codes in the training set.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.2), layout="constrained")
    for ax, (name, label) in zip(axes, DATA.items()):
        run = records.load(f"vq_vae_{name}")
        found, config = run["scalars"], run["config"]
        keys = ["uniform_nats", "frequency_nats", "test_prior_nats"]
        cost, places = [found[key] for key in keys], np.arange(3)
        ax.barh(places, cost, color=COLOUR["vq_vae"], label="codes")
        ax.barh(places, found["test_distortion"], left=cost, color="0.75", label="distortion")
        ax.set(yticks=places, yticklabels=["uniform", "frequency", "PixelCNN"], xlabel="nats")
        ax.set_title(f"{label}, K = {config['K']}", fontsize=8)
        ax.invert_yaxis()
    axes[0].legend(fontsize=7, loc="lower right")
    return fig


def figure_vq_collapse():
    """What it costs when test images exchange their latents, and the rate, while models train.

    Digits, a grid of 2 x 2 latents. Left: rise of minus log p(x | z), mean of five random
    exchanges. Where the decoder sees the pixels before, normal latents without warm-up fall silent,
    and codes do not. Right: the rates of both models with codes lie on each other.
    """
    import matplotlib.pyplot as plt

    curves = records.load("vq_collapse_digits")["curves"]
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), layout="constrained")
    for name, label in MODELS.items():
        look = {"color": COLOUR["vq_vae" if name.startswith("codes") else "vae"], "label": label}
        look["ls"] = ":" if name.endswith("plain") else "--" if name.startswith("warm") else "-"
        for ax, part in zip(axes, ("test_cost_of_permuting", "test_rate")):
            curve = curves[f"{name}/{part}"]
            ax.plot(curve["steps"], curve["values"], **look)
    axes[0].set(xlabel="steps", ylabel="cost of an exchange, nats")
    axes[1].set(xlabel="steps", ylabel="rate, nats", ylim=(0, None))
    axes[1].legend(fontsize=7, loc="upper right", bbox_to_anchor=(1, 0.92))
    return fig


# %% [markdown]
# ## Exercises
#
# **1. The best code.** Given the decoder and the prior, which one-hot posterior has the largest
# ELBO? Find an image of a small model for which it is not the one of the nearest codes, and compare
# the bounds.
#
# ```{admonition} Solution
# :class: dropdown
#
# The one at $\operatorname{argmax}_z\, \log p(z) + \log p_\theta(x \mid z)$: by {eq}`eq-vq-bound`
# the bound is that summand. Finding it takes a search over $K^N$ grids, so it is no encoder; the
# distance in the space of codes is a stand-in. In an untrained model it nearly always loses.
# ```


# %% tags=["hide-cell"]
def test_exercise_vq_nearest_code_is_not_the_best_code():
    params, x, grids = small_vq(), small_images(), every_grid(5)
    nearest_bound = vq_terms(params, x)[0][0] - 4 * np.log(5)
    table = log_liks_of_all(params, x, grids) - 4 * np.log(5)
    best = np.max(table, axis=1)
    assert np.all(best >= nearest_bound - 1e-12) and np.any(best > nearest_bound + 0.1)
    assert np.all(best < sc.logsumexp(table, axis=1))  # still a bound


# %% [markdown]
# **2. Of what is it the gradient?** Let $\ell(z) = \frac12 (z - t)^\top A\, (z - t)$ with a
# symmetric $A$. The straight-through field is $A (e_k - t)$ on cell $k$. Show that for $A = \alpha
# I$, $\alpha > 0$, it is the gradient of a continuous, convex function of $z_e$, and that for other
# $A$ it is in general not a gradient. What is special in one dimension?
#
# ```{admonition} Solution
# :class: dropdown
#
# The nearest code has the largest $e_k^\top z - \frac12 \|e_k\|^2$. So for $A = \alpha I$ the field
# $\alpha (e_k - t)$ is the gradient of $\alpha \big( \max_k (e_k^\top z - \frac12 \|e_k\|^2) -
# t^\top z \big)$, a maximum of linear functions. A field that is constant on both sides of a border
# is a gradient only if its jump is orthogonal to the border, that is, parallel to $e_i - e_j$; here
# the jump is $A (e_i - e_j)$, and for three codes in general position all three differences must be
# eigenvectors of $A$. Otherwise the integral along a border on one side and back on the other is
# not zero, and no loss has this gradient. In one dimension every field is a gradient: of a
# piecewise linear function with slope $\ell'(e_k)$ on cell $k$.
# ```


# %% tags=["hide-cell"]
def test_exercise_vq_straight_through_is_a_gradient_for_spheres_only():
    rng = np.random.default_rng(8)
    codebook, t = rng.standard_normal((5, 2)), rng.standard_normal(2)
    z = rng.normal(size=(200, 2))

    def field(z, A):
        return (quantise(codebook, z)[1] - t) @ A

    potential = lambda z: np.sum(
        np.max(1.7 * (z @ codebook.T - 0.5 * np.sum(codebook**2, axis=1)), axis=1) - 1.7 * z @ t
    )
    np.testing.assert_allclose(grad(potential)(z), field(z, 1.7 * np.eye(2)), atol=1e-13)
    angle = np.linspace(0, 2 * np.pi, 100_001)
    circle = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    middle, step = (circle[1:] + circle[:-1]) / 2, np.diff(circle, axis=0)
    around = lambda A: np.sum(field(middle, A) * step)
    assert abs(around(1.7 * np.eye(2))) < 1e-3 < 0.1 < abs(around(np.diag([0.2, 2.0])))


# %% [markdown]
# **3. Averages as a gradient.** Derive {eq}`eq-vq-average-step` from {eq}`eq-vq-average`. Which
# codebook is a fixed point if every batch has the same rows, and how fast is it approached?
#
# ```{admonition} Solution
# :class: dropdown
#
# With new values primed, $e' = (\gamma \bar s + (1 - \gamma)\, s) / \bar n'$, where
# $\bar s = \bar n\, e$ and $\gamma \bar n = \bar n' - (1 - \gamma)\, n$. So
# $e' = e + (1 - \gamma)(s - n e) / \bar n'$. The fixed point is $e = s / n$, the mean of the rows.
# As long as the assignments do not change, $\bar s - s$ and $\bar n - n$ both shrink by $\gamma$ at
# every step; with $\bar n = n$ from the start, so does $e - s / n$.
# ```


# %% tags=["hide-cell"]
def test_exercise_vq_averages_approach_the_means_by_their_decay():
    z_e = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, -4.0]])
    e, counts = np.array([[0.5, 0.5]]), np.array([3.0])
    distances = []
    for _ in range(20):
        distances.append(np.linalg.norm(e - z_e.mean(0)))
        e, counts = moving_average(e, counts, np.zeros(3, int), z_e, 0.8)
    np.testing.assert_allclose(np.divide(distances[1:], distances[:-1]), 0.8, rtol=1e-10)


# %% [markdown]
# **4. What a prior can gain.** Let $q(z)$ be the law of the grids of codes over the images. Show
# that the mean cost $-\mathbb{E}[\log p(z)]$ is at least the entropy of $q(z)$, and that a prior of
# independent places, all with the same frequencies, costs at least $N$ times the logarithm of the
# perplexity. How much do the codes say about the image?
#
# ```{admonition} Solution
# :class: dropdown
#
# The cost is $H(q(z)) + \mathrm{KL}(q(z) \| p)$. For $p(z) = \prod_n p(z_n)$ it is
# $-N \sum_k \bar p_k \log p(k) = N \big( H(\bar p) + \mathrm{KL}(\bar p \| p) \big)$, and the
# logarithm of the perplexity is $H(\bar p)$. As $z$ is a function of $x$, the mutual information is
# the entropy of $z$: the cost under the best prior is what the codes say, to the last nat. The
# learned cost is an upper bound of it.
# ```


# %% tags=["hide-cell"]
def test_exercise_vq_cost_of_codes_is_at_least_their_entropy():
    rng = np.random.default_rng(9)
    grids, q = every_grid(3), rng.dirichlet(np.full(81, 0.2))
    entropy = -np.sum(sc.xlogy(q, q))
    frequency = np.array([q @ np.mean(grids == k, axis=(1, 2)) for k in range(3)])
    independent = -q @ np.sum(np.log(frequency)[grids], axis=(1, 2))
    log_perplexity = -np.sum(sc.xlogy(frequency, frequency))
    assert independent == pytest.approx(4 * log_perplexity)
    assert entropy < independent < 4 * np.log(3)
    prior = code_prior_init(rng, 3, 4, 1, dtype=np.float64)
    assert -q @ code_log_prob(prior, grids) > entropy


# %% [markdown]
# **5. A place to rest.** Derive {eq}`eq-vq-rest`. For which $\beta$ does the resting place lie
# inside the cell of the code, if the nearest border in the direction $-g$ is $r$ away from the
# code? What does that say about very small and very large $\beta$?
#
# ```{admonition} Solution
# :class: dropdown
#
# Straight-through gives $g$, the commitment term $2\beta(z_e - z_q)$; their sum vanishes at $z_q -
# g / (2 \beta)$. It lies in the cell if $\|g\| / (2\beta) < r$. With a smaller $\beta$ the output
# crosses into the next cell, as it should if the gradient is strong; with a very large one it never
# does, and the codes that the first steps have chosen are kept. With a very small one it crosses at
# the slightest gradient; in an unbounded cell there is no border, and the output rests far away.
# ```


# %% tags=["hide-cell"]
def test_exercise_vq_commitment_decides_which_gradients_cross():
    codebook = np.array([[0.0], [1.0]])  # border at 0.5 = r

    def rest(beta, g=-0.4):
        z_e = np.array([[0.1]])
        for _ in range(600):
            k, z_q = quantise(codebook, z_e)
            if k[0] == 1:
                return "crossed"
            z_e = z_e - 0.05 * (g + 2 * beta * (z_e - z_q))
        return z_e[0, 0]

    assert rest(1.0) == pytest.approx(0.2) and rest(0.5) == pytest.approx(0.4)
    assert rest(0.39) == "crossed"  # |g| / (2 β) = 0.51
