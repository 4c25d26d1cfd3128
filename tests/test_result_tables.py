"""The tables in the documents come from the committed result files, and say what those files say."""

from __future__ import annotations

from typing import Any

import pytest

from tools import tables


def row(impl: str, us: float, tokens: int = 8, scheme: str = "", **others: Any) -> dict[str, Any]:
    return {"op": "all_reduce_add_rms_norm", "scheme": scheme, "dtype": "bfloat16", "tokens": tokens, "hidden": 4096, "world": 2,
            "impl": impl, "us": us, "limit_us": 2.0, "samples": [us], **others}  # fmt: skip


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "what": "collectives", "date": "2026-11-25", "commit": "abc", "machine": {"gpu": "H100", "count": 2, "link": "NV18"},
        "versions": {"torch": "2.11.0", "python": "3.12"}, "table": "1a2b", "rows": list(rows),
    }  # fmt: skip


FILE = document(
    {**row("empty_kernel", 1.0, 0), "op": "empty_kernel"},
    row("tpfuse:one_shot (A/A)", 4.1), row("tpfuse:one_shot", 4.0), row("tpfuse:two_shot", 5.0, picked=True),
    row("nccl+inductor", 10.0), row("flashinfer_one_shot_pdl", 6.0),
    row("tpfuse:one_shot (A/A)", 8.2, 64), row("tpfuse:one_shot", 8.0, 64, picked=True), row("nccl+inductor", 7.9, 64),
    row("nccl+inductor", 9.0, 512), row("nccl+inductor (A/A)", 9.1, 512),
)  # fmt: skip


def test_documents_are_up_to_date():
    assert tables.main(check=True) == 0, "run python tools/tables.py"


def test_a_point_is_what_lowering_picks_against_the_best_peer_there():
    first, second = tables.points(FILE)  # at 512 tokens nothing of tpfuse was measured
    assert (first.ours, first.us, first.peer, first.peer_us) == ("tpfuse:two_shot", 5.0, "flashinfer_one_shot_pdl", 6.0)
    assert (first.speedup, first.limit_us, first.picked) == (1.2, 2.0, True)
    assert first.noise == pytest.approx(0.025)
    assert (second.peer, second.where["tokens"]) == ("nccl+inductor", 64)


def test_a_pick_may_be_a_peer():
    (point,) = tables.points(document(row("tpfuse:one_shot", 8.0), row("nccl+inductor", 7.0, picked=True)))
    assert point.ours == point.peer == "nccl+inductor" and point.speedup == 1.0


def test_the_summary():
    text = tables.summary({"file.json": FILE})
    # sqrt(1.2 * 7.9 / 8): and 64 tokens are slower by less than the repetition differed.
    assert "| all_reduce_add_rms_norm | – | 2 | 1.09× | 0.99× | 1.20× | none |" in text
    assert "2 × H100, NV18, torch 2.11.0: [file](benchmarks/results/file.json) at abc." in text and "†" not in text
    slow = document(row("tpfuse:one_shot", 8.0), row("nccl+inductor", 7.0))
    text = tables.summary({"file.json": slow})
    assert "| – † | 1 | 0.88× | 0.88× | 0.88× | 1 |" in text
    assert "†: tpfuse's fastest at each point, not what lowering picks" in text


def test_a_heading():
    def told(file: dict[str, Any]) -> str:
        return tables.heading("file.json", file, tables.points(file))

    assert told(FILE) == "`file.json`: 2 × H100, NV18, torch 2.11.0, 2026-11-25, commit abc; picked by table 1a2b."
    slow = document(row("tpfuse:one_shot", 8.0), row("nccl+inductor", 7.0))
    assert "; at each point (†) tpfuse's fastest, not what lowering picks" in told(slow)
    mixed = document(row("tpfuse:one_shot", 4.0, scheme="nvfp4"), row("nccl+inductor", 7.0, scheme="nvfp4"), *FILE["rows"])
    assert "; at each point of nvfp4 (†) tpfuse's fastest, not" in told(mixed)


