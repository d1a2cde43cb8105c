"""The optimisers: steps by hand, against torch, purity, dtypes, schedules, clipping, errors."""

import copy
import math

import numpy as np
import pytest

from minigrad import grad, optim, tree
from minigrad.kernels import adam as kernel
from minigrad.kernels import compiled

ALL = {
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9),
    "rmsprop": optim.rmsprop(0.1),
    "adam": optim.adam(0.1),
}
every_optimizer = pytest.mark.parametrize("optimizer", ALL.values(), ids=ALL)


def random_tree(rng, dtype=np.float64):
    """A tree with a leaf large enough for the compiled kernel, and one without elements."""

    def draw(*shape):
        return np.asarray(rng.normal(size=shape), dtype)

    return {"a": [draw(130, 130), draw(5)], "b": (draw(), draw(0, 3)), "c": draw(1, 2, 3)}


# -------------------------------------------------------------------------- the formulas by hand


def by_hand(name, gradients, rate):
    """The parameter after each step from 1, in plain Python floats, by the textbook formulas."""
    p, m, v, path = 1.0, 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        alpha = rate(t - 1)
        if name == "sgd":
            p -= alpha * g
        elif name == "momentum":
            v = 0.9 * v + g
            p -= alpha * v
        elif name == "rmsprop":
            v = 0.9 * v + 0.1 * g**2
            p -= alpha * g / (math.sqrt(v) + 1e-8)
        else:
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.999 * v + (1 - 0.999) * g**2
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            p -= alpha * m_hat / (math.sqrt(v_hat) + 1e-8)
        path.append(p)
    return path


MAKE = {
    "sgd": optim.sgd,
    "momentum": lambda rate: optim.sgd(rate, momentum=0.9),
    "rmsprop": optim.rmsprop,
    "adam": optim.adam,
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("size", [1, kernel.SMALL], ids=["small", "large"])
def test_steps_equal_those_computed_by_hand(name, size):
    # 1e-9: there the epsilon of the denominator is what counts.
    gradients = [0.3, -2.0, 0.0, 1e-9, 1e-9, 5.0]
    rate = optim.exponential_decay(0.1, 0.5, 3)
    optimizer = MAKE[name](rate)
    params = np.ones(size)
    state = optimizer.init(params)
    for t, (g, expected) in enumerate(zip(gradients, by_hand(name, gradients, rate)), 1):
        params, state = optimizer.update(np.full(size, g), state, params)
        np.testing.assert_allclose(params, expected, rtol=1e-13)
        assert state["step"] == t


def test_the_first_step_of_adam_has_the_length_of_the_learning_rate():
    """Without the bias correction it would be sqrt(10) times longer."""
    optimizer = optim.adam(0.01)
    g = np.array([1e-3, -7.0, 4e4])
    params, _ = optimizer.update(g, optimizer.init(g), np.zeros(3))
    np.testing.assert_allclose(params, -0.01 * np.sign(g), rtol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_optimizers_agree_with_torch(name):
    torch = pytest.importorskip("torch", reason="the independent framework is not installed")
    rng = np.random.default_rng(0)
    params = random_tree(rng)
    peers = [torch.tensor(p, requires_grad=True) for p in tree.leaves(params)]
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.02),
        "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.02, alpha=0.9),
        "adam": lambda p: torch.optim.Adam(p, 0.02),
    }
    peer, optimizer = make[name](peers), MAKE[name](0.02)
    state = optimizer.init(params)
    for _ in range(10):
        grads = random_tree(rng)
        for p, g in zip(peers, tree.leaves(grads)):
            p.grad = torch.tensor(g)
        peer.step()
        params, state = optimizer.update(grads, state, params)
    for p, ours in zip(peers, tree.leaves(params)):
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_optimizers_reach_the_minimum_of_a_quadratic(name):
    scales, goal = np.array([1.0, 10.0]), np.array([3.0, -2.0])
    gradient = grad(lambda p: 0.5 * np.sum(scales * (p["x"] - goal) ** 2))
    optimizer = MAKE[name](optim.cosine_decay(0.1, 400))
    params = {"x": np.zeros(2)}
    state = optimizer.init(params)
    for _ in range(400):
        params, state = optimizer.update(gradient(params), state, params)
    np.testing.assert_allclose(params["x"], goal, atol=1e-3)


# --------------------------------------------------------------------------- what they all keep to


