"""One rank's part of `tpfuse run`: load, compile prefill and decode, generate greedily, compare."""

from __future__ import annotations

import functools
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from tpfuse import shim
from tpfuse.cli import models
from tpfuse.cli.launch import Place, Progress
from tpfuse.compiler import Fuel, compile_graph, drop_opaque_inputs
from tpfuse.config import Config
from tpfuse.report import Report
from tpfuse.runtime import agreement
from tpfuse.runtime.dispatch import Dispatcher
from tpfuse.runtime.symbols import copy_graph

FUSED, UNFUSED, SINGLE = "fused", "unfused", "single process, FP32"
Step = Callable[[Tensor], Tensor]  # token ids [1, T] → logits of the last one [vocabulary]; the cache moves on


@dataclass(frozen=True)
class Job:
    """What every rank must be told the same."""

    folder: Path
    tp: int
    prompt: str
    device: str
    dtype: str
    max_new_tokens: int
    variants: tuple[str, ...]  # of FUSED, UNFUSED
    reference: bool  # run the model unsharded too
    config: Config

    def lines(self) -> list[str]:
        """The job as text that the ranks compare; folders may differ, models may not."""
        known = {k: v for k, v in asdict(self).items() if k not in ("folder", "config")}
        return [f"model {models.fingerprint(self.folder)}", *(f"{k} {v!r}" for k, v in known.items()), *self.config.lines()]


@dataclass
class Run:
    """One greedy generation.  Times in seconds; per_token: the mean of those after the first, None where there are none."""

    tokens: list[int]
    text: str
    first_token: float
    per_token: float | None


@dataclass
class Outcome:
    """What rank 0 tells: `runs` by variant; `errors` of its logits against the reference by variant; the report's JSON."""

    runs: dict[str, Run] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    compile: float = 0.0
    prompt_tokens: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


def work(place: Place, progress: Progress, job: Job) -> Outcome:
    """Everything one rank does, in order; the same on every rank but for the reference, which is rank 0's."""
    models.quiet()
    place.join(job.device, job.config.timeout)
    try:
        agreement.agree(range(place.world), job.lines(), job.config.timeout)
        return _work(place, progress, job)
    finally:
        dist.destroy_process_group()


def _work(place: Place, progress: Progress, job: Job) -> Outcome:
    device = torch.device(job.device, place.local_rank) if job.device == "cuda" else torch.device("cpu")
    progress("loading", 1, 3)
    model = models.load(job.folder, job.tp, models.DTYPES[job.dtype], device)
    progress("loading", 2, 3)
    tokenizer = models.load_tokenizer(job.folder)
    ids = tokenizer(job.prompt, return_tensors="pt")["input_ids"].to(device)
    progress("loading", 3, 3)

    out = Outcome(prompt_tokens=ids.shape[1])
    twins = Twins(model, job.config, job.variants)
    compiled = Decoder(model, twins, ids.shape[1] + job.max_new_tokens)
    out.compile = compiled.compile(ids, job.variants, progress)

    stops = _stops(model)
    total = job.max_new_tokens * (len(job.variants) + job.reference)
    for i, variant in enumerate(job.variants):
        twins.use = variant
        tokens, times = compiled.generate(ids, job.max_new_tokens, stops, _Count(progress, i * job.max_new_tokens, total))
        out.runs[variant] = _run(tokenizer, tokens, times)
    if job.reference:
        _compare(out, compiled, ids, stops, job, tokenizer, _Count(progress, total - job.max_new_tokens, total))
    progress("generating", total, total)
    out.report = json.loads(twins.report.to_json()) if FUSED in job.variants else {}
    out.summary = str(twins.report) if FUSED in job.variants else ""
    return out


def _compare(
    out: Outcome, compiled: Decoder, ids: Tensor, stops: set[int], job: Job, tokenizer: Any, count: _Count
) -> None:
    """Run the model unsharded, eager, in FP32 on rank 0; then every variant along its tokens, and compare the logits."""
    tokens: list[int] = []
    exact = None
    if dist.get_rank() == 0:
        whole = models.load(job.folder, 1, torch.float32, ids.device)
        decoder = Decoder(whole, whole, ids.shape[1] + job.max_new_tokens, alone=True)
        # On past the end of the text: as many positions to compare as were asked for.
        tokens, times = decoder.generate(ids, job.max_new_tokens, set(), count)
        ended = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        out.runs[SINGLE] = _run(tokenizer, tokens[:ended], times[:ended])
        exact = decoder.follow(ids, tokens)
        del whole, decoder
    shared = [tokens]
    dist.broadcast_object_list(shared, 0)
    for variant in job.variants:
        compiled.call.use = variant
        logits = compiled.follow(ids, shared[0])
        if exact is not None:
            out.errors[variant] = {
                "relative": ((logits - exact).norm() / exact.norm()).item(),
                "maximum": (logits - exact).abs().max().item(),
                "positions": len(exact),
            }


