"""A living program to talk to, and lzy as a user calls it: what tests of whole programs work with.

A program is a real child that reads commands from one FIFO and answers on another. Both have
names, so whoever restores it opens them anew, and neither side need know that it was away.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = Path(__file__).parent / "programs"
PATIENCE_S = float(os.environ.get("LZY_TEST_PATIENCE_S", "30"))
"""How long is waited for what ought to happen at once; a busy machine takes longer."""

Proof = dict[str, Any]


def wait_readable(descriptors: list[int], timeout_s: float) -> list[int]:
    """Those of the descriptors (pidfds among them) that have something to say, within the time."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(timeout_s * 1000)]


def reap(pid: int) -> None:
    """Take in the zombie `pid` when it is our child, born or adopted."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def reap_orphans() -> None:
    """Take in zombies that came to us when their parent ended, as init does for others.

    While one of them is there the number of its group and session is not free.
    """
    for child in list_children(os.getpid(), descend=False):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            if stat[0] == "Z" and int(stat[3]) not in (os.getsid(0), child):
                reap(child)


def end_process(pid: int, pidfd: int) -> None:
    """Kill the process and wait until it has gone, our child or not."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert wait_readable([pidfd], PATIENCE_S), f"process {pid} does not die"
    reap(pid)


def end_descendants(pid: int, pidfd: int) -> list[int]:
    """Kill all below a process, which is stopped first: whoever is stopped makes no children.

    Their pids.
    """
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    stopped: dict[int, int] = {}
    try:
        while new := [child for child in list_children(pid) if child not in stopped]:
            for child in new:
                with contextlib.suppress(ProcessLookupError):
                    stopped[child] = os.pidfd_open(child)
                    signal.pidfd_send_signal(stopped[child], signal.SIGSTOP)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for child, descriptor in stopped.items():
            end_process(child, descriptor)
        assert wait_readable([pidfd], PATIENCE_S), f"process {pid} does not die"
        reap(pid)
        for child in stopped:  # once more: they were others' before, and are ours now
            reap(child)
        return list(stopped)
    finally:
        for descriptor in stopped.values():
            os.close(descriptor)


def kill_lzy(pid: int) -> bool:
    """kill -9 process `pid` if it is one of lzy's daemons; whether it was.

    The number that a journal or a report tells may be anybody's by the time it is used.
    """
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        pidfd = os.pidfd_open(pid)
        try:
            if Path(f"/proc/{pid}/comm").read_text().startswith("lzy-"):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return True
        finally:
            os.close(pidfd)
    return False


