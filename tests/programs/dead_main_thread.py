"""A main thread that has ended while others live, one with a child; /proc calls it a zombie."""

import ctypes
import os
import queue
import signal
import threading

from dialogue import PATIENCE_S, Proof, converse, ends

PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)
own = threading.local()


def read_stat():
    with open(f"/proc/{os.getpid()}/stat") as file:
        head, _, tail = file.read().rpartition(")")
    fields = tail.split()
    return {
        "name": head.partition("(")[2],
        "state": fields[0],
        "nice": fields[16],
        "threads": int(fields[17]),
        "exit": int(fields[49]),
    }


def make_child():
    """A child of this very thread, whose end it is told of: not that of the main one."""
    ours, theirs = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(theirs[1], b"+")
        while word := os.read(ours[0], 1):
            os.write(theirs[1], word)
        os._exit(3)
    assert os.read(theirs[0], 1) == b"+"
    return pid, ours[1], theirs[0]


def talk() -> None:
    main.join()
    before = read_stat()
    threads = threading.active_count()
    own.value = "mine"
    child, to, back = make_child()
    asked, answered = queue.SimpleQueue(), queue.SimpleQueue()

    def work():
        count = 41
        while asked.get():
            count += 1
            answered.put(count)

    worker = threading.Thread(target=work, name="worker")
    worker.start()
    heard = []
    libc.pthread_setname_np(ctypes.c_ulong(threading.get_ident()), b"talker")
    last = [41]

    def prove() -> Proof:
        now = read_stat()
        asked.put(True)
        os.write(to, b"?")
        last[0] += 1
        with open("/proc/thread-self/comm") as file:
            name = file.read()
        return {
            "before": before["state"] == "Z" and before["name"] == "ended" and threads == 2,
            "main thread": now["state"] == "Z" and now["threads"] == 3,
            "what is left of it": {**now, "threads": before["threads"]} == before,
            "a thread counts": answered.get(timeout=PATIENCE_S) == last[0],
            "a child answers": os.read(back, 1) == b"?",
            "its parent": os.waitpid(child, os.WNOHANG) == (0, 0),
            "of its own": own.value == "mine" and name == "talker\n" and not heard,
        }

    def spoil() -> None:
        asked.put(False)
        os.kill(child, signal.SIGKILL)
        ends(worker)
        last[0] += 5

    converse(prove, spoil)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    asked.put(False)
    ends(worker)
    os._exit(0)


class MainThread:
    """Joined when it is a zombie, which its own lock says too early, or not at all."""

    def join(self) -> None:
        while read_stat()["state"] != "Z":
            os.sched_yield()


main = MainThread()
threading.Thread(target=talk).start()
libc.prctl(15, b"ended")
libc.setpriority(0, 0, 5)
libc.syscall(60, 7)
