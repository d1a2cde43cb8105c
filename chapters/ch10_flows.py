# %% [markdown]
# # 10. Normalising flows
#
# A normal law has one peak and no bends. Posteriors and data are seldom so simple. This chapter
# bends the law itself: draw from a normal law, then move the point by an invertible map, and
# another, and another. How dense are the points where they end up? The answer is the
# change-of-variables formula; it needs the determinant of a Jacobian, and all the art lies in maps
# whose determinant costs next to nothing. We build six of them, check each against numeric
# Jacobians and integrals, bend them towards given energies and given points, and put eight steps
# into the encoder of a VAE.
#
# **Reads after:** 1, 2, 4, 5, 6 · **Runs in:** 20 s · **Papers:**
# {cite}`rezende2015variational,dinh2017density,durkan2019neural,germain2015made`,
# {cite}`kingma2016improved,papamakarios2017masked,papamakarios2021normalizing`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $B$ | number of data in a batch | () |
# | $D$ | dimension of an event, the same for $z$ and $x$ | () |
# | $T$ | number of steps of a flow | () |
# | $z$ | latent variable: here the point of the base, $z = z_0$ | (B, D) |
# | $z_t$ | the point after $t$ steps | $(B, D)$ |
# | $x$ | observation: here the point that the flow ends in, $x = z_T$ | (B, D) |
# | $g$ | transform from base to data, $x = g(z)$; $g_t$ is step $t$ of it | $(D,)$ to $(D,)$ |
# | $J_g$ | Jacobian, with entries $\partial x_i / \partial z_j$ | $(D, D)$ |
# | $q_0$, $q_t$ | density of the base, $N(0, I)$, and density after $t$ steps | () |
# | $\phi$ | parameters of the approximate posterior, or of any flow | any |
# | $U$, $Z$ | energy of a target with density $e^{-U(x)} / Z$, and the integral of $e^{-U}$ | () |
# | $u$, $w$, $b$ | parameters of a planar step | $(D,)$, $(D,)$, () |
# | $\sigma(\cdot)$ | logistic function, $\sigma(s) = 1 / (1 + e^{-s})$ | any |
# | $\odot$ | elementwise product | of two arrays of one shape |
# | $m$, $s$ | shift and log-scale (or logit of a gate) that a network returns | as what they move |
# | $K$ | number of components, categories or codes: here bins of a spline | () |
# | $\varepsilon$ | noise whose law has no parameters, standard normal | (B, d) |
# | $h$ | context: what the encoder says of an image, in $C$ numbers | (B, C) |
# | $d$ | number of latents of one datum | () |
# | $M$ | number of importance samples in an evaluation | () |
#
# One rule for the whole chapter, because libraries differ in it: `transform` goes **from base to
# data**, `inverse` from data to base, and `log_abs_det` is the number
# $\log |\det \partial x / \partial z|$, base to data, *whichever way one goes*.

# %% [markdown]
# ## Derivation
#
# ### Change of variables
#
# If a map stretches space by a factor of two somewhere, points that land there lie half as dense.
# For a map of $\mathbb{R}^D$ the factor is $|\det J_g|$, the volume of the image of a small cube
# over the volume of the cube.
#
# ```{prf:theorem} Change of variables
# :label: thm-flow-change
#
# Let $g: \mathbb{R}^D \to \mathbb{R}^D$ be injective and continuously differentiable with
# $\det J_g(z) \ne 0$ everywhere, and let $z$ have the density $q_0$. Then $x = g(z)$ has, on the
# image of $g$, the density
#
# $$ q(x) = \frac{q_0(z)}{|\det J_g(z)|}, \qquad z = g^{-1}(x) , $$ (eq-flow-change)
#
# and the density 0 elsewhere.
# ```
#
# *Proof.* By the inverse-function theorem $g$ has near each $z$ a continuously differentiable
# inverse, with the Jacobian $J_g(z)^{-1}$, and images of open sets are open. As $g$ is injective,
# the local inverses are pieces of one inverse $g^{-1}$, defined on the image of $g$. For a set $A$
# in the image, substitution in the integral gives
#
# $$ \begin{aligned}
#    P(x \in A) &= P\big(z \in g^{-1}(A)\big) = \int_{g^{-1}(A)} q_0(z)\, dz \\
#    &= \int_A q_0\big(g^{-1}(x)\big)\, \big|\det J_{g^{-1}}(x)\big|\, dx ,
#    \end{aligned} $$ (eq-flow-substitution)
#
# so the last integrand is the density. And $\det J_{g^{-1}}(x) = 1 / \det J_g(z)$. $\square$
#
# The bars are not decoration. A reflection such as $x = -z$ in one dimension has
# $\det J = -1$; without them its "density" is $-q_0(-x)$, and its logarithm does not exist. And
# *injective* is not decoration either: $\det J_g \ne 0$ everywhere does not make a map of the plane
# invertible ($(z_1, z_2) \mapsto e^{z_1} (\cos z_2, \sin z_2)$ winds around infinitely often). Each
# family below comes with its own proof that it can be undone.

# %% [markdown]
# ### Steps in a row
#
# Compose $T$ steps, $z_t = g_t(z_{t-1})$, $x = z_T$. Apply {eq}`eq-flow-change` $T$ times:
#
# $$ \log q_T(z_T) = \log q_0(z_0)
#    - \sum_{t=1}^{T} \log \Big| \det \frac{\partial g_t}{\partial z_{t-1}} \Big| ,
# $$ (eq-flow-chain)
#
# every determinant taken at its own point $z_{t-1}$. Nothing asks the steps to be of one kind:
# simple ones, mixed and composed, make laws that no single one of them can reach. To derive
# {eq}`eq-flow-chain` is an exercise of a course assignment (our exercise 1). The formula in print
# lacks the bars, and the indices of the sum and of its terms are mixed; "What goes wrong" shows
# what each of the two slips costs.
#
# ### Two ways to train
#
# *An energy is known, and no data.* A target density $e^{-U} / Z$ is given up to its constant, as
# posteriors are: there $U = -\log p(\text{data}, \cdot)$, and the flow ends in the latent. Minimise
# the divergence from flow to target (the *reverse* one, with the flow in front),
#
# $$ \mathrm{KL}\big(q_T \,\|\, e^{-U} / Z\big)
#    = \mathbb{E}_{z_0 \sim q_0}\Big[ \log q_0(z_0) - \sum_t \log|\det J_{g_t}| + U(z_T) \Big]
#    + \log Z . $$ (eq-flow-reverse)
#
# The noise is $z_0$, so this is the pathwise gradient of Chapter 4, and without $\log Z$ it is
# minus an ELBO. Samples are made and their density is needed: the way from base to data.
#
# *Data are known, and no density.* Maximise the likelihood of the points,
#
# $$ \log q_T(x) = \log q_0\big(g^{-1}(x)\big) - \sum_t \log|\det J_{g_t}| , $$ (eq-flow-likelihood)
#
# the way from data to base. Which way must be fast decides which family to take.

# %% [markdown]
# ### Planar and radial steps
#
# The determinant of a $D \times D$ matrix costs $D^3$ operations, and there is one for every point
# and step. The first idea {cite}`rezende2015variational` is to move all points along one direction
# $u$, by an amount that depends on their coordinate along another, $w$:
#
# $$ g(z) = z + \hat u \tanh(w^\top z + b) , \qquad
#    \det J_g = 1 + \big(1 - \tanh^2(w^\top z + b)\big)\, w^\top \hat u . $$ (eq-flow-planar)
#
# $J_g$ is the identity plus the matrix $\hat u \psi^\top$ of rank one,
# $\psi = (1 - \tanh^2)\, w$. It maps $\hat u$ to $(1 + \psi^\top \hat u)\, \hat u$ and leaves the
# directions orthogonal to $\psi$ alone, which is the determinant. When is the step invertible?
# Points that differ by something orthogonal to $w$ are moved alike, so all is decided along $w$:
# the number $y = w^\top z + b$ becomes
#
# $$ w^\top x + b = y + w^\top \hat u \, \tanh y , $$ (eq-flow-planar-line)
#
# and this increases strictly in $y$ if and only if $w^\top \hat u \ge -1$. The parameter $u$ is
# free; what is used is its shifted copy
#
# $$ \begin{gathered}
#    \hat u = u + \big(\mathrm{softplus}(w^\top u) - 1 - w^\top u\big) \frac{w}{\|w\|^2} , \\
#    w^\top \hat u = \mathrm{softplus}(w^\top u) - 1 > -1 ,
#    \end{gathered} $$ (eq-flow-planar-free)
#
# with $\mathrm{softplus}(s) = \log(1 + e^s)$. Write $\kappa = \mathrm{softplus}(w^\top u)$ and
# $\tau = \tanh y$: then $\det J_g = \tau^2 + (1 - \tau^2)\, \kappa$, a sum of two terms that are
# not negative and never both zero. In this form nothing cancels. The inverse needs the root $y$ of
# {eq}`eq-flow-planar-line`, and $z = x - \hat u \tanh y$. The root has no formula, but bisection
# finds it, and its derivatives follow by differentiating the equation, as in
# {eq}`eq-path-implicit`: with $c = w^\top \hat u$ and $\rho = w^\top x + b$,
#
# $$ \frac{\partial y}{\partial \rho} = \frac{1}{1 + c\,(1 - \tanh^2 y)}, \qquad
#    \frac{\partial y}{\partial c} = \frac{-\tanh y}{1 + c\,(1 - \tanh^2 y)} . $$ (eq-flow-root)
#
# A *radial* step moves points towards a centre $c_0$ or away from it. With $r = \|z - c_0\|$ and
# $\alpha, \delta > 0$ (each the softplus of a parameter),
#
# $$ g(z) = c_0 + \frac{r + \delta}{r + \alpha}\, (z - c_0), \qquad
#    |\det J_g| = \Big(\frac{r + \delta}{r + \alpha}\Big)^{D-1}
#    \frac{r^2 + 2 \alpha r + \alpha \delta}{(r + \alpha)^2} . $$ (eq-flow-radial)
#
# (This is $z + \beta (z - c_0) / (\alpha + r)$ of the paper with $\beta = \delta - \alpha$, which
# makes its condition $\beta > -\alpha$ read $\delta > 0$.) The first factor is the stretching in
# the $D - 1$ directions along the sphere, the second that along the radius, the derivative of
# $r \mapsto r (r + \delta) / (r + \alpha)$. It is positive, so radii keep their order and the step
# can be undone. Given the new radius $R$, the old one solves
# $r^2 + (\delta - R)\, r - \alpha R = 0$, whose one positive root is
#
# $$ r = \tfrac12 \Big( R - \delta + \sqrt{(R - \delta)^2 + 4 \alpha R} \Big) . $$ (eq-flow-radius)

# %% [markdown]
# ### Couplings
#
# The second idea makes the Jacobian *triangular*, so that its determinant is the product of the
# diagonal. A coupling {cite}`dinh2017density` splits the coordinates in two. The first half is
# kept; it decides, through a network of any kind, what happens to the second:
#
# $$ x_1 = z_1, \qquad x_2 = e^{s(z_1)} \odot z_2 + m(z_1), \qquad
#    \log|\det J_g| = \sum_i s_i(z_1) . $$ (eq-flow-coupling)
#
# To undo it, read $x_1 = z_1$, run the *same* network, and solve for $z_2$. The network itself is
# never inverted. Between two couplings the order of the coordinates is turned round, or half of
# them would never move. (The code uses $2 \tanh(s/2)$ for $s$, so that no scale leaves
# $e^{\pm 2}$.)
#
# In place of scale and shift any increasing function will do, coordinate by coordinate. *Rational
# quadratic splines* {cite}`durkan2019neural` have many shapes and an inverse in closed form. Let
# the interval $[-E, E]$ be cut at knots $\xi_0 < \dots < \xi_K$, and let the spline take the values
# $\eta_0 < \dots < \eta_K$ there, $\eta_0 = -E$, $\eta_K = E$, with slopes $\delta_k > 0$. Between
# two knots, with $\theta = (z - \xi_k) / (\xi_{k+1} - \xi_k)$ and the mean slope
# $\varsigma = (\eta_{k+1} - \eta_k) / (\xi_{k+1} - \xi_k)$,
#
# $$ x = \eta_k + (\eta_{k+1} - \eta_k)\,
#    \frac{\varsigma\, \theta^2 + \delta_k\, \theta (1 - \theta)}
#    {\varsigma + (\delta_{k+1} + \delta_k - 2 \varsigma)\, \theta (1 - \theta)} ,
# $$ (eq-flow-spline)
#
# $$ \frac{dx}{dz} = \frac{\varsigma^2 \big( \delta_{k+1} \theta^2
#    + 2 \varsigma\, \theta (1 - \theta) + \delta_k (1 - \theta)^2 \big)}
#    {\big( \varsigma + (\delta_{k+1} + \delta_k - 2 \varsigma)\, \theta (1 - \theta) \big)^2} > 0 .
# $$ (eq-flow-slope)
#
# At $\theta = 0$ and $1$ the slope is $\delta_k$ and $\delta_{k+1}$, so the pieces fit. Outside
# $[-E, E]$ the map is the identity, and the outer slopes are 1. To undo it, let
# $v = (x - \eta_k) / (\eta_{k+1} - \eta_k)$ and $e = \delta_k (1 - v) - \delta_{k+1} v$. Multiply
# {eq}`eq-flow-spline` by its denominator, in which $\varsigma$ is
# $\varsigma (\theta + 1 - \theta)^2$, and collect:
# $\varsigma v\, (1 - \theta)^2 - e\, \theta (1 - \theta) - \varsigma (1 - v)\, \theta^2 = 0$.
# This is a quadratic equation for $(1 - \theta) / \theta$ with one root that is not negative, so
#
# $$ \theta = \frac{2 \varsigma v}{2 \varsigma v + e + R} , \qquad
#    R = \sqrt{e^2 + 4 \varsigma^2 v (1 - v)} . $$ (eq-flow-spline-back)
#
# Where $e < 0$ the code writes $e + R$ as $4 \varsigma^2 v (1 - v) / (R - e)$, so that nothing
# cancels. (The usual coefficients of $\theta$ itself, in float32, can give the root of a negative
# number.)

