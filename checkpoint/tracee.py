"""A process under ptrace: stop all its threads, run system calls inside it, let it go unharmed.

*Guarantee*: whatever happens to lzy while a process is traced (`kill -9` included), the process
runs on as if nothing had happened. Its registers are changed only while the code they point to can
put them back by itself (see `machine`); that code and its context stand in bytes that the process
never executes: the zeros behind the end of the vDSO (or of another mapped text).

All methods must be called by the operating system thread that seized the process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import machine, proc
from .batch import Batch
from .errors import AccessDenied, Busy, KernelError, LzyError, NotFound, Unsupported
from .filters import mode_of, suspend_filters
from .linux import PAGE_BYTES, memory, process, ptrace
from .machine import Call
from .rseq import leave_sequence

ALL_SIGNALS = 0xFFFFFFFFFFFFFFFF
_CANDIDATES = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)  # ignored by default, signal(7)
ARENA_BYTES = 1 << 20
_STOP_WITHIN_S = 10.0
_BACK_WITHIN_S, _BACK_PAUSE_S = 10.0, 0.005


class Thread:
    """One stopped thread: its registers and signal mask as they were found."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.registers = machine.unpack_registers(ptrace.read_register_set(tid, ptrace.NT_PRSTATUS))
        self.mask = ptrace.read_signal_mask(tid)
        self.status: dict[str, str] = {}  # /proc status, read at the first need
        self.context = b""  # that leads it back, see `machine`, from its first call on
        self.in_group_stop = False
        self.runs = False  # our code, and is to be waited for
        self.disturbed = False  # registers or mask differ from what was found


