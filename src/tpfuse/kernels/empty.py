"""A kernel that does nothing: what a launch costs by itself."""

from __future__ import annotations

from typing import Any

import triton


@triton.jit
def empty_kernel():
    pass


def launch() -> None:
    options: dict[str, Any] = {"num_warps": 4}
    empty_kernel[(1,)](**options)
