"""Stand-ins of engines' operators: same schemas, bodies in plain torch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.raising.capture import Raised, capture, raise_exactly
from tpfuse import formats

E4M3 = torch.float8_e4m3fn
K, N, TOKENS = 256, 128, 24
FLOOR = 1 / (448 * 512)

SCHEMAS = {
    "_C": [
        "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, (int, int)? group_shape=None) -> ()",
        "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        "dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()",
        "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
        "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
        "per_token_group_fp8_quant_packed(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, "
        "float eps, float fp8_min, float fp8_max) -> ()",
        "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
        "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
        "Tensor(b!) output_scale) -> ()",
        "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()",
        "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor block_scale_a, Tensor block_scale_b, "
        "Tensor alpha) -> ()",
    ],
    "vllm": [
        "triton_per_token_group_quant_fp8(Tensor x, int group_size) -> (Tensor, Tensor)",
        "flashinfer_mm_fp4(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, Tensor g_scale, ScalarType dtype, "
        "bool use_8x4_sf_layout, str backend, int block_size=16, bool use_nvfp4=True) -> Tensor",
        "bmm_fp8(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType dtype, str backend) -> Tensor",
        "fp8_gemm_nt_op(Tensor q_input, Tensor input_scale, Tensor weight, Tensor weight_scale, Tensor! output, "
        "bool use_deep_gemm_e8m0) -> ()",
    ],
    "flashinfer": [
        "bmm_fp8(Tensor workspace_buffer, Tensor A, Tensor B, Tensor! D, Tensor A_scale, Tensor B_scale) -> ()",
    ],
}


def fp8(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(E4M3)


def static(result: Tensor, input: Tensor, scale: Tensor, group_shape: Any = None) -> None:
    result.copy_(fp8(input.float() * scale.reciprocal()))


def per_token(result: Tensor, input: Tensor, scale: Tensor, scale_ub: Any) -> None:
    s = (input.float().abs().amax(-1, keepdim=True) / 448).clamp(min=FLOOR)
    scale.copy_(s)
    result.copy_(fp8(input.float() / s))


def per_tensor(result: Tensor, input: Tensor, scale: Tensor) -> None:
    scale.copy_(input.float().abs().max() / 448)
    result.copy_(fp8(input.float() / scale))


def _grouped(x: Tensor, group: int, eps: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    blocks = x.float().view(x.shape[0], -1, group)
    s = blocks.abs().amax(-1, keepdim=True).clamp(min=eps) / 448
    s = torch.exp2(torch.ceil(torch.log2(s))) if power_of_two else s
    return fp8(blocks / s).view(x.shape), s.squeeze(-1)


def per_group(input: Tensor, output_q: Tensor, output_s: Tensor, group: int, eps: float, low: float, high: float,
              ue8m0: bool, *_: Any) -> None:  # fmt: skip
    q, s = _grouped(input, group, eps, ue8m0)
    output_q.copy_(q)
    output_s.copy_(s)


def packed(input: Tensor, output_q: Tensor, output_s: Tensor, group: int, eps: float, low: float, high: float) -> None:
    q, s = _grouped(input, group, eps, True)
    output_q.copy_(q)
    output_s.copy_(formats.apply_layout(s, "col+tma+ue8m0_packed"))


def fp4(input: Tensor, scale: Tensor, swizzled: bool) -> tuple[Tensor, Tensor]:
    return formats.quantize(input, scale, "nvfp4", "swizzled_128x4" if swizzled else "linear")


def fp4_out(input: Tensor, scale: Tensor, swizzled: bool, *, output: Tensor, output_scale: Tensor) -> None:
    q, scales = fp4(input, scale, swizzled)
    output.copy_(q)
    output_scale.copy_(scales.view(output_scale.dtype))


def _product(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype, bias: Any = None) -> Tensor:
    y = (x.float() * x_scale) @ (weight.float() * weight_scale)
    return (y if bias is None else y + bias).to(dtype)


def cutlass(out: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Any) -> None:
    if a_scales.shape[-1] > 1:  # 1 x 128 groups and 128 x 128 blocks
        a_scales = a_scales.repeat_interleave(128, 1)
        b_scales = b_scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    out.copy_(_product(a, b, a_scales, b_scales, out.dtype, bias))


def _fp4_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, alpha: Tensor, dtype: Any, layout: str) -> Tensor:
    """b by rows of the transposed weight."""
    x = formats.dequantize(a, a_scale.view(E4M3), None, "nvfp4", layout)
    w = formats.dequantize(b, b_scale.view(E4M3), None, "nvfp4", "swizzled_128x4")
    return ((x @ w.t()) * alpha).to(dtype)


def cutlass_fp4(out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, alpha: Tensor) -> None:
    out.copy_(_fp4_product(a, b, a_scale, b_scale, alpha, out.dtype, "swizzled_128x4"))


def mm_fp4(A: Tensor, B: Tensor, A_scale: Tensor, B_scale: Tensor, g_scale: Tensor, dtype: torch.dtype, use_8x4: bool,
           backend: str, block_size: int = 16, use_nvfp4: bool = True) -> Tensor:  # fmt: skip
    layout = "swizzled_8x4" if use_8x4 else "swizzled_128x4"
    return _fp4_product(A, B.t(), A_scale, B_scale.t(), g_scale, dtype, layout)


def bmm(A: Tensor, B: Tensor, A_scale: Tensor, B_scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.bmm(A.float() * A_scale, B.float() * B_scale).to(dtype)


def bmm_out(workspace: Tensor, A: Tensor, B: Tensor, D: Tensor, A_scale: Tensor, B_scale: Tensor) -> None:
    D.copy_(bmm(A, B, A_scale, B_scale, D.dtype, ""))


def gemm_nt(q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor, output: Tensor, e8m0: bool) -> None:
    cutlass(output, q, weight.t(), q_scale, weight_scale.t(), None)


BODIES: dict[str, Callable[..., Any]] = {
    "_C::static_scaled_fp8_quant": static,
    "_C::dynamic_per_token_scaled_fp8_quant": per_token,
    "_C::dynamic_scaled_fp8_quant": per_tensor,
    "_C::per_token_group_fp8_quant": per_group,
    "_C::per_token_group_fp8_quant_packed": packed,
    "_C::scaled_fp4_quant": fp4,
    "_C::scaled_fp4_quant.out": fp4_out,
    "_C::cutlass_scaled_mm": cutlass,
    "_C::cutlass_scaled_fp4_mm": cutlass_fp4,
    "vllm::triton_per_token_group_quant_fp8": lambda x, group: _grouped(x, group, 1e-10, False),
    "vllm::flashinfer_mm_fp4": mm_fp4,
    "vllm::bmm_fp8": bmm,
    "vllm::fp8_gemm_nt_op": gemm_nt,
    "flashinfer::bmm_fp8": bmm_out,
}


@pytest.fixture(scope="module", autouse=True)
def engines() -> Iterator[None]:
    libraries = []
    for namespace, schemas in SCHEMAS.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        libraries.append(library)
        for schema in schemas:
            name = schema.split("(")[0]
            library.define(schema)
            library.impl(name, BODIES[f"{namespace}::{name}"], "CompositeExplicitAutograd")
            body = BODIES[f"{namespace}::{name}"]
            torch.library.register_fake(
                f"{namespace}::{name}", body if schema.endswith("Tensor") or "Tensor, Tensor)" in schema else _nothing,
                lib=library,
            )  # fmt: skip
    yield
    for library in libraries:
        library._destroy()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def rows(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(TOKENS, K) * torch.logspace(-3, 2, TOKENS).unsqueeze(1)).to(dtype)


def both(fn: Callable[..., Any], *args: Any, v2: bool = True, dynamic: int | None = 0) -> Raised:
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        gm, inputs = capture(fn, args, dynamic)
    return raise_exactly(gm, inputs)
