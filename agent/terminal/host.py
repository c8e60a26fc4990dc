"""Serves one terminal: what the program prints goes to the screen and to whoever is connected.

What is typed goes to the program, unless input is held: while the session hibernates, or is about
to, it waits here; the first key has the agent wake the session, and all of it is delivered once
when the program runs again. One thread, one loop; nothing in it waits for anybody.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import struct
import time
from typing import Any, NoReturn

from ...checkpoint.kept import kept_path
from ...checkpoint.linux.detached import set_name
from .asking import Asked
from .audience import Audience
from .consoles import Console
from .display import Display
from .frames import ANSWER, CONTROL, HELLO, INPUT, REPAINT, RESIZE, TOLD, pack_json, socket_path
from .keeper import Holdings, guard
from .loop import Loop
from .program import Program
from .tokens import QUERY
from .unread import put_unread, take_unread

_MOST_INPUT_BYTES = 64 << 10
_ASK_AGAIN_S = 0.3
_ASK_FOR_S = 10.0
_AWAITED_S = 20.0
_FOLLOWS_WITHIN_S = 60.0
_GOES_FIRST_S = 1.0
_LIVING = ("running", "dozing")
_ENDED = ("ended", "failed")


class Host:
    """The process that serves; `line` is its line to the guard.

    It knows how the session is, as the agent says or as its program shows, and what follows of
    that for what is typed.
    """

    def __init__(self, holdings: Holdings, line: socket.socket, state: str) -> None:
        self._own = holdings
        self._line = line
        self._loop = Loop()
        self._display = Display(self._loop, holdings.session, holdings.master)
        self._audience = Audience(
            self._loop,
            self._display,
            holdings.listener,
            holdings.owner_uid,
            take=self._take,
            gone=self._see_off,
            is_bridged=state in ("waking", "hibernated"),
        )
        self._program = Program(
            self._loop, holdings.program_pid, holdings.program_status, self._hear_end
        )
        self._input = bytearray()
        self._asked: Asked | None = None
        self._asks_until_s = 0.0
        self._misses_agent = False
        self._window_at_hold: tuple[int, int] | None = None
        self._state = state or "running"
        self._is_over = False
        self._taken = b""
        """What nobody had read when the session left: should it come back instead."""

    def serve(self) -> NoReturn:
        """Serve until the program has ended."""
        set_name("lzy-tty-host")
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        program = self._program
        program.watch(program.pid)
        self._loop.hear(self._own.master, self._hear_program)
        self._loop.hear(self._line, self._hear_guard)
        self._audience.open()
        self._loop.soon(self._audience.forget_unheard, _FOLLOWS_WITHIN_S)
        if program.status is not None or (program.pid == 0 and self._state in _LIVING):
            self._look_into_it()
        elif self._state not in _LIVING:
            self._loop.soon(self._ask_or_wake, 1.0)  # should nobody tell us
        self._loop.run()

    # -- the program

    def _hear_program(self, _: int) -> None:
        try:
            data = os.read(self._own.master, 65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        if data:
            self._show(data)
        self._pass_input()

    def _show(self, data: bytes) -> None:
        """Output: to the consoles at once, to the screen when there is time."""
        asks = b"\x1b" in data and QUERY.search(data) is not None
        self._display.add(data)
        if asks and not self._audience.shown and (answers := self._display.digest()):
            self._input += answers
            self._pass_input()
        self._audience.show(data, asks=asks)

    def _show_rest(self) -> None:
        """All that a program has printed that is no more."""
        with contextlib.suppress(OSError):
            while data := os.read(self._own.master, 65536):
                self._show(data)

    def _type(self, typed: bytes) -> None:
        if len(self._input) + len(typed) > _MOST_INPUT_BYTES:
            return  # as a terminal's own queue does
        self._input += typed
        self._pass_input()
        if self._state == "hibernated" and not self._asked:
            self._ask(wake=True)

    def _pass_input(self) -> None:
        """Give the program what was typed, if it is there and nobody holds it back."""
        may_pass = (
            self._state in _LIVING and self._program.status is None and not self._audience.holds
        )
        if self._input and may_pass:
            with contextlib.suppress(BlockingIOError):
                done = os.write(self._own.master, self._input[:4096])
                del self._input[:done]
        self._loop.hear_also(self._own.master, writable=bool(self._input) and may_pass)

    def _hear_guard(self, _: int) -> None:
        """The guard tells how the program ended, or is gone itself: then we make another."""
        try:
            told = self._line.recv(4)
        except OSError:
            told = b""
        if told:
            if self._program.pid == self._own.program_pid:
                self._own.program_status = self._program.status = struct.unpack("=i", told)[0]
                self._look_into_it()
            return
        ours, theirs = socket.socketpair()
        self._display.save()
        self._loop.forget(self._line)
        self._line.close()
        pid = os.fork()
        if pid:
            theirs.close()
            self._loop.close()
            self._audience.close()
            self._own.write_down(os.getpid(), pid)
            guard(self._own, pid, ours)
        ours.close()
        self._line = theirs
        set_name("lzy-tty-host")
        self._loop.renew()
        self._loop.hear(self._line, self._hear_guard)

    def _hear_end(self, _: int) -> None:
        """The program has ended: by itself, or because the session has been hibernated."""
        self._program.watch_no_more()
        if self._program.pid != self._own.program_pid:
            self._program.status = self._program.ask_status()
            self._look_into_it()
        else:
            self._loop.soon(self._look_into_it, 0.2)  # the guard is about to say how

    def _look_into_it(self) -> None:
        """No program is there: what does the agent say?"""
        self._loop.never_mind(self._look_into_it)
        program = self._program
        if program.status is None:
            program.status = program.ask_status()  # None while it lives
        status = program.status
        own_end = status is not None and not (
            os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        )
        if own_end and self._state in _LIVING:
            self._finish(status)
            return
        self._asks_until_s = time.monotonic() + _ASK_FOR_S
        self._ask()

    # -- the agent

    def _ask(self, *, wake: bool = False) -> None:
        """Ask the agent how the session is, or have it woken."""
        self._loop.never_mind(self._ask)
        if self._asked:
            return
        path = self._own.home / "run" / "agent.sock"
        try:
            self._asked = Asked(path, self._own.session, wake=wake)
        except OSError:
            if wake and not self._misses_agent:
                self._misses_agent = True
                words = "no agent runs (lzy up starts one); then it wakes"
                self._audience.tell({"state": self._state, "failure": words})
            self._ask_again()
            return
        self._misses_agent = False
        self._loop.hear(self._asked, self._hear_answer)

    def _ask_again(self) -> None:
        if self._state in ("hibernated", "hibernating", "waking"):
            if self._input or self._state != "hibernated":
                self._loop.soon(self._ask_or_wake, 1.0)
        elif time.monotonic() < self._asks_until_s:
            self._loop.soon(self._ask, _ASK_AGAIN_S)
        elif self._program.is_gone:
            self._finish(self._program.status)

    def _ask_or_wake(self) -> None:
        self._ask(wake=self._state == "hibernated" and bool(self._input))

    def _hear_answer(self, _: int) -> None:
        asked = self._asked
        assert asked
        self._loop.forget(asked)
        answer = asked.take()
        if answer is None:
            self._loop.hear(asked, self._hear_answer)
            return
        self._asked = None
        status, document = answer
        told = document.get("session", document) if status in (200, 202) else {}
        if asked.is_wake and told.get("state") == "hibernated":
            self._loop.soon(self._ask_or_wake, 1.0)  # it is about to begin
        elif "state" in told:
            self._note_state(told)
        elif status == 404 and self._program.is_gone:  # killed, or on another node by now
            self._finish(self._program.status if self._state in _LIVING else None)
        elif asked.is_wake and status:
            words = str(document.get("error", "it cannot be woken"))
            self._audience.tell({"state": self._state, "failure": words})
            self._input.clear()
        else:
            self._ask_again()

    def _note_state(self, told: dict[str, Any]) -> None:
        """The agent says how the session is: `state`, `pid`, and `exit_status` at its end."""
        state, pid = str(told["state"]), int(told.get("pid") or 0)
        before, program = self._state, self._program
        if state == "hibernated" and told.get("moving_to"):
            state = "moving"
        if self._taken and state in ("waking", *_LIVING):
            taken, self._taken = self._taken, b""
            self._show(put_unread(self._own.master, self._own.slave, taken))
        if state == "gone":  # it is looked after no longer, or elsewhere
            if program.is_gone:
                self._finish(None)
            return
        if state in _ENDED or self._is_over:
            if program.is_gone and not self._is_over:
                status = told.get("exit_status")
                if status is None:
                    status = program.ask_status()  # by now somebody has waited for it
                self._finish(program.status if status is None else int(status))
            return
        if state in _LIVING:
            is_another = program.is_another(pid)
            if is_another is None:
                self._ask_again()  # the agent does not know yet that it has gone
                return
            self._state = state
            if is_another:
                self._own.program_pid, self._own.program_status = 0, None
                program.status = None
                if not program.watch(pid):
                    self._look_into_it()
                    return
                self._tell_window()
            self._pass_input()
        elif state == "hibernated" and before == "waking":
            self._state = state
            self._input.clear()  # else it would be tried again and again
            words = told.get("failure") or "see lzy why"
            self._audience.tell({"state": state, "failure": str(words)})
            return
        else:
            self._state = state
            if state != "hibernated":
                self._loop.soon(self._ask_or_wake, 1.0)
            elif self._input:
                self._ask(wake=True)
        if self._state != before:
            self._audience.tell({"state": self._state})
            if before in ("hibernated", "waking") and self._state in _LIVING:
                self._audience.paint_all()

    def _tell_window(self) -> None:
        """A program that slept through a change of its window hears of it now."""
        before, self._window_at_hold = self._window_at_hold, None
        if before and before != self._display.window:
            with contextlib.suppress(OSError):
                os.killpg(os.tcgetpgrp(self._own.master), signal.SIGWINCH)

    # -- consoles

    def _take(self, console: Console, kind: int, content: bytes) -> None:
        """What somebody who is connected sends."""
        audience = self._audience
        if kind == INPUT:
            audience.come_forward(console)
            console.taken_bytes += len(content)
            self._type(content)
        elif kind in (HELLO, RESIZE):
            asked = json.loads(content)
            size = int(asked["rows"]), int(asked["columns"])
            console.window = size if min(size) > 0 and max(size) <= 1000 else None
            audience.come_forward(console)
            if kind == HELLO:
                console.is_shown = True
                console.is_bridge = not asked.get("paints", True)
                if not console.is_bridge:
                    audience.paint(console)
                elif asked.get("follows"):
                    audience.catch_up(console)
                self._own.is_awaited = False
                if self._is_over:
                    self._leave()
                console.send(pack_json(TOLD, {"state": self._state}))
        elif kind == REPAINT:
            audience.paint(console)
        elif kind == CONTROL:
            console.send(pack_json(ANSWER, self._obey(console, json.loads(content))))

    def _see_off(self, console: Console) -> None:
        """Somebody has gone, and with him what he held back."""
        if console.holds:
            self._pass_input()

    def _obey(self, console: Console, asked: dict[str, Any]) -> dict[str, Any]:
        """What an agent, or `lzy console --json`, wants."""
        if asked["do"] == "hold":
            console.holds = True
            self._window_at_hold = self._display.window
            self._display.save()
            self._pass_input()
        elif asked["do"] == "save":
            self._show_rest()
            self._taken += take_unread(self._own.slave)
            self._display.save()
            return {"state": self._state, "unread": self._taken.decode("latin-1")}
        elif asked["do"] == "state":
            self._note_state(asked)
        elif asked["do"] == "look":
            return self._describe()
        return {"state": self._state}

    def _describe(self) -> dict[str, Any]:
        return {
            "session": self._own.session,
            "state": self._state,
            "device": self._own.device,
            "keeper_pid": os.getppid(),
            "host_pid": os.getpid(),
            "consoles": len(self._audience.shown),
            "unread_input_bytes": len(self._input),
            **self._display.describe(),
        }

    # -- the end

    def _finish(self, status: int | None) -> None:
        """The program has ended for good: leave, once who has started it knows."""
        self._program.status = status
        self._is_over, self._state = True, "ended"
        self._show_rest()
        if self._own.is_awaited:
            self._loop.soon(self._leave, _AWAITED_S)
        else:
            self._leave()

    def _leave(self) -> NoReturn:
        """Tell how the program ended, and go.

        Whoever is told goes first: a bridge wants the settings that the program has left, and what
        somebody types who may follow the session must not meet a closed door before the news does.
        """
        shown, status = self._audience.shown, self._program.status
        for console in shown:
            told = {"state": "ended", "exit_status": status, "leave": self._display.unpaint()}
            told["taken_bytes"] = console.taken_bytes
            if console is self._audience.front:  # it may follow the session to where it is now
                told["unread"] = self._input.decode("latin-1")
            console.send(pack_json(TOLD, told))
            with contextlib.suppress(OSError):
                console.socket.settimeout(_GOES_FIRST_S)
                console.flush()
        deadline = time.monotonic() + _GOES_FIRST_S
        for console in shown:
            with contextlib.suppress(OSError):
                while (console.is_bridge or status is None) and console.socket.recv(65536):
                    if time.monotonic() > deadline:
                        break
        self._display.save()
        for path in (socket_path(self._own.session), kept_path(self._own.session)):
            path.unlink(missing_ok=True)
        os._exit(0)
