"""Several sessions live at once: checkpointed, dozing, roused, hibernated, woken, at random.

Meanwhile commands, pagers, keepers and the garbage collection are killed. Each session proves every
byte of its memory all along; in the end the store verifies clean. A failure names its seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from living import PATIENCE_S, kill_lzy, wait_readable

from lzy.checkpoint.errors import LzyError
from lzy.checkpoint.journal import read_status

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

ROUNDS = int(os.environ.get("LZY_SOAK_ROUNDS", "50"))
SEED = int(os.environ.get("LZY_TEST_SEED", "0")) or random.randrange(1, 2**32)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(1800, ROUNDS * 240))]


class Session:
    """A program, and what may be done to it."""

    def __init__(self, name: str, program: Program, lzy: CommandLine, chance: random.Random):
        self.name, self.program, self.lzy, self.chance = name, program, lzy, chance

    def run(self, *arguments: str) -> None:
        """A command that is killed in the midst of its work one time in four."""
        command = self.lzy.start(*arguments, "--store", str(self.lzy.store))
        pidfd = os.pidfd_open(command.pid)
        try:
            is_killed = self.chance.random() < 0.25
            wait_readable([pidfd], self.chance.uniform(0.05, 0.6) if is_killed else 2 * PATIENCE_S)
        finally:
            os.close(pidfd)
            command.kill()
            _, errors = command.communicate()
        assert b"Traceback" not in errors, errors.decode()

    def checkpoint(self) -> None:
        self.run("dump", str(self.program.pid), "--leave-running", "--name", self.name)

    def doze(self) -> None:
        self.run("doze", str(self.program.pid), "--name", self.name)

    def limit(self) -> None:
        """Some of its memory goes, the coldest."""
        self.run("doze", str(self.program.pid), "--limit", "8M", "--once", "--name", self.name)

    def rouse(self) -> None:
        self.run("rouse", str(self.program.pid))

    def move(self) -> None:
        """Hibernate and wake; a command that was killed may have got through or not."""
        self.run("dump", str(self.program.pid), "--name", self.name)
        self.lzy.run("pager", "--resume")  # of one that runs on, both may have been killed before
        try:
            self.program.ask("ping")
        except AssertionError:
            assert not self.program.is_alive, self.program.describe()
            self.program.await_end()
            self.lzy.restore(self.program, self.name)
            self.program.hear()  # the answer of who is there now, else the next one would get it

    def kill_a_pager(self) -> None:
        journal = self.lzy.home / "run" / f"{self.program.pid}.pager"
        with contextlib.suppress(LzyError, ProcessLookupError):
            status = read_status(journal)[1]
            victims = [pid for pid in (status.pager_pid, status.keeper_pid) if pid]
            for pid in self.chance.sample(victims, self.chance.randint(1, len(victims))):
                kill_lzy(pid)

    def collect_garbage(self) -> None:
        self.run("gc")

    def prove(self) -> None:
        self.lzy.run("pager", "--resume")
        self.program.prove()


DEEDS = ("checkpoint", "doze", "limit", "rouse", "move", "kill_a_pager", "collect_garbage")


def test_sessions_live_through_everything(
    start: Start, lzy: CommandLine, nothing_left_behind: None
) -> None:
    """Whatever is done to them and whoever dies, they are right, and so is the store."""
    chance = random.Random(SEED)
    sessions = [
        Session(name, start(name, *arguments).await_ready(), lzy, chance)
        for name, arguments in (("memory_pattern", ("16",)), ("heap", ()), ("churn", ()))
    ]
    lzy.dump(sessions[0].program, sessions[0].name, "--leave-running")  # there is a store
    for number in range(ROUNDS):
        session = chance.choice(sessions)
        deeds = [chance.choice(DEEDS) for _ in range(chance.randint(1, 4))]
        try:
            for deed in deeds:
                getattr(session, deed)()
            session.prove()
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, round {number}, {session.name}: {deeds}") from error
    for session in sessions:
        session.prove()
    lzy.succeed("gc", "--store", str(lzy.store))
    for image in lzy.succeed("images", "--store", str(lzy.store))["images"]:
        lzy.succeed("verify", image["name"], "--store", str(lzy.store))
