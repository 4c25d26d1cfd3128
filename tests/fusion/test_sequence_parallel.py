"""Which residual chains become sequence-parallel, which must not, and what the report says.  Graphs of a group of two."""

import pytest
import torch

from tests.fusion.graphs import all_gather, all_reduce, fired, fused, names, raised, reasons
from tpfuse.ir import registry
from tpfuse.report import Decline
from tpfuse.rewrite.order import ORDER, is_collective

SP = ("sequence_parallel",)
HIDDEN, TOKENS = 32, 24
VECTOR, WEIGHT = torch.rand(HIDDEN), torch.randn(HIDDEN, HIDDEN)


def rows(*lead):
    return torch.randn(*(lead or (TOKENS,)), HIDDEN)


def norm(x, weight, weight_bias=0.0):
    return registry["rms_norm"].default(x, weight, 1e-6, weight_bias, "cast_first")


def chain(group):
    def model(x, residual, w, m):
        h = residual + all_reduce(x, group)
        h = h + all_reduce(norm(h, w) @ m, group)
        return norm(h, w)

    return model


def graph(fn, *args, tokens=TOKENS):
    return raised(fn, args, tokens)


ARGS = (rows(), rows(), VECTOR, WEIGHT)


def test_a_chain_is_rewritten_as_a_whole(group):
    gm = graph(chain(group), *ARGS)
    (event, *_) = fused(gm, SP)
    assert (event.rule, event.status, event.attributes) == ("sequence_parallel", "fired", {"all_reduces": 2, "gathers": 2})
    assert "all_reduce" not in names(gm)
    assert names(gm) == [
        "shard_rows", "reduce_scatter_add_rms_norm_all_gather", "matmul", "reduce_scatter_add_rms_norm_all_gather"
    ]  # fmt: skip


def test_shards_have_as_many_rows_on_every_rank(group):
    gm = graph(chain(group), *ARGS)
    fused(gm, SP)
    (own,) = [n for n in gm.graph.nodes if n.target is registry["shard_rows"].default]
    tokens = gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    assert own.meta["val"].shape[0] == (tokens + 1) // 2
    # Right for every token count, but that a single own row is compiled on its own.
    assert {str(g.expr) for g in tokens.node.shape_env.guards} <= {f"Ne((({tokens} + 1)//2), 1)"}


def test_one_row_of_a_width_that_is_a_symbol(group):
    """What is the same for all rows is taken by its width, which a node computes."""
    gm = graph(chain(group), rows(1), rows(1), VECTOR, WEIGHT, tokens=HIDDEN)
    assert isinstance(gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1], torch.SymInt)
    fused(gm, SP)
    assert "reduce_scatter" in " ".join(names(gm))
    given: list[object] = []
    for node in gm.graph.nodes:
        torch.fx.node.map_aggregate((node.args, node.kwargs), given.append)
    assert not any(isinstance(value, torch.SymInt) for value in given)


def test_the_policy_decides_before_anything_is_rewritten(group):
    gm, seen = graph(chain(group), *ARGS), []

    def policy(found):
        seen.append((found.world, found.hidden, found.dtype, found.reduced_bytes, found.gathered_bytes))
        return Decline("threshold", "too few")

    events = fused(gm, ("all_reduce_norm", *SP), policy)
    assert seen == [(2, HIDDEN, torch.float32, 8 * HIDDEN, 8 * HIDDEN)]
    assert reasons(events, "sequence_parallel") == ["threshold"]
    assert names(gm) == ["all_reduce_add_rms_norm", "matmul", "all_reduce_add_rms_norm"]


def test_sequence_parallelism_wins_a_site(group):
    gm = graph(chain(group), *ARGS)
    events = fused(gm, ("all_reduce_norm", "all_reduce_norm_quantize", "norm_quantize", *SP))
    assert set(fired(events)) == {"sequence_parallel", "reduce_scatter_add_rms_norm_all_gather"}


def test_collectives_keep_their_order(group):
    gm = graph(chain(group), *ARGS)
    fused(gm, ("sequence_parallel", "async_tp"))
    numbers = [n.meta[ORDER] for n in gm.graph.nodes if is_collective(n)]
    assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)


