"""Raised graphs from small functions, their fused form, and how both are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from tpfuse.fusion import Policy, fuse
from tpfuse.ir.op import find
from tpfuse.ir.verify import verify
from tpfuse.raising import raise_graph
from tpfuse.report import Event

_c10d = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x, "sum", group))


def reduce_scatter(x: Tensor, world: int, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x, "sum", world, group))


def all_gather(x: Tensor, world: int, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, world, group))


def raised(fn: Callable[..., Any], args: Sequence[Tensor], tokens: int) -> fx.GraphModule:
    """The raised graph of fn(*args), the sizes that equal `tokens` being one symbol."""
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(arg: Tensor) -> Tensor:
        sizes = [DimDynamic.DUCK if n == tokens else DimDynamic.STATIC for n in arg.shape]
        return mode.from_tensor(arg, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    fakes = [fake(arg) for arg in args]
    with mode, torch.no_grad():
        gm = make_fx(lambda *a: list(pytree.tree_leaves(fn(*a))), decomposition_table=select_decomp_table())(*fakes)
    raise_graph(gm.graph)
    verify(gm.graph, "raise")
    return gm


def fused(gm: fx.GraphModule, passes: Sequence[str], policy: Policy = lambda chain: None) -> list[Event]:
    """Fuse in place, verified."""
    events = fuse(gm.graph, passes, policy=policy)
    verify(gm.graph, "fuse")
    gm.recompile()
    return events


def names(gm: fx.GraphModule) -> list[str]:
    """The operators of a graph in program order."""
    return [op.name for n in gm.graph.nodes if (op := find(n.target))]


def fired(events: Sequence[Event]) -> list[str]:
    return [e.rule for e in events if e.status == "fired"]


def reasons(events: Sequence[Event], rule: str) -> list[str]:
    return [e.reason.code for e in events if e.status == "declined" and e.rule == rule and e.reason]


def run(gm: fx.GraphModule, args: Sequence[Tensor]) -> list[Tensor]:
    return list(fx.Interpreter(gm).run(*[a.clone() for a in args]))
