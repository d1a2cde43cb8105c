# %% [markdown]
# # 5. The variational autoencoder
#
# A model imagines how data come about: first a few hidden numbers are drawn, then an image is drawn
# that depends on them. Given an image, which hidden numbers lie behind it? The exact answer is an
# integral that nobody can do, and one would need it for every image of a data set. This chapter
# trains a network to give an approximate answer to all images at once, together with the model
# itself, by following one stochastic gradient: auto-encoding variational Bayes. The whole gradient
# is first written out by hand. Then we ask what the result has that a plain autoencoder lacks.
#
# **Reads after:** 1, 2, 4 · **Runs in:** 20 s · **Papers:**
# {cite}`kingma2014auto,rezende2014stochastic,roeder2017sticking,cremer2018inference`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $B$ | number of data in a batch | () |
# | $D$ | dimension of an event: here the number of pixels | () |
# | $d$ | number of latents of one datum | () |
# | $H$ | number of units of a hidden layer | () |
# | $x$ | observation, a batch of images of zeros and ones | $(B, D)$ |
# | $z$ | latent variable | $(B, d)$ |
# | $\varepsilon$ | noise whose law has no parameters, standard normal | $(B, d)$ |
# | $\theta$ | parameters of the generative model: the decoder | any |
# | $\phi$ | parameters of the approximate posterior: the encoder | any |
# | $p(z)$ | prior, $N(0, I)$ for each image | () |
# | $p_\theta(x \mid z)$ | likelihood, of one image | () |
# | $q_\phi(z \mid x)$ | approximate posterior: for each image, independent normal laws | () |
# | $\mu$ | location of the approximate posterior | $(B, d)$ |
# | $\sigma$ | scale, a standard deviation | $(B, d)$ |
# | $r$ | log-variance $\log \sigma^2$, as the encoder returns it | $(B, d)$ |
# | $W_1, \dots, W_5$ | weights; $b_1, \dots, b_5$ are the biases, one row each | below |
# | $h_\phi$, $h_\theta$ | hidden units of encoder and decoder | $(B, H)$ each |
# | $a$ | logits of the pixels | $(B, D)$ |
# | $\hat x$ | means of the pixels, $1 / (1 + e^{-a})$ | $(B, D)$ |
# | $\mathcal{L}$ | evidence lower bound (ELBO), in nats, of one image | () |
# | $R$ | rate, the KL term of the ELBO, averaged over data | (), nats |
# | $V$ | distortion: minus the reconstruction term, averaged over data | (), nats |
# | $\beta$ | weight of the KL term | () |
# | $w$, $\tau$ | slope, and standard deviation of the noise, of the linear model | () each |
# | $\varsigma$ | standard deviation of the noise of grey pixels | () |
# | $h$ | hidden units of a convolutional network | any |
# | $\mathcal{L}^*$ | highest ELBO of an image among all independent normal $q$ | (), nats |
# | $m$ | mean of the exact posterior of the linear model | (d,) |
# | $v$ | variance of the exact posterior of one latent | () |
# | $\gamma$ | ratio $\sigma^2 / v$ of the variances of $q$ and of the posterior | () |
# | $\delta$ | distance $(\mu - m) / \sqrt v$ of their means | () |
# | $\rho$ | correlation of two latents under the exact posterior | () |
#
# Every likelihood of this chapter is in nats per image: summed over pixels, averaged over images,
# never the other way round. "What goes wrong" shows why the order deserves a sentence.

# %% [markdown]
# ## Derivation
#
# ### The model
#
# Each image has $d$ latents, which are drawn first. The image is drawn given the latents, pixel
# by pixel, with probabilities that a network computes:
#
# $$ z \sim N(0, I), \qquad
#    x_i \mid z \sim \mathrm{Bernoulli}(\hat x_i), \qquad
#    \hat x = \frac{1}{1 + e^{-a}}, \quad a = \mathrm{decoder}_\theta(z) . $$ (eq-vae-model)
#
# The log-likelihood of an image is a sum over its pixels,
#
# $$ \log p_\theta(x \mid z)
#    = \sum_{i=1}^{D} \big( x_i a_i - \log(1 + e^{a_i}) \big) . $$ (eq-vae-likelihood)
#
# Given $z$ the pixels are independent. What they do together, what makes them a 3 or a 7, must come
# from $z$. What we would like to maximise is the evidence of the data, and what we would
# like to know is the posterior of the latents:
#
# $$ p_\theta(x) = \int p_\theta(x \mid z)\, p(z)\, dz , \qquad
#    p_\theta(z \mid x) = \frac{p_\theta(x \mid z)\, p(z)}{p_\theta(x)} . $$ (eq-vae-evidence)
#
# The integrand contains a network. In general the integral has no closed form, and hence neither
# has the posterior.

# %% [markdown]
# ### A bound that can be computed
#
# Chapter 2 puts a bound in the place of the integral. Take a density $q(z)$ for the latents of the
# image $x$. It must have no mass where $p_\theta(x, z) = 0$; a normal prior and finite logits leave
# no such place. Then by {eq}`eq-elbo-identity`, and in the second of the forms
# {eq}`eq-elbo-forms`,
#
# $$ \begin{aligned}
#    \log p_\theta(x) &= \mathcal{L}(x) + \mathrm{KL}\big(q \,\|\, p_\theta(z \mid x)\big)
#    \;\ge\; \mathcal{L}(x), \\
#    \mathcal{L}(x) &= \underbrace{\mathbb{E}_{q}[\log p_\theta(x \mid z)]}_{\text{reconstruction}}
#    - \underbrace{\mathrm{KL}\big(q \,\|\, p(z)\big)}_{\text{KL term}} .
#    \end{aligned} $$ (eq-vae-elbo)
#
# $\mathbb{E}_q$ is the expectation over $z \sim q$. The bound is tight exactly when $q$ is the
# posterior. Its first term asks that latents drawn for $x$ bring $x$ back. Its second charges for
# the divergence of their law from the prior.

# %% [markdown]
# ### One network for all posteriors
#
# Every image has a posterior of its own. To fit a $q$ to each would mean an optimisation per image,
# at every change of $\theta$. *Amortisation* replaces it by a function: a second network takes the
# image and returns the parameters of its $q$,
#
# $$ q_\phi(z \mid x) = N\big(z;\, \mu, \mathrm{diag}(\sigma^2)\big), \qquad
#    (\mu, r) = \mathrm{encoder}_\phi(x), \quad \sigma = e^{r/2} . $$ (eq-vae-encoder)
#
# The logarithm of the variance may be any real number, which is what a linear layer produces. A new
# image costs one pass through the encoder. The price is a bound that is at most as tight as with
# the best normal $q$ for each image.
#
# ### The KL term in closed form
#
# For one coordinate, $\mathbb{E}_q[\log q] = -\frac12 \log(2\pi\sigma^2) - \frac12$ and
# $\mathbb{E}_q[\log p] = -\frac12 \log 2\pi - \frac12(\mu^2 + \sigma^2)$, because
# $\mathbb{E}_q[z^2] = \mu^2 + \sigma^2$. Subtract, and add up the coordinates:
#
# $$ \mathrm{KL}\big(q_\phi(z \mid x) \,\|\, N(0, I)\big)
#    = \frac12 \sum_{j=1}^{d} \big( e^{r_j} + \mu_j^2 - 1 - r_j \big) . $$ (eq-vae-kl)
#
# ### Estimator and algorithm
#
# The reconstruction term is an expectation over $q_\phi$, whose parameters we want to move.
# Chapter 4 has the tool: write the sample as a function of noise,
#
# $$ z = \mu + e^{r/2} \odot \varepsilon, \qquad \varepsilon \sim N(0, I) , $$ (eq-vae-sample)
#
# and differentiate through it. One sample per image is enough; this is Estimator B of
# {cite}`kingma2014auto`,
#
# $$ \widehat{\mathcal{L}}_B(x) = \log p_\theta(x \mid z)
#    - \mathrm{KL}\big(q_\phi(z \mid x) \,\|\, p(z)\big) . $$ (eq-vae-b)
#
# Estimator A leaves the KL term to the sample as well. It needs no closed form:
#
# $$ \widehat{\mathcal{L}}_A(x) = \log p_\theta(x, z) - \log q_\phi(z \mid x) . $$ (eq-vae-a)
#
# Both have the mean $\mathcal{L}(x)$. Averaged over a random batch, they have the mean of
# $\mathcal{L}(x)$ over the data set.
#
# ```{prf:algorithm} Auto-encoding variational Bayes
# :label: alg-vae-aevb
#
# Repeat until $\theta$ and $\phi$ have converged:
#
# 1. draw $B$ images at random from the data;
# 2. draw noise $\varepsilon \sim N(0, I)$, a row for each of them;
# 3. compute the gradient in $\theta$ and $\phi$ of $\frac1B \sum \widehat{\mathcal{L}}_B(x)$;
# 4. let an optimiser take a step *upwards*.
# ```

# %% [markdown]
# ### Who gets gradient from where
#
# The KL term {eq}`eq-vae-kl` contains $\mu$ and $r$ and nothing else. Hence
#
# $$ \begin{aligned}
#    \nabla_\theta \mathcal{L} &= \nabla_\theta\, \mathbb{E}_q[\log p_\theta(x \mid z)], \\
#    \nabla_\phi \mathcal{L} &= \nabla_\phi\, \mathbb{E}_q[\log p_\theta(x \mid z)]
#    - \nabla_\phi\, \mathrm{KL}\big(q_\phi(z \mid x) \,\|\, p(z)\big) .
#    \end{aligned} $$ (eq-vae-split)
#
# The decoder learns from the reconstruction only. The encoder hears both: the reconstruction,
# through $z$ and the decoder, and the KL term directly.

# %% [markdown]
# ### The weight of the KL term
#
# Give the KL term a weight $\beta$. Let $R$ (*rate*) be the KL term and $V$ (*distortion*) minus
# the reconstruction term, both averaged over the data. What is maximised is then $-(V + \beta R)$,
# the average ELBO if $\beta = 1$.
#
# ```{prf:proposition} The weight trades rate against distortion
# :label: prop-vae-trade
#
# Let $(V_1, R_1)$ and $(V_2, R_2)$ be minima of $V + \beta_1 R$ and of $V + \beta_2 R$ over the
# same set of models, with $0 \le \beta_1 < \beta_2$. Then $R_2 \le R_1$ and
# $V_2 \ge V_1$, and if $R_2 < R_1$, the exchange rate lies between the two weights:
#
# $$ \beta_1 \;\le\; \frac{V_2 - V_1}{R_1 - R_2} \;\le\; \beta_2 . $$ (eq-vae-exchange)
# ```
#
# *Proof.* Each is the better one under its own weight:
# $V_1 + \beta_1 R_1 \le V_2 + \beta_1 R_2$ and $V_2 + \beta_2 R_2 \le V_1 + \beta_2 R_1$. These are
# $\beta_1 (R_1 - R_2) \le V_2 - V_1 \le \beta_2 (R_1 - R_2)$, which is {eq}`eq-vae-exchange`. As
# $\beta_1 < \beta_2$ it forces $R_1 - R_2 \ge 0$, and the left inequality then gives $V_2 \ge V_1$.
# $\square$
#
# Between neighbouring weights, then, a nat of rate buys about $\beta$ nats of distortion.

# %% [markdown]
# ### Sticking the landing
#
# Estimator A has an odd property. Suppose that $q_\phi$ *is* the posterior. Then
# $\log p_\theta(x, z) - \log q_\phi(z \mid x) = \log p_\theta(x)$ for every $z$: its value has no
# noise at all. Its gradient has. Write out where $\phi$ occurs: in the sample, and in the density,
#
# $$ G_A = \nabla_\phi \widehat{\mathcal{L}}_A =
#    \Big( \frac{\partial z}{\partial \phi} \Big)^{\!\top}
#    \nabla_z \big[ \log p_\theta(x, z) - \log q_\phi(z \mid x) \big]
#    - \underbrace{\nabla_\phi \log q_\phi(z \mid x) \big|_{z \text{ fixed}}
#    }_{\text{score}} . $$ (eq-vae-a-gradient)
#
# At the posterior the bracket does not depend on $z$, so its gradient is zero, and all that
# remains is the score. The mean of a score is zero for every $q$,
# {eq}`eq-elbo-score`. So it can be dropped {cite}`roeder2017sticking`:
#
# $$ G_{\text{STL}} = \Big( \frac{\partial z}{\partial \phi} \Big)^{\!\top}
#    \nabla_z \big[ \log p_\theta(x, z) - \log q_{\phi}(z \mid x) \big] . $$ (eq-vae-stl)
#
# In code that is one `stop_gradient`. The estimator stays unbiased for every $q$, and at the
# posterior it is exactly zero. Is it always the better one? Compute, in Chapter 2's linear model
# {eq}`eq-elbo-linear` with scalars: $z \sim N(0, 1)$, $x \mid z \sim N(w z, \tau^2)$. By
# {eq}`eq-elbo-linear-posterior` the posterior is normal with
#
# $$ v = \frac{1}{1 + w^2/\tau^2}, \qquad m = \frac{v\, w\, x}{\tau^2} , $$ (eq-vae-linear)
#
# its variance and its mean, and $\nabla_z \log p(x, z) = -(z - m)/v$. Take
# $q = N(\mu, \sigma^2)$, parameters $(\mu, \log\sigma)$, and write $\gamma = \sigma^2 / v$ for the
# ratio of variances and $\delta = (\mu - m) / \sqrt v$. With $z = \mu + \sigma\varepsilon$ the
# gradients {eq}`eq-vae-a-gradient` and {eq}`eq-vae-stl` are
#
# $$ \begin{aligned}
#    G_{A, \mu} &= -\frac{\sigma \varepsilon + \mu - m}{v}, &
#    G_{A, \log\sigma} &= 1 - \sqrt\gamma\, \delta\, \varepsilon - \gamma \varepsilon^2 , \\
#    G_{\text{STL}, \mu} &= G_{A, \mu} + \frac{\varepsilon}{\sigma}, &
#    G_{\text{STL}, \log\sigma} &= G_{A, \log\sigma} + \varepsilon^2 - 1 ,
#    \end{aligned} $$ (eq-vae-stl-linear)
#
# the last terms being the scores. As $\mathrm{Var}[\varepsilon^2] = 2$, and as $\varepsilon$ and
# $\varepsilon^2$ are uncorrelated,
#
# $$ \begin{aligned}
#    \mathrm{Var}[G_{A, \mu}] &= \frac{\gamma}{v}, &
#    \mathrm{Var}[G_{A, \log\sigma}] &= \gamma \delta^2 + 2 \gamma^2, \\
#    \mathrm{Var}[G_{\text{STL}, \mu}] &= \frac{(1 - \gamma)^2}{\gamma\, v}, &
#    \mathrm{Var}[G_{\text{STL}, \log\sigma}] &= \gamma \delta^2 + 2 (1 - \gamma)^2 .
#    \end{aligned} $$ (eq-vae-stl-variance)
#
# At the posterior ($\gamma = 1$, $\delta = 0$) the second row is zero. But the ratio of the two
# rows in $\mu$ is $(1 - \gamma)^2 / \gamma^2$: once $q$ has less than half the variance of the
# posterior, $\gamma < \frac12$, the score term *helps*, and dropping it multiplies the variance
# without limit ({numref}`fig-sticking-the-landing`).
#
# This is about a $q$ that could be better. Take two latents with correlation $\rho$ under a normal
# posterior, and the best independent $q$. By {eq}`eq-elbo-factor-normal` it has $\mu = m$ and
# $\sigma_j^2 = 1 / \Lambda_{jj}$, where $\Lambda$ is the precision of the posterior. That is
# narrower than the posterior, and yet dropping helps for every $\rho$. In $\mu$ the gradients are
# $G_A = -\Lambda (\sigma \odot \varepsilon)$ and $G_A$ plus the vector of all
# $\varepsilon_j / \sigma_j$, hence
#
# $$ \mathrm{Var}[G_{A, \mu_j}] = (1 + \rho^2)\, \Lambda_{jj}, \qquad
#    \mathrm{Var}[G_{\text{STL}, \mu_j}] = \rho^2\, \Lambda_{jj} . $$ (eq-vae-stl-independent)