# %% [markdown]
# ### Autoregressive steps
#
# A coupling has two blocks. With $D$ blocks of one coordinate each, every coordinate is moved by
# all those before it:
#
# $$ x_i = e^{s_i(x_{<i})}\, z_i + m_i(x_{<i}), \qquad
#    \log|\det J_g| = \sum_i s_i . $$ (eq-flow-maf)
#
# This is the *masked autoregressive* flow {cite}`papamakarios2017masked`. From data to base,
# $z_i = (x_i - m_i) e^{-s_i}$, all coordinates at once: one pass through the network. From base to
# data $x_1$ comes first, then $x_2$, and so on: $D$ passes. The *inverse autoregressive* flow
# {cite}`kingma2016improved` lets the network read the *base*, and has the costs exchanged:
#
# $$ \begin{gathered}
#    x_i = \sigma(s_i)\, z_i + \big(1 - \sigma(s_i)\big)\, m_i , \qquad
#    (m_i, s_i) \text{ functions of } z_{<i} , \\
#    \log|\det J_g| = \sum_i \log \sigma(s_i) .
#    \end{gathered} $$ (eq-flow-iaf)
#
# Its scale is written as a gate that lets through some of the old value and mixes in some of the
# new. Adding 1 to 2 to $s$ opens all gates at the start, as one does with the forget gates of an
# LSTM; then the flow begins close to the identity. To sample and know the density of
# the sample takes one pass, which is all that an encoder ever does.
#
# The network must obey "before". *MADE* {cite}`germain2015made` takes an ordinary network with one
# hidden layer and removes connections. Give input $i$ the number $i$, hidden unit $k$ a number
# $n_k \in \{0, \dots, D - 1\}$, output $i$ the number $i$, and keep a connection
#
# $$ \text{input } j \to \text{hidden } k \text{ if } j \le n_k, \qquad
#    \text{hidden } k \to \text{output } i \text{ if } n_k < i . $$ (eq-flow-made)
#
# A path from input $j$ to output $i$ then has $j \le n_k < i$. One sign off, $n_k \le i$, and
# output $i$ sees its own input.
#
# The $D$ passes of the slow direction need no bookkeeping. Start with zeros and repeat
# $x \leftarrow e^{s(x)} \odot z + m(x)$: the first coordinate is right after the first pass, as it
# depends on nothing, and each pass makes one more coordinate right. After $D$ passes the fixed
# point is exact.
#
# | step | determinant | from base to data | from data to base |
# |---|---|---|---|
# | planar | $D$ operations | 1 pass | a root |
# | radial | $D$ operations | 1 pass | 1 pass |
# | coupling, affine or spline | $D$ | 1 pass | 1 pass |
# | masked autoregressive | $D$ | $D$ passes | 1 pass |
# | inverse autoregressive | $D$ | 1 pass | $D$ passes |

# %% [markdown]
# ### A flow in the encoder
#
# The encoder of Chapter 5 offers every image an axis-aligned normal law. Let a flow follow,
# the same for all images except for a *context* $h$, which the encoder computes and which
# shifts the hidden units of the flow's networks {cite}`kingma2016improved`:
#
# $$ \begin{gathered}
#    z_0 = \mu + e^{r/2} \odot \varepsilon, \qquad
#    (m_t, s_t) = \mathrm{MADE}_t(z_{t-1}, h) , \\
#    z_t = \sigma(s_t) \odot z_{t-1} + \big(1 - \sigma(s_t)\big) \odot m_t ,
#    \end{gathered} $$ (eq-flow-encoder)
#
# $$ \log q_\phi(z_T \mid x) = \sum_{i=1}^{d} \Big( {-\tfrac12} \varepsilon_i^2 - \tfrac12 \log 2\pi
#    - \tfrac12 r_i - \sum_{t=1}^{T} \log \sigma(s_{t,i}) \Big) . $$ (eq-flow-encoder-density)
#
# Here $\mu$ and $r$ (the log-variance), $(B, d)$ each, are what the encoder of Chapter 5 says. (In
# this section $x$ is an image again; the base point is $\varepsilon$, and $z_T$ is the latent that
# the decoder receives.)
# After every step the order of the latents is turned round, which changes no determinant: as in the
# first step the last latent hears of all others, so in the second the first one does. The
# divergence to the prior has no closed form any more, and does not need one: Estimator A,
# {eq}`eq-vae-a`, asks for the density of the sample, and here it is. With $T = 0$ this is the
# encoder of Chapter 5, so the two can be compared in all fairness.

# %% [markdown]
# ## By hand
#
# A planar step, backwards. A bar marks a derivative of some objective, and $c$ is now made of the
# free $u$: let $n = \|w\|^2$, $c = w^\top u$, $\kappa = \mathrm{softplus}(c)$ and
# $\nu = (\kappa - 1 - c)/n$, so that $\hat u = u + \nu w$; for each point let
# $\tau = \tanh(w^\top z + b)$ and $\Delta = \tau^2 + (1 - \tau^2) \kappa$, so that
# $x = z + \tau \hat u$ and $\ell = \log \Delta$. Given $\bar x$ $(B, D)$ and $\bar \ell$ $(B,)$,
# the derivatives of some objective in the step's two results, the rules of Chapter 1 give in this
# order
#
# $$ \begin{gathered}
#    \bar\tau = \bar x\, \hat u + \bar\ell \odot \frac{2 \tau (1 - \kappa)}{\Delta}, \qquad
#    \bar y = \bar\tau \odot (1 - \tau^2), \\
#    \bar b = \sum_{\text{rows}} \bar y, \qquad
#    \bar z = \bar x + \bar y\, w^\top ,
#    \end{gathered} $$ (eq-flow-back-points)
#
# $$ \begin{gathered}
#    \bar{\hat u} = \sum_{\text{rows}} \tau\, \bar x, \qquad
#    \bar\nu = \bar{\hat u}^\top w, \\
#    \bar\kappa = \sum_{\text{rows}} \bar\ell\, \frac{1 - \tau^2}{\Delta} + \frac{\bar\nu}{n},
#    \qquad
#    \bar c = \bar\kappa\, \sigma(c) - \frac{\bar\nu}{n} ,
#    \end{gathered} $$ (eq-flow-back-free)
#
# $$ \bar u = \bar{\hat u} + \bar c\, w, \qquad
#    \bar w = z^\top \bar y + \nu\, \bar{\hat u} + \bar c\, u - \frac{2 \nu \bar\nu}{n}\, w .
# $$ (eq-flow-back-params)

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from chapters.ledger import claim
from chapters.style import COLOUR


def planar_by_hand(params, z):
    """A planar step for points `z` (B, D), and its pull-back, without autodiff.

    Returns x (B, D), log|det| (B,), and the function that takes their two derivatives to those of
    the parameters and of z.
    """
    u, w, b = params["u"], params["w"], params["b"]
    n, c = w @ w, w @ u
    kappa = np.logaddexp(0, c)
    nu = (kappa - 1 - c) / n
    u_hat = u + nu * w  # Eq. (eq-flow-planar-free)
    tau = np.tanh(z @ w + b)
    det = tau**2 + (1 - tau**2) * kappa
    x = z + tau[:, None] * u_hat  # Eq. (eq-flow-planar)

    def pullback(x_bar, log_abs_det_bar):
        tau_bar = x_bar @ u_hat + log_abs_det_bar * 2 * tau * (1 - kappa) / det
        y_bar = tau_bar * (1 - tau**2)  # Eq. (eq-flow-back-points)
        u_hat_bar = tau @ x_bar  # Eq. (eq-flow-back-free)
        nu_bar = u_hat_bar @ w
        kappa_bar = np.sum(log_abs_det_bar * (1 - tau**2) / det) + nu_bar / n
        c_bar = kappa_bar / (1 + np.exp(-c)) - nu_bar / n
        w_bar = y_bar @ z + nu * u_hat_bar + c_bar * u - 2 * nu * nu_bar / n * w
        bars = {"u": u_hat_bar + c_bar * w, "w": w_bar, "b": np.sum(y_bar)}
        return bars, x_bar + y_bar[:, None] * w  # Eq. (eq-flow-back-params)

    return x, np.log(det), pullback


# %% [markdown]
# ## With minigrad
#
# A flow is three functions, and a composition is a list of flows. All flows have the same
# signature, so whoever has a list of them can sample from it and evaluate its density.

# %%
from minigrad import nn, primitive, tree
from minigrad.nn import dense, dense_init
from minigrad.special import expit, log_sigmoid, logsumexp, normal_log_prob, softmax, softplus


class Flow(NamedTuple):
    r"""A family of invertible maps of $\mathbb{R}^D$.

    `init(rng, D)` returns params; `transform(params, z)` returns `(x, log_abs_det)`, from base to
    data, for `z` (..., D); `inverse(params, x)` returns `(z, log_abs_det)`. In both `log_abs_det`
    (...) is $\log|\det \partial x / \partial z|$, base to data.
    """

    init: Callable
    transform: Callable
    inverse: Callable


def chain_init(flows, rng, D):
    """Parameters of a list of flows: a list."""
    return [flow.init(rng, D) for flow in flows]


def chain_transform(flows, params, z):
    """From base to data through all flows: x (..., D) and the sum of their log|det| (...)."""
    total = 0.0
    for flow, p in zip(flows, params, strict=True):
        z, log_abs_det = flow.transform(p, z)
        total = total + log_abs_det
    return z, total


def chain_inverse(flows, params, x):
    """From data to base, last flow first: z (..., D) and the same sum, base to data."""
    total = 0.0
    for flow, p in zip(flows[::-1], params[::-1], strict=True):
        x, log_abs_det = flow.inverse(p, x)
        total = total + log_abs_det
    return x, total


def base_log_prob(z):
    """Log-density of the base, N(0, I), in nats: (...)."""
    return np.sum(normal_log_prob(z, 0.0, 1.0), axis=-1)


def log_prob(flows, params, x):
    """Log-density of a composition of flows at `x` (..., D), in nats: (...)."""
    z, log_abs_det = chain_inverse(flows, params, x)
    return base_log_prob(z) - log_abs_det  # Eq. (eq-flow-chain)


# %% [markdown]
# The planar step. Its root is a primitive of its own, with the two derivatives
# {eq}`eq-flow-root`: the sixty halvings are never differentiated. The rules are written in the
# result `y`, which is itself a traced quantity, so they can be differentiated again.


# %%
def planar_init(rng, D):
    """Parameters of a planar step."""
    u, w = nn.normal(rng, (2, D), scale=0.5)
    return {"u": u, "w": w, "b": np.zeros((), np.float32)}


def planar_direction(params):
    r"""The direction $\hat u$ (D,) of a planar step, and $w^\top \hat u + 1 > 0$."""
    u, w = params["u"], params["w"]
    c = np.sum(w * u)
    kappa = softplus(c)
    return u + (kappa - 1 - c) * w / np.sum(w * w), kappa  # Eq. (eq-flow-planar-free)


def planar_log_abs_det(tau, kappa):
    """Log|det| of a planar step, where tanh is `tau` (...)."""
    return np.log(tau * tau + (1 - tau * tau) * kappa)


def planar_transform(params, z):
    """Planar step, base to data."""
    u_hat, kappa = planar_direction(params)
    tau = np.tanh(z @ params["w"] + params["b"])
    return z + tau[..., None] * u_hat, planar_log_abs_det(tau, kappa)  # Eq. (eq-flow-planar)


def bisect(rho, c):
    """The root y of y + c tanh(y) = rho for c > -1, elementwise."""
    low, high = rho - np.abs(c), rho + np.abs(c)
    for _ in range(60):
        y = 0.5 * (low + high)
        below = y + c * np.tanh(y) < rho
        low, high = np.where(below, y, low), np.where(below, high, y)
    return y


def root_slope(y, c):
    """Derivative of y + c tanh(y) in y."""
    return 1 + c * (1 - np.tanh(y) ** 2)


planar_root = primitive(  # Eq. (eq-flow-root)
    bisect,
    lambda y, rho, c: lambda g: g / root_slope(y, c),
    lambda y, rho, c: lambda g: -g * np.tanh(y) / root_slope(y, c),
    name="planar_root",
)


def planar_inverse(params, x):
    """Planar step, data to base."""
    u_hat, kappa = planar_direction(params)
    y = planar_root(x @ params["w"] + params["b"], kappa - 1)  # Eq. (eq-flow-planar-line)
    return x - np.tanh(y)[..., None] * u_hat, planar_log_abs_det(np.tanh(y), kappa)


planar = Flow(planar_init, planar_transform, planar_inverse)


# %% [markdown]
# The radial step, {eq}`eq-flow-radial`; and couplings, which share a small network. Its last layer
# starts near zero, so every coupling starts near the identity.


# %%
def radial_init(rng, D):
    """Parameters of a radial step."""
    centre, free = nn.normal(rng, (D,), scale=1.0), nn.normal(rng, (2,), scale=0.5)
    return {"centre": centre, "alpha": free[0], "delta": free[1]}


def radial_log_abs_det(r, alpha, delta, D):
    """Log|det| of a radial step at the radius `r` (...) in the base."""
    along = np.log(r * r + 2 * alpha * r + alpha * delta) - 2 * np.log(r + alpha)
    return (D - 1) * np.log((r + delta) / (r + alpha)) + along  # Eq. (eq-flow-radial)


