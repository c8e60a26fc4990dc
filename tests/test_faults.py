"""lzy is killed at every stage of its work, meets full disks and bad stores: nobody is hurt.

Whatever happens to lzy, the process runs on untouched, or it is whole in the image. Whether it is
hurt, `memory_pattern` tells: it compares its memory byte for byte, and a thread of it writes all
the while.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import (
    PATIENCE_S,
    Holds,
    await_end,
    find_failures,
    kill_lzy,
    list_children,
    unmount,
    wait_readable,
)

from lzy.checkpoint.stages import STAGES

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

DUMP_STAGES = [stage for stage in STAGES if stage.startswith("dump.")]
RESTORE_STAGES = [stage for stage in STAGES if stage.startswith("restore.")]
KILLED = -signal.SIGKILL
WAYS = [("--eager",), ()]


def names_of_images(lzy: CommandLine) -> list[str]:
    if not lzy.store.exists():
        return []
    return [image["name"] for image in lzy.succeed("images", "--store", str(lzy.store))["images"]]


def prove_untouched(program: Program, pid: int) -> None:
    """The process that there was is there, not traced, not stopped, and right in every byte."""
    assert program.pid == pid
    status = Path(f"/proc/{pid}/status").read_text()
    assert "TracerPid:\t0\n" in status
    program.prove()


def prove_runs_or_is_in_the_image(program: Program, lzy: CommandLine) -> str:
    """Whichever it is, it is whole. Says which."""
    names = names_of_images(lzy)
    for name in names:
        lzy.succeed("verify", name, "--store", str(lzy.store))
    if program.is_alive:
        prove_untouched(program, program.pid)
        # The next dump is not hindered by what the last one left.
        lzy.dump(program, "next")
        lzy.restore(program, "next")
        program.prove()
        return "runs"
    program.child.wait()
    assert names == ["image"]
    lzy.restore(program, "image")
    program.prove()
    return "in the image"


def dump_killed_at(lzy: CommandLine, program: Program, stage: str, *options: str) -> int:
    where = ("--store", str(lzy.store), "--name", "image")
    return lzy.run("dump", str(program.pid), *where, *options, kill_at=stage).returncode


@pytest.mark.parametrize("stage", DUMP_STAGES)
def test_dump_killed_at_each_stage(start: Start, lzy: CommandLine, stage: str) -> None:
    """Killed before the image is committed, the process runs on; afterwards it may have ended."""
    program = start("memory_pattern", "16").await_ready()
    status = dump_killed_at(lzy, program, stage)
    if stage in ("dump.ahead", "dump.tracked", "dump.split", "dump.resumed"):
        assert status == 0  # Stages of a checkpoint only.
        program.await_end()
        prove_runs_or_is_in_the_image(program, lzy)
        return
    assert status == KILLED
    where = prove_runs_or_is_in_the_image(program, lzy)
    if stage == "dump.ended":
        assert where == "in the image"
    elif stage != "dump.committed":
        assert where == "runs"


@pytest.mark.parametrize("stage", [stage for stage in DUMP_STAGES if stage != "dump.ended"])
def test_checkpoint_killed_at_each_stage(start: Start, lzy: CommandLine, stage: str) -> None:
    """With --leave-running the process runs on, whenever lzy dies; no snapshot of it stays."""
    program = start("memory_pattern", "16").await_ready()
    assert dump_killed_at(lzy, program, stage, "--leave-running") == KILLED
    assert program.is_alive
    assert prove_runs_or_is_in_the_image(program, lzy) == "runs"


def kill_after(process: subprocess.Popen[bytes], delay_s: float) -> bool:
    """Kill lzy after a time unless it has ended by then; whether it was killed."""
    pidfd = os.pidfd_open(process.pid)
    try:
        if wait_readable([pidfd], delay_s):
            return False
        process.kill()
        return True
    finally:
        process.communicate()
        os.close(pidfd)


@pytest.mark.parametrize("options", [(), ("--leave-running",)], ids=["dump", "checkpoint"])
def test_dump_killed_at_any_moment(
    start: Start, lzy: CommandLine, options: tuple[str, ...]
) -> None:
    """Killed again and again, later and later, until it gets through: never a scratch."""
    program = start("memory_pattern", "16").await_ready()
    original = program.pid
    delay_s, step_s, kills = 0.02, 0.03, 0
    while True:
        where = ("--store", str(lzy.store), "--name", f"image{kills}")
        killed = kill_after(lzy.start("dump", str(program.pid), *where, *options), delay_s)
        if not killed or not program.is_alive:
            break
        try:
            assert program.ask("ping") == "pong"
        except AssertionError:
            if program.is_alive:
                raise
            break  # lzy had just ended it: then the image is whole, which is seen below
        kills += 1
        if kills % 4 == 0:
            prove_untouched(program, original)
        delay_s += step_s
    assert kills >= 4, "it was never killed at work"
    for name in names_of_images(lzy):
        lzy.succeed("verify", name, "--store", str(lzy.store))
    if "--leave-running" in options:
        prove_untouched(program, original)
    else:
        program.await_end()
        lzy.restore(program, f"image{kills}")
        program.prove()
    report = lzy.succeed("gc", "--store", str(lzy.store))
    assert report
    assert names_of_images(lzy)


def test_interrupted_dump_leaves_the_process(start: Start, lzy: CommandLine) -> None:
    """Ctrl-C and SIGTERM at any moment end lzy; the process runs on, or is whole in the image."""
    program = start("memory_pattern", "16").await_ready()
    for number in range(8):
        where = ("--store", str(lzy.store), "--name", f"image{number}")
        process = lzy.start("dump", str(program.pid), *where, "--leave-running")
        pidfd = os.pidfd_open(process.pid)
        wait_readable([pidfd], 0.05 + 0.04 * number)
        os.close(pidfd)
        process.send_signal(signal.SIGTERM if number % 2 else signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
        assert program.ask("ping") == "pong"
    prove_untouched(program, program.pid)


@pytest.mark.parametrize(
    ("stage", "way"),
    [(stage, way) for stage in RESTORE_STAGES for way in WAYS],
    ids=lambda value: value if isinstance(value, str) else {(): "lazy"}.get(value, "eager"),
)
def test_restore_killed_at_each_stage(
    start: Start, lzy: CommandLine, stage: str, way: tuple[str, ...]
) -> None:
    """The image stays whole, no half-made process stays, and the next restore succeeds.

    From the last stage but one on the process lives without its maker, and is whole.
    """
    program = start("memory_pattern", "16").await_ready()
    pid = program.pid
    lzy.dump(program)
    where = ("image", "--store", str(lzy.store), *way)
    done = lzy.run("restore", *where, kill_at=stage)
    assert done.returncode == KILLED
    if stage in ("restore.committing", "restore.committed"):
        program.adopt(pid)
        program.prove()
        return
    await_gone(pid)
    lzy.succeed("verify", "image", "--store", str(lzy.store))
    lzy.restore(program, *where[:1], *way)
    program.prove()


def await_gone(pid: int) -> None:
    """Wait until the half-made process, which dies with its maker, has gone and been reaped."""
    await_end(pid)
    deadline = time.monotonic() + PATIENCE_S
    while os.path.exists(f"/proc/{pid}"):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        assert time.monotonic() < deadline, f"process {pid} stays"
        os.sched_yield()


def restore_without_pager(program: Program, lzy: CommandLine) -> None:
    """Restore lazily, and kill pager and keeper before they have brought anything in."""
    holds = Holds(lzy.home.with_name("holds"))
    holds.hold("pager.serving")
    lzy.environment |= holds.environment
    report = lzy.restore(program, "image")
    keepers = pagers_of(report["pager_pid"])
    for pid in keepers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in keepers:
        await_end(pid)
    lzy.environment.clear()


def pagers_of(pager_pid: int) -> list[int]:
    """The pager, its parent (the keeper) if that is lzy's too, and their children; keeper first."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pager_pid}/stat").read_text().rpartition(")")[2].split()
        parent = int(stat[1])
        mine = parent not in (os.getpid(), os.getppid(), 1)
        return [*([parent] if mine else []), pager_pid, *list_children(pager_pid)]
    return []


