"""The driver of the figures, on small books made for the purpose; the style of the real one."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import figures.__main__ as driver
from chapters import records
from chapters.style import COLOUR, rounding
from figures import find, numbers
from minigrad.source import source_hash
from minigrad.train import save_record

ROOT = Path(__file__).parent.parent

CHAPTER = '''
import numpy as np
from chapters import records
from chapters.ch01_helper import SLOPE

def figure_line():
    """A line and a cloud."""
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2)
    x = np.linspace(0, 1, 5)
    axes[0].plot(x, SLOPE * x, label="line")
    axes[1].scatter(*np.random.default_rng(0).standard_normal((2, 3000)))
    return fig

def figure_recorded():
    """The curve of a run."""
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.plot(records.load("run")["arrays"]["curve"])
    return fig

def figure_broken():
    """A figure that cannot be drawn."""
    raise RuntimeError("no such thing")
'''


@pytest.fixture
def book(tmp_path):
    """A book of two chapters and one record; call it with options of `python -m figures`."""
    for folder in ("minigrad", "figures"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=_not_code)
    (tmp_path / "chapters").mkdir()
    for name in ("__init__.py", "records.py", "style.py", "book.mplstyle"):
        shutil.copy(ROOT / "chapters" / name, tmp_path / "chapters")
    (tmp_path / "chapters" / "ch01_helper.py").write_text("SLOPE = 2.0\n")
    (tmp_path / "chapters" / "ch02_main.py").write_text(CHAPTER)
    _save_run(tmp_path, [3.0, 2.0, 1.0])
    environment = dict(os.environ, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")

    def run(*options):
        command = [sys.executable, "-m", "figures", *options]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    run.root = tmp_path
    return run


def _not_code(_, names):
    return [
        name for name in names if name == "__pycache__" or Path(name).suffix in (".svg", ".json")
    ]


def _save_run(root, curve):
    save_record(
        root / "experiments" / "results" / "run.json", {"seed": 0}, {"curve": np.array(curve)}
    )


def test_figures_are_drawn_and_compared(book):
    first = book("--update", "line", "recorded")
    assert first.returncode == 0, first.stderr
    svg = (book.root / "figures" / "line.svg").read_bytes()
    assert svg.count(b"<image ") == 1 and len(svg) < 300_000  # the cloud is pixels
    assert "up to date" in book("--check", "line").stdout

    # drawn again, the bytes are the same, in whatever order
    assert book("--update", "--force", "recorded", "line").returncode == 0
    assert (book.root / "figures" / "line.svg").read_bytes() == svg

    # an imported chapter changes: drawn anew, the change is seen and named, the rest is left alone
    (book.root / "chapters" / "ch01_helper.py").write_text("SLOPE = 2.0001\n")
    changed = book("--check", "line")
    assert changed.returncode == 1
    assert "figure_line" in changed.stderr and ".artists[0].y: 4 of 5 numbers" in changed.stderr

    # a record changes by less than the tolerance: numbers of a record are compared exactly
    _save_run(book.root, [3.0, 2.0, 1.0 + 1e-9])
    changed = book("--check", "recorded")
    assert changed.returncode == 1 and ".records.run" in changed.stderr


def test_a_figure_that_fails_is_named_and_the_others_are_drawn(book):
    (book.root / "figures" / "gone.json").write_text("{}")
    outcome = book()
    assert outcome.returncode == 1
    assert "figure_broken in ch02_main.py: no such thing" in outcome.stderr
    assert "no figure makes gone.json" in outcome.stderr
    drawn = {path.stem for path in (book.root / "build" / "figures").glob("*.svg")}
    assert drawn == {"line", "recorded"}
    assert not list((book.root / "figures").glob("*.svg"))  # without --update nothing is committed
    unknown = book("lime")
    assert unknown.returncode == 2 and "no figure 'lime'" in unknown.stderr


def test_figures_are_found_without_importing(book):
    found = find.figures(book.root)
    assert list(found) == ["line", "recorded", "broken"]
    assert found["line"].caption == "A line and a cloud."
    needed = {path.name for path in find.dependencies(found["line"].path, book.root)}
    assert {"ch01_helper.py", "ch02_main.py", "records.py", "train.py"} <= needed
    assert "style.py" not in needed
    (book.root / "chapters" / "ch03_twin.py").write_text("def figure_line(): 'Again.'\n")
    with pytest.raises(ValueError, match="ch02_main.py and ch03_twin.py"):
        find.figures(book.root)


def _draw(scale=1.0, title="t"):
    """A figure with one artist of each kind; every number in it is proportional to `scale`."""
    rng = np.random.default_rng(1)
    fig, axes = plt.subplots(2, 3)
    x = np.linspace(0, 1, 700)
    axes[0, 0].plot(x, scale * np.sin(x), label="sine")
    axes[0, 0].plot([0.0, 1.0, 2.0], [scale, np.nan, np.inf])
    axes[0, 0].set_title(title)
    axes[0, 1].scatter(x[:9], scale * rng.random(9), c=rng.random(9))
    axes[0, 2].bar([0, 1], [scale, 2 * scale])
    axes[1, 0].imshow(scale * rng.random((30, 30)))
    axes[1, 1].fill_between(x[:5], 0, scale * x[:5])
    axes[1, 2].contour(x[:20], x[:20], np.add.outer(x[:20], scale * x[:20]))
    return fig


def _numbers(fig):
    extracted = json.loads(json.dumps(numbers.extract(fig), allow_nan=False))
    plt.close(fig)
    return extracted


def test_drawn_numbers_are_compared_artist_by_artist():
    reference = _numbers(_draw())
    assert len(json.dumps(reference)) < 8000
    assert numbers.compare(_numbers(_draw(1 + 1e-8)), reference) == []
    differences = numbers.compare(_numbers(_draw(1 + 1e-5)), reference)
    axes = {sentence[: sentence.index("]") + 1] for sentence in differences}
    assert axes == {f".axes[{i}]" for i in range(6)}
    assert numbers.compare(_numbers(_draw(title="u")), reference) == [
        ".axes[0].title: 'u', committed 't'"
    ]
    fewer = _draw()
    fewer.axes[0].lines[1].remove()
    assert numbers.compare(_numbers(fewer), reference) == [
        ".axes[0].artists: 1 entries, committed 2"
    ]


def test_round_off_is_compared_by_its_size():
    def errors(scale, seed, mark):
        fig, ax = plt.subplots()
        line = ax.plot(scale * np.random.default_rng(seed).standard_normal(50))[0]
        if mark:
            rounding(line)
        return _numbers(fig)

    assert numbers.compare(errors(1e-16, 0, True), errors(1e-16, 1, True)) == []
    assert numbers.compare(errors(1e-16, 0, False), errors(1e-16, 1, False)) != []
    assert numbers.compare(errors(1e-12, 0, True), errors(1e-16, 1, True)) != []


def test_records_that_are_missing_or_altered_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    _save_run(tmp_path, [1.0])
    (tmp_path / "experiments" / "results" / "run.json").rename(tmp_path / "run.json")
    (tmp_path / "experiments" / "results" / "run.npz").rename(tmp_path / "run.npz")
    with records.watch() as read:
        assert records.load("run")["arrays"]["curve"] == [1.0]
    assert read == {"run"}
    with pytest.raises(FileNotFoundError, match=r"no record 'rum' .*like it: run\)"):
        records.load("rum")
    torn = (tmp_path / "run.npz").read_bytes()[:-7]
    (tmp_path / "run.npz").write_bytes(torn)
    with pytest.raises(ValueError, match="run.npz"):
        records.load("run")


def test_source_hash_follows_content_and_not_place(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "package").mkdir(parents=True)
        (tmp_path / place / "package" / "a.py").write_text("one")
        (tmp_path / place / "package" / "notes.txt").write_text(place)
    here, there = tmp_path / "here" / "package", tmp_path / "there" / "package"
    before = source_hash(here)
    assert before == source_hash(there) and len(before) == 12
    (there / "a.py").write_text("two")
    assert source_hash(there) != before
    (there / "a.py").write_text("one")
    (there / "a.py").rename(there / "b.py")
    assert source_hash(there) != before
    assert source_hash(here / "notes.txt") != source_hash(there / "notes.txt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        source_hash(tmp_path / "nowhere")


# What is drawn together: the comparisons that the chapters and the published tables make.
TOGETHER = """
    exact score_function pathwise baseline implicit
    exact score_function baseline leave_one_out nvil muprop
    exact score_function concrete nvil muprop rebar relax
    exact score_function rebar relax lax
    exact concrete straight_through gumbel_rao score_function
    exact arm disarm leave_one_out double_control_variate rebar relax
    leave_one_out arm disarm gumbel_rao rebar relax
    exact numeric pathwise score_function
    exact pathwise sticking_the_landing dreg iwae
    concrete nvil vimco straight_through
    exact vae autoencoder iwae
    exact vae iwae vimco dreg
    vae autoencoder vq_vae
    exact mean_field semi_implicit numeric
