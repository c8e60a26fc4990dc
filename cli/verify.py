"""`lzy verify`: reads an image as a restore would, all of it, and believes nothing."""

from __future__ import annotations

import time

import click

from .arguments import complete_image, json_option, open_store, store_option
from .layout import count, duration, paint, say, say_json, size


@click.command(
    epilog="""\b
    Examples:
      lzy verify before-training
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
    from .progress import ProgressLine

    began_s = time.monotonic()
    with ProgressLine() as line:
        report = open_store(store).verify(image, line.update)
    total_s = time.monotonic() - began_s
    if as_json:
        say_json(
            {
                "image": image,
                "chunks": report.chunks,
                "raw_bytes": report.raw_bytes,
                "stored_bytes": report.stored_bytes,
                "total_s": total_s,
            }
        )
        return
    good = paint("every byte is as it was written", "green")
    amounts = f"{count(report.chunks, 'chunk')}, {size(report.raw_bytes)}"
    say([f"{paint(image, 'bold')}: {good} ({amounts} in {duration(total_s)})"])
