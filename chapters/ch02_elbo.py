# %% [markdown]
# # 2. Evidence and the ELBO
#
# A model says how data come about: something hidden is drawn first, then the data are drawn given
# what is hidden. Two questions follow. How probable are the data that we have? And what do they
# say about what is hidden? Both have one answer, an integral over everything hidden, and as a rule
# nobody can compute it. Variational inference replaces the integral by an optimisation: choose
# some distribution $q$ of the hidden variables, and a number comes out, the ELBO, that is never
# larger than the log-probability of the data. The best $q$ answers both questions at once. This
# chapter derives the bound in three ways, measures what it misses, and says what may be done
# to it. All models in it are small enough that the truth is known: every statement is
# compared with a closed form, a sum over all states, or quadrature.
#
# **Reads after:** 1 · **Runs in:** 10 s · **Papers:**
# {cite}`jordan1999introduction,neal1998view,blei2017variational,kingma2014auto`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $D$ | dimension of an event: numbers in one datum | () |
# | $d$ | number of latents of one datum | () |
# | $S$ | number of samples, each a replica of the estimate | () |
# | $k$ | number of inner samples that one replica consumes | () |
# | $n$ | number of nodes of a grid along one axis | () |
# | $x$ | observation, one datum; in the mixture, all of its numbers | (D,) |
# | $z$ | latent variable | (d,) |
# | $\theta$ | parameters of the generative model | any |
# | $\phi$ | parameters of the approximate posterior | any |
# | $p(z)$ | prior | () |
# | $p_\theta(x \mid z)$ | likelihood; the index is left out where $\theta$ is fixed | () |
# | $p_\theta(x)$ | evidence, the marginal likelihood of the data | () |
# | $p_\theta(z \mid x)$ | posterior | () |
# | $q(z)$ | approximate posterior of the one $x$ at hand; $q_\phi$ if it has parameters | () |
# | $w(z)$ | importance weight $p_\theta(x, z) / q(z)$ | () |
# | $\mathcal{L}$ | evidence lower bound (ELBO), in nats | () |
# | $W$, $\tau$ | weights, and standard deviation of the noise, of the linear model | (D, d), () |
# | $m$ | mean of the exact posterior | (d,) |
# | $\Lambda$ | precision matrix of the exact posterior, the inverse of its covariance | (d, d) |
# | $v$ | variance of the exact posterior of one latent | () |
# | $\rho$ | correlation of two latents under the exact posterior | () |
# | $c$ | second moment of the importance weight over its squared mean, for one latent | () |
# | $\mu$ | location of $q$ | (d,) |
# | $\sigma$ | scale, a standard deviation, of $q$ | (d,) |
# | $\varepsilon$ | noise whose law has no parameters, standard normal | (S, d) |
# | $K$ | number of components, categories or codes | () |
# | $N$ | number of data that share the means of the mixture | () |
# | $\ell_n$ | label of the $n$-th datum: the component that it was drawn from | () |
# | $\nu_k$ | mean of component $k$ of the mixture; $\nu$ are all of them | () |
# | $r_{nk}$ | probability $q(\ell_n = k)$ | () |
# | $m_k$, $v_k$ | mean and variance of the normal law $q(\nu_k)$ | () |
# | $v_0$ | prior variance of the $\nu_k$ | () |
# | $\delta$ | distance of two modes from their middle | () |

# %% [markdown]
# ## Derivation
#
# ### A model with hidden variables
#
# A *latent-variable model* is a prior and a likelihood. Together they are a joint density of what
# is seen and what is not:
#
# $$ p_\theta(x, z) = p_\theta(x \mid z)\, p(z) . $$ (eq-elbo-joint)
#
# It is a recipe for making data. Draw $z \sim p(z)$; draw $x \sim p_\theta(x \mid z)$; forget $z$.
# This is *ancestral sampling*. The pair $(x, z)$ has the density {eq}`eq-elbo-joint`, so what is
# left after forgetting has its marginal, the *evidence*
#
# $$ p_\theta(x) = \int p_\theta(x \mid z)\, p(z)\, dz , $$ (eq-elbo-evidence)
#
# a sum if $z$ is discrete. Sampling from $p_\theta(x)$ is thus as easy as the recipe. Evaluating
# it at a given $x$ takes the integral.
#
# ### Bayes' rule
#
# Read the joint density the other way round, $p_\theta(x, z) = p_\theta(z \mid x)\, p_\theta(x)$,
# and solve for what $x$ says about $z$:
#
# $$ p_\theta(z \mid x) = \frac{p_\theta(x \mid z)\, p(z)}{p_\theta(x)} . $$ (eq-elbo-bayes)
#
# The numerator is known for every $z$. The denominator is {eq}`eq-elbo-evidence`. Solve for it
# instead:
#
# $$ p_\theta(x) = \frac{p_\theta(x, z)}{p_\theta(z \mid x)}
#    \qquad \text{for every } z \text{ with } p_\theta(z \mid x) > 0 . $$ (eq-elbo-candidate)
#
# The left side has no $z$; so the right side has the same value at each $z$. One point suffices.
# Hence the two questions are one: who can evaluate the posterior density at a single $z$ has the
# evidence by one division, and who has the evidence has the posterior density everywhere
# {cite}`chib1995marginal`. (To *sample* from the posterior is less than to evaluate its density;
# exercise 6 shows how little it may help.)

# %% [markdown]
# ### The linear model, where all is known
#
# One family of models will be at hand throughout: normal latents, seen through a matrix $W$ and
# normal noise of standard deviation $\tau$,
#
# $$ z \sim N(0, I), \qquad x \mid z \sim N(W z,\, \tau^2 I), \qquad
#    \theta = (W, \log \tau) . $$ (eq-elbo-linear)
#
# In the logarithm of the joint density $z$ occurs to the second power at most. Collect the powers
# and complete the square:
#
# $$ \log p_\theta(x, z)
#    = -\tfrac12 z^\top \Lambda z + \tfrac{1}{\tau^2} z^\top W^\top x + \text{const}
#    = -\tfrac12 (z - m)^\top \Lambda (z - m) + \text{const}, $$
#
# $$ \Lambda = I + \tfrac{1}{\tau^2} W^\top W, \qquad
#    m = \tfrac{1}{\tau^2} \Lambda^{-1} W^\top x , \qquad
#    p_\theta(z \mid x) = N(z;\, m, \Lambda^{-1}) . $$ (eq-elbo-linear-posterior)
#
# Precisions add: the prior contributes $I$, the data $W^\top W / \tau^2$. As $x$ is a sum of
# independent normal vectors, its law is normal too, and only mean and covariance have to be found:
#
# $$ p_\theta(x) = N(x;\, 0,\, W W^\top + \tau^2 I) . $$ (eq-elbo-linear-evidence)
#
# With one latent, $W = 1$, $\tau = \frac12$ and $x = 1$, the posterior is $N(0.8, 0.2)$
# ({numref}`fig-bayes`).

# %% [markdown]
# ### Why the integral is hard
#
# **A grid.** Lay $n$ nodes along each axis and sum. A normal law has 95.45 % of its mass within
# two standard deviations of its mean and 99.73 % within three, so a window is soon chosen, and for
# smooth integrands some 13 nodes are within a per cent. But $d$ axes take
#
# $$ n^d \text{ evaluations of } p_\theta(x, z) . $$ (eq-elbo-grid)
#
# (Even the window is deceptive: the cube of half-width 2 holds $0.9545^d$ of the mass, less than a
# hundredth at $d = 100$.)
#
# **Random points.** Draw $z_1, \dots, z_k$ from some density $q$, the *proposal*, and average the
# *importance weights*
#
# $$ w(z) = \frac{p_\theta(x, z)}{q(z)}, \qquad
#    \mathbb{E}_q[w(z)] = \int p_\theta(x, z)\, dz = p_\theta(x) . $$ (eq-elbo-weights)
#
# No $n^d$ here: the mean is right for any $k$. The question is the variance. By
# {eq}`eq-elbo-candidate` $w(z) = p_\theta(x)\, p_\theta(z \mid x) / q(z)$. Let posterior and
# proposal both be products over the $d$ latents, with equal factors for simplicity. Then the second
# moment of the weight is a product too, and
#
# $$ \frac{\mathrm{Var}_q[w(z)]}{p_\theta(x)^2} = c^d - 1, \qquad
#    c = \int \frac{p_\theta(z_1 \mid x)^2}{q(z_1)}\, dz_1 \;\ge\; 1 .
# $$ (eq-elbo-relative-variance)
#
# By the Cauchy-Schwarz inequality $c = 1$ only if $q$ is the posterior. For a posterior $N(m, v)$
# and a proposal $N(\mu, \sigma^2)$ the integral is one over a Gaussian,
#
# $$ c = \frac{\sigma^2}{\sqrt{v\, (2\sigma^2 - v)}}
#    \exp \frac{(m - \mu)^2}{2\sigma^2 - v}
#    \quad \text{if } 2\sigma^2 > v, \qquad c = \infty \text{ otherwise.} $$ (eq-elbo-normal-c)
#
# In the example the prior as proposal has $c = 2.38$. A normal law at the right place whose scale
# is too wide by a tenth has $c = 1.015$. At $d = 100$ the relative variances are more than
# $10^{37}$ and 3.6 ({numref}`fig-evidence-cost`). It is not the dimension alone that decides. It is
# how well the proposal fits. And a proposal that fits *is* an answer to the second question. So
# look for one.

# %% [markdown]
# ### The ELBO, three times
#
# **From Jensen's inequality.** The logarithm is concave, so the logarithm of an average is at least
# the average of the logarithms. Apply it to {eq}`eq-elbo-weights`:
#
# $$ \log p_\theta(x) = \log \mathbb{E}_q[w(z)] \;\ge\; \mathbb{E}_q[\log w(z)]
#    = \mathbb{E}_q\Big[ \log \frac{p_\theta(x, z)}{q(z)} \Big]
#    =: \mathcal{L}(q, \theta) . $$ (eq-elbo-jensen)
#
# The right side is the *evidence lower bound* {cite}`jordan1999introduction`. The derivation takes
# a line. It does not tell how much is lost.
#
# **From Bayes' rule.** Take the logarithm of {eq}`eq-elbo-candidate`, insert $q$, and average over
# $z \sim q$. The left side is a constant and stays as it is:
#
# $$ \log p_\theta(x)
#    = \underbrace{\mathbb{E}_q\Big[ \log \frac{p_\theta(x, z)}{q(z)}
#      \Big]}_{\mathcal{L}(q, \theta)}
#    + \underbrace{\mathbb{E}_q\Big[ \log \frac{q(z)}{p_\theta(z \mid x)}
#      \Big]}_{\mathrm{KL}(q \,\|\, p_\theta(z \mid x))} . $$ (eq-elbo-identity)
#
# This is an equation, for any $q$ for which the terms are finite. The last term is a
# *Kullback-Leibler divergence*, and
#
# $$ \mathrm{KL}(q \,\|\, p) = \mathbb{E}_q\Big[ -\log \frac{p(z)}{q(z)} \Big]
#    \ge \mathbb{E}_q\Big[ 1 - \frac{p(z)}{q(z)} \Big] \ge 0 , $$ (eq-elbo-gibbs)
#
# because $-\log t \ge 1 - t$, with equality for $t = 1$ only. So the ELBO is a lower bound, the
# gap is $\mathrm{KL}(q \,\|\, p_\theta(z \mid x))$, and it is zero if and only if $q$ is the
# posterior. "Only if" has a number: by Pinsker's inequality
# $\int |q(z) - p_\theta(z \mid x)|\, dz \le \sqrt{2\, \mathrm{gap}}$. A small gap means a good
# $q$.
#
# **From a maximisation.** Forget Bayes, and ask for the density that best trades two wishes: a
# large average of some function $f(z)$, and a small divergence from the prior. Let
# $Z = \int e^{f(z)} p(z)\, dz$ and $q^*(z) = e^{f(z)} p(z) / Z$. Then
#
# $$ \mathbb{E}_q[f(z)] - \mathrm{KL}(q \,\|\, p(z))
#    = \mathbb{E}_q\Big[ \log \frac{e^{f(z)}\, p(z)}{q(z)} \Big]
#    = \log Z - \mathrm{KL}(q \,\|\, q^*) , $$ (eq-elbo-variational)
#
# which is largest, and equal to $\log Z$, at $q = q^*$. For $f(z) = \log p_\theta(x \mid z)$ the
# constant is $Z = p_\theta(x)$ and the maximiser is the posterior. Bayes' rule is the solution of
# an optimisation problem, and the ELBO is its objective. Restrict $q$ to a family that can be
# handled, and the optimisation can be done while the integral cannot.
#
# The three results are one number, written in three forms:
#
# $$ \begin{aligned} \mathcal{L}(q, \theta)
#    &= \mathbb{E}_q[\log p_\theta(x, z)] - \mathbb{E}_q[\log q(z)]
#      && \text{energy and entropy} \\
#    &= \mathbb{E}_q[\log p_\theta(x \mid z)] - \mathrm{KL}(q \,\|\, p(z))
#      && \text{reconstruction and rate} \\
#    &= \log p_\theta(x) - \mathrm{KL}(q \,\|\, p_\theta(z \mid x)) .
#      && \text{evidence and gap} \end{aligned} $$ (eq-elbo-forms)
#
# The first is what one computes in general, the second what one computes when the KL term has a
# closed form, the third what one thinks with. Put the second and the third together, and
#
# $$ \log p_\theta(x) = \mathbb{E}_q[\log p_\theta(x \mid z)]
#    - \mathrm{KL}(q \,\|\, p(z)) + \mathrm{KL}(q \,\|\, p_\theta(z \mid x)) .
# $$ (eq-elbo-three-terms)

