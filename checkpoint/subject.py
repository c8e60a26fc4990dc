"""One process of a dump: stopped, asked what only it knows, split, and let go."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from . import interrogate, machine, mapping_flags, proc
from .beside import Beside
from .claim import Claim
from .content import (
    ProcessPages,
    behind_file,
    cut_ranges,
    guard_ranges,
    look_at_pages,
    subtract,
)
from .errors import LzyError, NotFound
from .fitness import Progress, refuse_separate_threads, wait_for_pager
from .inheritance import Places, find_inherited, open_frames
from .linux import memory, process, ptrace
from .machine import Call
from .mapped import Mappings, Statuses, refuse_mappings
from .mapping_flags import Flags
from .objects import Objects
from .proc import Vma
from .tracee import Tracee


class Subject:
    """A process from the first look at it to its description.

    Its steps in order: `look`, `stop`, `ask`, `map`, perhaps `split`, `settle`, `describe`.
    """

    def __init__(self, pid: int, parent: Subject | None = None) -> None:
        """Raises NotFound."""
        self.pid = pid
        self.parent = parent
        self.tree = [self]
        """The processes stopped with it, if it is the root; parents before their children."""
        stat = proc.stat(pid)
        self.comm = stat[1]
        self.exit_signal = int(stat[37])
        self.start_time = proc.start_time(pid)
        self.tracee = Tracee(pid)
        with _ended_is_not_found(pid):
            self.pidfd = os.pidfd_open(pid)
        self._claim = Claim(pid)
        self.places = b""
        self.vmas: list[Vma] = []
        self.snapshot = 0
        self.left_behind: list[int] = []
        """Numbers of snapshots that a killed lzy left, which have ended, and nobody waits for."""
        self.threads: list[dict[str, Any]] = []
        self.own: dict[str, Any] = {}
        self.policies: dict[str, str] = {}
        self._told_policies: dict[str, str] | None = None  # by itself, if that is quicker
        self.ranges: list[tuple[int, int]] = []
        self.inherited: list[tuple[int, int]] = []
        """Of `ranges`: what it shares copy-on-write with its parent, which has it too."""
        self._frames: memory.Frames | None = None  # what its children are compared with
        self._guards: list[tuple[int, int]] | None = None
        self._number = 0
        self._seen: Callable[[], tuple[Flags, dict[str, str]]] | None = None

    @property
    def number(self) -> int:
        """The pid as the process itself sees it; once `ask` was called."""
        return self._number

    @property
    def has_ended(self) -> bool:
        """Whether there is no such process any more, or it only waits to be waited for."""
        try:
            return (
                proc.stat(self.witness)[2] in "ZX" or proc.start_time(self.pid) != self.start_time
            )
        except NotFound:
            return True

    @property
    def witness(self) -> int:
        """The task in which the stopped process is seen; see `proc.witness`."""
        return self.tracee.witness

    @property
    def source_pid(self) -> int:
        """Whose memory is read: the snapshot's, or that of the stopped process."""
        return self.snapshot or self.witness

    def look(self, progress: Progress | None, *, dozes: bool = False) -> None:
        """Before the stop: its mappings; a lazy restore's pager is waited for unless it dozes.

        From now until `disclaim` no other lzy relies on its account. Raises NotFound, Unsupported,
        Busy.
        """
        with _ended_is_not_found(self.pid):
            self._claim.take(progress)
            look = mapping_flags.look(self.pid) if dozes else wait_for_pager(self.pid, progress)
            self.places, self.vmas = look
            refuse_mappings(proc.witness(self.pid), self.vmas)

    def stop(self) -> None:
        """Stop all its threads. Raises NotFound, Unsupported, Busy, AccessDenied."""
        with _ended_is_not_found(self.pid):
            self._claim.take(patience_s=0)  # of one that was born since the look
            self.tracee.seize()
            if self.witness != self.pid:
                os.close(self.pidfd)
                self.pidfd = process.open_thread(self.witness)
            interrogate.refuse_foreign_registers(self.tracee)
            refuse_separate_threads(self.tracee)

    def ask(self) -> None:
        """What only the process itself can tell; our arena stays in it."""
        self.tracee.prepare(vmas=self.vmas)
        for number in self.left_behind:
            self.wait_for(number)
        timers = proc.posix_timers(self.pid)
        self._number = self.tracee.own_numbers(self.tracee.speaker)[0]
        self.threads = interrogate.describe_threads(self.tracee)
        self.own = interrogate.describe_process(self.tracee, timers)
        if (places := mapping_flags.find_places_of_policies(self.witness)) is not None:
            self._told_policies = interrogate.ask_policies(self.tracee, places) if places else {}

    def look_again(self) -> bytes:
        """What /proc/PID/maps says now; the mappings are read anew if they have changed."""
        if (now := proc.read_bytes(self.witness, "maps")) != self.places:
            self.vmas = mapping_flags.mappings(self.witness)
            refuse_mappings(self.witness, self.vmas)
        return now

    def map(self, objects: Objects, statuses: Statuses) -> None:
        """What lies behind its mappings and has no path goes to `objects`."""
        self.mappings = Mappings(self.witness, self.vmas, statuses)
        self.mappings.take_objects(objects)
        self.own["exe_object"] = _take_deleted_executable(self.witness, objects)

    def split(self) -> str:
        """Clone the stopped process; the clone never runs. Why that cannot be, or nothing."""
        self.snapshot, obstacle = _split(self.tracee)
        return obstacle

    def look_closely(self) -> None:
        """Read the flags and policies of its mappings, of one that stands still, or begin to.

        As soon as may be, and in a thread of its own: where the kernel's list cannot be had it
        takes long if there is much memory.
        """
        pid = self.source_pid
        if seen := mapping_flags.look_closely(pid, self._told_policies):
            self._seen = lambda: seen
        else:
            self._seen = Beside(partial(mapping_flags.look_long, pid)).result

    def look_quickly(self) -> bool:
        """As `look_closely`, unless that takes long."""
        witness = self.witness
        seen = mapping_flags.look_closely(witness, self._told_policies)
        if not seen and not mapping_flags.is_large(witness):
            seen = mapping_flags.look_long(witness)
        if found := seen:
            self._seen = lambda: found
        return found is not None

    def look_again_later(self) -> None:
        """Forget what `look_quickly` saw: it is split, and its snapshot is looked at."""
        self._seen = None

    def settle(self, *, as_seen: bool, knows: bool, goes_on: bool) -> None:
        """What the snapshot, or the stopped process, knows as well as the process did.

        `as_seen`: flags and policies were read a moment ago; `knows`: its `ranges` are known;
        `goes_on`: it, without a snapshot, before `describe`.
        """
        self.own |= interrogate.describe_inherited(self.source_pid)
        self.mappings.reader = self.source_pid
        if not knows:
            self.look_at_pages()
        if not as_seen:  # only now: two looks at the same page tables wait for one another
            if not self._seen:
                self.look_closely()
            if goes_on:  # before it is described
                self._renew()
        if self._guards is None:
            self._guards = guard_ranges(self.source_pid, self.mappings.vmas)

    def look_at_pages(self) -> None:
        """See which pages it has, and which are guards, now that it is split or stands still."""
        self.ranges, self._guards = look_at_pages(self.source_pid, self.mappings.vmas)

    def _renew(self) -> None:
        """Wait for the flags and policies of its mappings as they are since it was stopped."""
        if self._seen:
            flags, self.policies = self._seen()
            self._seen = None
            self.mappings.renew_flags(flags, of_snapshot=bool(self.snapshot))

    def find_inherited(self, sure: list[tuple[int, int]]) -> None:
        """Which of its pages are its parent's; once `settle` was called for both.

        `sure`: of which that is known, see `inheritance.find_inherited`.
        """
        if self.parent:
            self._renew()
            self.parent._renew()
            if self.parent._frames is None:
                self.parent._frames = open_frames(self.parent.source_pid, keeps=True)
            frames = open_frames(self.source_pid)
            try:
                self.inherited = find_inherited(
                    *self._places(), sure, (frames, self.parent._frames)
                )
            finally:
                frames.close()

    def take_inherited(self, sure: list[tuple[int, int]]) -> None:
        """As `find_inherited`, where nobody looks: all but what is sure is its own."""
        if self.parent:
            self.inherited = find_inherited(*self._places(), sure)

    def _places(self) -> tuple[Places, Places]:
        assert self.parent
        parent = self.parent
        return (self.mappings.vmas, self.ranges), (parent.mappings.vmas, parent.ranges)

    @property
    def fresh(self) -> list[tuple[int, int]]:
        """Of `ranges`: what is not its parent's."""
        return subtract(self.ranges, self.inherited) if self.inherited else self.ranges

    def open_pages(self) -> ProcessPages:
        """Its memory, to be read without making it more: others may have some of it, too."""
        is_of_tree = self.parent is not None or len(self.tree) > 1
        shares = self.snapshot or is_of_tree or proc.shares_with_parent(self.pid)
        return ProcessPages(self.source_pid, shares_pages=bool(shares))

    def describe(self) -> dict[str, Any]:
        """The part of an image's document that is about this process, but for descriptors."""
        self._renew()
        vmas = self.mappings.vmas
        return {
            "comm": self.comm,
            "pid": self.number,
            "process": self.own,
            "threads": self.threads,
            "vmas": self.mappings.describe(),
            "guards": self._guards,
            "changed": cut_ranges(self.fresh, filter(behind_file, vmas)),
            "memory_policies": self.policies,
        }

    def describe_member(self, table: dict[str, Any], space: int) -> dict[str, Any]:
        """As `describe`, with what makes it one of a tree; its memory is `space` of the image."""
        return {
            **self.describe(),
            "space": space,
            "exit_signal": self.exit_signal,
            "inherited": self.inherited,
            "descriptors": table,
        }

    def let_go(self) -> None:
        """Let it run on if it is stopped."""
        if self.tracee.threads:
            self.tracee.let_go()

    def kill_snapshot(self) -> None:
        """Have the snapshot, if there is one, begin to end: nothing more is asked of it."""
        if self.snapshot:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.snapshot, signal.SIGKILL)

    def end_snapshot(self) -> None:
        """End the snapshot, if there is one; the process may be stopped or not."""
        if self.snapshot:
            self.kill_snapshot()
            snapshot, self.snapshot = self.snapshot, 0
            _end_snapshot(self, snapshot)

    def wait_for(self, number: int) -> None:
        """Have the stopped process wait for its child of that number, which has ended."""
        _wait_inside(self.tracee, number)

    def disclaim(self) -> None:
        """Others may look after it: what was written until now is known."""
        self._claim.let_go()

    def close(self) -> None:
        """Let it go if it is stopped, and end its snapshot; it is as it was."""
        if self._frames:
            self._frames.close()
            self._frames = None
        self.let_go()
        self.end_snapshot()
        if self._seen:  # a dump that failed did not ask any more
            with contextlib.suppress(LzyError, OSError):
                self._seen()
            self._seen = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self.disclaim()


