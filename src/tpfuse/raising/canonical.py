"""One form for what models write in many: views folded, no-ops dropped, equal casts and views joined.  Exact."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import emit, erase_dead, substitute
from tpfuse.rewrite.match import (
    SPLITS,
    VIEWS,
    aten,
    is_call,
    is_tensor,
    prims,
    same,
    same_shape,
    same_strides,
    tensor,
    view_sizes,
)
from tpfuse.rewrite.order import bring_before
from tpfuse.shim import OpOverload

_SAME = (*VIEWS, aten.expand.default, aten.alias.default, aten.detach.default)
_NO_OPS = (*_SAME, aten.clone.default, prims.convert_element_type.default, aten._to_copy.default)
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
# What a scale is formed by.
_SCALE = (
    aten.full.default, aten.abs.default, aten.amax.default, aten.div.Tensor, aten.clamp_min.default, aten.clamp_max.default,
    aten.reciprocal.default,
)  # fmt: skip
_JOINED = (*VIEWS, *SPLITS, *_CASTS, aten.permute.default, aten.unsqueeze.default, aten.slice.Tensor, aten.sym_size.int)


def canonicalise(graph: fx.Graph) -> list[Event]:
    """Bring a graph to canonical form."""
    _join(graph)
    for node in list(graph.nodes):
        if node._erased or node.op != "call_function":
            continue
        if is_call(node, *VIEWS) and is_call(node.args[0], *VIEWS):
            node = _fold_view(node)
        if _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            erase_dead(node)
        elif is_call(node, aten.cat.default):
            _fold_split(node)
    _join(graph)
    return []


def _is_no_op(node: fx.Node) -> bool:
    """Whether a node hands on its operand unchanged and nobody can tell the two apart by writing to one."""
    if node.target not in _NO_OPS or not is_tensor(node.args[0]):
        return False
    old, new = tensor(node.args[0]), tensor(node)
    if old.dtype != new.dtype or old.device != new.device or not same_shape(old, new) or not same_strides(old, new):
        return False
    return node.target in _SAME or not _escapes(node)


def _escapes(node: fx.Node) -> bool:
    """Whether a node's memory leaves the graph or is written to."""
    return any(u.op == "output" or u.target is aten.copy_.default or (_is_view(u) and _escapes(u)) for u in node.users)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's result, or one of its results, may lie in the memory of an operand."""
    if node.target in _SAME or node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and any(r.alias_info is not None for r in node.target._schema.returns)


def _fold_view(node: fx.Node) -> fx.Node:
    """A view of a view is a view.  Returns the node that holds the value now."""
    folded = substitute(node, aten.reshape.default, (node.args[0].args[0], node.args[1]))  # type: ignore[union-attr]
    return node if isinstance(folded, Decline) else folded


def _fold_split(cat: fx.Node) -> None:
    """Equal pieces cut along one dimension and joined along another are a reshape where no row moves in memory.

    DTensor moves shards of a dimension other than the first so: around a gather or a scatter over a batch of one.
    """
    pieces, to = cat.args[0], cat.args[1] if len(cat.args) > 1 else 0
    if not all(is_call(p, operator.getitem) for p in pieces):
        return
    split: fx.Node = pieces[0].args[0]
    if not is_call(split, *SPLITS) or [p.args for p in pieces] != [(split, i) for i in range(len(pieces))]:
        return
    x, cut = split.args[0], split.args[2] if len(split.args) > 2 else 0
    whole, part = tensor(x), tensor(pieces[0])
    if len(split.meta["val"]) != len(pieces) or not all(same_shape(part, tensor(p)) for p in pieces):
        return
    cut, to = cut % whole.dim(), to % whole.dim()
    between = part.shape[cut:to] if to > cut else part.shape[to:cut]
    if all(same(n, 1) for n in between) and (sizes := view_sizes(tensor(cat))) is not None:
        substitute(cat, aten.reshape.default, (x, sizes))


def join_quantised(graph: fx.Graph) -> list[Event]:
    """Rows that several linear layers quantise alike, each for itself, are quantised once; their scale is formed once too."""
    _join(graph, (*_JOINED, *_SCALE, registry["quantize"].default))
    return []


def _join(graph: fx.Graph, targets: tuple[Any, ...] = _JOINED) -> None:
    """Join calls of `targets`, results taken out of several, and integer arithmetic that are written twice."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        integer = node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"
        if node.op != "call_function" or not (node.target in targets or integer):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node and not (_is_fresh(node) and (_escapes(node) or _escapes(first))):
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_fresh(node: fx.Node) -> bool:
    """Whether a value has memory of its own: joined, two results of the graph would be one."""
    if node.target in _JOINED:
        return node.target in _CASTS
    return getattr(node.target, "__module__", "") != "_operator"


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    return type(value), value


def hoist_views(graph: fx.Graph) -> list[Event]:
    """A view between an all-reduce and its consumers goes above the all-reduce, if it only regroups rows."""
    all_reduce = registry["all_reduce"].default
    for node in [n for n in graph.nodes if n.target is all_reduce]:
        users = list(node.users)
        view = users[0] if len(users) == 1 and is_call(users[0], *VIEWS) else None
        if view is None or not same(tensor(view).shape[-1], tensor(node).shape[-1]):
            continue
        if bring_before(node, view.args[1], movable=lambda n: not is_tensor(n)):
            with graph.inserting_before(node):
                x = emit(graph, aten.reshape.default, (node.args[0], view.args[1]), like=view)
            if isinstance(substitute(view, all_reduce, (x, node.args[1]), at=node), Decline):
                erase_dead(x)
    return []
