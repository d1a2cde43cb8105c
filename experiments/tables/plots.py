"""A published table as far as it is done: Markdown, a figure, and the curves behind it."""

import math
import textwrap
from typing import NamedTuple

from chapters import records
from chapters.style import COLOUR, LINESTYLE
from experiments import runner, sweep

__all__ = ["draw_curves", "draw_table", "markdown", "places"]

FEWER = "†"


class Place(NamedTuple):
    """A cell with the steps that it asks for, and its record, or None."""

    cell: object
    steps: int
    record: dict | None


def places(table, runs, load=records.load):
    """Return the `Place` of each cell.

    `load` returns a record by name or raises FileNotFoundError.
    """
    found = []
    for cell in table.cells:
        name, config = sweep.configured(cell, runs)
        try:
            record = load(name)
        except FileNotFoundError:
            record = None
        if record and not runner.is_of(config, record):
            record = None  # made with other defaults
        found.append(Place(cell, config["steps"], record))
    return found


def _taken(place):
    return place.record["config"]["steps"]


def _value(place, label):
    """Return value and standard error, or None, of what a cell with a record shows."""
    name, record = place.cell.values[label], place.record
    if callable(name):
        return name(record)
    if name in record["scalars"]:
        return record["scalars"][name], record["scalars"].get(f"{name}_se")
    if name in record["curves"]:
        return record["curves"][name]["values"][-1], None
    return None, None  # a run too short for a single point of the curve


def _ours(place, label):
    if label not in place.cell.values:
        return ""
    if place.record is None:
        return "not run"
    fewer = FEWER if _taken(place) < place.steps else ""
    return _number(*_value(place, label)) + fewer


def _number(value, error=None):
    if value is None:
        return "none yet"
    if error:  # to two digits of the error
        digits = max(0, 1 - math.floor(math.log10(float(f"{error:.1e}"))))
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _rows(table, found):
    """Yield (row, its notes, places by column) in the order of the cells."""
    for name in dict.fromkeys(cell.row for cell in table.cells):
        row = {place.cell.column: place for place in found if place.cell.row == name}
        shared = set.intersection(*(set(place.cell.notes) for place in row.values()))
        yield name, shared, row


def _columns(table):
    return list(dict.fromkeys(cell.column for cell in table.cells))


def _grid(table, found):
    """Return lines of a row's name, what is shown, and (ours, published) for each column.

    A note that holds of a whole row stands behind its name, others behind the first number.
    """
    lines = []
    for name, shared, row in _rows(table, found):
        labels = dict.fromkeys(label for place in row.values() for label in place.cell.values)
        steps = sorted({_trained(place) for place in row.values()})
        after = "" if _after(found) else f", {' or '.join(f'{n:,}' for n in steps)} steps"
        head = name + after + _marks(shared)
        for label in labels:
            entries = []
            for column in _columns(table):
                ours, published = "", ""
                if place := row.get(column):
                    ours, published = _ours(place, label), place.cell.published.get(label, "")
                    if label == next(iter(place.cell.values)):
                        ours += _marks(set(place.cell.notes) - shared)
                entries.append((ours, published))
            lines.append((head, label, entries))
            head = ""
    return lines


def _marks(notes):
    return f" [{', '.join(sorted(notes))}]" if notes else ""


# Markdown


def markdown(table, found, command):
    """Return the table in Markdown; `command` is what makes its records."""
    columns = _columns(table)
    lines = [
        [head, label, *(_beside(*entry) for entry in entries)]
        for head, label, entries in _grid(table, found)
    ]
    runs = [
        [name, *_settings(row), *(_how(row[c]) if c in row else "" for c in columns)]
        for name, _, row in _rows(table, found)
    ]
    parts = [
        f"# {table.title}",
        table.protocol.strip(),
        _after(found),
        _pipes(["", "", *columns], lines),
        _legend(lines, table),
        f"{FEWER} After fewer steps than the table asks for." if _any_fewer(found) else "",
        *(f"[{letter}] {text}" for letter, text in table.notes.items()),
        table.source,
        "## Steps and time",
        _pipes(["", "data", "seed", *columns], runs),
        f"Seconds are wall time, {_machine(found)}, other work beside: they do not rank methods. "
        f"The records are made by `{command}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _after(found):
    """After how many steps the trainings end, if it is the same for all; else the rows say it."""
    steps = {_trained(place) for place in found}
    return f"Each trained for {steps.pop():,} steps." if len(steps) == 1 else ""


def _trained(place):
    return max(place.steps, _taken(place)) if place.record else place.steps


def _legend(lines, table):
    published = any(cell.published for cell in table.cells)
    parts = ["in parentheses the published number"] * published
    parts += ["± the standard error"] * any("±" in text for line in lines for text in line)
    return f"Ours; {', '.join(parts)}." if parts else ""


def _beside(ours, published):
    return f"{ours} ({published})" if published else ours


def _any_fewer(found):
    return any(place.record and _taken(place) < place.steps for place in found)


def _settings(row):
    configs = [p.record["config"] if p.record else {"data": p.cell.data} for p in row.values()]
    data = dict.fromkeys(str(config["data"] or "none") for config in configs)
    seeds = dict.fromkeys(str(config["seed"]) for config in configs if "seed" in config)
    return ", ".join(data), ", ".join(seeds)


def _how(place):
    if place.record is None:
        return f"0 of {place.steps:,} steps"
    taken = _taken(place)
    of = f" of {place.steps:,}" if taken < place.steps else ""
    return f"{taken:,}{of} steps, {place.record['seconds']:,.0f} s"


def _machine(found):
    kinds = {(p.record["threads"], p.record["platform"]) for p in found if p.record}
    texts = [
        f"{threads} thread{'s' * (threads > 1)} on {where}" for threads, where in sorted(kinds)
    ]
    return "; ".join(texts) or "no run yet"


def _pipes(head, lines):
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [head, *lines]]
    lines.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Figures


