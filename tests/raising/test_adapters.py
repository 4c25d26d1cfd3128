"""Adapters of engines' quantisations and of what all adapters share."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import assert_identical, capture
from tests.raising.engines import E4M3, FLOOR, K, both, engines, rows
from tpfuse.raising import adapters, raise_graph

__all__ = ["engines"]  # a fixture of every test here


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


def test_an_entry_of_ones_own_replaces_the_tables() -> None:
    """Also one that was made before anything was raised."""
    own = """
from torch import fx
from tpfuse.raising import adapters
own = adapters.Adapter("_C::scaled_fp4_quant", "quantize", lambda call: {}, ())
adapters.register(own)
adapters.raise_adapted(fx.Graph())
assert adapters._adapters[own.operator] is own
"""
    subprocess.run([sys.executable, "-c", own], check=True, timeout=60)
