"""Serves one terminal: what the program prints goes to the screen and to whoever is connected.

What is typed goes to the program, unless input is held: while the session hibernates, or is about
to, it waits here; the first key has the agent wake the session, and all of it is delivered once
when the program runs again. One thread, one loop; nothing in it waits for anybody.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import time
from typing import Any, NoReturn

from ...checkpoint import proc
from ...checkpoint.errors import LzyError
from ...checkpoint.kept import kept_path, screen_path
from ...checkpoint.linux import descriptors as kernel
from ...checkpoint.linux.activity import exit_status
from ...checkpoint.linux.detached import set_name
from .asking import Asked
from .consoles import Console
from .frames import (
    ANSWER,
    CONTROL,
    HELLO,
    INPUT,
    OUTPUT,
    REPAINT,
    RESIZE,
    TOLD,
    pack,
    pack_json,
    socket_path,
)
from .keeper import Holdings, guard
from .screen import Screen
from .tokens import QUERY, skim
from .unread import put_unread, take_unread

_MOST_BACKLOG_BYTES = 512 << 10
_MOST_INPUT_BYTES = 64 << 10
_MOST_UNSENT_BYTES = 1 << 20
_DIGEST_S = 0.03
_SAVE_S = 3.0
_ASK_AGAIN_S = 0.3
_ASK_FOR_S = 10.0
_AWAITED_S = 20.0
_FOLLOWS_WITHIN_S = 60.0
_GOES_FIRST_S = 1.0
_LIVING = ("running", "dozing")
_ENDED = ("ended", "failed")


class Host:
    """The process that serves; `line` is its line to the guard."""

    def __init__(self, holdings: Holdings, line: socket.socket, state: str) -> None:
        self._own = holdings
        self._line = line
        self._selector = selectors.DefaultSelector()
        self._consoles: dict[socket.socket, Console] = {}
        self._front: Console | None = None
        self._input = bytearray()
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._due: dict[str, float] = {}
        self._asked: Asked | None = None
        self._asks_until_s = 0.0
        self._misses_agent = False
        self._pidfd = -1
        self._pid = holdings.program_pid
        self._start = 0  # clock ticks after boot: the same pid may come again
        self._status = holdings.program_status
        self._window_at_hold: tuple[int, int] | None = None
        self._state = state or "running"
        self._is_over = False
        self._taken = b""
        """What nobody had read when the session left: should it come back instead."""
        self._unheard = bytearray() if state in ("waking", "hibernated") else None
        """What was printed here before the bridge of a session that came here has followed it."""
        self._screen = _load_screen(holdings)

    def serve(self) -> NoReturn:
        """Serve until the program has ended."""
        set_name("lzy-tty-host")
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self._watch_program(self._pid)
        self._listen()
        self._soon("forget_unheard", _FOLLOWS_WITHIN_S)
        if self._status is not None or (self._pid == 0 and self._state in _LIVING):
            self._look_into_it()
        elif self._state not in _LIVING:
            self._soon("ask_or_wake", 1.0)  # should nobody tell us
        while True:
            now = time.monotonic()
            for name in [name for name, due_s in self._due.items() if due_s <= now]:
                del self._due[name]
                getattr(self, f"_{name}")()
            wait_s = min((due_s - now for due_s in self._due.values()), default=None)
            for key, events in self._selector.select(max(wait_s, 0) if wait_s else wait_s):
                key.data(events)

    def _listen(self) -> None:
        """Register everything that may have something for us."""
        self._selector = selectors.DefaultSelector()
        self._register(self._own.master, self._hear_program)
        self._register(self._own.listener, self._accept)
        self._register(self._line, self._hear_guard)
        if self._pidfd >= 0:
            self._register(self._pidfd, self._hear_end)
        if self._asked:
            self._register(self._asked, self._hear_answer)
        for console in self._consoles.values():
            self._register(console.socket, self._reader_of(console))

    def _register(self, file: Any, heard: Any) -> None:
        self._selector.register(file, selectors.EVENT_READ, heard)

    def _soon(self, name: str, in_s: float) -> None:
        self._due.setdefault(name, time.monotonic() + in_s)

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
        self._backlog.append(data)
        self._backlog_bytes += len(data)
        self._soon("digest", _DIGEST_S)
        self._soon("save", _SAVE_S)
        if self._unheard is not None:
            self._unheard += data
            if len(self._unheard) > _MOST_BACKLOG_BYTES:
                self._unheard = None
        shown = [console for console in self._consoles.values() if console.is_shown]
        asks = b"\x1b" in data and QUERY.search(data) is not None
        if asks and not shown:
            self._digest(answers=True)
        for console in shown:
            mine = QUERY.sub(b"", data) if asks and console is not self._front else data
            if console.unsent_bytes > _MOST_UNSENT_BYTES:
                console.drop_unsent()
                console.is_behind = True
            elif not console.is_behind:
                console.send(pack(OUTPUT, mine))
            self._flush(console)

    def _show_rest(self) -> None:
        """All that a program has printed that is no more."""
        with contextlib.suppress(OSError):
            while data := os.read(self._own.master, 65536):
                self._show(data)

    def _digest(self, *, answers: bool = False) -> None:
        """Have the screen take in what was printed; of far too much only the end."""
        output = b"".join(self._backlog)
        self._backlog, self._backlog_bytes = [], 0
        if len(output) > _MOST_BACKLOG_BYTES:
            cut = len(output) - _MOST_BACKLOG_BYTES
            cut = max(output.find(b"\n", cut) + 1, cut)
            output = skim(output[:cut]) + output[cut:]
        self._screen.feed(output)
        if answers and self._screen.answers:
            self._input += b"".join(self._screen.answers)
            self._pass_input()
        self._screen.answers.clear()

    def _pass_input(self) -> None:
        """Give the program what was typed, if it is there and nobody holds it back."""
        wanted = selectors.EVENT_READ
        if self._input and self._may_pass:
            with contextlib.suppress(BlockingIOError):
                done = os.write(self._own.master, self._input[:4096])
                del self._input[:done]
            if self._input:
                wanted |= selectors.EVENT_WRITE
        self._selector.modify(self._own.master, wanted, self._hear_program)

    @property
    def _may_pass(self) -> bool:
        holds = any(console.holds for console in self._consoles.values())
        return self._state in _LIVING and self._status is None and not holds

    def _watch_program(self, pid: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._pid, self._start = pid, _start_of(pid)
        if pid > 0:
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)

    def _hear_guard(self, _: int) -> None:
        """The guard tells how the program ended, or is gone itself: then we make another."""
        try:
            told = self._line.recv(4)
        except OSError:
            told = b""
        if told:
            if self._pid == self._own.program_pid:
                self._own.program_status = self._status = struct.unpack("=i", told)[0]
                self._look_into_it()
            return
        ours, theirs = socket.socketpair()
        self._save()
        self._line.close()
        pid = os.fork()
        if pid:
            theirs.close()
            self._selector.close()
            for console in self._consoles.values():
                console.socket.close()
            self._own.write_down(os.getpid(), pid)
            guard(self._own, pid, ours)
        ours.close()
        self._line = theirs
        set_name("lzy-tty-host")
        self._listen()

    def _hear_end(self, _: int) -> None:
        """The program has ended: by itself, or because the session has been hibernated."""
        self._selector.unregister(self._pidfd)
        if self._pid != self._own.program_pid:
            self._status = exit_status(self._pidfd)
            self._look_into_it()
        else:
            self._soon("look_into_it", 0.2)  # the guard is about to say how

    def _look_into_it(self) -> None:
        """No program is there: what does the agent say?"""
        self._due.pop("look_into_it", None)
        if self._status is None and self._pidfd >= 0:
            self._status = exit_status(self._pidfd)  # None while it lives
        status = self._status
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
        self._due.pop("ask", None)
        if self._asked:
            return
        path = self._own.home / "run" / "agent.sock"
        try:
            self._asked = Asked(path, self._own.session, wake=wake)
        except OSError:
            if wake and not self._misses_agent:
                self._misses_agent = True
                words = "no agent runs (lzy up starts one); then it wakes"
                self._tell({"state": self._state, "failure": words})
            self._ask_again()
            return
        self._misses_agent = False
        self._register(self._asked, self._hear_answer)

    def _ask_again(self) -> None:
        if self._state in ("hibernated", "hibernating", "waking"):
            if self._input or self._state != "hibernated":
                self._soon("ask_or_wake", 1.0)
        elif time.monotonic() < self._asks_until_s:
            self._soon("ask", _ASK_AGAIN_S)
        elif self._has_no_program:
            self._finish(self._status)

    def _ask_or_wake(self) -> None:
        self._ask(wake=self._state == "hibernated" and bool(self._input))

    @property
    def _has_no_program(self) -> bool:
        return self._pid <= 0 or self._status is not None or _start_of(self._pid) != self._start

    def _hear_answer(self, _: int) -> None:
        asked = self._asked
        assert asked
        self._selector.unregister(asked)
        descriptor = asked.fileno()
        answer = asked.take()
        if answer is None:
            self._selector.register(descriptor, selectors.EVENT_READ, self._hear_answer)
            return
        self._asked = None
        status, document = answer
        told = document.get("session", document) if status in (200, 202) else {}
        if asked.is_wake and told.get("state") == "hibernated":
            self._soon("ask_or_wake", 1.0)  # it is about to begin
        elif "state" in told:
            self._note_state(told)
        elif status == 404 and self._has_no_program:  # killed, or on another node by now
            self._finish(self._status if self._state in _LIVING else None)
        elif asked.is_wake and status:
            words = str(document.get("error", "it cannot be woken"))
            self._tell({"state": self._state, "failure": words})
            self._input.clear()
        else:
            self._ask_again()

    def _note_state(self, told: dict[str, Any]) -> None:
        """The agent says how the session is: `state`, `pid`, and `exit_status` at its end."""
        state, pid = str(told["state"]), int(told.get("pid") or 0)
        before = self._state
        if state == "hibernated" and told.get("moving_to"):
            state = "moving"
        if self._taken and state in ("waking", *_LIVING):
            taken, self._taken = self._taken, b""
            self._show(put_unread(self._own.master, self._own.slave, taken))
        if state == "gone":  # it is looked after no longer, or elsewhere
            if self._has_no_program:
                self._finish(None)
            return
        if state in _ENDED or self._is_over:
            if self._has_no_program and not self._is_over:
                status = told.get("exit_status")
                if status is None and self._pidfd >= 0:
                    status = exit_status(self._pidfd)  # by now somebody has waited for it
                self._finish(self._status if status is None else int(status))
            return
        if state in _LIVING:
            start = _start_of(pid)
            if not start:
                self._ask_again()  # the agent does not know yet that it has gone
                return
            self._state = state
            if start != self._start or self._status is not None:  # another life, maybe its pid
                self._own.program_pid, self._own.program_status = 0, None
                self._status = None
                self._watch_program(pid)
                if self._pidfd < 0:
                    self._look_into_it()
                    return
                self._register(self._pidfd, self._hear_end)
                self._tell_window()
            self._pass_input()
        elif state == "hibernated" and before == "waking":
            self._state = state
            self._input.clear()  # else it would be tried again and again
            words = told.get("failure") or "see lzy why"
            self._tell({"state": state, "failure": str(words)})
            return
        else:
            self._state = state
            if state != "hibernated":
                self._soon("ask_or_wake", 1.0)
            elif self._input:
                self._ask(wake=True)
        if self._state != before:
            self._tell({"state": self._state})
            if before in ("hibernated", "waking") and self._state in _LIVING:
                self._repaint_all()

    def _tell_window(self) -> None:
        """A program that slept through a change of its window hears of it now."""
        before, self._window_at_hold = self._window_at_hold, None
        if before and before != (self._screen.rows, self._screen.columns):
            with contextlib.suppress(OSError):
                os.killpg(os.tcgetpgrp(self._own.master), signal.SIGWINCH)

    # -- consoles

    def _accept(self, _: int) -> None:
        with contextlib.suppress(OSError):
            sock, _address = self._own.listener.accept()
            sock.setblocking(False)
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("=iII", peer)[1] not in (0, os.geteuid(), self._own.owner_uid):
                sock.close()
                return
            console = self._consoles[sock] = Console(sock)
            self._register(sock, self._reader_of(console))

    def _reader_of(self, console: Console) -> Any:
        def heard(events: int) -> None:
            if events & selectors.EVENT_WRITE:
                self._flush(console)
            if events & selectors.EVENT_READ:
                self._hear_console(console)

        return heard

    def _hear_console(self, console: Console) -> None:
        try:
            data = console.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(console)
            return
        try:
            for kind, content in console.frames.feed(data):
                self._take(console, kind, content)
        except (ValueError, KeyError, TypeError):
            self._drop(console)

    def _take(self, console: Console, kind: int, content: bytes) -> None:
        if kind == INPUT:
            self._come_forward(console)
            console.taken_bytes += len(content)
            self._type(content)
        elif kind in (HELLO, RESIZE):
            asked = json.loads(content)
            size = int(asked["rows"]), int(asked["columns"])
            console.window = size if min(size) > 0 and max(size) <= 1000 else None
            self._come_forward(console)
            if kind == HELLO:
                console.is_shown = True
                console.is_bridge = not asked.get("paints", True)
                if not console.is_bridge:
                    self._paint(console)
                elif asked.get("follows"):
                    self._catch_up(console)
                self._own.is_awaited = False
                if self._is_over:
                    self._leave()
                console.send(pack_json(TOLD, {"state": self._state}))
        elif kind == REPAINT:
            self._paint(console)
        elif kind == CONTROL:
            console.send(pack_json(ANSWER, self._obey(console, json.loads(content))))
        self._flush(console)

    def _catch_up(self, bridge: Console) -> None:
        """Show what was printed here before it came; if that is not known, all of the screen."""
        if self._unheard is None:
            bridge.send(pack(OUTPUT, b"\x1b[999;1H" + b"\n" * self._screen.rows))
            self._paint(bridge)
            return
        bridge.send(pack(OUTPUT, bytes(self._unheard)))
        self._forget_unheard()

    def _forget_unheard(self) -> None:
        self._unheard = None

    def _type(self, typed: bytes) -> None:
        if len(self._input) + len(typed) > _MOST_INPUT_BYTES:
            return  # as a terminal's own queue does
        self._input += typed
        self._pass_input()
        if self._state == "hibernated" and not self._asked:
            self._ask(wake=True)

    def _come_forward(self, console: Console) -> None:
        """The window is that of the console that was used last; that one answers queries, too."""
        self._front = console
        window = console.window
        if not window or window == (self._screen.rows, self._screen.columns):
            return
        self._digest()
        self._screen.resize(*window)
        fcntl.ioctl(self._own.master, kernel.TIOCSWINSZ, struct.pack("=HHHH", *window, 0, 0))
        self._soon("save", _SAVE_S)

    def _paint(self, console: Console) -> None:
        self._digest()
        console.is_behind = False
        console.send(pack(OUTPUT, self._screen.paint() + self._screen.unfinished()))

    def _repaint_all(self) -> None:
        for console in list(self._consoles.values()):
            if console.is_shown and not console.is_bridge:
                self._paint(console)
                self._flush(console)

    def _tell(self, document: dict[str, Any]) -> None:
        for console in list(self._consoles.values()):
            if console.is_shown:
                console.send(pack_json(TOLD, document))
                self._flush(console)

    def _flush(self, console: Console) -> None:
        try:
            console.flush()
        except OSError:
            self._drop(console)
            return
        if not console.unsent and console.is_behind:
            self._paint(console)
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if console.unsent else 0)
        if console.socket in self._consoles:
            self._selector.modify(console.socket, wanted, self._reader_of(console))

    def _drop(self, console: Console) -> None:
        if self._consoles.pop(console.socket, None) is None:
            return
        self._selector.unregister(console.socket)
        console.socket.close()
        if self._front is console:
            shown = [other for other in self._consoles.values() if other.is_shown]
            self._front = shown[-1] if shown else None
        if console.holds:
            self._pass_input()

    def _obey(self, console: Console, asked: dict[str, Any]) -> dict[str, Any]:
        """What an agent, or `lzy console --json`, wants."""
        if asked["do"] == "hold":
            console.holds = True
            self._window_at_hold = self._screen.rows, self._screen.columns
            self._digest()
            self._save()
            self._pass_input()
        elif asked["do"] == "save":
            self._show_rest()
            self._taken += take_unread(self._own.slave)
            self._save()
            return {"state": self._state, "unread": self._taken.decode("latin-1")}
        elif asked["do"] == "state":
            self._note_state(asked)
        elif asked["do"] == "look":
            return self._describe()
        return {"state": self._state}

    def _describe(self) -> dict[str, Any]:
        self._digest()
        y, x = self._screen.cursor
        shown = [console for console in self._consoles.values() if console.is_shown]
        return {
            "session": self._own.session,
            "state": self._state,
            "device": self._own.device,
            "keeper_pid": os.getppid(),
            "host_pid": os.getpid(),
            "consoles": len(shown),
            "rows": self._screen.rows,
            "columns": self._screen.columns,
            "cursor": {"row": y, "column": x},
            "is_alternate": self._screen.is_alternate,
            "title": self._screen.title,
            "unread_input_bytes": len(self._input),
            "screen": self._screen.text(),
            "leave": self._screen.unpaint().decode(),
            "modes_off": self._screen.leave_modes().decode(),
        }

    # -- beginning and end

    def _save(self) -> None:
        """Write the screen down, for another host, or another machine."""
        self._due.pop("save", None)
        self._digest()
        path = screen_path(self._own.session)
        new = path.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk: the terminal goes on
            new.write_bytes(self._screen.save())
            new.rename(path)

    def _finish(self, status: int | None) -> None:
        """The program has ended for good: leave, once who has started it knows."""
        self._status = status
        self._is_over, self._state = True, "ended"
        self._show_rest()
        if self._own.is_awaited:
            self._soon("leave", _AWAITED_S)
        else:
            self._leave()

    def _leave(self) -> NoReturn:
        """Tell how the program ended, and go.

        Whoever is told goes first: a bridge wants the settings that the program has left, and what
        somebody types who may follow the session must not meet a closed door before the news does.
        """
        shown = [console for console in self._consoles.values() if console.is_shown]
        for console in shown:
            told = {"state": "ended", "exit_status": self._status}
            told["leave"] = self._screen.unpaint().decode()
            told["taken_bytes"] = console.taken_bytes
            if console is self._front:  # it may follow the session to where it is now
                told["unread"] = self._input.decode("latin-1")
            console.send(pack_json(TOLD, told))
            with contextlib.suppress(OSError):
                console.socket.settimeout(_GOES_FIRST_S)
                console.flush()
        deadline = time.monotonic() + _GOES_FIRST_S
        for console in shown:
            with contextlib.suppress(OSError):
                while (console.is_bridge or self._status is None) and console.socket.recv(65536):
                    if time.monotonic() > deadline:
                        break
        self._save()
        for path in (socket_path(self._own.session), kept_path(self._own.session)):
            path.unlink(missing_ok=True)
        os._exit(0)


def _start_of(pid: int) -> int:
    """When the process began, proc_pid_stat(5); 0 if there is none, or it has ended."""
    try:
        return 0 if pid <= 0 or proc.has_ended(pid) else proc.start_time(pid)
    except LzyError:
        return 0


def _load_screen(holdings: Holdings) -> Screen:
    """The screen as it was saved last, in the window that there is now."""
    packed = fcntl.ioctl(holdings.master, kernel.TIOCGWINSZ, bytes(kernel.WINSIZE_BYTES))
    rows, columns = struct.unpack("=HHHH", packed)[:2]
    try:
        screen = Screen.load(screen_path(holdings.session).read_bytes())
    except (OSError, ValueError):
        return Screen(rows, columns)
    screen.resize(rows, columns)
    return screen
