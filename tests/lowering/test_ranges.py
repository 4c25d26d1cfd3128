"""plan_ranges: sorted, disjoint ranges that cover every token count, whatever it is given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpfuse.lowering.ranges import plan_ranges
from tpfuse.target import UNBOUNDED, Range


def pairs(ranges):
    return [(r.start, r.end) for r in ranges]


def test_no_endpoint_gives_exactly_one():
    assert pairs(plan_ranges()) == [(1, UNBOUNDED)]
    assert pairs(plan_ranges(max_tokens=512)) == [(1, 512)]


def test_an_endpoint_closes_its_range():
    assert pairs(plan_ranges([256, 2048])) == [(1, 256), (257, 2048), (2049, UNBOUNDED)]


def test_unsorted_and_repeated_endpoints():
    assert plan_ranges([2048, 256, 256]) == plan_ranges([256, 2048])


def test_endpoint_at_or_beyond_max_tokens():
    assert pairs(plan_ranges([256, 512, 4096], max_tokens=512)) == [(1, 256), (257, 512)]


def test_endpoint_one():
    assert pairs(plan_ranges([1], max_tokens=8)) == [(1, 1), (2, 8)]


def test_size_one():
    assert pairs(plan_ranges(sizes=[1], max_tokens=8)) == [(1, 1), (2, 8)]


def test_single_size_in_the_middle():
    assert pairs(plan_ranges(sizes=[4], max_tokens=8)) == [(1, 3), (4, 4), (5, 8)]


def test_size_equal_to_an_endpoint():
    assert pairs(plan_ranges([4], sizes=[4], max_tokens=8)) == [(1, 3), (4, 4), (5, 8)]


def test_neighbouring_sizes_and_the_last():
    assert pairs(plan_ranges(sizes=[8, 3, 2], max_tokens=8)) == [(1, 1), (2, 2), (3, 3), (4, 7), (8, 8)]


def test_size_beyond_max_tokens_is_no_range():
    assert pairs(plan_ranges(sizes=[9], max_tokens=8)) == [(1, 8)]


def test_near_thresholds_merge():
    assert pairs(plan_ranges(thresholds=[100, 110, 120, 200])) == [(1, 100), (101, 200), (201, UNBOUNDED)]


def test_the_first_thresholds_count_most():
    assert pairs(plan_ranges(thresholds=[1000, 2000, 10, 1100, 100, 5])) == [(1, 10), (11, 1000), (1001, 2000), (2001, UNBOUNDED)]


def test_at_most_four_ranges_come_of_thresholds():
    assert len(plan_ranges(thresholds=[10, 100, 1000, 10_000, 100_000])) == 4


def test_endpoints_replace_thresholds():
    assert plan_ranges([64], thresholds=[100, 1000]) == plan_ranges([64])


@pytest.mark.parametrize("given_counts", [{"endpoints": [0]}, {"sizes": [-1]}])
def test_counts_below_one(given_counts):
    with pytest.raises(ValueError, match="start at 1"):
        plan_ranges(**given_counts)


counts = st.lists(st.integers(1, 300), max_size=5)


@given(counts, counts, st.integers(1, 300) | st.none(), counts)
def test_every_count_lies_in_one_range(endpoints, sizes, max_tokens, thresholds):
    ranges = plan_ranges(endpoints, sizes, max_tokens, thresholds)
    last = max_tokens or UNBOUNDED
    assert ranges[0].start == 1 and ranges[-1].end == last
    assert all(a.end + 1 == b.start for a, b in zip(ranges, ranges[1:], strict=False))
    assert all(Range(s, s) in ranges for s in sizes if s <= last)
    assert all(any(r.end == e for r in ranges) for e in endpoints if e <= last)
