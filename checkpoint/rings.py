"""io_urings made again inside the new process, at the addresses and numbers they had.

A fresh ring counts from zero; the program remembers how far its own had come. So requests that do
nothing are made until its counters agree; then what stood in its memory is written back.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from . import proc
from .batch import Batch
from .errors import Incompatible
from .interrogate import decode
from .linux import io_uring as kernel
from .linux import memory, process
from .linux.descriptors import EPOLL_CTL_ADD, pack_epoll_event
from .linux.detached import take_descriptor
from .tracee import Tracee

_IDLE_MS = 10  # after which a ring's thread sleeps; nothing tells what it was. libuv's choice

_LOWEST = 1 << 16  # vm.mmap_min_addr, usually
_HIGHEST = 0x7FFFFFFFF000  # of four levels of page tables
_FILLER = (
    memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | memory.MAP_NORESERVE | memory.MAP_FIXED_NOREPLACE
)


def make_rings(
    tracee: Tracee,
    descriptions: list[dict[str, Any]],
    places: dict[str, dict[str, Any]],
    vmas: list[dict[str, Any]],
) -> None:
    """Make every io_uring of a process, whose descriptors are `places`, and its mappings in `vmas`.

    When the threads exist: one that a ring has for itself might take the id of another. Raises
    Incompatible, KernelError.
    """
    numbers: dict[int, list[tuple[int, bool]]] = {}
    for text, place in places.items():
        numbers.setdefault(place["description"], []).append((int(text), place["close_on_exec"]))
    for index, entry in enumerate(descriptions):
        if entry["kind"] == "io_uring" and index in numbers:
            mapped = [v for v in vmas if v["kind"] == "ring" and v["inode"] == entry["inode"]]
            first = _create(tracee, entry)
            _fill(tracee, entry, first)
            _place(tracee, first, numbers[index], mapped)
            _watch(tracee, descriptions, places, index)


def _create(tracee: Tracee, entry: dict[str, Any]) -> int:
    """Have the process make a ring; its number for now."""
    leader = tracee.speaker
    batch = tracee.batch()
    parameters = batch.put(
        kernel.pack_parameters(entry["setup_flags"], entry["cq_entries"], _IDLE_MS)
    )
    made = batch.call(kernel.SYS_IO_URING_SETUP, entry["sq_entries"], parameters, tolerate=True)
    if (number := tracee.run(leader, batch).results[made]) < 0:
        raise Incompatible(
            f"the process has an io_uring, which cannot be made here: {os.strerror(-number)}",
            remedy="allow it (`sysctl kernel.io_uring_disabled=0`, the seccomp profile of a "
            "container), or restore elsewhere",
        )
    layout = kernel.unpack_layout(batch.read(parameters, kernel.PARAMETER_BYTES))
    if list(layout) != entry["layout"]:
        raise Incompatible(
            "this kernel lays io_urings out otherwise than the one the process was started under",
            remedy="restore under that kernel",
        )
    return number


def _fill(tracee: Tracee, entry: dict[str, Any], number: int) -> None:
    """Bring the ring's counters and its memory to what they were, on a duplicate of it."""
    layout = kernel.Layout(*entry["layout"])
    rings, requests = decode(entry["rings"]), decode(entry["requests"])
    taken, answered = (
        struct.unpack_from("<I", rings, place)[0] for place in (layout.sq_head, layout.cq_tail)
    )
    pidfd = proc.open_shared(tracee.pid)
    try:
        ring = take_descriptor(pidfd, number)
    finally:
        os.close(pidfd)
    try:
        kernel.run_counters(
            ring, layout, entry["sq_entries"], entry["cq_entries"], entry["setup_flags"],
            taken, answered,
        )  # fmt: skip
        with kernel.map_ring(ring, len(requests), kernel.OFFSET_REQUESTS) as mapped:
            mapped[: len(requests)] = requests
        with kernel.map_ring(ring, len(rings), kernel.OFFSET_RINGS) as mapped:
            mapped[layout.cqes : len(rings)] = rings[layout.cqes :]
            for place in (
                layout.sq_dropped, layout.cq_overflow, layout.cq_flags, layout.cq_head,
                layout.sq_tail,
            ):  # fmt: skip
                mapped[place : place + 4] = rings[place : place + 4]
    finally:
        os.close(ring)


