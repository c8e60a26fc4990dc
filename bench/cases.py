"""Each claim about speed or memory, and how it is measured."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import increments
import limits
import trees
from figures import Figure, Floor
from floors import measure
from hosting import Command, Subject, follow_to_the_end, memory_with_children, watching

MIB = 1 << 20


@dataclass
class Bench:
    """Where and how much: `scale` divides all sizes, `repeats` is the number of samples."""

    folder: Path
    scale: int
    repeats: int
    say: Callable[[str], None]

    def size(self, mebibytes: int) -> int:
        return mebibytes * MIB // self.scale

    def floor(self, name: str, *arguments: str) -> float:
        """The median of a floor."""
        return statistics.median(measure(name, *arguments))

    @contextlib.contextmanager
    def store(self) -> Iterator[str]:
        """A new store's folder, gone afterwards."""
        folder = self.folder / "store"
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def subject(self, kind: str, mebibytes: int) -> Subject:
        return Subject(self.folder / "subject", kind, self.size(mebibytes) if mebibytes else 0)


def named(bench: Bench, mebibytes: int) -> str:
    size = bench.size(mebibytes) // MIB
    return f"{size >> 10} GiB" if size >= 1024 and not size % 1024 else f"{size} MiB"


# -- dump --------------------------------------------------------------------------------------


def freeze(bench: Bench) -> Iterator[Figure]:
    """How long a running process stands still for a checkpoint, as it sees it itself."""
    felt = Figure(
        "freeze_felt", "… longest pause that the program sees from the command's start to its end",
        "s",
    )  # fmt: skip
    told = Figure(
        "freeze", f"stands still for `dump --leave-running`, {named(bench, 512)} of numpy", "s",
        at_most=0.010,
    )  # fmt: skip
    with bench.store() as store, bench.subject("random", 512) as subject:
        alone: list[float] = []
        forks = [int(value) / 1e9 for value in subject.ask(signal.SIGHUP, "forks")]
        for _ in range(bench.repeats):
            alone_ns = time.monotonic_ns()
            time.sleep(1)
            alone.append(subject.longest_gap_s(alone_ns, time.monotonic_ns()))
            command = Command("dump", str(subject.pid), "--leave-running", "--store", store)
            ended_ns = time.monotonic_ns()
            told.values.append(command.report["freeze_s"])
            felt.values.append(subject.longest_gap_s(command.began_ns, ended_ns))
            if not command.report["snapshot"]:
                raise RuntimeError(f"no snapshot: {command.report['notes']}")
    told.floor = Floor("its own fork(2)", statistics.median(forks))
    felt.floor = Floor("longest pause in 1 s without lzy", statistics.median(alone))
    yield told
    yield felt


def checkpoint_memory(bench: Bench) -> Iterator[Figure]:
    """What a checkpoint adds to the memory of a process that changes none of its own meanwhile."""
    grown = Figure(
        "checkpoint_memory",
        f"memory that a checkpoint of {named(bench, 512)} adds for its time",
        "B",
    )
    with bench.store() as store, bench.subject("random", 512) as subject:
        before = memory_with_children(subject.pid)
        for _ in range(min(bench.repeats, 3)):
            with watching(subject.pid) as seen:
                Command("dump", str(subject.pid), "--leave-running", "--store", store)
            grown.values.append(max(seen) - before)
    yield grown


def dump_random(bench: Bench) -> Iterator[Figure]:
    """512 MiB that do not compress."""
    yield from _dump(bench, "random", 512, bench.repeats, at_least=1e9)


def dump_half(bench: Bench) -> Iterator[Figure]:
    """2 GiB, half zeros that were written, half one mebibyte again and again."""
    yield from _dump(bench, "half", 2048, min(bench.repeats, 3), at_least=2.5e9)


def dump_frame(bench: Bench) -> Iterator[Figure]:
    """A data frame of mixed columns."""
    yield from _dump(bench, "frame", 512, bench.repeats, at_least=0.9e9, at_most_share=0.35)


