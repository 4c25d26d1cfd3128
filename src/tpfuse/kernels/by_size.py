"""All-reduce + norm (+ quantise) by the algorithm that suits the call's size, known only when it is launched.

Every rank has the same sizes, so every rank chooses alike.
"""

from __future__ import annotations

from torch import Tensor

from . import allreduce_norm, calls, cuda_norm, two_shot
from .calls import NormCall
from .plan import algorithm_of
from .workspace import channel_of

_LAUNCH = {
    "triton:one_shot": allreduce_norm.one_shot, "cuda:one_shot": cuda_norm.one_shot, "triton:two_shot": two_shot.two_shot,
}  # fmt: skip


def _run(call: NormCall) -> tuple[Tensor, ...]:
    channel = channel_of(call.group)
    launch = _LAUNCH[algorithm_of(call.x.numel() * call.x.element_size(), channel.world)]
    return call.results(launch(channel, call))


__getattr__ = calls.launchers(_run)
