"""Leases on files: whoever opens one otherwise is held up, and the holder is told."""

import errno
import fcntl
import os
import signal
import sys

from dialogue import PATIENCE_S, Proof, converse

F_SETSIG = 10


def take(fd: int, kind: int, number: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    fcntl.fcntl(fd, F_SETSIG, number)


def main() -> None:
    folder = sys.argv[1]
    held = {}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGIO])
    for name, kind in (("read", fcntl.F_RDLCK), ("written", fcntl.F_WRLCK)):
        path = f"{folder}/{name}"
        with open(path, "w") as file:
            file.write(name)
        fd = os.open(path, os.O_RDONLY if kind == fcntl.F_RDLCK else os.O_RDWR)
        number = signal.SIGUSR1 if kind == fcntl.F_RDLCK else signal.SIGIO
        take(fd, kind, number)
        held[path] = (fd, kind, number)

    def prove() -> Proof:
        proof: Proof = {}
        for path, (fd, kind, number) in held.items():
            name = os.path.basename(path)
            proof[f"{name}: held"] = fcntl.fcntl(fd, fcntl.F_GETLEASE) == kind
            if not proof[f"{name}: held"]:
                continue
            child = os.fork()
            if child == 0:
                for other in held.values():
                    os.close(other[0])
                try:
                    os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                    os._exit(0)
                except OSError as error:
                    os._exit(error.errno)
            told = signal.sigtimedwait([number], PATIENCE_S)
            proof[f"{name}: told"] = told is not None and told.si_signo == number
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            proof[f"{name}: held up"] = status == errno.EWOULDBLOCK
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            take(fd, kind, number)
        return proof

    def spoil() -> None:
        for fd, _, _ in held.values():
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    converse(prove, spoil)


main()
