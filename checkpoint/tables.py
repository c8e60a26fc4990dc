"""The tables of an image that is being written: its chunks, packs and runs, numbered as they come.

Kept packed, for they are what grows with a session: about 220 bytes for each chunk, most of it the
dictionary that finds a repeated content again.
"""

from __future__ import annotations

import itertools
import struct
import sys
import threading
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from .image import CHUNK_MASK, CHUNK_RECORD, encode_pack
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
        self._adopted: dict[
            int, int
        ] = {}  # the first 8 bytes of an id: made in a fifth of the time
        self._records = bytearray()
        self._recorded = 0
        self._packs: dict[bytes, int] = {}
        self._pack_sizes: list[tuple[int, int]] = []
        self._runs: dict[int, bytes] = {}
        self._kept: dict[int, tuple[array[int], dict[int, list[Piece]]]] = {}

    def number_chunk(self, content_id: bytes) -> tuple[int, bool]:
        """The number of a content, and whether it is new here and now the caller's to store."""
        number = self._numbers.get(content_id)
        if number is None:
            number = self._find_adopted(content_id)
        if number is not None:
            return number, False
        with self._lock:
            number = self._numbers.setdefault(content_id, self.chunk_count)
            new = number == self.chunk_count
            if new:
                self.chunk_count += 1
                self._records.extend(_EMPTY_RECORD)
        return number, new

    def _find_adopted(self, content_id: bytes) -> int | None:
        number = self._adopted.get(int.from_bytes(content_id[:8], sys.byteorder))
        if number is None:
            return None
        place = number * CHUNK_RECORD.size
        return number if self._records[place : place + len(content_id)] == content_id else None

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
            if self._numbers or self._adopted:
                ids = _ids(_copy_records(base, _stretches(taken)))
                for number, content_id in zip(taken, ids, strict=True):
                    ours = self._numbers.get(content_id)
                    if ours is None:
                        ours = self._find_adopted(content_id)
                    if ours is not None:
                        here[number] = ours
                taken = [number for number in taken if number not in here]
            stretches = _stretches(taken)
            records = _copy_records(base, stretches)
            self._renumber_packs(records, base)
            first = self.chunk_count
            self._records += records
            self._recorded += len(taken)
            self.chunk_count += len(taken)
            self._adopted.update(zip(_heads(records), range(first, self.chunk_count), strict=True))
        stored_bytes = sum(_column(records, _SIZE_AT))
        if not first and not here and taken[-1:] in ([], [len(taken) - 1]):
            return None, stored_bytes
        numbers = [-1] * base.chunk_count
        for begin, end in stretches:
            numbers[begin:end] = range(first, first + end - begin)
            first += end - begin
        for number, ours in here.items():
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
        if any(number != mine for number, mine in ours.items()):
            renamed = array("I", [ours[number] for number in named])
            with memoryview(records) as view, view.cast("I") as words:
                words[_PACK_AT :: CHUNK_RECORD.size // 4] = memoryview(renamed)

    def keep(self, space: int, runs: array[int], patchworks: dict[int, list[Piece]]) -> None:
        """Take pages of windows of a space from chunks that are here already.

        `runs`: records of windows that are one chunk each, by address; `patchworks`, {window
        address: pieces}: others. Each window is in one of them at most.
        """
        self._kept[space] = runs, patchworks

    def set_aside(self) -> tuple[array[int], list[list[Piece]]]:
        """Take out what was recorded and kept of space 0: (records by address, patchworks).

        A window of several chunks has as its chunk's number that of its patchwork, the first of
        which is behind all chunks there are. The chunks stay, and so do the counts until
        `count_as`: what is used is to be kept.
        """
        fresh: dict[int, tuple[int, int]] = {}
        joined = array("Q")
        patchworks: list[list[Piece]] = []
        with self._lock:
            for number, records in list(self._runs.items()):  # a batch is of one space
                rows = list(struct.iter_unpack("<QQQ", records))
                if rows and rows[0][2] >> 32 == 0:
                    fresh.update((address, (mask, chunk)) for address, mask, chunk in rows)
                    del self._runs[number]
            self._join_space(0, fresh, joined, patchworks)
            self._kept.pop(0, None)
        return joined, patchworks

    @property
    def counted(self) -> tuple[int, int, int]:
        """How much was read so far: bytes, of zeros, repeated."""
        return self.raw_bytes, self.zero_bytes, self.repeated_bytes

    def count_as(self, before: tuple[int, int, int]) -> None:
        """No more than `before` was read, as nothing of the rest stands; what was stored was."""
        with self._lock:
            self.raw_bytes, self.zero_bytes, self.repeated_bytes = before

    def encode_runs(self, *, ordered: bool) -> tuple[bytes, bytes]:
        """The run table and the pieces; call it last, when all chunks have their numbers.

        The batches were `ordered` by (space, address), or are sorted now. ValueError when a window
        was given twice.
        """
        runs = b"".join(self._runs[number] for number in sorted(self._runs))
        if ordered and not self._kept:
            return runs, b""
        records = sorted(struct.iter_unpack("<QQQ", runs), key=lambda run: (run[2] >> 32, run[0]))
        last = (-1, -1)
        for address, _, owner in records:
            if (owner >> 32, address) == last:
                raise _given_twice(address, owner >> 32)
            last = (owner >> 32, address)
        if self._kept:
            return self._join(records)
        return array("Q", itertools.chain.from_iterable(records)).tobytes(), b""

    def _join(self, records: list[Run]) -> tuple[bytes, bytes]:
        """Put what was kept and what was written together."""
        fresh: dict[int, dict[int, tuple[int, int]]] = {}
        for address, mask, owner in records:
            fresh.setdefault(owner >> 32, {})[address] = mask, owner & CHUNK_MASK
        joined = array("Q")
        patchworks: list[list[Piece]] = []
        for space in sorted(fresh.keys() | self._kept.keys()):
            self._join_space(space, fresh.get(space, {}), joined, patchworks)
        return joined.tobytes(), encode_pieces(patchworks)

    def _join_space(
        self,
        space: int,
        fresh: dict[int, tuple[int, int]],
        joined: array[int],
        patchworks: list[list[Piece]],
    ) -> None:
        kept, kept_pieces = self._kept.get(space) or (array("Q"), {})
        addresses = kept[0::3]
        at = 0
        for address in sorted(fresh.keys() | kept_pieces.keys()):
            before, at = at, bisect_left(addresses, address, at)
            if at < len(addresses) and addresses[at] == address:
                raise _given_twice(address, space)
            joined.extend(kept[3 * before : 3 * at])
            pieces = list(kept_pieces.get(address, ()))
            if address in fresh:
                mask, chunk = fresh[address]
                pieces.append(Piece(mask, mask, chunk))
            mask = sum([piece.taken for piece in pieces])
            chunk = pieces[0].chunk
            if len(pieces) > 1 or pieces[0].held != mask:
                chunk = self.chunk_count + len(patchworks)
                patchworks.append(pieces)
            joined.extend((address, mask, space << 32 | chunk))
        joined.extend(kept[3 * at :])


def _given_twice(address: int, space: int) -> ValueError:
    return ValueError(f"window {address:#x} of space {space} was given twice")


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last) of what follows one another in ascending numbers: looks only at the gaps."""
    if not numbers:
        return []
    first, end = numbers[0], numbers[-1] + 1
    gaps = sorted(set(range(first, end)).difference(numbers)) if end - first > len(numbers) else []
    found = []
    for gap in gaps:
        if first < gap:
            found.append((first, gap))
        first = gap + 1
    found.append((first, end))
    return found


def _copy_records(base: Image, stretches: Iterable[tuple[int, int]]) -> bytearray:
    """The records of the chunks with these numbers, one behind the other."""
    section, size = base.chunk_records, CHUNK_RECORD.size
    return bytearray().join(section[first * size : last * size] for first, last in stretches)


def _ids(records: bytearray) -> list[bytes]:
    return [content_id for (content_id,) in _ID.iter_unpack(records)]


def _heads(records: bytearray) -> list[int]:
    """The first 8 bytes of each record's id."""
    with memoryview(records) as view, view.cast("Q") as words:
        return words[:: CHUNK_RECORD.size // 8].tolist()


def _column(records: bytearray, word: int) -> list[int]:
    """One field of every record, by its place among the record's words of 32 bits."""
    with memoryview(records) as view, view.cast("I") as words:
        return words[word :: CHUNK_RECORD.size // 4].tolist()
