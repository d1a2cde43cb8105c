"""The layers: derivatives, adjoints, causality, initialisers, dtypes, and what errors say."""

import numpy as np
import pytest

from minigrad import grad, jacobian, nn, tree, value_and_grad, vjp
from minigrad.check import check_grads
from minigrad.core import nan_check

SETTINGS = [  # stride, padding, dilation
    (1, 0, 1),
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 2),
    ((2, 3), (1, 0), (1, 2)),
]
settings = pytest.mark.parametrize("stride, padding, dilation", SETTINGS)


def shifted(params):
    """The parameters moved a little, so that no bias is 0."""
    return tree.map(lambda p: p + np.linspace(0.1, 0.3, p.size).reshape(p.shape), params)


def dense_params(rng):
    return shifted(nn.dense_init(rng, 4, 3, np.float64))


def conv_params(rng, init=nn.conv2d_init, kernel_size=(3, 2)):
    return shifted(init(rng, 2, 3, kernel_size, np.float64))


# -------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("batch", [(5,), (2, 3), (), (0,), (1, 0, 2)], ids=str)
def test_dense_and_its_derivatives_with_any_batch_axes(batch):
    rng = np.random.default_rng(0)
    params, x = dense_params(rng), rng.normal(size=(*batch, 4))
    y = nn.dense(params, x)
    assert y.shape == (*batch, 3)
    np.testing.assert_allclose(y, x @ params["w"] + params["b"], atol=1e-14)
    check_grads(nn.dense, (params, x), order=3)


@settings
def test_conv2d_is_differentiable_to_third_order(stride, padding, dilation):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 2, 6, 5))

    def layer(params, x):
        return nn.conv2d(params, x, stride, padding, dilation)

    # One derivative of each of the three forms appears at the third order, in each argument.
    check_grads(layer, (conv_params(rng), x), order=3)


@settings
def test_conv2d_transpose_is_differentiable_to_third_order(stride, padding, dilation):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 2, 3, 4))

    def layer(params, x):
        return nn.conv2d_transpose(params, x, stride, padding, dilation)

    check_grads(layer, (conv_params(rng, nn.conv2d_transpose_init), x), order=3)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_masked_conv2d_is_differentiable_twice(kind):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 2, 4, 3))
    check_grads(
        lambda p, x: nn.masked_conv2d(p, x, kind), (conv_params(rng, kernel_size=(3, 5)), x)
    )


def test_embedding_is_differentiable_twice():
    params = nn.embedding_init(np.random.default_rng(4), 5, 3, np.float64)
    indices = np.array([[4, 0, 4], [1, 4, 0]])
    check_grads(lambda p: np.tanh(nn.embedding(p, indices)), (params,))


def test_a_gradient_penalty_goes_through_a_convolution():
    """The gradient of |d f / d x|^2 in the weights, for f linear in x: known in closed form."""
    rng = np.random.default_rng(5)
    params, x = conv_params(rng), rng.normal(size=(1, 2, 3, 2))

    def penalty(params):
        # The kernel covers all of x, so f(x) = sum_f <w[f], x> + const and df/dx = sum_f w[f].
        slope = grad(lambda x: np.sum(nn.conv2d(params, x)))(x)
        return np.sum(slope * slope)

    value, g = value_and_grad(penalty)(params)
    total = np.sum(params["w"], axis=0)
    np.testing.assert_allclose(value, np.sum(total**2), rtol=1e-12)
    np.testing.assert_allclose(g["w"], np.broadcast_to(2 * total, (3, 2, 3, 2)), rtol=1e-12)
    np.testing.assert_array_equal(g["b"], 0)


# ----------------------------------------------------------------------------------- adjoints


@settings
def test_the_transposed_layer_is_the_adjoint_of_the_convolution(stride, padding, dilation):
    """<conv(y), x> = <y, transpose(x)>, for every size that the stride leaves open."""
    rng = np.random.default_rng(6)
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    w = rng.normal(size=(2, 3, 3, 2))
    x = rng.normal(size=(2, 2, 4, 3))
    for extra in np.ndindex(down, right):
        enlarged = nn.conv2d_transpose(
            {"w": w, "b": np.zeros(3)}, x, stride, padding, dilation, output_padding=extra
        )
        y = rng.normal(size=enlarged.shape)
        reduced = nn.conv2d({"w": w, "b": np.zeros(2)}, y, stride, padding, dilation)
        assert reduced.shape == x.shape
        np.testing.assert_allclose(np.vdot(reduced, x), np.vdot(y, enlarged), rtol=1e-12)


