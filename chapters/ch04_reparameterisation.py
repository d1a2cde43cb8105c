# %% [markdown]
# # 4. Reparameterisation
#
# A model draws a random number and computes with it. We want the derivative of the expected
# result in the parameters of the *law* of that number. The parameters are not in the result; they
# only decide which numbers are drawn. How can a gradient pass through a draw? One answer lets the
# samples stand still and changes their weights. The other, reparameterisation, writes the sample
# as a function of its parameters and of noise without parameters: the sample then moves, and the
# chain rule of Chapter 1 does the rest. This chapter derives both, says when each may be used,
# extends the second to laws without a formula for the sample, and computes both variances exactly
# for a quadratic and for a cosine. The order is not the same.
#
# **Reads after:** 1 · **Runs in:** 5 s · **Papers:**
# {cite}`kingma2014auto,rezende2014stochastic,williams1992simple,figurnov2018implicit`,
# {cite}`jankowiak2018pathwise,gal2016uncertainty,mohamed2020monte`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $S$ | number of samples, each a replica of the estimate | () |
# | $D$ | dimension of an event | () |
# | $B$ | number of data in a batch | () |
# | $\phi$ | parameters of the approximate posterior, or of any law we differentiate through | any |
# | $z$ | latent variable; there are no data in this chapter, hence no batch axis | (S, D) |
# | $q_\phi(z)$ | distribution to be differentiated through; a density if $z$ is continuous | () |
# | $f$ | function whose expectation is differentiated | () for each $z$ |
# | $J(\phi)$ | the expectation of $f(z)$ | () |
# | $\varepsilon$ | noise whose law has no parameters; its density is $p(\varepsilon)$ | (S, D) |
# | $g$ | sampler, $z = g(\varepsilon, \phi)$ | (D,) for each $\varepsilon$ |
# | $G$ | estimate of $\nabla_\phi J$ from one sample | as $\phi$, for each sample |
# | $\mu$ | location | (D,) |
# | $\sigma$ | scale, a standard deviation | (D,) |
# | $\Sigma$ | covariance matrix | (D, D) |
# | $\odot$ | elementwise product | of two arrays of one shape |
# | $H$, $C(\varepsilon)$ | $f(g(\varepsilon, \phi))$, and its Lipschitz constant in $\phi$ | () |
# | $p_0$ | density of the noise in one coordinate | () |
# | $\Phi$, $\varphi$ | distribution function and density of $N(0, 1)$ | () |
# | $\sigma(\cdot)$ | logistic function, $\sigma(s) = 1 / (1 + e^{-s})$ | () |
# | $w$ | weights of the observation in the example, $D = 2$; `WEIGHTS` in the code | (D,) |
# | $L$ | Cholesky factor of the covariance, $\Sigma = L L^\top$ | (D, D) |
# | $F(z; \phi)$ | cumulative distribution function of a real $z$ | () |
# | $u$ | uniform noise on $(0, 1)$ | (S,) |
# | $\alpha$, $\beta$ | concentrations of a Gamma or a Beta law; `a` and `b` in the code | () |
# | $\psi$ | digamma function, the derivative of $\log \Gamma$ | () |
# | $\omega$ | frequency of the test function $\cos(\omega z)$ | () |
# | $m$ | the value of every coordinate of $\mu$ in the quadratic example | () |
# | $A$, $R$ | parts of the squared length of $z$: that of one coordinate, and the rest | () |
# | $r$, $v$ | mean and variance of $R$ | () |
# | $\rho$ | mean of $\cos(2 \omega z)$ | () |
# | $c$ | constant added to $f$, or subtracted from it | () |
# | $h$ | step of a finite difference | () |
# | $Q_h$ | difference quotient of $f(z)$ for a bit $z$, at fixed noise | () |

# %% [markdown]
# ## Derivation
#
# ### Two ways to differentiate an expectation
#
# The objective is an expectation whose law depends on $\phi$,
#
# $$ J(\phi) = \mathbb{E}_{q_\phi(z)}[f(z)] = \int f(z)\, q_\phi(z)\, dz . $$ (eq-path-objective)
#
# In variational inference $f$ is $\log p(x, z) - \log q_\phi(z)$ and $J$ is the evidence lower
# bound of Chapter 2; nothing here depends on it. In this chapter $f$ is any function that does not
# itself contain $\phi$. (If it does, the derivative of $f$ at fixed $z$ is one more term, and
# causes no difficulty: it is an expectation.) Where one may differentiate under the integral,
# $\nabla q = q \, \nabla \log q$ gives
#
# $$ \nabla_\phi J = \int f(z)\, \nabla_\phi q_\phi(z)\, dz
#    = \mathbb{E}_{q_\phi(z)}\big[ f(z)\, \nabla_\phi \log q_\phi(z) \big] . $$ (eq-path-score)
#
# This is the *score-function* estimator {cite}`williams1992simple`: draw $z$, and average
# $G_{\text{score}} = f(z)\, \nabla_\phi \log q_\phi(z)$. It needs samples from any source, a
# density that is differentiable in $\phi$, and the *values* of $f$; $z$ may be discrete. Chapter 3
# is about it, and about how to make it less noisy. Here it is the yardstick.
#
# For the second way, write the sample as a function of noise that knows nothing of $\phi$:
#
# $$ z = g(\varepsilon, \phi), \qquad \varepsilon \sim p(\varepsilon), \qquad
#    \text{such that } z \sim q_\phi . $$ (eq-path-sampler)
#
# Then $J(\phi) = \mathbb{E}_{p(\varepsilon)}[f(g(\varepsilon, \phi))]$. The law of
# $\varepsilon$ does not depend on $\phi$, the integrand does, and the derivative goes inside:
#
# $$ \nabla_\phi J = \mathbb{E}_{p(\varepsilon)}\Big[
#    \Big( \frac{\partial g(\varepsilon, \phi)}{\partial \phi} \Big)^{\!\top}
#    \nabla_z f(z) \Big] , \qquad z = g(\varepsilon, \phi) . $$ (eq-path-gradient)
#
# This is the *pathwise* estimator {cite}`kingma2014auto,rezende2014stochastic`. What stands in the
# brackets is the chain rule: how much $f$ changes when $z$ moves, times how much $z$ moves when
# $\phi$ does. A common slip is a product in the place of the chain rule,
# $\partial g / \partial \phi$ times $f$ itself. Take $f(z) = z^2/2$,
# $z = \mu + \sigma\varepsilon$ and the derivative in $\mu$, where
# $\partial g / \partial \mu = 1$. Here $J = (\mu^2 + \sigma^2)/2$ and $J' = \mu$. The chain rule
# has the mean $\mathbb{E}[z] = \mu$; the product has the mean $\mathbb{E}[z^2]/2$, which is $J$
# itself. {numref}`fig-moving-samples` shows the two ways.
#
# | | score function {eq}`eq-path-score` | pathwise {eq}`eq-path-gradient` |
# |---|---|---|
# | the samples | stand still; their weights change | move; their weights stay |
# | asks of $f$ | its values | its gradient; no jumps |
# | asks of $z$ | samples; a density differentiable in $\phi$ | a sampler differentiable in $\phi$ |

# %% [markdown]
# ### When the derivative may go inside
#
# Both ways exchange a derivative and an integral. That is a condition, not a formality.
#
# ```{prf:theorem} Exchange
# :label: thm-path-exchange
#
# Let $H(\varepsilon, \phi) = f(g(\varepsilon, \phi))$ for real $\phi$, and let
# $\mathbb{E}|H(\varepsilon, \phi)| < \infty$. Suppose that for almost every $\varepsilon$
#
# 1. $H(\varepsilon, \cdot)$ is differentiable at $\phi$;
# 2. $|H(\varepsilon, \phi_1) - H(\varepsilon, \phi_2)| \le C(\varepsilon)\, |\phi_1 - \phi_2|$ for
#    all $\phi_1, \phi_2$ in some neighbourhood of $\phi$, the same for every $\varepsilon$,
#    with $\mathbb{E}[C(\varepsilon)] < \infty$.
#
# Then
#
# $$ \frac{d}{d\phi}\, \mathbb{E}[H(\varepsilon, \phi)]
#    = \mathbb{E}\Big[ \frac{\partial H(\varepsilon, \phi)}{\partial \phi} \Big] .
# $$ (eq-path-exchange)
# ```
#
# *Proof.* By 1 the difference quotients
# $\big(H(\varepsilon, \phi + t) - H(\varepsilon, \phi)\big)/t$ converge to the derivative as
# $t \to 0$, for almost every $\varepsilon$. By 2 they are bounded by $C(\varepsilon)$. Dominated
# convergence exchanges the limit and the expectation. $\square$
#
# Condition 1 alone is not enough, and it is the one that an autodiff engine relies on. A kink is
# harmless: $|z|$ and $\max(0, z)$ change no faster than $z$, so 2 holds whenever it holds for $g$
# itself. A jump is not: for $f(z) = 1[z > 0]$ the derivative exists for almost every $\varepsilon$
# and is 0, while $J$ does change with $\mu$. Near the jump the difference quotients are as large as
# $1/t$, and nothing bounds them. The same theorem with $H = f(z)\, q_\phi(z)$ and integrals over
# $z$ covers the score function. There 2 excludes densities with a *jump* at an edge that moves with
# $\phi$, such as that of the uniform law on $(0, \phi)$. A support that moves does no harm where
# the density falls to zero at its edge along a finite slope, as that of the triangular law does,
# $1 - |z - \phi|$.

# %% [markdown]
# ### Location and scale
#
# The simplest sampler shifts and stretches. If $\varepsilon$ has independent coordinates, each with
# density $p_0$, then
#
# $$ z = \mu + \sigma \odot \varepsilon, \qquad
#    q_\phi(z) = \prod_{i=1}^{D} \frac{1}{\sigma_i}\,
#    p_0\Big(\frac{z_i - \mu_i}{\sigma_i}\Big) , $$ (eq-path-location-scale)
#
# where $\odot$ multiplies elementwise. Standard normal noise gives $N(\mu, \sigma^2)$;
# Laplace, logistic, Student and uniform noise give their families in the same way. To keep
# $\sigma$ positive the parameter is $\log \sigma$, so $\phi = (\mu, \log\sigma)$. From
# {eq}`eq-path-gradient` with $\partial z_i/\partial\mu_i = 1$ and
# $\partial z_i/\partial\log\sigma_i = \sigma_i \varepsilon_i$,
#
# $$ G_{\text{path}, \mu} = \nabla_z f(z), \qquad
#    G_{\text{path}, \log\sigma} = \nabla_z f(z) \odot \sigma \odot \varepsilon .
# $$ (eq-path-normal)
#
# For the normal law
# $\log q_\phi(z) = \sum_i \big( -\frac12 \varepsilon_i^2 - \log \sigma_i \big) + \text{const}$
# with $\varepsilon_i = (z_i - \mu_i)/\sigma_i$. At fixed $z$, entry by entry,
# $\partial\varepsilon_i/\partial\mu_i = -1/\sigma_i$ and
# $\partial\varepsilon_i/\partial\log\sigma_i = -\varepsilon_i$, so from {eq}`eq-path-score`
#
# $$ G_{\text{score}, \mu} = f(z)\, \frac{\varepsilon}{\sigma}, \qquad
#    G_{\text{score}, \log\sigma} = f(z)\, (\varepsilon \odot \varepsilon - 1) .
# $$ (eq-path-score-normal)

