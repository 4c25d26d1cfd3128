"""From measurements to a table's entries: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from tpfuse.lowering.table import Entry
from tpfuse.measure.points import AGAIN, ALONE

# Of two that take the same time the earlier one is chosen; what is not listed comes last.
SIMPLEST = (
    "off", "on", "unfused", "triton:one_shot", "cuda:one_shot", "triton:two_shot", "cuda:two_shot", "nccl", "cuda:plain",
    "cuda:push", "cuda:chunked",
)  # fmt: skip
LEAST_MARGIN = 0.01
SWITCH = 0.005  # what a change of choices must win, over all sizes, as a share of one size's time

Times = Mapping[int, Mapping[str, float]]  # microseconds by token count and choice


def entries(rows: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """An entry for each operator, scheme, dtype, world size and width among the rows of a result, whose `impl` are kernels by
    name, "unfused" or "on" and "off", and for a product the product `ALONE`; one of them measured twice."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    found = []
    for (op, scheme, dtype, world, hidden, across), own in groups.items():
        times: dict[int, dict[str, float]] = {}
        for row in own:
            times.setdefault(row["tokens"], {})[row["impl"]] = row["us"]
        again = {tokens: noise(of) for tokens, of in times.items()}
        choices = {tokens: {k: t for k, t in of.items() if is_choice(k)} for tokens, of in times.items()}
        row_bytes = hidden * getattr(torch, dtype).itemsize
        measured = tuple((n * row_bytes, tuple((k, round(t, 2)) for k, t in of.items())) for n, of in sorted(times.items()))
        chosen = steps(choices, margin(again.values()), row_bytes)
        found.append(Entry(op, dtype, world, chosen, scheme, hidden, across, measured))
    return found


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row's entry is found by."""
    return row["op"], row["scheme"], row["dtype"], row["world"], row["hidden"], row.get("across")


def is_choice(impl: str) -> bool:
    """Whether a name stands for what lowering can choose, not for a repetition or a bound."""
    return not impl.endswith(AGAIN) and impl != ALONE


def noise(times: Mapping[str, float]) -> float:
    """By how much two measurements of the same thing differed."""
    for impl, first in times.items():
        if impl.endswith(AGAIN):
            return abs(first / times[impl.removesuffix(AGAIN)] - 1)
    raise ValueError(f"nothing was measured twice among {', '.join(times)}")


def margin(noises: Iterable[float]) -> float:
    """Differences up to this share mean nothing: three quarters of the repetitions differed by less, and never below 1%."""
    ordered = sorted(noises)
    if len(ordered) == 1:
        return max(LEAST_MARGIN, ordered[0])
    return max(LEAST_MARGIN, statistics.quantiles(ordered, n=4, method="inclusive")[2])


def steps(times: Times, margin: float, row: int) -> tuple[tuple[int | None, str], ...]:
    """The choice at each size that loses least over all sizes, where a loss below `margin` is none and a change of choices costs
    `SWITCH`; among equals the simplest.  A step ends between two sizes, at their geometric mean.

    row: bytes of a token.  ValueError where no choice was measured at some size.
    """
    sizes = sorted(times)
    names = sorted({name for of in times.values() for name in of}, key=_rank)
    # By choice at the last size so far: (loss, the choices up to here).
    best: dict[str, tuple[float, tuple[str, ...]]] = {"": (0.0, ())}
    for size in sizes:
        fastest = min(times[size].values(), default=math.inf)
        following: dict[str, tuple[float, tuple[str, ...]]] = {}
        for order, name in enumerate(names):
            if name not in times[size]:
                continue
            lost = max(0.0, times[size][name] / fastest - 1 - margin) + order * 1e-6
            paths = [
                (loss + lost + (SWITCH if path and path[-1] != name else 0.0), (*path, name)) for loss, path in best.values()
            ]
            following[name] = min(paths, key=lambda found: found[0])
        if not following:
            raise ValueError(f"nothing was measured at {size} tokens")
        best = following
    _, path = min(best.values(), key=lambda found: found[0])
    found: list[tuple[int | None, str]] = []
    for (size, choice), (larger, after) in pairwise(zip(sizes, path, strict=True)):
        if choice != after:
            found.append((math.isqrt(size * larger) * row, choice))
    return (*found, (None, path[-1]))


def _rank(choice: str) -> tuple[int, str]:
    return SIMPLEST.index(choice) if choice in SIMPLEST else len(SIMPLEST), choice


def losses(times: Times, chosen: Sequence[tuple[int | None, str]], row: int) -> dict[int, float]:
    """By token count, by how much the choice of these steps was slower than the fastest, as a share."""
    entry = Entry("", "", 0, tuple(chosen))
    return {size: of[entry.choice(size * row)] / min(of.values()) - 1 for size, of in times.items()}
