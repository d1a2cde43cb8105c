# %% [markdown]
# # 3. The score function
#
# A program tosses coins and computes with the outcome. We want the derivative of the expected
# result in the parameters that decide how often each coin shows heads. A bit cannot be moved a
# little, so no chain rule leads through the toss. But the *probability* of each outcome is a smooth
# function, and differentiating it gives an estimator that asks nothing of the program but its
# values: the score-function estimator, also called REINFORCE. It is unbiased, and it is noisy. This
# chapter derives it, compares it with the exact sum over all outcomes, finds out what its noise is
# made of, and removes as much of it as a baseline can. At the end it trains a variational
# autoencoder whose latents are bits.
#
# **Reads after:** 1, 2 · **Runs in:** 10 s · **Papers:**
# {cite}`williams1992simple,mnih2014neural,ranganath2014black,kool2019buy,mohamed2020monte`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $S$ | number of samples, each a replica of the estimate | () |
# | $B$ | number of data in a batch | () |
# | $D$ | dimension of an event: the number of bits of a sample, or of pixels of an image | () |
# | $k$ | number of inner samples that one replica consumes | () |
# | $\phi$ | parameters of the approximate posterior, or of any law we differentiate through | any |
# | $\theta$ | parameters of the generative model | any |
# | $z$ | latent variable; discrete in this chapter, unless said otherwise | any |
# | $q_\phi(z)$ | distribution to be differentiated through; here a probability | () |
# | $q_\phi(z \mid x)$ | approximate posterior; for bits $q_\phi(b \mid x)$ | () |
# | $f$ | function whose expectation is differentiated | () for each $z$ |
# | $J(\phi)$ | the expectation of $f(z)$ | () |
# | $s(z)$ | score, $\nabla_\phi \log q_\phi(z)$ | as $\phi$, for each sample |
# | $G$ | estimate of $\nabla_\phi J$ from one sample, or from $k$ | as $\phi$, for each replica |
# | $b$ | discrete sample, of zeros and ones | (S, B, D) |
# | $a$ | logits of the bits | (S, B, D) |
# | $\beta$ | probability of a one; $\beta_i = \sigma(a_i)$ with the logistic function | (D,) |
# | $H(q)$ | entropy of $q$, in nats | () |
# | $c$ | control variate, a statistic whose expectation is known | as $G$ |
# | $\eta$ | scale of the control variate | () |
# | $m$ | baseline, a guess of $f$ made without seeing the sample | () for each datum |
# | $\rho$ | parameters of a learned baseline | any |
# | $x$ | observation, a batch of images of zeros and ones | (B, D) |
# | $\bar x$ | mean of the training images | (D,) |
# | $d$ | number of latents of one datum, in one layer | () |
# | $a_l$, $b_l$ | logits and bits of latent layer $l$, from the bottom | (k, B, d) each |
# | $\pi$ | logits of the prior of the top layer | (d,) |
# | $\mathcal{L}$ | evidence lower bound (ELBO), in nats, of one image | () |

# %% [markdown]
# ## Derivation
#
# ### An expectation is a sum
#
# The objective is an expectation whose law depends on $\phi$. For a discrete $z$ it is a sum over
# the values that $z$ can take,
#
# $$ J(\phi) = \mathbb{E}_{q_\phi(z)}[f(z)] = \sum_z q_\phi(z)\, f(z), \qquad
#    \nabla_\phi J = \sum_z f(z)\, \nabla_\phi q_\phi(z) . $$ (eq-score-sum)
#
# As long as $f$ does not itself contain $\phi$ nothing more is needed: differentiate the
# probabilities, leave the values alone. The law that this chapter is about is that of $D$
# independent bits with the logits $a$,
#
# $$ q_a(b) = \prod_{i=1}^{D} \beta_i^{b_i} (1 - \beta_i)^{1 - b_i}, \qquad
#    \log q_a(b) = \sum_{i=1}^{D} \big( b_i a_i - \log(1 + e^{a_i}) \big), \qquad
#    \beta_i = \sigma(a_i) = \frac{1}{1 + e^{-a_i}} . $$ (eq-score-bits)
#
# There are $2^D$ outcomes, and {eq}`eq-score-sum` visits each of them. For ten bits that is the
# best method there is, exact and cheap. For 200 bits, the size of a small latent layer, it is out
# of the question.

# %% [markdown]
# ### The log-derivative trick
#
# A sum with too many terms can be sampled, if it is an expectation. The right side of
# {eq}`eq-score-sum` is none: $\nabla q$ is not a probability. Multiply and divide by $q$. Since
# $\nabla_\phi \log q_\phi = \nabla_\phi q_\phi / q_\phi$ wherever $q_\phi > 0$,
#
# $$ \nabla_\phi J = \sum_z q_\phi(z)\, f(z)\, \frac{\nabla_\phi q_\phi(z)}{q_\phi(z)}
#    = \mathbb{E}_{q_\phi(z)}\big[ f(z)\, s(z) \big], \qquad
#    s(z) = \nabla_\phi \log q_\phi(z) . $$ (eq-score-identity)
#
# The gradient $s$ is called the *score*. Draw $z \sim q_\phi$ and evaluate
#
# $$ G = f(z)\, s(z) . $$ (eq-score-estimator)
#
# This is the score-function estimator {cite}`williams1992simple`. By {eq}`eq-score-identity` one
# sample of it is unbiased. It never differentiates $f$, which may be any program. For continuous
# $z$ the sum becomes an integral and the argument is the same, provided that the derivative may go
# inside; Chapter 4 says when.
#
# The score itself has mean zero: take $f = 1$, whose expectation does not change,
#
# $$ \mathbb{E}_{q_\phi(z)}[s(z)] = \sum_z \nabla_\phi q_\phi(z) = \nabla_\phi 1 = 0 .
# $$ (eq-score-zero)
#
# Half of this chapter follows from this line. And if $f$ does contain $\phi$, the product rule adds
# the derivative of $f$ at fixed $z$,
#
# $$ \nabla_\phi\, \mathbb{E}_{q_\phi(z)}[f_\phi(z)]
#    = \mathbb{E}\big[ f_\phi(z)\, s(z) \big] + \mathbb{E}\big[ \nabla_\phi f_\phi(z) \big] .
# $$ (eq-score-product)
#
# For independent bits, {eq}`eq-score-bits` gives the score in the logits and in the probabilities:
#
# $$ \frac{\partial \log q}{\partial a_i} = b_i - \beta_i, \qquad
#    \frac{\partial \log q}{\partial \beta_i}
#    = \frac{b_i}{\beta_i} - \frac{1 - b_i}{1 - \beta_i} . $$ (eq-score-bernoulli)
#
# The first is bounded. It says: if $f$ was large, make the bits that were drawn likelier.

# %% [markdown]
# ### The smallest example
#
# One bit, $z = 1$ with probability $\beta$, and $f(z) = z$. The derivative of
# $\mathbb{E}[z] = \beta$ is 1. The estimator in $\beta$ is, from {eq}`eq-score-bernoulli` with
# $z(1 - z) = 0$,
#
# $$ G = z\, \frac{d}{d\beta} \log q_\beta(z) = \frac{z}{\beta}, \qquad
#    \mathbb{E}[G] = 1, \qquad
#    \mathrm{Var}\Big[ \frac1k \sum_{j=1}^{k} G_j \Big] = \frac{1 - \beta}{k \beta} .
# $$ (eq-score-rare)
#
# As $\beta \to 0$ the variance grows without limit, although $f$ is bounded. The reason can be
# read off: nearly always $z = 0$ and the estimate is 0. With probability $\beta$ it is $1/\beta$.
# All the information is in the rare ones, and a sample of far fewer than $1/\beta$ tosses usually
# contains none. Is it the fault of the parameter? In the logit, $G = z (1 - \beta)$ and
#
# $$ \mathbb{E}[G] = \beta (1 - \beta), \qquad
#    \mathrm{Var}[G] = \beta (1 - \beta)^3, \qquad
#    \frac{\mathrm{Var}[G]}{\mathbb{E}[G]^2} = \frac{1 - \beta}{\beta} . $$ (eq-score-rare-logit)
#
# Now the variance is bounded, and the *relative* variance is the same as before: the gradient
# itself vanishes with $\beta$ ({numref}`fig-rare-one`). A change of parameters multiplies $G$ by a
# constant and cannot help. It takes about $1/(\beta \epsilon^2)$ samples to know the derivative
# with relative error $\epsilon$, in either.

# %% [markdown]
# ### The gradient of an entropy
#
# The entropy $H(q) = -\mathbb{E}[\log q_\phi(z)]$ is the case of {eq}`eq-score-product` with
# $f_\phi = -\log q_\phi$, so
#
# $$ \nabla_\phi H(q) = -\mathbb{E}\Big[ \big( 1 + \log q_\phi(z) \big)\,
#    \frac{\nabla_\phi q_\phi(z)}{q_\phi(z)} \Big]
#    = -\mathbb{E}\big[ \log q_\phi(z)\, s(z) \big] . $$ (eq-score-entropy)
#
# The 1 is the second term of {eq}`eq-score-product`. By {eq}`eq-score-zero` it may be left out, or
# be any other number. It changes the noise, not the mean.

# %% [markdown]
# ### The ELBO
#
# For an observation $x$, a model $p_\theta(x, z)$ and an approximate posterior $q_\phi(z \mid x)$,
# Chapter 2 derives the evidence lower bound
#
# $$ \mathcal{L} = \mathbb{E}_{q_\phi(z \mid x)}[f(z)] \le \log p_\theta(x), \qquad
#    f(z) = \log p_\theta(x, z) - \log q_\phi(z \mid x) . $$ (eq-score-elbo)
#
# The gradient in $\theta$ goes inside, because the law of $z$ does not contain $\theta$. For the
# gradient in $\phi$, $f$ contains $\phi$, but only as $-\log q_\phi$, and
# $\mathbb{E}[\nabla_\phi \log q_\phi] = 0$. So
#
# $$ \nabla_\theta \mathcal{L} = \mathbb{E}\big[ \nabla_\theta \log p_\theta(x, z) \big], \qquad
#    \nabla_\phi \mathcal{L} = \mathbb{E}\big[ f(z)\, s(z) \big] . $$ (eq-score-elbo-gradient)
#
# What multiplies the score is the *whole* $f$: reconstruction, prior and entropy. How noisy is it?
# Suppose that training has succeeded and $q$ is the posterior. Then
# $f(z) = \log p_\theta(x)$ for every $z$, a constant. The true gradient is 0, since $q$ is optimal.
# The estimate is $\log p_\theta(x)\, s(z)$, and
#
# $$ \mathrm{Cov}[G] = \log^2 p_\theta(x) \cdot
#    \mathbb{E}\big[ s(z)\, s(z)^\top \big] . $$ (eq-score-at-the-posterior)
#
# The expectation is the Fisher information of $q$. For an image $\log p(x)$ is $-100$ nats or so,
# and the gradient is all noise, at the very place where there is nothing left to learn. But
# subtract the constant $\log p_\theta(x)$ from $f$: the mean stays 0, and so does every single
# estimate.

# %% [markdown]
# ### What the variance is due to
#
# The notes "VAE 1" explain the high variance by $\log q \ll 0$. But $q$ enters
# {eq}`eq-score-estimator` through its score alone. Append to $b$ a thousand bits that $f$ ignores:
# $\log q$ falls by 693 nats if they are fair, and $G$ for the old bits is what it was. (The formula
# itself is misprinted there too: $p$ stands where $\log p$ is meant, and $\nabla z^2$ for
# $\nabla \log q$.) What does matter is
#
# $$ \mathrm{Var}[G_i] = \mathbb{E}\big[ f(z)^2 s_i(z)^2 \big] - (\partial_i J)^2 ,
# $$ (eq-score-variance)
#
# that is, the size of $f$. It has two parts. One is the *level* of $f$, which has nothing to do
# with the gradient. Add a constant to $f$: $J$ changes by the constant, its gradient does not, and
# {eq}`eq-score-variance` grows as the square. The other is the *spread* of $f$. It
# comes from all bits at once, but bit $i$ is told of it as if it were its own doing.
#
# Where $f$ is a sum over bits the two can be separated. Let $f(b) = \sum_j f_j(b_j)$, write $R$ for
# the terms other than $f_i$, and subtract a constant $m$ from $f$. As $R$ is independent of $b_i$,
#
# $$ \mathrm{Var}[(f - m)\, s_i]
#    = \underbrace{\mathrm{Var}\big[ (f_i(b_i) + \mathbb{E}[R] - m)\, s_i \big]}_{\text{level}}
#    + \underbrace{\mathrm{Var}[R]\; \beta_i (1 - \beta_i)}_{\text{other bits}} .
# $$ (eq-score-parts)
#
# We shall see that the best $m$ makes the first part zero. The second part no constant can remove.
# For $D$ equal terms it is $D - 1$ times that of two bits. So the noise grows with the number of
# bits even with the best constant, and without one it grows as $D^2$
# ({numref}`fig-evaluations`).

