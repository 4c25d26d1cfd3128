"""Products of quantised rows with a quantised weight for which the GPU, or torch, has no instruction or call of its own.

    out = (dequantised x @ dequantised weight) * alpha + bias, summed in FP32

FP8 in groups of 128 or 64 columns: each group's product by the FP8 units, then its scales in FP32.  NVFP4: both operands
are decoded to bf16, which is exact (an e2m1 value times an e4m3 scale has at most six significant bits), and multiplied by the
bf16 units; `alpha` undoes the global scales.  Few rows are decoded in registers, where the weight is read once; with many, each
weight would be decoded for every tile of rows, so both are decoded to memory first and cuBLAS multiplies them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpfuse import shim
from tpfuse.formats import Layout, Scheme

from .calls import scale_strides
from .plan import ceil_div
from .rows import scale_offset

FEW = 64  # rows of NVFP4 that are decoded in registers
TALL = 8  # tiles of rows that follow one another before the next columns: their weights stay in the L2 cache


@triton.jit
def tile_of(rows, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TALL: tl.constexpr):
    """The tile of this block."""
    down, along = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = tl.program_id(0) // (TALL * along)
    tall = tl.minimum(TALL, down - band * TALL)
    inside = tl.program_id(0) % (TALL * along)
    return band * TALL + inside % tall, inside // tall


@triton.jit
def store_tile(out, total, bias, alpha, row, col, rows, n, BIAS: tl.constexpr, ALPHA: tl.constexpr):
    if ALPHA:
        total *= tl.load(alpha).to(tl.float32)
    if BIAS:
        total += tl.load(bias + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    where = row[:, None].to(tl.int64) * n + col[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (col < n)[None, :])


@triton.jit(do_not_specialize=["rows"])
def grouped_kernel(
    x, w, x_scale, w_scale, bias, alpha, out, rows, n, k, x_stride, w_stride, xs_row, xs_group, ws_group, ws_col,
    GROUP: tl.constexpr, SQUARE: tl.constexpr, BIAS: tl.constexpr, ALPHA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [rows, k], w [n, k] by rows.  SQUARE: a scale of w is of GROUP columns of the result too.  WIDE: multiply in FP32."""
    i, j = tile_of(rows, n, BLOCK_M, BLOCK_N, TALL)
    row, col = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, GROUP)
    x_rows, w_rows = x + row[:, None].to(tl.int64) * x_stride, w + col[None, :].to(tl.int64) * w_stride
    x_scales = x_scale + row.to(tl.int64) * xs_row
    w_scales = w_scale + (col // GROUP if SQUARE else col).to(tl.int64) * ws_col
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for g in range(0, tl.cdiv(k, GROUP)):
        at = g * GROUP + step
        a = tl.load(x_rows + at[None, :], mask=(row < rows)[:, None] & (at < k)[None, :], other=0.0)
        b = tl.load(w_rows + at[:, None], mask=(col < n)[None, :] & (at < k)[:, None], other=0.0)
        by_row = tl.load(x_scales + g * xs_group, mask=row < rows, other=0.0)
        by_col = tl.load(w_scales + g * ws_group, mask=col < n, other=0.0)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total += tl.dot(a, b, out_dtype=tl.float32) * by_row[:, None] * by_col[None, :]
    store_tile(out, total, bias, alpha, row, col, rows, n, BIAS, ALPHA)


@triton.jit
def decode(code, scale, WIDE: tl.constexpr):
    """E2M1 codes (the low four bits of int32) times their scales, FP32 → bf16, exact."""
    # Sign, exponent and mantissa where FP32 has them: 2 ** -126 of the value, zero and the subnormal included.
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale
    return value if WIDE else value.to(tl.bfloat16)


@triton.jit(do_not_specialize=["rows"])
def nvfp4_kernel(
    x, w, x_scale, w_scale, bias, alpha, out, rows, n, k, x_stride, w_stride, xs_row, xs_group, ws_group, ws_col,
    X_TILE: tl.constexpr, W_TILE: tl.constexpr, BIAS: tl.constexpr, ALPHA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [rows, k / 2], w [n, k / 2] by rows, int8, the even column in the low half of a byte.  BLOCK_K: bytes at a time.

    Even and odd columns are multiplied apart, so that nothing has to be put in between the others.
    """
    i, j = tile_of(rows, n, BLOCK_M, BLOCK_N, TALL)
    row, col = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    step, groups = tl.arange(0, BLOCK_K), k // 16
    x_rows, w_rows = x + row[:, None].to(tl.int64) * x_stride, w + col[None, :].to(tl.int64) * w_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k // 2, BLOCK_K):
        at = first + step
        x_in, w_in = (row < rows)[:, None] & (at < k // 2)[None, :], (col < n)[None, :] & (at < k // 2)[:, None]
        a = tl.load(x_rows + at[None, :], mask=x_in, other=0).to(tl.int32)
        b = tl.load(w_rows + at[:, None], mask=w_in, other=0).to(tl.int32)
        by_row = scale_offset(row[:, None], (at // 8)[None, :], groups, xs_row, xs_group, X_TILE)
        by_col = scale_offset(col[None, :], (at // 8)[:, None], groups, ws_col, ws_group, W_TILE)
        sa = tl.load(x_scale + by_row, mask=x_in, other=0.0).to(tl.float32)
        sb = tl.load(w_scale + by_col, mask=w_in, other=0.0).to(tl.float32)
        total = tl.dot(decode(a, sa, WIDE), decode(b, sb, WIDE), total)
        total = tl.dot(decode(a >> 4, sa, WIDE), decode(b >> 4, sb, WIDE), total)
    store_tile(out, total, bias, alpha, row, col, rows, n, BIAS, ALPHA)


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    x, scale, out, rows, half, x_stride, s_row, s_group, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x [rows, half] of NVFP4 values in pairs → out [rows, 2 * half], contiguous."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (at < half)[None, :]
    pair = tl.load(x + row[:, None].to(tl.int64) * x_stride + at[None, :], mask=inside, other=0).to(tl.int32)
    where = scale_offset(row[:, None], (at // 8)[None, :], half // 8, s_row, s_group, TILE)
    by = tl.load(scale + where, mask=inside, other=0.0).to(tl.float32)
    values = tl.interleave(decode(pair, by, WIDE), decode(pair >> 4, by, WIDE))
    col = tl.program_id(1) * 2 * BLOCK_K + tl.arange(0, 2 * BLOCK_K)
    to = row[:, None].to(tl.int64) * (2 * half) + col[None, :]
    tl.store(out + to, values, mask=(row < rows)[:, None] & (col < 2 * half)[None, :])


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    total, bias, alpha, out, rows, n, BIAS: tl.constexpr, ALPHA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out = total * alpha + bias, both [rows, n], total in FP32."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (col < n)[None, :]
    values = tl.load(total + row[:, None].to(tl.int64) * n + col[None, :], mask=inside, other=0.0)
    store_tile(out, values, bias, alpha, row, col, rows, n, BIAS, ALPHA)


@dataclass(frozen=True)
class ProductPlan:
    """A block's tile of the result, bytes of a row of x at a time, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @staticmethod
    def of(rows: int, scheme: str) -> ProductPlan:
        if scheme == "nvfp4":
            return ProductPlan(64, 64, 32, 4, 4)
        group = Scheme.parse(scheme).group
        return ProductPlan(64, 64, group, 4, 4) if rows <= 64 else ProductPlan(128, 128, group, 8, 4)


def scaled_product(
    out: Tensor, x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, alpha: Tensor | None,
    scheme: str, layout: str, weight_layout: str,
) -> Tensor:  # fmt: skip
    """Launch the product into `out` [rows, n], contiguous.  Arguments as `ir.matmul.scaled_matmul` has them; x and the
    transposed weight by rows; scheme "fp8_group128", "fp8_group64" or "nvfp4"."""
    rows, n = out.shape
    w, k = weight.t(), x.shape[1]
    if rows == 0:
        return out
    if scheme == "nvfp4" and rows > FEW:
        return _decoded_product(out, x, w, x_scale, weight_scale, bias, alpha, layout, weight_layout)
    plan = ProductPlan.of(rows, scheme)
    flags = {
        "BIAS": bias is not None, "ALPHA": alpha is not None, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "TALL": TALL,
        "WIDE": not x.is_cuda,
    }  # fmt: skip
    options = {"num_warps": plan.warps, "num_stages": plan.stages} if x.is_cuda else {}
    grid = (ceil_div(rows, plan.block_m) * ceil_div(n, plan.block_n),)
    given = (x if bias is None else bias, x if alpha is None else alpha)
    if scheme == "nvfp4":
        nvfp4_kernel[grid](
            x.view(torch.int8), w.view(torch.int8), x_scale, weight_scale, *given, out, rows, n, 2 * k, x.stride(0), w.stride(0),
            *scale_strides(x_scale), weight_scale.stride(1), weight_scale.stride(0), X_TILE=Layout.parse(layout).tile_rows,
            W_TILE=Layout.parse(weight_layout).tile_rows, BLOCK_K=plan.block_k, **flags, **options,
        )  # fmt: skip
    else:
        group = Scheme.parse(scheme).group
        grouped_kernel[grid](
            x, w, x_scale, weight_scale, *given, out, rows, n, k, x.stride(0), w.stride(0), *scale_strides(x_scale),
            *scale_strides(weight_scale), GROUP=group, SQUARE=weight_scale.shape[1] != n, **flags, **options,
        )  # fmt: skip
    return out


def _decoded_product(
    out: Tensor, x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, alpha: Tensor | None, layout: str,
    weight_layout: str,
) -> Tensor:  # fmt: skip
    """x [rows, k / 2], w [n, k / 2]."""
    rows, n = out.shape
    wide = [_decoded(x, x_scale, layout), _decoded(w, w_scale, weight_layout)]
    total = shim.multiply_to_f32(wide[0], wide[1].t())
    block_m, block_n = 4, 512
    grid = (ceil_div(rows, block_m), ceil_div(n, block_n))
    given = (x if bias is None else bias, x if alpha is None else alpha)
    finish_kernel[grid](
        total, *given, out, rows, n, BIAS=bias is not None, ALPHA=alpha is not None, BLOCK_M=block_m, BLOCK_N=block_n
    )
    return out


def _decoded(x: Tensor, scale: Tensor, layout: str) -> Tensor:
    """NVFP4 values [rows, k / 2] → [rows, k] in bf16; in the interpreter in FP32, which has no bf16 product."""
    rows, half = x.shape
    out = x.new_empty(rows, 2 * half, dtype=torch.bfloat16 if x.is_cuda else torch.float32)
    block_m, block_k = 8, 256
    grid = (ceil_div(rows, block_m), ceil_div(half, block_k))
    decode_kernel[grid](
        x.view(torch.int8), scale, out, rows, half, x.stride(0), *scale_strides(scale), TILE=Layout.parse(layout).tile_rows,
        BLOCK_M=block_m, BLOCK_K=block_k, WIDE=not x.is_cuda,
    )  # fmt: skip
    return out