# %% [markdown]
# ### The divergence from the prior
#
# Between normal laws with diagonal covariance and the standard normal prior (exercise 1),
#
# $$ -\mathrm{KL}\big(N(\mu, \mathrm{diag}\,\sigma^2) \,\|\, N(0, I)\big)
#    = \tfrac12 \sum_{j=1}^{d} \big( 1 + \log \sigma_j^2 - \mu_j^2 - \sigma_j^2 \big) ,
# $$ (eq-elbo-kl-normal)
#
# and between products of Bernoulli laws with probabilities $a_j$ and $b_j$ of a one (exercise 2),
#
# $$ \mathrm{KL}(q \,\|\, p)
#    = \sum_{j=1}^{d} \Big( a_j \log \frac{a_j}{b_j}
#      + (1 - a_j) \log \frac{1 - a_j}{1 - b_j} \Big) . $$ (eq-elbo-kl-bernoulli)
#
# Where there is no closed form, draw $z_1, \dots, z_k \sim q$ and average,
#
# $$ \mathrm{KL}(q \,\|\, p) \approx
#    \frac1k \sum_{i=1}^{k} \big( \log q(z_i) - \log p(z_i) \big) . $$ (eq-elbo-kl-sampled)
#
# The mean is exact whatever $k$, and the standard error is the standard deviation of one term over
# $\sqrt{k}$. The same holds for the ELBO itself,
#
# $$ \mathcal{L}(q, \theta) \approx \frac1k \sum_{i=1}^{k} \log w(z_i) . $$ (eq-elbo-sampled)
#
# Single terms of {eq}`eq-elbo-kl-sampled` may be negative, and so may their average. It is the
# expectation that cannot.

# %% [markdown]
# ### What may be exchanged with the expectation
#
# The ELBO is to be maximised, over $\theta$ and over $\phi$. Both need gradients of an expectation
# over $q_\phi$, and they are not alike:
#
# $$ \nabla_\theta \mathcal{L} = \mathbb{E}_{q_\phi}[\nabla_\theta \log p_\theta(x, z)] ,
# $$ (eq-elbo-grad-theta)
#
# $$ \nabla_\phi \mathcal{L}
#    = \int \nabla_\phi q_\phi(z)\, \log \frac{p_\theta(x, z)}{q_\phi(z)}\, dz
#    - \underbrace{\mathbb{E}_{q_\phi}[\nabla_\phi \log q_\phi(z)]}_{= \, 0}
#    \;\ne\; \mathbb{E}_{q_\phi}\Big[ \nabla_\phi \log \frac{p_\theta(x, z)}{q_\phi(z)} \Big] .
# $$ (eq-elbo-grad-phi)
#
# The law of $z$ does not depend on $\theta$, so $\nabla_\theta$ goes inside, and
# $\nabla_\theta \log p_\theta(x, z)$ at a single draw of $z$ is an unbiased estimate. The law does
# depend on $\phi$, and the first term of {eq}`eq-elbo-grad-phi` says so; it is an integral, but not
# an expectation of something one could average over draws. To make it one is the business of
# chapters 3 and 4. Pushing $\nabla_\phi$ inside leaves the second term only, which is zero: for
# densities on a fixed support
#
# $$ \mathbb{E}_{q_\phi}[\nabla_\phi \log q_\phi(z)]
#    = \int \nabla_\phi q_\phi(z)\, dz = \nabla_\phi \int q_\phi(z)\, dz = \nabla_\phi 1 = 0 .
# $$ (eq-elbo-score)
#
# For the uniform law on $(0, \phi)$, whose support moves, it is $-1/\phi$ (exercise 3).
#
# | exchange with $\mathbb{E}_q$ | allowed? |
# |---|---|
# | sums | always: expectations are linear |
# | the logarithm | no: $\log \mathbb{E}_q[w] \ge \mathbb{E}_q[\log w]$, {eq}`eq-elbo-jensen` |
# | $\nabla_\theta$ | yes, if $\log p_\theta(x, z)$ is smooth in $\theta$ with integrable bounds |
# | $\nabla_\phi$ | no: $q_\phi$ depends on it, {eq}`eq-elbo-grad-phi` |
# | products | only of factors that are uncorrelated under $q$, as independent ones are |
#
# The condition on $\theta$ is not idle. Let $z \sim N(0, 1)$ and
# $x \mid z \sim N(1[z < \theta], 1)$, a decoder with a threshold. At almost every $z$ the gradient
# in $\theta$ is 0, and so is its expectation, while
#
# $$ \frac{d}{d\theta}\, \mathbb{E}_q[\log p_\theta(x \mid z)]
#    = q(\theta) \big( \log N(x; 1, 1) - \log N(x; 0, 1) \big)
#    = q(\theta) \big( x - \tfrac12 \big) . $$ (eq-elbo-threshold)
#
# Chapter 4 states the theorem behind this.

# %% [markdown]
# ### Mean field
#
# The most popular restriction of $q$ is independence, $q(z) = \prod_j q_j(z_j)$. The ELBO can
# then be maximised one factor at a time.
#
# ```{prf:proposition} The optimal factor
# :label: thm-elbo-factor
#
# Fix all factors but $q_j$, and write $\mathbb{E}_{-j}$ for the expectation over them. As a
# function of $q_j$ the ELBO is largest, and strictly so, at
#
# $$ q_j^*(z_j) \propto \exp \mathbb{E}_{-j}[\log p_\theta(x, z)] . $$ (eq-elbo-factor)
# ```
#
# *Proof.* In
# $\mathcal{L} = \mathbb{E}_{q_j}\big[ \mathbb{E}_{-j}[\log p_\theta(x, z)] - \log q_j(z_j) \big] +
# \text{const}$ the bracket is $\log q_j^*(z_j) - \log q_j(z_j)$ plus a constant, and so
# $\mathcal{L} = \text{const} - \mathrm{KL}(q_j \,\|\, q_j^*)$. $\square$
#
# Updating the factors in turn is *coordinate ascent*. No update can lower the ELBO, and where the
# evidence is finite it cannot rise for ever. Where it comes to rest need not be the best place.
#
# What does independence cost? Let the posterior be $N(m, \Lambda^{-1})$. In $z_j$ the expected
# logarithm of the joint density is a parabola of curvature $\Lambda_{jj}$, so by
# {eq}`eq-elbo-factor`
#
# $$ q_j^* = N\Big( m_j - \frac{1}{\Lambda_{jj}} \sum_{i \ne j} \Lambda_{ji} (\mu_i - m_i),\;
#    \frac{1}{\Lambda_{jj}} \Big) . $$ (eq-elbo-factor-normal)
#
# The locations come to rest at $m$. The variances are $1/\Lambda_{jj}$ from the first update on:
# the variance of $z_j$ when all the other latents are *known*, which is at most the variance
# $(\Lambda^{-1})_{jj}$ when they are not. The gap is the divergence of the one normal law from the
# other,
#
# $$ \mathrm{gap} = \tfrac12 \Big( \sum_{j} \log \Lambda_{jj} - \log\det \Lambda \Big)
#    \;=\; -\tfrac12 \log(1 - \rho^2) \text{ for two latents,} $$ (eq-elbo-mean-field-gap)
#
# where also $1/\Lambda_{jj} = (1 - \rho^2)\, (\Lambda^{-1})_{jj}$. A richer family has a smaller
# gap. If the latents fall into blocks with a full covariance each, then
# $\sum_b \log\det \Lambda_{bb}$ stands for the first sum; merging blocks never raises it, and with
# a single block the gap is zero ({numref}`fig-mean-field`).

# %% [markdown]
# ### A conjugate model, and EM
#
# Let $N$ numbers come from $K$ normal laws with unit variance and unknown means:
#
# $$ \nu_k \sim N(0, v_0), \qquad \ell_n \sim \text{uniform on } \{1, \dots, K\}, \qquad
#    x_n \mid \ell_n, \nu \sim N(\nu_{\ell_n}, 1) . $$ (eq-elbo-mixture)
#
# The latents are $K$ means and $N$ labels. Given all labels, means and data are jointly normal and
# the means integrate out: a component with data $y_1, \dots, y_a$ contributes
#
# $$ \log p(y) = -\tfrac{a}{2} \log 2\pi - \tfrac12 \log(1 + a v_0)
#    - \tfrac12 \Big( \sum_i y_i^2
#      - \frac{v_0}{1 + a v_0} \big( \textstyle\sum_i y_i \big)^2 \Big) ,
# $$ (eq-elbo-component)
#
# and the evidence is a sum over all $K^N$ assignments of labels. For eleven numbers and two
# components that is 2048: exact, and hopeless for a data set. Mean field takes
# $q = \prod_k q(\nu_k) \prod_n q(\ell_n)$, and {eq}`eq-elbo-factor` gives
#
# $$ r_{nk} \propto \exp\big( x_n m_k - \tfrac12 (m_k^2 + v_k) \big) , $$ (eq-elbo-labels)
#
# $$ \frac{1}{v_k} = \frac{1}{v_0} + \sum_n r_{nk}, \qquad
#    m_k = v_k \sum_n r_{nk}\, x_n , $$ (eq-elbo-means)
#
# with the ELBO
#
# $$ \mathcal{L} = \underbrace{\sum_{n,k} r_{nk} \Big(
#    -\tfrac12 \log 2\pi - \tfrac12 \big( (x_n - m_k)^2 + v_k \big) - \log K - \log r_{nk}
#    \Big)}_{\text{labels}}
#    - \sum_k \mathrm{KL}\big( N(m_k, v_k) \,\|\, N(0, v_0) \big) . $$ (eq-elbo-mixture-bound)
#
# Now call the means *parameters*: no prior ($v_0 = \infty$), no distribution ($v_k = 0$), a point
# $\theta = \nu$. Of {eq}`eq-elbo-mixture-bound` the labels' term remains. It is the ELBO
# $\mathcal{L}(q, \theta)$ of a model whose only latents are the labels, and the two updates are
#
# $$ \text{E: } q \leftarrow p_\theta(\ell \mid x), \qquad
#    \text{M: } \theta \leftarrow \arg\max_\theta \mathcal{L}(q, \theta) . $$ (eq-elbo-em)
#
# This is the EM algorithm {cite}`dempster1977maximum`: coordinate ascent on the ELBO
# {cite}`neal1998view`. The first update is exact inference, so after each E step the bound touches
# $\log p_\theta(x)$. The M step raises the bound; the log-evidence lay on the bound and now lies
# above it, so it has risen at least as much ({numref}`fig-coordinate-ascent`). Where the two touch
# they have the same slope. Hold $q = p_\theta(z \mid x)$ of the present $\theta$ fixed and move
# $\theta$: the gap is 0 at the present $\theta$ and negative nowhere, so its gradient vanishes, and
#
# $$ \nabla_\theta \log p_\theta(x)
#    = \mathbb{E}_{p_\theta(z \mid x)}[\nabla_\theta \log p_\theta(x, z)] . $$ (eq-elbo-fisher)

# %% [markdown]
# ### Which way round
#
# The gap is $\mathrm{KL}(q \,\|\, p)$, called *reverse*: the average is over $q$, and $q$ pays
# where it has mass and $p$ has none. The *forward* divergence $\mathrm{KL}(p \,\|\, q)$ averages
# over $p$, and $q$ pays where it misses mass of $p$. Among normal laws the forward one is smallest
# at the law with the moments of $p$: up to a constant it is
#
# $$ -\mathbb{E}_p[\log q(z)]
#    = \log \sigma + \frac{\mathrm{Var}_p[z] + (\mathbb{E}_p[z] - \mu)^2}{2 \sigma^2}
#    + \text{const.} $$ (eq-elbo-forward)
#
# Take two modes, $p = \frac12 N(-\delta, 1) + \frac12 N(\delta, 1)$. Forward: $\mu = 0$,
# $\sigma^2 = 1 + \delta^2$, densest in the valley, where $p$ has little. Reverse: if $q$ covers one
# mode only, then $p \approx \frac12 q$ wherever $q$ is, and the divergence is $\log 2$, no matter
# how far away the other mode lies. Hence the saying that variational inference picks a
# mode. {numref}`fig-two-modes` shows when it is true. Up to $\delta \approx 2.4$ there is no
# minimum at a mode; up to $\delta \approx 2.8$ there is one, and the wide $q$ across both modes is
# better; beyond, one mode is better, and the wide $q$ remains a local minimum in which an
# optimiser may end.
#
# To fit by the forward divergence one needs averages over the posterior, which are what we lack.
# That is why the reverse one is used.

# %% [markdown]
# ## By hand
#
# The definitions first, as sums over a table of all states. A state is either a value of a
# discrete $z$, with `cell` = 1, or a node of a grid, with `cell` the volume that belongs to it.
# For smooth densities that vanish at the ends of the grid such sums converge exponentially, and a
# few hundred nodes per axis give all digits.

# %%
import itertools
import math

import numpy as np
import pytest
import scipy.special as sc

from chapters.ledger import claim

LOG_2PI = math.log(2 * math.pi)


def grid(low, high, n, d=1):
    """All `n**d` nodes of a grid, (n**d, d), and the volume of a cell: Eq. (eq-elbo-grid)."""
    axis, step = np.linspace(low, high, n, retstep=True)
    return np.stack(np.meshgrid(*[axis] * d, indexing="ij"), axis=-1).reshape(-1, d), step**d


def expect(log_q, f, cell=1.0):
    """E_q[f(z)] for tables of log q and f over all states."""
    return cell * np.sum(np.exp(log_q) * f)


def kl_by_sum(log_q, log_p, cell=1.0):
    """KL(q ‖ p) in nats: Eq. (eq-elbo-gibbs)."""
    return expect(log_q, log_q - log_p, cell)


