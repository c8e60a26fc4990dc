"""Children that answer: forked processes, each asked line by line over a socket pair of its own."""

import os
import select
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from dialogue import PATIENCE_S

Answer = Callable[[str], Any]

_ours: "list[socket.socket]" = []


class Child:
    """A forked child; `live` is called in it, and tells how it answers.

    There when its `live` has returned; it ends when its parent has.
    """

    def __init__(self, live: "Callable[[], Answer]") -> None:
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            _serve(theirs, self._socket, live)
        theirs.close()
        _ours.append(self._socket)
        heard = self.hear()
        assert heard == "there", heard

    def ask(self, line: str) -> str:
        """What it answers, as text."""
        self.say(line)
        return self.hear()

    def say(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        heard = b""
        while not heard.endswith(b"\n"):
            if not select.select([self._socket], [], [], PATIENCE_S)[0]:
                raise TimeoutError(f"child {self.pid} is silent")
            byte = self._socket.recv(1)
            if not byte:
                raise EOFError(f"child {self.pid} has ended")
            heard += byte
        return heard[:-1].decode()


def _serve(sock: socket.socket, parents: socket.socket, live: "Callable[[], Answer]") -> NoReturn:
    try:
        for other in [*_ours, parents]:
            other.close()
        _ours.clear()
        answer = live()
        sock.sendall(b"there\n")
        for line in sock.makefile("r"):
            try:
                told = str(answer(line.rstrip("\n")))
            except Exception:
                told = repr(traceback.format_exc())
            sock.sendall(told.encode() + b"\n")
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    os._exit(0)


def read_exactly(descriptor: int, length_bytes: int) -> bytes:
    """So many bytes, or fewer at the end of the file; TimeoutError if they do not come."""
    pieces = []
    while length_bytes:
        if not select.select([descriptor], [], [], PATIENCE_S)[0]:
            raise TimeoutError(f"{length_bytes} bytes do not come")
        piece = os.read(descriptor, length_bytes)
        if not piece:
            break
        pieces.append(piece)
        length_bytes -= len(piece)
    return b"".join(pieces)


def state_of(pid: int) -> str:
    """The letter of a process's state in /proc."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def await_zombie(pid: int) -> None:
    """Wait until a child of ours has ended, and leave it a zombie."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def end_at(number: int) -> NoReturn:
    """End by that signal, as if nobody had asked for another way."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError("a signal did not end it")