def test_of_two_runs_the_less_favourable_one_is_quoted():
    def run(us: float) -> dict[str, Any]:
        times = {"nccl+inductor": 100.0, "nccl+inductor (A/A)": 101.0, "no_collective": 60.0, "flashinfer": 90.0, "tpfuse": us}
        return {**document(*(row(impl, us, op="decode") for impl, us in times.items())), "what": "e2e"}

    faster = document(row("tpfuse:one_shot", 2.0), row("nccl+inductor", 7.0))
    for order in (("a", "b"), ("b", "a")):
        files = {"a": run(70.0), "b": run(80.0)}
        text = tables.summary({f"{name}.json": files[name] for name in order})
        assert "| decode | – | 4096 | 8 | 100 | 90 (1.11×) flashinfer | **80** (1.25×) | 60 | 50% |" in text
        assert "[b](benchmarks/results/b.json)" in text and "[a]" not in text
        files = {"a": faster, "b": FILE}
        text = tables.summary({f"{name}.json": files[name] for name in order})
        assert "1.09×" in text and "[b](benchmarks/results/b.json)" in text and "[a]" not in text


def test_runs_of_tests_are_recorded_beside_earlier_ones():
    from tests.gpu import record

    now, then = ({"commit": c, "date": "2026-11-25", "count": 2, "torch": "2.11.0"} for c in ("new", "old"))
    old = record.rows([("tests/gpu/test_a.py::test_x[1]", "failed", 1.0), ("tests/gpu/test_a.py::test_y", "passed", 2.0)], then)
    reports = [("tests/gpu/test_a.py::test_x[1]", "passed", 1.25), ("tests/gpu/test_a.py::test_x[2]", "skipped", 0.0)]
    first, second = record.merged(old, record.rows(reports, now))
    assert first == {"test": "tests/gpu/test_a.py::test_x", "passed": 1, "failed": 0, "skipped": 1, "seconds": 1.2, **now}
    assert (second["test"], second["commit"], second["passed"]) == ("tests/gpu/test_a.py::test_y", "old", 1)
    text = tables.tested([("file.json", {"machine": {"gpu": "H100"}, "rows": [first, second]})])
    assert "| test_a.py::test_x | 1 | 0 | 1 | 2 | 2.11.0 | new | 2026-11-25 |" in text


def test_loads_are_listed_apart_from_steps():
    load = {"op": "serve", "shape": "8b", "sequences": 32, "batch": 4, "output": 64, "layers": 8, "tpot_us": 2500.0}
    rows = [
        row(impl, us, 2048, **load, ttft_us=10 * us, tokens_per_s=800.0)
        for impl, us in (("nccl+inductor (A/A)", 101.0), ("nccl+inductor", 100.0), ("tpfuse", 80.0))
    ]
    text = tables.summary({"file.json": {**document(*rows), "what": "e2e"}})
    assert "| stack | scheme | layers | load | nccl+inductor (A/A) | nccl+inductor | tpfuse |" in text
    assert "| 8b | – | 8 | 32 × 2048, 4 at a time, 64 out | 1.01 / 2.50, 800 | 1.00 / 2.50, 800 | 0.80 / 2.50, 800 |" in text
    assert "of the room" not in text


def test_a_layer_is_listed_by_kernel():
    kernels = [
        {"scheme": "", "impl": "nccl+inductor", "kernel": "nvjet", "kind": "product", "count": 4.0, "us": 100.4},
        {"scheme": "", "impl": "tpfuse", "kernel": "nvjet", "kind": "product", "count": 8.0, "us": 104.0},
        {"scheme": "", "impl": "nccl+inductor", "kernel": "ncclAllReduce", "kind": "NCCL", "count": 2.0, "us": 50.0},
    ]
    text = tables.layers([("file.json", document(*kernels))])
    assert "| scheme | kernel | whose | nccl+inductor | tpfuse |" in text
    assert "| – | `nvjet` | product | 4 in 100 µs | 8 in 104 µs |" in text
    assert "| – | `ncclAllReduce` | NCCL | 2 in 50 µs | – |" in text


