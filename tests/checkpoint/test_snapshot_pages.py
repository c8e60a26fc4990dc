"""Reading the pages of a snapshot leaves them shared with the process it was split from."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from pathlib import Path

from lzy.checkpoint.content import ProcessPages

LENGTH_BYTES = 32 << 20


def own_bytes(pid: int) -> int:
    """Memory of `pid`, pages that it shares shared out (Pss)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")


def test_reading_copies_no_page() -> None:
    """All of a clone's memory is read, rightly, and the clone has no more of its own for it."""
    memory = mmap.mmap(-1, LENGTH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(range(1, 256)).ljust(4096, b"x") * (LENGTH_BYTES // 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"r")
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        before = own_bytes(pid)
        pages = ProcessPages(pid, shares_pages=True)
        found = bytearray(LENGTH_BYTES)
        pages.read_runs([(address, LENGTH_BYTES)], memoryview(found))
        pages.close()
        assert found == memory[:]
        assert own_bytes(pid) - before < LENGTH_BYTES // 8
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for descriptor in (*ready, *done):
            os.close(descriptor)
