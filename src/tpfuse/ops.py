"""The fused operators, called directly: `tpfuse.ops.all_reduce_add_rms_norm(x, residual, weight, group=mesh["tp"])`.

Every operator of `tpfuse.ir` is an attribute here.  Arguments are those of its declaration; `group` is a ProcessGroup, a
one-dimensional DeviceMesh or a group's name.  Under torch.compile the call becomes one operator of the graph, which tpfuse's
backend lowers; eagerly the one of tpfuse's own kernels that was measured to be fastest is launched at once (`kernels=` asks for
others).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import ir
from tpfuse.ir.op import Op
from tpfuse.lowering.select import Pick, pick
from tpfuse.report import Decline, FusionError
from tpfuse.runtime.detect import detect
from tpfuse.runtime.tables import table_of_group
from tpfuse.target import Range

PEERS = frozenset({"torch", "nccl", "flashinfer"})


def group_name(group: Any) -> str:
    """The c10d name of a ProcessGroup, of a one-dimensional DeviceMesh, or of itself.  TypeError for anything else."""
    if isinstance(group, str):
        return group
    if isinstance(group, dist.ProcessGroup):
        return group.group_name
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise TypeError(f"a mesh of one dimension is needed, got {group.mesh_dim_names or group.ndim}: mesh[name]")
        return group.get_group().group_name
    raise TypeError(f"group must be a ProcessGroup, a one-dimensional DeviceMesh or a name, got {type(group).__name__}")


def _call(op: Op, *args: Any, kernels: str = "auto", **kwargs: Any) -> Any:
    if op.collective:
        position = op.params.index("group")
        if "group" in kwargs:
            kwargs["group"] = group_name(kwargs["group"])
        elif len(args) > position:
            args = (*args[:position], group_name(args[position]), *args[position + 1 :])
        else:
            raise TypeError(f"{op.name} needs a group: nothing runs on a default one")
    bound = op.bind(args, kwargs)
    if torch.compiler.is_compiling():
        return op.default(*bound.values())
    device = next(v.device.type for v in bound.values() if isinstance(v, Tensor))
    target, table = detect(device, bound.get("group")), table_of_group(device, bound.get("group"))
    if kernels == "auto":  # `tpfuse.prepare` made nothing for other libraries' kernels
        target = replace(target, backends=target.backends - PEERS)
        kernels = "reference" if op.fuse in (None, "always") else kernels
    rows = next(v for v in bound.values() if isinstance(v, Tensor))
    tokens = max(1, math.prod(rows.shape[:-1]))
    found = pick(op, bound, target, kernels, table, Range(tokens, tokens))
    if isinstance(found, Decline) and found.code == "threshold":
        return op.reference(*bound.values())
    if not isinstance(found, Pick):
        raise FusionError(f"{op.name}: {found}")
    return op.launcher(found.name)(*bound.values(), alive=(True,) * op.results)


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in ir.registry:
        raise AttributeError(f"tpfuse.ops has no operator {name!r}; known: {', '.join(sorted(ir.registry))}")
    op = ir.registry[name]
    call = functools.partial(_call, op)
    call.__doc__ = op.doc
    globals()[name] = call
    return call


def __dir__() -> list[str]:
    return sorted(ir.registry)
