"""`tpfuse bench e2e`: time a layer of stacks shaped like models, fused and not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from tpfuse.measure.linears import SCHEMES
from tpfuse.measure.stack import SHAPES, Stack


@dataclass(frozen=True)
class Job:
    """decode: sequences that take a step together.  prefill: tokens of one sequence.  cached: positions read by a decode step.
    limit_s: when to begin no further point.  extra: what else belongs at the top of the result file.  json: where rank 0 writes
    it, anew after each point, so that a run that is cut off leaves what it had."""

    shapes: tuple[str, ...]
    schemes: tuple[str, ...]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    layers: int
    cached: int
    trials: int
    table: str | None
    limit_s: float | None
    extra: Mapping[str, Any]
    json: Path | None


def e2e(
    console: Console, world: int, shapes: Sequence[str], schemes: Sequence[str], decode: Sequence[int], prefill: Sequence[int],
    layers: int, cached: int, trials: int, table: Path | None, limit_s: float | None, json: Path | None, commit: str | None,
) -> None:  # fmt: skip
    """The command: see `tpfuse bench e2e --help`.  Raises BadInput, RankError or TimeoutError."""
    for name in shapes:
        if name not in SHAPES:
            raise BadInput(f"unknown shape {name!r} (known: {', '.join(SHAPES)})")
        if reason := SHAPES[name].check(world):
            raise BadInput(f"{name} on {world} ranks: {reason}")
    if odd := [scheme for scheme in schemes if scheme not in SCHEMES]:
        raise BadInput(f"no stack is made with {', '.join(odd)} (but with: {', '.join(s or 'none' for s in SCHEMES)})")
    if odd := [n for n in prefill if n % world]:
        raise BadInput(f"a prefill's rows are shared out: {odd} are no multiples of {world}")
    place = need_gpus(world)
    extra = {"world": world, "commit": commit or results.commit()}
    job = Job(
        tuple(shapes), tuple(schemes), tuple(decode), tuple(prefill), layers, cached, trials, str(table) if table else None,
        limit_s, extra, json,
    )  # fmt: skip
    document = run_ranks(work, place, world, job)
    if place is None or place.rank == 0:
        show(console, document["rows"])


def work(place: Place, progress: Progress, job: Job) -> dict[str, Any]:
    """One rank: → the result file's contents, the same on all."""
    import time

    from tpfuse.measure import e2e
    from tpfuse.measure.points import grid
    from tpfuse.measure.ranks import Ranks

    begin = time.monotonic()
    ranks = Ranks.join(place, grid([""], [8192], [1]), False)
    timer = ranks.timer(job.trials)
    rows: list[dict[str, Any]] = []
    machine = results.environment()
    flashinfer = "flashinfer" in ranks.target.backends
    points = [*((n, job.cached) for n in job.decode), *((n, None) for n in job.prefill)]

    def document() -> dict[str, Any]:
        return results.document("e2e", rows, **job.extra, **machine, notes=ranks.notes)

    for name, scheme in ((name, scheme) for name in job.shapes for scheme in job.schemes):
        torch.manual_seed(place.rank)
        stack = Stack(SHAPES[name], job.layers, place.world, torch.bfloat16, scheme=scheme)
        decode, prefill = (
            e2e.Variants(ranks.group, scheme, job.table, max(counts, default=1)) for counts in (job.decode, job.prefill)
        )
        runner = e2e.Runner(stack, decode.decode(flashinfer), prefill.prefill())
        for tokens, cached in points:
            if job.limit_s is not None and ranks.share(time.monotonic() - begin)[0] > job.limit_s:
                break
            progress(f"{name} {scheme}, {tokens} tokens", 0, 0)
            found = runner.measure(timer, tokens, cached, ranks.share)
            rows += found
            if place.rank == 0:
                times = "  ".join(f"{row['impl']} {row['us']:.1f}" for row in found)
                print(f"{name} {scheme or 'none'} {found[0]['op']} {tokens}: {times}", flush=True)
                if job.json:
                    results.write(job.json, document())
        del runner, stack
        torch.compiler.reset()
        torch.cuda.empty_cache()
    ranks.leave()
    return document()


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
                f"{row['op']} {row['scheme']} {row['tokens']} × {row['hidden']}" if i == 0 else "", row["impl"],
                f"{row['us']:.1f}", f"{base / row['us']:.2f}×",
                f"{shares[row['impl']]:.0%}" if row["impl"] in shares else "", end_section=i == len(point) - 1,
            )  # fmt: skip
    console.print(table, highlight=False)
