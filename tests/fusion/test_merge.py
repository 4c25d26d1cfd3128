"""All-reduces that are added together become one; those that must not are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import trace
from tpfuse.fusion import fuse
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph
from tpfuse.report import Event

c10d = torch.ops._c10d_functional


def reduced(x: Tensor, group: str) -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))


def merged(fn: Callable[..., Any], *args: Tensor, fuel: Callable[[], bool] = lambda: True) -> tuple[list[str], list[Event]]:
    gm, _ = trace(fn, args)
    raise_graph(gm.graph)
    events = fuse(gm.graph, ["merge_all_reduce", "all_reduce_norm"], fuel)
    verify.verify(gm.graph, "fuse")
    names = [op.name for n in gm.graph.nodes if (op := find(n.target))]
    return names, [e for e in events if e.rule == "merge_all_reduce"]


def inputs(n: int = 2) -> list[Tensor]:
    return [torch.randn(24, 8, generator=torch.Generator().manual_seed(i)) for i in range(n)]


SUMS = {
    "plain": lambda a, b, h, g: reduced(a * 2, g) + reduced(b * 3, g),
    "beside_residual": lambda a, b, h, g: h + reduced(a * 2, g) + reduced(b * 3, g),
    "before_residual": lambda a, b, h, g: (reduced(a * 2, g) + reduced(b * 3, g)) + h,
    "with_bias": lambda a, b, h, g: reduced(a * 2, g) + (reduced(b * 3, g) + h[0]),
    "views": lambda a, b, h, g: reduced(a * 2, g).view(1, -1, 8) + reduced(b * 3, g).view(1, -1, 8),
}


@pytest.mark.parametrize("spelling", SUMS)
def test_sum(spelling: str, group: str) -> None:
    names, events = merged(lambda a, b, h: SUMS[spelling](a, b, h, group), *inputs(3))
    assert names == ["all_reduce"]
    assert [e.status for e in events] == ["fired"]


def test_three(group: str) -> None:
    names, events = merged(lambda a, b, h: reduced(a + 1, group) + reduced(b + 2, group) + reduced(h + 3, group), *inputs(3))
    assert names == ["all_reduce"]
    assert [e.status for e in events] == ["fired"] * 2


def test_terms_left_alone_are_as_small_as_they_are(group: str) -> None:
    """Two biases that stood in one sum with an all-reduce are a sum of vectors without it; later passes go by its shape."""
    gm, _ = trace(lambda a, b, h: (reduced(a * 2, group) + h[0] + h[1]) + reduced(b * 3, group), inputs(3))
    raise_graph(gm.graph)
    fuse(gm.graph, ["merge_all_reduce"])
    sums = [n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert sorted(n.meta["val"].dim() for n in sums) == [1, 2, 2]
    for node in sums:
        assert node.meta["val"].shape == torch.broadcast_shapes(*(a.meta["val"].shape for a in node.args))


def norm(h: Tensor, weight: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def test_then_norm(group: str) -> None:
    """What DeepSeek-V3's mixture of experts and its next norm become: one operator."""

    def model(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + (reduced(a * 2, group) + reduced(b * 3, group))
        return norm(h, a[0]), h

    names, _ = merged(model, *inputs(3))
    assert names == ["all_reduce_add_rms_norm"]


def second_user(a: Tensor, b: Tensor, g: str) -> Any:
    x = reduced(a * 2, g)
    return x + reduced(b * 3, g), x


NOT_MERGED = {
    "second_user": second_user,
    "group": lambda a, b, g: reduced(a * 2, g) + reduced(b * 3, "another"),
    "shape": lambda a, b, g: reduced(a * 2, g) + reduced((b * 3)[0], g),
}


@pytest.mark.parametrize("reason", NOT_MERGED)
def test_not_merged(reason: str, group: str) -> None:
    names, (event,) = merged(lambda a, b: NOT_MERGED[reason](a, b, group), *inputs())
    assert names == ["all_reduce"] * 2
    assert event.status == "declined" and event.reason is not None and event.reason.code == reason


def test_what_was_merged_and_finds_no_norm_is_told(group: str) -> None:
    gm, _ = trace(lambda a, b: torch.tanh(reduced(a * 2, group) + reduced(b * 3, group)), inputs())
    raise_graph(gm.graph)
    declined = [e for e in fuse(gm.graph, ["merge_all_reduce", "all_reduce_norm"]) if e.status == "declined"]
    assert [e.reason.code for e in declined if e.reason and e.attributes.get("operator") == "all_reduce"] == ["no_norm"]


def test_scaled_add_is_no_sum(group: str) -> None:
    names, events = merged(lambda a, b: torch.add(reduced(a * 2, group), reduced(b * 3, group), alpha=2), *inputs())
    assert names == ["all_reduce"] * 2 and not events


def test_residual_read_by_a_norm(group: str) -> None:
    """One sum after another along a residual: the inner one is read by a norm, so its all-reduce stays."""

    def model(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + reduced(a * 2, group)
        return norm(h, a[0]), h + reduced(b * 3, group)

    names, events = merged(model, *inputs(3))
    assert names == ["all_reduce_add_rms_norm", "all_reduce"] and not events


def test_fuel(group: str) -> None:
    names, events = merged(lambda a, b: reduced(a * 2, group) + reduced(b * 3, group), *inputs(), fuel=lambda: False)
    assert names == ["all_reduce"] * 2 and not events


def test_order_of_collectives(group: str) -> None:
    """The merged one stands where the later of the two stood; a collective between them keeps its place before it."""

    def model(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first = reduced(a * 2, group)
        between = c10d.wait_tensor(c10d.all_gather_into_tensor(h, 2, group))
        return first + reduced(b * 3, group), between

    names, _ = merged(model, *inputs(3))
    assert names == ["all_gather", "all_reduce"]


def errors(rank: int, world: int, dtype: torch.dtype) -> tuple[float, float, bool]:
    """(unfused error, merged error) against FP64, and whether the graph still had two all-reduces."""
    name = torch.distributed.group.WORLD.group_name  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(64, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = reduced(a, name) + reduced(b, name)
    gm, real = trace(lambda a, b: reduced(a + 0, name) + reduced(b + 0, name), [a.to(dtype), b.to(dtype)])
    raise_graph(gm.graph)
    before = fx.Interpreter(gm).run(*real)[0]
    fuse(gm.graph, ["merge_all_reduce"])
    after = fx.Interpreter(gm).run(*real)[0]
    names = [op.name for n in gm.graph.nodes if (op := find(n.target))]

    def error(x: Tensor) -> float:
        return ((x.double() - exact).norm() / exact.norm()).item()

    return error(before), error(after), names != ["all_reduce"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error(ranks: Any, dtype: torch.dtype) -> None:
    for unfused, fused, twice in ranks.run(errors, dtype):
        assert not twice and 0 < fused <= 1.25 * unfused
