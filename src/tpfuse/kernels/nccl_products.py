"""Products next to NCCL's collectives, one after the other: the peer that overlaps nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpfuse.ir.collective import all_gather, all_gather_quantized, reduce_scatter

from .operands import Product, Rows, operands, plain, quantised


def _multiply(product: Product, rows: Rows) -> Tensor:
    out = product.empty(len(rows.values))
    product.into(out, rows)
    return out


def matmul_reduce_scatter(*args: Any, alive: tuple[bool, ...]) -> Tensor:
    *own, padded, group = args
    rows, product = operands(own)
    return reduce_scatter(_multiply(product, rows), group, padded)


scaled_matmul_reduce_scatter = matmul_reduce_scatter


def all_gather_matmul(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], rows: int | None, keep: bool, group: str, *,
    alive: tuple[bool, ...],
) -> list[Tensor]:  # fmt: skip
    whole = all_gather(x, group, rows)
    each = (plain(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    products = [_multiply(product, operand) for operand, product in each]
    return [*products, whole] if keep else products


def all_gather_scaled_matmul(
    x: Tensor, x_scale: Tensor, weights: list[Tensor], weight_scales: list[Tensor], biases: list[Tensor | None],
    result_scales: list[Tensor | None], alphas: list[Tensor | None], scheme: str, layout: str, weight_layout: str,
    out_dtype: str, fast_accum: bool, origin: str, rows: int | None, keep: bool, group: str, *, alive: tuple[bool, ...],
) -> list[Tensor]:  # fmt: skip
    if scheme == "fp8_tensor":
        kept = [all_gather(x, group, rows)]
    else:
        kept = list(all_gather_quantized(x, x_scale, scheme, layout, group, rows))
    whole, scales = kept[0], kept[-1] if len(kept) > 1 else x_scale
    how = scheme, layout, weight_layout, out_dtype, fast_accum, origin
    each = zip(weights, weight_scales, biases, result_scales, alphas, strict=True)
    pairs = [quantised(whole, weight, scales, scale, bias, result, alpha, *how) for weight, scale, bias, result, alpha in each]
    products = [_multiply(product, operand) for operand, product in pairs]
    return [*products, *kept] if keep else products
