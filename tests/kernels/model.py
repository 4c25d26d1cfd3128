"""An executable model of memory between GPUs, and of threads that meet in it: every interleaving of small programs, or many
by chance.

A store is on its way until it arrives; stores of one thread to different words arrive in any order.  A load may see any value
that its word has had since its thread last looked there, acquired, or started as a kernel.  So what only a fence, an acquire or
the end of a kernel promises is promised by nothing else.  Programs are straight lines of operations:

    ("store", where, value)             where: (rank, kind of memory, ...)
    ("fence",)                          all own stores have arrived
    ("receive", [(where, wanted)])      wait until no word can be seen EMPTY any more, one by one; what is there must be wanted
    ("await", where, number, acquire)   wait for a flag of at least this number
    ("load", where, wanted)             whatever can be seen must be wanted
    ("arrive", where, count, skip)      count in, atomically; all but the last of `count` leave out the next `skip` operations
    ("meet", threads, kernel)           a barrier; of a kernel's end and the next one's start: all stores have arrived
    ("record", event), ("wait", event)  of streams: what came before has ended
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

EMPTY = "EMPTY"
Where = tuple[Any, ...]
Op = tuple[Any, ...]
Programs = Mapping[Hashable, Sequence[Op]]
# What a word holds at first, by its kind; others are EMPTY.
FIRST = {"FULL": 0, "DONE": 0, "arrivals": 0, "row": "old", "staged": "old", "state": 0, "call": 1}


class Broken(AssertionError):
    """A program read what it must not, or waits for ever."""


class State:
    """Where every thread is, and what every word has been."""

    def __init__(self, programs: Programs) -> None:
        self.names = list(programs)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.programs = [list(programs[name]) for name in self.names]
        self.pc = [0] * len(self.names)
        self.stores: list[list[tuple[Where, Any]]] = [[] for _ in self.names]
        self.words: dict[Where, list[Any]] = {}
        self.seen: list[dict[Where, int]] = [{} for _ in self.names]
        self.events: set[Any] = set()
        self.settle()

    def copy(self) -> State:
        new = State.__new__(State)
        new.names, new.index, new.programs, new.pc = self.names, self.index, self.programs, self.pc[:]
        new.stores = [s[:] for s in self.stores]
        new.words = {w: v[:] for w, v in self.words.items()}
        new.seen = [s.copy() for s in self.seen]
        new.events = set(self.events)
        return new

    def key(self) -> Hashable:
        """Equal for states from which the same can happen."""
        words = []
        for where in sorted(self.words, key=repr):
            seen = [s.get(where, 0) for s in self.seen]
            low = min(seen)
            words.append((where, tuple(self.words[where][low:]), tuple(s - low for s in seen)))
        stores = tuple(tuple(sorted(s, key=lambda store: repr(store[0]))) for s in self.stores)
        return tuple(self.pc), stores, tuple(words), frozenset(self.events)

    def history(self, where: Where) -> list[Any]:
        return self.words.setdefault(where, [FIRST.get(where[1], EMPTY)])

    def visible(self, t: int, where: Where) -> list[Any]:
        """Oldest first."""
        own = [value for there, value in self.stores[t] if there == where]
        return own[-1:] or self.history(where)[self.seen[t].get(where, 0) :]

    def op(self, t: int) -> Op | None:
        return self.programs[t][self.pc[t]] if self.pc[t] < len(self.programs[t]) else None

    def refresh(self, t: int) -> None:
        self.seen[t] = {where: len(values) - 1 for where, values in self.words.items()}

    def settle(self) -> None:
        """Whatever a thread may as well do at once: its effects on others can still come late."""
        moved = True
        while moved:
            moved = False
            for t in range(len(self.names)):
                while self._step(t):
                    moved = True

    def _step(self, t: int) -> bool:
        op = self.op(t)
        if op is None:
            return False
        kind = op[0]
        if kind == "store":
            self.stores[t].append(op[1:])
        elif kind == "fence" or kind == "record":
            if self.stores[t]:
                return False
            if kind == "record":
                self.events.add(op[1])
        elif kind == "wait":
            if op[1] not in self.events:
                return False
            self.refresh(t)
        elif kind == "await":
            _, where, number, acquire = op
            if self.visible(t, where)[-1] < number:
                return False
            if acquire:
                self.refresh(t)
        elif kind == "meet":
            threads = [self.index[name] for name in op[1]]
            if any(self.op(other) != op or (op[2] and self.stores[other]) for other in threads):
                return False
            for other in threads:
                self.pc[other] += 1
            joined: dict[Where, int] = {}
            for other in threads:
                for where, at in self.seen[other].items():
                    joined[where] = max(joined.get(where, 0), at)
            for other in threads:
                self.refresh(other) if op[2] else self.seen[other].update(joined)
            return True
        else:
            return False
        self.pc[t] += 1
        return True

    def choices(self) -> list[tuple[str, int, int]]:
        """What may happen next: a store arrives, or a thread goes on."""
        found = []
        for t, stores in enumerate(self.stores):
            wheres = [where for where, _ in stores]
            found += [("arrives", t, i) for i, where in enumerate(wheres) if where not in wheres[:i]]
            op = self.op(t)
            if op is None or op[0] not in ("receive", "load", "arrive"):
                continue
            if op[0] != "receive" or all(any(v != EMPTY for v in self.visible(t, where)) for where, _ in op[1]):
                found.append(("goes on", t, 0))
        return found

    def take(self, choice: tuple[str, int, int]) -> None:
        what, t, i = choice
        if what == "arrives":
            where, value = self.stores[t].pop(i)
            values = self.history(where)
            values.append(value)
            self.seen[t][where] = len(values) - 1
        else:
            self._go_on(t)
        self.settle()

    def _go_on(self, t: int) -> None:
        op = self.op(t)
        assert op is not None
        self.pc[t] += 1
        if op[0] == "arrive":
            _, where, count, skip = op
            values = self.history(where)
            values.append((values[-1] + 1) % count)
            self.refresh(t)
            if values[-1]:
                self.pc[t] += skip
            return
        for where, wanted in op[1] if op[0] == "receive" else [op[1:]]:
            for i, value in enumerate(self.visible(t, where)):
                if value == EMPTY and op[0] == "receive":
                    continue
                if value != wanted:
                    raise Broken(f"{self.names[t]} at {self.pc[t]}: {where} is {value}, not {wanted}")
                if op[0] == "receive":
                    self.seen[t][where] = self.seen[t].get(where, 0) + i
                    break

    def ended(self) -> None:
        """Nothing can happen any more: everybody must have come to the end."""
        stuck = {name: self.op(t) for t, name in enumerate(self.names) if self.op(t) is not None}
        if stuck:
            raise Broken(f"waits for ever: {stuck}")


def explore(programs: Programs, limit: int = 200_000) -> int:
    """Every interleaving; the number of states."""
    first = State(programs)
    seen, todo = {first.key()}, [first]
    while todo:
        state = todo.pop()
        choices = state.choices()
        if not choices:
            state.ended()
        for choice in choices:
            new = state.copy()
            new.take(choice)
            if (key := new.key()) not in seen:
                seen.add(key)
                todo.append(new)
        assert len(seen) <= limit, "too many states"
    return len(seen)


def wander(programs: Programs, seed: int) -> None:
    """One interleaving by chance, some threads and some links much slower than others."""
    generator, state = random.Random(seed), State(programs)
    count = len(state.names)
    pace = [[10 ** generator.uniform(-2.5, 0) for _ in range(count)] for _ in range(2)]
    while choices := state.choices():
        weights = [pace[what == "arrives"][t] for what, t, _ in choices]
        state.take(generator.choices(choices, weights)[0])
    state.ended()