def elbo_by_sum(log_q, log_joint, cell=1.0):
    """E_q[log w(z)] in nats: Eq. (eq-elbo-jensen)."""
    return expect(log_q, log_joint - log_q, cell)


def log_evidence_by_sum(log_joint, cell=1.0):
    """log p(x) in nats: Eq. (eq-elbo-evidence)."""
    return sc.logsumexp(log_joint) + math.log(cell)


# %% [markdown]
# The linear model {eq}`eq-elbo-linear` is a dict `{"weights": W, "log_noise": log τ}`, and a normal
# $q$ is a dict `{"loc": μ, "log_scale": log σ}`. Given $z$, the log-likelihood is
# $-\frac{D}{2} \log 2\pi\tau^2 - \|x - W z\|^2 / 2\tau^2$. Under $q$ the vector $x - W z$ has mean
# $x - W\mu$ and variances that add up to $\sum_j \sigma_j^2 \|W_j\|^2$, where $W_j$ is the $j$-th
# column. Hence, with {eq}`eq-elbo-kl-normal`,
#
# $$ \mathcal{L} = -\tfrac{D}{2} \log 2\pi\tau^2
#    - \frac{\|x - W\mu\|^2 + \sum_j \sigma_j^2 \|W_j\|^2}{2 \tau^2}
#    + \tfrac12 \sum_j \big( 1 + \log\sigma_j^2 - \mu_j^2 - \sigma_j^2 \big) ,
# $$ (eq-elbo-linear-bound)
#
# and its derivatives are
#
# $$ \nabla_\mu \mathcal{L} = \tfrac{1}{\tau^2} W^\top (x - W\mu) - \mu, \qquad
#    \frac{\partial\mathcal{L}}{\partial \log\sigma_j}
#    = 1 - \sigma_j^2 - \tfrac{1}{\tau^2} \sigma_j^2 \|W_j\|^2 , $$ (eq-elbo-linear-grad-phi)
#
# $$ \begin{aligned} \nabla_W \mathcal{L} &= \tfrac{1}{\tau^2}
#    \big( (x - W\mu)\, \mu^\top - W\, \mathrm{diag}(\sigma^2) \big), \\
#    \frac{\partial\mathcal{L}}{\partial \log\tau}
#    &= \tfrac{1}{\tau^2} \Big( \|x - W\mu\|^2 + \sum_j \sigma_j^2 \|W_j\|^2 \Big) - D .
#    \end{aligned} $$ (eq-elbo-linear-grad-theta)


# %%
def posterior(theta, x):
    """Mean (d,) and precision (d, d) of the exact posterior: Eq. (eq-elbo-linear-posterior)."""
    W, variance = theta["weights"], np.exp(2 * theta["log_noise"])
    precision = np.eye(W.shape[1]) + W.T @ W / variance
    return np.linalg.solve(precision, W.T @ x) / variance, precision


def elbo_by_hand(theta, phi, x):
    """The ELBO of a diagonal normal q, and its gradients in `theta` and in `phi`."""
    W, variance = theta["weights"], np.exp(2 * theta["log_noise"])
    loc, scale2 = phi["loc"], np.exp(2 * phi["log_scale"])
    residual, column2 = x - W @ loc, np.sum(W**2, axis=0)
    square = residual @ residual + scale2 @ column2
    # Eq. (eq-elbo-linear-bound)
    reconstruction = -0.5 * len(x) * (LOG_2PI + np.log(variance)) - square / (2 * variance)
    value = reconstruction + 0.5 * np.sum(1 + np.log(scale2) - loc**2 - scale2)
    in_theta = {  # Eq. (eq-elbo-linear-grad-theta)
        "weights": (np.outer(residual, loc) - W * scale2) / variance,
        "log_noise": square / variance - len(x),
    }
    in_phi = {  # Eq. (eq-elbo-linear-grad-phi)
        "loc": W.T @ residual / variance - loc,
        "log_scale": 1 - scale2 - scale2 * column2 / variance,
    }
    return value, (in_theta, in_phi)


# %% [markdown]
# Mean field for the linear model: one update, and the gap that is left at the end.


# %%
def mean_field_update(loc, m, precision, j):
    """New location of factor j: Eq. (eq-elbo-factor-normal)."""
    others = precision[j] @ (loc - m) - precision[j, j] * (loc[j] - m[j])
    return m[j] - others / precision[j, j]


def block_gap(precision, blocks):
    """Gap in nats of the best q with these blocks of latents: Eq. (eq-elbo-mean-field-gap)."""
    log_dets = [np.linalg.slogdet(precision[np.ix_(b, b)])[1] for b in blocks]
    return 0.5 * (sum(log_dets) - np.linalg.slogdet(precision)[1])


# %% [markdown]
# The two updates of the mixture, and its bound. With `var` = 0 the first is an E step; with an
# infinite `prior_var` the second is an M step.


# %%
def update_labels(x, loc, var):
    """Logarithms (N, K) of the label probabilities: Eq. (eq-elbo-labels)."""
    return sc.log_softmax(np.outer(x, loc) - 0.5 * (loc**2 + var), axis=1)


def update_means(x, log_r, prior_var):
    """Means and variances (K,) of the factors of the means: Eq. (eq-elbo-means)."""
    r = np.exp(log_r)
    var = 1 / (1 / prior_var + np.sum(r, axis=0))
    return var * (x @ r), var


def label_bound(x, log_r, loc, var):
    """The labels' term of Eq. (eq-elbo-mixture-bound), in nats."""
    log_lik = -0.5 * LOG_2PI - 0.5 * ((x[:, None] - loc) ** 2 + var)
    return np.sum(np.exp(log_r) * (log_lik - math.log(len(loc)) - log_r))


def mixture_elbo(x, log_r, loc, var, prior_var):
    """Eq. (eq-elbo-mixture-bound), in nats."""
    kl = 0.5 * np.sum((loc**2 + var) / prior_var - 1 - np.log(var / prior_var))
    return label_bound(x, log_r, loc, var) - kl


# %% [markdown]
# Coordinate ascent and EM are loops over these; EM needs no code of its own but the loop.


# %%
def coordinate_ascent(x, loc, prior_var, sweeps):
    """ELBO after each update, two per sweep, and the last factors (log_r, loc, var)."""
    var, bounds = np.ones_like(loc), []
    for _ in range(sweeps):
        log_r = update_labels(x, loc, var)
        bounds.append(mixture_elbo(x, log_r, loc, var, prior_var))
        loc, var = update_means(x, log_r, prior_var)
        bounds.append(mixture_elbo(x, log_r, loc, var, prior_var))
    return np.array(bounds), (log_r, loc, var)


def em(x, loc, steps):
    """Bound after each E and each M step, log-evidence after each M step, and the last means."""
    bounds, log_evidence = [], []
    for _ in range(steps):  # Eq. (eq-elbo-em)
        log_r = update_labels(x, loc, 0.0)
        bounds.append(label_bound(x, log_r, loc, 0.0))
        loc, _ = update_means(x, log_r, np.inf)
        bounds.append(label_bound(x, log_r, loc, 0.0))
        log_evidence.append(mixture_log_likelihood(x, loc))
    return np.array(bounds), np.array(log_evidence), loc


# %% [markdown]
# And the truth: the log-evidence with the means fixed, where each number has its own sum over the
# components, and with the means integrated out, where the sum is over all assignments.


# %%
def mixture_log_likelihood(x, loc):
    """log p(x) in nats at fixed means `loc` (K,)."""
    log_p = -0.5 * LOG_2PI - 0.5 * (x[:, None] - loc) ** 2 - math.log(len(loc))
    return np.sum(sc.logsumexp(log_p, axis=1))


def mixture_log_evidence(x, K, prior_var):
    """log p(x) in nats, by summing over all K**N assignments: Eq. (eq-elbo-component)."""
    labels = np.array(list(itertools.product(range(K), repeat=len(x))))  # (K**N, N)
    total = -len(x) * (math.log(K) + 0.5 * LOG_2PI) - 0.5 * x @ x
    for k in range(K):
        count, s = np.sum(labels == k, axis=1), (labels == k) @ x
        shrink = 1 + count * prior_var
        total = total - 0.5 * np.log(shrink) + 0.5 * prior_var * s**2 / shrink
    return sc.logsumexp(total)


# %% [markdown]
# ## With minigrad
#
# Densities are in the library, and so is the divergence. The formulas become lines.

# %%
from minigrad import grad, hessian, linalg, special, tree, value_and_grad
from minigrad.distributions import Bernoulli, Mixture, Normal, kl

STANDARD = Normal(0.0, 1.0)


def log_joint(theta, z, x):
    """log p(x, z) of the linear model in nats, for latents `z` (..., d): (...)."""
    mean = np.einsum("...ij,...j->...i", theta["weights"], z)
    noise = np.exp(theta["log_noise"])[..., None]
    log_lik = np.sum(Normal(mean, noise).log_prob(x), axis=-1)
    return log_lik + np.sum(STANDARD.log_prob(z), axis=-1)  # Eq. (eq-elbo-joint)


def log_evidence(theta, x):
    """log p(x) of the linear model in nats: Eq. (eq-elbo-linear-evidence)."""
    W = theta["weights"]
    covariance = W @ W.T + np.exp(2 * theta["log_noise"]) * np.eye(len(x))
    log_det = linalg.slogdet(covariance)[1]
    return -0.5 * (len(x) * LOG_2PI + log_det + x @ linalg.solve(covariance, x))


# %% [markdown]
# The ELBO twice: in its second form, where everything is known in closed form, and as single
# samples, whose noise comes in from outside.


# %%
def reconstruction(theta, phi, x):
    """E_q[log p(x | z)] of the linear model in nats, first term of Eq. (eq-elbo-linear-bound)."""
    W, noise = theta["weights"], np.exp(theta["log_noise"])
    spread = np.sum((W * np.exp(phi["log_scale"])) ** 2) / (2 * noise**2)
    return np.sum(Normal(W @ phi["loc"], noise).log_prob(x)) - spread


def rates(phi):
    """KL(q ‖ p(z)) in nats of each latent, (d,): Eq. (eq-elbo-kl-normal)."""
    return kl(Normal(phi["loc"], np.exp(phi["log_scale"])), STANDARD)


def elbo(theta, phi, x):
    """Reconstruction minus rate, in nats: Eq. (eq-elbo-forms)."""
    return reconstruction(theta, phi, x) - np.sum(rates(phi))


def log_weights(theta, phi, x, noise):
    """log w(z) in nats, one for each row of `noise` (S, d): terms of Eq. (eq-elbo-sampled)."""
    q = Normal(phi["loc"], np.exp(phi["log_scale"]))
    z = q.loc + q.scale * noise
    return log_joint(theta, z, x) - np.sum(q.log_prob(z), axis=-1)


def log_ratios(q, p, z):
    """log q(z) - log p(z), summed over the last axis of `z`: terms of Eq. (eq-elbo-kl-sampled)."""
    return np.sum(q.log_prob(z) - p.log_prob(z), axis=-1)


# %% [markdown]
# A few problems of different sizes serve the checks, and one of them the pictures.


# %%
def linear_problem(seed, D=3, d=2, orthogonal=False):
    """A random linear model, a datum drawn from it, and a random diagonal normal q.

    With `orthogonal` columns of the weights the exact posterior is diagonal.
    """
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((D, d))
    if orthogonal:
        W = np.linalg.qr(W)[0] * rng.uniform(0.5, 2.0, d)
    theta = {"weights": W, "log_noise": np.array(rng.uniform(-1.0, 0.5))}
    x = W @ rng.standard_normal(d) + np.exp(theta["log_noise"]) * rng.standard_normal(D)
    return theta, x, {"loc": rng.standard_normal(d), "log_scale": rng.uniform(-1.5, 0.5, d)}


EXAMPLE = {"weights": np.array([[1.0]]), "log_noise": np.array(math.log(0.5))}
X = np.array([1.0])


def random_table(rng, states=8, values=16):
    """A random discrete model: log p(x, z) for all `states` of z and `values` of x."""
    log_prior = special.log_softmax(rng.standard_normal(states))
    return log_prior[:, None] + special.log_softmax(2 * rng.standard_normal((states, values)))


def largest_gap(a, b):
    """Largest absolute difference between the leaves of two containers of arrays."""
    return max(np.max(np.abs(x - y)) for x, y in zip(tree.leaves(a), tree.leaves(b)))


def test_elbo_by_hand_is_that_of_minigrad():
    for seed in range(5):
        theta, x, phi = linear_problem(seed)
        value, gradients = elbo_by_hand(theta, phi, x)
        traced_value, traced = value_and_grad(elbo, argnums=(0, 1))(theta, phi, x)
        assert abs(value - traced_value) < 1e-12
        assert largest_gap(gradients, traced) < 1e-11
        assert min(np.max(np.abs(g)) for g in tree.leaves(traced)) > 1e-3


def test_elbo_derivatives_pass_finite_differences():
    theta, x, phi = linear_problem(5)
    check_grads(elbo, (theta, phi, x), order=2)
    check_grads(log_evidence, (theta, x), order=2)


# %% [markdown]
# ## Checks
#
# ### Bayes' rule and the evidence
#
# The closed forms against quadrature, which knows nothing of completed squares.

# %%
from minigrad.check import check_density, check_grads, check_unbiased


def normal_log_density(z, m, precision):
    """Log-density of N(m, precision⁻¹) at `z` (..., d): (...), in nats."""
    quadratic = np.einsum("...i,ij,...j->...", z - m, precision, z - m)
    return -0.5 * (quadratic + len(m) * LOG_2PI - np.linalg.slogdet(precision)[1])


