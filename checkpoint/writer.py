"""Writing an image: memory in, deduplicated and verified packs and at last a manifest out.

The way of the data. The caller's thread cuts the windows into batches of a megabyte and queues
them (a bounded queue, so reading never runs ahead of the disk). Each worker owns a buffer, an
encoder and a pack: it reads a batch, drops pages of zeros, hashes each window, asks whether the
content is known, encodes what is not, and appends it to its pack. What was appended is read back
at once, decoded and compared, while the disk still writes it and the other worker reads on. What
the store already had is verified at the moment it is found: were it rotten, the content in hand
replaces it.

*Guarantees:* nothing is visible before `commit` has everything on disk and links the manifest.
Whatever kills the writer leaves files under `tmp/` and perhaps packs no manifest names; both are
garbage that the next collection removes.

*Locks:* `_lock` guards the tables of this writer and is never held during input or output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .codec import RAW, ZSTD, Decoder, Encoder
from .errors import Busy, Damaged, LzyError, StoreUnavailable
from .image import (
    CHUNK_RECORD,
    HEADER_BYTES,
    Header,
    Image,
    encode_document,
    encode_manifest,
    encode_pack,
    parse_header,
)
from .keys import StoreKeys, keyed_digest
from .linux import PAGE_BYTES
from .packs import PackFiles, PackWriter, Stored, read_index
from .pages import MOST_WINDOW_PAGES, first_words, page_runs, present_pages, zero_pages

if TYPE_CHECKING:
    from .known import KnownChunks
    from .store import ImageSummary, Store

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in total), at most about ten times a second."""

