"""Which form a layer takes, from made-up measurements: sums, what was not measured, noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpfuse.lowering.table import Entry, Table
from tpfuse.measure.entries import entries
from tpfuse.measure.points import AGAIN, ALONE
from tpfuse.measure.precedence import ASYNC_TP, SEQUENCE_PARALLEL, decided
from tpfuse.target import Range

HIDDEN, ROW = 4096, 8192
WHOLE, AROUND = "all_reduce_add_rms_norm", "reduce_scatter_add_rms_norm_all_gather"
SCATTER, GATHER = "matmul_reduce_scatter_add_rms_norm", "all_gather_matmul"


def rows(op: str, times: dict[int, dict[str, float]], **where: Any) -> list[dict[str, Any]]:
    """The first choice is measured twice, with the same result."""
    known = {"op": op, "scheme": "", "dtype": "bfloat16", "world": 2, "hidden": HIDDEN, **where}
    return [
        {**known, "tokens": n, "impl": impl, "us": us}
        for n, of in times.items() for impl, us in {**of, next(iter(of)) + AGAIN: next(iter(of.values()))}.items()
    ]  # fmt: skip


def layer(whole: Any, around: Any = (), scatter: Any = (), gather: Any = (), across: int = 7168, **where: Any) -> list[Entry]:
    """Entries of one layer: microseconds by tokens; of products the one alone, then the operator's kernel."""
    quantised = "scheme" in where
    names = [WHOLE, AROUND, SCATTER, GATHER]
    if quantised:
        names = [f"{WHOLE}_quantize", "reduce_scatter_add_rms_norm_quantize_all_gather", f"scaled_{SCATTER}_quantize",
                 "all_gather_scaled_matmul"]  # fmt: skip
    found = rows(names[0], {n: {"triton:one_shot": us, "unfused": 3 * us} for n, us in dict(whole).items()}, **where)
    found += rows(names[1], {n: {"cuda:sharded": us} for n, us in dict(around).items()}, **where)
    of = {n: {ALONE: a, "cuda:plain": t + 9, "cuda:chunked": t} for n, (a, t) in dict(scatter).items()}
    found += rows(names[2], of, **{**where, "across": across})
    of = {n: {ALONE: a, "nccl": t + 9, "cuda:push": t} for n, (a, t) in dict(gather).items()}
    sizes = {"across": 2 * across, **({"dtype": "float8_e4m3fn"} if quantised else {})}
    return entries([*found, *rows(names[3], of, **{**where, **sizes})])


def found(given: list[Entry]) -> dict[str, Entry]:
    return {e.op: e for e in decided(given)}


# At 512 tokens the collectives cost 20 and 30 µs beside products of 100 and 200; at 4096 300 and 260 beside 800 and 1600.
WHOLE_US, AROUND_US = {512: 20.0, 4096: 300.0}, {512: 30.0, 4096: 260.0}
SCATTER_US, GATHER_US = {512: (100.0, 125.0), 4096: (800.0, 850.0)}, {512: (200.0, 220.0), 4096: (1600.0, 1630.0)}


def test_a_form_is_the_sum_of_its_parts():
    got = found(layer(WHOLE_US, AROUND_US, SCATTER_US, GATHER_US))
    between = 1448 * ROW  # √(512 · 4096) tokens
    assert got[SEQUENCE_PARALLEL] == Entry(SEQUENCE_PARALLEL, "bfloat16", 2, ((between, "off"), (None, "on")), "", HIDDEN)
    assert got[SEQUENCE_PARALLEL].times == (
        (512 * ROW, (("off", 320.0), ("on", 330.0))), (4096 * ROW, (("off", 2700.0), ("on", 2480.0))),
    )  # fmt: skip
    assert got[ASYNC_TP] == Entry(ASYNC_TP, "bfloat16", 2, ((between, "off"), (None, "on")), "", HIDDEN)
    assert dict(got[ASYNC_TP].times[0][1]) == {"off": 330.0, "on": 345.0}


def test_sequence_parallelism_may_pay_without_overlap():
    slow = {n: (a, 2 * t) for n, (a, t) in SCATTER_US.items()}
    got = found(layer(WHOLE_US, AROUND_US, slow, GATHER_US))
    assert dict(got[SEQUENCE_PARALLEL].times[1][1]) == {"off": 2700.0, "on": 2660.0}
    assert got[ASYNC_TP].steps == ((None, "off"),)


