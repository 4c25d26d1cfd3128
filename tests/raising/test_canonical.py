"""The canonical form: what is folded, what is dropped, and what must stay because somebody could tell."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.raising.capture import assert_identical, trace
from tpfuse.raising.canonical import canonicalise

aten = torch.ops.aten
prims = torch.ops.prims


def twice_cast(x: Tensor) -> Tensor:
    return x.float().exp() + x.float()


FOLDED = {
    "view of a view": (lambda x: aten.view(aten.view(x + 1, [2, 12, 8]), [24, 8]).exp(), {"view": 0, "reshape": 0}),
    "views to a third shape": (lambda x: aten.view(aten.view(x + 1, [2, 12, 8]), [4, 6, 8]).exp(), {"view": 0, "reshape": 1}),
    "view to its own shape": (lambda x: aten.view(x + 1, list(x.shape)).exp(), {"view": 0}),
    "expand to its own shape": (lambda x: aten.expand(x + 1, list(x.shape)).exp(), {"expand": 0}),
    "alias": (lambda x: aten.alias(aten.detach(x + 1)).exp(), {"alias": 0, "detach": 0}),
    "cast to its own dtype": (lambda x: prims.convert_element_type(x + 1, torch.bfloat16).exp(), {"convert_element_type": 0}),
    "copy of a value": (lambda x: (x + 1).clone().exp(), {"clone": 0}),
    "cast twice": (twice_cast, {"convert_element_type": 1}),
    "view twice": (lambda x: aten.view(x, [12, 16]).exp() + aten.view(x, [12, 16]), {"view": 1}),
    "sum in FP32": (lambda x: (x.float() + x.exp().float()).bfloat16().exp(), {"convert_element_type": 0}),
    "split and cat, one row of shards": (lambda x: torch.cat(x.view(1, 24, 8).split(12, 1)).exp(), {"cat": 0}),
    "a split for each piece": (
        lambda x: torch.cat([x.view(1, 24, 8).split(12, 1)[0], x.view(1, 24, 8).split(12, 1)[1]]).exp(),
        {"cat": 0},
    ),
    "split and cat of a gather": (lambda x: torch.cat(x.view(2, 12, 8).split(1), 1).exp(), {"cat": 0}),
}

KEPT = {
    "copy that leaves the graph": (lambda x: (y := x + 1, y.clone()), {"clone": 1}),
    "copy of an input that leaves the graph": (lambda x: x.clone().view(12, 16), {"clone": 1}),
    "copy of an input whose row leaves the graph": (lambda x: x.clone()[0], {"clone": 1}),
    "copy of an input whose parts leave the graph": (lambda x: x.clone().split(12), {"clone": 1}),
    "copy of an input whose bytes leave the graph": (lambda x: x.clone().view(torch.uint8), {"clone": 1}),
    "copy that changes the strides": (lambda x: x.t().contiguous().exp(), {"clone": 1}),
    "two casts that leave the graph": (lambda x: (x.float(), x.float()), {"convert_element_type": 2}),
    "expand to more rows": (lambda x: (x[:1] + 1).expand(24, 8) * x, {"expand": 1}),
    "sum in FP32, read as well": (lambda x: ((y := x.float() + x.exp().float()), y.bfloat16()), {"convert_element_type": 3}),
    "cast down and up": (lambda x: (x.float() * 3).bfloat16().float().exp(), {"convert_element_type": 3}),
    "split and cat with a batch": (lambda x: torch.cat(x.view(2, 12, 8).split(6, 1)), {"cat": 1}),
    "split and cat, order changed": (lambda x: torch.cat(x.view(1, 24, 8).split(12, 1)[::-1]), {"cat": 1}),
    "uneven split and cat": (lambda x: torch.cat([p for p in x.view(1, 24, 8).split(9, 1)], 1) * 2, {"cat": 1}),
}


@pytest.mark.parametrize("name", [*FOLDED, *KEPT])
def test_form(name: str) -> None:
    fn, expected = {**FOLDED, **KEPT}[name]
    gm, inputs = trace(fn, [torch.randn(24, 8).bfloat16()], dynamic=None)
    before = torch.fx.Interpreter(gm).run(*inputs)
    canonicalise(gm.graph)
    gm.graph.lint()
    assert_identical(torch.fx.Interpreter(gm).run(*inputs), before)
    calls = Counter(n.target._schema.name.split("::")[1] for n in gm.graph.nodes if hasattr(n.target, "_schema"))
    assert {k: calls[k] for k in expected} == expected


def test_dynamic_views() -> None:
    """Views over a symbolic token count fold as well, their size arithmetic joined."""

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[1]
        rows = (x + 1).view(2 * n, 8)
        return rows.view(2, n, 8).exp(), (x + 2).view(2 * n, 8)

    gm, inputs = trace(model, [torch.randn(2, 12, 8)], dynamic=1)
    before = torch.fx.Interpreter(gm).run(*inputs)
    canonicalise(gm.graph)
    gm.graph.lint()
    assert_identical(torch.fx.Interpreter(gm).run(*inputs), before)
    names = [n.name for n in gm.graph.nodes if "view" in n.name or "reshape" in n.name]
    assert len(names) == 1


def test_views_whose_sizes_are_not_known_to_be_the_same() -> None:
    """Heads and groups of a width that is a symbol: the last size is another quotient once the two views are one."""

    def model(x: Tensor) -> Tensor:
        heads = x.reshape(1, -1, x.shape[1] // 16, 16).transpose(1, 2).exp()
        rows = heads.transpose(1, 2).reshape(-1, heads.shape[1] * heads.shape[3])
        return rows.reshape(-1, rows.shape[1] // 32, 32).exp()

    gm, inputs = trace(model, [torch.randn(24, 64)], dynamic=1)
    before = torch.fx.Interpreter(gm).run(*inputs)
    canonicalise(gm.graph)
    gm.graph.lint()
    assert_identical(torch.fx.Interpreter(gm).run(*inputs), before)
