"""The protocols of the multi-rank kernels as programs of `model.py`: one thread for each block, a word for each row.

What stands in the sources is taken from there: slots, sections, and for products the order of what the host launches, recorded
from the launchers (recorded.py).  `ORDER` is what a kernel does in which order; a test compares it with the sources.
broken: what is done wrong on purpose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tests.kernels.model import EMPTY, Op, Where
from tpfuse.kernels.plan import SLOTS, ceil_div
from tpfuse.kernels.signal import section_of

# Text that stands for each step, in the order of the sources.
ORDER: dict[str, list[str]] = {
    "allreduce_norm.py:one_shot_kernel": ["wait_for_inputs(", "read_state(", "push_words(", "arrive(", "poll_words("],
    "two_shot.py:two_shot_kernel": [
        "wait_for_inputs(", "read_state(", "push_words(", "arrive(", "poll_words(", "push_words(", "push_words(", "poll_words(",
    ],
    "signal.py:_poll_asm": ["ld.relaxed.sys", "@!q bra DONE", "DONE:", "join(emptied)"],
    "cuda/one_shot.cu:one_shot": [
        "wait_for_inputs(", "read_slot(", "send(row, mine)", "arrive(", "send(ahead, next)", "receive(", "advance(",
    ],
    "cuda/sharded.cu:sharded": [
        "wait_for_inputs(", "read_slot(", "send(index, mine)", "arrive(", "send(index + gridDim.x, next)", "receive(arrived, own",
        "push(values_of(peer", "push(scales_of(peer", "fetch(last)", "fetch(last)", "advance(",
    ],
    "cuda/signals.cuh:receive": ["look(", "is_missing(", "(!missing) break", "is_missing(", "empty("],
    "cuda/flags.cuh:signal": ["fence.acq_rel.sys", "st.relaxed.sys"],
    "cuda/flags.cuh:await": ["ld.acquire.sys", "seen - call) >= 0"],
    "cuda/flags.cuh:is_last": ["atom.acq_rel.gpu", "arrivals = 0"],
    "cuda/flags.cuh:end_call": ["signal(a, DONE, call)", "sequence = call + 1"],
    "cuda/reduce.cu:reduce": [
        "wait_for_inputs(", "call_of(", "signal(a, FULL, call)", "await_all(a, FULL, call)", "__syncthreads", "part[RANK",
        "__syncthreads", "is_last(", "end_call(",
    ],
    "cuda/arrive.cu:wait_done": ["wait_for_inputs(", "await_all(a, DONE, call_of(a) - 1)"],
    "cuda/arrive.cu:wait_full": ["wait_for_inputs(", "await(a, a.first, FULL, call_of(a))"],
    "cuda/arrive.cu:finish": ["wait_for_inputs(", "end_call("],
    "cuda/arrive.cu:push_rows": [
        "wait_for_inputs(", "call_of(", "await_all(a, DONE, call - 1)", "__syncthreads", "to[step][a.base + i] = v",
        "a.outscales + i] = v", "fence.acq_rel.sys", "__syncthreads", "is_last(", "signal(a, FULL, call)", "__syncthreads",
        "await_all(a, FULL, call)",
    ],
}  # fmt: skip
PROTOCOLS = {"one_shot": 0, "one_shot_ahead": 0, "two_shot": 1, "reduce_scatter": 1, "sharded": 1}  # words of a channel's state


def channel(
    world: int, calls: Sequence[tuple[str, int]], grids: Sequence[int] = (1,), resident: int = 99, broken: str = ""
) -> dict[Any, list[Op]]:
    """Calls one after another on one channel, each of a kernel and a number of rows; threads are (rank, block).

    grids: blocks of each rank, taking turns.  resident: how many of them run at once, the others when those have ended.
    """
    slots = SLOTS - (broken == "a slot fewer")
    grid = [grids[rank % len(grids)] for rank in range(world)]
    programs: dict[Any, list[Op]] = {(r, b): [] for r in range(world) for b in range(grid[r])}
    turns = [0, 0]
    for number, (kernel, tokens) in enumerate(calls):
        protocol = PROTOCOLS[kernel]
        for (rank, block), program in programs.items():
            one, blocks = _Call(world, rank, (protocol, turns[protocol] % slots), number, tokens, broken), grid[rank]
            program += [("wait", (number, rank, block - resident))] if block >= resident else []
            program += one.emptied_before((protocol, (turns[protocol] + 1) % slots))
            program += getattr(one, kernel)(range(block, tokens, blocks), range(block, ceil_div(tokens, world), blocks))
            program += [("record", (number, rank, block))] if block + resident < blocks else []
            together = broken != "blocks of the next call start early"
            threads = tuple((rank, b) for b in range(blocks)) if together else ((rank, block),)
            program.append(("meet", threads, together))
        # An empty call brings no ranks together: it takes no turn.
        turns[protocol] += tokens > 0 or broken == "an empty call takes a turn"
    return programs


class _Call:
    """What a block of one rank does in one call.  Rows are dealt out to the blocks."""

    def __init__(self, world: int, rank: int, slot: tuple[int, int], number: int, tokens: int, broken: str) -> None:
        self.world, self.rank, self.slot, self.number, self.tokens, self.broken = world, rank, slot, number, tokens, broken
        self.peers = [(rank + step) % world for step in range(1, world)]
        self.share = ceil_div(tokens, world)

    def inbox(self, owner: int, source: int, index: int) -> Where:
        return owner, *self.slot, "in", section_of(source, owner), index

    def outbox(self, rank: int, row: int) -> Where:
        return rank, *self.slot, "out", row

    def receive(self, words: list[tuple[Where, Any]]) -> list[Op]:
        """Wait for them, then leave them EMPTY."""
        if self.broken == "emptied before it is read":
            return [*(("store", where, EMPTY) for where, _ in words), ("receive", words)]
        emptied = [] if self.broken == "never emptied" else [("store", where, EMPTY) for where, _ in words]
        return [("receive", words), *emptied]

    def emptied_before(self, slot: tuple[int, int]) -> list[Op]:
        """Broken: at the beginning of a call, the slot of the next one."""
        if self.broken != "the next slot is emptied":
            return []
        return [("store", (self.rank, *slot, "in", section_of(p, self.rank), i), EMPTY) for p in self.peers for i in range(2)]

    def one_shot(self, rows: Sequence[int], _: Any) -> list[Op]:
        """Triton's: all rows are sent, then all awaited."""
        sent = [op for row in rows for op in self._whole(row)]
        return sent + [op for row in rows for op in self._row(row)]

    def one_shot_ahead(self, rows: Sequence[int], _: Any) -> list[Op]:
        """CUDA's: a row ahead is sent before one is awaited."""
        program = [op for row in rows[:1] for op in self._whole(row)]
        for i, row in enumerate(rows):
            program += [op for ahead in rows[i + 1 : i + 2] for op in self._whole(ahead)] + self._row(row)
        return program

    def _whole(self, row: int) -> list[Op]:
        return [("store", self.inbox(peer, self.rank, row), (self.number, self.rank, row)) for peer in self.peers]

    def _row(self, row: int) -> list[Op]:
        return self.receive([(self.inbox(self.rank, peer, row), (self.number, peer, row)) for peer in sorted(self.peers)])

    def two_shot(self, rows: Sequence[int], own: Sequence[int]) -> list[Op]:
        program = []
        for peer in self.peers:
            program += [self._to(peer, i) for i in own if peer * self.share + i < self.tokens]
        for i in own:
            row = self.rank * self.share + i
            if row < self.tokens:
                program += self._own(i)
                program += [("store", self.outbox(rank, row), (self.number, "sum", row)) for rank in (*self.peers, self.rank)]
        for index in rows:
            row = (index + self.rank * self.share) % self.tokens
            program += self.receive([(self.outbox(self.rank, row), (self.number, "sum", row))])
        return program

    def _to(self, owner: int, index: int) -> Op:
        return "store", self.inbox(owner, self.rank, index), (self.number, self.rank, index)

    def _own(self, index: int) -> list[Op]:
        return self.receive([(self.inbox(self.rank, peer, index), (self.number, peer, index)) for peer in sorted(self.peers)])

    def reduce_scatter(self, _: Any, own: Sequence[int]) -> list[Op]:
        return self.sharded(_, own, gather=False)

    def sharded(self, _: Any, own: Sequence[int], gather: bool = True) -> list[Op]:
        """A row ahead of each share is sent before one is awaited; finished rows are fetched a turn later."""

        def fetch(index: int) -> list[Op]:
            rows = [peer * self.share + index for peer in self.peers]
            words = [(self.outbox(self.rank, row), (self.number, "sum", row)) for row in rows if row < self.tokens]
            return [op for word in words for op in self.receive([word])] if gather else []

        program = [self._to(peer, i) for i in own[:1] for peer in self.peers]
        for at, index in enumerate(own):
            program += [self._to(peer, i) for i in own[at + 1 : at + 2] for peer in self.peers] + self._own(index)
            row = self.rank * self.share + index
            if gather and row < self.tokens:
                program += [("store", self.outbox(peer, row), (self.number, "sum", row)) for peer in self.peers]
            program += [op for last in own[max(0, at - 1) : at] for op in fetch(last)]
        return program + [op for last in own[-1:] for op in fetch(last)]


