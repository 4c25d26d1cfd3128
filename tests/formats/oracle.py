"""Exact e4m3 and e2m1 coding in Python's own numbers, from the definition of the formats; torch takes no part."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def e4m3_value(code: int) -> Fraction:
    """The magnitude of code 0..126: 4 exponent bits with bias 7, 3 mantissa bits; 127 is NaN."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8) * Fraction(1, 64)
    return Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


E4M3 = [e4m3_value(code) for code in range(127)]


def nearest(value: float, values: list[Fraction]) -> int:
    """The code of the nearest of ascending `values`, ties to the even code, saturating; `value` not NaN."""
    if math.isinf(value) or abs(Fraction(value)) >= values[-1]:
        return len(values) - 1
    size = abs(Fraction(value))
    above = bisect.bisect_left(values, size)
    return min((above, max(above - 1, 0)), key=lambda code: (abs(values[code] - size), code % 2))


def e4m3(value: float) -> int:
    """The saturating e4m3 code, 0..255."""
    if math.isnan(value):
        return 127
    return nearest(value, E4M3) | (128 if math.copysign(1, value) < 0 else 0)


def e2m1(value: float) -> int:
    """The saturating E2M1 code, 0..15."""
    if math.isnan(value):
        return 7
    return nearest(value, E2M1) | (8 if math.copysign(1, value) < 0 else 0)
