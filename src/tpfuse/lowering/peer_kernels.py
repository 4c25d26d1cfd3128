"""Registers other people's all-reduces as back ends of the fused operators, and says why one cannot serve.  Imports no kernel.

    torch:one_shot, torch:two_shot    torch's symmetric memory, then our norm in one launch
    nccl                              NCCL, then our norm in one launch
    flashinfer:one_shot               FlashInfer's fused kernel, where the installed version has it

All are `on_request`: only a measured table or `Config(kernels=…)` picks them.  FlashInfer's two-shot is none of them: below 0.7.2
its barrier is unsafe, and at no size that was measured is it the fastest (benchmarks/results).
"""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

from tpfuse.formats import Layout, Scheme
from tpfuse.ir import fused
from tpfuse.ir.norm import Rounding
from tpfuse.ir.op import Args
from tpfuse.lowering.triton_kernels import collective_supports
from tpfuse.report import Decline
from tpfuse.target import Target

FLASHINFER_WORLDS = (2, 4, 8)
FLASHINFER_SINCE = "0.6.12"  # Gemma's weight_bias
TWO_SHOT_WORLDS = (2, 4, 8)
SYMMETRIC_DTYPES = (torch.bfloat16, torch.float32)


def reduced_supports(args: Args, target: Target) -> Decline | None:
    """For our norm behind any all-reduce."""
    if args.get("bias") is not None:
        return Decline("bias", "a bias after the reduction is not applied behind another library's all-reduce")
    if args.get("alpha", 1.0) != 1.0:
        return Decline("alpha", "a scaled reduction is not applied behind another library's all-reduce")
    return collective_supports(args, target)


def symmetric_supports(args: Args, target: Target) -> Decline | None:
    """For our norm behind torch's symmetric memory."""
    if args["x"].dtype not in SYMMETRIC_DTYPES:
        return Decline("dtype", f"torch's symmetric memory does not sum {args['x'].dtype}")
    return reduced_supports(args, target)


def two_shot_supports(args: Args, target: Target) -> Decline | None:
    """For torch's two-shot."""
    if target.world not in TWO_SHOT_WORLDS:
        return Decline("world_size", f"{target.world} ranks: torch's two-shot serves {TWO_SHOT_WORLDS}")
    return symmetric_supports(args, target)


def flashinfer_supports(args: Args, target: Target) -> Decline | None:
    """For FlashInfer's fused kernel."""
    version = target.versions.get("flashinfer")
    if version is None or TorchVersion(version) < FLASHINFER_SINCE:
        return Decline("flashinfer_version", f"needs FlashInfer {FLASHINFER_SINCE}, this is {version or 'none'}")
    if target.world not in FLASHINFER_WORLDS:
        return Decline("world_size", f"{target.world} ranks: FlashInfer serves {FLASHINFER_WORLDS}")
    if args["weight"] is None:
        return Decline("no_weight", "FlashInfer's norm has a weight")
    rounding = Rounding.parse(args["rounding"])
    if rounding.keep_f32 or rounding.low_bias:
        return Decline("rounding", f"FlashInfer's norm does not round as {args['rounding']}")
    return _row_shape(args, target) or (_scheme(args, target) if "scheme" in args else None) or reduced_supports(args, target)


def _row_shape(args: Args, target: Target) -> Decline | None:
    """A row is spread over a cluster of up to 8 blocks of up to 1,024 threads, 8 columns each."""
    threads = args["x"].shape[-1] // 8
    blocks = next(n for n in (8, 4, 2, 1) if threads % n == 0)
    if not target.world <= threads <= 1024 * blocks:
        return Decline("row_shape", f"rows of {args['x'].shape[-1]} do not spread over FlashInfer's {blocks} blocks of threads")
    return None


def _scheme(args: Args, target: Target) -> Decline | None:
    scheme = Scheme.parse(args["scheme"]).meaning()
    if scheme.name == "nvfp4":
        detail = "writes zeros on sm_90, without an error" if target.family == 90 else "has not been run"
        return Decline("scheme", f"FlashInfer's NVFP4 {detail}")
    packed = Layout.parse(args["layout"]).ue8m0_packed and Layout.parse(args["layout"]).tma
    if scheme not in (Scheme("fp8_tensor"), *((Scheme("fp8_group128"), Scheme("fp8_group64")) if packed else ())):
        return Decline("scheme", f"FlashInfer quantises fp8_tensor and groups with packed UE8M0 scales, not {args['scheme']}")
    return None


for _op in (op for op in fused.ALL_REDUCES if "weight2" not in op.params):
    _op.kernel("nccl", f"tpfuse.kernels.nccl:{_op.name}", reduced_supports, on_request=True)
    for _algorithm, _supports in (("one_shot", symmetric_supports), ("two_shot", two_shot_supports)):
        _op.kernel(
            "torch", f"tpfuse.kernels.torch_symm:{_algorithm}_{_op.name}", _supports, _algorithm,
            "tpfuse.kernels.torch_symm:prepare", on_request=True,
        )  # fmt: skip
    if "residual" in _op.params:
        _op.kernel(
            "flashinfer", f"tpfuse.kernels.flashinfer:{_op.name}", flashinfer_supports, "one_shot",
            "tpfuse.kernels.flashinfer:prepare", on_request=True,
        )  # fmt: skip
