# %% [markdown]
# # 9. An atlas of estimators
#
# Chapters 3, 6, 7 and 8 have built a dozen ways to differentiate the expectation of a program that
# tosses coins. Which one should be used? Papers answer with curves of their own model. Here all
# estimators are put on the same problems, from 1 to 200 bits, where the exact gradient is a sum, or
# has a closed form, or is known with an error bar. First the family is completed by three of the
# best, which need no relaxation or no training: ARM, DisARM, and double control variates. Then
# bias, variance and cost of each are measured, and made comparable: a variance means nothing
# without its price, nor without its bias. The chapter ends in one figure and one table.
#
# **Reads after:** 3, 6, 7, 8 · **Runs in:** 10 s · **Papers:**
# {cite}`yin2019arm,dong2020disarm,yin2020probabilistic,titsias2022double`,
# {cite}`kool2019buy,paulus2021rao`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $S$ | number of samples, each a replica of the estimate | () |
# | $B$ | number of data in a batch | () |
# | $D$ | dimension of an event: the number of bits of a sample, or of pixels of an image | () |
# | $k$ | number of inner samples that one replica consumes | () |
# | $f$ | function whose expectation is differentiated | () for each sample |
# | $a$ | logits of the bits | (S, B, D) |
# | $\sigma(\cdot)$ | logistic function, $\sigma(s) = 1 / (1 + e^{-s})$ | any |
# | $\beta$ | probability of a one; $\beta = \sigma(a)$ | (S, B, D) |
# | $b$ | discrete sample, of zeros and ones | (S, B, D) |
# | $\tilde b$ | the antithetic sample, made with the opposite noise | (S, B, D) |
# | $u$ | uniform noise, in $(0, 1)$ | (S, B, D) |
# | $\ell$ | logistic noise of a bit, $\log \frac{u}{1 - u}$ | (S, B, D) |
# | $s(b)$ | score of the bits, $b - \beta$ | (S, B, D) |
# | $G$ | estimate of $\nabla_\phi J$ from one sample, or from $k$; $\phi$: logits | (S, B, D) |
# | $g$ | exact gradient of $\mathbb{E}[f(b)]$ in the logits | (B, D) |
# | $p$ | probability that the two values of a bit in a pair differ | (D,) |
# | $\Delta$ | influence of a bit: the mean of $f$ if it is one, minus that if it is zero | (D,) |
# | $r$ | the smaller of $\beta$ and $1 - \beta$ | (D,) |
# | $\eta$ | scale of the control variate | () |
# | $\lambda$ | temperature of a relaxation | () |
# | $\kappa$ | derivative of $\tilde z$ in its logit, as in Chapter 8 | (S, B, D) |
# | $C$ | cost of one estimate, in evaluations of $f$ | () |
# | $N$ | budget, in evaluations of $f$ | () |
# | $\delta$ | relative bias of an estimator | () |
# | $\nu$ | noise of an estimator at equal cost | () |
# | $w$ | weights of the bits in the test functions | (D,) |

# %% [markdown]
# ## Derivation
#
# ### What is to be compared
#
# An estimator returns $G$, and what counts is how far $G$ is from the exact gradient $g$. The mean
# square distance, summed over all logits, splits into what an average over replicas removes and
# what it does not,
#
# $$ \mathbb{E}\, |G - g|^2 = \big| \mathbb{E}[G] - g \big|^2
#    + \mathrm{tr}\, \mathrm{Cov}[G] . $$ (eq-atlas-split)
#
# Estimates differ in price. Leave-one-out takes two evaluations of $f$, REBAR two and a derivative,
# the score function one. The cheap one may be averaged over more replicas. So fix a budget of $N$
# evaluations, let one estimate cost $C$ of them, and average the $N/C$ replicas that the budget
# pays for. Relative to the squared length of the gradient, the error is
#
# $$ \frac{\mathbb{E}\, |\bar G - g|^2}{|g|^2} = \delta^2 + \frac{\nu}{N} , \qquad
#    \delta = \frac{\big| \mathbb{E}[G] - g \big|}{|g|} , \qquad
#    \nu = C\; \frac{\mathrm{tr}\, \mathrm{Cov}[G]}{|g|^2} . $$ (eq-atlas-error)
#
# Two numbers for each estimator and problem. $\delta$ is the relative bias. $\nu$ is the *noise at
# equal cost*, and has a simple meaning: with a budget of $N = \nu$ evaluations the noise is as
# large as the gradient, and with $100\, \nu$ a tenth of it. An unbiased estimator has nothing but
# $\nu$. A biased one is of use as long as $N$ is well below $(\nu_{\mathrm{other}} - \nu) /
# \delta^2$, where an unbiased one with $\nu_{\mathrm{other}}$ overtakes it.
#
# What is an evaluation? Where $f$ is a network, its cost is that of its matrix products. A
# derivative *in the bits* takes, besides the evaluation, one product per layer, of the same size
# (no weight is differentiated). So we count an evaluation as 1, and a derivative in the bits as 1
# more. The first is counted by a wrapper around $f$, not by us, and seconds are measured besides.
# What is not counted: the training of REBAR's and RELAX's control variates, and RELAX's own
# network.

# %% [markdown]
# ### ARM: antithetic noise
#
# Chapter 8 looked at bits as signs, $b = 1[z > 0]$ with $z = a + \ell$, and used the score of the
# *logistic* law, {eq}`eq-cv-logistic-score`. In uniform noise $u = \sigma(\ell)$ it is
# $\tanh(\ell / 2) = 2u - 1$ and the bit is $b = 1[u > 1 - \beta]$, so
#
# $$ g = \mathbb{E}\big[ f(b)\, (2u - 1) \big] . $$ (eq-atlas-augmented)
#
# Chapter 8 dropped this for the score $s(b)$, which is its mean given $b$ and has less variance.
# But the noise has a symmetry that the bit has not. $1 - u$ is uniform as well. With it the bit is
# $\tilde b = 1[1 - u > 1 - \beta] = 1[u < \beta]$ and the score changes its sign, so that $g$ is
# also $-\mathbb{E}[f(\tilde b)\, (2u - 1)]$. The mean of both is ARM (augment, REINFORCE, merge)
# {cite}`yin2019arm`:
#
# $$ G_{\mathrm{ARM}} = \big( f(b) - f(\tilde b) \big) \big( u - \tfrac12 \big) , \qquad
#    b = 1[u > 1 - \beta], \quad \tilde b = 1[u < \beta] . $$ (eq-atlas-arm)
#
# A constant added to $f$ drops out, without a baseline. Where no bit changes between $b$ and
# $\tilde b$ the estimate is zero, for all bits at once. That happens often if the bits are nearly
# decided.

# %% [markdown]
# ### DisARM: the noise taken out again
#
# The price was the score of the noise, which varies even where $b$ and $\tilde b$ do not. So take
# the mean given both {cite}`dong2020disarm,yin2020probabilistic` (the second paper calls it U2G).
# Bit $i$ of the pair depends on $u_i$ alone. If it is the same in both, $u_i$ is in an interval
# with centre $\frac12$: between $\beta_i$ and $1 - \beta_i$. The mean of $u_i - \frac12$ is 0. If
# $b_i = 1$ and $\tilde b_i = 0$, then $u_i$ exceeds both $\beta_i$ and $1 - \beta_i$, of which the
# larger is $\sigma(|a_i|)$, and
#
# $$ \mathbb{E}\big[ u_i - \tfrac12 \,\big|\, b, \tilde b \big]
#    = \tfrac12\, (b_i - \tilde b_i)\, \sigma(|a_i|) , \qquad
#    \boxed{\; G_{\mathrm{DisARM}} = \tfrac12 \big( f(b) - f(\tilde b) \big)\,
#    (b - \tilde b) \odot \sigma(|a|) \;} $$ (eq-atlas-disarm)
#
# since for $b_i = 0$, $\tilde b_i = 1$ the sign is the opposite. As a conditional expectation of
# ARM it has the same mean, and by the law of total variance no coordinate of it can have more
# variance, for any $f$ and any number of bits (Rao and Blackwell).

# %% [markdown]
# ### Every pair will do
#
# Compare with leave-one-out, {eq}`eq-score-leave-one-out` with $k = 2$:
# $G = \frac12 (f(b) - f(b'))\, (b - b')$ with an *independent* pair. That is DisARM without the
# factor $\sigma(|a|)$. Both are cases of one formula. Draw a pair of bit vectors such that each bit
# has the right law in both, the two may be exchanged, and different bits have nothing to do with
# each other. Let $p_i$ be the probability that the pair differs in bit $i$. Then
#
# $$ G_i = \frac12\, \big( f(b) - f(b') \big)\, (b_i - b'_i) \;
#    \frac{2 \beta_i (1 - \beta_i)}{p_i} $$ (eq-atlas-pair)
#
# is unbiased. For with probability $p_i / 2$ it is $b_i = 1$ and $b'_i = 0$, while the other bits
# of $b$ are as they always are. So $\mathbb{E}[f(b)\, (b_i - b'_i)]$ is $\frac12 p_i\, \Delta_i$,
# where $\Delta_i = \mathbb{E}[f \mid b_i = 1] - \mathbb{E}[f \mid b_i = 0]$ is the *influence* of
# the bit, and $-\mathbb{E}[f(b')\, (b_i - b'_i)]$ is the same; and the exact gradient is
# $g_i = \beta_i (1 - \beta_i)\, \Delta_i$.
#
# Independent bits differ with probability $p_i = 2 \beta_i (1 - \beta_i)$, and the factor is 1.
# No pair can differ more often than with $p_i = 2 r_i$, where $r_i$ is the smaller of
# $\beta_i$ and $1 - \beta_i$: of the two values, each must have its share. Antithetic noise attains
# that, and the factor is $\beta_i (1 - \beta_i) / r_i = \sigma(|a_i|)$ again.

