"""Memory with names in /dev/shm, which others may have, too: in the image, and whose it is."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from living import await_end

from lzy.checkpoint.store import Store

if TYPE_CHECKING:
    from living import CommandLine, Program

    Start = Callable[..., Program]

SHM = Path("/dev/shm")
PAGE = 4096
QUIET = ("--stdin", "/dev/null", "--stdout", "/dev/null", "--stderr", "/dev/null")

#: Maps a file; `WORD` writes that at its begin and says what was there. It waits first: when a
#: process began is known to a tick of 10 ms, and what was made in the same may be somebody else's.
HOLDER = """
import mmap, os, sys, time
time.sleep(0.05)
path, size, creates = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "create"
file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if creates else 0), 0o600)
if creates:
    os.ftruncate(file, size)
memory = mmap.mmap(file, size)
print("ready", flush=True)
for line in sys.stdin:
    word = line.rstrip("\\n").encode()
    before = memory[: len(word)].decode()
    memory[: len(word)] = word
    print(before, flush=True)
"""


@pytest.fixture
def names() -> Iterator[Callable[[str], Path]]:
    """Paths in /dev/shm of this test's own, removed at its end."""
    made: list[Path] = []

    def name(word: str) -> Path:
        made.append(SHM / f"lzy-named-{os.getpid()}-{word}")
        return made[-1]

    yield name
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def silence(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Standard streams of a copy that nobody talks to, and whose input does not end."""
    os.mkfifo(tmp_path / "silence")
    fifo = os.open(tmp_path / "silence", os.O_RDWR | os.O_CLOEXEC)
    yield ("--stdin", str(tmp_path / "silence"), *QUIET[2:])
    os.close(fifo)


class Outsider:
    """A process that holds the same memory and is no part of the tree."""

    def __init__(self, *arguments: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.child.stdout
        assert self.child.stdout.readline() == "ready\n"

    def ask(self, word: str) -> str:
        assert self.child.stdin
        assert self.child.stdout
        print(word, file=self.child.stdin, flush=True)
        return self.child.stdout.readline().rstrip("\n")

    def end(self) -> None:
        self.child.kill()
        self.child.communicate()


@contextmanager
def outside(path: Path, size: int = PAGE, how: str = "join") -> Iterator[Outsider]:
    """Somebody outside who maps that."""
    other = Outsider(str(path), str(size), how)
    try:
        yield other
    finally:
        other.end()


def hold(start: Start, path: Path, size: int = PAGE, how: str = "create") -> Program:
    """A program that maps `path`."""
    return start(command=[sys.executable, "-c", HOLDER, str(path), str(size), how]).await_ready()


def content_in(lzy: CommandLine, name: str, path: Path) -> bytes:
    """What an image holds of the memory at `path`."""
    with Store.open(lzy.store) as store, store.load(name) as image:
        (described,) = [o for o in image.document["objects"] if o.get("path") == str(path)]
        found = bytearray(described["length_bytes"])
        buffer = memoryview(bytearray(image.window_pages * PAGE))
        for row in range(*image.space_extent(described["space"])):
            address, mask, chunk = image.run(row)
            image.read_chunk(chunk, buffer)
            pages = [bit for bit in range(image.window_pages) if mask >> bit & 1]
            for at, bit in enumerate(pages):
                page = buffer[at * PAGE : (at + 1) * PAGE]
                found[address + bit * PAGE : address + (bit + 1) * PAGE] = page
        return bytes(found[: described["length_bytes"]])


def ours(program: Program) -> set[str]:
    """Names in /dev/shm that the program made."""
    return {name for name in os.listdir(SHM) if f"lzy-test-{program.child.pid}-" in name}


def init_of(pid: int) -> int:
    """The first process of a copy's PID namespace."""
    while os.readlink(f"/proc/{pid}/exe") != "/memfd:lzy-init (deleted)":
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


@pytest.mark.shows("survives", "shared memory by name that is gone since, as after another boot")
def test_names_go_with_their_tree_and_come_back(start: Start, lzy: CommandLine) -> None:
    """Ended, a tree leaves nothing of its own in /dev/shm but files; restored, all is there."""
    program = start("tree_names").await_ready()
    before = ours(program)
    assert len(before) > 5
    report = lzy.dump(program)
    folder = f"lzy-test-{program.child.pid}-folder"
    assert ours(program) == {folder}
    assert any("back with it" in note for note in report["notes"])
    lzy.restore(program)
    assert ours(program) == before
    program.prove()


@pytest.mark.shows("survives", "several names of one piece of shared memory")
@pytest.mark.parametrize("killed", [False, True])
def test_all_names_come_back(
    start: Start, lzy: CommandLine, names: Callable[[str], Path], killed: bool
) -> None:
    """They lead to the same memory again, also where lzy was killed as it removed the first."""
    path, other = names("one"), names("two")
    program = hold(start, path)
    other.hardlink_to(path)
    assert program.ask("begun") == "\0" * 5
    if killed:
        lzy.run(
            "dump",
            str(program.pid),
            "--store",
            str(lzy.store),
            "--name",
            "image",
            kill_at="named.unlinked",
        )
        program.await_end()
    else:
        lzy.dump(program)
    assert (path.exists(), other.exists()) == (False, killed)
    lzy.restore(program)
    assert path.samefile(other)
    assert program.ask("after") == "begun"
    assert other.read_bytes()[:5] == b"after"
    lzy.dump(program, "again")
    assert not path.exists()
    assert not other.exists()


def test_a_name_that_another_file_has_by_now_is_left(
    start: Start, lzy: CommandLine, names: Callable[[str], Path]
) -> None:
    """It is somebody's; the process has its memory under the other, and the restore says so."""
    path, other = names("one"), names("two")
    program = hold(start, path)
    other.hardlink_to(path)
    assert program.ask("begun") == "\0" * 5
    lzy.dump(program)
    other.write_bytes(b"another's")
    report = lzy.restore(program)
    assert any(str(other) in note and "another file" in note for note in report["notes"])
    assert program.ask("after") == "begun"
    assert other.read_bytes() == b"another's"


@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["host", "new"])
def test_files_removed_meanwhile(start: Start, lzy: CommandLine, namespace: str) -> None:
    """A tree is killed, all its names with it; its checkpoint holds what there was, and whole."""
    program = start("tree_names").await_ready()
    lzy.dump(program, "image", "--leave-running")
    assert program.ask("spoil") == "spoiled"
    program.end()
    folder = SHM / f"lzy-test-{program.child.pid}-folder"
    for path in [folder / "inner", *(SHM / name for name in ours(program))]:
        path.rmdir() if path.is_dir() else path.unlink()
    lzy.restore(program, "image", "--pid-namespace", namespace)
    program.prove()


