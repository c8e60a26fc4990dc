"""What frozen processes hold open, seen from outside: their descriptions, each once.

Descriptors are grouped by what they share (an open file description) with kcmp(2), within a process
and between those of a tree; each description is duplicated into lzy with pidfd_getfd(2), asked by
its kind, and let go.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from .. import proc
from ..errors import AccessDenied, KernelError, LzyError, NotFound, Unsupported
from ..linux import descriptors as kernel
from ..linux.uffd import keeps_account
from . import locks, owners
from .kind import Entry, Kind, ObjectSink, kinds_for

T = TypeVar("T")

_FEW = 4
_FEW_BYTES = 1 << 12


class Holder(NamedTuple):
    """A frozen process whose descriptors are asked for: `pidfd` refers to `pid`."""

    pid: int
    pidfd: int
    left_out: frozenset[int] = frozenset()
    """Numbers that are not the program's own."""
    number: int = 0
    """The pid as the tree itself sees it; 0 for the first of the tree."""
    task: int = 0
    """The thread in which it is seen, where its main one has ended; see `proc.witness`."""

    @property
    def witness(self) -> int:
        """By which /proc and kcmp(2) know what it has open."""
        return self.task or self.pid


class Opened:
    """One open file description, the first process that holds it, and its numbers there."""

    def __init__(self, survey: Survey, index: int, places: list[tuple[int, int]]) -> None:
        """`places`: (index of a holder, number there), ascending."""
        self.survey = survey
        self.index = index
        self.places = places
        self.holder = survey.holders[places[0][0]]
        self.pid, self.witness = self.holder.pid, self.holder.witness
        self.travels = False
        """No process has it open: it is under way (SCM_RIGHTS), and seen in a duplicate of ours."""
        self.numbers = [number for at, number in places if at == places[0][0]]
        number = self.numbers[0]
        self.number = number
        self.proc_path = f"/proc/{self.witness}/fd/{number}"
        self.link = survey.links[places[0]]
        self.status: os.stat_result = os.stat(self.proc_path)
        self.information = survey.information[places[0]].splitlines()
        self.fields = {
            name: value.strip()
            for name, separator, value in (line.partition(":") for line in self.information)
            if separator
        }
        self.flags = int(self.fields["flags"], 8) & ~os.O_CLOEXEC
        self.position = int(self.fields["pos"])

    @functools.cached_property
    def fd(self) -> int:
        """Our duplicate of the description, closed at the end of the survey."""
        fd = kernel.duplicate_from(self.holder.pidfd, self.number)
        self.survey.duplicates.append(fd)
        return fd

    def first_places(self) -> list[tuple[int, int]]:
        """(index of a holder, a number there) of each process that holds it."""
        return list({at: (at, number) for at, number in reversed(self.places)}.values())[::-1]

    @property
    def anonymous(self) -> str:
        """`eventfd` of `anon_inode:[eventfd]`; empty for everything else."""
        prefix = "anon_inode:"
        return self.link[len(prefix) :].strip("[]") if self.link.startswith(prefix) else ""

    @property
    def is_path_only(self) -> bool:
        """Whether the description was opened with O_PATH, for its name alone."""
        return bool(self.flags & kernel.O_PATH)

    @property
    def mode(self) -> int:
        """The type bits of the file, as in stat.S_IFMT."""
        return stat.S_IFMT(self.status.st_mode)

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    def __str__(self) -> str:
        if self.travels:
            return f"what is under way in a unix socket of process {self.pid} ({self.link})"
        names = ", ".join(map(str, self.numbers))
        return f"descriptor {names} of process {self.pid} ({self.link})"

    def refusal(self, reason: str, remedy: str, *, passes: bool = False) -> Unsupported:
        """The error that says why this description cannot be made again, and a way out.

        `passes`: a process that lives changes it by itself, so that a dump tries again first.
        """
        return Unsupported(
            f"{self}: {reason}",
            remedy=remedy,
            pid=self.pid,
            descriptor=self.number,
            link=self.link,
            passes=passes,
        )


