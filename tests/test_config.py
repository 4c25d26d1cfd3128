"""Config: what its fields take, from Python, from text and from the environment."""

import pytest

import tpfuse
from tpfuse.config import PASSES, Config, from_text


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("STRICT", "FUEL", "PASSES", "RANGES", "TIMEOUT"):
        monkeypatch.delenv(f"TPFUSE_{name}", raising=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("strict=yes", True), ("verify=0", False), ("fuel=0", 0), ("fuel=null", None), ("timeout=2.5", 2.5),
        ("sizes=7", (7,)), ("ranges=256,2048", (256, 2048)), ("ranges=[256]", (256,)), ("ranges=[]", ()),
        ("passes=", ()), ("passes=async_tp, norm_quantize", ("async_tp", "norm_quantize")), ("kernels=triton", "triton"),
        ('ranges={"16": {"passes": ["async_tp"]}}', {16: {"passes": ("async_tp",)}}), ("table=/a/b", "/a/b"),
    ],
)  # fmt: skip
def test_text(text, value):
    name, _, text = text.partition("=")
    assert getattr(Config.of({name: from_text(text)}), name) == value


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strict": "maybe"}, r"Config\(strict='maybe'\): expected a yes or no"),
        ({"fuel": -1}, "fuel=-1.*expected a whole number from 0 on"),
        ({"fuel": 1.5}, "whole number"),
        ({"max_tokens": 0}, "whole number from 1 on"),
        ({"ranges": [256, 0]}, "whole number from 1 on"),
        ({"ranges": {256: ("async_tp",)}}, "for each end point"),
        ({"ranges": {256: {"pases": ()}}}, "did you mean 'passes'"),
        ({"ranges": {256: {"passes": ("async_pt",)}}}, "did you mean 'async_tp'"),
        ({"sizes": "x"}, "whole number"),
        ({"passes": 5}, "unknown pass 5"),
        ({"kernels": None}, "unknown kernels preference None"),
        ({"table": 3}, "expected a path"),
        ({"timeout": 0}, "seconds, more than 0"),
        ({"timeout": float("inf")}, "seconds, more than 0"),
    ],
)
def test_values_that_a_field_cannot_have(options, told):
    with pytest.raises(ValueError, match=told):
        Config(**options)
    with pytest.raises(ValueError, match=told):
        tpfuse.compile(lambda x: x, options)


def test_environment(monkeypatch):
    monkeypatch.setenv("TPFUSE_STRICT", "1")
    monkeypatch.setenv("TPFUSE_RANGES", "256,2048")
    monkeypatch.setenv("TPFUSE_FUEL", "")  # as good as unset
    assert Config.of({"passes": PASSES}) == Config(strict=True, ranges=(256, 2048), passes=PASSES)
    assert Config.of({"strict": False}).strict is False
    monkeypatch.setenv("TPFUSE_FUEL", "many")
    with pytest.raises(ValueError, match="TPFUSE_FUEL='many': expected a whole number"):
        Config.of(None)


def test_a_misspelt_variable_is_not_ignored(monkeypatch):
    monkeypatch.setenv("TPFUSE_STRICTT", "1")
    with pytest.raises(ValueError, match="did you mean TPFUSE_STRICT?"):
        Config.of(None)


def test_what_is_no_config():
    with pytest.raises(TypeError, match="a Config or a mapping of its fields, got str"):
        tpfuse.compile(lambda x: x, "strict")  # type: ignore[arg-type]
