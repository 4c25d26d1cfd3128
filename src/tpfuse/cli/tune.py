"""`tpfuse tune`: measure every kernel that serves, and write the table that lowering and ranges read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from tpfuse.cli import fit
from tpfuse.cli.bench import line, need_gpus, run_ranks
from tpfuse.cli.bench_gemm import grid as layer_grid
from tpfuse.cli.bench_gemm import room
from tpfuse.cli.inputs import BadInput, read_table, writable
from tpfuse.cli.launch import Place, Progress
from tpfuse.config import table_path
from tpfuse.lowering.table import UNFUSED, Entry, Table
from tpfuse.measure import attention, gemm, results
from tpfuse.measure.attention import AttentionPoint
from tpfuse.measure.entries import entries, key_of
from tpfuse.measure.gemm import GemmPoint, Gemms, by_message
from tpfuse.measure.points import AGAIN, Point, Sweep, grid
from tpfuse.measure.precedence import decided
from tpfuse.measure.sharded import ShardedPoint, kernels

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PRODUCT_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384)  # of attention
HIDDEN = (4096, 5120, 8192)
SCHEMES = ("none", "fp8_tensor", "fp8_group128")


@dataclass(frozen=True)
class Job:
    """points: in order, the token counts of an operator, scheme and width together.  sharded: of the form around a sharded
    residual.  products: next to a collective.  attentions: with a quantise.  limit_s: when to begin no further one of any."""

    points: tuple[Point, ...]
    sharded: tuple[ShardedPoint, ...]
    products: tuple[GemmPoint, ...]
    attentions: tuple[AttentionPoint, ...]
    trials: int
    limit_s: float | None
    flashinfer: bool = False


def run(
    console: Console, world: int, tokens: Sequence[int], hidden: Sequence[int], schemes: Sequence[str], dtype: str,
    residuals: Sequence[bool], sequence_parallel: bool, intermediate: Sequence[int], product_tokens: Sequence[int],
    head_dims: Sequence[tuple[int, int]], flashinfer: bool, trials: int, limit_s: float | None, out: Path | None,
    samples: Path | None,
) -> None:  # fmt: skip
    """The command: see `tpfuse tune --help`.  Raises BadInput, RankError or TimeoutError."""
    if world == 1 and (tokens or intermediate):
        raise BadInput('one rank measures attention alone: --tokens "" and --head-dims, without --intermediate')
    place = need_gpus(world)
    writable(out or table_path("machine"), samples)
    if out and out.exists():
        read_table(out)  # found damaged, or something else, before an hour of measuring
    for path in () if out else sorted(table_path("machine").parent.glob("*.json")):
        earlier(path, console)  # told before an hour of measuring: it may be this machine's, which only the ranks know
    points = [p for residual in residuals for p in grid(schemes, hidden, sorted(set(tokens)), dtype, residual)]
    sharded = [ShardedPoint(p.scheme, p.hidden, p.tokens, dtype) for p in points if p.residual and p.tokens % world == 0]
    products = products_of(schemes, hidden, intermediate, product_tokens, world, dtype)
    attentions = attention.grid(schemes, head_dims, PROMPTS, dtype)
    if not (points or products or attentions):
        raise BadInput("nothing to measure: --tokens is empty, and there is no --intermediate and no --head-dims with a --scheme")
    around = tuple(sharded if sequence_parallel else ())
    job = Job(tuple(points), around, tuple(products), tuple(attentions), trials, limit_s, flashinfer)
    found = run_ranks(work, place, world, job)
    if place is not None and place.rank:
        return
    out = out or table_path(found["machine"])
    table = merged(earlier(out, console), found["machine"], found["versions"], found["rows"])
    table.save(out)
    if samples:
        results.write(samples, results.document("tune", found["rows"], world=world, table=table.digest, notes=found["notes"]))
    show(console, table)
    for note in found["notes"]:
        console.print(note, highlight=False)
    console.print(f"wrote {out}, table {table.digest}", highlight=False)


def earlier(path: Path, console: Console) -> Table | None:
    """A table of an earlier run; None where there is none, or, with a warning, where it is damaged."""
    try:
        return read_table(path) if path.exists() else None
    except BadInput as error:
        console.print(f"warning: {error}; nothing is taken from it", style="yellow", highlight=False, soft_wrap=True)
        return None


def products_of(
    schemes: Sequence[str], hidden: Sequence[int], intermediate: Sequence[int], tokens: Sequence[int], world: int, dtype: str
) -> list[GemmPoint]:
    """The products of layers of these widths, the largest first.  BadInput where there are not as many of both."""
    if intermediate and len(intermediate) != len(hidden):
        raise BadInput(f"--intermediate: one for each of {len(hidden)} widths, not {len(intermediate)}")
    sizes = sorted(zip(hidden, intermediate, strict=True) if intermediate else (), reverse=True)
    return layer_grid(tuple(gemm.OPERATORS), schemes, sizes, tokens, world, dtype)


def merged(old: Table | None, machine: str, versions: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    """A table with the entries of `rows`, and those of an earlier one for what was not measured now, if it was measured on the
    same machine with the same versions; and with what all of them together say of a layer's form."""
    kept = old.entries if old is not None and old.stale(machine, versions) is None else ()
    all_of_them = _renewed(kept, entries(rows))
    return Table(machine, versions, _renewed(all_of_them, decided(all_of_them)))


