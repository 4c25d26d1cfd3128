"""`tpfuse tune` without GPUs: what is kept of an earlier table, what a run that was cut off is worth, what is written where."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tpfuse.cli import tune
from tpfuse.config import table_path
from tpfuse.lowering.table import Entry, Table
from tpfuse.measure import gemm
from tpfuse.measure.gemm import FEWEST, by_message
from tpfuse.measure.points import AGAIN, ALONE, grid
from tpfuse.target import Target

MACHINE, VERSIONS = "2 x NVIDIA H100", {"torch": "2.11.0", "kernels": "0123"}
ONE, TWO = "triton:one_shot", "cuda:one_shot"
H100 = Target("cuda", 90, 2, True, backends=frozenset({"reference", "triton", "cuda", "torch", "nccl"}))
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

    asked.clear()  # found before anything is measured
    status, _, errors = cli("tune", "--tp", 2, "--out", __file__)
    assert status == 1 and "is no table of measurements" in errors and not asked


@pytest.mark.parametrize("damaged", ["another", MACHINE])
def test_a_damaged_table_is_named_and_passed_over(cli, monkeypatch, tmp_path, damaged):
    monkeypatch.setenv("TPFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = {"rows": rows(4096, 1, 8), "machine": MACHINE, "versions": VERSIONS, "notes": []}
    monkeypatch.setattr("tpfuse.cli.bench.launch", lambda *_, **__: [found] * 2)
    table_path(damaged).parent.mkdir(parents=True)
    table_path(damaged).write_text("{}")
    status, out, errors = cli("tune", "--tp", 2, "--tokens", "8,1", "--hidden", 4096, "--scheme", "none")
    assert status == 0, errors
    assert f"warning: {table_path(damaged)} is no table of measurements" in out
    assert Table.load(table_path(MACHINE)).entries == (entry(4096, TWO),)
    assert table_path("another").exists() is (damaged == "another")


def test_products_are_measured_where_sizes_of_layers_are_given(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    jobs = []

    def measured(work: Any, world: int, job: tune.Job, **_: Any) -> list[dict[str, Any]]:
        jobs.append(job)
        times = {ALONE: [50.0], "nccl": [80.0], "cuda:chunked": [55.0], ALONE + AGAIN: [50.0]}
        found = [row for p in job.products for row in p.rows(times, 2, None)]
        return [{"rows": by_message(job.products, found), "machine": MACHINE, "versions": VERSIONS, "notes": []}] * world

    monkeypatch.setattr("tpfuse.cli.bench.launch", measured)
    options = ("--tokens", "", "--hidden", "4096,8192", "--scheme", "none,fp8_tensor", "--out", tmp_path / "table.json")
    status, _, errors = cli("tune", *options, "--intermediate", "14336,28672", "--product-tokens", "512,128")
    assert status == 0, errors
    (job,) = jobs
    assert not job.points and {p.tokens for p in job.products} == {128, 512}
    assert (job.products[0].hidden, job.products[0].intermediate, job.products[0].tokens) == (8192, 28672, 512)
    table = Table.load(tmp_path / "table.json")
    found = {(e.op, e.scheme, e.dtype, e.hidden, e.across) for e in table.entries}
    assert {steps for e in table.entries for steps in e.steps} == {(None, "cuda:chunked")} and len(found) == 12
    assert ("all_gather_scaled_matmul", "fp8_tensor", "float8_e4m3fn", 8192, 28672) in found
    assert ("scaled_matmul_reduce_scatter_add_rms_norm_quantize", "fp8_tensor", "bfloat16", 4096, 7168) in found
    status, _, errors = cli("tune", *options, "--intermediate", "14336")
    assert status == 1 and "one for each of 2 widths, not 1" in errors


class FakeTimer:
    """chunked wins beyond 512 tokens; calls are what is asked for, kernels the point's."""

    def __init__(self, trials: int) -> None:
        self.most, self.of = trials, None

    def alternate(self, impls: dict[str, Any], calls: int, trials: int) -> dict[str, list[float]]:
        assert FEWEST <= trials <= self.most
        return {name: [fn(0)] * trials for name, fn in impls.items()}


