"""`quantize` and `dequantize` over all schemes and layouts: the definition that every kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from .fp8 import E4M3, dequantize_fp8, quantize_fp8
from .layouts import Layout, check_layout, scales_meta
from .nvfp4 import dequantize_nvfp4, quantize_nvfp4
from .scheme import Scheme


def quantize(
    x: Tensor, scale: Tensor | None, scheme: str | Scheme, layout: str | Layout = "row"
) -> tuple[Tensor, Tensor]:
    """Quantise `x` [..., cols] (bf16, fp16 or FP32) -> (q, scales).

    Args:
        scale: the given scale, one element, for fp8_tensor (required) and nvfp4 (None is 1); None for the others.
        scheme: see `Scheme`.  layout: see `Layout`.

    Returns:
        q: e4m3 [..., cols]; for nvfp4 uint8 [..., cols / 2], the even column in the low nibble.
        scales: of the matrix [rows, cols], rows the product of the leading dimensions, with the shape, stride and
        dtype that `scales_meta` gives.  Empty ([0], FP32) for fp8_tensor, never an alias of `scale`.

    Raises:
        ValueError: a scale missing or not wanted, a layout the scheme cannot have, nvfp4 with cols % 16 != 0.
        A group that does not divide cols is no error: the last group is as wide as what is left.
    """
    scheme, layout = checked(scale, scheme, layout)
    q, scales = (quantize_fp8 if scheme.is_fp8 else quantize_nvfp4)(x, scale, scheme, layout)
    return q.contiguous(), scales  # however x lies in memory


def dequantize(
    q: Tensor,
    scales: Tensor,
    scale: Tensor | None,
    scheme: str | Scheme,
    layout: str | Layout = "row",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values that `quantize` wrote as (q, scales), [..., cols], formed in FP32, then cast to `dtype`."""
    scheme, layout = checked(scale, scheme, layout)
    return (dequantize_fp8 if scheme.is_fp8 else dequantize_nvfp4)(q, scales, scale, scheme, layout, dtype)


def quantize_fake(x: Tensor, scheme: str | Scheme, layout: str | Layout = "row") -> tuple[Tensor, Tensor]:
    """Uninitialised (q, scales) as `quantize` would return them for `x`; `x` may be fake and its rows symbolic."""
    scheme, layout = Scheme.parse(scheme), Layout.parse(layout)
    *leading, cols = x.shape
    rows = 1
    for size in leading:
        rows = rows * size
    shape, stride, dtype = scales_meta(rows, cols, scheme, layout)
    scales = x.new_empty_strided(shape, stride, dtype=dtype)
    if scheme.is_fp8:
        return x.new_empty(x.shape, dtype=E4M3), scales
    return x.new_empty((*leading, cols // 2), dtype=torch.uint8), scales


def checked(scale: Tensor | None, scheme: str | Scheme, layout: str | Layout) -> tuple[Scheme, Layout]:
    """The scheme and the layout, parsed.  ValueError as `quantize` raises it."""
    scheme, layout = Scheme.parse(scheme), Layout.parse(layout)
    check_layout(scheme, layout)
    if scheme.is_dynamic and scale is not None:
        raise ValueError(f"scheme {scheme.name!r} computes its scales: pass scale=None")
    if scheme.name == "fp8_tensor" and scale is None:
        raise ValueError("scheme 'fp8_tensor' needs a scale")
    if scheme.div and scale is None:
        raise ValueError("scheme 'nvfp4:div' needs a scale")
    return scheme, layout
