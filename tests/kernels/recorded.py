"""What the launchers of products next to collectives put on their streams, recorded on CPU tensors, as programs of `model.py`.

The order of products, copies, kernels and events is the launchers' own; `protocols.region_kernels` says what the kernels do.  A
word stands for a row; its value is (number of the call, rank that multiplied it or nothing, row among all rows).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.emulated import regions
from tests.kernels.model import Op, Where
from tests.kernels.protocols import parallel, region_kernels
from tpfuse.kernels import arrive, operands, product_gather, product_scatter
from tpfuse.kernels.cuda_norm import Args
from tpfuse.kernels.operands import Rows, plain
from tpfuse.kernels.plan import REGION_HEAD
from tpfuse.kernels.regions import SCATTER, Region

WIDTH = 64  # columns of a row that travels: 128 bytes, as much as a region's sections are aligned to
ROW = 2 * WIDTH


def programs(
    monkeypatch: Any, kind: str, world: int, calls: Sequence[tuple[str, int]], max_tokens: int, broken: str = ""
) -> dict[Any, list[Op]]:
    """Calls, each of an algorithm and a number of rows, of all ranks on one region."""
    every, made = regions(monkeypatch, kind, world, max_tokens, WIDTH), {}
    for rank in range(world):
        made |= _Recorder(monkeypatch, every, rank, broken).record(kind, calls)
    return made


class _Stream:
    """side and copies of a region, and the current one."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def record_event(self) -> tuple[Any, ...]:
        return self.recorder.event(self.name)

    def wait_event(self, event: tuple[Any, ...]) -> None:
        left_out = {"no wait for copies": "copies", "no wait for what came": "side"}.get(self.recorder.broken)
        if (self.name, event[1]) != ("main", left_out):
            self.recorder.ops[self.recorder.rank, self.name].append(("wait", event))


