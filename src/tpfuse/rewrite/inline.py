"""Operators back into smaller ones: all the way to aten (`inline`), or one level of a composite (`unfuse`)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tpfuse.ir.op import BodyTracer, Op
from tpfuse.rewrite.emit import emit, erase_dead, fake
from tpfuse.shim import decompositions, detect_fake_mode, enable_python_dispatcher

_wait = torch.ops._c10d_functional.wait_tensor.default
_bodies: WeakKeyDictionary[Any, dict[Any, fx.Graph]] = WeakKeyDictionary()  # traced bodies by fake mode


def inline(graph: fx.Graph, node: fx.Node, op: Op) -> list[fx.Node]:
    """Replace a node that calls `op.default` by the operator's body in aten, in the form of Inductor's decompositions.

    Bit-identical to the body.  A collective is launched where the node stood and waited for right before its first use.
    Returns the nodes put in.
    """
    args = op.bind(node.args, node.kwargs)
    inputs = {k: v for k, v in args.items() if isinstance(v, fx.Node)}
    body = _traced(op, inputs, {k: v for k, v in args.items() if k not in inputs})
    placeholders = dict(zip(body.find_nodes(op="placeholder"), inputs.values(), strict=True))
    new = _copy(graph, node, body, placeholders, lambda inner, values: False)
    for wait in [n for n in new if n.target is _wait]:
        if wait.users:
            min(wait.users).prepend(wait)
    return new


def unfuse(graph: fx.Graph, node: fx.Node, op: Op) -> list[fx.Node]:
    """Replace a node that calls the composite `op.default` by the next smaller operators of its body, one level.

    A leaf (`op.leaf_fake is not None`) has none: it can only be inlined.  Returns the nodes put in.
    """
    args = op.bind(node.args, node.kwargs)
    body, placeholders = _over_lists(op, args) if op.variadic else (_composite(op), {})
    placeholders = placeholders or {p: args[str(p.target)] for p in body.find_nodes(op="placeholder")}

    def left_out(inner: fx.Node, values: tuple[Any, ...]) -> bool:
        return "optional" in inner.meta and (values[1] is None or values[1] == 1.0)

    return _copy(graph, node, body, placeholders, left_out)


def _copy(
    graph: fx.Graph, node: fx.Node, body: fx.Graph, placed: dict[fx.Node, Any], left_out: Callable[..., bool]
) -> list[fx.Node]:
    """Put a body in the place of `node`.  A node that is left out hands on its first argument."""
    new = []
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op != "call_function":
                continue
            values = fx.node.map_arg(inner.args, placed.__getitem__)
            if left_out(inner, values):
                placed[inner] = values[0]
                continue
            kwargs = fx.node.map_arg(inner.kwargs, placed.__getitem__)
            placed[inner] = emit(graph, inner.target, values, node, kwargs)
            new.append(placed[inner])
    _replace(node, fx.node.map_arg(body.output_node().args[0], placed.__getitem__))
    for dead in reversed(new):
        erase_dead(dead)
    return [n for n in new if not n._erased]


def _replace(node: fx.Node, results: Any) -> None:
    """Give the users of a node, or of its results, these values instead, and erase it."""
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for item in list(node.users):
            assert item.target is operator.getitem, item
            item.replace_all_uses_with(results[item.args[1]])
            item.graph.erase_node(item)
    node.graph.erase_node(node)


@functools.cache
def _composite(op: Op) -> fx.Graph:
    """A composite's body with every argument a proxy: the smaller operators, the optional steps marked."""
    return op.traced()


def _over_lists(op: Op, args: Mapping[str, Any]) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """The body of a variadic composite for lists of these lengths, and the node that each of its placeholders is."""
    body = fx.Graph()
    tracer = BodyTracer(body)
    placeholders: dict[fx.Node, Any] = {}

    def proxy(value: fx.Node) -> Any:
        placeholder = body.placeholder(f"a{len(placeholders)}")
        placeholders[placeholder] = value
        return fx.Proxy(placeholder, tracer)

    results = op.reference(**fx.node.map_arg(dict(args), proxy))
    body.output([r.node for r in results])
    return body, placeholders


def _traced(op: Op, inputs: Mapping[str, fx.Node], fixed: Mapping[str, Any]) -> fx.Graph:
    """`trace_body`, once for all arguments of the same shapes.  Its nodes have no metadata."""
    fakes = {k: fake(n) for k, n in inputs.items()}
    mode = detect_fake_mode(list(fakes.values()))
    assert mode is not None
    bodies = _bodies.setdefault(mode, {})
    key = (op.name, tuple((k, _layout(v)) for k, v in fakes.items()), tuple(fixed.items()))
    if key not in bodies:
        bodies[key] = trace_body(op, fakes, fixed)
        for node in bodies[key].nodes:
            node.meta.clear()  # fake values would keep their mode, the cache's key, alive
    return bodies[key]


def trace_body(op: Op, fakes: Mapping[str, Tensor], fixed: Mapping[str, Any]) -> fx.Graph:
    """The body in aten for these tensors and other arguments, under the fake mode and with the symbolic sizes of the tensors."""

    def call(*values: Tensor) -> Any:
        return op.reference(**fixed, **dict(zip(fakes, values, strict=True)))

    mode = detect_fake_mode(list(fakes.values()))
    assert mode is not None
    with mode, enable_python_dispatcher():  # as AOTAutograd traces; else sizes become numbers in composite operators
        apart = [value.detach() for value in fakes.values()]  # one tensor given twice would be traced as one placeholder
        return make_fx(call, decomposition_table=decompositions())(*apart).graph


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.device, str(tuple(value.shape)), str(value.stride())
