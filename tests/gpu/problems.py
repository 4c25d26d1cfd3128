"""Products next to collectives with data for all ranks, and what must come of them in float64.

Many problems are made one at a time: ranks that share a GPU share its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse import formats
from tpfuse.formats import dequantize, quantize
from tpfuse.formats.layouts import apply_layout, groups_of, remove_layout
from tpfuse.ir import overlap, registry
from tpfuse.ir.matmul import _rows_value, _weight_value, scaled_matmul, scaled_sample
from tpfuse.ir.norm import rms_norm
from tpfuse.lowering import select as _registered  # noqa: F401, the kernels

SIZES = (1, 7, 64, 129, 512, 2048, 8192)
ALGORITHMS = {"matmul_reduce_scatter": ("plain", "chunked"), "all_gather_matmul": ("push", "chunked")}


def data(rows: int, columns: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (torch.randn(rows, columns, device="cuda", generator=generator) * scale).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    size = float(want.norm())
    return float((got.double() - want).norm()) / size if size else float(got.double().norm())


@dataclass(frozen=True)
class Problem:
    """One call of an operator on one rank.

    args: by position.  exact: each result in float64.  unfused: each result as the graph's own operators round it.  values: what
    is compared of the results.
    """

    name: str
    what: str
    args: tuple[Any, ...]
    exact: list[Tensor]
    unfused: list[Tensor]
    values: Callable[[list[Tensor]], list[Tensor]] = list

    def launcher(self, algorithm: str) -> Callable[[], list[Tensor]]:
        op = registry[self.name]
        launch = op.launcher(f"cuda:{algorithm}")

        def run() -> list[Tensor]:
            out = launch(*self.args, alive=(True,) * op.results)
            return [out] if isinstance(out, Tensor) else list(out)

        return run

    def check(self, results: list[Tensor], algorithm: str) -> None:
        what = f"{self.name} {algorithm} {self.what}"
        found = self.values(results)
        assert len(found) == len(self.exact), what
        for got, want, plain in zip(found, self.exact, self.unfused, strict=True):
            assert got.shape == want.shape and got.dtype == plain.dtype, what
            mine, theirs = error(got, want), error(plain, want)
            assert mine <= 1.25 * theirs, f"{what}: error {mine:.2e}, unfused {theirs:.2e}"


def scatter(rank: int, world: int, group: str, tokens: int, k: int, n: int, dtype: torch.dtype, bias: bool, seed: int) -> Problem:
    xs = [data(tokens, k, dtype, seed + r) for r in range(world)]
    weights = [data(n, k, dtype, seed + 10 + r, k**-0.5).t() for r in range(world)]
    biases = [data(1, n, dtype, seed + 20 + r)[0] if bias else None for r in range(world)]
    exact, plain = torch.zeros(tokens, n, dtype=torch.float64, device="cuda"), torch.zeros(tokens, n, dtype=dtype, device="cuda")
    for x, weight, own in zip(xs, weights, biases, strict=True):
        exact += x.double() @ weight.double() + (0 if own is None else own.double())
        plain += x @ weight if own is None else torch.addmm(own, x, weight)
    padded = tokens % world != 0 or seed % 2 == 0
    args = (xs[rank], weights[rank], biases[rank], padded, group)
    what = f"{tokens} x {k} x {n} {dtype} bias {bias}"
    return Problem("matmul_reduce_scatter", what, args, [own_rows(exact, rank, world)], [own_rows(plain, rank, world)])


def own_rows(whole: Tensor, rank: int, world: int) -> Tensor:
    """A rank's share, filled up with zeros."""
    share = -(-whole.shape[0] // world)
    return torch.cat([whole, whole.new_zeros(share * world - whole.shape[0], whole.shape[1])])[rank * share : (rank + 1) * share]


def gather(
    rank: int, world: int, group: str, tokens: int, k: int, widths: tuple[int, ...], dtype: torch.dtype, bias: bool, keep: bool,
    seed: int,
) -> Problem:  # fmt: skip
    share = -(-tokens // world)
    parts = [data(share, k, dtype, seed + r) for r in range(world)]
    whole = torch.cat(parts)[:tokens]
    for r, part in enumerate(parts):  # what is behind the last row must not matter
        part[max(0, tokens - r * share) :] = float("nan")
    weights = [data(n, k, dtype, seed + 10 + n, k**-0.5).t() for n in widths]
    biases = [data(1, n, dtype, seed + 20 + n)[0] if bias and i == 0 else None for i, n in enumerate(widths)]
    exact, plain = [], []
    for weight, own in zip(weights, biases, strict=True):
        exact.append(whole.double() @ weight.double() + (0 if own is None else own.double()))
        plain.append(whole @ weight if own is None else torch.addmm(own, whole, weight))
    if keep:
        exact.append(whole.double())
        plain.append(whole)
    rows = None if tokens % world == 0 and seed % 2 else tokens
    args = (parts[rank], weights, biases, rows, keep, group)
    return Problem("all_gather_matmul", f"{tokens} x {k} x {widths} {dtype} bias {bias} keep {keep}", args, exact, plain)


def _wide(args: Sequence[Any]) -> Tensor:
    """`scaled_matmul` in float64."""
    x, weight, x_scale, weight_scale, bias, _, alpha, scheme, layout, weight_layout, *_ = args
    wide = torch.float64
    y = _rows_value(x, x_scale, scheme, layout, wide) @ _weight_value(weight, weight_scale, scheme, weight_layout, wide)
    y = y if alpha is None else y * alpha.double()
    return y if bias is None else y + bias.double()


def _sample(scheme: str, layout: str, tokens: int, k: int, n: int, rank: int, seed: int) -> list[Any]:
    """`scaled_matmul`'s arguments on the GPU."""
    shape = {"scheme": scheme, "layout": layout, "tokens": tokens, "hidden": k, "width": n, "rank": rank, "seed": seed}
    sample = scaled_sample(**shape, device="cuda")
    return [sample[name] for name in scaled_matmul.params]


def scaled_scatter(
    rank: int, world: int, group: str, tokens: int, k: int, n: int, scheme: str, layout: str, bias: bool, seed: int
) -> Problem:  # fmt: skip
    every = [_sample(scheme, layout, tokens, k, n, r, seed + r) for r in range(world)]
    exact, plain = torch.zeros(tokens, n, dtype=torch.float64, device="cuda"), torch.zeros(tokens, n, device="cuda").bfloat16()
    for args in every:
        args[4] = args[4] if bias else None
        exact += _wide(args)
        plain += scaled_matmul.reference(*args)
    what = f"{tokens} x {k} x {n} {scheme} {layout} bias {bias}"
    args = (*every[rank], True, group)
    return Problem("scaled_matmul_reduce_scatter", what, args, [own_rows(exact, rank, world)], [own_rows(plain, rank, world)])


def scaled_gather(
    rank: int, world: int, group: str, tokens: int, k: int, widths: tuple[int, ...], scheme: str, layout: str, bias: bool,
    keep: bool, seed: int,
) -> Problem:  # fmt: skip
    share = -(-tokens // world)
    every = [[_sample(scheme, layout, share, k, n, r, seed) for n in widths] for r in range(world)]
    exact, plain = [], []
    for i in range(len(widths)):
        for r in range(world):  # other rows on each rank, by the same weights
            x, x_scale = every[r][0][0], every[0 if scheme == "fp8_tensor" else r][0][2]
            bias_of_all = every[0][i][4] if bias and i == 0 else None
            every[r][i] = [x, every[0][i][1], x_scale, every[0][i][3], bias_of_all, *every[0][i][5:]]
        exact.append(torch.cat([_wide(every[r][i]) for r in range(world)])[:tokens])
        plain.append(torch.cat([scaled_matmul.reference(*every[r][i]) for r in range(world)])[:tokens])
    if keep:
        parts = [every[r][0] for r in range(world)]
        kept = [torch.cat([p[0].view(torch.uint8) for p in parts])[:tokens].view(parts[0][0].dtype)]
        if scheme != "fp8_tensor":
            groups = groups_of(k, formats.Scheme.parse(scheme))
            every_scale = torch.cat([remove_layout(p[2], share, groups, layout) for p in parts])
            kept.append(apply_layout(every_scale[:tokens], layout))
        exact += [t.double() for t in kept]
        plain += kept
    own = every[rank]
    lists = [[each[i] for each in own] for i in (1, 3, 4, 5, 6)]
    args = (own[0][0], own[0][2], *lists, *own[0][7:], tokens, keep, group)
    what = f"{tokens} x {k} x {widths} {scheme} {layout} bias {bias} keep {keep}"
    return Problem("all_gather_scaled_matmul", what, args, exact, plain)


def with_norm(
    rank: int, world: int, group: str, name: str, tokens: int, hidden: int, scheme: str, layout: str, seed: int
) -> Problem:  # fmt: skip
    """A product, reduce-scatter, norm (and quantise), by the operator's own sample."""
    op: Any = registry[name]
    quantises = name.endswith("quantize")
    shape = {"tokens": tokens, "hidden": hidden, "dtype": torch.bfloat16, "device": "cuda", "group": group, "seed": seed}
    every = [op.sample(**shape, rank=r, **({"scheme": scheme, "layout": layout} if scheme else {})) for r in range(world)]
    exact = torch.zeros(tokens, hidden, dtype=torch.float64, device="cuda")
    plain = torch.zeros_like(exact, dtype=torch.bfloat16)
    for sample in every:
        own, _ = op.halves([sample[p] for p in op.params])
        if len(own) == 3:
            exact += torch.addmm(own[2].double(), own[0].double(), own[1].double())
        else:
            exact += _wide(own)
        plain += op.first.reference(*own)
    mine = every[rank]
    results = []
    for total in (own_rows(exact, rank, world), own_rows(plain, rank, world)):
        wide = total.dtype == torch.float64
        given = {k: v.to(total.dtype) if isinstance(v, Tensor) and k in NORM_ARGS else v for k, v in mine.items()}
        norm, h = _norm(name, total, given, wide)
        results.append([norm, h])
        if quantises:
            if wide:
                results[-1].insert(0, norm)
            else:
                q, scales = quantize(norm, mine["scale"], mine["scheme"], mine["layout"])
                results[-1].insert(0, dequantize(q, scales, mine["scale"], mine["scheme"], mine["layout"]))

    def values(found: list[Tensor]) -> list[Tensor]:
        if not quantises:
            return found
        q, scales, *rest = found
        return [dequantize(q, scales, mine["scale"], mine["scheme"], mine["layout"]), *rest]

    what = f"{tokens} x {hidden} {scheme} {layout}"
    return Problem(name, what, tuple(mine[p] for p in op.params), *results, values)


NORM_ARGS = ("residual", "weight", "weight2", "bias")


def _norm(name: str, total: Tensor, given: dict[str, Any], wide: bool) -> tuple[Tensor, Tensor]:
    """Own rows' norm and what it was taken of, from their sum."""

    def norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not wide:
            return rms_norm(y, weight, eps, given["weight_bias"], given["rounding"])
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (weight + given["weight_bias"])

    if "weight2" in given:
        h = given["residual"] + norm(total, given["weight"], given["eps"])
        return norm(h, given["weight2"], given["eps2"]), h
    h = total + given["bias"]
    if "residual" in given:
        h = given["residual"] + given["alpha"] * h
    return norm(h, given["weight"], given["eps"]), h


SCHEMES = [
    ("fp8_tensor", "row"), ("fp8_token", "row"), ("fp8_group128", "row"), ("fp8_group128", "col+tma"), ("nvfp4", "linear"),
    ("nvfp4", "swizzled_128x4"),
]  # fmt: skip


def scaled_scatters(rank: int, world: int, group: str) -> Iterator[tuple[Problem, str]]:
    shapes = ((256, 4096), (1024, 1024), (2048, 128), (128, 5120))
    for i, tokens in enumerate(SIZES):
        for j, (scheme, layout) in enumerate(SCHEMES):
            bias = (i + j) % 3 == 0
            shape = shapes[(i + j) % 4 if tokens < 2048 else j % 2]
            problem = scaled_scatter(rank, world, group, tokens, *shape, scheme, layout, bias, 100 * i + 31 * j)
            yield problem, ALGORITHMS["matmul_reduce_scatter"][(i + j) % 2]


def scaled_gathers(rank: int, world: int, group: str) -> Iterator[tuple[Problem, str]]:
    shapes = ((4096, (256, 128)), (1024, (512,)), (128, (128, 128, 1024)), (2048, (384,)))
    for i, tokens in enumerate(SIZES):
        for j, (scheme, layout) in enumerate(SCHEMES):
            bias, keep, seed = (i + j) % 3 == 0, (i + j) % 2 == 0, 100 * i + 31 * j
            shape = shapes[(i + j) % 4 if tokens < 2048 else 1 + j % 2]
            problem = scaled_gather(rank, world, group, tokens, *shape, scheme, layout, bias, keep, seed)
            yield problem, ALGORITHMS["all_gather_matmul"][(i // 2 + j) % 2]


def with_norms(rank: int, world: int, group: str) -> Iterator[tuple[Problem, str]]:
    for i, op in enumerate(overlap.WITH_NORM):
        for j, tokens in enumerate((1, 7, 64, 129, 700)):
            scheme, layout = SCHEMES[(i + j) % len(SCHEMES)]
            if not op.name.startswith("scaled") and not op.name.endswith("quantize"):
                scheme, layout = "", ""
            problem = with_norm(rank, world, group, op.name, tokens, (512, 1024)[(i + j) % 2], scheme, layout, 10 * i + j)
            yield problem, ALGORITHMS["matmul_reduce_scatter"][(i + j // 2) % 2]


def scatters(rank: int, world: int, group: str) -> Iterator[tuple[Problem, str]]:
    """Sizes, shapes, dtypes, biases and algorithms in pairs."""
    shapes = ((256, 4096), (1024, 1024), (2048, 16), (8, 5120))
    for i, tokens in enumerate(SIZES):
        for j, algorithm in enumerate(ALGORITHMS["matmul_reduce_scatter"] * 2):
            dtype = torch.float16 if (i + j) % 3 == 1 else torch.bfloat16
            problem = scatter(rank, world, group, tokens, *shapes[(i + j) % 4], dtype, (i + j // 2) % 2 == 0, 100 * i + 31 * j)
            yield problem, algorithm


def gathers(rank: int, world: int, group: str) -> Iterator[tuple[Problem, str]]:
    shapes = ((4096, (256, 64)), (1024, (512,)), (16, (8, 16, 1024)), (5120, (48,)))
    for i, tokens in enumerate(SIZES):
        for j, algorithm in enumerate(ALGORITHMS["all_gather_matmul"] * 2):
            dtype, seed = torch.float16 if (i + j) % 3 == 1 else torch.bfloat16, 100 * i + 31 * j
            k, widths = shapes[(i + j) % 4]
            problem = gather(rank, world, group, tokens, k, widths, dtype, (i + j // 2) % 2 == 0, (i + j) % 2 == 0, seed)
            yield problem, algorithm
