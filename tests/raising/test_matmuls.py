"""Products raised, scaled ones left alone."""

import pytest
import torch

from tests.raising.capture import raised

RAISED = {"mm": lambda x, w, b: x @ w, "addmm": lambda x, w, b: torch.addmm(b, x, w)}
LEFT = {
    "alpha": lambda x, w, b: torch.addmm(b, x, w, alpha=0.5),
    "beta": lambda x, w, b: torch.addmm(b, x, w, beta=0.5),
    "matrix": lambda x, w, b: torch.addmm(x @ w, x, w),
}


@pytest.mark.parametrize("name", RAISED)
def test_raised(name: str) -> None:
    (product,) = raised(RAISED[name], torch.randn(24, 8), torch.randn(8, 16), torch.randn(16)).named("matmul")
    assert (product["bias"] is not None) == (name == "addmm")


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    found = raised(LEFT[name], torch.randn(24, 8), torch.randn(8, 16), torch.randn(16))
    assert len(found.named("matmul")) == (1 if name == "matrix" else 0)
