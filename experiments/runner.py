"""Runs: pure functions of their configs, which survive being killed and leave a record.

An experiments file holds `RUNS = {"name": Run(...)}`. Each run's state, generator, step and curves
go into one of two checkpoint files by turns, below `runs/`, so that a good one is always there.
When the last step is done, the record is written to `experiments/results/`.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import pkgutil
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import experiments.tables
from minigrad.source import source_hash
from minigrad.train import (
    DamagedFile,
    fit,
    load_arrays,
    load_record,
    load_snapshot,
    save_record,
    save_snapshot,
    side_rng,
    write_atomic,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
COMMON = {"seed": 0, "threads": 1, "log_every": 100, "eval_every": 1000}


class Run(NamedTuple):
    """A run that can be asked for by name.

    `setup(config, data, rng)` returns `Parts`; its docstring's first line is what `list` shows.
    `defaults` holds the run's settings and must hold `steps`; `seed`, `threads`, `log_every` and
    `eval_every` have defaults of their own. `data` maps each data set the run can take (a function
    of `minigrad.data`; the first is the default) to the settings that differ on it. A run without
    `data` gets None. `continues` is False where `steps` decides more than when to stop, the
    learning rate say: a longer run is then another one, not the continuation of a shorter one.
    """

    setup: Callable
    defaults: dict
    data: dict = {}  # noqa: RUF012  (never changed)
    continues: bool = True


class Parts(NamedTuple):
    """What a setup returns; `step` and `state` as in `minigrad.train.fit`.

    `evaluate(state, rng)` returns a dict of scalars; `finish(state, rng)` returns a dict of scalars
    and a dict of arrays for the record, to which `evaluate` gives the scalars that `finish` does
    not. Neither generator is that of the training.
    """

    state: Any
    step: Callable
    evaluate: Callable | None = None
    finish: Callable | None = None


class RunError(Exception):
    """A run that cannot be done as asked; the message says what to do instead."""


def registry():
    """Return all runs of the modules of `experiments` and `experiments.tables`, by name."""
    runs = {}
    for module in _modules(experiments) + _modules(experiments.tables):
        found = getattr(module, "RUNS", {})
        if twice := runs.keys() & found.keys():
            raise RunError(f"{module.__file__}: {sorted(twice)} exist in another file")
        runs |= found
    return runs


def tables():
    """Return the tables of the modules of `experiments.tables`, by the module's name."""
    return {
        module.__name__.rpartition(".")[2]: module.TABLE._replace(protocol=module.__doc__)
        for module in _modules(experiments.tables)
        if hasattr(module, "TABLE")
    }


def _modules(package):
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "__main__"]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


# A config: a JSON-able dict that decides the result.


def configure(runs, name, data=None, settings=None):
    """Return the config of run `name` on `data` with `settings`: strings, or values, by key."""
    if name not in runs:
        raise RunError(f"no run {name!r}; there are: {', '.join(sorted(runs)) or 'none'}")
    config = _defaults(name, runs[name], data)
    for key, value in (settings or {}).items():
        if key not in config or key in ("name", "data"):
            keys = ", ".join(k for k in config if k not in ("name", "data"))
            raise RunError(f"{name} has no setting {key!r}; there are: {keys}")
        config[key] = _parse(key, value, config[key])
    for key, least in {
        "steps": 1,
        "seed": 0,
        "threads": 1,
        "log_every": 1,
        "eval_every": 1,
    }.items():
        if config[key] < least:
            raise RunError(f"{key} must be at least {least}, got {config[key]}")
    return config


def _defaults(name, run, data):
    if data is None:
        data = next(iter(run.data), None)
    elif data not in run.data:
        raise RunError(f"{name} takes data: {', '.join(run.data) or 'none'}; got {data!r}")
    return {"name": name, "data": data, **COMMON, **run.defaults, **run.data.get(data, {})}


def _parse(key, value, default):
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        value = value if isinstance(default, str) and not isinstance(parsed, str) else parsed
    if type(default) is float and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        kind, like = type(default).__name__, json.dumps(default)
        raise RunError(f"{key} must be of type {kind}, like {like}; got {value!r}")
    try:
        json.dumps(value, allow_nan=False)  # as the record will be, elements of lists included
    except ValueError:
        raise RunError(f"{key} must be finite, got {value}") from None
    return value


def _key(config):
    """Return 16 hex digits over the config without `steps`, so that more steps continue a run."""
    same = {key: value for key, value in config.items() if key != "steps"}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def is_of(config, source):
    """Whether a record, or the meta of a checkpoint, is that of a config up to the steps."""
    return _key(source["config"]) == _key(config)


def record_name(run, config):
    """Return `<name>_<data>`, then `key=value` for each setting other than its default."""
    defaults = _defaults(config["name"], run, config["data"])
    changed = {k: v for k, v in sorted(config.items()) if k != "steps" and v != defaults[k]}
    parts = [f"{key}={value}" for key, value in changed.items()]
    base = "_".join(filter(None, (config["name"], config["data"])))
    if len("_".join(parts)) > 80 or not all(
        re.fullmatch(r"\w+=[\w.+-]*", p, re.ASCII) for p in parts
    ):
        parts = [_key(changed)]  # what does not fit into a file name
    return "_".join([base, *parts])


