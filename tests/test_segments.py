"""System V shared memory that is gone, or another's, when its process is restored."""

from __future__ import annotations

import ctypes
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
REMOVE, CREATE = 0, 0o1000


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
