"""Registers the kernels of products next to collectives, and says why one cannot serve.  Imports no kernel.

    cuda:plain      one product, then a kernel of the collective and what follows it
    cuda:chunked    a product for each rank's rows by cuBLAS, beside the rows that travel
    cuda:push       one kernel that gathers, then one product

All are `on_request`: only a measured table or `Config(kernels=…)` picks them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from tpfuse.formats import Scheme
from tpfuse.ir import overlap
from tpfuse.ir.chained import Chained
from tpfuse.ir.matmul import dtype_name
from tpfuse.ir.op import Args, Op
from tpfuse.lowering.cuda_kernels import sharded_supports
from tpfuse.lowering.product_kernels import multipliable
from tpfuse.lowering.triton_kernels import DTYPES, MAX_HIDDEN, PREPARE, ranks_support
from tpfuse.report import Decline
from tpfuse.target import Target

SCATTER = "tpfuse.runtime.workspaces:prepare_scatter"
GATHER = "tpfuse.runtime.workspaces:prepare_gather"
LISTS = {
    "weights": "weight", "weight_scales": "weight_scale", "biases": "bias", "result_scales": "result_scale", "alphas": "alpha",
}  # fmt: skip
SCALES_WORD = 64  # columns whose NVFP4 scales are a whole word


def scatter_supports(args: Args, target: Target) -> Decline | None:
    """For a product whose rows are summed and shared out: `matmul`'s or `scaled_matmul`'s arguments."""
    width = args["weight"].shape[1]
    if width > MAX_HIDDEN:
        return Decline("hidden_too_large", f"rows of {width} do not fit the registers of one block: at most {MAX_HIDDEN}")
    if width % 8:
        return Decline("hidden_not_multiple_of_8", f"rows of {width} are no whole 16-byte vectors")
    if "out_dtype" in args and args["out_dtype"] not in map(dtype_name, DTYPES):
        return Decline("out_dtype", f"rows of bfloat16 and float16 are summed, not {args['out_dtype']}")
    return ranks_support(target) or multiplied(args, target)


def with_norm_supports(op: Chained, args: Args, target: Target) -> Decline | None:
    """For such a product and the norm behind it."""
    own, _ = op.halves(list(args.values()))
    product = dict(zip(op.first.params, own, strict=True))
    return scatter_supports(product, target) or sharded_supports(op.after(args), target)


def gather_supports(args: Args, target: Target) -> Decline | None:
    """For products of gathered rows."""
    x, scheme = args["x"], args.get("scheme", "")
    if x.shape[-1] * x.dtype.itemsize % 16:
        return Decline("hidden_not_multiple_of_8", f"rows of {x.shape[-1]} {x.dtype} are no whole 16-byte vectors")
    if scheme and not Scheme.parse(scheme).is_fp8 and 2 * x.shape[-1] % SCALES_WORD:
        return Decline("scale_shape", f"scales of {2 * x.shape[-1]} columns are no whole words")
    return ranks_support(target) or next(filter(None, (multiplied(each, target) for each in products_of(args))), None)


def products_of(args: Args) -> Iterable[dict[str, Any]]:
    """The arguments of each weight's own product."""
    lists = {one: args[name] for name, one in LISTS.items() if name in args}
    for values in zip(*lists.values(), strict=True):
        yield {**args, **dict(zip(lists, values, strict=True))}


def multiplied(args: Args, target: Target) -> Decline | None:
    x, weight, bias = args["x"], args["weight"], args["bias"]
    if x.dim() != 2:
        return Decline("dimensions", f"the rows of a matrix are shared out, not {x.dim()} dimensions")
    if "scheme" in args:
        return multipliable(args, target)
    if x.dtype not in DTYPES:
        return Decline("dtype", f"bfloat16 and float16 are supported, not {x.dtype}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return Decline("weight_dtype", f"a weight or bias is not {x.dtype}, which the rows are")
    return None


def _scatter(op: Op, supports: Any) -> None:
    for algorithm, prepare in (("plain", PREPARE), ("chunked", SCATTER)):
        launch = f"tpfuse.kernels.product_scatter:{algorithm}_{op.name}"
        op.kernel("cuda", launch, supports, algorithm, prepare, on_request=True)


for _op in (overlap.matmul_reduce_scatter, overlap.scaled_matmul_reduce_scatter):
    _scatter(_op, scatter_supports)
for _op in overlap.WITH_NORM:
    _scatter(_op, partial(with_norm_supports, _op))
for _op in (overlap.all_gather_matmul, overlap.all_gather_scaled_matmul):
    for _algorithm in ("push", "chunked"):
        _op.kernel(
            "cuda", f"tpfuse.kernels.product_gather:{_algorithm}_{_op.name}", gather_supports, _algorithm, GATHER, on_request=True
        )
