"""Time the fused all-reduce + add + norm (+ quantise) against its peers, a process and a GPU per rank.

    python benchmarks/collectives.py --world 2 --tokens 1 8 64 512 --hidden 4096 8192 --scheme bf16 fp8_tensor fp8_group128 \\
        --out benchmarks/results/collectives-h100-2.json

Every point is one CUDA graph of `CALLS` calls for each implementation; the graphs are replayed in turn, all ranks in step,
and a sample is the slowest rank's time.  `tpfuse:one_shot` is measured twice (A/A): their difference is the noise.
`limit_us`: the bytes that each rank must send by the best algorithm, at 380 GB/s, and what it must read and write.
With fewer GPUs than ranks the ranks take turns on one: that shows that everything runs, its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Timer, environment, write
from norm_quant import mark_tokens, plain_norm, scale_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.kernels.spawned import run_spawned  # noqa: E402

CALLS = 12
NVLINK = 380e9
HBM = 4.0e12
LAYOUTS = {"fp8_tensor": "row", "fp8_token": "row", "fp8_group128": "row", "nvfp4": "linear"}


def implementations(group: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scheme: str) -> dict[str, Any]:
    """Functions of the call's index, by name; those that cannot run here are left out."""
    from tpfuse.kernels import calls, workspace
    from tpfuse.kernels.allreduce_norm import one_shot
    from tpfuse.kernels.two_shot import two_shot

    scale, channel = scale_of(scheme), workspace.channel_of(group.group_name)
    common = (x, residual, weight, None)
    if scheme == "bf16":
        call = calls.all_reduce_add_rms_norm(*common, 1.0, 1e-6, 0.0, "cast_first", "", alive=(True, True))
    else:
        call = calls.all_reduce_add_rms_norm_quantize(
            *common, scale, 1.0, 1e-6, 0.0, "cast_first", scheme, LAYOUTS[scheme], "", alive=(True, True, False, True)
        )
    found: dict[str, Callable[[int], Any]] = {
        "tpfuse:one_shot": lambda i: one_shot(channel, call),
        "tpfuse:one_shot (A/A)": lambda i: one_shot(channel, call),
        "tpfuse:two_shot": lambda i: two_shot(channel, call),
        "tpfuse:one_shot (not early)": lambda i: one_shot(replace(channel, early=False), call),
    }
    norm = compiled_norm(scheme)
    symmetric = torch.ops.symm_mem
    buffer = torch.distributed._symmetric_memory.empty(x.numel(), dtype=x.dtype, device=x.device)
    torch.distributed._symmetric_memory.rendezvous(buffer, group)
    name = group.group_name

    def symm_one_shot(i: int) -> Any:
        buffer.copy_(x.view(-1))
        return norm(symmetric.one_shot_all_reduce(buffer, "sum", name).view_as(x), residual, weight, scale)

    def symm_two_shot(i: int) -> Any:
        buffer.copy_(x.view(-1))
        return norm(symmetric.two_shot_all_reduce_(buffer, "sum", name).view_as(x), residual, weight, scale)

    def nccl(i: int) -> Any:
        reduced = x.clone()
        dist.all_reduce(reduced, group=group)
        return norm(reduced, residual, weight, scale)

    found |= {"torch_symm_one_shot+norm": symm_one_shot, "torch_symm_two_shot+norm": symm_two_shot}
    if dist.get_backend(group) == "nccl":
        found["nccl+inductor"] = nccl
    return found


def compiled_norm(scheme: str) -> Callable[..., Any]:
    if scheme == "bf16":
        return torch.compile(lambda r, h, w, s: plain_norm_only(r, h, w))
    return torch.compile(lambda r, h, w, s: plain_norm(r, h, w, s, scheme))


def plain_norm_only(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype), h


def limit_us(message: int, world: int) -> float:
    return max(2 * (world - 1) / world * message / NVLINK, 4 * message / HBM) * 1e6


def measure(rank: int, world: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    from tpfuse.ir.samples import rows, vector
    from tpfuse.runtime.workspaces import prepare

    torch.cuda.set_device(rank % torch.cuda.device_count())
    shared = torch.cuda.device_count() < world
    group: Any = dist.new_group(list(range(world)), backend="gloo" if shared else "nccl")
    prepare(group, max(options["tokens"]), max(options["hidden"]), timeout=60.0)
    timer = Timer(CALLS, options["trials"], step=dist.barrier)
    found: list[dict[str, Any]] = []
    for scheme in options["scheme"]:
        for hidden in options["hidden"]:
            for tokens in options["tokens"]:
                shape: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "dtype": torch.bfloat16, "device": "cuda"}
                x, residual, weight = rows(**shape, rank=rank), rows(**{**shape, "seed": 9}), vector(**shape)
                mark_tokens((x, residual))
                samples = timer.alternate(implementations(group, x, residual, weight, scheme))
                everyone: list[Any] = [None] * world
                dist.all_gather_object(everyone, samples)
                for impl in samples:
                    slowest = [max(values) for values in zip(*(s[impl] for s in everyone), strict=True)]
                    found.append(
                        {
                            "op": "all_reduce_add_rms_norm" + ("" if scheme == "bf16" else "_quantize"),
                            "scheme": "" if scheme == "bf16" else scheme, "dtype": "bfloat16", "tokens": tokens,
                            "hidden": hidden, "world": world, "impl": impl, **timer.summary(slowest),
                            "limit_us": limit_us(tokens * hidden * 2, world), "samples": slowest,
                        }
                    )  # fmt: skip
                if rank == 0:
                    last = {row["impl"]: row["us"] for row in found[-len(samples) :]}
                    print(f"{scheme:13} {tokens:5} x {hidden}: " + "  ".join(f"{k} {v:.1f}" for k, v in last.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 96, 128, 200, 256, 512, 700, 1024, 1500, 2048])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 5120, 8192])
    parser.add_argument("--scheme", nargs="+", default=["bf16", "fp8_tensor", "fp8_group128"], choices=["bf16", *LAYOUTS])
    parser.add_argument("--trials", type=int, default=15)
    parser.add_argument("--out", required=True)
    parser.add_argument("--commit", default="unknown", help="the git commit measured")
    args = parser.parse_args()
    shared = torch.cuda.device_count() < args.world
    settings = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"} if shared else {}
    search = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    found = run_spawned(measure, args.world, vars(args), environment={**settings, "PYTHONPATH": search}, timeout=3600)
    extra = {"commit": args.commit, **environment()}
    extra["machine"]["link"] = "one GPU shared: not a measurement" if shared else "NVLink"
    write(args.out, "collectives", args.world, found[0], extra)


if __name__ == "__main__":
    main()
