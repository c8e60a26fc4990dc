"""Checkpoints of living processes through the commands: logs, forks, differences, retention."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from living import PATIENCE_S, CommandLine, Program, await_end, wait_readable

Start = Callable[..., Program]

PROGRAM = """
import json, os, random, socket, sys
random.seed(7)
words, held = [], []
ballast = bytearray(os.urandom(8 << 20))
print("ready", flush=True)
for line in sys.stdin:
    verb, _, rest = line.strip().partition(" ")
    answer = None
    if verb == "remember":
        words.append(rest)
        answer = words
    elif verb == "touch":
        for page in range(int(rest)):
            ballast[page * 4096 * 16] ^= 1
    elif verb == "listen":
        held.append(socket.create_server(("127.0.0.1", 0)))
        answer = held[-1].getsockname()[1]
    elif verb == "serve":
        held.append(socket.socket(socket.AF_UNIX))
        held[-1].bind(rest)
        held[-1].listen()
        held[-1].setblocking(False)
    elif verb == "visitors":
        answer = 0
        try:
            held[-1].accept()
            answer = 1
        except BlockingIOError:
            pass
    elif verb == "lock":
        import fcntl
        held.append(open(rest, "w"))
        fcntl.lockf(held[-1], fcntl.LOCK_EX)
    elif verb == "append":
        held.append(open(rest, "a"))
    elif verb == "random":
        answer = [random.random(), os.getpid()]
    print(json.dumps(answer), flush=True)
"""


def documented(document: object) -> None:
    """Every key stands in docs/cli.md; `facts` hold what they like."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    known = set(re.findall(r"`([a-z_]+)`", text))
    if isinstance(document, dict):
        for key, value in document.items():
            assert key in known, f"docs/cli.md does not know {key}"
            if key != "facts":
                documented(value)
    elif isinstance(document, list):
        for value in document:
            documented(value)


