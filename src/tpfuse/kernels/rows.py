"""What a block does with one row in registers: bias, residual, RMS norm, quantise, store.

A row is an FP32 tensor of `BLOCK` columns, a power of two; the columns past `hidden` are zeros and never stored.
Kernels round once, when they store: the norm works on the unrounded sum, the quantiser on the unrounded norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
# Schemes, and the layouts of NVFP4's scales by the rows of their tile (1: linear).
NO_SCHEME, TENSOR, DYNAMIC, NVFP4 = (tl.constexpr(i) for i in range(4))


@triton.jit
def rms_normalise(h, hidden, eps):
    return h * tl.rsqrt(tl.sum(h * h, 0) / hidden + eps)


@triton.jit
def load_row(ptr, cols, mask, PRESENT: tl.constexpr):
    """`ptr[cols]` in FP32; 0.0 where the operand is absent."""
    if PRESENT:
        return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def load_weight(ptr, cols, mask, bias, PRESENT: tl.constexpr):
    """`ptr[cols] + bias` in FP32; 1.0 where there is no weight."""
    if PRESENT:
        return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32) + bias
    else:
        return 1.0


@triton.jit
def store_row(ptr, row, offset, cols, mask, PRESENT: tl.constexpr):
    if PRESENT:
        tl.store(ptr + offset + cols, row.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def largest(blocks):
    """max |x| along axis 1.  As integers, since those order NaN above infinity, which a float maximum drops."""
    bits = blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def clamp(x, low, high):
    """Bounds that let NaN through."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def round_up_to_power_of_two(scale):
    """The smallest power of two that is not less; infinity and NaN stay."""
    bits = scale.to(tl.int32, bitcast=True)
    code = ((bits >> 23) & 255) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    value = tl.where(code == 0, 1 << 22, code << 23).to(tl.float32, bitcast=True)
    return tl.where(((bits >> 23) & 255) == 255, scale, value)


@triton.jit
def encode_e2m1(x):
    """FP32 -> the code of the nearest E2M1 value (int32 0..15), ties to the even code; saturates, NaN is 7 or 15."""
    size = tl.abs(x)
    below = (
        (size <= 0.25).to(tl.int32)
        + (size < 0.75).to(tl.int32)
        + (size <= 1.25).to(tl.int32)
        + (size < 1.75).to(tl.int32)
        + (size <= 2.5).to(tl.int32)
        + (size < 3.5).to(tl.int32)
        + (size <= 5.0).to(tl.int32)
    )
    return (7 - below) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def fp8_scales(blocks, FLOOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, POW2: tl.constexpr):
    """The scale of each row of `blocks` (FP32): max(amax / 448, floor), amax bounded first, perhaps a power of two."""
    amax = clamp(largest(blocks), LOW, HIGH)
    scales = amax / FP8_MAX
    scales = tl.where(scales < FLOOR, FLOOR, scales)
    if POW2:
        scales = round_up_to_power_of_two(scales)
    return scales


@triton.jit
def nvfp4_scales(blocks, given, FLOOR: tl.constexpr, DIV: tl.constexpr):
    """Block scales (e4m3) and what the values are multiplied by (FP32)."""
    wanted = largest(blocks) / 6.0
    wanted = wanted / given if DIV else wanted * given
    scales = clamp(wanted, FLOOR, FP8_MAX).to(tl.float8e4nv)
    widened = scales.to(tl.float32)
    factor = (1.0 / given if DIV else given) / widened
    return scales, tl.where(widened == 0.0, 0.0, factor)


