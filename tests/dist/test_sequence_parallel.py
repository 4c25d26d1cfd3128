"""Sequence parallelism and async TP on small models: which operators come of them, and that every rank gets the model's
values at token counts that the world size does not divide.

A model is a function of (x, rows, replicated parameters, own parameters, group): x differs from rank to rank.
"""

import pytest
import torch
import torch.distributed as dist

from tests.fusion.graphs import all_gather, all_reduce, fused, names, raised, reduce_scatter, run
from tpfuse.ir import registry

pytestmark = pytest.mark.timeout(300)
HIDDEN, TOKENS = 32, 24
SP, BOTH = ("sequence_parallel",), ("sequence_parallel", "async_tp")


def norm(x, weight, weight_bias=0.0):
    return registry["rms_norm"].default(x, weight, 1e-6, weight_bias, "cast_first")


def plain(x, residual, vectors, weights, group):
    h = all_reduce(torch.relu(x), group)
    y = norm(h, vectors[0])
    h = h + all_reduce(y @ weights[0], group)
    return norm(h, vectors[1])


def batched(x, residual, vectors, weights, group):
    """[batch, seq, hidden] between products over [batch · seq, hidden]."""
    lead = [1, x.shape[0]]
    h = all_reduce(torch.relu(x).reshape(*lead, HIDDEN), group)
    y = norm(h, vectors[0]).reshape(-1, HIDDEN)
    h = h + all_reduce((y @ weights[0]).reshape(*lead, HIDDEN), group)
    return norm(h, vectors[1])


def stage(x, residual, vectors, weights, group):
    """A pipeline stage: the residual comes in and goes out."""
    y = norm(residual, vectors[0])
    h = residual + all_reduce(y @ weights[0], group)
    y = norm(h, vectors[1])
    return h + all_reduce(y @ weights[1], group)


def hidden_states(x, residual, vectors, weights, group):
    """Every layer's residual is an output too: nothing to gain."""
    h = residual + all_reduce(x, group)
    y = norm(h, vectors[0])
    h2 = h + all_reduce(y @ weights[0], group)
    return h, h2, norm(h2, vectors[1])


def some_hidden_states(x, residual, vectors, weights, group):
    """A residual that is an output too is gathered once, its norm worked out from that."""
    return hidden_states(x, residual, vectors, weights, group)[::2]


def last_token(x, residual, vectors, weights, group):
    """The final norm's last row goes to the head."""
    return plain(x, residual, vectors, weights, group)[-1:] @ weights[1]


def sandwich(x, residual, vectors, weights, group):
    h = residual + norm(all_reduce(x, group), vectors[0], 1.0)
    y = norm(h, vectors[1], 1.0)
    h = h + norm(all_reduce(y @ weights[0], group), vectors[2], 1.0)
    return norm(h, vectors[3], 1.0)


def biased(x, residual, vectors, weights, group):
    """A bias after the sum and a scaled residual."""
    h = residual + (all_reduce(x, group) + vectors[2]) * 0.22
    y = norm(h, vectors[0])
    h = h + (all_reduce(y @ weights[0], group) + vectors[3].reshape(1, -1)) * 0.22
    return norm(h, vectors[1])


def quantised(x, residual, vectors, weights, group):
    h = residual + all_reduce(x, group)
    q, scales = registry["quantize"].default(norm(h, vectors[0]), None, "fp8_group64", "col+tma")
    y = (q.float().reshape(-1, 1, HIDDEN) * scales.unsqueeze(-1)).reshape(-1, HIDDEN)
    h = h + all_reduce(y @ weights[0], group)
    return norm(h, vectors[1])


def two_consumers(x, residual, vectors, weights, group):
    """The norm quantised for one product, as it is for another."""
    h = residual + all_reduce(x, group)
    y = norm(h, vectors[0])
    q, _ = registry["quantize"].default(y, vectors[0][0] * 0.01, "fp8_tensor", "row")
    h = h + all_reduce(q.float() @ weights[0] + y @ weights[1], group)
    return norm(h, vectors[1])


def routed(x, residual, vectors, weights, group):
    """Gate and up from one gather, and the gathered norm for a router."""
    h = residual + all_reduce(x, group)
    y = norm(h, vectors[0])
    z = registry["act_and_mul"].default(y @ weights[0], y @ weights[1], "silu")
    h = h + all_reduce(z @ weights[2], group)
    return norm(h, vectors[1]), y.argmax(-1)


def by_hand(x, residual, vectors, weights, group):
    """Written with reduce-scatter and all-gather; rows must be a multiple of the world size."""
    world = dist.get_world_size()
    shard = reduce_scatter(torch.relu(x) @ weights[0], world, group)
    y = all_gather(norm(shard, vectors[0]), world, group)
    shard = shard + reduce_scatter(torch.addmm(vectors[2], y, weights[1]), world, group)
    return all_gather(norm(shard, vectors[1]), world, group)


def by_hand_batched(x, residual, vectors, weights, group):
    """As DTensor scatters the sequence of a batch of one."""
    world = dist.get_world_size()
    parts = (x @ weights[0]).reshape(world, -1, HIDDEN)
    shard = reduce_scatter(parts, world, group)
    y = all_gather(norm(shard, vectors[0]), world, group).reshape(-1, HIDDEN)
    return y @ weights[1]


