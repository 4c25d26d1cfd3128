"""RMS norms in every spelling → tpfuse.rms_norm, anchored on the reciprocal square root.

Exact: what tells the spellings apart (epsilon, weight bias, where the result is rounded) becomes attributes; a chain
whose arithmetic the operator's body would not repeat bit for bit is declined.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tpfuse.ir.norm import Rounding
from tpfuse.ir.op import registry
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE, emit, erase_dead, substitute
from tpfuse.rewrite.match import (
    ADDS,
    MULS,
    aten,
    cast_source,
    factors,
    is_call,
    is_tensor,
    only_user,
    operands,
    peel_widening,
    plus_constant,
    reduces_last,
    same,
    settled,
    shortest,
    tensor,
)
from tpfuse.rewrite.site import site_of

_SUMS = (aten.sum.dim_IntList,)
_VARIANCES = (
    aten.var.correction,
    aten.var_mean.correction,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
)


@dataclass(frozen=True)
class Statistics:
    """rsqrt(mean(x²) + eps) over the last dimension: `wide` is x as the arithmetic sees it, `x` its source."""

    x: fx.Node
    wide: fx.Node
    eps: float


@dataclass(frozen=True)
class Weight:
    """weight + bias; `dtype` is that of the sum, `low` says that it was formed in the weight's own narrow dtype."""

    node: fx.Node
    bias: float
    dtype: torch.dtype
    low: bool


def raise_norms(graph: fx.Graph) -> list[Event]:
    """Raise every RMS norm; a reciprocal square root that is none is declined with the closest reason."""
    events = []
    for root in list(graph.nodes):
        declined = _raise_root(root)
        if declined is not None:
            root.meta[DECLINE] = declined
            events.append(Event("declined", "rms_norm", site_of(root), reason=declined))
    return events


def _raise_root(root: fx.Node) -> Decline | None:
    if is_call(root, aten.sqrt.default):
        if isinstance(statistics(root.args[0]), Statistics):
            return Decline("sqrt", "the root is written as 1 / sqrt, whose last bit is not that of rsqrt")
        return None
    # torch computes a power of -0.5 (Gemma3n, Gemma4) as rsqrt
    if not is_call(root, aten.rsqrt.default) and not (is_call(root, aten.pow.Tensor_Scalar) and root.args[1] == -0.5):
        return None
    found = statistics(root.args[0])
    if isinstance(found, Decline):
        return found
    declined = None
    roots = [root, *(u for u in root.users if is_call(u, aten.unsqueeze.default))]
    for scale in roots:
        for user in [u for u in scale.users if u not in roots]:
            declined = _raise_product(found, scale, user) or declined
    return declined


def statistics(node: fx.Node) -> Statistics | Decline:
    """What the argument of a root is made of, or why it belongs to no RMS norm."""
    eps: float = 0.0
    if (shifted := plus_constant(node)) is not None:
        node, eps = shifted
    elif is_call(node, *ADDS):
        return Decline("epsilon", f"the epsilon of {node.name} is no constant")
    elif is_call(node, aten.clamp_min.default, aten.clamp.default, aten.maximum.default):
        return Decline("epsilon", "the mean square is clamped from below, not shifted by an epsilon")
    if is_call(node, aten.unsqueeze.default) and node.args[1] in (-1, tensor(node).dim() - 1):
        node = node.args[0]
    if is_call(node.args[0] if is_call(node, operator.getitem) else node, *_VARIANCES):
        return Decline("variance", "the mean is subtracted first: a layer norm")
    squares = _mean(node)
    if isinstance(squares, Decline):
        return squares
    wide = _square(squares)
    if wide is None:
        return Decline("no_square", f"the mean is of {squares.name}, which is no square")
    if is_call(wide, aten.sub.Tensor) and is_call(wide.args[1], aten.mean.dim):
        return Decline("variance", "the mean is subtracted first: a layer norm")
    if tensor(wide).dtype not in (torch.float32, torch.float64):
        return Decline("low_precision", f"the mean square is formed in {tensor(wide).dtype}")
    x = peel_widening(wide)
    if torch.promote_types(tensor(x).dtype, torch.float32) != tensor(wide).dtype:
        x = wide
    return Statistics(x, wide, shortest(eps, tensor(wide).dtype))


def _mean(node: fx.Node) -> fx.Node | Decline:
    """The operand of a mean over the last dimension, written as such or as a sum divided by the size."""
    total = node
    if is_call(node, aten.mean.dim):
        value = node.args[0]
    elif is_call(node, aten.div.Tensor, aten.div.Scalar) and is_call(node.args[0], *_SUMS):
        total = node.args[0]
        value = total.args[0]
        if not same(tensor(value).shape[-1], node.args[1]):
            return Decline("no_mean", f"the sum of squares is divided by {node.args[1]}, not by the size of the last dimension")
    elif is_call(node, *_SUMS):
        return Decline("no_mean", "the root is of a sum of squares, not of their mean")
    elif is_call(node, aten.mean.default):
        return Decline("axis", "the mean is over all elements")
    else:
        return Decline("not_a_norm", f"the root is of {node.target if node.op == 'call_function' else node.name}, not of a mean")
    if not reduces_last(total.args[1], value):
        return Decline("axis", f"the mean is over dimensions {total.args[1]} of {tensor(value).dim()}, not over the last one")
    return value