# %% [markdown]
# ### A full covariance
#
# The level sets of independent normal coordinates are ellipses along the axes. To tilt them, mix
# the noise with a lower-triangular matrix $L$ whose diagonal is positive:
#
# $$ z = \mu + L \varepsilon, \qquad
#    \mathbb{E}\big[(z - \mu)(z - \mu)^\top\big]
#    = L\, \mathbb{E}[\varepsilon \varepsilon^\top]\, L^\top = L L^\top = \Sigma .
# $$ (eq-path-covariance)
#
# Every positive definite $\Sigma$ has exactly one such factor, the Cholesky factor, so nothing is
# lost and nothing is said twice. It is the matrix counterpart of the *standard deviation*. A common
# slip is $\mu + \Sigma \varepsilon$, whose covariance is $\Sigma\Sigma^\top$. An *encoder*, a
# network that predicts the law of $z$ for each datum (Chapter 5), must produce
#
# $$ \underbrace{D + D}_{\text{diagonal}} = 2D
#    \qquad\text{or}\qquad
#    \underbrace{D + \tfrac12 D(D + 1)}_{\text{full}} = \tfrac12 D(D + 3) $$ (eq-path-outputs)
#
# numbers. No smooth parameterisation does with fewer: the covariances form a set of dimension
# $\frac12 D(D+1)$. For $D = 32$ that is 64 outputs against 560, and each sample costs a
# matrix-vector product.

# %% [markdown]
# ### Laws without a formula for the sample
#
# A Gamma law with concentration $\alpha$ is no location-scale family, and its samplers reject: they
# draw until a condition holds. Whether it holds depends on $\alpha$, so at fixed noise the sample
# is not even a continuous function of $\alpha$. Yet for a real $z$ there is always one map, the
# quantile function: $z = F^{-1}(u; \phi)$ with uniform $u$. It is expensive to compute, and need
# not be computed {cite}`figurnov2018implicit`. By definition
#
# $$ F(z; \phi) = u . $$ (eq-path-cdf)
#
# Change $\phi$ and hold $u$. Then $z$ must move so that the left side stays the same,
#
# $$ \frac{\partial F}{\partial \phi} + q_\phi(z)\, \frac{\partial z}{\partial \phi} = 0
#    \qquad\Longrightarrow\qquad
#    \frac{\partial z}{\partial \phi} = - \frac{\partial F(z; \phi) / \partial \phi}{q_\phi(z)} ,
# $$ (eq-path-implicit)
#
# because $\partial F/\partial z = q_\phi$: for a real $z$, wherever $q_\phi(z) > 0$ and $F$ is
# differentiable in $\phi$. The quantile function is gone. Draw $z$ by whatever sampler is fastest,
# *then* compute how it would have moved. The sample slides along a level line of $F$
# ({numref}`fig-level-lines`). In {eq}`eq-path-gradient` this $\partial z/\partial \phi$ takes the
# place of $\partial g / \partial\phi$.
#
# Nothing here is peculiar to Gamma. For $N(\mu, \sigma^2)$, $F = \Phi(\varepsilon)$ with
# $\varepsilon = (z - \mu)/\sigma$, and {eq}`eq-path-implicit` returns
# $\partial z/\partial\mu = 1$ and $\partial z/\partial\sigma = \varepsilon$.

# %% [markdown]
# ### Discrete variables
#
# A bit that is 1 with probability $\sigma(\phi) = 1/(1 + e^{-\phi})$ has a sampler too:
#
# $$ z = 1[u < \sigma(\phi)], \qquad
#    J(\phi) = f(0) + \big(f(1) - f(0)\big)\, \sigma(\phi) . $$ (eq-path-bit)
#
# (Here $\sigma(\cdot)$ is the logistic function.) For almost every $u$ the bit stays where it is
# when $\phi$ changes a little. The pathwise derivative is 0, and
# $J'(\phi) = (f(1) - f(0))\, \sigma(\phi)\, \sigma(-\phi)$ is not. A cleverer sampler does not
# help.
#
# ```{prf:proposition} No reparameterisation of a discrete variable
# :label: thm-path-discrete
#
# Let $z = g(\varepsilon, \phi)$ take values in a finite set, and let
# $\phi \mapsto g(\varepsilon, \phi)$ be continuous on an interval for almost every $\varepsilon$.
# Then the law of $z$ is the same for all $\phi$ in the interval.
# ```
#
# *Proof.* A continuous path in a finite set is constant. So $g(\varepsilon, \cdot)$ is constant for
# almost every $\varepsilon$. $\square$
#
# So where the law changes, $g$ must jump for a set of $\varepsilon$ of positive probability, and
# where $f$ takes two values at the jump, condition 2 of {prf:ref}`thm-path-exchange` fails.
# Chapters 7 to 9 are about what to do instead.

# %% [markdown]
# ### The variance: a quadratic
#
# Which estimator is the noisier? Take $z \sim N(0, I)$ in $D$ dimensions, $f(z) = \frac12 \|z\|^2$
# and the gradient in $\mu_i$, which is 0. The pathwise estimate of it is $z_i = \varepsilon_i$. The
# score function's is $\frac12 \|\varepsilon\|^2 \varepsilon_i$: *every* coordinate of $z$
# contributes its noise to the gradient in $\mu_i$. Write $\|\varepsilon\|^2 = \varepsilon_i^2 + R$.
# The $D - 1$ other terms, $R$, have $\mathbb{E}[R] = D - 1$ and
# $\mathbb{E}[R^2] = (D - 1)(D + 1)$, and are independent of $\varepsilon_i$, whose second,
# fourth and sixth moments are 1, 3 and 15. So
#
# $$ \mathbb{E}\big[ \|\varepsilon\|^4 \varepsilon_i^2 \big]
#    = 15 + 6 (D - 1) + (D - 1)(D + 1) = (D + 2)(D + 4) , $$ (eq-path-quadratic-moment)
#
# $$ \mathrm{Var}[G_{\text{path}}] = 1 , \qquad
#    \mathrm{Var}[G_{\text{score}}] = \tfrac14 (D + 2)(D + 4) . $$ (eq-path-quadratic)
#
# One does not depend on the dimension, the other grows as its square
# ({numref}`fig-variance-dimension`).
#
# *Remark.* For $z \sim N(\mu, \sigma^2 I)$ with all coordinates of $\mu$ equal to $m$ the gradient
# in $\mu_i$ is $m$, and $\mathrm{Var}[G_{\text{path}}] = \sigma^2$. Now $\|z\|^2 = A + R$ with
# $A = (m + \sigma\varepsilon_i)^2$. The moments are
#
# $$ \begin{gathered}
#    \mathbb{E}[A^2 \varepsilon_i^2] = m^4 + 18 m^2 \sigma^2 + 15 \sigma^4, \quad
#    \mathbb{E}[A \varepsilon_i^2] = m^2 + 3 \sigma^2, \\
#    r = \mathbb{E}[R] = (D - 1)(m^2 + \sigma^2), \quad
#    v = \mathrm{Var}[R] = (D - 1)(4 m^2 \sigma^2 + 2 \sigma^4),
#    \end{gathered} $$ (eq-path-quadratic-moments)
#
# and, as $G_{\text{score}} = f(z)\, \varepsilon_i / \sigma$,
#
# $$ \mathrm{Var}[G_{\text{score}}] = \frac{1}{4 \sigma^2} \Big(
#    \mathbb{E}[A^2\varepsilon_i^2] + 2 r\, \mathbb{E}[A\varepsilon_i^2] + r^2 + v \Big) - m^2 .
# $$ (eq-path-quadratic-general)
#
# The variance of the score function is sometimes put down to $\log q \ll 0$. In the evidence lower
# bound $-\log q$ is indeed a part of $f$, but only a part: what counts is the *value* of $f$,
# whatever it is made of. Add a constant $c$ to $f$, and the variance in $\mu_i$ changes by
# $2c\, \mathbb{E}[f \varepsilon_i^2]/\sigma^2 + c^2/\sigma^2$, while the pathwise estimator does
# not notice. Chapter 3 uses this: it subtracts a *baseline*. For $m = 0$, $\sigma = 1$ the best
# constant leaves $\frac12 (D + 2)$ (exercise 3), better by an order and still growing.

# %% [markdown]
# ### The variance: what helps the pathwise estimator
#
# How general is this? The pathwise variance is governed by the *curvature* of $f$.
#
# ```{prf:proposition} Poincaré bound
# :label: thm-path-poincare
#
# Let $z \sim N(\mu, \sigma^2 I)$ and let $\partial_i f$ be continuously differentiable. Then
#
# $$ \mathrm{Var}[G_{\text{path}, \mu_i}] = \mathrm{Var}[\partial_i f(z)]
#    \;\le\; \sigma^2\, \mathbb{E}\, \| \nabla \partial_i f(z) \|^2 . $$ (eq-path-poincare)
# ```
#
# This is the Gaussian Poincaré inequality,
# $\mathrm{Var}[H(z)] \le \sigma^2\, \mathbb{E}\|\nabla H(z)\|^2$, applied to $H = \partial_i f$.
#
# *Proof in one dimension.* Expand
# $H(\mu + \sigma\varepsilon) = \sum_k c_k\, \mathrm{He}_k(\varepsilon)$ in Hermite polynomials.
# They are orthogonal, $\mathbb{E}[\mathrm{He}_k(\varepsilon)^2] = k!$ and
# $\mathrm{He}_k' = k\, \mathrm{He}_{k-1}$. So
#
# $$ \begin{gathered}
#    \mathrm{Var}[H(z)] = \sum_{k \ge 1} c_k^2\, k! , \\
#    \sigma^2\, \mathbb{E}[H'(z)^2] = \sum_{k \ge 1} c_k^2\, k^2\, (k - 1)!
#    = \sum_{k \ge 1} k\, c_k^2\, k! , \end{gathered} $$ (eq-path-hermite)
#
# and no term of the second is the smaller. (In $D$ dimensions the same sums run over products of
# Hermite polynomials, with the total degree for $k$.) $\square$
#
# A linear $f$ has variance 0, a quadratic attains the bound. The dimension enters only through the
# $i$-th row of the Hessian: for $\frac12 \|z\|^2$, where that row has one entry other than zero,
# not at all; for $\frac12 \big(\sum_j z_j\big)^2$ the variance is $\sigma^2 D$. So if
# $\partial_i f$ changes little within $\sigma$, in every direction, the pathwise gradient is quiet.
# For the score function no bound of this kind can hold: a constant $f = c$ has Hessian 0 and
# variance $c^2/\sigma^2$.

