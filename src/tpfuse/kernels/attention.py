"""Attention (FlashAttention-2, Dao 2023, arXiv:2307.08691) whose rows are quantised before they are stored, in one launch.

    softmax(q k^T softmax_scale) v, the heads of a token side by side in one row, quantised

A block takes one head of `BLOCK_M` queries and walks over the keys; what it finishes is some columns of as many rows, so a
scale may be of a tensor or of a group within a head, never of a whole row.

To many keys torch's own attention is faster by more than a launch costs: there one kernel quantises its rows.  A table says
from how many on; where nothing was measured `most_keys` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tpfuse.formats import quantize_fake

from .calls import quantised_views, scale_strides, scheme_constants
from .plan import ceil_div
from .signal import done, wait_for_inputs
from .tiles import quantise_tile, zero_padding_tile

# Widths of a head of q and k, and keys up to which one launch was not slower: tune_attention-h200-1.json, attention-h100-1.json.
MOST_KEYS = ((64, 8192), (128, 3072), (256, 2048))
SIZES = ["tokens", "keys", "heads", "repeats", "rows", "stride_row", "stride_group"]


@triton.jit
def attend(
    q, k, v, state, batch, head, first, keys, low, high, qk_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the keys `low` to `high` into (sum of p v, sum of p, maximum), p = 2 ** (q k qk_scale - maximum)."""
    total, weight, largest = state
    for key in tl.range(low, high, BLOCK_N):
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c in tl.static_range(len(q)):
            part = tl.reshape(k.load([batch, head, key, c * CHUNK]), [BLOCK_N, CHUNK])
            scores = tl.dot(q[c], part.T, scores)
        if MASKED:
            cols = key + tl.arange(0, BLOCK_N)[None, :]
            seen = cols < keys
            if CAUSAL:
                seen &= cols <= first + tl.arange(0, BLOCK_M)[:, None]
            scores = tl.where(seen, scores, -float("inf"))
        above = tl.maximum(largest, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - above[:, None])
        shrink = tl.exp2(largest - above)
        weight = weight * shrink + tl.sum(p, 1)
        values = tl.reshape(v.load([batch, head, key, 0]), [BLOCK_N, V_BLOCK])
        total = tl.dot(p.to(values.dtype), values, total * shrink[:, None])
        largest = above
    return total, weight, largest


