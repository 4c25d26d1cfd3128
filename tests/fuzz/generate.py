"""Random models from a seed: layers as models have them, their spellings, order and surroundings drawn."""

from __future__ import annotations

import random
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.program import ARGUMENTS, DTYPES, Invalid, Program, Settings, Step, draw_settings, parameter
from tests.fuzz.vocabulary import E4M3, words

TRACED = 24  # tokens that a model is tried out with while it is made
HEAD = 16


def generate(seed: int, world: int, front: str = "") -> Program:
    """The model of a seed: as many attempts as it takes until one can be run at all.  front: see `Settings`; "" draws one."""
    for attempt in range(50):
        rng = random.Random(f"{seed} {world} {attempt}")
        settings = draw_settings(rng, world, front)
        try:
            program = Writer(rng, settings).write(seed)
            for tokens in settings.tokens:
                try_out(program, tokens)
            return program
        except Invalid:
            continue
    raise RuntimeError(f"seed {seed}: no model in 50 attempts")


def sizes_of(world: int) -> dict[str, int]:
    return {"world": world, "other": world, "own": 1}


def try_out(program: Program, tokens: int) -> list[Tensor]:
    """The values of a program's steps without other ranks.  Invalid where torch refuses one."""
    writer = Writer(random.Random(0), program.settings, tokens)
    try:
        for step in program.steps:
            writer.add(step.text, *step.args)
    except (RuntimeError, IndexError, ValueError, AssertionError, TypeError) as error:
        raise Invalid(str(error)) from error
    return writer.values


