"""Matrix products, plain and of quantised operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tpfuse import formats, shim
from tpfuse.formats.layouts import groups_of, remove_layout
from tpfuse.formats.nvfp4 import decode_e2m1, unpack
from tpfuse.ir.op import op
from tpfuse.ir.samples import rows

E4M3 = torch.float8_e4m3fn
# How to call again the operator of an engine that a product was raised from, by `origin` without its options; None where
# that operator is not installed, or not for the device.
origins: dict[str, Callable[[Mapping[str, Any]], Tensor | None]] = {}
NATIVE = ("fp8_tensor", "fp8_token")  # the schemes that aten._scaled_mm multiplies on every device


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[1]])


def _weight(**shape: Any) -> Tensor:
    width = shape.get("width", 48)
    return rows(**{**shape, "tokens": shape["hidden"], "hidden": width, "seed": shape.get("seed", 0) + 3})


def _bias(**shape: Any) -> Tensor:
    return rows(**{**shape, "tokens": 1, "hidden": shape.get("width", 48), "seed": 4})[0]


def matmul_sample(**shape: Any) -> dict[str, Any]:
    return {"x": rows(**shape), "weight": _weight(**shape), "bias": _bias(**shape)}


@op(sample=matmul_sample, fake=_fake)
def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight (+ bias).  x: [tokens, k].  weight: [k, n].  bias: [n] or None → [tokens, n]."""
    if bias is None:
        return torch.ops.aten.mm.default(x, weight)
    return torch.ops.aten.addmm.default(bias, x, weight)