def test_pager_killed_is_replaced(start: Start, lzy: CommandLine) -> None:
    """The pager alone is killed: its keeper starts another; not a byte is wrong."""
    program = start("memory_pattern", "16").await_ready()
    lzy.dump(program)
    report = lzy.restore(program, "image")
    with contextlib.suppress(ProcessLookupError):
        kill_lzy(report["pager_pid"])
    program.prove()


def test_pager_and_keeper_killed_stall_only(start: Start, lzy: CommandLine) -> None:
    """With nobody left the process waits; `lzy pager --resume` lets it go on, unharmed."""
    program = start("memory_pattern", "16").await_ready()
    lzy.dump(program)
    restore_without_pager(program, lzy)
    refusal = lzy.run("rm", "image", "--store", str(lzy.store))
    assert refusal.returncode == 8, refusal  # Busy: what it waits for is not thrown away.
    program.say("prove")
    resumed = lzy.run("pager", "--resume", str(program.pid))
    proof = json.loads(program.hear(60))
    assert not find_failures(proof, []), resumed


def test_pager_killed_again_and_again(start: Start, lzy: CommandLine) -> None:
    """Whoever serves the process is killed while the pattern is compared, ten times over."""
    program = start("memory_pattern", "16").await_ready()
    lzy.dump(program)
    restore_without_pager(program, lzy)
    program.say("prove")
    for round_number in range(10):
        done = lzy.run("pager", "--resume", str(program.pid), "--json")
        if done.returncode != 0:
            break  # Nothing is missing any more.
        # What it started is ours now (orphans come to the test): kill it a little later each time.
        served_by = [
            pid for pid in list_children(os.getpid())
            if pid != program.pid and read_name(pid).startswith("lzy")
        ]  # fmt: skip
        if wait_readable([program.pidfd], 0.002 * round_number):
            raise AssertionError(program.describe())
        for pid in served_by:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in served_by:
            await_end(pid)
    lzy.run("pager", "--resume", str(program.pid))
    proof = json.loads(program.hear(60))
    assert not find_failures(proof, [])


