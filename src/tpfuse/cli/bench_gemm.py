"""`tpfuse bench gemm`: products next to a collective against their peers and the product alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from tpfuse.cli import fit, plots
from tpfuse.cli.bench import line, need_gpus, run_ranks
from tpfuse.cli.inputs import BadInput, writable
from tpfuse.cli.launch import Place, Progress
from tpfuse.lowering.table import Table
from tpfuse.measure import gemm, results
from tpfuse.measure.gemm import ALONE, GemmPoint
from tpfuse.measure.points import AGAIN, Sweep

TOKENS = (512, 1024, 2048, 4096, 8192)
SCHEMES = ("none", "fp8_tensor", "fp8_token", "fp8_group128")


@dataclass(frozen=True)
class Job:
    """See `cli.bench.Job`."""

    points: tuple[GemmPoint, ...]
    world: int
    trials: int
    table: Table
    limit_s: float | None
    extra: Mapping[str, Any]
    json: Path | None


def bench(
    console: Console, world: int, operators: Sequence[str], tokens: Sequence[int], sizes: Sequence[tuple[int, int]],
    schemes: Sequence[str], dtype: str, trials: int, table: Table, limit_s: float | None, json: Path | None, plot: Path | None,
    commit: str | None,
) -> None:  # fmt: skip
    """The command: see `tpfuse bench gemm --help`.  Raises BadInput, RankError or TimeoutError."""
    points = grid(operators, schemes, sizes, tokens, world, dtype)
    place = need_gpus(world)
    writable(json)
    plots.check(plot)
    extra = {
        "world": world, "commit": commit or results.commit(), "table": table.digest if table.entries else None,
        "baseline": ALONE, "native_async_tp": "TORCH_SYMM_MEM_ENABLE_NATIVE_ASYNC_TP" in os.environ,
    }  # fmt: skip
    document = run_ranks(work, place, world, Job(tuple(points), world, trials, table, limit_s, extra, json))
    if place is not None and place.rank:
        return
    show(console, document)
    if plot:
        for path in plots.save(document, plot):
            console.print(f"wrote {path}", highlight=False)


def grid(
    operators: Sequence[str], schemes: Sequence[str], sizes: Sequence[tuple[int, int]], tokens: Sequence[int], world: int,
    dtype: str,
) -> list[GemmPoint]:  # fmt: skip
    """Every combination.  BadInput for what the ranks do not share evenly."""
    for name in operators:
        if name not in gemm.OPERATORS:
            raise BadInput(f"unknown operator {name!r} (known: {', '.join(gemm.OPERATORS)})")
    if odd := [n for n in tokens if n % world]:
        raise BadInput(f"measured at multiples of {world} tokens, not at {odd}")
    for hidden, intermediate in sizes:
        if hidden % 128 or intermediate % (128 * world):
            raise BadInput(f"{hidden}x{intermediate}: the ranks' weights must be multiples of 128 both ways")
    return gemm.grid(operators, schemes, sizes, tokens, world, dtype)


def room(points: Sequence[GemmPoint]) -> tuple[int, int]:
    """The largest token count, and the most columns of bf16 that meet in a collective."""
    return max(p.tokens for p in points), max(p.hidden for p in points)


def work(place: Place, progress: Progress, job: Job) -> dict[str, Any]:
    """One rank: → the result file's contents, the same on all."""
    from tpfuse.measure.ranks import Ranks

    ranks = Ranks.join(place, (), flashinfer=False)
    built = gemm.Gemms(ranks.group, ranks.target, *room(job.points))
    machine, rows = results.environment(), []

    def document() -> dict[str, Any]:
        return results.document("gemm", rows, **job.extra, **machine, notes=ranks.notes)

    def tell(point: GemmPoint, found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        progress(line(found), 0, 0)
        if place.rank == 0:
            print(f"{point.operator} {line(found)}", flush=True)
            if job.json:
                results.write(job.json, document())

    timer = ranks.timer(job.trials)

    def picked(point: GemmPoint) -> str | None:  # nothing is fused, or compared with peers, before it was measured
        return gemm.picked_impl(point, ranks.target, job.table) if job.table.entries else None

    Sweep(place.world, built.named, timer.of, ranks.share, job.limit_s, tell).run(job.points, picked)
    ranks.leave()
    return document()


def show(console: Console, document: dict[str, Any]) -> None:
    """A block a point: time, time over the product alone, over the best peer, over the limit."""
    table = Grid(title="* is what lowering picks; the limit: the product alone, or the bytes over the link", title_justify="left")
    for name, justify in (("Operation", "left"), ("", "left"), ("Time (µs)", "right"), ("÷ GEMM alone", "right"),
                          ("Speedup over the best peer", "right"), ("÷ limit", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for rows in points_of(document["rows"]):
        alone = math.sqrt(math.prod(row["us"] for row in rows if row["impl"] in (ALONE, ALONE + AGAIN)))
        peer = min((row["us"] for row in rows if row["impl"] in gemm.PEERS.values()), default=None)
        for i, row in enumerate(rows):
            where = f"{row['op']} {row['scheme']} {row['tokens']}, {row['hidden']} × {row['intermediate']}" if i == 0 else ""
            table.add_row(
                where, row["impl"] + ("*" if row.get("picked") else ""), f"{row['us']:.1f}", f"{row['us'] / alone:.3f}",
                f"{peer / row['us']:.2f}×" if peer and row["impl"].startswith("tpfuse") else "",
                f"{row['us'] / row['limit_us']:.2f}", end_section=i == len(rows) - 1,
            )  # fmt: skip
    fit.show(console, table)
    for note in document["notes"]:
        console.print(note, highlight=False)


def points_of(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of a result file by point, in the order of the file."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "scheme", "dtype", "hidden", "intermediate", "tokens"))
        found.setdefault(key, []).append(row)
    return list(found.values())
