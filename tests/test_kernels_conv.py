"""Convolution and its adjoints against plain loops, SciPy, PyTorch, and against each other."""

import itertools
import os

import numpy as np
import pytest
import scipy.signal

from minigrad.kernels import compiled, conv
from minigrad.kernels.conv import conv2d, conv2d_dw, conv2d_dx

SLOW_IN_PYTHON = {
    "test_conv2d_kernel_adjoint_identities",
    "test_conv2d_kernel_of_a_large_batch_equals_its_images_one_by_one",
    "test_conv2d_kernel_of_many_channels",
    "test_conv2d_kernel_gives_the_same_bits_with_one_and_two_threads",
    "test_conv2d_kernel_chooses_a_path_by_shape",
}


@pytest.fixture(params=["twin", "compiled"], autouse=True)
def path(request, monkeypatch):
    """Run every test on the NumPy twin and on the compiled kernels, whichever a shape would get."""
    if request.param == "compiled" and compiled.load("conv_numba") is None:
        pytest.skip("Numba is not used")
    use = request.param == "compiled"
    if use and os.environ.get("NUMBA_DISABLE_JIT") == "1":
        if request.node.originalname in SLOW_IN_PYTHON:
            pytest.skip("too slow for the loops in plain Python")
        monkeypatch.setattr(compiled.load("conv_numba"), "LANES", 4)
    # Shapes that would be slower on a path are computed all the same.
    monkeypatch.setattr(
        conv,
        "_direct_pays",
        lambda _, run, dtype, shape: use and run > 0 and dtype.kind == "f" and 0 not in shape,
    )
    return request.param


# x (N, C, H, W), w (F, C, K, L), stride, padding, dilation. Few filters for many channels and the
# reverse, strides that leave the last pixels unseen, padding wider than the kernel.
CASES = [
    ((2, 3, 5, 6), (4, 3, 3, 3), 1, 0, 1),
    ((2, 3, 5, 6), (4, 3, 3, 3), 1, 1, 1),
    ((2, 1, 6, 5), (5, 1, 3, 2), 1, 1, 1),
    ((1, 2, 7, 7), (3, 2, 3, 3), 2, 1, 1),
    ((3, 2, 8, 6), (2, 2, 3, 3), 2, 0, 1),
    ((1, 2, 9, 7), (2, 2, 2, 3), (3, 2), (1, 2), 1),
    ((2, 2, 7, 8), (3, 2, 3, 2), 1, (2, 0), (2, 3)),
    ((1, 3, 8, 9), (2, 3, 2, 3), (2, 3), (1, 2), (3, 2)),
    ((2, 4, 4, 4), (1, 4, 1, 1), 1, 0, 1),
    ((2, 2, 4, 4), (3, 2, 1, 1), 2, 1, 2),
    ((1, 2, 3, 3), (2, 2, 2, 2), 1, 3, 1),
    ((2, 2, 1, 1), (2, 2, 3, 3), 1, 1, 1),
    ((1, 1, 5, 4), (1, 1, 5, 4), 1, 0, 1),
]


def _plain_loops(x, w, stride, padding, dilation, g=None):
    """y, dx and dw of <g, y> by the definition; g = 0 if not given."""
    pair = [v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation)]
    (s, t), (p, q), (d, e) = pair
    (n, c, height, width), (f, _, k, l) = x.shape, w.shape
    y = np.zeros(
        (
            n,
            f,
            (height + 2 * p - d * (k - 1) - 1) // s + 1,
            (width + 2 * q - e * (l - 1) - 1) // t + 1,
        )
    )
    g = np.zeros(y.shape) if g is None else g
    dx, dw = np.zeros(x.shape), np.zeros(w.shape)
    for n_, f_, i, j in np.ndindex(y.shape):
        for c_, k_, l_ in np.ndindex(c, k, l):
            row, column = i * s - p + k_ * d, j * t - q + l_ * e
            if 0 <= row < height and 0 <= column < width:
                y[n_, f_, i, j] += w[f_, c_, k_, l_] * x[n_, c_, row, column]
                dx[n_, c_, row, column] += g[n_, f_, i, j] * w[f_, c_, k_, l_]
                dw[f_, c_, k_, l_] += g[n_, f_, i, j] * x[n_, c_, row, column]
    return y, dx, dw


