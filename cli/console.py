"""`lzy console`: this terminal becomes that of a session, until it is left or the program ends."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .arguments import json_option
from .layout import paint, say, say_json
from .raw import STDIN, STDOUT, raw_mode, signals, window_size, write
from .sessions import choose, name_argument

if TYPE_CHECKING:
    from ..agent.client import Client

DETACH_KEY = "ctrl-]"
_SECOND_KEY_WITHIN_S = 1.0
_COMES_BACK_WITHIN_S = 5.0


class Left(NamedTuple):
    """How a console was left: `how` is detached, ended or lost; the status as waitpid(2) has it."""

    how: str
    status: int | None


def detach_key_option(function: Any) -> Any:
    """`--detach-key`; the command gets its byte as `detach_key`, empty for none."""
    return click.option(
        "--detach-key",
        envvar="LZY_DETACH_KEY",
        default=DETACH_KEY,
        show_default=True,
        callback=lambda _, __, value: read_key(value),
        help="This key and then d leaves the console; this key twice sends it once (or: none).",
    )(function)


def read_key(words: str) -> bytes:
    """`ctrl-]` or `^]` as the byte that it sends; `none` as nothing."""
    name = words.strip().lower()
    if name == "none":
        return b""
    letter = name.removeprefix("ctrl-").removeprefix("^")
    if len(letter) != 1 or letter == name or not 0x40 <= ord(letter.upper()) < 0x60:
        raise click.BadParameter(f"{words!r} is no key such as ctrl-] or ctrl-a, or none.")
    return bytes([ord(letter.upper()) & 0x1F])


def name_key(key: bytes) -> str:
    """The byte as people call the key."""
    return f"Ctrl-{chr(key[0] | 0x40)}" if key else ""


@click.command(
    epilog="""\b
    Examples:
      lzy console analysis                  go on where it was; Ctrl-] d leaves it
      lzy console                           the only session
      lzy console analysis --print          what is on its screen, as text
      lzy console --detach-key ctrl-a       or LZY_DETACH_KEY=ctrl-a

    \b
    Exit status: 0 when it was left; that of the program when it ended (128 and the signal's number
    if one ended it).
    """
)
@name_argument
@detach_key_option
@click.option("--print", "prints", is_flag=True, help="Print what is on the screen, and end.")
@json_option
def console(name: str | None, detach_key: bytes, prints: bool, as_json: bool) -> None:
    """Connect this terminal to that of a session.

    Any number of consoles may be connected at once. A session that hibernates shows its last
    screen; a key wakes it and is delivered then. With --json its state and its screen are printed.
    """
    from ..agent.client import Client
    from ..agent.terminal.starting import Line

    client = Client()
    chosen = choose(client, name)
    if prints or as_json:
        with Line(chosen) as line:
            told = line.ask("look")
        told.pop("leave")
        told.pop("modes_off")
        if as_json:
            say_json(told)
        else:
            rows = list(told["screen"])
            while rows and not rows[-1]:
                rows.pop()
            say(rows)
        return
    _see_that_there_is_one(client, chosen)
    if os.isatty(STDIN) and os.isatty(STDOUT) and detach_key:
        click.echo(f"{chosen}: {name_key(detach_key)} d leaves it", err=True)
    sys.exit(leave_word(chosen, connect(chosen, detach_key)))


def _see_that_there_is_one(client: Client, session: str) -> None:
    """A session that sleeps without a terminal gets one when it is woken."""
    from ..agent.terminal.starting import Line
    from ..checkpoint.errors import LzyError, NotFound

    try:
        Line(session).__exit__()
        return
    except NotFound:
        pass
    found = client.get(client.session(session))
    if found["state"] == "hibernated":
        client.post(client.session(session, "wake"))
        try:
            Line(session).__exit__()
            return
        except NotFound:
            pass
    remedy = "lzy run -- CMD starts a program on a terminal that lzy keeps"
    if found["state"] in ("running", "dozing"):
        remedy = f"hibernate and wake it, if it reads from a terminal: then lzy keeps one. {remedy}"
    if found["state"] in ("ended", "failed"):
        remedy = f"lzy wake {session} goes back to its last image, if it has one"
    raise LzyError(f"lzy keeps no terminal for session {session}", remedy=remedy)


def leave_word(session: str, left: Left) -> int:
    """Say how the console was left; the exit status."""
    if left.how == "detached":
        click.echo(f"left {session}; lzy console {session} connects again", err=True)
        return 0
    if left.how == "lost":
        word = paint("lzy:", "red", sys.stderr)
        click.echo(f"{word} the terminal of {session} is gone", err=True)
        return 1
    if left.status is None:
        click.echo(f"the terminal of {session} is kept here no longer; see lzy ps", err=True)
        return 0
    return status_of(left.status)


def status_of(status: int) -> int:
    """A status of waitpid(2) as a shell tells it."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def connect(session: str, detach_key: bytes) -> Left:
    """Be a console until it is left. The terminal is given back as it was, whatever happens."""
    return _Console(session, detach_key).serve()