@every_optimizer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimizers_keep_dtypes_shapes_and_their_arguments(optimizer, dtype):
    rng = np.random.default_rng(1)
    params, grads = random_tree(rng, dtype), random_tree(rng, dtype)
    state = optimizer.init(params)
    params, state = optimizer.update(grads, state, params)
    inputs = tree.leaves((grads, state, params))
    before = copy.deepcopy(inputs)
    new_params, new_state = optimizer.update(grads, state, params)
    for a, b in zip(inputs, before):
        np.testing.assert_array_equal(a, b)
    for new in tree.leaves((new_params, new_state)):
        assert type(new) is np.ndarray and new.flags.c_contiguous
        assert not any(np.shares_memory(new, old) for old in inputs)
    assert tree.flatten(new_params)[1] == tree.flatten(params)[1]
    assert tree.flatten(new_state)[1] == tree.flatten(state)[1]
    for like in (new_params, *(v for k, v in new_state.items() if k != "step")):
        for a, p in zip(tree.leaves(like), tree.leaves(params)):
            assert a.dtype == dtype and a.shape == p.shape
    assert new_state["step"].dtype == np.int64 and new_state["step"].shape == ()


@every_optimizer
def test_a_state_saved_as_arrays_goes_on_bit_for_bit(optimizer, tmp_path):
    rng = np.random.default_rng(2)
    params = random_tree(rng, np.float32)
    gradients = [random_tree(rng, np.float32) for _ in range(6)]

    def run(gradients, params, state):
        for g in gradients:
            params, state = optimizer.update(g, state, params)
        return params, state

    straight = run(gradients, params, optimizer.init(params))
    half = run(gradients[:3], params, optimizer.init(params))
    leaves, treedef = tree.flatten(half)
    np.savez(tmp_path / "half.npz", *leaves)
    with np.load(tmp_path / "half.npz", allow_pickle=False) as file:
        restored = tree.unflatten(treedef, [file[f"arr_{i}"] for i in range(len(leaves))])
    resumed = run(gradients[3:], *restored)
    for a, b in zip(tree.leaves(straight), tree.leaves(resumed)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@every_optimizer
def test_gradients_in_another_order_of_memory_make_the_same_step(optimizer):
    rng = np.random.default_rng(3)
    params = rng.normal(size=(140, 130))
    g = rng.normal(size=(140, 130))
    state = optimizer.init(params)
    expected, _ = optimizer.update(g, state, params)
    found, _ = optimizer.update(np.asfortranarray(g), state, params)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_loop_of_adam_is_its_twin(dtype, monkeypatch):
    if compiled.load("adam_numba") is None:
        pytest.skip("without Numba there is only the twin")
    rng = np.random.default_rng(4)
    arrays = [rng.random(kernel.SMALL).astype(dtype) for _ in range(4)]
    arrays[1][:4] = [np.nan, np.inf, 0, -1]
    arrays[3][:4] = 0
    settings = 0.9, 0.999, 1e-2, 1e-8
    with np.errstate(invalid="ignore"):
        loop = kernel.adam(*arrays, *settings)
        monkeypatch.setattr(kernel, "SMALL", 1 << 60)
        twin = kernel.adam(*arrays, *settings)
    eps = 4 * np.finfo(dtype).eps
    for a, b in zip(loop, twin):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=eps, atol=eps)


# ----------------------------------------------------------------------------------- schedules


