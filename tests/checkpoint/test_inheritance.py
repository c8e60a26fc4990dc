"""Which pages of two page maps are the same memory: /proc/PID/pagemap entries, as the kernel's."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.linux.memory import Frames, same_frames

PRESENT, SWAPPED, EXCLUSIVE, DIRTY = 1 << 63, 1 << 62, 1 << 56, 1 << 55
PAGES = Frames.BLOCK_PAGES * 2 + 200


def find_same(folder: Path, one: list[int], other: list[int]) -> list[int]:
    """The numbers of the pages that are the same."""
    both = []
    for name, entries in (("one", one), ("other", other)):
        whole = entries + [0] * (-len(entries) % Frames.BLOCK_PAGES)
        (folder / name).write_bytes(struct.pack(f"<{len(whole)}Q", *whole))
        both.append(Frames(os.open(folder / name, os.O_RDONLY)))
    try:
        found = same_frames(*both, 0, len(one) * PAGE_BYTES)
    finally:
        for frames in both:
            frames.close()
    return [page // PAGE_BYTES for low, high in found for page in range(low, high, PAGE_BYTES)]


def test_all_are_the_same(tmp_path: Path) -> None:
    """Equal frames are, whatever else the entries say."""
    frames = [PRESENT | number + 7 for number in range(PAGES)]
    others = [frame | EXCLUSIVE * (number % 2) | DIRTY for number, frame in enumerate(frames)]
    assert find_same(tmp_path, frames, others) == list(range(PAGES))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PRESENT | 9, PRESENT | 8),
        (PRESENT | 9, SWAPPED | 9),  # a frame's number may be that of a place in swap
        (SWAPPED | 9, PRESENT | 9),
        (PRESENT, PRESENT),  # frames are not told: no CAP_SYS_ADMIN
        (SWAPPED, SWAPPED),
        (0, 0),
    ],
)
def test_what_is_not_the_same(tmp_path: Path, one: int, other: int) -> None:
    """Another frame, swap that looks like one, or what we are not told: never taken for shared."""
    ours, theirs = ([PRESENT | number + 7 for number in range(PAGES)] for _ in range(2))
    ours[70], theirs[70] = one, other
    assert find_same(tmp_path, ours, theirs) == [n for n in range(PAGES) if n != 70]
    assert find_same(tmp_path, [one] * PAGES, [other] * PAGES) == []


def test_same_place_in_swap(tmp_path: Path) -> None:
    """What fork(2) shared and the kernel then put away is shared there."""
    assert find_same(tmp_path, [SWAPPED | 64] * 3, [SWAPPED | 64] * 3) == [0, 1, 2]
