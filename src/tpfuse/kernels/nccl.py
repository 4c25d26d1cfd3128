"""NCCL's all-reduce of a copy of the rows, then our norm in one launch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from tpfuse import shim

from . import calls
from .calls import NormCall, rows_of
from .reduced import norm_of


def _run(call: NormCall) -> tuple[Tensor, ...]:
    reduced = rows_of(call.x).clone()
    dist.all_reduce(reduced, group=shim.resolve_group(call.group))
    return norm_of(call, reduced.view(call.x.shape))


(
    all_reduce_rms_norm, all_reduce_add_rms_norm, all_reduce_rms_norm_quantize, all_reduce_add_rms_norm_quantize, *_,
) = calls.operators(_run)  # fmt: skip