def _dump(
    bench: Bench,
    kind: str,
    mebibytes: int,
    repeats: int,
    *,
    at_least: float,
    at_most_share: float | None = None,
) -> Iterator[Figure]:
    what = {"random": "random", "half": "half zeros, half repeated", "frame": "data frame"}[kind]
    what = f"dump, {named(bench, mebibytes)} {what}"
    rate = Figure(f"dump_{kind}", what, "B/s", at_least=at_least)
    command_rate = Figure(f"dump_{kind}_command", "… from the command's start to its end", "B/s")
    share = Figure(f"dump_{kind}_share", "… stored, of its bytes", "share", at_most=at_most_share)
    peak = Figure(f"dump_{kind}_peak", "… peak memory of lzy", "B", at_most=200 * MIB)
    for _ in range(repeats):
        with bench.store() as store, bench.subject(kind, mebibytes) as subject:
            command = Command("dump", str(subject.pid), "--store", store)
            subject.reap()
            report = command.report
            rate.values.append(report["raw_bytes"] / report["total_s"])
            command_rate.values.append(report["raw_bytes"] / command.wall_s)
            share.values.append(report["stored_bytes"] / report["raw_bytes"])
            peak.values.append(command.peak_bytes)
    sample = str(min(bench.size(mebibytes), 64 * MIB))
    rate.floor = {
        "random": lambda: Floor("write + fsync", bench.floor("disk_write", *_disk(bench))),
        "half": lambda: Floor("memory copy", bench.floor("memory_copy")),
        "frame": lambda: Floor("zstd -1, a thread", bench.floor("zstd", kind, sample)),
    }[kind]()
    share.floor = Floor("zstd -1", bench.floor("zstd_share", kind, sample))
    yield rate
    yield command_rate
    yield share
    yield peak


def _disk(bench: Bench) -> tuple[str, str]:
    return str(bench.folder), str(bench.size(512))


# -- restore -----------------------------------------------------------------------------------


def wake(bench: Bench) -> Iterator[Figure]:
    """The first thing a restored program does, and when it has read all it had: lazily."""
    small, large = 128, 4096
    found: dict[int, dict[str, Figure]] = {}
    for mebibytes in (small, large):
        name = named(bench, mebibytes)
        figures = {
            "resident": Figure(
                f"first_resident_{mebibytes}",
                f"first instruction after a lazy wake, {name}, in a resident process",
                "s", at_most=0.030,
            ),
            "command": Figure(
                f"first_command_{mebibytes}", "… by a fresh `lzy restore`", "s", at_most=0.120
            ),
            "read": Figure(
                f"all_read_{mebibytes}", f"everything read after a lazy wake, {name} random", "s"
            ),
            "gone": Figure(f"pager_gone_{mebibytes}", "… and the pager has left", "s"),
            "peak": Figure(f"pager_peak_{mebibytes}", "… peak memory of the pager", "B",
                           at_most=200 * MIB),
        }  # fmt: skip
        repeats = bench.repeats if mebibytes == small else min(bench.repeats, 5)
        with bench.store() as store, bench.subject("random", mebibytes) as subject:
            took_s, checksum = _read(subject)
            Command("dump", str(subject.pid), "--store", store)
            subject.reap()
            for number in range(2 * repeats):
                how = ("resident", "command")[number % 2]
                began_ns, pager = (_wake_here if how == "resident" else _wake_by_command)(store)
                # Asked for only now: the signal must not come before its very first action.
                first_ns = subject.first_action_after(began_ns)
                figures[how].values.append((first_ns - began_ns) / 1e9)
                now_ns, _, again = subject.ask(signal.SIGUSR1, "read")
                if int(again) != checksum:
                    raise RuntimeError("the memory is not what it was")
                if pager:
                    peak = follow_to_the_end(pager)
                    if peak:
                        figures["peak"].values.append(peak)
                if how == "resident":
                    figures["read"].values.append((int(now_ns) - began_ns) / 1e9)
                    figures["gone"].values.append((time.monotonic_ns() - began_ns) / 1e9)
                subject.end()
        copy_s = bench.size(mebibytes) / bench.floor("memory_copy")
        figures["read"].floor = Floor("memory copy + its read", copy_s + took_s)
        figures["command"].floor = Floor("python -c pass", bench.floor("python_start"))
        found[mebibytes] = figures
        yield from figures.values()
    for how in ("resident", "command"):
        ratio = found[large][how].median / found[small][how].median
        yield Figure(
            f"first_{how}_ratio",
            f"first instruction, {named(bench, large)} against {named(bench, small)}, {how}",
            "times", [ratio], at_most=1.3,
        )  # fmt: skip


def eager(bench: Bench) -> Iterator[Figure]:
    """All memory before the first instruction."""
    for kind, mebibytes in (("random", 512), ("frame", 512)):
        rate = Figure(
            f"eager_{kind}",
            f"eager restore, {named(bench, mebibytes)} {kind}, in a resident process",
            "B/s", at_least=1.5e9,
        )  # fmt: skip
        with bench.store() as store, bench.subject(kind, mebibytes) as subject:
            _, checksum = _read(subject)
            raw_bytes = Command("dump", str(subject.pid), "--store", store).report["raw_bytes"]
            subject.reap()
            for _ in range(bench.repeats):
                began_ns, _ = _wake_here(store, eager=True)
                first_ns = subject.first_action_after(began_ns)
                rate.values.append(raw_bytes / ((first_ns - began_ns) / 1e9))
                if _read(subject)[1] != checksum:
                    raise RuntimeError("the memory is not what it was")
                subject.end()
        rate.floor = Floor("memory copy", bench.floor("memory_copy"))
        yield rate


