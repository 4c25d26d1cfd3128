"""A factor between an all-reduce and its norm goes above the all-reduce: all_reduce(x) · c → all_reduce(x · c).

Granite and Gemma scale their embedding, which is an all-reduce where the vocabulary is shared out, before the first norm: by a
constant, or by a buffer of one element.  The sum is the same one in another order of roundings, so the rewrite changes numerics:
each rank rounds x · c where the sum was rounded.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tpfuse.fusion.composites import Fuel
from tpfuse.ir.op import registry
from tpfuse.report import Event
from tpfuse.rewrite.emit import emit
from tpfuse.rewrite.match import MULS, cast_source, is_call, is_tensor, only_user, tensor
from tpfuse.rewrite.order import number_collectives
from tpfuse.rewrite.site import site_of

PASS = "all_reduce_norm"  # the rules of this pass find what it uncovers
RULE = "scale_before_all_reduce"


def hoist_scales(graph: fx.Graph, fuel: Fuel = lambda: True) -> list[Event]:
    """Bring every factor that keeps an all-reduce from its norm before the all-reduce.  Fired sites."""
    number_collectives(graph)
    all_reduce, rms_norm = registry["all_reduce"].default, registry["rms_norm"].default
    events = []
    for node in graph.find_nodes(op="call_function", target=all_reduce):
        product = only_user(node)
        if product is None or not is_call(product, *MULS) or not any(u.target is rms_norm for u in product.users):
            continue
        factor = next((a for a in product.args if _is_factor(a)), None)
        if factor is None or not fuel():
            continue
        if isinstance(factor, fx.Node) and cast_source(factor) is not None:
            node.prepend(factor)
        with graph.inserting_before(node):
            scaled = emit(graph, product.target, (node.args[0], factor), like=product)
            new = emit(graph, all_reduce, (scaled, node.args[1]), like=node)
        product.replace_all_uses_with(new)
        graph.erase_node(product)
        graph.erase_node(node)
        events.append(Event("fired", RULE, site_of(new), attributes={"factor": str(factor)}, node=new.name))
    return events


def _is_factor(value: Any) -> bool:
    """Whether a value is one number that all ranks share: a constant, or a graph input of one element, cast or not.  Graph
    inputs that meet reduced rows are the same on every rank, as norm weights are."""
    if not is_tensor(value):
        return isinstance(value, float)
    source = cast_source(value) or value
    return tensor(value).dim() == 0 and source.op == "placeholder"
