"""Plots of result files, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpfuse.cli.inputs import require, writable
from tpfuse.measure.e2e import ROOM
from tpfuse.measure.points import AGAIN, ALONE

STYLES = {"tpfuse": "-", "nccl": ":", "torch": "--", "flashinfer": "-.", "gemm": ":"}
METRICS = {
    "ttft_us": ("ms to first token", 1e3), "tpot_us": ("ms per output token", 1e3), "tokens_per_s": ("tokens a second", 1.0),
}  # fmt: skip
Row = Mapping[str, Any]


def save(document: dict[str, Any], path: Path) -> list[Path]:
    """Time over tokens, a panel for each scheme and width; of products next to collectives over the product alone, a figure for
    each operator → the files written, `path` with both suffixes."""
    _headless()
    path = path.with_suffix("")
    rows = [r for r in document["rows"] if "limit_us" in r and not r["impl"].endswith(AGAIN)]
    if document["what"] != "gemm":
        return _figure(document, rows, path, lambda r: f"hidden {r['hidden']}", lambda r: 1.0, "µs a call", "log")
    times = {_place(r): r["us"] for r in rows if r["impl"] == ALONE}
    files = []
    for family in dict.fromkeys(map(_family, rows)):
        own = [r for r in rows if _family(r) == family and r["impl"] != ALONE]
        files += _figure(
            document, own, path.with_name(f"{path.name}-{family}"), lambda r: f"{r['hidden']} × {r['intermediate']}",
            lambda r: times[_place(r)], "time ÷ product alone", "linear", family,
        )  # fmt: skip
    return files


def save_e2e(document: Mapping[str, Any], path: Path) -> list[Path]:
    """Whole layers, a figure for each of decode, prefill and loads that were measured → the files written, of `path` with
    "-decode" and so on and both suffixes."""
    _headless()
    path, files = path.with_suffix(""), []
    for step in dict.fromkeys(row["op"] for row in document["rows"]):
        rows = [r for r in document["rows"] if r["op"] == step and not r["impl"].endswith(AGAIN)]
        draw = _served if step == "serve" else _steps
        files += draw(document, rows, path.with_name(f"{path.name}-{step}"))
    return files


def _steps(document: Mapping[str, Any], rows: Sequence[Row], path: Path) -> list[Path]:
    """What collectives add to a layer's time, a panel for each scheme and width."""
    import matplotlib.pyplot as plt

    sizes, schemes = (list(dict.fromkeys(r[key] for r in rows)) for key in ("hidden", "scheme"))
    impls = [impl for impl in dict.fromkeys(r["impl"] for r in rows) if impl != ROOM]
    figure, axes = plt.subplots(len(schemes), len(sizes), figsize=(5.0 * len(sizes), 3.4 * len(schemes)), squeeze=False)
    for scheme, line in zip(schemes, axes, strict=True):
        for hidden, axis in zip(sizes, line, strict=True):
            own = [r for r in rows if (r["scheme"], r["hidden"]) == (scheme, hidden)]
            times = {(r["impl"], r["tokens"]): r["us"] for r in own}
            tokens = sorted({n for impl, n in times if impl == ROOM})
            _bars(axis, impls, tokens, {k: 100 * (us / times[ROOM, k[1]] - 1) for k, us in times.items() if k[1] in tokens})
            axis.set(title=f"{scheme or 'no quantise'}, hidden {hidden}", xlabel="tokens")
        line[0].set_ylabel("% over no collectives")
    return _saved(document, figure, axes, path, rows[0]["op"])


def _bars(axis: Any, impls: Sequence[str], groups: Sequence[Any], heights: Mapping[tuple[str, Any], float]) -> None:
    """heights: by implementation and group; a group's bars stand side by side, none where nothing was measured."""
    for i, impl in enumerate(impls):
        there = [(n, heights[impl, group]) for n, group in enumerate(groups) if (impl, group) in heights]
        places = [n + (i - (len(impls) - 1) / 2) * 0.8 / len(impls) for n, _ in there]
        axis.bar(places, [height for _, height in there], 0.8 / len(impls), color=f"C{i}", label=impl)
    axis.set_xticks(range(len(groups)), list(map(str, groups)), fontsize=7)


