"""Making described descriptors again: first here, then under their numbers in the new process.

The restorer makes every description (`make_descriptors`) at numbers above all that the process
will use; the forked child moves them to their places (`place_descriptors`) just before it becomes
the new process; what needs the process to exist comes last (`finish_descriptors`).
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import AccessDenied, Incompatible, KernelError, LzyError, NotFound
from ..lacking import refuse_lacking
from ..linux import descriptors as kernel
from . import locks, owners
from .kind import Entry, Finish, ObjectSource, RestoreOptions, kind_named

T = TypeVar("T")
STANDARD = ("stdin", "stdout", "stderr")


class Assembly:
    """The descriptions being made, for kinds whose members are made together."""

    def __init__(
        self, table: dict[str, Any], objects: ObjectSource, options: RestoreOptions
    ) -> None:
        self.table = table
        self.entries: list[Entry] = table["descriptions"]
        self.objects = objects
        self.options = options
        self.floor = free_number(table)
        self.local: dict[int, int] = {}
        """Description index to our descriptor of it; -1-n is the replacement for number n."""
        self.numbers = _numbers_of(table)
        """Description index to the numbers that lead to it, in whichever process."""
        self._places: dict[int, list[tuple[int, int]]] = {}
        for holder, places in _tables_of(table):
            for number, place in places.items():
                self._places.setdefault(place["description"], []).append((holder, int(number)))
        self._once: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """The value made for `key` at its first use: how members of a family are made together."""
        if key not in self._once:
            self._once[key] = make()
        value: T = self._once[key]
        return value

    def of_kind(self, *names: str) -> list[tuple[int, Entry]]:
        """All entries of the named kinds that are to be made, with their indexes."""

        def find() -> list[tuple[int, Entry]]:
            return [
                (index, entry)
                for index, entry in enumerate(self.entries)
                if entry["kind"] in names and self.is_needed(index)
            ]

        return self.once(("of kind", names), find)

    def is_standard(self, index: int) -> bool:
        """Whether the description is standard input, output or error."""
        return any(number <= 2 for number in self.numbers.get(index, ()))

    def is_needed(self, index: int) -> bool:
        """Whether anything is left of it once the standard descriptors are re-pointed."""
        numbers = self._places.get(index, [])
        if any(not self._is_repointed(holder, number, index) for holder, number in numbers):
            return True
        return any(
            target["description"] == index
            for entry in self.entries
            for target in entry.get("targets", ())
        ) or any(
            index in message.get("descriptors", ())
            for entry in self.entries
            for message in entry.get("messages", ())
        )

    def _is_repointed(self, holder: int, number: int, index: int) -> bool:
        """Whether a standard descriptor leads to what was chosen instead.

        That of another process of the tree does where it is the first one's, inherited.
        """
        if number > 2 or not self._replacement(number):
            return False
        own = self.table["descriptors"].get(str(number))
        return not holder or (own is not None and own["description"] == index)

    def adopt(self, index: int, fd: int) -> int:
        """Own `fd` as description `index`: moved above all numbers of the process."""
        self.local[index] = self.lift(fd)
        return self.local[index]

    def lift(self, fd: int) -> int:
        """Move our own descriptor above all numbers that the process uses, close-on-exec."""
        if fd >= self.floor:
            os.set_inheritable(fd, False)
            return fd
        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.floor)
        finally:
            os.close(fd)

    def make(self, index: int) -> int:
        """Our descriptor of description `index`, made at the first call."""
        if index not in self.local:
            entry = self.entries[index]
            fd = kind_named(entry["kind"]).make(index, entry, self)
            if index not in self.local:  # a family's members are adopted as they are made
                self.adopt(index, fd)
        return self.local[index]

    def make_all(self) -> None:
        """Check all, then make all; what fails leaves nothing open."""
        wanted = self._list_needed()
        refuse_lacking(self.find_lacking())
        self._open_replacements()
        for index in wanted:
            with _explained(self.entries[index], self.numbers.get(index, [])):
                self.make(index)
        for index in wanted:
            with _explained(self.entries[index], self.numbers.get(index, [])):
                entry = self.entries[index]
                kind_named(entry["kind"]).settle(index, entry, self)
                locks.refuse_taken_locks(entry, self.local[index])
                set_flags(self.local[index], entry["flags"])

    def _list_needed(self) -> list[int]:
        """What is to be made, in order."""

        def find() -> list[int]:
            wanted = [index for index in range(len(self.entries)) if self.is_needed(index)]
            wanted.sort(key=lambda index: (kind_named(self.entries[index]["kind"]).rank, index))
            return wanted

        return self.once("needed", find)

    def find_lacking(self, besides: frozenset[str] = frozenset()) -> list[Incompatible]:
        """What this machine lacks to make them, but for these paths; raises what else is wrong."""
        found: list[Incompatible] = []
        for index in self._list_needed():
            entry = self.entries[index]
            if entry.get("path") in besides:
                continue
            try:
                with _explained(entry, self.numbers.get(index, [])):
                    kind_named(entry["kind"]).check(entry, self)
            except Incompatible as error:
                if error.message not in (known.message for known in found):
                    found.append(error)
        return found

    def _replacement(self, number: int) -> str | None:
        path: str | None = getattr(self.options, STANDARD[number]) if number <= 2 else None
        return path

    def _open_replacements(self) -> None:
        opened: dict[str, int] = {}
        for number in (0, 1, 2):
            path = self._replacement(number)
            if path is None:
                continue
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            key = f"{flags}:{path}"
            try:
                fd = os.dup(opened[key]) if key in opened else os.open(path, flags, 0o666)
            except OSError as error:
                raise NotFound(
                    f"cannot open {path} as {STANDARD[number]}: {error.strerror}",
                    remedy=f"choose another file with --{STANDARD[number]}",
                    path=path,
                ) from error
            self.local[-1 - number] = opened[key] = self.lift(fd)

    def close(self) -> None:
        """Close all that was made."""
        for fd in self.local.values():
            os.close(fd)
        self.local.clear()


def _numbers_of(table: dict[str, Any]) -> dict[int, list[int]]:
    """Description index to the descriptors that share it."""
    numbers: dict[int, list[int]] = {}
    for _, places in _tables_of(table):
        for number, place in places.items():
            numbers.setdefault(place["description"], []).append(int(number))
    return numbers


def _tables_of(table: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(number of the process in the tree, its descriptors); 0 for the first."""
    others = table.get("others", {}).items()
    return [(0, table["descriptors"]), *((int(holder), places) for holder, places in others)]


