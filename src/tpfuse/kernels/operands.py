"""What products next to collectives multiply: rows that are taken apart by ranks and put together again, with their scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpfuse.formats import Layout, Scheme
from tpfuse.formats.layouts import groups_of, remove_layout

from .products import Quantised, Weight, multiply


@dataclass(frozen=True)
class Rows:
    """values: [rows, k].  scales: of quantised rows, [rows, groups] in `layout`, or one number for all rows (`shared`)."""

    values: Tensor
    scales: Tensor | None = None
    shared: bool = False
    layout: str = "row"

    @property
    def moved(self) -> list[Tensor]:
        """What travels with the rows: by rows, scales too."""
        return [self.values] if self.scales is None or self.shared else [self.values, self.scales]

    def part(self, first: int, end: int) -> Rows:
        """Rows `first` to `end`.  Of scales in tiles: `first` at the beginning of one."""
        if self.scales is None or self.shared:
            return replace(self, values=self.values[first:end])
        tile = Layout.parse(self.layout).tile_rows
        return replace(self, values=self.values[first:end], scales=self.scales[first : -(-end // tile) * tile])

    def divisible(self, step: int, scheme: str) -> Rows:
        """The same rows, which `part` may take apart at multiples of `step`: scales in tiles that are not lie by rows."""
        if self.scales is None or self.shared or step % Layout.parse(self.layout).tile_rows == 0:
            return self
        return self.by_rows(scheme)

    def by_rows(self, scheme: str) -> Rows:
        """The same rows, their scales contiguous by rows."""
        if self.scales is None or self.shared:
            return self
        kind, (count, k) = Scheme.parse(scheme), self.values.shape
        groups = groups_of(k if kind.is_fp8 else 2 * k, kind)
        scales = remove_layout(self.scales, count, groups, self.layout).contiguous()
        return replace(self, scales=scales, layout="row" if kind.is_fp8 else "linear")


@dataclass(frozen=True)
class Product:
    """rows @ weight, of `dtype`.  how: of quantised operands."""

    weight: Weight
    dtype: torch.dtype
    how: Quantised | None = None

    @property
    def scheme(self) -> str:
        return self.how.scheme if self.how else ""

    def empty(self, rows: int) -> Tensor:
        """Memory for the result of so many rows."""
        return self.weight.values.new_empty(rows, self.weight.values.shape[1], dtype=self.dtype)

    def like(self, rows: int) -> Tensor:
        """The result's shape and dtype, without memory of its own."""
        return self.empty(1).expand(rows, -1)

    def into(self, out: Tensor, rows: Rows) -> None:
        """On the current stream.  out: [rows, n], contiguous; nothing happens where it has no rows."""
        if out.shape[0]:
            how = self.how and self.how._replace(layout=rows.layout)
            multiply(out, rows.values, self.weight, rows.scales, how)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Rows, Product]:
    """The operands of `matmul`."""
    return Rows(x), Product(Weight(weight, bias=bias), x.dtype)


def quantised(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, result_scale: Tensor | None,
    alpha: Tensor | None, scheme: str, layout: str, weight_layout: str, out_dtype: str, fast_accum: bool, origin: str,
) -> tuple[Rows, Product]:  # fmt: skip
    """The operands of `scaled_matmul`."""
    rows = Rows(x, x_scale, scheme == "fp8_tensor", layout)
    own = Weight(weight, weight_scale, bias, result_scale, alpha)
    return rows, Product(own, getattr(torch, out_dtype), Quantised(scheme, layout, weight_layout, fast_accum))


def operands(args: Any) -> tuple[Rows, Product]:
    """Of either, from its arguments by position."""
    return plain(*args) if len(args) == 3 else quantised(*args)