# %% [markdown]
# ### The variance: where the order reverses
#
# That the pathwise estimator has the lower variance is often said without a condition. Without a
# condition it is false. Let $f(z) = \cos(\omega z)$ with $z \sim N(\mu, \sigma^2)$, a bounded,
# smooth function. Its values never exceed 1, so the score function's variance is at most
# $1/\sigma^2$. But its slope grows with the frequency. The two estimates are
#
# $$ G_{\text{path}} = -\omega \sin(\omega z), \qquad
#    G_{\text{score}} = \cos(\omega z)\, \frac{\varepsilon}{\sigma} . $$ (eq-path-cosine-estimates)
#
# Their squares follow from $\sin^2 a = \frac12 (1 - \cos 2a)$ and
# $\cos^2 a = \frac12 (1 + \cos 2a)$, and the means of cosines from the characteristic function,
# $\mathbb{E}[e^{i t \varepsilon}] = e^{-t^2/2}$ and
# $\mathbb{E}[\varepsilon^2 e^{i t \varepsilon}] = (1 - t^2)\, e^{-t^2/2}$. With
# $\rho = \mathbb{E}[\cos(2\omega z)] = e^{-2\omega^2\sigma^2} \cos(2\omega\mu)$,
#
# $$ J'(\mu) = -\omega\, e^{-\omega^2\sigma^2/2} \sin(\omega\mu) , $$ (eq-path-cosine-gradient)
#
# $$ \mathrm{Var}[G_{\text{path}}] = \frac{\omega^2}{2}\, (1 - \rho) - J'(\mu)^2, \quad
#    \mathrm{Var}[G_{\text{score}}]
#    = \frac{1 + (1 - 4\omega^2\sigma^2)\, \rho}{2\sigma^2} - J'(\mu)^2 . $$ (eq-path-cosine)
#
# For large $\omega\sigma$ the ratio of the two is nearly $\omega^2\sigma^2$, in favour of the score
# function. They are equal where
#
# $$ \omega^2\sigma^2 - 1 = (1 - 3\omega^2\sigma^2)\, e^{-2\omega^2\sigma^2} \cos(2\omega\mu) ,
# $$ (eq-path-crossover)
#
# and the right side is small: whatever $\mu$, the order reverses at $\omega\sigma$ between 0.85 and
# 1.11, where one period $2\pi/\omega$ is about as wide as $q$, six standard deviations
# ({numref}`fig-crossover`). Reversals of this kind have been reported from experiments
# {cite}`gal2016uncertainty,mohamed2020monte`; the cosine has them in closed form.

# %% [markdown]
# ## By hand
#
# A small inference problem serves as the example. There are two latent numbers with standard
# normal priors, and one observation of a logistic model with the weights $w$ of
# shape $(2,)$:
#
# $$ f(z) = \log \sigma(w^\top z) - \tfrac12 \|z\|^2 , \qquad
#    \nabla_z f(z) = \sigma(-w^\top z)\, w - z . $$ (eq-path-example)
#
# Up to a constant $f$ is the log joint density. The two estimators, from {eq}`eq-path-normal` and
# {eq}`eq-path-score-normal`, one row per sample:

# %%
import math

import numpy as np
import pytest
import scipy.special as sc

from chapters.ledger import claim

WEIGHTS = np.array([1.5, -0.7])  # w of Eq. (eq-path-example)


def log_joint(z):
    """The log joint density in nats, but for a constant, at `z` (..., 2): Eq. (eq-path-example)."""
    return -np.logaddexp(0, -z @ WEIGHTS) - 0.5 * np.sum(z * z, axis=-1)


def pathwise_by_hand(params, noise):
    """Gradients of E[log_joint] for `noise` (S, 2): a dict like `params`, leaves (S, 2)."""
    scale = np.exp(params["log_scale"])
    z = params["loc"] + scale * noise  # Eq. (eq-path-location-scale)
    df_dz = sc.expit(-z @ WEIGHTS)[:, None] * WEIGHTS - z  # Eq. (eq-path-example)
    return {"loc": df_dz, "log_scale": df_dz * scale * noise}  # Eq. (eq-path-normal)


def score_function_by_hand(params, noise):
    """The same gradients by the score function."""
    scale = np.exp(params["log_scale"])
    f = log_joint(params["loc"] + scale * noise)[:, None]
    # Eq. (eq-path-score-normal)
    return {"loc": f * noise / scale, "log_scale": f * (noise * noise - 1)}


# %% [markdown]
# ## With minigrad
#
# A sampler is a function of noise and parameters; a density is a function of a point and
# parameters. Both are plain NumPy.

# %%
from minigrad import distributions, grad, jacobian, linalg, special, stop_gradient, tree


def normal(noise, params):
    """Samples of N(loc, scale²): Eq. (eq-path-location-scale)."""
    return params["loc"] + np.exp(params["log_scale"]) * noise


def normal_log_prob(z, params):
    """Log-density of independent normal coordinates: (..., D) to (...), in nats."""
    terms = special.normal_log_prob(z, params["loc"], np.exp(params["log_scale"]))
    return np.sum(terms, axis=-1)


# %% [markdown]
# Averaged gradients hide the noise that this chapter is about. To get *one gradient per sample*
# out of one backward pass, give each sample its own copy of the parameters. The sum over samples
# then has the gradient of sample $s$ in the $s$-th copy. (`tree.map` applies a function to every
# array of a nested dict.)


# %%
def per_sample(params, n):
    """Repeat the leaves of `params` n times along a new first axis: one copy per sample.

    >>> per_sample({"loc": np.zeros(2)}, 3)["loc"].shape
    (3, 2)
    """
    return tree.map(lambda p: np.broadcast_to(p, (n, *np.shape(p))), params)


def pathwise(f, sampler, params, noise):
    """Pathwise gradients of E[f(z)], one per sample: like `params`, leaves (S, ...).

    `f` maps samples (S, ...) to values (S,), `sampler(noise, params)` returns the samples.
    """

    def total(copies):
        return np.sum(f(sampler(noise, copies)))  # Eq. (eq-path-gradient)

    return grad(total)(per_sample(params, len(noise)))


def score_function(f, log_prob, params, z):
    """Score-function gradients of E[f(z)], one per sample `z`: like `params`, leaves (S, ...)."""
    values = f(z)

    def total(copies):
        return np.sum(values * log_prob(z, copies))  # Eq. (eq-path-score)

    return grad(total)(per_sample(params, len(z)))


# %% [markdown]
# The engine writes the chain rule, whatever the sampler.


# %%
PARAMS = {"loc": np.array([0.5, -0.8]), "log_scale": np.array([-0.3, 0.2])}


def test_reparam_estimators_agree_with_the_gradients_by_hand():
    noise = np.random.default_rng(0).standard_normal((100, 2))
    path = pathwise(log_joint, normal, PARAMS, noise)
    score = score_function(log_joint, normal_log_prob, PARAMS, normal(noise, PARAMS))
    for engine, by_hand in ((path, pathwise_by_hand), (score, score_function_by_hand)):
        for name, exact in by_hand(PARAMS, noise).items():
            np.testing.assert_allclose(engine[name], exact, rtol=1e-12, atol=1e-12)


# %% [markdown]
# **A full covariance.** The encoder's outputs are a flat vector. Its first $D$ entries are $\mu$;
# the others fill the lower triangle of $L$, row by row, with the logarithms of the diagonal.


# %%
def n_outputs(D):
    """Encoder outputs for a diagonal and for a full covariance: Eq. (eq-path-outputs).

    >>> n_outputs(32)
    (64, 560)
    """
    return 2 * D, D * (D + 3) // 2


