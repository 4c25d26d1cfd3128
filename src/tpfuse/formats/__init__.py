"""Quantised number formats and the layouts of their scales: exact, in plain torch, on any device."""

from .buffers import cut_rows, quantize_into, scheme_of
from .codec import checked, dequantize, quantize, quantize_fake
from .flagged import Flagged
from .layouts import (
    Layout,
    apply_layout,
    default_layout,
    remove_layout,
    scales_meta,
    swizzle,
    unswizzle,
)
from .scheme import SCHEME_NAMES, Scheme

__all__ = [
    "SCHEME_NAMES",
    "Flagged",
    "Layout",
    "Scheme",
    "apply_layout",
    "checked",
    "cut_rows",
    "default_layout",
    "dequantize",
    "quantize",
    "quantize_fake",
    "quantize_into",
    "remove_layout",
    "scales_meta",
    "scheme_of",
    "swizzle",
    "unswizzle",
]
