"""Trees of processes are dumped in mid-life and restored; then each is asked to prove its state."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from family import await_rest, find_family_differences, read_family
from living import Case, list_children
from memory_group import MEBIBYTE

if TYPE_CHECKING:
    from living import CommandLine, Program
    from memory_group import MemoryGroup

    Start = Callable[..., Program]


QUICK = [
    Case("tree_commands"),
    Case("tree_descriptors", ("{folder}",)),
    Case("tree_events"),
    Case("tree_groups"),
    Case("tree_heap", ("16",)),
    Case("tree_lineage"),
    Case("tree_locks", ("{folder}",)),
    Case("tree_memory"),
    Case("tree_names"),
    Case("tree_orphans"),
    Case("tree_pipes"),
    Case("tree_sockets", ("{folder}",)),
    Case("tree_storm"),
    Case("tree_workers", ("executor",)),
    Case("tree_workers", ("fork",)),
    Case("tree_workers", ("spawn",)),
    Case("tree_zombies"),
]
# Their imports take seconds.
HEAVY = [Case("tree_loader"), Case("tree_workers", ("loky",))]
ALL = [*QUICK, *HEAVY]

#: What this one changes in files outlasts its first life.
SHARED_WITH_FILES = ("tree_descriptors",)

every_tree = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
quick_trees = pytest.mark.parametrize("case", QUICK, ids=lambda case: case.id)
slow = pytest.mark.slow
both_ways = pytest.mark.parametrize("way", [("--eager",), ()], ids=["eager", "lazy"])


@every_tree
def test_proof_can_fail(start: Start, case: Case) -> None:
    """Nobody dumps it: its proof holds, twice, and fails once it has spoiled its own state."""
    program = start(case.name, *case.arguments).await_ready()
    assert program.ask("spoil") == "spoiled"
    with pytest.raises(AssertionError):
        program.prove()


@slow
@quick_trees
def test_proof_holds_uninterrupted(start: Start, case: Case) -> None:
    """A tree that nobody touches proves its state, twice: what fails elsewhere is lzy's."""
    program = start(case.name, *case.arguments).await_ready()
    program.prove()
    program.prove()


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, marks=[slow] if case in HEAVY and way else [])
        for case in ALL
        for way in (("--eager",), ())
    ],
    ids=lambda value: value.id if isinstance(value, Case) else {(): "lazy"}.get(value, "eager"),
)
def test_restored_tree_proves_its_state(
    start: Start, lzy: CommandLine, case: Case, way: tuple[str, ...]
) -> None:
    """Dumped in mid-life (which ends all of it) and restored, a tree goes on with its pids.

    Eagerly restored it also looks the same as before, in all that /proc and kcmp(2) show.
    """
    program = start(case.name, *case.arguments).await_ready()
    before, family = program.pid, {}
    compares = way == ("--eager",) and case.name != "tree_storm"  # that is never at rest
    if compares:
        assert program.ask("ping") == "pong"
        await_rest(program.pid)
        family = read_family(program.pid)
    lzy.dump(program)
    lzy.restore(program, "image", *way)
    assert program.pid == before
    if compares:
        await_rest(program.pid)
        differences = find_family_differences(family, read_family(program.pid))
        assert not differences, "\n".join(differences)
    program.prove()
    program.prove()


# The ports of the first life stay taken for a minute, as they do for anybody.
@pytest.mark.parametrize(
    "case", [case for case in QUICK if case.name != "tree_sockets"], ids=lambda case: case.id
)
def test_checkpointed_tree_runs_on_and_its_image_is_whole(
    start: Start, lzy: CommandLine, case: Case
) -> None:
    """Left running a tree proves its state; so does its image, in a PID namespace of its own."""
    program = start(case.name, *case.arguments).await_ready()
    before = program.pid
    lzy.dump(program, "image", "--leave-running")
    if case.name in SHARED_WITH_FILES:
        assert program.ask("ping") == "pong"
    else:
        program.prove()
    program.end()
    report = lzy.restore(program, "image", "--pid-namespace", "new")
    assert report["pid_in_namespace"] == before != program.pid
    program.prove()


def test_connections_in_a_new_pid_namespace(start: Start, lzy: CommandLine) -> None:
    """Connections inside a tree are there again also when its processes have other pids."""
    program = start("tree_sockets", "{folder}").await_ready()
    lzy.dump(program)
    lzy.restore(program, "image", "--pid-namespace", "new")
    program.prove()


def test_comparison_can_fail(start: Start) -> None:
    """The comparison sees a process that joins another group, and one descriptor less in common."""
    program = start("tree_groups").await_ready()
    await_rest(program.pid)
    before = read_family(program.pid)
    again = read_family(program.pid)
    assert not find_family_differences(before, again)
    shared = next(n for n, v in again["family"].items() if n.startswith("shares/") and "0)" in v)
    again["family"][shared] = "(1, 1)"
    assert find_family_differences(before, again)
    assert program.ask("spoil") == "spoiled"
    await_rest(program.pid)
    assert find_family_differences(before, read_family(program.pid))


def sum_memory(program: Program, field: str) -> int:
    """A line of /proc/PID/smaps_rollup, of all processes together, in bytes."""
    total = 0
    for pid in [program.pid, *list_children(program.pid)]:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
        assert found
        total += int(found[1]) << 10
    return total


def test_dump_makes_no_copies_of_shared_memory(
    group: MemoryGroup, start: Start, lzy: CommandLine
) -> None:
    """To read what is shared copy-on-write makes none of it private: nobody runs out of memory."""
    path = Path(__file__).parent / "programs" / "tree_heap.py"
    program = start(command=group.inside([sys.executable, str(path), "64"])).await_ready()
    group.limit(group.needed_bytes + 24 * MEBIBYTE)
    lzy.dump(program)
    lzy.restore(program, "image", "--eager")
    program.prove()


@both_ways
def test_memory_is_shared_again(start: Start, lzy: CommandLine, way: tuple[str, ...]) -> None:
    """What four children share with their parent is in the image once, and shared afterwards."""
    program = start("tree_heap", "32").await_ready()
    before = sum_memory(program, "Pss")
    alone = sum_memory(program, "Private_Dirty")  # of each of the five, above all a MiB or two
    report = lzy.dump(program)
    assert report["stored_bytes"] < 1.2 * (32 << 20) + alone
    lzy.restore(program, "image", *way)
    program.prove()  # and has all of it come in
    assert sum_memory(program, "Pss") < 1.2 * before


@both_ways
def test_checkpoints_of_a_tree_cost_what_changed(
    start: Start, lzy: CommandLine, way: tuple[str, ...]
) -> None:
    """Of each process only what it wrote is read: before a hibernation, and after the wake."""
    program = start("tree_heap", "16").await_ready()
    for life in range(2):
        first = lzy.dump(program, "tree", "--leave-running")
        assert first["base"] is None
        assert first["written_bytes"] > 16 * MEBIBYTE
        again = lzy.dump(program, "tree", "--leave-running")
        assert again["base"] == first["image"]
        assert again["written_bytes"] < MEBIBYTE
        program.prove()
        last = lzy.dump(program, "tree")
        assert last["base"] == again["image"]
        assert last["written_bytes"] < 8 * MEBIBYTE
        assert last["stored_bytes"] < 2 * MEBIBYTE
        lzy.restore(program, last["image"], *way)
        if life:
            program.prove()
