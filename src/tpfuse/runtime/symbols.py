"""Token counts in a graph: which expression they are, its value at a call, and fresh inputs bound to one range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx

from tpfuse import shim
from tpfuse.ir.op import find
from tpfuse.target import Range


def token_expression(graph: fx.Graph) -> Any:
    """Tokens: the product of the leading dimensions of the first collective's input.  A sympy expression, an int where the
    count is fixed, None where the graph holds no collective."""
    for node in graph.nodes:
        op = find(node.target)
        if op is not None and op.collective:
            return shim.expression(math.prod(node.args[0].meta["val"].shape[:-1]))
    return None


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
    for value in placeholders:
        for symbol in shim.symbols_of(value):
            if symbol in new:
                continue
            owner = value if isinstance(value, SymInt) else next(
                s for s in (*value.shape, *value.stride()) if isinstance(s, SymInt) and symbol in s.node.expr.free_symbols
            )  # fmt: skip
            low, high = shim.symbol_bounds(owner, symbol)
            if symbol == tokens:
                low, high = max(low, limits.start), min(high or limits.end, limits.end)
            if low == high:
                new[symbol] = sympy.Integer(low)
            else:
                new[symbol] = shim.fresh_symbol(env, f"tpfuse_{len(new)}", values[symbol], low, high)

    numbers = {symbol: sympy.Integer(value) for symbol, value in values.items()}

    def convert(size: Any) -> Any:
        if not isinstance(size, SymInt):
            return size
        expr = size.node.expr.xreplace(new)
        return int(expr) if expr.is_Integer else shim.sym_int(env, expr, int(size.node.expr.xreplace(numbers)))

    inputs: list[Any] = []
    for value in placeholders:
        if isinstance(value, Tensor):
            with mode:
                shape, stride = [convert(s) for s in value.shape], [convert(s) for s in value.stride()]
                inputs.append(torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device))
        else:
            inputs.append(convert(value))
    return inputs, mode, new
