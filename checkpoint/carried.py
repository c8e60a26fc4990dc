"""Files that travel in an image: libraries that are mapped, the executable, what was asked for.

Each is a space of the image, as memory files are; its chunks are in the store once, however many
images carry the file. On a node that lacks a mapped file, or has another one by that name, lzy
maps a copy of its own, `LZY_HOME/carried/DIGEST`, made when it is first needed and shared by all
images. Files that were asked for are put back where they were, if there is nothing at their place.

*Guarantee*: a copy has its name only when all of it is there and its digest was compared; no file
that is not lzy's own is ever replaced.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from blake3 import blake3

from .buffers import page_aligned
from .content import FilePages, data_ranges, windows_of
from .elf import build_id
from .errors import Busy, Damaged, Incompatible, LzyError, NotFound
from .home import home
from .linux import PAGE_BYTES
from .pages import page_runs

if TYPE_CHECKING:
    from .image import Image
    from .proc import Vma
    from .writer import ImageWriter

FIRST_SPACE: Final = 1 << 24  # above those of memory files and of processes
MAPPED: Final = "mapped"
ASKED: Final = "asked"
_ALSO: Final = "by-build-id"

Entry = dict[str, Any]


def copies_folder() -> Path:
    """Where lzy's own copies of carried files are."""
    return home() / "carried"


# -- into an image -------------------------------------------------------------------------------


class Cargo:
    """The files that an image being written carries."""

    def __init__(self, writer: ImageWriter, *, everything: bool) -> None:
        """`everything`: of what is mapped; else only lzy's own copies, which nobody else has."""
        self._writer = writer
        self._everything = everything
        self._entries: dict[tuple[str, str], Entry] = {}
        self._copies = str(copies_folder()) + "/"

    def describe(self) -> list[Entry]:
        """What the image's document says of them."""
        return list(self._entries.values())

    def add_mapped(self, pid: int, vmas: Iterable[Vma]) -> None:
        """Take in the files that process `pid` has mapped, and its executable.

        Not what it writes through a shared mapping: that is data. Called again, it takes in what
        was mapped meanwhile.
        """
        wanted = {
            vma.path
            for vma in vmas
            if vma.kind == "file" and not (vma.shared and "mw" in vma.flags)
            and not vma.path.startswith("/dev/")
        }  # fmt: skip
        with contextlib.suppress(OSError):
            executable = os.readlink(f"/proc/{pid}/exe")
            if not executable.endswith(" (deleted)"):
                wanted.add(executable)
        for path in sorted(wanted):
            if (MAPPED, path) in self._entries:
                continue
            if self._everything or path.startswith(self._copies):
                with contextlib.suppress(NotFound):  # the dump tells, if it matters
                    self._add_file(f"/proc/{pid}/root{path}", path, MAPPED)

    def add_asked(self, paths: Sequence[str]) -> None:
        """Take in these files, and folders with all that is in them.

        Raises NotFound, LzyError for what is neither file, folder nor symbolic link.
        """
        for path in paths:
            self._add_tree(os.path.abspath(path))

    def _add_tree(self, path: str) -> None:
        self._add_any(path)
        if os.path.isdir(path) and not os.path.islink(path):
            for folder, folders, files in os.walk(path):
                for name in sorted([*folders, *files]):
                    self._add_any(os.path.join(folder, name), among_others=True)

    def _add_any(self, path: str, *, among_others: bool = False) -> None:
        try:
            status = os.lstat(path)
        except OSError as error:
            raise NotFound(
                f"cannot carry {path}: {error.strerror}", remedy="name a file that is there"
            ) from error
        entry = _entry(path, ASKED, status)
        if stat.S_ISLNK(status.st_mode):
            self._entries[ASKED, path] = {**entry, "type": "link", "target": os.readlink(path)}
        elif stat.S_ISDIR(status.st_mode):
            self._entries[ASKED, path] = {**entry, "type": "folder"}
        elif stat.S_ISREG(status.st_mode):
            self._add_file(path, path, ASKED)
        elif not among_others:  # a socket or pipe in a folder is no content
            raise LzyError(
                f"cannot carry {path}: it is neither a file nor a folder",
                remedy="name files and folders",
            )

    def _add_file(self, place: str, path: str, purpose: str) -> None:
        if (purpose, path) in self._entries:
            return
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(
                f"cannot carry {path}: {error.strerror}", remedy="make it readable"
            ) from error
        try:
            status = os.fstat(descriptor)
            entry = _entry(path, purpose, status) | {
                "type": "file",
                "size_bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "build_id": build_id(descriptor),
                "digest": digest_of(descriptor),
                "space": FIRST_SPACE + len(self._entries),
            }
            windows = windows_of(data_ranges(descriptor, status.st_size), self._writer.window_pages)
            self._writer.add_space(FilePages(descriptor), windows, space=entry["space"])
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise Busy(f"{path} was written while it was carried", remedy="try again", path=path)
        self._entries[purpose, path] = entry


def _entry(path: str, purpose: str, status: os.stat_result) -> Entry:
    return {
        "path": path,
        "purpose": purpose,
        "mode": stat.S_IMODE(status.st_mode),
        "owner": [status.st_uid, status.st_gid],
    }


def digest_of(descriptor: int) -> str:
    """BLAKE3 of a whole file, in hex."""
    if not os.fstat(descriptor).st_size:
        return blake3(b"").hexdigest()
    return blake3().update_mmap(f"/proc/self/fd/{descriptor}").hexdigest()


# -- out of an image -----------------------------------------------------------------------------