# %% [markdown]
# ### Grey pixels
#
# If the pixels are grey, numbers between 0 and 1, another likelihood is called for. The usual one
# is normal, with means from the decoder and one fixed standard deviation $\varsigma$:
#
# $$ x_i \mid z \sim N(\hat x_i, \varsigma^2), \qquad
#    \log p_\theta(x \mid z) = -\frac{1}{2 \varsigma^2} \sum_{i=1}^{D} (x_i - \hat x_i)^2
#    - \frac{D}{2} \log (2 \pi \varsigma^2) . $$ (eq-vae-grey)
#
# The last term contains neither $\theta$ nor $\phi$. Training does not need it, and many programs
# leave it out. But then what they print is not the ELBO: with $\varsigma = 0.1$ the term is worth
# $+88.6$ nats on the 64 pixels of the digits and $+1085$ nats on the 784 of MNIST. In this book it
# is in the number. Even so the number has a unit. A density changes with the scale of $x$: counted
# from 0 to 255, the same pixels have $D \log 255$ nats less. So it may be positive, and it says
# nothing next to the log-likelihood of zeros and ones.
#
# The factor in front matters. Multiply the ELBO by $2 \varsigma^2$: what is maximised is minus the
# sum of squares minus $2 \varsigma^2 R$. So $2\varsigma^2$ is a weight $\beta$ by another name. A
# program that subtracts the KL term from minus the bare sum of squares has chosen
# $\varsigma = 1/\sqrt 2$, noise almost as wide as the whole range of the pixels.

# %% [markdown]
# ### Two gaps
#
# By {eq}`eq-vae-elbo` the ELBO misses the log-evidence by a divergence. There are two reasons why
# this is not zero {cite}`cremer2018inference`. Let $\mathcal{L}^*(x)$ be the highest ELBO that any
# independent normal law $q$ has for the image $x$, under the model as it is. Then
#
# $$ \log p_\theta(x) - \mathcal{L}(x)
#    = \underbrace{\log p_\theta(x) - \mathcal{L}^*(x)}_{\text{approximation gap}}
#    + \underbrace{\mathcal{L}^*(x) - \mathcal{L}(x)}_{\text{amortisation gap}} , $$ (eq-vae-gaps)
#
# and neither part is negative. The first is there because the posterior is not an independent
# normal law: a richer family makes it smaller. The second is there because one network must
# answer for all images: a better encoder makes it smaller, or an ascent for each image.
#
# For two latents with a normal posterior of correlation $\rho$, the best independent $q$ has
# $\sigma_j^2 = 1/\Lambda_{jj}$, and $\Lambda_{11} \Lambda_{22} (1 - \rho^2) = \det \Lambda$. The
# approximation gap is its divergence to the posterior,
#
# $$ \frac12 \sum_j \log \Lambda_{jj} - \frac12 \log \det \Lambda
#    = -\frac12 \log (1 - \rho^2) . $$ (eq-vae-approximation-gap)

# %% [markdown]
# ## By hand
#
# Give encoder and decoder one hidden layer each, with
# $\tanh$ {cite}`kingma2014auto`. Then the whole computation is, for a batch,
#
# $$ h_\phi = \tanh(x W_1 + b_1), \qquad
#    \mu = h_\phi W_2 + b_2, \qquad
#    r = h_\phi W_3 + b_3, $$ (eq-vae-forward-encoder)
#
# $$ z = \mu + e^{r/2} \odot \varepsilon, \qquad
#    h_\theta = \tanh(z W_4 + b_4), \qquad
#    a = h_\theta W_5 + b_5 , $$ (eq-vae-forward-decoder)
#
# with $W_1$ of shape $(D, H)$, $W_2$ and $W_3$ $(H, d)$, $W_4$ $(d, H)$, $W_5$ $(H, D)$. The
# objective is the average over rows of {eq}`eq-vae-likelihood` minus {eq}`eq-vae-kl`.
#
# Now backwards, as in Chapter 1. A bar marks the derivative of the objective in the quantity
# beneath it, of the same shape; $g_\theta = z W_4 + b_4$ and $g_\phi = x W_1 + b_1$ are the
# arguments of the two $\tanh$. The derivative of $\log(1 + e^a)$ is $\hat x$, hence
#
# $$ \bar a = \frac{x - \hat x}{B}, \qquad
#    \bar W_5 = h_\theta^\top \bar a, \qquad
#    \bar b_5 = \sum_{\text{rows}} \bar a , $$ (eq-vae-back-logits)
#
# $$ \bar g_\theta = (\bar a\, W_5^\top) \odot (1 - h_\theta \odot h_\theta), \qquad
#    \bar W_4 = z^\top \bar g_\theta, \qquad
#    \bar b_4 = \sum_{\text{rows}} \bar g_\theta, \qquad
#    \bar z = \bar g_\theta W_4^\top . $$ (eq-vae-back-decoder)
#
# Here the reconstruction term leaves the decoder. At the latents it splits: $\mu$ and $r$ both
# moved $z$, by {eq}`eq-vae-sample`, and here the KL term joins, as {eq}`eq-vae-split` says,
#
# $$ \bar \mu = \bar z - \frac{\mu}{B}, \qquad
#    \bar r = \frac12\, \bar z \odot e^{r/2} \odot \varepsilon
#    - \frac{e^{r} - 1}{2B} . $$ (eq-vae-back-latents)
#
# Where the image says nothing, $\bar z = 0$, and these two lines pull $\mu$ to 0 and $\sigma$ to 1.
# The rest is the encoder's:
#
# $$ \begin{gathered}
#    \bar W_2 = h_\phi^\top \bar\mu, \qquad
#    \bar W_3 = h_\phi^\top \bar r, \qquad
#    \bar W_1 = x^\top \bar g_\phi , \\
#    \bar g_\phi = (\bar\mu\, W_2^\top + \bar r\, W_3^\top) \odot (1 - h_\phi \odot h_\phi),
#    \end{gathered} $$ (eq-vae-back-encoder)
#
# and the biases $\bar b_2$, $\bar b_3$, $\bar b_1$ are the sums over the rows of $\bar\mu$,
# $\bar r$, $\bar g_\phi$.
#
# The parameters are kept in two dicts, the encoder's $\phi$ and the decoder's $\theta$. A network
# may have several hidden layers, so these are lists; by hand we do one.

# %%
import numpy as np
import pytest

from chapters.ledger import claim
from minigrad.nn import dense_init


def layers_init(rng, widths, dtype):
    """Parameters of the layers from widths[0] to widths[-1] units: a list."""
    return [dense_init(rng, n, m, dtype) for n, m in zip(widths, widths[1:])]


def vae_init(rng, n_pixels, hidden, n_latents, dtype=np.float32):
    """Parameters {"encoder": phi, "decoder": theta}; the decoder mirrors the widths `hidden`."""
    encoder = {
        "hidden": layers_init(rng, [n_pixels, *hidden], dtype),
        "loc": dense_init(rng, hidden[-1], n_latents, dtype),
        "log_var": dense_init(rng, hidden[-1], n_latents, dtype),
    }
    decoder = {
        "hidden": layers_init(rng, [n_latents, *hidden[::-1]], dtype),
        "logits": dense_init(rng, hidden[0], n_pixels, dtype),
    }
    return {"encoder": encoder, "decoder": decoder}


# %%
def elbo_grad_by_hand(params, x, noise):
    """Value and gradient of the mean ELBO of a batch `x` (B, D), one sample per row of `noise`.

    For networks of one hidden layer. The gradient is a dict like `params`.
    """
    (layer1,), layer2, layer3 = (params["encoder"][k] for k in ("hidden", "loc", "log_var"))
    (layer4,), layer5 = (params["decoder"][k] for k in ("hidden", "logits"))

    h_enc = np.tanh(x @ layer1["w"] + layer1["b"])  # Eq. (eq-vae-forward-encoder)
    loc = h_enc @ layer2["w"] + layer2["b"]
    log_var = h_enc @ layer3["w"] + layer3["b"]
    scale = np.exp(0.5 * log_var)
    z = loc + scale * noise  # Eq. (eq-vae-forward-decoder)
    h_dec = np.tanh(z @ layer4["w"] + layer4["b"])
    a = h_dec @ layer5["w"] + layer5["b"]
    reconstruction = np.sum(x * a - np.logaddexp(0, a))  # Eq. (eq-vae-likelihood)
    kl = 0.5 * np.sum(np.exp(log_var) + loc**2 - 1 - log_var)  # Eq. (eq-vae-kl)

    B = len(x)
    a_bar = (x - 1 / (1 + np.exp(-a))) / B  # Eq. (eq-vae-back-logits)
    g_dec = (a_bar @ layer5["w"].T) * (1 - h_dec**2)  # Eq. (eq-vae-back-decoder)
    z_bar = g_dec @ layer4["w"].T
    loc_bar = z_bar - loc / B  # Eq. (eq-vae-back-latents)
    log_var_bar = 0.5 * z_bar * scale * noise - 0.5 * (np.exp(log_var) - 1) / B
    h_bar = loc_bar @ layer2["w"].T + log_var_bar @ layer3["w"].T
    g_enc = h_bar * (1 - h_enc**2)  # Eq. (eq-vae-back-encoder)

    def layer(inputs, bar):
        return {"w": inputs.T @ bar, "b": np.sum(bar, axis=0)}

    encoder = {
        "hidden": [layer(x, g_enc)],
        "loc": layer(h_enc, loc_bar),
        "log_var": layer(h_enc, log_var_bar),
    }
    decoder = {"hidden": [layer(z, g_dec)], "logits": layer(h_dec, a_bar)}
    return (reconstruction - kl) / B, {"encoder": encoder, "decoder": decoder}


# %% [markdown]
# ## With minigrad
#
# The same, for any number of hidden layers: the model in five functions, one per formula, and no
# line of the backward half.

# %%
from minigrad import grad, random, stop_gradient, tree, value_and_grad
from minigrad.data import binarize
from minigrad.nn import dense
from minigrad.optim import adam, cosine_decay
from minigrad.special import bernoulli_log_prob, expit, log_softmax, normal_log_prob, xlogy


def hidden_units(layers, x):
    """The last of a stack of tanh layers."""
    for layer in layers:
        x = np.tanh(dense(layer, x))
    return x


def encode(encoder, x):
    r"""Location and log-variance, (B, d) each, of $q_\phi(z \mid x)$ for images `x` (B, D)."""
    h = hidden_units(encoder["hidden"], x)
    return dense(encoder["loc"], h), dense(encoder["log_var"], h)  # Eq. (eq-vae-encoder)


def decode(decoder, z):
    """Logits (B, D) of the pixels, for latents `z` (B, d)."""
    return dense(decoder["logits"], hidden_units(decoder["hidden"], z))  # Eq. (eq-vae-model)


def sample_latent(loc, log_var, noise):
    """One latent for each row of `noise`."""
    return loc + np.exp(0.5 * log_var) * noise  # Eq. (eq-vae-sample)


def log_likelihood(decoder, z, x):
    r"""$\log p_\theta(x \mid z)$ of each image, in nats, summed over pixels: (B,)."""
    return np.sum(bernoulli_log_prob(decode(decoder, z), x), axis=-1)  # Eq. (eq-vae-likelihood)


def kl_to_prior(loc, log_var):
    r"""$\mathrm{KL}(q_\phi(z \mid x) \| N(0, I))$ of each image, in nats: (B,)."""
    return 0.5 * np.sum(np.exp(log_var) + loc * loc - 1 - log_var, axis=-1)  # Eq. (eq-vae-kl)


def elbo_terms(params, x, noise, encode=encode, log_lik=log_likelihood):
    """The two terms of the ELBO of each image, (B,) each: reconstruction (sampled), and KL."""
    loc, log_var = encode(params["encoder"], x)
    z = sample_latent(loc, log_var, noise)
    return log_lik(params["decoder"], z, x), kl_to_prior(loc, log_var)


def elbo(params, x, noise, beta=1.0, **model):
    """Estimator B of the ELBO of each image, in nats: (B,); `beta` weighs the KL term.

    `model` may hold another `encode` and `log_lik` than those above.
    """
    reconstruction, kl = elbo_terms(params, x, noise, **model)
    return reconstruction - beta * kl  # Eq. (eq-vae-b)


# %% [markdown]
# A small model in float64 serves all checks below. Its parameters are large on purpose, so that no
# term of the gradient is negligible.


# %%
def small_vae(seed, n_pixels=5, n_hidden=4, n_latents=2, B=6):
    """A random VAE in float64 with one hidden layer, a batch of images, and noise."""
    rng = np.random.default_rng(seed)
    params = vae_init(rng, n_pixels, [n_hidden], n_latents, np.float64)
    params = tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)
    x = rng.integers(0, 2, (B, n_pixels)).astype(float)
    return params, x, rng.standard_normal((B, n_latents))


def mean_elbo(params, x, noise):
    """What is maximised: the ELBO averaged over the batch."""
    return np.mean(elbo(params, x, noise))


def largest_gap(a, b):
    """Largest absolute difference between the leaves of two containers of arrays."""
    return max(np.max(np.abs(x - y)) for x, y in zip(tree.leaves(a), tree.leaves(b)))


def test_vae_gradient_by_hand_is_that_of_minigrad(record):
    params, x, noise = small_vae(0, n_pixels=30, n_hidden=20, n_latents=4, B=16)
    value, by_hand = elbo_grad_by_hand(params, x, noise)
    traced_value, traced = value_and_grad(mean_elbo)(params, x, noise)
    assert tree.paths(by_hand) == tree.paths(traced)
    gap = largest_gap(by_hand, traced)
    record("largest difference of the two gradients, float64", gap, limit=1e-10)
    assert abs(value - traced_value) < 1e-10 and gap < 1e-10
    assert min(np.max(np.abs(g)) for g in tree.leaves(traced)) > 1e-3  # nothing agrees by being 0


