"""The adapters of the operators that engines ship: vLLM's, and FlashInfer's as vLLM and FlashInfer itself register them.

Facts about these operators: vLLM divides by a dynamic FP8 scale and multiplies by the reciprocal of a static one; its floors
are 1 / (448 · 512) for scales per token, and an argument that bounds amax for scales per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tpfuse.ir.matmul import dtype_name
from tpfuse.raising.adapters import Adapter, Call, register
from tpfuse.raising.quants_emit import rows_of
from tpfuse.raising.scaled_matmuls import e4m3_scales, kind_of, transposed, unbatched
from tpfuse.report import Decline
from tpfuse.rewrite.match import is_tensor, same, tensor

Arguments = Mapping[str, Any] | Decline
E4M3 = torch.float8_e4m3fn


def _quantize(x: fx.Node, scale: Any, scheme: str, layout: str) -> Arguments:
    return {"x": rows_of(x), "scale": scale, "scheme": scheme, "layout": layout}


def _static(call: Call) -> Arguments:
    shape = call["group_shape"]
    if shape is not None and tuple(shape) != (-1, -1):
        return Decline("scale_shape", f"one given scale for groups of {tuple(shape)}")
    if not all(same(n, 1) for n in call.value("scale").shape):
        return Decline("scale_shape", f"the given scale has the shape {list(call.value('scale').shape)}")
    return _quantize(call["input"], call["scale"], "fp8_tensor:reciprocal", "row")


def _per_token(call: Call) -> Arguments:
    if call["scale_ub"] is not None:
        return Decline("scale_bound", "the scale has an upper bound that is a tensor")
    return _quantize(call["input"], None, f"fp8_token:eps={1 / (448 * 512)!r}", "row")


def _per_group(call: Call, x: str, group: int, scales: str, packed: bool = False) -> Arguments:
    if group not in (128, 64):
        return Decline("group_size", f"groups of {group}; there are schemes for groups of 128 and 64")
    if call["fp8_max"] not in (None, 448.0) or call["fp8_min"] not in (None, -448.0):
        return Decline("clamp_bounds", f"values are clamped to {call['fp8_min']} … {call['fp8_max']}, not to ±448")
    eps = call["eps"] if call["eps"] is not None else 1e-10
    layout = "row"
    if scales in call.buffers:
        rows, stride = call.value(scales).shape[0], call.value(scales).stride()
        if not same(stride[-1], 1) and not same(rows, 1):
            layout = "col" if same(stride[-1], rows) else "col+tma"
    power_of_two = packed or bool(call["scale_ue8m0"])
    layout += "+ue8m0_packed" if packed else "+ue8m0" if power_of_two else ""
    variants = f"{'log2,' if power_of_two else ''}eps=0.0,amax_min={eps!r}"
    return _quantize(call[x], None, f"fp8_group{group}:{variants}", layout)


def _fp4(call: Call) -> Arguments:
    # Before it had an argument for it, the operator always swizzled.
    layout = "linear" if call["is_sf_swizzled_layout"] is False else "swizzled_128x4"
    return _quantize(call["input"], call["input_scale"], "nvfp4", layout)


register(Adapter("_C::static_scaled_fp8_quant", "quantize", _static, ("result",)))
register(Adapter("_C::dynamic_per_token_scaled_fp8_quant", "quantize", _per_token, ("result", "scale")))
register(
    Adapter(
        "_C::dynamic_scaled_fp8_quant", "quantize",
        lambda call: Decline("scale_of_all_tokens", "one scale from all tokens: no row can be quantised by itself"),
        ("result", "scale"),
    )
)  # fmt: skip
register(
    Adapter(
        "_C::per_token_group_fp8_quant", "quantize",
        lambda call: _per_group(call, "input", call["group_size"], "output_s"), ("output_q", "output_s"),
    )
)  # fmt: skip
register(
    Adapter(
        "_C::per_token_group_fp8_quant_packed", "quantize",
        lambda call: _per_group(call, "input", call["group_size"], "output_s_packed", packed=True),
        ("output_q", "output_s_packed"),
    )
)  # fmt: skip
register(
    Adapter(
        "vllm::triton_per_token_group_quant_fp8", "quantize",
        lambda call: _per_group(call, "x", call["group_size"], ""), ("output_q", "output_s"),
    )
)  # fmt: skip
register(Adapter("_C::scaled_fp4_quant", "quantize", _fp4, ("output", "output_scale")))


def _cutlass(call: Call) -> Arguments:
    """cutlass_scaled_mm(out!, a, b, a_scales, b_scales, bias?)."""
    x_scale, weight_scale = call["a_scales"], call["b_scales"]
    kind = kind_of(tensor(call["a"]), tensor(call["b"]), tensor(x_scale), tensor(weight_scale))
    if isinstance(kind, Decline):
        return kind
    return {
        "x": call["a"], "weight": call["b"], "x_scale": x_scale, "weight_scale": weight_scale, "bias": call["bias"],
        "scheme": kind[0], "layout": kind[1], "out_dtype": dtype_name(call.value("out").dtype),
        "origin": "_C::cutlass_scaled_mm",
    }  # fmt: skip


def _call_cutlass(operator: Any, a: Mapping[str, Any]) -> Tensor:
    out = _out(a)
    operator(out, a["x"], a["weight"], a["x_scale"], a["weight_scale"], a["bias"])
    return out


def _cutlass_fp4(call: Call) -> Arguments:
    """cutlass_scaled_fp4_mm(out!, a, b, block_scale_a, block_scale_b, alpha), b by rows of the transposed weight."""
    return {
        "x": call["a"], "weight": transposed(call["b"]), "x_scale": e4m3_scales(call["block_scale_a"]),
        "weight_scale": e4m3_scales(call["block_scale_b"]), "alpha": call["alpha"], "scheme": "nvfp4",
        "layout": "swizzled_128x4", "weight_layout": "swizzled_128x4",
        "out_dtype": dtype_name(call.value("out").dtype), "origin": "_C::cutlass_scaled_fp4_mm",
    }  # fmt: skip


def _call_cutlass_fp4(operator: Any, a: Mapping[str, Any]) -> Tensor:
    out = _out(a)
    operator(out, a["x"], a["weight"].t(), a["x_scale"], a["weight_scale"], a["alpha"])
    return out


def _mm_fp4(call: Call) -> Arguments:
    """flashinfer_mm_fp4(A, B, A_scale, B_scale, g_scale, dtype, use_8x4_sf_layout, backend, …)."""
    if call["backend"] == "trtllm":
        return Decline("weight_layout", "the trtllm back end takes a shuffled weight")
    if call["use_nvfp4"] is False or call["block_size"] not in (None, 16):
        return Decline("block_scales", "the operands are not NVFP4")
    layout = "swizzled_8x4" if call["use_8x4_sf_layout"] else "swizzled_128x4"
    return {
        "x": call["A"], "weight": call["B"], "x_scale": e4m3_scales(call["A_scale"]),
        "weight_scale": e4m3_scales(transposed(call["B_scale"])), "alpha": call["g_scale"], "scheme": "nvfp4",
        "layout": layout, "weight_layout": "swizzled_128x4", "out_dtype": dtype_name(call["dtype"]),
        "origin": f"vllm::flashinfer_mm_fp4?backend={call['backend']}&scales={dtype_name(call.value('A_scale').dtype)}",
    }  # fmt: skip


def _call_mm_fp4(operator: Any, a: Mapping[str, Any]) -> Tensor:
    x_scale, weight_scale = (a[name].view(getattr(torch, a["scales"])) for name in ("x_scale", "weight_scale"))
    options = {
        "A": a["x"], "B": a["weight"], "A_scale": x_scale, "B_scale": weight_scale.t(), "g_scale": a["alpha"],
        "dtype": a["out_dtype"], "use_8x4_sf_layout": a["layout"] == "swizzled_8x4", "backend": a["backend"],
    }  # fmt: skip
    return operator(**{n.name: options[n.name] for n in operator.default._schema.arguments if n.name in options})


def _bmm_fp8(call: Call) -> Arguments:
    """vllm::bmm_fp8(A, B, A_scale, B_scale, dtype, backend) and flashinfer::bmm_fp8(workspace, A, B, D!, A_scale, B_scale)."""
    a, b = unbatched(call["A"]), unbatched(call["B"])
    if isinstance(a, Decline) or isinstance(b, Decline):
        return a if isinstance(a, Decline) else b
    for name in ("A_scale", "B_scale"):
        if not is_tensor(call[name]) or not all(same(n, 1) for n in call.value(name).shape):
            return Decline("scale_shape", f"{name} is not one number")
    dtype = call["dtype"] if call["dtype"] is not None else call.value("D").dtype
    own = "flashinfer::bmm_fp8" if "D" in call.buffers else f"vllm::bmm_fp8?backend={call['backend']}"
    return {
        "x": a, "weight": b, "x_scale": call["A_scale"], "weight_scale": call["B_scale"], "scheme": "fp8_tensor",
        "layout": "row", "out_dtype": dtype_name(dtype), "origin": own,
    }  # fmt: skip


def _call_bmm_fp8(operator: Any, a: Mapping[str, Any]) -> Tensor:
    x, weight = a["x"].unsqueeze(0), a["weight"].unsqueeze(0)
    return operator(x, weight, a["x_scale"], a["weight_scale"], a["out_dtype"], a["backend"]).squeeze(0)


def _call_flashinfer_bmm_fp8(operator: Any, a: Mapping[str, Any]) -> Tensor:
    out = _out(a).unsqueeze(0)
    # The workspace of FlashInfer's own wrapper.
    workspace = a["x"].new_empty(32 * 1024 * 1024, dtype=torch.uint8)
    operator(workspace, a["x"].unsqueeze(0), a["weight"].unsqueeze(0), out, a["x_scale"], a["weight_scale"])
    return out.squeeze(0)


def _fp8_gemm_nt(call: Call) -> Arguments:
    """fp8_gemm_nt_op(q_input, input_scale, weight, weight_scale, output!, use_deep_gemm_e8m0), weight [n, k] in blocks."""
    if tensor(call["input_scale"]).dtype != torch.float32:
        return Decline("scale_dtype", "packed scales of the weight have no layout here")
    weight, weight_scale = transposed(call["weight"]), transposed(call["weight_scale"])
    kind = kind_of(tensor(call["q_input"]), tensor(weight), tensor(call["input_scale"]), tensor(weight_scale))
    if isinstance(kind, Decline):
        return kind
    return {
        "x": call["q_input"], "weight": weight, "x_scale": call["input_scale"], "weight_scale": weight_scale,
        "scheme": kind[0], "layout": kind[1], "out_dtype": dtype_name(call.value("output").dtype),
        "origin": f"vllm::fp8_gemm_nt_op?e8m0={int(call['use_deep_gemm_e8m0'])}",
    }  # fmt: skip


def _call_fp8_gemm_nt(operator: Any, a: Mapping[str, Any]) -> Tensor:
    out = _out(a)
    operator(a["x"], a["x_scale"], a["weight"].t(), a["weight_scale"].t(), out, a["e8m0"] == "1")
    return out


def _out(a: Mapping[str, Any]) -> Tensor:
    return a["x"].new_empty([a["x"].shape[0], a["weight"].shape[1]], dtype=a["out_dtype"])


register(Adapter("_C::cutlass_scaled_mm", "scaled_matmul", _cutlass, ("out",), _call_cutlass))
register(Adapter("_C::cutlass_scaled_fp4_mm", "scaled_matmul", _cutlass_fp4, ("out",), _call_cutlass_fp4))
register(Adapter("vllm::flashinfer_mm_fp4", "scaled_matmul", _mm_fp4, ("out",), _call_mm_fp4))
register(Adapter("vllm::bmm_fp8", "scaled_matmul", _bmm_fp8, ("D",), _call_bmm_fp8))
register(Adapter("flashinfer::bmm_fp8", "scaled_matmul", _bmm_fp8, ("D",), _call_flashinfer_bmm_fp8))
register(Adapter("vllm::fp8_gemm_nt_op", "scaled_matmul", _fp8_gemm_nt, ("output",), _call_fp8_gemm_nt))