def by_hand_layers(x, residual, vectors, weights, group):
    """The same with a residual that stays sharded, as [1, own rows, hidden]."""
    world = dist.get_world_size()

    def scattered(rows, weight):
        return reduce_scatter((rows @ weight).reshape(world, -1, HIDDEN), world, group)

    def gathered(rows):
        return all_gather(rows, world, group).reshape(-1, HIDDEN)

    h = scattered(x, weights[0])
    h = h + scattered(torch.relu(gathered(norm(h, vectors[0])) @ weights[1]), weights[2])
    return gathered(norm(h, vectors[1])) @ weights[0]


def by_hand_quantised(x, residual, vectors, weights, group):
    """Quantised before the gather, its largest value in the graph of all ranks."""
    world = dist.get_world_size()
    shard = reduce_scatter((x @ weights[0]).reshape(world, -1, HIDDEN), world, group)
    q, _ = registry["quantize"].default(norm(shard, vectors[0]), vectors[0][0] * 0.01, "fp8_tensor", "row")
    return all_gather(q.view(torch.uint8), world, group).reshape(-1, HIDDEN).view(torch.float8_e4m3fn).float() @ weights[1]


RS = "reduce_scatter_rms_norm_all_gather"
ARS = "reduce_scatter_add_rms_norm_all_gather"
SRS = "reduce_scatter_rms_norm_add_rms_norm_all_gather"
MARS = "matmul_reduce_scatter_add_rms_norm"
EXPECTED = {
    (plain, SP): [RS, "matmul", ARS],
    (plain, BOTH): [RS, MARS, "all_gather"],
    (batched, SP): [RS, "matmul", ARS],
    (stage, SP): ["rms_norm", "matmul", "shard_rows", ARS, "matmul", "reduce_scatter", "all_gather"],
    (hidden_states, ("all_reduce_norm", *SP)): ["all_reduce_add_rms_norm", "matmul", "all_reduce_add_rms_norm"],
    (some_hidden_states, SP): ["reduce_scatter", "shard_rows", "all_gather", "rms_norm", "matmul", ARS],
    (last_token, BOTH): [RS, MARS, "all_gather", "matmul"],
    (sandwich, SP): ["shard_rows", SRS, "matmul", SRS],
    (biased, SP): ["shard_rows", ARS, "matmul", ARS],
    (quantised, SP): ["shard_rows", "reduce_scatter_add_rms_norm_quantize_all_gather", "matmul", ARS],
    (two_consumers, SP): ["shard_rows", ARS, "quantize", "matmul", "matmul", ARS],
    (routed, BOTH): ["shard_rows", "reduce_scatter_add_rms_norm", "all_gather_matmul", "act_and_mul",
                     MARS, "all_gather"],
    (by_hand, ("async_tp",)): ["matmul_reduce_scatter_rms_norm", "all_gather", MARS, "all_gather"],
    (by_hand_batched, ("async_tp",)): ["matmul_reduce_scatter_rms_norm", "all_gather_matmul"],
    (by_hand_layers, ("async_tp",)): [
        "matmul_reduce_scatter_rms_norm", "all_gather_matmul", MARS, "all_gather_matmul",
    ],
    (by_hand_quantised, ("async_tp",)): ["matmul_reduce_scatter_rms_norm_quantize", "all_gather", "matmul"],
}  # fmt: skip
CASES = {f"{model.__name__}-{'+'.join(passes)}": (model, passes) for model, passes in EXPECTED}


def parameters(rank):
    alike, own = torch.Generator().manual_seed(5), torch.Generator().manual_seed(50 + rank)
    vectors = [torch.rand(HIDDEN, generator=alike) * 2.75 + 0.25 for _ in range(4)]
    return vectors, [torch.randn(HIDDEN, HIDDEN, generator=own) * 1e-3 for _ in range(3)]


def inputs(rank, tokens):
    own, alike = torch.Generator().manual_seed(9 * tokens + rank), torch.Generator().manual_seed(tokens)
    x, residual = (torch.randn(tokens, HIDDEN, generator=g) * 3e-3 for g in (own, alike))
    vectors, weights = parameters(rank)
    return [x, residual, *vectors, *weights]


def compare(rank, world, case):
    """The fused graph's operators, and where its values are not the raised graph's."""
    model, passes = CASES[case]
    group = dist.group.WORLD.group_name

    def flat(x, residual, *rest):
        return model(x, residual, rest[:4], rest[4:], group)

    before, after = (raised(flat, inputs(rank, TOKENS), TOKENS) for _ in range(2))
    fused(after, passes)
    wrong = []
    for tokens in (TOKENS, 12) if model.__name__.startswith("by_hand") else (TOKENS, 1, 2, 7, 29):
        want, got = (run(gm, inputs(rank, tokens)) for gm in (before, after))
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            close = a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=2e-5, atol=2e-5 * a.abs().max().item())
            wrong += [] if close else [(tokens, i, tuple(a.shape), tuple(b.shape))]
    return names(after), wrong


@pytest.mark.parametrize("case", CASES)
def test_models(ranks, case):
    for operators, wrong in ranks.run(compare, case):
        assert operators == EXPECTED[CASES[case]]
        assert wrong == []
