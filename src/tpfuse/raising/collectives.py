"""Functional collectives with their waits → tpfuse.all_reduce, reduce_scatter, all_gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE, emit, erase_dead
from tpfuse.rewrite.match import aten, is_call, only_user, same_strides, tensor
from tpfuse.rewrite.site import site_of

c10d = torch.ops._c10d_functional
_RULES = {"reduce_scatter_tensor": "reduce_scatter", "all_gather_into_tensor": "all_gather"}


def raise_collectives(graph: fx.Graph) -> list[Event]:
    """Raise every sum, scatter of a sum and gather; the operator stands where the collective was launched."""
    events = []
    for node in list(graph.nodes):
        if getattr(node.target, "namespace", "") != "_c10d_functional" or is_call(node, c10d.wait_tensor.default):
            continue
        declined = _raise(graph, node)
        if declined is not None:
            node.meta[DECLINE] = declined
            name: str = node.target._schema.name.split("::")[1]
            events.append(Event("declined", _RULES.get(name, name), site_of(node), reason=declined))
    return events


def _raise(graph: fx.Graph, node: fx.Node) -> Decline | None:
    """Raise one collective, or say why not."""
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if "coalesced" in name:
        return Decline("coalesced", f"{name} moves several tensors at once")
    if node.target not in (
        c10d.all_reduce.default,
        c10d.reduce_scatter_tensor.default,
        c10d.all_gather_into_tensor.default,
    ):
        return Decline("collective_kind", f"there is no operator for {name}")
    x, group = node.args[0], node.args[-1]
    if name != "all_gather_into_tensor" and node.args[1] != "sum":
        return Decline("reduce_op", f"the ranks' values are combined by {node.args[1]}, not by their sum")
    wait = only_user(node)
    if wait is None or not is_call(wait, c10d.wait_tensor.default):
        users = ", ".join(u.name for u in node.users) or "nothing"
        return Decline("unwaited", f"the result is used before it was waited for (by {users})")
    if not isinstance(group, str):
        return Decline("group", f"the group is not named in the graph ({group})")
    views = _undone(x, wait)
    if views:
        x = x.args[0]  # type: ignore[union-attr]
    target = registry[_RULES.get(name, name)].default
    with graph.inserting_before(node):
        new = emit(graph, target, (x, group), like=node)
    if not same_strides(tensor(views[0] if views else wait), tensor(new)):
        graph.erase_node(new)
        return Decline("strides", f"the collective keeps the strides {tuple(tensor(wait).stride())} of its input")
    for old in (*views, wait):
        old.replace_all_uses_with(new)
        graph.erase_node(old)  # by hand: a wait counts as impure
    source = node.args[0]
    graph.erase_node(node)
    erase_dead(source)  # type: ignore[arg-type]
    return None


def _undone(x: Any, wait: fx.Node) -> list[fx.Node]:
    """The views of a gather's result that undo a view of its rows as bytes, where everybody takes it so: models move FP8 as
    bytes, since not every back end moves it."""
    if not is_call(x, aten.view.dtype):
        return []
    dtype, users = tensor(x.args[0]).dtype, list(wait.users)
    back = dtype.itemsize == tensor(x).dtype.itemsize and all(is_call(u, aten.view.dtype) and u.args[1] == dtype for u in users)
    return users if back else []
