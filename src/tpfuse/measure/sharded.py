"""The form around a residual that stays sharded: reduce-scatter, add, norm, quantise, and the gather of the quantised rows.

Its rows' `op` is that of one launch.  Beside it: what a model does today for the same rows on every rank, an all-reduce and
Inductor's add + norm + quantise of all rows, and NCCL's reduce-scatter and all-gather around Inductor's kernel for own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tpfuse.ir import Op, registry
from tpfuse.lowering import select
from tpfuse.lowering.table import Table
from tpfuse.measure.collectives import OWN, UNFUSED, Collectives, impl_of, shapes
from tpfuse.measure.points import AGAIN, NVLINK, Point, memory_bandwidth
from tpfuse.measure.timing import without_index
from tpfuse.target import Target

SCATTERED = "nccl_reduce_scatter+inductor+nccl_all_gather"


@dataclass(frozen=True)
class ShardedPoint(Point):
    """A point whose residual is sharded by rows."""

    @property
    def op(self) -> Op:
        return registry[f"reduce_scatter_add_rms_norm{'_quantize' * bool(self.scheme)}_all_gather"]

    def limit_us(self, world: int) -> float:
        """Own rows' partial sums out and in, then the finished rows: the larger of the link's time and the memory's."""
        finished = 0.53 if self.scheme == "nvfp4" else 1.0 if self.scheme else self.torch_dtype.itemsize
        finished /= self.torch_dtype.itemsize
        sent = (world - 1) / world * (1 + finished) * self.message
        moved = (1 + 2 / world + finished) * self.message
        return max(sent / NVLINK, moved / memory_bandwidth()) * 1e6


def implementations(built: Collectives, point: ShardedPoint) -> dict[str, Callable[[int], Any]]:
    """tpfuse's kernels, the first one twice, and the peers.  The rows are a multiple of the ranks."""
    found = {impl_of(name): fn for name, fn in kernels(built, point).items()}
    first = next(iter(found))
    whole = Point(point.scheme, point.hidden, point.tokens, point.dtype)
    peers = built.peers(whole)
    kept = {name: peers[name] for name in (UNFUSED, "torch_symm_two_shot+norm") if name in peers}
    return {first + AGAIN: found[first], **found, **kept, SCATTERED: _nccl(built, whole, _rows(built, point))}


def _rows(built: Collectives, point: Point) -> slice:
    """This rank's."""
    world, rank = built.group.size(), built.group.rank()
    return slice(rank * point.tokens // world, (rank + 1) * point.tokens // world)


def kernels(built: Collectives, point: ShardedPoint) -> dict[str, Callable[[int], Any]]:
    """tpfuse's kernels, by their names."""
    args = built.arguments(point)
    given = {**args, "residual": args["residual"][_rows(built, point)].contiguous(), "padded": True, "rows": point.tokens}
    alive = (True, True, False, True) if point.scheme else (True, False, True)
    found: dict[str, Callable[[int], Any]] = {}
    for kernel in point.op.kernels:
        if kernel.backend in OWN and kernel.supports(given, built.target) is None:
            built.prepare(kernel.prepare)
            launch = partial(point.op.launcher(kernel.name), *(given[p] for p in point.op.params), alive=alive)
            found[kernel.name] = partial(without_index, launch)
    return found


def picked_sharded(point: ShardedPoint, target: Target, table: Table) -> str | None:
    """What lowering would run at this point, by its name in result files; None where it would take the operator apart."""
    found = select.pick(point.op, {**shapes(point), "rows": point.tokens}, target, "auto", table)
    return impl_of(found.kernels[-1][1].name) if isinstance(found, select.Pick) else None


def _nccl(built: Collectives, point: Point, own: slice) -> Callable[[int], Any]:
    """Reduce-scatter, the norm of own rows by Inductor, all-gather of what it made."""
    x = built.arguments(point)["x"].contiguous()
    mine, norm = torch.empty_like(x[own]), built.norm(point, own)

    def call(i: int) -> Any:
        dist.reduce_scatter_tensor(mine, x, group=built.group)
        *finished, h = norm(mine)
        gathered = []
        for part in finished:
            part = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
            out = part.new_empty((point.tokens, *part.shape[1:]))
            dist.all_gather_into_tensor(out, part.contiguous(), group=built.group)
            gathered.append(out)
        return gathered, h

    return call
