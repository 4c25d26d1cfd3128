"""The kernel of normalised and turned heads in bf16 and fp16, against float64 and the unfused graph's error."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_rope import STYLES, WIDTHS, arguments, wide
from tpfuse.ir.rope import qk_norm_rope
from tpfuse.rewrite.match import same_strides

pytest.importorskip("triton")

SHAPES: list[tuple[tuple[int, ...], int, int]] = [((1, 1), 32, 8), ((2, 130), 8, 2), ((300,), 5, 1)]  # leading, heads of q, k


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(args: dict[str, Any]) -> None:
    from tpfuse.kernels.rope import qk_norm_rope as launch

    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    got = launch(*args.values(), alive=(True, True))
    torch.use_deterministic_algorithms(False)
    plain = qk_norm_rope.reference(**args)
    for out, unfused, want in zip(got, plain, qk_norm_rope.reference(**wide(args)), strict=True):
        assert out.shape == unfused.shape and same_strides(out, unfused) and out.dtype == unfused.dtype
        assert error(out, want) <= 1.25 * error(unfused, want)


@pytest.mark.parametrize(
    "width, rotary, style, dtype",
    [
        *((*width, "half", torch.bfloat16) for width in [*WIDTHS, (256, 256), (512, 512)]),
        *((*width, style, torch.bfloat16) for width in [(128, 128), (80, 20)] for style in STYLES[1:]),
        (128, 128, "half", torch.float16),
    ],
)
def test_against_float64(width: int, rotary: int, style: str, dtype: torch.dtype) -> None:
    for (leading, q_heads, k_heads), how in itertools.product(SHAPES, ["projected", "heads_first"]):
        args = arguments(leading, q_heads, k_heads, width, rotary, style, how, dtype, "cuda")
        check(args)
        check({**args, "weight_bias": 1.0, "rounding": "cast_last"})  # Gemma3
    check({**args, "k_weight": None})


def test_tables_in_fp32_and_one_for_a_batch() -> None:
    check(arguments((3, 70), 8, 2, 128, 128, "half", dtype=torch.bfloat16, device="cuda", tables=torch.float32))
    check(arguments((3, 70), 8, 2, 128, 128, "half", dtype=torch.bfloat16, device="cuda", one_table=True))


def test_one_launch() -> None:
    from tpfuse.kernels.rope import qk_norm_rope as launch

    args = arguments((2, 130), 8, 2, 128, 128, "half+heads_first", dtype=torch.bfloat16, device="cuda")
    launch(*args.values(), alive=(True, True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        launch(*args.values(), alive=(True, True))
        torch.cuda.synchronize()
    assert [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA] == ["qk_norm_rope_kernel"]


def test_compiled_model_picks_it() -> None:
    """From a model's spelling to the kernel: Qwen3's heads, before the transposition."""
    import tpfuse

    def model(qkv: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            x32 = x.float()
            return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        q, k = (x.unflatten(-1, (-1, 128)) for x in qkv.split([1024, 256], -1))
        return turn(norm(q, wq).transpose(1, 2)), turn(norm(k, wk).transpose(1, 2))

    args = arguments((1, 33), 8, 2, 128, 128, "half", dtype=torch.bfloat16, device="cuda")
    qkv = torch.cat([args["q"].flatten(-2), args["k"].flatten(-2)], -1)
    inputs = (qkv, args["q_weight"], args["k_weight"], args["cos"].unsqueeze(1), args["sin"].unsqueeze(1))
    compiled = tpfuse.compile(model)
    with torch.no_grad():
        got, plain = compiled(*inputs), model(*inputs)
    want = model(*(x.double() for x in inputs))
    assert compiled.report.counts() == {"qk_norm_rope": 1}
    for out, unfused, exact in zip(got, plain, want, strict=True):
        assert error(out, exact) <= 1.25 * error(unfused, exact)
