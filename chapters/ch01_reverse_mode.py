# %% [markdown]
# # 1. Reverse mode
#
# A program computes one number from many. How does that number change when an input changes a
# little, for every input at once, exact to rounding, and at the price of a few runs of the
# program? The answer is the chain rule, applied to the program one operation at a time, from its
# last operation to its first. This chapter turns that sentence into some fifty lines of Python and
# a table of derivatives: an engine for derivatives of any order, which you can write yourself and
# own. The rest of the book uses `minigrad`, which is the same engine for arrays.
#
# **Reads after:** nothing · **Runs in:** 3 s · **Papers:**
# {cite}`linnainmaa1976taylor,griewank2008evaluating,baydin2018automatic,siskind2008nesting`

# %% [markdown]
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $n$, $m$ | numbers of inputs and of outputs | integers |
# | $N$ | number of operations in the program | integer |
# | $x_i$ | the $i$-th number that the program holds; $x_1, \dots, x_n$ are its inputs | scalar |
# | $f_i$ | the operation that computes $x_i$ | function of one or two numbers |
# | $\mathrm{pa}(i)$ | the parents of $x_i$: indices of the arguments of $f_i$, one each | list |
# | $y$ | the result, the last number $x_{n+N}$ | scalar |
# | $\bar x_i$ | cotangent of $x_i$: the derivative $\partial y / \partial x_i$ | as $x_i$ |
# | $\dot x_i$ | tangent of $x_i$: its derivative along a direction $v$ of the inputs | as $x_i$ |
# | $F$, $J$ | a function of arrays, and its Jacobian $\partial F / \partial x$ | $(m,)$, $(m, n)$ |
# | $v$, $u$ | a direction in the inputs, weights of the outputs | $(n,)$, $(m,)$ |
# | $d_0, \dots, d_L$ | widths of a chain of $L$ functions; $d_0 = n$, $d_L = m$ | integers |
# | $h$ | step of a finite difference | scalar |
# | $\varepsilon$ | spacing of floating-point numbers at 1, $2^{-52}$ in float64 | scalar |
# | $Y$, $\bar Y$ | result of one operation on arrays, and its cotangent | as the result |
# | $B$ | number of data in a batch | () |
# | $D$ | dimension of an event: numbers in one input of the network | () |
# | $C$, $E$ | any two arrays of one shape | $(B, H)$ |
# | $\odot$ | elementwise product | of two arrays of one shape |
# | $\varphi$ | any function of one number, applied to every entry | as its argument |
# | $X$, $t$ | a batch of inputs and their labels, 0 or 1 | $(B, D)$, $(B,)$ |
# | $W$, $b$, $w$ | parameters of a network with $H$ hidden units | $(D, H)$, $(H,)$, $(H,)$ |
# | $P$, $A$, $s$ | hidden units before and after tanh, and logits | $(B, H)$ both, $(B,)$ |
# | $\sigma(\cdot)$ | logistic function, $\sigma(s) = 1 / (1 + e^{-s})$ | as its argument |
# | $\ell$ | log-likelihood of the network, averaged over the batch | scalar, nats |

# %% [markdown]
# ## Derivation
#
# ### A program is a list
#
# Take any program that computes $y$ from $x_1, \dots, x_n$. Run it, and write down each
# operation as it happens. Loops are then unrolled, branches are decided, functions are inlined;
# what remains is a list of $N$ assignments {cite}`wengert1964simple`,
#
# $$ x_i = f_i\big(x_j : j \in \mathrm{pa}(i)\big), \qquad j < i, \qquad
#    i = n+1, \dots, n+N . $$ (eq-program)
#
# The condition $j < i$ says no more than that an argument exists before it is used. Draw an edge
# from $x_j$ to $x_i$ for every entry $j$ of the list $\mathrm{pa}(i)$, and write on it the partial
# derivative in that argument,
#
# $$ \frac{\partial f_i}{\partial x_j} , $$ (eq-partial)
#
# a number, since all $x_j$ have values. (An operation that uses a number twice, like $a \cdot a$,
# has it twice in its list: two edges, one per argument.)
#
# How does $y$ depend on a number $x_j$ in the middle? Let the program run up to $x_j$, change $x_j$
# alone, and run the later operations on the changed number: that is what
# $\partial y / \partial x_j$ refers to. The chain rule says that a small change of $x_j$ reaches
# $y$ along every path, and is multiplied by the numbers it meets on the way:
#
# $$ \frac{\partial y}{\partial x_j} = \sum_{\text{paths from } x_j \text{ to } y} \;
#    \prod_{\text{edges of the path}} \frac{\partial f_i}{\partial x_k} . $$ (eq-paths)
#
# This is correct and useless: $k$ operations like `b = a + a` in a row have $2^k$ paths.
# Factor the sum. Group the paths that leave $x_j$ by their first edge, call
# $\bar x_i = \partial y / \partial x_i$ the *cotangent* of $x_i$, and obtain the rule that this
# chapter is about:
#
# $$ \bar y = 1, \qquad
#    \bar x_j = \sum_{i \,:\, j \in \mathrm{pa}(i)}
#               \bar x_i \, \frac{\partial f_i}{\partial x_j} . $$ (eq-chain)
#
# The sum runs over edges: an argument that the same $f_i$ uses twice gives two terms. Each edge is
# used once, whatever the number of paths. What {eq}`eq-chain` needs is an order: $\bar x_j$ may be
# used only when all its users $x_i$ have contributed. As $j < i$ on every edge,
#
# $$ i = n+N, \; n+N-1, \; \dots, \; 2, \; 1 \qquad \text{(newest first)} $$ (eq-order)
#
# is such an order, and it costs nothing to know: number the operations as they run.

# %% [markdown]
# ### The tape
#
# The engine records the list {eq}`eq-program` while the program runs, and then walks it
# backwards. A number under differentiation is a `Var`. It knows its value, its place in the list
# and its incoming edges. (It also has a level, the number of the derivative that it belongs to.
# Until we take derivatives of derivatives there is one level only; skip it for now.)

# %%
import math
import operator
from collections import Counter, defaultdict
from functools import reduce
from itertools import count, pairwise

import numpy as np
import pytest

from chapters.ledger import claim

SERIALS = count(1)
LEVELS = count(1)
TALLY = Counter()  # operations executed on plain numbers, by name: what a derivative costs


class Var:
    """A number under differentiation.

    Its `value` is a float, or a `Var` of a lower level. An edge `(parent, partial)` says that this
    number was computed from `parent`, with that partial derivative. A leaf has no edges.
    """

    def __init__(self, value, level, edges=()):
        self.value, self.level, self.edges = value, level, edges
        self.serial = next(SERIALS)  # Eq. (eq-order)


# %% [markdown]
# (`@claim` marks a test that settles a statement of the book's ledger, and `record` notes the
# figure that it measured, beside its `limit` where there is one. Both may be skipped.)
#
# An operation is a function of plain numbers together with its partial derivatives, one per
# argument. Called on plain numbers, it computes. Called on a `Var`, it takes the values out,
# calls *itself* on them, and records the result with its edges. Why itself and not `f`? That is
# the seed of higher derivatives; for now, read `op(*values)` as `f(*values)`.


# %%
def operation(f, *partials):
    """Make `f` differentiable: `partials[k](y, *args)` is its derivative in argument k."""

    def op(*args):
        level = max((a.level for a in args if isinstance(a, Var)), default=0)
        if level == 0:
            TALLY[f.__name__] += 1
            return f(*args)
        # only arguments of this level are variables here; all others are constants
        traced = [isinstance(a, Var) and a.level == level for a in args]
        values = [a.value if t else a for a, t in zip(args, traced)]
        y = op(*values)  # Eq. (eq-program)
        # Eq. (eq-partial), one edge per traced argument
        edges = [(a, d(y, *values)) for a, t, d in zip(args, traced, partials) if t]
        return Var(y, level, edges)

    return op


# %% [markdown]
# Next comes all of the calculus that the engine knows: a table of derivatives as it stands in
# any schoolbook. A partial derivative may use the result `y`: the derivative of $e^a$ is the
# $e^a$ just computed. The partial derivatives are written in the operations themselves. The
# comparisons `<` and `>` are not in the table: they have no derivative, and look at the plain
# numbers only.

# %%
add = operation(operator.add, lambda y, a, b: 1.0, lambda y, a, b: 1.0)
sub = operation(operator.sub, lambda y, a, b: 1.0, lambda y, a, b: -1.0)
mul = operation(operator.mul, lambda y, a, b: b, lambda y, a, b: a)
div = operation(operator.truediv, lambda y, a, b: div(1.0, b), lambda y, a, b: neg(div(y, b)))
neg = operation(operator.neg, lambda y, a: -1.0)
exp = operation(math.exp, lambda y, a: y)
log = operation(math.log, lambda y, a: div(1.0, a))
sin = operation(math.sin, lambda y, a: cos(a))
cos = operation(math.cos, lambda y, a: neg(sin(a)))
tanh = operation(math.tanh, lambda y, a: sub(1.0, mul(y, y)))

