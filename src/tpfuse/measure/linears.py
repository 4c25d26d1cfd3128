"""A linear layer of a stack, quantised or not, spelled in aten as torchao spells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tpfuse import formats

SCHEMES = ("", "fp8_tensor", "fp8_token")
GIVEN = 0.03  # the static scale: values up to ±13 before they saturate
E4M3, MOST = torch.float8_e4m3fn, 448.0


class Rows(NamedTuple):
    """What a product reads: rows as they are, without scales; or e4m3 with FP32 scales, [rows, 1] or one number."""

    values: Tensor
    scales: Tensor | None = None


class Linear(nn.Module):
    """x @ weightᵀ, a rank's part of it with random weights of variance 1 / cols.

    scheme: "" for none, "fp8_tensor" (activations with a given scale), "fp8_token" (a scale a row of both operands).
    """

    def __init__(self, rows: int, cols: int, scheme: str, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.scheme, self.dtype = scheme, dtype
        weight = torch.randn(rows, cols, dtype=dtype, device=device) * cols**-0.5
        if not scheme:
            self.weight = _fixed(weight)
            return
        own = weight.abs().amax().float() / MOST if scheme == "fp8_tensor" else None
        q, scales = formats.quantize(weight, own, scheme, "row")
        self.weight = _fixed(q)
        self.weight_scale = _fixed(scales.t() if own is None else own)
        if own is not None:
            self.given = _fixed(torch.tensor(GIVEN, device=device))

    def quantise(self, x: Tensor) -> Rows:
        """x: [rows, cols] as the product reads it."""
        if not self.scheme:
            return Rows(x)
        wide = x.float()
        static = self.scheme == "fp8_tensor"
        scale = self.given if static else wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / MOST
        return Rows((wide / scale).clamp(-MOST, MOST).to(E4M3), scale)

    def product(self, rows: Rows) -> Tensor:
        """→ [rows, out] of the layer's dtype."""
        if rows.scales is None:
            return rows.values @ self.weight.t()
        return torch.ops.aten._scaled_mm.default(
            rows.values, self.weight.t(), rows.scales, self.weight_scale, None, None, self.dtype, True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.quantise(x))


def gathered(rows: Rows, whole: Callable[[Tensor], Tensor]) -> Rows:
    """The rows of all ranks from those that a rank keeps, quantised before they are moved; one scale for all is not."""
    scales = rows.scales
    return Rows(whole(rows.values), whole(scales) if scales is not None and scales.dim() else scales)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