def test_batch_and_sequence(group):
    """[batch, seq, hidden], both sizes unknown: rows are their product."""

    def model(x, w, m):
        h = all_reduce(torch.relu(x), group)
        y = norm(h, w)
        h = h + all_reduce((y.reshape(-1, HIDDEN) @ m).reshape(x.shape), group)
        return norm(h, w)

    gm = graph(model, rows(5, TOKENS), VECTOR, WEIGHT)
    fused(gm, SP)
    assert names(gm) == ["reduce_scatter_rms_norm_all_gather", "matmul", "reduce_scatter_add_rms_norm_all_gather"]
    (out,) = gm.graph.find_nodes(op="output")[0].args[0]
    assert len(out.meta["val"].shape) == 3


def quantised(scheme, layout, group):
    def model(x, residual, w, m):
        h = residual + all_reduce(x, group)
        scale = w[0] if scheme in ("fp8_tensor", "nvfp4") else None
        q, scales = registry["quantize"].default(norm(h, w), scale, scheme, layout)
        return q.view(torch.uint8), scales

    return model


@pytest.mark.parametrize(
    ("scheme", "layout", "token_bytes"),
    [
        ("fp8_tensor", "row", 256), ("fp8_token", "row", 256 + 4), ("fp8_group128", "col+tma", 256 + 8),
        ("fp8_group64", "row", 256 + 16), ("nvfp4", "swizzled_128x4", 128 + 16),
    ],
)  # fmt: skip
def test_rows_are_quantised_before_the_gather(group, scheme, layout, token_bytes):
    seen = []
    gm = graph(quantised(scheme, layout, group), rows().repeat(1, 8), rows().repeat(1, 8), VECTOR.repeat(8), WEIGHT)
    fused(gm, SP, lambda found: seen.append((found.reduced_bytes, found.gathered_bytes)))
    assert seen == [(1024, token_bytes)]
    assert names(gm) == ["shard_rows", "reduce_scatter_add_rms_norm_quantize_all_gather"]


def test_a_scale_of_all_tokens_waits_for_the_gather(group):
    """The norm is gathered once, for its largest value and for the quantise that is scaled by it."""

    def model(x, residual, w, m):
        y = norm(residual + all_reduce(x, group), w)
        return registry["quantize"].default(y, y.abs().amax() / 448, "fp8_tensor", "row")[0]

    gm = graph(model, *ARGS)
    events = fused(gm, SP)
    assert [e.attributes["gathers"] for e in events if e.rule == "sequence_parallel"] == [1]
    assert names(gm) == ["shard_rows", "reduce_scatter_add_rms_norm_all_gather", "quantize"]


def test_gemma_everywhere(group):
    def model(x, residual, w, m):
        h = residual + norm(all_reduce(x, group), w, 1.0)
        q, _ = registry["quantize"].default(norm(h, w, 1.0), w[0], "fp8_tensor", "row")
        h = h + all_reduce(q.float() @ m, group)
        return norm(h, w, 1.0)

    gm = graph(model, *ARGS)
    events = fused(gm, ("norm_quantize", *SP))
    sites = {e.rule: e.attributes["weight_bias"] for e in events if "weight_bias" in e.attributes}
    quantised = "reduce_scatter_rms_norm_add_rms_norm_quantize_all_gather"
    assert sites == {quantised: 1.0, "reduce_scatter_add_rms_norm_all_gather": 1.0}


def test_an_embedding_over_the_vocabulary(group):
    """A partial lookup is summed like everything else; a whole one is cut to own rows."""

    def model(ids, other, w, table):
        h = all_reduce(torch.nn.functional.embedding(ids, table), group) + torch.nn.functional.embedding(other, table)
        return norm(h, w)

    ids = torch.zeros(TOKENS, dtype=torch.int64)
    gm = graph(model, ids, ids, VECTOR, WEIGHT)
    fused(gm, SP)
    assert sorted(names(gm)) == ["reduce_scatter_add_rms_norm_all_gather", "shard_rows"]


def refused(fn, *args, passes=("all_reduce_norm", *SP)):
    gm = graph(fn, *args)
    events = fused(gm, passes)
    assert "sequence_parallel" not in fired(events)
    assert not [n for n in names(gm) if "scatter" in n or "shard" in n]
    return events


