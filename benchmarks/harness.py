"""What the benchmarks share: CUDA-graph timing of alternating implementations, and result files."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Timer:
    """Times functions of a call's index; `calls` of them to a graph, `trials` replays of each graph.

    step: called before each replay, to bring ranks into step.
    """

    def __init__(self, calls: int, trials: int, step: Callable[[], Any] = lambda: None) -> None:
        self.calls = calls
        self.trials = trials
        self.step = step

    def graph(self, fn: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for i in range(3):
                fn(i)
        torch.cuda.synchronize()
        self.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for i in range(self.calls):
                fn(i)
        return graph

    def alternate(self, impls: Mapping[str, Callable[[int], Any]]) -> dict[str, list[float]]:
        """Microseconds a call of each implementation, one sample a replay, the implementations taking turns."""
        graphs = {name: self.graph(fn) for name, fn in impls.items()}
        samples: dict[str, list[float]] = {name: [] for name in impls}
        for trial in range(self.trials + 3):
            for name, graph in graphs.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.step()
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                if trial >= 3:
                    samples[name].append(start.elapsed_time(end) * 1e3 / self.calls)
        return samples

    def summary(self, samples: list[float]) -> dict[str, float]:
        return {"us": statistics.median(samples), "us_min": min(samples), "us_max": max(samples)}

    def launches(self, fn: Callable[[int], Any]) -> int:
        """Kernels that one call launches, by the profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            fn(0)
            torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in trace.events())

    def copy_bandwidth(self) -> float:
        """Bytes a second that a large elementwise kernel reads and writes (the copy engine is slower)."""
        source = torch.randn(1 << 29, device="cuda")
        target = torch.empty_like(source)
        best = min(self.alternate({"copy": lambda i: torch.neg(source, out=target)})["copy"])
        return 8 * source.numel() / best * 1e6


def environment() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "machine": {"gpu": properties.name, "count": torch.cuda.device_count(), "link": None},
        "versions": {
            "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def write(path: str, what: str, world: int, rows: list[dict[str, Any]], extra: Mapping[str, Any]) -> None:
    for row in rows:
        row["samples"] = [round(s, 3) for s in row.get("samples", [])]
        row.update({k: round(v, 3) for k, v in row.items() if isinstance(v, float)})
    found = {"what": what, "date": datetime.date.today().isoformat(), "world": world, **extra, "rows": rows}
    Path(path).write_text(json.dumps(found, indent=None).replace('{"op"', '\n{"op"') + "\n")
