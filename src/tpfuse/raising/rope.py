"""Rotary embeddings of normalised queries and keys → tpfuse.rotary.

A model turns q and k apart from each other; the operator takes both, so rotations are paired by the tables that they share.
A rotation of heads that no norm precedes has no fused form and stays as the model wrote it.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpfuse.ir.op import registry
from tpfuse.ir.rope import Style
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE, emit, erase_dead
from tpfuse.rewrite.match import (
    VIEWS,
    aten,
    cast_source,
    is_call,
    is_tensor,
    only_user,
    operands,
    peel_widening,
    same,
    same_strides,
    tensor,
)  # fmt: skip
from tpfuse.rewrite.order import number_collectives, sort

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True)
class Part:
    """The elements start, start + step … below stop of a tensor's last dimension."""

    source: fx.Node
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Turn:
    """One rotation: `out` is `x` turned by tables that are the same along dimension `heads`, the heads of x.

    transposed: heads before tokens, x a transposition of the norm's result.
    """

    out: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    base: str
    pairs: bool
    heads: int

    @property
    def transposed(self) -> bool:
        return self.heads == tensor(self.x).dim() - 3

    @property
    def normed(self) -> fx.Node:
        return self.x.args[0] if self.transposed else self.x  # type: ignore[return-value]

    def partner(self, other: Turn) -> bool:
        """Whether the two are of one kind and share their tables."""
        mine, its = ((_bare(t.cos, t.heads), _bare(t.sin, t.heads), t.base, t.pairs, t.heads) for t in (self, other))
        return mine == its


def raise_rotary(graph: fx.Graph) -> list[Event]:
    """Raise every pair of rotations whose inputs are norms over the head dimension."""
    found: list[Turn] = []
    for node in list(graph.nodes):
        turn = _turn(node)
        if isinstance(turn, Decline):
            node.meta[DECLINE] = turn
        elif turn is not None:
            found.append(turn)
    number_collectives(graph)
    while found:
        first = found.pop(0)
        # Only the next one: layers share their tables, and q and k of one layer follow one another.
        partner = next((t for t in found[:1] if first.partner(t) and not _depends(t.out, first.out)), None)
        if partner is None:
            first.out.meta[DECLINE] = Decline("unpaired", "no second rotation shares its tables")
            continue
        found.remove(partner)
        declined = _raise(graph, first, partner)
        if declined is not None:
            first.out.meta[DECLINE] = partner.out.meta[DECLINE] = declined
    sort(graph)
    return []


def _depends(late: fx.Node, early: fx.Node) -> bool:
    """Whether `late` is computed from `early`."""
    after = set(itertools.takewhile(lambda n: n is not late, itertools.dropwhile(lambda n: n is not early, late.graph.nodes)))
    pending, seen = [late], {late}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source is early:
                return True
            if source in after and source not in seen:
                seen.add(source)
                pending.append(source)
    return False


def _raise(graph: fx.Graph, first: Turn, second: Turn) -> Decline | None:
    """Put one operator where the second rotation stands."""
    q, k = sorted((first, second), key=lambda t: not _more_heads(t, second if t is first else first))
    at = second.out
    for flag in (False, True):
        style = Style(q.base, q.pairs, heads_first=flag)
        with graph.inserting_before(at):
            tables = [_without(t, q.heads, at) for t in (q.cos, q.sin)]
            both = emit(graph, registry["rotary"].default, (q.normed, k.normed, *tables, str(style)), like=at)
            new = [emit(graph, operator.getitem, (both, i), like=t.out) for i, t in enumerate((q, k))]
            if q.transposed:
                order = q.x.args[1]
                new = [emit(graph, aten.permute.default, (n, order), like=n) for n in new]
        if all(same_strides(tensor(n), tensor(t.out)) for n, t in zip(new, (q, k), strict=True)):
            for node, turn in zip(new, (q, k), strict=True):
                turn.out.replace_all_uses_with(node)
                erase_dead(turn.out)
            return None
        for node in new:
            erase_dead(node)
    return Decline("strides", f"{q.out.name} and {k.out.name} do not lie in memory as one operator would leave both")


