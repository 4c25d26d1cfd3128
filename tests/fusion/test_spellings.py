"""One chain, all-reduce → residual → norm → static FP8, in the ways that models may write it: the same operator each time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.fusion.graphs import names
from tests.raising.capture import trace
from tpfuse.fusion import fuse
from tpfuse.raising import raise_graph

HIDDEN = 64
PASSES = ("all_reduce_norm", "all_reduce_norm_quantize")
c10d = torch.ops._c10d_functional


def norm(h: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    wide = h.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def commuted(h: Tensor, w: Tensor) -> Tensor:
    wide = h.float()
    return (torch.rsqrt(1e-6 + (wide * wide).mean(-1, keepdim=True)) * wide).to(h.dtype) * w


def cast_last(h: Tensor, w: Tensor) -> Tensor:
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * w.float()).to(h.dtype)


def fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


VARIANTS: dict[str, Callable[..., Any]] = {
    "as it is": lambda y, h, w, s: fp8(norm(h + y, w), s),
    "another epsilon": lambda y, h, w, s: fp8(norm(h + y, w, 3e-4), s),
    "commuted": lambda y, h, w, s: fp8(commuted(y + h, w), s),
    "views": lambda y, h, w, s: fp8(norm((h.view(1, -1, HIDDEN) + y.view(1, -1, HIDDEN)), w).view(-1, HIDDEN), s),
    "cast after the weight": lambda y, h, w, s: fp8(cast_last(h + y, w), s),
    "cast inside the quantise": lambda y, h, w, s: (norm(h + y, w) / s).clamp(-448, 448).to(torch.float8_e4m3fn),
    "reciprocal": lambda y, h, w, s: (norm(h + y, w).float() * s.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn),
}


def run(model: Callable[..., Any], group: str, weight: torch.dtype = torch.bfloat16) -> tuple[list[str], list[str]]:
    def reduced(x: Tensor, *rest: Tensor) -> Any:
        return model(c10d.wait_tensor(c10d.all_reduce(x, "sum", group)), *rest)

    rows = [torch.randn(24, HIDDEN).bfloat16() for _ in range(2)]
    gm, inputs = trace(reduced, [*rows, (torch.rand(HIDDEN) + 0.5).to(weight), torch.tensor(0.02)])
    want = fx.Interpreter(gm).run(*inputs)
    raise_graph(gm.graph)
    events = fuse(gm.graph, PASSES)
    for a, b in zip(fx.Interpreter(gm).run(*inputs), want, strict=True):
        assert torch.equal(a.float(), b.float())
    return names(gm), [e.reason.code for e in events if e.reason]


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_operator(variant: str, group: str) -> None:
    operators, reasons = run(VARIANTS[variant], group)
    assert operators == ["all_reduce_add_rms_norm_quantize"] and not reasons


def test_a_weight_of_another_dtype(group: str) -> None:
    operators, reasons = run(VARIANTS["as it is"], group, torch.float32)
    assert "all_reduce_add_rms_norm_quantize" not in operators and "weight_dtype" in reasons
