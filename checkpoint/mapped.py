"""A process's mappings as an image describes them: what is behind each, and how it is known."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from . import segments
from .elf import build_id
from .errors import Busy, Unsupported
from .named import FOLDER, open_named
from .objects import Objects
from .proc import Vma
from .unnamed import copy_unnamed


def refuse_mappings(pid: int, vmas: list[Vma]) -> None:
    """Raise Unsupported for a mapping that lzy cannot make again."""
    for refusal in find_refusals(pid, vmas):
        raise refusal


def find_refusals(pid: int, vmas: list[Vma]) -> Iterator[Unsupported]:
    """Why mappings of the process cannot be made again, one after the other."""
    for vma in vmas:
        if vma.kind not in ("vdso", "vvar", "vsyscall") and (found := _obstacle(vma)):
            what, remedy = found
            yield Unsupported(
                f"pid {pid} has a {what} mapping at {vma.start:#x} ({vma.path or 'anonymous'})",
                remedy=remedy,
                pid=pid,
                address=vma.start,
            )
    if any(vma.kind == "segment" for vma in vmas):
        yield from segments.find_refusals(pid, vmas)
    if rings := {vma.inode for vma in vmas if vma.kind == "ring"}:
        yield from _find_closed_rings(pid, rings)


def _find_closed_rings(pid: int, inodes: set[int]) -> Iterator[Unsupported]:
    """A mapped io_uring whose descriptor was closed: nothing tells of it."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.discard(os.stat(f"/proc/{pid}/fd/{number}").st_ino)
    if inodes:
        yield Unsupported(
            f"pid {pid} has mapped an io_uring whose descriptor it has closed",
            remedy="have the program unmap it, or keep the descriptor",
            pid=pid,
        )


def _obstacle(vma: Vma) -> tuple[str, str] | None:
    """What kind of mapping it is that cannot be made again, and a way out."""
    path = vma.path
    if "ht" in vma.flags and vma.kind in ("file", "segment"):
        return "huge-page (hugetlbfs)", "use anonymous memory (MAP_HUGETLB) or a memfd instead"
    if path.startswith("/[aio]"):
        way = "have the program end it (io_destroy), or do without (CAIO_IMPL=thread for aiofile)"
        return "asynchronous I/O (io_setup)", way
    if path.startswith(("/dev/nvidia", "/dev/dri")):
        return "GPU", "free the GPU first; GPU processes are not supported yet"
    if path.startswith("/dev/") and not path.startswith(("/dev/shm/", "/dev/zero")):
        return "device", "have the program unmap it"
    if "pk" in vma.flags:
        return "protection-key (pkey_mprotect)", "have the program give its keys back"
    if "ss" in vma.flags:
        return "shadow stack", "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"
    if vma.flags & {"io", "pf"}:
        return "device memory", "have the program unmap it"
    if path.startswith("anon_inode:") and vma.kind != "ring":
        return path, "have the program unmap it"
    return None


Statuses = dict[tuple[str, int, int], dict[str, os.stat_result]]
"""Of files by their paths, for each mount namespace and root directory."""


def _find_view(pid: int) -> tuple[str, int, int]:
    root = os.stat(f"/proc/{pid}/root")
    return os.readlink(f"/proc/{pid}/ns/mnt"), root.st_dev, root.st_ino


