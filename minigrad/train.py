r"""The training loop, and the files that let a run be killed at any moment and go on bit for bit.

Quick training in memory takes three lines:

    optimizer = adam(1e-3)
    state = {"params": params, "optimizer": optimizer.init(params)}
    state, curves = fit(descent(loss, optimizer), state, 1000, rng)

A step is a function `step(state, rng) -> (state, metrics)`: `state` is a container of arrays, all
that training carries from step to step (an epoch's permutation, too); `metrics` is a dict of
scalars. A step draws from `rng` alone and leaves its argument as it was. Then a `Snapshot` is all
that a run needs in order to go on as if it had never stopped.
"""

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minigrad import tree
from minigrad.core import nan_check
from minigrad.transforms import value_and_grad

__all__ = [
    "DamagedFile",
    "Snapshot",
    "descent",
    "fit",
    "load_arrays",
    "load_record",
    "load_snapshot",
    "save_arrays",
    "save_record",
    "save_snapshot",
    "side_rng",
    "write_atomic",
]


class Snapshot(NamedTuple):
    """A run after `step` steps; `sums`: total and number of metrics since a curve's last point."""

    step: int
    state: object
    rng: dict
    sums: dict
    curves: dict


def descent(loss, optimizer, has_aux=False):
    """Return the step for `fit` that follows the gradient of `loss(params, rng)` downwards.

    The state is `{"params": params, "optimizer": optimizer.init(params)}`. The metrics are the
    value under "loss" and, with `has_aux`, what `loss` returns beside it: a dict of scalars.
    """
    gradient = value_and_grad(loss, has_aux=has_aux)

    def step(state, rng):
        value, grads = gradient(state["params"], rng)
        value, metrics = value if has_aux else (value, {})
        if "loss" in metrics:
            raise ValueError('"loss" is the name of the loss itself; rename that metric')
        params, inner = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": params, "optimizer": inner}, {"loss": value, **metrics}

    return step


def fit(
    step,
    state,
    steps,
    rng,
    *,
    evaluate=None,
    log_every=100,
    eval_every=1000,
    start=None,
    on_point=None,
    due=None,
    progress=True,
):
    """Take `steps` steps and return the final state and the curves.

    `curves` maps a name to `{"steps": [...], "values": [...]}`: the mean of each metric over those
    of every `log_every` steps that return it, and every `eval_every` steps the scalars of
    `evaluate(state, rng)`, which gets a generator of its own, so that evaluating more or less often
    changes nothing else.
    `start` is a `Snapshot` to go on from. `on_point(snapshot, entry)` is called with the new values
    at each of these points, and with an empty entry after the last step, or one after which `due()`
    is true, if it is none of them. The bar is drawn on a terminal only.

    A metric, an evaluation or a state that is not finite stops the run with a FloatingPointError
    that names the step and the operation which made the first NaN; `on_point` never sees it.
    """
    _check_arguments(rng, steps, log_every, eval_every)
    done, sums, curves = 0, {}, {}
    if start is not None:
        done, state, rng.bit_generator.state, sums, curves = copy.deepcopy(tuple(start))
    if done > steps:
        raise ValueError(f"this run has taken {done} steps already; {steps} lie behind it")
    state = _settle(state)
    if bad := _state_not_finite(state):
        raise FloatingPointError(f"before the first step: {bad}")
    good = done, state, rng.bit_generator.state
    with _bar(steps, done, progress) as bar:
        while done < steps:
            state, metrics = _take(step, state, rng)
            done += 1
            point = done % log_every == 0
            evaluation = evaluate is not None and done % eval_every == 0
            wanted = done == steps or (due is not None and due())
            checked = point or evaluation or wanted
            if bad := _not_finite(metrics) or (checked and _state_not_finite(state)):
                _stop(step, rng, good, done, bad)
            if checked:
                good = done, state, rng.bit_generator.state
            for name, value in metrics.items():
                total, n = sums.get(name, (0.0, 0))
                sums[name] = total + value, n + 1
            entry = {}
            if point:
                entry, sums = {name: total / n for name, (total, n) in sums.items()}, {}
            if evaluation:
                entry = _join(entry, _evaluate(evaluate, state, rng, done))
            for name, value in entry.items():
                curve = curves.setdefault(name, {"steps": [], "values": []})
                curve["steps"].append(done)
                curve["values"].append(value)
            if on_point is not None and (entry or wanted):
                snapshot = Snapshot(done, state, rng.bit_generator.state, sums, curves)
                # The curves grow on: who keeps a snapshot keeps a copy.
                on_point(snapshot._replace(sums=dict(sums), curves=copy.deepcopy(curves)), entry)
            if bar is not None:
                bar.update()
                if entry:
                    bar.set_postfix({k: f"{v:.5g}" for k, v in entry.items()}, refresh=False)
    return state, curves


