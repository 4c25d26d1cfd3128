"""Products next to a reduce-scatter or an all-gather become one operator, whose kernels overlap the two.

Works on chains that sequence parallelism rewrote and on models that are written with reduce-scatter and all-gather.  A
reduce-scatter is found by the operators' own bodies, with the norm and the quantise of own rows behind it; a gather takes as
many products as work from it.  A product wins its reduce-scatter, norm and quantise before an all-gather without products can.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from tpfuse.formats import Layout, Scheme
from tpfuse.fusion import composites
from tpfuse.fusion.composites import Fuel, Worth
from tpfuse.fusion.flat import flatten
from tpfuse.ir.op import Args, Op, find, registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import emit, erase_dead, fake
from tpfuse.rewrite.match import is_call, result_at
from tpfuse.rewrite.order import ORDER, latest_collective, number_collectives, sort
from tpfuse.rewrite.site import site_of

PASS = "async_tp"
SCATTERS = ("reduce_scatter", *(name for name in registry if "matmul_reduce_scatter" in name))
GATHERS = ("all_gather", "all_gather_quantized", "all_gather_matmul", "all_gather_scaled_matmul")
_ATTRIBUTES = ("scheme", "layout", "weight_layout", "out_dtype", "fast_accum", "origin")


def async_tp(
    graph: fx.Graph, fuel: Fuel = lambda: True, worth: Worth = lambda op, args: None
) -> list[Event]:
    """Fuse every product with the collective beside it where that is worth it.  What has a product on one side only is declined
    as "one_side"."""
    number_collectives(graph)
    flatten(graph)
    _pair_scales(graph)
    events = _fuse_scatters(graph, fuel, worth)
    for node in [n for n in graph.nodes if _named(n, "all_gather", "all_gather_quantized")]:
        latest = latest_collective(graph)
        gather = Gather.of(node, latest)
        if gather is None:
            continue
        declined = worth(gather.target, fake(gather.target.bind(gather.arguments)))
        if declined is not None:
            node.meta[composites.REFUSED] = (gather.target.name, declined)
        elif fuel():
            events.append(gather.fuse())
            sort(graph)
    return [*events, *_left_over(graph)]


def _fuse_scatters(graph: fx.Graph, fuel: Fuel, worth: Worth) -> list[Event]:
    """Reduce-scatters with the products before them and what follows on own rows.  Rules go by size, the larger first, and why
    one refused is kept for the report, since a smaller one may change the place."""

    def worth_of_products(op: Op, args: Args) -> Decline | None:
        return worth(op, args) if op.fuse == PASS else None

    events: list[Event] = []
    rules = composites.rules()
    base = [rule for rule in rules if rule.op.fuse == "always"]
    for _, alike in itertools.groupby((r for r in rules if r.op.fuse == PASS), key=lambda rule: len(rule.targets)):
        fired, declines = composites.apply(graph, [*base, *alike], fuel, worth_of_products)
        events += fired
        for node, refused in declines.items():
            for rule, reason in refused:
                if rule.op.fuse == PASS and reason.code not in composites.MISMATCHES:
                    node.meta.setdefault(composites.REFUSED, (rule.name, reason))
    return events


class Gather:
    """An all-gather (of quantised rows too) with the products that can be done as its shards arrive."""

    def __init__(self, node: fx.Node, rows: fx.Node, products: Sequence[fx.Node]) -> None:
        self.node, self.rows, self.products = node, rows, products

    @classmethod
    def of(cls, node: fx.Node, latest: dict[fx.Node, int]) -> Gather | None:
        """The gather at `node` with the products of its rows that need nothing from a later collective; None where there
        are none.  Products of quantised rows go together where they agree in everything but weight, bias and their scales."""
        rows = result_at(node, 0) if _named(node, "all_gather_quantized") else node
        if rows is None:
            return None

        def ready(product: fx.Node) -> bool:
            given = (("x", rows), ("x_scale", result_at(node, 1)))  # as the weight, rows wait for all of them
            others = [a for name, a in _bound(product).items() if isinstance(a, fx.Node) and (name, a) not in given]
            return all(latest[a] < node.meta[ORDER] for a in others)

        users = [u for u in rows.users if _named(u, "matmul", "scaled_matmul") and _bound(u)["x"] is rows and ready(u)]
        if _named(node, "all_gather") and all(_named(u, "matmul") for u in users):
            return cls(node, rows, users) if users else None
        products = [u for u in users if _named(u, "scaled_matmul") and _scales_fit(node, u)]
        alike = [p for p in products if _key(p) == _key(products[0])]
        return cls(node, rows, alike) if alike else None

    @property
    def target(self) -> Op:
        return registry["all_gather_scaled_matmul" if self.scaled else "all_gather_matmul"]

    @property
    def others(self) -> list[fx.Node]:
        """Who else uses the gathered rows or scales."""
        parts = [n for n in (self.rows, result_at(self.node, 1)) if n is not None]
        return [u for n in parts for u in n.users if u not in self.products]

    @property
    def arguments(self) -> list[Any]:
        return [*self._operands(), bool(self.others), _bound(self.node)["group"]]

    def fuse(self) -> Event:
        """Put the fused operator in the gather's place."""
        graph, node, target, others = self.node.graph, self.node, self.target, self.others
        with graph.inserting_before(node):
            new = emit(graph, target.default, self.arguments, like=node)
            for i, product in enumerate(self.products):
                product.replace_all_uses_with(emit(graph, operator.getitem, (new, i), like=product))
            if others:
                kept = [n for n in (self.rows, result_at(node, 1)) if n is not None]
                for i, value in enumerate(kept):
                    if value.users:
                        value.replace_all_uses_with(emit(graph, operator.getitem, (new, len(self.products) + i), like=value))
        for product in self.products:
            erase_dead(product)
        for part in list(node.users) if _named(node, "all_gather_quantized") else ():
            erase_dead(part)  # scales that no product takes
        if not node._erased:
            erase_dead(node)
        attributes = {**composites.attributes(target, new), "products": len(self.products)}
        return Event("fired", target.name, site_of(new), attributes=attributes, node=new.name)

    @property
    def scaled(self) -> bool:
        return _named(self.products[0], "scaled_matmul")

    def _operands(self) -> list[Any]:
        gather, products = _bound(self.node), [_bound(p) for p in self.products]

        def each(name: str) -> list[Any]:
            return [p[name] for p in products]

        if not self.scaled:
            return [gather["x"], each("weight"), each("bias"), gather["rows"]]
        x, scales = (gather["q"], gather["scales"]) if "q" in gather else (gather["x"], None)
        if products[0]["scheme"] == "fp8_tensor":
            scales = products[0]["x_scale"]
        lists = [each(name) for name in ("weight", "weight_scale", "bias", "result_scale", "alpha")]
        return [x, scales, *lists, *(products[0][name] for name in _ATTRIBUTES), gather["rows"]]


