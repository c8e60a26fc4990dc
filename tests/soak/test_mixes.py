"""Everything at once, and much of it fifty times: what a tree must survive in the hardest hours.

The first program works with all it has, in a control group that has hardly more memory than it
needs; the second is dumped and restored so often that whatever leaks would show.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from living import PATIENCE_S, CommandLine, list_children
from memory_group import MEBIBYTE, MemoryGroup

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

COUNTED = ("processes", "descriptors", "mappings", "threads", "namespaces")
ROUNDS = int(os.environ.get("LZY_SOAK_ROUNDS", "50"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.mark.parametrize("way", [("--eager",), ()], ids=["eager", "lazy"])
def test_everything_at_once_in_little_memory(
    group: MemoryGroup, start: Start, lzy: CommandLine, way: tuple[str, ...]
) -> None:
    """Workers of two kinds and threads go on, round after round, all in the midst of their work.

    There is so little memory that the kernel has to take pages of files away all the time.
    """
    program_path = Path(__file__).parent.parent / "programs" / "tree_mix.py"
    command = group.inside([sys.executable, str(program_path), "192", "2"])
    program = start(command=command).await_ready()
    inside = CommandLine(lzy.home)
    inside.executable = group.inside(lzy.executable)
    group.limit(group.needed_bytes + 48 * MEBIBYTE)
    program.prove()
    for round_ in range(3):
        lzy.dump(program, f"round-{round_}")
        group.limit(group.needed_bytes + 1024 * MEBIBYTE)
        inside.restore(program, f"round-{round_}", *way)
        program.prove(4 * PATIENCE_S)
        lzy.await_pagers()
        group.limit(group.needed_bytes + 48 * MEBIBYTE)
        program.prove(4 * PATIENCE_S)
    assert group.was_short


def count(pids: list[int]) -> dict[str, int]:
    """What a tree has that could become more: descriptors, mappings, threads, namespaces, KiB."""
    found = dict.fromkeys(("processes", "descriptors", "mappings", "threads", "resident_kib"), 0)
    spaces = set()
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        found["processes"] += 1
        found["descriptors"] += len(os.listdir(folder / "fd"))
        found["mappings"] += len((folder / "maps").read_text().splitlines())
        found["threads"] += len(os.listdir(folder / "task"))
        status = (folder / "status").read_text()
        found["resident_kib"] += int(status.partition("VmRSS:")[2].split()[0])
        spaces |= {os.readlink(space) for space in (folder / "ns").iterdir()}
    return {**found, "namespaces": len(spaces)}


def count_here(home: Path) -> dict[str, int]:
    """What lzy could leave on the machine: mounts, shared memory, files of its runs."""
    run = home / "run"
    return {
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "runs": len(list(run.iterdir())) if run.exists() else 0,
        "segments": len(Path("/proc/sysvipc/shm").read_text().splitlines()),
        "names": len(os.listdir("/dev/shm")),
    }


@pytest.mark.parametrize("way", [("--eager",), ()], ids=["eager", "lazy"])
@pytest.mark.parametrize("words", [("tree_heap", "16"), ("tree_mix", "16", "1")], ids=" ".join)
def test_fifty_lives(
    start: Start, lzy: CommandLine, words: tuple[str, ...], way: tuple[str, ...]
) -> None:
    """Dumped and restored over and over, a tree has in the end what it had.

    So has the machine.
    """
    program = start(*words).await_ready()
    counts: list[dict[str, int]] = []
    around: list[dict[str, int]] = []
    for round_ in range(ROUNDS):
        lzy.dump(program, f"round-{round_}")
        lzy.restore(program, f"round-{round_}", *way)
        lzy.await_pagers()
        program.prove()
        counts.append(count([program.pid, *list_children(program.pid)]))
        around.append(count_here(lzy.home))
        if round_:
            lzy.succeed("rm", f"round-{round_ - 1}", "--store", str(lzy.store))
    for what in COUNTED:
        values = [found[what] for found in counts]
        if words[0] == "tree_mix" and what in ("descriptors", "mappings"):
            # It is at work: from moment to moment it has one more or less.
            few = max(5, len(values) // 5)
            assert statistics.median(values[-few:]) <= max(values[:few]), (what, values)
        else:
            assert max(values[-5:]) <= max(values[:5]), (what, values)
    resident = [found["resident_kib"] for found in counts]
    assert max(resident[-5:]) <= max(resident[:5]) * 1.1, resident
    # A program at work has a name more for a moment; what lzy has left would be there always.
    names = [found.pop("names") for found in around]
    assert min(names[-5:]) <= max(names[:5]), names
    assert around[-1] == around[0], (around[0], around[-1])
