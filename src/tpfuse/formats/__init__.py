"""Quantised number formats and the layouts of their scales: exact, in plain torch, on any device."""

from .codec import dequantize, empty_quantized, quantize
from .layouts import (
    Layout,
    apply_layout,
    concatenates,
    default_layout,
    gather_scales,
    remove_layout,
    scales_meta,
    swizzle,
    unswizzle,
)
from .scheme import SCHEME_NAMES, Scheme

__all__ = [
    "SCHEME_NAMES",
    "Layout",
    "Scheme",
    "apply_layout",
    "concatenates",
    "default_layout",
    "dequantize",
    "empty_quantized",
    "gather_scales",
    "quantize",
    "remove_layout",
    "scales_meta",
    "swizzle",
    "unswizzle",
]
