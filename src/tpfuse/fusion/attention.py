"""An engine's own attention operator → quantise: the operator writes the quantised rows itself.

Engines keep their cache and their kernels behind one operator that fills an output buffer and takes, optionally, a scale for the
output and a buffer for its block scales.  Handing it other buffers is the whole fusion: every other argument, a layer's name or
a tensor that only orders the call after a cache update, stays as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpfuse.formats import Scheme, scales_meta, scheme_of
from tpfuse.fusion.composites import Fuel
from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import emit, erase_dead
from tpfuse.rewrite.functionalized import first_buffer, is_wrapped, mutable
from tpfuse.rewrite.match import VIEWS, aten, is_call, result_at, tensor
from tpfuse.rewrite.order import bring_before
from tpfuse.rewrite.site import site_of
from tpfuse.shim import OpOverload, auto_functionalized

PASS = "attention_quantize"


@dataclass(frozen=True)
class EngineAttention:
    """An engine's attention operator that can quantise its output.

    operator: "namespace::name".  output: its argument that is the buffer for the rows, [tokens, …].  scale: the argument for a
    given scale.  block_scale: the one for a buffer of block scales.  schemes: those it writes.  It tells the scheme from the
    buffers as `tpfuse.formats.scheme_of` does.
    """

    operator: str
    output: str = "output"
    scale: str = "output_scale"
    block_scale: str = "output_block_scale"
    schemes: tuple[str, ...] = ("fp8_tensor", "nvfp4", "fp8_group128", "fp8_group64")


_known: dict[str, EngineAttention] = {}


def register(entry: EngineAttention) -> None:
    """Make an operator known; a later entry for the same operator takes the place of the earlier one."""
    _known[entry.operator] = entry


register(EngineAttention("vllm::unified_attention_with_output", schemes=("fp8_tensor", "nvfp4")))
register(EngineAttention("vllm::unified_mla_attention_with_output"))


def fuse_engine_attention(graph: fx.Graph, fuel: Fuel = lambda: True) -> list[Event]:
    """Let every known operator whose rows are quantised write them quantised."""
    events = []
    for node in list(graph.nodes):
        if not is_call(node, registry["quantize"].default):
            continue
        node.args, node.kwargs = tuple(registry["quantize"].bind(node.args, node.kwargs).values()), {}
        item = node.args[0]
        while is_call(item, *VIEWS):
            item = item.args[0]  # type: ignore[union-attr]
        call = item.args[0] if is_call(item, operator.getitem) else None  # type: ignore[union-attr]
        entry = _entry(call)
        if entry is None:
            continue
        attributes = {"operator": entry.operator, "scheme": node.args[2], "layout": node.args[3]}
        found = _buffers(entry, call, item, node)  # type: ignore[arg-type]
        if isinstance(found, Decline):
            attributes["operator"] = "quantize"
            events.append(Event("declined", PASS, site_of(node), reason=found, attributes=attributes, node=node.name))
        elif fuel():
            events.append(Event("fired", PASS, site_of(node), attributes=attributes, node=node.name))
            _rewrite(graph, entry, call, item, node, found)  # type: ignore[arg-type]
    return events


def _entry(call: Any) -> EngineAttention | None:
    """The entry of the operator that a node calls inside auto_functionalized (v1 or v2)."""
    if not isinstance(call, fx.Node) or not is_wrapped(call):
        return None
    target = call.args[0]
    return _known.get(target._schema.name) if isinstance(target, OpOverload) else None


def _buffers(entry: EngineAttention, call: fx.Node, item: fx.Node, quantize: fx.Node) -> dict[str, Any] | Decline:
    """The operator's present arguments by name, views of bases resolved; or why it cannot quantise."""
    target: Any = call.args[0]
    buffers = mutable(target)
    scheme = Scheme.parse(str(quantize.args[2]))
    if scheme.name not in entry.schemes:
        return Decline("scheme", f"{entry.operator} does not write {scheme.name}")
    if scheme.mul or scheme.div:
        return Decline("scheme", f"{entry.operator} divides by a scale for FP8 and multiplies by one for NVFP4, unlike {scheme}")
    if scheme.name == "nvfp4" and quantize.args[3] != "swizzled_128x4":
        return Decline("scale_layout", f"block scales are written in tiles of 128 rows, not {quantize.args[3]}")
    args = _resolved(call, buffers)
    if isinstance(args, Decline):
        return args
    if args.get(entry.scale) is not None or args.get(entry.block_scale) is not None:
        return Decline("quantised", f"{entry.operator} quantises its output already")
    if item is not result_at(call, _place(call, entry.output, buffers)):
        return Decline("other_result", f"what is quantised is not {entry.operator}'s {entry.output}")
    if scheme.group and entry.block_scale not in buffers:
        return Decline("buffer", f"{entry.operator} does not say that it writes {entry.block_scale}")
    for other in [item, *_views(item)]:
        for user in other.users:
            if user is not quantize and not is_call(user, *VIEWS):
                return Decline("second_user", f"the rows are used unquantised by {user.name} ({user.target}) as well")
    columns = tensor(quantize.args[0]).shape[-1]  # type: ignore[arg-type]
    if scheme.group and columns % scheme.group:
        return Decline("group_size", f"groups of {scheme.group} do not divide rows of {columns}")
    if not bring_before(call, [quantize.args[1]]):
        return Decline("order", "the scale is computed from the attention's result")
    return args


def _views(node: fx.Node) -> list[fx.Node]:
    return [v for u in node.users if is_call(u, *VIEWS) for v in (u, *_views(u))]


