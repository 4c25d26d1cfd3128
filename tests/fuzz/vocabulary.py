"""The words of generated models: what tensor-parallel models call, in the spellings of users, transformers and torchao.

`words` binds them to the dtypes of one run.  An exact run has FP64 for both of a model's dtypes; what a model stores in FP8 or
FP4 is stored so there too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor

import tpfuse.ops
from tpfuse import formats
from tpfuse.ir.matmul import dtype_name

E4M3 = torch.float8_e4m3fn
c10d = torch.ops._c10d_functional


def words(low: torch.dtype, f32: torch.dtype, groups: dict[str, str], sizes: dict[str, int]) -> dict[str, Any]:
    """groups, sizes: name and number of ranks of each process group that models name; alone, without a name, in no group:
    collectives move nothing then, and have the shapes of `sizes`.

    low, f32: the dtypes of activations and of what is worked out in FP32.
    """
    exact = low == torch.float64

    # collectives

    def all_reduce(x: Tensor, group: str = "world", op: str = "sum") -> Tensor:
        return collectives.all_reduce(x, op, groups[group]) if groups else x.clone(memory_format=torch.contiguous_format)

    def all_reduce_aten(x: Tensor, group: str = "world") -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x, "sum", groups[group])) if groups else all_reduce(x)

    def all_reduce_in_place(x: Tensor, group: str = "world") -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        return y.copy_(all_reduce(y, group))  # as Dynamo has torch.distributed.all_reduce

    def reduce_scatter(x: Tensor, group: str = "world", dim: int = 0) -> Tensor:
        assert x.shape[dim] % sizes[group] == 0
        if groups:
            return collectives.reduce_scatter_tensor(x, "sum", dim, groups[group])
        return x.chunk(sizes[group], dim)[0].clone(memory_format=torch.contiguous_format)

    def all_gather(x: Tensor, group: str = "world", dim: int = 0) -> Tensor:
        return collectives.all_gather_tensor(x, dim, groups[group]) if groups else torch.cat([x] * sizes[group], dim)

    # norms

    def statistics(x: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(x.to(f32).pow(2).mean(-1, keepdim=True) + eps)

    def unit(x: Tensor, eps: float) -> Tensor:
        wide = x.to(f32)
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)

    def norm_llama(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * unit(x, eps).to(x.dtype)

    def norm_torch(x: Tensor, w: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), w, eps)

    def norm_olmo(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return (w * unit(x, eps)).to(x.dtype)

    def norm_gemma(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return (unit(x, eps) * (1.0 + w.to(f32))).to(x.dtype)

    def norm_gemma_low(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return unit(x, eps).to(x.dtype) * (1 + w)

    def norm_kept(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return (unit(x, eps) * w).to(f32)

    def norm_power(x: Tensor, w: Tensor, eps: float) -> Tensor:
        wide = x.to(f32)
        return (wide * torch.pow(eps + (wide * wide).sum(-1, True) / x.shape[-1], -0.5)).to(x.dtype) * w

    def norm_sqrt(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * (x.to(f32) / torch.sqrt(x.to(f32).pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def norm_sum(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * (x.to(f32) * torch.rsqrt(x.to(f32).pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)

    def norm_rows(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * (x.to(f32) * torch.rsqrt(x.to(f32).pow(2).mean(0, keepdim=True) + eps)).to(x.dtype)

    def norm_root_cast(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * (x * statistics(x, eps).to(x.dtype))

    def norm_low(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    def norm_layer(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), w, None, eps)

    # quantisation: (q, scales), scales as rows hold them

    def fp8(values: Tensor, limit: float = 448.0) -> Tensor:
        return values.clamp(-limit, limit).to(E4M3)

    def static(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return fp8(x.to(f32) / s), s

    def static_inverse(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return fp8(x.to(f32) * s.reciprocal()), s

    def static_low(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return fp8(x / s), s

    def static_clamped_at_240(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return fp8(x.to(f32) / s, 240.0), s

    def static_cast_twice(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return fp8((x.to(f32) / s).to(low)), s

    def static_of_all(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().max().to(f32) / 448.0
        return fp8(x.to(f32) / scale), scale

    def token(x: Tensor, floor: float = 1e-10, limit: float = 448.0) -> tuple[Tensor, Tensor]:
        s = (x.to(f32).abs().amax(-1, keepdim=True) / limit).clamp(min=floor)
        return fp8(x.to(f32) / s), s

    def token_inverse(x: Tensor) -> tuple[Tensor, Tensor]:
        amax, _ = x.abs().max(dim=-1)
        s = (amax.unsqueeze(-1).to(f32) / 448.0).clamp(min=1 / (448 * 512.0))
        return fp8(x.to(f32) * s.reciprocal()), s

    def torchao(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

        scale = _choose_scale_float8(x, [1] * (x.dim() - 1) + [size])
        return _quantize_affine_float8(x, scale), scale

    def group(x: Tensor, size: int, floor: float = 1e-10) -> tuple[Tensor, Tensor]:
        blocks = x.reshape(-1, x.shape[-1] // size, size)
        s = (blocks.abs().amax(-1, keepdim=True).to(f32) / 448.0).clamp(min=floor)
        return fp8(blocks.to(f32) / s).view(x.shape), s.squeeze(-1)

    def nvfp4(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        blocks = x.to(f32).view(-1, x.shape[-1] // 16, 16)
        scales = (blocks.abs().amax(-1) / 6.0 * g).clamp(0.015625, 448.0).to(E4M3)
        size = (blocks * (g / scales.to(f32)).unsqueeze(-1)).view(-1, x.shape[-1])
        even = {0.75, 1.75, 3.5}
        limits = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
        code = sum(((size.abs() >= t) if t in even else (size.abs() > t)).to(torch.uint8) for t in limits)
        code = code | (torch.signbit(size).to(torch.uint8) << 3)
        return code[:, 0::2] | (code[:, 1::2] << 4), scales

    def unquantised(q: Tensor, s: Tensor) -> Tensor:
        """FP8 values by numbers, rows' or groups' scales; FP4 codes as numbers."""
        values = q.to(f32).reshape(-1, q.shape[-1])
        if q.dtype == E4M3 and s.numel() > 1:
            s = s.to(f32).reshape(values.shape[0], -1)
            values = values * s.repeat_interleave(values.shape[-1] // s.shape[-1], -1)
        elif q.dtype == E4M3:
            values = values * s
        return values.to(low)

    # products

    def scaled_mm(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor) -> Tensor:
        if exact:
            return (x.double() * xs) @ (w.double() * ws)
        return torch._scaled_mm(x, w, xs, ws, out_dtype=low)

    def scaled_mm_groups(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor, scheme: str) -> Tensor:
        if exact:
            size = x.shape[-1] // xs.shape[-1]
            return (x.double() * xs.repeat_interleave(size, -1)) @ (w.double() * ws.repeat_interleave(size, 0))
        return tpfuse.ops.scaled_matmul(x, w, xs, ws, None, None, None, scheme, "row", "row", dtype_name(low), False)

    def scaled_mm_fp4(x: Tensor, w: Tensor, xs: Tensor, ws: Tensor, alpha: Tensor) -> Tensor:
        if exact:
            a, b = (formats.dequantize(v, s, None, "nvfp4", "linear").double() for v, s in ((x, xs), (w.t(), ws)))
            return (a @ b.t()) * alpha
        return tpfuse.ops.scaled_matmul(x, w, xs, ws, None, None, alpha, "nvfp4", "linear", "linear", dtype_name(low), False)

    # attention

    def heads(x: Tensor, width: int) -> Tensor:
        """[tokens, heads · width] → [1, heads, tokens, width]."""
        return x.reshape(1, -1, x.shape[-1] // width, width).transpose(1, 2)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])

    def repeated(x: Tensor, times: int) -> Tensor:
        batch, count, tokens, width = x.shape
        return x.unsqueeze(2).expand(batch, count, times, tokens, width).reshape(batch, count * times, tokens, width)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(q, repeated(k, times), repeated(v, times), is_causal=True)

    def attend_eagerly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = q.shape[1] // k.shape[1]
        scores = torch.matmul(q, repeated(k, times).transpose(2, 3)) * 0.3
        return torch.matmul(F.softmax(scores, dim=-1, dtype=f32).to(q.dtype), repeated(v, times))

    def cos_of(x: Tensor, table: Tensor) -> Tensor:
        return (torch.arange(x.shape[-2])[:, None] * table).to(f32).cos().to(low)

    def sin_of(x: Tensor, table: Tensor) -> Tensor:
        return (torch.arange(x.shape[-2])[:, None] * table).to(f32).sin().to(low)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-second, first), -1) * sin

    def turned_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        return x * cos + torch.stack((-second, first), -1).flatten(-2) * sin

    def turned_the_other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((second, -first), -1) * sin

    # residuals and activations

    def added_in_place(x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y)

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def gated_gelu(x: Tensor) -> Tensor:
        return F.gelu(x[..., : x.shape[-1] // 2], approximate="tanh") * x[..., x.shape[-1] // 2 :]

    own = {name: value for name, value in locals().items() if name not in ("exact", "sizes", "groups")}
    return {"torch": torch, "F": F, "dist": dist, **own}
