"""One graph, several ranges: each compiled when its first token count arrives, agreed on by the ranks, then dispatched to."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpfuse import shim
from tpfuse.config import Config
from tpfuse.ir import check
from tpfuse.ir.op import load
from tpfuse.lowering.select import needs
from tpfuse.report import FusionError, Report
from tpfuse.runtime import agreement
from tpfuse.runtime.key import sources
from tpfuse.runtime.planner import Planner
from tpfuse.runtime.symbols import (
    callable_with,
    fresh_inputs,
    renew_bodies,
    renew_strides,
    resized,
)
from tpfuse.target import UNBOUNDED, Range

log = logging.getLogger("tpfuse")
MANY = 8  # artifacts of one range that are no longer a few exceptions
_dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()
_compiling = threading.RLock()  # of threads that need a range at the same time one compiles it, and agrees with the other ranks


def warmup(sizes: Sequence[int]) -> None:
    """Compile, agree and prepare the ranges of these token counts in every graph seen so far: all ranks call it alike, before
    they capture CUDA graphs of their own.  A count beyond `Config.max_tokens` has no range and is passed over.

    sizes: token counts, each at least 1, else ValueError.  FusionError where ranks disagree or one does not come."""
    if wrong := [size for size in sizes if size < 1]:
        raise ValueError(f"token counts start at 1, got {wrong}")
    for dispatcher in sorted(_dispatchers, key=lambda d: d.number):
        for size in sizes:
            dispatcher.warm(size)


@dataclass
class Compiled:
    """One artifact of a range and the conditions on sizes that Inductor made while compiling it."""

    call: Callable[[list[Any]], Any]
    guards: list[Any]

    def holds(self, values: dict[Any, int]) -> bool:
        return all(bool(g.xreplace(values)) for g in self.guards)


class Dispatcher(Planner):
    """What stands in Inductor's place for one raised graph.  Called with one list of inputs, which it may clear."""

    _boxed_call = True

    def __init__(
        self,
        gm: fx.GraphModule,
        kwargs: dict[str, Any],
        config: Config,
        patches: dict[str, Any],
        report: Report,
        fuel: Callable[[], bool],
    ) -> None:
        """kwargs: Inductor's, of the graph.  patches: settings of Inductor."""
        super().__init__(gm, config, report, fuel, follow=True)
        self.kwargs, self.patches = kwargs, patches
        self.compiled: dict[Range, list[Compiled]] = {r: [] for r in self.ranges}
        _dispatchers.add(self)

    def __call__(self, args: list[Any]) -> Any:
        tokens = 1 if self.tokens is None else max(1, self.bindings.evaluate(self.tokens, args))
        limits = next((r for r in self.ranges if tokens in r), None)
        if limits is None:
            raise FusionError(f"{tokens} tokens, but Config(max_tokens={self.config.max_tokens})")
        if self.config.compile_all and not any(self.compiled.values()):
            for other in self.ranges:
                if other != limits:
                    self.warm(other.end if other.end < UNBOUNDED else max(2 * other.start, 4096))
        found = self._find(limits, args)
        if found is None:
            with _compiling:
                found = self._find(limits, args) or self._compile(limits, self.bindings.values(args))
        return found.call(args)

    def _find(self, limits: Range, args: Sequence[Any]) -> Compiled | None:
        """The artifact of a range that is right for the sizes of a call."""
        values: dict[Any, int] = {}  # read off the arguments where anybody asks
        for candidate in self.compiled[limits]:
            if candidate.guards:
                values = values or self.bindings.values(args)
            if candidate.holds(values):
                return candidate
        return None

    def warm(self, tokens: int) -> None:
        """Compile the range of a token count, other sizes as the graph was traced with.  A no-op where it is compiled, and where
        the graph is never called with so few: one token has a graph of its own."""
        limits = next((r for r in self.ranges if tokens in r), None)
        values = resized(shim.traced_sizes(self.placeholders), self.tokens, tokens)
        with _compiling:
            if limits is not None and not self.compiled[limits] and callable_with(self.placeholders, values):
                self._compile(limits, values)

    def warm_as_traced(self) -> None:
        """Compile the range of the sizes that the graph was traced with."""
        values = shim.traced_sizes(self.placeholders)
        tokens = 1 if self.tokens is None else self.tokens
        self.warm(tokens if isinstance(tokens, int) else int(tokens.xreplace(values)))

    def _compile(self, limits: Range, values: dict[Any, int]) -> Compiled:
        if shim.is_capturing():
            raise FusionError(f"tokens {limits} were never run before this graph capture: call warmup() or run them once")
        start = time.perf_counter()
        groups = self._groups()
        everyone = sorted(set(groups.values()))
        try:
            graph, result, plans = self.plan(limits)
            call, guards = self._build(graph, limits, values, everyone)
        except BaseException as error:
            for ranks in everyone:
                agreement.fail(ranks, error)
            raise
        for group in groups:
            plan = [*self.config.lines(), f"table {self.table.digest}", f"ranges {[str(r) for r in self.ranges]}"]
            plan += [f"torch {torch.__version__}", *plans.get(group, [])]
            agreement.agree(groups[group], plan, self.config.timeout)
        with shim.real_tensors():  # sizes that never change are compiled for while AOTAutograd's fake mode is on
            for (prepare, group), need in needs(graph).items():
                load(prepare)(group, self._most_tokens(limits, values), need.hidden, sorted(need.dtypes, key=str))
        self.report.add(result)
        log.info("graph %d, tokens %s: compiled in %.1f s", self.number, limits, time.perf_counter() - start)
        for event in result.events:
            log.debug("graph %d, tokens %s: %s", self.number, limits, event)
        shim.trace_artifact(f"tpfuse_graph_{self.number}_tokens_{limits}", lambda: "\n".join(map(str, result.events)))
        compiled = Compiled(self._checked(call) if self.config.verify else call, guards)
        self.compiled[limits].append(compiled)
        if len(self.compiled[limits]) == MANY:
            log.warning(
                "graph %d, tokens %s: compiled %d times, since Inductor ties what it compiles to sizes (%s); other sizes are "
                "compiled when they come", self.number, limits, MANY, ", ".join(map(str, guards)),
            )  # fmt: skip
        return compiled

    def _checked(self, call: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """A call that reports the errors of the sites that it checks."""

        def run(args: list[Any]) -> Any:
            with check.told_to(self.report.check):
                return call(args)

        return run

    def _most_tokens(self, limits: Range, values: dict[Any, int]) -> int:
        """Tokens that a workspace is made for: the range's end, or today's count where it has none (calls with more go in
        several launches), or the largest size where nothing tells a count."""
        if limits.end < UNBOUNDED:
            return limits.end
        today = max(values.values(), default=1) if self.tokens is None else int(self.tokens.xreplace(values))
        return self.config.max_tokens or today

    def _build(
        self, graph: fx.Graph, limits: Range, values: dict[Any, int], everyone: list[tuple[int, ...]]
    ) -> tuple[Callable[[list[Any]], Any], list[Any]]:
        """Inductor on the final graph, under symbols of its own (but see `by_data`) → the artifact, and the conditions on sizes
        under which it holds.  Each rank of a host compiles what no other does."""
        gm, inputs = fx.GraphModule(self.gm, graph), self.placeholders
        context, conditions, symbols = contextlib.nullcontext, list[Any], {}
        if not self.by_data:
            inputs, mode, symbols = fresh_inputs(self.placeholders, values, self.tokens, limits)
            renew_strides(graph, mode, symbols, values)
            renew_bodies(gm, mode, symbols, values)
            context, conditions = functools.partial(shim.tracing_under, mode), functools.partial(shim.guards_of, mode)
        patches = {**self.patches, **self._own(limits).get("inductor", {})}
        worlds = sorted((name, len(ranks)) for name, ranks in self._groups().items())

        def build() -> Callable[[list[Any]], Any]:
            # The graph names operators and groups: what those are is in declarations, and in the number of ranks.
            with context(), shim.inductor_patch(patches), shim.cache_tag(f"{sources('ir')} {worlds}"):
                return shim.compile_fx_inner(gm, inputs, **self.kwargs)

        if everyone and shim.fx_cache_on():
            call = agreement.compile_once(everyone[0], graph.python_code("self").src, build, self.config.timeout)
        else:
            call = build()
        back = {new: old for old, new in symbols.items() if new.is_Symbol}
        return call, [g.xreplace(back) for g in conditions()]
