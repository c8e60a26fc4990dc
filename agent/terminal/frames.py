"""What a keeper and those who talk to it send each other: frames of a kind, a length, and bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ...checkpoint.home import home

HELLO: Final = 1
"""First of a console: JSON with `rows`, `columns`; the answer is what paints the screen.

With `paints` false nothing is painted: the console shows what is there already."""
INPUT: Final = 2
"""What somebody typed."""
RESIZE: Final = 3
"""JSON `rows`, `columns`: the window of a console has changed."""
REPAINT: Final = 4
"""Paint the screen again."""
CONTROL: Final = 5
"""JSON with `do`: hold, save, state, look. Answered by one ANSWER."""
OUTPUT: Final = 10
"""What the console is to show."""
TOLD: Final = 11
"""JSON with `state`, and with `exit_status` (as waitpid(2) has it) when the program has ended."""
ANSWER: Final = 12
"""JSON."""

MOST_BYTES: Final = 4 << 20
_HEAD = struct.Struct("!BI")


def socket_path(session: str, folder: Path | None = None) -> Path:
    """Where the keeper of a session's terminal listens; short, for sun_path has 108 bytes."""
    digest = hashlib.blake2b(session.encode(), digest_size=5).hexdigest()
    return (folder or home()) / "run" / f"tty-{digest}"


def pack(kind: int, content: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(kind, len(content)) + content


def pack_json(kind: int, document: dict[str, Any]) -> bytes:
    """One frame that holds a document."""
    return pack(kind, json.dumps(document).encode())


class Frames:
    """Puts frames together from what has come."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The frames that are whole by now. Raises ValueError at one that is too long."""
        self._rest += data
        while len(self._rest) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._rest)
            if length > MOST_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            if len(self._rest) < _HEAD.size + length:
                return
            content = bytes(self._rest[_HEAD.size : _HEAD.size + length])
            del self._rest[: _HEAD.size + length]
            yield kind, content
