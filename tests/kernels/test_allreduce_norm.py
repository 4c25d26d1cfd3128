"""The collective norm kernels in Triton's interpreter: real protocol, several processes over shared memory, FP32.

FP32 and FP16 only: the interpreter rounds bf16 and FP8 its own way, so quantised values are checked to within a step.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import INTERPRET, shared_channel
from tests.kernels.spawned import run_spawned
from tpfuse.formats import Scheme, dequantize, quantize
from tpfuse.ir.samples import rows, vector
from tpfuse.report import FusionError

WORLDS = (2, 3, 4)
SCHEMES = [
    ("", ""), ("fp8_tensor", "row"), ("fp8_tensor:mul", "row"), ("fp8_token", "row"), ("fp8_group128", "row"),
    ("fp8_group128", "col"), ("fp8_group64", "col+tma"), ("fp8_group128", "row+ue8m0"),
    ("fp8_group64", "col+tma+ue8m0_packed"), ("nvfp4", "linear"), ("nvfp4", "swizzled_128x4"),
    ("nvfp4", "swizzled_8x4"), ("nvfp4:div", "linear"),
]  # fmt: skip
SIZES = [(1, 512), (7, 208)]  # tokens, hidden


def normalised(h: Tensor, weight: Tensor | None, eps: float, weight_bias: float) -> Tensor:
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight.double() + weight_bias)


def expected(call: Any, world: int, tokens: int, hidden: int, seed: int) -> tuple[Tensor, Tensor]:
    """(norm, h) in float64."""
    parts = [rows(tokens=tokens, hidden=hidden, seed=seed, rank=r).to(call.x.dtype).double() for r in range(world)]
    h = torch.stack(parts).sum(0)
    if call.bias is not None:
        h = h + call.bias.double()
    h = h * call.alpha
    if call.sandwich:
        h = normalised(h, call.weight, call.eps, call.weight_bias)
    if call.residual is not None:
        h = h + call.residual.double()
    if call.sandwich:
        return normalised(h, call.weight2, call.eps2, call.weight_bias), h
    return normalised(h, call.weight, call.eps, call.weight_bias), h


def check_quantised(q: Tensor, scales: Tensor, norm: Tensor, call: Any) -> None:
    _, want = quantize(norm.float(), call.scale, call.scheme, call.layout)
    assert scales.shape == want.shape and scales.stride() == want.stride() and scales.dtype == want.dtype
    if scales.dtype == torch.float32:
        torch.testing.assert_close(scales, want, rtol=1e-5, atol=0)
    elif scales.dtype == torch.int32:
        assert torch.equal(scales, want)
    else:  # e4m3
        near = (scales.view(torch.int8).int() - want.view(torch.int8).int()).abs() <= 1
        assert near.float().mean() > 0.85
        assert torch.equal(scales.float() == 0, want.float() == 0)  # padding
    values = dequantize(q, scales, call.scale, call.scheme, call.layout)
    # The interpreter's FP8 conversion truncates, and halves what should round up to a power of two.
    if Scheme.parse(call.scheme).is_fp8:
        step = norm.abs() / 7 + norm.abs().amax() / 448 * 2**-6
    else:
        blocks = norm.abs().unflatten(-1, (-1, 16))
        step = (blocks.amax(-1, keepdim=True) / 5).expand(blocks.shape).flatten(-2)
    assert ((values - norm).abs() <= step).float().mean() > 0.9
    assert ((values - norm).abs() <= step + norm.abs() * 0.6).all()


def run_cases(rank: int, world: int, folder: str, cases: list[dict[str, Any]], algorithm: str) -> int:
    """Make the calls one after another on one channel; the number of calls checked."""
    from tpfuse.kernels import allreduce_norm
    from tpfuse.kernels.calls import NormCall

    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    launch = allreduce_norm.one_shot
    if algorithm == "two_shot":
        from tpfuse.kernels.two_shot import two_shot as launch
    channel, _maps = shared_channel(rank, world, folder, 6, 1024, 4)  # seven tokens take two launches
    for seed, case in enumerate(cases):
        tokens, hidden, dtype = case["tokens"], case["hidden"], getattr(torch, case.get("dtype", "float32"))
        shape = {"tokens": tokens, "hidden": hidden, "dtype": dtype, "seed": seed}
        given = case["scheme"].startswith(("fp8_tensor", "nvfp4"))
        scale = {"fp8_tensor": 0.05, "nvfp4": 30.0}.get(case["scheme"].split(":")[0], 1.0)
        call = NormCall(
            case["operator"], rows(**shape, rank=rank), case["alive"],
            vector(**shape) if case["weight"] else None, 3e-6, case["weight_bias"], case.get("rounding", "cast_first"),
            residual=rows(**{**shape, "seed": 100 + seed}) if case["residual"] else None,
            bias=vector(**{**shape, "seed": 5}) * 2e-3 if case["bias"] else None, alpha=case["alpha"],
            weight2=vector(**{**shape, "seed": 9}) if case["sandwich"] else None, eps2=2e-6, sandwich=case["sandwich"],
            scale=torch.tensor([1 / scale if ":" in case["scheme"] else scale]) if given else None,
            scheme=case["scheme"], layout=case["layout"],
        )  # fmt: skip
        out = launch(channel, call)
        norm, h = expected(call, world, tokens, hidden, seed)
        tolerance = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-5}
        for got, want, alive in ((out.norm, norm, case["alive"][2]), (out.reduced, h, case["alive"][3])):
            assert alive or got.numel() == 0
            if alive:
                torch.testing.assert_close(got.double(), want, **tolerance)
        if call.quantised:
            check_quantised(out.q, out.scales, norm, call)
    return len(cases)


def product(schemes: list[tuple[str, str]], sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Every scheme with every size, the other properties taking turns."""
    names = ("residual", "bias", "weight", "weight_bias", "alpha")
    turns = itertools.cycle(
        [
            (True, False, True, 0.0, 1.0),
            (False, False, True, 1.0, 1.0),
            (True, True, True, 0.0, 0.22),
            (False, True, False, 0.0, 1.0),
        ]
    )
    cases: list[dict[str, Any]] = []
    for (scheme, layout), (tokens, hidden) in itertools.product(schemes, sizes):
        properties = dict(zip(names, next(turns), strict=True))
        name = "all_reduce_add_rms_norm" if properties["residual"] else "all_reduce_rms_norm"
        quantised = bool(scheme)
        cases.append(
            {
                **properties, "operator": name + "_quantize" * quantised, "scheme": scheme, "layout": layout,
                "tokens": tokens, "hidden": hidden, "sandwich": False,
                "alive": (quantised, quantised, not quantised or len(cases) % 2 == 0, len(cases) % 3 != 0),
            }
        )  # fmt: skip
    return cases


