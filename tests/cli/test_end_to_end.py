"""A living process through the commands, as a person would do it, and what programs get to read."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind("program.socket")
listener.listen()
words = []
ballast = bytes(range(256)) * 40_000
sys.stdout.write("ready\\n")
sys.stdout.flush()
while True:
    peer, _ = listener.accept()
    words.append(peer.recv(100).decode())
    peer.sendall(" ".join(words).encode() or b"-")
    peer.close()
"""


class Program:
    """A process that remembers every word it is told and answers with all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self._child.pid
        assert self._child.stdout
        assert self._child.stdout.readline() == b"ready\n"

    def tell(self, word: str) -> str:
        with closing(socket.socket(socket.AF_UNIX)) as peer:
            peer.settimeout(20)
            peer.connect(str(self._folder / "program.socket"))
            peer.sendall(word.encode())
            return peer.recv(1000).decode()

    def reap(self) -> int:
        """Wait for the child to be gone, so that its pid is free."""
        return self._child.wait(20)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            os.kill(self.pid, signal.SIGKILL)
            if self._child.poll() is None:
                self._child.wait(20)
            select.select([pidfd], [], [], 20)
            os.close(pidfd)
        assert self._child.stdout
        self._child.stdout.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    running = Program(tmp_path)
    try:
        yield running
    finally:
        running.end()


def _documented(document: object) -> None:
    """Every key of `document` stands in docs/cli.md; `details`, `facts` hold what they like."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    known = set(re.findall(r"`([a-z_]+)`", text))
    if isinstance(document, dict):
        for key, value in document.items():
            assert key in known, f"docs/cli.md does not know {key}"
            if key not in ("details", "facts"):
                _documented(value)
    elif isinstance(document, list):
        for value in document:
            _documented(value)


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_there_and_back(lzy: Run, program: Program, eager: bool) -> None:
    """Dumped under a name, ended, looked at, restored: the process goes on with what it knew."""
    program.tell("one")
    dumped = lzy("dump", str(program.pid), "--name", "calm")
    assert dumped.returncode == 0, dumped.stderr
    assert "calm" in dumped.stdout
    assert "lzy restore calm" in dumped.stdout
    assert program.reap() == -signal.SIGKILL
    assert "calm" in lzy("images").stdout
    shown = lzy("show")
    assert shown.returncode == 0, shown.stderr
    assert "1 thread" in shown.stdout
    assert "[heap]" in shown.stdout
    assert "every byte is as it was written" in lzy("verify", "calm").stdout
    restored = lzy("restore", *(["--eager"] if eager else []))
    assert restored.returncode == 0, restored.stderr
    assert str(program.pid) in restored.stdout
    assert ("all loaded" in restored.stdout) == eager
    assert program.tell("two") == "one two"


def test_every_answer_to_programs_is_documented(lzy: Run, program: Program) -> None:
    """With --json each command prints one document; docs/cli.md has all of its keys."""

    def ask(*arguments: str) -> dict[str, object]:
        answer = lzy(*arguments, "--json")
        assert answer.returncode == 0, answer.stderr
        document = json.loads(answer.stdout)
        _documented(document)
        assert isinstance(document, dict)
        return document

    kept = ask("dump", str(program.pid), "--leave-running", "--name", "kept")
    assert kept["left_running"] is True
    assert program.tell("one") == "one"
    dumped = ask("dump", str(program.pid), "--window-size", "64K", "--name", "last")
    assert dumped["pid"] == program.pid
    program.reap()
    shown = ask("show")
    assert shown["image"] == dumped["image"]
    assert shown["window_bytes"] == 65536
    restored = ask("restore", str(dumped["image"]))
    assert restored["pid"] == restored["pid_in_namespace"] == program.pid
    ask("pager", "--status")
    assert program.tell("two") == "one two"
    assert [image["name"] for image in ask("images")["images"]] == [dumped["image"], "kept"]  # type: ignore[attr-defined]  # a list, by the line above
    assert ask("verify", "kept")["image"] == "kept"
    assert ask("rm", "kept") == {"removed": ["kept"]}
    ask("gc")
    ask("doctor")
    error = lzy("show", "kept", "--json")
    assert error.returncode == 3
    _documented(json.loads(error.stdout))


