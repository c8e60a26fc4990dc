"""People at terminals of their own, who run lzy there; and what they see."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pexpect
from living import PATIENCE_S, CommandLine
from service import Service

from lzy.agent.terminal.starting import Line
from lzy.checkpoint.errors import LzyError


class Person:
    """Somebody at a terminal of so many rows and columns, who runs lzy there."""

    def __init__(self, lzy: CommandLine, rows: int, columns: int, *arguments: str) -> None:
        environment = {**os.environ, "LZY_HOME": str(lzy.home), "TERM": "xterm", "NO_COLOR": "1"}
        command, *rest = [*lzy.executable, *arguments]
        self.terminal = pexpect.spawn(
            command, rest, env=environment, encoding="utf-8", timeout=PATIENCE_S,
            dimensions=(rows, columns), echo=True,
        )  # fmt: skip
        self.terminal.delaybeforesend = None
        self.terminal.delayafterclose = self.terminal.delayafterterminate = 0.02

    def sees(self, text: str) -> None:
        """Wait until that has been shown since what was seen last."""
        self.terminal.expect_exact(text)

    def types(self, text: str) -> None:
        self.terminal.send(text)

    def resizes(self, rows: int, columns: int) -> None:
        self.terminal.setwinsize(rows, columns)

    def leaves(self) -> None:
        """The detach key; lzy ends with status 0."""
        self.types("\x1dd")
        assert self.exit_status() == 0

    def exit_status(self) -> int:
        """How lzy ended."""
        self.terminal.expect_exact(pexpect.EOF)
        self.terminal.close()
        assert self.terminal.exitstatus is not None, self.terminal.signalstatus
        return int(self.terminal.exitstatus)


def find_keepers(home: Path) -> Iterator[int]:
    """Every living process that keeps a terminal of that home."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            folder = Path("/proc") / name
            is_keeper = b"lzy.agent.terminal.keeper" in (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
            if is_keeper and f"LZY_HOME={home}".encode() in environment:
                yield int(name)


def hang_up(keepers: Sequence[int]) -> None:
    """End both keepers of a terminal, so that neither can start the other again."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in keepers:
            with contextlib.suppress(OSError):
                if b"lzy.agent.terminal" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, number)


class Terminals:
    """The terminals of one home, whose keepers end with the test."""

    def __init__(self, lzy: CommandLine, service: Service) -> None:
        self.lzy, self.service = lzy, service
        self._people: list[Person] = []

    def person(self, *arguments: str, rows: int = 24, columns: int = 80) -> Person:
        self._people.append(Person(self.lzy, rows, columns, *arguments))
        return self._people[-1]

    def run(self, code: str, *options: str, name: str = "calm", **size: int) -> Person:
        """Somebody runs a program of Python's."""
        words = ("run", "--name", name, *options, "--", sys.executable, "-u", "-c", code)
        return self.person(*words, **size)

    def look(self, name: str = "calm") -> dict[str, Any]:
        with Line(name, self.lzy.home) as line:
            return line.ask("look")

    def screen(self, name: str = "calm") -> list[str]:
        """The rows that are shown, without empty ones below."""
        rows = list(self.look(name)["screen"])
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def await_screen(self, text: str, name: str = "calm") -> None:
        self.service.wait_until(lambda: text in "\n".join(self.screen(name)), f"it shows {text!r}")

    def keepers(self, name: str = "calm") -> tuple[int, int]:
        """The pids of the guard and of the host."""
        path = self.lzy.home / "terminals" / f"{name}.json"
        told = json.loads(path.read_text())
        return told["keeper_pid"], told["host_pid"]

    def await_other_keepers(self, before: tuple[int, int], name: str = "calm") -> tuple[int, int]:
        def renewed() -> bool:
            with contextlib.suppress(LzyError, ValueError, OSError):
                self.look(name)
                return not set(before) <= set(self.keepers(name))
            return False

        self.service.wait_until(renewed, "another keeper serves")
        return self.keepers(name)

    def close(self) -> None:
        for person in self._people:
            person.terminal.close(force=True)
        while keepers := list(find_keepers(self.lzy.home)):
            hang_up(keepers)
