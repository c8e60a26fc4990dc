"""A process that has changed everything about itself that a process can change; /proc shows it.

Argument: `root` keeps its credentials, `nobody` gives most of them up.
"""

import contextlib
import ctypes
import os
import resource
import sys
import threading
from collections.abc import Callable

from clib import call
from dialogue import Proof, converse

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME, PR_SET_SECUREBITS = 1, 4, 8, 15, 28
PR_SET_TIMERSLACK, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 29, 36, 38, 41
PR_SET_MEMORY_MERGE, PR_CAPBSET_DROP = 67, 24
IOPRIO_BEST_EFFORT, IOPRIO_IDLE = 2 << 13, 3 << 13
SYS_IOPRIO_SET = 251
SCHED_BATCH, SCHED_IDLE, SCHED_RR = 3, 5, 2
ADDR_NO_RANDOMIZE = 0x0040000


def prctl(option: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)][:4]
    return call("prctl", option, *padded)


def set_name(name: bytes) -> None:
    room = ctypes.create_string_buffer(name)
    prctl(PR_SET_NAME, ctypes.addressof(room))


def main() -> None:
    folder = os.path.join(os.getcwd(), "work")
    os.mkdir(folder)
    os.chmod(folder, 0o755)
    os.chdir(folder)
    os.umask(0o137)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("321")
    with open("/proc/self/coredump_filter", "w") as file:
        file.write("0x1b")
    call("personality", ctypes.c_ulong(ADDR_NO_RANDOMIZE))
    set_name(b"leader")
    prctl(PR_SET_TIMERSLACK, 123_456)
    prctl(PR_SET_THP_DISABLE, 1)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, 0)
    with contextlib.suppress(OSError):  # Kernels built without KSM.
        prctl(PR_SET_MEMORY_MERGE, 1)
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    call("syscall", SYS_IOPRIO_SET, 1, 0, IOPRIO_BEST_EFFORT | 6, restype=ctypes.c_long)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, 4000))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 1 << 20))
    resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, 16 << 20))
    os.environ["INVISIBLE"] = "not in /proc/PID/environ, which is the initial one"

    ready, never = threading.Semaphore(0), threading.Event()

    def be_different(name: bytes, change: Callable[[], object]) -> None:
        set_name(name)
        change()
        ready.release()
        never.wait()

    def slack_and_idle() -> None:
        prctl(PR_SET_TIMERSLACK, 77_000)
        call("syscall", SYS_IOPRIO_SET, 1, 0, IOPRIO_IDLE, restype=ctypes.c_long)

    changes = [
        (b"nice", lambda: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)),
        (b"batch", lambda: os.sched_setscheduler(0, SCHED_BATCH, os.sched_param(0))),
        (b"idle", lambda: os.sched_setscheduler(0, SCHED_IDLE, os.sched_param(0))),
        (b"round robin", lambda: os.sched_setscheduler(0, SCHED_RR, os.sched_param(3))),
        (b"slack", slack_and_idle),
        (b") R \xff\x80\nstrange", lambda: os.sched_setaffinity(0, [0])),
        (b"plain", lambda: None),
    ]
    os.setpriority(os.PRIO_PROCESS, 0, 4)
    for name, change in changes:
        threading.Thread(target=be_different, args=(name, change), daemon=True).start()
        ready.acquire()

    if sys.argv[1] == "nobody":
        os.setgroups([65534, 1234])
        os.setresgid(65534, 1234, 65534)
        prctl(PR_CAPBSET_DROP, 25)
        prctl(PR_SET_KEEPCAPS, 1)
        os.setresuid(65534, 65534, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    else:
        prctl(PR_SET_SECUREBITS, 0x3)
        prctl(PR_SET_DUMPABLE, 0)

    dumpable = prctl(3)

    def prove() -> Proof:
        return {
            "cwd": os.getcwd() == folder,
            "umask": os.umask(0o137) == 0o137,
            "environment": os.environ["INVISIBLE"] != "",
            "dumpable": prctl(3) == dumpable,
            "keepcaps": prctl(7) == (sys.argv[1] == "nobody"),
            "thp": prctl(42) == 1,
            "slack": prctl(30) == 123_456,
        }

    converse(prove, lambda: os.umask(0))
    os._exit(0)


main()
