"""What the cells of the published tables compute, on tiny data, beside a direct computation."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp

from chapters import records
from chapters.ch03_score_function import all_bits, exact_log_evidence, nvil, total_log_prob
from chapters.ch05_vae import conv_encode, conv_vae_init, kl_to_prior
from chapters.ch06_importance import bound_step, iwae_bound, vimco_free_signal
from chapters.ch07_concrete import structured_step
from chapters.ch08_control_variates import make_method, training_step
from chapters.ch09_atlas import METHODS as ONE_LAYER_METHODS
from experiments import ch05_conv, ch06, runner, status, sweep
from experiments.ch06 import estimate
from experiments.tables import (
    Cell,
    Table,
    homework,
    iwae,
    plots,
    relax,
    sivi,
    structured,
    trace,
    vq,
)
from minigrad import tree
from minigrad.data import BinarizedData, ImageData, digits
from minigrad.nn import dense
from minigrad.optim import adam
from minigrad.train import Snapshot, load_record, save_record, save_snapshot

ROOT = Path(__file__).resolve().parent.parent
RUNS = runner.registry()
D = 8  # pixels


def image_data(**rows):
    """A data set with images of the given rows; `x_valid` makes it a `BinarizedData`."""
    parts = {name: x.reshape(len(x), 1, 2, -1).astype(np.float32) for name, x in rows.items()}
    if "x_valid" in rows:
        return BinarizedData(**parts)
    return ImageData(**parts, y_train=np.zeros(0), y_test=np.zeros(0))


def bits(n, p, seed=1):
    """Images of bits, each with its own probability of a one: around p."""
    rng = np.random.default_rng(seed)
    return (rng.random((n, D)) < p + np.linspace(-0.2, 0.2, D)).astype(np.float32)


TRAIN, VALID, TEST = bits(70, 0.25), bits(60, 0.75), bits(50, 0.5)
MEAN = TRAIN.mean(0)
BINARY = image_data(x_train=TRAIN, x_valid=VALID, x_test=TEST)


def set_up(name, data_name, data=BINARY, **settings):
    config = runner.configure(RUNS, name, data_name, settings)
    return runner.Parts(*RUNS[name].setup(config, data, np.random.default_rng(0)))


def after(step, state, steps=3):
    """The state after some steps."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        state, _ = step(state, rng)
    return state


