"""How kernels are loaded, cached and spread over threads."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

from minigrad.kernels import compiled
from minigrad.source import source_hash

ROOT = Path(__file__).parent.parent

PRELUDE = """
import sys
import numpy as np
from minigrad.kernels import compiled, conv
rng = np.random.default_rng(0)
x, w = rng.normal(size=(2, 12, 6, 5)), rng.normal(size=(10, 12, 3, 3))
"""


def _run(program, **environment):
    """Run Python in a fresh process from the project's folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _checksum(**environment):
    return float(_run("print(repr(float(np.sum(conv.conv2d(x, w, 1, 1) ** 2))))", **environment))


def test_kernels_without_numba_equal_those_with_it():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 12, 6, 5)), rng.normal(size=(10, 12, 3, 3))
    from minigrad.kernels.conv import conv2d

    expected = np.sum(conv2d(x, w, 1, 1) ** 2)
    assert _checksum(MINIGRAD_KERNELS="numpy") == pytest.approx(expected, rel=1e-12)
    assert _checksum(NUMBA_DISABLE_JIT="1") == pytest.approx(expected, rel=1e-12)


def test_kernels_with_numpy_asked_for_do_not_import_numba():
    program = "conv.conv2d(x, w)\nprint('numba' in sys.modules, compiled.load('conv_numba'))"
    assert _run(program, MINIGRAD_KERNELS="numpy") == "False None"


def test_kernels_run_where_numba_is_missing():
    program = """
sys.modules["numba"] = None
y = conv.conv2d(x, w, 1, 1)
assert compiled.load("conv_numba") is None
import minigrad.kernels.conv_numba as fast  # undecorated loops
out = np.zeros((1, 3, fast.LANES))
rows = np.zeros((3, fast.LANES))
index = np.array([0, 1, 2], np.uint64), np.array([[0, 0, 2]], np.uint64)
fast.multiply(np.arange(4.0), *index, np.ones((1, 2, fast.LANES)), *rows, out)
print(out[0, :, 0])
"""
    assert _run(program, MINIGRAD_KERNELS="") == "[1. 3. 5.]"


def test_kernels_say_what_the_variable_may_be():
    program = """
try:
    conv.conv2d(x, w)
except ValueError as error:
    print(error)
"""
    words = "MINIGRAD_KERNELS is 'cuda'; it must be 'numba', 'numpy' or unset"
    assert _run(program, MINIGRAD_KERNELS="cuda") == words


def test_importing_minigrad_imports_no_numba():
    assert _run("import minigrad, minigrad.nn\nprint('numba' in sys.modules)") == "False"


def test_kernels_are_cached_by_source_and_leave_the_settings_alone(tmp_path):
    pytest.importorskip("numba")
    program = """
import os
import numba
before = dict(os.environ), numba.config.CACHE_DIR, numba.config.THREADING_LAYER
fast = compiled.load("conv_numba")
conv.conv2d(x, w)
assert before == (dict(os.environ), numba.config.CACHE_DIR, numba.config.THREADING_LAYER)
print(sum(fast.correlate.stats.cache_hits.values()))
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment |= {"LOCALAPPDATA": str(tmp_path), "NUMBA_DISABLE_JIT": "0"}
    environment |= {"MINIGRAD_KERNELS": "numba"}
    assert [_run(program, **environment) for _ in range(2)] == ["0", "1"]
    indices = list(tmp_path.rglob("*correlate*.nbi"))
    assert indices and all(f"numba-{source_hash()}" in str(path) for path in indices)


def test_caches_of_old_sources_are_deleted_but_for_the_newest(tmp_path):
    pytest.importorskip("numba")
    folders = [tmp_path / "minigrad" / f"numba-{i:012d}" for i in range(12)]
    for age, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "kernel.nbi").touch()
        os.utime(folder, (1e9 - age, 1e9 - age))
    other = tmp_path / "minigrad" / "data"
    other.mkdir()
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment |= {"LOCALAPPDATA": str(tmp_path), "MINIGRAD_KERNELS": "numba"}
    _run("compiled.load('vq_numba')", NUMBA_CACHE_DIR=str(tmp_path), **environment)
    assert [folder.exists() for folder in folders] == [True] * 8 + [False] * 4
    assert other.exists()


EVERY_KERNEL = """
import json
from minigrad.kernels import adam, fused, pixelcnn, sampling, transcendental, vq

