"""`lzy rm` and `lzy gc`: removing an image is quick; its space comes back with the collection."""

from __future__ import annotations

import click

from .arguments import complete_image, json_option, store_option
from .layout import count, paint, say, say_json, size
from .stores import open_store


@click.command(
    epilog="""\b
    Examples:
      lzy rm before-training after-training
      lzy rm analysis@3                     one checkpoint of many
      lzy rm analysis --all                 the session with all its checkpoints
      lzy rm before-training && lzy gc
    """
)
@click.argument("images", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_image)
@store_option
@click.option("--all", "everything", is_flag=True, help="Remove every checkpoint of a session.")
@json_option
def rm(images: tuple[str, ...], store: str | None, everything: bool, as_json: bool) -> None:
    """Remove images: NAME@NUMBER is one checkpoint, NAME a session.

    A session of several checkpoints goes only with --all. Space is given back by `lzy gc`, except
    what other images share. All names are looked up before anything is removed.
    """
    from ..checkpoint.history import has_number, image_name, require_image, require_session, spell

    opened = open_store(store)
    chosen: dict[str, str] = {}  # image: what it is called here
    for asked in images:
        numbers = [] if has_number(asked) else require_session(opened, asked)
        if len(numbers) > 1 and not everything:
            newest, oldest = f"{asked}@{numbers[-1]}", f"{asked}@{numbers[0]}"
            raise click.UsageError(
                f"{asked} is a session of {count(len(numbers), 'checkpoint')} ({oldest} to "
                f"{newest}). Name one of them, or give --all; lzy forget thins them out."
            )
        if has_number(asked):
            chosen[require_image(opened, asked)] = asked
        else:
            for number in numbers:
                image = image_name(asked, number)
                chosen[image] = asked if len(numbers) == 1 else spell(image)
    for image, called in chosen.items():
        opened.remove(image)
        if not as_json:
            say([f"removed {paint(called, 'bold')}"])
    if as_json:
        say_json({"removed": list(chosen.values())})


@click.command(
    epilog="""\b
    Examples:
      lzy gc
      lzy gc --store /data/images --json
    """
)
@store_option
@json_option
def gc(store: str | None, as_json: bool) -> None:
    """Give back the space of removed images and of dumps that never finished.

    Waits for nobody: while a dump writes to the store this is refused with exit status 8.
    """
    report = open_store(store).collect_garbage()
    if as_json:
        say_json(
            {
                "removed_bytes": report.removed_bytes,
                "removed_packs": report.removed_packs,
                "hollowed_bytes": report.hollowed_bytes,
                "removed_temporaries": report.removed_temporaries,
                "kept_bytes": report.kept_bytes,
                "kept_packs": report.kept_packs,
            }
        )
        return
    packs = count(report.removed_packs, "pack")
    given = f"gave back {size(report.removed_bytes)} ({packs})"
    if report.hollowed_bytes:
        given += f" and {size(report.hollowed_bytes)} inside packs"
    say([f"{given}; {size(report.kept_bytes)} in use"])
