"""A Llama-shaped stack of layers, one rank's shard with random weights: what end-to-end figures are measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """heads, kv_heads: of the whole model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    def check(self, world: int) -> str | None:
        """Why that many ranks cannot share it, or None."""
        for name in ("intermediate", "heads", "kv_heads"):
            if getattr(self, name) % world:
                return f"{name} = {getattr(self, name)} is no multiple of {world}"
        return None


SHAPES = {"8b": Shape(4096, 14336, 32, 8), "70b": Shape(8192, 28672, 64, 8)}  # Llama 3's


class Layer(nn.Module):
    """Fused qkv and gate-up projections, no rotary embedding: what surrounds the collectives, at its real sizes."""

    def __init__(self, shape: Shape, world: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads // world, shape.kv_heads // world, shape.head_dim
        inner, wide = self.heads * self.head_dim, shape.intermediate // world
        sizes = {
            "qkv": (inner + 2 * self.kv_heads * self.head_dim, shape.hidden), "out": (shape.hidden, inner),
            "gate_up": (2 * wide, shape.hidden), "down": (shape.hidden, wide),
        }  # fmt: skip
        for name, (rows, cols) in sizes.items():
            weight = torch.randn(rows, cols, dtype=dtype, device=device) * cols**-0.5
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for name in ("norm1", "norm2"):
            self.register_parameter(name, nn.Parameter(torch.rand(shape.hidden, dtype=dtype, device=device) + 0.5, False))

    def attend(self, x: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """x: [tokens, hidden].  With keys, values [tokens, kv_heads, cached, head_dim], each token is a sequence of its own that
        reads them; without, the tokens are one sequence."""
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = F.linear(x, self.qkv).split(sizes, -1)
        if keys is None or values is None:
            q, k, v = (t.view(1, x.shape[0], -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            keys[:, :, -1] = k.view(x.shape[0], -1, self.head_dim)
            values[:, :, -1] = v.view(x.shape[0], -1, self.head_dim)
            q = q.view(x.shape[0], self.heads, 1, self.head_dim)
            y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return F.linear(y.reshape(x.shape[0], -1), self.out)

    def feed(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


class Stack(nn.Module):
    """`reduce` sums rows over the ranks; the identity makes the stack without collectives, whose distance is the room."""

    def __init__(self, shape: Shape, layers: int, world: int, dtype: torch.dtype, device: str = "cuda") -> None:
        super().__init__()
        self.shape, self.world = shape, world
        self.layers = nn.ModuleList(Layer(shape, world, dtype, device) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden, dtype=dtype, device=device), False)

    def run(self, x: Tensor, caches: list[tuple[Tensor, Tensor]] | None, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            keys, values = caches[i] if caches else (None, None)
            x = x + reduce(layer.attend(self.normed(x, layer.norm1), keys, values))
            x = x + reduce(layer.feed(self.normed(x, layer.norm2)))
        return self.normed(x, self.norm)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), weight, EPS)

    def caches(self, tokens: int, cached: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of `cached` positions for `tokens` sequences, the last position for the new token."""
        size = (tokens, self.shape.kv_heads // self.world, cached, self.shape.head_dim)

        def cache() -> Tensor:
            return torch.randn(size, dtype=self.norm.dtype, device=self.norm.device)

        return [(cache(), cache()) for _ in self.layers]
