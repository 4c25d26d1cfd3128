"""RMS norm of each head of q and of k, then rotary embedding, in one launch on one GPU.

    n = x / sqrt(mean(x^2) + eps) * (weight + weight_bias)
    (a, b) -> (a cos - b sin, b cos + a sin) for the pairs of n's first `rotary` elements

A block takes a few heads of one token.  The halves of a head that turn together are loaded apart from each other, so that
nothing moves between threads but the sums.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tpfuse.ir.rope import Style, rotary

from .plan import ceil_div
from .rows import load_weight
from .signal import done, wait_for_inputs

BLOCK = 1024  # elements of a block's heads, 16 to a thread
_STRIDES = [f"{x}_{of}" for x in ("q", "k", "q_out", "k_out") for of in ("batch", "token", "head")]
SIZES = ["tokens", "q_heads", "k_heads", *_STRIDES, "cos_batch", "cos_token", "sin_batch", "sin_token"]


@triton.jit
def load_pairs(ptr, rows, live, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second elements of the pairs in rows at `ptr + rows`, FP32 [heads, HALF_BLOCK] each, then zeros."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        both = tl.load(ptr + rows + cols, mask=live & (cols < 2 * HALF), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(both, [rows.shape[0], HALF_BLOCK, 2]))
    else:
        cols = tl.arange(0, HALF_BLOCK)[None, :]
        mask = live & (cols < HALF)
        first = tl.load(ptr + rows + cols, mask=mask, other=0.0).to(tl.float32)
        return first, tl.load(ptr + rows + HALF + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_table(
    ptr, rows, live, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """What the first and what the second elements of pairs are multiplied by."""
    if PAIRS:
        cols = tl.arange(0, HALF_BLOCK)[None, :]
        table = tl.load(ptr + rows + cols, mask=live & (cols < HALF), other=0.0).to(tl.float32)
        return table, table
    else:
        return load_pairs(ptr, rows, live, HALF, HALF_BLOCK, INTERLEAVED)


@triton.jit
def store_pairs(
    ptr, rows, live, first, second, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        both = tl.reshape(tl.join(first, second), [rows.shape[0], 2 * HALF_BLOCK])
        tl.store(ptr + rows + cols, both.to(ptr.dtype.element_ty), mask=live & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, HALF_BLOCK)[None, :]
        mask = live & (cols < HALF)
        tl.store(ptr + rows + cols, first.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + rows + HALF + cols, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def turn_heads(
    x, out, weight, cos, sin, first_head, heads, x_head, out_head, eps, weight_bias,
    WEIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, VECTOR: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """`HEADS` heads of one token; x, out, cos and sin point at it.  Tables and weight are loaded for each head, so that
    they lie in the registers where the heads' elements do."""
    head = first_head + tl.arange(0, HEADS)[:, None]
    live = head < heads
    rows = head.to(tl.int64) * x_head * VECTOR
    same = rows * 0
    a, b = load_pairs(x, rows, live, HALF, HALF_BLOCK, INTERLEAVED)
    squares = tl.sum(a * a + b * b, 1)
    c1, c2 = load_table(cos, same, live, HALF, HALF_BLOCK, INTERLEAVED, PAIRS)
    s1, s2 = load_table(sin, same, live, HALF, HALF_BLOCK, INTERLEAVED, PAIRS)
    if REST_BLOCK > 0:
        cols = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        mask = live & (cols < HEAD_DIM)
        rest = tl.load(x + rows + cols, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1)
    factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    if WEIGHT:
        w1, w2 = load_pairs(weight, same, live, HALF, HALF_BLOCK, INTERLEAVED)
        a *= factor * (w1 + weight_bias)
        b *= factor * (w2 + weight_bias)
    else:
        a *= factor
        b *= factor
    rows = head.to(tl.int64) * out_head * VECTOR
    store_pairs(out, rows, live, a * c1 - b * s1, b * c2 + a * s2, HALF, HALF_BLOCK, INTERLEAVED)
    if REST_BLOCK > 0:
        rest *= factor * load_weight(weight, same + cols, mask, weight_bias, WEIGHT)
        tl.store(out + rows + cols, rest.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def qk_norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, tokens, q_heads, k_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, q_out_batch, q_out_token, q_out_head,
    k_out_batch, k_out_token, k_out_head, cos_batch, cos_token, sin_batch, sin_token, eps, weight_bias,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, VECTOR: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """All strides in units of `VECTOR` elements."""
    batch = (tl.program_id(0) // tokens).to(tl.int64) * VECTOR
    token = (tl.program_id(0) % tokens).to(tl.int64) * VECTOR
    block = tl.program_id(1)
    q_blocks = (q_heads + HEADS - 1) // HEADS
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    wait_for_inputs(ASM)
    if block < q_blocks:
        turn_heads(
            q + batch * q_batch + token * q_token, q_out + batch * q_out_batch + token * q_out_token, q_weight, cos, sin,
            block * HEADS, q_heads, q_head, q_out_head, eps, weight_bias,
            Q_WEIGHT, HEAD_DIM, HALF, HALF_BLOCK, REST_BLOCK, HEADS, VECTOR, INTERLEAVED, PAIRS,
        )  # fmt: skip
    else:
        turn_heads(
            k + batch * k_batch + token * k_token, k_out + batch * k_out_batch + token * k_out_token, k_weight, cos, sin,
            (block - q_blocks) * HEADS, k_heads, k_head, k_out_head, eps, weight_bias,
            K_WEIGHT, HEAD_DIM, HALF, HALF_BLOCK, REST_BLOCK, HEADS, VECTOR, INTERLEAVED, PAIRS,
        )  # fmt: skip
    done(ASM)


def qk_norm_rope(
    q, k, q_weight, k_weight, cos, sin, eps, weight_bias, rounding, style, *, alive
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = Style.parse(style)
    width = q.shape[-1]
    half = cos.shape[-1] // (1 if how.pairs else 2)
    outputs = tuple(out if a else q.new_empty(0) for out, a in zip(rotary.fake(q, k, cos, sin, style), alive, strict=True))
    q_heads, k_heads = (x.shape[-2] if a else 0 for x, a in zip((q, k), alive, strict=True))
    tokens = q.shape[-3]
    rows = math.prod(q.shape[:-2])
    if rows and q_heads + k_heads:
        tables = [t.expand(*q.shape[:-2], t.shape[-1]).unsqueeze(-2) for t in (cos, sin)]
        tensors = [_batched(t) if t.dim() > 1 else t for t in (q, k, *outputs, *tables)]
        strides = [s for t, used in zip(tensors, (3, 3, 3, 3, 2, 2), strict=True) for s in _steps(t, used)]
        vector = math.gcd(8, *strides)
        half_block = triton.next_power_of_2(half)
        heads = max(1, BLOCK // (2 * half_block))
        blocks = ceil_div(q_heads, heads) + ceil_div(k_heads, heads)
        q, k, q_out, k_out, cos, sin = tensors
        arguments: list[Any] = [
            q, k, q if q_weight is None else q_weight.contiguous(), k if k_weight is None else k_weight.contiguous(), cos, sin,
            q_out, k_out, tokens, q_heads, k_heads, *(s // vector for s in strides), eps, weight_bias,
        ]  # fmt: skip
        options: dict[str, Any] = {"num_warps": 2, "launch_pdl": True} if q.is_cuda else {}
        qk_norm_rope_kernel[(rows, blocks)](
            *arguments, Q_WEIGHT=q_weight is not None, K_WEIGHT=k_weight is not None, HEAD_DIM=width, HALF=half,
            HALF_BLOCK=half_block, REST_BLOCK=triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0,
            HEADS=heads, VECTOR=vector, INTERLEAVED=how.base == "interleaved", PAIRS=how.pairs, ASM=q.is_cuda, **options,
        )  # fmt: skip
    return outputs[0], outputs[1]


def _batched(x: Tensor) -> Tensor:
    """[..., tokens, heads, width] -> [batch, tokens, heads, width]; a copy only where a stride makes that necessary."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)


def _steps(x: Tensor, dims: int) -> list[int]:
    """The strides of the first `dims` dimensions; 0 for those that are never stepped along."""
    return [x.stride(i) if x.dim() > 1 and x.shape[i] > 1 else 0 for i in range(dims)]
