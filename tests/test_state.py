"""All that /proc shows of a process is the same after a restore, but for a list with reasons.

The list (`EXPECTED`) is the documentation of what a move cannot keep or must not keep.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import await_end
from test_programs import QUICK

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]
    Facts = dict[str, str]

#: What may differ: a pattern of the fact's name, and why.
EXPECTED = {
    r"(task/\d+/)?status/PPid": "the parent is whoever restored it, or init",
    r"(task/\d+/)?status/Vm(Peak|HWM|RSS|PTE|Swap)": "history and residence, not state",
    r"(task/\d+/)?status/Rss(Anon|File|Shmem)": "which pages are resident is the kernel's business",
    r"(task/\d+/)?status/SigQ": "signals queued to all processes of the user together",
    r"(task/\d+/)?status/FDSize": "how much room the kernel has set aside for descriptors",
    r"(task/\d+/)?status/(non)?voluntary_ctxt_switches": "counts since the (new) process began",
    r"(task/\d+/)?stat/(ppid|minflt|majflt|utime|stime|starttime|rss|processor)": "likewise",
}

#: proc_pid_stat(5), by position after the name; what is not named there is compared by number.
STAT_FIELDS = {
    4: "ppid", 10: "minflt", 11: "cminflt", 12: "majflt", 13: "cmajflt", 14: "utime",
    15: "stime", 22: "starttime", 24: "rss", 39: "processor",
}  # fmt: skip
#: Not compared at all: addresses of the kernel's own, moments, counters.
STAT_IGNORED = {9, 29, 30, 35, 42, 43, 44}

FILES = (
    "environ", "cmdline", "auxv", "limits", "oom_score_adj", "coredump_filter", "personality",
    "timerslack_ns", "timers", "comm", "cgroup", "loginuid", "sessionid", "uid_map", "gid_map",
    "setgroups", "attr/current",
)  # fmt: skip
#: VmFlags: dirt, userfaultfd; and whether the kernel counts a page that nobody can write as
#: committed, which it does once the mapping has been writable.
FLAGS_IGNORED = {"sd", "um", "uw", "ui", "ac"}
LINKS = ("exe", "cwd", "root", "ns/mnt", "ns/net", "ns/uts", "ns/ipc", "ns/user", "ns/cgroup",
         "ns/pid_for_children")  # fmt: skip

#: O_LARGEFILE is nothing to 64-bit programs, and openat(2) alone sets it. O_NOFOLLOW, O_DIRECTORY
#: and O_TMPFILE mattered at the opening only; a file without a name cannot be opened so again.
FLAGS_OF_OPENING = 0o100000 | os.O_NOFOLLOW | os.O_TMPFILE
RESTART_SYSCALL = "219"

libc = ctypes.CDLL(None, use_errno=True)
IOPRIO_GET = 252


def read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("latin-1")


def forget_numbers(text: str) -> str:
    """Inode numbers of things without a name (pipe:[123]) are the kernel's, given anew."""
    return re.sub(r":\[\d+\]", ":[*]", text)


def last_name(path: str) -> str:
    """`gone (deleted)` for whatever is made again in memory: `/tmp/gone…` as `/memfd:gone…`."""
    return re.split("[/:]", path)[-1]


def read_stat(path: str) -> Facts:
    fields = read(path).rpartition(")")[2].split()
    return {
        f"stat/{STAT_FIELDS.get(n, n)}": value
        for n, value in enumerate(fields, 3)
        if n not in STAT_IGNORED
    }


def read_status(path: str) -> Facts:
    lines = (line.partition(":") for line in read(path).splitlines())
    return {f"status/{name}": value.strip() for name, _, value in lines}


def read_scheduling(tid: int) -> Facts:
    return {
        "policy": str(os.sched_getscheduler(tid)),
        "parameter": str(os.sched_getparam(tid).sched_priority),
        "affinity": str(sorted(os.sched_getaffinity(tid))),
        "nice": str(os.getpriority(os.PRIO_PROCESS, tid)),
        "io priority": str(libc.syscall(IOPRIO_GET, 1, tid)),
        "timer slack": read(f"/proc/{tid}/timerslack_ns").strip(),
    }


