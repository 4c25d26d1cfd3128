"""Token counts in a graph: which expression they are, its value at a call, and fresh inputs bound to one range."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx
from torch.fx.node import map_arg

from tpfuse import shim
from tpfuse.ir.op import find
from tpfuse.target import Range


def token_expression(graph: fx.Graph, readable: Container[Any]) -> Any:
    """Tokens: the rows that meet in the first collective, of all ranks together where each has its own; the product of their
    leading dimensions.  A sympy expression, an int where the count is fixed, None where the graph holds no collective.

    readable: the symbols that a call's arguments tell.  Rows of which there are as many as the data says (those of an expert)
    are no tokens.
    """
    for node in graph.nodes:
        op = find(node.target)
        if op is not None and op.collective:
            rows, gathers = node.args[0].meta["val"], op.name.startswith("all_gather")
            world = shim.resolve_group(op.bind(node.args, node.kwargs)["group"]).size() if gathers else 1
            count = shim.expression(world * math.prod(rows.shape[:-1]))
            if all(symbol in readable for symbol in getattr(count, "free_symbols", ())):
                return count
    return None


def resized(values: dict[Any, int], expr: Any, tokens: int) -> dict[Any, int]:
    """The same sizes for so many tokens, where those are a multiple of one symbol."""
    symbol, each = _counted(expr)
    return values if symbol is None else {**values, symbol: tokens // each}


def callable_with(placeholders: Sequence[Any], values: dict[Any, int]) -> bool:
    """Whether a graph may be called with these sizes: each within the bounds that tracing gave its symbol."""
    for symbol, owner in _owners(placeholders).items():
        low, high = shim.symbol_bounds(owner, symbol)
        if (low is not None and values[symbol] < low) or (high is not None and values[symbol] > high):
            return False
    return True


def _owners(placeholders: Sequence[Any]) -> dict[Any, SymInt]:
    """The symbols of a graph's inputs, each with a size or stride that it is in."""
    owners: dict[Any, SymInt] = {}
    for value in placeholders:
        parts = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
        for symbol in shim.symbols_of(value):
            owners.setdefault(symbol, next(p for p in parts if isinstance(p, SymInt) and symbol in p.node.expr.free_symbols))
    return owners


def _counted(tokens: Any) -> tuple[Any, int]:
    """The one symbol that tokens are a multiple of, and which; (None, 1) where there is no such."""
    symbols = getattr(tokens, "free_symbols", ())
    for symbol in symbols if len(symbols) == 1 else ():
        each = tokens.coeff(symbol)
        if each.is_Integer and tokens == each * symbol:
            return symbol, int(each)
    return None, 1


@dataclass
class Bindings:
    """Reads the values of symbols off a call's arguments."""

    readers: dict[Any, Callable[[Sequence[Any]], int]]

    @classmethod
    def of(cls, placeholders: Sequence[Any]) -> Bindings:
        readers: dict[Any, Callable[[Sequence[Any]], int]] = {}
        for i, value in enumerate(placeholders):
            if isinstance(value, SymInt) and shim.expression(value).is_Symbol:
                readers.setdefault(shim.expression(value), lambda args, i=i: int(args[i]))
            elif isinstance(value, Tensor):
                for d, size in enumerate(value.shape):
                    if isinstance(size, SymInt) and shim.expression(size).is_Symbol:
                        readers.setdefault(shim.expression(size), lambda args, i=i, d=d: int(args[i].shape[d]))
        return cls(readers)

    def values(self, args: Sequence[Any]) -> dict[Any, int]:
        return {symbol: read(args) for symbol, read in self.readers.items()}

    def evaluate(self, expr: Any, args: Sequence[Any]) -> int:
        if isinstance(expr, int):
            return expr
        if expr in self.readers:
            return self.readers[expr](args)
        return int(expr.xreplace({s: self.readers[s](args) for s in expr.free_symbols}))


def fresh_inputs(
    placeholders: Sequence[Any], values: dict[Any, int], tokens: Any, limits: Range
) -> tuple[list[Any], shim.FakeTensorMode, dict[Any, Any]]:
    """Fake inputs like `placeholders` under a ShapeEnv of their own, hinted with `values`, the token symbol kept inside
    `limits` (and replaced by its number where they are a single size).

    → (inputs, their fake mode, {old symbol: new symbol or number}).
    """
    env = shim.ShapeEnv(duck_shape=False)
    mode = shim.FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    new: dict[Any, Any] = {}
    counted, each = _counted(tokens)
    for symbol, owner in _owners(placeholders).items():
        low, high = shim.symbol_bounds(owner, symbol)
        if symbol == counted:
            inside = max(low or 0, -(-limits.start // each)), min(high or limits.end, limits.end // each)
            low, high = inside if inside[0] <= inside[1] else (low, high)  # no multiple lies there: never called
        if low is not None and low == high:
            new[symbol] = sympy.Integer(low)
        else:
            new[symbol] = shim.fresh_symbol(env, f"tpfuse_{len(new)}", values[symbol], low, high)

    inputs = [_renewed(value, mode, new, values) for value in placeholders]
    return inputs, mode, new


def renew_strides(graph: fx.Graph, mode: shim.FakeTensorMode, new: dict[Any, Any], values: dict[Any, int]) -> None:
    """Say anew, in the symbols of `fresh_inputs`, how the inputs of operators that read them by strides lie in memory: Inductor
    holds them to what stands there.  What depends on data has no such symbol, and no say."""
    for node in graph.nodes:
        if "eager_input_vals" not in node.meta:
            continue
        fakes = [a.meta["val"] for a in node.all_input_nodes]
        if all(set(shim.symbols_of(v)) <= set(new) for v in fakes):
            node.meta["eager_input_vals"] = map_arg(
                (node.args, dict(node.kwargs)), lambda a: _renewed(a.meta["val"], mode, new, values)
            )
        else:
            del node.meta["eager_input_vals"]


def renew_bodies(gm: fx.GraphModule, mode: shim.FakeTensorMode, new: dict[Any, Any], values: dict[Any, int]) -> None:
    """Say in the symbols of `fresh_inputs` too what flows through the graphs that higher-order operators run (the branches of
    `torch.cond`): Inductor holds these to what they are given.  Ranges have copies of their own."""
    for name in {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}:
        body = getattr(gm, name)
        if not isinstance(body, fx.GraphModule):
            continue
        body = fx.GraphModule(body, copy_graph(body.graph))
        for node in body.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor | SymInt) and set(shim.symbols_of(value)) <= set(new):
                node.meta["val"] = _renewed(value, mode, new, values)
        renew_bodies(body, mode, new, values)
        setattr(gm, name, body)


def copy_graph(old: fx.Graph) -> fx.Graph:
    """A copy that shares nothing but metadata values."""
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(old, {}))
    output.meta.update(old.find_nodes(op="output")[0].meta)
    return graph


def _renewed(value: Any, mode: shim.FakeTensorMode, new: dict[Any, Any], values: dict[Any, int]) -> Any:
    """A fake value under a mode of other symbols."""

    def convert(size: Any) -> Any:
        if not isinstance(size, SymInt):
            return size
        expr = size.node.expr.xreplace(new)
        if expr.is_Integer:
            return int(expr)
        hint = size.node.expr.xreplace({symbol: sympy.Integer(number) for symbol, number in values.items()})
        assert mode.shape_env is not None
        return shim.sym_int(mode.shape_env, expr, int(hint))

    if not isinstance(value, Tensor):
        return convert(value)
    with mode:
        shape, stride = [convert(s) for s in value.shape], [convert(s) for s in value.stride()]
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
