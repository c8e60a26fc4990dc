"""Descriptors: what a process holds open, described so that it can be made again elsewhere.

At dump, `describe_descriptors` asks a frozen process's descriptors everything from outside. At
restore, `make_descriptors` makes them in the restorer, `place_descriptors` puts them at their
numbers in the child that becomes the process, and `finish_descriptors` does what needs the process
to exist. One module per kind; `kind.Kind` says what a kind must do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .assembly import (
    chosen_places,
    close_descriptors,
    find_lacking,
    find_to_be_placed,
    finish_descriptors,
    free_number,
    make_descriptors,
    place_descriptors,
)
from .kind import NoObjects, ObjectSink, ObjectSource, RestoreOptions, all_kinds
from .locks import posix_locks

if TYPE_CHECKING:
    from .release import hold_connections, release_descriptors
    from .survey import Holder, describe_descriptors, describe_together

__all__ = [
    "Holder",
    "NoObjects",
    "ObjectSink",
    "ObjectSource",
    "RestoreOptions",
    "chosen_places",
    "close_descriptors",
    "describe_descriptors",
    "describe_together",
    "find_lacking",
    "find_to_be_placed",
    "finish_descriptors",
    "free_number",
    "hold_connections",
    "load_kinds",
    "make_descriptors",
    "place_descriptors",
    "posix_locks",
    "release_descriptors",
]


def load_kinds() -> None:
    """Load all that `describe_descriptors` needs, so that a frozen process need not wait for it."""
    from . import release, survey  # noqa: F401 - loaded for later

    all_kinds()


def __getattr__(name: str) -> Any:
    # What only a dump needs is loaded then: a restore must not wait for it.
    if name in ("Holder", "describe_descriptors", "describe_together"):
        from . import survey

        return getattr(survey, name)
    if name in ("hold_connections", "release_descriptors"):
        from . import release

        return getattr(release, name)
    raise AttributeError(name)
