"""`tpfuse explain`, and its page."""

import json

import pytest

from tpfuse.cli import page
from tpfuse.cli.tables import site_rows
from tpfuse.report import Decline, Event, Line, RangeResult, Report
from tpfuse.target import Range


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_explain_needs_only_the_configuration(llama, cli, tmp_path, tied):
    folder = tmp_path / "bare"
    folder.mkdir()
    config = json.loads((llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    status, out, errors = cli(
        "explain", folder, "--tp", 2, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html"
    )
    assert status == 0, errors
    assert "model.layers.*.self_attn.o_proj" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"]["all_reduce_add_rms_norm"] == 2  # both all-reduces of the layer
    text = (tmp_path / "r.html").read_text()
    assert text.count("<details") == text.count("</details>") >= 3
    assert "tpfuse.all_reduce_add_rms_norm" in text
    assert "_c10d_functional.all_reduce" in text  # the graph before
    assert "http" not in text.replace("http-equiv", "")  # self-contained


@pytest.fixture
def experts(tmp_path):
    """The configuration of a DeepSeek-V3 of two layers, the second with experts."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, vocab_size=128,
        max_position_embeddings=128, architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


@pytest.mark.timeout(300)
def test_experts_in_the_dtype_that_is_the_default(experts, cli):
    status, out, errors = cli("explain", experts, "--tp", 2)
    assert status == 0, errors
    assert "all_reduce_add_rms_norm" in out


def test_a_model_that_torch_cannot_trace(llama, cli, monkeypatch):
    from transformers import LlamaForCausalLM

    def forward(self, input_ids, **_):
        return self.lm_head(self.model.embed_tokens(input_ids)[..., :7])

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    status, out, errors = cli("explain", llama, "--tp", 2)
    assert status == 1 and "Traceback" not in errors
    assert f"error: {llama}: torch " in errors and "cannot trace this model on 2 ranks" in errors


@pytest.mark.timeout(300)
def test_strict_names_what_is_missing(llama, cli):
    status, _, errors = cli("explain", llama, "--tp", 2, "--strict", "--set", "disable_passes=all_reduce_norm")
    assert status == 1
    assert "strict: expected fusions did not happen" in errors
    assert "model.layers.0.self_attn.o_proj" in errors


@pytest.mark.timeout(300)
def test_explain_for_gpus_has_every_kernel_of_ours(llama, cli, tmp_path):
    asked = "passes=sequence_parallel"
    status, _, errors = cli("explain", llama, "--tp", 2, "--device", "cuda", "--set", asked, "--json", tmp_path / "r.json")
    assert status == 0, errors
    events = json.loads((tmp_path / "r.json").read_text())["events"]
    assert "cuda:sharded" in {e["attributes"].get("kernel") for e in events}, events


def example() -> Report:
    report = Report()
    limits = Range(1, 256)
    sites = [f"model.layers.{i}.mlp" for i in range(2)]
    events = [Event("fired", "all_reduce_rms_norm", site, limits) for site in sites]
    events += [Event("lowered", "all_reduce_rms_norm", site, limits, attributes={"kernel": "triton"}) for site in sites]
    events += [Event("declined", "rms_norm", "model.norm", limits, Decline("axis", "the mean is over <dim 1>"))]
    before = [
        Line("mm", "aten.mm.default", "x, w", "f32[2, 4]", sites[0]),
        Line("add", "aten.add.Tensor", "mm, r", "f32[2, 4]", sites[0]),
    ]
    after = [before[0], Line("fused", "tpfuse.all_reduce_rms_norm", "mm, r", "(f32[2, 4], f32[2, 4])", sites[0])]
    report.add(RangeResult(0, limits, ["all_reduce_rms_norm"] * 2, events, before, after))
    return report


def test_sites_that_differ_in_the_layer_share_a_row_with_their_kernel():
    rows = site_rows(json.loads(example().to_json())["events"])
    assert rows == {
        ("fired", "all_reduce_rms_norm", "model.layers.*.mlp", "1…256", "triton", ""): 2,
        ("declined", "rms_norm", "model.norm", "1…256", "", "axis: the mean is over <dim 1>"): 1,
    }


def test_the_page_marks_what_changed_and_escapes():
    text = page.page(example(), "a <model>")
    assert "a &lt;model&gt;" in text and "&lt;dim 1&gt;" in text
    assert text.count('class="line gone"') == text.count('class="line new"') == 1
    assert 'class="line "' in text  # the product is on both sides


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("tpfuse.all_reduce", "fused"), ("_c10d_functional.all_reduce.default", "comm"), ("aten.mm.default", "matmul"),
        ("aten.mean.dim", "norm"), ("aten.transpose.int", "view"), ("aten.exp.default", "plain"),
    ],
)  # fmt: skip
def test_colours(operator, kind):
    assert page.kind(operator) == kind
