"""Composites around a residual that stays sharded by rows: sum and scatter, norm own rows, gather what others need.

Each rank holds ⌈rows / world⌉ rows of the residual (`reduce_scatter(padded=True)`), so a chain of layers moves
normalised, where possible quantised rows instead of sums.  With padded=False and rows=None the same operators serve
models that are written with reduce-scatter and all-gather.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse.ir.collective import all_gather, all_gather_quantized, reduce_scatter, share
from tpfuse.ir.fused import sampler, vectors
from tpfuse.ir.norm import add_rms_norm, rms_norm
from tpfuse.ir.op import op, optional_add, optional_scale
from tpfuse.ir.quant import quantize

_NORM = ("eps", "weight_bias", "rounding")
_QUANT = ("scheme", "layout")


def _sampler(*names: str) -> Any:
    """As the composites of an all-reduce, the residual cut to the rank's rows."""
    full = sampler(*[n for n in names if n not in ("padded", "rows")])

    def sample(**shape: Any) -> dict[str, Any]:
        known = {**full(**shape), "padded": True, "rows": shape["tokens"]}
        if "residual" in names:
            own = share(shape["tokens"], shape["group"]) if shape.get("group") else shape["tokens"]
            start, residual = shape.get("rank", 0) * own, known["residual"]
            mine = residual[start : start + own]
            known["residual"] = torch.cat([mine, mine.new_zeros([own - mine.shape[0], mine.shape[1]])])
        return {name: known[name] for name in names}

    return sample


