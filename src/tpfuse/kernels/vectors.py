"""16-byte vectors of words and the FP32 rows that they stand for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interleave(a, b, SIZE: tl.constexpr):
    """[SIZE] and [SIZE] -> a0 b0 a1 b1 ..., [2 * SIZE]."""
    return tl.reshape(tl.join(a, b), [2 * SIZE])


@triton.jit
def words_to_row(words, DTYPE: tl.constexpr, VECTORS: tl.constexpr):
    """Four int32 words [VECTORS] -> the row that they hold, FP32 [VECTORS * 16 / itemsize], in order."""
    even = tl.join(words[0], words[2])
    odd = tl.join(words[1], words[3])
    flat = tl.reshape(tl.join(even, odd), [VECTORS * 4])
    if tl.float32 == DTYPE:
        return flat.to(tl.float32, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        low = (flat << 16).to(tl.float32, bitcast=True)
        high = (flat & -65536).to(tl.float32, bitcast=True)
        return interleave(low, high, VECTORS * 4)
    else:
        low = flat.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (flat >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        return interleave(low, high, VECTORS * 4)


@triton.jit
def row_to_words(row, DTYPE: tl.constexpr, VECTORS: tl.constexpr):
    """The inverse: a row already of dtype `DTYPE` -> four int32 words [VECTORS]."""
    if tl.float32 == DTYPE:
        flat = row.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(row.to(tl.int16, bitcast=True), [VECTORS * 4, 2]))
        flat = (low.to(tl.int32) & 65535) | (high.to(tl.int32) << 16)
    even, odd = tl.split(tl.reshape(flat, [VECTORS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth
