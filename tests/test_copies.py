"""`lzy restore --copy`: many lives of one image, each with pids and a network of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from living import PATIENCE_S, PROGRAMS, CommandLine, Program, await_end, list_children

from lzy.checkpoint.linux.network import join_apart

Start = Callable[..., Program]
QUIET = ("--stdin", "/dev/null", "--stdout", "/dev/null", "--stderr", "/dev/null")


@pytest.fixture
def outside() -> Iterator[socket.socket]:
    """Somebody outside, to whom the program is connected."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def twin(start: Start, outside: socket.socket) -> Callable[..., tuple[Program, int]]:
    def start_twin(*arguments: str) -> tuple[Program, int]:
        words = [sys.executable, str(PROGRAMS / "twin.py"), str(outside.getsockname()[1])]
        program = start(command=[*words, *arguments]).await_ready()
        return program, int(program.hear())

    return start_twin


def visit(port: int, pid: int | None = None) -> dict[str, Any]:
    """What the program on that port answers; `pid`: in the network of that process."""
    heard: list[bytes] = []

    def ask() -> None:
        if pid is not None:
            join_apart(pid)  # of this thread
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
            connection.sendall(b"?")
            connection.settimeout(PATIENCE_S)
            while piece := connection.recv(4096):
                heard.append(piece)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    answer: dict[str, Any] = json.loads(b"".join(heard))
    return answer


@contextmanager
def copied(lzy: CommandLine, *arguments: str) -> Iterator[dict[str, Any]]:
    report = lzy.succeed("restore", "--copy", *arguments, *QUIET)
    try:
        yield report
    finally:
        end(report["pid"])


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    await_end(pid)


def test_one_image_gives_twenty_processes_at_once(
    lzy: CommandLine, twin: Callable[..., tuple[Program, int]]
) -> None:
    """All of them work, on the same port and under the same pid, beside the original."""
    program, port = twin()
    assert visit(port)["asked"] == 1
    lzy.dump(program, "image", "--leave-running")
    started = [
        lzy.start("restore", "image", "--copy", *QUIET, *store(lzy), "--json") for _ in range(20)
    ]
    pids = []
    try:
        for process in started:
            out, err = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, err.decode()
            pids.append(json.loads(out)["pid"])
        networks = {os.stat(f"/proc/{pid}/ns/net").st_ino for pid in pids}
        assert len(networks) == 20
        for count in (2, 3):
            for pid in pids:
                answer = visit(port, pid)
                assert answer["pid"] == program.pid
                assert answer["whole"]
                assert answer["ticks"] > 0
                assert answer["asked"] == count
                assert answer["cut"]
        answer = visit(port)
        assert (answer["asked"], answer["whole"], answer["cut"]) == (2, True, False)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for pid in pids:
            end(pid)


def store(lzy: CommandLine) -> tuple[str, str]:
    return "--store", str(lzy.store)


def test_copies_share_their_random_numbers_until_seeded_anew(
    lzy: CommandLine, twin: Callable[..., tuple[Program, int]]
) -> None:
    """What both share is said; `--reseed` gives every generator other numbers."""
    program, port = twin("numpy")
    lzy.dump(program, "image", "--leave-running")
    with (
        copied(lzy, "image", *store(lzy)) as same,
        copied(lzy, "image", *store(lzy), "--reseed", "--eager") as other,
    ):
        drawn = visit(port)["drawn"]
        assert len(drawn) == 4
        assert visit(port, same["pid"])["drawn"] == drawn
        assert any("--reseed" in note for note in same["notes"])
        anew = visit(port, other["pid"])["drawn"]
        assert not set(anew) & set(drawn)
        assert any(note.startswith("seeded anew: numpy") for note in other["notes"])
        assert (other["network"], other["session"], other["lazy"]) == ("new", "image-fork2", False)


FAMILY = """
import os, random, signal, subprocess, sys, time
random.seed(3)
child = os.fork()
if child == 0:
    parent, drawn = os.getppid(), open(sys.argv[1], "a")
    def draw(*_):
        print(random.getrandbits(64), file=drawn, flush=True)
    signal.signal(signal.SIGUSR1, draw)
    while os.getppid() == parent:
        time.sleep(0.05)
    os._exit(0)
other = subprocess.Popen(["sh", "-c", "while kill -0 $PPID; do sleep 0.2; done"])
print("ready", flush=True)
print(child, flush=True)
while True:
    time.sleep(0.1)
"""


def test_all_of_a_tree_is_seeded_anew(lzy: CommandLine, start: Start, tmp_path: Path) -> None:
    """Each of its interpreters; what is no Python is passed over."""
    drawn = tmp_path / "drawn"
    program = start(command=[sys.executable, "-c", FAMILY, str(drawn)]).await_ready()
    child = int(program.hear())
    lzy.dump(program, "image", "--leave-running")
    with copied(lzy, "image", *store(lzy), "--reseed") as copy:
        assert sum("seeded anew: random" in note for note in copy["notes"]) == 2
        (other,) = [
            pid
            for pid in list_children(copy["pid"])
            if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        for pid, count in ((child, 1), (other, 2)):
            os.kill(pid, signal.SIGUSR1)
            deadline = time.monotonic() + PATIENCE_S
            while not drawn.exists() or len(drawn.read_text().split()) < count:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert len(set(drawn.read_text().split())) == 2
    program.end()


def test_a_copy_that_cannot_be_seeded_anew_is_ended(lzy: CommandLine, start: Start) -> None:
    """No copy goes on with the numbers of the original when other ones were asked for."""
    program = start(command=["sh", "-c", "echo ready; exec sleep 100"]).await_ready()
    lzy.dump(program, "image", "--leave-running")
    error = lzy.fail("restore", "image", "--copy", "--reseed", *store(lzy), *QUIET)
    assert error["kind"] == "unsupported"
    assert "ended" in error["message"]
    assert program.is_alive  # and `nothing_left_behind` looks for the copy


def test_a_copy_is_dumped_as_any_other(
    lzy: CommandLine, twin: Callable[..., tuple[Program, int]]
) -> None:
    """Its network is entered for it; its image comes back, apart again."""
    program, port = twin()
    lzy.dump(program, "image", "--leave-running")
    with copied(lzy, "image", *store(lzy)) as first:
        assert visit(port, first["pid"])["asked"] == 1
        report = lzy.succeed("dump", str(first["pid"]), *store(lzy))
        assert report["image"] == "image-fork"

        await_end(first["pid"])
    with copied(lzy, "image-fork", *store(lzy)) as second:
        assert visit(port, second["pid"])["asked"] == 2
    assert visit(port)["asked"] == 1
