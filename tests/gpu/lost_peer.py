"""One rank of a group in which something goes wrong; started by test_workspace.py.  Arguments: rank, world, port,
case, module of the kernel."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import torch
import torch.distributed as dist


def main(rank: int, world: int, port: int, case: str, module: str) -> None:
    from tests.gpu.ranks import use_gpu
    from tpfuse.runtime.workspaces import prepare, release

    kernels = importlib.import_module(f"tpfuse.kernels.{module}")

    use_gpu(rank)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    if case == "sizes":
        prepare(group, 64, 1024 + 1024 * rank, timeout=5.0)
    if case == "absent" and rank == world - 1:
        return
    prepare(group, 4 if case == "wide" else 64, 1024, timeout=5.0)
    tokens = 4

    def call(hidden: int = 1024) -> torch.Tensor:
        x = torch.ones(tokens, hidden, dtype=torch.bfloat16, device="cuda")
        args = (x, x, None, None, 1.0, 1e-6, 0.0, "cast_first", group)
        return kernels.all_reduce_add_rms_norm(*args, alive=(True, True))[1]

    for _ in range(3):
        assert call()[0, 0].item() == world + 1
    if case == "wide":
        call(8192)
    if case == "released":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        release(group)
        graph.replay()
        torch.cuda.synchronize()
    if rank == world - 1:
        if case == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "silent":
            store.get("forever")
        tokens = 2 if case == "shapes" else 4
    call()
    torch.cuda.synchronize()
    print("finished", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
