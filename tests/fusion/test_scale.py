"""A factor between an all-reduce and its norm goes before the all-reduce; no other factor moves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.raising.capture import trace
from tpfuse.fusion import fuse
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph

c10d = torch.ops._c10d_functional


def norm(h: Tensor, weight: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def granite(y: Tensor, h: Tensor, w: Tensor) -> Any:
    y = y * 12.0
    return norm(y, w), h + y


def read_unscaled(y: Tensor, h: Tensor, w: Tensor) -> Any:
    return norm(y * 12.0, w), h + y


MODELS = {
    # what becomes of the all-reduce, and whether the factor moved
    granite: ("all_reduce_rms_norm", True),
    read_unscaled: ("all_reduce", False),
    lambda y, h, w: norm(h + y * 0.22, w): ("all_reduce_add_rms_norm", False),
    lambda y, h, w: norm(y * h, w): ("all_reduce", False),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fuel", [True, False])
def test_factor(model: Any, fuel: bool, group: str) -> None:
    def reduced(x: Tensor, h: Tensor, w: Tensor) -> Any:
        return model(c10d.wait_tensor(c10d.all_reduce(x, "sum", group)), h, w)

    gm, inputs = trace(reduced, [torch.randn(24, 8), torch.randn(24, 8), torch.rand(8) + 0.5])
    expected = torch.fx.Interpreter(gm).run(*inputs)
    raise_graph(gm.graph)
    events = fuse(gm.graph, ["all_reduce_norm"], lambda: fuel)
    verify.verify(gm.graph, "fuse")
    name, moved = MODELS[model]
    names = [op.name for n in gm.graph.nodes if (op := find(n.target)) and op.collective]
    assert names == ([name] if fuel else ["all_reduce"])
    assert len([e for e in events if e.rule == "scale_before_all_reduce"]) == (moved and fuel)
    for got, want in zip(torch.fx.Interpreter(gm).run(*inputs), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


FACTORS = {
    # of one element: what it is computed from, and whether it moves
    "a graph input": (lambda c, x: c, True),
    "a graph input, cast": (lambda c, x: c.float(), True),
    "a value of this rank": (lambda c, x: x.sum(), False),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factor_in_a_tensor(name: str, group: str) -> None:
    """Gemma scales its embedding by a buffer.  What a rank computed itself may differ from rank to rank, so it stays."""
    factor, moves = FACTORS[name]

    def model(x: Tensor, h: Tensor, w: Tensor, c: Tensor) -> Any:
        y = c10d.wait_tensor(c10d.all_reduce(x, "sum", group)) * factor(c, x)
        return norm(y, w), h + y

    scale = torch.tensor(12.0, dtype=torch.float64 if "cast" in name else torch.float32)
    gm, inputs = trace(model, [torch.randn(24, 8), torch.randn(24, 8), torch.rand(8) + 0.5, scale])
    expected = torch.fx.Interpreter(gm).run(*inputs)
    raise_graph(gm.graph)
    events = fuse(gm.graph, ["all_reduce_norm"], lambda: True)
    verify.verify(gm.graph, "fuse")
    assert len([e for e in events if e.rule == "scale_before_all_reduce"]) == moves
    names = [op.name for n in gm.graph.nodes if (op := find(n.target)) and op.collective]
    assert names == ["all_reduce_rms_norm" if moves else "all_reduce"]
    for got, want in zip(torch.fx.Interpreter(gm).run(*inputs), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
