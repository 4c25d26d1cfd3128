"""RMS norms (Zhang & Sennrich 2019, arXiv:1910.07467) with what tells their spellings apart kept as attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse.formats import Flagged
from tpfuse.ir.op import Args, op
from tpfuse.ir.samples import rows, vector
from tpfuse.report import Decline


@dataclass(frozen=True)
class Rounding(Flagged):
    """Where a spelling rounds; written as one string in schemas.

    base: "cast_first" (normalise in FP32, cast to x.dtype, then times the weight; Llama in transformers) or "cast_last"
    (times the weight in FP32, then cast; torch.nn.RMSNorm, Gemma).
    low_bias: weight + weight_bias is formed in the weight's own dtype, not in FP32.
    keep_f32: the result stays in FP32 (torch 2.11 removes a cast down that a quantise would cast up again).
    """

    KIND = "rounding"
    BASES = ("cast_first", "cast_last")
    low_bias: bool = False
    keep_f32: bool = False


def out_dtype(x: Tensor, weight: Tensor | None, rounding: str) -> torch.dtype:
    """The dtype of a norm's result."""
    how = Rounding.parse(rounding)
    if how.keep_f32:
        return torch.promote_types(x.dtype, torch.float32)
    if how.base == "cast_first" and weight is not None:
        return torch.promote_types(x.dtype, weight.dtype)
    return x.dtype


def _norm_fake(x: Tensor, weight: Tensor | None, eps: float, weight_bias: float, rounding: str) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype(x, weight, rounding))


def norm_sample(**shape: Any) -> dict[str, Any]:
    gemma = shape.get("weight_bias", 0.0) != 0
    rounding = shape.get("rounding", "cast_last" if gemma else "cast_first")
    return {
        "x": rows(**shape), "weight": vector(**shape), "eps": shape.get("eps", 1e-6),
        "weight_bias": shape.get("weight_bias", 0.0), "rounding": rounding,
    }  # fmt: skip


@op(sample=norm_sample, fake=_norm_fake)
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first"
) -> Tensor:
    """x · rsqrt(mean(x²) + eps) · (weight + weight_bias) over the last dimension, in FP32 (FP64 for FP64 input).

    x: [..., hidden].  weight: [hidden] or None.  → x's shape, contiguous; dtype by `rounding` (see `Rounding`).
    """
    how = Rounding.parse(rounding)
    wide = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(wide)
    y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    out = out_dtype(x, weight, rounding)
    if weight is not None:
        scale = weight if weight_bias == 0.0 or how.low_bias else weight.to(wide)
        scale = scale if weight_bias == 0.0 else scale + weight_bias
        y = (y.to(x.dtype) if how.base == "cast_first" else y) * scale
    return y.to(out).contiguous()


def add_norm_sample(**shape: Any) -> dict[str, Any]:
    sample = norm_sample(**shape)
    return {"x": sample.pop("x"), "residual": rows(**{**shape, "seed": shape.get("seed", 0) + 1, "rank": 0}), **sample}


def _same_rows(args: Args) -> Decline | None:
    x, residual = args["x"], args["residual"]
    if x.shape != residual.shape or x.dtype != residual.dtype:
        return Decline("residual_shape", f"x is {x.dtype} {list(x.shape)}, the residual {residual.dtype} {list(residual.shape)}")
    return None


@op(
    sample=add_norm_sample, row_args=("x", "residual"), commutes=("x", "residual"), fuse="always", guard=_same_rows
)  # fmt: skip
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    rounding: str = "cast_first",
) -> tuple[Tensor, Tensor]:
    """h = x + residual, then `rms_norm` of h.  x, residual: [..., hidden] → (norm, h)."""
    h = torch.ops.aten.add.Tensor(x, residual)
    return rms_norm(h, weight, eps, weight_bias, rounding), h
