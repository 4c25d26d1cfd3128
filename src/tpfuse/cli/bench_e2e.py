"""`tpfuse bench e2e`: time per token and to the first token of a Llama-shaped stack, fused and not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid

from tpfuse.cli.bench import need_gpus, points_of, run_ranks
from tpfuse.cli.launch import Place, Progress
from tpfuse.cli.models import BadInput
from tpfuse.measure import results
from tpfuse.measure.stack import SHAPES, Stack


@dataclass(frozen=True)
class Job:
    """decode: sequences that take a step together.  prefill: tokens of one sequence.  cached: positions read by a decode step."""

    shapes: tuple[str, ...]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    layers: int
    cached: int
    trials: int
    table: str | None


def e2e(
    console: Console, world: int, shapes: Sequence[str], decode: Sequence[int], prefill: Sequence[int], layers: int, cached: int,
    trials: int, table: Path | None, json: Path | None, commit: str | None,
) -> None:  # fmt: skip
    """The command: see `tpfuse bench e2e --help`.  Raises BadInput, RankError or TimeoutError."""
    for name in shapes:
        if name not in SHAPES:
            raise BadInput(f"unknown shape {name!r} (known: {', '.join(SHAPES)})")
        if reason := SHAPES[name].check(world):
            raise BadInput(f"{name} on {world} ranks: {reason}")
    place = need_gpus(world)
    job = Job(tuple(shapes), tuple(decode), tuple(prefill), layers, cached, trials, str(table) if table else None)
    found = run_ranks(work, place, world, job)
    if place is not None and place.rank:
        return
    document = results.document("e2e", found["rows"], world=world, commit=commit or results.commit(), **found["extra"])
    if json:
        results.write(json, document)
    show(console, document["rows"])


def work(place: Place, progress: Progress, job: Job) -> dict[str, Any]:
    """One rank: → {"rows", "extra"}, the same on all."""
    from tpfuse.measure import e2e
    from tpfuse.measure.points import grid
    from tpfuse.measure.ranks import Ranks

    ranks = Ranks.join(place, grid([""], [8192], [1]), False)
    timer = ranks.timer(job.trials)
    rows: list[dict[str, Any]] = []
    for name in job.shapes:
        torch.manual_seed(place.rank)
        stack = Stack(SHAPES[name], job.layers, place.world, torch.bfloat16)
        found = e2e.variants(job.table, max([*job.decode, *job.prefill]), "flashinfer" in ranks.target.backends)
        runner = e2e.Runner(stack, ranks.group, found)
        for tokens, cached in [*((n, job.cached) for n in job.decode), *((n, None) for n in job.prefill)]:
            new = runner.measure(timer, tokens, cached, ranks.share)
            rows += new
            if place.rank == 0:
                times = "  ".join(f"{row['impl']} {row['us']:.1f}" for row in new)
                print(f"{name} {new[0]['op']} {tokens}: {times}", flush=True)
        del runner, stack
        torch.compiler.reset()
        torch.cuda.empty_cache()
    ranks.leave()
    return {"rows": rows, "extra": {**results.environment(), "notes": ranks.notes}}


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Time a layer, speed-up and the share of the room that was closed, a block a point."""
    from tpfuse.measure.e2e import PLAIN, closed

    table = Grid(title=f"Microseconds a layer; room: {PLAIN} against no collectives at all", title_justify="left")
    for name in ("Operation", "", "Time (µs)", "Speedup", "Room closed"):
        table.add_column(name, justify="left" if name in ("Operation", "") else "right")
    for point in points_of(rows):
        base = next(row["us"] for row in point if row["impl"] == PLAIN)
        shares = closed(point)
        for i, row in enumerate(point):
            table.add_row(
                f"{row['op']} {row['tokens']} × {row['hidden']}" if i == 0 else "", row["impl"], f"{row['us']:.1f}",
                f"{base / row['us']:.2f}×", f"{shares[row['impl']]:.0%}" if row["impl"] in shares else "",
                end_section=i == len(point) - 1,
            )  # fmt: skip
    console.print(table, highlight=False)
