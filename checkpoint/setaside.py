"""Huge pages that are set aside (hugetlbfs): memory of them is made of pages as large again.

They are not the transparent ones, which the kernel makes of any memory: a program asks for them
(MAP_HUGETLB, MFD_HUGETLB), and an administrator has put them by. Their number is looked at before
anything of a restore is made, since a mapping takes what it may ever need when it is made.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .errors import Incompatible
from .linux import PAGE_BYTES, hugepages
from .proc import huge_page_bytes


def refuse_too_few(image: str, members: Iterable[dict[str, Any]], objects: list[Any]) -> None:
    """Raise Incompatible if fewer are free than the processes of an image need."""
    needed = count_needed(members, objects)
    for size_bytes, count in sorted(needed.items()):
        free = hugepages.count_free(size_bytes)
        if free < count:
            size = f"{size_bytes >> 20} MiB"
            raise Incompatible(
                f"image {image} needs {count} huge pages of {size}, and {max(free, 0)} are free",
                remedy=f"have {count - max(free, 0)} more set aside: raise the number in "
                f"{hugepages.pool(size_bytes)}/nr_hugepages; or restore where they are",
            )


def count_needed(members: Iterable[dict[str, Any]], objects: list[Any]) -> Counter[int]:
    """How many of each size (in bytes) they need: of private memory, and of files of them."""
    needed: Counter[int] = Counter()
    for member in members:
        for vma in member["vmas"]:
            size_bytes = huge_page_bytes(vma["flags"])
            if size_bytes and vma["permissions"][3] == "p":
                needed[size_bytes] += (vma["end"] - vma["start"]) // size_bytes
    for described in objects:
        if size_bytes := described.get("huge_page_bytes", 0):
            needed[size_bytes] += described["length_bytes"] // size_bytes
    return needed


def make_file(name: str, size_bytes: int) -> int:
    """A memory file of huge pages of that size."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | hugepages.MFD_HUGETLB
    return os.memfd_create(name, flags | hugepages.size_flag(size_bytes))


def page_bytes_of(fd: int) -> int:
    """How large the huge pages are of which the file behind `fd` is made; 0: it is not."""
    size_bytes = os.fstat(fd).st_blksize
    return size_bytes if size_bytes > PAGE_BYTES and hugepages.lies_in_them(fd) else 0
