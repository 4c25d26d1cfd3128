"""Products next to collectives with data for all ranks, and what must come of them in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse.ir import registry

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

    args: by position.  exact: each result in float64.  unfused: each result as the graph's own operators round it.
    """

    name: str
    what: str
    args: tuple[Any, ...]
    exact: list[Tensor]
    unfused: list[Tensor]

    def launcher(self, algorithm: str) -> Callable[[], list[Tensor]]:
        op = registry[self.name]
        launch = op.launcher(f"cuda:{algorithm}")

        def run() -> list[Tensor]:
            out = launch(*self.args, alive=(True,) * op.results)
            return [out] if isinstance(out, Tensor) else list(out)

        return run

    def check(self, results: list[Tensor], algorithm: str) -> None:
        what = f"{self.name} {algorithm} {self.what}"
        assert len(results) == len(self.exact), what
        for got, want, plain in zip(results, self.exact, self.unfused, strict=True):
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


def scatters(rank: int, world: int, group: str) -> list[tuple[Problem, str]]:
    """Sizes, shapes, dtypes, biases and algorithms in pairs."""
    shapes, found = ((256, 4096), (1024, 1024), (2048, 16), (8, 5120)), []
    for i, tokens in enumerate(SIZES):
        for j, algorithm in enumerate(ALGORITHMS["matmul_reduce_scatter"] * 2):
            dtype = torch.float16 if (i + j) % 3 == 1 else torch.bfloat16
            problem = scatter(rank, world, group, tokens, *shapes[(i + j) % 4], dtype, (i + j // 2) % 2 == 0, 100 * i + 31 * j)
            found.append((problem, algorithm))
    return found


def gathers(rank: int, world: int, group: str) -> list[tuple[Problem, str]]:
    shapes, found = ((4096, (256, 64)), (1024, (512,)), (16, (8, 16, 1024)), (5120, (48,))), []
    for i, tokens in enumerate(SIZES):
        for j, algorithm in enumerate(ALGORITHMS["all_gather_matmul"] * 2):
            dtype, seed = torch.float16 if (i + j) % 3 == 1 else torch.bfloat16, 100 * i + 31 * j
            k, widths = shapes[(i + j) % 4]
            problem = gather(rank, world, group, tokens, k, widths, dtype, (i + j // 2) % 2 == 0, (i + j) % 2 == 0, seed)
            found.append((problem, algorithm))
    return found
