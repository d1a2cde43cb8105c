"""The ledger of claims and the table of contents, on files made for the purpose."""

import re
from pathlib import Path

import pytest

import chapters.__main__ as book
from chapters import outline
from chapters.ledger import CLAIMS, SOURCES, claim

pytest_plugins = ["pytester"]

TESTS = """
import pytest
from chapters.ledger import claim

@claim("R1", "R2")
def test_one(record):
    record("largest |z|", 2.5, limit=4.5)
    record("draws", 1000)

@claim("R2")
def test_two():
    pass

@claim("X7", confirmed=False)
def test_three():
    pass

@claim("B1")
def test_four(record):
    record("error", 1.0)
    assert False

@claim("B2")
def test_five():
    pytest.skip("no data")

@pytest.fixture
def broken():
    raise RuntimeError

@claim("B3")
def test_six(broken):
    pass

def test_seven():
    assert False
"""


@pytest.fixture
def collected(pytester):
    """What the collector saw of TESTS, run with the project's own fixtures."""
    pytester.makeconftest((Path(__file__).parent.parent / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = claim")
    pytester.makepyfile(test_it=TESTS)
    collector = book.Collector()
    pytester.inline_run("-m", "claim", "--strict-markers", plugins=[collector])
    return collector.tests


def test_entries_say_how_each_claim_fared(collected):
    entries = {entry["id"]: entry for entry in book.entries(collected)}
    assert entries.keys() == CLAIMS.keys()
    verdicts = {id: e["verdict"] for id, e in entries.items() if e["verdict"] != "no test"}
    assert verdicts == {
        "B1": "fail",
        "B2": "skipped",
        "B3": "fail",
        "R1": "pass",
        "R2": "pass",
        "X7": "not confirmed",
    }
    largest, draws = entries["R2"]["measured"]
    assert largest == {
        "name": "largest |z|",
        "value": 2.5,
        "limit": 4.5,
        "test": "test_it.py::test_one",
    }
    assert draws["value"] == 1000 and "limit" not in draws
    assert entries["R2"]["tests"] == ["test_it.py::test_one", "test_it.py::test_two"]
    assert entries["B1"]["measured"][0]["value"] == 1.0  # what failed has been measured too

    text = book.report(entries.values())
    assert re.search(r"^R1 +ch04 +pass +S1.5, S3 +z = μ", text, re.M)
    assert "largest |z|: 2.5  (limit 4.5)" in text
    assert re.search(r"^Without a test: B4 ", text, re.M)
    assert "2 pass, 1 not confirmed, 2 fail, 1 skipped, 95 no test" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_record_refuses_what_is_not_finite(record, value):
    with pytest.raises(ValueError, match="finite"):
        record("nothing", value)


def test_an_unknown_claim_is_refused_at_once():
    with pytest.raises(ValueError, match="no claim 'R99'.*R"):
        claim("R1", "R99")
    with pytest.raises(ValueError, match="needs the id"):
        claim()


def test_the_table_of_claims_is_complete():
    assert len(CLAIMS) == 101
    for id, entry in CLAIMS.items():
        assert entry.keys() == {"source", "chapter", "claim", "evidence"}, id
        assert re.fullmatch(r"ch(0[1-9]|1[0-3])", entry["chapter"]), id
        named = set(re.findall(r"S\d|\+", entry["source"]))
        assert named and named <= set(SOURCES), id
        if id.startswith("E"):
            assert " → " in entry["claim"], f"{id}: an erratum reads `printed → what holds`"


HEAD = r"""# %% [markdown]
# # 4. Reparameterisation
#
# How does a gradient get through
# a random number?
#
# **Reads after:** 1, 3 · **Runs in:** 5 s · **Papers:** {cite}`kingma2014auto`,
# {cite}`rezende2014stochastic`
#
# ## Symbols
#
# | symbol | meaning | shape |
# |---|---|---|
# | $\theta$ | parameters | any |
# | $p(x \mid z)$ | likelihood of $\|x\|$ | () |
#
# ## The derivation

# %%
import numpy as np  # | not | a | row |
"""


def test_outline_reads_head_and_symbols(tmp_path):
    path = tmp_path / "ch04_reparameterisation.py"
    path.write_text(HEAD)
    chapter = outline.read(path)
    assert chapter.number == 4 and chapter.title == "Reparameterisation"
    assert chapter.question == "How does a gradient get through a random number?"
    assert chapter.reads_after == (1, 3) and chapter.runs_in == "5 s"
    assert chapter.papers == "{cite}`kingma2014auto`, {cite}`rezende2014stochastic`"
    assert [symbol.shape for symbol in chapter.symbols] == ["any", "()"]
    assert chapter.symbols[1].symbol == r"$p(x \mid z)$"
    kinds = [(kind, line) for kind, line, _ in outline.cells(HEAD)]
    assert kinds == [("markdown", 2), ("code", 20)]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("# # 4. Rep", "# # Rep", "the first cell must begin"),
        ("4. Rep", "5. Rep", "number is not that of its title"),
        ("**Runs in:** 5 s · ", "", "lacks .'Runs in'"),
        ("## Symbols", "## Glossary", "no `## Symbols` section"),
        (r"\mid", "|", "has not three cells"),
    ],
)
def test_outline_says_what_a_head_lacks(tmp_path, old, new, message):
    path = tmp_path / "ch04_reparameterisation.py"
    path.write_text(HEAD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        outline.read(path)


def test_contents_lists_in_reading_order(tmp_path, monkeypatch):
    (tmp_path / "ch04_b.py").write_text(HEAD)
    (tmp_path / "ch02_a.py").write_text(HEAD.replace("4. Rep", "2. Before rep"))
    monkeypatch.setattr(outline, "HERE", tmp_path)
    first, _, second, _ = book.contents().splitlines()
    assert first == " 2  Before reparameterisation  (5 s; after 1, 3)"
    assert second.startswith(" 4  Reparameterisation")


ROWS = "# | $\\theta$ | parameters | any |\n# | $p(x \\mid z)$ | likelihood of $\\|x\\|$ | () |\n"


@pytest.mark.parametrize("old, new", [("| symbol |", "| sign |"), (ROWS, "")])
def test_outline_refuses_a_table_without_its_header_or_rows(tmp_path, old, new):
    assert old in HEAD
    path = tmp_path / "ch04_reparameterisation.py"
    path.write_text(HEAD.replace(old, new))
    with pytest.raises(ValueError, match="no `## Symbols` section with a table"):
        outline.read(path)


def test_outline_refuses_a_head_without_a_question(tmp_path):
    path = tmp_path / "ch04_reparameterisation.py"
    question = "# How does a gradient get through\n# a random number?\n#\n"
    assert question in HEAD
    path.write_text(HEAD.replace(question, ""))
    with pytest.raises(ValueError, match="question"):
        outline.read(path)