def read_name(pid: int) -> str:
    """By which a pager and its keeper are told from children of the program."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@pytest.mark.parametrize("stage", ["serving", "loaded", "unregistered", "closed"])
def test_pager_killed_at_each_stage(start: Start, lzy: CommandLine, stage: str) -> None:
    """A pager that dies at a stage of its work has a successor; no byte is wrong."""
    program = start("memory_pattern", "16").await_ready()
    lzy.dump(program)
    done = lzy.run(
        "restore", "image", "--store", str(lzy.store), "--json", kill_at=f"pager.{stage}"
    )
    assert done.returncode == 0, done.stderr.decode()
    program.adopt(json.loads(done.stdout)["pid"])
    program.prove()


def test_program_killed_while_paged(start: Start, lzy: CommandLine) -> None:
    """When the process dies, its pager and keeper go too, and leave no files."""
    program = start("memory_pattern", "16").await_ready()
    lzy.dump(program)
    report = lzy.restore(program, "image")
    program.end()
    await_end(report["pager_pid"])
    # That nobody stays is what `nothing_left_behind` looks at.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "small", str(place)], check=True)
    try:
        yield place
    finally:
        unmount(place)


@pytest.mark.parametrize("options", [(), ("--leave-running",)], ids=["dump", "checkpoint"])
def test_disk_full(
    small_disk: Path, start: Start, lzy: CommandLine, options: tuple[str, ...]
) -> None:
    """A dump that does not fit fails in words; the process runs on; the next one may fit."""
    program = start(command=[sys.executable, "-c", NOISE]).await_ready()
    lzy.store = small_disk / "store"
    error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store), *options)
    assert error["kind"] == "store_unavailable"
    assert "space" in error["message"]
    assert program.ask("digest") == program.ask("digest")
    assert names_of_images(lzy) == []
    lzy.run("gc", "--store", str(lzy.store))
    assert program.ask("shrink") == "shrunk"
    lzy.dump(program)  # What the failed dump wrote does not stand in its way.
    lzy.restore(program)
    assert program.ask("count") == "1048576"


NOISE = """
import hashlib, random
noise = random.Random(1).randbytes(48 << 20)
print("ready", flush=True)
while True:
    word = input()
    if word == "digest":
        print(hashlib.sha256(noise).hexdigest(), flush=True)
    elif word == "shrink":
        noise = noise[: 1 << 20]
        print("shrunk", flush=True)
    else:
        print(len(noise), flush=True)
"""


def test_store_that_cannot_be_written(start: Start, lzy: CommandLine) -> None:
    """A store on a file system that is read-only: refused in words, the process runs on."""
    program = start("interpreter").await_ready()
    lzy.dump(program, "first", "--leave-running")
    mount = ["mount", "--bind", "-o", "ro", str(lzy.store), str(lzy.store)]
    subprocess.run(mount, check=True)
    try:
        error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store))
        assert error["kind"] in ("store_unavailable", "access_denied")
        assert str(lzy.store) in error["message"]
    finally:
        unmount(lzy.store)
    program.prove()


def test_store_that_is_no_store(start: Start, lzy: CommandLine, tmp_path: Path) -> None:
    """A file, or a folder of other things, in the store's place."""
    program = start("interpreter").await_ready()
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter").write_text("private")
    for place in (other, other / "letter"):
        assert lzy.fail("dump", str(program.pid), "--store", str(place))["message"]
        assert lzy.fail("restore", "image", "--store", str(place))["message"]
    assert lzy.fail("restore", "--store", str(tmp_path / "nowhere"))["kind"] == "not_found"
    assert (other / "letter").read_text() == "private"
    assert os.listdir(other) == ["letter"]
    program.prove()


def damage(path: Path, how: str) -> None:
    """Change some bytes in the middle, cut off the end, or take the file away.

    Not a single bit: a zstd frame has some that change nothing of what it decodes to.
    """
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "cut":
        del content[len(content) * 2 // 3 :]
    else:
        middle = len(content) // 2
        content[middle : middle + 16] = bytes(byte ^ 0x5A for byte in content[middle : middle + 16])
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
@pytest.mark.parametrize("kind", ["pack", "manifest", "key"])
def test_damaged_image_is_refused(start: Start, lzy: CommandLine, kind: str, how: str) -> None:
    """A damaged store is found out by `verify`, and by `restore` before there is a process."""
    program = start("interpreter").await_ready()
    pid = program.pid
    lzy.dump(program)
    files = [path for path in lzy.store.rglob("*") if path.is_file() and path.stat().st_size]
    words = {"pack": "pack", "manifest": "image", "key": "secret"}
    chosen = [path for path in files if words[kind] in str(path.relative_to(lzy.store))]
    assert chosen, files
    damage(max(chosen, key=lambda path: path.stat().st_size), how)
    where = ("--store", str(lzy.store))
    kinds = ("damaged", "not_found", "store_unavailable")
    assert lzy.fail("verify", "image", *where)["kind"] in kinds
    assert lzy.fail("restore", "image", "--eager", *where)["kind"] in kinds
    await_gone(pid)
