"""`tpfuse tune`: measure every kernel that serves, and write the table that lowering and ranges read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from tpfuse.cli.bench import line, need_gpus, run_ranks
from tpfuse.cli.launch import Place, Progress
from tpfuse.config import table_path
from tpfuse.lowering.table import UNFUSED, Entry, Table
from tpfuse.measure import results
from tpfuse.measure.entries import entries
from tpfuse.measure.points import AGAIN, Point, Sweep, grid
from tpfuse.measure.sharded import ShardedPoint, forms, relabelled

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HIDDEN = (4096, 5120, 8192)
SCHEMES = ("none", "fp8_tensor", "fp8_group128")


@dataclass(frozen=True)
class Job:
    """points: in order, the token counts of an operator, scheme and width together.  sharded: those at which the form around a
    sharded residual is compared with the fastest all-reduce.  limit_s: when to begin no further one."""

    points: tuple[Point, ...]
    sharded: tuple[ShardedPoint, ...]
    trials: int
    limit_s: float | None


def run(
    console: Console, world: int, tokens: Sequence[int], hidden: Sequence[int], schemes: Sequence[str], dtype: str,
    residuals: Sequence[bool], sequence_parallel: bool, trials: int, limit_s: float | None, out: Path | None,
    samples: Path | None,
) -> None:  # fmt: skip
    """The command: see `tpfuse tune --help`.  Raises BadInput, RankError or TimeoutError."""
    place = need_gpus(world)
    points = [p for residual in residuals for p in grid(schemes, hidden, sorted(set(tokens)), dtype, residual)]
    sharded = [ShardedPoint(p.scheme, p.hidden, p.tokens, dtype) for p in points if p.residual and p.tokens % world == 0]
    job = Job(tuple(points), tuple(sharded if sequence_parallel else ()), trials, limit_s)
    found = run_ranks(work, place, world, job)
    if place is not None and place.rank:
        return
    out = out or table_path(found["machine"])
    table = merged(Table.load(out) if out.exists() else None, found["machine"], found["versions"], found["rows"])
    out.parent.mkdir(parents=True, exist_ok=True)
    table.save(out)
    if samples:
        results.write(samples, results.document("tune", found["rows"], world=world, table=table.digest, notes=found["notes"]))
    show(console, table)
    for note in found["notes"]:
        console.print(note, highlight=False)
    console.print(f"wrote {out}, table {table.digest}", highlight=False)


def merged(old: Table | None, machine: str, versions: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    """A table with the entries of `rows`, and those of an earlier one for what was not measured now, if it was measured on the
    same machine with the same versions."""
    new = entries(rows)
    keys = {_key(entry) for entry in new}
    kept = old.entries if old is not None and old.stale(machine, versions) is None else ()
    return Table(machine, versions, (*(e for e in kept if _key(e) not in keys), *new))


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry.op, entry.scheme, entry.dtype, entry.world, entry.hidden


def work(place: Place, progress: Progress, job: Job) -> dict[str, Any]:
    """One rank: → {"rows", "machine", "versions", "notes"}, the same on all.  Rows of a width that was cut off are left out."""
    from tpfuse.measure.ranks import Ranks
    from tpfuse.runtime.detect import detect, machine

    ranks = Ranks.join(place, job.points, eager=False)

    def build(point: Point) -> Any:
        kernels = ranks.built.kernels(point)
        first = next(iter(kernels))
        return {first + AGAIN: kernels[first], **kernels, UNFUSED: ranks.built.unfused(point)}

    def tell(point: Point, rows: list[dict[str, Any]]) -> None:
        progress(line(rows), 0, 0)
        if place.rank == 0:
            print(line(rows), flush=True)

    timer = ranks.timer(job.trials)
    sweep = Sweep(place.world, build, timer.alternate, ranks.share, job.limit_s, tell)
    rows = complete(sweep.run(job.points), job.points)
    versions = dict(detect("cuda", ranks.group.group_name).versions)
    fastest = Table(machine("cuda"), versions, tuple(entries(rows)))
    both = replace(sweep, build=lambda point: forms(ranks.built, point, fastest))
    rows += relabelled(complete(both.run(job.sharded), job.sharded))
    ranks.leave()
    return {"rows": rows, "machine": machine("cuda"), "versions": versions, "notes": ranks.notes}


def complete(rows: Sequence[dict[str, Any]], points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows of the operators, schemes and widths all of whose token counts were measured: half a grid makes no thresholds."""

    def sizes(found: Any) -> dict[Any, set[int]]:
        groups: dict[Any, set[int]] = {}
        for key, tokens in found:
            groups.setdefault(key, set()).add(tokens)
        return groups

    wanted = sizes(((p.op.name, p.scheme, p.hidden), p.tokens) for p in points)
    done = sizes(((r["op"], r["scheme"], r["hidden"]), r["tokens"]) for r in rows)
    return [row for row in rows if done[key := (row["op"], row["scheme"], row["hidden"])] == wanted[key]]


def show(console: Console, table: Table) -> None:
    """The choices, by size."""
    grid = Grid(title=f"{table.machine}: what is fastest", title_justify="left")
    for name in ("Operator", "Scheme", "Dtype", "Ranks", "Hidden", "Choices, by bytes of the rows"):
        grid.add_column(name, overflow="fold")
    for entry in table.entries:
        steps = ", ".join(f"{choice} up to {end}" if end else choice for end, choice in entry.steps)
        grid.add_row(entry.op, entry.scheme, entry.dtype, str(entry.world), str(entry.hidden or "any"), steps)
    console.print(grid, highlight=False)
