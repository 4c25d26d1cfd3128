"""Products next to collectives, ranks simulated on one GPU: worlds beyond the GPUs that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    from tests.gpu import problems
    from tpfuse.kernels import product_gather, product_scatter
    from tpfuse.kernels.operands import Rows, operands, plain
    from tpfuse.kernels.plan import REGION_HEAD, RegionLayout
    from tpfuse.kernels.regions import GATHER, SCATTER, Region


class Regions:
    """A region and a stream for each of `world` ranks; plain allocations for buffers."""

    def __init__(self, kind: str, world: int, max_tokens: int, hidden: int) -> None:
        layout = RegionLayout.of(world, max_tokens, hidden, 2, kind == GATHER)
        self.buffers = [torch.full((layout.total,), -1, dtype=torch.int8, device="cuda") for _ in range(world)]
        # Few blocks: those that wait must leave room for the other ranks' products.
        self.regions = [Region.create(rank, world, layout, 2, {"timeout": 10.0}) for rank in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]
        self._connect()

    def _connect(self) -> None:
        for region in self.regions:
            region.connect(self.buffers)
        torch.cuda.synchronize()

    def __call__(self, launches: list[Callable[[Region], Any]]) -> list[Any]:
        """Each rank's launch beside the others.  Rehearsed first with flags that are always up: loading a kernel waits for the
        whole device, so it must not happen while another rank's kernel waits for this one."""
        for region, stream, launch in zip(self.regions, self.streams, launches, strict=True):
            for buffer in self.buffers:
                buffer[:REGION_HEAD].view(torch.int32).fill_(1 << 30)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                launch(region)
            torch.cuda.synchronize()
        self._connect()
        results = []
        for _ in range(3):
            results.clear()
            for region, stream, launch in zip(self.regions, self.streams, launches, strict=True):
                with torch.cuda.stream(stream):
                    results.append(launch(region))
        torch.cuda.synchronize()
        return results


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 50, 129])
def test_scatter(world: int, tokens: int) -> None:
    made = [problems.scatter(rank, world, "", tokens, 128, 1024, torch.bfloat16, True, 2) for rank in range(world)]

    def launch(problem: Any) -> Callable[[Region], Any]:
        rows, product = operands(problem.args[:3])
        call = product_scatter.sum_of("matmul_reduce_scatter", rows, product, "")
        return lambda region: [product_scatter.chunked(region, rows, product, call).reduced]

    for problem, results in zip(made, Regions(SCATTER, world, 60, 1024)([launch(p) for p in made]), strict=True):
        problem.check(results, "chunked")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world", [4, 6])
def test_copies_that_come_late(world: int) -> None:
    """Products of later ranks' rows are done long before the first copy runs.

    Seven ranks and more have too many streams for one process: some share a queue of the hardware, where one rank's wait
    stands before what another would end it with.
    """
    made = [problems.scatter(rank, world, "", 256, 128, 1024, torch.bfloat16, True, 2) for rank in range(world)]

    def launch(problem: Any) -> Callable[[Region], Any]:
        rows, product = operands(problem.args[:3])
        call = product_scatter.sum_of("matmul_reduce_scatter", rows, product, "")

        def run(region: Region) -> list[Any]:
            with torch.cuda.stream(region.copies):
                torch.cuda._sleep(2_000_000)
            return [product_scatter.chunked(region, rows, product, call).reduced]

        return run

    for problem, results in zip(made, Regions(SCATTER, world, 256, 1024)([launch(p) for p in made]), strict=True):
        problem.check(results, "chunked")


@pytest.mark.parametrize("algorithm", ["chunked", "push"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 50, 129])
def test_gather(algorithm: str, world: int, tokens: int) -> None:
    made = [problems.gather(rank, world, "", tokens, 1024, (128, 64), torch.bfloat16, True, True, 2) for rank in range(world)]

    def launch(problem: Any) -> Callable[[Region], Any]:
        x, weights, biases = problem.args[:3]
        products = [plain(x, weight, bias)[1] for weight, bias in zip(weights, biases, strict=True)]
        run = getattr(product_gather, algorithm)
        return lambda region: run(region, "all_gather_matmul", Rows(x), products, tokens, True)

    for problem, results in zip(made, Regions(GATHER, world, 60, 1024)([launch(p) for p in made]), strict=True):
        problem.check(results, algorithm)
