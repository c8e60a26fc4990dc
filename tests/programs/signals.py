"""Signals: handlers, masks, pending ones with their values, alternate stacks; timers."""

import ctypes
import faulthandler
import os
import signal
import struct
import threading
import time

from clib import Itimerspec, Timespec, call
from dialogue import PATIENCE_S, Proof, converse

FIRST = signal.SIGRTMIN
QUEUED, TO_THREAD, POSIX, NEVER = FIRST + 3, FIRST + 4, FIRST + 5, FIRST + 6
CLOCK_REALTIME, CLOCK_MONOTONIC, TIMER_ABSTIME = 0, 1, 1
SI_QUEUE, SI_TIMER, SI_TKILL, SIGEV_THREAD_ID, SIGEV_NONE = -1, -2, -6, 4, 1


def wait_for(*numbers: int, timeout_s: float = PATIENCE_S) -> tuple[int, int, int]:
    """Take the next of these signals: its number, si_code and value."""
    mask = struct.pack("<16Q", sum(1 << (n - 1) for n in numbers), *[0] * 15)
    information = ctypes.create_string_buffer(128)
    limit = Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
    # The system call itself: glibc would fold SI_TKILL into SI_USER.
    call("syscall", 128, ctypes.c_char_p(mask), information, ctypes.byref(limit),
         ctypes.c_size_t(8), restype=ctypes.c_long)  # fmt: skip
    number, _, code = struct.unpack_from("3i", information)
    return number, code, struct.unpack_from("i", information, 24)[0]


def drain(number: int) -> list[tuple[int, int]]:
    """Code and value of all signals of that number which are pending."""
    taken = []
    while number in signal.sigpending():
        taken.append(wait_for(number)[1:])
    return taken


def kernel_action(number: int) -> bytes:
    """What the kernel holds as the action: handler, flags, restorer, mask."""
    action = ctypes.create_string_buffer(32)
    call("syscall", 13, number, None, action, ctypes.c_size_t(8), restype=ctypes.c_long)
    return action.raw


def alternate_stack() -> bytes:
    stack = ctypes.create_string_buffer(24)
    call("sigaltstack", None, stack)
    address, flags, size = struct.unpack("Qi4xQ", stack.raw)
    return struct.pack("QQQ", address, flags & ~1, size)


def create_timer(clock: int, number: int, value: int, thread: int = 0, how: int = 0) -> int:
    event = struct.pack("<Qiii48x", value, number, how, thread)
    identifier = ctypes.c_int()
    call("syscall", 222, clock, ctypes.c_char_p(event), ctypes.byref(identifier),
         restype=ctypes.c_long)  # fmt: skip
    return identifier.value


def set_timer(identifier: int, first_s: float, every_s: float = 0.0, flags: int = 0) -> None:
    both = [Timespec(int(s), int(s % 1 * 1e9)) for s in (every_s, first_s)]
    call("syscall", 223, identifier, flags, ctypes.byref(Itimerspec(*both)), None,
         restype=ctypes.c_long)  # fmt: skip


def timer_left_s(identifier: int) -> tuple[float, float]:
    """Seconds left and the interval."""
    value = Itimerspec()
    call("syscall", 224, identifier, ctypes.byref(value), restype=ctypes.c_long)
    return value.value.total_s, value.interval.total_s


