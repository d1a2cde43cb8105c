"""A run is a pure function of its config, killed or not; what it leaves on the disk says so.

As a script this file is the command line over the runs below, so that a process can be killed.
"""

import ast
import contextlib
import errno
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import runner
from experiments.__main__ import main
from minigrad.train import load_arrays, load_record

SCRIPT = Path(__file__).resolve()


def setup_walk(config, data, rng):
    """Momentum descent on a noisy quadratic; a few matrix products a step."""
    size = config["size"]
    matrix = rng.standard_normal((size, size)).astype(np.float32) / size
    centre = np.float32(0 if data is None else data.x_train.mean())

    def step(state, rng):
        noise = rng.standard_normal((config["batch"], size)).astype(np.float32)
        error = (state["w"] - centre) @ matrix - config["scale"] * noise
        speed = 0.9 * state["speed"] + np.mean(error, axis=0) @ matrix.T
        state = {"w": state["w"] - 0.1 * speed, "speed": speed, "count": state["count"] + 1}
        return state, {"loss": np.mean(np.square(error))}

    def evaluate(state, rng):
        return {"test_loss": np.mean(np.square(state["w"] @ matrix + rng.standard_normal(size)))}

    def finish(state, rng):
        picture = rng.standard_normal((4, size)).astype(np.float32) + state["w"]
        return {"count": state["count"]}, {"w": state["w"], "picture": picture}

    zeros = np.zeros(size, np.float32)
    return runner.Parts({"w": zeros, "speed": zeros, "count": 0}, step, evaluate, finish)


def setup_doomed(config, _, rng):
    """The logarithm of a number that falls by one a step, and is -1/2 in step 11."""
    from minigrad import value_and_grad

    def step(state, _):
        with np.errstate(all="ignore"):
            value, _ = value_and_grad(lambda x: np.log(config["at"] - 0.5 - x))(state["n"])
        return {"n": state["n"] + 1.0}, {"loss": value}

    return {"n": 0.0 * rng.random()}, step


SMALL = {"size": 6, "batch": 5, "scale": 1.0}
RUNS = {
    "walk": runner.Run(
        setup_walk, {**SMALL, "steps": 60, "label": "a", "log_every": 5, "eval_every": 10}
    ),
    "doomed": runner.Run(setup_doomed, {"steps": 30, "log_every": 4, "at": 10.0}),
    "fitted": runner.Run(
        setup_walk,
        {**SMALL, "steps": 4},
        data={"digits": {}, "mnist": {"steps": 9, "batch": 7}},
    ),
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "runs"))
    # An edit of the sources while the tests run would be noticed, and is not what they are about.
    monkeypatch.setattr(runner, "source_hash", lambda *_: "0123456789ab")


def do(tmp_path, name="walk", out="out", every=0.0, **settings):
    """Run in this process, with a checkpoint after each step unless told otherwise."""
    config = runner.configure(RUNS, name, settings=settings)
    return runner.execute(RUNS[name], config, tmp_path / out, every, progress=False)


def result(folder, out, name="walk"):
    """Return all that a run leaves behind, but for times and the hash of the sources."""
    record = load_record(out / f"{name}.json")
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").open()]
    for content in (record, *lines):
        content.pop("seconds", None)
        content.pop("source_hash", None)
    arrays = {key: (a.dtype.str, a.tobytes()) for key, a in record.pop("arrays").items()}
    step, path, meta = runner.checkpoints(folder / name)[0][0]
    state = {key: (a.dtype.str, a.tobytes()) for key, a in load_arrays(path)[0].items()}
    return record, lines, arrays, (out / f"{name}.npz").read_bytes(), step, state, meta["snapshot"]


def test_the_same_config_gives_the_same_result_and_any_other_another(tmp_path, monkeypatch):
    first = do(tmp_path)
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "again"))
    second = do(tmp_path, out="second", every=30.0)
    assert result(tmp_path / "runs", tmp_path / "out") == result(
        tmp_path / "again", tmp_path / "second"
    )
    others = [do(tmp_path, seed=1), do(tmp_path, label="b"), do(tmp_path, scale=1.5)]
    values = [tuple(r["arrays"]["w"]) for r in (first, second, *others)]
    assert len(set(values)) == 4
    assert len(list((tmp_path / "out").glob("*.json"))) == 4