# %% [markdown]
# ### Control variates
#
# Let $c$ be a statistic of the same sample with a known expectation. For every number $\eta$
#
# $$ G_\eta = G - \eta\, (c - \mathbb{E}[c]) , \qquad
#    \mathbb{E}[G_\eta] = \mathbb{E}[G], \qquad
#    \mathrm{Var}[G_\eta]
#    = \mathrm{Var}[G] - 2 \eta\, \mathrm{Cov}[G, c] + \eta^2\, \mathrm{Var}[c] .
# $$ (eq-score-control)
#
# A parabola in $\eta$. Its minimum, and what is left there, are
#
# $$ \eta^* = \frac{\mathrm{Cov}[G, c]}{\mathrm{Var}[c]} , \qquad
#    \mathrm{Var}[G_{\eta^*}] = \big( 1 - \mathrm{corr}[G, c]^2 \big)\, \mathrm{Var}[G] .
# $$ (eq-score-optimal-scale)
#
# The score is such a statistic, with mean zero. With $c = s_i$ and $\eta = m$ the control variate
# becomes a *baseline*, $G_i = (f - m)\, s_i$. The best one for coordinate $i$ is
#
# $$ m_i^* = \frac{\mathbb{E}[f s_i^2]}{\mathbb{E}[s_i^2]}
#    = (1 - \beta_i)\, \mathbb{E}[f \mid b_i = 1] + \beta_i\, \mathbb{E}[f \mid b_i = 0] .
# $$ (eq-score-best-baseline)
#
# The second form is for bits: $s_i^2$ is $(1 - \beta_i)^2$ with probability $\beta_i$, and
# $\beta_i^2$ with probability $1 - \beta_i$. Compare it with
# $\mathbb{E}[f] = \beta_i\, \mathbb{E}[f \mid 1] + (1 - \beta_i)\, \mathbb{E}[f \mid 0]$. The
# weights are *exchanged*: the best baseline is not the mean of $f$, it leans towards the rare
# outcome. For a single bit it leaves nothing: $(f(b) - m^*)(b - \beta)$ is
# $\beta (1 - \beta)(f(1) - f(0))$, the exact gradient, for $b = 1$ *and* for $b = 0$. For many
# bits, each of little influence, $\mathbb{E}[f \mid 1] \approx \mathbb{E}[f \mid 0]$, and
# $m_i^* \approx \mathbb{E}[f]$ ({numref}`fig-best-baseline`).

# %% [markdown]
# ### Baselines one can have
#
# The best baseline contains expectations that we do not have. It must be guessed, and there is one
# rule: *the guess must not see the sample it is applied to*. If $m$ is independent of $z$,
# $\mathbb{E}[m\, s(z)] = \mathbb{E}[m]\, \mathbb{E}[s(z)] = 0$. If it is not, the first equality
# may fail.
#
# **Running mean.** Keep an average of the values of $f$ in earlier steps. It knows the level of
# $f$, but it is one number for all data.
#
# **Input-dependent baseline** {cite}`mnih2014neural`. Some images are harder than others: their $f$
# is lower whatever the bits are. A network $m_\rho(x)$ can know that. It is fitted by least squares
# to the values of $f$,
#
# $$ \mathbb{E}\big[ (f - m_\rho(x))^2 \big]
#    = \mathbb{E}\big[ \mathrm{Var}[f \mid x] \big]
#    + \mathbb{E}\big[ (\mathbb{E}[f \mid x] - m_\rho(x))^2 \big] , $$ (eq-score-nvil)
#
# with minimum at $m_\rho(x) = \mathbb{E}[f \mid x] = \mathcal{L}(x)$: the baseline learns to
# predict the ELBO of an image. This is the method called NVIL (neural variational inference and
# learning). The paper also divides the signal by $\max(1, \hat\sigma)$, with a running standard
# deviation $\hat\sigma$ of $f - m$. That multiplies the gradient by a number; Adam, which we use,
# divides by the size of gradients anyway.
#
# **Leave one out** {cite}`kool2019buy`. Draw $k \ge 2$ samples for the same datum. For each of them
# the mean of the *others* is a baseline that costs nothing and needs no training:
#
# $$ G = \frac1k \sum_{j=1}^{k} \Big( f(z_j) - \frac{1}{k - 1} \sum_{l \ne j} f(z_l) \Big)\, s(z_j)
#    = \frac{1}{k - 1} \sum_{j=1}^{k} \Big( f(z_j) - \frac1k \sum_{l=1}^{k} f(z_l) \Big)\, s(z_j) .
# $$ (eq-score-leave-one-out)
#
# The second form subtracts the mean of all, *and divides by $k - 1$*. What does it lose against
# knowing $\mathbb{E}[f]$? Write $u = f - \mathbb{E}[f]$. The first form is the average of
# $u_j s_j$ minus $\frac{1}{k(k-1)} \sum_{j \ne l} u_l s_j$. The two are uncorrelated, and in the
# double sum only the pairs $(j, l)$ and $(l, j)$ are correlated, with covariance
# $\mathbb{E}[us]^2 = (\partial_i J)^2$. Hence
#
# $$ \mathrm{Var}[G_i] = \frac1k\, \mathrm{Var}[(f - \mathbb{E}[f])\, s_i]
#    + \frac{\mathrm{Var}[f]\, \mathbb{E}[s_i^2] + (\partial_i J)^2}{k (k - 1)} .
# $$ (eq-score-leave-one-out-variance)
#
# The price of not knowing the mean is of order $1/k^2$. At $k = 2$ it is roughly as large as the
# first term; at $k = 10$ it is a ninth of it.

# %% [markdown]
# ## By hand
#
# First the bits. The exact gradient is the sum {eq}`eq-score-sum` with
# $\partial q / \partial a_i = q(b)\, (b_i - \beta_i)$, and the estimator is one line. In the whole
# book an estimator for bits is a function
# `estimator(f, logits, rng, *, k=1, ...)` of logits $(S, B, D)$, which returns one estimate for
# each of the $S$ replicas, $(S, B, D)$, and spends $k$ samples on each. `f` maps bits
# $(k, S, B, D)$ to values $(k, S, B)$. Replicas make mean, variance and bias one line each.

# %%
import numpy as np
import pytest
import scipy.special as sc

from chapters.ledger import claim
from minigrad import random
from minigrad.special import expit


