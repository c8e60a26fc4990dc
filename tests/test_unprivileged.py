"""An ordinary user dumps processes and brings them back, in namespaces of that user's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from living import CommandLine, Program, wait_readable

import lzy

Start = Callable[..., Program]
USER = 54321
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]

PROGRAM = """
import json, mmap, os, random, sys, threading, time
shared = mmap.mmap(-1, 1 << 20)
shared[4096:4101] = b"hello"
lines, ticks = [], 0
noise = random.Random(5).randbytes(3 << 20)
kept = hash(noise)
def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
parent = os.getpid()
child = os.fork() if "child" in sys.argv else -1
if child == 0:
    while os.getppid() == parent:
        shared[0] = (shared[0] + 1) % 256
        time.sleep(0.01)
    os._exit(0)
print("ready", flush=True)
for line in sys.stdin:
    lines.append(line.strip())
    seen = shared[0]
    time.sleep(0.1)
    print(json.dumps({
        "pid": os.getpid(), "ids": [os.getuid(), os.getgid()], "lines": lines,
        "shared": shared[4096:4101].decode(), "ticks": ticks, "whole": hash(noise) == kept,
        "child": child < 0 or shared[0] != seen,
    }), flush=True)
"""


@pytest.fixture
def reachable(tmp_path: Path, nothing_left_behind: None) -> Iterator[list[str]]:
    """A command's beginning: in a mount namespace where that user can read Python and lzy.

    Folders on the way to them may be closed to others; there they are seen through open ones.
    """
    needed = {sys.prefix, sys.base_prefix, str(Path(lzy.__file__).parent), str(tmp_path)}
    closed: dict[str, set[str]] = {}
    for place in needed:
        shut = [p for p in [*Path(place).parents][::-1] if not p.stat().st_mode & 0o001]
        if shut:
            closed.setdefault(str(shut[0]), set()).add(place)
    script = ["mount --make-rprivate /"]
    open_folder = Path(tempfile.mkdtemp(prefix="lzy-test-"))
    for folder, places in closed.items():
        kept = open_folder / str(len(script))
        kept.mkdir()
        script.append(f"mount --bind {folder} {kept}; mount -t tmpfs -o mode=755 none {folder}")
        for place in places:
            inside = Path(place).relative_to(folder)
            script.append(f"mkdir -p {place}; mount --bind {kept / inside} {place}")
    script.append("echo ready; exec sleep 600")
    anchor = subprocess.Popen(
        ["unshare", "--mount", "sh", "-ec", "\n".join(script)], stdout=subprocess.PIPE
    )
    try:
        assert anchor.stdout
        assert anchor.stdout.readline() == b"ready\n"
        tmp_path.chmod(0o755)
        yield ["nsenter", f"--target={anchor.pid}", "--mount", "--", *AS_USER]
    finally:
        anchor.kill()
        anchor.wait()
        shutil.rmtree(open_folder)


class User:
    """lzy and programs as that user has them."""

    def __init__(self, reachable: list[str], start: Start, folder: Path) -> None:
        folder.mkdir()
        os.chown(folder, USER, USER)
        self.lzy = CommandLine(folder / "home")
        self.lzy.executable = [*reachable, *self.lzy.executable]
        self._begin, self._start = reachable, start

    def start(self, *words: str) -> Program:
        command = [*self._begin, sys.executable, "-c", PROGRAM, *words]
        program = self._start(command=command).await_ready()
        os.chmod(program.folder, 0o777)
        for name in ("commands", "answers", "errors"):
            os.chmod(program.folder / name, 0o666)
        return program


@pytest.fixture
def user(reachable: list[str], start: Start, tmp_path: Path) -> User:
    if os.geteuid():
        pytest.fail("needs root to become somebody else")
    return User(reachable, start, tmp_path / "user")


def prove(program: Program, line: str) -> dict[str, Any]:
    proof: dict[str, Any] = json.loads(program.ask(line))
    assert proof["whole"]
    assert proof["child"]
    assert (proof["ids"], proof["shared"]) == ([USER, USER], "hello")
    return proof


def test_a_user_without_rights_hibernates_and_wakes_a_process(user: User) -> None:
    """Eagerly whatever was asked for, and it says so; and once more, from where it lives then."""
    program = user.start()
    before = prove(program, "one")
    user.lzy.dump(program, "image", "--leave-running")
    report = user.lzy.dump(program, "image")
    assert report["base"] == "image"  # the account of writes needs no rights
    assert report["written_bytes"] < report["raw_bytes"] / 2
    report = user.lzy.restore(program, "image")
    assert (report["namespace"], report["lazy"]) == ("new", False)
    assert "without root" in report["notes"][0]
    after = prove(program, "two")
    assert after["lines"] == ["one", "two"]
    assert after["pid"] == before["pid"]
    assert after["ticks"] > before["ticks"]
    status = Path(f"/proc/{program.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "CapPrm:\t0000000000000000" in status
    assert "CapAmb:\t0000000000000000" in status

    told = user.lzy.succeed("dump", "--dry-run", str(program.pid))
    assert told["possible"]
    user.lzy.dump(program, "image")
    user.lzy.restore(program, "image", "--eager")
    assert prove(program, "three")["lines"] == ["one", "two", "three"]


def test_a_user_without_rights_has_trees_and_copies(user: User) -> None:
    """A child comes along, with memory that both share; a copy lives apart."""
    program = user.start("child")
    prove(program, "one")
    user.lzy.dump(program, "image", "--leave-running")
    quiet = ("--stdin", "/dev/zero", "--stdout", "/dev/null", "--stderr", "/dev/null")
    copy = user.lzy.succeed("restore", "image", "--copy", "--store", str(user.lzy.store), *quiet)
    pidfd = os.pidfd_open(copy["pid"])
    try:
        assert copy["network"] == "new"
        assert not wait_readable([pidfd], 0.2)
        assert os.stat(f"/proc/{copy['pid']}/ns/net") != os.stat("/proc/self/ns/net")
    finally:
        os.kill(copy["pid"], 9)
        assert wait_readable([pidfd], 10)
        os.close(pidfd)
    user.lzy.dump(program, "image")
    user.lzy.restore(program, "image")
    assert prove(program, "two")["lines"] == ["one", "two"]


def test_root_has_a_users_process_doze(user: User, lzy: CommandLine) -> None:
    """That of a user who may not make a userfaultfd, nor hear of the kernel's faults by it."""
    program = user.start()
    prove(program, "one")
    where = ("--store", str(lzy.store))
    before = sorted(os.listdir(f"/proc/{program.pid}/fd"))
    report = lzy.succeed("doze", str(program.pid), *where, "--name", "image")
    assert report["dropped_bytes"] > 2 << 20
    assert prove(program, "two")["lines"] == ["one", "two"]
    lzy.succeed("rouse", str(program.pid))
    assert prove(program, "three")["lines"] == ["one", "two", "three"]
    links = [os.readlink(f"/proc/{program.pid}/fd/{n}") for n in before]
    assert "/dev/userfaultfd" not in links
    lzy.dump(program, "image")
    lzy.restore(program, "image")
    assert prove(program, "four")["ids"] == [USER, USER]


def test_what_needs_root_is_said(user: User, start: Start) -> None:
    """By the doctor beforehand, and by the commands: another's process, another's image."""
    verdicts = {it["name"]: it for it in user.lzy.succeed("doctor")["checks"]}
    assert verdicts["clone3 set_tid"]["verdict"] == "degraded"
    assert "user and a PID namespace" in verdicts["clone3 set_tid"]["words"]
    assert verdicts["time namespace"]["verdict"] == "works"
    assert verdicts["userfaultfd"]["verdict"] == "degraded"
    others = start(command=["sh", "-c", "echo ready; exec cat"]).await_ready()
    where = ("--store", str(user.lzy.store), "--name", "image")
    error = user.lzy.fail("dump", str(others.pid), *where)
    assert error["kind"] == "access_denied"
    assert error["remedy"]
    program = user.start()
    error = user.lzy.fail("doze", str(program.pid), *where)
    assert error["kind"] == "access_denied"
    assert "lzy dump" in error["remedy"]
    user.lzy.dump(program, "image")
    error = user.lzy.fail("restore", "image", *where[:2], "--pid-namespace", "host")
    assert error["kind"] == "access_denied"
    user.lzy.restore(program, "image")
    prove(program, "one")
