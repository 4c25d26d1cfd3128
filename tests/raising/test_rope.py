"""Rotations of normalised heads, in every spelling and shape that models give them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import raised, trace
from tpfuse.fusion import fuse
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph
from tpfuse.report import Event

HEADS, GROUPS, WIDTH = 4, 2, 16


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).to(x.dtype)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), -1) * sin


def half_chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack((-second, first), -1).flatten(-2) * sin


def interleaved_stack(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(x.float(), cos.float(), sin.float()).to(x.dtype)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    return torch.cat((half(x[..., :width], cos[..., :width], sin[..., :width]), x[..., width:]), -1)


def commuted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return sin * torch.cat((-second, first), -1) + cos * x


TURNS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "half": (half, "half"),
    "commuted": (commuted, "half"),
    "half_chunks": (half_chunks, "half+pairs"),
    "interleaved": (interleaved, "interleaved"),
    "interleaved_stack": (interleaved_stack, "interleaved+pairs"),
    "wide": (wide, "half"),
    "partial": (partial, "half"),
}


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Projected q and k of 24 tokens, the norms' weights, the tables."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(24, h * WIDTH, generator=generator) * 3e-3 for h in (HEADS, GROUPS))
    weights = [torch.rand(WIDTH, generator=generator) * 2 + 0.5 for _ in range(2)]
    angles = torch.randn(24, WIDTH, generator=generator)
    return [x.to(dtype) for x in (q, k, *weights, angles.cos(), angles.sin())]


def transposed(turn: Callable[..., Tensor], normalise: Callable[..., Tensor] = norm) -> Callable[..., Any]:
    """As transformers' models: heads before tokens, a batch of one.  Gemma's norms come after the transposition."""

    def model(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[None].unsqueeze(1), sin[None].unsqueeze(1)
        if normalise is gemma_norm:
            q, k = (normalise(x.view(1, -1, h, WIDTH).transpose(1, 2), w) for x, h, w in ((q, HEADS, wq), (k, GROUPS, wk)))
        else:
            q, k = (normalise(x.view(1, -1, h, WIDTH), w).transpose(1, 2) for x, h, w in ((q, HEADS, wq), (k, GROUPS, wk)))
        return turn(q, cos, sin), turn(k, cos, sin)

    return model


def flat(turn: Callable[..., Tensor]) -> Callable[..., Any]:
    """As engines: tokens, then heads, no batch."""

    def model(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = norm(q.view(-1, HEADS, WIDTH), wq), norm(k.view(-1, GROUPS, WIDTH), wk)
        return turn(q, cos[:, None], sin[:, None]), turn(k, cos[:, None], sin[:, None])

    return model


@pytest.mark.parametrize("spelling", TURNS)
@pytest.mark.parametrize("layout", [transposed, flat])
def test_spelling(spelling: str, layout: Callable[..., Any]) -> None:
    turn, style = TURNS[spelling]
    found = raised(layout(turn), *inputs())
    assert [name for name, _ in found.calls] == ["rms_norm", "rms_norm", "rotary"] and not found.events
    (args,) = found.named("rotary")
    assert args["style"].removesuffix("+heads_first") == style
    assert [a.meta["val"].shape[-2] for a in (args["q"], args["k"])] == [HEADS, GROUPS]


def test_norm_after_transposition() -> None:
    found = raised(transposed(half, gemma_norm), *inputs())
    assert [name for name, _ in found.calls] == ["rms_norm", "rms_norm", "rotary"]
    for args in found.named("rms_norm"):
        assert args["weight_bias"] == 1.0 and args["x"].meta["val"].shape[-2] in (HEADS, GROUPS)


def wrong_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((second, -first), -1) * sin


def wrong_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin


def other_source(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.neg().exp()
    return x * cos + torch.cat((-y[..., 8:], y[..., :8]), -1) * sin


def in_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(x.float(), cos, sin)


def one_angle(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(x, cos[..., :1], sin[..., :1])


def one_angle_of_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half_chunks(x, cos[..., :2], sin[..., :2])


@pytest.mark.parametrize("turn", [wrong_sign, wrong_halves, other_source, in_fp32, one_angle, one_angle_of_halves])
def test_not_a_rotation(turn: Callable[..., Tensor]) -> None:
    found = raised(transposed(turn), *inputs())
    assert [name for name, _ in found.calls] == ["rms_norm", "rms_norm"]


def test_complex_rotation() -> None:
    """DeepSeek-V2's spelling is named on the node; the norms before it say so where they stay unfused."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        table = torch.polar(torch.ones_like(cos[..., :8].float()), cos[..., :8].float())
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)

    gm, _ = trace(transposed(turn), inputs())
    raise_graph(gm.graph)
    declined = [e.reason.code for e in fuse(gm.graph, ["qk_norm_rope"]) if e.reason]
    assert declined == ["complex_rotary"] * 2


def test_different_tables() -> None:
    def model(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = norm(q.view(-1, HEADS, WIDTH), wq), norm(k.view(-1, GROUPS, WIDTH), wk)
        return half(q, cos[:, None], sin[:, None]), half(k, sin[:, None], cos[:, None])

    assert not raised(model, *inputs()).named("rotary")


def fused(fn: Callable[..., Any], args: list[Tensor], *passes: str) -> tuple[list[str], list[Event]]:
    """Raise and fuse; the result must be the model's, bit for bit."""
    gm, real = trace(fn, args)
    wanted = fx.Interpreter(gm).run(*real)
    raise_graph(gm.graph)
    events = fuse(gm.graph, passes or ["qk_norm_rope"])
    verify.verify(gm.graph, "fuse")
    for got, want in zip(fx.Interpreter(gm).run(*real), wanted, strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()
    return [op.name for n in gm.graph.nodes if (op := find(n.target))], events


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("model", [transposed(half), transposed(half, gemma_norm), transposed(partial), flat(half)])
def test_fused(model: Callable[..., Any], dtype: torch.dtype) -> None:
    names, (event,) = fused(model, inputs(dtype))
    assert names == ["qk_norm_rope"] and event.status == "fired"


def different_epsilon(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = norm(q.view(-1, HEADS, WIDTH), wq), norm(k.view(-1, GROUPS, WIDTH), wk, eps=1e-5)
    return half(q, cos[:, None], sin[:, None]), half(k, cos[:, None], sin[:, None])


def second_user(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q, k = norm(q.view(-1, HEADS, WIDTH), wq), norm(k.view(-1, GROUPS, WIDTH), wk)
    return half(q, cos[:, None], sin[:, None]), half(k, cos[:, None], sin[:, None]), k


@pytest.mark.parametrize(("model", "reason"), [(different_epsilon, "attributes"), (second_user, "second_user")])
def test_not_fused(model: Callable[..., Any], reason: str) -> None:
    names, events = fused(model, inputs())
    assert names == ["rms_norm", "rms_norm", "rotary"]
    assert {(e.status, e.rule, e.reason.code) for e in events if e.reason} == {("declined", "qk_norm_rope", reason)}


def test_weight_dtype() -> None:
    """An FP32 weight under bfloat16 heads belongs to another norm."""
    q, k, *_, cos, sin = inputs()
    weights = [torch.rand(WIDTH) + 0.5 for _ in range(2)]
    names, _ = fused(transposed(half, gemma_norm), [q, k, *weights, cos, sin])
    assert names == ["rms_norm", "rms_norm", "rotary"]


def test_pass_disabled() -> None:
    names, _ = fused(transposed(half), inputs(), "all_reduce_norm")
    assert names == ["rms_norm", "rms_norm", "rotary"]
