"""Schemes and layouts as strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpfuse.formats import SCHEME_NAMES, Layout, Scheme
from tpfuse.formats.scheme import _VARIANT_OF

SCALARS = ("eps", "amax_min", "amax_max")


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    name = draw(st.sampled_from(SCHEME_NAMES))
    options = {}
    for variant, names in _VARIANT_OF.items():
        if name in names and draw(st.booleans()):
            options[variant] = draw(st.floats(1e-12, 1.0)) if variant in SCALARS else True
    return Scheme(name, **options)


@given(schemes())
def test_scheme_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert str(Scheme.parse(str(scheme))) == str(scheme)


def test_scheme_is_canonical() -> None:
    assert str(Scheme.parse("fp8_token:eps=0,low_scale")) == "fp8_token:low_scale,eps=0.0"
    assert Scheme.parse("fp8_token:eps=1e-10") == Scheme("fp8_token")
    assert Scheme.parse("nvfp4:eps=0") == Scheme("nvfp4")
    assert str(Scheme.parse("fp8_group64")) == "fp8_group64"


def test_meaning_drops_spelling_only() -> None:
    scheme = Scheme.parse("fp8_token:low_scale,reciprocal,unclamped,eps=0.0")
    assert str(scheme.meaning()) == "fp8_token:eps=0.0"
    assert str(Scheme.parse("fp8_tensor:mul,low_value").meaning()) == "fp8_tensor:mul"
    assert str(Scheme.parse("nvfp4:div,eps=0.015625").meaning()) == "nvfp4:div,eps=0.015625"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8_tokens", "did you mean 'fp8_token'"),
        ("fp8_group32", "unknown quantisation scheme 'fp8_group32'"),
        ("fp8_token:recip", "did you mean 'reciprocal'"),
        ("fp8_token:mul", "has no variant 'mul'"),
        ("nvfp4:low_scale", "has no variant 'low_scale'"),
        ("fp8_token:eps", "takes a value"),
        ("fp8_tensor:mul=1", "takes no value"),
    ],
)
def test_scheme_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "row", "row+ue8m0", "row+ue8m0_packed", "col", "col+tma",
        "col+ue8m0", "col+tma+ue8m0", "col+tma+ue8m0_packed", "col+ue8m0_packed", "linear",
        "swizzled_128x4", "swizzled_8x4",
    ],
)
def test_layout_round_trip(text: str) -> None:
    assert str(Layout.parse(text)) == text


def test_layout_flags_in_any_order() -> None:
    assert str(Layout.parse("col+ue8m0+tma")) == "col+tma+ue8m0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swizzle_128x4", "did you mean 'swizzled_128x4'"),
        ("col+ue8", "did you mean 'ue8m0'"),
        ("row+tma", "column-major"),
        ("col+ue8m0+ue8m0_packed", "one of the two"),
        ("linear+ue8m0", "takes no flags"),
    ],
)
def test_layout_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.parse(text)
