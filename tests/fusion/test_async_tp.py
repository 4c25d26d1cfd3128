"""Products beside collectives: what fuses, what is left and why.  Graphs of a group of two."""

import pytest
import torch

from tests.fusion.graphs import all_gather, all_reduce, fired, fused, names, raised, reasons, reduce_scatter
from tpfuse.config import PASSES
from tpfuse.formats import SCHEME_NAMES
from tpfuse.fusion import fuse
from tpfuse.ir import find, registry
from tpfuse.ir.matmul import scaled_sample
from tpfuse.ir.overlap import WITH_NORM
from tpfuse.ir.verify import verify
from tpfuse.report import Decline
from tpfuse.rewrite.inline import unfuse

TP = ("async_tp",)
HIDDEN, TOKENS = 32, 24
WEIGHT, BIAS = torch.randn(HIDDEN, HIDDEN), torch.rand(HIDDEN)


def rows(count=TOKENS):
    return torch.randn(count, HIDDEN)


def graph(fn, *args):
    return raised(fn, args, TOKENS)


def only(gm, name):
    (node,) = [n for n in gm.graph.nodes if n.target is registry[name].default]
    return registry[name].bind(node.args)


def test_product_then_scatter(group):
    gm = graph(lambda x, m: reduce_scatter(x @ m, 2, group), rows(), WEIGHT)
    assert fired(fused(gm, TP)) == ["matmul_reduce_scatter"]
    assert only(gm, "matmul_reduce_scatter")["padded"] is False


def test_a_bias_is_added_once(group):
    gm = graph(lambda x, m, b: reduce_scatter(torch.addmm(b, x, m), 2, group), rows(), WEIGHT, BIAS)
    fused(gm, TP)
    assert names(gm) == ["matmul_reduce_scatter"]
    assert only(gm, "matmul_reduce_scatter")["bias"].name == "arg2_1"
    assert not [n for n in gm.graph.nodes if "add" in str(n.target)]


