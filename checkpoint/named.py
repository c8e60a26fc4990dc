"""Memory with a name, as a dump finds it: files in /dev/shm, whose content is part of the image.

`multiprocessing.shared_memory`, POSIX semaphores (sem_open(3)) and the like are files on a tmpfs:
memory of those who have them mapped, gone with the next boot. So an image holds their content, and
says where each was, whether the tree made it, and whether others had it, too; what becomes of the
names when the processes come back is told in `joining`.

When a dump ends the tree, names of its own go with it, or their memory would stay. *Guarantee*: a
name is removed only if nobody else has the file open or mapped, the tree wrote it as memory and
has made it, and the committed image holds all that is in it at that moment.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from . import proc
from .content import find_data, windows_of
from .errors import LzyError
from .linux import PAGE_BYTES, tmpfs
from .linux.descriptors import birth_ns
from .linux.namespaces import sees_all
from .stages import reach

if TYPE_CHECKING:
    from .image import Image
    from .objects import Objects
    from .proc import Vma

FOLDER: Final = "/dev/shm/"
MARK: Final = "user.lzy.session"  # an attribute of what lzy made: whose it is
_DELETED: Final = " (deleted)"
_ZEROS: Final = bytes(PAGE_BYTES)
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

Key = tuple[int, int]


def open_named(path: str, key: Key, root: str = "") -> tuple[int, str] | None:
    """(a descriptor to read it, its path) of the file `key` (device, inode) of a name in /dev/shm.

    `path` is what the kernel calls it: sem_open(3) makes a semaphore under a passing name, so one
    that is ` (deleted)` is looked for under others. None if it is no file there (any more).
    """
    if not path.startswith(FOLDER):
        return None
    plain = path.removesuffix(_DELETED)
    for place in dict.fromkeys((path, plain)):
        if (found := _open_if(root + place, key)) is not None:
            return found, place
    folder = os.path.dirname(plain)
    with contextlib.suppress(OSError), os.scandir(root + folder) as entries:
        for entry in entries:
            if entry.inode() == key[1] and (found := _open_if(entry.path, key)) is not None:
                return found, os.path.join(folder, entry.name)
    return None


def _open_if(path: str, key: Key) -> int | None:
    try:
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) != key:
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) == key and tmpfs.lies_in_memory(fd):
        return fd
    os.close(fd)
    return None


def is_in_folder(vma: Vma) -> bool:
    """Whether a mapping may be of memory with a name."""
    return vma.path.startswith(FOLDER)


def identity_of(fd: int) -> list[int]:
    """Device, inode and time of birth: no other file of this boot has them."""
    status = os.fstat(fd)
    return [status.st_dev, status.st_ino, birth_ns(fd)]


def describe_named(objects: Objects, began_ticks: int, tree: Iterable[int]) -> None:
    """Say of each named content whose it is; `began_ticks` after the boot the tree began.

    Called while the processes of the `tree` (pids) may run.
    """
    named = list(objects.named())
    if not named:
        return
    holders = find_holders([key_of(objects.descriptors[n - 1]) for n, _ in named], tree)
    began_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    began_ns += (began_ticks + 1) * 1_000_000_000 // _TICKS_PER_S  # the kernel rounds it down
    for number, described in named:
        fd = objects.descriptors[number - 1]
        identity = identity_of(fd)
        described["file"] = identity
        described["own"] = identity[2] >= began_ns or mark_of(fd) is not None
        described["others"] = bool(holders[key_of(fd)])
        if os.fstat(fd).st_nlink > 1:
            described["names"] = _find_names(key_of(fd), described["path"])


def _find_names(key: Key, besides: str) -> list[str]:
    """The other names that a file has in /dev/shm, link(2)."""
    found = []
    for folder, _, names in os.walk(FOLDER):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) == key and path != besides:
                    found.append(path)
    return sorted(found)


def mark_of(fd: int) -> str | None:
    """The session for which lzy made the file; None if it did not, or nobody can tell."""
    try:
        return os.getxattr(fd, MARK).decode()
    except OSError:
        return None


def find_holders(keys: Sequence[Key], besides: Iterable[int]) -> dict[Key, list[int]]:
    """Which processes, but lzy and those, have these files (device, inode) open or mapped."""
    found: dict[Key, list[int]] = {key: [] for key in keys}
    tokens = {f"{os.major(d):02x}:{os.minor(d):02x} {i} ".encode(): (d, i) for d, i in keys}
    passed_over = {os.getpid(), *besides}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in passed_over:
            continue
        for key in _held_by(int(name), found, tokens):
            found[key].append(int(name))
    return found


def _held_by(pid: int, keys: Iterable[Key], tokens: dict[bytes, Key]) -> set[Key]:
    held: set[Key] = set()
    with contextlib.suppress(LzyError, OSError):
        task = proc.witness(pid)
        maps = proc.read_bytes(task, "maps")
        held.update(key for token, key in tokens.items() if token in maps)
        for number in os.listdir(f"/proc/{task}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{task}/fd/{number}")
                held.add((status.st_dev, status.st_ino))
    return held.intersection(keys)


def key_of(fd: int) -> Key:
    """Device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


