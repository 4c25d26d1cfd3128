"""Regions of ranks in one process without a GPU, and what their kernels do to memory, in Python: no waiting, so a call is made
twice by all ranks: the second time everybody's rows are there.

Copies run as late as streams allow: when another stream waits for them.  What they read must be there still."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tpfuse.kernels import arrive, product_scatter
from tpfuse.kernels.channel import Link
from tpfuse.kernels.cuda_norm import Args
from tpfuse.kernels.plan import RegionLayout
from tpfuse.kernels.regions import GATHER, Region


class Stream:
    """Its own event.  late: copies to be made, each with where it reads, how many bytes, and whether that is memory still."""

    def __init__(self) -> None:
        self.late: list[tuple[Tensor, int, int, StorageWeakRef]] = []

    def record_event(self) -> Stream:
        return self

    def wait_event(self, event: Stream) -> None:
        for there, address, count, memory in event.late:
            assert not memory.expired(), "a copy has not run, and what it reads was given back"
            there.view(torch.int8).view(-1).copy_(at(address, count, torch.int8))
        event.late.clear()


class _Late(TorchDispatchMode):
    """Inside, copies are put off."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        there, here = args
        if here.numel():
            assert here.is_contiguous() and there.is_contiguous() and here.dtype == there.dtype
            memory = StorageWeakRef(here.untyped_storage())
            self.stream.late.append((there, here.data_ptr(), here.numel() * here.element_size(), memory))
        return there


def regions(monkeypatch: Any, kind: str, world: int, max_tokens: int, hidden: int) -> list[Region]:
    """Regions full of NaN for bf16 rows, and kernels that work on them."""
    layout = RegionLayout.of(world, max_tokens, hidden, 2, kind == GATHER)
    buffers = [torch.full((layout.total,), -1, dtype=torch.int8) for _ in range(world)]
    made = []
    for rank in range(world):
        memory = Link.memory(world, torch.device("cpu"), 1.0)
        side: Any = Stream()
        copies: Any = Stream()
        made.append(Region(rank, world, *memory, 132, layout, {}, side, copies))
        made[-1].connect(buffers)
    late = [region.copies for region in made]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: _Late(stream) if stream in late else nullcontext())
    monkeypatch.setattr(arrive, "_kernel", lambda name, rank, world, device: _Arrive(name, world))
    monkeypatch.setattr(product_scatter, "kernel_of", lambda name, call, link, plan, **flags: _Reduce(link.rank, link.world))
    return made


def at(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """Memory as a tensor."""
    return torch.frombuffer((ctypes.c_byte * (count * dtype.itemsize)).from_address(address), dtype=dtype)


class _Arrive:
    """arrive.cu"""

    def __init__(self, name: str, world: int) -> None:
        self.name, self.world = name, world

    def __call__(self, grid: int, block: int, early: bool, args: Args) -> None:
        if self.name != "push_rows":
            return
        for address in at(args.table, self.world, torch.int64).tolist():
            if args.vectors:
                at(address + 16 * args.base, 4 * args.vectors, torch.int32).copy_(at(args.x, 4 * args.vectors, torch.int32))
            if args.scale_words:
                words = at(args.scales, args.scale_words, torch.int32)
                at(address + 4 * args.outscales, args.scale_words, torch.int32).copy_(words)


class _Reduce:
    """reduce.cu, the sum alone."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __call__(self, grid: int, block: int, early: bool, args: Args) -> None:
        own, width = at(args.table, self.world, torch.int64).tolist()[self.rank], 8 * args.vectors
        for index in range(args.first, args.end):
            row = torch.zeros(width)
            if self.rank * args.share + index < args.tokens:
                for rank in range(self.world):
                    vector = args.base + rank * args.section + (index - args.first) * args.vectors
                    row += at(own + 16 * vector, width, torch.bfloat16).float()
            at(args.reduced + 2 * width * index, width, torch.bfloat16).copy_(row)
