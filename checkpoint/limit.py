"""Keeps a running process below a resident limit: what is cold goes to the store, and stays away.

It dozes in part. Whenever it has more in memory than it may, a checkpoint of what was written is
taken and the coldest pages go; what is touched comes back. Which pages are cold nobody tells, page
by page, on most machines (`CONFIG_IDLE_PAGE_TRACKING`, DAMON). Three things do, none of which costs
the process more than a fault:

- access bits by mapping: they are cleared (/proc/PID/clear_refs), and proc_pid_smaps(5) counts
  those that are set again; a mapping of which few are is cold;
- what was written since the last round, for the kernel keeps account of that, is not;
- what went and came back is not: each page that goes is a sample (as in Waldspurger's statistical
  sampling, OSDI 2002).

Of what is left the next in order of address goes, like the hand of a clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import proc, tracking
from .content import intersect, join_ranges, own_page_ranges, subtract
from .dense import find_dense
from .doze import doze, resident_bytes
from .errors import LzyError, NotFound
from .history import split_name
from .huge import gather_huge_pages
from .linux import PAGE_BYTES, memory
from .log import read_log
from .waiting import who_waits

if TYPE_CHECKING:
    from .doze import DozeReport
    from .fitness import Progress
    from .store import Store

WHY = "limit"
_AIM = 0.85  # of the limit is left in memory, so that not every page that comes is one too many
_LEAST_BYTES = 1 << 20
_COLD = 0.02  # of the pages of a mapping, touched between two rounds
_ROUNDS_WARM = 4  # for so many rounds what came back is thought to be needed
LOOKS_UNTIL_SETTLED = 5
_CLUSTER_BYTES = 16 * PAGE_BYTES  # as they come back

Range = tuple[int, int]


class Round(NamedTuple):
    """One time that memory went; sizes in bytes, times in seconds."""

    image: str
    resident_before_bytes: int
    resident_after_bytes: int
    dropped_bytes: int
    came_back_bytes: int
    """Of what had gone before; it was touched."""
    stored_bytes: int
    freeze_s: float
    total_s: float


class Heat:
    """What is known of how warm the memory of a process is; addresses are the process's."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._gone: list[Range] = []
        self._back: list[list[Range]] = []
        self._hand = 0
        self._written: list[Range] = []
        self._cold: list[Range] = []
        self.came_back_bytes = 0

    @classmethod
    def load(cls, path: Path, pid: int) -> Heat | None:
        """What `save` wrote of this very process; None where it did not, or no more to be read."""
        heat = cls(pid)
        try:
            told = json.loads(path.read_bytes())
            if told["process"] != [pid, proc.start_time(pid)]:
                return None
            heat._hand = int(told["hand"])
            heat._gone = _as_ranges(told["gone"])
            heat._back = [_as_ranges(back) for back in told["back"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return heat

    def save(self, path: Path) -> None:
        """Keep in `path` what the next round, be it another's, is to know. Loses it if it must."""
        told = {
            "process": [self._pid, proc.start_time(self._pid)],
            "hand": self._hand,
            "gone": self._gone,
            "back": self._back,
        }
        beside = path.with_suffix(".new")
        with contextlib.suppress(OSError):  # it is only about which memory is warm
            path.parent.mkdir(mode=0o700, exist_ok=True)
            beside.write_text(json.dumps(told))
            os.replace(beside, path)

    def look(self) -> None:
        """See what was written, read and brought back since the last round, which then begins anew.

        The process may run: what it does meanwhile is seen the next time.
        """
        vmas = [vma for vma in proc.mappings(self._pid) if vma.kind == "anonymous"]
        there = join_ranges(own_page_ranges(self._pid, vmas))
        back = intersect(there, self._gone)
        self.came_back_bytes = _length(back)
        self._back = [back, *self._back[: _ROUNDS_WARM - 1]]
        self._gone = subtract(self._gone, there)
        self._written = []
        if tracking.find_account(self._pid):
            self._written = join_ranges(tracking.written_ranges(self._pid, vmas))
        touched = proc.referenced_bytes(self._pid)
        self._cold = join_ranges(
            (vma.start, vma.end)
            for vma in vmas
            if touched.get(vma.start, 0) <= _COLD * _length(intersect(there, [vma[:2]]))
        )
        memory.clear_access_bits(proc.witness(self._pid))

    def settle(self) -> int:
        """Put huge pages together where all was written since the last round; how many they were.

        What is under account, or has come back, became small pages at the first touch.
        """
        if not tracking.find_account(self._pid):
            return 0
        vmas = [vma for vma in proc.mappings(self._pid) if vma.kind == "anonymous"]
        return gather_huge_pages(self._pid, find_dense(tracking.written_ranges(self._pid, vmas)))

    def choose(self, ranges: list[Range], wanted_bytes: int) -> list[Range]:
        """The coldest of ascending `ranges`, at least `wanted_bytes` of them if there are."""
        warm = join_ranges(part for back in self._back for part in back)
        tiers = [
            subtract(subtract(intersect(ranges, self._cold), self._written), warm),
            subtract(subtract(ranges, self._written), warm),
            subtract(ranges, warm),
            ranges,
        ]
        chosen: list[Range] = []
        for tier in tiers:
            left = subtract(tier, chosen)
            chosen = join_ranges([*chosen, *self._sweep(left, wanted_bytes - _length(chosen))])
            if _length(chosen) >= wanted_bytes:
                break
        self._gone = join_ranges([*self._gone, *chosen])
        return chosen

    def _sweep(self, ranges: list[Range], wanted_bytes: int) -> Iterator[Range]:
        """So much of `ranges` from the clock's hand on, which goes on from where this ends."""
        ahead = subtract(ranges, [(0, self._hand)])
        for start, end in [*ahead, *subtract(ranges, ahead)]:
            if wanted_bytes <= 0:
                return
            end = min(end, (start + wanted_bytes + _CLUSTER_BYTES - 1) & -_CLUSTER_BYTES)
            yield start, end
            wanted_bytes -= end - start
            self._hand = end


def _as_ranges(told: list[list[int]]) -> list[Range]:
    return join_ranges((int(start), int(end)) for start, end in told)


def _length(ranges: list[Range]) -> int:
    return sum(end - start for start, end in ranges)


def keep_below(
    pid: int,
    store: Store,
    limit_bytes: int,
    *,
    name: str | None = None,
    every_s: float = 1.0,
    once: bool = False,
    progress: Progress | None = None,
    note: Callable[[Round], None] = lambda done: None,
) -> list[Round]:
    """Keep the anonymous memory of process `pid` in RAM below `limit_bytes`, until it ends.

    It is looked at every `every_s` seconds, the first time after one such; with `once` a single
    time. `note` hears of each round. Rounds are as far apart as the last one took twice over, so
    that a limit that does not fit costs a third of the time at most. Raises what a doze raises;
    the process then runs on, some of it away.
    """
    heat = Heat(pid)
    heat.look()
    time.sleep(every_s)  # what is cold shows in what is touched meanwhile
    rounds: list[Round] = []
    unsettled = 0
    while True:
        try:
            resident = resident_bytes(pid)
            began = time.monotonic()
            if resident > limit_bytes:
                done = release(pid, store, limit_bytes, heat, name=name, progress=progress)
                rounds.append(done)
                note(done)
                unsettled = LOOKS_UNTIL_SETTLED
            elif unsettled:
                unsettled -= 1
                heat.settle()
        except NotFound:
            if once or not _has_ended(pid):  # something else was not found
                raise
        if once or _has_ended(pid):
            return rounds
        time.sleep(max(every_s, 2 * (time.monotonic() - began)))


def _has_ended(pid: int) -> bool:
    """Whether it is gone, or a zombie that nobody has waited for yet."""
    try:
        return proc.has_ended(pid)
    except NotFound:
        return True


def release(
    pid: int,
    store: Store,
    limit_bytes: int,
    heat: Heat,
    *,
    name: str | None = None,
    spared: str = "",
    progress: Progress | None = None,
) -> Round:
    """One round: the coldest goes, until less than the limit is left. Raises what a doze raises.

    Checkpoints before its own that were taken for the limit alone are removed, but for `spared`.
    """
    heat.look()
    wanted_bytes = max(resident_bytes(pid) - int(_AIM * limit_bytes), _LEAST_BYTES)
    report: DozeReport = doze(
        pid,
        store,
        name=name,
        why=WHY,
        choose=lambda ranges: heat.choose(ranges, wanted_bytes),
        progress=progress,
    )
    # Ours: what was read for the checkpoint counts as touched.
    memory.clear_access_bits(proc.witness(pid))
    _remove_earlier(store, report.image, spared)
    return Round(
        report.image,
        report.resident_before_bytes,
        report.resident_after_bytes,
        report.dropped_bytes,
        heat.came_back_bytes,
        report.stored_bytes,
        report.freeze_s,
        report.total_s,
    )


def _remove_earlier(store: Store, image: str, spared: str) -> None:
    """Remove the checkpoints before `image` that were taken for the limit alone."""
    session, number = split_name(image)
    for checkpoint in read_log(store, session):
        if checkpoint.number >= number or checkpoint.image == spared:
            continue
        if checkpoint.why == WHY:
            with contextlib.suppress(LzyError):  # a pager has it open still
                if not who_waits(store.path, checkpoint.image):
                    store.remove(checkpoint.image)