Var.__neg__ = neg
for name, op in {"add": add, "sub": sub, "mul": mul, "truediv": div}.items():
    setattr(Var, f"__{name}__", op)
    setattr(Var, f"__r{name}__", lambda b, a, op=op: op(a, b))  # b.__radd__(a) stands for a + b


def plain(x):
    """The number inside `x`, through all levels."""
    while isinstance(x, Var):
        x = x.value
    return x


Var.__lt__ = lambda a, b: plain(a) < plain(b)
Var.__gt__ = lambda a, b: plain(a) > plain(b)

# %% [markdown]
# To walk back we first need the numbers that `out` was computed from. A search finds them; it
# keeps its own stack instead of calling itself, since Python gives up after a thousand nested
# calls and programs are longer than that. Then the chain rule {eq}`eq-chain`: seed the result
# with 1, visit the newest number first, and let each one hand its cotangent on along its edges.
# The cotangents live in a dictionary that belongs to this one call. Nothing is stored in the
# graph, so a second call gives the same answer as the first.


# %%
def ancestors(out):
    """All numbers that `out` was computed from, and `out`, in the order in which they are found."""
    found, stack = {out.serial: out}, [out]
    while stack:
        for parent, _ in stack.pop().edges:
            if parent.serial not in found:
                found[parent.serial] = parent
                stack.append(parent)
    return list(found.values())


def newest_first(out):
    """The same numbers, newest first: Eq. (eq-order)."""
    return sorted(ancestors(out), key=lambda node: node.serial, reverse=True)


def backward(out, order=newest_first):
    """Cotangents of all that `out` was computed from: a dict keyed by serial number."""
    cotangent = {out.serial: 1.0}
    for node in order(out):
        for parent, partial in node.edges:
            share = mul(cotangent[node.serial], partial)
            if parent.serial in cotangent:
                share = add(cotangent[parent.serial], share)
            cotangent[parent.serial] = share  # Eq. (eq-chain)
    return cotangent


# %% [markdown]
# What is left is to start and to finish: give the inputs a level of their own, run the program,
# and look up the cotangents of the inputs. A result that does not depend on the inputs is a
# number without edges, and all its derivatives are zero.


# %%
def trace(f, xs):
    """Run `f` on fresh leaves with the values `xs`; return its result and the leaves."""
    level = next(LEVELS)
    leaves = [Var(x, level) for x in xs]
    out = f(*leaves)
    if not (isinstance(out, Var) and out.level == level):
        out = Var(out, level)
    return out, leaves


def gradient(f):
    """The function `(*xs) -> list` of the partial derivatives of `f` in all its arguments.

    >>> gradient(lambda a, b: a * b + sin(a))(0.0, 5.0)
    [6.0, 0.0]
    """

    def at(*xs):
        out, leaves = trace(f, xs)
        cotangent = backward(out)
        return [cotangent.get(leaf.serial, 0.0) for leaf in leaves]

    return at


def derivative(f):
    """The derivative of a function of one number.

    >>> derivative(lambda a: a * a * a)(2.0)
    12.0
    """
    return lambda x: gradient(f)(x)[0]


# %% [markdown]
# That is the engine. It never sees the program, only what the program did. So loops, recursion and
# branches need no rule; but whatever is computed from a `Var` must use the operations of the table.
# `math.sin(a)` and `a**2` raise an error: an operation takes a row.


# %%
def rosenbrock(*x):
    """Rosenbrock's function of two or more numbers: a curved valley, lowest at (1, ..., 1)."""
    terms = (100 * (b - a * a) * (b - a * a) + (1 - a) * (1 - a) for a, b in pairwise(x))
    return reduce(add, terms)


def test_tape_gives_the_gradient_of_rosenbrock():
    a, b = -1.2, 0.7
    exact = [-400 * a * (b - a * a) - 2 * (1 - a), 200 * (b - a * a)]
    np.testing.assert_allclose(gradient(rosenbrock)(a, b), exact, rtol=1e-14)


def test_tape_knows_what_does_not_depend_on_an_input():
    assert gradient(lambda a, b: a * 3.0)(2.0, 5.0) == [3.0, 0.0]
    assert gradient(lambda a: 7.0)(2.0) == [0.0]


def test_tape_follows_the_branch_that_ran():
    magnitude = lambda a: a if a > 0 else -a
    assert [derivative(magnitude)(x) for x in (-2.0, 3.0)] == [-1.0, 1.0]
    assert [derivative(lambda a: max(a, 0.0))(x) for x in (-2.0, 3.0)] == [0.0, 1.0]
    factorial_like = lambda a: a * factorial_like(a - 1) if 1 < a else 1.0  # a (a - 1) at a = 2.5
    assert derivative(factorial_like)(2.5) == 4.0


@pytest.mark.parametrize("f", [math.sin, lambda a: a**2])
def test_tape_refuses_what_is_not_in_the_table(f):
    with pytest.raises(TypeError):
        gradient(f)(0.5)


def test_tape_differentiates_a_loop_of_100000_operations():
    rate, steps = 1e-5, 100_000

    def grow(a):
        for _ in range(steps):
            a = a * (1 + rate)
        return a

    assert derivative(grow)(1.0) == pytest.approx((1 + rate) ** steps, rel=1e-11)


# %% [markdown]
# ### Why the order matters
#
# Leave the sort out, and visit the numbers in the order in which the search finds them; the rest
# of the code stays as it is. Try it on
#
# $$ b = a \cdot a, \qquad c = \sin b, \qquad y = b \cdot c . $$ (eq-example)
#
# The search starts at $y$ and finds $b$ before $c$. So $b$ hands on its cotangent when only $y$
# has contributed to it; the share of $c$ arrives later and never reaches $a$
# ({numref}`fig-tape`).


# %%
def example(a):
    """Eq. (eq-example): `b` is used twice, once through `c`."""
    b = a * a
    c = sin(b)
    return b * c


def swapped(a):
    """The same function; the last product has its factors exchanged."""
    b = a * a
    c = sin(b)
    return c * b


def derivative_in_order(f, x, order):
    """The derivative of `f` at `x` when the backward pass visits numbers in the given order."""
    out, (leaf,) = trace(f, [x])
    return backward(out, order)[leaf.serial]


[derivative_in_order(f, 1.5, o) for f in (example, swapped) for o in (newest_first, ancestors)]

# %% [markdown]
# The wrong order is wrong for the first program and right for the second, which computes the
# same thing. That is why the bug survives: it depends on the order in which somebody wrote two
# factors. A few functions picked by hand may all be of the lucky kind. Of the 200 random programs
# that are tested below about four in ten are not.


# %%
def random_program(rng, n_inputs, n_ops):
    """A random list of sums, differences and products, Eq. (eq-program), as a function."""
    # (operation, index of its first argument, of its second)
    assignments = [
        (rng.choice([add, sub, mul]), *rng.integers(n_inputs + i, size=2)) for i in range(n_ops)
    ]

    def program(*xs):
        xs = list(xs)
        for op, j, k in assignments:
            xs.append(op(xs[j], xs[k]))
        return xs[-1]

    return program


def test_tape_wrong_order_fails_where_newest_first_is_right():
    exact = 3.0 * (math.sin(2.25) + 2.25 * math.cos(2.25))
    for f in (example, swapped):
        assert derivative_in_order(f, 1.5, newest_first) == pytest.approx(exact, rel=1e-14)
    assert derivative_in_order(swapped, 1.5, ancestors) == pytest.approx(exact, rel=1e-14)
    assert abs(derivative_in_order(example, 1.5, ancestors) - exact) > 1.0


# %% [markdown]
# What about recursion, which needs no list at all? Let each visit add to a cotangent and pass
# it on at once. There are two ways to write this. Passing on *what has just arrived* adds up the
# paths {eq}`eq-paths` one by one: correct, and exponential (exercise 2). Passing on *all that has
# arrived so far* counts the first contributions again at every later visit. The smallest program
# that shows it is `b = a + a; c = b + b`, whose derivative is 4.


# %%
def backward_recursive(out):
    """WRONG on purpose: every visit hands on all that has arrived so far."""
    cotangent = defaultdict(float)

    def visit(node, g):
        cotangent[node.serial] += g
        for parent, partial in node.edges:
            visit(parent, cotangent[node.serial] * partial)

    visit(out, 1.0)
    return cotangent


def doubled(times):
    """The function that doubles its argument `times` times: b = a + a; c = b + b; ..."""
    return lambda a: reduce(lambda b, _: b + b, range(times), a)


def test_tape_recursion_counts_contributions_twice_and_runs_out_of_stack():
    out, (leaf,) = trace(doubled(2), [1.0])
    assert backward(out)[leaf.serial] == 4.0
    assert backward_recursive(out)[leaf.serial] == 6.0
    deep, _ = trace(lambda a: reduce(lambda b, _: b * 1.0, range(10_000), a), [1.0])
    assert backward(deep)
    with pytest.raises(RecursionError):
        backward_recursive(deep)


