"""The memory of one process of an image, made again in a stub: mapped, filled, and protected."""

from __future__ import annotations

import threading
from _queue import SimpleQueue
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import Any

from . import proc, reinstate
from .batch import Batch
from .buffers import page_aligned
from .content import join_ranges, subtract, windows_of
from .errors import Damaged
from .image import Image
from .inheritance import AS_MAPPED
from .linux import PAGE_BYTES, memory, process
from .needed import file_key
from .pages import page_runs
from .rarities import MADE_LATER
from .tracee import Tracee
from .vdso import put_code

Progress = Callable[[str, int, int], None]

HOLE_BYTES = 64 << 20
CODE_OFFSET = 8 << 20
_PARK_OFFSET = 32 << 20
_LAZY_FROM_BYTES = 256 << 10
_MANY = 24  # windows, from which on they are filled in by two threads
_ADVICE = {
    "dc": memory.MADV_DONTFORK,
    "wf": memory.MADV_WIPEONFORK,
    "dd": memory.MADV_DONTDUMP,
    "mg": memory.MADV_MERGEABLE,
    "nh": memory.MADV_NOHUGEPAGE,
    "sr": memory.MADV_SEQUENTIAL,
    "rr": memory.MADV_RANDOM,
}


class Brought:
    """What a restore brings into the processes it makes, under numbers above all of theirs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.floor = 0
        """The first number that no process uses."""
        self.hole = 0
        """Addresses that no process uses, for our code."""
        self.files: dict[tuple[str, bool], int] = {}
        """(path, whether writable) of a mapped file to its number."""
        self.objects: list[int] = []
        self.readonly: dict[int, int] = {}
        """Object number to that of a read-only descriptor, where one is mapped so."""
        self.local: dict[int, int] = {}
        """Description index to number; there only while the processes are made."""
        self.directories: dict[str, int] = {}


class MemberMemory:
    """Its memory; the methods are steps, in order."""

    def __init__(self, image: Image, brought: Brought) -> None:
        """`image`: of this process by itself (`Image.member`), or of all if it is the first."""
        self.image = image
        self.brought = brought
        self.document: dict[str, Any] = image.document
        self.own: dict[str, Any] = self.document["process"]
        self.threads: list[dict[str, Any]] = self.document["threads"]
        self.vmas: list[dict[str, Any]] = self.document["vmas"]
        self.inherited = [(start, end) for start, end in self.document.get("inherited", ())]
        """Address ranges of the pages that come from its parent."""
        self.tracee: Tracee
        self.pid = 0
        """As the restorer sees it; 0 until it is born."""
        self.left = 0
        """How many windows were left to a pager."""
        first, last = image.space_extent(0)
        if first:
            raise Damaged(f"image {image.name} has pages before those of its address space")
        # A list is searched ten times faster than the table itself.
        self.windows: list[int] = image.runs[0 : last * 3 : 3].tolist()
        self.window_bytes = image.window_pages * PAGE_BYTES
        self.forked_from: MemberMemory | None = None
        """Its parent, if it is forked when that one's memory is mapped and filled."""
        self.protections: dict[int, int] = {}
        """The protection that each mapping has until `protect`, by its start."""

    def clear_addresses(self) -> None:
        """Unmap what is not its own; move the vDSO and the kernel's data pages to their places.

        What a child has as its parent has it stays: the mapping, without other pages than shared
        ones.
        """
        tracee, kept = self.tracee, join_ranges(self._kept_mappings)
        batch = tracee.batch()
        reinstate.add_no_words(batch, self.own)
        special = {"vdso": [v for v in self.vmas if v["kind"] == "vdso"]}
        special["vvar"] = [v for v in self.vmas if v["kind"] == "vvar"]
        parked: list[tuple[int, int, int]] = []
        park = self.brought.hole + _PARK_OFFSET
        gone: list[tuple[int, int]] = []
        places = {kind: iter(vmas) for kind, vmas in special.items()}
        for vma in proc.mappings(tracee.pid, with_flags=False):
            if self.brought.hole + CODE_OFFSET <= vma.start < self.brought.hole + HOLE_BYTES:
                continue
            if vma.kind == "vsyscall":
                continue
            target = next(places[vma.kind], None) if vma.kind in places else None
            if target and target["start"] == vma.start:
                continue
            if target is None:
                gone.append((vma.start, vma.end))
                continue
            flags = memory.MREMAP_MAYMOVE | memory.MREMAP_FIXED
            batch.call(
                process.SYS_MREMAP, vma.start, vma.length, vma.length, flags, park,
                what="park the vDSO",
            )  # fmt: skip
            parked.append((park, vma.length, target["start"]))
            park += vma.length
        for start, end in subtract(join_ranges(gone), kept):
            if batch.full:
                tracee.run(tracee.speaker, batch)
                batch = tracee.batch()
            batch.call(process.SYS_MUNMAP, start, end - start)
        for place, length, target_start in parked:
            flags = memory.MREMAP_MAYMOVE | memory.MREMAP_FIXED
            batch.call(
                process.SYS_MREMAP, place, length, length, flags, target_start,
                what="place the vDSO",
            )  # fmt: skip
        for start, end in subtract(kept, self.inherited):
            if batch.full:
                tracee.run(tracee.speaker, batch)
                batch = tracee.batch()
            batch.call(process.SYS_MADVISE, start, end - start, memory.MADV_DONTNEED)
        tracee.run(tracee.speaker, batch)

    @cached_property
    def _kept_mappings(self) -> list[tuple[int, int]]:
        """The mappings that it has from birth, being its parent's too; ascending.

        They have the protection that the parent's have then. Fills `protections`.
        """
        parent = self.forked_from
        if not parent:
            return []
        starts = [vma["start"] for vma in parent.vmas]
        found = []
        for vma in self.vmas:
            at = bisect_right(starts, vma["start"]) - 1
            if at < 0 or not _is_part(vma, parent.vmas[at]):
                continue
            found.append((vma["start"], vma["end"]))
            self.protections[vma["start"]] = parent.protections[starts[at]]
        return found

    def map(self) -> None:
        """Map everything, writable for now; what is executable becomes so in `_protect`."""
        tracee = self.tracee
        leader = tracee.speaker
        batch = tracee.batch()
        for vma in self.vmas:
            if vma["kind"] in MADE_LATER:
                continue
            if batch.full:
                tracee.run(leader, batch)
                batch = tracee.batch()
            if vma["start"] in self.protections:
                self._make_writable(batch, vma)
                continue
            self.protections[vma["start"]] = self._map_one(batch, vma)
        tracee.run(leader, batch)
        put_code(tracee.memory, self.vmas)

    def _make_writable(self, batch: Batch, vma: dict[str, Any]) -> None:
        """Add the call that lets pages be written into a mapping that it has from birth."""
        if self.protections[vma["start"]] & memory.PROT_WRITE:
            return
        if self._has_pages(vma) or self._has_changes(vma):
            protection = memory.PROT_READ | memory.PROT_WRITE
            batch.call(process.SYS_MPROTECT, vma["start"], vma["end"] - vma["start"], protection)
            self.protections[vma["start"]] = protection

    def _map_one(self, batch: Batch, vma: dict[str, Any]) -> int:
        """Add the call that maps one VMA; the protection it gets for now."""
        if vma["kind"] == "segment":
            return self._attach(batch, vma)
        flags = set(vma["flags"])
        shared = vma["permissions"][3] == "s"
        how = memory.MAP_FIXED_NOREPLACE | (memory.MAP_SHARED if shared else memory.MAP_PRIVATE)
        protection = memory.PROT_READ | memory.PROT_WRITE
        descriptor, offset = -1, 0
        if vma["kind"] == "anonymous":
            how |= memory.MAP_ANONYMOUS
            if "dp" in flags:
                how = how & ~memory.MAP_PRIVATE | memory.MAP_DROPPABLE
            if "gd" in flags:
                how |= memory.MAP_GROWSDOWN
            if not self._has_pages(vma):
                protection = _protection(vma)
        elif vma["kind"] == "huge":
            from .linux.hugepages import MAP_HUGETLB, size_flag

            how |= memory.MAP_ANONYMOUS | MAP_HUGETLB | size_flag(proc.huge_page_bytes(flags))
        else:
            offset = vma["offset"]
            if is_readonly(vma):
                descriptor = self.brought.readonly[vma["object"]]
            elif vma["kind"] == "memory":
                descriptor = self.brought.objects[vma["object"] - 1]
            else:
                descriptor = self.brought.files[file_key(vma)]
            if shared and "mw" not in flags:
                protection = memory.PROT_READ
            if not shared and not self._has_pages(vma) and not self._has_changes(vma):
                protection = _protection(vma)
        if "nr" in flags:
            how |= memory.MAP_NORESERVE
        batch.call(
            process.SYS_MMAP, vma["start"], vma["end"] - vma["start"], protection, how,
            descriptor, offset, what=f"map {vma.get('path', 'anonymous memory')}",
        )  # fmt: skip
        if "hg" in flags:
            # Before the pages are written: they then come as huge pages, and 2.5 times as fast.
            batch.call(
                process.SYS_MADVISE, vma["start"], vma["end"] - vma["start"],
                memory.MADV_HUGEPAGE, tolerate=True,
            )  # fmt: skip
        return protection

    @staticmethod
    def _attach(batch: Batch, vma: dict[str, Any]) -> int:
        """Add the call that attaches System V shared memory, all of it at its first mapping."""
        from .linux import sysv

        is_readonly = "mw" not in vma["flags"]
        if not vma["offset"]:
            batch.call(
                sysv.SYS_SHMAT, vma["segment_here"], vma["start"],
                sysv.SHM_RDONLY if is_readonly else 0, what="attach shared memory",
            )  # fmt: skip
        return memory.PROT_READ if is_readonly else memory.PROT_READ | memory.PROT_WRITE

    def _has_pages(self, vma: dict[str, Any]) -> bool:
        """Whether the image holds pages of this mapping."""
        if vma["permissions"][3] == "s":
            return False
        first, last = self._runs_of(vma)
        if last - first > 2:
            return True
        return any(  # the windows at its ends may hold pages of neighbours only
            start < vma["end"] and start + length > vma["start"]
            for index in range(first, last)
            for start, length in page_runs([self.image.run(index)[:2]])
        )

    def _has_changes(self, vma: dict[str, Any]) -> bool:
        """Whether pages over the file's are to be written, be they only zeros."""
        return any(s < vma["end"] and e > vma["start"] for s, e in self.document["changed"])

    def _runs_of(self, vma: dict[str, Any]) -> tuple[int, int]:
        """The range of run records whose windows touch the VMA (those at its ends may not)."""
        low = bisect_left(self.windows, vma["start"] & -self.window_bytes)
        return low, bisect_left(self.windows, vma["end"], low)

    def find_lazy(self) -> list[dict[str, Any]]:
        """Mappings worth leaving to the pager: private anonymous memory of some size.

        userfaultfd(2) hears of missing pages of anonymous memory; a stack that grows, locked
        memory and small mappings are loaded at once.
        """
        return [
            vma
            for vma in self.vmas
            if vma["kind"] == "anonymous"
            and vma["permissions"][3] == "p"
            and not {"gd", "lo", "dp", "io", "pf", "wf"} & set(vma["flags"])
            and vma["end"] - vma["start"] >= _LAZY_FROM_BYTES
            and self._has_pages(vma)
        ]

    def fill(
        self,
        lazy: list[dict[str, Any]],
        shared: list[tuple[int, int]],
        progress: Progress | None,
        *,
        alone: bool = False,
    ) -> None:
        """Write in what must be there from the start; `left` windows are left to the pager.

        `alone`: by the thread that calls.

        A window is left when all of it lies in one lazy mapping: those at the ends of a mapping
        may hold pages of its neighbours too.
        """
        later = self.find_later(lazy)
        at_once = {self._window_of(address) for address in self._needed_at_once()}
        if lazy:
            at_once.update(self._windows_of(shared))
        indexes = sorted(i for part in later for i in at_once if i in part)
        self.left = sum(map(len, later)) - len(indexes)
        position = 0
        for part in later:
            indexes += range(position, part.start)
            position = part.stop
        indexes += range(position, len(self.windows))
        Filler(self.image, self.pid, progress).fill(indexes, alone=alone)
        self._fill_zeros(self.pid)

    def find_later(self, lazy: list[dict[str, Any]]) -> list[range]:
        """The run records of each lazy mapping whose windows lie in it wholly."""
        later = []
        for vma in lazy:
            low = bisect_left(self.windows, vma["start"])
            high = bisect_left(self.windows, vma["end"] - self.window_bytes + 1, low)
            later.append(range(low, high))
        return later

    def _windows_of(self, shared: list[tuple[int, int]]) -> set[int]:
        """The run records that hold any of these pages."""
        found: set[int] = set()
        for start, end in shared:
            low = bisect_left(self.windows, start & -self.window_bytes)
            found.update(range(low, bisect_left(self.windows, end, low)))
        return found

    def _window_of(self, address: int) -> int:
        """The index of the run record whose window holds `address`, or -1."""
        index = bisect_left(self.windows, address & -self.window_bytes)
        found = index < len(self.windows) and address - self.windows[index] in range(
            self.window_bytes
        )
        return index if found else -1

    def _fill_zeros(self, pid: int) -> None:
        """Zero the pages that the process zeroed over a file's bytes; no chunk holds them."""
        zeros = memoryview(bytearray(self.image.window_pages * PAGE_BYTES))
        for address, wanted in windows_of(self.document["changed"], self.image.window_pages):
            index = self._window_of(address)
            missing = wanted & ~(self.image.run(index)[1] if index >= 0 else 0)
            for run in page_runs([(address, missing)]):
                memory.write_process(pid, [run], zeros[: run[1]])

    def _needed_at_once(self) -> list[int]:
        """Addresses the kernel or the first instructions touch: stacks, thread blocks, lists."""
        found: list[int] = []
        for thread in self.threads:
            registers = thread["registers"]
            stack = registers["rsp"]
            found += [stack - PAGE_BYTES, stack, stack + 4 * PAGE_BYTES, registers["fs_base"]]
            found += [thread["clear_tid_address"], thread["robust_list"][0]]
            if thread["rseq"]:
                found.append(thread["rseq"][0])
        return found

    def protect(self) -> None:
        """Give each mapping its protection, advice, locks and guards."""
        tracee = self.tracee
        leader = tracee.speaker
        batch = tracee.batch()
        for vma in self.vmas:
            if vma["kind"] in MADE_LATER:
                continue
            if batch.full:
                tracee.run(leader, batch)
                batch = tracee.batch()
            start, length, flags = vma["start"], vma["end"] - vma["start"], set(vma["flags"])
            protection = _protection(vma)
            if protection != self.protections[start]:
                batch.call(process.SYS_MPROTECT, start, length, protection, what="protect memory")
            for flag in sorted(flags & _ADVICE.keys()):
                batch.call(process.SYS_MADVISE, start, length, _ADVICE[flag], tolerate=True)
            if policy := self.document["memory_policies"].get(f"{start:x}"):
                reinstate.add_memory_policy(batch, start, length, policy)
            if "lo" in flags:
                on_fault = memory.MLOCK_ONFAULT if "lf" in flags else 0
                # On PROT_NONE memory the kernel locks, and then answers ENOMEM.
                batch.call(
                    process.SYS_MLOCK2, start, length, on_fault,
                    tolerate=not protection, what="lock memory",
                )  # fmt: skip
        for start, end in self.document["guards"]:
            batch.call(process.SYS_MADVISE, start, end - start, memory.MADV_GUARD_INSTALL)
        tracee.run(leader, batch)

    def read_image(self, address: int, length_bytes: int) -> bytes:
        """Bytes of the process's memory as the image has them; zeros where it has none."""
        found = bytearray(length_bytes)
        size = self.image.window_pages * PAGE_BYTES
        buffer = bytearray(size)
        window = address & -size
        while window < address + length_bytes:
            index = self.image.find_run(0, window)
            if index >= 0:
                _, mask, chunk = self.image.run(index)
                self.image.read_chunk(chunk, memoryview(buffer))
                position = 0
                for start, length in page_runs([(window, mask)]):
                    first, last = max(start, address), min(start + length, address + length_bytes)
                    if first < last:
                        at = position + first - start
                        found[first - address : last - address] = buffer[at : at + last - first]
                    position += length
            window += size
        return bytes(found)