def test_a_residual_that_differs_from_rank_to_rank(group):
    """What a product with a rank's own weight gives must never be cut into rows."""
    refused(lambda x, y, w, m: norm(all_reduce(x, group) + y @ m, w), *ARGS)


def test_a_number_that_differs_from_rank_to_rank(group):
    refused(lambda x, y, w, m: norm(all_reduce(x, group) + (y @ m).argmax().item(), w), *ARGS)


def test_a_norm_over_the_rows(group):
    refused(lambda x, w, m: norm(all_reduce(x, group).t().contiguous(), w[:TOKENS]), rows(), torch.rand(TOKENS), WEIGHT)


def test_a_residual_with_one_row_for_all_batches(group):
    """Broadcast along the batch, its rows are not the tokens."""
    refused(lambda x, y, w: norm(all_reduce(x, group) + y, w), rows(5, TOKENS), rows(5, 1), VECTOR)


def test_a_sum_that_nothing_follows(group):
    assert reasons(refused(lambda x, m: all_reduce(x, group) @ m, rows(), WEIGHT), "sequence_parallel") == []


def test_a_random_operator_is_not_the_same_on_every_rank(group):
    refused(lambda x, w: norm(all_reduce(x, group) + torch.rand_like(x), w), rows(), VECTOR)


def test_a_residual_that_everybody_needs_whole(group):
    def model(x, residual, w, m):
        h = residual + all_reduce(x, group)
        return norm(h, w), h

    assert reasons(refused(model, *ARGS), "sequence_parallel") == ["no_norm"]


def test_results_that_lie_in_memory_by_columns(group):
    """A residual that lies so gives its strides to what it is added to; gathered rows have their own."""

    def model(x, residual, w, m):
        h = residual.t().contiguous().t() + all_reduce(x, group)
        h = h + all_reduce(norm(h, w) @ m, group)
        return norm(h, w), h

    gm = graph(model, *ARGS)
    before = [n.meta["val"].stride() for n in gm.graph.find_nodes(op="output")[0].args[0]]
    events = fused(gm, ("all_reduce_norm", *SP))
    assert [n.meta["val"].stride() for n in gm.graph.find_nodes(op="output")[0].args[0]] == before
    assert "strides" in reasons(events, "sequence_parallel")


def test_more_gathers_than_sums(group):
    """Two norms of one residual, neither from the other, would both be gathered."""

    def model(x, residual, w, m):
        h = residual + all_reduce(x, group)
        return norm(h, w), norm(h, w + 1)

    assert reasons(refused(model, *ARGS), "sequence_parallel") == ["more_gathers"]


def test_a_group_of_one_rank(group):
    import torch.distributed as dist

    alone = dist.new_group([0]).group_name
    refused(lambda x, w: norm(all_reduce(x, alone), w), rows(), VECTOR, passes=SP)


def test_two_groups_are_two_chains(group):
    """A sum over other ranks ends a chain: its rows are shared out among others."""
    import torch.distributed as dist

    other = dist.new_group([0, 1]).group_name

    def model(x, residual, w, m):
        h = residual + all_reduce(x, group)
        y = norm(h, w)
        return norm(y @ m + all_reduce(x + 1, other), w), norm(all_reduce(x + 2, other), w)

    gm = graph(model, *ARGS)
    events = fused(gm, SP)
    assert [e.attributes for e in events if e.rule == "sequence_parallel"] == [{"all_reduces": 1, "gathers": 1}] * 2
    groups = [n.args[-1] for n in gm.graph.nodes if is_collective(n) and "norm" in str(n.target)]
    assert groups == [group, other]


def test_gathered_values_count_as_the_same_on_every_rank(group):
    """A residual gathered by hand may be cut again."""
    gm = graph(lambda x, y, w: norm(all_reduce(x, group) + all_gather(y, 2, group), w), rows(48), rows(24), VECTOR, tokens=48)
    fused(gm, SP)
    assert "shard_rows" in names(gm)


def test_fuel_takes_a_chain_or_leaves_it(group):
    from tpfuse.fusion import fuse

    gm = graph(chain(group), *ARGS)
    fuse(gm.graph, SP, fuel=lambda: False)
    assert not [n for n in names(gm) if "scatter" in n]
