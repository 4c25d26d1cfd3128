"""An engine's attention operator writes its rows quantised; its other arguments stay, and its scales are cut to real tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import tests.raising.test_quants as spelled
from tests.raising.capture import capture, trace
from tpfuse import formats
from tpfuse.fusion import fuse
from tpfuse.fusion.attention import EngineAttention, register
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph
from tpfuse.report import Event
from tpfuse.shim import auto_functionalized

HEADS, WIDTH = 2, 128
REAL = {"tokens": 24}  # what the engine's metadata say
CALLS: list[dict[str, Any]] = []
LIBRARIES: dict[str, torch.library.Library] = {}  # kept alive: a library that goes takes its operators along


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(-1, HEADS, WIDTH).transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1, HEADS * WIDTH)


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    """Stand-ins with the schema of vLLM's operators: buffers, a layer's name, a tensor that orders the call."""
    rest = "str layer_name, Tensor? output_scale=None, Tensor(b!)? output_block_scale=None, Tensor? kv_cache_dummy_dep=None"

    def run(
        q: Tensor, k: Tensor, v: Tensor, output: Tensor, layer_name: str, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None, kv_cache_dummy_dep: Tensor | None = None,
    ) -> None:  # fmt: skip
        CALLS.append({"layer": layer_name, "dtype": output.dtype, "dependency": kv_cache_dummy_dep})
        rows = attend(q, k, v)
        formats.quantize_into(rows, output.view(rows.shape[0], -1), output_scale, output_block_scale, REAL["tokens"])

    library = LIBRARIES.setdefault("engine", torch.library.Library("tpfuse_attention_engine", "FRAGMENT"))
    for name in ("attention", "fp8_only"):
        library.define(f"{name}(Tensor q, Tensor k, Tensor v, Tensor(a!) output, {rest}) -> ()")
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tpfuse_attention_engine::{name}", lambda *_, **__: None, lib=library)
    library.define("cache_update(Tensor k, Tensor v, str layer_name) -> Tensor")
    library.impl("cache_update", lambda k, v, _: k.new_empty(0), "CompositeExplicitAutograd")
    torch.library.register_fake("tpfuse_attention_engine::cache_update", lambda k, v, _: k.new_empty(0), lib=library)
    register(EngineAttention("tpfuse_attention_engine::attention"))
    register(EngineAttention("tpfuse_attention_engine::fp8_only", schemes=("fp8_tensor",)))


def layer(quantise: Any, operator: str = "attention", by_heads: bool = True, mutates: bool = False) -> Any:
    """An engine's attention layer: a fresh output, the cache's update, the operator, the next layer's quantisation.

    mutates: the operator is called as the engine does, for Dynamo to wrap; else wrapped (v1) already.
    """

    def model(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Any:
        output = torch.empty_like(q)
        dependency = torch.ops.tpfuse_attention_engine.cache_update(k, v, "layers.0")
        buffer = output.view(-1, HEADS, WIDTH) if by_heads else output
        call = getattr(torch.ops.tpfuse_attention_engine, operator)
        if mutates:
            call(q, k, v, buffer, "layers.0", None, None, dependency)
        else:
            args = {"output_scale": None, "output_block_scale": None, "kv_cache_dummy_dep": dependency}
            results = auto_functionalized()(call.default, q=q, k=k, v=v, output=buffer, layer_name="layers.0", **args)
            output = results[1]
        return quantise(output.view(-1, HEADS * WIDTH), scale)

    return model


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [*(torch.randn(24, HEADS * WIDTH, generator=generator).bfloat16() for _ in range(3)), torch.tensor(0.01)]


def fused(fn: Any, fuel: Any = lambda: True, through: Any = trace) -> tuple[list[str], list[Event]]:
    """Raise and fuse; the operator's results are those of the quantisation after it, bit for bit."""
    gm, real = through(fn, inputs())
    wanted = fx.Interpreter(gm).run(*real)
    raise_graph(gm.graph)
    events = fuse(gm.graph, ["attention_quantize"], fuel)
    gm.graph.lint()
    verify.verify(gm.graph, "fuse")
    CALLS.clear()
    got = fx.Interpreter(gm).run(*real)
    for a, b in zip(got, wanted, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert formats_equal(a, b)
    return [op.name for n in gm.graph.nodes if (op := find(n.target))], events


def formats_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


def static(x: Tensor, scale: Tensor) -> Tensor:
    return spelled.fp8(x.float() / scale)


def nvfp4(x: Tensor, scale: Tensor) -> Any:
    """NVFP4 with a global scale that multiplies, spelled by the operator itself: no model spells this in aten."""
    return torch.ops.tpfuse.quantize(x, scale * 1e4, "nvfp4", "swizzled_128x4")


SCHEMES: dict[str, tuple[Any, torch.dtype]] = {
    "static": (static, torch.float8_e4m3fn),
    "static, number": (lambda x, s: spelled.fp8(x.float() / 0.02), torch.float8_e4m3fn),
    "group 128": (lambda x, s: torch.ops.tpfuse.quantize(x, None, "fp8_group128", "row"), torch.float8_e4m3fn),
    "group 64": (lambda x, s: torch.ops.tpfuse.quantize(x, None, "fp8_group64", "row"), torch.float8_e4m3fn),
    "column-major": (lambda x, s: torch.ops.tpfuse.quantize(x, None, "fp8_group128", "col"), torch.float8_e4m3fn),
    "TMA-aligned": (lambda x, s: torch.ops.tpfuse.quantize(x, None, "fp8_group64", "col+tma"), torch.float8_e4m3fn),
    "packed UE8M0": (
        lambda x, s: torch.ops.tpfuse.quantize(x, None, "fp8_group128", "col+tma+ue8m0_packed"), torch.float8_e4m3fn
    ),
    "NVFP4": (nvfp4, torch.uint8),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_quantises_itself(name: str) -> None:
    quantise, dtype = SCHEMES[name]
    names, (event,) = fused(layer(quantise))
    assert not names and event.status == "fired" and event.attributes["operator"] == "tpfuse_attention_engine::attention"
    (call,) = CALLS
    assert call["layer"] == "layers.0" and call["dtype"] == dtype and call["dependency"].shape == (0,)


def test_wrapped_by_torch() -> None:
    """auto_functionalized v2, whose buffers are bases."""
    names, (event,) = fused(layer(static, by_heads=False, mutates=True), through=capture)
    assert not names and event.status == "fired"


def test_buffer_of_rows() -> None:
    names, (event,) = fused(layer(SCHEMES["group 128"][0], by_heads=False))
    assert not names and event.status == "fired"


DECLINED: dict[str, tuple[Any, str]] = {
    "token": (lambda x, s: spelled.per_row(x), "attention"),
    "scheme": (lambda x, s: spelled.grouped(x), "fp8_only"),
    "second_user": (lambda x, s: (static(x, s), x * 2), "attention"),
    "product": (lambda x, s: spelled.fp8(x.float() * s), "attention"),
    "scale_layout": (lambda x, s: torch.ops.tpfuse.quantize(x, s * 1e4, "nvfp4", "linear"), "attention"),
    "order": (lambda x, s: static(x, x.abs().max().float()), "attention"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case: str) -> None:
    quantise, operator = DECLINED[case]
    names, events = fused(layer(quantise, operator))
    assert names == ["quantize"]
    reasons = [e.reason.code for e in events if e.reason]
    assert reasons == [{"token": "scheme", "product": "scheme", "order": "second_user"}.get(case, case)]


def test_fuel() -> None:
    names, _ = fused(layer(static), fuel=lambda: False)
    assert names == ["quantize"]