# %% [markdown]
# ### One bit
#
# All three estimators of a pair are $\Delta$ times a number. The integrals are elementary:
#
# $$ \begin{aligned}
#    \text{leave one out:} \quad & \mathrm{Var}[G] = \Delta^2 \big(
#      \tfrac12 r (1 - r) - r^2 (1 - r)^2 \big) \\
#    \text{ARM:} \quad & \mathrm{Var}[G] = \Delta^2 \big(
#      \tfrac12 r - r^2 + \tfrac23 r^3 - r^2 (1 - r)^2 \big) \\
#    \text{DisARM:} \quad & \mathrm{Var}[G] = \Delta^2\, r (1 - r)^2
#      \big( \tfrac12 - r \big)
#    \end{aligned} $$ (eq-atlas-one-bit)
#
# For a fair bit DisARM is exact: the pair always differs, and its difference is the influence. For
# a rare one, $r \to 0$, all three agree, at $\frac12 \Delta^2 r$. The pair rarely differs then,
# however it was drawn ({numref}`fig-one-pair`).
#
# One bit flatters ARM. In ARM *every* bit's noise multiplies the difference, also the noise of a
# bit that is the same in both. Exercise 2 finds the price for many bits: for rare ones it has no
# bound.

# %% [markdown]
# ### Double control variates
#
# Leave-one-out replaces a baseline by the values at the other samples. A derivative of $f$, where
# there is one, says more. For $f$ a network it comes nearly free. Titsias and Shi
# {cite}`titsias2022double` use it twice, in the value and in its baseline. MuProp's tangent,
# {eq}`eq-cv-muprop`, has its slope at the mean of the bits, where no sample ever is. Here the slope
# for sample $j$ is the mean of $f'$ at the *other* samples, $\bar f'_{-j} = \frac{1}{k - 1}
# \sum_{l \ne j} f'(b_l)$, and the value is replaced by
#
# $$ h_j = f(b_j) - \eta\, \bar f'_{-j} \cdot (b_j - \beta) . $$ (eq-atlas-residual)
#
# Then leave-one-out is applied to $h$. What does this do to the mean? In $h_j\, s(b_j)$ the slope
# is independent of $b_j$, so that bit $i$ loses $\eta\, \mathbb{E}[f'_i]\, \mathbb{E}[s_i^2]$ with
# $\mathbb{E}[s_i^2] = \beta_i (1 - \beta_i)$. In $h_l\, s(b_j)$ with $l \ne j$ the slope may
# contain $b_j$, but not $b_l$; the mean over $b_l$ is zero. So it suffices to add the first loss
# back:
#
# $$ G = \frac1k \sum_{j=1}^{k} \Big( h_j - \frac{1}{k - 1} \sum_{l \ne j} h_l \Big)\, s(b_j)
#    \;+\; \eta\, \Big( \frac1k \sum_{j=1}^{k} f'(b_j) \Big) \odot \beta (1 - \beta) .
# $$ (eq-atlas-double)
#
# It is unbiased for every $\eta$, provided that "independent of its own sample" is obeyed. With
# $\eta = 0$ it is leave-one-out. Where $f$ is linear and $\eta = 1$ it is exact.

# %% [markdown]
# ### The others
#
# Of Chapter 8 the atlas takes REBAR and RELAX in the form of {eq}`eq-cv-one-pass`, one evaluation
# of the control variate and one derivative, in which the published autoencoders were trained:
#
# $$ G = \big( f(b) - c(z) \big)\, s(b) + (1 - \kappa) \odot c'(z) , \qquad
#    \kappa = \big( 1 - e^{-|z|} \big)\, \sigma(\pm a) . $$ (eq-atlas-one-pass)
#
# NVIL's network predicts $\mathbb{E}[f]$ from the image. For one image, or for a fixed set, that is
# a constant for each: the entry "best constant" is this mean, NVIL with the training behind it.
# (For many bits it is close to the best baseline {eq}`eq-score-best-baseline`, which is another
# number for each bit.) VIMCO is not in the atlas. It estimates the gradient of another objective,
# the bound with $k$ samples ({eq}`eq-iw-vimco`), and would have a "bias" here that is none.

# %% [markdown]
# ## By hand
#
# {eq}`eq-atlas-arm` and {eq}`eq-atlas-disarm` in NumPy, from given uniform noise. `f` maps bits
# $(\dots, D)$ to values $(\dots)$.

# %%
import numpy as np
import pytest
import scipy.special as sc

from chapters.ledger import claim


def arm_by_hand(f, a, u):
    """ARM estimates (..., D) from uniform noise `u` (..., D): Eq. (eq-atlas-arm)."""
    beta = sc.expit(a)
    b, other = np.where(u > 1 - beta, 1.0, 0.0), np.where(u < beta, 1.0, 0.0)
    return (f(b) - f(other))[..., None] * (u - 0.5)


def disarm_by_hand(f, a, u):
    """DisARM estimates (..., D) from uniform noise `u` (..., D): Eq. (eq-atlas-disarm)."""
    beta = sc.expit(a)
    b, other = np.where(u > 1 - beta, 1.0, 0.0), np.where(u < beta, 1.0, 0.0)
    difference = (f(b) - f(other))[..., None]
    return 0.5 * difference * (b - other) * np.maximum(beta, 1 - beta)


# %% [markdown]
# ## With minigrad
#
# In logistic noise $\ell$ the opposite noise is $-\ell$, and nothing is lost to rounding where
# $\beta$ is near 0 or 1, which in float32 is soon: $b = 1[a + \ell > 0]$, $\tilde b = 1[a - \ell >
# 0]$, $u - \frac12 = \frac12 \tanh \frac{\ell}{2}$. In the signature of the book $k$ counts
# evaluations of $f$. Antithetic estimators need an even number.

# %%
from chapters.ch03_score_function import leave_one_out, score, score_function
from chapters.ch07_concrete import (
    concrete,
    exact_moments,
    gumbel_rao,
    gumbel_straight_through,
    gumbel_straight_through_at,
    hard_bits,
    straight_through,
)
from chapters.ch08_control_variates import lax, logistic_log_prob, muprop, relax, with_slopes
from minigrad import random, vjp
from minigrad.special import expit


