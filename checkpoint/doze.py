"""A process gives its memory back where it stands, and gets it again as it touches it.

Its pid, threads, descriptors and terminal stay as they are. First a checkpoint is taken, as any
other; then, a slice at a time, the pages that have not been written since are dropped, and a pager
answers for them out of the image.

One userfaultfd both hears of missing pages and keeps account of writes (a mapping has but one), so
dozing again takes what was written since, and what came back unwritten just goes again: another
pager takes over, which knows both what is away still and what is to go.

*Guarantees.* A page is dropped only if the kernel's account says, while the process stands still,
that it is what the committed image has. Dropping a slice and having its faults heard of is one
list of calls that the process makes by itself, its other threads waiting for that inside it:
whoever dies, it is done whole or not at all, and nobody sees it half done. The
pager knows all that is to be dropped before the first page goes. Slices go from the highest
address down: a mapping that grows grows upwards, into what is heard of already, so that nothing
planned and not yet dropped is ever mistaken for what is there. Where one pager takes over from
another, the journal of the first stands until that of the second takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from . import mapping_flags, proc, tracking
from .away import NotAsItIs, end_pager, find_doze, hold_pager, is_unroused, read_away, read_moved
from .claim import Claim
from .content import intersect, join_ranges, own_page_ranges, subtract, windows_of
from .dump import dump
from .errors import AccessDenied, Busy, KernelError, LzyError, NotFound, Unsupported
from .fitness import Progress
from .granted import may_grant, open_granted
from .history import TO_DOZE
from .home import run_directory
from .inject import close_descriptor
from .journal import is_held, journal_path, read_status, rouse
from .linux import PAGE_BYTES, memory, process, uffd
from .linux.detached import take_descriptor
from .machine import Call
from .pager import PagerStart, Plan, begin_pager, resume_pager
from .pages import present_pages
from .parking import parked, room_bytes
from .proc import Vma
from .stages import reach
from .tracee import Tracee, stopped
from .unfinished import forget_descriptor, note_descriptor
from .warm import leave_warm

if TYPE_CHECKING:
    from .dump import DumpReport
    from .image import Image
    from .store import Store

_SLICE_BYTES = 16 << 20
_SLICE_RANGES = 1000
_UNFIT = frozenset({"gd", "lo", "dp", "io", "pf", "wf"})

Range = tuple[int, int]


class DozeReport(NamedTuple):
    """What dozing did: sizes in bytes, times in seconds."""

    image: str
    pid: int
    dropped_bytes: int
    """Memory given back; what was written meanwhile or cannot be heard of stayed."""
    resident_before_bytes: int
    resident_after_bytes: int
    """Anonymous memory in RAM; proc_pid_status(5) RssAnon."""
    stored_bytes: int
    freeze_s: float
    """The longest time for which the process stood still."""
    total_s: float
    pager_pid: int | None
    notes: list[str]


def doze(
    pid: int,
    store: Store,
    *,
    name: str | None = None,
    why: str = TO_DOZE,
    choose: Callable[[list[Range]], list[Range]] | None = None,
    progress: Progress | None = None,
) -> DozeReport:
    """Take a checkpoint of process `pid` and have it give back the memory that the image has.

    With `choose` only what it chooses of what could go (ascending ranges) goes, and what is away
    already does not come back, even where it had better (the process stands still longer then).

    Raises what a dump raises, Unsupported where the kernel keeps no account of writes or serves no
    missing pages; the process then runs on with all of its memory.
    """
    began = time.monotonic()
    before = resident_bytes(pid)
    taken = dump(
        pid,
        store,
        name=name,
        leave_running=True,
        why=why,
        rouse=choose is None,
        progress=progress,
    )
    account = tracking.find_account(pid)
    if account is None or account.image != taken.image:
        raise Unsupported(
            f"pid {pid} cannot doze: {(taken.notes or ['no account is kept of its writes'])[0]}",
            remedy="see lzy doctor; lzy dump and lzy restore need no account",
            pid=pid,
        )
    reach("doze.taken")
    with store.load(taken.image) as image:
        plan, freeze_s = _prepare(pid, account, image, choose or partial(leave_warm, pid))
        if plan is None:
            return _report(taken, before, 0, freeze_s, began, None)
        pager_pid = plan.pager.wait()
        reach("doze.served")
        dropped = 0
        total = sum(end - start for start, end in plan.ranges)
        for part in _slices(plan.ranges, plan.fit):
            try:
                released, frozen_s = _drop(pid, account, plan, part, image)
            except BaseException as error:
                # Nothing below may be heard of now: it could grow to where the pager is mistaken.
                with contextlib.suppress(NotFound):  # who dumped it meanwhile has had it roused
                    rouse(journal_path(run_directory(), pid))
                if not isinstance(error, _LayoutChanged):
                    raise
                taken.notes.append("it was dumped or remapped meanwhile: its memory comes back")
                break
            dropped += released
            freeze_s = max(freeze_s, frozen_s)
            reach("doze.dropped")
            if progress:
                progress("dropping", dropped, total)
    with contextlib.suppress(OSError):
        _page_out_files(pid)
    return _report(taken, before, dropped, freeze_s, began, pager_pid)


def is_dozing(pid: int) -> bool:
    """Whether some of the memory of process `pid` stays away until it is touched."""
    path = journal_path(run_directory(), pid)
    with contextlib.suppress(LzyError):
        facts, _ = read_status(path)
        return bool(facts.get("on_demand")) and facts["start_time"] == proc.start_time(pid)
    return False


def begin_to_rouse(pid: int) -> None:
    """Have all of the memory of process `pid` brought in; comes back at once.

    Raises NotFound when it does not doze, Busy when its pager has died.
    """
    path = journal_path(run_directory(), pid)
    if not is_dozing(pid):
        raise NotFound(f"process {pid} does not doze", remedy="see lzy pager --status", pid=pid)
    if not is_held(path):
        raise Busy(
            f"the pager of process {pid} has died",
            remedy=f"run: lzy pager --resume {pid}",
            pid=pid,
        )
    rouse(path)


def missing_bytes(pid: int) -> int:
    """How much of the memory of process `pid` is away; 0 when none is."""
    with contextlib.suppress(LzyError):
        facts, status = read_status(journal_path(run_directory(), pid))
        if facts["start_time"] == proc.start_time(pid):
            return max(status.missing_bytes, 1)  # its pager has yet to leave
    return 0


def resident_bytes(pid: int) -> int:
    """Anonymous memory of `pid` that is in RAM. Raises NotFound."""
    return int(proc.status(proc.witness(pid)).get("RssAnon", "0 kB").split()[0]) * 1024


def _report(
    taken: DumpReport, before: int, dropped: int, freeze_s: float, began: float, pager: int | None
) -> DozeReport:
    return DozeReport(
        image=taken.image,
        pid=taken.pid,
        dropped_bytes=dropped,
        resident_before_bytes=before,
        resident_after_bytes=resident_bytes(taken.pid),
        stored_bytes=taken.stored_bytes,
        freeze_s=max(freeze_s, taken.freeze_s),
        total_s=time.monotonic() - began,
        pager_pid=pager,
        notes=list(taken.notes),
    )


class _Dropping(NamedTuple):
    """What is to be dropped, and by whose leave."""

    ranges: list[Range]
    fit: list[Range]
    """The mappings that they are in, and others like them."""
    heard_of: list[Range]
    """Those whose missing pages are heard of already: it has dozed before."""
    number: int
    """Of the userfaultfd in the process that hears of missing pages."""
    pager: PagerStart


def _prepare(
    pid: int,
    account: tracking.Account,
    image: Image,
    choose: Callable[[list[Range]], list[Range]],
) -> tuple[_Dropping | None, float]:
    """Find what can be dropped, and start a pager that knows it; and the seconds frozen."""
    places, vmas = mapping_flags.look(pid)
    frozen_at = time.monotonic()
    with contextlib.ExitStack() as held:
        if not _claim(pid, held):
            raise _overtaken(pid)
        tracee = held.enter_context(stopped(pid))
        if tracking.find_account(pid) != account:
            raise _overtaken(pid)
        if proc.read_bytes(tracee.witness, "maps") != places:
            vmas = mapping_flags.mappings(pid)
        vmas = [vma for vma in vmas if _is_fit(vma)]
        fit = [(vma.start, vma.end) for vma in vmas]
        heard_of = [(vma.start, vma.end) for vma in vmas if "um" in vma.flags]
        before = find_doze(pid)
        if before is None:
            if heard_of:
                raise _overtaken(pid)
            ranges = choose(_unwritten(pid, vmas, []))
            if not ranges:
                return None, time.monotonic() - frozen_at
            tracee.prepare(arena_bytes=16384)
            note_descriptor(pid, _lowest_free(pid))
            number, harbour = _open_descriptors(tracee)
            held.close()
            frozen_s = time.monotonic() - frozen_at
            pager = _begin_pager(account, image, number, harbour, ranges, is_new=True)
            forget_descriptor(pid)
            return _Dropping(ranges, fit, heard_of, number, pager), frozen_s
        pagers = held.enter_context(hold_pager(before))
        try:
            away = read_away(before, own_page_ranges(pid, vmas))
        except NotAsItIs:
            raise _overtaken(pid) from None
        ranges = choose(_unwritten(pid, vmas, away.moved))
        if not ranges:
            return None, time.monotonic() - frozen_at
        number, harbour = before.uffd_number, before.harbour_numbers
        try:
            lock = end_pager(before, pagers)  # who looks for a page now waits for the next one
            held.callback(os.close, lock)
            reach("doze.replacing")
            pager = _begin_pager(
                account,
                image,
                number,
                harbour,
                join_ranges([*away.missing, *ranges]),
                moved=away.moved,
                lock=lock,
            )
        except BaseException:
            held.close()
            with contextlib.suppress(LzyError):
                resume_pager(pid)
            raise
    return _Dropping(ranges, fit, heard_of, number, pager), time.monotonic() - frozen_at


def _claim(pid: int, held: contextlib.ExitStack) -> bool:
    """Whether nobody else is at work on it, nor will be until `held` is closed."""
    claim = Claim(pid)
    held.callback(claim.let_go)
    with contextlib.suppress(Busy):
        claim.take(patience_s=0)
    return claim.is_held


def _overtaken(pid: int) -> Busy:
    return Busy(
        f"another dump of pid {pid} came in between, or it is being roused; it did not go to doze",
        remedy="try again",
        pid=pid,
    )


def _begin_pager(
    account: tracking.Account,
    image: Image,
    number: int,
    harbour: tuple[int, int],
    ranges: list[Range],
    *,
    moved: Sequence[Range] = (),
    is_new: bool = False,
    lock: int = -1,
) -> PagerStart:
    """A pager for these descriptors of the process, which are closed again if it fails and new.

    `lock`: of the journal of the pager before, which has ended.
    """
    pid = account.pid
    pidfd = os.pidfd_open(pid)
    ours = sharing = -1
    try:
        sharing = proc.open_shared(pid)
        ours = take_descriptor(sharing, number)
        if is_new:
            uffd.enable(ours, uffd.DOZE_FEATURES)
        plan = Plan(
            pid=pid,
            start_time=account.start_time,
            uffd_number=number,
            store=account.store,
            image=account.image,
            ranges=ranges,
            harbour_numbers=harbour,
            on_demand=True,
            keeps_account=True,
            moved=moved,
        )
        return begin_pager(plan, ours, pidfd, image, lock=lock)
    except BaseException:
        for opened in (number, *harbour) if is_new else ():
            with contextlib.suppress(LzyError, OSError):
                close_descriptor(pid, opened)
        raise
    finally:
        for opened in (ours, sharing, pidfd):
            if opened >= 0:
                os.close(opened)


def _is_fit(vma: Vma) -> bool:
    """Whether missing pages of a mapping can be heard of, and it is under account."""
    return (
        vma.kind == "anonymous" and not vma.shared and "uw" in vma.flags and not _UNFIT & vma.flags
    )


def _unwritten(pid: int, vmas: list[Vma], moved: list[Range]) -> list[Range]:
    """Pages of these mappings that are as the account's image has them, ascending."""
    written = join_ranges([*tracking.written_ranges(pid, vmas), *moved])
    return subtract(own_page_ranges(pid, vmas), written)


