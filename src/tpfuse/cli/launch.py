"""Starting ranks, watching them, ending them.

`launch` runs one function on several processes of this machine.  A rank that raises or dies is reported with its own error,
the others are ended within seconds, and no process outlives the call, whatever way it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from tpfuse.cli.inputs import BadInput
from tpfuse.report import FusionError

_SETTLE = 0.5  # seconds for more reports after a first failure: a peer's complaint may arrive before the cause
_GRACE = 2.0  # seconds between asking ranks to end and killing them

Progress = Callable[[str, int, int], None]  # stage, done, total (0 where it cannot be known)


class RankError(RuntimeError):
    """A rank failed.  `rank`: which.  `details`: its traceback, "" where its process ended or the message says it all."""

    def __init__(self, rank: int, message: str, details: str = "") -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank, self.details = rank, details


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its number, how many there are, how many share its host, the address of the store.

    hosted: the store is served by the launcher, so that no rank has to.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    hosted: bool = False

    @staticmethod
    def of_torchrun() -> Place | None:
        """This process's place when torchrun (or anything that sets its variables) started it.  BadInput where one of them is
        missing or no number."""
        env = os.environ
        if "RANK" not in env or "WORLD_SIZE" not in env:
            return None
        try:
            rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
            local, local_world = int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world))
            return Place(rank, world, local, local_world, env["MASTER_ADDR"], int(env["MASTER_PORT"]))
        except (KeyError, ValueError) as error:
            told = f"{error} is not set" if isinstance(error, KeyError) else str(error)
            raise BadInput(
                f"RANK and WORLD_SIZE are set, as by torchrun, but {told}: start the ranks with torchrun, or unset both"
            ) from error

    def environment(self) -> dict[str, str]:
        """The variables that torchrun would set, which libraries read, and threads that share the cores."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world), "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": str(threads(self.local_world)),
        }  # fmt: skip

    def join(self, device: str, timeout: float) -> None:
        """Start the default process group: gloo on CPU, NCCL on CUDA.  timeout: seconds that a collective may wait.

        FusionError where ranks do not meet at the address within it, or its port is taken."""
        limit = timedelta(seconds=timeout)
        if device == "cuda":
            torch.cuda.set_device(self.local_rank)
        here = torch.device(device, self.local_rank) if device == "cuda" else None
        back_end = "nccl" if device == "cuda" else "gloo"
        try:
            if self.hosted:
                store = dist.TCPStore(self.address, self.port, is_master=False, timeout=limit)
                dist.init_process_group(
                    back_end, store=store, rank=self.rank, world_size=self.world, timeout=limit, device_id=here
                )
            else:
                dist.init_process_group(back_end, timeout=limit, device_id=here)
        except dist.DistError as error:
            where = f"{self.world} ranks did not meet at {self.address}:{self.port}"
            raise FusionError(f"rank {self.rank}: {where}: {str(error).splitlines()[0]}") from error


def threads(local_world: int) -> int:
    """Threads for each of the ranks of this host: an equal share of the cores, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_world)


def launch(
    work: Callable[..., Any], world: int, *args: Any, progress: Progress | None = None, silence: float = 900.0
) -> list[Any]:
    """`[work(place, progress, *args) for each rank]`, every rank in a process (and process group) of its own.

    work: a function at the top level of a module; it, args and results travel by pickle.  Its second argument reports
    progress: rank 0's reports reach `progress` here, and every report counts as a sign of life.
    silence: seconds without a sign of life from any rank after which the run is given up.
    Raises RankError with the failure that came first; TimeoutError naming the ranks that hang and what each did last.
    """
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the system picks the port: no race
    ranks: list[_Rank] = []
    # Of semaphores that ended ranks leave behind, Python's tracker tells while it removes them.
    ignored = [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning:multiprocessing.resource_tracker"]
    quiet = {"PYTHONWARNINGS": ",".join(filter(None, ignored))}
    try:
        for index in range(world):
            ours, theirs = context.Pipe()
            place = Place(index, world, index, world, "127.0.0.1", store.port, hosted=True)
            process = context.Process(target=_serve, args=(theirs, place, work, args), name=f"rank{index}")
            with _environment(place.environment() | quiet):  # torch reads some of these when it is imported
                process.start()
            theirs.close()
            ranks.append(_Rank(index, process, ours))
        return _watch(ranks, progress or (lambda *_: None), silence)
    finally:
        _end(ranks)


class _Rank:
    def __init__(self, index: int, process: SpawnProcess, connection: Connection) -> None:
        self.index, self.process, self.connection = index, process, connection
        self.doing = "starting"
        self.result: Any = None
        self.finished = False

    def read(self, progress: Progress) -> RankError | None:
        """Take one message; the error if it was the end of the rank by failure."""
        try:
            kind, *rest = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return RankError(self.index, f"the process {_ending(self.process.exitcode)} while {self.doing}")
        if kind == "progress":
            self.doing = rest[0]
            if self.index == 0:
                progress(*rest)
        elif kind == "result":
            self.result, self.finished = rest[0], True
        else:
            return RankError(self.index, rest[0], rest[1])
        return None


def _watch(ranks: list[_Rank], progress: Progress, silence: float) -> list[Any]:
    first: RankError | None = None
    deadline = time.monotonic() + silence
    while running := [r for r in ranks if not r.finished]:
        ready = wait([r.connection for r in running], max(0.0, deadline - time.monotonic()))
        if not ready:
            if first:
                raise first
            doing = ", ".join(f"rank {r.index} ({r.doing})" for r in running)
            raise TimeoutError(f"no sign of life for {silence:.0f} s from {doing}")
        for rank in running:
            if rank.connection not in ready:
                continue
            error = rank.read(progress)
            if error:
                rank.finished = True
                # A death, or bad input, is the cause of what its peers report.
                if first is None or (first.details and not error.details):
                    first = error
        deadline = time.monotonic() + (_SETTLE if first else silence)
    if first:
        raise first
    return [r.result for r in ranks]


def _end(ranks: list[_Rank]) -> None:
    """End every rank and what it started (compilers, compile workers): asked first, killed after a grace."""
    for rank in ranks:
        if not rank.finished:
            _signal(rank.process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        _signal(rank.process, signal.SIGKILL)  # the group, so also what a finished rank left behind
        rank.process.join()
        rank.connection.close()


def _signal(process: SpawnProcess, number: int) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # gone, or so young that it has no group yet
        if process.is_alive():
            os.kill(process.pid, number)


def _serve(connection: Connection, place: Place, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """A rank's process."""
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ |= place.environment()
    lock = threading.Lock()

    def progress(stage: str, done: int, total: int) -> None:
        with lock:
            connection.send(("progress", stage, done, total))

    try:
        message: tuple[Any, ...] = ("result", work(place, progress, *args))
    except BaseException as error:
        message = ("error", describe(error), "" if isinstance(error, BadInput) else traceback.format_exc())
    connection.send(message)
    connection.close()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.killpg(0, signal.SIGKILL)


def cause(error: BaseException) -> BaseException:
    """What a compile really failed of: Dynamo wraps a back end's error in one of its own."""
    return getattr(error, "inner_exception", None) or error


def describe(error: BaseException) -> str:
    """`Type: message`, without the type where the message was written for people."""
    error = cause(error)
    plain = isinstance(error, ValueError | RuntimeError) and type(error).__module__.startswith("tpfuse")
    return str(error) if plain and str(error) else f"{type(error).__name__}: {error}"


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"died with exit code {code}"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Any:
    before = dict(os.environ)
    os.environ |= values
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before