def pair_noise(rng, logits, k):
    """Logistic noise (k / 2, S, B, D): one for each antithetic pair."""
    if k < 2 or k % 2:
        raise ValueError(f"antithetic samples come in pairs: k must be even, got {k}")
    return random.logistic(rng, (k // 2, *logits.shape), logits.dtype)


def arm_at(f, logits, noise):
    """One estimate for each noise: Eq. (eq-atlas-arm)."""
    b, other = hard_bits(logits + noise), hard_bits(logits - noise)
    return 0.5 * (f(b) - f(other))[..., None] * np.tanh(noise / 2)


def disarm_at(f, logits, noise):
    """One estimate for each noise: Eq. (eq-atlas-disarm)."""
    b, other = hard_bits(logits + noise), hard_bits(logits - noise)
    return 0.5 * (f(b) - f(other))[..., None] * (b - other) * expit(np.abs(logits))


def arm(f, logits, rng, *, k=2):
    """ARM estimates from k / 2 antithetic pairs."""
    return np.mean(arm_at(f, logits, pair_noise(rng, logits, k)), axis=0)


def disarm(f, logits, rng, *, k=2):
    """DisARM estimates from k / 2 antithetic pairs."""
    return np.mean(disarm_at(f, logits, pair_noise(rng, logits, k)), axis=0)


# %%
def double_control_variate_at(f, logits, b, scale):
    """Estimates (..., D) from samples `b` (k, ..., D): Eq. (eq-atlas-double)."""
    k, s = len(b), score(b, logits)
    values, slopes = with_slopes(f, b)
    others = (np.sum(slopes, axis=0) - slopes) / (k - 1)
    h = values - scale * np.sum(others * s, axis=-1)  # Eq. (eq-atlas-residual)
    signal = (h - np.mean(h, axis=0)) * (k / (k - 1))
    direct = scale * np.mean(slopes, axis=0) * expit(logits) * expit(-logits)
    return np.mean(signal[..., None] * s, axis=0) + direct


def double_control_variate(f, logits, rng, *, k=2, scale=1.0):
    """Leave-one-out with a tangent at the other samples in each value."""
    return double_control_variate_at(f, logits, random.bernoulli(rng, logits, k), scale)


def relax_in_one_pass(f, logits, rng, *, k=1, control):
    """RELAX with coupled noise: one evaluation of the control variate, one derivative."""
    z = logits + random.logistic(rng, (k, *logits.shape), logits.dtype)
    b = hard_bits(z)
    c, slope = with_slopes(control, z)
    kappa = -np.expm1(-np.abs(z)) * expit((2 * b - 1) * logits)  # Eq. (eq-cv-slope)
    return np.mean((f(b) - c)[..., None] * score(b, logits) + (1 - kappa) * slope, axis=0)


# %% [markdown]
# Autodiff knows nothing of this algebra. It takes the log-density of the logistic variable and
# differentiates it: once for each of the two noises.

# %%
from chapters.ch03_score_function import (
    all_bits,
    bernoulli_draws,
    bernoulli_vae_init,
    exact_elbo,
    exact_gradient_by_hand,
    log_joint,
    mean_elbo,
    replicate,
    rows_of,
    small_bernoulli_vae,
    some_logits,
    squared_error,
    total_log_prob,
    vae_gradient,
)
from minigrad import grad, tree
from minigrad.check import check_unbiased


def arm_by_autodiff(f, logits, noise):
    """The mean of two score-function estimates, in z = a + noise and in z = a - noise."""

    def one(noise):
        z = logits + noise
        _, pullback = vjp(lambda a: logistic_log_prob(z, a), np.broadcast_to(logits, z.shape))
        return pullback(np.broadcast_to(f(hard_bits(z))[..., None], z.shape))[0]

    return 0.5 * (one(noise) + one(-noise))  # Eq. (eq-atlas-augmented), twice


def test_atlas_estimates_by_hand_are_those_of_minigrad():
    rng = np.random.default_rng(0)
    for D in (1, 5):
        a, u = some_logits(D), rng.uniform(size=(200, D))
        noise = sc.logit(u)
        by_hand = arm_by_hand(squared_error, a, u)
        np.testing.assert_allclose(arm_at(squared_error, a, noise), by_hand, atol=1e-12)
        np.testing.assert_allclose(arm_by_autodiff(squared_error, a, noise), by_hand, atol=1e-12)
        by_hand = disarm_by_hand(squared_error, a, u)
        np.testing.assert_allclose(disarm_at(squared_error, a, noise), by_hand, atol=1e-12)


def test_atlas_one_pass_is_relax_with_coupled_noise():
    logits = replicate(some_logits(5), 100)
    control = lambda z: 0.8 * squared_error(expit(z / 0.5))
    found = [
        estimator(squared_error, logits, np.random.default_rng(1), control=control, **options)
        for estimator, options in ((relax_in_one_pass, {}), (relax, {"coupled": True}))
    ]
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-9)


def test_atlas_antithetic_estimators_refuse_an_odd_number_of_samples():
    for k in (0, 1, 3):
        with pytest.raises(ValueError, match="come in pairs"):
            arm(squared_error, np.zeros((1, 1, 2)), np.random.default_rng(0), k=k)


# %% [markdown]
# ## Checks
#
# ### Expectations without chance
#
# ARM and DisARM are polynomials in each $u_i$ between the places where the bit or its twin changes,
# which are $\beta_i$ and $1 - \beta_i$. Gauss's rule with two nodes in each of the three pieces is
# exact up to cubic polynomials, and that is enough for means *and* second moments. Estimators of
# independent samples are summed over all $k$-tuples of outcomes.


# %%
def noise_cells(logits):
    """Logistic noise (6^D, D), and weights: exact for the moments of `arm_at` and `disarm_at`."""
    t, w = np.polynomial.legendre.leggauss(2)
    columns, weights = [], []
    for beta in sc.expit(logits):
        edges = np.sort([0, beta, 1 - beta, 1])
        half = np.diff(edges)[:, None] / 2
        columns.append(np.ravel(edges[:-1, None] + half * (1 + t)))
        weights.append(np.ravel(half * w))
    u = np.stack(np.meshgrid(*columns, indexing="ij"), axis=-1).reshape(-1, len(logits))
    return sc.logit(u), np.prod(np.meshgrid(*weights, indexing="ij"), axis=0).ravel()


def tuples_of_bits(logits, k):
    """All k-tuples of outcomes (k, n, D), and their probabilities (n,)."""
    b = all_bits(len(logits))
    tuples = b[np.indices([len(b)] * k).reshape(k, -1)]
    return tuples, np.exp(np.sum(total_log_prob(logits, tuples), axis=0))


def weighted_moments(G, weights):
    """Mean and variance (D,) of estimates (n, D)."""
    mean = weights @ G
    return mean, weights @ (G - mean) ** 2


def pair_moments(name, f, logits, scale=1.0):
    """Exact mean and variance (D,) of an estimator of pairs."""
    if name in ("arm", "disarm"):
        noise, weights = noise_cells(logits)
        at = {"arm": arm_at, "disarm": disarm_at}[name]
        return weighted_moments(at(f, np.broadcast_to(logits, noise.shape), noise), weights)
    pairs, weights = tuples_of_bits(logits, 2)
    scale = 0.0 if name == "leave_one_out" else scale
    return weighted_moments(double_control_variate_at(f, logits, pairs, scale), weights)


@claim("X9")
@pytest.mark.parametrize("name", ["arm", "disarm", "leave_one_out", "double_control_variate"])
def test_atlas_estimators_of_pairs_have_the_gradient_as_their_exact_mean(name, record):
    worst = 0.0
    for D in (1, 2, 3, 4):
        for seed in range(3):
            logits = some_logits(D, seed)
            exact = exact_gradient_by_hand(squared_error, logits)
            mean, _ = pair_moments(name, squared_error, logits, scale=0.7)
            worst = max(worst, np.max(np.abs(mean - exact)) / np.max(np.abs(exact)))
    record(f"{name}, 1 to 4 bits: largest relative error of the exact mean", worst, limit=1e-12)
    assert worst < 1e-12


@claim("X9")
def test_atlas_double_control_variates_of_three_samples_are_unbiased_for_every_scale(record):
    logits, worst = some_logits(2), 0.0
    exact = exact_gradient_by_hand(squared_error, logits)
    triples, weights = tuples_of_bits(logits, 3)
    for scale in (-1.0, 0.0, 0.5, 1.0, 3.0):
        mean = weights @ double_control_variate_at(squared_error, logits, triples, scale)
        worst = max(worst, np.max(np.abs(mean - exact)) / np.max(np.abs(exact)))
    record("2 bits, 3 samples: largest relative error of the exact mean", worst, limit=1e-12)
    assert worst < 1e-12


# %% [markdown]
# That DisARM is ARM's mean given the pair is checked cell by cell: the noise is grouped by the pair
# that it makes. Then the consequence. It must hold for every $f$, so $f$ is drawn at random, a
# table of values for all outcomes.


# %%
def random_function(D, seed):
    """A function of D bits whose values are random numbers: a table."""
    table = np.random.default_rng([seed, D]).standard_normal(2**D)
    return lambda b: table[np.asarray(b @ 2.0 ** np.arange(D)[::-1], int)]


@claim("X9")
def test_atlas_disarm_is_the_mean_of_arm_given_the_pair(record):
    worst, ratios = 0.0, []
    for D in (1, 2, 3, 4):
        for seed in range(5):
            f, a = random_function(D, seed), some_logits(D, seed)
            noise, weights = noise_cells(a)
            bits = np.concatenate([hard_bits(a + noise), hard_bits(a - noise)], axis=1)
            _, pair = np.unique(bits, axis=0, return_inverse=True)
            total = np.bincount(pair, weights)
            for G, given in zip(arm_at(f, a, noise).T, disarm_at(f, a, noise).T):
                mean = np.bincount(pair, weights * G) / total
                worst = max(worst, np.max(np.abs(mean[pair] - given)))
            exact = exact_gradient_by_hand(f, a)
            for name in ("arm", "disarm"):
                np.testing.assert_allclose(pair_moments(name, f, a)[0], exact, atol=1e-13)
            ratios.append(pair_moments("disarm", f, a)[1] / pair_moments("arm", f, a)[1])
    ratios = np.concatenate(ratios)
    record("largest |E[ARM | pair] - DisARM|, random functions", worst, limit=1e-12)
    record("variance of DisARM / of ARM, largest of all coordinates", ratios.max(), limit=1)
    record("variance of DisARM / of ARM, smallest", ratios.min())
    assert worst < 1e-12 and ratios.max() < 1


def test_atlas_one_bit_variances():
    for a in (-3.0, -0.4, 0.0, 1.7):
        rare = sc.expit(-abs(a))
        v = rare * (1 - rare)
        exact = {  # Eq. (eq-atlas-one-bit)
            "leave_one_out": v / 2 - v**2,
            "arm": rare / 2 - rare**2 + 2 / 3 * rare**3 - v**2,
            "disarm": rare * (1 - rare) ** 2 * (0.5 - rare),
        }
        for name, variance in exact.items():
            found = pair_moments(name, lambda b: 5 + 3 * b[..., 0], np.array([a]))[1]
            np.testing.assert_allclose(found, 9 * variance, atol=1e-14)
        assert exact["disarm"] <= exact["arm"] <= exact["leave_one_out"]


# %% [markdown]
# {eq}`eq-atlas-pair` is tested with pairs that are neither independent nor antithetic: each bit
# of the second sample is made with the opposite noise with a given probability, else with fresh
# noise. The four outcomes of a pair of bits and their probabilities give the sum.


# %%
def mixed_pair_moments(f, logits, share):
    """Exact mean and variance (D,) of Eq. (eq-atlas-pair), antithetic with probability `share`."""
    beta = sc.expit(logits)
    rare, v = np.minimum(beta, 1 - beta), beta * (1 - beta)
    p = share * 2 * rare + (1 - share) * 2 * v
    b = all_bits(2 * len(logits))  # first all bits of b, then all of b'
    first, second = np.split(b, 2, axis=1)
    chance = np.where(first != second, p / 2, np.where(first == 1, beta - p / 2, 1 - beta - p / 2))
    G = 0.5 * (f(first) - f(second))[:, None] * (first - second) * 2 * v / p
    return weighted_moments(G, np.prod(chance, axis=1))


def test_atlas_every_pair_is_unbiased_and_the_ends_are_leave_one_out_and_disarm():
    for D in (1, 2, 4):
        logits = some_logits(D)
        exact = exact_gradient_by_hand(squared_error, logits)
        for r in (0.0, 0.3, 1.0):
            mean, variance = mixed_pair_moments(squared_error, logits, r)
            np.testing.assert_allclose(mean, exact, atol=1e-14)
            name = {0.0: "leave_one_out", 1.0: "disarm"}.get(r)
            if name:
                expected = pair_moments(name, squared_error, logits)[1]
                np.testing.assert_allclose(variance, expected, atol=1e-14)


@claim("X9")
def test_atlas_gumbel_rao_has_the_bias_of_gumbel_straight_through(record):
    logits = some_logits(2)
    exact = exact_gradient_by_hand(squared_error, logits)
    for temperature in (0.5, 1.0):
        mean, _ = exact_moments(gumbel_straight_through_at, squared_error, logits, temperature)
        bias = np.linalg.norm(mean - exact) / np.linalg.norm(exact)
        record(f"2 bits, temperature {temperature:g}: relative bias, exact", bias)
        samples = gumbel_rao(
            squared_error, replicate(logits, 140_000), np.random.default_rng(2),
            temperature=temperature, draws=2,
        )  # fmt: skip
        z = check_unbiased(samples, mean)
        record(f"2 bits, temperature {temperature:g}: largest |z| from that mean", z, limit=5.0)
        assert bias > 0.02
        with pytest.raises(AssertionError, match="biased"):
            check_unbiased(samples, exact)


@claim("X9")
@pytest.mark.parametrize(
    "estimator, k",
    [(arm, 4), (disarm, 2), (disarm, 4), (leave_one_out, 3), (double_control_variate, 3)],
)
def test_atlas_estimators_as_used_are_unbiased(estimator, k, record):
    logits, rng = some_logits(4), np.random.default_rng(3)
    samples = estimator(squared_error, replicate(logits, 120_000), rng, k=k)
    z = check_unbiased(samples, exact_gradient_by_hand(squared_error, logits))
    record(f"{estimator.__name__}, k = {k}: largest |z| of 4 coordinates", z, limit=5.1)


# %% [markdown]
# ## The problems
#
# Two functions with a closed form at any number of bits. The quadratic one is Chapter 3's,
# $(w^\top b - t)^2$; the product of {eq}`eq-score-product-function` is far from any sum:
#
# $$ \begin{aligned}
#    \mathbb{E}\big[ (w^\top b - t)^2 \big] &= (w^\top \beta - t)^2
#      + \sum_i w_i^2\, \beta_i (1 - \beta_i), \\
#    \mathbb{E}\Big[ \prod_i (1 + w_i b_i) \Big] &= \prod_i (1 + w_i \beta_i) .
#    \end{aligned} $$ (eq-atlas-closed)
#
# The engine differentiates these. The weights shrink as $1/\sqrt D$, so that with many bits each
# has a small influence, and the logarithm of the product still has a standard deviation of 0.6.

# %%
from typing import NamedTuple


class Problem(NamedTuple):
    """A function f of bits (..., B, D), the logits (B, D), and the exact gradient in them."""

    f: object
    logits: np.ndarray
    exact: np.ndarray
    error: np.ndarray  # standard error of `exact`; zero where it is exact
    inputs: tuple  # what RELAX's network sees besides z: arrays (B, n) or (n,)


def product(b):
    """Product of 1 + w b for bits (..., D), with weights from 0.6 to 2 that are scaled by 1/√D."""
    D = b.shape[-1]
    return np.prod(1 + np.linspace(0.6, 2.0, D) / np.sqrt(D) * b, axis=-1)


def squared_error_mean(a):
    """E[squared_error(b)] for logits (D,): Eq. (eq-atlas-closed)."""
    w, beta = np.linspace(0.3, 1.0, len(a)) / np.sqrt(len(a)), expit(a)
    return (w @ beta - 0.2) ** 2 + np.sum(w**2 * beta * (1 - beta))


CLOSED = {  # name: the function, and its expectation
    "quadratic": (squared_error, squared_error_mean),
    "product": (product, lambda a: product(expit(a))),
}


def closed_problem(name, D):
    """A problem of D bits with a known gradient."""
    f, mean = CLOSED[name]
    logits = some_logits(D)
    exact = grad(mean)(logits)[None]
    return Problem(f, logits[None], exact, np.zeros_like(exact), (np.ones(1),))


def test_atlas_closed_forms_are_the_sums_over_all_bits():
    for name, (f, mean) in CLOSED.items():
        for D in (1, 2, 6, 10):
            exact = exact_gradient_by_hand(f, some_logits(D))
            np.testing.assert_allclose(closed_problem(name, D).exact[0], exact, rtol=1e-9)
        a, h = some_logits(200), 1e-4  # too many for a sum, not for a difference
        slopes = [(mean(a + h * e) - mean(a - h * e)) / (2 * h) for e in np.eye(200)[:5]]
        np.testing.assert_allclose(closed_problem(name, 200).exact[0, :5], slopes, rtol=1e-5)


# %% [markdown]
# The third problem is the one that matters in practice: the ELBO of Chapter 3's Bernoulli VAE as a
# function of the bits, at the logits that the encoder gives to an image. (The logits inside
# $\log q$ stay where they are: by {eq}`eq-score-elbo-gradient` their own derivative has mean zero.)
# With ten bits the sum over all outcomes is the truth, for each image.


# %%
def elbo_of_bits(decoder, logits, x, mean):
    """f for one layer of latents: bits (..., B, d) to log p(x, b) - log q(b) of each image."""
    return lambda b: log_joint(decoder, x, [b], mean) - total_log_prob(logits, b)


def gradient_of_all_bits(f, logits):
    """Exact gradient (B, D) of the expectation for each of B data, by the sum over all bits."""
    b = np.repeat(all_bits(logits.shape[-1])[:, None], len(logits), axis=1)
    weights = np.exp(total_log_prob(logits, b)) * f(b)
    return np.sum(weights[..., None] * score(b, logits), axis=0)


# %% [markdown]
# ### Any estimator trains a VAE
#
# Chapter 3's seam asks for estimates in the logits, and Chapter 8's methods are functions
# `(params, state, x, mean, rng) -> (f, gradient to ascend, new state)`. An estimator in the
# signature of the book fits in between as it stands, for one layer of latents: an image is a datum
# with one replica. The bits of the seam serve the decoder's gradient, which is pathwise. The
# estimator draws its own.

# %%
from chapters.ch08_control_variates import control_network, control_variate_init, training_step
from minigrad.core import plain
from minigrad.data import binarize, digits
from minigrad.optim import adam
from minigrad.train import fit


def method_of(estimator, **options):
    """A method, as in Chapter 8, for VAEs with one layer of bits, from an estimator."""

    def method(params, state, x, mean, rng):
        if (layers := len(params["encoder"])) != 1:
            raise ValueError(f"an estimator alone serves one layer of bits; this VAE has {layers}")

        def estimate(_f, logits, _bits):
            (a,) = logits  # (1, B, d)
            f = elbo_of_bits(params["decoder"], a, x, mean)
            return [estimator(f, a, rng, **options)], state

        return vae_gradient(params, x, mean, bernoulli_draws(rng), estimate)

    return method


METHODS = {
    "leave_one_out": method_of(leave_one_out),
    "arm": method_of(arm),
    "disarm": method_of(disarm),
    "double_control_variate": method_of(double_control_variate),
    "gumbel_rao": method_of(gumbel_rao),
}


@pytest.mark.parametrize("name", ["leave_one_out", "arm", "disarm", "double_control_variate"])
def test_atlas_methods_have_an_unbiased_gradient(name):
    params, x, mean = small_bernoulli_vae("nonlinear", B=1)
    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)["encoder"][0][-1]["b"]
    many, rng = np.repeat(x, 80_000, axis=0), np.random.default_rng(4)
    kept = []

    def keep(f, logits, rng, **options):  # the estimates of the seam, one row per copy of x
        kept.append(globals()[name](f, logits, rng, **options))
        return kept[-1]

    f, ascent, _ = method_of(keep)(params, {}, many, mean, rng)
    check_unbiased(kept[0][0], exact)
    np.testing.assert_allclose(ascent["encoder"][0][-1]["b"], np.mean(kept[0], axis=(0, 1)))
    assert f.shape == (1, 80_000)
    with pytest.raises(ValueError, match="one layer"):
        METHODS[name](small_bernoulli_vae("linear_2")[0], {}, x, mean, rng)


