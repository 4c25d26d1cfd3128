"""What happened to every site, as data.  Each stage returns events; a Report collects them and is printed by `explain`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tpfuse.target import Range


@dataclass(frozen=True)
class Decline:
    """A named reason.  code: one stable word ("weight_dtype"), for programs.  detail: one sentence, for people."""

    code: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code


class FusionError(RuntimeError):
    """A promise that could not be kept: a missing fusion under `strict`, ranks that disagree, a peer that never came."""


@dataclass(frozen=True)
class Event:
    """One thing that happened at one site.

    status: "fired" (a rule rewrote the site), "declined" (the closest rule did not, `reason` says why), "lowered" (a kernel
    was chosen) or "unfused" (fused, then taken apart again for want of a kernel; counts as declined).
    rule: the rule's or operator's name.  site: the layer path ("model.layers.3.mlp").  range: None where it holds for all.
    attributes: what the operator carries (eps, weight_bias, scheme, kernel …).  node: its name in the graph, for dumps.
    """

    status: str
    rule: str
    site: str = ""
    range: Range | None = None
    reason: Decline | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    node: str = ""

    def __str__(self) -> str:
        where = self.site or "(graph)"
        extra = f" ({self.reason})" if self.reason else ""
        attrs = "".join(f" {k}={v}" for k, v in self.attributes.items())
        return f"{self.status:8} {self.rule:36} {where}{attrs}{extra}"


@dataclass(frozen=True)
class Line:
    """One node of a graph as text: `name: shape = operator(arguments)`, and the layer path it comes from ("" for none)."""

    name: str
    operator: str
    arguments: str
    shape: str
    site: str


@dataclass
class RangeResult:
    """What one compiled graph holds: `ops`, the tpfuse operators in the final graph by name, in program order.

    before, after: the graph as it was captured and as Inductor would get it; filled by `explain` alone.
    """

    graph: int
    range: Range
    ops: list[str]
    events: list[Event]
    before: list[Line] = field(default_factory=list)
    after: list[Line] = field(default_factory=list)


class Report:
    """The fusion report of one process: filled at compile time of every graph and range, compile-cache hit or not."""

    def __init__(self, empty: str = "nothing compiled yet") -> None:
        """empty: what is printed while there is nothing in it."""
        self.empty = empty
        self.results: list[RangeResult] = []
        self.shared: list[Event] = []  # of no particular range: raising, training graphs
        self.verified: list[dict[str, Any]] = []  # filled by Config(verify=True), see `check`

    def add(self, result: RangeResult) -> None:
        self.results.append(result)

    def check(self, row: Mapping[str, Any]) -> None:
        """Take the errors of one call of a fused site into `verified`: a row for each site, operator, kernel and result holds how
        often it was checked (`calls`) and the largest of each figure."""
        same = [name for name, value in row.items() if not isinstance(value, float)]
        for known in self.verified:
            if all(known[name] == row[name] for name in same):
                known.update({name: max(known[name], value) for name, value in row.items() if name not in same})
                known["calls"] += 1
                return
        self.verified.append({**row, "calls": 1})

    @property
    def events(self) -> list[Event]:
        return self.shared + [e for r in self.results for e in r.events]

    @property
    def ranges(self) -> list[Range]:
        return sorted({r.range for r in self.results})

    def counts(self, range: Range | None = None) -> dict[str, int]:
        """Operators of tpfuse in the final graphs by name; `range=None` sums over the ranges compiled so far."""
        names: Counter[str] = Counter()
        for result in self.results:
            if range is None or result.range == range:
                names.update(result.ops)
        return dict(sorted(names.items()))

    def fired(self, range: Range | None = None) -> list[Event]:
        return self._select({"fired"}, range)

    def declined(self, range: Range | None = None) -> list[Event]:
        """Sites left as they were, or taken apart again, each with its named reason."""
        return self._select({"declined", "unfused"}, range)

    def _select(self, statuses: set[str], range: Range | None) -> list[Event]:
        return [e for e in self.events if e.status in statuses and (range is None or e.range in (None, range))]

    def to_json(self) -> str:
        """A JSON text: `counts`, `ranges`, `events`, and `verified` where verification ran."""
        return json.dumps(
            {
                "counts": self.counts(),
                "ranges": [
                    {"graph": r.graph, "range": [r.range.start, r.range.end], "ops": dict(Counter(r.ops))}
                    for r in self.results
                ],
                "events": [_event_json(e) for e in self.events],
                "verified": self.verified,
            },
            indent=1,
        )

    def __str__(self) -> str:
        lines = []
        for result in self.results:
            ops = ", ".join(f"{n} × {name}" for name, n in sorted(Counter(result.ops).items())) or "no tpfuse operator"
            lines.append(f"graph {result.graph}, tokens {result.range}: {ops}")
            lines += [f"  {line}" for line in _grouped(result.events)]
        if self.shared:
            lines.append("every range:")
            lines += [f"  {line}" for line in _grouped(self.shared)]
        return "\n".join(lines) or self.empty


def _event_json(event: Event) -> dict[str, Any]:
    out = asdict(event)
    out["range"] = [event.range.start, event.range.end] if event.range else None
    out["attributes"] = {k: str(v) if not isinstance(v, int | float | str | None) else v for k, v in event.attributes.items()}
    return out


def _grouped(events: Iterable[Event]) -> list[str]:
    """Events that differ in nothing but the layer number share a line."""
    groups: dict[str, list[Event]] = {}
    for event in events:
        key = str(Event(event.status, event.rule, numberless(event.site), None, event.reason, event.attributes))
        groups.setdefault(key, []).append(event)
    return [key if len(es) == 1 else f"{key}  × {len(es)}" for key, es in groups.items()]


def numberless(site: str) -> str:
    """A layer path with "*" for its numbers."""
    return ".".join("*" if part.isdigit() else part for part in site.split("."))
