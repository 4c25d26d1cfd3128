"""Registers the CUDA C++ kernels (compiled when first launched) on their operators.  Imports no kernel."""

from __future__ import annotations

from tpfuse.ir import fused, shard
from tpfuse.ir.norm import Rounding
from tpfuse.ir.op import Args
from tpfuse.lowering.triton_kernels import PREPARE, collective_supports
from tpfuse.report import Decline
from tpfuse.target import Target


def sharded_supports(args: Args, target: Target) -> Decline | None:
    """For a reduce-scatter, the norm behind it and the gather behind that.  The residual may have fewer rows than x."""
    if reason := collective_supports(args, target):
        return reason
    if args["x"].dim() != 2:
        return Decline("dimensions", f"rows of a matrix are sharded, not {args['x'].dim()} dimensions")
    if "rows" in args and "scheme" not in args and Rounding.parse(args.get("rounding2", args["rounding"])).keep_f32:
        return Decline("rounding", "a gathered norm that stays in FP32")
    return None


for _op in fused.ALL_REDUCES:
    _op.kernel("cuda", f"tpfuse.kernels.cuda_norm:{_op.name}", collective_supports, "one_shot", PREPARE, on_request=True)
for _op in (*shard.SCATTERED, *shard.GATHERED):
    _op.kernel("cuda", f"tpfuse.kernels.cuda_sharded:{_op.name}", sharded_supports, "sharded", PREPARE)
