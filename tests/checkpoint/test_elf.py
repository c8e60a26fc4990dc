"""Build-ids are found where linkers put them, and no odd file is more than a file without one."""

from __future__ import annotations

import os
import re
import struct
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lzy.checkpoint.elf import build_id


def note(name: bytes, kind: int, content: bytes) -> bytes:
    padded = [part + bytes(-len(part) % 4) for part in (name, content)]
    return struct.pack("<III", len(name), len(content), kind) + b"".join(padded)


def elf(segments: list[tuple[int, bytes]]) -> bytes:
    """A 64-bit ELF file with program headers of (type, content); elf(5)."""
    offset = 64 + 56 * len(segments)
    headers, contents = b"", b""
    for kind, content in segments:
        place = offset + len(contents)
        headers += struct.pack("<IIQQQQQQ", kind, 4, place, 0, 0, len(content), len(content), 4)
        contents += content
    head = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0,
    )  # fmt: skip
    return head + headers + contents


def read(content: bytes) -> str | None:
    descriptor = os.memfd_create("elf")
    try:
        os.write(descriptor, content)
        return build_id(descriptor)
    finally:
        os.close(descriptor)


GNU = note(b"GNU\0", 3, bytes(range(20)))


def test_build_id_among_other_notes_and_segments() -> None:
    """The note may come second, in the second note segment, behind names of odd lengths."""
    expected = bytes(range(20)).hex()
    assert read(elf([(4, GNU)])) == expected
    assert read(elf([(1, b"code"), (4, note(b"GNU\0", 1, b"abi!")), (4, GNU)])) == expected
    assert read(elf([(4, note(b"stapsdt\0", 3, b"12345") + GNU)])) == expected
    assert read(elf([(4, note(b"Go\0\0", 3, b"x" * 20))])) is None
    assert read(elf([])) is None


def test_what_is_no_elf_file() -> None:
    """Text, nothing, a 32-bit file, a truncated one."""
    assert read(b"") is None
    assert read(b"#!/bin/sh\n" * 20) is None
    assert read(b"\x7fELF\x01\x01\x01" + bytes(100)) is None
    assert read(elf([(4, GNU)])[:100]) is None


def test_libraries_of_this_process() -> None:
    """The C library has one; it is what the file itself holds behind the note's name."""
    maps = Path("/proc/self/maps").read_text()
    (path,) = set(re.findall(r"/\S*libc\.so\.6|/\S*/libc-\S+\.so", maps)) or {sys.executable}
    with open(path, "rb") as file:
        found = build_id(file.fileno())
        content = file.read()
    assert found
    assert struct.pack("<III", 4, len(found) // 2, 3) + b"GNU\0" + bytes.fromhex(found) in content


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_headers_are_files_without_build_id(data: st.DataObject) -> None:
    """Whatever numbers stand in the headers (offsets beyond all bounds), nothing is raised."""
    content = bytearray(elf([(1, b"code"), (4, note(b"GNU\0", 1, b"abi!") + GNU)]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(7, len(content) - 8))
        kind = data.draw(st.sampled_from(["<B", "<H", "<I", "<Q"]))
        limit = 1 << 8 * struct.calcsize(kind)
        value = data.draw(st.integers(0, limit - 1) | st.just(limit - 1))
        struct.pack_into(kind, content, at, value)
    found = read(bytes(content))
    assert found is None or isinstance(found, str)