@claim("B1")
def test_elbo_posterior_of_the_linear_model_is_bayes_rule(record):
    errors = []
    for seed, d in [(0, 1), (1, 1), (2, 2), (3, 2)]:
        theta, x, _ = linear_problem(seed, d=d)
        z, cell = grid(-9, 9, 361, d)
        table = log_joint(theta, z, x)
        by_sum = log_evidence_by_sum(table, cell)
        closed = normal_log_density(z, *posterior(theta, x))
        errors.append(np.max(np.abs(np.exp(closed) - np.exp(table - by_sum))))
        errors.append(abs(log_evidence(theta, x) - by_sum))
    record("largest error of posterior density and log-evidence", max(errors), limit=1e-12)
    assert max(errors) < 1e-12
    m, precision = posterior(EXAMPLE, X)
    np.testing.assert_allclose([m[0], 1 / precision[0, 0]], [0.8, 0.2], rtol=1e-14)


@claim("B16")
def test_elbo_posterior_and_evidence_give_one_another(record):
    spread, z = 0.0, np.random.default_rng(0).uniform(-6, 6, (200, 2))
    for seed in range(10):
        theta, x, _ = linear_problem(seed)
        # Eq. (eq-elbo-candidate), at 200 points far apart
        candidates = log_joint(theta, z, x) - normal_log_density(z, *posterior(theta, x))
        spread = max(spread, np.max(np.abs(candidates - log_evidence(theta, x))))
    record("linear model, 200 points: largest error of log p(x)", spread, limit=1e-10)
    assert spread < 1e-10
    table = random_table(np.random.default_rng(1))
    log_posterior = special.log_softmax(table, axis=0)
    marginal = sc.logsumexp(table, axis=0)
    error = np.max(np.abs(table - log_posterior - marginal))
    record("discrete model, every state: largest error of log p(x)", error, limit=1e-13)
    assert error < 1e-13


# %% [markdown]
# Ancestral sampling is held against the evidence by a chi-squared test, with normal, with mixed
# and with discrete data. Its wrong twin decodes the *mean* of the prior instead of a draw: each
# datum is then possible, and their law is not the model's.


# %%
@claim("B14")
def test_elbo_ancestral_samples_follow_the_evidence(record):
    rng, S = np.random.default_rng(2), 50_000
    reals, noise = (-np.inf, np.inf), rng.standard_normal(S)
    z = rng.standard_normal(S)
    evidence = Normal(0.0, math.sqrt(1.25)).log_prob  # Eq. (eq-elbo-linear-evidence)
    errors = [check_density(evidence, reals, 1.0 * z + 0.5 * noise)]
    with pytest.raises(AssertionError, match="do not follow the density"):
        check_density(evidence, reals, 1.0 * np.mean(z) + 0.5 * noise)

    shares, modes, widths = np.array([0.2, 0.5, 0.3]), np.array([-2.0, 0.0, 3.0]), 0.7
    z = rng.choice(3, size=S, p=shares)
    mixed = Mixture(np.log(shares), Normal(modes, widths)).log_prob
    errors.append(check_density(mixed, reals, modes[z] + widths * noise))

    table = random_table(rng)
    joint = np.exp(table)
    z = rng.choice(8, size=S, p=joint.sum(1))
    given = np.cumsum(joint / joint.sum(1, keepdims=True), axis=1)
    x = np.sum(rng.random(S)[:, None] > given[z], axis=1)
    errors.append(check_density(lambda x: sc.logsumexp(table, axis=0)[x], np.arange(16), x))
    record("samples of each of 3 models that pass the chi-squared test", S)
    record("largest error of the integral of p(x)", max(errors), limit=1e-6)


# %% [markdown]
# ### The cost of an integral
#
# In the product model with $W = I$, $\tau = \frac12$ and all $x_j = 1$ the grid sum is a product
# of one-dimensional sums, so its relative error is known in any dimension, and so is the number of
# nodes that it takes to be within one per cent. For importance sampling the number of draws is
# {eq}`eq-elbo-relative-variance` over $0.01^2$.


# %%
def second_moment(loc, scale, m, v):
    """c of Eq. (eq-elbo-normal-c); infinite for a proposal that is too narrow."""
    excess = 2 * scale**2 - v
    if excess <= 0:
        return math.inf
    return scale**2 / math.sqrt(v * excess) * math.exp((m - loc) ** 2 / excess)


PROPOSALS = {  # of the example, whose posterior is N(0.8, 0.2): loc and scale of q
    "prior": (0.0, 1.0),
    "scale 1.5 times the posterior's": (0.8, 1.5 * math.sqrt(0.2)),
    "scale 1.1 times the posterior's": (0.8, 1.1 * math.sqrt(0.2)),
}


def grid_error(n, d):
    """Relative error of the evidence by a grid of n nodes per axis on (-5, 5)."""
    z, cell = grid(-5, 5, n)
    one = math.exp(log_evidence_by_sum(log_joint(EXAMPLE, z, X), cell) - log_evidence(EXAMPLE, X))
    return one**d - 1


def nodes_needed(d, tolerance=0.01):
    """Smallest n from which on the grid is within the tolerance."""
    wrong = [n for n in range(2, 60) if abs(grid_error(n, d)) > tolerance]
    return max(wrong) + 1


@claim("B2")
def test_elbo_grid_cost_is_exponential_and_importance_sampling_depends_on_its_proposal(record):
    for d in (1, 2, 3):
        n = nodes_needed(d)
        product = {"weights": np.eye(d), "log_noise": EXAMPLE["log_noise"]}
        z, cell = grid(-5, 5, n, d)
        assert len(z) == n**d  # Eq. (eq-elbo-grid)
        by_sum = log_evidence_by_sum(log_joint(product, z, np.ones(d)), cell)
        error = math.expm1(by_sum - log_evidence(product, np.ones(d)))
        assert error == pytest.approx(grid_error(n, d), rel=1e-9) and abs(error) < 0.01
    record("grid: nodes per axis for 1 %, in 20 dimensions", nodes_needed(20))

    # Eq. (eq-elbo-normal-c) by quadrature, and equal to 1 at the posterior only
    z, cell = grid(-30, 30, 6001)
    log_post = Normal(0.8, math.sqrt(0.2)).log_prob(z)
    for loc, scale in [*PROPOSALS.values(), (0.2, 0.5), (1.5, 2.0)]:
        quadrature = cell * np.sum(np.exp(2 * log_post - Normal(loc, scale).log_prob(z)))
        assert second_moment(loc, scale, 0.8, 0.2) == pytest.approx(quadrature, rel=1e-10)
    assert second_moment(0.8, math.sqrt(0.2), 0.8, 0.2) == pytest.approx(1, abs=1e-15)
    elsewhere = itertools.product(np.linspace(0, 1.6, 17), np.linspace(0.2, 2, 19))
    assert min(second_moment(*q, 0.8, 0.2) for q in elsewhere) > 1

    rng, worst = np.random.default_rng(3), 0.0
    for name, d in [("prior", 1), ("prior", 2), ("scale 1.1 times the posterior's", 8)]:
        loc, scale = PROPOSALS[name]
        phi = {"loc": np.full(d, loc), "log_scale": np.full(d, math.log(scale))}
        product = {"weights": np.eye(d), "log_noise": EXAMPLE["log_noise"]}
        log_w = log_weights(product, phi, np.ones(d), rng.standard_normal((400_000, d)))
        ratio = np.exp(log_w - log_evidence(product, np.ones(d)))
        worst = max(worst, check_unbiased(ratio, 1.0))
        worst = max(worst, check_unbiased(ratio**2, second_moment(loc, scale, 0.8, 0.2) ** d))
    record("largest |z| of mean and second moment of the weights", worst, limit=4.9)
    variances = [second_moment(*q, 0.8, 0.2) ** 100 - 1 for q in PROPOSALS.values()]
    assert variances[0] > 1e37 and variances[-1] == pytest.approx(3.6, abs=0.05)
    assert nodes_needed(1) == 13
    for name, q in PROPOSALS.items():
        c = second_moment(*q, 0.8, 0.2)
        record(f"log10 of the relative variance at d = 100, {name}", math.log10(c**100 - 1))


@claim("B3")
def test_elbo_mass_of_the_normal_law_within_two_and_three_deviations(record):
    for k, percent in [(2, 95.45), (3, 99.73)]:
        mass = 100 * (sc.ndtr(k) - sc.ndtr(-k))
        record(f"per cent of N(0, 1) within ±{k}", mass)
        z, cell = grid(-k, k, 4001)
        p = np.exp(STANDARD.log_prob(z))
        trapezoid = cell * (np.sum(p) - 0.5 * (p[0, 0] + p[-1, 0]))
        assert mass == pytest.approx(100 * trapezoid, rel=1e-6)
        assert round(mass, 2) == percent
    assert 0.9545**100 < 0.01


# %% [markdown]
# ### The identity and the bound
#
# "For any $q$" is taken at its word: mixtures, heavy tails and skewed densities in one
# dimension, a banana in two, and a thousand random points of the simplex. The evidence is
# the closed form in the first two cases, so that nothing agrees with itself.


# %%
def some_densities():
    """Tables (name, log q, z, cell) of normalised densities of one or two latents."""
    z, cell = grid(-60, 60, 24_001)
    t = z[:, 0]
    yield "mixture", Mixture(np.zeros(2), Normal(np.array([-2.0, 1.0]), 0.6)).log_prob(t), z, cell
    yield "logistic", -t - 2 * np.logaddexp(0, -t), z, cell
    yield "Gumbel", -(t + 1) - np.exp(-np.maximum(t + 1, -6.5)), z, cell
    z, cell = grid(-10, 22, 641, 2)
    banana = STANDARD.log_prob(z[:, 0]) + Normal(0.5 * z[:, 0] ** 2 - 1, 0.8).log_prob(z[:, 1])
    yield "banana", banana, z, cell


@claim("B4")
def test_elbo_three_terms_add_up_to_the_log_evidence(record):
    worst = 0.0
    for name, log_q, z, cell in some_densities():
        assert expect(log_q, 1.0, cell) == pytest.approx(1, abs=1e-9), name
        theta, x, _ = linear_problem(4, d=z.shape[1])
        table = log_joint(theta, z, x)
        log_prior = np.sum(STANDARD.log_prob(z), axis=-1)
        reconstruction = expect(log_q, table - log_prior, cell)
        rate = kl_by_sum(log_q, log_prior, cell)
        gap = kl_by_sum(log_q, normal_log_density(z, *posterior(theta, x)), cell)
        # Eq. (eq-elbo-three-terms)
        worst = max(worst, abs(reconstruction - rate + gap - log_evidence(theta, x)))
        assert elbo_by_sum(log_q, table, cell) == pytest.approx(reconstruction - rate, abs=1e-9)
    record("4 densities, linear model: largest error, nats", worst, limit=1e-6)
    assert worst < 1e-6


@claim("B5")
def test_elbo_is_below_the_evidence_by_the_divergence_to_the_posterior(record):
    rng = np.random.default_rng(5)
    smallest, error, pinsker = np.inf, 0.0, np.inf
    for _ in range(1000):
        table = random_table(rng)[:, 0]
        log_p = log_evidence_by_sum(table)
        log_q = special.log_softmax((table - log_p) + rng.exponential() * rng.standard_normal(8))
        gap = log_p - elbo_by_sum(log_q, table)
        distance = np.sum(np.abs(np.exp(log_q) - np.exp(table - log_p)))
        smallest, pinsker = min(smallest, gap), min(pinsker, gap - 0.5 * distance**2)
        error = max(error, abs(gap - kl_by_sum(log_q, table - log_p)))
        assert abs(log_p - elbo_by_sum(table - log_p, table)) < 1e-13  # q is the posterior
    record("smallest gap of 1000 random q, nats", smallest, limit=0)
    record("largest difference between gap and KL(q ‖ posterior)", error, limit=1e-13)
    record("smallest excess of the gap over half the squared L1 distance", pinsker, limit=0)
    assert smallest > 0 and pinsker > 0 and error < 1e-13


def test_elbo_bayes_rule_solves_an_optimisation_problem():
    rng = np.random.default_rng(6)
    f, log_prior = 2 * rng.standard_normal(8), special.log_softmax(rng.standard_normal(8))
    log_Z = sc.logsumexp(f + log_prior)

    def objective(log_q):  # Eq. (eq-elbo-variational)
        return expect(log_q, f) - kl_by_sum(log_q, log_prior)

    best = f + log_prior - log_Z
    assert objective(best) == pytest.approx(log_Z, abs=1e-13)
    for _ in range(100):
        log_q = special.log_softmax(best + rng.standard_normal(8))
        assert log_Z - objective(log_q) == pytest.approx(kl_by_sum(log_q, best), abs=1e-13)


def test_elbo_of_the_linear_model_touches_the_evidence_at_the_posterior():
    for seed in range(5):
        theta, x, _ = linear_problem(seed, orthogonal=True)
        m, precision = posterior(theta, x)
        phi = {"loc": m, "log_scale": -0.5 * np.log(np.diag(precision))}
        assert elbo(theta, phi, x) == pytest.approx(log_evidence(theta, x), abs=1e-12)
        assert (
            largest_gap(grad(elbo, argnums=1)(theta, phi, x), tree.map(np.zeros_like, phi)) < 1e-12
        )
        # every weight is the evidence: an estimate without noise
        log_w = log_weights(theta, phi, x, np.random.default_rng(seed).standard_normal((9, 2)))
        np.testing.assert_allclose(log_w, log_evidence(theta, x), atol=1e-11)


# %% [markdown]
# ### Estimates
#
# The divergence and the ELBO, each from few samples. Unbiasedness is a $z$-score. The rate is
# measured as the slope of the root-mean-square error against $k$ on logarithmic axes.


