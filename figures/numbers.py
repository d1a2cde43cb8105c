"""The numbers that a figure shows, taken from its artists, and the comparison of two such sets."""

import math

import numpy as np
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.container import BarContainer
from matplotlib.contour import ContourSet
from matplotlib.quiver import Quiver

__all__ = ["compare", "extract", "rasterise"]

WHOLE = 100  # longer arrays are kept as moments and a sample
SCATTER = 2000  # more points or cells than these are drawn as pixels in the SVG
RTOL, ATOL = 1e-6, 1e-9  # the latter relative to the largest number of the array


def rasterise(figure):
    """Draw scatters and meshes of more than 2,000 points as pixels, which keeps the SVG small."""
    for axes in _all_axes(figure):
        for artist in axes.collections:
            points = isinstance(artist, PathCollection) and len(artist.get_offsets())
            cells = isinstance(artist, QuadMesh) and artist.get_array().size
            if max(points, cells) > SCATTER:
                artist.set_rasterized(True)
        for line in axes.lines:
            if line.get_linestyle() == "None" and len(line.get_xdata()) > SCATTER:
                line.set_rasterized(True)


def extract(figure):
    """Return what is drawn as a JSON-able dict: titles, labels and, artist by artist, numbers."""
    whole = {"title": figure.get_suptitle(), "texts": [text.get_text() for text in figure.texts]}
    return {**_filled(whole), "axes": [_axes(axes) for axes in _all_axes(figure)]}


def _all_axes(figure):
    for axes in figure.axes:
        yield axes
        yield from axes.child_axes


def _axes(axes):
    legend = axes.get_legend()
    head = {
        "title": axes.get_title(),
        "x": axes.get_xlabel(),
        "y": axes.get_ylabel(),
        "scales": f"{axes.get_xscale()} {axes.get_yscale()}",
        "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
        "texts": [text.get_text() for text in axes.texts],
    }
    bars = [c for c in axes.containers if isinstance(c, BarContainer)]
    in_bars = {id(patch) for container in bars for patch in container}
    artists = [_line(line) for line in axes.lines]
    artists += [_collection(collection) for collection in axes.collections]
    artists += [_bars(container) for container in bars]
    artists += [_outline(patch) for patch in axes.patches if id(patch) not in in_bars]
    artists += [_image(image) for image in axes.images]
    return {**_filled(head), "artists": artists}


def _filled(entries):
    return {key: value for key, value in entries.items() if value}


def _entry(kind, artist, **arrays):
    label = artist.get_label()
    labelled = isinstance(label, str) and label and not label.startswith("_")
    entry = {"kind": kind, **({"label": label} if labelled else {})}
    summary = _size if getattr(artist, "is_rounding", False) else _summary
    return entry | {name: summary(array) for name, array in arrays.items()}


def _line(line):
    # abscissae are chosen, not computed: only the ordinates can be round-off
    entry = _entry("line", line, y=line.get_ydata(orig=False))
    return entry | {"x": _summary(line.get_xdata(orig=False))}


def _collection(artist):
    if isinstance(artist, ContourSet):
        # one vertex more or less is no change, hence the box around each level's lines
        boxes = [path.get_extents().extents for path in artist.get_paths() if len(path.vertices)]
        return _entry("contours", artist, levels=artist.levels, boxes=boxes)
    if isinstance(artist, QuadMesh):
        corners = artist.get_coordinates()
        return _entry(
            "mesh", artist, x=corners[..., 0], y=corners[..., 1], values=artist.get_array()
        )
    if isinstance(artist, Quiver):
        return _entry("arrows", artist, at=artist.get_offsets(), u=artist.U, v=artist.V)
    if isinstance(artist, PathCollection):
        x, y = np.ma.filled(artist.get_offsets(), np.nan).reshape(-1, 2).T
        values = artist.get_array()
        return _entry("scatter", artist, x=x, y=y, **({} if values is None else {"values": values}))
    vertices = [path.vertices for path in artist.get_paths()]
    return _entry("outlines", artist, vertices=np.concatenate([np.empty((0, 2)), *vertices]))


