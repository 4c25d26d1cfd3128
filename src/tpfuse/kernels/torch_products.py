"""torch's own fused products and collectives over symmetric memory ("async TP"): cuBLAS on chunks of rows, on two streams.

A group has one workspace, torch's own for it, so its calls must be in one order on the device: one stream at a time.  `prepare`
sizes it, since torch cannot enlarge it inside graph capture.  Rows that the ranks do not divide go NCCL's way, decided from
sizes that all ranks share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpfuse import shim
from tpfuse.ir import overlap
from tpfuse.ir.collective import share, world_size

from . import nccl_products
from .workspace import is_another

_workspaces: dict[str, list[Tensor]] = {}  # by group, the last one in use; captured graphs keep the others


def prepare(group: Any, max_tokens: int, hidden: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> None:
    """Make (or enlarge) torch's workspace of `group` for [max_tokens, hidden]: the rows that are summed, two ranks' shares of
    which are in flight, or one share of those that are gathered, with a scale of four bytes a row.  Collective; never
    inside graph capture."""
    process_group = shim.group_of(group)
    name = process_group.group_name
    row = max(2 * hidden * max(d.itemsize for d in dtypes), hidden + 4)
    memory, made = shim.fused_products_workspace(name, share(max_tokens, name) * row), _workspaces.setdefault(name, [])
    if is_another(process_group, "torch_products"):
        made.clear()
    if not made or made[-1] is not memory:
        made.append(memory)


def matmul_reduce_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool, group: str, *, alive: tuple[bool, ...]
) -> Tensor:
    if not _divides(x, group):
        return nccl_products.matmul_reduce_scatter(x, weight, bias, padded, group, alive=alive)
    return shim.fused_products().fused_matmul_reduce_scatter(x, weight, "sum", 0, group)


def scaled_matmul_reduce_scatter(*args: Any, alive: tuple[bool, ...]) -> Tensor:
    call = overlap.scaled_matmul_reduce_scatter.bind(args)
    x, weight, group = call["x"], call["weight"], call["group"]
    if not _divides(x, group):
        return nccl_products.scaled_matmul_reduce_scatter(*args, alive=alive)
    return shim.fused_products().fused_scaled_matmul_reduce_scatter(
        x, weight, call["x_scale"], call["weight_scale"], "sum", 0, 0, group, [x.shape[0], weight.shape[1]], call["bias"], None,
        getattr(torch, call["out_dtype"]), call["fast_accum"],
    )  # fmt: skip


def all_gather_matmul(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], rows: int | None, keep: bool, group: str, *,
    alive: tuple[bool, ...],
) -> list[Tensor]:  # fmt: skip
    if len(x) == 0:
        return nccl_products.all_gather_matmul(x, weights, biases, rows, keep, group, alive=alive)
    # Without return_A small calls would go through a multicast kernel.
    whole, products = shim.fused_products().fused_all_gather_matmul(x, weights, 0, group, return_A=True)
    return [out[:rows] for out in (*products, *([whole] if keep else []))]


def all_gather_scaled_matmul(*args: Any, alive: tuple[bool, ...]) -> list[Tensor]:
    call = overlap.all_gather_scaled_matmul.bind(args)
    x, weights, count = call["x"], call["weights"], len(call["weights"])
    if len(x) == 0:
        return nccl_products.all_gather_scaled_matmul(*args, alive=alive)
    whole, products = shim.fused_products().fused_all_gather_scaled_matmul(
        x, weights, call["x_scale"], call["weight_scales"], 0, call["group"], call["biases"], [None] * count,
        [getattr(torch, call["out_dtype"])] * count, [call["fast_accum"]] * count,
    )  # fmt: skip
    return [out[: call["rows"]] for out in (*products, *([whole] if call["keep"] else []))]


def _divides(x: Tensor, group: str) -> bool:
    return len(x) > 0 and len(x) % world_size(group) == 0
