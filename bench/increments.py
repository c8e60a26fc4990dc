"""What a second checkpoint costs beside the first, and what dozing gives and takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure, Floor
from hosting import Command

if TYPE_CHECKING:
    from cases import Bench

SCRIBE = Path(__file__).with_name("scribe.py")
PAGE_BYTES = 4096
MIB = 1 << 20


class Scribe:
    """`scribe.py`, or a program like it, as a child of ours; a context manager."""

    def __init__(self, size_bytes: int, program: Path = SCRIBE, *arguments: str) -> None:
        self.pages = size_bytes // PAGE_BYTES
        self._child = subprocess.Popen(
            [sys.executable, str(program), str(size_bytes), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._child.pid
        self._hear()

    def _hear(self) -> str:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("the scribe has died")
        return line.strip()

    def do(self, order: str) -> float:
        """Have it done; the seconds it took."""
        assert self._child.stdin
        self._child.stdin.write(order + "\n")
        self._child.stdin.flush()
        return int(self._hear()) / 1e9

    def resident_bytes(self) -> int:
        """Its anonymous memory that is in RAM."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no RssAnon")

    def __enter__(self) -> Scribe:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()


def _checkpoint(scribe: Scribe, store: str, *options: str) -> Command:
    return Command("dump", str(scribe.pid), "--leave-running", "--store", store, *options)


def increments(bench: Bench) -> Iterator[Figure]:
    """The second checkpoint after so much was written, as a share of the first."""
    size = bench.size(1024)
    orders = [
        ("idle", "nothing", "rest", 0.05, 0.001),
        ("written_01", "0.1 % in a row", f"write {size // PAGE_BYTES // 1000}", None, None),
        ("written_1", "1 % in a row", f"write {size // PAGE_BYTES // 100}", 0.06, 0.02),
        ("written_10", "10 % in a row", f"write {size // PAGE_BYTES // 10}", None, None),
        ("scattered_01", "0.1 % scattered", f"scatter {size // PAGE_BYTES // 1000}", None, None),
        ("scattered_1", "1 % scattered", f"scatter {size // PAGE_BYTES // 100}", None, None),
        ("scattered_10", "10 % scattered", f"scatter {size // PAGE_BYTES // 10}", None, None),
    ]
    first = Figure("first", f"first checkpoint of {size // MIB} MiB of random words", "s")
    figures = {
        key: (
            Figure(f"second_{key}_s", f"a further one, {what} written: time ÷ first", "share",
                   at_most=most_s),
            Figure(f"second_{key}_bytes", "… bytes stored ÷ first", "share",
                   at_most=most_bytes),
        )
        for key, what, _, most_s, most_bytes in orders
    }  # fmt: skip
    pages = Figure("scattered_1000", "… 1000 scattered pages: bytes stored", "B", at_most=12 * MIB)
    frozen = Figure("second_freeze", "… stands still", "s", at_most=0.010)
    for _ in range(min(bench.repeats, 3)):
        with bench.store() as store, Scribe(size) as scribe:
            begun = _checkpoint(scribe, store).report
            first.values.append(begun["total_s"])
            for key, _, order, _, _ in orders:
                scribe.do(order)
                report = _checkpoint(scribe, store).report
                if not report["base"]:
                    raise RuntimeError(f"no increment: {report['notes']}")
                figures[key][0].values.append(report["total_s"] / begun["total_s"])
                figures[key][1].values.append(report["stored_bytes"] / begun["stored_bytes"])
                frozen.values.append(report["freeze_s"])
            scribe.do("scatter 1000")
            pages.values.append(_checkpoint(scribe, store).report["stored_bytes"])
    yield first
    for pair in figures.values():
        yield from pair
    yield pages
    yield frozen


def tracking(bench: Bench) -> Iterator[Figure]:
    """How much longer a program takes to rewrite all of its memory once it is under account.

    In the first interval all of it is; once it was rewritten, it is left out.
    """
    size = bench.size(512)
    what = f"rewriting {size // MIB} MiB between two checkpoints"
    settled = Figure(
        "tracking", f"{what} ÷ without lzy, from the second interval on", "times", at_most=1.10
    )
    settled_first = Figure("tracking_pass", "… its first pass after a checkpoint alone", "times")
    learning = Figure("tracking_learning", "… in the first interval", "times")
    learning_first = Figure("tracking_first", "… … its first pass alone", "times")
    for _ in range(min(bench.repeats, 3)):
        with bench.store() as store, Scribe(size) as scribe:
            alone = [scribe.do("rewrite") for _ in range(20)]
            for interval in range(6):
                _checkpoint(scribe, store)
                after = [scribe.do("rewrite") for _ in range(20)]
                whole, first = (settled, settled_first) if interval else (learning, learning_first)
                whole.values.append(sum(after) / sum(alone))
                first.values.append(after[0] / statistics.median(alone))
    yield from (settled, settled_first, learning, learning_first)


def dozing(bench: Bench) -> Iterator[Figure]:
    """A gigabyte goes, stays away, and comes back."""
    size = bench.size(1024)
    name = f"{size // MIB} MiB"
    taken = Figure("doze", f"doze, {name} of random words", "s")
    again = Figure("doze_checkpointed", "… with a checkpoint of just before", "s")
    frozen = Figure("doze_freeze", "… stands still at the longest", "s")
    resident = Figure("doze_resident", "… in RAM afterwards", "B", at_most=15 * MIB)
    roused = Figure("rouse", f"rouse, {name}", "B/s")
    first = Figure("doze_touch", "… one page touched while it dozes", "s")
    for _ in range(min(bench.repeats, 3)):
        with bench.store() as store, Scribe(size) as scribe:
            report = Command("doze", str(scribe.pid), "--store", store).report
            taken.values.append(report["total_s"])
            frozen.values.append(report["freeze_s"])
            scribe.do("rest")
            resident.values.append(scribe.resident_bytes())
            first.values.append(scribe.do("write 1"))
            report = Command("rouse", str(scribe.pid), "--store", store).report
            grown = report["resident_after_bytes"] - report["resident_before_bytes"]
            roused.values.append(grown / report["total_s"])
            _checkpoint(scribe, store)
            report = Command("doze", str(scribe.pid), "--store", store).report
            again.values.append(report["total_s"])
    copied = bench.floor("memory_copy")
    roused.floor = Floor("copying memory", copied)
    yield from (taken, again, frozen, resident, first, roused)


CASES = {"increments": increments, "tracking": tracking, "dozing": dozing}
