"""A compiled model with the kernels of the GPU from end to end: the chain model, all-reduced in the small range, in the large one
with its residual sharded and every product overlapped.

As many ranks as there are GPUs, at least two, which share one where there is but one (see ranks.py).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from tests.dist.chain import SCHEMES, Chain
from tests.gpu.ranks import SHARED, WORLD, reach_peers, use_gpu
from tests.kernels.spawned import run_spawned

pytest.importorskip("triton")
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(300)]
HIDDEN, INNER, SMALL = 1024, 512, 64
ALGORITHMS = [("chunked", "chunked"), ("plain", "push")]


def chain(rank: int, scheme: str) -> Chain:
    model = Chain(dist.group.WORLD.group_name, rank, scheme, torch.bfloat16, HIDDEN, INNER)  # type: ignore[union-attr]
    held = (model.norms, model.layers, model.scale)
    model.norms, model.layers, model.scale = pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), held)
    return model


def rows(rank: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 10 * tokens + rank)
    return (torch.randn(tokens, HIDDEN, generator=generator) * 3e-3).bfloat16().cuda()


@functools.cache
def gather_by_cpu() -> torch.library.Library:
    """Let gloo gather copies on the CPU: its own gather of CUDA tensors ends in a segmentation fault (torch 2.11)."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor

    def copied(x: torch.Tensor, world: int, group: str) -> torch.Tensor:
        return torch.ops._c10d_functional.wait_tensor(gather(x.cpu(), world, group)).to(x.device)

    library = torch.library.Library("_c10d_functional", "IMPL", "CUDA")
    library.impl("all_gather_into_tensor", copied)
    library.impl("all_gather_into_tensor_out", lambda x, world, group, out: out.copy_(copied(x, world, group)))
    return library


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def measure(rank: int, world: int, scheme: str, table: str) -> dict[str, Any]:
    """Errors fused and unfused by token count, results as bytes, kernels by range, and whether replays gave what calls give."""
    import tpfuse
    from tests.dist.test_chain import LARGE
    from tests.dist.test_chain import SMALL as ALL_REDUCED

    use_gpu(rank)
    reach_peers()
    gather_by_cpu()
    torch._dynamo.reset()
    model = chain(rank, scheme)
    ranges = {SMALL: {"passes": ALL_REDUCED}, 1024: {"passes": LARGE}}
    with torch.no_grad():
        fused = tpfuse.compile(model, {"ranges": ranges, "max_tokens": 1024, "table": table}, fullgraph=True)
        errors, data = {}, []
        for tokens in (24, 129, 7, 64, 700, 129):
            x = rows(rank, tokens)
            torch._dynamo.mark_dynamic(x, 0)  # and nothing else: the weights are no parameters
            got, exact = fused(x), model.true(x)
            errors[tokens] = error(got, exact), error(model(x), exact)
            data.append(got.view(torch.uint8).cpu().numpy().tobytes())
        x, graph = rows(rank, 24), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(x)
        same = []
        for seed in range(1, 6):
            x.copy_(rows(rank, 24, seed))
            out.fill_(float("nan"))
            graph.replay()
            replayed = out.clone()
            same.append(torch.equal(replayed, fused(x)))
    kernels = {str(r.range): [e.attributes["kernel"] for e in r.events if e.status == "lowered"] for r in fused.report.results}
    ops = {str(r.range): r.ops for r in fused.report.results}
    return {"errors": errors, "data": data, "same": same, "kernels": kernels, "ops": ops, "report": str(fused.report)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_ranges(scheme: str, tmp_path: Path) -> None:
    from tpfuse.measure.trace import overlapped

    table = tmp_path / "table.json"
    overlapped(WORLD, *ALGORITHMS[SCHEMES.index(scheme) % 2]).save(table)
    results = run_spawned(measure, WORLD, scheme, str(table), environment=SHARED, keep=True, timeout=280)
    for found in results:
        for tokens, (fused, unfused) in found["errors"].items():
            assert fused <= 1.25 * unfused and unfused < 0.2, f"{tokens} tokens: error {fused:.3g}, unfused {unfused:.3g}"
        assert found["data"] == results[0]["data"] and found["data"][1] == found["data"][5], "ranks, or two calls, differ"
        assert all(found["same"]), found["same"]
        small, large = found["kernels"]["1..64"], found["kernels"]["65..1024"]
        assert len(small) >= 4 and all(kernel != "reference" for kernel in (*small, *large)), found["report"]
        assert sum("matmul_reduce_scatter_add_rms_norm" in op for op in found["ops"]["65..1024"]) == 3, found["report"]
        assert not [op for op in found["ops"]["1..64"] if "scatter" in op or op == "all_reduce"], found["report"]
