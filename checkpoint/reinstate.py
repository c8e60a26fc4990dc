"""Threads, signals, timers, rights and limits of a process, made again from what `interrogate` saw.

Every function adds system calls to a batch that the process itself then makes.
"""

from __future__ import annotations

import os
from typing import Any

from .batch import Batch
from .interrogate import decode
from .linux import layouts, process
from .linux.process import SYS_PRCTL

SIGEV_NOTIFY = {
    "signal": layouts.SIGEV_SIGNAL,
    "none": layouts.SIGEV_NONE,
    "thread": layouts.SIGEV_THREAD,
}


def add_addresses(batch: Batch, own: dict[str, Any], exe: int) -> None:
    """The process's addresses as /proc shows them, its auxiliary vector and its executable.

    `exe` is a descriptor in the process. Nothing may map the former executable any more.
    """
    auxv = decode(own["auxv"])
    content = layouts.pack_mm_map(_addresses(own), batch.put(auxv), len(auxv), exe)
    batch.call(
        SYS_PRCTL,
        process.PR_SET_MM,
        process.PR_SET_MM_MAP,
        batch.put(content),
        len(content),
        0,
        what="set addresses, auxv and exe",
    )


def add_no_words(batch: Batch, own: dict[str, Any]) -> None:
    """No command line and no environment, until `add_addresses`.

    Where those of the stub were there is nothing any more, or a stack that grows is to be above:
    the kernel would have it grow to there for whoever reads /proc/PID/cmdline meanwhile.
    """
    *addresses, arguments, _, environment, _ = _addresses(own)
    addresses += [arguments, arguments, environment, environment]
    content = layouts.pack_mm_map(addresses, 0, 0, layouts.NO_EXECUTABLE)
    place = batch.put(content)
    batch.call(
        SYS_PRCTL, process.PR_SET_MM, process.PR_SET_MM_MAP, place, len(content), 0, tolerate=True
    )


def _addresses(own: dict[str, Any]) -> list[int]:
    """As `layouts.pack_mm_map` takes them."""
    layout = own["layout"]
    heap_end = max(own["brk"], layout["start_brk"])
    names = ("start_code", "end_code", "start_data", "end_data", "start_brk")
    rest = ("start_stack", "arg_start", "arg_end", "env_start", "env_end")
    return [*(layout[n] for n in names), heap_end, *(layout[n] for n in rest)]


def add_process(batch: Batch, own: dict[str, Any]) -> None:
    """Signal actions, personality, umask and the other switches of a process."""
    for number in process.SIGNALS:
        if number in (9, 19):
            continue
        text = own["signal_actions"].get(str(number))
        action = batch.put(decode(text) if text else bytes(layouts.SIGACTION_BYTES))
        batch.call(process.SYS_RT_SIGACTION, number, action, 0, 8)
    batch.call(process.SYS_PERSONALITY, own["personality"])
    batch.call(process.SYS_UMASK, own["umask"])
    if own["child_subreaper"]:
        batch.call(SYS_PRCTL, process.PR_SET_CHILD_SUBREAPER, 1)
    if own["memory_merge"]:
        batch.call(SYS_PRCTL, process.PR_SET_MEMORY_MERGE, 1, tolerate=True)
    if own.get("future_locks"):
        batch.call(process.SYS_MLOCKALL, own["future_locks"], what="lock memory to come")
    tiles = layouts.XFEATURE_XTILE_DATA
    if own["tile_permission"] >> tiles & 1:
        batch.call(process.SYS_ARCH_PRCTL, process.ARCH_REQ_XCOMP_PERM, tiles, what="AMX tiles")
    for command in layouts.MEMBARRIER_REGISTRATIONS:
        if own["barriers"] & command:
            batch.call(process.SYS_MEMBARRIER, command, 0, 0, tolerate=True)


