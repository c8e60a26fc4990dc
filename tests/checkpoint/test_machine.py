"""The machine code runs in real processes: tables of calls, one call, registers put back, ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from subjects import in_child, living

from lzy.checkpoint import machine
from lzy.checkpoint.errors import KernelError
from lzy.checkpoint.linux import process
from lzy.checkpoint.machine import Call
from lzy.checkpoint.tracee import stopped

SYS_GETPID, SYS_GETPPID, SYS_CLOSE, SYS_GETCWD, SYS_EXIT_GROUP = 39, 110, 3, 79, 231
EBADF = 9
U64 = (1 << 64) - 1

WAITING = "say('ready'); say(hear()); hear()"


def test_table_runs_in_order_and_brings_results_and_data() -> None:
    """Every record's result stands beside it, and what a call wrote is read back."""
    with living(WAITING) as subject:
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            batch = tracee.batch()
            text = batch.room(4096)
            numbers = [
                batch.call(SYS_GETPID),
                batch.call(SYS_GETCWD, text, 4096),
                batch.call(SYS_GETPPID),
            ]
            tracee.run(tracee.threads[subject.pid], batch)
            results = [batch.results[n] for n in numbers]
            directory = batch.read(text, results[1]).rstrip(b"\0")
        assert results[0] == subject.pid
        assert results[2] == os.getpid()
        assert directory == os.getcwdb()
        assert subject.ask("on") == "on"


def test_first_error_ends_the_table_and_tolerated_ones_do_not() -> None:
    """After an error that is not tolerated nothing more is done, and it is named."""
    with living("r, w = os.pipe(); say('ready'); say(r, w); say(hear()); hear()") as subject:
        first, second = map(int, subject.hear().split())
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            leader = tracee.threads[subject.pid]
            batch = tracee.batch()
            failed = batch.call(SYS_CLOSE, 999, tolerate=True)
            closed = batch.call(SYS_CLOSE, first)
            tracee.run(leader, batch)
            assert batch.results[failed] == -EBADF
            assert batch.results[closed] == 0

            batch = tracee.batch()
            batch.call(SYS_CLOSE, 999, what="close what is not there")
            batch.call(SYS_CLOSE, second)
            with pytest.raises(KernelError, match="close what is not there") as caught:
                tracee.run(leader, batch)
            assert caught.value.errno == EBADF
        held = os.listdir(f"/proc/{subject.pid}/fd")
        assert str(first) not in held
        assert str(second) in held
        assert subject.ask("on") == "on"


def test_largest_error_and_smallest_result() -> None:
    """-4095 is an error, -4096 is none: an address near the top is a result like any other."""
    batch_calls = Call(SYS_GETPID)
    assert len(machine.pack_call(batch_calls.number, (), False)) == machine.RECORD_BYTES
    assert machine.signed(U64 - 4094) == -4095
    assert machine.signed(5) == 5
    record = struct.unpack("<8Q", machine.pack_call(9, (0, -1), True))
    assert record == (9 | machine.TOLERATE, 0, U64, 0, 0, 0, 0, 0)


def test_ten_thousand_calls_in_one_go() -> None:
    """A table as large as the arena runs through in one continue; one too large is refused."""
    with living(WAITING) as subject:
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            batch = tracee.batch()
            count = 0
            while not batch.full:
                batch.call(SYS_GETPID)
                count += 1
            tracee.run(tracee.threads[subject.pid], batch)
            assert count > 10_000
            assert set(batch.results) == {subject.pid}
            assert len(batch.results) == count
            for _ in range(200):
                batch.call(SYS_GETPID)
            with pytest.raises(ValueError, match="do not fit"):
                tracee.run(tracee.threads[subject.pid], batch)
        assert subject.ask("on") == "on"


# -- registers -----------------------------------------------------------------------------------

values = st.integers(0, U64)
some_registers = st.fixed_dictionaries(dict.fromkeys(machine.REGISTER_NAMES, values))


@settings(max_examples=30, deadline=None)
@given(some_registers)
def test_registers_survive_packing(registers: dict[str, int]) -> None:
    """What NT_PRSTATUS holds is the same after unpacking and packing."""
    assert machine.unpack_registers(machine.pack_registers(registers)) == registers


