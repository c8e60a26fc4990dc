"""Starting what is measured, hearing from it, and leaving nothing of it behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUBJECT = Path(__file__).with_name("subject.py")
PATIENCE_S = 300


class Subject:
    """`subject.py` as a child of ours, through all its lives; a context manager.

    Its log is a file, so that hearing from it needs nothing that a dump or a restore would touch.
    """

    def __init__(
        self, folder: Path, kind: str, size_bytes: int, *, program: Path = SUBJECT
    ) -> None:
        folder.mkdir()
        self.log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(self.log), kind, str(size_bytes)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "errors").open("w"),
        )
        self.pid = self._process.pid
        try:
            self.wait_for("ready", 0)
        except BaseException:
            self.end()
            raise

    def said(self, word: str) -> list[list[str]]:
        """The whole lines of the log that begin with `word`, as the words behind it."""
        text = self.log.read_text() if self.log.exists() else ""
        lines = text.splitlines()[: text.count("\n")]
        return [line.split()[1:] for line in lines if line.startswith(word + " ")]

    def wait_for(self, word: str, known: int) -> list[str]:
        """The first line with `word` after the `known` ones there were."""
        deadline = time.monotonic() + PATIENCE_S
        while len(lines := self.said(word)) <= known:
            if time.monotonic() > deadline or not is_alive(self.pid):
                errors = self.log.with_name("errors").read_text()
                raise RuntimeError(f"the subject says no {word!r}: {errors or 'it ended'}")
            time.sleep(0.005)
        return lines[known]

    def ask(self, number: signal.Signals, word: str) -> list[str]:
        """Send a signal; what it answers."""
        known = len(self.said(word))
        os.kill(self.pid, number)
        return self.wait_for(word, known)

    def first_action_after(self, moment_ns: int) -> int:
        """When it first read the clock after `moment_ns`, having stood still at that moment."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for last, now in self.said("gap"):
                if int(last) < moment_ns <= int(now):
                    return int(now)
            if not is_alive(self.pid):
                break
            time.sleep(0.002)
        raise RuntimeError(f"the subject never went on; {is_alive(self.pid)=}")

    def longest_gap_s(self, began_ns: int, ended_ns: int) -> float:
        """The longest time it stood still between two moments."""
        time.sleep(0.05)  # the line of a gap is written after the gap
        gaps = [(int(last), int(now)) for last, now in self.said("gap")]
        found = [now - last for last, now in gaps if last < ended_ns and now > began_ns]
        return max(found, default=0) / 1e9

    def reap(self) -> None:
        """Take the end of a process that a dump has ended."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def end(self) -> None:
        """Kill it, whichever of its lives it is in, and reap it."""
        end_lives(self._process)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        shutil.rmtree(self.log.parent, ignore_errors=True)


class Command:
    """A finished `lzy` command: its report, its wall time, its peak memory."""

    def __init__(self, *arguments: str) -> None:
        beside = Path(sys.executable).with_name("lzy")
        program = str(beside) if beside.exists() else shutil.which("lzy") or "lzy"
        self.began_ns = time.monotonic_ns()
        process = subprocess.Popen([program, *arguments, "--json"], stdout=subprocess.PIPE)
        assert process.stdout
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        self.wall_s = (time.monotonic_ns() - self.began_ns) / 1e9
        self.peak_bytes = usage.ru_maxrss * 1024
        if process.returncode:
            raise RuntimeError(f"lzy {' '.join(arguments)} failed")
        self.report: dict[str, Any] = json.loads(printed)


def end_lives(process: subprocess.Popen[bytes]) -> None:
    """Kill a child, be it the one that was started or the one that came back, and reap it."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        if os.waitpid(process.pid, os.WNOHANG)[0] == 0:  # alive: the number is no other's
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
    process.returncode = 0  # reaped here; Popen must not wait for that number again


def is_alive(pid: int) -> bool:
    """Whether `pid` exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def memory_with_children(pid: int) -> int:
    """Bytes of memory of a process and its children, shared pages shared out (Pss, proc(5))."""
    total = 0
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in [str(pid), *children]:
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


@contextlib.contextmanager
def watching(pid: int) -> Iterator[list[int]]:
    """Note `memory_with_children` some fifty times a second while the block runs."""
    seen = [memory_with_children(pid)]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen.append(memory_with_children(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def follow_to_the_end(pid: int) -> int:
    """Wait until `pid` (no child of ours) has ended; the most memory it had, in bytes."""
    peak = 0
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return peak
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not select.select([descriptor], [], [], 0.005)[0]:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        peak = int(line.split()[1]) * 1024
            if time.monotonic() > deadline:
                raise RuntimeError(f"pager {pid} does not leave")
    finally:
        os.close(descriptor)
    return peak