def test_a_transposed_kernel_of_ones_repeats_pixels():
    """Stride = kernel size: each pixel becomes a block, and the sizes multiply."""
    x = np.arange(6.0).reshape(1, 1, 2, 3)
    params = {"w": np.ones((1, 1, 2, 2)), "b": np.array([0.5])}
    expected = np.repeat(np.repeat(x, 2, axis=2), 2, axis=3) + 0.5
    np.testing.assert_array_equal(nn.conv2d_transpose(params, x, stride=2), expected)


@settings
def test_convolutions_agree_with_torch(stride, padding, dilation):
    torch = pytest.importorskip("torch", reason="the independent framework is not installed")
    rng = np.random.default_rng(7)
    params, x = conv_params(rng), rng.normal(size=(2, 2, 6, 5))
    back = conv_params(rng, nn.conv2d_transpose_init)

    def torch_of(function, params):
        w, b, images = (torch.tensor(a, requires_grad=True) for a in (params["w"], params["b"], x))
        y = function(images, w, b, stride=stride, padding=padding, dilation=dilation)
        g = torch.ones_like(y).cumsum(3)
        return y.detach().numpy(), [a.numpy() for a in torch.autograd.grad(y, [w, b, images], g)]

    for layer, function, p in (
        (nn.conv2d, torch.nn.functional.conv2d, params),
        (nn.conv2d_transpose, torch.nn.functional.conv_transpose2d, back),
    ):
        y, pullback = vjp(lambda p, x: layer(p, x, stride, padding, dilation), p, x)  # noqa: B023
        expected, expected_grads = torch_of(function, p)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
        g, gx = pullback(np.cumsum(np.ones_like(y), 3))
        for a, b in zip([g["w"], g["b"], gx], expected_grads):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------- masks


def test_the_masks_of_a_three_by_three_kernel():
    np.testing.assert_array_equal(
        nn.causal_mask("A", 3), [[True, True, True], [True, False, False], [False, False, False]]
    )
    np.testing.assert_array_equal(
        nn.causal_mask("B", 3), [[True, True, True], [True, True, False], [False, False, False]]
    )
    assert nn.causal_mask("A", (1, 5)).tolist() == [[True, True, False, False, False]]


def jacobian_of(net):
    """The matrix |dy/dx| between pixels in reading order, summed over channels: (H W, H W)."""
    x = np.random.default_rng(8).normal(size=(1, 1, 5, 4))
    return np.abs(jacobian(net)(x)).sum((0, 1, 4, 5)).reshape(20, 20)


def test_the_jacobian_of_masked_layers_is_strictly_causal():
    rng = np.random.default_rng(9)
    first = shifted(nn.conv2d_init(rng, 1, 3, 5, np.float64))
    second = shifted(nn.conv2d_init(rng, 3, 2, 3, np.float64))

    def pixelcnn(x):
        return nn.masked_conv2d(second, np.tanh(nn.masked_conv2d(first, x, "A")), "B")

    strict = jacobian_of(pixelcnn)
    assert np.all(strict[np.triu_indices(20)] == 0)
    assert np.all(np.diag(strict, -1)[np.arange(19) % 4 != 3] > 0)  # the pixel to the left counts
    assert np.all(np.diag(strict, -4) > 0)  # and the one above
    assert np.all(np.diag(strict, -3)[np.arange(17) % 4 != 0] > 0)  # and the one above right

    inclusive = jacobian_of(lambda x: nn.masked_conv2d(first, x, "B"))
    assert np.all(inclusive[np.triu_indices(20, 1)] == 0) and np.all(np.diag(inclusive) > 0)

    wrong = jacobian_of(lambda x: nn.conv2d(first, x, padding=2))
    assert np.any(wrong[np.triu_indices(20, 1)] > 0)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_masked_taps_get_no_gradient_and_have_no_effect(kind):
    rng = np.random.default_rng(10)
    params, x = conv_params(rng, kernel_size=3), rng.normal(size=(2, 2, 4, 4))

    def loss(params):
        return np.sum(np.sin(nn.masked_conv2d(params, x, kind)))

    mask = nn.causal_mask(kind, 3)
    g = grad(loss)(params)["w"]
    assert np.all(g[:, :, ~mask] == 0) and np.all(g[:, :, mask] != 0)
    moved = {**params, "w": params["w"] + 7 * ~mask}
    assert loss(moved) == loss(params)


