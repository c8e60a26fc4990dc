"""A process with resources, described from outside, ended, and made again: without the engine."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lzy.checkpoint.resources import (
    RestoreOptions,
    close_descriptors,
    describe_descriptors,
    finish_descriptors,
    free_number,
    hold_connections,
    make_descriptors,
    place_descriptors,
    posix_locks,
    release_descriptors,
)


class MemoryObjects:
    """Objects kept in memory and made again as memfds: what the engine's store does."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self.made: dict[int, int] = {}

    def add_file(self, fd: int, *, key: tuple[int, int]) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.contents)
            self.contents.append(os.pread(fd, os.fstat(fd).st_size, 0))
        return self.numbers[key]

    def open(self, number: int) -> int:
        if number not in self.made:
            fd = os.memfd_create(f"object-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.write(fd, self.contents[number])
            self.made[number] = fd
        return os.open(f"/proc/self/fd/{self.made[number]}", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        for fd in self.made.values():
            os.close(fd)


class Process:
    """A child that holds what `hold` opened and then sleeps, for as long as the test needs it."""

    def __init__(self, hold: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            gc.freeze()  # garbage of the tests before would close numbers that are ours by then
            _become_plain(writer)
            _answer(writer, hold)
            os.close(writer)
            while True:
                signal.pause()
        os.close(writer)
        self.pidfd = os.pidfd_open(self.pid)
        try:
            self.state = _result(reader)
        except BaseException:
            self.end()
            raise

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.pidfd)
            self.pid = 0


class Cycle:
    """Steps from a process that holds something to a new one that proves it has it again."""

    def __init__(self) -> None:
        self.objects = MemoryObjects()
        self.processes: list[Process] = []
        self.table: dict[str, Any] = {}

    def describe(self, hold: Callable[[], Any], *, end: bool = True) -> Any:
        """Run `hold` in a child, freeze and describe it (`self.table`), end it; its answer."""
        process = Process(hold)
        self.processes.append(process)
        process.freeze()
        table = describe_descriptors(process.pid, process.pidfd, self.objects)
        self.table = json.loads(json.dumps(table))
        if end:
            held = hold_connections(process.pidfd, self.table)
            process.end()
            release_descriptors(held)
        return process.state

    def restore(self, prove: Callable[[], Any], options: RestoreOptions | None = None) -> Any:
        """Make the table again in a new child that runs `prove`; its answer."""
        local = make_descriptors(self.table, self.objects, options or RestoreOptions())
        floor = free_number(self.table) + 500
        result, answer = (_lifted(fd, floor) for fd in os.pipe())
        go, let_go = (_lifted(fd, floor) for fd in os.pipe())
        pid = os.fork()
        if pid == 0:
            gc.freeze()
            _answer(answer, lambda: self._become(local, [answer, go], prove, go))
            os._exit(0)
        try:
            os.close(answer)
            os.close(go)
            finish_descriptors(self.table, local, pids={self.table["pid"]: pid})
            os.write(let_go, b"1")
            return _result(result)
        finally:
            os.close(let_go)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            close_descriptors(local)

    def _become(
        self, local: dict[int, int], keep: list[int], prove: Callable[[], Any], go: int
    ) -> Any:
        import fcntl

        place_descriptors(self.table, local, keep)
        for number, place in self.table["descriptors"].items():
            os.set_inheritable(int(number), not place["close_on_exec"])
        for number, command, lock in posix_locks(self.table):
            fcntl.fcntl(number, command, lock)
        if os.read(go, 1) != b"1":
            raise RuntimeError("the restorer gave up")
        return prove()

    def __call__(
        self,
        hold: Callable[[], Any],
        prove: Callable[[Any], Any],
        options: RestoreOptions | None = None,
    ) -> Any:
        state = self.describe(hold)
        return self.restore(lambda: prove(state), options)

    def close(self) -> None:
        for process in self.processes:
            process.end()
        self.objects.close()


@pytest.fixture
def cycle() -> Iterator[Cycle]:
    cycle = Cycle()
    try:
        yield cycle
    finally:
        cycle.close()


def _lifted(fd: int, floor: int) -> int:
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)
    finally:
        os.close(fd)


def _become_plain(keep: int) -> None:
    """Nothing open but /dev/null thrice and `keep`."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            try:
                os.close(int(name))
            except OSError:
                continue


def _answer(writer: int, work: Callable[[], Any]) -> None:
    try:
        reply = (True, work())
    except BaseException:
        reply = (False, traceback.format_exc())
    data = pickle.dumps(reply)
    os.write(writer, len(data).to_bytes(8, "little"))
    while data:
        data = data[os.write(writer, data) :]


def _result(reader: int) -> Any:
    with os.fdopen(reader, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert length, "the child ended without an answer"
        good, value = pickle.loads(file.read(length))
        assert not file.read(), "the child closes its end when it is done"
    if not good:
        raise AssertionError(f"in the child:\n{value}")
    return value
