"""lzy is killed at every stage of its work on a tree, and trees do not stand still: nobody is hurt.

Either every process of the tree runs on, or all are whole in the image; none is left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family import is_zombie
from living import PATIENCE_S, await_end, list_children, reap

from lzy.checkpoint.stages import STAGES

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

DUMP_STAGES = [stage for stage in STAGES if stage.startswith("dump.")]
RESTORE_STAGES = [stage for stage in STAGES if stage.startswith("restore.")]
OF_CHECKPOINTS = ("dump.ahead", "dump.tracked", "dump.split", "dump.resumed")
KILLED = -signal.SIGKILL

slow = pytest.mark.slow


def pids_of(program: Program) -> list[int]:
    return sorted([program.pid, *list_children(program.pid)])


def find_living(program: Program) -> list[int]:
    living = []
    for pid in pids_of(program):
        with contextlib.suppress(OSError):  # it has gone just now
            if not is_zombie(pid):
                living.append(pid)
    return living


def is_free(status: str) -> bool:
    """Whether a process of that /proc status is neither traced nor stopped."""
    running = re.search(r"^State:\t[SRD] ", status, re.MULTILINE)
    return "TracerPid:\t0\n" in status and running is not None


def prove_untouched(program: Program, pids: list[int]) -> None:
    """The same processes, neither traced nor stopped; they prove their state.

    A snapshot, which the kernel has killed with lzy, takes a moment to end; a pager that is done
    traces its process for a moment, to close what it had there.
    """
    deadline = time.monotonic() + PATIENCE_S
    while (living := find_living(program)) != pids:
        assert time.monotonic() < deadline, f"{living}, not {pids}"
        os.sched_yield()
    for pid in living:
        while not is_free(status := Path(f"/proc/{pid}/status").read_text()):
            assert time.monotonic() < deadline, status
            os.sched_yield()
    program.prove()


def dump_killed_at(lzy: CommandLine, program: Program, stage: str, *options: str) -> int:
    where = ("--store", str(lzy.store), "--name", "image")
    return lzy.run("dump", str(program.pid), *where, *options, kill_at=stage).returncode


def names_of_images(lzy: CommandLine) -> list[str]:
    if not lzy.store.exists():
        return []
    return [image["name"] for image in lzy.succeed("images", "--store", str(lzy.store))["images"]]


def await_all_gone(pids: list[int]) -> None:
    """Wait until half-made processes, which die with their maker, are gone and waited for."""
    deadline = time.monotonic() + PATIENCE_S
    for pid in pids:
        await_end(pid)
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        for pid in left:
            reap(pid)
        assert time.monotonic() < deadline, f"processes {left} stay"
        os.sched_yield()


@pytest.mark.parametrize("stage", DUMP_STAGES)
def test_dump_of_a_tree_killed_at_each_stage(start: Start, lzy: CommandLine, stage: str) -> None:
    """Until the image is committed all processes run on; afterwards all may have ended."""
    program = start("tree_pipes").await_ready()
    pids = pids_of(program)
    options = ["--leave-running"] if stage in OF_CHECKPOINTS else []
    assert dump_killed_at(lzy, program, stage, *options) == KILLED
    if stage == "dump.ended":
        program.await_end()
        await_all_gone(pids)
        assert names_of_images(lzy) == ["image"]
        lzy.restore(program, "image")
    else:
        lzy.dump(program, "next")
        await_all_gone(pids)
        lzy.restore(program, "next")
    prove_untouched(program, pids)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=[] if stage in ("dump.writing", "dump.committed") else [slow])
        for stage in DUMP_STAGES
        if stage != "dump.ended"
    ],
)
def test_checkpoint_of_a_tree_killed_at_each_stage(
    start: Start, lzy: CommandLine, stage: str
) -> None:
    """With --leave-running they run on, whenever lzy dies; the next checkpoint finds no trace."""
    program = start("tree_pipes").await_ready()
    pids = pids_of(program)
    assert dump_killed_at(lzy, program, stage, "--leave-running") == KILLED
    prove_untouched(program, pids)
    lzy.dump(program, "next", "--leave-running")
    assert not set(pids_of(program)) - set(pids)  # nor a zombie of a snapshot
    program.prove()


@pytest.mark.parametrize("stage", RESTORE_STAGES)
def test_restore_of_a_tree_killed_at_each_stage(start: Start, lzy: CommandLine, stage: str) -> None:
    """No process of the tree stays, and the next restore makes them all.

    After the last stage all live, and are whole.
    """
    program = start("tree_pipes").await_ready()
    pids = pids_of(program)
    lzy.dump(program)
    done = lzy.run("restore", "image", "--store", str(lzy.store), kill_at=stage)
    assert done.returncode == KILLED
    if stage == "restore.committed":
        program.adopt(pids[0])
        prove_untouched(program, pids)
        return
    await_all_gone(pids)
    lzy.restore(program, "image")
    prove_untouched(program, pids)


@pytest.mark.parametrize("namespace", ["host", "new"])
def test_restore_of_a_tree_gives_up_cleanly(start: Start, lzy: CommandLine, namespace: str) -> None:
    """What turns out late to be impossible leaves no process, and no waiting for one."""
    program = start("tree_locks", "{folder}").await_ready()
    pids = pids_of(program)
    lzy.dump(program)
    with open(program.folder / "locked.flock", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        where = ("--store", str(lzy.store), "--pid-namespace", namespace)
        error = lzy.fail("restore", "image", *where)
    assert "lock" in error["message"]
    await_all_gone(pids)
    lzy.restore(program, "image", "--pid-namespace", namespace)
    program.prove()


def test_fork_storm_is_dumped_again_and_again(start: Start, lzy: CommandLine) -> None:
    """A tree that forks all the time is dumped ten times in a row; nobody misses a child."""
    program = start("tree_storm").await_ready()
    for number in range(10):
        lzy.dump(program, f"image{number}", "--leave-running")
        if number % 3 == 0:
            program.prove()
    program.prove()
    program.end()
    lzy.restore(program, "image9")
    program.prove()


def count_belongings(program: Program) -> dict[str, int]:
    """What could leak: processes, descriptors and mappings of all of them together."""
    pids = pids_of(program)
    maps = [Path(f"/proc/{pid}/maps").read_text().count("\n") for pid in pids]
    fds = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
    return {"processes": len(pids), "descriptors": sum(fds), "mappings": sum(maps)}


@pytest.mark.parametrize(
    "times", [4, pytest.param(20, marks=slow)], ids=lambda times: f"{times}-times"
)
def test_tree_comes_and_goes_without_leak(start: Start, lzy: CommandLine, times: int) -> None:
    """A living tree is dumped and restored again and again, with no more of anything in the end."""
    program = start("tree_lineage").await_ready()
    counts = []
    for number in range(times):
        lzy.dump(program, f"image{number}")
        lzy.restore(program, f"image{number}", *(["--eager"] if number % 2 else []))
        lzy.await_pagers()  # each process has one
        counts.append(count_belongings(program))
    assert counts[-1] == counts[-3], counts  # of the same way
    assert counts[-1]["processes"] == counts[0]["processes"]
    assert counts[-1]["descriptors"] == counts[0]["descriptors"]
    program.prove()