# %% [markdown]
# ### Derivatives of derivatives
#
# The backward pass is itself a program of sums and products. To differentiate it, it must be
# recorded in turn. Two things make that happen, and both are already in the code.
#
# *The rules are written in the operations.* The derivative of `sin` calls `cos` of the table, not
# `math.cos`, and `backward` multiplies with `mul`. Whoever traces the gradient sees these calls.
#
# *Every derivative has its level.* `trace` opens a level above all earlier ones, so an inner
# derivative has a higher number than the outer one around it. An operation looks for the highest
# level among its arguments, unwraps the numbers of that level only, and calls itself on what it
# finds; if those are still `Var`s, of a lower level, the call is recorded there too. To the inner
# derivative the variables of the outer one are constants. To the outer derivative, everything
# the inner one did is a program like any other.


# %%
def nth_derivative(f, order):
    """The derivative of `f` of the given order, by differentiating derivatives.

    >>> [nth_derivative(lambda a: a * a * a * a, k)(2.0) for k in range(6)]
    [16.0, 32.0, 48.0, 48.0, 24.0, 0.0]
    """
    return reduce(lambda g, _: derivative(g), range(order), f)


def test_tape_derivatives_of_sine_to_order_six():
    for order in range(7):
        exact = math.sin(0.3 + order * math.pi / 2)
        assert nth_derivative(sin, order)(0.3) == pytest.approx(exact, rel=1e-13)


def test_tape_hessian_of_rosenbrock():
    a, b = -1.2, 0.7
    hessian = [gradient(lambda *x, i=i: gradient(rosenbrock)(*x)[i])(a, b) for i in range(2)]
    exact = [[1200 * a * a - 400 * b + 2, -400 * a], [-400 * a, 200]]
    np.testing.assert_allclose(hessian, exact, rtol=1e-13)


# %% [markdown]
# What if all derivatives shared one level? The classical example is a program of one line
# {cite}`siskind2008nesting,manzyuk2019perturbation`,
#
# $$ \frac{d}{dx} \left[ x \cdot \frac{d}{dy} (x + y) \Big|_{y = 1} \right]_{x = 1}
#    = \frac{d}{dx} \big[ x \cdot 1 \big] = 1 . $$ (eq-confusion)
#
# Here is another small engine, as it is often written. A dual number carries its value and its
# *tangent*, the derivative along the one variable that moves (more of this in the next section),
# and does not say *whose* tangent it is. When the inner derivative adds $x + y$, it cannot tell
# the tangent of $y$, which it asked for, from the tangent of $x$, which belongs to the outer
# derivative. It adds them up.


# %%
class Dual:
    """WRONG on purpose, when nested: a value with a tangent that does not say whose it is."""

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    def __add__(self, other):
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __mul__(self, other):
        other = other if isinstance(other, Dual) else Dual(other, 0.0)
        return Dual(
            self.value * other.value, self.tangent * other.value + self.value * other.tangent
        )


def confusing(differentiate):
    """Eq. (eq-confusion), with the given way to differentiate."""
    return differentiate(lambda x: x * differentiate(lambda y: x + y)(1.0))(1.0)


def dual_derivative(f):
    """Derivative by dual numbers: right for one derivative, wrong for nested ones."""
    return lambda x: f(Dual(x, 1.0)).tangent


confusing(derivative), confusing(dual_derivative)


# %%
def test_tape_follows_the_branch_through_all_levels():
    bend = nth_derivative(lambda a: a * a if a < 1 else a * a * a, 2)
    assert [bend(0.5), bend(2.0)] == [2.0, 12.0]


def test_tape_levels_prevent_perturbation_confusion():
    assert dual_derivative(lambda a: a * a * a)(2.0) == 12.0  # not nested: right
    assert confusing(dual_derivative) == 2.0  # nested: the wrong twin
    assert confusing(derivative) == 1.0


def test_tape_inner_derivative_depends_on_the_outer_variable():
    # d/dx [x d/dy (x y)] = d/dx [x x] = 2x: the inner result must carry x outwards.
    assert derivative(lambda x: x * derivative(lambda y: x * y)(5.0))(3.0) == 6.0
    # d/dx [d/dy (y y x) at y = x] = d/dx [2 x x] = 4x.
    assert derivative(lambda x: derivative(lambda y: y * y * x)(x))(3.0) == 12.0


# %% [markdown]
# ### Forward, backward, and what they cost
#
# The chain rule can be read in the other direction too. Let the inputs move along a direction
# $v$: $\dot x_j = v_j$ for $j \le n$. Then every later number moves at the speed
#
# $$ \dot x_i = \sum_{j \in \mathrm{pa}(i)}
#               \frac{\partial f_i}{\partial x_j} \, \dot x_j , $$ (eq-tangent)
#
# oldest first. These are *tangents*. The same edges are used, in the opposite order.


# %%
def forward(out, tangents):
    """The tangent of `out`, given those of the leaves: a dict keyed by serial number."""
    tangents = dict(tangents)
    for node in reversed(newest_first(out)):
        for parent, partial in node.edges:
            share = mul(partial, tangents.get(parent.serial, 0.0))
            if node.serial in tangents:
                share = add(tangents[node.serial], share)
            tangents[node.serial] = share  # Eq. (eq-tangent)
    return tangents.get(out.serial, 0.0)


def test_tape_random_programs_agree_with_forward_mode():
    rng = np.random.default_rng(0)
    caught = 0
    for _ in range(200):
        f = random_program(rng, n_inputs=1, n_ops=12)
        x = rng.uniform(-1, 1)
        out, (leaf,) = trace(f, [x])
        exact = forward(out, {leaf.serial: 1.0})
        assert backward(out).get(leaf.serial, 0.0) == pytest.approx(exact, rel=1e-9, abs=1e-12)
        wrong = backward(out, ancestors).get(leaf.serial, 0.0)
        caught += abs(wrong - exact) > 1e-6 * (1 + abs(exact))
    assert 70 < caught < 90  # about four in ten tell the two orders apart


# %% [markdown]
# One sweep forward gives the derivative along one direction: for all $n$ partial derivatives it
# takes $n$ sweeps. One sweep backward gives all of them ({numref}`fig-cost-of-modes`). (Forward
# mode costs a little more than central differences, and is exact to rounding.) Let us count. The
# backward pass calculates with the operations of the table, on plain numbers, so `TALLY` counts
# every multiplication and every addition that it makes.
#
# ```{prf:theorem} The cheap gradient
# :label: thm-cheap-gradient
#
# For a program of $N$ sums, differences and products, the tape computes the result and its
# gradient in at most $5N$ operations, whatever the number $n$ of inputs.
# ```
#
# *Proof.* Running the program takes $N$ operations. It has at most $2N$ edges. The partial
# derivatives of sums, differences and products are $\pm 1$ or one of the factors, so they cost
# nothing. The backward pass makes one product per edge, and at most one sum per edge.
# $\square$
#
# The other operations of the table have constants of their own, read off their rows in the same
# way: 3 for `neg` and `exp`, 4 for `log` and `sin`, 5 for `cos` and `tanh`, 8 for `div`. The
# largest of them bounds the whole. The general theory is in {cite}`griewank2008evaluating`. What
# grows with $N$ is the memory: all partial derivatives are kept until the walk back.


# %%
def cost(f, *args):
    """The number of operations on plain numbers that the call `f(*args)` executes."""
    TALLY.clear()
    f(*args)
    return TALLY.total()


def cost_of_modes(f, n):
    """Cost of a gradient of `f` in `n` inputs, per cost of `f`: backward, forward, differences.

    Forward mode traces once and sweeps n times. Every sweep meets the same edges, so one of them
    is counted and multiplied by n. Central differences evaluate `f` 2n times.
    """
    xs = [1.0 + 0.5 * math.sin(i) for i in range(n)]
    traced = cost(trace, f, xs)
    out, leaves = trace(f, xs)
    program = sum(bool(node.edges) for node in ancestors(out))  # N of Eq. (eq-program)
    sweep = cost(forward, out, {leaf.serial: 1.0 for leaf in leaves})
    return cost(gradient(f), *xs) / program, (traced + n * sweep) / program, 2 * n


def product(*x):
    """The product of all arguments, in n - 1 operations (Speelpenning's example)."""
    return reduce(mul, x)


def log_sum_exp(*x):
    """The logarithm of the sum of exponentials."""
    return log(reduce(add, map(exp, x)))


def test_tape_gradient_of_sums_and_products_takes_at_most_five_operations_for_one():
    rng = np.random.default_rng(1)
    for _ in range(200):
        f = random_program(rng, n_inputs=4, n_ops=30)
        # at most 5 N, by the theorem
        assert cost(gradient(f), *rng.uniform(-1, 1, 4).tolist()) <= 5 * 30
    # A product uses each number once: one run, two multiplications per operation, no sums.
    assert cost(gradient(product), *[1.5] * 100) == 3 * 99


def test_tape_constants_of_the_other_operations():
    constants = {neg: 3, exp: 3, log: 4, sin: 4, cos: 5, tanh: 5}
    for f, constant in constants.items():
        assert cost(gradient(f), 0.7) + 1 == constant  # and one sum, if its argument has other uses
    assert cost(gradient(div), 0.7, 1.3) + 2 == 8


@claim("A3")
def test_tape_gradient_costs_the_same_few_evaluations_for_any_number_of_inputs(record):
    for f in (product, rosenbrock, log_sum_exp):
        few, many = cost_of_modes(f, 8), cost_of_modes(f, 512)
        record(f"{f.__name__}: operations of the gradient / of f, 512 inputs", many[0], limit=5)
        assert many[0] <= 5  # no operation in these three has a larger constant
        assert many[0] == pytest.approx(few[0], rel=0.25)
        assert many[1] > 50 * few[1]  # forward mode pays for every input


