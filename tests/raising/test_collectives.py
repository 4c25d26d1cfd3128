"""Collectives raised where they stood, declined with their reason, and put back by inlining."""

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import raise_exactly, raised, trace
from tpfuse.ir import registry
from tpfuse.raising import raise_graph
from tpfuse.rewrite.inline import inline

c10d = torch.ops._c10d_functional


def rows() -> Tensor:
    return torch.randn(24, 8)


def targets(graph: fx.Graph) -> list[str]:
    return [n.target._schema.name.split("::")[1] for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


KINDS = {
    "all_reduce": lambda x, g: c10d.all_reduce(x, "sum", g),
    "reduce_scatter": lambda x, g: c10d.reduce_scatter_tensor(x, "sum", 2, g),
    "all_gather": lambda x, g: c10d.all_gather_into_tensor(x, 2, g),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str, group: str) -> None:
    """No values: what a scatter of this group leaves in its result differs from torch to torch."""
    gm, _ = trace(lambda x: c10d.wait_tensor(KINDS[kind](x + 1, group)) * 2, [rows()], dynamic=None)
    before = targets(gm.graph)
    assert not raise_graph(gm.graph)
    (node,) = gm.graph.find_nodes(op="call_function", target=registry[kind].default)
    assert registry[kind].bind(node.args)["group"] == group
    inline(gm.graph, node, registry[kind])
    assert targets(gm.graph) == before and "wait_tensor" in before


def test_launch_position(group: str) -> None:
    """Raised where it was launched; inlined, it is launched there again and waited for right before its first use."""

    def model(x: Tensor) -> Tensor:
        reduced = c10d.all_reduce(x + 1, "sum", group)
        other = torch.tanh(x)
        return torch.exp(c10d.wait_tensor(reduced)) + other

    gm, _ = trace(model, [rows()])
    raise_graph(gm.graph)
    assert targets(gm.graph) == ["add", "all_reduce", "tanh", "exp", "add"]
    (node,) = gm.graph.find_nodes(op="call_function", target=registry["all_reduce"].default)
    inline(gm.graph, node, registry["all_reduce"])
    assert targets(gm.graph) == ["add", "all_reduce", "tanh", "wait_tensor", "exp", "add"]
    assert gm.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)


NEAR_MISSES = {
    "reduce_op": lambda x, g: c10d.wait_tensor(c10d.all_reduce(x, "avg", g)),
    "collective_kind": lambda x, g: c10d.wait_tensor(c10d.broadcast(x, 0, g)),
    "coalesced": lambda x, g: [c10d.wait_tensor(y) for y in c10d.all_reduce_coalesced([x, x + 1], "sum", g)],
    "unwaited": lambda x, g: (y := c10d.all_reduce(x, "sum", g), c10d.wait_tensor(y))[1] + y,
}


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_near_miss(reason: str, group: str) -> None:
    found = raised(lambda x: NEAR_MISSES[reason](x, group), rows())
    assert found.reasons == [reason] and not found.calls


@pytest.mark.parametrize("undone", [True, False], ids=["undone", "kept"])
def test_a_gather_of_bytes(undone: bool, group: str) -> None:
    """FP8 rows that a model moves as bytes are gathered as FP8, so that a product of them is found."""

    def model(x: Tensor) -> Tensor:
        q = x.to(torch.float8_e4m3fn)
        moved = c10d.wait_tensor(c10d.all_gather_into_tensor(q.view(torch.uint8), 2, group))
        return moved.view(torch.float8_e4m3fn).float() if undone else moved + 1

    gm, _ = trace(model, [rows()], dynamic=None)
    raise_graph(gm.graph)
    (node,) = gm.graph.find_nodes(op="call_function", target=registry["all_gather"].default)
    assert node.meta["val"].dtype == (torch.float8_e4m3fn if undone else torch.uint8)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.dtype)) == (not undone)


def test_strided_input(group: str) -> None:
    """The result of a sum is contiguous, whatever its operand was."""
    found = raised(lambda x: c10d.wait_tensor(c10d.all_reduce(x.t(), "sum", group)), rows())
    assert found.named("all_reduce")


def test_view_goes_above(group: str) -> None:
    """Rows regrouped after the all-reduce are regrouped before it, so that the norm stands next to it."""

    def model(x: Tensor) -> Tensor:
        reduced = c10d.wait_tensor(c10d.all_reduce(x @ x.t() @ x, "sum", group))
        return reduced.view(2, -1, 8).exp()

    gm, inputs = trace(model, [rows()], dynamic=None)
    found = raise_exactly(gm, inputs)
    (reduce,) = found.named("all_reduce")
    assert reduce["x"].target is torch.ops.aten.reshape.default
    (user,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    assert user.args[0].target is c10d.wait_tensor.default


def test_view_that_cuts_the_last_dimension_stays_below(group: str) -> None:
    def model(x: Tensor) -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x + 1, "sum", group)).view(24, 2, 4).exp()

    (reduce,) = raised(model, rows(), dynamic=None).named("all_reduce")
    assert reduce["x"].target is torch.ops.aten.add.Tensor


def test_gather_of_another_dimension(group: str) -> None:
    """DTensor gathers dimension 1 by a gather of rows, a split and a cat: a mere gather where the batch is one."""

    def model(x: Tensor) -> Tensor:
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x + 1, 2, group))
        return torch.cat(gathered.split(x.shape[0]), 1) * 2

    gm, inputs = trace(model, [torch.randn(1, 6, 8)], dynamic=1)
    raise_exactly(gm, inputs)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    gm, inputs = trace(model, [torch.randn(2, 6, 8)], dynamic=1)
    raise_exactly(gm, inputs)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