@op(
    sample=_sampler("x", "weight", "bias", *_NORM, "padded", "group"), rows="collective", fuse="sequence_parallel",
    guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over the ranks of `group` (+ bias), own rows only, then RMS norm.

    x: [rows, hidden].  weight, bias: [hidden] or None → (norm, reduced), both [⌈rows / world⌉, hidden].
    """
    reduced = optional_add(reduce_scatter(x, group, padded), bias)
    return rms_norm(reduced, weight, eps, weight_bias, rounding), reduced


@op(
    sample=_sampler("x", "residual", "weight", "bias", "alpha", *_NORM, "padded", "group"), rows="collective",
    row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, alpha: float = 1.0,
    eps: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = residual + alpha · (sum over the ranks of x + bias), own rows only, then RMS norm of h.

    x: [rows, hidden].  residual: [⌈rows / world⌉, hidden].  weight, bias: [hidden] or None → (norm, h), of own rows.
    """
    reduced = optional_scale(optional_add(reduce_scatter(x, group, padded), bias), alpha)
    return add_rms_norm(reduced, residual, weight, eps, weight_bias, rounding)


@op(
    sample=_sampler(
        "x", "residual", "weight", "weight2", "eps", "eps2", "weight_bias", "rounding", "rounding2", "padded", "group"
    ),
    rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, weight2: Tensor | None, eps: float = 1e-6, eps2: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", rounding2: str = "cast_first", padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sandwich on own rows: h = residual + norm(sum over the ranks of x), then norm of h.

    x: [rows, hidden].  residual: [⌈rows / world⌉, hidden].  weight (inner), weight2 (outer): [hidden] or None
    → (outer norm, h), of own rows.
    """
    inner, _ = reduce_scatter_rms_norm(x, weight, None, eps, weight_bias, rounding, padded, group)
    return add_rms_norm(inner, residual, weight2, eps2, weight_bias, rounding2)


@op(
    sample=_sampler("x", "weight", "bias", "scale", *_NORM, *_QUANT, "padded", "group"), rows="collective",
    fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", scheme: str = "fp8_tensor", layout: str = "row",
    padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_rms_norm`, then `quantize` of the norm → (q, scales, norm, reduced), of own rows."""
    norm, reduced = reduce_scatter_rms_norm(x, weight, bias, eps, weight_bias, rounding, padded, group)
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm, reduced


@op(
    sample=_sampler("x", "residual", "weight", "bias", "scale", "alpha", *_NORM, *_QUANT, "padded", "group"),
    rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, alpha: float = 1.0,
    eps: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", scheme: str = "fp8_tensor",
    layout: str = "row", padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_add_rms_norm`, then `quantize` of the norm → (q, scales, norm, h), of own rows."""
    norm, h = reduce_scatter_add_rms_norm(
        x, residual, weight, bias, alpha, eps, weight_bias, rounding, padded, group
    )  # fmt: skip
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm, h


@op(
    sample=_sampler(
        "x", "residual", "weight", "weight2", "scale", "eps", "eps2", "weight_bias", "rounding", "rounding2", *_QUANT,
        "padded", "group",
    ),
    rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm_add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, weight2: Tensor | None, scale: Tensor | None, eps: float = 1e-6,
    eps2: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", rounding2: str = "cast_first",
    scheme: str = "fp8_tensor", layout: str = "row", padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_rms_norm_add_rms_norm`, then `quantize` of the outer norm → (q, scales, norm, h), of own rows."""
    norm, h = reduce_scatter_rms_norm_add_rms_norm(
        x, residual, weight, weight2, eps, eps2, weight_bias, rounding, rounding2, padded, group
    )  # fmt: skip
    q, scales = quantize(norm, scale, scheme, layout)
    return q, scales, norm, h


@op(
    sample=_sampler("x", "weight", "bias", *_NORM, "padded", "rows", "group"), rows="collective",
    fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm_all_gather(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", padded: bool = True, rows: int | None = None, group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_rms_norm`, then the norm of all rows → (norm of all rows, own rows' norm, own rows' sum).

    rows: as for `all_gather`; the rows of x where padded.
    """
    norm, reduced = reduce_scatter_rms_norm(x, weight, bias, eps, weight_bias, rounding, padded, group)
    return all_gather(norm, group, rows), norm, reduced


@op(
    sample=_sampler("x", "residual", "weight", "bias", "alpha", *_NORM, "padded", "rows", "group"), rows="collective",
    row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_add_rms_norm_all_gather(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, alpha: float = 1.0,
    eps: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", padded: bool = True,
    rows: int | None = None, group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_add_rms_norm`, then the norm of all rows → (norm of all rows, own rows' norm, own rows' h)."""
    norm, h = reduce_scatter_add_rms_norm(
        x, residual, weight, bias, alpha, eps, weight_bias, rounding, padded, group
    )  # fmt: skip
    return all_gather(norm, group, rows), norm, h


@op(
    sample=_sampler(
        "x", "residual", "weight", "weight2", "eps", "eps2", "weight_bias", "rounding", "rounding2", "padded", "rows", "group"
    ),
    rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm_add_rms_norm_all_gather(
    x: Tensor, residual: Tensor, weight: Tensor | None, weight2: Tensor | None, eps: float = 1e-6, eps2: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", rounding2: str = "cast_first", padded: bool = True,
    rows: int | None = None, group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_rms_norm_add_rms_norm`, then the outer norm of all rows → (norm of all rows, own norm, own h)."""
    norm, h = reduce_scatter_rms_norm_add_rms_norm(
        x, residual, weight, weight2, eps, eps2, weight_bias, rounding, rounding2, padded, group
    )  # fmt: skip
    return all_gather(norm, group, rows), norm, h


@op(
    sample=_sampler("x", "weight", "bias", "scale", *_NORM, *_QUANT, "padded", "rows", "group"), rows="collective",
    fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm_quantize_all_gather(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", scheme: str = "fp8_tensor", layout: str = "row",
    padded: bool = True, rows: int | None = None, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_rms_norm_quantize`, then the quantised rows of all ranks with their scales by `layout`
    → (q and scales of all rows, own rows' norm, own rows' sum)."""
    q, scales, norm, reduced = reduce_scatter_rms_norm_quantize(
        x, weight, bias, scale, eps, weight_bias, rounding, scheme, layout, padded, group
    )
    q, scales = all_gather_quantized(q, scales, scheme, layout, group, rows)
    return q, scales, norm, reduced


@op(
    sample=_sampler("x", "residual", "weight", "bias", "scale", "alpha", *_NORM, *_QUANT, "padded", "rows", "group"),
    rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_add_rms_norm_quantize_all_gather(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, alpha: float = 1.0,
    eps: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", scheme: str = "fp8_tensor",
    layout: str = "row", padded: bool = True, rows: int | None = None, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_add_rms_norm_quantize`, then the quantised rows of all ranks with their scales by `layout`
    → (q and scales of all rows, own rows' norm, own rows' h)."""
    q, scales, norm, h = reduce_scatter_add_rms_norm_quantize(
        x, residual, weight, bias, scale, alpha, eps, weight_bias, rounding, scheme, layout, padded, group
    )
    q, scales = all_gather_quantized(q, scales, scheme, layout, group, rows)
    return q, scales, norm, h


@op(
    sample=_sampler(
        "x", "residual", "weight", "weight2", "scale", "eps", "eps2", "weight_bias", "rounding", "rounding2", *_QUANT,
        "padded", "rows", "group",
    ),
    rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors,
)  # fmt: skip
def reduce_scatter_rms_norm_add_rms_norm_quantize_all_gather(
    x: Tensor, residual: Tensor, weight: Tensor | None, weight2: Tensor | None, scale: Tensor | None, eps: float = 1e-6,
    eps2: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", rounding2: str = "cast_first",
    scheme: str = "fp8_tensor", layout: str = "row", padded: bool = True, rows: int | None = None, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reduce_scatter_rms_norm_add_rms_norm_quantize`, then the quantised rows of all ranks with their scales by `layout`
    → (q and scales of all rows, own rows' norm, own rows' h)."""
    q, scales, norm, h = reduce_scatter_rms_norm_add_rms_norm_quantize(
        x, residual, weight, weight2, scale, eps, eps2, weight_bias, rounding, rounding2, scheme, layout, padded, group
    )
    q, scales = all_gather_quantized(q, scales, scheme, layout, group, rows)
    return q, scales, norm, h


# What is left on own rows, and the same with what others need of it gathered.
SCATTERED = (
    reduce_scatter_rms_norm, reduce_scatter_add_rms_norm, reduce_scatter_rms_norm_add_rms_norm,
    reduce_scatter_rms_norm_quantize, reduce_scatter_add_rms_norm_quantize, reduce_scatter_rms_norm_add_rms_norm_quantize,
)  # fmt: skip
GATHERED = (
    reduce_scatter_rms_norm_all_gather, reduce_scatter_add_rms_norm_all_gather, reduce_scatter_rms_norm_add_rms_norm_all_gather,
    reduce_scatter_rms_norm_quantize_all_gather, reduce_scatter_add_rms_norm_quantize_all_gather,
    reduce_scatter_rms_norm_add_rms_norm_quantize_all_gather,
)  # fmt: skip