class Commands(CommandLine):
    """lzy with its documents checked against docs/cli.md."""

    def succeed(self, *arguments: str) -> dict[str, Any]:
        document = super().succeed(*arguments)
        documented(document)
        return document

    def checkpoint(self, program: Program, *options: str) -> str:
        """The image of a checkpoint after which the program runs on."""
        report = self.succeed("dump", str(program.pid), "--leave-running", *options)
        image: str = report["image"]
        return image

    def end(self, program: Program, *options: str) -> str:
        """The image of a checkpoint that ends the program."""
        report = self.succeed("dump", str(program.pid), *options)
        program.await_end()
        image: str = report["image"]
        return image

    def go_back(self, program: Program, *arguments: str) -> None:
        """Restore, and let the process that comes be the one that answers."""
        program.adopt(self.succeed("restore", *arguments)["pid"])

    def log(self, *arguments: str) -> list[tuple[int, str | None]]:
        """(number, parent) of each checkpoint, as `lzy log` lists them."""
        found = self.succeed("log", *arguments)["checkpoints"]
        return [(entry["number"], entry["parent"]) for entry in found]

    def words(self, *arguments: str) -> str:
        """What it tells people."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


@pytest.fixture
def cli(tmp_path: Path, nothing_left_behind: None) -> Commands:
    home = tmp_path / "home"
    home.mkdir()
    return Commands(home)


@pytest.fixture
def program(start: Start, cli: Commands) -> Program:
    return start(command=[sys.executable, "-c", PROGRAM]).await_ready()


def tell(program: Program | Copy, line: str) -> Any:
    return json.loads(program.ask(line))


class Copy:
    """A forked process, talked to over named pipes of its own."""

    def __init__(self, cli: Commands, folder: Path, *arguments: str) -> None:
        folder.mkdir()
        paths = [folder / name for name in ("commands", "answers")]
        for path in paths:
            os.mkfifo(path)
        self._commands, self._answers = (os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths)
        standard = ("--stdin", str(paths[0]), "--stdout", str(paths[1]), "--stderr", "/dev/null")
        try:
            self.report = cli.succeed("fork", *arguments, *standard)
        except BaseException:
            self._close()
            raise
        self.pid: int = self.report["pid"]
        self.pidfd = os.pidfd_open(self.pid)

    def ask(self, line: str) -> str:
        os.write(self._commands, line.encode() + b"\n")
        heard = b""
        while not heard.endswith(b"\n"):
            assert wait_readable([self._answers], PATIENCE_S), f"copy {self.pid} is silent"
            heard += os.read(self._answers, 65536)
        return heard.decode()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        assert wait_readable([self.pidfd], PATIENCE_S)
        os.close(self.pidfd)
        self._close()

    def _close(self) -> None:
        os.close(self._commands)
        os.close(self._answers)


@contextmanager
def forked(cli: Commands, folder: Path, *arguments: str) -> Iterator[Copy]:
    copy = Copy(cli, folder, *arguments)
    try:
        yield copy
    finally:
        copy.end()


def test_checkpoints_are_numbered_and_one_can_go_back(cli: Commands, program: Program) -> None:
    """Dumps of one process are checkpoints of its session; each is restored as it was."""
    for number, word in enumerate(("one", "two", "three"), 1):
        tell(program, f"remember {word}")
        image = cli.checkpoint(program, *(["--name", "calm"] if number < 3 else []))
        assert image == ("calm" if number == 1 else f"calm@{number}")
    assert cli.log() == [(3, "calm@2"), (2, "calm@1"), (1, None)]
    tell(program, "remember four")
    assert cli.end(program) == "calm@4"
    assert cli.succeed("verify", "calm@1")["image"] == "calm"
    assert cli.succeed("show", "calm")["image"] == "calm@4"

    cli.go_back(program, "calm@2")
    assert tell(program, "remember again") == ["one", "two", "again"]
    assert cli.end(program) == "calm@5"
    assert cli.log("calm")[0] == (5, "calm@2")
    assert cli.log("calm@5") == [(5, "calm@2"), (2, "calm@1"), (1, None)]
    assert "@2" in cli.words("log", "calm")

    cli.go_back(program, "calm@1", "--eager")
    assert tell(program, "remember first") == ["one", "first"]
    program.end()
    cli.go_back(program, "calm")
    assert tell(program, "remember newest") == ["one", "two", "again", "newest"]


def test_log_tells_when_why_and_who(cli: Commands, program: Program) -> None:
    """Each checkpoint has its time, reason, size and the process that goes on from it."""
    before = time.time()
    cli.checkpoint(program, "--name", "calm")
    tell(program, "touch 5")
    cli.checkpoint(program)
    two, one = cli.succeed("log")["checkpoints"]
    assert before <= one["taken_unix_s"] <= two["taken_unix_s"] <= time.time()
    assert (one["why"], one["pids"], two["pids"]) == ("asked", [], [program.pid])
    assert 5 * 4096 * 0.9 <= two["new_bytes"] < one["new_bytes"] / 4
    assert two["raw_bytes"] >= one["new_bytes"]
    assert f"pid {program.pid} runs from here" in cli.words("log")


def test_every_image_is_listed_by_a_name_that_means_it(cli: Commands, program: Program) -> None:
    """The first of several is listed with its number: its session's name means the newest."""
    cli.checkpoint(program, "--name", "calm")
    assert [image["name"] for image in cli.succeed("images")["images"]] == ["calm"]
    cli.checkpoint(program)
    cli.checkpoint(program, "--name", "storm")
    listed = cli.succeed("images")["images"]
    assert [image["name"] for image in listed] == ["storm", "calm@2", "calm@1"]
    assert [image["session"] for image in listed] == ["storm", "calm", "calm"]
    for image in listed:
        shown = cli.succeed("show", image["name"])
        assert (shown["image"] == "calm") == (image["name"] == "calm@1")
    assert cli.log("storm") == [(1, "calm@2")]


