"""The collective kernels between ranks, a process each, on GPUs of their own or shared: arithmetic, protocol, replay, groups and
streams.

The ranks (see ranks.py) stay from test to test; each checks its own results against float64, and that the others have the same
bits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.ranks import SHARED, WORLD, fewer, use_gpu
from tests.kernels.spawned import run_spawned

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(400)
ALGORITHMS = ["triton:one_shot", "triton:two_shot", "cuda:one_shot"]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def launcher(algorithm: str) -> Callable[[Any, Any], Any]:
    from tpfuse.kernels.allreduce_norm import one_shot
    from tpfuse.kernels.cuda_norm import one_shot as cuda_one_shot
    from tpfuse.kernels.two_shot import two_shot

    return dict(zip(ALGORITHMS, (one_shot, two_shot, cuda_one_shot), strict=True))[algorithm]


def begin(rank: int, max_tokens: int, hidden: int, **options: Any) -> Any:
    """The channel of the current stream."""
    from tpfuse.kernels.workspace import channel_of
    from tpfuse.runtime.workspaces import prepare

    use_gpu(rank)
    dist.barrier()  # the bound of a wait is for what follows
    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    prepare(group, max_tokens, hidden, timeout=20.0, **options)
    return channel_of(group)


def digest(outputs: Any) -> str:
    parts = [o.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for o in outputs]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def same_everywhere(world: int, what: Any) -> None:
    said: list[Any] = [None] * world
    dist.all_gather_object(said, what)
    assert all(s == said[0] for s in said), "ranks differ"


def every_case(rank: int, world: int, algorithm: str) -> int:
    from tests.gpu.test_allreduce_norm import SCHEMES, check, make_calls

    channel, launch = begin(rank, 600, 16384), launcher(algorithm)
    sizes = [(1, 4096), (7, 8192), (33, 5120), (3, 1040), (300, 8192), (2, 16), (64, 6144), (1, 8192), (129, 4096), (1300, 8192)]
    sizes += [(5, 16384), (150, 12288)]
    cases = [(s, sizes[(3 * i + j) % len(sizes)]) for i, s in enumerate(SCHEMES) for j in range(3)]
    cases += [(SCHEMES[0], size) for size in sizes]
    seen = []
    for i, (scheme, (tokens, hidden)) in enumerate(cases):
        dtype = torch.float16 if i % 3 == 2 else torch.bfloat16
        calls = make_calls(world, tokens, hidden, *scheme, dtype=dtype, seed=i, gemma=i % 2 == 1, residual=i % 4 != 3)
        dist.barrier()
        out = launch(channel, calls[rank])
        try:
            check([out], calls)
        except AssertionError as error:
            raise AssertionError(f"{scheme} {tokens} x {hidden} {dtype}: {error}") from error
        seen.append(digest(out))
    same_everywhere(world, seen)
    return len(cases)


@algorithms
def test_schemes_and_sizes(algorithm: str) -> None:
    assert all(n >= 40 for n in run_spawned(every_case, WORLD, algorithm, environment=SHARED, keep=True, timeout=200))


def sandwich_bias_alpha(rank: int, world: int, algorithm: str) -> int:
    from dataclasses import replace

    from tests.gpu.test_allreduce_norm import error, float64_rows, make_calls
    from tpfuse.ir.samples import vector

    channel, launch = begin(rank, 64, 8192), launcher(algorithm)
    for i, (tokens, hidden) in enumerate([(1, 4096), (40, 8192), (5, 2056)]):
        calls = make_calls(world, tokens, hidden, seed=i)
        shape: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "dtype": torch.bfloat16, "device": "cuda"}
        bias, weight2 = vector(**{**shape, "seed": 3}) * 2e-3, vector(**{**shape, "seed": 4})
        plain = float64_rows([c.x for c in calls])
        out = launch(channel, replace(calls[rank], bias=bias, alpha=0.22))
        h = calls[0].residual.double() + 0.22 * (plain + bias.double())
        assert error(out.reduced, h) < 3e-3
        out = launch(channel, replace(calls[rank], weight2=weight2, eps2=3e-6, sandwich=True))
        w, w2 = calls[0].weight.double(), weight2.double()
        inner = plain * torch.rsqrt(plain.pow(2).mean(-1, keepdim=True) + calls[0].eps) * w
        h = calls[0].residual.double() + inner
        assert error(out.reduced, h) < 3e-3
        assert error(out.norm, h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 3e-6) * w2) < 5e-3
    return 3


@algorithms
def test_sandwich_bias_and_scale(algorithm: str) -> None:
    run_spawned(sandwich_bias_alpha, WORLD, algorithm, environment=SHARED, keep=True, timeout=120)


def special_values(rank: int, world: int, algorithm: str) -> int:
    from tests.gpu.test_allreduce_norm import make_calls

    channel, launch = begin(rank, 16, 1024), launcher(algorithm)
    kinds = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 1.0], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    payloads = [
        [torch.full((5, 1024), -0.0, dtype=torch.bfloat16)] * world,
        [kinds[torch.randint(8, (5, 1024), generator=generator)] for _ in range(world)],
        [kinds[torch.randint(5, 7, (5, 1024), generator=generator)] for _ in range(world)],
    ]
    for parts in payloads:
        calls = make_calls(world, 5, 1024, residual=False, parts=[p.cuda() for p in parts])
        want = sum(c.x.float() for c in calls).to(torch.bfloat16)  # type: ignore[union-attr]
        got = launch(channel, calls[rank]).reduced
        assert torch.equal(torch.nan_to_num(got, 7.0), torch.nan_to_num(want, 7.0))
    return len(payloads)


@algorithms
def test_special_values(algorithm: str) -> None:
    run_spawned(special_values, WORLD, algorithm, environment=SHARED, keep=True, timeout=120)


def back_to_back(rank: int, world: int, algorithm: str, count: int) -> int:
    """Calls of changing sizes without a pause, ranks slowed down at random; then five graphs in mixed order."""
    from tests.gpu.test_allreduce_norm import check, make_calls

    channel, launch, generator = begin(rank, 300, 8192), launcher(algorithm), random.Random(0)
    torch.use_deterministic_algorithms(False)
    sizes = [(t, h) for t in (1, 2, 5, 17, 130, 300) for h in (512, 1024, 4096, 8192)]
    prepared = {size: make_calls(world, *size, seed=i) for i, size in enumerate(sizes)}
    wanted = {}
    for size, calls in prepared.items():
        out = launch(channel, calls[rank])
        check([out], calls)
        wanted[size] = (out.norm.clone(), out.reduced.clone())
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    own = random.Random(rank)
    for _ in range(count):
        size = generator.choice(sizes)
        if own.random() < 0.05:
            torch.cuda._sleep(own.randrange(200_000))
        out = launch(channel, prepared[size][rank])
        wrong += (out.norm != wanted[size][0]).sum() + (out.reduced != wanted[size][1]).sum()
    assert int(wrong) == 0
    graphs = []
    for _ in range(5):
        chosen = [generator.choice(sizes) for _ in range(4)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [launch(channel, prepared[size][rank]) for size in chosen]
        graphs.append((graph, chosen, outputs))
    for step in range(fewer(200)):
        graph, chosen, outputs = graphs[generator.randrange(5)]
        for out in outputs:
            out.norm.fill_(float("nan"))
        if own.random() < 0.2:
            torch.cuda._sleep(own.randrange(200_000))
        graph.replay()
        for size, out in zip(chosen, outputs, strict=True):
            wrong += (out.norm != wanted[size][0]).sum() + (out.reduced != wanted[size][1]).sum()
        if step % 7 == 0:
            out = launch(channel, prepared[sizes[0]][rank])
            wrong += (out.norm != wanted[sizes[0]][0]).sum()
    assert int(wrong) == 0
    return count


@algorithms
def test_back_to_back_and_replay(algorithm: str) -> None:
    run_spawned(back_to_back, WORLD, algorithm, fewer(10_000), environment=SHARED, keep=True, timeout=200)


def groups_and_streams(rank: int, world: int, algorithm: str) -> int:
    """Two groups of the same ranks and two streams at once, then release and restore."""
    from tests.gpu.test_allreduce_norm import check, make_calls
    from tpfuse.kernels.workspace import channel_of, on_channel
    from tpfuse.runtime.workspaces import prepare, release, restore

    begin(rank, 64, 4096, concurrency=4)
    launch = launcher(algorithm)
    torch.use_deterministic_algorithms(False)
    first: Any = dist.group.WORLD
    second: Any = dist.new_group(list(range(world)))
    prepare(second, 64, 4096, concurrency=4, timeout=20.0)
    streams = [torch.cuda.Stream() for _ in range(4)]
    lanes = list(zip((first, first, second, second), (0, 1, 0, 1), streams, strict=True))
    calls = [make_calls(world, tokens, 4096, seed=i) for i, tokens in enumerate((64, 3, 17, 1))]
    for turn in range(2):
        for (group, index, _), own in zip(lanes, calls, strict=True):  # compiled and loaded before anything waits
            with on_channel(index):
                launch(channel_of(group.group_name), own[rank])
        torch.cuda.synchronize()
        results: list[Any] = []
        for _ in range(50):
            results.clear()
            for (group, index, stream), own in zip(lanes, calls, strict=True):
                with torch.cuda.stream(stream), on_channel(index):
                    results.append(launch(channel_of(group.group_name), own[rank]))
        torch.cuda.synchronize()
        for out, own in zip(results, calls, strict=True):
            check([out], own)
        if turn == 0:
            release(first)
            restore(first)
    return 2


@algorithms
def test_groups_streams_and_restore(algorithm: str) -> None:
    run_spawned(groups_and_streams, WORLD, algorithm, environment=SHARED, keep=True, timeout=120)


def sharded_cases(rank: int, world: int) -> int:
    from dataclasses import replace

    from tests.gpu.test_allreduce_norm import SCHEMES, error, make_calls, reference, unfused
    from tpfuse.formats import dequantize, quantize
    from tpfuse.kernels.cuda_sharded import ShardCall, sharded

    channel = begin(rank, 600, 8192)
    sizes = [(64, 4096), (1, 8192), (33, 5120), (7, 1040), (301, 8192), (2, 16), (129, 4096), (700, 8192)]
    cases = [(s, sizes[(3 * i + j) % len(sizes)], (i + j) % 4 != 3) for i, s in enumerate(SCHEMES) for j in range(4)]
    cases += [(SCHEMES[0], size, gather) for size in sizes for gather in (True, False)]
    seen, prepared = [], []
    for i, (scheme, (tokens, hidden), gather) in enumerate(cases):
        dtype = torch.float16 if i % 3 == 2 else torch.bfloat16
        calls = make_calls(world, tokens, hidden, *scheme, dtype=dtype, seed=i, gemma=i % 2 == 1, residual=i % 4 != 3)
        plain, share = calls[rank], -(-tokens // world)
        own = slice(rank * share, min(tokens, (rank + 1) * share))
        residual = plain.residual
        if residual is not None:
            mine = residual[own]
            residual = torch.cat([mine, mine.new_zeros(share - mine.shape[0], hidden)])
        name = plain.operator.replace("all_reduce", "reduce_scatter") + "_all_gather" * gather
        known = {**vars(plain), "operator": name, "residual": residual}
        call = ShardCall(**known, gather=gather, all_rows=gather and not plain.scheme)
        out = sharded(channel, call)
        (norm, h), (plain_norm, plain_h) = reference(calls), unfused(calls)
        what = f"{name} {scheme} {tokens} x {hidden} {dtype}"
        if own.stop > own.start:
            count = own.stop - own.start
            assert error(out.own_norm[:count], norm[own]) <= 1.25 * error(plain_norm[own], norm[own]), what
            assert error(out.reduced[:count], h[own]) <= 1.25 * error(plain_h[own], h[own]), what
        if gather and not plain.scheme:
            assert error(out.norm, norm) <= 1.25 * error(plain_norm, norm), what
        if plain.scheme and (gather or own.stop - own.start == share):
            which = slice(0, tokens) if gather else own
            want_q, want_scales = quantize(plain_norm[which], plain.scale, *scheme)
            assert out.scales.shape == want_scales.shape and out.scales.stride() == want_scales.stride(), what
            got = dequantize(out.q, out.scales, plain.scale, *scheme)
            best = dequantize(want_q, want_scales, plain.scale, *scheme)
            assert error(got, norm[which]) <= 1.25 * error(best, norm[which]), what
        if gather:
            seen.append(digest((out.q, out.scales, out.norm)))
        prepared.append((call, [o.clone() for o in out]))
    same_everywhere(world, seen)
    torch.use_deterministic_algorithms(False)
    generator, own_pace = random.Random(0), random.Random(rank)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(fewer(3000)):
        call, wanted = generator.choice(prepared)
        if own_pace.random() < 0.05:
            torch.cuda._sleep(own_pace.randrange(200_000))
        out = sharded(channel, replace(call))
        for got, want in ((out.reduced, wanted[4]), (out.own_norm, wanted[3]), (out.norm, wanted[2])):
            wrong += (got != want).sum()
        wrong += (out.q.view(torch.uint8) != wanted[0].view(torch.uint8)).sum()
    assert int(wrong) == 0
    return len(cases)


def test_sharded() -> None:
    run_spawned(sharded_cases, WORLD, environment=SHARED, keep=True, timeout=250)
