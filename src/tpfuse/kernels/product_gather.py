"""Products of the rows of all ranks, which lie in this rank's region and nowhere else, by two algorithms.

chunked: copy engines push own rows to every peer while own rows are multiplied; then each peer's rows as they come, on a stream
of their own, so that two products fill each other's last wave.  A word behind the rows, copied likewise, says that they are
here: a kernel might starve behind a product.
push: one kernel pushes own rows and ends when those of all ranks are here; then one product of all: for few rows.

Scales of rows travel by rows, whatever their layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tpfuse.formats.layouts import apply_layout
from tpfuse.report import FusionError

from . import arrive
from .calls import rows_of
from .operands import Product, Rows, plain, quantised
from .plan import share_of, turns
from .regions import GATHER, Region, region_of


def chunked(region: Region, operator: str, own: Rows, products: Sequence[Product], tokens: int, keep: bool) -> list[Tensor]:
    """own: own rows, contiguous, their scales by rows.  tokens: rows of the results; what the ranks have more is left out.

    → a product of each, then, where kept, the gathered rows and scales, by rows.
    """
    results = [product.empty(tokens) for product in products]
    kept = [t.new_empty(tokens, t.shape[1]) for t in own.moved] if keep else []
    for first, end in turns(len(own.values), _fitting(region, operator, own)):
        _turn(region, operator, own, products, results, kept, first, end)
    return [*results, *kept]


def _turn(
    region: Region, operator: str, own: Rows, products: Sequence[Product], results: list[Tensor], kept: list[Tensor], first: int,
    end: int,
) -> None:  # fmt: skip
    share, tokens, count, mine = len(own.values), len(results[0]), end - first, own.part(first, end)

    def multiply(rank: int, rows: Rows) -> None:
        begin, stop = share_of(rank, share, tokens, first, end)
        rows = rows.part(0, stop - begin)
        for product, result in zip(products, results, strict=True):
            product.into(result[begin:stop], rows)
        for whole, part in zip(kept, rows.moved, strict=False):
            whole[begin:stop].copy_(part)

    main, side, copies = torch.cuda.current_stream(), region.side, region.copies
    fork = main.record_event()
    copies.wait_event(fork)
    with torch.cuda.stream(copies):
        arrive.wait_done(region, operator)
        for step in range(1, region.world):
            peer = (region.rank + step) % region.world
            for there, here in zip(region.gathered(peer, region.rank * count, count, own.moved), mine.moved, strict=True):
                there.copy_(here)
            region.flag(peer).copy_(region.call)
        sent = copies.record_event()
    multiply(region.rank, mine)
    side.wait_event(fork)
    with torch.cuda.stream(side):
        for step in range(1, region.world):
            source = (region.rank - step) % region.world
            arrive.wait_full(region, operator, source)
            multiply(source, _arrived(region, own, source * count, count))
        multiplied = side.record_event()
    main.wait_event(sent)
    main.wait_event(multiplied)
    arrive.finish(region, operator)


def push(region: Region, operator: str, own: Rows, products: Sequence[Product], tokens: int, keep: bool) -> list[Tensor]:
    """As `chunked`, which more rows than the region holds are left to."""
    if _fitting(region, operator, own) < len(own.values):
        return chunked(region, operator, own, products, tokens, keep)
    arrive.push_rows(region, operator, own.moved)
    gathered = _arrived(region, own, 0, tokens)
    results = [product.empty(tokens) for product in products]
    for product, result in zip(products, results, strict=True):
        product.into(result, gathered)
    kept = [t.clone() for t in gathered.moved] if keep else []
    arrive.finish(region, operator)
    return [*results, *kept]


def _arrived(region: Region, own: Rows, first: int, count: int) -> Rows:
    """Rows of a gather in this rank's region."""
    values, *scales = region.gathered(region.rank, first, count, own.moved)
    return replace(own, values=values, scales=scales[0]) if scales else replace(own, values=values)


def _fitting(region: Region, operator: str, own: Rows) -> int:
    """Own rows in one turn."""
    row_bytes, *scale_bytes = (t.shape[1] * t.element_size() for t in own.moved)
    rows = region.layout.rows(row_bytes, *scale_bytes)
    if rows == 0:
        raise FusionError(
            f"{operator}: a row of {row_bytes} bytes does not fit a rank's part of the region ({region.layout.part} bytes): "
            f"prepare the group with hidden={own.values.shape[1]}"
        )
    return rows


_ALGORITHMS = {"chunked": chunked, "push": push}


def _matmul(algorithm: str) -> Callable[..., list[Tensor]]:
    """What the registry launches."""

    @torch.no_grad()
    def run(
        x: Tensor, weights: list[Tensor], biases: list[Tensor | None], rows: int | None, keep: bool, group: str, *,
        alive: tuple[bool, ...],
    ) -> list[Tensor]:  # fmt: skip
        region, own = region_of(GATHER, group), Rows(rows_of(x))
        products = [plain(x, weight, bias)[1] for weight, bias in zip(weights, biases, strict=True)]
        tokens = len(x) * region.world if rows is None else rows
        return _ALGORITHMS[algorithm](region, "all_gather_matmul", own, products, tokens, keep)

    return run


def _scaled(algorithm: str) -> Callable[..., list[Tensor]]:
    """What the registry launches."""

    @torch.no_grad()
    def run(
        x: Tensor, x_scale: Tensor, weights: list[Tensor], weight_scales: list[Tensor], biases: list[Tensor | None],
        result_scales: list[Tensor | None], alphas: list[Tensor | None], scheme: str, layout: str, weight_layout: str,
        out_dtype: str, fast_accum: bool, origin: str, rows: int | None, keep: bool, group: str, *, alive: tuple[bool, ...],
    ) -> list[Tensor]:  # fmt: skip
        region, x = region_of(GATHER, group), rows_of(x)
        how = scheme, layout, weight_layout, out_dtype, fast_accum, origin
        each = zip(weights, weight_scales, biases, result_scales, alphas, strict=True)
        pairs = [quantised(x, weight, x_scale, scale, bias, result, alpha, *how) for weight, scale, bias, result, alpha in each]
        tokens = len(x) * region.world if rows is None else rows
        own, products = pairs[0][0].by_rows(scheme), [product for _, product in pairs]
        out = _ALGORITHMS[algorithm](region, "all_gather_scaled_matmul", own, products, tokens, keep)
        if len(out) > len(products) + 1:  # scales are kept
            out[-1] = apply_layout(out[-1], layout)
        return out

    return run


chunked_all_gather_matmul = _matmul("chunked")
push_all_gather_matmul = _matmul("push")
chunked_all_gather_scaled_matmul = _scaled("chunked")
push_all_gather_scaled_matmul = _scaled("push")
