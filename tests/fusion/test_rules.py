"""Every derived rule, in every scheme: its chain of smaller operators becomes the one operator, whatever results are alive, and
the closest chain that must not be fused is not.

The chains are the operators' own bodies run on samples, so a new declaration is tested as soon as it is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fusion.graphs import all_reduce, fused, names, raised
from tpfuse.config import PASSES
from tpfuse.formats import SCHEME_NAMES
from tpfuse.fusion import composites
from tpfuse.ir import Op, find, registry
from tpfuse.ir.matmul import scaled_sample
from tpfuse.ir.overlap import WITH_NORM

TOKENS, HIDDEN = 24, 128
OPTIONAL = {"bias": None, "alpha": 1.0}  # by which argument a step is left out of a body
RULES = [op for op in registry.values() if op.fuse and not op.variadic]


def schemes(op: Op) -> Sequence[str]:
    """The schemes of an operator, or of its product; a scale a row spans heads, which attention declines."""
    if not {"scheme", "w_scheme"} & set(op.params):
        return ("plain",)
    return [s for s in SCHEME_NAMES if not (op.name == "attention_quantize" and s == "fp8_token")]


CASES = [(op.name, scheme) for op in RULES for scheme in schemes(op)]


def sample(op: Op, scheme: str, group: str, **more: Any) -> dict[str, Any]:
    shape = {"tokens": TOKENS, "hidden": HIDDEN, "dtype": torch.bfloat16, "group": group, **more}
    args = op.sample(**shape, **({"scheme": scheme} if scheme != "plain" else {}))
    if op.name == "attention_quantize":  # one head, as wide as a group
        args |= {x: args[x].transpose(1, 2).reshape(1, 1, TOKENS, HIDDEN) for x in ("q", "k", "v")}
    return args


Change = Callable[[list[Any], dict[Any, Any]], Any]  # (results, values by pattern node) → what the graph returns
Twist = Callable[[str, list[Any]], list[Any]]  # (a smaller operator's name, its arguments) → the arguments it gets


def graph(op: Op, args: dict[str, Any], change: Change = lambda results, env: results, twist: Twist = lambda name, a: a) -> Any:
    """The raised graph of an operator's pattern, each smaller operator a node."""
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor)}
    rules = composites.rules_of(op)
    own = frozenset().union(*(r.dropped for r in rules))  # the optional steps of the body itself, not of what it is made of
    dropped = frozenset(k for k in own if args[k] is OPTIONAL[k])
    pattern = next(r for r in rules if r.dropped == dropped).pattern

    def run(*values: Tensor) -> Any:
        given = {**args, **dict(zip(tensors, values, strict=True))}
        env: dict[Any, Any] = {}
        for node in pattern.nodes:
            if node.op == "placeholder":
                env[node] = given[str(node.target)]
            elif node.op == "call_function":
                smaller = find(node.target)
                values = torch.fx.node.map_arg(node.args, env.__getitem__)
                env[node] = node.target(*(twist(smaller.name, list(values)) if smaller else values))
        (outs,) = pattern.find_nodes(op="output")[0].args
        return change([env[n] for n in (outs if isinstance(outs, tuple) else (outs,))], env)

    return raised(run, list(tensors.values()), TOKENS)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_fires(name: str, scheme: str, group: str) -> None:
    """With all results alive, with each one alone, and without each optional step."""
    op = registry[name]
    full = sample(op, scheme, group)
    options = [k for k in OPTIONAL if k in op.params and not (k == "alpha" and "eps" not in op.params)]  # a residual's alpha
    left_out = [dict(c) for n in range(len(options) + 1) for c in itertools.combinations([(k, OPTIONAL[k]) for k in options], n)]
    alive = [i for i in range(op.results) if _decides(op, scheme, i)] if op.results > 1 else []
    for args, change in [
        *(({**full, **gone}, lambda results, env: results) for gone in left_out),
        *((full, lambda results, env, i=i: results[i]) for i in alive),
    ]:
        gm = graph(op, args, change)
        body = names(gm)
        fused(gm, [op.fuse])
        assert names(gm) == [name], f"{body} became {names(gm)}"
        (node,) = [n for n in gm.graph.nodes if find(n.target)]
        bound = op.bind(node.args, node.kwargs)
        assert all(bound[k] == v for k, v in args.items() if not isinstance(v, Tensor) and k not in ("rows", "scale"))


