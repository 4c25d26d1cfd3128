"""Launches of `cuda/arrive.cu`: waits and signals around products, and the push of own rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from . import driver
from .cuda_norm import Args, literals
from .plan import REGION_HEAD, ceil_div
from .regions import Region
from .signal import OPERATORS

SOURCES = ("signals.cuh", "flags.cuh", "arrive.cu")
WARP, BLOCK = 32, 256


@functools.cache
def _kernel(name: str, rank: int, world: int, device: int) -> driver.Function:
    return driver.compiled(SOURCES, name, literals({"RANK": rank, "WORLD": world}), device)


def _launch(region: Region, operator: str, name: str, first: int = 0) -> None:
    args = Args(
        table=region.table.data_ptr(), state=region.state.data_ptr(), operation=OPERATORS.index(operator), first=first
    )  # fmt: skip
    _kernel(name, region.rank, region.world, region.table.device.index)(1, WARP, False, args)


def wait_done(region: Region, operator: str) -> None:
    """On the current stream: until all peers have read what they were sent in the call before."""
    _launch(region, operator, "wait_done")


def wait_full(region: Region, operator: str, rank: int) -> None:
    """On the current stream: until the rows of `rank` are here."""
    _launch(region, operator, "wait_full", rank)


def finish(region: Region, operator: str) -> None:
    """On the current stream, at the end of a call: this rank has read all that it was sent."""
    _launch(region, operator, "finish")


def push_rows(region: Region, operator: str, moved: Sequence[Tensor]) -> None:
    """Own rows, and their scales, all contiguous, into every rank's region; all ranks' rows are here when it ends."""
    rows, *scales = moved
    vectors = rows.numel() * rows.element_size() // 16
    args = Args(
        x=rows.data_ptr(), table=region.table.data_ptr(), state=region.state.data_ptr(), operation=OPERATORS.index(operator),
        base=REGION_HEAD // 16 + region.rank * vectors, vectors=vectors,
    )  # fmt: skip
    for own in scales:
        args.scales, args.scale_words = own.data_ptr(), own.numel() * own.element_size() // 4
        args.outscales = region.layout.scales_offset // 4 + region.rank * args.scale_words
    kernel = _kernel("push_rows", region.rank, region.world, region.table.device.index)
    kernel(max(1, min(ceil_div(vectors, BLOCK), 2 * region.sms)), BLOCK, True, args)