def dtype_name(dtype: torch.dtype) -> str:
    """How a dtype is written in operator schemas: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def scaled_sample(**shape: Any) -> dict[str, Any]:
    """Quantised rows (other data on each rank) and a quantised weight, as their users store them."""
    scheme = shape.get("scheme", "fp8_tensor")
    layout = shape.get("layout") or formats.default_layout(scheme)
    x, weight = rows(**shape).float(), _weight(**{**shape, "rank": 0}).float()
    bias = _bias(**{**shape, "dtype": torch.bfloat16})
    alpha = None
    if scheme == "nvfp4":
        factor = torch.tensor(2.0**16, device=x.device)
        q, x_scale = formats.quantize(x, factor, scheme, layout)
        w, w_scale = formats.quantize(weight.t().contiguous(), factor, scheme, "swizzled_128x4")
        w, alpha = w.t(), torch.tensor(2.0**-32, device=x.device)
    elif scheme == "fp8_tensor":
        x_scale, w_scale = (t.abs().max() / 448 for t in (x, weight))
        q, w = (x / x_scale).to(E4M3), (weight / w_scale).t().contiguous().to(E4M3).t()
    else:
        q, x_scale = formats.quantize(x, None, scheme, layout)
        w, w_scale = formats.quantize(weight.t().contiguous(), None, scheme, "row")
        w, w_scale = w.t(), w_scale.t().contiguous()
    return {
        "x": q, "weight": w, "x_scale": x_scale, "weight_scale": w_scale, "bias": bias, "result_scale": None, "alpha": alpha,
        "scheme": scheme, "layout": layout, "weight_layout": "swizzled_128x4" if scheme == "nvfp4" else "row",
        "out_dtype": "bfloat16", "fast_accum": False, "origin": "",
    }  # fmt: skip


def _scaled_fake(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, result_scale: Tensor | None,
    alpha: Tensor | None, scheme: str, layout: str, weight_layout: str, out_dtype: str, fast_accum: bool, origin: str,
) -> Tensor:  # fmt: skip
    return x.new_empty([*x.shape[:-1], weight.shape[1]], dtype=getattr(torch, out_dtype))


@op(sample=scaled_sample, fake=_scaled_fake, row_args=("x", "x_scale"))
def scaled_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None,
    result_scale: Tensor | None = None, alpha: Tensor | None = None, scheme: str = "fp8_tensor", layout: str = "row",
    weight_layout: str = "row", out_dtype: str = "bfloat16", fast_accum: bool = False, origin: str = "",
) -> Tensor:  # fmt: skip
    """(dequantised x @ dequantised weight) · alpha (+ bias), summed in FP32 → [tokens, n] of `out_dtype`.

    x: [tokens, k], e4m3; for "nvfp4" uint8 [tokens, k / 2].  weight: [k, n], e4m3 (nvfp4: uint8 [k / 2, n]), usually the
    transposed view of [n, k].  Scales multiply.  By scheme, x_scale and weight_scale:
    "fp8_tensor": one FP32 number each.  "fp8_token": [tokens, 1] and [1, n].
    "fp8_group128", "fp8_group64" (G columns): the activation's in `layout`, [tokens, ⌈k/G⌉]; the weight's by rows,
    [⌈k/G⌉, n] (1×G groups) or [⌈k/G⌉, ⌈n/G⌉] (G×G blocks).
    "nvfp4": e4m3 of [tokens, k / 16] in `layout` and of the transposed weight [n, k / 16] in `weight_layout`; alpha:
    1 / (the two global scales' product).
    bias: [n] or None, added once.  result_scale: of an e4m3 result, as `aten._scaled_mm` has it.
    layout, weight_layout: see `tpfuse.formats`.  out_dtype: "bfloat16", "float16", "float32", "float8_e4m3fn".
    origin: the engine's operator that the model calls, with its own options ("vllm::flashinfer_mm_fp4?backend=cutlass"):
    unfused, it is called again; where it is not installed, and for "", the product is formed as said above.  The option
    "rounds=first": alpha, of out_dtype, multiplies the rounded product.
    """
    wide = torch.float64 if weight_scale.dtype == torch.float64 else torch.float32
    call = origins.get(origin.partition("?")[0])
    if call is not None and wide == torch.float32:
        called = call(
            {
                "x": x, "weight": weight, "x_scale": x_scale, "weight_scale": weight_scale, "bias": bias,
                "result_scale": result_scale, "alpha": alpha, "scheme": scheme, "layout": layout,
                "weight_layout": weight_layout, "out_dtype": getattr(torch, out_dtype), "fast_accum": fast_accum,
                **dict(option.split("=") for option in origin.partition("?")[2].split("&") if option),
            }
        )  # fmt: skip
        if called is not None:
            return called
    if scheme in NATIVE and x.dtype == E4M3 and alpha is None and (scheme == "fp8_tensor" or x.is_cuda or shim.CPU_ROW_SCALES):
        out = getattr(torch, out_dtype)
        return torch.ops.aten._scaled_mm.default(x, weight, x_scale, weight_scale, bias, result_scale, out, fast_accum)
    y = _rows_value(x, x_scale, scheme, layout, wide) @ _weight_value(weight, weight_scale, scheme, weight_layout, wide)
    if origin.endswith("rounds=first") and wide != torch.float64:
        y = y.to(getattr(torch, out_dtype))
    y = y if alpha is None else y * alpha.to(y.dtype)
    y = y if bias is None else y + bias.to(wide)
    if result_scale is not None and out_dtype == "float8_e4m3fn":
        y = (y / result_scale.to(wide)).clamp(-448.0, 448.0)
    return y if wide == torch.float64 else y.to(getattr(torch, out_dtype))


def _rows_value(x: Tensor, scale: Tensor, scheme: str, layout: str, wide: torch.dtype) -> Tensor:
    """Quantised rows → [tokens, k]."""
    if scheme in NATIVE:
        return x.to(wide) * scale.to(wide).reshape([] if scheme == "fp8_tensor" else [-1, 1])
    values = decode_e2m1(unpack(x)).to(wide) if scheme == "nvfp4" else x.to(wide)
    count, k = values.shape
    kind = formats.Scheme.parse(scheme)
    if scheme == "nvfp4":
        scale = scale.to(E4M3)  # from FP64 when verified: exact, and layouts move bytes
    factors = remove_layout(scale, count, groups_of(k, kind), layout).to(wide)
    return values * factors.repeat_interleave(kind.group, 1)[:, :k]


def _weight_value(weight: Tensor, scale: Tensor, scheme: str, layout: str, wide: torch.dtype) -> Tensor:
    """A quantised weight → [k, n]."""
    if scheme == "nvfp4":
        return _rows_value(weight.t(), scale, scheme, layout, wide).t()
    values = weight.to(wide)
    if scheme in NATIVE:
        return values * scale.to(wide).reshape([] if scheme == "fp8_tensor" else [1, -1])
    k, n = values.shape
    group = formats.Scheme.parse(scheme).group
    factors = scale.to(wide).repeat_interleave(group, 0)[:k]
    if scale.shape[1] != n:
        factors = factors.repeat_interleave(group, 1)[:, :n]
    return values * factors
