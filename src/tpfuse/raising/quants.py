"""Quantisations spelled in aten → tpfuse.quantize, anchored on the conversion to FP8.

Exact: the scheme's variants say how the model spelled it (`tpfuse.formats.Scheme`), and a chain whose arithmetic the codec
would not repeat bit for bit is declined.  A scale that a model computes from all tokens stays in the graph as it is: it is the
given scale of "fp8_tensor".
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpfuse.formats import Scheme, apply_layout
from tpfuse.formats.scheme import FP8_MAX
from tpfuse.raising.probe import agrees, reachable, run, same_bits, size_for, sizes_for
from tpfuse.raising.quants_emit import emit_quantize, finish
from tpfuse.raising.quants_nvfp4 import raise_nvfp4
from tpfuse.raising.quants_scale import Dynamic, bound_of, dynamic_scale, narrows, reciprocal_of
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE
from tpfuse.rewrite.match import (
    DIVS,
    MULS,
    VIEWS,
    aten,
    cast_source,
    constant,
    is_call,
    is_tensor,
    operands,
    peel_widening,
    same,
    same_shape,
    tensor,
)  # fmt: skip
from tpfuse.rewrite.site import site_of

E4M3 = torch.float8_e4m3fn
_OTHER_FP8 = (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_GROUPS = (128, 64)


def raise_quants(graph: fx.Graph) -> list[Event]:
    """Raise every conversion to FP8 or NVFP4 of something scaled; what is left of them is declined with its reason."""
    events = []
    for raiser in (raise_nvfp4, _raise):
        for node in list(graph.nodes):
            if node._erased or DECLINE in node.meta or cast_source(node) is None or not is_tensor(node):
                continue
            if tensor(node).dtype in _OTHER_FP8:
                declined = Decline("fp8_dtype", f"the model quantises to {tensor(node).dtype}, not to float8_e4m3fn")
            elif tensor(node).dtype == E4M3:
                declined = raiser(node)
            else:
                continue
            if declined is not None:
                node.meta[DECLINE] = declined
                events.append(Event("declined", "quantize", site_of(node), reason=declined))
    return events


def _raise(cast: fx.Node) -> Decline | None:
    found = _unclamped(cast)
    if isinstance(found, Decline):
        return found
    quotient, options = found
    if not is_call(quotient, *DIVS, *MULS) or quotient.kwargs:
        return Decline("not_scaled", f"{quotient.name} is converted without a scale: no division, no product")
    pairs = [quotient.args[:2]] if is_call(quotient, *DIVS) else list(operands(quotient))
    declined: Decline | None = None
    for value, factor in pairs:
        if not is_tensor(value) or not same_shape(tensor(value), tensor(quotient)):
            continue
        result = _raise_scaled(cast, quotient, value, factor, options)
        if result is None:
            return None
        declined = declined or result
    return declined or Decline("scale_shape", "neither operand of the quotient has the shape of the result")


def _unclamped(cast: fx.Node) -> tuple[fx.Node, dict[str, bool]] | Decline:
    """What is clamped to ±448 (or not at all) and converted, widening casts and round trips looked through."""
    bounds: dict[str, float] = {}
    node, narrow = cast.args[0], None
    while True:
        if (source := cast_source(node)) is not None:
            if narrows(node):
                narrow = tensor(node).dtype  # type: ignore[arg-type]
            node = source
        elif (bound := bound_of(node)) is not None:
            side, limit = bound
            bounds[side] = (max if side == "low" else min)(limit, bounds.get(side, limit))
            node = node.args[0]  # type: ignore[union-attr]
        else:
            break
    if narrow is not None and tensor(node).dtype != narrow:  # type: ignore[arg-type]
        return Decline("rounding", f"the quotient is rounded to {narrow} before the conversion")
    if bounds and bounds != {"low": -FP8_MAX, "high": FP8_MAX}:
        limits = f"{bounds.get('low', '-inf')} … {bounds.get('high', 'inf')}"
        return Decline("clamp_bounds", f"values are clamped to {limits}, not to ±448")
    return node, {} if bounds else {"unclamped": True}  # type: ignore[return-value]


def _raise_scaled(cast: fx.Node, quotient: fx.Node, value: fx.Node, factor: Any, options: dict[str, Any]) -> Decline | None:
    """Raise value / factor or value · factor, converted at `cast`."""
    x = peel_widening(value)
    if tensor(quotient).dtype != torch.float32:
        if tensor(quotient).dtype != tensor(x).dtype:
            return Decline("rounding", f"the quotient is formed in {tensor(quotient).dtype}")
        options = {**options, "low_value": True}
    divides = is_call(quotient, *DIVS)
    spread = _spread(factor)
    dynamic = dynamic_scale(factor if spread is None else spread, divides)
    if spread is not None:
        return _raise_spread(cast, x, factor, dynamic, options)
    if isinstance(dynamic, Dynamic) and not _is_column(factor, value):
        return Decline("scale_shape", f"scales of rows meet {list(tensor(value).shape)} as {list(tensor(factor).shape)}")
    if isinstance(dynamic, Dynamic) and same_value(dynamic.of, x):
        return _raise_dynamic(cast, x, dynamic, options)
    if isinstance(dynamic, Dynamic) and (rounded := _rounded(dynamic.of, x)) is not None:
        return _raise_dynamic(cast, x, dynamic, {**options, rounded: True})
    if constant(factor) is None and not _is_scalar(factor):
        if isinstance(dynamic, Dynamic):
            return Decline("other_scale", f"the scale is of {dynamic.of.name}, which is not what is quantised")
        return dynamic
    if not divides:
        inner = reciprocal_of(factor)
        options = {**options, "mul": True} if inner is None else {**options, "reciprocal": True}
        factor = factor if inner is None else inner
    return finish(*emit_quantize([cast], x, factor, Scheme("fp8_tensor", **options), "row"), [cast], x)


def _raise_spread(
    cast: fx.Node, x: fx.Node, factor: fx.Node, dynamic: Dynamic | Decline, options: dict[str, Any]
) -> Decline | None:
    """Raise x quantised by a scale a group that was repeated for every column of its group (torchao's blocks)."""
    if isinstance(dynamic, Decline):
        return dynamic
    group, blocks = tensor(factor.args[0]).shape[-1], dynamic.of  # type: ignore[arg-type]
    if not is_call(blocks, *VIEWS) or _viewed(blocks) is not _viewed(x) or not same(tensor(blocks).shape[-1], group):
        return Decline("other_scale", f"the scale is of {blocks.name}, which is not what is quantised in groups of {group}")
    return _raise_dynamic(cast, blocks, dynamic, options)


def _raise_dynamic(cast: fx.Node, x: fx.Node, dynamic: Dynamic, options: dict[str, Any]) -> Decline | None:
    """Raise x quantised by a scale of its own rows; x may be a view into groups."""
    ue8m0 = dynamic.options.pop("ue8m0", False)
    scheme, layout = Scheme("fp8_token", **dynamic.options, **options), "row+ue8m0" if ue8m0 else "row"
    whole = x
    if is_call(x, *VIEWS):
        whole = x.args[0]
        source, last = tensor(whole).shape[-1], tensor(x).shape[-1]
        if same(source, last) or (isinstance(source, int) and isinstance(last, int) and source < last):
            whole = x  # rows regrouped, or joined of heads
        elif tensor(x).dim() < 2 or not same(source, tensor(x).shape[-2] * last):
            return Decline("group_size", f"groups of {last} are cut across rows of {source}")
        elif not isinstance(last, int) or last not in _GROUPS:
            return Decline("group_size", f"groups of {last}; there are schemes for groups of {' and '.join(map(str, _GROUPS))}")
        else:
            scheme = replace(scheme, name=f"fp8_group{last}")
            whole = peel_widening(whole)
    if ue8m0 and scheme.name == "fp8_token":
        return Decline("scale_spelling", "scales per token are rounded to powers of two")
    held = dynamic.holder
    if scheme.group:
        layout, held = _layout(held, layout, tensor(whole).shape[-1], scheme)
    return finish(*emit_quantize([cast, held], whole, None, scheme, layout), [cast, held], whole)


def _layout(holder: fx.Node, layout: str, cols: int, scheme: Scheme) -> tuple[str, fx.Node]:
    """The layout into which the scales are moved before they are used, and the node that holds them so."""
    rows = [n for n in reachable(holder, 12) if tensor(n).dim() == 2 and tensor(n).dtype in (torch.float32, torch.int32)]
    flags = ("+ue8m0", "+ue8m0_packed") if "ue8m0" in layout else ("",)
    names = [base + flag for base in ("col+tma", "col") for flag in flags] + ["row+ue8m0_packed"] * (len(flags) - 1)
    if not same(cols % scheme.group, 0):
        return layout, holder
    for end in reversed(rows):
        for name in names:
            if agrees(holder, end, functools.partial(_lies_as, holder, name, cols // scheme.group)):
                return name, end
    return layout, holder


def _lies_as(holder: fx.Node, layout: str, groups: Any, nodes: list[fx.Node], count: int) -> bool | None:
    """Whether a piece moves the scales of `holder` into a layout, strides too."""
    shape = sizes_for(holder, count)
    scales = torch.ldexp(torch.ones(shape), (torch.arange(torch.Size(shape).numel()) % 200 - 100).view(shape))
    want = apply_layout(scales.reshape(-1, size_for(groups, count)), layout)
    got = run(nodes, holder, scales, count)
    return None if got is None else same_bits(got, want) and got.stride() == want.stride()


def _spread(factor: Any) -> fx.Node | None:
    """The scales [..., groups] of a factor that repeats each of them along its group, or None."""
    inner = factor.args[0] if is_call(factor, *VIEWS) else None
    copied = inner.args[0] if is_call(inner, aten.clone.default) else None
    single = copied.args[0] if is_call(copied, aten.expand.default) else None
    if not is_call(single, aten.unsqueeze.default) or single.args[1] not in (-1, tensor(single).dim() - 1):
        return None
    return single.args[0]  # type: ignore[return-value]


def _viewed(node: fx.Node) -> fx.Node:
    """The value before widening casts and views."""
    while (inner := peel_widening(node)) is not node or is_call(node, *VIEWS):
        node = inner if inner is not node else node.args[0]  # type: ignore[assignment]
    return node


def same_value(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold the same elements in the same shape: one is a cast or a copy of the other."""
    return a is b or (
        is_call(a, *VIEWS)
        and is_call(b, *VIEWS)
        and peel_widening(a.args[0]) is peel_widening(b.args[0])
        and same_shape(tensor(a), tensor(b))
    )


def _rounded(of: fx.Node, x: fx.Node) -> str | None:
    """The variant that says in which dtype amax was taken, where the values themselves are no longer rounded to it."""
    names = {torch.bfloat16: "bf16_amax", torch.float16: "fp16_amax"}
    if is_call(of, *VIEWS) and is_call(x, *VIEWS) and same_shape(tensor(of), tensor(x)):
        of, x = of.args[0], x.args[0]  # type: ignore[assignment]
    return names.get(tensor(of).dtype) if cast_source(of) is x and tensor(x).dtype == torch.float32 else None


def _is_scalar(factor: Any) -> bool:
    return is_tensor(factor) and all(same(n, 1) for n in tensor(factor).shape)


def _is_column(factor: fx.Node, value: fx.Node) -> bool:
    """Whether a factor has one number for each row of a value: as many rows as columns would let it lie across."""
    lead, (*rows, last) = tensor(value).shape[:-1], tensor(factor).shape or [0]
    return len(lead) == len(rows) and same(last, 1) and all(map(same, lead, rows))
