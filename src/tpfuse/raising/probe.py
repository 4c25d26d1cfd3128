"""Telling what a piece of a graph computes by running it: for bit tricks and data movement, which have endless spellings.

A piece is what lies between one tensor and one value that depends on that tensor alone.  It is run on a small real tensor
of every number that could tell two such functions apart, for two row counts where rows are symbolic.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.node import map_arg

from tpfuse import shim
from tpfuse.rewrite.match import is_tensor, tensor
from tpfuse.shim import OpOverload

_PURE = ("aten", "prims")


def piece(start: fx.Node, end: fx.Node) -> list[fx.Node] | None:
    """The nodes between `start` and `end`, in order; None where `end` depends on other tensors, or on none at all."""
    inside: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in inside or node is start or isinstance(node.meta.get("val"), SymInt):
            continue
        if node.op != "get_attr" and not _is_pure(node):
            return None
        inside.add(node)
        pending += node.all_input_nodes
    if start is end or not any(start in node.all_input_nodes for node in inside):
        return None
    return [node for node in start.graph.nodes if node in inside]


def reachable(start: fx.Node, limit: int = 200) -> list[fx.Node]:
    """The pure tensor nodes after `start` that depend on it, in graph order, the first `limit`."""
    found, members = [start], {start}
    node = start.next
    while node.op != "output" and len(found) < limit:
        if _is_pure(node) and any(i in members for i in node.all_input_nodes):
            found.append(node)
            members.add(node)
        node = node.next
    return [n for n in found[1:] if is_tensor(n)]


def size_for(size: Any, symbols: int) -> int:
    """A size with every symbol standing for `symbols`."""
    if isinstance(size, SymInt):
        return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, symbols)))
    return size


def sizes_for(node: fx.Node, symbols: int) -> list[int]:
    """The shape of a node's value with every symbol standing for `symbols`."""
    return [size_for(n, symbols) for n in tensor(node).shape]


def run(nodes: list[fx.Node], start: fx.Node, value: Tensor, symbols: int) -> Tensor | None:
    """The last node's value on CPU for this value of `start`; None where the sizes do not fit one another."""
    values: dict[fx.Node, Any] = {start: value}

    def real(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        return size_for(argument.meta["val"], symbols)

    try:
        for node in nodes:
            if node.op == "get_attr":
                held = getattr(node.graph.owning_module, str(node.target))
                values[node] = held.detach().cpu()
                continue
            args, kwargs = map_arg((node.args, dict(node.kwargs)), real)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:
        return None
    return values[nodes[-1]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = (t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def agrees(start: fx.Node, end: fx.Node, check: Callable[[list[fx.Node], int], bool | None]) -> bool:
    """Whether `end` depends on `start` alone and check(nodes between, symbols) holds for two numbers of symbols.

    check answers None where the piece cannot run for a number: a graph may be made for some token counts only.
    """
    nodes = piece(start, end)
    if nodes is None:
        return False
    symbolic = any(isinstance(n, SymInt) for n in tensor(start).shape)

    def answer(count: int) -> bool | None:
        try:
            return check(nodes, count)
        except ZeroDivisionError:  # a size is divided by another that this number makes nothing of
            return None

    with shim.real_tensors():
        answers = (answer(count) for count in ((5, 131, 128, 32) if symbolic else (1,)))
        seen = list(itertools.islice((a for a in answers if a is not None), 2))
    return bool(seen) and all(seen)


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    return isinstance(target, OpOverload) and target.namespace in _PURE and not target._schema.is_mutable
