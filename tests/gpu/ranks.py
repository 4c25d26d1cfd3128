"""How many ranks the tests have, and on which GPU each is.

As many as there are GPUs, or `TPFUSE_TEST_WORLD`; two at least.  With fewer GPUs than ranks the ranks share them, a process each:
the GPU goes round the processes that have work, a few milliseconds to each, so a kernel that waits for a peer holds the others up
for no longer than that.  NCCL refuses two ranks on one GPU: what needs it has `own_gpus`.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tpfuse.runtime import detect

GPUS = torch.cuda.device_count()
WORLD = max(2, int(os.environ.get("TPFUSE_TEST_WORLD", GPUS)))
SHARING = -(-WORLD // max(1, GPUS))  # ranks of one GPU
SHARED = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"} if SHARING > 1 else {}  # of the environment of ranks
own_gpus = pytest.mark.skipif(SHARING > 1, reason="needs a GPU for each rank")


def use_gpu(rank: int) -> torch.device:
    """Make the GPU of a rank the current one, with a context: processes that make theirs at once take seconds, which count
    against no bound where this comes before the ranks meet."""
    device = torch.device("cuda", rank % GPUS)
    torch.cuda.set_device(device)
    torch.cuda.synchronize()
    return device


def reach_peers() -> None:
    """Let compiled graphs of this process take the kernels between ranks where these share a GPU too: that its memory is within
    their reach is nothing that devices tell."""
    found = detect._detect
    if SHARING > 1:
        detect._detect = functools.cache(lambda device, world: replace(found(device, world), peer_access=True))


def fewer(count: int) -> int:
    """`count` calls back to back, or as many as end in time where ranks share a GPU: each then waits until the GPU has gone round
    its processes, once for each wait of the call."""
    return count if SHARING == 1 else min(count, max(50, count // (5 * SHARING)))


def run_script(name: str, *arguments: str) -> tuple[str, int]:
    """Run a file of this folder in a process for each rank with the arguments rank, world, port and these, until rank 0 ends;
    → what rank 0 says, and its exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script, root = Path(__file__).with_name(name), Path(__file__).parents[2]
    environment = {**os.environ, **SHARED, "PYTHONPATH": f"{root / 'src'}:{root}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(WORLD), str(port), *arguments], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        said = ranks[0].communicate(timeout=90)[0]
        return said, ranks[0].returncode
    finally:
        for process in ranks:
            process.kill()
            process.wait()
