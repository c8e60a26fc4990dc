"""A process that was started under another kernel's vDSO goes on with this one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from living import CommandLine, Program

from lzy.checkpoint import proc, vdso
from lzy.checkpoint.errors import Damaged, Incompatible

Start = Callable[..., Program]

PROGRAM = """
import ctypes, json, os, sys, threading, time
libc = ctypes.CDLL(None)
clocks = [time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, 5, 6, 11]
reads = 0
def spin():
    global reads
    last = 0
    while True:
        now = time.monotonic_ns()
        assert now >= last
        last = now
        reads += 1
        if reads % 64 == 0:
            time.sleep(0.001)
threading.Thread(target=spin, daemon=True).start()
child = os.fork() if "child" in sys.argv else -1
if child == 0:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.02)
    os._exit(0)
print("ready", flush=True)
for line in sys.stdin:
    before = reads
    time.sleep(0.1)
    print(json.dumps({
        "clocks": [time.clock_gettime(clock) for clock in clocks],
        "resolution": time.clock_getres(time.CLOCK_MONOTONIC),
        "time": libc.time(None), "cpu": libc.sched_getcpu(), "reads": reads - before,
        "child": child < 0 or os.waitpid(child, os.WNOHANG) == (0, 0),
    }), flush=True)
"""

#: Restores an image as if it came from a kernel whose vDSO is the text given on stdin.
RESTORE = """
import sys
from pathlib import Path
from lzy.checkpoint import vdso
from lzy.checkpoint.restore import restore
from lzy.checkpoint.store import Store
with Store.open(Path(sys.argv[1])) as store, store.load(sys.argv[2]) as image:
    image.document["host"] |= {"vdso": "another", "vdso_code": sys.stdin.read()}
    report = restore(image, eager="eager" in sys.argv)
    print(report.pid, *report.notes, sep="\\n")
