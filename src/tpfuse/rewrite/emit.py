"""Adding a node to a graph with everything later stages read off it: fake value, layer path, order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._guards import detect_fake_mode

COPIED = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node", "original_aten", "tpfuse_order")


def fake(value: Any) -> Any:
    """The fake tensor, SymInt or constant that stands for a node's argument; lists and tuples are mapped."""
    if isinstance(value, fx.Node):
        return value.meta["val"]
    if isinstance(value, list | tuple):
        return type(value)(fake(v) for v in value)
    return value


def emit(graph: fx.Graph, target: Any, args: Sequence[Any], like: fx.Node) -> fx.Node:
    """Call `target` at the graph's insertion point.  The new node's value is computed by the operator's fake, the rest of
    its metadata is that of `like`, the node that it stands in for."""
    node = graph.call_function(target, tuple(args))
    fakes = fake(tuple(args))
    mode = detect_fake_mode([like.meta.get("val"), *fakes])
    if mode is None:
        raise ValueError(f"no fake values around {like}: tpfuse rewrites graphs that AOTAutograd traced")
    with mode:
        node.meta["val"] = target(*fakes)
    node.meta.update({k: like.meta[k] for k in COPIED if k in like.meta})
    return node
