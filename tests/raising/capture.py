"""Graphs as the backend sees them, and the exactness check that every raising test ends in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from tpfuse import shim
from tpfuse.ir.op import find
from tpfuse.raising import raise_graph
from tpfuse.report import Event
from tpfuse.rewrite.inline import inline

row_scales = pytest.mark.skipif(not shim.CPU_ROW_SCALES, reason="this torch multiplies no FP8 with a scale a row on CPU")


def capture(fn: Callable[..., Any], args: Sequence[Any], dynamic: int | None = 0) -> tuple[fx.GraphModule, list[Any]]:
    """The post-AOT graph of fn(*args) with Inductor's decompositions, and the inputs that it was called with.

    dynamic: the dimension of the first argument that is a token count, None for a static graph.
    """
    from torch._inductor.compile_fx import compile_fx

    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def inner(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        inputs: list[Any] = []
        found.append((gm, inputs))

        def call(real: list[Any]) -> Any:
            inputs.extend(real)
            return fx.Interpreter(gm).run(*real)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    torch._dynamo.reset()
    if dynamic is not None:
        torch._dynamo.mark_dynamic(args[0], dynamic)
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(fn, backend=lambda gm, ins: compile_fx(gm, ins, inner_compile=inner), fullgraph=True)(*args)
    (graph,) = found
    return graph


def trace(fn: Callable[..., Any], args: Sequence[Any], dynamic: int | None = 0) -> tuple[fx.GraphModule, list[Any]]:
    """As `capture`, but without Dynamo and Inductor's joint passes: many times faster, for small functions."""
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(i: int, arg: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if i == 0 and d == dynamic else DimDynamic.STATIC for d in range(arg.dim())]
        return mode.from_tensor(arg, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    fakes = [fake(i, arg) for i, arg in enumerate(args)]
    with mode, torch.no_grad(), shim.enable_python_dispatcher():  # which AOTAutograd traces under, too
        table = select_decomp_table()
        gm = make_fx(lambda *a: list(pytree.tree_leaves(fn(*a))), decomposition_table=table)(*fakes)
        # F.rms_norm is taken apart below functionalisation, into in-place steps: those go in a second pass
        gm = make_fx(torch.func.functionalize(gm, remove="mutations"), decomposition_table=table)(*fakes)
    gm.graph.eliminate_dead_code()  # as AOTAutograd leaves graphs
    return gm, list(args)


@dataclass
class Raised:
    """What raising made of a graph: the calls of tpfuse operators as (name, arguments by name), and the declines."""

    calls: list[tuple[str, dict[str, Any]]]
    events: list[Event]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [args for n, args in self.calls if n == name]

    @property
    def reasons(self) -> list[str]:
        return [e.reason.code for e in self.events if e.reason]


def raise_exactly(gm: fx.GraphModule, inputs: Sequence[Any]) -> Raised:
    """Raise a graph, then inline every operator again; the results must be the model's, bit for bit, both times."""
    expected = _run(gm, inputs)
    before = len(_guards(gm.graph))
    events = raise_graph(gm.graph)
    gm.graph.lint()
    calls = [(op.name, op.bind(n.args, n.kwargs)) for n in gm.graph.nodes if (op := find(n.target))]
    assert_identical(_run(gm, inputs), expected)
    for node in list(gm.graph.nodes):
        if op := find(node.target):
            inline(gm.graph, node, op)
    gm.graph.lint()
    assert not [n for n in gm.graph.nodes if find(n.target)]
    assert_identical(_run(gm, inputs), expected)
    guards = _guards(gm.graph)
    if len(guards) > before:  # torch also writes down what follows from what it knew
        assert _served(guards) == _served(guards[:before]), (
            f"a rewrite must not narrow the token counts that the graph serves: {guards[before:]}"
        )
    return Raised(calls, events)


def _guards(graph: fx.Graph) -> list[Any]:
    """The facts about symbolic sizes that the graph depends on."""
    values = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    return [guard.expr for guard in values[0].fake_mode.shape_env.guards]


def _served(guards: Sequence[Any]) -> set[int]:
    """The token counts up to 64 for which all of these hold."""

    def holds(guard: Any, count: int) -> bool:
        try:
            return bool(guard.xreplace(dict.fromkeys(guard.free_symbols, sympy.Integer(count))))
        except ZeroDivisionError:
            return False

    return {count for count in range(1, 65) if all(holds(guard, count) for guard in guards)}


def raised(fn: Callable[..., Any], *args: Any, dynamic: int | None = 0, through: Any = trace) -> Raised:
    return raise_exactly(*through(fn, args, dynamic))


def _run(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    return list(fx.Interpreter(gm).run(*[i.clone() if isinstance(i, Tensor) else i for i in inputs]))


def assert_identical(got: Sequence[Any], expected: Sequence[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            bits = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (a, b)]  # FP8 compares as bytes
            assert torch.equal(*bits)