def test_a_gain_within_the_noise_is_none():
    """40 µs of 2,700 are more than the least margin, and less than 2% that the product alone was measured to differ by."""
    given = layer(WHOLE_US, AROUND_US, {n: (a, 2 * t) for n, (a, t) in SCATTER_US.items()}, GATHER_US)
    noisy = rows(GATHER, {n: {ALONE: a, "cuda:push": t} for n, (a, t) in GATHER_US.items()}, across=14336)
    noisy = [{**r, "us": r["us"] * 1.02} if r["impl"].endswith(AGAIN) else r for r in noisy]
    assert found(given)[SEQUENCE_PARALLEL].choice(4096 * ROW) == "on"
    assert found([*(e for e in given if e.op != GATHER), *entries(noisy)])[SEQUENCE_PARALLEL].choice(4096 * ROW) == "off"


def test_products_of_two_layers_of_a_width_count_together():
    given = layer(WHOLE_US, AROUND_US, SCATTER_US, GATHER_US)
    given += [e for e in layer({}, {}, SCATTER_US, GATHER_US, across=2048)]
    got = found(given)
    assert dict(got[SEQUENCE_PARALLEL].times[1][1]) == {"off": 5400.0, "on": 4960.0}
    assert dict(got[ASYNC_TP].times[1][1]) == {"off": 5320.0, "on": 4960.0}


def test_without_products_the_collectives_are_compared_alone():
    got = found(layer(WHOLE_US, AROUND_US))
    assert ASYNC_TP not in got and got[SEQUENCE_PARALLEL].steps == ((1448 * ROW, "off"), (None, "on"))
    assert dict(got[SEQUENCE_PARALLEL].times[1][1]) == {"off": 300.0, "on": 260.0}


def test_without_the_sharded_form_alone_the_overlapped_one_decides():
    got = found(layer(WHOLE_US, {}, SCATTER_US, GATHER_US))
    assert ASYNC_TP not in got and dict(got[SEQUENCE_PARALLEL].times[1][1]) == {"off": 2700.0, "on": 2480.0}


@pytest.mark.parametrize("missing", ["whole", "both", "times"])
def test_what_was_not_measured_decides_nothing(missing: str):
    given = layer({} if missing == "whole" else WHOLE_US, *(() if missing == "both" else (AROUND_US, SCATTER_US, GATHER_US)))
    if missing == "times":  # an earlier table
        given = [Entry(e.op, e.dtype, e.world, e.steps, e.scheme, e.hidden, e.across) for e in given]
    assert decided(given) == []


def test_token_counts_that_only_one_form_was_measured_at_are_left_out():
    got = found(layer({1024: 50.0, 4096: 300.0}, AROUND_US, SCATTER_US, GATHER_US))
    assert [size for size, _ in got[SEQUENCE_PARALLEL].times] == [4096 * ROW] and len(got[ASYNC_TP].times) == 2
    assert ASYNC_TP in found(layer({1024: 50.0}, AROUND_US, SCATTER_US, GATHER_US))


def test_other_ranks_widths_dtypes_schemes_do_not_mix():
    given = layer(WHOLE_US, AROUND_US)
    for where in ({"world": 4}, {"hidden": 8192}, {"dtype": "float16"}, {"scheme": "fp8_tensor"}):
        given += layer({}, {n: 1.0 for n in AROUND_US}, SCATTER_US, GATHER_US, **where)
    (only,) = decided(given)
    assert only == decided(layer(WHOLE_US, AROUND_US))[0] and dict(only.times[1][1])["on"] == 260.0


def test_quantised_rows_are_gathered_by_their_own_dtype():
    got = decided(layer(WHOLE_US, AROUND_US, SCATTER_US, GATHER_US, scheme="fp8_token"))
    assert [(e.op, e.scheme, e.dtype, e.hidden) for e in got] == [
        (SEQUENCE_PARALLEL, "fp8_token", "bfloat16", HIDDEN), (ASYNC_TP, "fp8_token", "bfloat16", HIDDEN)
    ]  # fmt: skip
    assert dict(got[0].times[1][1]) == {"off": 2700.0, "on": 2480.0}


def test_a_refusal_names_both_times():
    table = Table("", {}, tuple(decided(layer(WHOLE_US, AROUND_US, SCATTER_US, GATHER_US))))
    refused = table.refuses(SEQUENCE_PARALLEL, torch.bfloat16, 2, Range(600, 1024), HIDDEN)
    assert refused is not None and refused.code == "threshold"
    assert "off 320.0 µs, on 330.0 µs" in refused.detail and f"at {512 * ROW} bytes" in refused.detail
    assert table.refuses(SEQUENCE_PARALLEL, torch.bfloat16, 2, Range(2000, 2000), HIDDEN) is None
    unknown = table.refuses(SEQUENCE_PARALLEL, torch.bfloat16, 4, Range(2000, 2000), HIDDEN)
    assert unknown is not None and unknown.code == "unmeasured"
