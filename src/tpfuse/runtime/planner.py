"""From a raised graph to a final one, for each range of token counts: which ranges there are, which passes run, what pays."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tpfuse import shim
from tpfuse.config import PASSES, Config
from tpfuse.formats import Scheme
from tpfuse.fusion import Policy, Worth, fuse
from tpfuse.ir.collective import world_size
from tpfuse.ir.op import Args, Op, find, registry
from tpfuse.ir.verify import verify
from tpfuse.lowering.ranges import plan_ranges
from tpfuse.lowering.select import Targets, apart, final_operators, lower, pick, schedule
from tpfuse.report import Decline, Event, FusionError, RangeResult, Report
from tpfuse.runtime import agreement
from tpfuse.runtime.detect import detect, machine
from tpfuse.runtime.symbols import (
    Bindings,
    copy_graph,
    token_expression,
)
from tpfuse.runtime.tables import follow_first, table_of
from tpfuse.target import UNBOUNDED, Range

_graphs = itertools.count()


class Planner:
    """What becomes of one raised graph for each of its ranges: fused and lowered by config and table, nothing compiled."""

    def __init__(
        self,
        gm: fx.GraphModule,
        config: Config,
        report: Report,
        fuel: Callable[[], bool],
        targets: Targets | None = None,
        follow: bool = False,
    ) -> None:
        """targets: of another machine than this, to explain.  follow: the graph will run, all ranks of its groups are here, and
        take the table of the first of them."""
        self.gm, self.config, self.report, self.fuel = gm, config, report, fuel
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

    def _ranges(self) -> list[Range]:
        if self.tokens is None:
            return [Range(1, UNBOUNDED)]
        if self.by_data:
            return [Range(1, self.config.max_tokens or UNBOUNDED)]
        if isinstance(self.tokens, int):
            count = max(1, self.tokens)  # no tokens at all are served as one is
            return [Range(count, count)] if count <= (self.config.max_tokens or count) else []
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

    def _groups(self) -> dict[str, tuple[int, ...]]:
        """The ranks of each group that the raised graph has collectives of, by the group's name."""
        called = [(n, op) for n in self.gm.graph.nodes if (op := find(n.target)) is not None and op.collective]
        names = sorted({op.bind(n.args)["group"] for n, op in called})
        return {name: agreement.group_ranks(name) for name in names}

    def plan(self, limits: Range) -> tuple[fx.Graph, RangeResult, dict[str, list[str]]]:
        """Fuse and lower a copy of the raised graph for one range → (final graph, what happened, schedule by group)."""
        graph = copy_graph(self.gm.graph)
        with contextlib.nullcontext() if self.by_data else shim.without_guards(self.placeholders):
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
