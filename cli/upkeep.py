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
      lzy rm before-training && lzy gc
    """
)
@click.argument(
    "images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_image
)
@store_option
@json_option
def rm(images: tuple[str, ...], store: str | None, as_json: bool) -> None:
    """Remove images.

    Their space is given back by `lzy gc`, except what other images share. When a name is not
    known, those before it are removed all the same.
    """
    opened = open_store(store)
    for name in images:
        opened.remove(name)
        if not as_json:
            say([f"removed {paint(name, 'bold')}"])
    if as_json:
        say_json({"removed": list(images)})


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
                "removed_temporaries": report.removed_temporaries,
                "kept_bytes": report.kept_bytes,
                "kept_packs": report.kept_packs,
            }
        )
        return
    packs = count(report.removed_packs, "pack")
    say([f"gave back {size(report.removed_bytes)} ({packs}); {size(report.kept_bytes)} in use"])