def test_the_details():
    text = tables.details({"file.json": FILE})
    assert "| tokens | tpfuse (µs) | by | best peer (µs) | which | speed-up | limit reached |" in text
    assert "| 8 | 5.0 | two_shot | 6.0 | flashinfer_one_shot_pdl | 1.20× | 40% |" in text


def test_products_stand_beside_the_product_alone():
    where = {"op": "matmul_reduce_scatter", "intermediate": 14336}
    times = {"gemm_alone": 100.0, "nccl+cublas": 130.0, "torch_fused": 120.0, "tpfuse:chunked": 105.0, "gemm_alone (A/A)": 104.0}
    file = {**document(*(row(impl, us, 512, **where) for impl, us in times.items())), "what": "gemm"}
    (point,) = tables.points(file)
    assert (point.alone_us, point.peer, point.peer_us) == (102.0, "torch_fused", 120.0)
    assert point.noise == pytest.approx(0.04)
    untuned = {**file, "table": None, "rows": [{**r, "picked": r["impl"] == "nccl+cublas"} for r in file["rows"]]}
    assert tables.points(untuned) == [point] and tables.points({**untuned, "table": "1a2b"})[0].ours == "nccl+cublas"
    text = tables.details({"file.json": file})
    assert "| tpfuse (µs) | by | best peer (µs) | which | speed-up | limit reached | ÷ GEMM alone | A/A |" in text
    assert "| 105.0 | chunked | 120.0 | torch_fused | 1.14× | 2% | 1.029 | 4.0% |" in text
    assert "| matmul_reduce_scatter | – † | 1 | 1.14× | 1.14× | 1.14× | none | 1.029 |" in text
    assert "| matmul_reduce_scatter | – † | 1 | 1.14× | 1.14× | 1.14× | none |\n" in tables.summary({"file.json": file})


def test_every_plot_of_a_file_stands_below_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    rows = [row("nccl", 1.0, op=op) for op in ("all_gather_matmul", "all_gather_scaled_matmul", "scaled_matmul_reduce_scatter")]
    for name in ("gemm-all_gather_matmul", "gemm-matmul_reduce_scatter", "other"):
        (tmp_path / "results" / f"{name}.svg").touch()
    found = tables.figures("gemm.json", {**document(*rows), "what": "gemm"}, tmp_path / "docs")
    operators = ("all_gather_matmul", "matmul_reduce_scatter")
    assert found == {op: f"![gemm-{op}](../results/gemm-{op}.svg)" for op in operators}


def test_files_that_nothing_may_be_quoted_from_are_left_out(tmp_path):
    import json

    for name, found in {"a": FILE, "b": {**FILE, "note": "pessimistic"}, "c": {**FILE, "what": "tune"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert list(tables.load(tmp_path)) == ["a.json"]
    assert "recorded yet" in tables.summary({})


def test_text_around_a_block_stays():
    text = "a\n<!-- points:begin -->\nold\n<!-- points:end -->\nb\n"
    assert tables.replaced(text, "new", "points") == "a\n<!-- points:begin -->\nnew\n<!-- points:end -->\nb\n"
    with pytest.raises(ValueError, match="no markers"):
        tables.replaced("a", "new", "points")


def test_a_picture_stands_beside_the_figures_that_are_quoted(tmp_path, monkeypatch):
    """Of two runs of a step the table quotes the less favourable one, and the picture is that one's."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def run(us):
        times = {"nccl+inductor": 120.0, "nccl+inductor (A/A)": 121.0, "no_collective": 100.0, "tpfuse": us}
        rows = [row(impl, t, n, op="decode") for n in (1, 8) for impl, t in times.items()]
        return {**document(*rows), "what": "e2e"}

    for name in ("a", "b", "c"):
        (tmp_path / f"{name}-decode.svg").touch()
    text = tables.summary({"a.json": run(104.0), "b.json": run(110.0), "c.json": run(105.0)})
    assert "50%" in text and "80%" not in text and "![b-decode]" in text and "![a-decode]" not in text
