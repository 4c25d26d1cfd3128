"""The attention kernel in bf16 and fp16, every scheme, against float64 and the unfused graph's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_allreduce_norm import SCHEMES
from tests.kernels.test_attention import WIDTHS, arguments, exact, fits
from tpfuse.formats import dequantize, quantize
from tpfuse.ir.attention import attention_quantize

pytest.importorskip("triton")

# Batch, heads of q and of k, queries, keys, causal, how k and v lie in memory.
SHAPES: list[tuple[int, tuple[int, int], int, int, bool, str]] = [
    (1, (8, 2), 300, 300, True, "transposed"),
    (2, (4, 4), 7, 7, True, "transposed"),
    (3, (5, 1), 128, 1000, False, "cache"),
    (1, (3, 1), 257, 130, True, "cache"),
]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def peer(args: dict[str, Any]) -> str:
    """torch's fastest attention that can do the same: its flash attention wants as many queries as keys, and one width."""
    q, k, v = args["q"], args["k"], args["v"]
    same = q.shape[3] == v.shape[3] and (q.shape[2] == k.shape[2] or not args["causal"])
    return "flash" if same else "efficient"


def check(args: dict[str, Any]) -> None:
    from tpfuse.kernels.attention import attention_quantize as launch

    scale, scheme, layout = args["scale"], args["scheme"], args["layout"]
    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    q, scales, out = launch(*args.values(), alive=(True, True, True))
    torch.use_deterministic_algorithms(False)
    plain_q, plain_scales, plain = attention_quantize.reference(**{**args, "method": args["method"].replace("math", peer(args))})
    want = exact(args)
    assert error(out, want) <= 1.25 * error(plain, want)
    for got, unfused in ((q, plain_q), (scales, plain_scales)):
        assert got.shape == unfused.shape and got.stride() == unfused.stride() and got.dtype == unfused.dtype
    unfused = dequantize(plain_q, plain_scales, scale, scheme, layout)
    assert error(dequantize(q, scales, scale, scheme, layout), want) <= 1.25 * error(unfused, want)
    # Padding: what quantising the same values would leave there.
    _, filled = quantize(out, scale, scheme, layout)
    if scales.dtype == torch.float8_e4m3fn:
        assert torch.equal(scales.float() == 0, filled.float() == 0)
    elif scales.dtype == torch.int32:
        bytes_ = [s.contiguous().view(-1).view(torch.uint8) == 0 for s in (scales, filled)]
        assert torch.equal(*bytes_)


@pytest.mark.parametrize(
    "scheme, layout, dtype",
    [*((*s, torch.bfloat16) for s in SCHEMES[1:] if fits(s[0], 128)), ("fp8_tensor", "row", torch.float16)],
)
def test_schemes(scheme: str, layout: str, dtype: torch.dtype) -> None:
    for batch, heads, tokens, keys, causal, how in SHAPES:
        check(arguments(batch, heads, tokens, keys, 128, 128, causal, scheme, layout, how, dtype, "cuda"))


@pytest.mark.parametrize("width, v_width", WIDTHS)
def test_widths(width: int, v_width: int) -> None:
    for scheme, layout in (("fp8_tensor", "row"), ("fp8_group64", "col+tma+ue8m0_packed"), ("nvfp4", "swizzled_128x4")):
        if not fits(scheme, v_width):
            continue
        for batch, heads, tokens, keys, causal, how in SHAPES:
            args = arguments(batch, heads, tokens, keys, width, v_width, causal, scheme, layout, how, torch.bfloat16, "cuda")
            check(args)


def launched(fn: Any) -> list[str]:
    """The kernels of a call."""
    fn()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        fn()
        torch.cuda.synchronize()
    return [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]


def test_one_launch() -> None:
    from tpfuse.kernels.attention import attention_quantize as launch

    args = arguments(1, (8, 2), 300, 300, 128, 128, True, "fp8_group128", "row", dtype=torch.bfloat16, device="cuda")
    assert launched(lambda: launch(*args.values(), alive=(True, True, False))) == ["attention_kernel"]


@pytest.mark.parametrize("scheme, layout", [("fp8_tensor", "row"), ("fp8_group128", "col+tma"), ("nvfp4", "swizzled_128x4")])
def test_long_prompts_take_torchs_attention(scheme: str, layout: str) -> None:
    from tpfuse.kernels.attention import attention_quantize as launch
    from tpfuse.kernels.attention import most_keys

    tokens = most_keys(128) + 57
    args = arguments(1, (4, 2), tokens, tokens, 128, 128, True, scheme, layout, dtype=torch.bfloat16, device="cuda")
    check(args)
    *_, last = names = launched(lambda: launch(*args.values(), alive=(True, True, False)))
    assert last == "quantise_heads_kernel" and len(names) == 2


def test_compiled_model_picks_it() -> None:
    """From a model's spelling to the kernel: causal attention, rows quantised by a given scale."""
    import tpfuse

    scale = torch.tensor(2 / 448, device="cuda")

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        rows = out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)
        return (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    args = arguments(1, (8, 2), 300, 300, 128, 128, True, "fp8_tensor", "row", dtype=torch.bfloat16, device="cuda")
    compiled = tpfuse.compile(model)
    with torch.no_grad():
        got, plain = (fn(args["q"], args["k"], args["v"]).float() * scale for fn in (compiled, model))
    assert compiled.report.counts() == {"attention_quantize": 1}
    want = exact({**args, "softmax_scale": 128**-0.5})
    assert error(got, want) <= 1.25 * error(plain, want)
