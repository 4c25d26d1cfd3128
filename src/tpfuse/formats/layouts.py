"""Layouts of quantisation scales: where the scale of (row, group) lies in memory.

FP8 scales are FP32 and lie by rows (``row``) or by columns (``col``), with flags joined by ``+``: ``tma`` pads a
column to a multiple of four rows (16 bytes, what TMA loads need), ``ue8m0`` rounds each scale up to a power of two,
``ue8m0_packed`` also stores only its exponent, four groups to one int32, the lowest byte first, zero-padded.
NVFP4 scales are e4m3 and lie ``linear`` (by rows), ``swizzled_128x4`` or ``swizzled_8x4`` (tiles of 128 or 8 rows by
4 groups, as block-scaled tensor cores read them; padded with zeros to whole tiles).

Every function here works on any device, on fake tensors, and with symbolic row counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .flagged import Flagged
from .scheme import Scheme


@dataclass(frozen=True)
class Layout(Flagged):
    """One layout of scales."""

    KIND = "scale layout"
    BASES = ("row", "col", "linear", "swizzled_128x4", "swizzled_8x4")
    tma: bool = False
    ue8m0: bool = False
    ue8m0_packed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ue8m0 and self.ue8m0_packed:
            raise ValueError("ue8m0_packed scales are UE8M0 already: name one of the two flags")
        if self.tma and self.base != "col":
            raise ValueError(f"TMA-aligned scales are column-major; the layout is {self.base!r}")
        if self.base not in ("row", "col") and (self.ue8m0 or self.ue8m0_packed):
            raise ValueError(f"layout {self.base!r} is NVFP4's and takes no flags")

    @property
    def power_of_two(self) -> bool:
        return self.ue8m0 or self.ue8m0_packed

    @property
    def tile_rows(self) -> int:
        """Rows of a swizzled tile; 1 where the layout has none."""
        return {"swizzled_128x4": 128, "swizzled_8x4": 8}.get(self.base, 1)


def default_layout(scheme: str | Scheme) -> str:
    """The plain layout of a scheme: ``row``, or ``linear`` for NVFP4."""
    return "row" if Scheme.parse(scheme).is_fp8 else "linear"


def check_layout(scheme: Scheme, layout: Layout) -> None:
    """ValueError unless scales of `scheme` can lie in `layout`."""
    if scheme.is_fp8 != (layout.base in ("row", "col")):
        raise ValueError(f"scheme {scheme.name!r} cannot have its scales in layout {str(layout)!r}")
    if layout != Layout("row") and scheme.name in ("fp8_tensor", "fp8_token"):
        raise ValueError(f"scheme {scheme.name!r} has only the layout 'row', not {str(layout)!r}")


def round_up(value: Any, multiple: int) -> Any:
    return (value + multiple - 1) // multiple * multiple


def groups_of(cols: int, scheme: Scheme) -> int:
    """Scales per row of `cols` values; ValueError where NVFP4's blocks of 16 do not divide them."""
    if scheme.name == "nvfp4" and cols % 16:
        raise ValueError(f"nvfp4 needs a multiple of 16 columns, not {cols}")
    return (cols + scheme.group - 1) // scheme.group if scheme.group else 1


def scales_meta(
    rows: Any, cols: int, scheme: str | Scheme, layout: str | Layout
) -> tuple[tuple[Any, ...], tuple[Any, ...], torch.dtype]:
    """Shape, stride and dtype of the scales of a [rows, cols] matrix; `rows` may be symbolic.

    A given FP8 scale is no output: fp8_tensor has empty scales, shape [0].
    """
    scheme, layout = Scheme.parse(scheme), Layout.parse(layout)
    check_layout(scheme, layout)
    if scheme.name == "fp8_tensor":
        return (0,), (1,), torch.float32
    groups = groups_of(cols, scheme)
    if not scheme.is_fp8:
        if layout.base == "linear":
            return (rows, groups), (groups, 1), torch.float8_e4m3fn
        padded = round_up(groups, 4)
        return (round_up(rows, layout.tile_rows), padded), (padded, 1), torch.float8_e4m3fn
    dtype = torch.float32
    if layout.ue8m0_packed:
        groups, dtype = (groups + 3) // 4, torch.int32
    if layout.base == "row":
        return (rows, groups), (groups, 1), dtype
    return (rows, groups), (1, round_up(rows, 4) if layout.tma else rows), dtype


def apply_layout(scales: Tensor, layout: str | Layout) -> Tensor:
    """Scales [rows, groups] by rows (FP32, or e4m3 for NVFP4) -> the same in `layout`.

    UE8M0 layouts expect powers of two (see `fp8.round_to_ue8m0`).  The result never aliases the input unless the
    layout is the one the scales have.
    """
    layout = Layout.parse(layout)
    if layout.tile_rows > 1:
        return swizzle(scales, layout)
    if layout.ue8m0_packed:
        scales = pack_ue8m0(scales)
    if layout.base == "col":
        columns = scales.t().clone(memory_format=torch.contiguous_format)
        if not layout.tma:
            return columns.t()
        rows, groups = scales.shape
        padded = round_up(rows, 4)
        # Not a slice of it: that makes a guard on whether there is padding.
        return _pad(columns, groups, padded).as_strided((rows, groups), (1, padded))
    return scales


