"""Huge pages that are set aside (hugetlbfs): had again as large, or missed before the start."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import PATIENCE_S, Case, unmount

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
CASE = Case("huge_pages")


def count(name: str) -> int:
    return int((POOL / name).read_text())


def await_free(wanted: int) -> None:
    """Wait until so many are free: who looks at /proc/PID just then keeps its memory so long."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := (count("free_hugepages"), count("resv_hugepages"))) != (wanted, 0):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


@pytest.fixture
def pool() -> Iterator[Callable[[int], None]]:
    """Sets how many huge pages are free for this test; afterwards it is as before."""
    if not POOL.exists():
        pytest.fail("these tests need a kernel with huge pages of 2 MiB (CONFIG_HUGETLBFS)")
    with open(Path(tempfile.gettempdir()) / "lzy-test-huge-pages.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other runs of these tests would count on the same ones
        before = count("nr_hugepages")

        def set_free(wanted: int) -> None:
            used = count("nr_hugepages") - count("free_hugepages") + count("resv_hugepages")
            (POOL / "nr_hugepages").write_text(str(used + wanted))
            if count("free_hugepages") - count("resv_hugepages") != wanted:
                pytest.fail(f"this machine has no {wanted} huge pages of 2 MiB to set aside")

        try:
            yield set_free
        finally:
            (POOL / "nr_hugepages").write_text(str(before))


@pytest.fixture
def program(pool: Callable[[int], None], start: Start) -> Program:
    """With as many as it needs: 3 private, which its child has, too, 1 shared, 1 in a file."""
    pool(12)
    return start(CASE.name, *CASE.arguments).await_ready()


def test_proof_can_fail(program: Program) -> None:
    """Nobody dumps it: its proof holds, twice, and fails once it has spoiled its own state."""
    program.prove()
    program.prove()
    assert program.ask("spoil") == "spoiled"
    with pytest.raises(AssertionError):
        program.prove()


@pytest.mark.parametrize("way", ["--eager", "--pid-namespace=new"])
def test_huge_pages_come_back(program: Program, lzy: CommandLine, way: str) -> None:
    """Private and shared ones, a sealed file of them; of a child, too; with their size."""
    lzy.dump(program)
    lzy.restore(program, "image", way)
    program.prove()
    program.prove()


def test_next_checkpoint_has_what_was_written(program: Program, lzy: CommandLine) -> None:
    """Each checkpoint reads them, stores what has changed, and misses nothing."""
    first = lzy.dump(program, "image", "--leave-running")
    assert any("huge pages" in note for note in first["notes"])
    program.prove()  # it writes the page that had not been there
    second = lzy.dump(program, "image", "--leave-running")
    assert second["base"] == "image"
    assert second["stored_bytes"] < first["stored_bytes"]
    program.end()
    lzy.restore(program, "image@2")
    program.prove()


@pytest.mark.shows("refused", "memory of huge pages where fewer are free than it needs")
def test_too_few_are_named_before_anything_starts(
    program: Program, lzy: CommandLine, pool: Callable[[int], None]
) -> None:
    """How many are needed, how many are there, and where to set them aside."""
    lzy.dump(program)
    await_free(12)
    pool(5)
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert error["kind"] == "incompatible"
    assert "needs 8 huge pages of 2 MiB, and 5 are free" in error["message"]
    assert f"{POOL}/nr_hugepages" in error["remedy"]
    pool(8)
    lzy.restore(program)
    pool(2)  # and to be written copy-on-write nothing is needed: they share none
    program.prove()


def test_no_huge_pages_are_lost(program: Program, lzy: CommandLine) -> None:
    """When the process has ended, all of them are free again."""
    lzy.dump(program)
    await_free(12)
    lzy.restore(program)
    program.end()
    await_free(12)
    assert not os.path.exists(f"/proc/{program.pid}")


FILE = """
import mmap, os, sys
path, way = sys.argv[1:]
file = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 2 << 20)
memory = mmap.mmap(file, 2 << 20)
memory[:7] = b"content"
if way == "deleted": os.unlink(path)
print("ready", flush=True)
for line in sys.stdin: print(memory[:7].decode(), flush=True)
"""


@pytest.mark.parametrize("way", ["named", "deleted"])
def test_files_of_huge_pages(
    pool: Callable[[int], None], start: Start, lzy: CommandLine, tmp_path: Path, way: str
) -> None:
    """One on a hugetlbfs is refused, with a way out, and the dry run says so; one without a name
    any more comes back as a memory file of huge pages."""
    pool(4)
    place = tmp_path / "huge"
    place.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "none", place], check=True)
    try:
        words = [sys.executable, "-c", FILE, str(place / "file"), way]
        program = start(command=words).await_ready()
        if way == "named":
            error = lzy.fail("dump", str(program.pid), "--store", str(lzy.store))
            assert error["kind"] == "unsupported"
            assert str(place / "file") in error["message"]
            assert "memfd" in error["remedy"]
            assert (
                error["message"].encode() in lzy.run("dump", "--dry-run", str(program.pid)).stdout
            )
        else:
            lzy.dump(program)
            lzy.restore(program)
            smaps = Path(f"/proc/{program.pid}/smaps").read_text().partition("memfd:file")[2]
            assert "KernelPageSize:     2048 kB" in smaps.partition("VmFlags")[0]
        assert program.ask("look") == "content"
        program.end()
    finally:
        unmount(place)
