"""Checks at the borders of the stages."""

from __future__ import annotations

from torch import Tensor, fx
from torch.fx.node import map_arg

from tpfuse.ir.op import find
from tpfuse.shim import detect_fake_mode


def verify(graph: fx.Graph, stage: str) -> None:
    """AssertionError naming stage and node where the graph is not well formed or a node's value is not what its operator's
    fake says (shape and dtype)."""
    graph.lint()
    for node in graph.nodes:
        op = find(node.target)
        if op is None:
            continue
        args = map_arg(node.args, lambda a: a.meta["val"])
        mode = detect_fake_mode(args)
        assert mode is not None
        with mode:
            expected = node.target(*args)
        pairs = [(expected, node.meta["val"])] if isinstance(expected, Tensor) else zip(expected, node.meta["val"], strict=True)
        for want, have in pairs:
            if tuple(want.shape) != tuple(have.shape) or want.dtype != have.dtype:
                raise AssertionError(
                    f"after {stage}: {node.name} ({op.name}) holds {have.dtype} {list(have.shape)}, its operator gives "
                    f"{want.dtype} {list(want.shape)}"
                )
