"""The forms that a tensor-parallel stack is written in: where its ranks meet, and what each keeps of the residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Form:
    """cut: whole rows → those that a rank keeps of the residual.  sum: each rank's summands of all rows → the sums of the kept
    ones.  whole: kept rows → all rows."""

    cut: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


ALONE = Form(_same, _same, _same)  # no collective at all


def all_reduced(group: dist.ProcessGroup) -> Form:
    """Every rank keeps the whole residual."""
    name = group.group_name
    return Form(_same, lambda x: _c10d.wait_tensor(_c10d.all_reduce(x, "sum", name)), _same)


def sequence_parallel(group: dist.ProcessGroup) -> Form:
    """Every rank keeps its share of the rows, whose count is a multiple of the ranks' (Korthikanti et al. 2022,
    arXiv:2205.05198)."""
    name, rank, world = group.group_name, group.rank(), group.size()

    def gather(x: Tensor) -> Tensor:
        return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, world, name))

    def whole(x: Tensor) -> Tensor:
        # gloo moves no FP8; torch's own overlap, which needs a GPU, takes bytes for the rows of a product
        return gather(x.view(torch.uint8)).view(x.dtype) if x.is_cpu and x.dtype.itemsize == 1 else gather(x)

    def scatter(x: Tensor) -> Tensor:
        return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x, "sum", world, name))

    return Form(lambda x: x.chunk(world)[rank], scatter, whole)
