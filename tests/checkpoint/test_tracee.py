"""A traced process goes on as if nothing had happened, whatever it did and whoever died."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import Subject, in_child, kill_at_every_step, living

from lzy.checkpoint import interrogate, machine, proc
from lzy.checkpoint.errors import AccessDenied, KernelError, LzyError, NotFound, Unsupported
from lzy.checkpoint.linux import memory, ptrace
from lzy.checkpoint.machine import Call
from lzy.checkpoint.tracee import Tracee, stopped

SYS_CLOSE = 3
SYS_GETPID = 39
SYS_GETTID = 186

#: Threads that sleep in C calls, each of which says what its call answered, and when.
SLEEPERS = """
import json, select, struct, socket
answers, tids, gate = {}, {}, os.pipe()
libc.syscall.restype = ctypes.c_long
class Timespec(ctypes.Structure): _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]
class PollFd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("ev", ctypes.c_short), ("re", ctypes.c_short)]
def sleeper(function):
    def run():
        tids[function.__name__] = threading.get_native_id()
        began = time.monotonic()
        ctypes.set_errno(0)
        result = function()
        error = ctypes.get_errno() if result == -1 else 0
        answers[function.__name__] = [result, error, time.monotonic() - began]
    thread = threading.Thread(target=run)
    thread.start()
    return thread
limit = float(sys.argv[1])
LIMIT = Timespec(int(limit), int(limit % 1 * 1e9))
pipes = {name: os.pipe() for name in ("poll", "read", "epoll", "polled", "select")}
word, timed = ctypes.c_int(0), ctypes.c_int(0)
def poll():
    return libc.poll(ctypes.byref(PollFd(pipes["poll"][0], 1, 0)), 1, -1)
def poll_timed():
    return libc.poll(None, 0, int(1000 * limit))
def polled():
    return libc.poll(ctypes.byref(PollFd(pipes["polled"][0], 1, 0)), 1, 1000000)
def nanosleep():
    return libc.nanosleep(ctypes.byref(LIMIT), None)
def futex():
    return libc.syscall(202, ctypes.byref(word), 0, 0, None)
def futex_timed():
    return libc.syscall(202, ctypes.byref(timed), 0, 0, ctypes.byref(LIMIT))
def epoll():
    fd = libc.epoll_create1(0)
    event = ctypes.create_string_buffer(struct.pack("<IQ", 1, 0), 12)
    libc.epoll_ctl(fd, 1, pipes["epoll"][0], event)
    return libc.epoll_wait(fd, ctypes.create_string_buffer(12), 1, -1)
def read():
    return libc.read(pipes["read"][0], ctypes.create_string_buffer(8), 8)
def sigwait():
    chosen = ctypes.create_string_buffer(struct.pack("<16Q", 1 << 11, *[0] * 15), 128)
    number = ctypes.c_int()
    return libc.sigwait(chosen, ctypes.byref(number)) or number.value
def pause():
    return libc.pause()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
