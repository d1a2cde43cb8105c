"""Which figures there are and what each depends on, read from the sources without an import."""

import ast
import itertools
from pathlib import Path
from typing import NamedTuple

__all__ = ["Figure", "dependencies", "figures"]

CHAPTERS = "chapters/ch*.py"
TABLES = "experiments/tables/*.py"
BENCHMARKS = "benchmarks/plots.py"


class Figure(NamedTuple):
    """A function `figure_<name>` of the module at `path`; its docstring begins with `caption`."""

    name: str
    path: Path
    caption: str


def figures(root):
    """Return the figures of the chapters below `root`, a dict by name in reading order.

    Then those of the published tables and of the benchmarks.

    Raises ValueError where two have one name, as their files would.
    """
    found = {}
    globs = (sorted(Path(root).glob(pattern)) for pattern in (CHAPTERS, TABLES, BENCHMARKS))
    for path in itertools.chain.from_iterable(globs):
        for node in ast.parse(path.read_bytes(), str(path)).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("figure_"):
                name = node.name.removeprefix("figure_")
                if name in found:
                    both = f"{found[name].path.name} and {path.name}"
                    raise ValueError(f"two figures are called {name!r}, in {both}; rename one")
                caption = (ast.get_docstring(node) or "").partition("\n")[0]
                found[name] = Figure(name, path, caption)
    return found


def dependencies(path, root):
    """Return the module at `path` and the files below `root` that it imports, directly or not."""
    seen, todo = set(), [Path(path)]
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += [found for name in _imports(file, root) for found in _files(name, root)]
    return sorted(seen)


def _imports(file, root):
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _files(name, root):
    # importing a.b.c runs a/__init__.py and a/b/__init__.py too
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        base = Path(root, *parts[:end])
        yield from (f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file())