@triton.jit(do_not_specialize=SIZES)
def attention_kernel(
    q, k, v, scale, out, q_out, scales, tokens, keys, heads, repeats, rows, stride_row, stride_group, qk_scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr, V_BLOCK: tl.constexpr, OUT: tl.constexpr, GIVEN: tl.constexpr, SCHEME: tl.constexpr,
    GROUP: tl.constexpr, INVERT: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    POW2: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """q, k, v: descriptors of [batch, heads, tokens, width].  repeats: q's heads to one of k's.  rows: of all batches."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    # The last queries see the most keys where attention is causal: they begin first.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    wait_for_inputs(ASM)
    queries = ()
    for c in tl.static_range(CHUNKS):
        queries = queries + (tl.reshape(q.load([batch, head, first, c * CHUNK]), [BLOCK_M, CHUNK]),)
    state = (
        tl.zeros([BLOCK_M, V_BLOCK], tl.float32), tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], -float("inf"), tl.float32),
    )  # fmt: skip
    end = tl.minimum(keys, first + BLOCK_M) if CAUSAL else keys
    whole = (tl.minimum(keys, first) if CAUSAL else keys) // BLOCK_N * BLOCK_N
    state = attend(queries, k, v, state, batch, head // repeats, first, keys, 0, whole, qk_scale, False, CAUSAL,
                   BLOCK_M, BLOCK_N, CHUNK, V_BLOCK)  # fmt: skip
    state = attend(queries, k, v, state, batch, head // repeats, first, keys, whole, end, qk_scale, True, CAUSAL,
                   BLOCK_M, BLOCK_N, CHUNK, V_BLOCK)  # fmt: skip
    y = state[0] / state[1][:, None]
    token = first + tl.arange(0, BLOCK_M)
    row = batch * tokens + token
    if OUT:
        cols = tl.arange(0, V_BLOCK)[None, :]
        where = row[:, None].to(tl.int64) * (heads * WIDTH) + head * WIDTH + cols
        tl.store(out + where, y.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (cols < WIDTH))
    given = tl.load(scale).to(tl.float32) if GIVEN else 1.0
    quantise_tile(y, row, token < tokens, head, heads, given, q_out, scales, stride_row, stride_group,
                  SCHEME, GROUP, INVERT, FLOOR, LOW, HIGH, POW2, PACKED, TILE, BLOCK_M, WIDTH, V_BLOCK)  # fmt: skip
    if TILE > 1:
        last = ((batch + 1) * tokens == rows) & (first + BLOCK_M >= tokens)
        zero_padding_tile(scales, rows, last, head, heads, TILE, WIDTH, V_BLOCK)
    done(ASM)


@triton.jit(do_not_specialize=["tokens", "heads", "rows", "stride_row", "stride_group"])
def quantise_heads_kernel(
    x, scale, q_out, scales, tokens, heads, rows, stride_row, stride_group, x_batch, x_head, x_token, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr, V_BLOCK: tl.constexpr, GIVEN: tl.constexpr, SCHEME: tl.constexpr, GROUP: tl.constexpr,
    INVERT: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, POW2: tl.constexpr,
    PACKED: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """x: [batch, heads, tokens, WIDTH] with strides, of a head side by side; the heads of a token go side by side, quantised."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < tokens
    cols = tl.arange(0, V_BLOCK)[None, :]
    wait_for_inputs(ASM)
    start = x + batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
    y = tl.load(start + token[:, None].to(tl.int64) * x_token + cols, mask=live[:, None] & (cols < WIDTH), other=0.0)
    given = tl.load(scale).to(tl.float32) if GIVEN else 1.0
    quantise_tile(y.to(tl.float32), batch * tokens + token, live, head, heads, given, q_out, scales, stride_row, stride_group,
                  SCHEME, GROUP, INVERT, FLOOR, LOW, HIGH, POW2, PACKED, TILE, BLOCK_M, WIDTH, V_BLOCK)  # fmt: skip
    if TILE > 1:
        last = ((batch + 1) * tokens == rows) & ((tl.program_id(1) + 1) * BLOCK_M >= tokens)
        zero_padding_tile(scales, rows, last, head, heads, TILE, WIDTH, V_BLOCK)
    done(ASM)


@dataclass(frozen=True)
class AttentionPlan:
    """Tiles of queries and keys, and how many of the keys' are on their way at once.  Shared memory holds a tile of q and
    `stages` of k and v: at most 208 KiB of the 227 that a block can have on sm_90.

    chunk: columns of a head that are multiplied at a time, a power of two that divides it.
    """

    block_m: int
    block_n: int
    chunk: int
    v_block: int
    warps: int
    stages: int

    @staticmethod
    def of(width: int, v_width: int) -> AttentionPlan:
        v_block = triton.next_power_of_2(v_width)
        if max(width, v_block) <= 64:
            tiles = 128, 128, 4, 3
        elif max(width, v_block) <= 128:
            tiles = 64, 64, 4, 3  # two blocks share a multiprocessor: one multiplies while the other takes maxima
        else:
            tiles = 128, 64, 8, 3 if v_block <= 128 else 2
        block_m, block_n, warps, stages = tiles
        return AttentionPlan(block_m, block_n, width & -width, v_block, warps, stages)


Results = tuple[Tensor, Tensor, Tensor]


def attention_quantize(q, k, *rest, alive) -> Results:
    """By the number of keys, where no table says which is faster."""
    return (sdpa if k.shape[2] > most_keys(k.shape[3]) else flash)(q, k, *rest, alive=alive)


def most_keys(width: int) -> int:
    return next((most for widest, most in MOST_KEYS if width <= widest), MOST_KEYS[-1][1])


def sdpa(q, k, v, mask, scale, softmax_scale, causal, method, scheme, layout, *, alive) -> Results:
    """torch's attention, then one kernel that quantises its rows."""
    batch, heads, tokens, _ = q.shape
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=heads != k.shape[1])
    q_out, scales = quantised_heads(y, scale, scheme, layout)
    return q_out, scales, y.transpose(1, 2).reshape(batch, tokens, heads * v.shape[-1]) if alive[2] else q.new_empty(0)


