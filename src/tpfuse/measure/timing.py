"""Timing of implementations that take turns, in CUDA graphs and without, on one GPU or on several in step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tpfuse import shim

WARM = 3  # replays that are not counted
# Clock cycles.  The device waits before a round of replays, so that every rank's host is ahead of it by more than a host is ever
# held up, and before each replay, so that it stays ahead.
HEAD_START = 4_000_000
PAUSE = 100_000
CLOCK = 2e9  # cycles a second, at most


class Timer:
    """Times functions of a call's index; `calls` of them to a graph, `trials` counted replays of each graph.

    align: enqueued before each replay; with `in_step`, ranks start their replays at the same time, whatever their hosts do.
    All captures are on one stream, so a collective's workspace needs one channel for them.
    """

    def __init__(self, trials: int, align: Callable[[], Any] = lambda: None) -> None:
        self.trials = trials
        self.align = align
        self.stream = torch.cuda.Stream()

    def graph(self, fn: Callable[[int], Any], calls: int, pool: Any) -> torch.cuda.CUDAGraph:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for i in range(3):
                fn(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread may look at its events meanwhile.
        with torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"):
            for i in range(calls):
                fn(i)
        return graph

    def of(self, impls: Mapping[str, Callable[[int], Any]], point: Any) -> dict[str, list[float]]:
        """`alternate` at a point of a sweep."""
        return self.alternate(impls, point.calls)

    def alternate(
        self, impls: Mapping[str, Callable[[int], Any]], calls: int, trials: int | None = None
    ) -> dict[str, list[float]]:
        """Microseconds a call of each implementation, one sample a replay, the implementations taking turns.

        A round, a replay of each, is enqueued as a whole: what the host does meanwhile costs no replay time.
        """
        pool = torch.cuda.graph_pool_handle()  # graphs may overwrite one another's results
        graphs = {name: self.graph(fn, calls, pool) for name, fn in impls.items()}
        samples: dict[str, list[float]] = {name: [] for name in impls}
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in impls}
        for trial in range((trials or self.trials) + WARM):
            shim.device_pause(HEAD_START)
            for name, graph in graphs.items():
                start, end = events[name]
                self.align()
                start.record()
                graph.replay()
                end.record()
            torch.cuda.synchronize()
            if trial >= WARM:
                for name, (start, end) in events.items():
                    samples[name].append(start.elapsed_time(end) * 1e3 / calls)
        return samples

    def queued(self, impls: Mapping[str, Callable[[int], Any]]) -> dict[str, list[float]]:
        """The same for calls that are launched kernel by kernel, one a sample.  Before each the device waits for longer than the
        host takes to launch one, so that it never waits for the host."""
        seconds = []
        for _ in range(2):
            for fn in impls.values():
                torch.cuda.synchronize()
                start = time.perf_counter()
                fn(0)
                seconds.append(time.perf_counter() - start)
        lead = int(1.5 * max(seconds[len(impls) :]) * CLOCK)
        samples: dict[str, list[float]] = {name: [] for name in impls}
        for trial in range(self.trials + WARM):
            for name, fn in impls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                shim.device_pause(lead)
                self.align()
                start.record()
                fn(trial)
                end.record()
                torch.cuda.synchronize()
                if trial >= WARM:
                    samples[name].append(start.elapsed_time(end) * 1e3)
        return samples


def in_step() -> Callable[[], None]:
    """An `align` for the default process group over NCCL: the stream pauses, then the ranks meet on the device."""
    token = torch.zeros(1, device="cuda")

    def align() -> None:
        shim.device_pause(PAUSE)
        dist.all_reduce(token)

    return align


def launches(fn: Callable[[int], Any]) -> int:
    """Kernels that one call launches, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        fn(0)
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in trace.events())


def copy_bandwidth(timer: Timer, calls: int = 12) -> float:
    """Bytes a second that a large elementwise kernel reads and writes (the copy engine is slower)."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    best = min(timer.alternate({"copy": lambda i: torch.neg(source, out=target)}, calls)["copy"])
    return 8 * source.numel() / best * 1e6


def summary(samples: Sequence[float]) -> dict[str, float]:
    return {"us": statistics.median(samples), "us_min": min(samples), "us_max": max(samples)}


def slowest(everyone: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Of all ranks' samples the largest of each replay, by implementation."""
    return {impl: [max(replay) for replay in zip(*(s[impl] for s in everyone), strict=True)] for impl in everyone[0]}


def without_index(launch: Callable[[], Any], i: int) -> Any:
    """A launch of the same arguments whatever the call's number."""
    return launch()