def await_end(pid: int, timeout_s: float = PATIENCE_S) -> None:
    """Wait until the process `pid`, which may be gone already, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert wait_readable([pidfd], timeout_s), f"process {pid} does not end"
        reap(pid)
    finally:
        os.close(pidfd)


def unmount(place: Path) -> None:
    """Once those who have just ended, a pager say, have let go of it."""
    deadline = time.monotonic() + PATIENCE_S
    while (done := subprocess.run(["umount", place], capture_output=True)).returncode:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.02)


class Case(NamedTuple):
    """A program and its arguments (`{folder}` is a folder of its own)."""

    name: str
    arguments: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        words = [word for word in self.arguments if "{" not in word]
        return "-".join([self.name, *words])


class Program:
    """A program of `tests/programs` (or any command) that was started and is talked to.

    `pid` and `pidfd` are those of the process that answers at present: the child that was
    started, or the one restored in its place (`adopt`).
    """

    def __init__(self, folder: Path, command: list[str], **popen: Any) -> None:
        self.folder, self.command = folder, command
        for name in ("commands", "answers"):
            os.mkfifo(folder / name)
        # Held open for both ways, so that neither side ever sees an end of file.
        self._commands = os.open(folder / "commands", os.O_RDWR | os.O_CLOEXEC)
        self._answers = os.open(folder / "answers", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._heard = b""
        self.errors = folder / "errors"
        with (
            open(folder / "commands", "rb", buffering=0) as stdin,
            open(folder / "answers", "wb", buffering=0) as stdout,
            open(self.errors, "ab") as stderr,
        ):
            popen.setdefault("start_new_session", True)
            self.child = subprocess.Popen(
                command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=folder, **popen
            )
        self.pid = self.child.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.killed: set[int] = set()
        """Who was ended in the midst of something, here: what they made just then stays."""

    @property
    def is_alive(self) -> bool:
        return not wait_readable([self.pidfd], 0)

    def say(self, line: str) -> None:
        os.write(self._commands, line.encode() + b"\n")

    def hear(self, timeout_s: float = PATIENCE_S) -> str:
        """The next line that the program says."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            left_s = max(0.0, deadline - time.monotonic())
            told = wait_readable([self._answers, self.pidfd], left_s)
            if self._answers in told:
                self._heard += os.read(self._answers, 65536)
            else:
                state = "has died" if told else f"is silent for {timeout_s:.0f} s"
                raise AssertionError(f"process {self.pid} {state}: {self.describe()}")
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def ask(self, line: str, timeout_s: float = PATIENCE_S) -> str:
        self.say(line)
        return self.hear(timeout_s)

    def describe(self) -> str:
        """Where its threads are and what it complained about, for a failure's message."""
        where = []
        for task in sorted(Path(f"/proc/{self.pid}/task").glob("*"))[:8]:
            with contextlib.suppress(OSError):
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                syscall = (task / "syscall").read_text().split()[0]
                where.append(f"{task.name} {state} in system call {syscall}")
        return f"{'; '.join(where)}\n{self.errors.read_text(errors='replace')[-3000:]}"

    def await_ready(self) -> Program:
        line = self.hear()
        assert line == "ready", f"{line}\n{self.describe()}"
        return self

    def prove(self, timeout_s: float = 2 * PATIENCE_S) -> Proof:
        """Ask for the proof, and have every part of it true."""
        line = self.ask("prove", timeout_s)
        while line == "pong":  # To a `ping` that was asked of one who died before.
            line = self.hear(timeout_s)
        proof: Proof = json.loads(line)
        failures = find_failures(proof, self.command)
        assert not failures, "\n".join([*failures, self.describe()])
        return proof

    def adopt(self, pid: int) -> None:
        """From now on the process `pid` answers; the one before must have ended."""
        assert not self.is_alive
        self.child.wait(PATIENCE_S)  # A zombie would keep the pid.
        pidfd = os.pidfd_open(pid)
        os.close(self.pidfd)
        self.pid, self.pidfd = pid, pidfd

    def await_end(self, timeout_s: float = PATIENCE_S) -> None:
        assert wait_readable([self.pidfd], timeout_s), f"process {self.pid} does not end"
        if self.pid == self.child.pid:
            self.child.poll()
        reap(self.pid)
        reap_orphans()

    def end(self) -> None:
        """End whichever process answers now, with its descendants; it may have gone already."""
        self.killed |= {self.pid, *end_descendants(self.pid, self.pidfd)}
        end_process(self.pid, self.pidfd)
        self.child.wait(PATIENCE_S)
        reap_orphans()

    def close(self) -> None:
        self.end()
        for descriptor in (self.pidfd, self._commands, self._answers):
            os.close(descriptor)


@functools.cache
def run_uninterrupted(command: tuple[str, ...], arguments: tuple[str, ...]) -> Any:
    """What the same program answers when it runs to that point in one go."""
    words = [*command, *arguments]
    run = subprocess.run(words, capture_output=True, timeout=4 * PATIENCE_S, check=True)
    return json.loads(run.stdout)


def find_failures(proof: Proof, command: list[str]) -> list[str]:
    """What a proof says is wrong; an `answer` is compared with an uninterrupted run."""
    facts = dict(proof)
    arguments, answer = facts.pop("arguments", None), facts.pop("answer", None)
    failures = [f"{key}: {value}" for key, value in facts.items() if value is not True]
    if arguments is not None:
        expected = run_uninterrupted(tuple(command), tuple(arguments))
        if answer != expected:
            failures.append(f"answer: {answer}, uninterrupted: {expected}")
    return failures


