"""Functions of a running process by name, from the tables its own loader uses.

Everything is read from the process's memory (PT_DYNAMIC, DT_GNU_HASH, DT_SYMTAB), nothing from
files: a library may have been upgraded or deleted since, or lie in another mount namespace. What is
read was written by others and is believed only within bounds.

Sources: elf(5); the GNU hash table as glibc reads it, elf/dl-lookup.c (do_lookup_x).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import Final

from .linux import memory
from .proc import Vma

_PT_LOAD: Final = 1
_PT_DYNAMIC: Final = 2
_DT_STRTAB: Final = 5
_DT_SYMTAB: Final = 6
_DT_STRSZ: Final = 10
_DT_GNU_HASH: Final = 0x6FFFFEF5
_SYMBOL_BYTES: Final = 24
_STT_OBJECT: Final = 1
_STT_FUNC: Final = 2
_CHAIN_LIMIT: Final = 4096  # of one hash bucket: a few in any real table
_HEADERS_LIMIT: Final = 64
_DYNAMIC_LIMIT_BYTES: Final = 16384


class Library:
    """One ELF file as a process has it loaded: its base address, and its exported symbols."""

    def __init__(self, pid: int, path: str, start: int) -> None:
        """Raises ValueError or OSError for what is no loaded 64-bit ELF file with a hash table."""
        self.path = path
        self._pid = pid
        header = self._read(start, 64)
        if not header.startswith(b"\x7fELF\x02\x01"):
            raise ValueError(f"{path} is no 64-bit ELF file")
        (table,) = struct.unpack_from("<Q", header, 32)
        entry_bytes, count = struct.unpack_from("<HH", header, 54)
        if entry_bytes != 56 or not 0 < count <= _HEADERS_LIMIT or table > 4096:
            raise ValueError(f"{path} has no program headers")
        first_load, dynamic = None, None
        for kind, _, _, address, _, _, length, _ in struct.iter_unpack(
            "<IIQQQQQQ", self._read(start + table, 56 * count)
        ):
            if kind == _PT_LOAD and first_load is None:
                first_load = address & ~4095
            if kind == _PT_DYNAMIC:
                dynamic = (address, min(length, _DYNAMIC_LIMIT_BYTES) & ~15)
        if first_load is None or dynamic is None:
            raise ValueError(f"{path} is not dynamic")
        self.base = start - first_load
        tags: dict[int, int] = {}
        for tag, value in struct.iter_unpack("<QQ", self._read(self.base + dynamic[0], dynamic[1])):
            if not tag:
                break
            tags[tag] = value
        try:
            self._strings = self._place(tags[_DT_STRTAB])
            self._symbols = self._place(tags[_DT_SYMTAB])
            self._hashes = self._place(tags[_DT_GNU_HASH])
            self._strings_bytes = tags[_DT_STRSZ]
        except KeyError as error:
            raise ValueError(f"{path} has no table of symbols by hash") from error
        self._buckets, self._first_hashed, bloom, _ = struct.unpack(
            "<4I", self._read(self._hashes, 16)
        )
        if not self._buckets:
            raise ValueError(f"{path} exports nothing")
        self._bucket_table = self._hashes + 16 + 8 * bloom
        self._chain_table = self._bucket_table + 4 * self._buckets

    def function(self, name: str) -> int:
        """The address of an exported function, 0 if there is none of that name."""
        return self._find(name, _STT_FUNC)

    def object(self, name: str) -> int:
        """The address of an exported variable, 0 if there is none of that name."""
        return self._find(name, _STT_OBJECT)

    def _place(self, address: int) -> int:
        """A pointer of the dynamic section: glibc has added the base to it, musl has not."""
        return address if address >= self.base else self.base + address

    def _find(self, name: str, kind: int) -> int:
        wanted = name.encode() + b"\0"
        hashed = gnu_hash(name)
        (index,) = struct.unpack(
            "<I", self._read(self._bucket_table + 4 * (hashed % self._buckets), 4)
        )
        if index < self._first_hashed:
            return 0
        for number in range(index, index + _CHAIN_LIMIT):
            (entry,) = struct.unpack(
                "<I", self._read(self._chain_table + 4 * (number - self._first_hashed), 4)
            )
            if (entry | 1) == (hashed | 1):
                spelled, info, _, section, value, _ = struct.unpack(
                    "<IBBHQQ", self._read(self._symbols + _SYMBOL_BYTES * number, _SYMBOL_BYTES)
                )
                if (
                    section
                    and info & 15 == kind
                    and spelled + len(wanted) <= self._strings_bytes
                    and self._read(self._strings + spelled, len(wanted)) == wanted
                ):
                    return int(self.base + value)
            if entry & 1:
                return 0
        return 0

    def _read(self, address: int, length_bytes: int) -> bytes:
        return read_memory(self._pid, address, length_bytes)


def read_memory(pid: int, address: int, length_bytes: int) -> bytes:
    """Bytes of a process's memory; OSError where there are none."""
    if not 0 <= address <= 1 << 56:
        raise OSError(f"no memory of pid {pid} is at {address:#x}")
    content = bytearray(length_bytes)
    memory.read_process(pid, [(address, length_bytes)], memoryview(content))
    return bytes(content)


def gnu_hash(name: str) -> int:
    """The hash of a symbol's name in DT_GNU_HASH: 32 bits, h * 33 + byte from 5381."""
    value = 5381
    for byte in name.encode():
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value


def libraries(pid: int, vmas: list[Vma]) -> Iterator[Library]:
    """The ELF files that a process has loaded, in the order of their addresses.

    Memory that cannot be read, or is no such file, is passed over.
    """
    seen: set[str] = set()
    for vma in vmas:
        if vma.offset or vma.path in seen or not vma.inode or "r" not in vma.permissions:
            continue
        seen.add(vma.path)
        with contextlib.suppress(ValueError, OSError, struct.error):
            yield Library(pid, vma.path, vma.start)


def file_name(path: str) -> str:
    """The last part of a mapping's path, without the mark of a deleted file."""
    return os.path.basename(path.removesuffix(" (deleted)"))
