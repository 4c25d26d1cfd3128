"""One rank of a group whose last rank stops calling; started by test_gemm_ranks.py.  Arguments: rank, world, port, operator,
algorithm."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist


def main(rank: int, world: int, port: int, operator: str, algorithm: str) -> None:
    from tests.gpu import problems
    from tests.gpu.ranks import use_gpu
    from tpfuse.runtime.workspaces import prepare_gather, prepare_scatter

    use_gpu(rank)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    for prepare in (prepare_scatter, prepare_gather):
        prepare(group, 64, 1024, timeout=5.0)
    if operator == "matmul_reduce_scatter":
        problem = problems.scatter(rank, world, group, 9, 64, 1024, torch.bfloat16, False, 0)
    else:
        problem = problems.gather(rank, world, group, 9, 1024, (64,), torch.bfloat16, False, False, 0)
    launch = problem.launcher(algorithm)
    for _ in range(3):
        problem.check(launch(), algorithm)
    if rank == world - 1:
        store.get("forever")
    launch()
    torch.cuda.synchronize()
    print("finished", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