# Runs `lzy dump PID`, pressing Ctrl-C at the stage that it is told.
INTERRUPTED = """
import os, signal, sys
from lzy.checkpoint import capture
chosen = sys.argv.pop()
def reach(stage):
    if stage == chosen:
        os.kill(os.getpid(), signal.SIGINT)
capture.reach = reach
from lzy.cli import main
main()
"""


@pytest.mark.parametrize(
    "stage", ["dump.seized", "dump.prepared", "dump.described", "dump.writing", "dump.written"]
)
def test_ctrl_c_leaves_the_process_running(program: Program, tmp_path: Path, stage: str) -> None:
    """Interrupted before its image exists, a dump says that the process runs on, and it does."""
    program.tell("one")
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "dump", str(program.pid), stage],
        env={**os.environ, "LZY_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 130, ended.stderr
    assert f"interrupted; process {program.pid} runs on" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert program.tell("two") == "one two"


def test_a_refused_process_is_unharmed(lzy: Run, tmp_path: Path) -> None:
    """A packet socket, and who has it below the process, are refused by name, with a way out."""
    watch = (
        "import socket as s; c = s.socket(s.AF_PACKET, s.SOCK_RAW); print(1, flush=True); input()"
    )
    code = (
        "import subprocess as s, sys\n"
        f"c = s.Popen([sys.executable, '-c', {watch!r}], stdin=s.PIPE, stdout=s.PIPE)\n"
        "c.stdout.readline(); print(c.pid, flush=True)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code + "input(); c.communicate(b'1'); print('well')"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout
        child = parent.stdout.readline().strip()
        answer = lzy("dump", str(parent.pid))
        assert answer.returncode == 4
        error, remedy = answer.stderr.splitlines()
        assert child in error
        assert "packet" in error
        assert remedy.startswith("what to do: ")
        assert parent.communicate("\n", timeout=20)[0] == "well\n"
    finally:
        parent.kill()
        parent.wait()


def test_image_names_complete(lzy: Run, program: Program) -> None:
    """Tab offers the images of the store that the line names, those not yet given."""
    for name in ("calm-one", "calm-two"):
        assert lzy("dump", str(program.pid), "--leave-running", "--name", name).returncode == 0

    def complete(line: str) -> list[str]:
        number = str(len(line.split(" ")) - 1)
        answer = lzy(_LZY_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=number)
        return [offer.partition(",")[2] for offer in answer.stdout.split()]

    assert complete("lzy restore calm-") == ["calm-two", "calm-one"]
    assert complete("lzy rm calm-one calm-") == ["calm-two"]
    assert complete("lzy show --store nowhere calm-") == []


def test_a_damaged_image_is_told_and_refused(lzy: Run, program: Program, tmp_path: Path) -> None:
    """A changed byte: the list says so, restoring and verifying are refused with status 6."""
    for name in ("sound", "spoilt"):
        assert lzy("dump", str(program.pid), "--leave-running", "--name", name).returncode == 0
    (manifest,) = (tmp_path / "home" / "store").rglob("spoilt*.image")
    content = bytearray(manifest.read_bytes())
    content[40] ^= 1
    manifest.write_bytes(content)
    listed = lzy("images")
    assert listed.returncode == 0, listed.stderr
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert [row[0] for row in rows if row[1] == "damaged"] == ["spoilt"]
    for command in ("verify", "restore", "show"):
        answer = lzy(command, "spoilt")
        assert answer.returncode == 6, answer.stderr
        assert "spoilt" in answer.stderr
    assert lzy("verify", "sound").returncode == 0
