"""What `lzy dump --dry-run` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .layout import count, duration, facts, paint, say, say_json, size

if TYPE_CHECKING:
    from ..checkpoint.foresight import Finding, Foresight

_COLOURS = {"refused": "red", "cut": "yellow", "changed": "cyan"}
_FILES_SHOWN = 5


def tell(pid: int, as_json: bool) -> int:
    """Tell what a dump of `pid` would do; the exit status: 4 if it would be refused."""
    from ..checkpoint.errors import Unsupported
    from ..checkpoint.foresight import foresee

    foresight = foresee(pid)
    if as_json:
        say_json(as_document(foresight))
    else:
        say(describe(foresight))
    return 0 if foresight.is_possible else Unsupported.exit_status


def as_document(foresight: Foresight) -> dict[str, object]:
    """The foresight as docs/cli.md specifies it."""
    return {
        "possible": foresight.is_possible,
        "processes": [member._asdict() for member in foresight.members],
        "findings": [finding._asdict() for finding in foresight.findings],
        "raw_bytes": foresight.raw_bytes,
        "object_bytes": foresight.object_bytes,
        "names": foresight.names,
        "estimated_bytes": foresight.estimated_bytes,
        "sampled_bytes": foresight.sampled_bytes,
        "mapped_files": foresight.mapped_files,
        "open_files": foresight.open_files,
        "stopped_s": foresight.stopped_s,
        "total_s": foresight.total_s,
    }


def describe(foresight: Foresight) -> list[str]:
    """The foresight for people."""
    rows = [
        (
            "process" if number == 0 else "",
            f"{member.pid} {member.comm}, {count(member.threads, 'thread')}, "
            f"{count(member.descriptors, 'descriptor')}, {size(member.raw_bytes)}",
        )
        for number, member in enumerate(foresight.members)
    ]
    memory = f"{size(foresight.raw_bytes)}"
    if foresight.object_bytes:
        names = f" ({count(foresight.names, 'name')} in /dev/shm)" if foresight.names else ""
        memory += f" and {size(foresight.object_bytes)} of shared memory and unnamed files{names}"
    if foresight.sampled_bytes:
        memory += (
            f"; the store would grow by about {size(foresight.estimated_bytes)} "
            f"(judged by {size(foresight.sampled_bytes)} of it), less what it has already"
        )
    rows.append(("memory", memory))
    rows.append(("files", _files(foresight)))
    rows.append(("looked", f"for {duration(foresight.stopped_s)}; nothing was changed"))
    several = len(foresight.members) > 1
    lines = [*facts(rows)]
    for finding in foresight.findings:
        lines += _lines(finding, several)
    refused = sum(finding.outcome == "refused" for finding in foresight.findings)
    if refused:
        lines.append(paint(f"a dump would be refused, for {count(refused, 'reason')}", "bold"))
    else:
        cut = sum(finding.outcome == "cut" for finding in foresight.findings)
        lost = f"; {count(cut, 'thing')} would be cut" if cut else ", and nothing would be cut"
        lines.append(paint("it can be dumped" + lost, "bold"))
    return lines


def _lines(finding: Finding, several: bool) -> list[str]:
    where = ""
    if finding.outcome != "refused":  # a refusal says it in its own words
        numbers = ", ".join(map(str, finding.descriptors))
        where = f"descriptor {numbers}: " if numbers else ""
        if several:
            where = f"pid {finding.pid}, {where}"
    lines = [f"{paint(finding.outcome, _COLOURS[finding.outcome])}: {where}{finding.words}"]
    if finding.remedy:
        lines.append(f"  what to do: {finding.remedy}")
    return lines


def _files(foresight: Foresight) -> str:
    """Which files the image counts on: how many are mapped, and which are open."""
    mapped, opened = foresight.mapped_files, foresight.open_files
    text = f"{count(len(mapped), 'mapped file')}, {count(len(opened), 'open one')}"
    if opened:
        more = f" and {len(opened) - _FILES_SHOWN} more" if len(opened) > _FILES_SHOWN else ""
        text += f" ({', '.join(opened[:_FILES_SHOWN])}{more})"
    return f"{text}: to be there, as now, when it is restored"
