"""A Llama of one layer with random weights, saved as a Hugging Face folder with a tokenizer of words `w4` … `w127`."""

import sys
from pathlib import Path

import pytest
import torch

VOCABULARY = 128


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128, rms_norm_eps=1e-3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # small inputs see epsilon, weights away from 1 see a wrong weight
        parameter.data.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the command line in this process → (exit status, what it printed, its errors)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        from tpfuse.cli.__main__ import main

        monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
        monkeypatch.setattr(sys, "argv", ["tpfuse", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        told = capsys.readouterr()
        return status, told.out, told.err

    return call