def chosen(size, n):
    """Return which n of `size` images to evaluate on: all in order, or a random choice.

    A test set may be sorted by digit; its first n images are not like the others.
    """
    return np.arange(size) if n >= size else np.random.default_rng(20091102).permutation(size)[:n]


def one_of(config, key, choices):
    """Return the setting `key`, which must be one of the choices."""
    if config[key] not in choices:
        raise RunError(f"{key} must be one of {', '.join(choices)}; got {config[key]!r}")
    return config[key]


def a_step_each(steps, cells):
    """Return the cells of a run that does one in each of its steps, which must be as many."""
    if steps != len(cells):
        raise RunError(f"a step is a cell, and there are {len(cells)}: --steps {len(cells)}")
    return cells


def with_error(name, values):
    """Mean and standard error of values of images (n,), as two scalars of a record."""
    values = np.asarray(values, np.float64)
    return {name: np.mean(values), f"{name}_se": np.std(values, ddof=1) / np.sqrt(len(values))}


# Running


def runs_folder():
    """Return the folder of checkpoints and logs: MINIGRAD_RUNS, or `runs/` in the project."""
    return Path(os.environ.get("MINIGRAD_RUNS") or ROOT / "runs")


def execute(run, config, out=RESULTS, checkpoint_seconds=30.0, mixed=False, progress=True):
    """Do the run that `config` describes, from its last checkpoint on, and return its record.

    Raises RunError, FloatingPointError (a NaN), OSError (a full disk); the last good checkpoint
    stays. `mixed` allows to go on from a checkpoint of other sources or library versions.
    """
    name = record_name(run, config)
    folder, target = runs_folder() / name, Path(out) / f"{name}.json"
    refuse_shorter(target, config)
    refuse_unwritable(Path(out))
    here = origin()
    with _only_one(folder), _threads(config["threads"]):
        rng = np.random.default_rng(np.random.SeedSequence([config["seed"], int(_key(config), 16)]))
        parts = Parts(*run.setup(config, _load(config["data"]), rng))
        start, meta, files = _resume(folder, parts.state, config, run.continues, here, mixed)
        origins = [old for old in meta.get("origins", []) if old != here] + [here]
        clock = _Clock(meta.get("seconds", 0.0))

        def due():
            return clock() - clock.last >= checkpoint_seconds

        with _log(folder, {"config": config, **here}, start.step if start else 0) as write:

            def on_point(snapshot, entry):
                if entry:
                    line = {"step": snapshot.step, "seconds": round(clock(), 3)}
                    write(line | entry | line)  # a metric must not take the place of the step
                if snapshot.step == config["steps"] or due():
                    meta = {"config": config, "origins": origins, "seconds": clock()}
                    save_snapshot(next(files), snapshot, **meta)
                    clock.last = clock()

            try:
                state, curves = fit(
                    parts.step,
                    parts.state,
                    config["steps"],
                    rng,
                    evaluate=parts.evaluate,
                    log_every=config["log_every"],
                    eval_every=config["eval_every"],
                    start=start,
                    on_point=on_point,
                    due=due,
                    progress=progress,
                )
            except FloatingPointError as error:
                good, _ = checkpoints(folder)
                kept = "the last good checkpoint stays in" if good else "no checkpoint yet in"
                raise FloatingPointError(f"{name} stopped: {error}; {kept} {folder}") from error
        scalars, arrays = _finish(parts, state, rng)
        record = {
            "name": name,
            "config": config,
            "seed": config["seed"],
            "threads": config["threads"],
            "versions": here["versions"],
            "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "source_hash": "+".join(dict.fromkeys(old["source_hash"] for old in origins)),
            "seconds": round(clock(), 3),
            "scalars": scalars,
            "curves": {
                key: {**curve, "values": [float(f"{v:.7g}") for v in curve["values"]]}
                for key, curve in curves.items()
            },
        }
        save_record(target, record, arrays)
    return record | {"arrays": arrays}


def refuse_shorter(target, config):
    """A record, committed perhaps, is not replaced by one of fewer steps."""
    if target.exists():
        with contextlib.suppress(DamagedFile):  # this run makes it anew
            if (steps := load_record(target)["config"]["steps"]) > config["steps"]:
                raise RunError(
                    f"{target} holds {steps} steps, and a run of {config['steps']} would replace "
                    "it; ask for at least as many, or write elsewhere with --out FOLDER"
                )