# %% [markdown]
# ### From numbers to arrays
#
# Nothing in {eq}`eq-chain` requires the $x_i$ to be numbers. If $x_j$ and $x_i$ are arrays, the
# partial derivative is a Jacobian. Consider a chain of functions
# $F = F_L \circ \dots \circ F_1$ with widths $d_0, \dots, d_L$. The chain rule reads
#
# $$ J = J_L \, J_{L-1} \cdots J_2 \, J_1,
#    \qquad J_i \text{ of shape } (d_i, d_{i-1}) . $$ (eq-jacobian)
#
# A product of matrices can be bracketed as one likes. From the right it is forward mode, column
# by column; from the left it is reverse mode, row by row:
#
# $$ J v = J_L \big( \cdots ( J_2 ( J_1 v )) \big), \qquad
#    u^\top J = \big( (( u^\top J_L ) J_{L-1} ) \cdots \big) J_1 . $$ (eq-brackets)
#
# ($J_i$ is taken at the values that the chain passes.) The result is the same, the work is not.
# Multiplying a $(p, q)$ by a $(q, r)$ matrix takes $pqr$ multiplications, so the whole Jacobian
# takes
#
# $$ \underbrace{d_0 \sum_{i=2}^{L} d_i \, d_{i-1}}_{\text{forward}}
#    \qquad\text{or}\qquad
#    \underbrace{d_L \sum_{i=1}^{L-1} d_i \, d_{i-1}}_{\text{reverse}} . $$ (eq-cost)
#
# (All directions at once: replace $v$ and $u$ by identity matrices. The first product is then
# free.) As a rule, begin at the narrow end; {eq}`eq-cost` decides. A log-likelihood has $m = 1$
# output and may have millions of inputs: that is why machine learning runs on reverse mode. Where
# the chain is narrow in the middle, beginning there may beat both modes: in
# {numref}`fig-bracketing`, on the right, it does for more than two outputs (exercise 4).


# %%
def forward_cost(widths):
    """Multiplications of a Jacobian bracketed from the right: Eq. (eq-cost), first term."""
    return widths[0] * sum(a * b for a, b in pairwise(widths[1:]))


def reverse_cost(widths):
    """Multiplications of a Jacobian bracketed from the left: Eq. (eq-cost), second term."""
    return widths[-1] * sum(a * b for a, b in pairwise(widths[:-1]))


def test_tape_brackets_change_the_cost_and_not_the_jacobian():
    rng = np.random.default_rng(2)
    widths = [7, 5, 6, 4, 2]
    jacobians = [rng.standard_normal((b, a)) for a, b in pairwise(widths)]  # J_1, ..., J_L

    def multiply(a, b):
        nonlocal multiplications
        multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b

    multiplications = 0
    from_right = reduce(lambda right, left: multiply(left, right), jacobians)
    assert multiplications == forward_cost(widths) == 7 * (5 * 6 + 6 * 4 + 4 * 2)
    multiplications = 0
    from_left = reduce(multiply, reversed(jacobians))
    assert multiplications == reverse_cost(widths) == 2 * (7 * 5 + 5 * 6 + 6 * 4)
    np.testing.assert_allclose(from_left, from_right, rtol=1e-12)
    assert reverse_cost([9, 1, 1000, 10]) < forward_cost([9, 1, 1000, 10])  # 9 inputs, 10 outputs


# %% [markdown]
# Nor is a Jacobian ever built. For an elementwise function it is diagonal, for a sum it is a row
# of ones; to store it would be absurd. An edge therefore carries, instead of the number
# $\partial f_i / \partial x_j$, the *function* that multiplies by its transpose: the *pull-back*
#
# $$ \bar x_i \;\longmapsto\;
#    \Big( \frac{\partial f_i}{\partial x_j} \Big)^{\!\top} \bar x_i . $$ (eq-pullback)
#
# (Arrays are flattened for this formula only. The transpose is there because $u^\top J$ in
# {eq}`eq-brackets` is a row, and a cotangent is stored in the shape of its array.) It takes a
# cotangent of the shape of the result to a cotangent of the shape of the argument.
#
# To find a pull-back, change the arguments a little, and bring everything to their side of the
# inner product $\langle C, E \rangle = \sum_{r,k} C_{rk} E_{rk}$. A change $dY$ of the array $Y$
# changes $y$ by $\langle \bar Y, dY \rangle$. For $Y = X W$ that is
#
# $$ \langle \bar Y, \, dX \, W + X \, dW \rangle
#    = \langle \bar Y W^\top, \, dX \rangle + \langle X^\top \bar Y, \, dW \rangle . $$ (eq-adjoint)
#
# What stands beside $dX$ is the cotangent of $X$. The other rows of this table are found in the
# same way. These five, and special cases of them, are all that the network below needs: $A w$ is
# the first with one column, a mean is a sum divided by its length.
#
# | result $Y$ | pull-back of $\bar Y$ | shapes |
# |---|---|---|
# | $X W$ | $X^\top \bar Y$ to $W$, $\;\bar Y W^\top$ to $X$ | $(B, D)(D, H)$ |
# | $C + b$, in each row | $\bar Y$ to $C$, $\sum_{\text{rows}} \bar Y$ to $b$ | $(B, H) + (H,)$ |
# | $\varphi(C)$, elementwise | $\bar Y \odot \varphi'(C)$ | $(B, H)$ |
# | $\sum_{\text{rows}} C$ | $\bar Y$ repeated over rows | $(B, H) \to (H,)$ |
# | $C \odot E$ | $\bar Y \odot E$ to $C$, $\;\bar Y \odot C$ to $E$ | $(B, H)$ |
#
# Mark the second and the fourth: repeating and summing are each other's transpose. Whenever
# NumPy broadcasts on the way forward, the cotangent is summed on the way back.

# %% [markdown]
# ## By hand
#
# Before a machine does it, do it once with pen and paper. The example is the smallest network
# worth the name: a batch $X$ of $B$ inputs, $H$ hidden units, one logit per input, and labels
# $t_r \in \{0, 1\}$. Its parameters maximise the log-likelihood per input,
#
# $$ P = X W + b, \quad A = \tanh P, \quad s = A w, \quad
#    \ell = \frac1B \sum_{r=1}^{B} \big( t_r \, s_r - \log(1 + e^{s_r}) \big) . $$ (eq-network)
#
# Walk back from $\bar\ell = 1$, newest first, with the table of pull-backs. The derivative of
# $\log(1 + e^s)$ is the logistic function $\sigma(s) = 1 / (1 + e^{-s})$, and
# $\tanh' = 1 - \tanh^2$:
#
# $$ \bar s = \frac{t - \sigma(s)}{B}, \qquad
#    \bar w = A^\top \bar s, \qquad
#    \bar A = \bar s \, w^\top, $$ (eq-hand-output)
#
# $$ \bar P = \bar A \odot (1 - A \odot A), \qquad
#    \bar W = X^\top \bar P, \qquad
#    \bar b = \sum_{\text{rows}} \bar P . $$ (eq-hand-hidden)


# %%
def log_likelihood(params, x, t):
    r"""Mean log-likelihood of labels `t` (B,) given inputs `x` (B, D), in nats: Eq. (eq-network).

    `params` holds "W" (D, H), "b" (H,) and "w" (H,).
    """
    a = np.tanh(x @ params["W"] + params["b"])
    s = a @ params["w"]
    return np.mean(t * s - np.logaddexp(0.0, s))  # log(1 + e^s) without overflow


def log_likelihood_grad(params, x, t):
    """Gradient of `log_likelihood` in its parameters, by hand: a dict of the same shapes."""
    a = np.tanh(x @ params["W"] + params["b"])  # (B, H)
    s = a @ params["w"]  # (B,)
    s_bar = (t - np.exp(-np.logaddexp(0.0, -s))) / len(t)  # Eq. (eq-hand-output), (B,)
    a_bar = np.outer(s_bar, params["w"])  # (B, H)
    p_bar = a_bar * (1 - a * a)  # Eq. (eq-hand-hidden), (B, H)
    return {"W": x.T @ p_bar, "b": np.sum(p_bar, axis=0), "w": a.T @ s_bar}


def network(rng, batch, n_inputs, n_hidden):
    """Random parameters, inputs and labels for `log_likelihood`."""
    params = {
        "W": rng.standard_normal((n_inputs, n_hidden)),
        "b": rng.standard_normal(n_hidden),
        "w": rng.standard_normal(n_hidden),
    }
    x = rng.standard_normal((batch, n_inputs))
    return params, x, rng.integers(0, 2, batch).astype(float)


# %% [markdown]
# Every line is a chance to forget a sum or a transpose. The tape has no such chance: it runs the
# same network number by number. That is slow, and a test.