signal.signal(signal.SIGUSR1, lambda *_: None)
functions = [poll, poll_timed, polled, nanosleep, futex, futex_timed, epoll, read, sigwait, pause]
"""
NUMBERS = {
    "poll": 7, "poll_timed": 7, "polled": 7, "nanosleep": 230, "futex": 202, "futex_timed": 202,
    "epoll": 232, "read": 0, "sigwait": 128, "pause": 34,
}  # fmt: skip
GOING_ON = """
threads = [sleeper(f) for f in functions]
while len(tids) < len(functions): time.sleep(0.001)
say("ready"); say(json.dumps(tids))
hear()
word.value = 1
for name in ("poll", "polled", "epoll", "read"): os.write(pipes[name][1], b"x")
libc.syscall(202, ctypes.byref(word), 1, 1)
signal.pthread_kill(threads[8].ident, signal.SIGUSR2)
signal.pthread_kill(threads[9].ident, signal.SIGUSR1)
for t in threads: t.join()
say(json.dumps(answers)); hear()
"""
LIMIT_S = 0.8


def await_sleepers(subject: Subject) -> dict[str, int]:
    tids: dict[str, int] = {name: int(tid) for name, tid in json.loads(
        subject.hear()).items()}  # fmt: skip
    subject.await_calls({tid: NUMBERS[name] for name, tid in tids.items()})
    return tids


def check_answers(subject: Subject, tids: dict[str, int]) -> None:
    """Each call answered what it would have answered, and no timeout was longer or shorter."""
    # Whoever calls pause(2) must be in it when the signal comes, or sleeps for ever.
    subject.await_calls({tids[name]: NUMBERS[name] for name in ("futex", "pause")})
    answers = json.loads(subject.ask("on"))
    taken = {name: answer.pop() for name, answer in answers.items()}
    assert answers == {
        "poll": [1, 0], "polled": [1, 0], "poll_timed": [0, 0], "nanosleep": [0, 0],
        "futex": [0, 0], "futex_timed": [-1, errno.ETIMEDOUT], "epoll": [1, 0], "read": [1, 0],
        "sigwait": [12, 0], "pause": [-1, errno.EINTR],
    }  # fmt: skip
    for name in ("poll_timed", "nanosleep", "futex_timed"):
        assert LIMIT_S <= taken[name] < LIMIT_S + 0.6, taken


def test_sleeping_threads_sleep_on() -> None:
    """Stopped and made to work again and again, no C call of theirs sees it.

    Timeouts keep what was left of them: each stop falls later, and they end when they should.
    """
    with living(SLEEPERS + GOING_ON, str(LIMIT_S)) as subject:
        tids = await_sleepers(subject)
        began = time.monotonic()
        rounds = 0
        while time.monotonic() < began + LIMIT_S / 2:
            with stopped(subject.pid) as tracee:
                if rounds % 2:
                    tracee.prepare()
                    interrogate.describe_threads(tracee)
            rounds += 1
        assert rounds > 3
        check_answers(subject, tids)


def test_user_code_computes_on() -> None:
    """Registers and flags of a thread that computes are as they were, vector registers too."""
    code = """
import hashlib, math
say("ready")
expected = rounds = None
def compute():
    return hashlib.sha256(bytes(50000)).hexdigest() + str(sum(math.sqrt(i) for i in range(500)))
expected = compute()
wrong = rounds = 0
ended = threading.Event()
threading.Thread(target=lambda: (hear(), ended.set()), daemon=True).start()
while not ended.is_set():
    wrong += compute() != expected
    rounds += 1
say(wrong); say(rounds)
hear()
"""
    with living(code) as subject:
        for _ in range(100):
            with stopped(subject.pid) as tracee:
                tracee.prepare(arena_bytes=4096)
                assert tracee.run_one(tracee.threads[subject.pid], Call(SYS_GETPID)) == subject.pid
        assert subject.ask("end") == "0"
        assert int(subject.hear()) > 1


# -- no trace ------------------------------------------------------------------------------------


def masks(pid: int) -> dict[str, str]:
    """Signal mask and pending signals of each thread."""
    return {
        tid: "".join(
            line for line in Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines()
            if line.startswith(("SigPnd", "SigBlk", "ShdPnd"))
        )
        for tid in os.listdir(f"/proc/{pid}/task")
    }  # fmt: skip


def vdso(pid: int) -> bytes:
    """The vDSO as the process sees it."""
    (vma,) = [v for v in proc.kernel_mappings(pid) if v.kind == "vdso"]
    content = bytearray(vma.length)
    memory.read_process(pid, [(vma.start, vma.length)], memoryview(content))
    return bytes(content)


def test_no_trace_is_left() -> None:
    """Mappings, vDSO, masks, descriptors and tracer are as before."""
    with living(SLEEPERS + GOING_ON, "1000") as subject:
        tids = await_sleepers(subject)

        def facts() -> list[object]:
            # Inside sigwait(3) the signals waited for are not blocked: it must be there again.
            subject.await_calls({tid: NUMBERS[name] for name, tid in tids.items()})
            folder = Path(f"/proc/{subject.pid}")
            return [
                (folder / "maps").read_bytes(),
                vdso(subject.pid),
                masks(subject.pid),
                sorted(os.listdir(folder / "fd")),
                proc.status(subject.pid)["TracerPid"],
            ]

        before, ours = facts(), sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with stopped(subject.pid) as tracee:
                tracee.prepare()
                interrogate.describe_threads(tracee)
        assert facts() == before
        assert sorted(os.listdir("/proc/self/fd")) == ours


# -- the death of the tracer ---------------------------------------------------------------------

LIVELY = """
import json, hashlib
say("ready")
count = int(sys.argv[1])
ticks, wrong, tids, ended = [0] * count, [0], [], threading.Event()
pipe = os.pipe()
class Timespec(ctypes.Structure): _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]
class PollFd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("ev", ctypes.c_short), ("re", ctypes.c_short)]
expected = hashlib.sha256(bytes(20000)).hexdigest()
def run(number):
    tids.append(threading.get_native_id())
    while not ended.is_set():
        kind = number % 4
        if kind == 0:
            wrong[0] += libc.nanosleep(ctypes.byref(Timespec(0, 2000000)), None) != 0
        elif kind == 1:
            wrong[0] += libc.poll(ctypes.byref(PollFd(pipe[0], 1, 0)), 1, 3) != 0
        elif kind == 2:
            wrong[0] += hashlib.sha256(bytes(20000)).hexdigest() != expected
            time.sleep(0.002)
        else:
            time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            time.sleep(0.002)
        ticks[number] += 1
threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
for t in threads: t.start()
while len(tids) < count: time.sleep(0.001)
say("begun")
while hear() != "end":
    # Every thread must go on, and nothing may have gone wrong.
    before = list(ticks)
    deadline = time.monotonic() + 10
    while any(a == b for a, b in zip(before, ticks)) and time.monotonic() < deadline:
        time.sleep(0.001)
    stuck = [n for n, (a, b) in enumerate(zip(before, ticks)) if a == b]
    # Memory of the kernel's choice and signals still work.
    place = allocate(1 << 16); ctypes.memset(place, 7, 1 << 16); libc.munmap(place, 1 << 16)
    say(json.dumps([wrong[0], stuck, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))]))
ended.set()
for t in threads: t.join()
say("ended"); hear()
"""


def trace_thoroughly(pid: int) -> None:
    """All that a dump does to a process: calls from registers, tables in every thread."""
    with stopped(pid) as tracee:
        tracee.prepare()
        interrogate.describe_threads(tracee)
        batch = tracee.batch()
        for _ in range(300):
            batch.call(SYS_GETPID)
        tracee.run(tracee.threads[pid], batch)


def check_vdso(pid: int) -> None:
    """Whatever stands behind it, the vDSO's own code is untouched: its ELF file is our own."""
    theirs, ours = vdso(pid), vdso(os.getpid())
    end = len(ours.rstrip(b"\0"))
    assert theirs[:end] == ours[:end]


@pytest.mark.parametrize(
    ("threads", "first", "every"), [(3, 0, 1), (20, 3, 17)], ids=["3 threads", "20 threads"]
)
def test_tracer_killed_at_every_step(threads: int, first: int, every: int) -> None:
    """`kill -9` of lzy before any of its steps leaves every thread running and right.

    At most an arena that nobody uses stays mapped. The next tracer finds all in order.
    """
    with living(LIVELY, str(threads)) as subject:
        assert subject.hear() == "begun"
        before = masks(subject.pid)

        def check(when: str) -> None:
            assert subject.ask("prove") == "[0, [], []]", when
            check_vdso(subject.pid)
            assert masks(subject.pid) == before, when
            assert proc.status(subject.pid)["TracerPid"] == "0"

        kills = kill_at_every_step(
            lambda: trace_thoroughly(subject.pid), check, first=first, every=every
        )
        assert kills > 10
        trace_thoroughly(subject.pid)
        check("afterwards")
        assert subject.ask("end") == "ended"


def test_tracer_killed_in_the_midst_of_a_long_table() -> None:
    """A process whose tracer dies while the table runs finishes it and goes on."""
    with living(LIVELY, "4") as subject:
        assert subject.hear() == "begun"
        reader, writer = os.pipe()

        def die_in_the_midst() -> None:
            tracee = Tracee(subject.pid)
            tracee.seize()
            tracee.prepare()
            batch = tracee.batch()
            while not batch.full:
                batch.call(SYS_GETPID)
            tracee.start(tracee.threads[subject.pid], batch)
            os.write(writer, b"!")
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            for _ in range(5):
                assert in_child(die_in_the_midst) == signal.SIGKILL
                assert os.read(reader, 1) == b"!"
                assert subject.ask("prove") == "[0, [], []]"
        finally:
            os.close(reader)
            os.close(writer)


