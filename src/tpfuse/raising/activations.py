"""silu(gate) · up and gelu_tanh(gate) · up, as torch decomposes them → tpfuse.act_and_mul."""

from __future__ import annotations

import torch
from torch import fx

from tpfuse.ir.op import registry
from tpfuse.report import Event
from tpfuse.rewrite.emit import substitute
from tpfuse.rewrite.match import (
    aten,
    cast_source,
    is_call,
    is_tensor,
    only_user,
    operands,
    peel_widening,
    plus_constant,
    same_shape,
    tensor,
    times_constant,
)


def raise_activations(graph: fx.Graph) -> list[Event]:
    """Raise every product of an activation with an operand of its shape."""
    for node in list(graph.nodes):
        gate, act = _silu(node), "silu"
        if gate is None:
            gate, act = _gelu_tanh(node), "gelu_tanh"
        if gate is not None:
            _raise(node, gate, act)
    return []


def _raise(activated: fx.Node, wide: fx.Node, act: str) -> None:
    """activated: act(wide), in FP32 at least."""
    gate = peel_widening(wide)
    if tensor(wide).dtype != torch.promote_types(tensor(gate).dtype, torch.float32):
        return
    if gate is not wide:  # the body rounds the activation to the gate's dtype
        rounded = only_user(activated)
        if rounded is None or cast_source(rounded) is None or tensor(rounded).dtype != tensor(gate).dtype:
            return
        activated = rounded
    product = only_user(activated)
    if not is_call(product, aten.mul.Tensor):
        return
    up = next(b for a, b in operands(product) if a is activated)  # type: ignore[arg-type]
    if is_tensor(up) and same_shape(tensor(gate), tensor(up)):
        substitute(product, registry["act_and_mul"].default, (gate, up, act))  # type: ignore[arg-type]


def _silu(node: fx.Node) -> fx.Node | None:
    """x of x / (exp(-x) + 1)."""
    if not is_call(node, aten.div.Tensor) or not is_tensor(node.args[0]):
        return None
    x, shifted = node.args[0], plus_constant(node.args[1])
    if shifted is None or shifted[1] != 1 or not is_call(shifted[0], aten.exp.default):
        return None
    negated = shifted[0].args[0]
    return x if is_call(negated, aten.neg.default) and negated.args[0] is x else None  # type: ignore[union-attr,return-value]


def _gelu_tanh(node: fx.Node) -> fx.Node | None:
    """x of (0.5·x) · (tanh(0.7978845608028654 · (x + 0.044715·((x·x)·x))) + 1)."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for half, rest in operands(node):
        halved, shifted = times_constant(half), plus_constant(rest)
        if halved is None or shifted is None or halved[1] != 0.5 or shifted[1] != 1 or not is_call(shifted[0], aten.tanh.default):
            continue
        x, scaled = halved[0], times_constant(shifted[0].args[0])
        if scaled is not None and scaled[1] == 0.7978845608028654 and _is_cubic(scaled[0], x):
            return x
    return None


def _is_cubic(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is x + 0.044715·((x·x)·x)."""
    if not is_call(node, aten.add.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return False
    for linear, cubic in operands(node):
        scaled = times_constant(cubic)
        if linear is x and scaled is not None and scaled[1] == 0.044715 and is_call(scaled[0], aten.mul.Tensor):
            return any(b is x and is_call(a, aten.mul.Tensor) and a.args[:2] == (x, x) for a, b in operands(scaled[0]))
    return False
