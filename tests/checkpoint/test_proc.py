"""/proc is read rightly whatever names processes, threads and files have."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import in_child, living

from lzy.checkpoint import proc
from lzy.checkpoint.errors import AccessDenied, NotFound

NAMED = """
libc.prctl(15, ctypes.c_char_p(bytes.fromhex(sys.argv[1])), 0, 0, 0)
say("ready"); hear()
"""


@pytest.mark.parametrize(
    "name", [b"plain", b") R \xff\n", b"(((", b"a b) S 1 2", b"\xc3\xa9t\xe9\ttab", b""]
)
def test_odd_names_of_processes(name: bytes) -> None:
    """A name is any 15 bytes; the fields behind it are found all the same."""
    with living(NAMED, name.hex()) as subject:
        stat, status = proc.stat(subject.pid), proc.status(subject.pid)
        assert os.fsencode(stat[1]) == name
        assert stat[0] == str(subject.pid)
        assert stat[2] in "SR"
        assert int(stat[3]) == os.getpid()
        assert len(stat) >= 52
        assert proc.start_time(subject.pid) > 0
        assert int(status["Tgid"]) == subject.pid
        assert int(status["PPid"]) == os.getpid()
        assert int(status["Threads"]) == 1


MAPPING = """
for name in sys.argv[1:]:
    fd = os.open(name, os.O_RDONLY)
    allocate(4096, 1, 0x2, fd)
    allocate(4096, 1, 0x1, fd, 0)
    os.close(fd)
say("ready"); hear(); os.unlink(sys.argv[1]); say("unlinked"); hear()
"""


def test_odd_names_of_files(tmp_path: Path) -> None:
    """Spaces, newlines, bytes that are no UTF-8, and names that end in ` (deleted)`.

    What was deleted in truth has its content in no directory; what is only called so is a file.
    """
    names = [b"gone", b"two words", b"new\nline", b"\xff\xfe", b"so called (deleted)", b" "]
    paths = [os.fsencode(tmp_path) + b"/" + name for name in names]
    for path in paths:
        with open(path, "wb") as file:
            file.write(bytes(4096))
    with living(MAPPING, *map(os.fsdecode, paths)) as subject:
        assert subject.ask("unlink") == "unlinked"
        for with_flags in (True, False):
            vmas = proc.mappings(subject.pid, with_flags=with_flags)
            found = {v.path: v.kind for v in vmas}
            for path in paths[1:]:
                assert found[os.fsdecode(path)] == "file", path
            assert found[os.fsdecode(paths[0]) + " (deleted)"] == "memory"
            assert os.fsdecode(paths[0]) not in found
            mapped = [v for v in vmas if v.path == os.fsdecode(paths[1])]
            assert {v.shared for v in mapped} == {True, False}
            assert mapped[0].inode == os.stat(paths[1]).st_ino
            assert mapped[0].length == 4096


def test_what_smaps_says_besides(tmp_path: Path) -> None:
    """The words of maps stand in smaps, whatever files are called, and so do each start's flags."""
    paths = [os.fsencode(tmp_path) + b"/" + name for name in (b"a", b"new\nline", b"VmFlags: rd")]
    for path in paths:
        with open(path, "wb") as file:
            file.write(bytes(4096))
    with living(MAPPING, *map(os.fsdecode, paths)) as subject:
        assert subject.ask("unlink") == "unlinked"
        details = proc.read_bytes(subject.pid, "smaps")
        assert proc.places_in(details) == proc.read_bytes(subject.pid, "maps")
        vmas = proc.mappings(subject.pid)
        assert proc.parse_flags(details) == {vma.start: vma.flags for vma in vmas}
        assert any(vma.flags for vma in vmas)


def test_what_is_longer_than_one_call_gives(tmp_path: Path) -> None:
    """Of whatever length: it is read to the end, and is what read(2) gives."""
    content = os.urandom(proc._PIECES * proc._PIECE_BYTES + 12345)
    for length_bytes in (0, 1, proc._PIECE_BYTES, len(content)):
        (tmp_path / "file").write_bytes(content[:length_bytes])
        assert proc.read_at_once(str(tmp_path / "file")) == content[:length_bytes]
    many = "places = [allocate(4096, 1 + 2 * (n % 2)) for n in range(2000)]; say('ready'); hear()"
    with living(many) as subject:
        path = f"/proc/{subject.pid}/smaps"
        at_once, piecewise = proc.read_at_once(path), proc.read_file(path)
        assert proc.parse_mappings(at_once) == proc.parse_mappings(piecewise)
        assert min(len(at_once), len(piecewise)) > 2 * proc._PIECES * proc._PIECE_BYTES


