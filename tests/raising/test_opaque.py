"""Collectives hidden in operators that rules cannot open are named."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.raising.capture import capture, trace
from tpfuse.raising.opaque import name_opaque_collectives

c10d = torch.ops._c10d_functional


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """Stand-ins for an engine's operators."""
    with torch.library._scoped_library("tpfuse_engine", "FRAGMENT") as library:
        for schema in (
            "all_reduce(Tensor x, str group_name) -> Tensor",
            "fused_experts(Tensor x, str? tp_group=None) -> Tensor",
            "grouped(Tensor x, int group_size) -> Tensor",
            "named(Tensor x, str layer_name) -> Tensor",
        ):
            name = schema.split("(")[0]
            library.define(schema)
            library.impl(name, lambda x, *_: x.clone(), "CompositeExplicitAutograd")
            torch.library.register_fake(f"tpfuse_engine::{name}", lambda x, *_: torch.empty_like(x), lib=library)
        library.define("all_reduce_(Tensor(a!) x, str group_name) -> ()")
        library.impl("all_reduce_", lambda x, _: None, "CompositeExplicitAutograd")
        yield


def ops() -> object:
    return torch.ops.tpfuse_engine


@pytest.mark.parametrize("name", ["all_reduce", "fused_experts"])
def test_custom_operator(name: str) -> None:
    gm, _ = trace(lambda x: getattr(ops(), name)(x, "tp") + 1, [torch.randn(24, 8)])
    (event,) = name_opaque_collectives(gm.graph)
    assert event.rule == f"tpfuse_engine.{name}" and event.status == "declined"
    assert event.reason is not None and event.reason.code == "opaque_collective"


def test_auto_functionalized() -> None:
    def model(x: Tensor) -> Tensor:
        y = x + 1
        ops().all_reduce_(y, "tp")  # type: ignore[attr-defined]
        return y * 2

    gm, _ = capture(model, [torch.randn(24, 8)])
    (event,) = name_opaque_collectives(gm.graph)
    assert event.rule == "tpfuse_engine.all_reduce_"


def test_higher_order_operator(group: str) -> None:
    def reduce(x: Tensor) -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x * 2, "sum", group)) + 1

    def model(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, reduce, torch.tanh, (x,))

    gm, _ = capture(model, [torch.randn(24, 8)])
    (event,) = name_opaque_collectives(gm.graph)
    assert event.rule == "cond" and event.reason is not None
    assert event.reason.code == "opaque_collective" and "_c10d_functional.all_reduce" in event.reason.detail


@pytest.mark.parametrize("name", ["grouped", "named"])
def test_not_a_collective(name: str) -> None:
    """The size of a quantisation group and the name of a layer are no process groups."""
    argument = 128 if name == "grouped" else "model.layers.0"
    gm, _ = trace(lambda x: getattr(ops(), name)(x, argument), [torch.randn(24, 8)])
    assert not name_opaque_collectives(gm.graph)


def test_visible_collective(group: str) -> None:
    gm, _ = trace(lambda x: c10d.wait_tensor(c10d.all_reduce(x + 1, "sum", group)), [torch.randn(24, 8)], dynamic=None)
    assert not name_opaque_collectives(gm.graph)
