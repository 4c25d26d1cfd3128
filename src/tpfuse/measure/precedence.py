"""Which form a layer takes at which size, from the times of what it is made of: pure functions over a table's entries.

A layer sums over the ranks behind one product and before others.  It can be

    all-reduced     the products alone, and all-reduce + add + norm (+ quantise) of all rows on every rank
    sharded         the products alone, and reduce-scatter + add + norm (+ quantise) + all-gather in one launch
    overlapped      product + reduce-scatter + add + norm (+ quantise) as one operator, all-gather + products as another

`sequence_parallel` is on where one of the last two is the fastest, `async_tp` where the last one is faster than the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tpfuse.lowering.table import Entry
from tpfuse.measure.entries import Times, margin, noise, steps
from tpfuse.measure.points import ALONE

SEQUENCE_PARALLEL, ASYNC_TP = "sequence_parallel", "async_tp"

Sizes = dict[int, float]  # microseconds by tokens


def decided(entries: Iterable[Entry]) -> list[Entry]:
    """`sequence_parallel` and `async_tp` for each dtype, scheme, world size and width, at the token counts that both forms were
    measured at.  The products of several layers of one width count together; without any the collectives are compared alone.
    """
    everything = list(entries)
    found: list[Entry] = []
    for whole in everything:
        suffix = "_quantize" * bool(whole.scheme)
        if whole.op == f"all_reduce_add_rms_norm{suffix}":
            found += _of_layer(whole, [e for e in everything if (e.scheme, e.world) == (whole.scheme, whole.world)])
    return found


def _of_layer(whole: Entry, others: Sequence[Entry]) -> list[Entry]:
    suffix, product = "_quantize" * bool(whole.scheme), "scaled_matmul" if whole.scheme else "matmul"

    def named(name: str) -> list[Entry]:
        return [e for e in others if (e.op, e.dtype, e.hidden) == (name, whole.dtype, whole.hidden)]

    sharded = named(f"reduce_scatter_add_rms_norm{suffix}_all_gather")
    scatters = named(f"{product}_reduce_scatter_add_rms_norm{suffix}")
    gathers = [e for e in others if e.op == f"all_gather_{product}" and _gathers(e, whole)]
    products = [*scatters, *gathers] if scatters and gathers else []
    sums = max(1, len(scatters))
    alone = _total([_times(e, ALONE) for e in products])
    before = {n: sums * us + alone.get(n, 0.0) for n, us in _times(whole).items()}
    apart = {n: sums * us + alone.get(n, 0.0) for e in sharded for n, us in _times(e).items()}
    together = _total([_times(e) for e in products])
    noises = [margin(noise(dict(of)) for _, of in e.times) for e in (whole, *sharded, *products) if e.times]
    pays = {
        n: {"off": us, "on": min(form[n] for form in (apart, together) if n in form)}
        for n, us in before.items() if n in apart or n in together
    }  # fmt: skip
    overlaps = {n: {"off": apart[n], "on": us} for n, us in together.items() if n in apart}
    both = ((SEQUENCE_PARALLEL, pays), (ASYNC_TP, overlaps))
    return [_entry(name, times, max(noises), whole) for name, times in both if times]


def _entry(name: str, times: Times, differing: float, whole: Entry) -> Entry:
    row = _row(whole)
    kept = tuple((n * row, tuple((k, round(us, 2)) for k, us in of.items())) for n, of in sorted(times.items()))
    return Entry(name, whole.dtype, whole.world, steps(times, differing, row), whole.scheme, whole.hidden, None, kept)


def _times(entry: Entry, choice: str | None = None) -> Sizes:
    """Of a choice by its name, or of what the entry chooses at each size."""
    return {size // _row(entry): dict(of)[choice or entry.choice(size)] for size, of in entry.times}


def _total(parts: Sequence[Sizes]) -> Sizes:
    """Of all of them, at the token counts that they share."""
    shared = set.intersection(*map(set, parts)) if parts else set()
    return {n: sum(part[n] for part in parts) for n in shared}


def _gathers(entry: Entry, whole: Entry) -> bool:
    """Whether the gathered rows of one are made of the sums of the other; quantised rows do not tell the sums' dtype."""
    packed = 2 if entry.dtype == "uint8" else 1
    return (entry.hidden or 0) * packed == whole.hidden and (bool(whole.scheme) or entry.dtype == whole.dtype)


def _row(entry: Entry) -> int:
    return (entry.hidden or 0) * getattr(torch, entry.dtype).itemsize
