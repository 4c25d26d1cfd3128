"""Where scales lie: swizzling against a direct loop, strides, packing, gathering."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpfuse.formats import (
    apply_layout,
    quantize,
    remove_layout,
    scales_meta,
    swizzle,
    unswizzle,
)
from tpfuse.formats.fp8 import round_to_ue8m0
from tpfuse.formats.layouts import pack_ue8m0, unpack_ue8m0

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 13))
SWIZZLED = ("swizzled_128x4", "swizzled_8x4")


def offset(m: int, k: int, groups: int, layout: str) -> int:
    tiles = math.ceil(groups / 4)
    if layout == "swizzled_128x4":
        return (m // 128) * tiles * 512 + (k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4
    return (m // 8) * tiles * 32 + (k // 4) * 32 + (m % 8) * 4 + k % 4


def numbers(rows: int, groups: int) -> torch.Tensor:
    return (torch.arange(rows * groups) % 251 + 1).to(torch.uint8).view(rows, groups)


@pytest.mark.parametrize("layout", SWIZZLED)
@settings(max_examples=25)
@given(SIZES)
def test_swizzle_is_the_formula(layout: str, size: tuple[int, int]) -> None:
    rows, groups = size
    scales = numbers(rows, groups)
    shape, _, _ = scales_meta(rows, groups * 16, "nvfp4", layout)
    expected = [0] * math.prod(shape)
    for m in range(rows):
        for k in range(groups):
            expected[offset(m, k, groups, layout)] = int(scales[m, k])
    out = swizzle(scales, layout)
    assert tuple(out.shape) == shape
    assert out.flatten().tolist() == expected
    assert torch.equal(unswizzle(out, rows, groups, layout), scales)


@settings(max_examples=25)
@given(SIZES)
def test_ue8m0_packing_is_the_definition(size: tuple[int, int]) -> None:
    rows, groups = size
    exponents = torch.arange(rows * groups).view(rows, groups) % 247 - 126
    scales = torch.ldexp(torch.ones(rows, groups), exponents)
    packed = pack_ue8m0(scales)
    assert packed.dtype == torch.int32 and packed.shape == (rows, math.ceil(groups / 4))
    for m in range(min(rows, 5)):
        for word in range(packed.shape[1]):
            for j in range(4):
                k = 4 * word + j
                byte = (int(packed[m, word]) >> (8 * j)) & 0xFF
                assert byte == (int(exponents[m, k]) + 127 if k < groups else 0)
    assert torch.equal(unpack_ue8m0(packed, groups), scales)


def test_ue8m0_extremes() -> None:
    scales = round_to_ue8m0(torch.tensor([[0.0, 2.0**-149, 2.0**-127, 1.0, 1.0 + 2**-23, math.inf, math.nan]]))
    assert scales[0, :5].tolist() == [2.0**-127, 2.0**-126, 2.0**-126, 1.0, 2.0]
    assert math.isinf(scales[0, 5]) and math.isnan(scales[0, 6])
    back = unpack_ue8m0(pack_ue8m0(scales), 7)
    assert torch.equal(back[0, :5], scales[0, :5]) and back[0, 5:].isnan().all()


@settings(max_examples=50)
@given(st.floats(2.0**-120, 2.0**120, width=32))
def test_ue8m0_rounds_up_to_a_power_of_two(value: float) -> None:
    rounded = float(round_to_ue8m0(torch.tensor([value])))
    assert math.frexp(rounded)[0] == 0.5 and rounded / 2 < value <= rounded


@pytest.mark.parametrize("rows", [1, 3, 4, 129])
@pytest.mark.parametrize(
    ("layout", "stride"),
    [("row", None), ("col", lambda rows: rows), ("col+tma", lambda rows: (rows + 3) // 4 * 4)],
)
@pytest.mark.parametrize("flag", ["", "+ue8m0", "+ue8m0_packed"])
def test_fp8_layouts_hold_the_scales(rows: int, layout: str, stride, flag: str) -> None:
    groups = 6
    scales = round_to_ue8m0(torch.rand(rows, groups) + 0.01) if flag else torch.rand(rows, groups)
    out = apply_layout(scales, layout + flag)
    words = 2 if flag == "+ue8m0_packed" else groups
    assert out.shape == (rows, words)
    assert out.stride() == ((words, 1) if stride is None else (1, stride(rows)))
    assert out.dtype == (torch.int32 if flag == "+ue8m0_packed" else torch.float32)
    assert torch.equal(remove_layout(out, rows, groups, layout + flag), scales)
    meta = scales_meta(rows, groups * 128, "fp8_group128", layout + flag)
    assert meta == (tuple(out.shape), out.stride(), out.dtype)


ALL = [
    ("fp8_token", "row"),
    ("fp8_group64", "row"),
    ("fp8_group64", "col"),
    ("fp8_group64", "col+tma"),
    ("fp8_group64", "col+tma+ue8m0_packed"),
    ("nvfp4", "linear"),
    ("nvfp4", "swizzled_128x4"),
    ("nvfp4", "swizzled_8x4"),
]


@pytest.mark.parametrize(("scheme", "layout"), ALL)
@pytest.mark.parametrize("rows", [(8, 8), (128, 5), (7, 7, 6), (129, 129, 1), (256, 128, 3)])
def test_gathered_scales_are_those_of_the_stacked_rows(scheme: str, layout: str, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(rows), 192) * torch.rand(sum(rows), 1) * 10
    scale = torch.tensor(300.0) if scheme == "nvfp4" else None
    q, scales = quantize(x, scale, scheme, layout)
    parts = [quantize(part, scale, scheme, layout) for part in x.split(rows)]
    groups = {"nvfp4": 12, "fp8_group64": 3, "fp8_token": 1}[scheme]
    plain = [remove_layout(part[1], count, groups, layout) for part, count in zip(parts, rows, strict=True)]
    gathered = apply_layout(torch.cat(plain), layout)
    assert torch.equal(torch.cat([part[0] for part in parts]).view(torch.uint8), q.view(torch.uint8))
    assert gathered.stride() == scales.stride()
    logical = [remove_layout(t, len(x), groups, layout).view(torch.uint8) for t in (gathered, scales)]
    assert torch.equal(*logical)


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [("nvfp4", "row"), ("fp8_group128", "linear"), ("fp8_token", "col"), ("fp8_tensor", "swizzled_8x4")],
)
def test_layouts_a_scheme_cannot_have(scheme: str, layout: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        scales_meta(4, 128, scheme, layout)
