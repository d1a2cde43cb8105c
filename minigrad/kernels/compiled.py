"""Compiled kernels: how they are loaded, cached and spread over threads.

A family of kernels is two files. `name.py` holds the public functions with their checks, the NumPy
twins, and the choice between twin and kernel by shape. `name_numba.py` holds the loops:

    from minigrad.kernels.compiled import njit

    @njit
    def scale_rows(x, s, out):  # x (N, D), s (N,), out (N, D)
        for n in range(x.shape[0]): ...

It is imported when first needed, through `load`, and nothing is compiled before the first call:

    fast = compiled.load("name_numba")  # None where the twins are to run
    if fast is None or x.size < SMALL:
        return _twin(x, s)
    out = np.empty_like(x)
    compiled.parallel(lambda rows: fast.scale_rows(x[rows], s[rows], out[rows]), blocks)

What a kernel must keep to:
- it calls kernels of its own file only, and reads no globals but constants: Numba's cache does not
  notice a change elsewhere;
- every signature is compiled once per machine, half a second or more each: pass C-contiguous
  arrays (another layout is another signature), and Python ints and floats of one kind;
- no `parallel=True`: Numba's threads and those of BLAS would wait for each other while spinning.
  A kernel is a plain loop that releases the GIL, and `parallel` runs it on threads that sleep;
- the pieces given to `parallel` follow from the shapes and never from the number of threads, each
  writes to its own part of the output, and partial sums are added in a fixed order afterwards. So
  the results are the same bits with any number of threads;
- sums that should stay in registers need `@njit(noalias=True)`, rows that are separate arguments,
  and a look at `inspect_asm()`: the innermost loop must not store. See `conv_numba.multiply`.

There is one setting for the number of threads, that of NumPy's BLAS: OMP_NUM_THREADS,
`threadpoolctl.threadpool_limits` and so on count for the kernels as well. Numba's own threads are
never started.

MINIGRAD_KERNELS=numpy, or a missing Numba, runs everything on the twins. NUMBA_DISABLE_JIT=1 runs
the loops of the kernels uncompiled.
"""

import contextlib
import functools
import importlib
import os
import shutil
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from threadpoolctl import ThreadpoolController

from minigrad.source import source_hash

__all__ = ["load", "njit", "parallel", "threads"]

KEPT_CACHES = 8  # beside that of the present source


@functools.cache
def load(name):
    """Return the module `minigrad.kernels.<name>`, or None where the NumPy twins are to run."""
    choice = os.environ.get("MINIGRAD_KERNELS") or "numba"
    if choice not in ("numba", "numpy"):
        raise ValueError(f"MINIGRAD_KERNELS is {choice!r}; it must be 'numba', 'numpy' or unset")
    if choice == "numpy" or _numba() is None:
        return None
    return importlib.import_module(f"minigrad.kernels.{name}")


@functools.cache
def _numba():
    try:
        import numba
    except ModuleNotFoundError:
        return None
    except ImportError as error:  # it refuses a NumPy that is too new for it
        warnings.warn(f"Numba cannot be used, kernels run on NumPy: {error}", stacklevel=3)
        return None
    return numba


def njit(kernel=None, *, noalias=False):
    """Compile `kernel` when it is first called, for each signature; without Numba return it as is.

    Division by zero gives what it gives in NumPy. The compiler may fuse a product and a sum into
    one instruction but may not assume anything about NaN or infinities. With `noalias=True` it may
    assume that no array argument overlaps another: then what a loop adds up in the elements of one
    array can stay in registers while it reads the others.
    """
    if kernel is None:
        return functools.partial(njit, noalias=noalias)
    numba = _numba()
    if numba is None:
        return kernel
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    if noalias:
        options["pipeline_class"] = _no_alias_compiler()
    before = numba.config.CACHE_DIR
    folder = _cache_folder(before)
    _prune(folder)
    numba.config.CACHE_DIR = str(folder)
    try:
        return numba.njit(kernel, cache=True, **options)
    except RuntimeError:  # neither that folder nor Numba's own ones can be written to
        return numba.njit(kernel, **options)
    finally:
        numba.config.CACHE_DIR = before


