"""All-reduces go behind what is linear in their result, to the sum that they are a term of.

    all_reduce(x) · gate + …       → all_reduce(x · gate) + …        shared experts behind a gate (Qwen2-MoE, Qwen3-Next)
    all_reduce(x).sum(0) + …       → all_reduce(x.sum(0)) + …        experts that are added after they were reduced

There they are merged with others of the sum, and find the residual and the norm.  A gate is a number for each row, taken to be
the same on all ranks, as the residual is that the product goes to.  The result is the same one in another order of roundings, so
the rewrite changes numerics.
"""

from __future__ import annotations

from torch import fx

from tpfuse.fusion.composites import Fuel
from tpfuse.ir.op import registry
from tpfuse.report import Event
from tpfuse.rewrite.emit import emit, erase_dead
from tpfuse.rewrite.match import MULS, aten, is_call, is_tensor, only_user, same, same_shape, tensor
from tpfuse.rewrite.order import ORDER, latest_collective, number_collectives
from tpfuse.rewrite.site import site_of

RULE = "delay_all_reduce"


def delay(graph: fx.Graph, fuel: Fuel = lambda: True) -> list[Event]:
    """Bring every all-reduce behind a gate or a sum that nothing but a sum of rows takes.  Fired sites."""
    number_collectives(graph)
    all_reduce, latest, events = registry["all_reduce"].default, latest_collective(graph), []
    for node in graph.find_nodes(op="call_function", target=all_reduce):
        user = only_user(node)
        total = None if user is None else only_user(user)
        if user is None or total is None or not is_call(total, aten.add.Tensor) or not _is_linear(user, node, latest):
            continue
        if not fuel():
            break
        with graph.inserting_before(user):
            args = [node.args[0] if a is node else a for a in user.args]
            new = emit(graph, all_reduce, (emit(graph, user.target, args, like=user), node.args[1]), like=node)
        user.replace_all_uses_with(new)
        erase_dead(user)
        events.append(Event("fired", RULE, site_of(new), attributes={"behind": user.target.__name__}, node=new.name))  # type: ignore
    return events


def _is_linear(user: fx.Node, reduced: fx.Node, latest: dict[fx.Node, int]) -> bool:
    """Whether `user` may come before the all-reduce: a sum over dimensions, or a product with a number or with a gate in which no
    later collective has a part."""
    if is_call(user, aten.sum.dim_IntList):
        return not user.kwargs
    if not is_call(user, *MULS) or user.kwargs:
        return False
    (factor,) = [a for a in user.args if a is not reduced] or [reduced]
    if not is_tensor(factor):
        return isinstance(factor, float | int)
    gate, rows = tensor(factor), tensor(reduced)
    by_row = gate.dim() == rows.dim() and same(gate.shape[-1], 1) and same_shape(gate[..., 0], rows[..., 0])
    return by_row and gate.dtype == rows.dtype and latest[factor] < reduced.meta[ORDER]  # type: ignore[index]
