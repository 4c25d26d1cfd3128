"""Registers the kernels of products of quantised operands, and says which product none serves.  Imports no kernel."""

from __future__ import annotations

from tpfuse.formats import Layout, Scheme
from tpfuse.ir.matmul import NATIVE, origins, scaled_matmul
from tpfuse.ir.op import Args
from tpfuse.report import Decline
from tpfuse.rewrite.match import same
from tpfuse.target import Target

OUT_DTYPES = ("bfloat16", "float16", "float32")


def product_supports(args: Args, target: Target) -> Decline | None:
    """For one product that no operator of torch forms."""
    if args["scheme"] in NATIVE:
        return Decline("native", "aten._scaled_mm multiplies it")
    return multipliable(args, target)


def multipliable(args: Args, target: Target) -> Decline | None:
    """Whether `kernels.products` multiplies operands: `scaled_matmul`'s arguments."""
    x, weight, scheme = args["x"], args["weight"], args["scheme"]
    if target.device != "cuda" or target.sm < 90:
        return Decline("no_sm_90", f"needs compute capability 9.0 or later, not {target.device} {target.sm}")
    call = origins.get(args["origin"].partition("?")[0])
    if call is not None:
        return Decline("origin", f"{args['origin']} is installed and is called again")
    if not all(same(s, 1) for s in (x.stride(-1), weight.stride(0))):
        return Decline("strides", "x must lie by rows and the weight by columns (the transposed view of [n, k])")
    if scheme in NATIVE:
        return _native(args)
    if args["out_dtype"] not in OUT_DTYPES or args["result_scale"] is not None:
        return Decline("out_dtype", f"a result of {args['out_dtype']}" + " with a scale" * (args["result_scale"] is not None))
    if Layout.parse(args["layout"]).ue8m0_packed:
        return Decline("packed_scales", "scales packed to int32 are for other hardware's units")
    if scheme != "nvfp4" and not _groups(args):
        return Decline("scale_shape", f"a weight's scales of {list(args['weight_scale'].shape)} are by neither 1 × G nor G × G")
    return None


def _native(args: Args) -> Decline | None:
    """Of a product by aten._scaled_mm."""
    if args["alpha"] is not None:
        return Decline("alpha", "aten._scaled_mm has no factor of the result")
    k, n = args["weight"].shape
    if any(not same(size % 16, 0) for size in (k, n)):
        return Decline("not_multiple_of_16", f"a weight of {k} × {n}: aten._scaled_mm takes multiples of 16")
    return None


def _groups(args: Args) -> bool:
    k, n = args["weight"].shape
    group = Scheme.parse(args["scheme"]).group
    down, along = args["weight_scale"].shape
    return down == -(-k // group) and along in (n, -(-n // group))


scaled_matmul.kernel("triton", "tpfuse.kernels.products:scaled_matmul", product_supports)
