"""What takes long: one process moved many times over, and lzy killed at random moments, on and on.

`LZY_SOAK_ROUNDS` says how often (50). Random choices come from a seed that a failure shows.
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

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

ROUNDS = int(os.environ.get("LZY_SOAK_ROUNDS", "50"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(1800, ROUNDS * 120))]

AGAIN_AND_AGAIN = [
    ("asyncio_streams", ()),
    ("churn", ()),
    ("descriptors", ("{folder}",)),
    ("heap", ()),
    ("interpreter", ()),
    ("mapped_files", ("{folder}",)),
    ("mappings", ()),
    ("memory_pattern", ("16",)),
    ("numpy_threads", ()),
    ("signals", ()),
    ("sockets", ("{folder}",)),
]


def forget(lzy: CommandLine, name: str) -> None:
    """Images of earlier rounds would fill the disk."""
    lzy.succeed("rm", name, "--store", str(lzy.store))
    lzy.succeed("gc", "--store", str(lzy.store))


@pytest.mark.parametrize(("name", "arguments"), AGAIN_AND_AGAIN, ids=lambda v: v if v else "")
def test_moved_many_times(
    start: Start, lzy: CommandLine, name: str, arguments: tuple[str, ...]
) -> None:
    """The same process, moved round after round, eagerly and lazily by turns, stays right."""
    program = start(name, *arguments).await_ready()
    for number in range(ROUNDS):
        image = f"round{number}"
        if number % 5 == 4:
            lzy.dump(program, f"{image}-left", "--leave-running")
        lzy.dump(program, image)
        lzy.restore(program, image, *(["--eager"] if number % 2 else []))
        program.prove()
        if number % 10 == 9:
            for old in lzy.succeed("images", "--store", str(lzy.store))["images"]:
                if old["name"] != image:
                    forget(lzy, old["name"])


@pytest.mark.parametrize("options", [(), ("--leave-running",)], ids=["dump", "checkpoint"])
def test_dump_killed_at_random(start: Start, lzy: CommandLine, options: tuple[str, ...]) -> None:
    """Killed at a random moment of a dump, restored when that came too late: never a wrong byte."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    program = start("memory_pattern", "16").await_ready()
    for number in range(ROUNDS):
        image = f"round{number}"
        where = ("--store", str(lzy.store), "--name", image)
        process = lzy.start("dump", str(program.pid), *where, *options)
        pidfd = os.pidfd_open(process.pid)
        wait_readable([pidfd], chance.uniform(0.0, 0.5))
        os.close(pidfd)
        process.kill()
        process.communicate()
        # A process that was killed by the dump at that very moment needs one to be gone.
        if not program.is_alive or program_is_ending(program):
            program.await_end()
            lzy.restore(program, image, *(["--eager"] if number % 2 else []))
        try:
            program.prove()
        except AssertionError as error:
            raise AssertionError(f"round {number}, seed {seed}") from error
        if number % 10 == 9 and (lzy.store / "config.json").exists():  # one came so far at least
            lzy.succeed("gc", "--store", str(lzy.store))


def program_is_ending(program: Program) -> bool:
    """Whether it does not answer any more, but is on its way out."""
    try:
        return program.ask("ping") != "pong"
    except AssertionError:
        if program.is_alive:
            raise
        return True


def test_restore_killed_at_random(start: Start, lzy: CommandLine) -> None:
    """Killed at a random moment of a restore: the process lives and is right, or comes later."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    program = start("memory_pattern", "16").await_ready()
    pid = program.pid
    lzy.dump(program)
    for number in range(ROUNDS):
        where = ("image", "--store", str(lzy.store), *(["--eager"] if number % 2 else []))
        process = lzy.start("restore", *where)
        pidfd = os.pidfd_open(process.pid)
        wait_readable([pidfd], chance.uniform(0.02, 0.3))
        os.close(pidfd)
        process.kill()
        process.communicate()
        with contextlib.suppress(ProcessLookupError):
            program.adopt(pid)
            if not program_is_ending(program):
                program.prove()
        program.end()
    lzy.succeed("verify", "image", "--store", str(lzy.store))
    lzy.restore(program)
    program.prove()
    assert not program_is_ending(program), f"seed {seed}"


def test_pager_killed_at_random(start: Start, lzy: CommandLine) -> None:
    """The pager is killed at a random moment of its work: its keeper goes on, no byte is wrong."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    program = start("memory_pattern", "16").await_ready()
    lzy.dump(program)
    for number in range(ROUNDS):
        report = lzy.restore(program)
        program.say("prove")
        wait_readable([program.pidfd], chance.uniform(0.0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            kill_lzy(report["pager_pid"])
        proof = program.hear(2 * PATIENCE_S)
        assert "false" not in proof, f"round {number}, seed {seed}: {proof}"
        program.end()
