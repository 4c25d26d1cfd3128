"""Collectives that no rule can reach: inside a custom operator or inside the body of a higher-order operator.  Named, never
touched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import fx

from tpfuse.ir.op import NAMESPACE
from tpfuse.report import Decline, Event
from tpfuse.rewrite.site import site_of
from tpfuse.shim import HigherOrderOperator, OpOverload

_KNOWN = {"aten", "prims", "_c10d_functional", "prim", "inductor", NAMESPACE}
# An argument that names a process group: "group", "group_name", "tp_group", "process_group", "pg" …
_GROUP = re.compile(r"^(\w+_)?(group|group_name|process_group|pg)$")
_GROUP_TYPES = ("str", "__torch__.torch.classes.c10d.ProcessGroup")


def name_opaque_collectives(graph: fx.Graph) -> list[Event]:
    """One declined event, code "opaque_collective", for each operator that hides a collective."""
    return [
        Event("declined", name, site_of(node), reason=Decline("opaque_collective", detail), attributes={"operator": name})
        for node in graph.nodes
        for name, detail in _hidden(node)
    ]


def _hidden(node: fx.Node) -> Iterator[tuple[str, str]]:
    """The operators with a group that a node calls itself or through the operator that wraps it, and the collectives in the
    bodies that it is given."""
    if node.op != "call_function":
        return
    for call in (node.target, *node.args):  # auto_functionalized has the operator for its first argument
        if isinstance(call, OpOverload) and call.namespace not in _KNOWN:
            group = _group_argument(call)
            if group is not None:
                yield _name(call), f"it takes a process group ({group}), so it may hold a collective that rules cannot see"
    if isinstance(node.target, HigherOrderOperator):
        for body in _bodies(node):
            found = sorted({_name(n.target) for n in _calls(body) if getattr(n.target, "namespace", "") == "_c10d_functional"})
            found = [name for name in found if not name.endswith("wait_tensor")]
            if found:
                yield node.target.name(), f"its body holds {', '.join(found)}; compile without it to let rules see them"


def _group_argument(call: OpOverload) -> str | None:
    for argument in call._schema.arguments:
        if _GROUP.match(argument.name) and str(argument.type).removeprefix("Optional[").removesuffix("]") in _GROUP_TYPES:
            return argument.name
    return None


def _bodies(node: fx.Node) -> Iterator[fx.Graph]:
    """The graphs that a higher-order operator runs."""
    for given in node.all_input_nodes:
        if given.op == "get_attr":
            body: Any = getattr(given.graph.owning_module, str(given.target), None)
            if isinstance(body, fx.GraphModule):
                yield body.graph


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node.op == "call_function":
            yield node
            for body in _bodies(node):
                yield from _calls(body)


def _name(call: Any) -> str:
    return call._schema.name.replace("::", ".") if isinstance(call, OpOverload) else str(call)
