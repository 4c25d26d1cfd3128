"""How rows (tokens) flow through operators: which values every rank shares, and what a rank can do with its own rows alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tpfuse.ir.op import find
from tpfuse.rewrite.match import VIEWS, is_call, is_tensor, reduces_last, same, tensor
from tpfuse.shim import OpOverload

aten, prims = torch.ops.aten, torch.ops.prims

# Views that may regroup rows; they count as such where they keep the last dimension.
REGROUPS = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim)
REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
# Apart from pointwise operators: same inputs on every rank, same result.  Products are missing on purpose: a weight may be a
# rank's own part of the whole.
SHARED = {
    *REGROUPS, *REDUCTIONS, operator.getitem, aten.embedding.default, aten.index.Tensor, aten.index_select.default,
    aten.slice.Tensor, aten.select.int, aten.cat.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.expand.default, aten.permute.default, aten.transpose.int, aten.t.default, aten._to_copy.default,
    aten.full.default, aten.full_like.default, aten.arange.start_step, prims.iota.default, aten.scalar_tensor.default,
    aten.constant_pad_nd.default, aten.gather.default, aten.cumsum.default, aten._local_scalar_dense.default,
}  # fmt: skip
PRODUCTS = ("matmul", "scaled_matmul")


def replicated(graph: fx.Graph, group: str) -> set[fx.Node]:
    """The nodes whose value is the same on all ranks of `group`.

    Graph inputs count as such: token ids, the residual of an earlier pipeline stage, norm weights, a whole embedding.  What a
    product with a weight gives does not, until it was summed or gathered.
    """
    known: set[fx.Node] = set()
    for node in graph.nodes:
        given = node.op in ("placeholder", "get_attr") or _is_size(node, known)
        if given or _gives_all(node, group) or (_keeps(node) and all(a in known for a in node.all_input_nodes)):
            known.add(node)
    return known


def _is_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor | list | tuple)


def _is_size(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a node is no value but a size or what is worked out from such; an element read off a value is no size."""
    if _is_value(node) or node.target is aten._local_scalar_dense.default:
        return False
    return all(a in known or is_tensor(a) for a in node.all_input_nodes)


def _gives_all(node: fx.Node, group: str) -> bool:
    """Whether a node sums or gathers over `group`, so that all its ranks hold the same."""
    op = find(node.target)
    if op is not None:
        whole = op.name.startswith("all_reduce") or op.name in ("all_gather", "all_gather_quantized")
        return whole and op.bind(node.args)["group"] == group
    name = str(node.target)
    if name.startswith("_c10d_functional.wait_tensor"):
        return _gives_all(node.args[0], group)  # type: ignore[arg-type]
    return name.startswith(("_c10d_functional.all_reduce", "_c10d_functional.all_gather")) and group in node.args


def _keeps(node: fx.Node) -> bool:
    op = find(node.target)
    if op is not None:
        return op.name not in PRODUCTS and op.rows != "mixing" and not op.name.startswith(("reduce_scatter", "shard"))
    return pointwise(node) or node.target in SHARED


def pointwise(node: fx.Node) -> bool:
    """Whether a node calls a pure pointwise operator of aten or prims."""
    target = node.target
    return (
        isinstance(target, OpOverload)
        and torch.Tag.pointwise in target.tags
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
    )


def regroups(node: Any) -> bool:
    """Whether a node only regroups the rows of its operand: the last dimension stays."""
    if not is_call(node, *REGROUPS) or not is_tensor(node.args[0]):
        return False
    old, new = tensor(node.args[0]), tensor(node)
    return old.dim() > 1 and new.dim() > 1 and same(old.shape[-1], new.shape[-1])


def row_operands(node: fx.Node, sharded: Callable[[fx.Node], bool], shared: set[fx.Node]) -> list[fx.Node] | None:
    """The operands of which a rank needs its own rows only, where own rows of all of them give own rows of the result; None
    where they do not.

    sharded: whether own rows of a value are at hand; of the values in `shared` they can be cut out.
    """
    if regroups(node):
        return [node.args[0]] if sharded(node.args[0]) else None  # type: ignore[list-item]
    if node.target is operator.getitem:
        return _of_result(node, sharded)
    op = find(node.target)
    if op is not None:
        if op.rows != "local" or op.name in PRODUCTS:
            return None
        args = op.bind(node.args, node.kwargs)
        rows = [args[name] for name in op.row_args if args[name] is not None]
        others = [a for name, a in args.items() if name not in op.row_args and isinstance(a, fx.Node)]
        if any(sharded(a) for a in others):
            return None
    elif pointwise(node) or (is_call(node, *REDUCTIONS) and _over_last(node)):
        lead = tensor(node).shape[:-1]
        if tensor(node).dim() < 2:
            return None
        rows = [a for a in node.all_input_nodes if is_tensor(a) and (sharded(a) or not same_for_rows(tensor(a)))]
        if any(a.dim() != len(lead) + 1 or not _all_same(a.shape[:-1], lead) for a in map(tensor, rows)):
            return None
    else:
        return None
    if not all(isinstance(a, fx.Node) and (sharded(a) or (a in shared and tensor(a).dim() > 1)) for a in rows):
        return None
    first = tensor(rows[0]) if rows else None
    return rows if first is not None and all(_all_same(tensor(a).shape[:-1], first.shape[:-1]) for a in rows) else None


def _of_result(node: fx.Node, sharded: Callable[[fx.Node], bool]) -> list[fx.Node] | None:
    whole: Any = node.args[0]
    return [whole] if find(whole.target) is not None and sharded(whole) else None


def _over_last(node: fx.Node) -> bool:
    kept = len(node.args) > 2 and node.args[2] is True
    return kept and len(node.args) > 1 and reduces_last(node.args[1], node.args[0])  # type: ignore[arg-type]


def same_for_rows(value: Tensor) -> bool:
    """Whether a value is broadcast along rows: a scalar, [n], [1, n], [1, 1, n] …"""
    return all(same(n, 1) for n in value.shape[:-1])


def _all_same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(same(m, n) for m, n in zip(a, b, strict=True))
