"""What a dump of a process would refuse, cut and change, told beforehand, all of it at once.

The process and its descendants are stopped for the look, as long as reading their descriptors
takes; nothing is run in them and nothing is written. How much would be stored is estimated from a
sample of their memory, read while they run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from blake3 import blake3

from . import interrogate, mapping_flags, proc
from .codec import Encoder
from .content import ProcessPages, own_page_ranges, windows_of
from .errors import KernelError, LzyError, NotFound, Unsupported
from .filters import describe_filters
from .fitness import PASSES_WITHIN_S, PAUSE_S, refuse_separate_threads, refuse_unfit
from .interrupts import Deferred
from .linux import PAGE_BYTES
from .losses import CHANGED, CUT, Loss, find_losses
from .mapped import Mappings, find_refusals
from .named import find_holders, key_of
from .objects import Objects
from .pages import page_runs
from .resources.kind import Entry, all_kinds
from .resources.survey import Holder, Survey
from .sessions import Place, refuse_lost
from .tracee import Tracee

REFUSED: Final = "refused"  # a dump would fail

_WINDOW_PAGES: Final = 64
_SAMPLE_WINDOWS: Final = 64  # 16 MiB: a tenth of a second
_ZEROS: Final = bytes(PAGE_BYTES)


class Finding(NamedTuple):
    """One thing that would not be as before: what becomes of it, in words, and a way out."""

    outcome: str
    pid: int
    descriptors: list[int]
    words: str
    remedy: str


class Member(NamedTuple):
    """One process of those that would be dumped; sizes in bytes."""

    pid: int
    comm: str
    threads: int
    descriptors: int
    raw_bytes: int
    """Pages of its own; with pages of zeros, and with those it shares with its parent since a
    fork."""


class Foresight(NamedTuple):
    """What a dump would do; sizes in bytes, times in seconds.

    `object_bytes`: shared memory, memory files and deleted files, which the image holds too;
    `names` of them are in /dev/shm.
    `estimated_bytes`: what the store would grow by, were nothing of it in there; judged by a
    sample of `sampled_bytes`. `mapped_files` and `open_files` have to be there when it is restored.
    """

    members: list[Member]
    findings: list[Finding]
    raw_bytes: int
    object_bytes: int
    estimated_bytes: int
    sampled_bytes: int
    names: int
    mapped_files: list[str]
    open_files: list[str]
    stopped_s: float
    total_s: float

    @property
    def is_possible(self) -> bool:
        """Whether nothing would be refused."""
        return not any(finding.outcome == REFUSED for finding in self.findings)


def foresee(pid: int) -> Foresight:
    """What `dump.dump` would do with the process and its descendants.

    Raises NotFound, AccessDenied: nobody may look; Busy: a thread does not stop.
    """
    looks_until = time.monotonic() + PASSES_WITHIN_S
    while True:
        found, passes = _foresee(pid)
        if not passes or time.monotonic() > looks_until:
            return found
        time.sleep(PAUSE_S)  # they run meanwhile


def _foresee(pid: int) -> tuple[Foresight, bool]:
    """What is to be seen now; whether some of it goes by itself, which a dump waits for."""
    began = time.monotonic()
    findings: list[Finding] = []
    passing: list[LzyError] = []
    note = _noting(findings, passing)
    pids = _with_descendants(pid)
    if os.getpid() in pids:
        raise Unsupported(
            f"lzy was started by pid {pid} or below it, and cannot stop itself",
            remedy="run it from another terminal",
            pid=pid,
        )
    for each in pids:
        try:
            refuse_unfit(each)
        except Unsupported as error:
            note(error)
        except NotFound:
            if each == pid:
                raise
    all_kinds()
    objects = Objects()
    try:
        looks, entries, losses, stopped_s = _look(pids, objects, note)
        findings += [Finding(*loss, "") for loss in losses]
        _judge_names(objects, looks, findings)
        members: list[Member] = []
        mapped: set[str] = set()
        sizes: dict[int, list[tuple[int, int]]] = {}
        for each, look in looks.items():
            with contextlib.suppress(NotFound, ProcessLookupError, FileNotFoundError):
                sizes[each] = own_page_ranges(proc.witness(each), look.vmas)
                members.append(
                    Member(each, look.comm, look.threads, look.descriptors, _length(sizes[each]))
                )
            mapped.update(vma.path for vma in look.vmas if vma.kind == "file")
        mapped -= {described["path"] for _, described in objects.named()}
        opened = {
            entry["path"]
            for entry in entries
            if entry["kind"] == "file" and entry.get("form") in ("regular", "directory", "name")
        }
        sampled, kept = _sample(sizes)
        raw = sum(member.raw_bytes for member in members)
        foresight = Foresight(
            members,
            sorted(findings, key=lambda it: ((REFUSED, CUT, CHANGED).index(it.outcome), it.pid)),
            raw_bytes=raw,
            object_bytes=objects.total_bytes,
            estimated_bytes=round((raw + objects.total_bytes) * (kept / sampled if sampled else 1)),
            sampled_bytes=sampled,
            names=len(list(objects.named())),
            mapped_files=sorted(mapped),
            open_files=sorted(opened),
            stopped_s=stopped_s,
            total_s=time.monotonic() - began,
        )
        return foresight, bool(passing)
    finally:
        objects.close()


class _Look(NamedTuple):
    comm: str
    threads: int
    descriptors: int
    vmas: list[proc.Vma]


class _Collecting(Survey):
    """A survey that goes on when a description cannot be made again."""

    def __init__(
        self, holders: list[Holder], objects: Objects, note: Callable[[LzyError], None]
    ) -> None:
        super().__init__(holders, objects)
        self._note = note

    def refuse(self, error: Unsupported) -> None:
        self._note(error)


def _with_descendants(pid: int) -> list[int]:
    """The process and its living descendants, parents before children."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(NotFound):
            for child in proc.children(parent):
                with contextlib.suppress(NotFound):
                    if not proc.has_ended(child):
                        found.append(child)
    return found