# --------------------------------------------------------------------------------- embedding


def test_the_gradient_of_an_embedding_counts_equal_indices():
    params = {"w": np.arange(8.0).reshape(4, 2)}
    indices = np.array([[3, 0], [3, 3]])
    np.testing.assert_array_equal(nn.embedding(params, indices), params["w"][indices])
    g = grad(lambda p: np.sum(nn.embedding(p, indices)))(params)["w"]
    np.testing.assert_array_equal(g, [[1, 1], [0, 0], [0, 0], [3, 3]])
    assert nn.embedding(params, 2).shape == (2,)
    assert nn.embedding(params, np.zeros((0, 3), int)).shape == (0, 3, 2)


# ------------------------------------------------------------------------------- initialisers


def test_initialisers_have_the_variance_they_promise():
    n = 200_000
    for init, shape, variance, kurtosis in (
        (nn.glorot_uniform, (500, 400), 2 / 900, 9 / 5),
        (nn.glorot_uniform, (50, 40, 10, 10), 2 / (90 * 100), 9 / 5),
        (nn.he_normal, (500, 400), 2 / 500, 3),
        (nn.he_normal, (50, 40, 10, 10), 2 / (40 * 100), 3),
        (nn.normal, (500, 400), 1e-4, 3),
    ):
        w = init(np.random.default_rng(11), shape, np.float64)
        z_mean = w.mean() / np.sqrt(variance / n)
        z_variance = (np.mean(w**2) / variance - 1) / np.sqrt((kurtosis - 1) / n)
        assert w.shape == shape and abs(z_mean) < 4 and abs(z_variance) < 4
    limit = np.sqrt(6 / 900)
    w = nn.glorot_uniform(np.random.default_rng(11), (500, 400), np.float64)
    assert limit * 0.9999 < np.abs(w).max() <= limit
    assert not np.any(nn.zeros(np.random.default_rng(11), (3, 2)))


def test_float32_parameters_are_the_rounded_float64_ones():
    for init in (nn.glorot_uniform, nn.he_normal, nn.normal):
        w32 = init(np.random.default_rng(12), (6, 5))
        w64 = init(np.random.default_rng(12), (6, 5), np.float64)
        assert w32.dtype == np.float32 and w64.dtype == np.float64
        np.testing.assert_array_equal(w32, w64.astype(np.float32))


def test_the_fan_of_a_transposed_convolution_is_that_of_its_inputs():
    params = nn.conv2d_transpose_init(
        np.random.default_rng(13), 2, 300, 10, np.float64, nn.he_normal
    )
    assert params["w"].shape == (2, 300, 10, 10) and params["b"].shape == (300,)
    assert params["w"].flags.c_contiguous
    z = (np.mean(params["w"] ** 2) * 100 - 1) / np.sqrt(2 / params["w"].size)
    assert abs(z) < 4


# ------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layers_keep_the_dtype_through_values_and_gradients(dtype):
    rng = np.random.default_rng(14)
    params = {
        "embedding": nn.embedding_init(rng, 3, 16, dtype),
        "up": nn.conv2d_transpose_init(rng, 1, 2, 2, dtype),
        "masked": nn.conv2d_init(rng, 2, 2, 3, dtype),
        "conv": nn.conv2d_init(rng, 2, 2, 3, dtype, nn.he_normal),
        "dense": nn.dense_init(rng, 32, 4, dtype),
    }

    def loss(p):
        x = np.reshape(nn.embedding(p["embedding"], np.array([0, 2])), (2, 1, 4, 4))
        x = nn.conv2d_transpose(p["up"], x, stride=2)
        x = np.tanh(nn.masked_conv2d(p["masked"], x, "B"))
        x = nn.conv2d(p["conv"], x, stride=2, padding=1)
        return np.mean(nn.dense(p["dense"], np.reshape(x, (2, 32))) ** 2)

    with nan_check():
        value, grads = value_and_grad(loss)(params)
    assert value.dtype == dtype
    assert all(g.dtype == dtype for g in tree.leaves(grads))
    # A gradient of a gradient, too.
    second = grad(lambda p: sum(np.sum(g * g) for g in tree.leaves(grad(loss)(p))))(params)
    assert all(g.dtype == dtype for g in tree.leaves(second))