@contextlib.contextmanager
def _ended_is_not_found(pid: int) -> Iterator[None]:
    """Until a process is stopped it may end between any two questions."""
    try:
        yield
    except ProcessLookupError as error:
        raise NotFound(f"process {pid} ended", pid=pid) from error


_LACKED = {"dc", "ht", "wf"}


def why_no_snapshot(vmas: list[Vma]) -> str:
    """What a clone of the process would lack, in words; empty if it lacks nothing."""
    if all(_LACKED.isdisjoint(flags) for flags in {vma.flags for vma in vmas}):
        return ""
    for vma in vmas:
        if vma.kind in ("vdso", "vvar", "vsyscall"):
            continue
        if "dc" in vma.flags:
            return f"the mapping at {vma.start:#x} is not inherited (MADV_DONTFORK)"
        if "ht" in vma.flags and not vma.shared:
            return f"the mapping at {vma.start:#x} is of huge pages: a copy may find none free"
        if "wf" in vma.flags:
            return f"the mapping at {vma.start:#x} is wiped on fork"
    return ""


def _split(tracee: Tracee) -> tuple[int, str]:
    """Clone the stopped process; the clone never runs. (its pid, "") or (0, why not)."""
    born: list[int] = []
    tracee.on_clone = born.append
    leader = tracee.speaker
    ptrace.set_options(leader.tid, ptrace.PTRACE_O_TRACECLONE)
    try:
        result = tracee.run_one(
            leader, Call(process.SYS_CLONE, (process.CLONE_FILES,)), entry=machine.SPLIT
        )
    finally:
        ptrace.set_options(leader.tid, 0)
    if result < 0 or not born:
        return 0, f"the process cannot be cloned ({os.strerror(-result)})"
    if not os.WIFSTOPPED(ptrace.wait(born[0])):
        return 0, "its clone was killed"
    ptrace.set_options(born[0], ptrace.PTRACE_O_EXITKILL)
    return born[0], ""


