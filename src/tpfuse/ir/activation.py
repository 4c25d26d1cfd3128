"""Gated activations of an MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse.ir.op import op
from tpfuse.ir.samples import rows

ACTIVATIONS = ("silu", "gelu_tanh")


def _fake(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _sample(**shape: Any) -> dict[str, Any]:
    scale = 700.0  # values of about 2: where the activation bends
    return {
        "gate": rows(**shape) * scale,
        "up": rows(**{**shape, "seed": shape.get("seed", 0) + 1}) * scale,
        "act": shape.get("act", "silu"),
    }


@op(sample=_sample, fake=_fake, row_args=("gate", "up"))
def act_and_mul(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) · up, the activation in FP32 and rounded to gate's dtype before the product.

    gate, up: [..., width] → [..., width], contiguous.  act: "silu" (x / (1 + e^-x)) or "gelu_tanh" (Hendrycks & Gimpel 2016,
    arXiv:1606.08415, the tanh form).
    """
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if act == "silu":
        y = wide / (1 + torch.exp(-wide))
    elif act == "gelu_tanh":
        inner = 0.7978845608028654 * (wide + 0.044715 * (wide * wide * wide))
        y = 0.5 * wide * (1 + torch.tanh(inner))
    else:
        raise ValueError(f"unknown activation {act!r}: one of {ACTIVATIONS}")
    return (y.to(gate.dtype) * up).contiguous()
