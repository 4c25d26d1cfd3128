"""Launch plans and workspace layouts, without a device."""

from __future__ import annotations

import pytest

from tpfuse.kernels.cuda_norm import BlockPlan
from tpfuse.kernels.plan import (
    ALIGNMENT,
    MAX_HIDDEN,
    ONE_SHOT_BYTES,
    THREADS_PER_SM,
    TWO_SHOT_BYTES,
    ChannelLayout,
    RowPlan,
    algorithm_of,
    resident_blocks,
)

WORLDS = range(2, 9)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("hidden", [8, 48, 512, 4096, 5120, 8192, 12288, MAX_HIDDEN])
def test_a_row_is_covered(hidden: int, itemsize: int) -> None:
    plan = RowPlan.of(hidden, itemsize)
    assert plan.block >= max(hidden, 512) and plan.block < 2 * max(hidden, 512)
    assert plan.block & (plan.block - 1) == 0 and plan.vectors * 16 == plan.block * itemsize
    assert 1 <= plan.warps <= 32 and plan.warps & (plan.warps - 1) == 0
    assert plan.vectors >= 32 * plan.warps


def test_a_grid_is_resident_whatever_else_runs() -> None:
    for sms in (1, 78, 132):
        for warps in (1, 2, 4, 8, 16, 32):
            assert 1 <= resident_blocks(sms, warps) <= sms * THREADS_PER_SM // (32 * warps)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("tokens, hidden", [(1, 8), (7, 200), (64, 8192), (512, 8192), (100_000, 16384)])
def test_sections_do_not_overlap_and_are_aligned(world: int, tokens: int, hidden: int) -> None:
    layout = ChannelLayout.of(world, tokens, hidden, 2)
    for size in (layout.one_shot, layout.inbox, layout.outbox, layout.scales):
        assert size > 0 and size % ALIGNMENT == 0
    assert layout.one_shot_slot == (world - 1) * layout.one_shot
    assert layout.two_shot_offset == 2 * layout.one_shot_slot
    assert layout.outbox_offset == (world - 1) * layout.inbox
    assert layout.scales_offset == layout.outbox_offset + layout.outbox
    assert layout.total == layout.two_shot_offset + 2 * (layout.scales_offset + layout.scales)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("tokens, hidden", [(1, 8), (7, 200), (64, 8192), (100_000, 16384)])
def test_every_launch_fits(world: int, tokens: int, hidden: int) -> None:
    """Also of narrower rows than prepared, of which more fit."""
    layout = ChannelLayout.of(world, tokens, hidden, 2)
    for narrower in {8, hidden // 2 // 8 * 8 or 8, hidden}:
        row = narrower * 2
        assert row <= layout.one_shot_rows(row) * row <= layout.one_shot
        rows = layout.two_shot_rows(row)
        share = -(-rows // world)
        assert rows >= 1 and share * row <= layout.inbox and rows * row <= layout.outbox


def test_memory_is_bounded_however_many_tokens() -> None:
    for world in WORLDS:
        layout = ChannelLayout.of(world, 10**9, 8192, 2)
        assert layout.one_shot_slot <= ONE_SHOT_BYTES + world * ALIGNMENT
        assert layout.outbox <= TWO_SHOT_BYTES + world * 8192 * 2 + ALIGNMENT


def test_too_wide_a_row_does_not_fit() -> None:
    layout = ChannelLayout.of(2, 1, 1024, 2)
    assert layout.one_shot_rows(4096) == 0 and layout.two_shot_rows(4096) == 0


@pytest.mark.parametrize("world, tokens, hidden", [(1, 4, 8), (9, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_nonsense_is_refused(world: int, tokens: int, hidden: int) -> None:
    with pytest.raises(ValueError):
        ChannelLayout.of(world, tokens, hidden, 2)


def test_algorithm_goes_by_bytes() -> None:
    row = 4096 * 2
    assert algorithm_of(256 * row, 2) == "triton:one_shot" and algorithm_of(257 * row, 2) == "cuda:one_shot"
    assert algorithm_of(10**9, 2) == "cuda:one_shot" and algorithm_of(10**9, 3) == "triton:two_shot"
    assert algorithm_of(170 * row, 4) == "triton:one_shot" and algorithm_of(171 * row, 4) == "triton:two_shot"


@pytest.mark.parametrize("hidden", [8, 200, 1040, 4096, 5120, 8192, 12288, MAX_HIDDEN])
def test_a_block_of_the_cuda_kernels_covers_a_row(hidden: int) -> None:
    plan = BlockPlan.of(hidden // 8)
    assert plan.threads % 32 == 0 and plan.threads <= 1024 and plan.threads * plan.held >= hidden // 8
    assert plan.threads * plan.resident <= THREADS_PER_SM
    assert plan.grid(1, 132) == 1 and plan.grid(10**6, 132) == 132 * plan.resident
