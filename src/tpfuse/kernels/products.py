"""Products, plain and of quantised operands, into memory that the caller names: rows of a result, or of another rank's
buffer.  cuBLAS wherever it has them, else kernels of our own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tpfuse import shim
from tpfuse.formats import Layout

ROWS_STEP = 4  # of the rows that cuBLAS multiplies in blocks of 128: their scales' columns are whole 16-byte vectors


class Weight(NamedTuple):
    """A weight [k, n] with what belongs to its product; see `ir.matmul.scaled_matmul`.  scale: None for a plain product."""

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    result_scale: Tensor | None = None
    alpha: Tensor | None = None


class Quantised(NamedTuple):
    """How both operands are quantised."""

    scheme: str
    layout: str
    weight_layout: str
    fast_accum: bool


def multiply(out: Tensor, x: Tensor, weight: Weight, x_scale: Tensor | None = None, how: Quantised | None = None) -> Tensor:
    """x @ weight into `out` [rows, n], contiguous."""
    if how is None or weight.scale is None or x_scale is None:
        if weight.bias is None:
            return torch.mm(x, weight.values, out=out)
        return torch.addmm(weight.bias, x, weight.values, out=out)
    if not len(x):
        return out
    if how.scheme in ("fp8_tensor", "fp8_token"):
        scales = (_aligned(x_scale), weight.scale)
        return torch.ops.aten._scaled_mm.out(
            x, weight.values, *scales, weight.bias, weight.result_scale, out.dtype, how.fast_accum, out=out
        )
    if how.scheme == "fp8_group128" and _in_blocks(x, weight, how):
        return _blocks_of_128(out, x, weight, x_scale, how)
    from .scaled_product import scaled_product

    return scaled_product(
        out, x, weight.values, x_scale, weight.scale, weight.bias, weight.alpha, how.scheme, how.layout, how.weight_layout
    )


def _aligned(scales: Tensor) -> Tensor:
    """A copy where they begin within a vector, as those of some rows do: cuBLAS refuses them."""
    return scales if scales.data_ptr() % 16 == 0 else scales.clone()


def _in_blocks(x: Tensor, weight: Weight, how: Quantised) -> bool:
    """Whether cuBLAS multiplies it: on sm_90, groups that divide the columns."""
    rows, k = x.shape
    n = weight.values.shape[1]
    sm_90 = torch.cuda.get_device_capability(x.device)[0] == 9
    return sm_90 and rows % ROWS_STEP == 0 and k % 128 == 0 and n % 128 == 0 and weight.alpha is None and weight.bias is None


def _blocks_of_128(out: Tensor, x: Tensor, weight: Weight, x_scale: Tensor, how: Quantised) -> Tensor:
    rows, k = x.shape
    n = weight.values.shape[1]
    assert weight.scale is not None and not Layout.parse(how.layout).ue8m0_packed
    if x_scale.stride() != (1, rows):
        x_scale = x_scale.t().contiguous().t()
    square = weight.scale.shape[1] != n
    scale = _by_columns(weight.scale, k) if square else weight.scale.contiguous().t()
    return shim.multiply_in_blocks(x, weight.values, x_scale, scale, square, how.fast_accum, out)


def _by_columns(scale: Tensor, k: int) -> Tensor:
    """Scales of 128 × 128 blocks, [k / 128, n / 128], as cuBLAS reads them: by columns of a multiple of four.

    Those stored as [n / 128, k / 128] are, for k a multiple of 512.  Others are copied at each call: they may be written to in
    between, and a captured graph must see that.
    """
    column = -(-k // 512) * 4
    if scale.stride() == (1, column) and scale.shape[0] == column:
        return scale
    padded = scale.new_zeros(scale.shape[1], column).t()
    padded[: k // 128] = scale
    return padded


def scaled_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, result_scale: Tensor | None,
    alpha: Tensor | None, scheme: str, layout: str, weight_layout: str, out_dtype: str, fast_accum: bool, origin: str, *,
    alive: tuple[bool, ...],
) -> Tensor:  # fmt: skip
    """The operator, for what no operator of torch multiplies."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], weight.shape[1], dtype=getattr(torch, out_dtype))
    multiply(
        out, rows, Weight(weight, weight_scale, bias, result_scale, alpha), x_scale,
        Quantised(scheme, layout, weight_layout, fast_accum),
    )  # fmt: skip
    return out.view(*x.shape[:-1], weight.shape[1])
