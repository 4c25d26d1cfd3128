"""Adapters of engines' quantised products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import capture, raise_exactly
from tests.raising.engines import E4M3, TOKENS, K, N, both, engines, rows
from tests.raising.test_adapters import call_fp4_out
from tpfuse import formats
from tpfuse.raising import adapters, raise_graph

__all__ = ["engines"]  # a fixture of every test here


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
