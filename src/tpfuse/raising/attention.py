"""Attention whose rows are quantised → tpfuse.attention, and the quantisation taken of its rows as they are.

Anchored on the quantisation: an attention that none follows has no fused form and stays as the model wrote it.  torch's own
operators are read off the graph.  A decomposed attention is recognised by its two products, and then its nodes are compared
with what the operator's body becomes under the same decompositions, so that it is exact by construction.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from tpfuse.ir.attention import Method
from tpfuse.ir.op import registry
from tpfuse.raising.canonical import canonicalise
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import DECLINE, emit, erase_dead
from tpfuse.rewrite.inline import trace_body
from tpfuse.rewrite.match import (
    VIEWS,
    arguments,
    aten,
    cast_source,
    is_call,
    is_tensor,
    peel_widening,
    plus_constant,
    same,
    same_shape,
    tensor,
    times_constant,
)  # fmt: skip
from tpfuse.rewrite.site import site_of

_SWAP = [0, 2, 1, 3]  # heads and tokens
_FLASH_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH = aten._scaled_dot_product_flash_attention.default
_EFFICIENT = aten._scaled_dot_product_efficient_attention.default
_CUDNN = aten._scaled_dot_product_cudnn_attention.default
_NAMES = {_FLASH_CPU: "flash_cpu", _FLASH: "flash", _EFFICIENT: "efficient", _CUDNN: "cudnn"}


@dataclass(frozen=True)
class Found:
    """The arguments of tpfuse.attention, and the node that holds its result with heads before tokens."""

    out: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    causal: bool
    method: Method

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.mask, self.scale, self.causal, str(self.method)


def join_heads(graph: fx.Graph) -> list[Event]:
    """A view of an attention's result into groups is made a view of its rows, which folding views has hidden: a quantisation in
    groups is of rows, not of heads."""
    for node in list(graph.nodes):
        if not is_call(node, aten.permute.default) or list(node.args[1]) != _SWAP or not _attended(node.args[0]):
            continue
        batch, tokens, heads, width = tensor(node).shape
        sizes = [batch, -1] if isinstance(batch, int) else [-1, tokens]
        copies = [node, *(u for u in node.users if is_call(u, aten.clone.default))]
        if not all(isinstance(n, int) for n in (sizes[1], heads, width)):
            continue
        for view in [u for copy in copies for u in copy.users if is_call(u, *VIEWS)]:
            if not same(tensor(view).shape[-1], heads * width):
                with graph.inserting_before(view):
                    rows = emit(graph, aten.reshape.default, (view.args[0], [*sizes, heads * width]), like=view)
                view.update_arg(0, rows)
    return []


def _attended(out: Any) -> bool:
    if is_call(out, operator.getitem):
        return is_call(out.args[0], *_NAMES)
    return _product(cast_source(out) or out) is not None


def raise_attention(graph: fx.Graph) -> list[Event]:
    """Raise every attention whose rows are quantised; one that cannot be is declined with its reason."""
    events = []
    for node in list(graph.nodes):
        if not is_call(node, registry["quantize"].default):
            continue
        swapped = _swapped(node.args[0])
        declined = None if swapped is None else _raise(swapped)
        if declined is not None:
            node.meta[DECLINE] = declined
            events.append(Event("declined", "attention_quantize", site_of(node), reason=declined))
    for node in list(graph.nodes):
        if is_call(node, registry["quantize"].default):
            _lift(node)
    return events


def _swapped(x: Any) -> fx.Node | None:
    """The transposition to tokens before heads from which the rows x are made, or None."""
    joined = False
    while is_call(x, *VIEWS, aten.clone.default):
        joined = joined or not same(tensor(x).shape[-1], tensor(x.args[0]).shape[-1])
        x = x.args[0]
    return x if joined and is_call(x, aten.permute.default) and list(x.args[1]) == _SWAP else None


def _raise(swapped: fx.Node) -> Decline | None:
    """Raise the attention whose result is transposed by `swapped`; None also where there is no attention."""
    out = swapped.args[0]
    found = _operator(out) if is_call(out, operator.getitem) else _decomposed(out)  # type: ignore[arg-type]
    if not isinstance(found, Found):
        return found
    if len(found.out.users) != 1:
        names = ", ".join(u.name for u in found.out.users if u is not swapped)
        return Decline("second_user", f"the attention is used by {names} with its heads apart as well")
    copies = [swapped, *(u for u in swapped.users if is_call(u, aten.clone.default))]
    users = [u for copy in copies for u in copy.users if u not in copies]
    if not all(is_call(u, *VIEWS) for u in users):
        return Decline("second_user", "the attention is read with its heads apart as well")
    graph = swapped.graph
    with graph.inserting_before(swapped):
        new = emit(graph, registry["attention"].default, found.args, like=swapped)
    for user in users:
        with graph.inserting_before(user):
            view = new if same_shape(tensor(user), tensor(new)) else emit(graph, user.target, (new, user.args[1]), like=user)
        user.replace_all_uses_with(view)
        graph.erase_node(user)
    call: Any = out.args[0]  # type: ignore[union-attr]
    for copy in reversed(copies):
        erase_dead(copy)
    if is_call(call, *_NAMES) and not call.users:  # counts as random, and so as impure, without dropout too
        inputs = call.all_input_nodes
        graph.erase_node(call)
        for value in inputs:
            erase_dead(value)
    return None


def _lift(node: fx.Node) -> None:
    """Quantise the rows of an attention as they are and regroup the quantised ones: a view between the two goes after both."""
    view = node.args[0]
    if not is_call(view, *VIEWS) or not is_call(view.args[0], registry["attention"].default):  # type: ignore[union-attr]
        return
    rows, sizes = view.args[0], view.args[1]  # type: ignore[union-attr]
    width = tensor(view).shape[-1]  # type: ignore[arg-type]
    stored = [tensor(user).shape[-1] for user in node.users if user.args[1] == 0]
    if not same(tensor(rows).shape[-1], width) or not all(isinstance(n, int) or same(n, width) for n in stored):  # type: ignore
        return
    graph = node.graph
    with graph.inserting_before(node):
        new = emit(graph, node.target, (rows, *node.args[1:]), like=node)
    for user in list(node.users):
        with graph.inserting_before(user):
            value = emit(graph, operator.getitem, (new, user.args[1]), like=user)
            if user.args[1] == 0:
                last = tensor(user).shape[-1]
                last = last if isinstance(last, int) else sizes[-1]  # type: ignore[index]
                value = emit(graph, aten.reshape.default, (value, [*sizes[:-1], last]), like=user)  # type: ignore[index]
        user.replace_all_uses_with(value)
        graph.erase_node(user)
    erase_dead(node)


def _operator(out: fx.Node) -> Found | Decline | None:
    """The attention of torch's of which `out` is a result."""
    call = out.args[0]
    if not isinstance(call, fx.Node) or call.target not in _NAMES:
        return None
    a = arguments(call)
    if out.args[1] != 0 or any(u.target is not operator.getitem or u.args[1] != 0 for u in call.users):
        return Decline("second_user", "another result of the attention than its output is used (its log-sum-exp)")
    if a["dropout_p"] != 0:
        return Decline("dropout", f"attention weights are dropped with probability {a['dropout_p']}")
    if a.get("return_debug_mask"):
        return Decline("debug_mask", "the attention returns its weights for debugging")
    q, k, v = a["query"], a["key"], a["value"]
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(tensor(q).shape[-1])
    mask = a.get("attn_bias", a.get("attn_mask"))
    k, v, repeat = _grouped(k, v)
    return Found(out, q, k, v, mask, float(scale), bool(a["is_causal"]), Method(_NAMES[call.target], repeat))  # type: ignore[index]


