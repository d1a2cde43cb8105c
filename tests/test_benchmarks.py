"""The benchmark's machinery, on tiny runs: what it measures, refuses and writes. No timings."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, scaling
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case, Group, fastest
from benchmarks.peers import fastest as fastest_form
from benchmarks.worker import FEW, load

TINY = ["--rounds", "2", "--seconds", "0.001", "--threads", "1"]
FIELDS = ["case", "minigrad", "peers", "unit", "ratio", "target", "jax_ratio", "jax_target"]
TIMED = {n: c for n, c in CASES.items() if isinstance(c, Case) and c.unit != "MiB"}
# JAX takes most of a minute to compile the others; the benchmark itself checks it before it times.
WITH_JAX = {"small_op", "nearest_code"}

TOY = """
import time
import numpy as np

def minigrad(n=1):
    return lambda: time.sleep(0.001), lambda: {"y": np.array([1.0, -2.0])}

def numpy(n=1):
    return lambda: time.sleep(0.002), lambda: {"y": np.array([1.0, -2.00001])}

def wrong(n=1):
    return lambda: None, lambda: {"y": np.array([1.0, -2.001])}

def nan(n=1):
    return lambda: None, lambda: {"y": np.array([1.0, np.nan])}

def other(n=1):
    return lambda: None, lambda: {"z": np.array([1.0, -2.0])}

def crash(n=1):
    raise SystemExit(3)

