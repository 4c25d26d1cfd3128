"""An operator's arguments become a call's fields by their names, and a call's outputs its results."""

from __future__ import annotations

import pytest
import torch

from tpfuse.ir import registry
from tpfuse.kernels.calls import ALL_REDUCES, NormCall, call_of, operators

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
    (launch,) = operators(lambda call: call.results(call.outputs()), [name])
    results = launch(*(args[p] for p in op.params), alive=(True,) * op.results)
    assert [(r.shape, r.dtype, r.stride()) for r in results] == [(r.shape, r.dtype, r.stride()) for r in promised]
    dead = launch(*(args[p] for p in op.params), alive=(False,) * op.results)
    assert all(r.numel() == 0 for r in dead)
