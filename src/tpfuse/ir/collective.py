"""Collectives over the rows of a tensor.  `group` is the name of a c10d process group, never a default one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse import formats, shim
from tpfuse.formats.layouts import apply_layout, groups_of, remove_layout
from tpfuse.ir.op import op
from tpfuse.ir.quant import quantize
from tpfuse.ir.samples import rows

_c10d = torch.ops._c10d_functional


def world_size(group: str) -> int:
    """The number of ranks in the group named `group`."""
    return shim.resolve_group(group).size()


def share(count: Any, group: str) -> Any:
    """Rows of a rank's shard, ⌈count / world⌉: the same on every rank, the last ones' filled up with zeros."""
    world = world_size(group)
    return (count + world - 1) // world


def _same(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scattered(x: Tensor, group: str, padded: bool) -> Tensor:
    own = share(x.shape[0], group) if padded else x.shape[0] // world_size(group)
    return x.new_empty([own, *x.shape[1:]])


def _gathered(x: Tensor, group: str, rows: int | None) -> Tensor:
    return x.new_empty([x.shape[0] * world_size(group) if rows is None else rows, *x.shape[1:]])


def _own(x: Tensor, group: str) -> Tensor:
    return x.new_empty([share(x.shape[0], group), *x.shape[1:]])


def _sample(**shape: Any) -> dict[str, Any]:
    return {"x": rows(**shape), "group": shape["group"]}


@op(sample=_sample, fake=_same, rows="collective")
def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum over the ranks of `group`.  x: [..., hidden], any dtype → the same shape and dtype, contiguous."""
    return _c10d.wait_tensor(_c10d.all_reduce(x, "sum", group))


@op(
    sample=lambda **shape: {**_sample(**shape), "padded": True}, fake=_scattered, rows="collective",
    opaque=lambda args: args["padded"],
)  # fmt: skip
def reduce_scatter(x: Tensor, group: str, padded: bool = False) -> Tensor:
    """Sum over the ranks, rank r keeping its r-th share of the rows.

    x: [rows, ...], any dtype, rows a multiple of the world size → [rows / world, ...].
    padded: any number of rows → [⌈rows / world⌉, ...]; what lies behind the last row is zero.
    """
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(_fill(x, group) if padded else x, "sum", world_size(group), group))


@op(
    sample=lambda **shape: {**_sample(**shape), "rows": None}, fake=_gathered, rows="collective",
    opaque=lambda args: args["rows"] is not None,
)  # fmt: skip
def all_gather(x: Tensor, group: str, rows: int | None = None) -> Tensor:
    """Rows of all ranks, rank 0's first.

    x: [own rows, ...], any dtype → [own rows · world, ...], or only the first `rows` of them.
    """
    if x.dtype.itemsize == 1 and x.dtype.is_floating_point:  # not every back end moves FP8
        return all_gather(x.view(torch.uint8), group, rows).view(x.dtype)
    out = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, world_size(group), group))
    return out if rows is None else out[:rows]


@op(sample=_sample, fake=_own, rows="mixing", opaque=lambda args: True)
def shard_rows(x: Tensor, group: str) -> Tensor:
    """Own rows of a tensor that is the same on every rank, as `reduce_scatter(padded=True)` shares them out; no communication.

    x: [rows, ...], any dtype → [⌈rows / world⌉, ...]; what lies behind the last row is zero.
    """
    own = share(x.shape[0], group)
    start = shim.resolve_group(group).rank() * own
    mine = x[start : start + own]
    return torch.cat([mine, x.new_zeros([own - mine.shape[0], *x.shape[1:]])])


def _quantized_sample(**shape: Any) -> dict[str, Any]:
    sample = quantize.sample(**shape)
    q, scales = quantize(**sample)
    how = {name: sample[name] for name in ("scheme", "layout")}
    return {"q": q, "scales": scales, **how, "group": shape["group"], "rows": None}


def _quantized_fake(
    q: Tensor, scales: Tensor, scheme: str, layout: str, group: str, rows: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count = q.shape[0] * world_size(group) if rows is None else rows
    cols = q.shape[1] * (1 if formats.Scheme.parse(scheme).is_fp8 else 2)
    shape, stride, dtype = formats.scales_meta(count, cols, scheme, layout)
    return q.new_empty([count, q.shape[1]]), scales.new_empty_strided(shape, stride, dtype=dtype)


@op(
    sample=_quantized_sample, fake=_quantized_fake, rows="collective", row_args=("q", "scales"),
    opaque=lambda args: args["rows"] is not None,
)  # fmt: skip
def all_gather_quantized(
    q: Tensor, scales: Tensor, scheme: str, layout: str, group: str, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantised rows of all ranks with their scales, as one `quantize` of all rows would return them.

    q: [own rows, width], e4m3 or packed FP4.  scales: those of the own rows, as `quantize` returns them → (q, scales) of own
    rows · world, or of the first `rows` of them.  Row-major scales are gathered as they lie; for other layouts a rank's scales
    are no block of the whole's, and are taken apart before and put together after.
    """
    out = all_gather(q, group, rows)
    kind = formats.Scheme.parse(scheme)
    if kind.name == "fp8_tensor":
        return out, scales.new_empty(0)
    if not kind.is_fp8:
        scales = scales.to(torch.float8_e4m3fn)  # from FP64 when verified: exact, and layouts move bytes
    plain = remove_layout(scales, q.shape[0], groups_of(q.shape[1] * (1 if kind.is_fp8 else 2), kind), layout)
    return out, apply_layout(all_gather(plain, group, rows), layout)


def _fill(x: Tensor, group: str) -> Tensor:
    """x with rows of zeros up to a multiple of the world size."""
    missing = share(x.shape[0], group) * world_size(group) - x.shape[0]
    return torch.cat([x, x.new_zeros([missing, *x.shape[1:]])]) if missing else x