@triton.jit
def pack_nibbles(codes, SIZE: tl.constexpr):
    """Codes [SIZE] -> bytes (int8) [SIZE / 2], the even column in the low nibble."""
    low, high = tl.split(tl.reshape(codes, [SIZE // 2, 2]))
    return (low | (high << 4)).to(tl.int8)


@triton.jit
def scale_offset(row, group, groups, stride_row, stride_group, TILE: tl.constexpr):
    """Where the scale of (row, group) lies, in elements."""
    if TILE == 1:
        return row.to(tl.int64) * stride_row + group * stride_group
    else:
        tiles = (groups + 3) // 4
        tile = (row // TILE).to(tl.int64) * tiles + group // 4
        if TILE == 128:
            return tile * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + group % 4
        else:
            return tile * 32 + (row % 8) * 4 + group % 4


@triton.jit
def quantise_row(
    y, row, base, hidden, mask, given, q_ptr, scales_ptr, stride_row, stride_group,
    SCHEME: tl.constexpr, GROUP: tl.constexpr, INVERT: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, POW2: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise `y`, the `BLOCK` columns from `base` on of a row of `hidden`, and store values and scales.

    INVERT: the given scale is meant the other way round (FP8 multiplies, NVFP4 divides).
    GROUP: columns of one scale; BLOCK where a row has one.
    """
    cols = base + tl.arange(0, BLOCK)
    if SCHEME == TENSOR:
        values = y * given if INVERT else y / given
        values = clamp(values, -FP8_MAX, FP8_MAX)
        tl.store(q_ptr + row.to(tl.int64) * hidden + cols, values.to(tl.float8e4nv), mask=mask)
    elif SCHEME == DYNAMIC:
        GROUPS: tl.constexpr = BLOCK // GROUP
        blocks = tl.reshape(y, [GROUPS, GROUP])
        scales = fp8_scales(blocks, FLOOR, LOW, HIGH, POW2)
        values = clamp(tl.reshape(blocks / scales[:, None], [BLOCK]), -FP8_MAX, FP8_MAX)
        tl.store(q_ptr + row.to(tl.int64) * hidden + cols, values.to(tl.float8e4nv), mask=mask)
        groups = (hidden + GROUP - 1) // GROUP
        group = base // GROUP + tl.arange(0, GROUPS)
        if PACKED:
            codes = tl.where(group < groups, (scales.to(tl.int32, bitcast=True) >> 23) & 255, 0)
            words = bytes_of_four(codes, GROUPS)
            word = base // (4 * GROUP) + tl.arange(0, GROUPS // 4)
            where = scale_offset(row, word, groups, stride_row, stride_group, 1)
            tl.store(scales_ptr + where, words, mask=word * 4 < groups)
        else:
            where = scale_offset(row, group, groups, stride_row, stride_group, 1)
            tl.store(scales_ptr + where, scales, mask=group < groups)
    elif SCHEME == NVFP4:
        blocks = tl.reshape(y, [BLOCK // 16, 16])
        scales, factor = nvfp4_scales(blocks, given, FLOOR, INVERT)
        codes = tl.reshape(encode_e2m1(blocks * factor[:, None]), [BLOCK])
        pair = base // 16 * 8 + tl.arange(0, BLOCK // 2)
        tl.store(q_ptr + row.to(tl.int64) * (hidden // 16 * 8) + pair, pack_nibbles(codes, BLOCK), mask=pair < hidden // 16 * 8)
        store_nvfp4_scales(scales_ptr, scales.to(tl.int8, bitcast=True), row, base // 16, hidden, stride_row,
                           stride_group, TILE, BLOCK // 16)  # fmt: skip


@triton.jit
def bytes_of_four(codes, SIZE: tl.constexpr):
    """Codes 0..255 [SIZE] -> int32 [SIZE / 4], the lowest byte first."""
    low, high = tl.split(tl.reshape(codes, [SIZE // 2, 2]))
    low, high = tl.split(tl.reshape(low | (high << 8), [SIZE // 4, 2]))
    return low | (high << 16)


@triton.jit
def store_nvfp4_scales(
    ptr, scales, row, base, hidden, stride_row, stride_group, TILE: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Block scales (as int8 [GROUPS], from group `base` on) of one row, with zeros in the padding columns of a tiled layout."""
    groups = hidden // 16
    group = base + tl.arange(0, GROUPS)
    where = scale_offset(row, group, groups, stride_row, stride_group, TILE)
    bound = groups if TILE == 1 else (groups + 3) // 4 * 4
    tl.store(ptr + where, tl.where(group < groups, scales, 0).to(ptr.dtype.element_ty), mask=group < bound)


@triton.jit
def zero_padding_rows(ptr, rows, hidden, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Zeros in the scales of the rows that fill the last tile of a tiled layout; the grid shares the rows."""
    if TILE > 1:
        row = rows + tl.program_id(0)
        zeros = tl.zeros([GROUPS], tl.int8)
        while row < (rows + TILE - 1) // TILE * TILE:
            store_nvfp4_scales(ptr, zeros, row, 0, hidden, 0, 0, TILE, GROUPS)
            row += tl.num_programs(0)
