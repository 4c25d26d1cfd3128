"""aten._scaled_mm: raised with everything it carries, bit-identical inlined; near misses named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.raising.capture import capture, raised, row_scales, trace
from tpfuse.ir.op import find, registry
from tpfuse.raising import raise_graph
from tpfuse.raising.scaled_matmuls import kind_of
from tpfuse.report import Decline
from tpfuse.rewrite.match import tensor

E4M3 = torch.float8_e4m3fn
K, N = 64, 32


def operands() -> tuple[Tensor, Tensor]:
    return (torch.randn(24, K) * 3).to(E4M3), (torch.randn(N, K) * 3).to(E4M3).t()


def mm(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor, **more: Any) -> Tensor:
    return torch._scaled_mm(x, w, xs, ws, **{"out_dtype": torch.bfloat16, **more})


TOKEN = (torch.rand(24, 1) + 0.5, torch.rand(1, N) + 0.5)
TENSOR = (torch.tensor(0.5), torch.tensor(0.25))


@pytest.mark.parametrize(
    ("scales", "more", "expected"),
    [
        (TENSOR, {}, {"scheme": "fp8_tensor", "out_dtype": "bfloat16", "fast_accum": False}),
        ((torch.full((1, 1), 0.5), torch.full((1,), 0.5)), {}, {"scheme": "fp8_tensor"}),
        pytest.param(TOKEN, {"use_fast_accum": True}, {"scheme": "fp8_token", "fast_accum": True}, marks=row_scales),
        pytest.param(TOKEN, {"out_dtype": torch.float32}, {"scheme": "fp8_token", "out_dtype": "float32"}, marks=row_scales),
        (TENSOR, {"out_dtype": None}, {"out_dtype": "float8_e4m3fn"}),
    ],
)
def test_scaled_mm(scales: tuple[Tensor, Tensor], more: dict[str, Any], expected: dict[str, Any]) -> None:
    (call,) = raised(lambda x, w, a, b: mm(x, w, a, b, **more), *operands(), *scales).named("scaled_matmul")
    assert {name: call[name] for name in expected} == expected
    assert call["bias"] is None and call["result_scale"] is None and call["origin"] == ""


def test_bias_and_result_scale_are_kept() -> None:
    bias, result = torch.randn(N, dtype=torch.bfloat16), torch.tensor(2.0)
    (call,) = raised(lambda x, w, a, b, c: mm(x, w, a, b, bias=c), *operands(), *TENSOR, bias).named("scaled_matmul")
    assert call["bias"].op == "placeholder"
    (call,) = raised(
        lambda x, w, a, b, c: mm(x, w, a, b, scale_result=c, out_dtype=E4M3), *operands(), *TENSOR, result
    ).named("scaled_matmul")
    assert call["result_scale"].op == "placeholder"


@row_scales
def test_torchao_linear_meets_its_quantise() -> None:
    """What torchao's per-row linear does with a 3-D input: the product takes the quantise's own scales."""

    def linear(x: Tensor, w: Tensor, ws: Tensor) -> Tensor:
        from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

        s = _choose_scale_float8(x, [1, 1, K])
        q = _quantize_affine_float8(x, s)
        y = mm(q.reshape(-1, K), w, s.reshape(-1, 1), ws)
        return y.reshape(*x.shape[:-1], N)

    _, w = operands()
    x = torch.randn(1, 24, K, dtype=torch.bfloat16)
    result = raised(linear, x, w, TOKEN[1], dynamic=1)
    assert result.named("scaled_matmul")[0]["scheme"] == "fp8_token" and not result.reasons
    gm, _ = capture(linear, (x, w, TOKEN[1]), 1)
    raise_graph(gm.graph)
    (product,) = gm.graph.find_nodes(op="call_function", target=torch.ops.tpfuse.scaled_matmul.default)
    (quantise,) = gm.graph.find_nodes(op="call_function", target=torch.ops.tpfuse.quantize.default)
    assert quantise.args[2] == "fp8_token:low_scale,eps=0.0" and product.args[2].args == (quantise, 1)


def test_fp4_as_torchao_calls_it() -> None:
    """Not run: aten._scaled_mm has no FP4 body on CPU.  Raised, the bytes and the scales of the quantise meet the product."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fp4 = torch.float4_e2m1fn_x2

    def linear(q: Tensor, s: Tensor, w: Tensor, ws: Tensor) -> Tensor:
        a, b = q.view(fp4), w.view(fp4).permute(1, 0)
        return torch.ops.aten._scaled_mm.default(a, b, s.view(-1), ws.view(-1), None, None, torch.bfloat16)

    with FakeTensorMode() as mode:
        q, s = torch.empty(128, K // 2, dtype=torch.uint8), torch.empty(128, 4, dtype=E4M3)
        w, ws = torch.empty(128, K // 2, dtype=torch.uint8), torch.empty(128, 4, dtype=E4M3)
        with mode:
            gm = make_fx(linear, select_decomp_table())(q, s, w, ws)
    for alias in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):  # AOTAutograd leaves none
        alias.replace_all_uses_with(alias.args[0])
        gm.graph.erase_node(alias)
    assert not raise_graph(gm.graph)
    (call,) = [op.bind(n.args, n.kwargs) for n in gm.graph.nodes if (op := find(n.target))]
    assert call["scheme"] == "nvfp4" and call["layout"] == call["weight_layout"] == "swizzled_128x4"
    assert call["origin"] == "aten::_scaled_mm" and call["x"].op == "placeholder"


NEGATIVE: dict[str, tuple[Callable[..., Any], str]] = {
    "E5M2": (lambda x, w, a, b: mm(x.float().to(torch.float8_e5m2), w, a.mean(), b.mean()), "dtype"),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_near_misses(name: str) -> None:
    spelling, reason = NEGATIVE[name]
    result = raised(spelling, *operands(), *TOKEN)
    assert not result.named("scaled_matmul") and reason in result.reasons


@pytest.mark.parametrize(
    ("x_scale", "weight_scale", "reason"),
    [
        (torch.empty(1, 1), torch.empty(1, N), "scale_shape"),
        (torch.empty(24, 1), torch.empty(1, N // 2), "scale_shape"),
        (torch.empty(24, 3), torch.empty(1, N), "scale_shape"),
        (torch.empty(24, 2).to(torch.float8_e8m0fnu), torch.empty(2, N).to(torch.float8_e8m0fnu), "scale_dtype"),
    ],
)
def test_scales_without_a_scheme(x_scale: Tensor, weight_scale: Tensor, reason: str) -> None:
    kind = kind_of(*operands(), x_scale, weight_scale)
    assert isinstance(kind, Decline) and kind.code == reason


@pytest.mark.parametrize(
    ("x_scale", "weight_scale", "scheme", "layout"),
    [
        (torch.empty(24, 2), torch.empty(2, 2), "fp8_group128", "row"),
        (torch.empty(2, 24).t(), torch.empty(2, 256), "fp8_group128", "col"),
        (torch.empty(4, 24).t(), torch.empty(4, 4), "fp8_group64", "col"),
        (torch.empty(2, 32).t()[:24], torch.empty(2, 2), "fp8_group128", "col+tma"),
    ],
)
def test_scales_of_groups(x_scale: Tensor, weight_scale: Tensor, scheme: str, layout: str) -> None:
    x, weight = torch.empty(24, 256).to(E4M3), torch.empty(256, 256).to(E4M3)
    assert kind_of(x, weight, x_scale, weight_scale) == (scheme, layout)


def test_global_scales_after_an_fp4_product() -> None:
    """torchao multiplies the rounded product by both global scales, cast to its dtype: they become alpha."""
    fp4 = torch.float4_e2m1fn_x2
    q, w = (torch.randint(0, 256, (n, K // 2), dtype=torch.uint8) for n in (24, N))
    scales = [(torch.rand(128 * 4) + 0.5).to(E4M3) for _ in range(2)]

    def product(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor, g: Tensor) -> Tensor:
        y = torch._scaled_mm(x.view(fp4), w.t().view(fp4), xs, ws, out_dtype=torch.bfloat16)
        return y * g.bfloat16()

    given = torch.tensor(0.37)
    gm, inputs = trace(product, [q, w, *scales, given], None)
    raise_graph(gm.graph)
    (node,) = [n for n in gm.graph.nodes if find(n.target)]
    a = registry["scaled_matmul"].bind(node.args)
    assert a["origin"] == "aten::_scaled_mm?rounds=first" and tensor(a["alpha"]).dtype == torch.bfloat16
    (got,) = torch.fx.Interpreter(gm).run(*inputs)
    plain = registry["scaled_matmul"].default(*{**a, "x": q, "weight": w.t(), "x_scale": scales[0], "weight_scale": scales[1],
                                                "alpha": None, "origin": ""}.values())  # fmt: skip
    assert torch.equal(got, plain * given.bfloat16())
