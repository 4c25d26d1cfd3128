"""Every name of torch that the shim uses is there in the torch that is installed."""

import ast
import importlib
import inspect

import pytest
import torch
import torch._dynamo
import torch._inductor
import torch.distributed as dist
from torch.fx.experimental import symbolic_shapes

from tpfuse import shim

ROOTS = {"torch": torch, "dist": dist}
TREE = ast.parse(inspect.getsource(shim))
IMPORTED = sorted(
    (node.module, name.name)
    for node in ast.walk(TREE)
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch")
    for name in node.names
)


def chain(node: ast.AST) -> list[str] | None:
    """["torch", "_guards", "tracing"] of torch._guards.tracing; None for what does not start at torch."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) and node.id in ROOTS and names else None


DOTTED = sorted({".".join(names) for node in ast.walk(TREE) if (names := chain(node))})


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_imported(module: str, name: str) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("dotted", DOTTED)
def test_dotted(dotted: str) -> None:
    root, *names = dotted.split(".")
    value = ROOTS[root]
    for name in names:
        value = getattr(value, name)


def test_private_names_are_seen() -> None:
    assert "torch._guards.tracing" in DOTTED and "dist.distributed_c10d._resolve_process_group" in DOTTED
    assert ("torch._inductor.compile_fx", "compile_fx_inner") in IMPORTED


@pytest.mark.parametrize(("owner", "name"), [(symbolic_shapes.ShapeEnv, "create_symbol"), (symbolic_shapes.ShapeEnv, "guards")])
def test_members(owner: type, name: str) -> None:
    assert hasattr(owner(), name)