# %%
def test_tape_agrees_with_the_gradient_by_hand():
    batch, n_inputs, n_hidden = 5, 3, 2
    params, x, t = network(np.random.default_rng(3), batch, n_inputs, n_hidden)

    def on_the_tape(*theta):
        weights = np.reshape(np.array(theta, dtype=object), (n_inputs + 2, n_hidden))
        total = 0.0
        for row, label in zip(x.tolist(), t.tolist()):
            s = 0.0
            for j in range(n_hidden):
                a = weights[n_inputs, j]
                for i in range(n_inputs):
                    a = a + row[i] * weights[i, j]
                s = s + tanh(a) * weights[n_inputs + 1, j]
            total = total + label * s - log(1 + exp(s))
        return total / batch

    theta = np.concatenate([params[k].ravel() for k in ("W", "b", "w")])
    by_hand = log_likelihood_grad(params, x, t)
    np.testing.assert_allclose(
        gradient(on_the_tape)(*theta.tolist()),
        np.concatenate([by_hand[k].ravel() for k in ("W", "b", "w")]),
        rtol=1e-12,
    )


# %% [markdown]
# ## With minigrad
#
# `log_likelihood` is plain NumPy, and `minigrad` differentiates plain NumPy. The gradient by
# hand shrinks to one word.

# %%
from minigrad import grad, jacobian, jvp, vjp


def test_minigrad_agrees_with_the_gradient_by_hand():
    params, x, t = network(np.random.default_rng(4), batch=40, n_inputs=7, n_hidden=6)
    by_hand = log_likelihood_grad(params, x, t)
    gradients = grad(log_likelihood)(params, x, t)
    assert gradients.keys() == by_hand.keys()
    for name in by_hand:
        np.testing.assert_allclose(gradients[name], by_hand[name], rtol=1e-12, atol=1e-15)


# %% [markdown]
# It is the engine that you have just read. Open `minigrad/core.py` beside this page:
#
# | on your tape | in `minigrad` | what is different |
# |---|---|---|
# | `Var` | `Tracer` and its `node` | no value in a node: arrays live only while a rule needs them |
# | `operation` | `primitive` | a rule gives a pull-back {eq}`eq-pullback`, not a number |
# | `add`, …, `tanh` | `elementwise.py`, `arrays.py`, … | the same table, longer |
# | `Var.__add__`, … | `__array_ufunc__`, … | NumPy's own `np.exp(x)` finds its rule |
# | `newest_first`, `backward` | `backward` | a heap finds the newest node during the walk |
# | – | `_fit` | undoes broadcasting and keeps the dtype, once for all rules |
# | `trace`, `gradient` | `vjp`, `grad` | arguments are nested containers of arrays |
# | `forward` | `jvp` | two backward passes instead of a forward one |
#
# The last row deserves a line. $\bar y \mapsto J^\top \bar y$ is a linear map, whose Jacobian is
# $J^\top$ at every point, zero for instance. Pull *its* cotangent $v$ back, and the result is
# $(J^\top)^\top v = J v$: forward mode from two reverse passes, with no second table of rules.


# %%
def test_minigrad_and_the_tape_agree_on_functions_of_numbers():
    x = [0.7, -0.4, 1.3]

    def on_the_tape(a, b, c):
        return sin(a * b) / (1 + exp(-c)) + log(a * a + c * c) * tanh(b)

    def in_numpy(x):
        a, b, c = x
        return np.sin(a * b) / (1 + np.exp(-c)) + np.log(a * a + c * c) * np.tanh(b)

    np.testing.assert_allclose(gradient(on_the_tape)(*x), grad(in_numpy)(np.array(x)), rtol=1e-13)
    assert confusing(grad) == 1.0
    assert grad(example_in_numpy)(1.5) == pytest.approx(derivative(example)(1.5), rel=1e-14)
    assert grad(grad(example_in_numpy))(1.5) == pytest.approx(
        nth_derivative(example, 2)(1.5), rel=1e-13
    )


def example_in_numpy(a):
    """Eq. (eq-example), written for arrays."""
    b = a * a
    return b * np.sin(b)


def test_minigrad_products_are_rows_and_columns_of_the_jacobian():
    rng = np.random.default_rng(5)
    w, x, v, u = (rng.standard_normal(s) for s in [(4, 3), 3, 3, 4])

    def f(x):
        return np.tanh(w @ x)

    j = jacobian(f)(x)
    np.testing.assert_allclose(j, (1 - f(x) ** 2)[:, None] * w, rtol=1e-13)
    np.testing.assert_allclose(jvp(f, (x,), (v,))[1], j @ v, rtol=1e-13)  # Eq. (eq-brackets)
    np.testing.assert_allclose(vjp(f, x)[1](u)[0], u @ j, rtol=1e-13)


# %% [markdown]
# ## Checks
#
# ### Finite differences
#
# How does one know that a derivative is right? Compare it with the definition, for a small step
# $h$: the forward and the central difference
#
# $$ \frac{f(x + h) - f(x)}{h} = f'(x) + \frac{h}{2} f''(x) + O(h^2), $$ (eq-forward-difference)
#
# $$ \frac{f(x + h) - f(x - h)}{2h}
#    = f'(x) + \frac{h^2}{6} f'''(x) + O(h^4) . $$ (eq-central-difference)
#
# A smaller step is not a better one. Every value of $f$ is rounded, with a relative error of up to
# $\varepsilon / 2$, and the division by $h$ magnifies that error. The bounds of the total errors,
#
# $$ \frac{h}{2} \, |f''| + \frac{\varepsilon \, |f|}{h}
#    \qquad\text{and}\qquad
#    \frac{h^2}{6} \, |f'''| + \frac{\varepsilon \, |f|}{2 h} , $$ (eq-error)
#
# fall and rise again: on logarithmic axes they are a V, with slopes $+1$ or $+2$ on the right and
# $-1$ on the left ({numref}`fig-v-curve`). They are smallest at
#
# $$ h = \sqrt{2 \varepsilon \, |f / f''|} \sim \varepsilon^{1/2}
#    \qquad\text{and}\qquad
#    h = \sqrt[3]{\tfrac32 \varepsilon \, |f / f'''|} \sim \varepsilon^{1/3} , $$ (eq-step)
#
# where the errors are of order $\varepsilon^{1/2} \approx 10^{-8}$ and
# $\varepsilon^{2/3} \approx 4 \cdot 10^{-11}$. No real difference quotient checks a derivative to
# sixteen digits. The central one checks it to about ten, at the point tried: enough for a wrong
# sign, factor or term.


# %%
EPS = np.finfo(np.float64).eps


def forward_difference(f, x, h):
    """Eq. (eq-forward-difference)."""
    return (f(x + h) - f(x)) / h


def central_difference(f, x, h):
    """Eq. (eq-central-difference)."""
    return (f(x + h) - f(x - h)) / (2 * h)


def complex_step(f, x, h=1e-20):
    """Im f(x + ih) / h: no difference, hence no cancellation, for analytic `f` only."""
    return f(x + 1j * h).imag / h


# %% [markdown]
# The last one is a remark with a moral {cite}`squire1998using`. Expand $f(x + ih)$: its imaginary
# part is $h f'(x) - O(h^3)$. The error is of order $h^2$, and below $h \approx \sqrt\varepsilon$ it
# is rounding alone: nothing is subtracted, so $h$ may be $10^{-20}$. It needs an $f$ that accepts
# complex numbers, with no `abs` and no comparison in it, and it is forward mode in disguise: the
# imaginary part is the tangent.
#
# We measure the errors on $f(x) = 1/x$, at points and steps that float64 holds exactly, so that
# the only rounding is in the division. For this function {eq}`eq-step` reads
# $h = x \sqrt{\varepsilon}$ and $h = x \sqrt[3]{\varepsilon / 4}$.

# %%
POINTS = 1 + np.arange(256) / 256  # in [1, 2): x + h and x - h are exact for the steps below
STEPS = 2.0 ** -np.arange(2, 45)


def v_curve(rule):
    """Relative error of `rule` on f(x) = 1/x, root mean square over POINTS, for each of STEPS."""
    exact = -1 / (POINTS * POINTS)
    errors = [rule(lambda x: 1 / x, POINTS, h) / exact - 1 for h in STEPS]
    return np.sqrt(np.mean(np.square(errors), axis=1))


def slope(steps, errors, low, high):
    """Slope on logarithmic axes, fitted to the steps between `low` and `high`."""
    part = (low <= steps) & (steps <= high)
    return np.polyfit(np.log(steps[part]), np.log(errors[part]), 1)[0]


@claim("A2")
@pytest.mark.parametrize(
    "rule, order, best_step, best_error",
    [
        # For f = 1/x, relative to |f'|: Eq. (eq-step), and Eq. (eq-error) at that step.
        (forward_difference, 1, EPS ** (1 / 2), 2 * EPS ** (1 / 2)),
        (central_difference, 2, (EPS / 4) ** (1 / 3), 3 * (EPS / 4) ** (2 / 3)),
    ],
)
def test_finite_difference_error_is_a_v(rule, order, best_step, best_error, record):
    errors = v_curve(rule)
    name = rule.__name__
    rising = slope(STEPS, errors, 30 * best_step, 0.03)
    falling = slope(STEPS, errors, 2.0**-44, best_step / 30)
    record(f"{name}: slope of the truncation error (theory {order})", rising)
    record(f"{name}: slope of the round-off error (theory -1)", falling)
    assert rising == pytest.approx(order, abs=0.05)
    assert falling == pytest.approx(-1, abs=0.05)
    step = STEPS[np.argmin(errors)] / np.median(POINTS)
    record(f"{name}: best step / x (theory {best_step:.1e})", step)
    assert 1 / 4 < step / best_step < 4
    record(f"{name}: smallest relative error", errors.min(), limit=best_error)
    assert best_error / 10 < errors.min() < best_error  # the bound holds, and is not idle


