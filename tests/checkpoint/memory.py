"""Memory made for the tests of the store: a source of pages, and images of known content."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from lzy.checkpoint.image import Image
from lzy.checkpoint.store import ImageSummary, Store

PAGE_BYTES = 4096


class Memory:
    """A process's memory, as far as the store can see: runs of addresses are read from bytes."""

    def __init__(self, content: bytes | bytearray, start: int = 0) -> None:
        self.content = content
        self.start = start

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        at = 0
        for address, length_bytes in runs:
            first = address - self.start
            into[at : at + length_bytes] = self.content[first : first + length_bytes]
            at += length_bytes
        assert at == len(into)

    def windows(self, window_pages: int) -> list[tuple[int, int]]:
        """All of it, as (window address, mask) with every page present."""
        window_bytes = window_pages * PAGE_BYTES
        end = self.start + len(self.content)
        windows = []
        for address in range(self.start, end, window_bytes):
            pages = min(window_bytes, end - address) // PAGE_BYTES
            windows.append((address, (1 << pages) - 1))
        return windows


def patterned(pages: int, seed: int = 0) -> bytearray:
    """Pages of zeros, repeats, counters and noise, in runs, always the same for a seed."""
    pick = random.Random(seed)
    repeated = pick.randbytes(PAGE_BYTES)
    content = bytearray()
    while len(content) < pages * PAGE_BYTES:
        kind = pick.randrange(4)
        for _ in range(pick.randrange(1, 24)):
            if kind == 0:
                content += bytes(PAGE_BYTES)
            elif kind == 1:
                content += repeated
            elif kind == 2:
                start = pick.randrange(1 << 40)
                content += b"".join(
                    number.to_bytes(8, "little") for number in range(start, start + 512)
                )
            else:
                content += pick.randbytes(PAGE_BYTES)
    del content[pages * PAGE_BYTES :]
    return content


def write_image(
    store: Store,
    name: str,
    content: bytes | bytearray,
    *,
    window_pages: int = 16,
    workers: int = 2,
    start: int = 0,
) -> ImageSummary:
    """Store `content` as space 0 of image `name`."""
    memory = Memory(content, start)
    with store.writer(name, window_pages=window_pages, workers=workers) as writer:
        writer.add_space(memory, memory.windows(window_pages), space=0)
        return writer.commit({"length": len(content)})


def read_space(image: Image, length_bytes: int, *, space: int = 0, start: int = 0) -> bytes:
    """Rebuild a space from an image; what is not stored reads as zeros."""
    content = bytearray(length_bytes)
    buffer = memoryview(bytearray(64 * PAGE_BYTES))
    first, last = image.space_extent(space)
    for index in range(first, last):
        address, mask, chunk = image.run(index)
        assert image.find_run(space, address) == index
        length = image.read_chunk(chunk, buffer)
        assert length == mask.bit_count() * PAGE_BYTES
        at = 0
        for page in range(image.window_pages):
            if mask >> page & 1:
                to = address - start + page * PAGE_BYTES
                content[to : to + PAGE_BYTES] = buffer[at : at + PAGE_BYTES]
                at += PAGE_BYTES
    return bytes(content)


def descriptors() -> set[str]:
    """What this process's descriptors lead to, to see that none was left open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue
    return found


def files(path: Path) -> set[str]:
    """All files below `path`."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
