"""What few processes have: looked for at a restore, and its module loaded where there is any."""

from __future__ import annotations

from typing import Any

from .tracee import Thread, Tracee

MADE_LATER = frozenset({"vdso", "vvar", "ring"})
"""Kinds of mappings that are not made with the others."""


def make_rarities(
    tracee: Tracee,
    document: dict[str, Any],
    threads: list[Thread],
    descriptions: list[dict[str, Any]],
) -> None:
    """io_urings and filters, when the descriptors are in place and all threads there, still ours.

    `threads` are in the order of those in the document of the process, `descriptions` those of
    its tree.
    """
    if any(entry["kind"] == "io_uring" for entry in descriptions):
        from .rings import make_rings

        make_rings(tracee, descriptions, document["descriptors"]["descriptors"], document["vmas"])
    if any(thread.get("filters") for thread in document["threads"]):
        from .filters import install_filters

        install_filters(tracee, document["threads"], threads)
