"""An interpreter answers through the door, and neither it nor anybody's death leaves a trace."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import PRELUDE, Subject, in_child, kill_at_every_step, living

from lzy.checkpoint import belongings, door, pools, proc, symbols
from lzy.checkpoint.door import Patience
from lzy.checkpoint.errors import Busy, LzyError, NotFound, Unsupported
from lzy.checkpoint.stages import STAGES

VERSIONS = range(8, 16)

#: A main thread that waits for lines in the way it is told, and does what they say.
WAITER = """
import asyncio, gc, json, select, weakref
def with_lock(*timeout):
    held, lines = threading.Lock(), []
    held.acquire()
    def read():
        lines.append(os.read(0, 100))
        held.release()
    threading.Thread(target=read).start()
    held.acquire(True, *timeout)
    return lines[0]
def with_epoll(*timeout):
    epoll = select.epoll()
    epoll.register(0, select.EPOLLIN)
    assert epoll.poll(*timeout)
    epoll.close()
    return os.read(0, 100)
def with_poll(*timeout):
    poll = select.poll()
    poll.register(0, select.POLLIN)
    assert poll.poll(*timeout)
    return os.read(0, 100)
def with_select(*timeout):
    assert select.select([0], [], [], *timeout)[0]
    return os.read(0, 100)
def with_sleep():
    while not select.select([0], [], [], 0)[0]:
        time.sleep(0.3)
    return os.read(0, 100)
def with_asyncio():
    loop, lines = asyncio.new_event_loop(), []
    loop.add_reader(0, lambda: (lines.append(os.read(0, 100)), loop.stop()))
    loop.call_later(3600, print)
    loop.run_forever()
    loop.close()
    return lines[0]
def with_a_child():
    child = os.fork()
    if not child:
        select.select([0], [], [])
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(0, 100)
waits = {
    "read": lambda: os.read(0, 100), "readline": lambda: sys.stdin.readline().encode(),
    "select": with_select, "select for a time": lambda: with_select(3600),
    "poll": with_poll, "poll for a time": lambda: with_poll(3600_000),
    "epoll": with_epoll, "epoll for a time": lambda: with_epoll(3600),
    "lock": with_lock, "lock for a time": lambda: with_lock(3600),
    "sleep": with_sleep, "asyncio": with_asyncio, "child": with_a_child,
}
wait = waits[sys.argv[1]]
class Loop: pass
def make_garbage():
    loop = Loop()
    loop.self = loop
    return weakref.ref(loop)
gc.disable()
frame = [float(n) for n in range(3000)]
garbage = line = None
def tell():
    return json.dumps([
        sorted(vars(sys.modules["__main__"])), sorted(sys.modules), threading.active_count(),
        hasattr(sys, "last_traceback") or hasattr(sys, "last_exc"), len(gc.garbage),
        len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")),
    ])
tell()
say("ready")
while True:
    line = wait().decode().strip()
    if line == "tell": say(tell())
    elif line == "make": garbage = make_garbage(); say("made")
    elif line == "alive": say(garbage() is not None)
    elif line == "add": say(sum(range(1000)))
    elif line == "end": say("ended"); break
