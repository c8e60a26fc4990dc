"""Descriptors of other kinds: pipes, eventfd, epoll, timerfd, signalfd, inotify, ptys, files, dups.

Argument: an empty folder.
"""

import ctypes
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
from pathlib import Path

from clib import Itimerspec, Timespec, call
from dialogue import PATIENCE_S, Proof, converse

folder = Path(sys.argv[1])


def readable(*descriptors: int) -> list[int]:
    return select.select(descriptors, [], [], PATIENCE_S)[0]


def main() -> None:
    text = folder / "text"
    text.write_bytes(b"0123456789" * 100)
    plain = os.open(text, os.O_RDWR)
    twin = os.dup(plain)
    os.lseek(plain, 123, os.SEEK_SET)
    append = os.open(text, os.O_WRONLY | os.O_APPEND | os.O_NOATIME)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    path_only = os.open(text, os.O_PATH)
    inheritable = os.open("/dev/null", os.O_RDWR)
    os.set_inheritable(inheritable, True)
    high = fcntl.fcntl(plain, fcntl.F_DUPFD_CLOEXEC, 777)
    devices = {name: os.open(f"/dev/{name}", os.O_RDWR) for name in ("zero", "full", "urandom")}

    pipe_read, pipe_write = os.pipe()
    fcntl.fcntl(pipe_write, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(pipe_write, b"in flight " * 20_000)
    packet_read, packet_write = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
    os.write(packet_write, b"packet one")
    os.write(packet_write, b"two")
    broken_read, broken_write = os.pipe()
    os.write(broken_write, b"widow")
    os.close(broken_write)
    fifo_path = folder / "fifo"
    os.mkfifo(fifo_path)
    fifo = os.open(fifo_path, os.O_RDWR)
    os.write(fifo, b"named")

    counter = os.eventfd(41, os.EFD_NONBLOCK)
    semaphore = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)

    event_pipe_read, event_pipe_write = os.pipe()
    epoll = select.epoll()
    epoll.register(counter, select.EPOLLIN)
    epoll.register(event_pipe_read, select.EPOLLIN | select.EPOLLET)
    moved = os.dup(event_pipe_read)
    epoll.register(moved, select.EPOLLIN | select.EPOLLONESHOT)
    nested = select.epoll()
    nested.register(epoll.fileno(), select.EPOLLIN)

    ticking = call("timerfd_create", 1, os.O_NONBLOCK)
    every = Itimerspec(Timespec(0, 20_000_000), Timespec(0, 20_000_000))
    call("timerfd_settime", ticking, 0, ctypes.byref(every), None)
    distant = call("timerfd_create", 1, 0)
    call("timerfd_settime", distant, 0, ctypes.byref(Itimerspec(Timespec(), Timespec(3600))), None)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 3])
    mask = ctypes.create_string_buffer(struct.pack("<16Q", 1 << (signal.SIGRTMIN + 2), *[0] * 15))
    signals = call("signalfd", -1, mask, os.O_NONBLOCK)
    os.kill(os.getpid(), signal.SIGRTMIN + 3)

    watch = call("inotify_init1", os.O_NONBLOCK)
    call("inotify_add_watch", watch, bytes(text), 0x2)  # IN_MODIFY, taken away again: 1 is unused
    call("inotify_rm_watch", watch, 1)
    os.read(watch, 4096)
    watched = call("inotify_add_watch", watch, bytes(folder), 0x100)  # IN_CREATE

    master, slave = pty.openpty()
    modes = termios.tcgetattr(slave)
    modes[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 33, 99, 0, 0))

    once_done = False
    created = 0

    def prove_once() -> Proof:
        proof: Proof = {}
        proof["shared position"] = os.lseek(twin, 0, os.SEEK_CUR) == 123 == os.lseek(high, 0, 1)
        proof["pipe"] = os.read(pipe_read, 1 << 20) == b"in flight " * 20_000
        proof["packets"] = [os.read(packet_read, 99) for _ in range(2)] == [b"packet one", b"two"]
        proof["widowed pipe"] = (os.read(broken_read, 99), os.read(broken_read, 9)) == (
            b"widow",
            b"",
        )
        proof["fifo bytes"] = os.read(fifo, 99) == b"named"
        proof["eventfd"] = os.eventfd_read(counter) == 41
        proof["semaphore"] = [os.eventfd_read(semaphore) for _ in range(3)] == [1, 1, 1]
        readable(signals)
        information = os.read(signals, 128)
        proof["signalfd"] = struct.unpack_from("I", information)[0] == signal.SIGRTMIN + 3
        return proof

    def prove() -> Proof:
        nonlocal once_done, created
        proof: Proof = {} if once_done else prove_once()
        once_done = True
        os.lseek(plain, 500, os.SEEK_SET)
        proof["one description"] = os.lseek(twin, 0, 1) == os.lseek(high, 0, 1) == 500
        os.lseek(plain, 123, os.SEEK_SET)
        proof["closed on exec"] = [os.get_inheritable(fd) for fd in (plain, inheritable, high)] == [
            False, True, False,
        ]  # fmt: skip
        size = os.fstat(append).st_size
        os.write(append, b"appended")
        proof["append"] = os.fstat(append).st_size == size + 8 and bool(
            fcntl.fcntl(append, fcntl.F_GETFL) & os.O_NOATIME
        )
        proof["directory"] = "text" in os.listdir(directory)
        proof["path only"] = os.fstat(path_only).st_ino == os.stat(text).st_ino
        proof["devices"] = (
            os.read(devices["zero"], 3) == bytes(3) and len(os.read(devices["urandom"], 9)) == 9
        )
        proof["pipe size"] = fcntl.fcntl(pipe_read, fcntl.F_GETPIPE_SZ) == 1 << 20
        os.write(pipe_write, b"on")
        proof["pipe works"] = os.read(pipe_read, 9) == b"on"
        os.write(packet_write, b"a")
        os.write(packet_write, b"b")
        proof["packet mode"] = os.read(packet_read, 9) + os.read(packet_read, 9) == b"ab" and (
            fcntl.fcntl(packet_read, fcntl.F_GETFL) & os.O_NONBLOCK > 0
        )
        os.write(os.open(fifo_path, os.O_RDWR), b"by name")
        proof["fifo"] = os.read(fifo, 99) == b"by name"

        proof["epoll is quiet"] = nested.poll(0) == []
        os.eventfd_write(counter, 5)
        proof["epoll"] = epoll.poll(PATIENCE_S) == [(counter, select.EPOLLIN)]
        proof["nested epoll"] = nested.poll(PATIENCE_S) == [(epoll.fileno(), select.EPOLLIN)]
        os.eventfd_read(counter)
        os.write(event_pipe_write, b"e")
        proof["epoll, dup'ed"] = sorted(epoll.poll(PATIENCE_S)) == sorted(
            [(event_pipe_read, select.EPOLLIN), (moved, select.EPOLLIN)]
        )
        proof["edge, one shot"] = epoll.poll(0) == []
        os.read(event_pipe_read, 9)
        epoll.modify(moved, select.EPOLLIN | select.EPOLLONESHOT)

        readable(ticking)
        proof["timerfd"] = struct.unpack("Q", os.read(ticking, 8))[0] >= 1
        left = Itimerspec()
        call("timerfd_gettime", distant, ctypes.byref(left))
        proof["distant timerfd"] = 3300 < left.value.total_s < 3600
        os.kill(os.getpid(), signal.SIGRTMIN + 3)
        readable(signals)
        proof["signalfd works"] = len(os.read(signals, 128)) == 128

        created += 1
        (folder / f"created{created}").touch()
        readable(watch)
        number, event, _, length = struct.unpack_from("iIII", data := os.read(watch, 4096))
        name = data[16 : 16 + length].rstrip(b"\0")
        proof["inotify"] = (number, event, name) == (watched, 0x100, b"created%d" % created)

        os.write(slave, b"out")
        os.write(master, b"in")
        proof["pty"] = (os.read(master, 9), os.read(slave, 9)) == (b"out", b"in")
        proof["pty modes"] = termios.tcgetattr(slave)[3] == modes[3]
        window = fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8))
        proof["pty size"] = struct.unpack("4H", window)[:2] == (33, 99)
        proof["pty is a terminal"] = os.isatty(slave) and os.isatty(master)
        return proof

    converse(prove, lambda: os.lseek(plain, 7, os.SEEK_SET) and os.read(pipe_read, 1))


main()
