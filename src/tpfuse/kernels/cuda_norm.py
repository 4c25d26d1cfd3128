"""Launches of the CUDA C++ kernels under `cuda/`: all-reduce + norm (+ quantise)."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpfuse.report import FusionError

from . import calls, driver
from .calls import NormCall, Outputs, rows_of
from .channel import Channel
from .plan import ceil_div
from .signal import OPERATORS
from .workspace import channel_of

_POINTERS = ("x", "residual", "bias", "weight", "weight2", "scale", "norm", "reduced", "q", "scales", "table", "state")
_LONGS = ("section", "slot_vectors", "base", "outbox", "outscales", "stride_row", "stride_group")
_INTS = ("first", "end", "tokens", "share", "vectors", "rank", "operation")
_FLOATS = ("alpha", "eps", "eps2", "weight_bias")


class Args(ctypes.Structure):
    """`Args` of common.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_longlong) for name in _LONGS),
        *((name, ctypes.c_int) for name in _INTS), *((name, ctypes.c_float) for name in _FLOATS),
    ]  # fmt: skip


@dataclass(frozen=True)
class ClusterPlan:
    """How a row is held: `cluster` blocks of `threads` threads, each with `held` 16-byte vectors; `resident` blocks an SM."""

    threads: int
    cluster: int
    held: int
    resident: int

    @staticmethod
    def of(rows: int, vectors: int, sms: int) -> ClusterPlan:
        """For few rows a row is spread over several SMs; for many, blocks are wide enough for two an SM."""
        for cluster in (8, 4, 2):
            threads = ceil_div(ceil_div(vectors, cluster), 32) * 32
            if rows * cluster <= sms and threads >= 64 and threads <= 512:
                return ClusterPlan(threads, cluster, 1, 1)
        held = 1 if vectors <= 512 else 2 if vectors <= 1024 else 4
        threads = ceil_div(ceil_div(vectors, held), 32) * 32
        return ClusterPlan(threads, 1, held, max(1, 1024 // threads))

    def grid(self, rows: int, sms: int) -> int:
        return max(1, min(rows, sms * self.resident // self.cluster)) * self.cluster


def flags_of(call: NormCall, channel: Channel, plan: ClusterPlan) -> frozenset[tuple[str, str]]:
    """Macros of one compiled kernel."""
    flags = call.flags(0)
    flags["GROUP"] = flags["GROUP"] if flags["SCHEME"] else 0
    flags |= {
        "HALF": call.x.dtype == torch.float16, "WORLD": channel.world, "THREADS": plan.threads, "CLUSTER": plan.cluster,
        "VPT": plan.held, "MIN_BLOCKS": plan.resident, "NORM_F32": calls.keeps_f32(call.rounding),
    }  # fmt: skip
    return frozenset((name, _literal(value)) for name, value in flags.items())


def _literal(value: Any) -> str:
    if isinstance(value, float):
        return "__int_as_float(0x7f800000)" if math.isinf(value) else f"{value!r}f"
    return str(int(value))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def one_shot(channel: Channel, call: NormCall, plan: ClusterPlan | None = None) -> Outputs:
    """Launch `call` on `channel`.  Messages larger than the channel's one-shot slots go in several launches."""
    x = rows_of(call.x)
    tokens, hidden = x.shape
    chunk = channel.layout.one_shot_rows(hidden * x.element_size())
    if chunk == 0:
        raise FusionError(
            f"{call.operator}: a row of {hidden * x.element_size()} bytes does not fit one of the workspace's one-shot "
            f"slots ({channel.layout.one_shot} bytes): prepare the group with hidden={hidden}"
        )
    channel.check()
    outputs = call.outputs()
    residual, bias, weight, weight2, scale = call.given()
    stride_row, stride_group = calls.scale_strides(outputs.scales)
    args = Args(
        x=x.data_ptr(), residual=_pointer(residual), bias=_pointer(bias), weight=_pointer(weight), weight2=_pointer(weight2),
        scale=_pointer(scale), norm=_pointer(outputs.norm), reduced=_pointer(outputs.reduced), q=_pointer(outputs.q),
        scales=_pointer(outputs.scales), table=channel.table.data_ptr(), state=channel.state.data_ptr(),
        section=channel.layout.one_shot // 16, slot_vectors=channel.layout.one_shot_slot // 16,
        stride_row=stride_row, stride_group=stride_group, tokens=tokens, vectors=hidden // 8, rank=channel.rank,
        operation=OPERATORS.index(call.operator), alpha=call.alpha, eps=call.eps, eps2=call.eps2, weight_bias=call.weight_bias,
    )  # fmt: skip
    for first in range(0, tokens, chunk):
        args.first, args.end = first, min(tokens, first + chunk)
        rows = args.end - first
        how = plan or ClusterPlan.of(rows, hidden // 8, channel.sms)
        kernel = driver.compiled(("common.cuh", "finish.cuh", "one_shot.cu"), "one_shot", flags_of(call, channel, how))
        kernel(how.grid(rows, channel.sms), how.threads, how.cluster, channel.early, args)
    return outputs


def _run(make, *args, alive):
    call = make(*args, alive=alive)
    return call.results(one_shot(channel_of(call.group), call))


all_reduce_rms_norm = partial(_run, calls.all_reduce_rms_norm)
all_reduce_add_rms_norm = partial(_run, calls.all_reduce_add_rms_norm)
all_reduce_rms_norm_quantize = partial(_run, calls.all_reduce_rms_norm_quantize)
all_reduce_add_rms_norm_quantize = partial(_run, calls.all_reduce_add_rms_norm_quantize)
all_reduce_rms_norm_add_rms_norm = partial(_run, calls.all_reduce_rms_norm_add_rms_norm)
