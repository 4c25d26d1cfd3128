"""Where in the model a node comes from."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import fx

_WRAPPERS = {"_orig_mod", "_modules", "self"}
_REACH = 6  # steps to a neighbour whose path is known


def site_of(node: fx.Node) -> str:
    """The layer path of a node ("model.layers.3.mlp"), from the module stack that Dynamo recorded.

    A node without a stack (a parametrised norm, what a rewrite put in) takes the nearest one before it, then after it; ""
    where there is none.
    """
    return _path(node) or _nearest(node, lambda n: n.all_input_nodes) or _nearest(node, lambda n: list(n.users))


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"^[LG]\[", "", path)  # Dynamo's name for a local or a global variable: L['self']
    return ".".join(p for p in re.findall(r"[A-Za-z_]\w*|\d+", path) if p not in _WRAPPERS)


def _nearest(node: fx.Node, step: Callable[[fx.Node], list[fx.Node]]) -> str:
    layer, seen = [node], {node}
    for _ in range(_REACH):
        layer = list(dict.fromkeys(n for m in layer for n in step(m) if n not in seen))
        seen.update(layer)
        if path := next((p for n in layer if (p := _path(n))), ""):
            return path
    return ""