def _bars(container):
    sides = np.array([[b.get_x(), b.get_y(), b.get_width(), b.get_height()] for b in container])
    x, y, width, height = sides.reshape(-1, 4).T
    return _entry("bars", container, x=x, y=y, width=width, height=height)


def _outline(patch):
    vertices = patch.get_patch_transform().transform(patch.get_path().vertices)
    return _entry("outline", patch, vertices=vertices)


def _image(image):
    shown = image.get_array()
    return _entry("image", image, shape=shown.shape, extent=image.get_extent(), values=shown)


def _summary(array):
    numbers = np.ma.filled(np.ma.asarray(array, dtype=np.float64), np.nan).ravel()
    if numbers.size <= WHOLE:
        return [_number(v) for v in numbers]
    finite = numbers[np.isfinite(numbers)]
    names = ("mean", "std", "min", "max") if finite.size else ()
    moments = {name: _number(getattr(np, name)(finite)) for name in names}
    sample = [_number(v) for v in numbers[:: numbers.size // 50]]
    return {"count": numbers.size, "finite": finite.size, **moments, "sample": sample}


def _size(array):
    numbers = np.ravel(np.ma.filled(np.ma.asarray(array, dtype=np.float64), np.nan))
    largest = np.max(np.abs(numbers), initial=0.0, where=np.isfinite(numbers))
    return {"count": numbers.size, "largest": _number(largest)}


def _number(value):
    # JSON has neither NaN nor infinities; nine digits are more than the comparison needs
    value = float(value)
    if math.isnan(value):
        return None
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


def compare(drawn, committed, where=""):
    """Return the differences as sentences; numbers may differ by one millionth, text not at all."""
    if isinstance(drawn, dict) and isinstance(committed, dict):
        if drawn.keys() != committed.keys():
            return [f"{where}: has {sorted(drawn)}, committed {sorted(committed)}"]
        if "largest" in drawn:
            return _compare_sizes(drawn, committed, where)
        if "sample" in drawn:
            scale = [committed["min"], committed["max"]]
            pairs = ((key, [drawn[key]], [committed[key]]) for key in drawn if key != "sample")
            found = [_compare_numbers(a, b, f"{where}.{key}", scale) for key, a, b in pairs]
            found.append(compare(drawn["sample"], committed["sample"], f"{where}.sample"))
        else:
            found = [compare(drawn[key], committed[key], f"{where}.{key}") for key in drawn]
        return [sentence for sentences in found for sentence in sentences]
    if isinstance(drawn, list) and isinstance(committed, list):
        if len(drawn) != len(committed):
            return [f"{where}: {len(drawn)} entries, committed {len(committed)}"]
        if any(isinstance(entry, int | float) for entry in drawn):
            return _compare_numbers(drawn, committed, where, committed)
        pairs = enumerate(zip(drawn, committed))
        return [s for i, (a, b) in pairs for s in compare(a, b, f"{where}[{i}]")]
    return [] if drawn == committed else [f"{where}: {drawn!r}, committed {committed!r}"]


def _compare_numbers(drawn, committed, where, scale):
    a, b, scale = (np.array(v, dtype=np.float64) for v in (drawn, committed, scale))
    largest = np.max(np.abs(scale), initial=0.0, where=np.isfinite(scale))
    off = ~np.isclose(a, b, rtol=RTOL, atol=ATOL * largest, equal_nan=True)
    if not off.any():
        return []
    i = np.argmax(off)
    return [
        f"{where}: {off.sum()} of {off.size} numbers differ, first {a[i]:.9g}, committed {b[i]:.9g}"
    ]


def _compare_sizes(drawn, committed, where):
    a, b = drawn["largest"], committed["largest"]
    if drawn["count"] == committed["count"] and (a == b or (a and b and 0.01 < a / b < 100)):
        return []
    return [f"{where}: round-off {drawn}, committed {committed}"]
