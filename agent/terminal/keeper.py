"""`python -m lzy.agent.terminal.keeper PLAN`: keeps one terminal, and the program that runs on it.

Two processes hold the terminal, so that it outlives either: the *guard*, which starts the program,
is its parent and does nothing but wait; and the *host* (`host`), which serves the consoles. When
the host dies, the guard starts another, which finds the screen as it was saved last. When the guard
dies, the host forks: the parent is the guard from then on, the child goes on serving. Only if both
are killed at once the terminal hangs up, and what runs on it gets SIGHUP.

PLAN is a JSON object; see `starting`. What was made is told on stdout, in one line of JSON.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any, NoReturn

from ...checkpoint.home import home
from ...checkpoint.kept import kept_path
from ...checkpoint.linux import descriptors as kernel
from ...checkpoint.linux.detached import close_all_but, forget_signals, set_name
from .frames import socket_path
from .unread import put_unread, unread_path

_PAUSE_S = 0.2


class Holdings:
    """What both processes hold: the terminal, its file, the socket; and the program they know."""

    def __init__(self, session: str, owner_uid: int) -> None:
        self.session = session
        self.owner_uid = owner_uid
        self.home = home()
        self.lock = _take_lock(session)
        self.master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(self.master, kernel.TIOCSPTLCK, struct.pack("=i", 0))
        number = struct.unpack("=I", fcntl.ioctl(self.master, kernel.TIOCGPTN, bytes(4)))[0]
        self.device = f"/dev/pts/{number}"
        # Held, too: without any slave open, reading from the master fails.
        self.slave = os.open(self.device, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.is_awaited = False
        """Whoever starts the program is about to connect: until then the terminal stays."""
        self.program_pid = 0
        self.program_status: int | None = None
        """As waitpid(2) has it, once the guard has it; None for a program that is not its child."""

    def listen(self) -> None:
        """Have consoles come; whoever is not this user is turned away by the file's mode."""
        path = socket_path(self.session)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.listener.bind(str(path))
        path.chmod(0o600)
        if self.owner_uid != os.geteuid():  # the agent is root, the session somebody else's
            os.chown(path, self.owner_uid, -1)
            os.chown(self.device, self.owner_uid, -1)
        self.listener.listen(16)
        self.listener.setblocking(False)

    def write_down(self, guard: int, host: int) -> None:
        """Tell who keeps it, in the file whose lock says that they live."""
        told = {"device": self.device, "keeper_pid": guard, "host_pid": host}
        content = json.dumps(told).encode()
        os.pwrite(self.lock, content, 0)
        os.ftruncate(self.lock, len(content))


def main() -> None:
    """Make the terminal, start the program, and keep both."""
    plan: dict[str, Any] = json.loads(sys.argv[1])
    set_name("lzy-tty-guard")
    holdings = Holdings(plan["session"], plan.get("owner_uid", os.geteuid()))
    if plan.get("settings"):
        fcntl.ioctl(holdings.slave, kernel.TCSETS2, base64.b64decode(plan["settings"]))
    window = struct.pack("=HHHH", plan["rows"], plan["columns"], 0, 0)
    fcntl.ioctl(holdings.master, kernel.TIOCSWINSZ, window)
    _put_unread(holdings)
    holdings.listen()
    holdings.is_awaited = bool(plan.get("is_awaited"))
    if plan.get("command"):
        try:
            holdings.program_pid = _start_program(plan["command"], holdings)
        except OSError as error:
            socket_path(holdings.session).unlink(missing_ok=True)
            kept_path(holdings.session).unlink(missing_ok=True)
            print(json.dumps({"error": error.strerror, "number": error.errno}), flush=True)
            return
    os.umask(0o077)
    os.chdir("/")
    host, line = _fork_host(holdings, plan.get("state", "running"))
    holdings.write_down(os.getpid(), host)
    told = {"pid": holdings.program_pid, "device": holdings.device, "keeper_pid": os.getpid()}
    print(json.dumps(told), flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    guard(holdings, host, line)


def guard(holdings: Holdings, host: int, line: socket.socket) -> NoReturn:
    """Wait for the program and the host; start the host again unless it says that all is over."""
    set_name("lzy-tty-guard")
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            os._exit(0)
        if pid == host:
            if status == 0:
                os._exit(0)
            print(f"lzy: the host of {holdings.session} ended ({status})", file=sys.stderr)
            time.sleep(_PAUSE_S)
            line.close()
            host, line = _fork_host(holdings, "")
            holdings.write_down(os.getpid(), host)
        elif pid == holdings.program_pid:
            holdings.program_status = status
            with contextlib.suppress(OSError):
                line.send(struct.pack("=i", status))


def _fork_host(holdings: Holdings, state: str) -> tuple[int, socket.socket]:
    """Fork a host; its pid, and the line to it, which ends when the guard does."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        from .host import Host

        Host(holdings, theirs, state).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _start_program(command: list[str], holdings: Holdings) -> int:
    """Start the program as the leader of a session on the terminal. Raises OSError."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            slave = os.open(holdings.device, os.O_RDWR)  # which makes it the controlling terminal
            for number in range(3):
                os.dup2(slave, number)
            forget_signals()
            close_all_but([0, 1, 2, writing])
            environment = {**os.environ, "LZY_SESSION": holdings.session}
            os.execvpe(command[0], command, environment)
        except OSError as error:
            os.write(writing, str(error.errno).encode())
        finally:
            os._exit(127)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        failure = file.read()
    if failure:
        os.waitpid(pid, 0)
        raise OSError(int(failure), os.strerror(int(failure)))
    return pid


def _put_unread(holdings: Holdings) -> None:
    """Have wait there what waited where the session comes from."""
    path = unread_path(holdings.session)
    with contextlib.suppress(OSError):
        typed = path.read_bytes()
        path.unlink()
        put_unread(holdings.master, holdings.slave, typed)


def _take_lock(session: str) -> int:
    """Be the only keeper of that session's terminal; the descriptor that says so."""
    path = kept_path(session)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + 2  # somebody may just be looking whether it is held
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                told = {"error": f"the terminal of {session} is kept already", "number": 0}
                print(json.dumps(told), flush=True)
                sys.exit(1)
            time.sleep(0.02)


if __name__ == "__main__":
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    main()