def _grouped(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node, bool]:
    """Keys and values before their heads were repeated, and whether they were."""
    sources = [_before_repeat(x) for x in (k, v)]
    if None in sources:
        return k, v, False
    return sources[0], sources[1], True  # type: ignore[return-value]


def _before_repeat(x: Any) -> fx.Node | None:
    """[batch, heads, keys, width] of a view that holds each of its heads several times, side by side."""
    while is_call(x, *VIEWS, aten.clone.default):
        x = x.args[0]
    if not is_call(x, aten.expand.default) or tensor(x).dim() != 5:
        return None
    single = x.args[0]
    return single.args[0] if is_call(single, aten.unsqueeze.default) and single.args[1] == 2 else None


def _decomposed(out: Any) -> Found | Decline | None:
    """The attention written in products and a softmax that ends in `out`, [batch, heads, tokens, v_dim]."""
    last = _product(cast_source(out) or out)
    if last is None:
        return None
    weights, values = last
    weights = _through(weights, aten.where.self, 2)
    if not is_call(weights, aten.div.Tensor) or not is_call(weights.args[0], aten.exp.default):
        return None
    shifted = weights.args[0].args[0]  # type: ignore[union-attr]
    if not is_call(shifted, aten.sub.Tensor) or not is_call(shifted.args[1], aten.amax.default):
        return None
    scores = peel_widening(shifted.args[0])  # type: ignore[arg-type]
    mask = None
    if is_call(scores, aten.add.Tensor) and plus_constant(scores) is None:
        scores, mask = scores.args
    scores, after = _scaled(scores)
    first = _product(scores)
    if first is None:
        return Decline("attention_form", f"the scores are no product times a scale plus a mask, but end in {scores}")
    (q, before_q), (k, before_k) = _scaled(first[0]), _scaled(first[1])
    if not is_call(k, aten.permute.default) or list(k.args[1]) != [0, 1, 3, 2]:
        return Decline("attention_form", "the second factor of the scores is not the transposition of keys")
    k, more = _scaled(k.args[0])
    eager = before_q == before_k == more == 1
    scale = after if eager else before_q * before_k * more
    q, k, v = (peel_widening(x) for x in (q, k, _unviewed(values)))
    grouped_k, grouped_v, repeat = _grouped(k, values if _before_repeat(values) else v)
    return _verified(out, (q, grouped_k, grouped_v), mask, scale, Method("eager" if eager else "math", repeat))