def remove_layout(scales: Tensor, rows: Any, groups: int, layout: str | Layout) -> Tensor:
    """The inverse of `apply_layout`: scales in `layout` -> [rows, groups] by rows, contiguous."""
    layout = Layout.parse(layout)
    if layout.tile_rows > 1:
        return unswizzle(scales, rows, groups, layout)
    if layout.base == "col":
        # Not contiguous(): one column counts as contiguous whatever its stride, and a byte view needs stride 1.
        scales = scales.clone(memory_format=torch.contiguous_format)
    return unpack_ue8m0(scales, groups) if layout.ue8m0_packed else scales


def swizzle(scales: Tensor, layout: str | Layout) -> Tensor:
    """Scales [rows, groups] of one-byte elements -> tiles of (128 or 8) x 4, zero-padded, as a 2-D matrix.

    The scale of (m, k) lies at ``(m//128)*tiles*512 + (k//4)*512 + (m%32)*16 + ((m%128)//32)*4 + k%4`` (128x4) or
    ``(m//8)*tiles*32 + (k//4)*32 + (m%8)*4 + k%4`` (8x4), with tiles = ceil(groups / 4).
    """
    tile = Layout.parse(layout).tile_rows
    rows, groups = scales.shape
    out_rows, out_cols = round_up(rows, tile), round_up(groups, 4)
    # By index, not by permuted views: those make guards on how many tiles a symbolic row count has.
    offset = torch.arange(out_rows * out_cols, device=scales.device)
    block, inner = offset // (tile * 4), offset % (tile * 4)
    inner_row = inner % 16 // 4 * 32 + inner // 16 if tile == 128 else inner // 4
    m, k = block // (out_cols // 4) * tile + inner_row, block % (out_cols // 4) * 4 + inner % 4
    inside = (m < rows) & (k < groups)
    picked = scales.view(torch.uint8).reshape(-1)[(m * groups + k).masked_fill(~inside, 0)]
    return picked.masked_fill(~inside, 0).view(out_rows, out_cols).view(scales.dtype)


def unswizzle(scales: Tensor, rows: Any, groups: int, layout: str | Layout) -> Tensor:
    """The inverse of `swizzle`, the padding cut off: [rows, groups], contiguous."""
    tile, tiles = Layout.parse(layout).tile_rows, round_up(groups, 4) // 4
    m = torch.arange(rows, device=scales.device).unsqueeze(1)
    k = torch.arange(groups, device=scales.device)
    inner_row = m % 32 * 16 + m % 128 // 32 * 4 if tile == 128 else m % 8 * 4
    offset = (m // tile * tiles + k // 4) * (tile * 4) + inner_row + k % 4
    return scales.view(torch.uint8).reshape(-1)[offset].view(scales.dtype)


def pack_ue8m0(scales: Tensor) -> Tensor:
    """Powers of two, FP32 [rows, groups] -> their exponent bytes, int32 [rows, ceil(groups / 4)].

    Byte j of word p is group 4p+j.  NaN and infinity become 255, which E8M0 reads as NaN.
    """
    rows, groups = scales.shape
    bits = scales.view(torch.int32)
    # 2**-127, the smallest E8M0 number, is subnormal in FP32: its exponent field is 0 already.
    codes = ((bits >> 23) & 0xFF).to(torch.uint8)
    return _pad(codes, rows, round_up(groups, 4)).view(torch.int32)


def unpack_ue8m0(packed: Tensor, groups: int) -> Tensor:
    """The inverse of `pack_ue8m0`: int32 [rows, words] -> FP32 powers of two [rows, groups]."""
    codes = packed.view(torch.uint8)[:, :groups].to(torch.int32)
    return ue8m0_value(codes)


def ue8m0_value(codes: Tensor) -> Tensor:
    """Exponent codes 0..255 (int32) -> 2**(code - 127) in FP32; 255 -> NaN."""
    bits = (codes << 23).masked_fill(codes == 0, 1 << 22).masked_fill(codes == 255, 0x7FC00000)
    return bits.view(torch.float32)


def _pad(matrix: Tensor, rows: Any, cols: Any) -> Tensor:
    """`matrix` in the upper left corner of a [rows, cols] matrix of zeros."""
    # Not constant_pad_nd: it specialises a symbolic size on whether the padding is empty.
    wide = matrix.new_zeros((matrix.shape[0], cols)).slice_scatter(matrix, 1, 0, matrix.shape[1])
    return matrix.new_zeros((rows, cols)).slice_scatter(wide, 0, 0, matrix.shape[0])
