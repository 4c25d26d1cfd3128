"""Tiny random models of the architectures of transformers on two ranks: every all-reduce fused, errors no larger than unfused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tpfuse
from tests.dist import models
from tpfuse.testing import RankPool, interpreted

pytest.importorskip("transformers")
COUNTS = (24, 37)
MARGIN = 1.1  # over the unfused run's error
two_ranks = pytest.mark.parametrize("ranks", [2], indirect=True)


def hidden_states(model: Any, ids: dict[int, Tensor]) -> dict[int, Tensor]:
    return {n: model(ids[n])[0] for n in COUNTS}


def error(states: Tensor, exact: Tensor) -> float:
    return ((states.double() - exact).norm() / exact.norm()).item()


def measure(rank: int, world: int, name: str) -> dict[str, Any]:
    """Errors against the single-process model in FP64, fused and not, and the fused model's report."""
    ids = {n: models.tokens(n) for n in COUNTS}
    with torch.no_grad(), interpreted():
        exact = hidden_states(models.build(name).double(), ids)
        model = models.parallelize(models.build(name), models.mesh_of(world))
        unfused = hidden_states(model, ids)
        compiled = torch.compile(model, fullgraph=True, backend="tpfuse")
        for given in ids.values():
            torch._dynamo.mark_dynamic(given, 1)
        fused = hidden_states(compiled, ids)
    report = tpfuse.last_report()
    assert report is not None
    return {
        "errors": {n: (error(fused[n], exact[n]), error(unfused[n], exact[n])) for n in COUNTS},
        "graphs": len(report.results), "counts": report.counts(), "report": str(report),
        "declined": [e for e in report.declined() if e.attributes.get("operator") == "all_reduce"],
        "sites": [e.site for e in report.fired()], "states": fused[COUNTS[0]],
    }  # fmt: skip


def expected(name: str) -> dict[str, int]:
    """Seven all-reduces: the embedding's has no residual, the last layer's second one meets the model's last norm."""
    if name == "olmo2":  # no norm at a layer's entry: after the embedding and between layers there is none to fuse with
        return {"all_reduce": 1, "all_reduce_rms_norm": 5, "all_reduce_rms_norm_add_rms_norm": 1}
    if name in models.SANDWICH:
        return {"all_reduce_rms_norm": 1, "all_reduce_rms_norm_add_rms_norm": 2 * models.LAYERS}
    return {"all_reduce_add_rms_norm": 2 * models.LAYERS, "all_reduce_rms_norm": 1}


@two_ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", models.EXTRA)
def test_every_all_reduce_is_fused(ranks: RankPool, name: str) -> None:
    results = ranks.run(measure, name, timeout=300)
    for result in results:
        assert result["graphs"] == 1
        counts = {op: n for op, n in result["counts"].items() if op.startswith("all_reduce")}
        assert counts == expected(name), result["report"]
        assert [e.reason.code for e in result["declined"]] == ["no_norm"] * (name == "olmo2"), result["report"]
        assert all(site for site in result["sites"])
        for fused, unfused in result["errors"].values():
            assert 0 < fused <= MARGIN * unfused < 0.1, result["errors"]
    assert torch.equal(results[0]["states"], results[1]["states"])
