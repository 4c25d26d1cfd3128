"""A graph as lines of text, each with the layer that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from tpfuse.ir.op import find
from tpfuse.report import Line
from tpfuse.rewrite.site import site_of


def listing(graph: fx.Graph) -> list[Line]:
    """One Line a computing node, in program order; placeholders and the output are left out."""
    return list(_lines(graph))


def _lines(graph: fx.Graph) -> Iterator[Line]:
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        op = find(node.target)
        name = f"tpfuse.{op.name}" if op else str(node.target)
        given = ", ".join([*map(_text, node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())])
        yield Line(node.name, name, given, _shape(node.meta.get("val")), site_of(node))


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _shape(value: object) -> str:
    """`f32[1, s27, 576]`; several in round brackets."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shape, value))})"
    if not isinstance(value, torch.Tensor):
        return "" if value is None else str(value)
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind}[{', '.join(map(str, value.shape))}]"
