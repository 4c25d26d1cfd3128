"""The strides that rotary's fake promises are those of its body, also where a dimension has one element."""

import pytest
import torch

from tests.kernels.test_rope import STYLES, arguments
from tpfuse.ir.rope import qk_norm_rope


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("how", ["projected", "heads_first"])
@pytest.mark.parametrize("leading, heads", [((1, 1), (32, 8)), ((300,), (5, 1)), ((2, 1, 3), (1, 1)), ((2, 7), (8, 2))])
def test_strides(style: str, how: str, leading: tuple[int, ...], heads: tuple[int, int]) -> None:
    args = arguments(leading, *heads, 128, 128, style, how, torch.bfloat16)
    for real, fake in zip(qk_norm_rope.reference(**args), qk_norm_rope.fake(**args), strict=True):
        assert real.shape == fake.shape and real.stride() == fake.stride()
