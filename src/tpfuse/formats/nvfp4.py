"""NVFP4 codec: E2M1 values, two to a byte, an e4m3 scale per block of 16, one FP32 scale for the whole.

E2M1 codes 0..7 are 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign; a byte holds the even column in its low nibble.
Ties go to the even code.  Values beyond 6 saturate.  E2M1 has no NaN: it becomes code 7, and the block's scale is NaN.
A block whose scale is 0 has all values 0, their signs kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import Layout, apply_layout, groups_of, remove_layout
from .scheme import FP4_MAX, FP8_MAX, Scheme

BLOCK = 16


def quantize_nvfp4(x: Tensor, scale: Tensor | None, scheme: Scheme, layout: Layout) -> tuple[Tensor, Tensor]:
    """`x` [..., cols] -> packed uint8 [..., cols / 2], e4m3 scales as `scales_meta` says.  cols % 16 == 0."""
    cols = x.shape[-1]
    groups = groups_of(cols, scheme)
    blocks = x.reshape(-1, cols).float().reshape(-1, groups, BLOCK)
    per_block = blocks.abs().amax(-1, keepdim=True) / FP4_MAX
    given = x.new_ones((), dtype=torch.float32) if scale is None else scale.reshape(()).float()
    if scale is not None:
        per_block = per_block / given if scheme.div else per_block * given
    scales = per_block.clamp(scheme.floor, FP8_MAX).to(torch.float8_e4m3fn)
    widened = scales.float()
    factor = (given.reciprocal() if scheme.div else given) / widened
    codes = encode_e2m1(blocks * factor.masked_fill(widened == 0, 0.0))
    return pack(codes.reshape(*x.shape[:-1], cols)), apply_layout(scales.squeeze(-1), layout)


def dequantize_nvfp4(
    q: Tensor, scales: Tensor, scale: Tensor | None, scheme: Scheme, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """The values that packed `q` [..., cols / 2] stands for, [..., cols], formed in FP32, then cast to `dtype`."""
    values = decode_e2m1(unpack(q))
    cols = values.shape[-1]
    groups = groups_of(cols, scheme)
    blocks = values.reshape(-1, groups, BLOCK)
    factors = remove_layout(scales, blocks.shape[0], groups, layout).float().unsqueeze(-1)
    if scale is not None:
        given = scale.reshape(()).float()
        factors = factors * given if scheme.div else factors / given
    return (blocks * factors).reshape(values.shape).to(dtype)


def encode_e2m1(values: Tensor) -> Tensor:
    """FP32 -> the nearest E2M1 code (uint8, 0..15), ties to the even code, saturating; NaN -> 7 or 15."""
    size = values.abs()
    # Counting the thresholds that are *not* reached makes NaN, which reaches none, the largest code.
    below = (
        (size <= 0.25).to(torch.uint8)
        + (size < 0.75).to(torch.uint8)
        + (size <= 1.25).to(torch.uint8)
        + (size < 1.75).to(torch.uint8)
        + (size <= 2.5).to(torch.uint8)
        + (size < 3.5).to(torch.uint8)
        + (size <= 5.0).to(torch.uint8)
    )
    return (7 - below) | (torch.signbit(values).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """E2M1 codes (uint8, 0..15) -> FP32."""
    size = (codes & 7).to(torch.int32)
    exponent, mantissa = size >> 1, (size & 1).float()
    value = torch.where(exponent == 0, mantissa * 0.5, (1.0 + 0.5 * mantissa) * (1 << exponent) * 0.5)
    return torch.where(codes > 7, -value, value)


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [..., cols] -> bytes [..., cols / 2], the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes [..., cols / 2] -> codes 0..15, uint8 [..., cols]."""
    return torch.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)