def test_the_outer_norm_of_a_sandwich_may_stay_in_fp32(group: str) -> None:
    """As torch 2.11 leaves a norm that is quantised, while the inner one is rounded."""

    def layer(x: Tensor, residual: Tensor, inner: Tensor, outer: Tensor, scale: Tensor) -> Tensor:
        y = registry["rms_norm"].default(all_reduce(x, group), inner, 1e-6, 1.0, "cast_last")
        norm = registry["rms_norm"].default(residual + y, outer, 1e-5, 1.0, "cast_last+keep_f32")
        return registry["quantize"].default(norm, scale, "fp8_tensor", "row")[0]

    x, weight = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.rand(HIDDEN).bfloat16()
    gm = raised(layer, [x, x, weight, weight, torch.tensor(0.03)], TOKENS)
    fused(gm, ["all_reduce_norm", "all_reduce_norm_quantize"])
    (node,) = [n for n in gm.graph.nodes if find(n.target)]
    op = registry["all_reduce_rms_norm_add_rms_norm_quantize"]
    bound = op.bind(node.args, node.kwargs)
    assert node.target is op.default and (bound["eps"], bound["eps2"]) == (1e-6, 1e-5)
    assert (bound["rounding"], bound["rounding2"]) == ("cast_last", "cast_last+keep_f32")


def _decides(op: Op, scheme: str, result: int) -> bool:
    """Whether a chain of which only this result is alive is still the operator's."""
    if "scheme" in op.params:
        return result == 0 or (result == 1 and scheme != "fp8_tensor")
    return result == 0 and op.fuse != "always"


@pytest.mark.parametrize("name", [op.name for op in RULES if op.fuse != "always"])
def test_needs_its_pass(name: str, group: str) -> None:
    """With every other pass on, the operator does not come of its chain."""
    op = registry[name]
    gm = graph(op, sample(op, schemes(op)[0], group))
    fused(gm, [p for p in PASSES if p != op.fuse])
    assert name not in names(gm)


# The closest chain that must not be fused, of each operator: what differs, and the reason given.
#   "weight": the norm's weight is FP32.  "inner": a value inside, which the operator does not return, is used elsewhere.
#   "group": two collectives of the chain are over different groups.  "scale": the given scale is computed from the result.
NEGATIVE_WITH_NORM = {
    "rms_norm": ("weight", "weight_dtype"), "add_rms_norm": ("inner", "second_user"),
    "rms_norm_add_rms_norm": ("inner", "second_user"), "rms_norm_quantize": ("scale", "depends_on_result"),
    "add_rms_norm_quantize": ("scale", "depends_on_result"),
    "rms_norm_add_rms_norm_quantize": ("scale", "depends_on_result"),
}  # fmt: skip
NEGATIVE = {
    "add_rms_norm": ("residual", ""),
    "all_reduce_rms_norm": ("weight", "weight_dtype"),
    "all_reduce_add_rms_norm": ("inner", "second_user"),
    "all_reduce_rms_norm_add_rms_norm": ("inner", "second_user"),
    "all_reduce_rms_norm_quantize": ("scale", "depends_on_result"),
    "all_reduce_add_rms_norm_quantize": ("scale", "depends_on_result"),
    "all_reduce_rms_norm_add_rms_norm_quantize": ("scale", "depends_on_result"),
    "rms_norm_quantize": ("scale", "depends_on_result"),
    "add_rms_norm_quantize": ("scale", "depends_on_result"),
    "act_and_mul_quantize": ("scale", "depends_on_result"),
    "attention_quantize": ("heads", "head_dim"),
    "qk_norm_rope": ("inner", "second_user"),
    "matmul_reduce_scatter": ("inner", "second_user"),
    "scaled_matmul_reduce_scatter": ("inner", "second_user"),
    "reduce_scatter_rms_norm": ("weight", "weight_dtype"),
    "reduce_scatter_add_rms_norm": ("inner", "second_user"),
    "reduce_scatter_rms_norm_add_rms_norm": ("inner", "second_user"),
    "reduce_scatter_rms_norm_quantize": ("scale", "depends_on_result"),
    "reduce_scatter_add_rms_norm_quantize": ("scale", "depends_on_result"),
    "reduce_scatter_rms_norm_add_rms_norm_quantize": ("scale", "depends_on_result"),
    "reduce_scatter_rms_norm_all_gather": ("group", "attributes"),
    "reduce_scatter_add_rms_norm_all_gather": ("group", "attributes"),
    "reduce_scatter_rms_norm_add_rms_norm_all_gather": ("group", "attributes"),
    "reduce_scatter_rms_norm_quantize_all_gather": ("group", "attributes"),
    "reduce_scatter_add_rms_norm_quantize_all_gather": ("group", "attributes"),
    "reduce_scatter_rms_norm_add_rms_norm_quantize_all_gather": ("group", "attributes"),
    **{op.name: NEGATIVE_WITH_NORM[op.then.name.removeprefix("reduce_scatter_")] for op in WITH_NORM},
}  # fmt: skip