def free_number(table: dict[str, Any]) -> int:
    """The first number above all that the process uses (at least 3)."""
    return max([2, *(int(number) for _, places in _tables_of(table) for number in places)]) + 1


def set_flags(fd: int, flags: int) -> None:
    """Give a description the status flags that fcntl(F_SETFL) can give."""
    now = fcntl.fcntl(fd, fcntl.F_GETFL)
    if now & kernel.O_PATH or not (now ^ flags) & kernel.SETTABLE_FLAGS:
        return
    wanted = now & ~kernel.SETTABLE_FLAGS | flags & kernel.SETTABLE_FLAGS
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError:
        # What stands in for something else (/dev/null for a pipe) may not know O_DIRECT.
        if not wanted & os.O_DIRECT:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted & ~os.O_DIRECT)


def make_descriptors(
    table: dict[str, Any], objects: ObjectSource, options: RestoreOptions
) -> dict[int, int]:
    """Make every description of `table` here; return description index to our descriptor.

    Ours are close-on-exec and lie above every number in the table; negative indexes stand for
    re-pointed standard descriptors. Everything is checked before anything is made, and if making
    fails all is closed again.

    Raises Incompatible (a file changed, a kernel or machine lacks something), Busy (an address is
    taken), NotFound, AccessDenied, Unsupported, KernelError.
    """
    assembly = Assembly(table, objects, options)
    _allow_descriptors(assembly.floor + len(assembly.entries) + 256)
    try:
        assembly.make_all()
    except BaseException:
        assembly.close()
        raise
    return assembly.local


def find_lacking(
    table: dict[str, Any], objects: ObjectSource, options: RestoreOptions, besides: frozenset[str]
) -> list[Incompatible]:
    """What `make_descriptors` would find missing on this machine, but for what `besides` names."""
    return Assembly(table, objects, options).find_lacking(besides)


def place_descriptors(
    table: dict[str, Any], local: dict[int, int], keep: Sequence[int], holder: int = 0
) -> None:
    """In the child that becomes the process: every descriptor to its number, all others closed.

    `holder` is its number in the tree, 0 for the first.

    Those in `keep` stay as they are; they must not be numbers of the table (`free_number` tells
    where the free ones begin), else ValueError. All come out without close-on-exec, so that they
    live through the exec of the stub.
    """
    places = {int(n): place["description"] for n, place in dict(_tables_of(table))[holder].items()}
    if taken := sorted(set(places) & set(keep)):
        raise ValueError(f"descriptors {taken} are to be kept and also belong to the process")
    for index, entry in enumerate(table["descriptions"]):
        if index in local and entry.get("holder", 0) == holder:
            made = kind_named(entry["kind"]).make_inside(entry, os.getpid())
            if made is not None:
                os.dup2(made, local[index], inheritable=False)
                os.close(made)
                set_flags(local[index], entry["flags"])
    _place_stale_targets(table, local, set(keep), holder)
    wanted = chosen_places(table, local, holder)
    for number, index in wanted.items():
        os.dup2(local[index], number, inheritable=True)
    for index, entry in enumerate(table["descriptions"]):
        if index in local:
            kind_named(entry["kind"]).place(entry, local[index], local, holder)
    for number, index in places.items():
        if wanted[number] == index and table["descriptions"][index].get("holder", 0) == holder:
            owners.ask_for_signals(table["descriptions"][index], number)
            locks.take_leases(table["descriptions"][index], number)
    previous = -1
    for number in sorted({*wanted, *keep}):
        kernel.close_range(previous + 1, number - 1)
        previous = number
    kernel.close_range(previous + 1, 0x7FFFFFFF)