# %%
def error_slope(samples, exact):
    """Slope of log error against log k, for averages of k = 1, 4, ..., 1024 of the samples."""
    ks = 4 ** np.arange(6)
    errors = [samples.reshape(-1, k).mean(1) - exact for k in ks]
    rms = [math.sqrt(np.mean(e**2)) for e in errors]
    return np.polyfit(np.log(ks), np.log(rms), 1)[0]


@claim("B8")
def test_elbo_sampled_divergence_is_unbiased_with_error_one_over_root_k(record):
    q = Normal(np.array([0.5, -1.0, 0.2]), np.array([0.6, 1.2, 0.9]))
    z = q.sample(np.random.default_rng(6), (2**19,))
    terms, exact = log_ratios(q, STANDARD, z), np.sum(kl(q, STANDARD))
    record("|z| of the mean of 524,288 terms", check_unbiased(terms, exact), limit=4.9)
    slope = error_slope(terms, exact)
    record("slope of log error against log k (expected -0.5)", slope)
    assert slope == pytest.approx(-0.5, abs=0.03)
    record("share of single terms below zero", np.mean(terms < 0))
    assert 0.1 < np.mean(terms < 0) < 0.5


@claim("B13")
def test_elbo_sampled_bound_is_unbiased_with_error_one_over_root_k(record):
    theta, x, phi = linear_problem(7)
    noise = np.random.default_rng(7).standard_normal((2**18, 2))
    terms, exact = log_weights(theta, phi, x, noise), elbo(theta, phi, x)
    record("|z| of the mean of 262,144 terms", check_unbiased(terms, exact), limit=4.9)
    slope = error_slope(terms, exact)
    record("slope of log error against log k (expected -0.5)", slope)
    assert slope == pytest.approx(-0.5, abs=0.03)
    with pytest.raises(AssertionError, match="biased"):  # the average of w before the logarithm
        check_unbiased(special.logsumexp(terms.reshape(-1, 4), axis=1) - math.log(4), exact)


# %% [markdown]
# Then the gradient in $\theta$ from one draw of $z$. Each sample gets its own copy of $\theta$, so
# that one backward pass gives one gradient per sample. By hand they are
# $(x - Wz) z^\top / \tau^2$ and $\|x - Wz\|^2/\tau^2 - D$.


# %%
def theta_gradients(theta, z, x):
    """Gradients of log p(x, z), one for each row of `z` (S, d): like `theta`, leaves (S, ...)."""
    copies = tree.map(lambda p: np.broadcast_to(p, (len(z), *np.shape(p))), theta)
    return grad(lambda copies: np.sum(log_joint(copies, z, x)))(copies)  # Eq. (eq-elbo-grad-theta)


@claim("B11")
def test_elbo_theta_gradient_passes_through_the_expectation(record):
    theta, x, phi = linear_problem(8)
    z = phi["loc"] + np.exp(phi["log_scale"]) * np.random.default_rng(8).standard_normal(
        (60_000, 2)
    )
    samples, exact = theta_gradients(theta, z, x), elbo_by_hand(theta, phi, x)[1][0]
    residual, variance = x - z @ theta["weights"].T, np.exp(2 * theta["log_noise"])
    by_hand = {
        "weights": residual[:, :, None] * z[:, None, :] / variance,
        "log_noise": np.sum(residual**2, axis=1) / variance - len(x),
    }
    assert largest_gap(samples, by_hand) < 1e-9
    worst = max(check_unbiased(samples[name], exact[name]) for name in exact)
    record("largest |z| of 7 coordinates", worst, limit=5.2)


def test_elbo_gradient_at_the_posterior_is_that_of_the_evidence():
    theta, x, _ = linear_problem(9)
    m, precision = posterior(theta, x)
    z, cell = grid(-9, 9, 181, 2)
    weights = cell * np.exp(normal_log_density(z, m, precision))
    samples = theta_gradients(theta, z, x)
    averaged = tree.map(lambda g: np.tensordot(weights, g, 1), samples)  # Eq. (eq-elbo-fisher)
    assert largest_gap(averaged, grad(log_evidence)(theta, x)) < 1e-9


def test_elbo_threshold_in_theta_does_not_pass_through_the_expectation():
    x, theta, h = 2.0, 0.3, 1e-4

    def reconstruction(t):  # two pieces, on each of which the integrand does not depend on z
        low = sc.ndtr(t)
        return low * Normal(1.0, 1.0).log_prob(x) + (1 - low) * STANDARD.log_prob(x)

    slope = (reconstruction(theta + h) - reconstruction(theta - h)) / (2 * h)
    exact = np.exp(STANDARD.log_prob(theta)) * (x - 0.5)  # Eq. (eq-elbo-threshold)
    assert slope == pytest.approx(exact, rel=1e-6)
    z = np.random.default_rng(10).standard_normal(1000)
    inside = grad(lambda t: np.sum(Normal(np.where(z < t, 1.0, 0.0) + 0 * t, 1.0).log_prob(x)))
    assert inside(theta) == 0.0 and exact > 0.5


# %% [markdown]
# ### Mean field
#
# The factorised optimum, its gap and its variances for posteriors of every correlation; then
# four latents and families of growing freedom.


# %%
def correlated(rho):
    """A linear model with one datum whose two latents have posterior correlation -rho."""
    # The precision 1 + w² / τ² on the diagonal, w² / τ² off it: rho is their ratio.
    weight = math.sqrt(rho / (1 - rho))
    return {"weights": np.full((1, 2), weight), "log_noise": np.array(0.0)}, np.array([1.5])


