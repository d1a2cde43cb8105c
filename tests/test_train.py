"""The training loop is a pure function of its arguments; its files are whole or known as torn."""

import errno
import io
import os
import re
import threading
from typing import NamedTuple

import numpy as np
import pytest

from minigrad import train, tree

FIXED_RNG = 20


class Descent(NamedTuple):
    """Plain gradient descent; its state holds numbers of several types."""

    rate: float

    def init(self, params):
        numbers = {"rate": self.rate, "half": np.float32(0.5), "count": 0}
        return {**numbers, "sum": tree.map(np.zeros_like, params)}

    def update(self, grads, state, params):
        total = tree.map(np.add, state["sum"], grads)
        rate = 2 * state["rate"] * state["half"]
        params = tree.map(lambda p, g: p - rate * g, params, grads)
        return params, {**state, "count": state["count"] + 1, "sum": total}


def regression():
    """A small linear regression in float32, on batches drawn from the generator."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 7)).astype(np.float32)
    y = x @ rng.standard_normal((7, 3)).astype(np.float32)

    def loss(params, rng):
        rows = rng.integers(200, size=16)
        return np.mean(np.square(x[rows] @ params["w"] + params["b"] - y[rows]))

    params = {"w": np.zeros((7, 3), np.float32), "b": np.zeros(3, np.float32)}
    optimizer = Descent(0.05)
    state = {"params": params, "optimizer": optimizer.init(params)}
    return train.descent(loss, optimizer), state


def count(state, _):
    """A step that counts, and whose metric is the count."""
    return {"n": state["n"] + 1}, {"n": state["n"] + 1}


def rng():
    return np.random.default_rng(FIXED_RNG)


def same(a, b):
    """Whether two trees are equal to the bit: structure, types, dtypes, memory order, values."""
    kinds = [[(type(x), getattr(x, "dtype", None)) for x in tree.leaves(t)] for t in (a, b)]
    layouts = [[getattr(x, "strides", None) for x in tree.leaves(t)] for t in (a, b)]
    values = [[np.asarray(x).tobytes() for x in tree.leaves(t)] for t in (a, b)]
    return (
        tree.flatten(a)[1] == tree.flatten(b)[1]
        and kinds[0] == kinds[1]
        and layouts[0] == layouts[1]
        and values[0] == values[1]
    )


def test_curves_hold_means_over_intervals_and_evaluations_at_their_steps():
    state, curves = train.fit(
        count,
        {"n": 0},
        11,
        rng(),
        log_every=4,
        eval_every=3,
        evaluate=lambda state, _: {"square": state["n"] ** 2},
        progress=False,
    )
    assert state == {"n": 11}
    assert curves == {
        "n": {"steps": [4, 8], "values": [2.5, 6.5]},
        "square": {"steps": [3, 6, 9], "values": [9.0, 36.0, 81.0]},
    }


def test_fit_descends_to_the_solution():
    step, state = regression()
    _, curves = train.fit(step, state, 600, rng(), progress=False)
    values = curves["loss"]["values"]
    assert values[-1] < 1e-4 * values[0]


def test_descent_passes_aux_metrics_on_and_keeps_float32():
    def loss(w, _):
        return np.sum(w * w), {"norm": 7.0}

    step = train.descent(loss, Descent(0.5), has_aux=True)
    w = np.array([1.0, 2.0], np.float32)
    state, metrics = step({"params": w, "optimizer": Descent(0.5).init(w)}, rng())
    assert metrics == {"loss": 5.0, "norm": 7.0}
    assert state["params"].dtype == np.float32
    np.testing.assert_array_equal(state["params"], [0, 0])


def test_a_run_goes_on_bit_for_bit_from_each_of_its_snapshots(tmp_path):
    step, state = regression()
    everything = dict(
        log_every=5,
        eval_every=4,
        evaluate=lambda state, rng: {"noise": rng.standard_normal() + state["params"]["b"][0]},
        progress=False,
    )
    files = []

    def keep(snapshot, _):
        files.append(tmp_path / f"{snapshot.step}.npz")
        train.save_snapshot(files[-1], snapshot, note="here")

    state_23, _ = train.fit(step, state, 23, rng(), on_point=keep, **everything)
    whole, curves = train.fit(step, state, 40, rng(), **everything)
    assert [int(f.stem) for f in files] == [4, 5, 8, 10, 12, 15, 16, 20, 23]
    assert not same(state_23, whole)
    for file in files:
        snapshot, meta = train.load_snapshot(file, state)
        assert meta == {"note": "here"}
        # A generator with another seed: all of it must come from the snapshot.
        other = np.random.default_rng(99)
        resumed, resumed_curves = train.fit(step, state, 40, other, start=snapshot, **everything)
        assert same(whole, resumed)
        assert curves == resumed_curves


def test_a_snapshot_is_taken_between_points_when_it_is_due(tmp_path):
    step, state = regression()
    settings, seen, due = dict(log_every=5, progress=False), [], [0]

    def keep(snapshot, entry):
        seen.append((snapshot.step, bool(entry)))
        train.save_snapshot(tmp_path / f"{snapshot.step}.npz", snapshot)

    def every_third():
        due[0] += 1
        return due[0] % 3 == 0

    whole = train.fit(step, state, 8, rng(), on_point=keep, due=every_third, **settings)
    assert seen == [(3, False), (5, True), (6, False), (8, False)]
    snapshot, _ = train.load_snapshot(tmp_path / "3.npz", state)
    resumed = train.fit(step, state, 8, np.random.default_rng(99), start=snapshot, **settings)
    assert same(whole[0], resumed[0]) and whole[1] == resumed[1]


def test_states_lie_in_memory_alike_in_whole_and_resumed_runs(tmp_path):
    # BLAS may sum in another order when strides differ, and change the last bit; so may a loop
    # over a dict when its order differs.
    def step(state, _):
        seen = {"stride": state["x"].strides[1], "x comes first": next(iter(state)) == "x"}
        return {"x": np.repeat(state["x"] + 1, 2, axis=1)[:, ::2], "a": state["a"]}, seen

    def keep(snapshot, _):
        if snapshot.step == 3:
            train.save_snapshot(tmp_path / "x.npz", snapshot)

    state, settings = {"x": np.zeros((3, 4)), "a": 0}, dict(log_every=1, progress=False)
    _, curves = train.fit(step, state, 6, rng(), on_point=keep, **settings)
    start, _ = train.load_snapshot(tmp_path / "x.npz", state)
    assert train.fit(step, state, 6, rng(), start=start, **settings)[1] == curves


def test_evaluation_does_not_touch_the_training_stream():
    step, state = regression()
    plain, _ = train.fit(step, state, 20, rng(), progress=False)
    evaluated, _ = train.fit(
        step,
        state,
        20,
        rng(),
        eval_every=3,
        evaluate=lambda _, rng: {"u": rng.random()},
        progress=False,
    )
    assert same(plain, evaluated)


def test_side_generators_differ_from_place_to_place_and_leave_the_main_one_alone():
    main = rng()
    before = main.bit_generator.state
    first = train.side_rng(main).random(3)
    np.testing.assert_array_equal(first, train.side_rng(main).random(3))
    assert main.bit_generator.state == before
    assert not np.array_equal(first, main.random(3))
    assert not np.array_equal(first, train.side_rng(main).random(3))


def falling(state, rng):
    """The logarithm's argument is 5 - n: NaN first in step 7 (n = 6), with one draw per step."""
    from minigrad import value_and_grad

    noise = 1.0 + 0.0 * rng.random()
    with np.errstate(invalid="ignore", divide="ignore"):
        value, grad = value_and_grad(lambda w: np.sum(np.log(w * noise)))(5.5 - state["n"])
    del grad
    return {"n": state["n"] + 1.0}, {"loss": value}


