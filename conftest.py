"""Fixtures for the chapters' tests and for those in `tests/`."""

import math

import pytest


@pytest.fixture
def record(request):
    """`record("what was measured", value, limit=None)`: a measured figure for the ledger of claims.

    `limit` is what the test compares `value` with; the fixture itself asserts nothing.
    """

    def record(name, value, limit=None):
        measured = {"name": name, "value": float(value)}
        if limit is not None:
            measured["limit"] = float(limit)
        if not all(math.isfinite(v) for k, v in measured.items() if k != "name"):
            raise ValueError(
                f"record({name!r}, {value}, limit={limit}): the ledger takes finite numbers"
            )
        request.node.user_properties.append(("measured", measured))

    return record
