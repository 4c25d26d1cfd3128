"""The fused operators, called directly: `tpfuse.ops.all_reduce_add_rms_norm(x, residual, weight, group=mesh["tp"])`.

Every operator of `tpfuse.ir` is an attribute here, with the arguments of its declaration (`help(tpfuse.ops.rms_norm)`).  Under
torch.compile the call becomes one operator of the graph, which tpfuse's backend lowers; eagerly the one of tpfuse's own kernels
that was measured to be fastest is launched at once, and `kernels=` asks for another back end's, a name of
`tpfuse.config.KERNEL_PREFERENCES`.  On GPUs a collective's group needs `tpfuse.prepare` before.

Rows and weights are bf16, fp16, FP32 or FP64 where a text names no dtype; kernels serve bf16 and fp16.  Errors come
before anything is launched: TypeError for arguments that the operator has not or lacks or that are of another type, ValueError
for a shape, dtype or device that is not as the operator's text declares it, and for a scheme, layout, rounding or back end that
there is not, FusionError where no kernel serves the arguments here, with each one's reason.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpfuse import ir, shim
from tpfuse.config import KERNEL_PREFERENCES, known
from tpfuse.ir import declared
from tpfuse.ir.op import Op
from tpfuse.lowering.select import Pick, pick
from tpfuse.report import Decline, FusionError
from tpfuse.runtime.detect import detect
from tpfuse.runtime.tables import table_of_group
from tpfuse.target import Range

PEERS = frozenset({"torch", "nccl", "flashinfer"})
MOST_KINDS = 4096  # of calls that are remembered
_launches: dict[Any, Callable[..., Any]] = {}  # by kind of call
# What arguments mean wherever an operator's own text says nothing of them.
ARGUMENTS = {
    "group": "a ProcessGroup, a one-dimensional DeviceMesh or a group's name; nothing runs on a default one",
    "eps": "added to the mean square", "eps2": "the outer norm's", "rounding2": "the outer norm's",
    "weight_bias": "added to the norm's weight: 1.0 for Gemma's norms",
    "rounding": 'where the norm rounds: "cast_first" (Llama in transformers), "cast_last" (torch.nn.RMSNorm, Gemma); see '
    "`tpfuse.ir.norm.Rounding`",
    "scheme": "the quantisation: see `tpfuse.formats.Scheme`", "layout": "of its scales: see `tpfuse.formats.Layout`",
    "padded": "the number of rows need not be a multiple of the ranks: shards are filled up with zeros",
    "fast_accum": "`use_fast_accum` of `aten._scaled_mm`", "softmax_scale": "factor of q · kᵀ",
}  # fmt: skip


def group_name(group: Any) -> str:
    """The c10d name of what `shim.group_of` takes."""
    return group if isinstance(group, str) else shim.group_of(group).group_name


def _call(op: Op, *args: Any, kernels: str = "auto", **kwargs: Any) -> Any:
    if op.collective:
        position = op.params.index("group")
        if "group" in kwargs:
            kwargs["group"] = group_name(kwargs["group"])
        elif len(args) > position:
            args = (*args[:position], group_name(args[position]), *args[position + 1 :])
        else:
            raise TypeError(f"{op.name} needs a group: nothing runs on a default one")
    try:
        bound = op.bind(args, kwargs)
    except TypeError as error:
        raise TypeError(f"{op.name}: {error}") from None
    if torch.compiler.is_compiling():
        return op.default(*bound.values())
    world = 1
    if op.collective:
        world = shim.group_of(bound["group"]).size()
    kind = op.name, kernels, world, *map(_kind, bound.values())
    try:
        launch = _launches.get(kind)
    except TypeError:  # a size that is a symbol, or what no operator takes: nothing to be remembered by
        return _launch_of(op, bound, kernels)(*bound.values())
    if launch is None:
        launch = _launch_of(op, bound, kernels)
        if len(_launches) == MOST_KINDS:
            _launches.clear()
        _launches[kind] = launch
    return launch(*bound.values())


def _kind(value: Any) -> Any:
    """What of an argument decides whether a call is as declared and which kernel serves it."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    return type(value), value


def _launch_of(op: Op, bound: dict[str, Any], kernels: str) -> Callable[..., Any]:
    """What serves a call with these arguments, called with them by position.  Raises what the module says."""
    known("kernels preference", kernels, KERNEL_PREFERENCES)
    if reason := declared.wrong_kind(op, bound):
        raise TypeError(f"{op.name}: {reason}")
    declared.check(op, bound)
    device = next(v.device.type for v in bound.values() if isinstance(v, Tensor))
    target, table = detect(device, bound.get("group")), table_of_group(device, bound.get("group"))
    if kernels == "auto":  # `tpfuse.prepare` made nothing for other libraries' kernels
        target = replace(target, backends=target.backends - PEERS)
        kernels = "reference" if op.fuse in (None, "always") else kernels
    rows = next(v for v in bound.values() if isinstance(v, Tensor))
    tokens = max(1, math.prod(rows.shape[:-1]))
    found = pick(op, bound, target, kernels, table, Range(tokens, tokens))
    if isinstance(found, Decline) and found.code == "threshold":
        return op.reference
    if not isinstance(found, Pick):
        raise FusionError(f"{op.name}: {found}")
    return functools.partial(op.launcher(found.name), alive=(True,) * op.results)


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in ir.registry:
        raise AttributeError(f"tpfuse.ops has no operator {name!r}; known: {', '.join(sorted(ir.registry))}")
    op = ir.registry[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        return _call(op, *args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = document(op)
    preference = inspect.Parameter("kernels", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation="str")
    call.__signature__ = op.signature.replace(parameters=[*op.signature.parameters.values(), preference])  # type: ignore[attr-defined]
    globals()[name] = call
    return call


def document(op: Op) -> str:
    """An operator's text, what of the arguments it leaves to all operators' common ones, and the texts that it refers to."""
    texts = declared.texts(op, ir.registry)
    told = "\n".join(texts.values())
    common = [f"{n}: {ARGUMENTS[n]}." for n in op.params if n in ARGUMENTS and not re.search(rf"\b{n}\b[^.\n]*:", told)]
    others = [f"{name}: {text}" for name, text in texts.items() if name != op.name]
    return "\n\n".join(filter(None, [op.doc, "\n".join(common), *others]))


def __dir__() -> list[str]:
    return sorted(ir.registry)
