"""Quantisations in every spelling: raised with the right scheme and layout, bit-identical inlined; near misses named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.raising.capture import capture, raised, trace

E4M3 = torch.float8_e4m3fn
HIDDEN = 256
SCALE = torch.tensor(0.0123)


def rows(dtype: torch.dtype = torch.bfloat16, tokens: int = 24) -> Tensor:
    x = (torch.randn(tokens, HIDDEN) * torch.logspace(-4, 2, tokens).unsqueeze(1)).to(dtype)
    x[3, ::3], x[5, 7] = 0, 3e4  # saturates under a static scale
    return x


def fp8(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(E4M3)


def per_row(x: Tensor, floor: float | None = 1e-10) -> tuple[Tensor, Tensor]:
    s = x.float().abs().amax(-1, keepdim=True) / 448
    s = s if floor is None else s.clamp(min=floor)
    return fp8(x.float() / s), s


def torchao(x: Tensor, block: list[int], **bounds: float) -> tuple[Tensor, Tensor]:
    from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

    scale = _choose_scale_float8(x, block, **bounds)
    return _quantize_affine_float8(x, scale), scale


def reciprocal_token(x: Tensor) -> tuple[Tensor, Tensor]:
    amax, _ = x.abs().max(dim=-1)
    s = (amax.unsqueeze(-1).to(torch.float32) / 448.0).clamp(min=1 / (448 * 512.0))
    return fp8(x.float() * s.reciprocal()), s


def grouped(x: Tensor, group: int = 128, view: Callable[[Tensor], Tensor] = lambda s: s) -> tuple[Tensor, Tensor]:
    blocks = x.view(-1, HIDDEN // group, group)
    s = (blocks.abs().max(dim=-1, keepdim=True)[0].float() / 448.0).clamp(min=1e-10)
    return fp8(blocks / s).view(-1, HIDDEN), view(s.squeeze(-1))


def columns(s: Tensor) -> Tensor:
    return s.transpose(-2, -1).contiguous().transpose(-1, -2)


def tma(s: Tensor) -> Tensor:
    out = torch.empty_strided((s.shape[0], s.shape[1]), (1, (s.shape[0] + 3) // 4 * 4))
    out.copy_(s)
    return out


def inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.view(x.shape[0], -1, 128)
    amax = blocks.abs().float().amax(dim=2).view(x.shape[0], -1).clamp(1e-4)
    return (blocks * (448.0 / amax.unsqueeze(2))).to(E4M3).view(x.shape), amax / 448.0


def power_of_two(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.view(x.shape[0], -1, 128)
    s = blocks.abs().float().amax(dim=2).view(x.shape[0], -1).clamp(1e-4) / 448.0
    s = torch.exp2(torch.ceil(torch.log2(s)))
    return (blocks * (1.0 / s.unsqueeze(2))).to(E4M3).view(x.shape), s


def all_low(x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-6)
    return fp8(x / s), s.float()


POSITIVE: dict[str, tuple[Callable[..., Any], str, str]] = {
    "static": (lambda x, s: fp8(x.float() / s), "fp8_tensor", "row"),
    "static, scale [1]": (lambda x, s: fp8(x / s.view(1)), "fp8_tensor", "row"),
    "static, low": (lambda x, s: fp8(x / s), "fp8_tensor:low_value", "row"),
    "static, product": (lambda x, s: fp8(s * x.float()), "fp8_tensor:mul", "row"),
    "static, reciprocal": (lambda x, s: fp8(x.float() * s.reciprocal()), "fp8_tensor:reciprocal", "row"),
    "static, 1 / scale": (lambda x, s: fp8(x.float() * (1.0 / s)), "fp8_tensor:reciprocal", "row"),
    "static, number": (lambda x, s: fp8(x.float() / 0.0123), "fp8_tensor", "row"),
    "static, number, low": (lambda x, s: fp8(x / 0.0123), "fp8_tensor:low_value", "row"),
    "static, minimum": (
        lambda x, s: torch.minimum(torch.maximum(x.float() / s, torch.full((), -448.0)), torch.full((), 448.0)).to(E4M3),
        "fp8_tensor", "row",
    ),
    "static, unclamped": (lambda x, s: (x.float() / s).to(E4M3), "fp8_tensor:unclamped", "row"),
    "static, 3-D": (lambda x, s: fp8(x.view(-1, 2, HIDDEN).float() / s), "fp8_tensor", "row"),
    "static, bfloat16 scale": (lambda x, s: fp8(x.float() / s.bfloat16()), "fp8_tensor", "row"),
    "scale of all tokens": (lambda x, s: torchao(x, list(x.shape)), "fp8_tensor", "row"),
    "token": (lambda x, s: per_row(x), "fp8_token", "row"),
    "token, no floor": (lambda x, s: per_row(x, None), "fp8_token:eps=0.0", "row"),
    "token, torchao": (lambda x, s: torchao(x, [1, HIDDEN]), "fp8_token:low_scale,eps=0.0", "row"),
    "token, torchao 3-D": (
        lambda x, s: torchao(x.view(1, -1, HIDDEN), [1, 1, HIDDEN]), "fp8_token:low_scale,eps=0.0", "row"
    ),
    "token, torchao bounds": (
        lambda x, s: torchao(x, [1, HIDDEN], hp_value_lb=1e-3, hp_value_ub=2.0),
        "fp8_token:low_scale,eps=0.0,amax_min=0.001,amax_max=2.0", "row",
    ),
    "token, reciprocal": (lambda x, s: reciprocal_token(x), "fp8_token:reciprocal,eps=4.359654017857143e-06", "row"),
    "token, low": (lambda x, s: all_low(x), "fp8_token:low_scale,low_value,eps=1e-06", "row"),
    "group 128": (lambda x, s: grouped(x), "fp8_group128", "row"),
    "group 64": (lambda x, s: grouped(x, 64), "fp8_group64", "row"),
    "group 128, torchao": (lambda x, s: torchao(x, [1, 128]), "fp8_group128:low_scale,eps=0.0", "row"),
    "group 64, torchao": (lambda x, s: torchao(x, [1, 64]), "fp8_group64:low_scale,eps=0.0", "row"),
    "group, columns": (lambda x, s: grouped(x, 128, columns), "fp8_group128", "col"),
    "group, TMA": (lambda x, s: grouped(x, 64, tma), "fp8_group64", "col+tma"),
    "group, inverse": (lambda x, s: inverse(x), "fp8_group128:inverse,unclamped,eps=0.0,amax_min=0.0001", "row"),
    "group, power of two": (
        lambda x, s: power_of_two(x), "fp8_group128:reciprocal,unclamped,log2,eps=0.0,amax_min=0.0001", "row+ue8m0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIVE)
def test_raised(name: str) -> None:
    spelling, scheme, layout = POSITIVE[name]
    result = raised(spelling, rows(), SCALE)
    (call,) = result.named("quantize")
    assert (call["scheme"], call["layout"]) == (scheme, layout) and not result.reasons


@pytest.mark.parametrize("name", ["token", "token, torchao", "group 128", "token, low"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    spelling, scheme, _ = POSITIVE[name]
    if dtype == torch.float32:
        scheme = scheme.replace("low_scale,", "").replace("low_value,", "")
    (call,) = raised(spelling, rows(dtype), SCALE).named("quantize")
    assert call["scheme"] == scheme


@pytest.mark.parametrize("name", ["token, torchao", "group, columns", "static, minimum"])
def test_through_inductors_front_end(name: str) -> None:
    spelling, scheme, layout = POSITIVE[name]
    (call,) = raised(spelling, rows(), SCALE, through=capture).named("quantize")
    assert (call["scheme"], call["layout"]) == (scheme, layout)


def test_one_token_is_a_row_not_a_tensor() -> None:
    (call,) = raised(lambda x: torchao(x, [1, HIDDEN]), rows(tokens=8)[:1].clone(), dynamic=None).named("quantize")
    assert call["scheme"] == "fp8_token:low_scale,eps=0.0"


def test_the_input_is_what_the_model_has_before_its_casts() -> None:
    """A cast written before the views is looked through: the quantise takes the narrow rows."""

    def spelling(x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = x.float().view(-1, 2, 128)
        s = torch.clamp(blocks.abs().amax(-1, keepdim=True) / 448, min=1e-10)
        return fp8(blocks / s).view(x.shape), s.view(-1, 2)

    (call,) = raised(spelling, rows()).named("quantize")
    assert call["x"].op == "placeholder" and call["scheme"] == "fp8_group128"


def unrounded(x: Tensor, group: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """What is left when a compiler drops the rounding of the values between a norm and torchao's quantise."""
    blocks, low = x.view(-1, HIDDEN // group, group), x.bfloat16().view(-1, HIDDEN // group, group)
    s = (low.abs().amax(-1, keepdim=True) / 448).float()
    return fp8(blocks / s).view(x.shape), s.squeeze(-1)


def unrounded_row(x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.half().abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-10)
    return fp8(x / s), s


@pytest.mark.parametrize(
    ("spelling", "scheme"),
    [
        (lambda x: unrounded(x, 128), "fp8_group128:bf16_amax,low_scale,eps=0.0"),
        (unrounded_row, "fp8_token:fp16_amax"),
    ],
)
def test_rounding_dropped_from_the_values(spelling: Callable[..., Any], scheme: str) -> None:
    (call,) = raised(spelling, rows(torch.float32)).named("quantize")
    assert call["scheme"] == scheme and call["x"].op == "placeholder"


def nvfp4(x: Tensor, p: Tensor | None, swizzled: bool = False) -> tuple[Tensor, Tensor]:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    from torchao.prototype.mx_formats.utils import to_blocked

    scales, q = nvfp4_quantize(x, 16, p)
    return q, to_blocked(scales) if swizzled else scales


NVFP4: dict[str, tuple[Callable[..., Any], str, str]] = {
    "given scale": (lambda x, s: nvfp4(x, s), "nvfp4:div,eps=0.015625", "linear"),
    "no scale": (lambda x, s: nvfp4(x, None), "nvfp4:eps=0.015625", "linear"),
    "swizzled": (lambda x, s: nvfp4(x, s, True), "nvfp4:div,eps=0.015625", "swizzled_128x4"),
    "scale of all tokens, 3-D": (
        lambda x, s: nvfp4(x.view(-1, HIDDEN), x.abs().max().float() / 2688), "nvfp4:div,eps=0.015625", "linear"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NVFP4)
def test_nvfp4_as_torchao_spells_it(name: str) -> None:
    pytest.importorskip("torchao")
    spelling, scheme, layout = NVFP4[name]
    result = raised(spelling, rows(), SCALE, through=capture if layout != "linear" else trace)
    (call,) = result.named("quantize")
    assert (call["scheme"], call["layout"]) == (scheme, layout) and not result.reasons


def low_nibble_odd(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scales = nvfp4(x, None)
    return (q >> 4) | (q << 4), scales


def blocks_of(x: Tensor, size: int) -> Tensor:
    blocks = x.float().view(-1, HIDDEN // size, size)
    return (blocks.abs().amax(-1) / 6.0).clamp(0.015625, 448.0).to(E4M3)


def spread(x: Tensor, of: Tensor) -> Tensor:
    s = (of.view(-1, HIDDEN // 128, 128).abs().amax(-1) / 448).float()
    return fp8(x.float() / s.repeat_interleave(128, dim=-1))


def per_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return grouped(x, group)


NEGATIVE: dict[str, tuple[Callable[..., Any], str]] = {
    "plain cast": (lambda x, s: x.to(E4M3), "not_scaled"),
    "clamp and cast": (lambda x, s: fp8(x), "not_scaled"),
    "other bounds": (lambda x, s: (x.float() / s).clamp(-240, 240).to(E4M3), "clamp_bounds"),
    "other bounds behind ±448": (lambda x, s: (x.float() / s).clamp(-448, 448).clamp(-99, 99).to(E4M3), "clamp_bounds"),
    "one bound": (lambda x, s: (x.float() / s).clamp(max=448).to(E4M3), "clamp_bounds"),
    "rounded between": (lambda x, s: fp8((x.float() / s).bfloat16()), "rounding"),
    "one scale a column": (lambda x, s: fp8(x.float() / (torch.arange(HIDDEN) + 1.0)), "scale_shape"),
    "groups of 32": (lambda x, s: per_group(x, 32), "group_size"),
    "groups of 32, torchao": (lambda x, s: torchao(x, [1, 32]), "group_size"),
    "groups of other rows, torchao": (lambda x, s: spread(x, (x * x)), "other_scale"),
    "maximum of columns": (lambda x, s: fp8(x.float() / (x.float().abs().amax(0, keepdim=True) / 448)), "scale_shape"),
    "scale of other rows": (
        lambda x, s: fp8(x.float() / ((x * x).float().abs().amax(-1, keepdim=True) / 448)), "other_scale"
    ),
    "mean, not maximum": (
        lambda x, s: fp8(x.float() / (x.float().abs().mean(-1, keepdim=True) / 448)), "scale_spelling"
    ),
    "maximum, not of absolutes": (
        lambda x, s: fp8(x.float() / (x.float().amax(-1, keepdim=True) / 448)), "scale_spelling"
    ),
    "to another maximum": (
        lambda x, s: fp8(x.float() / (x.float().abs().amax(-1, keepdim=True) / 240)), "scale_spelling"
    ),
    "floor in another dtype": (
        lambda x, s: fp8(x.float() / (x.abs().amax(-1, keepdim=True) / 448).float().clamp(min=1e-6)), "scale_spelling"
    ),
    "E5M2": (lambda x, s: (x.float() / s).to(torch.float8_e5m2), "fp8_dtype"),
    "FP4, nibbles exchanged": (lambda x, s: low_nibble_odd(x), ""),
    "FP4, blocks of 32": (lambda x, s: blocks_of(x, 32), "group_size"),
    "FP4, scales alone": (lambda x, s: blocks_of(x, 16), "scale_spelling"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEGATIVE)
def test_near_misses(name: str) -> None:
    spelling, reason = NEGATIVE[name]
    if name == "FP4, nibbles exchanged":  # the packing before the exchange is still NVFP4: only that is raised
        (call,) = raised(spelling, rows(), SCALE).named("quantize")
        assert call["scheme"] == "nvfp4:eps=0.015625"
        return
    result = raised(spelling, rows(), SCALE)
    assert not result.named("quantize") and result.reasons == [reason]


def test_scales_of_rows_across_columns() -> None:
    """As many rows as columns, and each row's maximum scales a column."""
    result = raised(lambda x: fp8(x.float() / (x.float().abs().amax(-1) / 448)), rows(tokens=HIDDEN), dynamic=None)
    assert not result.named("quantize") and result.reasons == ["scale_shape"]


@pytest.mark.parametrize("name", ["even and odd exchanged", "ties away from even", "four bits of zero"])
def test_codes_that_are_not_nvfp4(name: str) -> None:
    def spelling(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        blocks = x.float().view(-1, HIDDEN // 16, 16)
        scales = (blocks.abs().amax(-1) / 6.0).clamp(0.015625, 448.0).to(E4M3)
        size = (blocks * (1.0 / scales.float()).unsqueeze(-1)).view(-1, HIDDEN)
        limits = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
        if name == "ties away from even":
            code = sum((size.abs() >= limit).to(torch.uint8) for limit in limits)
        else:
            even = {0.75, 1.75, 3.5}
            code = sum(((size.abs() >= t) if t in even else (size.abs() > t)).to(torch.uint8) for t in limits)
        if name != "four bits of zero":
            code = code | (torch.signbit(size).to(torch.uint8) << 3)
        first, second = (1, 0) if name == "even and odd exchanged" else (0, 1)
        return code[:, first::2] | (code[:, second::2] << 4), scales

    result = raised(spelling, rows(), SCALE)
    assert not result.named("quantize") and result.reasons == ["fp4_coding"]


def test_codes_by_another_spelling_are_nvfp4() -> None:
    """The coding is told by what it computes: comparisons in place of bit tricks are raised all the same."""

    def spelling(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        blocks = x.float().view(-1, HIDDEN // 16, 16)
        scales = (blocks.abs().amax(-1) / 6.0 * g).clamp(0.015625, 448.0).to(E4M3)
        size = (blocks * (g / scales.float()).unsqueeze(-1)).view(-1, HIDDEN)
        even = {0.75, 1.75, 3.5}
        limits = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
        code = sum(((size.abs() >= t) if t in even else (size.abs() > t)).to(torch.uint8) for t in limits)
        code = code | (torch.signbit(size).to(torch.uint8) << 3)
        return code[:, 0::2] | (code[:, 1::2] << 4), scales

    (call,) = raised(spelling, rows(), torch.tensor(40.0)).named("quantize")
    assert call["scheme"] == "nvfp4:eps=0.015625"


def test_a_width_of_any_size_is_no_crash() -> None:
    """A width that is a symbol is told by small numbers too, of which blocks of 16 make nothing."""

    def spelling(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        blocks = x.float().view(-1, x.shape[1] // 16, 16)
        scales = (blocks.abs().amax(-1) / 6.0 * g).clamp(0.015625, 448.0).to(E4M3)
        size = (blocks * (g / scales.float()).unsqueeze(-1)).view(-1, x.shape[1])
        code = sum((size.abs() > t).to(torch.uint8) for t in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
        return code[:, 0::2] | (code[:, 1::2] << 4), scales

    assert not raised(spelling, rows(), torch.tensor(40.0), dynamic=1).named("quantize")


@pytest.mark.parametrize("blocks", [lambda x: x.view(-1, x.shape[1] // 64, 64), lambda x: x.view(-1, 4, x.shape[1] // 4)])
def test_groups_of_a_width_that_is_a_symbol(blocks: Callable[[Tensor], Tensor]) -> None:
    """Groups of 64 however wide the rows are, and groups whose own size is a symbol: no crash, and no other width excluded."""

    def spelling(x: Tensor) -> tuple[Tensor, Tensor]:
        s = (blocks(x).abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-10)
        return fp8(blocks(x) / s).view(x.shape), s.squeeze(-1).t().contiguous().t()

    raised(spelling, rows(), dynamic=1)
