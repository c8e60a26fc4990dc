"""Regular files and directories: positions, flags, sharing, contents without a path, changes."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from lzy.checkpoint.errors import Incompatible, Unsupported
from lzy.checkpoint.resources import NoObjects, RestoreOptions, make_descriptors


def test_position_and_flags_and_what_dup_shares(cycle: Any, tmp_path: Path) -> None:
    """A duplicate moves with its twin; a second open of the same file does not."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")

    def hold() -> list[int]:
        one = os.open(path, os.O_RDWR)
        twin = os.dup2(one, 20)
        other = os.open(path, os.O_RDONLY | os.O_NOATIME)
        os.read(one, 4)
        os.read(other, 7)
        return [one, twin, other, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)]

    def prove(state: list[int]) -> Any:
        import fcntl

        one, twin, other, appending = state
        heard = [os.read(one, 2), os.read(twin, 2), os.read(other, 9)]
        os.write(appending, b"end")
        flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in state]
        wanted = [os.O_RDWR, os.O_RDWR, os.O_NOATIME, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK]
        mask = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_NOATIME
        return heard, [flag & mask for flag in flags] == wanted

    assert cycle(hold, prove) == ([b"45", b"67", b"789"], True)
    assert path.read_bytes() == b"0123456789end"


@pytest.mark.shows(
    "changed",
    "a deleted or replaced file that is open: a memory file with its content",
)
def test_deleted_and_replaced_files_travel_with_their_content(cycle: Any, tmp_path: Path) -> None:
    """A file that was deleted, or whose path leads to another by now, has its old content."""

    def hold() -> list[int]:
        numbers = []
        for name in ("deleted", "replaced"):
            path = tmp_path / name
            path.write_bytes(b"old content of " + name.encode())
            numbers.append(os.open(path, os.O_RDWR))
            os.lseek(numbers[-1], 4, os.SEEK_SET)
            path.unlink()
        numbers.append(os.open(f"/proc/self/fd/{numbers[0]}", os.O_RDONLY))
        (tmp_path / "replaced").write_bytes(b"new")
        anonymous = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
        os.write(anonymous, b"nameless")
        return [*numbers, anonymous]

    def prove(state: list[int]) -> Any:
        deleted, replaced, again, anonymous = state
        heard = [os.read(deleted, 99), os.read(replaced, 99), os.pread(anonymous, 99, 0)]
        os.pwrite(deleted, b"OLD", 0)
        heard.append(os.pread(again, 3, 0))
        return [*heard, os.lseek(anonymous, 0, os.SEEK_CUR), os.fstat(deleted).st_nlink]

    assert cycle(hold, prove) == [
        b"content of deleted",
        b"content of replaced",
        b"nameless",
        b"OLD",
        8,
        0,
    ]
    assert (tmp_path / "replaced").read_bytes() == b"new"


def test_directory_goes_on_where_it_was(cycle: Any, tmp_path: Path) -> None:
    """A directory read halfway gives the rest, and no name twice."""
    for number in range(300):
        (tmp_path / f"name-{number}").touch()
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def names(fd: int, limit_bytes: int) -> list[str]:
        buffer = ctypes.create_string_buffer(limit_bytes)
        count = libc.getdents64(fd, buffer, limit_bytes)
        found, position = [], 0
        while position < count:
            length = int.from_bytes(buffer.raw[position + 16 : position + 18], "little")
            name = buffer.raw[position + 19 : position + length]
            found.append(name.split(b"\0")[0].decode())
            position += length
        return found

    def hold() -> tuple[int, list[str]]:
        fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        return fd, names(fd, 2000)

    def prove(state: tuple[int, list[str]]) -> list[str]:
        found = state[1]
        while more := names(state[0], 2000):
            found += more
        return found

    expected = {".", ".."} | {f"name-{number}" for number in range(300)}
    found = cycle(hold, prove)
    assert len(found) == 302
    assert set(found) == expected