def _lowest_free(pid: int) -> int:
    """The number that the next descriptor of the stopped process gets."""
    used = set(map(int, os.listdir(f"/proc/{proc.witness(pid)}/fd")))
    return next(number for number in range(len(used) + 1) if number not in used)


def _open_descriptors(tracee: Tracee) -> tuple[int, tuple[int, int]]:
    """Have the process open a userfaultfd and the harbour's socket pair; their numbers in it."""
    leader = tracee.speaker
    batch = tracee.batch()
    made = batch.call(process.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK, what="userfaultfd")
    pair = batch.room(8)
    kind = process.SOCK_SEQPACKET | process.SOCK_CLOEXEC
    batch.call(process.SYS_SOCKETPAIR, process.AF_UNIX, kind, 0, pair)
    try:
        tracee.run(leader, batch)
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise
        if may_grant():
            return open_granted(tracee)
        raise AccessDenied(
            f"pid {tracee.pid} cannot doze: only for root's processes does the kernel have memory "
            "brought in as it is touched (userfaultfd)",
            remedy="set vm.unprivileged_userfaultfd to 1, or hibernate it (lzy dump)",
            pid=tracee.pid,
        ) from error
    ends = memoryview(batch.read(pair, 8)).cast("i")
    return batch.results[made], (ends[0], ends[1])


