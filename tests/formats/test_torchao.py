"""Bit for bit against torchao's own torch code, which runs on CPU."""

import pytest
import torch

from tpfuse.formats import quantize, swizzle

pytest.importorskip("torchao")
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale  # noqa: E402
from torchao.prototype.mx_formats.utils import from_blocked, to_blocked  # noqa: E402
from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8  # noqa: E402

from tpfuse.formats import unswizzle  # noqa: E402


def inputs(dtype: torch.dtype, rows: int = 37, cols: int = 384) -> torch.Tensor:
    torch.manual_seed(0)
    x = (torch.randn(rows, cols) * torch.logspace(-6, 4, rows).unsqueeze(1)).to(dtype)
    x[3] = 0
    x[4, ::2] = -0.0
    x[5, 7] = torch.inf
    return x


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_per_row(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    want_scale = _choose_scale_float8(x, [1, x.shape[1]])
    want = _quantize_affine_float8(x, want_scale)
    q, scales = quantize(x, None, "fp8_token:low_scale,eps=0.0")
    assert torch.equal(bits(scales), bits(want_scale))
    assert torch.equal(bits(q), bits(want))


@pytest.mark.parametrize("bounds", [(1e-3, None), (None, 2.0), (0.1, 2.0)])
def test_fp8_per_row_with_bounds(bounds: tuple[float | None, float | None]) -> None:
    x = inputs(torch.bfloat16)
    want_scale = _choose_scale_float8(x, [1, x.shape[1]], hp_value_lb=bounds[0], hp_value_ub=bounds[1])
    variants = [f"{name}={v}" for name, v in zip(("amax_min", "amax_max"), bounds, strict=True) if v is not None]
    q, scales = quantize(x, None, "fp8_token:low_scale,eps=0.0," + ",".join(variants))
    assert torch.equal(bits(scales), bits(want_scale))
    assert torch.equal(bits(q), bits(_quantize_affine_float8(x, want_scale)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_per_tensor(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    x[5, 7] = 1.0
    scale = _choose_scale_float8(x, list(x.shape))
    assert torch.equal(bits(quantize(x, scale, "fp8_tensor")[0]), bits(_quantize_affine_float8(x, scale)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [64, 128])
def test_fp8_per_group(dtype: torch.dtype, group: int) -> None:
    x = inputs(dtype)
    want_scale = _choose_scale_float8(x, [1, group])
    q, scales = quantize(x, None, f"fp8_group{group}:low_scale,eps=0.0")
    assert torch.equal(bits(scales), bits(want_scale))
    assert torch.equal(bits(q), bits(_quantize_affine_float8(x, want_scale)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("two_level", [True, False])
def test_nvfp4(dtype: torch.dtype, two_level: bool) -> None:
    x = inputs(dtype)
    x[5, 7] = 1.0
    p = per_tensor_amax_to_scale(x.abs().max()) if two_level else None
    want_scales, want = nvfp4_quantize(x, per_tensor_scale=p)
    q, scales = quantize(x, p, "nvfp4:div,eps=0.015625" if two_level else "nvfp4:eps=0.015625", "linear")
    assert torch.equal(bits(scales), bits(want_scales))
    assert torch.equal(q, want)


@pytest.mark.parametrize("size", [(1, 1), (37, 24), (128, 4), (129, 5), (300, 8)])
def test_swizzle(size: tuple[int, int]) -> None:
    scales = torch.randint(0, 255, size, dtype=torch.uint8)
    ours = swizzle(scales, "swizzled_128x4")
    assert torch.equal(ours.flatten(), to_blocked(scales))
    assert torch.equal(unswizzle(ours, *size, "swizzled_128x4"), from_blocked(ours.flatten(), *size))