def _more_heads(a: Turn, b: Turn) -> bool:
    heads, others = tensor(a.normed).shape[-2], tensor(b.normed).shape[-2]
    return isinstance(heads, int) and isinstance(others, int) and heads > others


def _turn(node: fx.Node) -> Turn | Decline | None:
    """The rotation whose last product or join is `node`."""
    if is_call(node, aten.view_as_complex.default):
        return Decline("complex_rotary", "the rotation is a product of complex numbers, whose last bits differ from real ones")
    core = _rotated(node) or _joined(node)
    if core is None:
        return None
    x, cos, sin, base, pairs = core
    if not all(same(_width(table), _width(x) // (2 if pairs else 1)) for table in (cos, sin)):
        return None  # one angle for a whole head
    out = node
    if tensor(out).dtype != tensor(x).dtype:
        cast = only_user(out)
        if cast is None or cast_source(cast) is not out or tensor(cast).dtype != tensor(x).dtype:
            return Decline("dtype", f"the rotation stays in {tensor(out).dtype}, its input is {tensor(x).dtype}")
        out = cast
    part = _part(x)
    if part is not None and part.start == 0 and part.step == 1:  # a part of each head is turned, the rest joined again
        join = only_user(out)
        joined = _pieces(join, stacked=False)
        if joined is None or joined[0] is not out or _part(joined[1]) != Part(part.source, part.stop, _width(part.source)):
            return None
        x, out = part.source, join  # type: ignore[assignment]
    heads = _heads(cos, x)
    if heads is None or _heads(sin, x) != heads:
        return None
    turn = Turn(out, x, cos, sin, base, pairs, heads)
    swapped = list(range(tensor(x).dim()))
    swapped[-2], swapped[-3] = swapped[-3], swapped[-2]
    if turn.transposed and not (is_call(x, aten.permute.default) and x.args[1] == swapped):
        return None
    if not is_call(turn.normed, registry["rms_norm"].default):
        return None
    if torch.promote_types(tensor(x).dtype, tensor(cos).dtype) != tensor(node).dtype:
        return Decline("dtype", f"the products are formed in {tensor(node).dtype}, the tables are {tensor(cos).dtype}")
    return turn


def _rotated(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, str, bool] | None:
    """(x, cos, sin, base, pairs) of x·cos + rotate(x)·sin."""
    if not is_call(node, aten.add.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return None
    for straight, crossed in operands(node):
        if not is_call(straight, aten.mul.Tensor) or not is_call(crossed, aten.mul.Tensor):
            continue
        for turned, sin in operands(crossed):
            found = _quarter(turned)
            if found is None or not is_tensor(sin):
                continue
            for x, cos in operands(straight):
                if is_tensor(x) and is_tensor(cos) and peel_widening(x) is peel_widening(found[0]):
                    return peel_widening(x), cos, sin, found[1], False
    return None


def _quarter(node: object) -> tuple[fx.Node, str] | None:
    """x and the base of x turned by a right angle: (−second, first) of each pair."""
    base = "half"
    if is_call(node, *VIEWS) and is_call(node.args[0], aten.cat.default):  # type: ignore[union-attr]
        node, base = node.args[0], "interleaved"  # type: ignore[union-attr]
    parts = _pieces(node, stacked=base == "interleaved")
    if parts is None or not is_call(parts[0], aten.neg.default):
        return None
    source = _pair(parts[1], parts[0].args[0], base)
    return None if source is None else (source, base)


def _joined(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, str, bool] | None:
    """(x, cos, sin, base, pairs) of (a·cos − b·sin, b·cos + a·sin), joined in halves or pair by pair."""
    base = "half"
    if is_call(node, *VIEWS) and is_call(node.args[0], aten.cat.default):
        base = "interleaved"
    parts = _pieces(node.args[0] if base == "interleaved" else node, stacked=base == "interleaved")
    if parts is None or not is_call(parts[0], aten.sub.Tensor) or not is_call(parts[1], aten.add.Tensor):
        return None
    if any(p.kwargs.get("alpha", 1) != 1 or not all(is_call(a, aten.mul.Tensor) for a in p.args) for p in parts):
        return None
    ac, bs = parts[0].args
    for (a, cos), (b, sin) in itertools.product(operands(ac), operands(bs)):  # type: ignore[arg-type]
        source = _pair(a, b, base)
        if source is None or not is_tensor(cos) or not is_tensor(sin):
            continue
        products = [set(p.args) for p in parts[1].args]  # type: ignore[union-attr]
        if {b, cos} in products and {a, sin} in products:
            return peel_widening(source), cos, sin, base, True
    return None


def _pieces(node: object, stacked: bool) -> list[fx.Node] | None:
    """The two tensors that a node joins along its last dimension, one after the other or (`stacked`) element by element."""
    if not is_call(node, aten.cat.default) or len(node.args) < 2 or len(node.args[0]) != 2:  # type: ignore[union-attr]
        return None
    last = tensor(node).dim() - 1  # type: ignore[arg-type]
    if node.args[1] not in (-1, last):  # type: ignore[union-attr]
        return None
    parts = list(node.args[0])  # type: ignore[union-attr]
    if stacked:
        if not all(is_call(p, aten.unsqueeze.default) and p.args[1] in (-1, last) for p in parts):
            return None
        parts = [p.args[0] for p in parts]
    return parts


def _pair(first: object, second: object, base: str) -> fx.Node | None:
    """The tensor whose pairs have these first and second elements."""
    a, b = _part(first), _part(second)
    if a is None or b is None or a.source is not b.source:
        return None
    width = _width(a.source)
    if base == "interleaved":
        wanted = (Part(a.source, 0, width, 2), Part(a.source, 1, width, 2))
    else:
        wanted = (Part(a.source, 0, width // 2), Part(a.source, width // 2, width))
    return a.source if (a, b) == wanted and width % 2 == 0 else None


def _part(node: object) -> Part | None:
    """What a slice or one result of a split takes of its source's last dimension."""
    if not is_tensor(node):
        return None
    node = peel_widening(node)  # type: ignore[arg-type]
    if is_call(node, aten.slice.Tensor):
        source, dim, start, stop, step = (*node.args, *(0, 0, 2**63 - 1, 1)[len(node.args) - 1 :])
        if dim not in (-1, tensor(node).dim() - 1) or not isinstance(_width(source), int):
            return None
        width = _width(source)
        return Part(peel_widening(source), start or 0, min(width if stop is None else stop, width), step)
    if is_call(node, operator.getitem) and is_call(node.args[0], *_SPLITS):
        split: Any = node.args[0]
        index: Any = node.args[1]
        source, dim = split.args[0], split.args[2] if len(split.args) > 2 else 0
        widths = [v.shape[-1] for v in split.meta["val"]]
        if dim in (-1, tensor(source).dim() - 1):
            return Part(peel_widening(source), sum(widths[:index]), sum(widths[: index + 1]))
    return None


def _width(node: fx.Node) -> int:
    return tensor(node).shape[-1]


def _heads(table: fx.Node, x: fx.Node) -> int | None:
    """The dimension of x along which a table is the same for all heads, or None."""
    dims = tensor(x).dim()
    if tensor(table).dim() != dims or dims < 3:
        return None
    if is_call(table, aten.unsqueeze.default) and table.args[1] % dims in (dims - 3, dims - 2):  # type: ignore[operator]
        return table.args[1] % dims  # type: ignore[operator]
    alone = [d for d in (dims - 3, dims - 2) if same(tensor(table).shape[d], 1)]
    return alone[0] if alone else None


def _bare(table: fx.Node, dim: int) -> fx.Node:
    """What a table was before it got a dimension for the heads."""
    inserted = is_call(table, aten.unsqueeze.default) and table.args[1] % tensor(table).dim() == dim  # type: ignore[operator]
    return table.args[0] if inserted else table  # type: ignore[return-value]


def _without(table: fx.Node, dim: int, like: fx.Node) -> fx.Node:
    """A table without its dimension for the heads."""
    bare = _bare(table, dim)
    return emit(table.graph, aten.squeeze.dim, (table, dim), like=like) if bare is table else bare
