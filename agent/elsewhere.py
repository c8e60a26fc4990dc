"""Chunks of packs that are not here yet are read where they are: at the node a session came from.

A woken session needs what it wrote last at once; so that is asked for piece by piece, by its pager
and by the readers ahead, while whole packs come behind (`arriving`). What comes is authenticated as
what is read from a disk: an image says of each chunk what it must be.

Of each process and thread there is one connection. While the node cannot be reached a read fails
soon, and is not tried again for a while, for a pager that waits answers nobody.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
from pathlib import Path
from typing import Any

from ..checkpoint.errors import LzyError, StoreUnavailable
from ..checkpoint.image import Image
from ..checkpoint.store import Store
from .authority import client_context
from .peers import Peer

_ANSWERS_WITHIN_S = 2.0
_REST_S = 5.0

_others: list[Any] = []
"""Connections of processes that forked us: their descriptors may be something else's here by now,
so they are never closed."""


class Elsewhere:
    """Packs of another node's store, for who has `fleet`, our certificates."""

    def __init__(self, address: str, subject: str, fleet: Path) -> None:
        self._peer = Peer(address, subject, client_context(fleet))
        self._mine = threading.local()
        self._not_before_s = 0.0

    def read(self, pack: bytes, offset: int, length_bytes: int) -> bytes:
        """These bytes of a pack, or fewer where it ends. Raises StoreUnavailable."""
        if time.monotonic() < self._not_before_s:
            raise StoreUnavailable(f"pack {pack.hex()} is at {self._peer.where}, which is silent")
        path = f"/v1/packs/{pack.hex()}?offset={offset}&length={length_bytes}"
        for is_last in (False, True):  # a connection that nobody used for a while is closed
            try:
                return self._ask(path)
            except (OSError, http.client.HTTPException, LzyError) as error:
                self._drop()
                if is_last or not isinstance(error, http.client.HTTPException | ConnectionError):
                    self._not_before_s = time.monotonic() + _REST_S
                    words = f"cannot read pack {pack.hex()} at {self._peer.where}: {error}"
                    raise StoreUnavailable(words) from error
        raise AssertionError

    def _ask(self, path: str) -> bytes:
        connection = self._connection()
        connection.request("GET", path, None, self._peer.headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise StoreUnavailable(content[:200].decode(errors="replace"))
        return content

    def _connection(self) -> http.client.HTTPConnection:
        owner, connection = getattr(self._mine, "held", (0, None))
        if connection is None or owner != os.getpid():
            if connection is not None:
                _others.append(connection)
            connection = self._peer.connect(_ANSWERS_WITHIN_S)
            self._mine.held = os.getpid(), connection
        return connection

    def _drop(self) -> None:
        owner, connection = getattr(self._mine, "held", (0, None))
        self._mine.held = 0, None
        if connection is not None and owner == os.getpid():
            with contextlib.suppress(OSError):
                connection.close()


def follow(image: Image, elsewhere: Elsewhere) -> Image:
    """Have an image read there what it does not find here, also when its pager opens it anew."""

    def reopen(store: str, name: str) -> Image:
        with Store.open(Path(store)) as opened:
            return follow(opened.load_unchecked(name), elsewhere)

    image.elsewhere, image.reopen = elsewhere.read, reopen
    return image