def _place(
    tracee: Tracee, first: int, numbers: list[tuple[int, bool]], mapped: list[dict[str, Any]]
) -> None:
    """Put the ring at its addresses and under its numbers."""
    leader = tracee.speaker
    if mapped:
        fillers = _fill_up(tracee, mapped)
        for vma in mapped:
            _map_one(tracee, first, vma)
        batch = tracee.batch()
        for start, end in fillers:
            batch = _roomy(tracee, batch)
            batch.call(process.SYS_MUNMAP, start, end - start)
        tracee.run(leader, batch)
    batch = tracee.batch()
    for number, close_on_exec in numbers:
        flags = os.O_CLOEXEC if close_on_exec else 0
        batch.call(process.SYS_DUP3, first, number, flags, what="place an io_uring")
    batch.call(process.SYS_CLOSE, first)
    tracee.run(leader, batch)


def _fill_up(tracee: Tracee, mapped: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Leave no free address but those of `mapped`, each under a mapping of its own; what was added.

    The kernel chooses where an io_uring is mapped, and refuses to be told (io_uring/memmap.c).
    """
    taken = sorted(
        [(vma.start, vma.end, False) for vma in proc.mappings(tracee.witness, with_flags=False)]
        + [(vma["start"], vma["end"], True) for vma in mapped]
    )
    batch = tracee.batch()
    fillers = []
    position = _LOWEST
    for start, end, is_ring in [*taken, (_HIGHEST, _HIGHEST, False)]:
        if position < min(start, _HIGHEST):
            fillers.append((position, min(start, _HIGHEST)))
        if is_ring:
            fillers.append((start, end))
        position = max(position, end)
    for start, end in fillers:
        batch = _roomy(tracee, batch)
        batch.call(process.SYS_MMAP, start, end - start, 0, _FILLER, -1, 0, what="fill a gap")
    tracee.run(tracee.speaker, batch)
    rings = {(vma["start"], vma["end"]) for vma in mapped}
    return [filler for filler in fillers if filler not in rings]


def _roomy(tracee: Tracee, batch: Batch) -> Batch:
    """`batch`, or when it is full, and now run, a new one."""
    if not batch.full:
        return batch
    tracee.run(tracee.speaker, batch)
    return tracee.batch()


def _map_one(tracee: Tracee, first: int, vma: dict[str, Any]) -> None:
    """Free the place of one mapping and have the kernel choose it, for there is no other."""
    start, length = vma["start"], vma["end"] - vma["start"]
    protection = sum(
        bit for letter, bit in zip("rwx", (1, 2, 4), strict=False) if letter in vma["permissions"]
    )
    batch = tracee.batch()
    batch.call(process.SYS_MUNMAP, start, length)
    place = batch.call(
        process.SYS_MMAP, 0, length, protection, memory.MAP_SHARED, first, vma["offset"],
        what="map an io_uring",
    )  # fmt: skip
    for flag, advice in (("dc", memory.MADV_DONTFORK), ("dd", memory.MADV_DONTDUMP)):
        if flag in vma["flags"]:
            batch.call(process.SYS_MADVISE, start, length, advice, tolerate=True)
    tracee.run(tracee.speaker, batch)
    if batch.results[place] != start:
        raise Incompatible(
            f"this kernel does not map an io_uring at {start:#x}, where the process had it",
            remedy="restore on the machine it came from",
        )


def _watch(
    tracee: Tracee,
    descriptions: list[dict[str, Any]],
    places: dict[str, dict[str, Any]],
    index: int,
) -> None:
    """Have the epolls that watched the ring watch it again."""
    batch = tracee.batch()
    calls = 0
    for number, place in places.items():
        for target in descriptions[place["description"]].get("targets", ()):
            if target["description"] == index and not target["stale"]:
                calls += 1
                event = batch.put(pack_epoll_event(target["events"], target["data"]))
                batch.call(
                    process.SYS_EPOLL_CTL, int(number), EPOLL_CTL_ADD, target["number"], event,
                    tolerate=True,  # several numbers of one epoll: the second finds it there
                )  # fmt: skip
    if calls:
        tracee.run(tracee.speaker, batch)
