"""`tpfuse bench e2e`: time stacks shaped like models, fused and not: a layer of a step, and whole loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid

from tpfuse.cli import fit, plots
from tpfuse.cli.bench import need_gpus, points_of, run_ranks
from tpfuse.cli.inputs import BadInput, read_table, writable
from tpfuse.cli.launch import Place, Progress
from tpfuse.measure import results
from tpfuse.measure.e2e import OPTIONAL
from tpfuse.measure.linears import SCHEMES
from tpfuse.measure.serve import TPOT, TTFT, Load
from tpfuse.measure.stack import LAYERS, SHAPES, Stack

SPARE = 0.2  # of the free memory: for activations, graphs and workspaces beside layers and caches


@dataclass(frozen=True)
class Job:
    """decode: sequences that take a step together.  prefill: tokens of one sequence.  loads: what is served.  layers: None for as
    many as fit.  cached: positions read by a decode step.  without: variants to leave out.  limit_s: when to begin no further
    point.  extra: what else belongs at the top of the result file.  json: where rank 0 writes it, anew after each point, so that
    a run that is cut off leaves what it had."""

    shapes: tuple[str, ...]
    schemes: tuple[str, ...]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    loads: tuple[Load, ...]
    layers: int | None
    cached: int
    trials: int
    without: tuple[str, ...]
    table: str | None
    limit_s: float | None
    extra: Mapping[str, Any]
    json: Path | None


def e2e(
    console: Console, world: int, shapes: Sequence[str], schemes: Sequence[str], decode: Sequence[int], prefill: Sequence[int],
    loads: Sequence[Load], layers: int | None, cached: int, trials: int, without: Sequence[str], table: Path | None,
    limit_s: float | None, json: Path | None, plot: Path | None, commit: str | None,
) -> None:  # fmt: skip
    """The command: see `tpfuse bench e2e --help`.  Raises BadInput, RankError or TimeoutError."""
    for name in shapes:
        if name not in SHAPES:
            raise BadInput(f"unknown shape {name!r} (known: {', '.join(SHAPES)})")
        if reason := SHAPES[name].check(world):
            raise BadInput(f"{name} on {world} ranks: {reason}")
    if odd := [scheme for scheme in schemes if scheme not in SCHEMES]:
        raise BadInput(f"no stack is made with {', '.join(odd)} (but with: {', '.join(s or 'none' for s in SCHEMES)})")
    if odd := [name for name in without if name not in OPTIONAL]:
        raise BadInput(f"{', '.join(odd)} cannot be left out (but {', '.join(OPTIONAL)})")
    if odd := [n for n in (*prefill, *(load.batch * load.prompt for load in loads)) if n % world]:
        raise BadInput(f"a prefill's rows are shared out: {odd} are no multiples of {world}")
    if not (decode or prefill or loads):
        raise BadInput("nothing to measure: --decode, --prefill and --serve are all empty")
    place = need_gpus(world)
    writable(json)
    plots.check(plot)
    extra = {"world": world, "commit": commit or results.commit(), "table": read_table(table).digest if table else None}
    job = Job(
        tuple(shapes), tuple(schemes), tuple(decode), tuple(prefill), tuple(loads), layers, cached, trials, tuple(without),
        str(table) if table else None, limit_s, extra, json,
    )  # fmt: skip
    document = run_ranks(work, place, world, job)
    if place is None or place.rank == 0:
        show(console, [row for row in document["rows"] if row["op"] != "serve"])
        show_served(console, [row for row in document["rows"] if row["op"] == "serve"])
        for note in document["notes"]:
            console.print(note, highlight=False)
        if plot:
            for path in plots.save_e2e(document, plot):
                console.print(f"wrote {path}", highlight=False)


def layers_of(text: str) -> int | None:
    """"4" → 4, "max" → None.  BadInput for anything else."""
    if text == "max":
        return None
    if not text.isdigit() or not int(text):
        raise BadInput(f"--layers {text}: expected a number from 1 on, or max")
    return int(text)


def loads_of(text: str, output: int) -> list[Load]:
    """"2048:4:32,512:1:1" → loads of PROMPT:BATCH:SEQUENCES.  BadInput where it is no such list or batches are uneven."""
    found = []
    for word in text.split(",") if text else ():
        parts = word.split(":")
        if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
            raise BadInput(f"{word!r}: expected PROMPT:BATCH:SEQUENCES, such as 2048:4:32")
        prompt, batch, sequences = map(int, parts)
        if sequences % batch:
            raise BadInput(f"{word!r}: {sequences} sequences are not prefilled {batch} at a time")
        found.append(Load(prompt, batch, sequences, output))
    return found


def work(place: Place, progress: Progress, job: Job) -> dict[str, Any]:
    """One rank: → the result file's contents, the same on all."""
    import time

    from tpfuse import shim
    from tpfuse.measure import e2e
    from tpfuse.measure.points import grid
    from tpfuse.measure.ranks import Ranks
    from tpfuse.measure.serve import Served

    begin = time.monotonic()
    ranks = Ranks.join(place, grid([""], [8192], [1]), False, flashinfer=bool(job.decode))
    timer = ranks.timer(job.trials)
    rows: list[dict[str, Any]] = []
    machine = results.environment()
    flashinfer = "flashinfer" in ranks.target.backends
    points: list[Any] = [*((n, job.cached) for n in job.decode), *((n, None) for n in job.prefill), *job.loads]
    ranks.notes.extend(f"{variant} was left out on request" for variant in job.without)
    decoded = [*job.decode, *(load.sequences for load in job.loads)]
    prefilled = [*job.prefill, *(load.batch * load.prompt for load in job.loads)]

    def document() -> dict[str, Any]:
        return results.document("e2e", rows, **job.extra, **machine, notes=ranks.notes)

    for name, scheme in ((name, scheme) for name in job.shapes for scheme in job.schemes):
        torch.manual_seed(place.rank)
        layers = job.layers or min(ranks.share(fitting(name, scheme, place.world, job)))
        stack = Stack(SHAPES[name], layers, place.world, torch.bfloat16, scheme=scheme)
        decode, prefill = (e2e.Variants(ranks.group, scheme, job.table, max(n, default=1)) for n in (decoded, prefilled))
        chosen = ([v for v in of if v.name not in job.without] for of in (decode.decode(flashinfer), prefill.prefill()))
        runner = e2e.Runner(stack, *chosen)
        for point in points:
            if job.limit_s is not None and ranks.share(time.monotonic() - begin)[0] > job.limit_s:
                break
            progress(f"{name} {scheme}, {point}", 0, 0)
            with shim.recompiled_at_will():  # a graph for every size of a prefill
                if isinstance(point, Load):
                    found = Served(runner, point, prefill.serving()).measure(timer, ranks.share)
                else:
                    tokens, cached = point
                    found = runner.measure(timer, tokens, cached, ranks.share)
            rows += [{**row, "shape": name} for row in found]
            ranks.notes += [note for note in runner.notes if note not in ranks.notes]
            if place.rank == 0:
                times = "  ".join(f"{row['impl']} {row['us']:.1f}" for row in found)
                print(f"{name} {scheme or 'none'} {layers} layers {found[0]['op']} {found[0]['tokens']}: {times}", flush=True)
                if job.json:
                    results.write(job.json, document())
        del runner, stack
        torch.compiler.reset()
        torch.cuda.empty_cache()
    ranks.leave()
    return document()


