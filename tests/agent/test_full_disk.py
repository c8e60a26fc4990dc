"""The disk with all that lzy keeps is full: sessions run on, who asks is told, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from living import CommandLine, await_end, unmount
from service import Service

from lzy.agent.supervisor import find_supervisor
from lzy.checkpoint.errors import StoreUnavailable

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]

BYTES = 48 << 20
PAGE_BYTES = 4096


class Disk:
    """A small file system that holds a home, and a file that fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filling = path / "filling"

    def fill(self, *, but_pages: int = 0) -> None:
        """Leave room for so many pages, and no more."""
        with open(self._filling, "ab", buffering=0) as file:
            for piece in (1 << 20, PAGE_BYTES):
                with contextlib.suppress(OSError):
                    while file.write(bytes(piece)) == piece:
                        pass
        os.truncate(self._filling, self._filling.stat().st_size - but_pages * PAGE_BYTES)

    def clear(self) -> None:
        """Have room again."""
        self._filling.unlink()


@pytest.fixture
def disk(lzy: CommandLine) -> Iterator[Disk]:
    """The home of `lzy` is on a file system of its own."""
    options = f"size={BYTES},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", lzy.home], check=True)
    try:
        yield Disk(lzy.home)
    finally:
        unmount(lzy.home)


@pytest.fixture
def small(disk: Disk) -> Iterator[Service]:
    """A service whose home is on that disk."""
    made = Service(disk.path)
    try:
        yield made
    finally:
        made.close()


def test_full_disk_is_survived(start: Start, lzy: CommandLine, disk: Disk, small: Service) -> None:
    """Every verb is refused with what to do, no signal is sent that the audit would miss; agent and
    supervisor live on, the agent even begins anew; with room again all goes on."""
    lzy.succeed("up", "--sample-every", "0.1s", "--hibernate-after", "never", "--after-wake", "0")
    program = start("memory_pattern", "12").await_ready()
    small.attach(program)
    supervisor = find_supervisor(disk.path)
    assert supervisor
    os.close(supervisor.pidfd)
    disk.fill()
    events = small.kinds()
    for verb in (("hibernate",), ("doze",), ("hold", "--for", "1h"), ("signal", "9")):
        name = verb[0], "calm", *verb[1:]
        refused = lzy.fail(*name)
        assert refused["kind"] == "store_unavailable"
        assert "make room" in refused["remedy"]
    program.prove()
    assert small.kinds() == events
    killed = small.client.get("/v1/node")["agent_pid"]
    os.kill(killed, signal.SIGKILL)
    await_end(killed)
    small.wait_until(small.is_up, "another agent answers")
    assert small.client.get("/v1/node")["agent_pid"] != killed
    assert small.look()["pid"] == program.pid
    program.prove()
    disk.clear()
    small.await_state("running")
    lzy.succeed("hibernate", "calm")
    program.await_end()
    disk.fill()
    refused = lzy.fail("wake", "calm")
    assert refused["kind"] == "store_unavailable"
    disk.clear()
    program.adopt(lzy.succeed("wake", "calm")["pid"])
    program.prove()
    again = find_supervisor(disk.path)
    assert again
    os.close(again.pidfd)
    assert again.pid == supervisor.pid
    lzy.succeed("down")


@pytest.mark.slow
def test_disk_fills_in_the_midst_of_it(start: Start, disk: Disk, small: Service) -> None:
    """However far hibernation and wake get before nothing can be written: what is true is found out
    when there is room, there is one process or one image, and it is whole."""
    program = start("memory_pattern", "12").await_ready()
    small.begin().set()
    small.attach(program)
    refused = 0
    for pages in range(12):
        for verb in ("hibernate", "wake"):
            disk.fill(but_pages=pages)
            try:
                small.do(verb)
            except StoreUnavailable:
                refused += 1
            finally:
                disk.clear()
            small.wait_until(lambda: is_settled(small), "it is known what became of it")
            if small.look()["state"] == "hibernated":
                program.await_end()
            elif not program.is_alive:
                program.adopt(small.look()["pid"])
            if verb == "wake" and small.look()["state"] == "hibernated":
                program.adopt(small.do("wake")["session"]["pid"])
            assert small.look()["pid"] in (program.pid, None)
    program.prove()
    assert refused


def is_settled(service: Service) -> bool:
    session = service.look()
    return session["state"] in ("running", "hibernated") and not session["operation"]


def test_dozing_session_gets_its_memory_from_a_full_disk(
    start: Start, disk: Disk, small: Service
) -> None:
    """What its pager writes down of what it does with its memory has its room already."""
    program = start("memory_pattern", "12").await_ready()
    small.begin().set()
    small.attach(program)
    for verb in ("doze", "wake"):
        if verb == "wake":
            small.do("hibernate")
            program.await_end()
            program.adopt(small.do("wake")["session"]["pid"])
        else:
            small.do("doze")
        disk.fill()
        program.prove()
        assert program.ask("prove")
        disk.clear()
        small.await_state("running")


def test_end_that_could_not_be_written(start: Start, disk: Disk, small: Service) -> None:
    """A session ends while the disk is full: it is known how when there is room."""
    program = start("memory_pattern", "12").await_ready()
    small.begin().set()
    small.attach(program)
    disk.fill()
    os.kill(program.pid, signal.SIGUSR2)
    program.await_end()
    small.wait_until(lambda: small.look()["pid"] is None or not small.look()["verdicts"], "noticed")
    disk.clear()
    ended = small.await_state("failed")
    assert ended["exit_status"] == signal.SIGUSR2
    program.adopt(small.do("wake")["session"]["pid"])
    program.prove()
