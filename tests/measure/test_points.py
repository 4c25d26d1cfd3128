"""The loop over points and what comes of it, with a fake timer: no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tpfuse.cli import bench
from tpfuse.cli.inputs import BadInput, numbers, schemes
from tpfuse.lowering.table import BUILT_IN, Entry, Table
from tpfuse.measure import plain, results
from tpfuse.measure.points import AGAIN, Point, Sweep, grid
from tpfuse.measure.timing import slowest
from tpfuse.target import Target

H100 = Target("cuda", 90, 2, True, backends=frozenset({"reference", "triton", "torch", "nccl"}))
MICROSECONDS = {"tpfuse:one_shot" + AGAIN: 5.1, "tpfuse:one_shot": 5.0, "nccl+inductor": 10.0}


def fake(limit_s: float | None = None, **others: Any) -> Sweep:
    return Sweep(
        2, lambda point: {impl: lambda i: None for impl in MICROSECONDS},
        lambda impls, calls: {impl: [MICROSECONDS[impl], MICROSECONDS[impl] + 2, MICROSECONDS[impl] + 1] for impl in impls},
        lambda mine: [mine, mine], limit_s, **others,
    )  # fmt: skip


def test_rows_of_a_result_file():
    rows = fake().run(grid(["", "fp8_tensor"], [4096], [1, 8]), picked=lambda point: "tpfuse:one_shot")
    assert [(r["scheme"], r["tokens"]) for r in rows[::3]] == [("", 1), ("", 8), ("fp8_tensor", 1), ("fp8_tensor", 8)]
    row = rows[1]
    assert row["op"] == "all_reduce_add_rms_norm" and rows[-1]["op"] == "all_reduce_add_rms_norm_quantize"
    assert (row["us"], row["us_min"], row["us_max"], row["samples"]) == (6.0, 5.0, 7.0, [5.0, 7.0, 6.0])
    assert [r.get("picked") for r in rows[:3]] == [None, True, None]
    assert {"dtype", "hidden", "world", "impl", "limit_us"} <= row.keys()


def test_the_slowest_rank_of_each_replay_counts():
    assert slowest([{"a": [1.0, 5.0]}, {"a": [2.0, 3.0]}]) == {"a": [2.0, 5.0]}


def test_time_is_up_after_the_point_that_was_begun():
    seconds = iter([1.0, 9.0, 12.0])
    told: list[Point] = []
    sweep = fake(limit_s=10.0, start=0.0, clock=lambda: next(seconds), tell=lambda point, rows: told.append(point))
    rows = sweep.run(grid([""], [4096], [1, 2, 4, 8]))
    assert [p.tokens for p in told] == [1, 2] and len(rows) == 6


def test_the_limit_of_a_point():
    # 2048 x 8192 x 2 bytes at 380 GB/s.
    assert Point("", 8192, 2048).limit_us(2) == pytest.approx(88.3, abs=0.1)
    assert Point("", 8192, 2048).limit_us(4) == pytest.approx(132.5, abs=0.1)


def test_what_lowering_picks_is_named_as_in_result_files():
    from tpfuse.measure.collectives import picked_impl

    pytest.importorskip("triton")
    row = 4096 * 2
    steps = ((64 * row, "triton:one_shot"), (512 * row, "triton:two_shot"), (4096 * row, "torch:two_shot"), (None, "unfused"))
    table = Table("", {}, (Entry("all_reduce_add_rms_norm", "bfloat16", 2, steps, hidden=4096),))
    found = {tokens: picked_impl(Point("", 4096, tokens), H100, table) for tokens in (1, 64, 65, 700, 1500, 5000)}
    assert found == {
        1: "tpfuse:one_shot", 64: "tpfuse:one_shot", 65: "tpfuse:two_shot", 700: "tpfuse:torch:two_shot",
        1500: "tpfuse:torch:two_shot", 5000: "nccl+inductor",
    }  # fmt: skip
    assert picked_impl(Point("", 4096, 256), H100, BUILT_IN) == "tpfuse:one_shot"  # 2 MiB
    assert picked_impl(Point("", 4096, 257), H100, BUILT_IN) == "tpfuse:cuda:one_shot"


@pytest.mark.parametrize("scheme", ["", "fp8_tensor", "fp8_token", "fp8_group128", "nvfp4"])
def test_a_peers_chain_has_one_graph_for_all_token_counts(scheme: str):
    from torch._dynamo.testing import CompileCounter

    from tpfuse import shim

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(plain.chain, backend=counter, fullgraph=True)
    weight, scale = torch.rand(256), plain.scale_of(scheme, "cpu") if scheme else None
    for tokens in (2, 8, 200, 1500):
        x, residual = torch.randn(tokens, 256), torch.randn(tokens, 256)
        for tensor in (x, residual):
            shim.mark_dynamic(tensor, 0)
        out = compiled(x, residual, weight, scale, scheme)
        torch.testing.assert_close(out[-1], x + residual)
    assert counter.frame_count == 1


def test_a_document_is_written_a_row_a_line(tmp_path):
    found = results.document("collectives", [{"op": "a", "us": 1.23456, "samples": [1.00001]}], world=2)
    results.write(tmp_path / "new" / "file.json", found)
    text = (tmp_path / "new" / "file.json").read_text()
    assert '\n{"op": "a", "us": 1.235, "samples": [1.0]}' in text and '"world": 2' in text


def test_numbers_and_schemes_of_the_command_line():
    assert numbers("--tokens", "1,8", ()) == [1, 8] and numbers("--tokens", None, (3,)) == [3]
    assert schemes("none,fp8_tensor", ()) == schemes(None, ["none", "fp8_tensor"]) == ["", "fp8_tensor"]
    with pytest.raises(BadInput, match="separated by commas"):
        numbers("--tokens", "1,0", ())
    with pytest.raises(BadInput, match="did you mean 'fp8_tensor'"):
        schemes("fp8_tensr", ())


def test_the_table_names_its_baseline(capsys):
    from rich.console import Console

    rows = fake().run(grid([""], [4096], [8]), picked=lambda point: "tpfuse:one_shot")
    document = results.document("collectives", rows, world=2, baseline="nccl+inductor", notes=["a note"])
    bench.show(Console(width=160), document)
    out = capsys.readouterr().out
    assert "Speedup over nccl+inductor" in out and "a note" in out
    line = next(line for line in out.splitlines() if "tpfuse:one_shot*" in line)
    assert "6.0" in line and "1.83×" in line
    assert "all_reduce_add_rms_norm" in out and "8 × 4096" in out


@pytest.mark.parametrize("scheme", ["", "fp8_group128"])
def test_what_lowering_picks_for_a_sharded_residual(scheme):
    from tpfuse.measure.sharded import ShardedPoint, picked_sharded

    point = ShardedPoint(scheme, 4096, 128)
    assert picked_sharded(point, H100, BUILT_IN) is None  # without the CUDA back end it is taken apart
    with_cuda = replace(H100, backends=H100.backends | {"cuda"})
    assert picked_sharded(point, with_cuda, BUILT_IN) == "tpfuse:cuda:sharded"
