"""Calls of the norm operators as data: what every kernel of the family needs, whatever its algorithm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tpfuse.formats import Layout, Scheme, quantize_fake
from tpfuse.ir import fused, registry
from tpfuse.ir.norm import Rounding

from .rows import DYNAMIC, NO_SCHEME, NVFP4, TENSOR

ALL_REDUCES = tuple(op.name for op in fused.ALL_REDUCES)
NO_QUANTISE: dict[str, Any] = {
    "SCHEME": NO_SCHEME.value, "GROUP": 1, "INVERT": False, "FLOOR": 0.0, "LOW": 0.0, "HIGH": math.inf, "POW2": False,
    "PACKED": False, "TILE": 1,
}  # fmt: skip


class Outputs(NamedTuple):
    """Results of the family; those nobody wants are empty."""

    q: Tensor
    scales: Tensor
    norm: Tensor
    reduced: Tensor  # what the norm was taken of: the sum, with bias, alpha and residual


@dataclass(frozen=True)
class NormCall:
    """h = residual + alpha * (sum of x + bias), norm of h, quantised; `alive`: which of `Outputs` are wanted.

    x, residual: [..., hidden], one dtype.  With `sandwich`: h = residual + norm(sum of x), then a norm by weight2, eps2,
    rounding2.
    """

    operator: str
    x: Tensor
    alive: tuple[bool, bool, bool, bool]
    weight: Tensor | None
    eps: float
    weight_bias: float
    rounding: str
    group: str = ""
    residual: Tensor | None = None
    bias: Tensor | None = None
    alpha: float = 1.0
    weight2: Tensor | None = None
    eps2: float = 0.0
    rounding2: str = "cast_first"
    sandwich: bool = False
    scale: Tensor | None = None
    scheme: str = ""
    layout: str = ""

    @property
    def quantised(self) -> bool:
        return bool(self.scheme) and (self.alive[0] or self.alive[1])

    @property
    def keeps_f32(self) -> bool:
        """Whether the norm that is returned stays in FP32."""
        return Rounding.parse(self.rounding2 if self.sandwich else self.rounding).keep_f32

    def outputs(self) -> Outputs:
        x = self.x
        q, scales = quantize_fake(x, self.scheme, self.layout) if self.quantised else (x.new_empty(0), x.new_empty(0))
        dtype = torch.float32 if self.keeps_f32 else x.dtype
        norm = x.new_empty(x.shape if self.alive[2] else (0,), dtype=dtype)
        return Outputs(q, scales, norm, x.new_empty(x.shape if self.alive[3] else (0,)))

    def results(self, outputs: Outputs) -> tuple[Tensor, ...]:
        """The operator's tuple."""
        return tuple(outputs) if self.scheme else (outputs.norm, outputs.reduced)

    def given(self) -> tuple[Tensor | None, ...]:
        """residual, bias, weight, weight2, scale as kernels read them: the scale is one number, wherever it lies."""
        small = (None if t is None else vectors_of(t) for t in (self.bias, self.weight, self.weight2))
        return None if self.residual is None else rows_of(self.residual), *small, self.scale

    def operands(self, x: Tensor, outputs: Outputs) -> tuple[Tensor, ...]:
        """The Triton kernels' pointers after x; `x` itself stands in for those that are absent."""
        q, scales = quantised_views(outputs.q, outputs.scales, self.scheme)
        return *(x if t is None else t for t in self.given()), outputs.norm, outputs.reduced, q, scales

    def numbers(self, outputs: Outputs) -> tuple[int | float, ...]:
        return *scale_strides(outputs.scales), self.alpha, self.eps, self.eps2, self.weight_bias

    def flags(self, block: int) -> dict[str, Any]:
        """Compile-time constants for rows of `block` columns."""
        scheme = scheme_constants(self.scheme, self.layout, block) if self.quantised else NO_QUANTISE
        return {
            "RESIDUAL": self.residual is not None, "BIAS": self.bias is not None, "ALPHA": self.alpha != 1.0,
            "WEIGHT": self.weight is not None, "WEIGHT2": self.weight2 is not None, "SANDWICH": self.sandwich,
            "NORM": self.alive[2], "REDUCED": self.alive[3], "GIVEN": self.quantised and self.scale is not None,
            **scheme,
        }  # fmt: skip


Call = TypeVar("Call", bound=NormCall)


def call_of(kind: type[Call], operator: str, args: Sequence[Any], alive: tuple[bool, ...], **more: Any) -> Call:
    """The call of an operator with its arguments in order, whose fields have their names.  alive: of its own results."""
    op = registry[operator]
    given = {name: value for name, value in zip(op.params, args, strict=True) if name in kind.__dataclass_fields__}
    if "scheme" not in given:
        alive = (False, False, *alive)
    return kind(operator, alive=alive, sandwich="weight2" in given, **given, **more)


def launchers(run: Callable[[NormCall], tuple[Tensor, ...]]) -> Callable[[str], Callable[..., Any]]:
    """The `__getattr__` of a module of kernels: what the registry launches for an all-reduce with a norm behind it, by the
    operator's name; called with its arguments by position and `alive` → its results."""

    def launcher(name: str) -> Callable[..., Any]:
        if name not in ALL_REDUCES:
            raise AttributeError(f"no kernel is named {name!r}")
        return lambda *args, alive: run(call_of(NormCall, name, args, alive))

    return launcher


@functools.cache
def scheme_constants(scheme: str, layout: str, block: int) -> dict[str, Any]:
    """The compile-time constants of `rows.quantise_row` for rows of `block` columns; not to be written to."""
    what, where = Scheme.parse(scheme).meaning(), Layout.parse(layout)
    kind = NVFP4 if not what.is_fp8 else DYNAMIC if what.is_dynamic else TENSOR
    return {
        "SCHEME": kind.value, "GROUP": what.group or block, "INVERT": what.mul or what.div, "FLOOR": float(what.floor),
        "LOW": float(what.amax_min or 0.0), "HIGH": math.inf if what.amax_max is None else float(what.amax_max),
        "POW2": where.power_of_two, "PACKED": where.ue8m0_packed, "TILE": where.tile_rows,
    }  # fmt: skip


def quantised_views(q: Tensor, scales: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """NVFP4's bytes as int8, which is how the kernels write them."""
    if scheme and q.dtype == torch.uint8:
        return q.view(torch.int8), scales.view(torch.int8)
    return q, scales


def scale_strides(scales: Tensor) -> tuple[int, int]:
    return (scales.stride(0), scales.stride(1)) if scales.dim() == 2 else (0, 0)


def rows_of(x: Tensor) -> Tensor:
    """[..., hidden] -> [tokens, hidden], contiguous and 16-byte aligned; a copy only where it is not."""
    return vectors_of(x.reshape(-1, x.shape[-1]))


def vectors_of(x: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned; a copy only where it is not."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