"""


def own_vdso() -> bytes:
    return vdso.read_vdso(os.getpid(), proc.kernel_mappings(os.getpid()))


def useless(code: bytes) -> bytes:
    """A vDSO with the same functions at the same places, which trap instead of doing anything."""
    changed = bytearray(code)
    first = min(vdso.find_functions(code).values())
    headers = int.from_bytes(code[32:40], "little")
    for at in range(headers, headers + 56 * int.from_bytes(code[56:58], "little"), 56):
        assert at < first
    end = code.index(b".shstrtab") // 16 * 16  # names of sections, behind the text
    changed[first:end] = b"\xcc" * (end - first)
    return bytes(changed)


def prove(program: Program) -> dict[str, Any]:
    """The clocks are right: compared with ours."""
    import time

    proof: dict[str, Any] = json.loads(program.ask("prove"))
    clocks = [time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, 5, 6, 11]
    for clock, told in zip(clocks, proof["clocks"], strict=True):
        assert abs(time.clock_gettime(clock) - told) < 5, clock
    assert abs(time.time() - proof["time"]) < 5
    assert proof["resolution"] <= 0.01
    assert proof["cpu"] in range(os.cpu_count() or 1)
    assert proof["reads"] > 20
    assert proof["child"]
    return proof


def restore_from_elsewhere(
    lzy: CommandLine, program: Program, image: str, code: bytes, *words: str
) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, str(lzy.store), image, *words],
        input=vdso.pack(code),
        env={**os.environ, "LZY_HOME": str(lzy.home)},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    pid, *notes = done.stdout.splitlines()
    program.adopt(int(pid))
    return notes


@pytest.mark.parametrize("words", [[], ["child"]], ids=["alone", "tree"])
def test_functions_of_another_kernels_vdso_lead_to_this_ones(
    lzy: CommandLine, start: Start, words: list[str]
) -> None:
    """Whoever calls the old addresses is served by the new code: the old one would trap.

    What comes back is dumped and restored as any other, and bridged once more.
    """
    program = start(command=[sys.executable, "-c", PROGRAM, *words]).await_ready()
    prove(program)
    maps = proc.kernel_mappings(program.pid)
    lzy.dump(program, "image")
    notes = restore_from_elsewhere(lzy, program, "image", useless(own_vdso()), *words)
    assert any("vDSO" in note for note in notes)
    prove(program)
    now = proc.kernel_mappings(program.pid)
    assert [vma.length for vma in now] == [vma.length for vma in maps]
    assert now != maps
    lzy.dump(program, "again")
    lzy.restore(program, "again")
    prove(program)
    lzy.dump(program, "further")
    restore_from_elsewhere(lzy, program, "further", useless(own_vdso()), "eager")
    prove(program)


def test_a_thread_in_the_midst_of_the_old_code_gets_out_of_it(
    lzy: CommandLine, start: Start
) -> None:
    """The old code stays; over zeros instead of its data it asks the kernel."""
    spin = (
        "import sys, time\n"
        "print('ready', flush=True)\n"
        "last = 0\n"
        "until = time.monotonic() + 3600\n"
        "while True:\n"
        "    now = time.monotonic()\n"
        "    assert now >= last, (now, last)\n"
        "    last = now\n"
    )
    program = start(command=[sys.executable, "-c", spin]).await_ready()
    code = own_vdso()
    other = code[:-1] + bytes([code[-1] ^ 1])
    for number in range(3):
        lzy.dump(program, f"image{number}")
        restore_from_elsewhere(lzy, program, f"image{number}", other, "eager")
        assert program.is_alive
        before = Path(f"/proc/{program.pid}/stat").read_text().split()[13]
        while Path(f"/proc/{program.pid}/stat").read_text().split()[13] == before:
            assert program.is_alive, program.describe()


def test_what_has_no_counterpart_becomes_a_system_call() -> None:
    """Where functions lie elsewhere, or are missing, in the new vDSO."""
    code = own_vdso()
    theirs = vdso.find_functions(code)
    assert {"clock_gettime", "gettimeofday", "time", "getcpu"} <= set(theirs)
    pages = -(-len(code) // 4096) * 4096
    led = vdso.lead(code, pages, 0x7000_0000, code, 0x6000_0000, [-5])
    for name, place in theirs.items():
        if name in ("clock_gettime", "time", "getcpu", "gettimeofday"):
            assert led[place] == 0xE9
            stub = place + 5 + int.from_bytes(led[place + 1 : place + 5], "little", signed=True)
            assert led[stub : stub + 6] == b"\xff\x25\0\0\0\0"
            assert int.from_bytes(led[stub + 6 : stub + 14], "little") == 0x6000_0000 + place
    with pytest.raises(Incompatible, match="has just entered"):
        vdso.lead(code, pages, 0x7000_0000, code, 0x6000_0000, [theirs["time"] + 2])
    nothing = bytearray(code)
    at = code.index(b"__vdso_time\0")  # of which `time` is the end
    nothing[at : at + 11] = b"__vdso_tXme"
    led = vdso.lead(code, pages, 0x7000_0000, bytes(nothing), 0x6000_0000, [])
    place = theirs["time"]
    stub = place + 5 + int.from_bytes(led[place + 1 : place + 5], "little", signed=True)
    assert led[stub : stub + 8] == b"\xb8\xc9\0\0\0\x0f\x05\xc3"  # mov eax, 201; syscall; ret


def test_a_vdso_that_is_none_is_refused() -> None:
    """Whatever an image says its vDSO is."""
    for text in ("", "!", "AAAA", vdso.pack(b"")[:-4]):
        with pytest.raises((Damaged, Incompatible)):
            vdso.lead(vdso.unpack(text), 8192, 0, own_vdso(), 1 << 32, [])
    for length in (0, 10, 64, 100, 1000):
        with pytest.raises(Incompatible):
            vdso.lead(own_vdso()[:length], 8192, 0, own_vdso(), 1 << 32, [])
