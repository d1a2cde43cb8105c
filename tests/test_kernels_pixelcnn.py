"""Sampling from a stack of masked convolutions, against whole passes and against itself."""

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import expit

from minigrad.kernels import compiled, pixelcnn
from minigrad.kernels.pixelcnn import Layer, logits, sample
from minigrad.nn import causal_mask


@pytest.fixture(params=["twin", "compiled"], autouse=True)
def path(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(pixelcnn.compiled, "load", lambda _: None)
    elif compiled.load("conv_numba") is None:
        pytest.skip("Numba is not used")
    elif os.environ.get("NUMBA_DISABLE_JIT") == "1":
        monkeypatch.setattr(compiled.load("conv_numba"), "LANES", 4)
    return request.param


def _layer(rng, shape, kind, dtype=np.float64, **settings):
    mask = causal_mask(kind, shape[2:])
    w = rng.normal(size=shape) / np.sqrt(shape[1] * mask.sum())
    return Layer(w.astype(dtype), rng.normal(size=shape[0]).astype(dtype) / 3, mask, **settings)


def _model(rng, dtype=np.float64, channels=1):
    """Three sizes of kernel, more channels than one register block holds, a residual layer."""
    wide = 5 if os.environ.get("NUMBA_DISABLE_JIT") == "1" else 34
    return [
        _layer(rng, (wide, channels, 5, 7), "A", dtype),
        _layer(rng, (wide, wide, 3, 3), "B", dtype, residual=True),
        _layer(rng, (6, wide, 3, 5), "B", dtype, relu=False),
        _layer(rng, (channels, 6, 1, 1), "B", dtype, relu=False),
    ]


def _naive(layers, uniforms):
    """One whole pass for each pixel."""
    images = np.zeros_like(uniforms, dtype=layers[0].w.dtype)
    for i, j in np.ndindex(uniforms.shape[2:]):
        z = logits(layers, images)[:, :, i, j]
        images[:, :, i, j] = uniforms[:, :, i, j] < expit(z.astype(np.float64))
    return images, logits(layers, images)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("channels", [1, 2])
def test_pixelcnn_sample_equals_whole_passes(dtype, tolerance, channels):
    rng = np.random.default_rng(0)
    layers = _model(rng, dtype, channels)
    uniforms = rng.random((11, channels, 6, 7))
    images, z = sample(layers, uniforms)
    expected, expected_z = _naive(layers, uniforms)
    assert images.dtype == z.dtype == dtype and 0.05 < images.mean() < 0.95
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_allclose(z, expected_z, atol=tolerance * np.abs(z).max())


def test_pixelcnn_sample_of_one_image_does_not_depend_on_the_others():
    rng = np.random.default_rng(1)
    layers, uniforms = _model(rng, np.float32), rng.random((20, 1, 5, 5))
    images, z = sample(layers, uniforms)
    for n in (0, 8, 9, 19):
        alone, alone_z = sample(layers, uniforms[n : n + 1])
        np.testing.assert_array_equal(alone[0], images[n])
        np.testing.assert_allclose(alone_z[0], z[n], atol=1e-5)


def test_pixelcnn_sample_gives_the_same_bits_with_one_and_two_threads():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    rng = np.random.default_rng(2)
    layers, uniforms = _model(rng, np.float32), rng.random((23, 1, 6, 6))
    results = []
    for number in (1, 2):
        with threadpoolctl.threadpool_limits(number):
            results.append(sample(layers, uniforms))
    for one, other in zip(*results):
        assert one.tobytes() == other.tobytes()


def test_pixelcnn_sample_extreme_uniforms_and_logits():
    # u = 0 draws a 1 wherever that has any probability; NaN logits draw a 0, and stay.
    layer = Layer(np.zeros((1, 1, 3, 3)), np.array([-50.0]), causal_mask("A", 3), relu=False)
    images, z = sample([layer], np.zeros((2, 1, 3, 3)))
    assert np.all(images == 1) and np.all(z == -50)
    images, _ = sample([layer], np.full((2, 1, 3, 3), 0.5))
    assert np.all(images == 0)
    for relu in (False, True):
        images, z = sample(
            [layer._replace(b=np.array([np.nan]), relu=relu)], np.zeros((1, 1, 2, 2))
        )
        assert np.all(images == 0) and np.all(np.isnan(z))


def test_pixelcnn_sample_leaves_its_arguments_alone_and_takes_no_images():
    rng = np.random.default_rng(3)
    layers, uniforms = _model(rng), rng.random((2, 1, 4, 4))
    before = uniforms.copy()
    sample(layers, uniforms)
    np.testing.assert_array_equal(uniforms, before)
    images, z = sample(layers, uniforms[:0])
    assert images.shape == z.shape == (0, 1, 4, 4)


def test_pixelcnn_sampling_loop_in_plain_python(path, monkeypatch):
    if path == "twin":
        pytest.skip("there is no loop in the twin")
    rng = np.random.default_rng(4)
    layers = [
        _layer(rng, (2, 1, 3, 3), "A"),
        _layer(rng, (2, 2, 3, 3), "B", residual=True),
        _layer(rng, (1, 2, 1, 1), "B", relu=False),
    ]
    uniforms = rng.random((2, 1, 3, 3))
    images, z = sample(layers, uniforms)
    fast = compiled.load("conv_numba")
    for name in ("multiply", "sample_pixels"):
        kernel = getattr(fast, name)
        monkeypatch.setattr(fast, name, getattr(kernel, "py_func", kernel))
    plain, plain_z = sample(layers, uniforms)
    np.testing.assert_array_equal(plain, images)
    np.testing.assert_allclose(plain_z, z, rtol=1e-13, atol=1e-14)


def _wrong(number, **changes):
    layers = _model(np.random.default_rng(5))
    layers[number] = layers[number]._replace(**changes)
    return layers


@pytest.mark.parametrize(
    "layers, words",
    [
        (_wrong(0, taps=causal_mask("B", (5, 7))), "layer 0 .* its own or later"),
        (_wrong(1, taps=np.ones((3, 3), bool)), "layer 1 .* after its own"),
        (_wrong(2, w=np.ones((6, 4, 3, 5))), r"layer 2 .* must be \(F, (34|5), K, L\)"),
        (_wrong(2, residual=True), "layer 2 .* as many outputs as inputs"),
        (_wrong(1, taps=np.ones((3, 3))), "layer 1 .* booleans"),
        (_model(np.random.default_rng(5))[:-1], "the last layer has 6 outputs, .* 1 channels"),
        ([], "not none"),
    ],
)
def test_pixelcnn_sample_says_what_does_not_fit(layers, words):
    with pytest.raises(ValueError, match=words):
        sample(layers, np.zeros((1, 1, 4, 4)))


def test_pixelcnn_sample_with_the_compiler_switched_off(path):
    if path == "twin":
        pytest.skip("the compiler has no part in the twin")
    program = (
        "import numpy as np\n"
        "from minigrad.kernels.pixelcnn import Layer, logits, sample\n"
        "taps = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)\n"
        "layer = Layer(np.ones((1, 1, 3, 3)), np.zeros(1), taps, relu=False)\n"
        "images, z = sample([layer], np.full((1, 1, 2, 2), 0.6))\n"
        "assert np.array_equal(z, logits([layer], images)) and images.sum() == 0\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
