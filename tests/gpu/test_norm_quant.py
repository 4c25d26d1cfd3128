"""The one-GPU norm and activation kernels in bf16 and fp16, every scheme, against float64 and the unfused graph's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_allreduce_norm import SCHEMES
from tpfuse.formats import dequantize, quantize
from tpfuse.ir.activation import act_and_mul
from tpfuse.ir.norm import add_rms_norm
from tpfuse.ir.samples import rows, vector

pytest.importorskip("triton")


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(q: Tensor, scales: Tensor, want: Tensor, plain: Tensor, scale: Tensor | None, scheme: str, layout: str) -> None:
    plain_q, plain_scales = quantize(plain, scale, scheme, layout)
    assert scales.shape == plain_scales.shape and scales.stride() == plain_scales.stride()
    unfused = dequantize(plain_q, plain_scales, scale, scheme, layout)
    assert error(dequantize(q, scales, scale, scheme, layout), want) <= 1.25 * error(unfused, want)


def given(scheme: str, of: float) -> Tensor | None:
    value = {"fp8_tensor": of / 448, "nvfp4": 448 * 6 / of}.get(scheme.partition(":")[0])
    return None if value is None else torch.tensor([1 / value if ":" in scheme else value], device="cuda")


@pytest.mark.parametrize("scheme, layout", SCHEMES[1:], ids=":".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm(scheme: str, layout: str, dtype: torch.dtype) -> None:
    from tpfuse.kernels import norm_quant

    for seed, (tokens, hidden) in enumerate([(1, 4096), (130, 8192), (7, 1040)]):
        shape: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "seed": seed, "dtype": dtype, "device": "cuda"}
        x, residual, weight = rows(**shape), rows(**{**shape, "seed": 9}), vector(**shape)
        scale = given(scheme, 12.0)
        norm_args = (weight, 1e-6, 1.0, "cast_last")
        q, scales, norm, h = norm_quant.add_rms_norm_quantize(
            x, residual, weight, scale, *norm_args[1:], scheme, layout, alive=(True, True, True, True)
        )
        plain, plain_h = add_rms_norm.reference(x, residual, *norm_args)
        want, want_h = add_rms_norm.reference(x.double(), residual.double(), weight.double(), *norm_args[1:])
        assert error(norm, want) <= 1.25 * error(plain, want)
        assert error(h, want_h) <= 1.25 * error(plain_h, want_h)
        check(q, scales, want, plain, scale, scheme, layout)


@pytest.mark.parametrize("scheme, layout", SCHEMES[1:], ids=":".join)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_activation(scheme: str, layout: str, act: str) -> None:
    from tpfuse.kernels import norm_quant

    for seed, (tokens, width) in enumerate([(1, 14336), (130, 28672), (7, 1040)]):
        both = rows(tokens=tokens, hidden=2 * width, seed=seed, dtype=torch.bfloat16, device="cuda") * 700
        gate, up = both.chunk(2, -1)
        scale = given(scheme, 20.0)
        q, scales, out = norm_quant.act_and_mul_quantize(gate, up, scale, act, scheme, layout, alive=(True, True, True))
        plain = act_and_mul.reference(gate, up, act)
        want = act_and_mul.reference(gate.double(), up.double(), act)
        assert error(out, want) <= 1.25 * error(plain, want)
        check(q, scales, want, plain, scale, scheme, layout)
