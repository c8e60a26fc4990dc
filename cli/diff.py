"""`lzy diff`: which memory changed between two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .arguments import complete_image, json_option, store_option
from .layout import bar, duration, facts, paint, say, say_json, share, size, table
from .stores import load_image, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..checkpoint.compare import Changes, Comparison, MappingChanges, ProcessChanges
    from ..checkpoint.image import Image

_SHOWN_ROWS = 12


@click.command(
    epilog="""\b
    Examples:
      lzy diff analysis@3 analysis@5        from the third to the fifth
      lzy diff analysis@5                   from the one that it grew from
      lzy diff analysis@3 analysis --all    to the newest, every mapping that changed
    """
)
@click.argument("before", metavar="[BEFORE]", shell_complete=complete_image)
@click.argument("after", required=False, shell_complete=complete_image)
@store_option
@click.option("--all", "everything", is_flag=True, help="Show every row, not only the largest.")
@json_option
def diff(
    before: str, after: str | None, store: str | None, everything: bool, as_json: bool
) -> None:
    """Tell which mappings changed from checkpoint BEFORE to AFTER, and by how many bytes.

    Of a tree, those of each of its processes.

    With one name, what changed since the checkpoint that it grew from. `changed`: pages that both
    hold, with other bytes; `new` and `gone`: pages that only one of them holds. Pages of zeros and
    unchanged pages of files are held by none.
    """
    from ..checkpoint.compare import compare_images
    from .progress import ProgressLine

    opened = open_store(store)
    if after is None:
        before, after = _parent(store, before), before
    with load_image(store, before) as earlier, load_image(store, after) as later:
        opened.close()
        with ProgressLine() as line:
            found = compare_images(earlier, later, line.update)
        if as_json:
            say_json(as_document(earlier, later, found))
        else:
            say(describe(earlier, later, found, None if everything else _SHOWN_ROWS))


def _parent(store: str | None, name: str) -> str:
    from ..checkpoint.errors import NotFound
    from ..checkpoint.history import session_facts, spell

    with load_image(store, name) as image:
        parent = session_facts(image.document, image.name).get("parent")
        if not parent:
            raise NotFound(
                f"{spell(image.name)} grew from no other checkpoint",
                remedy="name two: lzy diff BEFORE AFTER",
                image=image.name,
            )
        return spell(parent)


def as_document(before: Image, after: Image, found: Comparison) -> dict[str, Any]:
    """The comparison as docs/cli.md specifies it."""
    from ..checkpoint.history import spell

    return {
        "before": spell(before.name),
        "after": spell(after.name),
        "changed_bytes": found.sum("changed_bytes"),
        "new_bytes": found.sum("new_bytes"),
        "gone_bytes": found.sum("gone_bytes"),
        "raw_bytes": after.raw_bytes,
        "read_bytes": found.read_bytes,
        "total_s": found.duration_s,
        "processes": [
            {
                "pid": process.pid,
                "comm": process.comm,
                "presence": process.presence,
                "changed_bytes": process.sum("changed_bytes"),
                "new_bytes": process.sum("new_bytes"),
                "gone_bytes": process.sum("gone_bytes"),
            }
            for process in found.processes
        ],
        "mappings": [
            {
                "pid": process.pid,
                "start": mapping.start,
                "end": mapping.end,
                "permissions": mapping.permissions,
                "kind": mapping.kind,
                "path": mapping.path or None,
                "presence": mapping.presence,
                **_figures(mapping),
            }
            for process in found.processes
            for mapping in process.mappings
            if mapping.total_bytes or mapping.presence != "both"
        ],
        "objects": [
            {"object": held.name, "presence": held.presence, **_figures(held)}
            for held in found.objects
            if held.total_bytes or held.presence != "both"
        ],
        "notes": _notes(before, after),
    }


def _figures(part: Changes) -> dict[str, int]:
    return {
        "changed_bytes": part.changed_bytes,
        "new_bytes": part.new_bytes,
        "gone_bytes": part.gone_bytes,
    }


def _notes(before: Image, after: Image) -> list[str]:
    """What makes the figures mean less than they seem to."""
    one, two = before.document, after.document
    if (one.get("pid"), one.get("comm")) == (two.get("pid"), two.get("comm")):
        return []
    return [
        f"they are of different processes: {one.get('comm')}, pid {one.get('pid')}, and "
        f"{two.get('comm')}, pid {two.get('pid')}"
    ]


def describe(before: Image, after: Image, found: Comparison, rows: int | None) -> list[str]:
    """The comparison for people; at most `rows` rows."""
    from ..checkpoint.history import spell

    several = len(found.processes) > 1
    parts: list[tuple[str, str, str, Changes]] = [
        (
            f"{m.start:#x}",
            m.permissions,
            (m.path or m.kind or "anonymous") + (f" of {process.pid}" if several else ""),
            m,
        )
        for process in found.processes
        for m in process.mappings
    ]
    parts += [("", "", held.name or "memory object", held) for held in found.objects]
    parts = [part for part in parts if part[3].total_bytes]
    parts.sort(key=lambda part: -part[3].total_bytes)
    total = found.sum("total_bytes")
    earlier, later = (image.document.get("taken_unix_s") for image in (before, after))
    apart = f", {duration(abs(later - earlier))} apart" if earlier and later else ""
    lines = facts(
        [
            ("from", f"{paint(spell(before.name), 'bold')}"),
            ("to", f"{paint(spell(after.name), 'bold')}{apart}"),
            ("changed", _amount(found.sum("changed_bytes"), after.raw_bytes)),
            ("new", _amount(found.sum("new_bytes"), after.raw_bytes)),
            ("gone", _amount(found.sum("gone_bytes"), after.raw_bytes)),
            *([("processes", _count(found.processes))] if several else []),
            ("mappings", _count(found.mappings)),
        ]
    )
    lines += [f"{paint('note', 'yellow')}: {note}" for note in _notes(before, after)]
    if not parts:
        return [*lines, "", "no page differs"]
    if several:
        lines += ["", *_tell_processes(found, total)]
    lines += [""]
    lines += table(
        ["address", "", "changed", "new", "gone", "", "of"],
        [
            (
                address,
                permissions,
                *(size(amount) if amount else "–" for amount in _figures(part).values()),
                paint(bar(part.total_bytes, total, 12), "cyan"),
                name,
            )
            for address, permissions, name, part in parts[:rows]
        ],
        right=(0, 2, 3, 4),
    )
    if rows is not None and len(parts) > rows:
        lines.append(paint(f"… and {len(parts) - rows} more; --all shows them", "dim"))
    return lines


def _count(parts: Sequence[ProcessChanges] | Sequence[MappingChanges]) -> str:
    appeared = sum(part.presence == "new" for part in parts)
    vanished = sum(part.presence == "gone" for part in parts)
    return f"{len(parts) - vanished} ({appeared} new, {vanished} gone)"


def _tell_processes(found: Comparison, total_bytes: int) -> list[str]:
    """What changed in each process of a tree."""
    figures = ("changed_bytes", "new_bytes", "gone_bytes")
    return table(
        ["process", "", "changed", "new", "gone", "", ""],
        [
            (
                str(process.pid),
                process.comm,
                *(size(amount) if (amount := process.sum(what)) else "–" for what in figures),
                paint(bar(process.sum("total_bytes"), total_bytes, 12), "cyan"),
                "" if process.presence == "both" else process.presence,
            )
            for process in found.processes
        ],
        right=(0, 2, 3, 4),
    )


def _amount(amount_bytes: int, whole_bytes: int) -> str:
    return f"{size(amount_bytes)} ({share(amount_bytes, whole_bytes)})" if amount_bytes else "–"
