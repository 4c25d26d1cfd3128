"""Composites: each body is at once the pattern that finds the operator, the unfused path and the oracle of its tests.

A body returns one fixed tuple; what nobody uses is dead and is read off the graph when lowered.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpfuse.ir.activation import act_and_mul
from tpfuse.ir.collective import all_reduce
from tpfuse.ir.norm import add_rms_norm, norm_sample, rms_norm
from tpfuse.ir.op import Args, op, optional_add, optional_scale
from tpfuse.ir.quant import quant_sample, quantize
from tpfuse.ir.samples import rows, vector
from tpfuse.report import Decline


def _residual(**shape: Any) -> Tensor:
    return rows(**{**shape, "seed": shape.get("seed", 0) + 1, "rank": 0})


def _collective_sample(*names: str, **shape: Any) -> dict[str, Any]:
    small = {**shape, "seed": 5}
    known = {
        **norm_sample(**shape), "residual": _residual(**shape), "bias": vector(**small) * 2e-3, "alpha": 0.22,
        "weight2": vector(**small), "eps2": 3e-6, "rounding2": norm_sample(**shape)["rounding"], **quant_sample(**shape),
        "group": shape["group"],
    }  # fmt: skip
    return {name: known[name] for name in names}


def sampler(*names: str) -> Any:
    return lambda **shape: _collective_sample(*names, **{"group": "", **shape})


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


_NORM = ("eps", "weight_bias", "rounding")
_QUANT = ("scheme", "layout")


@op(
    sample=sampler("x", "weight", "bias", *_NORM, "group"), rows="collective", fuse="all_reduce_norm",
    guard=vectors,
)  # fmt: skip
def all_reduce_rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over the ranks of `group` (+ bias), then RMS norm.

    x: [..., hidden].  weight, bias: [hidden] or None → (norm, reduced), both of x's shape.
    """
    reduced = optional_add(all_reduce(x, group), bias)
    return rms_norm(reduced, weight, eps, weight_bias, rounding), reduced


@op(
    sample=sampler("x", "residual", "weight", "bias", "alpha", *_NORM, "group"), rows="collective",
    row_args=("x", "residual"), fuse="all_reduce_norm", guard=vectors,
)  # fmt: skip
def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, alpha: float = 1.0, eps: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = residual + alpha · (sum over the ranks of x + bias), then RMS norm of h.

    x, residual: [..., hidden].  weight, bias: [hidden] or None.  alpha: Granite's residual multiplier → (norm, h).
    """
    reduced = optional_scale(optional_add(all_reduce(x, group), bias), alpha)
    return add_rms_norm(reduced, residual, weight, eps, weight_bias, rounding)


@op(
    sample=sampler("x", "residual", "weight", "weight2", "eps", "eps2", "weight_bias", "rounding", "rounding2", "group"),
    rows="collective", row_args=("x", "residual"), fuse="all_reduce_norm", guard=vectors,
)  # fmt: skip
def all_reduce_rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, weight2: Tensor | None, eps: float = 1e-6, eps2: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", rounding2: str = "cast_first", group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sandwich of Gemma2/3, GLM-4 and OLMo2: h = residual + norm(sum over the ranks of x), then norm of h.

    x, residual: [..., hidden].  weight (inner), weight2 (outer): [hidden] or None → (outer norm, h).
    """
    inner, _ = all_reduce_rms_norm(x, weight, None, eps, weight_bias, rounding, group)
    return add_rms_norm(inner, residual, weight2, eps2, weight_bias, rounding2)


@op(
    sample=sampler("x", "weight", "bias", "scale", *_NORM, *_QUANT, "group"), rows="collective",
    fuse="all_reduce_norm_quantize", guard=vectors,
)  # fmt: skip
def all_reduce_rms_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", scheme: str = "fp8_tensor", layout: str = "row", group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`all_reduce_rms_norm`, then `quantize` of the norm → (q, scales, norm, reduced)."""
    norm, reduced = all_reduce_rms_norm(x, weight, bias, eps, weight_bias, rounding, group)
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm, reduced


@op(
    sample=sampler("x", "residual", "weight", "bias", "scale", "alpha", *_NORM, *_QUANT, "group"), rows="collective",
    row_args=("x", "residual"), fuse="all_reduce_norm_quantize", guard=vectors,
)  # fmt: skip
def all_reduce_add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, alpha: float = 1.0,
    eps: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", scheme: str = "fp8_tensor",
    layout: str = "row", group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`all_reduce_add_rms_norm`, then `quantize` of the norm → (q, scales, norm, h)."""
    norm, h = all_reduce_add_rms_norm(x, residual, weight, bias, alpha, eps, weight_bias, rounding, group)
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm, h


@op(
    sample=sampler(
        "x", "residual", "weight", "weight2", "scale", "eps", "eps2", "weight_bias", "rounding", "rounding2", *_QUANT, "group"
    ),
    rows="collective", row_args=("x", "residual"), fuse="all_reduce_norm_quantize", guard=vectors,
)  # fmt: skip
def all_reduce_rms_norm_add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, weight2: Tensor | None, scale: Tensor | None, eps: float = 1e-6,
    eps2: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", rounding2: str = "cast_first",
    scheme: str = "fp8_tensor", layout: str = "row", group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`all_reduce_rms_norm_add_rms_norm`, then `quantize` of the outer norm → (q, scales, outer norm, h)."""
    norm, h = all_reduce_rms_norm_add_rms_norm(x, residual, weight, weight2, eps, eps2, weight_bias, rounding, rounding2, group)
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm, h


ALL_REDUCES = (
    all_reduce_rms_norm, all_reduce_add_rms_norm, all_reduce_rms_norm_add_rms_norm, all_reduce_rms_norm_quantize,
    all_reduce_add_rms_norm_quantize, all_reduce_rms_norm_add_rms_norm_quantize,
)  # fmt: skip


@op(sample=sampler("x", "weight", "scale", *_NORM, *_QUANT), fuse="norm_quantize")
def rms_norm_quantize(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", scheme: str = "fp8_tensor", layout: str = "row",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rms_norm`, then `quantize` → (q, scales, norm)."""
    norm = rms_norm(x, weight, eps, weight_bias, rounding)
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm


@op(
    sample=sampler("x", "residual", "weight", "scale", *_NORM, *_QUANT), row_args=("x", "residual"),
    commutes=("x", "residual"), fuse="norm_quantize",
)  # fmt: skip
def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, scale: Tensor | None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", scheme: str = "fp8_tensor", layout: str = "row",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`add_rms_norm`, then `quantize` of the norm → (q, scales, norm, h)."""
    norm, h = add_rms_norm(x, residual, weight, eps, weight_bias, rounding)
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm, h


def _act_sample(**shape: Any) -> dict[str, Any]:
    return {**act_and_mul.sample(**shape), **quant_sample(**shape)}


def _act_order(**shape: Any) -> dict[str, Any]:
    sample = _act_sample(**shape)
    return {name: sample[name] for name in ("gate", "up", "scale", "act", "scheme", "layout")}


@op(sample=_act_order, row_args=("gate", "up"), fuse="norm_quantize")
def act_and_mul_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None, act: str = "silu", scheme: str = "fp8_tensor", layout: str = "row"
) -> tuple[Tensor, Tensor, Tensor]:
    """`act_and_mul`, then `quantize` → (q, scales, product)."""
    product = act_and_mul(gate, up, act)
    q, scales = quantize(product, scale, scheme, layout)
    return q, scales, product
