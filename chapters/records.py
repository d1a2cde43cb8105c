"""Committed records of long runs (`experiments/results/`), for figures and tables."""

import contextlib
import difflib
from pathlib import Path

from minigrad.train import load_record

__all__ = ["load", "path", "watch"]

RESULTS = Path(__file__).parent.parent / "experiments" / "results"
_watchers = []


def path(name):
    """The JSON of the record `name`; the `.npz` beside it, if any, is sealed by a checksum in it.

    Raises FileNotFoundError, naming records with names like it, if there is no such record.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        there = sorted(file.stem for file in RESULTS.glob("*.json"))
        near = ", ".join(difflib.get_close_matches(name, there)) or "none"
        raise FileNotFoundError(
            f"no record {name!r} in experiments/results (names like it: {near}); "
            "`python -m experiments list` shows the runs that make records"
        )
    return file


def load(name):
    """The record `name` as a dict: config, seed, versions, seconds, curves, scalars, arrays.

    `arrays` maps names to NumPy arrays (empty where the run kept none). Call it inside the figure
    function, uncached: the driver notes which records a figure reads. Raises FileNotFoundError for
    an unknown name and `minigrad.train.DamagedFile`, naming the file, for one torn or altered.
    """
    record = load_record(path(name))
    for names in _watchers:
        names.add(name)
    return record


@contextlib.contextmanager
def watch():
    """Collect in a set the names of the records that are loaded inside the `with` block."""
    names = set()
    _watchers.append(names)
    try:
        yield names
    finally:
        _watchers.remove(names)
