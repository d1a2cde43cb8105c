"""Build the chapters that exist into HTML: `build/book/index.html`, to be opened as it is."""

import argparse
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from figures.__main__ import main as figures

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "book"
ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\ssrc=[\"']?(?:https?:)?//"
    r"|<link\b[^>]*\shref=[\"']?(?:https?:)?//"
    r"|(?:@import\s*[\"']|url\([\"']?)(?:https?:)?//"
    r"|//[\w.-]*(?:cdn|jsdelivr|unpkg|cloudflare|googleapis|gstatic)[\w.-]*"
)


def loads_from_elsewhere(folder):
    """Return what pages, styles and scripts below `folder` would load from other hosts, by file."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in (".html", ".css", ".js"))
    found = {path.relative_to(folder): ELSEWHERE.search(path.read_text("utf-8")) for path in files}
    return {path.as_posix(): match[0] for path, match in found.items() if match}


def main(argv=None):
    """Draw the figures, then build the book with all warnings as errors; return the exit code."""
    argparse.ArgumentParser(prog="python -m book", description=__doc__).parse_args(argv)
    if figures([]):
        return 1
    # anew each time: what pages show (ledger, figures) may change when their text does not
    shutil.rmtree(OUT, ignore_errors=True)
    folders = map(str, (ROOT / "book", ROOT / "chapters", OUT))
    if code := sphinx(["-b", "html", "-q", "-W", "-c", *folders]):
        shutil.rmtree(OUT, ignore_errors=True)  # -W counts warnings, but builds all the same
        return code
    for path, address in (elsewhere := loads_from_elsewhere(OUT)).items():
        print(f"{path} loads from elsewhere: {address}", file=sys.stderr)
    if not elsewhere:
        print(f"the book is in {(OUT / 'index.html').relative_to(ROOT)}")
    return int(bool(elsewhere))


if __name__ == "__main__":
    sys.exit(main())
