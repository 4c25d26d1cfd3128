"""The first rank's table is the one that counts, also where the others have another one, or groups overlap."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tpfuse
from tests.models import Stack
from tpfuse.lowering.table import Entry, Table
from tpfuse.measure.forms import sequence_parallel
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


class Written(torch.nn.Module):
    """An MLP whose ranks keep their own rows before and after, as models with sequence parallelism are written."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        own = torch.Generator().manual_seed(rank)
        self.up = torch.nn.Parameter(torch.randn(HIDDEN, 16, generator=own) / 6, requires_grad=False)
        self.down = torch.nn.Parameter(torch.randn(16, HIDDEN, generator=own) / 4, requires_grad=False)
        self.form = sequence_parallel(dist.group.WORLD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form.sum(torch.relu(self.form.whole(x) @ self.up) @ self.down)


def written(rank: int, world: int, path: str) -> list[tuple[str, list[str]]]:
    model = Written(rank)
    fused = tpfuse.compile(model, {"table": path, "compile_all": True}, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for count in (60 // world, 20 * world):
            x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(rank))
            torch.testing.assert_close(fused(x), model(x))
    return [(str(r.range), r.ops) for r in fused.report.results]


@pytest.mark.timeout(320)
def test_rows_that_ranks_keep_count_together(ranks: RankPool, tmp_path: Path):
    """The table's bytes are of all ranks' rows, so ranges are of as many tokens.  Both world sizes share Inductor's cache: shapes
    of gathered rows are not in the graph."""
    entry = Entry("async_tp", "float32", ranks.world, ((64 * HIDDEN * 4, "off"), (None, "on")), "", HIDDEN)
    Table("cpu", {}, (entry,)).save(tmp_path / "table.json")
    first, *others = ranks.run(written, str(tmp_path / "table.json"), timeout=300)
    assert sorted(first) == [("1..64", []), ("65..", ["all_gather_matmul", "matmul_reduce_scatter"])]
    assert all(other == first for other in others)