def refuse_unwritable(out):
    """Say so now, not after hours, when the record is there."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RunError(f"{there} is no folder to write to; give another one with --out FOLDER")


def _load(data):
    if data is None:
        return None
    try:
        return getattr(importlib.import_module("minigrad.data"), data)()
    except (ValueError, ImportError) as error:  # an altered file; no Pillow
        raise RunError(str(error)) from error


def _finish(parts, state, rng):
    scalars = parts.evaluate(state, side_rng(rng)) if parts.evaluate else {}
    more, arrays = parts.finish(state, side_rng(rng)) if parts.finish else ({}, {})
    scalars = {key: float(value) for key, value in (scalars | more).items()}
    if bad := [key for key, value in scalars.items() if not math.isfinite(value)]:
        raise FloatingPointError(
            f"after the last step: {', '.join(bad)} not finite; no record written"
        )
    return scalars, {key: np.asarray(value) for key, value in arrays.items()}


def origin():
    """Return what a result depends on beside its config: the sources' hash, library versions."""
    folders = (ROOT / name for name in ("minigrad", "chapters", "experiments"))
    return {"source_hash": source_hash(*folders), "versions": _versions()}


def _versions():
    found = {"python": platform.python_version()}
    for package in ("numpy", "scipy", "numba", "minigrad"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = getattr(sys.modules.get(package), "__version__", None)
    if os.environ.get("MINIGRAD_KERNELS") == "numpy":
        found["numba"] = None  # the kernels' NumPy twins run, whose last bits are others
    return found


class _Clock:
    """Seconds of work on a run, those of earlier sessions included."""

    def __init__(self, before):
        self.start = time.perf_counter() - before
        self.last = before

    def __call__(self):
        return time.perf_counter() - self.start


@contextlib.contextmanager
def _threads(number):
    """Limit BLAS, and with it the kernels, to `number` threads."""
    import scipy.linalg  # noqa: F401  (brings its own BLAS, which must be there to be limited)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=number):
        yield


@contextlib.contextmanager
def _only_one(folder):
    """Keep a second process from writing to the same checkpoints; a kill frees the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as file:
        with contextlib.suppress(ImportError):  # no fcntl on Windows: there it is up to the user
            import fcntl

            for _ in range(10):  # `is_running` holds it for a moment, a dying process a bit longer
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.1)
            else:
                raise RunError(f"{folder.name} is running in another process")
        for left in folder.glob(".*.part"):  # by a kill in the middle of a write
            left.unlink()
        yield


def is_running(folder):
    """Whether a process of this machine is at work on the run whose checkpoints are in `folder`."""
    with contextlib.suppress(ImportError, FileNotFoundError), open(folder / "lock", "rb") as file:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# Checkpoints and logs


def checkpoints(folder):
    """Return the intact ones as (step, path, meta), newest first, and messages on damaged ones."""
    good, damaged = [], []
    for path in (folder / "checkpoint-a.npz", folder / "checkpoint-b.npz"):
        try:
            meta = load_arrays(path)[1]
            good.append((meta["snapshot"]["step"], path, meta))
        except FileNotFoundError:
            continue
        except DamagedFile as error:
            damaged.append(str(error))
    return sorted(good, key=lambda found: -found[0]), damaged


def _resume(folder, like, config, continues, here, mixed):
    """Return the snapshot to go on from (or None), its meta, and the files to write to by turns."""
    good, damaged = checkpoints(folder)
    files = [folder / "checkpoint-a.npz", folder / "checkpoint-b.npz"]
    if not good:
        if damaged:
            raise RunError(f"{'; '.join(damaged)}; delete {folder} to begin this run anew")
        return None, {}, itertools.cycle(files)
    step, path, meta = good[0]
    for message in damaged:
        print(f"{message}; going on from {path.name} at step {step}", file=sys.stderr)
    if not is_of(config, meta):
        raise RunError(f"{folder} holds this run with other defaults; delete it to begin anew")
    if not continues and meta["config"]["steps"] != config["steps"]:
        raise RunError(
            f"{folder} holds this run with {meta['config']['steps']} steps, which decide more than "
            f"when it stops, so that one of {config['steps']} is no continuation; delete the "
            "folder to begin anew"
        )
    if step > config["steps"]:
        raise RunError(
            f"{folder} is at step {step} already, past {config['steps']}; ask for more steps, or "
            "set MINIGRAD_RUNS to another folder"
        )
    if meta["origins"][-1] != here and not mixed:
        raise RunError(
            f"{path} was written by {meta['origins'][-1]} and this is {here}, so the result "
            f"would be neither's; add --mixed to go on all the same, or delete {folder}"
        )
    try:
        snapshot, meta = load_snapshot(path, like)
    except ValueError as error:
        raise RunError(f"{error}; delete {folder} to begin this run anew") from error
    return snapshot, meta, itertools.cycle(sorted(files, key=lambda file: file == path))


@contextlib.contextmanager
def _log(folder, header, step):
    """Yield a function that appends a line to `log.jsonl`, cut back to what was there at `step`."""
    path = folder / "log.jsonl"
    lines = [json.dumps(header)]
    if step and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                if json.loads(line)["step"] <= step:
                    lines.append(line)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    with open(path, "ab", buffering=0) as file:

        def write(entry):
            content = f"{json.dumps(entry)}\n".encode()
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError as error:
                message = f"cannot write ({error.strerror})"
                raise OSError(error.errno, message, str(path)) from error

        yield write