def _resolved(call: fx.Node, buffers: list[str]) -> dict[str, Any] | Decline:
    """Arguments as auto_functionalized (v1) takes them: buffers by name."""
    kwargs = dict(call.kwargs)
    if "_all_bases" not in kwargs:
        return kwargs
    bases: Any = kwargs["_all_bases"]
    args = {k: v for k, v in kwargs.items() if not k.startswith("_")}
    for name in buffers:
        index: Any = kwargs[f"_{name}_base_index"]
        base = None if index is None else bases[index]
        if f"_{name}_slice_dim" in kwargs:
            return Decline("buffer_view", f"{name} is a slice of another tensor")
        if base is not None and f"_{name}_size" in kwargs:
            return Decline("buffer_view", f"{name} is a view of another tensor")
        args[name] = base
    return args


def _place(call: fx.Node, name: str, buffers: list[str]) -> int:
    """Which of the wrapper's results is the new value of a buffer."""
    returned = first_buffer(call.args[0])  # type: ignore[arg-type]
    if "_all_bases" in call.kwargs:
        return returned + call.kwargs[f"_{name}_base_index"]  # type: ignore[operator]
    return returned + buffers.index(name)


def _rewrite(
    graph: fx.Graph, entry: EngineAttention, call: fx.Node, item: fx.Node, quantize: fx.Node, args: dict[str, Any]
) -> None:
    target: Any = call.args[0]
    buffers = mutable(target)
    rows, scale, scheme, layout = quantize.args
    packed = Scheme.parse(str(scheme)).name == "nvfp4"
    with graph.inserting_before(call):
        like = args[entry.output]
        if packed:
            last = tensor(like).dim() - 1
            like = emit(graph, aten.slice.Tensor, (like, last, 0, tensor(like).shape[-1] // 2), like=call)
        dtype = torch.uint8 if packed else torch.float8_e4m3fn
        options = {"dtype": dtype, "memory_format": torch.contiguous_format}
        args = {**args, entry.output: emit(graph, aten.empty_like.default, (like,), call, options), entry.scale: scale}
        block = None
        if Scheme.parse(str(scheme)).group:
            block = _scales(graph, args[entry.output], tensor(rows).shape[-1], str(scheme), str(layout), call)  # type: ignore
        args[entry.block_scale] = block
    if block is not None or scale is not None:  # the buffers must say what the quantisation said
        given = None if scale is None else tensor(scale)  # type: ignore[arg-type]
        output = tensor(args[entry.output]).flatten(1)
        asked = scheme_of(output, given, None if block is None else tensor(block), tensor(rows).shape[-1])  # type: ignore
        assert asked is not None and asked[0] == Scheme.parse(str(scheme)).name, (asked, scheme)
    with graph.inserting_before(call):
        new = emit(graph, auto_functionalized(), (target,), call, args)
        first = first_buffer(target)
        for name in buffers:
            old = result_at(call, _place(call, name, buffers)) if name not in (entry.output, entry.block_scale) else None
            if old is not None:
                old.replace_all_uses_with(emit(graph, operator.getitem, (new, first + buffers.index(name)), like=old))
        q = emit(graph, operator.getitem, (new, first + buffers.index(entry.output)), like=item)
        scales = None
        if block is not None:
            scales = emit(graph, operator.getitem, (new, first + buffers.index(entry.block_scale)), like=item)
    for user in list(quantize.users):
        if user.args[1] == 0:
            with graph.inserting_before(user):
                sizes = _sizes(rows, tensor(user).shape[-1])
                user.replace_all_uses_with(q if sizes is None else emit(graph, aten.reshape.default, (q, sizes), like=user))
        elif scales is not None:
            user.replace_all_uses_with(scales)
        graph.erase_node(user)
    erase_dead(quantize)
    for user in list(call.users):
        if not user._erased and not user.users:
            graph.erase_node(user)
    if not call._erased and not call.users:
        inputs = call.all_input_nodes
        graph.erase_node(call)
        for node in inputs:
            if not node._erased:
                erase_dead(node)


def _sizes(rows: Any, last: int) -> list[Any] | None:
    """The sizes of the view that made the rows, for values of which there are `last` in a row; None where there is no view."""
    return [*rows.args[1][:-1], last] if is_call(rows, *VIEWS) else None


def _scales(graph: fx.Graph, output: fx.Node, columns: int, scheme: str, layout: str, like: fx.Node) -> fx.Node:
    """An empty buffer for the scales of all rows of `output`."""
    tokens = tensor(output).shape[0]
    shape, stride, dtype = scales_meta(tokens, columns, scheme, layout)
    count = tokens if isinstance(tokens, int) else emit(graph, aten.sym_size.int, (output, 0), like=like)

    def node(size: Any) -> Any:
        """A size of the buffer: a number, the tokens, or the tokens rounded up to a whole tile."""
        if isinstance(size, int):
            return size
        for multiple in (1, 4, 8, 128):
            if str(size) == str((tokens + multiple - 1) // multiple * multiple):
                if multiple == 1:
                    return count
                tiles = emit(graph, operator.add, (count, multiple - 1), like=like)
                tiles = emit(graph, operator.floordiv, (tiles, multiple), like=like)
                return emit(graph, operator.mul, (tiles, multiple), like=like)
        raise ValueError(f"{size} is no multiple of {tokens}")

    sizes, strides = [node(s) for s in shape], [node(s) for s in stride]
    device = tensor(output).device
    return emit(graph, aten.empty_strided.default, (sizes, strides), like, {"dtype": dtype, "device": device})
