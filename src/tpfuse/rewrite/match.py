"""Structural matching over FX nodes: what every raising step must see through, written once."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import SymInt, Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
prims = torch.ops.prims

ADDS = (aten.add.Tensor, aten.add.Scalar)
MULS = (aten.mul.Tensor, aten.mul.Scalar)
DIVS = (aten.div.Tensor, aten.div.Scalar)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


def is_call(value: Any, *targets: Any) -> TypeGuard[fx.Node]:
    """Whether `value` is a node that calls one of `targets`."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def tensor(node: fx.Node) -> Tensor:
    """The fake tensor that stands for a node's value."""
    return node.meta["val"]


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def result_at(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes one value out of a call's results, or None where nobody does."""
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every token count."""
    return a is b or bool(statically_known_true(a == b))


def same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(same(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; the stride of a dimension of size 1 says nothing."""
    return all(same(n, 1) or same(s, t) for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def view_sizes(value: Tensor) -> list[int] | None:
    """A tensor's shape as arguments of a view, one unknown size at most left to be inferred (-1); None where more are unknown."""
    sizes = [-1 if isinstance(n, SymInt) else n for n in value.shape]
    return sizes if sizes.count(-1) <= 1 else None


def arguments(call: fx.Node) -> dict[str, Any]:
    """The arguments of a call of a registered operator by name in the order of its schema, defaults filled in."""
    schema: Any = call.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((a.name for a in schema), call.args, strict=False)), **call.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def contiguous(value: Tensor) -> bool:
    """Whether a tensor lies in memory row by row."""
    return same_strides(value, value.new_empty(value.shape))


def cast_source(node: Any) -> fx.Node | None:
    """The operand of a cast that changes the dtype and nothing else, or None."""
    if is_call(node, prims.convert_element_type.default):
        return node.args[0]
    if is_call(node, aten._to_copy.default) and set(node.kwargs) == {"dtype"}:
        return node.args[0]
    return None


def peel_widening(node: fx.Node) -> fx.Node:
    """The value before casts that lose nothing (bfloat16 or float16 to float32, float32 to float64)."""
    while (source := cast_source(node)) is not None:
        narrow, wide = tensor(source).dtype, tensor(node).dtype
        if narrow not in _FLOATS or wide not in _FLOATS or torch.promote_types(narrow, wide) != wide:
            break
        node = source
    return node


def constant(value: Any) -> float | int | None:
    """A number, written as such or as a tensor of one element filled with it; None for anything else."""
    if isinstance(value, float | int) and not isinstance(value, bool):
        return value
    if is_call(value, aten.full.default) and tensor(value).numel() == 1:
        return constant(value.args[1])
    if is_call(value, aten.scalar_tensor.default):
        return constant(value.args[0])
    return None


def operands(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Both orders of a commutative node's operands."""
    a, b = node.args[:2]
    yield a, b
    yield b, a


def plus_constant(node: Any) -> tuple[fx.Node, float | int] | None:
    """(value, c) of value + c, either way round and without a scaled operand."""
    if is_call(node, *ADDS) and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2:
        for value, number in operands(node):
            if is_tensor(value) and constant(value) is None and (c := constant(number)) is not None:
                return value, c
    return None


def times_constant(node: Any) -> tuple[fx.Node, float | int] | None:
    """(value, c) of value · c, either way round."""
    if is_call(node, *MULS):
        for value, number in operands(node):
            if is_tensor(value) and constant(value) is None and (c := constant(number)) is not None:
                return value, c
    return None


def factors(node: Any) -> list[Any]:
    """The factors of a product of products, widening casts looked through."""
    if isinstance(node, fx.Node) and is_tensor(node):
        node = peel_widening(node)
    if is_call(node, *MULS):
        return [f for a in node.args[:2] for f in factors(a)]
    return [node]


def reduces_last(dims: Any, value: fx.Node) -> bool:
    """Whether a reduction's `dims` are the last dimension of `value` alone."""
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return len(dims) == 1 and dims[0] in (-1, tensor(value).dim() - 1)


def shortest(value: float, dtype: torch.dtype) -> float:
    """The number with the fewest decimal digits that rounds to the same `dtype` value (float32; others keep `value`).

    torch writes an epsilon of 1e-5 as 9.999999747378752e-06: what float32 arithmetic sees of it.
    """
    if dtype != torch.float32:
        return float(value)
    rounded = struct.pack("f", value)
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next(c for c in candidates if struct.pack("f", c) == rounded)


def settled(node: fx.Node) -> fx.Node:
    """The last of the plain copies that follow a value and nothing else uses."""
    user = only_user(node)
    while user is not None and is_call(user, aten.clone.default):
        node, user = user, only_user(user)
    return node