def _end_snapshot(subject: Subject, snapshot: int) -> None:
    """Kill the snapshot and have the process reap it, so that no zombie stays."""
    pid = subject.pid
    try:
        number = proc.innermost(proc.status(snapshot)["NSpid"])
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(snapshot, signal.SIGKILL)
            os.waitpid(snapshot, ptrace.WALL)
        if subject.tracee.threads:  # it is stopped, with our code in it
            _wait_inside(subject.tracee, number)
            return
        if proc.start_time(pid) != subject.start_time:
            return
        tracee = Tracee(pid)
        tracee.seize()
        try:
            tracee.prepare(arena_bytes=4096, vmas=subject.vmas)
            _wait_inside(tracee, number)
        finally:
            tracee.let_go()
    except (LzyError, OSError):
        return  # the process has ended meanwhile, and the zombie with it


def _wait_inside(tracee: Tracee, number: int) -> None:
    """Have a stopped process wait for a child of its, by the number it knows, that has ended."""
    call = Call(process.SYS_WAIT4, (number, 0, os.WNOHANG | ptrace.WALL, 0))
    tracee.run_one(tracee.speaker, call)


def _take_deleted_executable(pid: int, objects: Objects) -> int:
    """The object number of an executable that has no path any more (upgraded meanwhile), or 0."""
    if not os.readlink(f"/proc/{pid}/exe").endswith(" (deleted)"):
        return 0
    executable = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(executable)
        return objects.add_file(executable, key=(status.st_dev, status.st_ino))
    finally:
        os.close(executable)