@claim("B17")
def test_elbo_factorised_posterior_misses_the_correlation(record):
    errors = []
    for rho in (0.1, 0.5, 0.9, 0.99):
        theta, x = correlated(rho)
        m, precision = posterior(theta, x)
        covariance = np.linalg.inv(precision)
        assert covariance[0, 1] / covariance[0, 0] == pytest.approx(-rho)
        phi = {"loc": m, "log_scale": -0.5 * np.log(np.diag(precision))}
        gap = log_evidence(theta, x) - elbo(theta, phi, x)
        errors.append(abs(gap + 0.5 * math.log(1 - rho**2)))  # Eq. (eq-elbo-mean-field-gap)
        errors.append(abs(gap - block_gap(precision, [[0], [1]])))
        slope = grad(elbo, argnums=1)(theta, phi, x)  # stationary, and the ELBO is concave in φ
        errors.append(largest_gap(slope, tree.map(np.zeros_like, slope)))
        too_small = 1 / precision[0, 0] / covariance[0, 0]
        errors.append(abs(too_small - (1 - rho**2)))
    record("largest error of gap, gradient and variance at 4 correlations", max(errors), limit=1e-9)
    record("gap at correlation 0.9, nats", block_gap(posterior(*correlated(0.9))[1], [[0], [1]]))
    assert max(errors) < 1e-9

    factorised, pairs, full = [[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]
    for seed in range(50):
        theta, x, _ = linear_problem(seed, D=5, d=4)
        m, precision = posterior(theta, x)
        gaps = [block_gap(precision, blocks) for blocks in (factorised, pairs, full)]
        assert gaps[0] > gaps[1] > gaps[2] > -1e-12 and gaps[2] < 1e-12
        assert np.all(1 / np.diag(precision) < np.diag(np.linalg.inv(precision)))
        phi = {"loc": m, "log_scale": -0.5 * np.log(np.diag(precision))}
        assert log_evidence(theta, x) - elbo(theta, phi, x) == pytest.approx(gaps[0], abs=1e-9)
    record("4 latents, one model: gap factorised, nats", gaps[0])
    record("the same, two pairs", gaps[1])
    record("the same, full covariance", gaps[2], limit=1e-12)


# %% [markdown]
# Coordinate ascent on the mixture. Each update must be a maximum, which the engine is asked to
# confirm: the gradient in the updated factor is zero. The exact evidence is the sum over all 2048
# assignments. The gap that remains has a part that no sweep can remove. The posterior does not
# change when the labels are exchanged, and has two equal halves; $q$ comes to rest in one
# of them, which costs about $\log 2 = 0.69$ of the 0.88 nats. Two equal means stay equal: a saddle.

# %%
DATA = np.array([-1.67, -1.93, -1.16, -1.7, -2.34, 2.16, 3.1, 2.75, 1.1, 0.53, 1.18])
PRIOR_VAR = 9.0
STARTS = [(-1.0, 1.0), (0.5, 1.0), (0.0, 0.1), (3.0, 2.5), (0.0, 0.0)]


@claim("B18")
def test_elbo_coordinate_ascent_is_monotone_and_below_the_evidence(record):
    exact = mixture_log_evidence(DATA, 2, PRIOR_VAR)
    runs = {start: coordinate_ascent(DATA, np.array(start), PRIOR_VAR, 40) for start in STARTS}
    smallest = min(np.min(np.diff(bounds)) for bounds, _ in runs.values())
    record("smallest change of the ELBO in one update, 5 starts, nats", smallest, limit=-1e-12)
    assert smallest > -1e-12
    ends = [bounds[-1] for bounds, _ in runs.values()]
    assert np.ptp(ends[:-1]) < 1e-9 and ends[-1] < ends[0] - 5  # the saddle of equal means
    record(
        "gap at the best fixed point, nats (one of two labellings: log 2 = 0.69)", exact - ends[0]
    )
    assert math.log(2) < exact - ends[0] < 1.0

    log_r, loc, var = runs[STARTS[1]][1]
    new_loc, new_var = update_means(DATA, log_r, PRIOR_VAR)
    in_means = grad(
        lambda loc, var: mixture_elbo(DATA, log_r, loc, var, PRIOR_VAR), argnums=(0, 1)
    )(new_loc, new_var)
    logits = update_labels(DATA, loc, var)
    in_labels = grad(lambda a: mixture_elbo(DATA, special.log_softmax(a), loc, var, PRIOR_VAR))(
        logits
    )
    steepest = max(np.max(np.abs(g)) for g in (*in_means, in_labels))
    record("largest gradient in a factor after its update", steepest, limit=1e-12)
    assert steepest < 1e-12


def test_elbo_reported_bounds_are_those_of_the_factors_after_their_update():
    bounds, (log_r, loc, var) = coordinate_ascent(DATA, np.array([0.5, 1.0]), PRIOR_VAR, 3)
    assert bounds[-1] == mixture_elbo(DATA, log_r, loc, var, PRIOR_VAR)
    start = np.array([0.5, 1.0])
    log_r = update_labels(DATA, start, 0.0)
    bounds, _, loc = em(DATA, start, 1)
    assert bounds[1] == label_bound(DATA, log_r, loc, 0.0) > bounds[0]


def test_elbo_mixture_evidence_agrees_with_quadrature():
    x, nu = DATA[3:8], np.linspace(-25, 25, 501)
    log_lik = Normal(nu, 1.0).log_prob(x[:, None])  # (N, n)
    pairs = np.logaddexp(log_lik[:, :, None], log_lik[:, None, :]) - math.log(2)
    log_prior = Normal(0.0, 3.0).log_prob(nu)
    table = np.sum(pairs, axis=0) + log_prior[:, None] + log_prior
    by_sum = log_evidence_by_sum(table, (nu[1] - nu[0]) ** 2)
    assert mixture_log_evidence(x, 2, 9.0) == pytest.approx(by_sum, abs=1e-10)


@claim("B18")
def test_elbo_em_is_coordinate_ascent_with_a_point_for_the_means(record):
    for start in STARTS[:-1]:
        bounds, log_evidence, loc = em(DATA, np.array(start), 30)
        assert np.min(np.diff(bounds)) > -1e-12
        before = np.array([mixture_log_likelihood(DATA, np.array(start)), *log_evidence])
        touch = np.max(np.abs(bounds[::2] - before[:-1]))  # after each E step
        rise = np.min(np.diff(before) - (bounds[1::2] - bounds[::2]))
        assert touch < 1e-12 and rise > -1e-12
        r = np.exp(update_labels(DATA, loc, 0.0))
        score = np.sum(r * (DATA[:, None] - loc), axis=0)  # Eq. (eq-elbo-fisher)
        assert np.max(np.abs(score)) < 1e-5
    record("EM: largest distance of bound and log-evidence after an E step", touch, limit=1e-12)
    record("EM: least rise of the log-evidence beyond that of the bound", rise, limit=-1e-12)
    # with many data the factors of the means shrink to points, and one update is the other
    many = np.tile(DATA, 100_000)
    log_r = update_labels(many, np.array([-1.0, 1.0]), 0.0)
    ascent, point = update_means(many, log_r, PRIOR_VAR)[0], update_means(many, log_r, np.inf)[0]
    record("mean-field against EM means, 1.1 million data", np.max(np.abs(ascent - point)), 1e-6)
    assert np.max(np.abs(ascent - point)) < 1e-6


# %% [markdown]
# ### Two modes
#
# The reverse divergence of a normal $q$ from the two modes is minimised with the engine's gradient
# from two places, near a mode and in the middle. The forward one is {eq}`eq-elbo-forward`.

# %%
LINE, LINE_CELL = grid(-16, 16, 1281)


def two_modes(delta):
    """Table of the log-density with modes at ±delta on LINE."""
    return Mixture(np.zeros(2), Normal(np.array([-delta, delta]), 1.0)).log_prob(LINE)


def reverse_kl(phi, log_p):
    """KL(q ‖ p) in nats for q = N(phi[0], exp(phi[1])²) and a table over LINE."""
    return kl_by_sum(special.normal_log_prob(LINE, phi[0], np.exp(phi[1])), log_p, LINE_CELL)


def fit_reverse(log_p, loc, scale):
    """Local minimum of the reverse divergence from a start: (loc, scale, divergence)."""
    from scipy.optimize import minimize

    descend = value_and_grad(lambda phi: reverse_kl(phi, log_p))
    start = np.array([loc, math.log(scale)])
    found = minimize(descend, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    return found.x[0], math.exp(found.x[1]), found.fun


@claim("B18")
def test_elbo_reverse_divergence_takes_one_of_two_far_modes(record):
    log_p = two_modes(4.0)
    loc, scale, one = fit_reverse(log_p, 4.0, 1.0)
    _, wide, both = fit_reverse(log_p, 0.0, 3.0)
    record("modes at ±4, reverse: location of q", loc)
    record("reverse divergence at one mode minus log 2", one - math.log(2), limit=0.01)
    record("reverse divergence across both", both)
    assert (
        abs(loc - 4) < 0.01 and abs(scale - 1) < 0.01 and abs(one - math.log(2)) < 0.01 < both - one
    )

    def forward(phi):
        log_q = special.normal_log_prob(LINE, phi[0], np.exp(phi[1]))
        return kl_by_sum(log_p, log_q, LINE_CELL)

    matched = np.array([0.0, 0.5 * math.log(17.0)])  # Eq. (eq-elbo-forward)
    assert np.max(np.abs(grad(forward)(matched))) < 1e-9
    record("forward: scale of q", math.sqrt(17.0))


@claim("B18")
def test_elbo_reverse_divergence_covers_two_close_modes(record):
    for delta, best in [(1.5, "both"), (2.5, "both"), (2.75, "both"), (2.85, "one"), (4.0, "one")]:
        log_p = two_modes(delta)
        one, both = fit_reverse(log_p, delta, 1.0), fit_reverse(log_p, 0.0, delta)
        record(f"modes at ±{delta}: reverse divergence from the start at a mode", one[2])
        record(f"modes at ±{delta}: from the start in the middle", both[2])
        curvature = hessian(lambda phi, p=log_p: reverse_kl(phi, p))(
            np.array([both[0], math.log(both[1])])
        )
        assert abs(both[0]) < 1e-4 and np.linalg.eigvalsh(curvature)[0] > 0.05  # a minimum
        if delta == 1.5:
            assert abs(one[0]) < 1e-4  # there is no minimum at a mode
        else:
            assert one[0] > 0.9 * delta
            assert best == ("both" if both[2] < one[2] else "one")


# %% [markdown]
# ## What goes wrong
#
# ### Five programs
#
# All of these are easily written, and they train: finite differences agree with their
# gradients. What they are not is an ELBO, and an ELBO has two properties that can be tested without
# knowing the code. *It never exceeds the log-evidence, and it equals it when $q$ is the posterior.*
# On the linear model both sides are known.
#
# - **The KL term the wrong way round.** Arguments exchanged in a call of `kl`. On these models it
#   stays below the log-evidence, and only the second property rejects it.
# - **A normaliser dropped.** "Constants do not matter": the reconstruction as
#   $-\|x - Wz\|^2/2\tau^2$, a squared error. It leaves out $\frac{D}{2} \log 2\pi\tau^2$, which is
#   hundreds of nats for an image, and no constant at all if $\tau$ is learned: for
#   $\tau \to \infty$ this objective is perfect.
# - **The rate averaged over the latents**, while the reconstruction is summed over the pixels: a
#   mean where a sum belongs. The rate is then $d$ times too cheap. (Chapter 5 has the reverse, an
#   average over the pixels.)
# - **The mean decoded.** The reconstruction at $z = \mu$ instead of its average over $q$, for
#   instance because evaluation "switches the noise off". For a concave log-likelihood it is too
#   large, by Jensen's inequality.
# - **The rate added.** A sign.


# %%
def kl_reversed(theta, phi, x):
    """WRONG on purpose: KL(p(z) ‖ q)."""
    q = Normal(phi["loc"], np.exp(phi["log_scale"]))
    return reconstruction(theta, phi, x) - np.sum(kl(STANDARD, q))


def normaliser_dropped(theta, phi, x):
    """WRONG on purpose: the likelihood is not normalised."""
    W, variance = theta["weights"], np.exp(2 * theta["log_noise"])
    spread = np.sum((W * np.exp(phi["log_scale"])) ** 2)
    square = np.sum((x - W @ phi["loc"]) ** 2) + spread
    return -square / (2 * variance) - np.sum(rates(phi))


def rate_averaged(theta, phi, x):
    """WRONG on purpose: a mean over the latents."""
    return reconstruction(theta, phi, x) - np.mean(rates(phi))


def mean_decoded(theta, phi, x):
    """WRONG on purpose: log p(x | z) at the mean of q."""
    at_mean = Normal(theta["weights"] @ phi["loc"], np.exp(theta["log_noise"])).log_prob(x)
    return np.sum(at_mean) - np.sum(rates(phi))


def rate_added(theta, phi, x):
    """WRONG on purpose: plus for minus."""
    return reconstruction(theta, phi, x) + np.sum(rates(phi))


WRONG = [kl_reversed, normaliser_dropped, rate_averaged, mean_decoded, rate_added]


def excess_and_miss(objective):
    """Largest excess of an objective over log p(x), and its largest error at the posterior, nats.

    Over 20 models whose posterior is diagonal, and q from the posterior to a tenth and to
    twice its scale.
    """
    excess, miss = -np.inf, 0.0
    for seed in range(20):
        theta, x, _ = linear_problem(seed, orthogonal=True)
        m, precision = posterior(theta, x)
        exact = log_evidence(theta, x)
        for factor in (0.1, 0.5, 1.0, 2.0):
            phi = {"loc": m, "log_scale": math.log(factor) - 0.5 * np.log(np.diag(precision))}
            difference = objective(theta, phi, x) - exact
            excess = max(excess, difference)
            miss = max(miss, abs(difference)) if factor == 1 else miss
    return excess, miss


def test_elbo_wrong_objectives_are_rejected(record):
    excess, miss = excess_and_miss(elbo)
    assert excess < 1e-12 and miss < 1e-12
    for objective in WRONG:
        excess, miss = excess_and_miss(objective)
        record(f"{objective.__name__}: largest excess over the log-evidence, nats", excess)
        record(f"{objective.__name__}: largest error at the posterior, nats", miss)
        assert miss > 0.5 and (excess < 0 if objective is kl_reversed else excess > 0.5)


# %% [markdown]
# ### Five estimates of a divergence
#
# Single terms of {eq}`eq-elbo-kl-sampled` are negative often enough to look like a mistake. The
# usual repairs are mistakes. *Clipping* at zero and the *absolute value* raise the mean. Half the
# *square* of the log-ratio is close only when $q$ is close to $p$; it can be too large or too small
# (for $N(0.8, 0.2)$ and the standard normal law 0.49 instead of 0.72 nats). The logarithm of the
# average of $q(z)/p(z)$ estimates another divergence, Rényi's of order 2, which is larger or
# infinite. (A repair that is right is exercise 4.) And drawing $z$ from $p$ while keeping the terms
# gives $-\mathrm{KL}(p \,\|\, q)$: wrong divergence, wrong sign.


# %%
def test_elbo_wrong_estimates_of_a_divergence_are_rejected():
    rng, q = np.random.default_rng(11), Normal(np.array([1.0, -0.8]), np.array([0.5, 0.8]))
    exact, S = np.sum(kl(q, STANDARD)), 200_000
    terms = log_ratios(q, STANDARD, q.sample(rng, (S,)))
    check_unbiased(terms, exact)
    from_p = log_ratios(q, STANDARD, rng.standard_normal((S, 2)))
    renyi = special.logsumexp(terms.reshape(-1, 4), axis=1) - math.log(4)
    for wrong in (np.maximum(terms, 0), np.abs(terms), terms**2 / 2, renyi, from_p):
        with pytest.raises(AssertionError, match="biased"):
            check_unbiased(wrong, exact)
    check_unbiased(from_p, -np.sum(kl(STANDARD, q)))
    other = Normal(0.8, math.sqrt(0.2))
    halves = log_ratios(other, Normal(0.0, 1.0), other.sample(rng, (S, 1))) ** 2 / 2
    assert round(kl(other, Normal(0.0, 1.0)), 2) == 0.72 and round(np.mean(halves), 2) == 0.49


# %% [markdown]
# ### Five sentences
#
# The lecture notes "VAE 1" (source S3 of the claims) and the slides of a lecture (S4) introduce the
# ELBO with sentences that do not hold as they are printed. They are widespread, so each gets its
# counter-example.
#
# - *Probabilities are below 1, so $\log p(x) \le 0$.* True of probabilities. The density of
#   $N(0, 0.01^2)$ at 0 is 39.9. Measure $x$ in other units, $x \to ax$, and $\log p(x)$ shifts by
#   $-D \log a$: the sign of a log-density, or of an ELBO, means nothing.
# - *The gradient in $\theta$ does not pass through $\mathbb{E}_q$.* It does,
#   {eq}`eq-elbo-grad-theta`. The one that does not is $\nabla_\phi$.
# - *Minimising $\mathrm{KL}(q \,\|\, p_\theta(z \mid x))$ minimises the evidence; so minimise the
#   right side.* At fixed $\theta$ the evidence does not depend on $q$ and stays where it is. What
#   rises, by as much as the divergence falls, is the ELBO, and it is *maximised*; there is no
#   minimum to find.
# - *The divergence of $q$ from the joint.* $p_\theta(x, z)$ at the given $x$ integrates over $z$ to
#   $p_\theta(x)$, not to 1, so it is no density of $z$. What is written down is
#   $\mathbb{E}_q[\log q(z) - \log p_\theta(x, z)] = -\mathcal{L}$, which can be negative, as no
#   divergence can.
# - *$p(x) \ge \mathcal{L}$* (S4). True, and without content:
#   $\mathcal{L} \le \log p(x) \le p(x) - 1$, so there is always a whole nat to spare. An "ELBO"
#   that is too large by 0.9 nats still satisfies it. The statement is $\log p(x) \ge \mathcal{L}$.

# %%
SHARP = {"weights": np.array([[0.01]]), "log_noise": np.array(math.log(0.01))}


def normal_table(phi, z):
    """Table of log q over the nodes `z` (n, 1), for a normal q with one latent."""
    return special.normal_log_prob(z[:, 0], phi["loc"], np.exp(phi["log_scale"]))


@claim("E1")
def test_elbo_log_evidence_and_elbo_can_be_positive(record):
    assert math.exp(Normal(0.0, 0.01).log_prob(0.0)) == pytest.approx(39.894, abs=1e-3)
    x, phi = np.array([0.005]), {"loc": np.array([0.2]), "log_scale": np.array([-0.5])}
    record("log p(x) of a sharp model, nats", log_evidence(SHARP, x))
    record("ELBO of the same, nats", elbo(SHARP, phi, x))
    assert log_evidence(SHARP, x) > elbo(SHARP, phi, x) > 3
    theta, x, _ = linear_problem(12)
    for a in (0.001, 1000.0):  # millimetres for metres, and back
        log_noise = theta["log_noise"] + math.log(a)
        other = {"weights": a * theta["weights"], "log_noise": log_noise}
        shift = log_evidence(other, a * x) - log_evidence(theta, x)
        assert shift == pytest.approx(-3 * math.log(a), abs=1e-10)


@claim("E2")
def test_elbo_gradient_in_theta_goes_inside_and_in_phi_does_not(record):
    z, cell = grid(-12, 12, 1201)
    phi = {"loc": np.array(0.3), "log_scale": np.array(-0.4)}
    whole = {name: p.reshape(1) for name, p in phi.items()}
    exact_theta, exact_phi = elbo_by_hand(EXAMPLE, whole, X)[1]
    q = cell * np.exp(normal_table(phi, z))

    def averaged(copies_of):  # E_q of per-node gradients: the gradient inside the expectation
        return tree.map(lambda g: np.tensordot(q, g, 1), copies_of)

    inside_theta = averaged(theta_gradients(EXAMPLE, z, X))
    copies = tree.map(lambda p: np.full(len(z), p), phi)
    log_w = lambda phi: log_joint(EXAMPLE, z, X) - normal_table(phi, z)
    inside_phi = averaged(grad(lambda phi: np.sum(log_w(phi)))(copies))
    error = largest_gap(inside_theta, exact_theta)
    record("θ: largest difference of gradient inside and outside", error, limit=1e-9)
    record("φ: largest gradient inside the expectation", max(map(abs, inside_phi.values())))
    record("φ: gradient of the ELBO in the location", exact_phi["loc"][0])
    assert error < 1e-9 and max(map(abs, inside_phi.values())) < 1e-9 < 1 < exact_phi["loc"][0]
    # the missing term of Eq. (eq-elbo-grad-phi) makes it whole
    missing = grad(lambda phi: cell * np.sum(np.exp(normal_table(phi, z)) * log_w_at))
    log_w_at = log_w(phi)
    assert largest_gap(missing(phi), tree.map(lambda g: g[0], exact_phi)) < 1e-9


@claim("E3")
def test_elbo_descending_the_divergence_leaves_the_evidence_alone(record):
    z, cell = grid(-12, 12, 1201)
    log_post = normal_log_density(z, *posterior(EXAMPLE, X))
    table = log_joint(EXAMPLE, z, X)
    divergence = lambda phi: kl_by_sum(normal_table(phi, z), log_post, cell)
    bound = lambda phi: elbo_by_sum(normal_table(phi, z), table, cell)

    def descend(objective, steps):
        phi, path = {"loc": np.array(-1.0), "log_scale": np.array(0.0)}, []
        for _ in range(steps):
            path.append((divergence(phi), bound(phi)))
            phi = tree.map(lambda p, g: p - 0.02 * g, phi, grad(objective)(phi))
        return np.array(path).T

    kls, bounds = descend(divergence, 250)
    evidence_moves = np.ptp(kls + bounds)
    record("KL(q ‖ posterior) falls by, nats", kls[0] - kls[-1])
    record("ELBO rises by, nats", bounds[-1] - bounds[0])
    record("log-evidence changes by, nats", evidence_moves, limit=1e-10)
    assert evidence_moves < 1e-10 and kls[-1] < 1e-4 < 5 < kls[0] - kls[-1]
    assert abs(kls[-1] + bounds[-1] - log_evidence(EXAMPLE, X)) < 1e-10
    kls, bounds = descend(bound, 6)  # "minimise the right side"
    record("minimising the ELBO instead: KL(q ‖ posterior) rises by, nats", kls[-1] - kls[0])
    assert np.all(np.diff(kls) > 0) and kls[-1] > 2 * kls[0]


@claim("E4")
def test_elbo_divergence_from_the_joint_is_none(record):
    z, cell = grid(-12, 12, 1201)
    phi, x = {"loc": 0.2, "log_scale": -0.5}, np.array([0.005])
    table, log_q = log_joint(SHARP, z, x), normal_table(phi, z)
    mass = cell * np.sum(np.exp(table))
    record("integral of the joint density over z (1 for a density)", mass)
    record('"KL(q ‖ joint)", nats (a divergence is at least 0)', kl_by_sum(log_q, table, cell))
    assert mass > 20 and kl_by_sum(log_q, table, cell) < -3
    assert kl_by_sum(log_q, table, cell) == -elbo_by_sum(log_q, table, cell)
    normalised = table - math.log(mass)  # is the posterior
    assert kl_by_sum(log_q, normalised, cell) > 0


@claim("E9")
def test_elbo_printed_bound_is_vacuous(record):
    rng, spare, gap, passed = np.random.default_rng(13), np.inf, np.inf, 0
    for _ in range(500):
        table = random_table(rng)[:, 0]
        log_p = log_evidence_by_sum(table)
        log_q = special.log_softmax(table + 0.1 * rng.standard_normal(8))
        bound = elbo_by_sum(log_q, table)
        spare, gap = min(spare, math.exp(log_p) - bound), min(gap, log_p - bound)
        too_large = bound + 0.9
        passed += math.exp(log_p) >= too_large and log_p < too_large
    record("least distance of p(x) from the ELBO, 500 models", spare, limit=1)
    record("least distance of log p(x) from the ELBO", gap, limit=0)
    record("share of ELBOs raised by 0.9 nats that only log p(x) rejects", passed / 500)
    assert spare > 1 and 0 < gap < 0.001 and passed == 500


# %% [markdown]
# ## Figures
#
# First the example with one latent: Bayes' rule as areas, and in {numref}`fig-elbo-gap` the part of
# the log-evidence that a given $q$ reaches. The reconstruction alone would have $q$ narrow and at
# $z = 1$, where the likelihood is largest; the rate alone would have the prior.

# %%
from chapters.style import COLOUR


def figure_bayes():
    """Prior times likelihood: its area is the evidence, its shape the posterior (left)."""
    import matplotlib.pyplot as plt

    z = np.linspace(-2.5, 3.0, 400)
    prior = np.exp(STANDARD.log_prob(z))
    joint = np.exp(log_joint(EXAMPLE, z[:, None], X))
    post = np.exp(normal_log_density(z[:, None], *posterior(EXAMPLE, X)))
    evidence = math.exp(log_evidence(EXAMPLE, X))
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.8))
    left.plot(z, prior, "--", color="C1", label="prior $p(z)$")
    left.plot(z, joint / prior, ":", color="C3", label="likelihood $p(x \\mid z)$")
    left.fill_between(z, joint, color="C0", alpha=0.35, linewidth=0)
    left.plot(z, joint, color="C0", label=f"joint, area $p(x)$ = {evidence:.3f}")
    left.plot(z, post, color=COLOUR["exact"], label=r"posterior $p(z \mid x)$")
    left.set(xlabel="latent $z$", ylabel="density", ylim=(0, 1.5))
    left.legend(loc="upper left", fontsize=7)

    x = np.linspace(-3.5, 3.5, 400)
    law = np.exp(Normal(0.0, math.sqrt(1.25)).log_prob(x))
    draws = np.random.default_rng(14).standard_normal((4000, 2)) @ np.array([1.0, 0.5])
    right.hist(draws, 35, (-3.5, 3.5), density=True, color=COLOUR["numeric"], alpha=0.5,
               label="4000 ancestral samples")  # fmt: skip
    right.plot(x, law, color=COLOUR["exact"], label="evidence $p(x)$")
    right.plot([1, 1], [0, evidence], "o-", color="C0", label="the datum $x = 1$")
    right.set(xlabel="observation $x$", ylabel="density", ylim=(0, 0.52))
    right.legend(loc="upper left", fontsize=7)
    return fig


