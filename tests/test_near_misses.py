"""Models that nearly match: the report names what was missing, and nothing is fused.

One gloo rank; the graphs are those of several.
"""

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F

import tpfuse

HIDDEN = 32


pytestmark = pytest.mark.usefixtures("interpreted_rank")


def reduced(x, op="sum"):
    return collectives.all_reduce(x * 2, op, dist.group.WORLD)


def norm(x, weight, axis=-1):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(axis, keepdim=True) + 1e-5)).to(x.dtype)


def second_user(x, residual, weight):
    y = reduced(x)
    h = residual + y
    return norm(h, weight), h, y.sigmoid()


def added_twice(x, residual, weight):
    y = reduced(x)
    h = residual + y
    return norm(h, weight), h + y


MODELS = {
    # the code: (the model, a word of the detail)
    "axis": (lambda x, residual, weight: norm(residual + reduced(x), weight, axis=0), r"over dimensions \[0\] of 2"),
    "second_user": (second_user, r"sigmoid|convert_element_type"),
    "added twice: second_user": (added_twice, r"add"),
    "weight_dtype": (lambda x, residual, weight: norm(residual + reduced(x), weight.float()), r"torch.float32.*torch.bfloat16"),
    "leaves_graph": (lambda x, residual, weight: reduced(x), r"whole model"),
    "no_norm": (lambda x, residual, weight: torch.tanh(reduced(x)), r"used by .*"),
    # what was not raised behind another operator is that one's affair
    "far: no_norm": (lambda x, residual, weight: norm(norm(torch.tanh(reduced(x)), weight), weight, axis=0), r"by aten.tanh"),
    "reduce_op": (lambda x, residual, weight: norm(residual + reduced(x, "max"), weight), r"combined by max"),
    "variance": (lambda x, residual, weight: F.layer_norm(residual + reduced(x), (HIDDEN,), weight), r"layer norm"),
    "bias_shape": (lambda x, residual, weight: norm(residual[:1] + reduced(x), weight), r"\[1, .*no bias"),
}


def inputs():
    torch.manual_seed(0)
    return torch.randn(6, HIDDEN).bfloat16(), torch.randn(6, HIDDEN).bfloat16(), (torch.rand(HIDDEN) + 0.5).bfloat16()


@pytest.mark.parametrize("name", MODELS)
def test_reason(name):
    code = name.split(": ")[-1]
    model, detail = MODELS[name]
    compiled = tpfuse.compile(model, dynamic=True, fullgraph=True)
    expected, got = model(*inputs()), compiled(*inputs())
    assert_close(got, expected)
    assert not compiled.report.fired() and "all_reduce_add_rms_norm" not in compiled.report.counts()
    mine = [e for e in compiled.report.declined() if e.reason.code == code]
    assert mine, str(compiled.report)
    assert any(re.search(detail, e.reason.detail) for e in mine), mine
    if code != "reduce_op":  # that one is no all-reduce of ours
        (site,) = [e for e in compiled.report.declined() if e.attributes.get("operator") == "all_reduce"]
        assert site.reason.code == code, str(compiled.report)
        assert site.rule.startswith("all_reduce")


def test_strict_names_the_site_and_the_reason():
    model, _ = MODELS["weight_dtype"]
    strict = tpfuse.compile(model, {"strict": True}, dynamic=True, fullgraph=True)
    with pytest.raises(Exception, match="(?s)strict.*all_reduce.*weight_dtype.*torch.float32"):
        strict(*inputs())
    assert any(e.reason and e.reason.code == "weight_dtype" for e in strict.report.declined())


@torch.enable_grad()
def test_gradients():
    """A graph with gradients goes to plain Inductor, and says so."""
    x, residual, weight = inputs()
    compiled = tpfuse.compile(lambda x: norm(residual + reduced(x), weight), dynamic=True, fullgraph=True)
    compiled(x.requires_grad_()).float().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert {e.reason.code for e in compiled.report.declined()} == {"training"} and not compiled.report.counts()


def assert_close(got, expected):
    got, expected = (v if isinstance(v, tuple) else (v,) for v in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2e-2, atol=1e-2)