def fitting(name: str, scheme: str, world: int, job: Job) -> int:
    """Layers of this rank's shard that fit into the memory with their largest caches; at most the model's."""
    torch.cuda.empty_cache()
    free, before = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    stack = Stack(SHAPES[name], 1, world, torch.bfloat16, scheme=scheme)
    sizes = [(n, job.cached) for n in job.decode] + [(load.sequences, load.length) for load in job.loads]
    largest = max(sizes, key=lambda size: size[0] * size[1], default=None)
    caches = stack.caches(*largest) if largest else []
    layer = torch.cuda.memory_allocated() - before
    del stack, caches
    torch.cuda.empty_cache()
    return max(1, min(LAYERS[name], int(free * (1 - SPARE) / layer)))


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
    if rows:
        fit.show(console, table)


def show_served(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Times to first tokens, times of a step and throughput, a block a load."""
    table = Grid(title="Loads: milliseconds, of so many layers and without a vocabulary", title_justify="left")
    for name in ("Load", "", "To first token", "Per output token", "Tokens a second"):
        table.add_column(name, justify="left" if name in ("Load", "") else "right")
    for i, row in enumerate(rows):
        load = f"{row['shape']} {row['scheme']} {row['sequences']} × {row['tokens']}, {row['batch']} at a time"
        first = i == 0 or any(row[k] != rows[i - 1][k] for k in ("shape", "scheme", "sequences", "tokens", "batch"))
        times = (f"{row[metric] / 1e3:.2f}" for metric in (TTFT, TPOT))
        table.add_row(load if first else "", row["impl"], *times, f"{row['tokens_per_s']:.0f}")
    if rows:
        fit.show(console, table)