def test_sleeping_threads_survive_the_death_of_the_tracer() -> None:
    """Threads in system calls are put back by the code itself: their calls begin again.

    Their timeouts keep what was left: the context block holds restart_syscall(2) for them.
    """
    with living(SLEEPERS + GOING_ON, str(LIMIT_S)) as subject:
        tids = await_sleepers(subject)

        def die() -> None:
            tracee = Tracee(subject.pid)
            tracee.seize()
            tracee.prepare()
            for slot, thread in enumerate(tracee.threads.values()):
                batch = tracee.batch(slot, 64)
                batch.call(SYS_GETTID)
                tracee.start(thread, batch)
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(die) == signal.SIGKILL
        check_answers(subject, tids)


# -- signals and stops ---------------------------------------------------------------------------

SIGNALLED = """
import json
seen = []
for n in (10, 12): signal.signal(n, lambda number, frame: seen.append(int(number)))
# Handlers of Python's merge signals that come fast; the queue of blocked ones does not.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, 34, 35])
say("ready")
while (line := hear()) != "end":
    if line == "unblock": signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    while info := signal.sigtimedwait([34, 35], 0): seen.append(info.si_signo)
    say(json.dumps(sorted(seen)))
"""


def test_signals_that_come_during_the_stop_are_delivered_afterwards() -> None:
    """None is lost, none comes twice, real-time signals keep their number; blocked ones wait."""
    with living(SIGNALLED) as subject:
        with stopped(subject.pid) as tracee:
            os.kill(subject.pid, signal.SIGUSR1)
            os.kill(subject.pid, signal.SIGUSR2)
            tracee.prepare()
            for number in (34, 34, 34, 35):
                os.kill(subject.pid, number)
            interrogate.describe_threads(tracee)
            batch = tracee.batch()
            for _ in range(1000):
                batch.call(SYS_GETPID)
            tracee.start(tracee.threads[subject.pid], batch)
            os.kill(subject.pid, 35)
            tracee.finish(tracee.threads[subject.pid], batch)
        assert subject.ask("what") == "[10, 34, 34, 34, 35, 35]"
        subject.ask("unblock")
        assert subject.ask("what") == "[10, 12, 34, 34, 34, 35, 35]"


COUNTING = """
import struct
# A handler that counts each delivery, as no handler of Python's does: lock inc dword [rip+249]; ret
page = allocate(4096, 7)
ctypes.memmove(page, bytes.fromhex("f0ff05f9000000c3"), 8)
action = struct.pack("<Q128siiQ", page, b"", 0x10000000, 0, 0)
assert libc.sigaction(34, action, None) == 0
count = ctypes.c_int.from_address(page + 256)
threading.Thread(target=lambda: time.sleep(1000), daemon=True).start()
say("ready")
while hear(): say(count.value)
"""


def test_signals_rain_while_it_is_seized_and_let_go() -> None:
    """Queued signals sent all the time are delivered each once, however often it is stopped."""
    rain = 1500
    with living(COUNTING) as subject:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for sent in range(rain):
                    os.kill(subject.pid, 34)
                    if sent % 50 == 0:
                        time.sleep(0.002)
                os.write(writer, b"done")
            finally:
                os._exit(0)
        try:
            while not select.select([reader], [], [], 0)[0]:
                with stopped(subject.pid) as tracee:
                    tracee.prepare(arena_bytes=4096)
                    tracee.run_one(tracee.threads[subject.pid], Call(SYS_GETPID))
        finally:
            os.waitpid(pid, 0)
            os.close(reader)
            os.close(writer)
        deadline = time.monotonic() + 10
        while (count := int(subject.ask("how many?"))) < rain:
            assert time.monotonic() < deadline, count
        assert count == rain


@pytest.mark.parametrize("number", [signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD])
def test_handlers_of_the_signals_we_might_use(number: int) -> None:
    """A process that has handlers for them is not disturbed by ours, and hears its own."""
    code = """
seen = []
for n in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)[: int(sys.argv[1])]:
    signal.signal(n, lambda number, frame: seen.append(int(number)))
say("ready")
while hear(): say(seen)
"""
    for handled in (1, 2, 3):
        with living(code, str(handled)) as subject:
            with stopped(subject.pid) as tracee:
                tracee.prepare()
                interrogate.describe_threads(tracee)
            assert subject.ask("what") == "[]"
            os.kill(subject.pid, number)
            expected = [signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD][:handled]
            assert subject.ask("what") == (f"[{number}]" if number in expected else "[]")


