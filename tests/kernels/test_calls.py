"""An operator's arguments become a call's fields by their names, and a call's outputs its results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpfuse.ir import registry
from tpfuse.kernels.calls import ALL_REDUCES, NormCall, call_of, launchers
from tpfuse.kernels.channel import Channel
from tpfuse.kernels.plan import ChannelLayout

LOCAL = ("rms_norm", "add_rms_norm", "rms_norm_quantize", "add_rms_norm_quantize")
SHAPE = {"tokens": 4, "hidden": 64, "dtype": torch.bfloat16, "group": "tp"}


@pytest.mark.parametrize("name", [*ALL_REDUCES, *LOCAL])
def test_arguments_by_name(name: str) -> None:
    op = registry[name]
    args = op.sample(**{k: v for k, v in SHAPE.items() if k != "group" or op.collective})
    call = call_of(NormCall, name, [args[p] for p in op.params], (True,) * op.results)
    assert call.operator == name and call.sandwich == ("weight2" in op.params)
    for field, value in args.items():
        assert getattr(call, field) is value or getattr(call, field) == value, field
    assert call.quantised == ("scheme" in op.params)


@pytest.mark.parametrize("name", ALL_REDUCES)
def test_results_are_the_operators(name: str) -> None:
    op = registry[name]
    args = op.sample(**SHAPE)
    promised = op.fake(**args)
    launch = launchers(lambda call: call.results(call.outputs()))(name)
    results = launch(*(args[p] for p in op.params), alive=(True,) * op.results)
    assert [(r.shape, r.dtype, r.stride()) for r in results] == [(r.shape, r.dtype, r.stride()) for r in promised]
    dead = launch(*(args[p] for p in op.params), alive=(False,) * op.results)
    assert all(r.numel() == 0 for r in dead)


def test_operands_are_whole_vectors() -> None:
    """A weight that is a part of a larger tensor begins anywhere."""
    whole = torch.randn(3 * 64 + 1).bfloat16()
    parts = [whole[1 + 64 * i : 65 + 64 * i] for i in range(3)]
    bias, weight, weight2 = parts
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    scale = torch.rand(3)[1]
    call = NormCall("", x, (False, False, True, True), weight, 1e-6, 0.0, "cast_first", bias=bias, weight2=weight2, scale=scale)
    assert call.given()[4] is scale  # a copy would be a launch of its own
    for given, own in zip(call.given()[1:4], parts, strict=True):
        assert given is not None and given.data_ptr() % 16 == 0 and torch.equal(given, own)


@pytest.mark.parametrize("algorithm", ["allreduce_norm", "two_shot"])
def test_a_call_finds_its_memory_before_its_first_launch(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    """Else one that fails in the midst of its launches would leave this rank ahead of the others."""
    import importlib

    module = importlib.import_module(f"tpfuse.kernels.{algorithm}")
    launch, kernel = {"allreduce_norm": ("one_shot", "one_shot_kernel"), "two_shot": ("two_shot", "two_shot_kernel")}[algorithm]
    residuals: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda x, residual, *args, **flags: residuals.append(residual)

    monkeypatch.setattr(module, kernel, Kernel())
    channel = Channel.create(0, 2, ChannelLayout.of(2, 2, 64, 2), torch.device("cpu"), 132, 1.0)
    x, residual = torch.zeros(7, 64, dtype=torch.bfloat16), torch.zeros(64, 7, dtype=torch.bfloat16).t()  # to be copied
    call = NormCall("all_reduce_add_rms_norm", x, (False, False, True, True), None, 1e-6, 0.0, "cast_first", residual=residual)
    getattr(module, launch)(channel, call)
    assert len(residuals) >= 4 and all(r is residuals[0] for r in residuals)
