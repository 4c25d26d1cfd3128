"""Launches of the CUDA C++ kernels under `cuda/`: all-reduce + norm (+ quantise)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse.report import FusionError

from . import calls, driver
from .calls import NormCall, Outputs, rows_of
from .channel import Channel, Link
from .plan import THREADS_PER_SM, ceil_div
from .signal import OPERATORS
from .workspace import channel_of

_POINTERS = (
    "x", "residual", "bias", "weight", "weight2", "scale", "norm", "own_norm", "reduced", "q", "scales", "table", "state",
)  # fmt: skip
_LONGS = ("section", "slot_vectors", "base", "outbox", "outscales", "stride_row", "stride_group")
_INTS = ("first", "end", "tokens", "share", "scale_words", "vectors", "operation")
_FLOATS = ("alpha", "eps", "eps2", "weight_bias")


class Args(ctypes.Structure):
    """`Args` of common.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_longlong) for name in _LONGS),
        *((name, ctypes.c_int) for name in _INTS), *((name, ctypes.c_float) for name in _FLOATS),
    ]  # fmt: skip


@dataclass(frozen=True)
class BlockPlan:
    """How a block holds a row: `threads` threads, each with `held` 16-byte vectors; `resident` blocks fit an SM."""

    threads: int
    held: int
    resident: int

    @staticmethod
    def of(vectors: int) -> BlockPlan:
        """One vector a thread where 1024 threads suffice: the sum over a row then costs least, and nothing spills."""
        held = ceil_div(vectors, 1024)
        threads = ceil_div(ceil_div(vectors, held), 32) * 32
        return BlockPlan(threads, held, max(1, THREADS_PER_SM // threads))

    def grid(self, rows: int, sms: int) -> int:
        return max(1, min(rows, sms * self.resident))


def macros_of(call: NormCall, rank: int, world: int, plan: BlockPlan, **flags: Any) -> frozenset[tuple[str, str]]:
    """What is fixed when a kernel is compiled."""
    macros = {
        **call.flags(0), "HALF": call.x.dtype == torch.float16, "WORLD": world, "RANK": rank, "THREADS": plan.threads,
        "VPT": plan.held, "MIN_BLOCKS": plan.resident, "NORM_F32": call.keeps_f32, "OWN_NORM": False, **flags,
    }  # fmt: skip
    return literals(macros)


def literals(macros: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset((name, _literal(value)) for name, value in macros.items())


def sources_of(name: str) -> tuple[str, ...]:
    """The files of a norm kernel, in order; that of a sum of partial rows in a region waits by flags."""
    return "signals.cuh", "common.cuh", "finish.cuh", *(("flags.cuh",) if name == "reduce" else ()), f"{name}.cu"


def kernel_of(name: str, call: NormCall, link: Link, plan: BlockPlan, **flags: Any) -> driver.Function:
    """The kernel of that name, compiled for what the call asks."""
    macros = macros_of(call, link.rank, link.world, plan, **flags)
    return driver.compiled(sources_of(name), name, macros, link.table.device.index)


def _literal(value: Any) -> str:
    if isinstance(value, float):
        return "__int_as_float(0x7f800000)" if math.isinf(value) else f"{value!r}f"
    return str(int(value))


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def inputs_of(link: Link, call: NormCall, x: Tensor) -> tuple[Args, list[Tensor | None]]:
    """The arguments that do not depend on the algorithm, and what they point to."""
    given = residual, bias, weight, weight2, scale = call.given()
    args = Args(
        x=x.data_ptr(), residual=pointer(residual), bias=pointer(bias), weight=pointer(weight), weight2=pointer(weight2),
        scale=pointer(scale), table=link.table.data_ptr(), state=link.state.data_ptr(), tokens=x.shape[0],
        vectors=x.shape[1] // 8, operation=OPERATORS.index(call.operator), alpha=call.alpha, eps=call.eps, eps2=call.eps2,
        weight_bias=call.weight_bias,
    )  # fmt: skip
    return args, list(given)


def one_shot(channel: Channel, call: NormCall) -> Outputs:
    """Launch `call` on `channel`.  Messages larger than the channel's one-shot slots go in several launches."""
    x, layout = rows_of(call.x), channel.layout
    tokens, hidden = x.shape
    chunk = layout.one_shot_rows(hidden * x.element_size())
    if chunk == 0:
        raise FusionError(
            f"{call.operator}: a row of {hidden * x.element_size()} bytes does not fit one of the workspace's one-shot "
            f"slots ({layout.one_shot} bytes): prepare the group with hidden={hidden}"
        )
    channel.check()
    outputs = call.outputs()
    plan = BlockPlan.of(hidden // 8)
    kernel = kernel_of("one_shot", call, channel, plan)
    args, _alive = inputs_of(channel, call, x)
    args.norm, args.reduced = pointer(outputs.norm), pointer(outputs.reduced)
    args.q, args.scales = pointer(outputs.q), pointer(outputs.scales)
    args.stride_row, args.stride_group = calls.scale_strides(outputs.scales)
    args.section, args.slot_vectors = layout.one_shot // 16, layout.one_shot_slot // 16
    for first in range(0, tokens, chunk):
        args.first, args.end = first, min(tokens, first + chunk)
        kernel(plan.grid(args.end - args.first, channel.sms), plan.threads, channel.early, args)
    return outputs


def _run(call: NormCall) -> tuple[Tensor, ...]:
    return call.results(one_shot(channel_of(call.group), call))


__getattr__ = calls.launchers(_run)
