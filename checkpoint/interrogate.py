"""What only the kernel and the process itself can tell of its threads, signals, timers, rights.

`describe_threads` and `describe_process` give JSON-able dicts of a stopped process; `reinstate`
(the module) makes them again. Integers stay integers; bytes are base64.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from . import machine, mapping_flags, proc
from .batch import Batch
from .errors import Unsupported
from .filters import describe_filters
from .linux import layouts, memory, process, ptrace
from .linux.process import SYS_PRCTL
from .tracee import Thread, Tracee

_CHANGEABLE = [n for n in process.SIGNALS if n not in (9, 19)]  # SIGKILL, SIGSTOP
_EXIT_CODE = 51  # proc_pid_stat(5), from 0
_STATUS_KEYS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def encode(content: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(content).decode()


def decode(text: str) -> bytes:
    """The bytes of base64 text."""
    return base64.b64decode(text)


def refuse_foreign_registers(tracee: Tracee) -> None:
    """Raise Unsupported for a 32-bit process."""
    for thread in tracee.threads.values():
        if thread.registers["cs"] != machine.USER_CS_64:
            raise Unsupported(
                f"thread {thread.tid} of pid {tracee.pid} runs 32-bit code",
                remedy="lzy dumps 64-bit x86 processes",
                pid=tracee.pid,
            )


def describe_threads(tracee: Tracee) -> list[dict[str, Any]]:
    """All threads, leader first: registers, FPU state, signals, futexes, scheduling, rights."""
    order = sorted(tracee.threads, key=lambda tid: (tid != tracee.pid, tid))
    inside = _ask_threads(tracee, order)
    return [_describe_thread(tracee, tracee.threads[tid], inside[tid]) for tid in order]


def _ask_threads(tracee: Tracee, order: list[int]) -> dict[int, dict[str, Any]]:
    """Each thread's answers, asked of many threads at once: each has its part of the arena."""
    answers: dict[int, dict[str, Any]] = {}
    slots = 64
    for first in range(0, len(order), slots):
        asked = []
        for slot, tid in enumerate(order[first : first + slots]):
            room = tracee.batch(slot, slots)
            questions = _ask_thread(room.base, room.capacity_bytes)
            batch = questions.batch.again()
            tracee.start(tracee.threads[tid], batch)
            asked.append((tid, batch, questions))
        for tid, batch, questions in asked:
            tracee.finish(tracee.threads[tid], batch)
            mode = layouts.unpack_s32(batch.read(questions.policy, 4))
            stack = batch.read(questions.stack, layouts.STACK_BYTES)
            nodes = batch.read(questions.nodes, layouts.NODEMASK_BITS // 8)
            answers[tid] = {
                "alternate_stack": layouts.unpack_stack(stack),
                "clear_tid_address": layouts.unpack_u64(batch.read(questions.number, 8)),
                "death_signal": layouts.unpack_s32(batch.read(questions.death, 4)),
                "securebits": batch.results[questions.bits],
                "timer_slack_ns": batch.results[questions.slack],
                "memory_policy": [mode, encode(nodes)]
                if batch.results[questions.numa] == 0 and mode
                else None,
            }
    return answers


class _OfThread(NamedTuple):
    """What a thread is asked: addresses of answers, and numbers of results."""

    batch: Batch
    stack: int
    number: int
    death: int
    policy: int
    nodes: int
    bits: int
    slack: int
    numa: int


@lru_cache(maxsize=64)
def _ask_thread(base: int, capacity_bytes: int) -> _OfThread:
    """The questions, not yet put. Of processes that were forked all have them at one address."""
    batch = Batch(base, capacity_bytes)
    stack, number, death = batch.room(layouts.STACK_BYTES), batch.room(8), batch.room(4)
    policy, nodes = batch.room(4), batch.room(layouts.NODEMASK_BITS // 8)
    batch.call(process.SYS_SIGALTSTACK, 0, stack)
    batch.call(SYS_PRCTL, process.PR_GET_TID_ADDRESS, number, tolerate=True)
    batch.call(SYS_PRCTL, process.PR_GET_PDEATHSIG, death)
    bits = batch.call(SYS_PRCTL, process.PR_GET_SECUREBITS)
    slack = batch.call(SYS_PRCTL, process.PR_GET_TIMERSLACK)
    numa = batch.call(
        process.SYS_GET_MEMPOLICY, policy, nodes, layouts.NODEMASK_BITS, 0, 0, tolerate=True
    )
    return _OfThread(batch, stack, number, death, policy, nodes, bits, slack, numa)


def _describe_thread(tracee: Tracee, thread: Thread, inside: dict[str, Any]) -> dict[str, Any]:
    tid = thread.tid
    status = tracee.status(thread)
    rseq = ptrace.rseq_configuration(tid)
    head, head_length = process.robust_list(tid)
    return {
        "tid": proc.innermost(status["NSpid"]),
        "comm": proc.read_bytes(tracee.pid, f"task/{tid}/comm").decode("utf-8", "surrogateescape")[
            :-1
        ],
        "registers": name_restarted_call(tracee, thread.registers),
        "xstate": encode(ptrace.read_register_set(tid, ptrace.NT_X86_XSTATE)),
        "signal_mask": thread.mask,
        "pending": [encode(i) for i in ptrace.pending_signals(tid, shared=False)],
        "robust_list": [head, head_length],
        "rseq": list(rseq) if rseq else None,
        "scheduling": encode(process.scheduling(tid)),
        "nice": os.getpriority(os.PRIO_PROCESS, tid),
        "affinity": sorted(os.sched_getaffinity(tid)),
        "io_priority": process.io_priority(tid),
        "rights": {key: status[key].strip() for key in _STATUS_KEYS},
        "no_new_privileges": int(status["NoNewPrivs"]),
        "filters": describe_filters(tracee, thread),
        **inside,
    }


def name_restarted_call(tracee: Tracee, registers: dict[str, int]) -> dict[str, int]:
    """Registers that name the call a thread waits in by its own number, for its new life.

    After a stop the kernel goes on with a timed call as restart_syscall(2), with what is left of
    the time; that block does not travel. The arguments still stand in the registers, and the number
    in the code before the call, `mov eax, N`. Where it does not, the call will answer EINTR.
    """
    if registers["orig_rax"] != process.SYS_RESTART_SYSCALL:
        return registers
    before = bytearray(5)
    try:
        place = registers["rip"] - machine.SYSCALL_BYTES - len(before)
        memory.read_process(tracee.witness, [(place, len(before))], memoryview(before))
    except OSError:
        return registers
    number = machine.loaded_number(bytes(before))
    return {**registers, "orig_rax": number} if number in process.RESTARTED_CALLS else registers


def describe_process(tracee: Tracee, timers: list[proc.PosixTimer]) -> dict[str, Any]:
    """What the stopped process as a whole can tell: signal actions, timers, switches, family."""
    pid = tracee.pid
    leader, witness = tracee.speaker, tracee.witness
    if any(timer.clock == layouts.CLOCK_OF_CALLER for timer in timers):
        from .cpu_clocks import name_thread_clocks

        timers = name_thread_clocks(tracee, timers)
    room = tracee.batch()
    asked = _ask_process(room.base, room.capacity_bytes, tuple(timer.number for timer in timers))
    batch = asked.batch.again()
    tracee.run(leader, batch)

    status = tracee.status(leader)
    return {
        "signal_actions": {
            str(number): encode(action)
            for number, action in zip(_CHANGEABLE, _cut(batch, asked.actions), strict=True)
            if action != _NO_ACTION
        },
        "interval_timers": [encode(interval) for interval in _cut(batch, asked.intervals)],
        "posix_timers": [
            {
                "number": t.number,
                "signal": t.signal,
                "value": t.value,
                "notify": t.notify,
                "target": tracee.own_numbers(tracee.threads[t.target])[1]
                if t.target in tracee.threads
                else 0,
                "clock": t.clock,
                "setting": encode(setting),
            }
            for t, setting in zip(timers, _cut(batch, asked.posix), strict=True)
        ],
        "pending": [encode(i) for i in ptrace.pending_signals(witness, shared=True)],
        "brk": batch.results[asked.end_of_heap],
        "dumpable": batch.results[asked.dumpable],
        "child_subreaper": layouts.unpack_s32(batch.read(asked.subreaper, 4)),
        "no_huge_pages": max(0, batch.results[asked.no_huge]),
        "deny_write_execute": max(0, batch.results[asked.no_exec_gain]),
        "memory_merge": max(0, batch.results[asked.merge]),
        "tile_permission": layouts.unpack_u64(batch.read(asked.permitted, 8))
        if batch.results[asked.tiles] == 0
        else 0,
        "barriers": max(0, batch.results[asked.barriers]),
        "future_locks": _future_locks(tracee),
        "parent": _innermost_parent(status),
        "group": proc.innermost(status["NSpgid"]),
        "session": proc.innermost(status["NSsid"]),
        "main_thread": describe_ended_leader(pid) if witness != pid else None,
        "stopped": leader.in_group_stop,
        "umask": int(status["Umask"], 8),
        "cwd": os.readlink(f"/proc/{witness}/cwd"),
        "root": os.readlink(f"/proc/{witness}/root"),
    }


class _OfProcess(NamedTuple):
    """What a process is asked: places of answers (address, count), and numbers of results."""

    batch: Batch
    actions: tuple[int, int]
    intervals: tuple[int, int]
    posix: tuple[int, int]
    subreaper: int
    permitted: int
    end_of_heap: int
    dumpable: int
    no_huge: int
    no_exec_gain: int
    merge: int
    tiles: int
    barriers: int


_ANSWER_BYTES = layouts.SIGACTION_BYTES
assert _ANSWER_BYTES == layouts.ITIMERVAL_BYTES
_NO_ACTION = bytes(_ANSWER_BYTES)


@lru_cache(maxsize=8)
def _ask_process(base: int, capacity_bytes: int, timers: tuple[int, ...]) -> _OfProcess:
    """As `_ask_thread`; `timers`: numbers of POSIX timers."""
    batch = Batch(base, capacity_bytes)

    def ask(
        call: int, *arguments: tuple[int, ...], behind: tuple[int, ...] = ()
    ) -> tuple[int, int]:
        """The same call with each of these arguments, and where its answer goes."""
        first = batch.room(_ANSWER_BYTES * len(arguments))
        for at, one in enumerate(arguments):
            batch.call(call, *one, first + _ANSWER_BYTES * at, *behind)
        return first, len(arguments)

    actions = ask(process.SYS_RT_SIGACTION, *[(n, 0) for n in _CHANGEABLE], behind=(8,))
    intervals = ask(process.SYS_GETITIMER, (0,), (1,), (2,))
    posix = ask(process.SYS_TIMER_GETTIME, *[(number,) for number in timers])
    subreaper, permitted = batch.room(4), batch.room(8)
    end_of_heap = batch.call(process.SYS_BRK, 0)
    dumpable = batch.call(SYS_PRCTL, process.PR_GET_DUMPABLE)
    batch.call(SYS_PRCTL, process.PR_GET_CHILD_SUBREAPER, subreaper)
    no_huge = batch.call(SYS_PRCTL, process.PR_GET_THP_DISABLE, tolerate=True)
    no_exec_gain = batch.call(SYS_PRCTL, process.PR_GET_MDWE, tolerate=True)
    merge = batch.call(SYS_PRCTL, process.PR_GET_MEMORY_MERGE, tolerate=True)
    tiles = batch.call(
        process.SYS_ARCH_PRCTL, process.ARCH_GET_XCOMP_PERM, permitted, tolerate=True
    )  # fmt: skip
    barriers = batch.call(
        process.SYS_MEMBARRIER, layouts.MEMBARRIER_GET_REGISTRATIONS, 0, 0, tolerate=True
    )  # fmt: skip
    return _OfProcess(
        batch,
        actions,
        intervals,
        posix,
        subreaper,
        permitted,
        end_of_heap,
        dumpable,
        no_huge,
        no_exec_gain,
        merge,
        tiles,
        barriers,
    )


def _cut(batch: Batch, place: tuple[int, int]) -> list[bytes]:
    """The answers at a place of `_OfProcess`."""
    content = batch.read(place[0], _ANSWER_BYTES * place[1])
    return [content[at : at + _ANSWER_BYTES] for at in range(0, len(content), _ANSWER_BYTES)]


def describe_ended_leader(pid: int) -> dict[str, Any]:
    """What is left of a main thread that has ended while others live."""
    stat, status = proc.stat(pid), proc.status(pid)
    return {
        "comm": stat[1],
        "status": int(stat[_EXIT_CODE]),
        "nice": int(stat[18]),
        "securebits": 0,
        "no_new_privileges": int(status["NoNewPrivs"]),
        "death_signal": 0,
        "rights": {key: status[key].strip() for key in _STATUS_KEYS},
    }


def _future_locks(tracee: Tracee) -> int:
    """MCL_FUTURE and MCL_ONFAULT if mlockall(2) holds for memory mapped from now on, else 0.

    No call tells; but the arena, which was mapped just now, is locked then.
    """
    if b"\nVmLck:\t       0 kB" in proc.read_bytes(tracee.witness, "status"):
        return 0
    for vma in mapping_flags.mappings(tracee.witness):
        if vma.start <= tracee.arena < vma.end and "lo" in vma.flags:
            return memory.MCL_FUTURE | (memory.MCL_ONFAULT if "lf" in vma.flags else 0)
    return 0


def ask_policies(tracee: Tracee, starts: Sequence[int]) -> dict[str, str]:
    """The NUMA policies of the mappings that start there, as /proc/PID/numa_maps words them."""
    batch = tracee.batch()
    asked = []
    for start in starts:
        mode, nodes = batch.room(4), batch.room(layouts.NODEMASK_BITS // 8)
        number = batch.call(
            process.SYS_GET_MEMPOLICY,
            mode,
            nodes,
            layouts.NODEMASK_BITS,
            start,
            process.MPOL_F_ADDR,
            tolerate=True,
        )
        asked.append((start, number, mode, nodes))
    tracee.run(tracee.speaker, batch)
    found: dict[str, str] = {}
    for start, number, mode, nodes in asked:
        if batch.results[number] == 0:
            mask = batch.read(nodes, layouts.NODEMASK_BITS // 8)
            if words := layouts.name_policy(layouts.unpack_s32(batch.read(mode, 4)), mask):
                found[f"{start:x}"] = words
    return found


def describe_inherited(pid: int) -> dict[str, Any]:
    """What a snapshot of the process has as well, so that it need not stay stopped for it."""
    stat = proc.stat(pid)
    fields = (25, 26, 44, 45, 46, 27, 47, 48, 49, 50)
    names = ("start_code", "end_code", "start_data", "end_data", "start_brk", "start_stack",
             "arg_start", "arg_end", "env_start", "env_end")  # fmt: skip
    return {
        "layout": {n: int(stat[f]) for n, f in zip(names, fields, strict=True)},
        "auxv": encode(proc.read_bytes(pid, "auxv")),
        "exe": os.readlink(f"/proc/{pid}/exe"),
        "limits": {str(k): list(v) for k, v in proc.limits(pid).items()},
        "personality": int(proc.read_bytes(pid, "personality"), 16),
        "oom_score_adj": int(proc.read_bytes(pid, "oom_score_adj")),
        "coredump_filter": int(proc.read_bytes(pid, "coredump_filter") or b"0", 16),
        "command_line": [os.fsdecode(a) for a in proc.read_bytes(pid, "cmdline").split(b"\0")[:-1]],
    }


def _innermost_parent(status: dict[str, str]) -> int:
    """The parent's pid as the process sees it: 0 when it lies outside its pid namespace."""
    parent, ours = int(status["PPid"]), len(status["NSpid"].split())
    if ours == 1:  # its namespace is that of our /proc
        return parent
    try:
        numbers = proc.status(parent)["NSpid"].split()
    except LookupError:
        return parent
    except Exception:
        return 0
    return int(numbers[ours - 1]) if len(numbers) >= ours else 0
