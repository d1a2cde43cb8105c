"""List the book in reading order; with `claims`, test the claims and print their ledger."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

from chapters import ledger, outline
from minigrad.source import source_hash

ROOT = Path(__file__).parent.parent
VERDICTS = "pass", "not confirmed", "fail", "skipped", "no test"


def contents():
    """Return the table of contents: number, title, time, what it reads after, question."""
    lines = []
    for chapter in outline.chapters():
        after = ", ".join(map(str, chapter.reads_after)) or "nothing"
        lines.append(f"{chapter.number:2}  {chapter.title}  ({chapter.runs_in}; after {after})")
        lines.append(textwrap.fill(chapter.question, _width(), **_hanging(4)))
    return "\n".join(lines)


class Collector:
    """A pytest plugin: which test settles which claims, how it ended, what it measured."""

    def __init__(self):
        """Begin with no tests."""
        self.tests = {}

    def pytest_collection_modifyitems(self, items):
        """Note the claims of each test."""
        for item in items:
            marks = list(item.iter_markers("claim"))
            claims = {id: mark.kwargs.get("confirmed", True) for mark in marks for id in mark.args}
            self.tests[item.nodeid] = {"claims": claims, "outcome": "error", "measured": []}

    def pytest_runtest_logreport(self, report):
        """Note how the test ended; a failure in setup or teardown is a failure."""
        test = self.tests[report.nodeid]
        if report.when == "call" or report.outcome != "passed":
            test["outcome"] = report.outcome
        if report.when == "call":
            test["measured"] = [v for k, v in report.user_properties if k == "measured"]


def entries(tests):
    """Join the table of claims with what `tests` (of a `Collector`) showed: one dict per claim."""
    ledger_entries = []
    for id, claim in ledger.CLAIMS.items():
        mine = {node: test for node, test in tests.items() if id in test["claims"]}
        measured = [dict(m, test=node) for node, test in mine.items() for m in test["measured"]]
        entry = {"id": id, **claim, "verdict": _verdict(id, mine.values())}
        ledger_entries.append(entry | {"tests": list(mine), "measured": measured})
    return ledger_entries


def _verdict(id, tests):
    outcomes = {test["outcome"] for test in tests}
    if not outcomes:
        return "no test"
    if not outcomes <= {"passed", "skipped"}:
        return "fail"
    if "skipped" in outcomes:
        return "skipped"
    return "pass" if all(test["claims"][id] for test in tests) else "not confirmed"


def run_claims():
    """Run the tests marked `@claim` and return the ledger, a list of dicts.

    It is kept in `build/ledger.json` and read from there until a source, a record or the table of
    claims changes.
    """
    kept = ROOT / "build" / "ledger.json"
    results = sorted((ROOT / "experiments" / "results").glob("*.*"))
    table = ROOT / "chapters" / "claims.toml"
    folders = [ROOT / name for name in ("minigrad", "chapters", "experiments", "tests")]
    data = os.environ.get("MINIGRAD_DATA")  # without it some tests skip
    versions = [version(package) for package in ("numpy", "scipy", "numba")]
    key = [source_hash(*folders, table, ROOT / "conftest.py", *results), data, versions]
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["key"] == key:
            return before["claims"]
    files = [
        path
        for path in [*ROOT.glob("chapters/ch*.py"), *ROOT.glob("tests/test_*.py")]
        if "@claim(" in path.read_text(encoding="utf-8")
    ]
    collector = Collector()
    if files:
        options = [
            "-q",
            "-m",
            "claim",
            "--tb=short",
            f"--rootdir={ROOT}",
            f"-c={ROOT / 'setup.cfg'}",
        ]
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the ledger
            code = pytest.main([*options, *map(str, sorted(files))], plugins=[collector])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise SystemExit("the tests of the claims did not run to their end; see above")
    claims = entries(collector.tests)
    if not any(claim["verdict"] == "fail" for claim in claims):  # a failure is to be seen again
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"key": key, "claims": claims}), encoding="utf-8")
    return claims


def report(claims):
    """Return the ledger as text: a line per claim with a test, its figures below, then the rest."""
    lines = []
    for claim in claims:
        if claim["verdict"] != "no test":
            head = f"{claim['id']:4}{claim['chapter']:6}{claim['verdict']:15}{claim['source']:15}"
            statement = textwrap.shorten(
                claim["claim"], max(20, _width() - len(head)), placeholder=" …"
            )
            lines.append(head + statement)
            lines += [f"{'':10}{_figure(measured)}" for measured in claim["measured"]]
    counts = {v: sum(claim["verdict"] == v for claim in claims) for v in VERDICTS}
    lines.append(", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n))
    without = [claim["id"] for claim in claims if claim["verdict"] == "no test"]
    if without:
        lines.append(textwrap.fill("Without a test: " + " ".join(without), _width(), **_hanging(0)))
    return "\n".join(lines)


def _figure(measured):
    limit = f"  (limit {measured['limit']:.4g})" if "limit" in measured else ""
    return f"{measured['name']}: {measured['value']:.4g}{limit}"


def _width():
    return shutil.get_terminal_size((100, 24)).columns


def _hanging(indent):
    return {"initial_indent": " " * indent, "subsequent_indent": " " * 4}


def main(argv=None):
    """Parse the command line and return the exit code: 1 where a claim fails."""
    parser = argparse.ArgumentParser(prog="python -m chapters", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    claims = commands.add_parser("claims", help="run the tests of the claims and print the ledger")
    claims.add_argument("--json", metavar="FILE", help="write the whole ledger there as well")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        print(contents())
        return 0
    ledger_entries = run_claims()
    if arguments.json:
        text = json.dumps(ledger_entries, indent=1, ensure_ascii=False)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    print(report(ledger_entries))
    return int(any(entry["verdict"] == "fail" for entry in ledger_entries))


if __name__ == "__main__":
    sys.exit(main())
