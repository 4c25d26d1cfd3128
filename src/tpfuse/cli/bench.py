"""`tpfuse bench collectives`: fused against unfused all-reduces, as a table, a result file and a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid

from tpfuse.cli import fit, plots
from tpfuse.cli.inputs import BadInput, writable
from tpfuse.cli.launch import Place, Progress, launch
from tpfuse.lowering.table import Table
from tpfuse.measure import results
from tpfuse.measure.points import Point, Sweep, grid
from tpfuse.measure.sharded import ShardedPoint, implementations, picked_sharded

TOKENS = (1, 8, 32, 64, 96, 128, 200, 256, 512, 700, 1024, 1500, 2048)  # four of them off the grid that tune measures
HIDDEN = (4096, 5120, 8192)
SCHEMES = ("none", "fp8_tensor", "fp8_group128")


@dataclass(frozen=True)
class Job:
    """points: in order.  limit_s: when to begin no further point.  extra: what else belongs at the top of the result file.
    json: where rank 0 writes it, anew after each point, so that a run that is cut off leaves what it had."""

    points: tuple[Point, ...]
    world: int
    trials: int
    eager: bool
    table: Table
    limit_s: float | None
    extra: Mapping[str, Any]
    json: Path | None


def collectives(
    console: Console, world: int, tokens: Sequence[int], hidden: Sequence[int], schemes: Sequence[str], dtype: str,
    residual: bool, sharded: bool, trials: int, baseline: str, eager: bool, table: Table, limit_s: float | None,
    json: Path | None, plot: Path | None, commit: str | None,
) -> None:  # fmt: skip
    """The command: see `tpfuse bench collectives --help`.  Raises BadInput, RankError or TimeoutError."""
    place = need_gpus(world)
    writable(json)
    plots.check(plot)
    points: list[Point] = grid(schemes, hidden, tokens, dtype, residual)
    if sharded:
        points = [ShardedPoint(p.scheme, p.hidden, p.tokens, dtype) for p in points]
        if odd := [n for n in tokens if n % world]:
            raise BadInput(f"--sharded is measured at multiples of {world} tokens, not at {odd}")
    extra = {
        "world": world, "commit": commit or results.commit(), "table": table.digest if table.entries else None,
        "baseline": baseline,
    }  # fmt: skip
    job = Job(tuple(points), world, trials, eager, table, limit_s, extra, json)
    document = run_ranks(work, place, world, job)
    if place is not None and place.rank:
        return
    show(console, document)
    if plot:
        for path in plots.save(document, plot):
            console.print(f"wrote {path}", highlight=False)


def need_gpus(world: int) -> Place | None:
    """torchrun's place if there is one.  BadInput where there is no GPU for each rank."""
    place = Place.of_torchrun()
    if place is not None and place.world != world:
        raise BadInput(f"--world {world}, but {place.world} ranks were started")
    if (place.local_world if place else world) > torch.cuda.device_count():
        raise BadInput(f"--world {world}, but {torch.cuda.device_count()} GPUs are visible: a rank needs a GPU of its own")
    return place


def run_ranks(job_of_a_rank: Any, place: Place | None, world: int, *args: Any) -> Any:
    """What rank 0 returns."""
    if place is not None:
        os.environ.update(place.environment())
        return job_of_a_rank(place, lambda *_: None, *args)
    return launch(job_of_a_rank, world, *args, progress=lambda *_: None)[0]


def work(place: Place, progress: Progress, job: Job) -> dict[str, Any]:
    """One rank: → the result file's contents, the same on all."""
    from tpfuse.measure.collectives import picked_impl
    from tpfuse.measure.ranks import Ranks

    ranks = Ranks.join(place, job.points, job.eager)
    timer = ranks.timer(job.trials)
    rows = ranks.empty_kernel(timer)

    def document() -> dict[str, Any]:
        return results.document("collectives", rows, **job.extra, **machine, notes=ranks.notes)

    def tell(point: Point, found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        progress(line(found), 0, 0)
        if place.rank == 0:
            print(line(found), flush=True)
            if job.json:
                results.write(job.json, document())

    def picked(point: Point) -> str | None:
        if isinstance(point, ShardedPoint):
            return picked_sharded(point, ranks.target, job.table)
        return picked_impl(point, ranks.target, job.table)

    def build(point: Point) -> Any:
        if isinstance(point, ShardedPoint):
            return implementations(ranks.built, point)
        return {**ranks.built.ours(point, picked(point)), **ranks.built.peers(point)}

    machine = results.environment()
    Sweep(place.world, build, timer.of, ranks.share, job.limit_s, tell).run(job.points, picked)
    ranks.leave()
    return document()


def line(rows: Sequence[dict[str, Any]]) -> str:
    """A point in one line."""
    first = rows[0]
    times = "  ".join(f"{row['impl']}{'*' if row.get('picked') else ''} {row['us']:.1f}" for row in rows)
    return f"{first['scheme'] or 'none':13} {first['tokens']:5} x {first['hidden']}: {times}"


def show(console: Console, document: dict[str, Any]) -> None:
    """Operation · Time (µs) · Speedup, a block a point."""
    baseline = document["baseline"]
    table = Grid(title=f"Speedup over {baseline}; * is what lowering picks", title_justify="left")
    for name, justify in (("Operation", "left"), ("", "left"), ("Time (µs)", "right"), ("Speedup", "right"),
                          ("Limit (µs)", "right"), ("Reached", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for rows in points_of(document["rows"]):
        base = next((row["us"] for row in rows if row["impl"] == baseline), None)
        for i, row in enumerate(rows):
            operation = f"{row['op']} {row['scheme']} {row['tokens']} × {row['hidden']}" if i == 0 else ""
            limit = row.get("limit_us")
            table.add_row(
                operation, row["impl"] + ("*" if row.get("picked") else ""), f"{row['us']:.1f}",
                f"{base / row['us']:.2f}×" if base else "", f"{limit:.1f}" if limit else "",
                f"{limit / row['us']:.0%}" if limit else "", end_section=i == len(rows) - 1,
            )  # fmt: skip
    fit.show(console, table)
    if document["rows"] and all(row["impl"] != baseline for row in document["rows"]):
        known = ", ".join(dict.fromkeys(row["impl"] for row in document["rows"]))
        console.print(f"--baseline {baseline}: none such was measured (but {known})", highlight=False)
    for note in document["notes"]:
        console.print(note, highlight=False)


def points_of(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of a result file by point, in the order of the file."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["op"], row["scheme"], row["dtype"], row["hidden"], row["tokens"]), []).append(row)
    return list(found.values())


