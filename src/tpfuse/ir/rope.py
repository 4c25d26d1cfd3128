"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys, and the per-head norms before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse.formats import Flagged
from tpfuse.ir.norm import rms_norm
from tpfuse.ir.op import Args, op
from tpfuse.ir.samples import rows, vector
from tpfuse.report import Decline

_HEAD = 16  # of samples


@dataclass(frozen=True)
class Style(Flagged):
    """Which elements turn together; written as one string in schemas.

    base: "half" (element i with i + rotary / 2; GPT-NeoX, Llama in transformers) or "interleaved" (2i with 2i + 1; GPT-J, GLM-4).
    pairs: the tables hold one angle a pair, [..., rotary / 2]; else one an element, [..., rotary].
    heads_first: results lie in memory with heads before tokens, as models that join a turned and an unturned part leave them.
    """

    KIND = "rotary style"
    BASES = ("half", "interleaved")
    pairs: bool = False
    heads_first: bool = False

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second elements of the pairs that turn together."""
        if self.base == "interleaved":
            return x[..., 0::2], x[..., 1::2]
        first, second = x.chunk(2, -1)
        return first, second


def _turn(x: Tensor, cos: Tensor, sin: Tensor, how: Style) -> Tensor:
    width = cos.shape[-1] * 2 if how.pairs else cos.shape[-1]
    first, second = how.split(x[..., :width])
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    (c1, c2), (s1, s2) = ((c, c), (s, s)) if how.pairs else (how.split(c), how.split(s))
    turned = [first * c1 - second * s1, second * c2 + first * s2]
    y = (torch.stack(turned, -1).flatten(-2) if how.base == "interleaved" else torch.cat(turned, -1)).to(x.dtype)
    if width != x.shape[-1]:
        y = torch.cat([y, x[..., width:]], -1)
    if how.heads_first:
        # Not contiguous(): it would keep whatever strides dimensions of one element have.
        return y.transpose(-3, -2).clone(memory_format=torch.contiguous_format).transpose(-3, -2)
    return y.contiguous()


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str) -> tuple[Tensor, Tensor]:
    return _empty(q, style), _empty(k, style)


def _empty(x: Tensor, style: str) -> Tensor:
    if Style.parse(style).heads_first:
        return x.new_empty(x.transpose(-3, -2).shape).transpose(-3, -2)
    return x.new_empty(x.shape)


def _sample(*, tokens: int, hidden: int, style: str = "half", **shape: Any) -> dict[str, Any]:
    shape = {**shape, "tokens": tokens}
    q, k = rows(hidden=hidden, **shape), rows(hidden=hidden // 4, **{**shape, "seed": shape.get("seed", 0) + 1})
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * 100.0 ** (-torch.arange(0, _HEAD, 2) / _HEAD)
    if not Style.parse(style).pairs:
        angles = angles.repeat_interleave(2, -1) if style.startswith("interleaved") else torch.cat([angles, angles], -1)
    return {
        "q": q.view(1, tokens, -1, _HEAD), "k": k.view(1, tokens, -1, _HEAD), "cos": angles.cos().to(q)[None],
        "sin": angles.sin().to(q)[None], "style": style,
    }  # fmt: skip


@op(sample=_sample, fake=_fake, row_args=("q", "k", "cos", "sin"))
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> tuple[Tensor, Tensor]:
    """Turn each pair (a, b) of a head's first `rotary` elements by its token's angle: (a·cos − b·sin, b·cos + a·sin).

    q: [..., tokens, heads, head_dim].  k: [..., tokens, kv_heads, head_dim].  cos, sin: [..., tokens, rotary] or, by `style`,
    [..., tokens, rotary / 2] (see `Style`); rotary ≤ head_dim, the rest of a head is handed on.  Products are formed in the
    wider dtype of x and cos → (q, k) turned, shapes and dtypes as before.
    """
    how = Style.parse(style)
    return _turn(q, cos, sin, how), _turn(k, cos, sin, how)


def _norm_sample(**shape: Any) -> dict[str, Any]:
    sample = _sample(**{k: v for k, v in shape.items() if k not in ("weight_bias", "rounding", "scheme")})
    weight = {**shape, "hidden": _HEAD}
    q, k = sample.pop("q"), sample.pop("k")
    bias = shape.get("weight_bias", 0.0)
    norm = {"eps": 1e-6, "weight_bias": bias, "rounding": shape.get("rounding", "cast_last" if bias else "cast_first")}
    style = sample.pop("style")
    weights = {"q_weight": vector(**weight), "k_weight": vector(**{**weight, "seed": 5})}
    return {"q": q, "k": k, **weights, **sample, **norm, "style": style}


def _weight_dtype(args: Args) -> Decline | None:
    for name in ("q", "k"):
        x, weight = args[name], args[f"{name}_weight"]
        if weight is not None and weight.dtype != x.dtype:
            return Decline("weight_dtype", f"the norm's weight of {name} is {weight.dtype}, its input {x.dtype}")
    return None


@op(sample=_norm_sample, row_args=("q", "k", "cos", "sin"), fuse="qk_norm_rope", guard=_weight_dtype)
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float = 1e-6,
    weight_bias: float = 0.0, rounding: str = "cast_first", style: str = "half",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rms_norm` of each head of q and of k, then `rotary` (Qwen3, Gemma3).

    q: [..., tokens, heads, head_dim].  k: [..., tokens, kv_heads, head_dim].  q_weight, k_weight: [head_dim] or None.
    cos, sin: see `rotary` → (q, k).
    """
    normed_q = rms_norm(q, q_weight, eps, weight_bias, rounding)
    normed_k = rms_norm(k, k_weight, eps, weight_bias, rounding)
    return rotary(normed_q, normed_k, cos, sin, style)