"""
WAITS = (
    "read", "readline", "select", "select for a time", "poll", "poll for a time", "epoll",
    "epoll for a time", "lock", "lock for a time", "sleep", "asyncio", "child",
)  # fmt: skip


def interpreter(minor: int) -> str:
    """Python 3.`minor`: of `LZY_TEST_PYTHONS`, on PATH or beside ours; skips, and says so."""
    name = f"python3.{minor}"
    given = [p for p in os.environ.get("LZY_TEST_PYTHONS", "").split(":") if p]
    beside = sorted(map(str, Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/{name}")))
    on_path = shutil.which(name)
    for path in [*given, *beside, *([on_path] if on_path else [])]:
        real = os.path.realpath(path)
        with open(real, "rb") as file:
            if os.path.basename(real) == name and file.read(4) == b"\x7fELF":
                return path
    pytest.skip(f"no Python 3.{minor} here: install it, or name its path in LZY_TEST_PYTHONS")


def waiting(wait: str = "read", executable: str = sys.executable) -> Any:
    """A living `WAITER`."""
    return living("", command=[executable, "-I", "-S", "-u", "-c", PRELUDE + WAITER, wait])


def regions(pid: int) -> int:
    """How many regions of visits are mapped."""
    return len(door.leftovers(pid, proc.mappings(pid, with_flags=False)))


def assert_as_before(subject: Subject, before: str) -> None:
    """What it tells of itself is the same again, once threads of its own have gone."""
    deadline = time.monotonic() + 10
    while (now := subject.ask("tell")) != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert now == before


IDLE_SOON = Patience(idle_s=5)


def trim_and_list(pid: int, patience: Patience = IDLE_SOON) -> dict[str, Any]:
    return door.ask(pid, {"trim": 1, "variables": 9}, trim=True, patience=patience)


@pytest.mark.parametrize("minor", VERSIONS)
def test_every_version_answers(minor: int) -> None:
    """An interpreter of any version lists its variables and collects; nothing of that stays."""
    with waiting(executable=interpreter(minor)) as subject:
        before = subject.ask("tell")
        assert subject.ask("make") == "made"
        told = trim_and_list(subject.pid)
        assert told["python"].startswith(f"3.{minor}.")
        assert told["trim"]["collected"] > 0
        assert told["trim"]["notes"] == []
        assert told["variables"]["complete"]
        rows = {row["name"]: row for row in told["variables"]["rows"]}
        assert rows["frame"]["what"] == "3,000 items"
        assert 3000 * (8 + 24) <= rows["frame"]["bytes"] <= 3000 * (8 + 24) * 1.2
        assert subject.ask("alive") == "False"
        assert_as_before(subject, before)
        assert regions(subject.pid) == 0
        assert subject.ask("end") == "ended"


@pytest.mark.parametrize("wait", WAITS)
def test_every_wait_goes_on(wait: str) -> None:
    """However the main thread waits, it goes on waiting, and answers afterwards."""
    with waiting(wait) as subject:
        before = subject.ask("tell")
        for _ in range(3):
            assert subject.ask("make") == "made"
            for _ in range(2):  # the second finds a wait that was interrupted before
                assert trim_and_list(subject.pid)["variables"]["names"] > 10
            assert subject.ask("alive") == "False"
        assert_as_before(subject, before)
        assert regions(subject.pid) == 0
        assert subject.ask("end") == "ended"


def test_a_timeout_is_kept() -> None:
    """A sleep and a poll that were interrupted by visits take as long as they would have."""
    code = """
import select
say("ready")
for wait in (lambda: time.sleep(1), lambda: select.poll().poll(1000), lambda: libc.usleep(900000)):
    hear()
    began = time.monotonic()
    say("begun")
    wait()
    say(time.monotonic() - began)
"""
    with living(code) as subject:
        for least in (1.0, 1.0, 0.9):
            assert subject.ask("go") == "begun"
            for _ in range(3):
                door.ask(subject.pid, {"variables": 1})
            assert least <= float(subject.hear()) < least + 0.5


#: Machine code, called with (buffer, descriptor): sixteen bytes of the buffer are in a vector
#: register while read(2) waits, and are stored behind the byte read.
#:   movdqu xmm0,[rdi]; mov r8,rdi; mov edi,esi; lea rsi,[r8+16]; mov edx,1; xor eax,eax; syscall
#:   movdqu [r8+32],xmm0; ret
HOLD_IN_VECTOR = "f30f6f074989f889f7498d7010ba0100000031c00f05f3410f7f4020c3"


def test_vectors_and_errno_are_kept() -> None:
    """What the borrowed thread has in vector registers and errno is there when it goes on."""
    code = f"""
code = bytes.fromhex("{HOLD_IN_VECTOR}")
place = allocate(4096, 7)
ctypes.memmove(place, code, len(code))
hold = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_int, use_errno=True)(place)
buffer = ctypes.create_string_buffer(b"sixteen bytes of", 64)
say("ready")
for _ in range(3):
    ctypes.set_errno(77)
    result = hold(ctypes.addressof(buffer), 0)
    say(result, ctypes.get_errno(), buffer.raw[16:17].decode(), buffer.raw[32:48].decode())
"""
    with living(code) as subject:
        for _ in range(3):
            trim_and_list(subject.pid)
            assert subject.child.stdin
            subject.child.stdin.write(b"x")
            assert subject.hear() == "1 77 x sixteen bytes of"


# -- who is not asked ------------------------------------------------------------------------------


def test_who_computes_is_not_stopped() -> None:
    """A main thread that computes is refused from outside, and goes on computing."""
    with living("say('ready')\nwhile True: sum(range(1000))") as subject:
        with pytest.raises(Busy, match="its main thread computes"):
            door.ask(subject.pid, {"trim": 1}, patience=Patience(idle_s=0.1))
        assert proc.status(subject.pid)["TracerPid"] == "0"
        assert subject.state() == "R"
        assert regions(subject.pid) == 0


def test_threads_that_compute_do_not_matter() -> None:
    """While other threads compute in Python, the visitor gets its turn as they do."""
    code = """