# %% [markdown]
# {prf:ref}`alg-vae-aevb` is one function. It returns the step that `minigrad.train.fit`
# repeats. The data sets of this book have grey pixels between 0 and 1; the model speaks of zeros
# and ones. So a grey value is taken for the probability of a one, and each time that an image is
# used its pixels are drawn anew. (This is *dynamic binarisation*. Where a data set comes with
# fixed bits, such as Larochelle's MNIST, `binarize` returns them as they are.)


# %%
def aevb_step(objective, optimizer, images, batch, n_latents, draw=binarize):
    """One round of the algorithm (alg-vae-aevb), up the mean of `objective(params, x, noise)`.

    `images` (N, ...) are grey; `draw(images, rng)` makes data of them. The state is
    {"params", "optimizer"}.
    """
    descend = value_and_grad(lambda params, x, noise: -np.mean(objective(params, x, noise)))

    def step(state, rng):
        rows = rng.integers(len(images), size=batch)
        x = draw(images[rows], rng)
        noise = random.normal(rng, (batch, n_latents), x.dtype)
        value, grads = descend(state["params"], x, noise)
        params, inner = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": params, "optimizer": inner}, {"objective": -value}

    return step


# %% [markdown]
# ### The autoencoder
#
# Take the noise and the KL term away. The encoder's location is the code, the decoder turns it back
# into an image, and the objective is the log-likelihood of the image itself:
#
# $$ \frac1B \sum_{\text{rows}} \log p_\theta(x \mid z), \qquad z = \mu . $$ (eq-vae-autoencoder)
#
# That is an *autoencoder*, older than the VAE and with the same decoder. It has no prior:
# nothing in {eq}`eq-vae-autoencoder` says where codes should lie.


# %%
def autoencoder_objective(params, x, _noise):
    """Log-likelihood of each image given its own code, in nats: (B,)."""
    code, _ = encode(params["encoder"], x)
    return log_likelihood(params["decoder"], code, x)  # Eq. (eq-vae-autoencoder)


# %% [markdown]
# ### Measuring a latent space
#
# "The VAE's latent space is well organised" is what pictures suggest. A few numbers make it a
# statement that can be false.
#
# *How far are the codes from the prior?* For points $z_1, \dots, z_n$ and the kernel
# $k(z, z') = e^{-|z - z'|^2/2}$, the squared maximum mean discrepancy to $N(0, I)$ is
#
# $$ \mathrm{MMD}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} k(z_i, z_j)
#    - \frac{2}{n} \sum_{i} 2^{-d/2} e^{-|z_i|^2/4} + 3^{-d/2} . $$ (eq-vae-mmd)
#
# The last two terms are $\mathbb{E}[k(z_i, z')]$ and $\mathbb{E}[k(z', z'')]$ for independent
# $z', z'' \sim N(0, I)$: the product of $d$ convolutions of Gaussians. Nothing has to be drawn from
# the prior. For independent codes the estimate is unbiased, and for codes that do follow the prior
# it is zero on average. It sees whether codes are far, hardly how far: codes that are wide and far
# from 0 read about $3^{-d/2}$. A distance to $N(0, I)$ blames the autoencoder for its *units*,
# which nobody fixed. So we measure it again after *whitening*, an affine map that gives the codes
# mean 0 and covariance $I$. What remains is shape. (The map is fitted to the very codes, so after
# it codes from the prior read a little below zero.)
#
# *Do neighbours share a digit?* The purity is the share of equal labels among the ten nearest
# neighbours of a code.
#
# *Does the decoder know what to do with a draw from the prior?* A classifier looks at decoded
# draws. We count how often it is sure: probability at least 0.9 for one of the ten digits. A model
# that makes the same perfect 2 each time would score 100 %, so we count the digits too: the
# exponential of the entropy of the classes over all draws is 10 if they are equally frequent and 1
# if there is only one. To be fair to the autoencoder, latents are drawn from $N(0, I)$ and, in a
# second count, from the Gaussian with the mean and the covariance of the codes.


# %%
def mmd2_to_prior(codes):
    """Squared maximum mean discrepancy of codes (n, d) to N(0, I): Eq. (eq-vae-mmd)."""
    codes = np.asarray(codes, np.float64)
    n, d = codes.shape
    squares = np.sum(codes**2, axis=1)
    kernel = np.exp(codes @ codes.T - 0.5 * (squares[:, None] + squares))
    pairs = (np.sum(kernel) - n) / (n * (n - 1))  # k(z, z) = 1
    return pairs - 2 * np.mean(np.exp(-squares / 4)) / 2 ** (d / 2) + 3 ** (-d / 2)


def whiten(codes):
    """The affine image of codes (n, d) with mean 0 and covariance I."""
    factor = np.linalg.cholesky(np.cov(codes.T))
    return np.linalg.solve(factor, (codes - codes.mean(0)).T).T


def purity(codes, labels, neighbours=10):
    """Share of the nearest neighbours of a code that have its label, averaged."""
    from scipy.spatial import cKDTree

    nearest = cKDTree(codes).query(codes, neighbours + 1)[1][:, 1:]  # without the code itself
    return np.mean(labels[nearest] == labels[:, None])


# %%
def class_log_probs(classifier, x):
    """Log-probabilities (B, 10) of the digits for grey images `x` (B, D)."""
    h = np.maximum(dense(classifier["hidden"], x), 0)
    return log_softmax(dense(classifier["logits"], h))


def train_classifier(images, labels, rng, n_hidden, steps, batch=100):
    """Fit a classifier with one hidden layer to grey images (N, D) with pixel noise of 0.2."""
    params = {
        "hidden": dense_init(rng, images.shape[1], n_hidden),
        "logits": dense_init(rng, n_hidden, 10),
    }
    optimizer = adam(cosine_decay(2e-3, steps))
    state = optimizer.init(params)

    def negative(params, x, y):
        return -np.mean(class_log_probs(params, x)[np.arange(batch), y])

    for _ in range(steps):
        rows = rng.integers(len(images), size=batch)
        x = images[rows] + 0.2 * random.normal(rng, (batch, images.shape[1]), np.float32)
        params, state = optimizer.update(grad(negative)(params, x, labels[rows]), state, params)
    return params


def accuracy(classifier, images, labels):
    """Share of images whose most probable class is their label."""
    return np.mean(np.argmax(class_log_probs(classifier, images), axis=1) == labels)


def share_recognised(classifier, images):
    """Share of images to which the classifier gives some digit a probability of at least 0.9."""
    return np.mean(np.max(class_log_probs(classifier, images), axis=1) >= np.log(0.9))


def effective_digits(classifier, images):
    """Exponential of the entropy of the classes over all images: 10 if all are equally frequent."""
    share = np.mean(np.exp(class_log_probs(classifier, images)), axis=0)
    return np.exp(-np.sum(share * np.log(share)))


# %%
def describe_plane(params, x, labels, classifier, rng, stochastic, draws=2000):
    """The numbers above, for a model and images `x` (n, D) of zeros and ones: a dict.

    The codes are draws from q(z | x) if `stochastic`, locations otherwise; purity is of locations.
    """
    loc, log_var = (np.asarray(a, np.float64) for a in encode(params["encoder"], x))
    codes = sample_latent(loc, log_var, rng.standard_normal(loc.shape)) if stochastic else loc
    prior = rng.standard_normal((draws, loc.shape[1]))
    fitted = codes.mean(0) + prior @ np.linalg.cholesky(np.cov(codes.T)).T
    found = {
        "mmd2": mmd2_to_prior(codes),
        "mmd2_whitened": mmd2_to_prior(whiten(codes)),
        "purity": purity(loc, labels),
    }
    for name, z in (("prior", prior), ("fitted", fitted)):
        images = expit(decode(params["decoder"], z.astype(x.dtype)))
        found[f"recognised_{name}"] = share_recognised(classifier, images)
        found[f"digits_{name}"] = effective_digits(classifier, images)
    return found


# %% [markdown]
# ### Convolutions
#
# A course assignment would have us write a convolutional VAE for MNIST, once for grey pixels and
# once for zeros and ones. Both have the same networks. The encoder shrinks the image with one
# strided convolution to a grid, $4 \times 4$ from the digits and $7 \times 7$ from MNIST, with a
# number of channels that is called its *capacity*. Then come *residual blocks*, each of
# which adds to its input a convolution of what is positive in it,
#
# $$ h \leftarrow h + \mathrm{conv}_{3 \times 3}\big( \max(h, 0) \big) , $$ (eq-vae-residual)
#
# and two linear layers, for $\mu$ and for $r$. The decoder goes back the same way. Its last layer
# is a transposed convolution with kernels as wide as the stride, so that each place of the grid
# paints a patch of its own; and each pixel has a bias. What comes out are the logits $a$, as
# before.
#
# Sizes and strides are read off the weights: nothing but the parameters has to be kept.

# %%
from minigrad.nn import conv2d, conv2d_init, conv2d_transpose, conv2d_transpose_init


