"""The tables of an image that is being written: its chunks, packs and runs, numbered as they come.

Kept packed, for they are what grows with a session: about 220 bytes for each chunk, most of it the
dictionary that finds a repeated content again.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .image import CHUNK_RECORD, encode_pack
from .packs import Stored
from .patchwork import Piece, encode_pieces

if TYPE_CHECKING:
    from .image import Image

_EMPTY_RECORD = bytes(CHUNK_RECORD.size)


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

    def adopt(self, base: Image, chunks: Iterable[int]) -> tuple[dict[int, int], int]:
        """Take chunks of `base` as they are stored: ({its number: ours}, stored bytes in all)."""
        numbers: dict[int, int] = {}
        packs: dict[int, bytes] = {}
        section, size = base.chunk_records, CHUNK_RECORD.size
        adopted_bytes = 0
        with self._lock:
            for chunk in chunks:
                record = section[chunk * size : (chunk + 1) * size]
                content_id = bytes(record[:32])
                number = self._numbers.get(content_id)
                if number is None:
                    number = self._numbers[content_id] = self.chunk_count
                    self.chunk_count += 1
                    self._recorded += 1
                    theirs = int.from_bytes(record[32:36], "little")
                    if theirs not in packs:
                        packs[theirs] = self._adopt_pack(base, theirs)
                    self._records += content_id
                    self._records += packs[theirs]
                    self._records += record[36:]
                    adopted_bytes += int.from_bytes(record[36:40], "little")
                numbers[chunk] = number
        return numbers, adopted_bytes

    def _adopt_pack(self, base: Image, number: int) -> bytes:
        pack, length_bytes = base.packs[number]
        ours = self._packs.setdefault(pack, len(self._pack_sizes))
        if ours == len(self._pack_sizes):
            self._pack_sizes.append((length_bytes, base.pack_chunk_counts[number]))
        return ours.to_bytes(4, "little")

    def keep(self, whole: dict[int, tuple[int, int]], patchworks: dict[int, list[Piece]]) -> None:
        """Take pages of windows of space 0 from chunks that are here already.

        `whole`: {window address: (mask, chunk)}; `patchworks`: what consists of pieces of chunks.
        """
        self._kept_whole.update(whole)
        self._kept.update(patchworks)

    def encode_runs(self, *, ordered: bool) -> tuple[bytes, bytes]:
        """The run table and the pieces; call it last, when all chunks have their numbers.

        The batches were `ordered` by (space, address), or are sorted now. ValueError when a window
        was given twice.
        """
        runs = b"".join(self._runs[number] for number in sorted(self._runs))
        if ordered and not self._kept and not self._kept_whole:
            return runs, b""
        records = sorted(struct.iter_unpack("<QQQ", runs), key=lambda run: (run[2] >> 32, run[0]))
        last = (-1, -1)
        for address, _, owner in records:
            if (owner >> 32, address) == last:
                raise ValueError(f"window {address:#x} of space {owner >> 32} was given twice")
            last = (owner >> 32, address)
        if not self._kept and not self._kept_whole:
            return b"".join(struct.pack("<QQQ", *record) for record in records), b""
        words, pieces = self._join(records)
        return words.tobytes(), pieces

    def _join(self, records: list[Any]) -> tuple[array[int], bytes]:
        """Put what was kept and what was written of the windows of space 0 together."""
        fresh = {address: (mask, chunk) for address, mask, chunk in records if not chunk >> 32}
        whole, kept = self._kept_whole, self._kept
        joined = array("Q")
        patchworks: list[list[Piece]] = []
        for address in sorted(fresh.keys() | whole.keys() | kept.keys()):
            if address in whole and address not in fresh:
                joined.extend((address, *whole[address]))
                continue
            pieces = list(kept.get(address, ()))
            for mask, chunk in filter(None, (whole.get(address), fresh.get(address))):
                pieces.append(Piece(mask, mask, chunk))
            mask = sum(piece.taken for piece in pieces)
            if len(pieces) == 1 and pieces[0].held == mask:
                joined.extend((address, mask, pieces[0].chunk))
            else:
                joined.extend((address, mask, self.chunk_count + len(patchworks)))
                patchworks.append(pieces)
        for record in records:
            if record[2] >> 32:
                joined.extend(record)
        return joined, encode_pieces(patchworks)
