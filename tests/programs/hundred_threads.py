"""A hundred threads in all kinds of system calls and in user code; each is woken in its own way."""

import ctypes
import fcntl
import functools
import os
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from clib import Itimerspec, Timespec, call, libc
from dialogue import Proof, converse, ends

INTERRUPT, SIGWAIT = signal.SIGUSR1, signal.SIGRTMIN + 1
LONG_S = 5000

# What a thread does until it is woken, what wakes it, and what the first then returns.
Kind = tuple[Callable[[], Any], Callable[[threading.Thread], Any], Any]
#: The first thing that each thread does when its kind has prepared everything.
KINDS: list[Callable[[], Kind]] = []


def kind(make: Callable[[], Kind]) -> Callable[[], Kind]:
    KINDS.append(make)
    return make


def interrupt(thread: threading.Thread) -> None:
    signal.pthread_kill(thread.ident, INTERRUPT)


@kind
def reads_a_pipe() -> Kind:
    read, write = os.pipe()
    return lambda: os.read(read, 9), lambda _: os.write(write, b"pipe"), b"pipe"


@kind
def fills_a_pipe() -> Kind:
    """Writes more than fits. A write that was stopped half-way may tell so, as after SIGSTOP."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    lump = bytes(range(256)) * 64

    def fill() -> int:
        written = 0
        while written < len(lump):
            written += os.write(write, lump[written:])
        return written

    def take(_: threading.Thread) -> None:
        data = b""
        while len(data) < len(lump):
            data += os.read(read, 4096)
        assert data == lump

    return fill, take, len(lump)


@kind
def polls() -> Kind:
    read, write = os.pipe()
    poll = select.poll()
    poll.register(read, select.POLLIN)
    return lambda: poll.poll(), lambda _: os.write(write, b"x"), [(read, select.POLLIN)]


@kind
def polls_with_a_limit() -> Kind:
    read, write = os.pipe()
    poll = select.poll()
    poll.register(read, select.POLLIN)
    return lambda: poll.poll(LONG_S * 1e3), lambda _: os.write(write, b"x"), [(read, 1)]


@kind
def polls_until_the_limit() -> Kind:
    began = time.monotonic()
    return lambda: (libc.poll(None, 0, 2500), time.monotonic() - began >= 2.5), id, (0, True)


@kind
def selects() -> Kind:
    read, write = os.pipe()
    return lambda: select.select([read], [], [])[0], lambda _: os.write(write, b"x"), [read]


@kind
def waits_for_epoll() -> Kind:
    read, write = os.pipe()
    epoll = select.epoll()
    epoll.register(read, select.EPOLLIN)
    return lambda: epoll.poll(), lambda _: os.write(write, b"x"), [(read, 1)]


@kind
def waits_for_epoll_in_c() -> Kind:
    """No library retries for it: an EINTR of ours would be seen."""
    counter, epoll = os.eventfd(0), select.epoll()
    epoll.register(counter, select.EPOLLIN)
    events = ctypes.create_string_buffer(12)
    return (
        lambda: libc.epoll_wait(epoll.fileno(), events, 1, LONG_S * 1000),
        lambda _: os.eventfd_write(counter, 1),
        1,
    )


@kind
def polls_in_c() -> Kind:
    counter = os.eventfd(0)
    entry = ctypes.create_string_buffer(struct.pack("ihh", counter, 1, 0))
    return lambda: libc.poll(entry, 1, LONG_S * 1000), lambda _: os.eventfd_write(counter, 1), 1


@kind
def accepts() -> Kind:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()

    def connect(_: threading.Thread) -> None:
        socket.create_connection(address).close()

    return lambda: listener.accept()[0].recv(1), connect, b""  # fmt: skip


@kind
def receives() -> Kind:
    left, right = socket.socketpair()
    return lambda: left.recv(9), lambda _: right.send(b"message"), b"message"


@kind
def receives_in_c() -> Kind:
    left, right = socket.socketpair()
    room = ctypes.create_string_buffer(9)
    number = left.detach()
    return (
        lambda: (libc.recv(number, room, 9, 0), room.value),
        lambda _: right.send(b"C"),
        (1, b"C"),
    )


@kind
def receives_datagrams() -> Kind:
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    end.bind(("127.0.0.1", 0))
    return lambda: end.recv(9), lambda _: end.sendto(b"udp", end.getsockname()), b"udp"


@kind
def awaits_a_lock() -> Kind:
    lock = threading.Lock()
    lock.acquire()
    return lock.acquire, lambda _: lock.release(), True


@kind
def awaits_a_lock_with_a_limit() -> Kind:
    lock = threading.Lock()
    lock.acquire()
    return lambda: lock.acquire(timeout=LONG_S), lambda _: lock.release(), True


@kind
def awaits_a_condition() -> Kind:
    event = threading.Event()
    return lambda: event.wait(LONG_S), lambda _: event.set(), True


@kind
def awaits_a_semaphore_in_c() -> Kind:
    semaphore = ctypes.create_string_buffer(32)
    call("sem_init", semaphore, 0, 0)
    return lambda: libc.sem_wait(semaphore), lambda _: libc.sem_post(semaphore), 0


@kind
def sleeps() -> Kind:
    """The time left is told to whoever interrupts it; none of it may be lost or slept twice."""
    began, left = time.monotonic(), Timespec()

    def sleep() -> Any:
        result = libc.nanosleep(ctypes.byref(Timespec(LONG_S, 0)), ctypes.byref(left))
        passed = time.monotonic() - began
        return result, abs(LONG_S - passed - left.total_s) < 5

    return sleep, interrupt, (-1, True)  # fmt: skip


@kind
def sleeps_to_the_end() -> Kind:
    began = time.monotonic()

    def sleep() -> Any:
        return libc.nanosleep(ctypes.byref(Timespec(2, 0)), None), time.monotonic() - began >= 2

    return sleep, id, (0, True)  # fmt: skip


@kind
def sleeps_until() -> Kind:
    until = time.monotonic() + 2
    moment = Timespec(int(until), int(until % 1 * 1e9))

    def sleep() -> Any:
        result = libc.clock_nanosleep(1, 1, ctypes.byref(moment), None)
        return result, time.monotonic() >= until

    return sleep, id, (0, True)  # fmt: skip


@kind
def waits_for_a_signal() -> Kind:
    return (
        lambda: signal.sigwait([SIGWAIT]),
        lambda thread: signal.pthread_kill(thread.ident, SIGWAIT),
        SIGWAIT,
    )


@kind
def waits_for_a_signal_in_c() -> Kind:
    mask = struct.pack("<16Q", 1 << (SIGWAIT - 1), *[0] * 15)
    limit = Timespec(LONG_S, 0)
    return (
        lambda: libc.sigtimedwait(mask, None, ctypes.byref(limit)),
        lambda thread: signal.pthread_kill(thread.ident, SIGWAIT),
        SIGWAIT,
    )


@kind
def suspends_itself() -> Kind:
    mask = struct.pack("<16Q", 1 << (SIGWAIT - 1), *[0] * 15)
    return lambda: libc.sigsuspend(mask), interrupt, -1


@kind
def pauses() -> Kind:
    return lambda: libc.pause(), interrupt, -1


@kind
def reads_an_eventfd() -> Kind:
    counter = os.eventfd(0)
    return lambda: os.eventfd_read(counter), lambda _: os.eventfd_write(counter, 7), 7


@kind
def reads_a_timerfd() -> Kind:
    timer = call("timerfd_create", 1, 0)
    call("timerfd_settime", timer, 0, ctypes.byref(Itimerspec(Timespec(), Timespec(2))), None)
    return lambda: os.read(timer, 8), id, struct.pack("Q", 1)


@kind
def reads_inotify() -> Kind:
    folder = tempfile.mkdtemp(dir=".")
    watch = call("inotify_init1", 0)
    call("inotify_add_watch", watch, folder.encode(), 0x100)  # IN_CREATE
    return lambda: len(os.read(watch, 4096)), lambda _: tempfile.mkdtemp(dir=folder), 32


@kind
def computes() -> Kind:
    stop = threading.Event()

    def compute() -> bool:
        x, steps, period = 0, 0, 1 << 20  # A congruential generator of full period.
        while not stop.is_set() or steps % period:
            x, steps = (x * 1_664_525 + 1_013_904_223) % period, steps + 1
        return x == 0

    return compute, lambda _: stop.set(), True  # fmt: skip


@kind
def asks_the_time() -> Kind:
    """In the vDSO most of the time, and the clock never goes back."""
    stop = threading.Event()

    def ask() -> bool:
        last, good = time.monotonic(), True
        while not stop.is_set():
            now = time.monotonic()
            last, good = now, good and now >= last
        return good

    return ask, lambda _: stop.set(), True  # fmt: skip


@kind
def calls_without_end() -> Kind:
    stop = threading.Event()

    def yield_and_ask() -> bool:
        me = os.getpid()
        while not stop.is_set():
            os.sched_yield()
            if os.getpid() != me:
                return False
        return True

    return yield_and_ask, lambda _: stop.set(), True  # fmt: skip


BUSY = {"computes", "asks_the_time", "calls_without_end"}


def main() -> None:
    signal.signal(INTERRUPT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [SIGWAIT])
    results: dict[str, Any] = {}
    waiters: list[tuple[str, threading.Thread, Kind]] = []
    begun = threading.Semaphore(0)

    def run(name: str, act: Callable[[], Any]) -> None:
        begun.release()
        results[name] = act()

    quiet = [make for make in KINDS if make.__name__ not in BUSY]
    busy = [make for make in KINDS if make.__name__ in BUSY]
    makers = [*(quiet * 9)[: 99 - len(busy)], *busy]  # The busy ones last, for they slow the rest.
    for n, make in enumerate(makers):
        name = f"{make.__name__} {n}"
        parts = make()
        thread = threading.Thread(target=run, args=(name, parts[0]), name=name, daemon=True)
        thread.start()
        waiters.append((name, thread, parts))
    for _ in waiters:
        begun.acquire()

    @functools.cache
    def prove() -> Proof:
        limited = ("polls_until", "sleeps_to_the_end", "sleeps_until", "reads_a_timerfd")
        woke_early = [
            name for name, thread, _ in waiters
            if not thread.is_alive() and not name.startswith(limited)
        ]  # fmt: skip
        proof: Proof = {"hundred": len(waiters) == 99}
        proof["woke early"] = {name: repr(results.get(name)) for name in woke_early} or True
        for _, thread, (_, wake, _) in waiters:
            if thread.is_alive():
                wake(thread)
        stuck = [name for name, thread, _ in waiters if not ends(thread)]
        proof["stuck"] = stuck or True
        wrong = {
            name: repr(results.get(name)) for name, _, (_, _, right) in waiters
            if name not in stuck and results.get(name) != right
        }  # fmt: skip
        proof["wrong"] = wrong or True
        return proof

    def spoil() -> None:
        _, thread, (_, wake, _) = waiters[0]
        wake(thread)
        ends(thread)  # Else the proof might come first, and find it still waiting.

    converse(prove, spoil)
    os._exit(0)


main()
