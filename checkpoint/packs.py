"""A pack: one immutable file that holds many chunks, an index of them and an authenticated trailer.

    header | stored chunks … | index: ids … records … | trailer

A pack is written once, front to back, under `tmp/`, and moves to `packs/` when it is whole and on
disk; so whatever lies in `packs/` was finished. The layout is told byte by byte in docs/format.md.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .codec import SUITE_NONE
from .errors import Damaged, StoreUnavailable
from .keys import DIGEST_BYTES, StoreKeys, keyed_digest, same_digest
from .linux.writeback import start_writeback

PACK_VERSION = 1
PACK_BYTES = 16 << 20
"""A pack is finished once it holds this much, or that many chunks."""
_PACK_CHUNKS = 1 << 16

MOST_PACK_BYTES = 1 << 30
_MOST_PACK_CHUNKS = 1 << 20
_WRITEBACK_BYTES = 4 << 20
_MOST_BUFFERS = 512  # below IOV_MAX (1024) of writev(2)

_MAGIC = b"LZYPACK\n"
_END = b"LZYPKEND"
_HEADER = struct.Struct("<8sII16s")
PACK_HEADER_BYTES = _HEADER.size
_RECORD = struct.Struct("<IIII")
_TRAILER = struct.Struct("<8sII16sQII32s")
_MAC_BYTES = 32


class Stored(NamedTuple):
    """Where a chunk lies in its pack: offset, stored and raw length in bytes, encoding."""

    offset: int
    stored_bytes: int
    raw_bytes: int
    encoding: int


def pack_file(pack: bytes) -> str:
    """The file name of the pack with that 16 byte id."""
    return f"{pack.hex()}.pack"


class PackWriter:
    """Writes one pack; `folder` is a descriptor of the directory it grows in."""

    def __init__(self, folder: int, keys: StoreKeys) -> None:
        self.pack = os.urandom(16)
        self.name = pack_file(self.pack)
        self.length_bytes = 0
        self.ids: list[bytes] = []
        self.stored: list[Stored] = []
        self._keys = keys
        self._started = 0
        self._header = _HEADER.pack(_MAGIC, PACK_VERSION, SUITE_NONE, self.pack)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.descriptor = os.open(self.name, flags, 0o600, dir_fd=folder)
        try:
            self._write([self._header])
        except BaseException:
            self.close()
            os.unlink(self.name, dir_fd=folder)
            raise

    @property
    def full(self) -> bool:
        """Whether it is time for another pack."""
        return self.length_bytes >= PACK_BYTES or len(self.ids) >= _PACK_CHUNKS

    def append(self, chunks: Sequence[tuple[bytes, int, int, bytes | memoryview]]) -> list[Stored]:
        """Append (id, encoding, raw length, stored bytes) chunks in one go; say where they lie."""
        places = []
        offset = self.length_bytes
        for _, encoding, raw_bytes, blob in chunks:
            places.append(Stored(offset, len(blob), raw_bytes, encoding))
            offset += len(blob)
        self._write([chunk[3] for chunk in chunks])
        self.ids.extend(chunk[0] for chunk in chunks)
        self.stored.extend(places)
        return places

    def finish(self) -> None:
        """Write index and trailer, and start the last writeback."""
        index_offset = self.length_bytes
        ids = b"".join(self.ids)
        records = b"".join(_RECORD.pack(*place) for place in self.stored)
        trailer = _TRAILER.pack(
            _END,
            PACK_VERSION,
            SUITE_NONE,
            self.pack,
            index_offset,
            len(self.ids),
            0,
            bytes(_MAC_BYTES),
        )[:-_MAC_BYTES]
        mac = keyed_digest(self._keys.pack, self._header, ids, records, trailer)
        self._write([ids, records, trailer, mac])
        start_writeback(self.descriptor, self._started, self.length_bytes - self._started)

    def forget(self) -> None:
        """Let go of the index of a finished pack: it was the largest thing that a dump kept."""
        self.ids, self.stored = [], []

    def close(self) -> None:
        """Close the file; what was written stays where it is."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _write(self, blobs: list[bytes | memoryview]) -> None:
        for first in range(0, len(blobs), _MOST_BUFFERS):
            self._write_some(blobs[first : first + _MOST_BUFFERS])
        if self.length_bytes - self._started >= _WRITEBACK_BYTES:
            start_writeback(self.descriptor, self._started, self.length_bytes - self._started)
            self._started = self.length_bytes

    def _write_some(self, blobs: list[bytes | memoryview]) -> None:
        left = sum(map(len, blobs))
        written = os.pwritev(self.descriptor, blobs, self.length_bytes)
        self.length_bytes += written
        while written != left:  # a disk that fills up, or a signal: go on where it stopped
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rest = memoryview(b"".join(blobs))[written:]
            blobs, left = [rest], len(rest)
            written = os.pwritev(self.descriptor, blobs, self.length_bytes)
            self.length_bytes += written


