"""What a measured entry says for a range of sizes: one kernel, or none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tpfuse.lowering.table import AT_LAUNCH, Entry

UNFUSED = "unfused"
ENDLESS = 1 << 62
BY_SIZE = "triton"  # chooses among AT_LAUNCH when it is launched


@dataclass(frozen=True)
class Choice:
    """kernel: a kernel's name, or UNFUSED.  limit: for BY_SIZE, the bytes up to which it takes the one-shot.  why: for people."""

    kernel: str
    why: str
    limit: int | None = None


def choose(entry: Entry, low: int, high: int | None) -> Choice:
    """The choice for messages of `low` … `high` bytes (None: without end).

    One-shot and two-shot count as one kernel, which gets the size where they meet.  Where other choices change inside the range
    (ranges are few, so near thresholds were merged), the one that holds over most of it, by the ratio of sizes, is taken.
    """
    spans: dict[str, float] = {}
    begin = low
    for end, choice in entry.within(low, high):
        last = 16 * begin if end is None else end  # a range without end counts four doublings beyond the last threshold
        kernel = BY_SIZE if choice in AT_LAUNCH else choice
        spans[kernel] = spans.get(kernel, 0.0) + math.log2(max(last, begin + 1) / begin)
        begin = last
    kernel = max(spans, key=lambda k: spans[k])
    measured = "" if entry.hidden is None else f" at hidden {entry.hidden}"
    why = f"measured{measured}: " + ", ".join(
        f"{choice}{'' if end is None else f' up to {end} bytes'}" for end, choice in entry.within(low, high)
    )
    if kernel != BY_SIZE:
        return Choice(kernel, why)
    own = {choice for _, choice in entry.within(low, high) if choice in AT_LAUNCH}
    if len(own) == 1 and len(spans) == 1:
        return Choice(own.pop(), why)
    return Choice(BY_SIZE, why, _meeting(entry))


def _meeting(entry: Entry) -> int:
    """The largest size that the one-shot was measured to be best at."""
    whole, _ = AT_LAUNCH
    return max((ENDLESS if end is None else end for end, choice in entry.steps if choice == whole), default=0)