class Mappings:
    """The mappings of a stopped process, with the contents that live in no directory taken."""

    def __init__(self, pid: int, vmas: list[Vma], statuses: Statuses | None = None) -> None:
        """`statuses`: what was found of files for other processes that stand still with it."""
        self.pid = pid
        self.reader = pid
        """Whose root is looked at: that of its snapshot as soon as there is one; it may end."""
        self.vmas = vmas
        self._objects: dict[Vma, int] = {}
        self._paths: dict[str, str] = {}
        """Of memory with a name: what the kernel calls it to what it is called in /dev/shm."""
        self._statuses = {} if statuses is None else statuses.setdefault(_find_view(pid), {})
        for path in {vma.path for vma in vmas if vma.kind == "file"} - self._statuses.keys():
            with contextlib.suppress(OSError):  # `describe` tells what is wrong with it
                self._statuses[path] = os.stat(f"/proc/{pid}/root{path}")
        self._files: dict[tuple[int, str], dict[str, Any]] = {}

    def renew_flags(self, seen: dict[int, frozenset[str]], *, of_snapshot: bool) -> None:
        """Take the flags `seen` of the mappings, by start, of the stopped process or its snapshot.

        Those known until now may have been read before the stop; but a fork unlocks memory.
        Raises Busy if the snapshot lacks a mapping: it was made uninheritable in between.
        """
        renewed = []
        for vma in self.vmas:
            flags = seen.get(vma.start)
            wiped = of_snapshot and "wf" in (flags or ())
            if (flags is None or wiped) and vma.kind != "vsyscall":
                raise Busy(
                    f"pid {self.pid} changed its mapping at {vma.start:#x} while it was stopped",
                    remedy="try again",
                    pid=self.pid,
                )
            if flags is not None and flags != vma.flags:
                new = vma._replace(flags=flags | (vma.flags & {"lo", "lf"}))
                if vma in self._objects:
                    self._objects[new] = self._objects.pop(vma)
                vma = new
            renewed.append(vma)
        self.vmas = renewed

    def take_objects(self, objects: Objects) -> None:
        """Add what lies behind mappings whose file has no path: it lives in these mappings only.

        And memory that has a name (`named`), unless it is a program's text. Raises Unsupported
        where it cannot be opened.
        """
        programs = {vma.path for vma in self.vmas if "x" in vma.permissions}
        for vma in self.vmas:
            if vma.path.startswith(FOLDER) and vma.path not in programs:
                self._take_named(vma, objects)
            if vma.kind not in ("memory", "segment") or vma in self._objects:
                continue
            try:
                descriptor = os.open(
                    f"/proc/{self.pid}/map_files/{vma.start:x}-{vma.end:x}",
                    os.O_RDONLY | os.O_CLOEXEC,
                )
            except PermissionError:
                if "ht" in vma.flags:
                    raise Unsupported(
                        f"pid {self.pid} shares memory of huge pages at {vma.start:#x}",
                        remedy="run lzy as root, which may open what is mapped",
                        pid=self.pid,
                    ) from None
                self._objects[vma] = copy_unnamed(self.pid, vma, self.vmas, objects)
                continue
            except OSError as error:
                raise Unsupported(
                    f"cannot open what pid {self.pid} has mapped at {vma.start:#x} ({vma.path}): "
                    f"{error.strerror}",
                    remedy="run lzy as root",
                    pid=self.pid,
                ) from error
            try:
                status = os.fstat(descriptor)
                self._objects[vma] = objects.add_file(
                    descriptor, key=(status.st_dev, status.st_ino)
                )
            finally:
                os.close(descriptor)

    def _take_named(self, vma: Vma, objects: Objects) -> None:
        found = open_named(vma.path, (vma.device, vma.inode), f"/proc/{self.pid}/root")
        if found is None:
            return
        descriptor, path = found
        writes = vma.shared and "mw" in vma.flags
        try:
            self._objects[vma] = objects.add_named(
                descriptor, key=(vma.device, vma.inode), path=path, writes=writes, maps=writes
            )
        finally:
            os.close(descriptor)
        self._paths[vma.path] = path

    def describe(self) -> list[dict[str, Any]]:
        """All mappings but vsyscall, in address order, JSON-able."""
        return [self._describe(vma) for vma in self.vmas if vma.kind != "vsyscall"]

    def _describe(self, vma: Vma) -> dict[str, Any]:
        described: dict[str, Any] = {
            "start": vma.start,
            "end": vma.end,
            "permissions": vma.permissions,
            "kind": vma.kind,
            "flags": sorted(vma.flags),
        }
        if vma.path:
            described["path"] = self._paths.get(vma.path, vma.path)
        if vma.kind == "file" and vma in self._objects:
            described["kind"] = "memory"
        if vma.kind in ("file", "memory", "ring", "segment"):
            described["offset"] = vma.offset
        if vma.kind == "ring":
            described["inode"] = vma.inode
        if vma.kind == "segment":
            described["segment"] = segments.describe_segment(vma)
        if vma in self._objects:
            described["object"] = self._objects[vma]
        elif vma.kind == "file" and vma.path != "/dev/zero":
            described["file"] = self.describe_file(vma)
        return described

    def describe_file(self, vma: Vma) -> dict[str, Any]:
        """By what a mapped file is known again: size, modification time, build-id if it has one.

        Raises Unsupported when the path now names another file than the one that is mapped.
        """
        key = (vma.inode, vma.path)
        if key in self._files:
            return self._files[key]
        try:
            descriptor = os.open(f"/proc/{self.reader}/root{vma.path}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unsupported(
                f"cannot open {vma.path}, which pid {self.pid} has mapped at {vma.start:#x}: "
                f"{error.strerror}",
                remedy="make the file reachable",
                pid=self.pid,
                path=vma.path,
            ) from error
        try:
            # As it was when the process stood still: its memory is of that moment, too.
            status = self._statuses.get(vma.path) or os.fstat(descriptor)
            if os.fstat(descriptor).st_ino != vma.inode:
                raise Unsupported(
                    f"{vma.path} was replaced since pid {self.pid} mapped it",
                    remedy="put the old file back or restart the program",
                    pid=self.pid,
                    path=vma.path,
                )
            self._files[key] = {
                "size_bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "build_id": build_id(descriptor),
            }
        finally:
            os.close(descriptor)
        return self._files[key]
