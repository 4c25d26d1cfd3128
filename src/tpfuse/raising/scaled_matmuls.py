"""aten._scaled_mm → tpfuse.scaled_matmul, and what its adapters share: reading scales, transposes and batches of one."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tpfuse.ir.matmul import dtype_name, origins
from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE, emit, substitute
from tpfuse.rewrite.match import VIEWS, arguments, aten, is_call, is_tensor, only_user, operands, same, tensor
from tpfuse.rewrite.site import site_of

E4M3 = torch.float8_e4m3fn
FP4 = torch.float4_e2m1fn_x2
_NAMES = ("x", "weight", "x_scale", "weight_scale", "bias", "result_scale", "out_dtype", "fast_accum")


def raise_scaled_matmuls(graph: fx.Graph) -> list[Event]:
    """Raise every aten._scaled_mm whose scales have a scheme; the others are declined.  Products take scales as they are made."""
    events = []
    for node in graph.find_nodes(op="call_function", target=aten._scaled_mm.default):
        declined = _raise(node)
        if isinstance(declined, Decline):
            node.meta[DECLINE] = declined
            events.append(Event("declined", "scaled_matmul", site_of(node), reason=declined))
    op = registry["scaled_matmul"]
    for node in graph.find_nodes(op="call_function", target=op.default):  # the model's own calls too
        a = op.bind(node.args, node.kwargs)
        node.args, node.kwargs = tuple({**a, "x_scale": scales_of(a["x_scale"])}.values()), {}
    return events


def _raise(node: fx.Node) -> fx.Node | Decline:
    a = dict(zip(_NAMES, arguments(node).values(), strict=True))
    a["out_dtype"] = dtype_name(tensor(node).dtype)
    with node.graph.inserting_before(node):
        if tensor(a["x"]).dtype in (FP4, torch.uint8):
            return _raise_fp4(node, a)
    kind = kind_of(*(tensor(a[n]) for n in ("x", "weight", "x_scale", "weight_scale")))
    if isinstance(kind, Decline):
        return kind
    if kind[0] not in ("fp8_tensor", "fp8_token"):
        return Decline("block_scales", "aten._scaled_mm with a scale a group has no body that runs everywhere")
    a["x_scale"] = scales_of(a["x_scale"])
    return substitute(node, registry["scaled_matmul"].default, _arguments(a, scheme=kind[0], layout=kind[1]))


def _raise_fp4(node: fx.Node, a: dict[str, Any]) -> fx.Node | Decline:
    if tensor(a["x_scale"]).dtype != E4M3:
        return Decline("block_scales", f"FP4 values with scales of {tensor(a['x_scale']).dtype} are not NVFP4")
    if a["result_scale"] is not None:
        return Decline("result_scale", "an FP4 product with a scale of its result")
    a.update({name: as_bytes(a[name]) for name in ("x", "weight")})
    a.update({name: scales_of(a[name]) for name in ("x_scale", "weight_scale")})
    extra = {"layout": "swizzled_128x4", "weight_layout": "swizzled_128x4", "origin": "aten::_scaled_mm"}
    scaled = only_user(node)
    if is_call(scaled, aten.mul.Tensor) and a["bias"] is None:  # torchao's global scales, after the product was rounded
        factor = next(f for y, f in operands(scaled) if y is node)
        if is_tensor(factor) and tensor(factor).numel() == 1 and tensor(factor).dtype == tensor(node).dtype:
            node, a["alpha"], extra["origin"] = scaled, factor, "aten::_scaled_mm?rounds=first"
    return substitute(node, registry["scaled_matmul"].default, _arguments(a, scheme="nvfp4", **extra))


def _call_fp4(a: Mapping[str, Any]) -> Tensor | None:
    """aten._scaled_mm of packed FP4 operands, which has no body for CPU."""
    if a["x"].device.type == "cpu":
        return None
    x, weight = (a[name].view(FP4) for name in ("x", "weight"))
    scales = (a["x_scale"], a["weight_scale"])
    y = torch.ops.aten._scaled_mm.default(x, weight, *scales, a["bias"], None, a["out_dtype"], a["fast_accum"])
    return y if a["alpha"] is None else y * a["alpha"]


origins["aten::_scaled_mm"] = _call_fp4


def _arguments(a: dict[str, Any], **more: str) -> list[Any]:
    return list(registry["scaled_matmul"].bind((), {**a, **more}).values())


def kind_of(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> tuple[str, str] | Decline:
    """The scheme and the layout of the activation's scales that the shapes of FP8 operands and scales stand for."""
    if x.dtype != E4M3 or weight.dtype != E4M3:
        return Decline("dtype", f"{x.dtype} times {weight.dtype}: only products of float8_e4m3fn have an operator")
    if x.dim() != 2 or weight.dim() != 2:
        return Decline("shape", f"a product of {x.dim()} and {weight.dim()} dimensions")
    if x_scale.dtype != torch.float32 or weight_scale.dtype != torch.float32:
        return Decline("scale_dtype", f"scales are {x_scale.dtype} and {weight_scale.dtype}, not float32")
    (m, k), n = x.shape, weight.shape[1]
    one = [all(same(size, 1) for size in s.shape) for s in (x_scale, weight_scale)]
    if all(one):
        return "fp8_tensor", "row"
    if _is(x_scale, m, 1) and (_is(weight_scale, 1, n)):
        return "fp8_token", "row"
    for group in (128, 64):
        groups, blocks = -(-k // group), -(-n // group)
        if _is(x_scale, m, groups) and (_is(weight_scale, groups, blocks) or _is(weight_scale, groups, n)):
            stride = x_scale.stride()
            layout = "row" if same(stride[1], 1) or same(groups, 1) else "col" if same(stride[1], m) else "col+tma"
            return f"fp8_group{group}", layout
    shapes = f"{list(x_scale.shape)} and {list(weight_scale.shape)}"
    return Decline("scale_shape", f"scales {shapes} of a product {list(x.shape)} by {list(weight.shape)}")


def _is(scale: Tensor, rows: Any, cols: Any) -> bool:
    return scale.dim() == 2 and same(scale.shape[0], rows) and same(scale.shape[1], cols)


def scales_of(node: Any) -> Any:
    """The scales as tpfuse.quantize returns them, where a node is only another shape of them."""
    source = node
    while is_call(source, *VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default):
        source = source.args[0]
    raised = is_call(source, operator.getitem) and is_call(source.args[0], registry["quantize"].default)
    return source if raised and source.args[1] == 1 else node


def as_bytes(node: fx.Node) -> fx.Node:
    """Packed FP4 values as bytes."""
    if tensor(node).dtype == torch.uint8:
        return node
    inner: Any = node.args[0]
    if is_call(node, aten.view.dtype) and tensor(inner).dtype == torch.uint8:
        return inner
    if is_call(node, aten.permute.default) and tensor(inner).dtype == FP4:
        return emit(node.graph, aten.permute.default, (as_bytes(inner), node.args[1]), like=node)
    return emit(node.graph, aten.view.dtype, (node, torch.uint8), like=node)


def e4m3_scales(node: fx.Node) -> fx.Node:
    """Block scales as e4m3: engines hand them over as bytes."""
    if tensor(node).dtype != E4M3:
        inner: Any = node.args[0] if is_call(node, aten.view.dtype) else None
        is_e4m3 = inner is not None and tensor(inner).dtype == E4M3
        node = inner if is_e4m3 else emit(node.graph, aten.view.dtype, (node, E4M3), like=node)
    return scales_of(node)


def transposed(node: fx.Node) -> fx.Node:
    """The transpose of a matrix: what it was made from, where it is a transpose itself."""
    if is_call(node, aten.permute.default) and list(node.args[1]) == [1, 0]:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return emit(node.graph, aten.permute.default, (node, [1, 0]), like=node)


def unbatched(node: fx.Node) -> Any:
    """The matrix of a batch of one; a Decline for other batches."""
    if tensor(node).dim() != 3 or not same(tensor(node).shape[0], 1):
        return Decline("batch", f"a batch of {list(tensor(node).shape)}: only a batch of one is a product of rows")
    if is_call(node, aten.unsqueeze.default) and node.args[1] == 0:
        return node.args[0]
    return emit(node.graph, aten.squeeze.dim, (node, 0), like=node)
