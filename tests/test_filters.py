"""Processes under seccomp filters where lzy has none, the same or others, as in containers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from living import PROGRAMS

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

UNDER_A_FILTER = [sys.executable, str(PROGRAMS / "filters.py"), "run"]


def count_filters(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if "Seccomp_filters" in line)


@pytest.mark.shows("survives", "a container's seccomp filter, where lzy is in that container")
def test_same_filter_as_lzy(start: Start, lzy: CommandLine) -> None:
    """What both have from their container stays in force, is not in the image, and is there again.

    It also refuses userfaultfd here, as Docker's does: all memory then comes at once.
    """
    command = [*UNDER_A_FILTER, sys.executable, str(PROGRAMS / "interpreter.py")]
    program = start(command=command).await_ready()
    lzy.executable = [*UNDER_A_FILTER, *lzy.executable]
    lzy.dump(program)
    lzy.restore(program)
    assert count_filters(program.pid) == "1"
    program.prove()


@pytest.mark.shows("survives", "a container's seccomp filter, where lzy is outside")
def test_filter_of_a_container_from_outside(start: Start, lzy: CommandLine) -> None:
    """Where lzy has no filter, the container's is in the image and put on again, once."""
    command = [*UNDER_A_FILTER, sys.executable, str(PROGRAMS / "interpreter.py")]
    program = start(command=command).await_ready()
    for number in range(2):
        lzy.dump(program, f"image{number}")
        lzy.restore(program, f"image{number}")
        assert count_filters(program.pid) == "1"
    program.prove()


@pytest.mark.shows("refused", "a process under other seccomp filters than lzy")
def test_other_filters_than_lzy_has(start: Start, lzy: CommandLine) -> None:
    """Under a filter lzy cannot suspend another: refused by name, and the process goes on."""
    program = start("filters").await_ready()
    lzy.executable = [*UNDER_A_FILTER, *UNDER_A_FILTER, *UNDER_A_FILTER, *lzy.executable]
    error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store))
    assert "seccomp" in error["message"]
    assert error["remedy"]
    program.prove()


@pytest.mark.shows("refused", "an image of a process under filters, to be restored under others")
def test_image_of_another_container(start: Start, lzy: CommandLine) -> None:
    """What ran under filters of its own is not restored under lzy's: it would have both."""
    program = start("filters").await_ready()
    lzy.dump(program)
    lzy.executable = [*UNDER_A_FILTER, *lzy.executable]
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert error["kind"] == "incompatible"
    assert "seccomp" in error["message"]