def assert_same(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# Autoencoders with bits


@pytest.mark.parametrize(("n", "kept"), [(1400, 1345), (30_000, 10_000)])
def test_validation_images_are_a_random_part_that_is_not_trained_on(n, kept):
    digits = np.arange(n)[:, None] >> np.arange(16) & 1  # image i shows the number i
    data = image_data(x_train=digits, x_test=digits)
    for fresh in (True, False):
        train, valid = (x @ 2 ** np.arange(16) for x in relax.images_of(data, fresh))
        assert sorted([*train, *valid]) == [*range(n)] and len(valid) == kept
        assert 0.4 < np.mean(np.diff(valid) > 0) < 0.6
    grey = data._replace(x_train=0.5 + 0 * data.x_train)
    assert np.all(relax.images_of(grey, True)[0] == 0.5)
    drawn = [*relax.images_of(grey, False), relax.images_of(grey, True)[1]]
    assert all(0.45 < x.mean() < 0.55 and set(np.unique(x)) == {0, 1} for x in drawn)
    assert_same(drawn[:2], relax.images_of(grey, False))


def rebar():
    return make_method("rebar", np.random.default_rng(0), [D, 2], adam(1e-2, b2=0.99999))[0]


GREY = image_data(x_train=np.repeat(0.8 * TRAIN + 0.1, 40, 0), x_test=TEST)  # bits are fresh


@pytest.mark.parametrize(
    ("run", "data", "images", "batch", "of_chapter"),
    [
        ("discrete_vae", BINARY, (TRAIN, VALID), 24, {"rebar": rebar()}),
        ("estimator_vae", GREY, relax.images_of(GREY, True), 50, ONE_LAYER_METHODS),
    ],
)
def test_a_discrete_autoencoder_is_trained_and_validated_as_its_table_says(
    run, data, images, batch, of_chapter
):
    train, valid = images
    mean, method = train.mean(0), "rebar" if run == "discrete_vae" else "disarm"
    parts = set_up(run, None, data, method=method, latents=2, watched=20, validated=60)
    twin = training_step(train, mean, adam(1e-3, b2=0.99999), batch, of_chapter[method])
    state = after(parts.step, parts.state)
    assert_same(state, after(twin, parts.state))
    few, many = (valid[runner.chosen(len(valid), n)] for n in (20, 60))
    rng, exact = np.random.default_rng(2), lambda x: exact_log_evidence(state["params"], x, mean)
    assert parts.evaluate(state, rng)["valid_bound"] == pytest.approx(exact(few).mean(), abs=0.1)
    assert parts.finish(state, rng)[0]["valid_bound"] == pytest.approx(exact(many).mean(), abs=0.1)
    bound = relax.many_sample_bound(state["params"], many, mean, rng, 5000)
    assert bound == pytest.approx(exact(many).mean(), abs=5e-3)


@pytest.mark.parametrize(
    "name, key",
    [
        *[(name, "method") for name in ("discrete_vae", "structured", "iwae_schedule")],
        *[("bernoulli_vae_linear_1", key) for key in ("method", "model")],
        *[("gradient_variance", key) for key in ("follow", "model")],
        ("pixelvae", "cure"),
    ],
)
def test_an_unknown_method_is_answered_with_those_there_are(name, key):
    with pytest.raises(runner.RunError, match=rf"{key} must be one of .*; got 'nowhere'"):
        set_up(name, None, **{key: "nowhere"})


@pytest.mark.parametrize("name, cells", [("estimator_bits", 16), ("labels", 30)])
def test_a_run_of_cells_has_a_step_for_each(name, cells):
    for steps in (1, cells + 1):
        with pytest.raises(runner.RunError, match=f"there are {cells}: --steps {cells}"):
            set_up(name, None, steps=steps)


def test_the_model_of_the_evidence_is_part_of_the_state(monkeypatch):
    small = {"steps": 2, "batch": 2, "samples": 100, "ais_images": 0}
    parts = set_up("evidence", "digits", digits(), **small)
    rng = np.random.default_rng(0)
    state, _ = parts.step(parts.state, rng)
    rest = parts.step(state, np.random.default_rng(1))[0]
    other = tree.map(lambda p: 2 * p, parts.state["model"])  # the record, made anew meanwhile
    monkeypatch.setattr(ch06, "recorded_conv_params", lambda _: other)
    resumed = set_up("evidence", "digits", digits(), **small).step(state, np.random.default_rng(1))[
        0
    ]
    assert_same(rest, resumed)
    assert "model" not in parts.finish(rest, rng)[1]


def test_relax_learns_its_control_variate_before_the_model():
    small = {"method": "relax", "latents": 2, "control_width": 3, "pretraining": 2}
    parts = set_up("discrete_vae", None, **small)
    states = [after(parts.step, parts.state, n) for n in (0, 2, 3)]
    weights = [s["params"]["encoder"][0][0]["w"] for s in states]
    controls = [s["control"]["params"]["networks"][0]["layers"][0]["w"] for s in states]
    assert np.all(weights[0] == weights[1]) and np.all(weights[1] != weights[2])
    assert np.all(controls[0] != controls[1])


def test_the_trace_starts_from_weights_of_the_published_law():
    small = {"latents": 60, "watched": 20}
    glorot = set_up("discrete_vae", None, model="linear_2", **small).state
    he = set_up("rebar_trace", None, **small).state
    assert_same(glorot["control"], he["control"])
    for old, new in zip(tree.leaves(glorot["params"]), tree.leaves(he["params"]), strict=True):
        assert old.dtype == new.dtype and old.shape == new.shape
        if old.ndim < 2:
            assert np.all(old == new)
        else:  # a normal law cut off at two deviations has 0.774 of its variance
            standard = new / np.sqrt(2.6 / len(new))
            assert np.max(np.abs(standard)) < 2 and 0.6 < np.var(standard) < 0.95


# VAE and IWAE


def test_the_learning_rate_falls_by_stages_of_three_times_the_epochs():
    expected = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]  # of each epoch
    found = [iwae.schedule()(2980 * epoch + step) for epoch in range(3280) for step in (0, 2979)]
    np.testing.assert_allclose(found, np.repeat(expected, 2))


