"""Collectives keep their program order on every rank: their numbering, the check before a rewrite, the final sort; moving what a
rewrite needs above it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from tpfuse.ir.op import find

ORDER = "tpfuse_order"


def is_collective(node: fx.Node) -> bool:
    """Whether a node is an operator of tpfuse that meets other ranks, or a functional collective that was not raised."""
    op = find(node.target)
    if op is not None:
        return op.collective
    return getattr(node.target, "namespace", "") == "_c10d_functional" and "wait_tensor" not in str(node.target)


def number_collectives(graph: fx.Graph) -> None:
    """Give every collective its place in the program, once; rewrites hand the number on."""
    for i, node in enumerate(n for n in graph.nodes if is_collective(n)):
        node.meta.setdefault(ORDER, i)


def latest_collective(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node the number of the last collective that it depends on, itself included; -1 for none."""
    latest: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = max((latest[a] for a in node.all_input_nodes), default=-1)
        latest[node] = max(before, node.meta.get(ORDER, -1) if is_collective(node) else -1)
    return latest


def bring_before(node: fx.Node, values: Iterable[Any], movable: Callable[[fx.Node], bool] = lambda node: True) -> bool:
    """Move what computes `values` and stands below `node` above it.  False, nothing moved, where some of it is not `movable`, or
    depends on `node`."""
    above = set(itertools.takewhile(lambda n: n is not node, node.graph.nodes))
    late: set[fx.Node] = set()
    pending = [v for v in values if isinstance(v, fx.Node)]
    while pending:
        value = pending.pop()
        if value in above or value in late:
            continue
        if value is node or not movable(value):
            return False
        late.add(value)
        pending += value.all_input_nodes
    for value in sorted(late):
        node.prepend(value)
    return True


def sort(graph: fx.Graph) -> None:
    """Put nodes in a valid order that keeps the collectives in theirs and everything else as near as possible to where it
    stood.  ValueError where no such order exists."""
    nodes = list(graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    waiting = {n: set(n.all_input_nodes) for n in nodes}
    followers: dict[fx.Node, list[fx.Node]] = {n: list(n.users) for n in nodes}
    collectives = sorted((n for n in nodes if is_collective(n)), key=lambda n: n.meta[ORDER])
    pairs: Iterable[tuple[fx.Node, fx.Node]] = zip(collectives, collectives[1:], strict=False)
    for first, second in pairs:
        waiting[second].add(first)
        followers[first].append(second)
    output = nodes[-1]
    ready = [place[n] for n in nodes if not waiting[n] and n is not output]
    heapq.heapify(ready)
    ordered: list[fx.Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        ordered.append(node)
        for user in followers[node]:
            if node in waiting[user]:
                waiting[user].discard(node)
                if not waiting[user] and user is not output:
                    heapq.heappush(ready, place[user])
    if len(ordered) + 1 != len(nodes):
        raise ValueError("the collectives' program order and the data flow contradict each other")
    if ordered == nodes[:-1]:
        return
    cursor = next(iter(graph.nodes))._prev  # the root
    for node in ordered:
        cursor.append(node)
        cursor = node