counts = [0, 0, 0]
def count(i):
    while True: counts[i] += 1
for i in range(3): threading.Thread(target=count, args=(i,), daemon=True).start()
say("ready")
while True:
    hear(); before = list(counts)
    while any(a == b for a, b in zip(before, counts)): time.sleep(0.001)
    say("counted")
"""
    with living(code) as subject:
        for _ in range(5):
            told = trim_and_list(subject.pid, Patience(5, 20))
            assert any(row["name"] == "counts" for row in told["variables"]["rows"])
            assert subject.ask("go on") == "counted"
        assert regions(subject.pid) == 0


#: Another thread reads from the pipe without letting go of the GIL, the main one waits for it.
KEEPER = """
import gc, weakref
held = threading.Lock(); held.acquire()
keeper = ctypes.PyDLL(None)
buffer = ctypes.create_string_buffer(8)
class Loop: pass
loop = Loop(); loop.self = loop; garbage = weakref.ref(loop); loop = None
gc.disable()
def keep():
    keeper.read(0, buffer, 2)
    held.release()
os.write(1, b"ready\\n")
threading.Thread(target=keep).start()
held.acquire()
say(garbage() is not None)
hear()
say("ended")
"""


def test_a_kept_gil_is_waited_for_only_so_long() -> None:
    """Where another thread keeps the GIL the visitor is called off, and never runs anything."""
    with living(KEEPER) as subject:
        await_threads(subject, 2)
        with pytest.raises(Busy, match="keeps the interpreter"):
            trim_and_list(subject.pid, Patience(5, begin_s=0.05))
        assert len(proc.threads(subject.pid)) == 3  # called off, but it cannot know yet
        assert regions(subject.pid) == 1
        subject.say("!")
        assert subject.hear() == "True"
        await_threads(subject, 1)
        assert trim_and_list(subject.pid)["trim"]["collected"] > 0
        assert regions(subject.pid) == 0
        assert subject.ask("end") == "ended"


def await_threads(subject: Subject, number: int) -> None:
    """Wait until it has so many threads, all of them asleep."""
    deadline = time.monotonic() + 20
    while True:
        tids = proc.threads(subject.pid)
        if len(tids) == number and all(subject.state(tid) == "S" for tid in tids):
            return
        assert time.monotonic() < deadline, subject.describe()
        time.sleep(0.001)


def test_a_handler_of_a_signal_is_not_disturbed() -> None:
    """A thread in a signal's handler may have been interrupted anywhere, malloc for instance."""
    code = """
handle = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: os.write(1, os.read(0, 100)))
libc.signal(signal.SIGUSR1, handle)
say("ready")
getattr(libc, "raise")(signal.SIGUSR1)
say("back"), hear(), say("ended")
"""
    with living(code) as subject:
        subject.await_calls({subject.pid: 0})
        with pytest.raises(Busy, match="handles a signal"):
            trim_and_list(subject.pid, Patience(0.1))
        assert subject.ask("on") == "on"
        assert subject.hear() == "back"
        subject.await_calls({subject.pid: 0})
        assert trim_and_list(subject.pid)["python"]
        assert subject.ask("end") == "ended"


def test_a_stopped_process_stays_stopped() -> None:
    """One that was stopped by a signal is refused, and stays as it is."""
    with waiting() as subject:
        subject.await_calls({subject.pid: 0})
        os.kill(subject.pid, signal.SIGSTOP)
        subject.await_state("T")
        with pytest.raises(Busy, match="is stopped"):
            trim_and_list(subject.pid, Patience(0.05))
        subject.await_state("T")
        os.kill(subject.pid, signal.SIGCONT)
        assert trim_and_list(subject.pid)["python"]
        assert subject.ask("end") == "ended"


def test_what_is_no_python_is_refused() -> None:
    """A program without an interpreter is refused by name, before it is stopped."""
    child = subprocess.Popen(["sleep", "100"])
    try:
        with pytest.raises(Unsupported, match=r"\(sleep\) runs no CPython"):
            door.ask(child.pid, {"trim": 1})
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    with pytest.raises(NotFound):
        door.ask(child.pid, {"trim": 1})


