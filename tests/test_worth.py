"""Which products go with their collective on an H100, read off what was measured: explained, nothing runs."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import tpfuse
from tests.models import Stack
from tpfuse.lowering.table import Entry, Table

H100 = tpfuse.Target("cuda", 90, 2, True, False, frozenset({"reference", "triton", "cuda", "nccl"}))
SHARDED = Entry("sequence_parallel", "bfloat16", 2, ((None, "on"),))
SCATTER, GATHER = "matmul_reduce_scatter_add_rms_norm", "all_gather_matmul"


def final(group: str, folder: Path, entries: tuple[Entry, ...], **options: object) -> tuple[Counter[str], set[str]]:
    """The final operators of two layers of two sums each, and what was fused and taken apart again."""
    Table("cpu", {}, (SHARDED, *entries)).save(folder / "table.json")
    model = Stack(1024, 2).bfloat16()
    config = tpfuse.Config(table=str(folder / "table.json"), **options)  # type: ignore[arg-type]
    x = torch.zeros(64, 1024, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    report = tpfuse.explain(model, x, config=config, target=H100)
    assert report.counts()
    return Counter(report.counts()), {e.rule for e in report.declined() if e.status == "unfused"}


def measured(op: str, kernel: str) -> Entry:
    return Entry(op, "bfloat16", 2, ((None, kernel),))


def test_nothing_measured(group: str, tmp_path: Path) -> None:
    counts, unfused = final(group, tmp_path, ())
    assert counts == {"shard_rows": 1, "reduce_scatter_add_rms_norm_all_gather": 4} and not unfused


def test_measured_faster(group: str, tmp_path: Path) -> None:
    counts, unfused = final(group, tmp_path, (measured(SCATTER, "cuda:chunked"), measured(GATHER, "cuda:chunked")))
    assert counts == {"shard_rows": 1, SCATTER: 4, GATHER: 3, "all_gather": 1} and not unfused


def test_one_of_the_two_measured_faster(group: str, tmp_path: Path) -> None:
    counts, unfused = final(group, tmp_path, (measured(SCATTER, "unfused"), measured(GATHER, "cuda:chunked")))
    last = {"reduce_scatter_add_rms_norm_all_gather": 1}  # whose rows no product takes
    assert counts == {"shard_rows": 1, "reduce_scatter_add_rms_norm": 3, GATHER: 3, **last} and not unfused


@pytest.mark.parametrize("asked", [{"passes": ("sequence_parallel", "async_tp")}, {"kernels": "cuda"}], ids=str)
def test_asked_for(group: str, tmp_path: Path, asked: dict[str, object]) -> None:
    """By the pass's name they are fused whatever was measured, and taken apart without a kernel; by a kernel's they have one."""
    counts, unfused = final(group, tmp_path, (), **asked)
    if "kernels" in asked:
        assert (counts[SCATTER], counts[GATHER]) == (4, 3)
    else:
        assert {SCATTER, GATHER} <= unfused and counts["reduce_scatter_add_rms_norm"] == 4
