"""Write the tables of README.md and of docs/ from the result files under benchmarks/results.

    python tools/tables.py            # write them
    python tools/tables.py --check    # exit 1 where they are not up to date

A peer is whatever is not tpfuse's; the best one is chosen at each point anew.  tpfuse's time is that of the implementation that
lowering picks by an earlier table, and of its fastest one only where a file marks none, which its heading then says.  Of products
nothing is picked without a table.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCKS = {"README.md": "summary", "docs/performance.md": "points", "docs/kernels.md": "layers", "docs/support.md": "gpu_tests"}
WHAT = ("e2e", "collectives", "gemm", "local_kernels")  # what has peers at their best beside it, what matters most first
ALONE = "gemm_alone"
BOUNDS = ("empty_kernel", ALONE, "no_collective")  # no implementation of the operator
SERVED = ("ttft_us", "tpot_us", "tokens_per_s")
MEASURED = (
    "impl", "us", "us_min", "us_max", "limit_us", "picked", "samples", "launches", "difference", "error", "operators", *SERVED,
)  # fmt: skip
AGAIN = " (A/A)"


@dataclass(frozen=True)
class Point:
    """One operator at one size.  where: its scheme, sizes and the like.  noise: by how much a repetition differed, as a share.
    alone_us: the product without its collective, of a product next to one."""

    op: str
    where: dict[str, Any]
    ours: str
    us: float
    peer: str
    peer_us: float
    limit_us: float | None
    noise: float
    picked: bool
    alone_us: float | None = None

    @property
    def speedup(self) -> float:
        return self.peer_us / self.us


def points(document: Mapping[str, Any]) -> list[Point]:
    """The points of a result file that tpfuse and a peer were both measured at."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(json.dumps({k: v for k, v in row.items() if k not in MEASURED}), []).append(row)
    found = []
    for key, rows in groups.items():
        where = json.loads(key)
        times = {row["impl"]: row["us"] for row in rows}
        again = [abs(us / times[impl.removesuffix(AGAIN)] - 1) for impl, us in times.items() if impl.endswith(AGAIN)]
        own = [row for row in rows if row["impl"].startswith("tpfuse") and not row["impl"].endswith(AGAIN)]
        peers = [row for row in rows if not row["impl"].startswith(("tpfuse", *BOUNDS)) and not row["impl"].endswith(AGAIN)]
        alone = [row["us"] for row in rows if row["impl"].removesuffix(AGAIN) == ALONE]
        marked = [row for row in rows if row.get("picked") and (document["what"] != "gemm" or document["table"])]
        if not (own or marked) or not peers:
            continue
        ours = marked[0] if marked else min(own, key=lambda row: row["us"])
        peer = min(peers, key=lambda row: row["us"])
        found.append(
            Point(where.pop("op"), where, ours["impl"], ours["us"], peer["impl"], peer["us"], ours.get("limit_us"),
                  max(again, default=0.0), bool(marked), sum(alone) / len(alone) if alone else None)
        )  # fmt: skip
    return found


def heading(name: str, document: Mapping[str, Any], found: Sequence[Point]) -> str:
    """Where, when and with what a file was measured."""
    table = f"; picked by table {document['table']}" if document.get("table") else ""
    free = [p.where.get("scheme") or "unquantised" for p in found if not p.picked]
    which = f" of {', '.join(dict.fromkeys(free))}" if len(free) < len(found) else ""
    unpicked = f"; at each point{which} (†) tpfuse's fastest, not what lowering picks" if free else ""
    return f"`{name}`: {setting(document)}, {document['date']}, commit {document['commit']}{table}{unpicked}."


def setting(document: Mapping[str, Any]) -> str:
    """The machine and the versions of a result file."""
    machine, versions = document["machine"], document["versions"]
    link = f", {machine['link']}" if machine.get("link") else ""
    told = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("torch", "triton", "flashinfer", "nccl"))
    return f"{machine['count']} × {machine['gpu']}{link}, {told}"


