"""Which rows of a product next to a collective go where; the kernels' part in Python (emulated.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.emulated import regions
from tpfuse import formats
from tpfuse.formats.layouts import apply_layout, groups_of, remove_layout
from tpfuse.ir import collective, overlap
from tpfuse.ir.chained import Chained
from tpfuse.ir.matmul import scaled_matmul, scaled_sample
from tpfuse.kernels import operands, product_gather, product_scatter, products
from tpfuse.kernels.cuda_sharded import ShardCall
from tpfuse.kernels.operands import Product, Rows, plain
from tpfuse.kernels.plan import REGION_BYTES, REGION_HEAD, RegionLayout, share_of, turns
from tpfuse.kernels.regions import GATHER, SCATTER
from tpfuse.report import FusionError


def rows(count: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    return plain(weight, weight, bias)[1]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).norm()) <= 8e-3 * float(want.norm())


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("max_tokens", [40, 2])  # in one turn, and in several
@pytest.mark.parametrize("tokens", [1, 7, 24, 33])
def test_scatter(monkeypatch: Any, world: int, max_tokens: int, tokens: int) -> None:
    every, share = regions(monkeypatch, SCATTER, world, max_tokens, 32), -(-tokens // world)
    xs = [rows(tokens, 48, rank) for rank in range(world)]
    products = [product(rows(48, 32, 10 + rank), rows(1, 32, 20)[0] if rank == 1 else None) for rank in range(world)]
    whole = sum(x.double() @ p.weight.values.double() for x, p in zip(xs, products, strict=True)) + rows(1, 32, 20).double()
    whole = torch.cat([whole, whole.new_zeros(share * world - tokens, 32)])
    parts: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for turn in turns(share, every[0].layout.rows(64)):  # everybody's rows of a turn must be there: only turns can be emulated
        monkeypatch.setattr(product_scatter, "turns", lambda share, fitting, turn=turn: [turn])
        for _ in range(2):
            outs = [
                product_scatter.chunked(
                    region, Rows(x), own, product_scatter.sum_of("matmul_reduce_scatter", Rows(x), own, "tp")
                ).reduced
                for region, x, own in zip(every, xs, products, strict=True)
            ]  # fmt: skip
        for part, out in zip(parts, outs, strict=True):
            part.append(out[slice(*turn)])
    for rank, part in enumerate(parts):
        close(torch.cat(part), whole[rank * share : (rank + 1) * share])


@pytest.mark.parametrize("algorithm", ["chunked", "push"])
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 7, 24, 33])
@pytest.mark.parametrize("keep", [False, True])
def test_gather(monkeypatch: Any, algorithm: str, world: int, tokens: int, keep: bool) -> None:
    every, share = regions(monkeypatch, GATHER, world, 40, 48), -(-tokens // world)
    parts = [rows(share, 48, rank) for rank in range(world)]
    whole = torch.cat(parts)[:tokens]
    weights = [product(rows(48, 32, 11)), product(rows(48, 8, 12), rows(1, 8, 13)[0])]
    for _ in range(2):
        outs = [
            getattr(product_gather, algorithm)(region, "all_gather_matmul", Rows(part), weights, tokens, keep)
            for region, part in zip(every, parts, strict=True)
        ]  # fmt: skip
    for out in outs:
        close(out[0], whole.double() @ weights[0].weight.values.double())
        close(out[1], whole.double() @ weights[1].weight.values.double() + rows(1, 8, 13).double())
        assert len(out) == 2 + keep
        if keep:
            assert torch.equal(out[2], whole)
            for region in every:  # a copy, not a view of what the next call overwrites
                low, high = region.buffers[region.rank].data_ptr(), region.buffers[region.rank].numel()
                assert not low <= out[2].data_ptr() < low + high


SCHEMES = [
    ("fp8_tensor", "row"), ("fp8_token", "row"), ("fp8_group128", "row"), ("fp8_group128", "col+tma"), ("fp8_group64", "col"),
    ("nvfp4", "linear"), ("nvfp4", "swizzled_128x4"), ("nvfp4", "swizzled_8x4"),
]  # fmt: skip


def by_body(out: torch.Tensor, x: torch.Tensor, weight: Any, x_scale: torch.Tensor, how: Any) -> None:
    """`products.multiply`, by the operator's body."""
    out.copy_(
        scaled_matmul.reference(
            x, weight.values, x_scale, weight.scale, weight.bias, weight.result_scale, weight.alpha, how.scheme, how.layout,
            how.weight_layout, "bfloat16", how.fast_accum, "",
        )
    )  # fmt: skip


