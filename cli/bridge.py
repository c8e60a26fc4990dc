"""`python -m lzy.cli.bridge PLAN`: shows a program on the terminal that it has been taken from.

It is a console in the old terminal, of which the person notices nothing: what is there stays, keys
and windows pass, and the shell, which still waits for the program as its child, has the terminal
back when that stops or ends, with the settings that were there before. While the program is in the
background, or the shell has its prompt, nothing is read here and nothing written.

PLAN is a JSON object: `session`, `program` (pid), `shell` (pid; 0 for a program that led the
session of its terminal), `device` (the old terminal) and `kept` (the one that lzy keeps).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import termios
import time
from typing import Any, NamedTuple

from ..agent.terminal.frames import (
    ANSWER,
    CONTROL,
    HELLO,
    INPUT,
    OUTPUT,
    REPAINT,
    RESIZE,
    TOLD,
    Frames,
    pack,
    pack_json,
)
from ..checkpoint import proc
from ..checkpoint.errors import LzyError
from ..checkpoint.kept import find_kept
from ..checkpoint.linux.detached import set_name
from ..checkpoint.shell import Shell
from ..checkpoint.takeover import give_prompt
from .console import open_console
from .raw import STDIN, raw_mode, signals, window_size, write

_LOOKS_EVERY_S = 0.25
"""How often the window is asked for: only the group in the foreground hears of its changes."""
_AWAITS_FOREGROUND_S = 0.1
_TAKEN_WITHIN_S = 3.0
_COMES_BACK_WITHIN_S = 5.0
_SETTLES_WITHIN_S = 0.5
_UNTRACED_WITHIN_S = 5.0
_LEAVES = ("hibernating", "hibernated", "moving")


class Plan(NamedTuple):
    """What is bridged; see the module."""

    session: str
    program: int
    shell: int
    device: str
    kept: str


class Gone(Exception):
    """There is nothing to show here any more."""


class Bridge:
    """This process in the old terminal; `serve` is its life."""

    def __init__(self, plan: Plan, kept: int, woken: int, ready: int) -> None:
        self._plan = plan
        self._kept = kept
        self._woken = woken
        self._ready = ready
        self._shell = Shell(plan.shell, plan.program) if plan.shell else None
        self._start = proc.start_time(plan.program)
        self._frames = Frames()
        self._socket = self._connect()
        self._output: list[bytes] = []
        """What came while nothing may be written."""
        self._is_stale = False
        """Whether the terminal no longer shows what the program has drawn."""
        self._state = "running"
        self._answer: dict[str, Any] = {}
        self._window = window_size()

    def serve(self) -> None:
        """Until the program, the terminal or the session is gone."""
        with contextlib.suppress(Gone):
            while True:
                self._await_foreground()
                with raw_mode(True, lambda: give_prompt(self._plan.program)) as terminal:
                    self._come_forward(terminal.settings or [])
                    try:
                        stops, rest = self._pass()
                    finally:
                        with contextlib.suppress(termios.error):  # as the program has left them
                            terminal.settings = termios.tcgetattr(self._kept)
                self._push_back(rest)
                has_ended = self._program() == "ended"
                if self._shell:
                    self._shell.release()
                if has_ended:
                    return
                if stops:
                    with contextlib.suppress(OSError):
                        os.killpg(os.getpgid(self._plan.program), signal.SIGSTOP)

    def _connect(self) -> socket.socket:
        sock = open_console(self._plan.session)
        rows, columns = window_size()
        hello = {"rows": rows, "columns": columns, "paints": False}
        sock.sendall(pack_json(HELLO, hello))
        return sock

    def _program(self) -> str:
        """runs, stopped or ended."""
        try:
            stat = proc.stat(self._plan.program)
        except LzyError:
            return "ended"
        if stat[2] in "ZX" or int(stat[21]) != self._start:
            return "ended"
        return "stopped" if stat[2] == "T" else "runs"

    # -- in the background

    def _await_foreground(self) -> None:
        """Until the program has the terminal. Raises Gone."""
        if self._shell is None:
            return
        while True:
            program = self._program()
            if program == "ended" or not os.path.exists(f"/proc/{self._plan.shell}"):
                raise Gone
            if program == "runs" and self._shell.has_handed_over():
                return
            self._say_ready()
            heard: list[Any] = [self._socket, self._woken]
            ready = select.select(heard, [], [], _AWAITS_FOREGROUND_S)[0]
            if self._woken in ready:
                self._hear_signals()
            if self._socket in ready:
                self._hear_host()
                self._is_stale |= bool(self._output)
                self._output.clear()

    def _come_forward(self, settings: list[Any]) -> None:
        """What the terminal held for the program goes to it; what it has printed is shown."""
        if self._shell:
            self._shell.watch()
        waiting = array.array("i", [0])
        fcntl.ioctl(STDIN, termios.FIONREAD, waiting)
        typed = os.read(STDIN, waiting[0]) if waiting[0] else b""
        if settings[3] & termios.ICANON and settings[3] & termios.ECHO:
            begun = typed.rpartition(b"\n")[2].decode(errors="replace")
            write(b"\b \b" * len(begun))  # the other terminal echoes it again
        if self._is_stale:
            self._is_stale = False
            write(b"\x1b[999;1H" + b"\n" * window_size()[0])
            self._send(pack(REPAINT))
        if typed:
            self._send(pack(INPUT, typed))
        self._send_window()
        self._show()
        self._say_ready()

    def _say_ready(self) -> None:
        """Let who has started us know that the program has its terminal back."""
        if self._ready >= 0:
            with contextlib.suppress(OSError):
                os.write(self._ready, b"s")
            os.close(self._ready)
            self._ready = -1

    # -- in the foreground

    def _pass(self) -> tuple[bool, bytes]:
        """Pass keys, output and windows until the program is no longer to have the terminal.

        Whether it is to be stopped, and what was typed behind that. Raises Gone.
        """
        timeout_s = _LOOKS_EVERY_S if self._shell else None
        while True:
            heard: list[Any] = [STDIN, self._socket, self._woken]
            ready = select.select(heard, [], [], timeout_s)[0]
            if self._socket in ready:
                self._hear_host()
                self._show()
            if self._woken in ready:
                self._hear_signals()
            if self._shell and self._shell.is_held():
                if self._program() != "runs":
                    self._settle()
                    return False, b""
                self._shell.go_on()
            if STDIN in ready:
                typed = self._read()
                if self._shell and (at := self._find_suspend(typed)) >= 0:
                    if at:
                        self._send(pack(INPUT, typed[:at]))
                    self._settle()
                    return True, typed[at + 1 :]
                self._send(pack(INPUT, typed))
            if self._shell and not ready and self._program() != "runs":  # it could not be held
                self._settle()
                return False, b""
            self._send_window()

    def _read(self) -> bytes:
        try:
            typed = os.read(STDIN, 4096)
        except OSError as error:
            raise Gone from error
        if not typed:
            raise Gone
        return typed

    def _hear_signals(self) -> None:
        told = set(os.read(self._woken, 512))
        if told & {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}:
            raise Gone

    def _hear_host(self) -> None:
        """Take what the host sends; connect again to another if it is gone."""
        try:
            data = self._socket.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            self._come_back()
            return
        for kind, content in self._frames.feed(data):
            if kind == OUTPUT:
                self._output.append(content)
            elif kind == ANSWER:
                self._answer = json.loads(content)
            elif kind == TOLD:
                self._hear(json.loads(content))

    def _come_back(self) -> None:
        self._socket.close()
        deadline = time.monotonic() + _COMES_BACK_WITHIN_S
        while time.monotonic() < deadline and find_kept(self._plan.session):
            with contextlib.suppress(OSError):
                self._frames, self._socket = Frames(), self._connect()
                return
            time.sleep(0.05)
        raise Gone

    def _hear(self, told: dict[str, Any]) -> None:
        """How the session is. Raises Gone when it has ended and no shell waits for that."""
        before, self._state = self._state, told["state"]
        if self._shell:
            return
        words = ""
        if self._state == "ended":
            self._show()
            raise Gone
        if failure := told.get("failure"):
            words = f"{self._plan.session} cannot be woken: {failure}"
        elif self._state == "hibernated":
            words = f"{self._plan.session} hibernates; a key wakes it"
        elif self._state == "waking" and before == "hibernated":
            words = f"{self._plan.session} wakes"
        if words:
            shown = words[: max(window_size()[1] - 4, 10)].encode()
            write(b"\x1b7\x1b[999;1H\x1b[0;7m " + shown + b" \x1b[0m\x1b[K\x1b8")

    def _show(self) -> None:
        if self._output:
            write(b"".join(self._output))
            self._output.clear()

    def _settle(self) -> None:
        """The program has stopped or ended: show all that it has printed before."""
        with contextlib.suppress(Gone):
            looks = 0 if self._state == "ended" else 2
            for _ in range(looks):  # what it wrote last may still be on its way to the host
                self._answer = {}
                self._send(pack_json(CONTROL, {"do": "look"}))
                deadline = time.monotonic() + _SETTLES_WITHIN_S
                while not self._answer and (left_s := deadline - time.monotonic()) > 0:
                    if select.select([self._socket], [], [], left_s)[0]:
                        self._hear_host()
            self._show()
        has_left = self._program() == "ended" and self._state in _LEAVES
        if has_left or (self._answer.get("is_alternate") and self._program() != "ended"):
            write(self._answer.get("modes_off", "").encode())
            self._is_stale = True
        if has_left:
            session = self._plan.session
            write(f"\r\nlzy: {session} hibernates; lzy console {session} wakes it\r\n".encode())

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.sendall(frame)
        except OSError:
            self._come_back()

    def _send_window(self) -> None:
        window = window_size()
        if window != self._window and min(window) > 0:
            self._window = window
            self._send(pack_json(RESIZE, {"rows": window[0], "columns": window[1]}))

    # -- job control

    def _find_suspend(self, typed: bytes) -> int:
        """Where in it the key stands that is to stop the program; -1 if it is none of ours.

        The program has a session of its own, in which nobody would continue it: so the kernel
        would drop that signal, setpgid(2). One that handles it itself gets the key.
        """
        settings = termios.tcgetattr(self._kept)
        key = settings[6][termios.VSUSP]
        if not settings[3] & termios.ISIG or key == b"\0" or key not in typed:
            return -1
        program = self._plan.program
        try:
            status = self._untraced_status()
            stat = proc.stat(program)
        except LzyError:
            return -1
        bit = 1 << signal.SIGTSTP - 1
        if any(int(status[name], 16) & bit for name in ("SigBlk", "SigIgn", "SigCgt")):
            return -1
        if stat[7] != stat[4]:  # a group of its own making stands in front of it
            return -1
        if settings[3] & termios.ECHO:
            write(b"^" + bytes([key[0] ^ 0x40]))
        return typed.index(key)

    def _untraced_status(self) -> dict[str, str]:
        """/proc/PID/status of the program; in a checkpoint all signals are blocked for a moment."""
        deadline = time.monotonic() + _UNTRACED_WITHIN_S
        while True:
            status = proc.status(self._plan.program)
            if status["TracerPid"] == "0" or time.monotonic() > deadline:
                return status
            time.sleep(0.005)

    def _push_back(self, typed: bytes) -> None:
        """What was typed behind that key is for the shell."""
        with contextlib.suppress(OSError):  # TIOCSTI is forbidden here, tty_ioctl(4)
            for byte in typed:
                fcntl.ioctl(STDIN, termios.TIOCSTI, bytes([byte]))


def main() -> None:
    """Say that we are ready, wait until who started us has taken the program, and serve."""
    plan = Plan(**json.loads(sys.argv[1]))
    set_name("lzy-bridge")
    go, ready = os.dup(0), os.dup(1)
    old = os.open(plan.device, os.O_RDWR | os.O_NOCTTY)
    for number in (0, 1):
        os.dup2(old, number)
    os.close(old)
    kept = os.open(plan.kept, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    with signals(signal.SIGCHLD) as woken:
        bridge = Bridge(plan, kept, woken, ready)
        os.write(ready, b"r")
        os.read(go, 1)  # it ends, whatever becomes of the other
        os.close(go)
        if not _is_taken(plan.program, os.fstat(kept).st_rdev):
            return
        if not plan.shell:
            os.close(os.open(plan.device, os.O_RDWR))  # ours from now on: its signals reach us
        bridge.serve()


def _is_taken(program: int, terminal: int) -> bool:
    deadline = time.monotonic() + _TAKEN_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if int(proc.stat(program)[6]) == terminal:
                return True
        except LzyError:
            return False
        time.sleep(0.01)
    return False


if __name__ == "__main__":
    main()
