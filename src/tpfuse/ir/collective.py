"""Collectives over the rows of a tensor.  `group` is the name of a c10d process group, never a default one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse.ir.op import op
from tpfuse.ir.samples import rows
from tpfuse.shim import resolve_group

_c10d = torch.ops._c10d_functional


def world_size(group: str) -> int:
    """The number of ranks in the group named `group`."""
    return resolve_group(group).size()


def _same(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scattered(x: Tensor, group: str) -> Tensor:
    return x.new_empty([x.shape[0] // world_size(group), *x.shape[1:]])


def _gathered(x: Tensor, group: str) -> Tensor:
    return x.new_empty([x.shape[0] * world_size(group), *x.shape[1:]])


def _sample(**shape: Any) -> dict[str, Any]:
    return {"x": rows(**shape), "group": shape["group"]}


@op(sample=_sample, fake=_same, rows="collective")
def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum over the ranks of `group`.  x: [..., hidden], any dtype → the same shape and dtype, contiguous."""
    return _c10d.wait_tensor(_c10d.all_reduce(x, "sum", group))


@op(sample=_sample, fake=_scattered, rows="collective")
def reduce_scatter(x: Tensor, group: str) -> Tensor:
    """Sum over the ranks, rank r keeping its r-th share of the rows.

    x: [rows, ...], rows a multiple of the world size → [rows / world, ...].
    """
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x, "sum", world_size(group), group))


@op(sample=_sample, fake=_gathered, rows="collective")
def all_gather(x: Tensor, group: str) -> Tensor:
    """Rows of all ranks, rank 0's first.  x: [rows, ...] → [rows · world, ...]."""
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, world_size(group), group))