def find_carried(image: Image, path: str, purpose: str = MAPPED) -> Entry | None:
    """The file of that path that the image carries, or None."""
    for entry in image.document.get("carried", ()):
        if entry["path"] == path and entry["purpose"] == purpose:
            found: Entry = entry
            return found
    return None


def open_copy(image: Image, entry: Entry) -> int:
    """A descriptor, for reading, of lzy's own copy of a carried file; made if there is none.

    Raises Damaged, StoreUnavailable, LzyError: no room for it.
    """
    folder = copies_folder()
    place = folder / _checked(entry["digest"])
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(descriptor).st_size == entry["size_bytes"]:
            return descriptor
        os.close(descriptor)
    try:
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        # Executable, or the kernel takes it for no process's executable.
        _write(image, entry, str(place), mode=0o555)
        if entry["build_id"]:
            (folder / _ALSO).mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.symlink(f"../{entry['digest']}", folder / _ALSO / _checked(entry["build_id"]))
        return os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LzyError(
            f"cannot make a copy of {entry['path']}, which image {image.name} carries, in "
            f"{folder}: {error.strerror}",
            remedy="make room there, or set LZY_HOME to a folder that has",
            path=entry["path"],
        ) from error


def find_copy(wanted: str, size_bytes: int) -> int | None:
    """A descriptor of a copy that another image brought, by its build-id; None: there is none."""
    if not wanted.isalnum():
        return None
    try:
        descriptor = os.open(copies_folder() / _ALSO / wanted, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_size == size_bytes and build_id(descriptor) == wanted:
        return descriptor
    os.close(descriptor)
    return None


def compare_asked(entry: Entry) -> str:
    """How a file that was asked for is here: `missing`, `same` or `other`."""
    path = entry["path"]
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if entry["type"] == "folder":
        return "same" if stat.S_ISDIR(status.st_mode) else "other"
    if entry["type"] == "link":
        is_link = stat.S_ISLNK(status.st_mode)
        return "same" if is_link and os.readlink(path) == entry["target"] else "other"
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry["size_bytes"]:
        return "other"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return "other"
    try:
        return "same" if digest_of(descriptor) == entry["digest"] else "other"
    finally:
        os.close(descriptor)


def put_back(image: Image, entries: Iterable[Entry]) -> None:
    """Make these files, which are missing here, as they were; folders first.

    Raises LzyError where that cannot be, Damaged, StoreUnavailable.
    """
    for entry in sorted(entries, key=lambda entry: (entry["path"].count("/"), entry["path"])):
        path = entry["path"]
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if entry["type"] == "folder":
                os.mkdir(path)
                os.chmod(path, entry["mode"])
            elif entry["type"] == "link":
                os.symlink(entry["target"], path)
            else:
                _write(image, entry, path, mode=entry["mode"], as_it_was=True)
            with contextlib.suppress(PermissionError):
                os.chown(path, *entry["owner"], follow_symlinks=False)
        except FileExistsError:
            continue  # somebody else made it just now
        except OSError as error:
            raise LzyError(
                f"cannot put {path} back, which image {image.name} carries: {error.strerror}",
                remedy="make its folder writable, or bring the file there yourself",
                path=path,
            ) from error


def _write(image: Image, entry: Entry, place: str, *, mode: int, as_it_was: bool = False) -> None:
    """Make `place` with a carried file's content, whole or not at all; what is there stays."""
    folder = os.path.dirname(place)
    temporary = os.path.join(folder, f".lzy-{os.getpid()}-{os.urandom(6).hex()}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_content(image, entry["space"], descriptor, entry["size_bytes"])
        if digest_of(descriptor) != entry["digest"]:
            raise Damaged(f"{entry['path']} in image {image.name} is not what was carried")
        os.fchmod(descriptor, mode)
        if as_it_was:
            os.utime(descriptor, ns=(entry["modified_ns"], entry["modified_ns"]))
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, place)
    finally:
        os.close(descriptor)
        os.unlink(temporary)


def write_content(
    image: Image, space: int, descriptor: int, length_bytes: int, *, mapped: bool = False
) -> None:
    """Give an empty file the content that a space of an image holds.

    `mapped`: through a mapping, since it is of huge pages, to which write(2) does not write.
    """
    os.ftruncate(descriptor, length_bytes)
    memory = mmap.mmap(descriptor, length_bytes) if mapped and length_bytes else None
    buffer = page_aligned(image.window_pages * PAGE_BYTES)[2]
    first, last = image.space_extent(space)
    for index in range(first, last):
        address, mask, chunk = image.run(index)
        image.read_chunk(chunk, buffer)
        position = 0
        for start, length in page_runs([(address, mask)]):
            wanted = min(length, length_bytes - start)
            if memory is not None:
                memory[start : start + wanted] = buffer[position : position + wanted]
            elif (
                wanted > 0
                and os.pwrite(descriptor, buffer[position : position + wanted], start) != wanted
            ):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            position += length
    if memory is not None:
        memory.close()


def _checked(name: str) -> str:
    if not name.isalnum():  # of an authenticated image, so this cannot be; but it becomes a path
        raise Damaged(f"a carried file has no digest: {name[:80]!r}")
    return name


def refuse_others(image: Image, entries: Iterable[Entry]) -> list[Incompatible]:
    """Why files that are here keep carried ones from being put back."""
    return [
        Incompatible(
            f"{entry['path']} is not the one that image {image.name} carries, and is not replaced",
            remedy="move it away, or say --accept-changed-files to go on with it",
            path=entry["path"],
        )
        for entry in entries
    ]
