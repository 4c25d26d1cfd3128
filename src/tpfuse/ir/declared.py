"""What an operator's text declares of its arguments, and whether a call's arguments are that.

A text says "x, residual: [..., hidden].  weight: [hidden] or None."  A name stands for one size in all arguments of an operator,
"..." for the same sizes in the arguments that are declared together, `n_i` for a size of each entry of a list.  Behind a bracket
may stand "any dtype" or "e4m3"; else a tensor holds floating-point numbers.  "one FP32 number" is a tensor of one element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpfuse import formats, shim

if TYPE_CHECKING:
    from tpfuse.ir.op import Op

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NAMES = r"((?:\w+(?: \(\w+\))?, )*\w+(?: \(\w+\))?)"
_CLAUSE = re.compile(_NAMES + r":\s+(?:\[([^\]]+)\](?: or None)?(, any dtype|, e4m3)?|one FP32 number)")
_KINDS: dict[str, Any] = {"Tensor": Tensor, "float": (float, int), "int": int, "bool": bool, "str": str}


@dataclass(frozen=True)
class Shape:
    """dims: None for one number.  lead: which arguments "..." is the same for.  dtypes: those that may be; () for any."""

    dims: tuple[str, ...] | None
    lead: str
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return "one number" if self.dims is None else f"[{', '.join(self.dims)}]"


def texts(op: Op, registry: Mapping[str, Op]) -> dict[str, str]:
    """An operator's text and the texts of the operators that it refers to, by name."""
    found = {op.name: op.doc}
    for text in (queue := [op.doc]):
        for name in re.findall(r"`(\w+)`", text):
            if name in registry and name not in found:
                found[name] = registry[name].doc
                queue.append(found[name])
    return found


def shapes(op: Op, registry: Mapping[str, Op]) -> dict[str, Shape]:
    """By argument, as the operator's own text has it, else the first text that it refers to."""
    found: dict[str, Shape] = {}
    for text in texts(op, registry).values():
        for names, dims, dtype in _CLAUSE.findall(text):
            kinds = {"": FLOATS, ", any dtype": (), ", e4m3": (torch.float8_e4m3fn, torch.uint8)}[dtype]
            shape = Shape(tuple(dims.split(", ")), names, kinds) if dims else Shape(None, names, (torch.float32,))
            for name in re.findall(r"(\w+)(?: \(\w+\))?", names):
                if name in op.params:
                    found.setdefault(name, shape)
    return found


def chained(first: Op, then: Op, renamed: Mapping[str, str]) -> dict[str, Shape]:
    """Those of `then` of the result of `first`, whose sizes get the names that they have in the text of `first`."""
    (result,) = re.findall(r"→ \[([^\]]+)\]", first.doc)
    names = dict(zip(then.shapes[then.params[0]].dims or (), result.split(", "), strict=True))

    def called(shape: Shape) -> Shape:
        dims = [re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim) for dim in shape.dims or ()]
        return replace(shape, dims=tuple(dims) or None)

    behind = {name: called(shape) for name, shape in then.shapes.items() if name != then.params[0]}
    return behind | {renamed.get(name, name): shape for name, shape in first.shapes.items()}


def check(op: Op, args: Mapping[str, Any]) -> None:
    """ValueError where an argument's shape, dtype or device is not as declared, or a scheme, layout and scale do not go together.
    Sizes may be symbols."""
    if reason := _wrong_shape(op, args):
        raise ValueError(f"{op.name}: {reason}")
    if {"scale", "scheme", "layout"} <= args.keys():
        formats.checked(args["scale"], args["scheme"], args["layout"])


def wrong_kind(op: Op, args: Mapping[str, Any]) -> str | None:
    """Why an argument is not of its declared type."""
    for name, value in args.items():
        kind = str(op.signature.parameters[name].annotation)
        if not _is(value, kind):
            held = f" of {', '.join({type(v).__name__ for v in value})}" if isinstance(value, list | tuple) else ""
            return f"{name} is a {type(value).__name__}{held}; expected {kind}"
    return None


def _is(value: Any, kind: str) -> bool:
    if kind.endswith(" | None"):
        return value is None or _is(value, kind.removesuffix(" | None"))
    if kind.startswith("list["):
        return isinstance(value, list | tuple) and all(_is(v, kind[5:-1]) for v in value)
    return isinstance(value, _KINDS[kind])


