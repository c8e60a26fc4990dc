"""The conversation that each program here has with its tester: lines in on stdin, lines out.

A program says `ready` when it is in mid-life. Then it answers `ping`, `prove` (a JSON object whose
false values are failures), `spoil` (it damages the very state it proves, so that a test can see
its proof fail) and `end`. Nothing here knows that processes can be moved.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any, Callable, Dict, Optional

Proof = Dict[str, Any]

#: How long a proof waits for something that ought to happen at once.
PATIENCE_S = float(os.environ.get("LZY_TEST_PATIENCE_S", "20"))


def say(text: str) -> None:
    """Write one line to the tester."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def answer(line: str, prove: Callable[[], Proof], spoil: Optional[Callable[[], Any]]) -> bool:
    """Answer one line; False when it was `end`."""
    word = line.strip()
    try:
        if word == "end":
            return False
        if word == "ping":
            say("pong")
        elif word == "prove":
            say(json.dumps(prove()))
        elif word == "spoil" and spoil is not None:
            spoil()
            say("spoiled")
        else:
            say("what?")
    except Exception:
        say(json.dumps({"raised": False, "traceback": traceback.format_exc()}))
    return True


def converse(prove: Callable[[], Proof], spoil: Optional[Callable[[], Any]] = None) -> None:
    """Say `ready`, then answer until told to end."""
    say("ready")
    while True:
        line = sys.stdin.readline()
        if not line or not answer(line, prove, spoil):
            return


def ends(thread: threading.Thread) -> bool:
    """Whether the thread comes to its end within `PATIENCE_S`."""
    thread.join(PATIENCE_S)
    return not thread.is_alive()