def test_what_a_killed_tree_left_is_as_its_image_says(
    start: Start, lzy: CommandLine, names: Callable[[str], Path]
) -> None:
    """Byte for byte, of an older checkpoint, too; and again, though another file has the name."""
    path = names("block")
    program = hold(start, path, 300 * PAGE)
    for word in ("word 1", "word 2", "word 3"):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[200 * PAGE :] = word.encode() * 20 + bytes(100 * PAGE - 20 * len(word))
        program.ask(word)
        lzy.dump(program, "image", "--leave-running")
    program.ask("last")
    for name, word in (("image@2", b"word 2"), ("image@3", b"word 3"), ("image@1", b"word 1")):
        expected = word + bytes(200 * PAGE - len(word)) + word * 20
        expected += bytes(300 * PAGE - len(expected))
        assert content_in(lzy, name.removesuffix("@1"), path) == expected
        program.end()
        report = lzy.succeed("restore", name, "--store", str(lzy.store))
        program.adopt(report["pid"])
        assert path.read_bytes() == expected
        assert program.ask("change") == word.decode()
        if word == b"word 2":
            path.unlink()  # the next makes it anew, and the one after it takes that over


def test_a_copy_has_memory_of_its_own(
    start: Start, lzy: CommandLine, silence: tuple[str, ...]
) -> None:
    """Beside the original that lives: neither sees what the other writes; nor its names."""
    program = start("tree_names").await_ready()
    block = SHM / f"lzy-test-{program.pid}-block"
    lzy.dump(program, "image", "--leave-running")
    program.prove()  # it goes on
    now = block.read_bytes()
    report = lzy.succeed("restore", "--copy", "image", "--store", str(lzy.store), *silence)
    first = init_of(report["pid"])
    try:
        inside = Path(f"/proc/{report['pid']}/root")
        copied = Path(f"{inside}{block}")
        assert copied.read_bytes() == content_in(lzy, "image", block) != now
        assert os.stat(copied).st_dev != block.stat().st_dev
        assert f" {block}\n" in Path(f"/proc/{report['pid']}/maps").read_text()
        copied.write_bytes(b"other")
        assert block.read_bytes() == now
        (inside / "dev/shm/lzy-named-new").touch()
        assert not (SHM / "lzy-named-new").exists()
        again = lzy.succeed("dump", str(report["pid"]), "--store", str(lzy.store))
        await_end(report["pid"])
        assert content_in(lzy, again["image"], block) == b"other"
        program.prove()
    finally:
        with suppress(ProcessLookupError):
            os.kill(first, 9)
        await_end(first)


