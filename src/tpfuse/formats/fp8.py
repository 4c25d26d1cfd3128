"""FP8 e4m3fn codecs: per tensor with a given scale; per token and per group with a scale from the row.

Saturating: values beyond 448, infinities too, become +-448; NaN stays NaN.  A row (or group) that holds NaN has a NaN
scale and is NaN throughout; one that holds an infinity has an infinite scale, its finite values become 0 and the
infinity NaN.  An all-zero row has the scale `eps` and quantises to 0 (to NaN where the scheme says eps=0: 0 / 0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layouts import Layout, apply_layout, groups_of, remove_layout, ue8m0_value
from .scheme import FP8_MAX, Scheme

E4M3 = torch.float8_e4m3fn


def quantize_fp8(x: Tensor, scale: Tensor | None, scheme: Scheme, layout: Layout) -> tuple[Tensor, Tensor]:
    """`x` [..., cols] -> e4m3 of the same shape, scales as `scales_meta` says."""
    if not scheme.is_dynamic:
        assert scale is not None
        factor = scale.reshape(())
        return _convert(_scaled(x, factor, scheme), scheme), x.new_empty((0,), dtype=torch.float32)
    cols = x.shape[-1]
    groups = groups_of(cols, scheme)
    rows = x.reshape(-1, cols)
    # [rows, groups, group]; a scale a row needs no third dimension, whose removal gives the scales a stride of 0 in Inductor.
    blocks = _blocks(rows, groups, scheme.group) if scheme.group else rows
    amax = blocks.abs().amax(-1, keepdim=True)
    if scheme.bf16_amax or scheme.fp16_amax:
        amax = amax.to(torch.bfloat16 if scheme.bf16_amax else torch.float16)
    if not scheme.low_scale:
        amax = amax.float()
    if scheme.amax_min is not None or scheme.amax_max is not None:
        amax = amax.clamp(scheme.amax_min, scheme.amax_max)
    scales = amax / FP8_MAX
    if scheme.floor:
        scales = scales.clamp(min=scheme.floor)
    scales = scales.float()
    if layout.power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales))) if scheme.log2 else round_to_ue8m0(scales)
    values = blocks.float() * (FP8_MAX / amax.float()) if scheme.inverse else _scaled(blocks, scales, scheme)
    q = _convert(values, scheme).reshape(-1, groups * (scheme.group or cols))
    if q.shape[1] != cols:
        q = q[:, :cols].contiguous()
    return q.reshape(x.shape), apply_layout(scales.squeeze(-1) if scheme.group else scales, layout)


def dequantize_fp8(
    q: Tensor, scales: Tensor, scale: Tensor | None, scheme: Scheme, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """The values that e4m3 `q` [..., cols] stands for, formed in FP32, then cast to `dtype`."""
    if not scheme.is_dynamic:
        assert scale is not None
        factor = scale.reshape(()).float()
        return (q.float() / factor if scheme.mul else q.float() * factor).to(dtype)
    cols = q.shape[-1]
    groups, group = groups_of(cols, scheme), scheme.group or cols
    rows = q.reshape(-1, cols)
    factors = remove_layout(scales, rows.shape[0], groups, layout).unsqueeze(-1)
    values = _blocks(rows.float(), groups, group) * factors
    return values.reshape(-1, groups * group)[:, :cols].reshape(q.shape).to(dtype)


def round_to_ue8m0(scales: Tensor) -> Tensor:
    """FP32 scales -> the smallest power of two that is not less, by their bits; NaN and infinity stay.

    0 becomes 2**-127, the smallest number that E8M0 can write.
    """
    bits = scales.view(torch.int32)
    codes = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return torch.where(scales.isfinite(), ue8m0_value(codes), scales)


def _scaled(x: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    if scheme.low_value:
        # A scale without dimensions takes no part in type promotion: the product has the input's dtype.
        scale = scale if scale.dim() == 0 else scale.to(x.dtype)
    else:
        x, scale = x.float(), scale.float()
    if scheme.reciprocal:
        return x * scale.reciprocal()
    return x * scale if scheme.mul else x / scale


def _convert(values: Tensor, scheme: Scheme) -> Tensor:
    return (values if scheme.unclamped else values.clamp(-FP8_MAX, FP8_MAX)).to(E4M3)


def _blocks(rows: Tensor, groups: Any, group: int) -> Tensor:
    """[rows, cols] -> [rows, groups, group]; a partial last group is filled with zeros, which leave its amax alone."""
    missing = groups * group - rows.shape[1]
    if missing:  # aten's pad takes no symbolic number of rows from a traced body
        rows = torch.cat([rows, rows.new_zeros([rows.shape[0], missing])], 1)
    return rows.reshape(-1, groups, group)
