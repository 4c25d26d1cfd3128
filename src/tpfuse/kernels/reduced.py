"""What stands behind an all-reduce that is not ours: the (add +) norm (+ quantise) of rows that are summed already."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .calls import NormCall
from .norm_quant import norm_quantise


def norm_of(call: NormCall, reduced: Tensor) -> tuple[Tensor, ...]:
    """The operator's results in one launch.  reduced: `call.x` summed over the ranks, of its shape and dtype.

    A bias or an alpha of `call` is not applied: kernels that end here decline them.
    """
    local = replace(call, x=reduced, group="")
    outputs = norm_quantise(local)
    return outputs if call.scheme else outputs[2:]
