"""torchao's own quantised linears under torch.compile: every quantise and product raised, each product fed by its quantise.

torchao asks for sm_89 (FP8) and sm_100 (NVFP4) before it quantises a model; that question is answered for it here.  Its FP8
graphs run on CPU.  Its NVFP4 products do not: there the raised graph runs, beside torchao's own dequantised product.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.raising.capture import capture, raise_exactly, row_scales
from tpfuse.ir.op import find
from tpfuse.raising import raise_graph

pytest.importorskip("torchao")
from torchao.prototype.mx_formats import inference_workflow  # noqa: E402
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quant_api, quantize_  # noqa: E402


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 256)).bfloat16()


def operators(gm: fx.GraphModule) -> list[tuple[str, dict[str, Any]]]:
    return [(op.name, op.bind(n.args, n.kwargs)) for n in gm.graph.nodes if (op := find(n.target))]


@pytest.mark.parametrize("shape", [(24, 256), (1, 24, 256)])
@pytest.mark.parametrize(
    ("granularity", "quantise", "product"),
    [
        pytest.param(PerRow(), "fp8_token:low_scale,eps=0.0", "fp8_token", marks=row_scales),
        (PerTensor(), "fp8_tensor", "fp8_tensor"),
    ],
)
def test_fp8(granularity: Any, quantise: str, product: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    model = mlp()
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=granularity))
    gm, inputs = capture(model, (torch.randn(shape, dtype=torch.bfloat16),), len(shape) - 2)
    result = raise_exactly(gm, inputs)
    assert [name for name, _ in result.calls] == ["quantize", "scaled_matmul"] * 2 and not result.reasons
    assert [args["scheme"] for _, args in result.calls] == [quantise, product] * 2
    assert [args["bias"] is None for args in result.named("scaled_matmul")] == [True, False]


@row_scales
def test_fp8_products_take_the_scales_of_their_quantise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    model = mlp()
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    gm, _ = capture(model, (torch.randn(1, 24, 256, dtype=torch.bfloat16),), 1)
    raise_graph(gm.graph)
    pairs = zip(*[iter(operators(gm))] * 2, strict=True)
    for (_, quantise), (_, product) in pairs:
        assert product["x_scale"].args[0].args[0] is quantise["x"] and product["x_scale"].args[1] == 1


class Stopped(Exception):
    pass


def graph_of(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Inductor would compile and its inputs, not run."""
    from torch._inductor.compile_fx import compile_fx

    found: list[Any] = []

    def inner(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        def call(inputs: list[Any]) -> Any:
            found.extend([gm, list(inputs)])
            raise Stopped

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(model, backend=lambda gm, ins: compile_fx(gm, ins, inner_compile=inner), fullgraph=True)
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False), pytest.raises(Stopped):
        compiled(x)
    return found[0], found[1]


@pytest.mark.parametrize("of_all_tokens", [True, False])
def test_nvfp4(of_all_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_workflow, "is_sm_at_least_100", lambda: True)
    model = mlp()
    config = inference_workflow.NVFP4DynamicActivationNVFP4WeightConfig(
        use_triton_kernel=False, use_dynamic_per_tensor_scale=of_all_tokens
    )
    quantize_(model, config)
    x = torch.randn(24, 256, dtype=torch.bfloat16)
    gm, inputs = graph_of(model, x)
    assert not raise_graph(gm.graph)
    calls = operators(gm)
    assert [name for name, _ in calls] == ["quantize", "scaled_matmul"] * 2
    assert calls[0][1]["scheme"] == ("nvfp4:div,eps=0.015625" if of_all_tokens else "nvfp4:eps=0.015625")
    assert calls[0][1]["layout"] == calls[1][1]["layout"] == calls[1][1]["weight_layout"] == "swizzled_128x4"
    for (_, quantise), (_, product) in zip(calls[::2], calls[1::2], strict=True):
        assert product["x"].args[0] is product["x_scale"].args[0] and product["x"].args[0].args[0] is quantise["x"]


@pytest.mark.parametrize("of_all_tokens", [True, False])
def test_nvfp4_means_the_product_of_the_dequantised(of_all_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    monkeypatch.setattr(inference_workflow, "is_sm_at_least_100", lambda: True)
    model = nn.Linear(256, 512).bfloat16()
    config = inference_workflow.NVFP4DynamicActivationNVFP4WeightConfig(
        use_triton_kernel=False, use_dynamic_per_tensor_scale=of_all_tokens
    )
    quantize_(model, config)
    x = torch.randn(24, 256, dtype=torch.bfloat16)
    gm, inputs = graph_of(model, x)
    raise_graph(gm.graph)
    got = fx.Interpreter(gm).run(*inputs)[0].float()
    p = per_tensor_amax_to_scale(x.abs().max()) if of_all_tokens else None
    rows, weight = (t.dequantize(torch.float32) for t in (NVFP4Tensor.to_nvfp4(x, per_tensor_scale=p), model.weight))
    want = rows @ weight.t() + model.bias.float()
    # torchao multiplies the bfloat16 product by the rounded product of the global scales: two roundings to 2**-9
    assert (got - want).norm() <= 0.005 * want.norm()

