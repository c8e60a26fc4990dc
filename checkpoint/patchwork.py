"""Patchworks: windows whose pages lie in several chunks, only some having been written anew.

A checkpoint stores the pages that were written since the last one, not the windows they lie in. A
run record then names, in place of a chunk, a patchwork: a list of *pieces*, each of which takes
some of the pages that a chunk holds. To whoever reads, a patchwork is a chunk like any other.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

from .linux import PAGE_BYTES

PIECE_RECORD = struct.Struct("<QQII")
MOST_PIECES = 8
"""Pieces of one patchwork: a window that would need more is stored anew, whole."""


class Piece(NamedTuple):
    """Pages `taken` of those that chunk `chunk` holds (`held`): masks of the window's pages."""

    held: int
    taken: int
    chunk: int


class PieceTable:
    """The pieces of an image, as they lie in its manifest, sorted by patchwork."""

    def __init__(self, section: memoryview) -> None:
        self._section = section
        self._patchworks = section.cast("I")[5::6]
        self.count = self._patchworks[-1] + 1 if len(self._patchworks) else 0

    def pieces(self, patchwork: int) -> list[Piece]:
        """The pieces of a patchwork, by its number from 0; none when there is no such."""
        first = bisect_left(self._patchworks, patchwork)
        last = bisect_left(self._patchworks, patchwork + 1, first)
        return [
            Piece(*PIECE_RECORD.unpack_from(self._section, at * PIECE_RECORD.size)[:3])
            for at in range(first, last)
        ]


def encode_pieces(patchworks: Iterable[Iterable[Piece]]) -> bytes:
    """The section for patchworks 0, 1, 2 …"""
    return b"".join(
        PIECE_RECORD.pack(*piece, number)
        for number, pieces in enumerate(patchworks)
        for piece in pieces
    )


def mask_of(pieces: Iterable[Piece]) -> int:
    """The pages of a patchwork; ValueError unless each comes from one piece, which holds it."""
    mask = 0
    for held, taken, _ in pieces:
        if not taken or taken & ~held or taken & mask:
            raise ValueError("pieces overlap, or take what they do not hold")
        mask |= taken
    return mask


def place(mask: int, piece: Piece, content: memoryview, into: memoryview) -> None:
    """Copy what `piece` takes of its chunk's `content` to where the pages `mask` have it."""
    held, taken, _ = piece
    while taken:
        low = taken & -taken
        run = ~(taken // low) & (taken // low + 1)  # 1 << how many pages follow one another
        source = (held & (low - 1)).bit_count() * PAGE_BYTES
        target = (mask & (low - 1)).bit_count() * PAGE_BYTES
        length_bytes = (run.bit_length() - 1) * PAGE_BYTES
        into[target : target + length_bytes] = content[source : source + length_bytes]
        taken &= ~(low * (run - 1))


def renew(pieces: list[Piece], kept: int) -> list[Piece]:
    """What is left of a window's pieces when only the pages `kept` still hold."""
    return [Piece(held, taken & kept, chunk) for held, taken, chunk in pieces if taken & kept]


def is_worth_it(kept: list[Piece], fresh: int, spare: int = 0) -> bool:
    """Whether to keep these pieces and add one of the pages `fresh`, not store the window anew.

    Room for `spare` pieces more is to be left.

    Bounds both what a reader has to read (pieces) and what the store keeps for nothing: pages that
    chunks hold and nobody takes are never more than those that are taken.
    """
    if not kept:
        return False
    taken = fresh.bit_count() + sum(piece.taken.bit_count() for piece in kept)
    held = fresh.bit_count() + sum(piece.held.bit_count() for piece in kept)
    return len(kept) + bool(fresh) + spare <= MOST_PIECES and held <= 2 * taken
