"""All that /proc and kcmp(2) show of a tree of processes: of each, and what they have in common."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from living import list_children
from test_state import find_differences, forget_numbers, read_everything

Facts = dict[str, str]

KCMP, KCMP_FILE = 312, 0

#: Which differences may be, as `find_family_differences` words them, and why.
EXPECTED = {
    r"stat/(cminflt|cmajflt|16|17): ": "of children waited for: counts since the new process began",
    r"fdinfo/\d+: [^>]*lock:[^>]*FLOCK[^>]*-> ": "a lock of all who have the description is shown "
    "with the pid of who took it, which is lzy now; `tree_locks` proves that it holds",
    r"system call: '1 .*' -> '1 ": "write(2) told that it had written a part when it was stopped, "
    "as at any signal; the rest is another call",
    r"maps/.*'sem\.\w+ \(deleted\)'.*-> .*'sem\.": "sem_open(3) makes a semaphore under a "
    "passing name; it is mapped under that by which others have found it",
}

libc = ctypes.CDLL(None, use_errno=True)


def compare_descriptions(one: tuple[int, int], other: tuple[int, int]) -> int:
    """0 if two descriptors, each (pid, number), are of one description; else an order."""
    answer = libc.syscall(KCMP, one[0], other[0], KCMP_FILE, one[1], other[1])
    assert answer >= 0, os.strerror(ctypes.get_errno())
    return (0, -1, 1, 1)[answer]


def read_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, the state being the first."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_zombie(pid: int) -> bool:
    return read_stat(pid)[0] == "Z"


def read_sharing(pids: list[int]) -> Facts:
    """Each descriptor of each process to the first that is of the same description."""
    alike: dict[str, list[tuple[int, int]]] = {}
    for pid in pids:
        for number in map(int, os.listdir(f"/proc/{pid}/fd")):
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            alike.setdefault(link, []).append((pid, number))
    facts: Facts = {}
    for places in alike.values():
        first = places[0]
        for place in sorted(places, key=functools.cmp_to_key(compare_descriptions)):
            if compare_descriptions(first, place):
                first = place
            group = [p for p in places if not compare_descriptions(first, p)]
            facts[f"shares/{place[0]}/{place[1]}"] = str(min(group))
    return facts


def read_pipes(pids: list[int]) -> Facts:
    """Each descriptor to the first that has the same nameless thing open, say the same pipe."""
    first: dict[str, str] = {}
    facts: Facts = {}
    for pid in pids:
        for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            if forget_numbers(link) != link:
                facts[f"same/{pid}/{number}"] = first.setdefault(link, f"{pid}/{number}")
    return facts


def await_rest(root: int) -> None:
    """Wait until every thread of every process of the tree waits in the kernel."""
    for pid in [root, *list_children(root)]:
        for task in Path(f"/proc/{pid}/task").iterdir():
            while (task / "syscall").read_text().startswith("running"):
                os.sched_yield()


def read_family(root: int) -> dict[str, Facts]:
    """Facts by process; those of all together are of the process called `family`."""
    pids = sorted([root, *list_children(root)])
    living = [pid for pid in pids if not is_zombie(pid)]
    # state, parent, group, session; how it tells its parent of its end, and what
    ended = {pid: str([read_stat(pid)[n] for n in (0, 1, 2, 3, 35, 49)]) for pid in pids}
    together = {
        "pids": str(pids),
        "zombies": str({pid: ended[pid] for pid in pids if pid not in living}),
        "parents": str({pid: read_stat(pid)[1] for pid in pids if pid != root}),
    }
    together |= read_sharing(living) | read_pipes(living)
    return {"family": together} | {str(pid): read_everything(pid) for pid in living}


def find_family_differences(before: dict[str, Facts], after: dict[str, Facts]) -> list[str]:
    """As `test_state.find_differences`, of each process, but for what is `EXPECTED`."""
    found = []
    for name in sorted({*before, *after}):
        differences = find_differences(before.get(name, {}), after.get(name, {}))
        found += [f"{name}: {difference}" for difference in differences]
    return [line for line in found if not any(re.search(pattern, line) for pattern in EXPECTED)]