@pytest.mark.shows("refused", "an open file that has changed (`--accept-changed-files`)")
def test_a_changed_file_is_refused_unless_accepted(cycle: Any, tmp_path: Path) -> None:
    """Size or time of change differ: refused by path, with a way out; nothing stays open."""
    path = tmp_path / "data"
    path.write_bytes(b"before")

    def hold() -> int:
        return os.open(path, os.O_RDONLY)

    number = cycle.describe(hold)
    before = len(os.listdir("/proc/self/fd"))
    path.write_bytes(b"after!")
    with pytest.raises(Incompatible, match=r"data.*changed since the dump") as caught:
        cycle.restore(lambda: None)
    assert "--accept-changed-files" in caught.value.remedy
    assert len(os.listdir("/proc/self/fd")) == before
    accepted = RestoreOptions(accept_changed_files=True)
    assert cycle.restore(lambda: os.read(number, 9), accepted) == b"after!"


@pytest.mark.shows("survives", "an open file that others write too")
def test_a_file_others_write_too_is_opened_again(cycle: Any, tmp_path: Path) -> None:
    """A log or a database between transactions may have changed in place, as under SIGSTOP."""
    log, database = tmp_path / "log", tmp_path / "database"

    def hold() -> list[int]:
        numbers = [
            os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
            os.open(database, os.O_RDWR | os.O_CREAT),
        ]
        os.write(numbers[0], b"one\n")
        return numbers

    numbers = cycle.describe(hold)
    with log.open("ab") as file:
        file.write(b"two\n")
    database.write_bytes(b"by another")
    cycle.restore(lambda: os.write(numbers[0], b"three\n"))
    assert log.read_bytes() == b"one\ntwo\nthree\n"
    assert cycle.restore(lambda: os.read(numbers[1], 99)) == b"by another"


@pytest.mark.parametrize("way", ["replaced", "locked"])
@pytest.mark.shows(
    "refused",
    "a locked file that has changed, a file open for writing that is another one by now",
)
def test_a_file_replaced_or_changed_behind_a_lock_is_refused(
    cycle: Any, tmp_path: Path, way: str
) -> None:
    """Another file under the name, or a change behind the back of a transaction."""
    import fcntl

    path = tmp_path / "database"
    path.write_bytes(b"before")

    def hold() -> int:
        fd = os.open(path, os.O_RDWR)
        if way == "locked":
            fcntl.lockf(fd, fcntl.LOCK_EX)
        return fd

    cycle.describe(hold)
    cycle.restore(lambda: None)
    if way == "replaced":
        path.unlink()
    path.write_bytes(b"after!")
    with pytest.raises(Incompatible, match="changed since the dump"):
        cycle.restore(lambda: None)


@pytest.mark.shows("refused", "an open file that is missing")
def test_a_missing_file_is_refused(cycle: Any, tmp_path: Path) -> None:
    """The error names the path; a standard descriptor can be re-pointed instead."""
    path = tmp_path / "gone"
    path.touch()

    def hold() -> None:
        fd = os.open(path, os.O_RDWR)
        os.dup2(fd, 1)
        os.close(fd)

    cycle.describe(hold)
    path.unlink()
    with pytest.raises(Incompatible, match=r"gone.*does not exist"):
        cycle.restore(lambda: None)
    options = RestoreOptions(stdout=str(tmp_path / "instead"))
    cycle.restore(lambda: os.write(1, b"hello"), options)
    assert (tmp_path / "instead").read_bytes() == b"hello"


def test_names_pseudo_files_and_devices(cycle: Any, tmp_path: Path) -> None:
    """O_PATH, /proc and /sys files, the process's own /proc, and the memory devices."""
    (tmp_path / "named").write_bytes(b"by name")

    def hold() -> list[int]:
        return [
            os.open(tmp_path / "named", os.O_PATH),
            os.open("/proc/meminfo", os.O_RDONLY),
            os.open("/proc/self/comm", os.O_RDWR),
            os.open("/sys/kernel/mm", os.O_RDONLY),
            *(os.open(f"/dev/{n}", os.O_RDWR) for n in ("null", "zero", "full", "urandom")),
        ]

    def prove(state: list[int]) -> Any:
        named, meminfo, comm, folder, null, zero, full, random = state
        os.write(comm, b"proven")
        try:
            os.write(full, b"x")
            overflow = False
        except OSError:
            overflow = True
        return (
            Path(f"/proc/self/fd/{named}").read_bytes(),
            os.read(meminfo, 8),
            Path("/proc/self/comm").read_text(),
            len(os.listdir(folder)) > 1,
            os.write(null, b"x"),
            os.read(zero, 2),
            overflow,
            len(os.read(random, 5)),
            os.readlink(f"/proc/self/fd/{null}"),
        )

    assert cycle(hold, prove) == (
        b"by name",
        b"MemTotal",
        "proven\n",
        True,
        1,
        b"\0\0",
        True,
        5,
        "/dev/null",
    )