# -- names that go with their tree -----------------------------------------------------------------


def remove_own(
    objects: Objects, image: Image, notes: list[str], *, taken_down: bool = True
) -> None:
    """Remove names that were only the tree's, which has ended; say what went and what stays.

    Unless `taken_down` its memory is still held by us, and /proc has to tell who else has it.
    """
    gone_bytes, gone, staying = 0, 0, []
    for number, described in objects.named():
        if number not in objects.mapped:
            continue  # it was used as a file: who looks for it finds it
        fd = objects.descriptors[number - 1]
        length_bytes = os.fstat(fd).st_blocks * 512
        if described["own"] and _remove(described, fd, image, taken_down):
            gone, gone_bytes = gone + 1, gone_bytes + length_bytes
        elif os.fstat(fd).st_nlink:
            staying.append(described["path"])
    if gone:
        notes.append(
            f"{gone} name{'s' * (gone > 1)} in {FOLDER} ({-(-gone_bytes // 1024)} KiB), which only "
            f"it used, went with it, and come{'s' * (gone == 1)} back with it"
        )
    if staying:
        more = f" and {len(staying) - 3} more" if len(staying) > 3 else ""
        notes.append(f"what others may need stays: {', '.join(staying[:3])}{more}")


def _remove(described: dict[str, Any], fd: int, image: Image, taken_down: bool) -> bool:
    key = key_of(fd)
    try:
        with tmpfs.held_alone(fd) as alone:
            if not alone and (taken_down or not sees_all() or find_holders([key], ())[key]):
                return False
            if not holds_same(image, described, fd):
                return False
            names = [described["path"], *described.get("names", ())]
            found = [os.lstat(name) for name in names]
            if any((status.st_dev, status.st_ino) != key for status in found):
                return False
            if found[0].st_nlink != len(names) or (alone and tmpfs.is_asked_for(fd)):
                return False
            for name in names:
                os.unlink(name)
                reach("named.unlinked")
            return True
    except OSError:
        return False


def holds_same(image: Image, described: dict[str, Any], fd: int) -> bool:
    """Whether the file holds, byte for byte, what `image` has of it; `fd`'s position is lost."""
    length_bytes = os.fstat(fd).st_size
    if length_bytes != described["length_bytes"]:
        return False
    first, last = image.space_extent(described["space"])
    wanted = {address: (mask, chunk) for address, mask, chunk in map(image.run, range(first, last))}
    # Without opening it: whoever does, waits for a lease, and be it our own.
    here = {start for start, _ in windows_of(find_data(fd, length_bytes), image.window_pages)}
    if not wanted.keys() <= here:
        return False
    for address in here:
        mask, content = _read_window(fd, address, image.window_pages)
        held, chunk = wanted.get(address, (0, -1))
        if mask != held or (mask and not image.is_content(chunk, content)):
            return False
    return True


def _read_window(fd: int, address: int, window_pages: int) -> tuple[int, bytes]:
    """(mask of the pages that are not zeros, their bytes) of a window of a file."""
    found = os.pread(fd, window_pages * PAGE_BYTES, address)
    if short := -len(found) % PAGE_BYTES:
        found += bytes(short)
    if found.find(_ZEROS) < 0:
        return (1 << len(found) // PAGE_BYTES) - 1, found
    mask, pages = 0, []
    for number, at in enumerate(range(0, len(found), PAGE_BYTES)):
        if (page := found[at : at + PAGE_BYTES]) != _ZEROS:
            mask |= 1 << number
            pages.append(page)
    return mask, b"".join(pages)