def faults(bench: Bench) -> Iterator[Figure]:
    """First touches of pages that are not there, in random order, while the rest streams in."""
    middle = Figure("fault", "fault on a missing page, 64 KiB windows, p50", "s", at_most=60e-6)
    late = Figure("fault_p99", "… p99", "s")
    with bench.store() as store, bench.subject("random", 512) as subject:
        Command("dump", str(subject.pid), "--store", store, "--window-size", "64K")
        subject.reap()
        for _ in range(bench.repeats):
            _, pager = _wake_here(store)
            taken = sorted(int(value) / 1e9 for value in subject.ask(signal.SIGUSR2, "faults"))
            middle.values.append(taken[len(taken) // 2])
            late.values.append(taken[len(taken) * 99 // 100])
            follow_to_the_end(pager)
            subject.end()
    middle.floor = Floor("a byte there and back by pipes", bench.floor("round_trip"))
    yield middle
    yield late


def empty(bench: Bench) -> Iterator[Figure]:
    """A Python process with nothing in it: what dump and restore cost by themselves."""
    dumped = Figure("empty_dump", "dump of a Python process that imports nothing, command", "s")
    woken = Figure("empty_restore", "… its restore, command, to the first instruction", "s")
    resident = Figure("empty_resident", "… its restore in a resident process", "s")
    for _ in range(bench.repeats):
        with bench.store() as store, bench.subject("empty", 0) as subject:
            dumped.values.append(Command("dump", str(subject.pid), "--store", store).wall_s)
            subject.reap()
            for figure, start in ((woken, _wake_by_command), (resident, _wake_here)):
                began_ns, pager = start(store)
                figure.values.append((subject.first_action_after(began_ns) - began_ns) / 1e9)
                if pager:
                    follow_to_the_end(pager)
                subject.end()
    floor = Floor("python -c pass", bench.floor("python_start"))
    for figure in (dumped, woken, resident):
        figure.floor = floor
        yield figure


def kernel(bench: Bench) -> Iterator[Figure]:
    """An idle ipykernel with pandas imported: asleep, and awake to its client's next cell."""
    from notebook import Notebook

    dumped = Figure("kernel_dump", "idle ipykernel with pandas: dump, command", "s")
    stored = Figure("kernel_stored", "… stored", "B")
    reply = Figure("kernel_reply", "… first reply to its client after `lzy restore` began", "s")
    anew = Figure("kernel_start", "… for comparison: a new one, ready and pandas imported", "s")
    for _ in range(min(bench.repeats, 5)):
        folder = bench.folder / "kernel"
        folder.mkdir()
        began = time.monotonic()
        with bench.store() as store:
            notebook = Notebook(folder)
            try:
                notebook.run("import pandas; frame = pandas.DataFrame({'a': range(1000)})")
                anew.values.append(time.monotonic() - began)
                command = Command("dump", str(notebook.pid), "--store", store)
                dumped.values.append(command.wall_s)
                stored.values.append(command.report["stored_bytes"])
                notebook.process.wait()
                began = time.monotonic()
                report = Command("restore", "--store", store, "--pid-namespace", "host").report
                if notebook.run("print(frame.a.sum())") != "499500":
                    raise RuntimeError("the kernel is not what it was")
                reply.values.append(time.monotonic() - began)
                if report["pager_pid"]:
                    follow_to_the_end(report["pager_pid"])
            finally:
                notebook.close()
                shutil.rmtree(folder)
    for figure in (dumped, stored, reply):
        if figure.unit == "s":
            figure.floor = Floor("starting a new one", anew.median)
        yield figure


# -- what comes next ---------------------------------------------------------------------------

CELL = Path(__file__).with_name("cell.py")
_RUNS = {1 << 10: "64 KiB–1 MiB", 16 << 10: "64 KiB–16 MiB"}


def first_cell(bench: Bench) -> Iterator[Figure]:
    """The cell that a program runs the moment it wakes, with and without knowing its order.

    Known is what two wakes before it have taught. The cell is asked for as soon as the restore
    returns: nothing has had time to come in behind anybody's back.
    """
    name = named(bench, 2048)
    for most_run_kib, runs in _RUNS.items():
        without = Figure(
            f"cell_without_{most_run_kib}",
            f"first cell after a wake, reads 10 % of {name} in runs of {runs}: order unknown",
            "s",
        )
        known = Figure(f"cell_with_{most_run_kib}", "… order known from two wakes before", "s")
        with (
            bench.store() as store,
            Subject(
                bench.folder / "subject", str(most_run_kib), bench.size(2048), program=CELL
            ) as subject,
        ):
            resident_ns, checksum = map(int, subject.ask(signal.SIGUSR1, "cell"))
            Command("dump", str(subject.pid), "--store", store)
            subject.reap()
            for _ in range(bench.repeats):
                for figure in (without, None, known):
                    if figure is without:
                        shutil.rmtree(Path(store) / "hints", ignore_errors=True)
                    _, pager = _wake_here(store)
                    taken_ns, found = map(int, subject.ask(signal.SIGUSR1, "cell"))
                    if found != checksum:
                        raise RuntimeError("the memory is not what it was")
                    if figure is not None:
                        figure.values.append(taken_ns / 1e9)
                    follow_to_the_end(pager)
                    subject.end()
        without.floor = known.floor = Floor("the same, all being there", resident_ns / 1e9)
        yield without
        yield known
        yield Figure(
            f"cell_ratio_{most_run_kib}", "… how much sooner with it", "times",
            [without.median / known.median], at_least=2.0,
        )  # fmt: skip


def everything(bench: Bench) -> Iterator[Figure]:
    """A woken process that touches nothing: when all is in, against a restore that waits for it.

    And what huge pages give that are put together again behind it.
    """
    name = named(bench, 2048)
    at_once = Figure("eager_2048", f"eager restore, {name}, in a resident process", "s")
    behind = Figure("all_in_2048", "… lazy wake until all is in, nothing touched", "s")
    small = Figure("leap_small", "65536 words, each of another page: from 4 KiB pages", "s")
    huge = Figure("leap_huge", "… once the pager has put huge pages together", "s")
    gathered = Figure("gathered", "… which it has, after all was in,", "s")
    size = bench.size(2048)
    with (
        bench.store() as store,
        Subject(bench.folder / "subject", "1024", size, program=CELL) as subject,
    ):
        Command("dump", str(subject.pid), "--store", store)
        subject.reap()
        for _ in range(bench.repeats):
            began_ns, _ = _wake_here(store, eager=True)
            at_once.values.append((time.monotonic_ns() - began_ns) / 1e9)
            subject.end()
            began_ns, pager = _wake_here(store)
            _await_all_in(subject.pid)
            behind.values.append((time.monotonic_ns() - began_ns) / 1e9)
            os.kill(pager, signal.SIGSTOP)
            small.values.append(int(subject.ask(signal.SIGHUP, "leap")[0]) / 1e9)
            began_ns = time.monotonic_ns()
            os.kill(pager, signal.SIGCONT)
            follow_to_the_end(pager)
            gathered.values.append((time.monotonic_ns() - began_ns) / 1e9)
            huge.values.append(int(subject.ask(signal.SIGHUP, "leap")[0]) / 1e9)
            subject.end()
    at_once.floor = behind.floor = Floor("memory copy", size / bench.floor("memory_copy"))
    yield at_once
    yield behind
    yield Figure(
        "all_in_ratio", "… lazy against eager", "times", [behind.median / at_once.median],
        at_most=1.2,
    )  # fmt: skip
    yield small
    yield huge
    yield gathered


def _await_all_in(pid: int) -> None:
    """Until the pager of `pid` has nothing left to bring in and has left the process alone."""
    from lzy.checkpoint.home import run_directory
    from lzy.checkpoint.journal import journal_path

    journal = journal_path(run_directory(), pid)
    deadline = time.monotonic() + 300
    while journal.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("not all of the memory comes in")
        time.sleep(0.001)


# -- ways to wake ------------------------------------------------------------------------------


def _read(subject: Subject) -> tuple[float, int]:
    """Seconds that reading all of its memory takes, and the checksum."""
    _, took_ns, checksum = subject.ask(signal.SIGUSR1, "read")
    return int(took_ns) / 1e9, int(checksum)


def _wake_here(store: str, *, eager: bool = False) -> tuple[int, int]:
    """Restore in this process, as something that is resident would; (moment before, pager)."""
    from lzy.checkpoint.restore import restore
    from lzy.checkpoint.store import Store

    began_ns = time.monotonic_ns()
    opened: Any = Store.open(Path(store))
    image = opened.load()
    report = restore(image, eager=eager, pid_namespace="host")
    image.close()
    opened.close()
    return began_ns, report.pager_pid or 0


def _wake_by_command(store: str) -> tuple[int, int]:
    """Restore by the command; (moment before its start, pager)."""
    command = Command("restore", "--store", store, "--pid-namespace", "host")
    return command.began_ns, command.report["pager_pid"] or 0


CASES: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "freeze": freeze,
    "checkpoint-memory": checkpoint_memory,
    "dump-random": dump_random,
    "dump-half": dump_half,
    "dump-frame": dump_frame,
    "wake": wake,
    "eager": eager,
    "faults": faults,
    "empty": empty,
    "kernel": kernel,
    "first-cell": first_cell,
    "everything": everything,
    **increments.CASES,
    **limits.CASES,
    **trees.CASES,
}
