"""Where consoles of a session that has moved away are heard, and how they reach its terminal there.

The keeper of its terminal has told them that it goes, and went; they connect again at the same
socket. Whoever listens there then (`passages`) passes them on to the node that has the session.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import time
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.errors import Busy, NotFound
from ...checkpoint.image import Image
from ...checkpoint.kept import MOST_SCREEN_BYTES, find_kept, read_screen, screen_path
from ...checkpoint.store import Store
from ..state import ENDED, FAILED, HIBERNATED, Record
from .frames import ANSWER, CONTROL, Frames, pack_json, socket_path
from .returning import find_terminal, outside_terminal
from .unread import unread_path

if TYPE_CHECKING:
    from ..node import Agent
    from ..session import Session

TERMINAL = "terminal"
"""What stands for a port in the path of a passage."""
_GOES_WITHIN_S = 60.0
_LOOKS_EVERY_S = 0.02
_SAVES_WITHIN_S = 2.0


def has_terminal(image: Image) -> bool:
    """Whether a session with that image is on a terminal of lzy's, or will be when it wakes."""
    return outside_terminal(image.document) is not None


async def await_end(session: str, home: Path) -> None:
    """Until nobody keeps a terminal for the session here. Raises TimeoutError."""
    deadline = time.monotonic() + _GOES_WITHIN_S
    while find_kept(session, home):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the terminal of {session} is still kept")
        await asyncio.sleep(_LOOKS_EVERY_S)


def listen_for_consoles(session: str, home: Path, owner_uid: int) -> socket.socket:
    """Be where its keeper was; for the session's owner and root. Raises OSError."""
    path = socket_path(session, home)
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listening.bind(str(path))
        path.chmod(0o600)
        if owner_uid != os.geteuid():
            os.chown(path, owner_uid, -1)
        listening.listen(16)
    except BaseException:
        listening.close()
        raise
    return listening


async def connect_to_terminal(
    agent: Agent, session: Session
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the terminal of a session of this node.

    One that came here asleep gets it now. Raises NotFound (it has none, for it has ended), Busy
    (it has none at this moment).
    """
    record = session.record
    if record.state in (ENDED, FAILED):
        raise NotFound(f"session {record.name} has {record.state}", remedy="see lzy why")
    sleeps = record.state == HIBERNATED and not record.moving and not session.lock.locked()
    if sleeps and not find_kept(record.name, agent.home):
        await agent.children.run_aside(partial(_make_for_sleeper, agent.store, record))
    try:
        return await asyncio.open_unix_connection(str(socket_path(record.name, agent.home)))
    except OSError as error:
        raise Busy(f"no terminal is kept for session {record.name} just now") from error


async def take_terminal(session: str, home: Path) -> dict[str, str]:
    """What goes along of the terminal of a session whose program has been ended.

    `screen`: what it shows; the image has what it showed when its dump began. `unread`: what was
    typed, and nobody has read.
    """
    unread = ""
    with contextlib.suppress(OSError, TimeoutError, ValueError, KeyError):
        reader, writer = await asyncio.open_unix_connection(str(socket_path(session, home)))
        try:
            writer.write(pack_json(CONTROL, {"do": "save"}))
            async with asyncio.timeout(_SAVES_WITHIN_S):
                unread = (await _read_answer(reader))["unread"]
        finally:
            writer.close()
    screen = base64.b64encode(zlib.compress(read_screen(session, home))).decode()
    return {"screen": screen, "unread": base64.b64encode(unread.encode("latin-1")).decode()}


async def _read_answer(reader: asyncio.StreamReader) -> dict[str, Any]:
    frames = Frames()
    while data := await reader.read(65536):
        for kind, content in frames.feed(data):
            if kind == ANSWER:
                document: dict[str, Any] = json.loads(content)
                return document
    raise OSError("the terminal's keeper has ended")


def put_terminal(session: str, home: Path, told: dict[str, Any]) -> None:
    """Have a session that comes find that, not what an earlier stay left; before it has a terminal.

    Where nothing is told of the screen it is the one in its image.
    """
    for name, path in (
        ("screen", screen_path(session, home)),
        ("unread", unread_path(session, home)),
    ):
        path.unlink(missing_ok=True)
        with contextlib.suppress(ValueError, zlib.error, OSError):
            content = base64.b64decode(str(told.get(name, "")))
            if name == "screen" and content:
                content = zlib.decompressobj().decompress(content, MOST_SCREEN_BYTES)
            if content:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.write_bytes(content)


def _make_for_sleeper(store: Path, record: Record) -> None:
    with Store.open(store) as opened, opened.load_unchecked(record.image) as image:
        document: dict[str, Any] = image.document
        find_terminal(record.name, record.owner_uid, document, state=HIBERNATED)
