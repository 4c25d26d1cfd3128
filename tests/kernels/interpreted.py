"""Channels over files, for ranks that run the kernels in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

INTERPRET = {"TRITON_INTERPRET": "1"}  # before Triton is imported


def shared_channel(
    rank: int, world: int, folder: str, max_tokens: int, hidden: int, itemsize: int, timeout: float = 1e6
) -> tuple[Any, Any]:
    """A channel of this rank whose receive buffers are files that all ranks map, and the maps.  Collective.

    timeout: thousands of polls.
    """
    from tpfuse.kernels.channel import Channel
    from tpfuse.kernels.plan import ChannelLayout

    layout = ChannelLayout.of(world, max_tokens, hidden, itemsize)
    channel = Channel.create(rank, world, layout, torch.device("cpu"), 3, timeout)
    paths = [Path(folder) / f"buffer{r}" for r in range(world)]
    if rank == 0:
        for path in paths:
            path.write_bytes(b"")
            os.truncate(path, layout.total)
    dist.barrier()
    maps = [torch.from_file(str(p), shared=True, size=layout.total, dtype=torch.int8) for p in paths]
    channel.connect(maps[rank], [m.data_ptr() for m in maps])
    dist.barrier()
    return channel, maps


def run_loops() -> None:
    """Let loops over a kernel's own numbers run: Triton 3.6 takes int() of arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