def test_complex_step_is_exact_to_rounding():
    errors = v_curve(complex_step)
    assert slope(STEPS, errors, 1e-6, 0.03) == pytest.approx(2, abs=0.01)
    assert np.max(errors[np.sqrt(EPS) > STEPS]) < EPS
    # The largest of 256 errors, of a division and a few products with half an EPS each.
    assert np.max(np.abs(complex_step(lambda x: 1 / x, POINTS) * POINTS**2 + 1)) < 4 * EPS
    x = 0.8
    by_tape = derivative(lambda a: exp(sin(a)) / a)(x)
    assert complex_step(lambda a: np.exp(np.sin(a)) / a, x) == pytest.approx(by_tape, rel=1e-14)


# %% [markdown]
# ### One random direction
#
# Differences in every coordinate take $2n$ evaluations, and a Jacobian has $mn$ entries. There is
# no need to look at all of them. Draw a random direction $v$ of the inputs and random weights $u$
# of the outputs, and compare two numbers,
#
# $$ \Big\langle u, \; \frac{F(x + h v) - F(x - h v)}{2h} \Big\rangle
#    \;\approx\; \langle u, J v \rangle
#    \; = \; \langle J^\top u, v \rangle . $$ (eq-projection)
#
# On the left there are two evaluations of $F$, on the right one pull-back. If $J^\top u$ is wrong
# by a vector $e \ne 0$, the two differ by $\langle e, v \rangle$, which is zero with probability
# zero. This is how `minigrad.check.check_grads` works; it also extrapolates the difference to step
# zero, and for order 2 it applies the same check to the pull-back. Here it is for a gradient,
# where $m = 1$ and $u = 1$.


# %%
def projection_gap(f, gradients, params, rng):
    """Gap of Eq. (eq-projection) for a scalar `f` of a dict of arrays, per norm of the gradient."""
    v = {k: rng.standard_normal(p.shape) for k, p in params.items()}
    along = central_difference(
        lambda step: f({k: p + step * v[k] for k, p in params.items()}), 0.0, EPS ** (1 / 3)
    )
    inner = sum(np.sum(gradients[k] * v[k]) for k in params)
    norm = math.sqrt(sum(np.sum(g * g) for g in gradients.values()))
    return abs(along - inner) / norm


def test_random_projection_accepts_the_right_gradient_and_rejects_a_wrong_one():
    params, x, t = network(np.random.default_rng(6), batch=50, n_inputs=10, n_hidden=8)
    right = log_likelihood_grad(params, x, t)
    largest = np.argmax(np.abs(right["W"]))
    wrong = {**right, "W": right["W"].copy()}
    wrong["W"].flat[largest] *= 1.001  # one of 96 numbers, by one part in a thousand
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert projection_gap(lambda p: log_likelihood(p, x, t), right, params, rng) < 1e-8
    gaps = [
        projection_gap(lambda p: log_likelihood(p, x, t), wrong, params, np.random.default_rng(s))
        for s in range(20)
    ]
    assert min(gaps) > 1e-7


def test_repeating_and_summing_are_transposes():
    rng = np.random.default_rng(7)
    a, g = rng.standard_normal((4, 3)), rng.standard_normal(3)
    summed, repeated = np.sum(a, axis=0), np.broadcast_to(g, (4, 3))
    assert np.vdot(summed, g) == pytest.approx(np.vdot(a, repeated), rel=1e-13)


# %% [markdown]
# ### Every rule, twice
#
# A derivative rule is checked at order 1 against a difference of the function, and at order 2
# against a difference of the derivative. The second check is not a luxury: a rule can be right
# and still not be differentiable (see below). The table of the tape is small enough to be checked
# row by row.


# %%
def order_two_gap(f, x):
    """Largest relative gap between derivatives of `f` at `x` and central differences, orders 1, 2.

    All first and second partial derivatives are compared; `x` is a list of numbers.
    """
    gap = 0.0
    for i in range(len(x)):
        first = lambda *a, i=i: gradient(f)(*a)[i]
        for g in (f, first):
            for j, exact in enumerate(gradient(g)(*x)):
                along = lambda r, g=g, j=j: g(*x[:j], r, *x[j + 1 :])
                numeric = central_difference(along, x[j], EPS ** (1 / 3))
                gap = max(gap, abs(numeric - exact) / (1 + abs(exact)))
    return gap


@claim("A1")
def test_tape_every_operation_is_right_to_order_two(record):
    gaps = [order_two_gap(f, [0.7, -1.3]) for f in (add, sub, mul, div)]
    gaps += [order_two_gap(f, [0.7]) for f in (neg, exp, log, sin, cos, tanh)]
    record(
        "largest relative gap of the tape's 10 operations, orders 1 and 2", max(gaps), limit=1e-8
    )
    assert max(gaps) < 1e-8, gaps


# %% [markdown]
# The table of `minigrad` is longer and its arguments are arrays: every entry is checked to order
# 2 in `tests/test_ops.py`, in every argument, with broadcasting, empty arrays and special points.
# Here is a sample of each kind of rule.

# %%
import minigrad.special as special
from minigrad.check import check_grads


@claim("A1")
def test_minigrad_sample_of_rules_is_right_to_order_two(record):
    rng = np.random.default_rng(8)
    m, positive = rng.standard_normal((3, 3)), rng.uniform(0.5, 2.0, (2, 3))
    sample = [
        (lambda x, y: x * y / (1 + x * x), m, m[:1]),  # arithmetic with broadcasting
        (lambda x: x**3, np.array([0.0, -1.0, 2.0])),  # a power, at zero
        (lambda x, y: np.where(x > 0, x * y, np.exp(y)), m, m[0]),
        (lambda x: np.sum(x, axis=0) * np.max(x, axis=1) + special.logsumexp(x, axis=1), m),
        (lambda x: np.prod(x), np.array([2.0, 0.0, -3.0])),  # a product with a factor of zero
        (np.matmul, rng.standard_normal((2, 4, 3)), m),  # matrices with a batch axis
        (lambda x, y: np.einsum("ij,kj->ik", x, y), m, positive),
        (lambda x: x[[0, 0, 2], 1:] ** 2, m),  # indexing that takes one row twice
        (lambda x: np.linalg.cholesky(x @ x.T + 3 * np.eye(3)), m),
        (lambda x, y: np.linalg.solve(x + 4 * np.eye(3), y), m, m[0]),
        (special.softplus, np.array([-40.0, 0.0, 40.0])),  # far out, and at the bend
        (special.gammaln, positive),
        (special.betaln, positive, positive[:1]),
        (special.xlogy, m[:2], positive),
    ]
    worst = max(check_grads(f, args, order=2) for f, *args in sample)
    record("largest relative error of a sample of minigrad's rules, orders 1 and 2", worst, 1e-6)
    assert worst < 1e-6


# %% [markdown]
# ## What goes wrong
#
# The wrong order and the confusion of levels stand above, beside the right code. Three more
# mistakes are famous. Each is one line away from the code of this chapter.
#
# **The contribution is written instead of added.** With `=` in place of the sum, a number that
# is used twice forgets its first user: the derivative of $a \cdot a$ becomes $a$. Any test in
# which nothing is used twice passes.


# %%
def backward_overwriting(out):
    """WRONG on purpose: the last contribution replaces the earlier ones."""
    cotangent = {out.serial: 1.0}
    for node in newest_first(out):
        for parent, partial in node.edges:
            cotangent[parent.serial] = cotangent[node.serial] * partial
    return cotangent


def test_tape_overwriting_forgets_a_use():
    once, (a,) = trace(lambda a: sin(exp(a)), [3.0])
    assert backward_overwriting(once)[a.serial] == backward(once)[a.serial]  # unnoticed
    twice, (a,) = trace(lambda a: a * a, [3.0])
    assert backward_overwriting(twice)[a.serial] == 3.0
    assert backward(twice)[a.serial] == 6.0


# %% [markdown]
# **The cotangents outlive the call.** Some engines store the cotangent in every node, as `.grad`,
# and add to it. The second call then starts from what the first one left. Where $a$ is the only
# parent, the result doubles; with a number in between, it is not even doubled, because the stale
# value of that number is handed on again. So it does not help to reset the gradients of the inputs.


# %%
def backward_storing(out, cotangent):
    """WRONG on purpose when called twice: adds to a dict that the caller keeps."""
    cotangent[out.serial] = 1.0
    for node in newest_first(out):
        for parent, partial in node.edges:
            share = cotangent[node.serial] * partial
            cotangent[parent.serial] = cotangent.get(parent.serial, 0.0) + share
    return cotangent


