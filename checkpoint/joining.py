"""Memory with a name, when its processes come back: made again, joined, taken over, or another's.

What is in /dev/shm is memory of those who have it mapped. So it is asked who holds the file that
has the name by now:

- there is none: it is made from the image, and gets its name when it is whole;
- another life of the same tree holds it (the original, a copy): this one needs a /dev/shm of its
  own, where all is made from the image (`own_folder`);
- others hold the very same file: the processes join them, and find there what there is by now;
- others hold another one: it is theirs, and nothing is restored;
- nobody holds it: if the tree had made it, or lzy for that session, the image says what was in it;
  if it holds that anyway it is used; else it is somebody's who will look for it.

*Guarantee*: memory that others hold is not written, and a name is taken from nobody. A restore that
fails removes what it has made; what it took over is written at the very last.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from . import proc
from .errors import Busy, LzyError, NotFound
from .history import session_facts
from .linux import namespaces, tmpfs
from .named import FOLDER, MARK, find_holders, holds_same, identity_of, key_of, mark_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from .image import Image

_MAKE: Final = "make"
_USE: Final = "use"
_FILL: Final = "fill"

Described = dict[str, Any]


class _Found(NamedTuple):
    how: str
    descriptor: int = -1
    names: tuple[str, ...] = ()
    """What it is to be called, too, where nobody else is."""


class NamedMemory:
    """The named contents of one image; its methods are steps, in order."""

    def __init__(self, image: Image, notes: list[str], *, accept_changed: bool = False) -> None:
        self._image = image
        self._notes = notes
        self._accept_changed = accept_changed
        document = image.document
        self._session = str(session_facts(document, image.name)["name"])
        self._same_boot = document["host"]["boot_id"] == proc.boot_id()
        self._named: list[Described] = [o for o in document["objects"] if "path" in o]
        members = [document, *document.get("members", ())]
        self._pids = {int(member["pid"]) for member in members}
        self._found: dict[str, _Found] = {}
        self._made: list[tuple[str, int]] = []

    def look(self) -> bool:
        """See what is there; whether another life of the tree lives there, too.

        Then nothing is decided: call it again in a folder of its own. Raises Busy for a name that
        is another's.
        """
        problem: Busy | None = None
        for described in self._named:
            try:
                found = self._look_at(described)
            except Busy as error:
                problem = problem or error
                continue
            if found is None:
                self.close()
                return True
            self._found[described["path"]] = found
        if problem:
            self.close()
            raise problem
        return False

    def _look_at(self, described: Described) -> _Found | None:
        path = described["path"]
        names = (path, *described.get("names", ()))
        descriptor = _open_regular(path)
        if descriptor < 0:
            descriptor = self._open_by_another_name(described)
        if descriptor < 0:
            return _Found(_MAKE, names=names)
        keep = False
        try:
            how = self._judge(described, descriptor)
            keep = bool(how)
            wanted = names if described["own"] and not described["others"] else ()
            return _Found(how, descriptor, wanted) if how else None
        finally:
            if not keep:
                os.close(descriptor)

    def _open_by_another_name(self, described: Described) -> int:
        """The very file, where one of its names is left: lzy was killed as it removed them."""
        for path in described.get("names", ()) if self._same_boot else ():
            with contextlib.suppress(Busy):
                if (descriptor := _open_regular(path)) >= 0:
                    if identity_of(descriptor) == described["file"]:
                        return descriptor
                    os.close(descriptor)
        return -1

    def _judge(self, described: Described, descriptor: int) -> str:
        """How to go on with what is there; nothing if another life of the tree has it."""
        path = described["path"]
        same = self._same_boot and identity_of(descriptor) == described["file"]
        with tmpfs.held_alone(descriptor) as alone:
            holders = [] if alone else self._find_holders(descriptor)
            if holders or alone is False:
                if any(map(self._is_life, holders)):
                    return ""
                if not same:
                    who = f", pid {holders[0]}" if holders else ""
                    raise _taken(path, f"is held by another process by now{who}")
                self._notes.append(f"others hold {path}, too: it is as they left it by now")
                return _USE
            if same and described["others"]:
                self._notes.append(f"others had {path}, too: it is as they left it")
                return _USE
            if holds_same(self._image, described, descriptor):
                return _USE
            if mark_of(descriptor) == self._session or (same and described["own"]):
                return _FILL
            if self._accept_changed:
                return _USE
            raise _taken(path, "has another content by now, and the process had not made it")

    def _is_life(self, pid: int) -> bool:
        """Whether a process belongs to a life of the tree: it, or one above it, has its number."""
        with contextlib.suppress(NotFound):
            while pid > 1:
                if proc.innermost(proc.status(pid)["NSpid"]) in self._pids:
                    return True
                pid = int(proc.stat(pid)[3])
        return False

    def _find_holders(self, descriptor: int) -> list[int]:
        status = os.fstat(descriptor)
        key = (status.st_dev, status.st_ino)
        return find_holders([key], ())[key]

    def open(self, described: Described) -> int:
        """A descriptor of the file under its name; made, with its content, if it is not there."""
        path = described["path"]
        found = self._found.pop(path)
        if found.how == _MAKE:
            return self._make(described)
        if found.names:  # the tree's own, which it takes with it again when it is dumped
            with contextlib.suppress(OSError):
                os.setxattr(found.descriptor, MARK, self._session.encode())
            self._name(described, found.descriptor, found.names)
        if found.how == _FILL:
            self._found[path] = _Found(_FILL, os.dup(found.descriptor))
        return found.descriptor

    def _make(self, described: Described) -> int:
        path = described["path"]
        try:
            _make_folders(os.path.dirname(path), described["owner"])
            nameless = tmpfs.make_nameless(os.path.dirname(path))
            try:
                self._fill(described, nameless)
                self._made.append((path, os.fstat(nameless).st_ino))
                tmpfs.give_name(nameless, path)
                self._name(described, nameless, described.get("names", ()))
                # By its name, or the kernel would call it ` (deleted)` wherever it is mapped.
                return _open_same(path, nameless)
            finally:
                os.close(nameless)
        except FileExistsError as error:
            raise _taken(path, "was made by another process just now") from error
        except OSError as error:
            raise LzyError(
                f"cannot make {path} again, shared memory of the process: {error.strerror}",
                remedy=f"make room in {FOLDER} (`df -h {FOLDER}`), or restore elsewhere",
                path=path,
            ) from error

    def _name(self, described: Described, descriptor: int, names: Iterable[str]) -> None:
        """Have a file called by all of its names that are nobody else's by now."""
        for path in names:
            _make_folders(os.path.dirname(path), described["owner"])
            try:
                tmpfs.give_name(descriptor, path)
                self._made.append((path, os.fstat(descriptor).st_ino))
            except FileExistsError:
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) != key_of(descriptor):
                    also = f"{described['path']}, shared memory of the process, was called {path}"
                    self._notes.append(f"{also}, too: another file is by now")
            except OSError as error:
                if path == described["path"]:
                    raise
                self._notes.append(f"{path} could not be made again: {error.strerror}")

    def _fill(self, described: Described, descriptor: int) -> None:
        from .carried import write_content

        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, *described["owner"])
        os.fchmod(descriptor, described["mode"])
        with contextlib.suppress(OSError):  # a kernel without such attributes on a tmpfs
            os.setxattr(descriptor, MARK, self._session.encode())
        write_content(self._image, described["space"], descriptor, described["length_bytes"])

    def settle(self) -> None:
        """The last step before the processes run: what was taken over gets its content."""
        for described in self._named:
            found = self._found.get(described["path"])
            if found and found.how == _FILL:
                os.ftruncate(found.descriptor, 0)
                self._fill(described, found.descriptor)

    def undo(self) -> None:
        """The restore has failed: what was made for it goes."""
        for path, inode in self._made:
            with contextlib.suppress(OSError):
                if os.lstat(path).st_ino == inode:
                    os.unlink(path)
        self._made.clear()

    def close(self) -> None:
        """Close what is left open."""
        for found in self._found.values():
            if found.descriptor >= 0:
                os.close(found.descriptor)
        self._found.clear()


