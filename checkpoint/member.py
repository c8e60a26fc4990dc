"""One process of an image, made again from a stub of our own: memory, threads, and all the rest.

The process makes itself into what it was by system calls that we inject as lists. Its children are
forked from it in the midst of that: with its memory, where they share some of it copy-on-write,
else before it has any.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from . import birth, machine, proc, reinstate, resources
from .batch import Batch
from .errors import Incompatible, KernelError, LzyError
from .harbour import make_harbour
from .image import Image
from .interrogate import decode
from .linux import PAGE_BYTES, layouts, memory, process, ptrace, uffd
from .linux.detached import take_descriptor
from .linux.process import SYS_PRCTL
from .machine import Call
from .member_memory import CODE_OFFSET, HOLE_BYTES, Brought, Filling, MemberMemory, Progress
from .rarities import make_rarities
from .stages import reach
from .tracee import Thread, Tracee

if TYPE_CHECKING:
    from .pager import PagerStart

_ARENA_BYTES = 4 << 20
_ARENA_OFFSET = 16 << 20
_FEW_WINDOWS = 256  # 64 MiB: more are filled in by two threads
_LAZY_CHILD_BYTES = 32 << 20  # below, a pager of its own costs a child more than it gains


class Member(MemberMemory):
    """One process; its methods are its steps, in order."""

    def __init__(self, image: Image, brought: Brought, *, eager: bool) -> None:
        """`image`: of this process by itself (`Image.member`), or of all if it is the first."""
        super().__init__(image, brought)
        self.eager = eager
        self.on_demand = False
        """Of its memory only what is touched comes, until somebody has the rest brought in."""
        self.number: int = self.document["pid"]
        self.table: dict[str, Any] = self.document["descriptors"]
        self.parent: Member | None = None
        self.children: list[Member] = []
        self.stand_ins: dict[int, Tracee] = {}
        """For leaders of sessions that have ended, until all are born."""
        self.harbour: tuple[()] | tuple[int, int] = ()  # numbers in the process
        self.faults, self.faults_number = -1, -1
        self.new_threads: list[Thread] = []
        self.pager: PagerStart | None = None
        self.lazy: list[dict[str, Any]] = []

    @property
    def holder(self) -> int:
        """As the table of descriptors calls the process: 0 is the first of a tree."""
        return self.number if self.parent else 0

    def plan(self, lowest_number: int) -> None:
        """Which of its memory is to follow lazily; what that needs is made, to be inherited."""
        self.lazy = [] if self.eager else self.find_lazy()
        if self.parent and sum(map(len, self.find_later(self.lazy))) * self.window_bytes < (
            _LAZY_CHILD_BYTES
        ):
            self.lazy = []
        if self.lazy:
            self.harbour = make_harbour(lowest_number)

    # -- birth -----------------------------------------------------------------------------------

    def be_born(self, pid: int) -> None:
        """The first of a tree: take hold of `pid`, stopped in our stub."""
        self.pid = pid
        self._enter(pid)

    def grow(self, progress: Progress | None) -> list[Member]:
        """Its memory and its children, with theirs; `protect` follows.

        Of those below it the ones that are born and have no memory yet: `begin_filling` is for
        them, when nobody is forked any more.
        """
        apart = [child for child in self.children if self._is_apart(child)]
        early = [] if apart else [child for child in self.children if not child.inherited]
        for child in early:
            self._fork(child)
        self.clear_addresses()
        self.map()
        reach("restore.mapped")
        # The descriptor by which missing pages will be heard of comes before there are threads:
        # the kernel takes a grace period (10 ms) to enlarge a table that they share.
        if self.lazy:
            self._make_faults()
        shared = [pages for child in self.children for pages in child.inherited]
        self.fill(self.lazy if self.faults >= 0 else [], shared, progress if self.eager else None)
        reach("restore.filled")
        for child in self.children:
            if child not in early:
                child.forked_from = self
                if child not in apart:
                    self._fork(child)
        for child in apart:
            self._fork_apart(child)
        small = [child for child in self.children if child.is_small]
        for child in self.children:
            if child not in small:
                small += child.grow(progress)
        return small

    @property
    def is_small(self) -> bool:
        """Whether it is filled beside what is done with others: no children, and little memory."""
        return not self.children and not self.lazy and len(self.windows) <= _FEW_WINDOWS

    def begin_filling(self, filling: Filling) -> None:
        """The memory of one that `grow` has left out."""
        self.clear_addresses()
        self.map()
        filling.begin(partial(self.fill, [], [], None, alone=True))

    def _fork(self, child: Member) -> None:
        """Make a child: with its number, in its session, with its directory and descriptors."""
        child.pid, child.tracee = fork_stub(self.tracee, child.number, child.document)
        self._settle_child(child, self.own)

    def _is_apart(self, child: Member) -> bool:
        """Whether its session is another's than ours; see `sessions`."""
        return child.own["session"] not in (child.number, self.own["session"])

    def _fork_apart(self, child: Member) -> None:
        """Make a child of a session that it cannot inherit from us."""
        session = child.own["session"]
        leader = next((other for other in self.children if other.number == session), None)
        if leader:
            maker, own = leader.tracee, leader.own
        else:
            if session not in self.stand_ins:
                _, stub = fork_stub(self.tracee, session, child.document)
                self.stand_ins[session] = stub
                batch = stub.batch()
                batch.call(process.SYS_SETSID, what=f"lead session {session}")
                stub.run(stub.speaker, batch)
            maker, own = self.stand_ins[session], self.own
        child.pid, child.tracee = fork_stub(maker, child.number, child.document, sibling=True)
        self._settle_child(child, own)

    def _settle_child(self, child: Member, made_from: dict[str, Any]) -> None:
        """Its session or group, if it leads one; its place and descriptors."""
        leader = child.tracee.speaker
        batch = child.tracee.batch()
        if child.own["session"] == child.number:
            batch.call(process.SYS_SETSID, what="lead a session")
        elif child.own["group"] == child.number:
            batch.call(process.SYS_SETPGID, 0, 0, what="lead a process group")
        self._add_place(batch, child, made_from)
        child.tracee.run(leader, batch)
        self._add_descriptors(child)

    def _add_place(self, batch: Batch, child: Member, made_from: dict[str, Any]) -> None:
        """Its root and working directory, where they are not those of who forked it."""
        own = child.own
        if own["root"] != made_from["root"]:
            batch.call(process.SYS_CHROOT, batch.put(os.fsencode(own["root"]) + b"\0"))
        if (own["root"], own["cwd"]) != (made_from["root"], made_from["cwd"]):
            number = self.brought.directories[own["root"] + "\0" + own["cwd"]]
            batch.call(process.SYS_FCHDIR, number, what=f"enter {own['cwd']}")

    def _add_descriptors(self, child: Member) -> None:
        """Every descriptor of a child to its number; those of its parent go."""
        brought, table = self.brought, self.table_of_all
        if child.number in self.root.to_be_placed:
            _place_by_helper(table, brought.local, child.number)
        batch = child.tracee.batch()
        batch.call(process.SYS_CLOSE_RANGE, 0, brought.floor - 1, 0)
        if self.faults_number >= brought.floor:
            batch.call(process.SYS_CLOSE, self.faults_number, tolerate=True)  # a sibling has not
        for number, index in resources.chosen_places(table, brought.local, child.number).items():
            batch.call(process.SYS_DUP3, brought.local[index], number, 0, what="a descriptor")
        child.tracee.run(child.tracee.speaker, batch)

    @property
    def table_of_all(self) -> dict[str, Any]:
        """The first process's table, with the others' in it."""
        member = self
        while member.parent:
            member = member.parent
        return member.table

    @cached_property
    def to_be_placed(self) -> set[int]:
        """Of the first of a tree: whose descriptors take more than to be put at numbers."""
        return resources.find_to_be_placed(self.table)

    @property
    def root(self) -> Member:
        """The first of its tree."""
        member = self
        while member.parent:
            member = member.parent
        return member

    def _enter(self, pid: int) -> None:
        """Take hold of the stopped stub: our code on an anonymous page, an arena for batches."""
        tracee = self.tracee = Tracee.newborn(pid, self.brought.hole)
        leader = tracee.speaker
        place = self.brought.hole + CODE_OFFSET
        wanted = memory.PROT_READ | memory.PROT_EXEC
        kind = memory.MAP_PRIVATE | memory.MAP_ANONYMOUS | memory.MAP_FIXED_NOREPLACE
        _check(
            tracee.run_one(leader, Call(process.SYS_MMAP, (place, PAGE_BYTES, wanted, kind, -1, 0)))
        )
        os.pwrite(tracee.memory, machine.CODE, place)
        tracee.code = place
        tracee.arena = self.brought.hole + _ARENA_OFFSET
        tracee.arena_bytes = _ARENA_BYTES
        wanted = memory.PROT_READ | memory.PROT_WRITE
        arena = Call(process.SYS_MMAP, (tracee.arena, _ARENA_BYTES, wanted, kind, -1, 0))
        _check(tracee.run_one(leader, arena))
        reach("restore.executed")

    # -- threads and the rest --------------------------------------------------------------------

    def reinstate(self) -> None:
        """What the process as a whole has; its threads, and what each of them has."""
        self._reinstate_process(paging=self.left > 0)
        self.new_threads = self._make_threads()
        if self.own.get("main_thread"):
            self._end_main_thread(self.own["main_thread"])
        make_rarities(
            self.tracee, self.document, self.new_threads, self.table_of_all["descriptions"]
        )
        reach("restore.threads")
        self._reinstate_threads(self.new_threads)
        if self.left:
            for vma in self.lazy:
                uffd.register(self.faults, vma["start"], vma["end"] - vma["start"])
            self._begin_pager()

    def _make_threads(self) -> list[Thread]:
        """Clone the other threads, each under its old id; all stop before their first step.

        Raises Busy if one of these ids is somebody else's by now.
        """
        tracee = self.tracee
        leader = tracee.speaker
        batch = tracee.batch()
        has_main = not self.own.get("main_thread")
        wanted = self.threads[has_main:]
        for thread in wanted:
            number = batch.put(layouts.pack_s64(thread["tid"]))
            arguments = batch.put(process.thread_clone_arguments(number, 0))
            batch.call(process.SYS_CLONE3, arguments, 88, what=f"thread {thread['tid']}")
        born: list[int] = []
        tracee.on_clone = born.append
        try:
            tracee.run(leader, batch)
        except KernelError as error:
            if error.errno == errno.EEXIST:
                raise birth.number_taken(wanted[len(born)]["tid"]) from error
            raise
        for tid in born:
            _await_first_stop(tid)
            tracee.adopt(tid)
        return [*[leader] * has_main, *[tracee.threads[tid] for tid in born]]

    def _end_main_thread(self, described: dict[str, Any]) -> None:
        """Have the main thread end, which has made the others, as it had; they speak from now on.

        Before it has children that are to be told of the end of the thread they were born of.
        """
        tracee = self.tracee
        leader = tracee.threads[tracee.pid]
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, leader.tid, described["nice"])
        batch = tracee.batch()
        name = os.fsencode(described["comm"])[:15].ljust(16, b"\0")
        batch.call(SYS_PRCTL, process.PR_SET_NAME, batch.put(name))
        reinstate.add_rights(batch, described, proc.status(tracee.pid))
        tracee.run(leader, batch)
        tracee.end_leader(described["status"])

    def _reinstate_process(self, *, paging: bool) -> None:
        """Addresses, signal actions, timers, file locks: what all threads share.

        While there is one thread: membarrier registrations, too, then need no grace period.
        """
        tracee, brought = self.tracee, self.brought
        pid = tracee.pid
        leader = tracee.speaker
        own = self.own
        batch = tracee.batch()
        executable = (
            brought.objects[own["exe_object"] - 1]
            if own["exe_object"]
            else brought.files[own["exe"], False]
        )
        reinstate.add_addresses(batch, own, executable)
        reinstate.add_process(batch, own)
        stays = sorted({*self.harbour, self.faults_number}) if paging else []
        previous = brought.floor - 1
        for descriptor in [n for n in stays if n >= brought.floor]:
            if descriptor > previous + 1:
                batch.call(process.SYS_CLOSE_RANGE, previous + 1, descriptor - 1, 0)
            batch.call(process.SYS_FCNTL, descriptor, process.F_SETFD, fcntl.FD_CLOEXEC)
            previous = descriptor
        batch.call(process.SYS_CLOSE_RANGE, previous + 1, (1 << 32) - 1, 0)
        if 0 <= self.faults_number < brought.floor and not paging:
            batch.call(process.SYS_CLOSE, self.faults_number)
        # Only now: closing any descriptor of a file gives up the process's locks on it, fcntl(2).
        for number, command, lock in resources.posix_locks(self.table_of_all, self.holder):
            batch.call(process.SYS_FCNTL, number, command, batch.put(lock), what="file lock")
        for text, place in self.table["descriptors"].items():
            if place["close_on_exec"]:
                batch.call(
                    process.SYS_FCNTL,
                    int(text),
                    process.F_SETFD,
                    fcntl.FD_CLOEXEC,
                    what="close-on-exec",
                )
        tracee.run(leader, batch)

        self._write_proc(pid, "coredump_filter", f"{own['coredump_filter']:#x}")
        self._write_proc(pid, "oom_score_adj", str(own["oom_score_adj"]))

    def _reinstate_threads(self, threads: list[Thread]) -> None:
        """What each thread has besides registers; then what must come after all of them."""
        tracee, own_pid = self.tracee, self.number
        pid = tracee.pid
        leader = threads[0]
        own = self.own
        for described, thread in zip(self.threads, threads, strict=True):
            self._schedule(thread.tid, described)

        slots = 64
        pairs = list(zip(self.threads, threads, strict=True))
        for start in range(0, len(pairs), slots):
            started = []
            for slot, (described, thread) in enumerate(pairs[start : start + slots]):
                batch = tracee.batch(slot, slots)
                reinstate.add_thread(batch, described)
                reinstate.add_pending(batch, own_pid, described["tid"], described)
                reinstate.add_rights(batch, described, proc.status(pid, thread.tid))
                tracee.start(thread, batch)
                started.append((thread, batch))
            for thread, batch in started:
                tracee.finish(thread, batch)

        if own["posix_timers"]:
            self._make_posix_timers(tracee)  # only now: some are for a thread
        batch = tracee.batch()
        reinstate.add_shared_pending(batch, own_pid, own)
        if own["dumpable"] in (0, 1):
            batch.call(SYS_PRCTL, process.PR_SET_DUMPABLE, own["dumpable"])
        if own["deny_write_execute"]:
            batch.call(SYS_PRCTL, process.PR_SET_MDWE, own["deny_write_execute"])
        for vma in self.vmas:
            if "sl" in vma["flags"] and vma["kind"] not in ("vdso", "vvar"):
                batch.call(
                    process.SYS_MSEAL, vma["start"], vma["end"] - vma["start"], 0, what="seal"
                )
        tracee.run(leader, batch)

    def _make_posix_timers(self, tracee: Tracee) -> None:
        """Create the POSIX timers; raises Incompatible if the kernel numbers them otherwise."""
        leader = tracee.speaker
        probe = tracee.batch()
        probe.call(SYS_PRCTL, process.PR_TIMER_CREATE_RESTORE_IDS, 0, tolerate=True)
        numbered = tracee.run(leader, probe).results[0] == 0
        batch = tracee.batch()
        given = reinstate.add_posix_timers(batch, self.own, numbered=numbered)
        tracee.run(leader, batch)
        for wanted, place in given:
            if layouts.unpack_s32(batch.read(place, 4)) != wanted:
                raise Incompatible(
                    f"this kernel does not give a POSIX timer the number {wanted} it had",
                    remedy="restore under Linux 6.16 or later",
                )

    def _schedule(self, tid: int, described: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # sched_setattr sets nice for some policies only
            os.setpriority(os.PRIO_PROCESS, tid, described["nice"])
        try:
            process.set_scheduling(tid, decode(described["scheduling"]))
        except OSError as error:
            self.brought.notes.append(f"scheduling of thread {tid}: {error.strerror}")
        here = set(range(os.cpu_count() or 1))
        wanted = set(described["affinity"])
        if wanted != os.sched_getaffinity(tid):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(tid, wanted & here or here)
        if described["io_priority"] != process.io_priority(tid):
            with contextlib.suppress(OSError):
                process.set_io_priority(tid, described["io_priority"])

    def _write_proc(self, pid: int, name: str, value: str) -> None:
        try:
            with open(f"/proc/{pid}/{name}", "r+") as file:
                if file.read().strip() != value:
                    file.write(value)
        except OSError as error:
            self.brought.notes.append(f"{name} stays as it is here: {error.strerror}")

    # -- lazily ----------------------------------------------------------------------------------

    def _make_faults(self) -> None:
        """Have the process make a userfaultfd; `faults` is our duplicate of it.

        None is made where the kernel does not let it: memory is then loaded at once.
        """
        tracee = self.tracee
        leader = tracee.speaker
        batch = tracee.batch()
        made = batch.call(process.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK, tolerate=True)
        tracee.run(leader, batch)
        first = batch.results[made]
        if first < 0:
            self.brought.notes.append(
                f"memory was loaded at once, not as it is touched: {os.strerror(-first)} from "
                "userfaultfd (see lzy doctor)"
            )
            return
        used = set(map(int, self.table["descriptors"]))
        soft = min(self.own["limits"]["7"][0], 1 << 20)
        number = next((n for n in range(min(soft, 1024) - 1, 2, -1) if n not in used), first)
        batch = tracee.batch()
        if number != first:
            moved = batch.call(process.SYS_FCNTL, first, process.F_DUPFD_CLOEXEC, number)
            batch.call(process.SYS_CLOSE, first)
            tracee.run(leader, batch)
            number = batch.results[moved]
        pidfd = proc.open_shared(tracee.pid)
        try:
            self.faults, self.faults_number = take_descriptor(pidfd, number), number
        finally:
            os.close(pidfd)
        uffd.enable(self.faults)
        # Until the mappings are registered no huge page may come and fill what is missing there.
        batch = tracee.batch()
        batch.call(SYS_PRCTL, process.PR_SET_THP_DISABLE, 1)
        tracee.run(leader, batch)

    def _begin_pager(self) -> None:
        """Start the pager, which gets ready beside us; should we give up, it leaves too."""
        from .pager import Plan, begin_pager

        plan = Plan(
            pid=self.pid,
            start_time=proc.start_time(self.pid),
            uffd_number=self.faults_number,
            store=str(self.image.store_path),
            image=self.image.name,
            ranges=[(vma["start"], vma["end"]) for vma in self.lazy],
            harbour_numbers=self.harbour or None,
            on_demand=self.on_demand,
        )
        pidfd = os.pidfd_open(self.pid)
        try:
            self.pager = begin_pager(
                plan, self.faults, pidfd, self.image, open_image=self.image.reopen
            )
        finally:
            os.close(pidfd)

    def leave(self) -> None:
        """Limits and timers, then unmap our own code, then the registers and masks of all."""
        tracee, threads = self.tracee, self.new_threads
        leader = threads[0]
        batch = tracee.batch()
        batch.call(SYS_PRCTL, process.PR_SET_THP_DISABLE, self.own["no_huge_pages"])
        reinstate.add_limits(batch, self.own)
        reinstate.add_timer_settings(batch, self.own)
        tracee.run(leader, batch)
        vdso = next((v for v in self.vmas if v["kind"] == "vdso"), None)
        if vdso is None:
            raise Incompatible("the process has no vDSO, which lzy needs to take its code out")
        content = bytearray(vdso["end"] - vdso["start"])
        memory.read_process(tracee.witness, [(vdso["start"], len(content))], memoryview(content))
        instruction = vdso["start"] + content.index(b"\x0f\x05")
        registers = {
            **leader.registers,
            "rip": instruction,
            "rax": process.SYS_MUNMAP,
            "rdi": self.brought.hole,
            "rsi": HOLE_BYTES,
            "orig_rax": (1 << 64) - 1,
        }
        ptrace.write_register_set(leader.tid, ptrace.NT_PRSTATUS, machine.pack_registers(registers))
        ptrace.write_signal_mask(leader.tid, (1 << 64) - 1)
        ptrace.single_step(leader.tid)
        status = ptrace.wait(leader.tid)
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
            raise LzyError(f"the process did not take our code out (status {status:#x})")
        _end_step(leader.tid)
        for described, thread in zip(self.threads, threads, strict=True):
            after = machine.restartable(described["registers"], keep_block=False)
            ptrace.write_register_set(thread.tid, ptrace.NT_X86_XSTATE, decode(described["xstate"]))
            ptrace.write_register_set(thread.tid, ptrace.NT_PRSTATUS, machine.pack_registers(after))
            ptrace.write_signal_mask(thread.tid, described["signal_mask"])

    def close(self) -> None:
        """Close what the restorer holds of it."""
        if self.pid:
            self.tracee.close()
        if self.faults >= 0:
            os.close(self.faults)
            self.faults = -1


def fork_stub(
    parent: Tracee, number: int, document: dict[str, Any], *, sibling: bool = False
) -> tuple[int, Tracee]:
    """Have a stub fork another with the pid `number`, which stops at once.

    (its pid as we see it, itself). A `sibling` is a child of the stub's parent, and tells it of its
    end as the stub does. Raises Busy if the number is taken.
    """
    batch = parent.batch()
    tid = batch.put(layouts.pack_s32(number))
    arguments = batch.put(
        process.fork_arguments(tid, 0, process.CLONE_PARENT)
        if sibling
        else process.fork_arguments(tid, document["exit_signal"])
    )
    made = batch.call(process.SYS_CLONE3, arguments, 88, tolerate=True)
    born: list[int] = []
    parent.on_clone = born.append
    parent.run(parent.speaker, batch)
    if (result := batch.results[made]) < 0:
        if result == -errno.EEXIST:
            raise birth.number_taken(number)
        raise KernelError(f"cannot make process {number} again", -result)
    pid = born[0]
    _await_first_stop(pid)
    child = Tracee.newborn(pid, parent.code)
    child.arena, child.arena_bytes = parent.arena, parent.arena_bytes
    return pid, child


def _end_step(tid: int) -> None:
    """Have a thread that was stepped stop again, before its next instruction, as any other does.

    Should we die later, it would get the signal of that step, or go on stepping: the kernel ends
    neither with the tracer, and the process dies of it as soon as it runs. Source: ptrace(2).
    """
    ptrace.interrupt(tid)
    ptrace.resume(tid)
    _await_first_stop(tid)


def _await_first_stop(tid: int) -> None:
    """Wait until a newborn thread or process, ours from birth, stands before its first step."""
    while True:
        status = ptrace.wait(tid)
        if not os.WIFSTOPPED(status):
            raise LzyError(f"{tid} ended before it began")
        if status >> 16 == ptrace.PTRACE_EVENT_STOP:
            return
        ptrace.resume(tid)


def _place_by_helper(table: dict[str, Any], local: dict[int, int], holder: int) -> None:
    """What must be said of descriptions under the numbers they have in that process.

    Who says it does not matter, but under which numbers: a child of ours that goes again.
    """
    from .linux.process import clone3

    pid = clone3()
    if pid == 0:
        try:
            resources.place_descriptors(table, local, [], holder)
            os._exit(0)
        except BaseException as error:
            print(f"lzy: descriptors of {holder}: {error}", file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if status:
        raise LzyError(f"the descriptors of process {holder} could not all be made")


def _check(result: int) -> None:
    if -4095 <= result < 0:
        raise KernelError("cannot map lzy's code in the new process", -result)
