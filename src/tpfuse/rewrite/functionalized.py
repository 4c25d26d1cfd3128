"""Calls of engines' operators that write to buffers, as AOTAutograd leaves them: inside auto_functionalized, v1 and v2."""

from __future__ import annotations

from torch import fx

from tpfuse.shim import OpOverload

WRAPPERS = ("auto_functionalized", "auto_functionalized_v2")


def is_wrapped(node: fx.Node) -> bool:
    return getattr(node.target, "_name", None) in WRAPPERS


def overload(node: fx.Node) -> OpOverload | None:
    """The operator that a node calls, also inside auto_functionalized."""
    if node.op != "call_function":
        return None
    target = node.args[0] if is_wrapped(node) else node.target
    return target if isinstance(target, OpOverload) else None


def mutable(target: OpOverload) -> list[str]:
    """The arguments that an operator writes to."""
    return [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def first_buffer(target: OpOverload) -> int:
    """The place of the first buffer among a wrapper's results."""
    return max(1, len(target._schema.returns))
