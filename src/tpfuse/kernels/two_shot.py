"""Two-shot all-reduce + (bias, alpha, residual) + RMS norm (+ second norm) (+ quantise), in one launch.

Rows are dealt out to the ranks in equal shares.  Every rank pushes each row to its owner; the owner sums in FP32 and in
rank order, adds the residual, rounds h to the model's dtype once and pushes it to all; every rank takes the norm of the
same h.  Each link carries 2 (N - 1) / N of the message instead of the one-shot's N - 1: for many tokens.
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
from .plan import RowPlan, ceil_div
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
from .vectors import row_to_words, words_to_row
from .workspace import channel_of

PROTOCOL = tl.constexpr(1)
SIZES = [
    "first", "end", "tokens", "share", "row_vectors", "base", "inbox", "outbox", "slot_words", "stride_row",
    "stride_group",
]  # fmt: skip


@triton.jit
def sum_of_ranks(mine, arrived, DTYPE: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, VECTORS: tl.constexpr):
    """FP32 sum in rank order of this rank's row and the peers' words."""
    total = tl.zeros_like(mine)
    for source in tl.static_range(WORLD):
        if source == RANK:
            total += mine
        else:
            total += words_to_row(section_words(arrived, section_of(source, RANK)), DTYPE, VECTORS)
    return total


@triton.jit(do_not_specialize=SIZES)
def two_shot_kernel(
    x, residual, bias, weight, weight2, scale, norm, reduced, q, scales, table, state,
    first, end, tokens, share, row_vectors, base, inbox, outbox, slot_words, stride_row, stride_group,
    alpha, eps, eps2, weight_bias,
    RANK: tl.constexpr, WORLD: tl.constexpr, OPERATOR: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT2: tl.constexpr, SANDWICH: tl.constexpr,
    ALPHA: tl.constexpr, NORM: tl.constexpr, REDUCED: tl.constexpr, GIVEN: tl.constexpr, SCHEME: tl.constexpr,
    GROUP: tl.constexpr, INVERT: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    POW2: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `end` of `tokens`; rank r owns the `share` rows from `first + r * share` on.

    base, inbox, outbox, slot_words: where the two-shot's slots begin, the size of an inbox section, where the outbox
    begins within a slot, and the size of a slot, in int32 words.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    hidden = row_vectors * (BLOCK // VECTORS)
    vector = tl.arange(0, VECTORS)
    active = vector < row_vectors
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    row_words = row_vectors * 4
    buffers = ()
    for peer in tl.static_range(WORLD):
        buffers = buffers + (tl.load(table + peer).to(tl.pointer_type(tl.int32)) + base,)

    wait_for_inputs(ASM)
    slot, sequence = read_state(state, PROTOCOL, ASM)
    current = slot.to(tl.int64) * slot_words
    x_words = x.to(tl.pointer_type(tl.int32))

    # Others' rows to their owners, the next rank's first, so that no two ranks begin with the same link.
    for step in tl.static_range(1, WORLD):
        inboxes = buffers[(RANK + step) % WORLD] + current
        inboxes += section_of(RANK, (RANK + step) % WORLD) * inbox.to(tl.int64)
        begin = first + (RANK + step) % WORLD * share
        row = begin + tl.program_id(0)
        while row < min(begin + share, end):
            words = load_words(x_words + row.to(tl.int64) * row_words + vector * 4, active, 4, ASM)
            push_words(inboxes + (row - begin).to(tl.int64) * row_words + vector * 4, words, active, 4, ASM)
            row += tl.num_programs(0)

    if end > first:  # an empty call brings no ranks together: it must not take a turn
        arrive(state, slot, sequence, PROTOCOL, ASM)

    w = load_weight(weight, cols, mask, weight_bias, WEIGHT)
    b = load_row(bias, cols, mask, BIAS)
    own = buffers[RANK] + current

    # Own rows: reduce, and h to all.
    begin = first + RANK * share
    row = begin + tl.program_id(0)
    while row < min(begin + share, end):
        lane = row.to(tl.int64) * row_words + vector * 4
        mine = words_to_row(load_words(x_words + lane, active, 4, ASM), DTYPE, VECTORS)
        r = load_row(residual + row.to(tl.int64) * hidden, cols, mask, RESIDUAL)
        there = own + (row - begin).to(tl.int64) * row_words + vector * 4
        arrived = poll_words(there, inbox, 0, active, state, sequence, WORLD - 1, 4, OPERATOR, RANK, ASM)
        h = sum_of_ranks(mine, arrived, DTYPE, RANK, WORLD, VECTORS)
        if BIAS:
            h += b
        if ALPHA:
            h *= alpha
        if SANDWICH:
            h = rms_normalise(h, hidden, eps) * w
        if RESIDUAL:
            h += r
        words = row_to_words(h.to(DTYPE), DTYPE, VECTORS)
        lane = (row - first).to(tl.int64) * row_words + vector * 4
        for step in tl.static_range(1, WORLD):
            push_words(buffers[(RANK + step) % WORLD] + current + outbox + lane, words, active, 4, ASM)
        # To itself too: the last phase then reads every row in one way.
        push_words(own + outbox + lane, words, active, 4, ASM)
        row += tl.num_programs(0)

    # All rows, the own ones first: they are there already.
    w2 = load_weight(weight2, cols, mask, weight_bias, WEIGHT2)
    given = tl.load(scale).to(tl.float32) if GIVEN else 1.0
    count = end - first
    index = tl.program_id(0)
    while index < count:
        row = first + (index + RANK * share) % count
        offset = row.to(tl.int64) * hidden
        there = own + outbox + (row - first).to(tl.int64) * row_words + vector * 4
        owner = (row - first) // share
        origin = owner - (owner > RANK).to(tl.int32)
        arrived = poll_words(there, inbox, origin, active, state, sequence, 1, 4, OPERATOR, RANK, ASM)
        # A load that never happens: without one, Triton's layout pass takes the row through shared memory.
        never = load_row(x, cols, mask & (row < first), True)
        h = words_to_row(arrived, DTYPE, VECTORS) + never
        store_row(reduced, h, offset, cols, mask, REDUCED)
        y = rms_normalise(h, hidden, eps2 if SANDWICH else eps) * (w2 if SANDWICH else w)
        store_row(norm, y, offset, cols, mask, NORM)
        quantise_row(y, row, 0, hidden, mask, given, q, scales, stride_row, stride_group,
                     SCHEME, GROUP, INVERT, FLOOR, LOW, HIGH, POW2, PACKED, TILE, BLOCK)  # fmt: skip
        index += tl.num_programs(0)
    if SCHEME == NVFP4 and end == tokens:
        zero_padding_rows(scales, tokens, hidden, TILE, BLOCK // 16)
    done(ASM)


def two_shot(channel: Channel, call: NormCall) -> Outputs:
    """Launch `call` on `channel`.  Messages larger than the channel's two-shot slots go in several launches."""
    x = rows_of(call.x)
    tokens, hidden = x.shape
    row_bytes = hidden * x.element_size()
    plan, layout = RowPlan.of(hidden, x.element_size()), channel.layout
    chunk = layout.two_shot_rows(row_bytes)
    if chunk == 0:
        raise FusionError(
            f"{call.operator}: a row of {row_bytes} bytes does not fit the workspace's two-shot slots "
            f"({layout.inbox} bytes a rank): prepare the group with hidden={hidden}"
        )
    channel.check()
    outputs = call.outputs()
    operands = call.operands(x, outputs)  # memory is found before the first launch: all launches of a call happen, or none
    for first in range(0, tokens or 1, chunk):  # an empty call compiles and loads the kernel
        end = min(tokens, first + chunk)
        arguments: list[Any] = [
            x, *operands, channel.table, channel.state, first, end, tokens,
            ceil_div(end - first, channel.world), hidden * plan.vectors // plan.block, layout.two_shot_offset // 4,
            layout.inbox // 4, layout.outbox_offset // 4, layout.two_shot_slot // 4, *call.numbers(outputs),
        ]  # fmt: skip
        two_shot_kernel[(channel.blocks(end - first, plan.warps, waiting=True),)](
            *arguments, RANK=channel.rank, WORLD=channel.world, OPERATOR=OPERATORS.index(call.operator),
            VECTORS=plan.vectors, BLOCK=plan.block, ASM=channel.asm, **call.flags(plan.block),
            **channel.options(plan.warps),
        )  # fmt: skip
    if not channel.asm:
        channel.check()
    return outputs


def _run(call: NormCall) -> tuple[Tensor, ...]:
    return call.results(two_shot(channel_of(call.group), call))


__getattr__ = calls.launchers(_run)
