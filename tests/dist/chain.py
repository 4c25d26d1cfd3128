"""The chain model: relu → all-reduce → norm → products → all-reduce → add + norm → … with four norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpfuse import formats
from tpfuse.ir import registry
from tpfuse.ir.matmul import dtype_name

SCHEMES = ("plain", "gemma", "fp8_tensor", "fp8_token", "fp8_group128", "nvfp4")
_c10d = torch.ops._c10d_functional


class Chain(nn.Module):
    """inner: 0 for one product between norm and all-reduce, else the width between two.  Weights differ from rank to rank.

    Values stay at about 3e-3, where an epsilon of 1e-6 shows; norm weights are away from 1.  dtype float64 gives the exact
    model: the same weights (dequantised), activations not quantised.
    """

    def __init__(self, group: str, rank: int, scheme: str, dtype: torch.dtype, hidden: int, inner: int) -> None:
        super().__init__()
        self.group, self.scheme, self.dtype, self.exact = group, scheme, dtype, False
        self.layout = formats.default_layout(scheme) if self.quantised else "row"
        own = torch.Generator().manual_seed(rank + 1)
        alike = torch.Generator().manual_seed(99)
        shapes = [(hidden, inner), (inner, hidden)] if inner else [(hidden, hidden)]
        self.norms = [(torch.rand(hidden, generator=alike) * 2.75 + 0.25).to(dtype) for _ in range(4)]
        if scheme == "gemma":
            self.norms = [w - 1 for w in self.norms]
        self.layers = [
            [self._weight(torch.randn(k, n, generator=own) * (3e-3 if j == len(shapes) - 1 else 1) / k**0.5)
             for j, (k, n) in enumerate(shapes)]
            for _ in range(3)
        ]  # fmt: skip
        scales = {"fp8_tensor": 0.027, "nvfp4": 448 * 6 / 12}
        self.scale = torch.tensor(scales[scheme]) if scheme in scales else None

    @property
    def quantised(self) -> bool:
        return self.scheme in formats.SCHEME_NAMES

    def _weight(self, weight: Tensor) -> dict[str, Any]:
        """A weight as its users store it, and the exact value of what they store."""
        if not self.quantised:
            return {"weight": weight.to(self.dtype), "exact": weight.to(self.dtype).double()}
        rows = weight.t().contiguous()
        given = {"fp8_tensor": rows.abs().max() / 448, "nvfp4": 448 * 6 / rows.abs().max()}.get(self.scheme)
        layout = "swizzled_128x4" if self.scheme == "nvfp4" else "row"
        q, scales = formats.quantize(rows, given, self.scheme, layout)
        exact = formats.dequantize(q, scales, given, self.scheme, layout).t().double()
        if self.scheme == "nvfp4":
            return {"weight": q.t(), "scale": scales, "given": given, "exact": exact}
        return {"weight": q.t(), "scale": given if self.scheme == "fp8_tensor" else scales.t(), "exact": exact}

    def sum(self, x: Tensor) -> Tensor:
        return _c10d.wait_tensor(_c10d.all_reduce(x, "sum", self.group))

    def norm(self, x: Tensor, i: int) -> Tensor:
        weight = self.norms[i].to(x.dtype)
        if self.scheme == "gemma":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (y * (1.0 + weight.to(wide.dtype))).to(x.dtype)
        return nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)

    def product(self, x: Tensor, part: dict[str, Any]) -> Tensor:
        if self.exact:
            return x @ part["exact"]
        if not self.quantised:
            return x @ part["weight"]
        q, scales = registry["quantize"].default(x, self.scale, self.scheme, self.layout)
        alpha = 1 / (self.scale * part["given"]) if self.scheme == "nvfp4" else None
        return registry["scaled_matmul"].default(
            q, part["weight"], self.scale if self.scheme == "fp8_tensor" else scales, part["scale"], None, None, alpha,
            self.scheme, self.layout, "swizzled_128x4" if self.scheme == "nvfp4" else "row", dtype_name(self.dtype), False,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.sum(torch.relu(x))
        y = self.norm(h, 0)
        for i, products in enumerate(self.layers):
            for j, part in enumerate(products):
                y = self.product(torch.relu(y) if j else y, part)
            h = h + self.sum(y)
            y = self.norm(h, i + 1)
        return y

    def true(self, x: Tensor) -> Tensor:
        """The model in FP64."""
        self.exact = True
        try:
            return self(x.double())
        finally:
            self.exact = False