def all_bits(D):
    """All values of D bits: (2^D, D), zeros and ones.

    >>> all_bits(2).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    return (np.arange(2**D)[:, None] >> np.arange(D)[::-1] & 1).astype(float)


def exact_gradient_by_hand(f, logits):
    """Gradient (D,) of E[f(b)] in the logits (D,): all 2^D terms of Eq. (eq-score-sum)."""
    b, probs = all_bits(len(logits)), sc.expit(logits)
    q = np.prod(np.where(b == 1, probs, 1 - probs), axis=1)  # Eq. (eq-score-bits)
    return (q * f(b)) @ (b - probs)


def replicate(logits, S):
    """S copies of logits (B, D), one for each replica of an estimate: (S, B, D)."""
    return np.broadcast_to(logits, (S, *np.shape(logits)))


def score(bits, logits):
    """The score of independent bits in their logits: Eq. (eq-score-bernoulli)."""
    return bits - expit(logits)


def score_function(f, logits, rng, *, k=1, baseline=0.0):
    """Score-function estimates with a given baseline, a number or one for each row of `f`."""
    b = random.bernoulli(rng, logits, k)
    signal = f(b) - baseline
    return np.mean(signal[..., None] * score(b, logits), axis=0)  # Eq. (eq-score-estimator)


def leave_one_out(f, logits, rng, *, k=2):
    """Score-function estimates; the baseline of each sample is the mean of the k - 1 others."""
    b = random.bernoulli(rng, logits, k)
    values = f(b)
    signal = (values - np.mean(values, axis=0)) * (k / (k - 1))  # Eq. (eq-score-leave-one-out)
    return np.mean(signal[..., None] * score(b, logits), axis=0)


# %% [markdown]
# ## With minigrad
#
# Write down the sum, and let the engine differentiate it. For sampled $z$ and any law whose
# log-probability is a program, the score is a `vjp` of that program. These two functions know no
# formula for a score.

# %%
from minigrad import grad, stop_gradient, tree, value_and_grad, vjp
from minigrad.special import bernoulli_log_prob, log_softmax, logit, logsumexp


def total_log_prob(logits, bits):
    """Log-probability of independent bits, in nats, summed over the last axis."""
    return np.sum(bernoulli_log_prob(logits, bits), axis=-1)  # Eq. (eq-score-bits)


def exact_gradient(f, log_prob, params, values):
    """Gradient of the sum over all `values` of z, Eq. (eq-score-sum); `f` may be any program."""
    return grad(lambda p: np.sum(np.exp(log_prob(p, values)) * f(values)))(params)


def score_function_of(f, log_prob, params, z):
    """Estimates f(z) s(z) for samples `z`: like `params`, whose leaves hold a copy per sample."""
    _, pullback = vjp(lambda p: log_prob(p, z), params)
    return pullback(f(z))[0]  # Eq. (eq-score-estimator)


# %% [markdown]
# A small problem serves most checks: $f(b) = (w^\top b - t)^2$ with positive weights. It is not a
# sum over bits, it is not centred, and its bits differ in importance.


# %%
def squared_error(b):
    """(w · b - 0.2)² for bits (..., D), with weights from 0.3 to 1 that are scaled by 1/√D."""
    D = b.shape[-1]
    return (b @ (np.linspace(0.3, 1.0, D) / np.sqrt(D)) - 0.2) ** 2


def some_logits(D, seed=0):
    """Logits (D,) of moderate size."""
    return np.random.default_rng([seed, D]).normal(0, 0.8, D)


def test_score_gradients_by_hand_are_those_of_minigrad():
    for D in (1, 3, 7):
        logits, values = some_logits(D), all_bits(D)
        by_hand = exact_gradient_by_hand(squared_error, logits)
        engine = exact_gradient(squared_error, total_log_prob, logits, values)
        np.testing.assert_allclose(by_hand, engine, rtol=1e-12, atol=1e-15)
        b = random.bernoulli(np.random.default_rng(1), replicate(logits, 50))
        engine = score_function_of(squared_error, total_log_prob, replicate(logits, 50), b)
        by_hand = score_function(squared_error, replicate(logits, 50), np.random.default_rng(1))
        np.testing.assert_allclose(by_hand, engine, rtol=1e-12, atol=1e-15)


# %% [markdown]
# ## Checks
#
# ### The exact sum and its cost
#
# For a product of functions of single bits the expectation is a product as well, and its gradient
# needs no sum:
#
# $$ f(b) = \prod_i (1 + w_i b_i), \qquad J = \prod_i (1 + w_i \beta_i), \qquad
#    \frac{\partial J}{\partial a_i} = \frac{w_i\, \beta_i (1 - \beta_i)}{1 + w_i \beta_i}\, J .
# $$ (eq-score-product-function)
#
# The sum must agree, and it must have called $f$ on $2^D$ outcomes.

# %%
from minigrad.check import check_grads, check_unbiased


@claim("F1")
def test_score_sum_over_all_bits_is_exact_and_costs_two_to_the_n(record):
    worst = 0.0
    for D in range(1, 15):
        logits, w, rows = some_logits(D), np.linspace(-0.5, 1.0, D), []

        def f(b, w=w, rows=rows):
            rows.append(len(b))
            return np.prod(1 + w * b, axis=-1)

        probs = sc.expit(logits)
        J = np.prod(1 + w * probs)
        closed = J * w * probs * (1 - probs) / (1 + w * probs)  # Eq. (eq-score-product-function)
        for found in (
            exact_gradient_by_hand(f, logits),
            exact_gradient(f, total_log_prob, logits, all_bits(D)),
        ):
            worst = max(worst, np.max(np.abs(found - closed)) / np.max(np.abs(closed)))
        assert rows == [2**D, 2**D]
    record("largest relative error, 1 to 14 bits", worst, limit=1e-12)
    record("evaluations of f for 14 bits", rows[-1])
    assert worst < 1e-12


# %% [markdown]
# ### The bias
#
# Twice. First without chance: the expectation of {eq}`eq-score-estimator` is itself a sum over all
# outcomes, of one-sample estimates with their probabilities. The gradient they must give comes
# from finite differences of $J$ here, which know nothing of scores. Then as it is used, with
# samples.


# %%
def expectation(f, logits):
    """E[f(b)] by the sum over all bits."""
    b = all_bits(len(logits))
    return np.exp(total_log_prob(logits, b)) @ f(b)


@claim("F2")
def test_score_function_has_the_gradient_as_its_exact_mean(record):
    worst, h = 0.0, 1e-5
    for D in range(1, 13):
        logits, b = some_logits(D), all_bits(D)
        copies = np.broadcast_to(logits, b.shape)
        each = score_function_of(squared_error, total_log_prob, copies, b)
        mean = np.exp(total_log_prob(logits, b)) @ each
        J = [[expectation(squared_error, logits + t * e) for t in (h, -h)] for e in np.eye(D)]
        slopes = np.array([(up - down) / (2 * h) for up, down in J])
        worst = max(worst, np.max(np.abs(mean - slopes)) / np.max(np.abs(slopes)))
    record("exact mean of the estimator / central difference - 1, largest", worst, limit=1e-8)
    assert worst < 1e-8


@claim("F2")
@pytest.mark.parametrize("D", range(1, 13))
def test_score_function_is_unbiased(D, record):
    logits = some_logits(D)
    exact = exact_gradient_by_hand(squared_error, logits)
    S = 100_000 + 60_000 * D
    samples = score_function(squared_error, replicate(logits, S), np.random.default_rng(D))
    z = check_unbiased(samples, exact)
    record(f"n = {D}: largest |z| of {D} coordinates, {S:,} samples", z, limit=5.4)


# %% [markdown]
# ### One rare bit
#
# The mean of $k$ estimates $z/\beta$ is a binomial count divided by $k\beta$. So its variance can
# be had as a finite sum, without {eq}`eq-score-rare`, and must agree with it.


# %%
def rare_variance(beta, k=1):
    """Variance of the mean of k estimates z / β: Eq. (eq-score-rare)."""
    return (1 - beta) / (k * beta)


@claim("F3")
def test_score_derivative_of_the_mean_of_a_bit_is_one(record):
    values = np.array([0.0, 1.0])
    log_prob = lambda beta, z: z * np.log(beta) + (1 - z) * np.log1p(-beta)
    worst = 0.0
    for beta in (1e-6, 0.03, 0.5, 0.97):
        worst = max(worst, abs(exact_gradient(lambda z: z, log_prob, beta, values) - 1))
        each = score_function_of(lambda z: z, log_prob, np.full(2, beta), values)
        np.testing.assert_allclose(each, values / beta, rtol=1e-12)  # Eq. (eq-score-rare)
    record("largest |d/dβ E[z] - 1|", worst, limit=1e-12)
    assert worst < 1e-12


@claim("F4")
def test_score_variance_of_a_rare_bit_is_exact(record):
    from scipy import stats

    for beta in (1e-4, 0.01, 0.3, 0.9):
        for k in (1, 2, 7, 50):
            counts = np.arange(k + 1)
            mass, G = stats.binom(k, beta).pmf(counts), counts / (k * beta)
            assert mass @ G == pytest.approx(1, rel=1e-10)
            assert mass @ (G - 1) ** 2 == pytest.approx(rare_variance(beta, k), rel=1e-9)
        a, mass, G = logit(beta), np.array([1 - beta, beta]), np.array([0, 1 - beta])
        by_hand = exact_gradient_by_hand(lambda b: b[:, 0], np.array([a]))
        assert mass @ G == pytest.approx(by_hand[0], rel=1e-10)
        variance = mass @ G**2 - (mass @ G) ** 2  # Eq. (eq-score-rare-logit)
        assert variance == pytest.approx(beta * (1 - beta) ** 3, rel=1e-10)
        assert variance / (mass @ G) ** 2 == pytest.approx(rare_variance(beta), rel=1e-10)
    record("variance at β = 0.5", rare_variance(0.5))
    record("variance at β = 0.0001", rare_variance(1e-4))
    assert rare_variance(1e-4) == pytest.approx(9999)


@claim("F4")
@pytest.mark.parametrize("beta", [0.02, 0.2, 0.7])
def test_score_variance_of_a_rare_bit_is_measured(beta, record):
    rng, k = np.random.default_rng(2), 5
    G = rng.binomial(k, beta, 1_000_000) / (k * beta)
    check_unbiased(G, 1.0)
    z = check_unbiased((G - 1) ** 2, rare_variance(beta, k))
    record(f"variance of the mean of 5, β = {beta}: |z|", z, limit=4.9)


# %% [markdown]
# ### Entropy
#
# For bits the entropy is a sum with a closed form, and differentiating it gives
# $\partial H / \partial a_i = -a_i\, \beta_i (1 - \beta_i)$ (exercise 1). With the 1, without it,
# or with any other number in its place, the mean of {eq}`eq-score-entropy` is that.


# %%
@claim("B10")
def test_score_gradient_of_the_entropy(record):
    logits, worst = some_logits(4, seed=3), 0.0
    b, copies = all_bits(4), replicate(some_logits(4, seed=3), 16)
    q = np.exp(total_log_prob(logits, b))
    closed = -logits * sc.expit(logits) * sc.expit(-logits)
    engine = grad(lambda a: -np.sum(np.exp(total_log_prob(a, b)) * total_log_prob(a, b)))(logits)
    np.testing.assert_allclose(engine, closed, rtol=1e-10)
    for constant in (1.0, 0.0, -30.0):
        f = lambda b, constant=constant: -(constant + total_log_prob(logits, b))
        mean = q @ score_function_of(f, total_log_prob, copies, b)  # Eq. (eq-score-entropy)
        worst = max(worst, np.max(np.abs(mean - closed)))
    record("largest error of the exact mean, with 1, 0 and -30", worst, limit=1e-12)
    assert worst < 1e-12

    f = lambda b: -(1 + total_log_prob(logits, b))
    samples = score_function(f, replicate(logits, 700_000), np.random.default_rng(3))
    record("sampled, largest |z| of 4 coordinates", check_unbiased(samples, closed), limit=5.1)


# %% [markdown]
# ### At the posterior
#
# A model whose posterior is a product of bits: each latent bit has a pixel of its own,
#
# $$ \begin{gathered} b_i \sim \mathrm{Bernoulli}(\sigma(\pi_i)), \qquad
#    x_i \mid b_i \sim \mathrm{Bernoulli}(\sigma(v_i + w_i b_i)), \\
#    a_i = \pi_i + \log \frac{p(x_i \mid b_i = 1)}{p(x_i \mid b_i = 0)} ,
#    \end{gathered} $$ (eq-score-conjugate)
#
# where $a_i$ are the logits of the posterior, by Bayes' rule. The covariance matrix
# {eq}`eq-score-at-the-posterior` is computed as a sum over all $b$. The Fisher information of
# independent bits is diagonal, with entries $\beta_i (1 - \beta_i)$.


# %%
def conjugate_model(D, seed=4):
    """Log-joint of Eq. (eq-score-conjugate) at one x, its posterior logits, and log p(x)."""
    rng = np.random.default_rng(seed)
    prior, shift, slope = rng.normal(0, 1, (3, D))
    x = rng.integers(0, 2, D).astype(float)
    log_lik = lambda b: bernoulli_log_prob(shift + slope * b, x)

    def log_joint(b):
        return total_log_prob(prior, b) + np.sum(log_lik(b), axis=-1)

    return log_joint, prior + log_lik(1.0) - log_lik(0.0), logsumexp(log_joint(all_bits(D)))


def moments(f, logits, baseline=0.0):
    """Exact mean (D,) and covariance (D, D) of one-sample estimates, by the sum over all bits."""
    b = all_bits(len(logits))
    q = np.exp(total_log_prob(logits, b))
    G = (f(b) - baseline)[:, None] * score(b, logits)
    mean = q @ G
    return mean, (G - mean).T @ (q[:, None] * (G - mean))


@claim("F9")
def test_score_function_at_the_posterior_is_all_noise_and_a_baseline_removes_it(record):
    log_joint, logits, log_evidence = conjugate_model(8)
    f = lambda b: log_joint(b) - total_log_prob(logits, b)
    np.testing.assert_allclose(f(all_bits(8)), log_evidence, rtol=1e-12)
    fisher = np.diag(sc.expit(logits) * sc.expit(-logits))
    mean, covariance = moments(f, logits)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    error = np.max(np.abs(covariance - log_evidence**2 * fisher))  # Eq. (eq-score-at-the-posterior)
    record("log p(x), nats", log_evidence)
    record("largest entry of the covariance", covariance.max())
    record("largest error of log² p(x) times the Fisher information", error, limit=1e-12)
    rest = np.max(np.abs(moments(f, logits, baseline=log_evidence)[1]))
    record("largest entry of the covariance with baseline log p(x)", rest, limit=1e-25)
    assert error < 1e-12 and rest < 1e-25 < 1 < covariance.max()


# %% [markdown]
# ### What the variance is due to
#
# First the misprints of the notes, on an integral that can be done: $z \sim N(\mu, 1)$, a
# prior $N(0, 1)$ and a likelihood $N(x; z, 1)$. For $f = \log p(x, z)$ the derivative of
# $\mathbb{E}[f] = -\frac12(\mu^2 + 1) - \frac12((x - \mu)^2 + 1) + \text{const}$ is $x - 2\mu$.
# Then the explanation: irrelevant bits lower $\log q$ and leave the variance where it was, while a
# constant added to $f$ leaves $q$ where it was and raises the variance.


# %%
@claim("E7")
def test_score_formula_needs_the_logarithms(record):
    mu, x = 0.7, 1.5
    z, weights = np.polynomial.hermite_e.hermegauss(80)
    z, weights = mu + z, weights / np.sum(weights)
    log_p = -0.5 * z**2 - 0.5 * (x - z) ** 2 - np.log(2 * np.pi)
    score = z - mu  # of N(mu, 1)
    exact = x - 2 * mu
    assert weights @ (log_p * score) == pytest.approx(exact, rel=1e-12)
    record("exact gradient of E[log p]", exact)
    record("the formula with p in the place of log p", weights @ (np.exp(log_p) * score))
    record("the formula with ∇z² in the place of ∇log q", weights @ (log_p * 2 * z))
    assert abs(weights @ (np.exp(log_p) * score) - exact) > 0.05
    assert abs(weights @ (log_p * 2 * z) - exact) > 1


@claim("E7")
def test_score_variance_is_due_to_the_values_of_f_and_not_to_small_probabilities(record):
    old = some_logits(3)
    variance = moments(squared_error, old)[1][0, 0]
    for more in (0, 4, 8):  # irrelevant fair bits
        logits = np.concatenate([old, np.zeros(more)])
        padded = moments(lambda b: squared_error(b[:, :3]), logits)[1][0, 0]
        assert padded == pytest.approx(variance, rel=1e-12)
        mean_log_q = expectation(lambda b, a=logits: total_log_prob(a, b), logits)
        record(f"mean of log q, {more} irrelevant bits", mean_log_q)
        record(f"variance of the first coordinate, {more} irrelevant bits", padded)
    b1 = sc.expit(old[0])
    for constant in (1.0, 10.0):
        shifted = moments(lambda b, c=constant: squared_error(b) + c, old)[1][0, 0]
        cross = expectation(lambda b: squared_error(b) * (b[:, 0] - b1) ** 2, old)
        grown = variance + 2 * constant * cross + constant**2 * b1 * (1 - b1)
        assert shifted == pytest.approx(grown, rel=1e-12)  # from Eq. (eq-score-variance)
        record(f"variance of the first coordinate, f + {constant:g}", shifted)


def test_score_variance_of_a_sum_has_two_parts():
    logits, values = some_logits(5), np.random.default_rng(5).normal(2, 1, (2, 5))
    f = lambda b: np.sum(np.where(b == 1, values[1], values[0]), axis=-1)
    p = sc.expit(logits)
    spread, means = p * (1 - p) * (values[1] - values[0]) ** 2, p * values[1] + (1 - p) * values[0]
    for m in (0.0, 3.0):
        variances = np.diag(moments(f, logits, m)[1])
        for i in range(5):
            rest = np.sum(means) - means[i] - m
            one = lambda b, i=i, rest=rest: np.where(b[:, 0] == 1, *values[::-1, i]) + rest
            level = moments(one, logits[i : i + 1])[1][0, 0]
            others = (np.sum(spread) - spread[i]) * p[i] * (1 - p[i])
            assert variances[i] == pytest.approx(level + others)  # Eq. (eq-score-parts)


# %% [markdown]
# ### Control variates and baselines
#
# Any statistic with a known mean will do for {eq}`eq-score-control`; here it is a linear function
# of the bits times the score. Its mean is known, because $\mathbb{E}[b_j (b_i - \beta_i)]$ is
# $\beta_i (1 - \beta_i)$ if $j = i$, else 0. Everything is a sum over outcomes, so that the minimum
# of the parabola is exact.


# %%
@claim("F6")
def test_score_control_variate_is_unbiased_and_has_an_optimal_scale(record):
    D, i = 6, 2
    logits, b = some_logits(D), all_bits(D)
    q, p = np.exp(total_log_prob(logits, b)), sc.expit(logits)
    G = squared_error(b) * score(b, logits)[:, i]
    c = (b @ np.linspace(0.3, 1.0, D)) * score(b, logits)[:, i]
    mean_c = np.linspace(0.3, 1.0, D)[i] * p[i] * (1 - p[i])
    assert q @ c == pytest.approx(mean_c)
    mean = lambda t: q @ t
    var = lambda t: mean((t - mean(t)) ** 2)
    covariance = mean((G - mean(G)) * (c - mean(c)))
    best = covariance / var(c)  # Eq. (eq-score-optimal-scale)
    left = (1 - covariance**2 / (var(c) * var(G))) * var(G)
    assert var(G - best * (c - mean_c)) == pytest.approx(left)
    for eta in (-1.0, 0.0, 0.5 * best, best, 3.0):
        controlled = G - eta * (c - mean_c)
        assert mean(controlled) == pytest.approx(mean(G), abs=1e-14)
        assert var(controlled) >= left * (1 - 1e-12)
    record("variance with the best scale / without control variate", left / var(G), limit=1)

    rng = np.random.default_rng(6)
    drawn = random.bernoulli(rng, replicate(logits, 500_000))
    s = score(drawn, logits)[:, i]
    samples = (squared_error(drawn) - best * (drawn @ np.linspace(0.3, 1.0, D))) * s + best * mean_c
    record("|z| of the controlled estimate", check_unbiased(samples, mean(G)), limit=4.9)


def best_baselines(f, logits):
    """The best constant for each coordinate, (D,): Eq. (eq-score-best-baseline)."""
    b, p = all_bits(len(logits)), sc.expit(logits)
    q = np.exp(total_log_prob(logits, b))
    if_one = (q * f(b)) @ b / p
    if_zero = (q * f(b)) @ (1 - b) / (1 - p)
    return (1 - p) * if_one + p * if_zero


@claim("F6")
def test_score_best_baseline(record):
    for D in (1, 2, 5, 9):
        logits = some_logits(D, seed=7)
        exact = exact_gradient_by_hand(squared_error, logits)
        best = best_baselines(squared_error, logits)
        for i, m in enumerate(best):
            variance = lambda m, i=i, a=logits: moments(squared_error, a, m)[1][i, i]
            np.testing.assert_allclose(moments(squared_error, logits, m)[0], exact, atol=1e-14)
            assert variance(m) < min(variance(m - 0.01), variance(m + 0.01))
            assert variance(m) < variance(expectation(squared_error, logits))
            if D == 1:
                assert variance(m) < 1e-30  # one bit: nothing is left
    plain, centred = (
        np.trace(moments(squared_error, logits, m)[1])
        for m in (0.0, expectation(squared_error, logits))
    )
    least = sum(moments(squared_error, logits, m)[1][i, i] for i, m in enumerate(best))
    record("9 bits: total variance, baseline E[f] / none", centred / plain, limit=1)
    record("9 bits: total variance, best baselines / none", least / plain, limit=1)
    assert least < centred < plain


@claim("F6")
@pytest.mark.parametrize("k", [2, 3, 10])
def test_score_leave_one_out_is_unbiased_with_the_variance_derived(k, record):
    D = 4
    logits = some_logits(D)
    b, p = all_bits(D), sc.expit(logits)
    exact = exact_gradient_by_hand(squared_error, logits)
    samples = leave_one_out(
        squared_error, replicate(logits, 400_000), np.random.default_rng(k), k=k
    )
    z = check_unbiased(samples, exact)
    record(f"k = {k}: largest |z| of the mean, 4 coordinates", z, limit=5.1)
    J = expectation(squared_error, logits)
    spread = expectation(lambda b: (squared_error(b) - J) ** 2, logits)
    known = np.diag(moments(squared_error, logits, J)[1])  # had one known the mean of f
    variance = known / k + (spread * p * (1 - p) + exact**2) / (k * (k - 1))
    z = check_unbiased((samples - exact) ** 2, variance)  # Eq. (eq-score-leave-one-out-variance)
    record(f"k = {k}: largest |z| of the variance", z, limit=5.1)
    if k == 2:  # the same without chance, over all pairs
        f, s, q = squared_error(b), score(b, logits), np.exp(total_log_prob(logits, b))
        G = (0.5 * (f[:, None] - f))[..., None] * (s[:, None] - s)
        pairs = (q[:, None] * q)[..., None]
        np.testing.assert_allclose(np.sum(pairs * G, axis=(0, 1)), exact, atol=1e-14)
        np.testing.assert_allclose(np.sum(pairs * (G - exact) ** 2, axis=(0, 1)), variance)


# %% [markdown]
# ## The Bernoulli VAE
#
# ### The model
#
# Now an autoencoder whose code is a layer of bits, or several layers. Chapters 7 to 9 compare many
# estimators on it, so it is defined once, here. With two layers of latents, the encoder works
# upwards from an image and the decoder downwards from the prior,
#
# $$ \begin{aligned}
#    a_1 &= \mathrm{enc}_1(x - \bar x), & b_1 &\sim \mathrm{Bernoulli}(\sigma(a_1)), \\
#    a_2 &= \mathrm{enc}_2(2 b_1 - 1), & b_2 &\sim \mathrm{Bernoulli}(\sigma(a_2)) ;
#    \end{aligned} $$ (eq-score-encoder)
#
# $$ \begin{gathered} b_2 \sim \mathrm{Bernoulli}(\sigma(\pi)), \qquad
#    b_1 \sim \mathrm{Bernoulli}\big(\sigma(\mathrm{dec}_2(2 b_2 - 1))\big), \\
#    x \sim \mathrm{Bernoulli}\big(
#    \sigma(\mathrm{dec}_1(2 b_1 - 1) + \mathrm{logit}\, \bar x) \big) .
#    \end{gathered} $$ (eq-score-decoder)
#
# The parameters $\phi$ are those of the encoder, $\theta$ those of the decoder and the logits
# $\pi$ of the prior. Three details are conventions of the literature
# {cite}`tucker2017rebar,grathwohl2018backpropagation` and matter for its numbers: the encoder sees
# images minus the mean image, what is fed by bits sees $\pm 1$, and the logit of the mean image
# (clipped to $[0.001, 0.999]$) is added to the output and not trained. The likelihood of all that
# there is, and the ELBO, are
#
# $$ \begin{aligned}
#    \log p_\theta(x, b) &= \log p_\theta(x \mid b_1) + \log p_\theta(b_1 \mid b_2)
#    + \log p_\theta(b_2), \\
#    f(b) &= \log p_\theta(x, b) - \log q_\phi(b_1 \mid x) - \log q_\phi(b_2 \mid b_1) ,
#    \end{aligned} $$ (eq-score-log-joint)
#
# in nats per image: sums over pixels, sums over latents, averages over images. With one layer,
# $b_2$ and its terms are absent and $\pi$ belongs to $b_1$. The maps are linear, or have hidden
# layers of $\tanh$ units. The published models have 200 latents per layer: `linear_1`, `linear_2`,
# and two `nonlinear` ones, which differ in the width of the decoder; Chapter 8 tells why.


# %%
from minigrad.data import binarize
from minigrad.nn import dense, dense_init
from minigrad.optim import adam

MODELS = {  # arguments of bernoulli_vae_init, for images of 784 pixels
    "linear_1": {"widths": [784, 200]},
    "linear_2": {"widths": [784, 200, 200]},
    "nonlinear": {
        "widths": [784, 200],
        "encoder_hidden": [200, 200],
        "decoder_hidden": [200, 200],
    },
    "nonlinear_wide": {
        "widths": [784, 200],
        "encoder_hidden": [200, 200],
        "decoder_hidden": [784, 784],
    },
}


# %% [markdown]
# A network is a list of layers, a map. The encoder is a list of maps, upwards; the decoder has its
# maps in the same order, so that `maps[0]` makes the pixels, and the logits of the prior.


# %%
def network_init(rng, widths, dtype=np.float32):
    """Dense layers from widths[0] to widths[-1] units: a list. Two widths make a linear map."""
    return [dense_init(rng, n, m, dtype) for n, m in zip(widths, widths[1:])]


def network(layers, x):
    """Dense layers with tanh between them: (..., widths[0]) to (..., widths[-1])."""
    for layer in layers[:-1]:
        x = np.tanh(dense(layer, x))
    return dense(layers[-1], x)


def bernoulli_vae_init(rng, widths, encoder_hidden=(), decoder_hidden=(), dtype=np.float32):
    """Parameters {"encoder": maps, "decoder": {"maps": maps, "prior": logits}}.

    `widths` = [pixels, latents of layer 1, of layer 2, ...]. Map l of the encoder goes from
    widths[l] to widths[l + 1] units, that of the decoder back, each through its hidden widths.
    """
    pairs = list(zip(widths, widths[1:]))
    return {
        "encoder": [network_init(rng, [n, *encoder_hidden, m], dtype) for n, m in pairs],
        "decoder": {
            "maps": [network_init(rng, [m, *decoder_hidden, n], dtype) for n, m in pairs],
            "prior": np.zeros(widths[-1], dtype),
        },
    }


# %% [markdown]
# How the bits come about is left open: `encode` asks a function `draw` for them, layer by layer.


# %%
def encode(encoder, centred, draw, k=1):
    """Logits and bits of the latent layers given images, bottom first: two lists of (k, B, d).

    `centred` (B, D) are images minus their mean, `draw(l, logits)` returns the bits of layer l.
    """
    logits, bits = [], []
    for l, layers in enumerate(encoder):  # Eq. (eq-score-encoder)
        a = network(layers, 2 * bits[-1] - 1 if bits else centred)
        logits.append(a if bits else np.broadcast_to(a, (k, *a.shape)))
        bits.append(draw(l, logits[-1]))
    return logits, bits


def output_bias(mean):
    """Logits (D,) of the mean image: fixed, added to those that the decoder computes."""
    return logit(np.clip(mean, 0.001, 0.999))


def decode(decoder, bits, mean):
    """Logits of what lies below each layer, given its bits: pixels (k, B, D), then latents."""
    below = [network(layers, 2 * b - 1) for layers, b in zip(decoder["maps"], bits)]
    return [below[0] + output_bias(mean), *below[1:]]  # Eq. (eq-score-decoder)


def log_joint(decoder, x, bits, mean):
    """log p(x, b) of each sample, in nats: (k, B)."""
    total = total_log_prob(decoder["prior"], bits[-1])
    for logits, target in zip(decode(decoder, bits, mean), [x, *bits]):
        total = total + total_log_prob(logits, target)
    return total  # Eq. (eq-score-log-joint)


def log_posterior(logits, bits):
    """log q(b | x) of each sample, in nats: (k, B)."""
    return sum(total_log_prob(a, b) for a, b in zip(logits, bits))


# %% [markdown]
# ### The seam
#
# Where does the estimator enter? The encoder is a deterministic function from $x$ and $\phi$ to
# logits, and autodiff differentiates it. Only the law of the bits, given their logits, needs an
# estimator. By the chain rule, for one layer,
#
# $$ \nabla_\phi\, \mathbb{E}_{q_{a}(b)}[f(b)]
#    = \Big( \frac{\partial a}{\partial \phi} \Big)^{\!\top}
#    \nabla_a\, \mathbb{E}_{q_a(b)}[f(b)]
#    \approx \Big( \frac{\partial a}{\partial \phi} \Big)^{\!\top} G , $$ (eq-score-seam)
#
# where $G$ is any estimate of the gradient *in the logits*. The matrix is the pull-back of
# Chapter 1. So the encoder is a `vjp`, the estimator replaces one link of the chain, and in code
# the seam is `pullback(estimate)`. The pull-back is linear and does not depend on the bits: an
# unbiased $G$ gives an unbiased gradient in $\phi$.
#
# With two layers $\log q$ is a sum, and each layer has a score of its own,
#
# $$ G_{a_1} = f(b)\, (b_1 - \sigma(a_1)), \qquad
#    G_{a_2} = f(b)\, (b_2 - \sigma(a_2)) . $$ (eq-score-layers)
#
# The logits $a_2$ depend on $b_1$, which was drawn and stays as it was drawn: no gradient flows
# from $a_2$ down through $b_1$. In code nothing has to be done about it. `random.bernoulli` returns
# plain arrays, and the trace ends there.
#
# The function below knows no estimator. It draws by a `draw` and asks an `estimate`, and the later
# chapters plug in here: REBAR and RELAX draw with noise that they keep, and compute their control
# variates from relaxed bits, which are just another `draw` for `encode`; MuProp runs `encode` with
# the means for bits. An estimator that wants $f$ at bits of its own choice has `log_joint` and
# `log_posterior` to compute it. Whatever else an estimator has to report, such as the gradient of
# its own parameters, comes back as `aux`.


# %%
def vae_gradient(params, x, mean, draw, estimate, k=1):
    """Values f (k, B), a gradient, like `params`, of the mean ELBO of images `x` (B, D), and aux.

    `draw` is as in `encode`; `estimate(f, logits, bits)` returns (estimates, aux): for each layer
    an estimate of the gradient of E[f] in its logits, (k, B, d), and whatever else it has to say.
    """
    logits, pullback, bits = vjp(
        lambda encoder: encode(encoder, x - mean, draw, k), params["encoder"], has_aux=True
    )

    def mean_log_joint(decoder):
        log_p = log_joint(decoder, x, bits, mean)
        return np.mean(log_p), log_p

    # Eq. (eq-score-elbo-gradient)
    (_, log_p), decoder = value_and_grad(mean_log_joint, has_aux=True)(params["decoder"])
    f = log_p - log_posterior(logits, bits)  # Eq. (eq-score-elbo)
    estimates, aux = estimate(f, logits, bits)
    (encoder,) = pullback([g / f.size for g in estimates])  # Eq. (eq-score-seam)
    return f, {"encoder": encoder, "decoder": decoder}, aux


def bernoulli_draws(rng):
    """A `draw` for `encode`: fresh bits from `rng`."""
    return lambda l, logits: random.bernoulli(rng, logits)


def score_estimates(signal, logits, bits):
    """Signals (k, B) times scores, for each layer: Eq. (eq-score-layers)."""
    return [signal[..., None] * score(b, a) for a, b in zip(logits, bits)]


def mean_elbo(params, x, mean, rng, k=1):
    """The ELBO of images `x` (B, D), by k samples of each, averaged; in nats per image."""
    logits, bits = encode(params["encoder"], x - mean, bernoulli_draws(rng), k)
    f = log_joint(params["decoder"], x, bits, mean) - log_posterior(logits, bits)
    return np.mean(f, dtype=np.float64)


def generate(decoder, mean, rng, n):
    """Pixel means (n, D) of n images, drawn from the prior downwards."""
    bits = random.bernoulli(rng, decoder["prior"], n)
    for layers in decoder["maps"][:0:-1]:
        bits = random.bernoulli(rng, network(layers, 2 * bits - 1))
    return expit(decode(decoder, [bits], mean)[0])


# %% [markdown]
# ### Training
#
# A baseline is a function `(state, x, f) -> (signal, new state)`. The signal is made with the *old*
# state, which was fitted to earlier samples; only then may the new samples enter. In this order the
# rule of the section on baselines cannot be broken. (The network of `nvil` is fitted to what the
# running mean leaves, which is of moderate size from the beginning.)


# %%
def no_baseline(state, _x, f):
    """The values themselves."""
    return f, state


def running_mean_init():
    """State of `running_mean`."""
    return {"t": 0, "mean": 0.0}


def running_mean(state, _x, f):
    """Values minus the mean of earlier ones, of the last 100 batches or so."""
    t = state["t"] + 1
    new = state["mean"] + (np.mean(f) - state["mean"]) / min(t, 100)
    return f - state["mean"], {"t": t, "mean": new}


def leave_one_out_signal(state, _x, f):
    """Each value minus the mean of the others, for k >= 2 samples."""
    k = len(f)
    return (f - np.mean(f, axis=0)) * (k / (k - 1)), state  # Eq. (eq-score-leave-one-out)


# %% [markdown]
# The state of NVIL holds the running mean, the network, and the optimiser of the network.


# %%
BASELINE_OPTIMIZER = adam(1e-3)


def nvil_init(rng, n_pixels, hidden=100):
    """State of `nvil`: a running mean, and a network from images to one number."""
    layers = network_init(rng, [n_pixels, hidden, 1])
    return {
        "level": running_mean_init(),
        "network": layers,
        "optimizer": BASELINE_OPTIMIZER.init(layers),
    }


def nvil(state, x, f):
    """Values minus a running mean and what a network predicts of the rest from `x` (B, D)."""
    rest, level = running_mean(state["level"], x, f)

    def error(layers):
        signal = rest - network(layers, x)[:, 0]
        return np.mean(signal * signal), signal  # Eq. (eq-score-nvil)

    (_, signal), grads = value_and_grad(error, has_aux=True)(state["network"])
    layers, inner = BASELINE_OPTIMIZER.update(grads, state["optimizer"], state["network"])
    return signal, {"level": level, "network": layers, "optimizer": inner}


# %% [markdown]
# A step then is: draw a batch, binarise it, estimate, ascend.


# %%
def training_step(images, mean, optimizer, batch, baseline, k):
    """A step of stochastic gradient ascent, for `minigrad.train.fit`.

    `images` (N, D) hold probabilities of a one; bits stay as they are. The state is {"params",
    "optimizer", "baseline"}. `baseline(state, x, f)` returns the learning signal, made with the
    state from before these samples, and the state for the next batch.
    """

    def step(state, rng):
        x = binarize(images[rng.integers(len(images), size=batch)], rng)

        def estimate(f, logits, bits):
            signal, after = baseline(state["baseline"], x - mean, f)
            return score_estimates(signal, logits, bits), after

        draw = bernoulli_draws(rng)
        f, ascent, after = vae_gradient(state["params"], x, mean, draw, estimate, k)
        descent = tree.map(np.negative, ascent)
        params, inner = optimizer.update(descent, state["optimizer"], state["params"])
        return {"params": params, "optimizer": inner, "baseline": after}, {"elbo": np.mean(f)}

    return step


# %% [markdown]
# ### By hand
#
# For the linear model with one layer the whole gradient takes a few lines. The encoder has weights
# $W_\phi$ $(D, d)$ and a bias row, the decoder $W_\theta$ $(d, D)$ and a bias row. A bar on a
# parameter marks the estimate of the gradient of the mean ELBO of $B$ images ($\bar x$ is still the
# mean image); let $t = 2b - 1$, and $\hat x$ be the pixel means. For one sample per image
#
# $$ \begin{gathered} \bar W_\theta = \frac1B\, t^\top (x - \hat x), \qquad
#    \bar \pi = \frac1B \sum_{\text{rows}} \big( b - \sigma(\pi) \big), \\
#    \bar W_\phi = \frac1B\, (x - \bar x)^\top
#    \Big( \underbrace{f(b) \odot (b - \sigma(a))}_{G} \Big) , \end{gathered} $$ (eq-score-by-hand)
#
# and the biases get the sums over rows of what stands on the right of each product. (In the first
# two the gradient goes inside the expectation, {eq}`eq-score-elbo-gradient`; the third is the score
# function. In the third, $f$ is one number per row.)


# %%
def linear_vae_gradient_by_hand(params, x, mean, bits):
    """Values f (B,) and gradient like `params`, linear maps and one layer of `bits` (B, d)."""
    (enc,), (dec,), prior = params["encoder"][0], params["decoder"]["maps"][0], params["decoder"]
    prior, t, B = prior["prior"], 2 * bits - 1, len(x)
    a = (x - mean) @ enc["w"] + enc["b"]  # Eq. (eq-score-encoder)
    pixels = t @ dec["w"] + dec["b"] + sc.logit(np.clip(mean, 0.001, 0.999))
    log_bernoulli = lambda a, b: np.sum(b * a - np.logaddexp(0, a), axis=-1)
    f = log_bernoulli(pixels, x) + log_bernoulli(prior, bits) - log_bernoulli(a, bits)

    def layer(inputs, bar):
        return {"w": inputs.T @ bar, "b": np.sum(bar, axis=0)}

    decoder = layer(t, (x - sc.expit(pixels)) / B)  # Eq. (eq-score-by-hand)
    prior_bar = np.sum(bits - sc.expit(prior), axis=0) / B
    encoder = layer(x - mean, f[:, None] * (bits - sc.expit(a)) / B)
    return f, {"encoder": [[encoder]], "decoder": {"maps": [[decoder]], "prior": prior_bar}}


# %% [markdown]
# Small models in float64 serve the checks: a few pixels, two or three bits per layer, so that
# every expectation is a sum over all bits, and the parameters large enough for every term to count.


# %%
SMALL = {
    "linear_1": {"widths": [5, 3]},
    "linear_2": {"widths": [5, 3, 2]},
    "nonlinear": {"widths": [5, 3], "encoder_hidden": [4, 4], "decoder_hidden": [4, 4]},
}


def small_bernoulli_vae(name, seed=0, B=3):
    """A random VAE in float64, images (B, 5), and a mean image."""
    rng = np.random.default_rng(seed)
    params = bernoulli_vae_init(rng, **SMALL[name], dtype=np.float64)
    params = tree.map(lambda p: p + 0.5 * rng.standard_normal(p.shape), params)
    x = rng.integers(0, 2, (B, 5)).astype(float)
    return params, x, rng.uniform(0.2, 0.8, 5)


def plain(f, logits, bits):
    """The score function without a baseline, for `vae_gradient`."""
    return score_estimates(f, logits, bits), None


def every_code(params):
    """All bits of all layers of a small VAE: a list of (n, d), one for each layer."""
    sizes = [layers[-1]["b"].size for layers in params["encoder"]]
    return np.split(all_bits(sum(sizes)), np.cumsum(sizes)[:-1], axis=1)


# %% [markdown]
# Over all codes of a small model the ELBO, the evidence and the mean of any estimate are finite
# sums.


# %%
def exact_elbo(params, x, mean):
    """The ELBO of each image (B,), by the sum over all bits: no sampling, no estimator."""
    codes = [np.repeat(b[:, None], len(x), axis=1) for b in every_code(params)]
    logits, _ = encode(params["encoder"], x - mean, lambda l, _: codes[l], k=len(codes[0]))
    log_q = log_posterior(logits, codes)
    return np.sum(np.exp(log_q) * (log_joint(params["decoder"], x, codes, mean) - log_q), axis=0)


def exact_log_evidence(params, x, mean):
    """log p(x) of each image (B,), by the sum over all bits."""
    codes = [np.repeat(b[:, None], len(x), axis=1) for b in every_code(params)]
    return logsumexp(log_joint(params["decoder"], x, codes, mean), axis=0)


def expected_gradient(params, x, mean, estimate, k=1):
    """Exact expectation of the gradient of `vae_gradient` for ONE image, over its k samples."""
    codes, total = every_code(params), None
    for chosen in np.ndindex(*[len(codes[0])] * k):
        bits = [b[list(chosen)][:, None] for b in codes]  # (k, 1, d)
        logits, _ = encode(params["encoder"], x - mean, lambda l, _, bits=bits: bits[l], k)
        weight = np.exp(np.sum(log_posterior(logits, bits)))
        draw = lambda l, _, bits=bits: bits[l]
        part = tree.map(
            lambda g, w=weight: w * g, vae_gradient(params, x, mean, draw, estimate, k)[1]
        )
        total = part if total is None else tree.map(np.add, total, part)
    return total


def largest_difference(a, b):
    """Largest absolute difference between the leaves of two containers of arrays."""
    return max(np.max(np.abs(x - y)) for x, y in zip(tree.leaves(a), tree.leaves(b)))


def test_score_vae_gradient_by_hand_is_that_of_minigrad():
    params, x, mean = small_bernoulli_vae("linear_1", B=6)
    bits = np.random.default_rng(1).integers(0, 2, (6, 3)).astype(float)
    f, by_hand = linear_vae_gradient_by_hand(params, x, mean, bits)
    values, engine, _ = vae_gradient(params, x, mean, lambda l, _: bits[None], plain)
    np.testing.assert_allclose(values[0], f, rtol=1e-12)
    assert tree.paths(engine) == tree.paths(by_hand)
    assert largest_difference(engine, by_hand) < 1e-13


# %% [markdown]
# The next check is the one that counts: the exact ELBO of the small models is differentiated as a
# sum over all bits, in all parameters of both networks. The estimates, weighted by the
# probabilities of their samples, must add up to that. And the ELBO must be a bound.


# %%
def leave_one_out_estimate(f, logits, bits):
    """Leave-one-out, for `vae_gradient`."""
    return score_estimates(leave_one_out_signal({}, None, f)[0], logits, bits), None


@claim("F6")
@pytest.mark.parametrize("name", SMALL)
def test_score_vae_gradient_is_unbiased_for_every_model_and_baseline(name, record):
    params, x, mean = small_bernoulli_vae(name, B=1)
    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)
    assert min(np.max(np.abs(g)) for g in tree.leaves(exact)) > 1e-3
    rng = np.random.default_rng(2)
    states = {
        no_baseline: {},
        running_mean: {"t": 9, "mean": -2.0},
        nvil: nvil_init(rng, 5) | {"level": {"t": 9, "mean": -2.0}},
    }
    worst = 0.0
    for baseline, state in states.items():
        estimate = lambda f, logits, bits, baseline=baseline, state=state: (
            score_estimates(baseline(state, x - mean, f)[0], logits, bits),
            None,
        )
        found = expected_gradient(params, x, mean, estimate)
        worst = max(worst, largest_difference(found, exact))
    if name != "linear_2":  # 1,024 pairs
        found = expected_gradient(params, x, mean, leave_one_out_estimate, k=2)
        worst = max(worst, largest_difference(found, exact))
    record(f"{name}: largest error of the exact mean, all baselines", worst, limit=1e-7)
    assert worst < 1e-7  # the network of nvil is in float32


@pytest.mark.parametrize("name", SMALL)
def test_score_vae_elbo_is_below_the_evidence(name):
    for seed in range(10):
        params, x, mean = small_bernoulli_vae(name, seed, B=8)
        gap = exact_log_evidence(params, x, mean) - exact_elbo(params, x, mean)
        assert np.min(gap) > 0
        rng = np.random.default_rng(seed)
        sampled = [mean_elbo(params, x, mean, rng, k=50) for _ in range(40)]
        z = np.mean(sampled) - np.mean(exact_elbo(params, x, mean))
        assert abs(z) < 5.5 * np.std(sampled) / np.sqrt(40)


@pytest.mark.parametrize("name", SMALL)
def test_score_vae_is_differentiable_in_relaxed_bits(name):
    params, x, mean = small_bernoulli_vae(name)
    noise = [random.logistic(np.random.default_rng(3), b.shape) for b in every_code(params)]
    top = len(noise) - 1

    def relaxed(l, logits):  # bits below, numbers between 0 and 1 in the top layer
        z = logits + noise[l][:3]
        return expit(z / 0.5) if l == top else np.where(z > 0, 1.0, 0.0)

    def f(params):
        logits, bits = encode(params["encoder"], x - mean, relaxed)
        return log_joint(params["decoder"], x, bits, mean) - log_posterior(logits, bits)

    check_grads(f, (params,))


def test_score_generated_pixels_have_the_means_of_the_model():
    rng = np.random.default_rng(12)
    params = bernoulli_vae_init(rng, [5, 3, 2, 2], dtype=np.float64)  # three layers of bits
    params = tree.map(lambda p: p + rng.standard_normal(p.shape), params)
    mean, images = rng.uniform(0.2, 0.8, 5), all_bits(5)
    probs = np.exp(exact_log_evidence(params, images, mean))
    assert np.sum(probs) == pytest.approx(1, rel=1e-12)
    check_unbiased(generate(params["decoder"], mean, rng, 20_000), probs @ images)


def test_score_second_layer_reads_bits_as_plus_and_minus_one():
    params, x, mean = small_bernoulli_vae("linear_2", B=8)
    bits = [b[:, None] for b in every_code(params)]
    draw = lambda sign: lambda l, _: bits[l] if sign > 0 else 1 - bits[l]
    up, down = (encode(params["encoder"], x - mean, draw(s), 32)[0][1] for s in (1, -1))
    np.testing.assert_allclose(up + down, 2 * params["encoder"][1][0]["b"] + 0 * up, rtol=1e-12)


def test_score_elbo_by_more_samples_has_less_noise():
    params, x, mean = small_bernoulli_vae("linear_1", B=2)
    rng = np.random.default_rng(13)
    noise = [np.std([mean_elbo(params, x, mean, rng, k) for _ in range(200)]) for k in (1, 25)]
    assert noise[0] / noise[1] == pytest.approx(5, rel=0.2)


def test_score_running_mean_is_that_of_earlier_batches_and_forgets():
    batches = np.random.default_rng(14).standard_normal((5, 2, 3))
    state = running_mean_init()
    for i, f in enumerate(batches):
        signal, state = running_mean(state, None, f)
        np.testing.assert_allclose(signal, f - np.mean(batches[:i]) if i else f)
    state = {"t": 10_000, "mean": 1.0}
    for _ in range(300):
        _, state = running_mean(state, None, np.zeros((2, 3)))
    assert state["mean"] == pytest.approx(np.exp(-3), rel=0.05)


def test_score_nvil_learns_what_an_image_tells_of_its_value():
    rng = np.random.default_rng(15)
    state = nvil_init(rng, 5)
    for _ in range(200):
        x = rng.choice([-0.5, 0.5], (50, 5)).astype(np.float32)
        f = -100 + 4 * x[:, 0] + rng.standard_normal((2, 50)).astype(np.float32)
        signal, state = nvil(state, x, f)
    assert np.mean(signal**2) < 2 < 4 < np.var(f)


def test_score_training_step_hands_the_baseline_on():
    params, x, mean = small_bernoulli_vae("linear_1")
    optimizer = adam(1e-3)
    state = {"params": params, "optimizer": optimizer.init(params)}
    state["baseline"], rng = running_mean_init(), np.random.default_rng(16)
    step = training_step(x, mean, optimizer, 4, running_mean, k=2)
    elbos = []
    for _ in range(3):
        state, report = step(state, rng)
        elbos.append(report["elbo"])
    assert state["baseline"]["t"] == 3
    assert state["baseline"]["mean"] == pytest.approx(np.mean(elbos))


def test_score_published_models_have_the_published_sizes():
    rng, x = np.random.default_rng(0), np.zeros((2, 784), np.float32)
    mean = np.full(784, 0.1, np.float32)
    decoders = {"linear_1": 157_584, "linear_2": 197_784, "nonlinear": 237_984}
    for name, arguments in MODELS.items():
        params = bernoulli_vae_init(rng, **arguments)
        size = sum(leaf.size for leaf in tree.leaves(params["decoder"]["maps"]))
        assert size == decoders.get(name, 1_388_464)
        logits, bits = encode(params["encoder"], x - mean, bernoulli_draws(rng), k=3)
        assert [b.shape for b in bits] == [(3, 2, 200)] * (len(arguments["widths"]) - 1)
        assert {a.dtype for a in (*logits, *bits)} == {np.dtype(np.float32)}
        assert log_joint(params["decoder"], x, bits, mean).dtype == np.float32
        assert generate(params["decoder"], mean, rng, 4).shape == (4, 784)


# %% [markdown]
# ### It trains
#
# In seconds, on digits: one layer of 32 bits, linear maps, leave-one-out with two samples. What it
# must beat is a decoder without latents, whose best pixel means are those of the training images.
# And the bits must carry the difference.

# %%
from chapters import records
from minigrad.data import digits
from minigrad.train import fit


def rows_of(images):
    """Images (N, 1, H, W) as rows (N, D)."""
    return images.reshape(len(images), -1)


@claim("F7")
def test_score_vae_trains_on_digits_in_seconds(record):
    rng, images = np.random.default_rng(0), rows_of(digits().x_train)
    mean = images.mean(0)
    params = bernoulli_vae_init(rng, [64, 32])
    optimizer = adam(5e-3)
    state = {"params": params, "optimizer": optimizer.init(params), "baseline": {}}
    step = training_step(images, mean, optimizer, 50, leave_one_out_signal, k=2)
    params = fit(step, state, 600, rng, progress=False)[0]["params"]
    x = binarize(rows_of(digits().x_test), np.random.default_rng(1))
    elbo = mean_elbo(params, x, mean, rng, k=20)
    floor = np.mean(total_log_prob(output_bias(mean), x))
    record("test ELBO on digits, 32 bits, 600 steps, nats", elbo, limit=floor)
    assert elbo > floor + 1.5


# %% [markdown]
# Then the four baselines against each other, all with two samples for each image, so that all cost
# the same evaluations of $f$. On digits, five models of each were trained with different seeds
# ({numref}`fig-baseline-race`, left). After 2,000 steps the test ELBO is −25.85 without a
# baseline, −25.27 with a running mean, −25.10 with a network and −25.00 with leave-one-out. The
# standard errors are 0.01 to 0.02, so the order is not chance. The right side of the figure
# compares the noise at *one* model, that of NVIL: the variance of the gradient in a logit,
# averaged over images and latents. A running mean divides it by 50; a baseline that knows the
# image, by another 3.
#
# On MNIST, in the fixed binarisation by Larochelle (50,000 images to train, 10,000 to test)
# {cite}`larochelle2011neural`, the model is `linear_1` ({numref}`fig-bernoulli-vae`). After 20,000
# steps of 24 images, ten passes through the data, the test ELBO is −131.2 nats with NVIL and −131.7
# with leave-one-out; one run of each does not decide between them. With a running mean it is
# −137.2. Without a baseline it is best, −147.7, after 9,000 steps, and at −149.1 in the end. Again
# at one model, the variance of its gradient is 139 times that of leave-one-out. (A decoder without
# latents, the mean image, has −205.8.) None of the four has converged: published runs take two
# million steps, and report a training ELBO of −112.5 for NVIL {cite}`grathwohl2018backpropagation`.

# %%
METHODS = ["score_function", "baseline", "nvil", "leave_one_out"]


@claim("F7", "F6")
def test_score_vae_baselines_compared_on_digits(record):
    run = records.load("score_function_vae_digits")["scalars"]
    seeds = range(5)
    final = {
        method: np.array([run[f"test_elbo_{method}_{seed}"] for seed in seeds])
        for method in METHODS
    }
    for worse, better in zip(METHODS, METHODS[1:]):
        difference = final[better] - final[worse]
        error = np.hypot(np.std(final[better], ddof=1), np.std(final[worse], ddof=1)) / np.sqrt(5)
        record(f"test ELBO, {better} minus {worse}, nats", np.mean(difference))
        record("its standard error, 5 seeds", error)
    assert np.min(final["leave_one_out"]) > np.max(final["score_function"]) + 0.3
    assert np.min(final["baseline"]) > np.max(final["score_function"])
    variances = [run[f"variance_{method}"] for method in METHODS]
    record("gradient variance, no baseline / running mean", variances[0] / variances[1])
    record("gradient variance, running mean / network", variances[1] / variances[2])
    assert variances[0] > 10 * variances[1]
    assert variances[1] > 2 * variances[2] and variances[1] > 2 * variances[3]


@claim("F7")
def test_score_vae_trains_on_binarised_mnist(record):
    run = records.load("score_function_vae_binarized_mnist")
    steps = run["config"]["steps"]
    for method in METHODS:
        curve = run["curves"][f"test_elbo_{method}_0"]
        record(f"{method}: test ELBO after {steps:,} steps of 24, nats", curve["values"][-1])
        assert curve["values"][-1] > curve["values"][0] + 10
    final = {method: run["scalars"][f"test_elbo_{method}_0"] for method in METHODS}
    assert final["leave_one_out"] > -133.0 and final["nvil"] > -133.0
    assert final["score_function"] < final["baseline"] < final["nvil"]
    assert final["score_function"] < max(run["curves"]["test_elbo_score_function_0"]["values"][:10])
    variances = [run["scalars"][f"variance_{method}"] for method in METHODS]
    record("gradient variance, no baseline / leave-one-out", variances[0] / variances[3])
    assert variances[0] > variances[1] > max(variances[2:])


# %% [markdown]
# ## What goes wrong
#
# None of the programs below raises an error, and with most of them the ELBO rises for a while. Each
# is held against the exact gradient of the small models.
#
# **The reconstruction is left out of the score term.** "The encoder gets the KL term, the decoder
# gets the reconstruction": so $\log p_\theta(x \mid b)$ is differentiated in $\theta$, and the
# score is multiplied with $\log p(b) - \log q(b \mid x)$ only. The encoder then never hears whether
# its code was any good. It is led to the prior, and the bits carry nothing.


# %%
def without_reconstruction(params, x, mean):
    """WRONG on purpose: an estimate whose signal lacks log p(x | b)."""

    def estimate(f, logits, bits):
        log_likelihood = total_log_prob(decode(params["decoder"], bits, mean)[0], x)
        return score_estimates(f - log_likelihood, logits, bits), None

    return estimate


@pytest.mark.parametrize("name", SMALL)
def test_score_term_without_reconstruction_is_rejected(name):
    params, x, mean = small_bernoulli_vae(name, B=1)
    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)
    assert largest_difference(expected_gradient(params, x, mean, plain), exact) < 1e-12
    wrong = expected_gradient(params, x, mean, without_reconstruction(params, x, mean))
    assert largest_difference(wrong["decoder"], exact["decoder"]) < 1e-12  # nothing to see here
    assert largest_difference(wrong["encoder"], exact["encoder"]) > 0.05


# %% [markdown]
# **The baseline sees the sample.** The mean over *all* $k$ samples looks like a baseline, and
# contains the sample itself. Compare the two forms of {eq}`eq-score-leave-one-out`: averaged
# over $k$, instead of divided by $k - 1$, the second has the mean
#
# $$ \mathbb{E}\Big[ \frac1k \sum_{j} \Big( f(z_j) - \frac1k \sum_l f(z_l) \Big) s(z_j) \Big]
#    = \frac{k - 1}{k}\, \nabla_\phi J . $$ (eq-score-peeking)
#
# Only half the gradient is left at $k = 2$. Likewise a running mean that is updated *before* it is
# subtracted takes the share with which each sample entered the mean away from the gradient.


# %%
def mean_of_all(f, logits, bits):
    """WRONG on purpose: the baseline of a sample contains the sample."""
    return score_estimates(f - np.mean(f, axis=0), logits, bits), None


def test_score_baseline_that_sees_the_sample_is_rejected():
    params, x, mean = small_bernoulli_vae("linear_1", B=1)
    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)
    half = expected_gradient(params, x, mean, mean_of_all, k=2)
    assert largest_difference(half["decoder"], exact["decoder"]) < 1e-12
    halved = tree.map(lambda g: 0.5 * g, exact["encoder"])  # Eq. (eq-score-peeking)
    assert largest_difference(half["encoder"], halved) < 1e-12

    def updated_first(f, logits, bits):
        _, state = running_mean({"t": 9, "mean": -2.0}, None, f)
        return score_estimates(f - state["mean"], logits, bits), None

    found = expected_gradient(params, x, mean, updated_first)
    shrunk = tree.map(lambda g: 0.9 * g, exact["encoder"])  # one batch in ten
    assert largest_difference(found["encoder"], shrunk) < 1e-12

    logits, rng = replicate(some_logits(4), 400_000), np.random.default_rng(8)
    b = random.bernoulli(rng, logits, 2)
    values = squared_error(b)
    peeked = np.mean((values - values.mean(0))[..., None] * score(b, logits), axis=0)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(peeked, exact_gradient_by_hand(squared_error, some_logits(4)))


# %% [markdown]
# **The surrogate and its missing `stop_gradient`.** A framework that differentiates scalars only is
# given a function whose gradient is the estimate,
#
# $$ \widetilde{\mathcal{L}} = \log p_\theta(x, b)
#    + \mathrm{stop}\big( f(b) - m \big)\, \log q_\phi(b \mid x) , $$ (eq-score-surrogate)
#
# at the bits that were drawn. Without the stop, $f$ is differentiated as well: $\theta$ gets
# $(1 + \log q)\, \nabla_\theta \log p$, with a factor that is usually negative and large.


# %%
def surrogate(params, x, mean, bits, stop=stop_gradient, m=0.0):
    """Eq. (eq-score-surrogate), averaged: a function with the right gradient and no right value."""
    logits, _ = encode(params["encoder"], x - mean, lambda l, _: bits[l], len(bits[0]))
    log_p, log_q = log_joint(params["decoder"], x, bits, mean), log_posterior(logits, bits)
    return np.mean(log_p + stop(log_p - log_q - m) * log_q)


def expected_over_codes(function, params, x, mean):
    """Exact expectation over q(b | x), for one image, of a tree that depends on the bits."""
    total = None
    for code in zip(*every_code(params)):
        bits = [b[None, None] for b in code]
        logits, _ = encode(params["encoder"], x - mean, lambda l, _, bits=bits: bits[l])
        weight = np.exp(np.sum(log_posterior(logits, bits)))
        part = tree.map(lambda g, w=weight: w * g, function(bits))
        total = part if total is None else tree.map(np.add, total, part)
    return total


@pytest.mark.parametrize("name", SMALL)
def test_score_surrogate_needs_its_stop_gradient(name):
    params, x, mean = small_bernoulli_vae(name, B=1)
    bits = [b[None, [5]] for b in every_code(params)]
    _, estimate, _ = vae_gradient(params, x, mean, lambda l, _: bits[l], plain)
    assert largest_difference(grad(surrogate)(params, x, mean, bits), estimate) < 1e-13
    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)
    unstopped = expected_over_codes(
        lambda bits: grad(surrogate)(params, x, mean, bits, stop=lambda f: f), params, x, mean
    )
    for part in ("encoder", "decoder"):
        assert largest_difference(unstopped[part], exact[part]) > 0.05


# %% [markdown]
# **The value of the surrogate is taken for the objective.** Its gradient is right; its value means
# nothing. The baseline shows it: with $m$ the expected gradient is the same, and the expected value
# has changed by $m\, H(q)$. A curve of it may fall while the ELBO rises. (Nor is its second
# derivative of any use: that of $f \log q$ lacks the term $f s s^\top$.) What belongs into a log is
# $f$.


# %%
def test_score_surrogate_value_is_not_the_objective():
    params, x, mean = small_bernoulli_vae("linear_1", B=1)
    elbo = exact_elbo(params, x, mean)[0]
    gradients, values = [], []
    for m in (0.0, 10.0):
        both = lambda bits, m=m: value_and_grad(surrogate)(params, x, mean, bits, m=m)
        value, gradient = expected_over_codes(both, params, x, mean)
        gradients.append(gradient)
        values.append(value)
    assert largest_difference(*gradients) < 1e-12
    logits, _ = encode(params["encoder"], x - mean, lambda l, a: np.zeros_like(a))
    b = all_bits(3)
    log_q = total_log_prob(logits[0][0], b)
    entropy = -np.sum(np.exp(log_q) * log_q)
    assert values[1] - values[0] == pytest.approx(10 * entropy)
    assert min(abs(value - elbo) for value in values) > 1


def test_score_surrogate_has_the_wrong_second_derivative():
    logit_, values = 0.4, np.array([0.0, 1.0])
    f = lambda b: 2.0 + 3.0 * b
    q = lambda a: np.exp(bernoulli_log_prob(a, values))
    second = lambda function: grad(grad(lambda a: np.sum(function(a))))(logit_)
    exact = second(lambda a: q(a) * f(values))
    wrong = second(lambda a: q(logit_) * f(values) * bernoulli_log_prob(a, values))
    squares = np.sum(q(logit_) * f(values) * score(values, logit_) ** 2)
    assert exact == pytest.approx(wrong + squares) and abs(squares) > 0.5


# %% [markdown]
# **The target of the baseline is not stopped.** The baseline is fitted by adding
# $-(f - m_\rho(x))^2$ to what is maximised. If $f$ in it is traced, the square is differentiated in
# $\theta$ too: the decoder is rewarded for making its likelihood *predictable*, that is, for
# lowering it where it is higher than $m_\rho$ expects. In this chapter `nvil` gets the values of
# $f$ as plain arrays, and the mistake cannot be made.


# %%
def with_fitted_baseline(params, layers, x, mean, bits, stop=stop_gradient):
    """The surrogate with a network as baseline, and minus the squared error of the network."""
    logits, _ = encode(params["encoder"], x - mean, lambda l, _: bits[l], len(bits[0]))
    log_p, log_q = log_joint(params["decoder"], x, bits, mean), log_posterior(logits, bits)
    f, m = log_p - log_q, network(layers, x - mean)[:, 0]
    return np.mean(log_p + stop_gradient(f - m) * log_q - (stop(f) - m) ** 2)


def test_score_baseline_with_a_traced_target_is_rejected():
    params, x, mean = small_bernoulli_vae("linear_1", B=1)
    layers = network_init(np.random.default_rng(1), [5, 4, 1], np.float64)
    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)

    def gradient(stop):
        return expected_over_codes(
            lambda bits: grad(with_fitted_baseline)(params, layers, x, mean, bits, stop),
            params, x, mean,
        )  # fmt: skip

    assert largest_difference(gradient(stop_gradient), exact) < 1e-12
    wrong = gradient(lambda f: f)
    assert largest_difference(wrong["decoder"], exact["decoder"]) > 0.5


# %% [markdown]
# **Sums over pixels, means over latents.** One `mean` in the place of a `sum`. In the ELBO it makes
# the KL term $d$ times too cheap, and the result is no bound: it can exceed the log-evidence. In
# the score it divides the gradient of the encoder by $d$, 200 in the published models. Under Adam
# alone that is hard to see. It is wrong relative to everything it is added to.


# %%
def elbo_with_mean_over_latents(params, x, mean):
    """WRONG on purpose: exact expectation, one layer, of log p(x | b) + mean(log p(b) - log q)."""
    (b,) = every_code(params)
    codes = [np.repeat(b[:, None], len(x), axis=1)]
    logits, _ = encode(params["encoder"], x - mean, lambda l, _: codes[l], k=len(b))
    log_q = log_posterior(logits, codes)
    log_likelihood = total_log_prob(decode(params["decoder"], codes, mean)[0], x)
    rest = log_joint(params["decoder"], x, codes, mean) - log_likelihood - log_q
    return np.sum(np.exp(log_q) * (log_likelihood + rest / b.shape[1]), axis=0)


def score_with_mean_over_latents(f, logits, bits):
    """WRONG on purpose: the gradient of f times the mean, over latents, of log q."""
    return [g / g.shape[-1] for g in score_estimates(f, logits, bits)], None


def test_score_mean_over_latents_is_rejected():
    gaps = []
    for seed in range(10):
        params, x, mean = small_bernoulli_vae("linear_1", seed, B=8)
        gaps += list(
            exact_log_evidence(params, x, mean) - elbo_with_mean_over_latents(params, x, mean)
        )
    assert min(gaps) < -0.1  # no bound
    params, x, mean = small_bernoulli_vae("linear_1", B=1)
    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)
    wrong = expected_gradient(params, x, mean, score_with_mean_over_latents)
    third = tree.map(lambda g: g / 3, exact["encoder"])
    assert largest_difference(wrong["encoder"], third) < 1e-12
    assert largest_difference(wrong["decoder"], exact["decoder"]) < 1e-12


# %% [markdown]
# ## Figures
#
# The rare bit: lines are {eq}`eq-score-rare` and {eq}`eq-score-rare-logit`, marks are measured.

# %%
from chapters.style import COLOUR, LINESTYLE, MARKER


def figure_rare_one():
    """One bit, f(z) = z: variance (left) and relative variance (right) of the score function."""
    import matplotlib.pyplot as plt

    beta, marks = np.geomspace(1e-4, 0.95, 200), np.geomspace(1e-3, 0.9, 8)
    rng, n = np.random.default_rng(0), 1_000_000
    share = np.array([rng.binomial(n, p) / n for p in marks])  # of ones among n bits
    spread = share * (1 - share)
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.9))
    red, grey = COLOUR["score_function"], COLOUR["exact"]
    left.loglog(beta, rare_variance(beta), color=red, label=r"in $\beta$: $(1 - \beta)/\beta$")
    left.loglog(marks, spread / marks**2, MARKER["score_function"], color=red)
    left.loglog(beta, beta * (1 - beta) ** 3, "--", color=grey,
                label=r"in the logit: $\beta (1 - \beta)^3$")  # fmt: skip
    left.loglog(marks, spread * (1 - marks) ** 2, MARKER["exact"], color=grey)
    left.set(xlabel=r"probability $\beta$", ylabel="variance of one estimate", ylim=(1e-5, 1e5))
    left.legend(loc="upper right")
    right.loglog(beta, rare_variance(beta), color=red, label="in either parameter")
    right.loglog(marks, spread / share**2, MARKER["score_function"], color=red)
    right.set(xlabel=r"probability $\beta$", ylabel="variance / (exact gradient)²")
    right.legend(loc="upper right")
    return fig


# %% [markdown]
# How many evaluations of $f$ does it take to know one coordinate to 10 %? For fair bits and
# $f(b) = \sum_j b_j$ every variance is known: {eq}`eq-score-parts` gives, relative to the squared
# gradient, $D^2 + D - 1$ without a baseline and $D - 1$ with the best one. Leave-one-out with two
# samples is at $2D$ per evaluation, by {eq}`eq-score-leave-one-out-variance`. One needs a hundred
# times that. The sum needs $2^D$ evaluations, whatever the accuracy.


# %%
def relative_variances(D, k=2):
    """Variance times evaluations / squared gradient, by method: D fair bits, f = number of ones."""
    return {
        "score_function": D**2 + D - 1,
        "leave_one_out": (D - 1) + (D + 1) / (k - 1),
        "baseline": D - 1.0,
    }


def test_score_relative_variances_of_fair_bits():
    f = lambda b: np.sum(b, axis=-1)
    for D in (1, 4, 9):
        logits, exact = np.zeros(D), relative_variances(D)
        for name, m in (("score_function", 0.0), ("baseline", D / 2)):
            mean, covariance = moments(f, logits, m)
            np.testing.assert_allclose(mean, 0.25)
            np.testing.assert_allclose(np.diag(covariance) / mean**2, exact[name], atol=1e-12)
    samples = leave_one_out(f, np.zeros((200_000, 1, 9)), np.random.default_rng(9))
    check_unbiased(2 * (samples[:, 0, 0] - 0.25) ** 2 * 16, relative_variances(9)["leave_one_out"])


def figure_evaluations():
    """Evaluations of f for 10 % error: all outcomes, or samples with and without a baseline."""
    import matplotlib.pyplot as plt

    D = np.arange(2, 31)
    dims, f = np.array([2, 4, 8, 16, 30]), lambda b: np.sum(b, axis=-1)
    label = {
        "score_function": "no baseline: $100\\,(D^2 + D - 1)$",
        "leave_one_out": "leave one out, $k = 2$: $200\\,D$",
        "baseline": "best baseline: $100\\,(D - 1)$",
    }
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    style = {"color": COLOUR["exact"], "linestyle": LINESTYLE["exact"]}
    ax.semilogy(D, 2.0**D, label="all outcomes: $2^D$, exact", **style)
    for name, text in label.items():
        style = {"color": COLOUR[name], "linestyle": LINESTYLE[name]}
        ax.semilogy(D, 100.0 * relative_variances(D)[name], label=text, **style)
        found = []
        for d in dims:
            logits, rng = np.zeros((20_000, 1, d)), np.random.default_rng(d)
            if name == "leave_one_out":
                G, cost = leave_one_out(f, logits, rng), 2
            else:
                m = d / 2 if name == "baseline" else 0.0
                G, cost = score_function(f, logits, rng, baseline=m), 1
            found.append(100 * cost * np.mean((G - 0.25) ** 2) * 16)
        ax.semilogy(dims, found, MARKER[name], color=COLOUR[name])
    ax.set(xlabel="number of bits $D$", ylabel="evaluations of $f$", ylim=(3, 3e9))
    ax.legend(loc="upper left")
    return fig


# %%
def figure_best_baseline():
    """Variance against a constant baseline: one bit (left), and each of eight bits (right)."""
    import matplotlib.pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(6.4, 2.9))
    cases = [
        (np.array([-1.5]), lambda b: 1 + 2 * b[:, 0]),
        (np.linspace(-2.5, 2.5, 8), lambda b: 2 + 4 * squared_error(b)),
    ]
    for ax, (logits, f) in zip(panels, cases):
        best, level = best_baselines(f, logits), expectation(f, logits)
        m = np.linspace(0, 1.6 * max(best.max(), level), 60)
        curves = np.array([np.diag(moments(f, logits, value)[1]) for value in m])
        for i, (curve, at) in enumerate(zip(curves.T, best)):
            style = {"color": COLOUR["baseline"], "linestyle": "-", "linewidth": 1}
            ax.plot(m, curve, label="variance of $G_i$" if i == 0 else None, **style)
            least = moments(f, logits, at)[1][i, i]
            ax.plot(at, least, MARKER["exact"], color=COLOUR["exact"],
                    label="best, $m_i^*$" if i == 0 else None)  # fmt: skip
        grey = {"color": COLOUR["numeric"], "linestyle": ":"}
        ax.axvline(level, label=r"$m = \mathbb{E}[f]$", **grey)
        D = len(logits)
        ax.set(
            xlabel="baseline $m$", title="one bit" if D == 1 else f"{D} bits", ylim=(-0.03, None)
        )
    panels[0].set(ylabel="variance of one coordinate")
    panels[0].legend(loc="upper right")
    return fig


# %%
LABEL = {
    "score_function": "no baseline",
    "baseline": "running mean",
    "nvil": "network (NVIL)",
    "leave_one_out": "leave one out",
}


def figure_baseline_race():
    """Four baselines, two samples an image. Left: digits, five seeds. Right: gradient variance."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0))
    curves = records.load("score_function_vae_digits")["curves"]
    for method in METHODS:
        style = {"color": COLOUR[method], "linestyle": LINESTYLE[method]}
        runs = [curves[f"test_elbo_{method}_{seed}"] for seed in range(5)]
        steps = np.array(runs[0]["steps"])
        values = np.array([run["values"] for run in runs])
        left.fill_between(steps, values.min(0), values.max(0), color=COLOUR[method], alpha=0.2,
                          linewidth=0)  # fmt: skip
        left.plot(steps, values.mean(0), label=LABEL[method], **style)
        found = curves[f"variance_{method}"]
        right.semilogy(found["steps"], found["values"], **style)
    left.set(xlabel="steps", ylabel="test ELBO (nats per image)")
    right.set(xlabel="steps", ylabel="variance, one logit", title="at one and the same model")
    left.set_title("digits, 32 bits")
    left.legend(loc="lower right")
    return fig


