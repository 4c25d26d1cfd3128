"""Tiny models of transformers, a layer in each scheme: what every layer becomes, counted, and errors no larger than unfused.

Layer i's scheme is SCHEMES[i].  The rows after a layer's attention are quantised for its MLP, those after its MLP for the next
layer's attention; the last ones meet the model's last norm.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tpfuse
from tests.dist import quantised
from tests.dist.quantised import SCHEMES
from tpfuse import testing
from tpfuse.testing import RankPool

pytest.importorskip("transformers")
pytest.importorskip("torchao")
pytestmark = [pytest.mark.timeout(600), pytest.mark.parametrize("ranks", [2], indirect=True)]
PATIENCE = 400  # seconds
REST = ("norm_quantize", "merge_all_reduce", "attention_quantize", "qk_norm_rope")
SMALL = ("all_reduce_norm", "all_reduce_norm_quantize", *REST)
LARGE = ("sequence_parallel", "async_tp", *REST)
COUNTS = (24, 37)
L = len(SCHEMES)
Q = L - 1  # quantised layers
LINES = {  # of a decoder layer, by the operator that its all-reduces become
    "llama": "all_reduce_add_rms_norm", "qwen3": "all_reduce_add_rms_norm", "deepseek_v3": "all_reduce_add_rms_norm",
    "gemma3_text": "all_reduce_rms_norm_add_rms_norm",
}  # fmt: skip


def small(name: str) -> dict[str, int]:
    """Two all-reduces a layer; a scale per token is of all heads, which no attention kernel sees."""
    line = LINES[name]
    counts = {f"{line}_quantize": 2 * Q, line: 2 * L - 2 * Q, "act_and_mul_quantize": Q, "attention_quantize": Q - 1}
    if name in ("qwen3", "gemma3_text"):
        counts["qk_norm_rope"] = L
    if name == "deepseek_v3":
        counts["rms_norm_quantize"] = 2 * Q  # of the latent queries and of the latent keys and values
    return counts


def large(name: str) -> dict[str, int]:
    """The residual enters whole and leaves gathered; every sum is scattered by the product before it, and normed and quantised
    there."""
    if name == "deepseek_v3":  # experts and shared experts are added before they are scattered; the router reads whole norms
        return {
            "shard_rows": 1, "matmul_reduce_scatter_add_rms_norm": 1, "scaled_matmul_reduce_scatter_add_rms_norm": Q,
            "reduce_scatter_add_rms_norm_quantize": Q, "reduce_scatter_add_rms_norm_all_gather": 1, "rms_norm_quantize": 2 * Q,
            "all_gather_matmul": 1, "all_gather_scaled_matmul": Q, "all_gather": Q, "act_and_mul_quantize": Q,
            "attention_quantize": Q - 1,
        }  # fmt: skip
    line = LINES[name].replace("all_reduce", "matmul_reduce_scatter")
    counts = {
        "shard_rows": 1, line: 1, f"{line}_quantize": 1, f"scaled_{line}": 1, f"scaled_{line}_quantize": 2 * Q - 1,
        "all_gather_matmul": 1, "all_gather_scaled_matmul": 2 * Q, "all_gather": 1, "act_and_mul_quantize": Q,
        "attention_quantize": Q - 1,
    }  # fmt: skip
    return counts if name == "llama" else {**counts, "qk_norm_rope": L}


def measure(rank: int, world: int, name: str, options: dict[str, Any], counts: tuple[int, ...]) -> dict[str, Any]:
    """Values of the fused model, relative errors of it and of the unfused one against FP64, and what was fused by range."""
    ids = {n: quantised.tokens(n) for n in counts}
    with torch.no_grad(), testing.interpreted():
        model = quantised.build(name, dist.group.WORLD.group_name, rank, world)
        unfused = {n: model(ids[n])[0] for n in counts}
        compiled = tpfuse.compile(model, tpfuse.Config(**options), fullgraph=True, dynamic=True)
        fused = {n: compiled(ids[n])[0] for n in counts}
        model = quantised.exact(model)
        true = {n: model(ids[n])[0] for n in counts}

    def error(values: torch.Tensor, n: int) -> float:
        return ((values.double() - true[n]).norm() / true[n].norm()).item()

    return {
        "values": fused, "errors": {n: (error(fused[n], n), error(unfused[n], n)) for n in counts},
        "ops": {r.range.start: dict(Counter(r.ops)) for r in compiled.report.results},
        "fired": [(e.rule, e.site, dict(e.attributes)) for e in compiled.report.fired()], "report": str(compiled.report),
    }  # fmt: skip


def right(results: list[dict[str, Any]]) -> None:
    for result in results:
        for fused, unfused in result["errors"].values():
            assert 0 < fused <= 1.25 * unfused < 0.3, result["errors"]
        for n, values in result["values"].items():
            assert torch.equal(values, results[0]["values"][n])


def by_layer(fired: list[tuple[str, str, dict[str, Any]]], operator: str) -> dict[int, str]:
    """The scheme of an operator's sites by layer."""
    found = {}
    for rule, site, attributes in fired:
        if rule == operator:
            found[int(re.findall(r"layers\.(\d+)", site)[0])] = attributes["scheme"].split(":")[0]
    return found


@pytest.mark.parametrize("name", LINES)
def test_both_ranges(ranks: RankPool, name: str) -> None:
    options = {"ranges": {32: {"passes": SMALL}, 4096: {"passes": LARGE}}, "max_tokens": 4096}
    results = ranks.run(measure, name, options, COUNTS, timeout=PATIENCE)
    right(results)
    for result in results:
        assert result["ops"] == {1: small(name), 33: large(name)}, result["report"]
        assert by_layer(result["fired"], "act_and_mul_quantize") == dict(enumerate(SCHEMES[1:], 1))
        attended = by_layer(result["fired"], "attention_quantize")
        assert attended == {i: s for i, s in enumerate(SCHEMES) if s not in ("plain", "fp8_token")}
        if name == "gemma3_text":
            biases = [a["weight_bias"] for _, _, a in result["fired"] if "weight_bias" in a]
            assert len(biases) >= 2 * L + 2 * Q and set(biases) == {1.0}


def generate(rank: int, world: int, scheme: str) -> tuple[list[int], list[int], dict[str, int]]:
    """Greedy tokens of the unfused and of the sequence-parallel model, and the latter's operators."""
    with torch.no_grad(), testing.interpreted():
        model = quantised.build("llama", dist.group.WORLD.group_name, rank, world, [scheme] * 2, head=True)
        compiled = tpfuse.compile(model, tpfuse.Config(passes=LARGE), fullgraph=True, dynamic=True)
        found = []
        for run in (model, compiled):
            ids = quantised.tokens(5)
            for _ in range(12):
                ids = torch.cat([ids, run(ids).logits[:, -1:].argmax(-1)], 1)
            found.append(ids[0, 5:].tolist())
    return found[0], found[1], compiled.report.counts()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_greedy_tokens(ranks: RankPool, scheme: str) -> None:
    """Under sequence parallelism and async TP, prompts of 5 … 16 tokens on two ranks."""
    results = ranks.run(generate, scheme, timeout=PATIENCE)
    for unfused, fused, counts in results:
        assert fused == unfused == results[0][0] and len(set(fused)) > 3
        products = sum(n for op, n in counts.items() if "matmul_reduce_scatter" in op)
        assert products == 4 and not [op for op in counts if op.startswith("all_reduce")]