def test_a_name_with_a_number_is_refused(cli: Commands, program: Program) -> None:
    """Numbers are lzy's to give; the process is not touched."""
    refused = cli.run("dump", str(program.pid), "--name", "calm@2", "--json")
    assert refused.returncode == 1
    assert "calm@2" in json.loads(refused.stdout)["error"]["message"]
    assert cli.fail("restore", "calm@2")["kind"] == "not_found"
    tell(program, "remember one")
    cli.checkpoint(program, "--name", "calm")
    error = cli.fail("restore", "calm@2")
    assert error["kind"] == "not_found"
    assert "lzy log calm" in error["remedy"]


@pytest.mark.parametrize("stage", ["dump.written", "dump.committed"])
def test_a_dumper_that_is_killed_confuses_no_numbers(
    cli: Commands, program: Program, stage: str
) -> None:
    """Whether the image came about or not, the next one has a number of its own."""
    cli.checkpoint(program, "--name", "calm")
    killed = cli.run("dump", str(program.pid), "--leave-running", kill_at=stage)
    assert killed.returncode == -signal.SIGKILL
    tell(program, "remember one")
    assert cli.checkpoint(program) == ("calm@2" if stage == "dump.written" else "calm@3")
    assert tell(program, "remember two") == ["one", "two"]


# -- forks -------------------------------------------------------------------------------------


def test_a_fork_lives_beside_the_original(cli: Commands, program: Program, tmp_path: Path) -> None:
    """The copy has the checkpoint's memory and pid; both go on by themselves, in two sessions."""
    tell(program, "remember one")
    tell(program, f"append {tmp_path / 'notes'}")
    cli.checkpoint(program, "--name", "calm")
    tell(program, "remember two")
    cli.checkpoint(program)
    with forked(cli, tmp_path / "copy", "calm@1") as copy:
        assert copy.report["session"] == "calm-fork"
        assert copy.report["namespace"] == "new"
        assert copy.pid != program.pid == copy.report["pid_in_namespace"]
        assert tell(copy, "remember other") == ["one", "other"]
        assert tell(program, "remember three") == ["one", "two", "three"]
        notes = " ".join(copy.report["notes"])
        assert "random" in notes
        assert str(tmp_path / "notes") in notes
        assert str(program.folder / "answers") not in notes  # re-pointed, so not shared
        assert tell(copy, "random") == tell(program, "random")

        assert cli.succeed("dump", str(copy.pid), "--leave-running")["image"] == "calm-fork"
        assert cli.checkpoint(program) == "calm@3"
        assert cli.log("calm-fork") == [(1, "calm@1")]
        assert cli.log("calm") == [(3, "calm@2"), (2, "calm@1"), (1, None)]
        with forked(cli, tmp_path / "second", "calm", "--name", "what-if") as second:
            assert second.report["session"] == "what-if"
            assert tell(second, "remember four") == ["one", "two", "three", "four"]
            error = cli.fail("fork", "calm", "--name", "what-if")
            assert (error["kind"], error["facts"]["pid"]) == ("busy", second.pid)
        with forked(cli, tmp_path / "third", "calm") as third:
            assert third.report["session"] == "calm-fork2"
    assert tell(program, "remember five") == ["one", "two", "three", "five"]


def test_a_fork_of_a_listener_needs_its_own_network(
    cli: Commands, program: Program, tmp_path: Path
) -> None:
    """A port cannot be listened on twice: refused with a way out, which works."""
    port = tell(program, "listen")
    cli.checkpoint(program, "--name", "calm")
    error = cli.fail("fork", "calm")
    assert error["kind"] == "busy"
    assert f"127.0.0.1:{port}" in error["message"]
    assert "--network new" in error["remedy"]
    with forked(cli, tmp_path / "copy", "calm", "--network", "new") as copy:
        assert copy.report["network"] == "new"
        assert tell(copy, "remember copy") == ["copy"]
        assert tell(program, "remember original") == ["original"]
        table = Path(f"/proc/{copy.pid}/net/tcp").read_text()
        assert f"0100007F:{port:04X} 00000000:0000 0A" in table
        assert os.stat(f"/proc/{copy.pid}/ns/net") != os.stat("/proc/self/ns/net")
        dumped = cli.succeed("dump", str(copy.pid))  # from the copy's network, which lzy enters
        assert dumped["image"] == "calm-fork"
        await_end(copy.pid)
    assert tell(program, "remember more") == ["original", "more"]


