"""Plots of result files, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpfuse.cli.models import BadInput
from tpfuse.measure.points import AGAIN, ALONE

STYLES = {"tpfuse": "-", "nccl": ":", "torch": "--", "flashinfer": "-.", "gemm": ":"}
Row = Mapping[str, Any]


def save(document: dict[str, Any], path: Path) -> list[Path]:
    """Time over tokens, a panel for each scheme and width; of products next to collectives over the product alone, a figure for
    each operator → the files written, `path` with both suffixes.

    BadInput where matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise BadInput("--plot needs matplotlib: pip install 'tpfuse[plots]'") from error
    matplotlib.use("Agg")
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
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for line in axes:
        line[0].set_ylabel(label)
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
