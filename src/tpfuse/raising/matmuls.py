"""Matrix products → tpfuse.matmul."""

from __future__ import annotations

from torch import fx

from tpfuse.ir.op import registry
from tpfuse.report import Event
from tpfuse.rewrite.emit import substitute
from tpfuse.rewrite.match import aten, is_call, tensor


def raise_matmuls(graph: fx.Graph) -> list[Event]:
    """Raise x @ w, and x @ w + b with a bias of one number a column; an addmm that scales either term stays."""
    matmul = registry["matmul"].default
    for node in list(graph.nodes):
        if is_call(node, aten.mm.default):
            substitute(node, matmul, (*node.args, None))
        elif is_call(node, aten.addmm.default):
            bias, x, weight = node.args
            if tensor(bias).dim() == 1 and node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1:
                substitute(node, matmul, (x, weight, bias))
    return []