def _noting(findings: list[Finding], passing: list[LzyError]) -> Callable[[LzyError], None]:
    seen = set()

    def note(error: LzyError) -> None:
        if error.message in seen:
            return
        seen.add(error.message)
        if error.facts.get("passes"):
            passing.append(error)
        numbers = [error.facts["descriptor"]] if "descriptor" in error.facts else []
        pid = int(error.facts.get("pid", 0))
        findings.append(Finding(REFUSED, pid, numbers, error.message, error.remedy))

    return note


def _look(
    pids: list[int], objects: Objects, note: Callable[[LzyError], None]
) -> tuple[dict[int, _Look], list[Entry], list[Loss], float]:
    """All that has to be seen at one instant: what is mapped, what is open."""
    tracees: list[Tracee] = []
    pidfds: list[int] = []
    looks: dict[int, _Look] = {}
    began = time.monotonic()
    try:
        with Deferred():
            for pid in pids:
                try:
                    tracee = Tracee(pid)
                    tracee.seize()
                except NotFound:
                    if pid == pids[0]:
                        raise
                    continue  # it ended meanwhile
                except Unsupported as error:  # somebody else traces it
                    note(error)
                    continue
                tracees.append(tracee)
                pidfds.append(proc.open_shared(pid))
                for check in (
                    interrogate.refuse_foreign_registers, refuse_separate_threads, _read_filters
                ):  # fmt: skip
                    try:
                        check(tracee)
                    except Unsupported as error:
                        note(error)
            _judge_sessions(tracees, note)
            holders = [
                Holder(tracee.pid, pidfd, number=at and tracee.pid, task=tracee.witness)
                for at, (tracee, pidfd) in enumerate(zip(tracees, pidfds, strict=True))
            ]
            entries, losses = _describe(holders, objects, note) if holders else ([], [])
            for tracee in tracees:
                vmas = mapping_flags.mappings(tracee.witness)
                _judge_mappings(tracee.pid, tracee.witness, vmas, objects, note)
                count = len(os.listdir(f"/proc/{tracee.witness}/fd"))
                looks[tracee.pid] = _Look(
                    proc.stat(tracee.pid)[1], len(tracee.threads), count, vmas
                )
    finally:
        with Deferred():
            for tracee in tracees:
                tracee.let_go()
            for pidfd in pidfds:
                os.close(pidfd)
    return looks, entries, losses, time.monotonic() - began