def test_beside_its_original_a_process_has_memory_of_its_own(
    start: Start, lzy: CommandLine, names: Callable[[str], Path], silence: tuple[str, ...]
) -> None:
    """Also if nobody asked for a copy: two lives of one process do not share what it wrote."""
    path = names("block")
    program = hold(start, path)
    program.ask("old")
    lzy.dump(program, "image", "--leave-running")
    program.ask("new")
    error = lzy.fail("restore", "image", "--store", str(lzy.store), "--pid-namespace", "host")
    assert error["kind"] == "busy"
    report = lzy.succeed("restore", "image", "--store", str(lzy.store), *silence)
    try:
        assert any("of its own" in note for note in report["notes"])
        assert Path(f"/proc/{report['pid']}/root{path}").read_bytes()[:3] == b"old"
        assert path.read_bytes()[:3] == b"new"
    finally:
        os.kill(report["pid"], 9)
        await_end(report["pid"])


@pytest.mark.shows("survives", "shared memory by name that others hold: it is joined as it is")
def test_memory_that_others_hold_is_joined(
    start: Start, lzy: CommandLine, names: Callable[[str], Path]
) -> None:
    """It stays when the process ends, and the process finds what they have written since."""
    path = names("block")
    program = hold(start, path)
    with outside(path) as other:
        program.ask("mine")
        report = lzy.dump(program)
        assert any(str(path) in note for note in report["notes"])
        assert other.ask("theirs") == "mine\0\0"
        report = lzy.restore(program)
        assert any(str(path) in note for note in report["notes"])
        assert program.ask("answer") == "theirs"
        assert other.ask("!") == "a"


@pytest.mark.slow
@pytest.mark.shows("survives", "shared memory by name whose other holders have left it since")
def test_what_others_have_left_is_as_they_left_it(
    start: Start, lzy: CommandLine, names: Callable[[str], Path]
) -> None:
    """What was shared at the dump is never older afterwards than what the others wrote."""
    path = names("block")
    program = hold(start, path)
    with outside(path) as other:
        program.ask("mine")
        lzy.dump(program)
        other.ask("theirs")
    lzy.restore(program)
    assert program.ask("answer") == "theirs"


