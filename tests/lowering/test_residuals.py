"""Between fused sites that run as reference kernels a residual stays in FP32; everybody else gets it rounded."""

import operator

import pytest
import torch

import tpfuse
from tests.models import Stack
from tpfuse.ir import find
from tpfuse.runtime.dispatch import Dispatcher

HIDDEN = 64


pytestmark = pytest.mark.usefixtures("interpreted_rank")


def final_graph(monkeypatch, model, config, x):
    """(the final graph, the results of the compiled model)."""
    graphs = []
    plan = Dispatcher.plan

    def kept(self, limits):
        graph, *rest = plan(self, limits)
        graphs.append(graph)
        return graph, *rest

    monkeypatch.setattr(Dispatcher, "plan", kept)
    out = tpfuse.compile(model, config, fullgraph=True)(x)
    (graph,) = graphs
    return graph, out


def dtypes(graph):
    """Of each fused site: (the residual's dtype, the dtype of what it hands on, None where that is dead)."""
    found = []
    for node in graph.nodes:
        op = find(node.target)
        if op is not None and op.name == "all_reduce_add_rms_norm":
            bound = dict(zip(["channel", *op.params], node.args, strict=False))
            held = [u for u in node.users if u.target is operator.getitem and u.args[1] == 1]
            found.append((bound["residual"].meta["val"].dtype, held[0].meta["val"].dtype if held else None))
    return found


class Tapped(Stack):
    """Returns the rows after the first layer too, and those at the end."""

    def forward(self, x):
        taps = []
        for layer in self.layers:
            x = layer(x)
            taps.append(x)
        return self.norm(x), taps[0] * 2, x


def of(kind):
    model = kind(HIDDEN, layers=3)
    exact = kind(HIDDEN, layers=3).bfloat16().double()
    return model.bfloat16(), exact


def error(got, true):
    return ((got.double() - true).norm() / true.norm()).item()


def test_a_chain_is_rounded_once(monkeypatch):
    model, exact = of(Stack)
    x = (torch.randn(96, HIDDEN) * 0.1).bfloat16()
    graph, got = final_graph(monkeypatch, model, None, x)
    low, full = torch.bfloat16, torch.float32
    assert dtypes(graph) == [(low, full), *[(full, full)] * 4, (full, None)]
    assert got.dtype == low
    true = exact(x.double())
    assert 0 < error(got, true) < 0.9 * error(model(x), true)


def test_others_get_rounded_values(monkeypatch):
    model, exact = of(Tapped)
    x = (torch.randn(96, HIDDEN) * 0.1).bfloat16()
    graph, got = final_graph(monkeypatch, model, None, x)
    low, full = torch.bfloat16, torch.float32
    assert dtypes(graph) == [(low, full), *[(full, full)] * 4, (full, low)]
    for mine, eager, true in zip(got, model(x), exact(x.double()), strict=True):
        assert mine.dtype == eager.dtype == low and mine.shape == eager.shape
        assert 0 < error(mine, true) <= 1.05 * error(eager, true)


@pytest.mark.parametrize(("config", "dtype"), [({"verify": True}, torch.bfloat16), (None, torch.float32)])
def test_nothing_changes_where_nothing_is_gained(monkeypatch, config, dtype):
    graph, _ = final_graph(monkeypatch, Stack(HIDDEN, layers=3).to(dtype), config, torch.randn(8, HIDDEN).to(dtype))
    assert {kind for pair in dtypes(graph) for kind in pair} == {dtype, None}
