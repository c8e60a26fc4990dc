"""Corners of the kernel at which a dump or a restore once went wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from subjects import PRELUDE, living

from lzy.checkpoint import proc
from lzy.checkpoint import subject as subjects
from lzy.checkpoint.dump import dump
from lzy.checkpoint.errors import NotFound, Unsupported
from lzy.checkpoint.store import Store

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

TALKING = 'say("ready")\nwhile (line := hear()): say(line)\n'
BOTH_WAYS = pytest.mark.parametrize("way", [("--eager",), ()], ids=["eager", "lazy"])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def test_a_filtered_thread(store: Store) -> None:
    """A thread's own seccomp filter never hears of us, and is in force again afterwards."""
    code = """
import struct
def confined():
    # BPF: load the number; sigaltstack(131), which we would inject, ends the process
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 131), (6, 0, 0, 0x80000000), (6, 0, 0, 0x7fff0000)]
    steps = b"".join(struct.pack("<HBBI", *step) for step in code)
    kept = ctypes.create_string_buffer(steps)
    program = struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(kept))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0
    tids.append(threading.get_native_id())
    libc.pause()
tids = []
threading.Thread(target=confined, daemon=True).start()
while not tids: time.sleep(0.001)
say("ready"); say(tids[0])
while (line := hear()): say(line)
"""
    with living(code) as subject:
        tid = int(subject.hear())
        subject.await_calls({tid: 34})
        dump(subject.pid, store, leave_running=True)
        assert subject.ask("hello") == "hello"
        assert proc.status(subject.pid, tid)["Seccomp"] == "2"
        assert proc.status(subject.pid)["Seccomp"] == "0"


@pytest.mark.parametrize(("flag", "what"), [(0x400, "descriptors"), (0x200, "directory")])
@pytest.mark.shows("refused", "a thread with descriptors or a directory of its own (unshare)")
def test_a_thread_with_its_own(store: Store, flag: int, what: str) -> None:
    """A thread that unshared its descriptors or its directory is named, and nothing is merged."""
    code = """
def apart():
    assert libc.unshare(int(sys.argv[1])) == 0
    tids.append(threading.get_native_id())
    libc.pause()
tids = []
threading.Thread(target=apart, daemon=True).start()
while not tids: time.sleep(0.001)
say("ready")
while (line := hear()): say(line)
"""
    with living(code, str(flag)) as subject:
        with pytest.raises(Unsupported, match=what):
            dump(subject.pid, store)
        assert subject.ask("hello") == "hello"


def test_killed_while_our_code_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of many threads killed in the midst of an injected call is soon said to be gone."""
    code = """
for _ in range(20): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
say("ready")
while (line := hear()): say(line)
"""
    with living(code) as subject:
        split = subjects._split

        def killed_meanwhile(tracee: object) -> tuple[int, str]:
            threading.Timer(0.0, os.kill, (subject.pid, signal.SIGKILL)).start()
            signal.pidfd_send_signal(subject.pidfd, signal.SIGKILL)
            return split(tracee)  # type: ignore[arg-type]  # the real one, handed on

        monkeypatch.setattr(subjects, "_split", killed_meanwhile)
        with pytest.raises(NotFound):
            dump(subject.pid, store, leave_running=True)
        assert not subject.is_alive


@BOTH_WAYS
@pytest.mark.parametrize(
    "code",
    [
        # everything locked, with PROT_NONE beside it
        "allocate(1 << 20, 0); assert libc.mlockall(1) == 0\n",
        # a sealed memory file, mapped for reading only
        """
import fcntl
fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING); os.write(fd, b"x" * 8192)
fcntl.fcntl(fd, 1033, 8)  # F_ADD_SEALS, F_SEAL_WRITE
sealed = mmap.mmap(fd, 8192, mmap.MAP_SHARED, mmap.PROT_READ)
""",
        # more reserved than there is, next to a page in use
        """
place = allocate((1 << 40) + 8192, 0, 0x22 | 0x4000)
assert libc.mprotect(place, 4096, 3) == 0
ctypes.memset(place, 7, 4096)
""",
    ],
    ids=["mlockall", "sealed", "reserved"],
)
def test_memory_that_was_hard_to_map(
    start: Start, lzy: CommandLine, code: str, way: tuple[str, ...]
) -> None:
    """What could be dumped can be restored, and goes on."""
    command = [sys.executable, "-I", "-S", "-c", PRELUDE + code + TALKING]
    program = start(command=command).await_ready()
    lzy.dump(program)
    lzy.restore(program, "image", *way)
    assert program.ask("hello") == "hello"


def test_timed_calls_after_two_stops(start: Start, lzy: CommandLine) -> None:
    """poll and nanosleep in C, checkpointed first and moved then, come to their end."""
    code = """
class Timespec(ctypes.Structure): _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]
results = {}
def poll(): results["poll"] = libc.poll(None, 0, 4000)
def sleep(): results["nanosleep"] = libc.nanosleep(ctypes.byref(Timespec(4, 0)), None)
threads = [threading.Thread(target=f) for f in (poll, sleep)]
for t in threads: t.start()
say("ready")
hear()
for t in threads: t.join()
say(sorted(results.items()))
hear()
"""
    program = start(command=[sys.executable, "-I", "-S", "-c", PRELUDE + code]).await_ready()
    lzy.dump(program, "first", "--leave-running")
    lzy.dump(program)
    lzy.restore(program)
    assert program.ask("tell") == "[('nanosleep', 0), ('poll', 0)]"


def test_death_signal_of_a_parent_that_is_gone(start: Start, lzy: CommandLine) -> None:
    """PR_SET_PDEATHSIG does not end a restored process together with the command that made it."""
    code = "assert libc.prctl(1, 9) == 0\n" + TALKING
    program = start(command=[sys.executable, "-I", "-S", "-c", PRELUDE + code]).await_ready()
    lzy.dump(program)
    lzy.restore(program)
    assert program.ask("hello") == "hello"