@pytest.mark.parametrize(("method", "k"), [("iwae", 2), ("vae", 3)])
def test_vae_and_iwae_are_trained_and_tested_as_the_table_says(method, k):
    train = np.concatenate([np.resize(TRAIN, (59_600, D)), np.ones((400, D))])
    test = TEST * (np.arange(D) < D - 1)
    data = image_data(x_train=train, x_test=test)
    parts = set_up("iwae_schedule", None, data, method=method, k=k, tested=40, test_samples=30)
    mean = train[:59_600].mean(0)
    start = parts.state["params"]
    np.testing.assert_allclose(start["decoder"]["logits"]["b"], np.log(mean / (1 - mean)), 1e-4)
    bound = {"iwae": iwae_bound, "vae": lambda log_w: np.mean(log_w, axis=0)}[method]
    twin = bound_step(bound, adam(1e-3, eps=1e-4), train[:59_600].astype(np.float32), 20, k, 50)
    state = after(parts.step, parts.state, 2)
    assert_same(state, after(twin, parts.state, 2))

    # three latents alone see an image, and its last pixel alone, which is off in the test images
    encoder = start["encoder"]
    (first, second), loc = encoder["hidden"], encoder["loc"]
    first = first | {"w": 9 * first["w"] * (np.arange(D) == D - 1)[:, None]}
    loc = loc | {"w": 9 * loc["w"] * (np.arange(50) < 3)}
    state = {"params": start | {"encoder": encoder | {"hidden": [first, second], "loc": loc}}}
    scalars, _ = parts.finish(state, np.random.default_rng(2))
    x = test[runner.chosen(len(test), 40)]
    values = -estimate(state["params"], x, np.random.default_rng(2), 30)
    assert scalars["test_nll"] == np.mean(values) > 0 and scalars["active_units"] == 3
    assert scalars["test_nll_se"] == pytest.approx(np.sqrt(np.var(values) / 39))
    values = -estimate(state["params"], x, np.random.default_rng(2), 50)
    assert parts.evaluate(state, np.random.default_rng(2)) == {"test_nll_50": np.mean(values)}


# Structured prediction


