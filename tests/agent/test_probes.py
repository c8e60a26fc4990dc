"""Probes look at real processes: what is in use is said to be, and what is idle is found idle."""

from __future__ import annotations

import os
import pty
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from living import PATIENCE_S, wait_readable

from lzy.agent.probes import Verdict, judge
from lzy.agent.readings import Reading, Watch, look_around
from lzy.agent.settings import Settings

if TYPE_CHECKING:
    from living import Program

    Start = Callable[..., Program]


class Looking:
    """Looks at one process again and again."""

    def __init__(self, pid: int) -> None:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        self._watch = Watch(pid, command)
        self.before = self.read()

    def read(self) -> Reading:
        reading = self._watch.read(look_around())
        assert reading
        return reading

    def look(self, after_s: float = 0.2) -> dict[str, Verdict]:
        """The verdicts of one look, which compares with the look before."""
        wait_readable([], after_s)  # time in which the process does what it does
        now = self.read()
        found = judge(self.before, now, Settings())
        self.before = now
        return {verdict.probe: verdict for verdict in found}

    def await_verdict(self, probe: str, active: bool) -> Verdict:
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.look().get(probe)) is None or found.active is not active:
            assert time.monotonic() < deadline, found
        return found


@pytest.fixture
def begin(start: Start) -> Callable[[str], Program]:
    """Starts a Python program that says `ready`."""

    def begin_program(code: str) -> Program:
        return start(command=[sys.executable, "-c", code]).await_ready()

    return begin_program


READY = "print('ready', flush=True); input()"


def test_one_that_waits_is_idle(begin: Callable[[str], Program]) -> None:
    """Nothing is in use of a program that waits for input, be its memory large."""
    program = begin(f"x = bytearray(1 << 24); {READY}")
    looking = Looking(program.pid)
    looking.await_verdict("cpu", False)
    assert not any(verdict.active for verdict in looking.look().values())


def test_a_first_look_says_active(begin: Callable[[str], Program]) -> None:
    """With nothing to compare with, nothing is idle."""
    program = begin(READY)
    (verdict,) = judge(None, Looking(program.pid).before, Settings())
    assert verdict.active


def test_computing(begin: Callable[[str], Program]) -> None:
    """A thread that computes counts, whatever the main thread waits for."""
    spin = "import threading\ndef spin():\n while True: pass\n"
    program = begin(f"{spin}threading.Thread(target=spin, daemon=True).start(); {READY}")
    assert "of a core" in Looking(program.pid).await_verdict("cpu", True).reason


def test_children(begin: Callable[[str], Program]) -> None:
    """A child that computes counts; one that sleeps does not."""
    shell = "['sh', '-c', 'read line; while :; do :; done']"
    start = f"import subprocess; p = subprocess.Popen({shell}, stdin=subprocess.PIPE)"
    program = begin(f"{start}; {READY}; p.stdin.write(b'go\\n'); p.stdin.flush(); input()")
    looking = Looking(program.pid)
    try:
        assert "all 1" in looking.await_verdict("children", False).reason
        program.say("go")
        assert "(sh)" in looking.await_verdict("children", True).reason
    finally:
        (child,) = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)


def test_bytes_through_files(begin: Callable[[str], Program]) -> None:
    """Reading at a trickle of CPU counts by its bytes."""
    read = "time.sleep(.05); open('/dev/zero', 'rb').read(1 << 16)"
    code = f"import time\nprint('ready', flush=True)\nwhile True: {read}"
    Looking(begin(code).pid).await_verdict("io", True)


def test_bytes_through_sockets(begin: Callable[[str], Program]) -> None:
    """What recv(2) takes from a connection counts, which /proc/PID/io does not show."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        take = "while c.recv(1 << 16): time.sleep(.02)"
        connect = f"import socket, time; c = socket.create_connection(('127.0.0.1', {port}))"
        code = f"{connect}\nprint('ready', flush=True)\n{take}"
        program = begin(code)
        client, _ = server.accept()
        with closing(client):
            looking = Looking(program.pid)
            looking.await_verdict("sockets", False)
            assert not looking.look()["sockets"].active  # to be connected is no activity
            client.sendall(bytes(100_000))
            looking.await_verdict("sockets", True)
            assert not looking.await_verdict("io", False).active


def test_unread_messages(begin: Callable[[str], Program]) -> None:
    """Bytes that nobody has read yet, and connections that nobody has accepted, count."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1])"
    code = f"print('ready', flush=True); {code}; input(); c = s.accept(); input()"
    program = begin(f"import functools; print = functools.partial(print, flush=True); {code}")
    port = int(program.hear())
    looking = Looking(program.pid)
    looking.await_verdict("messages", False)
    with closing(socket.create_connection(("127.0.0.1", port))) as client:
        assert "accepted" in looking.await_verdict("messages", True).reason
        program.say("accept")
        looking.await_verdict("messages", False)
        client.sendall(b"are you there?")
        assert "14 bytes" in looking.await_verdict("messages", True).reason


def test_cell_that_waits(begin: Callable[[str], Program]) -> None:
    """A kernel whose cell sleeps burns no CPU and is in use; in its event loop it is idle."""
    loop = "import asyncio, sys; loop = asyncio.new_event_loop()"
    cell = "loop.call_later(.3, lambda: print('ready', flush=True) or __import__('time').sleep(60))"
    program = begin(f"'ipykernel'; {loop}; {cell}; loop.run_forever()")
    assert "a cell runs" in Looking(program.pid).await_verdict("kernel", True).reason
    idle = begin(
        f"'ipykernel'; {loop}; loop.call_soon(print, 'ready'); "
        "loop.call_soon(sys.stdout.flush); loop.run_forever()"
    )
    Looking(idle.pid).await_verdict("kernel", False)


def test_terminal(nothing_left_behind: None) -> None:
    """On a terminal it is idle while it waits and nobody types; not while it sleeps by itself."""
    child, terminal = pty.fork()
    if child == 0:
        code = "import time\nwhile True: time.sleep(float(input('> ')))"
        os.execv(sys.executable, [sys.executable, "-S", "-c", code])
    try:
        assert wait_readable([terminal], PATIENCE_S)
        looking = Looking(child)
        looking.await_verdict("terminal", False)
        os.write(terminal, b"1000\n")
        verdict = looking.await_verdict("terminal", True)
        while "does not wait" not in verdict.reason:  # typed at first, then asleep
            verdict = looking.await_verdict("terminal", True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


def test_open_gpu(
    begin: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a GPU's device open counts as in use."""
    monkeypatch.setattr("lzy.agent.readings.GPU_DEVICES", str(tmp_path / "nvidia"))
    (tmp_path / "nvidia0").touch()
    program = begin(f"gpu = open({str(tmp_path / 'nvidia0')!r}); {READY}")
    Looking(program.pid).await_verdict("gpu", True)


def test_probe_that_errs_says_active(begin: Callable[[str], Program]) -> None:
    """Where a probe may not look, what it looks for counts as in use, and it says so."""
    program = begin(READY)
    looking = Looking(program.pid)
    looking._watch._folder = f"/proc/{program.pid}/no"
    found = looking.look()
    for probe in ("io", "sockets", "messages"):
        assert found[probe].active
        assert "could not be asked" in found[probe].reason