def test_schedules_have_their_closed_forms():
    decay = optim.exponential_decay(0.4, 0.5, 10)
    np.testing.assert_allclose([decay(0), decay(10), decay(15)], [0.4, 0.2, 0.2 / math.sqrt(2)])
    stages = optim.piecewise_constant([3, 5], [1.0, 0.1, 0.01])
    assert [stages(t) for t in range(7)] == [1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    cosine = optim.cosine_decay(2.0, 8)
    np.testing.assert_allclose([cosine(t) for t in (0, 2, 4, 8, 9)],
                               [2, 1 + math.sqrt(0.5), 1, 0, 0], atol=1e-15)  # fmt: skip
    warm = optim.linear_warmup(0.8, 4)
    np.testing.assert_allclose([warm(t) for t in range(6)], [0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    both = optim.linear_warmup(decay, 2)
    np.testing.assert_allclose([both(0), both(10)], [0.2, 0.2])


def test_a_schedule_counts_steps_and_keeps_float32():
    optimizer = optim.sgd(optim.piecewise_constant([2], [np.float64(1.0), 0.0]))
    params = np.zeros(3, np.float32)
    state = optimizer.init(params)
    for expected in (-1, -2, -2):
        params, state = optimizer.update(np.ones(3, np.float32), state, params)
        assert params.dtype == np.float32
        np.testing.assert_array_equal(params, expected)


# ------------------------------------------------------------------------------------ clipping


def test_clipping_by_the_global_norm_keeps_the_direction():
    grads = {"a": np.array([3.0, 0.0], np.float32), "b": [np.array(4.0)]}
    assert optim.global_norm(grads) == 5.0
    clipped = optim.clip_by_global_norm(grads, 1.0)
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"][0], 0.8)
    assert clipped["a"].dtype == np.float32
    same = optim.clip_by_global_norm(grads, 5.0)
    np.testing.assert_array_equal(same["a"], grads["a"])


def test_clipping_survives_float32_overflow_and_keeps_nan_visible():
    huge = [np.full(4, 2e38, np.float32)]
    np.testing.assert_allclose(optim.clip_by_global_norm(huge, 1.0)[0], 0.5, rtol=1e-6)
    for bad in (np.nan, np.inf):
        clipped = optim.clip_by_global_norm([np.array([1.0, bad])], 1.0)
        assert not np.any(np.isfinite(clipped[0]))


def test_clipping_of_elements():
    clipped = optim.clip({"a": np.array([-3.0, 0.5, 2.0], np.float32)}, 1.0)["a"]
    np.testing.assert_array_equal(clipped, [-1, 0.5, 1])
    assert clipped.dtype == np.float32


# -------------------------------------------------------------------------------------- errors

PARAMS = {"layer": [{"w": np.zeros((2, 3))}]}


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ALL["adam"].init({"n": np.arange(3)}), TypeError, ["'n'", "int64"]),
        (lambda: ALL["adam"].init({"n": 1.0}), TypeError, ["'n'", "float"]),
        (
            lambda: ALL["adam"].update(
                {"layer": [{"w": np.zeros((3, 2))}]}, ALL["adam"].init(PARAMS), PARAMS
            ),
            ValueError,
            ["grads", "(3, 2)", "'layer/0/w'", "(2, 3)"],
        ),
        (
            lambda: ALL["adam"].update([np.zeros(2)], ALL["adam"].init(PARAMS), PARAMS),
            TypeError,
            ["grads", "[*]", "{'layer'"],
        ),
        (
            lambda: ALL["momentum"].update(PARAMS, ALL["momentum"].init([np.zeros(1)]), PARAMS),
            TypeError,
            ["state['velocity']", "[*]"],
        ),
        (
            lambda: ALL["adam"].update(PARAMS, ALL["momentum"].init(PARAMS), PARAMS),
            ValueError,
            ["'m'", "step, velocity"],
        ),
        (lambda: optim.adam(0.1, b1=1.0), ValueError, ["adam", "[0, 1)", "1.0"]),
        (lambda: optim.adam(0.1, eps=0), ValueError, ["eps > 0"]),
        (lambda: optim.sgd(0.1, momentum=-1), ValueError, ["momentum in [0, 1)", "-1"]),
        (lambda: optim.rmsprop(0.1, decay=2), ValueError, ["decay in [0, 1)", "2"]),
        (lambda: optim.exponential_decay(1, 1, 0), ValueError, ["steps > 0"]),
        (lambda: optim.piecewise_constant([3, 1], [1, 2, 3]), ValueError, ["increasing"]),
        (lambda: optim.piecewise_constant([3], [1]), ValueError, ["one value more"]),
        (lambda: optim.clip_by_global_norm(PARAMS, 0), ValueError, ["max_norm > 0"]),
        (lambda: optim.clip(PARAMS, -1), ValueError, ["limit > 0"]),
    ],
)
def test_errors_of_optimizers_say_where_and_what(call, error, words):
    with pytest.raises(error) as info:
        call()
    assert all(word in str(info.value) for word in words), str(info.value)
    assert "\n" not in str(info.value)


def test_a_float64_gradient_and_state_keep_a_float32_parameter():
    p, g = np.zeros(3, np.float32), np.ones(3)
    for optimizer in ALL.values():
        state = tree.map(lambda s: s.astype(float) if s.ndim else s, optimizer.init(p))
        new, state = optimizer.update(g, state, p)
        assert new.dtype == np.float32
        assert all(s.dtype == np.float32 for k, s in state.items() if k != "step")