def test_tape_stored_cotangents_break_the_second_call():
    out, (a,) = trace(lambda a: a * a, [3.0])
    stored = {}
    assert [backward_storing(out, stored)[a.serial] for _ in range(2)] == [6.0, 12.0]
    out, (a,) = trace(lambda a: (a * a) * 2.0, [3.0])
    stored = {}
    first = backward_storing(out, stored)[a.serial]
    del stored[a.serial]  # "zero the gradients of the inputs"
    assert (first, backward_storing(out, stored)[a.serial]) == (12.0, 24.0)
    assert [backward(out)[a.serial] for _ in range(2)] == [12.0, 12.0]


# %% [markdown]
# **The rule leaves the table.** Write `math.cos(plain(a))` for `cos(a)` in the rule of the sine.
# (Without `plain`, `math.cos` refuses a `Var`: that mistake is loud.) The first derivative is
# right. The second is zero, without a word: nobody recorded that the cosine depends on the
# argument. Only a check of order 2 notices. The test also holds the check to account: it must
# reject a rule that is wrong by one part in a thousand, at order 1 or only at order 2.


# %%
untraced_sin = operation(math.sin, lambda y, a: math.cos(plain(a)))
sloppy_sin = operation(math.sin, lambda y, a: 1.001 * cos(a))
sloppy_cos = operation(math.cos, lambda y, a: -1.001 * sin(a))
sin_with_sloppy_cos = operation(math.sin, lambda y, a: sloppy_cos(a))


def test_tape_order_two_check_rejects_wrong_rules():
    assert derivative(untraced_sin)(0.7) == math.cos(0.7)
    assert nth_derivative(untraced_sin, 2)(0.7) == 0.0  # silently; right is -sin(0.7)
    assert derivative(sin_with_sloppy_cos)(0.7) == math.cos(0.7)
    for wrong in (untraced_sin, sloppy_sin, sin_with_sloppy_cos):
        assert order_two_gap(wrong, [0.7]) > 1e-4


# %% [markdown]
# ## Figures


# %%
def figure_tape():
    """Backward pass of y = b sin(b), b = a·a, at a = 1.5, in the right and in a wrong order.

    Circles hold names and values, arrows the partial derivatives, badges the turns. Beside each
    circle stands the cotangent with which the number takes its turn. Blue: complete when it takes
    its turn. Red: not complete, and everything computed from it.
    """
    import matplotlib.pyplot as plt

    place = {"a": (0.0, 0.0), "b": (1.3, 0.0), "c": (2.35, 1.0), "y": (3.4, 0.0)}
    # (from, to): curvature of the arrow and place of its label, twice for the two uses of a
    routes = {
        "ba": [(0.45, (0.65, 0.42)), (-0.45, (0.65, -0.42))],
        "cb": [(0.0, (2.0, 0.38))],
        "yc": [(0.0, (3.14, 0.62))],
        "yb": [(-0.15, (2.35, -0.36))],
    }
    out, _ = trace(example, [1.5])
    name = dict(zip((node.serial for node in newest_first(out)), "ycba"))
    exact = backward(out)

    fig, panels = plt.subplots(1, 2, figsize=(6.4, 2.05))
    orders = {"newest first": newest_first, "wrong: b takes its turn before c": ancestors}
    for ax, (title, order) in zip(panels, orders.items()):
        for turn, node in enumerate(order(out)):
            n = name[node.serial]
            x, y = place[n]
            so_far = backward(out, lambda o, order=order, turn=turn: order(o)[:turn])
            cotangent = so_far[node.serial]
            colour = "C0" if cotangent == exact[node.serial] else "C2"
            ax.plot(x, y, "o", ms=25, mfc="white", mec=colour, mew=1.4)
            ax.text(x, y, f"${n}$\n{node.value:.2f}", ha="center", va="center", fontsize=7)
            ax.plot(x, y + 0.42, "o", ms=9, color=colour)
            badge = {"ha": "center", "va": "center", "fontsize": 6.5, "color": "white"}
            ax.text(x, y + 0.41, str(turn + 1), weight="bold", **badge)
            at, side = ((x - 0.42, y), "right") if n == "c" else ((x, y - 0.62), "center")
            text = rf"$\bar {n} = {cotangent:.2f}$"
            ax.text(*at, text, ha=side, va="center", color=colour)
            for k, (parent, partial) in enumerate(node.edges):
                arrows = routes[n + name[parent.serial]]
                bend, at = arrows[k % len(arrows)]
                style = {"arrowstyle": "->", "color": "0.45", "shrinkA": 14, "shrinkB": 14}
                style["connectionstyle"] = f"arc3,rad={bend}"
                ax.annotate("", xy=place[name[parent.serial]], xytext=(x, y), arrowprops=style)
                label = f"{partial:.2f}".replace("-", "−")
                ax.text(*at, label, ha="center", va="center", color="0.35", fontsize=7)
        ax.set(title=title, xlim=(-0.6, 4.0), ylim=(-0.75, 1.65), aspect="equal")
        ax.axis("off")
    return fig


# %%
def figure_v_curve():
    """Error of difference quotients of 1/x against the step, with the bounds of theory (dotted).

    Marks and dashes: root mean square of the relative error over 256 points x between 1 and 2.
    Dotted: the bounds, Eq. (eq-error), at x = 1. Where the complex step is level, its error is
    rounding alone.
    """
    import matplotlib.pyplot as plt

    from chapters.style import COLOUR

    # Relative error, Eq. (eq-error), and best step, Eq. (eq-step), at x = 1.
    curves = {
        "forward": (forward_difference, "C1", STEPS + EPS / STEPS, EPS ** (1 / 2)),
        "central": (central_difference, "C0", STEPS**2 + EPS / (2 * STEPS), (EPS / 4) ** (1 / 3)),
    }
    fig, ax = plt.subplots(figsize=(6.4, 3.4))
    for name, (rule, colour, bound, best) in curves.items():
        errors = v_curve(rule)
        ax.loglog(STEPS, bound, ":", color=COLOUR["numeric"])
        ax.loglog(STEPS, errors, "o-", ms=3, color=colour, label=f"{name} difference")
        ax.plot([best, best], [errors.min() * 6, errors.min() * 25], color=colour)
        formula = r"$\sqrt{\varepsilon}$" if name == "forward" else r"$\sqrt[3]{\varepsilon/4}$"
        ax.text(best, errors.min() * 30, formula, ha="center", va="bottom")
    ax.loglog(STEPS, v_curve(complex_step), "--", color=COLOUR["exact"], label="complex step")
    ax.text(2e-11, 2e-7, "round-off\nslope −1", ha="right", va="top")
    ax.text(4e-6, 3e-5, "truncation\nslope +1", ha="right", va="bottom")
    ax.text(6e-3, 4e-7, "truncation\nslope +2", ha="left", va="top")
    ax.set(xlabel="step $h$", ylabel="relative error (root mean square)", ylim=(3e-17, 100))
    ax.legend(loc="upper center", ncols=3)
    return fig


# %%
def figure_cost_of_modes():
    """Operations for a whole gradient of Rosenbrock's function, per operation of the function."""
    import matplotlib.pyplot as plt

    from chapters.style import COLOUR

    inputs = [2**k for k in range(1, 10)]
    reverse, sweeps, differences = zip(*(cost_of_modes(rosenbrock, n) for n in inputs))
    fig, ax = plt.subplots(figsize=(6.4, 3.0))
    ax.loglog(inputs, sweeps, "o-", color="C1", label="forward mode: $n$ sweeps")
    ax.loglog(
        inputs,
        differences,
        "o:",
        color=COLOUR["numeric"],
        label="central differences: $2n$ evaluations",
    )
    ax.loglog(inputs, reverse, "o-", color="C0", label="reverse mode: one sweep")
    ax.set(xlabel="number of inputs $n$", ylabel="operations, gradient / function", ylim=(1, None))
    ax.legend()
    return fig


# %%
def figure_bracketing():
    """Multiplications of a whole Jacobian with m outputs; the other widths stand in the titles."""
    import matplotlib.pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(6.4, 3.0), sharey=True)
    titles = [
        "wide in the middle: 30, 1000, 1000, $m$",
        "narrow in the middle: 1000, 100, 2, 100, $m$",
    ]
    for ax, title, widths in zip(panels, titles, [[30, 1000, 1000], [1000, 100, 2, 100]]):
        outputs = np.unique(np.geomspace(1, 10**4, 41).round().astype(int)).tolist()
        for cost_of, label, style in [
            (forward_cost, "forward", {"color": "C1"}),
            (reverse_cost, "reverse", {"color": "C0"}),
            (cheapest_cost, "cheapest", {"color": "C3", "ls": "--"}),
        ]:
            ax.loglog(outputs, [cost_of([*widths, m]) for m in outputs], label=label, **style)
        ax.set(title=title, xlabel="number of outputs $m$")
    panels[0].set(ylabel="multiplications")
    panels[0].legend()
    return fig


# %% [markdown]
# ## Exercises
#
# **1. A row of your own.** Add the logistic function $\sigma(a) = 1 / (1 + e^{-a})$ to the table
# of the tape, in one row that does not calculate the exponential twice. Check it to order 2.
#
# ```{admonition} Solution
# :class: dropdown
#
# $\sigma' = \sigma (1 - \sigma)$, and the rule receives $y = \sigma(a)$. Because $y$ is traced
# with respect to the outer levels, the rule may be differentiated in turn.
# ```