def conv_vae_init(rng, size, capacity, depth, n_latents, dtype=np.float32):
    """Parameters {"encoder": phi, "decoder": theta} for images (1, size, size).

    The stride is 2 for images of at most 16 pixels a side, and 4 for larger ones.
    """
    stride = 4 if size > 16 else 2
    if size % stride:
        raise ValueError(f"images of {size} x {size} pixels do not divide into strides of {stride}")
    n_units = capacity * (size // stride) ** 2
    blocks = lambda: [conv2d_init(rng, capacity, capacity, 3, dtype) for _ in range(depth)]
    encoder = {
        "input": conv2d_init(rng, 1, capacity, 2 * stride - 1, dtype),
        "blocks": blocks(),
        "loc": dense_init(rng, n_units, n_latents, dtype),
        "log_var": dense_init(rng, n_units, n_latents, dtype),
    }
    decoder = {
        "input": dense_init(rng, n_latents, n_units, dtype),
        "blocks": blocks(),
        "output": conv2d_transpose_init(rng, capacity, 1, stride, dtype),
        "pixels": np.zeros((1, size, size), dtype),
    }
    return {"encoder": encoder, "decoder": decoder}


# %%
def residual_blocks(blocks, h):
    """The rectified end of a stack of blocks: `h` and the result (B, capacity, n, n)."""
    for block in blocks:
        h = h + conv2d(block, np.maximum(h, 0), padding=1)  # Eq. (eq-vae-residual)
    return np.maximum(h, 0)


def conv_features(encoder, x):
    """Last hidden units of the encoder for images `x` (B, 1, H, W), flat: (B, units)."""
    kernel = encoder["input"]["w"].shape[-1]
    h = conv2d(encoder["input"], x, stride=(kernel + 1) // 2, padding=kernel // 2)
    return np.reshape(residual_blocks(encoder["blocks"], h), (len(x), -1))


def conv_encode(encoder, x):
    r"""Location and log-variance, (B, d) each, of $q_\phi(z \mid x)$ for images (B, 1, H, W)."""
    h = conv_features(encoder, x)
    return dense(encoder["loc"], h), dense(encoder["log_var"], h)  # Eq. (eq-vae-encoder)


def conv_decode(decoder, z):
    """Logits (..., 1, H, W) of the pixels, for latents `z` (..., d)."""
    capacity, _, stride, _ = decoder["output"]["w"].shape
    grid = decoder["pixels"].shape[-1] // stride
    h = np.reshape(dense(decoder["input"], z), (-1, capacity, grid, grid))
    a = conv2d_transpose(decoder["output"], residual_blocks(decoder["blocks"], h), stride=stride)
    return np.reshape(a + decoder["pixels"], (*z.shape[:-1], *decoder["pixels"].shape))


# %% [markdown]
# The two likelihoods: {eq}`eq-vae-likelihood`, now summed over the axes of an image, and
# {eq}`eq-vae-grey` with its constant. Either makes a VAE of the functions above, for instance
# `elbo(params, x, noise, encode=conv_encode, log_lik=gaussian_log_lik)`. Estimator A, with its KL
# term at the sample, is written for them too; `hold=stop_gradient` drops the score term.


# %%
def bernoulli_log_lik(decoder, z, x):
    r"""$\log p_\theta(x \mid z)$ of images `x` (B, 1, H, W) of zeros and ones, nats: (..., B)."""
    return np.sum(bernoulli_log_prob(conv_decode(decoder, z), x), axis=(-3, -2, -1))


def gaussian_log_lik(decoder, z, x, scale=0.1):
    """The same for grey images, with noise of standard deviation `scale`; constant included."""
    mean = expit(conv_decode(decoder, z))
    return np.sum(normal_log_prob(x, mean, scale), axis=(-3, -2, -1))  # Eq. (eq-vae-grey)


def elbo_sampled(params, x, noise, encode=encode, log_lik=log_likelihood, hold=lambda p: p):
    """Estimator A of the ELBO of each image, in nats: (B,)."""
    loc, log_var = encode(params["encoder"], x)
    z = sample_latent(loc, log_var, noise)
    log_q = normal_log_prob(z, hold(loc), np.exp(0.5 * hold(log_var)))
    kl = np.sum(log_q - normal_log_prob(z, 0.0, 1.0), axis=-1)
    return log_lik(params["decoder"], z, x) - kl  # Eq. (eq-vae-a)


# %% [markdown]
# ### The best normal law for each image
#
# To tell the gaps of {eq}`eq-vae-gaps` apart we need $\mathcal{L}^*$: start from what the encoder
# says, and give every image its own ascent in its own $\mu$ and $r$, with the decoder held fixed.
# The expectation over $\varepsilon$ is a weighted sum, over nodes or over fresh draws.


# %%
def local_elbo(decoder, q, x, noise, weights, log_lik=log_likelihood):
    """ELBO (B,) of images with their own `q` = (loc, log_var); `noise` (n, 1 or B, d)."""
    return weights @ log_lik(decoder, sample_latent(*q, noise), x) - kl_to_prior(*q)


def best_in_family(decoder, q, x, draw, steps, log_lik=log_likelihood):
    """The (loc, log_var) with the highest ELBO of each image; `draw()` gives noise and weights."""
    descend = grad(lambda q, *sample: -np.sum(local_elbo(decoder, q, x, *sample, log_lik)))
    optimizer = adam(cosine_decay(0.05, steps))
    state = optimizer.init(q)
    for _ in range(steps):
        q, state = optimizer.update(descend(q, *draw()), state, q)
    return q


# %% [markdown]
# ## Checks
#
# ### The bound is a bound
#
# With a single latent, integrals over $z$ are sums over a grid. The trapezoidal rule on equidistant
# nodes,
#
# $$ \int f(z)\, N(z; 0, 1)\, dz \approx \sum_k \omega_k\, f(z_k), \qquad
#    \omega_k \propto e^{-z_k^2/2} , $$ (eq-vae-quadrature)
#
# is exact to rounding for such integrands: its error falls exponentially with the number of
# nodes. So a small model has an evidence {eq}`eq-vae-evidence` that we *know*, and an ELBO whose
# expectation over $\varepsilon$ we know too. The bound
# {eq}`eq-vae-elbo` must hold for every image and every encoder. And the gap must be the divergence
# to the posterior, which the test computes from the densities themselves.

# %%
from minigrad.check import check_grads
from minigrad.special import logsumexp


def normal_nodes(n=801):
    """Nodes and weights of Eq. (eq-vae-quadrature): (n,) each."""
    nodes = np.linspace(-10, 10, n)
    weights = np.exp(-0.5 * nodes**2)
    return nodes, weights / np.sum(weights)


def normal_grid(d, n=801):
    """The same for d latents: nodes (n^d, 1, d) and weights (n^d,)."""
    nodes, weights = normal_nodes(n)
    grid = np.stack(np.meshgrid(*d * [nodes]), axis=-1).reshape(-1, 1, d)
    return grid, np.prod(np.meshgrid(*d * [weights]), axis=0).ravel()


def log_evidence(decoder, x, grid=None):
    """log p(x) of each image by quadrature: (B,); `grid` is `normal_grid(1)` if not given."""
    z, weights = grid or normal_grid(1)
    log_p = log_likelihood(decoder, z, x)  # (n, B)
    return logsumexp(log_p + np.log(weights)[:, None], axis=0)  # Eq. (eq-vae-evidence)


def expected(estimator, params, x):
    """Expectation of `estimator(params, x, noise)` over noise, with one latent: (B,)."""
    nodes, weights = normal_nodes()
    return weights @ estimator(params, x, nodes[:, None, None])


def test_vae_elbo_is_below_the_evidence_by_the_divergence_to_the_posterior(record):
    z = np.linspace(-40, 40, 20_001)
    smallest, error = np.inf, 0.0
    for seed in range(20):
        params, x, _ = small_vae(seed, n_latents=1, B=8)
        gap = log_evidence(params["decoder"], x) - expected(elbo, params, x)
        log_joint = log_likelihood(params["decoder"], z[:, None, None], x).T  # (B, n)
        log_joint = log_joint + normal_log_prob(z, 0.0, 1.0)
        log_posterior = log_joint - np.log(np.trapezoid(np.exp(log_joint), z))[:, None]
        loc, log_var = encode(params["encoder"], x)
        log_q = normal_log_prob(z, loc, np.exp(0.5 * log_var))
        kl = np.trapezoid(np.exp(log_q) * (log_q - log_posterior), z)
        smallest, error = min(smallest, gap.min()), max(error, np.max(np.abs(gap - kl)))
    record("smallest gap between log-evidence and ELBO, 160 images, nats", smallest, limit=0)
    record("largest difference between gap and divergence to the posterior", error, limit=1e-6)
    assert smallest > 0 and error < 1e-6


# %% [markdown]
# ### The two gradients
#
# Eq. {eq}`eq-vae-split`: exact zeros in the decoder, and a sum in the encoder.


# %%
@claim("B12")
def test_vae_decoder_gets_gradient_from_the_reconstruction_only(record):
    params, x, noise = small_vae(1)
    whole = grad(mean_elbo)(params, x, noise)
    reconstruction, kl = (
        grad(lambda p, term=term: np.mean(elbo_terms(p, x, noise)[term]))(params) for term in (0, 1)
    )
    size = lambda part: max(np.max(np.abs(g)) for g in tree.leaves(part))
    record("largest gradient of the KL term in the decoder", size(kl["decoder"]), limit=0)
    record("largest gradient of the KL term in the encoder", size(kl["encoder"]))
    record("largest gradient of the reconstruction in the encoder", size(reconstruction["encoder"]))
    assert size(kl["decoder"]) == 0
    assert min(size(kl["encoder"]), size(reconstruction["encoder"])) > 0.01
    assert largest_gap(whole["decoder"], reconstruction["decoder"]) < 1e-14
    both = tree.map(np.subtract, reconstruction["encoder"], kl["encoder"])
    assert largest_gap(whole["encoder"], both) < 1e-14  # Eq. (eq-vae-split)


# %% [markdown]
# ### Rate and distortion
#
# {prf:ref}`prop-vae-trade` speaks of minima, and training only comes near one. Whether it comes
# near enough for this to be seen on *test* images is a question for an experiment: eight VAEs on
# digits, equal but for $\beta$ ({numref}`fig-rate-distortion`). Only at $\beta = 1$ is $-(V + R)$
# what was maximised; it is the ELBO, a bound of the log-likelihood, for all of them.

# %%
from chapters import records


def rate_distortion():
    """Weights, rates and distortions of the recorded run: (8,) each, in nats per image."""
    run = records.load("rate_distortion_digits")
    betas = run["config"]["betas"]
    rates, distortions = (
        np.array([run["scalars"][f"{kind}_{beta}"] for beta in betas])
        for kind in ("rate", "distortion")
    )
    return np.array(betas), rates, distortions


@claim("B12")
def test_vae_weight_of_the_kl_trades_rate_against_distortion(record):
    betas, rates, distortions = rate_distortion()
    assert np.all(np.diff(betas) > 0) and len(betas) == 8
    used = betas <= 4  # beyond, the latents carry nothing and all models are one
    drops, rises = -np.diff(rates[used]), np.diff(distortions[used])
    assert rates[~used].max() < 0.01
    record("smallest fall of the rate from one weight to the next, nats", drops.min(), limit=0)
    record("smallest rise of the distortion, nats", rises.min(), limit=0)
    assert drops.min() > 0 and rises.min() > 0
    exchange = rises / drops
    inside = (betas[used][:-1] < exchange) & (exchange < betas[used][1:])
    record("exchange rates between the two weights, as proved, share", np.mean(inside))
    assert np.all(inside)  # Eq. (eq-vae-exchange)
    best = betas[np.argmin(rates + distortions)]
    record("weight with the highest test ELBO", best)
    assert best == 1.0


# %% [markdown]
# ### The two variances
#
# With one latent, means and variances of gradients are integrals over one $\varepsilon$. Quadrature
# gives them, for the gradients that minigrad takes. A, B and STL must agree in the mean, and A and
# STL must have the variances {eq}`eq-vae-stl-variance` at every $\gamma$ and $\delta$.


# %%
def elbo_a(phi, noise, log_lik, hold=lambda p: p):
    """Estimator A for one scalar latent, `phi` = (loc, log_scale); `noise` (n,), result (n,)."""
    loc, log_scale = phi
    z = loc + np.exp(log_scale) * noise
    log_q = normal_log_prob(z, hold(loc), np.exp(hold(log_scale)))
    return log_lik(z) + normal_log_prob(z, 0.0, 1.0) - log_q  # Eq. (eq-vae-a)


def elbo_b(phi, noise, log_lik):
    """Estimator B, likewise."""
    loc, log_scale = phi
    kl = 0.5 * (np.exp(2 * log_scale) + loc * loc - 1) - log_scale
    return log_lik(loc + np.exp(log_scale) * noise) - kl  # Eq. (eq-vae-b)


def elbo_stl(phi, noise, log_lik):
    """Estimator A with parameters held fixed in the density: its gradient is Eq. (eq-vae-stl)."""
    return elbo_a(phi, noise, log_lik, hold=stop_gradient)


def gradient_moments(estimator, phi, log_lik):
    """Exact mean and variance over the noise of the gradient in (loc, log_scale): (2,) each."""
    nodes, weights = normal_nodes()
    each = tuple(np.full(nodes.shape, p, float) for p in phi)  # one copy per node
    gradients = np.stack(grad(lambda phi: np.sum(estimator(phi, nodes, log_lik)))(each))
    mean = gradients @ weights
    return mean, (gradients - mean[:, None]) ** 2 @ weights


X, SLOPE, NOISE_SCALE = 1.3, 0.9, 0.6  # x, w and tau of the linear model
POSTERIOR_VAR = 1 / (1 + SLOPE**2 / NOISE_SCALE**2)  # Eq. (eq-vae-linear)
POSTERIOR_LOC = POSTERIOR_VAR * SLOPE * X / NOISE_SCALE**2


def linear_log_lik(z):
    """log p(x | z) of the linear model at x = X."""
    return normal_log_prob(X, SLOPE * z, NOISE_SCALE)


def at(gamma, delta=0.0):
    """The parameters (loc, log_scale) with these ratios to the posterior."""
    loc = POSTERIOR_LOC + delta * np.sqrt(POSTERIOR_VAR)
    return loc, 0.5 * np.log(gamma * POSTERIOR_VAR)


@claim("B15")
def test_vae_sticking_the_landing_has_no_variance_at_the_posterior_and_more_elsewhere(record):
    def exact_variances(gamma, delta):  # Eq. (eq-vae-stl-variance), in (loc, log_scale)
        shift = gamma * delta**2
        a = gamma / POSTERIOR_VAR, shift + 2 * gamma**2
        return a, ((1 - gamma) ** 2 / gamma / POSTERIOR_VAR, shift + 2 * (1 - gamma) ** 2)

    for gamma, delta in [(0.1, 0.0), (0.4, -0.7), (0.5, 0.3), (0.9, 0.0), (1.0, 0.0), (2.5, 1.1)]:
        means, variances = zip(
            *(gradient_moments(e, at(gamma, delta), linear_log_lik) for e in (elbo_a, elbo_stl))
        )
        np.testing.assert_allclose(means[0], means[1], atol=1e-11)  # dropping the score: no bias
        np.testing.assert_allclose(variances, exact_variances(gamma, delta), rtol=1e-9, atol=1e-20)
    plain = gradient_moments(elbo_a, at(1.0), linear_log_lik)[1]
    stuck = gradient_moments(elbo_stl, at(1.0), linear_log_lik)[1]
    record("largest variance at the posterior, score term dropped", stuck.max(), limit=1e-20)
    record("the same with the score term", plain.max())
    assert stuck.max() < 1e-20 < 1 < plain.max()
    plain, stuck = (gradient_moments(e, at(0.25), linear_log_lik)[1] for e in (elbo_a, elbo_stl))
    record("variance without / with score term, q of a quarter of the variance", max(stuck / plain))
    np.testing.assert_allclose(stuck / plain, 9.0)


def test_vae_sticking_the_landing_helps_at_the_best_independent_q():
    def value(loc, noise, held, precision, scale):
        z = loc + scale * noise
        return -0.5 * z @ precision @ z - np.sum(normal_log_prob(z, held(loc), scale))

    for rho in (0.0, 0.3, -0.9):
        precision = np.linalg.inv([[1.0, 2 * rho], [2 * rho, 4.0]])
        scale = np.diag(precision) ** -0.5  # Eq. (eq-elbo-factor-normal)
        for held, factor in ((lambda loc: loc, 1 + rho**2), (stop_gradient, rho**2)):
            columns = [  # the gradient is linear in the noise
                grad(value)(np.zeros(2), noise, held, precision, scale) for noise in np.eye(2)
            ]
            variance = np.sum(np.square(columns), axis=0)  # Eq. (eq-vae-stl-independent)
            np.testing.assert_allclose(variance, factor * np.diag(precision), atol=1e-14)


def test_vae_value_of_estimator_a_at_the_posterior_is_the_evidence_for_any_noise():
    noise = np.array([-6.0, -1.0, 0.0, 0.3, 5.0])
    exact = normal_log_prob(X, 0.0, np.hypot(SLOPE, NOISE_SCALE))
    np.testing.assert_allclose(elbo_a(at(1.0), noise, linear_log_lik), exact, rtol=1e-13)
    nodes, weights = normal_nodes()
    assert weights @ elbo_b(at(1.0), nodes, linear_log_lik) == pytest.approx(exact, rel=1e-12)
    assert np.ptp(elbo_b(at(1.0), noise, linear_log_lik)) > 1  # B is exact on average only


def test_vae_estimators_a_b_and_stl_have_one_mean_gradient():
    params, x, _ = small_vae(2, n_latents=1, B=4)
    for image in x:
        log_lik = lambda z, image=image: log_likelihood(params["decoder"], z[:, None], image)
        a, b, stl = (
            gradient_moments(e, (0.4, -0.3), log_lik)[0] for e in (elbo_a, elbo_b, elbo_stl)
        )
        np.testing.assert_allclose(a, b, atol=1e-7)
        np.testing.assert_allclose(a, stl, atol=1e-7)


# %% [markdown]
# ### Networks of convolutions
#
# Sizes first: latents may have any leading axes, for several samples per image. Then finite
# differences of the whole ELBO, and the normal likelihood with its constant against SciPy's. What
# the networks have learnt from MNIST is in {numref}`fig-conv-samples`.

# %%
from scipy import stats


def small_conv_vae(seed, size=8):
    """A random convolutional VAE in float64, images of zeros and ones, and noise."""
    rng = np.random.default_rng(seed)
    params = conv_vae_init(rng, size, 3, 2, 2, np.float64)
    params = tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), params)
    x = rng.integers(0, 2, (3, 1, size, size)).astype(float)
    return params, x, rng.standard_normal((3, 2))


@pytest.mark.parametrize("size", [8, 28])
def test_vae_convolutions_keep_leading_axes_and_every_pixel_answers(size):
    params, x, noise = small_conv_vae(5, size)
    loc, log_var = conv_encode(params["encoder"], x)
    assert loc.shape == log_var.shape == (3, 2)
    z = sample_latent(loc, log_var, np.stack([noise, -noise]))
    logits = conv_decode(params["decoder"], z)
    assert logits.shape == (2, 3, 1, size, size)
    np.testing.assert_allclose(conv_decode(params["decoder"], z[1]), logits[1], rtol=1e-12)
    np.testing.assert_allclose(conv_encode(params["encoder"], x[1:2])[0], loc[1:2], rtol=1e-12)
    assert np.ptp(logits.reshape(6, -1), axis=0).min() > 1e-6  # no pixel is deaf to z
    seen = grad(lambda x: np.sum(conv_encode(params["encoder"], x)[0]))(x)
    assert np.abs(seen).sum(0).min() > 1e-6  # and none is overlooked by the encoder
    with pytest.raises(ValueError, match="9 x 9"):
        conv_vae_init(np.random.default_rng(0), 9, 3, 2, 2)


@pytest.mark.parametrize("log_lik", [bernoulli_log_lik, gaussian_log_lik])
def test_vae_convolutional_elbo_has_the_gradient_of_its_finite_differences(log_lik):
    params, x, noise = small_conv_vae(6)
    zero = tree.map(np.zeros_like, params)

    def near(step):  # so near that no rectifier switches
        moved = tree.map(lambda p, v: p + 1e-4 * v, params, step)
        return 1e4 * np.mean(elbo(moved, x, noise, encode=conv_encode, log_lik=log_lik))

    check_grads(near, (zero,), order=1)


def test_vae_bernoulli_likelihood_of_images_is_a_sum_over_pixels():
    params, x, _ = small_conv_vae(7)
    z = np.random.default_rng(8).standard_normal((4, 3, 2))
    exact = stats.bernoulli(expit(conv_decode(params["decoder"], z))).logpmf(x).sum((-3, -2, -1))
    np.testing.assert_allclose(bernoulli_log_lik(params["decoder"], z, x), exact, rtol=1e-12)


