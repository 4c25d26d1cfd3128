"""Norm and quantise as a model spells them: what Inductor compiles in the peers."""

from __future__ import annotations

import torch
from torch import Tensor

from tpfuse.formats import Scheme
from tpfuse.formats.nvfp4 import encode_e2m1, pack

EPS = 1e-6


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(norm, h) of h = x + residual.  x, residual: [tokens, hidden]."""
    h = x if residual is None else x + residual
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype), h


def quantise(y: Tensor, scale: Tensor | None, scheme: str) -> tuple[Tensor, ...]:
    """q and, where it is computed, its scales."""
    wide, kind = y.float(), Scheme.parse(scheme)
    if kind.name == "fp8_tensor":
        return ((wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn),)
    if kind.name == "nvfp4":
        assert scale is not None
        blocks = wide.unflatten(-1, (-1, 16))
        block_scales = (blocks.abs().amax(-1, keepdim=True) / 6 * scale).clamp(max=448).to(torch.float8_e4m3fn)
        widened = block_scales.float()
        codes = encode_e2m1(blocks * torch.where(widened == 0, 0.0, scale / widened))
        return pack(codes.flatten(-2)), block_scales
    blocks = wide.unflatten(-1, (-1, kind.group)) if kind.group else wide.unsqueeze(-2)
    scales = (blocks.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-10)
    return (blocks / scales).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scales.squeeze(-1)


def chain(x: Tensor, residual: Tensor | None, weight: Tensor, scale: Tensor | None, scheme: str) -> tuple[Tensor, ...]:
    """What stands behind the reduction: (norm, h) where scheme is "", else (q, scales where computed, h)."""
    y, h = add_norm(x, residual, weight)
    return (*quantise(y, scale, scheme), h) if scheme else (y, h)


def scale_of(scheme: str, device: str = "cuda") -> Tensor | None:
    """A given scale for norms of about 1; None where the scheme computes its own."""
    value = {"fp8_tensor": 0.03, "nvfp4": 200.0}.get(Scheme.parse(scheme).name)
    return None if value is None else torch.tensor([value], device=device)
