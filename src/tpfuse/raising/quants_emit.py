"""Putting tpfuse.quantize in the place of a spelled quantisation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, fx

from tpfuse.formats import Scheme
from tpfuse.ir.op import registry
from tpfuse.report import Decline
from tpfuse.rewrite.emit import emit, erase_dead
from tpfuse.rewrite.match import (
    VIEWS,
    aten,
    constant,
    is_call,
    is_tensor,
    prims,
    same,
    same_shape,
    same_strides,
    tensor,
    view_sizes,
)

_BYTES = (torch.uint8, torch.int32, torch.float4_e2m1fn_x2)


def emit_quantize(old: Sequence[fx.Node], x: fx.Node, scale: Any, scheme: Scheme, layout: str) -> tuple[fx.Node, fx.Node]:
    """Quantise x before the first of `old`, the nodes that hold the results so far, the quantised values first → (q, scales).

    scale: None, a tensor of one element, or a number.
    """
    graph, like = old[0].graph, old[0]
    x = rows_of(x)
    with graph.inserting_before(next(n for n in graph.nodes if n in old)):
        if scale is not None:
            scale = _scale_tensor(graph, scale, like, tensor(x).device)
        node = emit(graph, registry["quantize"].default, (x, scale, str(scheme), layout), like=like)
        q, scales = (emit(graph, operator.getitem, (node, i), like=like) for i in range(2))
        return q, scales


def finish(q: fx.Node, scales: fx.Node, old: Sequence[fx.Node], x: fx.Node) -> Decline | None:
    """Let the results stand for `old`, the quantised values first.  A Decline where those cannot take its shape.

    Where only the scales cannot, the model's own stay beside the quantisation.
    """
    declined = put(old[0], q, x)
    if declined is None and len(old) > 1:
        put(old[1], scales, x)
    for result in (q, scales):
        erase_dead(result)
    return declined


def rows_of(x: Any) -> Any:
    """What rows were before views that regroup them and keep the last dimension: quantising takes them in any form."""
    while is_call(x, *VIEWS) and same(tensor(x).shape[-1], tensor(x.args[0]).shape[-1]):  # type: ignore[arg-type]
        x = x.args[0]
    return x


def put(old: fx.Node, new: fx.Node, x: fx.Node, at: fx.Node | None = None) -> Decline | None:
    """Let `new`, reshaped and cast as `old` is, stand for `old`, and erase `old`.

    x: where symbolic sizes are read off.  at: where to insert what reshapes (default `old`).

    Declines, leaving `old` as it is, where shapes cannot be written down or strides differ.
    """
    graph, was = old.graph, tensor(old)
    for view in [u for u in old.users if is_call(u, *VIEWS) and tensor(u).dtype == tensor(new).dtype]:
        if same_shape(tensor(view), tensor(new)) and same_strides(tensor(view), tensor(new)):
            view.replace_all_uses_with(new)
            graph.erase_node(view)
    if not old.users:
        erase_dead(old)
        return None
    with graph.inserting_before(at or old):
        if _is_bits(was.dtype, tensor(new).dtype):
            new = emit(graph, aten.view.dtype, (new, was.dtype), like=old)
        if not same_shape(was, tensor(new)):
            sizes = _sizes(old, x)
            if sizes is None:
                erase_dead(new)
                return Decline("shape", f"the shape {list(was.shape)} of {old.name} has several unknown sizes")
            new = emit(graph, aten.reshape.default, (new, sizes), like=old)
        if was.dtype != tensor(new).dtype:
            new = emit(graph, prims.convert_element_type.default, (new, was.dtype), like=old)
    if not same_strides(was, tensor(new)):
        erase_dead(new)
        return Decline("strides", f"{old.name} has strides {tuple(was.stride())}, quantize gives {tuple(tensor(new).stride())}")
    old.replace_all_uses_with(new)
    erase_dead(old)
    return None


def _is_bits(wanted: torch.dtype, given: torch.dtype) -> bool:
    """Whether a buffer of integers holds the bytes of scales, or of packed values."""
    return wanted != given and (wanted in _BYTES or given in _BYTES)


def _scale_tensor(graph: fx.Graph, scale: Any, like: fx.Node, device: torch.device) -> fx.Node:
    """The scale as FP32 tensor of one element: what the operator takes."""
    if is_tensor(scale):
        if tensor(scale).dtype == torch.float32:
            return scale
        return emit(graph, prims.convert_element_type.default, (scale, torch.float32), like=like)
    node = graph.call_function(aten.full.default, ([], constant(scale)), {"dtype": torch.float32, "device": device})
    with tensor(like).fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = torch.full([], constant(scale), dtype=torch.float32, device=device)  # type: ignore[arg-type]
    return node


def _sizes(old: fx.Node, x: fx.Node) -> list[Any] | None:
    """The shape of `old` as arguments of a view."""
    if is_call(old, *VIEWS):
        return list(old.args[1])  # type: ignore[arg-type]
    if (known := view_sizes(tensor(old))) is not None:
        return known
    sizes: list[Any] = list(tensor(old).shape)
    for i, n in enumerate(sizes):
        if isinstance(n, SymInt):
            source = next((d for d, m in enumerate(tensor(x).shape) if same(m, n)), None)
            if source is None:
                return None
            sizes[i] = emit(old.graph, aten.sym_size.int, (x, source), like=x)
    return sizes
