"""A linear layer of a stack, quantised or not: spelled in aten where torch has the product, in tpfuse's operators where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpfuse import formats
from tpfuse.ir.matmul import NATIVE, dtype_name
from tpfuse.ir.op import registry

SCHEMES = ("", "fp8_tensor", "fp8_token", "fp8_group128", "nvfp4")
OWN = tuple(scheme for scheme in SCHEMES if scheme and scheme not in NATIVE)  # only tpfuse has the product
LARGEST = 13.0  # of an activation by the static scales: what is larger saturates
E4M3, MOST, BLOCK = torch.float8_e4m3fn, 448.0, 128


class Rows(NamedTuple):
    """What a product reads: rows as they are, without scales; or quantised ones with theirs, a number where one is given."""

    values: Tensor
    scales: Tensor | None = None


class Linear(nn.Module):
    """x @ weightᵀ, a rank's part of it with random weights of variance 1 / cols.

    scheme: "" for none; "fp8_tensor" and "nvfp4" with a given scale of the activations, "fp8_token" with a scale a row of both
    operands, "fp8_group128" with one for 1 × 128 activations and one for 128 × 128 weights.
    """

    def __init__(self, rows: int, cols: int, scheme: str, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.scheme, self.dtype = scheme, dtype
        self.layout = formats.default_layout(scheme) if scheme else ""
        weight = torch.randn(rows, cols, dtype=dtype, device=device) * cols**-0.5
        if not scheme:
            self.weight = _fixed(weight)
            return
        amax = weight.abs().amax().float()
        if scheme == "fp8_group128":
            q, scales = _in_blocks(weight)
        else:
            own = {"fp8_tensor": amax / MOST, "nvfp4": MOST * 6 / amax}.get(scheme)
            q, scales = formats.quantize(weight, own, scheme, self.layout)
            scales = own if scheme == "fp8_tensor" else scales.t() if scheme == "fp8_token" else scales
        assert scales is not None
        self.weight, self.weight_scale = _fixed(q), _fixed(scales)
        given = {"fp8_tensor": LARGEST / MOST, "nvfp4": MOST * 6 / LARGEST}.get(scheme)
        self.given = None if given is None else _fixed(torch.tensor(given, device=device))
        self.alpha = _fixed(amax * LARGEST / (MOST * 6) ** 2) if scheme == "nvfp4" else None

    def quantise(self, x: Tensor) -> Rows:
        """x: [rows, cols] as the product reads it."""
        if not self.scheme:
            return Rows(x)
        if self.scheme in OWN:
            return Rows(*registry["quantize"].default(x, self.given, self.scheme, self.layout))
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / MOST if self.given is None else self.given
        return Rows((wide / scale).clamp(-MOST, MOST).to(E4M3), scale)

    def product(self, rows: Rows) -> Tensor:
        """→ [rows, out] of the layer's dtype."""
        x, scales = rows
        if scales is None:
            return x @ self.weight.t()
        if self.scheme in OWN:
            return registry["scaled_matmul"].default(
                x, self.weight.t(), scales, self.weight_scale, None, None, self.alpha, self.scheme, self.layout, self.layout,
                dtype_name(self.dtype), True,
            )  # fmt: skip
        return torch.ops.aten._scaled_mm.default(x, self.weight.t(), scales, self.weight_scale, None, None, self.dtype, True)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.quantise(x))


def gathered(rows: Rows, whole: Callable[[Tensor], Tensor]) -> Rows:
    """The rows of all ranks from those that a rank keeps, quantised before they are moved; one scale for all is not."""
    scales = rows.scales
    return Rows(whole(rows.values), whole(scales) if scales is not None and scales.dim() else scales)


def _in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 of the weight [n, k], and FP32 scales of its transpose's blocks, [k / 128, ⌈n / 128⌉], stored by columns."""
    n, k = weight.shape
    padded = F.pad(weight, (0, 0, 0, -n % BLOCK)).float().view(-1, BLOCK, k // BLOCK, BLOCK)
    scales = padded.abs().amax((1, 3)) / MOST
    q = (padded / scales[:, None, :, None]).view(-1, k)[:n]
    return q.to(E4M3).contiguous(), scales.t()


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
