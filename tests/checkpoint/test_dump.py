"""A dump refuses by name what it cannot do, leaves no trace, and its image is one instant."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from memory import descriptors
from subjects import PATIENCE_S, Subject, in_child, kill_at_every_step, living

from lzy.checkpoint import capture, machine, proc
from lzy.checkpoint.capture import default_name
from lzy.checkpoint.dump import dump
from lzy.checkpoint.errors import AccessDenied, LzyError, NotFound, Unsupported
from lzy.checkpoint.image import Image
from lzy.checkpoint.linux import PAGE_BYTES
from lzy.checkpoint.stages import STAGES
from lzy.checkpoint.store import Store

TALKING = "say('ready')\nwhile (line := hear()): say(line)"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


def read_memory(image: Image, address: int, length_bytes: int) -> bytes:
    """Bytes of the address space as the image has them, page by page."""
    found = bytearray()
    buffer = memoryview(bytearray(image.window_pages * PAGE_BYTES))
    size = image.window_pages * PAGE_BYTES
    for page in range(address & -PAGE_BYTES, address + length_bytes, PAGE_BYTES):
        index = image.find_run(0, page & -size)
        content = bytes(PAGE_BYTES)
        if index >= 0:
            window, mask, chunk = image.run(index)
            bit = (page - window) // PAGE_BYTES
            if mask >> bit & 1:
                image.read_chunk(chunk, buffer)
                at = (mask & (1 << bit) - 1).bit_count() * PAGE_BYTES
                content = bytes(buffer[at : at + PAGE_BYTES])
        found += content
    start = address % PAGE_BYTES
    return bytes(found[start : start + length_bytes])


def facts(pid: int) -> list[object]:
    """All that a dump must not change."""
    folder = Path(f"/proc/{pid}")
    threads = sorted(os.listdir(folder / "task"))
    status = [(folder / "task" / tid / "status").read_text().splitlines() for tid in threads]
    kept = ("Sig", "Shd", "Tracer", "Threads", "State:\tT", "FDSize", "Cap", "Seccomp")
    return [
        (folder / "maps").read_text().splitlines(),
        {fd: os.readlink(folder / "fd" / fd) for fd in os.listdir(folder / "fd")},
        proc.children(pid),
        [[x for x in lines if x.startswith(kept) and "SigQ" not in x] for lines in status],
        (folder / "timers").read_text(),
    ]


def own_facts() -> list[object]:
    return [descriptors(), threading.active_count()]


# -- refusals ------------------------------------------------------------------------------------


def test_a_thread_is_no_process(store: Store) -> None:
    """The id of a thread is refused; its process is named."""
    code = "t = threading.Thread(target=hear); t.start(); say('ready'); say(t.native_id)"
    with living(code) as subject:
        tid = int(subject.hear())
        with pytest.raises(NotFound, match=f"{tid} is a thread of process {subject.pid}"):
            dump(tid, store)


def test_who_is_not_there(store: Store) -> None:
    """A zombie, a pid that nobody has, ourselves: each in its own words."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(NotFound, match="zombie"):
        dump(pid, store)
    os.waitpid(pid, 0)
    with pytest.raises(NotFound, match=f"no process has pid {pid}"):
        dump(pid, store)
    with pytest.raises(Unsupported, match="itself") as caught:
        dump(os.getpid(), store)
    assert caught.value.remedy
    assert store.images() == []


