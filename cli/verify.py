"""`lzy verify`: reads an image as a restore would, all of it, and believes nothing."""

from __future__ import annotations

import click

from .arguments import complete_image, json_option, store_option
from .layout import count, duration, paint, say, say_json, size
from .stores import open_store


@click.command(
    epilog="""\b
    Examples:
      lzy verify before-training            its newest checkpoint
      lzy verify before-training@3          the third
      lzy verify before-training && lzy rm other
    """
)
@click.argument("image", shell_complete=complete_image)
@store_option
@json_option
def verify(image: str, store: str | None, as_json: bool) -> None:
    """Read and authenticate every byte of IMAGE.

    The manifest's seal, every chunk's address and every pack's size are checked against the
    store's key. Exit status 6 when anything is not what was written.
    """
    from ..checkpoint.history import require_image
    from .progress import ProgressLine

    opened = open_store(store)
    with ProgressLine() as line:
        report = opened.verify(require_image(opened, image), line.update)
    if as_json:
        say_json(
            {
                "image": report.name,
                "chunks": report.chunks,
                "packs": report.packs,
                "content_bytes": report.content_bytes,
                "stored_bytes": report.stored_bytes,
                "total_s": report.duration_s,
            }
        )
        return
    good = paint("every byte is as it was written", "green")
    read = f"{count(report.chunks, 'chunk')}, {size(report.content_bytes)}"
    say([f"{paint(report.name, 'bold')}: {good} ({read} in {duration(report.duration_s)})"])
