"""A stack's linear layer is the same product in every scheme, as exactly as the scheme allows."""

import pytest
import torch

from tpfuse.measure.linears import SCHEMES, Linear


@pytest.mark.parametrize("out", [256, 208])  # 208: not of whole blocks
@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_products_agree(scheme: str, out: int) -> None:
    torch.manual_seed(1)
    plain = Linear(out, 384, "", torch.bfloat16, "cpu")
    x = torch.randn(24, 384, dtype=torch.bfloat16) * 2
    torch.manual_seed(1)
    quantised = Linear(out, 384, scheme, torch.bfloat16, "cpu")
    want = x.double() @ plain.weight.t().double()
    error = ((quantised(x).double() - want).norm() / want.norm()).item()
    assert 1e-3 < error < (0.15 if scheme == "nvfp4" else 0.05)