def test_kernel_thread(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the kernel has no memory: refused as what it is."""
    monkeypatch.setattr(proc, "status", lambda pid: {"Tgid": str(pid), "State": "S (sleeping)"})
    monkeypatch.setattr(proc, "read_bytes", lambda pid, name: b"")
    monkeypatch.setattr(proc, "witness", lambda pid: pid)
    monkeypatch.setattr(proc, "is_ending", lambda pid: False)
    with pytest.raises(Unsupported, match="kernel thread"):
        dump(2, store)


def test_without_rights(store: Store) -> None:
    """Somebody else's process is AccessDenied, with a way out, and goes on."""
    if os.getuid():
        pytest.fail("this test needs root, to become somebody else")
    with living(TALKING) as subject:

        def try_as_nobody() -> None:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with pytest.raises(AccessDenied) as caught:
                dump(subject.pid, store)
            assert caught.value.remedy

        assert in_child(try_as_nobody) == 0
        assert subject.ask("hello") == "hello"


def test_32_bit_process(store: Store) -> None:
    """A 32-bit program is refused by name and goes on."""
    # 1: mov eax,29; int 0x80 (pause); jmp 1b
    code = bytes.fromhex("b81d000000cd80ebf7")
    header = struct.pack(
        "<16sHHIIIIIHHHHHH",
        b"\x7fELF\x01\x01\x01", 2, 3, 1, 0x8048000, 52, 0, 0, 52, 32, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<8I", 1, 0x1000, 0x8048000, 0x8048000, len(code), 4096, 5, 0x1000)
    program = (header + segment).ljust(0x1000, b"\0") + code
    descriptor = os.memfd_create("program", os.MFD_CLOEXEC)
    os.write(descriptor, program)
    pid = os.fork()
    if pid == 0:
        try:
            os.execve(descriptor, ["program32"], {})
        except OSError:
            os._exit(98)
    try:
        os.close(descriptor)
        deadline = time.monotonic() + 10
        while True:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                pytest.skip("this kernel runs no 32-bit programs")  # IA32_EMULATION
            call = Path(f"/proc/{pid}/syscall").read_text()
            if Path(f"/proc/{pid}/cmdline").read_bytes() == b"program32\0" and call[0] == "2":
                break
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for _ in range(2):
            with pytest.raises(Unsupported, match="32-bit") as caught:
                dump(pid, store)
            assert caught.value.remedy
            assert proc.status(pid)["TracerPid"] == "0"
            assert proc.stat(pid)[2] in "SR"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- no trace ------------------------------------------------------------------------------------

BUSY = """
import json
threads = [threading.Thread(target=time.sleep, args=(1000,), daemon=True) for _ in range(5)]
for t in threads: t.start()
signal.setitimer(signal.ITIMER_REAL, 1000)
blob, same = (bytes(range(256)) * 4000 for _ in range(2))
say("ready")
while (line := hear()): say(line, blob == same)
"""


def test_leaving_it_running_leaves_no_trace(store: Store) -> None:
    """Twice: no zombie, descriptor, mapping, mask or timer is left in it, none in us."""
    with living(BUSY) as subject:
        settle(subject)
        before, ours = facts(subject.pid), own_facts()
        for number in range(2):
            where = {"name": f"image{number}", "leave_running": True, "track": False}
            report = dump(subject.pid, store, **where)
            assert report.snapshot
            assert report.notes == []
            assert report.threads == 6
            assert facts(subject.pid) == before
            assert own_facts() == ours
            settle(subject)
        assert {i.name for i in store.images()} == {"image0", "image1"}


def test_ending_it_leaves_nothing(store: Store) -> None:
    """The process is gone (its parent is told: killed), and we hold nothing of it."""
    with living(BUSY) as subject:
        ours = own_facts()
        report = dump(subject.pid, store)
        assert not report.left_running
        assert not report.snapshot
        assert not subject.is_alive
        assert set(own_facts()[0]) <= set(ours[0])


def settle(subject: Subject) -> None:
    """Have it answer, and wait until every thread sleeps again where it should."""
    assert subject.ask("hello") == "hello True"
    sleepers = dict.fromkeys(proc.threads(subject.pid), 230)
    subject.await_calls({**sleepers, subject.pid: 0})


CHECKPOINT_STAGES = ("dump.ahead", "dump.tracked", "dump.split", "dump.resumed")


class _Unwell(Exception):
    """What a step of a dump meets in these tests."""


@pytest.mark.parametrize("leave_running", [False, True])
def test_failure_at_every_stage_leaves_it_running(
    store: Store, leave_running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails and wherever: no image, and the process runs on without a trace."""
    behind = ("dump.committed", "dump.ended")
    stages = [s for s in STAGES if s.startswith("dump.") and s not in behind]
    if not leave_running:
        stages = [s for s in stages if s not in CHECKPOINT_STAGES]
    with living(BUSY) as subject:
        settle(subject)
        before, ours = facts(subject.pid), own_facts()
        for stage in stages:
            reached = []

            def fail(name: str, stage: str = stage, reached: list[str] = reached) -> None:
                if name == stage:
                    reached.append(name)
                    raise _Unwell

            monkeypatch.setattr(capture, "reach", fail)
            with pytest.raises(_Unwell):
                dump(subject.pid, store, leave_running=leave_running)
            assert reached == [stage]
            assert facts(subject.pid) == before, stage
            assert own_facts() == ours, stage
            settle(subject)
        assert store.images() == []


@pytest.mark.parametrize("leave_running", [False, True])
def test_process_that_ends_meanwhile(
    store: Store, leave_running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed by somebody at any stage: an error of lzy's, or a whole image; no more."""
    for stage in (s for s in STAGES if s.startswith("dump.")):
        with living(BUSY) as subject:
            ours = own_facts()

            def kill(name: str, stage: str = stage, subject: Subject = subject) -> None:
                if name == stage and subject.is_alive:
                    os.kill(subject.pid, signal.SIGKILL)
                    while proc.stat(subject.pid)[2] not in "ZX":
                        time.sleep(0.001)

            monkeypatch.setattr(capture, "reach", kill)
            name = stage.replace("dump.", "")
            try:
                dump(subject.pid, store, name=name, leave_running=leave_running)
            except LzyError:
                assert name not in {i.name for i in store.images()} or stage == "dump.committed"
            else:
                with store.load(name) as image:
                    assert image.document["pid"] == subject.pid
            assert set(own_facts()[0]) <= set(ours[0]), stage


@pytest.mark.parametrize("leave_running", [False, True])
def test_dumper_killed_at_every_step(store: Store, leave_running: bool) -> None:
    """`kill -9` of lzy before any of its steps: the process runs on and can be dumped again."""
    with living(BUSY) as subject:
        settle(subject)
        before = facts(subject.pid)

        def dump_it() -> None:
            if subject.is_alive:
                dump(subject.pid, store, leave_running=leave_running)

        def check(when: str) -> None:
            if not leave_running and store.images():  # it may have been killed while it killed
                with contextlib.suppress(AssertionError, BrokenPipeError):
                    settle(subject)
                    return
                assert select.select([subject.pidfd], [], [], PATIENCE_S)[0]  # it ends
                return
            settle(subject)
            assert facts(subject.pid)[3] == before[3], when

        kills = kill_at_every_step(dump_it, check, first=2 + leave_running, every=11)
        assert kills > 5


# -- one instant ---------------------------------------------------------------------------------

TRANSACTIONS = """
size = 1 << 20
first, second = allocate(size), allocate(size)
ctypes.memset(first, 1, size); ctypes.memset(second, 1, size)
say("ready"); say(first, second)
lines = []
threading.Thread(target=lambda: [lines.append(l) for l in iter(hear, "")], daemon=True).start()
n = 1
while True:
    n = n % 200 + 1
    ctypes.memset(first, n, size)
    ctypes.memset(second, n, size)
    if lines: say(lines.pop(), n > 0)
"""


@pytest.mark.parametrize("obstacle", ["", "MADV_DONTFORK", "MADV_WIPEONFORK"])
def test_image_is_one_instant(store: Store, obstacle: str) -> None:
    """Two areas written one after the other, for ever: the image holds a moment that was.

    All of the first area is n or its beginning is n and its rest n-1; if that is so, then the
    second is n-1 throughout. Where a snapshot would lack an area, the process stays stopped until
    it is written, and says so.
    """
    advice = {"MADV_DONTFORK": 10, "MADV_WIPEONFORK": 18}.get(obstacle)
    code = TRANSACTIONS
    if advice:
        code = code.replace(
            'say("ready")', f'assert libc.madvise(first, 4096, {advice}) == 0\nsay("ready")'
        )
    size = 1 << 20
    with living(code) as subject:
        first, second = map(int, subject.hear().split())
        for number in range(3):
            report = dump(subject.pid, store, name=f"image{number}", leave_running=True)
            assert report.snapshot == (not obstacle)
            assert bool(report.notes) == bool(obstacle)
            with store.load(f"image{number}") as image:
                a, b = (read_memory(image, place, size) for place in (first, second))
            n, last = a[0], a[-1]
            assert 0 < n <= 200
            before = n - 1 or 200
            changed = a.count(bytes([n])) if n != last else size
            assert a == bytes([n]) * changed + bytes([last]) * (size - changed)
            if n != last:
                assert last == before
                assert b == bytes([before]) * size
            else:
                written = b.count(bytes([n]))
                assert b == bytes([n]) * written + bytes([before]) * (size - written)
            subject.say(f"go on {number}")
            assert subject.hear() == f"go on {number} True"


# -- what an image holds -------------------------------------------------------------------------


def test_image_holds_the_process(store: Store) -> None:
    """Its memory byte for byte, its threads, what is forbidden to it, guards."""
    code = """
place = allocate(64 * 4096)
libc.madvise(place, 64 * 4096, 15)
content = os.urandom(20 * 4096)
ctypes.memmove(place, content, len(content))
libc.mprotect(place + 4096, 4096, 0)
guarded = libc.madvise(place + 30 * 4096, 2 * 4096, 102)
libc.prctl(15, b") R \\xff\\n", 0, 0, 0)
say("ready"); say(place, guarded, content.hex()); hear()
"""
    with living(code) as subject:
        place, guarded, content = subject.hear().split()
        report = dump(subject.pid, store)
    assert os.fsencode(store.load(report.image).document["comm"]) == b") R \xff\n"
    with store.load(report.image) as image:
        assert read_memory(image, int(place), 20 * PAGE_BYTES) == bytes.fromhex(content)
        assert read_memory(image, int(place) + 20 * PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)
        if guarded == "0":
            start = int(place) + 30 * PAGE_BYTES
            assert [start, start + 2 * PAGE_BYTES] in image.document["guards"]
        assert image.document["pid"] == subject.pid
        assert json.dumps(image.document)
        registers = image.document["threads"][0]["registers"]
        assert set(registers) == set(machine.REGISTER_NAMES)


def test_default_names_are_sound() -> None:
    """Whatever a program is called, its image's name is a plain file name."""

    def name(comm: str) -> str:
        return default_name(comm, 7, 1.25)

    assert name("python3.11") == "python3.11-7-19700101T000001.250"
    assert name(") R \udcff\n").startswith("R---7-") or name(") R \udcff\n").split("-7-")[0]
    assert "/" not in name("../../etc")
    assert not name("..").startswith(".")
    assert name("").startswith("process-7-")