def side_rng(rng):
    """Return a generator that depends on where `rng` stands, and leave `rng` where it stands."""
    return np.random.default_rng(copy.deepcopy(rng).integers(2**63, size=4))


def _check_arguments(rng, steps, log_every, eval_every):
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"fit needs a numpy.random.Generator, as default_rng(0) makes, got {rng!r}")
    for name, value, least in (
        ("steps", steps, 0),
        ("log_every", log_every, 1),
        ("eval_every", eval_every, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _settle(state):
    # What is read back from a file has its dicts in sorted order and its arrays in C order. Sums
    # over either, BLAS's too, may come out different in the last bit, so both are always so.
    return tree.map(
        lambda leaf: np.asarray(leaf, order="C") if isinstance(leaf, np.ndarray) else leaf, state
    )


def _take(step, state, rng):
    result = step(state, rng)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise TypeError(
            "a step must return (state, metrics), metrics being a dict of scalars such as "
            f'{{"loss": value}}; got a {type(result).__name__}'
        )
    return _settle(result[0]), _scalars(result[1])


def _scalars(metrics):
    for name, value in metrics.items():
        if np.ndim(value):
            raise TypeError(f"metric {name!r} must be a scalar, got an array {np.shape(value)}")
    return {name: float(value) for name, value in metrics.items()}


def _join(metrics, more):
    if twice := metrics.keys() & more.keys():
        raise ValueError(f"step and evaluate both return {sorted(twice)}; rename one of the two")
    return metrics | more


def _not_finite(metrics):
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    return ", ".join(bad)


def _state_not_finite(state):
    for path, leaf in zip(tree.paths(state), tree.leaves(state)):
        if not np.all(np.isfinite(leaf)):
            return f"{path} of the state is not finite"
    return ""


def _evaluate(evaluate, state, rng, done):
    metrics = _scalars(evaluate(state, side_rng(rng)))
    if bad := _not_finite(metrics):
        found = _first_nan(evaluate, state, side_rng(rng))
        raise FloatingPointError(f"evaluation after step {done}: {bad}{found}")
    return metrics


def _stop(step, rng, good, done, bad):
    # A NaN often enters the state before the metrics show it. A step depends on state and
    # generator alone, so the first bad one is found by going again from where all was well.
    number, state, rng.bit_generator.state = good
    while number < done:
        before, generator = state, rng.bit_generator.state
        state, metrics = _take(step, state, rng)
        number += 1
        if bad_now := _not_finite(metrics) or _state_not_finite(state):
            rng.bit_generator.state = generator
            found = _first_nan(step, before, rng)
            raise FloatingPointError(f"step {number}: {bad_now}{found}")
    raise FloatingPointError(
        f"step {done}: {bad}, but not when run again: the step depends on more than state and rng"
    )


def _first_nan(function, *arguments):
    try:
        with nan_check():
            function(*arguments)
    except FloatingPointError as error:
        return f"; {error}"
    return "; no traced operation makes a NaN there: look for an overflow, or at plain NumPy code"


@contextlib.contextmanager
def _bar(steps, done, progress):
    if not progress:
        yield None
        return
    from tqdm import tqdm  # 0.1 s, so only when asked for

    with tqdm(total=steps, initial=done, disable=None) as bar:
        yield bar


# Files. What is written replaces its predecessor in one move, or not at all.


class DamagedFile(ValueError):
    """A file whose content does not match its checksum, or is not what its name says."""


def write_atomic(path, content):
    """Write bytes so that at any moment the file is wholly old or wholly new, then durable.

    Raises an OSError that names the file (a full disk, say); the old content is then untouched.
    """
    path = Path(path)
    # Two writers at once, of a data set's cache say, must not share it.
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the new name must be on the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:  # Ctrl-C, too, leaves nothing behind
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"cannot write ({error.strerror})", str(path)) from error


def save_arrays(path, arrays, meta=None, compress=False):
    """Write a dict of arrays, and JSON-able `meta`, as an `.npz`; return its checksum.

    The bytes depend on the content alone. The checksum (SHA-256) is the archive's comment.
    """
    members = {} if meta is None else {"meta.json": json.dumps(meta).encode()}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    archive_bytes = io.BytesIO()
    with zipfile.ZipFile(archive_bytes, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)  # dated 1980, not now
            info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            archive.writestr(info, content)
        archive.comment = _digest(members).encode()
    write_atomic(path, archive_bytes.getvalue())
    return _digest(members)


def load_arrays(path):
    """Return the arrays and the `meta` of a file by `save_arrays`; raises DamagedFile."""
    members, _ = _read_members(path)
    meta = json.loads(members.pop("meta.json", b"null"))
    return _arrays(members), meta


def _arrays(members):
    return {
        name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        for name, data in members.items()
    }


def _digest(members):
    digest = hashlib.sha256()
    for name, content in members.items():
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _read_members(path):
    content = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
            expected = archive.comment.decode()
    except Exception as error:  # a torn archive raises any of half a dozen types
        raise DamagedFile(f"{path} is damaged ({error})") from error
    if _digest(members) != expected:
        raise DamagedFile(f"{path} is damaged (its content does not match its checksum)")
    return members, expected


_SCALARS = {"bool": bool, "int": int, "float": float}


def save_snapshot(path, snapshot, **meta):
    """Write a `Snapshot`, with JSON-able `meta` beside it."""
    leaves, kinds = {}, []
    for name, leaf in zip(tree.paths(snapshot.state), tree.leaves(snapshot.state)):
        kind = "array" if isinstance(leaf, np.ndarray) else "scalar"
        if not isinstance(leaf, np.ndarray | np.generic):
            kind = type(leaf).__name__
            if kind not in _SCALARS:
                raise TypeError(f"{name} of the state must be an array or a number, got a {kind}")
        leaves[name] = leaf
        kinds.append(kind)
    if len(leaves) != len(kinds):
        raise ValueError("two leaves of the state have the same path; keep '/' out of its keys")
    rest = snapshot._replace(state=None)._asdict()
    # The states of some bit generators hold arrays; they take lists as well.
    rest = json.loads(json.dumps(rest, default=np.ndarray.tolist))
    save_arrays(path, leaves, {"snapshot": rest, "kinds": kinds, **meta})


def load_snapshot(path, like):
    """Return (snapshot, meta); `like` is a state with the structure that the file must have.

    Raises DamagedFile, or ValueError where the leaves have other names than those of `like`.
    """
    arrays, meta = load_arrays(path)
    expected, treedef = tree.paths(like), tree.flatten(like)[1]
    if list(arrays) != expected:
        odd = sorted(arrays.keys() ^ set(expected)) or ["their order"]
        raise ValueError(f"{path} holds another model: it differs from this run's in {odd}")
    leaves = [
        array if kind == "array" else array[()] if kind == "scalar" else _SCALARS[kind](array)
        for array, kind in zip(arrays.values(), meta.pop("kinds"))
    ]
    rest = meta.pop("snapshot")
    return Snapshot(**rest)._replace(state=tree.unflatten(treedef, leaves)), meta


def save_record(path, record, arrays):
    """Write the JSON-able dict `record` to `path` (`.json`) and `arrays` to the `.npz` beside it.

    The JSON comes last and holds the checksums of both, so a pair that does not match is noticed.
    """
    path = Path(path)
    beside = path.with_suffix(".npz")
    # As it will be read, its keys strings; what JSON cannot hold is refused before all else.
    record = json.loads(json.dumps(dict(record, arrays_sha256=None), allow_nan=False))
    if arrays:
        record["arrays_sha256"] = save_arrays(beside, arrays, compress=True)
    record["sha256"] = _record_digest(record)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    if not arrays:
        beside.unlink(missing_ok=True)


def load_record(path):
    """Return the dict of a record, its arrays under "arrays"; raises DamagedFile."""
    path = Path(path)
    try:
        record = json.loads(path.read_bytes())
        intact = record.pop("sha256") == _record_digest(record)
        expected = record.pop("arrays_sha256")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedFile(f"{path} is damaged ({error})") from error
    if not intact:
        raise DamagedFile(f"{path} is damaged (its content does not match its checksum)")
    if expected is None:
        return record | {"arrays": {}}
    beside = path.with_suffix(".npz")
    if not beside.exists():
        raise DamagedFile(f"{beside} is missing; {path.name} needs it")
    members, found = _read_members(beside)
    if found != expected:
        raise DamagedFile(f"{beside} does not belong to {path.name}: they are of different runs")
    return record | {"arrays": _arrays(members)}


def _record_digest(record):
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()