_BATCH_BYTES = 1 << 20
_PROGRESS_S = 0.1
_EMPTY_RECORD = bytes(CHUNK_RECORD.size)
_MOST_OPEN_PACKS = 32
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PageSource(Protocol):
    """Where memory is read from; called from several threads at once."""

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fill `into` with the (address, length in bytes) runs, one after the other, or raise."""


class _Batch(NamedTuple):
    number: int
    space: int
    source: PageSource
    windows: list[tuple[int, int]]
    length_bytes: int


def store_failure(doing: str, error: OSError) -> StoreUnavailable:
    """The error for a store that could not be written, saying what to do about it."""
    full = error.errno in _NO_SPACE
    return StoreUnavailable(
        f"cannot {doing}: {error.strerror}",
        remedy="make room there or name another --store" if full else "",
        errno=error.errno,
    )


class ImageWriter:
    """Writes one image; made by `Store.writer`. Leaving the context without `commit` discards it.

    `raw_bytes_done`, `zero_bytes`, `repeated_bytes`, `reused_bytes` and `stored_bytes` count from
    the start and may be read from any thread at any time.
    """

    def __init__(
        self, store: Store, name: str, *, window_pages: int, workers: int, reservation: int
    ) -> None:
        """`reservation`: descriptor of `tmp/NAME.image`, locked; owned from now on."""
        if not 1 <= window_pages <= MOST_WINDOW_PAGES or window_pages & (window_pages - 1):
            raise ValueError(
                f"a window has 1, 2, 4 … {MOST_WINDOW_PAGES} pages, not {window_pages}"
            )
        self.name = name
        self.window_pages = window_pages
        self.raw_bytes_done = 0
        self.zero_bytes = 0
        self.repeated_bytes = 0
        self.reused_bytes = 0
        self.stored_bytes = 0
        self._store = store
        self._keys: StoreKeys = store.keys
        self._reservation = reservation
        self._known: KnownChunks = store.known_chunks()
        self._existing = PackFiles(store.packs)
        self._lock = threading.Lock()
        self._chunk_numbers: dict[bytes, int] = {}
        self._chunk_table = bytearray()
        self._chunk_count = 0
        self._recorded = 0
        self._pack_numbers: dict[bytes, int] = {}
        self._pack_bytes: list[tuple[int, int]] = []
        self._runs: dict[int, bytes] = {}
        self._batches = 0
        self._last = (-1, -1)
        self._ordered = True
        self._finished: list[PackWriter] = []
        self._unsynced: deque[PackWriter] = deque()
        self._temporary: set[str] = set()
        self._failure: BaseException | None = None
        self._closed = False
        self._queue: queue.Queue[_Batch | None] = queue.Queue(maxsize=2 * workers)
        self._threads = [
            threading.Thread(target=self._work, name=f"lzy-store-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    # -- the caller's side

    def add_space(
        self, source: PageSource, windows: Iterable[tuple[int, int]], *, space: int
    ) -> None:
        """Read and store the pages of (window address, mask of present pages) `windows`.

        Addresses are multiples of the window's size; a window is given once per space. Blocks
        until all of it is read. Raises what `source` raised, StoreUnavailable, or ValueError.
        """
        if self._closed:
            raise ValueError(f"the writer of image {self.name} is closed")
        try:
            self._read_all(source, windows, space)
        except BaseException as error:
            # What is missing now would be missing from the image: nothing can be committed.
            self._failure = self._failure or error
            raise
        finally:
            self._queue.join()  # nobody reads from `source` after this
        self._raise_failure()

    def _read_all(self, source: PageSource, windows: Iterable[tuple[int, int]], space: int) -> None:
        if not 0 <= space < 1 << 32:
            raise ValueError(f"a space is a number below 2**32, not {space}")
        window_bytes = self.window_pages * PAGE_BYTES
        too_large = 1 << self.window_pages
        batch: list[tuple[int, int]] = []
        pages = 0
        batch_pages = _BATCH_BYTES // PAGE_BYTES
        for window in windows:
            address, mask = window
            if address % window_bytes or not 0 <= address < 1 << 64 or not 0 <= mask < too_large:
                raise ValueError(f"no window of {window_bytes} bytes: {address:#x}, {mask:#x}")
            if not mask:
                continue
            if (space, address) <= self._last:
                self._ordered = False
            self._last = (space, address)
            batch.append(window)
            pages += mask.bit_count()
            if pages >= batch_pages:
                self._put(_Batch(self._batches, space, source, batch, pages * PAGE_BYTES))
                batch, pages = [], 0
        if batch:
            self._put(_Batch(self._batches, space, source, batch, pages * PAGE_BYTES))

    def commit(self, document: dict[str, Any], progress: Progress | None = None) -> ImageSummary:
        """Make the image visible, once every byte of it is on disk and verified.

        Raises Damaged when what was read back differs, StoreUnavailable when the store cannot be
        written, Busy when the name was taken meanwhile; the image does not exist then.
        """
        if self._closed:
            raise ValueError(f"the writer of image {self.name} is closed")
        self._stop_workers()
        self._raise_failure()
        try:
            self._publish_packs(progress)
            manifest = self._manifest(document)
            self._write_manifest(manifest)
        except OSError as error:
            raise store_failure(f"write image {self.name}", error) from error
        from .store import ImageSummary

        self.close()
        return ImageSummary.of(parse_header(manifest[:HEADER_BYTES], self._keys, name=self.name))

    def close(self) -> None:
        """Stop, and remove what was not committed as far as possible. May be called again."""
        self._closed = True
        if self._failure is None:
            self._failure = LzyError(f"the writing of image {self.name} was given up")
        self._stop_workers()
        for pack in self._finished:
            pack.close()
        self._finished.clear()
        self._unsynced.clear()
        for temporary in self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._store.temporary)
        self._temporary.clear()
        if self._reservation >= 0:
            with contextlib.suppress(OSError):
                os.unlink(f"{self.name}.image", dir_fd=self._store.temporary)
            os.close(self._reservation)
            self._reservation = -1
            self._existing.close()
            self._store.release_writer(self)

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, batch: _Batch) -> None:
        self._raise_failure()
        self._batches += 1
        self._queue.put(batch)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _stop_workers(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    # -- the workers' side

    def _work(self) -> None:
        worker = _Worker(self)
        while True:
            batch = self._queue.get()
            try:
                if self._failure is None:
                    if batch is None:
                        worker.finish_pack()
                    else:
                        worker.store(batch)
            except BaseException as error:
                self._failure = self._failure or error  # raised again in the caller's thread
            finally:
                self._queue.task_done()
            if batch is None:
                worker.close()
                return

    def _number(self, content_id: bytes) -> tuple[int, bool]:
        """The chunk number of a content, and whether it is new here and now ours to store."""
        number = self._chunk_numbers.get(content_id)
        if number is not None:
            return number, False
        with self._lock:
            number = self._chunk_numbers.setdefault(content_id, self._chunk_count)
            new = number == self._chunk_count
            if new:
                self._chunk_count += 1
                self._chunk_table.extend(_EMPTY_RECORD)
        return number, new

    def _pack_number(self, pack: bytes) -> int:
        number = self._pack_numbers.get(pack)
        if number is None:
            with self._lock:
                number = self._pack_numbers.setdefault(pack, len(self._pack_bytes))
                if number == len(self._pack_bytes):
                    self._pack_bytes.append((0, 0))
        return number

    def _record(self, number: int, content_id: bytes, pack: int, place: Stored) -> None:
        with self._lock:
            self._recorded += 1
            CHUNK_RECORD.pack_into(
                self._chunk_table,
                number * CHUNK_RECORD.size,
                content_id,
                pack,
                place.stored_bytes,
                place.offset,
                place.raw_bytes,
                place.encoding,
            )

    # -- committing

    def _publish_packs(self, progress: Progress | None) -> None:
        """Every pack on disk, under its own name, and the name on disk."""
        total_bytes = sum(pack.length_bytes for pack in self._finished)
        done_bytes = 0
        told_s = 0.0
        for pack in self._finished:
            if progress is not None and time.monotonic() - told_s >= _PROGRESS_S:
                progress("sync", done_bytes, total_bytes)
                told_s = time.monotonic()
            if pack in self._unsynced:
                os.fsync(pack.descriptor)
                pack.close()
            done_bytes += pack.length_bytes
        os.fsync(self._store.temporary)
        for pack in self._finished:
            os.rename(
                pack.name,
                pack.name,
                src_dir_fd=self._store.temporary,
                dst_dir_fd=self._store.packs,
            )
            self._temporary.discard(pack.name)
        os.fsync(self._store.packs)

    def _sorted_runs(self) -> bytes:
        runs = b"".join(self._runs[number] for number in sorted(self._runs))
        if self._ordered:
            return runs
        records = sorted(struct.iter_unpack("<QQQ", runs), key=lambda run: (run[2] >> 32, run[0]))
        last = (-1, -1)
        for address, _, owner in records:
            if (owner >> 32, address) == last:
                raise ValueError(f"window {address:#x} of space {owner >> 32} was given twice")
            last = (owner >> 32, address)
        return b"".join(struct.pack("<QQQ", *record) for record in records)

    def _manifest(self, document: dict[str, Any]) -> bytes:
        stored_document, document_bytes = encode_document(document)
        if self._recorded != self._chunk_count:
            raise ValueError(f"{self._chunk_count - self._recorded} chunks were never stored")
        runs = self._sorted_runs()
        packs = [
            encode_pack(pack, *self._pack_bytes[number])
            for pack, number in self._pack_numbers.items()
        ]
        header = Header(
            name=self.name,
            store=self._store.identity,
            window_pages=self.window_pages,
            created_unix_ns=time.time_ns(),
            raw_bytes=self.raw_bytes_done,
            zero_bytes=self.zero_bytes,
            stored_bytes=self.stored_bytes,
            reused_bytes=self.reused_bytes,
            run_count=len(runs) // 24,
            chunk_count=self._chunk_count,
            pack_count=len(packs),
            document_stored_bytes=len(stored_document),
            document_bytes=document_bytes,
        )
        return encode_manifest(
            header,
            self._keys,
            runs=runs,
            chunks=self._chunk_table,
            packs=b"".join(packs),
            document=stored_document,
        )

    def _write_manifest(self, manifest: bytes) -> None:
        descriptor = self._reservation
        os.ftruncate(descriptor, 0)
        view = memoryview(manifest)
        written = 0
        while written < len(view):
            written += os.pwrite(descriptor, view[written : written + (64 << 20)], written)
        os.fsync(descriptor)
        found = b"".join(
            os.pread(descriptor, 64 << 20, offset) for offset in range(0, len(view), 64 << 20)
        )
        if found != manifest:
            raise Damaged(f"the manifest of image {self.name} reads back differently")
        Image(found, self._keys, -1, name=self.name)
        temporary = f"{self.name}.image"
        try:
            os.link(
                temporary,
                temporary,
                src_dir_fd=self._store.temporary,
                dst_dir_fd=self._store.manifests,
            )
        except FileExistsError as error:
            raise Busy(
                f"there is an image {self.name} already", remedy="choose another --name"
            ) from error
        try:
            os.fsync(self._store.manifests)
        except OSError:
            # Whether it would outlast a power failure is unknown: then it had better not be there.
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._store.manifests)
            raise


class _Worker:
    """One worker's own things: its buffer, encoder, decoder and pack."""

    def __init__(self, writer: ImageWriter) -> None:
        self._writer = writer
        window_bytes = writer.window_pages * PAGE_BYTES
        self._buffer = bytearray(_BATCH_BYTES + window_bytes)
        self._view = memoryview(self._buffer)
        self._window_bytes = window_bytes
        self._full_mask = (1 << writer.window_pages) - 1
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._chunk_key = writer._keys.chunk
        self._content_bytes = bytearray(window_bytes)
        self._content = memoryview(self._content_bytes)
        self._readback_bytes = bytearray(_BATCH_BYTES + window_bytes)
        self._readback = memoryview(self._readback_bytes)
        self._pack: PackWriter | None = None

    def store(self, batch: _Batch) -> None:
        """Read one batch and store what is new in it."""
        writer = self._writer
        view = self._view[: batch.length_bytes]
        batch.source.read_runs(page_runs(batch.windows), view)
        words = first_words(view)
        runs = array("Q")
        new: list[tuple[int, tuple[bytes, int, int, bytes | memoryview]]] = []
        contents: list[bytes | memoryview] = []
        owner = batch.space << 32
        page = zero_bytes = repeated_bytes = reused_bytes = 0
        for address, mask in batch.windows:
            pages = mask.bit_count()
            first = page * PAGE_BYTES
            length_bytes = pages * PAGE_BYTES
            zeros = zero_pages(self._buffer, first, words[page : page + pages])
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
            number, ours = writer._number(content_id)
            runs.extend((address, mask, number | owner))
            if not ours:
                repeated_bytes += len(content)
                continue
            if (known := self._reuse(number, content_id, len(content))) is not None:
                reused_bytes += known
                continue
            encoding, blob = self._encoder.encode(content)
            new.append((number, (content_id, encoding, len(content), blob)))
            contents.append(content)
        writer._runs[batch.number] = runs.tobytes()
        stored_bytes = self._append(new, contents) if new else 0
        with writer._lock:
            writer.raw_bytes_done += batch.length_bytes
            writer.zero_bytes += zero_bytes
            writer.repeated_bytes += repeated_bytes
            writer.reused_bytes += reused_bytes
            writer.stored_bytes += stored_bytes

    def _reuse(self, number: int, content_id: bytes, length_bytes: int) -> int | None:
        """Use what the store has of this content, if it has it and it is sound."""
        writer = self._writer
        found = writer._known.find(content_id)
        if found is None:
            return None
        pack, place = found
        try:
            file = writer._existing.open(pack.pack)
            blob = os.pread(file.descriptor, place.stored_bytes, place.offset)
            if place.raw_bytes != length_bytes or not self._sound(content_id, place, blob):
                return None
        except (OSError, LzyError):
            return None  # rotten or gone: the content in hand is stored anew
        pack_number = writer._pack_number(pack.pack)
        writer._pack_bytes[pack_number] = (pack.length_bytes, len(pack))
        writer._record(number, content_id, pack_number, place)
        return place.stored_bytes

    def _append(
        self,
        new: list[tuple[int, tuple[bytes, int, int, bytes | memoryview]]],
        contents: list[bytes | memoryview],
    ) -> int:
        writer = self._writer
        try:
            pack = self._pack
            if pack is None:
                pack = self._pack = PackWriter(writer._store.temporary, writer._keys)
                writer._temporary.add(pack.name)
            places = pack.append([chunk for _, chunk in new])
            self._check_written(pack, contents, places)
        except OSError as error:
            raise store_failure("write a pack", error) from error
        pack_number = writer._pack_number(pack.pack)
        stored_bytes = 0
        for (number, chunk), place in zip(new, places, strict=True):
            writer._record(number, chunk[0], pack_number, place)
            stored_bytes += place.stored_bytes
        if pack.full:
            self.finish_pack()
        return stored_bytes

    def finish_pack(self) -> None:
        """Finish the pack in hand, read its index back, and leave it to `commit`."""
        pack = self._pack
        if pack is None:
            return
        writer = self._writer
        try:
            pack.finish()
            index = read_index(pack.descriptor, pack.pack, writer._keys)
            if index.ids != b"".join(pack.ids):
                raise Damaged(f"the index of pack {pack.name} reads back differently")
            pack.forget()
        except OSError as error:
            raise store_failure("write and read back a pack", error) from error
        writer._pack_bytes[writer._pack_number(pack.pack)] = (pack.length_bytes, len(index))
        with writer._lock:
            writer._finished.append(pack)
            writer._unsynced.append(pack)
            crowded = len(writer._unsynced) > _MOST_OPEN_PACKS
            oldest = writer._unsynced.popleft() if crowded else None  # ours alone from here on
        self._pack = None
        if oldest is not None:
            # Its writeback began long ago, so this waits for little; descriptors stay bounded.
            try:
                os.fsync(oldest.descriptor)
            except OSError as error:
                raise store_failure("write a pack", error) from error
            finally:
                oldest.close()

    def _check_written(
        self, pack: PackWriter, contents: Sequence[bytes | memoryview], places: Sequence[Stored]
    ) -> None:
        """Read what was just written back through the kernel, decode it and compare all of it.

        The content is still in hand, and in the cache: comparing costs a fifth of hashing again.
        """
        start = places[0].offset
        length_bytes = pack.length_bytes - start
        got = os.preadv(pack.descriptor, (self._readback[:length_bytes],), start)
        for content, place in zip(contents, places, strict=True):
            at = place.offset - start
            if at + place.stored_bytes > got:
                raise Damaged(f"pack {pack.name} reads back {got} of {length_bytes} bytes")
            blob = self._readback[at : at + place.stored_bytes]
            if place.encoding == RAW:
                same = self._readback_bytes.startswith(content, at)
            elif place.encoding == ZSTD:  # compared where it is, without another copy
                same = self._decoder.decompress(blob, place.raw_bytes).startswith(content)
            else:
                self._decoder.decode(place.encoding, blob, self._content[: place.raw_bytes])
                same = self._content_bytes.startswith(content)
            if not same:
                raise Damaged(f"pack {pack.name} reads back differently at offset {place.offset}")

    def _sound(self, content_id: bytes, place: Stored, blob: bytes | memoryview) -> bool:
        """Whether stored bytes give the content with that id. Damaged if they give none."""
        content: bytes | memoryview = blob
        if place.encoding != RAW:
            content = self._content[: place.raw_bytes]
            self._decoder.decode(place.encoding, blob, content)
        return keyed_digest(self._chunk_key, content) == content_id

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