# %%
def tile(images, columns):
    """Rows (n, D) of square images as one picture."""
    side = round(images.shape[1] ** 0.5)
    grid = images.reshape(-1, columns, side, side)
    return grid.swapaxes(1, 2).reshape(-1, columns * side)


def figure_bernoulli_vae():
    """Binarised MNIST, 200 bits, linear maps. Right: test images, reconstructions, samples."""
    import matplotlib.pyplot as plt

    run = records.load("score_function_vae_binarized_mnist")
    fig, (ax, picture) = plt.subplots(1, 2, figsize=(6.4, 3.2))
    for method in METHODS:
        curve = run["curves"][f"test_elbo_{method}_0"]
        style = {"color": COLOUR[method], "linestyle": LINESTYLE[method], "label": LABEL[method]}
        ax.plot(np.array(curve["steps"]) / 1000, curve["values"], **style)
    ax.set(xlabel="steps of 24 images (thousands)", ylabel="test ELBO (nats per image)")
    ax.legend(loc="lower right")
    arrays = run["arrays"]
    strips = [arrays["originals"], arrays["reconstructions"], arrays["samples"][:60]]
    picture.imshow(tile(np.concatenate(strips), 10), cmap="gray_r", vmin=0, vmax=255)
    picture.axhline(55.5, color=COLOUR["score_function"], linestyle="-", linewidth=1)
    picture.set(xticks=[], yticks=[])
    picture.spines[:].set_visible(False)
    picture.grid(False)
    return fig


