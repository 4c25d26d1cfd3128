"""Rules between IR operators, derived from the operators' own bodies, and the matcher that applies them.

Between IR operators there are no views, no casts and no spellings left, so a pattern is the traced body itself: one node an
operator, joined as they must be joined.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tpfuse.ir.op import Op, find
from tpfuse.report import Decline
from tpfuse.rewrite.match import is_tensor

aten = torch.ops.aten
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


@dataclass(frozen=True)
class Rule:
    """pattern: the traced body of `op`, with the optional steps of `dropped` left out.  Its last call is the anchor."""

    op: Op
    pattern: fx.Graph
    dropped: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.op.name

    @functools.cached_property
    def anchor(self) -> fx.Node:
        return [n for n in self.pattern.nodes if n.op == "call_function" and n.target is not operator.getitem][-1]

    @functools.cached_property
    def targets(self) -> list[Any]:
        return [n.target for n in self.pattern.nodes if n.op == "call_function" and n.target is not operator.getitem]

    def __str__(self) -> str:
        """The rule as Python: what is found → what replaces it."""
        body = "\n".join(f"    {n.name} = {_call(n)}" for n in self.pattern.nodes if n.op == "call_function")
        left = f" without {', '.join(sorted(self.dropped))}" if self.dropped else ""
        return f"# {self.name}{left}\ndef pattern({', '.join(self.op.params)}):\n{body}\n"


@functools.cache
def rules_of(op: Op) -> tuple[Rule, ...]:
    """A rule for each subset of the body's optional steps, the most complete first; none for a variadic operator."""
    if op.variadic:
        return ()
    names = [n.meta["optional"] for n in _trace(op).nodes if "optional" in n.meta]
    subsets = itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names) + 1))
    return tuple(Rule(op, _trace(op, frozenset(drop)), frozenset(drop)) for drop in subsets)


def _trace(op: Op, drop: frozenset[str] = frozenset()) -> fx.Graph:
    graph = op.traced(op.through)
    for node in list(graph.nodes):
        if node.meta.get("optional") in drop:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:  # a result of an inner operator that the body does not use
            graph.erase_node(node)
    return graph


@dataclass
class Match:
    """A place where a rule's pattern stands.  args: the operator's arguments.  nodes: pattern node → graph node."""

    rule: Rule
    args: dict[str, Any] = field(default_factory=dict)
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def copy(self) -> Match:
        return Match(self.rule, dict(self.args), dict(self.nodes))

    def results(self) -> list[list[fx.Node]]:
        """For each result of the operator, the graph nodes that hold it now (none where it is dead)."""
        (outs,) = self.rule.pattern.find_nodes(op="output")[0].args
        return [self._values(out) for out in (outs if isinstance(outs, tuple) else (outs,))]

    def _values(self, out: fx.Node) -> list[fx.Node]:
        if out.target is operator.getitem:
            whole, index = out.args
            return [u for u in self.nodes[whole].users if u.target is operator.getitem and u.args[1] == index]
        return [self.nodes[out]]

    def calls(self) -> list[fx.Node]:
        return [g for p, g in self.nodes.items() if p.op == "call_function" and p.target is not operator.getitem]

    def escaping(self) -> fx.Node | None:
        """A user of an inner value that the fused operator would not return, or None."""
        results = set(itertools.chain.from_iterable(self.results()))
        inside = set(self.nodes.values())
        for call in self.calls():
            values = [u for u in call.users if u.target is operator.getitem] if _is_multi(call) else [call]
            for value in values:
                if value in results:
                    continue
                for user in value.users:
                    if user not in inside:
                        return user
        return None


    def tangled(self) -> fx.Node | None:
        """An argument that depends on what is matched (the scale of all tokens of a norm's result), or None."""
        inside = set(self.calls())
        first = min(inside)
        for argument in self.args.values():
            pending = [argument] if isinstance(argument, fx.Node) else []
            seen: set[fx.Node] = set()
            while pending:
                node = pending.pop()
                if node in inside:
                    return argument
                if node not in seen and not node < first:
                    seen.add(node)
                    pending += node.all_input_nodes
        return None