def add_thread(batch: Batch, thread: dict[str, Any]) -> None:
    """What one thread has for itself: futex lists, rseq, alternate stack, name, pending signals."""
    batch.call(process.SYS_SET_TID_ADDRESS, thread["clear_tid_address"])
    head, length = thread["robust_list"]
    if length:
        batch.call(process.SYS_SET_ROBUST_LIST, head, length)
    pointer, flags, size = thread["alternate_stack"]
    batch.call(
        process.SYS_SIGALTSTACK,
        batch.put(layouts.pack_stack(pointer, flags, size)),
        0,
    )
    if thread["rseq"]:
        area, size, signature = thread["rseq"]
        batch.call(process.SYS_RSEQ, area, size, 0, signature, what="rseq")
    name = os.fsencode(thread["comm"])[:15].ljust(16, b"\0")
    batch.call(SYS_PRCTL, process.PR_SET_NAME, batch.put(name))
    batch.call(SYS_PRCTL, process.PR_SET_TIMERSLACK, thread["timer_slack_ns"])
    if thread["memory_policy"]:
        mode, nodes = thread["memory_policy"]
        batch.call(
            process.SYS_SET_MEMPOLICY,
            mode,
            batch.put(decode(nodes)),
            layouts.NODEMASK_BITS,
            tolerate=True,
        )


def add_pending(batch: Batch, tgid: int, tid: int, thread: dict[str, Any]) -> None:
    """Queue the thread's pending signals again; a task may send itself any siginfo."""
    for text in thread["pending"]:
        info = decode(text)
        number = layouts.signal_of(info)
        batch.call(process.SYS_RT_TGSIGQUEUEINFO, tgid, tid, number, batch.put(info))


def add_shared_pending(batch: Batch, tgid: int, own: dict[str, Any]) -> None:
    """Queue the process's pending signals again."""
    for text in own["pending"]:
        info = decode(text)
        number = layouts.signal_of(info)
        batch.call(process.SYS_RT_SIGQUEUEINFO, tgid, number, batch.put(info))


def add_posix_timers(batch: Batch, own: dict[str, Any], *, numbered: bool) -> list[tuple[int, int]]:
    """Create the POSIX timers under their old numbers; (number, address of the one given) of each.

    `numbered`: the kernel takes numbers from us (PR_TIMER_CREATE_RESTORE_IDS, Linux 6.16). Before,
    it counts up from 0 in a new process, so that timers nobody wants fill the gaps for a moment.
    """
    timers = sorted(own["posix_timers"], key=lambda timer: int(timer["number"]))
    given: list[tuple[int, int]] = []
    fillers: list[int] = []
    if timers and numbered:
        batch.call(SYS_PRCTL, process.PR_TIMER_CREATE_RESTORE_IDS, 1)
    for timer in timers:
        while not numbered and len(given) + len(fillers) < timer["number"]:
            fillers.append(len(given) + len(fillers))
            event = batch.put(layouts.pack_sigevent(0, 0, layouts.SIGEV_NONE, 0))
            batch.call(process.SYS_TIMER_CREATE, 1, event, batch.room(4))
        kind, _, how = timer["notify"].partition("/")
        notify = SIGEV_NOTIFY.get(kind, 0)
        if how.startswith("tid"):
            notify = layouts.SIGEV_THREAD_ID
        event = batch.put(
            layouts.pack_sigevent(timer["value"], timer["signal"], notify, timer["target"])
        )
        number = batch.put(layouts.pack_s32(timer["number"]))
        batch.call(
            process.SYS_TIMER_CREATE, timer["clock"], event, number,
            what=f"POSIX timer {timer['number']}",
        )  # fmt: skip
        given.append((timer["number"], number))
    for number in fillers:
        batch.call(process.SYS_TIMER_DELETE, number)
    if timers and numbered:
        batch.call(SYS_PRCTL, process.PR_TIMER_CREATE_RESTORE_IDS, 0)
    return given


def add_timer_settings(batch: Batch, own: dict[str, Any]) -> None:
    """Arm the interval timers and the POSIX timers with the time they had left."""
    for which, text in enumerate(own["interval_timers"]):
        if any(setting := decode(text)):
            if not any(setting[16:]):
                # An interval without time left: its signal is pending, and with that the kernel
                # has not wound the timer up again yet (kernel/time/itimer.c).
                setting = setting[:16] * 2
            batch.call(process.SYS_SETITIMER, which, batch.put(setting), 0)
    for timer in own["posix_timers"]:
        if any(setting := decode(timer["setting"])):
            batch.call(process.SYS_TIMER_SETTIME, timer["number"], 0, batch.put(setting), 0)


