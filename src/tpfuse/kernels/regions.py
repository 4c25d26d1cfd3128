"""Regions: symmetric memory for rows that come from other ranks next to a product, made in an explicit prepare step.

A group has two, one for reduce-scatters and one for gathers.  Products read and write them by address, so graphs captured before
a `release` must be captured anew.  The calls of a group must be in one order on the device: one stream at a time.

`prepare`, `release` and `restore` are collective over the group: every rank calls them, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpfuse import shim
from tpfuse.report import FusionError

from .channel import Link
from .plan import REGION_HEAD, RegionLayout
from .signal import RECORD_WORD, LostPeer
from .workspace import agree, is_another

SCATTER, GATHER = "scatter", "gather"
CALL_WORD = 1  # of the state: the number of the present call, from 1
_regions: dict[tuple[str, str], list[Region]] = {}  # by group and kind, the last one in use; captured graphs keep the others


@dataclass(frozen=True)
class Region(Link):
    """One group's region of one kind on this rank.

    buffers: all ranks', int8 [layout.total], as this rank maps them; empty while released.  side, copies: streams of high
    priority for what runs beside the products of the current one.  holders: "graph" once one was captured with it.
    """

    layout: RegionLayout
    request: dict[str, Any]  # what the ranks agreed on
    side: torch.cuda.Stream
    copies: torch.cuda.Stream
    buffers: list[Tensor] = field(default_factory=list)
    mappings: list[Any] = field(default_factory=list)
    holders: list[str] = field(default_factory=list)

    @staticmethod
    def create(rank: int, world: int, layout: RegionLayout, sms: int, request: dict[str, Any]) -> Region:
        """A region without buffers on the current device.  request: holds the time-out of its waits, in seconds."""
        device = torch.device("cuda", torch.cuda.current_device())
        side, copies = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        return Region(rank, world, *Link.memory(world, device, request["timeout"]), sms, layout, request, side, copies)

    def connect(self, buffers: list[Tensor], mapping: Any = None) -> None:
        """Use the buffers of all ranks.  No peer may call before all ranks have done so."""
        buffers[self.rank][:REGION_HEAD].zero_()
        self.state[: RECORD_WORD.value].zero_()
        self.state[CALL_WORD].fill_(1)
        self.table.copy_(torch.tensor([buffer.data_ptr() for buffer in buffers]))
        self.buffers[:], self.mappings[:] = buffers, [mapping]

    def part(self, rank: int, index: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The section `index` of a rank's buffer as [rows, columns]."""
        start = REGION_HEAD + index * self.layout.part
        return _view(self.buffers[rank], start, rows, columns, dtype)

    def gathered(self, rank: int, first: int, rows: int, moved: Sequence[Tensor]) -> list[Tensor]:
        """Rows of a gather in a rank's buffer, from row `first` on: of own rows' values, and scales, the like of so many rows."""
        starts = (REGION_HEAD, self.layout.scales_offset)
        return [
            _view(self.buffers[rank], start + first * own.shape[1] * own.dtype.itemsize, rows, own.shape[1], own.dtype)
            for start, own in zip(starts, moved, strict=False)
        ]

    def flag(self, rank: int) -> Tensor:
        """The word of a rank's buffer that says which call this rank has written all rows of: int32 [1]."""
        return self.buffers[rank][4 * self.rank : 4 * self.rank + 4].view(torch.int32)

    @property
    def call(self) -> Tensor:
        """The number of the present call: int32 [1], on the device."""
        return self.state[CALL_WORD : CALL_WORD + 1]


def _view(buffer: Tensor, start: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return buffer[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


def prepare(
    kind: str, group: Any, max_tokens: int, hidden: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,), timeout: float = 60.0
) -> Region:
    """Make (or enlarge) a region of `group`, a process group or its name.  Never inside graph capture.

    Args:
        kind: SCATTER or GATHER.
        max_tokens, hidden, dtypes: the largest call: rows of all ranks together, columns of the rows that are summed or gathered.
            More tokens go in several turns; wider rows are an error.
        timeout: seconds that a rank waits for its peers, here and in every kernel.

    Raises:
        FusionError: a rank that does not come in time, or that asks for something else, with the ranks named.
    """
    process_group = shim.group_of(group)
    itemsize = max(d.itemsize for d in dtypes)
    request = {"region": kind, "max_tokens": max_tokens, "hidden": hidden, "itemsize": itemsize, "timeout": timeout}
    if shim.is_capturing():
        raise FusionError("a region cannot be prepared inside graph capture: prepare the group before")
    agree(process_group, request, timeout)
    made = _regions.setdefault((process_group.group_name, kind), [])
    if is_another(process_group, kind):
        made.clear()
    if made:
        last = made[-1]
        merged = {key: max(value, last.request[key]) for key, value in request.items()}
        if merged == last.request and last.buffers:
            return last
        torch.cuda.synchronize()
        agree(process_group, {"enlarged": merged, "captured": last.holders}, merged["timeout"])
        if not last.holders:
            made.pop()
        request = merged
    rank, world = process_group.rank(), process_group.size()
    layout = RegionLayout.of(world, request["max_tokens"], request["hidden"], request["itemsize"], kind == GATHER)
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    made.append(Region.create(rank, world, layout, sms, request))
    _restore(process_group, made[-1])
    return made[-1]


def release(group: Any) -> bool:
    """Give a group's regions back, once all ranks are here; false where it has none.  Graphs that were captured with them must
    not be replayed again: they fault."""
    process_group = shim.group_of(group)
    every = _of_group(process_group.group_name)
    for made in every:
        torch.cuda.synchronize()
        for region in made:
            region.disconnect()
        torch.cuda.synchronize()
        agree(process_group, "release region", made[-1].request["timeout"])
        for region in made:
            region.buffers.clear()
            region.mappings.clear()
    return bool(every)


def restore(group: Any) -> bool:
    """Allocate and exchange a group's released regions again; false where it has none.  With a table of its own where graphs hold
    that of before, which leads nowhere."""
    process_group = shim.group_of(group)
    every = _of_group(process_group.group_name)
    for made in every:
        last = made[-1]
        if not last.buffers:
            if last.holders:
                made.append(Region.create(last.rank, last.world, last.layout, last.sms, last.request))
            _restore(process_group, made[-1])
    return bool(every)


def _of_group(name: str) -> list[list[Region]]:
    return [_regions[name, kind] for kind in (SCATTER, GATHER) if (name, kind) in _regions]


def region_of(kind: str, group: str) -> Region:
    """The region in use; FusionError where there is none."""
    made = _regions.get((group, kind))
    if not made or not made[-1].buffers:
        raise FusionError(f"group {group!r} has no {kind} region: call tpfuse.runtime.workspaces.prepare_{kind} on every rank")
    region = made[-1]
    region.check()
    if not region.holders and torch.cuda.is_current_stream_capturing():
        region.holders.append("graph")
    return region


def lost_peers() -> list[LostPeer]:
    """What kernels of this process that gave up have left behind."""
    found = (region.lost_peer() for made in list(_regions.values()) for region in list(made))
    return [lost for lost in found if lost is not None]


def _restore(process_group: Any, region: Region) -> None:
    buffer, addresses, mapping = shim.symmetric_buffer(region.layout.total, process_group)
    region.connect(shim.peer_views(buffer, addresses, mapping), mapping)
    torch.cuda.synchronize()
    agree(process_group, "region restored", region.request["timeout"])
