"""What a block does with a tile of several rows in registers: quantise and store it.  For single rows see rows.py.

A tile is FP32 [ROWS, BLOCK]: `WIDTH` columns of one head, then columns that are zeros and never stored.  It lies at column
`head * WIDTH` of rows of `heads` heads.  A scale is of a tensor or of a group that lies within a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import DYNAMIC, FP8_MAX, NVFP4, TENSOR, clamp, encode_e2m1, fp8_scales, nvfp4_scales, pack_nibbles, scale_offset


@triton.jit
def quantise_tile(
    y, row, live, head, heads, given, q_ptr, scales_ptr, stride_row, stride_group,
    SCHEME: tl.constexpr, GROUP: tl.constexpr, INVERT: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, POW2: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise `y` and store values and scales (see `rows.quantise_row`).  row, live [ROWS]: which rows, and whether they are."""
    if SCHEME == TENSOR:
        store_fp8(q_ptr, y * given if INVERT else y / given, row, live, head, heads, WIDTH, BLOCK)
    elif SCHEME == DYNAMIC:
        GROUPS: tl.constexpr = BLOCK // GROUP
        blocks = tl.reshape(y, [ROWS * GROUPS, GROUP])
        scales = fp8_scales(blocks, FLOOR, LOW, HIGH, POW2)
        store_fp8(q_ptr, tl.reshape(blocks / scales[:, None], [ROWS, BLOCK]), row, live, head, heads, WIDTH, BLOCK)
        scales = tl.reshape(scales, [ROWS, GROUPS])
        if PACKED:
            # Four heads may share a word: each stores its own bytes, and the last one the zeros that fill the row's last word.
            codes = ((scales.to(tl.int32, bitcast=True) >> 23) & 255).to(tl.int8)
            where, inside = scale_columns(row, live, head, heads, stride_row, stride_group, 1, WIDTH // GROUP, GROUPS, True)
            tl.store(scales_ptr.to(tl.pointer_type(tl.int8)) + where, codes, mask=inside)
            where, inside = padding_columns(row, live, head, heads, stride_row, stride_group, 1, WIDTH // GROUP, True)
            tl.store(scales_ptr.to(tl.pointer_type(tl.int8)) + where, tl.zeros([ROWS, 4], tl.int8), mask=inside)
        else:
            where, inside = scale_columns(row, live, head, heads, stride_row, stride_group, 1, WIDTH // GROUP, GROUPS, False)
            tl.store(scales_ptr + where, scales, mask=inside)
    elif SCHEME == NVFP4:
        GROUPS: tl.constexpr = BLOCK // 16
        blocks = tl.reshape(y, [ROWS * GROUPS, 16])
        scales, factor = nvfp4_scales(blocks, given, FLOOR, INVERT)
        codes = tl.reshape(encode_e2m1(blocks * factor[:, None]), [ROWS * BLOCK])
        pairs = tl.reshape(pack_nibbles(codes, ROWS * BLOCK), [ROWS, BLOCK // 2])
        cols = tl.arange(0, BLOCK // 2)[None, :]
        where = row[:, None].to(tl.int64) * (heads * (WIDTH // 2)) + head * (WIDTH // 2) + cols
        tl.store(q_ptr + where, pairs, mask=live[:, None] & (cols < WIDTH // 2))
        scales = tl.reshape(scales.to(tl.int8, bitcast=True), [ROWS, GROUPS])
        where, inside = scale_columns(row, live, head, heads, stride_row, stride_group, TILE, WIDTH // 16, GROUPS, False)
        tl.store(scales_ptr + where, scales, mask=inside)
        if TILE > 1:
            where, inside = padding_columns(row, live, head, heads, stride_row, stride_group, TILE, WIDTH // 16, False)
            tl.store(scales_ptr + where, tl.zeros([ROWS, 4], tl.int8), mask=inside)


@triton.jit
def store_fp8(ptr, values, row, live, head, heads, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)[None, :]
    where = row[:, None].to(tl.int64) * (heads * WIDTH) + head * WIDTH + cols
    tl.store(ptr + where, clamp(values, -FP8_MAX, FP8_MAX).to(tl.float8e4nv), mask=live[:, None] & (cols < WIDTH))


@triton.jit
def scale_columns(
    row, live, head, heads, stride_row, stride_group, TILE: tl.constexpr, OWN: tl.constexpr, GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Where the `OWN` scales of a head lie, and which of `GROUPS` columns they are.  PACKED: bytes of int32 words."""
    column = tl.arange(0, GROUPS)[None, :]
    where = _where(row[:, None], head * OWN + column, heads * OWN, stride_row, stride_group, TILE, PACKED)
    return where, live[:, None] & (column < OWN)


@triton.jit
def padding_columns(
    row, live, head, heads, stride_row, stride_group, TILE: tl.constexpr, OWN: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The same of the columns that fill the last four; they are the last head's."""
    groups = heads * OWN
    column = groups + tl.arange(0, 4)[None, :]
    where = _where(row[:, None], column, groups, stride_row, stride_group, TILE, PACKED)
    return where, live[:, None] & (column < (groups + 3) // 4 * 4) & (head == heads - 1)


@triton.jit
def _where(row, group, groups, stride_row, stride_group, TILE: tl.constexpr, PACKED: tl.constexpr):
    if PACKED:
        return scale_offset(row, group // 4, groups, stride_row, stride_group, TILE) * 4 + group % 4
    else:
        return scale_offset(row, group, groups, stride_row, stride_group, TILE)


@triton.jit
def zero_padding_tile(
    ptr, rows, last, head, heads, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zeros in a head's NVFP4 scales of the rows that fill the last tile of a tiled layout; only the `last` block stores."""
    row = rows + tl.arange(0, TILE)
    live = last & (row < (rows + TILE - 1) // TILE * TILE)
    GROUPS: tl.constexpr = BLOCK // 16
    where, inside = scale_columns(row, live, head, heads, 0, 0, TILE, WIDTH // 16, GROUPS, False)
    tl.store(ptr + where, tl.zeros([TILE, GROUPS], tl.int8), mask=inside)
    where, inside = padding_columns(row, live, head, heads, 0, 0, TILE, WIDTH // 16, False)
    tl.store(ptr + where, tl.zeros([TILE, 4], tl.int8), mask=inside)