class Writer:
    """Writes a program step by step and runs every step as it is written: what is there decides what may come next."""

    def __init__(self, rng: random.Random, settings: Settings, tokens: int = TRACED) -> None:
        self.rng, self.settings = rng, settings
        self.low, self.f32 = DTYPES[settings.low], torch.float32
        self.scope = words(self.low, self.f32, {}, sizes_of(settings.world))
        self.scope["p"] = _Parameters(self.low)
        blank = Program(0, settings, (), ())
        self.scope.update(zip(ARGUMENTS, blank.arguments(tokens, self.low, 0), strict=True))
        self.steps: list[Step] = []
        self.values: list[Any] = []
        self.origin: list[str] = []
        self.outputs: list[int] = []
        self.odd = rng.choice((0.0, 0.05, 0.15, 0.3, 0.5))  # how often something odd stands between two steps

    def add(self, text: str, *args: int) -> int:
        step = Step(text, args)
        scope = {**self.scope, **{f"v{i}": self.values[i] for i in args}}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            self.values.append(eval(step.code({i: f"v{i}" for i in args}), scope))
        self.steps.append(step)
        self.origin.append(self._origin(text, args))
        if "_in_place({0}" in text and "all_reduce" not in text:
            self.origin[args[0]] = self.origin[-1]
        return len(self.steps) - 1

    def _origin(self, text: str, args: tuple[int, ...]) -> str:
        """Of a value: "same" on every rank, "own", or "given": a rank's own argument or what is made of it."""
        if text.startswith(("all_reduce", "all_gather")) and "'own'" not in text:
            return "same"
        if re.search(r"p\.[mlqn]|reduce_scatter", text):  # a rank's own weights, own rows
            return "own"
        before = {self.origin[a] for a in args} | ({"given"} if text in ("x", "y") or "p.o_" in text else {"same"})
        return next(origin for origin in ("own", "given", "same") if origin in before)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def write(self, seed: int) -> Program:
        try:
            self._write()
        except (RuntimeError, IndexError, ValueError, AssertionError, TypeError) as error:
            raise Invalid(str(error)) from error
        kept = list(dict.fromkeys(self.outputs))
        return Program(seed, self.settings, tuple(self.steps), tuple(kept))

    def _write(self) -> None:
        x, y, r = (self.add(name) for name in ARGUMENTS)
        lead = self.rng.choice(("",) * 10 + ("[None]",) * 3 + ("[0]",) + (".unflatten(0, (2, -1))",) * 3)
        if lead and (lead[0] == "[" or all(count % 2 == 0 for count in self.settings.tokens)):
            x, y, r = (self.add("{0}" + lead, v) for v in (x, y, r))
        self.own = [x, y]
        h = self.start(x, y, r)
        if self.chance(0.15):  # beside it a second residual
            self.outputs.append(self.end(self.layer(self.start(y, x, r))))
        for _ in range(self.rng.choice((0, 1, 1, 2))):
            h = self.layer(h)
            if self.chance(0.06):  # other rows from here on
                h = self.add(self.rng.choice(("{0}[1:]", "{0}[::2]", "torch.cat([{0}, {0}])", "{0}[:, :32]", "{0}[-1:]")), h)
        self.outputs.append(self.end(h))
        if self.chance(0.3):
            self.outputs.append(h)

    # what a model is made of

    def start(self, x: int, y: int, r: int) -> int:
        kind = self.rng.choice(("residual", "residual", "residual", "reduced", "given", "two sums", "own", "twice", "wide"))
        if kind == "given":
            return r
        reduced = self.all_reduce(self.product(x) if self.chance(0.5) else x)
        if kind == "reduced":
            return reduced
        if kind == "two sums":
            return self.sum(self.sum(reduced, r), self.all_reduce(y))
        if kind == "wide":
            return self.sum(self.add("{0}.to(f32)", r), reduced)
        if kind == "twice":
            return self.sum(reduced, reduced)
        if kind == "own":
            return self.sum(self.add("torch.tanh({0})", y), reduced)
        return self.sum(r, reduced)

    def layer(self, h: int) -> int:
        return self.rng.choice((self.attention, self.mlp, self.mlp, self.plain, self.plain, self.by_hand))(h)

    def plain(self, h: int) -> int:
        y = self.quantised_product(self.norm(h)) if self.chance(0.5) else self.product(self.norm(h))
        return self.back(h, y)

    def mlp(self, h: int) -> int:
        width, n = self.settings.width, self.norm(h)
        if self.chance(0.4):
            z = self.add(self.rng.choice(("gated({0})", "gated_gelu({0})")), self.product(n, 2 * width))
        else:
            gate = self.quantised_product(n) if self.chance(0.3) else self.product(n)
            up = self.product(n)
            act = self.rng.choice((
                "F.silu({0}) * {1}", "{1} * F.silu({0})", "F.gelu({0}, approximate='tanh') * {1}", "F.gelu({0}) * {1}",
                "F.silu({0}.to(f32)).to(low) * {1}", "{0} * torch.sigmoid({0}) * {1}", "F.relu({0}) * {1}",
                "F.silu({0}) * {0}",
            ))  # fmt: skip
            z = self.add(act, gate, up)
        z = self.between(z)
        return self.back(h, self.quantised_product(z) if self.chance(0.5) else self.product(z))

    def attention(self, h: int) -> int:
        n = self.add("{0}.reshape(-1, {0}.shape[-1])", self.norm(h))
        width = self.settings.width
        q, k, v = self.product(n, width), self.product(n, width // 2), self.product(n, width // 2)
        q, k, v = (self.add(f"heads({{0}}, {HEAD})", t) for t in (q, k, v))
        if self.chance(0.75):
            eps, kind = self.eps(), self.rng.choice(("norm_llama", "norm_torch", "norm_gemma", "norm_olmo"))
            weight = "p.g" if kind == "norm_gemma" else "p.w"
            q, k = (self.add(f"{kind}({{0}}, {weight}_{HEAD}_{i}, {eps})", t) for i, t in ((0, q), (self.rng.randrange(2), k)))
        if self.chance(0.75):
            turn = self.rng.choice(("turned", "turned", "turned", "turned_pairs", "turned_the_other_way"))
            shape = self.rng.choice(("[None, None]", "[None].unsqueeze(1)", "[None, None]", ""))
            cos, sin = (self.add(f"{f}_of({{0}}, p.f_{HEAD}_0){shape}", q) for f in ("cos", "sin"))
            q, k = (self.add(f"{turn}({{0}}, {{1}}, {{2}})", t, cos, sin) for t in (q, k))
        k, v = (k, k) if self.chance(0.05) else (k, v)
        out = self.add(self.rng.choice(("sdpa({0}, {1}, {2})", "attend_eagerly({0}, {1}, {2})")), q, k, v)
        out = self.between(self.add("flat({0})", out))
        y = self.quantised_product(out) if self.chance(0.6) else self.product(out)
        return self.back(h, y)

    def by_hand(self, h: int) -> int:
        """Sequence parallelism as models write it: sums scattered, norms of own rows, rows gathered."""
        if self.values[h].dim() != 2 or self.chance(0.3):
            return self.plain(h)
        group = self.group()
        dim = self.rng.choice((0, 0, 0, 1))
        shard = self.between(self.add(f"reduce_scatter({{0}}, {group!r}, {dim})", self.product(h)))
        y = self.norm(shard)
        if dim == 0 and self.chance(0.3):
            q, s = self.quantised(y)
            y = self.add("unquantised({0}, {1})", q, s)
        y = self.between(self.add(f"all_gather({{0}}, {group!r}, {dim})", y))
        y = self.product(y)
        if self.chance(0.5):
            shard2 = self.add(f"reduce_scatter({{0}}, {group!r}, {dim})", y)
            y = self.add(f"all_gather({{0}}, {group!r}, {dim})", self.norm(self.sum(shard, shard2)))
        return self.sum(h, y) if self.values[y].shape == self.values[h].shape else y

    def back(self, h: int, y: int) -> int:
        """A layer's result summed over the ranks and added to the residual."""
        y = self.all_reduce(y)
        if self.chance(0.08):
            y = self.sum(y, self.all_reduce(self.product(h)))
        if self.chance(0.35):
            y = self.norm(y)
        return self.sum(h, y)

    def end(self, h: int) -> int:
        if self.chance(0.1):
            return h
        y = self.norm(h)
        last = self.rng.random()
        if last < 0.35:
            q, s = self.quantised(y)
            self.outputs.append(q)
            return s
        if last < 0.5:
            return self.quantised_product(y)
        if last < 0.6:
            return self.product(y)
        if last < 0.7:
            return self.add(self.rng.choice(("{0}[-1:]", "{0}[..., -1, :]", "{0}.sum(0)", "{0}[..., :8]", "{0}.t()")), y)
        return y

    # its steps

    def group(self) -> str:
        return self.rng.choice(("world",) * 6 + ("other", "own"))

    def eps(self) -> float:
        return self.rng.choice((1e-6, 1e-5, 1e-5, 3e-4))

    def all_reduce(self, x: int) -> int:
        x = self.between(x)
        group = self.group()
        text = self.rng.choice((
            "all_reduce({0}, {g})", "all_reduce({0}, {g})", "all_reduce({0}, {g})", "all_reduce_aten({0}, {g})",
            "all_reduce_in_place({0}, {g})", "all_reduce({0}, {g}, 'max')" if self.chance(0.2) else "all_reduce({0}, {g})",
        ))  # fmt: skip
        y = self.between(self.add(text.replace("{g}", repr(group)), x))
        width = self.values[y].shape[-1]
        if self.chance(0.12):
            bias = self.rng.choice((f"p.b_{width}_0", f"p.b_{width}_0.view(1, -1)", f"p.wf_{width}_7.to(low)"))
            y = self.add(f"{{0}} + {bias}", y)
        if self.chance(0.1):
            y = self.add(self.rng.choice(("{0} * 0.22", "0.5 * {0}", "{0} / 3", "{0} * 1.0")), y)
        return y

    def sum(self, a: int, b: int) -> int:
        if self.values[a].shape != self.values[b].shape and self.values[a].numel() == self.values[b].numel():
            b = self.add("{0}.reshape({1}.shape)", b, a)
        # That a rank's own argument is added to summed rows is what sequence parallelism excludes (docs/debugging.md).
        a, b = (self.product(v) if self.origin[v] == "given" else v for v in (a, b))
        a, b = (a, b) if self.chance(0.5) else (b, a)
        texts = [
            "{0} + {1}", "{0} + {1}", "{0} + {1}", "torch.add({0}, {1})", "{0} + {1} * 0.22",
            "{0} + 1.0 * {1}", "({0} + {1}) * 0.5",
            "{0} + {1} + {1}", "torch.add({0}, {1}, alpha=2)", "{0} - {1}", "({0}.to(f32) + {1}.to(f32)).to(low)", "{1} + {0}",
        ]  # fmt: skip
        if self.values[a].dtype == self.values[b].dtype or self.values[a].dtype == torch.float32:
            texts.append("added_in_place({0}, {1})")
        total = self.add(self.rng.choice(texts[:3] if self.chance(0.6) else texts), a, b)
        return self.between(total)

    def norm(self, x: int) -> int:
        n, eps = self.values[x].shape[-1], self.eps()
        number = self.rng.randrange(3)
        w, g = f"p.w_{n}_{number}", f"p.g_{n}_{number}"
        usual = [f"norm_llama({{0}}, {w}, {eps})", f"norm_torch({{0}}, {w}, {eps})", f"norm_olmo({{0}}, {w}, {eps})",
                 f"norm_gemma({{0}}, {g}, {eps})", f"norm_torch({{0}}, None, {eps})"]  # fmt: skip
        rare = [f"norm_gemma_low({{0}}, {g}, {eps})", f"norm_kept({{0}}, {w}, {eps}).to(low)", f"norm_power({{0}}, {w}, {eps})",
                f"norm_llama({{0}}, p.wf_{n}_{number}, {eps}).to(low)", f"norm_gemma({{0}}, p.wf_{n}_{number}, {eps})",
                f"norm_torch({{0}}, p.wf_{n}_{number}, {eps}).to(low)", f"norm_sqrt({{0}}, {w}, {eps})",
                f"norm_sum({{0}}, {w}, {eps})",
                f"norm_rows({{0}}, {w}, {eps})", f"norm_root_cast({{0}}, {w}, {eps})", f"norm_low({{0}}, {w}, {eps})",
                f"norm_layer({{0}}, {w}, {eps})", f"norm_llama({{0}}, {{0}}.reshape(-1, {n})[0], {eps})"]  # fmt: skip
        return self.between(self.add(self.rng.choice(usual if self.chance(0.8) else rare), x))

    def product(self, x: int, n: int = 0) -> int:
        k, n = self.values[x].shape[-1], n or self.settings.width
        number = self.rng.randrange(2)
        texts = [f"{{0}} @ p.m_{k}_{n}_{number}", f"F.linear({{0}}, p.l_{n}_{k}_{number})",
                 f"F.linear({{0}}, p.l_{n}_{k}_{number}, p.o_{n}_{number})",
                 f"torch.matmul({{0}}, p.l_{n}_{k}_{number}.t())"]  # fmt: skip
        if self.values[x].dim() == 2:
            texts += [f"torch.mm({{0}}, p.m_{k}_{n}_{number})", f"torch.addmm(p.o_{n}_{number}, {{0}}, p.m_{k}_{n}_{number})"]
        x = x if self.values[x].dtype == self.low else self.add("{0}.to(low)", x)
        return self.between(self.add(self.rng.choice(texts), x))

    def quantised(self, x: int) -> tuple[int, int]:
        k, s = self.values[x].shape[-1], f"p.s_{self.rng.randrange(2)}"
        texts = [f"static({{0}}, {s})", f"static_inverse({{0}}, {s})", f"static_low({{0}}, {s})", "token({0})",
                 "token({0}, 1e-5)",
                 "token_inverse({0})", f"torchao({{0}}, {k})", "group({0}, 64)", "group({0}, 64)",
                 "torchao({0}, 64)"]  # fmt: skip
        if k % 128 == 0:
            texts += ["group({0}, 128)"] * 2
        near = [f"static_clamped_at_240({{0}}, {s})", f"static_cast_twice({{0}}, {s})", "static_of_all({0}, None)",
                "group({0}, 32)",
                "group({0}, 64, 1e-3)", "token({0}, 1e-10, 440.0)", "token({0}, 1e-10, 240.0)"]  # fmt: skip
        if self.values[x].dim() == 2:
            texts += [f"nvfp4({{0}}, {s} * 100)"] * 2
        pair = self.add(self.rng.choice(texts if self.chance(0.85) else near), x)
        q, scales = self.add("{0}[0]", pair), self.add("{0}[1]", pair)
        return self.between(q), self.between(scales)

    def quantised_product(self, x: int) -> int:
        x = self.add("{0}.reshape(-1, {0}.shape[-1])", x) if self.values[x].dim() != 2 else x
        k, n, number = self.values[x].shape[-1], self.settings.width, self.rng.randrange(2)
        q, s = self.quantised(x)
        w = f"p.q_{n}_{k}_{number}.t()"
        scales = self.values[s]
        if self.values[q].dtype == torch.uint8:
            fp4 = f"p.n4_{n}_{k // 2}_{number}.t(), {{1}}, p.n4s_{n}_{k // 16}_{number}"
            return self.between(self.add(f"scaled_mm_fp4({{0}}, {fp4}, p.qs_{number})", q, s))
        if self.values[q].dtype != E4M3 or k % 16 or self.chance(0.1):
            return self.product(self.add("unquantised({0}, {1})", q, s))
        if scales.numel() == 1:
            y = self.add(f"scaled_mm({{0}}, {w}, {{1}}, p.qs_{number})", q, s)
        elif scales.shape[-1] == 1:
            y = self.add(f"scaled_mm({{0}}, {w}, {{1}}, p.qr_1_{n}_{number})", q, s)
        elif k // scales.shape[-1] in (64, 128):
            y = self.add(f"scaled_mm_groups({{0}}, {w}, {{1}}, p.qr_{scales.shape[-1]}_{n}_{number}, "
                         f"'fp8_group{k // scales.shape[-1]}')", q, s)  # fmt: skip
        else:
            y = self.product(self.add("unquantised({0}, {1})", q, s))
        return self.between(y)

    def between(self, x: int) -> int:
        """What may stand between two steps: nothing; the same value by another way; other rows; a further user; a write."""
        value = self.values[x]
        if not self.chance(self.odd):
            return x
        kind = self.rng.random()
        if kind < 0.15:
            self.outputs.append(x)
            return x
        if kind < 0.3 and value.dtype != torch.uint8:
            user = self.add(self.rng.choice((
                "torch.tanh({0}.to(f32))", "{0}.to(f32).sum(-1)", "{0}[0]", "{0}.reshape(-1)[:3]", "{0}.to(f32) * 2",
                "{0}.view_as({0})",
            )), x)  # fmt: skip
            if self.chance(0.7):  # else dead
                self.outputs.append(user)
            return x
        if value.dtype not in (self.low, torch.float32) or value.dim() < 2:
            return self.add(self.rng.choice(("{0}.clone()", "{0}.contiguous()", "{0}.view({0}.shape)", "{0}.detach()")), x)
        if kind < 0.36:
            self.add(self.rng.choice(("{0}.mul_(2.0)", "{0}.add_(1.0)", "{0}[:1].zero_()", "{0}.copy_({0}.flip(0))")), x)
            return x
        if kind < 0.42:
            self.outputs.append(x)
            self.add(self.rng.choice(("{0}.mul_(2.0)", "{0}.add_(1.0)")), x)
            return x
        width = value.shape[-1]
        same = [
            "{0}.clone()", "{0}.contiguous()", "{0}.detach()", "{0}.view({0}.shape)", "{0}.reshape({0}.shape)", "{0} * 1.0",
            "{0} + 0.0", "{0}.to(f32).to(low)", "{0}.transpose(-1, -2).transpose(-1, -2)", "{0}.unsqueeze(0).squeeze(0)",
            "{0}.transpose(-1, -2).contiguous().transpose(-1, -2)", "torch.cat({0}.chunk(2, -1), -1)",
            "F.dropout({0}, 0.1, False)",
            f"{{0}}.unflatten(-1, (2, {width // 2})).flatten(-2)", "torch.cat([{0}[:1], {0}[1:]], 0)", "{0}.neg().neg()",
            "torch.where({0} > 0, {0}, {0})", "{0}.expand({0}.shape)", "torch.stack([{0}, {0}])[1]", "{0}[None][0]", "{0} / 1",
        ]  # fmt: skip
        other = [
            "{0}.flip(0)", "{0}.roll(1, 0)", "{0} * 2", "torch.relu({0})", "{0} - {0}.mean(-1, keepdim=True)", "{0}[:1] + {0}",
            f"{{0}} * p.w_{width}_5", "{0}.cumsum(0)", "{0}.roll(3, -1)", "-{0}", "{0} * {0}", "{0}.to(f32)",
            "{0} + {0}[..., :1]",
        ]  # fmt: skip
        return self.add(self.rng.choice(same if kind < 0.85 else other), x)


class _Parameters:
    def __init__(self, low: torch.dtype) -> None:
        self._low = low

    def __getattr__(self, name: str) -> Tensor:
        return parameter(name, self._low, self._low, torch.float32, 0)
