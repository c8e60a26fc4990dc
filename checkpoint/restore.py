"""An image into a running process, step by step.

The process is made with its old pid as a stub of a few bytes, traced by us, and then makes itself
into what it was by system calls that we inject as lists: mappings, threads, signals, timers,
rights. Memory is written in before it runs (eager), or left out and served by a pager as it is
touched (lazy).

*Guarantee*: nothing of the process runs before everything is in place. Until the last step
(`commit`) the death of the restorer kills the unfinished process; the image stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import birth, machine, proc, reinstate, resources
from .buffers import page_aligned
from .content import windows_of
from .elf import build_id
from .errors import Busy, Damaged, Incompatible, KernelError, LzyError, NotFound
from .harbour import make_harbour
from .history import remember_restored
from .host import check_host
from .image import Image
from .interrogate import decode
from .interrupts import Deferred
from .linux import PAGE_BYTES, layouts, memory, process, ptrace, uffd
from .linux.detached import take_descriptor
from .linux.process import SYS_PRCTL
from .machine import Call
from .pages import page_runs
from .rarities import MADE_LATER, make_rarities
from .stages import reach
from .tracee import Batch, Thread, Tracee

if TYPE_CHECKING:
    from .pager import PagerStart

Progress = Callable[[str, int, int], None]

_HOLE_BYTES = 64 << 20
_ARENA_BYTES = 4 << 20
_ARENA_OFFSET = 16 << 20
_CODE_OFFSET = 8 << 20
_PARK_OFFSET = 32 << 20
_LAZY_FROM_BYTES = 256 << 10
_ADVICE = {
    "dc": memory.MADV_DONTFORK,
    "wf": memory.MADV_WIPEONFORK,
    "dd": memory.MADV_DONTDUMP,
    "mg": memory.MADV_MERGEABLE,
    "nh": memory.MADV_NOHUGEPAGE,
    "sr": memory.MADV_SEQUENTIAL,
    "rr": memory.MADV_RANDOM,
}
_DELETED = " (deleted)"


class RestoreReport(NamedTuple):
    """What a restore did: times in seconds, `pid` as seen from here."""

    image: str
    pid: int
    pid_in_namespace: int
    lazy: bool
    namespace: str
    first_instruction_s: float
    total_s: float
    pager_pid: int | None
    notes: list[str]


def restore(
    image: Image,
    *,
    eager: bool = False,
    pid_namespace: str = "auto",
    stdin: str | None = None,
    stdout: str | None = None,
    stderr: str | None = None,
    accept_changed_files: bool = False,
    session: str | None = None,
    progress: Progress | None = None,
) -> RestoreReport:
    """Make the process of `image` again and let it run, detached.

    Its next checkpoint continues the session that `image` is of, or begins `session`.

    `pid_namespace` is host (its old pid here), new (a namespace of its own) or auto. A mapped or
    open file that changed is refused unless `accept_changed_files`. Raises
    Incompatible, Busy (pid taken), Damaged, KernelError; no process is left behind then.
    """
    options = resources.RestoreOptions(
        stdin=stdin, stdout=stdout, stderr=stderr, accept_changed_files=accept_changed_files
    )
    return Restorer(image, eager, session, progress).restore(pid_namespace, options)


class Restorer:
    """One restore; its methods are its steps, in order."""

    def __init__(
        self, image: Image, eager: bool, session: str | None, progress: Progress | None
    ) -> None:
        self.began = time.monotonic()
        self.image = image
        self.eager = eager
        self.session = session
        self.progress = progress
        self.document: dict[str, Any] = image.document
        self.own: dict[str, Any] = self.document["process"]
        self.threads: list[dict[str, Any]] = self.document["threads"]
        self.vmas: list[dict[str, Any]] = self.document["vmas"]
        first, last = image.space_extent(0)
        if first:
            raise Damaged(f"image {image.name} has pages before those of its address space")
        # A list is searched ten times faster than the table itself.
        self.windows: list[int] = image.runs[0 : last * 3 : 3].tolist()
        self.window_bytes = image.window_pages * PAGE_BYTES
        self.notes: list[str] = []
        self.objects: list[int] = []
        self.files: dict[tuple[str, bool], int] = {}
        self.local: dict[int, int] = {}
        self.harbour: tuple[()] | tuple[int, int] = ()  # numbers in the process
        self.unlike: set[int] = set()  # starts of mappings whose protection is not the last yet

    # -- the way ---------------------------------------------------------------------------------

    def restore(self, pid_namespace: str, options: resources.RestoreOptions) -> RestoreReport:
        """All steps; see the module."""
        born: birth.Birth | None = None
        tracee: Tracee | None = None
        pager: PagerStart | None = None
        faults = -1
        try:
            # 1. Refuse what cannot succeed before anything is made.
            if self.document.get("format") != 1:
                raise Damaged(f"image {self.image.name} has an unknown document format")
            check_host(self.document["host"], self.image.name)
            if self.document.get("members") or self.document.get("zombies"):
                raise Incompatible(f"image {self.image.name} is of several processes")
            wanted = self._wanted()
            new_namespace = self._choose_namespace(pid_namespace, wanted)
            self._open_files(options.accept_changed_files)
            # 2. Contents of unnamed files, then the descriptors, all in this process.
            self._make_objects()
            self.local = resources.make_descriptors(
                self.document["descriptors"], _Source(self.objects), options
            )
            reach("restore.checked")
            # 3. A process with the old pid, stopped in our stub.
            lazy = [] if self.eager else self._lazy_vmas()
            try:
                born = self._give_birth(wanted, new_namespace, with_harbour=bool(lazy))
            except Busy:  # the pid was free a moment ago: somebody restores the image, too
                if new_namespace or pid_namespace != "auto":
                    raise
                self.notes.append(_lives_apart(wanted.pid))
                new_namespace = True
                born = self._give_birth(wanted, new_namespace, with_harbour=bool(lazy))
            tracee = self._enter(born.pid)
            # 4. Its memory.
            self._clear_addresses(tracee)
            self._map(tracee)
            reach("restore.mapped")
            # 5. The descriptor by which missing pages will be heard of, before there are threads:
            #    the kernel takes a grace period (10 ms) to enlarge a table that they share.
            faults, number = self._make_faults(tracee) if lazy else (-1, -1)
            left = self._fill(tracee, lazy if faults >= 0 else [])
            reach("restore.filled")
            self._protect(tracee)
            # 6. What the process as a whole has; its threads, and what each of them has.
            self._reinstate_process(tracee, [] if left or number < 0 else [number], paging=left > 0)
            new_threads = self._make_threads(tracee, wanted.pid)
            make_rarities(tracee, self.document, new_threads)
            reach("restore.threads")
            self._reinstate_threads(tracee, new_threads, wanted.pid)
            for vma in lazy if left else []:
                uffd.register(faults, vma["start"], vma["end"] - vma["start"])
            if left:
                pager = self._begin_pager(born.pid, faults, number, lazy)
            reach("restore.registered")
            resources.finish_descriptors(
                self.document["descriptors"],
                self.local,
                pids={self.document["descriptors"]["pid"]: born.pid},
                tids={t["tid"]: new.tid for t, new in zip(self.threads, new_threads, strict=True)},
            )
            remember_restored(self.image, born.pid, self.session, self.notes)
            self._leave(tracee, new_threads)
            # 7. The process runs, whether its pager is ready or not: a fault waits for it.
            reach("restore.paging")
            self._commit(tracee, new_threads)
            first_instruction_s = time.monotonic() - self.began
            reach("restore.committed")
        except BaseException:
            if born:
                _undo(born)
            if pager:  # it leaves, now that the process is gone
                with contextlib.suppress(LzyError):
                    pager.wait()
            raise
        finally:
            if tracee:
                tracee.close()
            resources.close_descriptors(self.local)
            for descriptor in [*self.objects, *self.files.values(), *([faults] * (faults >= 0))]:
                os.close(descriptor)
        try:
            pager_pid = pager.wait() if pager else None
        except KeyboardInterrupt:
            pager_pid = None
            self.notes.append("interrupted while its pager got ready; see lzy pager --status")
        except LzyError as error:
            raise LzyError(
                f"process {born.pid} is restored, but {error.message}",
                remedy=f"it waits for its memory; run: lzy pager --resume {born.pid}",
                pid=born.pid,
            ) from error
        return RestoreReport(
            image=self.image.name,
            pid=born.pid,
            pid_in_namespace=wanted.pid,
            lazy=pager is not None,
            namespace="new" if new_namespace else "host",
            first_instruction_s=first_instruction_s,
            total_s=time.monotonic() - self.began,
            pager_pid=pager_pid,
            notes=self.notes,
        )

    # -- 1. checks -------------------------------------------------------------------------------

    def _wanted(self) -> birth.Wanted:
        own = self.own
        return birth.Wanted(
            pid=self.document["pid"],
            parent=own["parent"],
            group=own["group"],
            session=own["session"],
            tids=frozenset(t["tid"] for t in self.threads),
        )

    def _choose_namespace(self, choice: str, wanted: birth.Wanted) -> bool:
        """Whether a new PID namespace is needed. Raises Busy if `host` is asked for and taken."""
        taken = birth.await_free_numbers(wanted)
        if choice == "new":
            return True
        if choice == "host" or not taken:
            if taken:
                raise Busy(
                    f"pid {taken[0]} of image {self.image.name} is taken" + birth.by_whom(taken[0]),
                    remedy="wait until it ends, or restore with --pid-namespace new",
                    pid=taken[0],
                )
            if os.getppid() == wanted.parent:
                return False
            if choice == "auto" and self._watches_parent():
                self.notes.append(
                    f"the process watches its parent (pid {wanted.parent}), which did not start "
                    "this restore: it lives in a new PID namespace with a stand-in for it"
                )
                return True
            if self._has_death_signal():
                # Its parent would be this command, whose end would bring the signal at once.
                self.notes.append("it is not signalled when its parent ends any more (PDEATHSIG)")
                for thread in self.threads:
                    thread["death_signal"] = 0
            return False
        self.notes.append(_lives_apart(taken[0]))
        return True

    def _has_death_signal(self) -> bool:
        return any(thread["death_signal"] for thread in self.threads)

    def _watches_parent(self) -> bool:
        """Whether the process ends, or acts, when its parent changes, as Jupyter kernels do."""
        if self._has_death_signal():
            return True
        layout = self.own["layout"]
        text = self._read_image(layout["env_start"], layout["env_end"] - layout["env_start"])
        return b"JPY_PARENT_PID=" in text

    def _read_image(self, address: int, length_bytes: int) -> bytes:
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

    def _open_files(self, accept_changed: bool) -> None:
        """Open every mapped file and the executable; raises Incompatible when one has changed."""
        for vma in self.vmas:
            if vma["kind"] != "file":
                continue
            key = self._file_key(vma)
            if key in self.files:
                continue
            path, writable = key
            try:
                descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            except OSError as error:
                raise Incompatible(
                    f"image {self.image.name} needs {path}, which cannot be opened here: "
                    f"{error.strerror}",
                    remedy="bring the file back, or restore on a node that has it",
                    path=path,
                ) from error
            self.files[key] = descriptor
            if (expected := vma.get("file")) and not accept_changed:
                self._compare_file(path, descriptor, expected)
        path = self.own["exe"]
        if not self.own["exe_object"] and (path, False) not in self.files:
            try:
                self.files[path, False] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise Incompatible(
                    f"the executable {path} cannot be opened here: {error.strerror}",
                    remedy="bring it back, or restore on a node that has it",
                    path=path,
                ) from error

        root, cwd = self.own["root"], self.own["cwd"]
        if not cwd.endswith(_DELETED) and not os.path.isdir(os.path.join(root, cwd.lstrip("/"))):
            raise Incompatible(
                f"the working directory {cwd} of image {self.image.name} is not here",
                remedy="make it again, or restore on a node that has it",
                path=cwd,
            )

    @staticmethod
    def _file_key(vma: dict[str, Any]) -> tuple[str, bool]:
        shared = vma["permissions"][3] == "s"
        return vma["path"], shared and "mw" in vma["flags"]

    def _compare_file(self, path: str, descriptor: int, expected: dict[str, Any]) -> None:
        status = os.fstat(descriptor)
        if expected["build_id"]:
            same = build_id(descriptor) == expected["build_id"]
        else:
            same = status.st_mtime_ns == expected["modified_ns"]
        if not same or status.st_size != expected["size_bytes"]:
            raise Incompatible(
                f"{path} has changed since image {self.image.name} was taken "
                f"({expected['size_bytes']} bytes then, {status.st_size} now)",
                remedy="put the old file back, or say --accept-changed-files",
                path=path,
            )

    # -- 2. contents -----------------------------------------------------------------------------

    def _make_objects(self) -> None:
        """Make a memory file for each unnamed file, and fill it."""
        size = self.image.window_pages * PAGE_BYTES
        buffer = page_aligned(size)[2]
        for described in self.document["objects"]:
            name = os.path.basename(described["name"].removesuffix(" (deleted)"))
            name = name.removeprefix("memfd:")[:200] or "lzy"
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.objects.append(descriptor)
            os.ftruncate(descriptor, described["length_bytes"])
            first, last = self.image.space_extent(described["space"])
            for index in range(first, last):
                address, mask, chunk = self.image.run(index)
                self.image.read_chunk(chunk, buffer)
                position = 0
                for start, length in page_runs([(address, mask)]):
                    wanted = min(length, described["length_bytes"] - start)
                    if wanted > 0:
                        os.pwrite(descriptor, buffer[position : position + wanted], start)
                    position += length
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, *described["owner"])
            os.fchmod(descriptor, described["mode"])

    # -- 3. birth --------------------------------------------------------------------------------

    def _give_birth(
        self, wanted: birth.Wanted, new_namespace: bool, *, with_harbour: bool
    ) -> birth.Birth:
        """The process, stopped in our stub; its harbour is a pair of sockets for its pager."""
        self.hole = self._find_hole()
        executable = os.memfd_create("lzy-stub", os.MFD_CLOEXEC)
        # What the process must inherit besides its own descriptors goes above all their numbers.
        floor = max(
            resources.free_number(self.document["descriptors"]), *self.local.values(), 100
        ) + 1  # fmt: skip
        self.inherited = {}
        for key, descriptor in self.files.items():
            self.inherited[key] = fcntl.fcntl(descriptor, fcntl.F_DUPFD, floor)
        self.inherited_objects = [
            fcntl.fcntl(descriptor, fcntl.F_DUPFD, floor) for descriptor in self.objects
        ]
        stub = fcntl.fcntl(executable, fcntl.F_DUPFD_CLOEXEC, floor)
        os.close(executable)
        os.write(stub, machine.tiny_executable(machine.CODE, self.hole))
        # Memory that may not be written (a sealed memfd) can only be mapped from such a descriptor.
        self.inherited_readonly = {
            number: fcntl.fcntl(descriptor, fcntl.F_DUPFD, floor)
            for number, descriptor in self._open_readonly().items()
        }
        self.harbour = make_harbour(floor) if with_harbour else ()
        keep = [
            *self.inherited.values(),
            *self.inherited_objects,
            *self.inherited_readonly.values(),
            *self.harbour,
            stub,
        ]

        def become() -> None:
            if self.own["root"] != "/":
                os.chroot(self.own["root"])
            _enter_directory(self.own["cwd"])
            resources.place_descriptors(self.document["descriptors"], self.local, keep)

        try:
            born = birth.give_birth(
                wanted,
                stub,
                new_namespace=new_namespace,
                offsets=self._clock_offsets(),
                become=become,
            )
        finally:
            for descriptor in keep:
                os.close(descriptor)
        reach("restore.created")
        return born

    def _open_readonly(self) -> dict[int, int]:
        """For each object that is mapped without leave to write: a read-only descriptor of it."""
        opened: dict[int, int] = {}
        for vma in self.vmas:
            if _is_readonly(vma) and vma["object"] not in opened:
                path = f"/proc/self/fd/{self.objects[vma['object'] - 1]}"
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self.files[f"object {vma['object']}", False] = descriptor  # closed at the end
                opened[vma["object"]] = descriptor
        return opened

    def _clock_offsets(self) -> dict[str, int] | None:
        """How far the process's clocks are ahead of the machine's, if otherwise than ours.

        They are when it comes from another boot or machine, or came from one when it was restored.
        """
        host = self.document["host"]
        own = proc.clock_offsets(os.getpid())
        if host["boot_id"] == proc.boot_id():
            wanted = host["clock_offsets"]
        else:
            now = (
                time.clock_gettime_ns(time.CLOCK_MONOTONIC),
                time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            )
            wanted = {
                "monotonic": host["monotonic_ns"] - now[0] + own["monotonic"],
                "boottime": host["boottime_ns"] - now[1] + own["boottime"],
            }
        return None if wanted == own else wanted

    def _find_hole(self) -> int:
        """Addresses that neither the image nor a fresh program uses, for our code."""
        address = 0x1000000000
        for vma in self.vmas:
            if vma["end"] <= address:
                continue
            if vma["start"] >= address + _HOLE_BYTES:
                break
            address = (vma["end"] + 0xFFFFFFF) & ~0xFFFFFFF
        if address > 0x700000000000:
            raise LzyError(f"no free addresses between the mappings of image {self.image.name}")
        return address

    def _enter(self, pid: int) -> Tracee:
        """Take hold of the stopped stub: our code on an anonymous page, an arena for batches."""
        tracee = Tracee.newborn(pid, self.hole)
        leader = tracee.threads[pid]
        place = self.hole + _CODE_OFFSET
        wanted = memory.PROT_READ | memory.PROT_EXEC
        kind = memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | memory.MAP_FIXED_NOREPLACE
        _check(
            tracee.run_one(leader, Call(process.SYS_MMAP, (place, PAGE_BYTES, wanted, kind, -1, 0)))
        )
        os.pwrite(tracee.memory, machine.CODE, place)
        tracee.code = place
        tracee.arena = self.hole + _ARENA_OFFSET
        tracee.arena_bytes = _ARENA_BYTES
        wanted = memory.PROT_READ | memory.PROT_WRITE
        arena = Call(process.SYS_MMAP, (tracee.arena, _ARENA_BYTES, wanted, kind, -1, 0))
        _check(tracee.run_one(leader, arena))
        reach("restore.executed")
        return tracee

    # -- 4. memory -------------------------------------------------------------------------------

    def _clear_addresses(self, tracee: Tracee) -> None:
        """Unmap what exec made; move the vDSO and the kernel's data pages to their old places."""
        batch = tracee.batch()
        special = {"vdso": [v for v in self.vmas if v["kind"] == "vdso"]}
        special["vvar"] = [v for v in self.vmas if v["kind"] == "vvar"]
        parked: list[tuple[int, int, int]] = []
        park = self.hole + _PARK_OFFSET
        places = {kind: iter(vmas) for kind, vmas in special.items()}
        for vma in proc.mappings(tracee.pid, with_flags=False):
            if self.hole + _CODE_OFFSET <= vma.start < self.hole + _HOLE_BYTES:
                continue
            if vma.kind == "vsyscall":
                continue
            target = next(places[vma.kind], None) if vma.kind in places else None
            if target is None:
                batch.call(process.SYS_MUNMAP, vma.start, vma.length)
                continue
            flags = memory.MREMAP_MAYMOVE | memory.MREMAP_FIXED
            batch.call(
                process.SYS_MREMAP, vma.start, vma.length, vma.length, flags, park,
                what="park the vDSO",
            )  # fmt: skip
            parked.append((park, vma.length, target["start"]))
            park += vma.length
        for place, length, target_start in parked:
            flags = memory.MREMAP_MAYMOVE | memory.MREMAP_FIXED
            batch.call(
                process.SYS_MREMAP, place, length, length, flags, target_start,
                what="place the vDSO",
            )  # fmt: skip
        tracee.run(tracee.threads[tracee.pid], batch)

    def _map(self, tracee: Tracee) -> None:
        """Map everything, writable for now; what is executable becomes so in `_protect`."""
        leader = tracee.threads[tracee.pid]
        batch = tracee.batch()
        for vma in self.vmas:
            if vma["kind"] in MADE_LATER:
                continue
            if batch.full:
                tracee.run(leader, batch)
                batch = tracee.batch()
            if self._map_one(batch, vma) != _protection(vma):
                self.unlike.add(vma["start"])
        tracee.run(leader, batch)

    def _map_one(self, batch: Batch, vma: dict[str, Any]) -> int:
        """Add the call that maps one VMA; the protection it gets for now."""
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
        else:
            offset = vma["offset"]
            if _is_readonly(vma):
                descriptor = self.inherited_readonly[vma["object"]]
            elif vma["kind"] == "memory":
                descriptor = self.inherited_objects[vma["object"] - 1]
            else:
                descriptor = self.inherited[self._file_key(vma)]
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

    def _lazy_vmas(self) -> list[dict[str, Any]]:
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

    def _fill(self, tracee: Tracee, lazy: list[dict[str, Any]]) -> int:
        """Write in what must be there from the start; the number of windows left to the pager.

        A window is left when all of it lies in one lazy mapping: those at the ends of a mapping
        may hold pages of its neighbours too.
        """
        later: list[range] = []
        for vma in lazy:
            low = bisect_left(self.windows, vma["start"])
            high = bisect_left(self.windows, vma["end"] - self.window_bytes + 1, low)
            later.append(range(low, high))
        at_once = {self._window_of(address) for address in self._needed_at_once()}
        indexes = sorted(i for part in later for i in at_once if i in part)
        left = sum(map(len, later)) - len(indexes)
        position = 0
        for part in later:
            indexes += range(position, part.start)
            position = part.stop
        indexes += range(position, len(self.windows))
        Filler(self.image, tracee.pid, self.progress if self.eager else None).fill(indexes)
        self._fill_zeros(tracee.pid)
        return left

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

    def _protect(self, tracee: Tracee) -> None:
        """Give each mapping its protection, advice, locks and guards."""
        leader = tracee.threads[tracee.pid]
        batch = tracee.batch()
        for vma in self.vmas:
            if vma["kind"] in MADE_LATER:
                continue
            if batch.full:
                tracee.run(leader, batch)
                batch = tracee.batch()
            start, length, flags = vma["start"], vma["end"] - vma["start"], set(vma["flags"])
            batch.call(process.SYS_MPROTECT, start, length, _protection(vma), what="protect memory")
            for flag in sorted(flags & _ADVICE.keys()):
                batch.call(process.SYS_MADVISE, start, length, _ADVICE[flag], tolerate=True)
            if policy := self.document["memory_policies"].get(f"{start:x}"):
                reinstate.add_memory_policy(batch, start, length, policy)
            if "lo" in flags:
                on_fault = memory.MLOCK_ONFAULT if "lf" in flags else 0
                # On PROT_NONE memory the kernel locks, and then answers ENOMEM.
                batch.call(
                    process.SYS_MLOCK2, start, length, on_fault,
                    tolerate=not _protection(vma), what="lock memory",
                )  # fmt: skip
        for start, end in self.document["guards"]:
            batch.call(process.SYS_MADVISE, start, end - start, memory.MADV_GUARD_INSTALL)
        tracee.run(leader, batch)

    # -- 5. threads and the rest -----------------------------------------------------------------

    def _make_threads(self, tracee: Tracee, own_pid: int) -> list[Thread]:
        """Clone the other threads, each under its old id; all stop before their first step."""
        leader = tracee.threads[tracee.pid]
        batch = tracee.batch()
        for thread in self.threads[1:]:
            number = batch.put(layouts.pack_s64(thread["tid"]))
            arguments = batch.put(process.thread_clone_arguments(number, 0))
            batch.call(process.SYS_CLONE3, arguments, 88, what=f"thread {thread['tid']}")
        born: list[int] = []
        tracee.on_clone = born.append
        tracee.run(leader, batch)
        for tid in born:
            while True:
                _, status = os.waitpid(tid, ptrace.WALL)
                if not os.WIFSTOPPED(status):
                    raise LzyError(f"new thread {tid} ended before it began")
                if status >> 16 == ptrace.PTRACE_EVENT_STOP:
                    break
                ptrace.resume(tid)
            tracee.adopt(tid)
        return [leader, *[tracee.threads[tid] for tid in born]]

    def _reinstate_process(self, tracee: Tracee, superfluous: list[int], *, paging: bool) -> None:
        """Addresses, signal actions, timers, file locks: what all threads share.

        While there is one thread: membarrier registrations, too, then need no grace period.
        """
        pid = tracee.pid
        leader = tracee.threads[pid]
        own = self.own
        batch = tracee.batch()
        executable = (
            self.inherited_objects[own["exe_object"] - 1]
            if own["exe_object"]
            else self.inherited[own["exe"], False]
        )
        reinstate.add_addresses(batch, own, executable)
        reinstate.add_process(batch, own)
        for descriptor in [
            *self.inherited.values(),
            *self.inherited_objects,
            *self.inherited_readonly.values(),
            *superfluous,
        ]:
            batch.call(process.SYS_CLOSE, descriptor)
        for descriptor in self.harbour:
            if paging:
                batch.call(process.SYS_FCNTL, descriptor, process.F_SETFD, fcntl.FD_CLOEXEC)
            else:
                batch.call(process.SYS_CLOSE, descriptor)
        # Only now: closing any descriptor of a file gives up the process's locks on it, fcntl(2).
        for number, command, lock in resources.posix_locks(self.document["descriptors"]):
            batch.call(process.SYS_FCNTL, number, command, batch.put(lock), what="file lock")
        for text, place in self.document["descriptors"]["descriptors"].items():
            if place["close_on_exec"]:
                batch.call(
                    process.SYS_FCNTL,
                    int(text),
                    process.F_SETFD,
                    fcntl.FD_CLOEXEC,
                    what="close-on-exec",
                )
        tracee.run(leader, batch)

        self._write_proc(pid, "coredump_filter", f"{own['coredump_filter']:#x}")
        self._write_proc(pid, "oom_score_adj", str(own["oom_score_adj"]))

    def _reinstate_threads(self, tracee: Tracee, threads: list[Thread], own_pid: int) -> None:
        """What each thread has besides registers; then what must come after all of them."""
        pid = tracee.pid
        leader = threads[0]
        own = self.own
        for described, thread in zip(self.threads, threads, strict=True):
            self._schedule(thread.tid, described)

        slots = 64
        pairs = list(zip(self.threads, threads, strict=True))
        for start in range(0, len(pairs), slots):
            started = []
            for slot, (described, thread) in enumerate(pairs[start : start + slots]):
                batch = tracee.batch(slot, slots)
                reinstate.add_thread(batch, described)
                reinstate.add_pending(batch, own_pid, described["tid"], described)
                reinstate.add_rights(batch, described, proc.status(pid, thread.tid))
                tracee.start(thread, batch)
                started.append((thread, batch))
            for thread, batch in started:
                tracee.finish(thread, batch)

        if own["posix_timers"]:
            self._make_posix_timers(tracee)  # only now: some are for a thread
        batch = tracee.batch()
        reinstate.add_shared_pending(batch, own_pid, own)
        if own["dumpable"] in (0, 1):
            batch.call(SYS_PRCTL, process.PR_SET_DUMPABLE, own["dumpable"])
        if own["deny_write_execute"]:
            batch.call(SYS_PRCTL, process.PR_SET_MDWE, own["deny_write_execute"])
        for vma in self.vmas:
            if "sl" in vma["flags"] and vma["kind"] not in ("vdso", "vvar"):
                batch.call(
                    process.SYS_MSEAL, vma["start"], vma["end"] - vma["start"], 0, what="seal"
                )
        tracee.run(leader, batch)

    def _make_posix_timers(self, tracee: Tracee) -> None:
        """Create the POSIX timers; raises Incompatible if the kernel numbers them otherwise."""
        leader = tracee.threads[tracee.pid]
        probe = tracee.batch()
        probe.call(SYS_PRCTL, process.PR_TIMER_CREATE_RESTORE_IDS, 0, tolerate=True)
        numbered = tracee.run(leader, probe).results[0] == 0
        batch = tracee.batch()
        given = reinstate.add_posix_timers(batch, self.own, numbered=numbered)
        tracee.run(leader, batch)
        for wanted, place in given:
            if layouts.unpack_s32(batch.read(place, 4)) != wanted:
                raise Incompatible(
                    f"this kernel does not give a POSIX timer the number {wanted} it had",
                    remedy="restore under Linux 6.16 or later",
                )

    def _schedule(self, tid: int, described: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # sched_setattr sets nice for some policies only
            os.setpriority(os.PRIO_PROCESS, tid, described["nice"])
        try:
            process.set_scheduling(tid, decode(described["scheduling"]))
        except OSError as error:
            self.notes.append(f"scheduling of thread {tid}: {error.strerror}")
        here = set(range(os.cpu_count() or 1))
        wanted = set(described["affinity"])
        if wanted != os.sched_getaffinity(tid):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(tid, wanted & here or here)
        if described["io_priority"] != process.io_priority(tid):
            with contextlib.suppress(OSError):
                process.set_io_priority(tid, described["io_priority"])

    def _write_proc(self, pid: int, name: str, value: str) -> None:
        try:
            with open(f"/proc/{pid}/{name}", "r+") as file:
                if file.read().strip() != value:
                    file.write(value)
        except OSError as error:
            self.notes.append(f"{name} stays as it is here: {error.strerror}")

    # -- 6. lazily -------------------------------------------------------------------------------

    def _make_faults(self, tracee: Tracee) -> tuple[int, int]:
        """Have the process make a userfaultfd; our duplicate of it, and its number there.

        (-1, -1) where the kernel does not let it: memory is then loaded at once.
        """
        leader = tracee.threads[tracee.pid]
        batch = tracee.batch()
        made = batch.call(process.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK, tolerate=True)
        tracee.run(leader, batch)
        first = batch.results[made]
        if first < 0:
            self.notes.append(
                f"memory was loaded at once, not as it is touched: {os.strerror(-first)} from "
                "userfaultfd (see lzy doctor)"
            )
            return -1, -1
        used = set(map(int, self.document["descriptors"]["descriptors"]))
        soft = min(self.own["limits"]["7"][0], 1 << 20)
        number = next((n for n in range(min(soft, 1024) - 1, 2, -1) if n not in used), first)
        batch = tracee.batch()
        if number != first:
            moved = batch.call(process.SYS_FCNTL, first, process.F_DUPFD_CLOEXEC, number)
            batch.call(process.SYS_CLOSE, first)
            tracee.run(leader, batch)
            number = batch.results[moved]
        pidfd = os.pidfd_open(tracee.pid)
        try:
            faults = take_descriptor(pidfd, number)
        finally:
            os.close(pidfd)
        uffd.enable(faults)
        # Until the mappings are registered no huge page may come and fill what is missing there.
        batch = tracee.batch()
        batch.call(SYS_PRCTL, process.PR_SET_THP_DISABLE, 1)
        tracee.run(leader, batch)
        return faults, number

    def _begin_pager(
        self, pid: int, faults: int, number: int, lazy: list[dict[str, Any]]
    ) -> PagerStart:
        """Start the pager, which gets ready beside us; should we give up, it leaves too."""
        from .pager import Plan, begin_pager

        plan = Plan(
            pid=pid,
            start_time=proc.start_time(pid),
            uffd_number=number,
            store=str(self.image.store_path),
            image=self.image.name,
            ranges=[(vma["start"], vma["end"]) for vma in lazy],
            harbour_numbers=self.harbour or None,
        )
        pidfd = os.pidfd_open(pid)
        try:
            return begin_pager(plan, faults, pidfd, self.image)
        finally:
            os.close(pidfd)

    # -- 7. the end ------------------------------------------------------------------------------

    def _leave(self, tracee: Tracee, threads: list[Thread]) -> None:
        """Limits and timers, then unmap our own code, then the registers and masks of all."""
        leader = threads[0]
        batch = tracee.batch()
        batch.call(SYS_PRCTL, process.PR_SET_THP_DISABLE, self.own["no_huge_pages"])
        reinstate.add_limits(batch, self.own)
        reinstate.add_timer_settings(batch, self.own)
        tracee.run(leader, batch)
        vdso = next((v for v in self.vmas if v["kind"] == "vdso"), None)
        if vdso is None:
            raise Incompatible("the process has no vDSO, which lzy needs to take its code out")
        content = bytearray(vdso["end"] - vdso["start"])
        memory.read_process(tracee.pid, [(vdso["start"], len(content))], memoryview(content))
        instruction = vdso["start"] + content.index(b"\x0f\x05")
        registers = {
            **leader.registers,
            "rip": instruction,
            "rax": process.SYS_MUNMAP,
            "rdi": self.hole,
            "rsi": _HOLE_BYTES,
            "orig_rax": (1 << 64) - 1,
        }
        ptrace.write_register_set(leader.tid, ptrace.NT_PRSTATUS, machine.pack_registers(registers))
        ptrace.write_signal_mask(leader.tid, (1 << 64) - 1)
        ptrace.single_step(leader.tid)
        _, status = os.waitpid(leader.tid, ptrace.WALL)
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
            raise LzyError(f"the process did not take our code out (status {status:#x})")
        for described, thread in zip(self.threads, threads, strict=True):
            after = machine.restartable(described["registers"], keep_block=False)
            ptrace.write_register_set(thread.tid, ptrace.NT_X86_XSTATE, decode(described["xstate"]))
            ptrace.write_register_set(thread.tid, ptrace.NT_PRSTATUS, machine.pack_registers(after))
            ptrace.write_signal_mask(thread.tid, described["signal_mask"])

    def _commit(self, tracee: Tracee, threads: list[Thread]) -> None:
        """From here on the process lives by itself.

        Its threads are all still stopped while it stops depending on us; should we die in between,
        it dies before it ran, or all of it runs.
        """
        if self.own["stopped"]:
            os.kill(tracee.pid, signal.SIGSTOP)
        with Deferred():
            for thread in threads:
                ptrace.set_options(thread.tid, 0)
            reach("restore.committing")
            for thread in threads:
                ptrace.detach(thread.tid)
            tracee.threads.clear()
            tracee.close()


class Filler:
    """Writes windows of an image into a stopped process, with two threads when there is much."""

    def __init__(self, image: Image, pid: int, progress: Progress | None) -> None:
        self.image, self.pid, self.progress = image, pid, progress
        self._failure: BaseException | None = None
        self._done = 0

    def fill(self, indexes: list[int] | range) -> None:
        """Write the windows of these run records; raises Damaged or StoreUnavailable."""
        if len(indexes) < 24:
            self._fill_part(indexes)
        else:
            import threading

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
        try:
            for count, index in enumerate(indexes):
                address, mask, chunk = self.image.run(index)
                length = self.image.read_chunk(chunk, buffer)
                if length != mask.bit_count() * PAGE_BYTES:
                    raise Damaged(f"chunk {chunk} of image {self.image.name} does not fit its mask")
                memory.write_process(self.pid, page_runs([(address, mask)]), buffer[:length])
                if self._failure:
                    return
                if self.progress and count % 64 == 0 and indexes[0] % 2 == 0:
                    self.progress("loading", count * 2 * size, total)
        except BaseException as error:
            self._failure = error


class _Source:
    """The unnamed files made again, for `resources`."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors

    def open(self, number: int) -> int:
        return os.dup(self._descriptors[number - 1])


def _enter_directory(path: str) -> None:
    """chdir(2); a directory that was removed under the process is one made and removed again."""
    if not path.endswith(_DELETED):
        os.chdir(path)
        return
    import tempfile

    made = tempfile.mkdtemp(prefix="lzy-")
    os.chdir(made)
    os.rmdir(made)


def _lives_apart(taken: int) -> str:
    return f"pid {taken} is taken here: the process lives in a new PID namespace"


def _is_readonly(vma: dict[str, Any]) -> bool:
    """Whether it maps an unnamed file shared, without leave ever to write (VM_MAYWRITE)."""
    return vma["kind"] == "memory" and vma["permissions"][3] == "s" and "mw" not in vma["flags"]


def _protection(vma: dict[str, Any]) -> int:
    text: str = vma["permissions"]
    return (text[0] == "r") | (text[1] == "w") << 1 | (text[2] == "x") << 2


def _check(result: int) -> None:
    if -4095 <= result < 0:
        raise KernelError("cannot map lzy's code in the new process", -result)


def _undo(born: birth.Birth) -> None:
    """End an unfinished process, and its namespace."""
    for pid in filter(None, born):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        # A traced leader's end is reported only after that of its traced threads, ptrace(2).
        with contextlib.suppress(NotFound):
            for tid in sorted(proc.threads(pid), key=pid.__eq__):
                with contextlib.suppress(ChildProcessError):
                    while os.WIFSTOPPED(os.waitpid(tid, ptrace.WALL)[1]):
                        pass
