"""What a collective kernel needs of its workspace: the peers' receive buffers and this rank's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse.report import FusionError

from .plan import MAX_REGISTERS, ChannelLayout, resident_blocks
from .signal import (
    CLAIM_WORD,
    EMPTY,
    RECORD_WORD,
    RECORD_WORDS,
    STATE_WORDS,
    TIMEOUT_WORD,
    LostPeer,
    read_record,
)

NOWHERE = 1 << 62  # an address that no GPU has, nor any that lies a buffer's size behind it


@dataclass(frozen=True)
class Link:
    """How the kernels of one rank reach its peers, and what their bounded waits need.

    table: int64 [world], the addresses of all ranks' buffers as this rank maps them.  state: int32 [STATE_WORDS] on the device
    (see signal.py).  record: int32 [RECORD_WORDS], host memory that the device can write.  sms: multiprocessors that grids may
    fill.
    """

    rank: int
    world: int
    table: Tensor
    state: Tensor
    record: Tensor
    sms: int

    @staticmethod
    def memory(world: int, device: torch.device, timeout: float) -> tuple[Tensor, Tensor, Tensor]:
        """Table, state and record, no buffers yet.  timeout: seconds (in the interpreter: thousands of polls)."""
        cuda = device.type == "cuda"
        record = torch.zeros(RECORD_WORDS, dtype=torch.int32, pin_memory=cuda)
        state = torch.zeros(STATE_WORDS, dtype=torch.int32)
        wide = state.view(torch.int64)
        wide[RECORD_WORD.value // 2] = record.data_ptr()
        wide[TIMEOUT_WORD.value // 2] = int(timeout * (1e9 if cuda else 1e3))
        state[CLAIM_WORD.value] = 0
        return torch.zeros(world, dtype=torch.int64, device=device), state.to(device), record

    def disconnect(self) -> None:
        """Before the buffers are given back: what is captured and replayed without them faults instead of writing to memory
        that is somebody else's by then."""
        self.table.fill_(NOWHERE)

    def lost_peer(self) -> LostPeer | None:
        return read_record(self.record.tolist())

    def check(self) -> None:
        """FusionError if a kernel of this link gave up on a peer."""
        lost = self.lost_peer()
        if lost is not None:
            raise FusionError(str(lost))


@dataclass(frozen=True)
class Channel(Link):
    """One sequence of collective calls over a group.  All ranks must make the same calls in the same order.

    Kernels reach every receive buffer, their own too, through the table, so that captured graphs survive a release and
    restore.  early: a launch may begin before the kernel ahead of it has ended (programmatic dependent launch).
    """

    layout: ChannelLayout
    early: bool = True

    @staticmethod
    def create(rank: int, world: int, layout: ChannelLayout, device: torch.device, sms: int, timeout: float) -> Channel:
        """A channel without receive buffers; see `Link.memory`."""
        return Channel(rank, world, *Link.memory(world, device, timeout), sms, layout)

    def connect(self, own: Tensor, addresses: list[int]) -> None:
        """Use the receive buffers at `addresses`, `own` (int8) being this rank's.  No peer may push before all ranks
        have done so."""
        own.view(torch.int32).fill_(EMPTY.value)
        self.state[: RECORD_WORD.value].zero_()
        self.table.copy_(torch.tensor(addresses))

    def options(self, warps: int) -> dict[str, Any]:
        """Triton's launch options; the interpreter takes none."""
        return {"num_warps": warps, "maxnreg": MAX_REGISTERS, "launch_pdl": self.early} if self.asm else {}

    @property
    def asm(self) -> bool:
        return self.table.is_cuda

    def blocks(self, rows: int, warps: int, waiting: bool = False) -> int:
        """The grid for `rows` rows.  waiting: a block may wait for another one of its own grid."""
        if waiting and not self.asm:
            return 1  # the interpreter runs a grid's blocks one after another
        return max(1, min(rows, resident_blocks(self.sms, warps)))