def test_the_record_holds_what_figures_and_readers_need(tmp_path):
    do(tmp_path)
    record = load_record(tmp_path / "out" / "walk.json")
    assert record["config"] == {
        "name": "walk",
        "data": None,
        "seed": 0,
        "threads": 1,
        "log_every": 5,
        "eval_every": 10,
        "steps": 60,
        "size": 6,
        "batch": 5,
        "scale": 1.0,
        "label": "a",
    }
    assert record["seed"] == 0
    assert record["threads"] == 1
    assert record["source_hash"] == "0123456789ab"
    assert set(record["versions"]) == {"python", "numpy", "scipy", "numba", "minigrad"}
    assert record["seconds"] > 0
    assert record["curves"]["loss"]["steps"] == list(range(5, 61, 5))
    assert record["curves"]["test_loss"]["steps"] == list(range(10, 61, 10))
    assert record["scalars"]["count"] == 60
    np.testing.assert_allclose(
        record["scalars"]["test_loss"], record["curves"]["test_loss"]["values"][-1], rtol=1e-6
    )
    assert {k: a.shape for k, a in record["arrays"].items()} == {"w": (6,), "picture": (4, 6)}
    assert re.fullmatch(r"\w+ \w+, \d+ CPUs", record["platform"])  # and no host name


