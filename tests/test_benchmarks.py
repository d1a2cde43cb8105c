"""The benchmark's machinery, on tiny runs: what it measures, refuses and writes. No timings."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case

TINY = ["--rounds", "2", "--seconds", "0.001", "--threads", "1"]
FIELDS = ["case", "minigrad", "peers", "unit", "ratio", "target", "jax_ratio", "jax_target"]

TOY = """
import time
import numpy as np

def minigrad():
    return lambda: time.sleep(0.001), lambda: {"y": np.array([1.0, -2.0])}

def numpy():
    return lambda: time.sleep(0.002), lambda: {"y": np.array([1.0, -2.00001])}

def wrong():
    return lambda: None, lambda: {"y": np.array([1.0, -2.001])}

def nan():
    return lambda: None, lambda: {"y": np.array([1.0, np.nan])}

def other():
    return lambda: None, lambda: {"z": np.array([1.0, -2.0])}

def crash():
    raise SystemExit(3)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A case from the functions above, the peer called "numpy" being the one that is named."""
    (tmp_path / "toy_case.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def case(peer="numpy"):
        setups = {"minigrad": "toy_case:minigrad", "numpy": f"toy_case:{peer}"}
        return {"toy": Case("a toy", setups, ("numpy",), "ms", lambda times: 0.75)}

    return case


@pytest.mark.parametrize("name", CASES)
def test_the_frameworks_of_a_case_agree_and_are_timed(name):
    times, wrong = harness.measure(CASES[name], rounds=1, budget=1e-3, threads=1)
    assert not wrong
    assert {"minigrad", "numpy"} <= times.keys() <= CASES[name].setups.keys()
    assert all(len(values) == 1 and values[0] > 0 for values in times.values())


def test_the_json_file_has_the_agreed_fields(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["untraced_call", *TINY, "--json", str(file)]) == 0
    (entry,) = json.loads(file.read_text())
    assert list(entry) == FIELDS
    assert entry["case"] == "untraced_call" and entry["unit"] == "µs"
    assert entry["peers"].keys() == {"numpy"} and entry["jax_ratio"] is None
    assert entry["target"] == pytest.approx(1 + 0.5 / entry["peers"]["numpy"])
    printed = capsys.readouterr().out
    assert f"numpy {np.__version__}" in printed and "1 thread per framework" in printed


def test_the_ratio_is_the_median_of_the_rounds():
    case = Case("", {}, ("numpy", "torch"), "ms", lambda times: 1.0)
    times = {
        "minigrad": [1e-3, 4e-3, 2e-3],  # a slow round is slow for all
        "numpy": [2e-3, 8e-3, 4e-3],
        "torch": [9e-3, 9e-3, 9e-3],
        "jax": [1e-3, 1e-3, 8e-3],
    }
    entry = harness.entry("x", case, times)
    assert (entry["ratio"], entry["jax_ratio"]) == (0.5, 1.0)
    assert entry["minigrad"] == 2.0 and entry["peers"] == {"numpy": 4.0, "torch": 9.0, "jax": 1.0}
    alone = harness.entry("x", case, {"minigrad": [1e-3]})
    assert alone["ratio"] is None and alone["peers"] == {}


def test_a_tiny_run_measures_what_the_steps_take(toy):
    times, wrong = harness.measure(toy()["toy"], rounds=3, budget=0.01, threads=1)
    assert not wrong and [len(t) for t in times.values()] == [3, 3]
    assert min(times["minigrad"]) >= 0.001 and min(times["numpy"]) >= 0.002


@pytest.mark.parametrize(
    "peer, words",
    [
        ("wrong", ["y of numpy", "differ by 0.001 of 2"]),
        ("nan", ["y of numpy", "differ by nan"]),
        ("other", ["numpy returns ['z']", "minigrad ['y']"]),
        ("crash", ["toy_case:crash", "status 3"]),
    ],
)
def test_wrong_results_are_not_timed_and_fail_the_run(toy, capsys, tmp_path, peer, words):
    file = tmp_path / "out.json"
    assert main([*TINY, "--json", str(file)], toy(peer)) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ["wrong:", *words]), printed
    assert json.loads(file.read_text()) == []


def test_a_missing_framework_is_said_to_be_missing(toy, capsys):
    case = toy()["toy"]
    case.setups["no_such_framework"] = "toy_case:numpy"
    assert main(TINY, {"toy": case}) == 0
    assert "no_such_framework not installed" in capsys.readouterr().out


def test_an_unknown_case_is_an_error_that_lists_them(capsys):
    assert main(["vae"]) == 2
    assert "no case vae; there are untraced_call" in capsys.readouterr().err


def test_a_worker_ends_with_its_input():
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", "benchmarks.small_op:numpy"],
        cwd=harness.ROOT,
        stdin=subprocess.PIPE,
    )
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0