# %%
def figure_elbo_gap():
    """ELBO of normal q in the example: the gap to log p(x) is the divergence from the posterior."""
    import matplotlib.pyplot as plt

    best = {"loc": 0.8, "log_scale": 0.5 * math.log(0.2)}
    loc, scale = np.linspace(-0.6, 2.2, 141), np.geomspace(0.1, 2.0, 141)
    exact = log_evidence(EXAMPLE, X)
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.0), sharey=True)
    for ax, along, name in [(axes[0], loc, "loc"), (axes[1], scale, "log_scale")]:
        values = np.log(along) if name == "log_scale" else along
        phis = [tree.map(np.atleast_1d, {**best, name: value}) for value in values]
        rate = np.array([np.sum(rates(phi)) for phi in phis])
        reached = np.array([reconstruction(EXAMPLE, phi, X) for phi in phis])
        bound = reached - rate
        ax.fill_between(along, bound, exact, color="C0", alpha=0.2, linewidth=0)
        ax.plot(along, 0 * along + exact, color=COLOUR["exact"], label=r"$\log p(x)$")
        ax.plot(along, bound, color="C0", label=r"ELBO $\mathcal{L}$")
        ax.plot(along, reached, "--", color="C1", label="reconstruction")
        ax.plot(along, -rate, ":", color="C3", label="minus rate")
        ax.set(ylim=(-5, 0.9))
    axes[0].annotate("gap", (-0.45, -2.3), color="C0")
    axes[0].set(xlabel=r"location $\mu$ of $q$", ylabel="nats")
    axes[1].set(xlabel=r"scale $\sigma$ of $q$", xscale="log", xticks=[0.1, 0.3, 1])
    axes[1].set_xticks([], minor=True)
    axes[1].set_xticklabels(["0.1", "0.3", "1"])
    axes[1].axvline(math.sqrt(0.2), color=COLOUR["numeric"], lw=0.8)
    axes[0].axvline(0.8, color=COLOUR["numeric"], lw=0.8)
    axes[1].legend(loc="lower left", fontsize=7)
    return fig


# %% [markdown]
# What an integral costs, and what independence costs.


# %%
def figure_evidence_cost():
    """Evaluations of the joint density for one per cent of the evidence of the product model."""
    import matplotlib.pyplot as plt

    d = np.arange(1, 101)
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    small = d[:20]
    grid_cost = [float(nodes_needed(int(k))) ** int(k) for k in small]
    ax.semilogy(small, grid_cost, "o", ms=3, color=COLOUR["exact"], label="grid, $n^d$")
    looks = dict(zip(PROPOSALS, [("C2", "--"), ("C1", "-."), ("C0", "-")]))
    for name, q in PROPOSALS.items():
        c = second_moment(*q, 0.8, 0.2)
        colour, line = looks[name]
        draws = (c ** d.astype(float) - 1) / 0.01**2
        ax.semilogy(d, draws, line, color=colour, label=f"proposal: {name}, $c$ = {c:.3f}")
    ax.semilogy(d, 0 * d + 1, ":", color=COLOUR["numeric"], label="proposal: the posterior")
    ax.set(xlabel="number of latents $d$", ylabel="evaluations", ylim=(0.3, 1e20))
    ax.set_yticks([1, 1e4, 1e8, 1e12, 1e16, 1e20])
    ax.legend(loc="upper right", fontsize=7)
    return fig


# %%
def figure_mean_field():
    """A factorised q inside a correlated posterior; what it misses, against the correlation."""
    import matplotlib.pyplot as plt

    theta, x = correlated(0.9)
    m, precision = posterior(theta, x)
    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0))
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for radius, label in [(1.0, "exact posterior"), (2.0, None)]:
        L = np.linalg.cholesky(np.linalg.inv(precision))
        left.plot(*(m[:, None] + radius * L @ circle), color=COLOUR["exact"], label=label)
        q = m[:, None] + radius * circle / np.sqrt(np.diag(precision))[:, None]
        look = {"color": COLOUR["mean_field"], "linestyle": "--"}
        left.plot(*q, label=label and "mean field", **look)
    loc = np.array([1.9, 1.75])
    path = [loc.copy()]
    for j in [0, 1] * 6:
        loc[j] = mean_field_update(loc, m, precision, j)
        path.append(loc.copy())
    left.plot(
        *np.transpose(path), "-", marker=".", color="C1", lw=0.9, label="location, 12 updates"
    )
    left.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal", xlim=(-1.6, 2.8), ylim=(-1.6, 2.9))
    left.legend(loc="lower left", fontsize=7)

    rho = np.linspace(0, 0.995, 200)
    look = {"color": COLOUR["mean_field"], "linestyle": "--"}
    right.plot(rho, -0.5 * np.log1p(-(rho**2)), label="gap, nats", **look)
    right.plot(rho, 1 - rho**2, ":", color="C2", label="variance of $q$ / exact variance")
    marks = np.array([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
    gaps = []
    for r in marks:
        theta, x = correlated(r)
        m, precision = posterior(theta, x)
        phi = {"loc": m, "log_scale": -0.5 * np.log(np.diag(precision))}
        gaps.append(log_evidence(theta, x) - elbo(theta, phi, x))
    right.plot(marks, gaps, "s", color=COLOUR["mean_field"], label="$\\log p(x)$ minus best ELBO")
    right.set(xlabel=r"correlation $|\rho|$", ylim=(-0.05, 2.1))
    right.legend(loc="upper left", fontsize=7)
    return fig


# %% [markdown]
# Coordinate ascent from five starts, EM as a staircase between bound and evidence, and the two
# modes.


# %%
def figure_coordinate_ascent():
    """Coordinate ascent on a mixture: mean field from five starts, and EM under its evidence."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0))
    exact = mixture_log_evidence(DATA, 2, PRIOR_VAR)
    updates = np.arange(1, 21)
    for i, start in enumerate(STARTS):
        bounds, _ = coordinate_ascent(DATA, np.array(start), PRIOR_VAR, 10)
        left.plot(
            updates / 2,
            bounds,
            color=f"C{i}",
            label=f"from {start[0]:g}, {start[1]:g}".replace("-", "−"),
        )
    left.axhline(exact, color=COLOUR["exact"], linestyle="-")
    left.annotate("exact log-evidence", (10, exact + 0.4), ha="right")
    left.set(xlabel="sweeps", ylabel="ELBO, nats", ylim=(-45, -21), title="mean field")
    left.legend(loc="lower right", fontsize=7)

    bounds, log_p, _ = em(DATA, np.array([0.0, 0.3]), 8)
    log_p = np.concatenate([[mixture_log_likelihood(DATA, np.array([0.0, 0.3]))], log_p])
    steps = np.arange(len(log_p))
    right.plot(
        steps, log_p, "o-", color=COLOUR["exact"], label=r"$\log p_\theta(x)$ after each M step"
    )
    path = np.column_stack([steps[:-1], steps[1:], steps[1:]]).ravel()
    heights = np.column_stack([bounds[::2], bounds[1::2], log_p[1:]]).ravel()
    right.plot(path, heights, "--", color="C0", label="bound: M step, then E step")
    right.set(xlabel="steps", ylabel="nats", title="EM")
    right.legend(loc="lower right", fontsize=7)
    return fig


# %%
def figure_two_modes():
    """Normal fits to two modes, and the minima of the reverse divergence (right)."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0))
    delta, z = 3.0, LINE[:, 0]
    left.fill_between(z, np.exp(two_modes(delta))[:, 0], color=COLOUR["numeric"], alpha=0.5,
                      linewidth=0, label="$p$, modes at ±3")  # fmt: skip
    for start, line, label in [(3.0, "-", "reverse, best"), (0.0, "--", "reverse, local minimum")]:
        loc, scale, _ = fit_reverse(two_modes(delta), start, 1.0 + (start == 0) * 2)
        q = np.exp(Normal(loc, scale).log_prob(z))
        left.plot(z, q, line, color=COLOUR["mean_field"], label=label)
    forward = np.exp(Normal(0.0, math.sqrt(1 + delta**2)).log_prob(z))
    left.plot(z, forward, ":", color="C2", label="forward")
    left.set(xlabel="$z$", ylabel="density", xlim=(-8, 8), ylim=(0, 0.62))
    left.legend(loc="upper left", fontsize=7)

    deltas = np.linspace(0.5, 4, 29)
    one = [fit_reverse(two_modes(t), t, 1.0) for t in deltas]
    both = [fit_reverse(two_modes(t), 0.0, math.sqrt(1 + t * t)) for t in deltas]
    at_mode = np.array([fit[0] > 0.5 * t for fit, t in zip(one, deltas)])
    right.plot(
        deltas, [fit[2] for fit in both], "--", color=COLOUR["mean_field"], label="across both"
    )
    right.plot(deltas[at_mode], [fit[2] for fit, keep in zip(one, at_mode) if keep], "-",
               color=COLOUR["mean_field"], label="at one mode")  # fmt: skip
    right.axhline(math.log(2), color=COLOUR["exact"], lw=0.8)
    right.annotate(r"$\log 2$", (0.6, math.log(2) + 0.03))
    right.set(
        xlabel=r"distance $\delta$ of the modes from 0", ylabel=r"$\mathrm{KL}(q \,\|\, p)$, nats"
    )
    right.legend(loc="lower right", fontsize=7)
    return fig


# %% [markdown]
# ## Exercises
#
# **1. The two halves.** For $q = N(\mu, \mathrm{diag}\,\sigma^2)$ and $p = N(0, I)$ compute
# $\int q \log q$ and $\int q \log p$ separately, and from them {eq}`eq-elbo-kl-normal`.
#
# ```{admonition} Solution
# :class: dropdown
#
# $\log q(z) = \sum_j \big( -\frac12 \log 2\pi\sigma_j^2 - (z_j - \mu_j)^2 / 2\sigma_j^2 \big)$,
# and $\mathbb{E}_q[(z_j - \mu_j)^2] = \sigma_j^2$, so
# $\int q \log q = -\frac12 \sum_j (1 + \log 2\pi + \log\sigma_j^2)$. Likewise
# $\mathbb{E}_q[z_j^2] = \mu_j^2 + \sigma_j^2$ gives
# $\int q \log p = -\frac12 \sum_j (\log 2\pi + \mu_j^2 + \sigma_j^2)$. The second minus the first
# is {eq}`eq-elbo-kl-normal`: the $\log 2\pi$ cancel.
# ```


# %% tags=["hide-cell"]
@claim("B6")
def test_elbo_exercise_1_both_halves_of_the_normal_divergence(record):
    rng, worst = np.random.default_rng(15), 0.0
    for _ in range(5):
        loc, scale = rng.uniform(-1, 1, 2), rng.uniform(0.4, 1.2, 2)
        z, cell = grid(-10, 10, 401, 2)
        log_q = np.sum(Normal(loc, scale).log_prob(z), axis=1)
        log_p = np.sum(STANDARD.log_prob(z), axis=1)
        first = -0.5 * np.sum(1 + LOG_2PI + 2 * np.log(scale))
        second = -0.5 * np.sum(LOG_2PI + loc**2 + scale**2)
        closed = 0.5 * np.sum(1 + np.log(scale**2) - loc**2 - scale**2)
        errors = [
            expect(log_q, log_q, cell) - first,
            expect(log_q, log_p, cell) - second,
            -kl_by_sum(log_q, log_p, cell) - closed,
            -np.sum(kl(Normal(loc, scale), STANDARD)) - closed,
        ]
        worst = max(worst, np.max(np.abs(errors)))
    record("largest error of both halves and their difference, 5 cases", worst, limit=1e-10)
    assert worst < 1e-10


# %% [markdown]
# **2. Bits.** Derive {eq}`eq-elbo-kl-bernoulli` for $q$ and $p$ on $\{0, 1\}^d$ with independent
# bits. How many terms has the sum over all states, and how many has the formula? When is it
# infinite?
#
# ```{admonition} Solution
# :class: dropdown
#
# The logarithm of the product is a sum over bits; the expectation of a sum is the sum of
# expectations, and in the $j$-th only the law of the $j$-th bit matters:
# $a_j \log\frac{a_j}{b_j} + (1 - a_j) \log\frac{1 - a_j}{1 - b_j}$. That is $2d$ terms for $2^d$.
# It is infinite if $p$ excludes a value of a bit that $q$ allows: $b_j = 0 < a_j$ or
# $b_j = 1 > a_j$.
# ```


# %% tags=["hide-cell"]
@claim("B7")
def test_elbo_exercise_2_divergence_of_independent_bits(record):
    rng, worst = np.random.default_rng(16), 0.0
    for d in range(1, 11):
        a, b = rng.uniform(0.02, 0.98, (2, d))
        closed = np.sum(a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)))
        bits = np.array(list(itertools.product([0, 1], repeat=d)))
        log_q, log_p = (np.sum(np.where(bits, np.log(t), np.log1p(-t)), axis=1) for t in (a, b))
        library = np.sum(kl(Bernoulli(special.logit(a)), Bernoulli(special.logit(b))))
        errors = [kl_by_sum(log_q, log_p) - closed, library - closed]
        worst = max(worst, np.max(np.abs(errors)))
    record("largest error against the sum over {0,1}^d, d = 1..10", worst, limit=1e-12)
    assert worst < 1e-12


