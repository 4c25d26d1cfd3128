"""Every operator back into aten, and every composite back one step, beside its own body."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import trace
from tpfuse.ir import registry
from tpfuse.ir.op import Op, find
from tpfuse.rewrite.emit import emit
from tpfuse.rewrite.inline import inline, unfuse

LOCAL = [op for op in registry.values() if "group" not in op.params]
COMPOSITES = [op for op in LOCAL if op.leaf_fake is None]


def graph_of(op: Op, dtype: torch.dtype, **changes: Any) -> tuple[fx.GraphModule, list[Any], Any]:
    """A graph that calls `op` on a sample, the inputs, and the results of the body."""
    sample = {**op.sample(tokens=24, hidden=64, dtype=dtype), **changes}
    tensors = {k: v for k, v in sample.items() if isinstance(v, Tensor)}
    gm, inputs = trace(lambda *xs: [x.clone() for x in xs], list(tensors.values()))
    placed = dict(zip(tensors, gm.graph.find_nodes(op="placeholder"), strict=True))
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        like = next(iter(placed.values()))
        node = emit(gm.graph, op.default, [placed.get(k, v) for k, v in sample.items()], like=like)
        results: Any = node
        if op.results > 1:
            results = [gm.graph.call_function(operator.getitem, (node, i)) for i in range(op.results)]
            for i, result in enumerate(results):
                result.meta["val"] = node.meta["val"][i]
        output.args = (results,)
    gm.recompile()
    return gm, inputs, op.reference(**sample)


def as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def assert_body(gm: fx.GraphModule, inputs: list[Any], expected: Any) -> None:
    gm.graph.lint()
    for got, want in zip(as_list(fx.Interpreter(gm).run(*inputs)), as_list(expected), strict=True):
        assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", LOCAL, ids=lambda op: op.name)
def test_inline(op: Op, dtype: torch.dtype) -> None:
    gm, inputs, expected = graph_of(op, dtype)
    (node,) = [n for n in gm.graph.nodes if find(n.target)]
    inline(gm.graph, node, op)
    assert not [n for n in gm.graph.nodes if find(n.target)]
    assert_body(gm, inputs, expected)


def test_inline_of_one_value_given_twice() -> None:
    """Its body serves the next call of these shapes, whose values are two."""
    op = registry["act_and_mul"]
    values = [torch.randn(24, 8) for _ in range(2)]
    gm, inputs = trace(lambda a, b: (op.default(a, a, "silu"), op.default(a, b, "silu")), values, dynamic=None)
    expected = fx.Interpreter(gm).run(*inputs)
    for node in [n for n in gm.graph.nodes if find(n.target)]:
        inline(gm.graph, node, op)
    assert_body(gm, inputs, expected)


@pytest.mark.parametrize("op", COMPOSITES, ids=lambda op: op.name)
def test_unfuse(op: Op) -> None:
    """One level: smaller operators are left, and taking those apart too ends in leaves."""
    gm, inputs, expected = graph_of(op, torch.bfloat16)
    (node,) = [n for n in gm.graph.nodes if find(n.target)]
    unfuse(gm.graph, node, op)
    inner = [find(n.target) for n in gm.graph.nodes if find(n.target)]
    assert inner and op not in inner
    assert_body(gm, inputs, expected)


def test_optional_arguments() -> None:
    op = registry["rms_norm"]
    gm, inputs, expected = graph_of(op, torch.bfloat16, weight=None, rounding="cast_last+keep_f32")
    (node,) = [n for n in gm.graph.nodes if find(n.target)]
    inline(gm.graph, node, op)
    assert_body(gm, inputs, expected)


def test_steps_left_out(group: str) -> None:
    """A bias of None and a scale of 1.0 leave no node behind."""
    op = registry["all_reduce_add_rms_norm"]
    for changes, calls in (({}, {"add", "mul"}), ({"bias": None}, {"mul"}), ({"bias": None, "alpha": 1.0}, set())):
        gm, _, _ = graph_of(op, torch.bfloat16, group=group, **changes)
        (node,) = [n for n in gm.graph.nodes if find(n.target)]
        new = unfuse(gm.graph, node, op)
        gm.graph.lint()
        assert {n.target._schema.name.split("::")[1] for n in new if getattr(n.target, "namespace", "") == "aten"} == calls
        assert [inner.name for n in new if (inner := find(n.target))] == ["all_reduce", "add_rms_norm"]


def test_values_are_the_nodes_own() -> None:
    """Two sites of one shape share a traced body but no fake value: a shared one would look like shared memory."""
    gm, _ = trace(lambda x: (x + 1, x + 2), [torch.randn(24, 64)])
    op = registry["rms_norm"]
    adds = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    new = []
    for add in adds:
        with gm.graph.inserting_after(add):
            node = emit(gm.graph, op.default, (add, None), like=add)
        with gm.graph.inserting_after(node):
            gm.graph.call_function(torch.ops.aten.neg.default, (node,))
        new.append(inline(gm.graph, node, op))
    first, second = ({id(n.meta["val"]) for n in nodes} for nodes in new)
    assert first and not first & second