# %% [markdown]
# ## Exercises
#
# **1. The entropy of a bit.** Show that $dH/da = -a\, \beta (1 - \beta)$ for a bit with logit $a$.
# In {eq}`eq-score-entropy` the 1 may be any number. Which one leaves no variance?
#
# ```{admonition} Solution
# :class: dropdown
#
# $H = \log(1 + e^a) - \beta a$, and $d\beta/da = \beta(1 - \beta)$, so
# $dH/da = \beta - \beta - a\, \beta(1 - \beta)$. With $f = -\log q$, {eq}`eq-score-best-baseline`
# gives $m^* = -(1 - \beta) \log \beta - \beta \log(1 - \beta)$: the estimate
# $-(\log q(b) + m^*)\, (b - \beta)$ is the gradient for both values of $b$. At $\beta = \frac12$
# it is $\log 2$, and the 1 was not far off.
# ```


# %% tags=["hide-cell"]
def test_score_exercise_1_entropy_of_a_bit():
    for a in (-2.0, 0.3, 4.0):
        beta, b = sc.expit(a), np.array([0.0, 1.0])
        m = -(1 - beta) * np.log(beta) - beta * np.log1p(-beta)
        estimates = (-bernoulli_log_prob(a, b) - m) * score(b, a)
        np.testing.assert_allclose(estimates, -a * beta * (1 - beta), rtol=1e-10)