def read_mappings(pid: int) -> Facts:
    """What smaps says of each mapping; neighbours that differ in nothing count as one.

    The kernel joins such neighbours or not as it likes (proc_pid_smaps(5), mmap(2)).
    """
    mappings: list[list[object]] = []
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", read(f"/proc/{pid}/smaps").strip()):
        head, *lines = block.splitlines()
        span, permissions, offset, device, inode, *name = head.split(None, 5)
        start, end = (int(address, 16) for address in span.split("-"))
        details = dict(line.split(":", 1) for line in lines)
        flags = set(details["VmFlags"].split()) - FLAGS_IGNORED
        path = name[0].strip() if name else ""
        if path.startswith("anon_inode:"):
            inode = "*"
        in_memory = ("/memfd:", "/dev/zero", "/SYSV", "/dev/shm/")
        if path.endswith("(deleted)") or path.startswith(in_memory):
            device, inode = "*", "*"  # Made again: another inode, whatever it is called.
            path = last_name(path)
        what = (permissions, device, inode, path, " ".join(sorted(flags)))
        at = int(offset, 16)
        before = mappings[-1] if mappings else None
        if (
            before is not None
            and before[1] == start
            and before[3] == what
            and (inode == "0" or int(str(before[2])) + start - int(str(before[0])) == at)
        ):
            before[1] = end
        else:
            mappings.append([start, end, at, what])
    return {f"maps/{m[0]:x}-{m[1]:x}": f"{m[2]:x} {m[3]}" for m in mappings}


def read_descriptors(pid: int) -> Facts:
    facts = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        link = forget_numbers(os.readlink(f"/proc/{pid}/fd/{number}"))
        is_deleted = link.endswith(" (deleted)")
        if is_deleted:  # What has no name is made again in memory, under its last name.
            link = last_name(link)
        facts[f"fd/{number}"] = link
        lines = []
        for line in read(f"/proc/{pid}/fdinfo/{number}").splitlines():
            if line.startswith(("ino:", "eventfd-id:", "SqThread", "SqTotal", "SqWork")):
                continue  # numbers of the kernel's own
            if is_deleted and line.startswith("mnt_id:"):
                continue
            line = re.sub(r"\b(ino|sdev):[0-9a-f]+", r"\1:*", line)  # likewise, of what is watched
            if line.startswith("flags:"):
                line = f"flags:\t{int(line.split()[1], 8) & ~FLAGS_OF_OPENING:o}"
            line = re.sub(r"^it_value: .*", "it_value: *", line)  # time passes
            lines.append(re.sub(r"^ticks: .*", "ticks: *", line))
        # What an epoll instance watches comes in the order of the kernel's addresses.
        lines.sort(key=lambda line: line.split()[1] if line.startswith("tfd:") else "")
        facts[f"fdinfo/{number}"] = "\n".join(lines)
    return facts


def read_threads(pid: int) -> Facts:
    facts: Facts = {}
    for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
        base = f"/proc/{pid}/task/{tid}"
        if read(f"{base}/comm").startswith("iou-"):
            continue  # The kernel's own, for an io_uring.
        thread = read_status(f"{base}/status") | read_stat(f"{base}/stat")
        thread |= read_scheduling(tid) | {"comm": read(f"{base}/comm")}
        number, *arguments = read(f"{base}/syscall").split()
        # Where it waits: the call, its arguments, its stack and instruction pointers. A relative
        # wait that was begun again is another call (restart_syscall(2)) until it is over.
        thread["system call"] = " ".join([number, *arguments])
        if thread["stat/3"] == "Z":  # a main thread that has ended blocks whatever it likes
            del thread["status/SigBlk"], thread["stat/32"]
        facts |= {f"task/{tid}/{name}": value for name, value in thread.items()}
    return facts


def find_living(pid: int) -> int:
    """A thread that has not ended, in whose folder of /proc is all that threads share."""
    tids = sorted(map(int, os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))
    return next(tid for tid in tids if read_stat(f"/proc/{pid}/task/{tid}/stat")["stat/3"] != "Z")


def read_everything(pid: int) -> Facts:
    """All facts about a process that waits, by name."""
    living = find_living(pid)
    base = f"/proc/{living}"
    facts = read_status(f"{base}/status") | read_stat(f"{base}/stat")
    for name in FILES:
        with contextlib.suppress(OSError):  # Not every kernel has every file.
            facts[name] = read(f"{base}/{name}")
    for name in LINKS:
        facts[name] = os.readlink(f"{base}/{name}")
    # Timers of the thread that made them come back on the clock that names it, pthread(7).
    facts["timers"] = re.sub(r"ClockID: -\d+", "ClockID: *", read(f"/proc/{pid}/timers"))
    facts["autogroup"] = read(f"{base}/autogroup").split()[-1]  # Its number is the kernel's.
    facts["session"] = f"{os.getsid(pid)} {os.getpgid(pid)}"
    return facts | read_mappings(living) | read_descriptors(living) | read_threads(pid)


