"""The published tables, re-run: each file holds a protocol, the runs it needs and its `TABLE`."""

from typing import NamedTuple


class Cell(NamedTuple):
    """One training, or one part of a training, in a table.

    `run`, `data` and `settings` (with `steps`) give its config. `values` maps what is shown to the
    name of a scalar of the record; a scalar of that name with `_se` behind it is its standard
    error. `published` maps what is shown to the number as printed by the source of the table.
    `notes` are keys of the table's notes.
    """

    row: str
    column: str
    run: str
    data: str | None
    settings: dict
    values: dict
    published: dict = {}  # noqa: RUF012  (never changed)
    notes: str = ""


class Table(NamedTuple):
    """A table: its cells, one in each place, and what must be said below it.

    `source` says where the published numbers stand and how far they were verified. `notes` maps a
    letter to its footnote. `curve` names, with {column} and {row} to be filled in or not, the curve
    of a record that is drawn.
    """

    title: str
    source: str
    cells: list
    notes: dict
    curve: dict = {}  # noqa: RUF012  (never changed)
