"""The build-id of an ELF file, by which a mapped library is known again (elf(5), ld --build-id)."""

from __future__ import annotations

import os
import struct

NT_GNU_BUILD_ID = 3
PT_NOTE = 4


def build_id(descriptor: int) -> str | None:
    """The build-id in hex of an open file; None for what is no 64-bit ELF file or has none."""
    header = os.pread(descriptor, 64, 0)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return None
    table = struct.unpack_from("<Q", header, 32)[0]
    entry_bytes, count = struct.unpack_from("<HH", header, 54)
    if entry_bytes < 56 or count > 128:
        return None
    entries = _read(descriptor, entry_bytes * count, table)
    for start in range(0, len(entries) - 55, entry_bytes):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", entries, start)
        if (
            kind == PT_NOTE
            and length <= 65536
            and (found := _find_note(_read(descriptor, length, offset)))
        ):
            return found
    return None


def _read(descriptor: int, length_bytes: int, offset: int) -> bytes:
    """Bytes of the file; none from an offset, itself read from the file, that no file can have."""
    return os.pread(descriptor, length_bytes, offset) if offset + length_bytes < 1 << 63 else b""


def _find_note(notes: bytes) -> str | None:
    position = 0
    while position + 12 <= len(notes):
        name_bytes, content_bytes, kind = struct.unpack_from("<III", notes, position)
        name = position + 12
        content = name + (name_bytes + 3 & -4)
        if kind == NT_GNU_BUILD_ID and notes[name : name + 4] == b"GNU\0":
            return notes[content : content + content_bytes].hex()
        position = content + (content_bytes + 3 & -4)
    return None