def _scales_fit(gather: fx.Node, product: fx.Node) -> bool:
    """Whether a product's row scales are those that come with the gathered rows, or one number for all rows."""
    bound = _bound(product)
    if bound["scheme"] == "fp8_tensor":
        return bound["x_scale"] is not result_at(gather, 1)
    if not _named(gather, "all_gather_quantized") or bound["x_scale"] is not result_at(gather, 1):
        return False
    how = _bound(gather)
    return Scheme.parse(how["scheme"]).name == bound["scheme"] and how["layout"] == bound["layout"]


def _key(product: fx.Node) -> tuple[Any, ...]:
    bound = _bound(product)
    return (bound["x_scale"], *(bound[name] for name in _ATTRIBUTES))


def _pair_scales(graph: fx.Graph) -> None:
    """Quantised rows and their scales, gathered one by one for a product, are gathered together."""
    for product in [n for n in graph.nodes if _named(n, "scaled_matmul")]:
        bound = _bound(product)
        q, scales, layout = bound["x"], bound["x_scale"], Layout.parse(bound["layout"])
        if not (_named(q, "all_gather") and _named(scales, "all_gather") and layout.base in ("row", "linear")):
            continue
        first, second = sorted((q, scales), key=lambda n: n.meta[ORDER])
        latest = latest_collective(graph)
        if _bound(q)["group"] != _bound(scales)["group"] or latest[second.args[0]] >= first.meta[ORDER]:
            continue
        with graph.inserting_before(second):
            args = (q.args[0], scales.args[0], bound["scheme"], bound["layout"], _bound(q)["group"], _bound(q)["rows"])
            both = emit(graph, registry["all_gather_quantized"].default, args, like=first)
            for i, old in enumerate((q, scales)):
                old.replace_all_uses_with(emit(graph, operator.getitem, (both, i), like=old))
        erase_dead(q)
        erase_dead(scales)
        sort(graph)


def _left_over(graph: fx.Graph) -> Iterator[Event]:
    """An event for each scatter and gather of rows without a product, saying whether its other side has one."""
    for node in [n for n in graph.nodes if _named(n, *SCATTERS, *GATHERS)]:
        op = find(node.target)
        assert op is not None
        if op.fuse == PASS:
            continue
        scatter = op.name == "reduce_scatter"
        around = _name(node.args[0]) if scatter else ", ".join(sorted({_name(u) for u in _users(node)})) or "nothing"
        why = f"its input comes from {around}" if scatter else f"it is used by {around}"
        partner = _partner(node, GATHERS if scatter else SCATTERS, forward=scatter)
        other = find(partner.target) if partner is not None else None
        reason = Decline("no_product", why)
        if scatter and _named(node.args[0], "matmul", "scaled_matmul"):
            others = ", ".join(u.name for u in node.args[0].users if u is not node)
            reason = Decline("second_user", f"the product is used by {others} as well" if others else why)
        if other is not None and other.fuse == PASS:
            reason = Decline("one_side", f"the {'gather' if scatter else 'scatter'} on its other side is fused; {why}")
        wanted = "matmul_reduce_scatter" if scatter else "all_gather_matmul"
        wanted, reason = node.meta.get(composites.REFUSED, (wanted, reason))
        yield Event("declined", wanted, site_of(node), reason=reason, attributes={"operator": op.name}, node=node.name)


def _partner(node: fx.Node, names: Sequence[str], forward: bool) -> fx.Node | None:
    """The nearest collective of `names` along own rows, after a scatter or before a gather."""
    seen: set[fx.Node] = set()
    found: list[fx.Node] = []
    pending = list(node.users if forward else node.all_input_nodes)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        op = find(value.target)
        if op is not None and op.collective:
            found += [value] if _named(value, *names) else []
        else:
            pending += value.users if forward else value.all_input_nodes
    pick = min if forward else max
    return pick(found, key=lambda n: n.meta[ORDER], default=None)


def _named(node: Any, *names: str) -> bool:
    return is_call(node, *(registry[name].default for name in names))


def _bound(node: fx.Node) -> dict[str, Any]:
    op = find(node.target)
    assert op is not None
    return op.bind(node.args, node.kwargs)


def _users(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from user.users if user.target is operator.getitem else [user]


def _name(node: Any) -> str:
    if node.op == "call_function" and node.target is operator.getitem:
        return _name(node.args[0])
    op = find(node.target)
    return op.name if op is not None else str(node.target) if node.op == "call_function" else f"a graph {node.op}"
