"""Adding a node to a graph with everything later stages read off it: fake value, layer path, order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from tpfuse.report import Decline
from tpfuse.rewrite.match import same_shape, same_strides
from tpfuse.rewrite.order import ORDER, is_collective
from tpfuse.shim import detect_fake_mode, enable_python_dispatcher, needs_exact_strides, traced

DECLINE = "tpfuse_decline"  # metadata of a node that was not raised: the Decline that says why
COPIED = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node", "original_aten")


def fake(value: Any) -> Any:
    """The fake tensor, SymInt or constant that stands for a node's argument; lists, tuples and dicts are mapped."""
    if isinstance(value, fx.Node):
        return value.meta["val"]
    if isinstance(value, list | tuple):
        return type(value)(fake(v) for v in value)
    if isinstance(value, dict):
        return {k: fake(v) for k, v in value.items()}
    return value


def emit(
    graph: fx.Graph, target: Any, args: Sequence[Any], like: fx.Node, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """Call `target` at the graph's insertion point.

    Its value is computed by the operator's fake; its layer path, and a collective's place in the program, are those of
    `like`, the node that it stands in for.
    """
    kwargs = dict(kwargs or {})
    node = graph.call_function(target, tuple(args), kwargs)
    fakes = fake(tuple(args))
    mode = detect_fake_mode([like.meta.get("val"), *fakes])
    if mode is None:
        raise ValueError(f"no fake values around {like}: tpfuse rewrites graphs that AOTAutograd traced")
    named = fake(kwargs)
    with mode, enable_python_dispatcher():  # as AOTAutograd traces: not every operator's own fake works elsewhere
        node.meta["val"] = target(*fakes, **named)
    if needs_exact_strides(target):  # without these, Inductor lets the inputs lie in memory as it likes
        node.meta["eager_input_vals"] = (fakes, named)
    handed_on = (*COPIED, ORDER) if is_collective(node) else COPIED
    node.meta.update({k: like.meta[k] for k in handed_on if k in like.meta})
    return node


def substitute(old: fx.Node, target: Any, args: Sequence[Any], at: fx.Node | None = None) -> fx.Node | Decline:
    """Put target(*args) in the place of `old` and erase what nothing uses any more.

    at: the node before which it stands and whose layer path it takes (default `old`).

    Declines with "strides" where the new value would lie otherwise in memory than the old one, with "shape" where its symbolic
    sizes are not known to be the old ones.  RuntimeError where shape or dtype differ: then the rewrite is wrong.
    """
    at = at or old
    with old.graph.inserting_before(at):
        new = emit(old.graph, target, args, like=at)
    was, now = old.meta["val"], new.meta["val"]
    if was.dtype != now.dtype or list(map(traced, was.shape)) != list(map(traced, now.shape)):
        raise RuntimeError(
            f"{old.format_node()} is {was.dtype} {list(was.shape)}, {target} gives {now.dtype} {list(now.shape)}"
        )
    if not same_shape(was, now):
        old.graph.erase_node(new)
        return Decline("shape", f"{old.name} is {list(was.shape)}, {target} gives {list(now.shape)}")
    if not same_strides(was, now):
        old.graph.erase_node(new)
        return Decline("strides", f"{old.name} has strides {tuple(was.stride())}, {target} gives {tuple(now.stride())}")
    old.replace_all_uses_with(new)
    erase_dead(old)
    return new


def erase_dead(node: fx.Node) -> None:
    """Erase a node that nothing uses, and then its inputs likewise.  Impure nodes stay."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and not node.users and not node._erased and not node.is_impure():
            pending += node.all_input_nodes
            node.graph.erase_node(node)