@pytest.mark.parametrize("x_shape, w_shape, stride, padding, dilation", CASES)
def test_conv2d_kernel_and_adjoints_equal_plain_loops(x_shape, w_shape, stride, padding, dilation):
    # Small integers are summed exactly in any order: the results must be equal bit for bit.
    rng = np.random.default_rng(0)
    settings = stride, padding, dilation
    x, w = (rng.integers(-9, 10, shape).astype(np.float64) for shape in (x_shape, w_shape))
    y = conv2d(x, w, *settings)
    g = rng.integers(-9, 10, y.shape).astype(np.float64)
    expected = _plain_loops(x, w, *settings, g)
    found = y, conv2d_dx(g, w, x_shape, *settings), conv2d_dw(g, x, w_shape, *settings)
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 6])
def test_conv2d_kernel_adjoint_identities(kernel, dilation, stride, channels):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(3, channels, kernel, 2))
    x = rng.normal(size=(2, channels, 13, 10))
    for padding in itertools.product(range(3), range(2)):
        y = conv2d(x, w, stride, padding, dilation)
        g = rng.normal(size=y.shape)
        scale = np.sum(np.abs(y * g))
        dx = conv2d_dx(g, w, x.shape, stride, padding, dilation)
        dw = conv2d_dw(g, x, w.shape, stride, padding, dilation)
        assert abs(np.sum(y * g) - np.sum(x * dx)) < 1e-13 * scale
        assert abs(np.sum(y * g) - np.sum(w * dw)) < 1e-13 * scale


def test_conv2d_kernel_equals_scipy_correlate():
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(3, 4, 11, 9)), rng.normal(size=(5, 4, 4, 3))
    expected = [
        [scipy.signal.correlate(image, kernel, "valid", "direct")[0] for kernel in w] for image in x
    ]
    np.testing.assert_allclose(conv2d(x, w), expected, atol=1e-13)


def test_conv2d_kernel_of_a_large_batch_equals_its_images_one_by_one():
    # Blocks of 2 to 72 images, the last of them not full.
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(83, 3, 40, 41)), rng.normal(size=(2, 3, 3, 4))
    for stride in (1, 2):
        y = conv2d(x, w, stride)
        g = rng.normal(size=y.shape)
        dx, dw = conv2d_dx(g, w, x.shape, stride), conv2d_dw(g, x, w.shape, stride)
        ones = [slice(n, n + 1) for n in range(83)]
        expected = [conv2d(x[n], w, stride) for n in ones]
        np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-12)
        expected = [conv2d_dx(g[n], w, x[n].shape, stride) for n in ones]
        np.testing.assert_allclose(dx, np.concatenate(expected), atol=1e-12)
        expected = [conv2d_dw(g[n], x[n], w.shape, stride) for n in ones]
        np.testing.assert_allclose(dw, sum(expected), atol=1e-10)


@pytest.mark.parametrize("x_shape, w_shape, stride, padding, dilation", CASES)
def test_conv2d_kernel_keeps_float32(x_shape, w_shape, stride, padding, dilation):
    rng = np.random.default_rng(4)
    settings = stride, padding, dilation
    x, w = rng.normal(size=x_shape), rng.normal(size=w_shape)
    y = conv2d(x, w, *settings)
    g = rng.normal(size=y.shape)
    exact = y, conv2d_dx(g, w, x_shape, *settings), conv2d_dw(g, x, w_shape, *settings)
    x, w, g = (v.astype(np.float32) for v in (x, w, g))
    single = (
        conv2d(x, w, *settings),
        conv2d_dx(g, w, x_shape, *settings),
        conv2d_dw(g, x, w_shape, *settings),
    )
    for one, other in zip(single, exact):
        assert one.dtype == np.float32 and other.dtype == np.float64
        np.testing.assert_allclose(one, other, atol=3e-5)
    assert conv2d(x, w.astype(np.float64), *settings).dtype == np.float64


