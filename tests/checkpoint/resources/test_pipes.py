"""Pipes and named pipes, with the bytes in flight and with one end elsewhere."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from lzy.checkpoint.resources import RestoreOptions, describe_descriptors


def test_pipe_keeps_its_bytes_its_capacity_and_its_flags(cycle: Any) -> None:
    """Bytes in flight arrive after the cycle; what is written then comes behind them."""

    def hold() -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 18)
        os.write(writer, bytes(range(256)) * 800)
        os.set_inheritable(writer, True)
        return reader, writer

    def prove(state: tuple[int, int]) -> Any:
        reader, writer = state
        os.write(writer, b"after")
        return (
            os.read(reader, 1 << 20),
            fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ),
            os.get_inheritable(reader),
            os.get_inheritable(writer),
            fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_NONBLOCK,
        )

    data, capacity, reader_inherited, writer_inherited, nonblocking = cycle(hold, prove)
    assert data == bytes(range(256)) * 800 + b"after"
    assert capacity == 1 << 18
    assert (reader_inherited, writer_inherited) == (False, True)
    assert nonblocking


@pytest.mark.shows("survives", "packets in a pipe (O_DIRECT)")
def test_packets_keep_their_boundaries(cycle: Any) -> None:
    """A pipe in packet mode (O_DIRECT) gives the packets one by one."""

    def hold() -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
        for packet in (b"one", b"two", b"three"):
            os.write(writer, packet)
        return reader, writer

    def prove(state: tuple[int, int]) -> list[bytes]:
        os.write(state[1], b"four")
        return [os.read(state[0], 100) for _ in range(4)]

    assert cycle(hold, prove) == [b"one", b"two", b"three", b"four"]


@pytest.mark.shows("cut", "a pipe whose writer is outside: its bytes, then end of file")
def test_a_reader_whose_writer_is_gone_gets_the_bytes_then_end_of_file(cycle: Any) -> None:
    """Without its other end a reader is not left to wait for ever."""

    def hold() -> int:
        reader, writer = os.pipe()
        os.write(writer, b"last words")
        os.close(writer)
        return reader

    def prove(reader: int) -> list[bytes]:
        return [os.read(reader, 100), os.read(reader, 100)]

    assert cycle(hold, prove) == [b"last words", b""]


@pytest.mark.shows("cut", "a pipe whose reader is outside: EPIPE")
def test_a_writer_whose_reader_is_gone_gets_epipe(cycle: Any) -> None:
    """A pipe to somebody outside is broken after the cycle."""
    reader, writer = os.pipe()

    def hold() -> int:
        return 7

    try:
        # The reader is outside: only the writer is put into the child.
        def hold_writer() -> int:
            return os.open(f"/proc/{os.getppid()}/fd/{writer}", os.O_WRONLY)

        def prove(number: int) -> str:
            try:
                os.write(number, b"x")
            except BrokenPipeError:
                return "broken"
            return "written"

        assert cycle(hold_writer, prove) == "broken"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.shows(
    "changed",
    "standard output into a pipe of somebody outside: /dev/null, or the file of `--stdout`",
)
def test_standard_output_to_somebody_gone_becomes_dev_null_or_a_file(
    cycle: Any, tmp_path: Path
) -> None:
    """Writing to a standard pipe whose reader is outside works; --stdout re-points it."""
    reader, writer = os.pipe()

    def hold() -> None:
        outside = os.open(f"/proc/{os.getppid()}/fd/{writer}", os.O_WRONLY)
        os.dup2(outside, 1)
        os.dup2(outside, 2)
        os.close(outside)

    def prove(_: None) -> str:
        os.write(1, b"out ")
        os.write(2, b"err")
        return os.readlink("/proc/self/fd/1")

    try:
        assert cycle(hold, prove) == "/dev/null"
        log = tmp_path / "log"
        options = RestoreOptions(stdout=str(log), stderr=str(log))
        assert cycle.restore(lambda: prove(None), options) == str(log)
        assert log.read_bytes() == b"out err"
        assert (
            cycle.restore(lambda: os.readlink("/proc/self/fd/2"), RestoreOptions(stdout=str(log)))
            == "/dev/null"
        )
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.shows("survives", "bytes in a named pipe")
def test_named_pipe_keeps_its_bytes(cycle: Any, tmp_path: Path) -> None:
    """A named pipe is opened again by its path, with what was in it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def hold() -> tuple[int, int]:
        both = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        writer = os.open(path, os.O_WRONLY)
        os.write(writer, b"queued")
        return both, writer

    def prove(state: tuple[int, int]) -> tuple[bytes, str]:
        os.write(state[1], b" and new")
        return os.read(state[0], 100), os.readlink(f"/proc/self/fd/{state[1]}")

    assert cycle(hold, prove) == (b"queued and new", str(path))


def test_describing_a_pipe_consumes_nothing(cycle: Any) -> None:
    """Twice described, the pipe's bytes are still the same."""

    def hold() -> tuple[int, int]:
        reader, writer = os.pipe()
        os.write(writer, b"stay")
        return reader, writer

    cycle.describe(hold, end=False)
    process = cycle.processes[0]
    assert describe_descriptors(process.pid, process.pidfd, cycle.objects) == cycle.table
    assert any(entry.get("content") for entry in cycle.table["descriptions"])


def test_a_missing_replacement_is_an_error_that_names_it(cycle: Any, tmp_path: Path) -> None:
    """--stdin with a file that is not there is refused, and nothing stays open."""
    from lzy.checkpoint.errors import NotFound

    cycle.describe(lambda: None)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotFound, match="absent"):
        cycle.restore(lambda: None, RestoreOptions(stdin=str(tmp_path / "absent")))
    assert len(os.listdir("/proc/self/fd")) == len(before)
