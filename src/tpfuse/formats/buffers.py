"""Buffers that an engine hands to an operator for quantised rows: which scheme they ask for, and filling them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .codec import quantize
from .fp8 import E4M3
from .layouts import Layout, round_up
from .scheme import Scheme

_GROUPS = (128, 64)


def scheme_of(output: Tensor, scale: Tensor | None, block_scale: Tensor | None, cols: int) -> tuple[str, str] | None:
    """The (scheme, layout) that buffers ask for, told by dtype and shapes; None where the rows stay as they are.

    Args:
        output: for rows of `cols` values: e4m3 [rows, cols] or, two codes a byte, uint8 [rows, cols / 2].
        scale: the given scale, one element.  block_scale: the buffer for scales of groups, FP32 or int32 (packed UE8M0)
            for FP8, e4m3 or its bytes for NVFP4.

    What shapes cannot tell: NVFP4 scales that may lie in tiles of 128 rows do, and are never in tiles of 8; packed FP8
    scales of few groups are of 128; FP32 scales are not said to be powers of two.

    Raises:
        ValueError: a group size other than 128 and 64 (FP8), a scale too many or missing, shapes that fit no scheme.
    """
    if scale is None and block_scale is None:
        return None
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"a given scale is one number, not {list(scale.shape)}")
    if output.dtype == torch.uint8:
        if scale is None or block_scale is None:
            raise ValueError("NVFP4 output needs both its global scale and a buffer for block scales")
        return "nvfp4", _nvfp4_layout(output, block_scale, cols)
    if output.dtype != E4M3:
        raise ValueError(f"quantised rows are float8_e4m3fn or, for NVFP4, uint8; the output is {output.dtype}")
    if block_scale is None:
        return "fp8_tensor", "row"
    if scale is not None:
        raise ValueError("FP8 in groups computes its scales: it takes no given scale")
    packed = block_scale.dtype == torch.int32
    columns = block_scale.shape[-1]
    groups = [g for g in _GROUPS if cols % g == 0 and columns == ((cols // g + 3) // 4 if packed else cols // g)]
    if not groups:
        have = f"{cols} values in {columns}{' words of four' if packed else ''} groups a row"
        raise ValueError(f"unsupported group size: {have}; groups of 128 and 64 are known")
    return f"fp8_group{groups[0]}", _fp8_layout(block_scale, packed)


def _fp8_layout(scales: Tensor, packed: bool) -> str:
    flags = "+ue8m0_packed" if packed else ""
    rows, (along_rows, along_cols) = scales.shape[0], scales.stride()
    if scales.shape[-1] == 1 or along_cols == 1:
        return "row" + flags
    if along_rows != 1:
        raise ValueError(f"scales lie neither by rows nor by columns: strides {tuple(scales.stride())}")
    return ("col" if statically_known_true(along_cols == rows) else "col+tma") + flags


def _nvfp4_layout(output: Tensor, scales: Tensor, cols: int) -> str:
    if cols % 16 or output.shape[-1] * 2 != cols:
        raise ValueError(f"NVFP4 packs {cols} values, a multiple of 16, into half as many bytes, not {output.shape[-1]}")
    rows, groups = output.shape[0], cols // 16
    held = (scales.shape[0], scales.shape[-1] * scales.dtype.itemsize)  # an engine may view four scales as one int32
    for layout in ("swizzled_128x4", "linear"):
        tile = Layout.parse(layout).tile_rows
        shape = (rows, groups) if tile == 1 else (round_up(rows, tile), round_up(groups, 4))
        if all(statically_known_true(a == b) for a, b in zip(held, shape, strict=True)):
            return layout
    raise ValueError(f"unsupported block scales: shape {list(scales.shape)} for {rows} rows of {groups} blocks of 16")


def cut_rows(scales: Tensor, rows: Any, layout: str) -> Tensor:
    """The part of a buffer of scales, made for more rows, that holds those of the first `rows` rows.  A view."""
    return scales[: round_up(rows, Layout.parse(layout).tile_rows)]


def quantize_into(
    x: Tensor, output: Tensor, scale: Tensor | None, block_scale: Tensor | None, rows: int, power_of_two: bool = False
) -> None:
    """Write the first `rows` rows of x into `output`, quantised as the buffers ask for, their scales into `block_scale`.

    x, output: rows may be more, as in a batch padded for a CUDA graph; nothing is written for those beyond `rows`, but to
    the end of a swizzled tile, whose padding is zeros.  power_of_two: FP32 scales of groups are rounded up to UE8M0, which
    shapes cannot tell.  For what raises, see `scheme_of`.
    """
    found = scheme_of(output, scale, block_scale, x.shape[-1])
    if found is None:
        output[:rows].copy_(x[:rows])
        return
    name, layout = found
    if power_of_two and Scheme.parse(name).group and "+ue8m0_packed" not in layout:
        layout += "+ue8m0"
    q, scales = quantize(x[:rows], scale, name, layout)
    output[:rows].copy_(q)
    if block_scale is not None:
        part = cut_rows(block_scale, rows, layout)
        part.view(torch.uint8).copy_(scales.view(torch.uint8)) if name == "nvfp4" else part.copy_(scales)
