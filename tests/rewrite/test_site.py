"""Layer paths, from what Dynamo writes and from neighbours."""

from typing import Any

import pytest
import torch
from torch import fx

from tpfuse.rewrite.site import site_of

PATHS = {
    "L['self'].model.layers.3.mlp": "model.layers.3.mlp",
    "L['self']._modules['model']._modules['layers']._modules['3'].mlp": "model.layers.3.mlp",
    "L['self'].model.layers[3].mlp": "model.layers.3.mlp",
    "L['self']._orig_mod.model.norm": "model.norm",
    "G['draft'].layers.0": "draft.layers.0",
    "L['self']": "",
}


def chain(*paths: str | None) -> list[fx.Node]:
    graph = fx.Graph()
    node = graph.placeholder("x")
    nodes = []
    for path in paths:
        node = graph.call_function(torch.ops.aten.neg.default, (node,))
        stack: dict[str, Any] = {"0": ("L['self']", object), "1": (path, object)}
        if path is not None:
            node.meta["nn_module_stack"] = stack
        nodes.append(node)
    return nodes


@pytest.mark.parametrize("path", PATHS)
def test_path(path: str) -> None:
    (node,) = chain(path)
    assert site_of(node) == PATHS[path]


def test_neighbours() -> None:
    before, between, after = chain("L['self'].a", None, "L['self'].b")
    assert site_of(between) == "a"
    alone, last = chain(None, "L['self'].b")
    assert site_of(alone) == "b" and not site_of(chain(None)[0])
    assert site_of(before) == "a" and site_of(after) == "b"