def _wrong_shape(op: Op, args: Mapping[str, Any]) -> str | None:
    known: dict[str, tuple[Any, str]] = {}  # a size and the argument that has it
    first: tuple[str, Tensor] | None = None
    for name, index, value in _tensors(args):
        called = name if index is None else f"{name}[{index}]"
        first = first or (called, value)
        if value.device != first[1].device:
            return f"{called} is on {value.device}, {first[0]} on {first[1].device}"
        shape = op.shapes.get(name)
        if shape is None:
            continue
        if shape.dtypes and value.dtype not in shape.dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in shape.dtypes)
            return f"{called} is {str(value.dtype).removeprefix('torch.')}; expected {wanted}"
        if (reason := _misfit(shape, value, index, known, args)) is not None:
            return f"{called} is of shape {_told(tuple(value.shape))}; expected {shape}{reason}"
        for dim, size in _pairs(shape, value, index):
            known.setdefault(dim, (size, called))
    if args.get("padded") is False and "rows" in known:
        rows, world = _traced(known["rows"][0]), shim.resolve_group(args["group"]).size()
        if rows is not None and rows % world:
            return f"x has {rows} rows, which {world} ranks cannot share evenly; padded=True fills them up with zeros"
    lengths = {name: len(value) for name, value in args.items() if isinstance(value, list | tuple)}
    if len(set(lengths.values())) > 1:
        return f"an entry for each weight is needed in every list, got {', '.join(f'{n} {name}' for name, n in lengths.items())}"
    return None


def _tensors(args: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Tensor]]:
    for name, value in args.items():
        for index, entry in enumerate(value) if isinstance(value, list | tuple) else [(None, value)]:
            if isinstance(entry, Tensor):
                yield name, index, entry


def _pairs(shape: Shape, value: Tensor, index: int | None) -> Iterator[tuple[str, Any]]:
    """The names of a fitting tensor's dimensions with their sizes; of "...", by which arguments share it."""
    dims = shape.dims or ()
    if "..." in dims:
        at, behind = dims.index("..."), len(dims) - dims.index("...") - 1
        end = value.dim() - behind
        yield f"... of {shape.lead}", tuple(value.shape[at:end])
        sizes = [*value.shape[:at], None, *value.shape[end:]]
    else:
        sizes = list(value.shape)
    for dim, size in zip(dims, sizes, strict=True):
        if dim != "...":
            yield (f"{dim}[{index}]" if dim.endswith("_i") else dim), size


def _misfit(
    shape: Shape, value: Tensor, index: int | None, known: Mapping[str, tuple[Any, str]], args: Mapping[str, Any]
) -> str | None:
    """None where the tensor fits; else what is said behind its shape."""
    if shape.dims is None:
        return "" if _differ(value.numel(), 1) else None
    named = len(shape.dims) - ("..." in shape.dims)
    if value.dim() < named or (value.dim() > named and "..." not in shape.dims):
        return f", {named} dimensions{' or more' if '...' in shape.dims else ''}"
    for dim, size in _pairs(shape, value, index):
        have = known.get(dim)
        if (share := re.fullmatch(r"⌈(\w+) / world⌉", dim)) and share[1] in known:
            rows, whose = known[share[1]]
            world = shim.resolve_group(args["group"]).size()
            have = -(-rows // world), f"{whose} on {world} ranks"
        if have is not None and _differ(have[0], size):
            return f", and {dim.split(' of ')[0].split('[')[0]} is {_told(have[0])} by {have[1]}"
    return None


def _differ(a: Any, b: Any) -> bool:
    """Whether two sizes, or runs of sizes, do; symbols by what they were when traced, the first call's sizes."""
    if isinstance(a, tuple):
        return len(a) != len(b) or any(map(_differ, a, b))
    have, found = _traced(a), _traced(b)
    return None not in (have, found) and have != found


def _told(size: Any) -> Any:
    return [_told(s) for s in size] if isinstance(size, tuple) else size if _traced(size) is None else _traced(size)


def _traced(size: Any) -> int | None:
    """None for a size that depends on data."""
    return shim.traced(size) if not isinstance(size, torch.SymInt) or size.node.has_hint() else None