class Sleeper(threading.Thread):
    """A thread with its own mask, signals pending for it alone, and its own alternate stack."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked, self.answered = threading.Event(), threading.Event()
        self.told = threading.Event()

    def run(self) -> None:
        self.room = ctypes.create_string_buffer(65536)
        call("sigaltstack", struct.pack("Qi4xQ", ctypes.addressof(self.room), 0, 65536), None)
        self.stack = alternate_stack()
        signal.pthread_sigmask(signal.SIG_BLOCK, [TO_THREAD, QUEUED + 7])
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        signal.pthread_kill(threading.get_ident(), TO_THREAD)
        while True:
            self.answered.set()
            self.asked.wait()
            self.asked.clear()
            pending = drain(TO_THREAD)
            self.proof = {
                "thread: pending for it": [code for code, _ in pending] == [SI_TKILL],
                "thread: mask": signal.pthread_sigmask(signal.SIG_BLOCK, []) == self.mask,
                "thread: alternate stack": alternate_stack() == self.stack,
                "thread: its timer": wait_for(POSIX)[1] == SI_TIMER,
            }
            signal.pthread_kill(threading.get_ident(), TO_THREAD)


def main() -> None:
    ticks: list[int] = []
    caught: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.signal(signal.SIGUSR1, lambda number, _: caught.append(number))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.siginterrupt(signal.SIGUSR1, False)
    faulthandler.enable()
    faulthandler.register(signal.SIGTTIN, all_threads=True, chain=True)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    signal.setitimer(signal.ITIMER_VIRTUAL, 5000, 7000)
    signal.setitimer(signal.ITIMER_PROF, 6000, 0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [QUEUED, POSIX, NEVER, signal.SIGUSR2])

    def queue_three() -> None:
        for value in (11, 22, 33):
            call("sigqueue", os.getpid(), QUEUED, ctypes.c_void_p(value))
        os.kill(os.getpid(), signal.SIGUSR2)

    queue_three()
    sleeper = Sleeper()
    sleeper.start()
    sleeper.answered.wait()
    sleeper.answered.clear()

    passing = create_timer(CLOCK_MONOTONIC, NEVER, 0)
    identifiers = {
        "far": create_timer(CLOCK_MONOTONIC, NEVER, 5),
        "absolute": create_timer(CLOCK_REALTIME, NEVER, 6),
        "silent": create_timer(CLOCK_MONOTONIC, 0, 0, how=SIGEV_NONE),
        "unarmed": create_timer(CLOCK_REALTIME, NEVER, 7),
        "thread": create_timer(CLOCK_MONOTONIC, POSIX, 8, sleeper.native_id, SIGEV_THREAD_ID),
        "ticking": create_timer(CLOCK_MONOTONIC, QUEUED + 7, 99),
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, [QUEUED + 7])
    call("syscall", 226, passing, restype=ctypes.c_long)  # timer_delete: the ids have a gap now
    set_timer(identifiers["far"], 3600, 60)
    set_timer(identifiers["absolute"], time.time() + 1800, flags=TIMER_ABSTIME)
    set_timer(identifiers["silent"], 900)
    set_timer(identifiers["thread"], 0.02, 0.02)
    set_timer(identifiers["ticking"], 0.02, 0.02)

    numbers = [n for n in range(1, 65) if n not in (signal.SIGKILL, signal.SIGSTOP)]
    actions = {n: kernel_action(n) for n in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stack = alternate_stack()

    def prove() -> Proof:
        proof: Proof = {}
        different = [n for n in numbers if kernel_action(n) != actions[n]]
        proof["actions"] = different or True
        proof["mask"] = signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        proof["alternate stack"] = alternate_stack() == stack
        proof["queued, in order"] = drain(QUEUED) == [(SI_QUEUE, v) for v in (11, 22, 33)]
        proof["standard signal pending once"] = [c for c, _ in drain(signal.SIGUSR2)] == [0]
        queue_three()
        before = len(ticks)
        deadline = time.monotonic() + PATIENCE_S
        while len(ticks) < before + 3 and time.monotonic() < deadline:
            signal.sigtimedwait([], 0.01)
        proof["alarm goes on"] = len(ticks) >= before + 3
        proof["real"] = signal.getitimer(signal.ITIMER_REAL)[1] == 0.02
        virtual = signal.getitimer(signal.ITIMER_VIRTUAL)
        proof["virtual"] = 4900 < virtual[0] <= 5000.1 and virtual[1] == 7000
        proof["profiling"] = 5900 < signal.getitimer(signal.ITIMER_PROF)[0] <= 6000.1
        before = len(caught)
        os.kill(os.getpid(), signal.SIGUSR1)
        proof["handler runs"] = len(caught) == before + 1
        proof["wakeup descriptor"] = signal.SIGUSR1 in os.read(wake_read, 65536)
        os.kill(os.getpid(), signal.SIGPIPE)
        os.kill(os.getpid(), signal.SIGHUP)
        far = timer_left_s(identifiers["far"])
        proof["far timer"] = 3000 < far[0] < 3600 and far[1] == 60
        proof["absolute timer"] = 1200 < timer_left_s(identifiers["absolute"])[0] < 1800
        proof["silent timer"] = 300 < timer_left_s(identifiers["silent"])[0] < 900
        proof["unarmed timer"] = timer_left_s(identifiers["unarmed"]) == (0, 0)
        proof["ticking timer"] = wait_for(QUEUED + 7)[1:] == (SI_TIMER, 99)
        proof["ids"] = len(set(identifiers.values())) == 6 and passing not in identifiers.values()
        sleeper.asked.set()
        proof["thread answers"] = sleeper.answered.wait(PATIENCE_S)
        sleeper.answered.clear()
        proof |= sleeper.proof
        new = create_timer(CLOCK_MONOTONIC, NEVER, 0)
        proof["a new timer"] = new not in identifiers.values()
        call("syscall", 226, new, restype=ctypes.c_long)
        return proof

    converse(prove, lambda: drain(QUEUED))
    os._exit(0)


main()
