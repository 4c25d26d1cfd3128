"""Workspaces: symmetric memory for the collective kernels of a process group, made in an explicit prepare step.

A workspace holds some channels, each an independent sequence of calls with receive buffers of its own.  Streams that
run collectives of one group at the same time need a channel each; the ranks must use their channels alike.  A stream
gets the next free channel at its first call, or the one that `on_channel` names.

`prepare`, `release` and `restore` are collective over the group: every rank calls them, in the same order.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import shim
from tpfuse.report import FusionError

from .channel import Channel
from .plan import ChannelLayout
from .signal import LostPeer

_workspaces: dict[str, list[Workspace]] = {}  # by group, the last one in use; captured graphs keep the others
_generation: dict[str, int] = {}
_groups: dict[tuple[str, str], weakref.ref[Any]] = {}  # what a name stood for when memory of a kind was made
_chosen: ContextVar[int | None] = ContextVar("channel", default=None)


@dataclass
class Workspace:
    """One group's channels on this rank.  `buffers` is empty while released.  captured: graphs were captured with them."""

    group: str
    request: dict[str, Any]  # what the ranks agreed on
    channels: list[Channel]
    buffers: list[tuple[Tensor, Any]] = field(default_factory=list)  # with what keeps the peers' mapped
    streams: dict[int, int] = field(default_factory=dict)
    captured: bool = False

    def channel(self) -> Channel:
        """The channel of the current stream."""
        if not self.buffers:
            raise FusionError(f"the workspace of group {self.group!r} is released: call restore on every rank")
        index = _chosen.get()
        if index is None:
            stream = torch.cuda.current_stream().cuda_stream
            index = self.streams.setdefault(stream, len(self.streams))
        if index >= len(self.channels):
            raise FusionError(
                f"group {self.group!r} has {len(self.channels)} channels and a stream more than that calls it: prepare "
                f"it with more channels, or name one with on_channel"
            )
        self.captured = self.captured or torch.cuda.is_current_stream_capturing()
        return self.channels[index]


def prepare(
    group: Any, max_tokens: int, hidden: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,), *, channels: int = 3,
    concurrency: int = 1, timeout: float = 60.0,
) -> Workspace:  # fmt: skip
    """Make (or enlarge) the workspace of `group`, a process group or its name.  Never inside graph capture.

    Args:
        max_tokens, hidden, dtypes: the largest call.  More tokens go in several launches; wider rows are an error.
        channels: how many streams call collectives of this group, graph capture's own stream counted.
        concurrency: how many of them really run at the same time; each then gets its share of the multiprocessors.
        timeout: seconds that a rank waits for its peers, here and in every kernel.

    Raises:
        FusionError: a rank that does not come in time, or that asks for something else, with the ranks named.
    """
    process_group = shim.group_of(group)
    name = process_group.group_name
    itemsize = max(d.itemsize for d in dtypes)
    request = {
        "max_tokens": max_tokens, "hidden": hidden, "itemsize": itemsize, "channels": channels,
        "concurrency": concurrency, "timeout": timeout,
    }  # fmt: skip
    if shim.is_capturing():
        raise FusionError("a workspace cannot be prepared inside graph capture: prepare the group before")
    agree(process_group, request, timeout)
    every = _workspaces.setdefault(name, [])
    if is_another(process_group, "channels"):
        every.clear()
    if every:
        known = every[-1]
        merged = {key: max(value, known.request[key]) for key, value in request.items()}
        if merged == known.request:
            restore(group)
            return known
        torch.cuda.synchronize()
        agree(process_group, {"enlarged": merged, "captured": known.captured}, merged["timeout"])
        if not known.captured:
            every.pop()
        request = merged
    world, rank = process_group.size(), process_group.rank()
    layout = ChannelLayout.of(world, request["max_tokens"], request["hidden"], request["itemsize"])
    device = torch.device("cuda", torch.cuda.current_device())
    sms = torch.cuda.get_device_properties(device).multi_processor_count // request["concurrency"]
    made = [
        Channel.create(rank, world, layout, device, max(1, sms), request["timeout"]) for _ in range(request["channels"])
    ]
    every.append(Workspace(name, request, made))
    restore(group)
    return every[-1]


