"""Tiny tensor-parallel models of transformers whose linear layers torchao itself quantises, its tensor subclasses as weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import tpfuse
from tests.dist import quantised
from tests.dist.test_quantised_models import LARGE, SMALL
from tpfuse import testing

LAYERS = 2
NAMES = ("llama", "qwen3", "gemma3_text", "deepseek_v3")
GRANULARITIES = ("row", "tensor")
COUNTS = (24, 37)
OPTIONS = {"ranges": {32: {"passes": SMALL}, 4096: {"passes": LARGE}}, "max_tokens": 4096, "kernels": "reference"}


class Shared(nn.Module):
    """A rank's part of a linear layer, and the sum of its product over the ranks where its columns are shared out."""

    def __init__(self, weight: Tensor, scheme: str, group: str, given: nn.Parameter | None) -> None:
        super().__init__()
        self.group = group
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
        self.linear.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        c10d = torch.ops._c10d_functional
        return c10d.wait_tensor(c10d.all_reduce(y, "sum", self.group)) if self.group else y


def build(name: str, granularity: str, group: str, rank: int, world: int, device: torch.device) -> nn.Module:
    """A rank's part of the model, every linear layer of its decoder layers quantised."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_

    model = quantised.build(name, group, rank, world, ["plain"] * LAYERS, linear=Shared).to(device)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow() if granularity == "row" else PerTensor())
    for module in model.modules():
        if isinstance(module, Shared):
            quantize_(module, config)
            assert type(module.linear.weight).__name__ == "Float8Tensor"
    return model


def exact(model: nn.Module) -> nn.Module:
    """The model of the values that the quantised weights stand for, in FP64 and without quantised activations."""
    for module in model.modules():
        if isinstance(module, Shared):
            stored: Any = module.linear.weight
            values = stored.qdata.double() * stored.scale.double()
            module.linear.weight = nn.Parameter(values, requires_grad=False)
    return model.double()


def expected(name: str, granularity: str) -> dict[int, dict[str, int]]:
    """Operators by the first token count of their range.

    A scale a row: each sum is normed and quantised for the next product, the first norm and the activations are quantised.  One
    scale of all tokens: a norm's rows are quantised when all of them are there, so nothing is quantised on own rows.
    """
    rowwise, latent, n = granularity == "row", name == "deepseek_v3", LAYERS
    line = "rms_norm_add_rms_norm" if name == "gemma3_text" else "add_rms_norm"
    scatter = f"scaled_matmul_reduce_scatter_{line}"
    alone = {"act_and_mul_quantize": n, "rms_norm_quantize": 1 + 2 * n * latent} if rowwise else {}
    alone |= {"qk_norm_rope": n} if name in ("qwen3", "gemma3_text") else {}
    small = {f"all_reduce_{line}_quantize": 2 * n - 1, f"all_reduce_{line}": 1} if rowwise else {f"all_reduce_{line}": 2 * n}
    if latent:  # experts are added to the shared ones before they are scattered; their router reads whole norms
        large = {scatter: n, "all_gather": n, "reduce_scatter_add_rms_norm_all_gather": 1 if rowwise else n}
        large |= {"reduce_scatter_add_rms_norm_quantize": n - 1, "all_gather_scaled_matmul": n - 1} if rowwise else {}
    elif rowwise:
        large = {f"{scatter}_quantize": 2 * n - 1, scatter: 1, "all_gather_scaled_matmul": 2 * n - 1, "all_gather": 1}
    else:
        large = {scatter: 2 * n, "all_gather": 2 * n}
    return {1: {**small, **alone}, 33: {"shard_rows": 1, **large, **alone}}


def measure(rank: int, world: int, name: str, granularity: str, device: torch.device, group: str) -> dict[str, Any]:
    """What was fused by range, and for each token count the values and errors against FP64, fused and unfused."""
    ids = {n: quantised.tokens(n).to(device) for n in COUNTS}
    with torch.no_grad(), testing.interpreted():
        model = build(name, granularity, group, rank, world, device)
        unfused = {n: model(ids[n])[0] for n in COUNTS}
        compiled = tpfuse.compile(model, tpfuse.Config(**OPTIONS), fullgraph=True, dynamic=True)
        fused = {n: compiled(ids[n])[0] for n in COUNTS}
        model = exact(model)
        true = {n: model(ids[n])[0] for n in COUNTS}

    def error(values: Tensor, n: int) -> float:
        return ((values.double() - true[n]).norm() / true[n].norm()).item()

    return {
        "values": {n: v.cpu() for n, v in fused.items()}, "errors": {n: (error(fused[n], n), error(unfused[n], n)) for n in COUNTS},
        "ops": {r.range.start: dict(Counter(r.ops)) for r in compiled.report.results}, "report": str(compiled.report),
    }  # fmt: skip


def right(results: list[dict[str, Any]], name: str, granularity: str) -> None:
    for result in results:
        assert result["ops"] == expected(name, granularity), result["report"]
        for fused, unfused in result["errors"].values():
            assert 0 < fused <= 1.25 * unfused < 0.3, result["errors"]
        for n, values in result["values"].items():
            assert torch.equal(values, results[0]["values"][n])
