"""Which pages a process has written since its last checkpoint: the kernel keeps account.

A userfaultfd inside the process write-protects its memory in the way that tells nobody
(UFFD_FEATURE_WP_ASYNC, Linux 6.7): at the first write to a page the kernel takes the protection
off again by itself, and PAGEMAP_SCAN lists the pages that have none. Nobody waits, nothing has to
run; the account lives as long as the descriptor does, and that is the process's own.

Of a tree each process has an account of its own; one record tells of all of them.

*Guarantees.* Memory that is not under account (mapped since, moved, inherited from a parent)
counts as written, and so does everything when it is not certain that the account began with the
image that it is held against: a record in the run directory says which image that is. It is
withdrawn before any of its accounts is begun anew, and written again only once an image is
committed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from . import proc
from .content import (
    behind_file,
    cut_ranges,
    holds_own_pages,
    join_ranges,
    neighbourhoods,
    places,
    subtract,
)
from .dense import find_dense
from .errors import LzyError
from .home import run_directory
from .linux import PAGE_BYTES, memory, process, uffd
from .linux.detached import take_descriptor
from .machine import Call
from .proc import Vma
from .tracee import Tracee

Range = tuple[int, int]

_START = itemgetter(0)
_STEP_BYTES = 64 << 20


class Account(NamedTuple):
    """An account that stands: since image `image` of `store` was taken of the process.

    `number` is the userfaultfd's descriptor number in the process, `inode` what tells it from any
    other that comes to have that number: of another dump, or of one with another LZY_HOME.
    """

    pid: int
    start_time: int  # clock ticks after boot
    boot_id: str
    number: int
    inode: int
    store: str
    image: str
    space: int = 0
    """Which part of the image is that process's memory; 0 is the first process's."""
    left_out: Sequence[Range] = ()
    """What is unprotected, being written densely, and counts as written (see `dense`): a hint."""


class Begun(NamedTuple):
    """What an account that began anew has found; ranges ascend, each address in one at most."""

    written: list[Range]
    """Pages that may have been written until then."""
    dense: list[Range]
    """Of what was under account or left out: what was written densely, in units of huge pages."""
    registered: bool
    """Whether mappings came under account, which may have joined them to others."""


def find_account(pid: int) -> Account | None:
    """The account of process `pid`, as the first of its tree, if there is one to be relied on."""
    return next((known for known in _read_record(pid)[:1] if stands(known)), None)


def find_accounts(pid: int) -> dict[int, Account]:
    """As `find_account`, of all that were dumped with `pid`, by their pids."""
    return {known.pid: known for known in _read_record(pid) if stands(known)}


def _read_record(pid: int) -> list[Account]:
    """What the record of `pid` says, whether it still holds or not; its own account comes first."""
    try:
        facts: dict[str, Any] = json.loads(_record(pid).read_bytes())
        accounts = [Account(**one) for one in (facts, *facts.pop("members", ()))]
        return [
            known._replace(left_out=[(start, end) for start, end in known.left_out])
            for known in accounts
        ]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def stands(account: Account) -> bool:
    """Whether that process lives and still has that descriptor."""
    try:
        alive = proc.start_time(account.pid) == account.start_time
    except LzyError:
        return False
    is_its = alive and proc.boot_id() == account.boot_id
    return is_its and _is_ours(account.pid, account.number, account.inode)


def remember(account: Account, members: Iterable[Account] = ()) -> None:
    """Record that the accounts of a tree began with that image; `account` is of its first process.

    Precondition: the image is committed.
    """
    path = _record(account.pid)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{os.getpid()}.new")
    facts = account._asdict() | {"members": [member._asdict() for member in members]}
    draft.write_text(json.dumps(facts))
    os.rename(draft, path)


def withdraw(pid: int) -> None:
    """Rely no more on what the record of process `pid` says of it and those below it."""
    _record(pid).unlink(missing_ok=True)


def written_ranges(pid: int, vmas: Iterable[Vma]) -> list[Range]:
    """Page ranges, by their starts, that may have been written since the account began.

    Precondition: the process is stopped. A mapping that has a page outside of the account counts
    whole. In mappings of files, so does what is not in memory: where a protected page was dropped
    (MADV_DONTNEED) the kernel leaves a mark, which looks like a page in swap.
    """
    own = list(filter(holds_own_pages, vmas))
    with _page_map(pid) as pagemap:
        found = _find_dropped(pagemap, own)
        found += [(vma.start, vma.end) for vma in _find_strangers(pagemap, own)]
        found += [run for place in places(own) for run in _find_written(pagemap, *place)]
    return join_ranges(found)


def look_at_all(pid: int, vmas: Iterable[Vma]) -> tuple[list[Range], list[Range]]:
    """`content.own_page_ranges` and `written_ranges` in one look at the page tables.

    Precondition: the process is stopped.
    """
    own = list(filter(holds_own_pages, vmas))
    pages: list[Range] = []
    written: list[Range] = []
    dropped: list[Range] = []
    outside: list[Range] = []
    there = memory.PAGE_IS_PRESENT | memory.PAGE_IS_SWAPPED
    nobodys = memory.PAGE_IS_FILE | memory.PAGE_IS_PFNZERO | memory.PAGE_IS_GUARD
    with _page_map(pid) as pagemap:
        for start, end, may_be_files in places(own):
            for begin, behind, flags in _describe(pagemap, start, end, may_be_files):
                place = (begin, behind)
                if not flags & nobodys:
                    pages.append(place)
                if not flags & memory.PAGE_IS_WPALLOWED:
                    if not flags & memory.PAGE_IS_FILE:
                        outside.append(place)
                    continue
                if flags & memory.PAGE_IS_WRITTEN and not flags & memory.PAGE_IS_FILE:
                    written.append(place)
                if flags & there == memory.PAGE_IS_SWAPPED:
                    dropped.append(place)
    written += cut_ranges(dropped, filter(behind_file, own))
    written += [(vma.start, vma.end) for vma in own if _meets(outside, vma)]
    return cut_ranges(join_ranges(pages), own), join_ranges(written)


def _describe(pagemap: int, start: int, end: int, may_be_files: bool) -> list[tuple[int, int, int]]:
    """What pages there are, with all that `look_at_all` asks; as far as this kernel tells."""
    there = memory.PAGE_IS_PRESENT | memory.PAGE_IS_SWAPPED
    flags = there | memory.PAGE_IS_WPALLOWED | memory.PAGE_IS_WRITTEN | memory.PAGE_IS_PFNZERO
    if may_be_files:
        flags |= memory.PAGE_IS_FILE
    try:
        every = flags | memory.PAGE_IS_GUARD
        return memory.describe_pages(pagemap, start, end, some=there, flags=every)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return memory.describe_pages(pagemap, start, end, some=there, flags=flags)


def _find_written(
    pagemap: int, start: int, end: int, may_be_files: bool, *, protect: bool = False
) -> list[Range]:
    """What was written of memory under account at one of `places`, protected again if `protect`.

    Only pages that are there, since for others the kernel would make page tables or leave marks.
    """
    return memory.scan_pages(
        pagemap,
        start,
        end,
        every=memory.PAGE_IS_WPALLOWED | memory.PAGE_IS_WRITTEN,
        none=memory.PAGE_IS_FILE if may_be_files else 0,
        some=memory.PAGE_IS_PRESENT | memory.PAGE_IS_SWAPPED,
        protect=protect,
    )


def _find_dropped(pagemap: int, vmas: Iterable[Vma]) -> list[Range]:
    """What is under account of mappings of files, and not in memory."""
    files = list(filter(behind_file, vmas))
    found: list[Range] = []
    for low, high in neighbourhoods(files):
        found += memory.scan_pages(
            pagemap,
            low,
            high,
            every=memory.PAGE_IS_WPALLOWED | memory.PAGE_IS_SWAPPED,
            none=memory.PAGE_IS_PRESENT,
        )
    return cut_ranges(found, files)


def _find_strangers(pagemap: int, vmas: Sequence[Vma]) -> list[Vma]:
    """The mappings that have pages and are not under account."""
    outside: list[Range] = []
    for start, end in neighbourhoods(vmas):
        outside += memory.scan_pages(
            pagemap,
            start,
            end,
            none=memory.PAGE_IS_WPALLOWED | memory.PAGE_IS_FILE,
            some=memory.PAGE_IS_PRESENT | memory.PAGE_IS_SWAPPED,
        )
    return [vma for vma in vmas if _meets(outside, vma)]


def _meets(ranges: list[Range], vma: Vma) -> bool:
    """Whether something of ascending `ranges` lies in a mapping."""
    at = bisect_left(ranges, vma.end, key=_START) - 1
    return at >= 0 and ranges[at][1] > vma.start


@contextlib.contextmanager
def _page_map(pid: int) -> Iterator[int]:
    pagemap = os.open(f"/proc/{proc.witness(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield pagemap
    finally:
        os.close(pagemap)


def is_under_account(pid: int, address: int) -> bool:
    """Whether writes to the mapping at `address` are accounted for."""
    with _page_map(pid) as pagemap:
        try:
            memory.scan_pages(pagemap, address, address + PAGE_BYTES, only_protectable=True)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            return False
    return True


def open_account(tracee: Tracee) -> int:
    """Have the stopped process open a descriptor for an account; its number there.

    The highest free number that its table has room for: to enlarge a table that threads share, the
    kernel takes a grace period (10 ms). All is done by one list of calls that the process makes by
    itself, so that we cannot die in between and leave a descriptor that nobody would know. Accounts
    that others keep of it end: beginning ours would make theirs miss what was written before.
    Precondition: an arena is mapped. Raises KernelError when this kernel keeps no accounts.
    """
    used = set(map(int, os.listdir(f"/proc/{tracee.witness}/fd")))
    others = [number for number in used if find_inode(tracee.witness, number)]
    used.difference_update(others)
    lowest = next(n for n in range(len(used) + 1) if n not in used)
    most = min(int(proc.status(tracee.witness)["FDSize"]), proc.limits(tracee.pid)[7][0])
    number = next((n for n in range(most - 1, lowest, -1) if n not in used), lowest)
    batch = tracee.batch()
    for other in others:
        batch.call(process.SYS_CLOSE, other)
    # Nobody serves faults here, the kernel ends them itself: its own as well as the program's.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY
    batch.call(process.SYS_USERFAULTFD, flags, what="userfaultfd")
    request = batch.put(uffd.pack_api(uffd.ACCOUNT_FEATURES))
    batch.call(process.SYS_IOCTL, lowest, uffd.UFFDIO_API, request, what="UFFDIO_API")
    if number != lowest:
        batch.call(process.SYS_FCNTL, lowest, process.F_DUPFD_CLOEXEC, number)
        batch.call(process.SYS_CLOSE, lowest)
    tracee.run(tracee.speaker, batch)
    return number


def begin_account(tracee: Tracee, number: int, vmas: Sequence[Vma]) -> Begun:
    """Begin the account anew, on the descriptor `number` of the stopped process.

    What was written until now, as `written_ranges` has it, in the same look at the page tables.
    What has no page of its own yet is left alone: whatever comes to be there is outside of the
    account, and so will count as written. Raises OSError (EBUSY: memory is registered with somebody
    else's userfaultfd); what is not under account then will count as written. Precondition: no
    record tells of it (see `withdraw`).
    """
    own = list(filter(holds_own_pages, vmas))
    with _own_duplicate(tracee.pid, number) as ours, _page_map(tracee.witness) as pagemap:
        written: list[Range] = []
        for place in places(own):
            written += _find_written(pagemap, *place, protect=True)
        dense = find_dense(written)
        written += _find_dropped(pagemap, own)
        strangers = _find_strangers(pagemap, own)
        for vma in strangers:
            written.append((vma.start, vma.end))
            if "ht" in vma.flags:  # of huge pages that are set aside: never under account
                continue
            uffd.register(ours, vma.start, vma.end - vma.start, uffd.REGISTER_MODE_WP)
        for place in places(strangers):  # what lies between them is protected
            _find_written(pagemap, *place, protect=True)
    return Begun(join_ranges(written), dense, bool(strangers))


def protect_running(
    pid: int, number: int, vmas: Sequence[Vma], left_out: Sequence[Range] = ()
) -> Begun:
    """As `begin_account`, of a process that may run, but for what is `left_out`, which stays so.

    Whatever it writes once this returns counts as written. What cannot come under account, or is
    mapped meanwhile, counts at the next look, too. In steps, so that it never waits long to map.
    """
    own = list(filter(holds_own_pages, vmas))
    with _own_duplicate(pid, number) as ours, _page_map(pid) as pagemap:
        strangers = _find_strangers(pagemap, own)
        for vma in strangers:
            if "ht" not in vma.flags:
                with contextlib.suppress(OSError):  # it is gone, or somebody else's
                    uffd.register(ours, vma.start, vma.length, uffd.REGISTER_MODE_WP)
        written: list[Range] = []
        for start, end, may_be_files in places(own):
            for low, high in subtract([(start, end)], left_out):
                for at in range(low, high, _STEP_BYTES):
                    stop = min(at + _STEP_BYTES, high)
                    written += _find_written(pagemap, at, stop, may_be_files, protect=True)
        new = [(vma.start, vma.end) for vma in strangers]
        dense = find_dense(subtract(written, join_ranges(new)))
        written += [*new, *_find_dropped(pagemap, own)]
    return Begun(join_ranges(written), dense, bool(strangers))


def leave_out(pid: int, number: int, ranges: Iterable[Range]) -> None:
    """Keep account of these ranges no more: what is in them counts as written.

    The process may run. What cannot be unprotected stays under account, which does no harm.
    """
    with contextlib.suppress(OSError, LzyError), _own_duplicate(pid, number) as ours:
        for start, end in ranges:
            with contextlib.suppress(OSError):
                uffd.unprotect(ours, start, end - start)


@contextlib.contextmanager
def _own_duplicate(pid: int, number: int) -> Iterator[int]:
    pidfd = proc.open_shared(pid)
    try:
        ours = take_descriptor(pidfd, number)
    finally:
        os.close(pidfd)
    try:
        yield ours
    finally:
        os.close(ours)


def protect(pid: int, ranges: Iterable[Range]) -> None:
    """Count pages as unwritten again. Preconditions: it is stopped, they are under account."""
    with _page_map(pid) as pagemap:
        for start, end in ranges:
            _find_written(pagemap, start, end, True, protect=True)


def end_account(tracee: Tracee, number: int) -> None:
    """Close the descriptor in the stopped process: its memory is under no account any more."""
    withdraw(tracee.pid)
    tracee.run_one(tracee.speaker, Call(process.SYS_CLOSE, (number,)))


def find_inode(pid: int, number: int) -> int:
    """What tells an account's descriptor from others of its number; 0 if there is none there."""
    with contextlib.suppress(OSError):
        pid = proc.witness(pid)
        link = f"/proc/{pid}/fd/{number}"
        if os.readlink(link) == "anon_inode:[userfaultfd]" and uffd.keeps_account(
            proc.read_file(f"/proc/{pid}/fdinfo/{number}").decode()
        ):
            return os.stat(link).st_ino
    return 0


def _is_ours(pid: int, number: int, inode: int) -> bool:
    return inode != 0 and find_inode(pid, number) == inode


def _record(pid: int) -> Path:
    return run_directory() / f"{pid}.account"