def test_stopped_process_stays_stopped() -> None:
    """A group-stop outlasts seizing, injected calls and letting go; SIGCONT then ends it."""
    with living("say('ready')\nwhile (line := hear()): say(line)") as subject:
        os.kill(subject.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(subject.pid, os.WUNTRACED)[1])
        for _ in range(3):
            with stopped(subject.pid) as tracee:
                assert tracee.threads[subject.pid].in_group_stop
                tracee.prepare()
                tracee.run_one(tracee.threads[subject.pid], Call(SYS_GETPID))
            subject.await_state("T")
        subject.say("later")
        os.kill(subject.pid, signal.SIGCONT)
        assert subject.hear() == "later"


def test_stop_that_comes_during_the_trace() -> None:
    """SIGSTOP sent to a traced process stops it once it is let go, its threads too."""
    with living(LIVELY, "3") as subject:
        assert subject.hear() == "begun"
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            os.kill(subject.pid, signal.SIGSTOP)
            interrogate.describe_threads(tracee)
        subject.await_state("T")
        os.kill(subject.pid, signal.SIGCONT)
        assert subject.ask("prove") == "[0, [], []]"


# -- threads that come and go --------------------------------------------------------------------

RESTLESS = """
counter, ended = [0], threading.Event()
def short(): counter[0] += 1
def breed():
    while not ended.is_set():
        threads = [threading.Thread(target=short) for _ in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
breeders = [threading.Thread(target=breed) for _ in range(3)]
for b in breeders: b.start()
say("ready")
while hear() != "end":
    before = counter[0]
    while counter[0] == before: time.sleep(0.001)
    say("alive")
ended.set()
for b in breeders: b.join()
say("ended"); hear()
"""


def test_threads_that_come_and_go_are_all_seized() -> None:
    """A process that makes and ends threads all the time is stopped wholly: no thread is missed."""
    with living(RESTLESS) as subject:
        for _ in range(60):
            with stopped(subject.pid) as tracee:
                listed = set(map(int, os.listdir(f"/proc/{subject.pid}/task")))
                assert set(tracee.threads) == listed
                assert {subject.state(tid) for tid in listed} == {"t"}
                tracee.prepare(arena_bytes=4096)
                tracee.run_one(tracee.threads[subject.pid], Call(SYS_GETPID))
                assert set(map(int, os.listdir(f"/proc/{subject.pid}/task"))) == listed
        assert subject.ask("alive?") == "alive"
        assert subject.ask("end") == "ended"


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.shows("refused", "a process that a debugger traces")
def test_traced_by_somebody_else() -> None:
    """The other tracer is named; both it and the process are left as they are."""
    with living("say('ready')\nwhile (line := hear()): say(line)") as subject:
        reader, writer = os.pipe()
        back, go = os.pipe()
        tracer = os.fork()
        if tracer == 0:
            try:
                ptrace.seize(subject.pid)
                os.write(writer, b"!")
                os.read(back, 1)
            finally:
                os._exit(0)
        try:
            os.close(writer)
            assert os.read(reader, 1) == b"!"
            with pytest.raises(Unsupported, match=str(tracer)) as caught:
                Tracee(subject.pid).seize()
            assert caught.value.remedy
            assert subject.ask("hello") == "hello"
        finally:
            os.write(go, b"!")
            os.waitpid(tracer, 0)
            for descriptor in (reader, back, go):
                os.close(descriptor)


def test_nobody_there() -> None:
    """A pid that nobody has is NotFound."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(NotFound):
        Tracee(pid).seize()


def test_without_rights() -> None:
    """A user who may not trace the process is told so, with a way out."""
    if os.getuid():
        pytest.fail("this test needs root, to become somebody else")
    with living("say('ready')\nwhile (line := hear()): say(line)") as subject:

        def try_as_nobody() -> None:
            os.setresuid(65534, 65534, 65534)
            with pytest.raises(AccessDenied) as caught:
                Tracee(subject.pid).seize()
            assert caught.value.remedy

        assert in_child(try_as_nobody) == 0
        assert subject.ask("hello") == "hello"


def test_main_thread_has_ended() -> None:
    """Where the main thread has ended while others live one of them speaks; they live on."""
    code = """
def serve():
    while (line := hear()): say(line)
    os._exit(0)
