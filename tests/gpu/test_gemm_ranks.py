"""Products next to collectives between ranks (see ranks.py), a process each, on GPUs of their own or shared: arithmetic, turns,
poison, replay, lost peers."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.ranks import SHARED, WORLD, fewer, run_script, use_gpu
from tests.kernels.spawned import run_spawned

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(300)
ENVIRONMENT = {**SHARED, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # equal calls give equal bits, whatever stream they are on


def begin(rank: int, max_tokens: int, hidden: int) -> str:
    """Everything prepared for so many rows; more go in turns."""
    from tpfuse.runtime import workspaces

    use_gpu(rank)
    dist.barrier()  # the bound of a wait is for what follows
    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    for prepare in (workspaces.prepare, workspaces.prepare_scatter, workspaces.prepare_gather):
        prepare(group, max_tokens, hidden, timeout=20.0)
    return group


def poison(group: str) -> None:
    """NaN wherever rows of other ranks will lie, while no rank calls."""
    from tpfuse.kernels.plan import REGION_HEAD
    from tpfuse.kernels.regions import GATHER, SCATTER, region_of

    torch.cuda.synchronize()
    dist.barrier()
    for kind in (SCATTER, GATHER):
        region = region_of(kind, group)
        region.buffers[region.rank][REGION_HEAD:].fill_(-1)
    torch.cuda.synchronize()
    dist.barrier()


KINDS = ("scatters", "gathers", "scaled_scatters", "scaled_gathers", "with_norms")


def every_case(rank: int, world: int) -> dict[str, tuple[int, list[str]]]:
    """How many cases of each kind there were, and what was wrong."""
    from tests.gpu import problems

    group, outcome = begin(rank, 2100, 5120), {}
    for kind in KINDS:
        wrong, count = [], 0
        for problem, algorithm in getattr(problems, kind)(rank, world, group):
            count += 1
            poison(group)
            try:
                problem.check(problem.launcher(algorithm)(), algorithm)
            except Exception as error:
                wrong.append(f"{problem.name} {algorithm} {problem.what}: {error!r}")
        outcome[kind] = count, wrong
    return outcome


@functools.cache
def outcomes() -> list[dict[str, tuple[int, list[str]]]]:
    return run_spawned(every_case, WORLD, environment=ENVIRONMENT, keep=True, timeout=200)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_schemes_and_algorithms(kind: str) -> None:
    for count, wrong in (outcome[kind] for outcome in outcomes()):
        assert count >= 28 and not wrong, "\n".join(wrong)


def changed_inputs(rank: int, world: int) -> int:
    """What a call returned stays as it is when the next ones come."""
    from tests.gpu import problems

    group = begin(rank, 600, 4096)
    made = [
        problems.scatter(rank, world, group, 129, 256, 4096, torch.bfloat16, False, 1),
        problems.gather(rank, world, group, 129, 4096, (256,), torch.bfloat16, False, True, 2),
        problems.scaled_gather(rank, world, group, 129, 1024, (256,), "fp8_token", "row", False, True, 3),
        problems.with_norm(rank, world, group, "matmul_reduce_scatter_add_rms_norm", 129, 1024, "", "", 4),
    ]
    for problem in made:
        for algorithm in ("push" if "gather" in problem.name else "plain", "chunked"):
            changed = problem.args[0].view(torch.int8).flip(0).view(problem.args[0].dtype)  # other rows
            other = replace(problem, args=(changed, *problem.args[1:]))
            first = problem.launcher(algorithm)()
            seen = [t.clone() for t in first]
            second = other.launcher(algorithm)()
            other.launcher(algorithm)()
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, seen, strict=True))
            assert not torch.equal(first[0], second[0])
    return len(made)


def test_earlier_results_stay() -> None:
    run_spawned(changed_inputs, WORLD, environment=ENVIRONMENT, keep=True, timeout=100)


def back_to_back(rank: int, world: int, count: int) -> int:
    """Calls of changing size and algorithm without a pause, ranks slowed down at random; then graphs in mixed order."""
    from tests.gpu import problems

    group, generator, own = begin(rank, 600, 4096), random.Random(0), random.Random(rank)
    calls = []
    for i, tokens in enumerate((1, 5, 64, 129, 512, 700)):
        made = [
            problems.scatter(rank, world, group, tokens, 256, (1024, 4096)[i % 2], torch.bfloat16, i % 2 == 0, 50 * i),
            problems.gather(rank, world, group, tokens, (4096, 1024)[i % 2], (256, 64), torch.float16, False, i % 3 == 0, 50 * i),
        ]
        calls += [(p, a, p.launcher(a)) for p in made for a in problems.ALGORITHMS[p.name]]
    wanted = []
    for problem, algorithm, launch in calls:
        results = launch()
        problem.check(results, algorithm)
        wanted.append([t.clone() for t in results])
    torch.use_deterministic_algorithms(False)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def compare(index: int, results: list[Any]) -> None:
        for got, want in zip(results, wanted[index], strict=True):
            wrong.add_((got != want).sum())

    for _ in range(count):
        index = generator.randrange(len(calls))
        if own.random() < 0.05:
            torch.cuda._sleep(own.randrange(400_000))
        compare(index, calls[index][2]())
    assert int(wrong) == 0
    graphs = []
    for _ in range(4):
        chosen = [generator.randrange(len(calls)) for _ in range(5)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [calls[index][2]() for index in chosen]
        graphs.append((graph, chosen, outputs))
    for step in range(fewer(100)):
        graph, chosen, outputs = graphs[generator.randrange(4)]
        for results in outputs:
            for t in results:
                t.fill_(float("nan"))
        if own.random() < 0.2:
            torch.cuda._sleep(own.randrange(400_000))
        graph.replay()
        for index, results in zip(chosen, outputs, strict=True):
            compare(index, results)
        if step % 7 == 0:
            compare(step % len(calls), calls[step % len(calls)][2]())
    assert int(wrong) == 0
    return count


def test_back_to_back_and_replay() -> None:
    run_spawned(back_to_back, WORLD, fewer(2_000), environment=ENVIRONMENT, keep=True, timeout=150)


def release_and_restore(rank: int, world: int) -> None:
    from tests.gpu import problems
    from tpfuse.runtime import workspaces

    group = begin(rank, 64, 1024)
    made = [
        problems.scatter(rank, world, group, 33, 64, 1024, torch.bfloat16, True, 1),
        problems.gather(rank, world, group, 33, 1024, (64,), torch.bfloat16, True, True, 2),
    ]
    launches, graph = [(p, a, p.launcher(a)) for p in made for a in problems.ALGORITHMS[p.name]], torch.cuda.CUDAGraph()
    for _, _, launch in launches:
        launch()
    torch.use_deterministic_algorithms(False)
    with torch.cuda.graph(graph):
        captured = [launch() for _, _, launch in launches]
    for prepare in (workspaces.prepare, workspaces.prepare_scatter, workspaces.prepare_gather):
        prepare(group, 128, 1024, timeout=20.0)  # enlarged: the graph keeps what it was captured with
    for _ in range(3):
        for results in captured:
            for t in results:
                t.fill_(float("nan"))
        graph.replay()
        for (problem, algorithm, launch), results in zip(launches, captured, strict=True):
            problem.check(results, algorithm)
            problem.check(launch(), algorithm)
    for turn in range(2):
        for problem in made:
            for algorithm in problems.ALGORITHMS[problem.name]:
                problem.check(problem.launcher(algorithm)(), algorithm)
        if turn == 0:
            workspaces.release(group)
            with pytest.raises(RuntimeError, match="region"):
                made[0].launcher("chunked")()
            workspaces.restore(group)


def test_release_and_restore() -> None:
    run_spawned(release_and_restore, WORLD, environment=ENVIRONMENT, keep=True, timeout=100)


LOST = [("matmul_reduce_scatter", "chunked"), ("all_gather_matmul", "chunked"), ("all_gather_matmul", "push")]


@pytest.mark.parametrize("operator, algorithm", LOST)
def test_a_peer_that_does_not_come_is_named(operator: str, algorithm: str) -> None:
    """Within the bound of 5 s, start-up and compilation aside."""
    said, code = run_script("lost_product.py", operator, algorithm)
    assert f"{operator}: rank 0 waited in vain for rank {WORLD - 1} (call 3 of its channel)" in said, said
    assert code != 0 and "finished" not in said
