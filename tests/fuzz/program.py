"""Generated models as data: steps, each a line of Python over earlier values, and how the model is called."""

from __future__ import annotations

import functools
import random
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.vocabulary import E4M3, words
from tpfuse.config import PASSES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARGUMENTS = ("x", "y", "r")  # other on each rank: x, y; the same: r


class Invalid(Exception):
    """No model: it cannot be run at all."""


@dataclass(frozen=True)
class Step:
    """text: an expression, with {0}, {1}, … for the values of `args`, which are numbers of earlier steps."""

    text: str
    args: tuple[int, ...] = ()

    def code(self, names: dict[int, str]) -> str:
        return self.text.format(*(names[arg] for arg in self.args))


@dataclass(frozen=True)
class Settings:
    """How a model is compiled and called.

    front: "dynamo", "inductor" (compiled whole, not interpreted) or "traced": without Dynamo and AOTAutograd, many times faster.
    tokens: the counts that it is called with, one after another.  dynamic: "all" sizes, "tokens" or "static".  loose: parameters
    are arguments.  shared: y is x, or a view of it, for the caller.  scale: of activations.  strided: how
    arguments lie in memory.  config: of `tpfuse.compile`.
    """

    world: int
    front: str = "dynamo"
    width: int = 64
    low: str = "bf16"
    tokens: tuple[int, ...] = (12,)
    dynamic: str = "tokens"
    loose: bool = False
    shared: str = ""
    scale: float = 1.0
    strided: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def draw_settings(rng: random.Random, world: int, front: str) -> Settings:
    config: dict[str, Any] = {}
    kind = rng.random()
    if kind < 0.6:
        config["passes"] = PASSES
    elif kind < 0.85:
        config["passes"] = tuple(p for p in PASSES if rng.random() < 0.6)
    first, second = rng.choice((24, 12, 8, 18)), rng.choice((1, 2, 5, 7, 6, 13, 30, 31))
    if rng.random() < 0.25:
        config["ranges"] = (rng.choice((2, 6, 10)),)
    if rng.random() < 0.1:
        config["fuel"] = rng.randrange(8)
    if rng.random() < 0.05:
        config["sizes"] = (first,)
    if rng.random() < 0.05:
        config["compile_all"] = True
    drawn = "dynamo" if rng.random() < 0.12 else "traced"
    loose = (front or drawn) == "traced" or rng.random() < 0.15
    return Settings(
        world=world, front=front or drawn, width=rng.choice((64, 128)), low=rng.choice(("bf16", "bf16", "fp16", "fp32", "fp32")),
        tokens=(first, second) if rng.random() < 0.7 else (second,),
        dynamic=rng.choice(("all", "tokens", "tokens", "static")), loose=loose,
        shared=rng.choice(("same", "view")) if rng.random() < 0.04 else "", scale=rng.choice((3e-3, 1.0, 1.0, 10.0)),
        strided=rng.choice(("columns", "wider", "expanded")) if rng.random() < 0.1 else "", config=config,
    )  # fmt: skip


@dataclass(frozen=True)
class Program:
    seed: int
    settings: Settings
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    @functools.cached_property
    def parameters(self) -> list[str]:
        return sorted(set(re.findall(r"\bp\.(\w+)", " ".join(step.text for step in self.steps))))

    def source(self) -> str:
        names = {i: f"v{i}" for i in range(len(self.steps))}
        body = [f"    {names[i]} = {step.code(names)}" for i, step in enumerate(self.steps)]
        results = ", ".join(names[i] for i in self.outputs)
        first = [] if self.settings.loose else ["p"]
        last = self.parameters if self.settings.loose else []
        text = "\n".join([f"def forward({', '.join([*first, *ARGUMENTS, *last])}):", *body, f"    return ({results},)"])
        return text.replace("p.", "") if self.settings.loose else text

    def bind(self, low: torch.dtype, f32: torch.dtype, groups: dict[str, str], sizes: dict[str, int], rank: int) -> Any:
        """A callable of the arguments: a module, or with loose parameters a function of these too (`loose_arguments`)."""
        scope: dict[str, Any] = words(low, f32, groups, sizes)
        exec(compile(self.source(), f"<seed {self.seed}>", "exec"), scope)
        if self.settings.loose:
            return scope["forward"]
        model = type("Model", (nn.Module,), {"forward": scope["forward"]})()
        for name in self.parameters:
            model.register_buffer(name, parameter(name, DTYPES[self.settings.low], low, f32, rank))
        return model

    def loose_arguments(self, low: torch.dtype, f32: torch.dtype, rank: int) -> list[Tensor]:
        names = self.parameters if self.settings.loose else []
        return [parameter(name, DTYPES[self.settings.low], low, f32, rank) for name in names]

    def arguments(self, tokens: int, low: torch.dtype, rank: int, draw: int = 0) -> list[Tensor]:
        """x, y and r of `tokens` rows, in FP64 the values that they have in the model's dtype."""
        made = []
        for number, name in enumerate(ARGUMENTS):
            seed = 7919 * draw + 101 * tokens + 13 * number + (0 if name == "r" else 1000 + rank)
            value = torch.randn(tokens, self.settings.width, generator=torch.Generator().manual_seed(seed))
            made.append(_strided((value * self.settings.scale).to(DTYPES[self.settings.low]).to(low), self.settings.strided))
        if self.settings.shared:
            made[1] = made[0] if self.settings.shared == "same" else made[0].view_as(made[0])
        return made


def _strided(value: Tensor, how: str) -> Tensor:
    match how:
        case "columns":
            return value.t().contiguous().t()
        case "wider":
            return torch.cat([value, value], 1)[:, : value.shape[1]]
        case "expanded":
            return value[:1].expand(value.shape)
    return value


def parameter(name: str, model: torch.dtype, low: torch.dtype, f32: torch.dtype, rank: int) -> Tensor:
    """A parameter from its name: kind_sizes_number.  Other on each rank: m, l, o, q and their like."""
    kind, *numbers = name.split("_")
    *sizes, _ = map(int, numbers)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (rank if kind in ("m", "l", "o", "q", "n4") else 0))
    normal = functools.partial(torch.randn, generator=generator)
    uniform = functools.partial(torch.rand, generator=generator)
    match kind:
        case "m" | "l":  # [in, out], [out, in]
            return (normal(sizes) * sizes[kind == "l"] ** -0.5).to(model).to(low)
        case "w":
            return (uniform(sizes) * 2.75 + 0.25).to(model).to(low)
        case "wf":
            return (uniform(sizes) * 2.75 + 0.25).to(f32)
        case "g":
            return (uniform(sizes) - 0.5).to(model).to(low)
        case "b" | "o":  # a bias
            return (normal(sizes) * 0.3).to(model).to(low)
        case "s":  # a static scale
            return (uniform(()) * 0.02 + 0.005).to(f32)
        case "f":  # rotary frequencies
            return 100.0 ** (-torch.arange(sizes[0] // 2) * 2 / sizes[0]).repeat(2).to(f32)
        case "q":  # FP8 [out, in]
            return (normal(sizes) * 40).clamp(-448, 448).to(E4M3)
        case "qs":
            return (uniform(()) * 1e-2 + 1e-3).to(f32)
        case "qr":  # scales of rows or groups, whatever shape
            return (uniform(sizes) * 1e-2 + 1e-3).to(f32)
        case "n4":  # FP4 [out, in / 2]
            return torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8)
        case "n4s":
            return (uniform(sizes) * 2 + 0.25).to(E4M3)
    raise ValueError(name)
