"""`lzy forget`: thin out a session's checkpoints, and say what that would give back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from .arguments import complete_session, json_option, store_option
from .layout import age, count, paint, say, say_json, size, table
from .stores import open_store

if TYPE_CHECKING:
    from ..checkpoint.log import Checkpoint
    from ..checkpoint.store import Store

_SOME = click.IntRange(min=1)


@click.command(
    epilog="""\b
    Examples:
      lzy forget analysis --keep-last 5 --dry-run          what would go
      lzy forget analysis --keep-hourly 24 --keep-daily 7  a day by the hour, a week by the day
      lzy forget analysis --keep-last 1 --gc               all but the newest, space at once
    """
)
@click.argument("name", shell_complete=complete_session)
@store_option
@click.option("--keep-last", metavar="N", type=_SOME, help="Keep the N newest.")
@click.option(
    "--keep-hourly",
    metavar="N",
    type=_SOME,
    help="Keep the newest of each of the last N hours that have one.",
)
@click.option(
    "--keep-daily",
    metavar="N",
    type=_SOME,
    help="Keep the newest of each of the last N days that have one.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@click.option("--gc", "collect", is_flag=True, help="Give the space back now, as lzy gc does.")
@json_option
def forget(
    name: str,
    store: str | None,
    keep_last: int | None,
    keep_hourly: int | None,
    keep_daily: int | None,
    dry_run: bool,
    collect: bool,
    as_json: bool,
) -> None:
    """Remove checkpoints of the session NAME, all but those that a --keep option keeps.

    Several options keep what any of them keeps. Hours and days are those of this machine's clock.
    The newest checkpoint always stays, and so do those in use and damaged ones (lzy rm removes
    them).
    """
    from ..checkpoint.errors import Busy, NotFound
    from ..checkpoint.garbage import measure_garbage
    from ..checkpoint.history import has_number
    from ..checkpoint.log import read_log
    from ..checkpoint.retention import choose_kept, is_in_use

    if not (keep_last or keep_hourly or keep_daily):
        raise click.UsageError("Say what to keep: --keep-last, --keep-hourly or --keep-daily.")
    if dry_run and collect:
        raise click.UsageError("Give either --dry-run or --gc.")
    if has_number(name):
        raise click.UsageError(f"{name!r} is one checkpoint; lzy rm removes it.")
    opened = open_store(store)
    found = read_log(opened, name)
    kept = choose_kept(
        [(entry.number, entry.taken_unix_s) for entry in found if not entry.damage],
        last=keep_last or 0,
        hourly=keep_hourly or 0,
        daily=keep_daily or 0,
    )
    for entry in found:
        if entry.damage:
            kept[entry.number] = ["damaged"]
    removed: list[Checkpoint] = []
    for entry in found:
        if entry.number in kept:
            continue
        try:
            if dry_run and is_in_use(opened, entry.image):
                raise Busy(f"image {entry.image} is in use")
            if not dry_run:
                opened.remove(entry.image)
        except Busy:
            kept[entry.number] = ["in use"]
        except NotFound:
            continue  # somebody else removed it meanwhile
        else:
            removed.append(entry)
    gone = {entry.image for entry in removed}
    freed_bytes = _collect(opened) if collect else measure_garbage(opened, gone)
    if as_json:
        say_json(
            {
                "session": name,
                "dry_run": dry_run,
                "removed": [entry.name for entry in removed],
                "kept": [
                    {"name": entry.name, "reasons": kept[entry.number]}
                    for entry in found
                    if entry.number in kept
                ],
                "collected": collect,
                "garbage_bytes": freed_bytes,
            }
        )
        return
    say(_describe(found, kept, gone, dry_run=dry_run))
    if collect:
        say([f"gave back {size(freed_bytes)}"])
    elif dry_run:
        say([f"nothing was removed; `lzy gc` would then give back about {size(freed_bytes)}"])
    else:
        say([f"`lzy gc` would give back about {size(freed_bytes)}"])


def _collect(store: Store) -> int:
    report = store.collect_garbage()
    return report.removed_bytes + report.hollowed_bytes


def _describe(
    found: list[Checkpoint], kept: dict[int, list[str]], gone: set[str], *, dry_run: bool
) -> list[str]:
    now_s = time.time()

    def row(entry: Checkpoint) -> tuple[Any, ...]:
        taken = "?" if entry.damage else age(now_s - entry.taken_unix_s)
        if entry.image in gone:
            fate = paint("would be removed" if dry_run else "removed", "yellow")
        else:
            fate = f"kept: {', '.join(kept.get(entry.number, ['gone already']))}"
        return paint(entry.name, "bold"), taken, fate

    lines = table(["checkpoint", "taken", ""], [row(entry) for entry in found])
    verb = "would go" if dry_run else "removed"
    total = f"{count(len(gone), 'checkpoint')} {verb}, {len(found) - len(gone)} kept"
    return [*lines, paint(total, "dim")]
