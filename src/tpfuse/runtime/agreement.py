"""Ranks agree on the plan before the first run of each range, through the store: a difference is an error, never a hang."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from tpfuse.report import FusionError
from tpfuse.shim import default_store, resolve_group

# How often ranks agreed on a plan and followed the first of them, by the default group: one that is made anew has another store,
# in which processes that were in different groups before must count alike.
_turns: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()


def group_ranks(group: str) -> tuple[int, ...]:
    """The global ranks of the group named `group`."""
    return tuple(dist.get_process_group_ranks(resolve_group(group)))


def agree(ranks: Sequence[int], plan: Sequence[str], timeout: float) -> None:
    """Every rank of `ranks` calls with the same plan, or all raise FusionError naming the first difference and the ranks.

    plan: lines that describe what must be the same.  timeout: seconds to wait for the others, then the missing are named.
    """
    store, me, key = default_store(), dist.get_rank(), _take_turn("agree", ranks)
    store.set(f"{key}/{me}", json.dumps(list(plan)))
    theirs = _collect(store, key, ranks, timeout, "agreement on the plan")
    for rank, lines in theirs.items():
        if lines and lines[0].startswith("failed: ") and rank != me:
            raise FusionError(f"rank {rank} could not compile its graph: {lines[0].removeprefix('failed: ')}")
    mine = list(plan)
    for rank, lines in theirs.items():
        if lines != mine:
            raise FusionError(_difference(me, mine, rank, lines))


def fail(ranks: Sequence[int], error: BaseException) -> None:
    """Tell the ranks that wait in `agree` that this one will not come, and why."""
    key = _take_turn("agree", ranks)
    default_store().set(f"{key}/{dist.get_rank()}", json.dumps([f"failed: {type(error).__name__}: {error}"]))


def follow(ranks: Sequence[int], text: str, timeout: float) -> str:
    """What the first of `ranks` calls with, on all of them.  FusionError where it does not come within `timeout` seconds."""
    store, me, first, key = default_store(), dist.get_rank(), min(ranks), _take_turn("follow", ranks)
    if me == first:
        store.set(key, text)
        return text
    try:
        store.wait([key], timedelta(seconds=timeout))
    except RuntimeError as error:
        raise FusionError(f"rank {me} waited {timeout:.0f} s for the table of ranks [{first}]") from error
    return store.get(key).decode()


def compile_once(ranks: Sequence[int], text: str, compile: Callable[[], Any], timeout: float) -> Any:
    """Compile on one rank a host where graphs are the same, and load the artifact from the shared cache on the others."""
    store, key = default_store(), _turn("agree", ranks)
    label = hashlib.sha256(f"{socket.gethostname()}\n{text}".encode()).hexdigest()
    first = store.add(f"{key}/compile/{label}", 1) == 1
    done = f"{key}/compiled/{label}"
    if not first:
        # The leader may have failed; then each compiles for itself and meets the error itself.
        deadline = time.monotonic() + timeout
        while not store.check([done]) and time.monotonic() < deadline:
            time.sleep(0.02)
    try:
        return compile()
    finally:
        if first:
            store.set(done, "")


def _turn(what: str, ranks: Sequence[int]) -> str:
    """The key of what these ranks do next."""
    name = f"tpfuse/{what}/{','.join(map(str, ranks))}"
    return f"{name}/{_turns.setdefault(dist.group.WORLD, Counter())[name]}"


def _take_turn(what: str, ranks: Sequence[int]) -> str:
    key = _turn(what, ranks)
    _turns[dist.group.WORLD][key.rpartition("/")[0]] += 1
    return key


def _collect(store: dist.Store, key: str, ranks: Sequence[int], timeout: float, what: str) -> dict[int, list[str]]:
    try:
        store.wait([f"{key}/{r}" for r in ranks], timedelta(seconds=timeout))
    except RuntimeError as error:
        missing = [r for r in ranks if not store.check([f"{key}/{r}"])]
        raise FusionError(
            f"rank {dist.get_rank()} waited {timeout:.0f} s in {what} {key.rsplit('/', 1)[-1]} for ranks {missing}"
        ) from error
    return {r: json.loads(store.get(f"{key}/{r}")) for r in ranks}


def _difference(me: int, mine: list[str], other: int, theirs: list[str]) -> str:
    for i in range(max(len(mine), len(theirs))):
        a = mine[i] if i < len(mine) else "nothing"
        b = theirs[i] if i < len(theirs) else "nothing"
        if a != b:
            return f"ranks {me} and {other} disagree on line {i} of the plan: rank {me} has {a!r}, rank {other} has {b!r}"
    raise AssertionError("no difference")
