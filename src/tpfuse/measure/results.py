"""Result files: what was measured, where, with what, every sample kept.

    {"what", "date", "commit", "machine": {"gpu", "count", "link"}, "versions": {...}, "rows": [{"op", "scheme", "dtype",
     "tokens", "hidden", "world", "impl", "us", "us_min", "us_max", "limit_us", "picked"?, "samples"}]}
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tpfuse import files

PACKAGES = {"triton": "triton", "flashinfer": "flashinfer-python"}


def environment() -> dict[str, Any]:
    """machine and versions of a result file, as this process finds them."""
    versions = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda), "python": platform.python_version()}
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            versions[module] = metadata.version(package)
    if not torch.cuda.is_available():
        return {"machine": {"gpu": None, "count": 0, "link": None}, "versions": versions}
    versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    gpu = torch.cuda.get_device_name()
    return {"machine": {"gpu": gpu, "count": torch.cuda.device_count(), "link": link()}, "versions": versions}


def link() -> str | None:
    """How GPU 0 reaches GPU 1 ("NV18", "PHB" …) by nvidia-smi; None where that cannot be known."""
    tool = shutil.which("nvidia-smi")
    if tool is None or torch.cuda.device_count() < 2:
        return None
    matrix = subprocess.run([tool, "topo", "-m"], capture_output=True, text=True, timeout=30, check=False).stdout
    lines = [line.split() for line in matrix.splitlines() if line.startswith("GPU0")]
    return lines[0][2] if lines and len(lines[0]) > 2 else None


def commit() -> str:
    """The commit that is checked out here; "unknown" outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def document(what: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> dict[str, Any]:
    """A result file's contents; floats of the rows rounded to a nanosecond.  extra: what else belongs at its top."""
    rounded = [{k: _rounded(v) for k, v in row.items()} for row in rows]
    return {"what": what, "date": datetime.date.today().isoformat(), **extra, "rows": rounded}


def write(path: str | Path, found: Mapping[str, Any]) -> None:
    """One line a row, so that a diff of two files can be read."""
    files.write(path, re.sub(r'(?={"(op|test)": )', "\n", json.dumps(found)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    return [_rounded(v) for v in value] if isinstance(value, list) else value
