"""Gated activations raised in the form that torch decomposes them to, and the forms that only look alike."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.raising.capture import raised

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(dtype: torch.dtype, width: int = 48) -> Tensor:
    return (torch.randn(24, width) * 2).to(dtype)


def halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, -1)


POSITIVE = {
    "silu": lambda g, u: F.silu(g) * u,
    "silu, up first": lambda g, u: u * F.silu(g),
    "silu of a fused tensor": lambda g, u: F.silu(halves(g)[0]) * halves(g)[1],
    "silu of slices": lambda g, u: F.silu(g[:, :24]) * g[:, 24:],
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "gelu_tanh of a fused tensor": lambda g, u: halves(g)[1] * F.gelu(halves(g)[0], approximate="tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POSITIVE)
def test_spelling(name: str, dtype: torch.dtype) -> None:
    (product,) = raised(POSITIVE[name], rows(dtype), rows(dtype)).named("act_and_mul")
    assert product["act"] == name.split(",")[0].split(" ")[0]


NEGATIVE = {
    "another slope": lambda g, u: (g.float() / (1 + torch.exp(-1.702 * g.float()))).to(g.dtype) * u,
    "sigmoid": lambda g, u: g * torch.sigmoid(g) * u,
    "exact gelu": lambda g, u: F.gelu(g) * u,
    "no rounding before the product": lambda g, u: (g.float() / (1 + torch.exp(-g.float())) * u.float()).to(g.dtype),
    "used twice": lambda g, u: (F.silu(g), F.silu(g).exp()),
    "broadcast": lambda g, u: F.silu(g) * u[:, :1],
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_left_alone(name: str) -> None:
    assert not raised(NEGATIVE[name], rows(torch.bfloat16), rows(torch.bfloat16)).named("act_and_mul")