def test_atlas_method_of_a_batch_is_the_mean_over_its_images_and_hands_the_state_on():
    params, x, mean = small_bernoulli_vae("linear_1", B=3)
    value_as_gradient = lambda f, logits, rng: (
        f(np.ones_like(logits)[None])[0][..., None] + 0 * logits
    )
    method = method_of(value_as_gradient)
    gradient = lambda x: method(params, {"kept": 1}, x, mean, np.random.default_rng(0))[1][
        "encoder"
    ]
    whole = gradient(x)[0][0]
    alone = [gradient(image[None])[0][0] for image in x]
    for name in ("w", "b"):
        np.testing.assert_allclose(whole[name], np.mean([g[name] for g in alone], axis=0))
    assert method(params, {"kept": 1}, x, mean, np.random.default_rng(0))[2] == {"kept": 1}


def test_atlas_methods_train_on_digits():
    images = rows_of(digits().x_train)
    mean, x = images.mean(0), binarize(rows_of(digits().x_test), np.random.default_rng(5))
    for name, method in METHODS.items():
        rng = np.random.default_rng(6)
        params = bernoulli_vae_init(rng, [64, 16])
        before, optimizer = mean_elbo(params, x, mean, rng, k=5), adam(1e-2)
        state = {"params": params, "optimizer": optimizer.init(params), "control": {}}
        step = training_step(images, mean, optimizer, 50, method)
        params = fit(step, state, 100, rng, progress=False)[0]["params"]
        assert {leaf.dtype for leaf in tree.leaves(params)} == {np.dtype(np.float32)}
        assert mean_elbo(params, x, mean, rng, k=5) > before + 2, name


# %% [markdown]
# ### All under one signature
#
# `atlas` lists them with the options that a problem needs. Some must be told a number that a
# training would have found: the constant, the scales, the temperature, RELAX's control variate.
# They come in `tuned`, found on other samples than those that are measured. `control` is a function
# of $f$, since it evaluates $f$ at relaxed bits, and those evaluations are to be counted.


# %%
def rebar_control(f, temperature, scale):
    """REBAR's control variate, Eq. (eq-cv-rebar)."""
    return lambda z: scale * f(expit(z / temperature))


def relax_control(f, params, inputs):
    """RELAX's: REBAR's plus a network, Eq. (eq-cv-network), with Chapter 8's parameters."""
    temperature, scale = np.exp(params["log_temperature"][0]), params["scale"][0]
    guess = lambda z: control_network(params["networks"][0], [*inputs, z])
    return lambda z: scale * (f(expit(z / temperature)) + guess(z))


def atlas(f, inputs, tuned):
    """All estimators by name: a dict of (estimator, options)."""
    t = tuned["temperature"]
    return {
        "score_function": (score_function, {}),
        "baseline": (score_function, {"baseline": tuned["level"]}),
        "leave_one_out": (leave_one_out, {"k": 2}),
        "arm": (arm, {"k": 2}),
        "disarm": (disarm, {"k": 2}),
        "double_control_variate": (double_control_variate, {"k": 2, "scale": tuned["double"]}),
        "muprop": (muprop, {}),
        "lax": (lax, {"control": rebar_control(f, t, tuned["lax"])}),
        "rebar": (relax_in_one_pass, {"control": rebar_control(f, t, tuned["rebar"])}),
        "relax": (relax_in_one_pass, {"control": relax_control(f, tuned["relax"], inputs)}),
        "concrete": (concrete, {"temperature": 0.5}),
        "straight_through": (straight_through, {}),
        "gumbel_straight_through": (gumbel_straight_through, {"temperature": 0.5}),
        "gumbel_rao": (gumbel_rao, {"temperature": 0.5}),
    }


