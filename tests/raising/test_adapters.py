"""Adapters, with stand-ins of the engines' operators: same schemas, bodies in plain torch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import Raised, assert_identical, capture, raise_exactly
from tpfuse import formats
from tpfuse.raising import adapters, raise_graph

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


def call_static(x: Tensor, s: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=E4M3)
    torch.ops._C.static_scaled_fp8_quant(out, x, s)
    return out


def call_token(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, scale = torch.empty(x.shape, dtype=E4M3), torch.empty(x.shape[0], 1)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(out, x, scale, None)
    return out, scale


def call_group(x: Tensor, scales: Tensor, group: int = 128, ue8m0: bool = False, high: float = 448.0) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=E4M3)
    torch.ops._C.per_token_group_fp8_quant(x, out, scales, group, 1e-10, -448.0, high, ue8m0, False, False)
    return out, scales


def call_packed(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=E4M3)
    scales = torch.empty_strided((x.shape[0], 1), (1, (x.shape[0] + 3) // 4 * 4), dtype=torch.int32)
    torch.ops._C.per_token_group_fp8_quant_packed(x, out, scales, 128, 1e-10, -448.0, 448.0)
    return out, scales


def call_fp4(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops._C.scaled_fp4_quant(x, s, True)


def call_fp4_out(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape[0], K // 2, dtype=torch.uint8)
    scales = torch.empty((x.shape[0] + 127) // 128 * 128, K // 64, dtype=torch.int32)
    torch.ops._C.scaled_fp4_quant.out(x, s, True, output=q, output_scale=scales)
    return q, scales.view(E4M3)


def columns(x: Tensor) -> Tensor:
    return torch.empty(K // 128, x.shape[0]).permute(1, 0)


FLOORED = "eps=0.0,amax_min=1e-10"
QUANTISES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "static": (call_static, "fp8_tensor:reciprocal", "row"),
    "token": (call_token, f"fp8_token:eps={FLOOR!r}", "row"),
    "group": (lambda x, s: call_group(x, torch.empty(x.shape[0], 2)), f"fp8_group128:{FLOORED}", "row"),
    "group 64": (lambda x, s: call_group(x, torch.empty(x.shape[0], 4), 64), f"fp8_group64:{FLOORED}", "row"),
    "group, columns": (lambda x, s: call_group(x, columns(x)), f"fp8_group128:{FLOORED}", "col"),
    "group, UE8M0": (
        lambda x, s: call_group(x, torch.empty(x.shape[0], 2), 128, True), f"fp8_group128:log2,{FLOORED}", "row+ue8m0"
    ),
    "group, packed": (call_packed, f"fp8_group128:log2,{FLOORED}", "col+tma+ue8m0_packed"),
    "group, functional": (
        lambda x, s: torch.ops.vllm.triton_per_token_group_quant_fp8(x, 128), f"fp8_group128:{FLOORED}", "row"
    ),
    "NVFP4": (call_fp4, "nvfp4", "swizzled_128x4"),
    "NVFP4, out": (call_fp4_out, "nvfp4", "swizzled_128x4"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISES)
def test_quantises(name: str) -> None:
    spelling, scheme, layout = QUANTISES[name]
    result = both(spelling, rows(), torch.tensor(2.5))
    (call,) = result.named("quantize")
    assert (call["scheme"], call["layout"]) == (scheme, layout) and not result.reasons


@pytest.mark.parametrize("name", ["token", "group, columns", "NVFP4, out"])
def test_first_version_of_auto_functionalized(name: str) -> None:
    spelling, scheme, layout = QUANTISES[name]
    (call,) = both(spelling, rows(), torch.tensor(2.5), v2=False).named("quantize")
    assert (call["scheme"], call["layout"]) == (scheme, layout)


@pytest.mark.parametrize("v2", [True, False])
def test_an_engines_own_buffer_is_filled(v2: bool) -> None:
    """A batch padded for a graph: the first rows of a longer buffer are written, the others stay."""

    def spelling(x: Tensor, s: Tensor, buffer: Tensor) -> Tensor:
        torch.ops._C.static_scaled_fp8_quant(buffer[: x.shape[0]], x, s)
        return buffer.float().sum()

    result = both(spelling, rows(), torch.tensor(2.5), torch.ones(64, K).to(E4M3), v2=v2)
    assert len(result.named("quantize")) == 1


def direct(twice: bool) -> tuple[fx.GraphModule, list[Any]]:
    """A graph in which an engine's operator fills a buffer outside of auto_functionalized, once or twice."""
    gm, inputs = capture(call_static, (rows(), torch.tensor(2.5)), 0)
    (hop,) = [n for n in gm.graph.nodes if "auto_functionalized" in str(n.target)]
    (empty,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.empty.memory_format)
    with gm.graph.inserting_before(hop):
        for _ in range(1 + twice):
            gm.graph.call_function(hop.args[0], (empty, hop.kwargs["input"], hop.kwargs["scale"]))
    (taken,) = hop.users
    taken.replace_all_uses_with(empty)
    gm.graph.erase_node(taken)
    gm.graph.erase_node(hop)
    gm.recompile()
    return gm, inputs


