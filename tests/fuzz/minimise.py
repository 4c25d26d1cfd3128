"""A failing model made smaller, as long as it fails the same way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from tests.fuzz.generate import try_out
from tests.fuzz.oracle import Verdict
from tests.fuzz.program import Invalid, Program, Step
from tpfuse.testing import RankPool

Judged = Callable[[RankPool, list[Program]], list[Verdict]]
SECONDS = 120  # for one model
AT_ONCE = 4


def minimised(pool: RankPool, program: Program, verdict: Verdict, judged: Judged) -> Program:
    deadline = time.monotonic() + SECONDS
    kind = _kind(verdict)
    smaller = True
    while smaller and time.monotonic() < deadline:
        smaller = False
        candidates = [c for c in _smaller(program) if _runs(c)]
        for i in range(0, len(candidates), AT_ONCE):
            if time.monotonic() > deadline:
                break
            some = candidates[i : i + AT_ONCE]
            better = next((c for c, v in zip(some, judged(pool, some), strict=True) if _kind(v) == kind), None)
            if better is not None:
                program, smaller = better, True
                break
    return program


def _kind(verdict: Verdict) -> str:
    """The problem's first word; of a crash, its exception's too."""
    problem = verdict.problem
    if not problem.startswith("crash"):
        return problem.partition(":")[0]
    raised = re.findall(r"^([\w.]+(?:Error|Exception|Unsupported)\b.{0,40})", problem, re.MULTILINE)
    return "crash " + re.sub(r"\d+", "N", raised[-1]) if raised else "crash"


def _runs(program: Program) -> bool:
    try:
        return all(try_out(program, tokens) is not None for tokens in program.settings.tokens)
    except Invalid:
        return False


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with a result, a setting or a step less, the boldest first."""
    if len(program.outputs) > 1:
        for i in range(len(program.outputs)):
            yield _pruned(replace(program, outputs=(program.outputs[i],)))
        for i in range(len(program.outputs)):
            yield _pruned(replace(program, outputs=(*program.outputs[:i], *program.outputs[i + 1 :])))
    values = try_out(program, program.settings.tokens[-1])
    for i in range(len(program.steps) - 1, 2, -1):
        for other in dict.fromkeys([*program.steps[i].args, 2, 0]):
            if other != i and isinstance(values[other], Tensor) and isinstance(values[i], Tensor):
                a, b = values[other], values[i]
                if (a.shape, a.dtype) == (b.shape, b.dtype):
                    yield _pruned(_without(program, i, other))
    yield from (replace(program, settings=replace(program.settings, **change)) for change in _settings(program))
    yield _pruned(program)


def _settings(program: Program) -> Iterator[dict]:
    s = program.settings
    for name in s.config:
        if name != "passes":
            yield {"config": {k: v for k, v in s.config.items() if k != name}}
    for i in range(len(s.tokens) if len(s.tokens) > 1 else 0):
        yield {"tokens": (s.tokens[i],)}
    if len(s.config.get("passes", ())) > 1:
        for name in s.config["passes"]:
            yield {"config": {**s.config, "passes": tuple(p for p in s.config["passes"] if p != name)}}
    if s.strided:
        yield {"strided": ""}
    if s.shared:
        yield {"shared": ""}
    if s.loose and s.front != "traced":
        yield {"loose": False}
    if s.dynamic != "static":
        yield {"dynamic": "static"}
    if s.low != "fp32":
        yield {"low": "fp32"}


def _without(program: Program, step: int, other: int) -> Program:
    """`other` wherever the step's value stood."""
    steps = [Step(s.text, tuple(other if a == step else a for a in s.args)) for s in program.steps]
    return replace(program, steps=tuple(steps), outputs=tuple(dict.fromkeys(other if o == step else o for o in program.outputs)))


def _pruned(program: Program) -> Program:
    """Without steps that no result needs, but for the arguments and for what writes to a value that one does."""
    needed = {0, 1, 2, *program.outputs}
    for i in range(len(program.steps) - 1, -1, -1):
        writes = re.search(r"_\(", program.steps[i].text) and "{0}." in program.steps[i].text
        if i in needed or (writes and needed & set(program.steps[i].args)):
            needed |= {i, *program.steps[i].args}
    number = {old: new for new, old in enumerate(sorted(needed))}
    steps = tuple(Step(program.steps[i].text, tuple(number[a] for a in program.steps[i].args)) for i in sorted(needed))
    return replace(program, steps=steps, outputs=tuple(number[o] for o in program.outputs))
