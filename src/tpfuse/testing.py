"""Run functions on several ranks of one machine, for tests: `run_ranks` once, `RankPool` again and again.

Ranks are processes joined in one gloo group, one thread each.  They are forked from a server that has imported torch
and its compiler and done nothing else, which takes seconds off every start.  A rank that raises, dies or hangs ends the
run with that rank's own error within seconds, and no rank outlives its pool.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist

_GROUP_TIMEOUT = timedelta(minutes=10)  # longer than any run: the pool's own time-out, with its stacks, comes first
_WARM = ["torch.distributed", "torch._inductor.compile_fx"]  # imported once, by the server
# One thread, and no compiler processes to leave behind.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_SETTLE = 0.5  # seconds for more reports after a first failure: a peer's complaint may arrive before the cause


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`[fn(rank, world, *args) for each rank]`, every rank in a process of its own.  See `RankPool.run`."""
    with RankPool(world) as pool:
        return pool.run(fn, *args, timeout=timeout)


class RankPool:
    """`world` processes in one gloo group that take functions one after another.

    Processes start at the first `run` and end with the `with` block.  A failed run ends them all, and the next run
    starts fresh ones, so one test's failure never reaches another test.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._ranks: list[_Rank] = []
        self._store: dist.TCPStore | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """`[fn(rank, world, *args) for each rank]`.

        fn: a function at the top level of a module; it, its arguments and its results travel by pickle, tensors by
        value.  Every call starts with this process's environment variables, with `torch.manual_seed(0)` and without
        compiled functions of earlier calls; but what torch reads from the environment at import is read only once.
        timeout: seconds, starting the processes included.
        Raises the exception of the rank that failed first, its traceback in the notes; ChildProcessError if a rank
        died; TimeoutError with the stacks of the ranks that had not finished.
        """
        call = pickle.dumps((dict(os.environ), fn, args))
        deadline = time.monotonic() + timeout
        try:
            if not self._ranks:
                self._start()
            for rank in self._ranks:
                rank.connection.send_bytes(call)
            return self._collect(deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process.  The pool can be used again."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.connection.close()
            rank.stacks.unlink(missing_ok=True)
        self._ranks = []
        self._store = None

    def _start(self) -> None:
        # CUDA does not survive a fork, and importing the compiler may start it.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload(_WARM)
        # This process serves the store, on a port that the system picks: no race for a free one.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for index in range(self.world):
            connection, theirs = context.Pipe()
            descriptor, stacks = tempfile.mkstemp(prefix=f"tpfuse-rank{index}-")
            os.close(descriptor)
            arguments = (index, self.world, self._store.port, theirs, stacks)
            process = context.Process(target=_serve, args=arguments, name=f"rank{index}", daemon=True)
            with patch.dict(os.environ, _ENVIRONMENT):  # for the server, which the first start starts
                process.start()
            theirs.close()
            self._ranks.append(_Rank(index, process, connection, Path(stacks)))

    def _collect(self, deadline: float) -> list[Any]:
        reports: dict[int, _Report] = {}
        while missing := [rank for rank in self._ranks if rank.index not in reports]:
            ready = wait([rank.connection for rank in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            reports |= {rank.index: rank.receive() for rank in missing if rank.connection in ready}
            if any(report.error for report in reports.values()):
                deadline = min(deadline, time.monotonic() + _SETTLE)
        failed = [report for report in reports.values() if report.error]
        if failed:
            raise min(failed, key=lambda report: report.when).error
        if missing:
            raise TimeoutError("\n".join(f"rank {rank.index} had not finished:\n{rank.stack()}" for rank in missing))
        return [reports[index].result for index in range(self.world)]


@dataclass(frozen=True)
class _Report:
    when: float  # time.monotonic(), the same clock in every process
    result: Any = None
    error: Any = None


@dataclass(frozen=True)
class _Rank:
    index: int
    process: ForkServerProcess
    connection: Connection
    stacks: Path

    def receive(self) -> _Report:
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join()
            # A death is the cause of whatever its peers report, so it counts as the first.
            died = ChildProcessError(f"rank {self.index} died with exit code {self.process.exitcode}")
            return _Report(0.0, error=died)

    def stack(self) -> str:
        """Where the process stands now, as text."""
        os.kill(cast(int, self.process.pid), signal.SIGUSR1)
        time.sleep(0.2)
        return self.stacks.read_text()


def _serve(rank: int, world: int, port: int, connection: Connection, stacks: str) -> None:
    """A rank's process: join the group, then answer calls until the pool goes away."""
    threading.Thread(target=_end_with_parent, args=(stacks,), daemon=True).start()
    faulthandler.register(signal.SIGUSR1, os.open(stacks, os.O_WRONLY), all_threads=False)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_GROUP_TIMEOUT)
    while True:
        call = connection.recv_bytes()
        torch.compiler.reset()
        torch.manual_seed(0)
        connection.send_bytes(_answer(call, rank, world, port))


def _answer(call: bytes, rank: int, world: int, port: int) -> bytes:
    try:
        environment, fn, args = pickle.loads(call)
        os.environ.clear()
        os.environ |= environment | _ENVIRONMENT | _torchrun(rank, world, port)
        return pickle.dumps(_Report(time.monotonic(), result=fn(rank, world, *args)))
    except BaseException as error:
        when = time.monotonic()
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        try:
            report = pickle.dumps(_Report(when, error=error))
            pickle.loads(report)  # exceptions with arguments of their own pickle, and fail only when read
            return report
        except Exception:
            return pickle.dumps(_Report(when, error=RuntimeError(f"on rank {rank}:\n{traceback.format_exc()}")))


def _torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets, since libraries read them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _end_with_parent(stacks: str) -> None:
    wait([cast(BaseProcess, multiprocessing.parent_process()).sentinel])
    Path(stacks).unlink(missing_ok=True)
    os._exit(1)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, tpfuse's backend interprets final graphs instead of giving them to Inductor: the whole pipeline, much faster."""
    from tpfuse import shim

    def interpret(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        return shim.boxed(lambda *args: torch.fx.Interpreter(gm).run(*args))  # of its own: it holds the values of one call

    before = shim.compile_fx_inner
    shim.compile_fx_inner = interpret
    try:
        yield
    finally:
        shim.compile_fx_inner = before
