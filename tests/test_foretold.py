"""What `lzy dump --dry-run` tells beforehand is what then happens, thing by thing."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))
from subjects import living
from test_programs import QUICK
from test_trees import QUICK as TREES

from lzy.checkpoint.dump import dump
from lzy.checkpoint.errors import Unsupported
from lzy.checkpoint.foresight import CHANGED, CUT, REFUSED, Foresight, foresee
from lzy.checkpoint.store import Store

if TYPE_CHECKING:
    from living import Case, CommandLine, Program

    Start = Callable[..., Program]

HELD = "import pty, select, socket, struct\n"
HOLDERS = {
    "netlink of another protocol": (
        "netlink",
        "held = socket.socket(16, socket.SOCK_RAW, 12)",
    ),
    "packet socket": (
        "packet",
        "held = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    ),
    "perf event": (
        "perf_event",
        """
kind = ctypes.create_string_buffer(struct.pack("=II", 1, 128) + bytes(120), 128)
assert libc.syscall(298, kind, 0, -1, -1, 0) >= 0
""",
    ),
    "userfaultfd": ("userfaultfd", "assert libc.syscall(323, 1) >= 0"),
    "namespace": ("net:", "held = open('/proc/self/ns/net')"),
    "deleted file with another name": (
        "another one, unknown here",
        """
held = open(sys.argv[1] + "/one", "w")
os.link(held.name, sys.argv[1] + "/two")
os.unlink(held.name)
""",
    ),
    "deleted folder": (
        "it was deleted",
        """
os.mkdir(sys.argv[1] + "/gone")
held = os.open(sys.argv[1] + "/gone", os.O_RDONLY)
os.rmdir(sys.argv[1] + "/gone")
""",
    ),
    "message queue without a name": (
        "no name any more",
        """
rt, name = ctypes.CDLL("librt.so.1"), b"/lzy-%d" % os.getpid()
queue = rt.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None)
assert rt.mq_send(queue, b"x", 1, 0) == 0
rt.mq_unlink(name)
""",
    ),
    "asynchronous I/O": (
        "io_setup",
        "context = ctypes.c_ulong(); assert libc.syscall(206, 8, ctypes.byref(context)) == 0",
    ),
    "part of System V memory": (
        "System V",
        """
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, 8192, 0o1600)
place = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)
assert libc.munmap(place, 4096) == 0
""",
    ),
    "io_uring without a descriptor": (
        "io_uring",
        """
ring = libc.syscall(425, 8, ctypes.create_string_buffer(120))
allocate(4096, 3, 1, ring)
os.close(ring)
""",
    ),
    "thread with a directory of its own": (
        "of its own (unshare)",
        """
gate = threading.Event()
def apart():
    assert libc.unshare(0x200) == 0
    gate.set()
    time.sleep(999)
threading.Thread(target=apart, daemon=True).start()
gate.wait()
""",
    ),
    "filter with a supervisor": (
        "USER_NOTIF",
        """
