r"""What a chapter says of itself, read from its file without importing it.

A chapter is a jupytext percent file: cells begin with `# %% [markdown]` (prose, as comments) or
`# %%` (code). Its first cell is its head, and a later one, or the same, holds its symbols:

    # %% [markdown]
    # # 4. Reparameterisation
    #
    # The question that the chapter answers, in a paragraph.
    #
    # **Reads after:** 1, 3 · **Runs in:** 5 s · **Papers:** {cite}`kingma2014auto`
    #
    # ## Symbols
    #
    # | symbol | meaning | shape |
    # |---|---|---|
    # | $\theta$ | parameters of the generative model | any |

A bar inside a formula of a table is written `\mid` or `\|`.
"""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Chapter", "Symbol", "cells", "chapters", "read"]

HERE = Path(__file__).parent


class Symbol(NamedTuple):
    """One row of a table of symbols."""

    symbol: str
    meaning: str
    shape: str


class Chapter(NamedTuple):
    """The head of a chapter; `reads_after` are numbers of chapters, `runs_in` is as printed."""

    path: Path
    number: int
    title: str
    question: str
    reads_after: tuple
    runs_in: str
    papers: str
    symbols: tuple


def chapters():
    """Return the `Chapter`s there are, in reading order, which is that of their numbers."""
    return sorted((read(path) for path in HERE.glob("ch*.py")), key=lambda c: c.number)


def cells(text):
    """Split a percent file into (kind, first line number, text) with kind "markdown" or "code".

    Markdown cells lose their comment signs. What stands before the first cell is left out.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", number + 1, []))
        elif found:
            kind, _, lines = found[-1]
            lines.append(re.sub(r"^# ?", "", line) if kind == "markdown" else line)
    return [(kind, number, "\n".join(lines)) for kind, number, lines in found]


def read(path):
    """Read the head and the symbols of a chapter; raises ValueError for what is missing."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    prose = [text for kind, _, text in cells(text) if kind == "markdown"]
    head = [" ".join(block.split()) for block in prose[0].split("\n\n")] if prose else []
    title = re.fullmatch(r"# (\d+)\. (.+)", head[0]) if head else None
    if title is None:
        raise ValueError(
            f"{path.name}: the first cell must begin with `# # 4. Title of the chapter`"
        )
    number = re.match(r"ch(\d+)_", path.name)
    if number is None or int(number[1]) != int(title[1]):
        raise ValueError(f"{path.name}: the file's number is not that of its title, {title[1]}")
    if len(head) < 2 or head[1].startswith("**Reads after:**"):
        raise ValueError(f"{path.name}: the title is followed by a paragraph with the question")
    facts = next((block for block in head if block.startswith("**Reads after:**")), "")
    facts = dict(re.findall(r"\*\*([^*]+):\*\* *(.*?) *(?=·? *\*\*|$)", facts))
    if missing := {"Reads after", "Runs in", "Papers"} - facts.keys():
        raise ValueError(
            f"{path.name}: its head lacks {sorted(missing)}; after the question comes the line "
            "`# **Reads after:** 1 · **Runs in:** 5 s · **Papers:** ...`"
        )
    return Chapter(
        path,
        int(title[1]),
        title[2],
        head[1],
        tuple(map(int, re.findall(r"\d+", facts["Reads after"]))),
        facts["Runs in"],
        facts["Papers"],
        _symbols("\n".join(prose), path.name),
    )


def _symbols(prose, name):
    section = re.search(r"^## Symbols$(.*?)(?=^#|\Z)", prose, re.M | re.S)
    table = re.findall(r"^\|(.*)\|$", section[1], re.M) if section else []
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in table]
    if len(rows) < 3 or rows[0] != ["symbol", "meaning", "shape"]:
        raise ValueError(
            f"{name}: there is no `## Symbols` section with a table `| symbol | meaning | shape |`"
        )
    if odd := next((row for row in rows[2:] if len(row) != 3), None):
        raise ValueError(f"{name}: this row of its symbols has not three cells: {' | '.join(odd)}")
    return tuple(Symbol(*row) for row in rows[2:])
