"""One rank of a measurement: its place among the others, its timer, what it builds."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from tpfuse.ir.op import load
from tpfuse.measure.collectives import Collectives
from tpfuse.measure.points import Point
from tpfuse.measure.timing import Timer, in_step, summary
from tpfuse.runtime.detect import detect
from tpfuse.target import Target


@dataclass
class Ranks:
    """group: all ranks, over NCCL.  host: the same over gloo, for what is no measurement.  notes: what could not be measured."""

    group: dist.ProcessGroup
    host: dist.ProcessGroup
    target: Target
    built: Collectives
    notes: list[str]

    @staticmethod
    def join(place: Any, points: Sequence[Point], eager: bool = False, flashinfer: bool = True) -> Ranks:
        """Start the process groups of this rank.  place: `cli.launch.Place`.  Collective, and once a process.

        flashinfer: whether it is measured, which takes minutes to build.
        """
        place.join("cuda", 300.0)
        group = dist.group.WORLD
        host = dist.new_group(backend="gloo")
        assert group is not None and isinstance(host, dist.ProcessGroup)
        target = detect("cuda", group.group_name)
        notes = []
        if not flashinfer:
            target = replace(target, backends=target.backends - {"flashinfer"})
        elif "flashinfer" in target.backends and (reason := _first(host, _import_error())):
            target = replace(target, backends=target.backends - {"flashinfer"}, versions={**target.versions, "flashinfer": "0"})
            notes.append(f"FlashInfer could not be imported and was not measured: {reason}")
        most_tokens, widest = max((p.tokens for p in points), default=1), max((p.hidden for p in points), default=8)
        return Ranks(group, host, target, Collectives(group, target, most_tokens, widest, eager), notes)

    def timer(self, trials: int) -> Timer:
        return Timer(trials, in_step())

    def share(self, mine: Any) -> list[Any]:
        """What every rank gives, by rank."""
        everyone: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everyone, mine, group=self.host)
        return everyone

    def empty_kernel(self, timer: Timer) -> list[dict[str, Any]]:
        """What a launch costs in such a graph, as a row of a result file."""
        launch = load("tpfuse.kernels.empty:launch")
        samples = timer.alternate({"empty_kernel": lambda i: launch()}, 24)["empty_kernel"]
        where = {"scheme": "", "dtype": "", "tokens": 0, "hidden": 0, "world": self.group.size()}
        return [{"op": "empty_kernel", **where, "impl": "empty_kernel", **summary(samples), "samples": samples}]

    def leave(self) -> None:
        """Close the groups, once all ranks have come here.  The last call of a rank."""
        gc.collect()  # captured graphs hold on to what NCCL is about to free
        torch.cuda.synchronize()
        dist.barrier(group=self.host)
        dist.destroy_process_group()


def _import_error() -> str:
    """Why FlashInfer's communication module does not load or build here; "" where it does."""
    try:
        load("tpfuse.kernels.flashinfer:comm")().trtllm_ar.get_trtllm_comm_module()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _first(host: dist.ProcessGroup, mine: str) -> str:
    """The first reason that a rank has."""
    everyone: list[Any] = [None] * host.size()
    dist.all_gather_object(everyone, mine, group=host)
    return next(filter(None, everyone), "")
