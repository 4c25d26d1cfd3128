"""Graphs of torchao's FP8 linears as Inductor is given them, committed as text by tools/torchao_graphs.py: what torch and torchao
wrote on a machine that these tests do not have is raised and fused here.  The first line of each file says where it was taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tests.fusion.graphs import names
from tpfuse.fusion import fuse
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph

FOLDER = Path(__file__).parent / "graphs"
FILES = sorted(path.name for path in FOLDER.glob("*.txt"))
TOKENS = 24
# By the configuration's name: the scheme of each quantise, of each product, and what norm and activation become.
FUSED = ["add_rms_norm_quantize", "scaled_matmul", "scaled_matmul", "act_and_mul_quantize", "scaled_matmul"]
EXPECTED = {
    "fp8_token": ("fp8_token", "fp8_token", FUSED),
    # Each linear layer has a scale of its own: gate's rows come with the norm, up's are quantised beside it.
    "fp8_tensor_static": (
        "fp8_tensor", "fp8_tensor",
        ["add_rms_norm_quantize", "scaled_matmul", "quantize", "scaled_matmul", "act_and_mul_quantize", "scaled_matmul"],
    ),
    # One scale of all tokens: nothing of a row can be quantised before all rows are there.
    "fp8_tensor_dynamic": (
        "fp8_tensor", "fp8_tensor",
        ["add_rms_norm", "quantize", "scaled_matmul", "scaled_matmul", "act_and_mul", "quantize", "scaled_matmul"],
    ),
}  # fmt: skip


def load(path: Path) -> fx.GraphModule:
    """The graph of a file, its operators as they stand there, on CPU."""
    lines = path.read_text().splitlines()
    inputs = [line[2:].split(" ") for line in lines[1:] if line.startswith("# ")]
    code = "\n".join(line for line in lines if not line.startswith("# "))
    code = code.replace("device(type='cuda', index=0)", "device(type='cpu')")
    space: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan")}
    exec(code, space)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbols = {sizes for _, kind, sizes, _ in inputs if kind == "int"}

    def fake(kind: str, sizes: str, strides: str) -> Any:
        shape = [TOKENS if s in symbols else int(s) for s in sizes.split(",") if s != "-"]
        stride = [int(s) for s in strides.split(",") if s != "-"]
        dynamic = [DimDynamic.DUCK if s in symbols else DimDynamic.STATIC for s in sizes.split(",") if s != "-"]
        real = torch.empty_strided(shape, stride, dtype=getattr(torch, kind))
        return mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))

    tensors = [fake(*rest) for _, *rest in inputs if rest[0] != "int"]

    def call(*values: Any) -> Any:
        given = iter(values)
        tokens = next(v.shape[0] for v in values if isinstance(v.shape[0], torch.SymInt))
        return space["forward"](None, *(tokens if kind == "int" else next(given) for _, kind, *_ in inputs))

    with mode, torch.no_grad():
        return make_fx(call)(*tensors)


@pytest.mark.parametrize("name", FILES)
def test_graph(name: str) -> None:
    quantised, product, operators = EXPECTED[name.partition("-")[0]]
    gm = load(FOLDER / name)
    assert not raise_graph(gm.graph)
    verify.verify(gm.graph, "raise")
    calls = [(op.name, op.bind(n.args, n.kwargs)) for n in gm.graph.nodes if (op := find(n.target))]
    assert {a["scheme"].partition(":")[0] for n, a in calls if n == "quantize"} == {quantised}
    assert [a["scheme"] for n, a in calls if n == "scaled_matmul"] == [product] * 3
    fuse(gm.graph, ["norm_quantize"])
    verify.verify(gm.graph, "fuse")
    assert names(gm) == operators


def test_every_configuration_has_a_graph() -> None:
    assert {name.partition("-")[0] for name in FILES} == set(EXPECTED)
