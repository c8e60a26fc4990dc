"""`python -m lzy.cli.bridge PLAN`: shows a program on the terminal that it has been taken from.

It is a console in the old terminal, of which the person notices nothing: what is there stays, keys
and windows pass, and the shell, which still waits for the program as its child, has the terminal
back when that stops or ends, with the settings that were there before. While the program is in the
background, or the shell has its prompt, nothing is read here and nothing written.

When the session hibernates in the foreground, the shell goes on waiting for it (`stepparent`), and
a key wakes it: it is nobody's child here from then on, and how it is the session's terminal tells.

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
import sys
import termios
import time
from typing import Any, NamedTuple

from ..agent.terminal.frames import REPAINT, RESIZE, pack, pack_json
from ..checkpoint import proc
from ..checkpoint.errors import LzyError
from ..checkpoint.linux.detached import set_name
from ..checkpoint.shell import Shell
from ..checkpoint.stepparent import STOPPED, Stepparent
from ..checkpoint.takeover import give_prompt
from .link import Gone, Link
from .notice import Notice
from .raw import STDIN, raw_mode, signals, window_size, write

_LOOKS_EVERY_S = 0.25
"""How often the window is asked for: only the group in the foreground hears of its changes."""
_AWAITS_FOREGROUND_S = 0.1
_TAKEN_WITHIN_S = 3.0
_UNTRACED_WITHIN_S = 5.0
_HEARS_WITHIN_S = 2.0
_IS_TOLD_WITHIN_S = 10.0
"""A shell that is traced is held when the kernel tells it; that takes long where there is much to
do, and never comes where it asks for nothing."""


class Plan(NamedTuple):
    """What is bridged; see the module."""

    session: str
    program: int
    shell: int
    device: str
    kept: str


class Bridge:
    """This process in the old terminal; `serve` is its life."""

    def __init__(self, plan: Plan, kept: int, woken: int, ready: int) -> None:
        self._plan = plan
        self._kept = kept
        self._woken = woken
        self._ready = ready
        self._shell = Shell(plan.shell, plan.program) if plan.shell else None
        self._step: Stepparent | None = None
        """Once the program is not the shell's child any more."""
        self._start = proc.start_time(plan.program)
        self._link = Link(plan.session)
        self._notice = Notice(plan.session, self._link)
        self._is_stale = False
        """Whether the terminal no longer shows what the program has drawn."""
        self._window = window_size()
        self._gone_since_s = 0.0

    def serve(self) -> None:
        """Until the program, the terminal or the session is gone."""
        with contextlib.suppress(Gone):
            while True:
                self._await_foreground()
                with raw_mode(True, self._give_prompt) as terminal:
                    self._come_forward(terminal.settings or [])
                    try:
                        stops, rest = self._pass()
                    except Gone as gone:
                        if gone.args:
                            write(f"\r\nlzy: {gone}\r\n".encode())
                        raise
                    finally:
                        with contextlib.suppress(termios.error):  # as the program has left them
                            terminal.settings = termios.tcgetattr(self._kept)
                self._push_back(rest)
                has_ended = self._program() == "ended"
                if self._shell and not self._step:
                    self._shell.release()
                if stops and self._lives_here():
                    with contextlib.suppress(OSError):
                        os.killpg(os.getpgid(self._plan.program), signal.SIGSTOP)
                    self._await_stop()
                if self._step:
                    self._tell_shell(STOPPED if stops else self._link.end)
                if has_ended:
                    return

    def _program(self) -> str:
        """runs, stopped or ended; as a job of the shell."""
        if self._step:
            if self._link.end is not None:
                return "ended"
            return "stopped" if self._step.is_suspended else "runs"
        try:
            stat = proc.stat(self._plan.program)
        except LzyError:
            return "ended"
        if stat[2] in "ZX" or int(stat[21]) != self._start:
            return "ended"
        return "stopped" if stat[2] == "T" else "runs"

    def _await_stop(self) -> None:
        """Until it has stopped, or its shell knows: before, the foreground seems to be its own.

        That takes as long as a checkpoint does, or until it is given a processor.
        """
        deadline = time.monotonic() + _UNTRACED_WITHIN_S
        while (
            self._program() == "runs"
            and self._shell
            and self._shell.has_handed_over()
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)

    def _give_prompt(self) -> None:
        """We are killed: let the shell look at its job. Of one that is not its child it does."""
        with contextlib.suppress(LzyError):
            if proc.start_time(self._plan.program) == self._start:
                give_prompt(self._plan.program)

    def _tell_shell(self, status: int | None) -> None:
        """Tell it how the program is; when that has ended it is our affair no longer."""
        if not self._step or not self._shell or status is None:
            return
        self._step.tell(status)
        if self._link.end is None:
            return
        deadline = time.monotonic() + _HEARS_WITHIN_S
        while not self._step.has_told and (left_s := deadline - time.monotonic()) > 0:
            if select.select([self._woken], [], [], left_s)[0]:
                os.read(self._woken, 512)
            self._step.attend()
        self._shell.release()

    def _lives_here(self) -> bool:
        """Whether the process of that pid is the program: perhaps it sleeps, or has moved."""
        if self._link.has_moved:
            return False
        with contextlib.suppress(LzyError, OSError):
            return int(proc.stat(self._plan.program)[6]) == os.fstat(self._kept).st_rdev
        return False

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
            heard: list[Any] = [self._link, self._woken]
            ready = select.select(heard, [], [], _AWAITS_FOREGROUND_S)[0]
            if self._woken in ready:
                self._hear_signals()
            if self._step:
                self._step.attend()
                if self._link.end is not None:
                    self._tell_shell(self._link.end)
                    raise Gone
            if self._link in ready:
                self._link.hear()
                self._is_stale |= bool(self._link.take_output())

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
            self._link.send(pack(REPAINT))
        if typed:
            self._link.type(typed)
        self._send_window()
        self._show()
        self._say_ready()
        self._notice.update()

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
            heard: list[Any] = [STDIN, self._link, self._woken]
            ready = select.select(heard, [], [], timeout_s)[0]
            if self._link in ready:
                self._link.hear()
                self._show()
                if self._link.end is not None and not self._shell:
                    raise Gone
            if self._woken in ready:
                self._hear_signals()
            while self._link.news is not None:
                self._notice.update()
            if self._step:
                self._step.attend()
                if self._link.end is not None:
                    self._settle()
                    return False, b""
            elif self._shell and self._shell.is_held():
                with contextlib.suppress(LzyError):
                    self._untraced_status()  # in a checkpoint nobody sees whether it has stopped
                if self._program() != "runs":
                    self._settle()
                    if not self._link.is_asleep and not self._link.has_moved:
                        return False, b""
                    self._step = Stepparent(self._shell)
                    self._step.attend()
                    self._notice.update()
                else:
                    self._shell.go_on()
            if STDIN in ready:
                typed = self._read()
                if self._shell and (at := self._find_suspend(typed)) >= 0:
                    if at:
                        self._link.type(typed[:at])
                    self._settle()
                    return True, typed[at + 1 :]
                self._link.type(typed)
            if not ready and self._is_missed():
                self._settle()
                if self._link.is_asleep:
                    session = self._plan.session
                    words = f"lzy: {session} hibernates; lzy console {session} wakes it"
                    write(f"\r\n{words}\r\n".encode())
                return False, b""
            self._send_window()

    def _show(self) -> None:
        """What the program has printed, in place of what tells of its sleep."""
        if output := self._link.take_output():
            self._notice.clear()
            write(output)

    def _is_missed(self) -> bool:
        """Whether the program has stopped or ended, and its shell could not be held then."""
        if not self._shell or self._program() == "runs":
            self._gone_since_s = 0.0
            return False
        self._gone_since_s = self._gone_since_s or time.monotonic()
        waits_s = _IS_TOLD_WITHIN_S if self._shell.is_traced else 0.0
        return time.monotonic() - self._gone_since_s >= waits_s

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

    def _settle(self) -> None:
        """The program has stopped or ended: show all that it has printed before."""
        with contextlib.suppress(Gone):
            answer: dict[str, Any] = {}
            looks = 0 if self._link.state == "ended" else 2
            for _ in range(looks):  # what it wrote last may still be on its way to the host
                answer = self._link.look()
            self._notice.clear()
            self._show()
            if answer.get("is_alternate") and self._program() != "ended":
                write(answer.get("modes_off", "").encode())
                self._is_stale = True

    def _send_window(self) -> None:
        window = window_size()
        if window != self._window and min(window) > 0:
            self._window = window
            self._link.send(pack_json(RESIZE, {"rows": window[0], "columns": window[1]}))

    # -- job control

    def _find_suspend(self, typed: bytes) -> int:
        """Where in it the key stands that is to stop the program; -1 if it is none of ours.

        The program has a session of its own, in which nobody would continue it: so the kernel
        would drop that signal, setpgid(2). One that handles it itself gets the key.
        """
        if self._link.has_moved:  # what is set there is not known here
            return typed.find(b"\x1a")
        settings = termios.tcgetattr(self._kept)
        key = settings[6][termios.VSUSP]
        if not settings[3] & termios.ISIG or key == b"\0" or key not in typed:
            return -1
        if not self._link.is_asleep and self._takes_suspend():
            return -1
        if settings[3] & termios.ECHO:
            write(b"^" + bytes([key[0] ^ 0x40]))
        return typed.index(key)

    def _takes_suspend(self) -> bool:
        """Whether the program handles that key itself."""
        if not self._lives_here():
            return False
        try:
            status = self._untraced_status()
            stat = proc.stat(self._plan.program)
        except LzyError:
            return True
        bit = 1 << signal.SIGTSTP - 1
        if any(int(status[name], 16) & bit for name in ("SigBlk", "SigIgn", "SigCgt")):
            return True
        return stat[7] != stat[4]  # a group of its own making stands in front of it

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
