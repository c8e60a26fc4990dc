"""The flags of mappings, told without a look at their pages: what each number means is learnt.

/proc/PID/smaps names the flags of each mapping, and counts its pages for it, 25 ms a GiB, and so
does numa_maps. The kernel's own list (`linux.bpf`) has them as a number, at once. So of a large
process the words for each number are learnt from smaps, once for a boot of the machine; from then
on it is asked only about numbers that nobody has seen yet. Where lzy may not read that list, and of
small processes, smaps is read as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from typing import NamedTuple

from . import proc
from .home import run_directory
from .linux import PAGE_BYTES
from .linux.bpf import Layout, Mapping, MappingList, find_layout
from .proc import Vma

LARGE_BYTES = 128 << 20
"""Of less memory smaps takes no longer than to begin to read the list."""
_MANY_SIZES = "ht"  # of huge pages that are set aside: only smaps tells how large they are
_ATTEMPTS = 3
_MOST_PLACES = 200

Flags = dict[int, frozenset[str]]
"""The flags of mappings by where they start"""


class _Seen(NamedTuple):
    """What this process knows of the kernel: its list, and what numbers mean."""

    owner_pid: int
    mappings: MappingList | None
    words: dict[int, frozenset[str]]


_seen: list[_Seen] = []


def mappings(pid: int) -> list[Vma]:
    """The mappings of a process with their flags, in address order. Raises NotFound."""
    return look(pid)[1]


def look(pid: int) -> tuple[bytes, list[Vma]]:
    """Both what is /proc/PID/maps and the mappings with their flags.

    Should the first read the same later, the second still hold, but for what is advised.
    """
    witness = proc.witness(pid)
    if is_large(witness):
        for _ in range(_ATTEMPTS):  # it may run, and change them in between
            if (told := _told(witness)) is None:
                break
            places = proc.read_bytes(witness, "maps")
            vmas = proc.parse_mappings(places)
            flags = {one.start: words for one, words in told}
            ends = {one.start: one.end for one, _ in told}
            if all(ends.get(v.start) == v.end or v.kind == "vsyscall" for v in vmas):
                known = [v._replace(flags=flags.get(v.start, v.flags)) for v in vmas]
                return places, proc.look_up(witness, known)
    details = _read_smaps(witness)
    return proc.places_in(details), proc.look_up(witness, proc.parse_mappings(details))


def look_closely(
    pid: int, policies: dict[str, str] | None = None
) -> tuple[Flags, dict[str, str]] | None:
    """The flags, and NUMA policies by start, of what stands still; None if that takes long.

    `policies`: as the process itself has told them (see `find_places_of_policies`).
    """
    if not is_large(pid) or (told := _told(pid)) is None:
        return None
    if policies is None:
        if _has_policies(told):
            return None
        policies = {}
    return {one.start: words for one, words in told}, policies


def find_places_of_policies(pid: int) -> list[int] | None:
    """Where there may be NUMA policies, of what stands still; None if that takes long.

    numa_maps tells them as well, but counts every page for it. With more than one node to choose
    from, shared memory may have some that do not stand in the list.
    """
    if not is_large(pid) or (told := _told(pid)) is None:
        return None
    several = _may_choose_nodes()
    found = [one.start for one, words in told if one.policy or (several and "sh" in words)]
    return found if len(found) <= _MOST_PLACES else None


def look_long(pid: int) -> tuple[Flags, dict[str, str]]:
    """As `look_closely`, however long that takes."""
    return proc.parse_flags(_read_smaps(pid)), proc.memory_policies(pid)


def _has_policies(told: Iterable[tuple[Mapping, frozenset[str]]]) -> bool:
    """Whether there may be NUMA policies."""
    return any(one.policy for one, _ in told) or _may_choose_nodes()


def _may_choose_nodes() -> bool:
    with contextlib.suppress(OSError):
        return proc.read_file("/sys/devices/system/node/has_memory").strip() != b"0"
    return False


def is_large(pid: int) -> bool:
    """Whether the process has so much memory that to read smaps takes long."""
    return int(proc.read_bytes(pid, "statm").split()[1]) * PAGE_BYTES >= LARGE_BYTES


def _told(pid: int) -> list[tuple[Mapping, frozenset[str]]] | None:
    """Each mapping with the words for its flags, of a `proc.witness`; None if one is not known."""
    seen = _open()
    if seen.mappings is None:
        return None
    try:
        listed = seen.mappings.read(pid)
    except OSError:
        return None
    words = [seen.words.get(one.flags) for one in listed]
    found = [(one, known) for one, known in zip(listed, words, strict=True) if known is not None]
    if not listed or len(found) < len(listed) or any(_MANY_SIZES in known for _, known in found):
        return None
    return found


def _read_smaps(pid: int) -> bytes:
    """/proc/PID/smaps; what it says of numbers that were not known is learnt."""
    seen = _open() if is_large(pid) else None
    if seen is None or seen.mappings is None:
        return proc.read_bytes(pid, "smaps")
    with contextlib.suppress(OSError):
        before = seen.mappings.read(pid)
        details = proc.read_bytes(pid, "smaps")
        _learn(seen, details, set(before).intersection(seen.mappings.read(pid)))
        return details
    return proc.read_bytes(pid, "smaps")


def _learn(seen: _Seen, details: bytes, unchanged: Iterable[Mapping]) -> None:
    """Know the words for the flags of mappings of which nothing changed while smaps was read."""
    flags = proc.parse_flags(details)
    new = {m.flags: flags[m.start] for m in unchanged if m.start in flags}
    if new.keys() - seen.words.keys():
        seen.words.update(new)
        with contextlib.suppress(OSError):
            _remember(_recall()[0], seen.words)


def _open() -> _Seen:
    """What there is to know, once for each process: who forked us may have closed everything."""
    if _seen and _seen[0].owner_pid == os.getpid():
        return _seen[0]
    listing: MappingList | None = None
    words: dict[int, frozenset[str]] = {}
    with contextlib.suppress(OSError):
        layout, words = _recall()
        if layout:
            listing = MappingList(layout)
    _seen[:] = [_Seen(os.getpid(), listing, words)]
    return _seen[0]


def _recall() -> tuple[Layout | None, dict[int, frozenset[str]]]:
    """What was written down since the machine began; it is found out and written down if not."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        told = json.loads((run_directory() / "mapping-flags.json").read_bytes())
        if told["boot_id"] == proc.boot_id():
            layout = told["layout"] and Layout(told["layout"][0], tuple(told["layout"][1]))
            return layout, {int(n): frozenset(words) for n, words in told["words"].items()}
    found = None
    with contextlib.suppress(OSError):
        found = find_layout()
    _remember(found, {})
    return found, {}


def _remember(layout: Layout | None, words: dict[int, frozenset[str]]) -> None:
    path = run_directory() / "mapping-flags.json"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    told = {
        "boot_id": proc.boot_id(),
        "layout": layout,
        "words": {number: sorted(flags) for number, flags in words.items()},
    }
    draft = path.with_suffix(f".{os.getpid()}.new")
    draft.write_text(json.dumps(told))
    os.rename(draft, path)