def _read_filters(tracee: Tracee) -> None:
    """Raise Unsupported for a filter that could not be put on again."""
    for thread in tracee.threads.values():
        describe_filters(tracee, thread)


def _judge_sessions(tracees: list[Tracee], note: Callable[[LzyError], None]) -> None:
    """Note processes of sessions that could not be made again; all of them stand still."""
    places: list[Place] = []
    ended: list[int] = []
    known = {tracee.pid for tracee in tracees}
    for tracee in tracees:
        parent = int(proc.status(tracee.witness)["PPid"]) if places else 0
        places.append(Place(tracee.pid, parent, os.getsid(tracee.pid)))
        ended += [child for child in proc.children(tracee.pid) if child not in known]
    with contextlib.suppress(KeyError):  # a parent of theirs is not looked at: it was refused
        try:
            refuse_lost(places, ended)
        except Unsupported as error:
            note(error)


def _describe(
    holders: list[Holder], objects: Objects, note: Callable[[LzyError], None]
) -> tuple[list[Entry], list[Loss]]:
    survey = _Collecting(holders, objects, note)
    try:
        survey.look()
        entries = survey.describe()
        return entries, find_losses(entries, survey)
    except OSError as error:
        raise KernelError(
            f"cannot look at the descriptors of pid {survey.pid} ({error.filename or 'a call'})",
            error.errno or 0,
            pid=survey.pid,
        ) from error
    finally:
        survey.close()


def _judge_mappings(
    pid: int,
    witness: int,
    vmas: list[proc.Vma],
    objects: Objects,
    note: Callable[[LzyError], None],
) -> None:
    refused = set()
    for error in find_refusals(witness, vmas):
        refused.add(error.facts.get("address", 0))
        note(error)
    fit = [vma for vma in vmas if vma.start not in refused]
    mappings = Mappings(witness, fit)
    try:
        mappings.take_objects(objects)
    except Unsupported as error:
        note(error)
    for vma in fit:
        if vma.kind == "file" and vma.path != "/dev/zero":
            try:
                mappings.describe_file(vma)
            except Unsupported as error:
                note(error)


# -- memory with names -----------------------------------------------------------------------------


def _judge_names(objects: Objects, looks: dict[int, _Look], findings: list[Finding]) -> None:
    """Add memory with a name that processes outside have, too: in it they go on."""
    named = list(objects.named())
    if not named:
        return
    keys = [key_of(objects.descriptors[number - 1]) for number, _ in named]
    holders = find_holders(keys, looks)
    for key, (_, described) in zip(keys, named, strict=True):
        if others := holders[key]:
            more = f" and {len(others) - 1} others" if len(others) > 1 else ""
            words = (
                f"{described['path']} is shared with pid {others[0]}{more}, outside of the image: "
                "restored here it is as they have it by then, elsewhere as it is now"
            )
            findings.append(Finding(CHANGED, next(iter(looks)), [], words, ""))


# -- how much ------------------------------------------------------------------------------------


def _length(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def _sample(ranges: dict[int, list[tuple[int, int]]]) -> tuple[int, int]:
    """(bytes looked at, bytes they would take in the store) of windows spread over all memory."""
    windows = [
        (pid, address, mask)
        for pid, own in ranges.items()
        for address, mask in windows_of(own, _WINDOW_PAGES)
    ]
    step = max(len(windows) // _SAMPLE_WINDOWS, 1)
    encoder = Encoder()
    buffer = memoryview(bytearray(_WINDOW_PAGES * PAGE_BYTES))
    looked, kept = 0, 0
    known = set()
    for pid, address, mask in windows[step // 2 :: step]:
        try:
            source = ProcessPages(proc.witness(pid), shares_pages=True)
        except (OSError, LzyError):
            continue
        try:
            length = mask.bit_count() * PAGE_BYTES
            source.read_runs(page_runs([(address, mask)]), buffer[:length])
        except OSError:  # it is gone meanwhile
            continue
        finally:
            source.close()
        looked += length
        pages = [bytes(buffer[at : at + PAGE_BYTES]) for at in range(0, length, PAGE_BYTES)]
        content = b"".join(page for page in pages if page != _ZEROS)
        identity = blake3(content).digest()
        if content and identity not in known:
            known.add(identity)
            kept += len(encoder.encode(content)[1])
    return looked, kept
