"""Rows of windows that were read of a running process: what was not written since still holds."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from .patchwork import Piece


class Draft:
    """What `ahead` has read into an image that is being written; planned with like an image."""

    patchwork_count = 0

    def __init__(
        self, rows: Mapping[int, tuple[int, int]], chunk_count: int, window_pages: int
    ) -> None:
        """`rows`: {window address: (mask of pages, number of their chunk)}."""
        self.runs = array("Q")
        for address, (mask, chunk) in sorted(rows.items()):
            self.runs.extend((address, mask, chunk))
        self.chunk_count = chunk_count
        self.window_pages = window_pages

    def space_extent(self, space: int) -> tuple[int, int]:
        """[first, last) of the rows of a space: all are of the process itself."""
        return (0, len(self.runs) // 3) if space == 0 else (0, 0)

    def pieces(self, chunk: int, mask: int) -> list[Piece]:
        """What makes up the pages `mask` that a row finds in `chunk`."""
        return [Piece(mask, mask, chunk)]
