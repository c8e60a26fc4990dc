"""seccomp filters: one on all threads, one more on a single thread, a third added for all later.

The first ends the process for some calls that lzy has it make. With the argument `strict` there is
nothing but read and write left to the process (SECCOMP_MODE_STRICT), and nothing to prove. With
`run COMMAND…` it becomes that command, under a filter as a container has one.
"""

import ctypes
import errno
import os
import queue
import signal
import struct
import sys
import threading
from collections.abc import Callable

from clib import call
from dialogue import Proof, converse

SYS_SECCOMP, SET_FILTER, FOR_ALL = 317, 1, 1
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
GETITIMER, PERSONALITY, SETRLIMIT, CAPSET, USERFAULTFD = 36, 135, 160, 126, 323
GETPRIORITY, PRIORITY_MAX, PRIORITY_MIN = 140, 146, 147


def add_filter(verdicts: "dict[int, int]", flags: int = 0) -> int:
    """Add a filter {system call: what becomes of it}, everything else being allowed."""
    program = struct.pack("<HBBI", LOAD, 0, 0, 0)
    for number, verdict in verdicts.items():
        program += struct.pack("<HBBI", JUMP_IF_EQUAL, 0, 1, number)
        program += struct.pack("<HBBI", RETURN, 0, 0, verdict)
    program += struct.pack("<HBBI", RETURN, 0, 0, ALLOW)
    place = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("<H6xQ", len(program) // 8, ctypes.addressof(place))
    result: int = call("syscall", SYS_SECCOMP, SET_FILTER, flags, header, restype=ctypes.c_long)
    return result


def error_of(number: int) -> int:
    """The errno of a system call with arguments that are all 0; 0 if it succeeds."""
    try:
        call("syscall", number, 0, 0, 0, restype=ctypes.c_long)
    except OSError as error:
        return error.errno or 0
    return 0


def dies_of(number: int) -> bool:
    """Whether a child that makes that call is ended by its filter."""
    child = os.fork()
    if child == 0:
        error_of(number)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSYS


class Worker:
    """A thread that does what it is told to."""

    def __init__(self) -> None:
        self.tasks: queue.Queue[Callable[[], object]] = queue.Queue()
        self.results: queue.Queue[object] = queue.Queue()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while True:
            self.results.put(self.tasks.get()())

    def do(self, task: "Callable[[], object]") -> object:
        self.tasks.put(task)
        return self.results.get()


def main() -> None:
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    one, other = Worker(), Worker()
    killed = (GETITIMER, PERSONALITY, SETRLIMIT, CAPSET, USERFAULTFD)
    add_filter({**dict.fromkeys(killed, KILL), PRIORITY_MAX: REFUSE | errno.ENOTUNIQ}, FOR_ALL)
    one.do(lambda: add_filter({GETPRIORITY: REFUSE | errno.EBADFD}))
    added: list[int] = []

    def prove() -> Proof:
        proof: Proof = {f"ends for {n}": dies_of(n) for n in killed}
        for name, worker in (("one", one), ("other", other)):
            proof[f"refused {name}"] = worker.do(lambda: error_of(PRIORITY_MAX)) == errno.ENOTUNIQ
        proof["refused a new one"] = Worker().do(lambda: error_of(PRIORITY_MAX)) == errno.ENOTUNIQ
        proof["refused one alone"] = one.do(lambda: error_of(GETPRIORITY)) == errno.EBADFD
        if not added:
            proof["allowed the others"] = error_of(GETPRIORITY) == 0
            proof["allowed the other"] = other.do(lambda: error_of(GETPRIORITY)) == 0
            # Works only if the filter of the others is the very one that this thread's grew from.
            more = {PRIORITY_MIN: REFUSE | errno.ECOMM}
            proof["added for all"] = one.do(lambda: add_filter(more, FOR_ALL)) == 0
            added.append(1)
        proof["added"] = other.do(lambda: error_of(PRIORITY_MIN)) == errno.ECOMM
        proof["and with it the one's"] = error_of(GETPRIORITY) == errno.EBADFD
        return proof

    converse(prove, lambda: add_filter({PRIORITY_MAX: REFUSE | errno.EPERM}))


def main_strictly() -> None:
    """Answer with as little as possible: no call but read and write."""
    replies = {b"ping\n": b"pong\n", b"prove\n": b'{"answers": true}\n'}
    call("prctl", PR_SET_SECCOMP, 1, 0, 0, 0)
    os.write(1, b"ready\n")
    while line := os.read(0, 64):
        os.write(1, replies[line])


if sys.argv[1:] == ["strict"]:
    main_strictly()
elif sys.argv[1:2] == ["run"]:
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    add_filter({USERFAULTFD: REFUSE | errno.EPERM})
    os.execvp(sys.argv[2], sys.argv[2:])
else:
    main()
