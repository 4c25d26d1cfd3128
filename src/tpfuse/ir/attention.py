"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) followed by a quantisation of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse.formats import Flagged, Scheme
from tpfuse.ir.op import Args, Message, op
from tpfuse.ir.samples import rows
from tpfuse.ir.tails import quantized
from tpfuse.report import Decline

aten = torch.ops.aten
# How a model computes it → the device on which torch has that implementation; None for all.
METHODS = {"flash_cpu": "cpu", "flash": "cuda", "efficient": "cuda", "cudnn": "cuda", "math": None, "eager": None}
_HEAD = 16  # of samples


@dataclass(frozen=True)
class Method(Flagged):
    """What computes an attention in the model; written as one string in schemas.

    base: torch's "flash_cpu", "flash", "efficient", "cudnn" or "math", or "eager" (transformers': a product, times the scale,
    plus the mask, softmax in FP32, rounded to the dtype of q, a product).  repeat: keys and values have fewer heads than
    queries and the model repeats each of them; else torch's implementation takes them as they are.
    """

    KIND = "attention method"
    BASES = tuple(METHODS)
    repeat: bool = False


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax_scale: float, causal: bool, method: str) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty([batch, tokens, heads * v.shape[-1]])


def _sample(*, tokens: int, hidden: int, method: str = "flash_cpu", **shape: Any) -> dict[str, Any]:
    seed = shape.pop("seed", 0)
    q, k, v = (
        (rows(tokens=tokens, hidden=hidden, seed=seed + i, **shape) * 300).view(1, tokens, -1, _HEAD).transpose(1, 2)
        for i in range(3)
    )
    mask = torch.full([tokens, tokens], -torch.inf).triu(1).to(q)[None, None]
    return {"q": q, "k": k, "v": v, "mask": mask, "softmax_scale": 0.3, "causal": False, "method": method}


@op(sample=_sample, fake=_fake, rows="mixing", row_args=("q",))
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, softmax_scale: float = 1.0, causal: bool = False,
    method: str = "math",
) -> Tensor:  # fmt: skip
    """softmax(q · kᵀ · softmax_scale + mask) · v, the heads of a token side by side in one row.

    q: [batch, heads, tokens, qk_dim].  k: [batch, kv_heads, keys, qk_dim].  v: [batch, kv_heads, keys, v_dim]; v_dim may differ
    from qk_dim (multi-head latent attention).  mask: additive, broadcast to [batch, heads, tokens, keys], or None.
    causal: token i sees keys 0 … i.  method: see `Method`; where torch lacks it for the device (and in FP64), "math" takes its
    place → [batch, tokens, heads · v_dim], contiguous.
    """
    how = Method.parse(method)
    if how.repeat:
        k, v = _repeated(k, q.shape[1] // k.shape[1]), _repeated(v, q.shape[1] // v.shape[1])
    native = METHODS[how.base] in (None, q.device.type) and not (q.dtype == torch.float64 and how.base != "eager")
    out = _compute(how.base if native else "math", q, k, v, mask, softmax_scale, causal)
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], out.shape[1] * out.shape[3]).contiguous()


def _repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, keys, width = x.shape
    return x[:, :, None].expand(batch, heads, times, keys, width).reshape(batch, heads * times, keys, width)


def _compute(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    match name:
        case "flash_cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[0]
        case "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]
        case "efficient":
            return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, 0.0, causal, scale=scale)[0]
        case "cudnn":
            return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False, 0.0, causal, False, scale=scale)[0]
        case "math":
            gqa = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
            return aten._scaled_dot_product_attention_math(q, k, v, mask, 0.0, causal, scale=scale, **gqa)[0]
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = scores if mask is None else scores + mask
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(torch.softmax(scores, -1, dtype=wide).to(q.dtype), v)


def _whole_groups(args: Args) -> Decline | None:
    """An attention kernel finishes one head at a time: what one scale covers must lie in one head."""
    scheme, width = Scheme.parse(args["scheme"]), args["v"].shape[-1]
    if scheme.name == "fp8_token":
        return Decline("scale_spans_heads", "a scale per token is of all heads, of which a kernel sees one at a time")
    if scheme.group and width % scheme.group:
        return Decline(
            "head_dim", f"groups of {scheme.group} do not divide a head's {width} values: a scale would span heads"
        )
    return None


def _keys(args: Args) -> Message:
    """What takes an attention's time grows with the keys, of which a cache holds more than a graph has tokens; the heads' widths
    decide which kernel is faster."""
    q, v = args["q"], args["v"]
    return Message(v.shape[2], v.shape[3], q.dtype, across=q.shape[3], bounded=False)


attention_quantize = quantized(attention, "attention_quantize", guard=_whole_groups, message=_keys)
