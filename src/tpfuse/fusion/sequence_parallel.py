"""Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): the residual stays sharded by rows along a chain.

Every all-reduce of a chain becomes a reduce-scatter, what follows works on own rows, and what somebody needs whole is
gathered: normalised rows, quantised ones where everybody takes them so.  A chain is rewritten as a whole or left alone.
Its residual enters a graph whole (own rows are cut out) and leaves it whole (gathered).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tpfuse.formats import Scheme, default_layout, scales_meta
from tpfuse.fusion.composites import Fuel
from tpfuse.fusion.rows import REDUCTIONS, regroups, replicated, row_operands
from tpfuse.fusion.shards import Shards
from tpfuse.ir.collective import world_size
from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.match import contiguous, is_call, is_tensor, tensor
from tpfuse.rewrite.order import ORDER, number_collectives
from tpfuse.rewrite.site import site_of

PASS = "sequence_parallel"
NORMS = (registry["rms_norm"].default, registry["add_rms_norm"].default)


@dataclass
class Chain:
    """A residual chain before it is rewritten: what a policy decides on.

    nodes: what will work on own rows, in program order.  sums: the all-reduces among them.  gathered: the values that others
    need whole.  reduced_bytes, gathered_bytes: a token's bytes in all sums, and in all gathers after the rewrite.
    """

    group: str
    nodes: list[fx.Node]
    sums: list[fx.Node] = field(default_factory=list)
    gathered: list[fx.Node] = field(default_factory=list)

    @property
    def world(self) -> int:
        return world_size(self.group)

    @property
    def dtype(self) -> Any:
        return tensor(self.sums[0]).dtype

    @property
    def hidden(self) -> int:
        return int(tensor(self.sums[0]).shape[-1])

    @property
    def scheme(self) -> str:
        """The scheme that the chain's norms are quantised with: its name where all of them share one, else ""."""
        quantised = [n for n in self.nodes if is_call(n, registry["quantize"].default)]
        names = {Scheme.parse(registry["quantize"].bind(n.args, n.kwargs)["scheme"]).name for n in quantised}
        return names.pop() if len(names) == 1 else ""

    @property
    def gathers(self) -> int:
        """All-gathers after the rewrite; scales are gathered with their values."""
        return sum(not _is_scales(n) for n in self.gathered)

    @property
    def reduced_bytes(self) -> int:
        return sum(map(_row_bytes, self.sums))

    @property
    def gathered_bytes(self) -> int:
        return sum(map(_row_bytes, self.gathered))


Policy = Callable[[Chain], Decline | None]  # why this chain should stay as it is, or None


def sequence_parallel(
    graph: fx.Graph, policy: Policy = lambda chain: None, fuel: Fuel = lambda: True
) -> list[Event]:
    """Rewrite every chain that `policy` lets pass.  An event for each chain, rewritten or declined."""
    events = []
    for group in _groups(graph):
        shared = replicated(graph, group)
        for chain in list(chains(graph, group, shared)):
            site = site_of(chain.sums[0])
            sizes = {"all_reduces": len(chain.sums), "gathers": chain.gathers}
            declined = _structure(chain) or policy(chain)
            if declined is None and fuel():
                Shards(graph, group, chain.nodes, chain.gathered).rewrite()
                events.append(Event("fired", PASS, site, attributes=sizes))
            elif declined is not None:
                events.append(Event("declined", PASS, site, reason=declined, attributes=sizes))
    for node in graph.nodes:  # the new gathers stand where the program order wants them
        node.meta.pop(ORDER, None)
    number_collectives(graph)
    return events


def chains(graph: fx.Graph, group: str, shared: set[fx.Node]) -> Iterator[Chain]:
    """The residual chains over `group`: all-reduces joined by operators that a rank can do on its own rows.

    shared: the nodes that are the same on every rank.
    """
    own = _own_rows(graph, group, shared)
    own -= _recomputed(own)
    members: dict[fx.Node, set[fx.Node]] = {}
    for node in (n for n in graph.nodes if n in own):
        joined = {node}.union(*(members[a] for a in node.all_input_nodes if a in members))
        members.update(dict.fromkeys(joined, joined))
    for part in {id(p): p for p in members.values()}.values():
        chain = Chain(group, [n for n in graph.nodes if n in part])
        chain.sums = [n for n in chain.nodes if _is_sum(n, group)]
        chain.gathered = [n for n in chain.nodes if _outside(n, part)]
        if chain.sums and any(not _is_sum(n, group) and not regroups(n) for n in chain.nodes):
            yield chain


