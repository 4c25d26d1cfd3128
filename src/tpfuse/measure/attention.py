"""Attention whose rows are quantised, measured for a table: every kernel that serves, on each rank by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from tpfuse.ir.attention import attention_quantize
from tpfuse.ir.op import Op, load
from tpfuse.measure import plain
from tpfuse.measure.points import LAYOUTS
from tpfuse.measure.timing import summary
from tpfuse.target import Target

HEADS, KV_HEADS = 32, 8  # of Llama 3's layers of 4096; how many there are changes little


@dataclass(frozen=True)
class AttentionPoint:
    """A causal prompt of one sequence.  across: the width of a head of q and k.  hidden: of one of v.  scheme: never ""."""

    scheme: str
    hidden: int
    across: int
    tokens: int
    dtype: str = "bfloat16"
    calls = 8

    @property
    def op(self) -> Op:
        return attention_quantize

    def arguments(self, device: str) -> dict[str, Any]:
        """Of one call, by name."""

        def heads(number: int, width: int) -> torch.Tensor:
            made = torch.randn(1, self.tokens, number, width, dtype=getattr(torch, self.dtype), device=device)
            return made.transpose(1, 2)

        return {
            "q": heads(HEADS, self.across), "k": heads(KV_HEADS, self.across), "v": heads(KV_HEADS, self.hidden), "mask": None,
            "scale": plain.scale_of(self.scheme, device), "softmax_scale": self.across**-0.5, "causal": True, "method": "flash",
            "scheme": self.scheme, "layout": LAYOUTS.get(self.scheme, "row"),
        }  # fmt: skip

    def kernels(self, target: Target, device: str = "cuda") -> dict[str, Callable[[int], Any]]:
        """By the names of kernels, all that serve on `target` but the one that chooses among them."""
        args = self.arguments(device)
        found = [k for k in self.op.kernels if k.algorithm and k.backend in target.backends and k.supports(args, target) is None]
        values = tuple(args.values())
        return {k.name: partial(_call, load(k.launch), values) for k in found}

    def rows(self, samples: Mapping[str, list[float]], world: int, picked: str | None) -> list[dict[str, Any]]:
        """Of a result file; of one GPU, whatever the others do."""
        where = {"op": self.op.name, "scheme": self.scheme, "dtype": self.dtype, "tokens": self.tokens, "hidden": self.hidden,
                 "across": self.across, "world": 1}  # fmt: skip
        return [{**where, "impl": impl, **summary(values), "samples": values} for impl, values in samples.items()]


def _call(launch: Callable[..., Any], values: tuple[Any, ...], i: int) -> Any:
    return launch(*values, alive=(True, True, False))


def grid(schemes: Iterable[str], widths: Iterable[tuple[int, int]], tokens: Iterable[int], dtype: str) -> list[AttentionPoint]:
    """Every scheme whose scales lie within a head, the tokens innermost.  widths: of (q and k, v)."""
    every = product(filter(None, schemes), widths, sorted(set(tokens)))
    points = [AttentionPoint(scheme, hidden, across, number, dtype) for scheme, (across, hidden), number in every]
    return [p for p in points if attention_quantize.guard(p.arguments("meta")) is None]