class Tracee:
    """A process whose threads are all stopped and traced by us."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.threads: dict[int, Thread] = {}
        self.memory = -1
        self.code = 0
        self.arena = 0
        self.arena_bytes = 0
        self._signal = 0
        self._dead: set[int] = set()
        self._workers: set[int] = set()  # the kernel's own, of an io_uring: they are made with it
        self._restore_text: tuple[int, bytes] | None = None

    @classmethod
    def newborn(cls, pid: int, code: int) -> Tracee:
        """A process of our own making, stopped at `code`, our code; it has no stack yet."""
        tracee = cls(pid)
        tracee.memory = memory.open_memory(pid)
        tracee.adopt(pid)
        tracee._signal = signal.SIGURG
        tracee.code = code
        return tracee

    def adopt(self, tid: int) -> Thread:
        """Count a stopped thread of our own making among the process's threads."""
        thread = self.threads[tid] = Thread(tid)
        thread.registers["rsp"] = 0
        return thread

    @property
    def speaker(self) -> Thread:
        """The thread that speaks for the process: its main one, or another where that has ended."""
        return self.threads.get(self.pid) or next(iter(self.threads.values()))

    @property
    def witness(self) -> int:
        """The task by which /proc and system calls know what the threads share; `proc.witness`."""
        return self.pid if self.pid in self.threads else next(iter(self.threads), self.pid)

    # -- stopping and letting go -------------------------------------------------------------

    def seize(self) -> None:
        """Seize and stop all threads, again until no new one appears.

        A thread in which a lzy before us was killed in the midst of a call gets the time to find
        its way back: our code, and what it puts back, must stand until then. Raises AccessDenied,
        NotFound, Busy, or Unsupported where somebody else traces the process; in every case
        nothing stays stopped.
        """
        deadline = time.monotonic() + _BACK_WITHIN_S
        while True:
            self._seize_all()
            left = [thread.tid for thread in self.threads.values() if self._is_on_its_way(thread)]
            if not left:
                return
            self.let_go()
            if time.monotonic() > deadline:
                raise Busy(
                    f"thread {left[0]} of pid {self.pid} is still in a call that a lzy made which "
                    "was killed",
                    remedy=f"if it is stopped: kill -CONT {self.pid}; then try again",
                    pid=self.pid,
                )
            time.sleep(_BACK_PAUSE_S)

    def _is_on_its_way(self, thread: Thread) -> bool:
        """Whether it runs our code, which always lies at the end of a page (`_find_zeros`)."""
        rip = thread.registers["rip"]
        place = (rip | PAGE_BYTES - 1) + 1 - machine.CODE_BYTES - machine.CONTEXT_BYTES
        if not place <= rip < place + machine.CODE_BYTES:
            return False
        with contextlib.suppress(OSError):
            return os.pread(self.memory, len(machine.CODE), place) == machine.CODE
        return False

    def _seize_all(self) -> None:
        seized: list[int] = []
        try:
            while True:
                known = self.threads.keys() | self._dead | self._workers
                new = [tid for tid in proc.threads(self.pid) if tid not in known]
                if not new:
                    break
                seized.clear()
                for tid in new:
                    if self._seize_thread(tid):
                        seized.append(tid)
                for tid in seized:
                    self._interrupt(tid)
                for tid in seized:
                    self._await_stop(tid)
            if not self.threads:
                raise NotFound(f"process {self.pid} ended", pid=self.pid)
            self.memory = memory.open_memory(self.witness)
        except BaseException:
            for tid in seized:  # only who has stopped can be let go
                if tid not in self.threads:
                    with contextlib.suppress(LzyError, OSError):
                        self._interrupt(tid)
                        self._await_stop(tid, within_s=0.1)
            self.let_go()
            raise

    def _seize_thread(self, tid: int, *, again: bool = False) -> bool:
        if tid != self.pid and proc.is_kernel_worker(self.pid, tid):
            self._workers.add(tid)
            return False
        try:
            ptrace.seize(tid)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return False
            if tid != self.pid and not os.path.exists(f"/proc/{self.pid}/task/{tid}"):
                return False
            try:
                state = proc.stat(self.pid, tid)[2]
                tracer = int(proc.status(self.pid, tid).get("TracerPid", "0"))
            except NotFound:
                if tid == self.pid:
                    raise
                return False  # it ended just now
            if state == "Z":  # a main thread that ended stays listed as long as others live
                self._dead.add(tid)
                return False
            if not tracer and not again:  # who traced it may have let it go just now
                return self._seize_thread(tid, again=True)
            raise refusal_to_trace(self.pid, tracer, error) from error
        return True

    def _interrupt(self, tid: int) -> None:
        try:
            ptrace.interrupt(tid)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise

    def _await_stop(self, tid: int, within_s: float = _STOP_WITHIN_S) -> None:
        """Wait for the stop we asked for; signals that come in between are given back."""
        while True:
            try:
                status = self._wait_within(tid, within_s)
            except ChildProcessError:
                return
            if not status:
                return  # it ended, but is a zombie until the others end
            if not os.WIFSTOPPED(status):
                return  # it ended
            if status >> 16 == ptrace.PTRACE_EVENT_STOP:
                thread = Thread(tid)
                thread.in_group_stop = os.WSTOPSIG(status) != signal.SIGTRAP
                self.threads[tid] = thread
                return
            # a signal was about to be delivered: deliver it; the stop we asked for follows
            ptrace.resume(tid, os.WSTOPSIG(status))

    def _wait_within(self, tid: int, timeout_s: float) -> int:
        """waitpid with an end: a thread in an uninterruptible wait stops only when that is over.

        0 for a main thread that has ended: its end is reported after that of all others, ptrace(2).
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.0
        while True:
            if status := ptrace.wait_briefly(tid):
                return status
            if tid == self.pid and pause_s and proc.stat(tid, tid)[2] == "Z":
                self._dead.add(tid)
                return 0
            if time.monotonic() > deadline:
                raise Busy(
                    f"thread {tid} of pid {self.pid} does not stop: it waits inside the kernel "
                    f"({proc.read_file(f'/proc/{tid}/wchan').decode() or 'uninterruptible'})",
                    remedy="try again when its disk, network file system or child has answered",
                    pid=self.pid,
                )
            time.sleep(pause_s)
            pause_s = min(pause_s + 0.00005, 0.005)

    def _wait_for(self, tid: int) -> int:
        """waitpid, however long it takes; 0 for a main thread that was killed with its process.

        The end of a main thread is reported after that of all others, and while we trace those
        only we can wait for them: a blocking wait would be for ever.
        """
        if tid != self.pid or len(self.threads) == 1:
            return ptrace.wait(tid)
        pause_s = 0.0
        while True:
            if status := ptrace.wait_briefly(tid):
                return status
            if tid == self.pid and pause_s and proc.stat(tid, tid)[2] in "ZX":
                return 0
            time.sleep(pause_s)
            pause_s = min(pause_s + 0.00005, 0.002)

    def let_go(self) -> None:
        """Put everything back and detach from every thread; the process runs on.

        Quiet about a process that was killed meanwhile.
        """
        killed: list[int] = []
        self._await_runners()
        try:
            self.unmap_arena()
        finally:
            self.clear_code()
            for thread in self.threads.values():
                try:
                    self._put_back(thread)
                    ptrace.detach(thread.tid)
                except ProcessLookupError:
                    killed.append(thread.tid)
            self.threads.clear()
            self.close()
            self._release(killed)

    def _await_runners(self) -> None:
        """After an error: wait for threads still in our code, before it is taken out."""
        for thread in self.threads.values():
            if thread.runs:
                with contextlib.suppress(LzyError, OSError):
                    self._await_notice(thread)

    def _release(self, killed: list[int]) -> None:
        """Wait for threads that ended under our trace: before that, their parent hears nothing."""
        # The main thread last, ptrace(2); of one that others survive there is nothing to hear.
        for tid in sorted({*killed, *self._dead}, key=self.pid.__eq__):
            with contextlib.suppress(ChildProcessError, NotFound):
                if tid == self.pid and int(proc.status(tid)["PPid"]) == os.getpid():
                    continue  # our own child: whoever started it here waits for it
                os.waitpid(tid, ptrace.WALL | (0 if tid in killed else os.WNOHANG))

    def die_with_us(self) -> None:
        """From now on the kernel kills the process should we end."""
        for tid in self.threads:
            ptrace.set_options(tid, ptrace.PTRACE_O_EXITKILL)

    def await_end(self) -> None:
        """Wait until a process that has been killed is gone."""
        for tid in sorted(self.threads, key=self.pid.__eq__):
            with contextlib.suppress(ChildProcessError):
                while os.WIFSTOPPED(os.waitpid(tid, ptrace.WALL)[1]):
                    pass
        self._release([])
        self.threads.clear()
        self.close()

    def close(self) -> None:
        """Close what lzy holds open of the process."""
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1

    def _put_back(self, thread: Thread) -> None:
        registers = machine.restartable(thread.registers, keep_block=True)
        if thread.disturbed:
            # The mask first: should we die before the registers are back, the code sets both.
            ptrace.write_signal_mask(thread.tid, thread.mask)
        if thread.disturbed or registers is not thread.registers:
            ptrace.write_register_set(
                thread.tid, ptrace.NT_PRSTATUS, machine.pack_registers(registers)
            )
        thread.disturbed = False

    # -- running system calls inside ----------------------------------------------------------

    def prepare(
        self, *, arena_bytes: int = ARENA_BYTES, vmas: list[proc.Vma] | None = None
    ) -> None:
        """Place our code in unused bytes of the process and map an arena for batches.

        `vmas` may have been read before the process was stopped: what is used of them is checked.
        """
        if any(mode_of(self.status(thread)) for thread in self.threads.values()):
            suspend_filters(self)
        leader = self.speaker
        self._signal = self._choose_signal()
        place = self._find_unused_text(vmas or proc.kernel_mappings(self.witness))
        self._restore_text = (place, bytes(machine.CODE_BYTES + machine.CONTEXT_BYTES))
        os.pwrite(self.memory, machine.CODE.ljust(machine.CODE_BYTES, b"\0"), place)
        self.code = place
        result = self.run_one(
            leader,
            Call(
                process.SYS_MMAP,
                (
                    0,
                    arena_bytes,
                    memory.PROT_READ | memory.PROT_WRITE,
                    memory.MAP_PRIVATE | memory.MAP_ANONYMOUS,
                    -1,
                    0,
                ),
            ),
        )
        if -4095 <= result < 0:
            raise KernelError(f"cannot map an arena in pid {self.pid}", -result, pid=self.pid)
        self.arena, self.arena_bytes = result, arena_bytes

    def unmap_arena(self) -> None:
        """Unmap the arena; single calls are still possible."""
        if self.arena and self.code:
            arena, self.arena = self.arena, 0
            try:
                self.run_one(self.speaker, Call(process.SYS_MUNMAP, (arena, self.arena_bytes)))
            except (ProcessLookupError, NotFound):
                return  # it was killed meanwhile

    def clear_code(self) -> None:
        """Take our code out of the process again."""
        if self._restore_text:
            place, content = self._restore_text
            self._restore_text = None
            self.code = 0
            try:
                os.pwrite(self.memory, content, place)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ESRCH):  # the process is gone
                    raise

    def _choose_signal(self) -> int:
        """A signal whose arrival the process would not notice: no handler, not blocked."""
        status = self.status(self.speaker)
        noticed = int(status["SigCgt"], 16) | int(status["ShdPnd"], 16)
        for thread in self.threads.values():
            noticed |= thread.mask
        for candidate in _CANDIDATES:
            if not noticed >> (candidate - 1) & 1:
                return int(candidate)
        return int(signal.SIGURG)  # its handlers expect to be called without cause

    def _find_unused_text(self, vmas: list[proc.Vma]) -> int:
        """The address of enough zero bytes at the end of some mapped text, if need be of any."""
        wanted = machine.CODE_BYTES + machine.CONTEXT_BYTES
        place = self._find_zeros(vmas, wanted)
        if not place:
            place = self._find_zeros(proc.mappings(self.witness, with_flags=False), wanted)
        if not place:
            raise Unsupported(
                f"pid {self.pid} has no {wanted} unused bytes in any mapped text",
                remedy="report this program; no way around is known",
                pid=self.pid,
            )
        return place

    def _find_zeros(self, vmas: list[proc.Vma], wanted: int) -> int:
        files = (v for v in vmas if v.kind == "file" and "x" in v.permissions and not v.shared)
        for vma in itertools.chain([v for v in vmas if v.kind == "vdso"], files):
            place = vma.end - wanted
            try:
                tail = os.pread(self.memory, wanted, place)
            except OSError:
                continue  # it was unmapped since
            if not any(tail) or tail.startswith(machine.CODE):
                return place
        return 0

    def run_one(self, thread: Thread, call: Call, *, entry: int = machine.ONE) -> int:
        """Make one call from registers, with the context block beside the code."""
        context = self.code + machine.CODE_BYTES
        self._write_text(context, self._context(thread))
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        arguments = (*call.arguments, 0, 0, 0, 0, 0, 0)[:6]
        self._launch(
            thread, entry, context, dict(zip(names, arguments, strict=True)) | {"rax": call.number}
        )
        result = self._await_notice(thread)
        self._put_back(thread)
        return result

    def exit(self, code: int) -> None:
        """Have the process end; its one thread does not come back."""
        leader = self.speaker
        context = self.code + machine.CODE_BYTES
        self._write_text(context, self._context(leader))
        self._launch(leader, machine.ONE, context, {"rax": process.SYS_EXIT_GROUP, "rdi": code})
        leader.runs = False

    def end_leader(self, status: int) -> None:
        """Have the main thread end, alone, with that status (proc_pid_stat(5)), and wait for it.

        It is let go first: as long as somebody traces it its parent would not hear of the end of
        the process. Should we die the kernel kills the others, and with them all of the process.
        """
        leader = self.threads.pop(self.pid)
        registers = {
            **leader.registers,
            "rip": self.code + machine.ONE,
            "rax": process.SYS_EXIT,
            "rdi": status >> 8,
            "orig_rax": (1 << 64) - 1,
        }
        ptrace.write_register_set(leader.tid, ptrace.NT_PRSTATUS, machine.pack_registers(registers))
        ptrace.write_signal_mask(leader.tid, ALL_SIGNALS)
        ptrace.detach(leader.tid)
        pause_s = 0.0
        while proc.stat(self.pid, self.pid)[2] != "Z":
            time.sleep(pause_s)
            pause_s = min(pause_s + 0.00005, 0.002)

    def _write_text(self, address: int, content: bytes) -> None:
        os.pwrite(self.memory, content, address)

    def _context(self, thread: Thread) -> bytes:
        if not thread.context:
            thread.registers = leave_sequence(self.witness, thread.tid, thread.registers)
            thread.context = machine.pack_context(
                machine.rewind(thread.registers),
                thread.mask,
                *self.own_numbers(thread),
                self._signal,
            )
        return thread.context

    def own_numbers(self, thread: Thread) -> tuple[int, int]:
        """Process and thread id as the tracee itself sees them, in its pid namespace."""
        status = self.status(thread)
        return proc.innermost(status["NStgid"]), proc.innermost(status["NSpid"])

    def status(self, thread: Thread) -> dict[str, str]:
        """/proc status of a stopped thread, read once."""
        if not thread.status:
            thread.status = proc.status(self.pid, thread.tid)
        return thread.status

    def batch(self, slot: int = 0, slots: int = 1) -> Batch:
        """A batch in the arena, or in one of `slots` equal parts of it."""
        part = self.arena_bytes // slots & ~63
        base = self.arena + slot * part
        return Batch(base + machine.CONTEXT_BYTES, part - machine.CONTEXT_BYTES)

    def run(self, thread: Thread, batch: Batch) -> Batch:
        """Run a batch in one thread and read its results; KernelError at the first failure."""
        self.start(thread, batch)
        return self.finish(thread, batch)

    def start(self, thread: Thread, batch: Batch) -> None:
        """Set a batch going; `finish` waits for it. Different threads may run at once."""
        content, table = batch.pack()
        context = batch.base - machine.CONTEXT_BYTES
        whole = bytearray(self._context(thread) + content)
        memory.write_process(self.witness, [(context, len(whole))], memoryview(whole))
        self._launch(thread, machine.RUN, context, {"rbx": table})

    def finish(self, thread: Thread, batch: Batch) -> Batch:
        """Wait for a batch and take its results."""
        self._await_notice(thread)
        self._put_back(thread)
        length = len(batch.pack()[0])
        content = bytearray(length)
        memory.read_process(self.witness, [(batch.base, length)], memoryview(content))
        batch.take(bytes(content))
        batch.check(self.pid)
        return batch

    def _launch(self, thread: Thread, entry: int, context: int, extra: dict[str, int]) -> None:
        registers = {
            **thread.registers,
            **extra,
            "rip": self.code + entry,
            "rbp": context,
            "orig_rax": ALL_SIGNALS,
        }
        # Registers before the mask: should we die in between, the code puts both back.
        thread.disturbed = True
        ptrace.write_register_set(thread.tid, ptrace.NT_PRSTATUS, machine.pack_registers(registers))
        ptrace.write_signal_mask(thread.tid, ALL_SIGNALS & ~(1 << (self._signal - 1)))
        ptrace.resume(thread.tid)
        thread.runs = True

    def _await_notice(self, thread: Thread) -> int:
        """Wait for the code's own signal; the result of its call, if it is one."""
        while True:
            status = self._wait_for(thread.tid)
            if not os.WIFSTOPPED(status):
                thread.runs = False
                raise NotFound(f"process {self.pid} ended while lzy worked in it", pid=self.pid)
            if status >> 16 in (ptrace.PTRACE_EVENT_CLONE, ptrace.PTRACE_EVENT_FORK):
                self.on_clone(ptrace.event_message(thread.tid))
                ptrace.resume(thread.tid)
                continue
            if status >> 16:
                ptrace.resume(thread.tid)
                continue
            number = os.WSTOPSIG(status)
            place, result = machine.place_and_result(
                ptrace.read_register_set(thread.tid, ptrace.NT_PRSTATUS)
            )
            if number == self._signal:
                if machine.NOTIFY < place - self.code < len(machine.CODE):
                    thread.runs = False
                    return result
                ptrace.resume(thread.tid)  # somebody else's; the process ignores it anyway
                continue
            if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP):
                thread.runs = False
                raise LzyError(
                    f"injected code stopped with {signal.Signals(number).name} at "
                    f"{place:#x} in thread {thread.tid}",
                    pid=self.pid,
                )
            ptrace.resume(thread.tid, number)

    on_clone: Callable[[int], None] = staticmethod(lambda tid: None)


