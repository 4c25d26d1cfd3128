"""Tiny models of transformers with quantised linear layers: what a layer's attention becomes, counted, bit for bit."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tests.raising.test_quants as spelled
from tests.raising.capture import capture
from tpfuse.fusion import fuse
from tpfuse.ir import find, verify
from tpfuse.raising import raise_graph
from tpfuse.rewrite.inline import inline

transformers = pytest.importorskip("transformers")

LAYERS = 3  # each with a scheme of its own
TINY = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 128, "head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 128, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": LAYERS,
}  # fmt: skip
# model: (its configuration, what it changes in TINY, does it turn normalised heads)
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 1}, True),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 128, "layer_types": ["full_attention"] * LAYERS}, True),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, "topk_method": "greedy"}, False),
    "deepseek_v3": ("DeepseekV3Config", LATENT, False),
}
SCHEMES: list[Callable[[Tensor], Any]] = [
    lambda x: (spelled.fp8(x.float() / 0.05), None),
    lambda x: spelled.grouped(x.reshape(-1, x.shape[-1])),
    lambda x: spelled.nvfp4(x.reshape(-1, x.shape[-1]), None),
]


class QuantizedLinear(nn.Module):
    """A linear layer of quantised activations, the product taken of the values that they stand for."""

    def __init__(self, linear: nn.Linear, quantise: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.quantise = linear.weight, quantise

    def forward(self, x: Tensor) -> Tensor:
        q, scales = self.quantise(x)
        if q.dtype == torch.uint8:  # two codes a byte
            q = torch.stack((q & 15, q >> 4), -1).reshape(*q.shape[:-1], -1)
        values = q.to(x.dtype)
        if scales is not None:
            groups = values.reshape(*scales.shape, -1) * scales.to(x.dtype).unsqueeze(-1)
            values = groups.reshape(values.shape)
        return (values @ self.weight.t()).reshape(*x.shape[:-1], -1)


def tiny(name: str) -> nn.Module:
    config, changes, _ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**TINY, **changes})
    model = transformers.AutoModelForCausalLM.from_config(made).to(torch.bfloat16).eval()
    for layer, quantise in zip(model.model.layers, SCHEMES, strict=True):
        layer.self_attn.o_proj = QuantizedLinear(layer.self_attn.o_proj, quantise)
    return model


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
def test_attention_of_models(name: str) -> None:
    model = tiny(name)
    ids = torch.randint(0, 128, (1, 24))
    gm, inputs = capture(lambda i: model(i, use_cache=False).logits, [ids], dynamic=1)
    (wanted,) = fx.Interpreter(gm).run(*inputs)
    events = raise_graph(gm.graph)
    events += fuse(gm.graph, ["attention_quantize", "qk_norm_rope"])
    verify.verify(gm.graph, "fuse")
    assert torch.equal(fx.Interpreter(gm).run(*inputs)[0], wanted)
    nodes = [n for n in gm.graph.nodes if find(n.target)]
    counts = Counter(op.name for n in nodes if (op := find(n.target)))
    reasons = [str(e) for e in events if e.reason]
    schemes = [e.attributes["scheme"].split(":")[0] for e in events if e.status == "fired" and e.rule == "attention_quantize"]
    assert sorted(schemes) == ["fp8_group128", "fp8_tensor", "nvfp4"], reasons
    assert counts["attention_quantize"] == LAYERS and not counts["attention"] and not counts["quantize"], reasons
    assert counts["qk_norm_rope"] == (LAYERS if MODELS[name][2] else 0) and not counts["rotary"], reasons
    for node in nodes:
        op = find(node.target)
        assert op is not None
        inline(gm.graph, node, op)
    assert torch.equal(fx.Interpreter(gm).run(*inputs)[0], wanted)
