"""Ranks in fresh interpreters, with an environment of their own: `tpfuse.testing.RankPool` forks a process that has torch and
Triton imported, which is too late for TRITON_INTERPRET and for CUDA."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

_kept: dict[Any, Ranks] = {}


class Ranks:
    """Processes of one gloo group that run what they are sent."""

    def __init__(self, world: int, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes, self.processes = [], []
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **environment}):
            for rank in range(world):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, world, self.store.port, theirs), daemon=True)
                process.start()
                theirs.close()  # so that a process that dies is seen as the pipe's end
                self.pipes.append(ours)
                self.processes.append(process)

    def run(self, fn: Callable[..., Any], args: Any, timeout: float) -> list[Any]:
        deadline, results = time.monotonic() + timeout, {}
        for pipe in self.pipes:
            pipe.send((fn, args))
        while len(results) < len(self.pipes):
            missing = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready: Any = wait(missing, max(0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"only ranks {sorted(results)} finished in {timeout} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    results[rank], error = pipe.recv()
                except EOFError:
                    self.processes[rank].join(5)
                    raise RuntimeError(f"rank {rank}: exit code {self.processes[rank].exitcode}") from None
                if error:
                    raise RuntimeError(f"rank {rank}: {error}")
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_spawned(
    fn: Callable[..., Any], world: int, *args: Any, environment: Mapping[str, str], timeout: float = 200, keep: bool = False
) -> list[Any]:
    """`[fn(rank, world, *args) for each rank]` in one gloo group.  RuntimeError with the traceback of a rank that failed.

    keep: by processes that stay for the next call that keeps, of so many ranks in such an environment, unless it fails.  Others
    end before new ones are started: they hold memory of a GPU that may be shared.
    """
    key = (world, *sorted(environment.items()))
    ranks = _kept.pop(key, None) if keep else None
    if ranks is None:
        while _kept:
            _kept.popitem()[1].close()
        ranks = Ranks(world, environment)
    try:
        results = ranks.run(fn, args, timeout)
        if keep:
            _kept[key] = ranks
        return results
    finally:
        if _kept.get(key) is not ranks:
            ranks.close()


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (fn(rank, world, *args), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        pipe.send(answer)