@pytest.mark.shows(
    "refused",
    "userfaultfd, netlink of other protocols, namespaces, an io_uring not enabled yet",
)
def test_what_cannot_be_made_again_is_refused_by_number_and_kind(cycle: Any) -> None:
    """The refusal names descriptor, kind and a way out, and the process is as it was."""
    import ctypes
    import socket

    libc = ctypes.CDLL(None, use_errno=True)

    def ring() -> int:  # not enabled yet (IORING_SETUP_R_DISABLED)
        parameters = ctypes.create_string_buffer(struct.pack("<3I", 0, 0, 1 << 6), 120)
        return int(libc.syscall(425, 8, parameters))

    def faults() -> int:
        return int(libc.syscall(323, 0))

    def netlink() -> int:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12).detach()  # netfilter

    def namespace() -> int:
        return os.open("/proc/self/ns/net", os.O_RDONLY)

    for hold, name in (
        (ring, "io_uring"),
        (faults, "userfaultfd"),
        (netlink, "netlink raw socket"),
        (namespace, "net:"),
    ):
        with pytest.raises(Unsupported, match=name) as caught:
            cycle.describe(hold)
        assert caught.value.remedy
        assert caught.value.facts["descriptor"] == cycle.processes[-1].state


@pytest.mark.shows("refused", "a deleted file with another name, open for writing")
def test_file_of_the_deleted_with_another_name_is_refused_when_written(
    cycle: Any, tmp_path: Path
) -> None:
    """A copy would part from the file that its other name still leads to."""

    def hold() -> int:
        (tmp_path / "one").touch()
        os.link(tmp_path / "one", tmp_path / "two")
        fd = os.open(tmp_path / "one", os.O_RDWR)
        os.unlink(tmp_path / "one")
        return fd

    with pytest.raises(Unsupported, match="another"):
        cycle.describe(hold)


def test_a_path_that_is_no_text_is_found_again(cycle: Any, tmp_path: Path) -> None:
    """Names are bytes: blanks, newlines and bytes that are no UTF-8 survive."""
    path = os.fsencode(tmp_path) + b"/a b\n\xff (deleted)"

    def hold() -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT)

    found = cycle(hold, lambda number: os.readlink(os.fsencode(f"/proc/self/fd/{number}")))
    assert found == path


@pytest.mark.shows(
    "refused",
    "a message queue without a name that holds messages, or of which it waits to be notified",
)
def test_message_queue_that_would_lose_something_is_refused(cycle: Any) -> None:
    """One without a name that holds messages; one of which the process waits to be notified."""
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    attributes = struct.pack("8q", 0, 2, 16, 0, 0, 0, 0, 0)

    def hold(*, notify: bool) -> int:
        name = f"/lzy-test-{os.getpid()}".encode()
        fd = int(libc.mq_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, attributes))
        assert fd >= 0
        assert libc.mq_unlink(name) == 0
        if notify:
            assert libc.mq_notify(fd, struct.pack("qii", 0, 10, 0).ljust(64, b"\0")) == 0
        else:
            assert libc.mq_send(fd, b"text", 4, 0) == 0
        return fd

    for notify, name in ((False, "holds 1 messages"), (True, "mq_notify")):
        with pytest.raises(Unsupported, match=name) as caught:
            cycle.describe(lambda notify=notify: hold(notify=notify))
        assert caught.value.remedy


@pytest.mark.shows("refused", "a message queue that held messages and is missing")
def test_message_queue_with_messages_must_be_there(cycle: Any) -> None:
    """Messages stay in the kernel: where the queue is gone, the restore says how many were lost."""
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    name = f"/lzy-test-{os.getpid()}".encode()
    attributes = struct.pack("8q", 0, 2, 16, 0, 0, 0, 0, 0)

    def hold() -> int:
        fd = int(libc.mq_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, attributes))
        assert libc.mq_send(fd, b"text", 4, 0) == 0
        return fd

    try:
        cycle.describe(hold)
    finally:
        assert libc.mq_unlink(name) == 0
    with pytest.raises(Incompatible, match="1 messages"):
        make_descriptors(cycle.table, NoObjects(), RestoreOptions())
