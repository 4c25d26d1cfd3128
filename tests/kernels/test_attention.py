"""The attention kernel in Triton's interpreter, FP32 (see test_allreduce_norm.py), and as it is compiled for sm_90."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.compiled import compiled, cuda, missing
from tests.kernels.interpreted import INTERPRET, run_loops
from tests.kernels.spawned import run_spawned
from tests.kernels.test_allreduce_norm import SCHEMES, check_quantised
from tests.kernels.test_norm_quant import Given
from tpfuse.ir.attention import attention, attention_quantize

WIDTHS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]  # of queries and keys, of values


def arguments(
    batch: int, heads: tuple[int, int], tokens: int, keys: int, width: int, v_width: int, causal: bool, scheme: str,
    layout: str, how: str = "transposed", dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """how: "transposed" (tokens before heads in memory, as projections leave them) or "cache" (k and v the first tokens of
    a longer buffer, heads first)."""
    generator = torch.Generator().manual_seed(batch + 3 * tokens + 5 * keys + width)

    def make(heads: int, tokens: int, width: int) -> Tensor:
        x = torch.randn(batch, tokens, heads, width, generator=generator).to(device, dtype).transpose(1, 2)
        if how == "cache":
            buffer = torch.full([batch, heads, tokens + 3, width], torch.nan, device=device, dtype=dtype)
            buffer[:, :, :tokens] = x
            return buffer[:, :, :tokens]
        return x

    q, k, v = make(heads[0], tokens, width), make(heads[1], keys, width), make(heads[1], keys, v_width)
    size = {"fp8_tensor": 2 / 448, "nvfp4": 448 * 6 / 4}.get(scheme.partition(":")[0])
    scale = None if size is None else torch.tensor([1 / size if ":" in scheme else size], device=device)
    method = "math+repeat" if heads[0] != heads[1] else "math"
    return {"q": q, "k": k, "v": v, "mask": None, "scale": scale, "softmax_scale": 1.3 * width**-0.5, "causal": causal,
            "method": method, "scheme": scheme, "layout": layout}  # fmt: skip


def exact(args: dict[str, Any]) -> Tensor:
    """The attention in float64."""
    names = ("q", "k", "v", "mask", "softmax_scale", "causal", "method")
    return attention.reference(*(x.double() if isinstance(x, Tensor) else x for x in (args[n] for n in names)))


def fits(scheme: str, v_width: int) -> bool:
    """Whether a group lies within a head."""
    group = {"fp8_group128": 128, "fp8_group64": 64, "nvfp4": 16}.get(scheme.partition(":")[0], 1)
    return scheme != "fp8_token" and v_width % group == 0


def cases() -> list[dict[str, Any]]:
    turns = itertools.cycle([(True, (4, 2)), (False, (3, 3)), (True, (5, 1))])
    found = []
    for (scheme, layout), (width, v_width) in itertools.product(SCHEMES[1:], [(64, 64), (192, 128)]):
        if fits(scheme, v_width):
            causal, heads = next(turns)
            found.append(arguments(2, heads, 5, 5, width, v_width, causal, scheme, layout))
    return [
        *found,
        *(arguments(1, (2, 1), 3, 3, *w, True, "nvfp4", "swizzled_128x4") for w in WIDTHS),
        arguments(1, (3, 1), 3, 3, 96, 96, True, "nvfp4", "swizzled_8x4"),  # 18 groups: half a tile of padding
        arguments(1, (3, 1), 4, 4, 64, 64, True, "fp8_group64", "row+ue8m0_packed"),  # three heads to a word
        arguments(1, (2, 1), 200, 200, 64, 64, True, "fp8_group64", "col+tma"),  # two blocks of queries
        arguments(1, (1, 1), 150, 300, 64, 64, False, "fp8_tensor", "row"),  # whole blocks of keys
        arguments(1, (1, 1), 300, 150, 64, 64, True, "fp8_tensor", "row"),  # queries behind the last key
        arguments(1, (1, 1), 130, 270, 64, 64, True, "fp8_group64", "row", "cache"),
        arguments(2, (2, 2), 7, 19, 128, 128, False, "fp8_group128", "row", "cache"),
    ]  # fmt: skip


def run(rank: int, world: int) -> int:
    from tpfuse.kernels.attention import flash, sdpa

    run_loops()
    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    for index, args in enumerate(2 * cases()):
        launch = flash if index < len(cases()) else sdpa
        alive = (True, True, index % 3 != 1)
        q, scales, out = launch(*args.values(), alive=alive)
        want = exact(args)
        promised = attention_quantize.fake(*args.values())
        for got, like in zip((q, scales), promised, strict=False):
            assert got.shape == like.shape and got.stride() == like.stride() and got.dtype == like.dtype
        check_quantised(q, scales, want, Given(args["scale"], args["scheme"], args["layout"]))
        assert alive[2] or out.numel() == 0
        if alive[2]:
            torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-6)
    return len(cases())


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_every_scheme_and_width() -> None:
    assert run_spawned(run, 1, environment=INTERPRET, timeout=280) == [len(cases())]


@pytest.mark.parametrize("width, keys, name", [
    (64, 8192, "flash"), (64, 8193, "sdpa"), (96, 3072, "flash"), (128, 3073, "sdpa"), (192, 2049, "sdpa"), (256, 2048, "flash"),
])  # fmt: skip
def test_many_keys_take_torchs_attention(monkeypatch: pytest.MonkeyPatch, width: int, keys: int, name: str) -> None:
    """From as many on as are measured to be too many, by the width of a head."""
    from tpfuse.kernels import attention

    for one in ("flash", "sdpa"):
        monkeypatch.setattr(attention, one, lambda *args, alive, one=one: one)
    q = torch.empty(1, 8, keys, width, device="meta")
    assert attention.attention_quantize(q, q[:, :2], q[:, :2], alive=(True, True, False)) == name


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("width, v_width", WIDTHS)
@pytest.mark.parametrize(
    "scheme, layout", [("fp8_tensor", "row"), ("fp8_group64", "col+tma+ue8m0_packed"), ("nvfp4", "swizzled_128x4")]
)
def test_compiled(width: int, v_width: int, scheme: str, layout: str) -> None:
    """Nothing spilled; tiles come by TMA and are multiplied where they lie."""
    if not fits(scheme, v_width):
        return
    from tpfuse.kernels.attention import flash as launch

    q, k, v = (cuda(2, 256, h, w).transpose(1, 2) for h, w in ((8, width), (2, width), (2, v_width)))
    scale = cuda(1, dtype=torch.float32)
    (kernel,) = compiled(lambda: launch(q, k, v, None, scale, 0.1, True, "flash", scheme, layout, alive=(True, True, False)))
    assert kernel.spilled == 0 and kernel.shared <= 227 * 1024
    if max(width, v_width) == 128:
        assert 2 * kernel.shared <= 227 * 1024  # two blocks a multiprocessor
    assert "cp.async.bulk.tensor.4d" in kernel.ptx and "wgmma.mma_async" in kernel.ptx
    assert "ttg.local_store" not in kernel.ttgir


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("scheme, layout", [("fp8_tensor", "row"), ("fp8_group128", "col+tma"), ("nvfp4", "swizzled_128x4")])
def test_what_quantises_other_attention_is_one_kernel(scheme: str, layout: str) -> None:
    from tpfuse.kernels.attention import quantised_heads

    y, scale = cuda(2, 256, 8, 128).transpose(1, 2), cuda(1, dtype=torch.float32)
    (kernel,) = compiled(lambda: quantised_heads(y, scale, scheme, layout))
    assert kernel.spilled == 0 and "ld.global.v4" in kernel.ptx
