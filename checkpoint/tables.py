"""The tables of an image that is being written: its chunks, packs and runs, numbered as they come.

Kept packed, for they are what grows with a session: about 220 bytes for each chunk, most of it the
dictionary that finds a repeated content again.
"""

from __future__ import annotations

import itertools
import struct
import threading
from array import array
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from .image import CHUNK_RECORD, encode_pack
from .packs import Stored
from .patchwork import Piece, encode_pieces

if TYPE_CHECKING:
    from .image import Image

_EMPTY_RECORD = bytes(CHUNK_RECORD.size)
_ID = struct.Struct(f"32s{CHUNK_RECORD.size - 32}x")
_PACK_AT, _SIZE_AT = 8, 9  # of a record's words of 32 bits: number of the pack, stored bytes

Run = tuple[int, ...]
"""(address, mask, space and chunk), as a run record has them"""


class ImageTables:
    """What the workers of one writer have in common. Every method may be called from any thread.

    *Locks:* `_lock` guards it all and is never held during input or output. Counters may be read
    without it.
    """

    def __init__(self) -> None:
        self.raw_bytes = 0
        self.zero_bytes = 0
        self.repeated_bytes = 0
        self.reused_bytes = 0
        self.stored_bytes = 0
        self.chunk_count = 0
        self._lock = threading.Lock()
        self._numbers: dict[bytes, int] = {}
        self._records = bytearray()
        self._recorded = 0
        self._packs: dict[bytes, int] = {}
        self._pack_sizes: list[tuple[int, int]] = []
        self._runs: dict[int, bytes] = {}
        self._kept: dict[int, list[Piece]] = {}
        self._kept_whole: dict[int, tuple[int, int]] = {}

    def number_chunk(self, content_id: bytes) -> tuple[int, bool]:
        """The number of a content, and whether it is new here and now the caller's to store."""
        number = self._numbers.get(content_id)
        if number is not None:
            return number, False
        with self._lock:
            number = self._numbers.setdefault(content_id, self.chunk_count)
            new = number == self.chunk_count
            if new:
                self.chunk_count += 1
                self._records.extend(_EMPTY_RECORD)
        return number, new

    def record_chunk(self, number: int, content_id: bytes, pack: bytes, place: Stored) -> None:
        """Say where the chunk of that number lies."""
        with self._lock:
            pack_number = self._packs.setdefault(pack, len(self._pack_sizes))
            if pack_number == len(self._pack_sizes):
                self._pack_sizes.append((0, 0))
            self._recorded += 1
            CHUNK_RECORD.pack_into(
                self._records,
                number * CHUNK_RECORD.size,
                content_id,
                pack_number,
                place.stored_bytes,
                place.offset,
                place.raw_bytes,
                place.encoding,
            )

    def record_pack(self, pack: bytes, length_bytes: int, chunk_count: int) -> None:
        """Say how large a pack is that chunks were recorded in."""
        with self._lock:
            self._pack_sizes[self._packs[pack]] = (length_bytes, chunk_count)

    def record_batch(
        self,
        number: int,
        runs: bytes,
        *,
        raw_bytes: int,
        zero_bytes: int,
        repeated_bytes: int,
        reused_bytes: int,
        stored_bytes: int,
    ) -> None:
        """Add the run records of one batch, and what it was made of, in bytes."""
        with self._lock:
            self._runs[number] = runs
            self.raw_bytes += raw_bytes
            self.zero_bytes += zero_bytes
            self.repeated_bytes += repeated_bytes
            self.reused_bytes += reused_bytes
            self.stored_bytes += stored_bytes

    def encode_chunks(self) -> bytearray:
        """The chunk table; ValueError should a chunk have been numbered and never stored."""
        if self._recorded != self.chunk_count:
            raise ValueError(f"{self.chunk_count - self._recorded} chunks were never stored")
        return self._records

    def encode_packs(self) -> bytes:
        """The pack list, in the order of the packs' numbers (that of the dictionary)."""
        return b"".join(
            encode_pack(pack, *self._pack_sizes[number]) for pack, number in self._packs.items()
        )

    def adopt(self, base: Image, chunks: Collection[int]) -> tuple[Sequence[int] | None, int]:
        """Take chunks of `base` as they are stored; (ours of each of its numbers, stored bytes).

        None means that they keep their numbers. Records that lie in one row in the table of `base`
        are copied in one go: what is to be done for each of them takes its time.
        """
        taken = sorted(chunks)
        with self._lock:
            here: dict[int, int] = {}
            if self._numbers:
                ids = _ids(_copy_records(base, taken))
                here = {
                    number: self._numbers[content_id]
                    for number, content_id in zip(taken, ids, strict=True)
                    if content_id in self._numbers
                }
                taken = [number for number in taken if number not in here]
            records = _copy_records(base, taken)
            self._renumber_packs(records, base)
            first = self.chunk_count
            self._records += records
            self._recorded += len(taken)
            self.chunk_count += len(taken)
            self._numbers.update(zip(_ids(records), range(first, self.chunk_count), strict=True))
        stored_bytes = sum(_column(records, _SIZE_AT))
        if not first and not here and taken[-1:] in ([], [len(taken) - 1]):
            return None, stored_bytes
        numbers = [-1] * base.chunk_count
        for number, ours in itertools.chain(zip(taken, itertools.count(first)), here.items()):
            numbers[number] = ours
        return numbers, stored_bytes

    def _renumber_packs(self, records: bytearray, base: Image) -> None:
        """List the packs that records of `base` name, and have these name them by our numbers."""
        ours: dict[int, int] = {}
        named = _column(records, _PACK_AT)
        for number in sorted(set(named)):
            pack, length_bytes = base.packs[number]
            ours[number] = self._packs.setdefault(pack, len(self._pack_sizes))
            if ours[number] == len(self._pack_sizes):
                self._pack_sizes.append((length_bytes, base.pack_chunk_counts[number]))
        moved = {number for number, mine in ours.items() if mine != number}
        if moved:
            for at, number in enumerate(named):
                if number in moved:
                    place = at * CHUNK_RECORD.size + 4 * _PACK_AT
                    records[place : place + 4] = ours[number].to_bytes(4, "little")

    def keep(self, whole: dict[int, tuple[int, int]], patchworks: dict[int, list[Piece]]) -> None:
        """Take pages of windows of space 0 from chunks that are here already.

        `whole`: {window address: (mask, chunk)}; `patchworks`: what consists of pieces of chunks.
        """
        self._kept_whole.update(whole)
        self._kept.update(patchworks)

    def fresh_contents(self) -> dict[int, tuple[int, bytes]]:
        """{window address: (mask, id of the content)} of what was read of space 0."""
        size = CHUNK_RECORD.size
        found = {}
        for runs in self._runs.values():
            for address, mask, chunk in struct.iter_unpack("<QQQ", runs):
                if not chunk >> 32:
                    found[address] = mask, bytes(self._records[chunk * size : chunk * size + 32])
        return found

    def encode_runs(self, *, ordered: bool) -> tuple[bytes, bytes]:
        """The run table and the pieces; call it last, when all chunks have their numbers.

        The batches were `ordered` by (space, address), or are sorted now. ValueError when a window
        was given twice.
        """
        runs = b"".join(self._runs[number] for number in sorted(self._runs))
        joins = bool(self._kept or self._kept_whole)
        if ordered and not joins:
            return runs, b""
        records = sorted(struct.iter_unpack("<QQQ", runs), key=lambda run: (run[2] >> 32, run[0]))
        last = (-1, -1)
        for address, _, owner in records:
            if (owner >> 32, address) == last:
                raise ValueError(f"window {address:#x} of space {owner >> 32} was given twice")
            last = (owner >> 32, address)
        pieces = b""
        if joins:
            records, pieces = self._join(records)
        return array("Q", itertools.chain.from_iterable(records)).tobytes(), pieces

    def _join(self, records: list[Run]) -> tuple[list[Run], bytes]:
        """Put what was kept and what was written of the windows of space 0 together."""
        fresh = {address: (mask, chunk) for address, mask, chunk in records if not chunk >> 32}
        whole, kept = self._kept_whole, self._kept
        joined: list[Run] = [
            (address, *run) for address, run in whole.items() if address not in fresh
        ]
        patchworks: list[list[Piece]] = []
        for address in sorted(fresh.keys() | kept.keys()):
            pieces = list(kept.get(address, ()))
            for mask, chunk in filter(None, (whole.get(address), fresh.get(address))):
                pieces.append(Piece(mask, mask, chunk))
            mask = sum(piece.taken for piece in pieces)
            if len(pieces) == 1 and pieces[0].held == mask:
                joined.append((address, mask, pieces[0].chunk))
            else:
                joined.append((address, mask, self.chunk_count + len(patchworks)))
                patchworks.append(pieces)
        joined.sort()
        joined += [record for record in records if record[2] >> 32]
        return joined, encode_pieces(patchworks)


def _copy_records(base: Image, chunks: Sequence[int]) -> bytearray:
    """The records of ascending numbers, one behind the other."""
    section, size = base.chunk_records, CHUNK_RECORD.size
    records = bytearray()
    begin = 0
    for at in range(1, len(chunks) + 1):
        if at == len(chunks) or chunks[at] != chunks[at - 1] + 1:
            records += section[chunks[begin] * size : (chunks[at - 1] + 1) * size]
            begin = at
    return records


def _ids(records: bytearray) -> list[bytes]:
    return [content_id for (content_id,) in _ID.iter_unpack(records)]


def _column(records: bytearray, word: int) -> list[int]:
    """One field of every record, by its place among the record's words of 32 bits."""
    with memoryview(records) as view, view.cast("I") as words:
        return words[word :: CHUNK_RECORD.size // 4].tolist()