# %% [markdown]
# **2. The rare bit again.** For $f(z) = z$ compute the variance in $\beta$ with the baseline
# $m = \mathbb{E}[f] = \beta$. Does it cure the blow-up at $\beta \to 0$? What is the best $m$?
#
# ```{admonition} Solution
# :class: dropdown
#
# $G = (z - \beta)^2 / (\beta (1 - \beta))$, with mean 1 and variance
# $(1 - 2\beta)^2 / (\beta(1 - \beta))$. It vanishes at $\beta = \frac12$ and is still $1/\beta$ for
# small $\beta$: at the rare outcome the mean of $f$ is a poor guess. The best baseline
# {eq}`eq-score-best-baseline` is $m^* = 1 - \beta$, close to the value of the *rare* outcome, and
# then $G = 1$ always.
# ```


# %% tags=["hide-cell"]
def test_score_exercise_2_mean_as_baseline_does_not_cure_a_rare_bit():
    z = np.array([0.0, 1.0])
    for beta in (0.001, 0.2, 0.5, 0.8):
        q, s = np.array([1 - beta, beta]), z / beta - (1 - z) / (1 - beta)
        G = (z - beta) * s
        exact = (1 - 2 * beta) ** 2 / (beta * (1 - beta))
        assert q @ (G - 1) ** 2 == pytest.approx(exact, abs=1e-12)
        np.testing.assert_allclose((z - (1 - beta)) * s, 1)


