"""What is written densely: arithmetic on ranges, against counting pages one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lzy.checkpoint.content import join_ranges
from lzy.checkpoint.dense import find_dense, without
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.linux.hugepages import HUGE_PAGE_BYTES

BASE = 0x7000_0000_0000
PAGES = HUGE_PAGE_BYTES // PAGE_BYTES

runs = st.lists(
    st.tuples(
        st.integers(0, 4 * PAGES), st.sampled_from([1, 15, 16, 17, 200, 256, 257, 600, 1100])
    ),
    max_size=12,
).map(
    lambda found: join_ranges(
        (BASE + first * PAGE_BYTES, BASE + (first + count) * PAGE_BYTES) for first, count in found
    )
)
units = st.sets(st.integers(0, 9)).map(
    lambda found: join_ranges(
        (BASE + unit * HUGE_PAGE_BYTES, BASE + (unit + 1) * HUGE_PAGE_BYTES) for unit in found
    )
)


def numbers(ranges: list[tuple[int, int]]) -> set[int]:
    """The units in ranges."""
    assert ranges == join_ranges(ranges)
    return {
        unit
        for start, end in ranges
        for unit in range((start - BASE) // HUGE_PAGE_BYTES, (end - BASE) // HUGE_PAGE_BYTES)
    }


@given(written=runs)
def test_half_of_a_unit_in_long_runs_is_dense(written: list[tuple[int, int]]) -> None:
    """A unit is dense if runs of 16 pages or more cover half of it, wherever they begin and end."""
    counts: dict[int, int] = {}
    for start, end in written:
        if end - start >= 16 * PAGE_BYTES:
            for page in range(start, end, PAGE_BYTES):
                unit = (page - BASE) // HUGE_PAGE_BYTES
                counts[unit] = counts.get(unit, 0) + 1
    expected = {unit for unit, count in counts.items() if count >= PAGES // 2}
    assert numbers(find_dense(written)) == expected


@given(dense=units, left_out=units)
def test_what_was_left_out_is_told_apart(
    dense: list[tuple[int, int]], left_out: list[tuple[int, int]]
) -> None:
    """Units that were not left out are found, each by itself."""
    assert numbers(without(dense, left_out)) == numbers(dense) - numbers(left_out)
