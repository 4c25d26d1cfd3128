"""Ranks agree on the plan before they run it: what differs is named on every rank, and who never comes too."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tpfuse
from tests.models import Stack
from tpfuse.runtime import agreement
from tpfuse.testing import RankPool, interpreted

HIDDEN = 32
two_ranks = pytest.mark.parametrize("ranks", [2], indirect=True)


def difference(rank: int, world: int, what: str) -> tuple[str, float]:
    """(the error that this rank sees, seconds until then) where the last rank differs in `what`."""
    other = rank == world - 1
    config: dict[str, Any] = {"timeout": 3.0 if what == "absent" else 60.0}
    model = Stack(HIDDEN, layers=2 if what == "model" and other else 1, rank=rank)
    if what == "config" and other:
        config["disable_passes"] = ("merge_all_reduce",)
    if what == "epsilon" and other:
        model.norm.eps = 1e-4
    if what == "dtype" and other:
        model = model.bfloat16()
    if what == "failure" and other:  # this rank's compilation fails
        config["strict"] = True
        model.bfloat16().norm.float()
    x = torch.randn(8, HIDDEN, dtype=model.layers[0].norm1.weight.dtype)
    if what == "absent" and other:
        time.sleep(6)  # in the program, but not where the others wait
        return "", 0.0
    start = time.monotonic()
    with torch.no_grad(), interpreted():
        try:
            tpfuse.compile(model, config, fullgraph=True)(x)
        except tpfuse.FusionError as error:
            return str(error), time.monotonic() - start
    return "", time.monotonic() - start


DIFFERENCES = {
    "config": ("has \"config disable_passes=('merge_all_reduce',)\"", "has 'config disable_passes=()'"),
    "epsilon": ("disagree on line", "eps=0.0001"),
    "dtype": ("disagree on line", "torch.bfloat16"),
    "model": ("disagree on line", "all_reduce_add_rms_norm"),
    "failure": ("weight_dtype",),
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("what", DIFFERENCES)
def test_difference_is_named_on_every_rank(ranks: RankPool, what: str) -> None:
    for message, _ in ranks.run(difference, what, timeout=180):
        assert all(word in message for word in DIFFERENCES[what]), message
        assert f"rank {ranks.world - 1}" in message or f" and {ranks.world - 1} " in message or "strict" in message


@two_ranks
@pytest.mark.timeout(200)
def test_absent_rank_is_named(ranks: RankPool) -> None:
    (message, seconds), _ = ranks.run(difference, "absent", timeout=180)
    assert "rank 0 waited 3 s" in message and "ranks [1]" in message
    assert seconds < 60  # compilation included
    ranks.close()  # they no longer count their agreements alike


def groups_made_anew(rank: int, world: int) -> str:
    """Two ranks agree twice; then only the first of them is left, beside a process that never agreed with anybody."""
    for _ in range(2):
        agreement.agree(range(world), ["plan"], 30.0)
    if rank:
        return ""
    dist.destroy_process_group()
    store = dist.HashStore()
    dist.init_process_group("fake", rank=0, world_size=2, store=store)
    agreement.default_store().set("tpfuse/agree/0,1/0/1", json.dumps(["plan"]))
    agreement.agree((0, 1), ["plan"], 1.0)
    return "agreed"


@two_ranks
def test_a_group_that_is_made_anew_counts_anew(ranks: RankPool) -> None:
    assert ranks.run(groups_made_anew)[0] == "agreed"
    ranks.close()  # the first rank has left its group


def subgroups(rank: int, world: int) -> tuple[float, float, dict[str, int]]:
    """TP2 × DP2: (difference from eager, sum of the output, counts) of one rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Stack(HIDDEN, layers=1, group=mesh["tp"].get_group(), rank=mesh["tp"].get_local_rank())
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(mesh["dp"].get_local_rank()))
    with torch.no_grad(), interpreted():
        expected = model(x)
        compiled = tpfuse.compile(model, fullgraph=True)
        got = compiled(x)
    return (got - expected).abs().max().item(), got.sum().item(), compiled.report.counts()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_subgroups(ranks: RankPool) -> None:
    results = ranks.run(subgroups, timeout=180)
    assert all(difference < 1e-5 for difference, *_ in results)
    assert all(counts == {"all_reduce_add_rms_norm": 2} for *_, counts in results)
    sums = [total for _, total, _ in results]
    assert sums[0] == sums[1] != sums[2] == sums[3]
