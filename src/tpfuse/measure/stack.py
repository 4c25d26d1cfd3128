"""Stacks of layers shaped like well-known models, one rank's shard with random weights: what end-to-end figures are measured on.

What surrounds the collectives has its real sizes; what does not move a byte between ranks and is small (rotary embedding) is left
out, so is what is not in the layers (embedding, vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpfuse.measure.forms import Form
from tpfuse.measure.linears import Linear, Rows, gathered

EPS = 1e-5
Cache = tuple[Tensor, ...]


@dataclass(frozen=True)
class Latent:
    """Widths of multi-head latent attention: of the queries' and the keys' and values' latents, and of a head's parts."""

    query: int
    kv: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Shape:
    """heads, kv_heads: of the whole model.  gemma: norms behind attention and feed-forward too, all with weights one less, and
    GELU.  latent: attention is multi-head latent attention (then kv_heads and head_dim are not used)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    gemma: bool = False
    latent: Latent | None = None

    def check(self, world: int) -> str | None:
        """Why that many ranks cannot share it, or None."""
        for name in ("intermediate", "heads", "kv_heads"):
            if getattr(self, name) % world:
                return f"{name} = {getattr(self, name)} is no multiple of {world}"
        return None


SHAPES = {
    "8b": Shape(4096, 14336, 32, 8),  # Llama 3's
    "70b": Shape(8192, 28672, 64, 8),
    "gemma": Shape(4608, 36864, 32, 16, gemma=True),  # Gemma 2 27B's
    "mla": Shape(7168, 18432, 128, 128, latent=Latent(1536, 512, 128, 64, 128)),  # DeepSeek-V3's dense layers
}
LAYERS = {"8b": 32, "70b": 80, "gemma": 46, "mla": 61}  # of the models


@dataclass(frozen=True)
class Making:
    """How the weights of a rank's shard are made."""

    shape: Shape
    world: int
    scheme: str
    dtype: torch.dtype
    device: str

    def linear(self, rows: int, cols: int) -> Linear:
        return Linear(rows, cols, self.scheme, self.dtype, self.device)

    def norm(self, size: int) -> Norm:
        return Norm(size, self.shape.gemma, self.dtype, self.device)


