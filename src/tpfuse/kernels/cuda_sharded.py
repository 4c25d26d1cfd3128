"""Launches of `cuda/sharded.cu`: reduce-scatter + norm (+ quantise) (+ all-gather) around a residual that is sharded by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpfuse.formats import Scheme, quantize_fake
from tpfuse.ir import shard
from tpfuse.report import FusionError

from . import calls
from .calls import NormCall, call_of, rows_of
from .channel import Channel
from .cuda_norm import Args, BlockPlan, inputs_of, kernel_of, pointer
from .plan import ceil_div
from .workspace import channel_of

OPERATORS = tuple(op.name for op in (*shard.SCATTERED, *shard.GATHERED))


class ShardOutputs(NamedTuple):
    """Results of the family; those nobody wants are empty.  q, scales, norm: of all rows with `gather`, else of own rows, and
    norm is there only unquantised with `gather`."""

    q: Tensor
    scales: Tensor
    norm: Tensor
    own_norm: Tensor
    reduced: Tensor


@dataclass(frozen=True)
class ShardCall(NormCall):
    """`NormCall` of own rows: residual, norm and h are [⌈rows / world⌉, hidden].  alive: which of q, scales, own norm, h."""

    gather: bool = False
    all_rows: bool = False  # the unquantised norm of all rows is wanted

    def shard_outputs(self, world: int) -> ShardOutputs:
        x, own = self.x, ceil_div(self.x.shape[0], world)
        shard = [own, x.shape[1]]
        none = x.new_empty(0)
        q, scales = none, none
        if self.quantised:
            q, scales = quantize_fake(x if self.gather else x.new_empty(shard), self.scheme, self.layout)
        dtype = torch.float32 if self.keeps_f32 else x.dtype
        norm = torch.empty_like(x) if self.all_rows else none
        own_norm = x.new_empty(shard, dtype=dtype) if self.alive[2] else none
        return ShardOutputs(q, scales, norm, own_norm, x.new_empty(shard) if self.alive[3] else none)


def scale_words(scheme: str, vectors: int) -> int:
    """Words of 4 bytes that the scales of one row take on their way."""
    what = Scheme.parse(scheme) if scheme else None
    if what is None or what.name == "fp8_tensor":
        return 0
    if not what.is_fp8:
        return ceil_div(vectors, 8)
    return ceil_div(vectors, what.group // 8) if what.group else 1


def results_into(args: Args, outputs: ShardOutputs) -> None:
    args.norm, args.own_norm, args.reduced = pointer(outputs.norm), pointer(outputs.own_norm), pointer(outputs.reduced)
    args.q, args.scales = pointer(outputs.q), pointer(outputs.scales)
    args.stride_row, args.stride_group = calls.scale_strides(outputs.scales)


def sharded(channel: Channel, call: ShardCall) -> ShardOutputs:
    """Launch `call` on `channel`.  Messages larger than the channel's two-shot slots go in several launches."""
    x, layout = rows_of(call.x), channel.layout
    tokens, hidden = x.shape
    row_bytes = hidden * x.element_size()
    words = scale_words(call.scheme, hidden // 8)
    chunk = min(layout.inbox // row_bytes, layout.outbox // channel.world // row_bytes)
    if words:
        chunk = min(chunk, layout.scales // channel.world // (4 * words))
    if chunk == 0:
        raise FusionError(
            f"{call.operator}: a row of {row_bytes} bytes does not fit the workspace's two-shot slots "
            f"({layout.inbox} bytes a rank): prepare the group with hidden={hidden}"
        )
    channel.check()
    outputs = call.shard_outputs(channel.world)
    args, _alive = inputs_of(channel, call, x)
    results_into(args, outputs)
    args.base, args.section = layout.two_shot_offset // 16, layout.inbox // 16
    args.slot_vectors, args.outbox, args.outscales = (
        layout.two_shot_slot // 16, layout.outbox_offset // 16, layout.scales_offset // 16
    )  # fmt: skip
    args.share, args.scale_words = ceil_div(tokens, channel.world), words
    flags = {"NORM": call.all_rows, "OWN_NORM": call.alive[2], "GATHER": call.gather}
    plan = BlockPlan.of(args.vectors)
    kernel = kernel_of("sharded", call, channel, plan, **flags)
    for first in range(0, args.share, chunk):
        args.first, args.end = first, min(args.share, first + chunk)
        kernel(plan.grid(args.end - args.first, channel.sms), plan.threads, channel.early, args)
    return outputs


def __getattr__(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """What the registry launches for an operator, by its name."""
    if name not in OPERATORS:
        raise AttributeError(f"no kernel is named {name!r}")
    quantised, gather = "_quantize" in name, name.endswith("_all_gather")

    def run(*args: Any, alive: tuple[bool, ...]) -> tuple[Tensor, ...]:
        if gather and not quantised:  # (norm of all rows, own norm, h)
            call = call_of(ShardCall, name, args, alive[1:], gather=alive[0], all_rows=alive[0])
        else:
            call = call_of(ShardCall, name, args, alive, gather=gather and any(alive[:2]))
        out = sharded(channel_of(call.group), call)
        if quantised:
            return out.q, out.scales, out.own_norm, out.reduced
        return (out.norm, out.own_norm, out.reduced) if gather else (out.own_norm, out.reduced)

    return run
