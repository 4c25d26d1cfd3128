"""Where in the model a node comes from."""

from __future__ import annotations

import re

from torch import fx

_WRAPPERS = {"_orig_mod", "_modules", "self", "L"}


def site_of(node: fx.Node) -> str:
    """The layer path of a node ("model.layers.3.mlp"), from the module stack that Dynamo recorded; "" where there is none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    parts = re.findall(r"[A-Za-z_]\w*|\d+", path)
    return ".".join(p for p in parts if p not in _WRAPPERS)
