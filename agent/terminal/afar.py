"""Where consoles of a session that has moved away are heard, and how they reach its terminal there.

The keeper of its terminal has told them that it goes, and went; they connect again at the same
socket. Whoever listens there then (`passages`) passes them on to the node that has the session.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.errors import Busy, NotFound
from ...checkpoint.image import Image
from ...checkpoint.kept import find_kept
from ...checkpoint.store import Store
from ..state import ENDED, FAILED, HIBERNATED, Record
from .frames import socket_path
from .returning import find_terminal, outside_terminal

if TYPE_CHECKING:
    from ..node import Agent
    from ..session import Session

TERMINAL = "terminal"
"""What stands for a port in the path of a passage."""
_GOES_WITHIN_S = 60.0
_LOOKS_EVERY_S = 0.02


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


def _make_for_sleeper(store: Path, record: Record) -> None:
    with Store.open(store) as opened, opened.load_unchecked(record.image) as image:
        document: dict[str, Any] = image.document
        find_terminal(record.name, record.owner_uid, document, state=HIBERNATED)
