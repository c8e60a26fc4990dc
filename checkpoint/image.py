"""An image: the manifest that says what a dumped process's memory consists of, and reads of it.

The manifest is one authenticated file: header, run table, pieces, chunk table, pack list, document.
Loading it reads and authenticates it all at once and makes no object per entry; the tables stay
as they lie and are searched in place. The layout is told byte by byte in docs/format.md.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import zstandard
from blake3 import blake3

from .buffers import page_aligned
from .codec import RAW, SUITE_NONE, Decoder
from .errors import Damaged, NotFound, StoreUnavailable
from .keys import StoreKeys, keyed_digest, same_digest
from .linux import PAGE_BYTES
from .packs import OpenPack, PackFiles, Stored, pack_file, read_trailer
from .patchwork import PIECE_RECORD, Piece, PieceTable, mask_of, place

MANIFEST_VERSION = 2
MEMBER_MARK = "#"  # behind it in a name: which process of the tree
MOST_NAME_BYTES = 128
MOST_MANIFEST_BYTES = 4 << 30
MOST_DOCUMENT_BYTES = 256 << 20
MOST_CHUNKS = 1 << 26
MOST_PACKS = 1 << 20

_MAGIC = b"LZYIMAGE"
_FIELDS = struct.Struct("<8sIIII16sQQQQQQQQQQQ128s")
_MAC_BYTES = 32
HEADER_BYTES = _FIELDS.size + _MAC_BYTES
RUN_BYTES = 24
CHUNK_MASK = (1 << 32) - 1  # of the third word of a run; above it: the space
CHUNK_RECORD = struct.Struct("<32sIIQII")
_PACK_RECORD = struct.Struct("<16sQQ")
PACK_RECORD_BYTES = _PACK_RECORD.size


Elsewhere = Callable[[bytes, int, int], bytes]
"""(pack, offset, length) to those bytes of it; raises StoreUnavailable."""


class Header(NamedTuple):
    """The head of a manifest: what an image is and how large its parts are."""

    name: str
    store: bytes
    window_pages: int
    created_unix_ns: int
    raw_bytes: int
    zero_bytes: int
    stored_bytes: int
    reused_bytes: int
    run_count: int
    piece_count: int
    chunk_count: int
    pack_count: int
    document_stored_bytes: int
    document_bytes: int

    @property
    def manifest_bytes(self) -> int:
        """The exact size of the manifest."""
        return (
            HEADER_BYTES
            + self.run_count * RUN_BYTES
            + self.piece_count * PIECE_RECORD.size
            + self.chunk_count * CHUNK_RECORD.size
            + self.pack_count * _PACK_RECORD.size
            + self.document_stored_bytes
            + _MAC_BYTES
        )


def encode_manifest(
    header: Header,
    keys: StoreKeys,
    *,
    runs: bytes,
    pieces: bytes,
    chunks: bytes | bytearray,
    packs: bytes,
    document: bytes,
) -> bytes:
    """The bytes of a manifest; the sections must be as long as the header says."""
    fields = _FIELDS.pack(
        _MAGIC,
        MANIFEST_VERSION,
        SUITE_NONE,
        header.window_pages,
        0,
        header.store,
        *header[3:],
        header.name.encode("ascii"),
    )
    head = fields + keyed_digest(keys.manifest, b"header", fields)
    whole = b"".join((head, runs, pieces, chunks, packs, document))
    whole += keyed_digest(keys.manifest, b"image", whole)
    if len(whole) != header.manifest_bytes:
        raise ValueError("the sections of the manifest do not have the lengths of its header")
    return whole


def encode_document(document: dict[str, Any]) -> tuple[bytes, int]:
    """(stored bytes, length in bytes) of a JSON document."""
    text = json.dumps(document, separators=(",", ":")).encode()
    if len(text) > MOST_DOCUMENT_BYTES:
        raise ValueError(f"a document of {len(text)} bytes is too large for an image")
    return zstandard.ZstdCompressor(level=1).compress(text), len(text)


def encode_pack(pack: bytes, length_bytes: int, chunk_count: int) -> bytes:
    """One record of the pack list."""
    return _PACK_RECORD.pack(pack, length_bytes, chunk_count)


def parse_header(head: bytes | memoryview, keys: StoreKeys, *, name: str) -> Header:
    """Authenticate the first HEADER_BYTES bytes of the manifest of image `name`; else Damaged."""
    if len(head) < HEADER_BYTES:
        raise Damaged(f"image {name} is cut: its manifest has {len(head)} bytes", image=name)
    fields, mac = head[: _FIELDS.size], head[_FIELDS.size : HEADER_BYTES]
    magic, version, suite, window_pages, reserved, store, *numbers, written = _FIELDS.unpack(fields)
    if magic != _MAGIC:
        raise Damaged(f"image {name} has no manifest of an image", image=name)
    if (version, suite) != (MANIFEST_VERSION, SUITE_NONE):
        raise Damaged(
            f"image {name} has version {version} and encryption suite {suite}, which are not known",
            remedy="use a newer version of lzy",
            image=name,
        )
    if not same_digest(mac, keyed_digest(keys.manifest, b"header", fields)):
        raise Damaged(f"the header of image {name} is damaged or forged", image=name)
    written_name = written.rstrip(b"\0").decode("ascii", "backslashreplace")
    header = Header(written_name, store, window_pages, *numbers)
    # What follows cannot fail for a manifest that lzy wrote; it keeps every later step bounded.
    if header.name != name:
        raise Damaged(f"image {name} was written as {header.name}", image=name)
    if (
        reserved
        or not 1 <= window_pages <= 64
        or window_pages & (window_pages - 1)
        or header.chunk_count > MOST_CHUNKS
        or header.run_count > MOST_CHUNKS
        or header.piece_count > MOST_CHUNKS
        or header.pack_count > MOST_PACKS
        or header.document_bytes > MOST_DOCUMENT_BYTES
        or header.document_stored_bytes > MOST_DOCUMENT_BYTES + (1 << 20)
        or header.manifest_bytes > MOST_MANIFEST_BYTES
    ):
        raise Damaged(f"image {name} has an impossible header", image=name)
    return header


class Image:
    """A loaded, authenticated image. Reads may come from several threads and after a fork."""

    def __init__(
        self,
        manifest: bytes | memoryview,
        keys: StoreKeys,
        packs: int,
        *,
        name: str,
        lock: int = -1,
    ) -> None:
        """`packs`: descriptor of the directory of packs, `lock`: one that holds a shared flock(2)
        on the manifest as long as the image is in use. Both belong to the image once it is made;
        when Damaged is raised they are still the caller's.
        """
        self._folder = packs
        self._lock = lock
        self.name = name
        self.header = header = parse_header(memoryview(manifest)[:HEADER_BYTES], keys, name=name)
        whole = memoryview(manifest)
        if len(whole) != header.manifest_bytes:
            raise Damaged(
                f"the manifest of image {name} has {len(whole)} bytes"
                f" instead of {header.manifest_bytes}",
                image=name,
            )
        if not same_digest(
            whole[-_MAC_BYTES:], keyed_digest(keys.manifest, b"image", whole[:-_MAC_BYTES])
        ):
            raise Damaged(f"the manifest of image {name} is damaged or forged", image=name)
        start = HEADER_BYTES
        end = start + header.run_count * RUN_BYTES
        self._runs = whole[start:end]
        self.runs = self._runs.cast("Q")
        start, end = end, end + header.piece_count * PIECE_RECORD.size
        self._pieces = PieceTable(whole[start:end])
        start, end = end, end + header.chunk_count * CHUNK_RECORD.size
        self._chunks = whole[start:end]
        start, end = end, end + header.pack_count * _PACK_RECORD.size
        self._packs: list[tuple[bytes, int]] = []
        self.pack_chunk_counts: list[int] = []
        for pack, length_bytes, chunk_count in _PACK_RECORD.iter_unpack(whole[start:end]):
            self._packs.append((pack, length_bytes))
            self.pack_chunk_counts.append(chunk_count)
        self._document_bytes = whole[end : end + header.document_stored_bytes]
        self._document: dict[str, Any] | None = None
        self._addresses = self.runs[0::3]
        self._owners = self.runs[2::3]
        self._extents: dict[int, tuple[int, int]] = {}
        self._chunk_key = keys.chunk
        self._files = PackFiles(packs)
        self._decoders: list[Decoder] = []
        self._buffers: list[memoryview] = []
        self._window_bytes = header.window_pages * PAGE_BYTES
        self.elsewhere: Elsewhere | None = None
        """Where packs are read that are not here yet."""
        self.reopen: Callable[[str, str], Image] | None = None
        """How a pager opens it anew (store path, name), if not as any other."""
        self.window_pages = header.window_pages
        self.run_count = header.run_count
        self.chunk_count = header.chunk_count
        self.raw_bytes = header.raw_bytes
        self.stored_bytes = header.stored_bytes

    @property
    def document(self) -> dict[str, Any]:
        """The process, as the engine wrote it. Damaged when it is no JSON object."""
        if self._document is None:
            try:
                text = Decoder().decompress(self._document_bytes, self.header.document_bytes)
                document = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise Damaged(f"the document of image {self.name} is no JSON: {error}") from error
            if not isinstance(document, dict):
                raise Damaged(f"the document of image {self.name} is no JSON object")
            self._document = document
        return self._document

    def forget_document(self) -> None:
        """Have `document` be as it was written again, whatever was changed in it."""
        self._document = None

    def member(self, number: int) -> Image:
        """The image as it would be if only that process of its tree had been dumped.

        Space 0 is that process's memory, and the document tells of it; `number` is the pid as the
        tree sees it. It shares everything with this one; only one of the two is to be closed.
        Raises NotFound.
        """
        members = self.document.get("members", ())
        found = next((member for member in members if member["pid"] == number), None)
        if found is None:
            raise NotFound(f"image {self.name} has no process {number}", image=self.name)
        return self._only(found)

    def in_space(self, space: int) -> Image | None:
        """As `member`, by the space that is its memory (0: this very image); None if none is."""
        if space == 0:
            return self
        members = self.document.get("members", ())
        found = next((member for member in members if member["space"] == space), None)
        return self._only(found) if found else None

    def _only(self, found: dict[str, Any]) -> Image:
        first, last = self.space_extent(found["space"])
        other = copy.copy(self)
        other.name = f"{self.name}{MEMBER_MARK}{found['pid']}"
        other._runs = self._runs[RUN_BYTES * first : RUN_BYTES * last]
        other.runs = other._runs.cast("Q")
        other.run_count = last - first
        other._addresses = other.runs[0::3]
        other._owners = other.runs[2::3]
        other._extents = {0: (0, last - first)}
        table = {"descriptions": self.document["descriptors"]["descriptions"]}
        other._document = {**self.document, "members": [], "zombies": [], **found}
        other._document["descriptors"] = table | found["descriptors"]
        return other

    @property
    def packs(self) -> list[tuple[bytes, int]]:
        """(id, size in bytes) of each pack the image needs."""
        return self._packs

    @property
    def run_records(self) -> memoryview:
        """The run table as it lies in the manifest, RUN_BYTES each."""
        return self._runs

    @property
    def chunk_records(self) -> memoryview:
        """The chunk table as it lies in the manifest, CHUNK_RECORD each."""
        return self._chunks

    @property
    def store_path(self) -> str:
        """The folder of the store it was loaded from, by its present name."""
        return os.path.dirname(os.readlink(f"/proc/self/fd/{self._folder}"))

    def space_extent(self, space: int) -> tuple[int, int]:
        """The range [first, last) of the run records of `space`; O(log n), then O(1)."""
        extent = self._extents.get(space)
        if extent is None:
            first = bisect_left(self._owners, space << 32)
            extent = first, bisect_left(self._owners, (space + 1) << 32, first)
            self._extents[space] = extent
        return extent

    def find_run(self, space: int, address: int) -> int:
        """Index of the record of the window that holds `address`, or -1 when it has none."""
        extent = self._extents.get(space)
        if extent is None:
            extent = self.space_extent(space)
        window = address & -self._window_bytes
        found = bisect_left(self._addresses, window, extent[0], extent[1])
        if found < extent[1] and self._addresses[found] == window:
            return found
        return -1

    def run(self, index: int) -> tuple[int, int, int]:
        """(address, mask of stored pages, chunk number) of record `index`; IndexError if none.

        A number from `chunk_count` on is that of a patchwork (`lzy.checkpoint.patchwork`).
        """
        at = index * 3
        runs = self.runs
        return runs[at], runs[at + 1], runs[at + 2] & CHUNK_MASK

    def run_space(self, index: int) -> int:
        """The space that record `index` belongs to."""
        return self.runs[index * 3 + 2] >> 32

    def pieces(self, chunk: int, mask: int) -> list[Piece]:
        """What makes up the pages `mask` that a run record finds in `chunk`: one piece or several.

        Damaged when that chunk is a patchwork that is not one of these pages.
        """
        if chunk < self.chunk_count:
            return [Piece(mask, mask, chunk)]
        pieces = self._pieces.pieces(chunk - self.chunk_count)
        try:
            sound = mask_of(pieces) == mask and all(p.chunk < self.chunk_count for p in pieces)
        except ValueError:
            sound = False
        if not sound:
            raise Damaged(f"patchwork {chunk} of image {self.name} is impossible", image=self.name)
        return pieces

    @property
    def patchwork_count(self) -> int:
        """How many numbers behind those of the chunks are patchworks."""
        return self._pieces.count

    def content_key(self, chunk: int) -> bytes:
        """Equal for equal contents of the same mask, as a rule: chunks have one key per content."""
        if chunk < self.chunk_count:
            return self.chunk_place(chunk)[0]
        return b"".join(
            self.chunk_place(piece.chunk)[0] + piece.held.to_bytes(8) + piece.taken.to_bytes(8)
            for piece in self._pieces.pieces(chunk - self.chunk_count)
        )

    def chunk_place(self, chunk: int) -> tuple[bytes, int, Stored]:
        """(id, pack number, place in the pack) of a chunk; IndexError when there is no such."""
        if not 0 <= chunk < self.chunk_count:
            raise IndexError(f"image {self.name} has no chunk {chunk}")
        content_id, pack, stored_bytes, offset, raw_bytes, encoding = CHUNK_RECORD.unpack_from(
            self._chunks, chunk * CHUNK_RECORD.size
        )
        return content_id, pack, Stored(offset, stored_bytes, raw_bytes, encoding)

    def is_content(self, chunk: int, content: bytes) -> bool:
        """Whether that is the content of a chunk, by its id: nothing is read."""
        return keyed_digest(self._chunk_key, content) == self.chunk_place(chunk)[0]

    def read_chunk(self, chunk: int, into: memoryview) -> int:
        """Read the content of a chunk into `into`, authenticated; answer its length in bytes.

        Raises Damaged when the content is not what was written (`into` is then undefined),
        StoreUnavailable when the store cannot be read, ValueError when `into` is too small.
        """
        if chunk >= self.chunk_count:
            return self._read_patchwork(chunk, into)
        if not 0 <= chunk < self.chunk_count:
            raise IndexError(f"image {self.name} has no chunk {chunk}")
        content_id, pack, stored_bytes, offset, raw_bytes, encoding = CHUNK_RECORD.unpack_from(
            self._chunks, chunk * CHUNK_RECORD.size
        )
        if (
            pack >= len(self._packs)
            or raw_bytes > self._window_bytes
            or stored_bytes > raw_bytes
            or offset + stored_bytes > self._packs[pack][1]
        ):
            raise Damaged(f"chunk {chunk} of image {self.name} has an impossible record")
        target = into[:raw_bytes]
        if len(target) != raw_bytes:
            raise ValueError(f"a chunk of {raw_bytes} bytes does not fit into {len(into)}")
        try:
            file = self._open_pack(self._packs[pack][0])
            if file is None:
                blob = self._read_elsewhere(self._packs[pack][0], offset, stored_bytes)
                got = len(blob)
                if encoding == RAW and got == stored_bytes:
                    target[:] = blob
            elif encoding == RAW:
                got = os.preadv(file.descriptor, (target,), offset)
                blob = b""
            else:
                blob = os.pread(file.descriptor, stored_bytes, offset)
                got = len(blob)
        except OSError as error:
            raise StoreUnavailable(
                f"cannot read pack {pack_file(self._packs[pack][0])}: {error.strerror}"
            ) from error
        try:
            if got != stored_bytes:
                raise Damaged(f"its pack ends after {got} of {stored_bytes} bytes")
            if encoding != RAW:
                try:
                    decoder = self._decoders.pop()
                except IndexError:
                    decoder = Decoder()
                try:
                    decoder.decode(encoding, blob, target)
                finally:
                    self._decoders.append(decoder)
            if blake3(target, key=self._chunk_key).digest() != content_id:
                raise Damaged("its content is not what was written")
        except Damaged as error:
            pack_name = pack_file(self._packs[pack][0])
            raise Damaged(
                f"chunk {chunk} of image {self.name} (pack {pack_name}, offset {offset}):"
                f" {error.message}",
                remedy=error.remedy or f"the image cannot be restored; see lzy verify {self.name}",
                image=self.name,
                pack=pack_name,
            ) from error
        return int(raw_bytes)

    def _open_pack(self, pack: bytes) -> OpenPack | None:
        """None: it is not here, and there is somewhere else to read it."""
        try:
            return self._files.open(pack)
        except Damaged:
            if self.elsewhere is None:
                raise
            return None

    def _read_elsewhere(self, pack: bytes, offset: int, length_bytes: int) -> bytes:
        assert self.elsewhere is not None
        return self.elsewhere(pack, offset, length_bytes)

    def _read_patchwork(self, number: int, into: memoryview) -> int:
        pieces = self._pieces.pieces(number - self.chunk_count)
        if not pieces:
            raise IndexError(f"image {self.name} has no chunk {number}")
        try:
            mask = mask_of(pieces)
        except ValueError as error:
            raise Damaged(f"patchwork {number} of image {self.name}: {error}") from error
        length_bytes = mask.bit_count() * PAGE_BYTES
        if mask >> self.window_pages:
            raise Damaged(f"patchwork {number} of image {self.name} is larger than a window")
        if len(into) < length_bytes:
            raise ValueError(f"{length_bytes} bytes do not fit into {len(into)}")
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = page_aligned(self._window_bytes)[2]
        try:
            for piece in pieces:
                if piece.chunk >= self.chunk_count:
                    raise Damaged(f"patchwork {number} of image {self.name} names no chunk")
                got = self.read_chunk(piece.chunk, buffer)
                if got != piece.held.bit_count() * PAGE_BYTES:
                    raise Damaged(f"chunk {piece.chunk} of image {self.name} has {got} bytes")
                place(mask, piece, buffer, into)
        finally:
            self._buffers.append(buffer)
        return length_bytes

    def check_packs(self, known: Collection[bytes] = ()) -> None:
        """Check that each pack is there, has its size, header and trailer. Damaged if not.

        Of the `known` ones, which the caller has just looked at, only that they have their size.
        Those that are read `elsewhere` are passed over: each of their chunks is authenticated.
        """
        for pack, length_bytes in self._packs:
            try:
                if pack in known:
                    found = os.stat(pack_file(pack), dir_fd=self._folder).st_size
                elif (file := self._open_pack(pack)) is not None:
                    found = read_trailer(file.descriptor, pack)[0]
                else:
                    continue
            except FileNotFoundError as error:
                if self.elsewhere is not None:
                    continue
                name = pack_file(pack)
                raise Damaged(f"pack {name} is missing from the store", pack=name) from error
            except OSError as error:
                raise StoreUnavailable(
                    f"cannot read pack {pack_file(pack)}: {error.strerror}"
                ) from error
            if found != length_bytes:
                raise Damaged(
                    f"pack {pack_file(pack)} has {found} bytes instead of {length_bytes}",
                    image=self.name,
                )

    def descriptors(self) -> list[int]:
        """What a forked child that closes everything else must keep, so as to read on."""
        return [d for d in (self._folder, self._lock) if d >= 0] + self._files.descriptors()

    def close(self) -> None:
        """Let go of the packs and of the lock that keeps the image from being removed."""
        self._files.close()
        for descriptor in (self._folder, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._folder = self._lock = -1

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
