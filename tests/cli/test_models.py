"""Bad models are found before anything starts."""

import json
import shutil

import numpy as np
import pytest

from tpfuse.cli import models
from tpfuse.cli.models import BadInput


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
    (copy / "model.safetensors.index.json").unlink()
    (copy / "a.safetensors").unlink()
    with pytest.raises(BadInput, match="no weights"):
        models.check_files(models.locate(str(copy)))


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


def test_fingerprints_tell_models_apart(llama, copy):
    before = models.locate(str(llama)).fingerprint()
    assert models.locate(str(copy)).fingerprint() == before
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("0.001", "0.002"))
    assert models.locate(str(copy)).fingerprint() != before
