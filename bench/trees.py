"""What each further process of a tree costs that shares its memory with its parent."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure
from hosting import Command, Subject

if TYPE_CHECKING:
    from cases import Bench

FLOCK = Path(__file__).with_name("flock.py")
MIB = 1 << 20
_MOST_OF_ONE = 0.2


def trees(bench: Bench) -> Iterator[Figure]:
    """Trees of 1, 10 and 50 processes: stands still, dumped and ended, restored eagerly."""
    size = bench.size(64)
    medians: dict[int, list[float]] = {}
    for count in (1, 10, 50):
        what = "one process" if count == 1 else f"a tree of {count}"
        frozen = Figure(f"tree_{count}_freeze", f"{what} stands still, {size // MIB} MiB", "s")
        dumped = Figure(f"tree_{count}_dump", "… dumped and ended", "s")
        stored = Figure(f"tree_{count}_bytes", "… stored", "B")
        restored = Figure(f"tree_{count}_restore", "… restored, all of its memory loaded", "s")
        for _ in range(bench.repeats):
            with (
                bench.store() as store,
                Subject(bench.folder / "subject", str(count), size, program=FLOCK) as subject,
            ):
                before = subject.ask(signal.SIGUSR1, "sum")
                report = Command("dump", str(subject.pid), "--store", store, "--name", "a").report
                dumped.values.append(report["total_s"])
                stored.values.append(report["stored_bytes"])
                subject.reap()
                report = Command("restore", "--store", store, "--eager").report
                restored.values.append(report["first_instruction_s"])
                if subject.ask(signal.SIGUSR1, "sum") != before:
                    raise RuntimeError("the memory is not what it was")
                command = Command("dump", str(subject.pid), "--store", store, "--leave-running")
                frozen.values.append(command.report["freeze_s"])
        yield from (frozen, dumped, stored, restored)
        medians[count] = [statistics.median(f.values) for f in (frozen, dumped, stored, restored)]
    for index, (key, words) in enumerate(
        (
            ("freeze", "stands still"),
            ("dump", "is dumped"),
            ("bytes", "is stored"),
            ("restore", "is restored"),
        )
    ):
        lone = medians[1][index]
        further = (medians[50][index] - lone) / 49
        yield Figure(
            f"tree_further_{key}",
            f"what each further process adds to how it {words} ÷ a lone one",
            "share",
            [further / lone],
            at_most=_MOST_OF_ONE,
        )


def tree_increments(bench: Bench) -> Iterator[Figure]:
    """A further checkpoint of a tree of ten, each of which has written so much since the last."""
    size = bench.size(64)
    first = Figure("tree_first", f"first checkpoint of a tree of 10, {size // MIB} MiB", "s")
    figures = {
        key: (
            Figure(f"tree_second_{key}_s", f"a further one, {what}: time ÷ first", "share"),
            Figure(f"tree_second_{key}_read", "… memory stored ÷ first", "share"),
            Figure(f"tree_second_{key}_bytes", "… bytes stored ÷ first", "share"),
        )
        for key, what in (("idle", "nothing written"), ("written_1", "1 % by each, in a row"))
    }
    for _ in range(min(bench.repeats, 3)):
        with (
            bench.store() as store,
            Subject(bench.folder / "subject", "10", size, program=FLOCK) as subject,
        ):
            command = "dump", str(subject.pid), "--leave-running", "--store", store
            begun = Command(*command).report
            first.values.append(begun["total_s"])
            Command(*command)  # what a first one does besides, each process has done now
            for key, figure in figures.items():
                if key != "idle":
                    subject.ask(signal.SIGUSR2, "wrote")
                report = Command(*command).report
                if not report["base"]:
                    raise RuntimeError(f"no increment: {report['notes']}")
                for part, what in zip(
                    figure, ("total_s", "written_bytes", "stored_bytes"), strict=True
                ):
                    part.values.append(report[what] / begun[what])
    yield first
    for figure in figures.values():
        yield from figure


CASES = {"trees": trees, "tree-increments": tree_increments}
