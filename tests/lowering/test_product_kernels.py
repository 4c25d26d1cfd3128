"""Which products have a kernel, on targets that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpfuse.ir.matmul import scaled_matmul
from tpfuse.lowering.product_kernels import multipliable
from tpfuse.lowering.select import Pick, lower, pick
from tpfuse.report import Decline
from tpfuse.rewrite.emit import emit
from tpfuse.target import Target

H100 = Target("cuda", 90, 2, True, frozenset({"reference", "triton", "cuda"}))
CPU = Target("cpu", 0, 2, False, frozenset({"reference"}))


def sample(scheme: str, **more: Any) -> dict[str, Any]:
    return scaled_matmul.sample(tokens=16, hidden=256, width=128, scheme=scheme, **more)


@pytest.mark.parametrize("scheme", ["fp8_group128", "fp8_group64", "nvfp4"])
def test_one_is_picked_where_torch_has_none(scheme: str) -> None:
    found = pick(scaled_matmul, sample(scheme), H100, "auto")
    assert isinstance(found, Pick) and found.name == "triton"
    assert isinstance(pick(scaled_matmul, sample(scheme), CPU, "auto"), Pick)  # the reference


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_token"])
def test_native_products_stay_aten(scheme: str) -> None:
    found = pick(scaled_matmul, sample(scheme), H100, "auto")
    assert isinstance(found, Decline) and "aten._scaled_mm multiplies it" in found.detail


@pytest.mark.parametrize(
    "scheme, change, code",
    [
        ("fp8_group128", {"layout": "col+tma+ue8m0_packed"}, "packed_scales"),
        ("fp8_group128", {"out_dtype": "float8_e4m3fn"}, "out_dtype"),
        ("fp8_group128", {"weight_scale": torch.ones(2, 3)}, "scale_shape"),
        ("fp8_token", {"alpha": torch.ones(1)}, "alpha"),
        ("fp8_tensor", {"weight": torch.empty(250, 256, dtype=torch.float8_e4m3fn).t()[:, :40]}, "not_multiple_of_16"),
        ("nvfp4", {"weight": torch.empty(128, 128, dtype=torch.uint8)}, "strides"),
    ],
)
def test_declines(scheme: str, change: dict[str, Any], code: str) -> None:
    assert multipliable(sample(scheme), H100) is None
    reason = multipliable({**sample(scheme), **change}, H100)
    assert reason is not None and reason.code == code
    assert multipliable(sample(scheme), CPU).code == "no_sm_90"  # type: ignore[union-attr]


@pytest.mark.parametrize("target, lowered", [(H100, ["scaled_matmul"]), (CPU, [])])
def test_without_a_kernel_the_body_goes_back_to_aten(target: Target, lowered: list[str]) -> None:
    graph = torch.fx.Graph()
    args = sample("fp8_group128")
    nodes = {name: graph.placeholder(name) if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    with torch._subclasses.FakeTensorMode() as mode:
        for name, node in nodes.items():
            if isinstance(node, torch.fx.Node):
                node.meta["val"] = mode.from_tensor(args[name])
    product = emit(graph, scaled_matmul.default, list(nodes.values()), like=nodes["x"])
    graph.output(product)
    events = lower(graph, lambda group: target, "auto")
    assert [e.rule for e in events] == lowered
    left = [n.target for n in graph.nodes if n.op == "call_function"]
    assert (scaled_matmul.lowered in left) == bool(lowered) and scaled_matmul.default not in left
