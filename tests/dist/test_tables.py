"""The first rank's table is the one that counts, also where the others have another one, or groups overlap."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tpfuse
from tests.models import Stack
from tpfuse.lowering.table import Entry, Table
from tpfuse.runtime.tables import follow_first
from tpfuse.testing import RankPool, interpreted

HIDDEN = 32


def table(choice: str, limit: int) -> Table:
    return Table("cpu", {}, (Entry("all_reduce_add_rms_norm", "float32", 2, ((limit, choice), (None, "unfused")), "", HIDDEN),))


def compiled(rank: int, world: int, folder: str) -> tuple[list[str], list[dict[str, Any]]]:
    """(ranges, the operators of each) where every rank has a file of its own under the same name."""
    import os

    os.chdir(Path(folder) / str(rank))
    model = Stack(HIDDEN, layers=1, rank=rank)
    with torch.no_grad(), interpreted():
        found = tpfuse.compile(model, {"table": "table.json", "timeout": 60.0}, fullgraph=True, dynamic=True)
        for tokens in (4, 40):
            found(torch.randn(tokens, HIDDEN))
    return [str(r) for r in found.report.ranges], [found.report.counts(r) for r in found.report.ranges]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_files_that_differ(ranks: RankPool, tmp_path: Path):
    for rank, limit in ((0, 16), (1, 8)):
        (tmp_path / str(rank)).mkdir()
        table("reference", limit * HIDDEN * 4).save(tmp_path / str(rank) / "table.json")
    first, second = ranks.run(compiled, str(tmp_path), timeout=180)
    assert first == second
    limits, counts = first
    assert limits == ["1..16", "17.."]
    assert counts[0]["all_reduce_add_rms_norm"] == 2 and "all_reduce_add_rms_norm" not in counts[1]


def taken(rank: int, world: int) -> str:
    """Groups 01, 02, 13 and 23: what each rank ends with."""
    groups = [ranks for ranks in ((0, 1), (2, 3), (0, 2), (1, 3)) if rank in ranks]
    return follow_first(Table(machine=f"rank {rank}"), groups, 30.0).machine


@pytest.mark.timeout(100)
@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_overlapping_groups_end_with_one_table(ranks: RankPool):
    assert ranks.run(taken, timeout=90) == ["rank 0"] * 4


def alone(rank: int, world: int) -> str:
    if rank == 0:
        time.sleep(3)  # too late, but it does come: the next test finds both ranks at the same count
    try:
        follow_first(Table(), [(0, 1)], 1.0)
    except tpfuse.FusionError as error:
        return str(error)
    return ""


@pytest.mark.timeout(100)
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_first_rank_that_never_comes_is_named(ranks: RankPool):
    assert ranks.run(alone, timeout=60) == ["", "rank 1 waited 1 s for the table of ranks [0]"]