def _groups(graph: fx.Graph) -> list[str]:
    """Groups of several ranks that the graph sums over, in program order."""
    sums = [n for n in graph.nodes if is_call(n, registry["all_reduce"].default)]
    return [g for g in dict.fromkeys(n.args[1] for n in sums) if world_size(g) > 1]


def _is_sum(node: fx.Node, group: str) -> bool:
    return is_call(node, registry["all_reduce"].default) and node.args[1] == group


def _own_rows(graph: fx.Graph, group: str, shared: set[fx.Node]) -> set[fx.Node]:
    """All that a rank could do on its own rows alone, were every sum scattered.  What takes a value worked out from gathered
    rows (the scale of all tokens of a quantise) waits for a gather and is done on all rows."""
    own: set[fx.Node] = set()
    behind: set[fx.Node] = set()  # a gather
    for node in graph.nodes:
        if _is_sum(node, group):
            if tensor(node).dim() > 1:
                own.add(node)
        elif node.op == "call_function" and node in shared and any(a in own for a in node.all_input_nodes):
            rows = row_operands(node, own.__contains__, shared) or []
            waits = any(a in behind for a in node.all_input_nodes if a not in rows)
            # Nothing is narrower than quantised rows: they are gathered as they are, whatever follows.
            if not waits and any(a in own for a in rows) and (regroups(node) or not any(map(_is_quantised, rows))):
                own.add(node)
        if node not in own and any(a in own or a in behind for a in node.all_input_nodes):
            behind.add(node)
    return own


def _recomputed(own: set[fx.Node]) -> set[fx.Node]:
    """What is better done on all rows: somebody needs it whole, and all that it is made of is gathered anyway.

    One gather serves all who can work from it: a norm that is needed both as it is and quantised is gathered once.
    """
    order = sorted(own)
    whole: set[fx.Node] = set()  # gathered, or made of what is gathered
    made: set[fx.Node] = set()

    def leaves(node: fx.Node) -> bool:
        return any(u not in own or (regroups(u) and leaves(u)) for u in node.users)

    for node in order:
        inputs = [a for a in node.all_input_nodes if a in own]
        if inputs and all(a in whole for a in inputs):
            made.add(node)
        if node in made or leaves(node):
            whole.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(order):
        if any(u not in own or (u in made and u in needed) for u in node.users):
            needed.add(node)
    return made & needed


def _outside(node: fx.Node, part: set[fx.Node]) -> bool:
    return is_tensor(node) and any(u not in part for u in node.users)


def _structure(chain: Chain) -> Decline | None:
    """Why a chain must not be rewritten, whatever the machine."""
    if chain.gathered_bytes > chain.reduced_bytes:
        return Decline(
            "more_gathers",
            f"{chain.gathers} gathers would move {chain.gathered_bytes} bytes a token, the {len(chain.sums)} sums "
            f"scatter {chain.reduced_bytes}",
        )
    if not any(n.target in NORMS or n.target in REDUCTIONS for n in chain.nodes):
        return Decline("no_norm", "its residual is needed whole after every sum: no norm would work on own rows")
    for node in chain.gathered:  # scales are put together by their layout
        if not _is_scales(node) and not contiguous(tensor(node)):
            return Decline("strides", f"{node.name} is needed with strides {tuple(tensor(node).stride())}: no gathered rows")
    return None


def _is_quantised(node: fx.Node) -> bool:
    while regroups(node):
        node = node.args[0]  # type: ignore[assignment]
    return node.target is operator.getitem and is_call(node.args[0], registry["quantize"].default)


def _is_scales(node: fx.Node) -> bool:
    return _is_quantised(node) and node.target is operator.getitem and node.args[1] == 1


def _row_bytes(node: fx.Node) -> int:
    """Bytes of one row of a value; a quantised value's scales come with it."""
    value = tensor(node)
    if _is_scales(node):
        x, _, scheme, *_ = registry["quantize"].bind(node.args[0].args).values()  # type: ignore[union-attr]
        shape, _, dtype = scales_meta(1, tensor(x).shape[-1], scheme, default_layout(scheme))
        return math.prod(shape) * dtype.itemsize
    return int(value.shape[-1]) * value.dtype.itemsize