@claim("R6")
def test_vae_gaussian_likelihood_holds_its_constant(record):
    params, x, _ = small_conv_vae(7)
    z = np.random.default_rng(8).standard_normal((4, 3, 2))
    mean = expit(conv_decode(params["decoder"], z))
    exact = stats.norm(mean, 0.1).logpdf(x).sum((-3, -2, -1))
    np.testing.assert_allclose(gaussian_log_lik(params["decoder"], z, x), exact, rtol=1e-12)
    for pixels, nats in ((64, 88.6), (784, 1085)):
        constant = -pixels / 2 * np.log(2 * np.pi * 0.1**2)
        record(f"constant -D/2 log 2 pi s^2, {pixels} pixels, s = 0.1, nats", constant)
        assert constant == pytest.approx(nats, abs=0.3)
    bare = -np.sum((x - mean) ** 2, axis=(-3, -2, -1))  # the sum of squares, by itself
    assumed = gaussian_log_lik(params["decoder"], z, x, np.sqrt(0.5))
    np.testing.assert_allclose(assumed - bare, -32 * np.log(np.pi), rtol=1e-12)


# %% [markdown]
# ### The KL term, in closed form or at the sample
#
# Estimators A and B have the same mean, for whole networks too. With one latent that is an
# integral over $\varepsilon$, and so is the mean of each gradient, with the score term or without.
#
# Does the choice matter for the result? Five pairs of convolutional VAEs learn grey digits. The two
# of a pair start from the same parameters and see the same batches and the same noise; one has the
# KL term {eq}`eq-vae-kl`, the other leaves it to the sample ({numref}`fig-kl-closed-or-sampled`).
# It does not: the means differ by 0.04 nats, with a standard error of 0.03, while from seed to seed
# the test ELBO moves by one. Nor does the gradient change much. Without a closed form the variance
# of the encoder's part is 22 % higher early in training and 4 % at its end. The noise comes from
# the reconstruction. What does help is to drop the score term: that leaves 65 % of the variance of
# the closed form early on, and 40 % at the end. As {eq}`eq-vae-stl-independent` says, it is not
# zero where $q$ cannot be the posterior.
#
# The average test ELBO is 12.4 nats, constant included; without it the same models would print
# −76.2.


# %%
def recorded_conv_params(name):
    """Parameters of a recorded convolutional VAE, as `conv_vae_init` returns them."""
    run = records.load(name)
    sizes = (run["config"][key] for key in ("capacity", "depth", "latents"))
    side = run["arrays"]["params/decoder/pixels"].shape[-1]
    like = conv_vae_init(np.random.default_rng(0), side, *sizes)
    leaves = [run["arrays"][f"params/{path}"] for path in tree.paths(like)]
    return tree.unflatten(tree.flatten(like)[1], leaves)


@claim("R6")
@pytest.mark.parametrize("name", ["conv_gaussian_digits", "conv_gaussian_mnist"])
def test_vae_convolutional_model_of_grey_pixels_learns(name, record):
    run = records.load(name)
    curve = run["curves"]["closed_test_elbo"]["values"]
    pixels = run["arrays"]["samples"].shape[1]
    constant = -pixels / 2 * np.log(2 * np.pi * run["config"]["pixel_scale"] ** 2)
    record(f"{name}: test ELBO, constant in the number, nats", curve[-1])
    record(f"{name}: test ELBO without the constant, nats", curve[-1] - constant)
    record(f"{name}: KL term, nats", run["scalars"]["closed_test_kl"])
    assert curve[-1] > curve[0] + 20 and curve[-1] > max(curve) - 5


@pytest.mark.parametrize(
    "name, floor", [("conv_discrete_digits", -23.5), ("conv_discrete_binarized_mnist", -105.0)]
)
def test_vae_convolutional_model_of_zeros_and_ones_learns(name, floor, record):
    run = records.load(name)
    record(f"{name}: test ELBO, nats", run["scalars"]["test_elbo"], limit=floor)
    assert run["scalars"]["test_elbo"] > floor
    part = run["arrays"]["test_encoder_elbo"], run["arrays"]["test_log_evidence"]
    params = recorded_conv_params(name)
    x = (run["arrays"]["originals"] > 127).astype(np.float32)
    x = x.reshape(-1, *params["decoder"]["pixels"].shape)
    loc, _ = conv_encode(params["encoder"], x)
    means = 255 * expit(conv_decode(params["decoder"], loc)).reshape(len(x), -1)
    np.testing.assert_allclose(means, run["arrays"]["reconstructions"], atol=0.6)
    assert np.all(part[0] < part[1])


@pytest.mark.parametrize("hold", [lambda p: p, stop_gradient])
def test_vae_elbo_with_its_kl_term_at_the_sample_has_the_same_mean_and_gradient(hold):
    params, x, _ = small_vae(9, n_latents=1, B=4)
    sampled = lambda *args: elbo_sampled(*args, hold=hold)
    (value, gradient), (exact, exact_gradient) = (
        value_and_grad(lambda p, f=f: np.mean(expected(f, p, x)))(params) for f in (sampled, elbo)
    )
    assert value == pytest.approx(exact, rel=1e-12)
    assert largest_gap(gradient, exact_gradient) < 1e-9
    assert np.ptp(sampled(params, x[:1], np.array([[[-1.0]], [[2.0]]]))) > 0.1


def test_vae_sampled_elbo_with_its_density_held_has_no_gradient_at_the_posterior():
    q = np.full((3, 1), POSTERIOR_LOC), np.full((3, 1), np.log(POSTERIOR_VAR))
    noise = np.array([[-1.2], [0.3], [2.0]])
    log_lik = lambda _, z, x: np.sum(linear_log_lik(z), axis=-1)

    def gradient(**hold):  # the encoder is q itself
        model = {"encode": lambda q, _: q, "log_lik": log_lik, **hold}
        params = lambda q: {"encoder": q, "decoder": None}
        return grad(lambda q: np.sum(elbo_sampled(params(q), X, noise, **model)))(q)

    assert max(np.max(np.abs(g)) for g in gradient(hold=stop_gradient)) < 1e-12
    assert min(np.max(np.abs(g)) for g in gradient()) > 0.1


@claim("R7")
def test_vae_closed_form_and_sampled_kl_term_reach_the_same_test_elbo(record):
    run = records.load("conv_gaussian_digits")
    closed, sampled = (run["arrays"][f"{name}_test_elbo"] for name in ("closed", "sampled"))
    constant = -32 * np.log(2 * np.pi * run["config"]["pixel_scale"] ** 2)
    difference = closed - sampled
    error = np.std(difference, ddof=1) / np.sqrt(len(difference))
    record("test ELBO, KL term in closed form, 5 seeds, nats", closed.mean())
    record("test ELBO, KL term at the sample, 5 seeds, nats", sampled.mean())
    record("closed form minus sampled, mean of 5 pairs, nats", difference.mean())
    record("its standard error", error)
    record("test ELBO without the constant, closed form", closed.mean() - constant)
    assert abs(difference.mean()) < 3 * error < 0.1
    assert closed.std(ddof=1) > 1  # from seed to seed
    assert (closed.mean(), closed.mean() - constant) == pytest.approx((12.4, -76.2), abs=0.1)


@claim("R7")
def test_vae_variance_of_the_gradient_with_and_without_closed_form(record):
    curves = records.load("conv_gaussian_digits")["curves"]
    closed, sampled, no_score = (
        np.array(curves[f"{name}_variance"]["values"])
        for name in ("closed", "sampled", "sampled_no_score")
    )
    for name, other in (("sampled", sampled), ("score term dropped", no_score)):
        record(f"variance of the encoder's gradient, {name} / closed form", (other / closed)[-1])
    assert np.all(sampled > closed) and np.all(no_score < 0.7 * closed)
    assert (sampled / closed)[[0, -1]] == pytest.approx([1.22, 1.04], abs=0.01)
    assert (no_score / closed)[[0, -1]] == pytest.approx([0.65, 0.40], abs=0.01)


# %% [markdown]
# ### Gaps, told apart
#
# First where everything is known: a linear model with two latents and three pixels has the gap
# {eq}`eq-vae-approximation-gap`, and a small network has gaps that quadrature in the plane can add
# up. The parts are what {eq}`eq-vae-gaps` says, and their sum is the divergence to the posterior.


# %%
def test_vae_best_law_of_the_linear_model_and_its_gap(record):
    rng = np.random.default_rng(13)
    slopes, noise_scale = rng.standard_normal((2, 3)), 1.2
    x = rng.standard_normal((4, 3))
    log_lik = lambda slopes, z, x: np.sum(normal_log_prob(x, z @ slopes, noise_scale), axis=-1)
    start = np.zeros((4, 2)), np.full((4, 2), -1.5)
    grid = normal_grid(2, 21)
    loc, log_var = best_in_family(slopes, start, x, lambda: grid, 400, log_lik)
    precision = np.eye(2) + slopes @ slopes.T / noise_scale**2
    exact = np.linalg.solve(precision, slopes @ x.T / noise_scale**2).T
    np.testing.assert_allclose(loc, exact, atol=1e-3)
    np.testing.assert_allclose(np.exp(-log_var), [np.diag(precision)] * 4, rtol=1e-3)
    marginal = stats.multivariate_normal(
        np.zeros(3), slopes.T @ slopes + noise_scale**2 * np.eye(3)
    )
    gap = marginal.logpdf(x) - local_elbo(slopes, (loc, log_var), x, *grid, log_lik)
    rho = precision[0, 1] / np.sqrt(np.prod(np.diag(precision)))
    record("approximation gap of a linear model, nats", gap[0])
    np.testing.assert_allclose(gap, -0.5 * np.log1p(-(rho**2)), atol=1e-4)
    assert gap[0] > 0.1


def test_vae_best_law_is_found_with_two_fresh_draws_at_every_step():
    rng, B = np.random.default_rng(14), 300
    log_lik = lambda _, z, x: np.sum(normal_log_prob(x, SLOPE * z, NOISE_SCALE), axis=-1)
    draw = lambda: (rng.standard_normal((2, B, 1)), np.full(2, 0.5))
    start = np.zeros((B, 1)), np.zeros((B, 1))
    loc, log_var = best_in_family(None, start, np.full((B, 1), X), draw, 400, log_lik)
    in_loc = (loc - POSTERIOR_LOC) / np.sqrt(POSTERIOR_VAR)
    in_scale = 0.5 * (log_var - np.log(POSTERIOR_VAR))
    assert max(np.mean(in_loc**2), np.mean(in_scale**2)) < 0.1**2


@claim("B19")
def test_vae_gaps_are_not_negative_and_add_up_to_the_divergence(record):
    params, x, _ = small_vae(11, B=5)
    decoder, nodes = params["decoder"], normal_grid(2, 41)
    q = encode(params["encoder"], x)
    best = best_in_family(decoder, q, x, lambda: nodes, 300)
    log_p = log_evidence(decoder, x, normal_grid(2, 161))
    best_elbo, encoder_elbo = (local_elbo(decoder, law, x, *nodes) for law in (best, q))
    z = sample_latent(*q, nodes[0])  # (n, B, d): log q - log posterior, averaged over q
    log_q = np.sum(normal_log_prob(z, q[0], np.exp(0.5 * q[1])), axis=-1)
    log_joint = log_likelihood(decoder, z, x) + np.sum(normal_log_prob(z, 0.0, 1.0), axis=-1)
    divergence = nodes[1] @ (log_q - log_joint) + log_p
    approximation, amortisation = log_p - best_elbo, best_elbo - encoder_elbo
    np.testing.assert_allclose(approximation + amortisation, divergence, atol=1e-8)
    record("smallest approximation gap of 5 images, nats", approximation.min(), limit=0)
    record("smallest amortisation gap of 5 images, nats", amortisation.min(), limit=0)
    assert min(approximation.min(), amortisation.min()) > 0
    moved = tree.map(lambda p: p + 0.05, best)
    assert np.all(local_elbo(decoder, moved, x, *nodes) < best_elbo)


# %% [markdown]
# The ascent must not see the draws that judge it. Fix a few draws, climb on them and report the
# height reached: the law learns the draws by heart, and for some images the "ELBO" exceeds the
# log-evidence.


# %%
def test_vae_law_fitted_to_a_few_fixed_draws_pretends_to_beat_the_evidence():
    params, x, _ = small_vae(11, B=5)
    decoder = tree.map(lambda p: 2 * p, params["decoder"])
    few = np.random.default_rng(12).standard_normal((3, 5, 2)), np.full(3, 1 / 3)
    q = best_in_family(decoder, encode(params["encoder"], x), x, lambda: few, 300)
    log_p = log_evidence(decoder, x, normal_grid(2, 161))
    assert np.sum(local_elbo(decoder, q, x, *few) > log_p + 0.2) == 3
    assert np.all(local_elbo(decoder, q, x, *normal_grid(2, 41)) < log_p)


# %% [markdown]
# Now trained models, of digits as zeros and ones ({numref}`fig-gaps`). Three have two latents;
# their evidence is an integral over the plane. One is the convolutional VAE with 20 latents; its
# evidence is estimated by importance sampling from the best $q$, of which Chapter 6 speaks. (The
# 2,000 draws are worth 960 on average for a test image, 930 for a training image.) The ascent to
# the best $q$ starts from the encoder's, with fresh draws at every step.
#
# With two latents the encoder is to blame for most of the gap: 0.25 of 0.33 nats on test images.
# With 20 the parts are equal, 0.29 nats each. Nothing here says that the encoders learn by heart:
# on the training images the gaps are as large or larger. An average hides the odd image: for one
# of the test digits one of the encoders answers so far off that it costs 4.2 nats.


# %%
def gaps_of(run, part):
    """Approximation and amortisation gaps in a record, by (model and) image."""
    names = (f"{part}_{name}" for name in ("log_evidence", "best_elbo", "encoder_elbo"))
    log_p, best, encoder = (records.load(run)["arrays"][name] for name in names)
    return log_p - best, best - encoder


@claim("B19")
def test_vae_gaps_of_trained_models_on_training_and_test_digits(record):
    found = {}
    for run, d in (("gaps_digits", 2), ("conv_discrete_digits", 20)):
        for part in ("train", "test"):
            approximation, amortisation = gaps_of(run, part)
            record(f"approximation gap, {d} latents, {part} images, nats", approximation.mean())
            record(f"amortisation gap, {d} latents, {part} images, nats", amortisation.mean())
            assert approximation.min() > 0 and amortisation.min() > 0
            found[d, part] = approximation.mean(), amortisation.mean()
    assert found[2, "test"] == pytest.approx((0.086, 0.247), abs=0.001)
    assert found[20, "test"] == pytest.approx((0.29, 0.29), abs=0.01)
    assert all(sum(found[d, "train"]) > sum(found[d, "test"]) - 0.01 for d in (2, 20))
    assert np.max(gaps_of("gaps_digits", "test")[1]) == pytest.approx(4.21, abs=0.01)
    size = records.load("conv_discrete_digits")["scalars"]["test_gaps_sample_size"]
    record("effective sample size of 2,000 importance samples", size)
    assert 900 < size < 1000


