"""Watches on files and directories (inotify), each with its number.

The kernel tells a watch's file by its handle; its path is found with open_by_handle_at(2), which
needs CAP_DAC_READ_SEARCH, else among the folders the process is known to use. Events that nobody
has read yet cannot be looked at without taking them, so they are a reason to wait.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Incompatible
from ..linux import descriptors as kernel
from .kind import Entry, Finish, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey


class Inotify(Kind):
    rank = 90

    def claims(self, opened: Opened) -> bool:
        return opened.anonymous == "inotify"

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        if unread := kernel.unread_bytes(opened.fd):
            raise opened.refusal(
                f"{unread} bytes of events are unread and cannot be copied",
                "let the process read them, or leave the watched files alone, then dump again",
            )
        watches: list[dict[str, Any]] = []
        for line in opened.information:
            if line.startswith("inotify wd:"):
                facts = dict(word.split(":", 1) for word in line.split()[1:])
                watch = int(facts["wd"], 16)
                path = _find_path(facts, survey)
                if path is None:
                    raise opened.refusal(
                        f"the path of its watch {watch} (inode {int(facts['ino'], 16)}) "
                        "cannot be found",
                        "run lzy as root, or let the process remove the watch",
                    )
                watches.append({"watch": watch, "path": path, "mask": int(facts["mask"], 16)})
        return {"watches": sorted(watches, key=lambda found: int(found["watch"]))}

    def check(self, entry: Entry, assembly: Assembly) -> None:
        for watch in entry["watches"]:
            if not os.path.lexists(watch["path"]):
                raise Incompatible(
                    f"{watch['path']}, which the process watches, does not exist here",
                    remedy="bring it back where it was, then restore again",
                    path=watch["path"],
                )

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        return kernel.make_inotify()

    def finish(self, entry: Entry, fd: int, finish: Finish) -> None:
        # Now only, so that nothing of what a restore opens and makes is reported.
        for watch in entry["watches"]:
            _watch_as(fd, watch["path"], watch["mask"], watch["watch"])


def _find_path(facts: dict[str, str], survey: Survey) -> str | None:
    inode = int(facts["ino"], 16)
    raw_device = int(facts["sdev"], 16)
    device = os.makedev(raw_device >> 20, raw_device & 0xFFFFF)  # MAJOR, MINOR: linux/kdev_t.h
    for path in (*_paths_by_handle(facts, device), *_likely_paths(survey)):
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            # btrfs and overlayfs report devices of their own in stat(2): the inode must do there.
            if status.st_ino == inode and _same_device(path, status.st_dev, device):
                return path
    return None


def _same_device(path: str, reported: int, device: int) -> bool:
    return reported == device or device in (found for found, _ in _mounts_above(path))


def _paths_by_handle(facts: dict[str, str], device: int) -> Iterator[str]:
    if "f_handle" not in facts:
        return
    handle = bytes.fromhex(facts["f_handle"])[: int(facts["fhandle-bytes"], 16)]
    for found, folder in _mounts():
        if found != device:
            continue
        with contextlib.suppress(OSError):
            yield _path_of(folder, int(facts["fhandle-type"], 16), handle)
            return


def _path_of(folder: str, kind: int, handle: bytes) -> str:
    # O_PATH would not do (EBADF), and a file system's root is seldom watched for being opened.
    mount = os.open(folder, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fd = kernel.open_by_handle(mount, kind, handle, os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(mount)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _likely_paths(survey: Survey) -> Iterator[str]:
    """Folders the process uses, those above them, and what lies directly in them."""
    starts = [os.readlink(f"/proc/{survey.witness}/cwd")]
    starts += [os.path.dirname(link) for link in survey.links.values() if link.startswith("/")]
    seen = set()
    for start in starts:
        folder = start
        while folder not in seen:
            seen.add(folder)
            yield folder
            folder = os.path.dirname(folder)
    for folder in list(seen):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            yield from (entry.path for entry in entries)


def _mounts() -> Iterator[tuple[int, str]]:
    """(device, folder) of every mount. Source: proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            words = line.split(b" ")
            major, minor = words[2].split(b":")
            # Blanks and the like are written in octal.
            folder = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), words[4])
            yield os.makedev(int(major), int(minor)), os.fsdecode(folder)


def _mounts_above(path: str) -> Iterator[tuple[int, str]]:
    for device, folder in _mounts():
        if path == folder or path.startswith(folder.rstrip("/") + "/"):
            yield device, folder


def _watch_as(fd: int, path: str, mask: int, wanted: int) -> None:
    """Watch `path` under the number `wanted`."""
    with contextlib.suppress(OSError):
        kernel.set_next_watch(fd, wanted)
    while (given := kernel.watch_inotify(fd, path, mask)) != wanted:
        # A kernel without the call above counts up: give numbers away until it is there.
        kernel.unwatch_inotify(fd, given)
        os.read(fd, kernel.unread_bytes(fd))
        if given > wanted:
            raise Incompatible(
                f"the watch {wanted} on {path} cannot get its number again",
                remedy="restore on a kernel with CONFIG_CHECKPOINT_RESTORE",
            )


KIND = Inotify()