def has_named(document: dict[str, Any]) -> bool:
    """Whether there is memory with a name in an image."""
    return any("path" in described for described in document["objects"])


@contextlib.contextmanager
def own_folder(besides: Iterable[str | Path]) -> Iterator[None]:
    """Have an empty /dev/shm of our own in the block; `besides` are places we shall still need.

    The calling thread's alone; what is made meanwhile stays there. Raises LzyError.
    """
    for place in besides:
        if os.path.realpath(place).startswith(FOLDER):
            raise LzyError(
                f"the processes need a {FOLDER} of their own, and lzy's {place} is in it",
                remedy="move it to a folder elsewhere (--store, LZY_HOME)",
                path=place,
            )
    room = os.statvfs(FOLDER)
    try:
        outside = namespaces.enter_own_folder(FOLDER.rstrip("/"), room.f_blocks * room.f_frsize)
    except OSError as error:
        raise LzyError(
            f"cannot make a {FOLDER} of its own for the process: {error.strerror}",
            remedy="run lzy as root (CAP_SYS_ADMIN)",
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # without root there is no way back
            namespaces.go_back(outside)


def _open_regular(path: str) -> int:
    """A descriptor of the file there, to be written if we may; -1 if there is none."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    for mode in (os.O_RDWR, os.O_RDONLY):
        try:
            descriptor = os.open(path, mode | flags)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        except OSError as error:
            if mode == os.O_RDWR and isinstance(error, PermissionError):
                continue
            raise _taken(path, f"cannot be opened ({error.strerror})") from error
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.set_blocking(descriptor, True)
            return descriptor
        os.close(descriptor)
        raise _taken(path, "is no file any more")
    return -1


def _open_same(path: str, other: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if os.path.sameopenfile(descriptor, other):
        return descriptor
    os.close(descriptor)
    raise FileExistsError


def _make_folders(folder: str, owner: list[int]) -> None:
    if not os.path.isdir(folder):
        _make_folders(os.path.dirname(folder), owner)
        os.mkdir(folder, 0o700)
        with contextlib.suppress(PermissionError):
            os.chown(folder, *owner)


def _taken(path: str, why: str) -> Busy:
    return Busy(
        f"{path}, shared memory of the image, {why}",
        remedy=f"remove it if nobody needs it (rm {path}), or restore with --copy: then the "
        f"process has a {FOLDER} of its own",
        path=path,
    )
