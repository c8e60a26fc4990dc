"""A restore makes the process again whole, or says why not and makes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from living import list_children
from subjects import PRELUDE

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

TALKING = """
say("ready")
while (line := hear()) != "end": say(line)
"""
IDENTITY = """
import json
tids = []
done = threading.Event()
threads = [threading.Thread(target=lambda: (tids.append(threading.get_native_id()), done.wait()))
           for _ in range(3)]
for t in threads: t.start()
while len(tids) < 3: time.sleep(0.001)
def gettids(): return sorted(map(int, os.listdir("/proc/self/task")))
say("ready")
while (line := hear()) != "end":
    child = os.posix_spawn("/bin/true", ["true"], {})
    say(json.dumps({
        "pid": os.getpid(), "parent": os.getppid(), "self": int(os.readlink("/proc/self")),
        "tids": gettids(), "known": sorted([os.getpid(), *tids]), "session": os.getsid(0),
        "group": os.getpgid(0), "child": os.waitpid(child, 0)[1],
    }))
done.set()
for t in threads: t.join()
sys.exit(7)
"""


def begin(start: Start, code: str, *arguments: str) -> Program:
    command = [sys.executable, "-I", "-S", "-c", PRELUDE + code, *arguments]
    return start(command=command).await_ready()


def fail(lzy: CommandLine, *words: str) -> dict[str, object]:
    """A restore that is refused in words, and leaves no process behind."""
    before = set(list_children(os.getpid()))
    error = lzy.fail("restore", "image", "--store", str(lzy.store), *words)
    left = [p for p in set(list_children(os.getpid())) - before if os.path.exists(f"/proc/{p}/exe")]
    assert left == []
    assert error["message"]
    return error


def test_it_is_itself_in_a_new_namespace(start: Start, lzy: CommandLine) -> None:
    """getpid, getppid, thread ids, session and /proc/self answer as before; it can have children.

    Its exit status comes out of the namespace's init.
    """
    program = begin(start, IDENTITY)
    before = json.loads(program.ask("who"))
    lzy.dump(program)
    children = set(list_children(os.getpid()))
    report = lzy.restore(program, "image", "--pid-namespace", "new", "--eager")
    assert report["namespace"] == "new"
    assert report["pid_in_namespace"] == before["pid"] != program.pid
    after = json.loads(program.ask("who"))
    assert after == before
    assert after["pid"] == after["self"]
    assert after["tids"] == after["known"]
    assert after["child"] == 0
    program.say("end")
    program.await_end()
    # The init is orphaned, hence ours: it is the only child that is new.
    (init,) = {p for p in set(list_children(os.getpid())) - children if is_our_child(p)}
    assert os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) == 7


def is_our_child(pid: int) -> bool:
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(stat[1]) == os.getpid()
    return False


def test_it_is_itself_here(start: Start, lzy: CommandLine) -> None:
    """In the present namespace too; as a child of the restorer's parent, if that was its own."""
    program = begin(start, IDENTITY)
    before = json.loads(program.ask("who"))
    lzy.dump(program)
    report = lzy.restore(program)
    assert report["namespace"] == "host"
    assert json.loads(program.ask("who")) == before
    program.say("end")
    program.await_end()


def test_zombie_that_has_the_pid_is_named(start: Start, lzy: CommandLine) -> None:
    """A zombie keeps its number: `host` names it, `auto` makes a namespace and says why."""
    program = begin(start, TALKING)
    lzy.succeed("dump", str(program.pid), "--store", str(lzy.store), "--name", "image")
    error = fail(lzy, "--pid-namespace", "host")
    assert error["kind"] == "busy"
    assert f"pid {program.pid} " in str(error["message"])
    assert "zombie" in str(error["message"])
    assert "--pid-namespace new" in str(error["remedy"])
    report = lzy.succeed("restore", "image", "--store", str(lzy.store))
    assert report["namespace"] == "new"
    assert any(str(report["pid_in_namespace"]) in note for note in report["notes"])
    program.adopt(report["pid"])
    assert program.ask("hello") == "hello"


def test_thread_id_that_is_taken(start: Start, lzy: CommandLine) -> None:
    """A thread's number counts as well: `host` is refused, naming who has it."""
    program = begin(start, IDENTITY)
    tids = json.loads(program.ask("who"))["tids"]
    lzy.dump(program)
    # Somebody takes the number of the last thread, as only CAP_CHECKPOINT_RESTORE can.
    taken = tids[-1]
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(taken - 1))
    other = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        if other.pid != taken:
            pytest.skip("another process was faster")  # everybody shares the counter
        error = fail(lzy, "--pid-namespace", "host")
        assert error["kind"] == "busy"
        assert str(taken) in str(error["message"])
    finally:
        other.communicate()
    lzy.restore(program)
    assert program.ask("who")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for at in range(middle, min(middle + 64, len(content))):
        content[at] ^= 0x55
    path.chmod(0o600)
    path.write_bytes(content)