class Norm(nn.Module):
    """RMSNorm with the same random weights on every rank; gemma: they stand for one more than they hold."""

    def __init__(self, size: int, gemma: bool, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.gemma = gemma
        alike = torch.rand(size, generator=torch.Generator().manual_seed(size)) + (-0.5 if gemma else 0.5)
        self.weight = nn.Parameter(alike.to(device, dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gemma:
            return F.rms_norm(x, x.shape[-1:], self.weight, EPS)
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with one projection to queries, keys and values (`enter`)."""

    def __init__(self, how: Making) -> None:
        super().__init__()
        shape = how.shape
        self.heads, self.kv_heads, self.head_dim = shape.heads // how.world, shape.kv_heads // how.world, shape.head_dim
        inner = self.heads * self.head_dim
        self.enter = how.linear(inner + 2 * self.kv_heads * self.head_dim, shape.hidden)
        self.out = how.linear(shape.hidden, inner)

    def forward(self, rows: Rows, cache: Cache | None, prompts: int | None) -> Tensor:
        """→ this rank's summands, [rows, hidden].

        prompts: how many of equal length the rows are, which fill the cache where there is one; None: every row is the next token
        of a sequence of its own, whose cache ends in it.
        """
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = self.enter.product(rows).split(sizes, -1)
        count, many = q.shape[0], q.shape[0] if prompts is None else prompts
        q, k, v = (t.view(many, -1, t.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            keys, values = cache
            place = slice(-1, None) if prompts is None else slice(q.shape[2])
            keys[:, :, place] = k
            values[:, :, place] = v
            if prompts is None:
                k, v = keys, values
        y = F.scaled_dot_product_attention(q, k, v, is_causal=prompts is not None, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(count, -1))

    def cache(self, sequences: int, cached: int, like: Tensor) -> Cache:
        size = (sequences, self.kv_heads, cached, self.head_dim)
        return tuple(torch.randn(size, dtype=like.dtype, device=like.device) for _ in range(2))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): `enter` makes the latents, the same on every rank, which are
    normalised and then projected to this rank's heads.  The cache holds latents; a decode step works on them."""

    def __init__(self, how: Making) -> None:
        super().__init__()
        shape, latent = how.shape, how.shape.latent
        assert latent is not None
        self.latent, self.heads = latent, shape.heads // how.world
        self.enter = how.linear(latent.query + latent.kv + latent.rope, shape.hidden)
        self.query_norm, self.kv_norm = how.norm(latent.query), how.norm(latent.kv)
        self.query = how.linear(self.heads * (latent.nope + latent.rope), latent.query)
        self.kv = how.linear(self.heads * (latent.nope + latent.value), latent.kv)
        absorbed = torch.randn(self.heads, latent.kv, latent.nope + latent.value, dtype=how.dtype, device=how.device)
        self.absorbed = nn.Parameter(absorbed * latent.kv**-0.5, requires_grad=False)
        self.out = how.linear(shape.hidden, self.heads * latent.value)

    def forward(self, rows: Rows, cache: Cache | None, prompts: int | None) -> Tensor:
        """As `Attention.forward`."""
        own = self.latent
        query, kv, rope = self.enter.product(rows).split([own.query, own.kv, own.rope], -1)
        q = self.query(self.query_norm(query)).view(-1, self.heads, own.nope + own.rope)
        kv = self.kv_norm(kv)
        latents = torch.cat([kv, rope], -1)
        if prompts is None:
            assert cache is not None
            cache[0][:, -1] = latents
            return self.out(self._absorbed(q, cache[0]))
        if cache is not None:
            whole = latents.view(prompts, -1, own.kv + own.rope)
            cache[0][:, : whole.shape[1]] = whole
        return self.out(self._prefill(q, kv, rope, prompts))

    def _prefill(self, q: Tensor, kv: Tensor, rope: Tensor, prompts: int) -> Tensor:
        own = self.latent
        keys, values = self.kv(kv).view(-1, self.heads, own.nope + own.value).split([own.nope, own.value], -1)
        keys = torch.cat([keys, rope.unsqueeze(1).expand(-1, self.heads, -1)], -1)
        q, keys, values = (t.unflatten(0, (prompts, -1)).transpose(1, 2) for t in (q, keys, values))
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        return y.transpose(1, 2).reshape(kv.shape[0], -1)

    def _absorbed(self, q: Tensor, latents: Tensor) -> Tensor:
        """Attention among latents: keys' and values' projections are taken to the queries and the results."""
        own = self.latent
        to_keys, to_values = self.absorbed.split([own.nope, own.value], -1)
        nope, rope = q.split([own.nope, own.rope], -1)
        q = torch.cat([torch.einsum("thn,hcn->thc", nope, to_keys), rope], -1)
        weights = torch.softmax(q @ latents.transpose(1, 2) * (own.nope + own.rope) ** -0.5, -1, dtype=torch.float32)
        y = weights.to(q.dtype) @ latents[..., : own.kv]
        return torch.einsum("thc,hcv->thv", y, to_values).flatten(1)

    def cache(self, sequences: int, cached: int, like: Tensor) -> Cache:
        return (torch.randn(sequences, cached, self.latent.kv + self.latent.rope, dtype=like.dtype, device=like.device),)


class Layer(nn.Module):
    def __init__(self, how: Making) -> None:
        super().__init__()
        shape = how.shape
        self.gemma = shape.gemma
        self.attention = LatentAttention(how) if shape.latent else Attention(how)
        self.gate_up = how.linear(2 * (shape.intermediate // how.world), shape.hidden)
        self.down = how.linear(shape.hidden, shape.intermediate // how.world)
        self.before = nn.ModuleList(how.norm(shape.hidden) for _ in range(2))
        self.behind = nn.ModuleList(how.norm(shape.hidden) if shape.gemma else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, cache: Cache | None, prompts: int | None, form: Form) -> Tensor:
        """x: what a rank keeps of the residual → the same behind the layer."""
        rows = gathered(self.attention.enter.quantise(self.before[0](x)), form.whole)
        x = x + self.behind[0](form.sum(self.attention(rows, cache, prompts)))
        rows = gathered(self.gate_up.quantise(self.before[1](x)), form.whole)
        return x + self.behind[1](form.sum(self.feed(rows)))

    def feed(self, rows: Rows) -> Tensor:
        gate, up = self.gate_up.product(rows).chunk(2, -1)
        return self.down((F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)) * up)


class Stack(nn.Module):
    """One rank's layers and a last norm; `Form` says how the ranks meet, so that all forms are the same model."""

    def __init__(
        self, shape: Shape, layers: int, world: int, dtype: torch.dtype, device: str = "cuda", scheme: str = ""
    ) -> None:
        super().__init__()
        self.shape, self.world, self.scheme = shape, world, scheme
        how = Making(shape, world, scheme, dtype, device)
        self.layers = nn.ModuleList(Layer(how) for _ in range(layers))
        self.norm = how.norm(shape.hidden)

    def forward(self, x: Tensor, caches: list[Cache] | None, prompts: int | None, form: Form) -> Tensor:
        """x: [rows, hidden], the same on every rank → the same shape.  caches, prompts: see `Attention.forward`."""
        x = form.cut(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, caches[i] if caches else None, prompts, form)
        return form.whole(self.norm(x))

    def caches(self, sequences: int, cached: int) -> list[Cache]:
        """What each layer keeps of `cached` positions of each sequence."""
        return [layer.attention.cache(sequences, cached, self.norm.weight) for layer in self.layers]  # type: ignore[union-attr]
