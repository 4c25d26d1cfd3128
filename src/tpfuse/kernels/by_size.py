"""All-reduce + norm (+ quantise) by the algorithm that suits the call's size, known only when it is launched.

Every rank has the same sizes and the same limit, so every rank chooses alike.
"""

from __future__ import annotations

from functools import partial

from . import calls
from .allreduce_norm import one_shot
from .plan import sends_whole
from .two_shot import two_shot
from .workspace import channel_of


def _run(make, *args, alive, limit=None):
    """limit: bytes of the largest message that goes by the one-shot, as measured; None for the built-in guess."""
    call = make(*args, alive=alive)
    channel, message = channel_of(call.group), call.x.numel() * call.x.element_size()
    whole = sends_whole(message, channel.world) if limit is None else message <= limit
    return call.results((one_shot if whole else two_shot)(channel, call))


all_reduce_rms_norm = partial(_run, calls.all_reduce_rms_norm)
all_reduce_add_rms_norm = partial(_run, calls.all_reduce_add_rms_norm)
all_reduce_rms_norm_quantize = partial(_run, calls.all_reduce_rms_norm_quantize)
all_reduce_add_rms_norm_quantize = partial(_run, calls.all_reduce_add_rms_norm_quantize)
all_reduce_rms_norm_add_rms_norm = partial(_run, calls.all_reduce_rms_norm_add_rms_norm)
