"""`lzy images`: what is in the store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from .arguments import json_option, store_option
from .layout import age, count, paint, say, say_json, size, table
from .stores import open_store, store_path

if TYPE_CHECKING:
    from ..checkpoint.store import ImageSummary


@click.command(
    epilog="""\b
    Examples:
      lzy images
      lzy images --json | jq -r '.images[0].name'
    """
)
@store_option
@json_option
def images(store: str | None, as_json: bool) -> None:
    """List the images in the store, newest first.

    `memory` is what the process had; `stored` is what its image added to the store: zeros are not
    stored, nor is content that the store already has (`shared`).
    """
    from ..checkpoint.history import list_sessions, split_name

    opened = open_store(store)
    sessions = list_sessions(opened)
    found = [_named(image, sessions) for image in opened.images()]
    path = store_path(store)
    if as_json:
        rows = [
            {
                "name": image.name,
                "session": split_name(image.name)[0],
                "number": split_name(image.name)[1],
                "created_unix_s": image.created_unix_s,
                "raw_bytes": image.raw_bytes,
                "zero_bytes": image.zero_bytes,
                "stored_bytes": image.stored_bytes,
                "reused_bytes": image.reused_bytes,
                "manifest_bytes": image.manifest_bytes,
                "chunks": image.chunk_count,
                "damage": image.damage or None,
            }
            for image in found
        ]
        say_json({"store": str(path), "images": rows})
        return
    if not found:
        say([f"no images in {path}; `lzy dump PID` makes one"])
        return
    now_s = time.time()
    lines = table(
        ["image", "taken", "memory", "stored", "shared"],
        [_row(image, now_s) for image in found],
        right=(2, 3, 4),
    )
    stored = size(sum(image.stored_bytes for image in found))
    say([*lines, paint(f"{count(len(found), 'image')}, {stored} in {path}", "dim")])


def _named(image: ImageSummary, sessions: dict[str, list[int]]) -> ImageSummary:
    """By a name that other commands take for that image: the first of several has a number too."""
    several = len(sessions.get(image.name, [])) > 1
    return image._replace(name=f"{image.name}@1") if several else image


def _row(image: ImageSummary, now_s: float) -> tuple[str, ...]:
    if image.damage:
        return paint(image.name, "bold"), paint("damaged", "red"), "?", "?", "?"
    return (
        paint(image.name, "bold"),
        age(now_s - image.created_unix_s),
        size(image.raw_bytes),
        size(image.stored_bytes),
        size(image.reused_bytes) if image.reused_bytes else "–",
    )
