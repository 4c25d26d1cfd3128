"""Products beside collectives: what fuses, what is left and why.  Graphs of a group of two."""

import torch

from tests.fusion.graphs import all_gather, all_reduce, fired, fused, names, raised, reasons, reduce_scatter
from tpfuse.ir import registry
from tpfuse.ir.matmul import scaled_sample

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
    assert [n for n in names(gm) if "matmul" in n] == ["all_gather_matmul", "matmul_reduce_scatter"]
    assert only(gm, "matmul_reduce_scatter")["padded"] is True
    assert reasons(events, "matmul_reduce_scatter") == ["one_side"]
    assert reasons(events, "all_gather_matmul") == ["one_side"]