class _LayoutChanged(Exception):
    """A mapping that was planned for is gone, or another one; or the account is another."""


class _Slice(NamedTuple):
    """Ranges that are to be dropped, and the parts of mappings to be registered with them."""

    ranges: list[Range]
    fit: list[Range]


def _slices(ranges: list[Range], fit: list[Range]) -> Iterator[_Slice]:
    """`ranges` from the highest address down, in slices of bounded size that cover all of `fit`."""
    part: list[Range] = []
    size, high = 0, 1 << 64
    for start, end in reversed(ranges):
        while start < end:
            low = max(start, end - (_SLICE_BYTES - size))
            part.append((low, end))
            size += end - low
            end = low
            if size >= _SLICE_BYTES or len(part) >= _SLICE_RANGES:
                yield _Slice(part[::-1], intersect(fit, [(low, high)]))
                part, size, high = [], 0, low
    yield _Slice(part[::-1], intersect(fit, [(0, high)]))


def _drop(
    pid: int, account: tracking.Account, plan: _Dropping, part: _Slice, image: Image
) -> tuple[int, float]:
    """Drop what of a slice is unwritten and have its faults heard of; (bytes, seconds frozen).

    All of the slice is registered, and so in the end whole mappings: the program can move and grow
    them as before. It is tried before anything is dropped; should it fail all the same, what was
    dropped is written back. Where faults are heard of already, only what is dropped is taken out
    and put back: of what is dropped where nobody hears nobody is told. The pager is held meanwhile,
    so that it is not roused: from then on it forgets what it finds no place for.
    """
    frozen_at = time.monotonic()
    number = plan.number
    with contextlib.ExitStack() as held:
        if not _claim(pid, held):  # who has it begins the account anew
            raise _LayoutChanged
        tracee = held.enter_context(stopped(pid))
        if tracking.find_account(pid) != account:  # what is unwritten is so since another image
            raise _LayoutChanged
        doze = find_doze(pid)
        if doze is None:  # it is being roused
            raise _LayoutChanged
        held.enter_context(hold_pager(doze))
        if not is_unroused(doze):
            raise _LayoutChanged
        moved = read_moved(doze)
        vmas = [
            vma._replace(start=start, end=end)
            for vma in proc.mappings(pid, with_flags=False)
            if vma.kind == "anonymous" and not vma.shared
            for start, end in intersect([(vma.start, vma.end)], part.fit)
            if tracking.is_under_account(pid, start)
        ]
        if subtract(part.ranges, [(vma.start, vma.end) for vma in vmas]):
            raise _LayoutChanged
        unwritten = _unwritten(pid, vmas, moved)
        clean = intersect(unwritten, part.ranges)
        if not vmas:
            return 0, time.monotonic() - frozen_at
        unheard = subtract([(vma.start, vma.end) for vma in vmas], plan.heard_of)
        heard = intersect(clean, plan.heard_of)
        arena_bytes = (4 * len(clean) + 4 * len(vmas) + 8) * 192 + 65536 + room_bytes(tracee)
        tracee.prepare(arena_bytes=arena_bytes)
        leader = tracee.speaker
        asked = Call(process.SYS_PRCTL, (process.PR_GET_THP_DISABLE, 0, 0, 0, 0))
        no_huge_pages = tracee.run_one(leader, asked)
        batch = tracee.batch()
        # Else khugepaged might fill in what is dropped, before anybody hears of it.
        batch.call(process.SYS_PRCTL, process.PR_SET_THP_DISABLE, 1)
        spans = [*unheard, *heard]
        ranges = [batch.put(uffd.pack_range(start, end - start)) for start, end in spans]
        mode = uffd.REGISTER_MODE_MISSING | uffd.REGISTER_MODE_WP
        wishes = [batch.put(uffd.pack_register(start, end - start, mode)) for start, end in spans]
        for index, (here, wish) in enumerate(zip(ranges, wishes, strict=True)):
            if index < len(unheard):
                batch.call(process.SYS_IOCTL, account.number, uffd.UFFDIO_UNREGISTER, here)
                batch.call(process.SYS_IOCTL, number, uffd.UFFDIO_REGISTER, wish)
            batch.call(process.SYS_IOCTL, number, uffd.UFFDIO_UNREGISTER, here)
        for start, end in clean:  # as long as nobody hears of it, else the pager would forget
            batch.call(process.SYS_MADVISE, start, end - start, memory.MADV_DONTNEED, tolerate=True)
        registered = [
            batch.call(process.SYS_IOCTL, number, uffd.UFFDIO_REGISTER, wish, tolerate=True)
            for wish in wishes
        ]
        batch.call(process.SYS_PRCTL, process.PR_SET_THP_DISABLE, no_huge_pages, tolerate=True)
        try:
            with parked(tracee, leader) as release:
                release.add_to(batch)
                tracee.run(leader, batch)
        except KernelError:  # one of the trials failed, and nothing was dropped
            back = Call(process.SYS_PRCTL, (process.PR_SET_THP_DISABLE, no_huge_pages, 0, 0, 0))
            tracee.run_one(leader, back)
            raise
        # What stays was unwritten and has lost its protection with the registration before.
        tracking.protect(pid, intersect(subtract(unwritten, clean), unheard))
        for span, index in zip(spans, registered, strict=True):
            if batch.results[index] < 0:
                _write_back(pid, image, intersect(clean, [span]))
    return sum(end - start for start, end in clean), time.monotonic() - frozen_at


def _write_back(pid: int, image: Image, ranges: list[Range]) -> None:
    """Write pages of the image into the stopped process."""
    witness = proc.witness(pid)
    buffer = memoryview(bytearray(image.window_pages * PAGE_BYTES))
    for address, mask in windows_of(ranges, image.window_pages):
        index = image.find_run(0, address)
        if index < 0:
            continue
        _, stored, chunk = image.run(index)
        image.read_chunk(chunk, buffer)
        for bit in present_pages(mask & stored):
            at = (stored & ((1 << bit) - 1)).bit_count() * PAGE_BYTES
            page = buffer[at : at + PAGE_BYTES]
            memory.write_process(witness, [(address + bit * PAGE_BYTES, PAGE_BYTES)], page)


def _page_out_files(pid: int) -> None:
    """Let clean pages of files go: they are read again from the files; process_madvise(2)."""
    pidfd = proc.open_shared(pid)
    try:
        for vma in mapping_flags.mappings(pid):
            if vma.kind == "file" and not vma.shared and "w" not in vma.permissions:
                with contextlib.suppress(OSError):
                    memory.page_out(pidfd, vma.start, vma.end - vma.start)
    finally:
        os.close(pidfd)
