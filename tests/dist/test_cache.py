"""Plain Inductor and tpfuse share a cache folder: each run is right, and is what it claims to be, cache hit or not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tpfuse
from tests.models import Stack
from tpfuse.testing import run_ranks

TOKENS, HIDDEN = 24, 32


def execute(rank: int, world: int, kind: str) -> dict[str, Any]:
    """Compile and run in a new process.  kind: "plain", "tpfuse" or "disabled" (tpfuse without passes)."""
    from torch._dynamo.utils import counters

    model, x = Stack(HIDDEN, layers=1, rank=rank).bfloat16(), torch.randn(TOKENS, HIDDEN).bfloat16() * 0.01
    config = {"passes": ()} if kind == "disabled" else {}
    with torch.no_grad():
        expected = model(x)
        compiled: Any = torch.compile(model) if kind == "plain" else tpfuse.compile(model, config)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            got = compiled(x)
    names = Counter(e.name for e in trace.events())
    report = None if kind == "plain" else compiled.report
    return {
        "difference": (got.float() - expected.float()).norm() / expected.float().norm(),
        "executed": {n.removeprefix("tpfuse::"): c for n, c in sorted(names.items()) if n.startswith("tpfuse::")},
        "all_reduces": sum(n for name, n in names.items() if name.startswith("_c10d_functional::all_reduce")),  # or in place
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "counts": report and report.counts(),
        "fired": report and len(report.fired()),
        "lines": report and str(report).count("\n"),
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_one_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs = {i: run_ranks(execute, 1, kind, timeout=300) for i, kind in enumerate(
        ("plain", "tpfuse", "plain", "tpfuse", "disabled")
    )}  # fmt: skip
    for results in runs.values():
        assert all(0 <= r["difference"] < 0.01 for r in results)
    for plain in (runs[0], runs[2]):
        assert all(r["executed"] == {} and r["all_reduces"] == 2 for r in plain)
    assert all(r["misses"] == 0 for r in runs[2])  # from AOTAutograd's cache or from Inductor's
    fused = {"all_reduce_add_rms_norm": 2}
    for first, again in zip(runs[1], runs[3], strict=True):
        assert first["executed"] == first["counts"] == fused and first["fired"] == 2 and first["misses"] == 1
        assert (again["hits"], again["misses"]) == (1, 0)  # Inductor compiled nothing, and yet the report is the same
        assert {**again, "hits": 0, "misses": 1} == {**first, "hits": 0, "misses": 1}
    assert all(r["executed"] == r["counts"] == {} and r["fired"] == 0 for r in runs[4])