def _verified(out: fx.Node, qkv: tuple[fx.Node, ...], mask: Any, scale: float, method: Method) -> Found | Decline:
    """A decomposed attention, if the operator's body decomposes into the same nodes."""
    op = registry["attention"]
    inputs = dict(zip(("q", "k", "v"), qkv, strict=True)) | ({"mask": mask} if is_tensor(mask) else {})
    if any(tensor(x).dim() != 4 for x in qkv):
        return Decline("attention_form", "queries, keys or values are not four-dimensional")
    fixed = {"softmax_scale": _round_trip(scale, tensor(qkv[0]).shape[-1]), "causal": False, "method": str(method)}
    fixed |= {} if "mask" in inputs else {"mask": None}
    try:
        body = trace_body(op, {k: tensor(n) for k, n in inputs.items()}, fixed)
    except RuntimeError as error:
        return Decline("attention_form", f"shapes that are not those of one attention: {str(error).splitlines()[0]}")
    canonicalise(body)
    end = body.output_node().args[0]
    while not (is_call(end, aten.permute.default) and list(end.args[1]) == _SWAP):  # type: ignore[union-attr]
        end = end.args[0]  # type: ignore[union-attr]
    bound = dict(zip(body.find_nodes(op="placeholder"), inputs.values(), strict=True))
    inside: set[fx.Node] = set()
    different = _difference(end.args[0], out, bound, inside)  # type: ignore[union-attr]
    if different is not None:
        return Decline("attention_form", f"{different} differs from the {method} attention of torch")
    for node in inside - {out}:
        for user in node.users if any(map(is_tensor, node.all_input_nodes)) else ():  # a constant serves every layer
            if user not in inside:
                return Decline("second_user", f"{node.name}, inside the attention, is used by {user.name} as well")
    q, k, v = qkv
    return Found(out, q, k, v, mask, fixed["softmax_scale"], False, method)


def _difference(body: Any, node: Any, bound: dict[fx.Node, fx.Node], inside: set[fx.Node]) -> str | None:
    """The name of the first node that is not as in the body, or None.  `inside` collects the nodes that are."""
    if not is_tensor(body) or not is_tensor(node):
        return None if _number(body, node) else str(node)
    if body in bound:
        return None if bound[body] is node else node.name
    if node in inside:
        return None
    views = is_call(body, *VIEWS) and is_call(node, *VIEWS)
    if node.op != "call_function" or not (views or body.target is node.target):
        return node.name
    if tensor(body).dtype != tensor(node).dtype or not same_shape(tensor(body), tensor(node)):
        return node.name
    inside.add(node)
    if views or is_call(node, aten.expand.default):  # told by their shapes
        return _difference(body.args[0], node.args[0], bound, inside)
    ours, its = (list(_flat((n.args, n.kwargs))) for n in (body, node))
    if len(ours) != len(its):
        return node.name
    return next((d for a, b in zip(ours, its, strict=True) if (d := _difference(a, b, bound, inside)) is not None), None)


def _number(a: Any, b: Any) -> bool:
    """Whether two arguments that are no tensors are equal."""
    a, b = (x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return bool(a == b) or (isinstance(a, float) and math.isclose(a, b, rel_tol=1e-15))
    return same(a, b) if hasattr(a, "node") or hasattr(b, "node") else a == b


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for v in value:
            yield from _flat(v)
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _flat(value[key])
    else:
        yield value


def _product(node: Any) -> tuple[Any, Any] | None:
    """The factors of a batched product, views around it looked through."""
    node = _unviewed(node)
    return (_unviewed(node.args[0]), _unviewed(node.args[1])) if is_call(node, aten.bmm.default) else None


def _unviewed(node: Any) -> Any:
    while is_call(node, *VIEWS, aten.expand.default) and tensor(node).dim() <= 4 and tensor(node.args[0]).dim() <= 4:
        node = node.args[0]
    return node


def _scaled(node: Any) -> tuple[Any, float]:
    """(value, c) of value · c, views looked through; c is 1 where there is no such product."""
    found = times_constant(_unviewed(node))
    return (_unviewed(found[0]), float(found[1])) if found is not None else (_unviewed(node), 1.0)


def _through(node: Any, target: Any, index: int) -> Any:
    """What stands before casts and, if there is one, a call of `target`, whose operand `index` it is."""
    node = cast_source(node) or node
    if is_call(node, target):
        node = node.args[index]
    return node


def _round_trip(scale: float, width: int) -> float:
    """The scale whose square root the model multiplied by: 1/√width where it squares to that, else the square itself."""
    usual = 1 / math.sqrt(width)
    return usual if math.isclose(scale, usual, rel_tol=1e-12) else scale
