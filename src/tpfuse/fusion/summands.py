"""What is added between an all-reduce and its residual goes to the residual: h + (all_reduce(x) + y) → (h + y) + all_reduce(x).

A mixture of experts of which one part alone is sharded adds the other, which every rank has whole, before the residual is added
(ExaoneMoE, GraniteMoeHybrid; Granite multiplies both).  The sum is the same one in another order of roundings, so the rewrite
changes numerics.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tpfuse.fusion.composites import Fuel
from tpfuse.fusion.merge import is_sum, like
from tpfuse.ir.op import registry
from tpfuse.report import Event
from tpfuse.rewrite.emit import emit, erase_dead
from tpfuse.rewrite.match import MULS, aten, is_call
from tpfuse.rewrite.order import ORDER, latest_collective, number_collectives
from tpfuse.rewrite.site import site_of

RULE = "summand_to_residual"


def regroup(graph: fx.Graph, fuel: Fuel = lambda: True) -> list[Event]:
    """Take rows that stand beside an all-reduce to the residual that is added behind both and normed.  Fired sites."""
    number_collectives(graph)
    latest, events = latest_collective(graph), []
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if not is_sum(total) or not any(is_call(u, registry["rms_norm"].default) for u in total.users):
            continue
        for x, residual in (total.args, total.args[::-1]):
            found = _beside(x, residual)
            if found is None:
                continue
            reduced, rows, factor = found
            if max(latest[v] for v in (rows, residual)) < reduced.meta[ORDER] and fuel():
                _regroup(total, x, residual, reduced, rows, factor)
                events.append(Event("fired", RULE, site_of(reduced), node=reduced.name))
                break
    return events


def _beside(x: Any, residual: fx.Node) -> tuple[fx.Node, fx.Node, Any] | None:
    """An all-reduce, the rows beside it and the factor of both, where x is that and nothing else uses it."""
    factor = None
    if is_call(x, *MULS) and len(x.users) == 1 and isinstance(x.args[1], float | int):
        x, factor = x.args
    if not is_sum(x) or len(x.users) != 1:
        return None
    for reduced, rows in (x.args, x.args[::-1]):
        alone = is_call(reduced, registry["all_reduce"].default) and len(reduced.users) == 1
        if alone and not is_call(rows, registry["all_reduce"].default) and all(like(v, reduced) for v in (rows, residual)):
            return reduced, rows, factor
    return None


def _regroup(total: fx.Node, x: fx.Node, residual: fx.Node, reduced: fx.Node, rows: fx.Node, factor: Any) -> None:
    graph = total.graph
    with graph.inserting_before(total):
        if factor is not None:
            rows, reduced = (emit(graph, aten.mul.Tensor, (value, factor), like=x) for value in (rows, reduced))
        total.args = emit(graph, aten.add.Tensor, (residual, rows), like=total), reduced
    erase_dead(x)
