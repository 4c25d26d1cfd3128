"""`tpfuse tune` without GPUs: what is kept of an earlier table, what a run that was cut off is worth, what is written where."""

from __future__ import annotations

from typing import Any

import pytest

from tpfuse.cli import tune
from tpfuse.config import table_path
from tpfuse.lowering.table import Entry, Table
from tpfuse.measure.points import AGAIN, grid

MACHINE, VERSIONS = "2 x NVIDIA H100", {"torch": "2.11.0", "kernels": "0123"}
ONE, TWO = "triton:one_shot", "cuda:one_shot"
OP = "all_reduce_add_rms_norm"


def rows(hidden: int, *tokens: int, scheme: str = "") -> list[dict[str, Any]]:
    where = {"op": OP + ("_quantize" if scheme else ""), "scheme": scheme, "dtype": "bfloat16", "world": 2, "hidden": hidden}
    times = {ONE: 5.0, ONE + AGAIN: 5.02, TWO: 4.0, "unfused": 9.0}
    return [{**where, "tokens": n, "impl": impl, "us": us} for n in tokens for impl, us in times.items()]


def entry(hidden: int, choice: str, world: int = 2) -> Entry:
    return Entry(OP, "bfloat16", world, ((None, choice),), "", hidden)


def test_an_earlier_table_keeps_what_was_not_measured_now():
    old = Table(MACHINE, VERSIONS, (entry(4096, ONE), entry(8192, ONE), entry(4096, ONE, world=4)))
    made = tune.merged(old, MACHINE, VERSIONS, rows(4096, 1, 8))
    assert made.entries == (entry(8192, ONE), entry(4096, ONE, world=4), entry(4096, TWO))
    assert (made.machine, made.versions) == (MACHINE, VERSIONS)


@pytest.mark.parametrize("changed", [{"machine": "2 x NVIDIA H200"}, {"versions": {**VERSIONS, "kernels": "4567"}}])
def test_a_stale_table_keeps_nothing(changed: dict[str, Any]):
    old = Table(**{"machine": MACHINE, "versions": VERSIONS, **changed}, entries=(entry(8192, ONE),))
    assert tune.merged(old, MACHINE, VERSIONS, rows(4096, 1)).entries == (entry(4096, TWO),)


def test_half_a_grid_makes_no_thresholds():
    points = grid(["", "fp8_tensor"], [4096, 8192], [1, 8])
    done = [*rows(4096, 1, 8), *rows(8192, 1), *rows(4096, 1, 8, scheme="fp8_tensor")]
    kept = tune.complete(done, points)
    assert {(r["op"], r["hidden"], r["tokens"]) for r in kept} == {
        (OP, 4096, 1), (OP, 4096, 8), (OP + "_quantize", 4096, 1), (OP + "_quantize", 4096, 8),
    }  # fmt: skip


def test_the_table_is_written_where_lowering_looks(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("TPFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    asked = []

    def measured(work: Any, world: int, job: tune.Job, **_: Any) -> list[dict[str, Any]]:
        asked.append((world, sorted({(p.scheme, p.hidden, p.tokens) for p in job.points}), job.trials))
        return [{"rows": rows(4096, 1, 8), "machine": MACHINE, "versions": VERSIONS, "notes": ["a note"]}] * world

    monkeypatch.setattr("tpfuse.cli.bench.launch", measured)
    status, out, errors = cli("tune", "--tp", 2, "--tokens", "8,1", "--hidden", 4096, "--scheme", "none", "--trials", 3)
    assert status == 0, errors
    assert asked == [(2, [("", 4096, 1), ("", 4096, 8)], 3)]
    table = Table.load(table_path(MACHINE))
    assert table_path(MACHINE) == tmp_path / "tables" / "2-x-nvidia-h100.json"
    assert table.entries == (entry(4096, TWO),) and table.stale(MACHINE, VERSIONS) is None
    assert table.digest in out and "a note" in out and TWO in out


def test_ranks_need_gpus(cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    status, _, errors = cli("tune", "--tp", 2)
    assert status == 1 and "1 GPUs are visible" in errors


def test_both_forms_of_a_residual_are_measured_where_asked(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    jobs = []

    def measured(work: Any, world: int, job: tune.Job, **_: Any) -> list[dict[str, Any]]:
        jobs.append(job)
        where = {"op": "sequence_parallel", "scheme": "fp8_tensor", "dtype": "bfloat16", "world": 2, "hidden": 4096}
        times = {8: {"on": 5.0, "off": 4.0, "on" + AGAIN: 5.0}, 512: {"on": 9.0, "off": 14.0, "on" + AGAIN: 9.05}}
        both = [{**where, "tokens": n, "impl": impl, "us": us} for n, of in times.items() for impl, us in of.items()]
        return [{"rows": [*rows(4096, 1, 8), *both], "machine": MACHINE, "versions": VERSIONS, "notes": []}] * world

    monkeypatch.setattr("tpfuse.cli.bench.launch", measured)
    options = ("--tokens", "1,8,512", "--hidden", 4096, "--scheme", "fp8_tensor", "--out", tmp_path / "table.json")
    assert cli("tune", *options)[0] == cli("tune", "--sequence-parallel", *options)[0] == 0
    assert [[p.tokens for p in job.sharded] for job in jobs] == [[], [8, 512]]  # one token is no multiple of two ranks
    (found,) = [e for e in Table.load(tmp_path / "table.json").entries if e.op == "sequence_parallel"]
    assert found == Entry("sequence_parallel", "bfloat16", 2, ((64 * 8192, "off"), (None, "on")), "fp8_tensor", 4096)
