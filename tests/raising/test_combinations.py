"""Every way to combine the places where a norm may cast, round and add: whatever is raised must stay exact."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from tests.raising.capture import raised

HIDDEN = 64
CHOICES = {
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "weight_dtype": ("same", torch.float32, torch.bfloat16, None),
    "cast_unit": (True, False),  # to the model's dtype before the weight
    "widen_unit": (True, False),  # and up again
    "widen_weight": (True, False),
    "bias": (None, "before", "after"),  # 1 + weight before or after the weight is widened
    "last_cast": (None, "model", torch.float32),
    "weight_first": (True, False),
    "second_user": (None, "unit", "result"),
}


def model(choice: dict, x: Tensor, w: Tensor | None) -> tuple[Tensor, ...]:
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    if choice["cast_unit"]:
        unit = unit.to(x.dtype)
    out = unit.float() if choice["widen_unit"] else unit
    if w is not None:
        if choice["bias"] == "before":
            w = 1 + w
        if choice["widen_weight"]:
            w = w.float()
        if choice["bias"] == "after":
            w = w + 1.0
        out = w * out if choice["weight_first"] else out * w
    if choice["last_cast"] is not None:
        out = out.to(x.dtype if choice["last_cast"] == "model" else choice["last_cast"])
    extra = {"unit": unit, "result": out}.get(choice["second_user"])
    return (out.exp(),) if extra is None else (out.exp(), extra.tanh())


def combinations() -> list[dict]:
    every = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    return random.Random(0).sample(every, 32)


@pytest.mark.parametrize("choice", combinations(), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_combination(choice: dict) -> None:
    x = (torch.randn(24, HIDDEN) * 3e-3).to(choice["dtype"])
    kind = choice["weight_dtype"]
    weight = None if kind is None else (torch.rand(HIDDEN) * 2.75 + 0.25).to(choice["dtype"] if kind == "same" else kind)
    found = raised(
        lambda *args: model(choice, args[0], args[1] if len(args) > 1 else None), x, *([] if weight is None else [weight])
    )
    (norm,) = found.named("rms_norm")
    assert norm["eps"] == 1e-6 and norm["x"].op == "placeholder" and not found.events
