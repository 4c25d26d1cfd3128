"""The kernels as Triton's compiler makes them for sm_90: nothing spilled, rows kept where they are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.kernels.compiled import Compiled, compiled, cuda, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SCHEMES = [
    ("", ""), ("fp8_tensor", "row"), ("fp8_token", "row"), ("fp8_group128", "col+tma+ue8m0_packed"),
    ("nvfp4", "swizzled_128x4"),
]  # fmt: skip


def norm_call(hidden: int, scheme: str, layout: str) -> Any:
    from tpfuse.kernels.calls import NormCall

    name = "all_reduce_add_rms_norm" + "_quantize" * bool(scheme)
    scale = cuda(1, dtype=torch.float32) if scheme in ("fp8_tensor", "nvfp4") else None
    return NormCall(
        name, cuda(64, hidden), (bool(scheme), bool(scheme), not scheme, True), cuda(hidden), 1e-6, 0.0, "cast_first", "",
        residual=cuda(64, hidden), scale=scale, scheme=scheme, layout=layout,
    )  # fmt: skip


def channel(hidden: int) -> Any:
    from tpfuse.kernels.channel import Channel
    from tpfuse.kernels.plan import ChannelLayout

    table, state = cuda(2, dtype=torch.int64), cuda(32, dtype=torch.int32)
    return Channel(0, 2, table, state, torch.zeros(8, dtype=torch.int32), 132, ChannelLayout.of(2, 2048, hidden, 2))


def moved_rows(kernel: Compiled, hidden: int) -> list[str]:
    """Layout changes of a whole row; those of its scales are few elements."""
    return [line for line in kernel.shuffles() if max(map(int, re.findall(r"tensor<(\d+)x", line))) >= hidden // 2]


@pytest.mark.parametrize("scheme, layout", SCHEMES, ids=[s or "plain" for s, _ in SCHEMES])
@pytest.mark.parametrize("hidden", [4096, 5120, 8192])
@pytest.mark.parametrize("algorithm", ["local", "one_shot", "two_shot"])
def test_norms(algorithm: str, hidden: int, scheme: str, layout: str) -> None:
    from tpfuse.kernels import allreduce_norm, norm_quant, two_shot
    from tpfuse.kernels.plan import MAX_REGISTERS

    call = norm_call(hidden, scheme, layout)
    if algorithm == "local":
        kernels = compiled(lambda: norm_quant.norm_quantise(call))
    else:
        launch = {"one_shot": allreduce_norm.one_shot, "two_shot": two_shot.two_shot}[algorithm]
        kernels = compiled(lambda: launch(channel(hidden), call))
    assert [(k.spilled, moved_rows(k, hidden)) for k in kernels] == [(0, [])]
    assert kernels[0].registers <= MAX_REGISTERS  # what a grid relies on whose blocks wait for one another


@pytest.mark.parametrize("scheme, layout", SCHEMES[1:], ids=[s for s, _ in SCHEMES[1:]])
def test_activations(scheme: str, layout: str) -> None:
    from tpfuse.kernels import norm_quant

    gate, up = cuda(64, 28672).chunk(2, -1)
    scale = cuda(1, dtype=torch.float32) if scheme in ("fp8_tensor", "nvfp4") else None
    args = (gate, up, scale, "silu", scheme, layout)
    kernels = compiled(lambda: norm_quant.act_and_mul_quantize(*args, alive=(True, True, False)))
    assert [(k.spilled, moved_rows(k, 2048)) for k in kernels] == [(0, [])]


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel with too few registers."""
    from tpfuse.kernels import channel as channels
    from tpfuse.kernels import two_shot

    monkeypatch.setattr(channels, "MAX_REGISTERS", 24)
    (kernel,) = compiled(lambda: two_shot.two_shot(channel(8192), norm_call(8192, "fp8_group128", "row")))
    assert kernel.spilled > 0
