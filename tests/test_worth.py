"""Which products go with their collective on an H100, read off what was measured: explained, nothing runs.

The same model is explained in every test, more often than Dynamo would compile it again.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tpfuse
from tests.models import Stack
from tpfuse.lowering.table import Entry, Table

H100 = tpfuse.Target("cuda", 90, 2, True, frozenset({"reference", "triton", "cuda", "nccl"}))
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


def decision(name: str, *steps: tuple[int | None, str], **where: object) -> Entry:
    """As `measure.precedence` makes one, with what was measured at 64 tokens."""
    known = {"hidden": 1024, "times": ((64 * 2048, (("off", 20.0), ("on", 25.0))),), **where}
    return Entry(name, "bfloat16", 2, steps, **known)  # type: ignore[arg-type]


KERNELS = tuple(measured(op, "cuda:chunked") for op in (SCATTER, "matmul_reduce_scatter", GATHER))
BETWEEN = 256 * 2048  # bytes of 256 tokens of the Stack below


def ranges(group: str, folder: Path, entries: tuple[Entry, ...], **options: object) -> tuple[tpfuse.Report, list[Counter[str]]]:
    Table("cpu", {}, entries).save(folder / "table.json")
    config = tpfuse.Config(table=str(folder / "table.json"), **options)  # type: ignore[arg-type]
    x = torch.zeros(64, 1024, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    report = tpfuse.explain(Stack(1024, 2).bfloat16(), x, config=config, target=H100)
    return report, [Counter(result.ops) for result in report.results]


def test_each_range_takes_the_form_that_was_measured_faster_in_it(group: str, tmp_path: Path) -> None:
    """All-reduces up to 256 tokens, one launch around own rows up to 512, products with their collectives beyond."""
    report, found = ranges(group, tmp_path, (
        decision("sequence_parallel", (BETWEEN, "off"), (None, "on")), decision("async_tp", (2 * BETWEEN, "off"), (None, "on")),
        *KERNELS,
    ))  # fmt: skip
    assert [str(r.range) for r in report.results] == ["1..256", "257..512", "513.."]
    assert found == [
        {"all_reduce_add_rms_norm": 4},
        {"shard_rows": 1, "reduce_scatter_add_rms_norm_all_gather": 4},
        {"shard_rows": 1, SCATTER: 4, GATHER: 3, "all_gather": 1},
    ]
    told = {(e.rule, str(e.range)): str(e.reason) for e in report.declined() if e.reason and e.reason.code == "threshold"}
    assert set(told) == {("sequence_parallel", "1..256"), ("matmul_reduce_scatter", "257..512"), (GATHER, "257..512")}
    assert all("off 20.0 µs, on 25.0 µs" in text for text in told.values())


def test_products_never_measured_in_layers_go_by_their_kernels(group: str, tmp_path: Path) -> None:
    report, found = ranges(group, tmp_path, (decision("sequence_parallel", (None, "on")), *KERNELS))
    assert found == [{"shard_rows": 1, SCATTER: 4, GATHER: 3, "all_gather": 1}]


@pytest.mark.parametrize("where", [{"world": 4}, {"dtype": "float16"}], ids=str)
def test_what_other_ranks_and_dtypes_measured_counts_for_nothing(group: str, tmp_path: Path, where: dict[str, object]) -> None:
    """Without a measurement of their own the all-reduces stay."""
    forms = [replace(decision(name, (None, "on")), **where) for name in ("sequence_parallel", "async_tp")]
    report, found = ranges(group, tmp_path, (*forms, *KERNELS))
    assert found == [{"all_reduce_add_rms_norm": 4}]
    assert {e.reason.code for e in report.declined() if e.rule == "sequence_parallel" and e.reason} == {"unmeasured"}


def test_a_pass_that_is_named_overrules_what_was_measured(group: str, tmp_path: Path) -> None:
    off = [decision(name, (None, "off")) for name in ("sequence_parallel", "async_tp")]
    report, found = ranges(group, tmp_path, (*off, *KERNELS), passes=("sequence_parallel", "async_tp"))
    assert found[0][SCATTER] == 4 and found[0][GATHER] == 3