# %% [markdown]
# **3. Summing over one's own bit.** Bit $i$ has two values only. Replace $G_i$ by its conditional
# expectation given all other bits {cite}`titsias2015local`. What does it cost? Is it unbiased? Can
# its variance be larger?
#
# ```{admonition} Solution
# :class: dropdown
#
# $\mathbb{E}[f s_i \mid b_{j \ne i}] = \beta_i (1 - \beta_i) \big( f(b_{i \to 1}) -
# f(b_{i \to 0}) \big)$. One of the two is $f(b)$, so all coordinates cost $D + 1$ evaluations.
# The expectation of a conditional expectation is the expectation, and by the law of total variance
# the variance cannot be larger (Rao and Blackwell). Every constant baseline drops out. For a sum
# over bits it is exact.
# ```


# %% tags=["hide-cell"]
def test_score_exercise_3_summing_over_ones_own_bit():
    for D in (1, 4, 8):
        logits, b = some_logits(D), all_bits(D)
        q, p = np.exp(total_log_prob(logits, b)), sc.expit(logits)
        exact = exact_gradient_by_hand(squared_error, logits)
        for i in range(D):
            flipped = [np.where(np.arange(D) == i, v, b) for v in (1.0, 0.0)]
            local = p[i] * (1 - p[i]) * (squared_error(flipped[0]) - squared_error(flipped[1]))
            assert q @ local == pytest.approx(exact[i], rel=1e-12)
            m = best_baselines(squared_error, logits)[i]
            least = moments(squared_error, logits, m)[1][i, i]
            assert q @ (local - exact[i]) ** 2 <= least + 1e-15


