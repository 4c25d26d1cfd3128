"""Rewriting one residual chain into own rows: sums scattered, whole operands cut, results that leave it gathered."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import SymInt, fx

from tpfuse import shim
from tpfuse.fusion.rows import regroups, same_for_rows
from tpfuse.ir.op import find, registry
from tpfuse.rewrite.emit import emit, erase_dead
from tpfuse.rewrite.match import aten, is_call, is_tensor, result_at, same_shape, tensor


class Shards:
    """nodes: the chain, in program order; each gets a shard [⌈tokens / world⌉, width].  gathered: those that others need whole.

    All rows of a chain are the same tokens, however a model groups them ([batch, seq, hidden] or [tokens, hidden]).
    """

    def __init__(self, graph: fx.Graph, group: str, nodes: Sequence[fx.Node], gathered: Sequence[fx.Node]) -> None:
        self.graph, self.group, self.nodes, self.gathered = graph, group, nodes, set(gathered)
        self.shards: dict[fx.Node, fx.Node] = {}
        self.flat: dict[fx.Node, fx.Node] = {}  # by shard: [tokens, width], gathered
        self.cut: dict[fx.Node, fx.Node] = {}  # by whole operand: its own rows
        self.sizes = Sizes(graph, nodes[0])
        self.tokens = self.sizes.product(tensor(nodes[0]).shape[:-1])

    def rewrite(self) -> None:
        for node in self.nodes:
            with self.graph.inserting_before(node):
                self.shards[node] = self._shard(node)
                if node in self.gathered:
                    self._hand_out(node)
        for node in reversed(self.nodes):
            if not node._erased:
                erase_dead(node)

    def _shard(self, node: fx.Node) -> fx.Node:
        """The own rows of a node's value."""
        if is_call(node, registry["all_reduce"].default):
            return self._emit(registry["reduce_scatter"].default, (self._rows(node.args[0]), self.group, True), node)
        if regroups(node):
            return self.shards[node.args[0]]  # type: ignore[index]
        if node.target is operator.getitem:
            return self._result(self.shards[node.args[0]], node.args[1], node)  # type: ignore[index]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: self._operand(a, node))
        return emit(self.graph, node.target, args, node, kwargs)

    def _operand(self, value: fx.Node, node: fx.Node) -> fx.Node:
        """What stands for an operand beside shards."""
        if value in self.shards:
            return self.shards[value]
        if not is_tensor(value) or tensor(value).dim() < 2 or self._by_itself(value, node):
            return value
        if same_for_rows(tensor(value)):  # [1, 1, n] would bring its dimensions along
            return self._reshape(value, [tensor(value).shape[-1]])
        if value not in self.cut:
            self.cut[value] = self._emit(registry["shard_rows"].default, (self._rows(value), self.group), node)
        return self.cut[value]

    @staticmethod
    def _by_itself(value: fx.Node, node: fx.Node) -> bool:
        """Whether an operand of one of tpfuse's operators is not one of rows: a weight, a scale."""
        op = find(node.target)
        if op is None:
            return False
        args = op.bind(node.args, node.kwargs)
        return not any(args[name] is value for name in op.row_args)

    def _rows(self, value: fx.Node) -> fx.Node:
        """A whole value as [tokens, width]."""
        while regroups(value) and tensor(value).dim() != 2:
            value = value.args[0]  # type: ignore[assignment]
        return value if tensor(value).dim() == 2 else self._reshape(value, [self.tokens, tensor(value).shape[-1]])

    def _hand_out(self, node: fx.Node) -> None:
        """Give those outside of the chain the value of all rows."""
        flat, chain = self._gather(node), set(self.nodes)
        outside = [u for u in node.users if u not in chain]
        for view in [u for u in outside if regroups(u) and same_shape(tensor(u), tensor(flat))]:
            view.replace_all_uses_with(flat)
            self.graph.erase_node(view)
            outside.remove(view)
        whole = flat
        if outside and not same_shape(tensor(flat), tensor(node)):
            whole = self._reshape(flat, tensor(node).shape)
        for user in outside:
            user.replace_input_with(node, whole)

    def _gather(self, node: fx.Node) -> fx.Node:
        shard = self.shards[node]
        if shard not in self.flat:
            source: Any = shard.args[0]
            if shard.target is operator.getitem and is_call(source, registry["quantize"].default):
                self._gather_quantized(source, node)
            else:
                args = (shard, self.group, self.tokens)
                self.flat[shard] = self._emit(registry["all_gather"].default, args, node)
        return self.flat[shard]

    def _gather_quantized(self, quantized: fx.Node, node: fx.Node) -> None:
        """Values and scales in one operator, which puts scales together by their layout."""
        how = registry["quantize"].bind(quantized.args, quantized.kwargs)
        parts = [self._result(quantized, i, node) for i in range(2)]
        args = (*parts, how["scheme"], how["layout"], self.group, self.tokens)
        both = self._emit(registry["all_gather_quantized"].default, args, node)
        for i, part in enumerate(parts):
            self.flat[part] = self._result(both, i, node)

    def _result(self, whole: fx.Node, index: Any, like: fx.Node) -> fx.Node:
        """One result of several; the same node each time."""
        return result_at(whole, index) or emit(self.graph, operator.getitem, (whole, index), like)

    def _reshape(self, value: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        return self._emit(aten.reshape.default, (value, list(map(self.sizes.get, sizes))), value)

    def _emit(self, target: Any, args: Sequence[Any], like: fx.Node) -> fx.Node:
        return emit(self.graph, target, args, like)


class Sizes:
    """Sizes as arguments of new nodes: an int, or a node above `anchor` that computes the SymInt."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self.graph, self.anchor = graph, anchor
        self.known: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            if node is anchor:
                break
            if isinstance(node.meta.get("val"), SymInt):
                self.known.setdefault(shim.expression(node.meta["val"]), node)

    def get(self, size: Any) -> Any:
        if not isinstance(size, SymInt):
            return size
        expression = shim.expression(size)
        if expression not in self.known:
            with self.graph.inserting_before(self.anchor):
                self.known[expression] = self._read(expression)
        return self.known[expression]

    def product(self, sizes: Sequence[Any]) -> Any:
        """The product of `sizes`, off a node that has it already where there is one."""
        known = self.known.get(shim.expression(math.prod(sizes)))
        return known if known is not None else functools.reduce(self._times, map(self.get, sizes))

    def _read(self, expression: Any) -> fx.Node:
        """Off the first tensor above that has this size."""
        for node in self.graph.nodes:
            for i, size in enumerate(tensor(node).shape if is_tensor(node) else ()):
                if isinstance(size, SymInt) and shim.expression(size) == expression:
                    return emit(self.graph, aten.sym_size.int, (node, i), node)
        raise AssertionError(f"no tensor has the size {expression}")

    def _times(self, a: Any, b: Any) -> Any:
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return a * b
        if 1 in (a, b):
            return b if a == 1 else a
        with self.graph.inserting_before(self.anchor):
            return emit(self.graph, operator.mul, (a, b), self.anchor)
