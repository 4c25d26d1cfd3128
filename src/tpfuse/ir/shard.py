"""Composites around a residual that stays sharded by rows: sum and scatter, norm own rows, gather what others need.

Each rank holds ⌈rows / world⌉ rows of the residual (`reduce_scatter(padded=True)`), so a chain of layers moves
normalised, where possible quantised rows instead of sums.  With padded=False and rows=None the same operators serve
models that are written with reduce-scatter and all-gather.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse.ir.collective import reduce_scatter, share
from tpfuse.ir.fused import sum_sample, vectors
from tpfuse.ir.norm import add_rms_norm, rms_norm
from tpfuse.ir.op import op, optional_add, optional_scale
from tpfuse.ir.tails import gathered, quantized


def _sample(**shape: Any) -> dict[str, Any]:
    """As the composites of an all-reduce, the residual cut to the rank's rows."""
    made = sum_sample(**shape)
    own = share(shape["tokens"], shape["group"]) if shape.get("group") else shape["tokens"]
    start = shape.get("rank", 0) * own
    mine = made["residual"][start : start + own]
    return {**made, "residual": torch.cat([mine, mine.new_zeros([own - mine.shape[0], mine.shape[1]])]), "padded": True}


@op(sample=_sample, rows="collective", fuse="sequence_parallel", guard=vectors)
def reduce_scatter_rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-6, weight_bias: float = 0.0,
    rounding: str = "cast_first", padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over the ranks of `group` (+ bias), own rows only, then RMS norm.

    x: [rows, hidden].  weight, bias: [hidden] or None → (norm, reduced), both [⌈rows / world⌉, hidden].
    """
    reduced = optional_add(reduce_scatter(x, group, padded), bias)
    return rms_norm(reduced, weight, eps, weight_bias, rounding), reduced


@op(sample=_sample, rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors)
def reduce_scatter_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, alpha: float = 1.0,
    eps: float = 1e-6, weight_bias: float = 0.0, rounding: str = "cast_first", padded: bool = True, group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = residual + alpha · (sum over the ranks of x + bias), own rows only, then RMS norm of h.

    x: [rows, hidden].  residual: [⌈rows / world⌉, hidden].  weight, bias: [hidden] or None → (norm, h), of own rows.
    """
    reduced = optional_scale(optional_add(reduce_scatter(x, group, padded), bias), alpha)
    return add_rms_norm(reduced, residual, weight, eps, weight_bias, rounding)


@op(sample=_sample, rows="collective", row_args=("x", "residual"), fuse="sequence_parallel", guard=vectors)
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


_SUMS = (reduce_scatter_rms_norm, reduce_scatter_add_rms_norm, reduce_scatter_rms_norm_add_rms_norm)
# What is left on own rows: `reduce_scatter_rms_norm` … `reduce_scatter_rms_norm_add_rms_norm_quantize`.
SCATTERED = (*_SUMS, *(quantized(first, "sequence_parallel", guard=vectors) for first in _SUMS))
# The same with what others need of it gathered: `reduce_scatter_rms_norm_all_gather` …
GATHERED = tuple(gathered(first, "sequence_parallel", guard=vectors) for first in SCATTERED)
