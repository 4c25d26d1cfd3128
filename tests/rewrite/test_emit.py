"""The fake values of nodes that are put into a graph."""

import torch
from torch import Tensor, fx

from tests.raising.capture import trace
from tpfuse.rewrite.emit import emit


def test_an_operator_whose_own_fake_permutes_symbolic_sizes() -> None:
    """As that of cuDNN's attention does in torch 2.11."""
    library = torch.library.Library("tpfuse_test_emit", "DEF")
    library.define("like(Tensor x) -> Tensor")

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape[1], x.shape[0], dtype=x.dtype, device=x.device).permute([1, 0])

    library.impl("like", like, "Meta")
    gm, _ = trace(lambda x: [x.clone()], [torch.empty(24, 8)], 0)
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(gm.graph.output_node()):
        node = emit(gm.graph, torch.ops.tpfuse_test_emit.like.default, (x,), like=x)
    value = node.meta["val"]
    assert isinstance(node, fx.Node) and value.shape == x.meta["val"].shape and value.stride()[0] == 1
    assert not isinstance(value.shape[0], int)