def loc_and_cholesky(outputs, D):
    """Read (..., D (D + 3) / 2) encoder outputs as loc (..., D) and L (..., D, D)."""
    place = np.zeros((D, D), int)  # place[i, j]: which output is entry (i, j), for i >= j
    place[np.tril_indices(D)] = np.arange(D, D * (D + 3) // 2)
    entries, diagonal = outputs[..., place], np.eye(D)  # above the diagonal rubbish, removed below
    # of the diagonal only the exponentials: elsewhere they are exp(0), times zero
    return outputs[..., :D], np.tril(entries, -1) + diagonal * np.exp(diagonal * entries)


def full_normal(noise, outputs):
    """Samples of N(loc, L Lᵀ) for `noise` (S, D): Eq. (eq-path-covariance)."""
    loc, L = loc_and_cholesky(outputs, noise.shape[-1])
    return loc + np.einsum("...ij,...j->...i", L, noise)


def full_normal_log_prob(z, outputs):
    """Log-density of N(loc, L Lᵀ) at `z` (S, D): (S,), in nats."""
    D = z.shape[-1]
    loc, L = loc_and_cholesky(outputs, D)
    noise = linalg.solve_triangular(L, (z - loc).T, lower=True)
    log_det = np.sum(np.log(np.diagonal(L)))
    return -0.5 * np.sum(noise * noise, axis=0) - log_det - 0.5 * D * math.log(2 * math.pi)


# %% [markdown]
# **The implicit gradient.** How does one tell an engine that a sample, drawn by other means, moves
# as {eq}`eq-path-implicit` says? Solve $F(z; \phi) = u$ by one step of Newton's method, started at
# the sample $z_0$ that was drawn:
#
# $$ z(\phi) = z_0 - \frac{F(z_0; \phi) - u}{q(z_0)} , \qquad
#    u \text{ and } q(z_0) \text{ held constant at the present } \phi . $$ (eq-path-newton)
#
# The numerator is zero, so $z(\phi) = z_0$ exactly. Its derivative is {eq}`eq-path-implicit`. (Its
# second derivative is not that of the quantile function: one Newton step is right to first order.)
# `stop_gradient(x)` is the value of `x`, with derivative zero; so `u - stop_gradient(u)` is the
# number 0 with the derivative of `u`. `special.gammainc` and `special.betainc`, the distribution
# functions of the Gamma and Beta laws, know their derivatives in the concentrations.


# %%
def implicit(z, cdf, log_prob, params):
    """Samples equal to `z`, which move with `params` along level lines of `cdf`.

    `cdf(z, params)` and `log_prob(z, params)` act elementwise: Eq. (eq-path-newton).
    """
    u = cdf(z, params)
    density = np.exp(stop_gradient(log_prob(z, params)))
    return z - (u - stop_gradient(u)) / density


def gamma_cdf(z, a):
    """Distribution function of Gamma(a) with rate 1."""
    return special.gammainc(a, z)


def gamma_log_prob(z, a):
    """Log-density of Gamma(a) with rate 1."""
    return distributions.Gamma(a, 1.0).log_prob(z)


def beta_cdf(z, params):
    """Distribution function of Beta(a, b); `params` holds "a" and "b"."""
    return special.betainc(params["a"], params["b"], z)


def beta_log_prob(z, params):
    """Log-density of Beta(a, b)."""
    return distributions.Beta(**params).log_prob(z)


def implicit_gamma(z, a):
    """A sampler for `pathwise`: its noise is a Gamma(a) sample, drawn by any means."""
    return implicit(z, gamma_cdf, gamma_log_prob, a)


def implicit_beta(z, params):
    """A sampler for `pathwise`: its noise is a Beta(a, b) sample, drawn by any means."""
    return implicit(z, beta_cdf, beta_log_prob, params)


# %% [markdown]
# By hand there is only {eq}`eq-path-implicit` itself, with a central difference for
# $\partial F/\partial \alpha$. A third way does not use it: a central difference of the quantile
# function at fixed $u$.


# %%
def implicit_by_hand(z, cdf, log_prob, a, h=1e-5):
    """dz/da = -(dF/da) / q, with a central difference for dF/da: Eq. (eq-path-implicit)."""
    dF_da = (cdf(z, a + h) - cdf(z, a - h)) / (2 * h)
    return -dF_da / np.exp(log_prob(z, a))


def test_reparam_implicit_gamma_agrees_by_hand_and_with_the_quantile_function():
    h, u = 1e-5, np.linspace(0.02, 0.98, 49)
    for a in (0.3, 1.0, 4.0, 30.0):
        z = sc.gammaincinv(a, u)
        engine = pathwise(lambda z: z, implicit_gamma, a, z)
        by_hand = implicit_by_hand(z, gamma_cdf, gamma_log_prob, a)
        quantile = (sc.gammaincinv(a + h, u) - sc.gammaincinv(a - h, u)) / (2 * h)
        np.testing.assert_allclose(by_hand, engine, rtol=1e-6)
        np.testing.assert_allclose(quantile, engine, rtol=1e-6)


def test_reparam_implicit_beta_agrees_by_hand():
    params, z = {"a": 0.7, "b": 2.5}, np.linspace(0.03, 0.97, 48)
    engine = pathwise(lambda z: z, implicit_beta, params, z)

    def along(f, name):
        return lambda z, value: f(z, {**params, name: value})

    for name in params:
        cdf, log_prob = along(beta_cdf, name), along(beta_log_prob, name)
        by_hand = implicit_by_hand(z, cdf, log_prob, params[name])
        np.testing.assert_allclose(engine[name], by_hand, rtol=1e-6)


def test_reparam_implicit_normal_is_location_and_scale():
    noise = np.linspace(-3, 3, 13)
    params = {"loc": 0.7, "scale": 1.8}
    cdf = lambda z, p: special.ndtr((z - p["loc"]) / p["scale"])
    log_prob = lambda z, p: special.normal_log_prob(z, p["loc"], p["scale"])
    sampler = lambda z, p: implicit(z, cdf, log_prob, p)
    dz = pathwise(lambda z: z, sampler, params, 0.7 + 1.8 * noise)
    np.testing.assert_allclose(dz["loc"], 1, rtol=1e-12)
    np.testing.assert_allclose(dz["scale"], noise, rtol=1e-12, atol=1e-14)


# %% [markdown]
# The library has this built in. `random.gamma(rng, a)` and `random.beta(rng, a, b)` return samples
# whose derivatives are {eq}`eq-path-implicit`, and so do the distributions that use them, such as
# `distributions.Gamma(a, rate).sample(rng)`. So does `Normal(loc, scale).sample(rng)` with
# {eq}`eq-path-location-scale`. Draw, compute, differentiate:

# %%
from minigrad import random, vjp


def mean_log_gamma(a, rng):
    """Average of log z over 10,000 samples of Gamma(a, rate 2)."""
    return np.mean(np.log(distributions.Gamma(a, 2.0).sample(rng, 10_000)))


# in the mean the gradient is that of ψ(a) - log 2
grad(mean_log_gamma)(1.5, np.random.default_rng(0)), sc.polygamma(1, 1.5)


# %%
def test_reparam_library_samples_move_along_level_lines():
    rng, a, b = np.random.default_rng(0), np.full(500, 1.7), np.full(500, 0.6)
    z, pullback = vjp(lambda a: random.gamma(rng, a), a)
    ours = pathwise(lambda z: z, implicit_gamma, 1.7, z)
    np.testing.assert_allclose(pullback(np.ones(500))[0], ours, rtol=1e-6)
    z, pullback = vjp(lambda a, b: random.beta(rng, a, b), a, b)
    ours = pathwise(lambda z: z, implicit_beta, {"a": 1.7, "b": 0.6}, z)
    for dz, name in zip(pullback(np.ones(500)), "ab"):
        np.testing.assert_allclose(dz, ours[name], rtol=1e-6)


# %% [markdown]
# ## Checks
#
# ### The law of the sample
#
# A density and a sampler that are said to belong together are two programs. `check_density`
# compares them: the density must integrate to one, and the samples must fall into its cells as
# often as they should. The test must also be able to fail. The classical mistake, a variance
# where a standard deviation is meant, is rejected.

# %%
from minigrad.check import check_density, check_unbiased

REALS = (-np.inf, np.inf)


@claim("R1")
def test_reparam_location_scale_has_the_normal_law(record):
    from scipy import stats

    rng, distances = np.random.default_rng(1), []
    for loc, scale in [(0.0, 1.0), (-2.0, 0.5), (3.0, 4.0)]:
        z = loc + scale * rng.standard_normal(50_000)  # Eq. (eq-path-location-scale)
        check_density(distributions.Normal(loc, scale).log_prob, REALS, z)
        distances.append(math.sqrt(len(z)) * stats.kstest(z, stats.norm(loc, scale).cdf).statistic)
    largest = max(distances)
    record("largest scaled Kolmogorov distance of 50,000 samples, 3 laws", largest, limit=2.8)
    assert largest < 2.8  # exceeded by chance once in a million such tests


@claim("E5")
def test_reparam_variance_in_the_place_of_the_scale_is_rejected(record):
    noise = np.random.default_rng(2).standard_normal((50_000, 2))
    covariance = np.array([[2.0, 0.8], [0.8, 0.5]])
    first = distributions.Normal(0.0, math.sqrt(2.0))  # the law of the first coordinate

    def check(matrix):
        check_density(first.log_prob, REALS, (noise @ matrix.T)[:, 0])

    check(np.linalg.cholesky(covariance))
    for wrong in (covariance, np.linalg.cholesky(covariance).T):
        with pytest.raises(AssertionError, match="do not follow the density"):
            check(wrong)
    record("variance of the first coordinate as it should be", covariance[0, 0])
    record("the same, sampled as loc + covariance @ noise", (covariance @ covariance)[0, 0])


# %% [markdown]
# A law in $D$ dimensions is determined by its projections on all directions (Cramér and Wold), and
# $\xi^\top z$ must be $N(\xi^\top\mu,\, \xi^\top \Sigma \xi)$ for each direction $\xi$. That no
# smooth encoder does with fewer outputs is a matter of rank: at the points tried the Jacobian from
# the $\frac12 D(D+1)$ entries to $\Sigma$ has full rank, so its values fill an open set.


# %%
@claim("R3")
def test_reparam_full_covariance_needs_order_D_squared_outputs(record):
    for D in (1, 2, 5, 8):
        outputs = np.random.default_rng(D).standard_normal(n_outputs(D)[1])
        triangle = np.tril_indices(D)

        def covariance(entries, D=D, outputs=outputs, triangle=triangle):
            _, L = loc_and_cholesky(np.concatenate([outputs[:D], entries]), D)
            return (L @ L.T)[triangle]

        rank = np.linalg.matrix_rank(jacobian(covariance)(outputs[D:]))
        assert D + rank == n_outputs(D)[1] == D + D * (D + 1) // 2
    record("encoder outputs for D = 32, diagonal", n_outputs(32)[0])
    record("encoder outputs for D = 32, full", n_outputs(32)[1])


@claim("R3")
def test_reparam_full_covariance_has_the_law_it_should(record):
    from scipy import stats

    D, rng = 5, np.random.default_rng(3)
    mean, root = rng.standard_normal(D), rng.standard_normal((D, D))
    covariance = root @ root.T + 0.1 * np.eye(D)
    L = np.linalg.cholesky(covariance)
    entries = (L - np.diag(np.diag(L)) + np.diag(np.log(np.diag(L))))[np.tril_indices(D)]
    z = full_normal(rng.standard_normal((20_000, D)), np.concatenate([mean, entries]))
    distances = []
    for xi in rng.standard_normal((10, D)):
        law = stats.norm(xi @ mean, math.sqrt(xi @ covariance @ xi))
        distances.append(math.sqrt(len(z)) * stats.kstest(z @ xi, law.cdf).statistic)
    record("largest scaled Kolmogorov distance of 10 projections", max(distances), limit=2.9)
    assert max(distances) < 2.9  # exceeded once in a million tests of 10 projections


# %% [markdown]
# ### The bias
#
# The exact gradient comes from a place that knows nothing of paths. Put a fixed grid over $z$. On
# it {eq}`eq-path-objective` is a finite sum in which $\phi$ appears in the density only; the
# trapezoidal rule converges exponentially for integrands of this kind. `check_unbiased` then
# compares: it fails if the mean is off, and also if in any coordinate an error of 5 % of the
# largest one would have gone unnoticed, or if a single sample decides what the standard error is.


# %%
def grid_gradient(f, log_prob, params, low=-8.0, high=8.0, n=161):
    """Gradient of E[f(z)] for z in two dimensions by quadrature over z: Eq. (eq-path-objective)."""
    axis, cell = np.linspace(low, high, n, retstep=True)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    values = cell**2 * f(z)
    return grad(lambda p: np.sum(values * np.exp(log_prob(z, p))))(params)


def columns(gradients):
    """Put the leaves of per-sample gradients side by side: (S, number of parameters)."""
    return np.column_stack(tree.leaves(gradients))


@claim("R2")
def test_reparam_pathwise_gradient_is_unbiased(record):
    noise = np.random.default_rng(4).standard_normal((100_000, 2))
    exact = np.hstack(tree.leaves(grid_gradient(log_joint, normal_log_prob, PARAMS)))
    z = check_unbiased(columns(pathwise(log_joint, normal, PARAMS, noise)), exact)
    record("diagonal normal: largest |z| of 4 coordinates", z, limit=5.2)

    outputs = np.array([0.5, -0.8, -0.3, 0.4, 0.2])
    exact = grid_gradient(log_joint, full_normal_log_prob, outputs)
    z = check_unbiased(pathwise(log_joint, full_normal, outputs, noise), exact)
    record("full normal: largest |z| of 5 coordinates", z, limit=5.2)


def test_reparam_score_function_is_unbiased():
    noise = np.random.default_rng(5).standard_normal((800_000, 2))
    exact = np.hstack(tree.leaves(grid_gradient(log_joint, normal_log_prob, PARAMS)))
    z = normal(noise, PARAMS)
    score = columns(score_function(log_joint, normal_log_prob, PARAMS, z))
    check_unbiased(score, exact)
    path = columns(pathwise(log_joint, normal, PARAMS, noise[:100_000]))
    ratio = score.var(axis=0) / path.var(axis=0)
    assert 6 < ratio.min() and 25 < ratio.max() < 30


# %% [markdown]
# Eight times as many samples were drawn for the score function, and they had to be: its variance in
# the four coordinates is 7 to 27 times as large.


# %%
@claim("E6")
def test_reparam_product_instead_of_the_chain_rule_is_rejected(record):
    noise = np.random.default_rng(6).standard_normal(100_000)
    loc, scale = 0.9, 0.5
    z = loc + scale * noise
    check_unbiased(z, loc)  # f(z) = z² / 2, so the chain rule gives f'(z) · 1 = z
    product = 0.5 * z * z * 1.0  # f(z) · dg/dμ
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(product, loc)
    check_unbiased(product, 0.5 * (loc**2 + scale**2))
    record("chain rule f'(z) dg/dμ: mean (exact 0.9)", z.mean())
    record("product f(z) dg/dμ: mean", product.mean())


# %% [markdown]
# Next, {prf:ref}`thm-path-exchange` at its border. For $z \sim N(\mu, \sigma^2)$ with distribution
# function $\Phi$ and density $\varphi$ of the standard normal law,
#
# $$ \frac{d}{d\mu} \mathbb{E}|z| = 2 \Phi\Big(\frac{\mu}{\sigma}\Big) - 1, \qquad
#    \frac{d}{d\mu} \mathbb{E}\, 1[z > 0] = \frac1\sigma\, \varphi\Big(\frac\mu\sigma\Big) .
# $$ (eq-path-kink)
#
# The first function has a kink, and the pathwise gradient is right. The second has a jump, and
# the pathwise gradient is zero. The score function does not look at $f'$ and gets both right.


# %%
def test_reparam_kinks_are_harmless_and_jumps_are_not():
    noise = np.random.default_rng(7).standard_normal((500_000, 1))
    params = {"loc": np.array([0.6]), "log_scale": np.array([0.1])}
    t = 0.6 * math.exp(-0.1)
    kink = (lambda z: np.sum(np.abs(z), axis=-1), 2 * sc.ndtr(t) - 1)
    jump_gradient = math.exp(-0.5 * t * t - 0.1) / math.sqrt(2 * math.pi)
    jump = (lambda z: np.sum(np.where(z > 0, 1.0, 0.0), axis=-1), jump_gradient)
    for f, exact in (kink, jump):  # Eq. (eq-path-kink)
        z = normal(noise, params)
        check_unbiased(score_function(f, normal_log_prob, params, z)["loc"], np.array([exact]))
    check_unbiased(pathwise(kink[0], normal, params, noise)["loc"], np.array([kink[1]]))
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(pathwise(jump[0], normal, params, noise)["loc"], np.array([jump[1]]))


def test_reparam_score_function_and_densities_whose_support_moves():
    n, phi = 100_000, 1.3  # f(z) = z²; q ∇ log q over midpoints of the support
    z = phi + 2 * (np.arange(n) + 0.5) / n - 1
    triangular = np.sum(z**2 * np.sign(z - phi)) * 2 / n  # q = 1 - |z - φ|, J = φ² + 1/6
    assert triangular == pytest.approx(2 * phi, rel=1e-8)
    z = phi * (np.arange(n) + 0.5) / n
    uniform = np.mean(z**2 * (-1 / phi))  # q = 1/φ on (0, φ), J = φ²/3
    assert uniform == pytest.approx(-phi / 3, rel=1e-8)  # right is 2φ/3


# %% [markdown]
# ### Gamma and Beta
#
# Expectations with simple derivatives are known for these laws:
#
# $$ \begin{aligned}
#    \mathrm{Gamma}(\alpha)&: \;\; \mathbb{E}[\log z] = \psi(\alpha), \;\;
#    \mathbb{E}[z^2] = \alpha(\alpha + 1); \\
#    \mathrm{Beta}(\alpha, \beta)&: \;\; \mathbb{E}[\log z] = \psi(\alpha) - \psi(\alpha + \beta) .
#    \end{aligned} $$ (eq-path-moments)


# %%
TRIGAMMA = lambda x: sc.polygamma(1, x)


@claim("R8")
def test_reparam_implicit_gradients_are_unbiased(record):
    rng, worst = np.random.default_rng(8), 0.0
    for a in (0.6, 2.5):
        z = rng.gamma(a, size=100_000)
        for f, exact in ((np.log, TRIGAMMA(a)), (np.square, 2 * a + 1)):  # Eq. (eq-path-moments)
            worst = max(worst, check_unbiased(pathwise(f, implicit_gamma, a, z), exact))
    record("Gamma: largest |z| of 2 concentrations and 2 functions", worst, limit=4.9)

    a, b = 0.8, 2.0
    exact = np.array([TRIGAMMA(a) - TRIGAMMA(a + b), -TRIGAMMA(a + b)])
    z = rng.beta(a, b, size=100_000)
    worst = check_unbiased(columns(pathwise(np.log, implicit_beta, {"a": a, "b": b}, z)), exact)
    record("Beta: largest |z| of 2 concentrations", worst, limit=5.0)


@claim("R8")
def test_reparam_library_gradients_are_unbiased(record):
    rng, a, b = np.random.default_rng(13), np.full(100_000, 0.8), np.full(100_000, 2.0)
    gradients = grad(lambda a: np.sum(np.log(random.gamma(rng, a))))(a)
    worst = check_unbiased(gradients, TRIGAMMA(0.8))
    record("random.gamma: |z|", worst, limit=4.9)
    gradients = grad(lambda a, b: np.sum(np.log(random.beta(rng, a, b))), argnums=(0, 1))(a, b)
    exact = np.array([TRIGAMMA(0.8) - TRIGAMMA(2.8), -TRIGAMMA(2.8)])
    worst = check_unbiased(np.column_stack(gradients), exact)
    record("random.beta: largest |z| of 2 concentrations", worst, limit=5.0)


# %% [markdown]
# ### A bit
#
# For the bit {eq}`eq-path-bit` nothing need be sampled. Over a fine grid of $u$ the pathwise
# derivative is exactly 0 at every point, and the difference quotient
#
# $$ \begin{gathered} Q_h = \frac{f(z(\phi + h)) - f(z(\phi - h))}{2h}, \\
#    \mathbb{E}[Q_h] = \frac{J(\phi + h) - J(\phi - h)}{2h}, \qquad
#    \mathbb{E}[Q_h^2] = \frac{f(1) - f(0)}{2h}\, \mathbb{E}[Q_h]
#    \end{gathered} $$ (eq-path-quotient)
#
# has nearly the right mean at every small $h$, because it is $(f(1) - f(0))/2h$ on the small set of
# $u$ where the bit flips. Its second moment grows as $1/h$. As $h \to 0$ all of $Q_h$ gathers on a
# set of $u$ whose measure tends to zero, and the derivative at a fixed $u$ sees none of it
# ({numref}`fig-staircase`).


# %%
def bit(u, logit):
    """Eq. (eq-path-bit): 1.0 where u < σ(logit), else 0.0."""
    return np.where(u < special.expit(logit), 1.0, 0.0)


@claim("F8")
def test_reparam_a_bit_has_no_pathwise_gradient(record):
    logit, values = 0.7, np.array([0.3, 2.0])  # f(0) and f(1)
    f = lambda z: values[0] + (values[1] - values[0]) * z
    n = 1_000_000
    u = (np.arange(n) + 0.5) / n
    exact = (values[1] - values[0]) * sc.expit(logit) * sc.expit(-logit)
    path = pathwise(f, bit, logit, u)
    record("largest |pathwise derivative| over a grid of u", np.max(np.abs(path)))
    record("true gradient", exact)
    assert not path.any() and exact > 0.3

    for h in (0.1, 0.01, 0.001):
        quotient = (f(bit(u, logit + h)) - f(bit(u, logit - h))) / (2 * h)
        assert quotient.mean() == pytest.approx(exact, rel=2 * h * h + 3 / (n * h))
        second = (values[1] - values[0]) / (2 * h) * quotient.mean()  # Eq. (eq-path-quotient)
        assert np.mean(quotient**2) == pytest.approx(second, rel=1e-12)

    log_prob = lambda z, logit: special.bernoulli_log_prob(logit, z)
    both = score_function(f, log_prob, logit, np.array([0.0, 1.0]))
    probs = np.array([sc.expit(-logit), sc.expit(logit)])
    assert probs @ both == pytest.approx(exact, rel=1e-12)  # the score function has it, exactly


# %% [markdown]
# ### The variances
#
# The formulas of the derivation, {eq}`eq-path-quadratic-general` first.


# %%
def quadratic_variances(loc, scale, D):
    """Variances for f = ‖z‖² / 2, score function and pathwise: Eq. (eq-path-quadratic-general)."""
    m2, s2 = loc**2, scale**2
    # Eq. (eq-path-quadratic-moments)
    r, v = (D - 1) * (m2 + s2), (D - 1) * (4 * m2 * s2 + 2 * s2**2)
    square = m2**2 + 18 * m2 * s2 + 15 * s2**2 + 2 * r * (m2 + 3 * s2) + r**2 + v
    return square / (4 * s2) - m2, s2


def quadratic(z):
    """Half the squared length: (..., D) to (...)."""
    return 0.5 * np.sum(z * z, axis=-1)


# %% [markdown]
# They are held against the estimators themselves. Instead of random noise the estimators
# are given the nodes of Gauss-Hermite quadrature, and the variance is a weighted sum. With four
# nodes per axis it is exact for these polynomials. In many dimensions the grid is too large, and
# samples take its place: $(G_i - m)^2$ is an unbiased estimate of the variance.


# %%
def gauss_hermite(n, D):
    """Nodes (n^D, D) and weights (n^D,) of expectations under N(0, I) in D dimensions."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    nodes = np.stack(np.meshgrid(*[x] * D), axis=-1).reshape(-1, D)
    weights = np.prod(np.stack(np.meshgrid(*[w / w.sum()] * D), axis=-1).reshape(-1, D), axis=-1)
    return nodes, weights


def both_estimators(f, loc, scale, noise):
    """Per-sample gradients in the location by the score function and pathwise, (S, D) each."""
    ones = np.ones(noise.shape[-1])
    params = {"loc": loc * ones, "log_scale": math.log(scale) * ones}
    score = score_function(f, normal_log_prob, params, normal(noise, params))
    return score["loc"], pathwise(f, normal, params, noise)["loc"]


def quadrature_variances(f, loc, scale, n, D=1):
    """Variances of both estimators in the first coordinate, by Gauss-Hermite quadrature."""
    nodes, weights = gauss_hermite(n, D)
    samples = [G[:, 0] for G in both_estimators(f, loc, scale, nodes)]
    return [weights @ (G - weights @ G) ** 2 for G in samples]


@claim("F5")
def test_reparam_variances_of_a_quadratic_are_exact(record):
    for D in (1, 2, 3, 5):
        for loc, scale in [(0.0, 1.0), (0.7, 1.3), (-2.0, 0.4)]:
            exact = quadratic_variances(loc, scale, D)
            np.testing.assert_allclose(quadrature_variances(quadratic, loc, scale, 4, D), exact)
        assert quadratic_variances(0, 1, D) == ((D + 2) * (D + 4) / 4, 1)
        # A row of the Hessian without zeros: the pathwise variance grows with the dimension.
        full_row = quadrature_variances(lambda z: 0.5 * np.sum(z, axis=-1) ** 2, 0.7, 1.3, 4, D)[1]
        assert full_row == pytest.approx(1.3**2 * D)
    ratio = np.divide(*quadratic_variances(0.0, 1.0, 100))
    record("quadratic f, D = 100: variance of score function / pathwise", ratio)
    assert ratio == 2652


@claim("F5")
@pytest.mark.parametrize("D", [8, 32, 128])
def test_reparam_variances_of_a_quadratic_are_measured(D, record):
    noise = np.random.default_rng(9).standard_normal((1_600_000 // D, D))
    loc, scale = 0.5, 1.0
    for name, G, exact in zip(
        ("score function", "pathwise"),
        both_estimators(quadratic, loc, scale, noise),
        quadratic_variances(loc, scale, D),
    ):
        squares = np.mean((G - loc) ** 2, axis=1)
        record(f"{name}, D = {D}: measured variance / exact", squares.mean() / exact)
        check_unbiased(squares, exact)


# %% [markdown]
# The bound {eq}`eq-path-poincare` in one dimension: the quadratic attains it, the others stay
# below.


# %%
SMOOTH = {  # function, and whether it attains the bound
    "quadratic": (lambda z: 0.5 * z**2, True),
    "softplus": (special.softplus, False),
    "sine": (np.sin, False),
    "cubic": (lambda z: z**3, False),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_reparam_poincare_bound_holds(name):
    f, attained = SMOOTH[name]
    nodes, weights = gauss_hermite(60, 1)
    for loc, scale in [(0.0, 1.0), (1.2, 0.5)]:
        slope = grad(lambda z: np.sum(f(z)))
        bend = grad(lambda z, slope=slope: np.sum(slope(z)))((loc + scale * nodes)[:, 0])
        bound = scale**2 * weights @ bend**2
        variance = quadrature_variances(lambda z, f=f: f(z[..., 0]), loc, scale, 60)[1]
        assert variance == pytest.approx(bound, rel=1e-12) if attained else variance < bound


# %% [markdown]
# Last the cosine {eq}`eq-path-cosine`, and the place where the order reverses.


# %%
def cosine_variances(omega, loc, scale):
    """Variances for f = cos(ωz), score function and pathwise: Eq. (eq-path-cosine)."""
    t2 = (omega * scale) ** 2
    rho = np.exp(-2 * t2) * np.cos(2 * omega * loc)
    mean2 = (omega * np.exp(-t2 / 2) * np.sin(omega * loc)) ** 2  # Eq. (eq-path-cosine-gradient)
    score = (1 + (1 - 4 * t2) * rho) / (2 * scale**2) - mean2
    return score, 0.5 * omega**2 * (1 - rho) - mean2


def cosine(omega):
    """The function cos(ωz), summed over coordinates: (..., D) to (...)."""
    return lambda z: np.sum(np.cos(omega * z), axis=-1)


@claim("F5")
def test_reparam_order_reverses_for_a_cosine(record):
    for omega, loc, scale in [(0.3, 0.5, 1.0), (1.0, -0.4, 0.7), (2.0, 0.5, 2.0), (6.0, 0.2, 0.9)]:
        measured = quadrature_variances(cosine(omega), loc, scale, 120)
        np.testing.assert_allclose(measured, cosine_variances(omega, loc, scale), rtol=1e-9)
    for omega, low, high in [(0.25, 0.0, 0.01), (4.0, 15.0, 17.0)]:
        score, path = cosine_variances(omega, 0.5, 1.0)
        record(f"ωσ = {omega}: variance of pathwise / score function", path / score)
        assert low < path / score < high


@claim("F5")
def test_reparam_crossover_is_at_frequency_one_over_scale(record):
    from scipy.optimize import brentq

    def gap(t, phase):  # scale 1, frequency t, location phase / t
        return np.subtract(*cosine_variances(t, phase / t, 1.0))

    crossings = []
    for phase in np.linspace(0, math.pi, 181):
        signs = np.sign([gap(t, phase) for t in np.linspace(0.02, 5, 400)])
        assert np.count_nonzero(np.diff(signs)) == 1  # one crossing only
        crossings.append(brentq(gap, 0.02, 5, args=(phase,)))
    record("crossover ωσ, smallest over the phase ωμ", min(crossings))
    record("crossover ωσ, largest over the phase ωμ", max(crossings))
    assert 0.85 < min(crossings) < max(crossings) < 1.11


# %% [markdown]
# ## What goes wrong
#
# **The sample is detached.** The sampler draws with a generator, or calls a library, and hands
# back a number. The path from the parameters to the sample is cut, and the gradient is exactly
# zero. Nothing raises an error: zero is a gradient. The encoder of a variational autoencoder
# (Chapter 5) then learns from the KL term alone, and forgets the data.


# %%
def detached_normal(noise, params):
    """WRONG on purpose: the sample is a constant."""
    return stop_gradient(normal(noise, params))


# %% [markdown]
# **The density is differentiated instead of the sample.** The sample is held, and
# $f(z)\, q_\phi(z)$ is differentiated in $\phi$ and averaged over $z \sim q_\phi$. The density
# then appears twice, once as the law of $z$ and once as a factor: the mean is
# $\int f\, (\nabla q)\, q\, dz$. The score function divides by $q$; that is what the logarithm in
# $\nabla \log q$ is for.


# %%
def density_gradient(f, log_prob, params, z):
    """WRONG on purpose: the score-function estimator with q in the place of log q."""
    values = f(z)
    return grad(lambda p: np.sum(values * np.exp(log_prob(z, p))))(per_sample(params, len(z)))


def test_reparam_detached_sample_and_density_gradient_are_rejected():
    noise = np.random.default_rng(10).standard_normal((100_000, 2))
    exact = np.hstack(tree.leaves(grid_gradient(log_joint, normal_log_prob, PARAMS)))
    detached = columns(pathwise(log_joint, detached_normal, PARAMS, noise))
    density = columns(density_gradient(log_joint, normal_log_prob, PARAMS, normal(noise, PARAMS)))
    assert not detached.any()
    for wrong in (detached, density):
        with pytest.raises(AssertionError, match="biased"):
            check_unbiased(wrong, exact)


# %% [markdown]
# **A log-variance is taken for a log-scale.** Encoders often predict $\log \sigma^2$. If the
# sampler then computes $e^{\log\sigma^2}$ where it should compute $e^{\frac12\log\sigma^2}$, the
# samples have the standard deviation $\sigma^2$. The gradient is a perfectly unbiased gradient, of
# another objective, so finite differences of the program agree with it. And at the usual starting
# point, $\log\sigma^2 = 0$, the two samplers coincide. The check that rejects it compares the
# sampler with the density that the rest of the program uses, *away from* $\sigma = 1$.


# %%
def test_reparam_log_variance_for_log_scale_is_rejected_away_from_one():
    noise = np.random.default_rng(11).standard_normal(50_000)

    def check(sampler, log_variance):
        log_prob = lambda z: special.normal_log_prob(z, 0.0, math.exp(0.5 * log_variance))
        check_density(log_prob, REALS, sampler(log_variance))

    right = lambda log_variance: np.exp(0.5 * log_variance) * noise
    wrong = lambda log_variance: np.exp(log_variance) * noise
    check(right, -0.5)
    check(wrong, 0.0)  # unnoticed
    with pytest.raises(AssertionError, match="do not follow the density"):
        check(wrong, -0.5)


# %% [markdown]
# **One draw of noise serves the whole batch.** Noise of shape $(D,)$ broadcasts against encoder
# outputs of shape $(B, D)$ without complaint. Each datum's gradient keeps its law, so the average
# is still unbiased, and a test of bias passes. But the data now err together. For an objective
# that is a mean over $B$ data, each with a gradient of variance $s^2$,
#
# $$ \mathrm{Var}\Big[\frac1B \sum_{b=1}^{B} G_b\Big] =
#    \begin{cases} s^2 / B & \text{independent noise,} \\
#    s^2 & \text{shared noise and equal gradients.} \end{cases} $$ (eq-path-shared)
#
# The batch is no longer an average. The check is one of variance: it must fall as $1/B$.


# %%
def batch_gradient(noise, loc, B):
    """Gradient in `loc` of the mean of E[z² / 2] over B data, for `noise` (S, B) or (S, 1)."""
    return np.mean(loc + noise * np.ones(B), axis=1)  # f'(z) = z, dz/dloc = 1


def test_reparam_shared_noise_is_unbiased_and_does_not_average():
    rng, loc, B = np.random.default_rng(12), 0.8, 16
    independent = batch_gradient(rng.standard_normal((100_000, B)), loc, B)
    shared = batch_gradient(rng.standard_normal((100_000, 1)), loc, B)
    check_unbiased(independent, loc)
    check_unbiased(shared, loc)  # the bias does not give it away
    check_unbiased((independent - loc) ** 2, 1 / B)  # Eq. (eq-path-shared)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased((shared - loc) ** 2, 1 / B)
    check_unbiased((shared - loc) ** 2, 1.0)


# %% [markdown]
# **The quotient leaves the range of numbers.** Far in a tail, both sides of the fraction in
# {eq}`eq-path-implicit` round to zero, and 0/0 is not a number. A sample of the law itself does not
# get there: under Gamma(3), $z \ge 900$ has the probability $10^{-385}$. A point of a grid or a
# sample of another law does. `minigrad.kernels.shape_derivatives` therefore computes the quotient
# itself, as a sum of terms of one sign that is never divided by the density.
#
# In practice the danger is at the other end, where concentrations are small. Half of NumPy's
# samples of Gamma(0.001) round to 0, where $\log z$ has no gradient. `random.gamma` sets them to
# the smallest normal number. All gradients are then finite, and still not right: half of the law is
# missing, and with it half of $\psi'(\alpha)$. That happens with probability $e^{-708\alpha}$,
# which is about $10^{-31}$ at $\alpha = 0.1$.


# %%
def test_reparam_quotient_underflows_in_the_tail_and_the_kernel_does_not():
    from minigrad.kernels.shape_derivatives import gamma_dz_da

    z = np.array([3.0, 40.0, 900.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = pathwise(lambda z: z, implicit_gamma, 3.0, z)
    kernel = gamma_dz_da(3.0, z)
    np.testing.assert_allclose(quotient[:2], kernel[:2], rtol=1e-10)
    assert np.isnan(quotient[2]) and 4 < kernel[2] < 8
    log_tail = -900.0 + math.log(1 + 900 + 900**2 / 2)  # log P(z > 900) for a = 3
    assert log_tail / math.log(10) == pytest.approx(-385.3, abs=0.1)


def test_reparam_half_of_the_samples_of_a_small_concentration_round_to_zero():
    a, n = 0.001, 200_000
    z = np.random.default_rng(23).gamma(a, size=n)
    with np.errstate(all="ignore"):
        naive = pathwise(np.log, implicit_gamma, a, z)
    assert 0.47 < np.mean(z == 0) < 0.48
    assert not np.isfinite(naive[z == 0]).any()
    rng = np.random.default_rng(23)
    library = grad(lambda a: np.sum(np.log(random.gamma(rng, a))))(np.full(n, a))
    assert np.isfinite(library).all()
    assert 0.49 < library.mean() / TRIGAMMA(a) < 0.52  # finite, and half of what it should be


# %% [markdown]
# ## Figures

# %%
from chapters.style import COLOUR, LINESTYLE, MARKER


def figure_moving_samples():
    r"""Score function: the samples stand still, their weights change. Pathwise: the samples move.

    Nine samples while a parameter moves. The grey bands are one and two standard deviations of
    $q_\phi$. The area of a dot is the weight of its sample; on the left it is $q_\mu(z)/q_0(z)$,
    whose derivative at $\mu = 0$ is the score.
    """
    import matplotlib.pyplot as plt

    noise = sc.ndtri((np.arange(9) + 0.5) / 9)
    loc, scale = np.linspace(-1.5, 1.5, 7), np.linspace(0.25, 1.75, 7)
    fig, axes = plt.subplots(1, 3, figsize=(6.4, 2.7), sharey=True)
    panels = [
        ("score function", loc, loc, 1 + 0 * loc, np.tile(noise, (7, 1))),
        ("pathwise, location", loc, loc, 1 + 0 * loc, loc[:, None] + noise),
        ("pathwise, scale", scale, 0 * scale, scale, scale[:, None] * noise),
    ]
    for ax, (title, phi, centre, width, z) in zip(axes, panels):
        for band in (1, 2):
            low, high = centre - band * width, centre + band * width
            ax.fill_between(phi, low, high, color=COLOUR["numeric"], alpha=0.2, linewidth=0)
        weights = np.ones_like(z)
        if title == "score function":  # the weights q_μ(z) / q_0(z)
            weights = np.exp(loc[:, None] * z - 0.5 * loc[:, None] ** 2)
        colour = COLOUR[title.split(",")[0].replace(" ", "_")]
        ax.plot(phi, z, color=colour, linestyle="-", linewidth=0.8)
        for x, row, w in zip(phi, z, weights):
            ax.scatter(np.full(9, x), row, s=10 * w, color=colour, linewidths=0)
        ax.set(title=title, xlabel=r"$\sigma$" if title.endswith("scale") else r"$\mu$")
    axes[0].set(ylabel="$z$", ylim=(-4, 4))
    return fig


# %%
def figure_level_lines():
    """Implicit reparameterisation: samples slide along level lines of the distribution function.

    The paths are the level lines of $F$; the dots are seven quantiles. The coloured segments are
    Eq. (eq-path-implicit), computed without following the lines.
    """
    import matplotlib.pyplot as plt

    grid, u, at, beta = np.linspace(0.05, 6, 200), np.linspace(0.05, 0.95, 7), 2.5, 2.0
    panels = [
        (r"Gamma$(\alpha)$", lambda a, u: sc.gammaincinv(a, u), implicit_gamma),
        (
            r"Beta$(\alpha, 2)$",
            lambda a, u: sc.betaincinv(a, beta, u),
            lambda z, a: implicit_beta(z, {"a": a, "b": beta}),
        ),
    ]
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.9))
    thin = {"color": COLOUR["exact"], "linestyle": "-", "linewidth": 0.7}
    for ax, (title, quantile, sampler) in zip(axes, panels):
        z = quantile(at, u)
        slope = pathwise(lambda z: z, sampler, at, z)  # Eq. (eq-path-implicit)
        for level in u:
            ax.plot(grid, quantile(grid, level), **thin)
        for x, dx in zip(z, slope):
            ends = np.array([-0.8, 0.8])
            ax.plot(at + ends, x + dx * ends, color=COLOUR["implicit"], linestyle="-", linewidth=2)
        ax.scatter(np.full(7, at), z, s=14, color=COLOUR["implicit"], zorder=3)
        ax.set(title=title, xlabel=r"concentration $\alpha$", ylabel="$z$", xlim=(0, 6))
    axes[0].set(ylim=(0, 12.5))
    axes[1].set(ylim=(0, 1))
    lines = axes[0].get_lines()
    axes[0].legend(
        [lines[0], lines[-1]],
        [
            r"$F(z; \alpha) = u$, $u$ from .05 to .95",
            r"$\partial z / \partial\alpha$ at seven quantiles",
        ],
        loc="upper left",
    )
    return fig


# %%
def figure_variance_dimension():
    """Variance of one gradient coordinate for f(z) = ‖z‖²/2: exact (lines) and measured (marks)."""
    import matplotlib.pyplot as plt

    D = np.arange(1, 257)
    exact = {
        "score_function": (D + 2) * (D + 4) / 4,  # Eq. (eq-path-quadratic)
        "baseline": (D + 2) / 2,  # exercise 3
        "pathwise": np.ones(len(D)),
    }
    label = {
        "score_function": "score function: $(D + 2)(D + 4)/4$",
        "baseline": "score function, best baseline: $(D + 2)/2$",
        "pathwise": "pathwise: $1$",
    }
    measured = {name: [] for name in exact}
    dims = 2 ** np.arange(9)
    for d in dims:
        noise = np.random.default_rng(d).standard_normal((400_000 // d, d))
        score, path = both_estimators(quadratic, 0.0, 1.0, noise)
        for name, G in [
            ("score_function", score),
            ("baseline", score - noise * (d + 2) / 2),
            ("pathwise", path),
        ]:
            measured[name].append(np.mean(G**2))  # the mean of G is 0
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    for name in exact:
        style = {"color": COLOUR[name], "linestyle": LINESTYLE[name]}
        ax.loglog(D, exact[name], label=label[name], **style)
        ax.loglog(dims, measured[name], color=COLOUR[name], linestyle="none", marker=MARKER[name])
    ax.set(xlabel="dimension $D$", ylabel="variance of one coordinate")
    ax.legend()
    return fig


# %%
def figure_crossover():
    """The order reverses: for f(z) = cos(ωz) the pathwise variance grows with the frequency ω.

    Right, lines: Eq. (eq-path-cosine); marks: measured. Dotted: ωσ = 1, the crossing is between
    0.85 and 1.11 for any μ.
    """
    import matplotlib.pyplot as plt

    loc, scale = 0.5, 1.0
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.9))
    z = np.linspace(-3, 4, 400)
    density = np.exp(special.normal_log_prob(z, loc, scale))
    left.fill_between(z, density, color=COLOUR["numeric"], alpha=0.4, linewidth=0, label="$q(z)$")
    for omega, line in [(0.5, "-"), (5.0, "--")]:
        wave = rf"$\cos(\omega z)$, $\omega\sigma = {omega:g}$"
        style = {"color": COLOUR["exact"], "linestyle": line, "linewidth": 1, "label": wave}
        left.plot(z, np.cos(omega * z), **style)
    left.set(xlabel="$z$", ylabel="$f(z)$ and $q(z)$", ylim=(-1.1, 2.2), yticks=[-1, 0, 1])
    left.legend(loc="upper left")

    omegas, marks = np.geomspace(0.1, 10, 200), np.geomspace(0.1, 10, 9)
    noise = np.random.default_rng(0).standard_normal((100_000, 1))
    measured = [[G.var() for G in both_estimators(cosine(k), loc, scale, noise)] for k in marks]
    exact = cosine_variances(omegas, loc, scale)
    for i, name in enumerate(["score_function", "pathwise"]):
        style = {"color": COLOUR[name], "label": name.replace("_", " ")}
        right.loglog(omegas, exact[i], linestyle=LINESTYLE[name], **style)
        right.loglog(marks, np.array(measured)[:, i], linestyle="none", marker=MARKER[name],
                     color=COLOUR[name])  # fmt: skip
    right.axvline(1, color=COLOUR["numeric"], linestyle=":")
    right.set(xlabel=r"frequency $\omega\sigma$", ylabel=r"variance of the gradient in $\mu$")
    right.legend(loc="lower right")
    return fig


# %%
def figure_staircase():
    r"""A bit: each path is a step, their average is smooth; difference quotients do not help.

    Left: Eq. (eq-path-bit). Right: mean and standard deviation of Eq. (eq-path-quotient) for
    $f(z) = z$ at $\phi = 0.7$.
    """
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.9))
    logit, u = np.linspace(-4, 4, 401), (np.arange(8) + 0.5) / 8
    paths = bit(u[:, None], logit)
    blue = COLOUR["pathwise"]
    left.plot(logit, paths[2], color=blue, linestyle="--", label="one path")
    left.plot(logit, paths.mean(0), color=blue, linestyle="-", label="mean of 8 paths")
    left.plot(logit, sc.expit(logit), color=COLOUR["exact"], label=r"$\sigma(\phi)$, all paths")
    left.set(
        xlabel=r"logit $\phi$", ylabel="$z$ and its averages", ylim=(-0.05, 1.45), yticks=[0, 1]
    )
    left.legend(loc="upper left")

    h = np.geomspace(1e-4, 1, 100)
    mean = (sc.expit(0.7 + h) - sc.expit(0.7 - h)) / (2 * h)  # Eq. (eq-path-quotient)
    deviation = np.sqrt(mean / (2 * h) - mean**2)
    dashed = {"color": COLOUR["numeric"], "linestyle": "--"}
    right.loglog(h, deviation, label="standard deviation", **dashed)
    right.loglog(h, mean, color=COLOUR["exact"], label="mean, close to the gradient")
    right.set(xlabel="step $h$", ylabel="difference quotient $Q_h$", ylim=(0.1, 200))
    right.legend(loc="upper right")
    return fig


# %% [markdown]
# ## Exercises
#
# **1. One uniform number.** The Gumbel law has $F(z) = \exp(-e^{-(z - \mu)/\sigma})$, the logistic
# law $F(z) = 1/(1 + e^{-(z - \mu)/\sigma})$. Find samplers $g(u, \phi)$ for both. Are they
# location-scale families? What is $\partial z/\partial\sigma$?
#
# ```{admonition} Solution
# :class: dropdown
#
# Solve $F(z) = u$: $z = \mu - \sigma \log(-\log u)$ and $z = \mu + \sigma \log\frac{u}{1 - u}$.
# Both are of the form {eq}`eq-path-location-scale` with the noise $-\log(-\log u)$ or
# $\log\frac{u}{1-u}$, so $\partial z/\partial\sigma = (z - \mu)/\sigma$, which is what
# {eq}`eq-path-implicit` gives too.
# ```


# %% tags=["hide-cell"]
def test_reparam_exercise_1_gumbel_and_logistic():
    u = np.random.default_rng(20).random(50_000)
    laws = [
        (distributions.Gumbel, lambda u, p: p["loc"] - p["scale"] * np.log(-np.log(u))),
        (distributions.Logistic, lambda u, p: p["loc"] + p["scale"] * special.logit(u)),
    ]
    for law, sampler in laws:
        params = {"loc": 0.4, "scale": 1.5}
        z = sampler(u, params)
        check_density(law(**params).log_prob, (-30.0, 60.0), z)
        dz = pathwise(lambda z: z, sampler, params, u)
        np.testing.assert_allclose(dz["scale"], (z - 0.4) / 1.5)


# %% [markdown]
# **2. Two derivatives of $f$.** Let $z \sim N(\mu, \sigma^2)$. Show that
# $\partial J/\partial(\sigma^2) = \frac12 \mathbb{E}[f''(z)]$. (This is Price's theorem; Rezende
# and others use its form for matrices {cite}`rezende2014stochastic`.)
#
# ```{admonition} Solution
# :class: dropdown
#
# By {eq}`eq-path-normal`, divided by $\sigma$ because that is for $\log\sigma$,
# $\partial J/\partial\sigma = \mathbb{E}[f'(z)\, \varepsilon]$. Integrate by parts over
# $\varepsilon$, with $\varphi' = -\varepsilon\varphi$:
# $\mathbb{E}[f'(\mu + \sigma\varepsilon)\, \varepsilon] = \sigma\, \mathbb{E}[f''(z)]$. And
# $\partial\sigma/\partial(\sigma^2) = 1/(2\sigma)$.
# ```


# %% tags=["hide-cell"]
def test_reparam_exercise_2_price():
    nodes, weights = gauss_hermite(60, 1)
    J = lambda variance: weights @ special.softplus(0.3 + np.sqrt(variance) * nodes[:, 0])
    z = 0.3 + math.sqrt(0.8) * nodes[:, 0]
    second = special.expit(z) * special.expit(-z)
    assert grad(J)(0.8) == pytest.approx(0.5 * weights @ second, rel=1e-10)


# %% [markdown]
# **3. The best constant.** For $z \sim N(0, I)$ and $f(z) = \frac12\|z\|^2$, replace $f$ by
# $f - c$ in the score-function estimate of the gradient in $\mu_i$. Why does the mean stay? Which
# $c$ gives the least variance, and how much is left? Is it $c = \mathbb{E}[f]$?
#
# ```{admonition} Solution
# :class: dropdown
#
# $\mathbb{E}[c\, \varepsilon_i] = 0$. The second moment
# $\mathbb{E}[(f - c)^2 \varepsilon_i^2]$ is a parabola in $c$ with its minimum at
# $c = \mathbb{E}[f \varepsilon_i^2] / \mathbb{E}[\varepsilon_i^2] = \frac12(D + 2)$, one more than
# $\mathbb{E}[f] = \frac12 D$. What is left is
# $\frac14(D + 2)(D + 4) - \frac14(D + 2)^2 = \frac12(D + 2)$; with $c = \mathbb{E}[f]$ it would be
# $\frac12(D + 4)$.
# ```


# %% tags=["hide-cell"]
def test_reparam_exercise_3_best_constant():
    def variance(c, D):
        return quadrature_variances(lambda z: quadratic(z) - c, 0.0, 1.0, 4, D)[0]

    for D in (1, 2, 4):
        assert variance((D + 2) / 2, D) == pytest.approx((D + 2) / 2)
        assert variance(D / 2, D) == pytest.approx((D + 4) / 2)
        assert min(variance((D + 2) / 2 + t, D) for t in (-0.1, 0.1)) > (D + 2) / 2


# %% [markdown]
# **4. A cosine in many dimensions.** Let $f(z) = \sum_{j=1}^{D} \cos(\omega z_j)$ with
# $z \sim N(\mu, \sigma^2 I)$. Compute both variances in $\mu_i$ for large $\omega\sigma$. Where is
# the crossover now?
#
# ```{admonition} Solution
# :class: dropdown
#
# The pathwise estimate $-\omega \sin(\omega z_i)$ sees its own coordinate only: $\omega^2/2$, as
# before. In the score function all coordinates add up. For large $\omega\sigma$ the phases
# are uniform, each cosine has mean 0 and second moment $\frac12$, and the variance is
# $D/(2\sigma^2)$. They are equal at $\omega\sigma = \sqrt{D}$: the dimension is on the side of the
# pathwise estimator even where the frequency is not.
# ```


# %% tags=["hide-cell"]
def test_reparam_exercise_4_cosine_in_many_dimensions():
    for D, n in [(2, 100), (3, 40)]:
        score, path = quadrature_variances(cosine(3.5), 0.3, 1.0, n, D)
        assert score == pytest.approx(D / 2, rel=0.01)
        assert path == pytest.approx(cosine_variances(3.5, 0.3, 1.0)[1], rel=1e-6)
    noise = np.random.default_rng(21).standard_normal((5_000, 49))
    for factor, quieter in [(0.8, "pathwise"), (1.25, "score function")]:
        score, path = (G.var() for G in both_estimators(cosine(7 * factor), 0.3, 1.0, noise))
        assert quieter == ("pathwise" if path < score else "score function")


# %% [markdown]
# **5. Two paths to one law.** If $x \sim \mathrm{Gamma}(\alpha)$ and
# $y \sim \mathrm{Gamma}(\beta)$ are independent, then
# $z = x/(x + y) \sim \mathrm{Beta}(\alpha, \beta)$. Differentiate through this ratio instead of
# the distribution function of $z$. Is the gradient the same? Is it unbiased? Which has the lower
# variance, and must it be so?
#
# ```{admonition} Solution
# :class: dropdown
#
# It is another estimator with the same mean: pathwise gradients are not unique
# {cite}`jankowiak2018pathwise`. Let $v(x, y) = \partial z/\partial\alpha$ along this path. For
# every smooth $f$,
# $\mathbb{E}[f'(z)\, \mathbb{E}[v \mid z]] = \mathbb{E}[f'(z)\, v] = \partial J/\partial\alpha$. On
# the real line only one function $k(z)$ does this for all $f$:
# $\mathbb{E}[f'(z)\, k(z)] = \int f'\, k\, q \, dz$ must equal
# $\partial J/\partial\alpha = -\int f'\, (\partial F/\partial\alpha) \, dz$ (by parts), hence
# $k = -(\partial F/\partial\alpha)/q$, which is {eq}`eq-path-implicit`. So the implicit gradient is
# the conditional expectation of the other given $z$, and by the law of total variance it is never
# the noisier (Rao and Blackwell).
# ```


# %% tags=["hide-cell"]
def ratio_of_gammas(noise, params):
    """A sampler for `pathwise`: its noise is Gamma(a) and Gamma(b) samples, side by side (S, 2)."""
    x, y = (implicit_gamma(noise[:, i], params[name]) for i, name in enumerate("ab"))
    return x / (x + y)


def test_reparam_exercise_5_implicit_beta_is_the_quieter():
    params = {"a": 0.8, "b": 2.0}
    noise = np.random.default_rng(22).gamma([0.8, 2.0], size=(100_000, 2))
    ratio = columns(pathwise(np.log, ratio_of_gammas, params, noise))
    direct = columns(pathwise(np.log, implicit_beta, params, noise[:, 0] / noise.sum(1)))
    exact = np.array([TRIGAMMA(0.8) - TRIGAMMA(2.8), -TRIGAMMA(2.8)])
    check_unbiased(ratio, exact)
    check_unbiased(direct, exact)
    assert np.all(1.05 * direct.var(0) < ratio.var(0))
    # The difference has mean zero given z: it is uncorrelated with every function of z.
    z = noise[:, 0] / noise.sum(1)
    for weight in (np.ones_like(z), z, np.cos(9 * z)):
        check_unbiased(weight[:, None] * (ratio - direct), np.zeros(2), scale=0.5)
