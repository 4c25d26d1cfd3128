"""Quantisation.  The codecs are in `tpfuse.formats`; here they become operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse import formats
from tpfuse.ir.op import op
from tpfuse.ir.samples import rows


def _sample(**shape: Any) -> dict[str, Any]:
    return {"x": rows(**shape), **quant_sample(**shape)}


def quant_sample(*, scheme: str = "fp8_tensor", layout: str = "", device: str = "cpu", **_: Any) -> dict[str, Any]:
    """Scale, scheme and layout for values of about 3e-3 (or norms of about 1: the scale saturates a few of them)."""
    scales = {"fp8_tensor": 0.0043, "nvfp4": 448 * 6 / 6.5}
    base = scheme.split(":")[0]
    scale = torch.tensor(scales[base], device=device) if base in scales else None
    return {"scale": scale, "scheme": scheme, "layout": layout or formats.default_layout(scheme)}


def _fake(x: Tensor, scale: Tensor | None, scheme: str, layout: str) -> tuple[Tensor, Tensor]:
    return formats.quantize_fake(x, scheme, layout)


@op(sample=_sample, fake=_fake)
def quantize(x: Tensor, scale: Tensor | None, scheme: str = "fp8_tensor", layout: str = "row") -> tuple[Tensor, Tensor]:
    """Quantise the rows of x.

    x: [..., hidden].  scale: one FP32 number for "fp8_tensor" (q = x / scale) and "nvfp4" (its global scale), else None.
    scheme, layout: see `tpfuse.formats`.  → (q, scales); scales is empty for "fp8_tensor".
    """
    return formats.quantize(x, scale, scheme, layout)
