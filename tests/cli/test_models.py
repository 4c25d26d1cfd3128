"""Bad models are found before anything starts."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.dist import models as zoo
from tpfuse.cli import models
from tpfuse.cli.inputs import BadInput


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


@pytest.fixture
def gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_llama(tmp_path):
    """A whole Llama of one layer as a GGUF file in FP32 → (path, its tensors by GGUF name)."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", *"abcdefgh", "ab"])
    writer.add_token_types([3, 3, 3, *[1] * 9])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (12, 32), "output_norm": (32,), "output": (12, 32)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_output")}
    shapes |= {f"blk.0.{n}": (16, 32) for n in ("attn_k", "attn_v")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


def test_a_gguf_file_is_dequantised_once(gguf_llama, tmp_path, monkeypatch):
    path, tensors = gguf_llama
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = models.locate(str(path))
    models.check_ranks(models.read_config(source), 2)
    folder = models.dequantised(source, torch.float32)
    model = models.load(folder, 1, torch.float32, torch.device("cpu"))
    got = {k: v.numpy() for k, v in model.state_dict().items()}
    np.testing.assert_array_equal(got["model.layers.0.self_attn.v_proj.weight"], tensors["blk.0.attn_v.weight"])
    np.testing.assert_array_equal(got["model.layers.0.post_attention_layernorm.weight"], tensors["blk.0.ffn_norm.weight"])
    np.testing.assert_array_equal(got["lm_head.weight"], tensors["output.weight"])
    assert models.load_tokenizer(folder)("abc")["input_ids"] == [11, 5]
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr(models, "writable", lambda *_: pytest.fail("a cache that has it need not be writable"))
    assert models.dequantised(source, torch.float32) == folder
    assert models.converted(source, torch.bfloat16) != folder
    assert not [p for p in folder.parent.iterdir() if p not in (folder, folder.with_name(f"{folder.name}.lock"))]


def test_a_cache_that_cannot_be_written(gguf_llama, monkeypatch):
    monkeypatch.setenv("TPFUSE_CACHE", "/proc/cache")
    with pytest.raises(BadInput, match="^/proc/cache/models.*cannot be written: .*; .*TPFUSE_CACHE names another folder"):
        models.dequantised(models.locate(str(gguf_llama[0])), torch.float32)


def test_nothing_there(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        models.locate(str(tmp_path / "absent"))


def test_folder_without_a_model(tmp_path):
    with pytest.raises(BadInput, match="neither config.json nor a GGUF file"):
        models.locate(str(tmp_path))


def test_a_file_that_is_no_gguf(llama):
    with pytest.raises(BadInput, match="not a GGUF file"):
        models.locate(str(llama / "config.json"))


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="name one: a.gguf, b.gguf"):
        models.locate(str(tmp_path))


def test_whole_files_pass(llama, gguf_file):
    models.check_files(models.locate(str(llama)))
    models.check_files(models.locate(str(gguf_file)))


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_safetensors(copy, kept):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"model.safetensors: truncated"):
        models.check_files(models.locate(str(copy)))


@pytest.mark.parametrize("kept", [6, 60, -200])
def test_truncated_gguf(gguf_file, kept):
    gguf_file.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"tiny.gguf: truncated or damaged"):
        models.check_files(models.locate(str(gguf_file)))


def test_missing_weights_and_shards(copy):
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(BadInput, match="missing: b.safetensors"):
        models.check_files(models.locate(str(copy)))
    for damaged in ("{", "{}", "[]"):
        (copy / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(BadInput, match="index.json: truncated or damaged"):
            models.check_files(models.locate(str(copy)))
    (copy / "model.safetensors.index.json").unlink()
    (copy / "a.safetensors").unlink()
    with pytest.raises(BadInput, match="no weights"):
        models.check_files(models.locate(str(copy)))


def test_a_damaged_tokenizer(copy):
    config = models.read_config(models.locate(str(copy)))
    models.check_prompt(copy, config, "w5", 1)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="no tokenizer that can be read"):
        models.check_prompt(copy, config, "w5", 1)


@pytest.mark.parametrize(("kind", "told"), [("no_such_net", "cannot read this model"), ("clip", "not a causal language model")])
def test_unsupported_architecture(copy, kind, told):
    (copy / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(BadInput, match=told):
        models.read_config(models.locate(str(copy)))


def test_ranks_that_do_not_divide(llama):
    config = models.read_config(models.locate(str(llama)))
    models.check_ranks(config, 2)
    with pytest.raises(BadInput, match=r"--tp 3 does not divide 2 key/value heads; --tp 1 or 2 would work") as caught:
        models.check_ranks(config, 3)
    assert "attention heads" not in str(caught.value)


def test_widths_that_do_not_divide(copy):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 97}))
    with pytest.raises(BadInput, match=r"97 columns of model.layers.\*.mlp.gate_proj"):
        models.check_ranks(models.read_config(models.locate(str(copy))), 2)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_shares_out_neither_embeddings_nor_gradients(kind, tied):
    config = zoo.config_of(kind)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = pytest.importorskip("transformers").AutoModelForCausalLM.from_config(config)
    model.tp_plan = {**model.tp_plan, "model.embed_tokens": "embedding_rowwise"}  # as some releases do of themselves
    plan = models.plan_of(model)
    assert plan["model.embed_tokens"] == models.WHOLE
    assert plan["lm_head"] == (models.WHOLE if tied else "colwise_gather_output")
    assert plan["model.layers.*.mlp.down_proj"] == "rowwise"
    if kind == "qwen3":
        assert plan["model.layers.*.self_attn.q_norm"] == models.WHOLE


def test_a_plan_of_a_configuration_that_says_nothing_of_tied_weights():
    """As Inkling's."""
    config = zoo.config_of("llama")
    with torch.device("meta"):
        model = pytest.importorskip("transformers").AutoModelForCausalLM.from_config(config)
    config.get_text_config = lambda: object()
    model.config = config
    assert models.plan_of(model)["lm_head"] == "colwise_gather_output"


def test_fingerprints_tell_models_apart(llama, copy):
    before = models.fingerprint(llama)
    assert models.fingerprint(copy) == before
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("0.001", "0.002"))
    assert models.fingerprint(copy) != before
