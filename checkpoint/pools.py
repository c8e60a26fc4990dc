"""Free pools of Python's allocator: memory that is the process's own and holds nothing.

pymalloc cuts arenas of 1 MiB into pools of four pages, and gives an arena back only when all of its
pools are free; one object that lives on keeps the other 63 pools. A pool that is free is, to the
allocator, a link in its arena's list and nothing else: if its size class says that it was never
used, its contents are never read again. So they can go.

The arenas are found without symbols, by what they are: an array of `struct arena_object` to which a
variable of the interpreter points, every list of free pools in it being what the arena says it is.
All is read from outside, while a thread of ours holds the GIL, without which nobody allocates.

Sources: Objects/obmalloc.c and Include/internal/pycore_obmalloc.h of CPython 3.10 to 3.13 (pools
were single pages before).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import Final, NamedTuple

from .linux import memory
from .proc import Vma

ARENA_BYTES: Final = 1 << 20
POOL_BYTES: Final = 16384
UNUSED: Final = 0xFFFF  # DUMMY_SIZE_IDX: the size class of a pool that was never used
VERSIONS: Final = range(10, 14)  # of Python 3: those with which this was tried
_ARENA: Final = struct.Struct("<QQIIQQQ")  # address, pool_address, nfreepools, ntotalpools,
# freepools, nextarena, prevarena
_POOL: Final = struct.Struct("<QQQQIIII")  # count, freeblock, nextpool, prevpool, arenaindex,
# szidx, nextoffset, maxnextoffset
_POOLS: Final = ARENA_BYTES // POOL_BYTES
_ARENAS_LIMIT: Final = 1 << 20
_BATCH: Final = 1024


class _Arena(NamedTuple):
    address: int
    pool_address: int
    free: int
    total: int
    first_free: int


def find_variables(pid: int, vmas: list[Vma], path: str) -> list[int]:
    """Where a pointer to the arenas may stand, in the variables of the interpreter at `path`.

    Those that point to what looks like the first of them; `list_free_pools` looks closer.
    """
    writable = _Ranges([v for v in vmas if v.kind == "anonymous" and v.protection & 3 == 3])
    pointers: dict[int, int] = {}
    for start, length_bytes in _variables(vmas, path):
        words = memoryview(_read(pid, start, length_bytes)).cast("Q")
        for index, word in enumerate(words):
            if not word & 15 and writable.holds(word, _ARENA.size):
                pointers[start + 8 * index] = word
    heads = _read_many(pid, list(pointers.values()), _ARENA.size)
    return [
        place
        for place, head in zip(pointers, heads, strict=True)
        if _is_arena(_Arena(*_ARENA.unpack(head)[:5]), writable)
    ]


def list_free_pools(pid: int, vmas: list[Vma], variables: list[int]) -> list[int]:
    """Addresses of all free pools that hold something; nobody may allocate meanwhile."""
    writable = _Ranges([v for v in vmas if v.kind == "anonymous" and v.protection & 3 == 3])
    found: list[int] = []
    for place in variables:
        (array,) = struct.unpack("<Q", _read(pid, place, 8))
        if writable.holds(array, _ARENA.size):
            pools = _free_pools_of(pid, _read_arenas(pid, array, writable))
            found = max(found, pools, key=len)
    return found


def _variables(vmas: list[Vma], path: str) -> list[tuple[int, int]]:
    """(address, length in bytes) of .data and .bss of a loaded file."""
    found = []
    for vma, behind in zip(vmas, [*vmas[1:], None], strict=True):
        if vma.path == path and vma.protection & 3 == 3:
            found.append((vma.start, vma.length))
            if behind and behind.start == vma.end and behind.kind == "anonymous":
                found.append((behind.start, min(behind.length, 4 << 20)))
    return found


class _Ranges:
    """Whether addresses are in any of some mappings."""

    def __init__(self, vmas: list[Vma]) -> None:
        self._starts = [vma.start for vma in vmas]
        self._ends = [vma.end for vma in vmas]

    def holds(self, address: int, length_bytes: int) -> bool:
        index = bisect_right(self._starts, address) - 1
        return index >= 0 and address + length_bytes <= self._ends[index]


def _is_arena(arena: _Arena, writable: _Ranges) -> bool:
    """Whether the fields fit each other as those of an arena that is in use do, or of none."""
    if not arena.address:
        return arena.free <= arena.total <= _POOLS
    end = arena.address + ARENA_BYTES
    return (
        not arena.address & 4095
        and writable.holds(arena.address, ARENA_BYTES)
        and arena.address <= arena.pool_address <= end
        and not arena.pool_address % POOL_BYTES
        and _POOLS - 1 <= arena.total <= _POOLS
        and arena.free <= arena.total
        and (not arena.first_free or arena.address <= arena.first_free < end)
        and not arena.first_free % POOL_BYTES
    )


def _read_arenas(pid: int, array: int, writable: _Ranges) -> list[_Arena]:
    """The arenas of an array, up to the first thing that is none."""
    arenas: list[_Arena] = []
    while len(arenas) < _ARENAS_LIMIT:
        place = array + _ARENA.size * len(arenas)
        count = _BATCH
        while count and not writable.holds(place, count * _ARENA.size):
            count //= 2
        if not count:
            break
        for fields in _ARENA.iter_unpack(_read(pid, place, count * _ARENA.size)):
            arena = _Arena(*fields[:5])
            if not _is_arena(arena, writable):
                return arenas
            arenas.append(arena)
    return arenas


def _free_pools_of(pid: int, arenas: list[_Arena]) -> list[int]:
    """The free pools of all arenas, but for those that were emptied before and not used since.

    None at all if any list is not what its arena says.
    """
    lists: dict[int, list[int]] = {}
    worn: list[int] = []
    heads = {index: a.first_free for index, a in enumerate(arenas) if a.address}
    for index, arena in enumerate(arenas):
        if arena.address:
            lists[index] = []
    heads = {index: pool for index, pool in heads.items() if pool}
    while heads:
        contents = _read_many(pid, list(heads.values()), _POOL.size)
        following: dict[int, int] = {}
        for (index, pool), content in zip(heads.items(), contents, strict=True):
            arena = arenas[index]
            count, _, after, _, owner, size_class, _, _ = _POOL.unpack(content)
            lists[index].append(pool)
            if size_class != UNUSED:
                worn.append(pool)
            if count & 0xFFFFFFFF or owner != index or len(lists[index]) > arena.total:
                return []
            if after:
                if after % POOL_BYTES or not arena.address <= after < arena.pool_address:
                    return []
                following[index] = after
        heads = following
    for index, pools in lists.items():
        arena = arenas[index]
        untouched = (arena.address + ARENA_BYTES - arena.pool_address) // POOL_BYTES
        if len(pools) + untouched != arena.free:
            return []
    return worn


def _read(pid: int, address: int, length_bytes: int) -> bytes:
    return _read_many(pid, [address], length_bytes)[0]


def _read_many(pid: int, addresses: list[int], length_bytes: int) -> list[bytes]:
    content = bytearray(length_bytes * len(addresses))
    if content:
        runs = [(address, length_bytes) for address in addresses]
        memory.read_process(pid, runs, memoryview(content))
    return [
        bytes(content[start : start + length_bytes])
        for start in range(0, len(content), length_bytes)
    ]
