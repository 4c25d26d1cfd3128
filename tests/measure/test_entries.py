"""From measurements to thresholds: noise, ties, single outliers, what was not measured everywhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpfuse.lowering.table import Entry
from tpfuse.measure.entries import LEAST_MARGIN, SWITCH, entries, losses, margin, steps
from tpfuse.measure.points import AGAIN, ALONE

ROW = 8192
ONE, TWO = "triton:one_shot", "triton:two_shot"


def test_a_step_ends_between_the_sizes_where_the_choice_changes():
    times = {1: {ONE: 4, TWO: 6}, 64: {ONE: 6, TWO: 7}, 256: {ONE: 12, TWO: 9}, 1024: {ONE: 40, TWO: 25}}
    assert steps(times, 0.01, ROW) == ((128 * ROW, ONE), (None, TWO))


def test_a_tie_within_the_margin_goes_to_the_simpler():
    times = {n: {"unfused": 10.1, ONE: 10.0, "flashinfer:one_shot": 9.95} for n in (1, 8)}
    assert steps(times, 0.02, ROW) == ((None, "unfused"),)
    assert steps(times, 0.006, ROW) == ((None, ONE),)
    assert steps({n: {"off": 10.0, "on": 10.0} for n in (1, 8)}, 0.01, ROW) == ((None, "off"),)


def test_one_noisy_size_makes_no_step():
    times = {n: {ONE: 10.0, TWO: 11.0} for n in (1, 8, 64, 256)}
    times[64] = {ONE: 10.0, TWO: 9.85}  # half a per cent beyond the margin
    assert steps(times, 0.01, ROW) == ((None, ONE),)
    times[64] = {ONE: 10.0, TWO: 9.0}
    assert [choice for _, choice in steps(times, 0.01, ROW)] == [ONE, TWO, ONE]


def test_what_does_not_serve_a_size_is_not_chosen_there():
    times = {1: {ONE: 5.0}, 8: {ONE: 6.0, TWO: 3.0}}
    assert steps(times, 0.01, ROW) == ((2 * ROW, ONE), (None, TWO))
    with pytest.raises(ValueError, match="nothing was measured at 8 tokens"):
        steps({1: {ONE: 5.0}, 8: {}}, 0.01, ROW)


def test_the_margin_is_what_repetitions_differ_by():
    assert margin([0.0, 0.001, 0.002]) == LEAST_MARGIN
    assert margin([0.01, 0.02, 0.03, 0.04]) == pytest.approx(0.0325)
    assert margin([0.05]) == 0.05


times_of_a_size = st.fixed_dictionaries({name: st.floats(3, 300) for name in (ONE, TWO, "unfused")})
measured = st.dictionaries(st.integers(1, 4096), times_of_a_size, min_size=1, max_size=8)


@given(measured, st.floats(0.01, 0.1))
def test_no_choice_loses_more_than_the_margin_and_two_changes(times: dict[int, dict[str, float]], noise: float):
    found = steps(times, noise, ROW)
    Entry("op", "bfloat16", 2, found)  # ascending, the last without end
    assert len(found) <= len(times)
    # Leaving a size for its own fastest choice would cost two changes at most.
    assert max(losses(times, found, ROW).values()) <= noise + 2 * SWITCH + 1e-4


def rows(scheme: str, hidden: int, times: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {"op": "all_reduce_add_rms_norm", "scheme": scheme, "dtype": "bfloat16", "world": 2, "hidden": hidden, "tokens": tokens,
         "impl": impl, "us": us}
        for tokens, of in times.items() for impl, us in of.items()
    ]  # fmt: skip


def test_an_entry_for_each_scheme_and_width():
    fast = {1: {ONE: 4.0, ONE + AGAIN: 4.04, TWO: 6.0}, 1024: {ONE: 40.0, ONE + AGAIN: 40.2, TWO: 25.0}}
    slow = {1: {ONE: 4.0, ONE + AGAIN: 4.4, TWO: 3.7}}  # the repetition differed by more
    found = entries([*rows("", 4096, fast), *rows("fp8_tensor", 4096, slow), *rows("", 8192, slow)])
    assert found == [
        Entry("all_reduce_add_rms_norm", "bfloat16", 2, ((32 * 8192, ONE), (None, TWO)), "", 4096),
        Entry("all_reduce_add_rms_norm", "bfloat16", 2, ((None, ONE),), "fp8_tensor", 4096),
        Entry("all_reduce_add_rms_norm", "bfloat16", 2, ((None, ONE),), "", 8192),
    ]


def test_a_product_alone_is_the_noise_and_no_choice():
    where = {"op": "matmul_reduce_scatter", "scheme": "", "dtype": "bfloat16", "world": 2, "hidden": 4096, "across": 7168}
    times = {512: {ALONE: 50.0, "nccl": 80.0, "cuda:plain": 60.0, ALONE + AGAIN: 50.3},
             8192: {ALONE: 700.0, "nccl": 800.0, "cuda:plain": 790.0, "cuda:chunked": 710.004, ALONE + AGAIN: 705.0}}  # fmt: skip
    given = [{**where, "tokens": n, "impl": impl, "us": us} for n, of in times.items() for impl, us in of.items()]
    other = [{**row, "across": 2048} for row in given if row["tokens"] == 512]
    first, second = entries([*given, *other])
    assert (first.across, first.steps) == (7168, ((2048 * ROW, "cuda:plain"), (None, "cuda:chunked")))
    assert (second.across, second.steps) == (2048, ((None, "cuda:plain"),))
    assert [size for size, _ in first.times] == [512 * ROW, 8192 * ROW]
    assert dict(first.times[1][1]) == {**times[8192], "cuda:chunked": 710.0}


def test_products_that_take_the_same_time_go_to_the_simplest_kernel():
    names = ("torch:fused", "cuda:chunked", "cuda:plain", "nccl")
    given = {4096: {name: 100.0 - i / 10 for i, name in enumerate(names[::-1])}}
    found = [steps({4096: {k: given[4096][k] for k in names[:n]}}, 0.01, ROW) for n in (4, 3, 2, 1)]
    assert [choice for ((_, choice),) in found] == ["nccl", "cuda:plain", "cuda:chunked", "torch:fused"]


def test_without_a_repetition_there_is_no_margin():
    with pytest.raises(ValueError, match="nothing was measured twice"):
        entries(rows("", 4096, {1: {ONE: 4.0, TWO: 6.0}}))