# %% [markdown]
# ### Training, and what a VAE has that an autoencoder lacks
#
# First in seconds, on digits: a VAE and an autoencoder, equal in everything but the objective.
# What is the least that a VAE must beat? A decoder that ignores $z$. Its best pixel means are the
# averages of the training images, and its log-likelihood needs no bound (exercise 5). Longer runs,
# with 20 latents, are recorded ({numref}`fig-elbo-curves`). On MNIST with Larochelle's fixed
# binarisation, the test ELBO is −101.1 nats after 20,000 steps of 100 images. The training images
# are ahead by 1.9 nats, and their lead still grows. It is tempting to say that fixed bits can be
# learnt by heart; but the VAE with two latents, which sees fresh bits of MNIST at every step, ends
# with a lead of 1.8. On digits the *test* images are ahead, by 0.3. There both parts are binarised
# by draws that training never saw, and the two sets of 297 images are not equally easy.

# %%
from minigrad.data import digits
from minigrad.train import fit


def rows_of(images):
    """Images (N, 1, H, W) as rows (N, D)."""
    return images.reshape(len(images), -1)


def quick_model(objective, steps=1500, n_latents=2):
    """Parameters trained on digits for a few seconds."""
    rng = np.random.default_rng(0)
    params = vae_init(rng, 64, [64], n_latents)
    optimizer = adam(cosine_decay(5e-3, steps))
    state = {"params": params, "optimizer": optimizer.init(params)}
    step = aevb_step(objective, optimizer, rows_of(digits().x_train), 100, n_latents)
    return fit(step, state, steps, rng, progress=False)[0]["params"]


@pytest.fixture(scope="module")
def quick_models():
    """A VAE and an autoencoder with two latents, on digits."""
    return {"vae": quick_model(elbo), "autoencoder": quick_model(autoencoder_objective)}


@pytest.fixture(scope="module")
def held_out():
    """The test digits, binarised once: (297, 64)."""
    return binarize(rows_of(digits().x_test), np.random.default_rng(1))


def log_likelihood_without_latents(images, x):
    """Mean log-likelihood of images `x` (n, D) if each pixel has its mean over `images` (N, D)."""
    mean = np.clip(images.mean(0, dtype=np.float64), 1e-3, 1 - 1e-3)
    return np.mean(np.sum(x * np.log(mean) + (1 - x) * np.log1p(-mean), axis=1))


@claim("R4")
def test_vae_trains_on_digits_in_seconds(quick_models, held_out, record):
    rng = np.random.default_rng(2)
    noise = random.normal(rng, (200, len(held_out), 2), np.float32)
    x = held_out.astype(np.float32)
    values = [np.mean(elbo(quick_models["vae"], x, n)) for n in noise]
    floor = log_likelihood_without_latents(rows_of(digits().x_train), held_out)
    record("test ELBO on digits, 2 latents, 1,500 steps, nats", np.mean(values), limit=floor)
    assert np.mean(values) > floor + 2


@claim("R4")
@pytest.mark.parametrize(
    "name, floor", [("vae20_digits", -25.0), ("vae20_binarized_mnist", -105.0)]
)
def test_vae_elbo_rises_on_training_and_test_images(name, floor, record):
    run = records.load(name)
    for part in ("train", "test"):
        curve = run["curves"][f"{part}_elbo"]
        steps, values = np.array(curve["steps"]), np.array(curve["values"])
        record(f"{name}: {part} ELBO after {steps[-1]:,} steps, nats", values[-1])
        assert values[-1] > values[0] + 1 and np.all(np.isfinite(values))
        assert values[-1] > values.max() - 1  # and it has not fallen again: no overfitting yet
    gap = run["scalars"]["train_elbo"] - run["scalars"]["test_elbo"]
    record(f"{name}: train minus test ELBO, nats", gap)
    assert run["scalars"]["test_elbo"] > floor


def test_vae_lead_of_the_training_images_does_not_need_fixed_bits(record):
    leads = {}
    for name in ("vae20_digits", "vae20_binarized_mnist", "vae2_mnist"):
        train, test = (
            np.array(records.load(name)["curves"][f"{part}_elbo"]["values"])
            for part in ("train", "test")
        )
        leads[name] = train - test
    record("lead of the training images, MNIST, fresh bits, nats", leads["vae2_mnist"][-1])
    assert leads["vae20_digits"][-1] < 0 and leads["vae2_mnist"][-1] > 1.5
    grown = leads["vae20_binarized_mnist"]
    assert grown[-1] > 1.5 and np.polyfit(np.arange(10), grown[-10:], 1)[0] > 0


# %% [markdown]
# Now the two planes ({numref}`fig-latent-planes`; what the VAE's decoder makes of its plane is in
# {numref}`fig-manifold`). First the instruments: each must read what is
# known before it is pointed at something unknown. For codes drawn from $N(c, I)$ the expectation of
# {eq}`eq-vae-mmd` is $2 \cdot 3^{-d/2} (1 - e^{-|c|^2/6})$, zero at the prior.

# %%
from minigrad.check import check_unbiased


def test_vae_discrepancy_is_unbiased_and_zero_at_the_prior():
    rng = np.random.default_rng(3)
    for centre in (np.zeros(2), np.array([1.0, -0.5])):
        exact = 2 / 3 * (1 - np.exp(-np.sum(centre**2) / 6))
        codes = centre + rng.standard_normal((9000, 30, 2))
        found = np.array([mmd2_to_prior(z) for z in codes])
        check_unbiased(found, exact, scale=0.1)


def test_vae_discrepancy_of_codes_from_the_prior_scatters_as_the_text_says(record):
    rng = np.random.default_rng(9)
    codes = rng.standard_normal((300, 297, 2))  # as many as there are test digits
    raw = np.array([mmd2_to_prior(z) for z in codes])
    white = np.array([mmd2_to_prior(whiten(z)) for z in codes])
    record("standard deviation of the squared distance, 297 draws of the prior", raw.std())
    record("its mean after whitening", white.mean())
    assert 0.0010 < raw.std() < 0.0013
    assert -0.0015 < white.mean() < -0.0010
    far = 50 + 20 * rng.standard_normal((2000, 2))
    assert mmd2_to_prior(far) == pytest.approx(1 / 3, abs=0.01)


def test_vae_whitening_and_purity_read_what_is_known():
    rng = np.random.default_rng(4)
    codes = rng.standard_normal((300, 2)) @ [[3.0, 0.0], [2.0, 0.1]] + 7
    white = whiten(codes)
    np.testing.assert_allclose(np.cov(white.T), np.eye(2), atol=1e-12)
    labels = np.repeat(np.arange(3), 100)
    assert purity(codes + 1000 * labels[:, None], labels) == 1
    assert abs(purity(codes, labels) - 1 / 3) < 0.05


# %% [markdown]
# Five autoencoders and five VAEs on digits, with different initial parameters, are compared in the
# record `planes_digits`; one of each on MNIST. What the experiment says, in the order of the list
# above:
#
# - *Distance.* On digits the VAE's codes (draws from $q_\phi(z \mid x)$) cannot be told from the
#   prior by this measure: the five readings are from −0.0006 to 0.0018, and 297 draws of the prior
#   itself scatter around 0 with a standard deviation of 0.0011. On MNIST they can: too many lie far
#   out ({numref}`fig-aggregate-posterior`). Their squared distance, 0.009, is a thirtieth of the
#   autoencoder's. After whitening, most of the difference is gone, on both data sets. The
#   autoencoder's cloud on MNIST is centred six units from 0 and is five times too wide; its shape
#   reads 0.009, the VAE's 0.007.
# - *Purity.* The planes are equally pure on MNIST, 0.69 and 0.70. On digits the autoencoder's is
#   the purer, by 0.04. The KL term does not sort digits.
# - *Samples.* From $N(0, I)$ the autoencoder scores *higher*: on MNIST 82 % of its draws are
#   recognised, and 65 % of the VAE's. Count the digits to see why: 9.7 for the VAE, 2.9 for the
#   autoencoder. The circle with 95 % of the prior holds 8 % of the autoencoder's codes, nearly all
#   of them 2s, 3s and 8s, and these it draws clearly ({numref}`fig-prior-samples`). A share of good
#   samples says nothing about what is missing. Drawn from the Gaussian that fits its codes, the
#   autoencoder's samples are recognised as often as the VAE's on MNIST, and more often on digits.
#
# So the popular statement must be made smaller. With two latents, what the VAE has over the
# autoencoder is that it *knows where its codes are*, nearly: sampling needs no look at the data. It
# also has a bound on the likelihood, where the autoencoder has nothing of the kind. By these
# measures it has neither clearer samples nor purer clusters. (On MNIST this is one model of each
# kind. The classifiers are right on at least 98.4 % of the MNIST test images and on 98.7 % of the
# 297 digits, where one image is 0.3 %. They are sure of 96 % and 91 % of these images.)

# %%
MEASURES = ["mmd2", "mmd2_whitened", "purity"]
MEASURES += [f"{what}_{law}" for law in ("prior", "fitted") for what in ("recognised", "digits")]


@claim("R5")
def test_vae_codes_lie_closer_to_the_prior_than_those_of_an_autoencoder(quick_models, held_out):
    rng = np.random.default_rng(5)
    codes = {}
    for name, params in quick_models.items():
        loc, log_var = encode(params["encoder"], held_out)
        codes[name] = loc
        if name == "vae":
            codes[name] = sample_latent(loc, log_var, rng.standard_normal(loc.shape))
    assert mmd2_to_prior(codes["vae"]) < 0.3 * mmd2_to_prior(codes["autoencoder"])


@claim("R5")
def test_vae_and_autoencoder_planes_differ_on_digits_over_five_seeds(record):
    run = records.load("planes_digits")
    record("accuracy of the classifier, 297 digits", run["scalars"]["classifier_accuracy"], 0.98)
    assert run["scalars"]["classifier_accuracy"] >= 0.98
    z = {}
    for key in MEASURES:
        vae, autoencoder = (run["arrays"][f"{model}_{key}"] for model in ("vae", "autoencoder"))
        difference = np.mean(vae) - np.mean(autoencoder)
        error = np.sqrt((np.var(vae, ddof=1) + np.var(autoencoder, ddof=1)) / len(vae))
        record(f"{key}: VAE minus autoencoder, 5 seeds", difference)
        record(f"{key}: standard error of the difference", error)
        z[key] = difference / error
    assert z["mmd2"] < -10 and z["mmd2_whitened"] < -2
    assert z["purity"] < -2 and z["recognised_prior"] < -2  # not what is commonly said
    assert z["digits_prior"] > 2 and z["recognised_fitted"] < -2
    readings = run["arrays"]["vae_mmd2"]
    assert -0.0007 < readings.min() and readings.max() < 0.0019  # two deviations of the prior's own


@claim("R5")
def test_vae_and_autoencoder_planes_differ_on_mnist(record):
    vae, autoencoder = (
        records.load(f"{name}2_mnist")["scalars"] for name in ("vae", "autoencoder")
    )
    record("accuracy of the classifier, MNIST", vae["classifier_accuracy"], limit=0.98)
    assert min(vae["classifier_accuracy"], autoencoder["classifier_accuracy"]) >= 0.98
    for key in MEASURES:
        record(f"{key}: VAE, MNIST", vae[key])
        record(f"{key}: autoencoder, MNIST", autoencoder[key])
    assert vae["mmd2"] < 0.1 * autoencoder["mmd2"]
    assert vae["mmd2_whitened"] < autoencoder["mmd2_whitened"]
    assert abs(vae["purity"] - autoencoder["purity"]) < 0.03
    assert vae["recognised_prior"] < autoencoder["recognised_prior"] - 0.1  # but of which digits?
    assert autoencoder["digits_prior"] < 4 < 9 < vae["digits_prior"]
    assert min(autoencoder["digits_fitted"], vae["digits_fitted"]) > 9
    assert abs(vae["recognised_fitted"] - autoencoder["recognised_fitted"]) < 0.03


def test_vae_places_of_the_codes_on_mnist(record):
    vae, autoencoder = (records.load(f"{name}2_mnist")["arrays"] for name in ("vae", "autoencoder"))
    radii = np.sqrt(-2 * np.log1p(-np.array([0.5, 0.95])))  # circles with these shares of the prior
    codes = autoencoder["codes"].astype(float)
    inside = np.hypot(*codes.T) < radii[1]
    record("share of the autoencoder's codes in 95 % of the prior", inside.mean())
    assert 0.07 < inside.mean() < 0.09
    assert np.mean(np.isin(autoencoder["labels"][inside], [2, 3, 8])) > 0.95
    assert 6 < np.hypot(*codes.mean(0)) < 6.5 and 4.5 < np.sqrt(np.mean(codes.var(0))) < 5.5
    distance = np.hypot(*vae["draws"].astype(float).T)
    shares = [np.mean(distance < radius) for radius in radii]
    record("share of the VAE's draws in 95 % of the prior", shares[1], limit=0.95)
    assert shares == pytest.approx([0.49, 0.86], abs=0.005)


# %% [markdown]
# ## What goes wrong
#
# Three mistakes that leave a program which runs and whose objective rises. Finite differences agree
# with their gradients, because they *are* the right gradients, of another objective. What rejects
# them is the claim that makes an ELBO an ELBO: it never exceeds the log-evidence.
#
# **The reconstruction is averaged over pixels, the KL term is summed.** A library's cross-entropy
# averages by default. The objective is then
#
# $$ \frac1D \log p_\theta(x \mid z) - \mathrm{KL}
#    = \frac1D \big( \log p_\theta(x \mid z) - D \cdot \mathrm{KL} \big) , $$ (eq-vae-averaged)
#
# a VAE with $\beta = D$: 784 on MNIST. Adam hardly minds the factor in front. The rate minds the
# weight: in {numref}`fig-rate-distortion` the point $\beta = 64$ is this bug on the 64 pixels of
# the digits. The latents carry nothing, and every sample is the same grey average.
#
# **The log-variance is taken for the log-scale**, $z = \mu + e^{r} \odot \varepsilon$, while the KL
# term goes on to read it as a log-variance. Wherever $r < 0$ the samples are narrower than what
# was paid for.
#
# **The sign of the KL term is wrong.** It is then rewarded. The encoder's locations go far out, its
# variances go to 0, and the "ELBO" rises and rises: on digits past 1,000 nats in 200 steps. It
# takes no evidence to reject that. The images are discrete, so their log-likelihood is never
# positive.


# %%
def averaged_over_pixels(params, x, noise):
    """WRONG on purpose: Eq. (eq-vae-averaged)."""
    reconstruction, kl = elbo_terms(params, x, noise)
    return reconstruction / x.shape[-1] - kl


def log_variance_as_log_scale(params, x, noise):
    """WRONG on purpose: samples of standard deviation sigma squared."""
    loc, log_var = encode(params["encoder"], x)
    z = loc + np.exp(log_var) * noise
    return log_likelihood(params["decoder"], z, x) - kl_to_prior(loc, log_var)


def kl_rewarded(params, x, noise):
    """WRONG on purpose: plus for minus."""
    reconstruction, kl = elbo_terms(params, x, noise)
    return reconstruction + kl


