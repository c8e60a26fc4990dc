"""What an image needs to find on this machine: its files, looked for before anything is made.

A mapped file is the one at its path if that is the same, by build-id and size, or by size and time
of change; else the copy that the image carries; else, by build-id, a copy that another image has
brought, or a file of that name where libraries are. All that is missing or different is told at
once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .elf import build_id
from .errors import Incompatible
from .lacking import refuse_lacking

if TYPE_CHECKING:
    from .image import Image

_DELETED = " (deleted)"

_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
    "/usr/local/lib",
)
_COMES = -2  # instead of a descriptor: it will be there when `settle` is done

Files = dict[tuple[str, bool], int]


class Needs:
    """What the processes of an image need to find here, gathered process by process."""

    def __init__(self, image: Image, *, accept_changed: bool = False) -> None:
        """`image` is the whole one, not a member of it."""
        self.image = image
        self.accept_changed = accept_changed
        self.problems: list[Incompatible] = []
        self.notes: list[str] = []
        self._carried = [
            entry for entry in image.document.get("carried", ()) if entry["purpose"] == "asked"
        ]
        self._missing: list[dict[str, Any]] = []
        self._same: set[str] = set()
        self._told: set[str] = set()
        self._looked = False
        self._later: list[tuple[Files, tuple[str, bool]]] = []

    def open_files(self, own: dict[str, Any], vmas: list[dict[str, Any]], files: Files) -> None:
        """Open what a process (`process` and `vmas` of its document) has mapped, by `file_key`.

        They are added to `files`, which is the caller's. What cannot be found becomes a problem;
        what is to be put back is there after `settle`.
        """
        self._look_at_asked()
        copied = []
        for vma in vmas:
            if vma["kind"] == "file" and (key := file_key(vma)) not in files:
                descriptor, is_copy = self._open(key[0], key[1], vma.get("file"))
                if descriptor == _COMES:
                    self._later.append((files, key))
                if descriptor >= 0:
                    files[key] = descriptor
                    copied += [key[0]] * is_copy
        path = own["exe"]
        if not own["exe_object"] and (path, False) not in files:
            descriptor, is_copy = self._open(path, False, None)
            if descriptor >= 0:
                files[path, False] = descriptor
                copied += [path] * is_copy
        if copied:
            shown = ", ".join(sorted(set(copied))[:3]) + (", …" if len(set(copied)) > 3 else "")
            self.notes.append(
                f"{len(set(copied))} files are not in place as they were; they come from the "
                f"image, or are found by build-id: {shown}"
            )
        self._look_for_folder(own)

    def settle(self, find_others: Callable[[frozenset[str]], list[Incompatible]]) -> None:
        """Raise Incompatible if anything is missing; put back what the image carries.

        `find_others`: what else is missing, besides the paths that it is given.
        """
        others: list[Incompatible] = []
        if self.problems or self._missing:  # else whoever needs them tells
            others = find_others(self.coming_files)
        refuse_lacking([*self.problems, *others])
        if self._missing:
            from .carried import put_back

            put_back(self.image, self._missing)
            count = sum(entry["type"] == "file" for entry in self._missing)
            self.notes.append(f"{count} files were put back, which the image carries")
            self._missing = []
        for files, key in self._later:
            files[key] = os.open(key[0], (os.O_RDWR if key[1] else os.O_RDONLY) | os.O_CLOEXEC)
        self._later = []

    @property
    def known_files(self) -> frozenset[str]:
        """Paths of files that are carried and the same here, whatever their times of change."""
        return frozenset(self._same)

    @property
    def coming_files(self) -> frozenset[str]:
        """Paths that `settle` will put something at."""
        return frozenset(entry["path"] for entry in self._missing)

    def _look_at_asked(self) -> None:
        if self._looked or not self._carried:
            return
        self._looked = True
        from .carried import compare_asked, refuse_others

        others = []
        for entry in self._carried:
            how = compare_asked(entry)
            if how == "missing":
                self._missing.append(entry)
            elif how == "same":
                self._same.add(entry["path"])
            else:
                others.append(entry)
        if not self.accept_changed:
            self.problems += refuse_others(self.image, others)

    def _open(self, path: str, writable: bool, expected: dict[str, Any] | None) -> tuple[int, bool]:
        """(a descriptor of the file or -1, whether it is a copy of lzy's)."""
        problem: Incompatible | None = None
        descriptor = -1
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            problem = Incompatible(
                f"image {self.image.name} needs {path}, which cannot be opened here: "
                f"{error.strerror}",
                remedy="bring the file back, restore on a node that has it, or dump with "
                "--carry-files",
                path=path,
            )
        else:
            if expected is None or self.accept_changed or path in self._same:
                return descriptor, False
            problem = _compare(path, descriptor, expected, self.image.name)
            if problem is None:
                return descriptor, False
        copy = -1 if writable else self._find_copy(path, expected)
        if copy >= 0:
            if descriptor >= 0:
                os.close(descriptor)
            return copy, True
        if path in self.coming_files:
            return _COMES, False
        if path not in self._told:
            self._told.add(path)
            self.problems.append(problem)
        return descriptor, False

    def _find_copy(self, path: str, expected: dict[str, Any] | None) -> int:
        from .carried import find_carried, find_copy, open_copy

        if entry := find_carried(self.image, path):
            return open_copy(self.image, entry)
        if not expected or not expected["build_id"]:
            return -1
        found = find_copy(expected["build_id"], expected["size_bytes"])
        return self._find_elsewhere(path, expected) if found is None else found

    def _find_elsewhere(self, path: str, expected: dict[str, Any]) -> int:
        """A file of that name and build-id in another folder of libraries, or -1."""
        mapped = (vma.get("path", "") for vma in self.image.document["vmas"])
        folders = dict.fromkeys([*_LIBRARIES, *map(os.path.dirname, mapped)])
        for folder in folders:
            place = os.path.join(folder, os.path.basename(path))
            if not folder.startswith("/") or place == path:
                continue
            try:
                descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            if _compare(place, descriptor, expected, self.image.name) is None:
                return descriptor
            os.close(descriptor)
        return -1

    def _look_for_folder(self, own: dict[str, Any]) -> None:
        root, cwd = own["root"], own["cwd"]
        if cwd.endswith(_DELETED) or os.path.isdir(os.path.join(root, cwd.lstrip("/"))):
            return
        below = cwd.rstrip("/") + "/"
        if any(path == cwd or path.startswith(below) for path in self.coming_files):
            return
        self.problems.append(
            Incompatible(
                f"the working directory {cwd} of image {self.image.name} is not here",
                remedy="make it again, restore on a node that has it, or dump with --carry",
                path=cwd,
            )
        )


def file_key(vma: dict[str, Any]) -> tuple[str, bool]:
    """Under what a mapping's file is opened: its path, and whether it is to be written."""
    shared = vma["permissions"][3] == "s"
    return vma["path"], shared and "mw" in vma["flags"]


def _compare(
    path: str, descriptor: int, expected: dict[str, Any], image: str
) -> Incompatible | None:
    status = os.fstat(descriptor)
    if expected["build_id"]:
        same = build_id(descriptor) == expected["build_id"]
    else:
        same = status.st_mtime_ns == expected["modified_ns"]
    if same and status.st_size == expected["size_bytes"]:
        return None
    return Incompatible(
        f"{path} has changed since image {image} was taken "
        f"({expected['size_bytes']} bytes then, {status.st_size} now)",
        remedy="put the old file back, dump with --carry-files, or say --accept-changed-files",
        path=path,
    )
