"""All-reduces that other terms, factors and sums keep from their residual and norm are brought there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.raising.capture import trace
from tpfuse import testing
from tpfuse.fusion import fuse
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph

c10d = torch.ops._c10d_functional
PASSES = ("merge_all_reduce", "all_reduce_norm")
FUSED = "all_reduce_add_rms_norm"


def reduced(x: Tensor, group: str) -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))


def norm(h: Tensor, weight: Tensor) -> Tensor:
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype) * weight


def gated(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    """Qwen2-MoE's and Qwen3-Next's: shared experts behind a gate that every rank has whole, rows flattened and grouped again."""
    rows = h.view(-1, h.shape[-1])
    gate = torch.sigmoid(rows[:, :1])
    return (reduced(a.view(rows.shape), g) + gate * reduced(b.view(rows.shape), g)).view(h.shape)


def scaled(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    """Laguna's: experts times a constant."""
    return (reduced(a.flatten(0, 1), g) * 2.5 + reduced(b.flatten(0, 1), g)).view(h.shape)


def in_fp32(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    """HunYuan's: both reduced results are added in FP32."""
    return (reduced(a.flatten(0, 1), g).float() + reduced(b.flatten(0, 1), g).float()).to(h.dtype).view(h.shape)


def whole(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    """ExaoneMoE's: experts are sharded, shared experts are not."""
    return reduced(a, g) + torch.tanh(h)


def whole_and_scaled(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    """GraniteMoeHybrid's, times the residual's factor."""
    return (torch.tanh(h) + reduced(a, g)) * 0.22


def summed(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    """Each expert's rows are reduced, then added."""
    return reduced(torch.stack([a, b, a * b]), g).sum(0) + reduced(b, g)


SHAPES = {f.__name__: f for f in (gated, scaled, in_fp32, whole, whole_and_scaled, summed)}


def model(mixed: Callable[..., Tensor], group: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(a: Tensor, b: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = h + mixed(a * 2, b * 3, h, group)
        return norm(h, weight), h

    return call


def inputs(dtype: torch.dtype, seed: int = 0, rank: int = 0) -> list[Tensor]:
    """Partial rows of a rank, [2, 12, 64], and the residual and weight of all."""
    own, all_ranks = torch.Generator().manual_seed(100 * seed + rank + 1), torch.Generator().manual_seed(seed)
    a, b = ((torch.randn(2, 12, 64, generator=own) * 3e-3).to(dtype) for _ in range(2))
    h = (torch.randn(2, 12, 64, generator=all_ranks) * 3e-3).to(dtype)
    return [a, b, h, (torch.rand(64, generator=all_ranks) + 0.5).to(dtype)]


def fused(fn: Callable[..., Any], args: list[Tensor], fuel: Callable[[], bool] = lambda: True) -> list[str]:
    return both(fn, args, fuel)[0]


def both(fn: Callable[..., Any], args: list[Tensor], fuel: Callable[[], bool] = lambda: True) -> tuple[list[str], list[str]]:
    """The collective operators, and the rules that fired."""
    gm, _ = trace(fn, args)
    raise_graph(gm.graph)
    events = fuse(gm.graph, PASSES, fuel)
    verify.verify(gm.graph, "fuse")
    names = [op.name for n in gm.graph.nodes if (op := find(n.target)) and op.collective]
    return names, [e.rule for e in events if e.status == "fired"]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_operator(shape: str, group: str) -> None:
    assert fused(model(SHAPES[shape], group), inputs(torch.bfloat16)) == [FUSED]


def gate_of_a_later_sum(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    first, later = reduced(a, g), reduced(b, g)
    return first * torch.sigmoid(later[..., :1]) + h.tanh()


def other_factor(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    return reduced(a, g) * torch.tanh(h) + reduced(b, g)


def read_twice(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    first = reduced(a, g)
    return first * torch.sigmoid(h[..., :1]) + first


APART = {gate_of_a_later_sum: 2, other_factor: 2, read_twice: 1}


@pytest.mark.parametrize("mixed", APART, ids=lambda f: f.__name__)
def test_what_must_stay(mixed: Callable[..., Tensor], group: str) -> None:
    names = fused(model(mixed, group), inputs(torch.float32))
    assert len(names) == APART[mixed] and "all_reduce" in names


def test_summand_of_a_later_collective_stays(group: str) -> None:
    def call(a: Tensor, b: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        first = reduced(a, group)
        return norm(h + (first + torch.tanh(reduced(b, group))), weight)

    assert both(call, inputs(torch.float32)) == (["all_reduce", "all_reduce"], [])


@pytest.mark.parametrize("shape, steps", [("gated", 3), ("whole", 2)])
def test_fuel(shape: str, steps: int, group: str) -> None:
    """A rewrite at a time, from none to the fused operator; with fewer it is not there."""
    for amount in range(steps + 1):
        left = iter(range(amount))
        names = fused(model(SHAPES[shape], group), inputs(torch.bfloat16), lambda left=left: next(left, None) is not None)
        assert (names == [FUSED]) == (amount == steps)


def errors(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """For each shape the fused and unfused error against FP64, the results' bytes and the operators."""
    import tpfuse

    name, found = dist.group.WORLD.group_name, {}  # type: ignore[union-attr]
    for seed, (shape, mixed) in enumerate(SHAPES.items()):
        torch._dynamo.reset()
        args, fn = inputs(torch.bfloat16, seed, rank), model(mixed, name)
        with torch.no_grad(), testing.interpreted():
            compiled = tpfuse.compile(fn, options, fullgraph=True)
            exact = model(in_their_dtype if mixed is in_fp32 else mixed, name)(*(t.double() for t in args))
            got, plain = compiled(*args), fn(*args)
        pairs = [[float((v.double() - e).norm() / e.norm()) for v in (g, p)] for g, p, e in zip(got, plain, exact, strict=True)]
        data = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in got]
        found[shape] = pairs, data, sorted(compiled.report.counts())
    return found


def in_their_dtype(a: Tensor, b: Tensor, h: Tensor, g: str) -> Tensor:
    return reduced(a, g) + reduced(b, g)


@pytest.mark.parametrize("options", [{}, {"passes": ("merge_all_reduce", "sequence_parallel")}], ids=["all_reduced", "sharded"])
def test_no_less_exact(ranks: testing.RankPool, options: dict[str, Any]) -> None:
    results = ranks.run(errors, options, timeout=200)
    for found in results:
        for shape, (pairs, data, counts) in found.items():
            assert all(mine <= 1.25 * plain for mine, plain in pairs), (shape, pairs)
            assert data == results[0][shape][1], f"{shape}: ranks differ"
            assert counts == [FUSED] or options, (shape, counts)