class _Console:
    """This process as a console: its terminal in raw mode, and a connection to the keeper."""

    def __init__(self, session: str, detach_key: bytes) -> None:
        self._session = session
        self._key = detach_key
        self._pressed_s = 0.0
        self._has_keys = True
        self._is_terminal = os.isatty(STDIN) and os.isatty(STDOUT)
        self._leave = b""
        self._noted = False

    def serve(self) -> Left:
        """Connect; again, if the keeper's host is killed and another takes its place."""
        from ..checkpoint.kept import find_kept

        with signals() as woken, raw_mode(self._is_terminal) as screen:
            since_s = time.monotonic()
            while True:
                try:
                    sock = open_console(self._session)
                except OSError:
                    passed_s = time.monotonic() - since_s
                    if passed_s > (_COMES_BACK_WITHIN_S if find_kept(self._session) else 0.5):
                        left = Left("lost", None)
                        break
                    time.sleep(0.05)
                    continue
                with sock:
                    found = self._converse(sock, woken)
                if found:
                    left = found
                    break
                since_s = time.monotonic()
            if self._is_terminal:
                screen.leave(self._leave)
        return left

    def _converse(self, sock: socket.socket, woken: int) -> Left | None:
        """Until it is left, or the other end is gone (None)."""
        from ..agent.terminal.frames import (
            HELLO,
            INPUT,
            OUTPUT,
            RESIZE,
            TOLD,
            Frames,
            pack,
            pack_json,
        )

        frames = Frames()
        if self._is_terminal:
            write(b"\x1b[999;1H" + b"\n" * self._rows())  # what is here stays, further up
        sock.sendall(pack_json(HELLO, self._window()))
        while True:
            wanted: list[Any] = [sock, woken, *([STDIN] if self._has_keys else [])]
            wait_s = None
            if self._pressed_s:
                wait_s = max(self._pressed_s + _SECOND_KEY_WITHIN_S - time.monotonic(), 0)
            ready = select.select(wanted, [], [], wait_s)[0]
            if not ready and self._pressed_s:
                self._pressed_s = 0.0
                sock.sendall(pack(INPUT, self._key))
            if woken in ready:
                told = set(os.read(woken, 512))
                if told & {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}:
                    return Left("detached", None)
                with contextlib.suppress(OSError):
                    sock.sendall(pack_json(RESIZE, self._window()))
            if STDIN in ready:
                typed = os.read(STDIN, 4096)
                if not typed:
                    if self._is_terminal:
                        return Left("detached", None)
                    self._has_keys = False
                passed, leaves = self._find_detach(typed)
                try:
                    if passed:
                        sock.sendall(pack(INPUT, passed))
                except OSError:
                    return None
                if leaves:
                    self._ask_how_to_leave()
                    return Left("detached", None)
            if sock in ready:
                try:
                    data = sock.recv(1 << 18)
                except OSError:
                    data = b""
                if not data:
                    return None
                for kind, content in frames.feed(data):
                    if kind == OUTPUT:
                        write(content)
                    elif kind == TOLD and (left := self._hear(json.loads(content))):
                        return left

    def _find_detach(self, typed: bytes) -> tuple[bytes, bool]:
        """What of it is for the program, and whether the console is to be left."""
        if not self._key or not self._is_terminal:
            return typed, False
        passed = bytearray()
        for byte in (bytes([number]) for number in typed):
            if self._pressed_s:
                self._pressed_s = 0.0
                if byte in (b"d", b"D"):
                    return bytes(passed), True
                passed += self._key if byte == self._key else self._key + byte
            elif byte == self._key:
                self._pressed_s = time.monotonic()
            else:
                passed += byte
        return bytes(passed), False

    def _hear(self, told: dict[str, Any]) -> Left | None:
        state = told["state"]
        if state == "ended":
            self._leave = str(told.get("leave", "")).encode()
            return Left("ended", told.get("exit_status"))
        words = ""
        if failure := told.get("failure"):
            words = f"{self._session} cannot be woken: {failure}"
        elif state == "hibernated":
            words = f"{self._session} hibernates; a key wakes it"
        elif state == "waking":
            words = f"{self._session} wakes"
        if words and self._is_terminal:
            shown = words[: max(self._columns() - 4, 10)].encode()
            write(b"\x1b7\x1b[999;1H\x1b[0;7m " + shown + b" \x1b[0m\x1b[K\x1b8")
        return None

    def _ask_how_to_leave(self) -> None:
        """What undoes the modes that the program has set."""
        from ..agent.terminal.starting import Line
        from ..checkpoint.errors import LzyError

        with contextlib.suppress(LzyError), Line(self._session) as line:
            self._leave = str(line.ask("look").get("leave", "")).encode()

    def _window(self) -> dict[str, int]:
        return {"rows": self._rows(), "columns": self._columns()}

    def _rows(self) -> int:
        return window_size()[0]

    def _columns(self) -> int:
        return window_size()[1]


def open_console(session: str) -> socket.socket:
    """A connection to the host of a session's terminal. Raises OSError."""
    from ..agent.terminal.frames import socket_path

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(socket_path(session)))
    except OSError:
        sock.close()
        raise
    return sock