@pytest.mark.shows("refused", "shared memory by name whose name another's memory has by now")
def test_anothers_memory_is_left_alone(
    start: Start, lzy: CommandLine, names: Callable[[str], Path]
) -> None:
    """Whether it is held or not; and what else was to be made is not there after the refusal."""
    path = names("block")
    program = hold(start, path)
    lzy.dump(program)
    assert not path.exists()
    with outside(path, how="create") as other:
        other.ask("theirs")
        error = lzy.fail("restore", "image", "--store", str(lzy.store))
        assert (error["kind"], str(path) in error["message"]) == ("busy", True)
    error = lzy.fail("restore", "image", "--store", str(lzy.store))
    assert error["kind"] == "busy"
    assert path.read_bytes()[:6] == b"theirs"
    copy = lzy.succeed("restore", "--copy", "image", "--store", str(lzy.store), *QUIET)
    await_end(copy["pid"])
    path.unlink()
    lzy.restore(program)
    assert program.ask("new") == "\0\0\0"


def test_a_file_that_was_there_before_stays(
    start: Start, lzy: CommandLine, names: Callable[[str], Path]
) -> None:
    """Who put data there looks for it there; and who has changed it since is not undone."""
    path = names("data")
    path.write_bytes(b"data" * 1024)
    program = hold(start, path, how="join")
    report = lzy.dump(program)
    assert any("stays: " in note for note in report["notes"])
    assert path.read_bytes() == b"data" * 1024
    path.write_bytes(b"DATA" * 1024)
    assert lzy.fail("restore", "image", "--store", str(lzy.store))["kind"] == "busy"
    lzy.restore(program, "image", "--accept-changed-files")
    assert program.ask("more") == "DATA"


@pytest.mark.slow
def test_a_restore_that_fails_leaves_no_names(
    start: Start, lzy: CommandLine, names: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nor is anything taken over by it. One that is killed leaves what the next one uses."""
    one, needed = names("one"), tmp_path / "needed"
    needed.write_text("here")
    text = HOLDER.replace("import mmap", f"needed = open({str(needed)!r}); import mmap")
    command = [sys.executable, "-c", text, str(one), str(PAGE), "create"]
    program = start(command=command).await_ready()
    program.ask("mine")
    lzy.dump(program)
    needed.write_text("changed")
    lzy.fail("restore", "image", "--store", str(lzy.store))
    assert not one.exists()
    needed_as_it_was = ("--accept-changed-files",)
    for stage in ("restore.checked", "restore.threads", "restore.registered"):
        lzy.run("restore", "image", "--store", str(lzy.store), *needed_as_it_was, kill_at=stage)
        assert one.read_bytes()[:4] == b"mine"
    lzy.restore(program, "image", *needed_as_it_was)
    assert program.ask("more") == "mine"


def test_the_next_checkpoint_stores_what_was_written(
    start: Start, lzy: CommandLine, names: Callable[[str], Path]
) -> None:
    """Of 24 MiB with a name the second stores no more than the page that changed."""
    path = names("large")
    size = 24 << 20
    program = hold(start, path, size)
    path.write_bytes(b"-------" + os.urandom(size - 7))
    first = lzy.dump(program, "image", "--leave-running")
    assert size < first["stored_bytes"] < size + (8 << 20)
    program.ask("written")
    second = lzy.dump(program, "image", "--leave-running")
    assert second["stored_bytes"] < 1 << 20
    assert second["snapshot"]
    program.end()
    path.unlink()
    lzy.restore(program, "image@2")
    assert program.ask("-------") == "written"


def test_names_are_told(start: Start, lzy: CommandLine, names: Callable[[str], Path]) -> None:
    """By `lzy show`; and by `--dry-run`, with who holds them besides."""
    path = names("block")
    program = hold(start, path)
    program.ask("x")
    with outside(path) as other:
        foresight: dict[str, Any] = lzy.succeed("dump", str(program.pid), "--dry-run")
        (finding,) = [f for f in foresight["findings"] if str(path) in f["words"]]
        assert str(other.child.pid) in finding["words"]
        assert str(path) not in foresight["open_files"] + foresight["mapped_files"]
    lzy.dump(program)
    shown = lzy.succeed("show", "image", "--store", str(lzy.store))
    assert [o["path"] for o in shown["objects"]] == [str(path)]
