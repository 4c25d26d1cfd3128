"""scaled_matmul against its definition: dequantise in FP64, multiply, scale, add the bias."""

import pytest
import torch

from tpfuse import formats
from tpfuse.ir.matmul import scaled_matmul

SCHEMES = ["fp8_tensor", "fp8_token", "fp8_group128", "fp8_group64", "nvfp4"]


def sample(scheme, layout="", tokens=17, hidden=256, width=48):
    return scaled_matmul.sample(tokens=tokens, hidden=hidden, width=width, scheme=scheme, layout=layout)


def exact(args):
    """By `formats.dequantize`, which knows nothing of scaled_matmul, in FP64."""
    scheme, x, weight = args["scheme"], args["x"], args["weight"].t().contiguous()
    if scheme in ("fp8_tensor", "fp8_token"):
        a = x.double() * args["x_scale"].double()
        b = args["weight"].double() * args["weight_scale"].double()
    else:
        a = formats.dequantize(x, args["x_scale"], None, scheme, args["layout"]).double()
        w_scale = args["weight_scale"] if scheme == "nvfp4" else args["weight_scale"].t()
        b = formats.dequantize(weight, w_scale, None, scheme, args["weight_layout"]).double().t()
    y = a @ b
    y = y if args["alpha"] is None else y * args["alpha"].double()
    return y + args["bias"].double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reference(scheme):
    args = sample(scheme)
    got = scaled_matmul(**args)
    true = exact(args)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, true.bfloat16()) or (got - true).norm() / true.norm() < 2e-3
    without = scaled_matmul(**{**args, "bias": None})
    assert (without.double() + args["bias"].double() - true).norm() / true.norm() < 4e-3


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [("fp8_group128", "col"), ("fp8_group128", "col+tma"), ("nvfp4", "swizzled_128x4"), ("nvfp4", "swizzled_8x4")],
)
def test_layout_moves_scales_only(scheme, layout):
    plain, moved = sample(scheme), sample(scheme, layout)
    assert torch.equal(scaled_matmul(**plain), scaled_matmul(**moved))


def test_square_blocks():
    args = sample("fp8_group128", hidden=200, width=144)
    blocks = torch.rand(2, 2) + 0.5
    got = scaled_matmul(**{**args, "weight_scale": blocks, "out_dtype": "float32"})
    full = blocks.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :144]
    x = formats.dequantize(args["x"], args["x_scale"], None, "fp8_group128").double()
    true = x @ (args["weight"].double() * full.double()) + args["bias"].double()
    assert (got - true).norm() / true.norm() < 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_double_is_exact(scheme):
    """verify=True calls the body with FP64 in place of every float: it must not round to `out_dtype`."""
    args = sample(scheme)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in args.items()}
    got = scaled_matmul(**wide)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact(args), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake(scheme):
    args = sample(scheme)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        fake = scaled_matmul.default(*fakes.values())
    real = scaled_matmul(**args)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_result_scale_is_atens():
    args = {**sample("fp8_tensor"), "bias": None, "result_scale": torch.tensor(0.25), "out_dtype": "float8_e4m3fn"}
    want = torch.ops.aten._scaled_mm.default(
        args["x"], args["weight"], args["x_scale"], args["weight_scale"], None, args["result_scale"], torch.float8_e4m3fn
    )
    assert torch.equal(scaled_matmul(**args).view(torch.uint8), want.view(torch.uint8))
