"""Writing files that others may be reading."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all, and make its folder.  Links and devices (/dev/stdout) are written to."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