def _square(node: fx.Node) -> fx.Node | None:
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _raise_product(found: Statistics, root: fx.Node, user: fx.Node) -> Decline | None:
    """Raise the norm whose scaling of x by the root is `user`, or say why not."""
    if cast_source(user) is root:
        return Decline("root_cast", f"the root is rounded to {tensor(user).dtype} before it is multiplied")
    other = next((b for a, b in operands(user) if a is root), None) if is_call(user, *MULS) else None
    if other is None:
        return Decline("second_user", f"the root is used by {user.name} ({user.target}) as well")
    if not is_tensor(other) or not (other is found.wide or peel_widening(other) is found.x):
        if any(f is found.x or f is found.wide for f in factors(other)) or _is_vector(other, found.x):
            return Decline("product_order", "the weight is multiplied in before the root")
        return Decline("other_product", f"the root multiplies {other}, not what its mean square is of")
    if {tensor(root).dtype, tensor(user).dtype} != {tensor(found.wide).dtype}:
        return Decline("other_precision", f"the root is {tensor(root).dtype}, its product {tensor(user).dtype}")
    if tensor(root).dim() != tensor(found.x).dim() or not same(tensor(root).shape[-1], 1):
        return Decline("axis", "the root is not broadcast along the last dimension")
    tail = next(_tails(found, user))
    return _substitute(found, *tail)


def _substitute(found: Statistics, out: fx.Node, weight: Weight | None, rounding: Rounding) -> Decline | None:
    rms_norm = registry["rms_norm"].default
    attributes = (weight.node if weight else None, found.eps, float(weight.bias) if weight else 0.0, str(rounding))
    if is_call(found.x, aten.permute.default):
        x, order = found.x.args
        if order[-1] in (-1, len(order) - 1):  # rows change places and stay whole: as well after as before the norm
            with out.graph.inserting_before(out):
                norm = emit(out.graph, rms_norm, (x, *attributes), like=out)
            if not isinstance(substitute(out, aten.permute.default, (norm, order)), Decline):
                return None
            erase_dead(norm)
    done = substitute(out, rms_norm, (found.x, *attributes))
    return done if isinstance(done, Decline) else None


def _tails(found: Statistics, product: fx.Node) -> Iterator[tuple[fx.Node, Weight | None, Rounding]]:
    """Where the norm that starts with x · root ends, the longest end first: (last node, weight, rounding)."""
    low, wide = tensor(found.x).dtype, tensor(found.wide).dtype
    start = settled(product)
    cast = only_user(start)
    if low != wide and cast is not None and cast_source(cast) is start and tensor(cast).dtype == low:
        yield from _weighted(found, settled(cast), "cast_first")
        yield settled(cast), None, Rounding("cast_first")
    base = "cast_first" if low == wide else "cast_last"
    yield from _weighted(found, start, base)
    yield start, None, Rounding(base, keep_f32=low != wide)


def _weighted(found: Statistics, y: fx.Node, base: str) -> Iterator[tuple[fx.Node, Weight | None, Rounding]]:
    """The ends of a norm whose normalised value y is multiplied by a weight."""
    wide = tensor(found.wide).dtype
    scaled = only_user(y)
    if scaled is not None and cast_source(scaled) is y and tensor(scaled).dtype == wide:  # y cast up to meet an FP32 weight
        y, scaled = scaled, only_user(scaled)
    if scaled is None or not is_call(scaled, aten.mul.Tensor):
        return
    other = next(b for a, b in operands(scaled) if a is y)
    for weight in _weights(other, found):
        narrow = tensor(found.x).dtype
        if base == "cast_first":
            narrow = torch.promote_types(narrow, tensor(weight.node).dtype)
        # the dtype that the body's product has, before its last cast
        body = torch.promote_types(tensor(found.x).dtype if base == "cast_first" else wide, weight.dtype)
        rounding = Rounding(base if weight.bias == 0 or tensor(found.x).dtype != wide else "cast_last", low_bias=weight.low)
        end = settled(scaled)
        if tensor(scaled).dtype == narrow == body:
            yield end, weight, rounding
            continue
        cast = only_user(end)
        if cast is not None and cast_source(cast) is end and tensor(cast).dtype == narrow:
            yield settled(cast), weight, rounding
        if tensor(scaled).dtype == wide == body:
            yield end, weight, Rounding(base, weight.low, keep_f32=True)


def _weights(node: fx.Node, found: Statistics) -> Iterator[Weight]:
    """The ways to read a factor as weight + bias: before its widening cast, then as it stands."""
    if not _is_vector(node, found.x):
        return
    wide = tensor(found.wide).dtype
    inner = peel_widening(node)
    shifted = plus_constant(inner)
    if shifted is not None and _is_vector(shifted[0], found.x):
        vector, bias = shifted
        dtype = tensor(inner).dtype
        source = peel_widening(vector)
        if dtype != wide:
            yield Weight(vector, bias, dtype, low=True)
        elif torch.promote_types(tensor(source).dtype, torch.float32) == wide:
            yield Weight(source, bias, dtype, low=False)
    yield Weight(inner, 0.0, tensor(inner).dtype, low=False)
    if inner is not node:
        yield Weight(node, 0.0, tensor(node).dtype, low=False)


def _is_vector(node: object, x: fx.Node) -> bool:
    """Whether a value holds one number for each element of x's last dimension."""
    return is_tensor(node) and tensor(node).dim() == 1 and same(tensor(node).shape[0], tensor(x).shape[-1])  # type: ignore[arg-type]
