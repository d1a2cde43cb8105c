"""The ledger of claims: `@claim("R1")` marks the test that settles a claim of `claims.toml`."""

import difflib
import tomllib
from pathlib import Path

import pytest

__all__ = ["CLAIMS", "SOURCES", "claim"]

CLAIMS = tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))
SOURCES = CLAIMS.pop("sources")


def claim(*ids, confirmed=True):
    """Mark a test as settling the claims `ids`; an id that is not in `claims.toml` is a ValueError.

    With `confirmed=False` the test shows that the statement does *not* hold as its source makes it
    (the counter-example passes), and the ledger says "not confirmed".
    """
    if not ids:
        raise ValueError('claim needs the id of a claim: @claim("R1")')
    for id in ids:
        if id not in CLAIMS:
            near = ", ".join(difflib.get_close_matches(str(id), CLAIMS, cutoff=0.4)) or "none near"
            raise ValueError(
                f"there is no claim {id!r} in chapters/claims.toml; ids like it: {near}"
            )
    return pytest.mark.claim(*ids, confirmed=confirmed)
