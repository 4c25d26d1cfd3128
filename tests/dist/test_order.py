"""Collectives run in program order on every rank, under real Inductor, whatever the graphs around them look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tpfuse
from tests.models import Norm
from tpfuse.testing import RankPool

HIDDEN = 32


def reduced(x: Tensor) -> Tensor:
    return collectives.all_reduce(x, "sum", dist.group.WORLD)


def program(rank: int, norm: Norm, x: Tensor, y: Tensor, z: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """Two independent all-reduces, then a fused one.  What stands around them needs the least memory in an order of its own
    on ranks 0 (second, fused, first) and 1 (fused, first, second)."""
    a = reduced(x.repeat(10, 1).exp())
    b = reduced(y.repeat(10, 1).exp())
    if rank == 0:
        z = z * b.mean()
    h = residual + reduced(z)
    out = norm(h)
    if rank == 0:
        return a.mean(), out, h
    if rank == 1:
        return a * b.mean(), out, h
    return a + 1, b * 2, out, h


def execute(rank: int, world: int) -> tuple[list[int], dict[str, int], float]:
    """The rows of the collectives in the order in which they ran, the report's counts, and the largest difference from eager."""
    torch.manual_seed(rank)
    norm = Norm(HIDDEN)
    inputs = [torch.randn(rows, HIDDEN) * 0.1 for rows in (4, 6, 5, 5)]
    with torch.no_grad():
        expected = program(rank, norm, *inputs)
        compiled = tpfuse.compile(lambda *args: program(rank, norm, *args), fullgraph=True)
        compiled(*inputs)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
            got = compiled(*inputs)
    difference = max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))
    calls = sorted((e for e in trace.events() if e.name.startswith("tpfuse::all_reduce")), key=lambda e: e.time_range.start)
    rows = [next(shape[0] for shape in call.input_shapes if len(shape) == 2) for call in calls]
    return rows, compiled.report.counts(), difference


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_order_is_the_programs(ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # Inductor's scheduler has to run
    results: list[Any] = ranks.run(execute, timeout=380)
    for rows, counts, difference in results:
        assert rows == [40, 60, 5]
        assert counts == {"all_reduce": 2, "all_reduce_add_rms_norm": 1}
        assert difference < 1e-5
