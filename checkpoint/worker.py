"""One worker of a dump: it reads batches of pages and stores what is new in them, verified.

A worker owns a buffer, an encoder, a decoder and a pack, and shares only tables and the list of
pending packs with the others; all that takes long happens without the GIL.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .buffers import page_aligned
from .codec import RAW, ZSTD, Decoder, Encoder, PlainEncoder
from .errors import Damaged, LzyError
from .keys import StoreKeys, keyed_digest
from .known import KnownChunks
from .linux import PAGE_BYTES
from .packs import PackFiles, PackWriter, Stored, read_index
from .pages import first_words, page_runs, present_pages, zero_pages
from .pending import PendingPacks
from .tables import ImageTables
from .unavailable import unavailable


class PageSource(Protocol):
    """Where memory is read from; called from several threads at once."""

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fill `into` with the (address, length in bytes) runs, one after the other, or raise."""


class Batch(NamedTuple):
    """Windows of one space that are read in one go: (address, mask) each, so many bytes in all."""

    number: int
    space: int
    source: PageSource
    windows: list[tuple[int, int]]
    length_bytes: int


class Shared(NamedTuple):
    """What the workers of one writer share."""

    keys: StoreKeys
    tables: ImageTables
    pending: PendingPacks
    known: KnownChunks
    existing: PackFiles


class _New(NamedTuple):
    """A chunk to be stored: its number and id, and its content, as it is and encoded."""

    number: int
    content_id: bytes
    content: bytes | memoryview
    encoding: int
    blob: bytes | memoryview