def quantised_sample(scheme: str, layout: str, tokens: int, rank: int, seed: int) -> list[Any]:
    """`scaled_matmul`'s arguments: rows of a rank, the seed's weight; a factor that keeps the result from underflow."""
    sample = scaled_sample(scheme=scheme, layout=layout, tokens=tokens, hidden=256, width=32, rank=rank, seed=seed)
    return [sample[name] for name in scaled_matmul.params]


@pytest.mark.parametrize("scheme, layout", SCHEMES)
@pytest.mark.parametrize("tokens, max_tokens", [(1, 600), (9, 600), (256, 600), (300, 600), (300, 40)])
def test_scattered_products_of_quantised_rows(
    monkeypatch: Any, scheme: str, layout: str, tokens: int, max_tokens: int
) -> None:  # fmt: skip
    monkeypatch.setattr(operands, "multiply", by_body)
    every, share, world = regions(monkeypatch, SCATTER, 2, max_tokens, 32), -(-tokens // 2), 2
    given = [quantised_sample(scheme, layout, tokens, rank, 3 + rank) for rank in range(world)]
    whole = torch.stack([scaled_matmul.reference(*args).double() for args in given]).sum(0)
    assert float(whole.norm()) > 0
    whole = torch.cat([whole, whole.new_zeros(share * world - tokens, 32)])
    parts: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for turn in turns(share, every[0].layout.rows(64)):
        monkeypatch.setattr(product_scatter, "turns", lambda share, fitting, turn=turn: [turn])
        for _ in range(2):
            outs = []
            for region, args in zip(every, given, strict=True):
                own, by = operands.operands(args)
                call = product_scatter.sum_of("scaled_matmul_reduce_scatter", own, by, "tp")
                outs.append(product_scatter.chunked(region, own, by, call).reduced)
        for part, out in zip(parts, outs, strict=True):
            part.append(out[slice(*turn)])
    for rank, part in enumerate(parts):
        close(torch.cat(part), whole[rank * share : (rank + 1) * share])


@pytest.mark.parametrize("scheme, layout", SCHEMES)
@pytest.mark.parametrize("algorithm", ["chunked", "push"])
@pytest.mark.parametrize("tokens", [1, 9, 256, 300])
def test_gathered_products_of_quantised_rows(
    monkeypatch: Any, scheme: str, layout: str, algorithm: str, tokens: int
) -> None:  # fmt: skip
    monkeypatch.setattr(operands, "multiply", by_body)
    world, share = 2, -(-tokens // 2)
    every = regions(monkeypatch, GATHER, world, 300, 128)
    monkeypatch.setattr(product_gather, "region_of", lambda kind, group: every[int(group)])
    given = [quantised_sample(scheme, layout, share, rank, 3) for rank in range(world)]
    given[1] = [*given[1][:1], given[0][1], given[0 if scheme == "fp8_tensor" else 1][2], *given[0][3:]]  # other rows alone
    want = torch.cat([scaled_matmul.reference(*args).double() for args in given])[:tokens]
    launch = getattr(product_gather, f"{algorithm}_all_gather_scaled_matmul")
    outs: list[Any] = []
    for _ in range(2):
        outs.clear()
        for rank, (x, weight, x_scale, *lists, scheme, layout, weight_layout, dtype, fast, origin) in enumerate(given):
            each = [[value] for value in (weight, *lists)]
            how = scheme, layout, weight_layout, dtype, fast, origin
            outs.append(launch(x, x_scale, *each, *how, tokens, True, str(rank), alive=(True,)))
    kept = torch.cat([args[0].view(torch.uint8) for args in given])[:tokens]
    for out in outs:
        close(out[0], want)
        assert torch.equal(out[1].view(torch.uint8), kept)
        if scheme == "fp8_tensor":
            assert len(out) == 2
            continue
        groups = groups_of(256, formats.Scheme.parse(scheme))
        wanted = apply_layout(torch.cat([remove_layout(args[2], share, groups, layout) for args in given])[:tokens], layout)
        assert out[2].stride() == wanted.stride() and torch.equal(out[2].float(), wanted.float())


def test_more_rows_than_the_region_holds_go_in_turns(monkeypatch: Any) -> None:
    every = regions(monkeypatch, GATHER, 2, 8, 48)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(product_gather, "_turn", lambda *args: seen.append(args[-2:]))
    x, fitting = rows(50, 48, 0), every[0].layout.rows(96)
    for algorithm in (product_gather.chunked, product_gather.push):
        seen.clear()
        algorithm(every[0], "all_gather_matmul", Rows(x), [product(rows(48, 8, 1))], 100, False)
        assert fitting < 50 and seen == turns(50, fitting) and seen[-1][1] == 50


def test_rows_that_are_too_wide_are_an_error(monkeypatch: Any) -> None:
    wide, own = rows(4, 4096, 0), product(rows(16, 4096, 1))
    region = regions(monkeypatch, GATHER, 2, 1, 48)[0]
    with pytest.raises(FusionError, match="prepare the group with hidden=4096"):
        product_gather.push(region, "all_gather_matmul", Rows(wide), [own], 8, False)
    region = regions(monkeypatch, SCATTER, 2, 1, 48)[0]
    call = product_scatter.sum_of("matmul_reduce_scatter", Rows(wide[:, :16]), own, "tp")
    with pytest.raises(FusionError, match="prepare the group with hidden=4096"):
        product_scatter.chunked(region, Rows(wide[:, :16]), own, call)


@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("tokens, hidden, itemsize", [(1, 8, 2), (7, 200, 2), (8192, 8192, 2), (8192, 8192, 1), (10**9, 9000, 2)])
def test_a_region_holds_what_it_was_made_for(world: int, tokens: int, hidden: int, itemsize: int) -> None:
    scatter, gather = (RegionLayout.of(world, tokens, hidden, itemsize, scales) for scales in (False, True))
    for layout in (scatter, gather):
        assert layout.part % 128 == 0 and layout.scales % 128 == 0 and layout.scales_offset == REGION_HEAD + world * layout.part
        assert layout.total == layout.scales_offset + world * layout.scales
        assert world * layout.part <= REGION_BYTES + world * (128 + hidden * itemsize)
    share = -(-tokens // world)
    if share * world * hidden * itemsize <= REGION_BYTES:
        assert scatter.rows(hidden * itemsize) >= share and gather.rows(hidden * itemsize, 4 * -(-hidden // 64)) >= share
    assert scatter.rows(hidden * itemsize) >= 1 and scatter.rows(2 * scatter.part) == 0


@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 9, 64, 129])
@pytest.mark.parametrize("fitting", [1, 3, 1000])
def test_every_row_has_one_turn_of_one_rank(world: int, tokens: int, fitting: int) -> None:
    share, seen = -(-tokens // world), []
    for first, end in turns(share, fitting):
        assert 0 < end - first <= fitting
        for rank in range(world):
            begin, stop = share_of(rank, share, tokens, first, end)
            assert stop - begin <= end - first
            seen += range(begin, stop)
    assert sorted(seen) == list(range(tokens))


@pytest.mark.parametrize("op", overlap.WITH_NORM, ids=lambda op: op.name)
def test_what_follows_a_product_is_its_call(monkeypatch: Any, op: Chained) -> None:
    monkeypatch.setattr(collective, "world_size", lambda group: 1)
    args = op.sample(tokens=6, hidden=64, dtype=torch.bfloat16, group="")
    values = [args[name] for name in op.params]
    own, by, call = product_scatter._call_of(op.name, values, (True,) * op.results)
    assert call.operator == op.name and call.sandwich == ("weight2" in op.params) and own.values is args["x"]
    assert call.x.shape == (6, 64) and call.x.dtype == by.dtype == torch.bfloat16 and by.weight.values is args["w"]
    for name, value in op.after(args).items():  # as the operator behind the product gets it
        if name in ShardCall.__dataclass_fields__ and name != "x":
            assert getattr(call, name) is value or getattr(call, name) == value, name
    outputs = call.shard_outputs(1)
    results = (outputs.q, outputs.scales, outputs.own_norm, outputs.reduced)[-op.results :]
    assert [(r.shape, r.dtype) for r in results] == [(r.shape, r.dtype) for r in op.then.fake(*op.after(args).values())]


@pytest.mark.parametrize(("k", "n", "copied"), [(1024, 256, False), (512, 384, False), (640, 256, True)])
def test_scales_of_blocks_are_read_where_they_lie(k: int, n: int, copied: bool) -> None:
    """As checkpoints store them, of a multiple of 512 columns; what is copied holds them, and zeros."""
    stored = torch.arange(1.0, 1 + (n // 128) * (k // 128)).view(n // 128, k // 128)
    for scale in (stored.t(), stored.t().contiguous()):
        got = products._by_columns(scale, k)
        assert got.stride() == (1, -(-k // 512) * 4) and got.shape[1] == n // 128
        assert torch.equal(got[: k // 128], stored.t()) and not got[k // 128 :].any()
        assert (got.data_ptr() != scale.data_ptr()) == (copied or scale.is_contiguous())
