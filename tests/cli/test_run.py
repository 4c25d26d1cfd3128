"""`tpfuse run` from end to end, on two ranks."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

from tpfuse.cli.generate import FUSED, SINGLE, UNFUSED, Job
from tpfuse.cli.launch import RankError, launch
from tpfuse.config import Config
from tpfuse.runtime import agreement

pytestmark = pytest.mark.ranks


@pytest.mark.timeout(600)
def test_run_fused_beside_unfused_and_unsharded(llama, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    status, out, errors = cli(
        "run", llama, "--tp", 2, "--prompt", "w5 w6 w7 w9", "--max-new-tokens", 6, "--compare", "--verify",
        "--set", "timeout=300", "--json", tmp_path / "run.json",
    )  # fmt: skip
    assert status == 0, errors
    told = json.loads((tmp_path / "run.json").read_text())
    runs = told["runs"]
    assert runs.keys() == {FUSED, UNFUSED, SINGLE}
    assert len(runs[SINGLE]["tokens"]) == 6
    assert runs[FUSED]["tokens"] == runs[UNFUSED]["tokens"] == runs[SINGLE]["tokens"]
    assert runs[SINGLE]["text"] in out
    assert all(run["first_token"] > 0 and run["per_token"] > 0 for run in runs.values())
    assert all(0 < row["relative"] < 1e-5 for row in told["errors"].values())
    # Two graphs, prefill and decode, with both of the layer's all-reduces fused in each.
    ops = [row["ops"] for row in told["report"]["ranges"]]
    assert [row["all_reduce_add_rms_norm"] for row in ops] == [2, 2]
    verified = {row["site"] for row in told["report"]["verified"]}
    assert verified == {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}


def disagree(place, progress, job):
    place.join("cpu", 60)
    mine = dataclasses.replace(job, max_new_tokens=job.max_new_tokens + place.rank)
    agreement.agree(range(place.world), mine.lines(), 30)


def test_ranks_that_were_told_different_things(llama):
    job = Job(llama, 2, "w5", "cpu", "float32", 4, (FUSED,), False, Config())
    with pytest.raises(RankError, match=r"'max_new_tokens 4'.*'max_new_tokens 5'|'max_new_tokens 5'.*'max_new_tokens 4'"):
        launch(disagree, 2, job)


def test_weights_that_are_missing_or_of_other_sizes_are_named(llama, cli, monkeypatch, tmp_path):
    """transformers would make random numbers of the first, and no sentence of the second."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setitem(os.environ, "TPFUSE_TIMEOUT", "60")
    copy = shutil.copytree(llama, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = torch.zeros(6, 48)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    status, _, errors = cli("run", copy, "--tp", 2, "--max-new-tokens", 4, "--prompt", "w5")
    assert status == 1
    assert "lm_head.weight has another size, model.norm.weight is missing" in " ".join(errors.split())
    assert "Traceback" not in errors
