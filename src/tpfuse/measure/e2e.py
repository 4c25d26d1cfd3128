"""End to end: a stack of layers compiled several ways, which take turns at the same step of decode or prefill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tpfuse
from tpfuse import shim
from tpfuse.compiler import CompiledModel
from tpfuse.config import PASSES, Config
from tpfuse.measure.forms import ALONE, Form, all_reduced, sequence_parallel
from tpfuse.measure.linears import OWN
from tpfuse.measure.points import AGAIN
from tpfuse.measure.stack import Stack
from tpfuse.measure.timing import Timer, slowest, summary

PLAIN, ROOM = "nccl+inductor", "no_collective"
SHARDED, ASYNC = "sequence_parallel", "torch_async_tp"
FLASHINFER = "flashinfer_one_shot"
OURS, FORCED = "tpfuse", "tpfuse_sequence_parallel"
OPTIONAL = SHARDED, ASYNC, FLASHINFER, FORCED

Step = Callable[[int], Any]


@dataclass(frozen=True)
class Variant:
    """form: how the stack is written.  config: how tpfuse compiles it; None is torch.compile alone.  options: Inductor's."""

    name: str
    form: Form
    config: Config | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def compiled(self, stack: Stack, dynamic: bool | None) -> Callable[..., Tensor]:
        how: dict[str, Any] = {"fullgraph": True, "dynamic": dynamic, "options": dict(self.options)}

        def model(x: Tensor, caches: Any, prompts: int | None) -> Tensor:
            return stack(x, caches, prompts, self.form)

        # Code of its own: Dynamo bounds how often one is compiled, and names it in its messages.
        model.__code__ = model.__code__.replace(co_name=f"{self.name}_stack")
        return torch.compile(model, **how) if self.config is None else tpfuse.compile(model, self.config, **how)


class Variants:
    """How a stack of a scheme is compiled.  Where only tpfuse has the products, the plain stack is one that it compiles without
    any fusion, and there is nothing that torch could overlap."""

    def __init__(self, group: dist.ProcessGroup, scheme: str, table: str | None, max_tokens: int) -> None:
        self.group, self.own = group, scheme in OWN
        self.limits = {"max_tokens": max_tokens, "table": table}
        self.form = all_reduced(group)
        bare = Config.of({**self.limits, "passes": ()}) if self.own else None
        self.plain, self.room = Variant(PLAIN, self.form, bare), Variant(ROOM, ALONE, bare)

    def decode(self, flashinfer: bool) -> list[Variant]:
        """The plain one first.  The stack without collectives is measured too: what is between the two is the room."""
        found = [self.plain, Variant(OURS, self.form, Config.of(self.limits))]
        if flashinfer:
            found.append(Variant(FLASHINFER, self.form, Config.of({**self.limits, "kernels": "flashinfer"})))
        return [*found, self.room]

    def prefill(self) -> list[Variant]:
        """The plain one first; then the stack written with reduce-scatter and all-gather, with torch's async TP and without;
        tpfuse as its table says, and with its residual sharded whatever the table says; the stack without collectives."""
        peers = [
            Variant(SHARDED, sequence_parallel(self.group)),
            Variant(ASYNC, sequence_parallel(self.group), options=shim.async_tp(self.group)),
        ]
        return [
            self.plain,
            *([] if self.own else peers),
            Variant(OURS, self.form, Config.of(self.limits)),
            Variant(FORCED, self.form, Config.of({**self.limits, "passes": PASSES})),
            self.room,
        ]


    def serving(self) -> dict[str, tuple[str, str]]:
        """How prompts are prefilled and tokens decoded, by what is reported.  A step of decode has too few rows to share out."""
        return {
            PLAIN: (PLAIN, PLAIN), **({} if self.own else {ASYNC: (ASYNC, PLAIN)}), OURS: (OURS, OURS), ROOM: (ROOM, ROOM),
        }  # fmt: skip


