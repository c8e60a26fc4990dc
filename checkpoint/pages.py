"""Pages and masks: which runs of addresses a window's mask stands for, and which pages are zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .linux import PAGE_BYTES

MOST_WINDOW_PAGES = 64
_ZEROS = bytes(MOST_WINDOW_PAGES * PAGE_BYTES)
_ZERO_VIEW = memoryview(_ZEROS)
_WORDS_PER_PAGE = PAGE_BYTES // 8


def present_pages(mask: int) -> list[int]:
    """Numbers of the set bits of `mask`, ascending."""
    pages = []
    while mask:
        lowest = mask & -mask
        pages.append(lowest.bit_length() - 1)
        mask ^= lowest
    return pages


def page_runs(windows: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(address, length in bytes) of the present pages of (address, mask) windows, runs merged."""
    runs: list[tuple[int, int]] = []
    start = end = -1
    for address, mask in windows:
        while mask:
            skipped = (mask & -mask).bit_length() - 1
            mask >>= skipped
            pages = (~mask & (mask + 1)).bit_length() - 1
            mask >>= pages
            at = address + skipped * PAGE_BYTES
            address = at + pages * PAGE_BYTES
            if at == end:
                end = address
                continue
            if end != start:
                runs.append((start, end - start))
            start, end = at, address
    if end != start:
        runs.append((start, end - start))
    return runs


def first_words(view: memoryview) -> list[int]:
    """The first 64-bit word of each page of `view` (whole pages): what is not 0 is no zero page."""
    return view.cast("Q")[::_WORDS_PER_PAGE].tolist()


def zero_pages(content: bytearray, offset: int, words: Sequence[int]) -> list[bool] | bool:
    """Which pages at `offset` of `content` are all zero, their first words being `words`.

    Answers True when all are, False when none is, else a list. Comparisons are memcmp(3) on the
    buffer itself: nothing is copied.
    """
    if 0 not in words:
        return False
    if not any(words):
        length_bytes = len(words) * PAGE_BYTES
        if content.startswith(_ZERO_VIEW[:length_bytes], offset):
            return True
    page = _ZERO_VIEW[:PAGE_BYTES]
    zero = [
        word == 0 and content.startswith(page, offset + number * PAGE_BYTES)
        for number, word in enumerate(words)
    ]
    return zero if True in zero else False