def radial_transform(params, z):
    """Radial step, base to data."""
    alpha, delta = softplus(params["alpha"]), softplus(params["delta"])
    away = z - params["centre"]
    r = np.linalg.norm(away, axis=-1)
    x = params["centre"] + ((r + delta) / (r + alpha))[..., None] * away
    return x, radial_log_abs_det(r, alpha, delta, z.shape[-1])


def radial_inverse(params, x):
    """Radial step, data to base."""
    alpha, delta = softplus(params["alpha"]), softplus(params["delta"])
    away = x - params["centre"]
    R = np.linalg.norm(away, axis=-1)
    r = 0.5 * (R - delta + np.sqrt((R - delta) ** 2 + 4 * alpha * R))  # Eq. (eq-flow-radius)
    z = params["centre"] + ((r + alpha) / (r + delta))[..., None] * away
    return z, radial_log_abs_det(r, alpha, delta, x.shape[-1])


radial = Flow(radial_init, radial_transform, radial_inverse)


# %%
WIDTH = 32  # hidden units of the networks in the flows of the plane


def network_init(rng, n_in, n_out):
    """Parameters of a network with one hidden layer; its outputs are small at first."""
    out = dense_init(rng, WIDTH, n_out, w_init=nn.normal)
    return {"hidden": dense_init(rng, n_in, WIDTH), "out": out}


def network(params, x):
    """Outputs (..., n_out) for inputs (..., n_in)."""
    return dense(params["out"], np.tanh(dense(params["hidden"], x)))


