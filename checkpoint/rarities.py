"""What few processes have: looked for at a restore, and its module loaded where there is any."""

from __future__ import annotations

from typing import Any

from .tracee import Tracee

MADE_LATER = frozenset({"vdso", "vvar", "ring"})
"""Kinds of mappings that are not made with the others."""


def make_rarities(tracee: Tracee, document: dict[str, Any]) -> None:
    """io_urings, with the process's descriptors in place and all its threads there, still ours."""
    table = document["descriptors"]
    if any(entry["kind"] == "io_uring" for entry in table["descriptions"]):
        from .rings import make_rings

        make_rings(tracee, table, document["vmas"])
