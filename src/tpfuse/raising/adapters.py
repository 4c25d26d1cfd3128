"""Engines' own quantisation and product operators → tpfuse.quantize and tpfuse.scaled_matmul.

An adapter is one small entry: an operator by name, how its arguments map, which buffers hold its results.  Operators are
looked up when asked for: one that is not installed switches its adapter off.  All forms of a call are read alike: returned
results, `out=` buffers, and either inside `auto_functionalized` (v1 and v2).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tpfuse.ir.matmul import origins
from tpfuse.ir.op import registry
from tpfuse.raising.quants_emit import put
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE, emit, erase_dead
from tpfuse.rewrite.functionalized import first_buffer, mutable, overload
from tpfuse.rewrite.match import arguments, aten, is_call, is_tensor, result_at, same, tensor
from tpfuse.rewrite.site import site_of
from tpfuse.shim import OpOverload


@dataclass
class Call:
    """A call of an adapted operator.  args: its arguments by name, buffers left out.  buffers: the fake tensors of the
    buffers that it fills.  holders: by name of a buffer, or by index of a returned value, what holds the result."""

    node: fx.Node
    args: dict[str, Any]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    holders: dict[str | int, Holder] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def value(self, name: str) -> Tensor:
        """The fake tensor of an argument or a buffer."""
        return self.buffers[name] if name in self.buffers else tensor(self.args[name])


@dataclass
class Holder:
    """The node that holds a result, and how the result lies in it: as it is, transposed, or as a slice of it.

    at: where it is filled, if that is not where it is made.
    """

    node: fx.Node | None
    transposed: bool = False
    slice: tuple[Any, Any, Any] | None = None  # dim, start, end
    base: fx.Node | None = None
    at: fx.Node | None = None


@dataclass(frozen=True)
class Adapter:
    """operator: "namespace::name".  raises: the operator of tpfuse.

    arguments(call): that operator's arguments by name (what is left out has its default), or why this call has none.
    results: the buffers that hold its results, in its order.  A functional form returns them in this order.
    call(operator, arguments): for products, the engine's operator called again, with tpfuse's arguments by name.
    """

    operator: str
    raises: str
    arguments: Callable[[Call], Mapping[str, Any] | Decline]
    results: tuple[str, ...]
    call: Callable[[Any, Mapping[str, Any]], Tensor] | None = None


_adapters: dict[str, Adapter] = {}


def register(adapter: Adapter) -> None:
    """Make an operator known.  A later entry for the same operator takes the place of the earlier one."""
    _adapters[adapter.operator] = adapter
    if adapter.call is not None:
        origins[adapter.operator] = functools.partial(_call, adapter)


def _call(adapter: Adapter, args: Mapping[str, Any]) -> Tensor | None:
    installed = resolve(adapter.operator)
    return None if installed is None or adapter.call is None else adapter.call(installed, args)


def resolve(name: str) -> Any:
    """The operator packet of "namespace::name", or None where it is not installed."""
    namespace, _, short = name.partition("::")
    return getattr(getattr(torch.ops, namespace), short, None)


def status() -> dict[str, bool]:
    """For each adapter, by its operator's name, whether that operator is installed."""
    return {name: resolve(name) is not None for name in _adapters}


def raise_adapted(graph: fx.Graph) -> list[Event]:
    """Raise every call of an adapted operator; a call that cannot be mapped is declined with the adapter's reason."""
    events = []
    fold_bitcasts(graph)
    for node in list(graph.nodes):
        adapter = _adapter(node)
        if adapter is None:
            continue
        declined = _raise(adapter, node)
        if declined is not None:
            node.meta[DECLINE] = declined
            events.append(Event("declined", adapter.raises, site_of(node), reason=declined))
    fold_bitcasts(graph)
    return events


def fold_bitcasts(graph: fx.Graph) -> None:
    """A view of bytes as another dtype of a view of bytes is one such view, or none."""
    for node in list(graph.nodes):
        if not is_call(node, aten.view.dtype):
            continue
        source: Any = node.args[0]
        if is_call(source, aten.view.dtype):
            node.update_arg(0, source.args[0])
            erase_dead(source)
            source = node.args[0]
        if tensor(source).dtype == tensor(node).dtype:
            node.replace_all_uses_with(source)
            erase_dead(node)


def _adapter(node: fx.Node) -> Adapter | None:
    target = overload(node)
    return _adapters.get(target._schema.name) if target is not None else None


def _raise(adapter: Adapter, node: fx.Node) -> Decline | None:
    call = _read(node)
    if isinstance(call, Decline):
        return call
    graph, op = node.graph, registry[adapter.raises]
    # What an adapter emits to prepare arguments stands before the call too.
    with graph.inserting_before(node):
        arguments = adapter.arguments(call)
        if isinstance(arguments, Decline):
            return arguments
        new = emit(graph, op.default, list(op.bind((), dict(arguments)).values()), like=node)
        results = [new]
        if op.results > 1:
            results = [emit(graph, operator.getitem, (new, i), like=node) for i in range(op.results)]
    for i, name in enumerate(adapter.results):
        holder = call.holders.get(name, call.holders.get(i))
        if holder is None or holder.node is None:
            continue
        declined = _put(holder, results[i], arguments["x"])
        if declined is not None:
            erase_dead(results[i])
            return declined
    for result in results:
        erase_dead(result)
    if not node.users and not node._erased:
        graph.erase_node(node)
    return None