def find_differences(before: Facts, after: Facts) -> list[str]:
    def is_same(name: str) -> bool:
        old, new = before.get(name), after.get(name)
        if name.endswith("/system call") and old and new and new.startswith(RESTART_SYSCALL + " "):
            return old.split()[1:] == new.split()[1:]  # The same call, begun again by the kernel.
        return old == new

    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted({*before, *after})
        if not is_same(name) and not any(re.fullmatch(pattern, name) for pattern in EXPECTED)
    ]


CASES = [
    ("attributes", ("root",)),
    ("attributes", ("nobody",)),
    ("mappings", ()),
    ("mapped_files", ("{folder}",)),
    ("deleted_files", ("{folder}",)),
    ("descriptors", ("{folder}",)),
    ("filters", ()),
    ("filters", ("strict",)),
    ("locks", ()),
    ("stacks", ()),
]
#: Programs that never rest, so that no two looks at them say the same, with or without a move.
RESTLESS = {
    "asyncio_streams", "churn", "clocks", "hundred_threads", "interpreter", "memory_pattern",
    "numpy_threads", "signals",
}  # fmt: skip
OTHERS = [
    (case.name, case.arguments)
    for case in QUICK
    if (case.name, case.arguments) not in CASES and case.name not in RESTLESS
]
COMPARED = [
    *((*case, way) for case in CASES for way in (("--eager",), ())),
    *((*case, ("--eager",)) for case in OTHERS),
]


def identify(case: object) -> str:
    return case if isinstance(case, str) else "-".join(w for w in case if "{" not in w)  # type: ignore[attr-defined]  # a pair


@pytest.mark.parametrize(("name", "arguments", "way"), COMPARED, ids=identify)
def test_restored_process_looks_the_same(
    start: Start, lzy: CommandLine, name: str, arguments: tuple[str, ...], way: tuple[str, ...]
) -> None:
    """/proc tells no difference between the process before the dump and after the restore."""
    program = start(name, *arguments).await_ready()
    assert program.ask("ping") == "pong"
    await_rest(program)
    before = read_everything(program.pid)
    lzy.dump(program)
    report = lzy.restore(program, "image", *way)
    if report["pager_pid"]:
        await_end(report["pager_pid"])  # Until then there is a userfaultfd in the process.
    await_rest(program)
    differences = find_differences(before, read_everything(program.pid))
    assert not differences, "\n".join(differences)
    program.prove()


def test_process_group_and_session_of_others(start: Start, lzy: CommandLine) -> None:
    """A member of somebody's session and group is one again when it is restored among them."""
    program = start("interpreter", start_new_session=False).await_ready()
    before = os.getsid(program.pid), os.getpgid(program.pid)
    assert before == (os.getsid(0), os.getpgid(0))
    lzy.dump(program)
    lzy.restore(program)
    assert (os.getsid(program.pid), os.getpgid(program.pid)) == before
    program.prove()


def test_checkpointed_process_looks_the_same(start: Start, lzy: CommandLine) -> None:
    """Nor does a process that was left running show that it was dumped, without an account."""
    program = start("attributes", "nobody").await_ready()
    assert program.ask("ping") == "pong"
    await_rest(program)
    before = read_everything(program.pid)
    lzy.dump(program, "image", "--leave-running", "--no-track")
    await_rest(program)
    differences = find_differences(before, read_everything(program.pid))
    assert not differences, "\n".join(differences)


def test_comparison_can_fail(start: Start) -> None:
    """The comparison sees a change of one byte's worth: the umask."""
    program = start("attributes", "root").await_ready()
    assert program.ask("ping") == "pong"
    await_rest(program)
    before = read_everything(program.pid)
    assert find_differences(before, before | {"status/Umask": "0"})
    assert program.ask("spoil") == "spoiled"
    await_rest(program)
    assert any("Umask" in line for line in find_differences(before, read_everything(program.pid)))


def await_rest(program: Program) -> None:
    """Wait until every thread waits in the kernel, as programs do that have been answered."""
    for task in Path(f"/proc/{program.pid}/task").iterdir():
        while (task / "syscall").read_text().startswith("running"):
            os.sched_yield()
