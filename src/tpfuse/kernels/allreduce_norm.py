"""One-shot all-reduce + (bias, alpha, residual) + RMS norm (+ second norm) (+ quantise), in one launch.

    h    = residual + alpha * (sum over ranks of x + bias)
    norm = h / sqrt(mean(h^2) + eps) * (weight + weight_bias)

Every rank pushes its rows to every peer and reduces all of them itself, in FP32 and in rank order, so that the ranks
get the same bits.  For few tokens: each byte crosses the link once, and nobody waits twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tpfuse.report import FusionError

from . import calls
from .calls import NormCall, Outputs, rows_of
from .channel import Channel
from .plan import RowPlan
from .rows import NVFP4, load_row, load_weight, quantise_row, rms_normalise, store_row, zero_padding_rows
from .signal import (
    OPERATORS,
    arrive,
    done,
    load_words,
    poll_words,
    push_words,
    read_state,
    section_of,
    section_words,
    wait_for_inputs,
)
from .vectors import words_to_row
from .workspace import channel_of

PROTOCOL = tl.constexpr(0)
# Sizes change from call to call: a kernel compiled for one must serve them all.
SIZES = ["first", "end", "tokens", "row_vectors", "section", "slot_words", "stride_row", "stride_group"]


@triton.jit(do_not_specialize=SIZES)
def one_shot_kernel(
    x, residual, bias, weight, weight2, scale, norm, reduced, q, scales, table, state,
    first, end, tokens, row_vectors, section, slot_words, stride_row, stride_group, alpha, eps, eps2, weight_bias,
    RANK: tl.constexpr, WORLD: tl.constexpr, OPERATOR: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT2: tl.constexpr, SANDWICH: tl.constexpr,
    ALPHA: tl.constexpr, NORM: tl.constexpr, REDUCED: tl.constexpr, GIVEN: tl.constexpr, SCHEME: tl.constexpr,
    GROUP: tl.constexpr, INVERT: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    POW2: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows of `row_vectors` 16-byte vectors of x's dtype; `section` and `slot_words` in int32 words.

    Rows `first` to `end` (exclusive) of `tokens` are done.

    `table[r]`: address of rank r's receive buffer.  `state`: the channel's (see signal.py).
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PER_VECTOR: tl.constexpr = BLOCK // VECTORS
    hidden = row_vectors * PER_VECTOR  # so the compiler sees that rows are whole vectors
    vector = tl.arange(0, VECTORS)
    active = vector < row_vectors
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    row_words = row_vectors * 4
    buffers = ()
    for peer in tl.static_range(WORLD):
        buffers = buffers + (tl.load(table + peer).to(tl.pointer_type(tl.int32)),)

    wait_for_inputs(ASM)
    slot, sequence = read_state(state, PROTOCOL, ASM)
    start = first.to(tl.int64) * row_words
    own = buffers[RANK] + slot.to(tl.int64) * slot_words - start
    x_words = x.to(tl.pointer_type(tl.int32))

    row = first + tl.program_id(0)
    while row < end:
        lane = row.to(tl.int64) * row_words + vector * 4
        words = load_words(x_words + lane, active, 4, ASM)
        for step in tl.static_range(1, WORLD):
            there = buffers[(RANK + step) % WORLD] + slot.to(tl.int64) * slot_words
            there += section_of(RANK, (RANK + step) % WORLD) * section.to(tl.int64)
            push_words(there + (lane - start), words, active, 4, ASM)
        row += tl.num_programs(0)

    if end > first:  # an empty call brings no ranks together: it must not take a turn
        arrive(state, slot, sequence, PROTOCOL, ASM)

    w = load_weight(weight, cols, mask, weight_bias, WEIGHT)
    w2 = load_weight(weight2, cols, mask, weight_bias, WEIGHT2)
    b = load_row(bias, cols, mask, BIAS)
    given = tl.load(scale).to(tl.float32) if GIVEN else 1.0

    row = first + tl.program_id(0)
    while row < end:
        offset = row.to(tl.int64) * hidden
        lane = row.to(tl.int64) * row_words + vector * 4
        mine = words_to_row(load_words(x_words + lane, active, 4, ASM), DTYPE, VECTORS)
        r = load_row(residual + offset, cols, mask, RESIDUAL)
        arrived = poll_words(own + lane, section, 0, active, state, sequence, WORLD - 1, 4, OPERATOR, RANK, ASM)
        h = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(WORLD):
            if source == RANK:
                h += mine
            else:
                h += words_to_row(section_words(arrived, section_of(source, RANK)), DTYPE, VECTORS)
        if BIAS:
            h += b
        if ALPHA:
            h *= alpha
        if SANDWICH:
            h = rms_normalise(h, hidden, eps) * w
        if RESIDUAL:
            h += r
        store_row(reduced, h, offset, cols, mask, REDUCED)
        y = rms_normalise(h, hidden, eps2 if SANDWICH else eps) * (w2 if SANDWICH else w)
        store_row(norm, y, offset, cols, mask, NORM)
        quantise_row(y, row, 0, hidden, mask, given, q, scales, stride_row, stride_group,
                     SCHEME, GROUP, INVERT, FLOOR, LOW, HIGH, POW2, PACKED, TILE, BLOCK)  # fmt: skip
        row += tl.num_programs(0)
    if SCHEME == NVFP4 and end == tokens:
        zero_padding_rows(scales, tokens, hidden, TILE, BLOCK // 16)
    done(ASM)


def one_shot(channel: Channel, call: NormCall) -> Outputs:
    """Launch `call` on `channel`.  Messages larger than the channel's one-shot slots go in several launches."""
    x = rows_of(call.x)
    tokens, hidden = x.shape
    plan = RowPlan.of(hidden, x.element_size())
    chunk = channel.layout.one_shot_rows(hidden * x.element_size())
    if chunk == 0:
        raise FusionError(
            f"{call.operator}: a row of {hidden * x.element_size()} bytes does not fit one of the workspace's one-shot "
            f"slots ({channel.layout.one_shot} bytes): prepare the group with hidden={hidden}"
        )
    channel.check()
    outputs = call.outputs()
    operands = call.operands(x, outputs)  # memory is found before the first launch: all launches of a call happen, or none
    for first in range(0, tokens or 1, chunk):  # an empty call compiles and loads the kernel
        end = min(tokens, first + chunk)
        arguments: list[Any] = [
            x, *operands, channel.table, channel.state, first, end, tokens,
            hidden * plan.vectors // plan.block, channel.layout.one_shot // 4, channel.layout.one_shot_slot // 4,
            *call.numbers(outputs),
        ]  # fmt: skip
        one_shot_kernel[(channel.blocks(end - first, plan.warps),)](
            *arguments, RANK=channel.rank, WORLD=channel.world, OPERATOR=OPERATORS.index(call.operator),
            VECTORS=plan.vectors, BLOCK=plan.block, ASM=channel.asm, **call.flags(plan.block),
            **channel.options(plan.warps),
        )  # fmt: skip
    if not channel.asm:
        channel.check()
    return outputs


def _run(call: NormCall) -> tuple[Tensor, ...]:
    return call.results(one_shot(channel_of(call.group), call))


__getattr__ = calls.launchers(_run)