"""
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "usual": np.eye(3),
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}


def _lab(colour, vision):
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_drawn_together_are_told_apart(vision):
    groups = [line.split() for line in TOGETHER.strip().splitlines()]
    assert {name for group in groups for name in group} == set(COLOUR)
    for group in groups:
        for a, b in itertools.combinations(group, 2):
            distance = np.linalg.norm(_lab(COLOUR[a], vision) - _lab(COLOUR[b], vision))
            assert distance > 20, f"{a} and {b} look alike in {vision}: {distance:.0f}"


def test_style_sheet_is_complete():
    with plt.style.context(["default", ROOT / "chapters" / "book.mplstyle"]):
        fig, ax = plt.subplots()
        lines = [ax.plot([0, 1])[0] for _ in range(12)]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
        assert plt.rcParams["svg.hashsalt"] and plt.rcParams["figure.constrained_layout.use"]
        plt.close(fig)


def test_numbers_are_compared_to_one_millionth_and_to_a_billionth_of_the_largest():
    def differs(drawn, committed):
        return bool(numbers.compare({"y": drawn}, {"y": committed}))

    assert not differs([1 + 0.9e-6], [1.0]) and differs([1 + 1.2e-6], [1.0])
    assert not differs([1.0, 0.9e-9], [1.0, 0.0]) and differs([1.0, 2e-9], [1.0, 0.0])
    assert differs([None, 1.0], [1.0, 1.0]) and not differs([None, 1.0], [None, 1.0])


def test_abscissae_colours_and_labels_are_compared():
    def drawn(shift=0.0, colour=1.0, label="p"):
        fig, (left, right) = plt.subplots(1, 2)
        left.plot(np.arange(3.0) + shift, [1.0, 2.0, 0.0], label=label)
        left.set_ylabel(label)
        left.legend()
        right.scatter([0.0, 1.0], [0.0, 1.0], c=[0.0, colour])
        return _numbers(fig)

    reference = drawn()
    places = lambda d: [s.split(":")[0] for s in numbers.compare(d, reference)]
    assert places(drawn()) == []
    assert places(drawn(shift=1.0)) == [".axes[0].artists[0].x"]
    assert places(drawn(colour=2.0)) == [".axes[1].artists[0].values"]
    found = {".axes[0].y", ".axes[0].legend[0]", ".axes[0].artists[0].label"}
    assert set(places(drawn(label="q"))) == found


def test_round_off_of_another_count_is_a_difference():
    def errors(n):
        fig, ax = plt.subplots()
        rounding(ax.plot(1e-16 * np.ones(n))[0])
        return _numbers(fig)

    assert any("round-off" in s for s in numbers.compare(errors(7), errors(8)))


def test_numbers_of_a_long_line_without_finite_points():
    fig, ax = plt.subplots()
    ax.plot(np.full(200, np.nan))
    assert _numbers(fig)["axes"][0]["artists"][0]["y"]["finite"] == 0


def test_a_figure_is_drawn_anew_when_the_style_changes(tmp_path, monkeypatch):
    chapter = next(ROOT.glob("chapters/ch01_*.py"))
    before = driver.sources.__wrapped__(chapter)
    style = Path(shutil.copy(driver.STYLE, tmp_path))
    monkeypatch.setattr(driver, "STYLE", style)
    assert driver.sources.__wrapped__(chapter) == before
    style.write_text(style.read_text() + "\nlines.linewidth: 9\n")
    assert driver.sources.__wrapped__(chapter) != before


def test_the_figures_of_the_benchmarks_follow_their_reference_run(tmp_path, monkeypatch):
    assert list(find.figures(ROOT))[-2:] == ["benchmarks", "scaling"]
    for folder in ("minigrad", "figures", "benchmarks"):
        (tmp_path / folder).mkdir()
    plots = shutil.copy(ROOT / find.BENCHMARKS, tmp_path / "benchmarks")
    monkeypatch.setattr(driver, "ROOT", tmp_path)
    keys = set()
    for content in ("{}", "[]"):
        (tmp_path / "benchmarks" / "reference.json").write_text(content)
        keys.add(driver.sources.__wrapped__(Path(plots)))
    assert len(keys) == 2


def test_a_figure_that_makes_matplotlib_warn_fails(tmp_path, monkeypatch):
    def figure_boxes():
        fig, ax = plt.subplots()
        ax.set_title("\u2f00")  # a glyph that the font lacks
        return fig

    module = types.ModuleType("chapters.ch99_stub")
    module.figure_boxes = figure_boxes
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(driver, "BUILD", tmp_path)
    with pytest.raises(UserWarning, match="[Gg]lyph"):
        driver.draw(find.Figure("boxes", Path("chapters/ch99_stub.py"), "Boxes."))


def test_dependencies_include_the_packages_that_an_import_runs():
    chapter = next(ROOT.glob("chapters/ch01_*.py"))
    needed = {path.relative_to(ROOT).as_posix() for path in find.dependencies(chapter, ROOT)}
    assert {"chapters/__init__.py", "minigrad/__init__.py", "minigrad/core.py"} <= needed
