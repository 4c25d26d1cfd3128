"""Products of quantised operands on a GPU: every scheme, one row to more than a tile, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ir.test_scaled_matmul import exact
from tests.kernels.test_scaled_product import arguments, want

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)
CASES = [
    ("fp8_tensor", "row", "row"), ("fp8_token", "row", "row"), ("fp8_group128", "row", "row"),
    ("fp8_group128", "col+tma", "row"), ("fp8_group64", "row", "row"), ("nvfp4", "linear", "swizzled_128x4"),
    ("nvfp4", "swizzled_8x4", "linear"),
]  # fmt: skip


def on_gpu(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in args.items()}


@pytest.mark.parametrize("rows", [1, 7, 64, 129, 512])
@pytest.mark.parametrize("scheme, layout, weight_layout", CASES)
def test_against_float64(scheme: str, layout: str, weight_layout: str, rows: int) -> None:
    from tpfuse.kernels.products import Quantised, Weight, multiply

    for square in (False, True) if scheme == "fp8_group128" else (False,):
        args = on_gpu(arguments(scheme, layout, weight_layout, (rows, 1024, 384), False))
        if square:
            args["weight_scale"] = torch.rand(8, 3, device="cuda") + 0.5
        true = want(args, square) if square else exact(args)
        for bias in (args["bias"], None):
            out = torch.full([rows, 384], torch.nan, dtype=torch.bfloat16, device="cuda")
            weight = Weight(args["weight"], args["weight_scale"], bias, None, args["alpha"])
            how = Quantised(scheme, layout, args["weight_layout"], False)
            multiply(out, args["x"], weight, args["x_scale"], how)
            expected = true if bias is not None else true - args["bias"].double()
            least = (expected.bfloat16().double() - expected).norm()  # what rounding the result costs
            assert (out.double() - expected).norm() <= 1.25 * least, (square, bias is None)