def _renewed(old: Sequence[Entry], new: Sequence[Entry]) -> tuple[Entry, ...]:
    keys = {key_of(vars(entry)) for entry in new}
    return (*(e for e in old if key_of(vars(e)) not in keys), *new)


def work(place: Place, progress: Progress, job: Job) -> dict[str, Any]:
    """One rank: → {"rows", "machine", "versions", "notes"}, the same on all.  Rows of a width that was cut off are left out."""
    from tpfuse.measure.ranks import Ranks
    from tpfuse.runtime.detect import detect, machine

    ranks = Ranks.join(place, job.points, eager=False, flashinfer=job.flashinfer and bool(job.points))

    def twice(impls: dict[str, Any]) -> dict[str, Any]:
        first = next(iter(impls))
        return {first + AGAIN: impls[first], **impls}

    def build(point: Point) -> dict[str, Any]:
        return {**twice(ranks.built.kernels(point)), UNFUSED: ranks.built.unfused(point)}

    def tell(point: Point | GemmPoint | AttentionPoint, rows: list[dict[str, Any]]) -> None:
        progress(line(rows), 0, 0)
        if place.rank == 0:
            print(f"{point.op.name} {line(rows)}", flush=True)

    timer = ranks.timer(job.trials)
    sweep = Sweep(place.world, build, timer.of, ranks.share, job.limit_s, tell)
    rows = complete(sweep.run(job.points), job.points)
    versions = dict(detect("cuda", ranks.group.group_name).versions)
    around = replace(sweep, build=lambda point: twice(kernels(ranks.built, point)))
    rows += complete(around.run(job.sharded), job.sharded)
    if job.products:
        built = Gemms(ranks.group, ranks.target, *room(job.products))

        def learn(point: GemmPoint, found: list[dict[str, Any]]) -> None:
            tell(point, found)
            built.learn(point, found)

        def measure(impls: Any, point: GemmPoint) -> dict[str, list[float]]:
            return timer.alternate(impls, point.calls, point.trials(job.trials))

        each = replace(sweep, build=built.kernels, measure=measure, tell=learn)
        rows += by_message(job.products, complete(each.run(job.products), job.products))
    alone = replace(sweep, build=lambda point: twice(point.kernels(ranks.target)))
    rows += complete(alone.run(job.attentions), job.attentions)
    ranks.leave()
    return {"rows": rows, "machine": machine("cuda"), "versions": versions, "notes": ranks.notes}


def complete(rows: Sequence[dict[str, Any]], points: Sequence[Point | GemmPoint | AttentionPoint]) -> list[dict[str, Any]]:
    """Rows of the operators, schemes and widths all of whose token counts were measured: half a grid makes no thresholds."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["op"], row["scheme"], row["hidden"], row.get("intermediate", row.get("across"))

    def sizes(found: Any) -> dict[Any, set[int]]:
        groups: dict[Any, set[int]] = {}
        for row in found:
            groups.setdefault(key(row), set()).add(row["tokens"])
        return groups

    wanted, done = sizes({**vars(p), "op": p.op.name} for p in points), sizes(rows)
    return [row for row in rows if done[key(row)] == wanted[key(row)]]


def show(console: Console, table: Table) -> None:
    """The choices, by size."""
    grid = Grid(title=f"{table.machine}: what is fastest", title_justify="left")
    for name in ("Operator", "Scheme", "Dtype", "Ranks", "Hidden", "Across", "Choices, by bytes of the rows"):
        grid.add_column(name)
    for entry in table.entries:
        steps = ", ".join(f"{choice} up to {end}" if end else choice for end, choice in entry.steps)
        sizes = (str(entry.hidden or "any"), str(entry.across or ""))
        grid.add_row(entry.op, entry.scheme, entry.dtype, str(entry.world), *sizes, steps)
    fit.show(console, grid)
