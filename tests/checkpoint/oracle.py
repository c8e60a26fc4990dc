"""The plainest oracle of an image: every page that a living process has, byte for byte."""

from __future__ import annotations

from deeds import FILE_BASE, FILE_PAGES, mapped_file

from lzy.checkpoint import proc
from lzy.checkpoint.content import own_page_ranges
from lzy.checkpoint.image import Image
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.pages import present_pages

ZERO_PAGE = bytes(PAGE_BYTES)


def untouched(page: int) -> bytes:
    """What a page holds that no image has."""
    if not FILE_BASE <= page < FILE_BASE + FILE_PAGES * PAGE_BYTES:
        return ZERO_PAGE
    with open(mapped_file(), "rb") as file:
        file.seek(page - FILE_BASE)
        return file.read(PAGE_BYTES)


def stored_pages(image: Image) -> dict[int, bytes]:
    """{address: content} of the pages in space 0."""
    buffer = memoryview(bytearray(image.window_pages * PAGE_BYTES))
    found: dict[int, bytes] = {}
    first, last = image.space_extent(0)
    for index in range(first, last):
        address, mask, chunk = image.run(index)
        assert image.read_chunk(chunk, buffer) == mask.bit_count() * PAGE_BYTES
        for number, bit in enumerate(present_pages(mask)):
            at = number * PAGE_BYTES
            found[address + bit * PAGE_BYTES] = bytes(buffer[at : at + PAGE_BYTES])
    return found


def compare_memory(pid: int, found: dict[int, bytes]) -> None:
    """Every byte of the process's own pages is in `found`, and that has no others."""
    found = dict(found)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end in own_page_ranges(pid, proc.mappings(pid)):
            memory.seek(start)
            theirs = memory.read(end - start)
            pages = range(start, end, PAGE_BYTES)
            mine = b"".join(found.pop(page, None) or untouched(page) for page in pages)
            assert mine == theirs, f"something in {start:#x}-{end:#x} of {pid} differs"
    # A page of a file that was dropped left a mark until somebody looked: it shows the file.
    found = {page: content for page, content in found.items() if content != untouched(page)}
    assert not found, f"{len(found)} pages that {pid} does not have: {min(found):#x}"