def release(group: Any) -> None:
    """Give the receive buffers back, once all ranks are here.  Captured graphs stay valid for after `restore`; one that is
    replayed before faults."""
    process_group = shim.group_of(group)
    every = _find(process_group.group_name)
    torch.cuda.synchronize()
    for channel in (channel for workspace in every for channel in workspace.channels):
        channel.disconnect()
    torch.cuda.synchronize()
    agree(process_group, "release", every[-1].request["timeout"])
    for workspace in every:
        workspace.buffers.clear()


def restore(group: Any) -> None:
    """Allocate and exchange the receive buffers again.  A no-op where they are there."""
    process_group = shim.group_of(group)
    for workspace in _find(process_group.group_name):
        if workspace.buffers:
            continue
        made = []
        for channel in workspace.channels:
            buffer, addresses, mapping = shim.symmetric_buffer(channel.layout.total, process_group)
            channel.connect(buffer, addresses)
            made.append((buffer, mapping))
        torch.cuda.synchronize()
        agree(process_group, "restored", workspace.request["timeout"])
        workspace.buffers.extend(made)


def is_prepared(group: Any) -> bool:
    return bool(_workspaces.get(shim.group_of(group).group_name))


def is_another(group: dist.ProcessGroup, kind: str) -> bool:
    """Whether the group is not the one of that name that memory of this kind was made for: names of destroyed groups are given
    again."""
    key, before = (group.group_name, kind), _groups.get((group.group_name, kind))
    _groups[key] = weakref.ref(group)
    return before is not None and before() is not group


def channel_of(group: str) -> Channel:
    """The current stream's channel of the group of that name; FusionError where it is not prepared."""
    return _find(group)[-1].channel()


@contextmanager
def on_channel(index: int) -> Iterator[None]:
    """Collectives called inside use channel `index` of their group, whatever the stream."""
    token = _chosen.set(index)
    try:
        yield
    finally:
        _chosen.reset(token)


def lost_peers() -> list[LostPeer]:
    """What kernels of this process that gave up have left behind."""
    every = [workspace for made in list(_workspaces.values()) for workspace in list(made)]
    found = (channel.lost_peer() for workspace in every for channel in workspace.channels)
    return [lost for lost in found if lost is not None]


def _find(group: str) -> list[Workspace]:
    if not _workspaces.get(group):
        raise FusionError(f"group {group!r} has no workspace: call tpfuse.prepare on every rank first")
    return _workspaces[group]


def agree(group: dist.ProcessGroup, what: Any, timeout: float) -> None:
    """Wait for every rank of `group` to say `what`; FusionError naming who has not, or says something else."""
    generation = _generation[group.group_name] = _generation.get(group.group_name, 0) + 1
    prefix = f"tpfuse/workspace/{group.group_name}/{generation}"
    store, own = shim.group_store(group), json.dumps(what)
    store.set(f"{prefix}/{group.rank()}", own)
    deadline = time.monotonic() + timeout
    said: dict[int, str] = {}
    for rank in range(group.size()):
        key = f"{prefix}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError as error:
            silent = [r for r in range(group.size()) if r != group.rank() and not store.check([f"{prefix}/{r}"])]
            raise FusionError(
                f"preparing group {group.group_name!r}: rank {group.rank()} waited {timeout} s for ranks {silent}"
            ) from error
        said[rank] = store.get(key).decode()
    if others := {rank: text for rank, text in said.items() if text != own}:
        raise FusionError(
            f"preparing group {group.group_name!r}: the ranks disagree: rank {group.rank()} says {own}, "
            + ", ".join(f"rank {rank} {text}" for rank, text in others.items())
        )
