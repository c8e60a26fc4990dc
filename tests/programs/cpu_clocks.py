"""Timers that count processor time: of the process, of its main thread, of another thread."""

import ctypes
import queue
import signal
import struct
import threading
import time
from collections.abc import Callable

from clib import Itimerspec, Timespec, call
from dialogue import Proof, converse

LONG_S, SHORT_S = 1000.0, 0.12
BURNT_S = 0.03


def make_timer(clock: int, number: int, left_s: float) -> int:
    event = struct.pack("<qii", 0, number, 0).ljust(64, b"\0")
    timer = ctypes.c_int()
    call("syscall", 222, ctypes.c_int(clock), event, ctypes.byref(timer), restype=ctypes.c_long)
    set_timer(timer.value, left_s)
    return timer.value


def set_timer(timer: int, left_s: float) -> None:
    wanted = Itimerspec(Timespec(0, 0), Timespec(int(left_s), int(left_s % 1 * 1e9)))
    call("syscall", 223, timer, 0, ctypes.byref(wanted), None, restype=ctypes.c_long)


def left_s(timer: int) -> float:
    value = Itimerspec()
    call("syscall", 224, timer, ctypes.byref(value), restype=ctypes.c_long)
    return float(value.value.total_s)


def burn(clock: int, seconds: float) -> float:
    """Use so much processor time by that clock; how much it was."""
    start = time.clock_gettime(clock)
    while (used := time.clock_gettime(clock) - start) < seconds:
        sum(range(1000))
    return used


class Worker(threading.Thread):
    """A thread that does what it is told to."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.tasks: queue.Queue[Callable[[], float]] = queue.Queue()
        self.results: queue.Queue[float] = queue.Queue()
        self.start()

    def run(self) -> None:
        while True:
            self.results.put(self.tasks.get()())

    def do(self, task: "Callable[[], float]") -> float:
        self.tasks.put(task)
        return self.results.get()


def main() -> None:
    fired: dict[int, float] = {}
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPROF, signal.SIGVTALRM):
        signal.signal(number, lambda number, _: fired.setdefault(number, time.process_time()))
    worker, idle = Worker(), Worker()
    THREAD, PROCESS = time.CLOCK_THREAD_CPUTIME_ID, time.CLOCK_PROCESS_CPUTIME_ID
    named = time.pthread_getcpuclockid(worker.ident or 0)
    timers = {
        "process": make_timer(PROCESS, signal.SIGUSR1, LONG_S),
        "main": make_timer(THREAD, signal.SIGUSR1, LONG_S),
        "named": make_timer(named, signal.SIGUSR1, LONG_S),
        "worker": int(worker.do(lambda: make_timer(THREAD, signal.SIGUSR1, LONG_S))),
        "idle": int(idle.do(lambda: make_timer(THREAD, signal.SIGUSR1, LONG_S))),
    }
    soon = make_timer(PROCESS, signal.SIGUSR2, SHORT_S)
    signal.setitimer(signal.ITIMER_PROF, SHORT_S)
    signal.setitimer(signal.ITIMER_VIRTUAL, 50 * SHORT_S, 70)
    used = {"process": 0.0, "main": 0.0, "worker": 0.0, "idle": 0.0}

    def use() -> None:
        used["main"] += burn(THREAD, BURNT_S)
        used["worker"] += worker.do(lambda: burn(THREAD, BURNT_S))

    use()
    before = {name: left_s(timer) for name, timer in timers.items()}

    def prove() -> Proof:
        proof: Proof = {f"{n}: no time gained": left_s(t) <= before[n] for n, t in timers.items()}
        proof["not too early"] = bool(fired) or left_s(soon) > 0
        at = {name: left_s(timer) for name, timer in timers.items()}
        use()
        gone = {name: at[name] - left_s(timer) for name, timer in timers.items()}
        proof["process"] = gone["process"] >= 2 * BURNT_S or gone
        for name in ("main", "named", "worker"):
            proof[f"{name} counts its own"] = BURNT_S <= gone[name] < 2 * BURNT_S or gone
        proof["idle counts nothing"] = gone["idle"] < BURNT_S / 2 or gone
        burn(PROCESS, SHORT_S)
        proof["fires"] = signal.SIGUSR2 in fired and signal.SIGPROF in fired
        virtual, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
        proof["virtual"] = 0 < virtual < 50 * SHORT_S and 69.9 < interval < 70.1
        for name, timer in timers.items():
            before[name] = left_s(timer)
        return proof

    converse(prove, lambda: set_timer(timers["idle"], 2 * LONG_S))


main()
