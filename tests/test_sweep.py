"""Tables of runs: a sweep does what is missing, bit for bit, and the table says what is there.

As a script this file is the command line over the tables below, so that a sweep can be killed.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import figures.__main__ as driver
from chapters import records
from experiments import runner, status, sweep
from experiments.__main__ import main
from experiments.tables import Cell, Table, plots
from figures import find
from minigrad import value_and_grad
from minigrad.train import load_record, save_record

ROOT = Path(__file__).resolve().parent.parent


def setup_drift(config, _, rng):
    """A walk downhill, with a matrix product a step."""
    matrix = rng.standard_normal((8, 8))

    def step(state, rng):
        x = state["x"] - config["rate"] * np.tanh(matrix @ state["x"] + rng.standard_normal(8))
        return {"x": x}, {"loss": np.sum(np.square(x))}

    def finish(state, rng):
        return {"height": state["x"][0], "height_se": 0.25}, {"x": state["x"] + rng.random(8)}

    return runner.Parts({"x": rng.standard_normal(8)}, step, finish=finish)


def setup_troubled(config, _, rng):
    """What a run may do wrong in step 7."""

    def step(state, _):
        number = state["n"] + 1
        if number == 7 and config["trouble"] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 7 and config["trouble"] == "is broken":
            raise IndexError("seven is too many")
        with np.errstate(all="ignore"):
            value, _ = value_and_grad(lambda x: np.log(x))(6.5 - state["n"])
        return {"n": number}, {"loss": value}

    return runner.Parts({"n": 0.0 * rng.random()}, step)


RUNS = {
    "drift": runner.Run(setup_drift, {"steps": 40, "rate": 0.1, "log_every": 5}),
    "troubled": runner.Run(setup_troubled, {"steps": 20, "trouble": "none", "log_every": 2}),
}


def cell(row, column, settings, published=(), run="drift", notes=""):
    values = {"height": "height", "last loss": "loss"} if run == "drift" else {"loss": "loss"}
    return Cell(row, column, run, None, settings, values, dict(published), notes)


SOURCE, NOTES = "Published nowhere.", {"a": "Slow.", "b": "All of a row."}
TABLES = {
    "drifts": Table(
        "Drifts",
        SOURCE,
        [
            cell("first", "slow", {}, {"height": "-1.0"}, notes="ab"),
            cell("first", "fast", {"rate": 0.5}, notes="b"),
            cell("second", "slow", {}),
            cell("second", "faster", {"rate": 1.0, "steps": 30}, {"last loss": "7"}),
        ],
        NOTES,
        {"loss": "loss"},
        "Drifts.\n\nThe protocol.\n",
    ),
    "troubles": Table(
        "Troubles",
        SOURCE,
        [
            cell("nan", "", {"trouble": "nan"}, run="troubled"),
            cell("death", "", {"trouble": "dies"}, run="troubled"),
            cell("error", "", {"trouble": "is broken"}, run="troubled"),
            cell("none", "", {}),
        ],
        {},
    ),
    "long": Table(
        "Long",
        SOURCE,
        [
            cell(str(rate), "", {"rate": rate, "steps": 1500, "log_every": 10})
            for rate in (0.1, 0.2)
        ],
        {},
    ),
}
ROWS = {"a": 0.1, "a, wide": 0.2, "b": 0.3}
DRIFTS = ["drift", "drift_rate=0.5", "drift_rate=1.0"]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "runs"))


def command(tmp_path, what, table, *options, out="out"):
    # --mixed: an edit of the sources while the tests run is not what they are about
    mixed = ["--mixed"] if what == "sweep" else []
    return main([what, table, "--out", str(tmp_path / out), *mixed, *options], RUNS, TABLES)


def results(folder):
    """Return all that records hold, but for times and the hash of the sources."""
    found = {}
    for path in folder.glob("*.json"):
        record = load_record(path)
        del record["seconds"], record["source_hash"]
        arrays = {key: (a.dtype.str, a.tobytes()) for key, a in record.pop("arrays").items()}
        found[path.stem] = record, arrays
    return found


def alone(tmp_path, monkeypatch, table):
    """Return what the runs of a table give in this process, one after the other."""
    with monkeypatch.context() as patch:
        patch.setenv("MINIGRAD_RUNS", str(tmp_path / "runs_alone"))
        for config in sweep.configs(TABLES[table], RUNS).values():
            out = tmp_path / f"alone_{table}"
            runner.execute(RUNS[config["name"]], config, out, mixed=True, progress=False)
    return results(out)


def test_a_sweep_does_each_run_once_and_a_repeated_one_nothing(tmp_path, monkeypatch, capsys):
    before = dict(os.environ)
    assert command(tmp_path, "sweep", "drifts", "--jobs", "2") == 0
    assert "0 of 3 runs done" in capsys.readouterr().out
    assert os.environ == before
    found = results(tmp_path / "out")
    assert sorted(found) == DRIFTS
    assert found == alone(tmp_path, monkeypatch, "drifts")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert command(tmp_path, "sweep", "drifts") == 0
    assert capsys.readouterr().out == "3 of 3 runs done\n"
    assert command(tmp_path, "sweep", "drifts", "--steps", "20") == 0  # there are more already
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times

    # a torn record is made anew, and more steps go on from the checkpoint
    torn = tmp_path / "out" / "drift.json"
    torn.write_bytes(torn.read_bytes()[:-9])
    options = ["--only", "first/slow", "--steps", "45"]
    assert command(tmp_path, "sweep", "drifts", *options) == 0
    assert "0 of 1 runs done\n[1/1] drift: 45 steps" in capsys.readouterr().out
    log = (tmp_path / "runs" / "drift" / "log.jsonl").read_text()
    assert (
        log.count('"step"') == 9 and results(tmp_path / "out")["drift"][0]["config"]["steps"] == 45
    )


def test_runs_that_fail_are_reported_and_the_others_done(tmp_path, capsys):
    assert command(tmp_path, "sweep", "troubles", "--jobs", "2", "--checkpoint-seconds", "0") == 1
    out, error = capsys.readouterr()
    assert "0 of 4 runs done" in out and [*results(tmp_path / "out")] == ["drift"]
    assert re.search(r"trouble=nan: FAILED: .* step 8: loss is nan; .*first NaN in .*log", out)
    assert "trouble=dies: FAILED: the process ended with code -9" in out
    assert "Traceback" in out and "IndexError: seven is too many" in out
    assert "3 of 4 runs failed: " in error and "drift" not in error
    good, _ = runner.checkpoints(tmp_path / "runs" / "troubled_trouble=nan")
    assert good[0][0] == 7


def test_a_killed_sweep_goes_on_bit_for_bit(tmp_path, monkeypatch):
    arguments = ["sweep", "long", "--mixed", "--checkpoint-seconds", "0.01", "--jobs", "2"]
    arguments = [sys.executable, __file__, *arguments, "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    folders = [tmp_path / "runs" / f"drift_log_every=10_rate={rate}" for rate in (0.1, 0.2)]
    steps, log = [], folders[1] / "log.jsonl"
    for lines, kill in ((30, signal.SIGKILL), (80, signal.SIGINT)):  # of 150
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)
        while process.poll() is None and not (
            log.exists() and log.read_bytes().count(b"\n") > lines
        ):
            time.sleep(0.002)
        process.send_signal(kill)
        error = process.communicate()[1].decode()
        assert process.returncode in (-kill, 130), error
        while any(map(runner.is_running, folders)):  # an orphan ends by itself
            time.sleep(0.01)
        steps.append(runner.checkpoints(folders[1])[0][0][0])
    assert "interrupted; the same command goes on" in error and "Traceback" not in error
    assert 0 < steps[0] < steps[1] < 1500
    assert subprocess.run(arguments, env=environment, check=False).returncode == 0
    assert results(tmp_path / "out") == alone(tmp_path, monkeypatch, "long")


def test_a_cluster_gives_the_same_bits(tmp_path, monkeypatch, capsys):
    distributed = pytest.importorskip("distributed", reason="of the extra `dask`")
    cluster = {"dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **cluster) as there:
        assert command(tmp_path, "sweep", "drifts", "--dask", there.scheduler_address) == 0
        assert "FAILED" not in capsys.readouterr().out
        assert results(tmp_path / "out") == alone(tmp_path, monkeypatch, "drifts")
        longer = load_record(tmp_path / "out" / "drift.json")
        longer["config"] |= {"steps": 5000, "seed": 9}  # of other defaults, say
        save_record(tmp_path / "out" / "drift.json", longer, longer.pop("arrays"))
        assert command(tmp_path, "sweep", "drifts", "--dask", there.scheduler_address) == 1
        assert "drift: FAILED" in capsys.readouterr().out
        assert load_record(tmp_path / "out" / "drift.json")["config"]["steps"] == 5000
        options = ["--only", "nan", "--dask", there.scheduler_address]
        assert command(tmp_path, "sweep", "troubles", *options) == 1
        assert "step 8: loss is nan" in capsys.readouterr().out
    cluster |= {"processes": False}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, **cluster) as there:
        options = ["--steps", "60", "--dask", there.scheduler_address]
        assert command(tmp_path, "sweep", "drifts", *options) == 1
        assert "start it with --nthreads 1" in capsys.readouterr().out


def test_a_sweep_that_cannot_be_done_as_asked_says_what_can(tmp_path, monkeypatch, capsys):
    def error(*arguments):
        assert command(tmp_path, *arguments) == 1
        return capsys.readouterr().err

    for what in ("sweep", "table", "status"):
        assert "no table 'drfits'; there are: drifts, long, troubles" in error(what, "drfits")
    assert "no cell contains 'third'; there are: first/slow, " in error(
        "sweep", "drifts", "--only", "third"
    )
    assert "--jobs must be at least 1" in error("sweep", "drifts", "--jobs", "0")
    assert "first/slow: steps must be" in error("sweep", "drifts", "--steps", "0")
    with contextlib.suppress(ImportError):
        import distributed  # noqa: F401

        assert "no scheduler at 'nowhere'" in error("sweep", "drifts", "--dask", "nowhere")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "minigrad[dask]" in error("sweep", "drifts", "--dask", "tcp://nowhere:1")
    assert not (tmp_path / "runs").exists()


def fill(tmp_path, **steps):
    """Write records of the drifts after so many steps: `slow=40` and the like."""
    for column, number in steps.items():
        (place,) = [c for c in TABLES["drifts"].cells[:2] if c.column == column]
        name, config = sweep.configured(place, RUNS, number)
        runner.execute(RUNS["drift"], config, tmp_path / "out", progress=False)
    return tmp_path / "out"


def test_a_row_is_chosen_by_its_name_though_others_contain_it():
    table = TABLES["long"]._replace(cells=[cell(row, "x", {"rate": r}) for row, r in ROWS.items()])
    found = {only: len(sweep.configs(table, RUNS, only=only)) for only in ("a", "a/x", "a, wi", "")}
    assert found == {"a": 1, "a/x": 1, "a, wi": 1, "": 3}
    assert len(sweep.configs(table, RUNS, only="x")) == 3


def test_a_damaged_record_is_named_and_the_rest_of_the_table_shown(tmp_path, capsys):
    out = fill(tmp_path, slow=40, fast=40)
    (out / "drift.json").write_text("{")
    assert command(tmp_path, "table", "drifts") == 0
    shown, message = capsys.readouterr()
    assert "drift.json is damaged" in message and "a sweep makes it anew" in message
    assert "| not run [a] (-1.0) | " in shown and "± 0.25" in shown


def test_a_table_shows_ours_beside_published_and_what_is_missing(tmp_path, capsys):
    out = fill(tmp_path, slow=40, fast=20)
    assert command(tmp_path, "table", "drifts") == 0
    text = capsys.readouterr().out
    slow, fast = (load_record(out / f"{name}.json") for name in DRIFTS[:2])
    height = f"{slow['scalars']['height']:.2f} ± 0.25"
    loss = plots._number(slow["curves"]["loss"]["values"][-1])
    assert f"| first, 40 steps [b] | height | {height} [a] (-1.0) | " in text
    assert f"| {fast['scalars']['height']:.2f} ± 0.25† |  |" in text
    assert re.search(rf"\|  \| last loss \| {re.escape(loss)} \| \S+† \|  \|", text)
    assert f"| second, 30 or 40 steps | height | {height} |  | not run |" in text
    assert f"|  | last loss | {loss} |  | not run (7) |" in text
    assert text.count("(-1.0)") == text.count("(7)") == 1
    seconds = [f"{record['seconds']:,.0f} s" for record in (slow, fast)]
    row = f"| first | none | 0 | 40 steps, {seconds[0]} | 20 of 40 steps, {seconds[1]} |  |"
    assert row in text and "| 0 of 30 steps |" in text
    for sentence in ("The protocol.", SOURCE, "[a] Slow.", "† After fewer steps", "1 thread on"):
        assert sentence in text
    # a record made with other defaults is not shown as this one's
    changed = RUNS | {
        "drift": RUNS["drift"]._replace(defaults=RUNS["drift"].defaults | {"seed": 5})
    }
    assert main(["table", "drifts", "--out", str(out)], changed, TABLES) == 0
    assert "±" not in capsys.readouterr().out.partition("\nOurs")[0]


def test_the_status_of_a_table_shows_each_cell_and_the_time_left(tmp_path, capsys):
    fill(tmp_path, slow=40)
    options = ["--only", "nan", "--checkpoint-seconds", "0"]
    for arguments in (["table", "troubles"], ["sweep", "troubles", *options]):
        command(tmp_path, *arguments)
    capsys.readouterr()
    with runner._only_one(tmp_path / "runs" / "drift_rate=1.0"):
        command(tmp_path, "status", "drifts")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"first +slow +40/40 .* loss \S+ +finished", lines[1])
    assert re.fullmatch(r"first +fast +0/40 +not run", lines[2])
    assert re.fullmatch(r"second +faster +0/30 +running", lines[4])
    settings = {"rate": 0.5, "seed": 7}
    other = runner.configure(RUNS, "drift", settings=settings)
    record = runner.execute(RUNS["drift"], other, tmp_path / "out", mixed=True, progress=False)
    (tmp_path / "out" / f"{record['name']}.json").rename(tmp_path / "out" / "drift_rate=0.5.json")
    (tmp_path / "out" / f"{record['name']}.npz").rename(tmp_path / "out" / "drift_rate=0.5.npz")
    command(tmp_path, "status", "drifts")  # made with other defaults: not this cell's
    assert re.fullmatch(r"first +fast +0/40 +not run", capsys.readouterr().out.splitlines()[2])
    command(tmp_path, "status", "troubles")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"nan +7/20 +\d+ +\d+ \w+ +loss \S+ +partial", lines[1])


def test_times_are_told_in_words():
    times = [0.4, 99, 101, 5000, 6001, 100 * 3600, 3 * 86400]
    words = ["0 s", "99 s", "2 min", "83 min", "1.7 h", "4.2 days", "3.0 days"]
    assert [status.duration(seconds) for seconds in times] == words


def test_numbers_are_printed_to_two_digits_of_their_error():
    cases = [(-110.2345, 0.345), (0.0185432, 0.00187), (123456.0, 321.0), (19.0, None)]
    cases += [(-98.7654, None), (0.0185432, None), (-0.5, 0.0), (-110.2345, 9.97)]
    printed = [
        "-110.23 ± 0.34",
        "0.0185 ± 0.0019",
        "123456 ± 321",
        "19",
        "-98.77",
        "0.0185",
        "-0.5",
        "-110 ± 10",
    ]
    assert [plots._number(*case) for case in cases] == printed


# Figures


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw the table of drifts, or its curves, by the driver of the figures; return its files."""
    monkeypatch.setattr(runner, "registry", lambda: RUNS)
    monkeypatch.setattr(runner, "tables", lambda: TABLES)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "out")
    for name in ("BUILD", "COMMITTED"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(driver, name, tmp_path / name)
    module = types.ModuleType("experiments.tables.drifts")
    module.figure_table = lambda: plots.draw_table("drifts")
    module.figure_curves = lambda: plots.draw_curves("drifts")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def draw(name):
        driver.draw(find.Figure(name, Path("experiments/tables/drifts.py"), "A caption."))
        return driver._read(tmp_path / "BUILD", name)

    return draw


def test_a_table_is_drawn_however_much_of_it_is_there(tmp_path, drawn):
    empty = drawn("table")
    assert empty["records"] == {} and "not run" in empty["axes"][0]["texts"]
    assert drawn("curves")["axes"][0]["texts"] == ["not run"]
    fill(tmp_path, fast=20)
    assert [len(ax["artists"]) for ax in drawn("curves")["axes"]] == [1]  # of the other row nothing
    fill(tmp_path, slow=40)
    full = drawn("table")
    assert sorted(full["records"]) == DRIFTS[:2]
    texts = set(full["axes"][0]["texts"])
    assert {"slow", "published", "-1.0", "7", "not run", "[a] Slow."} <= texts
    assert any(line.startswith("| first, 40 steps [b] | height | ") for line in full["markdown"])
    curves = drawn("curves")
    assert "markdown" not in curves
    labels = [[a["label"] for a in ax["artists"]] for ax in curves["axes"]]
    assert labels == [["slow", "fast"], ["slow"]]


def test_the_markdown_of_a_table_is_checked(tmp_path, drawn):
    drawn("table")
    driver.update("table")
    driver.check("table")
    committed = tmp_path / "COMMITTED" / "table.md"
    committed.write_text(committed.read_text().replace("not run (7)", "6.9 (7)"))
    with pytest.raises(ValueError, match="not run .7.*6.9"):
        driver.check("table")
    assert driver.orphans({}) == ["table.json", "table.md", "table.svg"]


def test_a_table_is_drawn_anew_when_a_record_comes(tmp_path, monkeypatch):
    table = ROOT / "experiments" / "tables" / "sivi.py"
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    before = driver.sources.__wrapped__(table)
    assert driver.sources.__wrapped__(table) == before
    save_record(tmp_path / "new.json", {}, {})
    assert driver.sources.__wrapped__(table) != before


# The real tables

# by their files: to import them takes long, and each process of a sweep imports this module
FILES = sorted((ROOT / "experiments" / "tables").glob("*.py"))
REAL = [file.stem for file in FILES if "\nTABLE = " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", REAL)
def test_a_published_table_keeps_its_contract(name):
    table, runs = runner.tables()[name], runner.registry()
    assert table.title and table.source and table.protocol
    for known in plots.places(table, runs):
        cell, where = known.cell, f"{known.cell.row}/{known.cell.column}"
        assert set(cell.notes) <= table.notes.keys(), where
        assert cell.published.keys() <= cell.values.keys(), where
        assert all(isinstance(number, str) for number in cell.published.values()), where
        if known.record:
            assert all(plots._value(known, label)[0] is not None for label in cell.values), where
        for pattern in table.curve.values():
            curve = pattern.format(row=cell.row, column=cell.column)
            assert known.record is None or curve in known.record["curves"], where
    where = [(cell.row, cell.column) for cell in table.cells]
    assert len(set(where)) == len(where)
    used = set().union(*(cell.notes for cell in table.cells))
    assert used == table.notes.keys(), "a note that no cell has"
    assert sweep.configs(table, runs)


@pytest.mark.parametrize("name", REAL)
def test_a_published_table_is_among_the_figures(name):
    there = find.figures(ROOT).keys()
    assert f"table_{name}" in there
    assert (f"curves_{name}" in there) == bool(runner.tables()[name].curve)


if __name__ == "__main__":
    sys.exit(main(runs=RUNS, tables=TABLES))
