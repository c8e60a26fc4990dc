"""Rows of windows that were read of a running process: what was not written since still holds."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from .patchwork import Piece


class Draft:
    """What `ahead` has read into an image that is being written; planned with like an image."""

    def __init__(
        self,
        runs: array[int],
        patchworks: Sequence[list[Piece]],
        chunk_count: int,
        window_pages: int,
    ) -> None:
        """`runs`, `patchworks`: as `ImageTables.set_aside` has them, with so many chunks."""
        self.runs = runs
        self.chunk_count = chunk_count
        self.window_pages = window_pages
        self._patchworks = patchworks

    @property
    def patchwork_count(self) -> int:
        """How many windows are of several chunks."""
        return len(self._patchworks)

    def space_extent(self, space: int) -> tuple[int, int]:
        """[first, last) of the rows of a space: all are of the process itself."""
        return (0, len(self.runs) // 3) if space == 0 else (0, 0)

    def pieces(self, chunk: int, mask: int) -> list[Piece]:
        """What makes up the pages `mask` that a row finds in `chunk`."""
        if chunk < self.chunk_count:
            return [Piece(mask, mask, chunk)]
        return self._patchworks[chunk - self.chunk_count]