def find_match(rule: Rule, node: fx.Node) -> Match | Decline | None:
    """Where `node` is the rule's anchor: a match, or why it is none; None where the node is of another kind."""
    if node.op != "call_function" or node.target != rule.anchor.target:
        return None
    reason: Decline | None = None
    for match in _match(Match(rule), rule.anchor, node):
        if isinstance(match, Decline):
            reason = reason or match
            continue
        args = {k: match.args.get(k, d) for k, d in _defaults(rule.op).items()}
        match.args = args
        if (user := match.escaping()) is not None:
            declined = Decline("second_user", f"an inner result is used by {user.name} ({user.target}) as well")
        elif (argument := match.tangled()) is not None:
            declined = Decline("depends_on_result", f"{argument.name} is computed from a result of what would be fused")
        else:
            declined = rule.op.guard({k: v.meta["val"] if isinstance(v, fx.Node) else v for k, v in args.items()})
        if declined is None:
            return match
        reason = declined
    return reason


def _defaults(op: Op) -> dict[str, Any]:
    return {p.name: None if p.default is p.empty else p.default for p in op.signature.parameters.values()}


def _match(match: Match, p: Any, g: Any) -> Iterator[Match | Decline]:
    """Every way in which pattern value p stands at graph value g, given what is bound already."""
    if not isinstance(p, fx.Node):
        if p == g:
            yield match
        else:
            yield Decline("constant", f"expected {p!r}, found {g!r}")
        return
    if p.op == "placeholder":
        yield _bind(match, p, g)
        return
    if p in match.nodes:
        if match.nodes[p] is g:
            yield match
        else:
            yield Decline("structure", f"{p.name} stands in two places")
        return
    if not isinstance(g, fx.Node) or g.op != "call_function" or g.target != p.target:
        yield Decline("producer", f"expected {_name(p)}, found {_name(g)}")
        return
    here = match.copy()
    here.nodes[p] = g
    for p_args, g_args in _orders(p, g):
        yield from _match_all(here, p_args, g_args)


def _match_all(match: Match, ps: list[Any], gs: list[Any]) -> Iterator[Match | Decline]:
    if not ps:
        yield match
        return
    for head in _match(match, ps[0], gs[0]):
        if isinstance(head, Decline):
            yield head
        else:
            yield from _match_all(head, ps[1:], gs[1:])


def _orders(p: fx.Node, g: fx.Node) -> Iterator[tuple[list[Any], list[Any]]]:
    """The arguments of both, in the order written and, where the operator commutes, exchanged."""
    op = find(g.target)
    ps, gs = list(p.args), list(g.args)
    if op is not None:
        ps, gs = list(op.bind(p.args, p.kwargs).values()), list(op.bind(g.args, g.kwargs).values())
        swap = [op.params.index(name) for name in op.commutes or ()]
    else:
        if g.kwargs.get("alpha", 1) != 1:
            return
        swap = [0, 1] if p.target in COMMUTATIVE else []
    yield ps, gs
    if swap:
        i, j = swap
        gs = list(gs)
        gs[i], gs[j] = gs[j], gs[i]
        yield ps, gs


_KINDS: dict[str, Any] = {"Tensor": fx.Node, "float": (float, int), "str": str, "int": (int, fx.Node), "bool": bool}


def _bind(match: Match, p: fx.Node, g: Any) -> Match | Decline:
    name = str(p.target)
    if name in match.args:
        same = match.args[name] is g or (not isinstance(g, fx.Node) and match.args[name] == g)
        return match if same else Decline("attributes", f"two values for {name}: {match.args[name]} and {g}")
    kind = str(p.type)
    if g is None and "None" in kind:
        pass
    elif not isinstance(g, _KINDS[kind.split(" |")[0]]) or (isinstance(g, fx.Node) and is_tensor(g) != kind.startswith("Tensor")):
        return Decline("argument", f"{name} must be a {kind}, found {_name(g)}")
    bound = match.copy()
    bound.args[name] = g
    return bound


def _is_multi(call: fx.Node) -> bool:
    op = find(call.target)
    return op is not None and op.results > 1


def _name(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op != "call_function":
        return f"a graph input ({value.name})" if value.op == "placeholder" else value.op
    if value.target is operator.getitem:
        return f"result {value.args[1]} of {_name(value.args[0])}"
    op = find(value.target)
    return op.name if op else str(value.target)


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{node.args[0]}[{node.args[1]}]"
    return f"{_name(node)}({', '.join(map(str, node.args))})"
