"""One frozen Config, and the only reader of the environment (prefix ``TPFUSE_``)."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

KERNEL_PREFERENCES = ("auto", "reference", "triton", "cuda", "torch", "flashinfer", "nccl")
PASSES = (
    "all_reduce_norm",  # all-reduce → norm, with a residual, a bias, a scale, sandwich norms
    "all_reduce_norm_quantize",
    "norm_quantize",  # norm or activation → quantise, no collective
    "merge_all_reduce",  # all_reduce(a) + all_reduce(b) → all_reduce(a + b)
    "sequence_parallel",
    "async_tp",
    "attention_quantize",
    "qk_norm_rope",
)


@dataclass(frozen=True)
class Config:
    """Everything a user can set.  Unknown names and values raise ValueError with the closest known one.

    passes: names from `PASSES` to run; None runs all.  disable_passes: names to leave out.
    ranges: split points on the token count, each closing its range: (256, 2048) gives [1, 256], [257, 2048], [2049, …]; or a
        mapping from an end point to {"passes": (...), "inductor": {...}} for the range it closes; None takes them from the table.
    sizes: token counts that get a graph of their own.  max_tokens: the largest token count to expect.
    strict: raise FusionError when an expected fusion did not happen.  verify: check every fused site against its unfused
        body on live inputs.  fuel: only the first so many rewrites, to bisect.
    kernels: preference, one of `KERNEL_PREFERENCES`.  table: path of a tuned table.  dump: folder for graphs of each stage.
    compile_all: compile every range at the first call, not when first needed.
    timeout: seconds that ranks wait for one another before a missing one is named.
    """

    passes: tuple[str, ...] | None = None
    disable_passes: tuple[str, ...] = ()
    ranges: tuple[int, ...] | Mapping[int, Mapping[str, Any]] | None = None
    sizes: tuple[int, ...] = ()
    max_tokens: int | None = None
    strict: bool = False
    verify: bool = False
    fuel: int | None = None
    kernels: str = "auto"
    table: str | None = None
    dump: str | None = None
    compile_all: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for field in ("passes", "disable_passes", "sizes"):
            value = getattr(self, field)
            if isinstance(value, str):
                object.__setattr__(self, field, tuple(p for p in value.split(",") if p))
            elif isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        if isinstance(self.ranges, list):
            object.__setattr__(self, "ranges", tuple(self.ranges))
        for name in (*(self.passes or ()), *self.disable_passes):
            _known("pass", name, PASSES)
        _known("kernels preference", self.kernels, KERNEL_PREFERENCES)

    @classmethod
    def of(cls, options: Mapping[str, Any] | Config | None) -> Config:
        """A Config from a mapping of field names (torch.compile's `options`), over the environment's values."""
        if isinstance(options, Config):
            return options
        values = {**_environment(), **(options or {})}
        names = [f.name for f in fields(cls)]
        for name in values:
            _known("Config field", name, names)
        return cls(**values)

    def lines(self) -> list[str]:
        """A line for each field that ranks must agree on: all but the paths of their own files."""
        return [f"config {f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in ("table", "dump")]

    def enabled(self, name: str) -> bool:
        return name not in self.disable_passes and (self.passes is None or name in self.passes)


def table_path(machine: str) -> Path:
    """Where the table of a machine ("2 x NVIDIA H100 80GB HBM3") is written and looked for: under `TPFUSE_CACHE`, else
    `XDG_CACHE_HOME`/tpfuse, else ~/.cache/tpfuse."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("TPFUSE_CACHE") or Path(base) / "tpfuse")
    return folder / "tables" / (re.sub(r"[^A-Za-z0-9]+", "-", machine).strip("-").lower() + ".json")


def _known(kind: str, name: str, names: Any) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")


def _environment() -> dict[str, Any]:
    """TPFUSE_STRICT=1, TPFUSE_DISABLE_PASSES=a,b …: one variable a scalar or name-list field."""
    kinds: dict[str, Any] = {
        "passes": str, "disable_passes": str, "strict": _flag, "verify": _flag, "fuel": int, "kernels": str,
        "table": str, "dump": str, "compile_all": _flag, "timeout": float, "max_tokens": int,
    }  # fmt: skip
    found = {name: os.environ.get(f"TPFUSE_{name.upper()}") for name in kinds}
    return {name: kinds[name](value) for name, value in found.items() if value is not None}


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"expected a yes or no, got {text!r}")
