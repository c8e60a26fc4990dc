"""Regular files and directories, by their paths; and files whose path is gone, by their content.

A file is opened again where it was, with its flags and position, if it is still what it was: size
and time of change. Nothing of ours writes it between dump and restore, so a difference is somebody
else's doing. A program that has a file open for writing, without a lock, must cope with others
writing it too (a log, a history, a database between transactions): the very same file may hold
something else by then, as it may after a long SIGSTOP. What the process only reads, has locked, or
finds replaced by another file must be unchanged. A file without a path (deleted, replaced,
O_TMPFILE) travels in the image, as memory with a name does (`lzy.checkpoint.named`). O_PATH
descriptors are names and nothing else.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from ..errors import Incompatible
from ..linux import descriptors as kernel
from ..named import open_named
from .kind import Entry, Kind

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

_DELETED = " (deleted)"


class File(Kind):
    rank = 60

    def claims(self, opened: Opened) -> bool:
        if not opened.link.startswith("/") or opened.link.startswith("/secretmem"):
            return False
        return opened.is_path_only or opened.mode in (stat.S_IFREG, stat.S_IFDIR)

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        status = opened.status
        entry: Entry = {"path": opened.link, "mode": status.st_mode}
        if own := _path_in_own_proc(opened.link, opened.pid):
            return entry | {"form": "own", "path": own}
        if not opened.is_path_only and opened.mode == stat.S_IFREG:
            key = (status.st_dev, status.st_ino)
            if (found := open_named(opened.link, key)) is not None:
                reader, path = found
                survey.duplicates.append(reader)
                number = survey.objects.add_named(
                    reader, key=key, path=path, writes=opened.writable
                )
                return entry | {"form": "named", "path": path, "object": number}
        if _leads_to(opened.link, status):
            if opened.is_path_only:
                return entry | {"form": "name"}
            if opened.mode == stat.S_IFDIR:
                return entry | {"form": "directory"}
            if kernel.file_system_type(opened.fd) in kernel.PSEUDO_FILE_SYSTEMS:
                return entry | {"form": "pseudo"}
            return entry | {
                "form": "regular",
                "length_bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "file": _identity(opened.link, status),
            }
        gone = opened.link.endswith(_DELETED) or "/.nfs" in opened.link
        if not gone:
            raise opened.refusal(
                "its path leads to another file here, as in another mount namespace",
                "run lzy where the process sees its files (in its container)",
            )
        if opened.mode != stat.S_IFREG or opened.is_path_only:
            raise opened.refusal("it was deleted", "let the process close it, then dump again")
        if status.st_nlink > 0 and opened.writable and "/.nfs" not in opened.link:
            raise opened.refusal(
                "its name was deleted but it has another one, unknown here, and it is being "
                "written",
                "let the process close it, or give the file its old name again",
            )
        if not opened.readable:
            reader = os.open(f"/proc/self/fd/{opened.fd}", os.O_RDONLY | os.O_CLOEXEC)
            survey.duplicates.append(reader)
        else:
            reader = opened.fd
        number = survey.objects.add_file(reader, key=(status.st_dev, status.st_ino))
        return entry | {
            "form": "unlinked",
            "path": opened.link.removesuffix(_DELETED),
            "object": number,
        }

    def check(self, entry: Entry, assembly: Assembly) -> None:
        if entry["form"] in ("own", "unlinked", "named"):
            return
        path = entry["path"]
        try:
            status = os.lstat(path)
        except FileNotFoundError as error:
            raise Incompatible(
                f"{path}, which the process has open, does not exist here",
                remedy="bring the file back where it was, then restore again; if it is a standard "
                "one, --stdin, --stdout or --stderr names another",
                path=path,
            ) from error
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry["mode"]):
            raise Incompatible(
                f"{path}, which the process has open, is another type of file by now",
                remedy="bring the file back where it was, then restore again",
                path=path,
            )
        if entry["form"] != "regular" or assembly.options.accept_changed_files:
            return
        if path in assembly.options.known_files:
            return
        locked = assembly.once("locked files", lambda: _locked_files(assembly))
        writes = entry["flags"] & os.O_ACCMODE != os.O_RDONLY
        if writes and entry["file"] == _identity(path, status) and entry["file"] not in locked:
            return
        then = (entry["length_bytes"], entry["modified_ns"])
        now = (status.st_size, status.st_mtime_ns)
        if then != now:
            raise Incompatible(
                f"{path}, which the process has open, has changed since the dump: "
                f"{then[0]} bytes of {_date(then[1])} are {now[0]} bytes of {_date(now[1])} now",
                remedy="bring the file back as it was, or restore with --accept-changed-files",
                path=path,
            )

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        flags = entry["flags"] & ~(os.O_ASYNC | kernel.O_TMPFILE) | os.O_CLOEXEC
        if entry["flags"] & kernel.O_TMPFILE != kernel.O_TMPFILE:
            flags |= entry["flags"] & os.O_DIRECTORY
        if entry["form"] == "own":
            # /proc/PID of the process itself: it alone can open it, when it exists.
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        if entry["form"] in ("unlinked", "named"):
            content = assembly.objects.open(entry["object"])
            try:
                fd = _open_again(content, flags)
            finally:
                os.close(content)
        else:
            fd = os.open(entry["path"], flags)
        return _at_position(fd, entry)

    def make_inside(self, entry: Entry, process_id: int) -> int | None:
        if entry["form"] != "own":
            return None
        flags = entry["flags"] & ~os.O_ASYNC | os.O_CLOEXEC
        return _at_position(os.open(entry["path"], flags), entry)


def _open_again(fd: int, flags: int) -> int:
    """A new description of the file behind `fd`; without O_DIRECT where it cannot have it."""
    flags &= ~os.O_NOFOLLOW  # the way to it is a link
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    except OSError as error:
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
        return os.open(f"/proc/self/fd/{fd}", flags & ~os.O_DIRECT)


def _at_position(fd: int, entry: Entry) -> int:
    if entry["position"]:
        os.lseek(fd, entry["position"], os.SEEK_SET)
    return fd


def _identity(path: str, status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, kernel.birth_ns(path)]


def _locked_files(assembly: Assembly) -> list[list[int]]:
    """The files on which the process holds a lock, through whichever descriptor."""
    return [entry["file"] for entry in assembly.entries if "file" in entry and entry.get("locks")]


def _leads_to(path: str, status: os.stat_result) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)


def _path_in_own_proc(path: str, pid: int) -> str:
    """`/proc/self/…` for a path below the process's own /proc directory; else empty."""
    prefix = f"/proc/{pid}"
    if path == prefix or path.startswith(prefix + "/"):
        return "/proc/self" + path[len(prefix) :]
    return ""


def _date(time_ns: int) -> str:
    import time

    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + f".{rest_ns:09d} UTC"


KIND = File()
