"""What a fused model is held to, run on every rank: the values of the model in FP64, as near as the unfused model comes to them;
its shapes, strides, dtypes, aliases and writes; and no exception.
"""

from __future__ import annotations

import contextlib
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_module_simplified
from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext

import tpfuse
from tests.fuzz.generate import sizes_of
from tests.fuzz.program import ARGUMENTS, DTYPES, Program
from tpfuse import shim
from tpfuse.compiler import Fuel, compile_graph
from tpfuse.config import Config
from tpfuse.report import Report
from tpfuse.testing import interpreted

Waiting = collectives.AsyncCollectiveTensor  # what collectives return outside of graphs
MARGIN = 1.25
# Of a result's norm: what the order of a sum or one more value rounded to the other side may change.
FLOOR = {"bf16": 2e-3, "fp16": 4e-4, "fp32": 4e-6}
QUANTISED_FLOOR = 3e-3  # a rounding to FP8 or FP4 that falls to the other side is a step of a sixteenth and more
DRAWS, ELEMENTS = 6, 500  # draws of inputs and elements of a result, at least, before an error is no accident


@dataclass
class Verdict:
    """problem: what is wrong, "" for nothing; its first word is its kind.  ops: the tpfuse operators in its final graphs.
    fired: events of rewriting.  bits: of each result, a checksum before and after fusing, for ranks to compare.
    own: torch fails with the model as well, what with."""

    seed: int
    problem: str = ""
    ops: list[str] = field(default_factory=list)
    fired: int = 0
    seconds: float = 0.0
    bits: list[tuple[int, int]] = field(default_factory=list)
    own: str = ""


def judge(rank: int, world: int, programs: Sequence[Program], progress: str = "") -> list[Verdict]:
    """A verdict on each program.  progress: a file that is told which program is begun."""
    groups = _groups(world)
    verdicts = []
    for program in programs:
        if progress:
            Path(f"{progress}.{rank}").write_text(str(program.seed))
        start = time.monotonic()
        dist.barrier()
        try:
            verdict = Judge(program, groups, rank).verdict()
        except Exception:
            verdict = Verdict(program.seed, f"harness: {traceback.format_exc()[-3000:]}")
        verdict.seconds = time.monotonic() - start
        verdicts.append(verdict)
    return verdicts


_made: dict[str, str] = {}


def _groups(world: int) -> dict[str, str]:
    if not _made:
        every = range(world)
        own = [dist.new_group([rank]) for rank in every]
        _made["world"] = dist.group.WORLD.group_name
        _made["other"] = dist.new_group(list(every)).group_name
        _made["own"] = own[dist.get_rank()].group_name
    return _made


@dataclass
class Called:
    """A call's results, and its arguments after it."""

    results: list[Tensor]
    arguments: list[Tensor]

    def form(self) -> list[Any]:
        """Shapes, strides, dtypes; which results share memory, with which and with what arguments."""
        tensors = [*self.results, *self.arguments]
        first: dict[int, int] = {}
        for i, t in enumerate(reversed(tensors)):
            first[t.untyped_storage().data_ptr()] = len(tensors) - 1 - i
        where = [first[t.untyped_storage().data_ptr()] if t.numel() else -1 for t in self.results]
        return [[(tuple(t.shape), _strides(t), t.dtype) for t in self.results], where]


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides, of dimensions that have a second element."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1) if t.numel() else ()


