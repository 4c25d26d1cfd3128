"""Quantisation schemes as data: what is scaled by what, and in which arithmetic, in one string.

A scheme is written ``name`` or ``name:variant,variant``.  The names:

========== ============================================= =========================================================
name       quantised value                               scale
========== ============================================= =========================================================
fp8_tensor e4m3(x / scale)                               given, one FP32 number
fp8_token  e4m3(x / s)                                   s = max(amax / 448, eps), one per row
fp8_group* e4m3(x / s)                                   the same, one per row and group of 128 or 64 columns
nvfp4      e2m1(x * (g / sf)), 0 where sf = 0            sf = e4m3(min(g * (amax / 6), 448)) per 16 columns;
                                                         g given, one FP32 number (1 where none is given)
========== ============================================= =========================================================

All arithmetic is FP32 and values saturate.  The variants say how a model spells it where that differs, so that raising
is exact.  A per-tensor scale that a model computes from all its tokens is a *given* scale: it is an operand that
depends on the input, which no row-local fusion can take.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

from .flagged import closest

FP8_MAX = 448.0
FP4_MAX = 6.0
DEFAULT_EPS = 1e-10

_GROUP = {"fp8_tensor": 0, "fp8_token": 0, "fp8_group128": 128, "fp8_group64": 64, "nvfp4": 16}
SCHEME_NAMES = tuple(_GROUP)
_DYNAMIC = ("fp8_token", "fp8_group128", "fp8_group64")
_FP8 = ("fp8_tensor", *_DYNAMIC)

# Which schemes each variant belongs to.
_VARIANT_OF = {
    "mul": ("fp8_tensor",),
    "div": ("nvfp4",),
    "reciprocal": _FP8,
    "inverse": _DYNAMIC,
    "bf16_amax": _DYNAMIC,
    "fp16_amax": _DYNAMIC,
    "low_scale": _DYNAMIC,
    "low_value": _FP8,
    "unclamped": _FP8,
    "log2": _DYNAMIC,
    "eps": (*_DYNAMIC, "nvfp4"),
    "amax_min": _DYNAMIC,
    "amax_max": _DYNAMIC,
}
_SPELLINGS = ("reciprocal", "inverse", "bf16_amax", "fp16_amax", "low_scale", "low_value", "unclamped", "log2")


@dataclass(frozen=True)
class Scheme:
    """One quantisation scheme; equal schemes have equal strings.

    Variants that change the meaning:

    - ``mul``: the given scale multiplies (q = x * scale).
    - ``div``: the given NVFP4 scale is p = 1/g: sf = e4m3((amax / 6) / p), q = e2m1(x * ((1 / p) / sf)).
    - ``eps``: floor of a dynamic scale before any rounding (FP8: 1e-10 unless said; 0 is no floor), or of NVFP4's
      block scale before its conversion (0 unless said).
    - ``amax_min``, ``amax_max``: bounds put on amax before the division.

    Variants of spelling, which differ in the last bits at most:

    - ``reciprocal``: x * (1 / s) in place of x / s.
    - ``inverse``: x * (448 / amax) in place of x / s.
    - ``bf16_amax``, ``fp16_amax``: amax is rounded to that dtype (a compiler dropped the rounding of the values themselves).
    - ``low_scale``: the scale is formed in the dtype of amax, the input's unless said, then widened.
    - ``low_value``: x and the scale meet in the input's dtype.
    - ``unclamped``: no clamp before the conversion: values out of range become what torch's conversion makes of
      them (NaN or 448, by its version).
    - ``log2``: UE8M0 rounding spelled exp2(ceil(log2(s))).
    """

    name: str
    mul: bool = False
    div: bool = False
    reciprocal: bool = False
    inverse: bool = False
    bf16_amax: bool = False
    fp16_amax: bool = False
    low_scale: bool = False
    low_value: bool = False
    unclamped: bool = False
    log2: bool = False
    eps: float | None = None
    amax_min: float | None = None
    amax_max: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _GROUP:
            raise ValueError(f"unknown quantisation scheme {self.name!r}{closest(self.name, SCHEME_NAMES)}")
        for field in fields(self)[1:]:
            if _is_set(getattr(self, field.name)) and self.name not in _VARIANT_OF[field.name]:
                raise ValueError(f"scheme {self.name!r} has no variant {field.name!r}")
        default_eps = 0.0 if self.name == "nvfp4" else DEFAULT_EPS
        if self.eps == default_eps:
            object.__setattr__(self, "eps", None)

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """The scheme written as `text`; ValueError, naming the closest known word, where there is none."""
        return text if isinstance(text, Scheme) else _parse(text)

    def __str__(self) -> str:
        words = []
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is True:
                words.append(field.name)
            elif _is_set(value):
                words.append(f"{field.name}={value!r}")
        return f"{self.name}:{','.join(words)}" if words else self.name

    @property
    def group(self) -> int:
        """Columns that share one scale: 128, 64 or 16; 0 where a whole row or tensor does."""
        return _GROUP[self.name]

    @property
    def is_fp8(self) -> bool:
        return self.name != "nvfp4"

    @property
    def is_dynamic(self) -> bool:
        """Whether the FP8 scale is computed from the row itself (and no scale is given)."""
        return self.name in _DYNAMIC

    @property
    def floor(self) -> float:
        """The floor of the scale, with the default filled in."""
        return self.eps if self.eps is not None else (DEFAULT_EPS if self.is_dynamic else 0.0)

    def meaning(self) -> Scheme:
        """The scheme without its variants of spelling: what a kernel that rounds later has to implement."""
        return replace(self, **dict.fromkeys(_SPELLINGS, False))


@cache
def _parse(text: str) -> Scheme:
    name, _, rest = text.partition(":")
    options: dict[str, bool | float] = {}
    for word in rest.split(",") if rest else ():
        key, equals, value = word.partition("=")
        if key not in _VARIANT_OF:
            raise ValueError(f"unknown variant {key!r} of scheme {text!r}{closest(key, tuple(_VARIANT_OF))}")
        if bool(equals) != (key in ("eps", "amax_min", "amax_max")):
            raise ValueError(f"variant {key!r} of scheme {text!r} takes {'no' if equals else 'a'} value")
        options[key] = float(value) if equals else True
    return Scheme(name, **options)  # type: ignore[arg-type]


def _is_set(value: bool | float | None) -> bool:
    return value is not None and value is not False
