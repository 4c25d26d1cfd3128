"""What a factor has to be to be the scale of the rows that it scales: max(amax / 448, eps) and its spellings."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tpfuse.formats.scheme import FP8_MAX
from tpfuse.report import Decline
from tpfuse.rewrite.match import (
    DIVS,
    VIEWS,
    aten,
    cast_source,
    constant,
    is_call,
    is_tensor,
    peel_widening,
    reduces_last,
    same,
    tensor,
    times_constant,
)  # fmt: skip

_MOVES = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
_BOUNDS = {
    aten.clamp_min.default: "low", aten.clamp_min.Tensor: "low", aten.maximum.default: "low",
    aten.clamp_max.default: "high", aten.clamp_max.Tensor: "high", aten.minimum.default: "high",
}  # fmt: skip


@dataclass
class Dynamic:
    """A scale computed from the rows that it scales.  of: what the absolute maximum is of.  holder: the node that holds the
    scale, of the dtype it is used in.  options: variants of the scheme."""

    of: fx.Node
    holder: fx.Node
    options: dict[str, Any] = field(default_factory=dict)


def dynamic_scale(factor: Any, divides: bool) -> Dynamic | Decline:
    """The scale of rows that `factor` is, of value / factor or else (not `divides`) of value · factor; or why it is none."""
    unknown = Decline("scale_spelling", "the scale is neither one number nor max(amax / 448, eps) of the rows")
    if not is_tensor(factor):
        return unknown
    options: dict[str, Any] = {}
    node = _moved(factor)
    if not divides:
        scaled = times_constant(node)
        inner = reciprocal_of(node if scaled is None or scaled[1] == 1 else scaled[0])
        if inner is None:
            return _shape_of(factor) or unknown
        node = _moved(inner)
        if scaled is not None and scaled[1] == FP8_MAX:  # x · (448 / amax); the scale itself is another user of amax
            return _inverse(node) or unknown
        options["reciprocal"] = True
    holder = node
    found = _scale(node, options)
    return Dynamic(found, holder, options) if isinstance(found, fx.Node) else (_shape_of(factor) or found or unknown)


def _scale(node: fx.Node, options: dict[str, Any]) -> fx.Node | Decline | None:
    """What the maximum is of, for a node that is the scale; its variants are put into `options`."""
    if is_call(node, aten.exp2.default) and is_call(node.args[0], aten.ceil.default):
        if not is_call(node.args[0].args[0], aten.log2.default):  # type: ignore[union-attr]
            return None
        options.update(log2=True, ue8m0=True)
        node = _moved(node.args[0].args[0].args[0])  # type: ignore[union-attr]
    node, bounds, dtype = _clamps(_narrowest(node))
    if set(bounds) - {"low"}:
        return None
    options["eps"] = bounds.get("low", 0.0)
    if is_tensor(node) and bounds and tensor(_narrowest(node)).dtype != dtype:
        return Decline("scale_spelling", f"the floor of the scale is in {dtype}, the scale in a narrower dtype")
    node = _narrowest(node)
    if not is_call(node, *DIVS) or constant(node.args[1]) != FP8_MAX:
        return None
    options["low_scale"] = tensor(node).dtype != torch.float32
    return _amax(_moved(node.args[0]), tensor(node).dtype, options)


def _amax(node: fx.Node, dtype: torch.dtype, options: dict[str, Any]) -> fx.Node | Decline | None:
    """What amax, perhaps clamped in `dtype`, is the absolute maximum of."""
    node, bounds, clamped = _clamps(node)
    if bounds and clamped != dtype:
        return Decline("scale_spelling", f"amax is clamped in {clamped}, and divided in {dtype}")
    options.update({f"amax_{'min' if side == 'low' else 'max'}": bound for side, bound in bounds.items()})
    node = _narrowest(node)
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.max.dim) and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
    elif not is_call(node, aten.amax.default):
        return None
    of, dims = peel_widening(node.args[0]), node.args[1] if len(node.args) > 1 else None  # type: ignore[arg-type]
    if not is_call(of, aten.abs.default):
        return None
    of = of.args[0]  # type: ignore[assignment]
    if not reduces_last(dims, of):
        return Decline("axis", f"the maximum is over dimensions {dims} of {tensor(of).dim()}, not over the last one")
    return peel_widening(of)


def _clamps(node: fx.Node) -> tuple[fx.Node, dict[str, float], torch.dtype]:
    """What a node is before clamps by constants, their bounds, and the dtype that they are meant in.

    A clamp of a bfloat16 tensor is decomposed into a cast to float32, the clamp and a cast back.
    """
    inner: Any = cast_source(node) if cast_source(node) is not None and narrows(node) else node
    bounds: dict[str, float] = {}
    while (bound := bound_of(inner)) is not None and bound[0] not in bounds:
        bounds[bound[0]] = float(bound[1])
        inner = inner.args[0]
    if cast_source(node) is not None and narrows(node):
        inner = cast_source(inner)
        if not bounds or inner is None or tensor(inner).dtype != tensor(node).dtype:
            return node, {}, tensor(node).dtype
    return _moved(inner), bounds, tensor(node).dtype


def bound_of(node: Any) -> tuple[str, float] | None:
    """("low" or "high", c) of a node that is clamped by the constant c."""
    if is_call(node, *_BOUNDS) and (number := constant(node.args[1])) is not None:
        return _BOUNDS[node.target], number
    return None


def narrows(node: Any) -> bool:
    """Whether a cast may lose bits."""
    source, own = tensor(cast_source(node)).dtype, tensor(node).dtype  # type: ignore[arg-type]
    return torch.promote_types(source, own) != own


def _inverse(amax: fx.Node) -> Dynamic | Decline | None:
    """The scale of a model that multiplies by 448 / amax: another user of amax divides it by 448."""
    options: dict[str, Any] = {"inverse": True, "eps": 0.0}
    of = _amax(amax, torch.float32, options)
    if not isinstance(of, fx.Node):
        return of
    for user in amax.users:
        if is_call(user, *DIVS) and constant(user.args[1]) == FP8_MAX:
            return Dynamic(of, user, options)
    return Decline("scale_spelling", "values are multiplied by 448 / amax, and nothing keeps amax / 448")


def reciprocal_of(node: Any) -> Any:
    """s of 1 / s, a factor of one looked through."""
    if is_tensor(node) and (scaled := times_constant(node)) is not None and scaled[1] == 1:
        node = scaled[0]
    if not is_tensor(node):
        return None
    node = _moved(node)
    return node.args[0] if is_call(node, aten.reciprocal.default) else None


def _narrowest(node: fx.Node) -> fx.Node:
    """The value before widening casts and moves."""
    while (inner := _moved(peel_widening(node))) is not node:
        node = inner
    return node


def _moved(node: Any) -> Any:
    """The value before views that keep every element in its place."""
    while is_call(node, *_MOVES):
        node = node.args[0]
    return node


def _shape_of(factor: fx.Node) -> Decline | None:
    """Why a factor's shape alone rules out a scale of rows."""
    shape = tensor(factor).shape
    if len(shape) and not same(shape[-1], 1):
        return Decline("scale_shape", f"the scale has the shape {list(shape)}: it varies along the last dimension")
    return None