class Survey:
    """Everything the processes have open, for kinds that must look at their neighbours."""

    def __init__(self, holders: Sequence[Holder], objects: ObjectSink) -> None:
        self.holders = list(holders)
        self.pid, self.witness = holders[0].pid, holders[0].witness
        self.objects = objects
        self.duplicates: list[int] = []
        self.links: dict[tuple[int, int], str] = {}
        self.information: dict[tuple[int, int], str] = {}
        """(index of the holder, descriptor number) to its fdinfo, proc_pid_fdinfo(5)."""
        self.opened: list[Opened] = []
        self.kinds: list[Kind] = []
        self.index_of: dict[tuple[int, int], int] = {}
        """(index of the holder, descriptor number) to index of its description."""
        self._places_of: list[list[tuple[int, int]]] = [[] for _ in holders]
        self._once: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """The value made for `key` at its first use: how neighbours share what they found."""
        if key not in self._once:
            self._once[key] = make()
        value: T = self._once[key]
        return value

    def number_of(self, holder: Holder) -> int:
        """The pid of a holder as the tree itself sees it."""
        return holder.number or proc.innermost(proc.status(holder.pid)["NSpid"])

    def of_kind(self, *names: str) -> list[Opened]:
        """All descriptions that the named kinds claimed."""

        def find() -> list[Opened]:
            pairs = zip(self.opened, self.kinds, strict=True)
            return [opened for opened, kind in pairs if kind.name in names]

        return self.once(("of kind", names), find)

    def find_travelling(self, fd: int, kinds: Sequence[str]) -> int | None:
        """The index of the description behind `fd`, a duplicate of ours of one that is under way.

        If no process has it open it is taken into account as one of ours, if it is of one of
        `kinds`; else None. Only while kinds look, before any is described.
        """
        link = os.readlink(f"/proc/self/fd/{fd}")
        for opened in self.opened:
            if opened.link == link and not kernel.compare_descriptions(
                opened.witness, opened.number, fd, os.getpid()
            ):
                return opened.index
        if not any(holder.pid == os.getpid() for holder in self.holders):
            pidfd = os.pidfd_open(os.getpid())
            self.duplicates.append(pidfd)
            self.holders.append(Holder(os.getpid(), pidfd))
        place = (len(self.holders) - 1, fd)
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            self.links[place], self.information[place] = link, file.read()
        opened = Opened(self, len(self.opened), [place])
        opened.travels = True
        try:
            kind = _kind_of(opened)
        except Unsupported:
            return None
        if kind.name not in kinds:
            return None
        self.opened.append(opened)
        self.kinds.append(kind)
        return opened.index

    def look(self) -> None:
        """Find descriptors, group them by description, and find who claims each."""
        groups: dict[str, list[tuple[int, int]]] = {}
        for at in range(len(self.holders)):
            self._look_at(at, groups)
        shared: list[list[tuple[int, int]]] = []
        for group in groups.values():
            shared += self._split_by_description(group)
        _allow_descriptors(2 * len(shared) + 64)
        for index, places in enumerate(sorted(shared)):
            opened = Opened(self, index, places)
            self.opened.append(opened)
            self.index_of.update((place, index) for place in places)
        for opened in self.opened:
            try:
                kind = _kind_of(opened)
            except Unsupported as error:
                self.refuse(error)
                kind = Kind()
            self.kinds.append(kind)
        for opened, kind in zip(self.opened, self.kinds, strict=True):  # and those found meanwhile
            kind.look(opened, self)

    def _look_at(self, at: int, groups: dict[str, list[tuple[int, int]]]) -> None:
        holder = self.holders[at]
        with (
            _folder(f"/proc/{holder.witness}/fd") as links,
            _folder(f"/proc/{holder.witness}/fdinfo") as folder,
        ):
            for number in sorted(set(map(int, os.listdir(links))) - holder.left_out):
                name = str(number)
                link = os.readlink(name, dir_fd=links)
                information = _read(folder, name)
                if link == "anon_inode:[userfaultfd]" and keeps_account(information):
                    continue  # lzy's own (`lzy.checkpoint.tracking`), which no program knows of
                self._places_of[at].append((at, number))
                self.links[at, number] = link
                self.information[at, number] = information
                groups.setdefault(link, []).append((at, number))

    def _split_by_description(self, places: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Divide descriptors that look alike into those that share a description."""

        def order(one: tuple[int, int], other: tuple[int, int]) -> int:
            return kernel.compare_descriptions(
                self.holders[one[0]].witness, one[1], other[1], self.holders[other[0]].witness
            )

        groups: list[list[tuple[int, int]]] = []
        for place in places:
            mine = next((group for group in groups if order(group[0], place) == 0), None)
            if mine is None:
                groups.append(mine := [])
                if len(groups) > _FEW:  # then it is quicker to put all of them in order
                    break
            mine.append(place)
        else:
            return groups
        groups = []
        previous: tuple[int, int] | None = None
        for place in sorted(places, key=functools.cmp_to_key(order)):
            if previous is not None and order(previous, place) == 0:
                groups[-1].append(place)
            else:
                groups.append([place])
            previous = place
        return [sorted(group) for group in groups]

    def describe(self) -> list[Entry]:
        """Ask each kind about its descriptions; the flags and the like are asked here."""
        entries = []
        for opened, kind in zip(self.opened, self.kinds, strict=True):
            entry: Entry = {
                "kind": kind.name,
                "flags": opened.flags,
                "position": opened.position,
            }
            entries.append(entry)
            if opened.holder.number:
                entry["holder"] = opened.holder.number
            try:
                if not opened.is_path_only:
                    entry.update(locks.describe_locks(opened))
                    entry.update(owners.describe_owner(opened))
                if kind.name:
                    entry.update(kind.describe(opened, self))
            except Unsupported as error:
                self.refuse(error)
        return entries

    def refuse(self, error: Unsupported) -> None:
        """What to do about a description that cannot be made again: here, to give up."""
        raise error

    def descriptors(self, at: int) -> dict[str, dict[str, Any]]:
        """Each number of a holder (as text, for JSON): description and its own close-on-exec."""
        answer = {}
        for place in self._places_of[at]:
            flags = int(self.information[place].partition("flags:")[2].split(None, 1)[0], 8)
            answer[str(place[1])] = {
                "description": self.index_of[place],
                "close_on_exec": bool(flags & os.O_CLOEXEC),
            }
        return answer

    def close(self) -> None:
        """Let our duplicates go."""
        while self.duplicates:
            os.close(self.duplicates.pop())


@contextlib.contextmanager
def _folder(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(folder: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = piece = os.read(fd, _FEW_BYTES)
        while len(piece) == _FEW_BYTES:  # as a rule it is less, and that is all of it
            found += (piece := os.read(fd, _FEW_BYTES))
        return found.decode("ascii")
    finally:
        os.close(fd)


_WAYS_OUT = {
    "userfaultfd": "wait until its memory is served (after a lazy restore: `lzy images` and the "
    "pager's log tell), then dump again",
    "perf_event": "end the profiler that runs in the process, then dump again",
    "fanotify": "let the process watch with inotify, or close it",
    "/dev/nvidia": "free the GPU and let the process close it (e.g. end its CUDA context)",
    "net:": "let the process close the descriptor of its namespace, then dump again",
}


def _kind_of(opened: Opened) -> Kind:
    for kind in kinds_for(opened.link):
        if kind.claims(opened):
            return kind
    what = opened.anonymous or opened.link
    if what.startswith("socket:"):
        what = _name_of_socket(opened)
    remedies = (way for name, way in _WAYS_OUT.items() if what.startswith(name))
    raise opened.refusal(
        f"a descriptor of this kind ({what}) cannot be made again",
        next(remedies, "let the process close it, then dump again"),
    )


def _name_of_socket(opened: Opened) -> str:
    import socket

    with socket.socket(fileno=os.dup(opened.fd)) as sock:
        family, kind = sock.family, sock.type
    names = [getattr(value, "name", str(value)).lower() for value in (family, kind)]
    return f"{names[0].removeprefix('af_')} {names[1].removeprefix('sock_')} socket"


def _allow_descriptors(count: int) -> None:
    """Raise our own limit where needed, since each description is held here for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def describe_descriptors(
    pid: int, pidfd: int, objects: ObjectSink, left_out: frozenset[int] = frozenset()
) -> dict[str, Any]:
    """Describe everything the frozen process `pid` has open but `left_out`, changing none of it.

    `pidfd` refers to the same process; the caller must be allowed to trace it. The answer can be
    written as JSON: `descriptions`, a list of entries, and `descriptors`, number (as text) to
    `{"description": index, "close_on_exec": bool}`.

    Raises Unsupported with the number, the kind and a way out for what cannot be made again,
    NotFound when the process ends meanwhile, AccessDenied, KernelError.
    """
    return describe_together([Holder(pid, pidfd, left_out)], objects)[0]


def describe_together(holders: Sequence[Holder], objects: ObjectSink) -> list[dict[str, Any]]:
    """As `describe_descriptors`, for several processes: a table of each.

    The descriptions of all of them stand in the first; the others name them by their index there.
    """
    survey = Survey(holders, objects)
    pid = holders[0].pid
    try:
        survey.look()
        tables = [
            {"pid": holder.pid, "descriptors": survey.descriptors(at)}
            for at, holder in enumerate(holders)
        ]
        tables[0]["descriptions"] = survey.describe()
        return tables
    except LzyError:
        raise
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise AccessDenied(
                f"cannot look at the descriptors of process {pid}: {error}",
                remedy="run lzy as the owner of the process, with the right to trace it",
                pid=pid,
            ) from error
        for holder in holders:
            if not os.path.isdir(f"/proc/{holder.witness}/fd"):
                raise NotFound(f"process {holder.pid} is gone", pid=holder.pid) from error
        raise KernelError(
            f"cannot describe the descriptors of process {pid} ({error.filename or 'system call'})",
            error.errno or 0,
            pid=pid,
        ) from error
    finally:
        survey.close()
