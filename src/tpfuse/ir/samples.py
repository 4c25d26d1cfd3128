"""Random arguments that let a test see: small values (an epsilon shows), weights away from 1, other data on each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows(
    *, tokens: int, hidden: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, rank: int = 0, **_: Any
) -> Tensor:
    """[tokens, hidden] of about 3e-3, so that an epsilon of 1e-6 is a tenth of the mean square."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(tokens, hidden, generator=generator) * 3e-3).to(device, dtype)


def vector(*, hidden: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **_: Any) -> Tensor:
    """[hidden] between 0.25 and 3, the same on every rank."""
    generator = torch.Generator().manual_seed(7000 + seed)
    return (torch.rand(hidden, generator=generator) * 2.75 + 0.25).to(device, dtype)
