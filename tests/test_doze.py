"""Processes doze: their memory goes, they stay, and every byte comes back as it is touched.

`memory_pattern` compares its memory byte for byte, moves, drops and forks parts of it, and a thread
of it writes all the while, also while its memory is taken away.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import PATIENCE_S, Holds, kill_lzy, wait_readable

from lzy.checkpoint.journal import read_status
from lzy.checkpoint.stages import STAGES

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

DOZE_STAGES = [stage for stage in STAGES if stage.startswith("doze.")]
MIB = 1 << 20


def resident_bytes(program: Program) -> int:
    """Anonymous memory of the program that is in RAM."""
    for line in Path(f"/proc/{program.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def await_whole(lzy: CommandLine, program: Program) -> None:
    """Wait until no pager serves the program any more, and see that nothing is left of it."""
    deadline = time.monotonic() + PATIENCE_S
    while (lzy.home / "run" / f"{program.pid}.pager").exists() or "userfaultfd" in " ".join(
        os.readlink(entry.path) if entry.is_symlink() else ""
        for entry in os.scandir(f"/proc/{program.pid}/fd")
        if not is_account(program.pid, entry.name)
    ):
        assert time.monotonic() < deadline, lzy.run("pager", "--status").stdout.decode()
        time.sleep(0.01)


def is_account(pid: int, number: str) -> bool:
    """Whether that descriptor is the one by which writes are accounted for, which stays."""
    from lzy.checkpoint.linux.uffd import keeps_account

    with contextlib.suppress(FileNotFoundError):
        return keeps_account(Path(f"/proc/{pid}/fdinfo/{number}").read_text())
    return True


def doze(lzy: CommandLine, program: Program, *options: str) -> dict[str, object]:
    return lzy.succeed("doze", str(program.pid), "--store", str(lzy.store), *options)


def test_memory_goes_and_comes_back(
    start: Start, lzy: CommandLine, nothing_left_behind: None
) -> None:
    """Most of the memory goes; the process is the same; the proof brings back what it touches."""
    program = start("memory_pattern", "32").await_ready()
    before = resident_bytes(program)
    report = doze(lzy, program, "--name", "session")
    assert report["image"] == "session"
    assert report["dropped_bytes"] > before / 2
    assert resident_bytes(program) < before / 2
    assert program.is_alive
    assert program.ask("ping") == "pong"
    program.prove()
    program.prove()
    lzy.succeed("rouse", "session", "--store", str(lzy.store))
    assert resident_bytes(program) > before * 0.85  # pages of zeros need not come back
    await_whole(lzy, program)
    program.prove()


def test_what_is_not_touched_stays_away(
    start: Start, lzy: CommandLine, nothing_left_behind: None
) -> None:
    """Nothing is brought in behind the process's back: seconds later the memory is still away."""
    program = start("heap").await_ready()
    doze(lzy, program)
    program.ask("ping")
    once = resident_bytes(program)
    assert not wait_readable([program.pidfd], 2.5)
    assert resident_bytes(program) <= once + MIB
    program.prove()


def test_dozing_again_and_again(start: Start, lzy: CommandLine, nothing_left_behind: None) -> None:
    """Five times, with proofs in between: each is a checkpoint of the same session."""
    program = start("memory_pattern", "16").await_ready()
    before = resident_bytes(program)
    for number in range(1, 6):
        report = doze(lzy, program, "--name", "session")
        assert report["image"] == ("session" if number == 1 else f"session@{number}")
        assert resident_bytes(program) < before * 0.7
        if number % 2:
            program.prove()
    assert len(lzy.succeed("log", "session", "--store", str(lzy.store))["checkpoints"]) == 5
    program.prove()


def test_a_dozing_process_is_dumped_whole(
    start: Start, lzy: CommandLine, nothing_left_behind: None
) -> None:
    """Hibernating what dozes: the image has all of it, and next to nothing is stored anew."""
    program = start("memory_pattern", "16").await_ready()
    first = doze(lzy, program, "--name", "session")
    report = lzy.dump(program, "session")
    assert report["stored_bytes"] < first["stored_bytes"] / 3
    lzy.restore(program, "session")
    program.prove()


