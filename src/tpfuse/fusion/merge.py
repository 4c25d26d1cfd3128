"""Two all-reduces added together become one: all_reduce(a) + all_reduce(b) → all_reduce(a + b).

A mixture of experts with shared experts (DeepSeek-V3) adds the reduced experts to the reduced shared experts, a layer with
attention and MLP side by side (Cohere, GPT-NeoX) adds both to its residual.  The sum is the same one in another order of
roundings, so the pass changes numerics: each rank rounds a + b once where the sum of the two results was rounded before.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from torch import fx

from tpfuse.fusion.composites import Fuel
from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import emit
from tpfuse.rewrite.match import aten, is_call, is_tensor, only_user, same_shape, tensor
from tpfuse.rewrite.order import ORDER, number_collectives, sort
from tpfuse.rewrite.site import site_of

PASS = "merge_all_reduce"


def merge_all_reduces(graph: fx.Graph, fuel: Fuel = lambda: True) -> list[Event]:
    """Merge the all-reduces of every sum.  Sums are flattened: h + all_reduce(a) + all_reduce(b) merges too."""
    number_collectives(graph)
    events = []
    for root in [n for n in graph.nodes if is_sum(n) and not _is_inner(n)]:
        reduced = [t for t in _terms(root) if is_call(t, registry["all_reduce"].default)]
        declined: Decline | None = None
        while pair := next((p for p in combinations(reduced, 2) if _refusal(*p) is None), None):
            if not fuel():
                break
            new = _merge(graph, *pair)
            reduced = [new, *(t for t in reduced if t not in pair)]
            events.append(Event("fired", PASS, site_of(new), node=new.name))
        else:
            declined = next((r for p in combinations(reduced, 2) if (r := _refusal(*p))), None)
        if declined is not None:
            events.append(Event("declined", PASS, site_of(root), reason=declined, attributes={"operator": "add"}, node=root.name))
    sort(graph)
    return events


def is_sum(node: Any) -> bool:
    """Whether a node adds two values as they are."""
    if not is_call(node, aten.add.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return False
    return len(node.all_input_nodes) == 2 and all(map(is_tensor, node.args))


def _is_inner(node: fx.Node) -> bool:
    """Whether a sum is a term of another one and nothing else."""
    user = only_user(node)
    return user is not None and is_sum(user) and like(user, node)


def _terms(root: fx.Node) -> list[fx.Node]:
    """The terms of a sum of sums, inner sums that something else uses as well taken whole."""
    return [t for a in root.all_input_nodes for t in (_terms(a) if is_sum(a) and _is_inner(a) else [a])]


def like(a: fx.Node, b: fx.Node) -> bool:
    return tensor(a).dtype == tensor(b).dtype and same_shape(tensor(a), tensor(b))


def _refusal(a: fx.Node, b: fx.Node) -> Decline | None:
    """Why two all-reduces of one sum must not be merged."""
    for term in (a, b):
        if len(term.users) != 1:
            names = ", ".join(u.name for u in term.users)
            return Decline("second_user", f"{term.name} is used by {names}, not by the sum alone")
    if a.args[1] != b.args[1]:
        return Decline("group", f"{a.name} and {b.name} are sums over different groups ({a.args[1]}, {b.args[1]})")
    if not like(a, b):
        left, right = tensor(a), tensor(b)
        detail = f"{left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}"
        return Decline("shape", f"{a.name} and {b.name} differ: {detail}")
    return None


def _merge(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    """Put one all-reduce where the later of the two stands; the other's place in the sum falls away."""
    first, last = sorted((a, b), key=lambda n: n.meta[ORDER])
    with graph.inserting_before(last):
        partial = emit(graph, aten.add.Tensor, (first.args[0], last.args[0]), like=last)
        new = emit(graph, registry["all_reduce"].default, (partial, last.args[1]), like=last)
    last.replace_all_uses_with(new)
    graph.erase_node(last)
    (inner,) = first.users
    (other,) = (n for n in inner.args if n is not first)
    outer = only_user(inner)
    inner.replace_all_uses_with(other)  # type: ignore[arg-type]
    graph.erase_node(inner)
    graph.erase_node(first)
    if outer is not None:
        _revalue(outer)
    return new


def _revalue(node: fx.Node) -> None:
    """A sum that lost a term may be smaller than it was, a bias and another one; and so the sums of it alone."""
    while is_call(node, aten.add.Tensor):
        with node.graph.inserting_before(node):
            new = emit(node.graph, aten.add.Tensor, node.args, like=node, kwargs=node.kwargs)
        if like(new, node):
            node.graph.erase_node(new)
            return
        (user,) = node.users
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        node = user