def chosen_places(table: dict[str, Any], local: dict[int, int], holder: int = 0) -> dict[int, int]:
    """Each number of a process to what `local` has for it: its description or a re-pointed one."""
    places = dict(_tables_of(table))[holder]
    wanted = {int(number): place["description"] for number, place in places.items()}
    for number in (0, 1, 2):
        own = table["descriptors"].get(str(number))
        if -1 - number in local and (
            not holder or (own is not None and wanted.get(number) == own["description"])
        ):
            wanted[number] = -1 - number
    return wanted


def find_to_be_placed(table: dict[str, Any]) -> set[int]:
    """For whom `place_descriptors` does more than to put descriptors at numbers."""
    found: set[int] = set()
    for entry in table["descriptions"]:
        if entry["flags"] & os.O_ASYNC:
            found.add(entry.get("holder", 0))
        found.update(target.get("holder", 0) for target in entry.get("targets", ()))
        found.add(entry.get("controls", {}).get("session", 0))  # it leads that session
    return found


def _place_stale_targets(
    table: dict[str, Any], local: dict[int, int], keep: set[int], holder: int
) -> None:
    """Let epolls watch what they watch under numbers that now mean something else.

    The program registered a descriptor, made a duplicate and closed the first: the kernel still
    watches the description under the old number. Each is put there for the moment of the call.
    """
    for index, entry in enumerate(table["descriptions"]):
        for target in entry.get("targets", ()):
            if index not in local or not target["stale"] or target.get("holder", 0) != holder:
                continue
            number = target["number"]
            if number in keep or number in local.values():
                raise ValueError(f"descriptor {number} is needed for a moment and is in use")
            os.dup2(local[target["description"]], number)
            kernel.epoll_control(
                local[index], kernel.EPOLL_CTL_ADD, number, target["events"], target["data"]
            )
            os.close(number)


def finish_descriptors(
    table: dict[str, Any],
    local: dict[int, int],
    *,
    pids: dict[int, int],
    tids: dict[int, int] | None = None,
) -> None:
    """In the restorer, when the process exists and before it runs: owners, locks, timers, seals.

    `pids` maps pids as lzy saw them at the dump to those it sees here, `tids` thread ids of the
    image. Closes our copies and empties `local`. Raises Busy when another process holds a lock.
    """
    finish = Finish(pids=pids, tids=tids or {})
    numbers = _numbers_of(table)
    for index, entry in enumerate(table["descriptions"]):
        if index not in local:
            continue
        with _explained(entry, numbers.get(index, [])):
            locks.take_locks(entry, local[index])
            owners.give_owner(entry, local[index], finish)
            kind_named(entry["kind"]).finish(entry, local[index], finish)
    close_descriptors(local)


def close_descriptors(local: dict[int, int]) -> None:
    """Close our copies (also what to do when a restore is given up)."""
    while local:
        os.close(local.popitem()[1])


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard < count:
            raise Incompatible(
                f"{count} descriptors are needed at once and {hard} are allowed here",
                remedy="raise the limit with `ulimit -n`",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _explained:
    """Turns a system call's failure while an entry is made into an error that names the entry."""

    def __init__(self, entry: Entry, numbers: list[int]) -> None:
        self.entry = entry
        self.numbers = numbers

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: Any, error: BaseException | None, _trace: Any) -> None:
        if not isinstance(error, OSError) or isinstance(error, LzyError):
            return
        names = ", ".join(map(str, self.numbers))
        what = f"cannot make descriptor {names} again ({self.entry['kind']})"
        path = self.entry.get("path", error.filename)
        if path:
            what += f" for {path}"
        if isinstance(error, PermissionError):
            raise AccessDenied(
                f"{what}: {error.strerror}",
                remedy="restore as the user that ran the process, or as root",
                descriptors=self.numbers,
            ) from error
        if isinstance(error, FileNotFoundError):
            raise Incompatible(
                f"{what}: {error.strerror}",
                remedy="bring the file back where it was, then restore again",
                descriptors=self.numbers,
            ) from error
        raise KernelError(what, error.errno or 0, descriptors=self.numbers) from error