class Twins(nn.Module):
    """A model compiled several ways from one capture: through tpfuse ("fused") and by Inductor alone ("unfused").

    Dynamo and AOTAutograd run once a graph; `use` chooses whose code a call runs.
    """

    def __init__(self, model: nn.Module, config: Config, variants: Sequence[str]) -> None:
        super().__init__()
        self.config, self.variants, self.use = config, variants, variants[0]
        self.report, self.fuel = Report(), Fuel(config.fuel)
        self.seconds = 0.0
        self._call = torch.compile(model, backend=lambda gm, inputs: shim.compile_fx(gm, inputs, self._inner, {}))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def _inner(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        kept = drop_opaque_inputs(gm, kwargs)
        inputs = [inputs[i] for i in kept]
        steps: dict[str, Callable[[], Callable[[list[Any]], Any]]] = {
            UNFUSED: functools.partial(self._unfused, fx.GraphModule(gm, copy_graph(gm.graph)), inputs, kwargs),
            FUSED: functools.partial(self._fused, gm, inputs, kwargs),
        }
        # One rank compiles what the others load: in another order on every other rank, two of them compile side by side.
        order = self.variants if dist.get_rank() % 2 == 0 else self.variants[::-1]
        calls = {variant: steps[variant]() for variant in order}
        return shim.boxed(lambda *args: calls[self.use]([args[i] for i in kept]))

    def _unfused(self, gm: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> Callable[[list[Any]], Any]:
        text = f"{UNFUSED}\n{gm.graph.python_code('self').src}"
        compile = functools.partial(shim.compile_fx_inner, gm, inputs, **kwargs)
        return agreement.compile_once(range(dist.get_world_size()), text, compile, self.config.timeout)

    def _fused(self, gm: fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> Callable[[list[Any]], Any]:
        call = compile_graph(
            gm, inputs, config=self.config, patches={}, report=self.report, fuel=self.fuel, **kwargs
        )
        if isinstance(call, Dispatcher):
            call.warm_as_traced()
        return call


class Decoder:
    """A model with a static KV cache for one sequence of at most `length` tokens.

    model: for its configuration and its cache.  call: what runs it, compiled or not.  alone: no other rank takes part.
    """

    def __init__(self, model: Any, call: Any, length: int, alone: bool = False) -> None:
        from transformers import StaticCache

        self.call, self.alone = call, alone
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        # The cache takes its shapes from the first call; uncompiled, so that a graph never holds their making.
        with torch.no_grad():
            model(input_ids=torch.ones(1, 1, dtype=torch.long, device=model.device), past_key_values=self.cache)

    def step(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.call(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits[0, -1]

    def compile(self, ids: Tensor, variants: Sequence[str], progress: Progress) -> float:
        """Run every graph of every variant once.  → seconds"""
        start = time.perf_counter()
        calls = [(v, name) for v in variants for name in ("prefill", "decode")]
        if ids.shape[1] > 1:  # one token is a graph of its own
            shim.mark_dynamic(ids, 1)
        # Tracing makes millions of objects and hardly a cycle.
        gc.collect()
        gc.disable()
        try:
            for i, (variant, name) in enumerate(calls):
                progress(f"compiling {name}, {variant}", i, len(calls))
                self.call.use = variant
                if name == "prefill":
                    self.cache.reset()
                    self.step(ids)
                else:
                    self.step(torch.full((1, 1), int(ids[0, 0]), device=ids.device))  # a slice would keep its stride
        finally:
            gc.enable()
        gc.freeze()  # what compiling made stays; no collection walks it while tokens are timed
        progress("compiling", len(calls), len(calls))
        return time.perf_counter() - start

    def generate(self, ids: Tensor, count: int, stops: set[int], done: Callable[[int], None]) -> tuple[list[int], list[float]]:
        """Greedy tokens, at most `count`, up to one of `stops`; and the seconds that each took."""
        self.cache.reset()
        tokens: list[int] = []
        times: list[float] = []
        while len(tokens) < count and not (tokens and tokens[-1] in stops):
            start = time.perf_counter()
            token = self.step(ids).argmax().reshape(1, 1)
            if not self.alone:  # ranks must never part, whatever their last bits
                dist.broadcast(token, 0)
            tokens.append(int(token))
            times.append(time.perf_counter() - start)
            ids = token
            done(len(tokens))
        return tokens, times

    def follow(self, ids: Tensor, tokens: Sequence[int]) -> Tensor:
        """The logits at every position when these tokens are what was generated, [tokens, vocabulary], FP32 on the CPU."""
        self.cache.reset()
        rows = [self.step(ids)]
        rows += [self.step(torch.tensor([[t]], device=ids.device)) for t in tokens[:-1]]
        return torch.stack(rows).float().cpu()


class _Count:
    """Tokens done, of all runs."""

    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self.progress, self.before, self.total = progress, before, total

    def __call__(self, done: int) -> None:
        self.progress("generating", self.before + done, self.total)


def _run(tokenizer: Any, tokens: list[int], times: list[float]) -> Run:
    rest = times[1:]
    return Run(tokens, tokenizer.decode(tokens), times[0], sum(rest) / len(rest) if rest else None)


def _stops(model: Any) -> set[int]:
    """Tokens that end a text."""
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
