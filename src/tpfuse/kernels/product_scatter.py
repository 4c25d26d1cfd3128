"""Products whose rows are summed over the ranks, each rank keeping its share, by two algorithms.

chunked: for each rank its rows' product by cuBLAS.  Copy engines take the other ranks' rows into their regions while own rows
are multiplied: a product that writes over NVLink itself would wait for it at the end of every wave.  Then one kernel sums the
partial rows of all ranks, in FP32 and in rank order, and does all that follows on own rows (`cuda/reduce.cu`).
plain: one product, then the kernel of a reduce-scatter (`cuda/sharded.cu`): for few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpfuse.ir import registry
from tpfuse.ir.chained import Chained
from tpfuse.report import FusionError

from . import arrive
from .calls import call_of
from .channel import Channel
from .cuda_norm import BlockPlan, inputs_of, kernel_of
from .cuda_sharded import ShardCall, ShardOutputs, results_into, sharded
from .operands import Product, Rows, operands
from .plan import REGION_HEAD, ceil_div, share_of, turns
from .regions import SCATTER, Region, region_of
from .workspace import channel_of


def chunked(region: Region, rows: Rows, product: Product, call: ShardCall) -> ShardOutputs:
    """call: what follows the product; its x stands for the product's shape and dtype alone."""
    tokens, width = call.x.shape
    share, row_bytes = ceil_div(tokens, region.world), width * call.x.element_size()
    fitting = region.layout.rows(row_bytes)
    if fitting == 0:
        raise FusionError(
            f"{call.operator}: a row of {row_bytes} bytes does not fit a section of the region ({region.layout.part} bytes): "
            f"prepare the group with hidden={width}"
        )
    outputs = call.shard_outputs(region.world)
    args, _alive = inputs_of(region, call, call.x)
    results_into(args, outputs)
    args.base, args.section, args.share = REGION_HEAD // 16, region.layout.part // 16, share
    rows = rows.divisible(share if share <= fitting else 1, product.scheme)
    plan = BlockPlan.of(args.vectors)
    kernel = kernel_of("reduce", call, region, plan, NORM=False, OWN_NORM=call.alive[2])
    for first, end in turns(share, fitting):
        _partial_rows(region, rows, product, call, share, first, end)
        args.first, args.end = first, end
        kernel(plan.grid(end - first, region.sms), plan.threads, False, args)
    return outputs


def _partial_rows(
    region: Region, rows: Rows, product: Product, call: ShardCall, share: int, first: int, end: int
) -> None:  # fmt: skip
    """The products of one turn, each rank's into its region; all are behind the current stream when this returns."""
    tokens, width = call.x.shape
    main, copies = torch.cuda.current_stream(), region.copies

    def multiply(rank: int) -> tuple[Tensor, Tensor]:
        """→ the product of a rank's rows, and where that rank wants it."""
        begin, stop = share_of(rank, share, tokens, first, end)
        there = region.part(rank, region.rank, stop - begin, width, call.x.dtype)
        out = there if rank == region.rank else product.empty(stop - begin)
        product.into(out, rows.part(begin, stop))
        return out, there

    copies.wait_event(main.record_event())
    with torch.cuda.stream(copies):
        arrive.wait_done(region, call.operator)
    every = []  # kept until all are sent: freed, the memory of one would be the next but one's, whose product waits for no copy
    for step in range(1, region.world):
        made, there = multiply((region.rank + step) % region.world)
        every.append(made)
        copies.wait_event(main.record_event())
        with torch.cuda.stream(copies):
            there.copy_(made)
    sent = copies.record_event()
    multiply(region.rank)
    main.wait_event(sent)


def plain(channel: Channel, rows: Rows, product: Product, call: ShardCall) -> ShardOutputs:
    """One product, then the reduce-scatter and what follows it in one launch."""
    whole = product.empty(rows.values.shape[0])
    product.into(whole, rows)
    return sharded(channel, replace(call, x=whole))


def _call_of(name: str, args: Sequence[Any], alive: tuple[bool, ...]) -> tuple[Rows, Product, ShardCall]:
    """An operator's arguments as operands and what follows their product."""
    op = registry[name]
    if isinstance(op, Chained):
        rows, product = operands(op.halves(args)[0])
        call = call_of(ShardCall, name, args, alive)
        return rows, product, replace(call, x=product.like(rows.values.shape[0]))
    rows, product = operands(args[:-2])
    return rows, product, sum_of(name, rows, product, args[-1])


def sum_of(operator: str, rows: Rows, product: Product, group: str) -> ShardCall:
    """Nothing behind the sum."""
    alone = (False, False, False, True)
    return ShardCall(operator, product.like(rows.values.shape[0]), alone, None, 0.0, 0.0, "cast_first", group=group)


def _launcher(algorithm: str, name: str) -> Callable[..., Any]:
    """What the registry launches."""
    padded = registry[name].params.index("padded")

    @torch.no_grad()
    def run(*args: Any, alive: tuple[bool, ...]) -> Any:
        rows, product, call = _call_of(name, args, alive)
        link = channel_of(call.group) if algorithm == "plain" else region_of(SCATTER, call.group)
        if len(call.x) % link.world and not args[padded]:
            raise FusionError(f"{name}: {len(call.x)} rows are no multiple of {link.world} ranks, and are not padded")
        out = chunked(link, rows, product, call) if isinstance(link, Region) else plain(link, rows, product, call)
        if "_norm" not in name:
            return out.reduced
        return (out.q, out.scales, out.own_norm, out.reduced) if call.scheme else (out.own_norm, out.reduced)

    return run


def __getattr__(name: str) -> Callable[..., Any]:
    """The launcher of an operator by an algorithm: `chunked_matmul_reduce_scatter`."""
    algorithm, _, operator = name.partition("_")
    if algorithm not in ("chunked", "plain") or operator not in registry:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _launcher(algorithm, operator)