def test_a_product_of_gathered_rows_with_themselves(group):
    def model(x):
        y = all_gather(x, 2, group)
        return y @ y

    gm = graph(model, rows(HIDDEN // 2))
    fused(gm, TP)
    assert names(gm) == ["all_gather", "matmul"]


def test_several_products_of_one_gather(group):
    def model(x, a, b, bias):
        y = all_gather(x, 2, group)
        return y @ a, torch.addmm(bias, y, b)

    gm = graph(model, rows(), WEIGHT, WEIGHT + 1, BIAS)
    events = fused(gm, TP)
    assert names(gm) == ["all_gather_matmul"]
    args = only(gm, "all_gather_matmul")
    assert [b and b.name for b in args["biases"]] == [None, "arg3_1"] and args["keep"] is False
    assert events[0].attributes["products"] == 2


def test_the_gathered_rows_are_returned_where_somebody_uses_them(group):
    def model(x, m):
        y = all_gather(x, 2, group)
        return y @ m, y.sum()

    gm = graph(model, rows(), WEIGHT)
    fused(gm, TP)
    assert names(gm) == ["all_gather_matmul"] and only(gm, "all_gather_matmul")["keep"] is True


def test_a_weight_that_needs_the_gather_stays_outside(group):
    def model(x, m):
        y = all_gather(x, 2, group)
        return y @ (m * y.amax())

    gm = graph(model, rows(), WEIGHT)
    events = fused(gm, TP)
    assert "all_gather_matmul" not in names(gm)
    assert reasons(events, "all_gather_matmul") == ["no_product"]


def test_a_weight_from_a_later_collective_stays_outside(group):
    """Fused, the first gather would wait for the second."""

    def model(x, z, m):
        y = all_gather(x, 2, group)
        return y @ m, y @ (m + all_reduce(z, group))

    gm = graph(model, rows(), torch.ones(HIDDEN), WEIGHT)
    fused(gm, TP)
    assert names(gm) == ["all_gather_matmul", "all_reduce", "matmul"]


def test_gathered_rows_as_the_second_operand(group):
    gm = graph(lambda x, m: m @ all_gather(x, 2, group), rows(), torch.randn(8, 2 * TOKENS))
    assert fired(fused(gm, TP)) == []


def test_a_product_with_a_second_user_is_not_scattered_inside(group):
    def model(x, m):
        y = x @ m
        return reduce_scatter(y, 2, group), y.sum()

    gm = graph(model, rows(), WEIGHT)
    assert fired(fused(gm, TP)) == []
    assert names(gm) == ["matmul", "reduce_scatter"]


def test_a_sum_over_the_ranks_is_no_scatter(group):
    gm = graph(lambda x, m: all_reduce(x @ m, group), rows(), WEIGHT)
    assert fired(fused(gm, TP)) == []


def test_one_side_only(group):
    """The report names the side without a product, and says that the other one is fused."""

    def model(x, m):
        return torch.relu(all_gather(torch.relu(reduce_scatter(x @ m, 2, group)), 2, group))

    gm = graph(model, rows(), WEIGHT)
    events = fused(gm, TP)
    assert fired(events) == ["matmul_reduce_scatter"]
    (left,) = [e for e in events if e.status == "declined" and e.rule == "all_gather_matmul"]
    assert left.reason.code == "one_side" and "aten.relu" in left.reason.detail


def scaled(scheme, tokens=TOKENS):
    args = scaled_sample(tokens=tokens, hidden=128, width=48, scheme=scheme)
    tensors = {k: v for k, v in args.items() if isinstance(v, torch.Tensor)}
    fixed = {k: v for k, v in args.items() if k not in tensors}
    return tensors, fixed


def test_scaled_product_then_scatter(group):
    for scheme in ("fp8_tensor", "fp8_token", "fp8_group128", "nvfp4"):
        tensors, fixed = scaled(scheme)

        def model(*values, tensors=tensors, fixed=fixed):
            args = {**dict(zip(tensors, values, strict=True)), **fixed}
            op = registry["scaled_matmul"]
            return reduce_scatter(op.default(*(args[name] for name in op.params)), 2, group)

        gm = raised(model, list(tensors.values()), TOKENS)
        fused(gm, TP)
        assert names(gm) == ["scaled_matmul_reduce_scatter"], scheme
        assert only(gm, "scaled_matmul_reduce_scatter")["scheme"] == scheme


def test_gathered_rows_and_scales_of_a_scaled_product(group):
    tensors, fixed = scaled("fp8_token")

    def model(*values):
        args = {**dict(zip(tensors, values, strict=True)), **fixed}
        gather, op = registry["all_gather"].default, registry["scaled_matmul"]
        args["x"], args["x_scale"] = gather(args["x"], group), gather(args["x_scale"], group)
        return op.default(*(args[name] for name in op.params))

    gm = raised(model, list(tensors.values()), TOKENS)
    fused(gm, TP)
    assert names(gm) == ["all_gather_scaled_matmul"]
    args = only(gm, "all_gather_scaled_matmul")
    assert [args[k].name for k in ("x", "x_scale")] == ["arg0_1", "arg2_1"]
    assert args["biases"][0] is not None


def test_scaled_products_that_differ_in_more_than_weights(group):
    """Another result dtype is another operator's: the rows are kept for it."""
    tensors, fixed = scaled("fp8_tensor")

    def model(*values):
        args = {**dict(zip(tensors, values, strict=True)), **fixed}
        args["x"] = registry["all_gather"].default(args["x"], group)
        op = registry["scaled_matmul"]
        other = {**args, "out_dtype": "float32", "bias": None}
        return [op.default(*(a[name] for name in op.params)) for a in (args, other)]

    gm = raised(model, list(tensors.values()), TOKENS)
    fused(gm, TP)
    assert names(gm) == ["all_gather_scaled_matmul", "scaled_matmul"]
    assert only(gm, "all_gather_scaled_matmul")["keep"] is True


def test_on_a_chain_that_was_rewritten(group):
    def model(x, residual, w, a, b):
        norm = registry["rms_norm"].default
        h = residual + all_reduce(x, group)
        z = torch.relu(norm(h, w, 1e-6, 0.0, "cast_first") @ a)
        return norm(h + all_reduce(z @ b, group), w, 1e-6, 0.0, "cast_first")

    gm = graph(model, rows(), rows(), BIAS, WEIGHT, WEIGHT + 1)
    events = fused(gm, ("sequence_parallel", *TP))
    assert [n for n in names(gm) if "matmul" in n] == ["all_gather_matmul", "matmul_reduce_scatter_add_rms_norm"]
    assert only(gm, "matmul_reduce_scatter_add_rms_norm")["padded"] is True
    assert reasons(events, "matmul_reduce_scatter") == ["one_side"]
    assert reasons(events, "all_gather_matmul") == ["one_side"]


def layer(group, scheme):
    """A decoder layer from the sum of its attention on: norm, gate and up, their product, down_proj's sum, and the next layer's
    norm and products."""
    quantised = scheme in SCHEME_NAMES
    shape = {"tokens": TOKENS, "hidden": 128, "width": 128, "scheme": scheme if quantised else "fp8_tensor"}
    one, other = (scaled_sample(**shape, seed=seed) for seed in (0, 3))
    norm = registry["rms_norm"].default

    def model(x, residual, vector, a, a_scale, b, b_scale, scale):
        def products(rows, *weights):
            if not quantised:
                return [rows @ weight for weight, _ in weights]
            given = scale if scheme in ("fp8_tensor", "nvfp4") else None
            q, scales = registry["quantize"].default(rows, given, scheme, one["layout"])
            scales = scale if scheme == "fp8_tensor" else scales
            rest = (None, None, None, scheme, one["layout"], one["weight_layout"], "float32", False)
            return [registry["scaled_matmul"].default(q, weight, scales, by, *rest) for weight, by in weights]

        h = residual + all_reduce(products(x, (a, a_scale))[0], group)
        y = norm(h, vector, 1e-6, 0.0, "cast_first")
        z = registry["act_and_mul"].default(*products(y, (a, a_scale), (b, b_scale)), "silu")
        h = h + all_reduce(products(z, (b, b_scale))[0], group)
        y = norm(h, vector, 1e-6, 0.0, "cast_first")
        return products(y, (a, a_scale), (b, b_scale))

    weights = [sample[name] for sample in (one, other) for name in ("weight", "weight_scale")]
    if not quantised:
        weights = [torch.randn(128, 128), torch.ones(1), torch.randn(128, 128), torch.ones(1)]
    scale = torch.tensor(0.03 if scheme == "fp8_tensor" else 400.0)
    return raised(model, (torch.randn(TOKENS, 128), torch.randn(TOKENS, 128), torch.rand(128), *weights, scale), TOKENS)


@pytest.mark.parametrize("scheme", ["plain", *SCHEME_NAMES])
def test_nothing_stands_between_the_products_of_a_layer(group, scheme):
    gm = layer(group, scheme)
    fused(gm, PASSES)
    scatter, gather, activation, start = {
        "plain": ("matmul_reduce_scatter_add_rms_norm", "all_gather_matmul", "act_and_mul", ["shard_rows"]),
    }.get(scheme, (
        "scaled_matmul_reduce_scatter_add_rms_norm_quantize", "all_gather_scaled_matmul", "act_and_mul_quantize",
        ["quantize", "shard_rows"],
    ))  # fmt: skip
    assert names(gm) == [*start, scatter, gather, activation, scatter, gather]
    assert _kept(gm) == [False, False]


def _kept(gm):
    """Of each gather with products: whether the gathered rows are returned."""
    found = [(op, n) for n in gm.graph.nodes if (op := find(n.target)) and "all_gather" in op.name and "matmul" in op.name]
    return [op.bind(node.args)["keep"] for op, node in found]


@pytest.mark.parametrize("scheme", ["plain", "fp8_token"])
def test_one_step_apart_is_the_scatter_behind_the_plain_product(group, scheme):
    gm = layer(group, scheme)
    fused(gm, PASSES)
    for node in list(gm.graph.nodes):
        if (op := find(node.target)) in WITH_NORM:
            unfuse(gm.graph, node, op)
    verify(gm.graph, "unfuse")
    line = ["matmul", "reduce_scatter_add_rms_norm"] if scheme == "plain" else [
        "scaled_matmul", "reduce_scatter_add_rms_norm_quantize"
    ]  # fmt: skip
    assert [n for n in names(gm) if n in line] == line * 2
    assert not [n for n in names(gm) if "matmul_reduce_scatter" in n]


def test_without_async_tp_the_gather_goes_with_the_scatter(group):
    gm = layer(group, "fp8_token")
    fused(gm, [p for p in PASSES if p != "async_tp"])
    assert names(gm).count("reduce_scatter_add_rms_norm_quantize_all_gather") == 2


def test_a_norm_that_cannot_follow_says_why(group):
    """A norm whose weight is FP32 stays outside, behind the scattered product."""

    def model(x, m, w):
        return registry["rms_norm"].default(reduce_scatter(x @ m, 2, group), w, 1e-6, 0.0, "cast_first")

    gm = graph(model, rows().bfloat16(), WEIGHT.bfloat16(), BIAS)
    events = fused(gm, TP)
    assert names(gm) == ["matmul_reduce_scatter", "rms_norm"]
    assert reasons(events, "matmul_reduce_scatter_rms_norm") == ["weight_dtype"]


def test_a_residual_from_a_later_collective_stays_outside(group):
    """The norm would wait for a collective that runs after its product's."""

    def model(x, z, m, w):
        y = reduce_scatter(x @ m, 2, group)
        return registry["rms_norm"].default(y + reduce_scatter(z, 2, group), w, 1e-6, 0.0, "cast_first")

    gm = graph(model, rows(), rows(), WEIGHT, BIAS)
    fused(gm, TP)
    assert "matmul_reduce_scatter" in names(gm) and "add_rms_norm" in names(gm)


def worth_of(graph_module, worth):
    events = fuse(graph_module.graph, PASSES, worth=worth)
    verify(graph_module.graph, "fuse")
    return events


@pytest.mark.parametrize("scheme", ["plain", "fp8_token"])
def test_what_is_not_worth_it_goes_with_what_else_stands_beside_it(group, scheme):
    """No product pays: the norm's rows are gathered by the operator that sums and norms them, as without async TP."""
    gm, without = layer(group, scheme), layer(group, scheme)
    events = worth_of(gm, lambda op, args: Decline("threshold", f"{op.name} is slower"))
    fused(without, [p for p in PASSES if p != "async_tp"])
    assert names(gm) == names(without) and [n for n in names(gm) if n.endswith("all_gather")]
    kind = "matmul" if scheme == "plain" else "scaled_matmul"
    declined = {e.rule for e in events if e.reason and e.reason.code == "threshold"}
    assert declined == {f"all_gather_{kind}", f"{kind}_reduce_scatter"}


def test_the_largest_that_is_worth_it_fires(group):
    """Only the plain scatter of a product pays: norm and quantise stay behind it.  Asked with the arguments' fake values."""
    seen = []

    def worth(op, args):
        seen.append(args["x"].dtype)
        return None if op.name == "scaled_matmul_reduce_scatter" else Decline("threshold", "slower")

    gm = layer(group, "fp8_token")
    worth_of(gm, worth)
    pair = ["scaled_matmul_reduce_scatter", "add_rms_norm_quantize"]
    assert [n for n in names(gm) if "scatter" in n or "norm" in n] == pair * 2
    assert set(seen) == {torch.float8_e4m3fn}