def _put(holder: Holder, result: fx.Node, x: fx.Node) -> Decline | None:
    """Let a result stand for what its holder holds."""
    node = holder.node
    assert node is not None
    graph = node.graph
    with graph.inserting_before(node):
        if holder.transposed:
            result = emit(graph, aten.permute.default, (result, [1, 0]), like=node)
        if holder.slice is not None:
            result = emit(graph, aten.slice_scatter.default, (holder.base, result, *holder.slice), like=node)
    return put(node, result, x, holder.at)


def _read(node: fx.Node) -> Call | Decline:
    """A call in any of its forms."""
    target = overload(node)
    assert target is not None
    schema = target._schema
    buffers = mutable(target)
    returned = 0 if buffers else len(schema.returns)
    if node.target is target:
        args = arguments(node)
        call = Call(node, {k: v for k, v in args.items() if k not in buffers})
        if buffers:
            return _direct_buffers(call, {name: args[name] for name in buffers})
        for i in range(returned):
            call.holders[i] = Holder(node if returned == 1 else result_at(node, i))
        return call
    kwargs = dict(node.kwargs)
    first = first_buffer(target)
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    if getattr(node.target, "_name", "") == "auto_functionalized":
        call = Call(node, {**defaults, **{k: v for k, v in kwargs.items() if k not in buffers}})
        for i, name in enumerate(buffers):
            call.buffers[name] = tensor(kwargs[name])
            call.holders[name] = Holder(result_at(node, first + i))
        return call
    bases: Any = kwargs.pop("_all_bases")
    call = Call(node, {**defaults, **{k: v for k, v in kwargs.items() if not k.startswith("_")}})
    for name in buffers:
        found = _buffer_of_v2(name, kwargs, bases, node, first)
        if isinstance(found, Decline):
            return found
        call.buffers[name], call.holders[name] = found
    return call


def _buffer_of_v2(
    name: str, kwargs: Mapping[str, Any], bases: list[fx.Node], node: fx.Node, first: int
) -> tuple[Tensor, Holder] | Decline:
    """A buffer that auto_functionalized_v2 describes as a view of a base."""
    index = kwargs[f"_{name}_base_index"]
    base, holder = bases[index], Holder(result_at(node, first + index))
    whole = tensor(base)
    if f"_{name}_slice_dim" in kwargs:
        holder.slice = tuple(kwargs[f"_{name}_slice_{part}"] for part in ("dim", "start", "end"))  # type: ignore[assignment]
        holder.base = base
        dim, start, end = (v.meta["val"] if isinstance(v, fx.Node) else v for v in holder.slice)
        with whole.fake_mode:  # type: ignore[attr-defined]
            return torch.ops.aten.slice.Tensor(whole, dim, start, end), holder
    if f"_{name}_size" not in kwargs:
        return whole, holder
    size, stride = ([v.meta["val"] if isinstance(v, fx.Node) else v for v in kwargs[f"_{name}_{p}"]] for p in ("size", "stride"))
    flipped = whole.t() if whole.dim() == 2 else whole
    pairs = [*zip(size, flipped.shape, strict=False), *zip(stride, flipped.stride(), strict=False)]
    if whole.dim() != 2 or len(size) != 2 or kwargs[f"_{name}_storage_offset"] != 0 or not all(same(a, b) for a, b in pairs):
        return Decline("buffer_view", f"{name} is a view of its base that is neither the base, nor its transpose, nor a slice")
    holder.transposed = True
    return flipped, holder


def _direct_buffers(call: Call, buffers: Mapping[str, Any]) -> Call | Decline:
    """A call that writes to buffers in the graph: each must be fresh, and be read only afterwards."""
    order = {n: i for i, n in enumerate(call.node.graph.nodes)}
    for name, buffer in buffers.items():
        early = [u for u in buffer.users if order[u] < order[call.node]] if is_tensor(buffer) else []
        writers = [u for u in buffer.users if u is not call.node and _writes(u, buffer)] if is_tensor(buffer) else []
        if writers:
            return Decline("second_mutation", f"{name} is written by {writers[0].name} ({writers[0].target}) as well")
        if not is_call(buffer, aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default) or early:
            return Decline("buffer_view", f"{name} is not fresh: it may be seen through another view")
        call.buffers[name], call.holders[name] = tensor(buffer), Holder(buffer, at=call.node)
    return call


def _writes(node: fx.Node, buffer: fx.Node) -> bool:
    """Whether a call writes to a buffer."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    named = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return any(named.get(name) is buffer for name in mutable(target))
