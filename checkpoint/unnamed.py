"""Contents of mapped files that have no name, copied through the mappings themselves.

Only root may open what is mapped without a name (/proc/PID/map_files, proc(5)). An ordinary user's
process shows it all the same: page by page, where it is mapped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .content import ProcessPages
from .errors import Unsupported
from .linux import PAGE_BYTES

if TYPE_CHECKING:
    from .objects import Objects
    from .proc import Vma

_AT_ONCE_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(PAGE_BYTES)


def copy_unnamed(pid: int, vma: Vma, vmas: Sequence[Vma], objects: Objects) -> int:
    """The number of the object behind `vma`, a mapping of the stopped process; see `Objects`.

    It is copied unless it is known already, by a descriptor or another process of the tree. What of
    it is mapped nowhere cannot be seen. Raises Unsupported where another process sees less of it.
    """
    key = (vma.device, vma.inode)
    same = [one for one in vmas if (one.kind, one.device, one.inode) == ("memory", *key)]
    length_bytes = max(one.offset + one.length for one in same)
    if number := objects.find(key):
        if os.fstat(objects.descriptors[number - 1]).st_size < length_bytes:
            raise Unsupported(
                f"pid {pid} has mapped more of {vma.path} than its parent, at {vma.start:#x}",
                remedy="run lzy as root, which may open what is mapped",
                pid=pid,
            )
        return number
    name = os.path.basename(vma.path.removesuffix(" (deleted)")).removeprefix("memfd:")
    descriptor = os.memfd_create(name[:200] or "lzy", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, length_bytes)
        source = ProcessPages(pid)
        try:
            for one in same:
                _copy(source, one, descriptor)
        finally:
            source.close()
        os.fchmod(descriptor, 0o600)
        return objects.add_file(descriptor, key=key)
    finally:
        os.close(descriptor)


def _copy(source: ProcessPages, vma: Vma, descriptor: int) -> None:
    buffer = memoryview(bytearray(_AT_ONCE_BYTES))
    for start in range(vma.start, vma.end, _AT_ONCE_BYTES):
        length = min(_AT_ONCE_BYTES, vma.end - start)
        source.read_runs([(start, length)], buffer[:length])
        for at in range(0, length, PAGE_BYTES):
            if (page := buffer[at : at + PAGE_BYTES]) != _ZEROS:
                os.pwrite(descriptor, page, vma.offset + start - vma.start + at)
