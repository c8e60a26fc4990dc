"""System V shared memory, semaphores and queues that are gone, or another's, at a restore."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

libc = ctypes.CDLL(None, use_errno=True)
REMOVE, CREATE, SETVAL = 0, 0o1000, 16


def find(program: Program) -> int:
    """The segment that `system_v_memory` gave the key of its pid; -1 if there is none."""
    return int(libc.shmget(0x6C000000 | program.pid, 0, 0))


@pytest.mark.shows("survives", "System V shared memory that is gone since, as after another boot")
def test_gone_segment_is_made_from_the_image(start: Start, lzy: CommandLine) -> None:
    """With its id, key, rights and content."""
    program = start("system_v_memory").await_ready()
    segment = find(program)
    lzy.dump(program)
    assert libc.shmctl(segment, REMOVE, None) == 0
    assert find(program) == -1
    lzy.restore(program)
    assert find(program) == segment
    program.prove()


@pytest.mark.shows("refused", "System V shared memory whose id or key is another's by now")
def test_anothers_segment_is_left_alone(start: Start, lzy: CommandLine) -> None:
    """Who has taken the key meanwhile keeps it; nothing of a failed restore stays."""
    program = start("system_v_memory").await_ready()
    segment, key = find(program), 0x6C000000 | program.pid
    lzy.dump(program)
    assert libc.shmctl(segment, REMOVE, None) == 0
    other = libc.shmget(key, 4096, CREATE | 0o600)
    before = Path("/proc/sysvipc/shm").read_text()
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert error["kind"] == "busy"
    assert hex(key) in error["message"]
    assert Path("/proc/sysvipc/shm").read_text().splitlines()[1:] == before.splitlines()[1:]
    assert libc.shmctl(other, REMOVE, None) == 0
    lzy.restore(program)
    program.prove()


def find_others(program: Program) -> tuple[int, int, int]:
    """The semaphores and queues that `system_v_queues` has made with keys of its pid; -1: none."""
    key = 0x6C000000 | program.pid
    return libc.semget(key, 0, 0), libc.msgget(key, 0), libc.msgget(key | 1 << 24, 0)


def remove_others(program: Program) -> None:
    semaphores, *queues = find_others(program)
    assert libc.semctl(semaphores, 0, REMOVE) == 0
    for queue in queues:
        assert libc.msgctl(queue, REMOVE, None) == 0
    assert find_others(program) == (-1, -1, -1)


@pytest.mark.shows(
    "survives", "System V semaphores and queues that are gone, as after another boot"
)
@pytest.mark.parametrize("way", [("--eager",), ()], ids=["eager", "lazy"])
def test_gone_semaphores_and_queues_are_made_from_the_image(
    start: Start, lzy: CommandLine, way: tuple[str, ...]
) -> None:
    """With their numbers, keys, rights, values and messages; and once more from the next image."""
    program = start("system_v_queues").await_ready()
    found = find_others(program)
    for name in ("image", "next"):
        lzy.dump(program, name)
        remove_others(program)
        lzy.restore(program, name, *way)
        assert find_others(program) == found
        program.prove()


def test_copy_has_semaphores_and_queues_of_its_own(start: Start, lzy: CommandLine) -> None:
    """As they were in the image, whatever becomes of those that it was copied from."""
    program = start("system_v_queues").await_ready()
    semaphores = find_others(program)[0]
    lzy.dump(program)
    try:
        assert libc.semctl(semaphores, 0, SETVAL, 5) == 0
        report = lzy.succeed("restore", "image", "--store", str(lzy.store), "--copy")
        original = program.pid
        program.adopt(report["pid"])
        program.prove()
        assert libc.semctl(semaphores, 0, 12) == 5  # GETVAL
        lzy.dump(program, "copy")
        report = lzy.succeed("restore", "copy", "--store", str(lzy.store), "--copy")
        program.adopt(report["pid"])
        program.prove()
    finally:
        libc.semctl(semaphores, 0, REMOVE)
        for key in (0x6C000000, 0x6D000000):
            libc.msgctl(libc.msgget(key | original, 0), REMOVE, None)


@pytest.mark.shows(
    "refused", "System V semaphores or queues whose number or key is another's by now"
)
def test_anothers_queue_is_left_alone(start: Start, lzy: CommandLine) -> None:
    """Who has taken the key meanwhile keeps it; nothing of a failed restore stays."""
    program = start("system_v_queues").await_ready()
    key = 0x6C000000 | program.pid
    lzy.dump(program)
    remove_others(program)
    other = libc.msgget(key, CREATE | 0o600)
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert error["kind"] == "busy"
    assert hex(key) in error["message"]
    assert find_others(program) == (-1, other, -1)
    assert libc.msgctl(other, REMOVE, None) == 0
    lzy.restore(program)
    program.prove()


@pytest.mark.parametrize("stage", ["restore.threads", "restore.registered"])
def test_restore_killed_behind_semaphores_and_queues(
    start: Start, lzy: CommandLine, stage: str
) -> None:
    """What a killed restore has made of them is what the next one uses."""
    program = start("system_v_queues").await_ready()
    lzy.dump(program)
    remove_others(program)
    where = ("--store", str(lzy.store))
    assert lzy.run("restore", "image", *where, kill_at=stage).returncode == -signal.SIGKILL
    assert min(find_others(program)) >= 0
    lzy.restore(program)
    program.prove()


def test_restore_killed_among_semaphores_and_queues(start: Start, lzy: CommandLine) -> None:
    """What has no rights yet is not whole: it is made anew."""
    program = start("system_v_queues").await_ready()
    semaphores, queue, _ = find_others(program)
    lzy.dump(program)
    remove_others(program)
    key = 0x6C000000 | program.pid
    for name, number in (("sem", semaphores), ("msg", queue)):
        Path(f"/proc/sys/kernel/{name}_next_id").write_text(str(number))
        assert number == (
            libc.semget(key, 3, CREATE) if name == "sem" else libc.msgget(key, CREATE)
        )
    lzy.restore(program)
    program.prove()


def test_what_is_taken_of_semaphores_and_queues() -> None:
    """What one of the processes was the last to use, messages without a byte too; nothing else."""
    from lzy.checkpoint.ipc import describe_ipc

    queue, semaphores = libc.msgget(0, 0o600), libc.semget(0, 2, 0o600)
    try:
        assert libc.msgsnd(queue, (7).to_bytes(8, "little"), ctypes.c_size_t(0), 0) == 0
        assert libc.semctl(semaphores, 1, SETVAL, 4) == 0
        found = describe_ipc([os.getpid()])
        ours = {kind: [it for it in found[kind] if it["number"] == number] for kind, number in
                (("msg", queue), ("sem", semaphores))}  # fmt: skip
        assert ours["msg"][0]["messages"] == [[7, ""]]
        assert ours["sem"][0]["values"] == [0, 4]
        others = describe_ipc([1])
        assert queue not in [it["number"] for it in others.get("msg", ())]
        assert semaphores not in [it["number"] for it in others.get("sem", ())]
    finally:
        libc.msgctl(queue, REMOVE, None)
        libc.semctl(semaphores, 0, REMOVE)