def closest(op: Op, kind: str, group: str) -> Any:
    scheme = "fp8_group128" if kind == "heads" else schemes(op)[0]
    args = sample(op, scheme, group)
    match kind:
        case "weight":
            return graph(op, {k: v.float() if k == "weight" else v for k, v in args.items()})
        case "residual":
            return graph(op, {**args, "residual": args["residual"][:1]})
        case "heads":
            return graph(op, {**args, **{x: args[x].reshape(1, 2, TOKENS, HIDDEN // 2) for x in ("q", "k", "v")}})
        case "inner":
            return graph(op, args, _inner_used)
        case "scale":
            return graph(op, args, twist=_scale_of_all)
    other = torch.distributed.new_group([0, 1]).group_name
    return graph(op, args, twist=lambda name, a: [other if x == group and "gather" in name else x for x in a])


def _inner_used(results: list[Any], env: dict[Any, Any]) -> Any:
    """The first value inside the chain that is no result has a user outside."""
    calls = [v for node, v in env.items() if node.op == "call_function" and isinstance(v, Tensor)]
    value = next(v for v in calls if not any(v is r for r in results))
    return [*results, torch.tanh(value.float())]


def _scale_of_all(name: str, args: list[Any]) -> list[Any]:
    """The scale that is given to the quantise is computed from all rows that it scales."""
    return [args[0], args[0].abs().amax().float() / 448, *args[2:]] if name == "quantize" else args


@pytest.mark.parametrize("name", NEGATIVE)
def test_the_closest_chain_is_not_fused(name: str, group: str) -> None:
    op = registry[name]
    kind, code = NEGATIVE[name]
    gm = closest(op, kind, group)
    events = fused(gm, [op.fuse])
    assert name not in names(gm), names(gm)
    assert not code or code in [e.reason.code for e in events if e.reason], [str(e) for e in events]


def test_every_rule_has_a_negative() -> None:
    assert set(NEGATIVE) == {op.name for op in RULES}


def test_a_scale_per_token_spans_heads(group: str) -> None:
    op = registry["attention_quantize"]
    gm = graph(op, sample(op, "fp8_token", group))
    assert "scale_spans_heads" in [e.reason.code for e in fused(gm, [op.fuse]) if e.reason]
    assert names(gm) == ["attention", "quantize"]


LAYOUTS = ("row", "col", "col+tma", "row+ue8m0", "col+tma+ue8m0", "col+tma+ue8m0_packed")
LATENT_CASES = [
    ("fp8_tensor", "row"), ("nvfp4", "swizzled_128x4"), ("nvfp4", "linear"),
    *itertools.product(("fp8_group128", "fp8_group64"), LAYOUTS),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "layout"), LATENT_CASES)
def test_latent_attention(scheme: str, layout: str, group: str) -> None:
    """Multi-head latent attention, whose values are narrower than its keys: quantised bit for bit as unfused."""
    op = registry["attention_quantize"]
    args = sample(op, scheme, group, layout=layout)
    seen = torch.Generator().manual_seed(1)
    wide = {x: torch.randn(1, 2, TOKENS, 192, generator=seen).bfloat16() for x in ("q", "k")}
    args |= {**wide, "v": torch.randn(1, 2, TOKENS, 128, generator=seen).bfloat16(), "method": "math"}
    gm = graph(op, args)
    tensors = [v for v in args.values() if isinstance(v, Tensor)]
    want = torch.fx.Interpreter(gm).run(*tensors)
    fused(gm, [op.fuse])
    assert names(gm) == ["attention_quantize"]
    for a, b in zip(torch.fx.Interpreter(gm).run(*tensors), want, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_gathered_products(scheme: str, group: str) -> None:
    """Quantised rows gathered with their scales, for two products: one operator."""
    one, other = (scaled_sample(tokens=TOKENS, hidden=HIDDEN, scheme=scheme, width=w, seed=0) for w in (48, 32))
    tensors = {k: v for k, v in one.items() if isinstance(v, Tensor)}
    second = [other[k] for k in ("weight", "weight_scale")]

    def run(*values: Tensor) -> list[Tensor]:
        a = {**one, **dict(zip(tensors, values[:-2], strict=True))}
        scales = torch.empty(0) if scheme == "fp8_tensor" else a["x_scale"]
        gathered = registry["all_gather_quantized"].default(a["x"], scales, scheme, a["layout"], group)
        a["x"], a["x_scale"] = gathered[0], a["x_scale"] if scheme == "fp8_tensor" else gathered[1]
        b = {**a, "weight": values[-2], "weight_scale": values[-1], "bias": None}
        return [registry["scaled_matmul"].default(*p.values()) for p in (a, b)]

    gm = raised(run, [*tensors.values(), *second], TOKENS)
    (event,) = fused(gm, ["async_tp"])
    assert names(gm) == ["all_gather_scaled_matmul"] and event.attributes["products"] == 2


def test_an_operator_declared_later_has_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    before = composites.rules()
    late = object.__new__(Op)
    late.__dict__ |= {**registry["rms_norm_quantize"].__dict__, "name": "late"}
    monkeypatch.setitem(registry, "late", late)
    assert [rule.name for rule in composites.rules() if rule not in before] == ["late"]