WRONG = [averaged_over_pixels, log_variance_as_log_scale, kl_rewarded]


def smallest_gap_to_evidence(estimator):
    """Smallest of log p(x) minus the expected estimator, nats: must not be negative for a bound.

    Over models with one latent. Their encoders are shrunk and given several scales, so that some
    come close to the posterior.
    """
    gaps = []
    for seed in range(10):
        params, x, _ = small_vae(seed, n_latents=1, B=8)
        exact = log_evidence(params["decoder"], x)
        for bias in (-3.0, -2.0, -1.0, 0.0):
            encoder = tree.map(lambda p: 0.3 * p, params["encoder"])
            encoder["log_var"]["b"] = np.array([bias])
            moved = {"encoder": encoder, "decoder": params["decoder"]}
            gaps.append(np.min(exact - expected(estimator, moved, x)))
    return min(gaps)


def test_vae_evidence_accepts_the_elbo():
    assert smallest_gap_to_evidence(elbo) > 0


@pytest.mark.parametrize("wrong", WRONG)
def test_vae_evidence_rejects_a_wrong_elbo_that_finite_differences_accept(wrong):
    params, x, noise = small_vae(3)
    check_grads(lambda p: np.mean(wrong(p, x, noise)), (params,), order=1)  # nothing to see
    assert smallest_gap_to_evidence(wrong) < -0.01


def test_vae_rewarded_kl_soon_exceeds_every_log_likelihood(held_out):
    params = quick_model(kl_rewarded, steps=200)
    x = held_out.astype(np.float32)
    assert np.mean(kl_rewarded(params, x, np.zeros((len(x), 2), x.dtype))) > 1000
    assert np.max(encode(params["encoder"], x)[1]) < -10


def test_vae_average_over_pixels_is_a_kl_weight_of_the_number_of_pixels():
    params, x, noise = small_vae(4)
    D = x.shape[1]
    wrong, weighted = (
        grad(lambda p, f=f: np.mean(f(p, x, noise)))(params)
        for f in (averaged_over_pixels, lambda *args: elbo(*args, beta=D) / D)
    )
    assert largest_gap(wrong, weighted) < 1e-14
    betas, rates, _ = rate_distortion()
    assert betas[-1] == 64 and rates[-1] < 0.01  # what training makes of it, on digits


# %% [markdown]
# ## Figures


# %%
DIGIT_COLOURS = (  # ten colours cannot all be told apart by all readers: hence the numbers
    ["#3f90da", "#ffa90e", "#bd1f01", "#4d4d4d", "#832db6"]
    + ["#a96b59", "#e76300", "#b9ac70", "#2e8b57", "#92dadd"]
)


def apart(places, distance):
    """Move points (n, 2) that are closer together than `distance` away from each other."""
    places = places.copy()
    for _ in range(100):
        for i in range(len(places)):
            away = places[i] - places
            length = np.hypot(*away.T)
            near = (length > 0) & (length < distance)
            places[i] += 0.1 * np.sum(away[near] / length[near, None], axis=0) * distance
    return places


