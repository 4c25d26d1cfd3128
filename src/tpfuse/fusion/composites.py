"""IR to IR by the composites' own bodies, to a fixpoint: smaller operators become the largest declared one that fits."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx

from tpfuse.ir.op import Args, Op, find, registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE, emit, fake
from tpfuse.rewrite.match import VIEWS, aten
from tpfuse.rewrite.order import ORDER, is_collective, latest_collective, number_collectives, sort
from tpfuse.rewrite.rule import Match, Rule, find_match, rules_of
from tpfuse.rewrite.site import site_of

SITES = ("rms_norm", "add_rms_norm", "quantize")  # beside collectives: what a report accounts for
MISMATCHES = ("producer", "constant")  # codes that say only that another chain stands there
REFUSED = "tpfuse_refused"  # metadata of a node at which an earlier pass's rule refused: the rule's name and its Decline
Fuel = Callable[[], bool]  # takes one unit; False when none is left
Worth = Callable[[Op, Args], Decline | None]  # why an operator with these arguments does not pay, or None


def rules() -> tuple[Rule, ...]:
    """Every derived rule: those that others build on, those with a collective, the rest; among these the composites in the
    order of their declaration (the smaller before those built on them).  Products beside collectives are built on nothing that
    another pass makes: the larger come first."""

    def place(rule: Rule) -> tuple[bool, bool, int]:
        op = rule.op
        return op.fuse != "always", not op.collective, -len(rule.targets) if op.fuse == "async_tp" else -sys.maxsize

    return tuple(sorted((rule for op in registry.values() if op.fuse for rule in rules_of(op)), key=place))


def fuse(graph: fx.Graph, passes: Iterable[str], fuel: Fuel = lambda: True) -> list[Event]:
    """Apply the rules of `passes` until none fires.  What stays unfused is explained by the closest rule."""
    enabled = {*passes, "always"} - {"async_tp"}  # which had its turn
    active = [rule for rule in rules() if rule.op.fuse in enabled]
    number_collectives(graph)
    events, declines = apply(graph, active, fuel)
    return [*events, *near_misses(graph, active, declines)]


def apply(
    graph: fx.Graph, active: Sequence[Rule], fuel: Fuel, worth: Worth = lambda op, args: None
) -> tuple[list[Event], dict[fx.Node, list[tuple[Rule, Decline]]]]:
    """Apply rules until none fires → what fired, and for each node the rules that nearly did.  worth: asked last."""
    events: list[Event] = []
    declines: dict[fx.Node, list[tuple[Rule, Decline]]] = {}
    fired = True
    while fired:
        fired = False
        declines.clear()
        for rule in active:
            nodes = graph.find_nodes(op="call_function", target=rule.anchor.target)
            latest = latest_collective(graph) if nodes else {}
            for node in nodes:
                found = find_match(rule, node)
                if isinstance(found, Match):
                    found = _order_kept(found, latest) or worth(rule.op, fake(found.args)) or found
                if isinstance(found, Decline):
                    declines.setdefault(node, []).append((rule, found))
                elif isinstance(found, Match) and rule.op.fuse != "always" and not fuel():
                    declines.setdefault(node, []).append((rule, Decline("fuel", "Config(fuel=…) was used up before this site")))
                elif isinstance(found, Match):
                    new = _replace(graph, found)
                    latest[new] = max(new.meta.get(ORDER, -1), *(latest[a] for a in new.all_input_nodes))
                    latest.update(dict.fromkeys(new.users, latest[new]))
                    fired = True
                    if rule.op.fuse != "always":
                        events = [e for e in events if e.node not in {c.name for c in found.calls()}]
                        events.append(_fired(rule, new))
            if fired:
                sort(graph)
    return events, declines


def _order_kept(match: Match, latest: dict[fx.Node, int]) -> Decline | None:
    """The fused operator stands where its collective stood: nothing it needs may come from there or from later."""
    number = min((c.meta[ORDER] for c in match.calls() if is_collective(c)), default=None)
    if number is None:
        return None
    late = [a for a in match.args.values() if isinstance(a, fx.Node) and latest[a] >= number]
    return Decline("order", f"{late[0].name} depends on the same or a later collective") if late else None


def _replace(graph: fx.Graph, match: Match) -> fx.Node:
    """Put the fused operator at the anchor; the sort that follows finds its place."""
    calls = match.calls()
    anchor = match.nodes[match.rule.anchor]
    collective = min((c for c in calls if is_collective(c)), key=lambda c: c.meta[ORDER], default=None)
    with graph.inserting_before(anchor):
        new = emit(graph, match.rule.op.default, list(match.args.values()), like=collective or anchor)
        for i, holders in enumerate(match.results()):
            if holders:
                value = new
                if match.rule.op.results > 1:
                    value = emit(graph, operator.getitem, (new, i), like=holders[0])
                    value.meta["val"] = holders[0].meta["val"]  # its strides: Inductor restores them where it leaves the graph
                for holder in holders:
                    holder.replace_all_uses_with(value)
    dead = {*match.nodes.values(), *(u for c in calls for u in c.users if u.target is operator.getitem)}
    while dead:
        leaf = next(n for n in dead if not n.users)
        dead.discard(leaf)
        graph.erase_node(leaf)
    return new


def _fired(rule: Rule, node: fx.Node) -> Event:
    return Event("fired", rule.name, site_of(node), attributes=attributes(rule.op, node), node=node.name)


def attributes(op: Op, node: fx.Node) -> dict[str, Any]:
    """What an operator carries besides its tensors: eps, weight_bias, rounding, scheme, layout …"""
    bound = op.bind(node.args, node.kwargs)
    return {k: v for k, v in bound.items() if isinstance(v, float | int | str) and k not in ("group", "kernel", "alive")}


def near_misses(graph: fx.Graph, active: list[Rule], declines: dict[fx.Node, list[tuple[Rule, Decline]]]) -> list[Event]:
    """An event for each collective, norm and quantise that no rule took, naming the closest rule and what it lacked."""
    events = []
    for node in graph.nodes:
        op = find(node.target)
        if op is None or op.fuse not in (None, "always") or not (op.collective or op.name in SITES):
            continue
        rule, reason = _closest(node, op, active, declines)
        events.append(Event("declined", rule, site_of(node), reason=reason, attributes={"operator": op.name}, node=node.name))
    return events


def _closest(
    node: fx.Node, op: Op, active: list[Rule], declines: dict[fx.Node, list[tuple[Rule, Decline]]]
) -> tuple[str, Decline]:
    if REFUSED in node.meta:
        return node.meta[REFUSED]
    wanted = [r for r in active if r.op.fuse != "always" and node.target in r.targets]
    if not wanted:
        return op.name, Decline("disabled", "no enabled pass has a rule for it")
    # A rule that stood at this node or at a consumer and refused knows best; a guard's word counts before a mere mismatch.
    around = [node, *_consumers(node, depth=4)]
    refused = [(r, d) for n in around for r, d in declines.get(n, []) if r in wanted and d.code not in MISMATCHES]
    if refused:
        return refused[0][0].name, refused[0][1]
    # What was not raised lies before the next operator: beyond it, it is another site's reason.
    marked = next((n.meta[DECLINE] for n in _consumers(node, 12, lambda n: find(n.target) is None) if DECLINE in n.meta), None)
    if marked is not None:
        return wanted[0].name, marked
    users = [u for u in _consumers(node)]
    if _leaves(node):
        return wanted[0].name, Decline("leaves_graph", "its result leaves the graph; compile the whole model, not its blocks")
    if op.collective:
        names = sorted({str(u.target) for u in users})
        return wanted[0].name, Decline("no_norm", f"no norm follows; it is used by {', '.join(names) or 'nothing'}")
    mismatch = [(r, d) for r, d in declines.get(node, []) if r in wanted]
    if mismatch:  # of one rule, the last is that of the shortest pattern, all optional steps left out
        first = next((r.name for r, _ in mismatch if r.op.collective), mismatch[0][0].name)
        rule, reason = [(r, d) for r, d in mismatch if r.name == first][-1]
        return rule.name, Decline("no_collective" if rule.op.collective else "no_producer", reason.detail)
    return wanted[0].name, Decline("no_consumer", f"it is used by {', '.join(str(u.target) for u in users) or 'nothing'}")


def _leaves(node: fx.Node) -> bool:
    """Whether a value goes to the graph's results and nowhere else, added to a residual or reshaped on its way."""
    through = (aten.add.Tensor, *VIEWS)
    return bool(node.users) and all(u.op == "output" or (u.target in through and _leaves(u)) for u in node.users)


def _consumers(
    node: fx.Node, depth: int = 1, through: Callable[[fx.Node], bool] = lambda node: True
) -> list[fx.Node]:
    """Users, results of several looked through, up to `depth` operators away and behind those that are looked `through`, the
    nearest first."""
    found: list[fx.Node] = []
    layer = [node]
    for _ in range(depth):
        step = []
        for n in layer:
            for user in n.users:
                if user.target is operator.getitem:
                    step += list(user.users)
                else:
                    step.append(user)
        new = [n for n in dict.fromkeys(step) if n not in found]
        found += new
        layer = [n for n in new if through(n)]
    return found
