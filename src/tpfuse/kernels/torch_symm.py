"""torch's all-reduces over symmetric memory, then our norm in one launch.

The rows are copied into a buffer that all ranks map, made by `prepare`.  A group has one such buffer, so its calls must be
in one order on the device: one stream at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpfuse import shim
from tpfuse.report import FusionError

from . import calls
from .calls import NormCall, rows_of
from .reduced import norm_of
from .workspace import is_another

MAX_BYTES = 256 << 20  # of a buffer: longer calls go in several launches
_buffers: dict[str, list[tuple[Tensor, Any]]] = {}  # by group, the last one in use; captured graphs keep the others


def prepare(group: Any, max_tokens: int, hidden: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> None:
    """Make (or enlarge) the buffer of `group` for [max_tokens, hidden].  Collective; never inside graph capture."""
    process_group = shim.group_of(group)
    row = hidden * max(d.itemsize for d in dtypes)
    size = max(row, min(max_tokens * row, MAX_BYTES // row * row))
    made = _buffers.setdefault(process_group.group_name, [])
    if is_another(process_group, "torch_symm"):
        made.clear()
    if made and made[-1][0].numel() >= size:
        return
    if shim.is_capturing():
        raise FusionError("a symmetric buffer cannot be made inside graph capture: prepare the group before")
    buffer, _, handle = shim.symmetric_buffer(size, process_group)
    made.append((buffer, handle))


def one_shot(message: Tensor, rows: Tensor, group: str) -> Tensor:
    """Every rank reads everything of every other.  message: the buffer's part of the size of `rows`."""
    reduced = torch.ops.symm_mem.one_shot_all_reduce_copy(message.view(-1), rows.view(-1), "sum", group)
    return reduced.view(rows.shape)


def two_shot(message: Tensor, rows: Tensor, group: str) -> Tensor:
    """Every rank sums its share and writes it to every other, in place in the buffer."""
    message.copy_(rows)
    torch.ops.symm_mem.two_shot_all_reduce_(message.view(-1), "sum", group)
    return message


def message_of(group: str, rows: Tensor) -> Tensor:
    """The part of the group's buffer that holds `rows`, of their shape and dtype.  FusionError where they do not fit."""
    buffer, size = _buffer(group), rows.numel() * rows.element_size()
    if size > buffer.numel():
        raise FusionError(f"{size} bytes do not fit the symmetric buffer of {buffer.numel()}: prepare the group anew")
    return buffer[:size].view(rows.dtype).view(rows.shape)


def all_reduce(algorithm, x: Tensor, group: str) -> Tensor:
    """x summed over `group`: [rows, hidden], possibly in the group's buffer, where the next call overwrites it."""
    fitting = max(1, _buffer(group).numel() // (x.shape[1] * x.element_size()))
    if len(x) <= fitting:
        return algorithm(message_of(group, x), x, group)
    return torch.cat([algorithm(message_of(group, rows), rows, group).clone() for rows in x.split(fitting)])


def _buffer(group: str) -> Tensor:
    if not _buffers.get(group):
        raise FusionError(f"group {group!r} has no symmetric buffer: call tpfuse.kernels.torch_symm.prepare on every rank")
    return _buffers[group][-1][0]


def _run(algorithm, call: NormCall) -> tuple[Tensor, ...]:
    x = rows_of(call.x)
    reduced = all_reduce(algorithm, x, call.group) if x.numel() else x
    return norm_of(call, reduced.view(call.x.shape))


_LAUNCHERS = {algorithm.__name__: calls.launchers(partial(_run, algorithm)) for algorithm in (one_shot, two_shot)}


def __getattr__(name: str) -> Callable[..., Any]:
    """The launcher of an operator by an algorithm: `one_shot_all_reduce_rms_norm`."""
    algorithm, _, operator = name.partition("_all_reduce")
    if algorithm not in _LAUNCHERS:
        raise AttributeError(f"no kernel is named {name!r}")
    return _LAUNCHERS[algorithm](f"all_reduce{operator}")
