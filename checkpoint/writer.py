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
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .beside import Beside
from .draft import Draft
from .errors import Busy, Damaged, LzyError
from .image import (
    CHUNK_MASK,
    HEADER_BYTES,
    PACK_RECORD_BYTES,
    RUN_BYTES,
    Header,
    Image,
    encode_document,
    encode_manifest,
    parse_header,
)
from .linux import PAGE_BYTES
from .packs import PackFiles
from .pages import MOST_WINDOW_PAGES
from .patchwork import PIECE_RECORD, Piece
from .pending import PendingPacks, Progress
from .tables import ImageTables
from .unavailable import unavailable
from .worker import Batch, PageSource, Shared, Worker

if TYPE_CHECKING:
    from .increment import Kept
    from .store import ImageSummary, Store

__all__ = ["ImageWriter", "PageSource", "Progress"]

_BATCH_BYTES = 1 << 20
_LITTLE_BYTES = 32 << 20
_SMALL_BATCH_BYTES = 512 << 10


class ImageWriter:
    """Writes one image; made by `Store.writer`. Leaving the context without `commit` discards it.

    `raw_bytes_done` (zero pages included), `zero_bytes` and `stored_bytes` tell from any thread at
    any time how far it is.
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
        self._store = store
        self._keys = store.keys
        self._reservation = reservation
        self._tables = ImageTables()
        self._pending = PendingPacks(store.temporary, store.packs, store.keys)
        self._existing = PackFiles(store.packs)
        self._batches = 0
        self._last = (-1, -1)
        self._ordered = True
        self._failure: BaseException | None = None
        self._closed = False
        self._plain = False
        self._batch_bytes = _BATCH_BYTES
        self._little = False
        self._queue: queue.Queue[Batch | None] = queue.Queue(maxsize=2 * workers)
        self._known = store.known_chunks()
        self._shared = Shared(store.keys, self._tables, self._pending, self._known, self._existing)
        self._threads = [
            threading.Thread(target=self._work, name=f"lzy-store-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def raw_bytes_done(self) -> int:
        """Bytes of memory read so far."""
        return self._tables.raw_bytes

    @property
    def zero_bytes(self) -> int:
        """Bytes of those that were pages of zeros."""
        return self._tables.zero_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes written to packs so far."""
        return self._tables.stored_bytes

    def expect_little(self, length_bytes: int) -> None:
        """So little is to be read that it is not looked for among all that the store has.

        If it is less than a batch, encodings are not tried either. Small batches spare the workers
        to make large buffers, and to wait for one another at the end; so does to begin with those
        of many small windows, which take longest.
        """
        self._known.forgo()
        self._plain = length_bytes <= _BATCH_BYTES
        self._little = length_bytes <= _LITTLE_BYTES
        if self._little:
            self._batch_bytes = _SMALL_BATCH_BYTES
            self._queue.maxsize = 0  # all at once: the workers need not wake who feeds them

    def keep(self, parts: Sequence[tuple[int, Image, Kept]]) -> None:
        """Take these pages of some spaces as the image before has them: (space, base, what).

        Each base is what `Image.in_space` makes of one and the same image. The pages were verified
        when they were written, and are not read again. Damaged when it cannot be made sense of.
        """
        tables = self._tables
        taken = [(space, _copy_runs(base, kept), kept) for space, base, kept in parts]
        used: set[int] = set()
        for _, runs, kept in taken:
            used.update(runs[2::3])
            used.update([piece.chunk for pieces in kept.pieces.values() for piece in pieces])
        numbers, reused_bytes = tables.adopt(parts[0][1], used)
        for space, runs, kept in taken:
            patchworks = kept.pieces
            if numbers is not None:
                runs[2::3] = array("Q", [numbers[chunk] for chunk in runs[2::3]])
                patchworks = {
                    address: [piece._replace(chunk=numbers[piece.chunk]) for piece in pieces]
                    for address, pieces in patchworks.items()
                }
            if space:
                runs[2::3] = array("Q", [space << 32 | chunk for chunk in runs[2::3]])
            tables.keep(space, runs, patchworks)
            self._record_kept(kept.page_count, runs, patchworks, reused_bytes)
            reused_bytes = 0

    def _record_kept(
        self,
        page_count: int,
        runs: array[int],
        patchworks: dict[int, list[Piece]],
        reused_bytes: int,
    ) -> None:
        stored_pages = sum(map(int.bit_count, runs[1::3]))
        stored_pages += sum([p.taken.bit_count() for each in patchworks.values() for p in each])
        self._tables.record_batch(
            self._batches,
            b"",
            raw_bytes=page_count * PAGE_BYTES,
            zero_bytes=(page_count - stored_pages) * PAGE_BYTES,
            repeated_bytes=0,
            reused_bytes=reused_bytes,
            stored_bytes=0,
        )
        self._batches += 1

    def set_aside(self) -> Draft:
        """Take out what was written and kept so far of space 0; `keep_draft` takes what holds."""
        runs, patchworks = self._tables.set_aside()
        return Draft(runs, patchworks, self._tables.chunk_count, self.window_pages)

    @property
    def counted(self) -> tuple[int, int, int]:
        """How much was read so far; see `count_as`."""
        return self._tables.counted

    def count_as(self, before: tuple[int, int, int]) -> None:
        """What was read since it was `counted`, and set aside, does not count as read."""
        self._tables.count_as(before)

    def keep_draft(self, draft: Draft, kept: Kept, space: int) -> None:
        """Take these pages of a space as the draft has them, of all that was set aside."""
        runs = array("Q")
        for first, last in kept.rows:  # of one chunk each: numbered as they are here
            runs.extend(draft.runs[3 * first : 3 * last])
        if space:
            runs[2::3] = array("Q", [space << 32 | chunk for chunk in runs[2::3]])
        self._tables.keep(space, runs, kept.pieces)
        self._record_kept(kept.page_count, runs, kept.pieces, 0)

    def expect(self, base: Image, windows: Iterable[int]) -> None:
        """These windows of a process may well turn out to be as `base` has them: look there first.

        `base` is what `Image.in_space` makes of an image of several processes.
        """
        chunks = {base.run(row)[2] for at in windows if (row := base.find_run(0, at)) >= 0}
        self._known.expect(base, (chunk for chunk in chunks if chunk < base.chunk_count))

    def expect_objects(self, base: Image, end_space: int) -> None:
        """Whatever is in spaces 1 to `end_space` may well be as `base` has it: look there first."""
        first = base.space_extent(0)[1]
        last = base.space_extent(end_space)[0]
        self._known.expect(base, {base.run(row)[2] for row in range(first, last)})

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
            batches = self._cut(source, windows, space)
            if self._little:
                batches = iter(sorted(batches, key=lambda batch: -len(batch.windows)))
            for batch in batches:
                self._raise_failure()
                self._queue.put(batch)
        except BaseException as error:
            # What is missing now would be missing from the image: nothing can be committed.
            self._failure = self._failure or error
            raise
        finally:
            self._queue.join()  # nobody reads from `source` after this
        self._raise_failure()

    def _cut(
        self, source: PageSource, windows: Iterable[tuple[int, int]], space: int
    ) -> Iterator[Batch]:
        """The windows in batches, numbered in their order."""
        if not 0 <= space < 1 << 32:
            raise ValueError(f"a space is a number below 2**32, not {space}")
        window_bytes = self.window_pages * PAGE_BYTES
        too_large = 1 << self.window_pages
        batch: list[tuple[int, int]] = []
        pages = 0
        batch_pages = self._batch_bytes // PAGE_BYTES
        for window in windows:
            address, mask = window
            if address % window_bytes or not 0 <= address < 1 << 64 or not 0 <= mask < too_large:
                raise ValueError(f"no window of {window_bytes} bytes: {address:#x}, {mask:#x}")
            if not mask:
                continue
            if (space, address) <= self._last:
                self._ordered = False
            self._last = (space, address)
            if pages + mask.bit_count() > batch_pages:
                yield Batch(self._batches, space, source, batch, pages * PAGE_BYTES)
                self._batches += 1
                batch, pages = [], 0
            batch.append(window)
            pages += mask.bit_count()
        if batch:
            yield Batch(self._batches, space, source, batch, pages * PAGE_BYTES)
            self._batches += 1

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
            published = Beside(lambda: self._pending.publish(progress))
            try:
                manifest = self._manifest(document)
                self._write_manifest(manifest)
            finally:
                published.result()
            self._link_manifest()
        except OSError as error:
            raise unavailable(f"write image {self.name}", error) from error
        from .store import ImageSummary

        self.close()
        return ImageSummary.of(parse_header(manifest[:HEADER_BYTES], self._keys, name=self.name))

    def close(self) -> None:
        """Stop, and remove what was not committed as far as possible. May be called again."""
        self._closed = True
        if self._failure is None:
            self._failure = LzyError(f"the writing of image {self.name} was given up")
        self._stop_workers()
        self._pending.discard()
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

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _stop_workers(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self) -> None:
        worker: Worker | None = None  # its buffers are made at the first batch: there may be none
        while True:
            batch = self._queue.get()
            try:
                if self._failure is None:
                    if batch is not None:
                        worker = worker or Worker(
                            self._shared,
                            window_pages=self.window_pages,
                            batch_bytes=self._batch_bytes,
                            plain=self._plain,
                        )
                        worker.store(batch)
                    elif worker is not None:
                        worker.finish_pack()
            except BaseException as error:
                self._failure = self._failure or error  # raised again in the caller's thread
            finally:
                self._queue.task_done()
            if batch is None:
                if worker is not None:
                    worker.close()
                return

    def _manifest(self, document: dict[str, Any]) -> bytes:
        stored_document, document_bytes = encode_document(document)
        tables = self._tables
        chunks, packs = tables.encode_chunks(), tables.encode_packs()
        runs, pieces = tables.encode_runs(ordered=self._ordered)
        header = Header(
            name=self.name,
            store=self._store.identity,
            window_pages=self.window_pages,
            created_unix_ns=time.time_ns(),
            raw_bytes=tables.raw_bytes,
            zero_bytes=tables.zero_bytes,
            stored_bytes=tables.stored_bytes,
            reused_bytes=tables.reused_bytes,
            run_count=len(runs) // RUN_BYTES,
            piece_count=len(pieces) // PIECE_RECORD.size,
            chunk_count=tables.chunk_count,
            pack_count=len(packs) // PACK_RECORD_BYTES,
            document_stored_bytes=len(stored_document),
            document_bytes=document_bytes,
        )
        return encode_manifest(
            header,
            self._keys,
            runs=runs,
            pieces=pieces,
            chunks=chunks,
            packs=packs,
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

    def _link_manifest(self) -> None:
        """Have the image exist. Preconditions: its packs and its manifest are on disk."""
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


def _copy_runs(base: Image, kept: Kept) -> array[int]:
    """The records of these rows, chunks without a space."""
    runs = array("Q")
    for first, last in kept.rows:
        runs.frombytes(base.run_records[first * RUN_BYTES : last * RUN_BYTES])
    if runs and runs[2] > CHUNK_MASK:
        runs[2::3] = array("Q", [owner & CHUNK_MASK for owner in runs[2::3]])
    return runs
