"""The kernel's list of mappings, read without a look at their pages, says what smaps says."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from subjects import Subject, living

from lzy.checkpoint import interrogate, mapping_flags, proc
from lzy.checkpoint.dump import dump
from lzy.checkpoint.linux import bpf
from lzy.checkpoint.store import Store
from lzy.checkpoint.tracee import stopped

ADVICE = {1: "rr", 2: "sr", 10: "dc", 14: "hg", 15: "nh", 16: "dd", 18: "wf"}
"""madvise(2), and what smaps calls it afterwards"""

ADVISED = """
places = {}
for advice in map(int, sys.argv[1:]):
    place = places[advice] = allocate(1 << 20)
    ctypes.memset(place, 1, 1 << 20)
say("ready"); say(*places.values())
for word in iter(hear, ""):
    advice = int(word)
    say(libc.madvise(places[advice], 1 << 20, advice))
"""

needs_bpf = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/sys/kernel/btf/vmlinux"),
    reason="to read the kernel's list takes CAP_BPF, CAP_PERFMON and its type information",
)


find_layout = functools.cache(bpf.find_layout)


@pytest.fixture(autouse=True)
def knows_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every process counts as large, and what numbers mean is not known yet."""
    monkeypatch.setenv("LZY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(mapping_flags, "LARGE_BYTES", 0)
    monkeypatch.setattr(mapping_flags, "_seen", [])
    with contextlib.suppress(OSError):
        mapping_flags._remember(find_layout(), {})
    yield
    for seen in mapping_flags._seen:
        if seen.mappings:
            seen.mappings.close()


def same_as_smaps(subject: Subject) -> bool:
    """Whether flags could be told without smaps; if so, they are what smaps says."""
    found = mapping_flags.look_closely(subject.pid)
    if found is None:
        return False
    vmas = [vma for vma in proc.mappings(subject.pid) if vma.kind != "vsyscall"]
    assert found[0] == {vma.start: vma.flags for vma in vmas}
    assert found[1] == proc.memory_policies(subject.pid)
    places, looked = mapping_flags.look(subject.pid)
    assert [vma for vma in looked if vma.kind != "vsyscall"] == vmas
    assert places == proc.read_bytes(subject.pid, "maps")
    return True


@needs_bpf
def test_flags_are_what_smaps_says() -> None:
    """Of every mapping, whatever is advised while nobody looks; new words are learnt by a look."""
    with living(ADVISED, *map(str, ADVICE)) as subject:
        places = dict(zip(ADVICE, map(int, subject.hear().split()), strict=True))
        assert not same_as_smaps(subject)
        mapping_flags.look(subject.pid)
        assert same_as_smaps(subject)
        for advice, word in ADVICE.items():
            assert subject.ask(str(advice)) == "0"
            assert not same_as_smaps(subject), "flags were told that nobody can know yet"
            vmas = {vma.start: vma.flags for vma in mapping_flags.mappings(subject.pid)}
            assert word in vmas[places[advice]]
            assert same_as_smaps(subject)
        written = (Path(os.environ["LZY_HOME"]) / "run" / "mapping-flags.json").read_bytes()
        assert len(json.loads(written)["words"]) > len(ADVICE)


@needs_bpf
@pytest.mark.parametrize("count", [700, 1600, 3000])
def test_many_mappings(count: int) -> None:
    """However many there are: the kernel gives them out some eight hundred at a time."""
    many = f"for n in range({count}): allocate(4096, 1 + 2 * (n % 2))\nsay('ready'); hear()"
    with living(many) as subject:
        mapping_flags.look(subject.pid)
        assert same_as_smaps(subject)
        assert len(mapping_flags.mappings(subject.pid)) > count


@needs_bpf
def test_what_is_learnt_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next lzy; not after the machine has begun anew, with another kernel perhaps."""
    with living(ADVISED, "10") as subject:
        mapping_flags.look(subject.pid)
        monkeypatch.setattr(mapping_flags, "_seen", [])
        assert same_as_smaps(subject)
        path = Path(os.environ["LZY_HOME"]) / "run" / "mapping-flags.json"
        told = json.loads(path.read_bytes())
        path.write_text(json.dumps(told | {"boot_id": "another"}))
        monkeypatch.setattr(mapping_flags, "_seen", [])
        assert not same_as_smaps(subject)
        assert json.loads(path.read_bytes())["boot_id"] == proc.boot_id()


@needs_bpf
def test_policies_are_looked_at() -> None:
    """Where memory has a NUMA policy of its own only numa_maps tells which."""
    bound = ADVISED.replace(
        'say("ready")',
        "mask = ctypes.c_ulong(1)\n"
        "bind = [ctypes.c_long(n) for n in (237, places[10], 1 << 20, 2)]\n"
        "assert libc.syscall(*bind, ctypes.byref(mask), ctypes.c_long(64), ctypes.c_long(0)) == 0\n"
        'say("ready")',
    )
    with living(bound, "10") as subject:
        place = int(subject.hear())
        mapping_flags.look(subject.pid)
        assert mapping_flags.look_closely(subject.pid) is None
        flags, policies = mapping_flags.look_long(subject.pid)
        assert policies[f"{place:x}"].startswith("bind")
        assert place in flags


@needs_bpf
def test_policies_are_told_by_the_process_itself() -> None:
    """Asked where it may have some, it tells what numa_maps says of all of its memory."""
    several = "mask = ctypes.c_ulong(1)\n"
    for number, mode in enumerate([1, 2, 3, 4, 5, 2 | 1 << 15, 3 | 1 << 14]):
        nodes = "None" if mode == 4 else "ctypes.byref(mask)"
        several += (
            f"place = places[10] + {number << 16}\n"
            f"bind = [ctypes.c_long(n) for n in (237, place, 1 << 15, {mode})]\n"
            f"libc.syscall(*bind, {nodes}, ctypes.c_long(64), ctypes.c_long(0))\n"
        )
    with living(ADVISED.replace('say("ready")', several + 'say("ready")'), "10") as subject:
        subject.hear()
        mapping_flags.look(subject.pid)
        with stopped(subject.pid) as tracee:
            tracee.prepare()
            places = mapping_flags.find_places_of_policies(subject.pid)
            assert places
            told = interrogate.ask_policies(tracee, places)
            tracee.unmap_arena()
            seen = mapping_flags.look_closely(subject.pid, told)
        assert told == proc.memory_policies(subject.pid)
        assert len(told) == 7
        assert seen
        assert seen[1] == told


@needs_bpf
def test_dump_tells_what_was_advised(tmp_path: Path) -> None:
    """An image has the advice of the moment of its taking, though an earlier one had none."""
    with (
        Store.open(tmp_path / "store", create=True) as store,
        living(ADVISED, *map(str, ADVICE)) as subject,
    ):
        places = dict(zip(ADVICE, map(int, subject.hear().split()), strict=True))
        dump(subject.pid, store, name="one", leave_running=True)
        for advice in ADVICE:
            assert subject.ask(str(advice)) == "0"
        for name, leave_running in (("two", True), ("three", False)):
            report = dump(subject.pid, store, name=name, leave_running=leave_running)
            with store.load(report.image) as image:
                flags = {vma["start"]: vma["flags"] for vma in image.document["vmas"]}
            for advice, word in ADVICE.items():
                assert word in flags[places[advice]]


def test_where_nothing_can_be_loaded_smaps_is_read() -> None:
    """A kernel whose types are not where they were said to be loads nothing."""
    mapping_flags._remember(bpf.Layout(1, (0, 8, 32, 40, -1)), {})
    with living(ADVISED, "10") as subject:
        assert mapping_flags.look_closely(subject.pid) is None
        found = mapping_flags.mappings(subject.pid)
        assert found == proc.mappings(subject.pid)
