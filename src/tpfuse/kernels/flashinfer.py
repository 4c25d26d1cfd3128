"""FlashInfer's fused all-reduce + add + RMS norm (+ quantise), its `trtllm` back end alone.

    https://github.com/flashinfer-ai/flashinfer (flashinfer/comm/trtllm_ar.py), read at 0.6.12

The back ends `auto` and `mnnvl` create multicast objects and are never called.  A launch completes at its end: completing early
gives NaN to whoever reads too soon.  What cannot run here is declined by name in `lowering/peer_kernels.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from tpfuse import shim
from tpfuse.formats import Scheme
from tpfuse.report import FusionError

from . import calls
from .calls import NormCall, Outputs, rows_of
from .workspace import is_another

MAX_BYTES = 512 << 20  # of a message times the ranks: beyond 1 GiB offsets overflow 32 bits
NORM, FP8, FP8_AND_NORM, GROUP, GROUP_AND_NORM = 1, 2, 4, 8, 9  # AllReduceFusionPattern
_workspaces: dict[str, list[Workspace]] = {}  # by group, the last one in use; captured graphs keep the others


@dataclass(frozen=True)
class Workspace:
    """pointers: int64 on the device.  bytes: the largest message.  handles: what keeps the buffers mapped."""

    rank: int
    world: int
    pointers: Tensor
    bytes: int
    handles: Any


@cache
def comm() -> ModuleType:
    """`flashinfer.comm`.  It imports its Blackwell matmul unconditionally, which needs cuTile; nothing here calls that, so where
    cuTile is not installed an empty module stands in for the time of the import."""
    missing = importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.tile") is None
    if missing:
        sys.modules["cuda.tile"] = MagicMock()
    try:
        return importlib.import_module("flashinfer.comm")
    finally:
        if missing:
            del sys.modules["cuda.tile"]


def prepare(group: Any, max_tokens: int, hidden: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> None:
    """Make (or enlarge) the workspace of `group` for [max_tokens, hidden].  Collective; never inside graph capture."""
    process_group = shim.group_of(group)
    world, row = process_group.size(), hidden * max(d.itemsize for d in dtypes)
    tokens = max(1, min(max_tokens, MAX_BYTES // (world * row)))
    made = _workspaces.setdefault(process_group.group_name, [])
    if is_another(process_group, "flashinfer"):
        made.clear()
    if made and made[-1].bytes >= tokens * row:
        return
    if shim.is_capturing():
        raise FusionError("a FlashInfer workspace cannot be made inside graph capture: prepare the group before")
    shim.disable_multicast()
    handles, pointers = comm().trtllm_create_ipc_workspace_for_all_reduce_fusion(
        process_group.rank(), world, tokens, hidden, group=process_group
    )
    torch.cuda.synchronize()
    made.append(Workspace(process_group.rank(), world, pointers, tokens * row, handles))


def launch(call: NormCall, pdl: bool = False, at_end: bool = True, whole: bool = True) -> Outputs:
    """Messages larger than the workspace go in several launches.

    pdl: programmatic dependent launch.  at_end: complete at the end.  whole: the one-shot, else the two-shot (which needs more
    rows than ranks).  Other settings than the defaults are for benchmarks: below 0.7.2 the kernels read the residual before the
    grid they depend on is done, and the two-shot's barrier is unsafe.
    """
    made = _workspaces.get(call.group)
    if not made:
        raise FusionError(f"group {call.group!r} has no FlashInfer workspace: call kernels.flashinfer.prepare on every rank")
    workspace, x = made[-1], rows_of(call.x)
    assert call.residual is not None
    residual, hidden = rows_of(call.residual), x.shape[1]
    outputs = call.outputs()
    # It always writes h and, without a quantise, the norm: dead results go to scratch.
    pattern = pattern_of(call)
    writes_norm = pattern in (NORM, FP8_AND_NORM, GROUP_AND_NORM)
    h = (outputs.reduced if call.alive[3] else torch.empty_like(x)).view(x.shape)
    norm = (outputs.norm if call.alive[2] else torch.empty_like(x)).view(x.shape) if writes_norm else None
    q = outputs.q.view(x.shape) if call.quantised else None
    chunk = workspace.bytes // (hidden * x.element_size())
    if chunk == 0 or (chunk < len(x) and pattern in (GROUP, GROUP_AND_NORM)):  # packed scales are no rows: one launch only
        raise FusionError(f"{list(x.shape)} does not fit FlashInfer's workspace of {workspace.bytes} bytes: prepare anew")
    for first in range(0, len(x), chunk):
        rows = slice(first, min(first + chunk, len(x)))
        comm().trtllm_allreduce_fusion(
            allreduce_in=x[rows], world_size=workspace.world, world_rank=workspace.rank, token_num=rows.stop - first,
            hidden_dim=hidden, workspace_ptrs=workspace.pointers, launch_with_pdl=pdl, trigger_completion_at_end=at_end,
            fp32_acc=True, pattern_code=pattern, use_oneshot=whole or rows.stop - first <= workspace.world,
            allreduce_out=None, residual_in=residual[rows], residual_out=h[rows],
            norm_out=None if norm is None else norm[rows], quant_out=None if q is None else q[rows],
            scale_out=outputs.scales if pattern in (GROUP, GROUP_AND_NORM) else None, rms_gamma=call.weight,
            rms_eps=call.eps, scale_factor=call.scale, layout_code=None,
            block_quant_group_size=Scheme.parse(call.scheme).group or None if call.scheme else None,
            weight_bias=call.weight_bias,
        )  # fmt: skip
    return outputs


def pattern_of(call: NormCall) -> int:
    """FlashInfer's number for what `call` wants written."""
    if not call.quantised:
        return NORM
    static = Scheme.parse(call.scheme).name == "fp8_tensor"
    plain, both = (FP8, FP8_AND_NORM) if static else (GROUP, GROUP_AND_NORM)
    return both if call.alive[2] else plain


def _run(call: NormCall) -> tuple[Tensor, ...]:
    return call.results(launch(call))


__getattr__ = calls.launchers(_run)