@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_kernel_takes_arrays_in_any_memory_order(stride):
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(2, 3, 7, 6)), rng.normal(size=(4, 3, 3, 2))
    g = rng.normal(size=conv2d(x, w, stride).shape)
    channels_last = [np.asfortranarray(v) for v in (x, w, g)]
    reversed_twice = [v[::-1, :, ::-1].copy()[::-1, :, ::-1] for v in (x, w, g)]
    for x_, w_, g_ in (channels_last, reversed_twice):
        np.testing.assert_allclose(conv2d(x_, w_, stride), conv2d(x, w, stride), atol=1e-13)
        one, other = (conv2d_dx(a, b, x.shape, stride) for a, b in ((g_, w_), (g, w)))
        np.testing.assert_allclose(one, other, atol=1e-13)
        one, other = (conv2d_dw(a, b, w.shape, stride) for a, b in ((g_, x_), (g, x)))
        np.testing.assert_allclose(one, other, atol=1e-13)


def test_conv2d_kernel_taps_beyond_the_image_have_no_gradient():
    rng = np.random.default_rng(8)
    x = rng.standard_normal((3, 9, 6, 6)).astype(np.float32)
    g = rng.standard_normal((3, 33, 6, 6)).astype(np.float32)
    # Padding and dilation 8: the outer taps never meet the 6 columns.
    dw = conv2d_dw(g, x, (33, 9, 3, 3), 1, 8, 8)
    assert not np.any(dw[:, :, 1, [0, 2]]) and np.all(dw[:, :, 1, 1])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch, channels, filters", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_conv2d_kernel_of_zero_size(batch, channels, filters, stride):
    x, w = (
        np.ones((batch, channels, 5, 6), np.float32),
        np.ones((filters, channels, 3, 3), np.float32),
    )
    y = conv2d(x, w, stride, 1)
    dx, dw = conv2d_dx(y, w, x.shape, stride, 1), conv2d_dw(y, x, w.shape, stride, 1)
    assert y.shape[:2] == (batch, filters) and dx.shape == x.shape and dw.shape == w.shape
    for v in (y, dx, dw):
        assert v.dtype == np.float32 and not np.any(v)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, w: conv2d(x[0], w), r"x must be \(N, C, H, W\) .* \(3, 5, 6\)"),
        (lambda x, w: conv2d(x, w[:, :2]), r"x \(2, 3, 5, 6\) has 3 channels.* takes 2"),
        (
            lambda x, w: conv2d(x, w, dilation=3),
            r"3 x 3 with dilation \(3, 3\) spans 7 x 7 .* 5 x 6",
        ),
        (lambda x, w: conv2d(x, w[..., :0]), r"kernel of 3 x 0"),
        (lambda x, w: conv2d(x, w, stride=0), r"stride must be .* at least 1, not 0"),
        (lambda x, w: conv2d(x, w, padding=(1, -1)), r"padding must be .* not \(1, -1\)"),
        (lambda x, w: conv2d(x, w, dilation=1.5), r"dilation must be .* not 1.5"),
        (lambda x, w: conv2d(x, w, padding="same"), r"padding must be .* not 'same'"),
        (
            lambda x, w: conv2d_dx(np.ones((2, 4, 3, 3)), w, x.shape),
            r"conv2d_dx: g has shape \(2, 4, 3, 3\).* gives \(2, 4, 3, 4\)",
        ),
        (
            lambda x, w: conv2d_dw(np.ones((2, 5, 3, 4)), x, w.shape),
            r"conv2d_dw: g has shape \(2, 5, 3, 4\).* gives \(2, 4, 3, 4\)",
        ),
        (
            lambda x, w: conv2d_dx(np.ones((2, 4, 3, 4)), w, (2, 2, 5, 6)),
            r"conv2d_dx: x \(2, 2, 5, 6\) has 2 channels",
        ),
    ],
)
def test_conv2d_kernel_says_what_does_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.ones((2, 3, 5, 6)), np.ones((4, 3, 3, 3)))


def test_conv2d_kernel_lets_nan_and_infinity_through():
    x, w = np.zeros((1, 1, 5, 5)), np.ones((1, 1, 3, 3))
    x[0, 0, 0, 0], x[0, 0, 4, 4] = np.nan, np.inf
    y = conv2d(x, w)[0, 0]
    assert np.isnan(y[0, 0]) and np.isposinf(y[2, 2]) and np.isnan(y).sum() == 1
    assert np.isinf(y).sum() == 1


