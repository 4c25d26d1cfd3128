"""The chain model on real ranks: all-reduce + norm in the small range, sequence-parallel with every product fused in the
large one, right at every token count."""

import contextlib

import pytest
import torch
import torch.distributed as dist

import tpfuse
from tests.dist.chain import SCHEMES, Chain
from tpfuse import testing
from tpfuse.lowering.table import Entry, Table

PATIENCE = 300  # seconds: each call compiles several graphs on every rank
pytestmark = pytest.mark.timeout(2 * PATIENCE)
SMALL = ("all_reduce_norm", "all_reduce_norm_quantize", "norm_quantize")
LARGE = ("sequence_parallel", "async_tp", "norm_quantize")
BOTH = {"ranges": {32: {"passes": SMALL}, 4096: {"passes": LARGE}}, "max_tokens": 4096}
ALWAYS = {"passes": LARGE}


def run(rank, world, scheme, dtype, hidden, inner, options, tokens, inductor=False):
    """For each token count the output's bytes, its error against FP64 and that of the unfused model; the report by range."""
    model = Chain(dist.group.WORLD.group_name, rank, scheme, dtype, hidden, inner)
    rows = []
    with contextlib.nullcontext() if inductor else testing.interpreted(), torch.no_grad():
        fused = tpfuse.compile(model, tpfuse.Config(**options), fullgraph=True, dynamic=True)
        for count in tokens:
            x = (torch.randn(count, hidden, generator=torch.Generator().manual_seed(100 * count + rank)) * 3e-3).to(dtype)
            got, unfused, true = fused(x), model(x), model.true(x)
            errors = [((v.double() - true).norm() / true.norm()).item() for v in (got, unfused)]
            rows.append((count, got.contiguous().view(torch.uint8).numpy().tobytes(), *errors))
    ranges = {(r.range.start, r.range.end): r for r in fused.report.results}
    fired = {k: [(e.rule, dict(e.attributes)) for e in r.events if e.status == "fired"] for k, r in ranges.items()}
    return rows, {k: r.ops for k, r in ranges.items()}, fired


def right(results):
    for rank, (rows, _, _) in enumerate(results):
        for (count, data, error, unfused), (_, first, _, _) in zip(rows, results[0][0], strict=True):
            assert data == first, f"rank {rank} differs from rank 0 at {count} tokens"
            assert error <= 1.25 * unfused, f"{count} tokens: error {error:.3g}, unfused {unfused:.3g}"
            assert unfused < 0.2  # the oracle is the same model


def all_reduce_and_norm(ops, scheme):
    sites = [name for name in ops if "norm" in name]
    assert len(sites) == 4 and all(name.startswith("all_reduce") for name in sites), ops
    assert "all_reduce" not in ops
    assert sum(name.endswith("quantize") for name in sites) == (0 if scheme in ("plain", "gemma") else 3)


def sequence_parallel(ops, fired, scheme, inner):
    assert not [name for name in ops if name.startswith("all_reduce")], ops
    (chain,) = [attributes for rule, attributes in fired if rule == "sequence_parallel"]
    assert chain == {"all_reduces": 4, "gathers": 4}
    products = sum(a.get("products", 1) for rule, a in fired if "matmul" in rule)
    assert products == (6 if inner else 3), fired
    scaled = [rule for rule, _ in fired if "scaled_matmul" in rule]
    assert bool(scaled) == (scheme not in ("plain", "gemma"))
    sites = [name for name in ops if "norm" in name]  # the first sum has no product, the others follow theirs
    assert ["matmul_reduce_scatter_add_rms_norm" in name for name in sites] == [False, True, True, True], ops
    assert sum("quantize" in name for name in sites) == (0 if scheme in ("plain", "gemma") else 3)
    if scheme == "gemma":
        assert [a["weight_bias"] for _, a in fired if "weight_bias" in a] == [1.0] * 4


def check(ranks, scheme, dtype, hidden, inner):
    results = ranks.run(run, scheme, dtype, hidden, inner, BOTH, (24, 129, 7), timeout=PATIENCE)
    right(results)
    _, ops, fired = results[0]
    assert set(ops) == {(1, 32), (33, 4096)}
    all_reduce_and_norm(ops[1, 32], scheme)
    sequence_parallel(ops[33, 4096], fired[33, 4096], scheme, inner)


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_ranks(ranks, scheme):
    check(ranks, scheme, torch.bfloat16, 64, 0)


@pytest.mark.parametrize("ranks", [3], indirect=True)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_three_ranks(ranks, scheme):
    check(ranks, scheme, torch.float16, 16, 128)


@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_four_ranks(ranks, scheme):
    check(ranks, scheme, torch.float16 if scheme == "gemma" else torch.bfloat16, 128, 16)


@pytest.mark.parametrize("scheme", ["fp8_group128"])
def test_few_tokens(ranks, scheme):
    """Fewer tokens than ranks, and one, whose graph is static."""
    results = ranks.run(run, scheme, torch.bfloat16, 64, 0, ALWAYS, (7, 2, 1), timeout=PATIENCE)
    right(results)
    _, ops, fired = results[0]
    assert len(ops) == 2
    for limits in ops:
        sequence_parallel(ops[limits], fired[limits], scheme, 0)


@pytest.mark.parametrize("ranks", [3], indirect=True)
@pytest.mark.parametrize("scheme", ["fp8_token"])
def test_inductor(ranks, scheme):
    results = ranks.run(run, scheme, torch.bfloat16, 64, 128, BOTH, (24, 129, 40), True, timeout=PATIENCE)
    right(results)
    _, ops, fired = results[0]
    sequence_parallel(ops[33, 4096], fired[33, 4096], scheme, 128)


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("scheme", ["plain", "fp8_token"])
def test_a_table_decides(ranks, scheme, tmp_path):
    """Thresholds in bytes cut the ranges (4 KiB are 32 tokens of 64 in bf16) and say which form each takes: all-reduces, own rows
    between, products with their collectives."""
    name = "" if scheme == "plain" else scheme
    forms = [Entry("sequence_parallel", "bfloat16", 2, ((4096, "off"), (None, "on")), name),
             Entry("async_tp", "bfloat16", 2, ((12288, "off"), (None, "on")), name)]  # fmt: skip
    Table("cpu", {}, tuple(forms)).save(tmp_path / "table.json")
    results = ranks.run(run, scheme, torch.bfloat16, 64, 0, {"table": str(tmp_path / "table.json")}, (24, 77, 129), timeout=PATIENCE)
    right(results)
    _, ops, fired = results[0]
    small, middle, large = sorted(ops)
    assert (small, middle, large[0]) == ((1, 32), (33, 96), 97)
    all_reduce_and_norm(ops[small], scheme)
    assert not [op for op in ops[middle] if "matmul_" in op or "_matmul" in op or op.startswith("all_reduce")], ops[middle]
    assert sum("reduce_scatter" in op for op in ops[middle]) == 4
    sequence_parallel(ops[large], fired[large], scheme, 0)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_without_a_table_there_is_one_range(ranks):
    results = ranks.run(run, "plain", torch.bfloat16, 64, 0, {}, (24, 129), timeout=PATIENCE)
    right(results)
    (operators,) = results[0][1].values()
    all_reduce_and_norm(operators, "plain")
