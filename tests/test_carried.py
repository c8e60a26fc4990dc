"""Files that travel in an image: libraries that are gone or changed, data put back, all named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from living import CommandLine, Program

Start = Callable[..., Program]

PROGRAM = """
import ctypes, mmap, os, sys
library = ctypes.CDLL(sys.argv[1])
data = open(sys.argv[2], "rb")
mapped = mmap.mmap(data.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
log = open(sys.argv[3], "a")
print("ready", flush=True)
for line in sys.stdin:
    print(library.answer(int(line)), mapped[:5], len(mapped), os.getcwd(), flush=True)
"""
SOURCE = "static int calls; int answer(int x) { return x + %d + 0 * calls++; }"


class Land:
    """A folder with a library, a data file and a log, and a program that has all of them open."""

    def __init__(self, folder: Path, start: Start) -> None:
        self.folder = folder
        folder.mkdir()
        self.library, self.data, self.log = (
            folder / name for name in ("libanswer.so", "data/data.bin", "log.txt")
        )
        self.data.parent.mkdir()
        self.build(7)
        self.data.write_bytes(b"hello" + bytes(range(256)) * 700)
        command = [sys.executable, "-c", PROGRAM, *map(str, (self.library, self.data, self.log))]
        self.program = start(command=command).await_ready()

    def build(self, number: int) -> None:
        words = ["cc", "-shared", "-fPIC", "-Wl,--build-id", "-x", "c", "-", "-o"]
        made = self.library.with_suffix(".new")
        source = SOURCE % number
        subprocess.run([*words, str(made)], input=source.encode(), check=True)
        made.rename(self.library)

    def proof(self) -> list[str]:
        return self.program.ask("10").split()


@pytest.fixture
def land(start: Start, tmp_path: Path) -> Land:
    return Land(tmp_path / "land", start)


def mapped_paths(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(None, 5)[5] for line in lines if len(line.split(None, 5)) == 6}


def test_a_library_that_is_gone_or_changed_comes_from_the_image(
    lzy: CommandLine, land: Land
) -> None:
    """Mapped from lzy's own copy, which is made once; the file at the path stays as it is."""
    before = land.proof()
    lzy.dump(land.program, "image", "--carry-files")
    old = land.library.read_bytes()
    land.library.unlink()
    report = lzy.restore(land.program, "image")
    assert land.proof() == before
    assert any("come from the image" in note for note in report["notes"])
    copies = lzy.home / "carried"
    used = [path for path in mapped_paths(land.program.pid) if path.startswith(str(copies))]
    assert [Path(path).read_bytes() for path in used] == [old]
    made = {entry.name: entry.stat().st_mtime_ns for entry in copies.iterdir()}

    # What only lzy has travels on by itself.
    lzy.dump(land.program, "again")
    shutil.rmtree(copies)
    land.build(8)  # another library is at its place now
    lzy.restore(land.program, "again")
    assert land.proof() == before
    assert set(made) == {entry.name for entry in copies.iterdir()}
    land.program.end()
    lzy.restore(land.program, "image", "--eager")
    assert land.proof() == before
    assert land.library.read_bytes() != old


def test_a_copy_of_another_image_is_found_by_build_id(lzy: CommandLine, land: Land) -> None:
    """An image that carries nothing is helped by one that does."""
    before = land.proof()
    lzy.dump(land.program, "with", "--carry-files", "--leave-running")
    lzy.dump(land.program, "without", "--no-track")
    old = land.library.read_bytes()
    land.build(8)
    error = lzy.fail("restore", "without", "--store", str(lzy.store))
    assert error["kind"] == "incompatible"
    assert error["facts"]["path"] == str(land.library)
    lzy.restore(land.program, "with")
    land.program.end()
    lzy.restore(land.program, "without")
    assert land.proof() == before
    assert land.library.read_bytes() != old


def test_a_library_that_was_moved_is_found_by_build_id(lzy: CommandLine, land: Land) -> None:
    """In a folder of other mapped files, or of libraries; one that is another is not taken."""
    before = land.proof()
    lzy.dump(land.program, "image")
    moved = land.data.parent / land.library.name
    land.library.rename(moved)
    report = lzy.restore(land.program, "image")
    assert land.proof() == before
    assert str(moved) in mapped_paths(land.program.pid)
    assert any("build-id" in note for note in report["notes"])
    land.program.end()
    land.build(8)
    land.library.rename(moved)
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert error["facts"]["path"] == str(land.library)


def test_carried_files_are_stored_once(lzy: CommandLine, land: Land) -> None:
    """A second image that carries the same files adds next to nothing; every byte is verified."""
    first = lzy.dump(land.program, "one", "--carry-files", "--leave-running", "--no-track")
    second = lzy.dump(land.program, "two", "--carry-files", "--leave-running", "--no-track")
    carried = sum(os.stat(p).st_size for p in mapped_paths(land.program.pid) if p[:1] == "/")
    assert first["raw_bytes"] > carried
    assert second["stored_bytes"] < 1 << 20 < first["stored_bytes"]
    lzy.succeed("verify", "two", "--store", str(lzy.store))
    objects = lzy.succeed("show", "two", "--store", str(lzy.store))["objects"]
    assert str(land.library) in {held["path"] for held in objects}


def test_all_that_is_missing_is_named_at_once(lzy: CommandLine, land: Land) -> None:
    """One error lists each file, before anything is made; nothing is put back meanwhile."""
    before = land.proof()
    lzy.dump(land.program, "image", "--carry", str(land.data))
    content, library = land.data.read_bytes(), land.library.read_bytes()
    for path in (land.library, land.data, land.log):
        path.unlink()
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert error["kind"] == "incompatible"
    missing = {entry["path"] for entry in error["facts"]["missing"]}
    assert missing == {str(land.library), str(land.log)}
    assert all(entry["remedy"] for entry in error["facts"]["missing"])
    assert all(path in error["message"] for path in missing)
    assert not land.data.exists()
    land.library.write_bytes(library)
    land.log.touch()
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert str(land.log) in error["message"]  # it is another one, of another time
    report = lzy.restore(land.program, "image", "--accept-changed-files")
    assert land.proof() == before
    assert land.data.read_bytes() == content
    assert any("put back" in note for note in report["notes"])


def test_a_working_folder_travels_along(lzy: CommandLine, start: Start, tmp_path: Path) -> None:
    """Files, folders, links, rights and times; another file at a place is never replaced."""
    folder = tmp_path / "work"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "notes").write_text("one two three")
    (folder / "deep" / "er" / "notes").chmod(0o640)
    (folder / "empty").touch()
    (folder / "link").symlink_to("deep/er/notes")
    os.mkfifo(folder / "pipe")
    script = (
        "import os, sys; os.chdir(sys.argv[1]); held = open('deep/er/notes'); held.read(4)\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin: print(os.getcwd(), held.read(3), flush=True)"
    )
    program = start(command=[sys.executable, "-c", script, str(folder)]).await_ready()
    lzy.dump(program, "image", "--carry", str(folder))
    stamp = (folder / "deep" / "er" / "notes").stat()
    shutil.rmtree(folder)
    lzy.restore(program, "image")
    assert program.ask("?").split() == [str(folder), "two"]
    again = (folder / "deep" / "er" / "notes").stat()
    assert (again.st_mode, again.st_mtime_ns) == (stamp.st_mode, stamp.st_mtime_ns)
    assert os.readlink(folder / "link") == "deep/er/notes"
    assert (folder / "empty").read_bytes() == b""
    program.end()

    # The same content of another time is the same; other content is not, and stays.
    os.utime(folder / "deep" / "er" / "notes")
    lzy.restore(program, "image")
    program.end()
    (folder / "deep" / "er" / "notes").write_text("another one!!")
    (folder / "empty").unlink()
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert str(folder / "deep" / "er" / "notes") in error["message"]
    assert (folder / "deep" / "er" / "notes").read_text() == "another one!!"
    assert not (folder / "empty").exists()
    lzy.restore(program, "image", "--accept-changed-files")
    assert (folder / "empty").exists()
    assert (folder / "deep" / "er" / "notes").read_text() == "another one!!"


def test_what_cannot_be_carried_is_refused(lzy: CommandLine, land: Land) -> None:
    """And the process goes on."""
    where = ("--store", str(lzy.store), "--name", "image")
    error = lzy.fail("dump", str(land.program.pid), *where, "--carry", str(land.folder / "none"))
    assert error["kind"] == "not_found"
    assert land.proof()[0] == "17"