# %% [markdown]
# **4. Categories.** Let $z \in \{1, \dots, K\}$ with $q(z) \propto e^{a_z}$. Find the score in $a$.
# Is the estimator with the best baseline free of variance, as for one bit?
#
# ```{admonition} Solution
# :class: dropdown
#
# $\log q(z) = a_z - \log \sum_j e^{a_j}$, so $s(z) = e_z - \mathrm{softmax}(a)$ with the unit
# vector $e_z$. For $K = 2$ this is one bit with the logit $a_1 - a_2$. For $K > 2$ an estimate
# free of variance in coordinate $i$ would need
# $(f(z) - m)\, s_i(z)$ to be constant over all $z \ne i$, where $s_i$ is: $f$ would have to be
# constant there. In general it is not.
# ```


# %% tags=["hide-cell"]
def test_score_exercise_4_categories():
    a, f = np.array([0.2, -1.0, 0.7, 0.1]), np.array([1.0, -2.0, 0.5, 3.0])
    z, q = np.arange(4), np.exp(log_softmax(a))
    s = np.eye(4) - q
    log_prob = lambda a, z: np.take_along_axis(log_softmax(a), z[:, None], axis=-1)[:, 0]
    engine = score_function_of(lambda z: f[z], log_prob, np.tile(a, (4, 1)), z)
    np.testing.assert_allclose(engine, f[:, None] * s)
    exact = grad(lambda a: np.sum(np.exp(log_softmax(a)) * f))(a)
    np.testing.assert_allclose(q @ engine, exact)
    for i in range(4):
        best = (q * f) @ s[:, i] ** 2 / (q @ s[:, i] ** 2)
        left = q @ ((f - best) * s[:, i] - exact[i]) ** 2
        assert 1e-3 < left < q @ (f * s[:, i] - exact[i]) ** 2
    flat = np.array([2.0, 5.0, 5.0, 5.0])  # constant but for one category
    exact = grad(lambda a: np.sum(np.exp(log_softmax(a)) * flat))(a)
    best = (q * flat) @ s[:, 0] ** 2 / (q @ s[:, 0] ** 2)
    np.testing.assert_allclose((flat - best) * s[:, 0], exact[0])


# %% [markdown]
# **5. What the second layer need not hear.** In a model with two layers, which terms of $f$ in
# {eq}`eq-score-log-joint` may be dropped from $G_{a_2}$ in {eq}`eq-score-layers`? May terms be
# dropped from $G_{a_1}$?
#
# ```{admonition} Solution
# :class: dropdown
#
# Given $b_1$, the terms $\log p_\theta(x \mid b_1)$ and $\log q_\phi(b_1 \mid x)$ do not depend on
# $b_2$: to the second layer they are a baseline, and a bad one. What remains is the *local* signal
# $\log p_\theta(b_1 \mid b_2) + \log p_\theta(b_2) - \log q_\phi(b_2 \mid b_1)$, with which the
# second layer is a VAE of its own whose observation is $b_1$. The likelihood of the pixels, by far
# the largest term, is gone. For $G_{a_1}$ nothing can be dropped: all terms depend on $b_1$ or on
# what was drawn given $b_1$.
# ```


# %% tags=["hide-cell"]
def test_score_exercise_5_local_signal_of_the_second_layer():
    params, x, mean = small_bernoulli_vae("linear_2", B=1)
    squares = {"all": 0.0, "local": 0.0}

    def local(f, logits, bits):
        log_lik = total_log_prob(decode(params["decoder"], bits, mean)[0], x)
        rest = f - log_lik + total_log_prob(logits[0], bits[0])
        first, second = score_estimates(f, logits, bits)
        local = rest[..., None] * score(bits[1], logits[1])
        weight = np.exp(log_posterior(logits, bits)[0, 0])
        squares["all"] += weight * np.sum(second**2)
        squares["local"] += weight * np.sum(local**2)
        return [first, local], None

    exact = grad(lambda p: np.mean(exact_elbo(p, x, mean)))(params)
    found = expected_gradient(params, x, mean, local)
    assert largest_difference(found, exact) < 1e-12
    assert squares["local"] < 0.5 * squares["all"]