def add_memory_policy(batch: Batch, start: int, length_bytes: int, policy: str) -> None:
    """The NUMA policy of a range, as /proc/PID/numa_maps words it: bind=static:0-1; mbind(2)."""
    kind, _, nodes = policy.partition(":")
    name, _, flag = kind.partition("=")
    if name not in layouts.MPOL_NAMES:
        return
    mask = 0
    for part in filter(None, nodes.split(",")):
        first, _, last = part.partition("-")
        for node in range(int(first), int(last or first) + 1):
            mask |= 1 << node
    batch.call(
        process.SYS_MBIND,
        start,
        length_bytes,
        layouts.MPOL_NAMES[name] | layouts.MPOL_FLAGS.get(flag, 0),
        batch.put(layouts.pack_nodemask(mask)) if mask else 0,
        layouts.NODEMASK_BITS if mask else 0,
        0,
        tolerate=True,  # a machine with fewer nodes places memory as it can
    )


def add_limits(batch: Batch, own: dict[str, Any]) -> None:
    """Resource limits. Raising a hard limit needs CAP_SYS_RESOURCE; without it, it is tolerated."""
    for resource, (soft, hard) in own["limits"].items():
        batch.call(
            process.SYS_SETRLIMIT,
            int(resource),
            batch.put(layouts.pack_limit(soft, hard)),
            tolerate=True,
        )


def add_rights(batch: Batch, thread: dict[str, Any], present: dict[str, str]) -> None:
    """Users, groups, capabilities and securebits of one thread, if they differ from `present`.

    `present` is the new thread's /proc status. With SECBIT_NO_SETUID_FIXUP the users can change
    first and the capabilities be given up afterwards; capabilities(7).
    """
    rights = thread["rights"]
    if any(rights[key].split() != present[key].split() for key in rights) or thread["securebits"]:
        batch.call(
            SYS_PRCTL, process.PR_SET_SECUREBITS, layouts.SECBIT_NO_SETUID_FIXUP, what="securebits"
        )
        bounding = int(rights["CapBnd"], 16)
        for capability in range(64):
            if int(present["CapBnd"], 16) & ~bounding & 1 << capability:
                batch.call(SYS_PRCTL, process.PR_CAPBSET_DROP, capability)
        groups = [int(g) for g in rights["Groups"].split()]
        if groups != [int(g) for g in present["Groups"].split()]:  # it may be forbidden
            batch.call(
                process.SYS_SETGROUPS,
                len(groups),
                batch.put(layouts.pack_groups(groups)) if groups else 0,
                what="groups",
            )
        real, effective, saved, fs = (int(x) for x in rights["Gid"].split())
        batch.call(process.SYS_SETRESGID, real, effective, saved, what="group ids")
        batch.call(process.SYS_SETFSGID, fs)
        real, effective, saved, fs = (int(x) for x in rights["Uid"].split())
        batch.call(process.SYS_SETRESUID, real, effective, saved, what="user ids")
        batch.call(process.SYS_SETFSUID, fs)
        batch.call(SYS_PRCTL, process.PR_SET_SECUREBITS, thread["securebits"])
        sets = [int(rights[k], 16) for k in ("CapEff", "CapPrm", "CapInh")]
        batch.call(
            process.SYS_CAPSET,
            batch.put(layouts.pack_capability_header()),
            batch.put(layouts.pack_capabilities(*sets)),
            what="capabilities",
        )
        for capability in range(64):
            if int(rights["CapAmb"], 16) >> capability & 1:
                batch.call(
                    SYS_PRCTL, process.PR_CAP_AMBIENT, process.PR_CAP_AMBIENT_RAISE, capability
                )
    if thread["no_new_privileges"]:
        batch.call(SYS_PRCTL, process.PR_SET_NO_NEW_PRIVS, 1)
    if thread["death_signal"]:
        batch.call(SYS_PRCTL, process.PR_SET_PDEATHSIG, thread["death_signal"])