def turns(blocks: int, calls: int, broken: str = "") -> dict[Any, list[Op]]:
    """How the blocks of one rank know the slot of a call: it lies in memory, and the last block to come writes the next one's."""
    programs: dict[Any, list[Op]] = {(0, b): [] for b in range(blocks)}
    state, together = (0, "state"), broken != "blocks of the next call start early"
    for call in range(calls):
        for program in programs.values():
            read: list[Op] = [("load", state, call)]
            advance: list[Op] = [("arrive", (0, "arrivals"), blocks, 1), ("store", state, call + 1)]
            program += advance + read if broken == "counted in before it has read" else read + advance
            program.append(("meet", tuple(programs), together))
    return programs


def region_kernels(world: int, rank: int, call: int, broken: str) -> dict[str, list[Op]]:
    """`flags.cuh` and the kernels of one warp in `arrive.cu`."""
    peers = [(rank + step) % world for step in range(1, world)]
    number: Op = ("load", (rank, "call"), call)
    acquire, behind = broken != "no acquire", 2 if broken == "a call too far ahead" else 1
    made: dict[str, list[Op]] = {"call_of": [number]}
    for kind in ("FULL", "DONE"):
        made[f"signal {kind}"] = [("fence",), *(("store", (peer, kind, rank), call) for peer in peers)]
    made["await DONE"] = [("await", (rank, "DONE", peer), call - behind, acquire) for peer in peers]
    if broken == "no wait for readers":
        made["await DONE"] = []
    made["await FULL"] = [("await", (rank, "FULL", peer), call, acquire) for peer in peers]
    made["end_call"] = [*made["signal DONE"], ("store", (rank, "call"), call + 1)]
    made["wait_done"] = [number, *made["await DONE"]]
    made["finish"] = [number, *made["end_call"]]
    for peer, wait in zip(peers, made["await FULL"], strict=True):
        made[f"wait_full {peer}"] = [number, wait]
    return made


def parallel(rank: int, blocks: Sequence[list[Op]], programs: defaultdict[Any, list[Op]]) -> None:
    """A kernel of two blocks: the stream's own thread and one beside it."""
    threads = ((rank, "main"), (rank, "block"))
    for name, program in zip(threads, blocks, strict=True):
        programs[name] += [("meet", threads, True), *program, ("meet", threads, True)]
