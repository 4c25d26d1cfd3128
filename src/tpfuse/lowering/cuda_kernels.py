"""Registers the CUDA C++ kernels (compiled when first launched) on their operators.  Imports no kernel."""

from __future__ import annotations

from tpfuse.ir import fused, shard
from tpfuse.ir.norm import Rounding
from tpfuse.ir.op import Args, Op
from tpfuse.lowering.triton_kernels import collective_supports
from tpfuse.report import Decline
from tpfuse.target import Target

PREPARE = "tpfuse.runtime.workspaces:prepare"


def sharded_supports(args: Args, target: Target) -> Decline | None:
    """For a reduce-scatter, the norm behind it and the gather behind that.  The residual may have fewer rows than x."""
    if reason := collective_supports(args, target):
        return reason
    if args["x"].dim() != 2:
        return Decline("dimensions", f"rows of a matrix are sharded, not {args['x'].dim()} dimensions")
    if "rows" in args and "scheme" not in args and Rounding.parse(args.get("rounding2", args["rounding"])).keep_f32:
        return Decline("rounding", "a gathered norm that stays in FP32")
    return None


def _sharded(op: Op) -> None:
    op.kernel("cuda", f"tpfuse.kernels.cuda_sharded:{op.name}", sharded_supports, "sharded", PREPARE)


for _op in (
    fused.all_reduce_rms_norm, fused.all_reduce_add_rms_norm, fused.all_reduce_rms_norm_add_rms_norm,
    fused.all_reduce_rms_norm_quantize, fused.all_reduce_add_rms_norm_quantize, fused.all_reduce_rms_norm_add_rms_norm_quantize,
):  # fmt: skip
    _op.kernel("cuda", f"tpfuse.kernels.cuda_norm:{_op.name}", collective_supports, "one_shot", PREPARE, on_request=True)
for _op in (
    shard.reduce_scatter_rms_norm, shard.reduce_scatter_add_rms_norm, shard.reduce_scatter_rms_norm_add_rms_norm,
    shard.reduce_scatter_rms_norm_quantize, shard.reduce_scatter_add_rms_norm_quantize,
    shard.reduce_scatter_rms_norm_add_rms_norm_quantize, shard.reduce_scatter_rms_norm_add_rms_norm_quantize_all_gather,
    shard.reduce_scatter_rms_norm_all_gather, shard.reduce_scatter_add_rms_norm_all_gather,
    shard.reduce_scatter_rms_norm_add_rms_norm_all_gather, shard.reduce_scatter_rms_norm_quantize_all_gather,
    shard.reduce_scatter_add_rms_norm_quantize_all_gather,
):  # fmt: skip
    _sharded(_op)
