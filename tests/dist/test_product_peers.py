"""Peers of products next to collectives against the operators' bodies, over gloo: rows that the ranks divide and others.  torch's
fused operators run by the forms that it has for other devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tpfuse import shim
from tpfuse.ir import overlap
from tpfuse.ir.op import load
from tpfuse.lowering import product_peers as _registered  # noqa: F401

OPS = (overlap.matmul_reduce_scatter, overlap.scaled_matmul_reduce_scatter, overlap.all_gather_matmul,
       overlap.all_gather_scaled_matmul)  # fmt: skip


def served(rank: int, world: int, name: str) -> int:
    """How many cases the kernel served as the body does."""
    if name == "torch:fused":
        import torch.distributed._symmetric_memory as symmetric

        library = torch.library.Library("symm_mem", "IMPL")
        for op in ("matmul_reduce_scatter", "scaled_matmul_reduce_scatter", "all_gather_matmul", "all_gather_scaled_matmul"):
            library.impl(f"fused_{op}", getattr(symmetric, f"_fused_{op}_fallback"), "CPU")
    group, done = dist.group.WORLD.group_name, 0  # type: ignore[union-attr]
    for op in OPS[:-1] if name == "torch:fused" else OPS:  # that form of the last one gathers FP8, which gloo does not move
        scaled = "scheme" in op.params
        for tokens in (12, 7, 1):
            for scheme in ("fp8_tensor", "fp8_token") if scaled and shim.CPU_ROW_SCALES else ("fp8_tensor",):
                dtype = torch.float32 if not scaled else torch.bfloat16
                args: dict[str, Any] = op.sample(
                    tokens=tokens, hidden=64, dtype=dtype, rank=rank, group=group, scheme=scheme, layout="row"
                )  # fmt: skip
                if name == "torch:fused" and not scaled:
                    args |= {"biases": [None, None]} if "biases" in args else {"bias": None}
                if "rows" in args:
                    args["rows"] = tokens * world - 1
                (kernel,) = [k for k in op.kernels if k.name == name]
                got, want = load(kernel.launch)(*args.values(), alive=(True,)), op.reference(*args.values())
                pairs = list(zip(got, want, strict=True)) if isinstance(want, list) else [(got, want)]
                for mine, body in pairs:
                    assert mine.shape == body.shape and mine.dtype == body.dtype, (op.name, tokens, scheme)
                    torch.testing.assert_close(mine.float(), body.float(), rtol=1e-2, atol=1e-5)
                done += len(pairs)
    return done


@pytest.mark.parametrize("name", ["nccl", "torch:fused"])
@pytest.mark.parametrize("ranks", [2, 3], indirect=True)
def test_peers_do_what_the_bodies_say(ranks: Any, name: str) -> None:
    pytest.importorskip("triton")
    assert min(ranks.run(served, name, timeout=110)) >= (15 if name == "torch:fused" else 24)
