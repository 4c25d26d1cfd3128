"""The CUDA C++ kernels run on a CPU (on_cpu.py): calls of changing size back to back, by ranks of different pace, in worlds for
which there may be no machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.emulated import regions
from tests.kernels.on_cpu import COMPILER, Machine, channels
from tpfuse.formats import dequantize
from tpfuse.kernels import arrive, product_scatter
from tpfuse.kernels.calls import NormCall
from tpfuse.kernels.cuda_norm import one_shot
from tpfuse.kernels.cuda_sharded import ShardCall, sharded
from tpfuse.kernels.operands import Rows, plain
from tpfuse.kernels.plan import REGION_HEAD
from tpfuse.kernels.regions import GATHER, SCATTER

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
SIZES = (3, 1, 0, 9, 2, 5)  # none, fewer than ranks, and more than fit one launch of two


def rows(tokens: int, hidden: int, seed: int) -> Tensor:
    """Whole numbers, whose sums are exact."""
    return torch.randint(-8, 9, (tokens, hidden), generator=torch.Generator().manual_seed(seed)).bfloat16()


def norm_of(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def numbers(out: Any, scheme: str) -> tuple[Tensor, ...]:
    """What was gathered."""
    return out.q.float() if scheme.startswith("fp8") else out.q, out.scales.float(), out.norm


def one_shots(machine: Machine, links: list[Any], hidden: int) -> list[tuple[Tensor, list[Any]]]:
    """Calls of all ranks, put down, with the sums that must come of them."""
    made, weight = [], rows(1, hidden, 99)[0]
    for n, tokens in enumerate(SIZES):
        xs, residual = [rows(tokens, hidden, 10 * n + rank) for rank in range(machine.world)], rows(tokens, hidden, 50 + n)
        outs = []
        for link, x in zip(links, xs, strict=True):
            alive = (False, False, True, True)
            call = NormCall("all_reduce_add_rms_norm", x, alive, weight, 1e-6, 0.0, "cast_first", residual=residual)
            outs.append((call, one_shot(link, call)))
        made.append((torch.stack([*xs, residual]).double().sum(0), outs))
    return made


@pytest.mark.parametrize("world", [2, 3, 5, 6, 8])
def test_one_shot(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    machine, links = Machine(monkeypatch, world, 2), channels(world, 4, 200)
    for seed in range(2):
        made = one_shots(machine, links, 200)
        machine.run(seed)
        for h, outs in made:
            for call, out in outs:
                assert torch.equal(out.reduced.double(), h.bfloat16().double())
                assert torch.equal(out.norm, outs[0][1].norm)
                torch.testing.assert_close(out.norm.double(), norm_of(h, call.weight, call.eps), rtol=1e-2, atol=1e-3)
    assert int(links[0].state[1]) == 2 * 8 and not links[0].state[4]  # launches of four rows at most; of none, none


def is_right(machine: Machine, links: list[Any], seed: int, broken: tuple[str, str]) -> bool:
    made = one_shots(machine, links, 200)
    try:
        machine.run(seed, broken, limit=2_000_000)
    except RuntimeError:
        return False
    return all(torch.equal(out.reduced.double(), h.bfloat16().double()) for h, outs in made for _, out in outs)


@pytest.mark.parametrize(
    "broken",
    [
        ("slot ^ 1", "slot"), ("i < COUNT; i++) empty", "i < 0; i++) empty"), ("missing |= is_missing", "missing &= is_missing"),
    ],
    ids=lambda broken: broken[0],
)  # fmt: skip
def test_a_broken_one_shot_is_seen(monkeypatch: pytest.MonkeyPatch, broken: tuple[str, str]) -> None:
    assert not all(is_right(Machine(monkeypatch, 3, 2), channels(3, 4, 200), seed, broken) for seed in range(20))


SHARDED = [(3, "fp8_group64", "col+tma", 200, True), (7, "", "", 72, True), (5, "nvfp4", "swizzled_128x4", 208, True),
           (6, "fp8_token", "row", 72, False)]  # fmt: skip


@pytest.mark.parametrize("world, scheme, layout, hidden, gather", SHARDED)
def test_sharded(monkeypatch: pytest.MonkeyPatch, world: int, scheme: str, layout: str, hidden: int, gather: bool) -> None:
    machine, links = Machine(monkeypatch, world, 2), channels(world, 2 * world, hidden)
    made, weight = [], rows(1, hidden, 99)[0]
    scale = torch.tensor([30.0]) if scheme == "nvfp4" else None
    for n, tokens in enumerate((*SIZES, 3 * world - 1)):
        share = -(-tokens // world)
        xs = [rows(tokens, hidden, 10 * n + rank) for rank in range(world)]
        residual = torch.cat([rows(tokens, hidden, 50 + n), torch.zeros(share * world - tokens, hidden).bfloat16()])
        outs = []
        for rank, (link, x) in enumerate(zip(links, xs, strict=True)):
            name = f"reduce_scatter_add_rms_norm{'_quantize' * bool(scheme)}{'_all_gather' * gather}"
            own = residual[rank * share : (rank + 1) * share]
            alive = (bool(scheme), bool(scheme), True, True)
            call = ShardCall(
                name, x, alive, weight, 1e-6, 0.0, "cast_first", residual=own, scale=scale, scheme=scheme, layout=layout,
                gather=gather, all_rows=gather and not scheme,
            )  # fmt: skip
            outs.append((call, own, sharded(link, call)))
        made.append((share, torch.stack([*xs, residual[:tokens]]).double().sum(0), outs))
    machine.run(1)
    for share, h, outs in made:
        norm = norm_of(h, weight, 1e-6)
        for rank, (_, _, out) in enumerate(outs):
            mine = slice(rank * share, min(len(h), (rank + 1) * share))
            count = max(0, mine.stop - mine.start)
            assert torch.equal(out.reduced[:count].double(), h[mine].bfloat16().double())
            torch.testing.assert_close(out.own_norm[:count].double(), norm[mine], rtol=1e-2, atol=1e-3)
            if gather and not scheme:
                torch.testing.assert_close(out.norm.double(), norm, rtol=1e-2, atol=1e-3)
            if scheme and len(h):
                values = dequantize(out.q, out.scales, scale, scheme, layout)
                want, bound = norm if gather else norm[mine], 0.15 if scheme == "nvfp4" else 0.05
                assert float((values[: len(want)].double() - want).norm()) <= bound * float(want.norm())
            if gather:
                first = outs[0][2]  # but for the sign of a zero, which its owner keeps
                assert all(torch.equal(a, b) for a, b in zip(numbers(out, scheme), numbers(first, scheme), strict=True))


@pytest.mark.parametrize("world", [3, 8])
def test_sum_of_partial_rows(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Of products in regions, call after call."""
    every = regions(monkeypatch, SCATTER, world, 40, 72)
    machine = Machine(monkeypatch, world, 2)
    monkeypatch.setattr(arrive, "_kernel", lambda *key: lambda *launch: None)  # copies are made at once
    for n, tokens in enumerate((3, 1, 20, 9)):
        outs, whole = [], torch.zeros(-(-tokens // world) * world, 72, dtype=torch.float64)
        for rank, region in enumerate(every):
            x, weight = rows(tokens, 4, 10 * n + rank), rows(4, 72, 60 + 10 * n + rank)
            whole[:tokens] += (x @ weight).double()
            own, product = plain(x, weight, None)
            call = product_scatter.sum_of("matmul_reduce_scatter", own, product, "tp")
            outs.append(product_scatter.chunked(region, Rows(x), product, call).reduced)
        machine.run(n)
        assert torch.equal(torch.cat(outs).double(), whole.bfloat16().double())
        assert [int(region.call) for region in every] == [n + 2] * world


@pytest.mark.parametrize("world", [3, 7])
def test_pushed_rows(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    every = regions(monkeypatch, GATHER, world, 40, 72)
    machine = Machine(monkeypatch, world, 3)
    for n, share in enumerate((2, 1, 5, 0, 3)):
        parts = [[rows(share, 72, 10 * n + rank), torch.full((share, 1), 1.0 + n + rank)] for rank in range(world)]
        for region, part in zip(every, parts, strict=True):
            arrive.push_rows(region, "all_gather_matmul", part)
        machine.run(n)
        for region in every:
            values, scales = region.gathered(region.rank, 0, share * world, parts[0])
            assert torch.equal(values, torch.cat([v for v, _ in parts])) and torch.equal(scales, torch.cat([s for _, s in parts]))
        for region in every:
            arrive.finish(region, "all_gather_matmul")
        machine.run(n)
        for region in every:
            flags = region.buffers[region.rank][:REGION_HEAD].view(torch.int32)
            peers = [rank for rank in range(world) if rank != region.rank]
            assert flags[peers].tolist() == flags[[32 + rank for rank in peers]].tolist() == [n + 1] * (world - 1)


@pytest.mark.parametrize("world, silent", [(2, 0), (5, 3)])
def test_a_silent_rank_is_named(monkeypatch: pytest.MonkeyPatch, world: int, silent: int) -> None:
    machine, links = Machine(monkeypatch, world, 2), channels(world, 4, 200, timeout=0.1)
    one_shots(machine, links, 200)
    with pytest.raises(RuntimeError, match="gave up"):
        machine.run(0, silent=silent)
    (lost,) = [lost for link in links if (lost := link.lost_peer()) is not None]
    assert (lost.operator, lost.sequence, lost.missing) == ("all_reduce_add_rms_norm", 0, silent) and lost.rank != silent
