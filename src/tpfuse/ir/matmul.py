"""Matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse.ir.op import op
from tpfuse.ir.samples import rows


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[1]])


def _sample(**shape: Any) -> dict[str, Any]:
    width = shape.get("width", 48)
    weight = rows(**{**shape, "tokens": shape["hidden"], "hidden": width, "seed": 3})
    return {"x": rows(**shape), "weight": weight, "bias": rows(**{**shape, "tokens": 1, "hidden": width, "seed": 4})[0]}


@op(sample=_sample, fake=_fake)
def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight (+ bias).  x: [tokens, k].  weight: [k, n].  bias: [n] or None → [tokens, n]."""
    if bias is None:
        return torch.ops.aten.mm.default(x, weight)
    return torch.ops.aten.addmm.default(bias, x, weight)