class PackIndex(NamedTuple):
    """What an authenticated pack says it holds."""

    pack: bytes
    length_bytes: int
    ids: bytes
    records: bytes

    def __len__(self) -> int:
        return len(self.records) // _RECORD.size

    def id(self, number: int) -> bytes:
        """The id of chunk `number`."""
        return self.ids[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]

    def place(self, number: int) -> Stored:
        """Where chunk `number` lies."""
        return Stored(*_RECORD.unpack_from(self.records, number * _RECORD.size))


def read_trailer(descriptor: int, pack: bytes) -> tuple[int, bytes, tuple[int, int], bytes]:
    """Check a pack's header and trailer without its index: cheap, and refuses what is no such pack.

    Answers (length, header, (index offset, chunk count), trailer). Damaged when it is not the pack
    it should be, was cut, or has a version or an encryption suite that is not known.
    """
    length_bytes = os.fstat(descriptor).st_size
    name = pack_file(pack)
    if not _HEADER.size + _TRAILER.size <= length_bytes <= MOST_PACK_BYTES:
        raise Damaged(f"pack {name} has an impossible size of {length_bytes} bytes", pack=name)
    header = os.pread(descriptor, _HEADER.size, 0)
    trailer = os.pread(descriptor, _TRAILER.size, length_bytes - _TRAILER.size)
    if len(header) != _HEADER.size or len(trailer) != _TRAILER.size:
        raise Damaged(f"pack {name} was cut while it was read", pack=name)
    magic, version, suite, found = _HEADER.unpack(header)
    end, end_version, end_suite, end_found, index_offset, count, reserved, _ = _TRAILER.unpack(
        trailer
    )
    if magic != _MAGIC or end != _END or found != pack or end_found != pack:
        raise Damaged(f"{name} is not the pack its name says, or its end is missing", pack=name)
    if (version, suite) != (PACK_VERSION, SUITE_NONE) or (end_version, end_suite) != (
        version,
        suite,
    ):
        raise Damaged(
            f"pack {name} has version {version} and encryption suite {suite}, which are not known",
            remedy="use a newer version of lzy",
            pack=name,
        )
    index_bytes = count * (DIGEST_BYTES + _RECORD.size)
    if (
        reserved
        or count > _MOST_PACK_CHUNKS
        or index_offset < _HEADER.size
        or index_offset + index_bytes + _TRAILER.size != length_bytes
    ):
        raise Damaged(f"pack {name} has an impossible trailer", pack=name)
    return length_bytes, header, (index_offset, count), trailer


def read_index(descriptor: int, pack: bytes, keys: StoreKeys) -> PackIndex:
    """Read and authenticate the index of a pack. Damaged when it is not what was written."""
    length_bytes, header, (index_offset, count), trailer = read_trailer(descriptor, pack)
    index_bytes = count * (DIGEST_BYTES + _RECORD.size)
    index = os.pread(descriptor, index_bytes, index_offset)
    name = pack_file(pack)
    mac = keyed_digest(keys.pack, header, index, trailer[:-_MAC_BYTES])
    if len(index) != index_bytes or not same_digest(mac, trailer[-_MAC_BYTES:]):
        raise Damaged(f"the index of pack {name} is damaged or forged", pack=name)
    return PackIndex(
        pack, length_bytes, index[: count * DIGEST_BYTES], index[count * DIGEST_BYTES :]
    )


class OpenPack:
    """A descriptor that closes when the last reader has let go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)  # bound early: at the interpreter's end `os` may be gone


class PackFiles:
    """Packs opened for reading, at most `most_open` at a time; safe to use from many threads.

    A pack that is pushed out while another thread reads it stays open until that read is over:
    each reader holds a reference. pread(2) shares no position, so a forked child may go on reading.
    """

    def __init__(self, folder: int, most_open: int = 64) -> None:
        self._folder = folder
        self._most_open = most_open
        self._open: dict[bytes, OpenPack] = {}

    def open(self, pack: bytes) -> OpenPack:
        """The open pack; Damaged when there is none, StoreUnavailable when it cannot be opened."""
        found = self._open.get(pack)
        if found is not None:
            return found
        name = pack_file(pack)
        try:
            found = OpenPack(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder))
        except FileNotFoundError as error:
            raise Damaged(f"pack {name} is missing from the store", pack=name) from error
        except OSError as error:
            raise StoreUnavailable(
                f"cannot open pack {name}: {error.strerror}", pack=name
            ) from error
        # Plain dict operations, each atomic: two threads may open one pack twice, never lose it.
        for oldest in list(self._open)[: max(0, len(self._open) - self._most_open + 1)]:
            self._open.pop(oldest, None)
        self._open[pack] = found
        return found

    def descriptors(self) -> list[int]:
        """Those of the packs that are open now."""
        return [opened.descriptor for opened in list(self._open.values())]

    def close(self) -> None:
        """Let go of all packs."""
        self._open.clear()