class Judge:
    def __init__(self, program: Program, groups: dict[str, str], rank: int) -> None:
        self.program, self.groups, self.rank, self.settings = program, groups, rank, program.settings
        self.sizes = sizes_of(self.settings.world)
        self.low = DTYPES[self.settings.low]

    def verdict(self) -> Verdict:
        verdict = Verdict(self.program.seed)
        fused = self.compiled(self.settings.config)
        for tokens in self.settings.tokens:
            problem = self.judged(fused, tokens, verdict)
            if problem:
                verdict.problem = f"{problem} [{tokens} tokens]"
                break
        report = fused.report  # type: ignore[attr-defined]
        verdict.ops = sorted({op.split(".")[0] for result in report.results for op in result.ops})
        verdict.fired = len(report.fired())
        return verdict

    def judged(self, fused: Callable[..., Any], tokens: int, verdict: Verdict) -> str:
        """What is wrong.  All ranks take the same turns, so that none waits for another in vain."""
        unfused = self.call(self.bound(), tokens)
        problem = ""
        try:
            ours = self.call(fused, tokens)
            if ours.form() != unfused.form():
                problem = f"form: {ours.form()} instead of {unfused.form()}"
        except Exception:
            ours, problem = unfused, f"crash: {traceback.format_exc()[-2500:]}"
        if anywhere(bool(problem)):
            try:
                sound = self.call(self.compiled(), tokens).form() == unfused.form()
                verdict.own = "" if sound or problem.startswith("crash") else problem
            except Exception as error:
                verdict.own = repr(error)[:300]
            return "" if verdict.own else problem
        verdict.bits += [(_bits(a), _bits(b)) for a, b in zip(unfused.results, ours.results, strict=True)]
        exact = self.call(self.bound(exact=True), tokens, exact=True)
        if anywhere(any(map(self.too_large, self.errors(exact, ours, unfused)))):
            return self.values(fused, tokens)
        return ""

    def values(self, fused: Callable[..., Any], tokens: int) -> str:
        """Errors of several draws of inputs together, beside the unfused model as it is and compiled."""
        plain, sums = self.compiled(), None
        fewest = min(t.numel() for t in self.call(self.bound(), tokens).results)
        for draw in range(max(DRAWS, min(ELEMENTS // max(fewest, 1), 10 * DRAWS))):
            exact = self.call(self.bound(exact=True), tokens, draw, exact=True)
            called = [self.call(model, tokens, draw) for model in (fused, self.bound(), plain)]
            found = self.errors(exact, *called)
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        wrong = [f"result {i}: error {(s[2] / s[1]).sqrt():.3g}, unfused {(s[3:].max() / s[1]).sqrt():.3g}"
                 for i, s in enumerate(sums or []) if self.too_large(s)]  # fmt: skip
        return f"value: {'; '.join(wrong)} of {len(exact.results)} results" if wrong else ""

    def errors(self, exact: Called, *called: Called) -> list[Tensor]:
        """Of each result, and of each argument after the call: see `_errors`."""
        columns = zip(*([*c.results, *c.arguments] for c in (exact, *called)), strict=True)
        return [_errors(*column) for column in columns]

    def too_large(self, s: Tensor) -> bool:
        quantised = any("E4M3" in step.text or word in step.text for step in self.program.steps
                        for word in ("static", "token", "group(", "torchao", "nvfp4"))  # fmt: skip
        floor = FLOOR[self.settings.low] + quantised * QUANTISED_FLOOR
        elements, norm, mine, *others = s.sqrt().tolist()
        floor *= 1 + 8 / max(elements, 1)  # few show single roundings
        return not mine <= MARGIN * max(others) + floor * norm + 1e-9

    # the model in its forms

    def bound(self, exact: bool = False) -> Callable[..., Any]:
        low, f32 = (torch.float64, torch.float64) if exact else (self.low, torch.float32)
        return self.program.bind(low, f32, self.groups, self.sizes, self.rank)

    def compiled(self, config: dict[str, Any] | None = None) -> Callable[..., Any]:
        """The model compiled; by tpfuse, or without `config` by torch alone."""
        torch._dynamo.reset()
        if self.settings.front == "traced":
            return Traced(self.bound(), config, self.settings.dynamic)
        dynamic = {"all": True, "tokens": None, "static": False}[self.settings.dynamic]
        if config is not None:
            return tpfuse.compile(self.bound(), dict(config), dynamic=dynamic, fullgraph=True)

        def backend(gm: fx.GraphModule, inputs: Any) -> Any:
            inner = shim.compile_fx_inner  # interpreted, inside `interpreted()`
            return shim.compile_fx(gm, inputs, lambda gm, inputs, **kwargs: inner(gm, inputs, **kwargs), {})

        return torch.compile(self.bound(), backend=backend, dynamic=dynamic, fullgraph=True)

    def call(self, model: Callable[..., Any], tokens: int, draw: int = 0, exact: bool = False) -> Called:
        low, f32 = (torch.float64, torch.float64) if exact else (self.low, torch.float32)
        arguments = self.program.arguments(tokens, low, self.rank, draw)
        if self.settings.dynamic == "tokens" and tokens > 1:
            for argument in arguments:
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        loose = self.program.loose_arguments(low, f32, self.rank)
        how = contextlib.nullcontext if self.settings.front == "inductor" else interpreted
        with torch.no_grad(), warnings.catch_warnings(), how():
            warnings.simplefilter("ignore")
            results = model(*arguments, *loose)
        return Called([collectives.wait_tensor(r) if isinstance(r, Waiting) else r for r in results], [*arguments, *loose])


class Traced:
    """A model that AOTAutograd traces as it is, without Dynamo, anew for arguments that no graph before serves.

    config: for tpfuse; None for torch alone.  dynamic: see `Settings`.
    """

    def __init__(self, model: Callable[..., Any], config: dict[str, Any] | None, dynamic: str) -> None:
        self.model, self.dynamic = model, dynamic
        self.config = None if config is None else Config.of(config)
        self.report = Report()
        self.graphs: list[tuple[Callable[..., Any], Callable[[Sequence[Tensor]], bool]]] = []

    def __call__(self, *args: Tensor) -> list[Tensor]:
        call = next((call for call, serves in self.graphs if serves(args)), None)
        if call is None:
            call, serves = self.traced(args)
            self.graphs.append((call, serves))
        return list(call(*args))

    def traced(self, args: Sequence[Tensor]) -> tuple[Callable[..., Any], Callable[[Sequence[Tensor]], bool]]:
        mode = shim.FakeTensorMode(shape_env=shim.ShapeEnv())
        fakes = [mode.from_tensor(arg, symbolic_context=self._sizes(i, arg), source=ConstantSource(f"a{i}"))
                 for i, arg in enumerate(args)]  # fmt: skip
        sizes = [[shim.expression(n) for n in fake.shape] for fake in fakes]  # before guards make numbers of some

        def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            if self.config is None:
                return shim.compile_fx_inner(gm, inputs)
            fuel = Fuel(self.config.fuel)
            return compile_graph(
                gm, inputs, config=self.config, patches={}, report=self.report, fuel=fuel, is_inference=True
            )

        module = nn.Module()
        module.forward = self.model
        with shim.tracing_under(mode), torch._functorch.config.patch(enable_autograd_cache=False):
            call = aot_module_simplified(
                module, fakes, fw_compiler=compiler, inference_compiler=compiler, decompositions=shim.decompositions(),
                keep_inference_input_mutations=True,
            )  # fmt: skip
        assert mode.shape_env is not None
        guards, ranges = shim.guards_of(mode), mode.shape_env.var_to_range

        def serves(others: Sequence[Tensor]) -> bool:
            pairs = [pair for size, other in zip(sizes, others, strict=True) for pair in zip(size, other.shape, strict=True)]
            known = {n: sympy.Integer(m) for n, m in pairs if not isinstance(n, int)}
            inside = all(m in ranges[n] if n in known else m == n for n, m in pairs)
            return inside and all(bool(guard.xreplace(known)) for guard in guards)

        return call, serves

    def _sizes(self, i: int, arg: Tensor) -> StatelessSymbolicContext:
        """Dynamic: every size but 1, or the arguments' rows; none of strided ones: Dynamo alone tells strides."""
        kinds = [shim.DimDynamic.STATIC] * arg.dim()
        usual = arg.stride() == torch.empty(arg.shape, device="meta").stride()
        for d, size in enumerate(arg.shape):
            rows = self.dynamic == "tokens" and d == 0 and i < len(ARGUMENTS)
            if size > 1 and usual and (rows or self.dynamic == "all"):
                kinds[d] = shim.DimDynamic.DYNAMIC
        return StatelessSymbolicContext(dynamic_sizes=kinds)


def anywhere(flag: bool) -> bool:
    """Whether it holds on any rank."""
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def _errors(true: Tensor, *values: Tensor) -> Tensor:
    """The number of elements, the squares of ‖true‖ and of each ‖value − true‖; what is infinite unfused does not count."""
    true, *values = (t.double().reshape(-1) for t in (true, *values))
    counted = torch.isfinite(true)
    for value in values[1:]:
        counted &= torch.isfinite(value)
    differences = [torch.where(counted, value - true, 0.0) for value in values]
    squares = [t.square().sum() for t in (torch.where(counted, true, 0.0), *differences)]
    return torch.stack([counted.sum().double(), *squares])


def _bits(value: Tensor) -> int:
    return zlib.crc32(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) if value.numel() else 0


def gathered(by_rank: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """The ranks' verdicts on each program as one, with what they see only together: results that are the same on every rank must
    be so fused, too."""
    verdicts = []
    for ranks in zip(*by_rank, strict=True):
        verdict = next((v for v in ranks if v.problem), ranks[0])
        if not verdict.problem:
            for i, bits in enumerate(zip(*(v.bits for v in ranks), strict=True)):
                before, after = (len(set(column)) for column in zip(*bits, strict=True))
                if before == 1 and after > 1:
                    verdict.problem = f"ranks: differ in result {i}"
        verdicts.append(verdict)
    return verdicts


def tally(verdicts: Sequence[Verdict]) -> Counter[str]:
    return Counter(op for verdict in verdicts for op in verdict.ops)