BIASED = ["concrete", "straight_through", "gumbel_straight_through", "gumbel_rao"]


# %% [markdown]
# A wrapper counts. A derivative shows itself by its argument: it arrives traced.


# %%
def counted(f):
    """f, and a dict that counts the rows which it evaluates and those it differentiates."""
    count = {"values": 0, "derivatives": 0}

    def wrapper(b):
        rows = plain(b)[..., 0].size
        count["values"] += rows
        count["derivatives"] += rows if b is not plain(b) else 0
        return f(b)

    return wrapper, count


def costs(problem, tuned):
    """Evaluations and derivatives of f that one estimate takes, by name: pairs."""
    found, rng = {}, np.random.default_rng(0)
    f, count = counted(problem.f)
    for name, (estimator, options) in atlas(f, problem.inputs, tuned).items():
        count.update(values=0, derivatives=0)
        estimator(f, replicate(problem.logits, 3), rng, **options)
        each = 3 * len(problem.logits)
        found[name] = count["values"] / each, count["derivatives"] / each
    return found


def quality(G, exact):
    """Relative bias, its standard error, and variance / squared gradient, of estimates (S, B, D).

    The square of the measured bias contains that of the noise of the mean, which is taken out.
    """
    size, variance = np.sum(exact**2), np.sum(np.var(G, axis=0, ddof=1))
    square = np.sum((np.mean(G, axis=0) - exact) ** 2) - variance / len(G)
    return np.sqrt(max(square, 0) / size), np.sqrt(variance / len(G) / size), variance / size


def test_atlas_quality_takes_the_noise_of_the_mean_out_of_the_bias():
    rng, exact = np.random.default_rng(20), np.array([[1.0, -2.0]])
    found = [quality(exact + rng.standard_normal((4, 1, 2)), exact)[0] for _ in range(400)]
    assert 0.4 < np.mean(np.array(found) == 0) < 0.8  # as often below zero as a chi-squared is
    biased, error, variance = quality(1.3 * exact + rng.standard_normal((100_000, 1, 2)), exact)
    assert abs(biased - 0.3) < 5 * error
    assert abs(variance - 2 / 5) < 0.02


def some_tuning(D):
    """Settings that nobody has tuned, with a random network."""
    control = control_variate_init(np.random.default_rng(7), [1, D], (5,))
    control["networks"][0]["layers"][-1]["w"] *= 0.1
    tuned = {"level": 0.3, "double": 1.0, "lax": 0.8, "rebar": 0.8, "temperature": 0.5}
    return tuned | {"relax": tree.map(lambda p: np.asarray(p, float), control)}


@claim("X10")
def test_atlas_costs_are_counted(record):
    problem = closed_problem("quadratic", 6)
    found = costs(problem, some_tuning(6))
    for name, (values, derivatives) in found.items():
        record(f"{name}: evaluations + derivatives of f", values + derivatives)
    assert found == {
        "score_function": (1, 0),
        "baseline": (1, 0),
        "leave_one_out": (2, 0),
        "arm": (2, 0),
        "disarm": (2, 0),
        "double_control_variate": (2, 2),
        "muprop": (2, 1),
        "lax": (2, 1),
        "rebar": (2, 1),
        "relax": (2, 1),
        "concrete": (1, 1),
        "straight_through": (1, 1),
        "gumbel_straight_through": (1, 1),
        "gumbel_rao": (1, 1),
    }


@claim("X9")
def test_atlas_all_unbiased_estimators_are_and_the_others_are_not(record):
    problem = closed_problem("quadratic", 3)
    logits = replicate(problem.logits, 150_000)
    for name, (estimator, options) in atlas(problem.f, problem.inputs, some_tuning(3)).items():
        G = estimator(problem.f, logits, np.random.default_rng(8), **options)
        bias, error, _ = quality(G, problem.exact)
        if name in BIASED:
            record(f"{name}: relative bias, 3 bits", bias)
            assert bias > max(0.02, 5 * error)
        else:
            z = check_unbiased(G, problem.exact)
            record(f"{name}: largest |z|, 3 bits", z, limit=5.1)


# %% [markdown]
# ## The atlas
#
# The record has seven problems: both functions with 10 and with 200 bits, and the ELBO of three
# VAEs on digits, for five images: linear maps with 10 bits, linear maps with 200, and networks with
# two hidden layers and 200. The VAEs stopped after 300 steps of training, where there is a gradient
# left to estimate. Ten bits were enumerated. For 200 the truth is an average over 100,000 replicas
# of RELAX for each image, and has an error bar, which is part of every comparison. Each estimator
# was run for 2,000 replicas, tuned on others.
#
# Before any figure: are the estimators what they should be on these problems, too? The largest
# deviation of a mean from the truth, in standard errors, over all coordinates of a problem, must be
# no more than chance allows for the unbiased ones, at up to 1,000 coordinates.

# %%
from pathlib import Path

from chapters import records

PROBLEMS = {
    "quadratic_few": "quadratic, 10 bits",
    "quadratic_many": "quadratic, 200 bits",
    "product_few": "product, 10 bits",
    "product_many": "product, 200 bits",
    "vae_few": "linear VAE, 10 bits",
    "vae_linear": "linear VAE, 200 bits",
    "vae_nonlinear": "nonlinear VAE, 200 bits",
}
LABEL = {
    "score_function": "score function",
    "baseline": "best constant (NVIL)",
    "leave_one_out": "leave one out",
    "arm": "ARM",
    "disarm": "DisARM",
    "double_control_variate": "double control variates",
    "muprop": "MuProp",
    "lax": "LAX",
    "rebar": "REBAR",
    "relax": "RELAX",
    "concrete": "Concrete",
    "straight_through": "straight-through",
    "gumbel_straight_through": "Gumbel straight-through",
    "gumbel_rao": "Gumbel-Rao",
}


def measured():
    """The scalars of the atlas: `measured()(key, estimator, problem)`."""
    scalars = records.load("estimator_atlas_digits")["scalars"]
    return lambda key, name, problem: scalars[f"{key}_{name}_{problem}"]


@claim("X10")
def test_atlas_record_has_no_bias_where_there_should_be_none(record):
    of = measured()
    for name in LABEL:
        z = {problem: of("z", name, problem) for problem in PROBLEMS}
        if name not in BIASED:
            record(f"{name}: largest |z| of all coordinates of all problems", max(z.values()),
                   limit=6.1)  # fmt: skip
            assert max(z.values()) < 6.1
        else:
            bias = of("bias", name, "vae_nonlinear")
            record(f"{name}: relative bias, nonlinear VAE", bias)
            assert z["vae_few"] > 6.1 and of("bias", name, "vae_few") > 0.1
    # The product is linear in each bit: there straight-through has no bias (Chapter 7).
    assert of("z", "straight_through", "product_many") < 6.1


@claim("X10")
def test_atlas_record_of_the_noise_at_equal_cost(record):
    of = measured()
    for name, text in LABEL.items():
        record(f"{text}: noise at equal cost, nonlinear VAE", of("noise", name, "vae_nonlinear"))
    for problem in PROBLEMS:
        assert of("noise", "disarm", problem) < of("noise", "arm", problem)
        assert of("noise", "leave_one_out", problem) < of("noise", "score_function", problem)
        assert of("noise", "gumbel_rao", problem) < of("noise", "gumbel_straight_through", problem)
        assert of("noise", "baseline", problem) < of("noise", "leave_one_out", problem)


# %% [markdown]
# ### What it shows
#
# {numref}`fig-atlas` is the atlas, {numref}`fig-noise-of-bits` follows the noise from 1 to 200
# bits, and the table has the numbers for 200 bits. Read $\nu$ as the number of evaluations for
# which the noise is as large as the gradient.
#
# **The level comes first.** On the VAEs the score function without a baseline has more than 100
# times the noise of the best constant. Leave-one-out with $k = 2$ has about twice that of the best
# constant: the price of not knowing the mean, {eq}`eq-score-leave-one-out-variance`.
#
# **Antithetic pairs** gain on the VAEs, where DisARM has 50 to 70 % of the noise of leave-one-out.
# On the two functions with 200 bits they gain little. (Half of the 20 % on the product in
# the table is the error of 2,000 replicas; with 20,000 the gain is 9 %.) Exercise 2 derives this
# for sums. ARM is worse than DisARM everywhere, as it must be, and on some problems worse than
# leave-one-out.
#
# **Tangents** are a matter of the function. The quadratic is nearly linear over the region where
# the bits are: with 200 of them MuProp and double control variates have less than a hundredth of
# the noise of leave-one-out, with ten a sixth. A decoder is not like that. MuProp's tangent is
# taken at the means, a place that the decoder has never been trained on, and is worse than a mere
# constant. Double control variates have a quarter more noise there *at equal cost* than
# leave-one-out, though less per estimate. Whoever needs the backward pass through the decoder
# anyway, for $\theta$, gets their slopes nearly free, and may halve $\nu$.
#
# **Relaxed control variates** are the best of the unbiased on VAEs with 200 bits, LAX included. The
# best temperature is then low, 0.1. On the VAE with ten bits they are no better than
# DisARM. RELAX's network,
# trained for 300 steps on top of the tuned REBAR, has gained nothing that could be measured here.
#
# **Biased estimators** are another world. On the VAEs with 200 bits their noise is 15 to 45 times
# lower than RELAX's, and their bias 7 to 16 % of the gradient. With ten bits, where each counts for
# more, the bias is 24 to 72 %. {numref}`fig-budget` shows when it matters. On the nonlinear VAE
# RELAX overtakes Concrete at about 5,000 evaluations for *each* image, and straight-through at
# about 30,000. A single step of training has nothing like it. But the steps average the noise, and
# they do not average the bias.
#
# **Temperature.** {numref}`fig-temperatures-compared` shows the bargain of Chapter 7 on a VAE, bias
# against noise, and that REBAR has a best temperature in between, above and below which noise
# grows.