def _served(document: Mapping[str, Any], rows: Sequence[Row], path: Path) -> list[Path]:
    """Times to first tokens, of a step, and throughput of each load, a line of panels for each shape and scheme."""
    import matplotlib.pyplot as plt

    stacks, impls = list(dict.fromkeys((r["shape"], r["scheme"]) for r in rows)), list(dict.fromkeys(r["impl"] for r in rows))
    figure, axes = plt.subplots(len(stacks), len(METRICS), figsize=(13.0, 3.4 * len(stacks)), squeeze=False)
    for stack, line in zip(stacks, axes, strict=True):
        own = [r for r in rows if (r["shape"], r["scheme"]) == stack]
        loads = list(dict.fromkeys(map(_load, own)))
        for (metric, (label, unit)), axis in zip(METRICS.items(), line, strict=True):
            _bars(axis, impls, loads, {(r["impl"], _load(r)): r[metric] / unit for r in own})
            axis.set(title=f"{stack[0]}, {stack[1] or 'no quantise'}, {own[0]['layers']} layers", ylabel=label)
    return _saved(document, figure, axes, path, "sequences × prompt, prefilled so many at a time")


def _load(row: Row) -> str:
    return f"{row['sequences']} × {row['tokens']}\n{row['batch']} at a time"


def check(path: Path | None) -> None:
    """BadInput, before anything is measured, where a plot could not be drawn or written."""
    if path is not None:
        require("Plots", "matplotlib", extra="plots")
        writable(path.with_suffix(".svg"))


def _headless() -> None:
    """Plots are drawn to files."""
    import matplotlib

    matplotlib.use("Agg")


def _family(row: Row) -> str:
    return row["op"].replace("scaled_", "").removesuffix("_quantize")


def _place(row: Row) -> tuple[Any, ...]:
    return row["op"], row["scheme"], row["hidden"], row["intermediate"], row["tokens"]


def _figure(
    document: Mapping[str, Any], rows: Sequence[Row], path: Path, column: Callable[[Row], str], unit: Callable[[Row], float],
    label: str, scale: str, title: str = "",
) -> list[Path]:  # fmt: skip
    """unit: microseconds that a row's time is divided by."""
    import matplotlib.pyplot as plt

    schemes, columns = list(dict.fromkeys(r["scheme"] for r in rows)), list(dict.fromkeys(map(column, rows)))
    impls = list(dict.fromkeys(r["impl"] for r in rows))
    colours = {impl: f"C{i}" for i, impl in enumerate(impls)}
    tokens = sorted({r["tokens"] for r in rows})
    size = (4.6 * len(columns), 3.6 * len(schemes))
    figure, axes = plt.subplots(len(schemes), len(columns), figsize=size, squeeze=False, sharex=True)
    for scheme, line in zip(schemes, axes, strict=True):
        for head, axis in zip(columns, line, strict=True):
            own = [r for r in rows if (r["scheme"], column(r)) == (scheme, head)]
            for impl in impls:
                points = sorted((r["tokens"], r["us"] / unit(r)) for r in own if r["impl"] == impl)
                style = STYLES[impl.split(":")[0].split("_")[0].split("+")[0]]
                width = 2.0 if impl.startswith("tpfuse") else 1.0
                axis.plot(*zip(*points, strict=True), style, color=colours[impl], linewidth=width, label=impl) if points else None
            limits = sorted({(r["tokens"], r["limit_us"] / unit(r)) for r in own})
            axis.plot(*zip(*limits, strict=True), color="0.6", linewidth=1.0, label="limit") if limits else None
            axis.set(title=f"{scheme or 'no quantise'}, {head}", xscale="log", yscale=scale)
            axis.set_xticks(tokens, list(map(str, tokens)), rotation=60 * (len(tokens) > 8))
            axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for line in axes:
        line[0].set_ylabel(label)
    return _saved(document, figure, axes, path, title)


def _saved(document: Mapping[str, Any], figure: Any, axes: Any, path: Path, title: str) -> list[Path]:
    """Legend, title and files."""
    import matplotlib.pyplot as plt

    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    machine = document["machine"]
    where = f"{machine['count']} × {machine['gpu']}, world size {document['world']}, {document['date']}"
    figure.suptitle(f"{title}: {where}" if title else where)
    figure.set_layout_engine("constrained")
    files = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)
    plt.close(figure)
    return files