# %% tags=["hide-cell"]
sigmoid = operation(lambda a: 1 / (1 + math.exp(-a)), lambda y, a: mul(y, sub(1.0, y)))


def test_exercise_sigmoid_row_is_right_to_order_two():
    for x in (-3.0, 0.0, 0.7):
        assert order_two_gap(sigmoid, [x]) < 1e-8
    y = sigmoid(0.7)
    assert nth_derivative(sigmoid, 2)(0.7) == pytest.approx(y * (1 - y) * (1 - 2 * y), rel=1e-13)


# %% [markdown]
# **2. One path at a time.** Write the recursive backward pass that hands on *what has just
# arrived*, so that it adds up the paths {eq}`eq-paths`. Is it right? How many edges does it visit
# for `doubled(k)`, and how many does `backward` visit?
#
# ```{admonition} Solution
# :class: dropdown
#
# It is right. There are $2^k$ paths, and $2 + 4 + \dots + 2^k = 2^{k+1} - 2$ visits of an edge.
# `backward` visits each of the $2k$ edges once. For $k = 60$ the first takes longer than you have.
# ```


# %% tags=["hide-cell"]
def backward_by_paths(out):
    """Cotangents as sums over paths, Eq. (eq-paths), and the number of visits of an edge."""
    cotangent, visits = defaultdict(float), 0

    def visit(node, g):
        nonlocal visits
        cotangent[node.serial] += g
        for parent, partial in node.edges:
            visits += 1
            visit(parent, g * partial)

    visit(out, 1.0)
    return cotangent, visits


def test_exercise_paths_are_right_and_exponentially_many():
    out, (leaf,) = trace(doubled(10), [1.0])
    cotangent, visits = backward_by_paths(out)
    assert cotangent[leaf.serial] == backward(out)[leaf.serial] == 2**10
    assert visits == 2**11 - 2
    assert sum(len(node.edges) for node in ancestors(out)) == 20
    assert derivative(doubled(60))(1.0) == 2.0**60


# %% [markdown]
# **3. A Hessian times a vector.** The Hessian $\nabla^2 f$ of $n$ inputs has $n^2$ entries, and
# Newton's method needs only its products with vectors. Compute $\nabla^2 f(x) \, v$ without
# building it, in a number of operations that is a constant times that of $f$. Bound the constant
# for programs of sums, differences and products.
#
# ```{admonition} Solution
# :class: dropdown
#
# $\nabla^2 f \, v = \nabla \langle \nabla f, v \rangle$: the gradient of a function that computes
# a gradient. The inner one is a program of at most $5N$ sums and products, its inner product
# with $v$ takes fewer than $2n$ more, so by {prf:ref}`thm-cheap-gradient` the outer one takes at
# most $5 (5N + 2n)$ operations. An operation joins at most two numbers, so a result that depends on
# all inputs has $n \le N + 1$, and the bound is at most $35 N + 10$.
# ```


# %% tags=["hide-cell"]
def hessian_vector(f, xs, v):
    """The product of the Hessian of `f` at `xs` with the vector `v`, as a list."""
    return gradient(lambda *x: reduce(add, map(mul, gradient(f)(*x), v)))(*xs)


def test_exercise_hessian_vector_product_is_cheap():
    a, b = -1.2, 0.7
    hessian = np.array([[1200 * a * a - 400 * b + 2, -400 * a], [-400 * a, 200]])
    product_ = hessian_vector(rosenbrock, [a, b], [0.3, -2.0])
    np.testing.assert_allclose(product_, hessian @ [0.3, -2.0], rtol=1e-13)
    for n in (8, 128):
        xs = [1.0 + 0.5 * math.sin(i) for i in range(n)]
        out, _ = trace(rosenbrock, xs)
        program = sum(bool(node.edges) for node in ancestors(out))
        operations = cost(hessian_vector, rosenbrock, xs, xs)
        assert operations <= 5 * (5 * program + 2 * n) <= 35 * program + 10


# %% [markdown]
# **4. From the middle.** Find the smallest number of multiplications for the product
# {eq}`eq-jacobian`, over all ways to bracket it. By how much does it beat both modes for the
# widths 784, 400, 2, 400, 784? (The autoencoder of chapter 5 has such a waist.)
#
# ```{admonition} Solution
# :class: dropdown
#
# The last multiplication splits the chain at some $k$; both parts must be bracketed in the
# cheapest way. So the cost of $J_j \cdots J_{i+1}$, of shape $(d_j, d_i)$, is
# $c_{ij} = \min_k \, (c_{ik} + c_{kj} + d_i \, d_k \, d_j)$ with $c_{i,i+1} = 0$. Here the waist
# wins nearly a hundredfold: the Jacobian is a product of a $(784, 2)$ and a $(2, 784)$ matrix.
# ```


# %% tags=["hide-cell"]
def cheapest_cost(widths):
    """Multiplications of a Jacobian in the cheapest bracketing."""
    cheapest = {(i, i + 1): 0 for i in range(len(widths) - 1)}
    for length in range(2, len(widths)):
        for i in range(len(widths) - length):
            j = i + length
            cheapest[i, j] = min(
                cheapest[i, k] + cheapest[k, j] + widths[i] * widths[k] * widths[j]
                for k in range(i + 1, j)
            )
    return cheapest[0, len(widths) - 1]


def test_exercise_cheapest_bracketing():
    def enumerate_all(widths):
        if len(widths) == 2:
            return [0]
        return [
            left + right + widths[0] * widths[k] * widths[-1]
            for k in range(1, len(widths) - 1)
            for left in enumerate_all(widths[: k + 1])
            for right in enumerate_all(widths[k:])
        ]

    widths = [3, 7, 2, 9, 4, 5]
    assert len(enumerate_all(widths)) == 14  # a Catalan number
    assert cheapest_cost(widths) == min(enumerate_all(widths))
    assert min(forward_cost(widths), reverse_cost(widths)) in enumerate_all(widths)
    waist = [784, 400, 2, 400, 784]
    assert min(forward_cost(waist), reverse_cost(waist)) > 90 * cheapest_cost(waist)
    assert cheapest_cost([500, 100, 100, 1]) == reverse_cost([500, 100, 100, 1])
    narrow = [[1000, 100, 2, 100, m] for m in (1, 2, 3)]
    both = [min(forward_cost(widths), reverse_cost(widths)) for widths in narrow]
    assert [cost > cheapest_cost(w) for cost, w in zip(both, narrow)] == [False, False, True]


# %% [markdown]
# **5. Five points.** The difference
# $\big( 8 f(x+h) - 8 f(x-h) - f(x+2h) + f(x-2h) \big) / (12 h)$ has an error of order $h^4$.
# Predict the exponent of $\varepsilon$ in its best step and in its smallest error, and measure both
# slopes.
#
# ```{admonition} Solution
# :class: dropdown
#
# Balance $h^4$ with $\varepsilon / h$: the best step is of order
# $\varepsilon^{1/5} \approx 7 \cdot 10^{-4}$, the smallest error of order
# $\varepsilon^{4/5} \approx 3 \cdot 10^{-13}$. Order $p$ gives $\varepsilon^{p/(p+1)}$: no order
# reaches all the digits.
# ```


# %% tags=["hide-cell"]
def five_point_difference(f, x, h):
    """Difference quotient of order 4."""
    return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)


def test_exercise_five_points_have_order_four():
    errors = v_curve(five_point_difference)
    assert slope(STEPS, errors, 4e-3, 0.04) == pytest.approx(4, abs=0.1)
    assert slope(STEPS, errors, 2.0**-44, 2e-5) == pytest.approx(-1, abs=0.05)
    assert 1 / 4 < STEPS[np.argmin(errors)] / EPS ** (1 / 5) < 4
    assert errors.min() < EPS ** (4 / 5) < v_curve(central_difference).min()


# %% [markdown]
# **6. Through a loop.** Newton's iteration $r \leftarrow (r + a / r) / 2$ converges to $\sqrt a$.
# Differentiate six steps of it, starting from $r = 1$ at $a = 2$, with the tape: does the
# derivative converge to that of the square root? Does the second derivative?
#
# ```{admonition} Solution
# :class: dropdown
#
# Both do. The tape sees divisions and sums and knows nothing of square roots. Near the limit each
# step squares the error of $r$; differentiate that recursion to see that there the derivatives lag
# less than a step behind.
# ```


# %% tags=["hide-cell"]
def newton_sqrt(a, steps=6):
    """The square root of `a` by Newton's iteration."""
    r = 1.0
    for _ in range(steps):
        r = (r + a / r) / 2
    return r


def test_exercise_derivatives_pass_through_newtons_iteration():
    for order, exact in enumerate([2**0.5, 0.5 * 2**-0.5, -0.25 * 2**-1.5]):
        assert nth_derivative(newton_sqrt, order)(2.0) == pytest.approx(exact, rel=1e-14)
        late = nth_derivative(lambda a: newton_sqrt(a, 4), order)(2.0) / exact - 1
        assert abs(late) < newton_sqrt(2.0, 3) / 2**0.5 - 1  # less than a step behind
