"""The products of quantised operands in Triton's interpreter, multiplied in FP32, and as they are compiled for sm_90."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ir.test_scaled_matmul import exact
from tests.kernels.compiled import compiled, cuda, missing
from tests.kernels.interpreted import INTERPRET, run_loops
from tests.kernels.spawned import run_spawned
from tpfuse import formats
from tpfuse.ir.matmul import scaled_matmul

# Scheme, layout of the rows' scales, of the weight's, (rows, k, n): one row, odd, more than a tile, k no multiple of the group.
CASES = [
    ("fp8_group128", "row", "row", (1, 256, 48)), ("fp8_group128", "col", "row", (67, 128, 200)),
    ("fp8_group128", "col+tma", "row", (130, 200, 144)), ("fp8_group64", "row+ue8m0", "row", (5, 320, 16)),
    ("nvfp4", "linear", "swizzled_128x4", (1, 256, 48)), ("nvfp4", "swizzled_128x4", "swizzled_128x4", (131, 96, 144)),
    ("nvfp4", "swizzled_8x4", "linear", (9, 400, 32)),
]  # fmt: skip


def arguments(scheme: str, layout: str, weight_layout: str, shape: tuple[int, int, int], square: bool) -> dict[str, Any]:
    rows, k, n = shape
    args = scaled_matmul.sample(tokens=rows, hidden=k, width=n, scheme=scheme, layout=layout)
    if scheme == "nvfp4" and weight_layout == "linear":
        scales = formats.remove_layout(args["weight_scale"], n, k // 16, args["weight_layout"])
        args |= {"weight_scale": scales, "weight_layout": weight_layout}
    if square:
        blocks = torch.rand(-(-k // 128), -(-n // 128)) + 0.5
        args |= {"weight_scale": blocks}
    return args


def want(args: dict[str, Any], square: bool) -> Tensor:
    if square:
        k, n = args["weight"].shape
        scales = args["weight_scale"].repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
        x = formats.dequantize(args["x"], args["x_scale"], None, args["scheme"], args["layout"]).double()
        return x @ (args["weight"].double() * scales.double()) + args["bias"].double()
    return exact(args)


def run(rank: int, world: int) -> int:
    from tpfuse.kernels.scaled_product import scaled_product

    run_loops()
    done = 0
    for scheme, layout, weight_layout, shape in CASES:
        for square in (False, True) if scheme == "fp8_group128" else (False,):
            args = arguments(scheme, layout, weight_layout, shape, square)
            for bias in (args["bias"], None):
                out = torch.full([shape[0], shape[2]], torch.nan)
                x, weight, x_scale, weight_scale = (args[n] for n in ("x", "weight", "x_scale", "weight_scale"))
                scaled_product(out, x, weight, x_scale, weight_scale, bias, args["alpha"], scheme, layout, args["weight_layout"])
                true = want(args, square) - (0 if bias is not None else args["bias"].double())
                assert ((out - true).norm() / true.norm()).item() < 1e-5, (scheme, layout, shape, square)
                done += 1
    return done


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_against_the_definition() -> None:
    assert run_spawned(run, 1, environment=INTERPRET, timeout=280) == [20]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("rows", [16, 2048])
@pytest.mark.parametrize("scheme, layout", [("fp8_group128", "col"), ("fp8_group64", "row"), ("nvfp4", "swizzled_128x4")])
def test_compiled(scheme: str, layout: str, rows: int) -> None:
    """Nothing spilled, multiplied by the tensor cores; many rows of NVFP4 are decoded for a product of cuBLAS."""
    from tpfuse.kernels.scaled_product import FEW, scaled_product

    k, n = 4096, 4096
    if scheme == "nvfp4":
        values = cuda(rows, k // 2, dtype=torch.uint8), cuda(n, k // 2, dtype=torch.uint8).t()
        scales = cuda(rows, k // 16, dtype=torch.float8_e4m3fn), cuda(n, k // 16, dtype=torch.float8_e4m3fn)
    else:
        group = int(scheme.removeprefix("fp8_group"))
        values = cuda(rows, k, dtype=torch.float8_e4m3fn), cuda(n, k, dtype=torch.float8_e4m3fn).t()
        scales = cuda(rows, k // group, dtype=torch.float32), cuda(k // group, n // group, dtype=torch.float32)
    out, alpha = cuda(rows, n), cuda(1, dtype=torch.float32) if scheme == "nvfp4" else None
    weight_layout = "row" if alpha is None else "swizzled_128x4"
    kernels = compiled(lambda: scaled_product(out, *values, *scales, None, alpha, scheme, layout, weight_layout))
    assert all(kernel.spilled == 0 and kernel.shared <= 227 * 1024 for kernel in kernels)
    if scheme == "nvfp4" and rows > FEW:
        assert [kernel.name for kernel in kernels] == ["decode_kernel", "decode_kernel", "finish_kernel"]
        assert all(re.search(r"st\.global\S*\.v4\.b32", kernel.ptx) for kernel in kernels)
    else:
        (kernel,) = kernels
        assert "wgmma.mma_async" in kernel.ptx