# %% [markdown]
# **3. Where the mean of the score is not zero.** Show {eq}`eq-elbo-score` for the normal and the
# Bernoulli law by calculation. Then compute it for the uniform law on $(0, \phi)$ and for
# $q_\phi(z) = 6 z (\phi - z)/\phi^3$ on the same interval. What decides?
#
# ```{admonition} Solution
# :class: dropdown
#
# Normal: $\mathbb{E}[(z - \mu)/\sigma^2] = 0$ and $\mathbb{E}[(z - \mu)^2/\sigma^2 - 1] = 0$ for
# $\log\sigma$. Bernoulli with $P(1) = a$: $a \cdot \frac1a - (1 - a) \frac{1}{1 - a} = 0$.
# Uniform: $\log q = -\log\phi$, so the score is $-1/\phi$ at each $z$. The fourth law has the
# score $\frac{1}{\phi - z} - \frac3\phi$, whose mean is
# $\int_0^\phi \frac{6z}{\phi^3} dz - \frac3\phi = 0$, though its support moves. By the Leibniz
# rule
# $0 = \frac{d}{d\phi} \int_0^\phi q_\phi(z)\, dz
# = q_\phi(\phi) + \mathbb{E}[\nabla_\phi \log q_\phi]$:
# what counts is the density *at* the moving end. A fixed support is sufficient, not necessary.
# ```


# %% tags=["hide-cell"]
@claim("B9")
def test_elbo_exercise_3_mean_of_the_score(record):
    def mean_score(log_prob, phi, z, cell):
        copies = np.repeat(np.asarray(phi)[None], len(z), axis=0)
        scores = grad(lambda copies: np.sum(log_prob(z, copies)))(copies)
        q = cell * np.exp(log_prob(z, copies))
        return np.tensordot(q, scores, 1)

    z, cell = grid(-14, 16, 3001)
    normal = lambda z, p: special.normal_log_prob(z, p[:, 0], np.exp(p[:, 1]))
    bits = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    bernoulli = lambda z, p: np.sum(Bernoulli(p).log_prob(z), axis=1)
    zero = [
        *mean_score(normal, [0.7, 0.3], z[:, 0], cell),
        *mean_score(bernoulli, [0.4, -1.2, 2.0], bits, 1.0),
    ]
    record("fixed support, normal and Bernoulli: largest mean score", np.max(np.abs(zero)), 1e-12)
    assert np.max(np.abs(zero)) < 1e-12

    phi, n = 2.5, 4000
    z, cell = (np.arange(n) + 0.5) * phi / n, phi / n  # midpoints of (0, φ)
    uniform = lambda z, p: -np.log(p) + 0 * z
    touching = lambda z, p: math.log(6) + np.log(z) + np.log(p - z) - 3 * np.log(p)
    record("Uniform(0, 2.5): mean score (exact -0.4)", mean_score(uniform, phi, z, cell))
    record("6z(φ - z)/φ³: mean score", mean_score(touching, phi, z, cell), limit=1e-6)
    assert mean_score(uniform, phi, z, cell) == pytest.approx(-1 / phi, rel=1e-12)
    assert abs(mean_score(touching, phi, z, cell)) < 1e-6


# %% [markdown]
# **4. A divergence estimate that is never negative.** Let $t(z) = p(z)/q(z)$ with $z \sim q$. Show
# that $t - 1 - \log t$ is an unbiased estimate of $\mathrm{KL}(q \,\|\, p)$ and never negative.
# When is it better than $-\log t$, and when is it useless?
#
# ```{admonition} Solution
# :class: dropdown
#
# $\mathbb{E}_q[t] = 1$, so $t - 1$ has mean zero (it is a *control variate*, of which Chapter 3
# has more), and $-\log t \ge 1 - t$. When $t = 1 + \epsilon$ with a small $\epsilon$, then
# $-\log t \approx -\epsilon$ but $t - 1 - \log t \approx \frac12 \epsilon^2$: the standard
# deviation is of second order. But the variance of $t$ is $c - 1$ with $c$ as in
# {eq}`eq-elbo-normal-c`, where $p$ takes the place of the posterior and $q$ that of the proposal.
# For $q = N(0, \sigma^2)$ and $p = N(0, 1)$ it is infinite as soon as $\sigma^2 \le \frac12$,
# as for the posterior of the example, whose variance is 0.2.
# ```


# %% tags=["hide-cell"]
def test_elbo_exercise_4_divergence_estimate_that_is_never_negative():
    def moments(q):
        z, cell = grid(-14, 14, 4001)
        log_q, log_t = q.log_prob(z), STANDARD.log_prob(z) - q.log_prob(z)
        plain, positive = -log_t, np.expm1(log_t) - log_t
        assert positive.min() >= 0 > plain.min()
        means = [expect(log_q, f, cell) for f in (plain, positive)]
        np.testing.assert_allclose(means, kl(q, STANDARD), rtol=1e-8)
        return [expect(log_q, (f - m) ** 2, cell) for f, m in zip((plain, positive), means)]

    near, far = moments(Normal(0.1, 1.0)), moments(Normal(1.5, 0.9))
    assert near[1] < 0.02 * near[0] and far[1] > far[0]
    assert second_moment(0.0, 0.7, 0.0, 1.0) == math.inf
    q = Normal(0.1, 1.0)
    log_t = STANDARD.log_prob(z := q.sample(np.random.default_rng(17), 60_000)) - q.log_prob(z)
    check_unbiased(np.expm1(log_t) - log_t, kl(q, STANDARD))


# %% [markdown]
# **5. How fast?** Mean field on two latents with posterior correlation $\rho$: by what factor does
# the distance of the locations from $m$ shrink in one sweep? How many sweeps gain a digit at
# $\rho = 0.99$?
#
# ```{admonition} Solution
# :class: dropdown
#
# By {eq}`eq-elbo-factor-normal` $\mu_1 - m_1$ becomes
# $-\frac{\Lambda_{12}}{\Lambda_{11}} (\mu_2 - m_2)$, and then $\mu_2 - m_2$ becomes
# $-\frac{\Lambda_{12}}{\Lambda_{22}} (\mu_1 - m_1)$. One sweep multiplies by
# $\Lambda_{12}^2 / \Lambda_{11}\Lambda_{22} = \rho^2$. For $\rho = 0.99$ that is 115 sweeps for a
# digit. The same zigzag is in {numref}`fig-mean-field`. What makes the family a poor one makes its
# optimisation slow.
# ```


# %% tags=["hide-cell"]
def test_elbo_exercise_5_coordinate_ascent_contracts_by_the_squared_correlation():
    for rho in (0.3, 0.9, 0.99):
        theta, x = correlated(rho)
        m, precision = posterior(theta, x)
        loc, distances = m + np.array([1.0, -2.0]), []
        for _ in range(4):
            for j in (0, 1):
                loc[j] = mean_field_update(loc, m, precision, j)
            distances.append(np.linalg.norm(loc - m))
        np.testing.assert_allclose(np.divide(distances[1:], distances[:-1]), rho**2, rtol=1e-9)
    assert round(math.log(10) / -math.log(0.99**2)) == 115


# %% [markdown]
# **6. Samples of the posterior are not the posterior.** Suppose that you can draw from the
# posterior but not evaluate it. Show that $1/p(x) = \mathbb{E}_{p(z \mid x)}[1/p(x \mid z)]$. In
# the linear model with one latent and one observation, when has this *harmonic mean* a finite
# variance?
#
# ```{admonition} Solution
# :class: dropdown
#
# $\int \frac{p(z \mid x)}{p(x \mid z)} dz = \int \frac{p(z)}{p(x)} dz = \frac{1}{p(x)}$. The second
# moment is $\frac{1}{p(x)} \int \frac{p(z)}{p(x \mid z)} dz$, whose integrand is
# $\exp\big( -\frac12 z^2 + \frac{1}{2\tau^2} (x - Wz)^2 \big)$ up to a factor. It is finite if and
# only if $W^2 < \tau^2$: if the datum says less about $z$ than the prior does. In the
# example $W^2 = 4\tau^2$. The samples come from where the likelihood is large, and what is averaged
# is large where they never come.
# ```


# %% tags=["hide-cell"]
def test_elbo_exercise_6_harmonic_mean():
    def inverse_likelihoods(tau, rng, S):
        theta = {"weights": np.array([[1.0]]), "log_noise": np.array(math.log(tau))}
        m, precision = posterior(theta, X)
        z = m + rng.standard_normal((S, 1)) / math.sqrt(precision[0, 0])
        log_lik = log_joint(theta, z, X) - STANDARD.log_prob(z[:, 0])
        return np.exp(-log_lik), math.exp(-log_evidence(theta, X))

    rng = np.random.default_rng(18)
    check_unbiased(*inverse_likelihoods(2.0, rng, 100_000))  # W² < τ²
    samples, exact = inverse_likelihoods(0.5, rng, 1_000_000)  # the example
    with pytest.raises(AssertionError):  # biased to the eye, or carried by one sample
        check_unbiased(samples, exact)

    def second_moment_within(window):  # of the example, over |z| < window
        z, cell = grid(-window, window, 4001)
        log_lik = log_joint(EXAMPLE, z, X) - STANDARD.log_prob(z[:, 0])
        return cell * np.sum(np.exp(STANDARD.log_prob(z[:, 0]) - log_lik))

    assert second_moment_within(8.0) > 1e20 * second_moment_within(4.0)