# %%
def two_digits(value):
    """A number with two significant digits, and commas."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


NEEDS = dict.fromkeys(LABEL, "values") | {
    "double_control_variate": "slopes at bits",
    "muprop": "slope at means",
    "lax": "slope between",
    "rebar": "slope between",
    "relax": "slope between",
    "concrete": "slope between",
    "straight_through": "slope at bits",
    "gumbel_straight_through": "slope at bits",
    "gumbel_rao": "slope at bits",
}


def choice_table():
    """The table of the chapter as Markdown lines, from the record."""
    scalars, of, lines = records.load("estimator_atlas_digits")["scalars"], measured(), []
    for name, text in LABEL.items():
        noise = [two_digits(of("noise", name, p)) for p in PROBLEMS if not p.endswith("_few")]
        bias = f"{100 * of('bias', name, 'vae_nonlinear'):.0f} %" if name in BIASED else "none"
        time = two_digits(1000 * scalars[f"seconds_{name}_vae_nonlinear"])
        cells = [text, NEEDS[name], bias, f"{of('cost', name, 'vae_linear'):.0f}", *noise, time]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@claim("X10")
def test_atlas_table_is_that_of_the_record():
    text = Path(__file__).read_text(encoding="utf-8")
    missing = [line for line in choice_table() if f"# {line}\n" not in text]
    assert not missing, "the table in the text should have\n" + "\n".join(missing)


def test_atlas_disarm_gains_a_tenth_on_the_product(record):
    problem, rng, noise = closed_problem("product", 200), np.random.default_rng(0), []
    logits = np.broadcast_to(problem.logits, (2000, 1, 200))
    for estimator in (disarm, leave_one_out):
        G = np.concatenate([estimator(problem.f, logits, rng, k=2) for _ in range(10)])
        noise.append(np.sum(np.var(G, axis=0, ddof=1)))
    record("DisARM / leave-one-out: noise on the product, 20,000 replicas", noise[0] / noise[1])
    assert 0.88 < noise[0] / noise[1] < 0.94


@claim("X10")
def test_atlas_statements_about_the_record(record):
    scalars, of = records.load("estimator_atlas_digits")["scalars"], measured()
    noise = lambda name, problem: of("noise", name, problem)
    for problem in ("vae_linear", "vae_nonlinear"):
        assert noise("score_function", problem) > 100 * noise("baseline", problem)
        assert scalars[f"tuned_temperature_{problem}"] == 0.1
        assert 1.8 < noise("leave_one_out", problem) / noise("baseline", problem) < 2.3
        assert 0.5 < noise("disarm", problem) / noise("leave_one_out", problem) < 0.7
        assert noise("muprop", problem) > 5 * noise("leave_one_out", problem)
        double = noise("double_control_variate", problem) / noise("leave_one_out", problem)
        assert 1 < double < 1.4
        unbiased = [name for name in LABEL if name not in BIASED]
        best = sorted(unbiased, key=lambda name: noise(name, problem))[:3]
        assert set(best) == {"lax", "rebar", "relax"}
        assert abs(noise("relax", problem) / noise("rebar", problem) - 1) < 0.1
        assert 0.05 < min(of("bias", name, problem) for name in BIASED)
        assert max(of("bias", name, problem) for name in BIASED) < 0.165
        gain = noise("relax", problem) / np.array([noise(name, problem) for name in BIASED])
        assert 15 < min(gain) < max(gain) < 45
    assert noise("rebar", "vae_few") > noise("disarm", "vae_few")
    assert 0.15 < np.sqrt(noise("baseline", "vae_few") / 1000) < 0.22
    few = [of("bias", name, "vae_few") for name in BIASED]
    assert 0.23 < min(few) < max(few) < 0.73
    for problem in ("quadratic_many", "product_many"):
        assert 0.75 < noise("disarm", problem) / noise("leave_one_out", problem) < 1.25
        assert noise("arm", problem) > noise("leave_one_out", problem)
    for name in ("muprop", "double_control_variate"):
        assert noise(name, "quadratic_many") < 0.01 * noise("leave_one_out", "quadratic_many")
        few = noise(name, "quadratic_few") / noise("leave_one_out", "quadratic_few")
        assert few == pytest.approx(1 / 6, abs=0.02)
    for name in ("concrete", "straight_through"):
        lead = noise("relax", "vae_nonlinear") - noise(name, "vae_nonlinear")
        overtaken = lead / of("bias", name, "vae_nonlinear") ** 2  # Eq. (eq-atlas-error)
        record(f"budget at which RELAX overtakes {LABEL[name]}, nonlinear VAE", overtaken)
        assert 4500 < overtaken < 32_000


# %% [markdown]
# ### Which one?
#
# All numbers are for 200 bits: the quadratic (Q), the product (P), the linear (L) and the nonlinear
# (N) VAE. The bias is that on N, as a share of the gradient. The cost is in evaluations, the time
# in milliseconds of one core for one estimate for 50 images on N. (Gumbel-Rao spends its time on
# noise, ten draws for each bit.)
#
# | estimator | needs of $f$ | bias | cost $C$ | $\nu$ on Q | P | L | N | ms |
# |---|---|---|---|---|---|---|---|---|
# | score function | values | none | 1 | 9,200 | 750 | 140,000 | 43,000 | 1.1 |
# | best constant (NVIL) | values | none | 1 | 180 | 240 | 510 | 360 | 1.1 |
# | leave one out | values | none | 2 | 390 | 510 | 1,100 | 740 | 1.7 |
# | ARM | values | none | 2 | 500 | 630 | 670 | 630 | 2.3 |
# | DisARM | values | none | 2 | 390 | 410 | 560 | 500 | 2.3 |
# | double control variates | slopes at bits | none | 4 | 2.2 | 210 | 1,300 | 910 | 3.1 |
# | MuProp | slope at means | none | 3 | 2.3 | 150 | 6,800 | 7,900 | 2.8 |
# | LAX | slope between | none | 3 | 53 | 78 | 220 | 160 | 3.1 |
# | REBAR | slope between | none | 3 | 43 | 57 | 180 | 140 | 3.3 |
# | RELAX | slope between | none | 3 | 49 | 67 | 190 | 130 | 3.8 |
# | Concrete | slope between | 16 % | 2 | 1.3 | 1.9 | 6.5 | 7.8 | 2.2 |
# | straight-through | slope at bits | 7 % | 2 | 0.01 | 0.8 | 6.8 | 3.9 | 1.9 |
# | Gumbel straight-through | slope at bits | 13 % | 2 | 1.3 | 2.4 | 10 | 6.3 | 2 |
# | Gumbel-Rao | slope at bits | 13 % | 2 | 0.18 | 0.85 | 5.7 | 3.3 | 8.3 |
#
# *Up to ten bits* sum over all outcomes. A thousand evaluations buy the exact gradient, while 1,000
# evaluations of the best unbiased estimator on the linear VAE with ten bits leave an error of some
# 20 %.
#
# *If $f$ gives values only*, take DisARM, which needs no setting and no training. Where more than
# two evaluations for each datum can be afforded, leave-one-out with all of them comes close to the
# best constant.
#
# *If $f$ has a derivative, and means something between the bits*, take REBAR in one pass. Its scale
# and temperature are learned as in Chapter 8, and RELAX is there if a network has more to say.
#
# *If $f$ is nearly linear in the bits*, look at double control variates or MuProp before all
# others. Two hundred evaluations tell.
#
# *If only the first thousands of steps count*, or the budget is one sample for each datum, an
# evaluation and a derivative, straight-through or Gumbel-Rao follow the gradient best. Measure
# their bias beforehand on a small copy of the model with ten bits. It does not show in a curve of
# training.


# %% [markdown]
# ## What goes wrong
#
# **The wrong sign.** The antithetic term of ARM is subtracted. Whoever adds the two values, or
# gives both the same noise, has an estimator with mean *zero*: the two halves cancel. Training then
# stands still, which looks like a learning rate that is too small. With the noise turned round,
# $\frac12 - u$, it descends instead. Means tell all of this at once.


# %%
def arm_added(f, logits, noise):
    """ARM with the two values added."""
    b, other = hard_bits(logits + noise), hard_bits(logits - noise)
    return 0.5 * (f(b) + f(other))[..., None] * np.tanh(noise / 2)


def test_atlas_arm_with_a_wrong_sign_is_rejected():
    f, a = squared_error, some_logits(3)
    exact = exact_gradient_by_hand(f, a)
    noise, weights = noise_cells(a)
    np.testing.assert_allclose(weights @ arm_at(f, a, noise), exact, atol=1e-14)
    np.testing.assert_allclose(weights @ arm_added(f, a, noise), 0, atol=1e-14)
    difference = (f(hard_bits(a + noise)) - f(hard_bits(a - noise)))[:, None]
    turned = difference * (0.5 - sc.expit(noise))
    np.testing.assert_allclose(weights @ turned, -exact, atol=1e-14)
    samples = arm_added(f, a, random.logistic(np.random.default_rng(9), (100_000, 3)))
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(samples, exact)


# %% [markdown]
# **A factor of DisARM.** The formula has two, $\frac12$ and $\sigma(|a|)$. Without the $\frac12$
# the mean is twice the gradient, without $\sigma(|a|)$ too large by $1/\sigma(|a|)$, which is at
# most 2 and close to 1 for bits that are nearly decided: a trained model hides it. With $\sigma(a)$
# in place of $\sigma(|a|)$ all is well as long as the logits are positive. A test needs logits of
# both signs and of moderate size.


# %%
def disarm_with(f, logits, noise, factor):
    """DisARM with another factor."""
    b, other = hard_bits(logits + noise), hard_bits(logits - noise)
    return (f(b) - f(other))[..., None] * (b - other) * factor


def test_atlas_disarm_with_a_wrong_factor_is_rejected():
    f = squared_error
    cases = {"both signs": np.array([0.9, -0.6]), "positive": np.array([0.9, 0.6])}
    for case, a in cases.items():
        exact = exact_gradient_by_hand(f, a)
        noise, weights = noise_cells(a)
        ratio = lambda factor, a=a, noise=noise, weights=weights, exact=exact: (
            weights @ disarm_with(f, a, noise, factor) / exact
        )
        np.testing.assert_allclose(ratio(sc.expit(np.abs(a)) / 2), 1)
        np.testing.assert_allclose(ratio(sc.expit(np.abs(a))), 2)
        np.testing.assert_allclose(ratio(0.5), 1 / sc.expit(np.abs(a)))
        signed = np.abs(ratio(sc.expit(a) / 2) - 1)
        assert (np.max(signed) < 1e-12) == (case == "positive")


# %% [markdown]
# **One's own slope.** The code for {eq}`eq-atlas-residual` is shorter if every sample uses its own
# derivative $f'(b_j)$, or the mean over all. Then the slope is not independent of $b_j$, and the
# correction that is added back is not the mean of what was subtracted.


# %%
def double_with_own_slope(f, logits, b, scale):
    """Eq. (eq-atlas-double) with the slope of each sample at that sample."""
    k, s = len(b), score(b, logits)
    values, slopes = with_slopes(f, b)
    h = values - scale * np.sum(slopes * s, axis=-1)
    signal = (h - np.mean(h, axis=0)) * (k / (k - 1))
    direct = scale * np.mean(slopes, axis=0) * expit(logits) * expit(-logits)
    return np.mean(signal[..., None] * s, axis=0) + direct


def test_atlas_double_control_variate_with_its_own_slope_is_rejected():
    logits, linear = some_logits(3), lambda b: b @ np.array([1.0, -2.0, 0.5])
    pairs, weights = tuples_of_bits(logits, 2)
    exact = exact_gradient_by_hand(squared_error, logits)
    right = weights @ double_control_variate_at(squared_error, logits, pairs, 1.0)
    wrong = weights @ double_with_own_slope(squared_error, logits, pairs, 1.0)
    np.testing.assert_allclose(right, exact, atol=1e-14)
    assert np.max(np.abs(wrong - exact)) > 0.1 * np.max(np.abs(exact))
    exact = exact_gradient_by_hand(linear, logits)  # a linear f does not notice
    found = double_with_own_slope(linear, logits, pairs, 1.0)
    np.testing.assert_allclose(found, np.broadcast_to(exact, found.shape), atol=1e-12)


# %% [markdown]
# **Variances at unequal cost.** Eight samples have an eighth of the variance of one. Put
# "leave-one-out, $k = 8$" beside "ARM, one pair" and the former wins; per evaluation it may not.
# The check is trivial and rarely made: an estimator that averages independent parts, such as DisARM
# with one pair and with four, must come out even with itself. $\nu$ does, the variance does not.
# (Leave-one-out does gain: its baselines improve with $k$, and $\nu$ falls towards that of the best
# constant.)


# %%
def test_atlas_variance_at_unequal_cost_is_rejected():
    problem, rng = closed_problem("quadratic", 5), np.random.default_rng(10)
    logits = replicate(problem.logits, 40_000)
    variance = {k: quality(disarm(problem.f, logits, rng, k=k), problem.exact)[2] for k in (2, 8)}
    assert variance[2] / variance[8] == pytest.approx(4, rel=0.05)  # "four times better"
    assert 2 * variance[2] == pytest.approx(8 * variance[8], rel=0.05)  # Eq. (eq-atlas-error)


# %% [markdown]
# **The variance of a biased estimator.** Multiply any estimate by $\frac{1}{10}$, and its variance
# falls to a hundredth. A relaxation at a high temperature does just that: its slope is $1/\lambda$.
# A ranking by variance puts it first. {eq}`eq-atlas-error` does not, since $\delta$ goes to 1.


# %%
def test_atlas_ranking_by_variance_alone_is_rejected():
    problem, found = closed_problem("quadratic", 5), {}
    logits = replicate(problem.logits, 40_000)
    for temperature in (0.5, 50.0):
        G = concrete(problem.f, logits, np.random.default_rng(11), temperature=temperature)
        found[temperature] = quality(G, problem.exact)
    fair = quality(disarm(problem.f, logits, np.random.default_rng(11)), problem.exact)
    assert found[50.0][2] < 1e-3 * found[0.5][2] < 1e-3 * fair[2]  # the less, the worse
    error = {t: bias**2 + 2 * variance / 100 for t, (bias, _, variance) in found.items()}
    assert error[50.0] > 0.9 > 5 * fair[2] / 50 > fair[2] / 50 > error[0.5]


# %% [markdown]
# ## Figures
#
# One pair of one bit, exactly and sampled.

# %%
from chapters.style import COLOUR, LINESTYLE, MARKER

LOOK = {name: name for name in LABEL} | {"gumbel_straight_through": "straight_through"}


def style(name):
    """Colour, line style and label of an estimator."""
    look = LOOK[name]
    return {"color": COLOUR[look], "linestyle": LINESTYLE[look], "label": LABEL[name]}


def figure_one_pair():
    r"""One bit: variance of one pair of samples, in units of the squared influence $\Delta^2$.

    Lines: Eq. (eq-atlas-one-bit); marks: 20,000 pairs each. Right: the same, divided by the squared
    gradient.
    """
    import matplotlib.pyplot as plt

    beta, marks = np.linspace(0.005, 0.995, 199), np.linspace(0.05, 0.95, 10)
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.9))
    for name, estimator in (("leave_one_out", leave_one_out), ("arm", arm), ("disarm", disarm)):
        f = lambda b: b[..., 0]
        exact = np.array([pair_moments(name, f, np.array([a]))[1][0] for a in sc.logit(beta)])
        logits = np.broadcast_to(sc.logit(marks)[:, None], (20_000, 10, 1))
        found = np.var(estimator(f, logits, np.random.default_rng(12)), axis=0)[:, 0]
        for ax, unit in ((left, lambda p: 1), (right, lambda p: (p * (1 - p)) ** 2)):
            ax.plot(beta, exact / unit(beta), **style(name))
            ax.plot(marks, found / unit(marks), MARKER[name], color=COLOUR[name])
    left.set(xlabel=r"probability $\beta$", ylabel="variance / (influence)²")
    right.set(xlabel=r"probability $\beta$", ylabel="variance / (gradient)²", yscale="log",
              ylim=(0.03, 200))  # fmt: skip
    right.legend(loc="upper center")
    return fig


# %%
def figure_atlas():
    """The atlas: noise (filled) and bias (crosses) of all estimators, problems as panels.

    Errors are relative to the length of the gradient; the noise is that of a budget of 100
    evaluations of f. Where a cross lies to the right of its mark, more samples no longer help.
    Without a cross no bias is seen: these are unbiased, but for straight-through on the quadratic,
    where it is 0.2 %.
    """
    import matplotlib.pyplot as plt

    of = measured()
    fig, axes = plt.subplots(2, 3, figsize=(6.4, 6.6), sharex=True, sharey=True)
    shown = [name for name in PROBLEMS if name != "product_few"]
    rows = np.arange(len(LABEL))[::-1]
    for ax, problem in zip(axes.flat, shown):
        for row, name in zip(rows, LABEL):
            look = LOOK[name]
            ax.axhline(row, color="#eeeeee", linestyle="-", linewidth=0.6, zorder=0)
            noise = np.sqrt(of("noise", name, problem) / 100)
            ax.plot(noise, row, MARKER[look], color=COLOUR[look], markersize=6)
            bias = of("bias", name, problem)
            if of("z", name, problem) > 6.1:
                ax.plot(bias, row, "x", color=COLOUR["exact"], markersize=6)
        ax.axvline(1, color=COLOUR["numeric"], linestyle=":", zorder=0)
        ax.set(xscale="log", title=PROBLEMS[problem])
        ax.set_yticks(rows, list(LABEL.values()))
        ax.grid(False, axis="y")
    for ax in axes[1]:
        ax.set_xlabel("error / gradient")
    return fig


# %%
def figure_budget():
    """Error against budget, nonlinear VAE with 200 bits: where unbiased estimators overtake.

    Root mean square error relative to the gradient, from bias and noise of the record.
    """
    import matplotlib.pyplot as plt

    of, N = measured(), np.geomspace(4, 1e6, 60)
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    for name in ("score_function", "leave_one_out", "disarm", "relax", "concrete",
                 "straight_through"):  # fmt: skip
        bias = of("bias", name, "vae_nonlinear") if name in BIASED else 0.0
        error = np.sqrt(bias**2 + of("noise", name, "vae_nonlinear") / N)
        ax.loglog(N, error, **style(name))
    ax.axhline(1, color=COLOUR["numeric"], linestyle=":")
    ax.set(xlabel="budget $N$, evaluations of $f$ for each image", ylabel="error / gradient",
           ylim=(0.01, 30))  # fmt: skip
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


# %%
def figure_noise_of_bits():
    """Noise at equal cost against the number of bits: (w·b - t)² (left) and a product (right).

    The noise is the number of evaluations after which it is as large as the gradient. For the
    product of one bit double control variates are exact, which lies below the axis.
    """
    import matplotlib.pyplot as plt

    arrays = records.load("estimator_bits")["arrays"]
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.2), sharey=True)
    shown = "leave_one_out", "arm", "disarm", "double_control_variate", "rebar", "relax"
    for ax, noise, title in zip(axes, arrays["noise"], CLOSED):
        for name in shown:
            values = noise[:, list(LABEL).index(name)]
            ax.loglog(arrays["bits"], values, marker=MARKER[name], **style(name))
        ax.set(xlabel="number of bits $D$", title=title, ylim=(0.02, 1000))
    axes[0].set_ylabel(r"noise at equal cost $\nu$")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def figure_temperatures_compared():
    """Temperature, linear VAE with 10 bits: bias and noise of relaxations, and noise of REBAR.

    Left and middle: three biased estimators. Right: REBAR at the best scale for each temperature,
    and DisARM, which has no temperature.
    """
    import matplotlib.pyplot as plt

    run = records.load("estimator_atlas_digits")
    t, found = run["arrays"]["temperatures"], run["arrays"]["over_temperatures"]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(6.4, 2.8))
    for i, name in enumerate(("concrete", "gumbel_straight_through", "gumbel_rao")):
        bias, noise = found[:, 2 * i], found[:, 2 * i + 1]
        seen = bias**2 > noise / (2 * run["config"]["replicas"])  # above the noise of its mean
        mark = {"marker": MARKER[LOOK[name]]}
        left.semilogx(t[seen], bias[seen], **mark, **style(name) | {"label": None})
        middle.loglog(t, noise, **mark, **style(name))
    right.loglog(t, found[:, 6], marker=MARKER["rebar"], **style("rebar"))
    right.axhline(run["scalars"]["noise_disarm_vae_few"], **style("disarm"))
    for ax, text in zip((left, middle, right), (r"relative bias $\delta$", *[r"noise $\nu$"] * 2)):
        ax.set(xlabel=r"temperature $\lambda$", ylabel=text)
    right.set_ylim(10, 1000)
    fig.legend(loc="outside lower center", ncols=5, fontsize=7)
    return fig


# %% [markdown]
# ## Exercises
#
# **1. The rare bit, for the last time.** One bit, $f(b) = b$, $\beta \to 0$. Find the noise at
# equal cost $\nu$ of leave-one-out, ARM and DisARM, each with one pair, and compare with the score
# function. Which estimator of the atlas does better?
#
# ```{admonition} Solution
# :class: dropdown
#
# By {eq}`eq-atlas-one-bit` all three have the variance $\frac12 \beta$ to first order, a pair costs
# 2, and the squared gradient is $\beta^2$: $\nu \approx 1/\beta$. The score function has $(1 -
# \beta)/\beta$, the same. Nothing is gained, since nearly all pairs are equal and say nothing. What
# knows the *slope* does better: MuProp and double control variates with $\eta = 1$ are exact here,
# and straight-through is, too.
# ```


# %% tags=["hide-cell"]
def test_atlas_exercise_1_pairs_do_not_cure_a_rare_bit():
    f = lambda b: b[..., 0]
    for beta in (1e-3, 1e-5):
        a = np.array([sc.logit(beta)])
        for name in ("leave_one_out", "arm", "disarm"):
            variance = pair_moments(name, f, a)[1][0]
            nu = 2 * variance / (beta * (1 - beta)) ** 2
            assert nu * beta == pytest.approx(1, rel=4 * beta)
        assert pair_moments("double_control_variate", f, a)[1][0] < 1e-20


# %% [markdown]
# **2. Many bits.** Let $f(b) = \sum_j w_j b_j$. The noise that the *other* bits cause in $G_i$ is
# the part of $\mathrm{Var}[G_i]$ that contains $w_j$, $j \ne i$. Find it for leave-one-out, ARM and
# DisARM. Which is best, and what happens to ARM if the bits are rare?
#
# ```{admonition} Solution
# :class: dropdown
#
# In a pair, $f(b) - f(b') = \sum_j w_j d_j$ with independent differences $d_j \in \{-1, 0, 1\}$ of
# mean zero and $\mathbb{E}[d_j^2] = p_j$. What multiplies it in $G_i$ is independent of $d_j$. With
# $v = \beta (1 - \beta)$: leave-one-out gives $\frac14 w_j^2\, (2 v_j)(2 v_i) = w_j^2 v_j v_i$.
# DisARM gives $\frac14 w_j^2\, (2 r_j)(2 r_i)(1 - r_i)^2 = w_j^2 v_j v_i\,
# (1 - r_i)/(1 - r_j)$: for equal probabilities it is the *same*, and the gain of DisARM is in
# the bit's own part only. ARM gives $w_j^2\, 2r_j \cdot \frac{1}{12}$, which is
# $1/\big(6 r (1 - r)^2\big)$ times as much for equal probabilities: $\frac43$ for fair bits,
# without bound for rare ones.
# ```


# %% tags=["hide-cell"]
def test_atlas_exercise_2_many_bits():
    for beta in (0.5, 0.2, 0.02):
        a, rare = np.full(3, sc.logit(beta)), min(beta, 1 - beta)
        v = rare * (1 - rare)
        others = {}
        for name in ("leave_one_out", "arm", "disarm"):
            variances = [
                pair_moments(name, lambda b, w=w: b @ np.array([1.0, w, w]), a)[1][0]
                for w in (0.0, 1.0)
            ]
            others[name] = variances[1] - variances[0]  # two other bits
        assert others["leave_one_out"] == pytest.approx(2 * v**2)
        assert others["disarm"] == pytest.approx(others["leave_one_out"])
        ratio = others["arm"] / others["leave_one_out"]
        assert ratio == pytest.approx(1 / (6 * rare * (1 - rare) ** 2))
    a = sc.logit(np.array([0.1, 0.4]))  # different probabilities
    change = [pair_moments("disarm", lambda b, w=w: b @ np.array([1.0, w]), a)[1] for w in (0, 1)]
    assert change[1][0] - change[0][0] == pytest.approx(0.09 * 0.24 * 0.9 / 0.6)


# %% [markdown]
# **3. Even and odd.** Let all bits be fair and write $\bar b = 1 - b$. Split $f$ into an even part,
# $f(\bar b) = f(b)$, and an odd part, $f(\bar b) = -f(b)$. What does each do to DisARM?
#
# ```{admonition} Solution
# :class: dropdown
#
# For fair bits $\tilde b = \bar b$ always. The even part drops out of $f(b) - f(\tilde b)$ sample
# by sample; its exact gradient is zero, too. The odd part is doubled, and $G = \frac12 \cdot 2
# f(b)\, (2b - 1) \cdot \frac12 = f(b)\, s(b)$: DisARM is then the score function of the odd part,
# without a baseline, and needs none as the mean of an odd function is zero. It costs two
# evaluations and is one sample. So antithetic noise removes what is even about the centre, such as
# a square. It removes nothing of what is odd, such as a linear function: there
# two evaluations buy what one sample with the best constant gives.
# ```


# %% tags=["hide-cell"]
def test_atlas_exercise_3_even_and_odd():
    D, rng = 4, np.random.default_rng(13)
    f, a, noise = random_function(D, 1), np.zeros(D), random.logistic(rng, (50, D))
    even = lambda b: 0.5 * (f(b) + f(1 - b))
    odd = lambda b: 0.5 * (f(b) - f(1 - b))
    np.testing.assert_allclose(disarm_at(even, a, noise), 0, atol=1e-15)
    np.testing.assert_allclose(exact_gradient_by_hand(even, a), 0, atol=1e-15)
    b = hard_bits(noise)
    np.testing.assert_allclose(disarm_at(f, a, noise), odd(b)[:, None] * score(b, a), atol=1e-14)


# %% [markdown]
# **4. The best pair for one bit.** In {eq}`eq-atlas-pair` with one bit, which $p$ gives the least
# variance? And for many bits, is the best pair always the antithetic one?
#
# ```{admonition} Solution
# :class: dropdown
#
# $G$ is $\Delta v / p$ with probability $p$, else 0 ($v = \beta (1 - \beta)$). Its second moment
# $\Delta^2 v^2 / p$ falls with $p$: the largest $p$, the antithetic pair, is best. For many bits
# the pair also decides $f(b) - f(b')$ in the *other* bits. Take $f = b_1 + 10\, b_2$. The noise in
# $G_1$ is nearly all due to bit 2, and a pair that shares it, $b'_2 = b_2$, has none of it.
# But then nothing is learned about bit 2. With $f$ unknown one cannot have both.
# ```


# %% tags=["hide-cell"]
def test_atlas_exercise_4_the_best_pair():
    a = np.array([0.8])
    of_one = [mixed_pair_moments(lambda b: b[..., 0], a, r)[1][0] for r in (0, 0.3, 0.7, 1)]
    assert np.all(np.diff(of_one) < 0)
    f = lambda b: b[..., 0] + 10 * b[..., 1]
    unequal = sc.logit(np.array([0.1, 0.4]))  # here the factor of exercise 2 exceeds 1
    antithetic, independent = (mixed_pair_moments(f, unequal, r)[1][0] for r in (1, 0))
    shared = mixed_pair_moments(lambda b: b[..., 0], unequal[:1], 1)[1][0]
    assert antithetic > 1.2 * independent > 20 * shared


# %% [markdown]
# **5. Shrinking.** Multiply an unbiased estimator with noise $\nu$ by a number $t$. Which $t$ has
# the least error at a budget of $N$, and what is that error? Why is this no way to train faster?
#
# ```{admonition} Solution
# :class: dropdown
#
# {eq}`eq-atlas-error` reads $(1 - t)^2 + t^2 \nu/N$, with the minimum at $t = 1/(1 + \nu/N)$, where
# it is $(\nu/N)/(1 + \nu/N) < 1$. With $\nu/N = 100$ that is $t \approx 0.01$: an error just below
# that of the estimate "zero". A factor on the gradient is a factor on the learning rate, no more.
# The errors of directions matter, and they are what they were. A comparison by {eq}`eq-atlas-error`
# is fair among estimators of about the right length.
# ```


# %% tags=["hide-cell"]
def test_atlas_exercise_5_shrinking():
    problem = closed_problem("quadratic", 5)
    G = arm(problem.f, replicate(problem.logits, 50_000), np.random.default_rng(14))
    nu = quality(G, problem.exact)[2]
    error = lambda r: np.mean(np.sum((r * G - problem.exact) ** 2, axis=(1, 2)))
    best = 1 / (1 + nu)
    assert error(best) < min(error(0.9 * best), error(1.1 * best))
    least = error(best) / np.sum(problem.exact**2)
    assert least == pytest.approx(nu / (1 + nu), rel=0.02)