def traced_by(pid: int, tracer: int) -> LzyError:
    """Why a process that `tracer` traces is refused: a debugger, or another lzy at work."""
    try:
        command = proc.read_bytes(tracer, "cmdline")
    except LzyError:
        command = b""
    if any(os.path.basename(word) == b"lzy" for word in command.split(b"\0")[:3]):
        return Busy(
            f"another lzy (pid {tracer}) is at work on pid {pid}",
            remedy="try again when it is done",
            pid=pid,
            tracer=tracer,
        )
    return Unsupported(
        f"pid {pid} is being traced by pid {tracer}",
        remedy=f"end the debugger or tracer (pid {tracer}) and try again",
        pid=pid,
        tracer=tracer,
    )


def refusal_to_trace(pid: int, tracer: int, error: OSError) -> LzyError:
    """Why a process may not be traced, in words; `tracer`: who traces it, if anybody does."""
    if tracer:
        return traced_by(pid, tracer)
    hint = "lzy looks after your own processes; run it as their owner or as root"
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            if (scope := file.read().strip()) != "0":
                hint = f"kernel.yama.ptrace_scope is {scope}; run lzy with CAP_SYS_PTRACE (as root)"
    except OSError:
        pass
    return AccessDenied(f"cannot seize pid {pid}: {error.strerror}", remedy=hint, pid=pid)


@contextmanager
def stopped(pid: int) -> Iterator[Tracee]:
    """The process with all threads stopped; it runs on, as it was, when the block is left."""
    tracee = Tracee(pid)
    tracee.seize()
    try:
        yield tracee
    finally:
        tracee.let_go()
