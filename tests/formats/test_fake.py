"""Formats under fake tensors and make_fx with a symbolic number of rows."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tpfuse.formats import apply_layout, dequantize, quantize, quantize_fake, remove_layout

CASES = [
    ("fp8_tensor", "row"),
    ("fp8_tensor:mul,low_value", "row"),
    ("fp8_token", "row"),
    ("fp8_token:low_scale,eps=0.0", "row"),
    ("fp8_group128", "row+ue8m0"),
    ("fp8_group128", "col"),
    ("fp8_group64", "col+tma"),
    ("fp8_group128", "col+tma+ue8m0_packed"),
    ("nvfp4", "linear"),
    ("nvfp4", "swizzled_128x4"),
    ("nvfp4:div", "swizzled_8x4"),
]


def given(scheme: str) -> torch.Tensor | None:
    return torch.tensor(0.01) if scheme.startswith(("fp8_tensor", "nvfp4")) else None


def meta(*tensors: torch.Tensor) -> list:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]


@pytest.mark.parametrize(("scheme", "layout"), CASES)
@pytest.mark.parametrize("shape", [(1, 320), (5, 320), (2, 65, 320)])
def test_fakes_are_right(scheme: str, layout: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.bfloat16)
    assert meta(*quantize_fake(x, scheme, layout)) == meta(*quantize(x, given(scheme), scheme, layout))


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_fakes_are_right_however_rows_lie(scheme: str, layout: str) -> None:
    x = torch.randn(2, 5, 320)
    for strided in (x[0].t().contiguous().t(), x.transpose(0, 1), x[0, :, :256], x[0, :1].expand(5, 320)):
        assert meta(*quantize_fake(strided, scheme, layout)) == meta(*quantize(strided, given(scheme), scheme, layout))


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_symbolic_rows(scheme: str, layout: str) -> None:
    """One graph, traced with a symbolic row count, is right for every count and its fakes for every count too."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(6, 320, dtype=torch.bfloat16), symbolic_context=context)
    scale = given(scheme)

    def both(x: torch.Tensor, *scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = scales[0] if scales else None
        q, out = quantize(x, s, scheme, layout)
        return q, out, dequantize(q, out, s, scheme, layout, x.dtype)

    fakes = [] if scale is None else [mode.from_tensor(scale)]
    graph = make_fx(both, tracing_mode="symbolic")(x, *fakes)
    rows = x.shape[0]
    with mode:
        declared = quantize_fake(x, scheme, layout)
    traced = [node.meta["val"] for node in graph.graph.find_nodes(op="output")[0].args[0]]
    for count in (2, 8, 129):
        real = torch.randn(count, 320, dtype=torch.bfloat16)
        want = both(real, *([] if scale is None else [scale]))
        got = graph(real, *([] if scale is None else [scale]))
        for a, b in zip(got, want, strict=True):
            assert meta(a) == meta(b) and torch.equal(bits(a), bits(b))
        for symbolic, tensor in [*zip(declared, want, strict=False), *zip(traced, want, strict=True)]:
            sizes = [evaluate(s, rows, count) for s in (*symbolic.shape, *symbolic.stride())]
            assert sizes == [*tensor.shape, *tensor.stride()] and symbolic.dtype == tensor.dtype
        for guard in env.guards:  # none that ties the graph to the count it was traced with
            assert guard.expr.subs(rows.node.expr, count) == True  # noqa: E712 (a sympy truth)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def evaluate(size: int | torch.SymInt, rows: torch.SymInt, count: int) -> int:
    return int(size.node.expr.subs(rows.node.expr, count)) if isinstance(size, torch.SymInt) else size


@pytest.mark.parametrize(("scheme", "layout"), [("nvfp4", "swizzled_128x4"), ("fp8_group64", "col+tma")])
def test_stacked_scales_with_symbolic_rows(scheme: str, layout: str) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(40, 320, dtype=torch.bfloat16), symbolic_context=context)
    with mode:
        _, part = quantize_fake(x, scheme, layout)
        plain = remove_layout(part, x.shape[0], 20 if scheme == "nvfp4" else 5, layout)
        gathered = apply_layout(torch.cat([plain, plain]), layout)
        _, whole = quantize_fake(torch.cat([x, x]), scheme, layout)
    assert [str(s) for s in gathered.shape] == [str(s) for s in whole.shape]


def test_results_never_alias_inputs() -> None:
    x, scale = torch.ones(4, 128), torch.ones(())
    for scheme in ("fp8_tensor", "fp8_token", "nvfp4"):
        s = scale if scheme != "fp8_token" else None
        outputs = quantize(x, s, scheme, "linear" if scheme == "nvfp4" else "row")
        storages = {t.untyped_storage().data_ptr() for t in (x, scale)}
        assert storages.isdisjoint(t.untyped_storage().data_ptr() for t in outputs)
