"""What a measured entry says for a range of sizes: which kernels, up to which size each, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpfuse.lowering.table import UNFUSED, Entry

Steps = tuple[tuple[int | None, str], ...]


@dataclass(frozen=True)
class Choice:
    """steps: (bytes, kernel), ascending, the last without end; empty where the unfused path was faster, or no kernel measured
    serves.  why: for people."""

    steps: Steps
    why: str
    unfused: bool = False


def choose(entry: Entry, low: int, high: int | None, serves: Callable[[str], bool] = lambda kernel: True) -> Choice:
    """The choice for messages of `low` … `high` bytes (None: without end), among the kernels for which `serves` is true.

    A graph holds several kernels, chosen between when it runs, but it is fused or not: where a range holds both answers (ranges
    are few, so near thresholds were merged), the one that covers more of it counts, by the ratio of sizes.  What is
    left out is filled by the smaller neighbour, else by the larger one.
    """
    steps, covered = entry.within(low, high), entry.covered(low, high)
    unfused = covered.pop(UNFUSED, 0.0)
    told = ", ".join(f"{kernel} up to {end}" if end is not None and end != high else kernel for end, kernel in steps)
    why = f"measured{'' if entry.hidden is None else f' at hidden {entry.hidden}'}: {told}"
    if unfused > sum(covered.values()):
        return Choice((), why, unfused=True)
    kept: list[tuple[int | None, str]] = []
    for end, kernel in steps:
        if kernel != UNFUSED and serves(kernel) and not (kept and kept[-1][1] == kernel):
            kept.append((end, kernel))
        elif kept:
            kept[-1] = (end, kept[-1][1])
    return Choice((*kept[:-1], *((None, kernel) for _, kernel in kept[-1:])), why)
