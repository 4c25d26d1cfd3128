"""Ranks in fresh interpreters, with an environment of their own: `tpfuse.testing.RankPool` forks a process that has torch and
Triton imported, which is too late for TRITON_INTERPRET and for CUDA."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


def run_spawned(
    fn: Callable[..., Any], world: int, *args: Any, environment: Mapping[str, str], timeout: float = 200
) -> list[Any]:
    """`[fn(rank, world, *args) for each rank]` in one gloo group.  RuntimeError with the traceback of a rank that failed."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    ranks = [
        context.Process(target=_serve, args=(fn, rank, world, store.port, args, answers), daemon=True)
        for rank in range(world)
    ]
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **environment}):
            for process in ranks:
                process.start()
        while len(results) < world:
            try:
                rank, result, error = answers.get(timeout=0.5)
            except queue.Empty:
                died = [f"rank {r}: exit code {p.exitcode}" for r, p in enumerate(ranks) if p.exitcode not in (None, 0)]
                if died or time.monotonic() > deadline:
                    raise RuntimeError(", ".join(died) or f"only ranks {sorted(results)} finished") from None
                continue
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
            results[rank] = result
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world)]


def _serve(fn: Callable[..., Any], rank: int, world: int, port: int, args: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        answers.put((rank, fn(rank, world, *args), None))
        dist.barrier()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