# ------------------------------------------------------------------------------------- errors

DENSE = {"w": np.zeros((4, 3)), "b": np.zeros(3)}
CONV = {"w": np.zeros((3, 2, 3, 3)), "b": np.zeros(3)}
IMAGES = np.zeros((1, 2, 5, 5))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: nn.dense(DENSE, np.zeros((2, 5))), ValueError, ["(2, 5)", "(4, 3)", "(3,)"]),
        (lambda: nn.dense(DENSE, np.float64(1)), ValueError, ["x ()", "(4, 3)"]),
        (
            lambda: nn.dense({**DENSE, "b": np.zeros(4)}, np.zeros((2, 4))),
            ValueError,
            ["w (4, 3)", "b (4,)"],
        ),
        (lambda: nn.conv2d(CONV, IMAGES[:, :1]), ValueError, ["(1, 1, 5, 5)", "(3, 2, 3, 3)"]),
        (lambda: nn.conv2d(CONV, IMAGES[0]), ValueError, ["(2, 5, 5)", "(3, 2, 3, 3)"]),
        (lambda: nn.conv2d(CONV, IMAGES, dilation=3), ValueError, ["dilation", "5 x 5"]),
        (
            lambda: nn.conv2d({**CONV, "b": np.zeros(2)}, IMAGES),
            ValueError,
            ["conv2d", "(1, 3, 3, 3)", "b (2,)", "must be (3,)"],
        ),
        (
            lambda: nn.conv2d_transpose(CONV, IMAGES),
            ValueError,
            ["conv2d_transpose", "(1, 2, 5, 5)", "(3, 2, 3, 3)", "(F, C, K, L)"],
        ),
        (
            lambda: nn.conv2d_transpose(
                {"w": np.zeros((2, 1, 3, 3)), "b": np.zeros(1)}, IMAGES, 2, output_padding=2
            ),
            ValueError,
            ["output_padding 2", "stride 2"],
        ),
        (
            lambda: nn.conv2d_transpose(
                {"w": np.zeros((2, 1, 1, 1)), "b": np.zeros(1)}, IMAGES, padding=3
            ),
            ValueError,
            ["padding 3", "-1 x -1"],
        ),
        (lambda: nn.masked_conv2d(CONV, IMAGES, "C"), ValueError, ["'A' or 'B'", "'C'"]),
        (lambda: nn.causal_mask("A", 4), ValueError, ["odd", "4 x 4"]),
        (lambda: nn.embedding(DENSE, np.array([0, 4])), IndexError, ["0 to 4", "0 to 3"]),
        (lambda: nn.embedding(DENSE, np.array([-1])), IndexError, ["-1", "0 to 3"]),
        (lambda: nn.embedding(DENSE, np.array([1.0])), TypeError, ["integers", "float64"]),
        (
            lambda: nn.he_normal(np.random.default_rng(0), (3,)),
            ValueError,
            ["(3,)", "fan-in", "normal or zeros"],
        ),
    ],
)
def test_errors_of_layers_name_the_shapes(call, error, words):
    with pytest.raises(error) as info:
        call()
    assert all(word in str(info.value) for word in words), str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("kernel_size", [(3, 5), (5, 1), 3])
def test_masked_conv2d_keeps_the_size(kernel_size):
    rng = np.random.default_rng(15)
    params, x = nn.conv2d_init(rng, 2, 3, kernel_size), rng.normal(size=(1, 2, 6, 4))
    assert nn.masked_conv2d(params, x, "B").shape == (1, 3, 6, 4)


def test_layers_are_drawn_by_the_initialiser_that_is_asked_for():
    ones = lambda _, shape, dtype: np.ones(shape, dtype)
    for init, sizes in (
        (nn.dense_init, (4, 3)),
        (nn.conv2d_init, (2, 3, 3)),
        (nn.conv2d_transpose_init, (2, 3, 3)),
        (nn.embedding_init, (5, 3)),
    ):
        assert np.all(init(np.random.default_rng(16), *sizes, np.float64, ones)["w"] == 1)
