"""All-reduce + norm (+ quantise) by the algorithm that suits the call's size, known only when it is launched.

Every rank has the same sizes, so every rank chooses alike.
"""

from __future__ import annotations

from functools import partial

from . import calls
from .allreduce_norm import one_shot
from .plan import sends_whole
from .two_shot import two_shot
from .workspace import channel_of


def _run(make, *args, alive):
    call = make(*args, alive=alive)
    channel = channel_of(call.group)
    launch = one_shot if sends_whole(call.x.numel() * call.x.element_size(), channel.world) else two_shot
    return call.results(launch(channel, call))


all_reduce_rms_norm = partial(_run, calls.all_reduce_rms_norm)
all_reduce_add_rms_norm = partial(_run, calls.all_reduce_add_rms_norm)
all_reduce_rms_norm_quantize = partial(_run, calls.all_reduce_rms_norm_quantize)
all_reduce_add_rms_norm_quantize = partial(_run, calls.all_reduce_add_rms_norm_quantize)
all_reduce_rms_norm_add_rms_norm = partial(_run, calls.all_reduce_rms_norm_add_rms_norm)
