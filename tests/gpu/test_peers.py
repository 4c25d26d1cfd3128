"""Other people's all-reduces as back ends, between GPUs: right within the bound that our own kernels have, whatever the size."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.ranks import WORLD, own_gpus
from tests.gpu.test_ranks import digest, same_everywhere
from tests.kernels.spawned import run_spawned

pytest.importorskip("triton")
pytestmark = [own_gpus, pytest.mark.timeout(400)]
SCHEMES = [("", ""), ("fp8_tensor", "row"), ("fp8_group128", "col+tma+ue8m0_packed"), ("fp8_token", "row")]
SIZES = [(1, 4096), (3, 1040), (33, 5120), (129, 8192), (700, 4096)]  # the last in several launches
ROOM = (256, 8192)


def served(rank: int, world: int, name: str) -> int:
    """How many cases the kernel served, each of them right."""
    from tests.gpu.test_allreduce_norm import check, make_calls
    from tpfuse.ir import fused
    from tpfuse.ir.op import load
    from tpfuse.kernels.calls import Outputs
    from tpfuse.lowering import select as _registered  # noqa: F401, the kernels
    from tpfuse.runtime.detect import detect

    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    group: Any = dist.new_group(backend="nccl")
    target = detect("cuda", group.group_name)
    done, seen = 0, []
    for i, (scheme, layout) in enumerate(SCHEMES):
        op = fused.all_reduce_add_rms_norm_quantize if scheme else fused.all_reduce_add_rms_norm
        (kernel,) = [k for k in op.kernels if k.name == name]
        for j, (tokens, hidden) in enumerate(SIZES):
            dtype = torch.float16 if j % 3 == 2 else torch.bfloat16
            calls = make_calls(world, tokens, hidden, scheme, layout, dtype=dtype, seed=5 * i + j, gemma=j % 2 == 1)
            given = {p: getattr(calls[rank], p) for p in op.params} | {"group": group.group_name}
            if kernel.supports(given, target) is not None or (scheme.startswith("fp8_group") and hidden % 128):
                continue
            if kernel.prepare:
                load(kernel.prepare)(group, *ROOM)
            if name.startswith("flashinfer") and "packed" in layout and tokens * hidden > ROOM[0] * ROOM[1]:
                continue  # packed scales cannot be cut into launches
            out = op.launcher(name)(*given.values(), alive=(True,) * op.results)
            outputs = Outputs(*out) if scheme else Outputs(out[0].new_empty(0), out[0].new_empty(0), *out)
            try:
                check([outputs], calls)
            except AssertionError as error:
                raise AssertionError(f"{name} {scheme} {tokens} x {hidden} {dtype}: {error}") from error
            seen.append(digest(outputs))
            done += 1
    same_everywhere(world, seen)
    return done


@pytest.mark.parametrize("name", ["nccl", "torch:one_shot", "torch:two_shot", "flashinfer:one_shot"])
def test_back_ends(name: str) -> None:
    if name.startswith("flashinfer") and importlib.util.find_spec("flashinfer") is None:
        pytest.skip("FlashInfer is not installed")
    least = {"nccl": 19, "flashinfer:one_shot": 12}.get(name, 15)  # torch sums no float16
    assert all(n >= least for n in run_spawned(served, WORLD, name, environment={}, keep=True, timeout=300))