results = []
for dtype in np.float32, np.float64:
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    images, weights = normal(2, 12, 6, 5), normal(10, 12, 3, 3)
    g = conv.conv2d(images, weights, 1, 1)
    some = np.arange(9).reshape(3, 3) < 4
    layers = [
        pixelcnn.Layer(normal(10, 1, 3, 3), normal(10), some),
        pixelcnn.Layer(normal(1, 10, 1, 1), normal(1), np.ones((1, 1), bool), relu=False),
    ]
    a, b, u = normal(65, 64), normal(65, 64), rng.random((2, 1, 4, 5))
    bits, label = (a > 0).astype(dtype), rng.integers(0, 9, 65)
    results += [
        g,
        conv.conv2d(images, weights, 1, 1, taps=some),
        conv.conv2d_dx(g, weights, images.shape, 1, 1),
        conv.conv2d_dw(g, images, weights.shape, 1, 1),
        *pixelcnn.sample(layers, u),
        *(f(np.abs(a)) for f in (transcendental.exp, transcendental.log, transcendental.tanh)),
        *(f(a) for f in (transcendental.expit, transcendental.softplus, fused.log_softmax)),
        *(fused.expit_dx(a, b), fused.log_softmax_dx(a, b), fused.bernoulli_log_prob(a, bits)),
        fused.bernoulli_log_prob_dlogits(a, bits, b),
        sampling.bernoulli(np.random.default_rng(2), a),
        sampling.bernoulli(np.random.default_rng(2), probs=np.abs(np.tanh(a))),
        sampling.categorical(np.random.default_rng(2), a),
        sampling.logistic(np.random.default_rng(2), a.shape, dtype),
        *(sampling.gumbel_max(a, b), sampling.concrete(a, b, 0.5)),
        *(sampling.binary_concrete(a, b, 0.5), sampling.conditional_logistic(a, bits, b)),
        *(vq.nearest(a, b), *vq.code_sums(label, a, 9)),
        *adam.adam(a, b, b, np.abs(b), 0.9, 0.99, 0.1, 1e-8),
    ]
print(json.dumps([np.asarray(r, float).ravel()[:500].tolist() for r in results]))
"""


def test_every_kernel_gives_the_same_compiled_on_numpy_without_numba_and_uncompiled():
    missing = "sys.modules['numba'] = None" + EVERY_KERNEL
    outputs = [
        _run(EVERY_KERNEL, MINIGRAD_KERNELS="numba", NUMBA_DISABLE_JIT="0"),
        _run(EVERY_KERNEL, MINIGRAD_KERNELS="numpy"),
        _run(missing, MINIGRAD_KERNELS=""),
        _run(EVERY_KERNEL, MINIGRAD_KERNELS="numba", NUMBA_DISABLE_JIT="1"),
    ]
    first, *others = map(json.loads, outputs)
    for other in others:
        assert len(other) == len(first) > 50
        for a, b in zip(first, other):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * max(1, np.max(np.abs(a))))


def test_njit_compiles_nothing_before_the_first_call_and_keeps_nan():
    pytest.importorskip("numba")

    @compiled.njit
    def total(x):
        s = 0.0
        for v in x:
            s += v
        return s

    assert not getattr(total, "signatures", [])
    assert np.isnan(total(np.array([1.0, np.nan]))) and total(np.array([1.0, np.inf])) == np.inf


@pytest.mark.parametrize("number", [1, 2, 5])
def test_parallel_does_every_piece_once_and_restores_blas(number):
    with threadpoolctl.threadpool_limits(number):
        before = threadpoolctl.threadpool_info()
        assert compiled.threads() <= number
        done, inside = [], []

        def work(piece):
            inside.append(compiled.threads())
            done.append(piece)

        compiled.parallel(work, range(20))
        assert sorted(done) == list(range(20)) and set(inside) == {1}
        assert threadpoolctl.threadpool_info() == before
        compiled.parallel(work, [])


def test_parallel_makes_one_space_for_each_thread():
    made = []

    def make_space():
        made.append(np.zeros(2, int))
        return (made[-1],)

    def work(piece, space):
        space += 1, piece

    compiled.parallel(work, range(50), make_space)
    assert np.sum(made, axis=0).tolist() == [50, 50 * 49 / 2]
    assert len(made) <= compiled.threads()


def test_parallel_within_parallel_and_from_two_threads():
    done = []

    def outer(i):
        compiled.parallel(lambda j: done.append((i, j)), range(3))

    before = threadpoolctl.threadpool_info()
    callers = [threading.Thread(target=compiled.parallel, args=(outer, range(8))) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(done) == sorted([(i, j) for i in range(8) for j in range(3)] * 2)
    assert threadpoolctl.threadpool_info() == before


def test_parallel_passes_errors_on_and_goes_on_working():
    before = threadpoolctl.threadpool_info()

    def work(piece):
        if piece == 13:
            raise ZeroDivisionError("thirteen")

    for _ in range(5):
        with pytest.raises(ZeroDivisionError, match="thirteen"):
            compiled.parallel(work, range(40))
    assert threadpoolctl.threadpool_info() == before
    done = []
    compiled.parallel(done.append, range(4))
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_parallel_works_in_a_forked_child():
    program = """
import os
work = lambda piece: np.ones((200, 200)) @ np.ones((200, 200))
compiled.parallel(work, range(8))
child = os.fork()
if child == 0:
    compiled.parallel(work, range(8))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _run(program) == "0"
