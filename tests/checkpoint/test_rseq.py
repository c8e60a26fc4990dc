"""Nobody is left in the middle of a restartable sequence that the kernel has forgotten."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import living

from lzy.checkpoint import interrogate, machine
from lzy.checkpoint.linux import ptrace
from lzy.checkpoint.rseq import leave_sequence
from lzy.checkpoint.tracee import stopped

# A loop inside a restartable sequence: it is left by its flag or, on preemption, by its abort
# handler, which begins it again.
#     entry: mov [rdi],rsi              rdi: &rseq.rseq_cs, rsi: struct rseq_cs, rdx: flag
#     start: cmp dword ptr [rdx],0; je start
#     end:   ret
#            signature; abort: jmp entry
RSEQ_LOOP = """
import struct
code = bytes.fromhex("488937833a0074fbc3") + struct.pack("<I", 0x53053053) + bytes.fromhex("ebf1")
page = allocate(4096, 7)
ctypes.memmove(page, code, len(code))
sections = allocate(4096); flag = sections + 256
ctypes.memmove(sections, struct.pack("<IIQQQ", 0, 0, page + 3, 5, page + 13), 32)
offset = ctypes.c_long.in_dll(libc, "__rseq_offset").value
libc.pthread_self.restype = ctypes.c_void_p
loop = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(page)
def run():
    area = libc.pthread_self() + offset
    say("ready"); say(page)
    loop(area + 8, sections, flag)
    say("left")
thread = threading.Thread(target=run); thread.start()
hear()
ctypes.memset(flag, 1, 1)
thread.join(); hear()
"""


def test_restartable_sequence_in_flight_is_aborted() -> None:
    """A thread inside a restartable sequence is described, and goes on, at its abort handler.

    Anywhere else its sequence would go on over what others have changed meanwhile; the kernel
    forgets it as soon as our code runs.
    """
    with living(RSEQ_LOOP) as subject:
        page = int(subject.hear())
        places = set()
        for _ in range(20):
            with stopped(subject.pid) as tracee:
                tracee.prepare()
                (tid,) = [t for t in tracee.threads if t != subject.pid]
                rip = tracee.threads[tid].registers["rip"]
                described = interrogate.describe_threads(tracee)
                (mine,) = [t for t in described if t["tid"] == tid]
                if page + 3 <= rip < page + 8:
                    assert mine["registers"]["rip"] == page + 13
                    content = ptrace.read_register_set(tid, ptrace.NT_PRSTATUS)
                    assert machine.unpack_registers(content)["rip"] == page + 13
                    places.add("inside")
                else:
                    assert mine["registers"]["rip"] == rip
                    places.add("outside")
        assert "inside" in places
        assert subject.ask("leave") == "left"


def test_restartable_sequence_against_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside → abort; before, behind, or with no sequence at all → untouched."""
    code = "p = allocate(4096); say('ready'); say(p); hear()"
    with living(code) as subject:
        area = int(subject.hear())
        section = area + 64
        monkeypatch.setattr(ptrace, "rseq_configuration", lambda tid: (area, 32, 0x53053053))
        with open(f"/proc/{subject.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(section)
            memory.write(struct.pack("<IIQQQ", 0, 0, 0x5000, 0x20, 0x9000))
            registers = dict.fromkeys(machine.REGISTER_NAMES, 0)

            def after(rip: int) -> int:
                return leave_sequence(subject.pid, subject.pid, {**registers, "rip": rip})["rip"]

            assert after(0x5010) == 0x5010
            memory.seek(area + 8)
            memory.write(struct.pack("<Q", section))
            assert [after(a) for a in (0x4FFF, 0x5000, 0x501F, 0x5020)] == [
                0x4FFF, 0x9000, 0x9000, 0x5020,
            ]  # fmt: skip
