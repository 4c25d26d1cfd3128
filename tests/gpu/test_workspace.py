"""Workspaces over torch symmetric memory, a process per rank.  With fewer GPUs than ranks the ranks share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.ranks import SHARED, WORLD, run_script, use_gpu
from tests.kernels.spawned import run_spawned


def use(rank: int, world: int) -> list[float]:
    """Prepare, call, enlarge, call, release, restore, replay an older graph, enlarge, replay; two groups, two channels."""
    from tpfuse.kernels import allreduce_norm, two_shot, workspace

    use_gpu(rank)
    whole: Any = dist.group.WORLD
    other: Any = dist.new_group(list(range(world)))
    workspace.prepare(whole, 16, 1024)
    workspace.prepare(other.group_name, 16, 1024, channels=1)
    x = torch.full((4, 1024), float(rank + 1), dtype=torch.bfloat16, device="cuda")

    def call(group: Any, module: Any, rows: torch.Tensor) -> torch.Tensor:
        args = (rows, rows * 0, None, None, 1.0, 1e-6, 0.0, "cast_first", group.group_name)
        return module.all_reduce_add_rms_norm(*args, alive=(False, True))[1]

    seen = []
    for module in (allreduce_norm, two_shot):
        for group in (whole, other):
            seen.append(call(group, module, x)[3, 1000].item())
    workspace.prepare(whole, 64, 2048)
    wide = x.repeat(9, 2)
    seen.append(call(whole, two_shot, wide)[35, 2000].item())
    with workspace.on_channel(1):
        seen.append(call(whole, allreduce_norm, wide)[35, 2000].item())

    zeros = torch.zeros_like(wide)
    for module in (allreduce_norm, two_shot) * 10:  # nothing between the launches: each begins while the one before ends
        args = (wide, zeros, None, None, 1.0, 1e-6, 0.0, "cast_first", whole.group_name)
        last = module.all_reduce_add_rms_norm(*args, alive=(False, True))[1]
    seen.append(last[35, 2000].item())

    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(whole, allreduce_norm, static)
    graph.replay()
    seen.append(out[0, 0].item())
    workspace.release(whole)
    with pytest.raises(RuntimeError, match="released"):
        call(whole, allreduce_norm, x)
    workspace.restore(whole)
    static.mul_(2)
    out.zero_()
    graph.replay()
    seen.append(out[0, 0].item() / 2)
    workspace.prepare(whole, 128, 4096)  # the graph keeps what it was captured with
    wider = torch.full((128, 4096), float(rank + 1), dtype=torch.bfloat16, device="cuda")
    for turn in range(3):
        static.div_(2)
        graph.replay()
        seen.append(out[0, 0].item() * 2**turn)
        seen.append(call(whole, allreduce_norm, wider)[127, 4000].item())
    with pytest.raises(RuntimeError, match="no workspace"):
        allreduce_norm.all_reduce_rms_norm(x, None, None, 1e-6, 0.0, "cast_first", "nobody", alive=(True, True))
    torch.cuda.synchronize()
    dist.barrier()
    return seen


def test_life_of_a_workspace() -> None:
    total = WORLD * (WORLD + 1) / 2
    for seen in run_spawned(use, WORLD, environment=SHARED, timeout=110):
        assert seen == [total] * 15


CASES = {
    "killed": f"rank 0 waited in vain for rank {WORLD - 1}",
    "silent": f"rank 0 waited in vain for rank {WORLD - 1}",
    "shapes": f"rank 0 waited in vain for rank {WORLD - 1}",
    "absent": rf"waited 5.0 s for ranks [{WORLD - 1}]",
    "sizes": "the ranks disagree",
    "wide": "prepare the group with hidden=8192",
    "released": "CUDA error",
}


ENDINGS = [(case, "allreduce_norm") for case in CASES]
ENDINGS += [(case, "cuda_norm") for case in ("killed", "shapes", "wide", "released")]


@pytest.mark.parametrize("case, module", ENDINGS)
def test_a_peer_that_fails_is_named(case: str, module: str) -> None:
    """Within the bound of 5 s, start-up and compilation aside, with no process left behind."""
    said, code = run_script("lost_peer.py", case, module)
    assert CASES[case] in said, said
    assert code != 0 and "finished" not in said
