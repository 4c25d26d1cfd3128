"""NVFP4 against an exact oracle of e2m1 and e4m3."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats import oracle
from tpfuse.formats import dequantize, quantize, remove_layout
from tpfuse.formats.nvfp4 import decode_e2m1, encode_e2m1, pack, unpack

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True)
THRESHOLDS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def scale_codes(scales: torch.Tensor) -> list[int]:
    return scales.view(torch.uint8).flatten().tolist()


@given(st.lists(FLOATS, min_size=1, max_size=64))
def test_encode_is_the_nearest_e2m1(values: list[float]) -> None:
    assert encode_e2m1(torch.tensor(values)).tolist() == [oracle.e2m1(v) for v in values]


@pytest.mark.parametrize(("threshold", "even"), zip(THRESHOLDS, [0, 2, 2, 4, 4, 6, 6], strict=True))
def test_ties_go_to_the_even_code(threshold: float, even: int) -> None:
    t = torch.tensor(threshold)
    around = torch.stack([torch.nextafter(t, t * 0), t, torch.nextafter(t, t * 2)])
    below, tie, above = encode_e2m1(around).tolist()
    assert (tie, above - below) == (even, 1) and even in (below, above)
    assert encode_e2m1(-around).tolist() == [below | 8, tie | 8, above | 8]


def test_special_values() -> None:
    special = torch.tensor([math.inf, -math.inf, 1e30, 0.0, -0.0, 2.0**-149, -(2.0**-149), math.nan])
    assert encode_e2m1(special).tolist() == [7, 15, 7, 0, 8, 0, 8, 7]


def test_codes_round_trip() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode_e2m1(codes)
    assert values[:8].tolist() == [float(v) for v in oracle.E2M1]
    assert torch.equal(values[8:].signbit(), torch.ones(8, dtype=torch.bool)) and torch.equal(values[8:], -values[:8])
    assert torch.equal(encode_e2m1(values), codes)
    packed = pack(codes)
    assert packed.tolist() == [e | (o << 4) for e, o in zip(range(0, 16, 2), range(1, 16, 2), strict=True)]
    assert torch.equal(unpack(packed), codes)


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1.0, 1e-3, 40.0]))
def test_quantize_is_the_definition(rows: int, groups: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, groups * 16, generator=generator) * size).bfloat16()
    g = 448 * 6 / x.float().abs().max()
    q, scales = quantize(x, g, "nvfp4", "linear")
    assert q.shape == (rows, groups * 8) and scales.shape == (rows, groups)
    codes = unpack(q).view(rows, groups, 16)
    for m in range(rows):
        for b in range(groups):
            block = x[m, b * 16 : b * 16 + 16].float()
            want = oracle.e4m3(min(float(block.abs().max() / 6 * g), 448.0))
            assert scale_codes(scales[m, b].reshape(1)) == [want]
            sf = float(oracle.e4m3_value(want))
            factor = g / sf if sf else torch.tensor(0.0)
            assert codes[m, b].tolist() == [oracle.e2m1(v) for v in (block * factor).tolist()]


def test_round_trip_error_is_within_half_a_step() -> None:
    torch.manual_seed(3)
    x = torch.randn(40, 208)
    g = 448 * 6 / x.abs().max()
    for layout in ("linear", "swizzled_128x4", "swizzled_8x4"):
        q, scales = quantize(x, g, "nvfp4", layout)
        back = dequantize(q, scales, g, "nvfp4", layout)
        sf = remove_layout(scales, 40, 13, layout).float().repeat_interleave(16, 1) / g
        # Half the widest step (4 to 6); the block's maximum may also saturate by the rounding of sf, 1/16 of 6.
        assert ((back - x).abs() <= sf * 1.0001).all()
        assert torch.equal(dequantize(*quantize(back, g, "nvfp4", layout), g, "nvfp4", layout).norm(), back.norm())


def test_zero_blocks_tiny_blocks_and_nan() -> None:
    x = torch.zeros(1, 64)
    x[0, 16:32], x[0, 16] = 1e-30, -1e-30  # far below the smallest block scale: everything is 0, signs kept
    x[0, 32], x[0, 33] = math.nan, 1.0
    x[0, 48], x[0, 49] = math.inf, -1.0
    q, scales = quantize(x, torch.tensor(1.0), "nvfp4", "linear")
    codes = unpack(q)[0]
    assert scale_codes(scales)[:2] == [0, 0] and scales[0, 2].float().isnan() and scales[0, 3].float() == 448
    assert codes[:16].tolist() == [0] * 16 and codes[16:32].tolist() == [8] + [0] * 15
    assert codes[32:34].tolist() == [7, 7] and codes[48:50].tolist() == [7, 8]
    back = dequantize(q, scales, torch.tensor(1.0), "nvfp4", "linear")
    assert back[0, 32:48].isnan().all() and (back[0, :32] == 0).all() and back[0, 48] == 448 * 6


def test_no_global_scale_is_one_and_div_is_its_inverse() -> None:
    torch.manual_seed(4)
    x = torch.randn(8, 64)
    for a, b in zip(quantize(x, None, "nvfp4", "linear"), quantize(x, torch.ones(()), "nvfp4", "linear"), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    g = torch.tensor(512.0)  # a power of two: dividing by 1/g is exact
    for a, b in zip(quantize(x, g, "nvfp4", "linear"), quantize(x, 1 / g, "nvfp4:div", "linear"), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    floored, scales = quantize(torch.zeros(1, 16), None, "nvfp4:eps=0.015625", "linear")
    assert scales.float().item() == 2.0**-6 and floored.eq(0).all()


def test_columns_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 16 columns, not 24"):
        quantize(torch.ones(2, 24), torch.ones(()), "nvfp4", "linear")