def test_a_nan_stops_the_run_and_names_step_and_operation():
    snapshots = []
    with pytest.raises(FloatingPointError, match=r"step 7: loss is nan; .*\blog\b"):
        train.fit(
            falling,
            {"n": 0.0},
            20,
            rng(),
            log_every=5,
            on_point=lambda snapshot, _: snapshots.append(snapshot.step),
            progress=False,
        )
    assert snapshots == [5]


def test_a_nan_that_enters_the_state_unseen_is_traced_to_its_step():
    def step(state, _):
        n = state["n"] + 1
        hidden = np.array([np.nan]) if n >= 13 else np.zeros(1)
        return {"n": n, "hidden": hidden}, {"loss": 1.0}

    with pytest.raises(FloatingPointError, match="step 13: hidden of the state is not finite"):
        train.fit(step, {"n": 0, "hidden": np.zeros(1)}, 50, rng(), log_every=10, progress=False)
    with pytest.raises(FloatingPointError, match="before the first step: n "):
        train.fit(count, {"n": np.inf}, 5, rng(), progress=False)


def test_an_infinite_evaluation_stops_the_run():
    with pytest.raises(FloatingPointError, match="evaluation after step 2: bound is inf"):
        train.fit(
            count,
            {"n": 0},
            9,
            rng(),
            eval_every=2,
            evaluate=lambda *_: {"bound": np.inf},
            progress=False,
        )


