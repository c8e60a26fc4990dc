"""`lzy dump --dry-run`: all that a dump would refuse, cut or change, and its size, at once."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from living import CommandLine, Program

Start = Callable[..., Program]

HOLDER = """
import ctypes, os, random, socket, subprocess, sys, tempfile
port, place = int(sys.argv[1]), sys.argv[2]
held = [socket.create_connection(("127.0.0.1", port))]
inner = socket.create_server(("127.0.0.1", 0))
held += [socket.create_connection(inner.getsockname()), inner.accept()[0]]  # both ends inside
held.append(open(place, "w"))
held.append(tempfile.TemporaryFile())
if "unfit" in sys.argv:
    held.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12))  # netfilter
    held.append(os.memfd_create("locked"))
    libc = ctypes.CDLL(None, use_errno=True)
    held.append(libc.syscall(298, ctypes.create_string_buffer(
        b"\\1\\0\\0\\0\\x80\\0\\0\\0" + bytes(120), 128), 0, -1, -1, 0))  # perf_event_open(2)
    assert held[-1] >= 0
noise = random.Random(1).randbytes(4 << 20)
zeros = bytearray(8 << 20)
for page in range(0, len(zeros), 4096):
    zeros[page] = 0
print("ready", flush=True)
for line in sys.stdin:
    print(line.strip(), flush=True)
"""


@pytest.fixture
def held(start: Start, tmp_path: Path) -> Callable[..., Program]:
    def start_holder(port: int, *words: str) -> Program:
        command = [sys.executable, "-c", HOLDER, str(port), str(tmp_path / "notes"), *words]
        return start(command=command).await_ready()

    return start_holder


def look(lzy: CommandLine, program: Program) -> tuple[dict[str, Any], int]:
    done = lzy.run("dump", "--dry-run", str(program.pid), "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    known = re.findall(r"`([a-z_]+)`", (Path(__file__).parents[1] / "docs/cli.md").read_text())
    assert set(document) <= set(known)
    assert all(set(one) <= set(known) for one in document["findings"] + document["processes"])
    return document, done.returncode


def test_what_will_be_cut_is_told_and_nothing_is_done(
    lzy: CommandLine, held: Callable[..., Program], tmp_path: Path
) -> None:
    """Connections to the outside, deleted files, files that are needed; not what lives on."""
    with socket.create_server(("127.0.0.1", 0)) as outside:
        port = outside.getsockname()[1]
        program = held(port)
        maps = Path(f"/proc/{program.pid}/maps").read_text()
        told, status = look(lzy, program)
        assert status == 0
        assert told["possible"]
        cut = [one for one in told["findings"] if one["outcome"] == "cut"]
        assert len(cut) == 1, cut
        assert f"127.0.0.1:{port}" in cut[0]["words"]
        link = os.readlink(f"/proc/{program.pid}/fd/{cut[0]['descriptors'][0]}")
        assert link.startswith("socket:")
        changed = [one["words"] for one in told["findings"] if one["outcome"] == "changed"]
        assert len(changed) == 1
        assert "was deleted" in changed[0]
        assert str(tmp_path / "notes") in told["open_files"]
        assert os.path.realpath(sys.executable) in told["mapped_files"]
        assert [(one["pid"], one["threads"]) for one in told["processes"]] == [(program.pid, 1)]
        assert 0 < told["stopped_s"] < told["total_s"]
        assert Path(f"/proc/{program.pid}/maps").read_text() == maps
        assert program.ask("still there") == "still there"
        assert not lzy.store.exists()
        # The figures, against a dump.
        report = lzy.dump(program, "image", "--leave-running")
        assert report["raw_bytes"] == pytest.approx(told["raw_bytes"], rel=0.05)
        assert report["stored_bytes"] == pytest.approx(told["estimated_bytes"], rel=0.4)


def test_everything_that_is_refused_is_told_at_once(
    lzy: CommandLine, held: Callable[..., Program]
) -> None:
    """Each reason with a way out; what the dump then says is among them."""
    with socket.create_server(("127.0.0.1", 0)) as outside:
        program = held(outside.getsockname()[1], "unfit")
        told, status = look(lzy, program)
        assert status == 4
        assert not told["possible"]
        refused = [one for one in told["findings"] if one["outcome"] == "refused"]
        assert len(refused) >= 2
        assert all(one["remedy"] for one in refused)
        assert any("netlink" in one["words"] for one in refused)
        assert any("perf_event" in one["words"] for one in refused)
        assert any(one["outcome"] == "cut" for one in told["findings"])
        error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store))
        assert error["message"] in [one["words"] for one in refused]
        words = lzy.run("dump", "--dry-run", str(program.pid))
        assert words.returncode == 4
        assert b"would be refused, for " in words.stdout
        assert program.ask("still there") == "still there"


def test_descendants_are_looked_at_too(lzy: CommandLine, start: Start) -> None:
    """Each process of a tree is listed; a pipe between two of them is not cut."""
    words = "(sleep 100 | sleep 100) & echo ready; read line; kill 0"
    program = start(command=["sh", "-c", words]).await_ready()
    try:
        told, _ = look(lzy, program)
        assert len(told["processes"]) >= 3
        assert told["processes"][0]["pid"] == program.pid
        assert not [one for one in told["findings"] if one["outcome"] == "cut"], told["findings"]
    finally:
        program.say("end")
        program.await_end()


def test_nobody_there(lzy: CommandLine) -> None:
    """A process that is not there is an error, not an empty answer."""
    assert lzy.fail("dump", "--dry-run", "4194000")["kind"] == "not_found"
