"""NCCL's all-reduce of a copy of the rows, then our norm in one launch."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist

from tpfuse import shim

from . import calls
from .calls import rows_of
from .reduced import norm_of


def _run(make, *args, alive):
    call = make(*args, alive=alive)
    reduced = rows_of(call.x).clone()
    dist.all_reduce(reduced, group=shim.resolve_group(call.group))
    return norm_of(call, reduced.view(call.x.shape))


all_reduce_rms_norm = partial(_run, calls.all_reduce_rms_norm)
all_reduce_add_rms_norm = partial(_run, calls.all_reduce_add_rms_norm)
all_reduce_rms_norm_quantize = partial(_run, calls.all_reduce_rms_norm_quantize)
all_reduce_add_rms_norm_quantize = partial(_run, calls.all_reduce_add_rms_norm_quantize)
