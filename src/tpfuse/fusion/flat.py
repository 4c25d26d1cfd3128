"""Collectives over rows that a model groups ([batch, seq, hidden]) as collectives over [rows, width], and so what works on own
rows behind a reduce-scatter, that no view stands between a product, its sum and the norm."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx

from tpfuse.fusion.rows import regroups
from tpfuse.ir.op import registry
from tpfuse.rewrite.emit import emit, erase_dead
from tpfuse.rewrite.match import aten, contiguous, is_call, is_tensor, same_shape, tensor, view_sizes

SCATTER, GATHER, NORM, QUANTIZE = (registry[n].default for n in ("reduce_scatter", "all_gather", "rms_norm", "quantize"))


def flatten(graph: fx.Graph) -> None:
    """Take collectives over dimension 0 of [a, b, ..., width], and the sums, norms and quantises behind such a scatter, to
    [rows, width].  Rows keep their order, so nothing changes but shapes."""
    grouped: set[fx.Node] = set()  # views of flat own rows
    for node in [n for n in graph.nodes if is_call(n, SCATTER, GATHER)]:
        x, group, *_ = node.args
        if tensor(x).dim() < 3 or view_sizes(tensor(node)) is None:
            continue
        with graph.inserting_before(node):
            flat = emit(graph, node.target, (_flat(graph, x), group), like=node)
        whole = _replace(graph, node, flat)
        if is_call(flat, SCATTER):
            grouped.add(whole)
        else:
            erase_dead(whole)
    for node in [n for n in graph.nodes if is_call(n, NORM, QUANTIZE, aten.add.Tensor)]:
        rows = node.all_input_nodes if is_call(node, aten.add.Tensor) else [node.args[0]]
        if not any(r in grouped for r in rows) or not all(map(is_tensor, rows)) or node.kwargs:
            continue
        first = tensor(rows[0])
        if view_sizes(first) is None or not all(same_shape(tensor(r), first) and contiguous(tensor(r)) for r in rows):
            continue
        with graph.inserting_before(node):
            flats = {r: _flat(graph, r) for r in rows}
            new = emit(graph, node.target, fx.node.map_arg(node.args, lambda a, flats=flats: flats.get(a, a)), like=node)
        for item in list(node.users) if is_call(node, QUANTIZE) else ():
            with graph.inserting_before(node):
                value = emit(graph, operator.getitem, (new, item.args[1]), like=item)
            if same_shape(tensor(value), tensor(item)):  # scales are of rows, however these are grouped
                item.replace_all_uses_with(value)
                erase_dead(item)
            else:
                grouped.add(_replace(graph, item, value))
        if not is_call(new, QUANTIZE):
            grouped.add(_replace(graph, node, new))
    for view in grouped:
        if not view._erased:
            erase_dead(view)


def _flat(graph: fx.Graph, value: Any) -> fx.Node:
    """Rows as [rows, width], those that a view has grouped as they were before."""
    while regroups(value) and tensor(value).dim() != 2:
        value = value.args[0]
    if tensor(value).dim() == 2:
        return value
    *lead, width = tensor(value).shape
    sizes = [-1, width] if isinstance(width, int) else [math.prod(lead), -1]  # one size at most is no number
    return emit(graph, aten.reshape.default, (value, sizes), like=value)


def _replace(graph: fx.Graph, node: fx.Node, flat: fx.Node) -> fx.Node:
    """Put flat rows in the place of grouped ones, for those who flatten them as they are → the view for all others."""
    with graph.inserting_before(node):
        whole = emit(graph, aten.reshape.default, (flat, view_sizes(tensor(node))), like=node)
    for view in [u for u in node.users if regroups(u) and same_shape(tensor(u), tensor(flat))]:
        view.replace_all_uses_with(flat)
        graph.erase_node(view)
    node.replace_all_uses_with(whole)
    erase_dead(node)
    return whole
