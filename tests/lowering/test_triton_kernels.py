"""Which Triton kernel serves what, by constructed targets; no GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from tpfuse.ir import fused, registry
from tpfuse.ir.attention import attention_quantize
from tpfuse.ir.op import load
from tpfuse.ir.rope import qk_norm_rope
from tpfuse.lowering.select import Pick, pick
from tpfuse.lowering.table import Entry, Table
from tpfuse.report import Decline
from tpfuse.shim import FakeTensorMode, ShapeEnv
from tpfuse.target import UNBOUNDED, Range, Target

H100 = Target("cuda", 90, 2, True, backends=frozenset({"reference", "triton"}))


def arguments(tokens: int = 4, hidden: int = 4096, dtype: torch.dtype = torch.bfloat16, **others: Any) -> dict[str, Any]:
    x = torch.empty(tokens, hidden, dtype=dtype, device="meta")
    weight = torch.empty(hidden, dtype=dtype, device="meta")
    return {"x": x, "residual": x, "weight": weight, "bias": None, "scale": None, "scheme": "fp8_token", **others}


def test_algorithm_is_left_to_the_launch() -> None:
    found = pick(fused.all_reduce_add_rms_norm_quantize, arguments(), H100, "auto")
    assert isinstance(found, Pick) and found.name == "triton" and found.kernels[0][1].prepare


@pytest.mark.parametrize(
    "args, target, code",
    [
        (arguments(hidden=4100), H100, "hidden_not_multiple_of_8"),
        (arguments(hidden=16392), H100, "hidden_too_large"),
        (arguments(dtype=torch.float32), H100, "dtype"),
        (arguments(residual=torch.empty(4, 4096, device="meta")), H100, "row_dtype"),
        (arguments(scale=torch.empty(4, device="meta")), H100, "scale_shape"),
        (arguments(), Target("cuda", 90, 9, True, backends=H100.backends), "world_size"),
        (arguments(), Target("cuda", 90, 2, False, backends=H100.backends), "no_peer_access"),
        (arguments(), Target("cuda", 80, 2, True, backends=H100.backends), "no_sm_90"),
    ],
)
def test_declines_are_named(args: dict[str, Any], target: Target, code: str) -> None:
    found = pick(fused.all_reduce_add_rms_norm_quantize, args, target, "auto")
    assert isinstance(found, Decline) and found.code == "no_kernel"
    assert f"triton:one_shot, triton:two_shot, triton: {code}" in found.detail  # a reason that several have is told once


def test_one_gpu_kernels() -> None:
    gate = torch.empty(4, 28672, dtype=torch.bfloat16, device="meta")
    args = {"gate": gate, "up": gate, "scale": None, "act": "silu", "scheme": "fp8_token", "layout": "row"}
    assert "no_launch_saved" in str(pick(fused.act_and_mul_quantize, {**args, "scheme": "fp8_tensor"}, H100, "auto"))
    found = pick(fused.act_and_mul_quantize, args, H100, "auto")
    assert isinstance(found, Pick) and found.name == "triton"
    wide = torch.empty(4, 40960, dtype=torch.bfloat16, device="meta")
    found = pick(fused.act_and_mul_quantize, {**args, "gate": wide, "up": wide}, H100, "auto")
    assert isinstance(found, Decline) and "hidden_too_large" in found.detail


def test_every_launcher_exists() -> None:
    pytest.importorskip("triton")
    kernels = [kernel for op in registry.values() for kernel in op.kernels if kernel.backend != "reference"]
    assert len(kernels) > 90
    for kernel in kernels:
        assert callable(load(kernel.launch)) and (not kernel.prepare or callable(load(kernel.prepare)))
    assert not hasattr(importlib.import_module("tpfuse.kernels.two_shot"), "all_reduce")


def heads(width: int = 128, dtype: torch.dtype = torch.bfloat16, **others: Any) -> dict[str, Any]:
    q, k = (torch.empty(1, 7, n, width, dtype=dtype, device="meta") for n in (8, 2))
    weight, table = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ([width], [1, 7, width]))
    return {"q": q, "k": k, "q_weight": weight, "k_weight": weight, "cos": table, "sin": table, "eps": 1e-6, "weight_bias": 0.0,
            "rounding": "cast_first", "style": "half", **others}  # fmt: skip


def test_heads() -> None:
    found = pick(qk_norm_rope, heads(), H100, "auto")
    assert isinstance(found, Pick) and found.name == "triton"


@pytest.mark.parametrize(
    "args, code",
    [
        (heads(1024), "head_dim"),
        (heads(15), "head_dim"),
        (heads(dtype=torch.float32), "dtype"),
        (heads(k=torch.empty(1, 7, 2, 128, dtype=torch.float16, device="meta")), "dtype"),
        (heads(k_weight=torch.empty(128, device="meta")), "weight_dtype"),
        (heads(rounding="cast_last+keep_f32"), "rounding"),
        (heads(q=torch.empty(1, 7, 128, 8, dtype=torch.bfloat16, device="meta").transpose(2, 3)), "strides"),
    ],
)
def test_heads_that_are_declined(args: dict[str, Any], code: str) -> None:
    found = pick(qk_norm_rope, args, H100, "auto")
    assert isinstance(found, Decline) and f"triton: {code}" in found.detail


def attending(tokens: Any = 130, keys: Any = 130, width: int = 128, v_width: int = 128, **others: Any) -> dict[str, Any]:
    def make(heads: int, tokens: Any, width: int) -> torch.Tensor:
        return torch.empty(2, tokens, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    q, k, v = make(8, tokens, width), make(2, keys, width), make(2, keys, v_width)
    return {"q": q, "k": k, "v": v, "mask": None, "scale": None, "softmax_scale": 0.1, "causal": True, "method": "flash",
            "scheme": "fp8_group128", "layout": "row", **others}  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        attending(), attending(width=192), attending(width=64, v_width=64, scheme="nvfp4"), attending(tokens=7, keys=7),
        attending(keys=4096),
    ],
)  # fmt: skip
def test_attention(args: dict[str, Any]) -> None:
    found = pick(attention_quantize, args, H100, "auto")
    assert isinstance(found, Pick) and found.name == "triton"


def test_a_table_says_from_how_many_keys_on_torchs_attention_is_faster() -> None:
    """Whatever the range of tokens: a prompt that is prefilled in parts has more keys than tokens."""
    steps = ((2048 * 128 * 2, "triton:flash"), (None, "triton:sdpa"))
    entries = (
        Entry("attention_quantize", "bfloat16", 1, steps, "fp8_group128", 128, 128),
        Entry("attention_quantize", "bfloat16", 1, ((None, "triton:sdpa"),), "fp8_group128", 128, 192),
    )
    table, alone = Table("", {}, entries), replace(H100, world=1)
    for limits in (Range(1, 256), Range(257, UNBOUNDED)):
        found = pick(attention_quantize, attending(keys=4096), alone, "auto", table, limits)
        assert isinstance(found, Pick) and found.name == "triton:flash<=524288,triton:sdpa"
    launched = []
    for limit, kernel in attention_quantize.find_kernels(found.name):
        launched.append((limit, lambda *args, name=kernel.name, alive: name))
    for keys, want in ((2048, "triton:flash"), (2049, "triton:sdpa")):
        args = attending(tokens=130, keys=keys).values()
        assert attention_quantize._by_size(launched, *args, alive=(True,) * 3) == want
    latent = pick(attention_quantize, attending(width=192), alone, "auto", table, Range(1, 256))
    assert isinstance(latent, Pick) and latent.name == "triton:sdpa"


@pytest.mark.parametrize(
    "args, code",
    [
        (attending(tokens=1, keys=4096), "few_queries"),
        (attending(mask=torch.empty(1, 1, 130, 130, device="meta")), "mask"),
        (attending(width=80), "head_dim"),
        (attending(v_width=64), "head_dim"),  # a group of two heads
        (attending(scheme="fp8_token"), "scale_spans_heads"),
        (attending(scheme="fp8_tensor", scale=torch.empty(8, device="meta")), "scale_shape"),
        (attending(softmax_scale=-0.1), "softmax_scale"),
        (attending(k=torch.empty(2, 2, 130, 128, device="meta")), "dtype"),
        (attending(q=torch.empty(2, 130, 8 * 128 + 4, dtype=torch.bfloat16, device="meta")[..., 4:].unflatten(-1, (8, 128))
                   .transpose(1, 2)), "strides"),
    ],
)  # fmt: skip
def test_attention_that_is_declined(args: dict[str, Any], code: str) -> None:
    found = pick(attention_quantize, args, H100, "auto")
    assert isinstance(found, Decline) and f"triton:flash, triton:sdpa, triton: {code}" in found.detail


def test_token_counts_that_are_symbols() -> None:
    """A prompt of any length, queries and keys being the same tokens; and a range of many queries to a cache."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        own, many, few, cached = (mode.shape_env.create_unbacked_symint() for _ in range(4))
        for symbol, low in ((own, 2), (many, 129), (few, 2), (cached, 2)):
            torch._check(symbol >= low)
        assert isinstance(pick(attention_quantize, attending(own, own), H100, "auto"), Pick)
        assert isinstance(pick(attention_quantize, attending(many, cached), H100, "auto"), Pick)
        found = pick(attention_quantize, attending(few, cached), H100, "auto")
    assert isinstance(found, Decline) and "few_queries" in found.detail