def coupling_init(rng, D):
    """Parameters of an affine coupling, which keeps the first D // 2 coordinates."""
    return network_init(rng, D // 2, 2 * (D - D // 2))


def coupled(function):
    """The map that moves the second half of the coordinates by `function(outputs, half)`.

    The outputs are those of the network for the first half; the function returns the moved half,
    and the terms of its log|det|, base to data.
    """

    def couple(params, z):
        kept, moved = np.split(z, [z.shape[-1] // 2], axis=-1)
        moved, terms = function(network(params, kept), moved)
        return np.concatenate([kept, moved], axis=-1), np.sum(terms, axis=-1)

    return couple


def affine(outputs, z):
    """Scale and shift of `z` (..., n), base to data; the log-scales (..., n)."""
    s, m = np.split(outputs, 2, axis=-1)
    s = 2 * np.tanh(s / 2)
    return np.exp(s) * z + m, s  # Eq. (eq-flow-coupling)


def affine_inverse(outputs, x):
    """The inverse, and the same log-scales."""
    s, m = np.split(outputs, 2, axis=-1)
    s = 2 * np.tanh(s / 2)
    return np.exp(-s) * (x - m), s


coupling = Flow(coupling_init, coupled(affine), coupled(affine_inverse))


# %% [markdown]
# The spline. The network returns $3K - 1$ numbers for each coordinate: logits of the widths and of
# the heights of the bins, and the inner slopes before a softplus. The bin of a point is found by
# counting the knots below it. Counting has no derivative, which is right: the pieces fit together.


# %%
BINS, EDGE = 8, 4.0
SMALLEST = 1e-3  # of a bin, as a share of the interval, and of a slope


def between(inner, first, last):
    """The array `inner` (..., n) with `first` before and `last` behind it: (..., n + 2)."""
    one = np.ones_like(inner[..., :1])
    return np.concatenate([first * one, inner, last * one], axis=-1)


def knots(raw):
    """Knots, values and slopes, (..., n, K + 1) each, from raw numbers (..., n (3K - 1))."""
    raw = np.reshape(raw, (*raw.shape[:-1], -1, 3 * BINS - 1))

    def positions(logits):
        share = SMALLEST + (1 - BINS * SMALLEST) * softmax(logits)
        return between(2 * EDGE * np.cumsum(share, axis=-1)[..., :-1] - EDGE, -EDGE, EDGE)

    widths, heights, rest = np.split(raw, [BINS, 2 * BINS], axis=-1)
    slopes = SMALLEST + softplus(rest + 0.54)  # raw zeros give slopes near 1
    return positions(widths), positions(heights), between(slopes, 1.0, 1.0)


def bin_at(tables, which, value):
    """Corner (x0, y0), width, height and end slopes of the bin that holds `value` (..., n).

    It is looked for among the knots `tables[which]`: 0 for z, 1 for x.
    """
    k = np.sum(value[..., None] >= tables[which][..., 1:-1], axis=-1, keepdims=True)
    at = lambda table, k: np.take_along_axis(table, k, axis=-1)[..., 0]
    (x0, y0, d0), (x1, y1, d1) = ([at(t, k + i) for t in tables] for i in (0, 1))
    return x0, y0, x1 - x0, y1 - y0, d0, d1


# %%
def spline(raw, z):
    """Increasing rational-quadratic function of `z` (..., n), and the log of its slope."""
    inside = np.abs(z) < EDGE
    x0, y0, w, h, d0, d1 = bin_at(knots(raw), 0, np.where(inside, z, 0.0))
    s, t = h / w, (np.where(inside, z, x0) - x0) / w
    x = y0 + h * (s * t * t + d0 * t * (1 - t)) / spline_denominator(s, t, d0, d1)
    return spline_outside(inside, z, x, s, t, d0, d1)  # Eq. (eq-flow-spline)


def spline_inverse(raw, x):
    """The inverse function of `x` (..., n), and the log of the slope of `spline` there."""
    inside = np.abs(x) < EDGE
    x0, y0, w, h, d0, d1 = bin_at(knots(raw), 1, np.where(inside, x, 0.0))
    s, v = h / w, (np.where(inside, x, y0) - y0) / h
    e, squared = d0 * (1 - v) - d1 * v, 4 * s * s * v * (1 - v)
    wide = np.sqrt(e * e + squared) + np.abs(e)  # Eq. (eq-flow-spline-back)
    t = 2 * s * v / (2 * s * v + np.where(e > 0, wide, squared / wide))
    return spline_outside(inside, x, x0 + w * t, s, t, d0, d1)


def spline_denominator(s, t, d0, d1):
    """Of Eq. (eq-flow-spline)."""
    return s + (d1 + d0 - 2 * s) * t * (1 - t)


def spline_outside(inside, before, after, s, t, d0, d1):
    """The result inside the interval, the identity outside; and the log-slope, base to data."""
    top = d1 * t * t + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2
    log_slope = 2 * np.log(s) + np.log(top) - 2 * np.log(spline_denominator(s, t, d0, d1))
    return np.where(inside, after, before), np.where(inside, log_slope, 0.0)  # Eq. (eq-flow-slope)


def spline_coupling_init(rng, D):
    """Parameters of a spline coupling."""
    return network_init(rng, D // 2, (D - D // 2) * (3 * BINS - 1))


spline_coupling = Flow(spline_coupling_init, coupled(spline), coupled(spline_inverse))


# %% [markdown]
# The autoregressive steps. The masks are made from the shapes. A hidden bias may be
# different for each row, `params["context"]`: that is all that it takes to make a flow depend on an
# image.


# %%
def made_masks(D, n_hidden):
    """Which connections there are, (D, n_hidden) and (n_hidden, D): Eq. (eq-flow-made)."""
    inputs, hidden = np.arange(1, D + 1), np.arange(n_hidden) % D
    return inputs[:, None] <= hidden, hidden[:, None] < inputs


def made_init(rng, D, n_hidden=WIDTH):
    """Parameters of a masked network with two outputs, m and s, for each of D inputs."""
    heads = {name: dense_init(rng, n_hidden, D, w_init=nn.normal) for name in ("m", "s")}
    return {"hidden": dense_init(rng, D, n_hidden), **heads}


def made(params, y):
    """m and s, (..., D) each, of which coordinate i depends on the coordinates of `y` before i."""
    mask_in, mask_out = made_masks(*params["hidden"]["w"].shape)
    masked = lambda layer, mask: {"w": mask * layer["w"], "b": layer["b"]}
    h = np.tanh(dense(masked(params["hidden"], mask_in), y) + params.get("context", 0.0))
    return [dense(masked(params[name], mask_out), h) for name in ("m", "s")]


def maf_transform(params, z):
    """Masked autoregressive step, base to data, in D passes."""
    x = np.zeros_like(z)
    for _ in range(z.shape[-1]):
        m, s = made(params, x)
        x = np.exp(s) * z + m  # Eq. (eq-flow-maf)
    return x, np.sum(s, axis=-1)


def maf_inverse(params, x):
    """Masked autoregressive step, data to base, in one pass."""
    m, s = made(params, x)
    return (x - m) * np.exp(-s), np.sum(s, axis=-1)


masked_autoregressive = Flow(made_init, maf_transform, maf_inverse)


# %%
OPEN = 2.0  # added to the logits of the gates


def iaf_step(params, z):
    """Inverse autoregressive step, base to data, and the log of each gate (..., D)."""
    m, s = made(params, z)
    s = s + OPEN
    return expit(s) * z + expit(-s) * m, log_sigmoid(s)  # Eq. (eq-flow-iaf)


def iaf_transform(params, z):
    """Inverse autoregressive step, base to data, in one pass."""
    x, log_gates = iaf_step(params, z)
    return x, np.sum(log_gates, axis=-1)


def iaf_inverse(params, x):
    """Inverse autoregressive step, data to base, in D passes."""
    z = np.zeros_like(x)
    for _ in range(x.shape[-1]):
        m, s = made(params, z)
        s = s + OPEN
        z = (x - expit(-s) * m) / expit(s)
    return z, np.sum(log_sigmoid(s), axis=-1)


inverse_autoregressive = Flow(made_init, iaf_transform, iaf_inverse)


def turn(_params, z):
    """The coordinates in reverse order; it is its own inverse and its |det| is 1."""
    return z[..., ::-1], 0.0


reverse = Flow(lambda _rng, _D: {}, turn, turn)


# %% [markdown]
# ### Targets in the plane
#
# Four energies on which flows have been shown ever since {cite}`rezende2015variational`: a ring
# with two gaps, a wave, a wave that splits, and a wave that splits and stays apart. With
# $\omega = \sin(\pi x_1 / 2)$, and $\mathrm{two}(a, b) = -\log(e^{-a^2/2} + e^{-b^2/2})$,
#
# $$ \begin{aligned}
#    U_1 &= \tfrac12 \Big(\frac{\|x\| - 2}{0.4}\Big)^2
#    + \mathrm{two}\Big(\frac{x_1 - 2}{0.6}, \frac{x_1 + 2}{0.6}\Big), \\
#    U_2 &= \tfrac12 \Big(\frac{x_2 - \omega}{0.4}\Big)^2 + W, \\
#    U_3 &= \mathrm{two}\Big(\frac{x_2 - \omega}{0.35},
#    \frac{x_2 - \omega + 3 e^{-(x_1 - 1)^2 / 0.72}}{0.35}\Big) + W, \\
#    U_4 &= \mathrm{two}\Big(\frac{x_2 - \omega}{0.4},
#    \frac{x_2 - \omega + 3\, \sigma((x_1 - 1)/0.3)}{0.35}\Big) + W .
#    \end{aligned} $$ (eq-flow-energies)
#
# As printed in the paper there is no $W$, and then $U_2$, $U_3$ and $U_4$ are no energies of any
# density: a wave without end has infinite mass, and nothing keeps a flow from running along it. The
# pictures cut it off at the frame. Our wall does the same in the formula,
# $W = \frac12 \big(\max(0, |x_1| - 4) / 0.4\big)^2$. In the plane the constant $Z$ is a sum over a
# grid, so the divergence {eq}`eq-flow-reverse` itself can be measured, and not only its change.


# %%
def two_branches(a, b):
    """Energy of the sum of two normal curves, without constants."""
    return -np.logaddexp(-0.5 * a * a, -0.5 * b * b)


def wall(x):
    """Keeps the first coordinate between about -4 and 4."""
    return 0.5 * (np.maximum(np.abs(x[..., 0]) - 4, 0) / 0.4) ** 2


def ring_energy(x):
    """U_1 of Eq. (eq-flow-energies) at `x` (..., 2): (...)."""
    gaps = two_branches((x[..., 0] - 2) / 0.6, (x[..., 0] + 2) / 0.6)
    return 0.5 * ((np.linalg.norm(x, axis=-1) - 2) / 0.4) ** 2 + gaps


def above_wave(x):
    """The second coordinate, from the wave upwards."""
    return x[..., 1] - np.sin(0.5 * np.pi * x[..., 0])


def wave_energy(x):
    """U_2, likewise."""
    return 0.5 * (above_wave(x) / 0.4) ** 2 + wall(x)


def split_energy(x):
    """U_3, likewise."""
    y, gap = above_wave(x), 3 * np.exp(-0.5 * ((x[..., 0] - 1) / 0.6) ** 2)
    return two_branches(y / 0.35, (y + gap) / 0.35) + wall(x)


def fork_energy(x):
    """U_4, likewise."""
    y, gap = above_wave(x), 3 * expit((x[..., 0] - 1) / 0.3)
    return two_branches(y / 0.4, (y + gap) / 0.35) + wall(x)


ENERGIES = {"ring": ring_energy, "wave": wave_energy, "split": split_energy, "fork": fork_energy}


# %%
def plane(half_width, n):
    """Points of an n x n grid over a square around 0, (n, n, 2), and the area of a cell."""
    line = np.linspace(-half_width, half_width, n)
    return np.stack(np.meshgrid(line, line), axis=-1), (line[1] - line[0]) ** 2


def log_normaliser(energy):
    r"""$\log Z$ of an energy in the plane, by the trapezoidal rule."""
    points, cell = plane(8.0, 801)
    return logsumexp(-energy(points)) + np.log(cell)


def reverse_kl(flows, params, z, energy, warmth=1.0):
    r"""Eq. (eq-flow-reverse) at `z` (B, D) without $\log Z$, the energy times `warmth`: a mean."""
    x, log_abs_det = chain_transform(flows, params, z)
    return np.mean(base_log_prob(z) - log_abs_det + warmth * energy(x))


# %% [markdown]
# The data sets are three figures that no normal law resembles: two moons, three rings, two spirals.
# They too are usually given as programs that draw points, and then nobody knows how well a flow
# *could* do. Here each is a curve $\gamma(t)$, $t$ uniform on $(0, 1)$, blurred by normal noise of
# standard deviation 0.15, a continuous mixture of normal laws, so that the true density is an
# integral over one variable:
#
# $$ p(x) = \int_0^1 N\big(x;\, \gamma(t),\, 0.15^2 I\big)\, dt . $$ (eq-flow-curve)
#
# The distance from truth to flow is $\mathbb{E}_p[\log p(x) - \log q_T(x)] \ge 0$, in nats, and
# 0 is the best.


# %%
def moons(t):
    """Two half circles, one hanging, one standing: (..., 2) for `t` (...)."""
    angle, lower = 2 * np.pi * t, t >= 0.5  # from 0 to pi, from pi to 2 pi
    x = 1.6 * np.cos(angle) + np.where(lower, 0.8, -0.8)
    return np.stack([x, 1.6 * np.sin(angle) + np.where(lower, 0.4, -0.4)], axis=-1)


def rings(t):
    """Three circles of radii 0.8, 1.7 and 2.6, equally probable."""
    which = np.minimum(np.floor(3 * t), 2)
    radius = 0.8 + 0.9 * which
    angle = 2 * np.pi * (3 * t - which)
    return radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def spirals(t):
    """Two arms that wind outwards one and a half times."""
    sign, t = np.where(t < 0.5, 1, -1), np.where(t < 0.5, 2 * t, 2 * t - 1)
    angle = 3 * np.pi * np.sqrt(t)
    radius = sign * (0.2 + 2.6 * np.sqrt(t))
    return radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


CURVES = {"moons": moons, "rings": rings, "spirals": spirals}
BLUR = 0.15


def draw_near(curve, rng, n):
    """Points (n, 2) from the density (eq-flow-curve), float32."""
    return (curve(rng.random(n)) + BLUR * rng.standard_normal((n, 2))).astype(np.float32)


def true_log_prob(curve, x, n=600):
    """Log-density (eq-flow-curve) at `x` (B, 2), by the midpoint rule: (B,)."""
    x, middles = x.astype(np.float64), curve((np.arange(n) + 0.5) / n)
    squares = np.sum(x**2, axis=1)[:, None] - 2 * x @ middles.T + np.sum(middles**2, axis=1)
    return logsumexp(-0.5 * squares / BLUR**2, axis=1) - np.log(2 * np.pi * BLUR**2 * n)


# %% [markdown]
# ### The encoder
#
# Written for the convolutional VAE of Chapter 5, whose last hidden units give the context. The
# function has the signature that Chapter 11 expects of an approximate posterior. The logarithm of
# $q/p$ is returned coordinate by coordinate as well: averaged over images, the terms are one-sample
# estimates of shares that add up to the rate. Without a flow, a share is the divergence of one
# latent; with one step, of one latent given those before it; with more it is only a way to deal out
# the sum.

# %%
from chapters.ch05_vae import bernoulli_log_lik, conv_features, sample_latent


def flow_encoder_init(rng, encoder, steps, n_hidden, n_context):
    """The encoder of Chapter 5 with `steps` inverse autoregressive steps behind it: a dict."""
    n_units, d = encoder["loc"]["w"].shape
    flow = [
        {**made_init(rng, d, n_hidden), "from_context": dense_init(rng, n_context, n_hidden)}
        for _ in range(steps)
    ]
    return {**encoder, "context": dense_init(rng, n_units, n_context), "flow": flow}


def conditioned(params, h):
    """The flow step for the contexts `h` (B, C): its hidden biases differ from row to row."""
    return {**params, "context": dense(params["from_context"], h)}


def flow_posterior(encoder, x, noise):
    r"""Draw from the encoder with its flow, base to data, for images `x` (B, 1, H, W).

    For `noise` (..., B, d) it returns the latents (..., B, d), the log-ratio
    $\log q_\phi(z \mid x) - \log p(z)$ (..., B), and its terms, one per latent (..., B, d).
    """
    features = conv_features(encoder, x)
    loc, log_var = dense(encoder["loc"], features), dense(encoder["log_var"], features)
    h = np.tanh(dense(encoder["context"], features))
    z = sample_latent(loc, log_var, noise)  # Eq. (eq-flow-encoder)
    log_q = normal_log_prob(noise, 0.0, 1.0) - 0.5 * log_var
    for step in encoder["flow"]:
        z, log_gates = iaf_step(conditioned(step, h), z)
        log_q = log_q - log_gates  # Eq. (eq-flow-encoder-density)
        z, log_q = z[..., ::-1], log_q[..., ::-1]  # the last latent comes first now
    terms = log_q - normal_log_prob(z, 0.0, 1.0)
    return z, np.sum(terms, axis=-1), terms


def flow_log_weights(params, x, noise):
    """log p(x, z) - log q(z | x) of each sample, in nats, for noise (..., B, d): (..., B)."""
    z, log_ratio, _ = flow_posterior(params["encoder"], x, noise)
    return bernoulli_log_lik(params["decoder"], z, x) - log_ratio  # Eq. (eq-vae-a)


# %% [markdown]
# ## Checks
#
# The two planar steps first, by hand and with minigrad, for random cotangents.

# %%
from chapters.ch05_vae import conv_encode, conv_vae_init, elbo_sampled, recorded_conv_params
from minigrad import grad, jacobian, random, value_and_grad, vjp
from minigrad.check import check_density, check_grads, check_logdet, check_unbiased
from minigrad.special import ndtr, ndtri

FAMILIES = {
    "planar": planar,
    "radial": radial,
    "affine coupling": coupling,
    "spline coupling": spline_coupling,
    "masked autoregressive": masked_autoregressive,
    "inverse autoregressive": inverse_autoregressive,
}
every_family = pytest.mark.parametrize("name", FAMILIES)
MIXED = [*FAMILIES.values(), reverse, planar, spline_coupling, inverse_autoregressive]


def shaken(params, rng, by=0.4):
    """Parameters in float64, with noise added: nothing is near the identity any more."""
    return tree.map(lambda p: p + by * rng.standard_normal(p.shape), params)


def between_integers(rng, shape):
    """Half-integers around 0: in the middle of the bins of a spline that is near the identity."""
    return np.floor(1.5 * rng.standard_normal(shape)) + 0.5


def test_flow_gradient_by_hand_is_that_of_minigrad(record):
    rng = np.random.default_rng(0)
    gap = 0.0
    for D in (1, 2, 7):
        params, z = shaken(planar_init(rng, D), rng), rng.standard_normal((5, D))
        x_bar, log_abs_det_bar = rng.standard_normal((5, D)), rng.standard_normal(5)
        x, log_abs_det, by_hand = planar_by_hand(params, z)
        traced, pullback = vjp(planar_transform, params, z)
        pairs = [(traced, (x, log_abs_det))]
        pairs += [(pullback((x_bar, log_abs_det_bar)), by_hand(x_bar, log_abs_det_bar))]
        for a, b in pairs:
            gaps = tree.map(lambda p, q: np.max(np.abs(p - q)), a, b)
            gap = max(gap, *tree.leaves(gaps))
    record("largest difference between hand and engine, three dimensions", gap, limit=1e-12)
    assert gap < 1e-12


# %% [markdown]
# ### Determinants and inverses
#
# `check_logdet` finds the Jacobian by finite differences, takes its determinant, and compares; then
# it asks the inverse to undo the step. The inverse must also report the *same* log-determinant, and
# both ways must survive second-order gradient checks, the planar root included. (A spline has a
# continuous slope but kinks in its second derivative, so it is checked in the middle of bins.)


# %%
@claim("N2")
@every_family
def test_flow_determinant_is_that_of_the_jacobian_and_the_inverse_undoes(name, record):
    flow, worst = FAMILIES[name], 0.0
    for seed, D in enumerate((2, 3, 5)):
        rng = np.random.default_rng(seed)
        params = shaken(flow.init(rng, D), rng, by=0.05 if "spline" in name else 0.3)
        z = between_integers(rng, (20, D))
        transform, inverse = partial(flow.transform, params), partial(flow.inverse, params)
        error = check_logdet(transform, z, lambda x: inverse(x)[0])  # noqa: B023
        x, there = transform(z)
        back = inverse(x)[1]
        worst = max(worst, error, np.max(np.abs(there - back)))
        assert np.max(np.abs(there)) > 0.05 and np.max(np.abs(x - z)) > 0.05  # it does something
    record(f"{name}: largest error of log|det| and of the inverse, D = 2, 3, 5", worst, limit=1e-6)
    assert worst < 1e-6


@every_family
def test_flow_derivatives_pass_finite_differences_to_second_order(name):
    flow = FAMILIES[name]
    for seed, D in enumerate((2, 3)):
        rng = np.random.default_rng(seed)
        params = shaken(flow.init(rng, D), rng, by=0.05 if "spline" in name else 0.2)
        z = between_integers(rng, (6, D))
        x, _ = flow.transform(params, z)
        check_grads(flow.transform, (params, z))
        check_grads(flow.inverse, (params, x))


# %% [markdown]
# The costs in the table above can be counted: passes through the masked network, each way. And what
# a spline and a coupling promise at the ends of their range is easily missed by points drawn from
# the base: slopes that meet the identity at $\pm E$, bins and slopes that stay positive whatever
# the network returns, scales between $e^{-2}$ and $e^2$.


# %%
@pytest.mark.parametrize("name", ["masked autoregressive", "inverse autoregressive"])
def test_flow_passes_through_the_network_are_those_of_the_table(name, monkeypatch):
    params, z = made_init(np.random.default_rng(0), 5), np.ones((2, 5), np.float32)
    passes = []
    monkeypatch.setitem(globals(), "made", lambda p, y, made=made: passes.append(1) or made(p, y))
    FAMILIES[name].transform(params, z)
    forth = len(passes)
    FAMILIES[name].inverse(params, z)
    found = forth, len(passes) - forth
    assert found == ((5, 1) if name == "masked autoregressive" else (1, 5))


@every_family
def test_flow_starts_near_the_identity_and_stays_in_float32(name):
    flow, rng = FAMILIES[name], np.random.default_rng(1)
    params = flow.init(rng, 4)
    z = rng.standard_normal((50, 4)).astype(np.float32)
    both = flow.transform(params, z), flow.inverse(params, z)
    assert all(part.dtype == np.float32 for pair in both for part in pair)
    if name not in ("planar", "radial"):  # these two start anywhere
        assert np.max(np.abs(both[0][0] - z)) < 0.13 * np.max(np.abs(z))
        assert np.max(np.abs(both[0][1])) < 4 * 0.13  # a gate of logit 2 is log(1 + e^-2) = 0.127


def test_flow_spline_joins_the_identity_and_survives_any_network():
    rng = np.random.default_rng(2)
    raw = rng.standard_normal((40, 3 * BINS - 1))
    for end in (-EDGE, EDGE):
        x, log_slope = spline(raw, np.full((40, 1), end * (1 - 1e-9)))
        np.testing.assert_allclose(x, end, atol=1e-6)
        np.testing.assert_allclose(log_slope, 0.0, atol=1e-3)  # no kink at the edge
    z = rng.uniform(-2 * EDGE, 2 * EDGE, (40, 1))
    np.testing.assert_allclose(spline(0 * raw, z)[0], z, atol=5e-3)
    outside = EDGE + np.abs(z)
    with np.errstate(invalid="raise"):  # nothing to be thrown away later either
        for f in (spline, spline_inverse):
            check_grads(lambda raw, z: f(raw, z), (raw, outside * np.sign(z)))  # noqa: B023
    extreme = 60 * raw
    x, there = spline(extreme, z)
    back, again = spline_inverse(extreme, x)
    np.testing.assert_allclose(back, z, atol=1e-6)
    np.testing.assert_allclose(again, there, rtol=1e-4, atol=1e-4)
    single = rng.uniform(-EDGE, EDGE, (4000, 1)).astype(np.float32)
    wild = 20 * rng.standard_normal((4000, 3 * BINS - 1)).astype(np.float32)
    for undone in (spline_inverse(wild, single), spline(wild, single)):  # no roots below zero
        assert np.all(np.abs(undone[0]) <= 1.0001 * EDGE) and np.all(np.isfinite(undone[1]))
    line = np.linspace(-EDGE, EDGE, 2001)[:, None]
    assert np.all(np.diff(spline(np.tile(extreme[:1], (2001, 1)), line)[0][:, 0]) > 0)


def test_flow_reverse_turns_the_order_and_the_context_is_a_hidden_bias():
    rng = np.random.default_rng(34)
    z = rng.standard_normal((6, 4))
    np.testing.assert_array_equal(reverse.transform({}, z)[0], z[:, [3, 2, 1, 0]])
    params, h = shaken(made_init(rng, 4), rng), rng.standard_normal(WIDTH)
    biased = {**params, "hidden": {**params["hidden"], "b": params["hidden"]["b"] + h}}
    for a, b in zip(made({**params, "context": np.tile(h, (6, 1))}, z), made(biased, z)):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_flow_gate_lets_through_the_old_or_the_new():
    rng = np.random.default_rng(3)
    params, z = shaken(made_init(rng, 4), rng), rng.standard_normal((6, 4))
    for bias, expected in ((40.0, z), (-40.0, made(params, z)[0])):
        gate = {"w": 0 * params["s"]["w"], "b": np.full(4, bias)}
        np.testing.assert_allclose(iaf_transform({**params, "s": gate}, z)[0], expected, atol=1e-12)


def test_flow_scales_of_couplings_have_their_bounds():
    outputs = np.array([[-1e3, 0.0], [-0.01, 0.0], [0.01, 0.0], [1e3, 0.0]])
    x, s = affine(outputs, np.ones((4, 1)))
    np.testing.assert_allclose(s[:, 0], [-2, -0.01, 0.01, 2], rtol=1e-4)
    np.testing.assert_allclose(x, np.exp(s), rtol=1e-12)


# %% [markdown]
# ### Compositions
#
# Ten steps of all kinds in a row. The numeric determinant of the whole is compared with the sum
# that {eq}`eq-flow-chain` forms, and so is the sum of the numeric determinants of the single steps,
# each at its own point.


# %%
@claim("N1")
def test_flow_log_density_is_the_base_minus_the_sum_of_log_determinants(record):
    rng = np.random.default_rng(1)
    params = shaken(chain_init(MIXED, rng, 3), rng, by=0.2)
    z = rng.standard_normal((10, 3))
    transform = lambda z: chain_transform(MIXED, params, z)
    whole = check_logdet(transform, z, lambda x: chain_inverse(MIXED, params, x)[0])
    x, _ = transform(z)
    total, point = 0.0, z
    for flow, p in zip(MIXED, params):
        each = [jacobian(lambda y: flow.transform(p, y)[0])(row) for row in point]  # noqa: B023
        total = total + np.linalg.slogdet(np.array(each))[1]
        point = flow.transform(p, point)[0]
    apart = np.max(np.abs(log_prob(MIXED, params, x) - (base_log_prob(z) - total)))
    record("log|det| of ten steps of six kinds against the numeric Jacobian", whole, limit=1e-6)
    record("log-density against base minus the sum over steps, nats", apart, limit=1e-9)
    assert apart < 1e-9


# %% [markdown]
# ### Densities integrate to one
#
# Over the plane, by the trapezoidal rule, which is exact to rounding for smooth densities that
# vanish at the edge. A radial step has a cusp at its centre and a spline has kinks, so there the
# rule is only good to a few digits on an affordable grid. A coupling leaves the first coordinate
# alone, so for each value of it the density of the other one must integrate to
# one by itself. In one dimension, samples are compared with the density too.


# %%
def mass(flows, params, half_width=12.0, n=401):
    """Integral over the plane of the density of a composition."""
    points, cell = plane(half_width, n)
    return cell * np.sum(np.exp(log_prob(flows, params, points.reshape(-1, 2))))


@claim("N2")
@every_family
def test_flow_density_integrates_to_one(name, record):
    rng = np.random.default_rng(3)
    flow = FAMILIES[name]
    params = shaken(flow.init(rng, 2), rng, by=0.2)
    limit = {"radial": 1e-5, "spline coupling": 1e-3}.get(name, 1e-9)
    error = abs(mass([flow], [params]) - 1)
    record(f"{name}: mass of the density minus 1, plane, trapezoidal rule", error, limit=limit)
    assert error < limit
    if "coupling" in name:
        x2 = np.linspace(-12, 12, 100_001)  # fine enough for the kinks of a spline
        both = np.stack([np.full_like(x2, 0.3), x2], axis=-1)
        given = np.exp(log_prob([flow], [params], both) - normal_log_prob(0.3, 0.0, 1.0))
        error = abs(np.trapezoid(given, x2) - 1)
        assert error < 1e-6
        record(f"{name}: the same for x2 given x1 = 0.3, fine grid", error, limit=1e-6)


@claim("N2")
def test_flow_density_of_a_composition_integrates_to_one(record):
    rng = np.random.default_rng(4)
    params = shaken(chain_init(MIXED, rng, 2), rng, by=0.15)
    error = abs(mass(MIXED, params, n=301) - 1)
    record("ten steps of six kinds: mass of the density minus 1", error, limit=1e-3)
    assert error < 1e-3


def test_flow_samples_follow_the_density():
    rng = np.random.default_rng(5)
    flows = [planar, radial, masked_autoregressive, planar, inverse_autoregressive]
    params = shaken(chain_init(flows, rng, 1), rng)
    x, _ = chain_transform(flows, params, rng.standard_normal((20_000, 1)))
    check_density(
        lambda x: log_prob(flows, params, x[..., None]), (-np.inf, np.inf), samples=x[:, 0]
    )


# %% [markdown]
# ### Masks
#
# The Jacobian of a masked network must be strictly lower triangular, and *full* below the
# diagonal: a network of zeros would be triangular too.


# %%
def made_jacobian(D, rng):
    """Largest |derivative| of each output of a masked network in each input: (D, D)."""
    params, y = shaken(made_init(rng, D), rng), rng.standard_normal((4, D))
    each = [jacobian(lambda row: np.stack(made(params, row)))(row) for row in y]
    return np.max(np.abs(each), axis=(0, 1))


def test_flow_masked_network_sees_what_comes_before_and_all_of_it(record):
    for D in (2, 3, 8):
        found = made_jacobian(D, np.random.default_rng(D))
        assert np.all(found[np.triu_indices(D)] == 0)
        assert np.min(found[np.tril_indices(D, -1)]) > 1e-3
    record("smallest derivative below the diagonal, D = 8", np.min(found[np.tril_indices(8, -1)]))


def test_flow_slow_direction_is_exact_after_as_many_passes_as_coordinates():
    rng = np.random.default_rng(6)
    params, z = shaken(made_init(rng, 4), rng), rng.standard_normal((3, 4))
    x = np.zeros_like(z)
    for _ in range(4):
        m, s = made(params, x)
        before, x = x, np.exp(s) * z + m
    assert np.max(np.abs(x - before)) > 1e-3  # three passes are not enough
    m, s = made(params, x)
    np.testing.assert_array_equal(np.exp(s) * z + m, x)  # a fifth changes nothing


# %% [markdown]
# ### Targets
#
# The normalisers must not depend on the grid; without the wall they would grow with the frame. The
# three true densities must integrate to one, and their midpoint rule must have converged.


# %%
def test_flow_energies_of_waves_need_the_wall(record):
    points, cell = plane(8.0, 401)
    frames = [np.abs(points[..., 0]) < half for half in (3, 6)]
    for name, energy in ENERGIES.items():
        coarse = logsumexp(-energy(points)) + np.log(cell)
        assert coarse == pytest.approx(log_normaliser(energy), abs=1e-3)
        if name == "ring":
            continue
        narrow, wide = (
            cell * np.sum(np.exp(-(energy(points) - wall(points))[frame])) for frame in frames
        )
        record(f"{name}, as printed: mass in a frame twice as wide, ratio", wide / narrow)
        assert wide / narrow > 1.8


def test_flow_energies_have_their_values_by_hand():
    x = np.array([[0.0, 2.0], [1.0, 1.0], [1.0, -2.0], [-1.0, -1.0], [5.0, 1.0]])
    low = lambda a, b: -np.log(np.exp(-0.5 * a**2) + np.exp(-0.5 * b**2))
    half = (2**0.5 - 2) / 0.4  # (1, 1) and (-1, -1) lie inside the ring
    sides = 0.5 * half**2 + low(1 / 0.6, 5.0)  # one to the left, one to the right: alike
    np.testing.assert_allclose(ring_energy(x)[[0, 1, 3]], [low(2 / 0.6, 2 / 0.6), sides, sides])
    np.testing.assert_allclose(wave_energy(x), [12.5, 0, 28.125, 0, 3.125], atol=1e-9)
    split = [low(0, 3 / 0.35), low(3 / 0.35, 0), low(0, 3 * np.exp(-4 / 0.72) / 0.35)]
    np.testing.assert_allclose(split_energy(x)[1:4], split, atol=1e-9)
    rise = 3 / (1 + np.exp(10 / 3))  # of the other branch, at x1 = 0
    fork = [low(5.0, (2 + rise) / 0.35), low(0, 1.5 / 0.35), low(7.5, 1.5 / 0.35)]
    np.testing.assert_allclose(fork_energy(x)[:3], fork, atol=1e-9)


@pytest.mark.parametrize("name", CURVES)
def test_flow_true_densities_integrate_to_one(name):
    points, cell = plane(4.5, 121)
    flat = points.reshape(-1, 2)
    assert cell * np.sum(np.exp(true_log_prob(CURVES[name], flat))) == pytest.approx(1, abs=1e-4)
    x = draw_near(CURVES[name], np.random.default_rng(7), 500)
    gap = true_log_prob(CURVES[name], x) - true_log_prob(CURVES[name], x, n=2400)
    assert abs(np.mean(gap)) < 1e-3 and np.max(np.abs(gap)) < 0.05  # the latter beyond the ends


# %% [markdown]
# The points must come from the density that they are said to come from. A curve for which all is
# known is the segment from $(0, 0)$ to $(1, 0)$. And the objective of the
# reverse direction is compared with an integral over the plane. Its noise here is a regular grid in
# the unit square, sent through $\Phi^{-1}$.


# %%
def test_flow_points_and_density_near_a_segment_are_the_known_ones():
    segment = lambda t: np.stack([t, 0 * t], axis=-1)
    x = draw_near(segment, np.random.default_rng(24), 60_000)
    assert x.dtype == np.float32
    pairs = np.stack([x[:, 0], x[:, 0] ** 2, x[:, 1] ** 2 / BLUR**2, x[:, 0] * x[:, 1] / BLUR], -1)
    check_unbiased(pairs, np.array([0.5, 1 / 3 + BLUR**2, 1.0, 0.0]))
    along, across = x[:500].T.astype(np.float64)
    exact = np.log(ndtr((1 - along) / BLUR) - ndtr(-along / BLUR))
    exact = exact + normal_log_prob(across, 0.0, BLUR)
    np.testing.assert_allclose(true_log_prob(segment, x[:500]), exact, atol=1e-3)


@pytest.mark.parametrize(("name", "warmth"), [("ring", 1.0), ("wave", 0.3)])
def test_flow_reverse_objective_is_the_integral_over_the_plane(name, warmth):
    rng, energy = np.random.default_rng(25), ENERGIES[name]
    flows = [planar, masked_autoregressive, reverse]
    params = shaken(chain_init(flows, rng, 2), rng, by=0.2)
    z = ndtri((np.stack(np.meshgrid(*2 * [np.arange(80)]), axis=-1) + 0.5) / 80).reshape(-1, 2)
    points, cell = plane(10.0, 161)
    log_q = log_prob(flows, params, points)
    exact = cell * np.sum(np.exp(log_q) * (log_q + warmth * energy(points)))
    assert reverse_kl(flows, params, z, energy, warmth) == pytest.approx(exact, abs=0.1)
    assert np.mean(chain_transform(flows, params, z)[1]) > 0.3  # what the limit would notice
    check_grads(lambda p: reverse_kl(flows, p, z[::499], energy, warmth), (params,), order=1)


# %% [markdown]
# ### Training in seconds
#
# The least that a flow must beat is a normal law with the best mean and covariance. Four spline
# couplings, a few hundred steps, two moons:


# %%
from minigrad.optim import adam, cosine_decay, sgd
from minigrad.train import descent, fit


def likelihood_step(flows, curve, optimizer, batch):
    """A step up the mean of Eq. (eq-flow-likelihood) at points near a curve, for `fit`."""

    def negative(params, rng):
        return -np.mean(log_prob(flows, params, draw_near(curve, rng, batch)))

    return descent(negative, optimizer)


def distance_from_truth(flows, params, curve, x):
    """Estimates E_p[log p - log q] from points `x` of the density near a curve: mean, error."""
    gaps = true_log_prob(curve, x) - log_prob(flows, params, x).astype(np.float64)
    return np.mean(gaps), np.std(gaps) / np.sqrt(len(gaps))


def test_flow_likelihood_step_goes_down_its_gradient_at_fresh_points():
    flows, rng = [coupling, reverse, planar], np.random.default_rng(26)
    params, optimizer = shaken(chain_init(flows, rng, 2), rng), sgd(1e-7)
    state = {"params": params, "optimizer": optimizer.init(params)}
    step = likelihood_step(flows, moons, optimizer, 64)
    for seed in (1, 2):
        new, metrics = step(state, np.random.default_rng(seed))
        x = draw_near(moons, np.random.default_rng(seed), 64)
        old_loss, new_loss = (-np.mean(log_prob(flows, s["params"], x)) for s in (state, new))
        assert metrics["loss"] == pytest.approx(old_loss, rel=1e-12)
        moved = tree.map(lambda p, q: np.sum((p - q) ** 2), params, new["params"])
        # steps of size rate * gradient: the loss falls by |step|^2 / rate
        assert old_loss - new_loss == pytest.approx(sum(tree.leaves(moved)) / 1e-7, rel=0.01)


def test_flow_distance_of_the_base_is_known_and_its_error_shrinks():
    points, cell = plane(4.5, 81)
    flat = points.reshape(-1, 2)
    log_p = true_log_prob(moons, flat)
    exact = cell * np.sum(np.exp(log_p) * (log_p - base_log_prob(flat)))
    x = draw_near(moons, np.random.default_rng(27), 8000)
    parts = [distance_from_truth([], [], moons, part) for part in x.reshape(40, 200, 2)]
    means, errors = np.array(parts).T
    assert np.mean(errors) == pytest.approx(np.std(means, ddof=1), rel=0.4)
    assert abs(np.mean(means) - exact) < 4 * np.mean(errors) / np.sqrt(40) < 0.1 * exact


def test_flow_of_splines_beats_the_best_normal_law_in_seconds(record):
    flows, rng = 4 * [spline_coupling, reverse], np.random.default_rng(8)
    params, optimizer = chain_init(flows, rng, 2), adam(cosine_decay(1e-2, 250))
    state = {"params": params, "optimizer": optimizer.init(params)}
    step = likelihood_step(flows, moons, optimizer, 128)
    state, _ = fit(step, state, 250, rng, progress=False)
    x = draw_near(moons, np.random.default_rng(9), 4000)
    distance, error = distance_from_truth(flows, state["params"], moons, x)
    covariance = np.cov(x.astype(np.float64).T)
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    normal = np.mean(true_log_prob(moons, x)) + entropy
    record("two moons: distance from truth, best normal law, nats", normal)
    record("the same, four spline couplings, 250 steps", distance, limit=normal - 0.5)
    assert -4 * error < distance < normal - 0.5


# %% [markdown]
# ### The encoder
#
# The density that the encoder states for its sample is checked like that of any other flow: as a
# map from noise to latents, image by image. The gradients are checked where everything is smooth,
# in the heads, the contexts and the flow.


# %%
def small_flow_encoder(rng, steps=4, d=3):
    """A shaken encoder in float64 for 8 x 8 images, its decoder, and five images."""
    params = conv_vae_init(rng, 8, 4, 1, d, np.float64)
    encoder = flow_encoder_init(rng, params["encoder"], steps, 16, 5)
    x = rng.integers(0, 2, (5, 1, 8, 8)).astype(float)
    return shaken(encoder, rng, by=0.2), params["decoder"], x


def test_flow_encoder_states_the_density_of_its_sample(record):
    rng = np.random.default_rng(10)
    encoder, _, x = small_flow_encoder(rng)
    noise = rng.standard_normal((5, 3))

    def transform(noise):
        z, log_ratio, _ = flow_posterior(encoder, x, noise)
        return z, base_log_prob(noise) - (log_ratio + base_log_prob(z))

    error = check_logdet(transform, noise)
    record("encoder with four steps: error of log|det|, noise to latents", error, limit=1e-6)
    several = rng.standard_normal((7, 5, 3))
    z, log_ratio, terms = flow_posterior(encoder, x, several)
    np.testing.assert_allclose(z[2], flow_posterior(encoder, x, several[2])[0], rtol=1e-12)
    np.testing.assert_allclose(np.sum(terms, axis=-1), log_ratio, rtol=1e-12)


def test_flow_encoder_derivatives_pass_finite_differences():
    rng = np.random.default_rng(11)
    encoder, _, x = small_flow_encoder(rng, steps=2)
    noise = rng.standard_normal((5, 3))
    smooth = {name: encoder[name] for name in ("loc", "log_var", "context", "flow")}
    check_grads(lambda part: flow_posterior({**encoder, **part}, x, noise)[:2], (smooth,))


def test_flow_encoder_without_steps_is_the_encoder_of_chapter_5():
    rng = np.random.default_rng(12)
    encoder, decoder, x = small_flow_encoder(rng, steps=0)
    noise = rng.standard_normal((5, 3))
    weights = flow_log_weights({"encoder": encoder, "decoder": decoder}, x, noise)
    params = {"encoder": encoder, "decoder": decoder}
    plain = elbo_sampled(params, x, noise, encode=conv_encode, log_lik=bernoulli_log_lik)
    np.testing.assert_allclose(weights, plain, rtol=1e-12)


# %% [markdown]
# A density can be right and belong to the wrong image, or be learnt from half of its gradient. So:
# every image alone gives what it gives in a batch, samples do not mix, the context is
# heard, every latent comes to depend on every noise, and the gradient of the objective in *all*
# parameters, convolutions and decoder included, is that of a difference quotient. (Small steps in
# float64 rarely cross the kinks of the rectifiers.)


# %%
def test_flow_encoder_treats_every_image_and_sample_alone():
    rng = np.random.default_rng(28)
    encoder, decoder, x = small_flow_encoder(rng)
    params, noise = {"encoder": encoder, "decoder": decoder}, rng.standard_normal((4, 5, 3))
    outputs = lambda *args: (*flow_posterior(encoder, *args), flow_log_weights(params, *args))
    together = outputs(x, noise)
    for i in range(5):
        image, draws = x[i : i + 1], noise[:, i : i + 1]
        for k in (slice(0, 4), slice(2, 3)):
            for a, b in zip(together, outputs(image, draws[k]), strict=True):
                np.testing.assert_allclose(a[k, i : i + 1], b, rtol=1e-10)


def test_flow_encoder_hears_the_context_and_mixes_all_latents():
    rng = np.random.default_rng(29)
    encoder, _, x = small_flow_encoder(rng, steps=2)
    noise = rng.standard_normal((5, 3))
    z, log_ratio, _ = flow_posterior(encoder, x, noise)
    deaf = {**encoder, "context": tree.map(np.zeros_like, encoder["context"])}
    z_deaf, log_ratio_deaf, _ = flow_posterior(deaf, x, noise)
    assert np.all(np.abs(z - z_deaf)[:, -1] > 1e-4) and np.all(log_ratio != log_ratio_deaf)
    for steps, full in ((1, False), (2, True)):
        part = {**encoder, "flow": encoder["flow"][:steps]}
        J = jacobian(lambda e: flow_posterior(part, x[:1], e[None])[0][0])(noise[0])  # noqa: B023
        assert np.all(J != 0) == full


def test_flow_encoder_terms_belong_to_their_latents():
    rng = np.random.default_rng(30)
    encoder, _, x = small_flow_encoder(rng, steps=3)
    for step in encoder["flow"]:  # constant gates and shifts: independent normal latents
        for head in ("m", "s"):
            step[head]["w"] = np.zeros_like(step[head]["w"])
    noise = np.stack([np.zeros((5, 3)), np.ones((5, 3)), rng.standard_normal((5, 3))])
    z, _, terms = flow_posterior(encoder, x, noise)
    loc, scale = z[0], np.abs(z[1] - z[0])
    exact = normal_log_prob(z, loc, scale) - normal_log_prob(z, 0.0, 1.0)
    np.testing.assert_allclose(terms[2], exact[2], rtol=1e-9)


def test_flow_encoder_gradient_of_the_objective_reaches_every_parameter():
    rng = np.random.default_rng(31)
    encoder, decoder, x = small_flow_encoder(rng, steps=2)
    params, noise = {"encoder": encoder, "decoder": decoder}, rng.standard_normal((2, 5, 3))
    objective = lambda p: np.mean(flow_log_weights(p, x, noise))
    slopes = grad(objective)(params)
    assert all(np.any(g != 0) for g in tree.leaves(slopes))
    for part in params:
        still = tree.map(np.zeros_like, params)
        v = {**still, part: tree.map(lambda p: rng.standard_normal(p.shape), params[part])}
        shifted = (tree.map(lambda p, d, h=h: p + h * d, params, v) for h in (1e-6, -1e-6))
        moved = [objective(p) for p in shifted]
        along = sum(np.sum(g * d) for g, d in zip(tree.leaves(slopes), tree.leaves(v)))
        assert along == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5)


def test_flow_encoder_starts_with_its_own_draw_for_each_step():
    params = conv_vae_init(np.random.default_rng(32), 8, 4, 1, 3)
    before = list(params["encoder"])
    encoder = flow_encoder_init(np.random.default_rng(33), params["encoder"], 3, 16, 5)
    assert list(params["encoder"]) == before and len(encoder["flow"]) == 3
    for layer in ("hidden", "from_context", "m", "s"):
        first, second, third = (step[layer]["w"] for step in encoder["flow"])
        assert not (np.array_equal(first, second) or np.array_equal(second, third))


# %% [markdown]
# ## What goes wrong
#
# **The determinant without its bars.** Turn the plane over along one axis and stretch it:
# $x = (-2 z_1, z_2)$. The determinant is $-2$. As printed, the formula takes the logarithm of
# it; taken as a density, it integrates to $-1$. The other slip: an index that does not move with
# the sum, so that the last determinant is counted $T$ times.


# %%
@claim("E8")
def test_flow_a_reflection_breaks_the_formula_without_the_absolute_value(record):
    A = np.diag([-2.0, 1.0])
    points, cell = plane(16.0, 401)
    base = np.exp(base_log_prob(points @ np.linalg.inv(A).T))
    printed = cell * np.sum(base / np.linalg.det(A))
    repaired = cell * np.sum(base / np.abs(np.linalg.det(A)))
    record("reflection: integral of the density without the absolute value", printed)
    record("with it: error of the integral", abs(repaired - 1), limit=1e-9)
    assert printed == pytest.approx(-1, abs=1e-9) and repaired == pytest.approx(1, abs=1e-9)
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.log(np.linalg.det(A)))


@claim("E8")
def test_flow_mixed_indices_do_not_give_a_density(record):
    rng = np.random.default_rng(13)
    flows = [planar, planar, planar]
    params = shaken(chain_init(flows, rng, 2), rng, by=0.5)
    points, cell = plane(12.0, 201)
    z, _ = chain_inverse(flows, params, points)
    last = planar_inverse(params[-1], points)[1]  # log|det| of step T, at its own point
    mixed = cell * np.sum(np.exp(base_log_prob(z) - len(flows) * last))
    record("the last determinant in place of each: integral over the plane", mixed)
    assert abs(mixed - 1) > 0.05 and abs(mass(flows, params) - 1) < 1e-6


# %% [markdown]
# **The sign.** Some libraries count log-determinants from data to base. Add where one should
# subtract, and training still runs, up an objective that rewards collapse: the data, sent to the
# base, shrink to the point of its peak. A test that
# compares the two directions of a step with each other passes, if both have the wrong sign. The
# numeric determinant does not, and neither does the integral.


# %%
def test_flow_wrong_sign_is_rejected_by_determinant_and_integral():
    rng = np.random.default_rng(14)
    params = shaken(planar_init(rng, 2), rng)

    def wrong(params, z):
        x, log_abs_det = planar_transform(params, z)
        return x, -log_abs_det

    def wrong_inverse(params, x):
        z, log_abs_det = planar_inverse(params, x)
        return z, -log_abs_det

    z = rng.standard_normal((5, 2))
    x, there = wrong(params, z)
    np.testing.assert_allclose(there, wrong_inverse(params, x)[1])  # the weak test passes
    with pytest.raises(AssertionError, match="wrong log"):
        check_logdet(lambda z: wrong(params, z), z)
    assert abs(mass([Flow(planar_init, wrong, wrong_inverse)], [params]) - 1) > 0.05


# %% [markdown]
# **A mask that is off by one.** With $n_k \le i$ in {eq}`eq-flow-made` output $i$ sees its own
# input. Nothing fails: shapes fit, the loss falls. But the Jacobian has more on its diagonal than
# the formula knows of, and the $D$ passes of the slow direction end elsewhere.


# %%
def test_flow_leaking_mask_is_rejected(monkeypatch):
    def leaking(D, n_hidden):
        inputs, hidden = np.arange(1, D + 1), np.arange(n_hidden) % D
        return inputs[:, None] <= hidden, hidden[:, None] <= inputs

    rng = np.random.default_rng(15)
    params, z = shaken(made_init(rng, 3), rng), rng.standard_normal((5, 3))
    monkeypatch.setitem(globals(), "made_masks", leaking)
    assert np.any(made_jacobian(3, rng)[np.triu_indices(3)] != 0)
    for flow in (masked_autoregressive, inverse_autoregressive):
        with pytest.raises(AssertionError):
            check_logdet(
                lambda z, flow=flow: flow.transform(params, z),
                z,
                lambda x, flow=flow: flow.inverse(params, x)[0],
            )


# %% [markdown]
# **A planar step with a free direction.** Use $u$ where {eq}`eq-flow-planar-free` has $\hat u$,
# with $w^\top u = -2$. Then {eq}`eq-flow-planar-line` is no longer monotone: three points of a line
# have one image. The formula takes one of them and forgets the others.


# %%
def test_flow_planar_step_with_a_free_direction_folds_the_plane():
    w, u = np.array([1.0, 0.0]), np.array([-2.0, 0.5])
    y = 1.9150080481545375  # y = 2 tanh(y)
    z = np.array([[-y, 0.25 * y], [0.0, 0.0], [y, -0.25 * y]])
    folded = z + np.tanh(z @ w)[:, None] * u
    np.testing.assert_allclose(folded, 0.0, atol=1e-12)
    x, _ = planar_transform({"u": u, "w": w, "b": np.zeros(())}, z)
    assert np.all(np.diff(x[:, 0]) > 0.1)
    # The density at their image is the sum over all three points; one alone is too little.
    det = np.abs(1 - 2 * (1 - np.tanh(z @ w) ** 2))
    each = np.exp(base_log_prob(z)) / det
    assert np.sum(each) > 1.3 * each[1]


# %% [markdown]
# ## Results
#
# ### Energies
#
# Compositions of 2, 8 and 32 planar steps are trained on each of the four energies
# ({numref}`fig-energies`). In the first half of the 2,000 steps the energy has a factor, `warmth`
# above, that rises from 0.05 to 1, so that a flow sees all of the target before it settles on a
# part of it. The number below each picture is the divergence itself, from draws of
# the flow and the normaliser by quadrature; the test repeats one length by quadrature alone, from
# the recorded parameters. The reverse divergence punishes mass where the target has none, and
# hardly the other way round (Chapter 2). On the fork this is plain to see: below the line
# $x_2 = -1.5$ the target has 17 % of its mass, eight steps put 2 % there and 32 steps 12 %.

# %%
from chapters import records


def recorded(run, name, flows):
    """Parameters of the composition `name` of a run in the plane, from its record."""
    like = chain_init(flows, np.random.default_rng(0), 2)
    leaves = [run["arrays"][f"{name}/{path}"] for path in tree.paths(like)]
    return tree.unflatten(tree.flatten(like)[1], leaves)


def test_flow_longer_compositions_come_closer_to_the_energies(record):
    scalars = records.load("flow_energies")["scalars"]
    for name in ENERGIES:
        found = [scalars[f"kl_{name}_{length}"] for length in (2, 8, 32)]
        for length, value in zip((2, 8, 32), found):
            record(f"{name}: KL from {length} planar steps to the target, nats", value)
        assert found[0] > found[1] > found[2] > 0
        assert found[2] < 0.3 * found[0]


def test_flow_recorded_divergences_are_those_of_the_recorded_parameters():
    run = records.load("flow_energies")
    points, cell = plane(8.0, 161)
    for name, energy in ENERGIES.items():
        flows = 8 * [planar]
        params = recorded(run, f"{name}_8", flows)
        log_q = log_prob(flows, params, points)
        log_ratio = log_q + energy(points) + log_normaliser(energy)
        kl = cell * np.sum(np.exp(log_q) * log_ratio)  # by quadrature, where the run drew samples
        assert kl == pytest.approx(run["scalars"][f"kl_{name}_8"], abs=0.03)


def test_flow_of_eight_steps_leaves_out_a_branch_of_the_fork(record):
    points, cell = plane(8.0, 161)
    low = points[..., 1] < -1.5
    target = cell * np.sum(np.exp(-fork_energy(points) - log_normaliser(fork_energy))[low])
    run = records.load("flow_energies")
    shares = {
        n: cell
        * np.sum(
            np.exp(log_prob(n * [planar], recorded(run, f"fork_{n}", n * [planar]), points[low]))
        )
        for n in (8, 32)
    }
    record("fork: mass of the target on the lower branch, below -1.5", target)
    for n, share in shares.items():
        record(f"fork: the same, {n} planar steps", share)
    assert target == pytest.approx(0.17, abs=0.01)
    assert shares[8] < 0.03 < 0.1 < shares[32] < target


# %% [markdown]
# ### Points
#
# Affine couplings, spline couplings and masked autoregressive steps are fitted to fresh points of
# the three densities by maximum likelihood ({numref}`fig-curves`). Fresh points at every step mean
# that nothing can be learnt by heart: what is left between a flow and the truth is the shape that
# its steps cannot make, or have not learnt in these 1,500 steps. The splines are the nearest in all
# three cases. On the rings the two affine families are still all but normal laws: 0.51 and 0.53
# nats away, where the best normal law is 0.53 away. One affine map per coordinate and step
# has a long way to go from a disc to three rings. {numref}`fig-step-by-step` takes one of the flows
# apart, and {numref}`fig-warped-grids` shows what a single step of each kind can do.

# %%
FLOWS = {
    "coupling": 8 * [coupling, reverse],
    "spline": 4 * [spline_coupling, reverse],
    "autoregressive": 4 * [masked_autoregressive, reverse],
}


def test_flow_families_fitted_to_points_beat_the_best_normal_law(record):
    scalars = records.load("flow_curves")["scalars"]
    for name in CURVES:
        normal = scalars[f"distance_{name}_normal"]
        record(f"{name}: distance from truth, best normal law, nats", normal)
        for family in FLOWS:
            distance = scalars[f"distance_{name}_{family}"]
            record(f"{name}: the same, {family}", distance, limit=normal)
            assert -4 * scalars[f"error_{name}_{family}"] < distance < normal
            if family != "spline":  # the nearest, by more than four standard errors
                error = scalars[f"error_{name}_{family}"]
                assert scalars[f"distance_{name}_spline"] < distance - 4 * error
        assert scalars[f"distance_{name}_spline"] < 0.6 * normal


# %% [markdown]
# ### The VAE with a flow in its encoder
#
# Pairs of convolutional VAEs start with the same convolutions and see the same images and noise;
# one of each pair has eight inverse autoregressive steps in its encoder
# ({numref}`fig-flow-encoder`). Two questions must be kept apart. The ELBO may rise because the
# bound got tighter; the likelihood rises only if the *model* got better. The estimate $\hat L_M$ of
# Chapter 6, too, is a bound in the mean, and a better $q$ raises it for one and the same model. So
# it is taken at $M = 1{,}000$ and at $M = 10{,}000$, as a difference within each pair: if the gain
# shrank from the one to the other, part of it would be the bound's.
#
# On digits the flow raises the test ELBO by 0.38 nats (standard error over five pairs: 0.04), and
# $\hat L_M$ at $M = 1{,}000$ by 0.24 (0.03): a third of the ELBO's gain was the bound's alone. On
# the 50 images for which 10,000 samples were drawn, the gain is 0.25 at $M = 1{,}000$ and 0.24 at
# $M = 10{,}000$, both with a standard error of 0.04. It does not shrink noticeably: so far as ten
# times the samples can tell, the model itself got better. Both models were trained for 1,500 steps
# only, and in the curves the lead of the flow is larger half-way than at the end. (The claim about
# the marginal likelihood is Chapter 11's.)
#
# On binarised MNIST one pair was trained, 12,000 steps of 100 images, seed 0, in 3,403 s for both.
# On 1,000 random test images $\hat L_M$ at $M = 1{,}000$ is $-93.3$ nats without the flow and
# $-91.3$ with it; image by image the gain is 2.02 nats with a standard error of 0.09. One pair says
# nothing of how much another start would change. On the 100 images with 10,000 samples the gain is
# 1.70 (0.30), against 1.81 at $M = 1{,}000$.
# A published convolutional autoencoder has a bound of $-87.41$ nats on this binarisation
# {cite}`gulrajani2017pixelvae`. Ours have 16 channels and saw each training image 24 times; a
# bigger run would need more of both.
#
# What the bound alone can gain is seen if the model is held fixed. Below, two flow steps are put
# behind the *trained* encoder of Chapter 5, and nothing but them is trained, for three seconds: the
# same decoder, the same likelihood, and an ELBO that is higher by 0.05 nats, a sixth of the
# approximation gap that Chapter 5 found.


# %%
def test_flow_in_the_encoder_raises_the_bound_on_digits(record):
    run = records.load("flow_vae_digits")
    curves, scalars = run["curves"], run["scalars"]
    readings = {
        "test ELBO": lambda kind, i: curves[f"test_elbo_{kind}_{i}"]["values"][-1],
        "1,000 samples": lambda kind, i: scalars[f"bound_1000_{kind}_{i}"],
        "10,000 samples, fewer images": lambda kind, i: scalars[f"bound_10000_{kind}_{i}"],
    }
    for name, value in readings.items():
        gains = [value("flow", i) - value("plain", i) for i in range(run["config"]["models"])]
        gain, error = np.mean(gains), np.std(gains, ddof=1) / np.sqrt(len(gains))
        record(f"{name}: gain by the flow, 5 pairs on digits, nats", gain)
        record(f"{name}: standard error of the gain", error)
        assert gain > 4 * error
    matched = {}
    for M in (1000, 10_000):  # on the same images, those of the larger M
        flow, plain = (
            [np.mean(run["arrays"][f"{kind}_{i}_{M}"][:50], dtype=np.float64) for i in range(5)]
            for kind in ("flow", "plain")
        )
        matched[M] = np.subtract(flow, plain)
    change = np.mean(matched[10_000] - matched[1000])
    record("the same 50 images: gain at M = 10,000 minus gain at M = 1,000, nats", change)
    assert abs(change) < 0.1 * np.mean(matched[1000])


def test_flow_in_the_encoder_raises_the_likelihood_of_binarised_mnist(record):
    arrays = records.load("flow_vae_binarized_mnist")["arrays"]
    gain = lambda M, n: np.subtract(
        arrays[f"flow_0_{M}"][:n], arrays[f"plain_0_{M}"][:n], dtype=np.float64
    )
    for M, n in ((1000, 1000), (10_000, 100)):
        error = np.std(gain(M, n), ddof=1) / np.sqrt(n)
        record(f"binarised MNIST, M = {M:,}, {n} images: gain by the flow, nats", gain(M, n).mean())
        record(f"binarised MNIST, M = {M:,}: its standard error over images", error)
        assert np.mean(gain(M, n)) > 5 * error
    assert np.mean(gain(1000, 100) - gain(10_000, 100)) < 0.1 * np.mean(gain(1000, 100))


def test_flow_behind_a_trained_encoder_tightens_the_bound(record):
    from minigrad.data import binarize, digits

    trained, data = recorded_conv_params("conv_discrete_digits"), digits()
    x = binarize(data.x_test, np.random.default_rng(1))
    encoder = flow_encoder_init(np.random.default_rng(0), trained["encoder"], 2, 64, 16)
    flow = {"flow": encoder["flow"], "context": encoder["context"]}
    with_flow = lambda flow: trained | {"encoder": trained["encoder"] | flow}
    bound = lambda flow, x, noise: flow_log_weights(with_flow(flow), x, noise)
    descend = value_and_grad(lambda flow, *batch: -np.mean(bound(flow, *batch)))
    optimizer, rng = adam(cosine_decay(1e-2, 400)), np.random.default_rng(2)
    state = optimizer.init(flow)
    for _ in range(400):
        images = binarize(data.x_train[rng.integers(len(data.x_train), size=50)], rng)
        _, grads = descend(flow, images, random.normal(rng, (50, 20), np.float32))
        flow, state = optimizer.update(grads, state, flow)
    noise = random.normal(np.random.default_rng(3), (20, len(x), 20), np.float32)
    gain = np.mean(bound(flow, x, noise) - bound(flow | {"flow": []}, x, noise), axis=0)
    error = np.std(gain, ddof=1) / np.sqrt(len(gain))
    record("digits, decoder fixed: gain of the ELBO by two steps of flow, nats", np.mean(gain))
    assert np.mean(gain) > max(0.03, 4 * error)


# %% [markdown]
# ## Figures


# %%
def figure_warped_grids():
    """Six kinds of steps: where they take a square grid over the base.

    Thin lines: the grid over $[-2.4, 2.4]^2$ after the step, drawn as level lines of the inverse.
    Thick lines: the images of the circles that hold 39 % and 86 % of the base. The parameters are
    chosen for planar and radial steps, and random for the others. Frame: $[-4, 4]^2$; what lies
    beyond is cut off.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(6.4, 4.4))
    for seed, (ax, (name, flow)) in zip((0, 1, 2, 3, 4, 8), zip(axes.flat, FAMILIES.items())):
        rng = np.random.default_rng(seed)
        params = shaken(flow.init(rng, 2), rng, by=0.5 if "inverse" in name else 0.3)
        if name == "planar":
            params = {"u": np.array([-0.6, 1.5]), "w": np.array([1.8, 0.5]), "b": np.array(0.3)}
        if name == "radial":
            params = {"centre": np.array([0.5, 0.3]), "alpha": np.array(-1.0), "delta": np.array(2)}
        draw_grid(ax, lambda x, flow=flow, p=params: flow.inverse(p, x)[0], 4.0)
        ax.set(title=name)
    return fig


def draw_grid(ax, inverse, half_width):
    """Draw the warped grid and two circles of the base: level lines of the inverse of a map."""
    points, _ = plane(half_width, 181)
    z, x = inverse(points), np.moveaxis(points, -1, 0)
    for i in (0, 1):
        lines = np.where(np.abs(z[..., 1 - i]) < 2.4, z[..., i], np.nan)
        style = {"colors": COLOUR["numeric"], "linewidths": 0.5, "linestyles": "-"}
        ax.contour(*x, lines, np.linspace(-2.4, 2.4, 13), **style)
    ax.contour(*x, np.linalg.norm(z, axis=-1), [1, 2], colors=COLOUR["vae"], linewidths=1)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.grid(False)


def draw_density(ax, density, half_width, n=101):
    """Draw a density over a square around 0; `density` maps points (n * n, 2) to (n * n,)."""
    points, _ = plane(half_width, n)
    values = density(points.reshape(-1, 2)).reshape(n, n)
    ax.imshow(values, origin="lower", extent=2 * (-half_width, half_width), vmin=0)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)


# %%
def figure_energies():
    """Planar steps bent towards four energies; below each, its divergence from the target in nats.

    Top row: the targets $e^{-U} / Z$. Below: the densities of 2, 8 and 32 planar steps, trained by
    the reverse divergence. Frame: $[-5, 5]^2$.
    """
    import matplotlib.pyplot as plt

    run = records.load("flow_energies")
    fig, axes = plt.subplots(4, 4, figsize=(6.4, 6.6))
    for column, (name, energy) in zip(axes.T, ENERGIES.items()):
        constant = log_normaliser(energy)
        draw_density(column[0], lambda x: np.exp(-energy(x) - constant), 5)  # noqa: B023
        column[0].set(title=name)
        for ax, length in zip(column[1:], (2, 8, 32)):
            flows = length * [planar]
            params = recorded(run, f"{name}_{length}", flows)
            draw_density(ax, lambda x: np.exp(log_prob(flows, params, x)), 5)  # noqa: B023
            ax.set(xlabel=f"{run['scalars'][f'kl_{name}_{length}']:.2f} nats")
    for ax, label in zip(axes[:, 0], ("target", "2 steps", "8 steps", "32 steps")):
        ax.set(ylabel=label)
    return fig


# %%
def figure_curves():
    """Three curves in noise, and flows fitted to points; below each, the distance from truth.

    Left column: the true densities. Then eight affine couplings, four spline couplings, four masked
    autoregressive steps. Distances in nats, best possible 0. Frame: $[-3.6, 3.6]^2$.
    """
    import matplotlib.pyplot as plt

    run = records.load("flow_curves")
    fig, axes = plt.subplots(3, 4, figsize=(6.4, 5.2))
    for row, (name, curve) in zip(axes, CURVES.items()):
        truth = lambda x, curve=curve: np.exp(true_log_prob(curve, x))
        draw_density(row[0], truth, 3.6)
        row[0].set(ylabel=name)
        for ax, (family, flows) in zip(row[1:], FLOWS.items()):
            params = recorded(run, f"{name}_{family}", flows)
            draw_density(ax, lambda x: np.exp(log_prob(flows, params, x)), 3.6)  # noqa: B023
            ax.set(xlabel=f"{run['scalars'][f'distance_{name}_{family}']:.2f} nats")
    titles = "truth", "affine couplings", "spline couplings", "autoregressive"
    for ax, title in zip(axes[0], titles):
        ax.set(title=title)
    return fig


# %%
def figure_step_by_step():
    """Two moons: the grid over the base and 600 draws from it after 0, 1, 2, 3, 4 spline couplings.

    Colours tell which moon a draw ends near. The order of the coordinates is turned between
    couplings, and turned back for the drawing.
    """
    import matplotlib.pyplot as plt

    flows = FLOWS["spline"]
    params = recorded(records.load("flow_curves"), "moons_spline", flows)
    z = np.random.default_rng(0).standard_normal((600, 2))
    end, _ = chain_transform(flows, params, z)
    middles = moons((np.arange(400) + 0.5) / 400)
    upper = np.argmin(np.sum((end[:, None] - middles) ** 2, axis=-1), axis=1) < 200
    fig, axes = plt.subplots(1, 5, figsize=(6.4, 1.6))
    for ax, steps in zip(axes, range(0, 9, 2)):
        turned = -1 if steps % 4 else 1
        x = chain_transform(flows[:steps], params[:steps], z)[0][:, ::turned]

        def back(x, steps=steps, turned=turned):
            return chain_inverse(flows[:steps], params[:steps], x[..., ::turned])[0]

        draw_grid(ax, back, 4.2)
        for which, colour in ((upper, COLOUR["autoencoder"]), (~upper, COLOUR["mean_field"])):
            ax.scatter(*x[which].T, s=2, color=colour, linewidths=0)
        ax.set(title=f"{steps // 2}", xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
    return fig


# %%
def figure_flow_encoder():
    """Digits: gain by eight autoregressive steps in the encoder, five pairs of VAEs.

    Left: test ELBO during training, with the flow and without it; each line is one model. Right:
    the difference of each pair at the end, in the ELBO and in the estimates of log p(x) from 1,000
    and 10,000 samples (the latter on 50 images); bars: one standard error over images.
    """
    import matplotlib.pyplot as plt

    run = records.load("flow_vae_digits")
    models = range(run["config"]["models"])
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.9), width_ratios=(1.2, 1))
    for kind, colour, label in (
        ("plain", COLOUR["vae"], "without flow"),
        ("flow", COLOUR["autoencoder"], "eight steps"),
    ):
        for i in models:
            curve = run["curves"][f"test_elbo_{kind}_{i}"]
            first = {"label": label} if i == 0 else {}
            left.plot(curve["steps"], curve["values"], "-", color=colour, lw=1, **first)
    left.set(xlabel="steps", ylabel="test ELBO (nats per image)")
    left.legend(loc="lower right")
    bound = [
        run["curves"][f"test_elbo_flow_{i}"]["values"][-1]
        - run["curves"][f"test_elbo_plain_{i}"]["values"][-1]
        for i in models
    ]
    right.plot(np.array(models) - 0.2, bound, "o", color=COLOUR["exact"], label="ELBO")
    for shift, M, marker in ((0.0, 1000, "s"), (0.2, 10_000, "^")):
        flow, plain = ([run["arrays"][f"{k}_{i}_{M}"] for i in models] for k in ("flow", "plain"))
        gains = np.subtract(flow, plain, dtype=np.float64)
        errors = gains.std(axis=1, ddof=1) / np.sqrt(gains.shape[1])
        right.errorbar(
            np.array(models) + shift,
            gains.mean(axis=1),
            errors,
            fmt=marker,
            color=COLOUR["iwae"] if M == 1000 else COLOUR["numeric"],
            label=f"$M$ = {M:,}",
        )
    right.axhline(0, color=COLOUR["exact"], lw=0.8)
    right.set(xlabel="pair", ylabel="gain by the flow (nats)", xticks=list(models))
    right.set_ylim(top=1.4 * max(bound))  # room for the legend
    right.legend(loc="upper left")
    return fig


# %% [markdown]
# ## Exercises
#
# **1. The sum of log-determinants.** (From a course assignment.) Derive
# $\log q_t(z_t) = \log q_0(z_0) - \sum_{s=1}^{t} \log|\det \partial g_s / \partial z_{s-1}|$ for
# $z_s = g_s(z_{s-1})$. First do one dimension, with distribution functions; where do the bars come
# from?
#
# ```{admonition} Solution
# :class: dropdown
#
# Let $Q_s$ be the distribution function of $z_s$. If $g_s$ increases, $Q_s(g_s(z)) = Q_{s-1}(z)$;
# differentiate, $q_s(z_s)\, g_s'(z_{s-1}) = q_{s-1}(z_{s-1})$. If $g_s$ decreases,
# $Q_s(g_s(z)) = 1 - Q_{s-1}(z)$ and $-q_s g_s' = q_{s-1}$, with $-g_s' > 0$: both cases are
# $q_s |g_s'| = q_{s-1}$. Take logarithms and add up $s = 1, \dots, t$; what stands between
# telescopes. In $D$ dimensions {prf:ref}`thm-flow-change` takes the place of the first line.
# ```


# %% tags=["hide-cell"]
def test_exercise_flow_distribution_functions_give_the_same_density():
    rng = np.random.default_rng(20)
    flows = [planar, masked_autoregressive, planar]
    params = shaken(chain_init(flows, rng, 1), rng)
    params[1]["m"]["b"] = params[1]["m"]["b"] + 0.5
    x, h = np.linspace(-2, 2, 9)[:, None], 1e-4
    # P(x <= a): the composition is increasing, so the base is asked at the inverse of a
    below = lambda a: ndtr(chain_inverse(flows, params, a)[0][:, 0])
    slope = (below(x + h) - below(x - h)) / (2 * h)
    np.testing.assert_allclose(np.exp(log_prob(flows, params, x)), slope, rtol=1e-6)
    # turned over: z -> -z first, which changes the sign of every slope and no density
    turned = lambda a: 1 - ndtr(-chain_inverse(flows, params, a)[0][:, 0])
    np.testing.assert_allclose(turned(x), below(x), rtol=1e-12)


# %% [markdown]
# **2. A full covariance.** Take an autoregressive step {eq}`eq-flow-maf` with constant $s$ and with
# $m_i$ linear in what comes before. Which laws can it make of $N(0, I)$? How many
# parameters has it? Compare {eq}`eq-path-covariance`.
#
# ```{admonition} Solution
# :class: dropdown
#
# With $m(x) = Nx$, $N$ strictly lower triangular, $x = e^s \odot z + N x$ gives
# $x = (I - N)^{-1} \mathrm{diag}(e^s)\, z = Lz$. That is a lower triangular matrix with a positive
# diagonal, and every such $L$ is reached: $N = I - \mathrm{diag}(L)\, L^{-1}$. So without shift the
# laws are all $N(0, \Sigma)$, with $D + D(D-1)/2$ parameters, and $\log|\det| = \sum_i s_i =
# \sum_i \log L_{ii}$. One linear step is the full covariance of Chapter 4; bent networks bend it.
# ```


# %% tags=["hide-cell"]
def test_exercise_flow_linear_autoregressive_step_is_a_full_covariance():
    rng = np.random.default_rng(21)
    A = rng.standard_normal((4, 4))
    covariance = A @ A.T + np.eye(4)
    L = np.linalg.cholesky(covariance)
    N = np.eye(4) - np.diag(np.diag(L)) @ np.linalg.inv(L)
    assert np.max(np.abs(np.triu(N))) < 1e-12
    x, z = rng.standard_normal((2, 5, 4))
    s = np.log(np.diag(L))
    z = (x - x @ N.T) * np.exp(-s)  # data to base, in one pass
    np.testing.assert_allclose(z @ L.T, x, atol=1e-12)
    quadratic = np.sum(x * np.linalg.solve(covariance, x.T).T, axis=1)
    normal = -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose(base_log_prob(z) - np.sum(s), normal, rtol=1e-10)


# %% [markdown]
# **3. No change of volume.** Leave out the scales of the couplings: $s = 0$. Every determinant is
# 1, and training becomes simpler. What is the highest density that such a flow can have? What
# is its entropy? Which of the three figures of {numref}`fig-curves` are too dense for it?
#
# ```{admonition} Solution
# :class: dropdown
#
# $q(x) = q_0(g^{-1}(x)) \le (2\pi)^{-D/2}$, whatever the networks do, and
# $\mathbb{E}[-\log q] = \mathbb{E}[-\log q_0] = \frac{D}{2} \log(2 \pi e)$, 2.84 nats in the plane.
# The flow can carry mass about, but never press it together. The base has the density 0.16 at its
# peak, the moons 0.26 all along their curve: two thirds of their mass lie in places that are too
# dense. So does an eighth of the rings' mass, on the innermost, where the density is 0.18; the
# spirals stay below 0.11. A linear map in front or behind, with one determinant for all points,
# lifts the bound.
# ```


# %% tags=["hide-cell"]
def test_exercise_flow_without_scales_keeps_every_height():
    rng = np.random.default_rng(22)

    def moved(outputs, z):
        return z + outputs[..., : z.shape[-1]], np.zeros_like(z)

    def moved_back(outputs, x):
        return x - outputs[..., : x.shape[-1]], np.zeros_like(x)

    additive = Flow(coupling_init, coupled(moved), coupled(moved_back))
    flows = 4 * [additive, reverse]
    params = shaken(chain_init(flows, rng, 2), rng, by=0.5)
    x, total = chain_transform(flows, params, rng.standard_normal((20_000, 2)))
    assert np.max(np.abs(x)) > 5 and np.all(total == 0)
    log_q = log_prob(flows, params, x)
    assert np.max(log_q) <= -np.log(2 * np.pi)
    check_unbiased(-log_q, np.array(np.log(2 * np.pi * np.e)))
    points, cell = plane(4.0, 81)
    for curve, peak, mass_above in (moons, 0.265, 0.66), (rings, 0.178, 0.125), (spirals, 0.1, 0.0):
        density = np.exp(true_log_prob(curve, points.reshape(-1, 2), n=300))
        on_it = true_log_prob(curve, curve((np.arange(60) + 0.5) / 60), n=300)
        assert np.exp(np.max(on_it)) == pytest.approx(peak, abs=0.005)
        too_dense = density[density > 1 / (2 * np.pi)]
        assert cell * np.sum(too_dense) == pytest.approx(mass_above, abs=0.03)


# %% [markdown]
# **4. One dimension.** Let $F$ be a distribution function with a positive density $f$ on the line.
# Find an increasing flow from $N(0, 1)$ to it, and its log-determinant. Is it the only one? What
# does that say about autoregressive flows whose every coordinate may be moved by *any* increasing
# function?
#
# ```{admonition} Solution
# :class: dropdown
#
# $g = F^{-1} \circ \Phi$, by {eq}`eq-path-cdf`; $g'(z) = \varphi(z) / f(g(z))$. It is the only
# increasing one: $F(g(z)) = \Phi(z)$ is what "increasing" and "has the law" say together. In $D$
# dimensions take for coordinate $i$ the distribution function of $x_i$ given $x_{<i}$: a chain
# of one-dimensional maps, that is, an autoregressive flow, makes any positive density of $N(0, I)$.
# The limits are the functions that a step can represent, not the order of the coordinates.
# ```


# %% tags=["hide-cell"]
def test_exercise_flow_of_one_dimension_reaches_any_law():
    def transform(z):  # to the logistic law
        p = ndtr(z)
        x = np.log(p / (1 - p))
        return x, np.sum(normal_log_prob(z, 0.0, 1.0) - (log_sigmoid(x) + log_sigmoid(-x)), axis=-1)

    z = np.random.default_rng(23).standard_normal((20, 1))
    check_logdet(transform, z, lambda x: ndtri(1 / (1 + np.exp(-x))))


# %% [markdown]
# **5. The bridge.** A target on the line consists of two pieces, half of its mass below $-a$ and
# half above $a$. Show that a flow $x = g(z)$ from $N(0, 1)$ that increases with slopes of at most
# $\Lambda$ leaves at least the mass $2 \Phi(a / \Lambda) - 1$ between them, whatever the rest of it
# does, if it is odd ($g(0) = 0$). Look for the bridges in {numref}`fig-curves`.
#
# ```{admonition} Solution
# :class: dropdown
#
# $|g(z)| \le \Lambda |z|$, so all $z$ with $|z| < a / \Lambda$ land between $-a$ and $a$, and they
# have that mass. To empty the gap the slope must be infinite at 0: a continuous map cannot tear
# its base. In the plane the same is true of the filaments between moons and between rings. The
# map is as steep as the networks allow, and the thinner the filament, the steeper.
# ```


# %% tags=["hide-cell"]
def test_exercise_flow_leaves_a_bridge():
    steps = [{"u": np.array([4.0]), "w": np.array([2.0]), "b": np.zeros(())} for _ in range(3)]
    flows = 3 * [planar]  # odd and increasing, steepest at 0
    z = np.linspace(-4, 4, 4001)[:, None]
    x, log_slope = chain_transform(flows, steps, z)
    steepest, a = np.exp(np.max(log_slope)), 4.0
    assert log_slope.argmax() == 2000
    edge = chain_inverse(flows, steps, np.array([[a]]))[0].item()
    between = 2 * ndtr(edge) - 1  # the mass that lands in the gap
    assert 2 * ndtr(a / steepest) - 1 < between < 0.2
    assert np.all(np.abs(x) <= steepest * np.abs(z) + 1e-12)
