"""`lzy console`: this terminal becomes that of a session, until it is left or the program ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .arguments import json_option
from .layout import paint, say, say_json
from .raw import STDIN, STDOUT, raw_mode, signals, window_size, write
from .sessions import choose, name_argument

if TYPE_CHECKING:
    from pathlib import Path

    from ..agent.client import Client
    from .link import Link

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
        with Line(chosen, find_place(client, chosen)) as line:
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
    place = _find_one(client, chosen)
    if os.isatty(STDIN) and os.isatty(STDOUT) and detach_key:
        click.echo(f"{chosen}: {name_key(detach_key)} d leaves it", err=True)
    sys.exit(leave_word(chosen, connect(chosen, detach_key, place)))


def find_place(client: Client, session: str) -> Path | None:
    """The home with the files of its terminal: of its node, if that is one of this machine."""
    from ..agent.client import is_trial
    from ..checkpoint.home import home

    if not is_trial(home()):
        return None
    from ..agent.trial import node_home

    return node_home(home(), client.get(client.session(session))["node"])


def _find_one(client: Client, session: str) -> Path | None:
    """The home of its terminal. A session that sleeps without one gets it when it is woken."""
    from ..agent.terminal.starting import Line
    from ..checkpoint.errors import LzyError, NotFound

    with contextlib.suppress(NotFound):
        place = find_place(client, session)
        Line(session, place).__exit__()
        return place
    found = client.get(client.session(session))
    if _is_elsewhere(found["node"]):
        raise LzyError(
            f"the terminal of session {session} is on {found['node']}",
            remedy=f"ssh -t {found['node']} lzy console {session}",
        )
    if found["state"] == "hibernated":
        client.post(client.session(session, "wake"))
        with contextlib.suppress(NotFound):
            place = find_place(client, session)
            Line(session, place).__exit__()
            return place
    remedy = "lzy run -- CMD starts a program on a terminal that lzy keeps"
    if found["state"] in ("running", "dozing"):
        remedy = f"hibernate and wake it, if it reads from a terminal: then lzy keeps one. {remedy}"
    if found["state"] in ("ended", "failed"):
        remedy = f"lzy wake {session} goes back to its last image, if it has one"
    raise LzyError(f"lzy keeps no terminal for session {session}", remedy=remedy)


def _is_elsewhere(node: str) -> bool:
    """Whether that node is another machine."""
    from ..agent.client import Client, is_fleet, is_trial
    from ..checkpoint.errors import LzyError
    from ..checkpoint.home import home

    if not is_fleet(home()) or is_trial(home()):
        return False
    try:
        return bool(Client(fleet=False).get("/v1/node")["name"] != node)
    except LzyError:  # no agent is here
        return True


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
        words = f"{session} has gone from here; if it moved, lzy console {session} reaches it there"
        click.echo(words, err=True)
        return 0
    return status_of(left.status)


def status_of(status: int) -> int:
    """A status of waitpid(2) as a shell tells it."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def connect(session: str, detach_key: bytes, place: Path | None = None) -> Left:
    """Be a console until it is left. The terminal is given back as it was, whatever happens.

    `place`: the home with the files of the session's terminal; ours without it.
    """
    return _Console(session, detach_key, place).serve()


class _Console:
    """This process as a console: its terminal in raw mode, and a connection to the keeper."""

    def __init__(self, session: str, detach_key: bytes, place: Path | None) -> None:
        self._session, self._place = session, place
        self._key = detach_key
        self._pressed_s = 0.0
        self._has_keys = True
        self._is_terminal = os.isatty(STDIN) and os.isatty(STDOUT)
        self._leave = b""

    def serve(self) -> Left:
        """Connect, and be what its terminal is until it is left."""
        from .link import Gone

        with signals() as woken, raw_mode(self._is_terminal) as screen:
            try:
                left = self._converse(self._connect(), woken)
            except Gone:
                left = Left("lost", None)
            if self._is_terminal:
                screen.leave(self._leave)
        return left

    def _connect(self) -> Link:
        """To the keeper, or to the next one if that is killed just now. Raises Gone."""
        from ..checkpoint.kept import find_kept
        from .link import Gone, Link

        since_s = time.monotonic()
        while True:
            try:
                return Link(self._session, self._place, paints=True)
            except OSError:
                passed_s = time.monotonic() - since_s
                if passed_s > (
                    _COMES_BACK_WITHIN_S if find_kept(self._session, self._place) else 0.5
                ):
                    raise Gone from None
                time.sleep(0.05)

    def _converse(self, link: Link, woken: int) -> Left:
        """Until it is left, or the program has ended. Raises Gone."""
        from ..agent.terminal.frames import RESIZE, pack_json

        window = window_size()
        if self._is_terminal:
            write(b"\x1b[999;1H" + b"\n" * window_size()[0])  # what is here stays, further up
        while True:
            wanted: list[Any] = [link, woken, *([STDIN] if self._has_keys else [])]
            wait_s = None
            if self._pressed_s:
                wait_s = max(self._pressed_s + _SECOND_KEY_WITHIN_S - time.monotonic(), 0)
            ready = select.select(wanted, [], [], wait_s)[0]
            if not ready and self._pressed_s:
                self._pressed_s = 0.0
                link.type(self._key)
            if woken in ready:
                told = set(os.read(woken, 512))
                if told & {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}:
                    return Left("detached", None)
            if window != window_size():  # before what was typed in it
                window = window_size()
                link.send(pack_json(RESIZE, {"rows": window[0], "columns": window[1]}))
            if STDIN in ready:
                typed = os.read(STDIN, 4096)
                if not typed:
                    if self._is_terminal:
                        return Left("detached", None)
                    self._has_keys = False
                passed, leaves = self._find_detach(typed)
                if passed:
                    link.type(passed)
                if leaves:
                    self._leave = str(link.look().get("leave", "")).encode()
                    return Left("detached", None)
            if link in ready:
                link.hear()
            if output := link.take_output():
                write(output)
            if link.news is not None and link.state != "ended":
                self._say(link)
            if link.state == "ended":
                self._leave = link.leave
                return Left("ended", link.status)

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

    def _say(self, link: Link) -> None:
        """How the session is, if there is no program to type to; away from the cursor's row."""
        seen = link.look() if link.is_asleep and self._is_terminal else {}
        if output := link.take_output():
            write(output)
        failure, link.news = link.news, None
        words = {
            "hibernated": f"{self._session} hibernates; a key wakes it",
            "waking": f"{self._session} wakes",
            "moving": f"{self._session} moves to another node",
        }.get(link.state, "")
        if failure:
            words = f"{self._session} cannot be woken: {failure}"
        if words and self._is_terminal:
            is_last = bool(seen) and seen["cursor"]["row"] == seen["rows"] - 1
            row, columns = (1 if is_last else 999), window_size()[1]
            shown = words[: max(columns - 4, 10)].encode()
            write(b"\x1b7\x1b[%d;1H\x1b[0;7m %b \x1b[0m\x1b[K\x1b8" % (row, shown))