class Holds:
    """Stages (`lzy.checkpoint.stages`) at which the next who comes waits until it is let go."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.environment = {"LZY_TEST_HOLD_IN": str(folder)}

    def hold(self, stage: str) -> None:
        (self._folder / stage).touch()

    def is_held(self, stage: str) -> bool:
        """Whether somebody waits there."""
        return (self._folder / f"{stage}.held").exists()

    def let_go(self) -> None:
        """Who waits goes on, and nobody is held any more."""
        for path in self._folder.iterdir():
            path.unlink()


class CommandLine:
    """lzy as a user calls it: a command of its own, with a home and a store of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.store = home, home / "store"
        self.environment: dict[str, str] = {}
        """Variables for every command, and for the daemons that it starts."""
        script = Path(sys.executable).with_name("lzy")
        self.executable = (
            [str(script)]
            if script.exists()
            else [sys.executable, "-c", "from lzy.cli import main; main()"]
        )

    def start(self, *arguments: str, kill_at: str | None = None) -> subprocess.Popen[bytes]:
        """Start lzy; `kill_at` names the stage (`lzy.checkpoint.stages`) at which it dies."""
        environment = {**os.environ, "LZY_HOME": str(self.home), **self.environment}
        if kill_at is not None:
            environment["LZY_TEST_KILL_AT"] = kill_at
        return subprocess.Popen(
            [*self.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self, *arguments: str, kill_at: str | None = None, timeout_s: float = 2 * PATIENCE_S
    ) -> subprocess.CompletedProcess[bytes]:
        process = self.start(*arguments, kill_at=kill_at)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"lzy {' '.join(arguments)} hangs") from None
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def succeed(self, *arguments: str) -> dict[str, Any]:
        """Run it with `--json`; it must succeed."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"lzy {' '.join(arguments)}: {done.stderr.decode()}"
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def fail(self, *arguments: str) -> dict[str, Any]:
        """Run it with `--json`; it must refuse in words (no traceback); the error's document."""
        done = self.run(*arguments, "--json")
        assert done.returncode > 2, (done.returncode, done.stdout, done.stderr.decode())
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        error: dict[str, Any] = json.loads(done.stdout)["error"]
        assert error["exit_status"] == done.returncode
        return error

    def dump(self, program: Program, name: str = "image", *options: str) -> dict[str, Any]:
        """Dump the program; unless it was left running it has ended (and is reaped) afterwards."""
        where = ("--store", str(self.store), "--name", name)
        report = self.succeed("dump", str(program.pid), *where, *options)
        if "--leave-running" in options:
            assert program.is_alive, program.describe()
        else:
            program.await_end()
        return report

    def restore(self, program: Program, name: str = "image", *options: str) -> dict[str, Any]:
        """Restore the image, and let the process that comes be the one that answers."""
        report = self.succeed("restore", name, "--store", str(self.store), *options)
        program.adopt(report["pid"])
        return report

    def await_pagers(self, timeout_s: float = 2 * PATIENCE_S) -> None:
        """Wait until all memory of all processes is in, and nothing of their pagers is in them."""
        deadline = time.monotonic() + timeout_s
        while self.succeed("pager", "--status")["pagers"]:
            assert time.monotonic() < deadline, "a pager stays"
            time.sleep(0.05)


def list_children(pid: int, *, descend: bool = True) -> list[int]:
    """Children of all threads of the process, and their children in turn."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:  # it has just been waited for
        return found
    for task in tasks:
        with contextlib.suppress(OSError):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                found += [child, *(list_children(child) if descend else [])]
    return found


def describe_process(pid: int) -> str:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        stat = Path(f"/proc/{pid}/stat").read_text()
        return f"{pid} {stat[stat.index('(') :].split(')')[0]}) {command}"
    return f"{pid} (gone)"