def test_a_fork_does_not_knock_at_the_originals_socket(
    cli: Commands, program: Program, tmp_path: Path
) -> None:
    """A socket's name in the file system stays the original's, who sees no visitor."""
    place = tmp_path / "program.socket"
    tell(program, f"serve {place}")
    cli.checkpoint(program, "--name", "calm")
    error = cli.fail("fork", "calm")
    assert (error["kind"], error["facts"]["path"]) == ("busy", str(place))
    assert error["remedy"]
    assert tell(program, "visitors") == 0
    assert place.is_socket()
    program.end()
    with forked(cli, tmp_path / "copy", "calm") as copy:  # now it is nobody's
        assert tell(copy, "visitors") == 0


def test_a_fork_leaves_the_original_its_lock(
    cli: Commands, program: Program, tmp_path: Path
) -> None:
    """A file that the original has locked is named, and stays locked by it."""
    place = tmp_path / "locked"
    tell(program, f"lock {place}")
    cli.checkpoint(program, "--name", "calm")
    error = cli.fail("fork", "calm")
    assert (error["kind"], error["facts"]["path"]) == ("busy", str(place))
    assert f"process {program.pid} has locked it" in error["message"]
    with open(place, "r+") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_two_forks_at_once_have_two_names(cli: Commands, program: Program, tmp_path: Path) -> None:
    """Names are chosen one after the other."""
    cli.checkpoint(program, "--name", "calm")
    quiet = ("--stdin", "/dev/zero", "--stdout", "/dev/null", "--stderr", "/dev/null")
    started = [cli.start("fork", "calm", "--json", *quiet) for _ in range(3)]
    reports = []
    for process in started:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err.decode()
        reports.append(json.loads(out))
    for report in reports:
        with suppress(ProcessLookupError):
            os.kill(report["pid"], signal.SIGKILL)
        await_end(report["pid"])
    assert {report["session"] for report in reports} == {"calm-fork", "calm-fork2", "calm-fork3"}


# -- differences -------------------------------------------------------------------------------


def test_diff_tells_what_was_written(cli: Commands, program: Program) -> None:
    """The pages that a program wrote between two checkpoints, in the mapping that holds them."""
    cli.checkpoint(program, "--name", "calm")
    tell(program, "touch 100")
    cli.checkpoint(program)
    cli.checkpoint(program)
    found = cli.succeed("diff", "calm@2")
    assert (found["before"], found["after"]) == ("calm@1", "calm@2")
    largest = max(found["mappings"], key=lambda mapping: mapping["changed_bytes"])
    assert 100 * 4096 <= largest["changed_bytes"] <= 110 * 4096
    assert found["changed_bytes"] < 4 << 20
    assert found["notes"] == []
    back = cli.succeed("diff", "calm@2", "calm@1")
    assert back["changed_bytes"] == found["changed_bytes"]
    assert (back["new_bytes"], back["gone_bytes"]) == (found["gone_bytes"], found["new_bytes"])
    assert cli.succeed("diff", "calm@1", "calm@1")["changed_bytes"] == 0
    assert "no page differs" in cli.words("diff", "calm@2", "calm@2")
    assert f"{largest['start']:#x}" in cli.words("diff", "calm@1", "calm")
    assert cli.fail("diff", "calm@1")["kind"] == "not_found"  # it grew from none
    assert [process["pid"] for process in found["processes"]] == [program.pid]


# -- removing ----------------------------------------------------------------------------------