class Worker:
    """Reads batches of at most `batch_bytes` and stores them; used by one thread.

    `plain`: it will be so little that trying encodings would take longer than it gains.
    """

    def __init__(
        self, shared: Shared, *, window_pages: int, batch_bytes: int, plain: bool = False
    ) -> None:
        window_bytes = self._window_bytes = window_pages * PAGE_BYTES
        self._shared = shared
        self._chunk_key = shared.keys.chunk
        self._encoder = PlainEncoder() if plain else Encoder()
        self._decoder = Decoder()
        self._buffer, self._start, self._view = page_aligned(batch_bytes)
        self._readback_bytes, self._readback_start, self._readback = page_aligned(window_bytes)
        self._content_bytes = bytearray()
        self._pack: PackWriter | None = None

    def store(self, batch: Batch) -> None:
        """Read one batch and store what is new in it.

        Raises what the source raises, Damaged, and StoreUnavailable or AccessDenied.
        """
        tables = self._shared.tables
        view = self._view[: batch.length_bytes]
        batch.source.read_runs(page_runs(batch.windows), view)
        words = first_words(view)
        runs = array("Q")
        new: list[_New] = []
        owner = batch.space << 32
        page = zero_bytes = repeated_bytes = reused_bytes = 0
        for address, mask in batch.windows:
            pages = mask.bit_count()
            first = page * PAGE_BYTES
            length_bytes = pages * PAGE_BYTES
            zeros = zero_pages(self._buffer, self._start + first, words[page : page + pages])
            page += pages
            content: bytes | memoryview
            if zeros is False:
                content = view[first : first + length_bytes]
            elif zeros is True:
                zero_bytes += length_bytes
                continue
            else:
                mask, content = _drop(zeros, mask, view[first : first + length_bytes])
                zero_bytes += length_bytes - len(content)
            content_id = keyed_digest(self._chunk_key, content)
            number, ours = tables.number_chunk(content_id)
            runs.extend((address, mask, number | owner))
            if not ours:
                repeated_bytes += len(content)
                continue
            if (known := self._reuse(number, content_id, len(content))) is not None:
                reused_bytes += known
                continue
            new.append(_New(number, content_id, content, *self._encoder.encode(content)))
        tables.record_batch(
            batch.number,
            runs.tobytes(),
            raw_bytes=batch.length_bytes,
            zero_bytes=zero_bytes,
            repeated_bytes=repeated_bytes,
            reused_bytes=reused_bytes,
            stored_bytes=self._append(new) if new else 0,
        )

    def _reuse(self, number: int, content_id: bytes, length_bytes: int) -> int | None:
        """Use what the store has of this content, if it has it and it is sound."""
        shared = self._shared
        found = shared.known.find(content_id)
        if found is None:
            return None
        place = found.place
        try:
            file = shared.existing.open(found.pack)
            blob = os.pread(file.descriptor, place.stored_bytes, place.offset)
            if place.raw_bytes != length_bytes or not self._sound(content_id, place, blob):
                return None
        except (OSError, LzyError):
            return None  # rotten or gone: the content in hand is stored anew
        shared.tables.record_chunk(number, content_id, found.pack, place)
        shared.tables.record_pack(found.pack, found.length_bytes, found.chunk_count)
        return place.stored_bytes

    def _append(self, new: list[_New]) -> int:
        """Append chunks to the pack in hand, check and record them; stored bytes in all."""
        shared = self._shared
        try:
            pack = self._pack
            if pack is None:
                pack = self._pack = shared.pending.begin()
            places = pack.append(
                [
                    (chunk.content_id, chunk.encoding, len(chunk.content), chunk.blob)
                    for chunk in new
                ]
            )
            self._check_written(pack, new, places)
        except OSError as error:
            raise unavailable("write a pack", error) from error
        stored_bytes = 0
        for chunk, place in zip(new, places, strict=True):
            shared.tables.record_chunk(chunk.number, chunk.content_id, pack.pack, place)
            stored_bytes += place.stored_bytes
        if pack.full:
            self.finish_pack()
        return stored_bytes

    def finish_pack(self) -> None:
        """Finish the pack in hand, read its index back, and leave it to be published."""
        pack = self._pack
        if pack is None:
            return
        try:
            pack.finish()
            index = read_index(pack.descriptor, pack.pack, self._shared.keys)
            if index.ids != b"".join(pack.ids):
                raise Damaged(f"the index of pack {pack.name} reads back differently")
            pack.forget()
            self._shared.tables.record_pack(pack.pack, pack.length_bytes, len(index))
            self._pack = None
            self._shared.pending.add(pack)
        except OSError as error:
            raise unavailable("write a pack", error) from error

    def _check_written(
        self, pack: PackWriter, new: Sequence[_New], places: Sequence[Stored]
    ) -> None:
        """Read what was just written back through the kernel, decode it and compare all of it.

        The content is still in hand, and in the cache: comparing costs a fifth of hashing again.
        """
        start = end = places[0].offset  # what of the pack is in the buffer
        for (_, _, content, _, _), place in zip(new, places, strict=True):
            if place.offset + place.stored_bytes > end:
                start = place.offset
                length_bytes = min(len(self._readback), pack.length_bytes - start)
                end = start + os.preadv(pack.descriptor, (self._readback[:length_bytes],), start)
                if place.stored_bytes > end - start:
                    raise Damaged(f"pack {pack.name} reads back {end} of {pack.length_bytes} bytes")
            at = place.offset - start
            blob = self._readback[at : at + place.stored_bytes]
            if place.encoding == RAW:
                same = self._readback_bytes.startswith(content, self._readback_start + at)
            elif place.encoding == ZSTD:  # compared where it is, without another copy
                same = self._decoder.decompress(blob, place.raw_bytes).startswith(content)
            else:
                self._decode(place, blob)
                same = self._content_bytes.startswith(content)
            if not same:
                raise Damaged(f"pack {pack.name} reads back differently at offset {place.offset}")

    def _sound(self, content_id: bytes, place: Stored, blob: bytes | memoryview) -> bool:
        """Whether stored bytes give the content with that id. Damaged if they give none."""
        content: bytes | memoryview = blob
        if place.encoding != RAW:
            content = self._decode(place, blob)
        return keyed_digest(self._chunk_key, content) == content_id

    def _decode(self, place: Stored, blob: bytes | memoryview) -> memoryview:
        """The content, in a buffer that is made when it is first needed."""
        if not self._content_bytes:
            self._content_bytes = bytearray(self._window_bytes)
        content = memoryview(self._content_bytes)[: place.raw_bytes]
        self._decoder.decode(place.encoding, blob, content)
        return content

    def close(self) -> None:
        """Let go of a pack that was not finished."""
        if self._pack is not None:
            self._pack.close()
            self._pack = None


def _drop(zeros: Sequence[bool], mask: int, content: memoryview) -> tuple[int, bytes]:
    """(mask, content) of a window without its zero pages."""
    kept = []
    for number, (bit, zero) in enumerate(zip(present_pages(mask), zeros, strict=True)):
        if zero:
            mask ^= 1 << bit
        else:
            kept.append(content[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
    return mask, b"".join(kept)
