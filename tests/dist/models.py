"""Tiny random models of the architectures that transformers knows, and the ways to share them out over ranks.

Norm weights lie away from one and hidden states are small, so that a wrong weight or epsilon shows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

LAYERS = 3
VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "use_cache": False,
    "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
# What an architecture needs besides.  Scales around one would hide a dropped one.
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 3.0, "attention_multiplier": 0.1},
    "olmo2": {"rms_norm_eps": 1e-5},
    "phi3": {"rms_norm_eps": 1e-5},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "glm4": {"rms_norm_eps": 1.5e-5},
    "qwen3_next": {
        "layer_types": ["full_attention"] * LAYERS, "num_experts": 0, "decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2],
        "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    },
}  # fmt: skip
SANDWICH = ("olmo2", "gemma2", "gemma3_text", "glm4")  # a norm of the reduced rows before they are added
ADDED_ONE = ("gemma2", "gemma3_text", "qwen3_next")  # 1 + weight


def config_of(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**SHAPE, **EXTRA[name]})


def build(name: str, dtype: torch.dtype = torch.bfloat16, head: bool = False) -> nn.Module:
    """The same random model on every rank, in evaluation mode; without a head it ends in its last norm."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if head else AutoModel
    model = kind.from_config(config_of(name)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if "norm" in path:
            low = -0.5 if name in ADDED_ONE else 0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + low)
        else:
            scale = 2e-3 if "embed" in path or "o_proj" in path or "down_proj" in path else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.to(dtype)


def tokens(count: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(count))


def mesh_of(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))


def parallelize(model: nn.Module, mesh: DeviceMesh, vocabulary: bool = True) -> nn.Module:
    """Share a model out by torch's own styles, along the plan that its configuration carries.

    vocabulary: whether the embedding is vocabulary-parallel too, which takes an all-reduce more.
    """
    styles: dict[str, Any] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
        "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    plan = {path: styles[style]() for path, style in model.config.base_model_tp_plan.items() if style in styles}
    if vocabulary:
        plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def group_of(mesh: DeviceMesh) -> str:
    return mesh.get_group().group_name


def barrier() -> None:
    dist.barrier()
