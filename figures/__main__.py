"""Draw the figures of the book into `build/figures/`, skipping those that are up to date.

`--update` also rewrites the committed SVG and JSON in `figures/`; `--check` compares the numbers
that are drawn with the committed ones: to one millionth, and the records read for them exactly. A
figure with an attribute `markdown` (a published table) has a third file, compared exactly.
"""

import argparse
import functools
import hashlib
import importlib
import json
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

from chapters import records
from figures import find
from minigrad.source import source_hash
from minigrad.train import write_atomic

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "figures"
COMMITTED = ROOT / "figures"
STYLE = ROOT / "chapters" / "book.mplstyle"


def draw(figure):
    """Draw one figure, and write its SVG and JSON into the build folder."""
    import matplotlib

    matplotlib.use("agg")  # no window, whatever the machine
    import matplotlib.pyplot as plt

    from figures import numbers

    if not figure.caption:
        raise ValueError("it has no docstring, whose first line is the caption")
    file = (ROOT / figure.path).relative_to(ROOT)
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    svg = BUILD / f"{figure.name}.svg"
    # a glyph that is missing, a layout that does not fit: matplotlib warns, a reader would frown
    with plt.style.context(["default", STYLE]), warnings.catch_warnings(), records.watch() as read:
        warnings.simplefilter("error", UserWarning)
        try:
            drawn = getattr(module, f"figure_{figure.name}")()
            if not isinstance(drawn, matplotlib.figure.Figure):
                raise TypeError(f"it returned a {type(drawn).__name__}, not a matplotlib Figure")
            numbers.rasterise(drawn)
            drawn.savefig(svg, metadata={"Date": None, "Creator": None})
            content = numbers.extract(drawn)
        finally:
            plt.close("all")
    head = {"caption": figure.caption, "chapter": figure.path.stem}
    sealed = {name: _sha256(records.path(name)) for name in sorted(read)}
    if text := getattr(drawn, "markdown", None):
        write_atomic(BUILD / f"{figure.name}.md", text.encode())
    write_atomic(BUILD / f"{figure.name}.json", _json({**head, "records": sealed, **content}))


def _json(content):
    # one artist a line: small, and a diff shows which one changed
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in content.items() if k != "axes"]
    axes = []
    for one in content["axes"]:
        artists = ",\n   ".join(json.dumps(artist) for artist in one["artists"])
        head = "".join(
            f"{json.dumps(k)}: {json.dumps(v)}, " for k, v in one.items() if k != "artists"
        )
        axes.append(f'  {{{head}"artists": [\n   {artists}]}}')
    lines.append(' "axes": [\n' + ",\n".join(axes) + "]")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def sources(path):
    """Return a key of all that a chapter's figures depend on, but for records."""
    chapters = find.dependencies(path, ROOT)
    folders = ROOT / "minigrad", ROOT / "figures"
    beside = path.parent.glob("*.json")  # the reference run of the benchmarks
    versions = [version(package) for package in ("numpy", "scipy", "matplotlib")]
    there = ""  # a table has a place for records that do not exist yet
    if path.match(find.TABLES):
        chapters = [*chapters, ROOT / "experiments"]  # the registry imports every run, unseen
        names = sorted(file.name for file in records.RESULTS.glob("*.json"))
        there = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    return "-".join([source_hash(*folders, STYLE, *chapters, *beside), *versions, there])


def is_current(figure, key):
    """Whether the build folder holds the figure as drawn from these sources and today's records."""
    stamp, numbers = (BUILD / f"{figure.name}{suffix}" for suffix in (".key", ".json"))
    if not (stamp.is_file() and stamp.read_text() == key):
        return False
    read = json.loads(numbers.read_bytes())["records"]
    try:
        return all(_sha256(records.path(name)) == sha for name, sha in read.items())
    except FileNotFoundError:
        return False


def build(figure, force):
    """Draw the figure unless it is current; return whether it had to be drawn."""
    key = sources(figure.path)
    if not force and is_current(figure, key):
        return False
    stamp = BUILD / f"{figure.name}.key"
    stamp.unlink(missing_ok=True)
    draw(figure)
    stamp.write_text(key)
    return True


class Differs(ValueError):
    """What is drawn is not what is committed."""


def check(name):
    """Compare the built numbers with the committed ones; raises Differs with the differences."""
    from figures import numbers

    for suffix in (".json", ".svg"):
        if not (COMMITTED / f"{name}{suffix}").is_file():
            raise Differs(f"figures/{name}{suffix} is missing; make it with --update")
    drawn, committed = (_read(folder, name) for folder in (BUILD, COMMITTED))
    if differences := numbers.compare(drawn, committed):
        shown = "\n  ".join(differences[:8])
        raise Differs(f"{len(differences)} differences from figures/{name}.json:\n  {shown}")


def _read(folder, name):
    content = json.loads((folder / f"{name}.json").read_bytes())
    text = folder / f"{name}.md"
    return content | ({"markdown": text.read_text("utf-8").splitlines()} if text.is_file() else {})


def update(name):
    """Copy the built SVG and JSON, and Markdown where there is one, over the committed ones."""
    for built in (BUILD / f"{name}{suffix}" for suffix in (".svg", ".json", ".md")):
        if built.is_file():
            write_atomic(COMMITTED / built.name, built.read_bytes())


def orphans(figures):
    """Return the committed files that no figure function makes."""
    files = [file for suffix in ("svg", "json", "md") for file in COMMITTED.glob(f"*.{suffix}")]
    return sorted(file.name for file in files if file.stem not in figures)


def main(argv=None):
    """Parse the command line and return the exit code: 1 where a figure failed."""
    parser = argparse.ArgumentParser(prog="python -m figures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw (default: all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the figures and draw nothing")
    what.add_argument("--check", action="store_true", help="compare with the committed numbers")
    what.add_argument("--update", action="store_true", help="rewrite the committed files")
    parser.add_argument("--force", action="store_true", help="draw even what is up to date")
    arguments = parser.parse_args(argv)

    figures = find.figures(ROOT)
    if unknown := [name for name in arguments.names if name not in figures]:
        parser.error(f"no figure {unknown[0]!r}; there are: {', '.join(figures)}")
    chosen = [figures[name] for name in arguments.names or figures]
    if arguments.list:
        for figure in chosen:
            print(f"{figure.name:28} {figure.path.stem:24} {figure.caption}")
        return 0

    BUILD.mkdir(parents=True, exist_ok=True)
    failed = []
    for i, figure in enumerate(chosen, 1):
        print(f"[{i:{len(str(len(chosen)))}}/{len(chosen)}] {figure.name:28} ", end="", flush=True)
        start = time.perf_counter()
        try:
            drawn = build(figure, arguments.force)
            if arguments.check:
                check(figure.name)
            elif arguments.update:
                update(figure.name)
            print(f"{time.perf_counter() - start:6.1f} s" if drawn else "up to date", flush=True)
        except Exception as error:
            failed.append(figure.name)
            print("FAILED", flush=True)
            print(f"figure_{figure.name} in {figure.path.name}: {error}", file=sys.stderr)
            if not isinstance(error, Differs):
                traceback.print_exc()
    if not arguments.names and (left := orphans(figures)):
        failed += left
        print(f"no figure makes {', '.join(left)}: delete them from figures/", file=sys.stderr)
    if failed:
        print(f"{len(failed)} failed: {' '.join(failed)}", file=sys.stderr)
    else:
        print(f"{len(chosen)} figures in {BUILD.relative_to(ROOT)}/")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