def flash(
    q, k, v, mask, scale, softmax_scale, causal, method, scheme, layout, *, alive, plan: AttentionPlan | None = None
) -> Results:  # fmt: skip
    """One launch."""
    batch, heads, tokens, width = q.shape
    v_width = v.shape[-1]
    hidden = heads * v_width
    out = q.new_empty((batch, tokens, hidden) if alive[2] else 0)
    q_out, scales = quantize_fake(q.new_empty((), dtype=q.dtype).expand(batch, tokens, hidden), scheme, layout)
    if batch * tokens:
        plan = plan or AttentionPlan.of(width, v_width)
        q_view, scales_view = quantised_views(q_out, scales, scheme)
        arguments: list[Any] = [
            described(q, plan.block_m, plan.chunk), described(k, plan.block_n, plan.chunk),
            described(v, plan.block_n, plan.v_block), q if scale is None else scale.contiguous(), out, q_view, scales_view,
            tokens, k.shape[2], heads, heads // k.shape[1], batch * tokens, *scale_strides(scales), softmax_scale / math.log(2),
        ]  # fmt: skip
        options = {"num_warps": plan.warps, "num_stages": plan.stages, "launch_pdl": True} if q.is_cuda else {}
        attention_kernel[(batch * heads, ceil_div(tokens, plan.block_m))](
            *arguments, CAUSAL=causal, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, CHUNK=plan.chunk,
            CHUNKS=width // plan.chunk, WIDTH=v_width, V_BLOCK=plan.v_block, OUT=alive[2], GIVEN=scale is not None,
            ASM=q.is_cuda, **scheme_constants(scheme, layout, plan.v_block), **options,
        )  # fmt: skip
    return q_out, scales, out


def quantised_heads(y: Tensor, scale: Tensor | None, scheme: str, layout: str) -> tuple[Tensor, Tensor]:
    """y: [batch, heads, tokens, width] → values and scales of [batch, tokens, heads · width], in one launch."""
    y = y if y.stride(-1) == 1 else y.contiguous()
    batch, heads, tokens, width = y.shape
    q_out, scales = quantize_fake(y.new_empty(()).expand(batch, tokens, heads * width), scheme, layout)
    q_view, scales_view = quantised_views(q_out, scales, scheme)
    block, rows = triton.next_power_of_2(width), 64
    if batch * tokens:
        quantise_heads_kernel[(batch * heads, ceil_div(tokens, rows))](
            y, y if scale is None else scale.contiguous(), q_view, scales_view, tokens, heads, batch * tokens,
            *scale_strides(scales), *y.stride()[:3], BLOCK_M=rows, WIDTH=width, V_BLOCK=block, GIVEN=scale is not None,
            ASM=y.is_cuda, **scheme_constants(scheme, layout, block), **({"launch_pdl": True} if y.is_cuda else {}),
        )  # fmt: skip
    return q_out, scales


def described(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """[batch, heads, tokens, width] for loads of tiles, zeros beyond its end; a copy only where the hardware needs one."""
    step = 16 // x.element_size()
    steps = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(s % step for s in steps):
        x = x.contiguous()
    # The stride of a dimension of size 1 says nothing, and need not be a multiple.
    strides = [s if n > 1 else step for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, cols])