threading.Thread(target=serve).start()
say("ready")
libc.syscall(60, 0)
"""
    with living(code) as subject:
        subject.await_state("Z")

        def speak() -> None:
            with stopped(subject.pid) as tracee:
                assert subject.pid not in tracee.threads
                tracee.prepare()
                assert tracee.run_one(tracee.speaker, Call(SYS_GETPID)) == subject.pid

        assert in_child(speak) == 0
        assert subject.ask("hello") == "hello"


def test_main_thread_ends_while_it_is_seized() -> None:
    """It ends after it was seized and before it stopped: another speaks, and they go on."""
    code = """
def serve():
    while (line := hear()) != "end": say(line)
    os._exit(0)
say("ready")
hear()
threading.Thread(target=serve).start()
libc.syscall(60, 0)
"""
    with living(code) as subject:
        interrupt = ptrace.interrupt

        def wait_and_interrupt(tid: int) -> None:
            if tid == subject.pid:
                subject.say("go")
                subject.await_state("Z")
            interrupt(tid)

        def speak() -> None:
            ptrace.interrupt = wait_and_interrupt
            began = time.monotonic()
            with stopped(subject.pid) as tracee:
                tracee.prepare()
                assert tracee.run_one(tracee.speaker, Call(SYS_GETPID)) == subject.pid
            assert time.monotonic() < began + 5

        assert in_child(speak) == 0
        assert subject.ask("hello") == "hello"


def test_error_in_one_thread_while_another_still_works() -> None:
    """Letting go after an error waits for the threads that are still in our code."""
    with living(LIVELY, "3") as subject:
        assert subject.hear() == "begun"
        for _ in range(5):
            with stopped(subject.pid) as tracee:
                tracee.prepare()
                leader, other, *_ = tracee.threads.values()
                failing, long = tracee.batch(0, 2), tracee.batch(1, 2)
                failing.call(SYS_CLOSE, 999)
                while not long.full:
                    long.call(SYS_GETPID)
                tracee.start(other, long)
                with pytest.raises(KernelError):
                    tracee.run(leader, failing)
            assert subject.ask("prove") == "[0, [], []]"


def test_killed_while_stopped() -> None:
    """A process killed in the middle of it all: letting go is quiet, working in it is NotFound."""
    for prepared in (False, True):
        with living("say('ready'); hear()") as subject:
            tracee = Tracee(subject.pid)
            tracee.seize()
            if prepared:
                tracee.prepare()
            os.kill(subject.pid, signal.SIGKILL)
            select.select([subject.pidfd], [], [], 5)
            if prepared:
                with pytest.raises((LzyError, ProcessLookupError)):
                    tracee.run_one(tracee.threads[subject.pid], Call(SYS_GETPID))
            tracee.let_go()
            assert tracee.threads == {}


# -- where our code stands -----------------------------------------------------------------------


def test_code_goes_elsewhere_when_the_vdso_is_taken() -> None:
    """Where the vDSO has no room, another mapped text serves, and is as before afterwards."""
    code = """
say("ready")
start = [l for l in open("/proc/self/maps") if "[vdso]" in l][0].split("-")[0]
say(start)
while (line := hear()): say(line)
"""
    with living(code) as subject:
        start = int(subject.hear(), 16)
        vma = next(v for v in proc.mappings(subject.pid) if v.start == start)
        descriptor = memory.open_memory(subject.pid)
        try:
            os.pwrite(descriptor, b"\xcc" * 16, vma.end - 16)
            with stopped(subject.pid) as tracee:
                tracee.prepare()
                assert not vma.start <= tracee.code < vma.end
                place = tracee.code
                assert tracee.run_one(tracee.threads[subject.pid], Call(SYS_GETPID)) == subject.pid
            tail = os.pread(descriptor, machine.CODE_BYTES + machine.CONTEXT_BYTES, place)
            assert tail == bytes(len(tail))
        finally:
            os.close(descriptor)
        assert subject.ask("hello") == "hello"


def test_threads_work_at_once() -> None:
    """Batches set going in several threads run side by side, each in its own part of the arena."""
    with living(LIVELY, "8") as subject:
        assert subject.hear() == "begun"
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            begun = []
            for slot, thread in enumerate(tracee.threads.values()):
                batch = tracee.batch(slot, 64)
                number = batch.call(SYS_GETTID)
                tracee.start(thread, batch)
                begun.append((thread, batch, number))
            for thread, batch, number in begun:
                tracee.finish(thread, batch)
                assert batch.results[number] == thread.tid
        assert subject.ask("prove") == "[0, [], []]"
