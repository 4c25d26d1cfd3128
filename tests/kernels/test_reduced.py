"""Norms behind another library's all-reduce, in Triton's interpreter with gloo in that library's place, FP32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.kernels.interpreted import INTERPRET
from tests.kernels.spawned import run_spawned
from tests.kernels.test_allreduce_norm import check_quantised
from tests.kernels.test_norm_quant import Given
from tpfuse.ir.samples import rows, vector

EPS = 3e-6


def want(world: int, tokens: int, hidden: int, weight: torch.Tensor, residual: torch.Tensor | None) -> tuple[Any, Any]:
    """(norm, h) in float64, Gemma's weight."""
    h = torch.stack([rows(tokens=tokens, hidden=hidden, rank=r).double() for r in range(world)]).sum(0)
    h = h if residual is None else h + residual
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * (weight.double() + 1), h


def run(rank: int, world: int) -> list[str]:
    from tpfuse.kernels import nccl, torch_symm
    from tpfuse.report import FusionError

    def summed(message: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        message.copy_(x)
        dist.all_reduce(message)
        return message

    group: Any = dist.group.WORLD
    name, tokens, hidden = group.group_name, 7, 208
    shape: dict[str, Any] = {"tokens": tokens, "hidden": hidden}
    x, residual, weight = rows(**shape, rank=rank), rows(**{**shape, "seed": 9}), vector(**shape)
    before, messages = x.clone(), []
    with_residual, without = want(world, tokens, hidden, weight, residual), want(world, tokens, hidden, weight, None)
    common, scale = (EPS, 1.0, "cast_last"), torch.tensor([0.05])
    for got, expected in (
        (nccl.all_reduce_add_rms_norm(x, residual, weight, None, 1.0, *common, name, alive=(True, True)), with_residual),
        (nccl.all_reduce_rms_norm(x, weight, None, *common, name, alive=(True, True)), without),
    ):
        for value, true in zip(got, expected, strict=True):
            torch.testing.assert_close(value.double(), true, rtol=2e-5, atol=1e-6)
    args = (x, residual, weight, None, scale, 1.0, *common, "fp8_tensor", "row", name)
    q, scales, norm, h = nccl.all_reduce_add_rms_norm_quantize(*args, alive=(True, True, False, True))
    check_quantised(q, scales, with_residual[0], Given(scale, "fp8_tensor", "row"))
    torch.testing.assert_close(h.double(), with_residual[1], rtol=2e-5, atol=1e-6)
    assert norm.numel() == 0 and torch.equal(x, before)  # the rows may have other users

    with pytest.raises(FusionError) as error:
        torch_symm.all_reduce(summed, x, name)
    messages.append(str(error.value))
    torch_symm._buffers[name] = [(torch.empty(3 * hidden * 4, dtype=torch.int8), None)]
    reduced = torch_symm.all_reduce(summed, x, name)  # 3, 3 and 1 rows
    torch.testing.assert_close(reduced.double(), without[1], rtol=2e-5, atol=1e-6)
    with pytest.raises(FusionError) as error:
        torch_symm.all_reduce(summed, torch.zeros(1, 4 * hidden), name)
    return [*messages, str(error.value)]


@pytest.mark.ranks
@pytest.mark.timeout(250)
def test_reduce_then_norm() -> None:
    for unprepared, wide in run_spawned(run, 2, environment=INTERPRET, timeout=200):
        assert "has no symmetric buffer" in unprepared
        assert "3328 bytes do not fit the symmetric buffer of 2496" in wide
