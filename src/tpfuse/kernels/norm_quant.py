"""RMS norm, add + RMS norm, and activation * up, each with an optional quantise, in one launch on one GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpfuse.formats import quantize_fake

from .calls import NO_QUANTISE, NormCall, call_of, quantised_views, rows_of, scale_strides, scheme_constants
from .plan import RowPlan, ceil_div
from .rows import (
    NVFP4,
    load_row,
    load_weight,
    quantise_row,
    rms_normalise,
    store_nvfp4_scales,
    store_row,
    zero_padding_rows,
)
from .signal import done, wait_for_inputs

SIZES = ["rows", "row_vectors", "stride_row", "stride_group", "gate_stride", "up_stride"]


@triton.jit(do_not_specialize=SIZES)
def norm_kernel(
    x, residual, weight, scale, norm, reduced, q, scales, rows, row_vectors, stride_row, stride_group, eps, weight_bias,
    PER_VECTOR: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, NORM: tl.constexpr,
    REDUCED: tl.constexpr, GIVEN: tl.constexpr, SCHEME: tl.constexpr, GROUP: tl.constexpr, INVERT: tl.constexpr,
    FLOOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, POW2: tl.constexpr, PACKED: tl.constexpr,
    TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """h = x + residual, norm of h, quantised; a block takes a row of `row_vectors` 16-byte vectors."""
    hidden = row_vectors * PER_VECTOR
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    row = tl.program_id(0)
    wait_for_inputs(ASM)
    offset = row.to(tl.int64) * hidden
    h = load_row(x + offset, cols, mask, True)
    if RESIDUAL:
        h += load_row(residual + offset, cols, mask, True)
    w = load_weight(weight, cols, mask, weight_bias, WEIGHT)
    given = tl.load(scale).to(tl.float32) if GIVEN else 1.0
    store_row(reduced, h, offset, cols, mask, REDUCED)
    y = rms_normalise(h, hidden, eps) * w
    store_row(norm, y, offset, cols, mask, NORM)
    quantise_row(y, row, 0, hidden, mask, given, q, scales, stride_row, stride_group,
                 SCHEME, GROUP, INVERT, FLOOR, LOW, HIGH, POW2, PACKED, TILE, BLOCK)  # fmt: skip
    if SCHEME == NVFP4:
        zero_padding_rows(scales, rows, hidden, TILE, BLOCK // 16)
    done(ASM)


@triton.jit
def activate(x, GELU: tl.constexpr):
    """silu, or the tanh approximation of gelu."""
    if GELU:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=SIZES)
def act_kernel(
    gate, up, scale, out, q, scales, rows, row_vectors, gate_stride, up_stride, stride_row, stride_group,
    PER_VECTOR: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, OUT: tl.constexpr, GIVEN: tl.constexpr,
    SCHEME: tl.constexpr, GROUP: tl.constexpr, INVERT: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, POW2: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """act(gate) * up, quantised; a block takes `BLOCK` columns of a row.  Strides between rows in 16-byte vectors."""
    hidden = row_vectors * PER_VECTOR
    base = tl.program_id(1) * BLOCK
    cols = base + tl.arange(0, BLOCK)
    mask = cols < hidden
    row = tl.program_id(0)
    wait_for_inputs(ASM)
    g = load_row(gate + row.to(tl.int64) * gate_stride * PER_VECTOR, cols, mask, True)
    u = load_row(up + row.to(tl.int64) * up_stride * PER_VECTOR, cols, mask, True)
    given = tl.load(scale).to(tl.float32) if GIVEN else 1.0
    y = activate(g, GELU) * u
    store_row(out, y, row.to(tl.int64) * hidden, cols, mask, OUT)
    quantise_row(y, row, base, hidden, mask, given, q, scales, stride_row, stride_group,
                 SCHEME, GROUP, INVERT, FLOOR, LOW, HIGH, POW2, PACKED, TILE, BLOCK)  # fmt: skip
    if SCHEME == NVFP4 and tl.program_id(1) == 0:
        zero_padding_columns(scales, rows, hidden, TILE, BLOCK)
    done(ASM)


@triton.jit
def zero_padding_columns(scales, rows, hidden, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in all columns of the rows that fill the last tile, a block of columns at a time."""
    if TILE > 1:
        zeros = tl.zeros([BLOCK // 16], tl.int8)
        row = rows + tl.program_id(0)
        while row < (rows + TILE - 1) // TILE * TILE:
            base = 0
            while base < hidden:
                store_nvfp4_scales(scales, zeros, row, base // 16, hidden, 0, 0, TILE, BLOCK // 16)
                base += BLOCK
            row += tl.num_programs(0)


def norm_quantise(call: NormCall, plan: RowPlan | None = None) -> tuple[Tensor, ...]:
    """Launch a `NormCall` without a group; (q, scales, norm, h), those not wanted empty."""
    x = rows_of(call.x)
    rows, hidden = x.shape
    plan = plan or RowPlan.of(hidden, x.element_size())
    outputs = call.outputs()
    if rows:
        residual, _, weight, _, scale, norm, reduced, q, scales = call.operands(x, outputs)
        flags = {k: v for k, v in call.flags(plan.block).items() if k not in ("BIAS", "ALPHA", "WEIGHT2", "SANDWICH")}
        per_vector = plan.block // plan.vectors
        norm_kernel[(rows,)](
            x, residual, weight, scale, norm, reduced, q, scales, rows, hidden // per_vector,
            *scale_strides(outputs.scales), call.eps, call.weight_bias, PER_VECTOR=per_vector, BLOCK=plan.block,
            ASM=x.is_cuda, **flags, **_options(plan.warps, x.is_cuda),
        )  # fmt: skip
    return tuple(outputs)


def _options(warps: int, asm: bool) -> dict[str, Any]:
    return {"num_warps": warps, "launch_pdl": True} if asm else {}


def _local(name: str, args: tuple[Any, ...], alive: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return norm_quantise(call_of(NormCall, name, args, alive))


def add_rms_norm(*args: Any, alive: tuple[bool, bool]) -> tuple[Tensor, ...]:
    return _local("add_rms_norm", args, alive)[2:]


def rms_norm_quantize(*args: Any, alive: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    return _local("rms_norm_quantize", args, (*alive, False))[:3]


def add_rms_norm_quantize(*args: Any, alive: tuple[bool, bool, bool, bool]) -> tuple[Tensor, ...]:
    return _local("add_rms_norm_quantize", args, alive)


def act_and_mul_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None, act: str, scheme: str, layout: str, *, alive: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """act(gate) * up, quantised.  gate, up: [..., hidden], possibly the halves of one matrix."""
    quantised = alive[0] or alive[1]
    shape, hidden = gate.shape, gate.shape[-1]
    empty = gate.new_empty(0)
    out = gate.new_empty(shape if alive[2] else 0)
    q, scales = empty, empty
    if quantised:
        q, scales = quantize_fake(gate, scheme, layout)
    gate, up = strided_rows(gate), strided_rows(up)
    rows, per_vector = gate.shape[0], 16 // gate.element_size()
    if rows:
        plan = act_plan(hidden, gate.element_size(), scheme if quantised else "")
        flags = scheme_constants(scheme, layout, plan.block) if quantised else NO_QUANTISE
        kernel_q, kernel_scales = quantised_views(q, scales, scheme)
        act_kernel[(rows, ceil_div(hidden, plan.block))](
            gate, up, gate if scale is None else scale.contiguous(), out, kernel_q, kernel_scales, rows,
            hidden // per_vector, gate.stride(0) // per_vector, up.stride(0) // per_vector, *scale_strides(scales),
            PER_VECTOR=per_vector, BLOCK=plan.block, GELU=act == "gelu_tanh", OUT=alive[2],
            GIVEN=quantised and scale is not None, ASM=gate.is_cuda, **flags, **_options(plan.warps, gate.is_cuda),
        )  # fmt: skip
    return q, scales, out


def act_plan(hidden: int, itemsize: int, scheme: str) -> RowPlan:
    """Blocks of 2048 columns; a whole row where one scale spans it."""
    whole = scheme.partition(":")[0] == "fp8_token"
    return RowPlan.of(hidden if whole else min(hidden, 2048), itemsize)


def strided_rows(x: Tensor) -> Tensor:
    """[..., hidden] -> [rows, hidden] whose rows are 16-byte aligned, a view where `x` allows it."""
    rows = x.reshape(-1, x.shape[-1])
    step = 16 // x.element_size()
    aligned = rows.stride(-1) == 1 and rows.stride(0) % step == 0 and rows.data_ptr() % 16 == 0
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)
