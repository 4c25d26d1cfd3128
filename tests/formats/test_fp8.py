"""FP8 codecs against an exact oracle of e4m3, and the definition of their scales."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats import oracle
from tpfuse.formats import dequantize, quantize

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
MATRIX = st.tuples(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
DYNAMIC = ["fp8_token", "fp8_group128", "fp8_group64"]


def codes(q: torch.Tensor) -> list[int]:
    return q.view(torch.uint8).flatten().tolist()


def same_code(got: int, want: int) -> bool:
    return got & 127 == 127 if want & 127 == 127 else got == want  # NaN has a sign that means nothing


@given(st.lists(FLOATS, min_size=1, max_size=32), st.sampled_from([1.0, 0.25, 0.0371, 3e-5]))
def test_static_is_the_nearest_e4m3(values: list[float], scale: float) -> None:
    x, s = torch.tensor(values), torch.tensor(scale)
    q, scales = quantize(x, s, "fp8_tensor")
    assert scales.shape == (0,) and scales.dtype == torch.float32
    quotients = (x / s).tolist()  # IEEE division in FP32 is part of the definition; the rounding to e4m3 is not
    assert all(same_code(a, oracle.e4m3(v)) for a, v in zip(codes(q), quotients, strict=True))


def test_every_tie_goes_to_even() -> None:
    ties = [float((a + b) / 2) for a, b in zip(oracle.E4M3, oracle.E4M3[1:], strict=False)]
    around = [v for t in ties for v in (t, -t, math.nextafter(t, 0), math.nextafter(t, 1e3))]
    x = torch.tensor([float(torch.tensor(v)) for v in around])
    q, _ = quantize(x, torch.tensor(1.0), "fp8_tensor")
    assert codes(q) == [oracle.e4m3(v) for v in x.tolist()]
    assert all(code % 2 == 0 for code in codes(q)[::4])


def test_static_saturates_and_keeps_nan() -> None:
    x = torch.tensor([math.inf, -math.inf, 1e9, 448.0, 460.0, math.nan, -0.0, 2.0**-9, 2.0**-10, 2.0**-11])
    q, _ = quantize(x, torch.tensor(1.0), "fp8_tensor")
    out = q.float()
    assert out[:5].tolist() == [448, -448, 448, 448, 448]
    assert out[5].isnan() and math.copysign(1, out[6]) == -1
    assert out[7:].tolist() == [2.0**-9, 0.0, 0.0]  # the smallest subnormal; half of it is a tie to 0
    unclamped, _ = quantize(x, torch.tensor(1.0), "fp8_tensor:unclamped")
    assert codes(unclamped) == codes(x.to(unclamped.dtype))  # out of range is torch's: NaN or 448 by its version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_static_multiplies_and_divides(dtype: torch.dtype) -> None:
    x, s = torch.linspace(-3, 3, 64).to(dtype).view(4, 16), torch.tensor([[0.0123]])
    divided, _ = quantize(x, s, "fp8_tensor")
    assert torch.equal(divided.float(), (x.float() / 0.0123).to(torch.float8_e4m3fn).float())
    multiplied, _ = quantize(x, s.reciprocal(), "fp8_tensor:mul")
    assert torch.equal(
        dequantize(multiplied, torch.empty(0), s.reciprocal(), "fp8_tensor:mul"), multiplied.float() / s.reciprocal()
    )
    assert torch.equal(
        dequantize(divided, torch.empty(0), s, "fp8_tensor", dtype=dtype), (divided.float() * s).to(dtype)
    )
    low, _ = quantize(x, s.reshape(()), "fp8_tensor:low_value")
    assert torch.equal(low.float(), (x / s.reshape(())).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("scheme", DYNAMIC)
@settings(max_examples=25)
@given(MATRIX)
def test_dynamic_is_the_definition(scheme: str, matrix: tuple[int, int, int]) -> None:
    rows, cols, seed = matrix
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 3
    q, scales = quantize(x, None, scheme)
    group = int(scheme[9:] or 0) if "group" in scheme else cols
    assert scales.shape == (rows, math.ceil(cols / group))
    for m in range(rows):
        for g in range(scales.shape[1]):
            part = x[m, g * group : (g + 1) * group]  # the last group is as wide as what is left
            s = torch.maximum(part.abs().max() / 448, torch.tensor(1e-10))
            assert scales[m, g] == s
            want = [oracle.e4m3(v) for v in (part / s).tolist()]
            assert codes(q[m, g * group : (g + 1) * group].contiguous()) == want
    error = (dequantize(q, scales, None, scheme) - x).abs()
    assert (error <= x.abs() / 16 + scales.max() * 2.0**-10).all()


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("layout", ["row", "row+ue8m0", "col+tma+ue8m0", "col+tma+ue8m0_packed", "col"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dynamic_round_trip_in_every_layout(scheme: str, layout: str, dtype: torch.dtype) -> None:
    if scheme == "fp8_token" and layout != "row":
        with pytest.raises(ValueError, match="layout"):
            quantize(torch.randn(3, 320), None, scheme, layout)
        return
    torch.manual_seed(1)
    x = (torch.randn(2, 5, 320) * torch.logspace(-5, 3, 10).view(2, 5, 1)).to(dtype)
    q, scales = quantize(x, None, scheme, layout)
    back = dequantize(q, scales, None, scheme, layout, torch.float32)
    assert q.shape == x.shape == back.shape
    assert ((back - x.float()).norm(dim=-1) <= 0.04 * x.float().norm(dim=-1)).all()
    if "ue8m0" in layout:
        again, scales_again = quantize(back, None, scheme, layout)  # powers of two: a fixed point
        assert torch.equal(dequantize(again, scales_again, None, scheme, layout), back)


def test_dynamic_zeros_infinities_and_nan() -> None:
    x = torch.ones(4, 128)
    x[0], x[1, 3], x[2, 3] = 0.0, math.inf, math.nan
    q, scales = quantize(x, None, "fp8_token")
    assert scales[0] == 1e-10 and (q[0].float() == 0).all()
    assert scales[1].isinf() and q[1, 3].float().isnan() and (q[1, 4:].float() == 0).all()
    assert scales[2].isnan() and q[2].float().isnan().all()
    assert q[3].float().eq(448).all()
    bare, zero = quantize(x, None, "fp8_token:eps=0.0")
    assert zero[0] == 0 and bare[0].float().isnan().all()


def test_variants_of_dynamic_scales() -> None:
    torch.manual_seed(2)
    x = torch.randn(16, 256, dtype=torch.bfloat16)
    low = x.abs().amax(-1, keepdim=True) / 448  # in bf16
    q, scales = quantize(x, None, "fp8_token:low_scale,eps=0.0")
    assert torch.equal(scales, low.float()) and not torch.equal(scales, x.float().abs().amax(-1, True) / 448)
    assert torch.equal(q.float(), (x.float() / low.float()).clamp(-448, 448).to(q.dtype).float())
    q, _ = quantize(x, None, "fp8_token:low_scale,low_value,eps=0.0")
    assert torch.equal(q.float(), (x / low).clamp(-448, 448).to(q.dtype).float())
    exact = x.float().abs().amax(-1, keepdim=True) / 448
    q, scales = quantize(x, None, "fp8_token:reciprocal,eps=0.01")
    assert (exact.max() > 0.01 / 2) and torch.equal(scales, exact.clamp(min=0.01))
    assert torch.equal(q.float(), (x.float() * exact.clamp(min=0.01).reciprocal()).to(q.dtype).float())
    amax = x.float().abs().amax(-1, keepdim=True).clamp(2.5, 3.0)
    q, scales = quantize(x, None, "fp8_token:inverse,amax_min=2.5,amax_max=3.0")
    assert torch.equal(scales, amax / 448) and scales.min() < scales.max()
    assert torch.equal(q.float(), (x.float() * (448 / amax)).clamp(-448, 448).to(q.dtype).float())
    q, scales = quantize(x, None, "fp8_group64:log2", "row+ue8m0")
    assert torch.equal(scales, quantize(x, None, "fp8_group64", "row+ue8m0")[1])


def test_a_rounded_amax_is_the_amax_of_the_rounded() -> None:
    x = torch.randn(16, 256) * torch.logspace(-3, 3, 16).unsqueeze(1)
    for name, dtype in (("bf16_amax", torch.bfloat16), ("fp16_amax", torch.float16)):
        low = x.to(dtype).abs().amax(-1, keepdim=True)
        assert not torch.equal(low.float(), x.abs().amax(-1, keepdim=True))
        assert torch.equal(quantize(x, None, f"fp8_token:{name}")[1], low.float() / 448)
        assert torch.equal(quantize(x, None, f"fp8_token:{name},low_scale,eps=0.0")[1], (low / 448).float())


@pytest.mark.parametrize(
    ("scale", "scheme", "message"),
    [(None, "fp8_tensor", "needs a scale"), (torch.ones(()), "fp8_token", "computes its scales")],
)
def test_scale_errors(scale, scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(2, 128), scale, scheme)
