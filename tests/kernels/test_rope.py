"""The kernel of normalised and turned heads in Triton's interpreter, FP32 (see test_allreduce_norm.py)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.compiled import compiled, cuda, missing
from tests.kernels.interpreted import INTERPRET
from tests.kernels.spawned import run_spawned
from tpfuse.ir.rope import qk_norm_rope

# Width of a head, how much of it turns.
WIDTHS = [(16, 16), (128, 128), (96, 96), (64, 32), (80, 20)]
STYLES = ["half", "half+pairs", "interleaved", "interleaved+pairs", "half+heads_first"]


def arguments(
    leading: tuple[int, ...], q_heads: int, k_heads: int, width: int, rotary: int, style: str, how: str = "projected",
    dtype: torch.dtype = torch.float32, device: str = "cpu", tables: torch.dtype | None = None, one_table: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """q and k as models hand them over.

    how: "projected" (parts of one matrix, whose rows hold k's heads after q's, and more), "heads_first" (heads before
    tokens in memory).  tables: dtype of cos and sin.  one_table: of a batch.
    """
    generator = torch.Generator().manual_seed(sum(leading) * 7 + width + rotary)
    both = torch.randn(*leading, (q_heads + 2 * k_heads) * width, generator=generator) * 3e-3
    both = both.to(device, dtype)
    q = both[..., : q_heads * width].unflatten(-1, (q_heads, width))
    k = both[..., q_heads * width : (q_heads + k_heads) * width].unflatten(-1, (k_heads, width))
    if how == "heads_first":
        q, k = (x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in (q, k))
    weights = [(torch.rand(width, generator=generator) * 2 + 0.5).to(device, dtype) for _ in range(2)]
    table = (1, leading[-1]) if one_table else leading
    angles = torch.randn(*table, rotary // 2 if "pairs" in style else rotary, generator=generator)
    cos, sin = (t.to(device, tables or dtype) for t in (angles.cos(), angles.sin()))
    return {"q": q, "k": k, "q_weight": weights[0], "k_weight": weights[1], "cos": cos, "sin": sin,
            "eps": 3e-6, "weight_bias": 0.0, "rounding": "cast_first", "style": style}  # fmt: skip


def wide(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()}


def cases() -> list[dict[str, Any]]:
    found = [
        {**arguments((2, 5), 6, 2, width, rotary, style, how)}
        for (width, rotary), style, how in itertools.product(WIDTHS, STYLES, ["projected", "heads_first"])
        if (width, how) in ((16, "projected"), (80, "heads_first")) or style.startswith("half")
    ]
    gemma = arguments((1, 3), 4, 1, 256, 256, "half+heads_first", "heads_first")
    return [
        *found,
        {**gemma, "weight_bias": 1.0, "rounding": "cast_last"},
        {**arguments((7,), 9, 3, 128, 128, "half"), "k_weight": None},  # an engine's, without a batch; heads that fill no block
        {**arguments((4,), 9, 3, 64, 32, "half"), "q_weight": None},
        arguments((3, 2), 4, 2, 64, 64, "half", one_table=True),
        arguments((2, 3, 2), 4, 2, 16, 16, "half"),
        arguments((1, 1), 4, 2, 128, 128, "half"),
        arguments((0,), 4, 2, 128, 128, "half"),
    ]


def run(rank: int, world: int) -> int:
    from tpfuse.kernels.rope import qk_norm_rope as launch

    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    for args in cases():
        got = launch(*args.values(), alive=(True, True))
        promised = qk_norm_rope.fake(*args.values())
        for out, want, like in zip(got, qk_norm_rope.reference(**wide(args)), promised, strict=True):
            assert out.stride() == like.stride() and out.dtype == like.dtype
            torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=1e-6)
    args = cases()[0]
    exact = qk_norm_rope.reference(**wide(args))
    for alive in ((True, False), (False, True)):
        for out, want, living in zip(launch(*args.values(), alive=alive), exact, alive, strict=True):
            assert living or out.numel() == 0
            if living:
                torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=1e-6)
    return len(cases())


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_every_style_and_width() -> None:
    assert run_spawned(run, 1, environment=INTERPRET, timeout=280) == [len(cases())]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("width, heads", [(128, (32, 8)), (256, (8, 4)), (64, (16, 8)), (96, (8, 2)), (512, (4, 1))])
def test_compiled(width: int, heads: tuple[int, int]) -> None:
    """Whole 16-byte vectors, and no element of a head moved to another thread."""
    from tpfuse.kernels.rope import qk_norm_rope as launch

    qkv = cuda(64, (heads[0] + 2 * heads[1]) * width)
    q, k, _ = (x.unflatten(-1, (-1, width)) for x in qkv.split([heads[0] * width, heads[1] * width, heads[1] * width], -1))
    table = cuda(64, width)
    args = (q, k, cuda(width), cuda(width), table, table, 1e-6, 0.0, "cast_first", "half")
    (kernel,) = compiled(lambda: launch(*args, alive=(True, True)))
    assert kernel.spilled == 0 and not kernel.shuffles()
    assert "ld.global.v4" in kernel.ptx and "st.global.v4" in kernel.ptx
    assert not any(f"{op}.global.b16" in kernel.ptx for op in ("ld", "st"))
