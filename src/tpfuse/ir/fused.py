"""Composites: each body is at once the pattern that finds the operator, the unfused path and the oracle of its tests.

A body returns one fixed tuple; what nobody uses is dead and is read off the graph when lowered.  What quantises is made of what
does not (`tails.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpfuse.ir.activation import act_and_mul
from tpfuse.ir.collective import all_reduce
from tpfuse.ir.norm import add_norm_sample, add_rms_norm, rms_norm
from tpfuse.ir.op import Args, op, optional_add, optional_scale
from tpfuse.ir.samples import vector
from tpfuse.ir.tails import quantized
from tpfuse.report import Decline


def sum_sample(**shape: Any) -> dict[str, Any]:
    """Arguments of every sum and what follows it."""
    norm, small = add_norm_sample(**shape), {**shape, "seed": 5}
    return {
        **norm, "bias": vector(**small) * 2e-3, "alpha": 0.22, "weight2": vector(**small), "eps2": 3e-6,
        "rounding2": norm["rounding"], "group": shape.get("group", ""),
    }  # fmt: skip


def weight_dtype(args: Args) -> Decline | None:
    """A weight of another dtype than the rows belongs to another norm (Gemma's FP32 1 + w); kernels read one dtype."""
    for name in ("weight", "weight2"):
        weight = args.get(name)
        if weight is not None and weight.dtype != args["x"].dtype:
            return Decline("weight_dtype", f"the norm's {name} is {weight.dtype}, its input {args['x'].dtype}")
    return None


def vectors(args: Args) -> Decline | None:
    """Weights of the rows' dtype, and for a bias one number a column: anything else that is added is no bias."""
    bias = args.get("bias")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != args["x"].shape[-1] or bias.dtype != args["x"].dtype):
        return Decline("bias_shape", f"what is added is {bias.dtype} {list(bias.shape)}, no bias of the {args['x'].dtype} rows")
    return weight_dtype(args)


@op(sample=sum_sample, rows="collective", fuse="all_reduce_norm", guard=vectors)
def all_reduce_rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over the ranks of `group` (+ bias), then RMS norm.

    x: [..., hidden].  weight, bias: [hidden] or None → (norm, reduced), both of x's shape.
    """
    reduced = optional_add(all_reduce(x, group), bias)
    return rms_norm(reduced, weight, eps, weight_bias, rounding), reduced


@op(sample=sum_sample, rows="collective", row_args=("x", "residual"), fuse="all_reduce_norm", guard=vectors)
def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, alpha: float = 1.0, eps: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = residual + alpha · (sum over the ranks of x + bias), then RMS norm of h.

    x, residual: [..., hidden].  weight, bias: [hidden] or None.  alpha: Granite's residual multiplier → (norm, h).
    """
    reduced = optional_scale(optional_add(all_reduce(x, group), bias), alpha)
    return add_rms_norm(reduced, residual, weight, eps, weight_bias, rounding)


@op(sample=sum_sample, rows="collective", row_args=("x", "residual"), fuse="all_reduce_norm", guard=vectors)
def all_reduce_rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, weight2: Tensor | None, eps: float = 1e-6, eps2: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", rounding2: str = "cast_first", group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sandwich of Gemma2/3, GLM-4 and OLMo2: h = residual + norm(sum over the ranks of x), then norm of h.

    x, residual: [..., hidden].  weight (inner), weight2 (outer): [hidden] or None → (outer norm, h).
    """
    inner, _ = all_reduce_rms_norm(x, weight, None, eps, weight_bias, rounding, group)
    return add_rms_norm(inner, residual, weight2, eps2, weight_bias, rounding2)


all_reduce_rms_norm_quantize = quantized(all_reduce_rms_norm, "all_reduce_norm_quantize", guard=vectors)
all_reduce_add_rms_norm_quantize = quantized(all_reduce_add_rms_norm, "all_reduce_norm_quantize", guard=vectors)
all_reduce_rms_norm_add_rms_norm_quantize = quantized(
    all_reduce_rms_norm_add_rms_norm, "all_reduce_norm_quantize", guard=vectors
)  # fmt: skip
ALL_REDUCES = (
    all_reduce_rms_norm, all_reduce_add_rms_norm, all_reduce_rms_norm_add_rms_norm, all_reduce_rms_norm_quantize,
    all_reduce_add_rms_norm_quantize, all_reduce_rms_norm_add_rms_norm_quantize,
)  # fmt: skip

rms_norm_quantize = quantized(rms_norm, "norm_quantize")
add_rms_norm_quantize = quantized(add_rms_norm, "norm_quantize")
act_and_mul_quantize = quantized(act_and_mul, "norm_quantize")