class Runner:
    """One rank's variants of a stack, each compiled when it is first called: once for every number of sequences that a decode
    step has, and for each number of tokens of a prefill anew.  notes: what could not be measured, and why."""

    def __init__(self, stack: Stack, decode: list[Variant], prefill: list[Variant]) -> None:
        self.stack, self.notes = stack, list[str]()
        self.decode = {v.name: v.compiled(stack, None) for v in decode}
        self.prefill = {v.name: v.compiled(stack, False) for v in prefill}

    def decode_steps(self, sequences: int, cached: int) -> dict[str, Step]:
        """A step of each variant: the next token of each of the sequences, whose caches hold `cached` positions with it."""
        x, caches = self.rows(sequences), self.stack.caches(sequences, cached)
        if sequences > 1:  # one graph for every number of them from 2 on
            for tensor in (x, *(t for cache in caches for t in cache)):
                shim.mark_dynamic(tensor, 0)
        return {name: step_of(call, x, caches, None) for name, call in self.decode.items()}

    def prefill_steps(self, tokens: int) -> dict[str, Step]:
        """A step of each variant: the tokens of one prompt, which fill no cache."""
        x = self.rows(tokens)
        return {name: step_of(call, x, None, 1) for name, call in self.prefill.items()}

    def rows(self, tokens: int) -> Tensor:
        """The same random rows on every rank."""
        x = torch.randn(tokens, self.stack.shape.hidden, dtype=self.stack.norm.weight.dtype, device=self.stack.norm.weight.device)
        dist.broadcast(x, 0)
        return x

    def working(self, steps: dict[str, Step], share: Callable[[Any], list[Any]]) -> dict[str, Step]:
        """The steps without torch's async TP where any rank cannot compile it, which `notes` then say.  Collective."""
        reason = ""
        try:
            if ASYNC in steps:
                steps[ASYNC](0)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        reasons = list(filter(None, share(reason)))
        if reasons:
            self.prefill.pop(ASYNC, None)
            self.notes.append(f"{self.stack.scheme or 'none'}: {ASYNC} was not measured: {reasons[0]}")
        return {name: step for name, step in steps.items() if name != ASYNC or not reasons}

    def measure(self, timer: Timer, tokens: int, cached: int | None, share: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
        """Rows of a result file: microseconds a layer, the slowest rank's; `difference`: of the output, from the plain one's;
        `operators`: what tpfuse fused.

        cached: positions in the cache of each of `tokens` sequences, of which every step is a CUDA graph; None for a prefill of
        one sequence, whose kernels are launched one by one (torch's async TP is Python code), the device not waiting for a host.
        """
        steps = self.prefill_steps(tokens) if cached is None else self.decode_steps(tokens, cached)
        steps = self.working(steps, share)
        want = steps[PLAIN](0).double()
        differences = {n: float((s(0).double() - want).norm() / want.norm()) for n, s in steps.items() if n != ROOM}
        again = {PLAIN + AGAIN: steps[PLAIN], **steps}
        samples = slowest(share(timer.queued(again) if cached is None else timer.alternate(again, 1)))
        stack, layers = self.stack, len(self.stack.layers)
        rows = []
        for name, values in samples.items():
            values = [value / layers for value in values]
            row = {
                "op": "prefill" if cached is None else "decode", "tokens": tokens, **described(stack), "cached": cached or 0,
                "timed": "queued" if cached is None else "graph", "impl": name, **summary(values), "samples": values,
            }  # fmt: skip
            made = operators((self.prefill if cached is None else self.decode).get(name), tokens)
            more = {"difference": differences.get(name), "operators": made}
            rows.append({**row, **{key: value for key, value in more.items() if value is not None}})
        return rows


def described(stack: Stack) -> dict[str, Any]:
    """What a row says of the stack."""
    shape = stack.shape
    return {
        "scheme": stack.scheme, "dtype": "bfloat16", "hidden": shape.hidden, "intermediate": shape.intermediate,
        "world": stack.world, "layers": len(stack.layers),
    }  # fmt: skip


def operators(call: Any, tokens: int) -> dict[str, int] | None:
    """The sites of the graph that takes so many tokens, by fused operator and kernel; None where tpfuse did not compile it."""
    if not isinstance(call, CompiledModel):
        return None
    result = next(r for r in reversed(call.report.results) if tokens in r.range)
    return dict(Counter(f"{e.rule} by {e.attributes['kernel']}" for e in result.events if e.status == "lowered"))


def step_of(call: Callable[..., Tensor], *args: Any) -> Step:
    def run(i: int) -> Tensor:
        with torch.no_grad():
            return call(*args)

    return run


def closed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The share of the room that each implementation closes: (plain - it) / (plain - without collectives)."""
    times = {row["impl"]: row["us"] for row in rows}
    room = times[PLAIN] - times[ROOM]
    return {name: (times[PLAIN] - us) / room for name, us in times.items() if name not in (PLAIN, PLAIN + AGAIN, ROOM)}