def test_a_step_with_hidden_state_is_found_out():
    calls = []

    def step(state, _):
        calls.append(1)
        return state, {"loss": np.nan if len(calls) == 3 else 0.0}

    with pytest.raises(FloatingPointError, match="depends on more than state and rng"):
        train.fit(step, {"n": 0}, 5, rng(), progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((count, {"n": 0}, 3, 0), TypeError, "default_rng"),
        ((count, {"n": 0}, -1, rng()), ValueError, "steps must be"),
        ((count, {"n": 0}, 2.5, rng()), ValueError, "steps must be"),
        ((lambda s, _: s, {"n": 0}, 3, rng()), TypeError, "must return .state, metrics."),
        ((lambda s, _: (s, {"a": np.ones(3)}), {"n": 0}, 3, rng()), TypeError, "'a' must be a sca"),
    ],
)
def test_fit_refuses_bad_arguments_in_words(arguments, error, message):
    with pytest.raises(error, match=message):
        train.fit(*arguments, progress=False)


def test_fit_refuses_colliding_names_and_a_past_end():
    with pytest.raises(ValueError, match=r"both return \['n'\]"):
        train.fit(
            count,
            {"n": 0},
            4,
            rng(),
            log_every=2,
            eval_every=2,
            evaluate=lambda *_: {"n": 1.0},
            progress=False,
        )
    start = train.Snapshot(7, {"n": 7}, rng().bit_generator.state, {}, {})
    with pytest.raises(ValueError, match="7 steps already"):
        train.fit(count, {"n": 0}, 5, rng(), start=start, progress=False)


def test_no_progress_bar_off_a_terminal(capfd):
    train.fit(count, {"n": 0}, 5, rng())
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_steps_and_time_left(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    start = train.Snapshot(2, {"n": 2}, rng().bit_generator.state, {}, {})
    train.fit(count, {"n": 0}, 8, rng(), start=start, log_every=4)
    assert re.search(r"2/8 \[.*<\?", terminal.getvalue())
    assert re.search(r"8/8 \[.*<00:00.*n=6\.5", terminal.getvalue())


# Files

ARRAYS = {
    "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "file": np.float64(0.1),
    "empty": np.zeros((0, 4), np.uint8),
    "half": np.asfortranarray(np.ones((3, 2), np.float16)),
}


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_come_back_as_they_were(tmp_path, compress):
    meta = {"third": 1 / 3, "big": 2**100, "list": [1, None]}
    train.save_arrays(tmp_path / "x.npz", ARRAYS, meta, compress=compress)
    arrays, loaded = train.load_arrays(tmp_path / "x.npz")
    assert loaded == meta
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as plain:  # an ordinary .npz to others
        np.testing.assert_array_equal(plain["a/b"], ARRAYS["a/b"])


def test_an_archive_is_the_same_to_the_byte_at_any_time(tmp_path, monkeypatch):
    train.save_arrays(tmp_path / "x.npz", ARRAYS, compress=True)
    first = (tmp_path / "x.npz").read_bytes()
    for name in ("time", "time_ns"):
        monkeypatch.setattr(f"time.{name}", lambda: 2_000_000_000)
    train.save_arrays(tmp_path / "x.npz", ARRAYS, compress=True)
    assert (tmp_path / "x.npz").read_bytes() == first


@pytest.mark.parametrize("compress", [False, True])
def test_any_altered_byte_or_torn_end_is_noticed_or_harmless(tmp_path, compress):
    path = tmp_path / "x.npz"
    train.save_arrays(path, ARRAYS, {"step": 3}, compress=compress)
    whole = path.read_bytes()
    noticed = 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :])
        try:
            arrays, meta = train.load_arrays(path)
        except train.DamagedFile as error:
            assert str(path) in str(error)
            noticed += 1
        else:  # a date, say, in a header of the zip format
            assert meta == {"step": 3}
            assert list(arrays) == list(ARRAYS)
            assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert noticed > 0.7 * len(whole)
    for i in range(len(whole)):
        path.write_bytes(whole[:i])
        with pytest.raises(train.DamagedFile):
            train.load_arrays(path)