SANDWICH = {
    "operator": "all_reduce_rms_norm_add_rms_norm", "residual": True, "bias": False, "weight": True, "weight_bias": 1.0,
    "alpha": 1.0, "scheme": "", "layout": "", "sandwich": True, "alive": (False, False, True, True),
}  # fmt: skip
QUANTISED = {
    "operator": "all_reduce_rms_norm_add_rms_norm_quantize", "scheme": "fp8_group64", "layout": "row",
    "alive": (True, True, False, True),
}  # fmt: skip


def fitting(scheme: tuple[str, str], sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [size for size in sizes if not (scheme[0].startswith("nvfp4") and size[1] % 16)]


def all_cases() -> list[dict[str, Any]]:
    """Every scheme with every size; the sandwich; FP16; a norm that stays in FP32."""
    half = {**product([("", "")], [(3, 512)])[0], "dtype": "float16"}
    return [
        *(case for scheme in SCHEMES for case in product([scheme], fitting(scheme, SIZES))),
        {**SANDWICH, "tokens": 3, "hidden": 200},
        {**SANDWICH, **QUANTISED, "tokens": 3, "hidden": 208},
        {**half, "alive": (False, False, True, True)},
        {**half, "alive": (False, False, True, False), "rounding": "cast_first+keep_f32"},
        {**SANDWICH, "tokens": 2, "hidden": 512, "dtype": "float16"},
        {**half, "tokens": 0, "dtype": "float32", "alive": (False, False, True, True)},
        {**half, "tokens": 2, "dtype": "float32", "alive": (False, False, True, True)},
    ]


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_every_scheme_and_size(tmp_path: Path, world: int, algorithm: str) -> None:
    cases = all_cases()
    counts = run_spawned(run_cases, world, str(tmp_path), cases, algorithm, environment=INTERPRET, timeout=280)
    assert counts == [len(cases)] * world


def give_up(rank: int, world: int, folder: str, algorithm: str) -> str:
    """Every rank but the last waits for it in vain."""
    from tpfuse.kernels import allreduce_norm, calls, two_shot

    channel, _maps = shared_channel(rank, world, folder, 6, 1024, 4, timeout=0.02)
    if rank == world - 1:
        return ""
    module = {"one_shot": allreduce_norm.one_shot, "two_shot": two_shot.two_shot}[algorithm]
    x = rows(tokens=1, hidden=512, rank=rank)
    with pytest.raises(FusionError) as raised:
        module(channel, calls.NormCall("all_reduce_rms_norm", x, (False, False, True, True), None, 1e-6, 0.0, "cast_first"))
    return str(raised.value)


@pytest.mark.ranks
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_a_wait_in_vain_names_the_missing_rank(tmp_path: Path, algorithm: str) -> None:
    said = run_spawned(give_up, 2, str(tmp_path), algorithm, environment=INTERPRET)
    assert said[0].startswith("all_reduce_rms_norm: rank 0 waited in vain for rank 1 (call 0 of its channel)")
