"""Which ranges of token counts get a graph of their own: one pure function."""

from __future__ import annotations

from collections.abc import Iterable

from tpfuse.target import UNBOUNDED, Range

MERGED_BELOW = 1.25
MOST = 4  # ranges between measured thresholds: each is a graph to compile


def plan_ranges(
    endpoints: Iterable[int] = (),
    sizes: Iterable[int] = (),
    max_tokens: int | None = None,
    thresholds: Iterable[int] = (),
) -> list[Range]:
    """Sorted, disjoint ranges that cover 1 … max_tokens (every count where that is None).

    endpoints: the user's; each closes its range.  sizes: token counts with a graph of their own.  thresholds: measured, what
    matters most first; one closer than a factor of `MERGED_BELOW` to one before it is left out, and so are those beyond what
    makes `MOST` ranges.  ValueError for a count below 1.
    """
    last = max_tokens or UNBOUNDED
    ends, single = sorted(set(endpoints)), sorted(set(sizes))
    for count in (*ends, *single, last):
        if count < 1:
            raise ValueError(f"token counts start at 1, got {count}")
    if not ends:
        for threshold in dict.fromkeys(thresholds):
            if len(ends) + 1 < MOST and all(max(threshold, e) > MERGED_BELOW * min(threshold, e) for e in ends):
                ends.append(threshold)
    cuts = {e for e in ends if e < last} | {last}
    for size in (s for s in single if s <= last):
        cuts |= {size, size - 1}
    cuts.discard(0)
    ranges, start = [], 1
    for end in sorted(cuts):
        ranges.append(Range(start, end))
        start = end + 1
    return ranges
