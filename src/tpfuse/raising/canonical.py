"""One form for what models write in many: views folded, no-ops dropped, equal casts and views joined.  Exact."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import emit, erase_dead, substitute
from tpfuse.rewrite.match import (
    MULS,
    SPLITS,
    VIEWS,
    aten,
    cast_source,
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
_LOW_FLOATS = (torch.bfloat16, torch.float16)
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
        elif node.target in _CASTS:
            _fold_sum(node)
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


def _fold_sum(cast: fx.Node) -> None:
    """Two values cast up, added and cast back are a sum in their own dtype, which is added in FP32 and rounded once."""
    total = cast_source(cast)
    if not is_call(total, aten.add.Tensor) or len(total.users) != 1 or not _is_elementwise(total):
        return
    terms = [cast_source(a) for a in total.args]  # type: ignore[union-attr]
    low = tensor(cast).dtype
    wide = tensor(total).dtype == torch.float32 and all(t is not None and tensor(t).dtype == low for t in terms)
    if low in _LOW_FLOATS and wide:
        substitute(cast, aten.add.Tensor, terms)


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
    """A view that only regroups rows goes above the all-reduce whose result it takes, and above sums and products with one."""
    pending = [n for n in graph.nodes if is_call(n, *VIEWS)]
    while pending:
        view = pending.pop()
        source: Any = view.args[0]
        regrouped = _regrouped(source, view.args[1])
        if not regrouped or len(source.users) != 1 or not same(tensor(view).shape[-1], tensor(source).shape[-1]):
            continue
        if not bring_before(source, view.args[1], movable=lambda n: not is_tensor(n)):  # type: ignore[arg-type]
            continue
        with graph.inserting_before(source):
            views = {t: emit(graph, aten.reshape.default, (t, sizes), like=view) for t, sizes in regrouped.items()}
        args = fx.node.map_arg(source.args, lambda a, views=views: views.get(a, a))
        if isinstance(substitute(view, source.target, args, at=source), Decline):
            for unused in views.values():
                erase_dead(unused)
        else:
            pending += views.values()
    return []


def _regrouped(node: Any, sizes: Any) -> dict[fx.Node, list[Any]]:
    """The operands that are regrouped in place of an all-reduce, or of a sum or product with one, and their sizes then.  Numbers
    and vectors stay."""
    if is_call(node, registry["all_reduce"].default):
        return {node.args[0]: sizes}
    if not _is_elementwise(node) or not any(_holds_all_reduce(a) for a in node.all_input_nodes):
        return {}
    found, whole = {}, tensor(node)
    for a in node.all_input_nodes:
        shape = tensor(a).shape
        if same_shape(tensor(a), whole):
            found[a] = sizes
        elif len(shape) == whole.dim() and same(shape[-1], 1) and all(map(same, shape[:-1], whole.shape[:-1])):  # by row
            found[a] = [*sizes[:-1], 1]
        elif len(shape) > 1:
            return {}
    return found


def _is_elementwise(node: Any) -> bool:
    return is_call(node, aten.add.Tensor, *MULS) and not node.kwargs and all(map(is_tensor, node.all_input_nodes))


def _holds_all_reduce(node: fx.Node) -> bool:
    """Whether a value that nothing else takes is an all-reduce, or formed by sums and products of one."""
    if len(node.users) != 1:
        return False
    own = _is_elementwise(node) and any(_holds_all_reduce(a) for a in node.all_input_nodes)
    return own or is_call(node, registry["all_reduce"].default)
