"""What the profiler sees of a layer whose residual stays sharded: products, copies and what tpfuse launches, and nothing between.

A plain layer is looked at the same way, so that a test that sees nothing fails.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.kernels.spawned import run_spawned

pytest.importorskip("triton")
pytestmark = [pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"), pytest.mark.timeout(300)]
WORLD, TOKENS = 2, 2048
NORMS = ("norm", "rsqrt", "mean", "pow")


def traced(rank: int, world: int, scheme: str, scatter: str, gather: str, folder: str) -> dict[str, list[dict[str, Any]]]:
    """The kernels of a layer, plain and by tpfuse."""
    from tpfuse.measure import trace
    from tpfuse.measure.e2e import FORCED, PLAIN, Variants
    from tpfuse.measure.stack import Shape, Stack

    torch.cuda.set_device(rank)
    group: Any = dist.new_group(backend="nccl")
    table = Path(folder) / f"{rank}.json"
    trace.overlapped(world, scatter, gather).save(table)
    variants = {v.name: v for v in Variants(group, scheme, str(table), TOKENS).prefill()}

    def make(layers: int) -> Stack:
        torch.manual_seed(rank)
        return Stack(Shape(2048, 7168, 16, 8), layers, world, torch.bfloat16, scheme=scheme)

    return {name: trace.of_a_layer(make, variants[name], TOKENS) for name in (PLAIN, FORCED)}


@functools.cache
def layers(scheme: str, scatter: str, gather: str, folder: str) -> dict[str, list[dict[str, Any]]]:
    return run_spawned(traced, WORLD, scheme, scatter, gather, folder, environment={}, keep=True, timeout=280)[0]


@pytest.mark.parametrize(("scatter", "gather"), [("chunked", "chunked"), ("plain", "push")])
@pytest.mark.parametrize("scheme", ["", "fp8_tensor"])
def test_a_layer(scheme: str, scatter: str, gather: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tpfuse.measure.e2e import FORCED, PLAIN

    found = layers(scheme, scatter, gather, str(tmp_path_factory.mktemp("tables")))
    told = "\n".join(f"{name}: {r['count']} × {r['kernel']} ({r['kind']})" for name, rows in found.items() for r in rows)
    plain, own = by_kind(found[PLAIN]), by_kind(found[FORCED])
    chunked, unquantised = scatter == "chunked", scheme == ""
    assert sum(r["count"] for r in plain["NCCL"] if "AllReduce" in r["kernel"]) == 2, told
    assert count(plain["Inductor"]) >= 3, told  # two norms and the activation, and what quantises
    assert set(own) - {"copy"} == {"product", "tpfuse", "Inductor", *["attention"] * unquantised}, told
    assert "copy" in own or not chunked, told
    (activation,) = own["Inductor"]
    assert activation["count"] == 1 and not any(word in activation["kernel"] for word in NORMS), told
    launched = {r["kernel"]: r["count"] for r in own["tpfuse"]}
    assert launched["reduce" if chunked else "sharded"] == 2, told
    assert launched.get("attention_kernel", 0) == (not unquantised), told
    assert not {"norm_kernel", "act_kernel", "one_shot", "one_shot_kernel", "two_shot_kernel"} & set(launched), told
    assert count(own["product"]) >= (4 * WORLD if chunked else 4), told


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}


def count(rows: list[dict[str, Any]]) -> float:
    return sum(row["count"] for row in rows)