def test_a_session_of_several_goes_only_when_that_is_said(cli: Commands, program: Program) -> None:
    """`lzy rm NAME` removes nothing of a session of many; NAME@2 is one; --all is all."""
    for _ in range(4):
        cli.checkpoint(program, "--name", "calm")
    cli.checkpoint(program, "--name", "storm")
    refused = cli.run("rm", "storm", "calm", "--json")
    assert refused.returncode == 2
    assert "calm@1 to calm@4" in json.loads(refused.stdout)["error"]["message"]
    assert len(cli.succeed("images")["images"]) == 5
    assert cli.succeed("rm", "calm@2")["removed"] == ["calm@2"]
    assert cli.fail("rm", "calm@1", "calm@2")["kind"] == "not_found"
    assert cli.succeed("rm", "calm@1")["removed"] == ["calm@1"]
    assert [entry["number"] for entry in cli.succeed("log", "calm")["checkpoints"]] == [4, 3]
    assert "(removed)" in cli.words("log", "calm")
    assert cli.succeed("rm", "calm", "storm", "--all")["removed"] == ["calm@3", "calm@4", "storm"]
    assert cli.succeed("images")["images"] == []
    cli.succeed("gc")
    tell(program, "remember one")
    assert cli.end(program) == "storm@2"  # what it grew from is gone; it is whole all the same
    cli.go_back(program, "storm")
    assert tell(program, "remember two") == ["one", "two"]


def test_forget_keeps_what_is_said(cli: Commands, program: Program) -> None:
    """A dry run removes nothing; what is in use and the newest stay; the estimate holds."""
    for _ in range(5):
        tell(program, "touch 50")
        cli.checkpoint(program, "--name", "calm")
    options = ("calm", "--keep-last", "2", "--keep-hourly", "1")
    dry = cli.succeed("forget", *options, "--dry-run")
    assert dry["removed"] == ["calm@3", "calm@2", "calm@1"]
    assert [kept["name"] for kept in dry["kept"]] == ["calm@5", "calm@4"]
    assert len(cli.log("calm")) == 5
    with open(cli.store / "images" / "calm@2.image", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as a pager does
        done = cli.succeed("forget", *options)
    assert done["removed"] == ["calm@3", "calm@1"]
    assert {"name": "calm@2", "reasons": ["in use"]} in done["kept"]
    collected = cli.succeed("gc")
    given_back = collected["removed_bytes"] + collected["hollowed_bytes"]
    assert abs(done["garbage_bytes"] - given_back) < 64 << 10
    assert cli.succeed("forget", "calm", "--keep-last", "1", "--gc")["collected"] is True
    assert [number for number, _ in cli.log("calm")] == [5]
    assert cli.succeed("verify", "calm")["image"] == "calm@5"
    for wrong in (("calm",), ("calm@5", "--keep-last", "1"), ("calm", "--keep-last", "0")):
        assert cli.run("forget", *wrong).returncode == 2
    assert cli.end(program) == "calm@6"


# -- tab ---------------------------------------------------------------------------------------


def offers(cli: Commands, *words: str) -> list[str]:
    """What bash offers for the last of `words`, cut as bash cuts them."""
    script = cli.words("completion", "bash")
    listed = " ".join(f"'{word}'" for word in words)
    ask = (
        f"{script}\nCOMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        '_lzy_completion lzy; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    answer = subprocess.run(
        ["bash", "--norc", "-c", ask],
        env={**os.environ, "LZY_HOME": str(cli.home), "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return answer.stdout.split()


def test_tab_completes_checkpoints(cli: Commands, program: Program) -> None:
    """A session by its name, its checkpoints behind an @, which bash takes for a word's end."""
    for _ in range(3):
        cli.checkpoint(program, "--name", "calm")
    cli.checkpoint(program, "--name", "calmer")
    assert offers(cli, "lzy", "restore", "ca") == ["calmer", "calm"]
    assert offers(cli, "lzy", "log", "calm") == ["calmer", "calm", "calm@3", "calm@2", "calm@1"]
    assert offers(cli, "lzy", "restore", "calm", "@") == ["3", "2", "1"]
    assert offers(cli, "lzy", "diff", "calm", "@", "1", "calm", "@", "2") == ["2"]
    assert offers(cli, "lzy", "diff", "calm", "@", "1", "calme") == ["calmer"]
    assert offers(cli, "lzy", "forget", "c") == ["calmer", "calm"]
    assert offers(cli, "lzy", "rm", "calm", "@", "1", "calm", "@") == ["3", "2"]
