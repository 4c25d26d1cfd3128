"""The collective norm kernels on a GPU, ranks simulated in one process: arithmetic, protocol, replay."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tpfuse.formats import dequantize, quantize
from tpfuse.ir.samples import rows, vector

pytest.importorskip("triton")
if torch.cuda.is_available():
    from tests.gpu.simulated import SimulatedRanks, float64_rows
    from tpfuse.kernels.allreduce_norm import one_shot
    from tpfuse.kernels.calls import NormCall
    from tpfuse.kernels.cuda_norm import one_shot as cuda_one_shot
    from tpfuse.kernels.two_shot import two_shot

    LAUNCHERS: dict[str, Callable[..., Any]] = {"one_shot": one_shot, "two_shot": two_shot, "cuda_one_shot": cuda_one_shot}
else:
    LAUNCHERS = {"one_shot": print, "two_shot": print, "cuda_one_shot": print}

SCHEMES = [
    ("", ""), ("fp8_tensor", "row"), ("fp8_token", "row"), ("fp8_group128", "row"), ("fp8_group128", "col+tma"),
    ("fp8_group64", "col"), ("fp8_group128", "row+ue8m0"), ("fp8_group64", "col+tma+ue8m0_packed"),
    ("nvfp4", "linear"), ("nvfp4", "swizzled_128x4"),
]  # fmt: skip
algorithms = pytest.mark.parametrize("algorithm", LAUNCHERS)


def make_calls(
    world: int, tokens: int, hidden: int, scheme: str = "", layout: str = "", dtype: torch.dtype = torch.bfloat16,
    seed: int = 0, gemma: bool = False, residual: bool = True, parts: list[Tensor] | None = None,
) -> list[NormCall]:  # fmt: skip
    shape: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "dtype": dtype, "seed": seed, "device": "cuda"}
    given = scheme.startswith(("fp8_tensor", "nvfp4"))
    scale = torch.tensor([0.02 if scheme.startswith("fp8_tensor") else 100.0], device="cuda") if given else None
    name = ("all_reduce_add_rms_norm" if residual else "all_reduce_rms_norm") + "_quantize" * bool(scheme)
    return [
        NormCall(
            name, rows(**shape, rank=r) if parts is None else parts[r], (bool(scheme), bool(scheme), True, True),
            vector(**shape), 1e-6, 1.0 if gemma else 0.0, "cast_last" if gemma else "cast_first",
            residual=rows(**{**shape, "seed": seed + 50}) if residual else None, scale=scale, scheme=scheme,
            layout=layout,
        )
        for r in range(world)
    ]  # fmt: skip


def reference(calls: list[NormCall]) -> tuple[Tensor, Tensor]:
    """(norm, h) in float64."""
    call = calls[0]
    h = float64_rows([c.x for c in calls])
    if call.residual is not None:
        h = h + call.residual.double()
    assert call.weight is not None
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + call.eps) * (call.weight.double() + call.weight_bias)
    return y, h


def unfused(calls: list[NormCall]) -> tuple[Tensor, Tensor]:
    """(norm, h) as the graph's own operators round them, one after another, in the model's dtype."""
    call = calls[0]
    h = calls[0].x.clone()
    for c in calls[1:]:
        h += c.x
    if call.residual is not None:
        h = h + call.residual
    x = h.float()
    assert call.weight is not None
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + call.eps)
    if call.weight_bias:
        return (y * (call.weight.float() + call.weight_bias)).to(h.dtype), h
    return y.to(h.dtype) * call.weight, h


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(outputs: list[Any], calls: list[NormCall]) -> None:
    (norm, h), (plain_norm, plain_h) = reference(calls), unfused(calls)
    call = calls[0]
    for out in outputs:
        assert error(out.norm, norm) <= 1.25 * error(plain_norm, norm)
        assert error(out.reduced, h) <= 1.25 * error(plain_h, h)
    first = outputs[0]
    for other in outputs[1:]:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), "ranks differ"
    if call.scheme:
        want_q, want_scales = quantize(plain_norm, call.scale, call.scheme, call.layout)
        assert first.scales.shape == want_scales.shape and first.scales.stride() == want_scales.stride()
        got = dequantize(first.q, first.scales, call.scale, call.scheme, call.layout)
        plain = dequantize(want_q, want_scales, call.scale, call.scheme, call.layout)
        assert error(got, norm) <= 1.25 * error(plain, norm)


@algorithms
@pytest.mark.parametrize("scheme", SCHEMES, ids=":".join)
def test_schemes(algorithm: str, scheme: tuple[str, str]) -> None:
    ranks = SimulatedRanks(2, 64, 8192)
    for i, (tokens, hidden) in enumerate([(1, 4096), (33, 5120), (3, 1040)]):
        calls = make_calls(2, tokens, hidden, *scheme, seed=i, gemma=i % 2 == 1, residual=i != 0)
        check(ranks(LAUNCHERS[algorithm], calls), calls)


@algorithms
@pytest.mark.parametrize("world, dtype", [(2, torch.float16), (3, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16)])
def test_worlds_and_dtypes(algorithm: str, world: int, dtype: torch.dtype) -> None:
    ranks = SimulatedRanks(world, 300, 4096)
    for tokens in (1, world - 1, 130, 700):  # 700 rows take several launches
        calls = make_calls(world, tokens, 2056, dtype=dtype, seed=tokens)
        check(ranks(LAUNCHERS[algorithm], calls), calls)


@algorithms
@pytest.mark.parametrize("hidden", [8, 200, 6152, 12288, 16384])
def test_widths(algorithm: str, hidden: int) -> None:
    ranks = SimulatedRanks(2, 16, 16384)
    calls = make_calls(2, 9, hidden)
    check(ranks(LAUNCHERS[algorithm], calls), calls)


@algorithms
def test_special_values(algorithm: str) -> None:
    """-0.0 everywhere, NaN, infinities and subnormals give what the sum gives, the sign of zero aside."""
    kinds = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 1.0], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        values = kinds.to(dtype)
        if dtype == torch.float16:
            values[5:7] = torch.tensor([6e-8, -6e-8], dtype=dtype)
        payloads = [torch.full((5, 1024), -0.0, dtype=dtype) for _ in range(2)]
        random_parts = [values[torch.randint(8, (5, 1024), generator=generator)] for _ in range(2)]
        subnormal = [values[torch.randint(5, 7, (5, 1024), generator=generator)] for _ in range(2)]
        ranks = SimulatedRanks(2, 16, 1024)
        for parts in (payloads, random_parts, subnormal):
            calls = make_calls(2, 5, 1024, dtype=dtype, residual=False, parts=[p.cuda() for p in parts])
            want = (calls[0].x.float() + calls[1].x.float()).to(dtype)
            for out in ranks(LAUNCHERS[algorithm], calls):
                assert torch.equal(torch.nan_to_num(out.reduced, 7.0), torch.nan_to_num(want, 7.0))


@algorithms
def test_changing_sizes_back_to_back(algorithm: str) -> None:
    """10,000 calls without a pause, sizes at random: a slot that is not cleared, or cleared too far, shows."""
    ranks = SimulatedRanks(2, 40, 4096)
    sizes = [(t, h) for t in (1, 2, 5, 17, 40) for h in (512, 1024, 4096)]
    prepared = {size: make_calls(2, *size, seed=i) for i, size in enumerate(sizes)}
    wanted = {}
    for size, calls in prepared.items():
        wanted[size] = [(o.norm.clone(), o.reduced.clone()) for o in ranks(LAUNCHERS[algorithm], calls)]
        check(ranks(LAUNCHERS[algorithm], calls), calls)
    launch, generator = LAUNCHERS[algorithm], random.Random(0)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(5000 if algorithm == "two_shot" else 10000):
        size = generator.choice(sizes)
        for out, (norm, reduced) in zip(ranks(launch, prepared[size], poison=False), wanted[size], strict=True):
            wrong += (out.norm != norm).sum() + (out.reduced != reduced).sum()
    assert int(wrong) == 0


@algorithms
def test_graphs_in_mixed_order(algorithm: str) -> None:
    """Five captured graphs of several calls each, replayed in any order, eager calls between them."""
    ranks = SimulatedRanks(2, 64, 4096)
    launch, generator = LAUNCHERS[algorithm], random.Random(1)
    eager = make_calls(2, 6, 2048, seed=99)
    graphs = []
    for g in range(5):
        sizes = [(generator.choice([1, 3, 8, 40]), generator.choice([1024, 4096])) for _ in range(4)]
        chain = [make_calls(2, *size, seed=10 * g + i) for i, size in enumerate(sizes)]
        for calls in chain:  # compiled before capture
            ranks(launch, calls)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [ranks(launch, calls, poison=False) for calls in chain]
        graphs.append((graph, chain, outputs))
    for step in range(60):
        graph, chain, outputs = graphs[generator.randrange(5)]
        for results in outputs:
            for out in results:
                out.norm.fill_(float("nan"))
        graph.replay()
        for calls, results in zip(chain, outputs, strict=True):
            check(results, calls)
        if step % 7 == 0:
            check(ranks(launch, eager), eager)


@algorithms
def test_two_groups_at_once(algorithm: str) -> None:
    """Two independent sets of ranks interleave on the device."""
    first, second = SimulatedRanks(2, 64, 4096, share=2), SimulatedRanks(2, 64, 4096, share=2)
    a, b = make_calls(2, 30, 4096, seed=1), make_calls(2, 50, 2048, seed=2)
    sides = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[Any] = [None, None]
    for _ in range(200):
        for i, (ranks, calls) in enumerate(((first, a), (second, b))):
            with torch.cuda.stream(sides[i]):
                results[i] = ranks(LAUNCHERS[algorithm], calls)
    torch.cuda.synchronize()
    check(results[0], a)
    check(results[1], b)


@algorithms
def test_run_to_run(algorithm: str) -> None:
    ranks = SimulatedRanks(4, 64, 8192)
    calls = make_calls(4, 50, 8192, "fp8_group128", "row")
    first = ranks(LAUNCHERS[algorithm], calls)
    for _ in range(20):
        for out, before in itertools.chain(zip(ranks(LAUNCHERS[algorithm], calls), first, strict=True)):
            assert torch.equal(out.q.view(torch.uint8), before.q.view(torch.uint8))
            assert torch.equal(out.norm, before.norm) and torch.equal(out.scales, before.scales)


@algorithms
def test_only_what_is_wanted(algorithm: str) -> None:
    ranks = SimulatedRanks(2, 64, 4096)
    calls = make_calls(2, 4, 4096, "fp8_tensor", "row")
    whole = ranks(LAUNCHERS[algorithm], calls)
    lean = ranks(LAUNCHERS[algorithm], [replace(c, alive=(True, True, False, False)) for c in calls])
    assert torch.equal(lean[0].q.view(torch.uint8), whole[0].q.view(torch.uint8))
    assert lean[0].norm.numel() == 0 and lean[0].reduced.numel() == 0