class Filling:
    """Fills one process after the other in a thread of its own, while others are mapped.

    We must not fork meanwhile: what that thread holds would be held in the child for ever.
    """

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._is_given_up = False

    def begin(self, fill: Callable[[], None]) -> None:
        """Have that done once all that was begun before is."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work)
            self._thread.start()
        self._waiting.put(fill)

    def _work(self) -> None:
        while fill := self._waiting.get():
            try:
                if not self._failure and not self._is_given_up:
                    fill()
            except BaseException as error:
                self._failure = error

    def finish(self) -> None:
        """Wait until all is done; raises what was raised first."""
        self._end()
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Begin nothing more, if it was not finished."""
        self._is_given_up = True
        self._end()

    def _end(self) -> None:
        if self._thread:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None


class Filler:
    """Writes windows of an image into a stopped process, with two threads when there is much."""

    def __init__(self, image: Image, pid: int, progress: Progress | None) -> None:
        self.image, self.pid, self.progress = image, pid, progress
        self._failure: BaseException | None = None
        self._done = 0

    def fill(self, indexes: list[int] | range, *, alone: bool) -> None:
        """Write the windows of these run records; raises Damaged or StoreUnavailable.

        `alone`: in this thread only.
        """
        if len(indexes) < _MANY or alone:
            self._fill_part(indexes)
        else:
            helper = threading.Thread(target=self._fill_part, args=(indexes[1::2],))
            helper.start()
            self._fill_part(indexes[0::2])
            helper.join()
        if self._failure:
            raise self._failure

    def _fill_part(self, indexes: list[int] | range) -> None:
        size = self.image.window_pages * PAGE_BYTES
        buffer = page_aligned(size)[2]
        total = len(indexes) * 2 * size
        held, length = -1, 0  # the chunk in the buffer; many windows of one value are one chunk
        try:
            for count, index in enumerate(indexes):
                address, mask, chunk = self.image.run(index)
                if chunk != held:
                    held, length = chunk, self.image.read_chunk(chunk, buffer)
                if length != mask.bit_count() * PAGE_BYTES:
                    raise Damaged(f"chunk {chunk} of image {self.image.name} does not fit its mask")
                memory.write_process(self.pid, page_runs([(address, mask)]), buffer[:length])
                if self._failure:
                    return
                if self.progress and count % 64 == 0 and indexes[0] % 2 == 0:
                    self.progress("loading", count * 2 * size, total)
        except BaseException as error:
            self._failure = error


def is_readonly(vma: dict[str, Any]) -> bool:
    """Whether it maps an unnamed file shared, without leave ever to write (VM_MAYWRITE)."""
    return vma["kind"] == "memory" and vma["permissions"][3] == "s" and "mw" not in vma["flags"]


def _protection(vma: dict[str, Any]) -> int:
    text: str = vma["permissions"]
    return (text[0] == "r") | (text[1] == "w") << 1 | (text[2] == "x") << 2


def _is_part(vma: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a private mapping is one of its parent's or a part of it, but for what comes last."""
    if vma["kind"] not in ("anonymous", "file", "memory") or vma["kind"] != other["kind"]:
        return False
    if "s" in vma["permissions"] + other["permissions"] or vma["end"] > other["end"]:
        return False
    if set(vma["flags"]) & AS_MAPPED != set(other["flags"]) & AS_MAPPED:
        return False
    if vma["kind"] == "anonymous":
        return True
    file = "object" if vma["kind"] == "memory" else "path"
    offset, others = vma["offset"] - vma["start"], other["offset"] - other["start"]
    return bool(vma[file] == other[file] and offset == others)
