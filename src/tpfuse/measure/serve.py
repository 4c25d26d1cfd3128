"""Serving a load: sequences that come together are prefilled batch by batch, then take their steps of decode together.

Prefills are launched kernel by kernel, every step of decode is a CUDA graph.  Times are the device's: its clock starts when all
ranks are there.  A stack has no vocabulary: the first token is what a prefill ends in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tpfuse import shim
from tpfuse.measure.e2e import PLAIN, Runner, described, operators, step_of
from tpfuse.measure.points import AGAIN
from tpfuse.measure.stack import Cache
from tpfuse.measure.timing import WARM, Timer, slowest, summary

TTFT, TPOT, TOTAL = "ttft_us", "tpot_us", "us"


@dataclass(frozen=True)
class Load:
    """sequences: of `prompt` tokens each, prefilled `batch` at a time.  output: tokens that each gets, 2 or more, the first
    from its prefill; every step of decode reads the cache of prompt + output positions."""

    prompt: int
    batch: int
    sequences: int
    output: int

    @property
    def length(self) -> int:
        return self.prompt + self.output


class Served:
    """One rank's stack under a load: what prefills each batch, and what takes a step of all, by how they are compiled."""

    def __init__(self, runner: Runner, load: Load, pairs: Mapping[str, tuple[str, str]]) -> None:
        self.load, self.runner = load, runner
        pairs = {name: pair for name, pair in pairs.items() if pair[0] in runner.prefill}
        self.pairs = {PLAIN + AGAIN: pairs[PLAIN], **pairs}
        prompts, tokens = runner.rows(load.batch * load.prompt), runner.rows(load.sequences)
        self.caches = caches = runner.stack.caches(load.sequences, load.length)
        batches = [_rows_of(caches, i, i + load.batch) for i in range(0, load.sequences, load.batch)]
        self.prefills = {
            name: [step_of(runner.prefill[how], prompts, part, load.batch) for part in batches]
            for name, (how, _) in self.pairs.items()
        }
        _mark(tokens, caches)
        self.steps = {name: step_of(runner.decode[how], tokens, caches, None) for name, (_, how) in self.pairs.items()}

    def measure(self, timer: Timer, share: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
        """Rows of a result file: `us` of the whole load, the slowest rank's; mean microseconds to first tokens, a step's
        microseconds, and tokens a second of all sequences together."""
        working = self.runner.working({name: prefills[0] for name, prefills in self.prefills.items()}, share)
        self.pairs = {name: pair for name, pair in self.pairs.items() if name in working}
        found = slowest(share(self.times(timer)))
        load = self.load
        rows = []
        for name, (prefill, decode) in self.pairs.items():
            totals = found[f"{name} {TOTAL}"]
            row = {
                "op": "serve", "tokens": load.prompt, "batch": load.batch, "sequences": load.sequences, "output": load.output,
                **described(self.runner.stack), "impl": name, **summary(totals),
                **{metric: statistics.median(found[f"{name} {metric}"]) for metric in (TTFT, TPOT)},
                "tokens_per_s": load.sequences * load.output / statistics.median(totals) * 1e6, "samples": totals,
            }  # fmt: skip
            calls = (self.runner.prefill[prefill], load.batch * load.prompt), (self.runner.decode[decode], load.sequences)
            made = [m for m in (operators(*call) for call in calls) if m is not None]
            rows.append({**row, **({"operators": made} if made else {})})
        return rows

    def times(self, timer: Timer) -> dict[str, list[float]]:
        """Microseconds by implementation and metric, one a trial, the implementations taking turns."""
        for name in self.pairs:  # compiled before any capture
            for run in (*self.prefills[name], self.steps[name]):
                run(0)
        pool = torch.cuda.graph_pool_handle()
        graphs = {name: timer.graph(self.steps[name], 1, pool) for name in self.pairs}
        samples: dict[str, list[float]] = {f"{name} {metric}": [] for name in graphs for metric in (TTFT, TPOT, TOTAL)}
        for trial in range(timer.trials + WARM):
            for name, graph in graphs.items():
                times = self._serve(timer, name, graph.replay)
                if trial >= WARM:
                    for metric, value in times.items():
                        samples[f"{name} {metric}"].append(value)
        return samples

    def _serve(self, timer: Timer, name: str, step: Callable[[], Any]) -> dict[str, float]:
        """Serve the load once."""
        prefills = self.prefills[name]
        start, end, *firsts = (torch.cuda.Event(enable_timing=True) for _ in range(2 + len(prefills)))
        torch.cuda.synchronize()
        timer.align()
        start.record()
        for prefill, first in zip(prefills, firsts, strict=True):
            prefill(0)
            first.record()
        for _ in range(self.load.output - 1):
            step()
        end.record()
        torch.cuda.synchronize()
        return {
            TTFT: statistics.mean(start.elapsed_time(first) for first in firsts) * 1e3,
            TPOT: firsts[-1].elapsed_time(end) * 1e3 / (self.load.output - 1),
            TOTAL: start.elapsed_time(end) * 1e3,
        }


def _rows_of(caches: list[Cache], begin: int, end: int) -> list[Cache]:
    """The caches of some of the sequences."""
    return [tuple(t[begin:end] for t in cache) for cache in caches]


def _mark(tokens: torch.Tensor, caches: list[Cache]) -> None:
    """One graph for every number of sequences from 2 on, and for every length of their caches, the last dimension but one."""
    tensors = [t for cache in caches for t in cache]
    for tensor in tensors:
        shim.mark_dynamic(tensor, tensor.dim() - 2)
    for tensor in (tokens, *tensors) if len(tokens) > 1 else ():
        shim.mark_dynamic(tensor, 0)