@functools.cache
def _no_alias_compiler():
    from numba.core.compiler import Compiler

    class NoAliasCompiler(Compiler):
        def define_pipelines(self):
            self.state.flags.noalias = True
            return super().define_pipelines()

    return NoAliasCompiler


def _cache_folder(chosen):
    """Folder of compiled kernels: below the `chosen` one or the user's caches, keyed by source."""
    if chosen:
        caches = chosen
    elif sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "minigrad" / f"numba-{_source_hash()}"


_source_hash = functools.cache(source_hash)


@functools.cache
def _prune(folder):
    """Delete the caches of other sources, but for the newest: each edit of a file leaves one."""
    with contextlib.suppress(OSError):  # another process may be doing the same
        others = [other for other in folder.parent.glob("numba-*") if other != folder]
        others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
        for other in others[KEPT_CACHES:]:
            shutil.rmtree(other, ignore_errors=True)


# ------------------------------------------------------------------------------------- threads


def threads():
    """Return the number of threads that kernels may use: that of NumPy's BLAS, or one per core."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    blas = _blas()
    return min([cores, *(library.num_threads for library in blas)])


def parallel(work, pieces, make_space=tuple):
    """Call `work(piece, *space)` for every piece, on `threads()` threads; BLAS inside has one.

    `make_space()` is called once for each thread, which uses the result for all of its pieces: new
    memory is slow, and taking it in the threads makes them wait for each other. Worth its 50
    microseconds or so where a piece takes at least as long. A call from within `work`, or while
    another thread is here, goes through its pieces alone.
    """
    pieces = list(pieces)
    todo = iter(pieces)  # shared: each thread takes the next piece

    def run(space):
        for piece in todo:
            work(piece, *space)

    if not _alone.acquire(blocking=False):
        run(make_space())
        return
    helpers = min(threads(), len(pieces)) - 1
    before = [library.num_threads for library in _blas()]
    try:
        for library in _blas():
            library.set_num_threads(1)
        own, *spaces = [make_space() for _ in range(helpers + 1)] or [()]
        futures = [_pool().submit(run, space) for space in spaces]
        try:
            run(own)
        finally:
            started = [future for future in futures if not future.cancel()]
            wait(started)
        for future in started:
            future.result()
    finally:
        for library, number in zip(_blas(), before):
            library.set_num_threads(number)
        _alone.release()


@functools.cache
def _pool():
    _let_blas_rest()
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="minigrad")


@functools.cache
def _blas():
    """NumPy's BLAS, as what threadpoolctl can ask and set; empty where it cannot."""
    return ThreadpoolController().select(user_api="blas").lib_controllers


def _let_blas_rest():
    """Have OpenBLAS's idle threads sleep after 0.4 ms instead of spinning for 27 ms.

    While they spin, a kernel after a matrix product has to share the cores with them: a product
    and a convolution by turns took 1.4 to 1.5 times as long as both alone, and 1.0 after this.
    OpenBLAS reads the time when it starts its threads, so they are ended, as a fork would do too,
    and start anew with the next product. That must not happen under a product in another thread:
    where there is one, or the user has set a time, nothing is done.
    """
    name = "OPENBLAS_THREAD_TIMEOUT"  # the power of two of the cycles to spin
    if name in os.environ or threading.active_count() > 1:
        return
    for library in _blas():
        start = getattr(library.dynlib, "openblas_read_env", None)
        stop = getattr(library.dynlib, "blas_thread_shutdown_", None)
        if library.internal_api == "openblas" and start and stop:
            os.environ[name] = "20"
            try:
                start()
            finally:
                del os.environ[name]
            stop()


_alone = threading.Lock()


def _after_fork():
    global _alone
    _alone = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