def test_an_archive_without_its_checksum_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.ones(3))
    with pytest.raises(train.DamagedFile, match="checksum"):
        train.load_arrays(path)


def test_objects_are_neither_written_nor_read(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        train.save_arrays(path, {"a": np.array([object()])})
    assert not path.exists()
    # A pickle under a right checksum is not read either.
    write = np.lib.format.write_array
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", lambda *args, allow_pickle: write(*args))
        train.save_arrays(path, {"a": np.array([{}], object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        train.load_arrays(path)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    train.write_atomic(path, b"old")
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OSError, match=f"No space left on device.*{path}") as caught:
        train.write_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of POSIX systems")
    path = tmp_path / "x"
    train.write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the system itself stops the write after 4096 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(OSError, match=str(path)):
            train.write_atomic(path, b"new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_two_writers_of_one_file_do_not_tear_it(tmp_path):
    path, contents, errors = tmp_path / "x", [b"A" * 2_000_000, b"B" * 300_000], []
    path.write_bytes(contents[0])

    def write(content):
        for _ in range(10):
            try:
                train.write_atomic(path, content)
            except OSError as error:
                errors.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    [writer.start() for writer in writers]
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(path.read_bytes() in contents)
    assert all(seen) and not errors and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("bits", ["MT19937", "Philox", "SFC64"])
def test_a_snapshot_keeps_the_state_of_any_bit_generator(tmp_path, bits):
    make = lambda seed: np.random.Generator(getattr(np.random, bits)(seed))

    def step(state, rng):
        return {"w": state["w"] + rng.standard_normal(2)}, {"loss": 0.0}

    def keep(snapshot, _):
        train.save_snapshot(tmp_path / f"{snapshot.step}.npz", snapshot)

    state, fit = {"w": np.zeros(2)}, lambda *a, **k: train.fit(step, *a, progress=False, **k)[0]
    fit(state, 4, make(0), on_point=keep)
    snapshot, _ = train.load_snapshot(tmp_path / "4.npz", state)
    assert same(fit(state, 8, make(0)), fit(state, 8, make(1), start=snapshot))


def test_a_metric_that_some_steps_return_is_averaged_over_those():
    def step(state, _):
        n = state["n"] + 1
        return {"n": n}, {"all": 1.0} | ({"some": 5.0} if n % 4 == 0 else {})

    curves = train.fit(step, {"n": 0}, 10, rng(), log_every=10, progress=False)[1]
    assert curves["all"]["values"] == [1.0] and curves["some"]["values"] == [5.0]


def test_the_loss_is_not_replaced_by_a_metric_of_its_name():
    step = train.descent(lambda w, _: (np.sum(w * w), {"loss": 7.0}), Descent(0.5), has_aux=True)
    with pytest.raises(ValueError, match="rename"):
        step({"params": np.ones(2), "optimizer": Descent(0.5).init(np.ones(2))}, rng())


def test_a_refused_record_leaves_the_old_one_and_keys_come_back_as_strings(tmp_path):
    path = tmp_path / "r.json"
    train.save_record(path, {"a": 1}, {"x": np.arange(3)})
    for bad in float("nan"), np.float32(1):
        with pytest.raises((ValueError, TypeError)):
            train.save_record(path, {"a": bad}, {"x": np.arange(4)})
        assert train.load_record(path)["a"] == 1
    train.save_record(path, {"a": {2: 1, 10: 2}}, {})
    assert train.load_record(path)["a"] == {"2": 1, "10": 2}


def test_a_snapshot_of_another_model_is_refused_by_name(tmp_path):
    path = tmp_path / "x.npz"
    state = {"w": np.ones(2), "b": np.ones(1)}
    train.save_snapshot(path, train.Snapshot(1, state, rng().bit_generator.state, {}, {}))
    with pytest.raises(ValueError, match=r"another model.*\['b', 'c'\]"):
        train.load_snapshot(path, {"w": np.ones(2), "c": np.ones(1)})


def test_a_state_that_cannot_be_saved_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    for state, error, message in [
        ({"w": "text"}, TypeError, "w of the state must be an array or a number, got a str"),
        ({"a": {"b": 1.0}, "a/b": 2.0}, ValueError, "same path"),
    ]:
        with pytest.raises(error, match=message):
            train.save_snapshot(path, train.Snapshot(1, state, {}, {}, {}))
    assert not path.exists()


def test_records_come_back_and_tell_when_one_of_their_files_was_altered(tmp_path):
    path, beside = tmp_path / "r.json", tmp_path / "r.npz"
    record = {"config": {"steps": 3}, "curves": {}, "scalars": {"x": 0.1}}
    train.save_record(path, record, {"z": np.arange(3.0)})
    loaded = train.load_record(path)
    np.testing.assert_array_equal(loaded.pop("arrays")["z"], np.arange(3.0))
    assert loaded == record

    text = path.read_text()
    path.write_text(text.replace('"steps": 3', '"steps": 4'))
    with pytest.raises(train.DamagedFile, match=r"r\.json is damaged"):
        train.load_record(path)
    path.write_text(text[:-10])
    with pytest.raises(train.DamagedFile, match=r"r\.json is damaged"):
        train.load_record(path)
    path.write_text(text)
    train.save_arrays(beside, {"z": np.arange(4.0)})
    with pytest.raises(train.DamagedFile, match=r"r\.npz does not belong to r\.json"):
        train.load_record(path)
    beside.unlink()
    with pytest.raises(train.DamagedFile, match=r"r\.npz is missing"):
        train.load_record(path)
    train.save_record(path, record, {"z": np.arange(3.0)})
    train.save_record(path, record, {})
    assert train.load_record(path) == record | {"arrays": {}}
    assert not beside.exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks at /proc")
def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    events, real = [], {call: getattr(os, call) for call in ("fsync", "replace")}

    def fsync(descriptor):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append((kind, os.fstat(descriptor).st_size if kind == "file" else None))
        return real["fsync"](descriptor)

    def replace(source, target):
        events.append(("replace", None))
        return real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    train.write_atomic(tmp_path / "x", b"content")
    # All bytes have left Python's buffer when the file is synced.
    assert events == [("file", 7), ("replace", None), ("folder", None)]


def test_the_checksum_covers_names(tmp_path):
    x, path = np.arange(3.0), tmp_path / "x.npz"
    checksum = train.save_arrays(path, {"a": x, "b": x + 1})
    assert checksum == train.save_arrays(path, {"a": x, "b": x + 1})
    assert checksum != train.save_arrays(path, {"a": x, "c": x + 1})
    path.write_bytes(path.read_bytes().replace(b"c.npy", b"d.npy"))  # in both headers of the zip
    with pytest.raises(train.DamagedFile, match="checksum"):
        train.load_arrays(path)


def test_a_snapshot_may_be_started_from_twice():
    curves = {"n": {"steps": [], "values": []}}
    start = train.Snapshot(3, {"n": 3}, rng().bit_generator.state, {"n": (6.0, 3)}, curves)
    first, second = (
        train.fit(count, {"n": 0}, 8, rng(), log_every=4, start=start, progress=False)
        for _ in range(2)
    )
    assert first == second == ({"n": 8}, {"n": {"steps": [4, 8], "values": [2.5, 6.5]}})


def test_a_snapshot_kept_in_memory_stays_as_it_was():
    kept, settings = [], dict(log_every=4, eval_every=3, evaluate=lambda *_: {"e": 1.0})
    settings["progress"] = False
    whole = train.fit(count, {"n": 0}, 9, rng(), on_point=lambda s, _: kept.append(s), **settings)
    for snapshot in kept:
        assert train.fit(count, {"n": 0}, 9, rng(), start=snapshot, **settings) == whole


def test_a_nan_in_the_last_state_is_found_without_a_point():
    def hidden(state, _):
        n = state["n"] + 1
        return {"n": n, "w": np.full(1, np.nan if n == 3 else 0.0)}, {"loss": 1.0}

    seen, state = [], {"n": 0, "w": np.zeros(1)}
    with pytest.raises(FloatingPointError, match="step 3: w of the state is not finite"):
        train.fit(hidden, state, 3, rng(), on_point=lambda *a: seen.append(a), progress=False)
    assert not seen


def test_a_step_with_hidden_state_is_named_with_what_it_did():
    calls = []

    def step(state, _):
        calls.append(1)
        return state, {"loss": np.nan if len(calls) == 3 else 0.0}

    with pytest.raises(FloatingPointError, match="step 3: loss is nan, but not when run again"):
        train.fit(step, {"n": 0}, 5, rng(), progress=False)