def test_a_rank_measures_products_and_what_follows_them(monkeypatch):
    """`tune.work` with a fake clock: the composition is measured with the kernel that the product alone was fastest by."""
    composed = []

    class Built(gemm.Gemms):
        def kernels(self, point: Any) -> dict[str, Any]:
            names = [k.name for k in gemm.usable(point, gemm.shapes(point), self.target)]
            product = replace(point, operator=gemm.SCATTER)
            if point.operator == gemm.WITH_NORM:
                composed.append((point.tokens, self.fastest[product]))
                names.append("unfused")
            large = point.tokens > 512
            times = {n: 90.0 - 10 * (n.endswith(":chunked") == large) - 5 * (n == "unfused" and not large) for n in names}
            return {n: lambda i, us=us: us for n, us in {ALONE: 50.0, **times, ALONE + AGAIN: 50.1}.items()}

    ranks = SimpleNamespace(
        group=SimpleNamespace(group_name="g"), target=H100, notes=[], built=None, share=lambda mine: [mine, mine],
        timer=FakeTimer, leave=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr("tpfuse.measure.ranks.Ranks.join", lambda *_, **__: ranks)
    monkeypatch.setattr("tpfuse.runtime.detect.detect", lambda *_: replace(H100, versions=VERSIONS))
    monkeypatch.setattr("tpfuse.runtime.detect.machine", lambda *_: MACHINE)
    monkeypatch.setattr(tune, "Gemms", Built)
    points = tune.products_of(["", "fp8_token"], [4096], [14336], [128, 1024], 2, "bfloat16")
    place: Any = SimpleNamespace(rank=1, world=2)
    out = tune.work(place, lambda *_: None, tune.Job((), (), tuple(points), (), 15, 100.0))
    assert composed == [(1024, "cuda:chunked"), (128, "cuda:plain")] * 2
    table = tune.merged(None, MACHINE, VERSIONS, out["rows"])
    assert len(table.entries) == 6
    choices = {(e.op, e.scheme): [choice for _, choice in e.steps] for e in table.entries}
    assert choices["matmul_reduce_scatter", ""] == ["nccl", "cuda:chunked"]
    assert choices["matmul_reduce_scatter_add_rms_norm", ""] == ["unfused", "cuda:chunked"]
    assert choices["all_gather_scaled_matmul", "fp8_token"] == ["nccl", "cuda:chunked"]


def test_attention_is_measured_where_heads_are_given(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    jobs = []

    def measured(work: Any, world: int, job: tune.Job, **_: Any) -> list[dict[str, Any]]:
        jobs.append(job)
        found = []
        for p in job.attentions:
            kernels = p.kernels(H100, "meta")
            assert list(kernels) == ["triton:flash", "triton:sdpa"]
            times = {name: [1.0 if (p.tokens > 2048) == (name == "triton:sdpa") else 2.0] for name in kernels}
            found += p.rows({"triton:flash" + AGAIN: times["triton:flash"], **times}, world, None)
        return [{"rows": found, "machine": MACHINE, "versions": VERSIONS, "notes": []}] * world

    monkeypatch.setattr("tpfuse.cli.bench.launch", measured)
    options = ("--tokens", "", "--scheme", "none,fp8_token,fp8_tensor,fp8_group128", "--out", tmp_path / "table.json")
    status, _, errors = cli("tune", *options, "--head-dims", "64x64,192x128")
    assert status == 0, errors
    (job,) = jobs
    # No scale of a token, and no group of 128 in a head of 64: they span heads.
    widths = {(p.scheme, p.across, p.hidden) for p in job.attentions}
    assert widths == {("fp8_tensor", 64, 64), ("fp8_tensor", 192, 128), ("fp8_group128", 192, 128)}
    ends = {(e.scheme, e.across, e.hidden): e.steps for e in Table.load(tmp_path / "table.json").entries}
    assert ends["fp8_tensor", 64, 64] == ((2896 * 128, "triton:flash"), (None, "triton:sdpa")) and len(ends) == 3

    for given, told in (("64", "--head-dims '64': expected QKxV"), ("128x0", "expected QKxV")):
        status, _, errors = cli("tune", *options, "--head-dims", given)
        assert status == 1 and told in errors
    status, _, errors = cli("tune", "--tokens", "", "--scheme", "none", "--head-dims", "64x64")
    assert status == 1 and "nothing to measure" in errors

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    status, _, errors = cli("tune", "--tp", 1, *options, "--head-dims", "64x64,192x128")
    assert status == 0 and jobs[1].attentions == job.attentions, errors


def test_products_of_a_size_that_was_cut_off_make_no_entry():
    points = tune.products_of([""], [4096], [14336], [128, 512], 2, "bfloat16")
    rows = [row for p in points[:-1] for row in p.rows({ALONE: [1.0]}, 2, None)]
    assert {r["op"] for r in tune.complete(rows, points)} == {"matmul_reduce_scatter", "matmul_reduce_scatter_add_rms_norm"}


def test_ranks_need_gpus(cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    status, _, errors = cli("tune", "--tp", 2)
    assert status == 1 and "1 GPUs are visible" in errors
    for options in ((), ("--tokens", "", "--hidden", 4096, "--intermediate", 14336)):
        status, _, errors = cli("tune", "--tp", 1, *options)
        assert status == 1 and "one rank measures attention alone" in errors


def test_both_forms_of_a_residual_are_measured_where_asked(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    jobs = []

    def measured(work: Any, world: int, job: tune.Job, **_: Any) -> list[dict[str, Any]]:
        jobs.append(job)
        where = {"op": "reduce_scatter_add_rms_norm_quantize_all_gather", "scheme": "fp8_tensor", "dtype": "bfloat16", "world": 2,
                 "hidden": 4096}  # fmt: skip
        around = [{**where, "tokens": n, "impl": impl, "us": us}
                  for n, us in {8: 5.0, 512: 3.0}.items() for impl in ("cuda:sharded", "cuda:sharded" + AGAIN)]  # fmt: skip
        found = rows(4096, 1, 8, 512, scheme="fp8_tensor") + (around if job.sharded else [])
        return [{"rows": found, "machine": MACHINE, "versions": VERSIONS, "notes": []}] * world

    monkeypatch.setattr("tpfuse.cli.bench.launch", measured)
    options = ("--tokens", "1,8,512", "--hidden", 4096, "--scheme", "fp8_tensor", "--out", tmp_path / "table.json")
    assert cli("tune", *options)[0] == cli("tune", "--sequence-parallel", *options)[0] == 0
    assert [[p.tokens for p in job.sharded] for job in jobs] == [[], [8, 512]]  # one token is no multiple of two ranks
    (found,) = [e for e in Table.load(tmp_path / "table.json").entries if e.op == "sequence_parallel"]
    assert found == Entry("sequence_parallel", "bfloat16", 2, ((64 * 8192, "off"), (None, "on")), "fp8_tensor", 4096)
    assert found.times == ((8 * 8192, (("off", 4.0), ("on", 5.0))), (512 * 8192, (("off", 4.0), ("on", 3.0))))
