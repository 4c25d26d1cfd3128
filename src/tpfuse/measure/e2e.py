"""End to end: a stack of layers compiled several ways, each step of decode or prefill in a CUDA graph, taking turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tpfuse
from tpfuse import shim
from tpfuse.config import Config
from tpfuse.measure.points import AGAIN
from tpfuse.measure.stack import Stack
from tpfuse.measure.timing import Timer, slowest, summary

PLAIN, ROOM = "nccl+inductor", "no_collective"


@dataclass(frozen=True)
class Variant:
    """config: how tpfuse compiles it; None is torch.compile alone.  reduces: whether the collectives are there."""

    name: str
    config: Config | None = None
    reduces: bool = True


def variants(table: str | None, max_tokens: int, flashinfer: bool) -> list[Variant]:
    """The plain one first.  The stack without collectives is measured too: what is between the two is the room."""
    found = [Variant(PLAIN), Variant("tpfuse", Config.of({"table": table, "max_tokens": max_tokens, "strict": True}))]
    if flashinfer:
        config = Config.of({"kernels": "flashinfer", "max_tokens": max_tokens, "strict": True})
        found.append(Variant("flashinfer_one_shot", config))
    return [*found, Variant(ROOM, reduces=False)]


class Runner:
    """One rank's compiled variants of a stack."""

    def __init__(self, stack: Stack, group: dist.ProcessGroup, found: list[Variant]) -> None:
        def reduce(x: Tensor) -> Tensor:
            return shim.functional_all_reduce(x, group)

        def with_collectives(x: Tensor, caches: Any) -> Tensor:
            return stack.run(x, caches, reduce)

        def without(x: Tensor, caches: Any) -> Tensor:
            return stack.run(x, caches, lambda x: x)

        self.stack = stack
        self.calls: dict[str, Callable[..., Tensor]] = {}
        for variant in found:
            model = with_collectives if variant.reduces else without
            how: dict[str, Any] = {"fullgraph": True}
            self.calls[variant.name] = (
                torch.compile(model, **how) if variant.config is None else tpfuse.compile(model, variant.config, **how)
            )

    def steps(self, tokens: int, cached: int | None) -> dict[str, Callable[[int], Tensor]]:
        """A step of each variant on the same input.  cached: positions in the cache of each of `tokens` sequences; None for a
        prefill of one sequence."""
        x = torch.randn(tokens, self.stack.shape.hidden, dtype=self.stack.norm.dtype, device=self.stack.norm.device)
        dist.broadcast(x, 0)
        caches = None if cached is None else self.stack.caches(tokens, cached)
        if tokens > 1:  # one graph for every number of tokens from 2 on
            for tensor in (x, *(t for pair in caches or () for t in pair)):
                shim.mark_dynamic(tensor, 0)

        def step(call: Callable[..., Tensor]) -> Callable[[int], Tensor]:
            def run(i: int) -> Tensor:
                with torch.no_grad():
                    return call(x, caches)

            return run

        return {name: step(call) for name, call in self.calls.items()}

    def measure(self, timer: Timer, tokens: int, cached: int | None, share: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
        """Rows of a result file: microseconds a layer, the slowest rank's; `error`: of the output, against the plain one's."""
        steps = self.steps(tokens, cached)
        outputs = {name: step(0).double() for name, step in steps.items()}
        again = {PLAIN + AGAIN: steps[PLAIN], **steps}
        samples = slowest(share(timer.alternate(again, 1)))
        want, layers = outputs[PLAIN], len(self.stack.layers)
        rows = []
        for name, values in samples.items():
            values = [value / layers for value in values]
            row = {
                "op": "prefill" if cached is None else "decode", "scheme": "", "dtype": "bfloat16", "tokens": tokens,
                "hidden": self.stack.shape.hidden, "intermediate": self.stack.shape.intermediate, "world": self.stack.world,
                "layers": layers, "cached": cached or 0, "impl": name, **summary(values), "samples": values,
            }  # fmt: skip
            if name in outputs and name != ROOM:
                row["difference"] = float((outputs[name] - want).norm() / want.norm())
            rows.append(row)
        return rows


def closed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The share of the room that each implementation closes: (plain - it) / (plain - without collectives)."""
    times = {row["impl"]: row["us"] for row in rows}
    room = times[PLAIN] - times[ROOM]
    return {name: (times[PLAIN] - us) / room for name, us in times.items() if name not in (PLAIN, PLAIN + AGAIN, ROOM)}