def exact_nll(layers, centres, x, mean):
    """Minus log p(lower half | upper half), by the sum over all bits of two layers."""
    above, total = 2 * (x - mean)[:, : D // 2], []
    for first in all_bits(2):
        hidden = dense(layers[1], 2 * first - 1 - centres[0])
        for second in all_bits(2):
            pixels = dense(layers[2], 2 * second - 1 - centres[1])
            total.append(
                total_log_prob(dense(layers[0], above), first)
                + total_log_prob(hidden, second)
                + total_log_prob(pixels, x[:, D // 2 :])
            )
    return -np.mean(logsumexp(total, axis=0))


@pytest.mark.parametrize(("method", "m"), [("concrete", 1), ("nvil", 1), ("vimco", 5)])
def test_lower_halves_are_learned_and_predicted_as_the_table_says(method, m):
    small = {"units": 2, "evaluated": 40, "evaluation_samples": 2000}
    parts = set_up("structured", None, method=method, m=m, **small)
    start, below = parts.state["params"], MEAN[D // 2 :]
    np.testing.assert_allclose(start[-1]["b"], np.log(below / (1 - below)), 1e-4)
    signal = {"concrete": None, "nvil": nvil, "vimco": vimco_free_signal}[method]
    twin = structured_step(TRAIN, MEAN, adam(3e-4), 64, signal, m, 2 / 3, 1e-3)
    state = after(parts.step, parts.state)
    assert_same(state, after(twin, parts.state))

    params = tree.map(lambda p: 2 * p, state["params"])
    found, _ = parts.finish(state | {"params": params}, np.random.default_rng(2))
    for part, x in {"train": TRAIN, "test": TEST}.items():
        exact = exact_nll(params, state["centres"], x[runner.chosen(len(x), 40)], MEAN)
        assert found[f"{part}_nll"] == pytest.approx(exact, abs=0.02)
    assert parts.evaluate(state, np.random.default_rng(2)).keys() == found.keys()


# What is shown of a record, and beside it


def test_the_trace_shows_the_mean_of_the_epoch_that_ends_at_the_step():
    steps = [2084, 4168, 6252, 8336]
    record = {"curves": {"elbo": {"steps": steps, "values": [-4.0, -3.0, -2.0, -1.0]}}}
    for cell in trace.TABLE.cells:
        value = cell.values["training ELBO"](record)
        assert value == (steps.index(int(cell.row.split()[1])) - 4.0, None)
        assert cell.values["training ELBO"]({"curves": {}}) == (None, None)
        settings = RUNS[cell.run].defaults | cell.settings
        assert settings["log_every"] == 2084 and settings["steps"] == 8336


def elbo_of(record, steps=relax.SETTINGS["steps"]):
    """The training ELBO of the epoch that ends at `steps`: a record may go on."""
    curve = record["curves"]["elbo"]
    return curve["values"][curve["steps"].index(steps)]


def test_the_trace_is_near_the_published_one_and_its_seeds_are_nearer():
    published = [float(number) for number in trace.PUBLISHED.values()]
    name = "rebar_trace_binarized_mnist"
    names = [f"{name}_method=rebar_towards_mean", name, *(f"{name}_seed={s}" for s in (1, 2, 3))]
    first, *rest = (
        [elbo_of(records.load(found), epoch * 2084) for epoch in trace.PUBLISHED] for found in names
    )
    assert np.max(np.abs(np.subtract(first, published))) < 1.1
    assert np.all(np.ptp(rest, axis=0) < [0.6, 0.7, 0.3, 0.4])
    assert np.min(np.subtract(published, rest)) > 0.8


def test_a_smaller_rate_is_better_for_the_nonlinear_model_and_more_so_for_rebar():
    load = lambda name: elbo_of(records.load(name))
    gains, settings = {}, {"concrete": "method=concrete_", "rebar": "", "relax": "method=relax_"}
    for method, setting in settings.items():
        name = f"discrete_vae_binarized_mnist_{{}}{setting}model=nonlinear"
        gains[method] = load(name.format("learning_rate=0.0003_")) - load(name.format(""))
    assert min(gains.values()) > 1 and gains["rebar"] > gains["concrete"] + 1


def test_the_wider_decoder_is_behind_the_narrow_one_after_our_steps():
    found = plots.places(relax.TABLE, RUNS)
    elbo = {(place.cell.row, place.cell.column): elbo_of(place.record) for place in found}
    for row in ("MNIST, nonlinear", "Omniglot, nonlinear"):
        for column in relax.COLUMN.values():
            assert elbo[row, column] > elbo[f"{row}, wide", column] + 0.5


def test_distances_of_three_fits_are_those_of_the_row_with_their_standard_error():
    Ks = {"fixed": sivi.CONFIG["extra"], "learned": sivi.CONFIG["extra_learned"]}
    keys = {"KS distance of r": "ks_r", "KS distance of p": "ks_p", "divergence": "divergence"}
    arrays = {
        f"{kind}_{key}": np.add.outer([0.0, 1.0, 2.0], np.array(Ks[kind]) + 0.5 ** len(kind + key))
        for kind in Ks
        for key in keys.values()
    }
    for cell in sivi.TABLE.cells:
        kind, K = cell.column.split()[1].replace("0.1", "fixed"), int(cell.row.split()[2])
        for label, key in keys.items():
            value, error = cell.values[label]({"arrays": arrays})
            assert value == pytest.approx(K + 1 + 0.5 ** len(kind + key), rel=1e-9)
            assert error == pytest.approx(3**-0.5)


def test_squared_error_is_shown_as_a_share_of_the_variance():
    record = {"scalars": {"test_squared_error": 2.0, "test_pixel_variance": 8.0}}
    assert vq.VALUES["squared error"](record) == (0.25, None)


def test_bounds_of_a_convolutional_vae_are_exact_where_pixels_do_not_depend_on_the_latents():
    params = conv_vae_init(np.random.default_rng(0), 8, 4, 1, 3)
    x, rng = np.random.default_rng(1).random((5, 1, 8, 8), np.float32), np.random.default_rng(2)
    constant = lambda _, z, x: np.full(z.shape[:-1], -3.0)
    divergence = kl_to_prior(*conv_encode(params["encoder"], x))
    assert np.min(divergence) > 0.1
    bounds = ch05_conv.conv_bounds(params, x, constant, rng, 10_000)
    np.testing.assert_allclose(bounds, -3.0, atol=0.05)
    found = ch05_conv.conv_elbos(params, x, constant, rng)
    np.testing.assert_allclose(found, np.stack([-3 - divergence, divergence], axis=1), rtol=1e-5)


def test_an_error_is_the_standard_error_of_the_mean():
    assert runner.with_error("x", np.float32([1, 2, 3, 6])) == {
        "x": 3.0,
        "x_se": (14 / 3 / 4) ** 0.5,
    }


def test_rows_of_the_homework_show_what_they_are_named_after():
    for cell in homework.TABLE.cells:
        names = [*cell.values.values(), *map(str, cell.settings.values())]
        if cell.run in ("flow_vae", "pixelvae"):
            assert any("flow" in name for name in names) == ("flow" in cell.row), cell.row
            assert ("free-bits" in "".join(names)) == ("free bits" in cell.row), cell.row
        if cell.run == "conv_gaussian":
            assert ("closed" in names[0]) == ("closed" in cell.row)


def test_published_numbers_are_those_of_the_chapter_and_of_the_notes():
    text = (ROOT / "chapters" / "ch08_control_variates.py").read_text(encoding="utf-8")
    found = re.findall(r"^# \| (MNIST|Omniglot), ([^|]+) \|(.*)\|$", text.replace("−", "-"), re.M)
    rows = {(data, row): [n.strip(" *") for n in line.split("|")] for data, row, line in found[:8]}
    shown = {}
    for cell in relax.TABLE.cells:
        row = shown.setdefault(tuple(cell.row.split(", ", 1)), {})
        row[cell.column] = cell.published.get("training ELBO", "")
    assert set(shown.pop(("MNIST", "nonlinear, rate 3e-04")).values()) == {""}
    assert len(shown) == len(rows) == 8
    assert all([*row] == ["Concrete", "NVIL", "MuProp", "REBAR", "RELAX"] for row in shown.values())
    for data in ("MNIST", "Omniglot"):
        for l in (1, 2):
            layers = "layer" if l == 1 else "layers"
            assert [*shown[data, f"linear {l}"].values()] == rows[data, f"linear, {l} {layers}"]
        assert [*shown[data, "nonlinear"].values()] == rows[data, "nonlinear, as first written"]
        wide = rows[data, "nonlinear, as printed"][3:]
        assert [*shown[data, "nonlinear, wide"].values()] == ["", "", "", *wide]

    halves = {(cell.row, cell.column): cell.published for cell in structured.TABLE.cells}
    assert all(float(p["training NLL"]) < float(p["test NLL"]) for p in halves.values())
    pairs = [
        halves[f"{layers} layers, m = 50", column]["test NLL"]
        for layers in (2, 3)
        for column in ("NVIL, VIMCO", "Concrete")
    ]
    assert re.findall(r"\d+\.\d", structured.TABLE.notes["b"]) == pairs

    bounds = {(cell.row, cell.column): cell.published for cell in iwae.TABLE.cells}
    assert bounds["k = 1", "VAE"] == bounds["k = 1", "IWAE"]
    for row in ("k = 5", "k = 50"):
        ours, other = bounds[row, "IWAE"], bounds[row, "VAE"]
        assert float(ours["test NLL"]) < float(other["test NLL"])
        assert int(ours["active units"]) > int(other["active units"])


# What becomes of a cell's record


def setup_two(_config, _, rng):
    """A run whose end evaluates anew, under the same name, what its curve shows."""
    step = lambda state, _: (state, {"loss": 1.0})
    evaluate, finish = lambda *_: {"bound": 1.5}, lambda *_: ({"bound": 2.5}, {})
    return runner.Parts({"x": rng.random()}, step, evaluate, finish)


TWO = {"two": runner.Run(setup_two, {"steps": 4, "eval_every": 1, "log_every": 1})}


def cells(*steps):
    shown = {"bound": "bound"}
    return [Cell(f"{n} steps", "ours", "two", None, {"steps": n}, shown) for n in steps]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "runs"))


def test_of_cells_that_share_a_record_the_one_with_most_steps_is_done():
    for order in ((3, 5, 4), (5, 3, 4), (4, 3, 5)):
        found = sweep.configs(Table("", "", cells(*order), {}), TWO)
        assert {name: config["steps"] for name, config in found.items()} == {"two": 5}


def test_a_cell_shows_the_evaluation_of_the_end_and_a_mark_after_fewer_steps_only(tmp_path):
    table = Table("", "", cells(3, 5, 9), {})
    ((name, config),) = sweep.configs(table, TWO, steps=5).items()
    record = runner.execute(TWO["two"], config, tmp_path, mixed=True, progress=False)
    assert record["curves"]["bound"]["values"] == [1.5] * 5
    text = plots.markdown(table, plots.places(table, TWO, lambda _: record), "")
    rows = [line.split(" | ")[2:] for line in text.splitlines() if " | bound | " in line]
    assert rows == [["2.50 |"], ["2.50 |"], ["2.50† |"]]


def test_the_time_left_is_that_of_the_steps_left(tmp_path):
    asked = {steps: runner.configure(TWO, "two", None, {"steps": steps}) for steps in (10, 40)}
    record = {"config": asked[10], "seconds": 20.0, "curves": {}}
    save_record(tmp_path / "two.json", record, {})
    rows = [status.row("two", tmp_path, config) for config in (None, *asked.values())]
    assert [(row["left"], row["state"]) for row in rows] == [
        ("", "finished"),
        ("", "finished"),
        ("60 s", "partial"),
    ]


def test_a_short_trial_elsewhere_does_not_make_a_finished_run_partial(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "two"
    folder.mkdir(parents=True)
    config = runner.configure(TWO, "two", None, {"steps": 40})
    save_record(tmp_path / "two.json", {"config": config, "seconds": 2.0, "curves": {}}, {})
    few = {"config": config | {"steps": 3}, "seconds": 0.1}
    save_snapshot(folder / "checkpoint-a.npz", Snapshot(3, {}, {}, {}, {}), **few)
    assert status.row("two", tmp_path)["state"] == "finished"


def test_a_run_that_has_no_checkpoint_yet_is_listed(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="locks of POSIX systems")
    monkeypatch.setenv("MINIGRAD_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "two_seed=7"
    folder.mkdir(parents=True)
    with open(folder / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        states = {row["name"]: row["state"] for row in status.overview(TWO, tmp_path)}
    assert states["two_seed=7"] == "running"


class Done:
    """A task that is done."""

    def __init__(self, outcome):
        self.result, self.exception = lambda: outcome, lambda: None


class Cluster:
    """Stands for `distributed`, its client and its worker: tasks are done at once, here."""

    def __init__(self):
        self.keys, self.state = [], types.SimpleNamespace(nthreads=1)
        self.Client, self.get_worker = lambda _: self, lambda: self
        self.as_completed = list

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments, key):
        self.keys.append(key)
        return Done(function(*arguments))


def test_a_worker_with_other_sources_is_refused_and_a_task_has_a_key_of_its_own(
    tmp_path, monkeypatch, capsys
):
    cluster = Cluster()
    monkeypatch.setitem(sys.modules, "distributed", cluster)
    table = Table("", "", cells(4), {})
    for steps in (4, 5):
        sweep.sweep(sweep.configs(table, TWO, steps), TWO, dask="here", out=tmp_path, mixed=True)
    assert load_record(tmp_path / "two.json")["config"]["steps"] == 5
    monkeypatch.setattr(sweep, "ORIGIN", sweep.ORIGIN | {"source_hash": "another"})
    sweep.sweep(sweep.configs(table, TWO, 5), TWO, dask="here", out=tmp_path / "new", mixed=True)
    assert len(set(cluster.keys)) == 3
    with pytest.raises(runner.RunError, match="1 of 1 runs failed"):
        sweep.sweep(sweep.configs(table, TWO, 6), TWO, dask="here", out=tmp_path)
    out = capsys.readouterr().out
    assert "the worker {'source_hash': 'another'" in out and "add --mixed" in out
    assert load_record(tmp_path / "two.json")["config"]["steps"] == 5
