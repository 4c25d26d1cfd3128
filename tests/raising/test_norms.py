"""Norms in every spelling: raised with the right attributes, bit-identical inlined; near misses with their reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.raising.capture import raised

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HIDDEN = 64


def rows(dtype: torch.dtype) -> Tensor:
    return (torch.randn(24, HIDDEN) * 3e-3).to(dtype)  # small: an epsilon of 1e-6 is a tenth of the mean square


def weight(dtype: torch.dtype) -> Tensor:
    return (torch.rand(HIDDEN) * 2.75 + 0.25).to(dtype)


def squares(x: Tensor) -> Tensor:
    return x.float() * x.float()


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def statistics(x: Tensor) -> Tensor:
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


POSITIVE = {
    "llama": (lambda x, w: w * unit(x).to(x.dtype), 0.0, "cast_first"),
    "llama, weight last": (lambda x, w: unit(x).to(x.dtype) * w, 0.0, "cast_first"),
    "casts written twice": (lambda x, w: w * (x.float() * statistics(x)).to(x.dtype), 0.0, "cast_first"),
    "T5, root first": (lambda x, w: w * (statistics(x) * x).to(x.dtype), 0.0, "cast_first"),
    "x times x": (
        lambda x, w: w * (x.float() * torch.rsqrt(squares(x).mean(-1, True) + 1e-6)).to(x.dtype), 0.0, "cast_first"
    ),
    "epsilon first": (
        lambda x, w: w * (x.float() * torch.rsqrt(1e-6 + squares(x).mean(-1, True))).to(x.dtype), 0.0, "cast_first"
    ),
    "mean by sum": (
        lambda x, w: w * (x.float() * torch.rsqrt(squares(x).sum(-1, True) / HIDDEN + 1e-6)).to(x.dtype),
        0.0,
        "cast_first",
    ),
    "mean, then unsqueezed": (
        lambda x, w: w * (x.float() * torch.rsqrt(squares(x).mean(-1) + 1e-6).unsqueeze(-1)).to(x.dtype),
        0.0,
        "cast_first",
    ),
    "power": (
        lambda x, w: w * (x.float() * torch.pow(squares(x).mean(-1, True) + 1e-6, -0.5)).to(x.dtype),
        0.0,
        "cast_first",
    ),
    "torch": (lambda x, w: F.rms_norm(x, (HIDDEN,), w, 1e-6), 0.0, "cast_last"),
    "OLMo2": (lambda x, w: (w * unit(x)).to(x.dtype), 0.0, "cast_last"),
    "Gemma": (lambda x, w: (unit(x) * (1.0 + w.float())).to(x.dtype), 1.0, "cast_last"),
    "Gemma in the model's dtype": (lambda x, w: (unit(x) * (1 + w)).to(x.dtype), 1.0, "cast_last+low_bias"),
    "any bias": (lambda x, w: (unit(x) * (w.float() + 0.5)).to(x.dtype), 0.5, "cast_last"),
    "Gemma, cast first": (lambda x, w: unit(x).to(x.dtype) * (1 + w), 1.0, "cast_first+low_bias"),
    "kept in FP32": (lambda x, w: unit(x) * w, 0.0, "cast_last+keep_f32"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POSITIVE)
def test_spelling(name: str, dtype: torch.dtype) -> None:
    fn, bias, rounding = POSITIVE[name]
    if dtype == torch.float32:  # nothing is rounded, so the spellings differ in nothing but the bias
        rounding = "cast_last" if bias else "cast_first"
    (norm,) = raised(fn, rows(dtype), weight(dtype)).named("rms_norm")
    assert (norm["eps"], norm["weight_bias"], norm["rounding"]) == (1e-6, bias, rounding)
    assert norm["x"].op == norm["weight"].op == "placeholder"


@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", POSITIVE)
def test_weight_of_another_dtype(name: str, dtype: torch.dtype, other: torch.dtype) -> None:
    (norm,) = raised(POSITIVE[name][0], rows(dtype), weight(other)).named("rms_norm")
    assert norm["weight"] is not None and norm["weight_bias"] == POSITIVE[name][1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_weight(dtype: torch.dtype) -> None:
    for fn in (lambda x: F.rms_norm(x, (HIDDEN,), None, 1e-5), lambda x: unit(x, 1e-5).to(x.dtype)):
        (norm,) = raised(fn, rows(dtype)).named("rms_norm")
        assert norm["weight"] is None and norm["eps"] == 1e-5 and norm["rounding"] == "cast_first"


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8, 2.220446049250313e-16, 3.3e-7, 0.1])
def test_epsilon_is_recovered(eps: float) -> None:
    """torch writes the FP32 rounding of an epsilon into the graph; the shortest decimal of that value comes back."""
    (norm,) = raised(lambda x: F.rms_norm(x, (HIDDEN,), None, eps), rows(torch.float32)).named("rms_norm")
    assert norm["eps"] == pytest.approx(eps, rel=1e-7)
    if len(repr(eps)) < 8:
        assert norm["eps"] == eps


def test_epsilon_of_float64_is_kept() -> None:
    (norm,) = raised(lambda x: F.rms_norm(x, (HIDDEN,), None, 1.00000001e-6), rows(torch.float64)).named("rms_norm")
    assert norm["eps"] == 1.00000001e-6


NEAR_MISSES = {
    "product_order": lambda x, w: ((w * x.float()) * statistics(x)).to(x.dtype),
    "axis": lambda x, w: x.float() * torch.rsqrt(x.float().pow(2).mean(0, keepdim=True) + 1e-6),
    "no_mean": lambda x, w: x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + 1e-6),
    "no_square": lambda x, w: x.float() * torch.rsqrt(x.float().abs().mean(-1, keepdim=True) + 1e-6),
    "variance": lambda x, w: F.layer_norm(x, (HIDDEN,), w, None, 1e-6),
    "sqrt": lambda x, w: x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6),
    "epsilon": lambda x, w: x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).clamp_min(1e-6)),
    "root_cast": lambda x, w: x * statistics(x).to(x.dtype),
    "other_product": lambda x, w: x.float().exp() * statistics(x),
    "other_precision": lambda x, w: x.double() * statistics(x),
    "not_a_norm": lambda x, w: torch.rsqrt(x.float().exp()),
    "low_precision": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
}


def test_mean_in_another_precision() -> None:
    def model(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + 1e-6)

    assert raised(model, rows(torch.float32)).reasons == ["other_precision"]


def test_layer_norm_by_hand() -> None:
    def model(x: Tensor) -> Tensor:
        centred = x.float() - x.float().mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)

    assert raised(model, rows(torch.bfloat16)).reasons == ["variance"]


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_near_miss(reason: str) -> None:
    found = raised(NEAR_MISSES[reason], rows(torch.bfloat16), weight(torch.bfloat16))
    assert found.reasons == [reason] and not found.named("rms_norm")


def test_heads_before_tokens() -> None:
    """Gemma3 normalises its heads after it has put them before the tokens; the norm moves above the transposition."""
    (norm,) = raised(
        lambda x, w: (unit(x.view(2, -1, 4, HIDDEN).transpose(1, 2)) * (1.0 + w.float())).to(x.dtype),
        torch.randn(2, 24, 4 * HIDDEN).bfloat16(),
        weight(torch.bfloat16),
        dynamic=1,
    ).named("rms_norm")
    assert norm["x"].meta["val"].is_contiguous() and norm["weight_bias"] == 1.0


def test_other_strides() -> None:
    """A result that lies otherwise in memory than the operator's is left alone."""
    found = raised(lambda x, w: unit(x.t().contiguous().t()) * w, rows(torch.float32), weight(torch.float32))
    assert found.reasons == ["strides"]
