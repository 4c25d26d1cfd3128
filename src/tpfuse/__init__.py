"""Graph fusions for tensor-parallel LLM inference under ``torch.compile``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpfuse.compiler import backend, compile, explain, inductor_pass, last_report
    from tpfuse.config import Config
    from tpfuse.report import Decline, Event, FusionError, Report
    from tpfuse.runtime.dispatch import warmup
    from tpfuse.runtime.workspaces import prepare, release, restore
    from tpfuse.target import Range, Target

_HOMES = {
    "compile": "compiler", "backend": "compiler", "last_report": "compiler", "explain": "compiler", "inductor_pass": "compiler",
    "Config": "config", "Decline": "report", "Event": "report", "FusionError": "report", "Report": "report",
    "warmup": "runtime.dispatch",
    "prepare": "runtime.workspaces", "release": "runtime.workspaces", "restore": "runtime.workspaces",
    "Range": "target", "Target": "target",
}  # fmt: skip

__all__ = [
    "Config", "Decline", "Event", "FusionError", "Range", "Report", "Target", "backend", "compile", "explain",
    "inductor_pass", "last_report", "ops", "prepare", "release", "restore", "warmup",
]  # fmt: skip


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tpfuse")
    except PackageNotFoundError:
        return "unknown: run from its source, not installed"


def __getattr__(name: str) -> Any:
    """Public names are loaded when first asked for: importing tpfuse does no work."""
    if name == "__version__":
        return _version()
    if name == "ops":
        return importlib.import_module("tpfuse.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'tpfuse' has no attribute {name!r}")
    module = importlib.import_module(f"tpfuse.{_HOMES[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value
