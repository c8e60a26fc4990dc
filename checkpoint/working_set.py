"""The order in which a process needs its memory once it wakes, kept beside its image as a hint.

    hints/NAME.order    window addresses of image NAME, what is needed first coming first

It says where to look first and nothing else. Whatever it names is read and authenticated like all
other memory, and what it does not name comes afterwards: a hint that is missing, old, damaged or
forged costs time and never a byte. The layout is told in docs/format.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .store import Store

MOST_WINDOWS = 1 << 18
"""Windows in a hint, at most: 64 GiB of the largest ones."""

_MAGIC = b"LZYORDER"
_VERSION = 1
_HEADER_BYTES = 16
_FOLDER = "hints"
_SUFFIX = ".order"


def read_order(store: Path, image: str) -> list[int]:
    """Addresses in the order of need; none when there is no hint that makes sense.

    They are whatever the file says: look each of them up in the image.
    """
    try:
        with open(_place(store, image), "rb") as file:
            head = file.read(_HEADER_BYTES)
            body = file.read(8 * MOST_WINDOWS)
    except OSError:
        return []
    count = int.from_bytes(head[12:16], "little")
    if head[:8] != _MAGIC or int.from_bytes(head[8:12], "little") != _VERSION:
        return []
    if len(head) != _HEADER_BYTES or len(body) != 8 * count:
        return []
    order = array("Q", body)
    if sys.byteorder == "big":
        order.byteswap()
    return order.tolist()


def write_order(store: Path, image: str, order: Sequence[int]) -> None:
    """Put this hint in place of the one there is, whole or not at all; OSError."""
    kept = array("Q", order[:MOST_WINDOWS])
    if sys.byteorder == "big":
        kept.byteswap()
    place = _place(store, image)
    place.parent.mkdir(mode=0o700, exist_ok=True)
    # Not synced: after a power failure it may be empty, which is no hint.
    draft = place.with_name(f".{image}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(draft, flags, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + _VERSION.to_bytes(4, "little") + len(kept).to_bytes(4, "little"))
            file.write(kept.tobytes())
        os.rename(draft, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def remove_order(store: Path, image: str) -> None:
    """Remove the hint of an image, if there is one that can be removed."""
    with contextlib.suppress(OSError):
        os.unlink(_place(store, image))


def remove_strays(store: Path, images: Collection[str]) -> int:
    """Remove the hints of images that are not among `images`, and drafts; how many.

    Precondition: nobody writes images. A pager that is just about to write loses a hint.
    """
    removed = 0
    with contextlib.suppress(OSError):
        for name in os.listdir(store / _FOLDER):
            if name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX).partition("#")[0] in images:
                continue
            with contextlib.suppress(OSError):
                os.unlink(store / _FOLDER / name)
                removed += 1
    return removed


def inherit_order(store: Store, from_image: str, to_image: str) -> None:
    """Give `to_image`, a later image of the same process, what is known of `from_image`."""
    if order := read_order(store.path, from_image):
        with contextlib.suppress(OSError):
            write_order(store.path, to_image, order)


def seed_order(store: Store, image: str, dirtied: Iterable[int]) -> None:
    """Join to what is known of `image` the windows that its process wrote to last.

    What was needed at a wake stays in front, in the order of need. Of the others it is only known
    that they are in use, so they follow in the order given.
    """
    known = read_order(store.path, image)
    joined = list(dict.fromkeys([*known, *dirtied]))
    if len(joined) > len(known):
        with contextlib.suppress(OSError):
            write_order(store.path, image, joined)


def merge_order(
    known: Sequence[int], needed: Mapping[int, int], unneeded: Collection[int] = ()
) -> list[int]:
    """The order of need after one more wake.

    `needed`: windows that were asked for before they had been brought in, in the order in which
    that happened; to each, how many of the `known` ones had been brought in by then. So it was
    wanted no later than the next of these, and goes before it. A known window that was not asked
    for keeps its place: it came in time, or was not wanted; nobody saw which.

    `unneeded`: known windows that were held back to see, and that nobody asked for. As many of
    them are dropped as were needed: a wake at which nothing happens teaches nothing.
    """
    places = {window: place for place, window in enumerate(known)}
    dropped = set(list(unneeded)[: len(needed)])
    keys = [(place, 1, window) for window, place in places.items() if window not in needed]
    keys = [key for key in keys if key[2] not in dropped]
    late = len(known)
    asked = [
        (min(place, places.get(window, late)), 0, rank, window)
        for rank, (window, place) in enumerate(needed.items())
    ]
    merged = sorted(
        [(place, second, 0, window) for place, second, window in keys] + asked,
        key=lambda key: key[:3],
    )
    return [key[3] for key in merged][:MOST_WINDOWS]


def order_windows(
    windows: Iterable[tuple[int, int]], order: Sequence[int]
) -> list[tuple[int, int]]:
    """The same (address, mask) windows: those of `order` first and in that order, then the rest.

    So a pack that is written from front to back is read from front to back at the next wake.
    """
    masks = dict(windows)
    first = [(address, masks.pop(address)) for address in order if address in masks]
    return first + list(masks.items())


def _place(store: Path, image: str) -> Path:
    return store / _FOLDER / f"{image}{_SUFFIX}"