@pytest.mark.parametrize("stage", DOZE_STAGES)
def test_killed_at_each_stage(
    start: Start, lzy: CommandLine, stage: str, nothing_left_behind: None
) -> None:
    """Whenever lzy dies, the process has all of its memory, here or on its way; it dozes again."""
    program = start("memory_pattern", "16").await_ready()
    where = ("--store", str(lzy.store), "--name", "session")
    if stage == "doze.replacing":  # only who dozes already has a pager to be replaced
        doze(lzy, program, "--name", "session")
        program.prove()
    assert lzy.run("doze", str(program.pid), *where, kill_at=stage).returncode == -signal.SIGKILL
    if stage == "doze.replacing":  # what is away waits for somebody to take over
        lzy.succeed("pager", "--resume", str(program.pid))
    program.prove()
    doze(lzy, program)
    program.prove()


def test_nobody_else_takes_over(
    start: Start, lzy: CommandLine, tmp_path: Path, nothing_left_behind: None
) -> None:
    """Between the end of one pager and the next an agent finds nobody who serves: it is refused.

    Two would serve one memory otherwise, each of which knows but its own half.
    """
    program = start("memory_pattern", "16").await_ready()
    doze(lzy, program, "--name", "session")
    program.prove()
    holds = Holds(tmp_path / "holds")
    lzy.environment |= holds.environment
    holds.hold("doze.replacing")
    where = ("--store", str(lzy.store), "--name", "session")
    command = lzy.start("doze", str(program.pid), *where)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not holds.is_held("doze.replacing"):
            assert time.monotonic() < deadline
            assert command.poll() is None, command.communicate()
            time.sleep(0.01)
        assert lzy.fail("pager", "--resume", str(program.pid))["kind"] == "busy"
        holds.let_go()
        assert command.wait(PATIENCE_S) == 0
    finally:
        command.kill()
        command.communicate()
    program.prove()


def test_killed_at_any_moment(start: Start, lzy: CommandLine, nothing_left_behind: None) -> None:
    """Again and again, later and later, until it gets through: never a wrong byte."""
    program = start("memory_pattern", "16").await_ready()
    where = ("--store", str(lzy.store), "--name", "session")
    delay_s, kills = 0.1, 0
    while True:
        command = lzy.start("doze", str(program.pid), *where)
        pidfd = os.pidfd_open(command.pid)
        try:
            ended = wait_readable([pidfd], delay_s)
            command.kill()
            command.communicate()
        finally:
            os.close(pidfd)
        if ended:
            break
        kills += 1
        delay_s *= 1.3
        assert program.ask("ping") == "pong"
        if kills % 3 == 0:
            program.prove()
    assert kills > 2
    program.prove()


def test_pagers_killed_while_it_dozes(
    start: Start, lzy: CommandLine, nothing_left_behind: None
) -> None:
    """kill -9 of pager and keeper at random while it proves itself: it stalls, and goes on."""
    pick = random.Random(int(os.environ.get("LZY_TEST_SEED", "1")))
    program = start("memory_pattern", "32").await_ready()
    doze(lzy, program, "--name", "session")
    journal = lzy.home / "run" / f"{program.pid}.pager"
    program.say("prove")
    for _ in range(20):
        time.sleep(pick.random() / 20)
        with contextlib.suppress(Exception):  # it may have left by now
            status = read_status(journal)[1]
            for pid in pick.sample([status.pager_pid, status.keeper_pid], pick.choice([1, 2])):
                if pid:
                    kill_lzy(pid)
            lzy.run("pager", "--resume", str(program.pid))
    lzy.run("pager", "--resume", str(program.pid))
    assert program.hear().startswith("{")
    program.prove()


def test_a_restored_process_dozes(
    start: Start, lzy: CommandLine, nothing_left_behind: None
) -> None:
    """Brought back lazily and at once sent to doze: it waits for its pager, then dozes."""
    program = start("memory_pattern", "16").await_ready()
    lzy.dump(program, "session")
    lzy.restore(program, "session")
    assert doze(lzy, program)["image"] == "session@2"
    program.prove()


def test_who_does_not_doze_is_not_roused(start: Start, lzy: CommandLine) -> None:
    """A clear error, and nothing happens; the same for a session that does not run here."""
    program = start("heap").await_ready()
    error = lzy.fail("rouse", str(program.pid), "--store", str(lzy.store))
    assert "does not doze" in error["message"]
    error = lzy.fail("doze", "nobody", "--store", str(lzy.store))
    assert "no process of session nobody" in error["message"]
    assert error["remedy"]
    program.prove()
