"""NVFP4 quantisations spelled in aten → tpfuse.quantize, anchored on the conversion of the block scales to e4m3.

The scales are matched by structure.  The coding to E2M1 and the packing of two codes to a byte are bit tricks, and the
swizzling of the scales is a chain of views: these are told by what they compute.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from tpfuse.formats import Scheme, swizzle
from tpfuse.formats.nvfp4 import BLOCK, encode_e2m1, pack
from tpfuse.formats.scheme import FP4_MAX, FP8_MAX
from tpfuse.raising.probe import agrees, reachable, run, same_bits, sizes_for
from tpfuse.raising.quants_emit import emit_quantize, finish
from tpfuse.report import Decline
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
    reduces_last,
    same,
    tensor,
    times_constant,
)  # fmt: skip


def raise_nvfp4(cast: fx.Node) -> Decline | None:
    """Raise the quantisation whose block scales `cast` converts; None also where it converts no block scales."""
    node, low = cast.args[0], 0.0
    if not is_call(node, aten.clamp_max.default) or constant(node.args[1]) != FP8_MAX:
        return None
    node = node.args[0]
    if is_call(node, aten.clamp_min.default) and (floor := constant(node.args[1])) is not None:
        node, low = node.args[0], float(floor)
    per_block, given, divides = _given(node)
    if not is_call(per_block, *DIVS) or constant(per_block.args[1]) != FP4_MAX:
        return None
    blocks = _blocks(per_block.args[0])
    if isinstance(blocks, Decline | None):
        return blocks
    if low <= 0.0:
        return Decline("zero_scale", "nothing keeps the block scales away from zero")
    if given is not None and not all(same(n, 1) for n in tensor(given).shape):
        return Decline("scale_shape", f"the global scale has the shape {list(tensor(given).shape)}")
    scaled = _scaled(cast, blocks, given, divides)
    if scaled is None:
        return Decline("scale_spelling", "values are not multiplied by (global scale) / (block scale)")
    packed = _packed(scaled)
    if packed is None:
        return Decline("fp4_coding", "what follows is not E2M1, two codes to a byte, the even column low")
    x = peel_widening(blocks.args[0]) if is_call(blocks, *VIEWS) else blocks
    if not same(tensor(x).shape[-1], tensor(packed).shape[-1] * 2):
        return Decline("shape", f"blocks are cut from {list(tensor(x).shape)}, packed as {list(tensor(packed).shape)}")
    scheme = Scheme("nvfp4", div=divides, eps=low)
    layout, end = _layout(cast)
    return finish(*emit_quantize([packed, end], x, given, scheme, layout), [packed, end], x)


def _given(node: Any) -> tuple[Any, Any, bool]:
    """(amax / 6, the global scale or None, whether the scale divides)."""
    if is_call(node, *DIVS) and is_tensor(node.args[1]):
        return node.args[0], node.args[1], True
    if is_call(node, *MULS):
        for a, b in operands(node):
            if is_call(a, *DIVS) and is_tensor(b):
                return a, b, False
    return node, None, False


def _blocks(amax: Any) -> Any:
    """The FP32 values in blocks whose absolute maximum this is; a Decline or None where it is of none."""
    if not is_call(amax, aten.amax.default) or not is_call(amax.args[0], aten.abs.default):
        return None
    blocks = amax.args[0].args[0]
    if not reduces_last(amax.args[1], blocks):
        return Decline("axis", f"the block maximum is over dimensions {amax.args[1]}")
    if not same(tensor(blocks).shape[-1], BLOCK):
        return Decline("group_size", f"blocks of {tensor(blocks).shape[-1]}; NVFP4 has blocks of {BLOCK}")
    if tensor(blocks).dtype != torch.float32:
        return Decline("rounding", f"the block maximum is taken in {tensor(blocks).dtype}")
    return blocks


def _scaled(cast: fx.Node, blocks: fx.Node, given: fx.Node | None, divides: bool) -> fx.Node | None:
    """blocks · ((1 / p) / sf), with g or 1 in the place of 1 / p."""
    for node in reachable(cast):
        if is_call(node, aten.mul.Tensor):
            for a, b in operands(node):
                if a is blocks and is_call(b, aten.unsqueeze.default) and _is_factor(b.args[0], cast, given, divides):
                    return node
    return None


def _is_factor(node: Any, cast: fx.Node, given: fx.Node | None, divides: bool) -> bool:
    def widened(n: Any) -> bool:
        return cast_source(n) is cast and tensor(n).dtype == torch.float32

    if given is None:
        inverse = _plain(node)
        return is_call(inverse, aten.reciprocal.default) and widened(inverse.args[0])
    if not is_call(node, *DIVS) or not widened(node.args[1]):
        return False
    numerator = _plain(node.args[0])
    if divides:
        return is_call(numerator, aten.reciprocal.default) and numerator.args[0] is given
    return numerator is given


def _plain(node: Any) -> Any:
    """A value before a factor of one."""
    scaled = times_constant(node)
    return scaled[0] if scaled is not None and scaled[1] == 1 else node


def _packed(scaled: fx.Node) -> fx.Node | None:
    """The packed E2M1 codes of `scaled`: the last node after it that holds them."""
    columns = [n for n in reachable(scaled) if tensor(n).dtype == torch.uint8 and tensor(n).dim() > 1]
    for end in reversed(columns):
        if agrees(scaled, end, functools.partial(_codes, scaled, end)):
            return end
    return None


def _codes(start: fx.Node, end: fx.Node, nodes: list[fx.Node], count: int) -> bool | None:
    """Whether a piece packs E2M1 codes, for every probe value in turn."""
    shape, columns = sizes_for(start, count), sizes_for(end, count)[-1] * 2
    total = torch.Size(shape).numel()
    values = _probe_values()
    for first in range(0, len(values), total):
        chunk = values.roll(-first)[torch.arange(total) % len(values)]
        got = run(nodes, start, chunk.view(shape), count)
        if got is None:
            return None
        if got.numel() * 2 != total:
            return False
        want = pack(encode_e2m1(chunk.view(-1, columns)))
        if not same_bits(got.reshape(want.shape), want):
            return False
    return True


@functools.cache
def _probe_values() -> Tensor:
    """Every threshold and code of E2M1, one step to either side, zeros, subnormals, and values in no order between them."""
    edges = torch.tensor([0.0, 2.0**-149, 2.0**-126, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6])
    steps = torch.cat([edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(0.0))]).clamp(max=6.0)
    between = (torch.arange(410) * 0.6180339887 % 1) * 6.0
    values = torch.cat([steps, between, torch.tensor([7.0, 1e30])])
    return torch.cat([values, -values])


def _layout(cast: fx.Node) -> tuple[str, fx.Node]:
    """The layout into which the block scales are swizzled before they are used, and the node that holds them so."""
    groups = tensor(cast).shape[-1]
    if tensor(cast).dim() == 2:
        for end in reversed([n for n in reachable(cast) if tensor(n).dtype == torch.float8_e4m3fn and n.users]):
            for name in ("swizzled_128x4", "swizzled_8x4"):
                if agrees(cast, end, functools.partial(_swizzles, cast, name, groups)):
                    return name, end
    return "linear", cast


def _swizzles(start: fx.Node, layout: str, groups: int, nodes: list[fx.Node], count: int) -> bool | None:
    shape = sizes_for(start, count)
    scales = (torch.arange(torch.Size(shape).numel()) % 119 + 1).to(torch.uint8).view(shape).view(torch.float8_e4m3fn)
    got, want = run(nodes, start, scales, count), swizzle(scales, layout)
    return None if got is None else got.numel() == want.numel() and same_bits(got.reshape(want.shape), want)
