"""Which kinds of descriptors are loaded, and who is asked."""

from __future__ import annotations

import socket
import subprocess
import sys

from lzy.checkpoint.resources.kind import all_kinds, kinds_for

LOADING = """
import sys
from lzy.checkpoint.resources.kind import load_kinds
load_kinds([int(sys.argv[1])])
print("socket" in sys.modules, "lzy.checkpoint.resources.pipe" in sys.modules)
"""


def loaded_for(standard_input: int | socket.socket) -> list[str]:
    """What is loaded for a process with that as its standard input."""
    none = subprocess.DEVNULL
    process = subprocess.Popen(["sleep", "60"], stdin=standard_input, stdout=none, stderr=none)
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOADING, str(process.pid)],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.split()
    finally:
        process.kill()
        process.wait()


def test_sockets_are_loaded_where_there_are_some() -> None:
    """The socket module takes longer than all else: only a process that has a socket needs it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert loaded_for(theirs) == ["True", "True"]
    assert loaded_for(subprocess.DEVNULL) == ["False", "True"]


def test_everybody_is_asked_about_a_socket() -> None:
    """And about all else everybody but the kinds of sockets, in the same order."""
    assert list(kinds_for("socket:[123]")) == list(all_kinds())
    others = [kind for kind in all_kinds() if not kind.name.endswith("_socket")]
    assert list(kinds_for("pipe:[123]")) == others
    assert {"tcp_socket", "unix_socket"} <= {kind.name for kind in all_kinds()} - {
        kind.name for kind in others
    }