def greedy(mebibytes, n=None):
    return lambda: np.ones(int(mebibytes) << 17), lambda: {}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A case from the functions above, the peer called "numpy" being the one that is named."""
    (tmp_path / "toy_case.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def case(peer="numpy"):
        setups = {"minigrad": "toy_case:minigrad", "numpy": f"toy_case:{peer}"}
        return {"toy": Case("a toy", setups, "ms", 0.75)}

    return case


@pytest.mark.parametrize("name", TIMED)
def test_the_frameworks_of_a_case_agree(name):
    case, results = TIMED[name], {}
    for framework in harness.installed(case):
        if framework != "jax" or name in WITH_JAX:
            step, result = load(case.setups[framework])(FEW)
            results[framework] = result()
            if framework != "torch":  # which would try its forms
                step()
    assert "minigrad" in results
    assert len(results) > 1 or name == "relax_step"  # which nobody writes by hand
    assert harness.disagreements(results, case.tolerance) == []


def test_memory_is_measured_at_the_steps_that_are_timed():
    timed = {setup.split(":")[0] for case in TIMED.values() for setup in case.setups.values()}
    for case in CASES.values():
        if isinstance(case, Case) and case.unit == "MiB":
            assert {setup.split(":")[0] for setup in case.setups.values()} <= timed
    _, result = load("benchmarks.conv2d:every_shape:numpy")(FEW)
    _, one = load("benchmarks.conv2d:numpy:1_to_32_28_3x3")(FEW)
    np.testing.assert_array_equal(result()["1_to_32_28_3x3 dw"], one()["dw"])


def test_the_table_is_complete():
    targets = {  # eager, JAX under jit
        "vae_step": (0.95, 1.1),
        "small_op": (0.4, None),
        "conv2d": (1.0, 1.0),
        "pixelcnn_step": (0.65, 0.65),
        "reinforce_step": (0.6, 1.1),
        "relax_step": (0.45, 1.3),
        "bernoulli": (0.5, 0.6),
        "gumbel_max": (0.5, 0.6),
        "nearest_code": (0.8, None),
        "alternating": (1.1, None),
        "conv2d_memory": (1.0, None),
        "vae_memory": (1.0, None),
        "pixelcnn_sample": (0.005, None),
    }
    assert targets.items() <= {n: (c.target, c.jax_target) for n, c in CASES.items()}.items()
    assert all(CASES[member].target == 1.3 for member in CASES["conv2d"].members)


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
    case = Case("", {}, "ms", 1.0, 2.0, against=fastest("numpy", "torch"))
    times = {
        "minigrad": [1e-3, 4e-3, 2e-3],  # a slow round is slow for all
        "numpy": [2e-3, 8e-3, 4e-3],
        "torch": [9e-3, 9e-3, 9e-3],
        "jax": [1e-3, 1e-3, 8e-3],
    }
    entry = harness.entry("x", case, times)
    assert (entry["ratio"], entry["jax_ratio"]) == (0.5, 1.0)
    assert (entry["target"], entry["jax_target"]) == (1.0, 2.0)
    assert entry["minigrad"] == 2.0 and entry["peers"] == {"numpy": 4.0, "torch": 9.0, "jax": 1.0}
    alone = harness.entry("x", case, {"minigrad": [1e-3]})
    assert alone["ratio"] is None and alone["peers"] == {}


def test_two_alone_are_added_up():
    times = {"minigrad": [5.0, 9.0], "convolution": [1.0, 2.0], "product": [3.0, 4.0]}
    assert harness.entry("x", CASES["alternating"], times)["ratio"] == (5 / 4 + 9 / 6) / 2


def test_a_group_has_the_geometric_means_of_its_members():
    group = Group("", ("a", "b"), 1.0, 1.1)
    a = {"case": "a", "minigrad": 1.0, "peers": {"torch": 2.0, "jax": 9.0}, "unit": "ms"}
    b = {"case": "b", "minigrad": 4.0, "peers": {"torch": 2.0}, "unit": "ms"}
    a |= {"ratio": 0.5, "jax_ratio": 2.0}
    b |= {"ratio": 2.0, "jax_ratio": None}
    entry = harness.group_entry("g", group, [b, a])
    assert list(entry) == FIELDS
    assert entry["minigrad"] == pytest.approx(2) and entry["peers"] == {"torch": pytest.approx(2)}
    assert entry["ratio"] == pytest.approx(1) and entry["jax_ratio"] is None
    assert (entry["target"], entry["jax_target"]) == (1.0, 1.1)
    assert harness.group_entry("g", group, [a]) is None


def test_a_group_is_measured_with_its_members(toy, tmp_path):
    cases = {"one": toy()["toy"], "both": Group("", ("one", "two"), 1.0, 1.0), "two": toy()["toy"]}
    file = tmp_path / "out.json"
    assert main(["both", *TINY, "--json", str(file)], cases) == 0
    assert [entry["case"] for entry in json.loads(file.read_text())] == ["one", "two", "both"]


def test_a_tiny_run_measures_what_the_steps_take(toy):
    times, wrong = harness.measure(toy()["toy"], rounds=3, budget=0.01, limit=9, threads=1)
    assert not wrong and [len(t) for t in times.values()] == [3, 3]
    assert min(times["minigrad"]) >= 0.001 and min(times["numpy"]) >= 0.002


def test_times_are_those_of_a_piece_of_work(toy):
    case = toy()["toy"]._replace(per_step=10, peers_per_step=0.5)
    times, _ = harness.measure(case, rounds=9, budget=0.001, limit=0, threads=1)
    assert [len(t) for t in times.values()] == [harness.LEAST_ROUNDS] * 2
    assert min(times["minigrad"]) >= 0.0001 and min(times["numpy"]) >= 0.004


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_is_the_peak_above_that_before(toy, capsys, tmp_path):
    setups = {name: f"toy_case:greedy:{n}" for name, n in {"minigrad": 20, "numpy": 40}.items()}
    case = toy()["toy"]._replace(setups=setups, unit="MiB", target=None)
    file = tmp_path / "out.json"
    assert main([*TINY, "--json", str(file)], {"toy": case}) == 0
    (entry,) = json.loads(file.read_text())
    assert entry["minigrad"] == pytest.approx(20, abs=1)
    assert entry["peers"]["numpy"] == pytest.approx(40, abs=1)
    assert entry["ratio"] == pytest.approx(0.5, abs=0.05)
    crash = case._replace(setups=setups | {"numpy": "toy_case:crash"})
    assert main(TINY, {"toy": crash}) == 1 and "status 3" in capsys.readouterr().out


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


def test_averages_over_draws_may_differ_by_chance_alone():
    def disagreements(shift, error=0.01):
        mean = {"mean": np.zeros(2), "mean error": np.full(2, 0.01)}
        other = {"mean": np.array([0.0, shift]), "mean error": np.full(2, error)}
        return harness.disagreements({"minigrad": mean, "numpy": other})

    assert not disagreements(0.05) and not disagreements(0.3, error=0.1)
    assert "mean of numpy and minigrad" in disagreements(0.08)[0]
    assert disagreements(np.nan) and disagreements(0.0, error=np.nan)


def test_a_missing_framework_is_said_to_be_missing(toy, capsys, monkeypatch):
    case = toy()["toy"]
    monkeypatch.setattr(harness, "PEERS", (*harness.PEERS, "no_such_framework"))
    case.setups["no_such_framework"] = "toy_case:numpy"
    assert main(TINY, {"toy": case}) == 0
    assert "no_such_framework not installed" in capsys.readouterr().out


def test_an_unknown_case_is_an_error_that_lists_them(capsys):
    assert main(["vae"]) == 2
    assert "no case vae; there are untraced_call" in capsys.readouterr().err


def test_the_reference_run_is_whole_and_right(toy, tmp_path, monkeypatch, capsys):
    file = tmp_path / "reference.json"
    monkeypatch.setattr("benchmarks.__main__.REFERENCE", file)
    monkeypatch.setattr(scaling, "run", lambda: ["a sweep"])
    assert main(["--reference", *TINY], toy("wrong")) == 1 and not file.exists()
    assert main(["toy", "--reference", *TINY], toy()) == 2 and not file.exists()
    assert "name none" in capsys.readouterr().err
    assert main(["--reference", *TINY], toy()) == 0
    content = json.loads(file.read_text())
    assert [entry["case"] for entry in content["cases"]] == ["toy"]
    assert content["scaling"] == ["a sweep"] and "cores" in content["header"][0]


def test_a_worker_ends_with_its_input():
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", "benchmarks.small_op:numpy"],
        cwd=harness.ROOT,
        stdin=subprocess.PIPE,
    )
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0


def test_the_fastest_form_is_chosen_once():
    calls = []

    def form(name, seconds):
        def step():
            calls.append(name)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return None, step

    forms = form("slow", 0.02), form("fast", 0.001)
    step = fastest_form("a form of the tests", *forms)
    assert not calls
    step()
    assert {"slow", "fast"} == set(calls) and calls[-1] == "fast"
    calls.clear()
    step()
    fastest_form("a form of the tests", *forms)()  # the same name: no second trial
    assert calls == ["fast", "fast"]


def test_scaling_finds_the_power_of_a_power_law():
    sizes = [2**i for i in range(8)]
    assert scaling.slope(sizes, [0.3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert 0.9 < scaling.slope(sizes, [n + 1 for n in sizes]) < 1


def test_scaling_counts_what_a_step_keeps(capsys):
    sweeps = {"rows": ("a toy", [20, 40, 80, 160], lambda n: lambda: np.ones((n, 1000)))}
    (entry,) = scaling.run(sweeps, repeats=1)
    assert entry["MiB"] == pytest.approx([n * 8000 / 2**20 for n in entry["sizes"]], rel=0.02)
    assert entry["memory_slope"] == pytest.approx(1, abs=0.02)
    assert len(entry["ms"]) == 4 and "slope: time" in capsys.readouterr().out


@pytest.mark.parametrize("name", scaling.SWEEPS)
def test_memory_of_a_training_step_grows_linearly(name):
    _, sizes, setup = scaling.SWEEPS[name]
    small, large = sizes[-5], sizes[-4]
    ratio = scaling.peak_bytes(setup(large)) / scaling.peak_bytes(setup(small))
    assert ratio == pytest.approx(2, rel=0.15)
