"""Residuals that stay in FP32 from one fused site to the next, where both run as reference kernels.

Inductor's loops over unfused chains add several sites' rows to a residual before they round it.  Fused sites that rounded it each
time would be less exact than the graph that they replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import fx

from tpfuse.ir.op import Op, find
from tpfuse.rewrite.emit import emit
from tpfuse.rewrite.match import prims

LOW = (torch.bfloat16, torch.float16)


def takers(sites: Iterable[tuple[fx.Node, Op]]) -> set[fx.Node]:
    """The sites, of those that the reference kernel serves, that take an FP32 residual and may hand one on."""
    return {node for node, op in sites if op.in_f32 and op.results > 1 and _is_low(node, op)}


def stays_wide(items: Sequence[fx.Node], among: AbstractSet[fx.Node]) -> bool:
    """Whether a site among `among` takes the last result of another as its residual.  items: the nodes that hold it."""
    return any(_takes(user, item, among) for item in items for user in item.users)


def narrow_for_others(item: fx.Node, among: AbstractSet[fx.Node], dtype: torch.dtype) -> None:
    """Round a value for those of its users that take it as anything but a residual."""
    others = [user for user in item.users if not _takes(user, item, among)]
    if others:
        with item.graph.inserting_after(item):
            rounded = emit(item.graph, prims.convert_element_type.default, (item, dtype), like=item)
        for user in others:
            user.replace_input_with(item, rounded)


def _is_low(node: fx.Node, op: Op) -> bool:
    args = fx.node.map_arg(op.bind(node.args, node.kwargs), lambda n: n.meta["val"])
    return op.message(args).dtype in LOW


def _takes(user: fx.Node, value: fx.Node, among: AbstractSet[fx.Node]) -> bool:
    op = find(user.target)
    if op is None or user not in among:
        return False
    names = [name for name, argument in op.bind(user.args, user.kwargs).items() if argument is value]
    return all(name in op.row_args[1:] for name in names)