@pytest.mark.parametrize("name", ["2.7", "3.6", "3.7"])
def test_an_old_python_is_refused(name: str) -> None:
    """A Python before 3.8 has another C interface: it is refused."""
    found = sorted(Path(sys.base_prefix).parent.glob(f"{name}.*/bin/python{name}"))
    if not found:
        pytest.skip(f"no Python {name} beside {sys.base_prefix}")
    child = subprocess.Popen(
        [found[0], "-S", "-u", "-c", "import sys; print(1); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout
        assert child.stdout.read(2) == b"1\n"
        with pytest.raises(Unsupported, match=r"Python before 3\.8"):
            door.ask(child.pid, {"trim": 1})
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()


def test_who_does_not_want_to_be_asked_is_not() -> None:
    """The switches of PEP 768 by which a program refuses code from outside are heeded."""
    command = [sys.executable, "-X", "disable-remote-debug", "-c", "print('ready'); input()"]
    closed = {**os.environ, "PYTHON_DISABLE_REMOTE_DEBUG": "1"}
    for popen in ({"command": [command[0], "-u", *command[1:]]}, {"env": closed}):
        with (
            living("say('ready'), hear()", **popen) as subject,
            pytest.raises(Unsupported, match="remote debugging disabled"),
        ):
            door.ask(subject.pid, {"trim": 1})


# -- deaths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wait", "first"), [("poll for a time", 0), ("lock", 1)])
def test_lzy_killed_before_every_step(wait: str, first: int) -> None:
    """Whenever lzy is killed, the process goes on and answers; the next visit clears up."""
    with waiting(wait) as subject:
        before = subject.ask("tell")

        def check(when: str) -> None:
            assert subject.ask("add") == "499500", when
            assert proc.status(subject.pid)["TracerPid"] == "0", when

        patience = Patience(idle_s=5, list_s=0.02)
        kills = kill_at_every_step(
            lambda: trim_and_list(subject.pid, patience) and None, check, first=first, every=2
        )
        assert kills > 30
        trim_and_list(subject.pid)
        assert regions(subject.pid) == 0
        assert_as_before(subject, before)
        assert subject.ask("end") == "ended"


@pytest.mark.parametrize(
    "stage", [stage for stage in STAGES if stage.startswith("door.") and "cancelled" not in stage]
)
def test_lzy_killed_at_a_stage(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any stage, the visitor still ends, and the text has run whole or not at all."""
    from lzy.checkpoint import stages

    with waiting() as subject:
        before = subject.ask("tell")
        assert subject.ask("make") == "made"
        monkeypatch.setattr(stages, "_KILL_AT", stage)
        patience = Patience(idle_s=5, list_s=5)  # so that its list is in time
        status = in_child(lambda: trim_and_list(subject.pid, patience) and None)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        monkeypatch.undo()
        await_threads(subject, 1)
        collected = subject.ask("alive") == "False"
        assert collected == (stage not in ("door.prepared", "door.mapped"))
        trim_and_list(subject.pid)
        assert subject.ask("alive") == "False"
        assert regions(subject.pid) == 0
        assert_as_before(subject, before)
        assert subject.ask("end") == "ended"


def test_a_borrowed_thread_finds_home_alone() -> None:
    """A thread that lzy could not wait for any longer goes on by itself; then it is as before."""
    with waiting("epoll") as subject:
        before = subject.ask("tell")
        for _ in range(20):
            with contextlib.suppress(Busy):
                trim_and_list(subject.pid, Patience(5, begin_s=0.0))
            assert subject.ask("add") == "499500"
        trim_and_list(subject.pid)
        assert regions(subject.pid) == 0
        assert_as_before(subject, before)
        assert subject.ask("end") == "ended"


def test_two_visitors_at_once() -> None:
    """Of two that come at once each is served or told to come later; the process is as before."""
    with waiting() as subject:
        before = subject.ask("tell")

        def visit() -> None:
            for _ in range(5):
                with contextlib.suppress(Busy, Unsupported):  # "is being traced by pid …"
                    assert trim_and_list(subject.pid)["python"]

        visitors: list[int] = []
        other = threading.Thread(target=lambda: visitors.append(in_child(visit)))
        other.start()
        assert in_child(visit) == 0
        other.join()
        assert visitors == [0]
        trim_and_list(subject.pid)
        assert regions(subject.pid) == 0
        assert_as_before(subject, before)


def test_a_process_killed_in_the_midst() -> None:
    """If the process dies while it is asked, lzy says so."""
    with living(KEEPER) as subject:
        await_threads(subject, 2)
        killer = threading.Timer(0.3, lambda: os.kill(subject.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(NotFound, match=r"ended|no process has pid"):
            trim_and_list(subject.pid, Patience(5, begin_s=20))
        killer.join()


# -- what is told ----------------------------------------------------------------------------------


def test_variables_count_once() -> None:
    """What two names reach counts for the first; a second name for the same says so."""
    code = """
class Model:
    def __init__(self): self.weights = bytearray(5_000_000)
model = Model()
again = model
part = [model.weights]
table = {n: bytes(1000) for n in range(20000)}
function = lambda: table
text = "x" * 300_000
say("ready"), hear()
"""
    with living(code) as subject:
        told = belongings.list_belongings(subject.pid)
        found = {variable.name: variable for variable in told.variables}
        assert [variable.name for variable in told.variables[:3]] == ["table", "model", "text"]
        assert 5_000_000 < found["model"].bytes < 5_010_000
        assert found["again"].same_as == "model"
        assert found["again"].bytes == 0
        assert found["part"].bytes < 200
        assert found["table"].estimated
        assert 0.95 < found["table"].bytes / (20000 * (1033 + 28) + 600_000) < 1.05
        assert found["function"].bytes < 2000
        assert told.names == len(told.variables)
        assert told.bytes == sum(variable.bytes for variable in told.variables)
        few = belongings.list_belongings(subject.pid, limit=2)
        assert [variable.name for variable in few.variables] == ["table", "model"]
        assert few.names == told.names


def test_arrays_and_frames_are_weighed_with_their_data() -> None:
    """An array counts its data, also through a view, a data frame's columns and a tensor."""
    pytest.importorskip("pandas")
    code = """
import numpy, pandas
array = numpy.zeros((1000, 1000))
view = numpy.zeros(500_000)[::2]
frame = pandas.DataFrame({"a": numpy.arange(300_000), "b": numpy.ones(300_000)})
names = numpy.array([str(n) * 10 for n in range(50_000)], dtype=object)
say("ready"), hear()
"""
    command = [sys.executable, "-c", PRELUDE + code]
    with living("", command=command) as subject:
        told = {v.name: v for v in belongings.list_belongings(subject.pid).variables}
        assert told["array"].what == "1000 × 1000 float64"
        assert 8_000_000 <= told["array"].bytes < 8_001_000
        assert 4_000_000 <= told["view"].bytes < 4_001_000
        assert told["frame"].what == "300000 × 2"
        assert 4_800_000 <= told["frame"].bytes < 4_900_000
        assert 0.9 < told["names"].bytes / (50_000 * (8 + 49 + 49)) < 1.1
        assert told["names"].estimated


def test_trim_gives_memory_back() -> None:
    """Garbage in cycles, and memory that is free inside malloc, is given to the system."""
    code = """
import gc
gc.disable()
class Node: pass
def make():
    for n in range(100_000):
        node = Node(); node.self = node; node.data = bytearray(300)
kept = []
for n in range(20_000):
    bytearray(2000); kept.append(bytearray(100))
make()
say("ready"), hear(), say("ended")
"""
    with living(code) as subject:
        trimmed = belongings.trim(subject.pid)
        assert trimmed.collected >= 100_000
        assert trimmed.freed_bytes > 30 << 20
        assert trimmed.notes == []
        assert subject.ask("end") == "ended"


#: Many small objects were made and given up; one in a thousand keeps its arena from going.
HOLES = """
import hashlib, sys
kept = []
def make(number):
    found = []
    for n in range(number):
        found.append((n, float(n), [n]))
        if n % 1000 == 0: kept.append([n, float(n), str(n)])
def digest(): return hashlib.sha256(repr(kept).encode()).hexdigest()
make(300_000)
before = digest()
say("ready")
while hear():
    for number in (50_000, 300_000, 20_000):
        make(number)
        del kept[300:]
    say(before == digest())
"""


@pytest.mark.parametrize("minor", VERSIONS)
def test_free_pools_are_emptied(minor: int) -> None:
    """Where single objects keep arenas, their free pools go; the allocator uses them again."""
    with living("", command=[interpreter(minor), "-I", "-S", "-c", PRELUDE + HOLES]) as subject:
        trimmed = belongings.trim(subject.pid)
        if minor in pools.VERSIONS:  # before, a pool was a page, with the head that tells of it
            assert trimmed.freed_bytes > 20 << 20
            vmas = proc.mappings(subject.pid, with_flags=False)
            _, path = door.find_functions(subject.pid, vmas)
            variables = pools.find_variables(subject.pid, vmas, path)
            assert len(pools.list_free_pools(subject.pid, vmas, variables)) < 50  # it stays done
        for _ in range(3):
            assert subject.ask("again") == "True"
            belongings.trim(subject.pid)
        assert subject.ask("again") == "True"


def test_toolkits_bound_to_threads_forbid_collection() -> None:
    """Tcl aborts when another thread destroys its objects: nothing is collected then."""
    code = "sys.modules['_tkinter'] = sys\nimport gc; gc.disable()\nsay('ready'), hear()"
    with living(code) as subject:
        told = trim_and_list(subject.pid)
        assert told["trim"]["collected"] == 0
        assert "_tkinter is loaded" in told["trim"]["notes"][0]


def test_a_finalizer_that_fails_or_logs_leaves_no_trace() -> None:
    """Finalizers run on the visitor's thread; `threading` forgets that thread again."""
    code = """
import gc, logging
gc.disable()
seen = []
class Loud:
    def __del__(self):
        seen.append(threading.current_thread().name)
for _ in range(3):
    loud = Loud(); loud.self = loud
loud = None
say("ready")
hear(); say(len(seen), threading.active_count(), len(threading._active))
"""
    with living(code) as subject:
        assert trim_and_list(subject.pid)["trim"]["collected"] >= 3
        assert subject.ask("go") == "3 1 1"


def test_what_an_interpreter_says_is_only_data() -> None:
    """An answer is another's: what is no literal, or of another form, is refused in words."""
    for content in (b"open('/etc/passwd')", b"(" * 5000, b"\xff", b"[]", b"{'error': 'none'}"):
        with pytest.raises(LzyError, match="interpreter in pid 1 "):
            door._read_answer(1, content)
    for table in ({}, {"variables": 3}, {"variables": {"rows": [{}]}}, {"variables": {"rows": 1}}):
        with pytest.raises(LzyError, match="list of variables"):
            belongings.read_belongings(table)
    row = {
        "name": "a\x1b[2J", "type": "int", "what": "", "bytes": 1, "device_bytes": 0, "objects": 1,
        "estimated": False,
    }  # fmt: skip
    table = {"rows": [row], "names": 1, "bytes": 1, "device_bytes": 0, "complete": True}
    read = belongings.read_belongings({"python": "3", "variables": table})
    assert "\x1b" not in read.variables[0].name
    assert belongings.read_belongings(json.loads(json.dumps(belongings.as_table(read)))) == read


def test_symbols_are_found_as_the_loader_finds_them() -> None:
    """Addresses of functions in our own libraries are those that the loader gives."""
    import ctypes

    found, _ = door.find_functions(os.getpid(), proc.mappings(os.getpid(), with_flags=False))
    for name in ("PyRun_StringFlags", "pthread_create", "malloc_trim", "Py_DecRef"):
        function = getattr(ctypes.pythonapi if name.startswith("Py") else ctypes.CDLL(None), name)
        assert found[name] == ctypes.cast(function, ctypes.c_void_p).value, name
    assert symbols.gnu_hash("printf") == 0x156B2BB8
    library = next(symbols.libraries(os.getpid(), proc.mappings(os.getpid(), with_flags=False)))
    assert library.function("no_such_function") == 0


def test_the_code_is_what_its_source_says() -> None:
    """Instructions named in the docstring are the machine code's (as far as they are named)."""
    from lzy.checkpoint import door_machine

    assert re.search(rb"\x41\x5f\x41\x5e\x41\x5d\x41\x5c\x5b\xc3$", door_machine.CODE)
    assert door_machine.CODE[door_machine.VISIT :].startswith(b"\x53\x41\x54\x41\x55")
    content = door_machine.pack_mailbox(
        0x1000,
        b"pass",
        {"Py_IsInitialized": 7},
        door_machine.Stacks(1, 2, 3),
        (4, 5),
        8,
        9,
        10,
        11,
        pause_ms=0,
    )
    assert len(content) == door_machine.TEXT + 5
    assert content[192:200] == (7).to_bytes(8, "little")
    assert door_machine.unpack_state(content) == (door_machine.WAITING, 0, 0, 10, 11)
