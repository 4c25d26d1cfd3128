"""An engine's buffers tell the scheme, are filled for the real tokens alone, and wrong ones are clear errors."""

import pytest
import torch
from torch import Tensor

from tpfuse import formats

ROWS, COLS = 24, 1024
E4M3 = torch.float8_e4m3fn
CASES = [
    ("fp8_tensor", "row"),
    ("fp8_group128", "row"),
    ("fp8_group64", "row"),
    ("fp8_group128", "col"),
    ("fp8_group64", "col+tma"),
    ("fp8_group128", "col+ue8m0_packed"),
    ("nvfp4", "linear"),
    ("nvfp4", "swizzled_128x4"),
]


def buffers(scheme: str, layout: str, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, given scale and block scales, each byte 0x7f where nothing is written."""
    output = torch.full((rows, COLS), 0x7F, dtype=torch.uint8).view(E4M3)
    if scheme == "fp8_tensor":
        return output, torch.tensor(0.02), None
    shape, stride, dtype = formats.scales_meta(rows, COLS, scheme, layout)
    block = torch.empty_strided(shape, stride, dtype=dtype)
    torch.as_strided(block, (block.untyped_storage().nbytes() // block.element_size(),), (1,)).view(torch.uint8).fill_(0x7F)
    if scheme == "nvfp4":
        return output.view(torch.uint8)[:, : COLS // 2].contiguous(), torch.tensor(400.0), block
    return output, None, block


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_scheme_of(scheme: str, layout: str) -> None:
    rows = 26 if "tma" in layout else ROWS  # no multiple of four: only then do aligned columns differ
    assert formats.scheme_of(*buffers(scheme, layout, rows), COLS) == (scheme, layout)


@pytest.mark.parametrize(("scheme", "layout"), CASES)
def test_real_tokens_of_a_padded_batch(scheme: str, layout: str) -> None:
    """A batch of 160 rows with 19 real tokens: theirs are written, the others' are left alone."""
    x = torch.randn(160, COLS, generator=torch.Generator().manual_seed(0)).bfloat16()
    output, scale, block = buffers(scheme, layout, 160)
    formats.quantize_into(x, output, scale, block, 19)
    q, scales = formats.quantize(x[:19], scale, scheme, layout)
    assert same_bytes(output[:19], q) and bool((output[19:].view(torch.uint8) == 0x7F).all())
    if block is None:
        return
    part = formats.cut_rows(block, 19, layout)
    assert part.shape == scales.shape and same_bytes(part, scales)
    assert bool((block[part.shape[0] :].contiguous().view(torch.uint8) == 0x7F).all())


def test_power_of_two() -> None:
    x = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    output, _, block = buffers("fp8_group128", "row", ROWS)
    assert block is not None
    formats.quantize_into(x, output, None, block, ROWS, power_of_two=True)
    assert torch.equal(block.log2(), block.log2().round())


def test_unquantised() -> None:
    x = torch.randn(ROWS, COLS)
    output = torch.zeros(ROWS, COLS)
    formats.quantize_into(x, output, None, None, 5)
    assert torch.equal(output[:5], x[:5]) and not output[5:].any()


ERRORS = {
    "unsupported group size: 1024 values in 32 groups a row; groups of 128 and 64 are known": (
        (ROWS, COLS), E4M3, None, torch.empty(ROWS, 32)
    ),
    "takes no given scale": ((ROWS, COLS), E4M3, torch.tensor(1.0), torch.empty(ROWS, 8)),
    "needs both": ((ROWS, COLS // 2), torch.uint8, torch.tensor(1.0), None),
    "unsupported block scales": ((ROWS, COLS // 2), torch.uint8, torch.tensor(1.0), torch.empty(ROWS, 7, dtype=E4M3)),
    "the output is torch.float8_e5m2": ((ROWS, COLS), torch.float8_e5m2, torch.tensor(1.0), None),
    "a given scale is one number": ((ROWS, COLS), E4M3, torch.ones(ROWS, 1), None),
    "neither by rows nor by columns": ((ROWS, COLS), E4M3, None, torch.empty(ROWS, 8, 2)[:, :, 0]),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    shape, dtype, scale, block = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        formats.scheme_of(torch.empty(shape, dtype=dtype), scale, block, COLS)