def test_kinds_and_flags_of_mappings() -> None:
    """Anonymous, heap, stack, shared, memfd, vDSO and what smaps' VmFlags add to them."""
    code = """
place = allocate(8 * 4096)
libc.madvise(place, 4096, 10)
shared = allocate(4096, 3, 0x21)
fd = os.memfd_create("mine")
os.ftruncate(fd, 4096)
memfd = allocate(4096, 3, 0x1, fd)
say("ready"); say(place, shared, memfd); hear()
"""
    with living(code) as subject:
        place, shared, memfd = map(int, subject.hear().split())
        vmas = proc.mappings(subject.pid)
        by_start = {v.start: v for v in vmas}
        assert by_start[place].kind == "anonymous"
        assert "dc" in by_start[place].flags
        assert by_start[place].protection == 3
        assert by_start[shared].kind == "memory"
        assert by_start[shared].shared
        assert by_start[memfd].kind == "memory"
        assert by_start[memfd].path == "/memfd:mine (deleted)"
        kinds = [v.kind for v in vmas]
        assert kinds.count("vdso") == 1
        assert "vvar" in kinds
        assert [v.kind for v in vmas if v.path == "[heap]"] == ["anonymous"]
        (stack,) = [v for v in vmas if v.path == "[stack]"]
        assert {"gd"} <= stack.flags
        assert sorted(v.start for v in vmas) == [v.start for v in vmas]
        without = proc.mappings(subject.pid, with_flags=False)
        assert [(v.start, v.end, v.kind) for v in without] == [
            (v.start, v.end, v.kind) for v in vmas
        ]
        assert {v.kind for v in proc.kernel_mappings(subject.pid)} <= {"vdso", "vvar", "vsyscall"}


def test_limits_are_what_the_process_sees() -> None:
    """Soft and hard, finite and infinite, by their numbers."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(4)[1]))
say("ready"); say([resource.getrlimit(n) for n in range(16)]); hear()
"""
    with living(code) as subject:
        seen = eval(subject.hear())
        limits = proc.limits(subject.pid)
        assert limits[7] == (77, 99)
        infinite = (1 << 64) - 1
        assert [limits[n] for n in range(16)] == [(s & infinite, h & infinite) for s, h in seen]


def test_posix_timers_are_listed() -> None:
    """Number, signal, value, way of notifying and clock of each."""
    code = """
import struct
def create(clock, value, number, notify):
    event = ctypes.create_string_buffer(struct.pack("<Qii", value, number, notify), 64)
    timer = ctypes.c_int()
    assert libc.syscall(222, clock, event, ctypes.byref(timer)) == 0
    return timer.value
made = [create(1, 0x1234, 34, 0), create(0, 7, 10, 1)]
say("ready"); say(made); hear()
"""
    with living(code) as subject:
        numbers = eval(subject.hear())
        found = sorted(proc.posix_timers(subject.pid))
        assert [(t.number, t.signal, t.value, t.clock) for t in found] == [
            (numbers[0], 34, 0x1234, 1),
            (numbers[1], 10, 7, 0),
        ]
        assert [t.notify for t in found] == ["signal/pid", "none/pid"]


def test_threads_and_children() -> None:
    """Threads with the leader first; children of every thread, zombies included."""
    code = """
born = []
def bear():
    born.append(os.posix_spawn("/bin/true", ["true"], {})); ended.wait()
ended = threading.Event()
threads = [threading.Thread(target=bear) for _ in range(3)]
for t in threads: t.start()
while len(born) < 3: time.sleep(0.001)
say("ready"); say(born, [t.native_id for t in threads]); hear(); ended.set()
"""
    with living(code) as subject:
        born, tids = eval(subject.hear().replace("] [", "], ["))
        assert proc.threads(subject.pid) == [subject.pid, *sorted(tids)]
        assert sorted(proc.children(subject.pid)) == sorted(born)


def test_nobody_there() -> None:
    """Whatever is asked of a pid that nobody has, the answer is NotFound."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for ask in (proc.stat, proc.status, proc.mappings, proc.threads, proc.limits, proc.children):
        with pytest.raises(NotFound, match=str(pid)):
            ask(pid)


def test_without_rights() -> None:
    """What may not be read is AccessDenied, with a way out."""
    if os.getuid():
        pytest.fail("this test needs root, to become somebody else")

    def try_as_nobody() -> None:
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(AccessDenied) as caught:
            proc.mappings(os.getppid())
        assert caught.value.remedy

    assert in_child(try_as_nobody) == 0
