"""The norms, MLPs and whole tiny models of transformers, raised and inlined bit for bit."""

import importlib

import pytest
import torch
from torch import Tensor, nn

from tests.raising.capture import Raised, capture, raise_exactly, raised

transformers = pytest.importorskip("transformers")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HIDDEN, WIDTH = 64, 96

# model folder of transformers: (its norm, weight_bias, rounding, its MLP, act)
ZOO = {
    "llama": ("LlamaRMSNorm", 0.0, "cast_first", "LlamaMLP", "silu"),
    "mistral": ("MistralRMSNorm", 0.0, "cast_first", "MistralMLP", "silu"),
    "qwen2": ("Qwen2RMSNorm", 0.0, "cast_first", "Qwen2MLP", "silu"),
    "qwen3": ("Qwen3RMSNorm", 0.0, "cast_first", "Qwen3MLP", "silu"),
    "granite": ("GraniteRMSNorm", 0.0, "cast_first", "GraniteMLP", "silu"),
    "olmo2": ("Olmo2RMSNorm", 0.0, "cast_last", "Olmo2MLP", "silu"),
    "phi3": ("Phi3RMSNorm", 0.0, "cast_first", "Phi3MLP", "silu"),
    "smollm3": ("SmolLM3RMSNorm", 0.0, "cast_first", "SmolLM3MLP", "silu"),
    "gemma": ("GemmaRMSNorm", 1.0, "cast_last", "GemmaMLP", "gelu_tanh"),
    "gemma2": ("Gemma2RMSNorm", 1.0, "cast_last", "Gemma2MLP", "gelu_tanh"),
    "gemma3": ("Gemma3RMSNorm", 1.0, "cast_last", "Gemma3MLP", "gelu_tanh"),
    "gemma4": ("Gemma4RMSNorm", 0.0, "cast_last", None, ""),  # its MLP takes a layer's number
    "qwen3_next": ("Qwen3NextRMSNorm", 1.0, "cast_last", "Qwen3NextMLP", "silu"),
    "glm4": ("Glm4RMSNorm", 0.0, "cast_first", "Glm4MLP", "silu"),
    "deepseek_v3": ("DeepseekV3RMSNorm", 0.0, "cast_first", "DeepseekV3MLP", "silu"),
}


def module_of(model: str, name: str) -> type[nn.Module]:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def raised_module(module: nn.Module, dtype: torch.dtype) -> Raised:
    module = module.to(dtype)
    parameters = {name: torch.rand_like(p) * 2.75 + 0.25 for name, p in module.named_parameters()}
    names = list(parameters)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    x = (torch.randn(2, 24, HIDDEN) * 3e-3).to(dtype)
    return raised(call, x, *parameters.values(), dynamic=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", ZOO)
def test_norm(model: str, dtype: torch.dtype) -> None:
    name, bias, rounding, _, _ = ZOO[model]
    (norm,) = raised_module(module_of(model, name)(HIDDEN, eps=1e-5), dtype).named("rms_norm")
    if dtype == torch.float32 and bias == 0:
        rounding = "cast_first"
    assert (norm["eps"], norm["weight_bias"], norm["rounding"]) == (1e-5, bias, rounding)


@pytest.mark.parametrize("model", [model for model, entry in ZOO.items() if entry[3]])
def test_mlp(model: str) -> None:
    norm, _, _, name, act = ZOO[model]
    family = norm.removesuffix("RMSNorm")
    config = getattr(transformers, f"{family}TextConfig" if model == "gemma3" else f"{family}Config")
    mlp = module_of(model, name)(config(hidden_size=HIDDEN, intermediate_size=WIDTH))
    found = raised_module(mlp, torch.bfloat16)
    (product,) = found.named("act_and_mul")
    assert product["act"] == act
    assert len(found.named("matmul")) == (2 if model in ("phi3", "glm4") else 3)  # gate and up in one or apart


TINY = {
    "vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


# Qwen3: per-head norms.  Gemma3: the same, heads before tokens, and four norms around each layer.
@pytest.mark.parametrize(("config", "norms"), [("Qwen3Config", 5), ("Gemma3TextConfig", 7)])
def test_model(config: str, norms: int) -> None:
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**TINY)).bfloat16().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.25, 3)
    tokens = torch.randint(0, 128, (1, 24))
    gm, inputs = capture(lambda ids: model(input_ids=ids, use_cache=False).logits, [tokens], dynamic=1)
    found = raise_exactly(gm, inputs)
    assert not found.events
    assert len(found.named("rms_norm")) == norms and len(found.named("act_and_mul")) == 1
