"""How a keeper is started, away from whoever asks for it, and how one is told something."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoint.errors import AccessDenied, Busy, KernelError, LzyError, NotFound
from ...checkpoint.home import home
from ...checkpoint.kept import find_kept, kept_folder, screen_path
from .frames import ANSWER, CONTROL, Frames, pack_json, socket_path

_ANSWERS_WITHIN_S = 5.0


class Kept(NamedTuple):
    """A terminal that has just been made: the program's pid (0: none), `/dev/pts/N`, the guard."""

    pid: int
    device: str
    keeper_pid: int


def start_keeper(
    session: str,
    *,
    rows: int = 24,
    columns: int = 80,
    settings: bytes = b"",
    command: list[str] | None = None,
    state: str = "running",
    screen: bytes | None = None,
    is_awaited: bool = False,
    owner_uid: int | None = None,
) -> Kept:
    """Make a terminal of so many rows and columns for a session, and have it kept.

    `command` is started on it, with our environment and directory. `settings` is a struct termios2,
    `screen` what it shows at first (`Screen.save`; empty: nothing). `is_awaited`: the caller is
    about to connect, and wants to see how the program ended even if that takes no time.
    `owner_uid`: who may connect besides us and root.

    Raises NotFound or AccessDenied (there is no such command), Busy (the session has a terminal),
    LzyError.
    """
    plan: dict[str, Any] = {"session": session, "rows": rows, "columns": columns, "state": state}
    plan |= {
        "is_awaited": is_awaited,
        "command": command,
        "settings": base64.b64encode(settings).decode(),
    }
    if owner_uid is not None:
        plan["owner_uid"] = owner_uid
    folder = kept_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (home() / "agent").mkdir(mode=0o700, exist_ok=True)
        log = os.open(log_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except PermissionError as error:
        raise AccessDenied(
            f"terminals are kept under {folder}, where you may not write",
            remedy="start an agent of your own: LZY_HOME=~/.lzy lzy up",
        ) from error
    if find_kept(session) is None:
        if screen is not None:
            screen_path(session).write_bytes(screen)
        elif command:
            screen_path(session).unlink(missing_ok=True)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        words = [sys.executable, "-P", "-m", "lzy.agent.terminal.keeper", json.dumps(plan)]
        middle = os.fork()  # so that it is not our child: nobody here would wait for it
        if middle == 0:
            try:
                subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=writing, stderr=log,
                    env={**os.environ, "LZY_HOME": str(home())}, start_new_session=True,
                )  # fmt: skip
            finally:
                os._exit(0)
        os.waitpid(middle, 0)
    finally:
        os.close(writing)
        os.close(log)
    with os.fdopen(reading, "rb") as file:
        line = file.readline()
    told: dict[str, Any] = {"error": "it says nothing", "number": 0}
    if line.strip():
        told = json.loads(line)
    if "error" in told:
        raise _explain(session, command, told)
    return Kept(told["pid"], told["device"], told["keeper_pid"])


def log_path() -> Path:
    """What keepers, and who shows programs in their old terminals, say when something is wrong."""
    return home() / "agent" / "terminals.log"


def _explain(session: str, command: list[str] | None, told: dict[str, Any]) -> LzyError:
    number, words = told["number"], told["error"]
    if not number:
        if "already" in words:
            return Busy(words, remedy=f"lzy console {session} connects to it")
        return LzyError(f"no terminal for {session}: {words}", remedy=f"see {log_path()}")
    failed = f"cannot start {command[0] if command else '?'}: {words}"
    if number == 2:
        return NotFound(failed, remedy="give a program that is on PATH, or the path of one")
    if number == 13:
        return AccessDenied(failed, remedy="it must be executable by you")
    return KernelError(f"cannot start {command[0] if command else '?'}", number)


class Line:
    """A connection to the keeper of a session's terminal; it holds what it holds while open."""

    def __init__(self, session: str, folder: Path | None = None) -> None:
        """Raises NotFound where nobody keeps one."""
        self._frames = Frames()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_ANSWERS_WITHIN_S)
        try:
            self._socket.connect(str(socket_path(session, folder)))
        except OSError as error:
            self._socket.close()
            raise NotFound(f"lzy keeps no terminal for {session}") from error

    def ask(self, do: str, **facts: Any) -> dict[str, Any]:
        """Have the keeper do it; its answer. Raises LzyError when there is none."""
        try:
            self._socket.sendall(pack_json(CONTROL, {"do": do, **facts}))
            while data := self._socket.recv(65536):
                for kind, content in self._frames.feed(data):
                    if kind == ANSWER:
                        document: dict[str, Any] = json.loads(content)
                        return document
        except OSError as error:
            raise LzyError(f"the terminal's keeper does not answer: {error}") from error
        raise LzyError("the terminal's keeper has ended")

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@contextlib.contextmanager
def hold_input(session: str) -> Iterator[None]:
    """Keep what is typed from the session's program while the block runs, if lzy has its terminal.

    The screen is written down, so that an image which is taken meanwhile holds it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(LzyError):
            stack.enter_context(Line(session)).ask("hold")
        yield


def tell_state(session: str, folder: Path, facts: dict[str, Any]) -> None:
    """Tell the keeper, if there is one, how the session is; nobody waits for it."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock,
    ):
        sock.connect(str(socket_path(session, folder)))
        sock.send(pack_json(CONTROL, {"do": "state", **facts}))


def window_of(packed: bytes) -> tuple[int, int]:
    """Rows and columns of a struct winsize; 24 and 80 where it has none."""
    rows, columns = struct.unpack_from("=HH", packed) if len(packed) >= 4 else (0, 0)
    return rows or 24, columns or 80