def draw_table(name):
    """Draw the table `name`, ours beside published; its Markdown is the figure's `markdown`."""
    import matplotlib.pyplot as plt

    table = runner.tables()[name]
    found = places(table, runner.registry())
    texts, greys = _layout(table, found)
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    edges = [0]
    for width in widths:
        edges.append(edges[-1] + (width + 2 if width else 0))
    across = max(6.4, 0.072 * edges[-1])
    wide = int(16 * across)  # letters in a line below
    below = [line for text in _below(table, found) for line in textwrap.wrap(text, wide)]
    n = len(texts) + len(below) + 1
    fig, ax = plt.subplots(figsize=(across, 0.185 * n + 0.3))
    ax.set_axis_off()
    ax.set(xlim=(0, edges[-1]), ylim=(n, -0.5))
    ax.set_title(table.title, loc="left", weight="bold")
    for y, line in enumerate(texts):
        for i, text in enumerate(line):
            if text:
                at, side = (edges[i], "left") if i < 2 else (edges[i + 1] - 1, "right")
                colour = "#777777" if i in greys else "black"
                ax.text(at, y, text, ha=side, va="center", fontsize=8, color=colour)
        if y and line[0]:
            ax.axhline(y - 0.5, color="#cccccc", linewidth=0.5)
    ax.axhline(0.5, color="black", linewidth=0.8)
    ax.axhline(len(texts) - 0.5, color="black", linewidth=0.8)
    for y, line in enumerate(below, len(texts)):
        ax.text(0, y + 0.3, line, ha="left", va="center", fontsize=7, color="#444444")
    fig.markdown = markdown(table, found, f"python -m experiments sweep {name}")
    return fig


def _layout(table, found):
    """Return lines of texts, and which of their columns are published numbers."""
    grid = _grid(table, found)
    printed = [any(line[2][i][1] for line in grid) for i in range(len(_columns(table)))]
    texts, greys = [["", ""]], set()
    for column, there in zip(_columns(table), printed):
        texts[0] += [column, "published"] if there else [column]
        if there:
            greys.add(len(texts[0]) - 1)
    for head, label, entries in grid:
        texts.append([head, label])
        for (ours, published), there in zip(entries, printed):
            texts[-1] += [ours, published] if there else [ours]
    return texts, greys


def _below(table, found):
    yield _after(found)
    yield from (f"[{letter}] {text}" for letter, text in table.notes.items())
    if _any_fewer(found):
        yield f"{FEWER} After fewer steps than the table asks for."
    done = {}
    for place in found:
        if place.record:
            config = place.record["config"]
            key = str(config["data"] or "no data"), config["seed"], _taken(place)
            done.setdefault(key, []).append(place.record["seconds"])
    for (data, seed, steps), seconds in done.items():
        times = dict.fromkeys(f"{s:,.0f}" for s in (min(seconds), max(seconds)))
        yield f"{data}, seed {seed}: {steps:,} steps in {' to '.join(times)} s."
    yield table.source


def draw_curves(name):
    """Draw the curves of the records of table `name`, a panel for each row and label that has."""
    import matplotlib.pyplot as plt

    table = runner.tables()[name]
    looks = {column: _look(column, i) for i, column in enumerate(_columns(table))}
    panels = {}
    for place in places(table, runner.registry()):
        row, column = place.cell.row, place.cell.column
        curves = place.record["curves"] if place.record else {}
        for label, pattern in table.curve.items():
            curve = curves.get(pattern.format(row=row, column=column))
            if curve and len(curve["steps"]) > 1:  # a point is no curve
                panels.setdefault((row, label), {})[column] = curve["steps"], curve["values"]
    cols = min(2, max(1, len(panels)))
    height = max(1, math.ceil(len(panels) / cols))
    fig, axes = plt.subplots(height, cols, figsize=(6.4, 2.0 * height + 0.4), squeeze=False)
    lines = {}
    for ax, ((row, label), curves) in zip(axes.flat, panels.items()):
        ax.set(title=row, xlabel="step", ylabel=label)
        for column, (steps, values) in curves.items():
            lines[column] = ax.plot(steps, values, label=column, **looks[column])[0]
        ax.locator_params(axis="x", nbins=5)  # steps have up to six digits
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    if not panels:
        ax.text(0.5, 0.5, "not run", ha="center", va="center", transform=ax.transAxes)
    if lines:
        columns = [column for column in looks if column in lines]
        fig.legend([lines[c] for c in columns], columns, loc="outside lower center", ncols=6)
    return fig


def _look(column, i):
    name = column.lower().replace("-", "_").replace(" ", "_")
    name = {"rloo": "leave_one_out", "nvil,_vimco": "vimco"}.get(name, name)
    return {"color": COLOUR.get(name, f"C{i}"), "linestyle": LINESTYLE.get(name, "-")}