assert libc.prctl(38, 1, 0, 0, 0) == 0
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 0x7000), (6, 0, 0, 0x7fc00000), (6, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
block = struct.pack("=HxxxxxxQ", len(rules), ctypes.addressof(code))
listener = libc.syscall(317, 1, 8, block)
assert listener >= 0
os.close(listener)
""",
    ),
    "epoll under way": (
        "no process has open",
        """
one, two = socket.socketpair()
with select.epoll() as epoll: socket.send_fds(one, [b"x"], [epoll.fileno()])
""",
    ),
    "descriptors behind other bytes": (
        "SCM_RIGHTS",
        """
one, two = socket.socketpair()
one.send(b"before")
socket.send_fds(one, [b"with"], [0])
one.send(b"after")
""",
    ),
    "bytes that nobody has accepted": (
        "not accepted yet",
        """
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
client.send(b"x")
""",
    ),
    "unread bytes of a terminal": (
        "unread",
        "one, two = pty.openpty(); os.write(two, b'unread'); select.select([one], [], [])",
    ),
    "session led from elsewhere": (
        "whose leader is neither",
        """
assert libc.prctl(36, 1, 0, 0, 0) == 0  # whoever loses its parent below is a child of this one
first, done = os.getpid(), os.pipe()
def below(work):
    if os.fork() == 0:
        libc.prctl(1, 9, 0, 0, 0)
        work()
        signal.pause()
def lose():
    libc.prctl(1, 0, 0, 0, 0)
    while os.getppid() != first: time.sleep(0.001)
    libc.prctl(1, 9, 0, 0, 0)
    os.write(done[1], b"x")
def lead():
    os.setsid()
    below(lambda: (below(lose), os._exit(0)))
below(lambda: below(lead))
os.read(done[0], 1)
""",
    ),
}
_WAITED_FOR = (
    "epoll under way",
    "descriptors behind other bytes",
    "bytes that nobody has accepted",
)


def refusals(told: Foresight) -> list[str]:
    return [one.words for one in told.findings if one.outcome == REFUSED]


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.slow) if what in _WAITED_FOR else what
        for what in HOLDERS
    ],
)
def test_what_is_refused_is_told_in_the_same_words(what: str, tmp_path: Path) -> None:
    """By the dry run with a way out, and then by the dump, which leaves the process running."""
    words, code = HOLDERS[what]
    with living(f"{HELD}{code}\nsay('ready')\nhear()\n", str(tmp_path)) as subject:
        told = foresee(subject.pid)
        assert any(words in one for one in refusals(told)), told.findings
        assert all(one.remedy for one in told.findings if one.outcome == REFUSED)
        with Store.open(tmp_path / "store", create=True) as store:
            with pytest.raises(Unsupported) as caught:
                dump(subject.pid, store, name="image")
            assert not store.names()
        assert caught.value.message in refusals(told)
        assert subject.is_alive


ENDS = """
import os, socket, sys
folder, held = sys.argv[1], {}
def connect(name, kind=socket.SOCK_STREAM):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.connect(f"{folder}/{name}")
    return sock
held["tcp"] = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
held["unix"] = connect("stream")
held["reader"], held["writer"] = (os.open(f"/proc/{sys.argv[3]}/fd/{n}", how) for n, how in
                                  ((sys.argv[4], os.O_RDONLY), (sys.argv[5], os.O_WRONLY)))
held["datagram"] = connect("datagram", socket.SOCK_DGRAM)
held["file"] = open(f"{folder}/gone", "w+")
held["file"].write("content"); held["file"].flush(); os.unlink(f"{folder}/gone")
held["listener"] = socket.create_server(("127.0.0.1", 0))
held["listener"].setblocking(False)
one, two = socket.socketpair()
travels = connect("stream")
socket.send_fds(one, [b"x"], [travels.fileno()])
travels.close()
inside = os.pipe(), socket.socketpair()
numbers = {k: v if isinstance(v, int) else v.fileno() for k, v in held.items()}
print(*(f"{k}={v}" for k, v in (numbers | {"carrier": two.fileno()}).items()),
      f"port={held['listener'].getsockname()[1]}", flush=True)

def see(what):
    try:
        return repr(what())
    except OSError as error:
        return type(error).__name__
for line in sys.stdin:
    print(see(lambda: held["tcp"].recv(9)), see(lambda: held["unix"].recv(9)),
          see(lambda: os.read(held["reader"], 9)), see(lambda: os.write(held["writer"], b"x")),
          see(lambda: held["listener"].accept()),
          see(lambda: socket.socket(fileno=socket.recv_fds(two, 9, 1)[1][0]).recv(9)),
          see(lambda: os.pread(held["file"].fileno(), 9, 0)),
          see(lambda: held["datagram"].send(b"x")), flush=True)
"""


def test_what_is_cut_is_told_and_then_cut(start: Start, lzy: CommandLine, tmp_path: Path) -> None:
    """Each end whose other end is outside, who waits to be accepted, what travels in a socket; and
    what comes back as something else. Nothing else is told, and all of it happens."""
    with contextlib.ExitStack() as stack:
        outside = [socket.create_server(("127.0.0.1", 0))]
        for name, kind in (("stream", socket.SOCK_STREAM), ("datagram", socket.SOCK_DGRAM)):
            outside.append(socket.socket(socket.AF_UNIX, kind))
            outside[-1].bind(str(tmp_path / name))
        outside[1].listen()
        for sock in outside:
            stack.enter_context(sock)
        pipes = [*os.pipe(), *os.pipe()]
        for number in pipes:
            stack.callback(os.close, number)
        words = [str(tmp_path), str(outside[0].getsockname()[1]), str(os.getpid())]
        words += [str(pipes[0]), str(pipes[3])]
        program = start(command=[sys.executable, "-c", ENDS, *words])
        at = {key: int(value) for key, _, value in map(partition, program.hear().split())}
        stack.enter_context(socket.create_connection(("127.0.0.1", at["port"])))
        told = foresee(program.pid)
        losses = {
            name: {(one.outcome, one.words) for one in told.findings if number in one.descriptors}
            for name, number in at.items()
        }
        assert all(len(found) == (name != "port") for name, found in losses.items()), losses
        assert len(told.findings) == len(at) - 1, told.findings
        outcomes = {name: found.pop() for name, found in losses.items() if found}
        cut = {name for name, (outcome, _) in outcomes.items() if outcome == CUT}
        assert cut == {"tcp", "unix", "reader", "writer", "listener", "carrier"}
        assert {outcome for outcome, _ in outcomes.values()} == {CUT, CHANGED}
        assert "one that waits" in outcomes["listener"][1]
        assert "under way" in outcomes["carrier"][1]
        assert "was deleted" in outcomes["file"][1]
        lzy.dump(program)
        lzy.restore(program)
        ends = ["b''", "b''", "b''", "BrokenPipeError", "BlockingIOError", "b''"]
        assert program.ask("see").split() == [*ends, "b'content'", "1"]


def partition(word: str) -> tuple[str, str, str]:
    return word.partition("=")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*QUICK, *TREES], ids=lambda case: case.id)
def test_programs_that_survive_are_told_to(case: Case, start: Start, tmp_path: Path) -> None:
    """Of each program of the zoo: nothing is refused, what is told is not refused by a dump, and
    the figures are those of the dump."""
    program = start(case.name, *case.arguments).await_ready()
    told = foresee(program.pid)
    assert told.is_possible, told.findings
    with Store.open(tmp_path / "store", create=True) as store:
        report = dump(program.pid, store, name="image", leave_running=True)
    assert report.processes == len(told.members) or "storm" in case.name
    if len(told.members) == 1:  # of several what they share counts for each
        assert report.raw_bytes == pytest.approx(told.raw_bytes + told.object_bytes, rel=0.1)
