"""What was measured to be fastest on one machine: by operator, scheme, dtype, world size, width and bytes.

A table is a JSON file that `tpfuse tune` writes:

    {"machine": "2 x NVIDIA H100", "versions": {"torch": "2.11.0", "triton": "3.6.0"},
     "entries": [{"op": "sequence_parallel", "scheme": "", "dtype": "bfloat16", "world": 2, "hidden": null,
                  "across": null, "steps": [[8388608, "off"], [null, "on"]],
                  "times": [[4194304, {"off": 41.5, "on": 47.25}], [16777216, {"off": 160.5, "on": 121.0}]]}]}

A step's choice holds up to and with its bytes, null without end.  Choices of an operator are kernels by name
("triton:one_shot") or "unfused", those of a pass "on" and "off".  Bytes are of the rows that meet in the collective, all ranks'
together: tokens · hidden · item size.  Next to a product dtype and hidden are theirs too (`Op.message`): of the product
before a reduce-scatter, of what is gathered before a product, quantised rows by their own dtype; `across` is the other dimension
of the weights.  A size that was not measured is served by the nearest one that was, by their ratio, `hidden` before `across`.
`times` are the measurements behind the steps: microseconds of each choice by bytes, what was measured beside them too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tpfuse.files import write
from tpfuse.report import Decline
from tpfuse.target import Range

UNFUSED = "unfused"
ENDLESS = 16  # a range without end counts as four doublings beyond its last threshold


@dataclass(frozen=True)
class Entry:
    """Choices for one operator at one dtype ("bfloat16") and world size.

    hidden, across: the sizes it was measured at; None for every one.  steps: (bytes, choice), ascending, the last without end.
    times: (bytes, ((choice, µs), …)), ascending; no part of what an entry decides.
    """

    op: str
    dtype: str
    world: int
    steps: tuple[tuple[int | None, str], ...]
    scheme: str = ""
    hidden: int | None = None
    across: int | None = None
    times: tuple[tuple[int, tuple[tuple[str, float], ...]], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        ends = [end for end, _ in self.steps]
        numbers = [end for end in ends[:-1] if end is not None]
        if not ends or ends[-1] is not None or len(numbers) != len(ends) - 1 or numbers != sorted(set(numbers)):
            raise ValueError(f"{self.op}: steps must ascend in bytes and end in null, got {ends}")

    def choice(self, size: int) -> str:
        return next(choice for end, choice in self.steps if end is None or size <= end)

    def covered(self, low: int, high: int | None) -> dict[str, float]:
        """How much of `low` … `high` bytes each choice covers, in doublings of the size."""
        found: dict[str, float] = {}
        begin = low
        for end, choice in self.within(low, high):
            last = ENDLESS * begin if end is None else end
            found[choice] = found.get(choice, 0.0) + math.log2(max(last, begin + 1) / begin)
            begin = last
        return found

    def told(self, size: int) -> str:
        """What was measured at the nearest size, for people; "" where nothing is kept."""
        nearest = min(self.times, key=lambda of: abs(math.log(of[0] / size)), default=None)
        if nearest is None:
            return ""
        return f"; at {nearest[0]} bytes: " + ", ".join(f"{choice} {us:.1f} µs" for choice, us in nearest[1])

    def within(self, low: int, high: int | None) -> list[tuple[int | None, str]]:
        """The steps that sizes of `low` … `high` bytes (None: without end) fall into, the last one ending at `high`."""
        found: list[tuple[int | None, str]] = []
        for end, choice in self.steps:
            if end is not None and end < low:
                continue
            if end is None or (high is not None and end >= high):
                return [*found, (high, choice)]
            found.append((end, choice))
        raise AssertionError("the last step has no end")


@dataclass(frozen=True)
class Table:
    """machine, versions: where and with what the entries were measured (see `runtime.detect`)."""

    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    entries: tuple[Entry, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read a table.  OSError where there is no file, ValueError naming it where it is no table."""
        return cls.parse(Path(path).read_bytes(), str(path))

    @classmethod
    def parse(cls, text: str | bytes, name: str = "the text") -> Table:
        """A table from what `to_json` gave.  ValueError, naming `name`, where it is none."""
        try:
            data = json.loads(text)
            return cls(data["machine"], data["versions"], tuple(_entry(**e) for e in data["entries"]))
        except KeyError as error:
            raise ValueError(f"{name} is no table of measurements: {error} is missing") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is no table of measurements: {error}") from error

    def save(self, path: str | Path) -> None:
        write(path, self.to_json() + "\n")

    def to_json(self) -> str:
        entries = [
            {**vars(e), "steps": [list(s) for s in e.steps], "times": [[size, dict(of)] for size, of in e.times]}
            for e in self.entries
        ]
        return json.dumps({"machine": self.machine, "versions": dict(self.versions), "entries": entries}, indent=1)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the table's contents."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def stale(self, machine: str, versions: Mapping[str, str]) -> Decline | None:
        """Why the table may be wrong here: measured on another machine, or with other versions; None where neither is so."""
        pairs = [("machine", self.machine, machine)]
        pairs += [(k, self.versions.get(k, "none"), versions.get(k, "none")) for k in {**self.versions, **versions}]
        changed = [f"{name} was {then}, is {now}" for name, then, now in pairs if then != now]
        return Decline("stale_table", "; ".join(changed) + "; run tpfuse tune") if changed else None

    def find(
        self, op: str, dtype: Any, world: int, scheme: str = "", hidden: int | None = None, across: int | None = None
    ) -> Entry | None:
        """The entry for these sizes, else one for every size, else the nearest ones'; None: nothing was measured."""
        name = str(dtype).removeprefix("torch.")
        same = [e for e in self.entries if (e.op, e.dtype, e.world, e.scheme) == (op, name, world, scheme)]
        return min(same, key=lambda e: (_apart(e.hidden, hidden), _apart(e.across, across)), default=None)

    def refuses(
        self, name: str, dtype: Any, world: int, limits: Range, hidden: int, scheme: str = ""
    ) -> Decline | None:
        """Why a pass should leave sites of these token counts and that width alone: measured to be slower at most of them, or
        never measured.

        A scheme that was not measured is judged by rows that are not quantised, of which more bytes are gathered.
        """
        entry = self.find(name, dtype, world, scheme, hidden) or self.find(name, dtype, world, "", hidden)
        if entry is None:
            return Decline("unmeasured", f"no measurement says that {name} pays here: run tpfuse tune, or name the pass")
        low, high = limits.bytes(hidden * dtype.itemsize)
        covered = entry.covered(low, high)
        if covered.get("on", 0.0) > covered.get("off", 0.0):
            return None
        where = f"from {low} bytes on" if high is None else f"at {low} to {high} bytes"
        told = ", ".join(_step(*s) for s in entry.steps)
        return Decline("threshold", f"measured slower {where} ({told}){entry.told(low)}")

    def thresholds(self, sites: Iterable[tuple[Any, int, int]], schemes: Iterable[str] | None = None) -> list[int]:
        """Token counts at which another graph is better for collectives of (dtype, world, width); each closes a range.  Those at
        which a pass begins to pay come first, then those at which a kernel does; both ascend.

        schemes: those that occur in the graph ("" for none); None for all that were measured.
        """
        present = None if schemes is None else set(schemes)
        passes: set[int] = set()
        kernels: set[int] = set()
        for dtype, world, hidden in sites:
            row = hidden * dtype.itemsize
            for entry in self._nearest(dtype, world, hidden, present):
                for (end, choice), (_, following) in pairwise(entry.steps):
                    if end is not None and end >= row and UNFUSED in (choice, following):
                        kernels.add(end // row)
                    elif end is not None and end >= row and choice in ("on", "off"):
                        passes.add(end // row)
        return [*sorted(passes), *sorted(kernels - passes)]

    def _nearest(self, dtype: Any, world: int, hidden: int, schemes: set[str] | None) -> Iterable[Entry]:
        """For each operator and scheme the entries that sites of a width are served by, whatever their other dimension."""
        for op, scheme in {(e.op, e.scheme) for e in self.entries if schemes is None or e.scheme in schemes}:
            found = self.find(op, dtype, world, scheme, hidden)
            if found is not None:
                alike = (found.op, found.dtype, found.world, found.scheme, found.hidden)
                yield from (e for e in self.entries if (e.op, e.dtype, e.world, e.scheme, e.hidden) == alike)


BUILT_IN = Table()
"""Until something is measured: all-reduce + norm wherever a kernel serves it, no other form, one range."""


def _entry(steps: Any, times: Any = (), **rest: Any) -> Entry:
    return Entry(
        steps=tuple((end, choice) for end, choice in steps), times=tuple((size, tuple(of.items())) for size, of in times), **rest
    )


def _apart(measured: int | None, size: int | None) -> float:
    if measured == size:
        return -2.0
    return -1.0 if measured is None or size is None else abs(math.log(measured / size))


def _step(end: int | None, choice: str) -> str:
    return f"{choice} up to {end}" if end is not None else f"{choice} beyond"