class _Recorder(TorchDispatchMode):
    def __init__(self, monkeypatch: Any, every: list[Region], rank: int, broken: str) -> None:
        super().__init__()
        self.rank, self.world, self.broken, self.call, self.count = rank, len(every), broken, 1, 0
        self.ops: defaultdict[Any, list[Op]] = defaultdict(list)
        self.buffers = every[rank].buffers
        self.staged: list[Tensor] = []  # kept, so that no two have one address
        self.current = [_Stream(self, "main")]
        side: Any = _Stream(self, "side")
        copies: Any = _Stream(self, "copies")
        self.region = replace(every[rank], side=side, copies=copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current[-1])
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(operands, "multiply", self._multiply)
        monkeypatch.setattr(arrive, "_kernel", lambda name, rank, world, device: lambda *args: self._kernel(name, args[-1]))
        monkeypatch.setattr(product_scatter, "kernel_of", lambda *args, **flags: lambda *args: self._reduce(args[-1]))

    def record(self, kind: str, calls: Sequence[tuple[str, int]]) -> dict[Any, list[Op]]:
        for algorithm, tokens in calls:
            share = -(-tokens // self.world)
            weight = torch.zeros(WIDTH, WIDTH).bfloat16()
            x = torch.zeros(tokens if kind == SCATTER else share, WIDTH).bfloat16()
            rows, product = plain(x, weight, None)
            with self:
                if kind == SCATTER:
                    call = product_scatter.sum_of("matmul_reduce_scatter", rows, product, "tp")
                    product_scatter.chunked(self.region, rows, product, call)
                else:
                    self.share = share
                    launch = getattr(product_gather, algorithm)
                    launch(self.region, "all_gather_matmul", Rows(x), [product], tokens, False)
        return dict(self.ops)

    @contextmanager
    def _on(self, stream: _Stream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    def event(self, stream: str) -> tuple[Any, ...]:
        self.count += 1
        self.ops[self.rank, stream].append(("record", (self.rank, stream, self.count)))
        return self.rank, stream, self.count

    def _put(self, ops: Sequence[Op], ends: bool = True) -> None:
        """A kernel or copy on the current stream: what comes behind begins when it has ended."""
        stream = self.current[-1].name
        self.ops[self.rank, stream] += ops
        if ends:
            self.ops[self.rank, stream].append(("wait", self.event(stream)))

    def _where(self, memory: Tensor) -> list[Where]:
        """The words of rows, in a rank's region or elsewhere."""
        for rank, buffer in enumerate(self.buffers):
            offset = memory.data_ptr() - buffer.data_ptr()
            if 0 <= offset < buffer.numel():
                if offset < REGION_HEAD:
                    return [(rank, "FULL", offset // 4)]
                return [(rank, "row", (offset - REGION_HEAD) // ROW + i) for i in range(len(memory))]
        if not any(memory.data_ptr() == known.data_ptr() for known in self.staged):
            self.staged.append(memory)
        index = next(i for i, known in enumerate(self.staged) if known.data_ptr() == memory.data_ptr())
        if self.broken == "memory is given back before it is sent":
            index %= 2  # the next but one's
        return [(self.rank, "staged", index, i) for i in range(len(memory))]

    def _multiply(self, out: Tensor, x: Tensor, *_: Any) -> None:
        """Of a scatter: partial rows into memory.  Of a gather: rows of a region into a result."""
        if self.region.layout.scales == 0:
            first = x.storage_offset() // WIDTH
            values = [(self.call, self.rank, first + i) for i in range(len(x))]
            self._put([("store", where, value) for where, value in zip(self._where(out), values, strict=True)])
            self.values = dict(zip(self._where(out), values, strict=True))
        elif (read := self._where(x))[0][1] == "row":
            first = out.storage_offset() // WIDTH
            self._put([("load", where, (self.call, None, first + i)) for i, where in enumerate(read)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or self.current[-1].name != "copies":
            return func(*args, **(kwargs or {}))
        there, here = args
        if not here.numel():
            return there
        to = self._where(there)
        if to[0][1] == "FULL":
            assert here.data_ptr() == self.region.call.data_ptr()
            self._put([("load", (self.rank, "call"), self.call), ("store", to[0], self.call)])
        elif self.region.layout.scales == 0:
            for read, where in zip(self._where(here), to, strict=True):
                self._put([("load", read, self.values[read]), ("store", where, self.values[read])], ends=False)
            self._put([])
        else:
            first = self.rank * self.share + here.storage_offset() // WIDTH
            stores = [("store", where, (self.call, None, first + i)) for i, where in enumerate(to)]
            self._put(stores, ends=self.broken != "flags overtake rows")
        return there

    def _kernel(self, name: str, args: Args) -> None:
        kernels = region_kernels(self.world, self.rank, self.call, self.broken)
        if name == "push_rows":
            self._push_rows(kernels, args)
        else:
            self._put(kernels[f"wait_full {args.first}" if name == "wait_full" else name])
            self.call += name == "finish"

    def _push_rows(self, kernels: dict[str, list[Op]], args: Args) -> None:
        start = (args.base * 16 - REGION_HEAD) // ROW
        rows = [(start + i, (self.call, None, self.rank * self.share + i)) for i in range(args.vectors * 16 // ROW)]
        fence: list[Op] = [] if self.broken == "no fence before the count" else [("fence",)]
        last, blocks = [*kernels["signal FULL"], *kernels["await FULL"]], []
        for block in range(2):
            stores = [("store", (rank, "row", at), value) for at, value in rows[block::2] for rank in range(self.world)]
            arrived = ("arrive", (self.rank, "arrivals"), 2, len(last))
            blocks.append([*kernels["wait_done"], *stores, *fence, arrived, *last])
        parallel(self.rank, blocks, self.ops)

    def _reduce(self, args: Args) -> None:
        kernels = region_kernels(self.world, self.rank, self.call, self.broken)
        blocks: list[list[Op]] = []
        for block in range(2):
            reads: list[Op] = []
            for index in range(args.first + block, args.end, 2):
                row = self.rank * args.share + index
                for source in range(self.world):
                    at = (args.base * 16 - REGION_HEAD + source * args.section * 16) // ROW + index - args.first
                    if row < args.tokens:
                        reads.append(("load", (self.rank, "row", at), (self.call, source, row)))
            arrived = [("arrive", (self.rank, "arrivals"), 2, len(kernels["end_call"])), *kernels["end_call"]]
            first = [*kernels["call_of"], *(kernels["signal FULL"] if block == 0 else [])]
            early = self.broken == "readers signal before they have read"
            blocks.append([*first, *kernels["await FULL"], *(arrived + reads if early else reads + arrived)])
        parallel(self.rank, blocks, self.ops)
        self.call += 1
