"""The content hash of source files that keys every cache: kernels, figures, ledger, runs, book."""

import hashlib
from pathlib import Path

__all__ = ["source_hash"]


def source_hash(*roots):
    """Twelve hex digits over the content of the `*.py` files below `roots`; default: minigrad.

    A root is a folder or a file (a file counts whatever its suffix). Names enter the hash relative
    to their root, so the same sources hash alike wherever they lie; the order of the roots counts.
    Raises FileNotFoundError for a root that does not exist.
    """
    digest = hashlib.sha256()
    for root in map(Path, roots or [Path(__file__).parent]):
        if not root.exists():
            raise FileNotFoundError(f"source_hash: {root} does not exist")
        files = [root] if root.is_file() else sorted(root.rglob("*.py"))
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root.parent).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:12]
