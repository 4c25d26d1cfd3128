"""One graph, several ranges: each compiled when its first token count arrives, agreed on by the ranks, then dispatched to."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tpfuse import shim
from tpfuse.config import PASSES, Config
from tpfuse.formats import Scheme
from tpfuse.fusion import Policy, Worth, fuse
from tpfuse.ir import check
from tpfuse.ir.collective import world_size
from tpfuse.ir.op import Args, Op, find, load, registry
from tpfuse.ir.verify import verify
from tpfuse.lowering.ranges import plan_ranges
from tpfuse.lowering.select import Targets, apart, final_operators, lower, needs, pick, schedule
from tpfuse.report import Decline, Event, FusionError, RangeResult, Report
from tpfuse.runtime import agreement
from tpfuse.runtime.detect import detect, machine
from tpfuse.runtime.key import sources
from tpfuse.runtime.symbols import (
    Bindings,
    callable_with,
    copy_graph,
    fresh_inputs,
    renew_bodies,
    renew_strides,
    resized,
    token_expression,
)
from tpfuse.runtime.tables import follow_first, table_of
from tpfuse.target import UNBOUNDED, Range

log = logging.getLogger("tpfuse")
_graphs = itertools.count()
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


class Dispatcher:
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
        targets: Targets | None = None,
        follow: bool = False,
    ) -> None:
        """targets: of another machine than this, to explain.  follow: the graph will run, all ranks of its groups are here, and
        take the table of the first of them."""
        self.fuel = fuel
        self.gm, self.kwargs, self.config, self.patches, self.report = gm, kwargs, config, patches, report
        self.number = next(_graphs)
        self.placeholders = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
        device = next((v.device.type for v in self.placeholders if isinstance(v, torch.Tensor)), "cpu")
        self.targets = targets or functools.partial(detect, device)
        self.bindings = Bindings.of(self.placeholders)
        self.tokens = token_expression(gm.graph, self.bindings.readers)
        # Sizes that the data decides (`torch.nonzero`, `item`) are symbols of torch's own, made while it traced: nobody can renew
        # them.  Such a graph has one range and is compiled at once, so that what Inductor asks of sizes becomes Dynamo's guards.
        self.by_data = any("unbacked_bindings" in node.meta for node in gm.graph.nodes)
        self.table, events = table_of(config, machine(device), self.targets(None).versions)
        report.shared += events
        if follow and (config.table or device == "cuda"):
            self.table = follow_first(self.table, {r for r in self._groups().values() if len(r) > 1}, config.timeout)
        self.ranges = self._ranges()
        self.compiled: dict[Range, list[Compiled]] = {r: [] for r in self.ranges}
        if follow:
            _dispatchers.add(self)

    def _ranges(self) -> list[Range]:
        if self.tokens is None:
            return [Range(1, UNBOUNDED)]
        if self.by_data:
            return [Range(1, self.config.max_tokens or UNBOUNDED)]
        if isinstance(self.tokens, int):
            count = max(1, self.tokens)  # no tokens at all are served as one is
            return [Range(count, count)]
        summing = [registry[name] for name in ("all_reduce", "reduce_scatter")]
        sums = [(n, op) for n in self.gm.graph.nodes if (op := find(n.target)) in summing]
        values = [(n.meta["val"], world_size(op.bind(n.args)["group"])) for n, op in sums]
        quantize = registry["quantize"]
        schemes = {
            Scheme.parse(quantize.bind(n.args, n.kwargs)["scheme"]).name
            for n in self.gm.graph.nodes if n.target is quantize.default
        }  # fmt: skip
        sites = [(v.dtype, world, int(v.shape[-1])) for v, world in values]
        thresholds = self.table.thresholds(sites, {"", *schemes}) if self.config.ranges is None else ()
        return plan_ranges(tuple(self.config.ranges or ()), self.config.sizes, self.config.max_tokens, thresholds)

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
        return compiled

    def _checked(self, call: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """A call that reports the errors of the sites that it checks."""

        def run(args: list[Any]) -> Any:
            with check.told_to(self.report.check):
                return call(args)

        return run

    def _groups(self) -> dict[str, tuple[int, ...]]:
        """The ranks of each group that the raised graph has collectives of, by the group's name."""
        called = [(n, op) for n in self.gm.graph.nodes if (op := find(n.target)) is not None and op.collective]
        names = sorted({op.bind(n.args)["group"] for n, op in called})
        return {name: agreement.group_ranks(name) for name in names}

    def _most_tokens(self, limits: Range, values: dict[Any, int]) -> int:
        """Tokens that a workspace is made for: the range's end, or today's count where it has none (calls with more go in
        several launches), or the largest size where nothing tells a count."""
        if limits.end < UNBOUNDED:
            return limits.end
        today = max(values.values(), default=1) if self.tokens is None else int(self.tokens.xreplace(values))
        return self.config.max_tokens or today

    def plan(self, limits: Range) -> tuple[fx.Graph, RangeResult, dict[str, list[str]]]:
        """Fuse and lower a copy of the raised graph for one range → (final graph, what happened, schedule by group)."""
        graph = copy_graph(self.gm.graph)
        result = self.rewrite(graph, limits)
        return graph, result, schedule(graph, agreement.group_ranks)

    def rewrite(self, graph: fx.Graph, limits: Range) -> RangeResult:
        """Fuse and lower a raised graph in place."""
        self._dump(graph, limits, "1-raised")
        passes = [p for p in PASSES if self._enabled(p, limits)]
        events = fuse(graph, passes, self.fuel, self._policy(limits), self._worth(limits))
        verify(graph, "fuse")
        self._dump(graph, limits, "2-fused")
        events += lower(graph, self.targets, self.config.kernels, self.config.verify, self.table, limits)
        graph.lint()
        self._dump(graph, limits, "3-lowered")
        events = [replace(e, range=limits) for e in events]
        result = RangeResult(self.number, limits, final_operators(graph), events)
        if self.config.strict and (missing := _missing(events)):
            self.report.add(result)
            raise FusionError("strict: expected fusions did not happen\n" + "\n".join(f"  {e}" for e in missing))
        return result

    def _enabled(self, name: str, limits: Range) -> bool:
        own = self._own(limits)
        return name in own["passes"] if "passes" in own else self.config.enabled(name)

    def _own(self, limits: Range) -> Mapping[str, Any]:
        """What `Config(ranges={end: …})` says of the range that `limits` lie in."""
        ranges = self.config.ranges if isinstance(self.config.ranges, Mapping) else {}
        return next((ranges[end] for end in sorted(ranges) if limits.end <= end), {})

    def _policy(self, limits: Range) -> Policy:
        """Sequence parallelism where the table says that it pays in most of the range, and where the user asks for it by name."""
        if self._asked("sequence_parallel", limits):
            return lambda chain: None
        return lambda chain: self.table.refuses(
            "sequence_parallel", chain.dtype, chain.world, limits, chain.hidden, chain.scheme
        )

    def _worth(self, limits: Range) -> Worth:
        """Products are fused where a kernel would be picked for the whole range and layers were not measured to be slower so,
        and where the user asks for it by name."""

        def worth(op: Op, args: Args) -> Decline | None:
            target = self.targets(args["group"])
            found = pick(op, args, target, self.config.kernels, self.table, limits)
            if isinstance(found, Decline):
                return found
            return apart(op, args, target.world, self.table, limits) if self.config.kernels == "auto" else None

        return (lambda op, args: None) if self._asked("async_tp", limits) else worth

    def _asked(self, name: str, limits: Range) -> bool:
        """Whether the user names a pass, for this range or for all."""
        return name in self._own(limits).get("passes", self.config.passes or ())

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

    def _dump(self, graph: fx.Graph, limits: Range, stage: str) -> None:
        if self.config.dump:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            folder = Path(self.config.dump) / f"rank{rank}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"graph{self.number}-{limits.start}-{limits.end}-{stage}.txt").write_text(_text(graph), encoding="utf-8")


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self", verbose=True).src


def _missing(events: list[Event]) -> list[Event]:
    """Sites that `strict` expects to be fused and that are not; what was measured to be slower fused is not expected."""

    def missing(event: Event) -> bool:
        if event.status == "unfused":
            return event.reason is None or event.reason.code != "threshold"
        return event.status == "declined" and event.attributes.get("operator") == "all_reduce"

    return [event for event in events if missing(event)]
