"""The published tables, re-run: each file holds a protocol, the runs it needs and its `TABLE`."""

from typing import NamedTuple


class Cell(NamedTuple):
    """One training, or one part of a training, in a table.

    `run`, `data` and `settings` (with `steps`) give its config. `values` maps what is shown to the
    name of a scalar of the record (a scalar of that name with `_se` behind it is its standard
    error), or else of a curve whose last value is meant; or to a function of the record that
    returns value and standard error. `published` maps what is shown to the number as printed by the
    source of the table. `notes` are keys of the table's notes.
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
    """A table: its cells, at most one in each place, and what must be said below it.

    `source` says where the published numbers stand and how far they were verified. `notes` maps a
    letter to its footnote. `curve` maps a label to the name of a curve of the records, in which
    {row} and {column} are filled in: for each row and label it is drawn, column by column.
    `protocol` is the docstring of the table's file, filled in when the table is looked up.
    """

    title: str
    source: str
    cells: list
    notes: dict
    curve: dict = {}  # noqa: RUF012  (never changed)
    protocol: str = ""