@pytest.mark.parametrize("first", [60, 41, 3])
def test_more_steps_continue_a_finished_run_bit_for_bit(tmp_path, monkeypatch, first):
    do(tmp_path, steps=first)
    do(tmp_path, steps=73)
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "at_once"))
    do(tmp_path, out="at_once", steps=73)
    assert result(tmp_path / "runs", tmp_path / "out") == result(
        tmp_path / "at_once", tmp_path / "at_once"
    )


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_a_run_cut_off_at_any_file_operation_goes_on_bit_for_bit(tmp_path, monkeypatch):
    settings = {"steps": 12, "log_every": 4, "eval_every": 6}
    do(tmp_path, **settings)
    (name,) = os.listdir(tmp_path / "runs")
    whole = result(tmp_path / "runs", tmp_path / "out", name)
    real = {call: getattr(os, call) for call in ("fsync", "replace")}
    for moment in itertools.count():
        folder = tmp_path / f"runs{moment}"
        monkeypatch.setenv("MINIGRAD_RUNS", str(folder))
        left = [moment]

        def cut(call, *arguments, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real[call](*arguments)

        with monkeypatch.context() as patch:
            for call in real:
                patch.setattr(os, call, lambda *a, call=call, cut=cut: cut(call, *a))
            with contextlib.suppress(Killed):
                do(tmp_path, out=f"out{moment}", **settings)
        finished = left[0] >= 0
        do(tmp_path, out=f"out{moment}", **settings)
        assert result(folder, tmp_path / f"out{moment}", name) == whole
        assert not list(folder.rglob(".*.part"))
        if finished:
            break
    assert moment > 15


def test_a_process_killed_at_random_moments_ends_as_one_left_alone(tmp_path):
    steps = 4000
    command = [sys.executable, str(SCRIPT), "run", "walk", "--steps", str(steps), "--mixed"]
    command += ["--checkpoint-seconds", "0.01", "--set", "log_every=20"]

    def start(name):
        environment = os.environ | {
            "MINIGRAD_RUNS": str(tmp_path / name / "runs"),
            "PYTHONPATH": str(SCRIPT.parent.parent),
        }
        return subprocess.Popen(
            [*command, "--out", str(tmp_path / name)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    alone = start("alone")
    name = "walk_log_every=20"
    folder, log = tmp_path / "killed" / "runs", tmp_path / "killed" / "runs" / name / "log.jsonl"
    rng = np.random.default_rng(5)
    kills, steps_at_kills = 0, []
    for lines in (20, 60, 100, 130):  # of 200
        process = start("killed")
        while process.poll() is None and not (
            log.exists() and log.read_bytes().count(b"\n") > lines
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        output = process.communicate()[0]
        kills += process.returncode == -9
        assert process.returncode in (0, -9), output
        steps_at_kills.append(runner.checkpoints(folder / name)[0][0][0])
    last = start("killed")
    for process in (last, alone):
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert kills >= 3, f"the run was over too early to be killed: {steps_at_kills}"
    assert steps_at_kills == sorted(steps_at_kills)
    assert result(folder, tmp_path / "killed", name) == result(
        tmp_path / "alone" / "runs", tmp_path / "alone", name
    )


def test_a_full_disk_costs_one_interval_and_names_the_file(tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def no_space(descriptor):
        calls.append(1)
        if len(calls) > 8:  # after the log and three checkpoints, two calls each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    arguments = ["run", "walk", "--checkpoint-seconds", "0", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        assert main(arguments, RUNS) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "checkpoint-" in error
    good, damaged = runner.checkpoints(tmp_path / "runs" / "walk")
    written = sum(1 for _ in (tmp_path / "runs" / "walk" / "log.jsonl").open()) - 1
    assert not damaged
    assert (good[0][0], written) == (3, 0)  # it was the fourth that did not fit
    assert not (tmp_path / "out").exists()
    do(tmp_path)
    resumed = result(tmp_path / "runs", tmp_path / "out")
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "again"))
    do(tmp_path, out="again")
    assert resumed == result(tmp_path / "again", tmp_path / "again")


def half(path):
    """Tear a file: keep its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, monkeypatch, capsys):
    do(tmp_path, steps=40)
    (newest, path, _), (older, other, _) = runner.checkpoints(tmp_path / "runs" / "walk")[0]
    assert (newest, older) == (40, 39)
    half(path)
    assert main(["status", "--out", str(tmp_path / "out")], RUNS) == 0
    assert f"damaged: {path} is damaged" in capsys.readouterr().out
    do(tmp_path)
    assert f"{path} is damaged" in (error := capsys.readouterr().err)
    assert f"going on from {other.name} at step 39" in error
    resumed = result(tmp_path / "runs", tmp_path / "out")
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "again"))
    do(tmp_path, out="again")
    assert resumed == result(tmp_path / "again", tmp_path / "again")


def test_the_newest_checkpoint_is_never_the_one_written_over(tmp_path):
    for steps in (40, 41, 42):  # a single checkpoint in each of the later sessions
        do(tmp_path, steps=steps)
        good, _ = runner.checkpoints(tmp_path / "runs" / "walk")
        assert [step for step, *_ in good] == [steps, steps - 1]


def test_two_damaged_checkpoints_stop_the_run_and_stay(tmp_path):
    do(tmp_path, steps=40)
    paths = [path for _, path, _ in runner.checkpoints(tmp_path / "runs" / "walk")[0]]
    for path in paths:
        half(path)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(runner.RunError, match="checkpoint-a.*checkpoint-b.*begin this run anew"):
        do(tmp_path)
    assert [path.read_bytes() for path in paths] == before


def test_a_nan_names_step_and_operation_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    arguments = ["run", "doomed", "--checkpoint-seconds", "0", "--out", str(tmp_path / "out")]
    for _ in range(2):  # and again from the checkpoint
        assert main(arguments, RUNS) == 1
        error = capsys.readouterr().err
        assert "doomed stopped: step 11: loss is nan" in error
        assert "log" in error.partition("first NaN in")[2].partition(";")[0]
        assert str(tmp_path / "runs" / "doomed") in error
        good, damaged = runner.checkpoints(tmp_path / "runs" / "doomed")
        assert [step for step, *_ in good] == [10, 9]
        assert not damaged
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path, capsys):
    own = tmp_path / "own"
    own.write_text("no folder")
    assert main(["run", "walk", "--out", str(own / "x")], RUNS) == 1
    assert f"{own} is no folder to write to" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_shorter_run_does_not_replace_a_longer_one(tmp_path, monkeypatch):
    do(tmp_path)
    before = (tmp_path / "out" / "walk.json").read_bytes()
    with pytest.raises(runner.RunError, match=r"holds 60 steps.*--out"):
        do(tmp_path, steps=50)
    with pytest.raises(runner.RunError, match="at step 60 already.*MINIGRAD_RUNS"):
        do(tmp_path, out="other", steps=50)
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "again"))
    with pytest.raises(runner.RunError, match="holds 60 steps"):
        do(tmp_path, steps=50)
    assert (tmp_path / "out" / "walk.json").read_bytes() == before
    assert do(tmp_path, out="other", steps=50)["config"]["steps"] == 50


def test_changed_sources_are_mixed_only_when_told_to(tmp_path, monkeypatch):
    do(tmp_path, steps=20)
    monkeypatch.setattr(runner, "source_hash", lambda *_: "ba9876543210")
    with pytest.raises(runner.RunError, match="0123456789ab.*ba9876543210.*--mixed"):
        do(tmp_path)
    config = runner.configure(RUNS, "walk")
    record = runner.execute(RUNS["walk"], config, tmp_path / "out", mixed=True, progress=False)
    assert record["source_hash"] == "0123456789ab+ba9876543210"


def test_a_run_with_schedules_over_its_steps_is_not_continued_by_a_longer_one(tmp_path):
    run = RUNS["walk"]._replace(continues=False)

    def of(steps):
        config = runner.configure({"walk": run}, "walk", settings={"steps": steps})
        return runner.execute(run, config, tmp_path / "out", progress=False)

    first = of(20)
    assert of(20)["scalars"] == first["scalars"]
    with pytest.raises(runner.RunError, match="20 steps, which decide .* one of 30 .* delete"):
        of(30)


@pytest.mark.parametrize("name", sorted(runner.registry()))
def test_setups_that_read_the_steps_say_that_they_do_not_continue(name):
    run = runner.registry()[name]
    source = inspect.getsource(inspect.getmodule(run.setup))
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    seen, todo = set(), [run.setup.__name__]
    while todo:  # the setup and what it calls in its file
        here = functions[todo.pop()]
        seen.add(here.name)
        called = {node.id for node in ast.walk(here) if isinstance(node, ast.Name)}
        todo += called & functions.keys() - seen
    reads = any('config["steps"]' in ast.unparse(functions[f]).replace("'", '"') for f in seen)
    assert reads == (not run.continues)


def test_a_damaged_log_does_not_stop_a_run(tmp_path, monkeypatch):
    whole = do(tmp_path, out="whole")
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "again"))
    do(tmp_path, steps=30)
    with open(tmp_path / "again" / "walk" / "log.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n")
    assert do(tmp_path)["curves"] == whole["curves"]


def test_results_of_other_kernels_are_of_another_origin(monkeypatch):
    monkeypatch.delenv("MINIGRAD_KERNELS", raising=False)
    here = runner.origin()
    monkeypatch.setenv("MINIGRAD_KERNELS", "numpy")
    assert runner.origin() != here and runner.origin()["versions"]["numba"] is None


def test_a_nan_before_the_first_checkpoint_does_not_promise_one(tmp_path):
    with pytest.raises(FloatingPointError, match="no checkpoint yet in"):
        do(tmp_path, "doomed", every=30.0)


def test_an_altered_data_file_is_answered_in_words(tmp_path, monkeypatch, capsys):
    def altered():
        raise ValueError("train.gz is truncated or altered")

    monkeypatch.setattr("minigrad.data.digits", altered)
    monkeypatch.setattr("experiments.__main__.runner.registry", lambda: RUNS)
    assert main(["run", "fitted", "--out", str(tmp_path / "out")]) == 1
    assert "error: train.gz is truncated or altered" in capsys.readouterr().err


def test_a_setting_with_a_nan_inside_is_refused_early():
    runs = {"listed": runner.Run(setup_walk, {"steps": 1, "times": [1.0], "on": False})}
    with pytest.raises(runner.RunError, match="times must be finite"):
        runner.configure(runs, "listed", settings={"times": "[1, NaN]"})
    with pytest.raises(runner.RunError, match="of type bool, like false; got 'False'"):
        runner.configure(runs, "listed", settings={"on": "False"})


def test_changed_defaults_do_not_continue_an_old_run(tmp_path):
    do(tmp_path, steps=20)
    changed = RUNS["walk"]._replace(defaults=RUNS["walk"].defaults | {"batch": 9})
    config = runner.configure({"walk": changed}, "walk")
    with pytest.raises(runner.RunError, match="other defaults"):
        runner.execute(changed, config, tmp_path / "out", progress=False)


def test_a_run_is_done_by_one_process_at_a_time(tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="locks of POSIX systems")
    (tmp_path / "runs" / "walk").mkdir(parents=True)
    with open(tmp_path / "runs" / "walk" / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(runner.RunError, match="another process"):
            do(tmp_path)
    do(tmp_path)


def test_blas_threads_are_those_of_the_config(tmp_path):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    seen = []

    def setup(config, _, rng):
        def step(state, _):
            pools = threadpoolctl.threadpool_info()
            seen.append({p["num_threads"] for p in pools if p["user_api"] == "blas"})
            return state, {"loss": 0.0}

        return {"x": rng.random(config["threads"])}, step

    runs = {"pools": runner.Run(setup, {"steps": 1})}
    for threads in (1, 2):
        config = runner.configure(runs, "pools", settings={"threads": threads})
        runner.execute(runs["pools"], config, tmp_path, progress=False)
    assert seen == [{1}, {2}]


# Configs and names


def test_settings_are_parsed_and_keep_the_type_of_their_default():
    def parsed(**settings):
        config = runner.configure(RUNS, "walk", settings=settings)
        return {key: config[key] for key in settings}

    assert parsed(scale="2", batch="7", label="3") == {"scale": 2.0, "batch": 7, "label": "3"}
    assert type(parsed(scale="2")["scale"]) is float
    assert parsed(label='"3"', scale="1e-3") == {"label": "3", "scale": 1e-3}
    for key, value in {"batch": "2.5", "scale": "big", "size": "true", "seed": "[1]"}.items():
        with pytest.raises(runner.RunError, match=f"{key} must be of type"):
            parsed(**{key: value})
    for key, value in {"scale": "NaN", "steps": "0", "threads": "-1", "log_every": "0"}.items():
        with pytest.raises(runner.RunError, match=f"{key} must be"):
            parsed(**{key: value})


def test_what_does_not_exist_is_answered_with_what_does(capsys):
    for arguments, message in [
        (["run", "wlak"], "no run 'wlak'; there are: doomed, fitted, walk"),
        (["run", "walk", "--set", "bacth=3"], "no setting 'bacth'; there are: seed, threads,"),
        (["run", "walk", "--set", "batch"], "--set takes key=value, got 'batch'"),
        (["run", "walk", "--data", "digits"], "walk takes data: none; got 'digits'"),
        (["run", "fitted", "--data", "x"], "fitted takes data: digits, mnist; got 'x'"),
        (["run", "walk", "--steps", "many"], "steps must be of type int"),
    ]:
        assert main(arguments, RUNS) == 1
        assert message in capsys.readouterr().err


def test_each_data_set_has_its_own_defaults():
    digits = runner.configure(RUNS, "fitted")
    mnist = runner.configure(RUNS, "fitted", "mnist", {"scale": "3"})
    assert (digits["data"], digits["steps"], digits["batch"]) == ("digits", 4, 5)
    assert (mnist["data"], mnist["steps"], mnist["batch"], mnist["scale"]) == ("mnist", 9, 7, 3.0)


def test_a_run_reads_its_data_set(tmp_path):
    record = do(tmp_path, "fitted")
    assert record["name"] == "fitted_digits"
    assert record["scalars"]["count"] == 4


def test_record_names_tell_runs_apart_and_leave_steps_out():
    def name(run="walk", data=None, **settings):
        return runner.record_name(RUNS[run], runner.configure(RUNS, run, data, settings))

    assert name() == name(steps=1000) == name(batch=5) == "walk"
    assert name("fitted") == "fitted_digits"
    assert name("fitted", "mnist", batch=7) == "fitted_mnist"
    assert name("fitted", "mnist", batch=2, scale=0.5) == "fitted_mnist_batch=2_scale=0.5"
    awkward = ["a/b", "a b", "../a", "b_seed=1", "b", "", "a" * 300, "ä"]
    names = [name(label=label) for label in awkward] + [name(label="b", seed=1), name()]
    assert len(set(names)) == len(names)
    for each in names:
        assert len(each) < 100
        assert each.isascii()
        assert not set(each) & set('/\\:*?"<>| ')


def test_list_and_status_show_all_runs(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["list"], RUNS) == 0
    listing = capsys.readouterr().out
    assert "walk: Momentum descent on a noisy quadratic" in listing
    assert re.search("--data mnist: seed=0 threads=1 .*batch=7 .*steps=9", listing)

    def rows():
        assert main(["status", *out], RUNS) == 0
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[0]: line for line in lines}

    assert all(rows()[name].endswith("not run") for name in ("walk", "fitted_mnist"))
    do(tmp_path, seed=3)
    main(["run", "doomed", "--checkpoint-seconds", "0", *out], RUNS)
    capsys.readouterr()
    assert "60/60" in rows()["walk_seed=3"]
    assert "loss" in rows()["walk_seed=3"]
    assert rows()["walk_seed=3"].endswith("finished")
    assert "10/30" in rows()["doomed"]
    assert rows()["doomed"].endswith("partial")
    half(tmp_path / "out" / "walk_seed=3.npz")
    assert "damaged" in rows()["walk_seed=3"]
    assert "walk_seed=3.npz" in rows()["walk_seed=3"]


def test_committed_runs_can_be_configured_and_have_records_that_read():
    runs = runner.registry()
    for name, run in runs.items():
        assert run.setup.__doc__, f"the setup of {name} needs a docstring for `list`"
        for data in run.data or [None]:
            config = runner.configure(runs, name, data)
            assert json.loads(json.dumps(config)) == config
    for path in runner.RESULTS.glob("*.json"):
        assert load_record(path)["name"] == path.stem


if __name__ == "__main__":
    sys.exit(main(runs=RUNS))


def test_other_library_versions_are_mixed_only_when_told_to(tmp_path, monkeypatch):
    do(tmp_path, steps=20)
    versions = runner._versions() | {"numpy": "0.0"}
    monkeypatch.setattr(runner, "_versions", lambda: versions)
    with pytest.raises(runner.RunError, match="--mixed"):
        do(tmp_path)
    config = runner.configure(RUNS, "walk")
    record = runner.execute(RUNS["walk"], config, tmp_path / "out", mixed=True, progress=False)
    assert record["versions"]["numpy"] == "0.0"


def test_seconds_are_those_of_all_sessions(tmp_path, monkeypatch):
    now = itertools.count(0.0, 10.0)  # each look at the clock costs ten seconds
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(now))
    first = do(tmp_path, steps=20)["seconds"]
    saved = runner.checkpoints(tmp_path / "runs" / "walk")[0][0][2]["seconds"]
    monkeypatch.setattr(runner.time, "perf_counter", lambda: 0.0)
    assert do(tmp_path, steps=40)["seconds"] == saved > first / 2


def test_checkpoints_are_an_interval_apart_whatever_the_points_of_the_curves(tmp_path, monkeypatch):
    now, saved, save = [0.0], [], runner.save_snapshot
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        runner, "save_snapshot", lambda *a, **meta: (saved.append(a[1].step), save(*a, **meta))
    )

    def setup(_config, _data, rng):
        def step(state, _):
            now[0] += 10.0
            return state, {"loss": 1.0}

        return runner.Parts({"x": rng.random()}, step)

    run = runner.Run(setup, {"steps": 11, "log_every": 8})
    config = runner.configure({"ten": run}, "ten")
    runner.execute(run, config, tmp_path / "out", checkpoint_seconds=30.0, progress=False)
    assert saved == [3, 6, 9, 11]


def test_a_metric_called_step_does_not_take_the_place_of_the_step(tmp_path):
    def setup(_, __, rng):
        step = lambda state, _: (state, {"step": 0.5, "loss": 1.0})
        return runner.Parts({"x": rng.random(2)}, step)

    runs = {"named": runner.Run(setup, {"steps": 4, "log_every": 2})}
    runner.execute(runs["named"], runner.configure(runs, "named"), tmp_path, progress=False)
    lines = (tmp_path / "runs" / "named" / "log.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("at_the_end", [np.nan, np.inf])
def test_a_scalar_that_is_not_finite_at_the_end_leaves_no_record(tmp_path, at_the_end):
    def setup(_, __, rng):
        step = lambda state, _: (state, {"loss": 1.0})
        return runner.Parts({"x": rng.random(2)}, step, finish=lambda *_: ({"bad": at_the_end}, {}))

    runs = {"late": runner.Run(setup, {"steps": 2})}
    with pytest.raises(FloatingPointError, match="after the last step: bad not finite"):
        runner.execute(runs["late"], runner.configure(runs, "late"), tmp_path, progress=False)
    assert not list(tmp_path.glob("*.json"))


def test_images_to_evaluate_on_are_a_fixed_random_choice():
    assert runner.chosen(5, 5).tolist() == runner.chosen(5, 9).tolist() == [0, 1, 2, 3, 4]
    few = runner.chosen(10_000, 200)
    assert len(set(few.tolist())) == 200 and few.tolist() == runner.chosen(10_000, 200).tolist()
    # A test set sorted by digit: each tenth of it must be there, not the first alone.
    assert np.min(np.bincount(few // 1000, minlength=10)) >= 8