@pytest.mark.parametrize("x_shape, w_shape, stride, padding, dilation", CASES)
def test_conv2d_kernel_equals_torch(x_shape, w_shape, stride, padding, dilation):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(6)
    settings = stride, padding, dilation
    x, w = (torch.tensor(rng.normal(size=s), requires_grad=True) for s in (x_shape, w_shape))
    y = torch.nn.functional.conv2d(x, w, None, *settings)
    g = rng.normal(size=tuple(y.shape))
    y.backward(torch.tensor(g))
    x_, w_ = x.detach().numpy(), w.detach().numpy()
    np.testing.assert_allclose(conv2d(x_, w_, *settings), y.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(conv2d_dx(g, w_, x_shape, *settings), x.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(conv2d_dw(g, x_, w_shape, *settings), w.grad.numpy(), atol=1e-12)


# --- live taps


MASKS = {
    "A": [[1, 1, 1], [1, 0, 0], [0, 0, 0]],
    "B": [[1, 1, 1], [1, 1, 0], [0, 0, 0]],
    "holes": [[0, 1, 0], [1, 0, 1], [0, 0, 1]],
    "one": [[0, 0, 0], [0, 0, 1], [0, 0, 0]],
    "none": [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 0, 1), ((1, 3), 2, (2, 1))])
def test_conv2d_kernel_of_some_taps_equals_masked_weights(mask, stride, padding, dilation):
    rng = np.random.default_rng(7)
    taps = np.array(mask, bool)
    settings = stride, padding, dilation
    x, w = (rng.integers(-9, 10, s).astype(np.float64) for s in ((3, 4, 7, 8), (5, 4, 3, 3)))
    y = conv2d(x, w * taps, *settings)
    g = rng.integers(-9, 10, y.shape).astype(np.float64)
    np.testing.assert_array_equal(conv2d(x, w, *settings, taps), y)
    np.testing.assert_array_equal(
        conv2d_dx(g, w, x.shape, *settings, taps), conv2d_dx(g, w * taps, x.shape, *settings)
    )
    np.testing.assert_array_equal(
        conv2d_dw(g, x, w.shape, *settings, taps), conv2d_dw(g, x, w.shape, *settings) * taps
    )


def test_conv2d_kernel_does_not_look_at_taps_that_are_not_live():
    taps = np.array(MASKS["A"], bool)
    x, w = np.ones((1, 2, 4, 4)), np.where(taps, 1.0, np.nan) * np.ones((3, 2, 1, 1))
    y = conv2d(x, w, 1, 1, 1, taps)
    dx, dw = conv2d_dx(y, w, x.shape, 1, 1, 1, taps), conv2d_dw(y, x, w.shape, 1, 1, 1, taps)
    assert all(np.all(np.isfinite(v)) for v in (y, dx, dw)) and not np.any(dw[..., ~taps])
    x[0, 0, 3, 3] = np.inf  # the last pixel is before no other
    np.testing.assert_array_equal(conv2d(x, w, 1, 1, 1, taps), y)


@pytest.mark.parametrize("taps", [np.ones((3, 2), bool), np.ones((3, 3))])
def test_conv2d_kernel_says_what_taps_must_be(taps):
    with pytest.raises(ValueError, match=r"taps must be booleans of the shape \(3, 3\)"):
        conv2d(np.ones((1, 1, 5, 5)), np.ones((1, 1, 3, 3)), taps=taps)


# --- larger shapes: several panels of channels, several blocks of rows, several pieces


LARGE = [
    ((9, 35, 19, 21), (34, 35, 3, 3), 1, 1, 1),
    ((10, 33, 12, 13), (65, 33, 3, 2), (2, 3), (1, 0), 1),
    ((3, 40, 18, 17), (20, 40, 3, 3), 1, (2, 3), (1, 2)),
    ((2, 5, 40, 300), (33, 5, 5, 5), 1, 2, 1),
]


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (np.float64, 4e-15)])
@pytest.mark.parametrize("x_shape, w_shape, stride, padding, dilation", LARGE)
def test_conv2d_kernel_of_many_channels(
    x_shape, w_shape, stride, padding, dilation, dtype, tolerance, path, monkeypatch
):
    if path == "twin":
        pytest.skip("the twin is what the compiled kernels are compared with")
    rng = np.random.default_rng(8)
    settings = stride, padding, dilation
    x, w = (rng.normal(size=s).astype(dtype) for s in (x_shape, w_shape))
    y = conv2d(x, w, *settings)
    g = rng.normal(size=y.shape).astype(dtype)
    found = y, conv2d_dx(g, w, x_shape, *settings), conv2d_dw(g, x, w_shape, *settings)
    monkeypatch.setattr(conv, "_direct_pays", lambda *_: False)
    expected = conv2d(x, w, *settings), conv2d_dx(g, w, x_shape, *settings)
    expected += (conv2d_dw(g, x, w_shape, *settings),)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype == dtype and one.flags.c_contiguous
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.max(np.abs(other)) * 9)


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_kernel_special_values_reach_what_they_touch(special, stride):
    rng = np.random.default_rng(9)
    x, w = rng.normal(size=(2, 3, 9, 8)), rng.normal(size=(4, 3, 3, 3))
    g = rng.normal(size=conv2d(x, w, stride, 1).shape)
    for one in (x, g):
        before = one[1, 2, 2, 3]
        one[1, 2, 2, 3] = special
        found = (
            conv2d(x, w, stride, 1),
            conv2d_dx(g, w, x.shape, stride, 1),
            conv2d_dw(g, x, w.shape, stride, 1),
        )
        for part, expected in zip(found, _plain_loops(x, w, stride, 1, 1, g)):
            np.testing.assert_array_equal(np.isfinite(part), np.isfinite(expected))
            np.testing.assert_array_equal(np.isnan(part), np.isnan(expected))
        one[1, 2, 2, 3] = before


