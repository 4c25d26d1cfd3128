"""One frozen Config, and the only reader of the environment (prefix ``TPFUSE_``)."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

KERNEL_PREFERENCES = ("auto", "reference", "triton", "cuda", "torch", "flashinfer", "nccl")
PASSES = (
    "all_reduce_norm",  # all-reduce → norm, with a residual, a bias, a scale, sandwich norms
    "all_reduce_norm_quantize",
    "norm_quantize",  # norm or activation → quantise, no collective
    "merge_all_reduce",  # all_reduce(a) + all_reduce(b) → all_reduce(a + b), and what brings them together
    "sequence_parallel",
    "async_tp",
    "attention_quantize",
    "qk_norm_rope",
)


@dataclass(frozen=True)
class Config:
    """Everything a user can set.  Text will do for a value, as it stands on a command line: "yes", "5", "256,2048".

    Raises ValueError for an unknown name, telling the closest known one, and for a value that a field cannot have.

    passes: names from `PASSES` to run; None runs all.  disable_passes: names to leave out.
    ranges: split points on the token count, each closing its range: (256, 2048) gives [1, 256], [257, 2048], [2049, …], () one
        range; or a mapping from an end point to {"passes": (...), "inductor": {...}} for the range it closes; None takes them
        from the table.
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
        for name in _CHECKS:
            object.__setattr__(self, name, _checked(f"Config({name}=", ")", name, getattr(self, name)))

    @classmethod
    def of(cls, options: Mapping[str, Any] | Config | None) -> Config:
        """A Config from a mapping of field names (torch.compile's `options`), over the environment's values: a variable a
        field, TPFUSE_STRICT=1, TPFUSE_DISABLE_PASSES=async_tp,norm_quantize; an empty one counts as unset."""
        if isinstance(options, Config):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"expected a Config or a mapping of its fields, got {type(options).__name__}")
        values = {**_environment(), **(options or {})}
        names = [f.name for f in fields(cls)]
        for name in values:
            known("Config field", name, names)
        return cls(**values)

    def lines(self) -> list[str]:
        """A line for each field that ranks must agree on: all but the paths of their own files."""
        return [f"config {f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in ("table", "dump")]

    def enabled(self, name: str) -> bool:
        return name not in self.disable_passes and (self.passes is None or name in self.passes)


def cache_folder() -> Path:
    """`TPFUSE_CACHE`, else `XDG_CACHE_HOME`/tpfuse, else ~/.cache/tpfuse."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TPFUSE_CACHE") or Path(base) / "tpfuse")


def table_path(machine: str) -> Path:
    """Where the table of a machine ("2 x NVIDIA H100 80GB HBM3") is written and looked for."""
    return cache_folder() / "tables" / (re.sub(r"[^A-Za-z0-9]+", "-", machine).strip("-").lower() + ".json")


def from_text(text: str) -> Any:
    """A field's value from text: JSON where it is JSON (3, null, [256, 2048], {"256": {"passes": []}}), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def known(kind: str, name: Any, names: Iterable[str]) -> None:
    """ValueError, telling the closest of `names`, where `name` is none of them."""
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")


def _environment() -> dict[str, Any]:
    found = {}
    for variable, text in os.environ.items():
        name = variable.removeprefix("TPFUSE_").lower()
        if not variable.startswith("TPFUSE_") or not text:
            continue
        if name in _CHECKS:
            found[name] = _checked(f"{variable}=", "", name, from_text(text))
        elif (close := difflib.get_close_matches(name, _CHECKS, n=1, cutoff=0.75)):
            raise ValueError(f"unknown variable {variable}; did you mean TPFUSE_{close[0].upper()}?")
    return found


def _checked(before: str, after: str, name: str, value: Any) -> Any:
    """A value of the field `name` as its type.  ValueError that begins with where it was given."""
    try:
        return _CHECKS[name](value)
    except ValueError as error:
        raise ValueError(f"{before}{value!r}{after}: {error}") from None


def _flag(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError("expected a yes or no")
    return words[str(value).lower()]


def _count(value: Any, least: int = 1) -> int:
    if not str(value).strip().isdecimal() or int(str(value)) < least:
        raise ValueError(f"expected a whole number from {least} on")
    return int(str(value))


def _items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return tuple(value) if isinstance(value, Iterable) else (value,)


def _counts(value: Any) -> tuple[int, ...]:
    return tuple(_count(item) for item in _items(value))


def _passes(value: Any) -> tuple[str, ...]:
    names = _items(value)
    for name in names:
        known("pass", name, PASSES)
    return names


def _ranges(value: Any) -> tuple[int, ...] | dict[int, dict[str, Any]]:
    return {_count(end): _own(own) for end, own in value.items()} if isinstance(value, Mapping) else _counts(value)


def _own(value: Any) -> dict[str, Any]:
    """What one range has of its own."""
    if not isinstance(value, Mapping):
        raise ValueError('expected {"passes": (...), "inductor": {...}} for each end point')
    for name in value:
        known("setting of a range", name, ("passes", "inductor"))
    return {name: _passes(own) if name == "passes" else dict(own) for name, own in value.items()}


def _kernels(value: Any) -> str:
    known("kernels preference", value, KERNEL_PREFERENCES)
    return value


def _path(value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError("expected a path")
    return str(value)


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError("expected seconds, more than 0")
    return seconds


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "passes": _or_none(_passes), "disable_passes": _passes, "ranges": _or_none(_ranges), "sizes": _counts,
    "max_tokens": _or_none(_count), "strict": _flag, "verify": _flag, "fuel": _or_none(lambda value: _count(value, 0)),
    "kernels": _kernels, "table": _or_none(_path), "dump": _or_none(_path), "compile_all": _flag, "timeout": _seconds,
}  # fmt: skip