def scatter_by_digit(ax, codes, labels):
    """Draw codes (n, 2), a colour and a number for each digit."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    middles = np.array([np.median(codes[labels == digit], axis=0) for digit in range(10)])
    middles = apart(middles, 0.08 * np.ptp(codes, axis=0).max())
    for digit, colour in enumerate(DIGIT_COLOURS):
        ax.scatter(*codes[labels == digit].T, s=3, color=colour, linewidths=0, rasterized=True)
        where = {"ha": "center", "va": "center", "path_effects": halo}
        ax.text(*middles[digit], str(digit), weight="bold", **where)
    ax.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal", adjustable="datalim")


def tile(images, columns):
    """Rows (n, D) of square images as one picture."""
    side = round(images.shape[1] ** 0.5)
    grid = images.reshape(-1, columns, side, side)
    return grid.swapaxes(1, 2).reshape(-1, columns * side)


def figure_latent_planes():
    """Codes of 2,000 MNIST test images by digit: autoencoder, and VAE. Mind the scales.

    A number stands at the median of the codes of its digit, moved where two would overlap.
    """
    import matplotlib.pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(6.4, 3.4))
    for ax, (name, title) in zip(
        panels, {"autoencoder2": "autoencoder", "vae2": "VAE, locations $\\mu$"}.items()
    ):
        arrays = records.load(f"{name}_mnist")["arrays"]
        scatter_by_digit(ax, arrays["codes"].astype(float), arrays["labels"])
        ax.set_title(title)
    return fig


# %%
def figure_manifold():
    r"""Pixel means decoded from a grid of quantiles of the prior: VAE with two latents, MNIST.

    Neighbours differ by 1/16 of the prior's mass in one coordinate: the steps of $z$ are shorter
    in the middle.
    """
    import matplotlib.pyplot as plt
    from scipy.special import ndtri

    images = records.load("vae2_mnist")["arrays"]["manifold"]
    n = round(len(images) ** 0.5)
    side = round(images.shape[1] ** 0.5)
    fig, ax = plt.subplots(figsize=(5.0, 5.0))
    ax.imshow(tile(images, n), cmap="gray_r", vmin=0, vmax=255)
    shown = [0, n // 3, n - 1 - n // 3, n - 1]
    names = [f"{ndtri((i + 0.5) / n):.2f}".replace("-", "−") for i in shown]
    places = [(i + 0.5) * side - 0.5 for i in shown]
    ax.set_xticks(places, names)
    ax.set_yticks(places, names[::-1])
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
    ax.grid(False)
    return fig


# %%
def figure_prior_samples():
    r"""Test images and reconstructions, then pixel means decoded from draws of the prior N(0, I).

    Reconstructions are pixel means decoded from $\mu$. The VAE with 20 latents has learnt from
    binary images (record `vae20_binarized_mnist`), the others from grey images binarised anew at
    each step.
    """
    import matplotlib.pyplot as plt

    vae20, vae2, autoencoder2 = (
        records.load(name)["arrays"]
        for name in ("vae20_binarized_mnist", "vae2_mnist", "autoencoder2_mnist")
    )
    strips = {
        "test images": vae20["originals"],
        "their reconstructions, VAE with 20 latents": vae20["reconstructions"],
        "prior samples, VAE with 20 latents": vae20["samples"][:20],
        "prior samples, VAE with 2 latents": vae2["samples"][:20],
        "decoded draws of $N(0, I)$, autoencoder with 2 latents": autoencoder2["samples"][:20],
    }
    heights = [len(images) for images in strips.values()]
    fig, panels = plt.subplots(5, 1, figsize=(6.4, 5.6), height_ratios=heights)
    for ax, (name, images) in zip(panels, strips.items()):
        ax.imshow(tile(images, 10), cmap="gray_r", vmin=0, vmax=255)
        ax.set_title(name, loc="left", fontsize=8)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.grid(False)
    return fig


# %%
def figure_elbo_curves():
    """ELBO of training and test images during training, VAEs with 20 latents.

    Each point is an average over as many training as test images (297 and 10,000), with one draw
    of the latents for each. On digits the pixels of both are drawn once and differ from those that
    training sees; that test lies above train says that its images are the easier ones. On MNIST
    the bits of the training images are those of training.
    """
    import matplotlib.pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(6.4, 2.8))
    names = {"vae20_digits": "digits, 8×8", "vae20_binarized_mnist": "MNIST, fixed binarisation"}
    for ax, (name, title) in zip(panels, names.items()):
        curves = records.load(name)["curves"]
        for part, colour, style in (("train", "C4", "--"), ("test", "C0", "-")):
            curve = curves[f"{part}_elbo"]
            steps = np.array(curve["steps"]) / 1000
            ax.plot(steps, curve["values"], style, color=colour, label=part)
        final = curves["test_elbo"]["values"][-1]
        ax.set(title=title, xlabel="steps (thousands)", ylim=(final - 15 * abs(final) / 100, None))
    panels[0].set_ylabel("ELBO (nats per image)")
    panels[0].legend(loc="lower right")
    return fig


# %%
def figure_rate_distortion():
    r"""Rate and distortion on test digits for eight weights of the KL term; dotted: equal ELBO.

    Each mark is a VAE with eight latents. The ELBO is $-(V + R)$, so marks above the dotted line
    have a lower one than $\beta = 1$. From mark to mark, as long as the latents are used, the slope
    lies between $-\beta$ of the one and of the other.
    """
    import matplotlib.pyplot as plt

    from chapters.style import COLOUR

    betas, rates, distortions = rate_distortion()
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    ends = np.array([0.0, 17.0])
    best = np.min(rates + distortions)
    ax.plot(ends, best - ends, ":", color=COLOUR["numeric"])
    ax.annotate(f"ELBO = {-best:.1f} nats".replace("-", "−"), (12.4, best - 12.4), (8.4, 10.2))
    ax.plot(rates, distortions, "o-", color=COLOUR["vae"])
    together = ", ".join(f"{beta:g}" for beta, rate in zip(betas, rates) if rate < 0.1)
    for beta, rate, distortion in zip(betas, rates, distortions):
        if rate > 0.1:
            ax.annotate(
                rf"$\beta = {beta:g}$", (rate, distortion), (5, 5), textcoords="offset points"
            )
    ax.annotate(
        rf"$\beta = {together}$: the latents are not used",
        (rates[-1], distortions[-1]),
        (8, -2),
        textcoords="offset points",
    )
    ax.set(xlabel="rate $R$ (nats per image)", ylabel="distortion $V$ (nats per image)")
    ax.set(xlim=(-0.5, 18), ylim=(9, 29))
    return fig


# %%
def figure_aggregate_posterior():
    """Draws of q(z|x), MNIST; circles with 50 % and 95 % of the prior; distances from 0.

    Left: one draw for each of 2,000 test images; the circles hold 49 % and 86 % of them. Right:
    their distances from 0, those of the autoencoder's codes after whitening, and the law of the
    distance of a draw from the prior.
    """
    import matplotlib.pyplot as plt

    from chapters.style import COLOUR

    vae, autoencoder = (
        records.load(name)["arrays"] for name in ("vae2_mnist", "autoencoder2_mnist")
    )
    draws = vae["draws"].astype(float)
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.2))
    scatter_by_digit(left, draws, vae["labels"])
    angle = np.linspace(0, 2 * np.pi, 200)
    for share in (0.5, 0.95):
        radius = np.sqrt(-2 * np.log(1 - share))  # of the circle that holds this share of N(0, I)
        left.plot(radius * np.cos(angle), radius * np.sin(angle), "-", color=COLOUR["exact"], lw=1)
    left.set(xlim=(-3.8, 3.8), ylim=(-3.8, 3.8), adjustable="box")
    radii = np.linspace(0, 4.2, 200)
    right.plot(radii, radii * np.exp(-(radii**2) / 2), color=COLOUR["exact"], label="prior")
    bins = np.linspace(0, 4.2, 29)
    for name, codes in (
        ("vae", draws),
        ("autoencoder", whiten(autoencoder["codes"].astype(float))),
    ):
        distance = np.sqrt(np.sum(codes**2, axis=1))
        label = "VAE" if name == "vae" else "autoencoder,\nwhitened"
        colour = COLOUR[name]
        right.hist(distance, bins, density=True, histtype="step", color=colour, lw=1.3, label=label)
    right.set(xlabel="distance from the origin", ylabel="density")
    right.legend()
    return fig


# %%
def figure_sticking_the_landing():
    r"""Variance of ELBO gradients against the variance of q, in units of the posterior's.

    Linear model with $w = 0.9$, $\tau = 0.6$, and $q$ centred at the mean of the posterior. Left of
    the vertical line dropping the score term raises the variance. At $\gamma = 1$ it is zero, which
    has no place on the axis.
    """
    import matplotlib.pyplot as plt

    from chapters.style import COLOUR

    near = np.geomspace(0.004, 0.3, 25)  # on logarithmic axes the zero at 1 itself has no place
    gammas = np.concatenate(
        [np.geomspace(0.04, 0.7, 40), 1 - near[::-1], 1 + near, np.geomspace(1.35, 6, 25)]
    )
    looks = {
        "A": (elbo_a, "-", COLOUR["pathwise"], "A"),
        "B": (elbo_b, ":", COLOUR["exact"], "B (closed-form KL)"),
        "STL": (elbo_stl, "--", COLOUR["sticking_the_landing"], "A without its score term"),
    }
    fig, panels = plt.subplots(1, 2, figsize=(6.4, 3.0), sharey=True)
    for estimator, style, colour, label in looks.values():
        found = [gradient_moments(estimator, at(gamma), linear_log_lik)[1] for gamma in gammas]
        for ax, variances in zip(panels, np.transpose(found)):
            ax.loglog(gammas, variances, style, color=colour, label=label)
    for ax, name in zip(panels, (r"$\mu$", r"$\log\sigma$")):
        ax.axvline(0.5, color=COLOUR["numeric"], lw=0.8)
        ax.set(title=f"gradient in {name}", xlabel=r"$\gamma = \sigma^2 / v$", ylim=(1e-5, 1e3))
        ax.text(0.47, 2e-5, r"$\gamma = \frac{1}{2}$", ha="right", color="0.4")
    panels[0].set_ylabel("variance")
    panels[1].legend(loc="upper left")
    return fig


# %%
def figure_conv_samples():
    r"""Convolutional VAEs of MNIST: test images, reconstructions, prior samples; grey and binary.

    Left: normal likelihood with $\varsigma = 0.1$, learnt from grey pixels. Right: Bernoulli
    likelihood, learnt from Larochelle's bits. Decoded are pixel means, without the noise that the
    models would add; reconstructions are decoded from $\mu$.
    """
    import matplotlib.pyplot as plt

    names = {
        "conv_gaussian_mnist": "grey pixels, normal",
        "conv_discrete_binarized_mnist": "zeros and ones, Bernoulli",
    }
    fig, panels = plt.subplots(3, 2, figsize=(6.4, 3.3), height_ratios=[1, 1, 5])
    for column, (name, title) in zip(panels.T, names.items()):
        arrays = records.load(name)["arrays"]
        strips = {
            f"{title}: test images": arrays["originals"],
            "reconstructions": arrays["reconstructions"],
            "prior samples": arrays["samples"][:50],
        }
        for ax, (label, images) in zip(column, strips.items()):
            ax.imshow(tile(images, 10), cmap="gray_r", vmin=0, vmax=255)
            ax.set_title(label, loc="left", fontsize=8)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.grid(False)
    return fig


# %%
def figure_kl_closed_or_sampled():
    """Grey digits: test ELBO of both forms of the KL term; variance of the encoder's gradient.

    Left: averages of five convolutional VAEs each, pairs with common parameters, batches and noise.
    Right: sum over the encoder's parameters of the variances, over the noise, of the gradient for
    one batch; the three estimators at the parameters of one of the models with a closed form.
    """
    import matplotlib.pyplot as plt

    from chapters.style import COLOUR

    looks = {
        "closed": ("-", COLOUR["exact"], "B: KL in closed form"),
        "sampled": ("--", COLOUR["pathwise"], "A: KL at the sample"),
        "sampled_no_score": (":", COLOUR["sticking_the_landing"], "A without its score term"),
    }
    curves = records.load("conv_gaussian_digits")["curves"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.9))
    for name, (style, colour, label) in looks.items():
        for ax, kind in ((left, "test_elbo"), (right, "variance")):
            if curve := curves.get(f"{name}_{kind}"):
                ax.plot(curve["steps"], curve["values"], style, color=colour, label=label)
    left.set(xlabel="steps", ylabel="test ELBO (nats per image)")
    top = 1.35 * right.get_ylim()[1]  # room for the legend
    right.set(xlabel="steps", ylabel="variance of the gradient", ylim=(0, top))
    right.legend(loc="upper left")
    return fig


# %%
def figure_gaps():
    r"""Posteriors of two test digits, and the gaps of trained VAEs: approximation, amortisation.

    Left: one VAE with two latents, its images of median and of largest gap. Grey: the exact
    posterior. The ellipses are one standard deviation wide: the encoder's $q$ and the best
    independent normal $q$. Right: averages over images; $\log p_\theta(x)$ by quadrature with two
    latents (three models), by importance sampling with 20 (one convolutional model).
    """
    import matplotlib.pyplot as plt

    from chapters.style import COLOUR

    arrays = records.load("gaps_digits")["arrays"]
    fig, panels = plt.subplots(1, 3, figsize=(6.4, 2.5), width_ratios=[1, 1, 1.5])
    angle = np.linspace(0, 2 * np.pi, 100)
    right = panels[2]
    for i, (ax, title) in enumerate(zip(panels, ("median gap", "largest gap"))):
        density = np.exp(arrays["log_posterior"][i].astype(float))
        ax.imshow(density, extent=arrays["extent"][i], origin="lower", cmap="Greys")
        for name, style, look in (("encoder", "-", "vae"), ("best", "--", "mean_field")):
            loc, log_var = arrays[f"{name}_law"][i]
            ellipse = loc[:, None] + np.exp(0.5 * log_var)[:, None] * [np.cos(angle), np.sin(angle)]
            ax.plot(*ellipse, style, color=COLOUR[look], label=name)
        ax.set(title=title, xlabel="$z_1$", xlim=arrays["extent"][i][:2])
        ax.set_ylim(arrays["extent"][i][2:])
        ax.grid(False)
    panels[0].set_ylabel("$z_2$")
    panels[0].legend()
    names, bars = [], []
    for run, d in (("gaps_digits", 2), ("conv_discrete_digits", 20)):
        for part in ("train", "test"):
            approximation, amortisation = gaps_of(run, part)
            names.append(f"{part}\n$d = {d}$")
            bars.append((approximation.mean(), amortisation.mean()))
    approximation, amortisation = np.transpose(bars)
    right.bar(names, approximation, color=COLOUR["mean_field"], label="approximation")
    right.bar(names, amortisation, bottom=approximation, color=COLOUR["vae"], label="amortisation")
    right.set(ylabel="gap (nats per image)", ylim=(0, 0.85))
    right.legend()
    return fig


# %% [markdown]
# ## Where this goes
#
# The model is in five functions: `encode`, `sample_latent`, `decode`, `log_likelihood` and
# `kl_to_prior`. Exchange one, and the algorithm stays: this chapter did so with convolutions, with
# a normal likelihood, with a KL term at the sample. Chapter 6 makes the bound tighter and estimates
# the evidence of the convolutional model, Chapter 7 makes the latents discrete, Chapter 10 closes
# in on the approximation gap with more flexible posteriors, Chapter 11 makes the decoder
# autoregressive.

# %% [markdown]
# ## Exercises
#
# **1. Full covariance.** Show that $\mathrm{KL}(N(\mu, \Sigma) \,\|\, N(0, I)) = \frac12
# (\mathrm{tr}\,\Sigma + \mu^\top \mu - d - \log \det \Sigma)$. For fixed variances $\Sigma_{jj}$,
# which correlations give the smallest rate?
#
# ```{admonition} Solution
# :class: dropdown
#
# $\mathbb{E}[\log q] = -\frac12 (d \log 2\pi + \log\det\Sigma + d)$ and $\mathbb{E}[\log p] =
# -\frac12 (d \log 2\pi + \mathrm{tr}\,\Sigma + \mu^\top\mu)$; subtract. For a diagonal $\Sigma$
# this is {eq}`eq-vae-kl`. Only $\log\det\Sigma$ depends on the correlations, and by Hadamard's
# inequality it is largest without any. A correlated $q$ costs rate; it pays if it saves more in the
# reconstruction.
# ```


# %% tags=["hide-cell"]
def kl_full_to_prior(loc, covariance):
    """Divergence of N(loc, covariance) from N(0, I), in nats."""
    log_det = np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(covariance) + loc @ loc - len(loc) - log_det)


def test_exercise_vae_full_covariance_costs_rate():
    rng = np.random.default_rng(6)
    loc, factor = rng.standard_normal(3), rng.standard_normal((3, 3))
    covariance = factor @ factor.T
    z = loc + rng.standard_normal((40_000, 3)) @ factor.T
    scaled = np.linalg.solve(factor, (z - loc).T)
    log_q = -0.5 * np.sum(scaled**2, axis=0) - np.linalg.slogdet(factor)[1]
    check_unbiased(log_q + 0.5 * np.sum(z**2, axis=1), kl_full_to_prior(loc, covariance))
    variances = np.diag(covariance)
    diagonal = kl_full_to_prior(loc, np.diag(variances))
    assert diagonal == pytest.approx(kl_to_prior(loc, np.log(variances)), rel=1e-12)
    assert diagonal < kl_full_to_prior(loc, covariance)


# %% [markdown]
# **2. A or B?** It is said that Estimator B is the better one because its KL term is exact. Compare
# the variances of the *values* of A and B in the linear model, at $q$ equal to the posterior and at
# $q$ equal to the prior.
#
# ```{admonition} Solution
# :class: dropdown
#
# At the posterior A is $\log p(x)$ for every $\varepsilon$: variance 0, while B varies with $\log
# p(x \mid z)$. At the prior $\log p(z) - \log q(z) = 0$, so A and B are the same number. Elsewhere
# either may have the smaller variance: B where $q$ is much too narrow, A in a wide neighbourhood of
# the posterior. An exact term helps unless its noise would have
# cancelled that of the other.
# ```


# %% tags=["hide-cell"]
def value_variance(estimator, phi):
    """Variance over the noise of the value of an estimator in the linear model, by quadrature."""
    nodes, weights = normal_nodes()
    values = estimator(phi, nodes, linear_log_lik)
    return weights @ (values - weights @ values) ** 2


def test_exercise_vae_estimator_a_is_exact_at_the_posterior_and_equals_b_at_the_prior():
    assert value_variance(elbo_a, at(1.0)) < 1e-20 < 0.1 < value_variance(elbo_b, at(1.0))
    prior = (0.0, 0.0)
    assert value_variance(elbo_a, prior) == pytest.approx(value_variance(elbo_b, prior), rel=1e-12)
    narrow = at(0.05)
    assert value_variance(elbo_b, narrow) < value_variance(elbo_a, narrow)
    for near in (at(0.5), at(2.0)):
        assert value_variance(elbo_a, near) < value_variance(elbo_b, near)


# %% [markdown]
# **3. The weight in the linear model.** Find the $q = N(\mu, \sigma^2)$ that maximises
# $\mathbb{E}_q[\log p(x \mid z)] - \beta\, \mathrm{KL}(q \,\|\, p(z))$ in the linear model. What
# happens to its variance and its rate as $\beta$ grows from 0?
#
# ```{admonition} Solution
# :class: dropdown
#
# With $\kappa = w^2/\tau^2$ the objective is, but for a constant,
# $-\frac{\kappa}{2} \big( \sigma^2 + (\mu - x/w)^2 \big) -
# \frac{\beta}{2} (\sigma^2 + \mu^2 - 1 - \log\sigma^2)$. Setting both derivatives to zero gives
# $\sigma^2 = \beta / (\beta + \kappa)$ and $\mu = \frac{\kappa}{\beta + \kappa} \frac{x}{w}$: the
# posterior at $\beta = 1$, the most likely point for $\beta \to 0$, the prior for
# $\beta \to \infty$. The rate falls throughout, as
# {prf:ref}`prop-vae-trade` would have it.
# ```


# %% tags=["hide-cell"]
def best_for_weight(beta):
    """(loc, log_scale) that maximise the weighted bound of the linear model."""
    kappa = SLOPE**2 / NOISE_SCALE**2
    return kappa / (beta + kappa) * X / SLOPE, 0.5 * np.log(beta / (beta + kappa))


def test_exercise_vae_weight_in_the_linear_model():
    nodes, weights = normal_nodes()

    def objective(phi, beta):
        loc, log_scale = phi
        kl = 0.5 * (np.exp(2 * log_scale) + loc * loc - 1) - log_scale
        return weights @ linear_log_lik(loc + np.exp(log_scale) * nodes) - beta * kl

    for beta in (0.01, 0.5, 1.0, 8.0):
        np.testing.assert_allclose(grad(objective)(best_for_weight(beta), beta), 0, atol=1e-11)
    np.testing.assert_allclose(best_for_weight(1.0), at(1.0), rtol=1e-12)
    rates = [
        kl_to_prior(*(np.array([p]) for p in (loc, 2 * log_scale)))
        for loc, log_scale in map(best_for_weight, np.geomspace(0.01, 100, 50))
    ]
    assert np.all(np.diff(rates) < 0)


# %% [markdown]
# **4. What does binarising cost?** Let $g$ be a grey image and $x$ its fresh binarisation. Show
# that $\mathbb{E}_x[\log p_\theta(x \mid z)]$ at fixed $z$ is
# $\sum_i \big( g_i a_i - \log(1 + e^{a_i}) \big)$, and that no decoder brings it above
# $-\sum_i H(g_i)$, where $H(g) = -g \log g - (1 - g) \log(1 - g)$ is here the entropy of a pixel.
#
# ```{admonition} Solution
# :class: dropdown
#
# {eq}`eq-vae-likelihood` is linear in $x$ and $\mathbb{E}[x] = g$. Each term is largest at
# $\hat x_i = g_i$, where it is $g_i \log g_i + (1 - g_i) \log(1 - g_i) = -H(g_i)$. An encoder that
# sees $x$ may choose $z$ by it and reconstruct better, but it pays rate: by {eq}`eq-elbo-gibbs`,
# $\mathbb{E}_x[\log p(x)] \le -\sum_i H(g_i)$ for *any* law $p$ of images. That holds of the
# evidence, and so of the ELBO. On digits, where two fifths of the pixels are neither 0 nor 1, no
# model has more than −13.6 nats on the test images, on average over their binarisations.
# Likelihoods of different binarisations do not compare.
# ```


# %% tags=["hide-cell"]
def test_exercise_vae_binarisation_costs_the_entropy_of_the_pixels():
    rng = np.random.default_rng(7)
    grey, logits = rng.uniform(0.1, 0.9, 6), rng.standard_normal(6)
    bits = (np.arange(64)[:, None] >> np.arange(6)) & 1  # all images of six pixels
    probability = np.prod(np.where(bits == 1, grey, 1 - grey), axis=1)
    average = probability @ np.sum(bernoulli_log_prob(logits, bits.astype(float)), axis=1)
    assert average == pytest.approx(np.sum(bernoulli_log_prob(logits, grey)), rel=1e-12)
    ceiling = np.sum(grey * np.log(grey) + (1 - grey) * np.log1p(-grey))
    assert average < ceiling
    assert np.sum(bernoulli_log_prob(np.log(grey / (1 - grey)), grey)) == pytest.approx(ceiling)
    law = rng.dirichlet(np.ones(64))  # any law of images
    assert probability @ np.log(law) < probability @ np.log(probability) == pytest.approx(ceiling)
    test = rows_of(digits().x_test).astype(float)
    assert np.mean(np.sum(xlogy(test, test) + xlogy(1 - test, 1 - test), axis=1)) == pytest.approx(
        -13.6, abs=0.05
    )
    assert np.mean((test > 0) & (test < 1)) == pytest.approx(0.42, abs=0.01)


# %% [markdown]
# **5. A decoder that does not listen.** If the decoder ignores $z$, what are the best $\theta$ and
# $\phi$, and what is the ELBO? Compare it with the run at $\beta = 64$.
#
# ```{admonition} Solution
# :class: dropdown
#
# The reconstruction does not depend on $\phi$, so the KL term alone decides: $q = N(0, I)$, rate 0,
# and the bound is tight. What remains is the likelihood of independent pixels, largest at
# $\hat x_i =$ the mean of pixel $i$ over the training images. On the test digits that is
# −27.2 nats, which is where the run with $\beta = 64$ ends.
# ```


# %% tags=["hide-cell"]
def test_exercise_vae_without_latents_is_where_a_large_weight_ends():
    images = digits()
    train, test = rows_of(images.x_train), rows_of(images.x_test)
    floor = log_likelihood_without_latents(train, test)  # grey test images: exercise 4
    _, rates, distortions = rate_distortion()
    assert rates[-1] < 0.01
    assert -distortions[-1] == pytest.approx(floor, abs=0.3)


# %% [markdown]
# **6. Where the rate goes.** Let $q(z) = \frac1N \sum_n q_\phi(z \mid x_n)$ be the *aggregate
# posterior* of $N$ images. Show that the average KL term is the mutual information between $z$ and
# the index $n$, plus $\mathrm{KL}(q(z) \,\|\, p(z))$. Conclude that the mutual information is at
# most the rate, and at most $\log N$.
#
# ```{admonition} Solution
# :class: dropdown
#
# Insert $q(z)$ between numerator and denominator: $\log \frac{q(z \mid x_n)}{p(z)} =
# \log \frac{q(z \mid x_n)}{q(z)} + \log \frac{q(z)}{p(z)}$. Average over $n$ and $z$. The
# first term is the mutual information, the second a divergence. As
# $q(z) \ge q(z \mid x_n) / N$, the first is at most $\log N$. So rate is spent on telling images
# apart, and what is left over is the misfit between {numref}`fig-aggregate-posterior` and its
# circles.
# ```


# %% tags=["hide-cell"]
def test_exercise_vae_rate_is_information_plus_misfit():
    rng = np.random.default_rng(8)
    z = np.linspace(-14, 14, 20_001)
    loc, log_var = 2 * rng.standard_normal((5, 1)), rng.uniform(-2, 0.5, (5, 1))
    log_q = normal_log_prob(z, loc, np.exp(0.5 * log_var))  # (5, n)
    log_aggregate = logsumexp(log_q, axis=0) - np.log(5)
    information = np.mean(np.trapezoid(np.exp(log_q) * (log_q - log_aggregate), z))
    misfit = np.exp(log_aggregate) * (log_aggregate - normal_log_prob(z, 0.0, 1.0))
    rate = np.mean(kl_to_prior(loc, log_var))
    assert information + np.trapezoid(misfit, z) == pytest.approx(rate, rel=1e-9)
    assert 0 < information < min(rate, np.log(5))
