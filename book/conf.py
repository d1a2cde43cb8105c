"""Sphinx configuration of the book; `python -m book` builds it. The pages are in `chapters/`."""

import os
import shutil
import sys
from pathlib import Path

from minigrad.source import source_hash

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))  # for pages.py
os.environ["PYTHONPATH"] = str(ROOT)  # cells import this copy, whichever is installed

project = "minigrad"
author = "The minigrad authors"
language = "en"
extensions = [
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_proof",
    "sphinxcontrib.bibtex",
    "sphinxcontrib.katex",
    "pages",
]
include_patterns = ["ch*.py", "*.md"]
nitpicky = True

# Chapters are read as they are (jupytext percent format) and their cells run; tests and figures
# are only defined by that. An output is kept until any source or record changes.
nb_custom_formats = {".py": ("pages.read", {})}
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
cache = ROOT / "build" / "book-cache"
results = sorted((ROOT / "experiments" / "results").glob("*.*"))
nb_execution_cache_path = str(
    cache / source_hash(*(ROOT / f for f in ("minigrad", "chapters", "book")), *results)
)
for outdated in cache.glob("*"):
    if outdated != Path(nb_execution_cache_path):
        shutil.rmtree(outdated)
# A profile of its own, so that the reader's start-up files have no say; kernels tell errors only.
os.environ["IPYTHONDIR"] = str(ROOT / "build" / "ipython")
profile = ROOT / "build" / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 40\n")
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_dmath_double_inline = True
bibtex_bibfiles = ["../references.bib"]
bibtex_reference_style = "author_year"

numfig = True
math_numfig = True
numfig_format = {"figure": "Figure %s", "table": "Table %s"}
math_eqref_format = "({number})"
prf_realtyp_to_countertyp = {"lemma": "theorem", "proposition": "theorem", "corollary": "theorem"}

# Formulas are rendered while the book is built, by the KaTeX whose style sheet and fonts lie in
# static/: the two must be of one version.
katex_prerender = True
katex_css_path = "katex/katex.min.css"

html_theme = "sphinx_book_theme"
html_title = "minigrad"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_show_search_summary = False  # it would fetch pages, which file:// forbids
html_permalinks_icon = "#"
html_sidebars = {
    "**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html", "page-toc.html"]
}
html_theme_options = {
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "secondary_sidebar_items": [],
    "navbar_persistent": [],
    "show_toc_level": 2,
    "toc_title": "On this page",
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}