def packs(lzy: CommandLine) -> list[Path]:
    return sorted((p for p in lzy.store.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_damaged_chunk(start: Start, lzy: CommandLine) -> None:
    """A pack spoilt in its middle: an eager restore says `damaged`, and no process is left."""
    program = begin(start, "x = [os.urandom(100) for _ in range(20000)]\n" + TALKING)
    lzy.dump(program)
    largest = packs(lzy)[-1]
    kept = largest.read_bytes()
    damage(largest)
    for way in ((), ("--pid-namespace", "new")):
        error = fail(lzy, "--eager", *way)
        assert error["kind"] == "damaged"
    largest.write_bytes(kept)
    lzy.restore(program, "image", "--eager")
    assert program.ask("hello") == "hello"


def test_missing_files(start: Start, lzy: CommandLine, tmp_path: Path) -> None:
    """A pack, an open file, a mapped file, the working directory: each is named when it is gone."""
    folder, data = tmp_path / "here", tmp_path / "data"
    folder.mkdir()
    data.write_bytes(b"d" * 8192)
    code = """
os.chdir(sys.argv[1])
fd = os.open(sys.argv[2], os.O_RDONLY)
"""
    program = begin(start, code + TALKING, str(folder), str(data))
    lzy.dump(program)
    for path in (data, folder, packs(lzy)[-1]):
        away = path.with_name(path.name + "-away")
        path.rename(away)
        error = fail(lzy)
        # A pack is the store's: that the image is damaged says it.
        assert path.name in str(error["message"]) or error["kind"] == "damaged"
        away.rename(path)
    lzy.restore(program)
    assert program.ask("hello") == "hello"


@pytest.mark.parametrize(("limit", "value"), [("nofile", 20), ("as", 1 << 30), ("fsize", 4096)])
def test_low_limits_of_the_restorer(start: Start, lzy: CommandLine, limit: str, value: int) -> None:
    """A restorer that may not do much: the process comes back whole all the same, or not at all.

    Its own limits are those that it had.
    """
    code = """
import resource
big = allocate(2 << 30, 3, 0x4022)
ctypes.memset(big, 7, 4096)
files = [os.open("/dev/null", 0) for _ in range(40)]
say("ready")
while (line := hear()) != "end":
    ok = ctypes.string_at(big, 4096) == b"\\7" * 4096 and len(os.listdir("/proc/self/fd")) > 40
    say(line, ok, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    program = begin(start, code)
    before = program.ask("hello")
    lzy.dump(program)
    command = ["prlimit", f"--{limit}={value}:{value}", *lzy.executable]
    environment = {**os.environ, "LZY_HOME": str(lzy.home)}
    children = set(list_children(os.getpid()))
    done = subprocess.run(
        [*command, "restore", "image", "--store", str(lzy.store), "--json"],
        env=environment,
        capture_output=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == 0:
        program.adopt(json.loads(done.stdout)["pid"])
        assert program.ask("hello").startswith("hello True")
    else:
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        assert json.loads(done.stdout)["error"]["message"]
        left = set(list_children(os.getpid())) - children
        assert [p for p in left if os.path.exists(f"/proc/{p}/exe")] == []
        lzy.restore(program)
        assert program.ask("hello") == before


def test_exit_by_signal_comes_out_of_the_namespace(start: Start, lzy: CommandLine) -> None:
    """Killed by SIGTERM in its namespace: the init ends with 128 + 15."""
    program = begin(start, TALKING)
    lzy.dump(program)
    children = set(list_children(os.getpid()))
    lzy.restore(program, "image", "--pid-namespace", "new", "--eager")
    signal.pidfd_send_signal(program.pidfd, signal.SIGTERM)
    program.await_end()
    (init,) = {p for p in set(list_children(os.getpid())) - children if is_our_child(p)}
    assert os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) == 128 + 15


GUARDED = """
place = allocate(64 * 4096)
libc.madvise(place, 64 * 4096, 15)
for page in range(64): ctypes.memset(place + 4096 * page, page, 4096)
works = libc.madvise(place + 8 * 4096, 4 * 4096, 102)
r, w = os.pipe()
def readable(page): return libc.write(w, ctypes.c_void_p(place + 4096 * page), 1) == 1
say("ready"); say(works)
while (line := hear()) != "end":
    pages = [p for p in range(64) if readable(p)]
    right = all(ctypes.string_at(place + 4096 * p, 4096) == bytes([p]) * 4096 for p in pages)
    say(*pages, right)
"""


@pytest.mark.parametrize("way", [("--eager",), ()])
def test_guard_pages(start: Start, lzy: CommandLine, way: tuple[str, ...]) -> None:
    """Pages under MADV_GUARD_INSTALL are guarded again, their neighbours readable as before."""
    program = begin(start, GUARDED)
    if program.hear() != "0":
        pytest.skip("this kernel has no guard pages")  # Linux 6.13
    before = program.ask("pages")
    assert before.endswith("True")
    assert " 8 " not in before
    lzy.dump(program)
    lzy.restore(program, "image", *way)
    assert program.ask("pages") == before


def test_a_mapped_file_with_an_odd_name(start: Start, lzy: CommandLine, tmp_path: Path) -> None:
    """A shared mapping of a file called `x (deleted)` still writes to that file afterwards."""
    path = tmp_path / "x (deleted)"
    path.write_bytes(bytes(4096))
    code = """
fd = os.open(sys.argv[1], os.O_RDWR)
place = allocate(4096, 3, 1, fd)
os.close(fd)
say("ready")
while (line := hear()) != "end":
    ctypes.memmove(place, line.encode(), len(line)); say(line)
"""
    program = begin(start, code, str(path))
    program.ask("before")
    lzy.dump(program)
    lzy.restore(program)
    program.ask("afterwards")
    assert path.read_bytes().startswith(b"afterwards")
