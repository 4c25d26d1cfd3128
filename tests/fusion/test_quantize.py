"""Norms and activations with the quantisation after them: from the model's spelling to one operator, bit-identical."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.raising.capture import assert_identical, trace
from tpfuse.config import PASSES
from tpfuse.fusion.composites import fuse
from tpfuse.ir.op import find
from tpfuse.raising import raise_graph

E4M3 = torch.float8_e4m3fn
HIDDEN = 256


def norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def static(x: Tensor) -> Tensor:
    return (x.float() / torch.full((), 0.0043)).clamp(-448, 448).to(E4M3)


def token(x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.abs().amax(-1, keepdim=True) / 448).float()
    return (x.float() / s).clamp(-448, 448).to(E4M3), s


def group(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.view(-1, HIDDEN // 128, 128)
    s = (blocks.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-10)
    return (blocks / s).clamp(-448, 448).to(E4M3).view(-1, HIDDEN), s.squeeze(-1)


def nvfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    return nvfp4_quantize(x, 16, torch.full((), 0.002))


def tensor_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.abs().amax() / 448).float()
    return (x.float() / s).clamp(-448, 448).to(E4M3), s


def run(fn: Callable[..., Any], *args: Tensor) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(operators after fusing, reasons of what was declined); the graph's results stay the model's, bit for bit."""
    gm, inputs = trace(fn, args, 0)
    want = fx.Interpreter(gm).run(*inputs)
    events = [*raise_graph(gm.graph), *fuse(gm.graph, PASSES)]
    gm.graph.lint()
    assert_identical(fx.Interpreter(gm).run(*inputs), want)
    calls = [(op.name, op.bind(n.args, n.kwargs)) for n in gm.graph.nodes if (op := find(n.target))]
    return calls, [e.reason.code for e in events if e.reason]


def rows() -> tuple[Tensor, Tensor]:
    return (torch.randn(24, HIDDEN) * 3e-3).bfloat16(), (torch.rand(HIDDEN) * 2.75 + 0.25).bfloat16()


SCHEMES: dict[str, tuple[Callable[..., Any], str]] = {
    "static": (static, "fp8_tensor"),
    "token": (token, "fp8_token:low_scale,eps=0.0"),
    "group": (group, "fp8_group128"),
    "nvfp4": (nvfp4, "nvfp4:div,eps=0.015625"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_norm(name: str) -> None:
    quantise, scheme = SCHEMES[name]
    ((operator, args),), reasons = run(lambda x, w: quantise(norm(x, w)), *rows())
    assert (operator, args["scheme"], args["eps"]) == ("rms_norm_quantize", scheme, 1e-5) and not reasons


@pytest.mark.parametrize("name", SCHEMES)
def test_add_and_norm_with_the_residual_and_the_norm_alive(name: str) -> None:
    quantise, scheme = SCHEMES[name]

    def layer(x: Tensor, r: Tensor, w: Tensor) -> tuple[Any, ...]:
        h = r + x
        y = norm(h, w)
        return quantise(y), y.float().sum(-1), h

    x, w = rows()
    calls, reasons = run(layer, x, x.flip(0), w)
    assert [name for name, _ in calls] == ["add_rms_norm_quantize"] and not reasons
    assert calls[0][1]["scheme"] == scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_activation(name: str) -> None:
    quantise, scheme = SCHEMES[name]
    x, _ = rows()
    calls, reasons = run(lambda gate, up: quantise(F.silu(gate) * up), x * 300, x.flip(0) * 300)
    assert [(n, a["scheme"]) for n, a in calls] == [("act_and_mul_quantize", scheme)] and not reasons


@pytest.mark.parametrize("name", ["token", "group"])
def test_view_between_norm_and_quantise(name: str) -> None:
    """A model of [1, tokens, hidden] quantises [tokens, hidden]."""
    quantise, _ = SCHEMES[name]
    x, w = rows()
    calls, reasons = run(lambda x, w: quantise(norm(x.view(1, -1, HIDDEN), w).view(-1, HIDDEN)), x, w)
    assert [name for name, _ in calls] == ["rms_norm_quantize"] and not reasons


@pytest.mark.parametrize("quantise", [tensor_scale, lambda x: nvfp4_of_all(x)])
def test_a_scale_of_all_tokens_is_not_fused(quantise: Callable[..., Any]) -> None:
    calls, reasons = run(lambda x, w: quantise(norm(x, w)), *rows())
    assert [name for name, _ in calls] == ["rms_norm", "quantize"] and set(reasons) == {"depends_on_result"}


def nvfp4_of_all(x: Tensor) -> tuple[Tensor, Tensor]:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    return nvfp4_quantize(x, 16, x.abs().max().float() / 2688)