@settings(max_examples=30, deadline=None)
@given(some_registers, values, st.integers(1, 1 << 22))
def test_context_lies_as_the_code_reads_it(registers: dict[str, int], mask: int, tid: int) -> None:
    """Offsets of the context block are those in the code's comments."""
    context = machine.pack_context(registers, mask, 7, tid, signal.SIGURG)
    assert len(context) == machine.CONTEXT_BYTES
    assert struct.unpack_from("<Q", context, 112)[0] == registers["rdi"]
    found = struct.unpack_from("<QQQIII", context, 120)
    assert found == (registers["rip"], registers["eflags"], mask, 7, tid, signal.SIGURG)


def interrupted(result: int, number: int = 7) -> dict[str, int]:
    """Registers of a thread stopped inside system call `number` with that result."""
    registers = dict.fromkeys(machine.REGISTER_NAMES, 0)
    return registers | {"rax": result & U64, "orig_rax": number, "rip": 0x1002, "rdi": 5}


@pytest.mark.parametrize("code", [-512, -513, -514])
def test_rewinding_begins_the_call_again(code: int) -> None:
    """-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND: the same call with the same arguments."""
    after = machine.rewind(interrupted(code))
    assert (after["rax"], after["rip"], after["orig_rax"]) == (7, 0x1000, U64)
    assert after["rdi"] == 5
    assert machine.restartable(interrupted(code), keep_block=False) == interrupted(code)


def test_rewinding_a_restart_block() -> None:
    """-ERESTART_RESTARTBLOCK: restart_syscall(2), or the call itself where the block is lost."""
    after = machine.rewind(interrupted(-516))
    assert (after["rax"], after["rip"]) == (process.SYS_RESTART_SYSCALL, 0x1000)
    assert machine.restartable(interrupted(-516), keep_block=True) == interrupted(-516)
    anew = machine.restartable(interrupted(-516), keep_block=False)
    assert machine.signed(anew["rax"]) == -514
    assert anew["orig_rax"] == 7


@pytest.mark.parametrize("number", [232, 281, 441, 128])
def test_plain_eintr_of_a_stop_is_begun_again(number: int) -> None:
    """The epoll family and sigtimedwait answer EINTR to a mere stop, unseen by the program."""
    after = machine.rewind(interrupted(-4, number))
    assert (after["rax"], after["rip"]) == (number, 0x1000)


@pytest.mark.parametrize("number", [3, 42, 35])
def test_eintr_of_other_calls_is_an_answer(number: int) -> None:
    """close(2), connect(2), nanosleep(2): what they answered stays answered."""
    registers = interrupted(-4, number)
    assert machine.restartable(registers, keep_block=False) == registers
    after = machine.rewind(registers)
    assert (machine.signed(after["rax"]), after["rip"]) == (-4, 0x1002)


@pytest.mark.parametrize("result", [0, 17, -11, -512])
def test_outside_system_calls_nothing_is_rewound(result: int) -> None:
    """orig_rax of -1 means user code: its rax is its own, whatever it looks like."""
    registers = interrupted(result) | {"orig_rax": U64}
    assert machine.rewind(registers) == registers
    assert machine.restartable(registers, keep_block=False) == registers


# -- programs of a few bytes ---------------------------------------------------------------------


def execute(code: bytes, address: int = 0x400000) -> None:
    """Become a tiny executable."""
    executable = os.memfd_create("tiny", os.MFD_CLOEXEC)
    os.write(executable, machine.tiny_executable(code, address))
    os.execve(executable, ["tiny"], {})


EXIT_42 = bytes.fromhex("b8e7000000bf2a0000000f05")  # mov eax,231; mov edi,42; syscall


@pytest.mark.parametrize("address", [0x400000, 0x1000000000, 0x7EFF00000000])
def test_tiny_executable_executes(address: int) -> None:
    """A page of code at a chosen address is a program that Linux executes."""
    assert os.waitstatus_to_exitcode(in_child(lambda: execute(EXIT_42, address))) == 42


def end_with_status(status: int) -> None:
    os._exit(status)