def room(name: str, document: Mapping[str, Any]) -> str:
    """Steps of a stack of layers: how much of what its collectives cost was won back.  "" where none was measured."""
    plain, none = "nccl+inductor", "no_collective"
    found = _steps(document)
    if not found:
        return ""
    impls = [i for i in dict.fromkeys(i for times in found.values() for i in times) if i not in (plain, plain + AGAIN, none)]
    columns = ["step", "scheme", "hidden", "tokens", plain, none, "A/A", *impls]
    lines = [
        f"{heading(name, document, ())}  Microseconds a layer, the speed-up over the first, and the share "
        "closed of the room between the first two.", "",
        "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
    ]  # fmt: skip
    for where, times in found.items():
        whole = times[plain] - times[none]
        cells = [*map(str, where), f"{times[plain]:.0f}", f"{times[none]:.0f}"]
        cells.append(f"{abs(times[plain + AGAIN] - times[plain]) / whole:.0%}")
        cells += [
            f"{times[i]:.0f} ({times[plain] / times[i]:.2f}×, {(times[plain] - times[i]) / whole:.0%})" if i in times else "–"
            for i in impls
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps(document: Mapping[str, Any]) -> dict[tuple[Any, ...], dict[str, float]]:
    """Microseconds a layer by implementation, by (step, scheme, hidden, tokens)."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in document["rows"]:
        if row["op"] != "serve":
            found.setdefault((row["op"], row["scheme"] or "–", row["hidden"], row["tokens"]), {})[row["impl"]] = row["us"]
    return found


def served(name: str, document: Mapping[str, Any]) -> str:
    """Loads: time to first token, time of a step and throughput of each implementation.  "" where none was measured."""
    rows = [row for row in document["rows"] if row["op"] == "serve"]
    if not rows:
        return ""
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    columns = ["stack", "scheme", "layers", "load", *impls]
    lines = [
        f"{heading(name, document, ())}  Loads of sequences × prompt: milliseconds to the first token / per output token, and "
        "tokens a second.", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
    ]  # fmt: skip
    loads: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        load = f"{row['sequences']} × {row['tokens']}, {row['batch']} at a time, {row['output']} out"
        told = f"{row['ttft_us'] / 1e3:.2f} / {row['tpot_us'] / 1e3:.2f}, {row['tokens_per_s']:.0f}"
        loads.setdefault((row["shape"], row["scheme"] or "–", str(row["layers"]), load), {})[row["impl"]] = told
    lines += ["| " + " | ".join([*where, *(told.get(i, "–") for i in impls)]) + " |" for where, told in loads.items()]
    return "\n".join(lines)


def summary(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The README's: whole layers, loads, and a line for each operator of several ranks and scheme.  What several files hold is
    quoted from the one that is least favourable to tpfuse."""
    of_layers = {name: d for name, d in documents.items() if d["what"] == "e2e"}
    of_ranks = {name: d for name, d in documents.items() if d["what"] in ("collectives", "gemm")}
    lines = Counter(name for name, _ in quoted(documents).values())
    # A step's picture is of the file that most lines are quoted from, that of a kind of operator of the first.
    pictures: dict[str, str] = {}
    for name in sorted(of_layers, key=lambda name: lines[name]):
        pictures |= figures(name, of_layers[name], ROOT)
    for name, d in of_ranks.items():
        for picture in figures(name, d, ROOT).values():
            pictures.setdefault(d["what"], picture)
    last = [pictures.pop(what) for what in WHAT if what in pictures]
    loads = [served(name, d) for name, d in of_layers.items()]
    parts = [part for part in (steps(documents), *pictures.values(), *loads, operators(of_ranks), *last) if part]
    return "\n\n".join(parts) if parts else "No result with its peers has been recorded yet."


def quoted(documents: Mapping[str, Mapping[str, Any]]) -> dict[tuple[Any, ...], tuple[str, dict[str, float]]]:
    """By step, scheme and sizes of a stack of layers the file that is least favourable to tpfuse, and its times."""
    plain, found = "nccl+inductor", dict[tuple[Any, ...], tuple[str, dict[str, float]]]()
    for name, document in documents.items():
        for where, times in _steps(document).items() if document["what"] == "e2e" else ():
            held = found.get(where)
            if "tpfuse" in times and (held is None or times[plain] / times["tpfuse"] < held[1][plain] / held[1]["tpfuse"]):
                found[where] = name, times
    return found


def steps(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each step of a stack of layers: tpfuse beside the best of its peers.  "" where none was measured."""
    plain, none = "nccl+inductor", "no_collective"
    if not (found := quoted(documents)):
        return ""
    lines = [
        "Whole layers, microseconds a layer (speed-up over NCCL with Inductor); *closed* is the share of what the collectives "
        "cost that was won back.  What was measured twice is quoted from the run that is less favourable to tpfuse:", "",
        "| step | scheme | hidden | tokens | NCCL + Inductor | best other peer | **tpfuse** | no collectives | closed |",
        "|" + "---|" * 9,
    ]  # fmt: skip
    for where, (_, times) in sorted(found.items(), key=lambda item: _order(item[0])):
        base = times[plain]
        others = {i: us for i, us in times.items() if not i.startswith(("tpfuse", plain, none))}
        peer = min(others, key=lambda i: others[i], default=None)
        lines.append(
            f"| {' | '.join(map(str, where))} | {base:.0f} | "
            + (f"{others[peer]:.0f} ({base / others[peer]:.2f}×) {peer}" if peer else "–")
            + f" | **{times['tpfuse']:.0f}** ({base / times['tpfuse']:.2f}×) | {times[none]:.0f} "
            f"| {(base - times['tpfuse']) / (base - times[none]):.0%} |"
        )
    return "\n".join([*lines, "", sources(documents, [name for name, _ in found.values()])])


def _order(where: tuple[Any, ...]) -> tuple[Any, ...]:
    step, scheme, *sizes = where
    return step, scheme != "–", scheme, *sizes


def operators(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each operator and scheme.  "" where none was measured."""
    found: dict[tuple[str, str], tuple[str, list[Point]]] = {}
    for name, document in documents.items():
        for key, own in _grouped(points(document)).items():
            if key not in found or _gain(own) < _gain(found[key][1]):
                found[key] = name, own
    if not found:
        return ""
    lines = ["Each operator over the best peer at each point:", "", *_lines([own for _, own in found.values()], alone=False)]
    free = any(not p.picked for _, own in found.values() for p in own)
    told = '"Slower" counts points beyond the run\'s own A/A difference.  '
    told += "†: tpfuse's fastest at each point, not what lowering picks.  " * free
    return "\n".join([*lines, "", told + sources(documents, [name for name, _ in found.values()])])


def sources(documents: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str:
    """The files that a table is made of, by machine and versions."""
    told: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        link = f"[{name.removesuffix('.json')}]({(RESULTS / name).relative_to(ROOT)})"
        told.setdefault(setting(documents[name]), []).append(f"{link} at {documents[name]['commit']}")
    return "  ".join(f"{where}: {', '.join(files)}." for where, files in told.items())


def _lines(groups: Sequence[list[Point]], alone: bool = True) -> list[str]:
    """A table with a line for each group of points of one operator and scheme.  alone: beside products alone too."""
    of_products = alone and any(p.alone_us for own in groups for p in own)
    lines = [
        "| operator | scheme | points | geometric mean | least | most | slower |" + " ÷ GEMM alone |" * of_products,
        "|" + "---|" * (7 + of_products),
    ]
    for own in groups:
        speedups = [p.speedup for p in own]
        slower = sum(p.speedup * (1 + p.noise) < 1 for p in own)
        scheme = (own[0].where.get("scheme") or "–") + " †" * any(not p.picked for p in own)
        costs = [p.us / p.alone_us for p in own if p.alone_us]
        lines.append(
            f"| {own[0].op} | {scheme} | {len(own)} | {_gain(own):.2f}× | {min(speedups):.2f}× | {max(speedups):.2f}× "
            f"| {slower or 'none'} |" + (f" {_mean(costs):.3f} |" if of_products else "")
        )
    return lines


def figures(name: str, document: Mapping[str, Any], above: Path) -> dict[str, str]:
    """The plots beside a result file, one for all of it ("") or one for each operator, as seen from the folder `above`."""
    stem = name.removesuffix(".json")
    families = dict.fromkeys(row["op"].replace("scaled_", "").removesuffix("_quantize") for row in document["rows"])
    paths = {family: RESULTS / f"{stem}{family and '-'}{family}.svg" for family in ("", *families)}
    return {f: f"![{path.stem}]({os.path.relpath(path, above)})" for f, path in paths.items() if path.exists()}


def _gain(own: Sequence[Point]) -> float:
    return _mean([p.speedup for p in own])


def _mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def details(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Every point of each file, below a line for each operator and scheme."""
    parts, here = [], ROOT / "docs"
    for name, document in documents.items():
        top = f"## {name.removesuffix('.json')}"
        if document["what"] == "e2e":
            found = room(name, document), served(name, document), *figures(name, document, here).values()
            parts.append("\n\n".join(filter(None, (top, *found))))
            continue
        found = points(document)
        sizes = [k for k in dict.fromkeys(k for p in found for k in p.where) if len({str(p.where.get(k)) for p in found}) > 1]
        columns = [k for k in sizes if k != "scheme"]
        lines = ["\n\n".join(
            [heading(name, document, found), "\n".join(_lines(list(_grouped(found).values()))),
             *figures(name, document, here).values()]
        )]  # fmt: skip
        for (op, scheme), own in _grouped(found).items():
            heads = [*columns, "tpfuse (µs)", "by", "best peer (µs)", "which", "speed-up", "limit reached"]
            heads += ["÷ GEMM alone", "A/A"] if own[0].alone_us else []
            title = f"### {op}{f', {scheme}' if scheme else ''}"
            lines += ["", title, "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            for p in own:
                reached = f"{p.limit_us / p.us:.0%}" if p.limit_us else "–"
                cells = [*(str(p.where.get(k, "")) for k in columns), f"{p.us:.1f}", p.ours.removeprefix("tpfuse:"),
                         f"{p.peer_us:.1f}", p.peer, f"{p.speedup:.2f}×", reached]  # fmt: skip
                cells += [f"{p.us / p.alone_us:.3f}", f"{p.noise:.1%}"] if p.alone_us else []
                lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join([top, "", *lines]))
    return "\n\n".join(parts) if parts else "No result with its peers has been recorded yet."


def layers(documents: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """What one layer launches, plain and fused: a line for each kernel."""
    parts = []
    for name, document in documents:
        impls = list(dict.fromkeys(row["impl"] for row in document["rows"]))
        lines = [
            f"{heading(name, document, ())}  Launches a layer and their microseconds in the profile.", "",
            "| scheme | kernel | whose | " + " | ".join(impls) + " |", "|" + "---|" * (len(impls) + 3),
        ]  # fmt: skip
        kernels: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in document["rows"]:
            told = kernels.setdefault((row["scheme"] or "–", row["kernel"][:70], row["kind"]), {})
            told[row["impl"]] = f"{row['count']:g} in {row['us']:.0f} µs"
        for (scheme, kernel, kind), told in kernels.items():
            cells = [scheme, f"`{kernel}`", kind, *(told.get(impl, "–") for impl in impls)]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) if parts else "No layer has been traced yet."


def tested(documents: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """What passed on GPUs: a line for each test."""
    parts = []
    for name, document in documents:
        lines = [
            f"`{name}`: {document['machine']['gpu']}.", "", "| test | passed | failed | skipped | GPUs | torch | commit | date |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in document["rows"]:
            cells = (row[k] for k in ("passed", "failed", "skipped", "count", "torch", "commit", "date"))
            lines.append(f"| {row['test'].removeprefix('tests/gpu/')} | " + " | ".join(map(str, cells)) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) if parts else "No run of tests on GPUs has been recorded yet."


def _grouped(found: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in found:
        groups.setdefault((point.op, point.where.get("scheme", "")), []).append(point)
    return groups


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The result files that tables are made of, by name.  A file with a `note` says itself why nothing may be quoted from it."""
    read = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    kept = {name: d for name, d in read.items() if d.get("what") in WHAT and "note" not in d and points(d)}
    return dict(sorted(kept.items(), key=lambda item: WHAT.index(item[1]["what"])))


def _read(stem: str) -> list[tuple[str, dict[str, Any]]]:
    return [(path.name, json.loads(path.read_text())) for path in sorted(RESULTS.glob(f"{stem}*.json"))]


def replaced(text: str, block: str, what: str) -> str:
    """`text` with `block` between its markers.  ValueError where it has none."""
    begin, end = f"<!-- {what}:begin -->", f"<!-- {what}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"no markers {begin} and {end}")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"


def main(check: bool) -> int:
    documents, stale = load(), []
    blocks = {
        "summary": summary(documents), "points": details(documents), "layers": layers(_read("layer_kernels")),
        "gpu_tests": tested(_read("gpu_tests")),
    }  # fmt: skip
    for name, what in BLOCKS.items():
        path = ROOT / name
        text = replaced(path.read_text(), blocks[what], what)
        if text != path.read_text():
            stale.append(name)
            if not check:
                path.write_text(text)
    print(f"{'not up to date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
