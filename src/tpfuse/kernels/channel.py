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


@dataclass(frozen=True)
class Channel:
    """One sequence of collective calls over a group.  All ranks must make the same calls in the same order.

    table: int64 [world], the addresses of all ranks' receive buffers as this rank maps them.  Kernels reach every
    buffer, their own too, through it, so that captured graphs survive a release and restore.
    state: int32 [STATE_WORDS] on the device (see signal.py).  record: int32 [RECORD_WORDS], host memory that the
    device can write.  sms: multiprocessors that grids may fill.  early: a launch may begin before the kernel ahead of it
    has ended (programmatic dependent launch).
    """

    rank: int
    world: int
    layout: ChannelLayout
    table: Tensor
    state: Tensor
    record: Tensor
    sms: int
    early: bool = True

    @staticmethod
    def create(rank: int, world: int, layout: ChannelLayout, device: torch.device, sms: int, timeout: float) -> Channel:
        """A channel without receive buffers.  timeout: seconds (in the interpreter: thousands of polls)."""
        cuda = device.type == "cuda"
        record = torch.zeros(RECORD_WORDS, dtype=torch.int32, pin_memory=cuda)
        state = torch.zeros(STATE_WORDS, dtype=torch.int32)
        wide = state.view(torch.int64)
        wide[RECORD_WORD.value // 2] = record.data_ptr()
        wide[TIMEOUT_WORD.value // 2] = int(timeout * (1e9 if cuda else 1e3))
        state[CLAIM_WORD.value] = 0
        table = torch.zeros(world, dtype=torch.int64, device=device)
        return Channel(rank, world, layout, table, state.to(device), record, sms)

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

    def lost_peer(self) -> LostPeer | None:
        return read_record(self.record.tolist())

    def check(self) -> None:
        """FusionError if a kernel of this channel gave up on a peer."""
        lost = self.lost_peer()
        if lost is not None:
            raise FusionError(str(lost))
