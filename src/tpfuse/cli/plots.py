"""Plots of result files, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpfuse.cli.models import BadInput

STYLES = {"tpfuse": "-", "nccl": ":", "torch": "--", "flashinfer": "-.", "gemm": ":"}


def save(document: dict[str, Any], path: Path) -> list[Path]:
    """Time over tokens, a panel for each scheme and width → the files written, `path` with both suffixes.

    BadInput where matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise BadInput("--plot needs matplotlib: pip install 'tpfuse[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in document["rows"] if "limit_us" in r and not r["impl"].endswith("(A/A)")]
    schemes, widths = list(dict.fromkeys(r["scheme"] for r in rows)), list(dict.fromkeys(r["hidden"] for r in rows))
    impls = list(dict.fromkeys(r["impl"] for r in rows))
    colours = {impl: f"C{i}" for i, impl in enumerate(impls)}
    size = (4.6 * len(widths), 3.6 * len(schemes))
    figure, axes = plt.subplots(len(schemes), len(widths), figsize=size, squeeze=False, sharex=True)
    for scheme, line in zip(schemes, axes, strict=True):
        for hidden, axis in zip(widths, line, strict=True):
            own = [r for r in rows if (r["scheme"], r["hidden"]) == (scheme, hidden)]
            for impl in impls:
                points = sorted((r["tokens"], r["us"]) for r in own if r["impl"] == impl)
                style = STYLES[impl.split(":")[0].split("_")[0].split("+")[0]]
                width = 2.0 if impl.startswith("tpfuse") else 1.0
                axis.plot(*zip(*points, strict=True), style, color=colours[impl], linewidth=width, label=impl) if points else None
            limits = sorted({(r["tokens"], r["limit_us"]) for r in own})
            axis.plot(*zip(*limits, strict=True), color="0.6", linewidth=1.0, label="limit")
            axis.set(title=f"{scheme or 'no quantise'}, hidden {hidden}", xscale="log", yscale="log")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for line in axes:
        line[0].set_ylabel("µs a call")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    machine = document["machine"]
    figure.suptitle(f"{machine['count']} × {machine['gpu']}, world size {document['world']}, {document['date']}")
    figure.set_layout_engine("constrained")
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)
    plt.close(figure)
    return files
