"""Tiny tensor-parallel models of transformers whose linear layers are quantised as torchao quantises them, a scheme a layer.

Sharing out is written by hand: each rank keeps its columns or rows of a weight, and the sum over the ranks stands in the layer.
The activations of a linear layer are quantised by torchao's own functions, traced to aten; its product is aten._scaled_mm, or
tpfuse's operator where aten has none for a scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpfuse.ops
from tpfuse import formats
from tpfuse.ir.matmul import dtype_name

_c10d = torch.ops._c10d_functional
SCHEMES = ("plain", "fp8_tensor", "fp8_token", "fp8_group128", "nvfp4")
WIDTH = 128  # of a head: what every group divides
GIVEN = {"fp8_tensor": 0.03, "nvfp4": 6.0 / (448 * 6)}  # torchao's scales: values are divided by them
SHAPE = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": len(SCHEMES), "head_dim": WIDTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": WIDTH, "head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 512, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "mlp_layer_types": None,
}  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": WIDTH},
    "deepseek_v3": LATENT,
}
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_b_proj", "kv_b_proj")
ROWS = ("o_proj", "down_proj")


class Linear(nn.Module):
    """A rank's part of a linear layer without bias; `exact` gives the product of the values that are stored, in FP64."""

    def __init__(self, weight: Tensor, scheme: str, group: str, given: nn.Parameter | None) -> None:
        """weight: [n, k], this rank's part.  group: to sum the product over, or "".  given: the scale of a static scheme."""
        super().__init__()
        self.scheme, self.group, self.exact = scheme, group, False
        self.out_dtype, self.layout = weight.dtype, ""
        self.given = given
        if scheme == "plain":
            self.stored, self.true = _fixed(weight.t()), _fixed(weight.t().double())
            return
        self.layout = "swizzled_128x4" if scheme == "nvfp4" else "row"
        amax = weight.abs().max().float()
        own = {"fp8_tensor": amax / 448, "nvfp4": 448 * 6 / amax}.get(scheme)
        q, scales = formats.quantize(weight, own, scheme, self.layout)
        self.true = _fixed(formats.dequantize(q, scales, own, scheme, self.layout).t().double())
        self.stored = _fixed(q.t())
        if scheme == "fp8_tensor":
            scales = own
        self.scales = _fixed(scales if scheme in ("fp8_tensor", "nvfp4") else scales.t().contiguous())
        if scheme == "nvfp4":
            assert own is not None and self.given is not None
            self.alpha = _fixed(self.given / own)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.true if self.exact else self.product(rows)
        if self.group:
            y = _c10d.wait_tensor(_c10d.all_reduce(y, "sum", self.group))
        return y.reshape(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        if self.scheme == "plain":
            return x @ self.stored
        q, scales = self.quantise(x)
        if self.scheme in ("fp8_tensor", "fp8_token"):
            return torch._scaled_mm(q, self.stored, scales, self.scales, out_dtype=self.out_dtype)
        if self.scheme == "nvfp4" and torch.compiler.is_compiling():  # of which aten has no body on CPU
            fp4, alpha = torch.float4_e2m1fn_x2, self.alpha.to(self.out_dtype)
            out = torch._scaled_mm(q.view(fp4), self.stored.view(fp4), scales, self.scales, out_dtype=self.out_dtype)
            return out * alpha
        alpha = self.alpha if self.scheme == "nvfp4" else None
        return tpfuse.ops.scaled_matmul(
            q, self.stored, scales, self.scales, None, None, alpha, self.scheme, self.layout, self.layout,
            dtype_name(self.out_dtype), False,
        )  # fmt: skip

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
        from torchao.prototype.mx_formats.utils import to_blocked
        from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

        if self.scheme == "nvfp4":
            scales, q = nvfp4_quantize(x, 16, self.given)
            return q, to_blocked(scales)
        if self.scheme == "fp8_tensor":
            assert self.given is not None
            return _quantize_affine_float8(x, self.given), self.given
        block = [1, 128 if self.scheme == "fp8_group128" else x.shape[-1]]
        scale = _choose_scale_float8(x, block)
        return _quantize_affine_float8(x, scale), scale


def _fixed(value: Tensor) -> nn.Parameter:
    """A tensor of the model whose sizes are numbers, whatever is dynamic."""
    return nn.Parameter(value, requires_grad=False)


class Experts(nn.Module):
    """The sum over the ranks behind a rank's part of the experts."""

    def __init__(self, experts: nn.Module, group: str) -> None:
        super().__init__()
        self.experts, self.group = experts, group

    def forward(self, *args: Tensor) -> Tensor:
        return _c10d.wait_tensor(_c10d.all_reduce(self.experts(*args), "sum", self.group))


def build(
    name: str, group: str, rank: int, world: int, schemes: Sequence[str] = SCHEMES, head: bool = False,
    linear: Callable[..., nn.Module] = Linear,
) -> nn.Module:  # fmt: skip
    """A rank's part of the same random model, in bfloat16; layer i is of schemes[i].  Without a head it ends in its last norm.
    linear: what stands for a linear layer, made as `Linear` is.

    Norm weights lie away from one, and hidden states are small, so that a wrong weight or epsilon shows.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    layers = {"num_hidden_layers": len(schemes)}
    if name == "gemma3_text":
        layers["layer_types"] = ["full_attention"] * len(schemes)
    config = AutoConfig.for_model(name, **{**SHAPE, **EXTRA[name], **layers})
    config._experts_implementation = "batched_mm"
    kind = AutoModelForCausalLM if head else AutoModel
    model = kind.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if "norm" in path:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + (-0.5 if "gemma" in name else 0.5))
        else:
            small = "embed" in path or "o_proj" in path or "down_proj" in path
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2e-3 if small else 0.1))
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):  # the same experts, whatever a rounding does to their scores
            buffer.copy_(torch.tensor([4.0, 0.0, 8.0, 0.0]))
    model = model.to(torch.bfloat16)
    base = model.model if head else model
    if head:  # every token has one that likes to follow it: a wrong row shows, a last bit does not decide
        base.embed_tokens.weight.mul_(50.0)
        other = torch.randn(model.lm_head.weight.shape, generator=generator)
        model.lm_head.weight.copy_(other + base.embed_tokens.weight.roll(7, 0) * 5)
    for layer, scheme in zip(base.layers, schemes, strict=True):
        share(layer, scheme, group, rank, world, linear)
    return model


def share(
    layer: nn.Module, scheme: str, group: str, rank: int, world: int, linear: Callable[..., nn.Module]
) -> None:  # fmt: skip
    """Keep this rank's part of a layer, its linear layers quantised; those that read the same rows share a static scale."""
    given = _fixed(torch.tensor(GIVEN[scheme])) if scheme in GIVEN else None
    for path, module in list(layer.named_modules()):
        parent = layer.get_submodule(path.rpartition(".")[0])
        short = path.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            if short in COLUMNS:
                weight = weight.chunk(world, 0)[rank]
            elif short in ROWS:
                weight = weight.chunk(world, 1)[rank]
            setattr(parent, short, linear(weight.contiguous(), scheme, group if short in ROWS else "", given))
        elif short == "experts":
            both = module.gate_up_proj.chunk(2, 1)
            module.gate_up_proj = nn.Parameter(torch.cat([w.chunk(world, 1)[rank] for w in both], 1), requires_grad=False)
            module.down_proj = nn.Parameter(module.down_proj.chunk(world, 2)[rank].contiguous(), requires_grad=False)
            setattr(parent, short, Experts(module, group))


def exact(model: nn.Module) -> nn.Module:
    """The model that stands for the stored weights, in FP64 and without quantised activations."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.exact = True
    return model.double()


def tokens(count: int) -> Tensor:
    return torch.randint(1, SHAPE["vocab_size"], (1, count), generator=torch.Generator().manual_seed(count))