def end_with_signal(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("end", "argument", "expected"),
    [
        (end_with_status, 0, 0),
        (end_with_status, 1, 1),
        (end_with_status, 255, 255),
        (end_with_signal, signal.SIGKILL, 128 + 9),
        (end_with_signal, signal.SIGTERM, 128 + 15),
    ],
)
def test_reaper_ends_as_its_child_ended(end: object, argument: int, expected: int) -> None:
    """The init of a namespace passes on exit status and signal, as shells number them."""

    def become_reaper() -> None:
        if os.fork() == 0:
            end(argument)  # type: ignore[operator]  # one with an argument
            os._exit(99)
        execute(machine.REAPER)

    assert os.waitstatus_to_exitcode(in_child(become_reaper)) == expected


def test_reaper_ends_as_the_last_of_several() -> None:
    """Several children: the status of the one that ended last."""

    def become_reaper() -> None:
        early = os.fork()
        if early == 0:
            os._exit(3)
        if os.fork() == 0:
            while os.path.exists(f"/proc/{early}"):  # until the reaper has waited for it
                time.sleep(0.001)
            os._exit(7)
        execute(machine.REAPER)

    assert os.waitstatus_to_exitcode(in_child(become_reaper)) == 7


def test_reaper_lives_through_signals() -> None:
    """A stop and a continue, which interrupt its wait, do not end it."""
    reader, writer = os.pipe()

    def become_reaper() -> None:
        os.close(writer)
        if os.fork() == 0:
            os.read(reader, 1)
            os._exit(5)
        os.close(reader)
        execute(machine.REAPER)

    pid = os.fork()
    if pid == 0:
        become_reaper()
    try:
        os.close(reader)
        for _ in range(3):
            os.kill(pid, signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
            os.kill(pid, signal.SIGCONT)
            assert os.WIFCONTINUED(os.waitpid(pid, os.WCONTINUED)[1])
    finally:
        os.close(writer)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


# -- the committed bytes -------------------------------------------------------------------------


def assembly() -> str:
    """The source in the module's docstring as a file for GNU as."""
    assert machine.__doc__
    source = machine.__doc__.partition("# rbp: context block")[2]
    lines = []
    for line in source.splitlines()[2:]:
        if line.strip() and not line.startswith("    "):
            break
        for statement in line.partition("#")[0].split(";"):
            lines.append(statement.strip())
    text = "\n".join(lines)
    middle = [f"mov {name},[rbp+{8 * i}]" for i, name in enumerate(machine.REGISTER_NAMES[:15])
              if name not in ("r15", "rbp", "rdi")]  # fmt: skip
    assert text.count("…") == 1
    return ".intel_syntax noprefix\n" + text.replace("…", "\n".join(middle)) + "\n"


@pytest.mark.skipif(not shutil.which("as"), reason="GNU as (binutils) is not installed")
def test_code_is_what_its_source_says(tmp_path: Path) -> None:
    """Assembling the docstring's source gives the committed bytes, and the entries' offsets."""
    (tmp_path / "stub.s").write_text(assembly())
    stub = tmp_path / "stub.o"
    subprocess.run(["as", "--64", "-o", stub, tmp_path / "stub.s"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", stub, tmp_path / "stub"], check=True)
    assert (tmp_path / "stub").read_bytes().hex() == machine.CODE.hex()
    names = subprocess.run(["nm", stub], check=True, capture_output=True, text=True).stdout
    offsets = {name: int(at, 16) for at, name in re.findall(r"^([0-9a-f]+) t (\w+)$", names, re.M)}
    assert {n: offsets[n] for n in ("run", "one", "split", "notify")} == {
        "run": machine.RUN, "one": machine.ONE, "split": machine.SPLIT, "notify": machine.NOTIFY,
    }  # fmt: skip


def test_xstate_features() -> None:
    """XSTATE_BV and XCR0 are read where Intel puts them; a short area has x87 and SSE only."""
    area = bytearray(1024)
    struct.pack_into("<Q", area, 512, 0b111)
    struct.pack_into("<Q", area, 464, 0xE7)
    assert machine.required_features(bytes(area)) == 7
    assert machine.enabled_features(bytes(area)) == 0xE7
    assert machine.required_features(bytes(512)) == 3
