"""Matrix products with the collective before or after them, for kernels that overlap the two ("async TP")."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tpfuse.ir import shard
from tpfuse.ir.chained import Chained
from tpfuse.ir.collective import all_gather, all_gather_quantized, reduce_scatter
from tpfuse.ir.matmul import dtype_name, matmul, matmul_sample, scaled_matmul, scaled_sample
from tpfuse.ir.op import Args, Message, Op, op

_SCALED = ("scheme", "layout", "weight_layout", "out_dtype", "fast_accum", "origin")


def _scatter_sample(**shape: Any) -> dict[str, Any]:
    return {**matmul_sample(**shape), "padded": True, "group": shape["group"]}


def _scaled_scatter_sample(**shape: Any) -> dict[str, Any]:
    return {**scaled_sample(**shape), "padded": True, "group": shape["group"]}


def _gather_sample(**shape: Any) -> dict[str, Any]:
    one, other = matmul_sample(**shape), matmul_sample(**{**shape, "width": 32, "seed": 9})
    return {
        "x": one["x"], "weights": [one["weight"], other["weight"]], "biases": [one["bias"], None], "rows": None,
        "keep": True, "group": shape["group"],
    }  # fmt: skip


def _scaled_gather_sample(**shape: Any) -> dict[str, Any]:
    one, other = scaled_sample(**shape), scaled_sample(**{**shape, "width": 32, "seed": 9})
    names = {"weights": "weight", "weight_scales": "weight_scale", "biases": "bias", "result_scales": "result_scale"}
    return {
        "x": one["x"], "x_scale": one["x_scale"],
        **{many: [one[name], other[name]] for many, name in names.items()}, "alphas": [one["alpha"], other["alpha"]],
        **{name: one[name] for name in _SCALED}, "rows": None, "keep": True, "group": shape["group"],
    }  # fmt: skip


def scattered(args: Args) -> Message:
    """The products, which are summed; a product of quantised rows is of `out_dtype`."""
    x, weight = args["x"], args["w" if "w" in args else "weight"]
    dtype = getattr(torch, args["out_dtype"]) if "out_dtype" in args else x.dtype
    return Message(x.shape[0], weight.shape[1], dtype, across=weight.shape[0])


def gathered(args: Args) -> Message:
    """The rows as they are multiplied: quantised ones with `columns` of their own dtype."""
    x = args["x"]
    return Message(x.shape[0], x.shape[1], x.dtype, shared=True, across=sum(weight.shape[1] for weight in args["weights"]))


@op(sample=_scatter_sample, rows="collective", fuse="async_tp", message=scattered)
def matmul_reduce_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, padded: bool = False, group: str = ""
) -> Tensor:
    """Sum over the ranks of x @ weight (+ bias, each rank its own), own rows only.

    x: [rows, k].  weight: [k, n].  bias: [n] or None → [⌈rows / world⌉, n]; padded: see `reduce_scatter`.
    """
    return reduce_scatter(matmul(x, weight, bias), group, padded)


@op(sample=_scaled_scatter_sample, rows="collective", row_args=("x", "x_scale"), fuse="async_tp", message=scattered)
def scaled_matmul_reduce_scatter(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None,
    result_scale: Tensor | None = None, alpha: Tensor | None = None, scheme: str = "fp8_tensor", layout: str = "row",
    weight_layout: str = "row", out_dtype: str = "bfloat16", fast_accum: bool = False, origin: str = "",
    padded: bool = False, group: str = "",
) -> Tensor:  # fmt: skip
    """`scaled_matmul`, summed over the ranks, own rows only → [⌈rows / world⌉, n] of `out_dtype`."""
    y = scaled_matmul(
        x, weight, x_scale, weight_scale, bias, result_scale, alpha, scheme, layout, weight_layout, out_dtype, fast_accum, origin
    )
    return reduce_scatter(y, group, padded)


@op(sample=_gather_sample, rows="collective", fuse="async_tp", message=gathered)
def all_gather_matmul(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], rows: int | None = None, keep: bool = False,
    group: str = "",
) -> list[Tensor]:  # fmt: skip
    """The rows of all ranks times each weight.

    x: [own rows, k].  weights: [k, n_i].  biases: [n_i] or None, one for each weight.  rows: see `all_gather`.
    keep: the gathered rows are wanted too.  → [rows, n_i] for each weight, then, where kept, [rows, k].
    """
    gathered = all_gather(x, group, rows)
    products = [matmul(gathered, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return [*products, gathered] if keep else products


@op(sample=_scaled_gather_sample, rows="collective", row_args=("x", "x_scale"), fuse="async_tp", message=gathered)
def all_gather_scaled_matmul(
    x: Tensor, x_scale: Tensor, weights: list[Tensor], weight_scales: list[Tensor], biases: list[Tensor | None],
    result_scales: list[Tensor | None], alphas: list[Tensor | None], scheme: str = "fp8_tensor", layout: str = "row",
    weight_layout: str = "row", out_dtype: str = "bfloat16", fast_accum: bool = False, origin: str = "",
    rows: int | None = None, keep: bool = False, group: str = "",
) -> list[Tensor]:  # fmt: skip
    """The quantised rows of all ranks, with their scales by `layout`, times each quantised weight (see `scaled_matmul`).

    x: [own rows, k], e4m3 or packed FP4.  x_scale: of the own rows; one number for "fp8_tensor", the same on every rank and not
    gathered.  weights: [k, n_i], e4m3 or packed FP4.  biases: [n_i] or None.  weight_scales, biases, result_scales, alphas: an
    entry for each weight.  keep: the gathered rows and scales are wanted too (for "fp8_tensor" the rows alone).
    → [rows, n_i] of `out_dtype` for each weight, then what is kept.
    """
    if scheme == "fp8_tensor":
        kept = [all_gather(x, group, rows)]
        q, scales = kept[0], x_scale
    else:
        q, scales = all_gather_quantized(x, x_scale, scheme, layout, group, rows)
        kept = [q, scales]
    products = [
        scaled_matmul(
            q, weight, scales, weight_scale, bias, result_scale, alpha, scheme, layout, weight_layout, out_dtype, fast_accum,
            origin,
        )
        for weight, weight_scale, bias, result_scale, alpha in zip(
            weights, weight_scales, biases, result_scales, alphas, strict=True
        )
    ]
    return [*products, *kept] if keep else products


_RENAMED = {
    "weight": "w", "weight_scale": "w_scale", "bias": "w_bias", "scheme": "w_scheme", "layout": "w_layout", "alpha": "w_alpha",
}  # fmt: skip


def _with_norm(product: Op, then: Op) -> Chained:
    def sample(**shape: Any) -> dict[str, Any]:
        """The product's rows are about as large as its operand's, so that an epsilon shows."""
        own = product.sample(**{**shape, "width": shape["hidden"]})
        loud, dtype = 1 / (3e-3 * math.sqrt(shape["hidden"])), shape.get("dtype", torch.float32)
        factor = "weight" if product is matmul else "alpha" if own["scheme"] == "nvfp4" else "weight_scale"
        own[factor] = own[factor] * loud
        if product is scaled_matmul:
            own |= {"out_dtype": dtype_name(dtype), "bias": own["bias"].to(dtype)}
        rest = then.sample(**shape)
        return {_RENAMED.get(name, name): value for name, value in own.items()} | {k: v for k, v in rest.items() if k != "x"}

    what = f"{then.doc.partition('→')[2].strip()}"
    doc = f"`{then.name}` of the result of `{product.name}`, whose weight, bias … are w, w_bias … here → {what}"
    return Chained(f"{product.name}_{then.name}", product, then, _RENAMED, sample, doc, "async_tp", scattered)


# A dozen: `matmul_reduce_scatter_rms_norm` … `scaled_matmul_reduce_scatter_rms_norm_add_rms_norm_quantize`.
WITH_NORM = tuple(_with_norm(product, then) for product in (matmul, scaled_matmul) for then in shard.SCATTERED)