def test_conv2d_kernel_gives_the_same_bits_with_one_and_two_threads():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    rng = np.random.default_rng(10)
    for shape, filters in (((37, 16, 11, 10), 20), ((37, 1, 28, 28), 5)):
        x = rng.normal(size=shape).astype(np.float32)
        w = rng.normal(size=(filters, shape[1], 3, 3)).astype(np.float32)
        g = rng.normal(size=conv2d(x, w).shape).astype(np.float32)
        results = []
        for number in (1, 2):
            with threadpoolctl.threadpool_limits(number):
                results.append((conv2d(x, w), conv2d_dx(g, w, shape), conv2d_dw(g, x, w.shape)))
        for one, other in zip(*results):
            assert one.tobytes() == other.tobytes()


def test_conv2d_compiled_kernels_equal_their_own_loops_in_plain_python(monkeypatch):
    fast = compiled.load("conv_numba")
    if fast is None:
        pytest.skip("Numba is not used")
    rng = np.random.default_rng(11)
    x, w = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(2, 3, 3, 2))
    g = rng.normal(size=conv2d(x, w, 2, 1).shape)

    def results():
        return (
            conv2d(x, w, 2, 1),
            conv2d_dx(g, w, x.shape, 2, 1),
            conv2d_dw(g, x, w.shape, 2, 1),
        )

    expected = results()
    for name in ("multiply", "correlate", "correlate_weights"):
        kernel = getattr(fast, name)
        monkeypatch.setattr(fast, name, getattr(kernel, "py_func", kernel))
    for one, other in zip(results(), expected):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)


def test_conv2d_kernel_chooses_a_path_by_shape(path, monkeypatch):
    if path == "twin":
        pytest.skip("the twin is what the choice is compared with")
    monkeypatch.undo()
    chosen = []
    direct, direct_dw = conv._direct, conv._direct_dw
    monkeypatch.setattr(conv, "_direct", lambda *a: chosen.append(1) or direct(*a))
    monkeypatch.setattr(conv, "_direct_dw", lambda *a: chosen.append(1) or direct_dw(*a))
    rng = np.random.default_rng(12)
    for channels, filters, paths in ((1, 32, 1), (32, 1, 0), (32, 32, 3)):
        x, w = rng.normal(size=(3, channels, 9, 9)), rng.normal(size=(filters, channels, 3, 3))
        g = rng.normal(size=(3, filters, 9, 9))
        chosen.clear()
        found = conv2d(x, w, 1, 1), conv2d_dx(g, w, x.shape, 1, 1), conv2d_dw(g, x, w.shape, 1, 1)
        assert len(chosen) == paths
        with monkeypatch.context() as patch:
            patch.setattr(conv, "_direct_pays", lambda *_: False)
            expected = conv2d(x, w, 1, 1), conv2d_dx(g, w, x.shape, 1, 1)
            expected += (conv2d_dw(g, x, w.shape, 1, 1),)
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, atol=1e-11)
