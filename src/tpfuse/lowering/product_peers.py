"""Registers other people's products next to collectives as back ends of the operators of ir/overlap.py.  Imports no kernel.

    nccl           the product, and NCCL's collective before or after it
    torch:fused    torch's fused operators over symmetric memory, chunks of cuBLAS on two streams

Both are `on_request`: only a measured table or `Config(kernels=…)` picks them.
"""

from __future__ import annotations

from torch.fx.experimental.symbolic_shapes import statically_known_true

from tpfuse.ir import overlap
from tpfuse.ir.matmul import NATIVE
from tpfuse.ir.op import Args
from tpfuse.lowering.gemm_kernels import multiplied, products_of
from tpfuse.lowering.product_kernels import OUT_DTYPES
from tpfuse.lowering.triton_kernels import ranks_support
from tpfuse.report import Decline
from tpfuse.target import Target


def nccl_supports(args: Args, target: Target) -> Decline | None:
    """For a product and NCCL's collective."""
    if target.device != "cuda" or target.world < 2:
        return Decline("no_group", f"needs several GPUs, not {target.device} and {target.world} ranks")
    if "padded" in args and args.get("out_dtype", "bfloat16") not in OUT_DTYPES:
        return Decline("out_dtype", f"sums of {args['out_dtype']}")
    each = products_of(args) if "weights" in args else [args]
    return next(filter(None, (multiplied(one, target) for one in each)), None)


def torch_supports(args: Args, target: Target) -> Decline | None:
    """For torch's fused operators."""
    if reason := ranks_support(target) or nccl_supports(args, target):
        return reason
    if "padded" in args and statically_known_true(args["x"].shape[0] % target.world != 0):
        return Decline("uneven_rows", f"{args['x'].shape[0]} rows: {target.world} ranks do not divide them")
    if "scheme" not in args:
        if any(bias is not None for bias in args.get("biases", [args.get("bias")])):
            return Decline("bias", "torch's fused products of unquantised rows take no bias")
        return None
    if args["scheme"] not in NATIVE:
        return Decline("scheme", f"torch's fused products scale tensors and rows, which {args['scheme']} does not")
    if any(scale is not None for scale in args.get("result_scales", [args.get("result_scale")])):
        return Decline("result_scale", "partial sums are not quantised")
    if args["scheme"] == "fp8_token" and args.get("keep"):
        return Decline("keep", "torch's fused product gathers row scales and does not return them")
    return None


for _op in (
    overlap.matmul_reduce_scatter, overlap.scaled_matmul_reduce_scatter, overlap.all_gather_matmul,
    overlap.all_gather_scaled_matmul,
):  # fmt: skip
    _op.kernel("nccl", f"tpfuse.kernels.nccl_products:{_op.name}", nccl_supports, on_request=True)
    _op.kernel(
        "torch", f"tpfuse.kernels.torch_products:{_op.name}", torch_supports, "fused", "tpfuse.kernels.torch_products:prepare",
        on_request=True,
    )  # fmt: skip