def test_a_buffer_that_is_written_twice() -> None:
    gm, inputs = direct(twice=True)
    want = fx.Interpreter(gm).run(*inputs)
    assert [e.reason.code for e in raise_graph(gm.graph) if e.reason] == ["second_mutation"] * 2
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.tpfuse.quantize.default)
    assert_identical(fx.Interpreter(gm).run(*inputs), want)


def test_calls_outside_of_auto_functionalized() -> None:
    """Buffers in a graph that is not functional: fresh ones are given up, others decline."""
    gm, inputs = direct(twice=False)
    want = fx.Interpreter(gm).run(*inputs)
    assert not raise_graph(gm.graph)
    gm.graph.lint()
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.tpfuse.quantize.default)
    assert_identical(fx.Interpreter(gm).run(*inputs), want)


def call_tensor(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, scale = torch.empty(x.shape, dtype=E4M3), torch.empty(1)
    torch.ops._C.dynamic_scaled_fp8_quant(out, x, scale)
    return out, scale


def call_bounded(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out, scale = torch.empty(x.shape, dtype=E4M3), torch.empty(x.shape[0], 1)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(out, x, scale, s)
    return out, scale


def call_static_groups(x: Tensor, s: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=E4M3)
    torch.ops._C.static_scaled_fp8_quant(out, x, s, (1, 128))
    return out


NEAR_MISSES: dict[str, Callable[..., Any]] = {
    "scale_of_all_tokens": call_tensor,
    "scale_bound": call_bounded,
    "scale_shape": call_static_groups,
    "group_size": lambda x, s: call_group(x, torch.empty(x.shape[0], 8), 32),
    "clamp_bounds": lambda x, s: call_group(x, torch.empty(x.shape[0], 2), 128, False, 240.0),
}


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_near_misses(reason: str) -> None:
    result = both(NEAR_MISSES[reason], rows(), torch.tensor(2.5))
    assert not result.named("quantize") and result.reasons == [reason]


def weights() -> tuple[Tensor, Tensor]:
    return (torch.randn(TOKENS, K) * 3).to(E4M3), (torch.randn(N, K) * 3).to(E4M3)


def call_cutlass(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16)
    torch.ops._C.cutlass_scaled_mm(out, x, w.t(), xs, ws, bias)
    return out


def call_bmm(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor) -> Tensor:
    args = (x.unsqueeze(0), w.t().unsqueeze(0), xs, ws, torch.bfloat16, "auto")
    return torch.ops.vllm.bmm_fp8(*args).view(x.shape[0], -1)


def call_flashinfer_bmm(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor) -> Tensor:
    out, workspace = torch.empty(1, x.shape[0], w.shape[0], dtype=torch.bfloat16), torch.empty(64, dtype=torch.uint8)
    torch.ops.flashinfer.bmm_fp8(workspace, x.view(1, -1, K), w.t().unsqueeze(0), out, xs, ws)
    return out.squeeze(0)


def call_gemm_nt(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16)
    torch.ops.vllm.fp8_gemm_nt_op(x, xs, w, ws, out, False)
    return out


ONE = (torch.tensor([0.5]), torch.tensor([0.25]))
TOKEN = (torch.rand(TOKENS, 1) + 0.5, torch.rand(1, N) + 0.5)
GROUP = (torch.rand(2, TOKENS).t() + 0.5, torch.rand(2, 1) + 0.5)
PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "cutlass": (call_cutlass, ONE, {"scheme": "fp8_tensor", "origin": "_C::cutlass_scaled_mm"}),
    "cutlass, token": (call_cutlass, TOKEN, {"scheme": "fp8_token"}),
    "cutlass, bias": (call_cutlass, (*TOKEN, torch.randn(N, dtype=torch.bfloat16)), {"scheme": "fp8_token"}),
    "cutlass, blocks": (call_cutlass, GROUP, {"scheme": "fp8_group128", "layout": "col"}),
    "vLLM bmm": (call_bmm, ONE, {"scheme": "fp8_tensor", "origin": "vllm::bmm_fp8?backend=auto"}),
    "FlashInfer bmm": (call_flashinfer_bmm, ONE, {"scheme": "fp8_tensor", "origin": "flashinfer::bmm_fp8"}),
    "DeepGEMM": (
        call_gemm_nt, (GROUP[0], torch.rand(1, 2) + 0.5),
        {"scheme": "fp8_group128", "layout": "col", "origin": "vllm::fp8_gemm_nt_op?e8m0=0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    spelling, scales, expected = PRODUCTS[name]
    result = both(spelling, *weights(), *scales, dynamic=None)
    (call,) = result.named("scaled_matmul")
    assert {key: call[key] for key in expected} == expected and not result.reasons
    assert call["out_dtype"] == "bfloat16" and (call["bias"] is not None) == (len(scales) == 3)


def nvfp4_operands(layout: str = "swizzled_128x4") -> list[Tensor]:
    g = torch.tensor(200.0)
    q, s = formats.quantize(torch.randn(TOKENS, K), g, "nvfp4", layout)
    w, ws = formats.quantize(torch.randn(N, K), g, "nvfp4", "swizzled_128x4")
    return [q, w, s, ws, 1 / (g * g)]


def call_cutlass_fp4(q: Tensor, w: Tensor, s: Tensor, ws: Tensor, alpha: Tensor) -> Tensor:
    out = torch.empty(q.shape[0], w.shape[0], dtype=torch.bfloat16)
    torch.ops._C.cutlass_scaled_fp4_mm(out, q, w, s, ws, alpha)
    return out


def mm_fp4_of(small: bool, backend: str = "cutlass") -> Callable[..., Tensor]:
    def call(q: Tensor, w: Tensor, s: Tensor, ws: Tensor, alpha: Tensor) -> Tensor:
        views = s.view(torch.uint8), ws.view(torch.uint8).t()
        return torch.ops.vllm.flashinfer_mm_fp4(q, w.t(), *views, alpha, torch.bfloat16, small, backend)

    return call


FP4: dict[str, tuple[Callable[..., Any], str, str]] = {
    "cutlass": (call_cutlass_fp4, "swizzled_128x4", "_C::cutlass_scaled_fp4_mm"),
    "FlashInfer": (mm_fp4_of(False), "swizzled_128x4", "vllm::flashinfer_mm_fp4?backend=cutlass&scales=uint8"),
    "FlashInfer, 8x4": (mm_fp4_of(True), "swizzled_8x4", "vllm::flashinfer_mm_fp4?backend=cutlass&scales=uint8"),
}


@pytest.mark.parametrize("name", FP4)
def test_fp4_products(name: str) -> None:
    spelling, layout, origin = FP4[name]
    result = both(spelling, *nvfp4_operands(layout))
    (call,) = result.named("scaled_matmul")
    assert (call["scheme"], call["layout"], call["origin"]) == ("nvfp4", layout, origin) and not result.reasons
    assert call["alpha"].op == "placeholder"


def test_a_shuffled_weight_is_declined() -> None:
    result = both(mm_fp4_of(True, "trtllm"), *nvfp4_operands("swizzled_8x4"))
    assert not result.named("scaled_matmul") and result.reasons == ["weight_layout"]


def test_a_batch_of_two_is_declined() -> None:
    def spelling(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor) -> Tensor:
        return torch.ops.vllm.bmm_fp8(x.view(2, -1, K), w.t().view(2, K // 2, -1)[:, :1].expand(2, K, N), xs, ws,
                                      torch.bfloat16, "auto")  # fmt: skip

    gm, inputs = capture(spelling, (*weights(), *ONE), None)
    result = raise_exactly(gm, inputs)
    assert not result.named("scaled_matmul") and result.reasons == ["batch"]


def test_views_of_bytes_fold_between_quantise_and_product() -> None:
    """vLLM hands block scales over as bytes: the product takes the quantise's own results."""

    def spelling(x: Tensor, g: Tensor, w: Tensor, ws: Tensor) -> Tensor:
        q, s = call_fp4_out(x, g)
        return mm_fp4_of(False)(q, w, s, ws, g)

    w, ws = formats.quantize(torch.randn(N, K), torch.tensor(200.0), "nvfp4", "swizzled_128x4")
    gm, _ = capture(spelling, (rows(), torch.tensor(200.0), w, ws), 0)
    raise_graph(gm.graph)
    (product,) = gm.graph.find_nodes(op="call_function", target=torch.ops.tpfuse.scaled_matmul.default)
    (quantise,) = gm.graph.find_nodes(op="call_function", target=torch.ops.tpfuse.quantize.default)
    assert product.args[0].args == (quantise, 0) and product.args[2].args == (quantise, 1)


@pytest.mark.parametrize("name", ["cutlass, token", "cutlass, blocks", "vLLM bmm", "DeepGEMM"])
def test_without_the_engine_a_product_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operator is not installed, the product's own body serves, and means the same."""
    spelling, scales, _ = PRODUCTS[name]
    args = (*weights(), *scales)
    gm, inputs = capture(spelling, args, None)
    raise_graph(gm.graph)
    want = spelling(*args)
    called = fx.Interpreter(gm).run(*inputs)[0]
    assert torch.equal(called, want)
    monkeypatch.setattr(adapters, "resolve", lambda name: None)
    alone = fx.Interpreter(gm).run(*inputs)[0]
    assert (alone.float() - want.float()).norm() <= 4e-3 * want.float().norm()


def test_doctor_lists_the_adapters() -> None:
    pytest.importorskip("rich")
    from tpfuse.cli.doctor import examine

    listed = {fact.name: fact.usable for fact in examine() if fact.area == "Engines' operators"}
    assert listed == adapters.status() and listed["_C::scaled_fp4_quant"] is True


def test_status_lists_what_is_installed() -> None:
    status = adapters.status()
    assert status["_C::cutlass_scaled_mm"] is True and status["vllm::bmm_fp8"] is True
    adapters.register(adapters.Adapter("no_engine::quant", "quantize", lambda call: {}, ("out",)))
    try:
        assert adapters.status()["no_engine::quant"] is False
    finally:
        del adapters._adapters["no_engine::quant"]
