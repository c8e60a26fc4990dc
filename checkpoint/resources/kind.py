"""A kind of descriptor: how one is recognised, described, and made again; and how kinds are found.

Each module of this package that has a `KIND` is one kind (or close family), found by its name:
to support another, add one such file. The table of an image names the module of each entry.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import Unsupported

if TYPE_CHECKING:
    from .assembly import Assembly
    from .survey import Opened, Survey

Entry = dict[str, Any]
"""One description in the table: JSON-able; `kind`, `flags` and `position` are every kind's."""


_SOCKET = "socket:"
_OF_SOCKETS = ("socket_state", "release")  # and all whose name ends so


class ObjectSink(Protocol):
    """Where contents go that have no path: memory files and deleted files (the engine's)."""

    def add_file(self, fd: int, *, key: tuple[int, int]) -> int:
        """Keep the content behind `fd` (readable); return its object number.

        `key` is (st_dev, st_ino): the same key gives the same object. `fd` is closed soon after
        the call, so what is needed longer must be duplicated.
        """
        ...

    def add_named(
        self, fd: int, *, key: tuple[int, int], path: str, writes: bool, maps: bool = False
    ) -> int:
        """As `add_file`, of memory that is at `path` in /dev/shm (`lzy.checkpoint.named`)."""
        ...


class ObjectSource(Protocol):
    """Where those contents come from when the process is made again (the engine's)."""

    def open(self, number: int) -> int:
        """A descriptor of the file made again for object `number`, owned by the caller."""
        ...


class NoObjects:
    """A sink and source for processes that need none; using it is an error."""

    def add_file(self, fd: int, *, key: tuple[int, int]) -> int:
        raise Unsupported("a file without a path is open, and nothing keeps its content", fd=fd)

    def add_named(
        self, fd: int, *, key: tuple[int, int], path: str, writes: bool, maps: bool = False
    ) -> int:
        raise Unsupported(f"{path} is memory, and nothing keeps its content", fd=fd)

    def open(self, number: int) -> int:
        raise Unsupported(f"the image has no object {number}")


class RestoreOptions(NamedTuple):
    """What the person who restores chose."""

    stdin: str | None = None
    """File that becomes descriptor 0 (read)."""
    stdout: str | None = None
    """File that becomes descriptor 1 (appended to, made when missing)."""
    stderr: str | None = None
    """The same for 2; the same path as `stdout` shares one description with it."""
    terminal: str | None = None
    """Terminal to use for one that is gone; None finds the caller's own, else /dev/null."""
    accept_changed_files: bool = False
    """Open files again even if their size or time of change is not what it was."""
    known_files: frozenset[str] = frozenset()
    """Paths of files whose content was compared: their time of change does not matter."""
    listeners: Mapping[str, int] = {}
    """Sockets that listen already in the place of the process's own (`tcp_socket.address_key`)."""


class Finish:
    """What a kind may need once the process exists and before it runs."""

    def __init__(self, pids: dict[int, int], tids: dict[int, int]) -> None:
        self.pids = pids
        """The processes by the pids they had, as lzy saw them, to those that the restorer sees."""
        self.tids = tids
        """Thread ids of the image to thread ids as the restorer sees them."""


class Kind:
    """What one kind can do; subclasses say so for theirs. Instances hold no state."""

    name = ""
    """The module's name, set when found."""
    rank = 50
    """Kinds are asked, and their entries made, in this order."""

    def claims(self, opened: Opened) -> bool:
        """Tell whether the description is of this kind."""
        raise NotImplementedError

    def look(self, opened: Opened, survey: Survey) -> None:
        """Find what is open only by way of it; before any is described, for all are neighbours."""

    def describe(self, opened: Opened, survey: Survey) -> Entry:
        """Say how to make it again, without changing it; raise Unsupported if that cannot be."""
        raise NotImplementedError

    def check(self, entry: Entry, assembly: Assembly) -> None:
        """Raise (Incompatible, Busy…) if this machine cannot make it; before anything is made."""

    def make(self, index: int, entry: Entry, assembly: Assembly) -> int:
        """Make it; return a local descriptor of it, which the assembly then owns."""
        raise NotImplementedError

    def settle(self, index: int, entry: Entry, assembly: Assembly) -> None:
        """Give the last touches (options, shutdowns) once every description is made."""

    def make_inside(self, entry: Entry, process_id: int) -> int | None:
        """In the new process itself: make what only it can; None keeps what `make` made."""
        return None

    def place(self, entry: Entry, fd: int, local: dict[int, int], holder: int) -> None:
        """In the new process: what must be done there when every descriptor has its number.

        `holder` is its number in the tree, 0 for the first: only what that one registered.
        """

    def finish(self, entry: Entry, fd: int, finish: Finish) -> None:
        """In the restorer, on its own copy `fd`, when the process exists, just before it runs."""


@cache
def kind_named(name: str) -> Kind:
    """The kind that module `name` of this package defines; Unsupported if there is none."""
    if not name.isidentifier():
        raise Unsupported(f"the image names a kind of descriptor that is no name: {name!r}")
    try:
        module = importlib.import_module(f".{name}", __package__)
        kind = module.KIND
    except (ModuleNotFoundError, AttributeError) as error:
        raise Unsupported(
            f"this lzy knows no descriptors of the kind {name!r}",
            remedy="restore with the version of lzy that made the image, or a later one",
            kind=name,
        ) from error
    assert isinstance(kind, Kind)
    kind.name = name
    return kind


def load_kinds(pids: Iterable[int]) -> None:
    """Load what it takes to describe all that these processes have open now."""
    all_kinds(sockets=False)
    if any(map(_has_sockets, pids)):
        all_kinds()


def _has_sockets(pid: int) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        return any(
            os.readlink(f"{folder}/{number}").startswith(_SOCKET) for number in os.listdir(folder)
        )
    except OSError:  # it has closed one just now, or is not ours to look at
        return True


def kinds_for(link: str) -> Sequence[Kind]:
    """Who may claim a descriptor with that name in /proc/PID/fd, in the order to be asked."""
    return all_kinds() if link.startswith(_SOCKET) else all_kinds(sockets=False)


@cache
def all_kinds(*, sockets: bool = True) -> Sequence[Kind]:
    """Every kind there is, in the order in which they are asked; those of `sockets` if wanted.

    To load the socket module takes longer than all the others together.
    """
    kinds = []
    for file in os.listdir(os.path.dirname(__file__)):  # pkgutil would take inspect, and 6 ms
        name, _, suffix = file.partition(".")
        if not sockets and (name.endswith("_socket") or name in _OF_SOCKETS):
            continue
        if suffix == "py" and name != "__init__":
            module = importlib.import_module(f".{name}", __package__)
            if hasattr(module, "KIND"):
                kinds.append(kind_named(name))
    return sorted(kinds, key=lambda kind: (kind.rank, kind.name))
